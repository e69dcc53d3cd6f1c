"""The training loops that throughput.py times against each other: one call of `step` is one optimizer step.

Each has a model and an optimizer of its own. timm's takes images and soft targets, ours what its loader gives: with a
plan in it the images are augmented on the device first. Both mix images, timm's on the way from its loader.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.cost import HandWritten
from benchmarks.speed.feeds import CLASSES
from cyclekd.integrations.deit import recipe
from cyclekd.integrations.deit.arguments import add_recipe_arguments
from cyclekd.integrations.deit.augment import DeviceAugment
from cyclekd.integrations.deit.task import Classification
from cyclekd.integrations.runs.folder import RunFolder
from cyclekd.integrations.runs.loading import Batch
from cyclekd.integrations.runs.sampling import TrainingBatches
from cyclekd.integrations.runs.training import Training

LOOPS = ("timm loop", "plain", "cycles", "ideal")
"""timm's loop and ours with a plain model; ours with a wrapped model, and with the same cycles written by hand."""


def make_loop(name: str, compiled: bool, args: argparse.Namespace) -> TimmLoop | OurLoop:
    """The loop with a new model, the same weights in all of them."""
    settings = recipe_settings(args, args.cycles if name == "cycles" else 1)
    torch.manual_seed(args.seed)
    model = recipe.build_model(settings, CLASSES).to(args.device).train()
    if name == "timm loop":
        return TimmLoop(model, compiled, args)
    model = HandWritten(model, args.cycles) if name == "ideal" else recipe.add_cycles(model, settings)
    return OurLoop(model, compiled, settings, args)


def recipe_settings(args: argparse.Namespace, cycles: int) -> argparse.Namespace:
    """The recipe's defaults for the model that is timed."""
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    settings = parser.parse_args([])
    settings.model, settings.model_args, settings.cycles = args.model, args.model_args, cycles
    settings.batch_size, settings.input_size = args.batch, args.size
    return settings


class TimmLoop:
    """What timm's train.py (1.0.29) does on one GPU without accumulation; its reading of the loss included."""

    def __init__(self, model: nn.Module, compiled: bool, args: argparse.Namespace) -> None:
        fused = {"fused": True} if args.device.startswith("cuda") else {}  # --opt-kwargs fused=True
        self.optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.05, **fused)
        self.model = torch.compile(model) if compiled else model
        self.criterion, self.losses, self.args = SoftTargetCrossEntropy(), AverageMeter(), args

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, targets = batch
        with autocast(self.args):
            loss = self.criterion(self.model(images), targets)
        loss.backward()
        self.optimizer.step()
        self.losses.update(loss.item(), len(images))  # waits for the device at every step
        self.optimizer.zero_grad()


class OurLoop:
    """The optimizer step, task and recipe of `cyclekd.integrations`, with their seeds, meter and schedule."""

    def __init__(
        self, model: nn.Module, compiled: bool, settings: argparse.Namespace, args: argparse.Namespace
    ) -> None:
        on_gpu = args.device.startswith("cuda")
        accelerator = Accelerator(cpu=not on_gpu, mixed_precision="bf16" if on_gpu else "no")
        criterion = recipe.build_criterion(model, settings)
        optimizer = recipe.build_optimizer(model, settings, args.batch)
        if compiled:
            model.compile()
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        on_device, nothing = DeviceAugment(recipe.augment_settings(settings)), Dataset[Any]()
        task = Classification(
            accelerator,
            criterion,
            augment=lambda batch: on_device(batch["image"], batch["plan"]) if "plan" in batch else batch["image"],
            normalise=nn.Identity(),
            validation=nothing,
            batch=args.batch,
            workers=0,
            cycles=args.cycles,
            seed=args.seed,
            mixup=recipe.build_mixup(settings, CLASSES),
        )
        self.training = Training(
            accelerator=accelerator,
            folder=RunFolder(Path("unused")),
            task=task,
            model=self.model,
            optimizer=self.optimizer,
            schedule=recipe.build_schedule(self.optimizer, settings, steps_per_epoch=1000),
            order=TrainingBatches(args.batch, batch=args.batch, epochs=1, seed=args.seed),
            load=list,  # nothing: batches are handed to the steps one by one
            seed=args.seed,
        )
        self.steps = 0

    def step(self, batch: Batch) -> None:
        self.training.optimizer_step(self.steps, iter([batch]))
        self.steps += 1


def autocast(args: argparse.Namespace) -> AbstractContextManager[object]:
    return torch.autocast("cuda", torch.bfloat16) if args.device.startswith("cuda") else nullcontext()


def bytes_held(loop: TimmLoop | OurLoop) -> int:
    """Parameters, buffers and optimizer state; gradients are freed after every step."""
    state = [value for values in loop.optimizer.state.values() for value in values.values()]
    tensors = [*loop.model.parameters(), *loop.model.buffers(), *(each for each in state if isinstance(each, Tensor))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
