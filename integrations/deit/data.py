"""Images and their classes for training and evaluation, with random access: any image can be read again at any time.

Images stay encoded until a worker asks for them. One that cannot be read neither ends the training nor vanishes
silently: training takes the next one and says which it left out, evaluation marks it as not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fsspec
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cyclekd.integrations.deit.columns import Split, agreed_classes, check_labels, find_columns, read_labels
from cyclekd.integrations.deit.decoding import UnreadableImage, decode, open_image, reason
from cyclekd.integrations.deit.sources import open_splits
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.sampling import PADDING, Draw

GIVE_UP_AFTER = 100  # unreadable images in a row: then it is the disk or the whole data set, not single files
SHARDS = 64  # of a table that is to be streamed
BLANK_SIZE = 32  # pixels, of the image that stands for one that is not there; transforms resize it


class ImageTable:
    """The images of one split by index; `labels` is [length], int64. Errors: RunError for a split of no use."""

    def __init__(self, split: Split) -> None:
        assert isinstance(split.rows, Dataset)
        if len(split.rows) == 0:
            raise RunError(f"{split.name} is empty")
        self.name = split.name
        self.labels = read_labels(split)
        self._column = split.image_column
        self._rows = split.rows.select_columns([split.image_column])
        missing = self._rows.data.column(0).null_count
        if missing:
            raise RunError(f"{self.name}: {missing} of {len(self)} rows have no image in column {self._column!r}")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Image.Image:
        """The opened image; its pixels are read by `decode`. UnreadableImage names row, file and reason."""
        value = self._rows[index][self._column]
        try:
            return open_image(encoded(value))
        except UnreadableImage as error:
            raise UnreadableImage(f"{self._place(index, value)}: {error}") from error

    def problem(self, index: int) -> str:
        """Row, file and reason of an image that could not be used, for a log; tries to decode it once more."""
        try:
            decode(self.read(index))
        except UnreadableImage as error:
            place = self._place(index, self._rows[index][self._column])
            return str(error) if str(error).startswith(place) else f"{place}: {error}"
        return f"{self._place(index, self._rows[index][self._column])}: readable now"

    def _place(self, index: int, value: dict[str, Any]) -> str:
        return f"{self.name}, row {index}" + (f" ({value['path']})" if value["path"] else "")


@dataclass(frozen=True)
class ImageData:
    """Training and validation images, and the class names; `train` is a Split of streamed rows where asked for."""

    train: ImageTable | Split
    validation: ImageTable
    classes: list[str]


def load_data(
    data: str | None,
    *,
    train_split: str = "train",
    validation_split: str = "validation",
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    cache_dir: str | None = None,
    streaming: bool = False,
) -> ImageData:
    """What `--data` names: a folder, a data set of the hub, or None for the handwritten digits of scikit-learn.

    `num_classes` is for labels that are bare numbers; without it the largest one in the training data decides.
    Errors: RunError for anything that would make a training fail, or mean something else than it seems to.
    """
    splits = open_splits(
        data, train_split=train_split, validation_split=validation_split, cache_dir=cache_dir, streaming=streaming
    )
    source = data or "embedded digits"
    train_part, validation_part = (
        find_columns(f"{source}, split {name!r}", rows, image_column, label_column) for name, rows in splits.items()
    )
    classes = agreed_classes(train_part, validation_part)
    if classes and num_classes not in (None, len(classes)):
        raise RunError(f"{source} has {len(classes)} classes, and --num-classes says {num_classes}; leave it out")
    validation = ImageTable(validation_part)
    train = as_stream(train_part) if streaming else ImageTable(train_part)
    if classes is None:
        classes = [str(number) for number in range(num_classes or count_classes(train))]
    for table in (train, validation):
        if isinstance(table, ImageTable):
            check_labels(table.name, table.labels, len(classes))
    return ImageData(train, validation, classes)


def as_stream(split: Split) -> Split:
    """The split with its rows as a stream, if they are a table so far."""
    if isinstance(split.rows, Dataset):
        return split._replace(rows=split.rows.to_iterable_dataset(num_shards=min(len(split.rows), SHARDS)))
    return split


def count_classes(train: ImageTable | Split) -> int:
    """One more than the largest label of the training data."""
    if isinstance(train, Split):
        raise RunError(f"{train.name}: labels are bare numbers; with --streaming, say how many with --num-classes")
    return max(int(train.labels.max()) + 1, 1)


def encoded(value: dict[str, Any]) -> bytes:
    """The bytes of an image file, from the row itself or from the file that it names."""
    if value["bytes"] is not None:
        return value["bytes"]
    try:
        with fsspec.open(value["path"], "rb") as file:
            return file.read()
    except OSError as error:
        raise UnreadableImage(error.strerror or reason(error)) from error


class TrainingImages(TorchDataset[dict[str, Any]]):
    """What `transform(image, seed)` makes of a drawn image, with `label`, `index` and `skipped`.

    An unreadable image is replaced by the next readable one, with the same seed; `skipped` is then the index that was
    drawn, else -1, and `index` and `label` are those of the image shown. Errors: RunError if nothing is readable.
    """

    def __init__(self, table: ImageTable, transform: Callable[[Image.Image, int], dict[str, Tensor]]) -> None:
        self.table, self.transform = table, transform

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        first, seed = draw
        problem: UnreadableImage | None = None
        for step in range(min(GIVE_UP_AFTER, len(self))):
            index = (first + step) % len(self)
            try:
                sample = self.transform(self.table.read(index), seed)
            except UnreadableImage as error:
                problem = problem or error
                continue
            label = torch.tensor(self.table.labels[index])
            return {**sample, "label": label, "index": index, "skipped": first if step else -1}
        raise RunError(
            f"{self.table.name}: nothing readable in {min(GIVE_UP_AFTER, len(self))} images from row {first} on; "
            f"the first: {problem}"
        )


class EvaluationImages(TorchDataset[dict[str, Any]]):
    """What `transform(image)` makes of an image, with `label`, `index` and `valid`: whether it counts.

    Unreadable images and the index PADDING give a blank image and valid=False, so that batches keep their size; only
    the former have an index of 0 or more.
    """

    def __init__(self, table: ImageTable, transform: Callable[[Image.Image], dict[str, Tensor]]) -> None:
        self.table, self.transform = table, transform

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = torch.tensor(0 if index == PADDING else int(self.table.labels[index]))
        sample = None
        if index != PADDING:
            try:
                sample = self.transform(self.table.read(index))
            except UnreadableImage:
                pass  # told by valid=False beside an index
        valid = sample is not None
        if sample is None:
            sample = self.transform(Image.new("RGB", (BLANK_SIZE, BLANK_SIZE)))
        return {**sample, "label": label, "index": index, "valid": valid}
