"""What a forward with several cycles returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from cyclekd.errors import CycleError


class CycleOutput(NamedTuple):
    """Every cycle of one forward, cycle 1 (the one that is deployed) first.

    `loss` is the whole objective, a scalar, where the base model computes a loss itself, else None. `outputs` are the
    base model's own outputs. `tokens` are what left the block stack: a tensor per cycle, usually [B, T, D], or a tuple
    of tensors where the blocks carry several.

    A NamedTuple and not a dataclass: Accelerate and DDP look into named tuples, and Hugging Face's Trainer takes
    `outputs[0]` as the loss.
    """

    loss: Tensor | None
    outputs: tuple[Any, ...]
    tokens: tuple[Tensor | tuple[Tensor, ...], ...]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a CycleOutput holds one output per cycle and has no attribute {name!r}: write .outputs[0].{name} for "
            f"cycle 1 (the deployed one) or .outputs[-1].{name} for the last, or call model.eval() first"
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise CycleError(
            f"{getattr(function, '__name__', function)}() got a CycleOutput, which holds one output per cycle: make "
            "the loss of all of them, CycleLoss(task)(outputs, labels).total, take .outputs[0] for cycle 1 (the one "
            "deployed), or call model.eval() first"
        )

    def __getitem__(self, index: Any) -> Any:
        if index == 0 and self.loss is None:
            raise CycleError(
                "the loss of a CycleOutput was asked for by index, but the model computed none: pass it `labels`, or "
                "compute the loss from all cycles, CycleLoss(task)(outputs, labels).total. With Hugging Face's Trainer "
                "leave label_smoothing_factor at 0 and pass compute_loss_func="
                "lambda outputs, labels, **kwargs: criterion(outputs, labels).total / accumulation_steps"
            )
        return tuple.__getitem__(self, index)  # zero-argument super() does not work in a NamedTuple
