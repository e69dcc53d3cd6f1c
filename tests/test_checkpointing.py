"""Activation checkpointing around the stack: the recomputation in the backward has to be of the same cycle."""

import pytest
import timm
import torch
import torch.nn.functional as F

import toys
from cyclekd import (
    CycleError,
    CycleLoss,
    cycle_report,
    find_stacks,
    run_cycles,
    unwrap_multicycle,
    wrap_multicycle,
)
from cyclekd.checkpointing import FRAMES_ARE_VISIBLE

pytestmark = pytest.mark.skipif(not FRAMES_ARE_VISIBLE, reason="PyTorch shows checkpoint frames from 2.8 on")


def gradients(model, x, cycles):
    loss = CycleLoss(F.cross_entropy)(model(x), torch.tensor([0, 1])).total
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frames", ["one", "each", "with stem", "nested", "each in one"])
@pytest.mark.parametrize("cycles", [2, 3])
def test_checkpointing_changes_no_gradient(frames, cycles):
    model = wrap_multicycle(toys.CheckpointedToy(), cycles)
    model.frames, model.bend = "none", frames == "nested"
    loss, expected = gradients(model, toys.images(), cycles)
    model.frames = frames
    again, found = gradients(model, toys.images(), cycles)
    assert torch.equal(loss, again)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "hiera_tiny_224"]
)
def test_timm_set_grad_checkpointing_changes_no_gradient(name):
    sizes = {
        "deit": dict(depth=3, img_size=32),
        "swin": dict(depths=(1, 1, 3, 1), embed_dim=24, num_heads=(1, 1, 2, 2), drop_path_rate=0.0),
    }
    model = wrap_multicycle(timm.create_model(name, num_classes=3, **sizes.get(name[:4], {})), 2)
    x = torch.randn(2, 3, 32, 32) if name.startswith("deit") else torch.randn(2, 3, 224, 224)
    loss, expected = gradients(model, x, 2)
    model.set_grad_checkpointing(True)
    again, found = gradients(model, x, 2)
    assert torch.equal(loss, again)
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-6, atol=1e-8, msg=key)


def test_two_forwards_before_two_backwards_keep_their_own_tokens():
    model = wrap_multicycle(toys.CheckpointedToy(), 2)
    first, second = toys.images(), -toys.images()
    separate = [torch.autograd.grad(model(x).outputs[1].sum(), model.stem.weight)[0] for x in (first, second)]
    outputs = [model(x).outputs[1].sum() for x in (first, second)]
    together = [torch.autograd.grad(output, model.stem.weight)[0] for output in outputs]
    for found, expected in zip(together, separate, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_a_retained_graph_recomputes_the_same_cycle_again():
    model = wrap_multicycle(toys.CheckpointedToy(), 2)
    scalar = model(toys.images()).outputs[1].sum()
    first = torch.autograd.grad(scalar, model.stem.weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(scalar, model.stem.weight)[0])


def test_frames_leave_nothing_behind():
    model = wrap_multicycle(toys.CheckpointedToy(), 2)
    model(toys.images()).outputs[1].sum().backward()
    assert len(model._cyclekd.frames) == 0


def test_a_checkpoint_around_the_whole_wrapped_model_changes_no_gradient():
    model = wrap_multicycle(toys.Toy(), 2)
    expected = torch.autograd.grad(model(toys.images()).outputs[1].sum(), model.stem.weight)[0]
    output = torch.utils.checkpoint.checkpoint(lambda x: model(x).outputs[1], toys.images(), use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), model.stem.weight)[0], expected, rtol=1e-6, atol=1e-8)


def test_forward_features_under_checkpointing_is_recomputed_as_a_plain_pass():
    model = toys.CheckpointedToy()
    expected = torch.autograd.grad(model.forward_features(toys.images()).sum(), model.stem.weight)[0]
    wrap_multicycle(model, 2)
    assert torch.equal(torch.autograd.grad(model.forward_features(toys.images()).sum(), model.stem.weight)[0], expected)


def test_reentrant_checkpointing_is_refused():
    model = wrap_multicycle(toys.CheckpointedToy(), 2)
    model.use_reentrant = True
    with pytest.raises(CycleError, match=r"stack 'blocks' runs without gradients.*use_reentrant=False"):
        model(toys.images().requires_grad_())


def test_a_torch_that_hides_its_frames_leads_to_a_refusal(monkeypatch):
    monkeypatch.setattr("cyclekd.checkpointing.FRAMES_ARE_VISIBLE", False)
    monkeypatch.setattr("cyclekd.stack_hooks.FRAMES_ARE_VISIBLE", False)
    model = wrap_multicycle(toys.CheckpointedToy(), 2)
    with pytest.raises(CycleError, match=r"'blocks' is recomputed.*does not show it. Update to 2.8"):
        model(toys.images()).outputs[1].sum().backward()


def test_a_torch_that_hides_its_backward_leads_to_a_refusal(monkeypatch):
    monkeypatch.setattr("cyclekd.checkpointing._graph_task", None)
    model = wrap_multicycle(toys.CheckpointedToy(), 2)
    model(toys.images()).outputs[1].sum().backward()  # the frames alone suffice
    with pytest.raises(CycleError, match=r"'blocks' is recomputed"):
        model.blocks[0](torch.randn(2, 5, toys.WIDTH))


@pytest.mark.parametrize("between", ["eval", "find_stacks", "train", "report"])
def test_nothing_between_forward_and_backward_takes_the_hooks_away(between):
    model = wrap_multicycle(toys.CheckpointedToy(), 2)
    expected = torch.autograd.grad(model(toys.images()).outputs[1].sum(), model.stem.weight)[0]
    output = model(toys.images())
    {
        "eval": model.eval,
        "train": model.train,
        "find_stacks": lambda: find_stacks(model, toys.images()),
        "report": lambda: cycle_report(model, toys.images()),
    }[between]()
    assert torch.equal(torch.autograd.grad(output.outputs[1].sum(), model.stem.weight)[0], expected)
    model.eval()
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_a_checkpointed_run_in_evaluation_mode_has_the_same_gradient():
    model = wrap_multicycle(toys.CheckpointedToy(), 2).eval()
    found = torch.autograd.grad(run_cycles(model, toys.images()).outputs[1].sum(), model.stem.weight)[0]
    model.frames = "none"
    expected = torch.autograd.grad(run_cycles(model, toys.images()).outputs[1].sum(), model.stem.weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_unwrapping_before_the_backward_is_refused():
    model = wrap_multicycle(toys.CheckpointedToy(), 2)
    output = model(toys.images())
    with pytest.raises(CycleError, match=r"CheckpointedToy cannot be unwrapped.*call backward first"):
        unwrap_multicycle(model)
    output.outputs[1].sum().backward()
    del output
    assert type(unwrap_multicycle(model)) is toys.CheckpointedToy
