"""Pose estimation as a task for `runs.training`: the loss of a batch of people, and AP of every cycle."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate import Accelerator
from torch import Tensor, nn

from cyclekd.integrations.runs.loading import Batch
from cyclekd.integrations.runs.processes import on_main_process
from cyclekd.integrations.runs.training import Training
from cyclekd.integrations.tokenpose.data.crops import EvaluationCrops, cut_views
from cyclekd.integrations.tokenpose.data.warp import normalize
from cyclekd.integrations.tokenpose.evaluation.precision import Predictions
from cyclekd.integrations.tokenpose.evaluation.predicting import evaluate_cycles, predict_cycles
from cyclekd.integrations.tokenpose.losses.targets import Target, coordinate_target, heatmap_target, usual_sigma
from cyclekd.integrations.tokenpose.models.config import PoseConfig
from cyclekd.integrations.tokenpose.training.objective import weights_of_model


class PoseEstimation:
    """Training of a `Supervised` model on key points; AP of every cycle on the people of `validation`.

    Views are cut from the contexts, and targets drawn, on the device.
    """

    best_metric = "AP_1"

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        config: PoseConfig,
        validation: EvaluationCrops,
        batch: int,
        workers: int,
        cycles: int,
        sigma: float | None = None,
        flip_test: bool = True,
        method: str = "dark",
    ) -> None:
        self.accelerator, self.config = accelerator, config
        self.validation = validation
        self.batch, self.workers, self.cycles = batch, workers, cycles
        self.sigma = usual_sigma(config.feature_size) if sigma is None and config.head == "heatmap" else sigma
        self.flip_test, self.method = flip_test, method

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Mapping[str, Tensor]:
        """Every term of the objective by name, see `cyclekd.LossParts.logs`; `loss` carries the gradient."""
        return model(self.crops(batch), self.target(batch))

    def crops(self, batch: Batch) -> Tensor:
        """What the network sees, [B, 3, H, W]."""
        return normalize(cut_views(batch, self.config.input_size))

    def target(self, batch: Batch) -> Target:
        """What it is to say, in the form that its head has."""
        keypoints, visible = batch["keypoints"], batch["visible"]
        if self.config.head != "heatmap":
            return coordinate_target(keypoints, visible, input_size=self.config.input_size)
        sizes = {"input_size": self.config.input_size, "heatmap_size": self.config.feature_size}
        return heatmap_target(keypoints, visible, sigma=self.sigma, **sizes)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """AP and the like with `_i` for cycle i, and the number of `people` they are of.

        Every person counts once, however many processes share them and whether or not they divide evenly; people whose
        photograph cannot be read have no prediction.
        """
        predictions = predict_cycles(
            self.accelerator.unwrap_model(model).model,
            self.validation,
            cycles=self.cycles,
            batch=self.batch,
            workers=self.workers,
            accelerator=self.accelerator,
            flip_test=self.flip_test,
            method=self.method,
        )
        return on_main_process(self.accelerator, lambda: self._figures(predictions))

    def _figures(self, predictions: list[Predictions]) -> dict[str, float]:
        named: dict[str, float] = {}
        evaluations = evaluate_cycles(self.validation.people, predictions, self.config)
        for cycle, evaluation in enumerate(evaluations, start=1):
            named |= {f"{name}_{cycle}": value for name, value in evaluation.figures.items()}
        return named | {"people": len(predictions[0].rows)}


class PoseTraining(Training):
    """Of a `Supervised`, whose model alone is deployed."""

    def deployable_weights(self) -> dict[str, Tensor]:
        return weights_of_model(super().deployable_weights())
