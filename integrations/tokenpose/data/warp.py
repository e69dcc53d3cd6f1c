"""Cuts crops out of images: exactly as OpenCV does, one at a time, or a whole batch on the device.

Both read the image where a crop's pixel lies in it and interpolate between four pixels, with black beyond the border. A
crop that is smaller than its part of the image is not smoothed first: the published models were trained so.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.keypoints.geometry import invert_matrices
from cyclekd.integrations.tokenpose.shapes import Size, check_shape


def warp_exact(image: np.ndarray, matrix: np.ndarray | Tensor, size: Size) -> np.ndarray:
    """The crop uint8 [h, w, 3] of `size` from an image uint8 [H, W, 3]; `matrix` [2, 3] leads from image to crop.

    Equal to warpAffine of OpenCV 5 with bilinear interpolation, to the last bit; OpenCV up to 4.10 rounds positions to
    1/32 px and differs by a few grey levels. PoseError for other shapes, and for a matrix that cannot be inverted.
    """
    _check_image(image)
    x, y = _positions(_inverse(matrix), size)
    left, top = np.floor(x), np.floor(y)
    across, down = (x - left)[..., None], (y - top)[..., None]  # [h, w, 1]
    left, top = _as_index(left, image.shape[1]), _as_index(top, image.shape[0])
    upper = _between(_pixels(image, left, top), _pixels(image, left + 1, top), across)
    lower = _between(_pixels(image, left, top + 1), _pixels(image, left + 1, top + 1), across)
    return np.rint(_between(upper, lower, down)).astype(np.uint8)


def warp_batch(images: Tensor, matrices: Tensor, size: Size) -> Tensor:
    """Crops uint8 [B, 3, h, w] of `size` from images uint8 [B, 3, H, W], on their device; `matrices` [B, 2, 3].

    As `warp_exact`, but for the rounding of positions: a grey level now and then. A matrix without an inverse gives a
    crop without meaning, since looking for one would make a GPU wait. PoseError for other shapes or types.
    """
    check_shape("warp_batch: images", images, "B", 3, "H", "W")
    check_shape("warp_batch: matrices", matrices, images.shape[0], 2, 3)
    if images.dtype != torch.uint8:
        raise PoseError(
            f"warp_batch takes images of uint8 from 0 to 255, and these are {images.dtype}: warp first, then normalize"
        )
    inverse = invert_matrices(matrices).float()[..., None, None]  # [B, 2, 3, 1, 1]
    column = torch.arange(size[1], device=images.device, dtype=torch.float32)
    row = torch.arange(size[0], device=images.device, dtype=torch.float32)[:, None]
    # not affine_grid, whose matrix product a GPU may compute in TF32
    positions = inverse[:, :, 0] * column + (inverse[:, :, 1] * row + inverse[:, :, 2])  # [B, 2, h, w]
    # grid_sample counts from the outer edge of the first pixel, -1, to that of the last, 1
    x = (2 * positions[:, 0] + 1) / images.shape[3] - 1
    y = (2 * positions[:, 1] + 1) / images.shape[2] - 1
    crops = F.grid_sample(images.float(), torch.stack((x, y), -1), "bilinear", "zeros", align_corners=False)
    return crops.round().to(torch.uint8)


def normalize(
    crops: Tensor,
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
) -> Tensor:
    """What a network takes, float32 [B, 3, h, w], of crops uint8 [B, 3, h, w]: ImageNet's mean 0 and deviation 1."""
    check_shape("normalize: crops", crops, "B", 3, "h", "w")
    if crops.dtype != torch.uint8:
        raise PoseError(f"normalize takes crops of uint8 from 0 to 255, and these are {crops.dtype}: normalize once")
    # channel by channel, since a tensor of means would have to be sent to a GPU each time
    shares = (crops.float() / 255).unbind(1)
    return torch.stack([(share - m) / s for share, m, s in zip(shares, mean, std, strict=True)], 1)


def _inverse(matrix: np.ndarray | Tensor) -> np.ndarray:
    """float32 [2, 3]: from crop to image."""
    forward = torch.as_tensor(matrix).double()
    check_shape("warp_exact: matrix", forward, 2, 3, hint="pass one image's matrix, matrices[0]")
    inverse = invert_matrices(forward[None])[0].float().numpy()
    if not np.isfinite(inverse).all():
        raise PoseError(
            f"warp_exact: the matrix {forward.tolist()} has no inverse, so that the crop's pixels have no place in the "
            "image; crop_matrices makes one that has, from a box with an area"
        )
    return inverse


def _positions(inverse: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """x and y in the image of every pixel of the crop, each float32 [h, w]."""
    column, row = np.arange(size[1], dtype=np.float32), np.arange(size[0], dtype=np.float32)[:, None]
    x, y = (_fused(across, column, down * row + start) for across, down, start in inverse)
    return x, y


def _between(one: np.ndarray, other: np.ndarray, share: np.ndarray) -> np.ndarray:
    return _fused(share, other - one, one)


def _fused(factor: np.ndarray, values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """factor * values + start, rounded once, as the processor's instruction does that OpenCV uses."""
    return (np.multiply(factor, values, dtype=np.float64) + start).astype(np.float32)


def _as_index(position: np.ndarray, length: int) -> np.ndarray:
    return position.clip(-2, length).astype(np.int64)  # further out is as black as that


def _pixels(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float32 [h, w, 3]: the image's pixels at x and y, 0 outside."""
    height, width = image.shape[:2]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    pixels = image.reshape(-1, 3).take(np.where(inside, y * width + x, 0), axis=0)
    return pixels * inside[..., None].astype(np.float32)


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise PoseError(
            f"warp_exact takes an RGB image, uint8 [H, W, 3], and this one is {image.dtype} {list(image.shape)}: "
            'np.asarray(Image.open(path).convert("RGB")) is one'
        )
