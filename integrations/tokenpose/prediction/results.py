"""COCO's result file: a row for each person, written as they are found, so that their number takes no memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cyclekd.integrations.runs.folder import to_plain
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.prediction.detection import PERSON
from cyclekd.integrations.tokenpose.prediction.predictor import Poses


class ResultFile:
    """A JSON list at `path`, with a line for each row; `with ResultFile(path) as file: file.write(rows)`.

    The file appears, in place of an older one, at the end of the `with` block; after an exception in it, not at all.
    `count` is the number of rows. Errors: PoseError where it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.count = Path(path), 0
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> ResultFile:
        try:
            self._file = self._partial.open("w", encoding="utf-8")
        except OSError as error:
            raise self._cannot(error) from error
        return self

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows, as `coco_results` gives them."""
        try:
            for row in rows:
                text = json.dumps(to_plain(row), ensure_ascii=False, allow_nan=False)
                self._file.write((",\n" if self.count else "[\n") + text)
                self.count += 1
        except OSError as error:
            raise self._cannot(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with self._file:
                self._file.write("\n]\n" if self.count else "[]\n")
            if kind is None:
                os.replace(self._partial, self.path)
        except OSError as failure:
            if kind is None:  # else what went wrong first is on its way
                raise self._cannot(failure) from failure
        finally:
            self._partial.unlink(missing_ok=True)

    def _cannot(self, error: OSError) -> PoseError:
        return PoseError(f"cannot write {self.path}: {error.strerror or error}")


def coco_results(poses: Poses, image_id: int, file_name: str) -> list[dict[str, Any]]:
    """Rows of a COCO result file, one for each person; `keypoints` is x, y and score of each key point in turn."""
    rows = []
    for keypoints, scores, box, score in zip(*poses, strict=True):
        triples = np.concatenate((keypoints, scores[:, None]), 1)
        rows.append(
            {
                "image_id": image_id,
                "file_name": file_name,
                "category_id": PERSON,
                "keypoints": [round(float(value), 4) for value in triples.flatten()],
                "score": round(float(score), 6),
                "bbox": [round(float(value), 3) for value in box],
            }
        )
    return rows
