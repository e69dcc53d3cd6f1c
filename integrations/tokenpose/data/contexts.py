"""What training reads of an image: the square round one person that any view of it stays in.

Cut from the photograph each time, or once for all into a cache, so that an epoch does not decode a whole photograph for
every person in it. A square is scaled down where it is larger than the network can use, never up.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset as Table
from datasets import Features, Sequence, Value
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from PIL import Image
from pyarrow import ArrowException
from tqdm import tqdm

from cyclekd.integrations.tokenpose.data.people import People, read_image
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.decoding import PIXELS_PER_SCALE

T = TypeVar("T")
R = TypeVar("R")

QUALITY = 95
"""Of the JPEG files in a cache, without colour subsampling: views stay within a grey level on average."""

VERSION = 2
"""Of what is in a cache."""

WRITTEN_AT_ONCE = 100
"""People."""

LOOKED_AT = 100
"""Photographs whose size and date tell whether they are still those of a cache; asking for all takes minutes."""


@dataclass(frozen=True)
class Context:
    """Part of a photograph, and where it is from."""

    image: np.ndarray
    """uint8 [h, w, 3]."""
    matrix: np.ndarray
    """float64 [2, 3], from pixels of the photograph to those of `image`."""


def cut_context(photo: np.ndarray, center: np.ndarray, side: float, most: int) -> Context:
    """The square of `side` px round `center` as far as the photograph reaches, at most `most` px wide and high."""
    height, width = photo.shape[:2]
    left, top = np.floor(np.maximum(center - side / 2, 0)).astype(int)
    right, bottom = np.ceil(np.minimum(center + side / 2 + 1, (width, height))).astype(int)
    left, top = min(left, width - 1), min(top, height - 1)
    cut = photo[top : max(bottom, top + 1), left : max(right, left + 1)]
    shrink = min(1.0, most / max(cut.shape[:2]))
    if shrink == 1.0:
        return Context(cut, np.array([[1.0, 0.0, -left], [0.0, 1.0, -top]]))
    size = max(1, round(cut.shape[1] * shrink)), max(1, round(cut.shape[0] * shrink))
    x, y = size[0] / cut.shape[1], size[1] / cut.shape[0]
    small = np.asarray(Image.fromarray(cut).resize(size, Image.Resampling.BILINEAR))  # averages what it leaves out
    # Pillow keeps the outer edges of the corner pixels in place, and pixels are counted from their centres here.
    return Context(small, np.array([[x, 0.0, -left * x + (x - 1) / 2], [0.0, y, -top * y + (y - 1) / 2]]))


class Contexts:
    """The context of every person, cut from the photographs as they are asked for."""

    def __init__(self, people: People, centers: np.ndarray, scales: np.ndarray, reach: float, most: int) -> None:
        """`centers` and `scales` [N, 2] of the padded boxes; `reach` is a context's side over a box's longer side."""
        self.people, self.centers, self.most = people, centers, most
        self.sides = reach * PIXELS_PER_SCALE * scales.max(1)

    def __len__(self) -> int:
        return len(self.people)

    def read(self, row: int) -> Context:
        """Errors: PoseError where the photograph cannot be read, or is of another size than was annotated."""
        return self.cut(read_photograph(self.people, int(self.people.image_index[row])), row)

    def cut(self, photo: np.ndarray, row: int) -> Context:
        """A person's context, of the photograph it is in."""
        return cut_context(photo, self.centers[row], self.sides[row], self.most)


class CachedContexts:
    """The same out of a cache: a table that `datasets` maps into memory, in the order of the images."""

    def __init__(self, table: Table, contexts: Contexts) -> None:
        self.table, self.contexts = table, contexts
        self.places = np.empty(len(contexts), np.int64)
        self.places[_by_image(contexts.people)] = np.arange(len(contexts))

    def __len__(self) -> int:
        return len(self.table)

    def read(self, row: int) -> Context:
        """Its image may not be written to. PoseError where the photograph could not be read for the cache, nor now."""
        # not self.table[place], which would copy pixels out of the file and once more into Python's bytes
        columns, place = self.table.data, int(self.places[row])
        image, shape, matrix = (columns.column(name)[place] for name in ("image", "shape", "matrix"))
        data, shape, matrix = image.as_buffer(), shape.as_py(), np.array(matrix.as_py()).reshape(2, 3)
        if not len(data):
            return self.contexts.read(row)  # it may have been mended
        if shape:
            return Context(np.frombuffer(data, np.uint8).reshape(shape), matrix)
        with Image.open(io.BytesIO(data)) as file:
            return Context(np.asarray(file), matrix)


def read_photograph(people: People, image: int) -> np.ndarray:
    """uint8 [H, W, 3]. Errors: PoseError where it cannot be read, or is of another size than was annotated."""
    height, width = people.image_sizes[image].tolist()
    return read_image(people.images[image], (height, width))


def cached(contexts: Contexts, folder: Path, workers: int = 1, *, compress: bool = True) -> CachedContexts:
    """The cache of these contexts in `folder`, made there if there is none; one that was not finished is made again.

    It holds JPEG files, or without `compress` pixels: five to seven times the space, and nothing to decode.
    Its name tells which, the annotation file's content, which photographs they are and the geometry, so that other data
    or another input size get their own. That a photograph was exchanged under its name is seen by the size and date of
    one in many. Each is decoded once, by `workers` threads; those that cannot be read have an empty entry.
    Of several processes one makes it while the others wait.
    Errors: PoseError where the folder cannot be written, and nothing of the attempt stays, or the cache is damaged.
    """
    path = folder / f"people-{_fingerprint(contexts, compress)}.arrow"
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{path.name}.lock"):  # the system frees it when its owner is killed
                if not path.is_file():
                    _write(contexts, path, workers, compress)
    except OSError as error:
        raise PoseError(
            f"the cache of people {path} cannot be written ({error.strerror or error}): free some space, give another "
            "folder with --cache-dir, or do without by --no-cache"
        ) from error
    return CachedContexts(_open(path, len(contexts)), contexts)


def _open(path: Path, people: int) -> Table:
    try:
        table = Table.from_file(str(path))
    except (OSError, ArrowException) as error:
        raise PoseError(f"the cache of people {path} is damaged ({error}): delete it for a new one") from error
    if len(table) != people:
        raise PoseError(
            f"the cache {path} has {len(table)} people instead of {people}: delete it, and it is made again"
        )
    return table


def _write(contexts: Contexts, path: Path, workers: int, compress: bool) -> None:
    """Under another name until it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    numbers = {"shape": Sequence(Value("int64")), "matrix": Sequence(Value("float64"))}
    options = {"features": Features({"image": Value("binary"), **numbers}), "writer_batch_size": WRITTEN_AT_ONCE}
    bar = _Bar(total=len(contexts), desc=f"caching people in {path.parent}", unit=" people", **_rhythm())
    try:
        with bar, ArrowWriter(path=str(partial), **options) as writer:
            people = _rows_of_images(contexts.people)
            for rows in _in_threads(lambda rows: _entries(contexts, rows, compress), people, workers):
                for row in rows:
                    writer.write(row)
                bar.update(len(rows))
            writer.finalize()
        partial.replace(path)
    finally:
        with suppress(OSError):  # after a rename there is none
            partial.unlink()


def _entries(contexts: Contexts, rows: np.ndarray, compress: bool) -> list[dict[str, Any]]:
    """The entries of the people in one photograph."""
    try:
        photo = read_photograph(contexts.people, int(contexts.people.image_index[rows[0]]))
    except PoseError:
        return [{"image": b"", "shape": [], "matrix": [0.0] * 6} for _ in rows]
    return [_entry(contexts.cut(photo, row), compress) for row in rows]


def _entry(context: Context, compress: bool) -> dict[str, Any]:
    """`shape` is that of pixels; a JPEG file tells it itself."""
    matrix, file = context.matrix.flatten().tolist(), io.BytesIO()
    if not compress:
        return {"image": context.image.tobytes(), "shape": list(context.image.shape), "matrix": matrix}
    Image.fromarray(context.image).save(file, "JPEG", quality=QUALITY, subsampling=0)
    return {"image": file.getvalue(), "shape": [], "matrix": matrix}


def _by_image(people: People) -> np.ndarray:
    """Rows in the order of their images."""
    return people.image_index.argsort(stable=True).numpy()


def _rows_of_images(people: People) -> list[np.ndarray]:
    counts = np.unique(people.image_index.numpy(), return_counts=True)[1]
    return np.split(_by_image(people), counts.cumsum()[:-1])


def _in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`function` of each, in order; few are begun ahead, so that there is little to wait for where it ends early."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[R]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 4 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _fingerprint(contexts: Contexts, compress: bool) -> str:
    people = contexts.people
    digest = hashlib.sha256(people.annotations.read_bytes())
    digest.update(json.dumps([VERSION, len(contexts), contexts.most, QUALITY if compress else None]).encode())
    digest.update(contexts.centers.tobytes() + contexts.sides.tobytes())
    for image in people.images:
        digest.update(os.path.relpath(image, people.annotations.parent).encode())
    for image in people.images[:: max(1, len(people.images) // LOOKED_AT)]:
        state = image.stat()
        digest.update(f"{state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _rhythm() -> dict[str, float]:
    """Of a bar on a terminal, or of a line now and then in a file."""
    return {"delay": 1.0} if sys.stderr.isatty() else {"delay": 10.0, "mininterval": 30.0}


class _Bar(tqdm):
    monitor_interval = 0  # no thread of its own: a process with threads should not fork the workers of a data loader
