"""Rounds in which variants take turns, and clocks that start and stop on an idle device."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from tqdm import tqdm

Key = TypeVar("Key", bound=Hashable)


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
        """Bytes."""
        return torch.cuda.max_memory_allocated() - self.before
