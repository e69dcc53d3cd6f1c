"""Boxes, centres, scales and matrices: the published ones' values, both conventions, and boxes that cannot be used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.decoding import to_image, to_image_aligned
from cyclekd.integrations.tokenpose.keypoints.geometry import (
    center_and_scale,
    center_and_scale_aligned,
    clean_boxes,
    compose_matrices,
    crop_matrices,
    crop_matrices_aligned,
    invert_matrices,
    transform_points,
)
from golden import golden

SIZE = (256, 192)
BOXES = torch.tensor([[10, 20, 100, 200], [0, 0, 50, 30], [300.5, 100.25, 80.75, 160.5], [5, 5, 20, 300]])
ROTATIONS = torch.tensor([0, 30, -57.5, 90])
# the published functions' values for these boxes and rotations
SCALES = [[0.9375, 1.25], [0.3125, 0.4166666], [0.75234377, 1.00312495], [1.40625, 1.875]]
MATRICES = [
    [[1.024, 0, 34.56], [0, 1.024, 5.12]],
    [[2.66043006, 1.53600004, 6.44924796], [-1.53600004, 2.66043006, 126.49354997]],
    [[0.68560103, -1.076178, 56.54587754], [1.076178, 0.68560103, -362.59316107]],
    [[0, 0.68266667, -9.81333333], [-0.68266667, 0, 138.24]],
]
ALIGNED = [
    [[1.02412869, 0, 34.56434316], [0, 1.02412869, 5.11662198]],
    [[2.68960734, 1.55284551, 7.08836043], [-1.55284551, 2.68960734, 126.54540845]],
    [[0.68659319, -1.07773534, 55.79320555], [1.07773534, 0.68659319, -362.92094049]],
    [[0, 0.68153434, -9.7970562], [-0.68153434, 0, 137.3822480]],
]
CONVENTIONS = pytest.mark.parametrize(
    ("boxes_to", "matrices_of"),
    [(center_and_scale, crop_matrices), (center_and_scale_aligned, crop_matrices_aligned)],
    ids=["mmpose", "aligned"],
)


def close(found: Tensor, expected: Tensor | list, atol: float = 1e-5) -> None:
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=atol)


# -- the published functions ------------------------------------------------------------------------------------


def test_centres_scales_and_matrices_equal_sampled_published_values() -> None:
    center, scale = center_and_scale(BOXES, SIZE)
    aligned, same = center_and_scale_aligned(BOXES, SIZE)
    close(center, [[60, 120], [25, 15], [340.875, 180.5], [15, 155]])
    close(aligned, [[59.5, 119.5], [24.5, 14.5], [340.375, 180], [14.5, 154.5]])
    close(scale, SCALES)
    close(same, SCALES)
    close(crop_matrices(center.double(), scale.double(), ROTATIONS, SIZE), MATRICES, atol=3e-5)
    close(crop_matrices_aligned(aligned.double(), scale.double(), ROTATIONS, SIZE), ALIGNED, atol=3e-5)
    close(crop_matrices(center, scale, ROTATIONS, SIZE), MATRICES, atol=1e-4)


def test_centres_and_scales_equal_the_published_ones() -> None:
    reference = golden("data_ops")
    boxes = reference["box.xywh"]
    for function, name in ((center_and_scale, ""), (center_and_scale_aligned, "tokenpose_")):
        center, scale = function(boxes, SIZE)
        close(center, reference[f"box.{name}center"], atol=0)
        close(scale, reference[f"box.{name}scale"], atol=1e-7)


def test_matrices_their_inverses_and_points_equal_the_published_ones() -> None:
    reference = golden("data_ops")
    boxes, rotations = reference["box.xywh"].double(), reference["affine.rot"]
    box, aligned = center_and_scale(boxes, SIZE), center_and_scale_aligned(boxes, SIZE)
    matrices = crop_matrices(*box, rotations, SIZE)
    close(matrices, reference["affine.img_mat"], atol=3e-5)
    close(crop_matrices_aligned(*aligned, rotations, SIZE), reference["affine.tokenpose_img_mat"], atol=3e-5)
    close(invert_matrices(crop_matrices(*box, rotations, (64, 48))), reference["affine.heatmap_inv_mat"])
    points = transform_points(matrices[1:2], reference["affine.points"][None])
    close(points[0], reference["affine.points_out1"].double(), atol=1e-4)


# -- what the conventions mean ----------------------------------------------------------------------------------


def test_mmpose_maps_the_padded_box_onto_the_crop() -> None:
    center, scale = center_and_scale(torch.tensor([[40, 30, 60, 80]]).double(), SIZE, padding=1.5)
    corners = torch.stack((center - 100 * scale, center + 100 * scale), 1)
    close(corners, [[[25, 10], [115, 130]]])
    close(transform_points(crop_matrices(center, scale, torch.zeros(1), SIZE), corners), [[[0, 0], [192, 256]]])


def test_aligned_maps_the_outermost_pixels_of_the_padded_box_onto_those_of_the_crop() -> None:
    center, scale = center_and_scale_aligned(torch.tensor([[40.0, 30.0, 96.0, 128.0]]), SIZE, padding=1.0)
    matrix = crop_matrices_aligned(center, scale, torch.zeros(1), SIZE)
    # 95 pixels apart become 191, and 127 become 127 * 191 / 95
    close(transform_points(matrix, torch.tensor([[[40.0, 93.5], [135.0, 93.5]]])), [[[0, 127.5], [191, 127.5]]], 1e-4)


def test_a_positive_rotation_turns_the_picture_anticlockwise_round_the_centre() -> None:
    center, scale = torch.tensor([[50.0, 70.0]]), torch.tensor([[0.96, 1.28]])  # 192 x 256 px: lengths stay
    matrix = crop_matrices(center, scale, torch.tensor([90.0]), SIZE)
    right_of_it = torch.tensor([[[50.0, 70.0], [60.0, 70.0]]])
    close(transform_points(matrix, right_of_it), [[[96, 128], [96, 118]]], atol=1e-4)


@pytest.mark.parametrize(
    ("matrices_of", "back"), [(crop_matrices, to_image), (crop_matrices_aligned, to_image_aligned)]
)
def test_decoded_coordinates_go_back_by_the_inverse_matrix(matrices_of, back) -> None:
    center, scale = center_and_scale(BOXES, SIZE)
    points = torch.tensor([[0.0, 0.0], [47.0, 63.0], [20.3, 31.8]]).expand(4, 3, 2)
    inverse = invert_matrices(matrices_of(center, scale, torch.zeros(4), (64, 48)))
    close(transform_points(inverse, points), back(points, center, scale, (64, 48)), atol=1e-3)


def test_inverse_and_composition_lead_back() -> None:
    matrices = torch.tensor([[[1.2, 0.3, 5.0], [-0.7, 2.0, -3.0]], [[0.1, -2.0, 40.0], [3.0, 0.2, 7.0]]]).double()
    points = torch.tensor([[1.0, 2.0], [-30.0, 44.5]]).double().expand(2, 2, 2)
    inverse = invert_matrices(matrices)
    close(transform_points(inverse, transform_points(matrices, points)), points, atol=1e-9)
    close(compose_matrices(inverse, matrices), torch.eye(3)[:2].expand(2, 2, 3), atol=1e-9)
    both = compose_matrices(matrices, matrices.flip(0))
    close(transform_points(both, points), transform_points(matrices, transform_points(matrices.flip(0), points)), 1e-9)


def test_half_precision_is_computed_in_single_and_double_stays_double() -> None:
    center, scale = center_and_scale(BOXES.half(), SIZE)
    assert center.dtype == scale.dtype == torch.float32
    assert crop_matrices(center, scale, ROTATIONS, SIZE).dtype == torch.float32
    center, scale = center_and_scale(BOXES.double(), SIZE)
    assert crop_matrices(center, scale, ROTATIONS, SIZE).dtype == torch.float64


def test_matrices_and_points_read_no_value_of_a_device() -> None:
    center, scale, points = (torch.ones(*shape, device="meta") for shape in ((4, 2), (4, 2), (4, 17, 2)))
    matrices = invert_matrices(crop_matrices(center, scale, torch.ones(4, device="meta"), SIZE))
    assert transform_points(compose_matrices(matrices, matrices), points).shape == (4, 17, 2)


# -- boxes ------------------------------------------------------------------------------------------------------


def cleaned_by_loop(box: list[float], height: int, width: int) -> list[float]:
    x, y = max(0, box[0]), max(0, box[1])
    right, bottom = min(width - 1, x + max(0, box[2])), min(height - 1, y + max(0, box[3]))
    return [x, y, max(0, right - x), max(0, bottom - y)]


def test_clean_boxes_end_at_the_last_pixel_and_begin_at_the_first() -> None:
    boxes = [
        [10.5, 20.25, 30, 40],
        [-5, -7, 30, 40],
        [90, 70, 50, 50],
        [0, 0, 100, 80],
        [120, 10, 30, 30],
        [5, 5, -3, 10],
    ]
    found = clean_boxes(torch.tensor(boxes), torch.tensor([[80, 100]]).expand(6, 2))
    close(found, [cleaned_by_loop(box, 80, 100) for box in boxes], atol=0)
    close(found[:4], [[10.5, 20.25, 30, 40], [0, 0, 30, 40], [90, 70, 9, 9], [0, 0, 99, 79]], atol=0)


def test_a_box_outside_its_image_is_left_without_area() -> None:
    sizes = torch.tensor([[80, 100], [80, 100], [200, 200]])
    boxes = torch.tensor([[100.0, 10.0, 30.0, 30.0], [10.0, 90.0, 30.0, 30.0], [100.0, 10.0, 30.0, 30.0]])
    assert (clean_boxes(boxes, sizes)[:, 2:] > 0).all(1).tolist() == [False, False, True]


@CONVENTIONS
def test_a_box_without_area_is_refused_by_row(boxes_to, matrices_of) -> None:
    boxes = BOXES.clone()
    boxes[2, 3] = 0
    with pytest.raises(
        PoseError, match=r"1 of 4 cannot be used: row 2, \[300.5, 100.25, 80.75, 0.0\], has no area"
    ) as e:
        boxes_to(boxes, SIZE)
    assert "boxes[(boxes[:, 2:] > 0).all(1)]" in str(e.value)
    boxes[1, 2] = -3
    with pytest.raises(PoseError, match="2 of 4 cannot be used: row 1"):
        boxes_to(boxes, SIZE)


def test_a_box_smaller_than_a_pixel_has_an_area() -> None:
    center, scale = center_and_scale(torch.tensor([[4.0, 6.0, 0.75, 0.5]]), SIZE)
    close(center, [[4.375, 6.25]])
    close(scale * 200, [[0.9375, 1.25]])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 3])
def test_boxes_that_are_not_finite_are_refused_by_row(value: float, column: int) -> None:
    boxes = BOXES.clone()
    boxes[3, column] = value
    for call in (
        lambda: clean_boxes(boxes, torch.full((4, 2), 500)),
        lambda: center_and_scale(boxes, SIZE),
        lambda: center_and_scale_aligned(boxes, SIZE),
    ):
        with pytest.raises(PoseError, match=r"1 of 4 cannot be used: row 3, .*(nan|inf).* is not finite; .*isfinite"):
            call()


@CONVENTIONS
def test_other_shapes_are_refused(boxes_to, matrices_of) -> None:
    center, scale = boxes_to(BOXES, SIZE)
    with pytest.raises(PoseError, match=r"boxes takes \[N, 4\].*\[4\].*a batch of one"):
        boxes_to(BOXES[0], SIZE)
    with pytest.raises(PoseError, match=r"center takes \[N, 2\]"):
        matrices_of(center[0], scale, ROTATIONS, SIZE)
    with pytest.raises(PoseError, match=r"scale takes \[4, 2\]"):
        matrices_of(center, scale[:2], ROTATIONS, SIZE)
    with pytest.raises(PoseError, match=r"rotation_degrees takes \[4\]"):
        matrices_of(center, scale, torch.tensor(0.0), SIZE)


def test_matrices_and_points_of_other_shapes_are_refused() -> None:
    matrices = torch.zeros(2, 2, 3)
    with pytest.raises(PoseError, match=r"image_sizes takes \[4, 2\]"):
        clean_boxes(BOXES, torch.tensor([80, 100]))
    with pytest.raises(PoseError, match=r"invert_matrices: matrices takes \[N, 2, 3\].*\[2, 3\]"):
        invert_matrices(matrices[0])
    with pytest.raises(PoseError, match=r"first takes \[2, 2, 3\]"):
        compose_matrices(matrices, matrices[:1])
    with pytest.raises(PoseError, match=r"points takes \[2, K, 2\].*\[2, 17, 3\]"):
        transform_points(matrices, torch.zeros(2, 17, 3))
