"""The paper's random views of all people of a pose data set at once, where `data.views` draws one person's.

A training that holds its images on a GPU asks for thousands of views per second: each step here is one operation on all
of them, and none of them waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cyclekd.integrations.tokenpose.data.views import HALF_BODY_PADDING, UPPER_BODY_BELOW, View, ViewSettings
from cyclekd.integrations.tokenpose.keypoints.decoding import PIXELS_PER_SCALE
from cyclekd.integrations.tokenpose.skeletons import Skeleton

AT_LEAST = 3
"""Labelled key points that the preferred half of a body needs; the other half is shown where it has fewer."""


class Halves(NamedTuple):
    """Boxes of half a body by which half is preferred, (lower, upper); numbers without meaning where `there` is not."""

    center: Tensor
    """[2, N, 2]"""
    scale: Tensor
    """[2, N, 2]"""
    there: Tensor
    """[2, N], bool"""


def random_views(
    center: Tensor, scale: Tensor, halves: Halves, settings: ViewSettings, uniform: Tensor, normal: Tensor
) -> View:
    """A view of each of the N people whose padded boxes have this `center` [N, 2] and `scale` [N, 2].

    `uniform` [N, 6] and `normal` [N, 3] are the random numbers, in the order of `data.views.sample_view`: the same
    numbers give the same view.
    """
    shifted, right, down, mirrored, halved, turned = uniform.unbind(-1)
    half, zoom, angle = normal.unbind(-1)
    reach = settings.shift * PIXELS_PER_SCALE * scale
    move = torch.stack((2 * right - 1, 2 * down - 1), -1) * reach
    center = torch.where((shifted < settings.shift_probability)[:, None], center + move, center)
    preferred = (half < UPPER_BODY_BELOW)[:, None]
    there = torch.where(preferred[:, 0], halves.there[1], halves.there[0])
    cut = (there & (halved < settings.half_body))[:, None]
    center = torch.where(cut, torch.where(preferred, halves.center[1], halves.center[0]), center)
    scale = torch.where(cut, torch.where(preferred, halves.scale[1], halves.scale[0]), scale)
    factor = 1 + settings.scale * zoom.clamp(-1, 1)
    degrees = settings.rotation * angle.clamp(-2, 2) * (turned < settings.rotation_probability)
    return View(center, scale * factor[:, None], degrees, mirrored < settings.flip)


def half_bodies(keypoints: Tensor, skeleton: Skeleton, settings: ViewSettings, aspect: float) -> Halves:
    """The boxes round both halves of N people, of their key points [N, K, 3]; `aspect` is width over height."""
    labelled, points = keypoints[..., 2] > 0, keypoints[..., :2]
    is_upper = torch.tensor([index in skeleton.upper_body for index in range(keypoints.shape[1])]).to(labelled.device)
    lower, upper = labelled & ~is_upper, labelled & is_upper  # [N, K]
    many_lower, many_upper = lower.sum(-1) >= AT_LEAST, upper.sum(-1) >= AT_LEAST
    take_lower = torch.stack((many_lower, many_lower & ~many_upper))  # [2, N], by which half is preferred
    chosen = torch.where(take_lower[..., None], lower, upper)[..., None]  # [2, N, K, 1]
    count = chosen.sum(2)
    size = torch.where(chosen, points, -torch.inf).amax(2) - torch.where(chosen, points, torch.inf).amin(2)
    there = (labelled.sum(-1) > settings.half_body_keypoints) & (count[..., 0] >= 2) & (size > 0).any(-1)
    width, height = size.unbind(-1)
    box = torch.stack((torch.maximum(width, height * aspect), torch.maximum(height, width / aspect)), -1)
    center = torch.where(chosen, points, 0).sum(2) / count.clamp(min=1)
    return Halves(center, box * (HALF_BODY_PADDING / PIXELS_PER_SCALE), there)
