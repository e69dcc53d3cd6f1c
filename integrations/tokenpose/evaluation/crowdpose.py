"""CrowdPose's average precision: pycocotools with areas from boxes, and AP by how crowded an image is.

CrowdPose (arXiv:1812.00324) names 0.1 and 0.8 as the bounds of its three splits; published figures use 0.2 and 0.8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cyclekd.integrations.tokenpose.data.annotations import AnnotationFile, read_annotations, require_sigmas
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.evaluation.matching import detections, ground_truth, run

EASY_BELOW, MEDIUM_BELOW = 0.2, 0.8


def crowdpose_ap(
    annotations: Path, results: Sequence[Mapping[str, Any]], *, sigmas: Sequence[float] | None = None
) -> dict[str, float]:
    """AP, AP50, AP75, AR, AR50 and AR75, and AP_easy, AP_medium and AP_hard by the images' crowdIndex.

    As xtcocotools gives them ("keypoints_crowd", without areas): the last three are rounded to 4 decimals, and -1 where
    a split has no persons. `sigmas` takes the place of the file's own.
    Errors: PoseError for a file that cannot be read, images without crowdIndex, results that do not fit the file.
    """
    file = read_annotations(annotations)
    return crowdpose_figures(file, results, require_sigmas(file.skeleton, sigmas, "crowdpose_ap"))


def crowdpose_figures(
    file: AnnotationFile, results: Sequence[Mapping[str, Any]], sigmas: Sequence[float]
) -> dict[str, float]:
    """`crowdpose_ap` of a file that has been read."""
    crowding = {key: image.get("crowdIndex") for key, image in file.images.items()}
    for key, crowd_index in crowding.items():
        if type(crowd_index) not in (int, float) or not isfinite(crowd_index):
            raise PoseError(f"crowdpose_ap: image {key} of {file.path} has no crowdIndex; for other files use coco_ap")
    truth = ground_truth(file, area_from_box=True)
    evaluator = run(CrowdPoseEval(truth, detections(file, truth, results), crowding), sigmas)
    return dict(zip(evaluator.names, map(float, evaluator.stats), strict=True))


class CrowdPoseEval(COCOeval):
    """COCO's evaluation of key points over all areas at once; `stats` are nine, called `names`."""

    names = ("AP", "AP50", "AP75", "AR", "AR50", "AR75", "AP_easy", "AP_medium", "AP_hard")

    def __init__(self, truth: COCO, found: COCO, crowding: Mapping[int, float]) -> None:
        super().__init__(truth, found, "keypoints")
        self.params.areaRng, self.params.areaRngLbl = [[0, 1e10]], ["all"]
        self.crowding = crowding

    def summarize(self) -> None:
        precision, recall = self.eval["precision"], self.eval["recall"]  # [10 thresholds, ...], from 0.5 by 0.05
        # of one category and one range of areas all entries are -1, where nobody is to be found, or none is
        whole = [each[rows].mean() for each in (precision, recall) for rows in (slice(None), [0], [5])]
        bounds = ((-np.inf, EASY_BELOW), (EASY_BELOW, MEDIUM_BELOW), (MEDIUM_BELOW, np.inf))
        self.stats = np.array([*whole, *(round(self._precision_between(low, high).mean(), 4) for low, high in bounds)])

    def _precision_between(self, low: float, high: float) -> NDArray[np.float64]:
        part, inside = copy(self), [low <= self.crowding[key] < high for key in self.params.imgIds]
        part.params = copy(self.params)
        part.params.imgIds = [key for key, keep in zip(self.params.imgIds, inside, strict=True) if keep]
        part._paramsEval = part.params
        # one category and one range of areas, so that there is one entry per image
        part.evalImgs = [each for each, keep in zip(self.evalImgs, inside, strict=True) if keep]
        part.accumulate()
        return part.eval["precision"]
