"""From predictions to figures: COCO's results of persons, average precision, PCK, and the file for a test server.

OKS has two uses: among predictions of one image it finds duplicates, and against the ground truth it measures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from cyclekd.integrations.runs.folder import write_atomically
from cyclekd.integrations.tokenpose.data.annotations import AnnotationFile, read_annotations, require_sigmas
from cyclekd.integrations.tokenpose.data.people import DETECTOR, People
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.evaluation.crowdpose import crowdpose_figures
from cyclekd.integrations.tokenpose.evaluation.matching import detections, ground_truth, run
from cyclekd.integrations.tokenpose.evaluation.scoring import Pck, oks_nms, rescore_rle
from cyclekd.integrations.tokenpose.evaluation.scoring import rescore as rescored
from cyclekd.integrations.tokenpose.keypoints.decoding import PIXELS_PER_SCALE
from cyclekd.integrations.tokenpose.keypoints.geometry import center_and_scale
from cyclekd.integrations.tokenpose.shapes import Size, check_shape, full_precision

NAMES = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")


class Predictions(NamedTuple):
    """Key points of some rows of `People`; a row that is there twice, as samplers pad, counts once."""

    keypoints: Tensor
    """[N, K, 2], (x, y) in pixels of the image."""
    scores: Tensor
    """[N, K]"""
    rows: Tensor
    """[N]"""


class Evaluation(NamedTuple):
    """Figures with whose boxes they hold for: those with ground-truth boxes cannot be compared with a detector's."""

    boxes: str
    """As `People.source`."""
    persons: int
    """How many boxes have a prediction."""
    without: int
    """How many have none, as those of an unreadable image; they count as not found."""
    figures: dict[str, float]

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.figures.items())
        without = f", {self.without} more without prediction" if self.without else ""
        return f"{figures} ({self.persons} {self.boxes} boxes{without})"


def evaluate(
    people: People,
    predictions: Predictions,
    *,
    rescore: float = 0.2,
    nms: float = 0.9,
    rle: bool = False,
    input_size: Size = (256, 192),
) -> Evaluation:
    """Average precision of predictions for `people`: `crowdpose_ap` for CrowdPose's files, else `coco_ap`.

    Over all persons of the file, with or without a prediction. Settings and errors as in `person_results`.
    """
    results = person_results(people, predictions, rescore=rescore, nms=nms, rle=rle, input_size=input_size)
    seen = len(torch.unique(predictions.rows))
    return Evaluation(people.source, seen, len(people) - seen, average_precision(people, results))


def average_precision(people: People, results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`crowdpose_ap` of results where the file of `people` is CrowdPose's, else `coco_ap`; errors as in those.

    Without any result, a check that the file can be compared with at all.
    """
    file, sigmas = read_annotations(people.annotations), require_sigmas(people.skeleton, None, "average_precision")
    measure = crowdpose_figures if file.is_crowdpose else coco_figures
    return measure(file, results, sigmas)


def person_results(
    people: People,
    predictions: Predictions,
    *,
    rescore: float = 0.2,
    nms: float = 0.9,
    rle: bool = False,
    input_size: Size = (256, 192),
) -> list[dict[str, Any]]:
    """COCO's {image_id, category_id, keypoints, score} of every person kept, image by image, best first.

    A person's score is `scoring.rescore` with the threshold `rescore`, or with `rle` mmpose's for regressed key points.
    Of two persons more alike than an OKS of `nms`, the better stays; their areas are those of the crops for the
    network's `input_size`, (height, width), as in mmpose.
    Errors: PoseError for other shapes, NaN, rows that `people` does not have, or a skeleton without sigmas.
    """
    sigmas = require_sigmas(people.skeleton, None, "person_results")
    keypoints, scores, rows = _once(people, predictions)
    box_scores = people.box_scores[rows]
    totals = rescore_rle(scores, box_scores) if rle else rescored(scores, box_scores, rescore)
    areas = (center_and_scale(people.boxes[rows], input_size)[1] * PIXELS_PER_SCALE).prod(-1)
    found = torch.cat((keypoints, scores[..., None]), -1)  # [N, K, 3]
    results: list[dict[str, Any]] = []
    image_index = people.image_index[rows]
    order = image_index.argsort(stable=True)
    for here in order.split(torch.unique(image_index, return_counts=True)[1].tolist()):
        kept = here[oks_nms(found[here], totals[here], areas[here], sigmas=sigmas, threshold=nms)]
        image_id = int(people.image_ids[image_index[here[0]]])
        for values, score in zip(found[kept].flatten(1).tolist(), totals[kept].tolist(), strict=True):
            results.append(
                {"image_id": image_id, "category_id": people.category_id, "keypoints": values, "score": score}
            )
    return results


def coco_ap(
    annotations: Path, results: Sequence[Mapping[str, Any]], *, sigmas: Sequence[float] | None = None
) -> dict[str, float]:
    """AP, AP50, AP75, APM, APL and AR likewise, by pycocotools, over all images of the file.

    -1 stands for a figure without any person. M and L are persons of 32² to 96² and above 96² pixels. `sigmas` takes
    the place of the file's own, for files without: such figures hold for those sigmas only.
    Errors: PoseError for a file that cannot be read or has no sigmas, or results that do not fit it.
    """
    file = read_annotations(annotations)
    return coco_figures(file, results, require_sigmas(file.skeleton, sigmas, "coco_ap"))


def coco_figures(
    file: AnnotationFile, results: Sequence[Mapping[str, Any]], sigmas: Sequence[float]
) -> dict[str, float]:
    """`coco_ap` of a file that has been read."""
    truth = ground_truth(file, area_from_box=False)
    evaluator = run(COCOeval(truth, detections(file, truth, results), "keypoints"), sigmas)
    return dict(zip(NAMES, map(float, evaluator.stats), strict=True))


def pck_of(people: People, predictions: Predictions, threshold: float = 0.05) -> Pck:
    """Share of labelled key points predicted nearer than `threshold` times the longer side of the person's box.

    Needs ground-truth boxes: PoseError for a detector's, which have no key points to compare with.
    """
    if people.source == DETECTOR:
        raise PoseError("pck_of: a detector's boxes have no key points to compare with; read_people without boxes=")
    keypoints, _, rows = _once(people, predictions)
    true = people.keypoints[rows]
    labelled = true[..., 2] > 0
    distance = (keypoints - true[..., :2]).norm(dim=-1)  # [N, K]
    near = distance < threshold * people.boxes[rows, 2:].amax(-1, keepdim=True)
    by_keypoint = (near & labelled).sum(0) / labelled.sum(0)
    return Pck(by_keypoint, by_keypoint.nanmean())


def write_results(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """`results` as the JSON list that COCO's test server takes, zipped and named
    person_keypoints_test-dev2017_<name>_results.json.

    Errors: PoseError where there is such a file already, or for NaN; RunError where it cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise PoseError(f"write_results: {path} is there already, and stays: choose another name or remove it")
    try:
        text = json.dumps(list(results), allow_nan=False)
    except ValueError as error:
        raise PoseError(f"write_results: the results have NaN or infinity, and {path} is not written") from error
    write_atomically(path, text.encode())


def _once(people: People, predictions: Predictions) -> Predictions:
    """On the CPU, checked, and the first of every row, in the order of rows."""
    keypoints, scores, rows = (each.detach().cpu() for each in predictions)
    count, joints = len(rows), len(people.skeleton.names)
    check_shape("predictions.keypoints", keypoints, count, joints, 2)
    check_shape("predictions.scores", scores, count, joints)
    if count == 0 or rows.min() < 0 or rows.max() >= len(people):
        seen = f"from {int(rows.min())} to {int(rows.max())}" if count else "none"
        raise PoseError(f"predictions.rows are {seen}: they are places in the {len(people)} people, from 0")
    finite = keypoints.isfinite().all(-1).all(-1) & scores.isfinite().all(-1)
    if not finite.all():
        raise PoseError(
            f"predictions of {int((~finite).sum())} persons, such as row {int(rows[~finite][0])}, are NaN or infinite: "
            "has the model diverged? Persons without a prediction are left out, rows and all"
        )
    order = rows.argsort(stable=True)
    rows = rows[order]
    first = torch.cat((rows.new_ones(1), rows.diff())) > 0
    chosen = order[first]
    return Predictions(full_precision(keypoints[chosen]), full_precision(scores[chosen]), rows[first])
