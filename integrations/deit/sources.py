"""Finds out what `--data` names and opens it with the `datasets` library; no folder of that name means the hub.

Only the splits that a training uses are opened, each on its own, so that their class lists can be compared: read
together, an image folder would silently merge them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from cyclekd.integrations.runs.errors import RunError

Rows = Dataset | IterableDataset

EMBEDDED_VALIDATION = 400  # of the 1,797 digits
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
LAYOUTS = (
    "one folder per split (train/, and val/, validation/ or test/) with one folder of images per class or with "
    ".parquet or .tar files; .parquet or .tar (webdataset) files named after their split "
    "(train-00000-of-00001.parquet, imagenet1k-train-0000.tar); or a folder written by save_to_disk"
)


def open_splits(
    data: str | None,
    *,
    train_split: str = "train",
    validation_split: str = "validation",
    cache_dir: str | None = None,
    streaming: bool = False,
) -> dict[str, Rows]:
    """The two splits, training first, under the names they have; `streaming` holds for the first alone.

    A validation split that is not there is replaced by `test`. Errors: RunError with what was looked for and seen.
    """
    if data is None:
        return embedded_digits()
    folder = Path(data).expanduser()
    if folder.is_dir() and (folder / "dataset_dict.json").exists():
        return open_saved(folder, train_split, validation_split)
    if folder.is_dir():
        return open_folder(folder, train_split, validation_split, cache_dir, streaming)
    if folder.exists():
        raise RunError(f"--data {data} is a file; name the folder it lies in, which may be: {LAYOUTS}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data) or data.startswith("."):
        raise RunError(f"--data {data}: there is no such folder, and it cannot be the name of a data set on the hub")
    return open_hub(data, train_split, validation_split, cache_dir, streaming)


def embedded_digits() -> dict[str, Rows]:
    """The 1,797 handwritten digits that come with scikit-learn, 8 x 8 pixels: 1,397 and 400, the same ones always."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # grey values 0..16
    parts = train_test_split(np.arange(len(labels)), test_size=EMBEDDED_VALIDATION, stratify=labels, random_state=0)
    features = Features(image=Image(), label=ClassLabel(names=[str(digit) for digit in range(10)]))
    return {
        split: Dataset.from_dict(
            {"image": [{"bytes": png(pixels[i]), "path": None} for i in part], "label": labels[part]}, features
        )
        for split, part in zip(("train", "validation"), parts, strict=True)
    }


def png(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    PILImage.fromarray(pixels).convert("RGB").save(buffer, "png")
    return buffer.getvalue()


def open_saved(folder: Path, train_split: str, validation_split: str) -> dict[str, Rows]:
    saved = load_from_disk(folder)
    assert isinstance(saved, DatasetDict)
    return {name: saved[name] for name in choose(saved, train_split, validation_split, f"--data {folder}")}


def open_folder(
    folder: Path, train_split: str, validation_split: str, cache_dir: str | None, streaming: bool
) -> dict[str, Rows]:
    found = find_splits(folder, {train_split, validation_split})
    if not found:
        raise RunError(f"--data {folder} has no splits. Looked for {LAYOUTS}. Saw {listing(folder)}")
    chosen = choose(found, train_split, validation_split, f"--data {folder}")
    opened: dict[str, Rows] = {}
    for split in chosen:
        builder, files = find_files(found[split], folder)
        layout = {"drop_labels": False, "drop_metadata": True} if builder == "imagefolder" else {}
        opened[split] = load(
            builder,
            f"--data {folder}, split {split!r}",
            data_files={split: files},
            split=split,
            cache_dir=cache_dir,
            streaming=streaming and split == chosen[0],
            **layout,
        )
    return opened


def find_splits(folder: Path, wanted: Iterable[str] = ()) -> dict[str, list[Path]]:
    """Which split folders, or else which parquet or tar files, belong to which split; also in a sub-folder `data`."""
    names = SPLIT_NAMES | {name: name for name in wanted}
    places = [folder, folder / "data"]
    for place in filter(Path.is_dir, places):
        entries = sorted(entry for entry in place.iterdir() if not entry.name.startswith("."))
        for kind in (Path.is_dir, lambda path: path.suffix in BUILDERS):
            splits: dict[str, list[Path]] = {}
            for entry in filter(kind, entries):
                stem = entry.name if entry.is_dir() else entry.name.split(".")[0]
                words = [stem] if entry.is_dir() else [re.sub(r"-\d+-of-\d+$", "", stem), *re.split(r"[-_\d]+", stem)]
                split = next((names[word] for word in words if word in names), None)
                if split:
                    splits.setdefault(split, []).append(entry)
            if splits:
                return splits
    return {}


def find_files(paths: list[Path], folder: Path) -> tuple[str, list[str]]:
    """The builder of a split and its files, from its files or its folder."""
    if len(paths) > 1 and paths[0].is_dir():
        raise RunError(f"--data {folder} has several folders for one split: {names_of(paths)}; leave one of them")
    inside = paths if paths[0].is_file() else sorted(path for path in paths[0].iterdir() if path.is_file())
    suffixes = {path.suffix for path in inside} & BUILDERS.keys()
    if len(suffixes) > 1:
        raise RunError(f"--data {folder} has .parquet and .tar files for one split; leave one of the two kinds")
    if suffixes:
        (suffix,) = suffixes
        return BUILDERS[suffix], [str(path) for path in inside if path.suffix == suffix]
    if not any(path.is_dir() for path in paths[0].iterdir()):
        raise RunError(
            f"--data {folder}: {paths[0].name}/ has neither .parquet nor .tar files nor a folder per class. "
            f"Saw {listing(paths[0])}"
        )
    return "imagefolder", [str(paths[0] / "*/**")]


def open_hub(
    name: str, train_split: str, validation_split: str, cache_dir: str | None, streaming: bool
) -> dict[str, Rows]:
    asked = f"--data {name}: there is no such folder, and as a data set of the hub"
    try:
        splits = get_dataset_split_names(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{asked} it cannot be opened: {error}") from error
    chosen = choose(splits, train_split, validation_split, f"--data {name}")
    return {
        split: load(name, asked, split=split, cache_dir=cache_dir, streaming=streaming and split == chosen[0])
        for split in chosen
    }


def load(path: str, asked: str, **options: object) -> Rows:
    """`datasets.load_dataset`, whose errors become a RunError that begins with what was asked."""
    try:
        return load_dataset(path, **options)
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        cause = error.__cause__ or error  # the builder's own message; the outer one says only that building failed
        if "corresponds to no data" in str(error):
            raise RunError(f"{asked} is empty: no images were found in it") from error
        raise RunError(f"{asked} cannot be opened: {type(cause).__name__}: {cause}") from error


def choose(splits: Iterable[str], train_split: str, validation_split: str, where: str) -> tuple[str, str]:
    """The names of the two splits among those there are; `val` finds `validation` and the other way round."""
    splits = list(splits)
    by_meaning = {SPLIT_NAMES.get(split, split): split for split in splits} | {split: split for split in splits}

    def find(wanted: str) -> str | None:
        return by_meaning.get(wanted) or by_meaning.get(SPLIT_NAMES.get(wanted, wanted))

    train, validation = find(train_split), find(validation_split)
    if validation is None and validation_split == "validation":
        validation = find("test")
    if train is None or validation is None:
        option, name = ("--train-split", train_split) if train is None else ("--validation-split", validation_split)
        raise RunError(f"{where} has no split {name!r}; there are: {', '.join(splits)}. Choose one with {option}")
    if train == validation:
        raise RunError(f"{where}: split {train!r} is asked for as training and as validation data")
    return train, validation


def listing(folder: Path, most: int = 8) -> str:
    """The first names in a folder, for an error message."""
    return names_of(sorted(folder.iterdir()), most) or "nothing: it is empty"


def names_of(paths: list[Path], most: int = 8) -> str:
    names = [f"{path.name}/" if path.is_dir() else path.name for path in paths]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
