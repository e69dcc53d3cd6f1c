"""The hooks on the blocks of one stack: they hand the tokens over, and see what leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cyclekd.checkpointing import FRAMES_ARE_VISIBLE, Frame, enclosing_frames, in_backward
from cyclekd.errors import CycleError
from cyclekd.passes import Pass, Visit
from cyclekd.randomness import set_random_state
from cyclekd.slots import Handover, Slot
from cyclekd.structure import get, leaves, own_containers

if TYPE_CHECKING:
    from cyclekd.reentry import Reentry


class StackHooks:
    """One stack of a model, its hooks, and what was learned of it."""

    def __init__(self, reentry: Reentry, path: str, index: int) -> None:
        self.reentry, self.path, self.index = reentry, path, index
        self.handles: list[Any] = []
        self.known_slots: tuple[Slot, ...] = ()  # learned from tensors handed on, for passes that call one block

    def __getstate__(self) -> dict[str, Any]:
        alive = [handle for handle in self.handles if handle.hooks_dict_ref() is not None]  # dead ones do not copy
        return {**self.__dict__, "handles": alive}

    def install(self, blocks: Sequence[nn.Module]) -> None:
        """Put the hooks on all blocks, since LayerDrop may leave out the first or the last."""
        for block in dict.fromkeys(blocks):  # a shared block stands in the list several times
            self.handles.append(block.register_forward_pre_hook(self.before_block, with_kwargs=True, prepend=True))
            self.handles.append(block.register_forward_hook(self.after_block, with_kwargs=True))

    def stands_on(self, blocks: Sequence[nn.Module]) -> bool:
        """Whether the hooks are on these blocks, before and after those of others, which are part of the block."""
        own = {handle.id for handle in self.handles}
        return all(
            next(iter(block._forward_pre_hooks), None) in own and next(reversed(block._forward_hooks), None) in own
            for block in blocks
        )

    def remove(self) -> None:
        """Take them off again."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def before_block(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Forward pre-hook of every block: hands the carried tokens to the first one that a pass calls."""
        return self.reentry.in_graph_or_eager(self._before_block, block, args, kwargs)  # type: ignore[no-any-return]

    def after_block(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of every block: keeps what left last, and from one call to the next what is carried."""
        self.reentry.in_graph_or_eager(self._after_block, args, kwargs, output)

    def _before_block(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        run, frames = self.reentry.current, enclosing_frames()
        if run is None:
            return self._outside_a_pass(frames, args, kwargs)
        if run.grad_enabled and not torch.is_grad_enabled():
            raise CycleError(
                f"the stack {self.path!r} runs without gradients inside a forward with gradients: a reentrant "
                "activation checkpoint encloses it, or torch.no_grad() does. Checkpoint with use_reentrant=False "
                '(Hugging Face: gradient_checkpointing_kwargs={"use_reentrant": False}), '
                'or leave blocks that are frozen that way out of the stack, as in stack="blocks.4:"'
            )
        records = self.reentry.remember(frames, run)
        inputs = (args, kwargs) if run.traced else own_containers((args, kwargs))
        visit = run.visits[self.index]
        visit.calls += 1
        if visit.first_block is not None:
            visit.follow(block, inputs)
            return None
        self._enter(run, visit, block, inputs)
        if not visit.carried:
            return None
        handover = Handover(self.path, visit.slots, visit.carried)
        for record in records:
            record.handovers[self.path] = handover
        return handover(args, kwargs)

    def _enter(self, run: Pass, visit: Visit, block: nn.Module, inputs: Any) -> None:
        if run.in_stem and run.live_draws is not None:
            set_random_state(run.live_draws)
        visit.first_block, visit.entry = block, inputs
        visit.beside = {entry: [tensor] for entry, tensor in leaves(inputs)}
        if visit.look is not None:
            visit.look.begin(inputs, [get(inputs, entry) for entry, _ in visit.slots])

    def _after_block(self, args: Any, kwargs: Any, output: Any) -> None:
        run = self.reentry.current
        if run is None:
            return
        visit = run.visits[self.index]
        visit.leave((args, kwargs), output)
        if visit.slots and not run.traced:
            self.known_slots = visit.slots

    def _outside_a_pass(self, frames: list[Frame], args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """A block call of `forward_features()` and the like, or the recomputation of a checkpoint in the backward."""
        if not any(frame.recomputing for frame in frames) and not in_backward():
            self.reentry.remember(frames, None)
            return None
        recalled = self.reentry.recall(frames)
        if recalled is None:
            reason = (
                "it was compiled, or is of another kind than torch.utils.checkpoint(use_reentrant=False). Checkpoint "
                "with that, in eager mode"
                if FRAMES_ARE_VISIBLE
                else f"PyTorch {torch.__version__} does not show it. Update to 2.8 or later, or do not checkpoint"
            )
            raise CycleError(
                f"a block of the stack {self.path!r} is recomputed in the backward, and the activation checkpoint "
                f"around it is not known: {reason}"
            )
        frame, record, opened = recalled
        handover = record.handovers.get(self.path)
        if handover is None or record.runs.get(self.path) is frame.run:
            return None
        record.runs[self.path] = frame.run
        for inner in opened:
            inner.handovers[self.path] = handover
        return handover(args, kwargs)
