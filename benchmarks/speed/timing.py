"""Rounds in which variants take turns, clocks that start and stop on an idle device, and ratios with intervals."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tqdm import tqdm

Key = TypeVar("Key", bound=Hashable)

WARM_UP = 3
"""Untimed steps of each variant before the first round."""


def shuffled_rounds(names: list[Key], rounds: int, end: float, seed: int, what: str) -> Iterator[list[Key]]:
    """The names in a new order for every round: once at least, then while a round as long as the longest ends in time.

    `end` is a time of `time.perf_counter`.
    """
    draw, longest = random.Random(seed), 0.0
    for i in tqdm(range(rounds), desc=what):
        start = time.perf_counter()
        if i and start + longest > end:
            return
        yield draw.sample(names, len(names))
        longest = max(longest, time.perf_counter() - start)


def time_in_turns(steps: dict[str, Callable[[], None]], rounds: int, seed: int) -> dict[str, list[float]]:
    """Seconds of one step of every variant in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name in tqdm(steps, desc="warm-up"):
        for _ in range(WARM_UP):
            steps[name]()
    for order in shuffled_rounds(list(steps), rounds, math.inf, seed, "rounds"):
        for name in order:
            seconds[name].append(timed(lambda _, step=steps[name]: step(), [None]))
    return seconds


@dataclass(frozen=True)
class Ratio:
    """A paired median with its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratio(times: list[float], base: list[float]) -> Ratio:
    """The median over rounds of times / base, and the bootstrap interval of that median."""
    ratios, draw = [t / b for t, b in zip(times, base, strict=True)], random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return Ratio(statistics.median(ratios), medians[50], medians[1949])


def timed(step: Callable[[Any], None], batches: Iterable[Any]) -> float:
    """Seconds of all the batches, waiting for them included."""
    synchronize()
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Peak:
    """How far the memory allocated on the GPU rises from here on."""

    def __init__(self) -> None:
        self.before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def grown(self) -> int:
        """Bytes; 0 without a GPU."""
        return torch.cuda.max_memory_allocated() - self.before if torch.cuda.is_available() else 0
