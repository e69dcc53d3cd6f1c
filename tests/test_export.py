"""torch.export and ONNX Runtime, with the unwrapped model and with the wrapped one in either mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import toys
from benchmarks.matrix.repeated import gradients
from cyclekd import CycleError, CycleLoss, CycleOutput, run_cycles, unwrap_multicycle, wrap_multicycle

Inputs = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def nothing_left_in_the_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# -- models of a real kind -----------------------------------------------------------------------------------


def deit() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", num_classes=4)


def images() -> Inputs:
    return {"x": torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))}


def bert() -> nn.Module:
    size = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    return hf.BertForSequenceClassification(hf.BertConfig(**size, vocab_size=500, num_labels=4))


def sentences() -> Inputs:
    """The second is padded."""
    ids = torch.randint(1, 500, (2, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    return {"input_ids": ids, "attention_mask": mask}


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "deit": (deit, images),
    "bert": (bert, sentences),
}


def logits(output: Any) -> Tensor:
    return getattr(output, "logits", output)


@pytest.fixture(scope="module", params=[pytest.param("deit", marks=pytest.mark.slow), "bert"])
def trained(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Inputs]:
    """A wrapped model in evaluation after three steps, a plain one with its weights, and inputs for both."""
    make, inputs = FAMILIES[request.param]
    torch.manual_seed(0)
    model, criterion = make(), CycleLoss(lambda output, labels: F.cross_entropy(logits(output), labels))
    before = logits(model.eval()(**inputs())).detach()
    wrap_multicycle(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        criterion(model(**inputs()), torch.tensor([1, 3])).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = make()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        once, twice = (logits(output) for output in run_cycles(model.eval(), **inputs()).outputs)
    assert (once - before).abs().max() > 0.1 and (twice - once).abs().max() > 1e-2  # either would be seen
    return model, plain.eval(), inputs()


# -- ONNX Runtime --------------------------------------------------------------------------------------------


def to_onnx(model: nn.Module, inputs: Inputs) -> Any:
    pytest.importorskip("onnxscript")
    return torch.onnx.export(model, (), kwargs=inputs, dynamo=True, verbose=False)


def run_onnx(program: Any, inputs: Inputs, folder: Path) -> list[Tensor]:
    """What ONNX Runtime computes from the saved file."""
    runtime = pytest.importorskip("onnxruntime")
    program.save(folder / "model.onnx")
    session = runtime.InferenceSession(folder / "model.onnx")
    return [torch.from_numpy(each) for each in session.run(None, {k: v.numpy() for k, v in inputs.items()})]


@pytest.mark.parametrize("state", ["unwrapped", "still wrapped"])
def test_onnx_runtime_agrees_with_the_plain_model_to_1e_5_after_training(trained, state: str, tmp_path: Path) -> None:
    model, plain, inputs = trained
    deployed = unwrap_multicycle(copy.deepcopy(model)) if state == "unwrapped" else model
    (found,) = run_onnx(to_onnx(deployed, inputs), inputs, tmp_path)
    assert (found - logits(plain(**inputs))).abs().max() <= 1e-5


def test_onnx_runtime_runs_as_many_inference_cycles_as_were_set(tmp_path) -> None:
    model = wrap_multicycle(toys.Toy(), inference_cycles=2).eval()
    once, twice = run_cycles(model, toys.images()).outputs
    inputs = {"x": toys.images()}
    (found,) = run_onnx(to_onnx(model, inputs), inputs, tmp_path)
    assert (found - twice).abs().max() <= 1e-5
    assert (twice - once).abs().max() > 1e-2


def test_onnx_runtime_gives_every_cycle_of_a_model_in_training(tmp_path) -> None:
    model, inputs = wrap_multicycle(toys.Toy(), 3).train(), {"x": toys.images()}
    with pytest.warns(UserWarning, match="Exporting a model while it is in training mode"):
        program = to_onnx(model, inputs)
    expected = model(**inputs)
    for a, b in zip(run_onnx(program, inputs, tmp_path), expected.outputs + expected.tokens, strict=True):
        assert (a - b).abs().max() <= 1e-5


# -- torch.export in evaluation ------------------------------------------------------------------------------


def operations(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes]


def test_in_evaluation_the_exported_graph_and_output_are_bitwise_the_plain_models(trained) -> None:
    model, plain, inputs = trained
    found, expected = (torch.export.export(each, (), inputs) for each in (model, plain))
    assert operations(found) == operations(expected)
    assert torch.equal(logits(found.module()(**inputs)), logits(plain(**inputs)))


# -- torch.export in training --------------------------------------------------------------------------------


def undropped_bert() -> nn.Module:
    model = bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


IN_TRAINING: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "deit": (deit, lambda: {"x": images()["x"][:1]}),
    "bert": (undropped_bert, lambda: {**sentences(), "labels": torch.tensor([1, 3])}),
    "batch norm": (toys.BatchNormToy, lambda: {"x": toys.images()}),
    "writes in place": (lambda: toys.Toy(toys.InPlaceBlock), lambda: {"x": toys.images()}),
}


@pytest.mark.parametrize("family", [pytest.param("deit", marks=pytest.mark.slow), *list(IN_TRAINING)[1:]])
def test_in_training_the_exported_program_computes_every_cycle_and_its_gradients(family: str) -> None:
    make, inputs = IN_TRAINING[family]
    batch = inputs()
    model = wrap_multicycle(make(), 3).train()
    eager = copy.deepcopy(model)
    exported = torch.export.export(model, (), batch).module()
    expected, found = eager(**batch), exported(**batch)
    assert type(found) is CycleOutput
    assert (found.loss is None) == (expected.loss is None) == ("labels" not in batch)
    for cycle in range(3):
        assert torch.equal(logits(found.outputs[cycle]), logits(expected.outputs[cycle]))
        assert torch.equal(found.tokens[cycle], expected.tokens[cycle])
    assert (found.tokens[2] - found.tokens[1]).abs().max() > 1e-3
    of_eager, of_exported = gradients(eager, expected), gradients(exported, found)
    scale = max(grad.abs().max() for grad in of_eager.values())
    for name, grad in of_eager.items():
        assert (of_exported[name] - grad).abs().max() <= 1e-6 * scale, name
    statistics = dict(exported.named_buffers())
    for name, expected in eager.named_buffers():
        assert torch.equal(statistics[name], expected), name


def test_exporting_leaves_the_model_and_its_statistics_as_they_were() -> None:
    model = wrap_multicycle(toys.BatchNormToy(), 3).train()
    untouched = copy.deepcopy(model)
    torch.export.export(model, (toys.images(),))
    for a, b in zip(model.state_dict().values(), untouched.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(model(toys.images()).outputs[2], untouched(toys.images()).outputs[2])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_one_exported_program_takes_batches_of_any_size(training: bool) -> None:
    model = wrap_multicycle(toys.Toy(), 2, inference_cycles=2).train(training)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(model, (toys.images(4),), dynamic_shapes=(batch,)).module()
    for size in (3, 7):
        found, expected = exported(toys.images(size)), model(toys.images(size))
        if training:
            assert torch.equal(found.tokens[1], expected.tokens[1])
            found, expected = found.outputs[1], expected.outputs[1]
        assert torch.equal(found, expected)


def test_glue_between_the_blocks_is_refused_until_the_model_has_run_outside_the_graph() -> None:
    model = wrap_multicycle(toys.GluedToy()).train()
    with pytest.raises(CycleError, match=r"looked at once.*call the model once on a batch before"):
        torch.export.export(model, (toys.images(),))
    expected = model(toys.images())
    found = torch.export.export(model, (toys.images(),)).module()(toys.images())
    assert torch.equal(found.outputs[1], expected.outputs[1])
