"""The samples of a pose training: what reaches the network is the view of a person that was drawn."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from cyclekd.integrations.runs.sampling import PADDING, Draw
from cyclekd.integrations.tokenpose import PoseError
from cyclekd.integrations.tokenpose.data.crops import Crops, EvaluationCrops, TrainingCrops, cut_views, reach_of
from cyclekd.integrations.tokenpose.data.people import People, read_image, read_people
from cyclekd.integrations.tokenpose.data.views import ViewSettings
from cyclekd.integrations.tokenpose.data.warp import warp_exact
from cyclekd.integrations.tokenpose.figures.draw import write_figures
from cyclekd.integrations.tokenpose.keypoints.geometry import center_and_scale, crop_matrices, transform_points

SIZE = (64, 48)
DRAWS = [Draw(row, seed) for row in range(6) for seed in (1, 2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures") / "data"
    return write_figures(folder, train=6, val=1, seed=5, size=(96, 128), people=(1, 1))


@pytest.fixture(scope="module")
def people(data: Path) -> People:
    return read_people(data / "annotations/person_keypoints_train2017.json", data / "train2017", for_training=True)


def pictures(crops: Crops, samples: list[Draw] | list[int]) -> torch.Tensor:
    """What the network is given, [N, 3, h, w]."""
    batch = default_collate([crops[sample] for sample in samples])
    return cut_views(batch, SIZE)


def test_an_exact_crop_is_opencvs_of_the_whole_photograph(people: People) -> None:
    """`warp_exact` and `crop_matrices` equal OpenCV's and mmpose's, see their tests; here the way between them."""
    found = pictures(EvaluationCrops(people, SIZE, exact=True), list(range(6)))
    centers, scales = center_and_scale(people.boxes, SIZE)
    matrices = crop_matrices(centers, scales, torch.zeros(6), SIZE)
    for row in range(6):
        photo = read_image(people.images[int(people.image_index[row])])
        expected = torch.from_numpy(warp_exact(photo, matrices[row], SIZE)).permute(2, 0, 1)
        assert torch.equal(found[row], expected)


@pytest.mark.parametrize("cache", [False, True])
def test_crops_of_contexts_are_the_exact_ones_but_for_smoothing(people: People, tmp_path: Path, cache: bool) -> None:
    """Of the same draws, one by one; JPEG files and what is made smaller first differ by a few grey levels."""
    views = ViewSettings()
    quick = TrainingCrops(people, SIZE, views, cache=tmp_path / "cache" if cache else None)
    exact = TrainingCrops(people, SIZE, views, exact=True)
    difference = (pictures(quick, DRAWS).float() - pictures(exact, DRAWS).float()).abs()
    assert 0 < difference.mean() < 6
    for draw in DRAWS:
        one, other = quick[draw], exact[draw]
        assert torch.equal(one["keypoints"], other["keypoints"]) and torch.equal(one["visible"], other["visible"])


def test_contexts_that_are_not_made_smaller_give_the_exact_crops(people: People) -> None:
    """The network's input is as large as a person in its photograph, and larger."""
    size = (384, 288)
    quick, exact = EvaluationCrops(people, size), EvaluationCrops(people, size, exact=True)
    for row in range(6):
        one, other = (cut_views(default_collate([each]), size) for each in (quick[row], exact[row]))
        assert (one.float() - other.float()).abs().mean() < 0.1


def test_a_context_reaches_as_far_as_its_views(people: People) -> None:
    """Nothing of the photograph is black in a view: white photographs give crops that are black beyond them alone."""
    views = ViewSettings(half_body=0.0)
    crops, exact = TrainingCrops(people, SIZE, views), TrainingCrops(people, SIZE, views, exact=True)
    for draw in [Draw(row, seed) for row in range(6) for seed in range(20)]:
        one, other = (cut_views(default_collate([each]), SIZE)[0].amax(0) == 0 for each in (crops[draw], exact[draw]))
        lost = one & ~other
        assert lost.float().mean() < 0.02, "more is black than the photograph's border"


def test_contexts_of_one_size_collate(people: People) -> None:
    crops = TrainingCrops(people, SIZE, ViewSettings())
    side = round(reach_of(ViewSettings(), SIZE) * 64)
    assert default_collate([crops[draw] for draw in DRAWS])["image"].shape == (12, side, side, 3)


def test_what_no_view_can_show_is_not_kept() -> None:
    usual = ViewSettings()
    assert reach_of(usual, SIZE) == pytest.approx(1.35 * 1.25 + 2 * 0.16)  # 3:4 has a diagonal of 1.25 heights
    assert reach_of(replace(usual, shift_probability=0.0), SIZE) == pytest.approx(1.35 * 1.25)
    for unturned in (replace(usual, rotation_probability=0.0), replace(usual, rotation=0.0)):
        assert reach_of(unturned, SIZE) == pytest.approx(1.35 + 2 * 0.16)


def test_a_draw_gives_the_same_sample_whenever_it_is_read(people: People) -> None:
    one, other = (TrainingCrops(people, SIZE, ViewSettings())[DRAWS[3]] for _ in range(2))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert not np.array_equal(one["matrix"], TrainingCrops(people, SIZE, ViewSettings())[Draw(1, 9)]["matrix"])


def test_keypoints_of_a_plain_view_go_back_into_the_photograph(people: People) -> None:
    sample = EvaluationCrops(people, SIZE)[2]
    matrix = crop_matrices(sample["center"][None], sample["scale"][None], torch.zeros(1), SIZE)
    expected = transform_points(matrix, people.keypoints[2:3, :, :2])[0]
    assert torch.allclose(sample["keypoints"], expected, atol=1e-4) and sample["valid"] and sample["index"] == 2


# -- unreadable photographs -----------------------------------------------------------------------------------------


def test_a_person_that_cannot_be_read_is_replaced_by_the_next_and_told(data: Path, tmp_path: Path) -> None:
    crops = TrainingCrops(broken(data, tmp_path, 1), SIZE, ViewSettings())
    sample = crops[Draw(1, 7)]
    assert (sample["index"], sample["skipped"]) == (2, 1)
    assert torch.equal(sample["matrix"], crops[Draw(2, 7)]["matrix"]) and crops[Draw(2, 7)]["skipped"] == -1
    assert "truncated" in crops.problem(1) and crops.problem(2) == "readable now"


def test_nobody_readable_is_an_error(data: Path, tmp_path: Path) -> None:
    crops = TrainingCrops(broken(data, tmp_path, *range(6)), SIZE, ViewSettings())
    with pytest.raises(PoseError, match="nobody is readable among 6 people from 4 on"):
        crops[Draw(4, 0)]


@pytest.mark.parametrize("exact", [False, True])
def test_in_evaluation_padding_and_unreadable_people_are_there_and_do_not_count(
    data: Path, tmp_path: Path, exact: bool
) -> None:
    crops = EvaluationCrops(broken(data, tmp_path, 1), SIZE, exact=exact)
    batch = default_collate([crops[0], crops[1], crops[PADDING]])
    assert batch["valid"].tolist() == [True, False, False] and batch["index"].tolist() == [0, 1, PADDING]
    assert not batch["image"][1:].any()


def broken(data: Path, tmp_path: Path, *rows: int) -> People:
    copy = shutil.copytree(data, tmp_path / "copy")
    found = read_people(copy / "annotations/person_keypoints_train2017.json", copy / "train2017", for_training=True)
    for row in rows:
        photo = found.images[int(found.image_index[row])]
        photo.write_bytes(photo.read_bytes()[:300])
    return found


def test_exact_crops_of_a_cache_are_refused(people: People, tmp_path: Path) -> None:
    with pytest.raises(PoseError, match=r"EvaluationCrops\(exact=True, cache=.*leave one out"):
        EvaluationCrops(people, SIZE, exact=True, cache=tmp_path)
