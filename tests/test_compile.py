"""torch.compile(fullgraph=True) of wrapped models: whole graphs, and the numbers of eager mode.

The control of every comparison is that its cycles differ: a graph that traced one cycle only would not match.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import toys
from benchmarks.matrix.repeated import make_nondegenerate
from cyclekd import CycleLoss, CycleOutput, set_cycles, wrap_multicycle

HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
Maker = Callable[[], nn.Module]
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler: c++, g++ or clang++")


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -- models --------------------------------------------------------------------------------------------------


def deit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)


def hf_vit() -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = hf.ViTConfig(**size, image_size=32, patch_size=16, num_labels=3)
    return make_nondegenerate(hf.ViTForImageClassification(config))


class NormalisedBlock(toys.Block):
    """BatchNorm over the token axis; `toys.BatchNormToy` transposes, and aot_eager of torch 2.14 fails on that."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)


def normalised() -> nn.Module:
    """BatchNorm in stem, blocks and tail; the running statistics of all follow the first cycle alone."""
    model = toys.Toy(NormalisedBlock)
    model.stem, model.norm = nn.Sequential(model.stem, nn.BatchNorm1d(5)), nn.BatchNorm1d(5)
    return model


class OneBlockUsedAgain(toys.Toy):
    """As in ALBERT."""

    def __init__(self) -> None:
        super().__init__(depth=1)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.blocks[0](x)
        return x


def writes_in_stem_and_blocks() -> nn.Module:
    """The first block writes on what the stem returned, onto which positions were written before."""
    model = toys.InPlaceStem()
    model.blocks = nn.ModuleList(toys.InPlaceBlock() for _ in range(2))
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


TRAITS: dict[str, Maker] = {
    "blocks that write on their input": lambda: toys.Toy(toys.InPlaceBlock, depth=2),
    "a stem that is written on": toys.InPlaceStem,
    "batch norm": normalised,
    "one block used again": OneBlockUsedAgain,
}

# -- comparing -----------------------------------------------------------------------------------------------


def task(output: object, labels: Tensor) -> Tensor:
    return F.cross_entropy(getattr(output, "logits", output), labels)


def pair(make: Maker, backend: object, cycles: int = 2, stack: str | None = None) -> tuple[nn.Module, nn.Module]:
    """An eager wrapped model and the same one compiled into whole graphs, both in training."""
    eager = wrap_multicycle(make(), cycles, stack=stack).train()
    return eager, torch.compile(copy.deepcopy(eager), backend=backend, fullgraph=True)


def step(model: nn.Module, x: Tensor) -> CycleOutput:
    """One step of SGD; gradients stay on the parameters."""
    output = model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    CycleLoss(task)(output, torch.arange(len(x))).total.backward()
    optimizer.step()
    return output


def assert_equal_step(eager: nn.Module, compiled: nn.Module, x: Tensor, cycles: int = 2) -> None:
    expected, found = step(eager, x), step(compiled, x)
    assert len(found.outputs) == len(expected.outputs) == cycles
    logits = [[getattr(output, "logits", output) for output in each.outputs] for each in (found, expected)]
    for a, b in zip([*logits[0], *found.tokens], [*logits[1], *expected.tokens], strict=True):
        assert_close(a, b, b)
    for before, after in zip(expected.tokens, expected.tokens[1:], strict=False):
        assert (after - before).abs().max() > 1e-3
    grads = [[p.grad for p in model.parameters()] for model in (compiled, eager)]
    floor = 1e-3 * max(grad.abs().max() for grad in grads[1])  # of gradients that are 0 but for rounding
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, b.abs().max().clamp_min(floor))


def assert_close(found: Tensor, expected: Tensor, scale: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-4 * scale.abs().max()


# -- claims --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "backend"),
    [
        pytest.param(deit, "aot_eager"),
        pytest.param(deit, "inductor", marks=[needs_compiler, pytest.mark.slow]),
        pytest.param(hf_vit, "inductor", marks=[needs_compiler, pytest.mark.slow]),
    ],
)
def test_compiled_training_equals_eager_before_and_after_an_evaluation(make: Maker, backend: str) -> None:
    eager, compiled = pair(make, backend)
    for _ in range(3):
        assert_equal_step(eager, compiled, images())

    eager.eval(), compiled.eval()
    with torch.no_grad():
        found, expected = (getattr(output, "logits", output) for output in (compiled(images()), eager(images())))
    assert_close(found, expected, expected)

    eager.train(), compiled.train()
    assert_equal_step(eager, compiled, images())


def test_a_compiled_model_that_computes_its_loss_trains_as_eager() -> None:
    """Labels go in, so that CycleLoss is part of the graph."""
    eager, compiled = pair(hf_vit, "aot_eager")
    labels = torch.tensor([0, 1])
    for _ in range(3):
        results = []
        for model in (eager, compiled):
            model.zero_grad()
            loss = model(pixel_values=images(), labels=labels).loss
            loss.backward()
            grad = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            torch.optim.SGD(model.parameters(), lr=0.01).step()
            results.append((loss, grad))
        for found, expected in zip(results[1], results[0], strict=True):
            assert_close(found, expected, expected)


def test_a_schedule_of_cycles_equals_eager() -> None:
    eager, compiled = pair(lambda: toys.Toy(depth=2), "aot_eager")
    for cycles in (2, 3, 2):
        set_cycles(eager, cycles)
        set_cycles(compiled, cycles)
        assert_equal_step(eager, compiled, toys.images(3), cycles)


@pytest.mark.parametrize("name", TRAITS)
def test_every_trait_that_cycling_takes_care_of_equals_eager(name: str) -> None:
    eager, compiled = pair(TRAITS[name], "aot_eager", stack="blocks")
    for _ in range(2):
        assert_equal_step(eager, compiled, toys.images(3))
    for (path, a), (_, b) in zip(compiled._orig_mod.named_buffers(), eager.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=path)


def test_glue_between_the_blocks_equals_eager_once_the_model_has_run_outside_the_graph() -> None:
    eager = wrap_multicycle(toys.GluedToy()).train()
    eager(toys.images(3))
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)
    assert_equal_step(eager, compiled, toys.images(3))


def test_a_tail_that_writes_on_the_tokens_is_harmless_in_a_graph() -> None:
    """Eager mode refuses it; in a graph every cycle's tokens are copies."""

    class Tail(toys.Toy):
        def forward_head(self, x: Tensor) -> Tensor:
            return super().forward_head(x * 2)

    eager = wrap_multicycle(Tail(depth=2)).train()
    writing = wrap_multicycle(toys.InPlaceTail(depth=2)).train()
    writing.load_state_dict(eager.state_dict())
    compiled = torch.compile(writing, backend="aot_eager", fullgraph=True)
    assert_equal_step(eager, compiled, toys.images(3))


@pytest.mark.slow
@needs_compiler
def test_writes_in_place_equal_eager_under_inductor() -> None:
    eager, compiled = pair(writes_in_stem_and_blocks, "inductor")
    for _ in range(2):
        assert_equal_step(eager, compiled, toys.images(3))


def test_switching_between_train_and_eval_compiles_each_mode_once() -> None:
    """A graph per epoch would end at the recompile limit: an error with fullgraph, silently eager without."""
    counter = CompileCounterWithBackend("eager")
    model = torch.compile(wrap_multicycle(toys.Toy(depth=2)), backend=counter, fullgraph=True)
    for _ in range(10):
        assert isinstance(model.train()(toys.images()), CycleOutput)
        assert isinstance(model.eval()(toys.images()), Tensor)
    assert counter.frame_count == 2


def test_several_inference_cycles_compile() -> None:
    eager = wrap_multicycle(toys.Toy(depth=2), inference_cycles=2).eval()
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)
    expected = eager(toys.images())
    assert_close(compiled(toys.images()), expected, expected)
    set_cycles(compiled, inference_cycles=1)
    assert (compiled(toys.images()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("cycles", [2, 3])
def test_a_checkpoint_around_the_stack_breaks_the_graph_and_equals_eager(cycles: int) -> None:
    model, images = wrap_multicycle(deit(), cycles).train(), torch.randn(2, 3, 32, 32)
    weight = model.patch_embed.proj.weight
    expected = torch.autograd.grad(model(images).outputs[-1].square().sum(), weight)[0]
    model.set_grad_checkpointing(True)
    found = torch.autograd.grad(torch.compile(model, backend="aot_eager")(images).outputs[-1].square().sum(), weight)[0]
    assert_close(found, expected, expected)


@pytest.mark.parametrize("make", [toys.Toy, toys.BiasToy, toys.CheckpointedToy], ids=lambda make: make.__name__)
def test_blocks_compiled_one_by_one_equal_eager(make: Maker) -> None:
    eager = wrap_multicycle(make(), 3)
    regional = copy.deepcopy(eager)
    for block in regional.blocks:
        block.compile(backend="aot_eager")
    for _ in range(2):  # the second call runs what the first compiled
        found, expected = regional(toys.images()), eager(toys.images())
        for cycle in range(3):
            assert_close(found.outputs[cycle], expected.outputs[cycle], expected.outputs[cycle])
            assert_close(found.tokens[cycle], expected.tokens[cycle], expected.tokens[cycle])
            gradients = [
                torch.autograd.grad(each.outputs[cycle].square().sum(), model.stem.weight, retain_graph=True)[0]
                for each, model in ((found, regional), (expected, eager))
            ]
            assert_close(*gradients, gradients[1])
