"""The samples of a pose training: a person's context on the host, and what the device needs to cut a view of it.

A sample is the context, padded to a fixed size so that a batch is one tensor, and one matrix from its pixels to those
of the network's input: everything that augmentation does is in that matrix.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cyclekd.integrations.runs.sampling import PADDING, Draw
from cyclekd.integrations.tokenpose.data.contexts import Context, Contexts, cached
from cyclekd.integrations.tokenpose.data.people import People
from cyclekd.integrations.tokenpose.data.views import (
    View,
    ViewSettings,
    plain_view,
    sample_view,
    stack_views,
    view_keypoints,
    view_matrices,
)
from cyclekd.integrations.tokenpose.data.warp import warp_exact
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.geometry import center_and_scale, compose_matrices, invert_matrices
from cyclekd.integrations.tokenpose.shapes import Size

GIVE_UP_AFTER = 100
"""Unreadable people in a row: then it is the disk or the whole data set, not single files."""

Sample = dict[str, Any]


class Crops(Dataset[Sample]):
    """People as the network sees them: `image` uint8 [3, S, S], `matrix` [2, 3] from it to the input, and more.

    Namely `keypoints` [K, 2] in pixels of the input, `visible` [K], `center` and `scale` [2] of the view, `index`.
    With `exact` the crop is cut here, as OpenCV would, and `image` is [3, H, W] with a matrix that changes nothing.
    """

    def __init__(
        self,
        people: People,
        input_size: Size,
        *,
        reach: float,
        cache: Path | None = None,
        workers: int = 1,
        exact: bool = False,
    ) -> None:
        """`reach` is how much longer than the padded box's longer side a context is; `cache` the folder of a cache."""
        self.people, self.input_size, self.exact = people, input_size, exact
        self.centers, self.scales = center_and_scale(people.boxes, input_size)
        self.side = round(reach * max(input_size))  # at the resolution of the network's input, or less
        contexts = Contexts(people, self.centers.numpy(), self.scales.numpy(), reach, self.side)
        self.contexts = contexts if cache is None else cached(contexts, cache, people.annotations, max(1, workers))

    def __len__(self) -> int:
        return len(self.people)

    def problem(self, row: int) -> str:
        """What is wrong with a person that was skipped, for a log."""
        try:
            self.contexts.read(row)
        except PoseError as error:
            return str(error)
        return "readable now"

    def _sample(self, row: int, view: View) -> Sample:
        views = stack_views([view])
        matrices = view_matrices(views, self.input_size)
        keypoints, visible = view_keypoints(self.people.keypoints[row][None], views, self.people.skeleton, matrices)
        image, matrix = self._image(self.contexts.read(row), matrices)
        return {
            "image": image,
            "matrix": matrix,
            "keypoints": keypoints[0],
            "visible": visible[0],
            "center": view.center,
            "scale": view.scale,
            "index": row,
        }

    def _image(self, context: Context, matrices: Tensor) -> tuple[Tensor, Tensor]:
        from_photo = torch.from_numpy(context.matrix)[None]
        matrix = compose_matrices(matrices.double(), invert_matrices(from_photo))[0]
        if self.exact:
            crop = warp_exact(context.image, matrix, self.input_size)
            return torch.from_numpy(crop).permute(2, 0, 1).contiguous(), torch.eye(2, 3)
        padded = np.zeros((self.side, self.side, 3), np.uint8)
        height, width = context.image.shape[:2]
        padded[:height, :width] = context.image
        return torch.from_numpy(padded).permute(2, 0, 1), matrix.float()


class TrainingCrops(Crops):
    """Random views, of the draws of `runs.sampling`.

    A person whose photograph cannot be read is replaced by the next, with the same seed; `skipped` is then the one that
    was drawn, else -1. Errors: PoseError if nobody is readable.
    """

    def __init__(self, people: People, input_size: Size, settings: ViewSettings, **options: Any) -> None:
        super().__init__(people, input_size, reach=reach_of(settings, input_size), **options)
        self.settings = settings

    def __getitem__(self, draw: Draw) -> Sample:
        first, seed = draw
        problem: PoseError | None = None
        for step in range(min(GIVE_UP_AFTER, len(self))):
            row = (first + step) % len(self)
            try:
                return {**self._sample(row, self._view(row, seed)), "skipped": first if step else -1}
            except PoseError as error:
                problem = problem or error
        raise PoseError(f"nobody is readable among {min(GIVE_UP_AFTER, len(self))} people from {first} on: {problem}")

    def _view(self, row: int, seed: int) -> View:
        person = self.centers[row], self.scales[row], self.people.keypoints[row]
        return sample_view(*person, self.people.skeleton, self.settings, torch.Generator().manual_seed(seed))


class EvaluationCrops(Crops):
    """The padded boxes themselves, and `valid`: whether this one counts.

    The index PADDING, and a photograph that cannot be read, give an empty image and valid=False.
    """

    def __init__(self, people: People, input_size: Size, **options: Any) -> None:
        super().__init__(people, input_size, reach=1.0, **options)

    def __getitem__(self, index: int) -> Sample:
        row = max(index, 0)
        view = plain_view(self.centers[row], self.scales[row])
        if index != PADDING:
            try:
                return {**self._sample(row, view), "valid": True}
            except PoseError:
                pass  # told by valid=False beside an index
        blank = Context(np.zeros((1, 1, 3), np.uint8), np.eye(2, 3))
        image, matrix = self._image(blank, torch.eye(2, 3)[None])
        keypoints = self.people.keypoints[row]
        return {
            "image": image,
            "matrix": matrix,
            "keypoints": torch.zeros_like(keypoints[:, :2]),
            "visible": torch.zeros_like(keypoints[:, 2]),
            "center": view.center,
            "scale": view.scale,
            "index": index,
            "valid": False,
        }


def reach_of(settings: ViewSettings, input_size: Size) -> float:
    """How far views go beyond the padded box: zoomed out, turned and shifted at once, as a multiple of its height.

    One half of a body is mostly smaller; where it reaches further, what lies beyond is black.
    """
    height, width = max(input_size), min(input_size)
    diagonal = math.hypot(height, width) / height if settings.rotation > 0 else 1.0
    return (1 + settings.scale) * diagonal + 2 * settings.shift
