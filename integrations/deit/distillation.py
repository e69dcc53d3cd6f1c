"""A task loss that also learns from a teacher network, as DeiT does; `CycleLoss` supervises every cycle with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Target = tuple[Tensor, Tensor]


class DistillationLoss(nn.Module):
    """(1 - alpha) times the loss on the labels, plus alpha times that on a teacher's predictions; a scalar.

    Equations (2) and (3) of DeiT (arXiv:2012.12877). Hard distillation takes the teacher's top class as the label; soft
    distillation the divergence from its softened distribution, times temperature squared. `output` is the logits
    [B, classes], or the pair that timm's distilled models give in training, of the class and the distillation token:
    then the second learns from the teacher. `target` is (labels in whatever form `labels_loss` takes, teacher logits).
    """

    def __init__(
        self, labels_loss: Callable[[Tensor, Tensor], Tensor], *, hard: bool, alpha: float, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.labels_loss, self.hard, self.alpha, self.temperature = labels_loss, hard, alpha, temperature

    def forward(self, output: Tensor | tuple[Tensor, Tensor], target: Target) -> Tensor:
        labels, teacher = target
        student, distilled = output if isinstance(output, tuple) else (output, output)
        loss = self.labels_loss(student, labels)
        return (1 - self.alpha) * loss + self.alpha * self.teacher_loss(distilled, teacher)

    def teacher_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.hard:
            return F.cross_entropy(student, teacher.argmax(dim=1))
        softened = (F.log_softmax(logits.float() / self.temperature, dim=1) for logits in (student, teacher))
        divergence = F.kl_div(*softened, reduction="sum", log_target=True) * self.temperature**2
        # equation (2) averages over the batch; DeiT's published runs over batch and classes, and so do its weights
        return divergence / student.numel()


class Teacher:
    """A frozen network's logits, [B, classes], computed without gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.model(images)
