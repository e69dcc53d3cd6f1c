"""Mirrored images: the published numbers, a plain loop, models that mirror exactly, and pairs that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.decoding import argmax, decode_regression, decode_token_regression
from cyclekd.integrations.tokenpose.keypoints.flips import (
    average_flipped,
    exchange_sides,
    flip_back,
    flip_back_regression,
    predict_flipped,
    predict_flipped_regression,
)
from cyclekd.integrations.tokenpose.skeletons import COCO, CROWDPOSE, Skeleton
from golden import golden

PAIRS = ((1, 2), (4, 3))
SKELETONS = pytest.mark.parametrize("skeleton", [COCO, CROWDPOSE], ids=["coco", "crowdpose"])


def maps() -> Tensor:
    return torch.sin(torch.arange(2 * 5 * 3 * 4, dtype=torch.float32)).view(2, 5, 3, 4)


# -- the published numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "name"), [(False, "flip.flipped_back"), (True, "flip.flipped_back_shifted")])
def test_flipped_heatmaps_equal_the_published_ones(shift: bool, name: str) -> None:
    reference = golden("data_ops")
    found = flip_back(reference["flip.heatmap_of_flipped_image"], COCO.flip_pairs, shift=shift)
    assert torch.equal(found, reference[name])


def test_averaged_heatmaps_equal_the_published_ones() -> None:
    reference = golden("data_ops")
    maps = reference["decode.heatmaps"], reference["flip.heatmap_of_flipped_image"]
    assert torch.equal(average_flipped(*maps, COCO.flip_pairs), reference["flip.averaged_with_decode_heatmaps"])


@pytest.mark.parametrize("head", ["hidden64", "hidden384"])
def test_flipped_regression_equals_the_published_one(head: str) -> None:
    reference = golden("reg_heads")
    found = flip_back_regression(reference[f"{head}.inference_out"], COCO.flip_pairs)
    assert torch.equal(found, reference[f"{head}.fliplr_of_out"])


# -- what flipping does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
def test_flipping_back_equals_a_plain_loop(shift: bool) -> None:
    partner, mirrored = [0, 2, 1, 4, 3], maps()
    found = flip_back(mirrored, PAIRS, shift=shift)
    for image in range(2):
        for keypoint in range(5):
            rows = mirrored[image, partner[keypoint]].tolist()
            for y, row in enumerate(rows):
                back = row[::-1]
                assert found[image, keypoint, y].tolist() == ([back[0], *back[:-1]] if shift else back)
        assert torch.equal(flip_back(mirrored[image : image + 1], PAIRS, shift=shift)[0], found[image])


def test_the_average_keeps_the_dtype_and_is_over_both_maps() -> None:
    plain, mirrored = maps(), maps() + 1
    for dtype in (torch.float32, torch.float64):
        found = average_flipped(plain.to(dtype), mirrored.to(dtype), PAIRS, shift=False)
        assert found.dtype == dtype
    assert torch.equal(found, (plain.double() + flip_back(mirrored.double(), PAIRS, shift=False)) / 2)


def test_a_models_left_and_right_key_points_are_found_again_in_the_mirrored_image() -> None:
    """The model reads the left point from red and the right one from green; a mirrored person has them exchanged."""

    def model(images: Tensor) -> Tensor:
        mirrored_person = images[:, 2].flatten(1).amax(1)[:, None, None, None] > images[:, 2, 0, 0, None, None, None]
        return torch.where(mirrored_person, images[:, [1, 0]], images[:, :2])

    images = torch.zeros(1, 3, 4, 6)
    images[0, 0, 1, 1], images[0, 1, 2, 4], images[0, 2, 0, 0] = 1, 1, 1  # blue marks the image's left corner
    found = predict_flipped(model, images, [(0, 1)], shift=False)
    assert torch.equal(found, images[:, :2])
    assert argmax(found).coordinates.tolist() == [[[1, 1], [4, 2]]]
    shifted = predict_flipped(model, images, [(0, 1)])
    assert shifted[0, 0, 1].tolist() == [0, 0.5, 0.5, 0, 0, 0]


def test_regressed_key_points_are_mirrored_and_exchanged_as_a_whole() -> None:
    output = torch.tensor([[[0.2, 0.3, 5.0, 6.0], [0.7, 0.4, 7.0, 8.0]]])
    expected = torch.tensor([[[0.3, 0.4, 7.0, 8.0], [0.8, 0.3, 5.0, 6.0]]])
    torch.testing.assert_close(flip_back_regression(output, [(0, 1)]), expected)
    expected[..., 0] -= 1 / 192
    torch.testing.assert_close(flip_back_regression(output, [(0, 1)], image_width=192), expected)


@pytest.mark.parametrize(
    ("decode", "extra", "scores"),
    [
        (decode_regression, [0.0, 0.0], [0.5, 0.5]),
        (decode_token_regression, [0.25, 0.1, 0.1], [0.25, 0.25]),
    ],
)
def test_flipped_regression_averages_both_passes_decoded_values(decode, extra, scores) -> None:
    def model(images: Tensor) -> Tensor:
        """Both points at the brightest column, as its pixel index over the width."""
        x = images[:, 0, 0].argmax(-1, keepdim=True)[..., None] / images.shape[-1]
        return torch.cat((x, x, torch.tensor([[extra]]).expand(len(x), 1, -1)), -1).repeat(1, 2, 1)

    images = torch.zeros(3, 3, 2, 8)
    images[torch.arange(3), :, :, torch.tensor([0, 3, 7])] = 1
    found = predict_flipped_regression(model, images, [(0, 1)], decode=decode, image_width=8)
    assert found.coordinates[:, 0, 0].tolist() == [0, 3 / 8, 7 / 8]  # mirrored pixel to pixel
    assert found.scores.tolist() == [scores] * 3
    without = predict_flipped_regression(model, images, [(0, 1)], decode=decode)
    assert without.coordinates[:, 0, 0].tolist() == [1 / 16, 7 / 16, 15 / 16]


def test_scores_are_averaged_after_their_sigmoid() -> None:
    output = iter([torch.tensor([[[0.5, 0.5, 4.0, 4.0]]]), torch.tensor([[[0.5, 0.5, -1.0, -1.0]]])])
    found = predict_flipped_regression(lambda _: next(output), torch.zeros(1, 3, 2, 2), [])
    expected = 1 - (torch.tensor(4.0).sigmoid() + torch.tensor(-1.0).sigmoid()) / 2
    assert found.scores.item() == pytest.approx(expected.item())


def test_predictions_carry_no_gradient() -> None:
    weight = torch.ones(1, requires_grad=True)
    assert not predict_flipped(lambda images: images * weight, torch.rand(1, 2, 4, 4), [(0, 1)]).requires_grad
    found = predict_flipped_regression(lambda images: images[:, :, 0] * weight, torch.rand(1, 2, 4, 4), [(0, 1)])
    assert not found.coordinates.requires_grad


# -- skeletons and refusals -------------------------------------------------------------------------------------


@SKELETONS
def test_a_skeletons_parts_fit_each_other(skeleton: Skeleton) -> None:
    count = len(skeleton.names)
    assert len(set(skeleton.names)) == len(skeleton.sigmas) == count
    for left, right in skeleton.flip_pairs:
        assert skeleton.names[left].replace("left", "right") == skeleton.names[right] != skeleton.names[left]
        assert skeleton.sigmas[left] == skeleton.sigmas[right]
    unpaired = set(range(count)) - {index for pair in skeleton.flip_pairs for index in pair}
    assert not any("left" in skeleton.names[index] or "right" in skeleton.names[index] for index in unpaired)
    assert {index for limb in skeleton.limbs for index in limb} == set(range(count))
    mirrored = dict(skeleton.flip_pairs) | {right: left for left, right in skeleton.flip_pairs}
    limbs = {frozenset(limb) for limb in skeleton.limbs}
    assert {frozenset(mirrored.get(index, index) for index in limb) for limb in limbs} == limbs
    legs = {index for index, name in enumerate(skeleton.names) if name.endswith(("hip", "knee", "ankle"))}
    assert set(skeleton.upper_body) == set(range(count)) - legs


def test_the_skeletons_have_the_data_sets_order_and_sigmas() -> None:
    assert len(COCO.names) == 17 and COCO.names[0] == "nose" and COCO.names[5:7] == ("left_shoulder", "right_shoulder")
    assert COCO.sigmas[::4] == (0.026, 0.035, 0.072, 0.107, 0.089)
    assert len(CROWDPOSE.names) == 14 and CROWDPOSE.names[12:] == ("top_head", "neck")
    assert CROWDPOSE.sigmas[::4] == (0.079, 0.062, 0.087, 0.079)


@pytest.mark.parametrize("pairs", [[(0, 1), (1, 2)], [(3, 5)], [(-1, 0)], [(2, 2)], [(0, 1, 2)]])
def test_pairs_that_do_not_fit_are_refused(pairs) -> None:
    with pytest.raises(PoseError, match=r"do not fit 5 key points: every index is from 0 to 4 and in one pair at most"):
        exchange_sides(maps(), pairs)


@pytest.mark.parametrize("pairs", [[(0,), (1, 2, 3)], [0, 1], [(0.0, 1.0)], [("0", "1")], None, 3])
def test_what_is_no_list_of_pairs_is_refused(pairs) -> None:
    with pytest.raises(PoseError, match=r"do not fit 5 key points: .* pass the skeleton's own"):
        exchange_sides(maps(), pairs)


def test_pairs_may_be_a_tensor_or_an_array() -> None:
    expected = exchange_sides(maps(), PAIRS)
    for pairs in (torch.tensor(PAIRS), torch.tensor(PAIRS).numpy(), [list(pair) for pair in PAIRS]):
        assert torch.equal(exchange_sides(maps(), pairs), expected)
    assert torch.equal(exchange_sides(maps(), torch.zeros(0, 2, dtype=torch.long)), maps())


def test_exchanging_sides_compiles_without_graph_breaks() -> None:
    compiled = torch.compile(lambda output: exchange_sides(output, PAIRS), fullgraph=True, backend="eager")
    assert torch.equal(compiled(maps()), exchange_sides(maps(), PAIRS))


def test_cocos_pairs_are_refused_for_crowdposes_key_points() -> None:
    with pytest.raises(PoseError, match=r"do not fit 14 key points: .* CROWDPOSE.flip_pairs for 14"):
        flip_back(torch.zeros(1, 14, 4, 4), COCO.flip_pairs)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PoseError, match=r"flip_back: heatmaps takes \[B, K, h, w\], and this tensor is \[5, 3, 4\]"):
        flip_back(maps()[0], PAIRS)
    with pytest.raises(
        PoseError, match=r"heatmaps_of_mirrored takes \[2, 5, 3, 4\], and this tensor is \[1, 5, 3, 4\]"
    ):
        average_flipped(maps(), maps()[:1], PAIRS)
    with pytest.raises(PoseError, match=r"flip_back_regression: output takes \[B, K, C\]"):
        flip_back_regression(maps(), PAIRS)
