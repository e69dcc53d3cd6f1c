"""From predictions to figures: persons kept and scored, AP of COCO, CrowdPose and own key points, PCK, result files."""

from __future__ import annotations

import json
from copy import deepcopy
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO as PublishedCoco
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.tokenpose.data.people import People, find_split, read_people
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.evaluation.crowdpose import crowdpose_ap
from cyclekd.integrations.tokenpose.evaluation.precision import (
    NAMES,
    Predictions,
    coco_ap,
    evaluate,
    pck_of,
    person_results,
    write_results,
)
from cyclekd.integrations.tokenpose.skeletons import COCO, CROWDPOSE, Skeleton
from golden import FOLDER, golden_json

COCO_MINI = FOLDER.parent / "data/coco-mini"
LOST = torch.tensor([0.0, torch.nan])[:, None, None]
CORNERS = Skeleton(("left_a", "right_a", "b"), ((0, 1),), (0.1, 0.1, 0.2), (), ())


def pose(skeleton: Skeleton, number: int, offset: float = 0.0) -> list[float]:
    """Key points of one figure as x, y, visibility, ..., the first of every fourth not labelled."""
    values: list[float] = []
    for k in range(len(skeleton.names)):
        x, y = 40 + 130 * number + (37 * k) % 83 + offset, 60 + (53 * k) % 131 + offset / 2
        values += [0, 0, 0] if k == number % 4 == 0 else [x, y, 1 + k % 2]
    return values


def content(skeleton: Skeleton = COCO, persons: int = 4, images: int = 3, **image: Any) -> dict[str, Any]:
    """`persons` per image, the last of image 2 a crowd and of image 3 without labels."""
    annotations = []
    for image_id in range(1, images + 1):
        for number in range(persons):
            box = [35.0 + 130 * number, 55.0, 95.0 - 20 * number, 140.0]
            person = {"image_id": image_id, "category_id": 1, "bbox": box, "area": 0.6 * box[2] * box[3], "iscrowd": 0}
            person |= {"id": len(annotations) + 1, "keypoints": pose(skeleton, number)}
            last = number == persons - 1
            if last and image_id == 2:
                person["iscrowd"] = 1
            if last and image_id == 3:
                person["keypoints"] = [0] * (3 * len(skeleton.names))
            person["num_keypoints"] = sum(v > 0 for v in person["keypoints"][2::3])
            annotations.append(person)
    category = {"id": 1, "name": "person", "keypoints": list(skeleton.names), "sigmas": list(skeleton.sigmas)}
    records = [{"id": i, "file_name": f"{i}.png", "height": 240, "width": 640} | image for i in range(1, images + 1)]
    return {"images": records, "annotations": annotations, "categories": [category]}


def found(skeleton: Skeleton = COCO, persons: int = 4, images: int = 3) -> list[dict[str, Any]]:
    """Results that are some good, some bad, and two of one person."""
    results = []
    for image_id in range(1, images + 1):
        for number in [*range(persons), 0]:
            values = pose(skeleton, number, offset=1.7 * ((3 * len(results)) % 7))
            values[2::3] = [0.9] * len(skeleton.names)
            score = 0.3 + ((7 * len(results)) % 11) / 20
            results.append({"image_id": image_id, "category_id": 1, "keypoints": values, "score": score})
    return results


def write(folder: Path, data: object, name: str = "annotations.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(data))
    return path


def read(folder: Path, data: dict[str, Any], **others: Any) -> People:
    for image in data["images"]:
        Image.new("RGB", (1, 1)).save(folder / image["file_name"])
    return read_people(write(folder, data), folder, for_training=False, **others)


def perfect(people: People) -> Predictions:
    visible = (people.keypoints[..., 2] > 0).float()
    return Predictions(people.keypoints[..., :2], visible, torch.arange(len(people)))


def as_published(annotations: Path, results: list[dict[str, Any]]) -> list[float]:
    """pycocotools on the file itself, as its documentation uses it."""
    truth = PublishedCoco(str(annotations))
    evaluator = COCOeval(truth, truth.loadRes(deepcopy(results)), "keypoints")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.stats.tolist()


# -- the published figures --------------------------------------------------------------------------------------


def test_coco_figures_equal_the_published_ones() -> None:
    expected, results = golden_json("coco_ap"), golden_json("coco_dt")
    figures = coco_ap(FOLDER / "coco_gt.json", results)
    assert list(figures) == list(NAMES)
    assert list(figures.values()) == pytest.approx(expected["coco.pycocotools"], abs=1e-12)


def test_crowdpose_figures_equal_the_published_ones() -> None:
    expected, results = golden_json("coco_ap")["crowdpose.xtcocotools"], golden_json("crowdpose_dt")
    assert crowdpose_ap(FOLDER / "crowdpose_gt.json", results) == pytest.approx(expected, abs=1e-12)


def test_coco_figures_equal_those_of_pycocotools_on_the_file_itself(tmp_path: Path) -> None:
    data, results = content(), found()
    data["annotations"][0]["area"] = 0  # not to be found, and to be found all the same
    annotations = write(tmp_path, data)
    expected = as_published(annotations, results)
    assert 0.1 < expected[0] < 0.9 and len(set(expected)) > 5
    assert list(coco_ap(annotations, results).values()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="the COCO photographs are not on this machine")
def test_figures_on_real_files_equal_those_of_pycocotools() -> None:
    people = read_people(*find_split(COCO_MINI, "val"), for_training=False)
    keypoints = people.keypoints[..., :2] + 3 * torch.sin(torch.arange(len(people) * 34.0)).view(-1, 17, 2)
    predictions = Predictions(keypoints, perfect(people).scores, torch.arange(len(people)))
    figures = evaluate(people, predictions).figures
    expected = as_published(people.annotations, person_results(people, predictions))
    assert list(figures.values()) == pytest.approx(expected, abs=1e-12) and 0.2 < figures["AP"] < 0.95
    assert evaluate(people, perfect(people)).figures["AP"] > 0.98


# -- average precision ------------------------------------------------------------------------------------------


def test_perfect_results_score_one_and_none_score_zero(tmp_path: Path) -> None:
    people = read(tmp_path, content())
    assert coco_ap(people.annotations, person_results(people, perfect(people)))["AP"] == pytest.approx(1)
    assert coco_ap(people.annotations, [])["AP"] == 0 == coco_ap(people.annotations, [])["AR"]


def test_evaluation_prints_nothing_and_leaves_results_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, results = write(tmp_path, content()), found()
    before = deepcopy(results)
    coco_ap(annotations, results)
    crowdpose_ap(write(tmp_path, content(CROWDPOSE, crowdIndex=0.5)), found(CROWDPOSE))
    assert results == before and capsys.readouterr().out == ""


def test_a_person_of_id_0_can_be_found(tmp_path: Path) -> None:
    data, results = content(), found()
    expected = coco_ap(write(tmp_path, data), results)
    for person in data["annotations"]:
        person["id"] -= 1
    assert coco_ap(write(tmp_path, data), results) == expected


def test_fields_that_own_files_often_lack_are_made_up_for(tmp_path: Path) -> None:
    data, results = content(CORNERS, persons=2, images=1), found(CORNERS, persons=2, images=1)
    for person in data["annotations"]:
        person["area"] = 0.53 * person["bbox"][2] * person["bbox"][3]
    expected = coco_ap(write(tmp_path, data), results)
    for person in data["annotations"]:
        for name in ("area", "iscrowd", "num_keypoints", "category_id"):
            person[name] = None
    data["annotations"][0]["num_keypoints"] = "0"
    for person in data["annotations"]:
        del person["category_id"]
    assert 0 < expected["AP"] and coco_ap(write(tmp_path, data), results) == expected
    for person in data["annotations"]:
        for name in ("area", "iscrowd", "num_keypoints"):
            del person[name]
    assert coco_ap(write(tmp_path, data), results) == expected


def test_a_person_with_one_hidden_key_point_is_to_be_found(tmp_path: Path) -> None:
    data = one_per_image(CORNERS)
    results = displaced(CORNERS, 0.999, data["annotations"][0]["area"])
    data["annotations"][0]["keypoints"] = [50, 60, 1] + [0] * 6
    data["annotations"][1]["keypoints"] = [0] * 3 + [50, 60, 1] + [0] * 3
    for person in data["annotations"]:
        del person["num_keypoints"]
    assert coco_ap(write(tmp_path, data), results[2:])["AR"] == pytest.approx(1 / 3)


def test_a_person_without_the_field_of_key_points_need_not_be_found(tmp_path: Path) -> None:
    data = one_per_image(CORNERS)
    results = displaced(CORNERS, 0.999, data["annotations"][0]["area"])
    for name in ("keypoints", "num_keypoints"):
        del data["annotations"][0][name]
    assert coco_ap(write(tmp_path, data), results[1:])["AR"] == pytest.approx(1)


def displaced(skeleton: Skeleton, similarity: float, area: float) -> list[dict[str, Any]]:
    """Results for one person per image whose every key point is off so far that the OKS is `similarity`."""
    results = found(skeleton, persons=1, images=3)[::2]
    for result in results:
        values = pose(skeleton, 1)
        for k, sigma in enumerate(skeleton.sigmas):
            values[3 * k] += (-2 * area * log(similarity)) ** 0.5 * 2 * sigma
        result["keypoints"] = values
    return results


def one_per_image(skeleton: Skeleton, **image: Any) -> dict[str, Any]:
    data = content(skeleton, persons=1, images=3, **image)
    for person in data["annotations"]:
        person |= {"keypoints": pose(skeleton, 1), "iscrowd": 0, "num_keypoints": len(skeleton.names)}
    return data


@pytest.mark.parametrize("similarity", [0.52, 0.77, 0.97])
def test_own_key_points_are_measured_with_the_files_sigmas_and_areas(tmp_path: Path, similarity: float) -> None:
    data = one_per_image(CORNERS)
    results = displaced(CORNERS, similarity, data["annotations"][0]["area"])
    passed = sum(similarity >= 0.5 + 0.05 * step for step in range(10))
    assert coco_ap(write(tmp_path, data), results)["AP"] == pytest.approx(passed / 10)
    twice = [2 * sigma for sigma in CORNERS.sigmas]
    passed = sum(exp(log(similarity) / 4) >= 0.5 + 0.05 * step for step in range(10))
    assert coco_ap(write(tmp_path, data), results, sigmas=twice)["AP"] == pytest.approx(passed / 10)


def test_key_points_without_sigmas_are_not_measured_unless_sigmas_are_given(tmp_path: Path) -> None:
    data, results = one_per_image(CORNERS), displaced(CORNERS, 0.77, 1000)
    del data["categories"][0]["sigmas"]
    annotations = write(tmp_path, data)
    expected = r"coco_ap: these 3 key points have no sigmas.* pass sigmas=\[0.05\] \* 3 to treat all alike"
    with pytest.raises(PoseError, match=expected):
        coco_ap(annotations, results)
    assert coco_ap(annotations, results, sigmas=[0.05] * 3)["AP"] >= 0
    with pytest.raises(PoseError, match=r"coco_ap: sigmas are 3 numbers above 0"):
        coco_ap(annotations, results, sigmas=[0.05] * 17)
    people = read(tmp_path, data)
    with pytest.raises(PoseError, match=r"person_results: these 3 key points have no sigmas"):
        person_results(people, perfect(people))
    people = read(tmp_path, data, sigmas=[0.05] * 3)
    assert evaluate(people, perfect(people)).figures["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 9}, r"result 1 is of image 9, which .*annotations.json does not have: evaluate with the annot"),
        ({"image_id": "1"}, r"result 1 is of image '1', which .* does not have: ids are whole numbers, such as 7"),
        ({"category_id": 2}, r"result 1 has category_id 2, and persons in .* have 1"),
        ({"keypoints": [1.0] * 42}, r"result 1 needs 17 key points as a list of 51 numbers"),
        ({"keypoints": [float("nan")] * 51}, r"result 1 has NaN or infinity"),
        ({"keypoints": np.ones(51)}, r"result 1 needs 17 key points as a list of 51 numbers, .*tolist\(\)"),
        ({"keypoints": [10**400] * 51}, r"result 1 has NaN or infinity"),
        ({"score": float("nan")}, r"result 1 has NaN or infinity"),
        ({"score": None}, r"result 1 has the score None: it is a number"),
        ({"score": np.float32(0.5)}, r"result 1 has the score .*: it is a number, as item\(\) makes it of an array"),
    ],
)
def test_results_that_do_not_fit_the_file_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    results = found()
    results[1] |= change
    with pytest.raises(PoseError, match=message):
        coco_ap(write(tmp_path, content()), results)
    with pytest.raises(PoseError, match=r"result 0 is 'results.json': results are \{image_id, category_id, keypoints"):
        coco_ap(write(tmp_path, content()), ["results.json"])


def test_persons_that_cannot_be_compared_are_no_ground_truth(tmp_path: Path) -> None:
    data, results = content(), found()
    kept = deepcopy(data)
    del kept["annotations"][0], kept["annotations"][4]
    expected = coco_ap(write(tmp_path, kept), results)
    for change in ({"area": float("inf")}, {"bbox": [0, 0, 1e39, 5]}, {"bbox": None}, {"image_id": 9}):
        first = deepcopy(data)
        first["annotations"][0] |= change
        del first["annotations"][5]
        assert coco_ap(write(tmp_path, first), results) == expected
    data["annotations"][0]["keypoints"][0] = float("nan")
    data["annotations"][5]["keypoints"] = [1, 2, 2]
    assert coco_ap(write(tmp_path, data), results) == expected
    for person in data["annotations"]:
        person["keypoints"] = [1, 2, 2]
    with pytest.raises(PoseError, match=r"none of its 12 persons has a box and 17 key points to compare with"):
        coco_ap(write(tmp_path, data), results)


# -- CrowdPose --------------------------------------------------------------------------------------------------


def crowded(*crowd_indices: float) -> dict[str, Any]:
    data = one_per_image(CROWDPOSE)
    for image, crowd_index in zip(data["images"], crowd_indices, strict=True):
        image["crowdIndex"] = crowd_index
    return data


def test_crowdpose_splits_images_at_02_and_08(tmp_path: Path) -> None:
    results = displaced(CROWDPOSE, 0.999, 100)
    figures = crowdpose_ap(write(tmp_path, crowded(0.19, 0.2, 0.8)), [results[0], results[2]])
    assert (figures["AP_easy"], figures["AP_medium"], figures["AP_hard"]) == (1, 0, 1)
    figures = crowdpose_ap(write(tmp_path, crowded(0.19, 0.79, 0.79)), results[:2])
    assert figures["AP_easy"] == 1 and 0 < figures["AP_medium"] < 1 and figures["AP_hard"] == -1
    assert figures["AP_medium"] == round(51 / 101, 4)  # half found: 51 of 101 recall thresholds, to 4 decimals


@pytest.mark.parametrize("similarity", [0.52, 0.77, 0.97])
def test_crowdpose_takes_053_of_the_box_for_the_area(tmp_path: Path, similarity: float) -> None:
    data = crowded(0.5, 0.5, 0.5)
    box = data["annotations"][0]["bbox"]
    results = displaced(CROWDPOSE, similarity, 0.53 * box[2] * box[3])
    for person in data["annotations"]:
        person["area"] = 1.0  # not used
    figures = crowdpose_ap(write(tmp_path, data), results)
    passed = sum(similarity >= 0.5 + 0.05 * step for step in range(10))
    assert figures["AP"] == pytest.approx(passed / 10) == figures["AR"]
    assert (figures["AP50"], figures["AP75"]) == (1, similarity > 0.75) == (figures["AR50"], figures["AR75"])


def test_crowdpose_leaves_out_persons_without_a_visible_key_point(tmp_path: Path) -> None:
    data, results = crowded(0.5, 0.5, 0.5), displaced(CROWDPOSE, 0.999, 100)
    data["annotations"][2]["num_keypoints"] = 0  # though hidden ones are labelled
    assert crowdpose_ap(write(tmp_path, data), results[:2])["AR"] == pytest.approx(1)


def test_files_that_do_not_say_how_crowded_images_are_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PoseError, match=r"image 1 of .* has no crowdIndex; for other files use coco_ap"):
        crowdpose_ap(write(tmp_path, content(CROWDPOSE)), found(CROWDPOSE))
    with pytest.raises(PoseError, match=r"image 2 of .* has no crowdIndex"):
        crowdpose_ap(write(tmp_path, crowded(0.1, float("nan"), 0.9)), found(CROWDPOSE))


# -- persons kept and scored ------------------------------------------------------------------------------------


def predictions_of(people: People) -> Predictions:
    """Two processes' shares in turn, with two rows twice; the persons of an image resemble each other, more or less."""
    count, joints = len(people), len(people.skeleton.names)
    rows = torch.tensor([*range(1, count, 2), *range(0, count, 2), 1, 0])
    row, k = rows[:, None].double(), torch.arange(joints, dtype=torch.float64)
    x = 100 + 40 * torch.sin(k + row // 2) + (row % 2) * 3 * torch.sin(k)
    y = 120 + 60 * torch.cos(2 * k) + (row % 2) * 2 * torch.cos(k)
    scores = 0.45 + 0.5 * torch.sin(3 * k + row)
    keypoints = torch.stack((x, y), -1)
    keypoints[-2:] += 50  # not used: the rows are there already
    return Predictions(keypoints.float(), scores.float(), rows)


def plain_results(people: People, predictions: Predictions) -> dict[int, list[tuple[float, int]]]:
    """Image id to the (score, row) kept, best first: what mmpose does, person by person."""
    first: dict[int, int] = {}
    for place, row in enumerate(predictions.rows.tolist()):
        first.setdefault(row, place)
    persons: dict[int, list[tuple[float, int]]] = {}
    for row, place in sorted(first.items()):
        sure = [score for score in predictions.scores[place].tolist() if score > 0.2]
        score = people.box_scores[row].item() * (sum(sure) / len(sure) if sure else 0.0)
        image_id = int(people.image_ids[people.image_index[row]])
        persons.setdefault(image_id, []).append((score, row))
    kept: dict[int, list[tuple[float, int]]] = {}
    for image_id, candidates in persons.items():
        for score, row in sorted(candidates, key=lambda each: -each[0]):
            here = (predictions.keypoints[first[row]], crop_area(people.boxes[row]))
            others = [(predictions.keypoints[first[r]], crop_area(people.boxes[r])) for _, r in kept.get(image_id, [])]
            if all(similarity(here, other, people.skeleton.sigmas) <= 0.9 for other in others):
                kept.setdefault(image_id, []).append((score, row))
    return kept


def crop_area(box: Tensor) -> float:
    width, height = box[2].item(), box[3].item()
    width = max(width, 0.75 * height)
    return 1.25 * width * 1.25 * width / 0.75


def similarity(a: tuple[Tensor, float], b: tuple[Tensor, float], sigmas: tuple[float, ...]) -> float:
    area = (a[1] + b[1]) / 2
    terms = [
        exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * area * (2 * sigma) ** 2))
        for (x, y), (u, v), sigma in zip(a[0].tolist(), b[0].tolist(), sigmas, strict=True)
    ]
    return sum(terms) / len(terms)


def test_persons_are_scored_and_kept_as_a_plain_loop_does(tmp_path: Path) -> None:
    data = content(persons=6, images=2)
    people = read(tmp_path, data, boxes=write(tmp_path, detected(data), "boxes.json"))
    predictions = predictions_of(people)
    expected, results = plain_results(people, predictions), person_results(people, predictions)
    assert 2 < len(results) < len(people)
    flat = [(image_id, *each) for image_id, kept in sorted(expected.items()) for each in kept]
    assert [result["image_id"] for result in results] == [image_id for image_id, _, _ in flat]
    assert [result["score"] for result in results] == pytest.approx([score for _, score, _ in flat], abs=1e-6)
    for result, (_, _, row) in zip(results, flat, strict=True):
        place = predictions.rows.tolist().index(row)
        values = torch.tensor(result["keypoints"]).view(-1, 3)
        torch.testing.assert_close(values[:, :2], predictions.keypoints[place])
        torch.testing.assert_close(values[:, 2], predictions.scores[place])
        assert result["category_id"] == 1 and set(result) == {"image_id", "category_id", "keypoints", "score"}


def detected(data: dict[str, Any]) -> list[dict[str, Any]]:
    names = ("image_id", "category_id", "bbox")
    return [
        {name: person[name] for name in names} | {"score": 0.5 + (number % 5) / 10}
        for number, person in enumerate(data["annotations"])
    ]


def test_of_two_alike_persons_the_better_stays_and_the_crops_area_tells_how_alike(tmp_path: Path) -> None:
    people = read(tmp_path, content(persons=2, images=1))
    first = people.keypoints[:1, :, :2]
    scores = torch.tensor([[0.5], [0.8]]).expand(2, 17)
    crop = (crop_area(people.boxes[0]) + crop_area(people.boxes[1])) / 2
    for target, kept in ((0.91, [0.8]), (0.89, [0.8, 0.5])):
        moved = first.clone()
        moved[0, :, 0] += (-2 * crop * log(target)) ** 0.5 * 2 * torch.tensor(COCO.sigmas)
        results = person_results(people, Predictions(torch.cat((first, moved)), scores, torch.tensor([0, 1])))
        assert [result["score"] for result in results] == pytest.approx(kept)
    results = person_results(people, Predictions(torch.cat((first, moved)), scores, torch.tensor([0, 1])), nms=0.85)
    assert [result["score"] for result in results] == pytest.approx([0.8])


def test_a_wide_input_makes_wide_crops(tmp_path: Path) -> None:
    people = read(tmp_path, content(persons=2, images=1))
    first = people.keypoints[:1, :, :2]
    crop = (crop_area(people.boxes[0]) + crop_area(people.boxes[1])) / 2
    moved = first.clone()
    moved[0, :, 0] += (-2 * crop * log(0.89)) ** 0.5 * 2 * torch.tensor(COCO.sigmas)
    predictions = Predictions(torch.cat((first, moved)), torch.ones(2, 17), torch.tensor([0, 1]))
    assert len(person_results(people, predictions, input_size=(256, 192))) == 2
    assert len(person_results(people, predictions, input_size=(192, 384))) == 1  # of larger area, hence more alike


def test_key_points_below_the_threshold_do_not_lower_a_score_and_regressed_ones_are_scored_by_their_own_rule(
    tmp_path: Path,
) -> None:
    people = read(tmp_path, content(CORNERS, persons=1, images=1))
    predictions = Predictions(people.keypoints[..., :2], torch.tensor([[0.1, 0.3, 0.8]]), torch.tensor([0]))
    assert person_results(people, predictions)[0]["score"] == pytest.approx(0.55)
    assert person_results(people, predictions, rescore=0.0)[0]["score"] == pytest.approx(0.4)
    assert person_results(people, predictions, rle=True)[0]["score"] == pytest.approx(1 + 0.4 + 0.8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keypoints": torch.zeros(2, 14, 2)}, r"predictions.keypoints takes \[2, 17, 2\], and .* \[2, 14, 2\]"),
        ({"scores": torch.zeros(2, 17, 1)}, r"predictions.scores takes \[2, 17\]"),
        ({"rows": torch.tensor([0])}, r"predictions.keypoints takes \[1, 17, 2\]"),
        ({"rows": torch.tensor([0, 2])}, r"rows are from 0 to 2: they are places in the 2 people, from 0"),
        ({"rows": torch.tensor([-1, 0])}, r"rows are from -1 to 0"),
        ({"keypoints": torch.full((2, 17, 2), torch.nan)}, r"of 2 persons, such as row 0, are NaN or infinite"),
        ({"scores": torch.full((2, 17), torch.inf)}, r"of 2 persons, such as row 0, are NaN or infinite"),
        ({"keypoints": LOST.expand(2, 17, 2)}, r"of 1 persons, such as row 1, are NaN or infinite"),
        ({"scores": LOST.expand(2, 17, 1)[..., 0]}, r"of 1 persons, such as row 1, are NaN or infinite"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    people = read(tmp_path, content(persons=2, images=1))
    with pytest.raises(PoseError, match=message):
        person_results(people, perfect(people)._replace(**change))


def test_no_predictions_are_refused(tmp_path: Path) -> None:
    people = read(tmp_path, content(persons=2, images=1))
    none = Predictions(torch.zeros(0, 17, 2), torch.zeros(0, 17), torch.zeros(0, dtype=torch.long))
    with pytest.raises(PoseError, match=r"predictions.rows are none"):
        person_results(people, none)


# -- figures with their boxes -----------------------------------------------------------------------------------


def test_every_evaluation_says_whose_boxes_it_used(tmp_path: Path) -> None:
    data = content(persons=2, images=1)
    people = read(tmp_path, data)
    evaluation = evaluate(people, perfect(people))
    assert evaluation.boxes == "ground truth" and evaluation.persons == 2
    assert str(evaluation).endswith("(2 ground truth boxes)") and str(evaluation).startswith("AP 1.0000, AP50 1.0000")
    detector = read(tmp_path, data, boxes=write(tmp_path, detected(data), "boxes.json"))
    evaluation = evaluate(detector, perfect(people))
    assert evaluation.boxes == "detector" and evaluation.figures["AP"] == pytest.approx(1)
    assert str(evaluation).endswith("(2 detector boxes)")


def test_an_evaluation_is_the_average_precision_of_the_persons_kept_by_its_settings(tmp_path: Path) -> None:
    data = content(persons=4, images=3)
    people = read(tmp_path, data, boxes=write(tmp_path, 2 * detected(data), "boxes.json"))  # everybody twice
    row, k = torch.arange(24.0)[:, None], torch.arange(17.0)
    keypoints = torch.stack([torch.tensor(pose(COCO, number % 4)).view(17, 3)[:, :2] for number in range(24)])
    keypoints += 9 * torch.sin(row[..., None] + k[:, None])
    predictions = Predictions(keypoints, 0.45 + 0.5 * torch.sin(3 * k + row * row), torch.arange(24))
    seen = []
    for settings in ({}, {"rescore": 0.6}, {"rle": True}, {"nms": 0.95}, {"nms": 0.95, "input_size": (64, 192)}):
        usual = {"rescore": 0.2, "nms": 0.9, "rle": False, "input_size": (256, 192)}
        expected = coco_ap(people.annotations, person_results(people, predictions, **(usual | settings)))
        assert evaluate(people, predictions, **settings).figures == expected
        seen.append(expected["AP"])
    assert len({*seen}) == 4 and seen[3] != seen[4] and 0.1 < min(seen)


def test_persons_without_a_prediction_count_as_not_found_and_are_named(tmp_path: Path) -> None:
    people = read(tmp_path, content(persons=2, images=1))
    half = Predictions(*(each[:1] for each in perfect(people)))
    evaluation = evaluate(people, half)
    assert (evaluation.persons, evaluation.without) == (1, 1) and evaluation.figures["AR"] == pytest.approx(0.5)
    assert str(evaluation).endswith("(1 ground truth boxes, 1 more without prediction)")


def test_crowdposes_files_are_evaluated_as_crowdpose(tmp_path: Path) -> None:
    people = read(tmp_path, crowded(0.1, 0.5, 0.9))
    figures = evaluate(people, perfect(people)).figures
    assert figures["AP"] == pytest.approx(1) and figures["AP_easy"] == figures["AP_hard"] == 1 and "APM" not in figures


def test_people_of_another_category_id_are_evaluated_too(tmp_path: Path) -> None:
    data = content(persons=2, images=1)
    data["categories"][0]["id"] = 7
    for person in data["annotations"]:
        person["category_id"] = 7
    people = read(tmp_path, data)
    assert people.category_id == 7 and evaluate(people, perfect(people)).figures["AP"] == pytest.approx(1)


def test_persons_without_a_labelled_key_point_have_no_box_to_predict_and_cost_nothing(tmp_path: Path) -> None:
    data = content(persons=2, images=3)  # the second of image 2 is a crowd, of image 3 without labels
    people = read(tmp_path, data)
    assert len(people) == 4
    evaluation = evaluate(people, perfect(people))
    assert evaluation.figures["AP"] == pytest.approx(1) == evaluation.figures["AR"] and evaluation.without == 0


# -- PCK --------------------------------------------------------------------------------------------------------


def test_pck_counts_labelled_key_points_near_enough_for_the_persons_box(tmp_path: Path) -> None:
    data = content(CORNERS, persons=2, images=1)  # longer sides of 140 px; the first person's first is not labelled
    people = read(tmp_path, data)
    keypoints = people.keypoints[..., :2].clone()
    keypoints[0, 1, 0] += 6.9  # below 0.05 x 140
    keypoints[1, 1, 1] += 7.1
    keypoints[0, 2] += 100
    keypoints[1, 2] += 100
    found = pck_of(people, Predictions(keypoints, torch.ones(2, 3), torch.arange(2)))
    assert found.by_keypoint.tolist() == [1, 0.5, 0] and found.mean.item() == pytest.approx(0.5)
    assert pck_of(people, Predictions(keypoints, torch.ones(2, 3), torch.arange(2)), 0.06).by_keypoint[1] == 1
    padded = Predictions(*(torch.cat((each, each[:1])) for each in (keypoints, torch.ones(2, 3), torch.arange(2))))
    assert pck_of(people, padded).by_keypoint.tolist() == [1, 0.5, 0]


def test_pck_of_a_key_point_that_nobody_has_is_not_a_number_and_does_not_count(tmp_path: Path) -> None:
    people = read(tmp_path, content(CORNERS, persons=1, images=1))
    found = pck_of(people, perfect(people))
    assert found.by_keypoint.isnan().tolist() == [True, False, False] and found.mean == 1


def test_pck_needs_ground_truth_boxes(tmp_path: Path) -> None:
    data = content(persons=2, images=1)
    people = read(tmp_path, data, boxes=write(tmp_path, detected(data), "boxes.json"))
    with pytest.raises(PoseError, match=r"pck_of: a detector's boxes have no key points .* without boxes="):
        pck_of(people, perfect(people))


# -- result files -----------------------------------------------------------------------------------------------


def test_a_result_file_is_the_list_that_pycocotools_reads(tmp_path: Path) -> None:
    annotations, results = write(tmp_path, content()), found()
    path = tmp_path / "person_keypoints_test-dev2017_tiny_results.json"
    write_results(path, results)
    assert json.loads(path.read_text()) == results
    assert len(PublishedCoco(str(annotations)).loadRes(str(path)).anns) == len(results)


def test_a_result_file_replaces_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "mine", "results.json")
    with pytest.raises(PoseError, match=r"results.json is there already, and stays: choose another name or remove it"):
        write_results(path, found())
    assert path.read_text() == '"mine"'


def test_results_with_nan_or_without_a_folder_are_not_written(tmp_path: Path) -> None:
    results = found()
    with pytest.raises(RunError, match=r"cannot write .*results.json"):
        write_results(tmp_path / "none/results.json", results)
    results[0]["score"] = float("nan")
    with pytest.raises(PoseError, match=r"results have NaN or infinity, and .*results.json is not written"):
        write_results(tmp_path / "results.json", results)
    assert not list(tmp_path.iterdir())
