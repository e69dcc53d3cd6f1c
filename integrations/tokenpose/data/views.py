"""Views of people: which part of the image the network sees, how far turned, and whether mirrored.

The random views are the augmentation of the published trainings. A view's centre is in the annotated image, and
mirroring is in the matrix, so that one matrix leads from the image to the crop and nothing is ever flipped by itself.
All people of a batch are drawn at once, which on a CPU takes a third of the time of one by one, or less.
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
    """The views of N people."""

    center: Tensor
    """[N, 2], in pixels of the image, which is not mirrored."""
    scale: Tensor
    """[N, 2], width and height in units of 200 px."""
    rotation: Tensor
    """[N], degrees by which the crop's picture is turned anticlockwise, after mirroring."""
    flip: Tensor
    """[N], bool: whether the crop is mirrored."""


class Numbers(NamedTuple):
    """The random numbers of N people's views."""

    uniform: Tensor
    """[N, 6], from 0 to 1: is it shifted, how far right and down, is it mirrored, halved, turned."""
    normal: Tensor
    """[N, 3]: which half, zoom, angle."""


def numbers_of(seeds: Sequence[int]) -> Numbers:
    """A person's for each seed, in float64, whoever else is in the batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniform = [torch.rand(6, generator=each, dtype=torch.float64) for each in generators]
    normal = [torch.randn(3, generator=each, dtype=torch.float64) for each in generators]
    return Numbers(torch.stack(uniform), torch.stack(normal))


def random_views(
    center: Tensor, scale: Tensor, keypoints: Tensor, skeleton: Skeleton, settings: ViewSettings, numbers: Numbers
) -> View:
    """A random view of each of N people, whose padded boxes have this `center` [N, 2] and `scale` [N, 2].

    In mmpose's order: shift of the centre; mirroring; half body, whose box round the `keypoints` [N, K, 3] (x, y,
    visibility) of one half replaces the shifted one; zoom; rotation. Each of a person's nine numbers has its purpose
    whatever the others are: the same give the same view, and a step that is turned off leaves the others as they were.
    Computed with the precision of `numbers` and on its device, without waiting for it. PoseError for other shapes.
    """
    people, dtype = len(numbers.uniform), full_precision(center).dtype
    check_shape("random_views: center", center, people, 2)
    check_shape("random_views: scale", scale, people, 2)
    check_shape("random_views: keypoints", keypoints, people, len(skeleton.names), 3)
    center, scale, keypoints = (each.to(numbers.uniform) for each in (center, scale, keypoints))
    shifted, right, down, mirrored, halved, turned = numbers.uniform.unbind(-1)
    half, zoom, angle = numbers.normal.unbind(-1)
    move = (2 * torch.stack((right, down), -1) - 1) * settings.shift * scale * PIXELS_PER_SCALE
    center = torch.where((shifted < settings.shift_probability)[:, None], center + move, center)
    aspect = scale[:, 0] / scale[:, 1]
    bodies = _half_bodies(keypoints, skeleton, settings.half_body_keypoints, half < UPPER_BODY_BELOW, aspect)
    cut = (bodies.there & (halved < settings.half_body))[:, None]
    center, scale = torch.where(cut, bodies.center, center), torch.where(cut, bodies.scale, scale)
    factor = 1 + settings.scale * zoom.clamp(-1, 1)
    degrees = settings.rotation * angle.clamp(-2, 2)
    degrees = torch.where(turned < settings.rotation_probability, degrees, 0.0)
    fields = (each.to(dtype) for each in (center, scale * factor[:, None], degrees))
    return View(*fields, mirrored < settings.flip)


def plain_views(center: Tensor, scale: Tensor) -> View:
    """The padded boxes themselves, `center` [N, 2] and `scale` [N, 2], for evaluation."""
    check_shape("plain_views: center", center, "N", 2)
    check_shape("plain_views: scale", scale, len(center), 2)
    center, scale = full_precision(center), full_precision(scale)
    upright = torch.zeros_like(center[:, 0])
    return View(center, scale, upright, upright.bool())


def view_matrices(view: View, input_size: Size, *, aligned: bool = False) -> Tensor:
    """[N, 2, 3]: from pixels of the image to pixels of the crops of a batch of views, with mirroring.

    In mmpose's convention, or `aligned` for TokenPose's own: see `geometry`.
    """
    check_shape("view_matrices: view.flip", view.flip, "N")
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
    check_shape("view_keypoints: view.flip", view.flip, "N")
    people = view.flip.shape[0]
    check_shape("view_keypoints: keypoints", keypoints, people, len(skeleton.names), 3)
    exchanged = exchange_sides(keypoints, skeleton.flip_pairs)
    keypoints = torch.where(view.flip[:, None, None], exchanged, keypoints)
    return transform_points(matrices, keypoints[..., :2]), keypoints[..., 2]


class _HalfBodies(NamedTuple):
    """Boxes round one half of each body: centre and scale [N, 2], which mean nothing where `there` [N] is not."""

    center: Tensor
    scale: Tensor
    there: Tensor


def _half_bodies(
    keypoints: Tensor, skeleton: Skeleton, more_than: int, prefer_upper: Tensor, aspect: Tensor
) -> _HalfBodies:
    """None is there where too few key points are labelled, or all at one spot."""
    points, labelled = keypoints[..., :2], keypoints[..., 2] > 0
    never = torch.zeros_like(labelled[:, 0])
    by_keypoint = enumerate(labelled.unbind(1))  # a mask made on the host would make it wait for a GPU
    upper = torch.stack([each if i in skeleton.upper_body else never for i, each in by_keypoint], 1)
    lower = labelled & ~upper  # [N, K]
    take_lower = (lower.sum(-1) > 2) & ~(prefer_upper & (upper.sum(-1) > 2))
    chosen = torch.where(take_lower[:, None], lower, upper)[..., None]  # [N, K, 1]
    size = torch.where(chosen, points, -torch.inf).amax(1) - torch.where(chosen, points, torch.inf).amin(1)
    width, height = size.unbind(-1)
    box = torch.stack((torch.maximum(width, height * aspect), torch.maximum(height, width / aspect)), -1)
    center = torch.where(chosen, points, 0.0).sum(1) / chosen.sum(1).clamp(min=1)
    there = (labelled.sum(-1) > more_than) & (size > 0).any(-1)  # one key point has size 0, and none less
    return _HalfBodies(center, box * (HALF_BODY_PADDING / PIXELS_PER_SCALE), there)
