"""Crops: OpenCV's to the last bit, a plain loop's, and those of the batched warp next to them."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor

from cyclekd.integrations.tokenpose.data.views import ViewSettings, numbers_of, random_views, view_matrices
from cyclekd.integrations.tokenpose.data.warp import normalize, warp_batch, warp_exact
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.geometry import crop_matrices, transform_points
from cyclekd.integrations.tokenpose.skeletons import COCO
from golden import golden

MATRIX = np.array([[0.61, 0.35, -1.3], [-0.35, 0.61, 2.9]])
# warpAffine(image, MATRIX, (7, 6)) of OpenCV 5.0: the first and the second channel of `small_image()`
OPENCV = [
    [
        [0, 0, 0, 8, 78, 29, 0],
        [0, 44, 199, 77, 166, 25, 0],
        [67, 165, 70, 124, 80, 117, 73],
        [120, 219, 72, 178, 75, 192, 91],
        [161, 13, 122, 142, 119, 51, 150],
        [177, 46, 164, 52, 167, 60, 113],
    ],
    [
        [0, 0, 0, 50, 143, 5, 0],
        [0, 57, 35, 141, 152, 106, 0],
        [141, 123, 103, 215, 79, 172, 19],
        [205, 69, 162, 187, 149, 134, 170],
        [193, 100, 162, 79, 189, 94, 107],
        [138, 137, 117, 126, 166, 147, 78],
    ],
]


def small_image() -> np.ndarray:
    """uint8 [12, 10, 3], without any smoothness."""
    y, x, channel = np.meshgrid(np.arange(12), np.arange(10), np.arange(3), indexing="ij")
    return ((37 * x + 53 * y + 91 * channel + 5 * x * y) % 256).astype(np.uint8)


def tensor(image: np.ndarray) -> Tensor:
    """[1, 3, H, W]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def array(crops: Tensor) -> np.ndarray:
    return crops[0].permute(1, 2, 0).numpy()


def by_loop(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Every pixel's interpolated value in exact fractions, [h, w, 3] in float64."""
    (a, b, x), (c, d, y) = [[Fraction(value) for value in row] for row in matrix.tolist()]
    height, width = image.shape[:2]
    values = np.zeros((*size, 3))
    for v in range(size[0]):
        for u in range(size[1]):
            px = (d * (u - x) - b * (v - y)) / (a * d - b * c)
            py = (a * (v - y) - c * (u - x)) / (a * d - b * c)
            for i, j in ((0, 0), (1, 0), (0, 1), (1, 1)):
                left, top = floor(px) + i, floor(py) + j
                if 0 <= left < width and 0 <= top < height:
                    weight = (1 - abs(px - left)) * (1 - abs(py - top))
                    values[v, u] += float(weight) * image[top, left].astype(np.float64)
    return values


# -- the exact crop ---------------------------------------------------------------------------------------------


def test_crops_equal_opencvs_in_every_value() -> None:
    crop = warp_exact(small_image(), MATRIX, (6, 7))
    assert crop.dtype == np.uint8 and crop[..., :2].transpose(2, 0, 1).tolist() == OPENCV
    assert crop.sum() == 12352


def test_a_large_crop_has_the_checksum_of_opencvs() -> None:
    y, x, channel = np.meshgrid(np.arange(240), np.arange(320), np.arange(3), indexing="ij")
    image = ((7 * x * x + 5 * y * y + 3 * x * y + 91 * channel) % 256).astype(np.uint8)
    matrix = np.array([[0.6856, -1.0762, 56.55], [1.0762, 0.6856, -362.59]])
    # of OpenCV 5.0; rounding in other places changes 3 to 27 of the values by one
    assert crc32(warp_exact(image, matrix, (256, 192)).tobytes()) == 3044497788


def test_crops_equal_the_published_ones_in_every_bit() -> None:
    reference = golden("data_ops")
    for row, matrix in enumerate(reference["affine.img_mat"]):
        crop = warp_exact(reference["affine.image"].numpy(), matrix, (256, 192))
        assert np.array_equal(crop, reference[f"affine.crop{row}"].numpy())


def test_crops_by_our_own_matrices_are_the_published_ones_but_for_rounding() -> None:
    reference = golden("data_ops")
    box = reference["box.center"].double(), reference["box.scale"].double()
    for row, matrix in enumerate(crop_matrices(*box, reference["affine.rot"], (256, 192))):
        crop = warp_exact(reference["affine.image"].numpy(), matrix, (256, 192)).astype(int)
        away = np.abs(crop - reference[f"affine.crop{row}"].numpy())
        assert away.max() <= 1 and away.mean() < 1e-3


@pytest.mark.parametrize("warp", ["exact", "batch"])
@pytest.mark.parametrize(
    "matrix", [MATRIX, np.array([[-1.7, 0.4, 14.0], [0.3, 2.1, -9.0]]), np.array([[0.2, 0.0, 0.4], [0.0, 0.3, 1.0]])]
)
def test_crops_equal_a_plain_loop(warp: str, matrix: np.ndarray) -> None:
    image, expected = small_image(), by_loop(small_image(), matrix, (11, 9))
    if warp == "exact":
        found = warp_exact(image, matrix, (11, 9))
    else:
        found = array(warp_batch(tensor(image), torch.from_numpy(matrix)[None], (11, 9)))
    assert np.abs(found - expected).max() < 0.51


def test_the_identity_gives_the_image_back_with_black_round_it() -> None:
    image = small_image()
    for crop in (
        warp_exact(image, np.array([[1, 0, 2], [0, 1, 1]]), (15, 14)),
        array(warp_batch(tensor(image), torch.tensor([[[1, 0, 2], [0, 1, 1.0]]]), (15, 14))),
    ):
        assert np.array_equal(crop[1:13, 2:12], image)
        assert crop.sum() == image.sum()


def test_a_crop_far_outside_is_black() -> None:
    far = np.array([[1, 0, 1e9], [0, 1, -3e12]])
    assert warp_exact(small_image(), far, (8, 8)).sum() == 0
    assert warp_batch(tensor(small_image()), torch.from_numpy(far)[None], (8, 8)).sum() == 0


def test_a_part_of_an_array_and_a_tensor_as_matrix_are_fine() -> None:
    wide = np.repeat(small_image(), 2, axis=1)
    expected = warp_exact(small_image(), MATRIX, (6, 7))
    assert np.array_equal(warp_exact(wide[:, ::2], torch.from_numpy(MATRIX), (6, 7)), expected)


# -- the batched crops next to the exact ones -------------------------------------------------------------------


def matrices_of_views(people: int, *, width: int, height: int) -> Tensor:
    """Float64 [N, 2, 3], of the paper's views on boxes in such an image."""
    row = torch.arange(people).double()
    center = torch.stack((width * (0.35 + 0.05 * row), height * (0.6 - 0.03 * row)), 1)
    scale = (torch.tensor([0.75, 1.0]).double() * height / 200).expand(people, 2)
    views = random_views(center, scale, torch.zeros(people, 17, 3), COCO, ViewSettings(), numbers_of(range(people)))
    assert len(views.flip.unique()) == 2 and (views.rotation.abs() > 20).any()
    return view_matrices(views, (128, 96))


def test_batched_crops_differ_by_less_than_a_tenth_of_a_grey_level_on_average() -> None:
    state = np.random.Generator(np.random.PCG64(0))
    images = state.integers(0, 256, (6, 120, 160, 3), dtype=np.uint8)  # noise: the hardest image there is
    matrices = matrices_of_views(6, width=160, height=120)
    crops = warp_batch(torch.from_numpy(images).permute(0, 3, 1, 2), matrices.float(), (128, 96))
    exact = np.stack([warp_exact(*pair, (128, 96)) for pair in zip(images, matrices, strict=True)])
    away = np.abs(crops.permute(0, 2, 3, 1).numpy().astype(int) - exact)
    assert crops.dtype == torch.uint8 and exact.mean() > 50
    assert away.max() <= 1 and away.mean() < 0.1


def test_dots_in_crops_stand_where_the_matrix_puts_keypoints() -> None:
    dots = torch.tensor([[60.3, 50.7], [95.6, 52.1], [70.25, 90.4], [100.8, 84.9]]).double()
    y, x = torch.meshgrid(torch.arange(150).double(), torch.arange(160).double(), indexing="ij")
    image = sum(250 * torch.exp(-((x - u) ** 2 + (y - v) ** 2) / 18) for u, v in dots.tolist())
    image = image.round().to(torch.uint8).expand(6, 3, 150, 160)
    matrices = matrices_of_views(6, width=160, height=150)
    batched = warp_batch(image, matrices.float(), (128, 96))
    located = 0
    for crop, matrix, picture in zip(batched, matrices, image, strict=True):
        exact = torch.from_numpy(warp_exact(picture.permute(1, 2, 0).numpy(), matrix, (128, 96))).permute(2, 0, 1)
        for point in transform_points(matrix[None], dots[None])[0]:
            if point.min() > 12 and point[0] < 83 and point[1] < 115:
                assert (locate(crop, point) - point).norm() < 0.05
                assert (locate(exact, point) - point).norm() < 0.05
                located += 1
    assert located >= 10


def locate(crop: Tensor, near: Tensor) -> Tensor:
    """The centre of brightness (x, y) within 9 px of a point, of a crop [3, h, w]."""
    y, x = torch.meshgrid(torch.arange(crop.shape[1]), torch.arange(crop.shape[2]), indexing="ij")
    light = crop[0].double() * ((x - near[0]) ** 2 + (y - near[1]) ** 2 < 81)
    return torch.stack(((x * light).sum(), (y * light).sum())) / light.sum()


def test_batched_crops_read_no_value_of_a_device() -> None:
    images = torch.zeros(2, 3, 12, 10, dtype=torch.uint8, device="meta")
    crops = normalize(warp_batch(images, torch.zeros(2, 2, 3, device="meta"), (6, 7)))
    assert crops.shape == (2, 3, 6, 7) and crops.dtype == torch.float32


# -- what a network takes ---------------------------------------------------------------------------------------


def test_normalized_crops_equal_the_published_one() -> None:
    reference = golden("data_ops")
    crops = reference["affine.crop0"].permute(2, 0, 1)[None]
    torch.testing.assert_close(normalize(crops)[0], reference["affine.normalized_crop0"], rtol=0, atol=1e-6)


def test_black_and_white_are_normalized_per_channel() -> None:
    crops = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)
    expected = [[-0.485 / 0.229, 0.515 / 0.229], [-0.456 / 0.224, 0.544 / 0.224], [-0.406 / 0.225, 0.594 / 0.225]]
    torch.testing.assert_close(normalize(crops)[0, :, 0], torch.tensor(expected))
    plain = normalize(crops, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert plain[0, :, 0].tolist() == [[0, 1]] * 3


# -- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        small_image().astype(np.float32),
        small_image().transpose(2, 0, 1),
        small_image()[..., 0],
        np.zeros((4, 4, 4), np.uint8),
        small_image()[:0],
    ],
    ids=["floats", "channels first", "grey", "alpha", "empty"],
)
def test_what_is_no_rgb_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(PoseError, match=r"takes an RGB image, uint8 \[H, W, 3\], and this one is .*convert\(\"RGB\"\)"):
        warp_exact(image, MATRIX, (6, 7))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_matrix_without_an_inverse_is_refused(value: float) -> None:
    with pytest.raises(PoseError, match=r"warp_exact: the matrix .* has no inverse.*crop_matrices"):
        warp_exact(small_image(), np.array([[value, 0.0, 3.0], [0.0, 1.0, 2.0]]), (6, 7))


def test_other_shapes_and_types_are_refused() -> None:
    images, matrices = tensor(small_image()), torch.from_numpy(MATRIX)[None]
    with pytest.raises(PoseError, match=r"warp_exact: matrix takes \[2, 3\].*\[1, 2, 3\].*matrices\[0\]"):
        warp_exact(small_image(), matrices, (6, 7))
    with pytest.raises(PoseError, match=r"warp_batch: images takes \[B, 3, H, W\].*a batch of one"):
        warp_batch(images[0], matrices, (6, 7))
    with pytest.raises(PoseError, match=r"warp_batch: matrices takes \[1, 2, 3\]"):
        warp_batch(images, matrices.expand(2, 2, 3), (6, 7))
    with pytest.raises(PoseError, match=r"warp_batch takes images of uint8.*torch.float32: warp first"):
        warp_batch(images.float(), matrices, (6, 7))
    with pytest.raises(PoseError, match=r"normalize: crops takes \[B, 3, h, w\]"):
        normalize(images.permute(0, 2, 3, 1))
    with pytest.raises(PoseError, match=r"normalize takes crops of uint8.*normalize once"):
        normalize(normalize(images))
