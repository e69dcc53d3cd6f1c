"""One row of the matrix: a model built without downloads, what it is fed, and what the truth about it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.matrix.repeated import Loop, Truth, first_tensor, make_nondegenerate

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a forward."""


class Row(NamedTuple):
    """One model: how it is built, what it is fed, and where its stack is expected."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]  # the same ones at every call
    path: str = ""  # of the stack; the matrix takes the one that is found where this is empty
    tokens: Callable[[Any], Any] = first_tensor  # the carried tensors in what the last block returned
    lengthen: Callable[[nn.Module, int], None] | None = None  # what else a longer list needs to be told
    last_round: Callable[[Any, int], Any] | None = None  # its output without what it returns for earlier rounds' blocks
    task: str = ""
    without_stack: str = ""  # why nothing can be cycled, for models that have no stack
    loop: Loop | None = None  # the truth where a longer list would not do what a cycle is defined to do

    def build(self) -> nn.Module:
        """The same weights at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make_nondegenerate(hold_still(self.make()))

    def truth(self) -> Truth:
        return Truth(self.build(), self.path, self.inputs(), self.tokens, self.lengthen, self.loop, self.last_round)


def hold_still(model: nn.Module) -> nn.Module:
    """Nothing drawn in a forward, nothing kept from it: so no comparison depends on the one before."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the MLP of timm's relative positions drops an eighth, which no argument reaches
        elif hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return model


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded())
