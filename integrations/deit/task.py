"""Image classification as a task for `runs.training`: the loss of a batch, and the metrics of every cycle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import Dataset

from cyclekd import CycleLoss, run_cycles
from cyclekd.integrations.deit.distillation import Teacher
from cyclekd.integrations.runs.loading import Batch, load_batches, on_device
from cyclekd.integrations.runs.sampling import EvaluationBatches
from cyclekd.integrations.runs.seeds import derive_seed


class Classification:
    """Training on labels, optionally on a teacher as well; top-1, top-5 and loss of every cycle on `validation`.

    `augment` makes of a batch the images that the model sees, normalised, on the device; `normalise` does so for
    evaluation. Mixup draws once per optimizer step, the same on all processes and parts of the global batch.
    """

    best_metric = "top1_1"

    def __init__(
        self,
        accelerator: Accelerator,
        criterion: CycleLoss,
        *,
        augment: Callable[[Batch], Tensor],
        normalise: Callable[[Tensor], Tensor],
        validation: Dataset[Any],
        batch: int,
        workers: int,
        cycles: int,
        seed: int,
        mixup: Mixup | None = None,
        teacher: Teacher | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.accelerator, self.criterion = accelerator, criterion
        self.augment, self.normalise, self.validation = augment, normalise, validation
        self.batch, self.workers, self.cycles, self.seed = batch, workers, cycles, seed
        self.mixup, self.teacher, self.memory_format = mixup, teacher, memory_format

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Mapping[str, Tensor]:
        """Every term of the objective by name, see `cyclekd.LossParts.logs`; `loss` carries the gradient."""
        images, target = self.augment(batch), batch["label"]
        if self.mixup is not None:
            # timm draws from NumPy's global generator: alike on all processes
            np.random.seed(derive_seed(self.seed, "mixup", step) % 2**32)
            images, target = self.mixup(images, target)
        images = images.to(memory_format=self.memory_format)
        if self.teacher is not None:
            with self.accelerator.autocast():
                target = (target, self.teacher(images).float())
        parts = self.criterion(model(images), target)
        return {**parts.logs(), "loss": parts.total}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`top1_i`, `top5_i` (percent) and `loss_i` of cycle i, and the number of `images` they are of.

        Every image counts once, however many processes share them and whether or not they divide evenly; images that
        cannot be read do not count.
        """
        model = self.accelerator.unwrap_model(model).eval()
        share = EvaluationBatches(
            len(self.validation),
            batch=self.batch,
            processes=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
        )
        device = self.accelerator.device
        loader = load_batches(self.validation, share, self.workers, device)
        dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        sums = torch.zeros(self.cycles, 4, dtype=dtype, device=device)
        for batch in on_device(loader, device, stay=("index", "skipped")):
            images = self.normalise(batch["image"]).to(memory_format=self.memory_format)
            with self.accelerator.autocast():
                outputs = self._every_cycle(model, images)
            sums += torch.stack([_sums(logits.float(), batch["label"], batch["valid"]) for logits in outputs])
        return _means(self.accelerator.reduce(sums, "sum").tolist())

    def _every_cycle(self, model: nn.Module, images: Tensor) -> Sequence[Tensor]:
        return run_cycles(model, images).outputs if self.cycles > 1 else (model(images),)


def _sums(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """[4]: images that count, right at first place, right among the first five, sum of their losses."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    right = (best == labels[:, None]) & valid[:, None]
    losses = F.cross_entropy(logits, labels.clamp(min=0), reduction="none") * valid
    return torch.stack([valid.sum(), right[:, 0].sum(), right.any(dim=1).sum(), losses.sum()])


def _means(sums: list[list[float]]) -> dict[str, float]:
    metrics = {}
    for cycle, (images, first, among_five, loss) in enumerate(sums, start=1):
        share = 1 / max(images, 1)
        metrics[f"top1_{cycle}"] = 100 * first * share
        metrics[f"top5_{cycle}"] = 100 * among_five * share
        metrics[f"loss_{cycle}"] = loss * share
    return metrics | {"images": int(sums[0][0])}
