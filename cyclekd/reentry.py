"""Several passes of one forward: from the second on, the stack starts from the tokens with which the last pass left it.

Nothing is recorded and replayed: every pass is the model's own forward, so labels, masks, losses and whatever stands
between the blocks stay its own business. Hooks on the blocks hand the tokens over; modules before the stack give their
first-pass output again instead of being run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cyclekd.caches import calls_with_own_caches
from cyclekd.checkpointing import FRAMES_ARE_VISIBLE, Frame, enclosing_frames, in_backward
from cyclekd.errors import CycleError
from cyclekd.outputs import CycleOutput
from cyclekd.passes import Look, Pass, tokens_left
from cyclekd.randomness import RandomState, random_state, set_random_state
from cyclekd.slots import Handover, Slot
from cyclekd.stem import StemCall
from cyclekd.structure import get, leaves, own_containers

TRACKS = "track_running_stats"

DRAWS_BEFORE_REFUSAL = 10
"""How often a pass is drawn when LayerDrop leaves out every block; at rate 0.5 and 3 blocks 1 pass in 8 is empty."""


@dataclass
class FrameRecord:
    """What a checkpoint frame has to repeat when it is recomputed."""

    tracks_statistics: bool
    handover: Callable[[Any, Any], tuple[Any, Any]] | None = None
    run: Any = None  # the recomputation in which the hand-over was already repeated


class Reentry:
    """The cycles of one model: its settings, the hooks on its blocks, and the pass that is running.

    Lives in the model's `__dict__`, and every hook is a bound method of it, so that `deepcopy` and `pickle` take it
    along.
    """

    def __init__(self, path: str, cycles: int, inference_cycles: int, loss: nn.Module) -> None:
        self.path = path
        self.cycles = cycles
        self.inference_cycles = inference_cycles
        self.loss = loss
        self.requested: int | None = None  # run_cycles: this many cycles, whatever the mode
        self.single_pass = False  # generate(): one pass, whatever the mode
        self.installed = False
        self.handles: list[Any] = []
        self.stem: list[StemCall] = []
        self.remembers_stem = False
        self.in_stem = False  # a remembered call is running
        self.first_draws: RandomState | None = None  # the random state with which the first pass began
        self.known_slots: tuple[Slot, ...] = ()  # learned from tensors handed on, for passes that call one block
        self.glue_is_known = False  # what stands between the blocks was looked at, and lets nothing pass them by
        self.current: Pass | None = None
        self.frames: WeakKeyDictionary[Any, FrameRecord] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        alive = [handle for handle in self.handles if handle.hooks_dict_ref() is not None]  # dead ones do not copy
        return {**self.__dict__, "handles": alive, "current": None, "frames": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, frames=WeakKeyDictionary())

    # -- hooks, standing only while several cycles or their tokens are wanted ------------------------------------------

    def install(self, blocks: Sequence[nn.Module], stem: Sequence[nn.Module], norms: Sequence[nn.Module]) -> None:
        """Put the hooks on; `norms` are the modules with running statistics."""
        global _call_outside_graphs
        if _call_outside_graphs is _call:  # not at import, since it loads PyTorch's compiler
            _call_outside_graphs = torch.compiler.disable(_call)  # type: ignore[no-untyped-call]
        self.installed = True
        for block in dict.fromkeys(blocks):  # a shared block stands in the list several times
            self.handles.append(block.register_forward_pre_hook(self.before_block, with_kwargs=True, prepend=True))
            self.handles.append(block.register_forward_hook(self.after_block, with_kwargs=True))
        for norm in norms:
            self.handles.append(norm.register_forward_pre_hook(self.before_norm))
            self.handles.append(norm.register_forward_hook(self.after_norm, always_call=True))
        known = {call.module: call for call in self.stem}  # torch.compile recompiles for new objects
        free = [module for module in stem if "forward" not in module.__dict__]  # patched by others: just run N times
        self.stem = [known.get(module) or StemCall(self, module) for module in free]
        for call in self.stem:
            call.module.forward = call

    def stands_on(self, blocks: Sequence[nn.Module]) -> bool:
        """Whether the hooks are on these blocks, before and after those of others, which are part of the block."""
        own = {handle.id for handle in self.handles}
        return self.installed and all(
            next(iter(block._forward_pre_hooks), None) in own and next(reversed(block._forward_hooks), None) in own
            for block in blocks
        )

    def owes_recomputation(self) -> bool:
        """Whether a backward is still to come that will run blocks of a later cycle again."""
        return any(record.handover is not None for record in self.frames.values())

    def remove(self) -> None:
        """Take every hook and patch off again."""
        for handle in self.handles:
            handle.remove()
        for call in self.stem:
            if call.module.__dict__.get("forward") is call:
                del call.module.forward
        self.installed, self.handles = False, []

    # -- the passes --------------------------------------------------------------------------------------------------

    def run(self, forward: Callable[..., Any], cycles: int, args: Any, kwargs: Any) -> CycleOutput:
        """All cycles of one call, without the objective."""
        calls = calls_with_own_caches(args, kwargs, cycles)
        traced = torch.compiler.is_compiling()
        outputs, tokens = [], []
        slots: tuple[Slot, ...] = ()
        moved: tuple[Slot, ...] = ()
        carried: tuple[Tensor, ...] = ()
        self.remembers_stem = cycles > 1
        try:
            for cycle, (pass_args, pass_kwargs) in enumerate(calls[:cycles]):
                if cycles > 1 and not traced:
                    pass_args, pass_kwargs = own_containers(pass_args), own_containers(pass_kwargs)
                output, done = self.run_pass(forward, cycle, slots, carried, pass_args, pass_kwargs)
                if cycle == 0:
                    slots = done.slots or self.known_slots or done.slots_seen_by_shape()
                    moved = done.moved or slots
                carried = tokens_left(done, slots)
                if done.glued and cycles > 1 and not self.glue_is_known:
                    self._look_between_blocks(forward, slots, *own_containers(calls[cycles]))
                outputs.append(output if cycles == 1 or traced else own_containers(output))
                left = tuple(each for slot, each in zip(slots, carried, strict=True) if slot in moved)
                tokens.append(left[0] if len(left) == 1 else left)
        finally:
            self.remembers_stem = False
            for call in self.stem:
                call.kept.clear()
        return CycleOutput(None, tuple(outputs), tuple(tokens))

    def run_pass(
        self,
        forward: Callable[..., Any],
        cycle: int,
        slots: tuple[Slot, ...],
        carried: tuple[Tensor, ...],
        args: Any,
        kwargs: Any,
    ) -> tuple[Any, Pass]:
        """One base forward; drawn again where LayerDrop left out every block, since no token would have moved."""
        for _ in range(DRAWS_BEFORE_REFUSAL):
            traced = torch.compiler.is_compiling()
            self.current = Pass(self.path, cycle, traced, slots, carried, torch.is_grad_enabled())
            if self.remembers_stem and not traced:
                self._draw_as_the_first_pass(self.current)
            for call in self.stem:
                call.calls = 0
            try:
                output = forward(*args, **kwargs)
                done = self.current
            finally:
                self.current = None
                self.in_stem = False
            if done.first_block is not None:
                return output, done
        raise CycleError(
            f"no block of the stack {self.path!r} was called by the forward: it is not the stack that these inputs "
            "use, is called past its hooks (block.forward), or LayerDrop leaves out every block. Choose another with "
            "stack=..., find_stacks(model) lists them"
        )

    def _draw_as_the_first_pass(self, run: Pass) -> None:
        """Until its first block, a later pass draws the random numbers of the first one, as a stem that ran once."""
        live = random_state()
        if run.cycle == 0:
            self.first_draws = live
        elif self.first_draws is not None:
            run.live_draws = live
            set_random_state(self.first_draws)

    def before_block(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Forward pre-hook of every block: hands the carried tokens to the first one that a pass calls."""
        return self._in_graph_or_eager(Reentry._before_block, block, args, kwargs)  # type: ignore[no-any-return]

    def after_block(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of every block: keeps what left last, and from one call to the next what is carried."""
        self._in_graph_or_eager(Reentry._after_block, block, args, kwargs, output)

    def _in_graph_or_eager(self, hook: Callable[..., Any], *args: Any) -> Any:
        """Run a hook as part of a graph of the whole forward, or outside of graphs.

        In a graph of a part (a block that is compiled by itself, what is left after a graph break) neither the pass nor
        the checkpoint that is running could be told: what was true while compiling would be taken for true ever after.
        """
        if torch.compiler.is_compiling() and (self.current is None or not self.current.traced):
            return _call_outside_graphs(hook, self, *args)
        return hook(self, *args)

    def _before_block(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        run, frames = self.current, enclosing_frames()
        if run is None:
            return self._outside_a_pass(frames, args, kwargs)
        if run.grad_enabled and not torch.is_grad_enabled():
            raise CycleError(
                f"the stack {self.path!r} runs without gradients inside a forward with gradients: a reentrant "
                "activation checkpoint encloses it, or torch.no_grad() does. Checkpoint with use_reentrant=False "
                '(Hugging Face: gradient_checkpointing_kwargs={"use_reentrant": False}), '
                'or leave blocks that are frozen that way out of the stack, as in stack="blocks.4:"'
            )
        records = self._remember(frames, run)
        inputs = (args, kwargs) if run.traced else own_containers((args, kwargs))
        run.calls += 1
        if run.first_block is not None:
            run.follow(block, inputs)
            run.inputs = inputs
            return None
        if run.live_draws is not None:
            set_random_state(run.live_draws)
        run.first_block, run.entry, run.inputs = block, inputs, inputs
        if run.look is not None:
            run.look.at([get(run.entry, entry) for entry, _ in run.slots])
        if not run.carried:
            return None
        handover = Handover(self.path, run.slots, run.carried)
        for record in records:
            record.handover = handover
        return handover(args, kwargs)

    def _after_block(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        run = self.current
        if run is None:
            return
        run.leave((args, kwargs), output)
        if run.slots and not run.traced:
            self.known_slots = run.slots

    def _look_between_blocks(
        self, forward: Callable[..., Any], slots: tuple[Slot, ...], args: Any, kwargs: Any
    ) -> None:
        """Once per model: a pass of its own, with gradients, that raises where tokens pass the blocks by."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            raise CycleError(
                f"something happens to the tokens between the blocks of {self.path!r}, which has to be looked at once "
                "outside torch.compile and torch.inference_mode: call the model once on a batch before that"
            )
        devices = {tensor.device for _, tensor in leaves((args, kwargs)) if tensor.is_cuda}
        remembered, self.remembers_stem = self.remembers_stem, False
        # Cycle 1 has updated the running statistics, this pass does not: so it counts as a later one.
        look = Look()
        self.current = looking = Pass(self.path, cycle=1, traced=False, slots=slots, look=look)
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices):
                forward(*args, **kwargs)
        finally:
            look.end()
            self.current, self.remembers_stem = None, remembered
        self.glue_is_known = looking.glued

    # -- inside activation checkpoints ---------------------------------------------------------------------------------

    def _remember(self, frames: list[Frame], run: Pass | None) -> list[FrameRecord]:
        """Note on the enclosing checkpoints what their recomputation will have to repeat."""
        known = [frame.key for frame in frames if frame.key is not None]
        for key in known:
            if key not in self.frames:
                self.frames[key] = FrameRecord(tracks_statistics=run is None or run.cycle == 0)
        return [self.frames[key] for key in known]

    def _recall(self, frames: list[Frame]) -> tuple[Frame, FrameRecord, list[FrameRecord]] | None:
        """The checkpoint that is recomputed with its record, and the records of those that it opens anew inside."""
        for depth, frame in enumerate(frames):
            record = self.frames.get(frame.key) if frame.recomputing else None
            if record is not None:
                opened = [inner.key for inner in frames[:depth] if inner.key not in self.frames]
                for key in opened:
                    self.frames[key] = FrameRecord(record.tracks_statistics)
                return frame, record, [self.frames[key] for key in opened]
        return None

    def _outside_a_pass(self, frames: list[Frame], args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """A block call of `forward_features()` and the like, or the recomputation of a checkpoint in the backward."""
        if not any(frame.recomputing for frame in frames) and not in_backward():
            self._remember(frames, None)
            return None
        recalled = self._recall(frames)
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
        if record.handover is None or record.run is frame.run:
            return None
        record.run = frame.run
        for inner in opened:
            inner.handover = record.handover
        return record.handover(args, kwargs)

    # -- running statistics --------------------------------------------------------------------------------------------

    def before_norm(self, norm: nn.Module, args: Any) -> None:
        """Forward pre-hook: batch statistics in every cycle, running statistics from cycle 1, the deployed one."""
        self._in_graph_or_eager(Reentry._before_norm, norm)

    def _before_norm(self, norm: nn.Module) -> None:
        run, frames = self.current, enclosing_frames()
        if run is not None:
            self._remember(frames, run)
            follows = run.cycle == 0
        else:
            recalled = self._recall(frames)
            follows = recalled is None or recalled[1].tracks_statistics
        setattr(norm, TRACKS, follows)

    def after_norm(self, norm: nn.Module, args: Any, output: Any) -> None:
        """Forward hook that undoes `before_norm`."""
        setattr(norm, TRACKS, True)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


_call_outside_graphs: Callable[..., Any] = _call
