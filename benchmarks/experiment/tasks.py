"""What the experiment gets of a model and its data, and the tasks that come with it.

A task of your own is a Python file with two functions, and a recipe if the default one does not suit:

    import torch.nn.functional as F
    from benchmarks.experiment.tasks import Data, Recipe

    RECIPE = Recipe(epochs=20, learning_rate=1e-3)

    def build_model(seed):
        return MyVisionTransformer()        # random generators are seeded already: same seed, same weights

    def load_data(seed, device):
        ...
        return Data(batches, steps_per_epoch, F.cross_entropy, evaluate)

`batches(epoch)` has to follow from seed and epoch alone. All runs of a seed are paired only because of that, and a run
that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import VisionTransformer
from torch import Tensor, nn

from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.seeds import derive_seed
from cyclekd.losses import Groups

DIGITS_IMAGES, DIGITS_BATCH = 300, 32  # as in examples/quickstart.py


@dataclass(frozen=True)
class Data:
    """Training batches and a metric, all on the device that `load_data` was given."""

    batches: Callable[[int], Iterator[tuple[Tensor, Any]]]
    """Epoch, counted from 0, to its (inputs, targets). Epochs go beyond the recipe's in the run of equal compute."""
    steps_per_epoch: int
    loss: Callable[[Any, Any], Tensor]
    """(output, target) to a scalar, in training; logits, heat maps or whatever the model puts out."""
    evaluate: Callable[[Callable[[Tensor], Any]], float]
    """A function from inputs to outputs, to the metric on the test data: in percent, higher is better."""
    metric: str = "test accuracy"
    groups: Groups | None = None
    """Parts of the token axis with a token term each, as `CycleLoss` takes them: a pose model's key points, say."""


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine to zero; each number can be set on the command line too."""

    epochs: int = 40
    learning_rate: float = 1e-3
    weight_decay: float = 0.05  # 0 is Adam
    warmup: float = 0.05  # share of all steps
    rho: tuple[float, ...] = (0.3,)  # self-distilled arms by scale-free weight
    alpha: tuple[float, ...] = ()  # ... and by fixed weight


@dataclass(frozen=True)
class Task:
    """The two functions under a name. `source` tells one version of a task file from another."""

    name: str
    build_model: Callable[[int], nn.Module]
    load_data: Callable[[int, torch.device], Data]
    recipe: Recipe
    source: str = ""


def load_task(wanted: str, cache: Path | None = None, images: int | None = None, model: str | None = None) -> Task:
    """The built-in task of that name, or the one in that Python file.

    `cache` is the file of decoded images that cifar100 needs for its data and pose for all, `images` leaves that many
    training images of a built-in task, and `model` is pose's. RunError for a task that there is not or that lacks a
    function.
    """
    if wanted == "digits":
        recipe = Recipe(epochs=40, learning_rate=3e-3, warmup=0.1)
        return Task("digits", digits_model, partial(digits_data, images=images), recipe)
    if wanted == "cifar100":
        from benchmarks.experiment import cifar  # not above: torchvision, which other tasks can do without

        return Task("cifar100", cifar.build_model, partial(cifar.load_data, cache=cache), Recipe(epochs=38))
    if wanted == "pose":
        from benchmarks.experiment import pose  # not above, likewise: einops

        assert model is not None and cache is not None
        return pose.pose_task(model, cache)
    if not wanted.endswith(".py") or not Path(wanted).is_file():
        raise RunError(
            f"task {wanted!r}: not a built-in task (digits, cifar100, pose) and not a Python file that is there"
        )
    if images is not None:
        raise RunError(f"--images is for the built-in tasks; {wanted} decides on its own data")
    return task_of_file(Path(wanted))


def task_of_file(path: Path) -> Task:
    specification = importlib.util.spec_from_file_location(f"task_{path.stem}", path)
    assert specification is not None and specification.loader is not None  # there is a loader for every .py
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for name in ("build_model", "load_data"):
        if not callable(getattr(module, name, None)):
            raise RunError(f"task {path}: a task file has a function {name}; see benchmarks/experiment/tasks.py")
    recipe = getattr(module, "RECIPE", Recipe())
    source = blake2b(path.read_bytes(), digest_size=4).hexdigest()
    return Task(path.stem, module.build_model, module.load_data, recipe, source)


# -- digits: the setting of examples/quickstart.py ---------------------------------------------------------------------


def digits_model(seed: int) -> nn.Module:
    data = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    size = {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    model = VisionTransformer(**data, **size, class_token=False, global_pool="avg")
    with torch.no_grad():
        model.pos_embed *= 25  # timm's scale is for long trainings: 40 epochs end at 74 % with it, at 89 % so
    return model


def digits_data(seed: int, device: torch.device, images: int | None = None) -> Data:
    """300 of scikit-learn's 1,797 scans to train on and the rest to test on, split by the seed."""
    scans, labels = load_digits(return_X_y=True)
    scans = scans.reshape(-1, 1, 8, 8).astype(np.float32) / 8 - 1  # grey values 0..16 to -1..1
    split = train_test_split(scans, labels, train_size=images or DIGITS_IMAGES, random_state=seed)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part).to(device) for part in split)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(derive_seed("digits", seed, epoch))
        for batch in torch.randperm(len(train_images), generator=draw).to(device).split(DIGITS_BATCH):
            yield train_images[batch], train_labels[batch]

    steps = -(-len(train_images) // DIGITS_BATCH)
    return Data(batches, steps, F.cross_entropy, partial(accuracy, test_images, test_labels, len(test_images)))


def accuracy(images: Tensor, labels: Tensor, batch: int, outputs_of: Callable[[Tensor], Any]) -> float:
    """Percent of the images whose largest logit is the label's."""
    parts = zip(images.split(batch), labels.split(batch), strict=True)
    right = [(outputs_of(part).argmax(-1) == truth).sum() for part, truth in parts]
    return 100 * torch.stack(right).sum().item() / len(labels)
