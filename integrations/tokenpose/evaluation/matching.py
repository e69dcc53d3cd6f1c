"""pycocotools made ready for key points: ground truth and detections from our files, checked, and prints silenced.

Checked, because pycocotools takes NaN for a perfect match, an annotation of id 0 for not found, and stops at a field
that is not there.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cyclekd.integrations.tokenpose.data.annotations import (
    AREA_PER_BOX,
    AnnotationFile,
    Record,
    are_lengths,
    area_of,
    is_area,
    is_id,
    numbers,
)
from cyclekd.integrations.tokenpose.errors import PoseError


def ground_truth(file: AnnotationFile, *, area_from_box: bool) -> COCO:
    """The file's persons; with `area_from_box` their areas are 0.53 of their boxes, whatever the file says.

    Persons without a box, with other than K key points or with NaN cannot be compared, and are left out as they are in
    `read_people`. Crowds, and persons without a labelled key point, neither have to be found nor count as mistakes.
    Errors: PoseError where nobody is left.
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
    checked = [_result(file, number, result) for number, result in enumerate(results)]
    if not checked:
        return _indexed(file, [])  # loadRes looks at the first
    with silence():
        return truth.loadRes(checked)


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
    if box is None or keypoints is None or not file.has_image(person.get("image_id")):
        return None
    area = AREA_PER_BOX * box[2] * box[3] if area_from_box else area_of(person, box)
    if not (are_lengths(box) and are_lengths(keypoints) and is_area(area)):
        return None
    labelled = sum(visibility > 0 for visibility in keypoints[2::3])
    given = person.get("num_keypoints")  # CrowdPose counts visible ones only
    return {
        "image_id": person["image_id"],
        "category_id": file.category_id,
        "bbox": box,
        "keypoints": keypoints,
        "area": area,
        "iscrowd": int(bool(person.get("iscrowd"))),
        "num_keypoints": given if isinstance(given, int) else labelled,
    }


def _result(file: AnnotationFile, number: int, result: Mapping[str, Any]) -> Record:
    """What of it is compared, as plain numbers."""
    if not isinstance(result, Mapping):
        raise PoseError(f"result {number} is {result!r}: results are {{image_id, category_id, keypoints, score}}")
    image_id, count = result.get("image_id"), len(file.skeleton.names)
    if not file.has_image(image_id):
        hint = "evaluate with the annotations that the persons were read from"
        raise PoseError(
            f"result {number} is of image {image_id!r}, which {file.path} does not have: "
            + (hint if is_id(image_id) else "ids are whole numbers, such as 7")
        )
    if result.get("category_id") != file.category_id:
        raise PoseError(
            f"result {number} has category_id {result.get('category_id')!r}, and persons in {file.path} have "
            f"{file.category_id}"
        )
    keypoints, score = numbers(result.get("keypoints"), 3 * count), result.get("score")
    if keypoints is None:
        raise PoseError(
            f"result {number} needs {count} key points as a list of {3 * count} numbers, x, y, score, ..., as tolist() "
            "makes it of an array"
        )
    if numbers([score], 1) is None:
        raise PoseError(f"result {number} has the score {score!r}: it is a number, as item() makes it of an array")
    if not are_lengths([*keypoints, score]):
        raise PoseError(f"result {number} has NaN or infinity: the model that predicted it may have diverged")
    return {"image_id": image_id, "category_id": file.category_id, "keypoints": keypoints, "score": score}
