"""Augmentation in training and evaluation as in DeiT, twice: by timm on the host, and batched on the device.

On the fast path a worker only decodes and crops. All else that is random about a sample is drawn with it, from its
seed, as one row of numbers: its plan. The device carries plans out, so that a sample looks the same in any batch, on
any process and after a resume. The two paths agree in distribution and not draw by draw; where their pixels differ is
said at the functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torchvision.transforms import RandomCrop
from torchvision.transforms.functional import pil_to_tensor

from cyclekd.integrations.deit.decoding import UnreadableImage, decode
from cyclekd.integrations.deit.randaugment import draw_operations, parse_rand_augment, rand_augment
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.seeds import seeded

ATTEMPTS = 10  # boxes tried before the fallback, in cropping as in erasing; timm's number
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # as shares of the image, and height over width; timm's

# the columns of a plan; two more per layer of RandAugment follow
FLIP, TOP, LEFT, NOISE_SEED = range(4)
ERASED = slice(4, 8)  # top, left, height, width in pixels; no height where nothing is erased
AREAS, ASPECTS = slice(8, 8 + ATTEMPTS), slice(8 + ATTEMPTS, 8 + 2 * ATTEMPTS)
OPERATIONS = slice(8 + 2 * ATTEMPTS, None)


@dataclass(frozen=True)
class AugmentSettings:
    """What happens to images; the defaults are DeiT's at 224 pixels. RunError where a value makes no sense."""

    size: int = 224  # side of the image that the model gets
    scale: tuple[float, float] = (0.08, 1.0)  # area of the crop as a share of the image
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the crop
    hflip: float = 0.5  # probability
    rand_augment: str | None = "rand-m9-n2-mstd0.5-inc1"  # timm's configuration string
    interpolation: str = "bicubic"  # or "bilinear"; of crops and, as in timm, of RandAugment's motions
    erase: float = 0.25  # probability of one box of noise
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    crop: str = "random-resized"  # or "pad": `size` pixels from the image padded by size // 8, for small images
    crop_pct: float = 0.875  # in evaluation, the side of the central crop as a share of the resized short side

    def __post_init__(self) -> None:
        require(self.size >= 1, f"size {self.size}: needs at least one pixel")
        require(0 < self.scale[0] <= self.scale[1] <= 1, f"scale {self.scale}: needs 0 < least <= most <= 1")
        require(0 < self.ratio[0] <= self.ratio[1], f"ratio {self.ratio}: needs 0 < least <= most")
        require(0 <= self.hflip <= 1, f"hflip {self.hflip}: a probability is between 0 and 1")
        require(0 <= self.erase <= 1, f"erase {self.erase}: a probability is between 0 and 1")
        require(0 < self.crop_pct <= 1, f"crop_pct {self.crop_pct}: needs a share above 0 and up to 1")
        known = ("bilinear", "bicubic")
        require(self.interpolation in known, f"interpolation {self.interpolation!r}: choose one of {known}")
        known = ("random-resized", "pad")
        require(self.crop in known, f"crop {self.crop!r}: choose one of {known}")
        colours = len(self.mean) == len(self.std) == 3 and min(self.std) > 0
        require(colours, f"mean {self.mean}, std {self.std}: need three numbers each, std above 0")


def require(fine: bool, message: str) -> None:
    if not fine:
        raise RunError(f"augmentation: {message}")


class HostAugment:
    """The reference: timm's own transform of a PIL image, every draw from the sample's seed."""

    def __init__(self, settings: AugmentSettings) -> None:
        try:
            parts = create_transform(
                (3, settings.size, settings.size),
                is_training=True,
                scale=settings.scale,
                ratio=settings.ratio,
                hflip=settings.hflip,
                color_jitter=None,
                auto_augment=settings.rand_augment,
                interpolation=settings.interpolation,
                mean=settings.mean,
                std=settings.std,
                re_prob=settings.erase,
                re_mode="pixel",
                separate=True,
            )
        except (AssertionError, ValueError) as error:
            raise RunError(
                f"augmentation: timm does not understand {settings.rand_augment!r} ({error or 'unknown section'}); "
                "DeiT's string is 'rand-m9-n2-mstd0.5-inc1'"
            ) from error
        self.transforms = [transform for part in parts for transform in part.transforms]
        self.settings = settings
        if settings.crop == "pad":
            self.transforms[0] = RandomCrop(settings.size, padding=settings.size // 8)
        for transform in self.transforms:
            for operation in [*getattr(transform, "ops", ()), *chain(*getattr(transform, "policy", ()))]:
                if operation.aug_fn is auto_augment.posterize:
                    operation.aug_fn = posterize

    def __call__(self, image: Image.Image, seed: int) -> dict[str, Tensor]:
        """`image`: float32 [3, S, S], normalised."""
        result = decode(image, None)
        if self.settings.crop == "pad":
            result = large_enough(result, self.settings)
        with seeded(seed):
            for transform in self.transforms:
                result = transform(result)
        return {"image": result}


def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, and black for 0 bits, which happens at magnitude 10 and which Pillow 13 refuses."""
    return auto_augment.posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


class PlanAugment:
    """A worker's half of the fast path: the crop, and the plan of everything else.

    A JPEG is decoded at the smallest scale at which the crop's box still has S x S pixels. The decoder then does a
    part of the shrinking that is otherwise the resampling filter's: pixels of a reduced photograph differ from those
    of a full decode by one to two grey levels in the mean.
    """

    def __init__(self, settings: AugmentSettings) -> None:
        self.settings = settings
        if settings.rand_augment:
            parse_rand_augment(settings.rand_augment)  # a string it cannot do is refused here, not in a worker

    def __call__(self, image: Image.Image, seed: int) -> dict[str, Tensor]:
        """`image`: uint8 [3, S, S]; `plan`: float32 [P]."""
        plan = draw_plans(self.settings, 1, torch.Generator().manual_seed(seed))
        if self.settings.crop == "pad":
            whole = pil_to_tensor(large_enough(decode(image, None), self.settings)).unsqueeze(0)
            return {"image": crop_on_device(whole, plan, self.settings)[0], "plan": plan[0]}
        box = crop_boxes(plan.numpy(), self.settings, image.height, image.width)[0].tolist()
        return {"image": pil_to_tensor(resized_crop(image, box, self.settings)), "plan": plan[0]}


def large_enough(image: Image.Image, settings: AugmentSettings) -> Image.Image:
    """The image itself, or enlarged so that its short side has S pixels, for a crop that does not resize."""
    scale = settings.size / min(image.size)
    if scale <= 1:
        return image
    sides = (max(settings.size, round(side * scale)) for side in image.size)
    return image.resize(tuple(sides), str_to_pil_interp(settings.interpolation))


def resized_crop(image: Image.Image, box: list[int], settings: AugmentSettings) -> Image.Image:
    """The `box` (top, left, height, width) of an image not yet decoded, resized to S x S."""
    top, left, height, width = box
    size, whole_width, whole_height = settings.size, image.width, image.height
    needed = math.ceil(whole_width * min(1, size / width)), math.ceil(whole_height * min(1, size / height))
    loaded = decode(image, needed)
    # the exact reduction: not the ratio of the sizes, since a size that it does not divide is rounded up
    sizes = {by: (math.ceil(whole_width / by), math.ceil(whole_height / by)) for by in (8, 4, 2, 1)}
    fitting = [by for by, reduced in sizes.items() if reduced == loaded.size]
    if not fitting:
        raise UnreadableImage(f"{loaded.size} pixels, where the header says {sizes[1]}")
    by = fitting[-1]
    corners = (left / by, top / by, (left + width) / by, (top + height) / by)
    return loaded.resize((size, size), str_to_pil_interp(settings.interpolation), box=corners)


class DeviceAugment:
    """The device's half of the fast path: flip, RandAugment, normalisation, erasing.

    Nothing here waits for the device: what decides on shapes is read from the plans, which stay on the CPU.
    """

    def __init__(self, settings: AugmentSettings) -> None:
        self.settings = settings
        if settings.rand_augment:
            parse_rand_augment(settings.rand_augment)

    @torch.no_grad()
    def __call__(self, images: Tensor, plan: Tensor) -> Tensor:
        """Images uint8 [B, 3, S, S] on any device, plan float32 [B, P] on the CPU: float32 [B, 3, S, S], normalised."""
        settings = self.settings
        flipped = (plan[:, FLIP] == 1).view(-1, 1, 1, 1).to(images.device, non_blocking=True)
        images = torch.where(flipped, images.flip(-1), images)
        chosen = plan[:, OPERATIONS].unflatten(1, (-1, 2))  # [B, layers, 2]
        images = rand_augment(images, chosen, fill_colour(settings.mean), settings.interpolation)
        return erase(normalise(images, settings.mean, settings.std), plan)


class EvaluationTransform:
    """timm's: the short side resized to S / crop_pct, then the central S x S; not normalised."""

    def __init__(self, settings: AugmentSettings) -> None:
        size = (3, settings.size, settings.size)
        chosen = {"interpolation": settings.interpolation, "crop_pct": settings.crop_pct}
        self.transform = create_transform(size, is_training=False, normalize=False, **chosen)

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        """`image`: uint8 [3, S, S]."""
        return {"image": self.transform(decode(image, None))}


def normalise(images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """uint8 [B, 3, H, W] to float32: (grey value / 255 - mean) / std per channel."""
    mean_of, std_of = (
        torch.tensor(values).view(3, 1, 1).to(images.device, non_blocking=True) for values in (mean, std)
    )
    return images.float().div_(255).sub_(mean_of).div_(std_of)


def fill_colour(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The mean in grey values: what RandAugment's rotations, shears and shifts bring in from outside the image."""
    red, green, blue = (min(255, round(255 * value)) for value in mean)
    return red, green, blue


# -- plans -------------------------------------------------------------------------------------------------------------


def draw_plans(settings: AugmentSettings, count: int, generator: torch.Generator) -> Tensor:
    """Everything random about `count` samples: float32 [count, P] on the CPU."""
    singles = torch.rand(4, count, generator=generator, dtype=torch.float64).numpy()
    tries = torch.rand(2, count, ATTEMPTS, generator=generator, dtype=torch.float64).numpy()
    plans = np.empty((count, OPERATIONS.start))
    plans[:, FLIP] = singles[0] < settings.hflip
    plans[:, [TOP, LEFT]] = singles[1:3].T
    plans[:, NOISE_SEED] = np.floor(singles[3] * 2**24)  # what float32 holds exactly
    plans[:, AREAS] = uniform(tries[0], settings.scale)
    plans[:, ASPECTS] = log_uniform(tries[1], settings.ratio)
    plans[:, ERASED] = draw_erased(settings, count, generator)
    if settings.rand_augment:
        chosen = draw_operations(parse_rand_augment(settings.rand_augment), count, generator)
        plans = np.concatenate([plans, chosen.reshape(count, -1)], axis=1)
    return torch.from_numpy(plans.astype(np.float32))


def draw_erased(settings: AugmentSettings, count: int, generator: torch.Generator) -> np.ndarray:
    """[count, 4] of top, left, height, width: one box of timm's RandomErasing, or zeros."""
    chance, top, left = torch.rand(3, count, generator=generator, dtype=torch.float64).numpy()
    tries = torch.rand(2, count, ATTEMPTS, generator=generator, dtype=torch.float64).numpy()
    area, aspect = uniform(tries[0], ERASED_AREA) * settings.size**2, log_uniform(tries[1], ERASED_ASPECT)
    height, width = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    fits = (height < settings.size) & (width < settings.size)
    first = np.arange(count), fits.argmax(1)
    height, width = height[first], width[first]
    top, left = np.floor(top * (settings.size - height + 1)), np.floor(left * (settings.size - width + 1))
    used = (chance < settings.erase) & fits.any(1)
    return np.stack([top, left, height, width], axis=1) * used[:, None]


def crop_boxes(plans: np.ndarray, settings: AugmentSettings, height: int, width: int) -> np.ndarray:
    """[count, 4] of top, left, height, width: timm's random resized crop of images of one size.

    The first of the planned areas and aspects that fits is taken; if none does, the central box of the nearest aspect.
    """
    plans = plans.astype(np.float64)
    area = plans[:, AREAS] * height * width
    tall, wide = np.round(np.sqrt(area / plans[:, ASPECTS])), np.round(np.sqrt(area * plans[:, ASPECTS]))
    fits = (tall <= height) & (wide <= width)
    first = np.arange(len(plans)), fits.argmax(1)
    tall, wide = tall[first], wide[first]
    top, left = np.floor(plans[:, TOP] * (height - tall + 1)), np.floor(plans[:, LEFT] * (width - wide + 1))
    drawn = np.stack([top, left, tall, wide], axis=1).astype(np.int64).clip(min=0)
    drawn[:, 2:] = drawn[:, 2:].clip(min=1)  # very small images: an area below half a pixel is one
    return np.where(fits.any(1)[:, None], drawn, central_box(settings.ratio, height, width))


def central_box(ratio: tuple[float, float], height: int, width: int) -> list[int]:
    """The largest central box whose width over height is within `ratio`."""
    tall = min(height, round(width / ratio[0]))
    wide = min(width, round(height * ratio[1]))
    return [(height - tall) // 2, (width - wide) // 2, tall, wide]


def uniform(draws: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    return bounds[0] + (bounds[1] - bounds[0]) * draws


def log_uniform(draws: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    return np.exp(uniform(draws, (math.log(bounds[0]), math.log(bounds[1]))))


# -- cropping images that are on the device already --------------------------------------------------------------------


@torch.no_grad()
def crop_on_device(images: Tensor, plan: Tensor, settings: AugmentSettings) -> Tensor:
    """Images uint8 [B, 3, H, W] on any device, plan [B, P] on the CPU: the planned crops, uint8 [B, 3, S, S]."""
    if settings.crop == "pad":
        return padded_shift(images, plan, settings.size)
    boxes = torch.from_numpy(crop_boxes(plan.numpy(), settings, *images.shape[-2:])).float()
    top, left, tall, wide = boxes.to(images.device, non_blocking=True).unbind(1)
    rows = resampling(top, tall, images.shape[-2], settings)
    columns = resampling(left, wide, images.shape[-1], settings)
    with torch.autocast(images.device.type, enabled=False):  # 8 bits of mantissa are too few for grey values
        # two products, as Pillow's resize has two passes: along each row, then along each column
        resized = rows.unsqueeze(1) @ (images.float() @ columns.unsqueeze(1).mT)
    return resized.round().clamp(0, 255).to(torch.uint8)


def resampling(start: Tensor, length: Tensor, pixels: int, settings: AugmentSettings) -> Tensor:
    """Weights [B, S, pixels] that resize the part from `start` of `length` pixels, each [B], to S pixels.

    Pillow's filters: where the part shrinks, they widen as much, which keeps fine patterns from aliasing.
    """
    step = (length / settings.size).view(-1, 1, 1)
    position = torch.arange(pixels, device=start.device) + 0.5
    centre = start.view(-1, 1, 1) + step * (torch.arange(settings.size, device=start.device).view(-1, 1) + 0.5)
    x = (position - centre).abs() / step.clamp(min=1)
    if settings.interpolation == "bilinear":
        weights = (1 - x).clamp(min=0)
    else:  # Keys' cubic with a = -0.5
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2) * (x < 2)
    inside = (position > start.view(-1, 1, 1)) & (position < (start + length).view(-1, 1, 1))
    weights = weights * inside
    return weights / weights.sum(-1, keepdim=True)


def padded_shift(images: Tensor, plan: Tensor, size: int) -> Tensor:
    """`size` x `size` pixels of each image, black around it by size // 8, from the planned place."""
    padded = F.pad(images, [size // 8] * 4)
    room = torch.tensor([padded.shape[-2] - size, padded.shape[-1] - size])
    if room.min() < 0:
        raise RunError(
            f"augmentation: crop 'pad' takes {size} x {size} pixels from the image padded by {size // 8}; "
            f"an image of {tuple(images.shape[-2:])} is too small. Use crop 'random-resized'."
        )
    corners = (plan[:, [TOP, LEFT]] * (room + 1)).long().to(images.device, non_blocking=True)
    top, left = corners.view(-1, 2, 1, 1).unbind(1)  # each [B, 1, 1]
    along = torch.arange(size, device=images.device)
    which = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    return padded[which, :, top + along.view(-1, 1), left + along].permute(0, 3, 1, 2).contiguous()


# -- erasing -----------------------------------------------------------------------------------------------------------


def erase(images: Tensor, plan: Tensor) -> Tensor:
    """Normalised images [B, 3, H, W], in place, with standard normal noise in the planned boxes."""
    boxes = plan[:, ERASED].long()
    pixels = boxes[:, 2] * boxes[:, 3]
    starts, total = pixels.cumsum(0) - pixels, int(pixels.sum())
    if total == 0:
        return images
    # one row per image: what each erased pixel has to know of its image and box, brought to the device together
    known = torch.column_stack([torch.arange(len(plan)), starts, boxes, plan[:, NOISE_SEED].long()])
    known, pixels = (values.to(images.device, non_blocking=True) for values in (known, pixels))
    row, start, top, left, _, width, seed = known.repeat_interleave(pixels, dim=0, output_size=total).unbind(1)
    within = torch.arange(total, device=images.device) - start
    y, x = top + within // width, left + within % width
    place = (y * images.shape[-1] + x).unsqueeze(1) * 3 + torch.arange(3, device=images.device)
    images[row, :, y, x] = normal_noise(seed.unsqueeze(1), place)
    return images


def normal_noise(seed: Tensor, place: Tensor) -> Tensor:
    """Standard normal numbers that follow from an image's seed and a place in it: the same in every batch.

    A hash in place of a generator, 16 bits of it for the radius and 16 for the angle of Box and Muller's method.
    """
    bits = hash32(hash32(seed) ^ place)
    radius = (-2 * torch.log(((bits >> 16) + 0.5) / 2**16)).sqrt()
    return radius * torch.cos((bits & 0xFFFF) * (2 * math.pi / 2**16))


def hash32(values: Tensor) -> Tensor:
    """A 32-bit integer hash (Wellons' lowbias32) of int64 values below 2**32."""
    values = ((values >> 16) ^ values) * 0x7FEB352D & 0xFFFFFFFF
    values = ((values >> 15) ^ values) * 0x846CA68B & 0xFFFFFFFF
    return (values >> 16) ^ values
