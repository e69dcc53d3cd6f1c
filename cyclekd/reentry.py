"""Several passes of one forward: from the second on, the stack starts from the tokens with which the last pass left it.

Nothing is recorded and replayed: every pass is the model's own forward, so labels, masks, losses and whatever stands
between the blocks stay its own business. Hooks on the blocks hand the tokens over; modules before the stack give their
first-pass output again instead of being run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cyclekd.caches import calls_with_own_caches
from cyclekd.checkpointing import Frame, enclosing_frames
from cyclekd.errors import CycleError
from cyclekd.looking import Look, reaches
from cyclekd.outputs import CycleOutput
from cyclekd.passes import Pass, Visit, tokens_left
from cyclekd.randomness import RandomState, random_state, set_random_state
from cyclekd.slots import Handover, Slot
from cyclekd.stack_hooks import StackHooks
from cyclekd.stem import StemCall
from cyclekd.structure import get, leaves, own_containers

TRACKS = "track_running_stats"

DRAWS_BEFORE_REFUSAL = 10
"""How often a pass is drawn when LayerDrop leaves out every block; at rate 0.5 and 3 blocks 1 pass in 8 is empty."""


@dataclass
class Carried:
    """What one stack hands from cycle to cycle."""

    slots: tuple[Slot, ...] = ()
    moved: tuple[Slot, ...] = ()  # those whose tensors the blocks change: the tokens
    tensors: tuple[Tensor, ...] = ()  # as they left the stack in the cycle before, one for each slot

    def tokens(self) -> list[Tensor]:
        """The tensors that are tokens; once each, where one enters at several places (query, key and value)."""
        left = {slot[1]: tensor for slot, tensor in zip(self.slots, self.tensors, strict=True) if slot in self.moved}
        return list(left.values())


@dataclass
class FrameRecord:
    """What a checkpoint frame has to repeat when it is recomputed; by path of the stack."""

    tracks_statistics: bool
    handovers: dict[str, Handover] = field(default_factory=dict)
    runs: dict[str, Any] = field(default_factory=dict)  # the recomputation in which a hand-over was already repeated


class Reentry:
    """The cycles of one model: its settings, the hooks on its blocks, and the pass that is running.

    Lives in the model's `__dict__`, and every hook is a bound method of it or of its parts, so that `deepcopy` and
    `pickle` take it along.
    """

    def __init__(self, paths: Sequence[str], cycles: int, inference_cycles: int, loss: nn.Module) -> None:
        self.stacks = [StackHooks(self, path, index) for index, path in enumerate(paths)]
        self.cycles = cycles
        self.inference_cycles = inference_cycles
        self.loss = loss
        self.requested: int | None = None  # run_cycles: this many cycles, whatever the mode
        self.single_pass = False  # generate(): one pass, whatever the mode
        self.installed = False
        self.handles: list[Any] = []  # of the hooks on norms
        self.stem: list[StemCall] = []
        self.remembers_stem = False
        self.in_stem = False  # a remembered call is running
        self.first_draws: RandomState | None = None  # the random state with which the first pass began
        self.looked_at: set[tuple[bool, ...]] = set()  # the stacks that needed a look, in the looks that were taken
        self.every_stack_counts = len(paths) == 1  # every stack was seen to reach the output in later cycles
        self.current: Pass | None = None
        self.frames: WeakKeyDictionary[Any, FrameRecord] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        alive = [handle for handle in self.handles if handle.hooks_dict_ref() is not None]  # dead ones do not copy
        return {**self.__dict__, "handles": alive, "current": None, "frames": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, frames=WeakKeyDictionary())

    @property
    def paths(self) -> list[str]:
        """Of the stacks that are cycled."""
        return [stack.path for stack in self.stacks]

    # -- hooks, standing only while several cycles or their tokens are wanted ------------------------------------------

    def install(
        self, blocks: Sequence[Sequence[nn.Module]], stem: Sequence[nn.Module], norms: Sequence[nn.Module]
    ) -> None:
        """Put the hooks on; `blocks` are those of each stack, `norms` the modules with running statistics."""
        global _call_outside_graphs
        if _call_outside_graphs is _call:  # not at import, since it loads PyTorch's compiler
            _call_outside_graphs = torch.compiler.disable(_call)  # type: ignore[no-untyped-call]
        self.installed = True
        for stack, own_blocks in zip(self.stacks, blocks, strict=True):
            stack.install(own_blocks)
        for norm in norms:
            self.handles.append(norm.register_forward_pre_hook(self.before_norm))
            self.handles.append(norm.register_forward_hook(self.after_norm, always_call=True))
        known = {call.module: call for call in self.stem}  # torch.compile recompiles for new objects
        free = [module for module in stem if "forward" not in module.__dict__]  # patched by others: just run N times
        self.stem = [known.get(module) or StemCall(self, module) for module in free]
        for call in self.stem:
            call.module.forward = call

    def stands_on(self, blocks: Iterable[Sequence[nn.Module]]) -> bool:
        """Whether the hooks are on the blocks of every stack."""
        return self.installed and all(stack.stands_on(own) for stack, own in zip(self.stacks, blocks, strict=True))

    def owes_recomputation(self) -> bool:
        """Whether a backward is still to come that will run blocks of a later cycle again."""
        return any(record.handovers for record in self.frames.values())

    def remove(self) -> None:
        """Take every hook and patch off again."""
        for stack in self.stacks:
            stack.remove()
        for handle in self.handles:
            handle.remove()
        for call in self.stem:
            if call.module.__dict__.get("forward") is call:
                del call.module.forward
        self.installed, self.handles = False, []

    # -- the passes --------------------------------------------------------------------------------------------------

    def run(
        self, forward: Callable[..., Any], cycles: int, args: Any, kwargs: Any, remembers_stem: bool = True
    ) -> CycleOutput:
        """All cycles of one call, without the objective."""
        calls = calls_with_own_caches(args, kwargs, cycles)
        traced = torch.compiler.is_compiling()
        outputs, tokens = [], []
        carried = [Carried() for _ in self.stacks]
        self.remembers_stem = cycles > 1 and remembers_stem
        try:
            for cycle, (pass_args, pass_kwargs) in enumerate(calls[:cycles]):
                if cycles > 1 and not traced:
                    pass_args, pass_kwargs = own_containers(pass_args), own_containers(pass_kwargs)
                output, done = self.run_pass(forward, cycle, carried, pass_args, pass_kwargs)
                carried = self._carry_on(carried, done)
                if cycles > 1 and self._has_to_look(done):
                    self._look(forward, carried, *own_containers(calls[cycles]))
                outputs.append(output if cycles == 1 or traced else own_containers(output))
                left = tuple(tensor for each in carried for tensor in each.tokens())
                tokens.append(left[0] if len(left) == 1 else left)
        finally:
            self.remembers_stem = False
            for call in self.stem:
                call.kept.clear()
        return CycleOutput(None, tuple(outputs), tuple(tokens))

    def run_pass(
        self, forward: Callable[..., Any], cycle: int, carried: Sequence[Carried], args: Any, kwargs: Any
    ) -> tuple[Any, Pass]:
        """One base forward; drawn again where LayerDrop left out every block, since no token would have moved."""
        for _ in range(DRAWS_BEFORE_REFUSAL):
            traced = torch.compiler.is_compiling()
            visits = tuple(
                Visit(stack.path, traced, each.slots, each.tensors)
                for stack, each in zip(self.stacks, carried, strict=True)
            )
            self.current = Pass(cycle, traced, visits, torch.is_grad_enabled())
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
            if all(visit.first_block is not None for visit in done.visits):
                return output, done
        idle = next(visit.path for visit in done.visits if visit.first_block is None)
        raise CycleError(
            f"no block of the stack {idle!r} was called by the forward: it is not the stack that these inputs "
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

    def _carry_on(self, before: Sequence[Carried], done: Pass) -> list[Carried]:
        """What left the stacks in this pass, and enters them in the next; what is carried is learned in the first."""
        carried = []
        for stack, visit, each in zip(self.stacks, done.visits, before, strict=True):
            slots, moved = each.slots, each.moved
            if done.cycle == 0:
                slots = visit.slots or stack.known_slots or visit.slots_seen_by_shape()
                moved = visit.moved or slots
            carried.append(Carried(slots, moved, tokens_left(visit, slots)))
        return carried

    # -- one look at what cannot be told from block calls --------------------------------------------------------------

    def _has_to_look(self, done: Pass) -> bool:
        return not self.every_stack_counts or (_needs(done) not in self.looked_at and any(_needs(done)))

    def _look(self, forward: Callable[..., Any], carried: Sequence[Carried], args: Any, kwargs: Any) -> None:
        """Once per model: a pass of its own, with gradients, that raises where tokens pass the blocks by."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            raise CycleError(
                f"{self._unseen()}, which has to be looked at once outside torch.compile and torch.inference_mode: "
                "call the model once on a batch before that"
            )
        devices = {tensor.device for _, tensor in leaves((args, kwargs)) if tensor.is_cuda}
        remembered, self.remembers_stem = self.remembers_stem, False
        several = len(self.stacks) > 1
        visits = tuple(
            Visit(stack.path, False, each.slots, _cut_off(each.tensors) if several else (), Look(stack.path))
            for stack, each in zip(self.stacks, carried, strict=True)
        )
        # Cycle 1 has updated the running statistics, this pass does not: so it counts as a later one.
        self.current = looking = Pass(1, False, visits)
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices):
                output = forward(*args, **kwargs)
        except RuntimeError as error:
            if "leaf Variable" not in str(error):
                raise
            raise CycleError(
                f"a block of {self.paths} writes in place on its input, which comes from a frozen stem, so that it "
                "cannot be looked at what happens between the blocks: write x = x + y there instead of x += y"
            ) from error
        finally:
            for visit in visits:
                visit.look.end()  # type: ignore[union-attr]
            self.current, self.remembers_stem = None, remembered
        for visit in visits if several else ():
            _check_that_it_counts(visit, output)
        self.every_stack_counts = True
        self.looked_at.add(_needs(looking))

    def _unseen(self) -> str:
        if not self.every_stack_counts:
            return f"the stacks {self.paths} are cycled together, and whether each of them reaches the output is"
        return f"something happens to the tokens between the blocks of {self.paths[0]!r}"

    # -- inside activation checkpoints ---------------------------------------------------------------------------------

    def remember(self, frames: list[Frame], run: Pass | None) -> list[FrameRecord]:
        """Note on the enclosing checkpoints what their recomputation will have to repeat."""
        known = [frame.key for frame in frames if frame.key is not None]
        for key in known:
            if key not in self.frames:
                self.frames[key] = FrameRecord(tracks_statistics=run is None or run.cycle == 0)
        return [self.frames[key] for key in known]

    def recall(self, frames: list[Frame]) -> tuple[Frame, FrameRecord, list[FrameRecord]] | None:
        """The checkpoint that is recomputed with its record, and the records of those that it opens anew inside."""
        for depth, frame in enumerate(frames):
            record = self.frames.get(frame.key) if frame.recomputing else None
            if record is not None:
                opened = [inner.key for inner in frames[:depth] if inner.key not in self.frames]
                for key in opened:
                    self.frames[key] = FrameRecord(record.tracks_statistics)
                return frame, record, [self.frames[key] for key in opened]
        return None

    # -- running statistics --------------------------------------------------------------------------------------------

    def before_norm(self, norm: nn.Module, args: Any) -> None:
        """Forward pre-hook: batch statistics in every cycle, running statistics from cycle 1, the deployed one."""
        self.in_graph_or_eager(self._before_norm, norm)

    def _before_norm(self, norm: nn.Module) -> None:
        run, frames = self.current, enclosing_frames()
        if run is not None:
            self.remember(frames, run)
            follows = run.cycle == 0
        else:
            recalled = self.recall(frames)
            follows = recalled is None or recalled[1].tracks_statistics
        setattr(norm, TRACKS, follows)

    def after_norm(self, norm: nn.Module, args: Any, output: Any) -> None:
        """Forward hook that undoes `before_norm`."""
        setattr(norm, TRACKS, True)

    # -- under torch.compile -------------------------------------------------------------------------------------------

    def in_graph_or_eager(self, hook: Callable[..., Any], *args: Any) -> Any:
        """Run a hook as part of a graph of the whole forward, or outside of graphs.

        In a graph of a part (a block that is compiled by itself, what is left after a graph break) neither the pass nor
        the checkpoint that is running could be told: what was true while compiling would be taken for true ever after.
        """
        if torch.compiler.is_compiling() and (self.current is None or not self.current.traced):
            return _call_outside_graphs(hook, *args)
        return hook(*args)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


_call_outside_graphs: Callable[..., Any] = _call


def _needs(run: Pass) -> tuple[bool, ...]:
    return tuple(visit.needs_look for visit in run.visits)


def _cut_off(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(each.detach().requires_grad_(each.is_floating_point()) for each in tensors)


def _check_that_it_counts(visit: Visit, output: Any) -> None:
    if not reaches([get(visit.left, exit_) for _, exit_ in visit.slots], output):
        raise CycleError(
            f"what leaves the stack {visit.path!r} in a later cycle is not seen to reach the output, other than "
            "through the entry of another stack, where a cycle puts that stack's own tokens: cycling both would leave "
            f"its later cycles without effect. Cycle one of them, as in stack={visit.path!r}"
        )
