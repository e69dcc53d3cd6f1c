"""Synthetic figures: exact key points, honest visibility, nothing that gives a side away, and folders that are safe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.figures import draw as figures
from cyclekd.integrations.tokenpose.figures.body import CALM, pose
from cyclekd.integrations.tokenpose.figures.draw import draw_figures, write_figures
from cyclekd.integrations.tokenpose.figures.parts import LIMB_PARTS, PARTS, make_figure
from cyclekd.integrations.tokenpose.skeletons import COCO

INDEX = {name: index for index, name in enumerate(COCO.names)}
SMALL = dict(size=(64, 64), people=(1, 2))


def keypoints(annotation: dict) -> NDArray[np.float64]:
    return np.array(annotation["keypoints"], dtype=float).reshape(17, 3)


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.uint8]]:
    """The part map of every image that is drawn: 0 or 1 + 17 * person + part, at twice the image's size."""
    found: list[NDArray[np.uint8]] = []
    expose = figures.expose

    def keep(canvas, rng):
        found.append(np.array(canvas.map))
        return expose(canvas, rng)

    monkeypatch.setattr(figures, "expose", keep)
    return found


def part_at(part_map: NDArray[np.uint8], x: float, y: float) -> tuple[int, str] | None:
    """(person, part) seen at a point of the image."""
    value = int(part_map[round(2 * y + 0.5), round(2 * x + 0.5)])
    return ((value - 1) // len(PARTS), PARTS[(value - 1) % len(PARTS)]) if value else None


# -- images -------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_image_again_and_another_seed_another() -> None:
    (first, persons), (again, persons_again), (other, others) = (draw_figures(seed) for seed in (3, 3, 4))
    assert first.shape == (240, 320, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and persons == persons_again
    assert not np.array_equal(first, other) and persons != others


def test_a_seed_gives_the_figures_that_it_gave_when_this_was_written() -> None:
    # where this fails, the drawings are others: raise figures.VERSION, so that folders of the old ones are not reused
    persons = draw_figures(5)[1]
    assert (figures.VERSION, len(persons)) == (1, 3)
    np.testing.assert_allclose(keypoints(persons[0])[0], (277.27, 78.3, 2), atol=0.02)
    np.testing.assert_allclose(keypoints(persons[2])[16], (138.95, 205.49, 2), atol=0.02)


def test_a_figure_of_which_nothing_is_seen_is_not_annotated() -> None:
    persons = draw_figures(35, (64, 64), (8, 8))[1]
    assert len(persons) == 7 and all(person["area"] > 0 for person in persons)


@pytest.mark.parametrize("people", [(1, 1), (2, 4)])
def test_size_and_number_of_people_are_as_asked_for(people: tuple[int, int]) -> None:
    for seed in range(8):
        image, persons = draw_figures(seed, (96, 160), people)
        assert image.shape == (96, 160, 3)
        assert people[0] <= len(persons) <= people[1]


def test_eyes_are_in_the_middle_of_their_pupils_within_a_tenth_of_a_pixel() -> None:
    # twice the usual size, so that a pupil is several pixels wide; its surroundings are white
    offsets = []
    for seed in range(40):
        image, persons = draw_figures(seed, (480, 640), (1, 1))
        face = keypoints(persons[0])[:3]
        if (face[:, 2] == 2).all():
            reach = 1 + 0.2 * np.linalg.norm(face[1, :2] - face[2, :2])
            offsets += [darkest_point(image, x, y, reach) - (x, y) for x, y, _ in face[1:]]
    assert len(offsets) >= 30
    assert np.abs(np.mean(offsets, 0)).max() < 0.05
    assert np.median(np.abs(offsets)) < 0.1


def darkest_point(image: NDArray[np.uint8], x: float, y: float, reach: float) -> NDArray[np.float64]:
    """The centroid of what is dark within `reach` pixels."""
    left, top = int(x - reach), int(y - reach)
    window = image[top : int(y + reach) + 2, left : int(x + reach) + 2].mean(-1)
    rows, columns = np.mgrid[top : top + window.shape[0], left : left + window.shape[1]]
    weights = np.clip(120.0 - window, 1e-6, None) * (np.hypot(columns - x, rows - y) <= reach)
    return np.array([(weights * columns).sum(), (weights * rows).sum()]) / weights.sum()


# -- key points ---------------------------------------------------------------------------------------------------

OWN = {
    "elbow": ("upper_arm", "forearm"),
    "wrist": ("forearm", "hand"),
    "knee": ("thigh", "shin"),
    "ankle": ("shin", "foot"),
}


def test_what_is_seen_at_a_key_point_decides_its_visibility(maps: list[NDArray[np.uint8]]) -> None:
    seen = {0: 0, 1: 0, 2: 0}
    for seed in range(40):
        _, persons = draw_figures(seed)
        for person, annotation in enumerate(persons):
            for name, (x, y, visibility) in zip(COCO.names, keypoints(annotation), strict=True):
                seen[visibility] += 1
                side, _, joint = name.rpartition("_")
                if visibility == 0:
                    assert (x, y) == (0, 0)
                elif joint in OWN:
                    shows = part_at(maps[-1], x, y) in [(person, f"{side}_{part}") for part in OWN[joint]]
                    assert shows == (visibility == 2), (seed, person, name)
                elif visibility == 2:
                    trunk = {"shoulder": ("torso", f"{side}_upper_arm"), "hip": ("torso", "skirt", f"{side}_thigh")}
                    assert part_at(maps[-1], x, y) in [(person, part) for part in trunk.get(joint, ("head",))]
    assert seen[2] > seen[1] > seen[0] > 0


def test_joints_lie_within_their_own_limbs() -> None:
    for seed in range(20):
        figure = make_figure(np.random.Generator(np.random.PCG64(seed)), (240, 320), (0.5, 1.0))
        for name, point in zip(COCO.names, figure.keypoints, strict=True):
            side, _, joint = name.rpartition("_")
            for part in OWN.get(joint, ()):
                polygons = [
                    polygon for each in figure.parts if each.name == f"{side}_{part}" for polygon, _ in each.layers
                ]
                assert any(inside(point, polygon) for polygon in polygons), (seed, name)


def inside(point: NDArray[np.float64], polygon: NDArray[np.float64]) -> bool:
    """Of a convex polygon: always on the same side of its edges."""
    edges, to = np.roll(polygon, -1, 0) - polygon, point - polygon
    turns = edges[:, 0] * to[:, 1] - edges[:, 1] * to[:, 0]
    return bool((turns >= -1e-9).all() or (turns <= 1e-9).all())


def test_occluders_hide_key_points_and_nothing_else_changes(
    maps: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_occluders = [(draw_figures(seed, people=(1, 1))[1][0], maps[-1]) for seed in range(30)]
    monkeypatch.setattr(figures, "draw_occluder", lambda *_: None)
    hidden = 0
    for seed, (annotation, part_map) in enumerate(with_occluders):
        free = draw_figures(seed, people=(1, 1))[1][0]
        before, after = keypoints(free), keypoints(annotation)
        assert np.array_equal(before[:, :2], after[:, :2])
        changed = before[:, 2] != after[:, 2]
        for (x, y, visibility), earlier in zip(after[changed], before[changed, 2], strict=True):
            assert (earlier, visibility) == (2, 1) and part_at(part_map, x, y) is None
        assert not changed.any() or annotation["area"] < free["area"]
        hidden += changed.sum()
    assert hidden > 10


def test_boxes_enclose_key_points_and_all_that_is_seen(maps: list[NDArray[np.uint8]]) -> None:
    for seed in range(25):
        _, persons = draw_figures(seed)
        for person, annotation in enumerate(persons):
            x, y, width, height = annotation["bbox"]
            assert 0 <= x < x + width <= 320 + 1e-9 and 0 <= y < y + height <= 240 + 1e-9
            labelled = keypoints(annotation)[:, 2] > 0
            points = keypoints(annotation)[labelled, :2]
            assert (points >= (x, y)).all() and (points <= (x + width + 1e-9, y + height + 1e-9)).all()
            rows, columns = np.nonzero((maps[-1] > person * len(PARTS)) & (maps[-1] <= (person + 1) * len(PARTS)))
            slack = 0.5  # of rounding to pixels
            assert columns.min() / 2 >= x - slack and columns.max() / 2 <= x + width + slack
            assert rows.min() / 2 >= y - slack and rows.max() / 2 <= y + height + slack
            assert annotation["area"] == len(rows) / 4
            assert annotation["num_keypoints"] == labelled.sum()
            assert (annotation["category_id"], annotation["iscrowd"]) == (1, 0)


def test_a_box_is_no_wider_than_its_figure(maps: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw_occluder", lambda *_: None)
    for seed in range(25):
        x, y, width, height = draw_figures(seed, people=(1, 1))[1][0]["bbox"]
        rows, columns = np.nonzero(maps[-1])
        seen = (columns.min() / 2, rows.min() / 2, columns.max() / 2, rows.max() / 2)
        np.testing.assert_allclose((x, y, x + width, y + height), seen, atol=1)


# -- left and right -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def persons() -> NDArray[np.float64]:
    """Key points of 200 figures."""
    drawn = [draw_figures(seed, (64, 64), (1, 1))[1] for seed in range(200)]
    return np.stack([keypoints(annotations[0]) for annotations in drawn])


def test_the_side_of_the_image_does_not_tell_left_from_right(persons: NDArray[np.float64]) -> None:
    for joint in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle"):
        left, right = (persons[:, INDEX[f"{side}_{joint}"]] for side in ("left", "right"))
        both = (left[:, 2] > 0) & (right[:, 2] > 0)
        assert 0.35 < (left[both, 0] > right[both, 0]).mean() < 0.65, joint


def test_the_face_does(persons: NDArray[np.float64]) -> None:
    front, back = ((persons[:, 0:3, 2] == visibility).all(1) for visibility in (2, 1))
    assert min(front.sum(), back.sum()) >= 40
    for joint in ("eye", "shoulder", "hip"):
        left, right = (persons[:, INDEX[f"{side}_{joint}"]] for side in ("left", "right"))
        both = (left[:, 2] > 0) & (right[:, 2] > 0)
        left_is_at_the_right = left[:, 0] > right[:, 0]
        assert left_is_at_the_right[front & both].mean() > 0.75, joint
        assert left_is_at_the_right[back & both].mean() < 0.25, joint


def test_limbs_of_both_sides_wear_the_same_colours() -> None:
    for seed in range(10):
        figure = make_figure(np.random.Generator(np.random.PCG64(seed)), (240, 320), (0.5, 1.0))
        colours = {part.name: [colour for _, colour in part.layers] for part in figure.parts}
        for part in LIMB_PARTS:
            assert colours[f"left_{part}"] == colours[f"right_{part}"]


# -- calm figures -------------------------------------------------------------------------------------------------


def test_calm_figures_face_the_viewer_and_stand_or_walk() -> None:
    bodies = [pose(np.random.Generator(np.random.PCG64(seed)), CALM) for seed in range(100)]
    assert min(body.torso[2, 2] for body in bodies) > 0, "the front of one is turned away"
    for body in bodies:
        up = body.joints["neck"] - body.joints["pelvis"]
        for side in ("left", "right"):
            hip, knee, ankle = (body.joints[f"{side}_{joint}"] for joint in ("hip", "knee", "ankle"))
            assert -up[1] > 0.5 * np.linalg.norm(up) and min(knee[1], ankle[1]) > hip[1] + 0.05
        assert body.joints["left_shoulder"][0] > body.joints["right_shoulder"][0]


def test_other_figures_are_seen_from_everywhere_and_also_lie_and_sit() -> None:
    bodies = [pose(np.random.Generator(np.random.PCG64(seed))) for seed in range(100)]
    assert sum(body.torso[2, 2] < 0 for body in bodies) > 20
    assert sum(body.joints["left_knee"][1] < body.joints["left_hip"][1] + 0.1 for body in bodies) > 10


def test_calm_figures_are_drawn_where_they_are_asked_for_and_their_folder_tells(tmp_path: Path) -> None:
    write_figures(tmp_path, train=3, val=1, seed=1, calm=True, **SMALL)
    coco = json.loads((tmp_path / "annotations/person_keypoints_train2017.json").read_text())
    drawn = [keypoints(annotation) for annotation in coco["annotations"]]
    seed = figures.derive_seed("figures", 1, "train2017", 1)
    expected = [keypoints(each) for each in draw_figures(seed, **SMALL, calm=True)[1]]
    assert np.array_equal(drawn[: len(expected)], expected)
    assert not np.array_equal(expected, [keypoints(each) for each in draw_figures(seed, **SMALL)[1]])
    with pytest.raises(PoseError, match=r"calm True \(asked for: False\)"):
        write_figures(tmp_path, train=3, val=1, seed=1, **SMALL)


# -- folders ------------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def count_drawings(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Seeds drawn from here on; a kill at number `stop_at`."""
    seeds: list[int] = []

    def counted(seed: int, *settings):
        if len(seeds) == stop_at:
            raise KeyboardInterrupt
        seeds.append(seed)
        return draw_figures(seed, *settings)

    monkeypatch.setattr(figures, "draw_figures", counted)
    return seeds


def test_a_folder_is_laid_out_like_coco(tmp_path: Path) -> None:
    assert write_figures(tmp_path / "data", train=3, val=2, seed=1, **SMALL) == tmp_path / "data"
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert names == {"annotations", "figures.json", "train2017", "val2017"}
    image_ids, person_ids = [], []
    for split, count in (("train2017", 3), ("val2017", 2)):
        coco = json.loads((tmp_path / f"data/annotations/person_keypoints_{split}.json").read_text())
        assert {"info", "images", "annotations", "categories"} <= set(coco)
        assert coco["info"]["synthetic"] is True and "synthetic" in coco["info"]["description"]
        assert coco["categories"][0]["keypoints"] == list(COCO.names) and coco["categories"][0]["id"] == 1
        assert len(coco["images"]) == count == len(list((tmp_path / "data" / split).iterdir()))
        for image in coco["images"]:
            with Image.open(tmp_path / "data" / split / image["file_name"]) as opened:
                assert opened.size == (image["width"], image["height"]) == (64, 64)
        assert {each["image_id"] for each in coco["annotations"]} == {each["id"] for each in coco["images"]}
        image_ids += [each["id"] for each in coco["images"]]
        person_ids += [each["id"] for each in coco["annotations"]]
    assert len(set(image_ids)) == 5 and len(set(person_ids)) == len(person_ids)


def test_pycocotools_reads_the_annotations(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    write_figures(tmp_path, train=2, val=1, seed=1, **SMALL)
    read = coco.COCO(str(tmp_path / "annotations/person_keypoints_train2017.json"))
    assert len(read.getImgIds(catIds=read.getCatIds(catNms=["person"]))) == 2


def test_no_two_images_are_alike_within_and_between_splits_and_seeds(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_figures(tmp_path / str(seed), train=3, val=3, seed=seed, **SMALL)
    images = [path.read_bytes() for path in tmp_path.rglob("*.jpg")]
    assert len(images) == len(set(images)) == 12


def test_a_folder_of_the_same_settings_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_figures(tmp_path, train=2, val=1, seed=1, **SMALL)
    before, drawn = content(tmp_path), count_drawings(monkeypatch)
    write_figures(tmp_path, train=2, val=1, seed=1, **SMALL)
    assert drawn == [] and content(tmp_path) == before


@pytest.mark.parametrize("stop_at", [0, 2, 4])
def test_after_a_kill_the_rest_is_drawn_and_the_folder_is_the_same(
    stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_figures(tmp_path / "whole", train=3, val=2, seed=1, **SMALL)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_drawings(patch, stop_at)
        write_figures(tmp_path / "killed", train=3, val=2, seed=1, **SMALL)
    for log in (tmp_path / "killed").glob("*.jsonl"):
        log.open("a").write('{"kind": "image", "st')  # a line that was cut off
    drawn = count_drawings(monkeypatch)
    write_figures(tmp_path / "killed", train=3, val=2, seed=1, **SMALL)
    assert len(drawn) == 5 - stop_at
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_an_image_whose_annotations_were_not_written_is_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_figures(tmp_path / "whole", train=3, val=2, seed=1, **SMALL)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_drawings(patch, 2)
        write_figures(tmp_path / "killed", train=3, val=2, seed=1, **SMALL)
    log = tmp_path / "killed/train2017.jsonl"
    log.write_text(log.read_text()[:-9])
    drawn = count_drawings(monkeypatch)
    write_figures(tmp_path / "killed", train=3, val=2, seed=1, **SMALL)
    assert len(drawn) == 4 and content(tmp_path / "killed") == content(tmp_path / "whole")


def test_an_image_that_was_deleted_is_drawn_again(tmp_path: Path) -> None:
    write_figures(tmp_path, train=2, val=1, seed=1, **SMALL)
    before = content(tmp_path)
    (tmp_path / "train2017/000000000002.jpg").unlink()
    write_figures(tmp_path, train=2, val=1, seed=1, **SMALL)
    assert content(tmp_path) == before


def test_figures_of_other_settings_are_refused(tmp_path: Path) -> None:
    write_figures(tmp_path, train=2, val=1, seed=1, **SMALL)
    before = content(tmp_path)
    with pytest.raises(PoseError, match=r"other synthetic figures, with train 2 \(asked for: 5\).*name another folder"):
        write_figures(tmp_path, train=5, val=1, seed=1, **SMALL)
    with pytest.raises(PoseError, match=r"seed 1 \(asked for: 2\)"):
        write_figures(tmp_path, train=2, val=1, seed=2, **SMALL)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("holiday.jpg", "x", r"holds holiday\.jpg, which are no synthetic figures"),
        ("figures.json", "{", r"figures\.json is no JSON"),
        ("figures.json", "[]", r"figures\.json holds no settings"),
    ],
)
def test_a_folder_of_other_content_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PoseError, match=message):
        write_figures(tmp_path, train=1, val=1, seed=0)
    assert content(tmp_path) == {name: text.encode()}


def test_a_file_in_place_of_the_folder_or_of_one_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    with pytest.raises(PoseError, match=r"cannot use .*data: .*name another folder"):
        write_figures(tmp_path / "data", train=1, val=1, seed=0)
    write_figures(tmp_path / "figures", train=1, val=1, seed=0, **SMALL)
    for path in ("annotations/person_keypoints_val2017.json", "val2017/000000000002.jpg"):
        (tmp_path / "figures" / path).unlink()
    (tmp_path / "figures/val2017").rmdir()
    (tmp_path / "figures/val2017").write_text("x")
    with pytest.raises(PoseError, match=r"cannot use .*val2017: "):
        write_figures(tmp_path / "figures", train=1, val=1, seed=0, **SMALL)


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(PoseError, match=r"cannot use .*: Permission denied; name another folder"):
        write_figures(tmp_path, train=1, val=1, seed=0)


def test_what_a_kill_left_of_a_half_written_file_is_no_foreign_content(tmp_path: Path) -> None:
    (tmp_path / ".figures.json.123.tmp").write_text("{")
    write_figures(tmp_path, train=1, val=1, seed=0, **SMALL)
    assert (tmp_path / "figures.json").is_file()


def test_only_a_folder_of_figures_may_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "mine.jpg").write_text("x")
    with pytest.raises(PoseError, match=r"name another folder$"):
        write_figures(tmp_path, train=1, val=1, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": 0}, r"train=0, val=1.*at least 1 image"),
        ({"val": -1}, r"train=1, val=-1.*at least 1 image"),
        ({"seed": -1}, r"seed -1: write a seed of 0 or more"),
        ({"size": (63, 320)}, r"size \(63, 320\).*64 pixels or more"),
        ({"people": (0, 3)}, r"people=\(0, 3\).*from 1 to 8"),
        ({"people": (3, 2)}, r"people=\(3, 2\)"),
        ({"people": (1, 9)}, r"people=\(1, 9\)"),
    ],
)
def test_settings_that_cannot_be_drawn_are_refused_before_anything_is_written(
    settings: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PoseError, match=message):
        write_figures(tmp_path / "data", **({"train": 1, "val": 1, "seed": 0} | settings))
    assert not (tmp_path / "data").exists()
    if not {"train", "val"} & set(settings):
        with pytest.raises(PoseError, match=message):
            draw_figures(**({"seed": 0} | settings))
