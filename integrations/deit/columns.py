"""Which column of a table is the image, which one the label, and what labels mean; refused where that is not clear."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value

from cyclekd.integrations.deit.sources import Rows
from cyclekd.integrations.runs.errors import RunError


class Split(NamedTuple):
    """Rows whose image column holds encoded images; `classes` is None where labels are bare numbers."""

    name: str
    rows: Rows
    image_column: str
    label_column: str
    classes: list[str] | None


def find_columns(name: str, rows: Rows, image_column: str | None, label_column: str | None) -> Split:
    """The columns named, or else the only ones that can be meant."""
    features = rows.features
    if features is None:
        raise RunError(f"{name} does not say what its columns hold before it is read; leave --streaming out")
    image = only_column("image", image_column, image_columns(features), features, name)
    label = only_column("label", label_column, label_columns(features), features, name)
    classes = list(features[label].names) if isinstance(features[label], ClassLabel) else None
    rows = rows.select_columns([image, label]).cast_column(image, Image(decode=False))
    return Split(name, rows, image, label, classes)


def image_columns(features: Features) -> list[list[str]]:
    """Columns that hold images, best kind first: those that say so, then bytes or structs with bytes."""
    declared = [name for name, feature in features.items() if isinstance(feature, Image)]
    return [declared, [name for name, feature in features.items() if holds_bytes(feature)]]


def label_columns(features: Features) -> list[list[str]]:
    """Columns that hold labels, best kind first: those with class names, then integers."""
    named = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    return [named, [name for name, feature in features.items() if holds_integers(feature)]]


def holds_bytes(feature: object) -> bool:
    if isinstance(feature, dict):
        return holds_bytes(feature.get("bytes"))
    return isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")


def holds_integers(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))


def only_column(what: str, asked: str | None, kinds: list[list[str]], features: Features, name: str) -> str:
    """The column asked for if it fits, else the only one of the best kind there is."""
    option, fitting = f"--{what}-column", [column for kind in kinds for column in kind]
    if asked is not None:
        if asked not in fitting:
            seen = "is no such column" if asked not in features else f"holds {features[asked]}, which is no {what}"
            raise RunError(f"{name}: {option} {asked}: there {seen}. Choose from: {', '.join(fitting) or 'none'}")
        return asked
    best = next(filter(None, kinds), [])
    if not best:
        raise RunError(f"{name} has no {what} column; its columns are: {describe(features)}")
    if len(best) > 1:
        raise RunError(f"{name} has several {what} columns: {', '.join(best)}. Choose one with {option}")
    return best[0]


def describe(features: Features) -> str:
    kinds = ((name, getattr(feature, "dtype", type(feature).__name__)) for name, feature in features.items())
    return ", ".join(f"{name} ({kind})" for name, kind in kinds)


def agreed_classes(train: Split, validation: Split) -> list[str] | None:
    """The class names of both splits, None where neither has any; RunError where they differ."""
    ours, theirs = train.classes, validation.classes
    if ours is None or theirs is None or ours == theirs:
        return ours or theirs
    seen = [f"only {split.name} has {quoted(extra)}" for split, extra in difference(train, validation) if extra]
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
    seen = seen or [f"the order differs: class {first} is {ours[first]!r} in one and {theirs[first]!r} in the other"]
    raise RunError(f"training and validation data have different classes: {'; '.join(seen)}")


def difference(train: Split, validation: Split) -> list[tuple[Split, list[str]]]:
    ours, theirs = train.classes or [], validation.classes or []
    return [(train, [c for c in ours if c not in theirs]), (validation, [c for c in theirs if c not in ours])]


def quoted(names: list[str], most: int = 5) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_labels(split: Split) -> np.ndarray:
    """All labels of a split as int64, -1 where there is none."""
    assert isinstance(split.rows, Dataset)
    column = split.rows.select_columns([split.label_column]).with_format("arrow")[:].column(0)
    return column.fill_null(-1).to_numpy().astype(np.int64)


def check_labels(name: str, labels: np.ndarray, classes: int) -> None:
    """RunError unless every label is one of 0 .. classes - 1."""
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        first = outside[0]
        hint = " A label of -1 mostly means that labels are not published: choose another split." * bool(
            labels[first] == -1
        )
        raise RunError(
            f"{name}: {len(outside)} of {len(labels)} labels lie outside of 0 .. {classes - 1}; the first is "
            f"{labels[first]} in row {first}.{hint}"
        )
