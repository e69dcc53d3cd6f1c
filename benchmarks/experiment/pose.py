"""A plain pose model on any folder of people in COCO's layout, such as LSP-extended.

All images lie decoded on the device, where views are cut and heat maps drawn: a network for 128 x 96 pixels would wait
for any loader. That is for data sets of some ten thousand people; COCO itself is for `examples/train_tokenpose.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache as remember
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.experiment.tasks import Data, Recipe, Task
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.seeds import derive_seed
from cyclekd.integrations.tokenpose.data.people import People, find_split, read_image, read_people
from cyclekd.integrations.tokenpose.data.views import (
    Numbers,
    ViewSettings,
    plain_views,
    random_views,
    view_keypoints,
    view_matrices,
)
from cyclekd.integrations.tokenpose.data.warp import normalize, warp_batch
from cyclekd.integrations.tokenpose.keypoints.decoding import PIXELS_PER_SCALE, to_image
from cyclekd.integrations.tokenpose.keypoints.export import decode_output
from cyclekd.integrations.tokenpose.keypoints.geometry import center_and_scale, compose_matrices, invert_matrices
from cyclekd.integrations.tokenpose.losses.supervised import HeatmapLoss
from cyclekd.integrations.tokenpose.losses.targets import Target, heatmap_target
from cyclekd.integrations.tokenpose.models.config import PRESETS, TokenPoseConfig, config_for
from cyclekd.integrations.tokenpose.models.create import build
from cyclekd.integrations.tokenpose.models.tokenpose import token_groups
from cyclekd.integrations.tokenpose.shapes import Size
from cyclekd.integrations.tokenpose.skeletons import Skeleton

BATCH, TEST_BATCH = 64, 250
THRESHOLD = 0.1
METRIC = f"PCK@{THRESHOLD} of the padded box"
VIEWS = ViewSettings()
LARGEST = 24 * 2**30  # bytes of decoded images
AT_ONCE = 2**24  # pixels of images of which views are cut together, several batches ahead: few and large operations
PLAIN = tuple(
    name
    for name, preset in PRESETS.items()
    if isinstance(preset, TokenPoseConfig) and preset.head == "heatmap" and preset.cycles == 1
)
"""The models there are: what the experiment wraps by itself, and whose heat maps it trains."""


def pose_task(model: str, cache: Path) -> Task:
    """`model` on the people that `decoded` has put into `cache`, at the input size that they were decoded for."""
    data = described(cache)
    config = config_of(model, tuple(data["input_size"]), len(data["skeleton"]["names"]))
    recipe = Recipe(epochs=20, learning_rate=1e-3, weight_decay=0.0, rho=(), alpha=(5e-6,))
    load = partial(load_data, cache=cache, config=config)
    return Task(f"pose-{data['name']}", partial(build_model, config=config), load, recipe, data["source"])


def config_of(model: str, input_size: Size, num_keypoints: int = 17) -> TokenPoseConfig:
    """The plain model of that name. RunError for one with cycles of its own, without tokens or without heat maps."""
    if model not in PLAIN:
        raise RunError(
            f"--model {model}: not a plain model with tokens and heat maps, which --cycles wraps; there are "
            + ", ".join(PLAIN)
        )
    config = config_for(model, input_size=input_size, num_keypoints=num_keypoints)
    assert isinstance(config, TokenPoseConfig)
    return config


def build_model(seed: int, config: TokenPoseConfig) -> nn.Module:
    return build(config)


def load_data(seed: int, device: torch.device, cache: Path, config: TokenPoseConfig) -> Data:
    """Views, heat maps and PCK on the device. The last people of an epoch's order who fill no batch are left out."""
    train, test = on_device(cache, device)
    skeleton = skeleton_of(cache)
    people = len(train.images)
    batch = min(BATCH, people)
    steps = people // batch
    ahead = batch * max(1, AT_ONCE // (batch * train.images[0, 0].numel()))

    def batches(epoch: int) -> Iterator[tuple[Tensor, Target]]:
        draw = torch.Generator().manual_seed(derive_seed("pose", seed, epoch))
        order = torch.randperm(people, generator=draw)[: steps * batch].to(device)
        drawn = torch.rand(people, 6, generator=draw), torch.randn(people, 3, generator=draw)
        numbers = Numbers(*(each.to(device) for each in drawn))
        views = random_views(train.center, train.scale, train.keypoints, skeleton, VIEWS, numbers)
        matrices = view_matrices(views, config.input_size)
        keypoints, visible = view_keypoints(train.keypoints, views, skeleton, matrices)
        for rows in order.split(ahead):
            inputs = train.crops(rows, matrices, config.input_size)
            target = target_of(keypoints[rows], visible[rows], config)
            parts = (part.split(batch) for part in (inputs, *target))
            for images, values, weights in zip(*parts, strict=True):
                yield images, Target(values, weights)

    evaluate = partial(pck_of, test, config)
    with torch.device("meta"):
        groups = token_groups(build(config))
    return Data(batches, steps, HeatmapLoss(), evaluate, METRIC, groups)


def target_of(keypoints: Tensor, visible: Tensor, config: TokenPoseConfig) -> Target:
    sizes = {"input_size": config.input_size, "heatmap_size": config.feature_size}
    return heatmap_target(keypoints, visible, **sizes)


def pck_of(test: Split, config: TokenPoseConfig, outputs_of: Callable[[Tensor], Any]) -> float:
    """Percent of labelled key points that are found within a tenth of the padded box, what the network sees.

    Decoded by DARK, in pixels of the image; a distance is divided by the box's width and height, axis by axis, as
    `evaluation.scoring.pck` divides by the map's. All labelled key points count alike; no flip test.
    """
    found, labelled = torch.zeros(2, dtype=torch.float64, device=test.images.device)
    matrices = view_matrices(plain_views(test.center, test.scale), config.input_size)
    for rows in torch.arange(len(test.images), device=test.images.device).split(TEST_BATCH):
        decoded = decode_output(config, outputs_of(test.crops(rows, matrices, config.input_size)))
        center, scale, truth = test.center[rows], test.scale[rows], test.keypoints[rows]
        points = to_image(decoded.coordinates, center, scale, config.input_size)
        distance = ((points - truth[..., :2]) / (PIXELS_PER_SCALE * scale)[:, None]).norm(dim=-1)
        counts = truth[..., 2] > 0
        found += ((distance < THRESHOLD) & counts).sum()
        labelled += counts.sum()
    return 100 * (found / labelled).item()


# -- people on the device ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Split:
    """N people, each with an image of S x S pixels that shows what any view of them can."""

    images: Tensor
    """uint8 [N, 3, S, S]"""
    matrices: Tensor
    """[N, 2, 3], from pixels of the photograph to those of `images`."""
    keypoints: Tensor
    """[N, K, 3] in pixels of the photograph, as `center` [N, 2]; `scale` [N, 2] is in units of 200 of them."""
    center: Tensor
    scale: Tensor

    def crops(self, rows: Tensor, matrices: Tensor, size: Size) -> Tensor:
        """What the network sees of these people in views that `matrices`, of all N, lead to from the photographs."""
        from_image = compose_matrices(matrices[rows], invert_matrices(self.matrices[rows]))
        return normalize(warp_batch(self.images[rows], from_image, size))


@remember
def on_device(cache: Path, device: torch.device) -> tuple[Split, Split]:
    """The training and the test people; once per process, for all the runs that it makes."""
    tensors = load_file(cache, device=str(device))
    names = Split.__dataclass_fields__
    train, test = (Split(**{name: tensors[f"{split}_{name}"] for name in names}) for split in ("train", "val"))
    return train, test


def skeleton_of(cache: Path) -> Skeleton:
    return Skeleton(**{name: as_tuples(value) for name, value in described(cache)["skeleton"].items()})


def described(cache: Path) -> dict[str, Any]:
    """What `decoded` has written beside the tensors: name, source, input_size and skeleton."""
    with safe_open(cache, "pt") as file:
        return json.loads(file.metadata()["pose"])


def as_tuples(value: Any) -> Any:
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


# -- from the files to one tensor --------------------------------------------------------------------------------------


def decoded(folder: Path, work: Path, input_size: Size, images: int | None = None) -> Path:
    """The file with all people of both splits, made at the first call; `images` leaves the first training people.

    Other annotations, photographs (by name, size and date) or arguments get a file of their own. Photographs up to
    twice the network's input are kept whole, larger ones cut to what a view can reach.
    Errors: PoseError for a folder without such a layout or images that cannot be used; RunError for too many of them.
    """
    folder = folder.resolve()
    files = {split: find_split(folder, split) for split in ("train", "val")}
    source = blake2b(b"".join(annotations.read_bytes() for annotations, _ in files.values()), digest_size=4).hexdigest()
    known = repr((str(folder), source, input_size, images, states({photos for _, photos in files.values()})))
    path = work / f"pose-{blake2b(known.encode(), digest_size=4).hexdigest()}.safetensors"
    if not path.exists():
        train, test = (read_people(*files[split], for_training=split == "train") for split in files)
        check_splits(train, test)
        print(f"{len(train)} people to train on, {train.skipped}; {len(test)} to test on, {test.skipped}")
        tensors = {}
        for split, people in (("train", train.subset(range(len(train))[:images])), ("val", test)):
            tensors |= {f"{split}_{name}": value for name, value in decode(people, input_size).items()}
        facts = {"name": folder.name, "source": source, "input_size": input_size, "skeleton": asdict(train.skeleton)}
        work.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial_path := path.with_suffix(".partial"), {"pose": json.dumps(facts)})
        partial_path.replace(path)
    return path


def states(folders: set[Path]) -> list[tuple[str, int, int]]:
    """Name, size and date of every file in these folders."""
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def check_splits(train: People, test: People) -> None:
    if train.skeleton.names != test.skeleton.names:
        raise RunError(f"{train.annotations} and {test.annotations}: both splits need the same key points")
    if not (test.keypoints[..., 2] > 0).any():
        raise RunError(f"{test.annotations}: no key point is labelled, so that there is nothing to compare with")


def decode(people: People, input_size: Size) -> dict[str, Tensor]:
    """The tensors of a `Split`."""
    center, scale = center_and_scale(people.boxes, input_size)
    side, cut = cutting(people, center.double().numpy(), scale.double().numpy(), input_size)
    needed = 3 * side**2 * len(people)
    if needed > LARGEST:
        raise RunError(
            f"{people.annotations}: {len(people)} people at {side} x {side} pixels are {needed / 2**30:.0f} GiB "
            "decoded, more than a device should hold; train on fewer with --images, or see examples/train_tokenpose.py"
        )
    images = torch.zeros(len(people), 3, side, side, dtype=torch.uint8)
    matrices = torch.zeros(len(people), 2, 3)

    def fill(row: int) -> None:
        index = int(people.image_index[row])
        photo = read_image(people.images[index], tuple(people.image_sizes[index].tolist()))
        image, matrix = cut(photo, row)
        images[row, :, : image.shape[0], : image.shape[1]] = torch.from_numpy(image.copy()).permute(2, 0, 1)
        matrices[row] = torch.from_numpy(matrix)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(len(people))))
    return {
        "images": images,
        "matrices": matrices,
        "keypoints": people.keypoints.contiguous(),
        "center": center,
        "scale": scale,
    }


Cut = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def cutting(people: People, center: np.ndarray, scale: np.ndarray, input_size: Size) -> tuple[int, Cut]:
    """The side of the square that every image fits into, and what makes an image and its matrix of a photograph."""
    longest = int(people.image_sizes.max())
    if longest <= 2 * max(input_size):
        whole = np.eye(2, 3)
        return longest, lambda photo, row: (photo, whole)
    try:  # not above: small images do without
        from cyclekd.integrations.tokenpose.data.contexts import cut_context
        from cyclekd.integrations.tokenpose.data.crops import reach_of
    except ImportError as error:
        raise RunError(
            f"{people.annotations}: images of {longest} pixels, above {2 * max(input_size)}, are cut by a module that "
            f"lacks {error.name}: pip install {error.name}"
        ) from error

    reach = reach_of(VIEWS, input_size)
    most = round(reach * max(input_size))

    def cut(photo: np.ndarray, row: int) -> tuple[np.ndarray, np.ndarray]:
        context = cut_context(photo, center[row], reach * PIXELS_PER_SCALE * scale[row].max(), most)
        return context.image, context.matrix

    return min(most, longest), cut
