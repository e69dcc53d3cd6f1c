"""Pose estimation as a task for `runs.training`: the loss of a batch of people, and AP of every cycle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset

from cyclekd import CycleLoss, run_cycles
from cyclekd.integrations.runs.loading import Batch, load_batches, on_device
from cyclekd.integrations.runs.sampling import EvaluationBatches
from cyclekd.integrations.tokenpose.data.people import People
from cyclekd.integrations.tokenpose.data.warp import normalize, warp_batch
from cyclekd.integrations.tokenpose.evaluation.precision import Predictions, evaluate
from cyclekd.integrations.tokenpose.keypoints.decoding import Keypoints, to_image
from cyclekd.integrations.tokenpose.keypoints.export import decode_output
from cyclekd.integrations.tokenpose.keypoints.flips import Pairs, average_flipped, flip_back_regression
from cyclekd.integrations.tokenpose.losses.targets import Target, coordinate_target, heatmap_target
from cyclekd.integrations.tokenpose.models.config import PoseConfig


class PoseEstimation:
    """Training on key points; AP of every cycle on the people of `validation`.

    Views are cut from the contexts, and targets drawn, on the device. `validation` has the crops of `people`.
    """

    best_metric = "AP_1"

    def __init__(
        self,
        accelerator: Accelerator,
        criterion: CycleLoss,
        *,
        config: PoseConfig,
        validation: Dataset[Any],
        people: People,
        batch: int,
        workers: int,
        cycles: int,
        sigma: float = 2.0,
        flip_test: bool = True,
        method: str = "dark",
    ) -> None:
        self.accelerator, self.criterion, self.config = accelerator, criterion, config
        self.validation, self.people = validation, people
        self.batch, self.workers, self.cycles = batch, workers, cycles
        self.sigma, self.flip_test, self.method = sigma, flip_test, method

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Mapping[str, Tensor]:
        """Every term of the objective by name, see `cyclekd.LossParts.logs`; `loss` carries the gradient."""
        parts = self.criterion(model(self.crops(batch)), self.target(batch))
        return {**parts.logs(), "loss": parts.total}

    def crops(self, batch: Batch) -> Tensor:
        """What the network sees, [B, 3, H, W]."""
        return normalize(warp_batch(batch["image"], batch["matrix"], self.config.input_size))

    def target(self, batch: Batch) -> Target:
        """What it is to say, in the form that its head has."""
        keypoints, visible = batch["keypoints"], batch["visible"]
        if self.config.head != "heatmap":
            return coordinate_target(keypoints, visible, input_size=self.config.input_size)
        sizes = {"input_size": self.config.input_size, "heatmap_size": self.config.feature_size}
        return heatmap_target(keypoints, visible, sigma=self.sigma, **sizes)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """AP and the like with `_i` for cycle i, and the number of `people` they are of.

        Every person counts once, however many processes share them and whether or not they divide evenly; people whose
        photograph cannot be read have no prediction.
        """
        model = self.accelerator.unwrap_model(model).eval()
        accelerator = self.accelerator
        share = EvaluationBatches(
            len(self.validation),
            batch=self.batch,
            processes=accelerator.num_processes,
            rank=accelerator.process_index,
        )
        loader = load_batches(self.validation, share, self.workers, accelerator.device)
        found = []
        for batch in on_device(loader, accelerator.device, stay=("index", "valid")):
            poses = torch.stack([self._poses(output, batch) for output in self._predict(model, self.crops(batch))])
            found.append((batch["index"][batch["valid"]], poses.cpu()[:, batch["valid"]]))
        return self._figures(gather_object(found))

    def _predict(self, model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Every cycle's output, and that of the mirrored images."""
        with self.accelerator.autocast():
            plain = self._every_cycle(model, images)
            mirrored = self._every_cycle(model, images.flip(-1)) if self.flip_test else [None] * len(plain)
        return list(zip(plain, mirrored, strict=True))

    def _every_cycle(self, model: nn.Module, images: Tensor) -> Sequence[Tensor]:
        return run_cycles(model, images).outputs if self.cycles > 1 else (model(images),)

    def _poses(self, outputs: tuple[Tensor, Tensor | None], batch: Batch) -> Tensor:
        """[B, K, 3]: key points in image pixels and their scores."""
        found = decode_with_mirrored(self.config, *outputs, self.people.skeleton.flip_pairs, self.method)
        height, width = self.config.input_size
        coordinates = to_image(found.coordinates, batch["center"], batch["scale"], (height, width))
        return torch.cat([coordinates, found.scores[..., None]], dim=-1)

    def _figures(self, found: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Computed on the main process, the same on all."""
        figures: list[Any] = [None]
        if self.accelerator.is_main_process:
            rows, poses = torch.cat([rows for rows, _ in found]), torch.cat([poses for _, poses in found], dim=1)
            figures = [self._by_cycle(rows, poses)]
        broadcast_object_list(figures)
        return figures[0]

    def _by_cycle(self, rows: Tensor, poses: Tensor) -> dict[str, float]:
        """Of the people in these rows and their key points with scores, [cycles, N, K, 3]."""
        named: dict[str, float] = {}
        for cycle, found in enumerate(poses, start=1):
            predictions = Predictions(found[..., :2], found[..., 2], rows)
            rle = self.config.head == "rle"
            figures = evaluate(self.people, predictions, rle=rle, input_size=self.config.input_size).figures
            named |= {f"{name}_{cycle}": value for name, value in figures.items()}
        return named | {"people": len(rows)}


def decode_with_mirrored(
    config: PoseConfig, output: Tensor, mirrored: Tensor | None, pairs: Pairs, method: str = "dark"
) -> Keypoints:
    """Key points [B, K, 2] in input pixels and scores, of an output and, averaged, that of the mirrored images."""
    if mirrored is None:
        return decode_output(config, output, method)
    if config.head == "heatmap":
        return decode_output(config, average_flipped(output.float(), mirrored.float(), pairs, shift=True), method)
    plain, other = decode_output(config, output), decode_output(config, flip_back_regression(mirrored, pairs))
    return Keypoints((plain.coordinates + other.coordinates) / 2, (plain.scores + other.scores) / 2)
