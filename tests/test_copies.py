"""Copies of a wrapped model: deepcopy, files that a fresh process loads, moving averages. They cycle on by themselves.

That a copy has weights, mode and class of its own, `test_wrap.py` holds on toys.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as hf
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import toys
from benchmarks.matrix.repeated import make_nondegenerate
from cyclekd import CycleLoss, CycleOutput, set_cycles, unwrap_multicycle, wrap_multicycle

# -- models --------------------------------------------------------------------------------------------------


def deit() -> nn.Module:
    return make_nondegenerate(timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3, num_classes=3))


def vit() -> nn.Module:
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = hf.ViTConfig(**size, image_size=32, patch_size=16, num_labels=3)
    return make_nondegenerate(hf.ViTForImageClassification(config))


FAMILIES = {"timm": deit, "transformers": vit}


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def logits(output: object) -> Tensor:
    return getattr(output, "logits", output)


def step(model: nn.Module, x: Tensor) -> None:
    """One step of SGD on every cycle."""
    criterion = CycleLoss(lambda output, labels: F.cross_entropy(logits(output), labels))
    model.zero_grad()
    criterion(model.train()(x), torch.tensor([0, 2])).total.backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


# -- in this process -----------------------------------------------------------------------------------------


def deep(model: nn.Module, folder: Path) -> nn.Module:
    return copy.deepcopy(model)


def through_a_file(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("how", [deep, through_a_file], ids=["deepcopy", "torch.save"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_trains_as_the_original_would_and_leaves_it_alone(
    family: str, how: Callable, training: bool, tmp_path: Path
) -> None:
    model = wrap_multicycle(FAMILIES[family](), 3)
    step(model, images())
    before = weights(model)
    twin = how(model.train(training), tmp_path)
    set_cycles(twin, 2)
    set_cycles(twin, 3)
    step(twin, images(2))
    assert torch.equal(weights(model), before)
    step(model, images(2))
    assert torch.equal(weights(twin), weights(model))
    assert not torch.equal(weights(twin), before)


def test_settings_of_a_copy_are_its_own() -> None:
    model = wrap_multicycle(toys.Toy(), 3, inference_cycles=2)
    twin = copy.deepcopy(model)
    set_cycles(twin, 2, inference_cycles=1)
    assert (len(model(toys.images()).outputs), len(twin(toys.images()).outputs)) == (3, 2)
    assert not torch.equal(model.eval()(toys.images()), twin.eval()(toys.images()))
    unwrap_multicycle(twin)
    assert len(model.train()(toys.images()).outputs) == 3


# -- state dicts, which torch.load reads with weights_only ---------------------------------------------------


def test_a_state_dict_saved_in_training_loads_into_the_stock_model_and_back(tmp_path: Path) -> None:
    model = wrap_multicycle(deit())
    step(model, images())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    saved = torch.load(tmp_path / "weights.pt", weights_only=True)
    stock, again = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3, num_classes=3), deit()
    assert list(saved) == list(stock.state_dict())
    stock.load_state_dict(saved)
    assert torch.equal(stock.eval()(images()), model.eval()(images()))
    wrap_multicycle(again).load_state_dict(stock.state_dict())
    step(model, images(2)), step(again, images(2))
    assert torch.equal(weights(again), weights(model))


# -- in a fresh process --------------------------------------------------------------------------------------

SOURCES = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

TRAIN_ON = """
model = torch.load(saved, weights_only=False)
model.zero_grad()
output = model(toys.images())
output.outputs[-1].square().sum().backward()
torch.optim.SGD(model.parameters(), lr=0.05).step()
torch.save((output.tokens, model.state_dict()), results)
"""

USE_WITHOUT_CYCLEKD = """
sys.modules["cyclekd"] = None  # importing it fails
torch.save(torch.load(saved, weights_only=False)(toys.images()), results)
try:
    torch.load(wrapped, weights_only=False)
except ModuleNotFoundError:
    print("refused")
"""


def run_in_a_fresh_process(code: str, **paths: Path) -> str:
    named = "; ".join(f"{name} = {str(path)!r}" for name, path in paths.items())
    code = f"import sys; sys.path[:0] = {SOURCES}; {named}\nimport torch, toys\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_model_saved_in_training_trains_on_in_a_fresh_process_as_here(tmp_path: Path) -> None:
    model = wrap_multicycle(toys.BatchNormToy(), 3)
    step(model, toys.images())
    saved, results = tmp_path / "model.pt", tmp_path / "results.pt"
    torch.save(model, saved)
    run_in_a_fresh_process(TRAIN_ON, saved=saved, results=results)
    tokens, state = torch.load(results)

    model.zero_grad()
    output = model(toys.images())
    output.outputs[-1].square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    assert all(torch.equal(a, b) for a, b in zip(tokens, output.tokens, strict=True))
    assert all(torch.equal(state[name], expected) for name, expected in model.state_dict().items())


@pytest.mark.slow
def test_an_unwrapped_model_loads_where_cyclekd_is_not_installed_and_a_wrapped_one_does_not(tmp_path: Path) -> None:
    model = wrap_multicycle(toys.Toy())
    step(model, toys.images())
    expected = model.eval()(toys.images())
    wrapped, saved, results = (tmp_path / f"{name}.pt" for name in ("wrapped", "base", "results"))
    torch.save(model, wrapped)
    torch.save(unwrap_multicycle(model.train()).eval(), saved)
    printed = run_in_a_fresh_process(USE_WITHOUT_CYCLEKD, saved=saved, wrapped=wrapped, results=results)
    assert torch.equal(torch.load(results), expected)
    assert printed == "refused\n"


# -- moving averages -----------------------------------------------------------------------------------------

KEPT = 0.75  # of the average, in each update

AVERAGES: dict[str, Callable[[nn.Module], tuple[nn.Module, Callable]]] = {
    "timm": lambda model: (ema := ModelEmaV3(model, decay=KEPT), ema.update),
    "torch": lambda model: (
        ema := AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(KEPT)),
        ema.update_parameters,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", AVERAGES)
def test_the_average_of_a_training_is_the_plain_model_with_the_averaged_weights(kind: str, family: str) -> None:
    model = wrap_multicycle(FAMILIES[family]())
    average, update = AVERAGES[kind](model)
    update(model)  # torch starts from its first update
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for seed in range(3):
        step(model, images(seed))
        update(model)
        for name, value in model.state_dict().items():
            expected[name].lerp_(value, 1 - KEPT)
    plain = FAMILIES[family]()
    plain.load_state_dict(expected)
    found = logits(average.module.eval()(images()))
    torch.testing.assert_close(found, logits(plain.eval()(images())), rtol=1e-5, atol=1e-5)
    assert (found - logits(model.eval()(images()))).abs().max() > 1e-2
    plain.load_state_dict(average.module.state_dict())
    assert torch.equal(found, logits(plain(images())))
    assert isinstance(average.module.train()(images()), CycleOutput)


def test_update_bn_gives_an_averaged_model_the_statistics_of_the_plain_one() -> None:
    model = wrap_multicycle(toys.BatchNormToy(), 3)
    plain = AveragedModel(unwrap_multicycle(copy.deepcopy(model)))
    average = AveragedModel(model)
    batches = [toys.images(), toys.images() + 1]
    update_bn(batches, average), update_bn(batches, plain)
    statistics = dict(plain.module.named_buffers())
    assert statistics["blocks.0.norm.bn.num_batches_tracked"] == 2
    for name, found in average.module.named_buffers():
        assert torch.equal(found, statistics[name]), name
