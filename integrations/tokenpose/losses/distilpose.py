"""DistilPose: a frozen heat-map network teaches a regression network (CVPR 2023, arXiv:2303.02455)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cyclekd import CycleOutput
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.losses.supervised import (
    CoordinateLoss,
    check_keypoints,
    check_target,
    shape_of,
    weighted_mse,
)
from cyclekd.integrations.tokenpose.losses.targets import Target
from cyclekd.integrations.tokenpose.shapes import full_precision


class ScoreLoss(nn.Module):
    """Mean over images and key points of w |c - T(p)|: confidences learn the teacher's heat map at the predicted point.

    DistilPose (CVPR 2023, arXiv:2303.02455). T is read at the pixel round(x (w - 1)), round(y (h - 1)), halves to even,
    and is 0 for points outside the image; no gradient reaches the point. `prediction` [B, K, 5], the confidence third;
    the target holds the teacher's maps [B, K, h, w] and weights [B, K, 1]. Errors: PoseError for other shapes.
    """

    def forward(self, prediction: Tensor, target: Target) -> Tensor:
        _check_student("ScoreLoss", prediction, target)
        prediction = full_precision(prediction)
        taught = _read(target.values, prediction[..., :2])
        return ((prediction[..., 2] - taught).abs() * target.weights[..., 0]).mean()


class SimulatedHeatmapLoss(nn.Module):
    """Mean over images, key points and pixels of w (G - T)^2: the predicted Gaussian learns the teacher's heat map.

    DistilPose (CVPR 2023, arXiv:2303.02455). `prediction` [B, K, 5]: x, y as shares of the image, a confidence that is
    not used here, and sigmas of both axes in heat-map pixels; the target holds the teacher's maps T [B, K, h, w] and
    weights [B, K, 1]. w is 0, too, where the 3-sigma window of G misses the map. Errors: PoseError where the shapes do
    not fit.

    The published code multiplies every image's error by the key point's weight averaged over the batch (a broadcast of
    two batch axes); here each image has its own weight, so that an unlabelled key point teaches nothing.
    """

    def forward(self, prediction: Tensor, target: Target) -> Tensor:
        _check_student("SimulatedHeatmapLoss", prediction, target)
        maps, reaches = simulated_heatmaps(prediction, (target.values.shape[2], target.values.shape[3]))
        return weighted_mse(maps, target.values, target.weights * reaches)


@dataclass(frozen=True)
class DistilPoseParts:
    """Every weighted term of one step's objective, attached to the graph; [N] for N cycles of the student."""

    total: Tensor
    """The scalar to call backward on: the sum of all others."""
    coordinate: Tensor
    score: Tensor
    heatmap: Tensor
    keypoint_tokens: Tensor
    visual_tokens: Tensor

    def logs(self) -> dict[str, Tensor]:
        """All terms as detached scalars by name (`loss`, `coordinate_1`, ...); nothing waits for the device."""
        terms = {name: term for name, term in vars(self).items() if name != "total"}
        named = {f"{name}_{i + 1}": value for name, term in terms.items() for i, value in enumerate(term)}
        return {name: value.detach() for name, value in {"loss": self.total, **named}.items()}


class DistilPoseLoss(nn.Module):
    """DistilPose's objective for a regression network that learns from labels and from a frozen heat-map network.

    DistilPose (CVPR 2023, arXiv:2303.02455): CoordinateLoss + score_weight * ScoreLoss + heatmap_weight *
    SimulatedHeatmapLoss + token_weight * (mse of the keypoint tokens + mse of the visual tokens), with the weights of
    the published code; summed over the student's cycles.

    `student` is what a network wrapped by `wrap_multicycle(network, cycles=1, stack="blocks")` returns in training:
    outputs [B, K, 5], tokens [B, K + N, D]. `teacher` is `run_cycles(network, images, cycles=1)` of a heat-map network
    wrapped alike, in evaluation mode and under torch.no_grad(): maps [B, K, h, w], and tokens of the student's shape.
    No gradient reaches the teacher. The target holds coordinates and weights, each [B, K, 2], the weights of x and y
    alike. Errors: PoseError where one of the two is no CycleOutput, or the shapes do not fit.
    """

    def __init__(self, *, score_weight: float = 0.01, heatmap_weight: float = 1.0, token_weight: float = 5e-4) -> None:
        super().__init__()
        self.score_weight, self.heatmap_weight, self.token_weight = score_weight, heatmap_weight, token_weight
        self.coordinate, self.score, self.heatmap = CoordinateLoss(), ScoreLoss(), SimulatedHeatmapLoss()

    def extra_repr(self) -> str:
        weights = ("score_weight", "heatmap_weight", "token_weight")
        return ", ".join(f"{name}={getattr(self, name)}" for name in weights)

    def forward(self, student: CycleOutput, teacher: CycleOutput, target: Target) -> DistilPoseParts:
        _check_cycles(student, teacher)
        cycles = zip(student.outputs, student.tokens, strict=True)
        terms = [self._cycle(output, tokens, teacher, target) for output, tokens in cycles]
        parts = [torch.stack(part) for part in zip(*terms, strict=True)]
        return DistilPoseParts(torch.stack(parts).sum(), *parts)

    def _cycle(self, output: Tensor, tokens: Any, teacher: CycleOutput, target: Target) -> tuple[Tensor, ...]:
        coordinate = self.coordinate(output, target)
        taught = Target(teacher.outputs[0].detach(), target.weights[..., :1])
        keypoint, visual = _token_distances(tokens, teacher.tokens[0], output.shape[1])
        return (
            coordinate,
            self.score_weight * self.score(output, taught),
            self.heatmap_weight * self.heatmap(output, taught),
            self.token_weight * keypoint,
            self.token_weight * visual,
        )


def simulated_heatmaps(prediction: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Gaussians [B, K, h, w] of `size` (h, w), peak 1, and [B, K, 1]: 1 where their 3-sigma window reaches the map.

    From `prediction` [B, K, 5]: x, y as shares of the image, a confidence, the sigmas of x and y in map pixels. The
    window ends one pixel later on the right and at the bottom, as that of `heatmap_target`.
    """
    x, y, _, sigma_x, sigma_y = full_precision(prediction).unbind(-1)
    columns, reaches_x = _gaussian(x * size[1], sigma_x, size[1])
    rows, reaches_y = _gaussian(y * size[0], sigma_y, size[0])
    return rows[..., None] * columns[..., None, :], (reaches_x & reaches_y).to(x.dtype)[..., None]


def _gaussian(mean: Tensor, sigma: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[B, K] means and sigmas to one axis' values [B, K, size], and whether the window reaches it, [B, K]."""
    distance = torch.arange(size, device=mean.device, dtype=mean.dtype) - mean[..., None]
    values = torch.exp(-0.5 * distance.square() / (sigma.square() + 1e-9)[..., None])
    return values, (mean - 3 * sigma < size) & (mean + 3 * sigma + 1 >= 0)


def _read(maps: Tensor, points: Tensor) -> Tensor:
    """[B, K] values of maps [B, K, h, w] at points [B, K, 2] in shares of the image; 0 outside it."""
    height, width = maps.shape[-2:]
    # bounded after rounding: a NaN would otherwise read outside the map, which ends the process on a GPU
    column = (points[..., 0] * (width - 1)).round().long().clamp(0, width - 1)
    row = (points[..., 1] * (height - 1)).round().long().clamp(0, height - 1)
    inside = ((points >= 0) & (points <= 1)).all(-1)
    values = full_precision(maps).flatten(2).gather(2, (row * width + column)[..., None])[..., 0]
    return torch.where(inside, values, 0.0)


def _token_distances(student: Any, teacher: Any, keypoints: int) -> tuple[Tensor, Tensor]:
    if not (isinstance(student, Tensor) and isinstance(teacher, Tensor) and student.shape == teacher.shape):
        raise PoseError(
            f"DistilPoseLoss compares tokens of one shape, and the student's are {shape_of(student)}, the teacher's "
            f"{shape_of(teacher)}: both networks need the same key points, patch grid and token width, and no pruning"
        )
    student, teacher = full_precision(student), full_precision(teacher.detach())
    keypoint = F.mse_loss(student[:, :keypoints], teacher[:, :keypoints])
    return keypoint, F.mse_loss(student[:, keypoints:], teacher[:, keypoints:])


# -- what a user can get wrong -----------------------------------------------------------------------------------------


def _check_student(loss: str, prediction: Tensor, target: Target) -> None:
    check_target(loss, prediction, target)
    seen = f"{loss} got the prediction {shape_of(prediction)} and the teacher's heat maps {shape_of(target.values)}"
    if prediction.ndim != 3 or prediction.shape[2] != 5 or target.values.ndim != 4:
        raise PoseError(f"{seen}, and needs [B, K, 5], as from tokenreg_s, and [B, K, h, w], as from tokenpose_s_v1")
    check_keypoints(seen, loss, prediction, target)


def _check_cycles(student: Any, teacher: Any) -> None:
    for name, output in (("student", student), ("teacher", teacher)):
        if not isinstance(output, CycleOutput):
            raise PoseError(
                f"DistilPoseLoss needs the {name}'s outputs and tokens, a CycleOutput, not {type(output).__name__}: "
                f'write wrap_multicycle({name}, cycles=1, stack="blocks") once, and run_cycles({name}, images)'
            )
    if len(teacher.outputs) != 1:
        raise PoseError(
            f"DistilPoseLoss learns from one pass of the teacher, and this one holds {len(teacher.outputs)} cycles: "
            "write run_cycles(teacher, images, cycles=1)"
        )
