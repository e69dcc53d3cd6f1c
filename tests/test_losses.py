"""The objective, term by term, against the equations written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cyclekd import CycleError, CycleLoss, CycleOutput
from cyclekd.losses import token_mse

LABELS = torch.tensor([0, 2])


def cycles(n=3, tokens=(2, 6, 4), scale=1.0, dtype=torch.float32):
    outputs = tuple(torch.randn(2, 3, requires_grad=True) for _ in range(n))
    return CycleOutput(None, outputs, tuple((scale * torch.randn(tokens)).to(dtype).requires_grad_() for _ in range(n)))


def task_sum(output):
    return sum(F.cross_entropy(each, LABELS) for each in output.outputs)


def test_fixed_alpha_is_equation_4():
    output = cycles()
    parts = CycleLoss(F.cross_entropy, alpha=0.25)(output, LABELS)
    t1, t2, t3 = output.tokens
    expected = task_sum(output) + 0.25 * ((t1 - t2).square().mean() + (t2 - t3).square().mean())
    torch.testing.assert_close(parts.total, expected)


def test_the_paper_weighs_both_groups_by_5e_6():
    output = cycles(n=2)
    groups = {"keypoint": (slice(0, 2), 1.0), "visual": (slice(2, None), 1.0)}
    parts = CycleLoss.paper(F.mse_loss, groups=groups)(output, torch.zeros(2, 3))
    t1, t2 = output.tokens
    expected = F.mse_loss(output.outputs[0], torch.zeros(2, 3)) + F.mse_loss(output.outputs[1], torch.zeros(2, 3))
    expected = expected + 5e-6 * F.mse_loss(t1[:, :2], t2[:, :2]) + 5e-6 * F.mse_loss(t1[:, 2:], t2[:, 2:])
    assert torch.equal(parts.total, expected)


def test_default_weight_is_rho_times_task_over_variance_without_gradient():
    output = cycles()
    parts = CycleLoss(F.cross_entropy, rho=0.7)(output, LABELS)
    task = task_sum(output)
    t1, t2, t3 = output.tokens
    weights = [0.7 * task.detach() / t.detach().var(correction=0) for t in (t2, t3)]
    expected = task + weights[0] * F.mse_loss(t1, t2) + weights[1] * F.mse_loss(t2, t3)
    torch.testing.assert_close(parts.total, expected)
    torch.testing.assert_close(parts.alpha["tokens"], torch.stack(weights))
    for leaf in (*output.outputs, *output.tokens):
        found, grad = (torch.autograd.grad(total, leaf, retain_graph=True)[0] for total in (parts.total, expected))
        torch.testing.assert_close(found, grad)


@pytest.mark.parametrize("token_scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("loss_scale", [1e-3, 1.0, 1e3])
def test_share_of_the_token_term_depends_on_neither_scale(token_scale, loss_scale):
    torch.manual_seed(0)
    parts = CycleLoss(lambda x, y: loss_scale * F.cross_entropy(x, y))(cycles(scale=token_scale), LABELS)
    torch.manual_seed(0)
    base = CycleLoss(F.cross_entropy)(cycles(), LABELS)
    torch.testing.assert_close(parts.tokens / parts.task.sum(), base.tokens / base.task.sum())


def test_a_negative_task_loss_does_not_push_tokens_apart():
    parts = CycleLoss(lambda x, y: -F.cross_entropy(x, y))(cycles(), LABELS)
    assert (parts.tokens > 0).all()


def test_the_teacher_gets_a_gradient_unless_detached():
    for detach in (False, True):
        output = cycles(n=2)
        CycleLoss(F.cross_entropy, alpha=1.0, detach_teacher=detach)(output, LABELS).total.backward()
        assert output.tokens[0].grad is not None
        assert (output.tokens[1].grad is None) == detach


def test_groups_weigh_parts_of_the_token_axis():
    output = cycles(n=2)
    groups = {"class": (slice(0, 1), 2.0), "patch": (slice(1, None), 0.5)}
    parts = CycleLoss(F.cross_entropy, alpha=1.0, groups=groups)(output, LABELS)
    t1, t2 = output.tokens
    expected = 2 * F.mse_loss(t1[:, :1], t2[:, :1]) + 0.5 * F.mse_loss(t1[:, 1:], t2[:, 1:])
    torch.testing.assert_close(parts.tokens, expected[None])
    assert parts.token_mse.keys() == {"class", "patch"} and parts.alpha["class"].tolist() == [2.0]


def test_groups_flatten_a_grid_of_tokens():
    output = cycles(n=2, tokens=(2, 2, 3, 4))
    parts = CycleLoss(F.cross_entropy, alpha=1.0, groups={"last row": (slice(3, 6), 1.0)})(output, LABELS)
    torch.testing.assert_close(parts.tokens[0], F.mse_loss(output.tokens[0][:, 1], output.tokens[1][:, 1]))


def test_several_carried_tensors_are_terms_of_their_own():
    a, b = cycles(n=2), cycles(n=2, tokens=(2, 1, 4))
    both = CycleOutput(None, a.outputs, tuple(zip(a.tokens, b.tokens, strict=True)))
    parts = CycleLoss(F.cross_entropy, alpha=1.0)(both, LABELS)
    torch.testing.assert_close(parts.tokens[0], F.mse_loss(*a.tokens) + F.mse_loss(*b.tokens))
    assert list(parts.token_mse) == ["tokens0", "tokens1"]


def test_cycle_weights_weigh_the_task_alone():
    output = cycles(n=2)
    parts = CycleLoss(F.cross_entropy, alpha=1.0, cycle_weights=[1.0, 0.5])(output, LABELS)
    first, second = (F.cross_entropy(each, LABELS) for each in output.outputs)
    torch.testing.assert_close(parts.total, first + 0.5 * second + F.mse_loss(*output.tokens))
    torch.testing.assert_close(parts.task, torch.stack([first, second]))


def test_prediction_weight_adds_the_distance_of_predictions():
    output = cycles(n=2)
    parts = CycleLoss(F.cross_entropy, alpha=0.0, prediction_weight=0.5)(output, LABELS)
    torch.testing.assert_close(parts.total, task_sum(output) + 0.5 * F.mse_loss(*output.outputs))
    assert parts.tokens.numel() == 0


def test_batch_share_scales_terms_of_fixed_weight_alone():
    output = cycles(n=2)
    fixed = CycleLoss(F.cross_entropy, alpha=1.0, prediction_weight=1.0)
    whole, part = fixed(output, LABELS), fixed(output, LABELS, batch_share=0.25)
    torch.testing.assert_close(part.tokens, 0.25 * whole.tokens)
    torch.testing.assert_close(part.predictions, 0.25 * whole.predictions)
    scale_free = CycleLoss(F.cross_entropy)
    assert torch.equal(scale_free(output, LABELS, batch_share=0.25).total, scale_free(output, LABELS).total)


def test_a_bare_base_output_is_one_cycle():
    logits = torch.randn(2, 3)
    parts = CycleLoss(F.cross_entropy)(logits, LABELS)
    assert torch.equal(parts.total, F.cross_entropy(logits, LABELS)) and parts.tokens.numel() == 0


@pytest.mark.parametrize("form", ["attribute", "dict", "tuple"])
def test_without_a_task_the_base_loss_is_taken(form):
    loss = torch.tensor(1.5)
    output = {"attribute": Holder(loss), "dict": {"loss": loss}, "tuple": (loss, torch.randn(2, 3))}[form]
    assert CycleLoss()(output).total == loss


class Holder:
    def __init__(self, loss):
        self.loss = loss


def test_half_precision_tokens_are_compared_in_fp32():
    a, b = torch.full((2, 3, 4), 300.0, dtype=torch.float16), torch.zeros(2, 3, 4, dtype=torch.float16)
    assert token_mse(a, b) == 90000  # overflows in fp16
    assert token_mse(a, b).dtype == torch.float32


def test_logs_name_every_term_detached():
    logs = CycleLoss(F.cross_entropy, alpha=1.0, prediction_weight=1.0)(cycles(n=2), LABELS).logs()
    assert list(logs) == [
        *("loss", "task_1", "task_2", "tokens_1_2", "predictions_1_2", "mse_tokens_1_2", "alpha_tokens_1_2")
    ]
    assert not any(value.requires_grad or value.ndim for value in logs.values())


def test_parameters_of_the_task_are_parameters_of_the_criterion():
    task = nn.Linear(3, 1)
    assert list(CycleLoss(lambda x, y: task(x).sum()).parameters()) == []
    assert len(list(CycleLoss(Task()).parameters())) == 1


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, output, target):
        return self.weight * F.cross_entropy(output, target)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["rho", "alpha", "prediction_weight"])
def test_weights_that_are_no_weights_are_refused(name, weight):
    with pytest.raises(CycleError, match=rf"CycleLoss\({name}=.*finite number of at least 0"):
        CycleLoss(**{name: weight})


def test_a_task_that_cannot_be_called_is_refused():
    with pytest.raises(CycleError, match=r"task is a function of \(output, target\)"):
        CycleLoss("cross_entropy")


def test_a_missing_base_loss_is_refused():
    with pytest.raises(CycleError, match=r"Tensor holds none: pass labels.*CycleLoss\(F.cross_entropy\)"):
        CycleLoss()(cycles(), LABELS)


def test_at_least_as_many_cycle_weights_as_cycles():
    criterion = CycleLoss(F.cross_entropy, cycle_weights=[0.5, 1])
    with pytest.raises(CycleError, match=r"has 2 weights, and the output has 3 cycles"):
        criterion(cycles(), LABELS)
    logits = torch.randn(2, 3)
    assert criterion(logits, LABELS).total == 0.5 * F.cross_entropy(logits, LABELS)  # as in evaluation


@pytest.mark.parametrize("group", [(slice(0, 1), -1.0), (slice(0, 1), float("nan")), (0, 1.0), slice(0, 1)])
def test_groups_that_are_no_groups_are_refused(group):
    with pytest.raises(CycleError, match=r"groups=\{'keypoint': .*a group is \(slice, factor"):
        CycleLoss(groups={"keypoint": group})
    with pytest.raises(CycleError, match=r"cycle_weights=-1\).*finite number"):
        CycleLoss(cycle_weights=(-1, 1))


def test_groups_need_a_token_axis():
    with pytest.raises(CycleError, match=r"these tokens are \(2, 4\): leave groups out"):
        CycleLoss(F.cross_entropy, groups={"all": (slice(0, 1), 1.0)})(cycles(tokens=(2, 4)), LABELS)


def test_tokens_without_variance_get_no_weight():
    output = cycles(n=2)
    for teacher in (torch.zeros(2, 6, 4), torch.full((2, 6, 4), 3.0)):
        flat = CycleOutput(None, output.outputs, (output.tokens[0], teacher))
        parts = CycleLoss(F.cross_entropy)(flat, LABELS)
        assert parts.tokens.item() == 0 and parts.token_mse["tokens"].item() > 0
        (grad,) = torch.autograd.grad(parts.total, output.tokens[0], allow_unused=True)
        assert grad.abs().max() == 0


def test_a_fixed_alpha_is_not_rounded_to_the_loss_dtype():
    parts = CycleLoss.paper(lambda x, y: F.cross_entropy(x, y).to(torch.bfloat16))(cycles(n=2), LABELS)
    assert parts.alpha["tokens"].item() == pytest.approx(5e-6, rel=1e-7)


def test_tokens_of_different_number_are_refused_and_groups_are_the_way_out():
    a, b = cycles(n=2, tokens=(2, 6, 4)), cycles(n=2, tokens=(2, 3, 4))
    shrinking = CycleOutput(None, a.outputs, (a.tokens[0], b.tokens[1]))
    with pytest.raises(CycleError, match=r"\(2, 6, 4\) and \(2, 3, 4\): name tokens that both have"):
        CycleLoss(F.cross_entropy)(shrinking, LABELS)
    parts = CycleLoss(F.cross_entropy, groups={"keypoint": (slice(0, 3), 1.0)})(shrinking, LABELS)
    assert parts.tokens.shape == (1,)
    assert CycleLoss(F.cross_entropy, rho=0)(shrinking, LABELS).tokens.numel() == 0


def test_a_group_without_tokens_is_refused():
    with pytest.raises(CycleError, match=r"'keypoint'.*selects no token: the cycles left 6 and 6"):
        CycleLoss(F.cross_entropy, groups={"keypoint": (slice(6, 9), 1.0)})(cycles(), LABELS)


def test_groups_of_several_tensors_are_refused():
    a = cycles(n=2)
    both = CycleOutput(None, a.outputs, tuple(zip(a.tokens, a.tokens, strict=True)))
    with pytest.raises(CycleError, match=r"these blocks carry 2: leave groups out"):
        CycleLoss(F.cross_entropy, groups={"all": (slice(None), 1.0)})(both, LABELS)


def test_predictions_that_cannot_be_found_are_refused():
    output = CycleOutput(None, ({"boxes": 1},) * 2, cycles(n=2).tokens)
    with pytest.raises(CycleError, match=r"the model returned dict: leave prediction_weight at 0"):
        CycleLoss(lambda o, t: torch.zeros(()), prediction_weight=1.0)(output)
