"""A picture of what a model has learned: people as the network sees them, annotated and predicted key points."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from cyclekd.integrations.runs.folder import write_atomically
from cyclekd.integrations.tokenpose.data.crops import EvaluationCrops, cut_views
from cyclekd.integrations.tokenpose.data.people import People
from cyclekd.integrations.tokenpose.data.warp import normalize
from cyclekd.integrations.tokenpose.keypoints.decoding import Keypoints
from cyclekd.integrations.tokenpose.keypoints.export import KeypointModel
from cyclekd.integrations.tokenpose.prediction.drawing import draw_poses
from cyclekd.integrations.tokenpose.skeletons import Skeleton

SHOWN, COLUMNS = 12, 4
HEIGHT = 384
"""Of a person in the picture, in pixels."""
WHITE, GAP = 255, 6


@torch.no_grad()
def draw_predictions(
    path: Path, model: nn.Module, crops: EvaluationCrops, name: str, *, method: str = "dark", aligned: bool = False
) -> None:
    """A PNG of up to 12 people spread over all, each twice: annotated at the left, and as the model predicts in a pass.

    Every predicted key point is drawn, however sure of it the model is; `method` and `aligned` are those of
    `KeypointModel`, and `name` is the model's, for the title. Detectors' boxes have no annotation. People whose
    photograph cannot be read are left out.
    Errors: RunError where it cannot be written.
    """
    samples = [crops[row] for row in _chosen(crops.people)]
    batch = default_collate([sample for sample in samples if sample["valid"]] or samples[:1])
    images = cut_views(batch, crops.input_size)
    device = next(model.parameters()).device
    predict = KeypointModel(model.eval(), method, aligned)
    found = Keypoints(*(each.float().cpu() for each in predict(normalize(images).to(device))))
    truth = Keypoints(batch["keypoints"], (batch["visible"] > 0).float())
    pairs = [
        _pair(image, truth, found, row, crops.people.skeleton)
        for row, image in enumerate(images.permute(0, 2, 3, 1).numpy())
    ]
    title = f"{name}: annotated (left) and predicted in one pass (right), {crops.people.source} boxes"
    write_atomically(path, _as_png(pairs, title))


def _chosen(people: People) -> list[int]:
    """Rows of labelled people, or of any where nobody is labelled."""
    rows = (people.keypoints[..., 2] > 0).any(-1).nonzero().flatten()
    rows = rows if len(rows) else torch.arange(len(people))
    return rows[torch.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).long()].tolist()


def _pair(image: np.ndarray, truth: Keypoints, found: Keypoints, row: int, skeleton: Skeleton) -> np.ndarray:
    factor = max(1, round(HEIGHT / image.shape[0]))
    large = np.array(Image.fromarray(image).resize((image.shape[1] * factor, image.shape[0] * factor)))
    between = np.full((large.shape[0], GAP, 3), WHITE, np.uint8)
    halves = [
        _drawn(large, truth.coordinates[row], truth.scores[row] > 0, factor, skeleton),
        between,
        _drawn(large, found.coordinates[row], torch.ones(len(skeleton.names)), factor, skeleton),
    ]
    return np.concatenate(halves, axis=1)


def _drawn(image: np.ndarray, points: Tensor, shown: Tensor, factor: int, skeleton: Skeleton) -> np.ndarray:
    points = (points + 0.5) * factor - 0.5  # pixels are counted from their centres
    return draw_poses(image, points.numpy()[None], shown.float().numpy()[None], skeleton, threshold=0.5)


def _as_png(pairs: list[np.ndarray], title: str) -> bytes:
    columns = min(COLUMNS, len(pairs))
    rows = -(-len(pairs) // columns)
    aspect = pairs[0].shape[0] / pairs[0].shape[1]
    figure = Figure(figsize=(3.2 * columns, 0.7 + 3.2 * aspect * rows), layout="constrained")
    figure.suptitle(title, parse_math=False, fontsize="medium")
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if number < len(pairs):
            axes.imshow(pairs[number])
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()
