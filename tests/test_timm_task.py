"""timm's training tasks: the smallest one for a wrapped model, and what a stock one does with it."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from benchmarks.matrix.repeated import gradients, make_nondegenerate, relative_error
from cyclekd import CycleError, CycleLoss, CycleOutput, wrap_multicycle

pytest.importorskip("timm", minversion="1.0.31", reason="timm's tasks are new and still change")
from timm.task import ClassificationTask


def deit() -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32, "depth": 4, "num_classes": 5}
    return make_nondegenerate(timm.create_model("deit_tiny_patch16_224", **size))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 3])


class CycleTask(ClassificationTask):
    """timm's classification task for a wrapped model; `criterion` is a `CycleLoss`, of which every term comes back."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        output = self.trainable_module(input)
        parts = self.criterion(output, target)
        return {**parts.logs(), "loss": parts.total, "output": output.outputs[0]}


TERMS = {"task_1", "task_2", "tokens_1_2", "predictions_1_2", "mse_tokens_1_2", "alpha_tokens_1_2"}


def test_a_task_returns_the_objective_with_every_term_and_the_output_of_the_deployed_cycle() -> None:
    x, labels = batch()
    model = wrap_multicycle(deit()).train()
    criterion = CycleLoss(F.cross_entropy, prediction_weight=0.1)
    result = CycleTask(model, criterion)(x, labels)
    assert result.keys() == TERMS | {"loss", "output"}
    assert torch.equal(result["output"], model.forward_head(model.forward_features(x)))
    sums = sum(result[name] for name in ("task_1", "task_2", "tokens_1_2", "predictions_1_2"))
    torch.testing.assert_close(result["loss"], sums)
    expected = gradients(model, criterion(model(x), labels).total)
    assert relative_error(gradients(model, result["loss"]), expected) == 0
    assert all(result[name] > 0 and not result[name].requires_grad for name in TERMS)


def test_a_task_trains_and_its_checkpoint_and_average_are_plain_models() -> None:
    x, labels = batch()
    training = CycleTask(wrap_multicycle(deit()), CycleLoss(F.cross_entropy)).train()
    training.setup_ema(decay=0.5)
    optimizer = create_optimizer_v2(training.get_trainable_module(), opt="sgd", lr=0.01, layer_decay=0.75)
    losses = []
    for _ in range(4):
        result = training(x, labels)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        training.update_ema()
        losses.append(result["loss"].item())
    assert losses[-1] < losses[0]

    training.eval()
    outputs = []
    for ema, key in ((False, "state_dict"), (True, "state_dict_ema")):
        plain = deit().eval()
        plain.load_state_dict(training.get_checkpoint_state(ema=ema)[key])
        evaluated = training.get_eval_model(ema=ema)
        outputs.append((evaluated.module if ema else evaluated)(x))
        assert torch.equal(outputs[-1], plain(x))
    assert (outputs[1] - outputs[0]).abs().max() > 1e-3

    evaluator = training.create_evaluator()
    evaluator.update(outputs[0], labels)
    assert evaluator.summary()["loss"] == pytest.approx(F.cross_entropy(outputs[0], labels).item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.1}], ids=["cross entropy", "label smoothing"])
def test_a_stock_task_stops_at_the_first_step_and_names_what_it_got(options: dict[str, float]) -> None:
    stock = ClassificationTask(wrap_multicycle(deit()).train(), criterion_kwargs=options)
    with pytest.raises((CycleError, AttributeError), match="CycleOutput"):
        stock(*batch())


def test_a_stock_task_trains_on_all_cycles_when_its_criterion_does() -> None:
    x, labels = batch()
    model, criterion = wrap_multicycle(deit(), 3).train(), CycleLoss(F.cross_entropy)
    stock = ClassificationTask(model, lambda output, labels: criterion(output, labels).total)
    result = stock(x, labels)
    assert isinstance(result["output"], CycleOutput)
    expected = gradients(model, criterion(model(x), labels).total)
    assert relative_error(gradients(model, result["loss"]), expected) == 0
