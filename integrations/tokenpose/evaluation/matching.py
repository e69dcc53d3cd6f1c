"""pycocotools made ready for key points: ground truth and detections from our files, checked, and prints silenced.

Checked, because pycocotools takes NaN for a perfect match, an annotation of id 0 for not found, and stops at a field
that is not there.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from math import isfinite
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cyclekd.integrations.tokenpose.data.annotations import AREA_PER_BOX, AnnotationFile, Record, area_of, numbers
from cyclekd.integrations.tokenpose.errors import PoseError


def ground_truth(file: AnnotationFile, *, area_from_box: bool) -> COCO:
    """The file's persons; with `area_from_box` their areas are 0.53 of their boxes, whatever the file says.

    Persons without a box, with other than K key points or with NaN cannot be compared, and are left out as they are in
    `read_people`. Errors: PoseError where nobody is left.
    """
    persons = [person for each in file.persons if (person := _person(file, each, area_from_box))]
    if not persons:
        raise PoseError(
            f"{file.path}: none of its {len(file.persons)} persons has a box and {len(file.skeleton.names)} key points "
            "to compare with; COCO's test images are evaluated by its server, see write_results"
        )
    return _indexed(file, [{**person, "id": number} for number, person in enumerate(persons, start=1)])


def detections(file: AnnotationFile, truth: COCO, results: Sequence[Mapping[str, Any]]) -> COCO:
    """`results` for comparison with `truth`. Errors: PoseError for one of an unknown image, other than K, or NaN."""
    for number, result in enumerate(results):
        _check_result(file, number, result)
    if not results:
        return _indexed(file, [])  # loadRes looks at the first
    names = ("image_id", "category_id", "keypoints", "score")
    with silence():
        return truth.loadRes([{name: result[name] for name in names} for result in results])


def run(evaluator: COCOeval, sigmas: Sequence[float]) -> COCOeval:
    """The evaluator after evaluate, accumulate and summarize, with these sigmas."""
    evaluator.params.kpt_oks_sigmas = np.array(sigmas)
    with silence():
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def silence() -> redirect_stdout[io.StringIO]:
    """pycocotools prints its progress and its tables."""
    return redirect_stdout(io.StringIO())


def _indexed(file: AnnotationFile, annotations: list[Record]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": key} for key in file.images],
        "categories": [{"id": file.category_id}],
        "annotations": annotations,
    }
    with silence():
        coco.createIndex()
    return coco


def _person(file: AnnotationFile, person: Record, area_from_box: bool) -> Record | None:
    count = 3 * len(file.skeleton.names)
    box, keypoints = numbers(person.get("bbox"), 4), numbers(person.get("keypoints", [0] * count), count)
    if box is None or keypoints is None or not _knows(file, person):
        return None
    area = AREA_PER_BOX * box[2] * box[3] if area_from_box else area_of(person, box)
    if not isfinite(sum(box) + sum(keypoints) + area):
        return None
    labelled = sum(visibility > 0 for visibility in keypoints[2::3])
    return {
        "image_id": person["image_id"],
        "category_id": file.category_id,
        "bbox": box,
        "keypoints": keypoints,
        "area": area,
        "iscrowd": int(bool(person.get("iscrowd"))),
        "num_keypoints": person.get("num_keypoints", labelled),  # CrowdPose counts visible ones only
    }


def _knows(file: AnnotationFile, record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("image_id"), int) and record["image_id"] in file.images


def _check_result(file: AnnotationFile, number: int, result: Mapping[str, Any]) -> None:
    count = len(file.skeleton.names)
    if not _knows(file, result):
        raise PoseError(
            f"result {number} is of image {result.get('image_id')!r}, which {file.path} does not have: evaluate "
            "with the annotations that the persons were read from"
        )
    if result.get("category_id") != file.category_id:
        raise PoseError(
            f"result {number} has category_id {result.get('category_id')!r}, and persons in {file.path} have "
            f"{file.category_id}"
        )
    keypoints = numbers(result.get("keypoints"), 3 * count)
    if keypoints is None:
        raise PoseError(f"result {number} needs {count} key points as a list of {3 * count} numbers, x, y, score, ...")
    if not isfinite(sum(keypoints)) or not isfinite(result.get("score", float("nan"))):
        raise PoseError(f"result {number} has NaN or infinity: the model that predicted it may have diverged")
