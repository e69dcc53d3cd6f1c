"""Key points from outputs: the published decoders' numbers, plain loops, empty maps, and ONNX Runtime."""

from __future__ import annotations

from math import exp, log
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.decoding import (
    argmax,
    dark,
    decode_heatmaps,
    decode_regression,
    decode_token_regression,
    quarter_shift,
    smooth,
    to_image,
    to_image_aligned,
)
from cyclekd.integrations.tokenpose.losses.targets import heatmap_target
from golden import golden

METHODS = pytest.mark.parametrize("method", ["dark", "quarter", "argmax"])
CENTRES = [(7.3, 9.6), (4.2, 12.8), (11.45, 3.1), (0.3, 8.0), (1.2, 5.0), (14.6, 18.7), (2.4, 2.2), (13.2, 16.9)]


def noisy_maps(height: int = 20, width: int = 16) -> Tensor:
    """[2, 5, h, w] in float32: eight blobs with ripples, inside and at the borders, a negative map and a zero map."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    ripples = [0.05 * torch.sin(k + 1.7 * x + 0.9 * y * (k + 1)) for k in range(len(CENTRES))]
    blobs = [
        torch.exp(-((x - u) ** 2 + (y - v) ** 2) / 8) + each for (u, v), each in zip(CENTRES, ripples, strict=True)
    ]
    maps = [*blobs[:4], -1 - blobs[0], *blobs[4:], torch.zeros_like(x)]
    return torch.stack(maps).view(2, 5, height, width).float()


# -- a plain loop -----------------------------------------------------------------------------------------------


def dark_by_loop(values: list[list[float]]) -> tuple[float, float]:
    x, y = argmax_by_loop(values)
    height, width = len(values), len(values[0])
    if not (1 < x < width - 2 and 1 < y < height - 2):
        return x, y
    blurred = blur_by_loop(values)
    ratio = max(map(max, values)) / max(map(max, blurred))

    def at(u: int, v: int) -> float:
        return log(max(blurred[y + v][x + u] * ratio, 1e-10))

    gx, gy = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    xx, yy = (at(2, 0) - 2 * at(0, 0) + at(-2, 0)) / 4, (at(0, 2) - 2 * at(0, 0) + at(0, -2)) / 4
    xy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    inverse = 1 / (xx * yy - xy * xy)
    return x - inverse * (yy * gx - xy * gy), y - inverse * (xx * gy - xy * gx)


def argmax_by_loop(values: list[list[float]]) -> tuple[int, int]:
    best, x, y = max((value, -u, -v) for v, row in enumerate(values) for u, value in enumerate(row))
    return (-x, -y) if best > 0 else (-1, -1)


def blur_by_loop(values: list[list[float]]) -> list[list[float]]:
    height, width = len(values), len(values[0])
    weights = {(i, j): exp(-(i * i + j * j) / 8) for i in range(-5, 6) for j in range(-5, 6)}
    total = sum(weights.values())

    def blurred(u: int, v: int) -> float:
        inside = ((i, j) for i, j in weights if 0 <= u + i < width and 0 <= v + j < height)
        return sum(weights[i, j] * values[v + j][u + i] for i, j in inside) / total

    return [[blurred(u, v) for u in range(width)] for v in range(height)]


def quarter_by_loop(values: list[list[float]]) -> tuple[float, float]:
    x, y = argmax_by_loop(values)
    if not (1 < x < len(values[0]) - 1 and 1 < y < len(values) - 1):
        return x, y
    right, below = values[y][x + 1] - values[y][x - 1], values[y + 1][x] - values[y - 1][x]
    return x + 0.25 * ((right > 0) - (right < 0)), y + 0.25 * ((below > 0) - (below < 0))


def a_peak_at_every_pixel(height: int = 7, width: int = 6) -> Tensor:
    """[1, h * w, h, w]: maps that peak a little right of and below one pixel each."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    maps = [torch.exp(-((x - u - 0.2) ** 2 + (y - v - 0.3) ** 2) / 8) for v in range(height) for u in range(width)]
    return torch.stack(maps)[None].float()


@pytest.mark.parametrize(("method", "by_loop"), [("dark", dark_by_loop), ("quarter", quarter_by_loop)])
@pytest.mark.parametrize("make", [noisy_maps, a_peak_at_every_pixel])
def test_decoding_equals_a_plain_loop(make, method: str, by_loop) -> None:
    maps = make()
    expected = [by_loop(values) for values in maps.flatten(0, 1).double().tolist()]
    found = decode_heatmaps(maps, method)
    torch.testing.assert_close(found.coordinates.flatten(0, 1), torch.tensor(expected).float(), rtol=0, atol=1e-4)
    assert torch.equal(found.scores, maps.amax((2, 3)))
    assert (found.coordinates - argmax(maps).coordinates).abs().amax(-1).gt(0.1).sum() >= 4  # the step does something


def test_smoothed_maps_equal_a_plain_loop_and_keep_their_maximum() -> None:
    maps = noisy_maps()
    smoothed = smooth(maps)
    torch.testing.assert_close(smoothed.amax((2, 3)), maps.amax((2, 3)))
    expected = torch.tensor(blur_by_loop(maps[0, 1].tolist()))
    torch.testing.assert_close(smoothed[0, 1], expected * (maps[0, 1].max() / expected.max()), rtol=0, atol=1e-5)


# -- the published decoders -------------------------------------------------------------------------------------


def test_decoded_heatmaps_equal_the_published_ones() -> None:
    reference = golden("data_ops")
    maps, box = reference["decode.heatmaps"], (reference["decode.center"], reference["decode.scale"], (64, 48))
    torch.testing.assert_close(smooth(maps)[0], reference["decode.blurred_n0"], rtol=0, atol=1e-5)
    found = decode_heatmaps(maps)
    assert torch.equal(argmax(maps).coordinates, reference["decode.argmax"])
    assert torch.equal(found.scores, reference["decode.maxvals"][..., 0])
    torch.testing.assert_close(found.coordinates, reference["decode.dark_heatmap_coords"], rtol=0, atol=1e-3)
    torch.testing.assert_close(to_image(found.coordinates, *box), reference["decode.dark_preds"], rtol=0, atol=5e-3)
    quarter = to_image(quarter_shift(maps).coordinates, *box)
    torch.testing.assert_close(quarter, reference["decode.default_preds"], rtol=0, atol=5e-3)


def test_aligned_key_points_equal_tokenposes_own() -> None:
    reference = golden("data_ops")
    found = dark(reference["decode.heatmaps"].double())
    box = (reference["decode.center"].double(), reference["decode.scale"].double(), (64, 48))
    image, there = to_image_aligned(found.coordinates, *box), found.scores > 0  # TokenPose puts empty maps at (0, 0)
    expected = reference["decode.tokenpose_preds"][there].double()
    torch.testing.assert_close(image[there], expected, rtol=0, atol=5e-3)
    assert there.sum() == 49


def test_regressed_key_points_equal_the_published_ones() -> None:
    reference = golden("reg_heads")
    found = decode_regression(reference["hidden64.cycle1.pred"])
    image = to_image(found.coordinates, reference["decode.center"], reference["decode.scale"], (1, 1))
    torch.testing.assert_close(image.double(), reference["decode.preds"], rtol=0, atol=5e-3)
    torch.testing.assert_close(found.scores, reference["decode.score"][..., 0], rtol=0, atol=1e-6)


def test_a_regressed_key_point_has_the_published_place_and_score() -> None:
    output = torch.tensor([[[0.09912996, -0.11732247, -0.48848701, 0.01103292]]])
    found = decode_regression(output)
    image = to_image(found.coordinates, torch.tensor([[320.5, 200.25]]), torch.tensor([[1.5, 2.0]]), (1, 1))
    torch.testing.assert_close(image, torch.tensor([[[200.238988, -46.678990]]]), rtol=0, atol=1e-4)
    assert found.scores.item() == pytest.approx(0.55849588)


@pytest.mark.parametrize(
    ("place", "expected"), [(to_image, (69.353729, 71.972778)), (to_image_aligned, (70.495445, 72.863029))]
)
def test_a_decoded_key_point_has_the_published_place_in_the_image(place, expected: tuple[float, float]) -> None:
    box = (torch.tensor([[100.0, 120.0]]), torch.tensor([[0.75, 1.0]]), (64, 48))
    found = place(torch.tensor([[[14.193194, 16.631290]]]), *box)
    torch.testing.assert_close(found, torch.tensor([[expected]]), rtol=0, atol=1e-4)


# -- what decoding is -------------------------------------------------------------------------------------------


def test_dark_recovers_unbiased_targets_to_a_hundredth_of_a_pixel_and_others_do_not() -> None:
    keypoints = torch.tensor([[[90.3, 120.9], [61.1, 200.6], [122.2, 77.7]]])
    maps, _ = heatmap_target(keypoints, torch.ones(1, 3), input_size=(256, 192), heatmap_size=(64, 48))
    error = {
        name: (decode_heatmaps(maps, name).coordinates * 4 - keypoints).abs().max() for name in ("dark", "quarter")
    }
    assert error["dark"] < 0.04 and error["quarter"] > 0.5  # input pixels


@METHODS
def test_maps_without_a_positive_value_have_no_key_point(method: str) -> None:
    maps = torch.stack((-1 - torch.rand(12, 10), torch.zeros(12, 10), torch.full((12, 10), -1e-30)))[None]
    found = decode_heatmaps(maps, method)
    assert found.coordinates.tolist() == [[[-1, -1]] * 3]
    assert torch.equal(found.scores, maps.amax((2, 3)))
    assert smooth(maps).isfinite().all()


def test_a_flat_map_and_one_positive_pixel_among_negative_ones_stay_where_they_are() -> None:
    spike = torch.full((20, 20), -1.0)
    spike[8, 11] = 0.5  # its surroundings' blur is negative everywhere
    flat = torch.ones(20, 20)
    assert dark(torch.stack((spike, flat))[None]).coordinates[0].tolist() == [[11, 8], [0, 0]]


@METHODS
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (4, 3)])
def test_maps_too_small_for_a_step_are_decoded_to_a_pixel(method: str, size: tuple[int, int]) -> None:
    maps = torch.zeros(1, 1, *size)
    maps[..., -1, -1] = 1
    assert decode_heatmaps(maps, method).coordinates[0, 0].tolist() == [size[1] - 1, size[0] - 1]


@METHODS
def test_a_batch_gives_what_single_maps_give_and_float64_stays(method: str) -> None:
    maps = noisy_maps()
    batch = decode_heatmaps(maps, method)
    for image in range(2):
        for keypoint in range(5):
            single = decode_heatmaps(maps[image : image + 1, keypoint : keypoint + 1], method)
            assert torch.equal(single.coordinates[0, 0], batch.coordinates[image, keypoint])
            assert torch.equal(single.scores[0, 0], batch.scores[image, keypoint])
    assert {tensor.dtype for tensor in batch} == {torch.float32}
    assert {tensor.dtype for tensor in decode_heatmaps(maps.double(), method)} == {torch.float64}
    assert {tensor.dtype for tensor in decode_heatmaps(maps.bfloat16(), method)} == {torch.float32}


def test_autocast_does_not_change_a_key_point() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = dark(noisy_maps())
    assert torch.equal(found.coordinates, dark(noisy_maps()).coordinates)


def test_the_third_of_five_columns_is_the_score() -> None:
    found = decode_token_regression(torch.tensor([[[0.25, 0.5, 1.5, 0.1, 0.2]]]))
    assert found.coordinates.tolist() == [[[0.25, 0.5]]] and found.scores.tolist() == [[1.5]]


def test_a_boxs_corners_are_the_grids_corners() -> None:
    center, scale = torch.tensor([[100.0, 120.0]]), torch.tensor([[0.75, 1.0]])
    corners = torch.tensor([[[0.0, 0.0], [48.0, 64.0]]])
    assert to_image(corners, center, scale, (64, 48)).tolist() == [[[25, 20], [175, 220]]]
    pixels = torch.tensor([[[0.0, 31.5], [47.0, 31.5]]])  # lengths are one less than sizes
    assert to_image_aligned(pixels, center, scale, (64, 48)).tolist() == [[[25.5, 120], [174.5, 120]]]


def test_every_image_is_placed_by_its_own_box() -> None:
    points, center, scale = torch.rand(3, 4, 2), torch.rand(3, 2) * 300, torch.rand(3, 2) + 0.5
    for place in (to_image, to_image_aligned):
        batch = place(points, center, scale, (64, 48))
        for i in range(3):
            assert torch.equal(place(points[i : i + 1], center[i : i + 1], scale[i : i + 1], (64, 48))[0], batch[i])


def test_unknown_methods_and_shapes_are_refused() -> None:
    with pytest.raises(PoseError, match=r"method='DARK'\): there are 'dark' .*, 'quarter' and 'argmax'"):
        decode_heatmaps(noisy_maps(), "DARK")
    with pytest.raises(PoseError, match=r"takes \[B, K, h, w\], and this tensor is \[5, 20, 16\]: .* heatmaps\[None\]"):
        decode_heatmaps(noisy_maps()[0])
    with pytest.raises(PoseError, match=r"takes \[B, K, 4\], .* \[1, 17, 5\]: .* decode_token_regression"):
        decode_regression(torch.zeros(1, 17, 5))
    with pytest.raises(PoseError, match=r"takes \[B, K, 5\], .* \[1, 17, 4\]: .* go to decode_regression"):
        decode_token_regression(torch.zeros(1, 17, 4))
    with pytest.raises(PoseError, match=r"to_image: center takes \[2, 2\], and this tensor is \[1, 2\]"):
        to_image(torch.zeros(2, 17, 2), torch.zeros(1, 2), torch.zeros(2, 2), (64, 48))
    with pytest.raises(PoseError, match=r"to_image_aligned\(size=\(1, 1\)\).* to_image with size=\(1, 1\)"):
        to_image_aligned(torch.zeros(1, 17, 2), torch.zeros(1, 2), torch.zeros(1, 2), (1, 1))


# -- ONNX Runtime -----------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(decode_heatmaps(maps))


@pytest.mark.slow
def test_onnx_runtime_decodes_any_batch_as_pytorch_does(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    maps = noisy_maps()
    batch = {"maps": {0: torch.export.Dim("batch")}}
    program = torch.onnx.export(Decoder().eval(), (maps,), dynamo=True, verbose=False, dynamic_shapes=batch)
    program.save(tmp_path / "decoder.onnx")
    session = runtime.InferenceSession(tmp_path / "decoder.onnx")
    for inputs in (maps, torch.cat((maps.flip(0), maps))):
        for found, expected in zip(session.run(None, {"maps": inputs.numpy()}), dark(inputs), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)


def test_darks_step_does_not_depend_on_the_size_of_the_values() -> None:
    maps = a_peak_at_every_pixel()
    torch.testing.assert_close(dark(1e-5 * maps).coordinates, dark(maps).coordinates, rtol=0, atol=1e-3)
