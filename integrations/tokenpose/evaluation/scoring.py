"""How good key points are: a person's score, similarity of two people (OKS), suppression of duplicates, and PCK.

OKS compares two detections here, hence with the mean of both areas; COCO's evaluation has the annotation's area alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cyclekd.integrations.tokenpose.keypoints.decoding import argmax
from cyclekd.integrations.tokenpose.losses.targets import Target
from cyclekd.integrations.tokenpose.shapes import check_shape, check_sigmas, full_precision


class Pck(NamedTuple):
    """Share of correct key points: [K], NaN for one without weight in the batch; and the mean over the others."""

    by_keypoint: Tensor
    mean: Tensor


def rescore(keypoint_scores: Tensor, box_scores: Tensor, threshold: float = 0.2) -> Tensor:
    """Scores [N] of people: the box's [N] times the mean of those key point scores [N, K] above `threshold`.

    Without one above, 0. Key points that a network was unsure of then do not lower a person's score.
    """
    _check_scores("rescore", keypoint_scores, box_scores)
    scores = full_precision(keypoint_scores)
    sure = scores > threshold
    mean = torch.where(sure, scores, 0.0).sum(-1) / sure.sum(-1).clamp(min=1)
    return mean * box_scores


def rescore_rle(keypoint_scores: Tensor, box_scores: Tensor) -> Tensor:
    """Scores [N] of people: the box's [N] plus mean and largest of the key point scores [N, K]; mmpose's, for RLE."""
    _check_scores("rescore_rle", keypoint_scores, box_scores)
    scores = full_precision(keypoint_scores)
    return box_scores + scores.mean(-1) + scores.amax(-1)


def oks(keypoints: Tensor, areas: Tensor, others: Tensor, other_areas: Tensor, *, sigmas: Sequence[float]) -> Tensor:
    """Object key point similarity [N, M] of people [N, K, 2 or more] and others [M, K, 2 or more], from 0 to 1.

    The mean over key points of exp(-d² / (2 a (2 sigma)²)), d being their distance and a the mean of both areas, [N]
    and [M], in pixels squared (https://cocodataset.org/#keypoints-eval). All key points count, whatever their score; a
    lost coordinate (NaN) gives NaN. PoseError for other shapes, or sigmas that do not fit K.
    """
    count = keypoints.shape[1] if keypoints.ndim == 3 else "K"
    for name, people, of_people in (("keypoints", keypoints, areas), ("others", others, other_areas)):
        check_shape(f"oks: {name}", people, "N", count, "2 or more")
        check_shape(f"oks: areas of {name}", of_people, people.shape[0])
    check_sigmas("oks", sigmas, keypoints.shape[1])
    a, b = full_precision(keypoints)[:, None, :, :2], full_precision(others)[None, :, :, :2]
    area = (full_precision(areas)[:, None] + full_precision(other_areas)) / 2  # [N, M]
    spread = (2 * a.new_tensor(sigmas)).square()
    distance = (a - b).square().sum(-1)  # [N, M, K]
    return torch.exp(-distance / (2 * area.clamp(min=1e-12)[..., None] * spread)).mean(-1)


def oks_nms(
    keypoints: Tensor, scores: Tensor, areas: Tensor, *, sigmas: Sequence[float], threshold: float = 0.9
) -> Tensor:
    """Indices of the people of one image to keep, best first: none resembles a better one by more than `threshold`.

    `keypoints` [N, K, 2 or more], `scores` and `areas` [N]. A person with a NaN coordinate resembles nobody. Runs on
    the CPU, once per image.
    """
    overlap = _overlap(keypoints, scores, areas, sigmas)
    kept, alive = [], torch.ones(len(overlap), dtype=torch.bool)
    for person in scores.argsort(descending=True, stable=True).tolist():
        if alive[person]:
            kept.append(person)
            alive &= overlap[person] <= threshold
    return torch.tensor(kept, dtype=torch.long, device=keypoints.device)


def soft_oks_nms(
    keypoints: Tensor,
    scores: Tensor,
    areas: Tensor,
    *,
    sigmas: Sequence[float],
    threshold: float = 0.9,
    keep: int = 20,
) -> Tensor:
    """Indices of at most `keep` people of one image, best first, where resembling a better one lowers the score.

    Taking a person multiplies every other score by exp(-OKS² / threshold) (Soft-NMS, arXiv:1704.04503, Gaussian); the
    best of those is taken next. The scores as given are what an evaluation gets; these only order and cut.
    """
    overlap = _overlap(keypoints, scores, areas, sigmas)
    left, kept = full_precision(scores).cpu().clone(), []
    for _ in range(min(keep, len(overlap))):
        person = int(left.argmax())
        kept.append(person)
        left *= torch.exp(-overlap[person].square() / threshold)
        left[kept] = -torch.inf  # all of them: -inf times a factor that underflowed to 0 is NaN, argmax's first choice
    return torch.tensor(kept, dtype=torch.long, device=keypoints.device)


def pck(
    heatmaps: Tensor, target: Target, *, threshold: float = 0.05, normalizer: tuple[float, float] | None = None
) -> Pck:
    """Share of key points whose heat map [B, K, h, w] peaks within `threshold` of the target map's peak.

    Distances are divided by `normalizer`, (height, width), axis by axis; the map's own unless given. mmpose 0.29 and so
    SDPose's logs divide x by the height and y by the width: `normalizer=(width, height)` gives theirs. Key points of
    weight 0 do not count. Nothing waits for the device.
    """
    check_shape("pck: heatmaps", heatmaps, "B", "K", "h", "w")
    check_shape("pck: target.values", target.values, *heatmaps.shape)
    check_shape("pck: target.weights", target.weights, *heatmaps.shape[:2], 1)
    height, width = normalizer or heatmaps.shape[-2:]
    found, true = argmax(heatmaps), argmax(target.values)
    x, y = (found.coordinates - true.coordinates).unbind(-1)
    counts = target.weights[..., 0] > 0
    near = ((x / width).square() + (y / height).square()).sqrt() < threshold
    by_keypoint = (near & counts).sum(0) / counts.sum(0)
    return Pck(by_keypoint, by_keypoint.nanmean())


def _check_scores(name: str, keypoint_scores: Tensor, box_scores: Tensor) -> None:
    check_shape(f"{name}: keypoint_scores", keypoint_scores, "N", "K")
    check_shape(f"{name}: box_scores", box_scores, keypoint_scores.shape[0])


def _overlap(keypoints: Tensor, scores: Tensor, areas: Tensor, sigmas: Sequence[float]) -> Tensor:
    overlap = oks(keypoints, areas, keypoints, areas, sigmas=sigmas).cpu()
    check_shape("scores of the people", scores, len(overlap))
    return overlap.nan_to_num()  # no comparison with NaN is true: a lost person would suppress everybody else
