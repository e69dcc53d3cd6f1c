"""From a network's output to key points: from heat maps (DARK, quarter shift, argmax) or regressed coordinates.

Nothing branches on a value, so that all of it exports to ONNX and no GPU waits. A map without a positive value has no
key point: (-1, -1), with its largest value as the score.
"""

from __future__ import annotations

from math import exp
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.shapes import check_shape, full_precision

PIXELS_PER_SCALE = 200
"""A box's `scale` is its padded (width, height) in units of this many pixels, as in mmpose and the MPII data set."""

BLUR_RADIUS, BLUR_SIGMA = 5, 2.0
"""11 taps; OpenCV's default sigma for that many."""


class Keypoints(NamedTuple):
    """Coordinates [B, K, 2] as (x, y), and scores [B, K]."""

    coordinates: Tensor
    scores: Tensor


def decode_heatmaps(heatmaps: Tensor, method: str = "dark") -> Keypoints:
    """Key points of heat maps [B, K, h, w], in heat-map pixels; the score is the largest value of each map.

    `method` is "dark", "quarter" or "argmax", see the functions of those names. PoseError for another, or other shapes.
    """
    methods = {"dark": dark, "quarter": quarter_shift, "argmax": argmax}
    if method not in methods:
        raise PoseError(
            f"decode_heatmaps(method={method!r}): there are 'dark' (what the papers report), 'quarter' and 'argmax'"
        )
    return methods[method](heatmaps)


def argmax(heatmaps: Tensor) -> Keypoints:
    """The largest value's pixel; (-1, -1) where none is above 0."""
    hint = "one image's maps are heatmaps[None], and a regression head's output goes to decode_regression"
    check_shape("decode_heatmaps: heatmaps", heatmaps, "B", "K", "h", "w", hint=hint)
    scores, index = full_precision(heatmaps).flatten(2).max(-1)  # [B, K]
    width = heatmaps.shape[-1]
    pixels = torch.stack((index % width, index // width), -1).to(scores.dtype)
    return Keypoints(torch.where(scores[..., None] > 0, pixels, -1.0), scores)


def quarter_shift(heatmaps: Tensor) -> Keypoints:
    """The largest value's pixel, moved by 1/4 towards the larger neighbour on each axis (arXiv:1603.06937).

    Pixels on the border stay, and so do those one further in on the left and above, as in the published code.
    """
    peaks, heatmaps = argmax(heatmaps), full_precision(heatmaps)
    window = _window(heatmaps, peaks)
    right, down = window[..., 2, 3] - window[..., 2, 1], window[..., 3, 2] - window[..., 1, 2]
    shift = 0.25 * torch.stack((right, down), -1).sign()
    return Keypoints(peaks.coordinates + torch.where(_inside(heatmaps, peaks, 1), shift, 0.0), peaks.scores)


def dark(heatmaps: Tensor) -> Keypoints:
    """The largest value's pixel, moved by one Newton step on the log of the smoothed map.

    DARK, arXiv:1910.06278, section 3.1: the maximum of a Gaussian is one Newton step on its log away. The two outermost
    pixels on each side stay, and so does one in a flat map. The step is not limited, as in the published code: on a
    nearly flat map it can leave the map. Computed in float32 even under autocast.
    """
    peaks, heatmaps = argmax(heatmaps), full_precision(heatmaps)
    step = _newton(_window(smooth(heatmaps), peaks).clamp(min=1e-10).log())
    return Keypoints(peaks.coordinates + torch.where(_inside(heatmaps, peaks, 2), step, 0.0), peaks.scores)


def smooth(heatmaps: Tensor) -> Tensor:
    """Heat maps [B, K, h, w] after an 11 x 11 Gaussian blur, zero beyond the border, brought back to their maximum."""
    check_shape("smooth: heatmaps", heatmaps, "B", "K", "h", "w")
    heatmaps = full_precision(heatmaps)
    blurred = _blur(_blur(heatmaps, -1), -2)
    ratio = heatmaps.amax((-2, -1), keepdim=True) / blurred.amax((-2, -1), keepdim=True)
    # An all-zero map divides 0 by 0, and a lone positive pixel among negative ones would turn the map upside down.
    return blurred * torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)


def decode_regression(output: Tensor) -> Keypoints:
    """Key points of (x, y, raw sigma_x, raw sigma_y), [B, K, 4], as a share of the input's width and height.

    The score is the mean over both axes of 1 - sigmoid(raw sigma) (RLE, arXiv:2107.11291); the head is linear.
    """
    hint = "five columns, as DistilPose's head gives them, go to decode_token_regression, and maps to decode_heatmaps"
    check_shape("decode_regression: output", output, "B", "K", 4, hint=hint)
    output = full_precision(output)
    return Keypoints(output[..., :2], (1 - output[..., 2:].sigmoid()).mean(-1))


def decode_token_regression(output: Tensor) -> Keypoints:
    """Key points of DistilPose's (x, y, score, sigma_x, sigma_y), [B, K, 5], as a share of the input's size.

    x and y have passed the head's sigmoid; the score is as the head gives it, not limited to 0 to 1 (arXiv:2303.02455).
    """
    hint = "four columns, coordinates and raw sigmas, go to decode_regression, and maps to decode_heatmaps"
    check_shape("decode_token_regression: output", output, "B", "K", 5, hint=hint)
    output = full_precision(output)
    return Keypoints(output[..., :2], output[..., 2])


def to_image(coordinates: Tensor, center: Tensor, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """Coordinates [B, K, 2] of a box's grid, in image pixels: (0, 0) is its top left corner, `size` its bottom right.

    `size` is the grid's (height, width): the heat map's for decoded heat maps, (1, 1) for regressed coordinates. The
    box is `center` [B, 2] in image pixels and `scale` [B, 2], its width and height in units of 200 pixels. This is
    mmpose's convention, without rotation; models trained by TokenPose's own code need `to_image_aligned`.
    """
    _check_boxes("to_image", coordinates, center, scale)
    (height, width), box = size, PIXELS_PER_SCALE * full_precision(scale)
    x, y = full_precision(coordinates).unbind(-1)
    x = x * (box[:, :1] / width) + center[:, :1] - box[:, :1] / 2
    y = y * (box[:, 1:] / height) + center[:, 1:] - box[:, 1:] / 2
    return torch.stack((x, y), -1)


def to_image_aligned(coordinates: Tensor, center: Tensor, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """As `to_image`, in TokenPose's own convention: the outermost pixels' centres lie on the box's outermost pixels.

    Lengths are therefore one less than sizes. Both axes are stretched by the width's ratio, so that the box must have
    the grid's aspect, as `center` and `scale` of a padded box do. PoseError for a grid less than two pixels wide.
    """
    _check_boxes("to_image_aligned", coordinates, center, scale)
    if size[1] < 2:
        raise PoseError(
            f"to_image_aligned(size={tuple(size)}): the grid is a heat map's (height, width), such as (64, 48); "
            "regressed coordinates go to to_image with size=(1, 1)"
        )
    (height, width), box = size, PIXELS_PER_SCALE * full_precision(scale)
    ratio = (box[:, :1] - 1) / (width - 1)
    x, y = full_precision(coordinates).unbind(-1)
    x = (x - (width - 1) / 2) * ratio + center[:, :1]
    y = (y - (height - 1) / 2) * ratio + center[:, 1:]
    return torch.stack((x, y), -1)


def _window(maps: Tensor, peaks: Keypoints) -> Tensor:
    """The 5 x 5 pixels round the peaks, [B, K, 5, 5]; past the border some other pixel, which callers leave out."""
    height, width = maps.shape[-2:]
    x, y = peaks.coordinates.long().unbind(-1)
    step = torch.arange(-2, 3, device=maps.device)
    index = (y * width + x)[..., None] + (step[:, None] * width + step).flatten()  # [B, K, 25]
    return maps.flatten(2).gather(-1, index.clamp(0, height * width - 1)).unflatten(-1, (5, 5))


def _inside(maps: Tensor, peaks: Keypoints, margin: int) -> Tensor:
    """[B, K, 1]: 1 < x < width - margin, and y alike."""
    height, width = maps.shape[-2:]
    x, y = peaks.coordinates.unbind(-1)
    return ((x > 1) & (x < width - margin) & (y > 1) & (y < height - margin))[..., None]


def _newton(window: Tensor) -> Tensor:
    """-H⁻¹ g, [B, K, 2], from central differences in [B, K, 5, 5]; 0 where H has no inverse."""
    (
        (_, _, nn, _, _),
        (_, nw, n, ne, _),
        (ww, w, here, e, ee),
        (_, sw, s, se, _),
        (_, _, ss, _, _),
    ) = (row.unbind(-1) for row in window.unbind(-2))
    dx, dy = (e - w) / 2, (s - n) / 2
    dxx, dyy, dxy = (ee - 2 * here + ww) / 4, (ss - 2 * here + nn) / 4, (se - ne - sw + nw) / 4
    determinant = dxx * dyy - dxy.square()
    step = torch.stack((dxy * dy - dyy * dx, dxy * dx - dxx * dy), -1)
    invertible = (determinant != 0)[..., None]
    return torch.where(invertible, step / torch.where(invertible, determinant[..., None], 1.0), 0.0)


def _blur(maps: Tensor, axis: int) -> Tensor:
    # A sum of shifted maps, not conv2d, which a GPU computes in TF32 unless told otherwise, and autocast in half.
    taps = [exp(-(step**2) / (2 * BLUR_SIGMA**2)) for step in range(-BLUR_RADIUS, BLUR_RADIUS + 1)]
    size, margin = maps.shape[axis], (BLUR_RADIUS, BLUR_RADIUS)
    padded = F.pad(maps, margin if axis == -1 else (0, 0, *margin))
    blurred = torch.zeros_like(maps)
    for start, tap in enumerate(taps):
        blurred = blurred + tap / sum(taps) * padded.narrow(axis, start, size)
    return blurred


def _check_boxes(name: str, coordinates: Tensor, center: Tensor, scale: Tensor) -> None:
    check_shape(f"{name}: coordinates", coordinates, "B", "K", 2)
    for what, tensor in (("center", center), ("scale", scale)):
        check_shape(f"{name}: {what}", tensor, coordinates.shape[0], 2)
