"""DeiT's distillation from a teacher: its two losses by hand, the distillation token, and together with cycles."""

from __future__ import annotations

from math import log
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cyclekd import CycleLoss, wrap_multicycle
from cyclekd.integrations.deit.distillation import DistillationLoss, Teacher
from cyclekd.integrations.deit.recipe import build_criterion, build_model, build_teacher
from cyclekd.integrations.deit.train import parse_arguments
from cyclekd.integrations.runs.errors import RunError

SIZE = {"img_size": 8, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
CPU = torch.device("cpu")

# the student's probabilities are 1/8, 2/8, 5/8, the teacher's 1/4, 1/4, 2/4; the label is the second class
STUDENT, OTHER_STUDENT = torch.tensor([[1.0, 2.0, 5.0]]).log(), torch.tensor([[2.0, 1.0, 1.0]]).log()
TEACHER, LABEL = torch.tensor([[1.0, 1.0, 2.0]]).log(), torch.tensor([1])
DIVERGENCE = 0.25 * log(2) + 0.25 * log(1) + 0.5 * log(0.8)


def sized(option: str) -> list[str]:
    return [option, *(f"{name}={value}" for name, value in SIZE.items())]


def distilled_model(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=classes, **SIZE)
    nn.init.trunc_normal_(model.head.weight), nn.init.trunc_normal_(model.head_dist.weight)
    model.set_distilled_training(True)
    return model.train()


def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# -- the losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.7, 1.0])
def test_hard_distillation_takes_the_teachers_top_class_as_a_second_label(alpha: float) -> None:
    loss = DistillationLoss(F.cross_entropy, hard=True, alpha=alpha)
    expected = (1 - alpha) * log(8 / 2) + alpha * log(8 / 5)  # DeiT, equation (3) for alpha 1/2
    assert loss(STUDENT, (LABEL, TEACHER)).item() == pytest.approx(expected)


def test_soft_distillation_is_the_divergence_over_batch_and_classes() -> None:
    loss = DistillationLoss(F.cross_entropy, hard=False, alpha=0.1, temperature=1)
    expected = 0.9 * log(8 / 2) + 0.1 * DIVERGENCE / 3  # DeiT, equation (2), divided as in its published runs
    assert loss(STUDENT, (LABEL, TEACHER)).item() == pytest.approx(expected)
    twice = DistillationLoss(F.cross_entropy, hard=False, alpha=1, temperature=1)
    assert twice(STUDENT.repeat(5, 1), (LABEL.repeat(5), TEACHER.repeat(5, 1))).item() == pytest.approx(DIVERGENCE / 3)


def test_a_temperature_divides_both_logits_and_multiplies_the_loss_by_its_square() -> None:
    loss = DistillationLoss(F.cross_entropy, hard=False, alpha=1, temperature=3)
    assert loss(3 * STUDENT, (LABEL, 3 * TEACHER)).item() == pytest.approx(9 * DIVERGENCE / 3)


def test_equal_logits_have_no_soft_loss() -> None:
    loss = DistillationLoss(F.cross_entropy, hard=False, alpha=1, temperature=2)
    assert loss(TEACHER, (LABEL, TEACHER)).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("hard", [True, False])
def test_of_two_outputs_the_first_learns_from_labels_and_the_second_from_the_teacher(hard: bool) -> None:
    loss = DistillationLoss(F.cross_entropy, hard=hard, alpha=0.3)
    soft = 0.25 * log(0.25 / 0.5) + 0.5 * log(0.5 / 0.25)
    expected = 0.7 * log(8 / 2) + 0.3 * (log(4) if hard else soft / 3)
    assert loss((STUDENT, OTHER_STUDENT), (LABEL, TEACHER)).item() == pytest.approx(expected)


# -- models ----------------------------------------------------------------------------------------------------


def test_only_a_teacher_makes_timms_distilled_model_give_two_outputs() -> None:
    name = ["--data", "x", "--model", "deit_tiny_distilled_patch16_224", *sized("--model-args")]
    alone = build_model(parse_arguments("", name), 4)
    taught = build_model(parse_arguments("", [*name, "--teacher", "t"]), 4)
    assert isinstance(alone.train()(images()), Tensor)
    output = taught.train()(images())
    assert [tuple(each.shape) for each in output] == [(3, 4), (3, 4)]
    assert isinstance(taught.eval()(images()), Tensor)


def test_the_class_head_gets_no_gradient_from_the_teacher_and_the_distillation_head_none_from_labels() -> None:
    def heads_with_gradient(alpha: float) -> list[bool]:
        model = distilled_model()
        loss = DistillationLoss(F.cross_entropy, hard=True, alpha=alpha)
        loss(model(images()), (torch.tensor([0, 1, 2]), torch.eye(4)[1:])).backward()
        return [bool(head.weight.grad.abs().sum() > 0) for head in (model.head, model.head_dist)]

    assert [heads_with_gradient(alpha) for alpha in (0, 1)] == [[True, False], [False, True]]


def test_a_teacher_is_frozen_evaluates_and_gives_no_gradient() -> None:
    network = timm.create_model("deit_tiny_patch16_224", num_classes=4, drop_rate=0.5, **SIZE).train()
    teacher = Teacher(network)
    first, second = teacher(images()), teacher(images())
    assert torch.equal(first, second) and not first.requires_grad
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    student = distilled_model()
    DistillationLoss(F.cross_entropy, hard=False, alpha=1)(
        student(images()), (torch.tensor([0, 1, 2]), first)
    ).backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert student.head_dist.weight.grad is not None


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_with_cycles_every_cycle_learns_from_labels_and_teacher_and_tokens_from_the_next(hard: bool) -> None:
    model = wrap_multicycle(distilled_model(), cycles=2)
    labels, teacher = torch.tensor([0, 1, 2]), torch.randn(3, 4)
    output = model(images())
    task = DistillationLoss(F.cross_entropy, hard=hard, alpha=0.4, temperature=2)
    parts = CycleLoss(task, alpha=0.1)(output, (labels, teacher))

    expected = 0.1 * F.mse_loss(*output.tokens)
    for by_class, by_distillation in output.outputs:
        if hard:
            taught = F.cross_entropy(by_distillation, teacher.argmax(1))
        else:
            p, q = (teacher / 2).softmax(1), (by_distillation / 2).softmax(1)
            taught = (p * (p / q).log()).sum() * 4 / 12
        expected = expected + 0.6 * F.cross_entropy(by_class, labels) + 0.4 * taught
    torch.testing.assert_close(parts.total, expected)
    assert not torch.equal(*(both[1] for both in output.outputs)) and parts.tokens.item() > 0


def test_labels_mixup_teacher_and_cycles_meet_in_one_criterion() -> None:
    given = ["--data", "x", "--teacher", "t", "--alpha", "0.1", "--model", "deit_tiny_distilled_patch16_224"]
    model = wrap_multicycle(distilled_model(), cycles=2)
    mixed, teacher = torch.rand(3, 4).softmax(1), torch.randn(3, 4)
    output = model(images())
    expected = 0.1 * F.mse_loss(*output.tokens)
    for by_class, by_distillation in output.outputs:
        expected = expected + 0.5 * F.cross_entropy(by_class, mixed)
        expected = expected + 0.5 * F.cross_entropy(by_distillation, teacher.argmax(1))
    parts = build_criterion(model, parse_arguments("", given))(output, (mixed, teacher))
    torch.testing.assert_close(parts.total, expected)


# -- the teacher of a command line -----------------------------------------------------------------------------


def asked(file: Path, *more: str) -> list[str]:
    return ["--teacher", "deit_tiny_patch16_224", "--teacher-from", str(file), *sized("--teacher-args"), *more]


@pytest.fixture
def seven_classes(tmp_path: Path) -> Path:
    network = timm.create_model("deit_tiny_patch16_224", num_classes=7, **SIZE)
    save_file(network.state_dict(), tmp_path / "seven.safetensors")
    return tmp_path / "seven.safetensors"


def test_without_a_teacher_there_is_none() -> None:
    assert build_teacher(parse_arguments("", []), 4, CPU) is None


def test_a_teacher_from_a_file_gives_that_files_logits(seven_classes: Path) -> None:
    teacher = build_teacher(parse_arguments("", asked(seven_classes)), 7, CPU)
    stock = timm.create_model("deit_tiny_patch16_224", num_classes=7, checkpoint_path=str(seven_classes), **SIZE)
    assert torch.equal(teacher(images()), stock.eval()(images()))


def test_a_teacher_of_other_classes_is_refused_with_both_numbers(seven_classes: Path) -> None:
    with pytest.raises(RunError, match=r"--teacher-from \S+: has 7 classes in head\.\w+, and the data has 4"):
        build_teacher(parse_arguments("", asked(seven_classes)), 4, CPU)


def test_a_teacher_of_other_classes_is_not_advised_to_get_a_new_head(seven_classes: Path) -> None:
    with pytest.raises(RunError) as refused:
        build_teacher(parse_arguments("", asked(seven_classes)), 4, CPU)
    assert "--new-head" not in str(refused.value)


def test_a_teacher_from_the_hub_of_other_classes_is_refused(seven_classes: Path) -> None:
    stored = f"pretrained_cfg_overlay={{'file': {str(seven_classes)!r}, 'num_classes': 7}}"
    given = ["--teacher", "deit_tiny_patch16_224", *sized("--teacher-args"), stored]
    assert build_teacher(parse_arguments("", given), 7, CPU) is not None
    with pytest.raises(RunError, match="7 classes"):
        build_teacher(parse_arguments("", given), 4, CPU)


def test_an_unknown_teacher_is_refused_by_its_own_option() -> None:
    with pytest.raises(RunError, match="--teacher regnetyy_160: timm has no model of this name"):
        build_teacher(parse_arguments("", ["--teacher", "regnetyy_160"]), 4, CPU)
