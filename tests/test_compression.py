"""Quantisation, pruning and reparametrised weights: treated alike, a wrapped model ends where a plain one does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from benchmarks.matrix.repeated import blocks_at, make_nondegenerate
from cyclekd import CycleLoss, CycleOutput, run_cycles, set_cycles, unwrap_multicycle, wrap_multicycle

CYCLES = 3


def deit() -> nn.Module:
    torch.manual_seed(0)
    return make_nondegenerate(timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3, num_classes=3))


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, output: CycleOutput) -> None:
    """One step of SGD on every cycle."""
    CycleLoss(F.cross_entropy)(output, torch.tensor([0, 2])).total.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def repeated(model: nn.Module, times: int) -> tuple[Tensor, Tensor]:
    """Output and tokens of a never-wrapped model whose block list is for once so many times as long.

    In place: PyTorch cannot copy modules with pruned weights that have been used.
    """
    blocks, left = list(model.blocks), []
    hook = blocks[-1].register_forward_hook(lambda block, args, output: left.append(output))
    model.blocks = nn.Sequential(*blocks * times)
    output = model(images())
    model.blocks = nn.Sequential(*blocks)
    hook.remove()
    return output, left[-1]


def every_cycle(model: nn.Module) -> CycleOutput:
    """What a wrapped model has to return, from a never-wrapped one."""
    outputs, tokens = zip(*(repeated(model, times) for times in range(1, CYCLES + 1)), strict=True)
    return CycleOutput(None, outputs, tokens)


def assert_same_cycles(found: CycleOutput, expected: CycleOutput) -> None:
    for a, b in zip(found.outputs + found.tokens, expected.outputs + expected.tokens, strict=True):
        assert torch.equal(a, b)
    assert (found.tokens[2] - found.tokens[1]).abs().max() > 1e-2


# -- pruning -------------------------------------------------------------------------------------------------


def cut(model: nn.Module) -> None:
    """By magnitude in a linear layer of each block and in the head, whole filters in the stem."""
    for block in blocks_at(model, "blocks"):
        prune.l1_unstructured(block.mlp.fc1, "weight", amount=0.5)
    prune.l1_unstructured(model.head, "weight", amount=0.3)
    prune.ln_structured(model.patch_embed.proj, "weight", amount=0.25, n=2, dim=0)


def make_permanent(model: nn.Module) -> None:
    for block in blocks_at(model, "blocks"):
        prune.remove(block.mlp.fc1, "weight")
    prune.remove(model.head, "weight")
    prune.remove(model.patch_embed.proj, "weight")


def share_of_zeros(weight: Tensor) -> float:
    return (weight == 0).double().mean().item()


@pytest.mark.parametrize("when", ["before wrapping", "after wrapping", "in training"])
def test_a_pruned_model_trains_in_cycles_and_ends_as_the_never_wrapped_one(when: str) -> None:
    plain, model = deit().train(), deit()
    cut(plain)
    if when == "before wrapping":
        cut(model)
    wrap_multicycle(model.eval(), CYCLES)
    if when == "after wrapping":
        cut(model)
    model.train()
    if when == "in training":
        cut(model)
    expected, found = every_cycle(plain), model(images())
    assert_same_cycles(found, expected)
    step(plain, expected), step(model, found)
    make_permanent(plain), make_permanent(unwrap_multicycle(model))
    assert share_of_zeros(model.blocks[0].mlp.fc1.weight) == 0.5
    deit().load_state_dict(model.state_dict())
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(model.eval()(images()), plain.eval()(images()), rtol=1e-4, atol=1e-5)


def test_pruning_after_unwrapping_is_that_of_a_plain_model_with_the_same_weights() -> None:
    model, plain = wrap_multicycle(deit(), CYCLES).train(), deit()
    step(model, model(images()))
    plain.load_state_dict(unwrap_multicycle(model).state_dict())
    cut(model), cut(plain)
    found = model.eval()(images())
    assert torch.equal(found, plain.eval()(images()))
    make_permanent(model)
    assert torch.equal(model(images()), found)


# -- reparametrised weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reparametrise", [parametrizations.weight_norm, parametrizations.spectral_norm], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("when", ["before wrapping", "after wrapping"])
def test_reparametrised_weights_train_in_cycles_as_in_repeated_blocks(when: str, reparametrise: Callable) -> None:
    def change(model: nn.Module) -> None:
        torch.manual_seed(0)  # spectral_norm starts from random vectors
        for block in blocks_at(model, "blocks"):
            reparametrise(block.mlp.fc1)

    plain, model = deit().train(), deit()
    change(plain)
    if when == "before wrapping":
        change(model)
    wrap_multicycle(model, CYCLES).train()
    if when == "after wrapping":
        change(model)
    found = model(images())
    # The power iteration of spectral_norm goes on with every call, in the cycles as in the repeated blocks.
    expected, tokens = repeated(plain, CYCLES)
    assert torch.equal(found.outputs[-1], expected) and torch.equal(found.tokens[-1], tokens)


# -- quantisation --------------------------------------------------------------------------------------------

# Both are to leave PyTorch, for torchao and for good, and are still there in 2.14.
still_there = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning"
)


def quantised(model: nn.Module) -> nn.Module:
    """A copy with int8 weights in its linear layers."""
    quantization = pytest.importorskip("torch.ao.quantization")
    return quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def trained_twins() -> tuple[nn.Module, nn.Module]:
    """A wrapped model after a step, and a never-wrapped one with its weights, both in evaluation."""
    model, plain = wrap_multicycle(deit(), CYCLES).train(), deit()
    step(model, model(images()))
    plain.load_state_dict(model.state_dict())
    return model.eval(), plain.eval()


@still_there
def test_int8_after_unwrapping_is_bitwise_that_of_the_plain_model() -> None:
    model, plain = trained_twins()
    found, in_fp32 = quantised(unwrap_multicycle(model))(images()), plain(images())
    assert torch.equal(found, quantised(plain)(images()))
    assert (found - in_fp32).abs().max() > 1e-3 * in_fp32.abs().max()


@still_there
def test_a_wrapped_model_in_int8_is_the_quantised_plain_one_once_and_in_every_cycle() -> None:
    model, plain = (quantised(each) for each in trained_twins())
    with torch.no_grad():
        assert torch.equal(model(images()), plain(images()))
        assert_same_cycles(run_cycles(model, images()), every_cycle(plain))
        set_cycles(model, inference_cycles=2)
        assert torch.equal(model(images()), repeated(plain, 2)[0])
