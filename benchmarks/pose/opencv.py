"""The usual input of a pose training: OpenCV reads and warps whole photographs, NumPy draws the heat maps.

What is slow elsewhere for no reason is not slow here: colours and channels are put in order on the crop alone, while it
is small integers; one matrix does what is often a mirrored copy of the photograph and a warp; and all heat maps of a
person are products of a column and a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from cyclekd.integrations.runs.sampling import Draw
from cyclekd.integrations.tokenpose.data.people import People
from cyclekd.integrations.tokenpose.data.views import View, ViewSettings, numbers_of, random_views
from cyclekd.integrations.tokenpose.keypoints.decoding import PIXELS_PER_SCALE
from cyclekd.integrations.tokenpose.keypoints.geometry import center_and_scale
from cyclekd.integrations.tokenpose.shapes import Size

MEAN, STD = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])  # ImageNet's
SIGMA = 2.0
"""Heat-map pixels."""
STRIDE = 4
"""Input pixels per heat-map pixel."""


class OpenCvCrops(Dataset[dict[str, Any]]):
    """The usual way: `image` float32 [3, H, W], normalised, and with `targets` heat maps [K, h, w] and weights [K, 1].

    The views are those of TrainingCrops for the same draws; the rest is OpenCV and NumPy.
    """

    def __init__(self, people: People, input_size: Size, settings: ViewSettings, *, targets: bool) -> None:
        import cv2

        self.cv2, self.people, self.input_size, self.settings, self.targets = cv2, people, input_size, settings, targets
        self.centers, self.scales = center_and_scale(people.boxes, input_size)
        self.keypoints, self.image_index = people.keypoints.numpy(), people.image_index.tolist()
        self.exchanged = np.arange(len(people.skeleton.names))
        for left, right in people.skeleton.flip_pairs:
            self.exchanged[[left, right]] = right, left

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[dict[str, Any]]:
        """The samples of a batch, as PyTorch's loader asks for them."""
        rows = [row for row, _ in draws]
        people = self.centers[rows], self.scales[rows], self.people.keypoints[rows]
        views = random_views(*people, self.people.skeleton, self.settings, numbers_of([seed for _, seed in draws]))
        return [self.sample(row, View(*view)) for row, view in zip(rows, zip(*views, strict=True), strict=True)]

    def sample(self, row: int, view: View) -> dict[str, Any]:
        """Of one person; the fields of `view` have no leading axis."""
        matrix = matrix_of(view, self.input_size)
        sample = {"image": normalised(self.crop(row, matrix)), "index": row}
        if self.targets:
            keypoints = self.keypoints[row][self.exchanged] if view.flip else self.keypoints[row]
            points = keypoints[:, :2] @ matrix[:, :2].T + matrix[:, 2]
            sample |= zip(("target", "weight"), heatmaps(points, keypoints[:, 2], self.input_size), strict=True)
        return sample

    def crop(self, row: int, matrix: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3], in RGB."""
        cv2, (height, width) = self.cv2, self.input_size
        photo = cv2.imread(str(self.people.images[self.image_index[row]]))
        crop = cv2.warpAffine(photo, matrix, (width, height), flags=cv2.INTER_LINEAR)
        return cv2.cvtColor(crop, cv2.COLOR_BGR2RGB)


def matrix_of(view: View, input_size: Size) -> np.ndarray:
    """float64 [2, 3], as `view_matrices`, of one person's view."""
    (x, y), height, width = view.center.tolist(), *input_size
    ratio, angle = width / (PIXELS_PER_SCALE * float(view.scale[0])), np.deg2rad(float(view.rotation))
    cos, sin, sign = ratio * np.cos(angle), ratio * np.sin(angle), -1 if view.flip else 1
    return np.array(
        [
            [sign * cos, sin, width / 2 - sign * cos * x - sin * y],
            [-sign * sin, cos, height / 2 + sign * sin * x - cos * y],
        ]
    )


def normalised(crop: np.ndarray) -> np.ndarray:
    """float32 [3, H, W] of uint8 [H, W, 3]."""
    values = np.ascontiguousarray(crop.transpose(2, 0, 1)).astype(np.float32)  # first small, then large
    values -= MEAN[:, None, None]
    values *= 1 / STD[:, None, None]
    return values


def heatmaps(points: np.ndarray, visible: np.ndarray, input_size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Float32 [K, h, w] and weights [K, 1], as `heatmap_target`, of points [K, 2] in input pixels."""
    height, width = map_size(input_size)
    centers = (points / STRIDE).astype(np.float32)
    reach = (centers - 3 * SIGMA < (width, height)) & (centers + 3 * SIGMA + 1 >= 0)
    weights = ((visible > 0) & reach.all(1)).astype(np.float32)[:, None]
    columns, rows = gaussians(centers[:, 0], width), gaussians(centers[:, 1], height)
    return (weights * rows)[:, :, None] * columns[:, None, :], weights


def gaussians(centers: np.ndarray, length: int) -> np.ndarray:
    """[K, length] of centers [K]; a heat map is the product of two such."""
    distance = np.arange(length, dtype=np.float32) - centers[:, None]
    return np.exp(distance**2 / np.float32(-2 * SIGMA**2))


def map_size(input_size: Size) -> Size:
    return input_size[0] // STRIDE, input_size[1] // STRIDE
