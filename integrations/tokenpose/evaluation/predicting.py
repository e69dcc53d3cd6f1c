"""From a model and people's crops to everybody's key points after every cycle, on one device or many processes.

A training evaluates with these functions while it runs, and `evaluate.py` afterwards. Between batches nothing waits
for the device: what was found leaves it some batches at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from cyclekd import run_cycles
from cyclekd.integrations.runs.loading import Batch, load_batches, on_device
from cyclekd.integrations.runs.sampling import EvaluationBatches
from cyclekd.integrations.tokenpose.data.crops import EvaluationCrops, cut_views
from cyclekd.integrations.tokenpose.data.people import People
from cyclekd.integrations.tokenpose.data.warp import normalize
from cyclekd.integrations.tokenpose.evaluation.precision import Evaluation, Predictions, evaluate, person_results
from cyclekd.integrations.tokenpose.keypoints.decoding import Keypoints, to_image
from cyclekd.integrations.tokenpose.keypoints.export import decode_output
from cyclekd.integrations.tokenpose.keypoints.flips import Pairs, average_flipped, flip_back_regression
from cyclekd.integrations.tokenpose.models.config import PoseConfig
from cyclekd.integrations.tokenpose.shapes import Size

MOVE_EVERY = 32
"""Batches whose key points leave the device together, which waits for it."""


@torch.no_grad()
def predict_cycles(
    model: nn.Module,
    crops: EvaluationCrops,
    *,
    cycles: int,
    batch: int,
    workers: int = 0,
    accelerator: Accelerator | None = None,
    flip_test: bool = True,
    method: str = "dark",
    aligned: bool = False,
    progress: bool = False,
) -> list[Predictions]:
    """Everybody's key points in image pixels after each of so many cycles, in the order of rows, on the host.

    `model` is a pose model, wrapped where `cycles` is more than 1, and put into evaluation mode. Without `accelerator`
    it runs where its weights are. With it, every process predicts its share, `batch` people at a time and under its
    autocast, and returns what all have found: each person once, however many processes there are. People whose
    photograph cannot be read are left out. `method` and `aligned` are those of `decode_with_mirrored`.
    Errors: CycleError where `cycles` is more than 1 and the model is not wrapped.
    """
    model = (model if accelerator is None else accelerator.unwrap_model(model)).eval()
    config, pairs = model.config, crops.people.skeleton.flip_pairs
    autocast = nullcontext if accelerator is None else accelerator.autocast

    def poses(part: Batch) -> Tensor:  # [cycles, B, K, 3]
        images = normalize(cut_views(part, config.input_size))
        with autocast():
            plain = _every_cycle(model, images, cycles)
            mirrored = _every_cycle(model, images.flip(-1), cycles) if flip_test else [None] * cycles
        outputs = zip(plain, mirrored, strict=True)
        found = [decode_with_mirrored(config, *each, pairs, method, aligned=aligned) for each in outputs]
        return torch.stack([_in_image(each, part, config.input_size) for each in found])

    if accelerator is None:
        device, share = next(model.parameters()).device, EvaluationBatches(len(crops), batch=batch)
    else:
        device, processes, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
        share = EvaluationBatches(len(crops), batch=batch, processes=processes, rank=rank)
    parts = on_device(load_batches(crops, share, workers, device), device, stay=("index", "valid"))
    bar = tqdm(parts, total=len(share), desc="predicting", unit=" batches", disable=None if progress else True)
    mine = [_collected(bar, poses)]
    return _by_cycle(mine if accelerator is None else gather_object(mine))


def decode_with_mirrored(
    config: PoseConfig,
    output: Tensor,
    mirrored: Tensor | None,
    pairs: Pairs,
    method: str = "dark",
    *,
    aligned: bool = False,
) -> Keypoints:
    """Key points [B, K, 2] in input pixels and scores, of an output and, averaged, that of the mirrored images.

    `method` is that of `decode_heatmaps`. `aligned` is for models trained by TokenPose's own code, see `decode_output`;
    their mirrored maps are not shifted either.
    """
    output = output.float()
    if mirrored is None:
        return decode_output(config, output, method, aligned)
    mirrored = mirrored.float()
    if config.head == "heatmap":
        averaged = average_flipped(output, mirrored, pairs, shift=not aligned)
        return decode_output(config, averaged, method, aligned)
    # RLE learned pixel / width, where pixel x is mirrored at width - 1 - x; DistilPose's own evaluation has it at 1
    width = config.input_size[1] if config.head == "rle" else None
    flipped = flip_back_regression(mirrored, pairs, image_width=width)
    plain, other = decode_output(config, output), decode_output(config, flipped)
    return Keypoints((plain.coordinates + other.coordinates) / 2, (plain.scores + other.scores) / 2)


def evaluate_cycles(people: People, predictions: Sequence[Predictions], config: PoseConfig) -> list[Evaluation]:
    """Average precision after each cycle, scored as suits the head of this config. Errors as in `evaluate`."""
    return [evaluate(people, each, **_scoring(config)) for each in predictions]


def results_of(people: People, predictions: Predictions, config: PoseConfig) -> list[dict[str, Any]]:
    """What `evaluate_cycles` measures, as `person_results` gives it and `write_results` takes it."""
    return person_results(people, predictions, **_scoring(config))


def _scoring(config: PoseConfig) -> dict[str, Any]:
    return {"rle": config.head == "rle", "input_size": config.input_size}


def _every_cycle(model: nn.Module, images: Tensor, cycles: int) -> Sequence[Tensor]:
    return run_cycles(model, images, cycles=cycles).outputs if cycles > 1 else (model(images),)


def _in_image(found: Keypoints, part: Batch, input_size: Size) -> Tensor:
    """[B, K, 3]: key points in pixels of the image, and their scores."""
    coordinates = to_image(found.coordinates, part["center"], part["scale"], input_size)
    return torch.cat([coordinates, found.scores[..., None]], -1)


def _collected(parts: Iterable[Batch], poses: Callable[[Batch], Tensor]) -> tuple[Tensor, Tensor]:
    """On the host: rows [N] of those who count, and what `poses` gives for them, [cycles, N, K, 3]."""
    rows, valid, found, moved = [], [], [], []
    for part in parts:
        rows.append(part["index"])
        valid.append(part["valid"])
        found.append(poses(part))
        if len(found) == MOVE_EVERY:
            moved.append(torch.cat(found, 1).cpu())
            found.clear()
    if found:
        moved.append(torch.cat(found, 1).cpu())
    counts = torch.cat(valid)
    return torch.cat(rows)[counts], torch.cat(moved, 1)[:, counts]


def _by_cycle(shares: Sequence[tuple[Tensor, Tensor]]) -> list[Predictions]:
    """Of the (rows, key points with scores) of every process."""
    rows, poses = torch.cat([rows for rows, _ in shares]), torch.cat([poses for _, poses in shares], 1)
    order = rows.argsort()
    return [Predictions(each[..., :2], each[..., 2], rows[order]) for each in poses[:, order]]
