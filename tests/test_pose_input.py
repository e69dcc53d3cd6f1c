"""The input benchmark compares the same crops and targets, and a batch is read as its persons are one by one."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from benchmarks import pose_input
from benchmarks.pose.opencv import SIGMA, OpenCvCrops, heatmaps, map_size
from benchmarks.pose_input import BARE, OPENCV, VARIANTS, Feeds, parse_arguments
from cyclekd.integrations.runs.loading import load_batches
from cyclekd.integrations.runs.sampling import Draw, TrainingBatches
from cyclekd.integrations.tokenpose.data.crops import TrainingCrops, cut_views
from cyclekd.integrations.tokenpose.data.people import People, read_people
from cyclekd.integrations.tokenpose.data.views import ViewSettings
from cyclekd.integrations.tokenpose.data.warp import normalize, warp_exact
from cyclekd.integrations.tokenpose.losses.targets import heatmap_target
from cyclekd.integrations.tokenpose.skeletons import COCO

SIZE = (64, 48)
DRAWS = [Draw(row, seed) for row in range(6) for seed in range(5)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six small persons in two smooth photographs of 120 x 160 px, in COCO's layout."""
    folder = tmp_path / "data"
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    y, x = np.mgrid[:120, :160]
    images, persons = [], []
    for image in (0, 1):
        waves = [np.sin(x / (7 + c) + image) + np.cos(y / (9 - c)) for c in range(3)]
        photo = np.stack([127 + 60 * wave for wave in waves], axis=2).astype(np.uint8)
        Image.fromarray(photo).save(folder / f"train2017/{image}.jpg", quality=95)
        images.append({"id": image, "file_name": f"{image}.jpg", "height": 120, "width": 160})
        for i in range(3):
            left, top = 12 + 40 * i, 20 + 15 * i
            keypoints = [v for k in range(17) for v in (left + 1.5 * k, top + (7 * k) % 38, k % 3)]
            box = {"bbox": [left, top, 26, 40], "area": 600, "image_id": image, "category_id": 1, "iscrowd": 0}
            persons.append({"id": len(persons), "keypoints": keypoints, **box})
    category = {"id": 1, "name": "person", "keypoints": list(COCO.names), "skeleton": []}
    content = {"images": images, "annotations": persons, "categories": [category]}
    (folder / "annotations/person_keypoints_train2017.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def people(data: Path) -> People:
    return read_people(data / "annotations/person_keypoints_train2017.json", data / "train2017", for_training=True)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What of OpenCV is called, from Pillow and ours, so that these tests need no OpenCV."""
    module = SimpleNamespace(
        __version__="none",
        COLOR_BGR2RGB=0,
        INTER_LINEAR=0,
        threads=None,
        setNumThreads=lambda count: setattr(module, "threads", count),
        imread=lambda path: np.asarray(Image.open(path))[..., ::-1],
        cvtColor=lambda image, code: np.ascontiguousarray(image[..., ::-1]),
        warpAffine=lambda image, matrix, size, flags: warp_exact(image, matrix, size[::-1]),
    )
    monkeypatch.setitem(sys.modules, "cv2", module)


def batch_of(people: People, **options: Any) -> dict[str, torch.Tensor]:
    crops = TrainingCrops(people, SIZE, ViewSettings(), **options)
    return default_collate(crops.__getitems__(DRAWS))


# -- what is compared ---------------------------------------------------------------------------------------------


def grey_levels(people: People) -> float:
    """Between crops of the two pipelines, on average."""
    theirs = OpenCvCrops(people, SIZE, ViewSettings(), targets=False)
    expected = torch.stack([torch.from_numpy(theirs[draw]["image"]) for draw in DRAWS])
    found = normalize(cut_views(batch_of(people), SIZE))
    assert expected.std() > 0.5
    return float((found - expected).abs().mean() * 58)


def test_the_usual_pipeline_sees_the_crops_that_ours_sees(people: People, stand_in: None) -> None:
    assert grey_levels(people) < 0.1


def test_so_it_does_with_opencv(people: People) -> None:
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    assert grey_levels(people) < 1


def test_the_usual_pipeline_learns_the_targets_that_ours_learns(people: People, stand_in: None) -> None:
    theirs = OpenCvCrops(people, SIZE, ViewSettings(), targets=True)
    batch = batch_of(people)
    sizes = {"input_size": SIZE, "heatmap_size": map_size(SIZE)}
    found = heatmap_target(batch["keypoints"], batch["visible"], sigma=SIGMA, **sizes)
    samples = [theirs[draw] for draw in DRAWS]
    maps, weights = (np.stack([sample[name] for sample in samples]) for name in ("target", "weight"))
    assert np.allclose(found.values, maps, atol=1e-5) and np.array_equal(found.weights, weights)
    assert 0 < weights.mean() < 2 / 3  # of 17, 6 are not labelled, and some are outside of their view
    outside = heatmaps(np.array([[500.0, 20.0]]), np.ones(1), SIZE)
    assert outside[0].max() == 0 == outside[1].max()


def test_people_are_where_they_were_in_resized_photographs(data: Path, people: People, tmp_path: Path) -> None:
    pose_input.resize(data, "train2017", 320, 90, tmp_path / "large")
    annotations = tmp_path / "large/annotations/person_keypoints_train2017.json"
    large = read_people(annotations, tmp_path / "large/train2017", for_training=True)
    assert large.image_sizes.tolist() == [[240, 320]] * 2 and Image.open(large.images[0]).size == (320, 240)
    assert torch.equal(large.boxes[:, 2:], 2 * people.boxes[:, 2:])
    assert torch.equal(large.keypoints, people.keypoints * torch.tensor([2, 2, 1]))
    assert torch.equal(large.areas, 4 * people.areas)


# -- the command --------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pose_input.py", *map(str, words)])
    pose_input.main()


def test_every_variant_has_a_row_for_every_size(
    data: Path, tmp_path: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.csv"
    sizes = ["--resize", 200, "--input-sizes", "64x48", "32x24"]
    run(monkeypatch, "--data", data, *sizes, "--batch", 3, "--rounds", 2, "--out", out)
    rows = list(csv.DictReader(out.open(newline="")))
    assert sys.modules["cv2"].threads == 1 == torch.get_num_threads()
    settings = [("as they are", "64x48"), ("as they are", "32x24")]
    settings += [("resized to 200 px, quality 90", "64x48"), ("resized to 200 px, quality 90", "32x24")]
    expected = [(*setting, variant) for setting in settings for variant in VARIANTS]
    assert [(row["photographs"], row["input"], row["variant"]) for row in rows] == expected
    for row in rows:
        ours = not row["variant"].startswith("OpenCV")
        assert float(row["persons/s"]) > 0 and float(row["KiB read"]) > 0 and bool(row["grey levels off"]) == ours
        assert row["persons"] == "6" and row["rounds"] == "2" and row["command"] and row["opencv"] == "none"
        if row["variant"] == OPENCV:
            assert row[f"{OPENCV} / it"] == "1.000 [1.000, 1.000]"
    read = {row["variant"]: float(row["KiB read"]) for row in rows[: len(VARIANTS)]}
    assert read["pixel cache"] > read["JPEG cache"] and read["photographs"] == read[OPENCV]


def test_every_variant_does_the_work_of_its_name_on_the_same_persons(
    data: Path, people: People, tmp_path: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = Feeds(people, SIZE, tmp_path, parse_arguments(["--data", str(data), "--batch", "3", "--rounds", "2"]))
    done: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        function = getattr(pose_input, name)
        return lambda *args, **options: (done.append(name), function(*args, **options))[1]

    for name in ("cut_views", "heatmap_target"):
        monkeypatch.setattr(pose_input, name, noted(name))
    expected = next(feeds.batches(OPENCV))
    assert expected["target"].shape == (3, 17, 16, 12) and "target" not in next(feeds.batches(BARE))
    for variant in VARIANTS:
        assert torch.equal(next(feeds.batches(variant))["index"], expected["index"])
        done.clear()
        feeds.step(variant)()
        ours = variant not in (OPENCV, BARE)
        assert done == ["cut_views"] * ("+ warp" in variant) + ["heatmap_target"] * (ours and "+ targets" in variant)


def test_without_opencv_the_command_says_how_to_get_it(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)  # an import then fails
    with pytest.raises(SystemExit):
        run(monkeypatch, "--data", data)
    assert "pip install opencv-python-headless" in capsys.readouterr().err


def test_what_cannot_be_measured_is_refused(
    data: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        "--batch 32: ": ["--data", data],
        "no.json": ["--data", data, "--split", "no"],
        "no height x width": ["--data", data, "--input-sizes", "64x50"],
    }
    for message, words in wrong.items():
        with pytest.raises(SystemExit):
            run(monkeypatch, *words)
        assert message in capsys.readouterr().err


# -- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_a_batch_is_to_the_last_bit_its_persons_one_by_one(people: People, exact: bool) -> None:
    crops = TrainingCrops(people, SIZE, ViewSettings(), exact=exact)
    order = TrainingBatches(len(people), batch=5, epochs=3, seed=0)
    for batch, draws in zip(load_batches(crops, order, 0, torch.device("cpu")), order, strict=True):
        expected = default_collate([crops[draw] for draw in draws])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_an_unreadable_person_of_a_batch_is_replaced_by_the_next_alone(people: People) -> None:
    people.images[0].write_bytes(b"nothing")  # the first three persons'
    batch = default_collate(TrainingCrops(people, SIZE, ViewSettings()).__getitems__([Draw(2, 1), Draw(4, 2)]))
    assert batch["index"].tolist() == [3, 4] and batch["skipped"].tolist() == [2, -1]


def test_a_cache_of_pixels_changes_nothing_and_one_of_jpeg_files_a_grey_level(people: People, tmp_path: Path) -> None:
    plain = batch_of(people)
    pixels = batch_of(people, cache=tmp_path / "cache", compress=False)
    files = batch_of(people, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2
    assert all(torch.equal(pixels[name], plain[name]) for name in plain)
    off = (files["image"].int() - plain["image"].int()).abs().float()
    assert 0 < off.mean() < 1 and torch.equal(files["matrix"], plain["matrix"])
