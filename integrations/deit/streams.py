"""Training images read from front to end while they are downloaded, for data that shall not be stored here.

Order and seeds follow from seed, epoch and position alone, so a stream can start at any step. It then reads the rows
before that step in its epoch once more, without decoding them. Unlike with a table, the order also depends on the
number of processes and of workers, each of which reads a part of its own, and on the version of `datasets`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import fsspec.asyn
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info

from cyclekd.integrations.deit.columns import Split
from cyclekd.integrations.deit.data import GIVE_UP_AFTER, encoded
from cyclekd.integrations.deit.decoding import UnreadableImage, open_image
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.seeds import derive_seed

ROWS_AT_ONCE = 32  # handed over by `datasets` in one piece; says nothing about the order

Row = dict[str, Any]


class StreamedImages(TorchIterableDataset[dict[str, Any]]):
    """This process' samples from optimizer step `start` to the end of the run, for DataLoader(batch_size=batch).

    Samples are those of `TrainingImages`, but `index` and `skipped` number the samples of the run, as rows of a stream
    have no index. An epoch has `images_per_epoch` images, less the last incomplete global batch. A part of the data
    that ends before its epoch starts over, in another order. Every worker shuffles `shuffle_buffer` images at a time
    and holds them, encoded, in memory. Where the shards cannot be shared out evenly to all workers of all processes,
    each of them reads all shards and takes every n-th image.

    Errors: RunError for labels out of range, nothing readable, no data, and an epoch below one global batch.
    """

    def __init__(
        self,
        split: Split,
        transform: Callable[[Image.Image, int], dict[str, Tensor]],
        *,
        classes: int,
        images_per_epoch: int,
        batch: int,
        epochs: int,
        seed: int,
        accumulate: int = 1,
        processes: int = 1,
        rank: int = 0,
        start: int = 0,
        shuffle_buffer: int = 4096,
    ) -> None:
        assert isinstance(split.rows, IterableDataset)
        self.split, self.transform, self.classes = split, transform, classes
        self.batch, self.accumulate, self.epochs, self.start = batch, accumulate, epochs, start
        self.seed, self.processes, self.rank, self.shuffle_buffer = seed, processes, rank, shuffle_buffer
        self.global_batch = batch * accumulate * processes
        self.steps_per_epoch = images_per_epoch // self.global_batch
        if self.steps_per_epoch == 0:
            raise RunError(f"{images_per_epoch} images per epoch are less than one global batch of {self.global_batch}")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate * self.batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        fsspec.asyn.reset_lock()  # a lock that was held when this worker was forked would never be released
        per_epoch = self.steps_per_epoch * self.accumulate  # batches of this process
        number, end = self.start * self.accumulate + worker, self.epochs * per_epoch
        while number < end:  # a DataLoader takes its batches from worker 0, 1, ... in turn
            epoch, first = divmod(number, per_epoch)
            # the worker that had this batch in an undisturbed run may have been another: its part is what counts
            samples = self._samples(epoch, first % workers, workers, first // workers * self.batch)
            for place in range(first, per_epoch, workers):
                before = ((epoch * per_epoch + place) * self.processes + self.rank) * self.batch
                for i, (sample, replaced) in enumerate(islice(samples, self.batch)):
                    yield {**sample, "index": before + i, "skipped": before + i if replaced else -1}
                number += workers

    def _samples(self, epoch: int, worker: int, workers: int, start: int) -> Iterator[tuple[dict[str, Tensor], bool]]:
        """Samples of one worker's part of one epoch, and whether the image is a replacement, from `start` on."""
        part, parts = self.rank * workers + worker, self.processes * workers
        rows = islice(self._rows(epoch, part, parts), start, None)
        ahead: deque[Row] = deque()  # rows read in search of a replacement; they still have their own turn
        for position in count(start):
            ahead = ahead or deque([next(rows)])
            seed = derive_seed(self.seed, "sample", epoch, part, position)
            for step in range(GIVE_UP_AFTER):
                if step == len(ahead):
                    ahead.append(next(rows))
                try:
                    yield self._sample(ahead[step], seed), step > 0
                    break
                except UnreadableImage as error:
                    problem = error
            else:
                raise RunError(f"{self.split.name}: nothing readable in {GIVE_UP_AFTER} images; the last: {problem}")
            ahead.popleft()

    def _rows(self, epoch: int, part: int, parts: int) -> Iterator[Row]:
        """Rows of one of `parts` equal parts, over and over, in an order of their own each time."""
        for turn in count():
            order = derive_seed(self.seed, "order", epoch, turn)  # one for all parts, or they would overlap
            shuffled = self.split.rows.shuffle(seed=order, buffer_size=self.shuffle_buffer)
            # iter(), because iterating itself would share the rows out among the workers once more
            row = None
            for rows in split_dataset_by_node(shuffled, part, parts).iter(ROWS_AT_ONCE):
                for values in zip(*rows.values(), strict=True):
                    row = dict(zip(rows, values, strict=True))
                    yield row
            if row is None:
                raise RunError(f"{self.split.name}: too few images for {parts} workers of all processes")

    def _sample(self, row: Row, seed: int) -> dict[str, Tensor]:
        label = row[self.split.label_column]
        if label is None or not 0 <= label < self.classes:
            raise RunError(f"{self.split.name}: label {label} lies outside of 0 .. {self.classes - 1}")
        value = row[self.split.image_column]
        if value is None:
            raise UnreadableImage("no image in this row")
        return {**self.transform(open_image(encoded(value)), seed), "label": torch.tensor(label)}
