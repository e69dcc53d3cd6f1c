"""One run of the base forward: what is known of it so far, and what can be read off its block calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from cyclekd.errors import CycleError
from cyclekd.looking import Look
from cyclekd.randomness import RandomState
from cyclekd.slots import (
    Slot,
    fits,
    floating,
    slots_by_identity,
    slots_by_shape,
)
from cyclekd.stem import versions
from cyclekd.structure import Leaf, Path, copied, get, leaves, own_containers


@dataclass
class Pass:
    """One run of the base forward, through one stack or several."""

    cycle: int
    traced: bool  # the whole forward is being compiled into one graph
    visits: tuple[Visit, ...]  # one per stack
    grad_enabled: bool = True
    live_draws: RandomState | None = None  # where random numbers go on from the first block

    @property
    def in_stem(self) -> bool:
        """Whether no block was called yet."""
        return all(visit.first_block is None for visit in self.visits)


@dataclass
class Visit:
    """One stack in one pass."""

    path: str  # of the stack
    traced: bool
    slots: tuple[Slot, ...] = ()
    carried: tuple[Tensor, ...] = ()  # enters the stack instead of the stem's tokens; empty in the first cycle
    look: Look | None = None  # in the pass that looks between the blocks
    first_block: nn.Module | None = None
    entry: Any = None  # (args, kwargs) of the first block call
    last: Any = None  # result of the last block call
    left: Any = None  # the same, as it left
    versions: list[int] = field(default_factory=list)  # of the tensors in `left`, at that time
    beside: dict[Path, list[Tensor]] = field(default_factory=dict)  # what blocks got that was not handed to them
    pending: tuple[Slot, ...] = ()  # slots seen at the block call that is running
    moved: tuple[Slot, ...] = ()  # those of `slots` whose tensors the blocks change: the tokens
    calls: int = 0  # of blocks
    needs_look: bool = False  # something happens between two blocks, to the tokens or to what goes beside them

    def follow(self, block: nn.Module, inputs: Any) -> None:
        """A block call after the first: learn which tensors are handed on, refuse a second way into the stack."""
        handed_on = slots_by_identity(self.last, inputs)
        if block is self.first_block and not handed_on:
            raise CycleError(
                f"the stack {self.path!r} is entered more than once in one forward, so that it is not defined which "
                "entry a cycle replaces: wrap the module that owns it and is called once per forward, or choose "
                "another stack=..."
            )
        self.pending = handed_on if not self.slots else ()
        if self.pending:
            self.moved = _moved(self.pending, self.entry, self.last)  # by the first block
        carried = [get(self.last, exit_) for _, exit_ in self.slots]
        if self.look is not None:
            self.look.follow(carried)
        fresh = self._fresh(inputs, handed_on)
        if handed_on and not fresh:
            return
        self.needs_look = True
        if self.look is None:
            return
        if handed_on:
            self.look.check_beside(type(block).__name__, fresh, self.last, carried)
        else:
            tokens = [get(inputs, entry) for entry, _ in self.slots]
            self.look.check_tokens(type(block).__name__, [*fresh, *tokens], self.last, carried)

    def _fresh(self, inputs: Any, handed_on: tuple[Slot, ...]) -> list[Leaf]:
        """Inputs that no block before got at the same place, and that could hold something of the tokens.

        Masks and the like are the same objects for every block, or for every block of a kind. Where the tokens have a
        gradient, what has none was not computed from them.
        """
        known = {entry for entry, _ in handed_on}
        left = [tensor for _, tensor in floating(self.last) if not tensor.is_nested]
        shapes = [tensor.shape for tensor in left]
        with_gradient = any(tensor.requires_grad for tensor in left)
        fresh = []
        for entry, tensor in floating(inputs):
            beside = self.beside.setdefault(entry, [])
            if entry in known or tensor.is_nested or any(tensor is earlier for earlier in beside):
                continue
            if tensor.requires_grad or not with_gradient or tensor.shape in shapes:
                fresh.append((entry, tensor))
            beside.append(tensor)
        return fresh

    def leave(self, inputs: Any, output: Any) -> None:
        """A block call is over: keep what left last, and learn what is carried from one call to the next."""
        self.last = output if self.traced else own_containers(output)
        # Versions cannot be compared in a compiled graph; copies that nothing overwrites cost nothing there.
        self.left, self.versions = (copied(output), []) if self.traced else (self.last, versions(output))
        if self.pending and not self.slots:
            self.slots = self.pending
        if self.slots and self.moved:
            self.moved = _moved(self.moved, inputs, output)

    def slots_seen_by_shape(self) -> tuple[Slot, ...]:
        """By shape alone; not where a single call leaves several inputs that the tokens could belong to."""
        slots = slots_by_shape(self.entry, self.last)
        left = [tensor for _, tensor in floating(self.last)]
        fitting = [tensor for _, tensor in floating(self.entry) if left and fits(left[0], tensor)]
        if self.calls == 1 and len(fitting) > 1:
            raise CycleError(
                f"only one block of the stack {self.path!r} was called, and {len(fitting)} of its inputs could carry "
                "the tokens that leave it: cycle at least two blocks, so that it can be seen what one hands to the next"
            )
        return slots


def tokens_left(visit: Visit, slots: tuple[Slot, ...]) -> tuple[Tensor, ...]:
    """The carried tensors as they left the stack, one for each slot."""
    found = [get(visit.left, exit_) for _, exit_ in slots]
    tokens = tuple(each for each in found if isinstance(each, Tensor))
    if not slots or len(tokens) != len(found):
        raise CycleError(_no_tokens(visit))
    if not visit.traced and visit.versions != versions(visit.left):
        raise CycleError(
            f"something after {type(visit.first_block).__name__}'s stack wrote in place on the tokens that left it, so "
            "that they are no longer what the next cycle starts from: write x = x + y there instead of x += y"
        )
    return tokens


def _no_tokens(visit: Visit) -> str:
    name = type(visit.first_block).__name__
    entered = [tuple(t.shape) for _, t in leaves(visit.entry)]
    left = [tuple(t.shape) for _, t in leaves(visit.last)]
    if not left:
        return (
            f"{name} returned {type(visit.last).__name__}, in which no tensor was found: blocks of a stack return a "
            "tensor, or a tuple, list or dict of tensors. Choose another stack=..., or let the block return its tokens"
        )
    return (
        f"no tensor that enters {name} ({entered}) has the rank and feature width of one that leaves the stack "
        f'({left}), so it cannot be entered again: choose a part that keeps them, as in stack="blocks.4:10"; '
        "find_stacks(model) lists what fits"
    )


def _moved(slots: tuple[Slot, ...], inputs: Any, result: Any) -> tuple[Slot, ...]:
    """Those of `slots` that can be tokens, as far as one block call tells.

    A tensor that some block hands through untouched (T5's position bias) is carried, but no token. Blocks that write in
    place return their input too; where nothing would be left over, all of it is tokens.
    """
    return tuple(slot for slot in slots if _is_moved(get(inputs, slot[0]), get(result, slot[1]))) or slots


def _is_moved(entered: Any, left: Any) -> bool:
    return left is not entered and isinstance(left, Tensor) and left.is_floating_point()
