"""Which samples each process sees at which step: a function of seed, epoch and step alone.

The order of an epoch is one permutation for the whole run, cut into global batches; processes and accumulation only
share these out. A run can therefore start at any step, and two processes see together what one sees alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.seeds import derive_seed

PADDING = -1
"""The index of a sample that is not there: it fills the last evaluation batches up and is counted nowhere."""


class Draw(NamedTuple):
    """One sample to be read, and the seed of its augmentation."""

    index: int
    seed: int


class TrainingBatches(Sampler[list[Draw]]):
    """This process' batches from optimizer step `start` to the end of the run, over all epochs in one go.

    One optimizer step takes `accumulate` of them. Every batch takes its share of the global batch from both ends, so
    that an image and its mirror image in the batch, which is whom timm's mixup pairs it with, are the same however
    the global batch is shared out. The last incomplete global batch of an epoch is left out, as in timm. With
    `repeats` r every image stands r times in a row and 1/r of the images make an epoch (repeated augmentation,
    arXiv:1901.09335), so that copies of an image meet in one global batch, but for one at its border.

    Errors: RunError for data smaller than one global batch.
    """

    def __init__(
        self,
        length: int,
        *,
        batch: int,
        epochs: int,
        seed: int,
        accumulate: int = 1,
        processes: int = 1,
        rank: int = 0,
        repeats: int = 1,
        start: int = 0,
    ) -> None:
        self.length, self.epochs, self.seed, self.repeats, self.start = length, epochs, seed, repeats, start
        self.batch, self.accumulate, self.processes, self.rank = batch, accumulate, processes, rank
        self.global_batch = batch * accumulate * processes
        self.steps_per_epoch = length // self.global_batch
        if self.steps_per_epoch == 0:
            raise RunError(
                f"one global batch is {self.global_batch} samples ({batch} per process x {processes} processes x "
                f"{accumulate} accumulated), and there are {length} to train on: give a smaller --batch-size"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.length, self.seed, epoch, self.repeats)
            first = step % self.steps_per_epoch * self.global_batch
            for part in range(self.accumulate):
                positions = [first + i for i in self._share(part * self.processes + self.rank)]
                yield [Draw(int(order[p]), derive_seed(self.seed, "sample", epoch, p)) for p in positions]

    def _share(self, share: int) -> list[int]:
        """Places within the global batch: one half from its front, the other, mirrored, from its back."""
        if self.batch % 2:
            return list(range(share * self.batch, (share + 1) * self.batch))
        half = self.batch // 2
        front = range(share * half, (share + 1) * half)
        return [*front, *(self.global_batch - 1 - i for i in reversed(front))]


def epoch_order(length: int, seed: int, epoch: int, repeats: int = 1) -> torch.Tensor:
    """Sample indices in the order of this epoch, [length]."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(length, generator=generator).repeat_interleave(repeats)[:length]


class EvaluationBatches(Sampler[list[int]]):
    """This process' share of 0 .. length - 1 in batches; every index once over all processes.

    All processes get the same number of full batches, so that none waits for another in a collective call; what is
    missing is filled up with `PADDING`.
    """

    def __init__(self, length: int, *, batch: int, processes: int = 1, rank: int = 0) -> None:
        self.length, self.batch, self.processes, self.rank = length, batch, processes, rank

    def __len__(self) -> int:
        return -(-self.length // (self.batch * self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        share = list(range(self.rank, self.length, self.processes))
        share += [PADDING] * (len(self) * self.batch - len(share))
        for first in range(0, len(share), self.batch):
            yield share[first : first + self.batch]
