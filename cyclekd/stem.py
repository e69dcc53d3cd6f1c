"""Modules before the stack: run in the first pass, remembered in the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cyclekd.checkpointing import enclosing_frames
from cyclekd.randomness import random_state, set_random_state
from cyclekd.structure import copied, leaves, own_containers

if TYPE_CHECKING:
    from cyclekd.reentry import Reentry


class StemCall:
    """Stands as `forward` on a module before the stack: runs it in the first pass, returns the same output later.

    Saves the stem's cost, keeps its BatchNorm from being updated N times, and its dropout the same in every cycle, as
    in a model whose block list is longer.
    """

    def __init__(self, reentry: Reentry, module: nn.Module) -> None:
        self.reentry, self.module = reentry, module
        self.kept: list[Kept] = []
        self.calls = 0  # in the pass that is running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.reentry.current
        if run is not None and torch.compiler.is_compiling() and not run.traced:
            return self.run(args, kwargs)  # compiled by itself: not told what encloses it, so it runs N times
        # Inside a checkpoint the recomputation would miss what a remembered output saved itself from computing, and
        # within another remembered call this one is not made at all the next time.
        remembers = self.reentry.remembers_stem and not self.reentry.in_stem and not enclosing_frames()
        if run is None or not run.in_stem or not remembers:
            return self.run(args, kwargs)
        call, self.calls = self.calls, self.calls + 1
        if run.cycle > 0 and call < len(self.kept) and self.kept[call].is_usable():
            return self.kept[call].output()
        self.reentry.in_stem = True
        try:
            output = self.run(args, kwargs)
        finally:
            self.reentry.in_stem = False
        if run.cycle == 0:
            # LayerDrop may have the first pass drawn again: what the last draw returned counts.
            self.kept[call:] = [Kept(output, run.traced)]
        return output

    def run(self, args: Any, kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


class Kept:
    """A stem output to give again, unless it holds more than tensors or was written on since."""

    def __init__(self, output: Any, traced: bool) -> None:
        # In a compiled graph versions cannot be compared, and copies that nothing overwrites cost nothing.
        self.traced = traced
        self.random_state = None if traced else random_state()
        self.value = copied(output) if traced else own_containers(output)
        self.versions = [] if traced else versions(output)

    def is_usable(self) -> bool:
        return _only_tensors(self.value) and (self.traced or self.versions == versions(self.value))

    def output(self) -> Any:
        """The same again, and the random numbers that it took are taken as drawn."""
        if self.random_state is None:
            return copied(self.value)
        set_random_state(self.random_state)
        return own_containers(self.value)


def versions(value: Any) -> list[int]:
    """How often each tensor in `value` was written on."""
    return [0 if tensor.is_inference() else tensor._version for _, tensor in leaves(value)]


def _only_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_only_tensors(item) for item in value.values())
    if isinstance(value, (tuple, list)):
        return all(_only_tensors(item) for item in value)
    return value is None or isinstance(value, (Tensor, int, float, str))
