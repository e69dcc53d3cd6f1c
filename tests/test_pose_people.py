"""Annotation files as people: COCO's, CrowdPose's, own key points, and everything that can be wrong with a file."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cyclekd.integrations.tokenpose.data.annotations import read_annotations
from cyclekd.integrations.tokenpose.data.people import People, Skipped, find_split, read_image, read_people
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.skeletons import COCO, CROWDPOSE
from golden import FOLDER

COCO_MINI = FOLDER.parent / "data/coco-mini"
TRIANGLE = ["left_corner", "right_corner", "head"]


def person(key: int, image_id: int = 1, keypoints: list[float] | None = None, **others: Any) -> dict[str, Any]:
    keypoints = [10.5, 20.0, 2, 14.0, 22.0, 1, 0, 0, 0] if keypoints is None else keypoints
    box = [8.0, 10.0, 20.0, 30.0]
    return {"id": key, "image_id": image_id, "category_id": 1, "bbox": box, "keypoints": keypoints} | others


def triangles(*persons: dict[str, Any], **category: Any) -> dict[str, Any]:
    """Three own key points, in two images of 48 x 64 pixels (height x width)."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 48, "width": 64} for i in (1, 2)]
    category = {"id": 1, "name": "person", "keypoints": TRIANGLE, "sigmas": [0.1, 0.1, 0.2]} | category
    return {"images": images, "annotations": list(persons), "categories": [category]}


class Data:
    """A file of annotations beside a folder of images."""

    def __init__(self, folder: Path) -> None:
        self.file, self.images = folder / "annotations.json", folder / "images"
        self.boxes = folder / "boxes.json"
        self.images.mkdir()
        for name in ("1.png", "2.png"):
            Image.new("RGB", (64, 48), (10, 20, 30)).save(self.images / name)

    def read(self, content: object, *, for_training: bool = True, boxes: object = None, **others: Any) -> People:
        self.file.write_text(content if isinstance(content, str) else json.dumps(content))
        if boxes is not None:
            self.boxes.write_text(boxes if isinstance(boxes, str) else json.dumps(boxes))
            others["boxes"] = self.boxes
        return read_people(self.file, self.images, for_training=for_training, **others)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


# -- what is read -----------------------------------------------------------------------------------------------


def test_people_are_read_with_their_images_boxes_and_key_points(data: Data) -> None:
    people = data.read(triangles(person(7, 2), person(5, 1, area=99.5), person(9, 2)))
    assert len(people) == 3 and people.source == "ground truth" and people.annotations == data.file
    assert people.image_ids.tolist() == [2, 1] and people.image_index.tolist() == [0, 1, 0]
    assert people.images == (data.images / "2.png", data.images / "1.png")
    assert people.image_sizes.tolist() == [[48, 64], [48, 64]]
    assert people.boxes[0].tolist() == [8, 10, 20, 30] and people.box_scores.tolist() == [1, 1, 1]
    assert people.keypoints.shape == (3, 3, 3) and people.keypoints[0, 0].tolist() == [10.5, 20, 2]
    assert people.annotation_ids.tolist() == [7, 5, 9]
    assert people.areas.tolist() == pytest.approx([0.53 * 600, 99.5, 0.53 * 600])
    assert people.boxes.dtype == people.keypoints.dtype == torch.float32 and people.image_ids.dtype == torch.int64
    assert str(people.skipped) == "skipped none"


@pytest.mark.parametrize("for_training", [True, False])
def test_crowds_and_persons_without_labels_are_left_out(data: Data, for_training: bool) -> None:
    content = triangles(person(1), person(2, keypoints=[0] * 9), person(3, iscrowd=1), person(4, category_id=2))
    people = data.read(content, for_training=for_training)
    assert people.annotation_ids.tolist() == [1]
    counts = {"of another category": 1, "without a labelled key point": 1, "that are crowds": 1}
    assert people.skipped.counts == counts and people.skipped.total == 3
    assert "1 without a labelled key point (annotation 2)" in str(people.skipped)


def test_a_hidden_key_point_is_a_labelled_one(data: Data) -> None:
    people = data.read(triangles(person(1, keypoints=[5, 6, 1] + [0] * 6)))
    assert people.keypoints[0].tolist() == [[5, 6, 1], [0, 0, 0], [0, 0, 0]]


def test_outlines_are_not_kept(data: Data) -> None:
    data.read(triangles(person(1, segmentation=[[1, 2, 3, 4, 5, 6]])))
    assert "segmentation" not in read_annotations(data.file).persons[0]


def test_skipped_persons_are_counted_with_the_first_three_examples() -> None:
    skipped = Skipped()
    for key in range(5):
        skipped.add("without area", f"annotation {key}")
    skipped.add("that are crowds", "annotation 9")
    assert str(skipped) == (
        "skipped 6: 5 without area (annotation 0, annotation 1, annotation 2, ...); 1 that are crowds (annotation 9)"
    )


def test_ground_truth_boxes_end_at_the_last_pixel_and_a_detectors_do_not(data: Data) -> None:
    box = [-5.0, 20.0, 30.0, 100.0]
    people = data.read(triangles(person(1, bbox=box)))
    assert people.boxes.tolist() == [[0, 20, 30, 27]]
    detected = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5}]
    assert data.read(triangles(person(1)), for_training=False, boxes=detected).boxes.tolist() == [box]


def test_a_detectors_boxes_carry_scores_and_no_key_points(data: Data) -> None:
    boxes = [
        {"image_id": 2, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.25},
        {"image_id": 2, "category_id": 18, "bbox": [1, 2, 3, 4], "score": 0.9},  # a dog
        {"image_id": 1, "category_id": 1, "bbox": [5, 6, 7, 8], "score": 0.75},
    ]
    people = data.read(triangles(person(1)), for_training=False, boxes=boxes)
    assert people.source == "detector" and people.annotations == data.file
    assert people.box_scores.tolist() == [0.25, 0.75] and people.annotation_ids.tolist() == [0, 2]
    assert people.image_ids[people.image_index].tolist() == [2, 1]
    assert people.keypoints.shape == (2, 3, 3) and not people.keypoints.any()
    assert str(people.skipped) == "skipped 1: 1 of another category (box 1 of boxes.json)"


def test_a_detectors_boxes_of_low_scores_can_be_left_out(data: Data) -> None:
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": score} for score in (0, 0.25, 0.5)]
    assert data.read(triangles(), for_training=False, boxes=boxes).box_scores.tolist() == [0, 0.25, 0.5]
    people = data.read(triangles(), for_training=False, boxes=boxes, least_score=0.25)
    assert people.box_scores.tolist() == [0.25, 0.5]
    assert str(people.skipped) == "skipped 1: 1 with a score below 0.25 (box 0 of boxes.json)"


def test_a_detectors_boxes_need_no_annotations_as_on_test_images(data: Data) -> None:
    content = triangles()
    del content["annotations"]
    content["categories"] = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]
    boxes = [{"image_id": 2, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.25}]
    people = data.read(content, for_training=False, boxes=boxes)
    assert people.skeleton == COCO and people.category_id == 1
    with pytest.raises(PoseError, match=r"no persons: the split is empty; a list of images alone .* boxes="):
        data.read(content, for_training=False)


def test_a_subset_keeps_rows_in_the_order_asked(data: Data) -> None:
    people = data.read(triangles(person(7, 2), person(5, 1), person(9, 2))).subset([2, 1])
    assert people.annotation_ids.tolist() == [9, 5] and len(people) == 2
    assert people.image_ids[people.image_index].tolist() == [2, 1]
    assert len(people.subset([])) == 0


def test_a_subset_takes_those_where_a_mask_is_true(data: Data) -> None:
    people = data.read(triangles(person(7, 2), person(5, 1), person(9, 2)))
    assert people.subset(people.annotation_ids > 5).annotation_ids.tolist() == [7, 9]
    assert people.subset([False, True, False]).annotation_ids.tolist() == [5]


def test_an_image_may_lie_in_a_folder_below(data: Data) -> None:
    content = triangles(person(1))
    (data.images / "below").mkdir()
    (data.images / "1.png").rename(data.images / "below/1.png")
    content["images"][0]["file_name"] = "below/1.png"
    assert data.read(content).images == (data.images / "below/1.png",)


# -- what the key points are ------------------------------------------------------------------------------------


def test_own_key_points_bring_their_names_pairs_sigmas_upper_body_and_limbs(data: Data) -> None:
    skeleton = data.read(triangles(person(1), skeleton=[[1, 2], [2, 3]])).skeleton
    assert skeleton.names == tuple(TRIANGLE) and skeleton.flip_pairs == ((0, 1),)
    assert skeleton.sigmas == (0.1, 0.1, 0.2) and skeleton.upper_body == (2,) and skeleton.limbs == ((0, 1), (1, 2))


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (["L_eye", "mouth", "R_eye"], None, ((0, 2),)),
        (["right_eye", "left_eye", "mouth"], None, ((1, 0),)),
        (["right_eye", "left_eye", "mouth"], [[0, 1]], ((1, 0),)),  # left first, whatever the file's order
        (["a", "b", "c"], [[0, 2]], ((0, 2),)),
        (["a", "b", "c"], [], ()),
        (["left_a", "b", "c"], [[0, 2]], ((0, 2),)),
        (["left_a", "right_a", "b"], [[1.0, 0.0]], ((0, 1),)),
        (["eye_left", "mouth", "eye_right"], None, ((0, 2),)),
        (["Left Eye", "Right Eye", "mouth"], None, ((0, 1),)),
        (["mouth", "leftEye1", "rightEye1"], None, ((1, 2),)),
        (["REye", "LEye", "mouth"], None, ((1, 0),)),
        (["eye-l", "mouth", "eye-r"], None, ((0, 2),)),
    ],
)
def test_pairs_come_from_names_and_where_they_name_no_sides_from_the_file(
    data: Data, names: list[str], given: list[list[int]] | None, expected: tuple[tuple[int, int], ...]
) -> None:
    category = {"keypoints": names} | ({} if given is None else {"flip_pairs": given})
    assert data.read(triangles(person(1), **category)).skeleton.flip_pairs == expected


@pytest.mark.parametrize("known", [COCO, CROWDPOSE])
def test_known_names_bring_the_known_skeleton(data: Data, known: Any) -> None:
    keypoints = [10, 20, 2] * len(known.names)
    names = ["head" if name == "top_head" else name for name in known.names]
    content = triangles(person(1, keypoints=keypoints), keypoints=names, skeleton=[[16, 14]])
    del content["categories"][0]["sigmas"]
    assert data.read(content).skeleton == known
    content["categories"][0]["sigmas"] = [0.5] * len(known.names)
    assert data.read(content).skeleton.sigmas == (0.5,) * len(known.names)


def test_without_names_17_key_points_are_cocos_and_14_of_a_crowded_image_crowdposes(data: Data) -> None:
    content = triangles(person(1, keypoints=[10, 20, 2] * 17))
    content["categories"] = [{"id": 1, "name": "person"}]
    assert data.read(content).skeleton == COCO
    content["annotations"][0]["keypoints"] = [10, 20, 2] * 14
    with pytest.raises(PoseError, match=r"no category has \"keypoints\", .* persons here have 14"):
        data.read(content)
    content["images"][0]["crowdIndex"] = 0.5
    assert data.read(content).skeleton == CROWDPOSE


def test_sigmas_can_be_given_for_files_without(data: Data) -> None:
    content = triangles(person(1))
    del content["categories"][0]["sigmas"]
    assert data.read(content).skeleton.sigmas == ()
    assert data.read(content, sigmas=[0.05] * 3).skeleton.sigmas == (0.05,) * 3
    with pytest.raises(PoseError, match=r"sigmas are 3 numbers above 0, one per key point, and these are \[0.05\]"):
        data.read(content, sigmas=[0.05])


@pytest.mark.parametrize(
    ("category", "message"),
    [
        ({"keypoints": ["a", "b", "c"]}, r"no name has the word left .* Add \"flip_pairs\" .* or \[\] where"),
        ({"keypoints": ["left_a", "right_a", "b_left"]}, r"b_left has no other side"),
        ({"keypoints": ["left_a", "right_a", "right-a"]}, r"left_a has no other side"),
        ({"keypoints": ["left_a", "b", "c"]}, r"left_a has no other side"),
        ({"flip_pairs": [[1, 2]]}, r"flip_pairs are \[\[1, 2\]\], and by the names .* \[\[0, 1\]\], counted from 0"),
        ({"flip_pairs": [[0, 3]]}, r"pairs of indices from 0 to 2, and are \[\[0, 3\]\]"),
        ({"flip_pairs": [[0, 1], [1, 2]]}, r"pairs of indices from 0 to 2"),
        ({"flip_pairs": [0, 1]}, r"pairs of indices from 0 to 2"),
        ({"flip_pairs": [[0.5, 1]]}, r"pairs of indices from 0 to 2"),
        ({"flip_pairs": {}}, r"pairs of indices from 0 to 2"),
        ({"sigmas": [0.1, 0.1]}, r"sigmas are 3 numbers above 0, one per key point, and are \[0.1, 0.1\]"),
        ({"sigmas": [0.1, 0.1, 0]}, r"sigmas are 3 numbers above 0"),
        ({"skeleton": [[0, 1]]}, r"counted from 1 to 3, as COCO's does, and is \[\[0, 1\]\]"),
        ({"keypoints": ["a", "a", "b"]}, r"names, each there once, and these are \['a', 'a', 'b'\]"),
        ({"keypoints": 3}, r"names, each there once, and these are 3"),
        ({"id": None}, r"number 0 of its categories has the id None: ids are whole numbers"),
        ({"keypoints": None, "name": "dog"}, r"no category has \"keypoints\", .* persons here have 3"),
    ],
)
def test_a_category_that_does_not_fit_is_refused(data: Data, category: dict[str, Any], message: str) -> None:
    with pytest.raises(PoseError, match=message):
        data.read(triangles(person(1), **category))


def test_a_category_of_missing_or_null_fields_is_read(data: Data) -> None:
    skeleton = data.read(triangles(person(1), sigmas=None, flip_pairs=None, skeleton=None)).skeleton
    assert (skeleton.sigmas, skeleton.flip_pairs, skeleton.limbs) == ((), ((0, 1),), ())


def test_a_single_key_point_has_no_other_side(data: Data) -> None:
    people = data.read(triangles(person(1, keypoints=[5, 6, 2]), keypoints=["ball"], sigmas=[0.1]))
    assert people.skeleton.flip_pairs == () and people.keypoints.tolist() == [[[5, 6, 2]]]


def several(*categories: dict[str, Any], of: int = 1) -> dict[str, Any]:
    return triangles(person(1, category_id=of)) | {"categories": list(categories)}


def test_of_several_categories_the_one_with_key_points_and_annotations_is_read(data: Data) -> None:
    hand = {"id": 3, "name": "hand", "keypoints": ["left_x", "right_x"]}
    corners = {"id": 1, "name": "corners", "keypoints": TRIANGLE}
    everyone = {"id": 2, "name": "person", "keypoints": ["left_y", "right_y"]}
    boxes = {"id": 4, "name": "dog"}
    assert data.read(several(boxes, hand, corners)).skeleton.names == tuple(TRIANGLE)
    people = data.read(several(hand, everyone, corners))
    assert people.category_id == 1 and people.skeleton.names == tuple(TRIANGLE)
    content = several(corners | {"id": 5}, corners | {"name": "person"})
    content["annotations"].append(person(2, category_id=5))
    people = data.read(content)
    assert people.category_id == 1
    assert str(people.skipped) == "skipped 1: 1 of another category (annotations.json)"


def test_several_categories_of_which_none_is_the_person_are_refused(data: Data) -> None:
    content = several(*({"id": i, "name": f"animal {i}", "keypoints": TRIANGLE} for i in (1, 2)))
    content["annotations"].append(person(2, category_id=2))
    with pytest.raises(PoseError, match=r"several categories have key points, animal 1, animal 2: give all whose"):
        data.read(content)
    content["categories"] = [{"id": i, "name": f"animal {i}"} for i in (1, 2)]
    with pytest.raises(PoseError, match=r"no category has key points, as COCO's person has, or is called person"):
        data.read(content)


# -- files that cannot be used ----------------------------------------------------------------------------------


def broken(change: Any) -> dict[str, Any]:
    content = triangles(person(1), person(2))
    change(content)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', r"annotations.json is no JSON \(.*: was it cut off in a download\? Fetch it again"),
        ("", r"is no JSON"),
        ([], r"is a list: a file of key points in COCO's layout has images, annotations and categories"),
        ({"info": 1}, r"has info: a file of key points"),
        ({"images": [], "annotations": []}, r"has images, annotations: a file of key points"),
        ({f"{i}.png": [] for i in range(9)}, r"has 0.png, 1.png, 2.png, 3.png, 4.png: a file of key points"),
        (broken(lambda c: c.update(images=[])), r"has no images: the split is empty"),
        (broken(lambda c: c.update(annotations=[])), r"has no persons: the split is empty$"),
        (broken(lambda c: c.update(annotations=[3])), r"\"annotations\" has to be a list of objects"),
        (broken(lambda c: c.update(annotations={})), r"\"annotations\" has to be a list of objects"),
        (broken(lambda c: c["annotations"][1].update(id=1)), r"two of its annotations have the id 1: .* renumber"),
        (broken(lambda c: c["images"][1].update(id=1)), r"two of its images have the id 1"),
        (broken(lambda c: c["images"][1].update(id="x")), r"number 1 of its images has the id 'x': .* whole numbers"),
        (broken(lambda c: c["images"][0].update(id=7.0)), r"has the id 7.0: .* such as 7, and not 7.0 or \"7\""),
        (broken(lambda c: c["images"][0].update(id=True)), r"has the id True: ids are whole numbers"),
        (broken(lambda c: c["annotations"][0].update(id=2**63)), r"has the id 9223372036854775808: ids are whole"),
        (broken(lambda c: c["annotations"][0].pop("id")), r"number 0 of its annotations has the id None"),
        (broken(lambda c: c["categories"].append({"id": 1})), r"two of its categories have the id 1"),
        (broken(lambda c: [a.update(category_id=0) for a in c["annotations"]]), r"no persons of category_id 1 among"),
        (broken(lambda c: [a.update(category_id="1") for a in c["annotations"]]), r"category_id 1 among its 2 annot"),
        (broken(lambda c: [a.update(category_id=[1]) for a in c["annotations"]]), r"category_id 1 among its 2 annot"),
        (broken(lambda c: c["images"][1].pop("height")), r"image 2 \(2.png\) has height None and width 64: .*Pillow"),
        (broken(lambda c: c["images"][1].update(width=0)), r"image 2 \(2.png\) has height 48 and width 0"),
        (broken(lambda c: c["images"][1].update(width=64.0)), r"has height 48 and width 64.0: .* as whole numbers"),
        (broken(lambda c: c["images"][1].update(height=True)), r"has height True and width 64: both are needed"),
        (broken(lambda c: c["images"][0].pop("file_name")), r"image 1 has no file_name"),
        (broken(lambda c: c["images"][0].update(file_name="../1.png")), r"image 1 is at ../1.png, outside the folder"),
        (broken(lambda c: c["images"][0].update(file_name="a\\..\\..\\1.png")), r"image 1 is at .*, outside the fol"),
        (broken(lambda c: c["images"][0].update(file_name="/1.png")), r"image 1 is at /1.png, outside the folder"),
        (broken(lambda c: c.update(categories=[])), r"no category has key points, as COCO's person has"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_training(data: Data, content: object, message: str) -> None:
    with pytest.raises(PoseError, match=message):
        data.read(content)


def test_a_missing_file_or_folder_is_refused(data: Data) -> None:
    with pytest.raises(PoseError, match=r"annotations.json cannot be read: No such file"):
        read_people(data.file, data.images, for_training=True)
    data.file.write_text(json.dumps(triangles(person(1))))
    with pytest.raises(PoseError, match=r"elsewhere is no folder: name the one that holds the images"):
        read_people(data.file, data.images / "elsewhere", for_training=True)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ("[", r"boxes.json is no JSON"),
        ([], r"boxes.json: a detector's boxes are a list of \{image_id, category_id, bbox, score\}"),
        ({"annotations": []}, r"a detector's boxes are a list"),
        ([3], r"a detector's boxes are a list"),
        (
            [{"image_id": 9, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}],
            r"no usable person's box in .*; skipped 1: 1 of an unknown image id \(box 0 of boxes.json\)",
        ),
    ],
)
def test_a_detectors_file_that_cannot_be_used_is_refused(data: Data, boxes: object, message: str) -> None:
    with pytest.raises(PoseError, match=message):
        data.read(triangles(person(1)), for_training=False, boxes=boxes)


def test_a_detectors_boxes_are_not_to_be_trained_on(data: Data) -> None:
    with pytest.raises(PoseError, match=r"boxes=.*boxes.json have no key points to train on"):
        data.read(triangles(person(1)), boxes=[])


# -- persons that cannot be used --------------------------------------------------------------------------------

BAD_PERSONS = [
    ({"image_id": 3}, "of an unknown image id"),
    ({"image_id": [1]}, "whose image_id is no whole number"),
    ({"bbox": None}, "without a box of four numbers"),
    ({"bbox": [1, 2, 3]}, "without a box of four numbers"),
    ({"bbox": [1, 2, 3, "4"]}, "without a box of four numbers"),
    ({"image_id": 1.0}, "whose image_id is no whole number"),
    ({"image_id": True}, "whose image_id is no whole number"),
    ({"bbox": [1, 2, 3, float("nan")]}, "with NaN, infinite or immense numbers in the box"),
    ({"bbox": [1, 2, 1e39, 4]}, "with NaN, infinite or immense numbers in the box"),  # infinite in float32
    ({"bbox": [1, 2, 10**400, 4]}, "with NaN, infinite or immense numbers in the box"),
    ({"bbox": [0.2, 0.3, 0.5, 0.9]}, "with a box of less than a pixel"),  # shares of the image
    ({"bbox": [1, 2, 0, 5]}, "with a box of less than a pixel"),
    ({"bbox": [1, 2, 5, -5]}, "with a box of less than a pixel"),
    ({"bbox": [64, 2, 5, 5]}, "with a box outside the image"),
    ({"bbox": [63.5, 2, 5, 5]}, "with a box outside the image"),  # its part inside the last pixel has no area
    ({"bbox": [62.9999999, 2, 5, 5]}, "with a box outside the image"),  # 63 in float32
    ({"bbox": [62.1, 2, 5, 5]}, "with a box outside the image"),
    ({"bbox": [2, 46.1, 5, 5]}, "with a box outside the image"),
    ({"bbox": [3, 50, 5, 5]}, "with a box outside the image"),
    ({"bbox": [-9, 2, 5, 5]}, "with a box outside the image"),
    ({"bbox": [-5, 2, 5, 5]}, "with a box outside the image"),
    ({"bbox": [2, -5, 5, 5]}, "with a box outside the image"),
    ({"bbox": [3, -9, 5, 5]}, "with a box outside the image"),
]

BAD_NUMBERS = "with NaN, infinite or immense numbers in key points"

BAD_KEYPOINTS = [
    ({"keypoints": [1, 2, 2] * 4}, "without 3 key points of three numbers each"),
    ({"keypoints": [1, 2, None] * 3}, "without 3 key points of three numbers each"),
    ({"keypoints": [[1, 2, 2]] * 3}, "without 3 key points of three numbers each"),
    ({"keypoints": [1, float("nan"), 2] * 3}, BAD_NUMBERS),
    ({"keypoints": [1, float("inf"), 2, 1, float("-inf"), 2, 0, 0, 0]}, BAD_NUMBERS),
    ({"keypoints": [1e300, 2, 2, -1e300, 2, 2, 0, 0, 0]}, BAD_NUMBERS),
    ({"keypoints": [10**400, 2, 2] * 3}, BAD_NUMBERS),
    ({"keypoints": [1, 2, -1] * 3}, "without a labelled key point"),
    ({"area": 0}, "without area"),
    ({"area": -5}, "without area"),
    ({"area": float("nan")}, "without area"),
    ({"area": float("inf")}, "without area"),
    ({"area": 10**400}, "without area"),
]


@pytest.mark.parametrize("for_training", [True, False])
@pytest.mark.parametrize(("change", "reason"), BAD_PERSONS + BAD_KEYPOINTS)
def test_a_person_that_cannot_be_used_is_left_out_and_counted(
    data: Data, change: dict[str, Any], reason: str, for_training: bool
) -> None:
    people = data.read(triangles(person(1), person(4) | change), for_training=for_training)
    assert people.annotation_ids.tolist() == [1]
    assert str(people.skipped) == f"skipped 1: 1 {reason} (annotation 4)"


def test_a_box_of_one_pixel_within_the_image_can_be_used(data: Data) -> None:
    people = data.read(triangles(person(1, bbox=[62, 46, 9, 9]), person(2, bbox=[3, 4, 1, 1])))
    assert people.boxes.tolist() == [[62, 46, 1, 1], [3, 4, 1, 1]]


BAD_SCORES = [({"score": score}, "without a score of 0 or more") for score in (None, "1", float("nan"), -0.1, 10**400)]


@pytest.mark.parametrize(("change", "reason"), [*BAD_PERSONS, *BAD_SCORES])
def test_a_detectors_box_that_cannot_be_used_is_left_out_and_counted(
    data: Data, change: dict[str, Any], reason: str
) -> None:
    good = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    people = data.read(triangles(person(1)), for_training=False, boxes=[deepcopy(good), good | change])
    assert len(people) == 1 and str(people.skipped) == f"skipped 1: 1 {reason} (box 1 of boxes.json)"


def test_a_person_without_the_field_of_key_points_has_none_labelled(data: Data) -> None:
    content = triangles(person(1), person(4))
    del content["annotations"][1]["keypoints"]
    assert str(data.read(content).skipped) == "skipped 1: 1 without a labelled key point (annotation 4)"


def test_an_area_that_is_no_number_is_as_none(data: Data) -> None:
    people = data.read(triangles(*(person(key, area=area) for key, area in enumerate((None, "900", True)))))
    assert people.areas.tolist() == pytest.approx([0.53 * 600] * 3)


def test_a_file_without_one_usable_person_is_refused_with_the_reasons(data: Data) -> None:
    content = triangles(person(1, keypoints=[0] * 9), person(2, keypoints=[1, 2, 2] * 17))
    expected = (
        r"no usable labelled person in .*; skipped 2: 1 without a labelled key point \(annotation 1\); "
        r"1 without 3 key points of three numbers each \(annotation 2\)"
    )
    with pytest.raises(PoseError, match=expected):
        data.read(content)


# -- images -----------------------------------------------------------------------------------------------------


def test_missing_images_are_counted_in_training_and_refused_in_evaluation(data: Data) -> None:
    content = triangles(person(1, 1), person(2, 2), person(3, 2))
    (data.images / "2.png").unlink()
    people = data.read(content)
    assert people.annotation_ids.tolist() == [1]
    missing = "skipped 2: 2 whose image is missing (annotation 2: 2.png, annotation 3: 2.png)"
    assert str(people.skipped) == missing
    with pytest.raises(PoseError, match=r"images lacks 1 of the images in annotations.json, such as 2.png: AP would"):
        data.read(content, for_training=False)
    (data.images / "1.png").unlink()
    with pytest.raises(PoseError, match=r"images lacks 2 of the images in .*, such as 1.png, 2.png: is it the right"):
        data.read(content)


def test_a_file_name_that_none_can_have_is_a_missing_image(data: Data) -> None:
    content = triangles(person(1), person(2, 2))
    content["images"][1]["file_name"] = "a\0/b.png"
    assert data.read(content).skipped.counts == {"whose image is missing": 1}


def test_reading_people_opens_no_image(data: Data) -> None:
    (data.images / "1.png").write_bytes(b"")
    assert len(data.read(triangles(person(1)))) == 1


def test_an_image_is_read_as_rgb_whatever_its_mode(tmp_path: Path) -> None:
    Image.new("L", (5, 4), 7).save(tmp_path / "grey.png")
    pixels = read_image(tmp_path / "grey.png", size=(4, 5))
    assert pixels.shape == (4, 5, 3) and pixels.dtype == np.uint8 and (pixels == 7).all() and pixels.flags.writeable
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "colour.png")
    assert read_image(tmp_path / "colour.png")[0, 0].tolist() == [1, 2, 3]


def test_an_image_of_more_than_8_bits_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(PoseError, match=r"deep.png has more than 8 bits per pixel \(mode I;16\): save it with 8"):
        read_image(tmp_path / "deep.png")


def with_orientation(path: Path, orientation: int, pixels: np.ndarray) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def test_an_image_is_turned_by_its_exif_orientation_where_it_was_annotated_so(tmp_path: Path) -> None:
    stored = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    path = with_orientation(tmp_path / "turned.png", 6, stored)  # to be shown turned clockwise
    assert np.array_equal(read_image(path), stored) and np.array_equal(read_image(path, (4, 6)), stored)
    assert np.array_equal(read_image(path, (6, 4)), np.rot90(stored, -1))
    with pytest.raises(PoseError, match=r"turned.png is 6 pixels high and 4 wide, and its annotations are of 5 x 4"):
        read_image(path, (5, 4))


def test_an_image_whose_size_does_not_tell_stays_as_it_is_stored(tmp_path: Path) -> None:
    stored = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    assert np.array_equal(read_image(with_orientation(tmp_path / "half.png", 3, stored), (4, 6)), stored)
    square = stored[:, :4]
    assert np.array_equal(read_image(with_orientation(tmp_path / "square.png", 6, square), (4, 4)), square)


def test_an_image_of_another_size_than_annotated_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "small.png")
    expected = r"small.png is 4 pixels high and 6 wide, and its annotations are of 8 x 12: use the images that were"
    with pytest.raises(PoseError, match=expected):
        read_image(tmp_path / "small.png", (8, 12))
    with pytest.raises(PoseError, match=r"annotations are of 6 x 4"):
        read_image(tmp_path / "small.png", (6, 4))


def test_a_missing_truncated_or_foreign_image_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(PoseError, match=r"the image .*none.jpg is missing"):
        read_image(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(PoseError, match=r"the image .*text.jpg is truncated or no image \(.*\): fetch it again"):
        read_image(tmp_path / "text.jpg")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for suffix in ("jpg", "png"):
        whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
        Image.fromarray(noise).save(whole)
        for share in (2, 10, 100):
            cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // share])
            with pytest.raises(PoseError, match=rf"the image .*cut.{suffix} is truncated or no image"):
                read_image(cut)


# -- data folders -----------------------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize("year", ["2017", ""])
def test_a_split_is_found_in_cocos_layout(tmp_path: Path, year: str) -> None:
    touch(tmp_path, *(f"annotations/person_keypoints_{split}{year}.json" for split in ("train", "val")))
    for split in ("train", "val"):
        expected = tmp_path / f"annotations/person_keypoints_{split}{year}.json", tmp_path / f"{split}{year}"
        assert find_split(tmp_path, split) == expected


@pytest.mark.parametrize("prefix", ["annotations/", "annotations/mmpose_", "json/"])
def test_a_split_is_found_in_crowdposes_layout_as_published_figures_use_it(tmp_path: Path, prefix: str) -> None:
    touch(tmp_path, f"{prefix}crowdpose_train.json", f"{prefix}crowdpose_val.json")
    assert find_split(tmp_path, "val") == (tmp_path / f"{prefix}crowdpose_val.json", tmp_path / "images")
    touch(tmp_path, f"{prefix}crowdpose_trainval.json")  # holds val, so that it is no partner of it
    assert find_split(tmp_path, "train")[0].name.endswith("crowdpose_train.json")
    touch(tmp_path, f"{prefix}crowdpose_test.json")
    assert find_split(tmp_path, "train")[0] == tmp_path / f"{prefix}crowdpose_trainval.json"
    assert find_split(tmp_path, "val")[0] == tmp_path / f"{prefix}crowdpose_test.json"
    (tmp_path / f"{prefix}crowdpose_trainval.json").unlink()
    assert find_split(tmp_path, "val")[0] == tmp_path / f"{prefix}crowdpose_val.json"
    (tmp_path / f"{prefix}crowdpose_val.json").unlink()
    assert find_split(tmp_path, "train")[0] == tmp_path / f"{prefix}crowdpose_train.json"
    assert find_split(tmp_path, "val")[0] == tmp_path / f"{prefix}crowdpose_test.json"


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    expected = r"has no val split: neither .*person_keypoints_val2017.json .* without the year.*crowdpose_test.json"
    with pytest.raises(PoseError, match=expected):
        find_split(tmp_path, "val")
    with pytest.raises(PoseError, match=r"split='test'\): there are \"train\" and \"val\""):
        find_split(tmp_path, "test")


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="the COCO photographs are not on this machine")
def test_real_coco_files_are_read_whole() -> None:
    for split, persons, photographs in (("train", 256, 94), ("val", 453, 147)):
        people = read_people(*find_split(COCO_MINI, split), for_training=split == "train")
        assert (len(people), len(people.images)) == (persons, photographs)
        assert people.skeleton == COCO and people.skipped.total == 0
    photo = read_image(people.images[0], tuple(people.image_sizes[0].tolist()))
    assert photo.shape[2] == 3 and 0 < photo.mean() < 255
