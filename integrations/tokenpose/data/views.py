"""A view of a person: which part of the image the network sees, how far turned, and whether mirrored.

The random views are the augmentation of the published trainings. A view's centre is in the annotated image, and
mirroring is in the matrix, so that one matrix leads from the image to the crop and nothing is ever flipped by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.decoding import PIXELS_PER_SCALE
from cyclekd.integrations.tokenpose.keypoints.flips import exchange_sides
from cyclekd.integrations.tokenpose.keypoints.geometry import crop_matrices, crop_matrices_aligned, transform_points
from cyclekd.integrations.tokenpose.shapes import Size, check_shape, full_precision
from cyclekd.integrations.tokenpose.skeletons import Skeleton

HALF_BODY_PADDING = 1.5
UPPER_BODY_BELOW = 0.5
"""The upper half is taken where a standard normal draw is below this, in 69 % of cases, as in the published code."""


@dataclass(frozen=True)
class ViewSettings:
    """How views are drawn; the defaults are the paper's on COCO. PoseError for values that no view can have."""

    shift: float = 0.16
    """Largest shift of the centre, as a share of the padded box."""
    shift_probability: float = 0.3
    flip: float = 0.5
    """Probability of mirroring."""
    half_body: float = 0.3
    """Probability of showing the upper or lower half of a person alone..."""
    half_body_keypoints: int = 8
    """... who has more labelled key points than this."""
    scale: float = 0.35
    """Standard deviation of the zoom, which stays within 1 - scale and 1 + scale."""
    rotation: float = 45.0
    """Standard deviation in degrees; twice that is the limit."""
    rotation_probability: float = 0.6

    def __post_init__(self) -> None:
        for name in ("shift_probability", "flip", "half_body", "rotation_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise PoseError(f"ViewSettings({name}={getattr(self, name)}): a probability is from 0 to 1")
        if not (self.shift >= 0 and self.rotation >= 0 and 0 <= self.scale < 1):
            raise PoseError(
                f"ViewSettings(shift={self.shift}, scale={self.scale}, rotation={self.rotation}): these are spreads "
                "round 0, 1 and 0; none is negative and scale is below 1, as in shift=0.16, scale=0.35, rotation=45"
            )

    @classmethod
    def crowdpose(cls) -> ViewSettings:
        """mmpose's for CrowdPose, which has 14 key points: the paper does not tell its own."""
        return cls(half_body_keypoints=6, scale=0.5, rotation=40.0)


class View(NamedTuple):
    """One person's view, or a batch of N with a leading axis, as `stack_views` and PyTorch's collation make it."""

    center: Tensor
    """[2], in pixels of the image, which is not mirrored."""
    scale: Tensor
    """[2], width and height in units of 200 px."""
    rotation: Tensor
    """[], degrees by which the crop's picture is turned anticlockwise, after mirroring."""
    flip: Tensor
    """[], bool: whether the crop is mirrored."""


def sample_view(
    center: Tensor,
    scale: Tensor,
    keypoints: Tensor,
    skeleton: Skeleton,
    settings: ViewSettings,
    generator: torch.Generator,
) -> View:
    """A random view of the person whose padded box has this `center` [2] and `scale` [2].

    In mmpose's order: shift of the centre; mirroring; half body, whose box round the `keypoints` [K, 3] (x, y,
    visibility) of one half replaces the shifted one; zoom; rotation. Nine numbers are drawn whatever happens, six
    uniform (is it shifted, how far right and down, is it mirrored, halved, turned) and three normal (which half, zoom,
    angle): the same state of the generator gives the same view, and a step that is turned off leaves the others as
    they were. PoseError for other shapes.
    """
    check_shape("sample_view: center", center, 2)
    check_shape("sample_view: scale", scale, 2)
    check_shape("sample_view: keypoints", keypoints, len(skeleton.names), 3)
    shifted, right, down, mirrored, halved, turned = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
    half, zoom, angle = torch.randn(3, generator=generator, dtype=torch.float64).tolist()
    (x, y), (width, height) = center.tolist(), scale.tolist()
    if shifted < settings.shift_probability:
        x += (2 * right - 1) * settings.shift * width * PIXELS_PER_SCALE
        y += (2 * down - 1) * settings.shift * height * PIXELS_PER_SCALE
    if halved < settings.half_body:
        box = _half_body(keypoints, skeleton, settings.half_body_keypoints, half < UPPER_BODY_BELOW, width / height)
        (x, y), (width, height) = box or ((x, y), (width, height))
    factor = 1 + settings.scale * min(max(zoom, -1.0), 1.0)
    degrees = settings.rotation * min(max(angle, -2.0), 2.0) if turned < settings.rotation_probability else 0.0
    return _view((x, y), (width * factor, height * factor), degrees, mirrored < settings.flip, center)


def plain_view(center: Tensor, scale: Tensor) -> View:
    """The padded box itself, `center` [2] and `scale` [2], for evaluation."""
    check_shape("plain_view: center", center, 2)
    check_shape("plain_view: scale", scale, 2)
    return _view(center.tolist(), scale.tolist(), 0.0, False, center)


def stack_views(views: Sequence[View]) -> View:
    """Several people's views as one batch."""
    return View(*(torch.stack(field) for field in zip(*views, strict=True)))


def view_matrices(view: View, input_size: Size, *, aligned: bool = False) -> Tensor:
    """[N, 2, 3]: from pixels of the image to pixels of the crops of a batch of views, with mirroring.

    In mmpose's convention, or `aligned` for TokenPose's own: see `geometry`.
    """
    check_shape("view_matrices: view.flip", view.flip, "N", hint="one person's view is stack_views([view])")
    make = crop_matrices_aligned if aligned else crop_matrices
    matrices = make(view.center, view.scale, view.rotation, input_size)
    # Mirroring before the rest turns the first column's sign round; the centre must still go where it went.
    first, x = matrices[:, :, 0], view.center.to(matrices)[:, :1]
    mirrored = torch.stack((-first, matrices[:, :, 1], matrices[:, :, 2] + 2 * x * first), 2)
    return torch.where(view.flip[:, None, None], mirrored, matrices)


def view_keypoints(keypoints: Tensor, view: View, skeleton: Skeleton, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Points [N, K, 2] in pixels of the crops, and visibility [N, K], of `keypoints` [N, K, 3] in pixels of the image.

    Left and right are exchanged where the view is mirrored. `matrices` [N, 2, 3] are those of `view_matrices`. Key
    points that are not labelled are moved like any other: their visibility tells. PoseError for other shapes.
    """
    check_shape("view_keypoints: view.flip", view.flip, "N", hint="one person's view is stack_views([view])")
    people = view.flip.shape[0]
    check_shape("view_keypoints: keypoints", keypoints, people, len(skeleton.names), 3)
    exchanged = exchange_sides(keypoints, skeleton.flip_pairs)
    keypoints = torch.where(view.flip[:, None, None], exchanged, keypoints)
    return transform_points(matrices, keypoints[..., :2]), keypoints[..., 2]


Pair = tuple[float, float]


def _half_body(
    keypoints: Tensor, skeleton: Skeleton, more_than: int, prefer_upper: bool, aspect: float
) -> tuple[Pair, Pair] | None:
    """Centre and scale of one half of the body; None where too few key points are labelled, or all at one spot."""
    labelled = [(i, x, y) for i, (x, y, visible) in enumerate(keypoints.tolist()) if visible > 0]
    upper = [(x, y) for i, x, y in labelled if i in skeleton.upper_body]
    lower = [(x, y) for i, x, y in labelled if i not in skeleton.upper_body]
    chosen = lower if len(lower) > 2 and not (prefer_upper and len(upper) > 2) else upper
    if len(labelled) <= more_than or len(chosen) < 2:
        return None
    xs, ys = zip(*chosen, strict=True)
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    if width == height == 0:
        return None
    width, height = max(width, height * aspect), max(height, width / aspect)
    unit = HALF_BODY_PADDING / PIXELS_PER_SCALE
    return (sum(xs) / len(xs), sum(ys) / len(ys)), (width * unit, height * unit)


def _view(center: Sequence[float], scale: Sequence[float], degrees: float, flip: bool, like: Tensor) -> View:
    dtype = full_precision(like).dtype
    numbers = (torch.tensor(each, dtype=dtype) for each in (center, scale, degrees))
    return View(*numbers, torch.tensor(flip))
