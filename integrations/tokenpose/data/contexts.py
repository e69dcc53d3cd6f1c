"""What training reads of an image: the square round one person that any view of it stays in.

Cut from the photograph each time, or once for all into a cache, so that an epoch does not decode a whole photograph for
every person in it. A square is scaled down where it is larger than the network can use, never up.
"""

from __future__ import annotations

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset as Table
from datasets import Features, Sequence, Value
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from tqdm import tqdm

from cyclekd.integrations.tokenpose.data.people import People, read_image
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.decoding import PIXELS_PER_SCALE

QUALITY = 95
"""Of the JPEG files in a cache, without colour subsampling."""


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
        """Errors: PoseError where the photograph cannot be read."""
        photo = read_image(self.people.images[int(self.people.image_index[row])])
        return cut_context(photo, self.centers[row], self.sides[row], self.most)


class CachedContexts:
    """The same out of a cache: a table of JPEG files that `datasets` maps into memory."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def read(self, row: int) -> Context:
        """Errors: PoseError where the photograph could not be read when the cache was made."""
        found = self.table[row]
        if found["problem"]:
            raise PoseError(found["problem"])
        with Image.open(io.BytesIO(found["jpeg"])) as image:
            return Context(np.asarray(image), np.array(found["matrix"]).reshape(2, 3))


def cached(contexts: Contexts, folder: Path, annotations: Path, workers: int = 1) -> CachedContexts:
    """The cache of these contexts in `folder`, made there if there is none; one that was not finished is made again.

    Its name tells the annotation file's content and the geometry, so that other data or another input size get their
    own. Photographs that cannot be read are noted in it, and refused when they are asked for.
    Errors: PoseError where the folder cannot be written.
    """
    path = folder / f"people-{_fingerprint(contexts, annotations)}.arrow"
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _write(contexts, path, workers)
    except OSError as error:
        raise PoseError(f"the cache {path}: not written: {error}. Free some space, or give another folder") from error
    return CachedContexts(Table.from_file(str(path)))


def _write(contexts: Contexts, path: Path, workers: int) -> None:
    partial = path.with_name(f".{path.name}.partial")
    columns = {"jpeg": Value("binary"), "matrix": Sequence(Value("float64")), "problem": Value("string")}
    with ArrowWriter(path=str(partial), features=Features(columns)) as writer, ThreadPoolExecutor(workers) as pool:
        rows = pool.map(lambda row: _encode(contexts, row), range(len(contexts)))
        for row in tqdm(rows, total=len(contexts), desc="caching people", unit=" people"):
            writer.write(row)
        writer.finalize()
    partial.replace(path)


def _encode(contexts: Contexts, row: int) -> dict[str, Any]:
    try:
        context = contexts.read(row)
    except PoseError as error:
        return {"jpeg": b"", "matrix": [0.0] * 6, "problem": str(error)}
    file = io.BytesIO()
    Image.fromarray(context.image).save(file, "JPEG", quality=QUALITY, subsampling=0)
    return {"jpeg": file.getvalue(), "matrix": context.matrix.flatten().tolist(), "problem": ""}


def _fingerprint(contexts: Contexts, annotations: Path) -> str:
    digest = hashlib.sha256(annotations.read_bytes())
    digest.update(json.dumps([len(contexts), contexts.most, QUALITY]).encode())
    digest.update(contexts.centers.tobytes() + contexts.sides.tobytes())
    return digest.hexdigest()[:16]
