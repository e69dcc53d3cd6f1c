"""Accelerate around a wrapped model: mixed precision, both orders of wrapping and preparing, the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

import toys
from cyclekd import CycleError, CycleLoss, CycleOutput, set_cycles, unwrap_multicycle, wrap_multicycle


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Accelerator]]:
    """Makes accelerators on the CPU; their state is global, and would keep the next test from another precision."""

    def make(precision: str = "bf16", **options: Any) -> Accelerator:
        _forget()
        return Accelerator(cpu=True, mixed_precision=precision, **options)

    yield make
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Mixer(nn.Module):
    """No residual: under autocast its tokens really leave in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(toys.WIDTH, toys.WIDTH)
        self.down = nn.Linear(toys.WIDTH, toys.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def vit() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return hf.ViTForImageClassification(hf.ViTConfig(**size, image_size=16, patch_size=8, initializer_range=0.3))


def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw), "labels": torch.tensor([0, 1])}


def prepared(accelerate: Accelerator, model: nn.Module) -> tuple[nn.Module, Any]:
    return accelerate.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


# -- wrap, then prepare --------------------------------------------------------------------------------------


def test_bf16_tokens_and_outputs_come_back_in_fp32_inside_a_cycle_output(accelerator) -> None:
    model = wrap_multicycle(toys.Toy(Mixer), 3)
    inside: list[torch.dtype] = []
    model.blocks[-1].register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    wrapped, _ = prepared(accelerator(), model.train())
    output = wrapped(toys.images())
    assert inside == [torch.bfloat16] * 3
    assert type(output) is CycleOutput
    assert [each.dtype for each in (*output.outputs, *output.tokens)] == [torch.float32] * 6


def test_bf16_outputs_of_a_hugging_face_model_keep_their_type_and_come_back_in_fp32(accelerator) -> None:
    wrapped, _ = prepared(accelerator(), wrap_multicycle(vit()).train())
    output = wrapped(**batch())
    assert type(output) is CycleOutput
    assert [type(each).__name__ for each in output.outputs] == ["ImageClassifierOutput"] * 2
    found = [
        output.loss,
        *output.tokens,
        *(tensor for each in output.outputs for tensor in (each.loss, each.logits)),
    ]
    assert {tensor.dtype for tensor in found} == {torch.float32}


def test_bf16_training_lowers_the_objective(accelerator) -> None:
    accelerate = accelerator()
    model, optimizer = prepared(accelerate, wrap_multicycle(vit()).train())
    losses = []
    for _ in range(6):
        loss = model(**batch()).loss
        optimizer.zero_grad()
        accelerate.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bf16_cycles_are_those_of_autocast(accelerator) -> None:
    model = wrap_multicycle(toys.Toy(Mixer), 3).train()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(toys.images())
    found = prepared(accelerator(), model)[0](toys.images())
    for a, b in zip(found.outputs + found.tokens, expected.outputs + expected.tokens, strict=True):
        assert torch.equal(a, b.float())
    assert (found.tokens[1] - found.tokens[0]).abs().max() > 1e-3


def test_gradients_under_accumulate_are_the_mean_of_the_micro_batches(accelerator) -> None:
    criterion = CycleLoss(F.cross_entropy, alpha=0.1)
    labels = torch.tensor([0, 1, 2, 1])
    images = toys.images(batch=4)
    plain = wrap_multicycle(toys.Toy()).train()
    criterion(plain(images), labels).total.backward()

    accelerate = accelerator("no", gradient_accumulation_steps=2)
    twin = wrap_multicycle(toys.Toy()).train()
    twin.load_state_dict(plain.state_dict())
    model, _ = prepared(accelerate, twin)
    for part in (slice(0, 2), slice(2, 4)):
        with accelerate.accumulate(model):
            accelerate.backward(criterion(model(images[part]), labels[part]).total)
            assert accelerate.sync_gradients == (part.start == 2)
    for a, b in zip(twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# -- the way back --------------------------------------------------------------------------------------------


def test_unwrapping_with_the_autocast_forward_kept_gives_the_base_and_the_same_eval_output(
    accelerator,
) -> None:
    accelerate = accelerator()
    model, _ = prepared(accelerate, wrap_multicycle(vit()).train())
    expected = model.eval()(**batch()).logits
    base = unwrap_multicycle(accelerate.unwrap_model(model, keep_fp32_wrapper=True))
    assert type(base) is hf.ViTForImageClassification
    assert torch.equal(base(**batch()).logits, expected)
    assert not isinstance(base.train()(**batch()), CycleOutput)


def test_unwrapping_without_it_gives_the_base_and_its_fp32_output(accelerator) -> None:
    expected = vit().eval()(**batch()).logits
    accelerate = accelerator()
    model, _ = prepared(accelerate, wrap_multicycle(vit()).train())
    assert not torch.equal(model.eval()(**batch()).logits, expected)  # this one is bf16 inside
    base = unwrap_multicycle(accelerate.unwrap_model(model, keep_fp32_wrapper=False))
    assert type(base) is hf.ViTForImageClassification
    assert torch.equal(base(**batch()).logits, expected)
    assert not isinstance(base.train()(**batch()), CycleOutput)


def test_taking_the_autocast_forward_off_leaves_a_wrapped_model_cycling(accelerator) -> None:
    """As for a checkpoint in mid-training: what trains on must not be the plain model."""
    accelerate = accelerator()
    model, _ = prepared(accelerate, wrap_multicycle(vit(), 3).train())
    model = accelerate.unwrap_model(model, keep_fp32_wrapper=False)
    assert len(model(**batch()).outputs) == 3


def test_the_checkpoint_of_a_prepared_model_has_the_base_keys(accelerator) -> None:
    accelerate = accelerator()
    model, _ = prepared(accelerate, wrap_multicycle(vit()).train())
    saved = accelerate.get_state_dict(model)
    vit().load_state_dict(saved)
    assert saved.keys() == vit().state_dict().keys()


# -- prepare, then wrap --------------------------------------------------------------------------------------


def test_a_model_prepared_for_bf16_is_refused_by_name_and_with_the_way_out(accelerator) -> None:
    model, _ = prepared(accelerator(), vit())
    with pytest.raises(CycleError, match=r"ViTForImageClassification.*before accelerator\.prepare"):
        wrap_multicycle(model)
    assert type(model) is hf.ViTForImageClassification


def test_the_way_out_for_a_model_prepared_too_early_leads_out(accelerator) -> None:
    accelerate = accelerator()
    model, _ = prepared(accelerate, vit())
    with pytest.raises(CycleError, match="keep_fp32_wrapper=False"):
        wrap_multicycle(model)
    model = wrap_multicycle(accelerate.unwrap_model(model, keep_fp32_wrapper=False), 3).train()
    assert len(model(**batch()).outputs) == 3


def test_a_model_prepared_without_mixed_precision_cycles_when_wrapped_afterwards(accelerator) -> None:
    expected = wrap_multicycle(vit(), 3).train()(**batch())
    model, _ = prepared(accelerator("no"), vit())
    found = wrap_multicycle(model, 3).train()(**batch())
    assert torch.equal(found.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(found.tokens, expected.tokens, strict=True))
    assert (found.tokens[2] - found.tokens[1]).abs().max() > 1e-3


# -- settings reach the model inside -------------------------------------------------------------------------


def test_set_cycles_finds_the_model_that_accelerate_has_compiled(accelerator) -> None:
    accelerate = accelerator("no", dynamo_backend="eager")
    model, _ = prepared(accelerate, wrap_multicycle(toys.Toy()).train())
    assert type(model).__name__ == "OptimizedModule"
    assert len(model(toys.images()).outputs) == 2
    set_cycles(model, 3)
    assert len(model(toys.images()).outputs) == 3
    base = unwrap_multicycle(accelerate.unwrap_model(model, keep_torch_compile=False))
    assert type(base) is toys.Toy


def test_set_cycles_between_steps_reaches_a_model_prepared_for_bf16(accelerator) -> None:
    model, _ = prepared(accelerator(), wrap_multicycle(vit()).train())
    assert len(model(**batch()).outputs) == 2
    set_cycles(model, 4)
    assert len(model(**batch()).outputs) == 4
