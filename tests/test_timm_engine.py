"""What timm's own training code does with a model: parameter groups, feature calls, new heads, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from benchmarks.matrix.repeated import gradients, make_nondegenerate, relative_error, repeat_blocks
from cyclekd import CycleLoss, wrap_multicycle
from cyclekd.checkpointing import FRAMES_ARE_VISIBLE


def deit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32, "depth": 4, "num_classes": 5}
    return make_nondegenerate(timm.create_model("deit_tiny_patch16_224", **size, **options))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 3])


def count_calls(module: nn.Module) -> list[int]:
    """Grows by one whenever the module is called, in a recomputation too."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *args: calls.append(1))
    return calls


# -- feature calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_feature_calls_are_bitwise_the_plain_models_and_make_one_pass(training: bool) -> None:
    x, _ = batch()
    plain, model = deit().train(training), wrap_multicycle(deit(), 3).train(training)
    calls = count_calls(model.blocks[0])
    tokens, expected = model.forward_features(x), plain.forward_features(x)
    assert torch.equal(tokens, expected) and len(calls) == 1
    assert torch.equal(model.forward_head(tokens), plain.forward_head(expected))
    assert torch.equal(model.forward_head(tokens, pre_logits=True), plain.forward_head(expected, pre_logits=True))
    found, expected = (each.forward_intermediates(x, indices=[1, 3]) for each in (model, plain))
    assert torch.equal(found[0], expected[0]) and len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    model(x)
    assert len(calls) == (5 if training else 3)


# -- what the factory and the optimiser ask ------------------------------------------------------------------


def test_a_new_classifier_is_used_in_every_cycle() -> None:
    x, _ = batch()
    plain, model = deit().train(), wrap_multicycle(deit(), 3).train()
    for each in (plain, model):
        each.reset_classifier(7)
    plain.load_state_dict(model.state_dict())
    assert model.get_classifier() is model.head and model.num_classes == 7
    output = model(x)
    for times in (1, 2, 3):
        assert torch.equal(output.outputs[times - 1], repeat_blocks(plain, "blocks", times)(x))


def groups(model: nn.Module) -> list[tuple[dict[str, Any], list[str]]]:
    """Every group's settings and the names of its parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    return [
        ({key: value for key, value in group.items() if key != "params"}, [names[each] for each in group["params"]])
        for group in optimizer.param_groups
    ]


def test_parameter_groups_with_layer_decay_are_those_of_the_plain_model() -> None:
    plain, model = deit(), wrap_multicycle(deit())
    assert model.no_weight_decay() == plain.no_weight_decay() != set()
    assert model.group_matcher(coarse=True) == plain.group_matcher(coarse=True)
    found = groups(model)
    assert found == groups(plain)
    assert len({settings["lr_scale"] for settings, _ in found}) == 6  # the stem, four blocks and the head


def test_blocks_pruned_after_wrapping_are_left_out_of_every_cycle() -> None:
    x, _ = batch()
    plain, model = deit().train(), wrap_multicycle(deit(), 3).train()
    for each in (plain, model):
        each.prune_intermediate_layers([0, 2], prune_norm=False, prune_head=False)
    output = model(x)
    for times in (1, 2, 3):
        expected = repeat_blocks(plain, "blocks", times)(x)
        assert torch.equal(output.outputs[times - 1], expected)


# -- checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not FRAMES_ARE_VISIBLE, reason="PyTorch shows checkpoint frames from 2.8 on")
def test_checkpointing_on_and_off_again_leaves_the_gradients_of_three_cycles_as_they_are() -> None:
    x, labels = batch()
    model, criterion = wrap_multicycle(deit(), 3).train(), CycleLoss(F.cross_entropy)
    calls = count_calls(model.blocks[0].mlp)
    found, ran = [], []
    for enabled in (False, True, False):
        model.set_grad_checkpointing(enabled)
        found.append(gradients(model, criterion(model(x), labels).total))
        ran.append(len(calls))
        calls.clear()
    assert ran == [3, 6, 3]
    assert relative_error(found[1], found[0]) <= 1e-6 and relative_error(found[2], found[0]) <= 1e-6
