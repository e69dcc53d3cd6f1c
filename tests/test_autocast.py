"""Half precision, with autocast or with half-precision weights: each cycle is bitwise the repeated block list's.

The loss stays in fp32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from benchmarks.matrix.repeated import (
    blocks_at,
    first_tensor,
    gradients,
    make_nondegenerate,
    relative_error,
    repeat_blocks,
)
from cyclekd import CycleLoss, run_cycles, wrap_multicycle
from cyclekd.checkpointing import FRAMES_ARE_VISIBLE

SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
IDS, LABELS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]]), torch.tensor([0, 2])


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def deit() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3, num_classes=3)


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZE, image_size=32, patch_size=16, num_labels=3))


def bert() -> nn.Module:
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZE, **drop, vocab_size=50, num_labels=3))


def llama() -> nn.Module:
    more = {"num_key_value_heads": 1, "vocab_size": 50, "pad_token_id": 0, "use_cache": False}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, **more))


Family = tuple[Callable[[], nn.Module], str, Callable[[], dict[str, Tensor]]]
FAMILIES: dict[str, Family] = {
    "deit": (deit, "blocks", lambda: {"x": images()}),
    "vit": (vit, "vit.layers", lambda: {"pixel_values": images(), "labels": LABELS}),
    "bert": (bert, "bert.encoder.layer", lambda: {"input_ids": IDS, "labels": LABELS}),
    "llama": (llama, "model.layers", lambda: {"input_ids": IDS, "labels": IDS}),
}
HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def logits(output: Any) -> Tensor:
    return getattr(output, "logits", output)


def run_repeated(model: nn.Module, path: str, times: int, inputs: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """Output and tokens of the model with its block list so many times as long."""
    left: list[Tensor] = []
    hook = blocks_at(model, path)[-1].register_forward_hook(lambda block, args, out: left.append(first_tensor(out)))
    output = repeat_blocks(model, path, times)(**inputs)
    hook.remove()
    return output, left[-1]


@contextmanager
def as_weights(half: torch.dtype, model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[None]:
    """Converts model and inputs, instead of autocast."""
    model.to(half)
    inputs.update({name: each.to(half) for name, each in inputs.items() if each.is_floating_point()})
    yield


@contextmanager
def as_autocast(half: torch.dtype, model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[None]:
    with torch.autocast("cpu", half):
        yield


# -- cycles --------------------------------------------------------------------------------------------------


@HALF
@pytest.mark.parametrize("way", [as_autocast, as_weights], ids=["autocast", "weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_cycle_and_its_gradients_are_bitwise_those_of_repeated_blocks(
    family: str, way: Callable[..., Any], half: torch.dtype
) -> None:
    make, path, batch = FAMILIES[family]
    model, inputs = make_nondegenerate(make()), batch()
    in_fp32 = model.eval()(**inputs)
    with way(half, model, inputs):
        expected = [run_repeated(model.train(), path, times, inputs) for times in (1, 2, 3)]
        output = wrap_multicycle(model, 3)(**inputs)
    assert logits(output.outputs[0]).dtype == half
    assert relative_error(logits(output.outputs[0]).float(), logits(in_fp32)) > 1e-4
    for cycle in range(3):
        found = output.outputs[cycle], output.tokens[cycle]
        assert relative_error(found, expected[cycle]) == 0
        assert relative_error(gradients(model, found), gradients(model, expected[cycle])) == 0
    assert relative_error(output.tokens[2].float(), output.tokens[1].float()) > 1e-2


@HALF
def test_evaluation_under_autocast_is_bitwise_the_plain_model_and_every_cycle_the_repeated_one(half) -> None:
    model = make_nondegenerate(deit()).eval()
    with torch.autocast("cpu", half), torch.no_grad():
        expected = [repeat_blocks(model, "blocks", times)(images()) for times in (1, 2, 3)]
        wrap_multicycle(model, 3)
        assert torch.equal(model(images()), expected[0])
        found = run_cycles(model, images()).outputs
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(not FRAMES_ARE_VISIBLE, reason="PyTorch shows checkpoint frames from 2.8 on")
@HALF
def test_checkpointing_under_autocast_recomputes_in_half_precision(half: torch.dtype) -> None:
    model, criterion = wrap_multicycle(make_nondegenerate(deit()), 3).train(), CycleLoss(F.cross_entropy)
    found = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        with torch.autocast("cpu", half):
            loss = criterion(model(images()), LABELS).total
        found.append(gradients(model, loss))
    assert relative_error(found[1], found[0]) == 0


# -- losses --------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Has no residual, so that its tokens leave in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class MixerModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Mixer(), Mixer(), Mixer())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


@HALF
@pytest.mark.parametrize("inside", [True, False], ids=["inside autocast", "after it"])
def test_every_term_of_the_loss_is_that_of_the_same_outputs_in_fp32(half: torch.dtype, inside: bool) -> None:
    model = wrap_multicycle(make_nondegenerate(MixerModel()), 3).train()
    criterion = CycleLoss(F.cross_entropy, prediction_weight=0.1)
    with torch.autocast("cpu", half):
        output = model(torch.randn(2, 5, 8))
        parts = criterion(output, LABELS) if inside else None
    assert {each.dtype for each in (*output.outputs, *output.tokens)} == {half}
    if parts is None:
        parts = criterion(output._replace(outputs=tuple(each.float() for each in output.outputs)), LABELS)
    in_fp32 = output._replace(
        outputs=tuple(each.float() for each in output.outputs), tokens=tuple(each.float() for each in output.tokens)
    )
    expected = criterion(in_fp32, LABELS).logs()
    for name, found in parts.logs().items():
        assert found.dtype == torch.float32, name
        assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize("family", ["vit", "bert", "llama"])
@HALF
def test_the_objective_of_a_model_that_computes_its_loss_is_in_fp32_under_autocast(
    family: str, half: torch.dtype
) -> None:
    make, _, batch = FAMILIES[family]
    model = wrap_multicycle(make_nondegenerate(make()), 3).train()
    with torch.autocast("cpu", half):
        output = model(**batch())
    assert {each.dtype for each in (output.loss, *(one.loss for one in output.outputs))} == {torch.float32}
    task = sum(one.loss for one in output.outputs)
    distances = [F.mse_loss(a, b) / b.var(correction=0) for a, b in pairwise(output.tokens)]
    torch.testing.assert_close(output.loss, task + 0.3 * task * sum(distances), rtol=1e-6, atol=0)
    assert min(distances) > 1e-3


def test_a_scaled_fp16_step_is_the_step_without_scaling() -> None:
    """Scaling by a power of two changes no bit but those that fp16 would have lost."""
    criterion = CycleLoss(F.cross_entropy)
    states = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = wrap_multicycle(make_nondegenerate(deit()), 3).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=enabled)
        before = {name: each.clone() for name, each in model.state_dict().items()}
        with torch.autocast("cpu", torch.float16):
            loss = criterion(model(images()), LABELS).total
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        states.append({name: each - before[name] for name, each in model.state_dict().items()})
    assert all(change.abs().max() > 0 for change in states[0].values())
    for name, change in states[1].items():
        torch.testing.assert_close(change, states[0][name], rtol=0, atol=2e-2 * states[0][name].abs().max().item())
