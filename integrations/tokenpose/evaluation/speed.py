"""How fast a model finds key points: of everything from file to key point, and of the network alone.

The network is timed pass by pass, and the median told: a pause of the machine then does not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cyclekd.integrations.runs.start import precision_of
from cyclekd.integrations.tokenpose.evaluation.subject import Evaluated

WARM_UP, FEWEST, MOST, SECONDS = 2, 3, 30, 5.0
"""Passes before those that are timed; how many these are at least and at most, and after how long they end."""


def speed(this: Evaluated, seconds: float, accelerator: Accelerator, args: argparse.Namespace) -> dict[str, Any]:
    """People per second: of everything, which took `seconds`, and of the network in one pass, as it is deployed."""
    network = []
    for size in [] if args.no_speed else sorted({1, args.batch_size}):
        passes = seconds_per_pass(this.model, size, accelerator)
        network.append({"batch": size, "passes": len(passes), "people/s": size / statistics.median(passes)})
    return {
        "device": device_of(accelerator),
        "precision": precision_of(accelerator),
        "network": network,
        "everything": {
            "processes": accelerator.num_processes,
            "passes per person": this.cycles * (1 if args.no_flip_test else 2),
            "people/s": len(this.people) / seconds,
            "images/s": len(this.people.images) / seconds,
        },
    }


@torch.no_grad()
def seconds_per_pass(model: nn.Module, batch: int, accelerator: Accelerator) -> list[float]:
    """Of every timed pass of that many images."""
    images = torch.randn(batch, 3, *model.config.input_size, device=accelerator.device)
    for _ in range(WARM_UP):
        timed_pass(model, images, accelerator)
    seconds: list[float] = []
    while len(seconds) < FEWEST or (len(seconds) < MOST and sum(seconds) < SECONDS):
        seconds.append(timed_pass(model, images, accelerator))
    return seconds


def timed_pass(model: nn.Module, images: Tensor, accelerator: Accelerator) -> float:
    start = time.perf_counter()
    with accelerator.autocast():
        model(images)
    if images.device.type != "cpu":
        torch.accelerator.synchronize(images.device)
    return time.perf_counter() - start


def device_of(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    threads = torch.get_num_threads()
    return f"{accelerator.device.type} with {threads} thread{'s' * (threads > 1)}"
