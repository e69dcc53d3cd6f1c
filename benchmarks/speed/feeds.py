"""JPEG files of ImageNet's size, and the two loaders that bring them to the device: timm's and ours.

Workers start together and finish their batches together, so batches come in bursts, one per worker. A pass over a
loader is therefore timed over whole turns of all workers, between two moments at which as many batches are asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, Mixup, create_loader
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from cyclekd.integrations.deit.augment import AugmentSettings, DeviceAugment, PlanAugment
from cyclekd.integrations.runs.loading import Batch, load_batches, on_device
from cyclekd.integrations.runs.sampling import Draw, TrainingBatches
from cyclekd.integrations.runs.seeds import derive_seed
from cyclekd.integrations.runs.training import ON_THE_HOST

SIZE = (500, 375)
"""Pixels of ImageNet's most frequent image size, width and height."""
CLASSES = 1000
MIXING = {
    "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5, "label_smoothing": 0.1,
    "num_classes": CLASSES,
}  # fmt: skip


def make_jpegs(folder: Path, count: int, photos: Path | None = None, seed: int = 0) -> list[Path]:
    """New JPEG files of `SIZE` at quality 90: random crops of the photos, or smooth noise where there are none."""
    draw = np.random.default_rng(seed)
    sources = [path for path in sorted(photos.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")] if photos else []
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        picture = crop_photo(sources[i % len(sources)], draw) if sources else smooth_noise(draw)
        picture.save(path, quality=90)
    return paths


def crop_photo(path: Path, draw: np.random.Generator) -> Image.Image:
    """A crop of the shape of `SIZE` with 70 to 100 % of the greatest possible sides."""
    photo = Image.open(path).convert("RGB")
    scale = draw.uniform(0.7, 1) * min(photo.width / SIZE[0], photo.height / SIZE[1])
    width, height = scale * SIZE[0], scale * SIZE[1]
    left, top = draw.uniform(0, photo.width - width), draw.uniform(0, photo.height - height)
    return photo.resize(SIZE, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


def smooth_noise(draw: np.random.Generator) -> Image.Image:
    """Random colours on a coarse grid, enlarged, with a little fine noise so that the file is as long as a photo's."""
    coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
    return Image.fromarray((smooth + draw.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))


WAITING = 2
"""Batches that every worker of a DataLoader prepares ahead: PyTorch's default."""


class Pass(NamedTuple):
    """How many batches of one pass over a loader come before the clock starts, are counted, and are left over."""

    before: int
    counted: int
    after: int


def plan_pass(workers: int, ahead: int, turns: int = 3) -> Pass:
    """For a loader that gives a batch only when it has `ahead` more, and workers with `WAITING` batches each.

    As many batches as can wait come before the clock starts, and as many are left when it stops: what is counted was
    neither prepared before nor made while nothing else had to be.
    """
    turn = max(workers, 1)
    waiting = WAITING * turn if workers else 0
    return Pass(max(waiting - ahead, 1), turns * turn, waiting + ahead)


class Photos(Dataset[Any]):
    """`length` samples from fewer files; `transform` is set by timm's create_loader."""

    def __init__(self, paths: list[Path], length: int) -> None:
        self.paths, self.length, self.transform = paths, length, None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = open_photo(self.paths[index % len(self.paths)]).convert("RGB")
        return self.transform(image), index % CLASSES


class PlannedPhotos(Photos):
    """The same for our loader: indices come with the seed of the sample's augmentation."""

    def __init__(self, paths: list[Path], length: int, settings: AugmentSettings) -> None:
        super().__init__(paths, length)
        self.plan = PlanAugment(settings)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        image = open_photo(self.paths[draw.index % len(self.paths)])
        return {**self.plan(image, draw.seed), "label": draw.index % CLASSES}


def open_photo(path: Path) -> Image.Image:
    return Image.open(BytesIO(path.read_bytes()))


class TimmLoader:
    """timm's create_loader as its train.py calls it with DeiT's settings: PIL and mixup in workers, prefetcher."""

    def __init__(self, paths: list[Path], args: argparse.Namespace) -> None:
        self.pass_ = plan_pass(args.workers, ahead=1)
        self.loader = create_loader(
            Photos(paths, sum(self.pass_) * args.batch),
            input_size=(3, args.size, args.size),
            batch_size=args.batch,
            is_training=True,
            re_prob=0.25,
            re_mode="pixel",
            # without mmax9 timm now and then asks for a posterisation to no bits, which Pillow 13 refuses
            auto_augment="rand-m9-mstd0.5-mmax9-inc1",
            interpolation="bicubic",
            num_workers=args.workers,
            collate_fn=FastCollateMixup(**MIXING),
            pin_memory=args.device.startswith("cuda"),
            device=torch.device(args.device),
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.loader)


class OurLoader:
    """Decoding, cropping and random draws in workers; the rest is done on the device, as part of a step."""

    def __init__(self, paths: list[Path], args: argparse.Namespace) -> None:
        self.pass_ = plan_pass(args.workers, ahead=1 if args.device.startswith("cuda") else 0)
        settings, length = AugmentSettings(size=args.size), sum(self.pass_) * args.batch
        self.data, self.batch, self.device = PlannedPhotos(paths, length, settings), args.batch, args.device
        order = TrainingBatches(length, batch=args.batch, epochs=1, seed=args.seed)
        self.loader = load_batches(self.data, order, args.workers, torch.device(args.device))
        self.augment = DeviceAugment(settings)

    def __iter__(self) -> Iterator[Batch]:
        return on_device(self.loader, torch.device(self.device), ON_THE_HOST)

    def augmented(self, times: int) -> Iterator[Tensor]:
        """One batch of images that is on the device already, augmented again and again."""
        batch = default_collate([self.data[Draw(i, derive_seed("sample", i))] for i in range(self.batch)])
        images = batch["image"].to(self.device)
        return (self.augment(images, batch["plan"]) for _ in range(times))


def resident_pairs(times: int, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """For timm's loop: one normalised batch on the device, mixed anew every time."""
    batch, mix = resident_batch(args), Mixup(**MIXING)
    return (mix(batch["image"], batch["label"]) for _ in range(times))


def resident_batches(times: int, args: argparse.Namespace) -> Iterator[Batch]:
    """For our loop, which mixes by itself: the same batch every time."""
    return repeat(resident_batch(args), times)


def resident_batch(args: argparse.Namespace) -> Batch:
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    return {"image": images, "label": torch.randint(CLASSES, (args.batch,), device=args.device)}
