"""What a pose model learns from: a loss for its head, the token terms, and both in one module with the model.

RLE learns a density beside the network. The loss is therefore computed in the forward of what
DistributedDataParallel wraps, so that its parameters are summed, saved and resumed with the others.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from cyclekd import CycleLoss
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.losses.supervised import HeatmapLoss, RLELoss
from cyclekd.integrations.tokenpose.losses.targets import Target
from cyclekd.integrations.tokenpose.models.config import PoseConfig, TokenPoseConfig
from cyclekd.integrations.tokenpose.models.tokenpose import token_groups

ALPHA = 5e-6
"""SDPose, section 4.1.2."""


class Supervised(nn.Module):
    """A pose model with its objective: images and their target to every term of it by name; `loss` has the gradient."""

    def __init__(self, model: nn.Module, criterion: CycleLoss) -> None:
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, images: Tensor, target: Target) -> dict[str, Tensor]:
        parts = self.criterion(self.model(images), target)
        logs = parts.logs()
        if self.criterion.alpha is not None:  # a constant says nothing in a log
            logs = {name: value for name, value in logs.items() if not name.startswith("alpha_")}
        return {**logs, "loss": parts.total}


def weights_of_model(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the weights of a `Supervised` those of its model, under their own names."""
    return {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}


def make_criterion(model: nn.Module, *, alpha: float | None = None, rho: float | None = None) -> CycleLoss:
    """The loss of every cycle's prediction, and the token terms with a fixed weight `alpha` or else a relative `rho`.

    A model without tokens has none. Without either the weight is the paper's.
    Errors: PoseError for a head that learns from a teacher alone, and for `rho` where the loss crosses zero.
    """
    config = model.config
    groups = token_groups(model) if isinstance(config, TokenPoseConfig) else None
    if rho is None:
        return CycleLoss(_task(config), alpha=ALPHA if alpha is None else alpha, groups=groups)
    if config.head == "rle":
        raise PoseError(
            "--rho: weighs tokens by the size of the task loss, and RLE's crosses zero: write --alpha X, a fixed weight"
        )
    return CycleLoss(_task(config), rho=rho, groups=groups)


def _task(config: PoseConfig) -> nn.Module:
    if config.head == "distilpose":
        raise PoseError(
            f"{config.name}: DistilPose's head learns its scores from a teacher's heat maps, which there are none of "
            f"here: write --model {config.name} --model-args head=rle, which learns from labels alone"
        )
    return RLELoss() if config.head == "rle" else HeatmapLoss()
