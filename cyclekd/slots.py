"""Where the carried tensors enter and leave the blocks, and how they are put in place of the stem's."""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from cyclekd.errors import CycleError
from cyclekd.structure import Leaf, Path, get, leaves, replace

Slot = tuple[Path, Path]
"""Where a carried tensor enters a block, as a path into (args, kwargs), and where it leaves one, into the result."""


class Handover:
    """Puts the carried tokens where the stem's would enter the first block."""

    def __init__(self, path: str, slots: tuple[Slot, ...], carried: tuple[Tensor, ...]) -> None:
        self.path, self.slots, self.carried = path, slots, carried

    def __call__(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        inputs: tuple[Any, Any] = (args, kwargs)
        for (entry, _), tokens in zip(self.slots, self.carried, strict=True):
            replaced = get(inputs, entry)
            if isinstance(replaced, Tensor) and not fits(tokens, replaced):
                raise CycleError(
                    f"the tokens leave the stack {self.path!r} as {tuple(tokens.shape)} and enter it as "
                    f"{tuple(replaced.shape)}: cycling needs one rank and one feature width (fewer tokens are fine). "
                    'Choose a part of it, as in stack="blocks.4:10"; find_stacks(model) lists what fits'
                )
            # A copy, because a block may write on its input and the loss still needs these tokens.
            inputs = replace(inputs, entry, tokens.clone())
            if get(inputs, entry) is None:
                raise CycleError(
                    f"the first block of the stack {self.path!r} is called without the argument at {entry} by which "
                    "later blocks receive carried tokens: pass it to every block in the same way"
                )
        return inputs


def slots_by_identity(result: Any, inputs: Any) -> tuple[Slot, ...]:
    """Tensors of one block's result that are, as the same objects, inputs of the next block."""
    left = leaves(result)
    slots = []
    for entry, tensor in leaves(inputs):
        for exit_, handed in left:
            if handed is tensor:
                slots.append((entry, exit_))
                break
    return tuple(slots)


def slots_by_shape(inputs: Any, result: Any) -> tuple[Slot, ...]:
    """Where something happens to the tokens between the blocks: the leading tensors that agree in order and shape.

    `inputs` entered the first block, `result` left the last.
    """
    slots: list[Slot] = []
    for (entry, before), (exit_, after) in zip(floating(inputs), floating(result), strict=False):
        # Only the first may leave with fewer tokens: a mask or an attention map behind it must not pass for tokens.
        if before.shape != after.shape and (slots or not fits(after, before)):
            break
        slots.append((entry, exit_))
    return tuple(slots)


def fits(tokens: Tensor, replaced: Tensor) -> bool:
    """One rank, one kind of number and one feature width, which stands last or, in [B, C, H, W], second."""
    if tokens.ndim != replaced.ndim or tokens.is_floating_point() != replaced.is_floating_point():
        return False
    if tokens.is_nested or replaced.is_nested:  # has no shape to compare
        return tokens.is_nested == replaced.is_nested
    width_last = tokens.shape[-1] == replaced.shape[-1]
    return width_last or (tokens.ndim == 4 and tokens.shape[1] == replaced.shape[1])


def gradient_nodes(value: Any) -> set[Any]:
    """The autograd nodes that made the tensors in `value`."""
    return {get_gradient_edge(tensor).node for _, tensor in leaves(value) if tensor.requires_grad}


def depends_on(value: Any, sources: set[Any], past: AbstractSet[Any] = frozenset(), since: int = 0) -> bool:
    """Whether a tensor in `value` was computed from one of the nodes `sources` without going through one of `past`.

    With `since`, a time that `autograd_time` gave, what was computed from the sources before then does not count.
    """
    seen = set(past)
    waiting = [(node, LATEST) for node in gradient_nodes(value)]
    while waiting:
        node, used_at = waiting.pop()
        if node in sources and node not in past:
            if used_at >= since:
                return True
            continue
        if node in seen:
            continue
        seen.add(node)
        waiting += [(following, _made_at(node)) for following, _ in node.next_functions if following is not None]
    return False


def upstream(nodes: set[Any], tokens: list[Tensor]) -> set[Any]:
    """The nodes from which `nodes` were computed and that made something of the size of one of `tokens`."""
    sizes = {each.numel() for each in tokens if not each.is_nested}
    seen: set[Any] = set()
    waiting = [before for node in nodes for before, _ in node.next_functions]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
    # Nodes without any before them hold parameters and inputs.
    return {node for node in seen if node.next_functions and not sizes.isdisjoint(_sizes_made(node))}


def _sizes_made(node: Any) -> list[int]:
    return [math.prod(made.shape) for made in getattr(node, "_input_metadata", ())]


LATEST = 2**64


def autograd_time() -> int:
    """The number that autograd gives to the node it makes next; they grow."""
    return _made_at((torch.ones((), requires_grad=True) + 0).grad_fn)


def _made_at(node: Any) -> int:
    return int(node._sequence_nr()) if hasattr(node, "_sequence_nr") else LATEST


def floating(value: Any) -> list[Leaf]:
    """The leaves that can be tokens."""
    return [(path, tensor) for path, tensor in leaves(value) if tensor.is_floating_point()]
