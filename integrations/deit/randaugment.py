"""RandAugment for a whole batch of uint8 images on their device: timm's operations with timm's magnitudes.

What happens to an image is chosen beforehand, on the CPU, so the device never has to be asked which images an
operation meets. Arithmetic follows Pillow's: grey values are integers between operations, blends cut off the fraction.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms.v2 import functional as kernels

from cyclekd.integrations.runs.errors import RunError

NOTHING = -1  # in the place of an operation's number: the image passes as it is


class Recipe(NamedTuple):
    """How many operations an image gets, how probable each is, and the magnitude (0 to 10) with its spread."""

    layers: int
    probability: float
    magnitude: float
    spread: float


@lru_cache
def parse_rand_augment(config: str) -> Recipe:
    """What timm's configuration string asks for; RunError where this implementation has not all of it."""
    try:
        if not re.fullmatch(r"rand(-(m\d+|n\d+|p[\d.]+|mstd[\d.]+|inc1))+", config):
            raise ValueError("unknown section")
        parsed = rand_augment_transform(config, {"img_mean": (0, 0, 0)})
        names, first = {operation.name for operation in parsed.ops}, parsed.ops[0]
        if names != {operation.name for operation in OPERATIONS} or not np.isfinite(first.magnitude_std):
            raise ValueError("other operations or uniform magnitudes")
    except (AssertionError, ValueError) as error:
        raise RunError(
            f"RandAugment {config!r} cannot run on the device ({error}). Supported are the sections m, n, p and mstd "
            "(up to 100) together with inc1, as in 'rand-m9-n2-mstd0.5-inc1'. Augmentation on the host takes every "
            "string that timm knows."
        ) from error
    return Recipe(parsed.num_layers, first.prob, first.magnitude, first.magnitude_std)


def draw_operations(recipe: Recipe, count: int, generator: torch.Generator) -> np.ndarray:
    """For each of `count` images and each layer the operation's number and its argument: [count, layers, 2]."""
    shape = (count, recipe.layers)
    choice, chance, side = torch.rand(3, *shape, generator=generator, dtype=torch.float64).numpy()
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).numpy()
    number = (choice * len(OPERATIONS)).astype(np.int64)
    level = np.clip(recipe.magnitude + recipe.spread * noise, 0, 10) / 10
    argument = argument_of(number, level, side)
    return np.stack([np.where(chance < recipe.probability, number, NOTHING), argument], axis=-1)


def argument_of(number: np.ndarray, level: np.ndarray, side: np.ndarray) -> np.ndarray:
    """The argument at `level` (0 to 1) in the operation's unit; `side`, uniform, picks the sign where both occur."""
    offset, gain, whole, two_sided = np.array([operation[2:] for operation in OPERATIONS]).T[:, number]
    step = gain * level
    step = np.where(whole == 1, np.trunc(step), step)
    return offset + np.where((two_sided == 1) & (side > 0.5), -step, step)


def rand_augment(images: Tensor, operations: Tensor, fill: tuple[int, int, int], interpolation: str) -> Tensor:
    """Images uint8 [B, 3, H, W] after the `operations` [B, layers, 2], which are on the CPU; also uint8.

    An image costs only its own operations. `fill` is the colour that rotations, shears and shifts bring in from
    outside the image; `interpolation`, "bilinear" or "bicubic", is how they resample.
    """
    for layer in operations.unbind(1):
        numbers, order = layer[:, 0].sort(stable=True)
        bounds = np.searchsorted(numbers.numpy(), np.arange(len(OPERATIONS) + 1))
        rows = order.to(images.device, non_blocking=True)
        arguments = layer[order, 1].to(images.device, non_blocking=True)
        for operation, start, stop in zip(OPERATIONS, bounds[:-1], bounds[1:], strict=True):
            if operation.kernel is not None and start < stop:
                some, strength = rows[start:stop], arguments[start:stop].view(-1, 1, 1, 1)
                images = images.index_copy(0, some, operation.kernel(images[some], strength))
        if (start := bounds[FIRST_MOTION]) < len(rows):
            some, motions = rows[start:], motions_of(layer[order[start:]]).to(images.device, non_blocking=True)
            images = images.index_copy(0, some, move(images[some], motions, fill, interpolation))
    return images


# -- grey values and colours: images uint8 [G, 3, H, W], argument [G, 1, 1, 1] -----------------------------------------


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    return kernels.autocontrast_image(images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    return kernels.equalize_image(images)


def invert(images: Tensor, _: Tensor) -> Tensor:
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Only the `bits` most significant bits stay."""
    return images & (256 - torch.exp2(8 - bits)).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images < threshold, images, 255 - images)


def solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    """The darker half of the grey values, brighter by `amount`, at most 128."""
    return torch.where(images < 128, images + amount.to(torch.uint8), images)


def color(images: Tensor, factor: Tensor) -> Tensor:
    return blend(luminance(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    grey, pixels = luminance(images), images[0, 0].numel()
    mean = (2 * grey.sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)  # rounded as Pillow does
    return blend(mean, images, factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return blend(torch.zeros_like(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Away from, or towards, the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13; the border is not smoothed."""
    smooth = images.float()
    around = F.avg_pool2d(smooth, 3, stride=1, divisor_override=1)
    smooth[..., 1:-1, 1:-1] = ((around + 4 * smooth[..., 1:-1, 1:-1]) / 13 + 0.5).floor()
    return blend(smooth, images, factor)


def blend(origin: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """From `origin` (factor 0) through the images (factor 1) and beyond."""
    origin = origin.float()
    return (origin + factor * (images.float() - origin)).clamp(0, 255).to(torch.uint8)


def luminance(images: Tensor) -> Tensor:
    """ITU-R 601-2 in Pillow's integer arithmetic: int32 [G, 1, H, W]."""
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


# -- geometry: one resampling for all five operations ------------------------------------------------------------------


def motions_of(operations: Tensor) -> Tensor:
    """[G, 2] of number and argument as [G, 5]: degrees, shear x, shear y, shift x, shift y; all but one are zero."""
    columns = torch.arange(FIRST_MOTION, len(OPERATIONS))
    return torch.where(operations[:, :1] == columns, operations[:, 1:], 0.0)


def move(images: Tensor, motions: Tensor, fill: tuple[int, int, int], interpolation: str) -> Tensor:
    """Images uint8 [G, 3, H, W] rotated about their centre, sheared or shifted (as a share of the side).

    Bilinear agrees with Pillow to a grey level. Bicubic does not quite: PyTorch's cubic has a = -0.75, Pillow's -0.5.
    """
    height, width = images.shape[-2:]
    degrees, shear_x, shear_y, shift_x, shift_y = motions.view(-1, 5, 1, 1).unbind(1)
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device).view(-1, 1) + 0.5
    cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
    # where each pixel comes from, [G, H, W]
    from_x = cos * (x - width / 2) - sin * (y - height / 2) + width / 2 + shear_x * y + shift_x * width
    from_y = sin * (x - width / 2) + cos * (y - height / 2) + height / 2 + shear_y * x + shift_y * height
    grid = torch.stack([2 * from_x / width - 1, 2 * from_y / height - 1], dim=-1)
    moved = F.grid_sample(images.float(), grid, mode=interpolation, padding_mode="border", align_corners=False)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    outside = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1).to(images.device, non_blocking=True)
    # Pillow cuts off the fraction; the margin keeps 99.9999, which should have been 100, from becoming 99
    return torch.where(inside.unsqueeze(1), (moved + 0.002).clamp(0, 255).to(torch.uint8), outside)


class Operation(NamedTuple):
    """timm's name, what it does, and its argument at level l (0 to 1): offset +- gain * l.

    `whole`: gain * l is cut to an integer first. `two_sided`: plus or minus, each as often; otherwise plus.
    """

    name: str
    kernel: Callable[[Tensor, Tensor], Tensor] | None  # None for motions, which share one resampling
    offset: float = 0.0
    gain: float = 0.0
    whole: bool = False
    two_sided: bool = False


OPERATIONS = (
    Operation("AutoContrast", autocontrast),
    Operation("Equalize", equalize),
    Operation("Invert", invert),
    Operation("PosterizeIncreasing", posterize, 4, -4, whole=True),  # bits kept: 4 to 0
    Operation("SolarizeIncreasing", solarize, 256, -256, whole=True),  # threshold
    Operation("SolarizeAdd", solarize_add, 0, 110, whole=True),
    Operation("ColorIncreasing", color, 1, 0.9, two_sided=True),  # factor: 1 changes nothing
    Operation("ContrastIncreasing", contrast, 1, 0.9, two_sided=True),
    Operation("BrightnessIncreasing", brightness, 1, 0.9, two_sided=True),
    Operation("SharpnessIncreasing", sharpness, 1, 0.9, two_sided=True),
    Operation("Rotate", None, 0, 30, two_sided=True),  # degrees; from here on in the order of `motions_of`
    Operation("ShearX", None, 0, 0.3, two_sided=True),
    Operation("ShearY", None, 0, 0.3, two_sided=True),
    Operation("TranslateXRel", None, 0, 0.45, two_sided=True),  # share of the side
    Operation("TranslateYRel", None, 0, 0.45, two_sided=True),
)
FIRST_MOTION = 10
