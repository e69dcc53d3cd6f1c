"""The samples of a pose training: a person's context on the host, and what the device needs to cut a view of it.

A sample is the context, padded to a fixed size so that a batch is one tensor, and one matrix from its pixels to those
of the network's input: everything that augmentation does is in that matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cyclekd.integrations.runs.sampling import PADDING, Draw
from cyclekd.integrations.tokenpose.data.contexts import Context, Contexts, cached, read_photograph
from cyclekd.integrations.tokenpose.data.people import People
from cyclekd.integrations.tokenpose.data.views import (
    View,
    ViewSettings,
    numbers_of,
    plain_views,
    random_views,
    view_keypoints,
    view_matrices,
)
from cyclekd.integrations.tokenpose.data.warp import warp_batch, warp_exact
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.geometry import center_and_scale, compose_matrices, invert_matrices
from cyclekd.integrations.tokenpose.shapes import Size

GIVE_UP_AFTER = 100
"""Unreadable people in a row: then it is the disk or the whole data set, not single files."""

Sample = dict[str, Any]


class Crops(Dataset[Sample]):
    """People as the network sees them: `image` uint8 [S, S, 3], `matrix` [2, 3] from it to the input, and more.

    Namely `keypoints` [K, 2] in pixels of the input, `visible` [K], `center` and `scale` [2] of the view, `index`.
    With `exact` the crop is cut here from the whole photograph, as OpenCV and with it the published code would: `image`
    is [H, W, 3] and the matrix changes nothing. Otherwise it comes from a context, which smooths what it makes smaller.
    """

    def __init__(
        self,
        people: People,
        input_size: Size,
        *,
        reach: float,
        cache: Path | None = None,
        compress: bool = True,
        workers: int = 1,
        exact: bool = False,
    ) -> None:
        """`reach` is how much longer than the padded box's longer side a context is; `cache` the folder of a cache.

        Errors: PoseError for both `exact` and `cache`, which has no whole photographs, and those of `cached`.
        """
        if exact and cache is not None:
            raise PoseError(f"{type(self).__name__}(exact=True, cache={str(cache)!r}): leave one out")
        self.people, self.input_size, self.exact = people, input_size, exact
        self.centers, self.scales = center_and_scale(people.boxes, input_size)
        self.side = round(reach * max(input_size))  # at the resolution of the network's input, or less
        contexts = Contexts(people, self.centers.numpy(), self.scales.numpy(), reach, self.side)
        self.contexts = contexts if cache is None else cached(contexts, cache, max(1, workers), compress=compress)

    def __len__(self) -> int:
        return len(self.people)

    def problem(self, row: int) -> str:
        """What is wrong with a person that was skipped, for a log."""
        try:
            self.contexts.read(row)
        except PoseError as error:
            return str(error)
        return "readable now"

    def _read(self, row: int) -> Context:
        """What a person's view is cut from. Errors: PoseError where the photograph cannot be read."""
        if self.exact:
            return Context(read_photograph(self.people, int(self.people.image_index[row])), np.eye(2, 3))
        return self.contexts.read(row)

    def _samples(self, rows: list[int], contexts: list[Context], views: View) -> list[Sample]:
        """Of several people at once: one by one, their small matrices would take as long as their images."""
        matrices = view_matrices(views, self.input_size)
        keypoints, visible = view_keypoints(self.people.keypoints[rows], views, self.people.skeleton, matrices)
        from_photos = torch.from_numpy(np.stack([context.matrix for context in contexts]))
        matrices = compose_matrices(matrices.double(), invert_matrices(from_photos))
        images = [self._image(context.image, matrix) for context, matrix in zip(contexts, matrices, strict=True)]
        return [
            {
                "image": torch.from_numpy(image),
                "matrix": torch.eye(2, 3) if self.exact else matrices[i].float(),
                "keypoints": keypoints[i],
                "visible": visible[i],
                "center": views.center[i],
                "scale": views.scale[i],
                "index": rows[i],
            }
            for i, image in enumerate(images)
        ]

    def _image(self, image: np.ndarray, matrix: Tensor) -> np.ndarray:
        if self.exact:
            return warp_exact(image, matrix, self.input_size)
        padded = np.zeros((self.side, self.side, 3), np.uint8)
        padded[: image.shape[0], : image.shape[1]] = image
        return padded


def cut_views(batch: Mapping[str, Tensor], input_size: Size) -> Tensor:
    """Crops uint8 [B, 3, H, W] of a batch of samples, on its device."""
    return warp_batch(batch["image"].permute(0, 3, 1, 2), batch["matrix"], input_size)


class TrainingCrops(Crops):
    """Random views, of the draws of `runs.sampling`.

    A person whose photograph cannot be read is replaced by the next, with the same seed; `skipped` is then the one that
    was drawn, else -1. Errors: PoseError if nobody is readable.
    """

    def __init__(self, people: People, input_size: Size, settings: ViewSettings, **options: Any) -> None:
        super().__init__(people, input_size, reach=reach_of(settings, input_size), **options)
        self.settings = settings

    def __getitem__(self, draw: Draw) -> Sample:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[Sample]:
        """The samples of a batch, as PyTorch's loader asks for them."""
        rows, contexts = zip(*(self._readable(first) for first, _ in draws), strict=True)
        samples = self._samples(list(rows), list(contexts), self._views(list(rows), [seed for _, seed in draws]))
        skipped = [-1 if row == first else first for row, (first, _) in zip(rows, draws, strict=True)]
        return [{**sample, "skipped": row} for sample, row in zip(samples, skipped, strict=True)]

    def _readable(self, first: int) -> tuple[int, Context]:
        """This person's context, or the next's that can be read."""
        problem: PoseError | None = None
        for step in range(min(GIVE_UP_AFTER, len(self))):
            row = (first + step) % len(self)
            try:
                return row, self._read(row)
            except PoseError as error:
                problem = problem or error
        raise PoseError(f"nobody is readable among {min(GIVE_UP_AFTER, len(self))} people from {first} on: {problem}")

    def _views(self, rows: list[int], seeds: list[int]) -> View:
        people = self.centers[rows], self.scales[rows], self.people.keypoints[rows]
        return random_views(*people, self.people.skeleton, self.settings, numbers_of(seeds))


class EvaluationCrops(Crops):
    """The padded boxes themselves, and `valid`: whether this one counts.

    The index PADDING, and a photograph that cannot be read, give an empty image and valid=False.
    """

    def __init__(self, people: People, input_size: Size, **options: Any) -> None:
        super().__init__(people, input_size, reach=1.0, **options)

    def __getitem__(self, index: int) -> Sample:
        row = max(index, 0)
        views = plain_views(self.centers[[row]], self.scales[[row]])
        if index != PADDING:
            try:
                return {**self._samples([row], [self._read(row)], views)[0], "valid": True}
            except PoseError:
                pass  # told by valid=False beside an index
        keypoints, size = self.people.keypoints[row], self.input_size if self.exact else (self.side, self.side)
        return {
            "image": torch.zeros(*size, 3, dtype=torch.uint8),
            "matrix": torch.eye(2, 3),
            "keypoints": torch.zeros_like(keypoints[:, :2]),
            "visible": torch.zeros_like(keypoints[:, 2]),
            "center": views.center[0],
            "scale": views.scale[0],
            "index": index,
            "valid": False,
        }


def reach_of(settings: ViewSettings, input_size: Size) -> float:
    """How far views go beyond the padded box: zoomed out, turned and shifted at once, as a multiple of its height.

    One half of a body is mostly smaller; where it reaches further, what lies beyond is black.
    """
    height, width = max(input_size), min(input_size)
    turned, shifted = settings.rotation * settings.rotation_probability > 0, settings.shift_probability > 0
    diagonal = math.hypot(height, width) / height if turned else 1.0
    return (1 + settings.scale) * diagonal + (2 * settings.shift if shifted else 0.0)
