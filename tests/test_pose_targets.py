"""Targets of key points: the published ones' values, a plain loop's, and what does not count."""

from __future__ import annotations

import re
from math import exp

import pytest
import torch
from torch import Tensor

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.losses.supervised import CoordinateLoss, HeatmapLoss, RLELoss
from cyclekd.integrations.tokenpose.losses.targets import Target, coordinate_target, heatmap_target, usual_sigma
from golden import golden

SIZES = {"input_size": (256, 192), "heatmap_size": (64, 48)}
BOTH = pytest.mark.parametrize("unbiased", [True, False], ids=["unbiased", "biased"])


def people() -> tuple[Tensor, Tensor]:
    """Two people with five key points, one outside on each side, one unlabelled: [2, 5, 2] and [2, 5]."""
    keypoints = torch.tensor(
        [[5.736232, 56.821217], [87.711983, 99.320641], [-35.0, 50.0], [100.0, 281.0], [50.3, 80.7]]
    )
    return torch.stack((keypoints, keypoints + 1.3)), torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]).repeat(2, 1)


def by_loop(x: float, y: float, unbiased: bool, *, height: int = 64, width: int = 48, sigma: float = 2.0) -> Tensor:
    x, y = x / 4, y / 4
    if not unbiased:
        x, y = float(int(x + 0.5)), float(int(y + 0.5))
    values = torch.zeros(height, width, dtype=torch.float64)
    for v in range(height):
        for u in range(width):
            if unbiased or (abs(u - x) <= 3 * sigma and abs(v - y) <= 3 * sigma):
                values[v, u] = exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * sigma**2))
    return values


@BOTH
def test_heatmap_targets_equal_the_published_ones(unbiased: bool) -> None:
    reference, name = golden("data_ops"), "unbiased" if unbiased else "biased"
    joints, visible = reference["target.joints_input_px"][None, :, :2], reference["target.joints_visible"][None, :, 0]
    values, weights = heatmap_target(joints, visible, **SIZES, unbiased=unbiased)
    torch.testing.assert_close(values[0], reference[f"target.{name}.heatmap"], rtol=0, atol=1e-6)
    assert torch.equal(weights[0], reference[f"target.{name}.weight"])


def test_coordinate_targets_equal_the_published_ones() -> None:
    reference = golden("data_ops")
    joints, visible = reference["target.joints_input_px"][None, :, :2], reference["target.joints_visible"][None, :, 0]
    values, weights = coordinate_target(joints, visible, input_size=(256, 192))
    torch.testing.assert_close(values[0], reference["target.regression.target"], rtol=0, atol=1e-6)
    assert torch.equal(weights[0], reference["target.regression.weight"])


@pytest.mark.parametrize(
    ("unbiased", "values"),
    [(True, [0.97159177, 0.99575526, 0.03401506]), (False, [1.0, 1.0, 0.02664910])],
    ids=["unbiased", "biased"],
)
def test_heatmap_targets_have_sampled_values_of_the_published_ones(unbiased: bool, values: list[float]) -> None:
    maps, weights = heatmap_target(*people(), **SIZES, unbiased=unbiased)
    sampled = torch.stack((maps[0, 0, 14, 1], maps[0, 1, 25, 22], maps[0, 1, 20, 20]))
    torch.testing.assert_close(sampled, torch.tensor(values), rtol=0, atol=1e-6)
    assert weights[0, :, 0].tolist() == [1, 1, 0, 0, 0]


@BOTH
def test_heatmap_targets_equal_a_plain_loop_and_are_zero_without_weight(unbiased: bool) -> None:
    keypoints, visible = people()
    maps, weights = heatmap_target(keypoints, visible, **SIZES, unbiased=unbiased)
    assert maps.shape == (2, 5, 64, 48) and weights.shape == (2, 5, 1)
    for person in range(2):
        for keypoint in range(5):
            expected = by_loop(*keypoints[person, keypoint].tolist(), unbiased) * weights[person, keypoint].item()
            torch.testing.assert_close(maps[person, keypoint].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "counts", "counts_biased"),
    # 3 sigma are 24 input pixels; the window reaches one map pixel further on the right
    [(-28.0, 1, 1), (-28.5, 0, 1), (-31.0, 0, 1), (-34.5, 0, 0), (215.9, 1, 0), (216.0, 0, 0), (213.0, 1, 1)],
)
def test_a_key_point_counts_as_long_as_its_window_touches_the_map(x: float, counts: int, counts_biased: int) -> None:
    for unbiased, expected in ((True, counts), (False, counts_biased)):
        for keypoint in ((x, 99.0), (99.0, x + 64 if x > 0 else x)):
            keypoints = torch.tensor([[keypoint]])
            _, weights = heatmap_target(keypoints, torch.ones(1, 1), **SIZES, unbiased=unbiased)
            assert weights.item() == expected, (keypoint, unbiased)


def test_other_sigmas_and_strides_are_kept_apart_by_axis() -> None:
    keypoints = torch.tensor([[[24.0, 20.0]]])
    maps, _ = heatmap_target(keypoints, torch.ones(1, 1), input_size=(40, 48), heatmap_size=(20, 12), sigma=3.0)
    assert maps[0, 0].argmax().item() == 10 * 12 + 6
    assert maps[0, 0, 10, 9].item() == pytest.approx(exp(-9 / 18))


@pytest.mark.parametrize("height, sigma", [(96, 3.0), (64, 2.0), (32, 1.0), (16, 1.0)])
def test_a_gaussian_is_as_wide_relative_to_the_map_as_the_published_ones(height: int, sigma: float) -> None:
    size = height, height * 3 // 4
    points, sizes = torch.full((1, 1, 2), 20.0), {"input_size": (4 * height, 3 * height), "heatmap_size": size}
    values = heatmap_target(points, torch.ones(1, 1), **sizes).values
    assert usual_sigma(size) == usual_sigma((height, height)) == sigma
    assert torch.equal(values, heatmap_target(points, torch.ones(1, 1), sigma=sigma, **sizes).values)


def test_coordinate_targets_count_inside_the_outermost_pixels_centres_only() -> None:
    keypoints = torch.tensor(
        [[[0.0, 0.0], [191.0, 255.0], [191.5, 9.0], [9.0, 255.5], [-0.1, 9.0], [9.0, -0.1], [48.0, 64.0]]]
    )
    values, weights = coordinate_target(keypoints, torch.tensor([[1, 2, 1, 1, 1, 1, 0]]), input_size=(256, 192))
    assert weights[0].tolist() == [[1, 1], [1, 1], *[[0, 0]] * 5]
    assert values[0, 6].tolist() == [0.25, 0.25]


@pytest.mark.parametrize("make", [heatmap_target, coordinate_target])
def test_a_batch_gives_what_single_people_give_and_float64_stays(make) -> None:
    sizes = SIZES if make is heatmap_target else {"input_size": (256, 192)}
    keypoints, visible = people()
    batch = make(keypoints, visible, **sizes)
    for person in range(2):
        single = make(keypoints[person : person + 1], visible[person : person + 1] > 0, **sizes)
        assert isinstance(single, Target) and torch.equal(batch.values[person], single.values[0])
        assert torch.equal(batch.weights[person], single.weights[0])
    assert {tensor.dtype for tensor in batch} == {torch.float32}
    assert {tensor.dtype for tensor in make(keypoints.double(), visible, **sizes)} == {torch.float64}
    assert {tensor.dtype for tensor in make(keypoints.half(), visible, **sizes)} == {torch.float32}


@pytest.mark.parametrize("lost", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_lost_coordinate_leaves_zeros_and_a_finite_loss_of_the_others(lost: float) -> None:
    keypoints, visible = people()
    everybody = keypoints.clone()
    keypoints[0, 4], keypoints[1, 1, 0] = lost, lost  # one unlabelled, one labelled of which only x is lost
    for unbiased in (True, False):
        found = heatmap_target(keypoints, visible, **SIZES, unbiased=unbiased)
        complete = heatmap_target(everybody, visible, **SIZES, unbiased=unbiased)
        kept = torch.ones(2, 5, 1).index_put((torch.tensor([0, 1]), torch.tensor([4, 1])), torch.tensor(0.0))
        assert torch.equal(found.weights, complete.weights * kept)
        assert torch.equal(found.values, complete.values * kept[..., None])
        assert HeatmapLoss()(torch.zeros(2, 5, 64, 48), found).isfinite()
    found, complete = (coordinate_target(each, visible, input_size=(256, 192)) for each in (keypoints, everybody))
    assert torch.equal(found.weights, complete.weights * kept)
    assert found.values[0, 4].tolist() == [0, 0]
    assert found.values[1, 1].tolist() == [0, complete.values[1, 1, 1].item()]
    for loss, numbers in ((CoordinateLoss(), 2), (RLELoss(), 4), (RLELoss(base="gaussian"), 4)):
        prediction = torch.zeros(2, 5, numbers, requires_grad=True)
        value = loss(prediction, found)
        value.backward()
        assert value.isfinite() and prediction.grad.isfinite().all()


@pytest.mark.parametrize("sigma", [0, -2.0, float("nan"), float("inf")])
def test_a_gaussian_without_width_is_refused(sigma: float) -> None:
    with pytest.raises(PoseError, match=rf"heatmap_target\(sigma={sigma}\): .* above 0, as in sigma=2.0"):
        heatmap_target(*people(), **SIZES, sigma=sigma)


@pytest.mark.parametrize("size", [256, (256,), (256, 192, 3), None, (0, 192)])
def test_what_is_no_size_is_refused(size) -> None:
    with pytest.raises(PoseError, match=rf"input_size={re.escape(str(size))}, .* \(height, width\), as in \(256,"):
        heatmap_target(*people(), input_size=size, heatmap_size=(64, 48))
    with pytest.raises(PoseError, match=rf"heatmap_size={re.escape(str(size))}\): .* \(64, 48\)"):
        heatmap_target(*people(), input_size=(256, 192), heatmap_size=size)
    with pytest.raises(PoseError, match=rf"coordinate_target\(input_size={re.escape(str(size))}\): .* \(256, 192\)"):
        coordinate_target(*people(), input_size=size)


def test_shapes_and_sizes_that_do_not_fit_are_refused() -> None:
    keypoints, visible = people()
    with pytest.raises(PoseError, match=r"keypoints takes \[B, K, 2\], and this tensor is \[5, 2\]: .*tensor\[None\]"):
        heatmap_target(keypoints[0], visible[0], **SIZES)
    with pytest.raises(PoseError, match=r"visible takes \[2, 5\], and this tensor is \[2, 4\]: pass one of that shape"):
        coordinate_target(keypoints, visible[:, :4], input_size=(256, 192))
    with pytest.raises(PoseError, match=r"heatmap_size=\(48, 64\)\): the input is a whole multiple .* \(64, 48\)"):
        heatmap_target(keypoints, visible, input_size=(256, 192), heatmap_size=(48, 64))
