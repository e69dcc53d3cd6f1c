"""CIFAR-100 and a small ViT: four blocks of DeiT-Tiny's width on patches of 4 pixels.

All images lie decoded on the device, and augmentation happens there: a model this small would wait for any loader.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache as remember
from hashlib import blake2b
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from timm.models import VisionTransformer
from torch import Tensor, nn

from benchmarks.experiment.tasks import Data, accuracy
from cyclekd.integrations.deit.augment import AugmentSettings, DeviceAugment, crop_on_device, draw_plans, normalise
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.seeds import derive_seed, seeded

BATCH, TEST_BATCH = 256, 2000
MIXUP = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1, "num_classes": 100}  # as in DeiT
MEAN, STD = (0.507, 0.487, 0.441), (0.266, 0.257, 0.275)  # of the training images
AUGMENT = AugmentSettings(size=32, crop="pad", rand_augment=None, erase=0.0, mean=MEAN, std=STD)


def build_model(seed: int) -> nn.Module:
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 4, "num_heads": 3}
    return VisionTransformer(**size, num_classes=100)


def load_data(seed: int, device: torch.device, cache: Path) -> Data:
    """Of the decoded images in `cache`; incomplete last batches are left out, since mixup pairs the images of one."""
    images = on_device(cache, device)
    train_images, train_labels = images["train_images"], images["train_labels"]
    batch = min(BATCH, len(train_images) // 2 * 2)
    mixup, augment = Mixup(**MIXUP), DeviceAugment(AUGMENT)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(derive_seed("cifar100", seed, epoch))
        order = torch.randperm(len(train_images), generator=draw).to(device)
        plans = draw_plans(AUGMENT, len(train_images), draw)
        for step in range(len(train_images) // batch):
            part = slice(step * batch, (step + 1) * batch)
            chosen, plan = order[part], plans[part]
            inputs = augment(crop_on_device(train_images[chosen], plan, AUGMENT), plan)
            with seeded(derive_seed("mixup", seed, epoch, step)):  # timm draws from NumPy's global generator
                inputs, targets = mixup(inputs, train_labels[chosen])
            yield inputs, targets

    def evaluate(outputs_of: Callable[[Tensor], Any]) -> float:
        test = normalise(images["test_images"], MEAN, STD)
        return accuracy(test, images["test_labels"], TEST_BATCH, outputs_of)

    return Data(batches, len(train_images) // batch, F.cross_entropy, evaluate, "test top-1")


@remember
def on_device(cache: Path, device: torch.device) -> dict[str, Tensor]:
    """Once per process, for all the runs that it makes."""
    return load_file(cache, device=str(device))


# -- from the files to one tensor --------------------------------------------------------------------------------------


def decoded(folder: Path, work: Path, images: int | None = None) -> Path:
    """The file with all images as uint8 tensors [N, 3, 32, 32], made at the first call; `images` leaves the first ones.

    `folder` holds parquet files with columns `img` and `fine_label`, or what `pack` has made of them.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix in (".parquet", ".safetensors"))
    known = repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files] + [images])
    path = work / f"cifar100-{blake2b(known.encode(), digest_size=4).hexdigest()}.safetensors"
    if not path.exists():
        tensors = {}
        for split, most in (("train", images), ("test", images)):
            encoded, labels = read_split(folder, split)
            tensors[f"{split}_images"] = decode(encoded[:most])
            tensors[f"{split}_labels"] = labels[:most].clone()
        work.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial_path := path.with_suffix(".partial"))
        partial_path.replace(path)
    return path


def pack(folder: Path, out: Path) -> None:
    """Two safetensors files with the encoded images as they are, for machines without `datasets`.

    Compressed once more: half of so small a JPEG is a header that all of them share.
    """
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        images, labels = read_split(folder, split)
        offsets = np.cumsum([0, *map(len, images)])
        strip = torch.frombuffer(bytearray(zlib.compress(b"".join(images))), dtype=torch.uint8)
        save_file({"zlib": strip, "offsets": torch.from_numpy(offsets), "labels": labels}, out / f"{split}.safetensors")


def read_split(folder: Path, split: str) -> tuple[Sequence[bytes], Tensor]:
    """Encoded images and their fine labels."""
    packed = folder / f"{split}.safetensors"
    if packed.exists():
        tensors = load_file(packed)
        strip = zlib.decompress(tensors["zlib"].numpy().tobytes())
        return [strip[start:end] for start, end in pairwise(tensors["offsets"].tolist())], tensors["labels"]
    parquet = sorted(map(str, folder.glob(f"{split}*.parquet")))
    if not parquet:
        raise RunError(
            f"--data {folder}: holds neither {split}*.parquet (columns img, fine_label) nor {split}.safetensors; "
            "name the folder with CIFAR-100, or one made by `python benchmarks/gain.py pack`"
        )
    from datasets import Image as Encoded  # not above: a machine with packed images needs no datasets
    from datasets import load_dataset

    table = load_dataset("parquet", data_files=parquet, split="train").cast_column("img", Encoded(decode=False))
    return [image["bytes"] for image in table["img"]], torch.tensor(table["fine_label"])


def decode(encoded: Sequence[bytes]) -> Tensor:
    """uint8 [N, 3, 32, 32]."""
    # One after the other: for images this small, handing them to threads costs more than it gains.
    pixels = np.stack([np.asarray(Image.open(BytesIO(data)).convert("RGB")) for data in encoded])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
