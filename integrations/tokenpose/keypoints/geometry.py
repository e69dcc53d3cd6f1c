"""From a person's box in an image to a crop for the network, and back: centre and scale, and the matrix between them.

There are two conventions, and a model goes with the one that it was trained in. mmpose's maps the box's width to the
crop's width. TokenPose's own (`..._aligned`) maps the outermost pixels' centres onto each other: lengths are one less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.decoding import PIXELS_PER_SCALE
from cyclekd.integrations.tokenpose.shapes import Size, check_shape, full_precision

PADDING = 1.25
"""What mmpose and TokenPose multiply a box with, so that limbs at its border are seen whole."""


def clean_boxes(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Annotated boxes [N, 4] within their images, whose (height, width) are `image_sizes` [N, 2].

    As mmpose's data sets do: a corner beyond the left or upper border moves onto it and the size stays, then the right
    and lower sides end at the last pixel's index. A box of which nothing is left gets the width or height 0. Detected
    boxes are used as they are there. For a data set, once: it reads values. PoseError for NaN or infinite ones.
    """
    boxes = _finite("clean_boxes", boxes)
    check_shape("clean_boxes: image_sizes", image_sizes, boxes.shape[0], 2)
    corner = boxes[:, :2].clamp(min=0)
    last = image_sizes.to(boxes).flip(1) - 1  # [N, (x, y)]
    size = torch.minimum(last, corner + boxes[:, 2:]) - corner
    return torch.cat((corner, size.clamp(min=0)), 1)


def center_and_scale(boxes: Tensor, input_size: Size, padding: float = PADDING) -> tuple[Tensor, Tensor]:
    """Centres [N, 2] in pixels and scales [N, 2] in units of 200 px of boxes [N, 4], in mmpose's convention.

    A box grows in one direction to the aspect of `input_size`, then in both by `padding`. For a data set, once: it
    reads values. PoseError for boxes that are not finite or have no area.
    """
    boxes = _with_area("center_and_scale", boxes)
    return boxes[:, :2] + boxes[:, 2:] / 2, _padded(boxes, input_size, padding)


def center_and_scale_aligned(boxes: Tensor, input_size: Size, padding: float = PADDING) -> tuple[Tensor, Tensor]:
    """As `center_and_scale`, in TokenPose's own convention: the centre lies between the outermost pixels' centres."""
    boxes = _with_area("center_and_scale_aligned", boxes)
    return boxes[:, :2] + (boxes[:, 2:] - 1) / 2, _padded(boxes, input_size, padding)


def crop_matrices(center: Tensor, scale: Tensor, rotation_degrees: Tensor, input_size: Size) -> Tensor:
    """[N, 2, 3]: from pixels of the image to pixels of a crop of `input_size`, in mmpose's convention.

    `center` and `scale` [N, 2] as from `center_and_scale`; `rotation_degrees` [N] turn the picture anticlockwise round
    the centre. One ratio stretches both axes, the width's, so that the box must have the crop's aspect.
    """
    _check_views("crop_matrices", center, scale, rotation_degrees)
    height, width = input_size
    ratio = width / (PIXELS_PER_SCALE * full_precision(scale)[:, 0])
    return _similarities(full_precision(center), ratio, rotation_degrees, (width / 2, height / 2))


def crop_matrices_aligned(center: Tensor, scale: Tensor, rotation_degrees: Tensor, input_size: Size) -> Tensor:
    """As `crop_matrices`, in TokenPose's own convention; with `center_and_scale_aligned`."""
    _check_views("crop_matrices_aligned", center, scale, rotation_degrees)
    height, width = input_size
    ratio = (width - 1) / (PIXELS_PER_SCALE * full_precision(scale)[:, 0] - 1)
    return _similarities(full_precision(center), ratio, rotation_degrees, ((width - 1) / 2, (height - 1) / 2))


def invert_matrices(matrices: Tensor) -> Tensor:
    """The matrices [N, 2, 3] that lead back; not finite where a matrix has no inverse."""
    check_shape("invert_matrices: matrices", matrices, "N", 2, 3)
    (a, b, x), (c, d, y) = (row.unbind(-1) for row in full_precision(matrices).unbind(-2))
    # in OpenCV's order of operations, so that `warp_exact` reads the image where OpenCV does
    factor = 1 / (a * d - b * c)
    a, b, c, d = d * factor, b * -factor, c * -factor, a * factor
    return torch.stack((a, b, -a * x - b * y, c, d, -c * x - d * y), -1).unflatten(-1, (2, 3))


def compose_matrices(then: Tensor, first: Tensor) -> Tensor:
    """The matrices [N, 2, 3] that do `first` [N, 2, 3] and `then` [N, 2, 3]."""
    check_shape("compose_matrices: then", then, "N", 2, 3)
    check_shape("compose_matrices: first", first, then.shape[0], 2, 3)
    then, first = full_precision(then), full_precision(first)
    # sums of products, not matmul, which a GPU may compute in TF32
    columns = then[:, :, :1] * first[:, :1] + then[:, :, 1:2] * first[:, 1:]
    return torch.cat((columns[:, :, :2], columns[:, :, 2:] + then[:, :, 2:]), 2)


def transform_points(matrices: Tensor, points: Tensor) -> Tensor:
    """Points [N, K, 2] as (x, y) after matrices [N, 2, 3]."""
    check_shape("transform_points: matrices", matrices, "N", 2, 3)
    check_shape("transform_points: points", points, matrices.shape[0], "K", 2)
    matrices, points = full_precision(matrices), full_precision(points)
    columns = matrices[:, None]  # [N, 1, 2, 3]
    return columns[..., 0] * points[..., :1] + columns[..., 1] * points[..., 1:] + columns[..., 2]


def _padded(boxes: Tensor, input_size: Size, padding: float) -> Tensor:
    aspect = input_size[1] / input_size[0]
    width, height = boxes[:, 2], boxes[:, 3]
    size = torch.stack((torch.maximum(width, height * aspect), torch.maximum(height, width / aspect)), 1)
    return size / PIXELS_PER_SCALE * padding


def _similarities(center: Tensor, ratio: Tensor, rotation_degrees: Tensor, target: tuple[float, float]) -> Tensor:
    """[N, 2, 3]: the centre goes to `target`, lengths times `ratio`, turned anticlockwise where y points down."""
    angle = torch.deg2rad(rotation_degrees.to(center))
    cos, sin, (x, y) = ratio * angle.cos(), ratio * angle.sin(), center.unbind(-1)
    right, down = target[0] - cos * x - sin * y, target[1] + sin * x - cos * y
    return torch.stack((cos, sin, right, -sin, cos, down), -1).unflatten(-1, (2, 3))


def _finite(name: str, boxes: Tensor) -> Tensor:
    check_shape(f"{name}: boxes", boxes, "N", 4)
    boxes = full_precision(boxes)
    fits = boxes.isfinite().all(1)
    if not fits.all():
        _refuse(name, boxes, fits, "is not finite", "boxes[boxes.isfinite().all(1)]")
    return boxes


def _with_area(name: str, boxes: Tensor) -> Tensor:
    boxes = _finite(name, boxes)
    fits = (boxes[:, 2:] > 0).all(1)
    if not fits.all():
        _refuse(name, boxes, fits, "has no area", "boxes[(boxes[:, 2:] > 0).all(1)]")
    return boxes


def _refuse(name: str, boxes: Tensor, fits: Tensor, what: str, rest: str) -> None:
    rows = (~fits).nonzero().flatten().tolist()
    raise PoseError(
        f"{name}: boxes are (x, y, width, height) in pixels, and {len(rows)} of {len(boxes)} cannot be used: row "
        f"{rows[0]}, {boxes[rows[0]].tolist()}, {what}; leave such people out: {rest}"
    )


def _check_views(name: str, center: Tensor, scale: Tensor, rotation_degrees: Tensor) -> None:
    check_shape(f"{name}: center", center, "N", 2)
    check_shape(f"{name}: scale", scale, center.shape[0], 2)
    check_shape(f"{name}: rotation_degrees", rotation_degrees, center.shape[0])
