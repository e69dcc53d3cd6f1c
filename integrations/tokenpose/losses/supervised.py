"""What pose networks learn from labels: heat maps, RLE's likelihood, plain coordinates.

Each is a task for `CycleLoss`, a function of one cycle's prediction and a `Target`. Everything computes in float32,
whatever autocast made of the prediction.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.losses.flow import RealNVP
from cyclekd.integrations.tokenpose.losses.targets import Target
from cyclekd.integrations.tokenpose.shapes import full_precision


class HeatmapLoss(nn.Module):
    """factor * mean over images, key points and pixels of w (p - t)^2; a scalar.

    `prediction` [B, K, h, w]; the target holds maps t of that shape and weights w [B, K, 1], 0 for key points that are
    not labelled. These count in the mean, as in the published code. factor=1.0 is the loss of SDPose and of mmpose;
    TokenPose's own code (ICCV 2021) has 0.5. Errors: PoseError where the shapes differ.
    """

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def extra_repr(self) -> str:
        return f"factor={self.factor}"

    def forward(self, prediction: Tensor, target: Target) -> Tensor:
        check_heatmaps("HeatmapLoss", prediction, target)
        return self.factor * weighted_mse(prediction, target.values, target.weights)


class RLELoss(nn.Module):
    """Negative log-likelihood of the true coordinates under a density that `flow` learns at the same time; a scalar.

    Residual Log-likelihood Estimation (ICCV 2021, arXiv:2107.11291). With the error e = (p - t) / s in units of the
    predicted s = sigmoid(raw sigma), each coordinate costs

        log s - log flow(e)  +  log(2 s) + |e|

    and the second half is that of the simple density that the flow corrects: Laplace as here, or base="gaussian"
    with log(s sqrt(2 pi)) + e^2 / 2. residual=False leaves the half out, and the flow learns the density alone. The sum
    over key points and coordinates, times their weights, is divided by the number of images only. The density is one of
    both coordinates, so that its log counts twice: the published code has it so.

    `prediction` [B, K, 4]: x, y as shares of the image, two raw sigmas; the target holds coordinates and weights, each
    [B, K, 2]. The flow has parameters: the optimizer must get them, and DistributedDataParallel must wrap them, so that
    network and loss belong into one module. Errors: PoseError for an unknown base, or where the shapes do not fit.

    The logarithm of a density crosses zero: once the network is sure, the loss is negative. `CycleLoss` weighs tokens
    by default with rho |task loss|, which then falls to 0 and rises again: write CycleLoss(RLELoss(), alpha=...), or
    CycleLoss.paper(RLELoss()).
    """

    def __init__(self, residual: bool = True, base: str = "laplace") -> None:
        super().__init__()
        if base not in ("laplace", "gaussian"):
            raise PoseError(f'RLELoss(base={base!r}): write base="laplace", as in the paper, or base="gaussian"')
        self.residual, self.base = residual, base
        self.flow = RealNVP()

    def extra_repr(self) -> str:
        return f"residual={self.residual}, base={self.base!r}"

    def forward(self, prediction: Tensor, target: Target) -> Tensor:
        check_coordinates("RLELoss", prediction, target, numbers=(4,))
        prediction, values = full_precision(prediction), full_precision(target.values)
        points, raw_sigma = prediction.split(2, dim=-1)
        log_sigma = F.logsigmoid(raw_sigma)
        error = (points - values) / (raw_sigma.sigmoid() + 1e-9)
        loss = log_sigma - self.flow.log_prob(error)[..., None]
        if self.residual:
            loss = loss + log_sigma + self._base(error)
        return (loss * target.weights).sum() / len(prediction)

    def _base(self, error: Tensor) -> Tensor:
        if self.base == "laplace":
            return math.log(2) + error.abs()
        return 0.5 * math.log(2 * math.pi) + 0.5 * error.square()


class CoordinateLoss(nn.Module):
    """Mean over images, key points and both coordinates of w smooth_l1(p - t), e^2 / 2 below 1 and |e| - 1/2 above.

    DistilPose's regression loss (CVPR 2023, arXiv:2303.02455). `prediction` [B, K, 2, 4 or 5], x and y first; the
    target holds coordinates and weights, each [B, K, 2]. Errors: PoseError where the shapes do not fit.
    """

    def forward(self, prediction: Tensor, target: Target) -> Tensor:
        check_coordinates("CoordinateLoss", prediction, target, numbers=(2, 4, 5))
        points, values = full_precision(prediction[..., :2]), full_precision(target.values)
        return (F.smooth_l1_loss(points, values, reduction="none") * target.weights).mean()


def weighted_mse(prediction: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    distance = (full_precision(prediction) - full_precision(values)).square()
    return (distance.mean((2, 3)) * weights[..., 0]).mean()


# -- what a user can get wrong -----------------------------------------------------------------------------------------


def check_heatmaps(loss: str, prediction: Tensor, target: Target) -> None:
    check_target(loss, prediction, target)
    seen = f"{loss} got the prediction {shape_of(prediction)} and target maps {shape_of(target.values)}"
    if prediction.ndim != 4 or target.values.ndim != 4:
        raise PoseError(
            f"{seen}, and needs [B, K, h, w] for both: such maps are made by heatmap_target; for a model that predicts "
            "coordinates write RLELoss() or CoordinateLoss() with a coordinate_target"
        )
    check_keypoints(seen, loss, prediction, target)
    if prediction.shape != target.values.shape:
        height, width = target.values.shape[2:]
        raise PoseError(
            f"{seen}: write heatmap_target(..., heatmap_size={tuple(prediction.shape[2:])}), or for these maps "
            f"create_model(name, input_size=({4 * height}, {4 * width}))"
        )


def check_coordinates(loss: str, prediction: Tensor, target: Target, *, numbers: tuple[int, ...]) -> None:
    check_target(loss, prediction, target)
    seen = f"{loss} got the prediction {shape_of(prediction)} and target coordinates {shape_of(target.values)}"
    fits = prediction.ndim == target.values.ndim == 3 and prediction.shape[2] in numbers
    if not fits or target.values.shape[2] != 2:
        raise PoseError(
            f"{seen}, and needs [B, K, {_or(numbers)}] and, as from coordinate_target, [B, K, 2]: for heat maps write "
            "HeatmapLoss(), for RLE's head (sdpose_reg) RLELoss(), for DistilPose's (tokenreg_s) CoordinateLoss()"
        )
    check_keypoints(seen, loss, prediction, target)


def check_target(loss: str, prediction: Any, target: Any) -> None:
    if not isinstance(prediction, Tensor):
        raise PoseError(
            f"{loss} takes one prediction, a tensor, and got {shape_of(prediction)}: pass output.outputs[0] of a model "
            f"in cycles, or write CycleLoss({loss}())(output, target) for all of them"
        )
    parts = target if isinstance(target, Target) else (target,)
    if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        raise PoseError(
            f"{loss} takes a Target(values, weights), two tensors, as from heatmap_target or coordinate_target, and "
            f"got {', '.join(map(shape_of, parts))}"
        )


def check_keypoints(seen: str, loss: str, prediction: Tensor, target: Target) -> None:
    (images, keypoints), wanted = prediction.shape[:2], target.values.shape[:2]
    if images != wanted[0]:
        raise PoseError(f"{seen}: {images} images against {wanted[0]}, pass both of one batch")
    if keypoints != wanted[1]:
        raise PoseError(
            f"{seen}: {keypoints} key points against {wanted[1]}, write create_model(name, num_keypoints={wanted[1]})"
        )
    weights = [images, keypoints, 2 if target.values.ndim == 3 else 1]
    if list(target.weights.shape) != weights:
        raise PoseError(
            f"{loss} got weights {shape_of(target.weights)} for targets {shape_of(target.values)} and needs {weights}: "
            "write Target(values, weights) with 1 where a key point counts and 0 where it does not"
        )


def _or(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, numbers))


def shape_of(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
