"""Key points as what a network learns: Gaussian heat maps or normalised coordinates, each with weights.

A key point of input pixel x stands at x * (map width / input width) of the map: pixels are counted from 0 with no half
pixel in between, as in the published training runs. All sizes are (height, width), all points (x, y).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.shapes import Size, check_shape, full_precision


class Target(NamedTuple):
    """What a loss compares with: heat maps [B, K, h, w], weights [B, K, 1]; or coordinates and weights, [B, K, 2]."""

    values: Tensor
    weights: Tensor


def heatmap_target(
    keypoints: Tensor,
    visible: Tensor,
    *,
    input_size: Size,
    heatmap_size: Size,
    sigma: float | None = None,
    unbiased: bool = True,
) -> Target:
    """One Gaussian of `sigma` heat-map pixels per key point: values [B, K, h, w], weights [B, K, 1] of 0 or 1.

    `keypoints` [B, K, 2] in input pixels, `visible` [B, K], above 0 where labelled; `sigma` is else `usual_sigma`.
    Unbiased keeps the sub-pixel centre and fills the whole map (DARK, arXiv:1910.06278, section 3.2), so that its peak
    is 1 only on a pixel; biased rounds the centre and stops at 3 sigma. Weight and map are 0 where the key point is not
    labelled or where nothing of those 3 sigma lies in the map, as with a NaN coordinate. PoseError for other shapes, an
    input size that is no multiple of the map's, or a sigma not above 0.
    """
    check_shape("heatmap_target: keypoints", keypoints, "B", "K", 2)
    check_shape("heatmap_target: visible", visible, *keypoints.shape[:2])
    _check_sizes(input_size, heatmap_size)
    sigma = usual_sigma(heatmap_size) if sigma is None else sigma
    _check_sigma(sigma)
    (height, width), points = heatmap_size, full_precision(keypoints)
    x = points[..., 0] * (width / input_size[1])
    y = points[..., 1] * (height / input_size[0])
    if not unbiased:
        # truncation rounds negative centres up, to the map: the published targets do, and weigh the key point as inside
        x, y = (x + 0.5).trunc(), (y + 0.5).trunc()
    counts = (visible > 0) & _reaches(x, width, sigma) & _reaches(y, height, sigma)
    x, y = (torch.where(counts, centre, 0.0) for centre in (x, y))  # 0 times a NaN would not be 0
    weights, window = counts.to(points.dtype), None if unbiased else 3 * sigma
    columns, rows = _gaussian(x, width, sigma, window), _gaussian(y, height, sigma, window)
    # [B, K, h, 1] * [B, K, 1, w]
    return Target((weights[..., None] * rows)[..., None] * columns[..., None, :], weights[..., None])


def usual_sigma(heatmap_size: Size) -> float:
    """2 pixels of a map of 64x48 and 3 of one of 96x72, as published; else in proportion to the height, at least 1.

    In proportion the loss is as large on every map, so that a fixed weight of the token terms means the same; a smaller
    Gaussian than 1 would fall between the pixels.
    """
    return max(1.0, heatmap_size[0] / 32)


def coordinate_target(keypoints: Tensor, visible: Tensor, *, input_size: Size) -> Target:
    """Coordinates [B, K, 2] as a share of the input's width and height, and their weights [B, K, 2] of 0 or 1.

    `keypoints` [B, K, 2] in input pixels, `visible` [B, K], above 0 where labelled. The weight is 0 where the key point
    is not labelled or beyond the outermost pixel's centre; its coordinates are then outside 0 to 1 or just below 1, and
    0 where they are NaN or absurd, so that weighing them by 0 works. PoseError for other shapes or sizes.
    """
    check_shape("coordinate_target: keypoints", keypoints, "B", "K", 2)
    check_shape("coordinate_target: visible", visible, *keypoints.shape[:2])
    _check_input_size(input_size)
    (height, width), points = input_size, full_precision(keypoints)
    x, y = points.unbind(-1)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    weights = ((visible > 0) & inside).to(points.dtype)
    shares = torch.stack((x / width, y / height), -1)
    shares = torch.where(shares.abs() < 1e6, shares, 0.0)  # 0 times a NaN, or times a square that overflows, is NaN
    return Target(shares, torch.stack((weights, weights), -1))


def _reaches(centre: Tensor, size: int, sigma: float) -> Tensor:
    # not symmetric: the published window ends one pixel past 3 sigma on the right and below
    return (centre - 3 * sigma < size) & (centre + 3 * sigma + 1 >= 0)


def _gaussian(centre: Tensor, size: int, sigma: float, window: float | None) -> Tensor:
    """[B, K] centres to [B, K, size] values of one axis; exp(-(x² + y²)) is the product of two such."""
    distance = torch.arange(size, device=centre.device, dtype=centre.dtype) - centre[..., None]
    values = torch.exp(distance.square() / (-2 * sigma**2))
    return values if window is None else torch.where(distance.abs() <= window, values, 0.0)


def _check_sizes(input_size: Size, heatmap_size: Size) -> None:
    sizes = _is_size(input_size) and _is_size(heatmap_size)
    if not sizes or any(whole % part for whole, part in zip(input_size, heatmap_size, strict=True)):
        raise PoseError(
            f"heatmap_target(input_size={input_size}, heatmap_size={heatmap_size}): the input is a whole multiple of "
            "the map, and both are (height, width), as in (256, 192) and (64, 48)"
        )


def _check_input_size(input_size: Size) -> None:
    if not _is_size(input_size):
        raise PoseError(f"coordinate_target(input_size={input_size}): it is (height, width), as in (256, 192)")


def _check_sigma(sigma: float) -> None:
    if not 0 < sigma < math.inf:
        raise PoseError(f"heatmap_target(sigma={sigma}): it is a length in heat-map pixels above 0, as in sigma=2.0")


def _is_size(size: Any) -> bool:
    return isinstance(size, Sequence) and len(size) == 2 and min(size) >= 1
