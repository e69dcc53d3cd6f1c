"""Scores of people, OKS and its suppression, and PCK: the published numbers, plain loops, and empty images."""

from __future__ import annotations

from itertools import product
from math import exp, isnan

import pytest
import torch
from torch import Tensor

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.evaluation.scoring import oks, oks_nms, pck, rescore, rescore_rle, soft_oks_nms
from cyclekd.integrations.tokenpose.losses.targets import Target
from cyclekd.integrations.tokenpose.skeletons import COCO, CROWDPOSE
from golden import golden, golden_json

SIGMAS = COCO.sigmas
NMS = pytest.mark.parametrize("nms", [oks_nms, soft_oks_nms])


def people(count: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Key points, scores and areas; every second person resembles the one before, more or less."""
    i, k = torch.arange(count, dtype=torch.float64)[:, None], torch.arange(17, dtype=torch.float64)
    x = 100 + 60 * torch.sin(k + (i // 2)) + (i % 2) * (1 + i) + 40 * (i // 2)
    y = 200 + 90 * torch.cos(2 * k) + (i % 2) * 2 * torch.sin(k) * i
    scores, areas = 0.5 + 0.4 * torch.sin(5 * i[:, 0]), 9000 + 500 * i[:, 0]
    keypoints = torch.stack((x, y, 0.5 + 0.5 * torch.sin(k + 3 * i)), -1)
    return keypoints.to(dtype), scores.to(dtype), areas.to(dtype)


def oks_by_loop(a: list[list[float]], area_a: float, b: list[list[float]], area_b: float) -> float:
    terms = []
    for (x, y, *_), (u, v, *_), sigma in zip(a, b, SIGMAS, strict=True):
        terms.append(exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * (area_a + area_b) / 2 * (2 * sigma) ** 2)))
    return sum(terms) / len(terms)


# -- the published numbers --------------------------------------------------------------------------------------


def published_people() -> tuple[Tensor, Tensor, Tensor]:
    reference = golden("data_ops")
    return reference["nms.keypoints"], reference["nms.score"], reference["nms.area"]


def test_oks_equals_the_published_matrix() -> None:
    keypoints, _, areas = published_people()
    found = oks(keypoints, areas, keypoints, areas, sigmas=SIGMAS)
    torch.testing.assert_close(found.float(), golden("data_ops")["nms.oks_matrix"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.9, 0.7, 0.5])
def test_suppression_keeps_the_published_people(threshold: float) -> None:
    kept = oks_nms(*published_people(), sigmas=SIGMAS, threshold=threshold)
    assert torch.equal(kept, golden("data_ops")[f"nms.keep_thr{threshold}"])


def test_soft_suppression_orders_the_published_people() -> None:
    kept = soft_oks_nms(*published_people(), sigmas=SIGMAS)
    assert torch.equal(kept, golden("data_ops")["nms.soft_keep_thr0.9"])


def test_scores_of_people_equal_the_published_ones() -> None:
    (keypoints, boxes, _), expected = published_people(), golden_json("data_ops")
    assert rescore(keypoints[..., 2], boxes).tolist() == pytest.approx(expected["rescored_vis0.2"], abs=1e-12)
    assert rescore_rle(keypoints[..., 2], boxes).tolist() == pytest.approx(expected["rle_rescored"], abs=1e-12)


def test_pck_equals_the_published_one() -> None:
    reference = golden("data_ops")
    target = Target(reference["pck.target"], reference["pck.mask"][..., None])
    found = pck(reference["decode.heatmaps"], target, normalizer=(48, 64))
    assert torch.equal(found.by_keypoint, reference["pck.acc"])
    assert found.mean.item() == pytest.approx(golden_json("data_ops")["pck_avg"])


# -- scores of people -------------------------------------------------------------------------------------------


def test_a_persons_score_leaves_out_key_points_that_the_network_was_unsure_of() -> None:
    scores = torch.tensor([[0.5, 0.1, 0.9, 0.2], [0.1, 0.2, 0.0, 0.1]])
    found = rescore(scores, torch.tensor([0.5, 0.8]))
    torch.testing.assert_close(found, torch.tensor([0.35, 0.0]))
    assert rescore(scores, torch.ones(2), threshold=0.0).tolist() == pytest.approx([0.425, 0.4 / 3])


def test_an_rle_score_is_the_boxs_plus_mean_plus_largest() -> None:
    found = rescore_rle(torch.tensor([[0.5, 0.1, 0.9, 0.2]]), torch.tensor([0.5]))
    assert found.item() == pytest.approx(0.5 + 0.425 + 0.9)


# -- OKS --------------------------------------------------------------------------------------------------------


def test_oks_equals_a_plain_loop_and_takes_the_mean_of_both_areas() -> None:
    keypoints, _, areas = people()
    others, other_areas = keypoints[:3] + 4, areas[:3] * 2
    found = oks(keypoints, areas, others, other_areas, sigmas=SIGMAS)
    assert found.shape == (8, 3) and found.dtype == torch.float32
    for i, j in product(range(8), range(3)):
        expected = oks_by_loop(keypoints[i].tolist(), areas[i].item(), others[j].tolist(), other_areas[j].item())
        assert found[i, j].item() == pytest.approx(expected, abs=1e-5)
    single = oks(keypoints[2:3], areas[2:3], others, other_areas, sigmas=SIGMAS)
    torch.testing.assert_close(single[0], found[2])


def test_one_key_point_a_sigma_away_loses_its_share() -> None:
    nose = torch.zeros(1, 17, 2)
    moved = nose.clone()
    moved[0, 0, 0] = 2 * SIGMAS[0] * 100  # area 100², so d = 2 sigma sqrt(area)
    found = oks(nose, torch.tensor([1e4]), moved, torch.tensor([1e4]), sigmas=SIGMAS)
    assert found.item() == pytest.approx((16 + exp(-0.5)) / 17)


def test_people_without_area_resemble_their_equals_only() -> None:
    keypoints = torch.stack((torch.zeros(17, 2), torch.ones(17, 2)))
    found = oks(keypoints, torch.zeros(2), keypoints, torch.zeros(2), sigmas=SIGMAS)
    assert torch.equal(found, torch.eye(2))


def test_areas_of_half_precision_count_in_full() -> None:
    keypoints, _, areas = people()
    areas = (areas * 4).half()  # 36,000 to 50,000 each: the sum of two is above float16's 65,504
    found = oks(keypoints, areas, keypoints, areas, sigmas=SIGMAS)
    assert torch.equal(found, oks(keypoints, areas.float(), keypoints, areas.float(), sigmas=SIGMAS))
    assert found.max() <= 1 and found.min() < 0.5


# -- suppression ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.95, 0.9, 0.7, 0.3])
def test_suppression_equals_a_plain_loop(threshold: float) -> None:
    keypoints, scores, areas = people(dtype=torch.float64)
    kept: list[int] = []
    for i in sorted(range(8), key=lambda i: -scores[i].item()):
        pairs = [
            oks_by_loop(keypoints[i].tolist(), areas[i].item(), keypoints[j].tolist(), areas[j].item()) for j in kept
        ]
        if all(pair <= threshold for pair in pairs):
            kept.append(i)
    assert oks_nms(keypoints, scores, areas, sigmas=SIGMAS, threshold=threshold).tolist() == kept
    assert len(kept) < 8


def test_soft_suppression_equals_a_plain_loop() -> None:
    keypoints, scores, areas = people(dtype=torch.float64)
    left, kept = dict(enumerate(scores.tolist())), []
    while left:
        best = max(left, key=left.__getitem__)
        kept.append(best)
        del left[best]
        for i in left:
            pair = oks_by_loop(keypoints[i].tolist(), areas[i].item(), keypoints[best].tolist(), areas[best].item())
            left[i] *= exp(-(pair**2) / 0.5)
    assert soft_oks_nms(keypoints, scores, areas, sigmas=SIGMAS, threshold=0.5).tolist() == kept
    assert soft_oks_nms(keypoints, scores, areas, sigmas=SIGMAS, threshold=0.5, keep=3).tolist() == kept[:3]
    assert kept != scores.argsort(descending=True).tolist()


def test_resembling_a_better_person_costs_a_gaussian_of_the_oks() -> None:
    same, apart, far = [0.0, 0.0], [1e5, 0.0], [0.0, 1e5]
    keypoints = torch.tensor([[same, same], [same, apart], [far, far]])  # the second's OKS with the first is 1/2
    for score, kept in ((0.59, [0, 1, 2]), (0.61, [0, 2, 1])):
        scores = torch.tensor([1.0, 0.99, score * 0.99])  # exp(-(1/2)² / 0.5) is 0.607
        assert soft_oks_nms(keypoints, scores, torch.ones(3), sigmas=[0.1, 0.1], threshold=0.5).tolist() == kept


@NMS
def test_an_image_without_people_and_one_with_a_single_person(nms) -> None:
    keypoints, scores, areas = people()
    assert nms(keypoints[:0], scores[:0], areas[:0], sigmas=SIGMAS).shape == (0,)
    assert nms(keypoints[:1], scores[:1], areas[:1], sigmas=SIGMAS).tolist() == [0]


@NMS
@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_person_with_a_lost_coordinate_resembles_nobody(nms, place: int) -> None:
    keypoints, scores, areas = people()
    others = torch.tensor([i for i in range(8) if i != place])
    expected = others[nms(keypoints[others], scores[others], areas[others], sigmas=SIGMAS)].tolist()
    keypoints[place, 5, 0] = float("nan")
    for score in (1e-3, 2.0):  # the last one taken, the first one taken
        scores[place] = score
        kept = nms(keypoints, scores, areas, sigmas=SIGMAS).tolist()
        assert kept == ([place, *expected] if score == 2 else [*expected, place])


@pytest.mark.parametrize("threshold", [1e-3, 0.9])
def test_soft_suppression_takes_nobody_twice(threshold: float) -> None:
    keypoints, scores, areas = people()
    kept = soft_oks_nms(keypoints[[0] * 8], scores, areas[[0] * 8], sigmas=SIGMAS, threshold=threshold)
    assert sorted(kept.tolist()) == list(range(8))


@NMS
def test_suppression_leaves_its_inputs_as_they_were(nms) -> None:
    inputs, before = people(), people()
    kept = nms(*inputs, sigmas=SIGMAS)
    assert kept.dtype == torch.int64
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)


# -- PCK --------------------------------------------------------------------------------------------------------


def peaks(*places: tuple[int, int]) -> Tensor:
    maps = torch.zeros(1, len(places), 64, 48)
    for k, (x, y) in enumerate(places):
        maps[0, k, y, x] = 1
    return maps


def test_pck_divides_x_by_the_width_and_y_by_the_height() -> None:
    target = Target(peaks((20, 30), (20, 30), (20, 30), (20, 30)), torch.ones(1, 4, 1))
    found = peaks((22, 30), (23, 30), (20, 33), (20, 34))  # 5 % are 2.4 columns and 3.2 rows
    assert pck(found, target).by_keypoint.tolist() == [1, 0, 1, 0]
    assert pck(found, target).mean.item() == 0.5
    assert pck(found, target, normalizer=(48, 64)).by_keypoint.tolist() == [1, 1, 0, 0]  # mmpose's
    assert pck(found, target, threshold=0.0626).by_keypoint.tolist() == [1, 1, 1, 1]


def test_key_points_without_weight_do_not_count() -> None:
    target = Target(torch.cat((peaks((5, 5), (9, 9), (7, 7)),) * 2), torch.tensor([[[1.0], [0], [0]], [[1], [1], [0]]]))
    found = pck(torch.cat((peaks((5, 5), (40, 9), (7, 7)), peaks((40, 5), (9, 9), (7, 7)))), target)
    assert found.by_keypoint[:2].tolist() == [0.5, 1.0] and isnan(found.by_keypoint[2])
    assert found.mean.item() == 0.75


# -- refusals ---------------------------------------------------------------------------------------------------


def test_shapes_and_sigmas_that_do_not_fit_are_refused() -> None:
    keypoints, scores, areas = people()
    with pytest.raises(PoseError, match=r"oks got 14 sigmas for 17 key points: .* CROWDPOSE.sigmas for 14"):
        oks_nms(keypoints, scores, areas, sigmas=CROWDPOSE.sigmas)
    with pytest.raises(PoseError, match=r"oks: others takes \[N, 17, 2 or more\], and this tensor is \[8, 14, 3\]"):
        oks(keypoints, areas, keypoints[:, :14], areas, sigmas=SIGMAS)
    with pytest.raises(PoseError, match=r"areas of keypoints takes \[8\], and this tensor is \[1\]"):
        oks_nms(keypoints, scores, areas[:1], sigmas=SIGMAS)
    with pytest.raises(PoseError, match=r"scores of the people takes \[8\], and this tensor is \[7\]"):
        soft_oks_nms(keypoints, scores[:7], areas, sigmas=SIGMAS)
    with pytest.raises(PoseError, match=r"oks: keypoints takes \[N, K, 2 or more\], and this tensor is \[17, 3\]"):
        oks(keypoints[0], areas, keypoints, areas, sigmas=SIGMAS)
    with pytest.raises(PoseError, match=r"rescore: box_scores takes \[8\], and this tensor is \[7\]"):
        rescore(keypoints[..., 2], scores[:7])
    with pytest.raises(PoseError, match=r"rescore_rle: keypoint_scores takes \[N, K\]"):
        rescore_rle(keypoints, scores)
    with pytest.raises(PoseError, match=r"pck: target.weights takes \[1, 4, 1\], and this tensor is \[1, 4\]"):
        pck(peaks(*[(1, 1)] * 4), Target(peaks(*[(1, 1)] * 4), torch.ones(1, 4)))
