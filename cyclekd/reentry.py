"""Several passes of one forward: from the second on, the stack starts from the tokens with which the last pass left it.

Nothing is recorded and replayed: every pass is the model's own forward, so labels, masks, losses and whatever stands
between the blocks stay its own business. Hooks on the blocks hand the tokens over; modules before the stack give their
first-pass output again instead of being run again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cyclekd.checkpointing import Frame, enclosing_frame, in_backward
from cyclekd.errors import CycleError
from cyclekd.outputs import CycleOutput
from cyclekd.structure import Leaf, Path, get, leaves, replace

Slot = tuple[Path, Path]
"""Where a carried tensor enters a block, as a path into (args, kwargs), and where it leaves one, into the result."""

TRACKS = "track_running_stats"

DRAWS_BEFORE_REFUSAL = 10
"""How often a pass is drawn when LayerDrop leaves out every block; at rate 0.5 and 3 blocks 1 pass in 8 is empty."""


@dataclass
class Pass:
    """One run of the base forward."""

    cycle: int
    slots: tuple[Slot, ...] = ()
    carried: tuple[Tensor, ...] = ()  # enters the stack instead of the stem's tokens; empty in the first cycle
    grad_enabled: bool = True
    first_block: nn.Module | None = None
    entry: Any = None  # (args, kwargs) of the first block call
    last: Any = None  # result of the last block call
    versions: list[int] = field(default_factory=list)  # of the tensors in `last`, when they left
    pending: tuple[Slot, ...] = ()  # slots seen at the block call that is running


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
        self.current: Pass | None = None
        self.frames: WeakKeyDictionary[Any, FrameRecord] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "current": None, "frames": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, frames=WeakKeyDictionary())

    # -- hooks, standing only while several cycles or their tokens are wanted ------------------------------------------

    def install(self, blocks: Sequence[nn.Module], stem: Sequence[nn.Module], norms: Sequence[nn.Module]) -> None:
        """Put the hooks on; `norms` are the modules with running statistics."""
        self.installed = True
        for block in dict.fromkeys(blocks):  # a shared block stands in the list several times
            self.handles.append(block.register_forward_pre_hook(self.before_block, with_kwargs=True))
            self.handles.append(block.register_forward_hook(self.after_block, with_kwargs=True))
        for norm in norms:
            self.handles.append(norm.register_forward_pre_hook(self.before_norm))
            self.handles.append(norm.register_forward_hook(self.after_norm, always_call=True))
        for module in stem:
            if "forward" not in module.__dict__:  # one that somebody else has patched just runs N times
                self.stem.append(StemCall(self, module))
                module.forward = self.stem[-1]

    def remove(self) -> None:
        """Take every hook and patch off again."""
        for handle in self.handles:
            handle.remove()
        for call in self.stem:
            if call.module.__dict__.get("forward") is call:
                del call.module.forward
        self.installed, self.handles, self.stem = False, [], []

    # -- the passes --------------------------------------------------------------------------------------------------

    def run(self, forward: Callable[..., Any], cycles: int, args: Any, kwargs: Any) -> CycleOutput:
        """All cycles of one call, without the objective."""
        calls = _calls_with_own_caches(args, kwargs, cycles)
        outputs, tokens = [], []
        slots: tuple[Slot, ...] = ()
        carried: tuple[Tensor, ...] = ()
        self.remembers_stem = cycles > 1
        try:
            for cycle, (pass_args, pass_kwargs) in enumerate(calls):
                output, done = self.run_pass(forward, cycle, slots, carried, pass_args, pass_kwargs)
                slots = done.slots or _slots_by_shape(done)
                carried = _leaving(done, slots)
                outputs.append(output)
                tokens.append(carried[0] if len(carried) == 1 else carried)
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
            self.current = Pass(cycle, slots, carried, torch.is_grad_enabled())
            for call in self.stem:
                call.calls = 0
            try:
                output = forward(*args, **kwargs)
                done = self.current
            finally:
                self.current = None
            if done.first_block is not None:
                return output, done
        raise CycleError(
            f"no block of the stack {self.path!r} was called by the forward: it is not the stack that these inputs "
            "use, or its LayerDrop leaves out every block. Choose another with stack=..., find_stacks(model) lists them"
        )

    def before_block(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Forward pre-hook of every block: hands the carried tokens to the first one that a pass calls."""
        run, frame = self.current, enclosing_frame()
        if run is None:
            return self._outside_a_pass(frame, args, kwargs)
        if run.grad_enabled and not torch.is_grad_enabled():
            raise CycleError(
                f"the stack {self.path!r} runs without gradients inside a forward with gradients: a reentrant "
                "activation checkpoint encloses it, or torch.no_grad() does. Use use_reentrant=False (Hugging Face: "
                'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})), '
                "or do not wrap a frozen stack"
            )
        record = self._remember(frame, run)
        if run.first_block is not None:
            self._follow(run, block, args, kwargs)
            return None
        run.first_block, run.entry = block, (args, kwargs)
        if not run.carried:
            return None
        handover = Handover(self.path, run.slots, run.carried)
        if record is not None:
            record.handover = handover
        return handover(args, kwargs)

    def after_block(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of every block: keeps what left last, and from one call to the next what is carried."""
        run = self.current
        if run is None:
            return
        run.last, run.versions = output, _versions(output)
        if run.pending and not run.slots:
            # A tensor that the block hands through untouched (T5's position bias) is no token. Blocks that write in
            # place return their input too; then nothing is left over and all of it is carried.
            moved = [(i, o) for i, o in run.pending if get(output, o) is not get((args, kwargs), i)]
            run.slots = tuple(moved) or run.pending
        if torch.compiler.is_compiling():
            # Versions cannot be compared in a compiled graph; copies that nothing overwrites cost nothing there.
            run.last = _copied(output)

    def _follow(self, run: Pass, block: nn.Module, args: Any, kwargs: Any) -> None:
        """A block call after the first: learn which tensors are handed on, refuse a second way into the stack."""
        handed_on = _slots_by_identity(run.last, (args, kwargs))
        if block is run.first_block and not handed_on:
            raise CycleError(
                f"the stack {self.path!r} is entered more than once in one forward, so that it is not defined which "
                "entry a cycle replaces: wrap the module that owns it and is called once per forward, or choose "
                "another stack=..."
            )
        run.pending = handed_on if not run.slots else ()

    # -- inside activation checkpoints ---------------------------------------------------------------------------------

    def _remember(self, frame: Frame | None, run: Pass | None) -> FrameRecord | None:
        """Note on the enclosing checkpoint what its recomputation will have to repeat."""
        if frame is None or frame.key is None:
            return None
        if frame.key not in self.frames:
            self.frames[frame.key] = FrameRecord(tracks_statistics=run is None or run.cycle == 0)
        return self.frames[frame.key]

    def _outside_a_pass(self, frame: Frame | None, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """A block call of `forward_features()` and the like, or the recomputation of a checkpoint in the backward."""
        if not (frame is not None and frame.recomputing) and not in_backward():
            self._remember(frame, None)
            return None
        record = self.frames.get(frame.key) if frame is not None else None
        if frame is None or record is None:
            raise CycleError(
                f"a block of the stack {self.path!r} is recomputed in the backward, and the activation checkpoint "
                "around it is not known: it is nested in another checkpoint, or is of another kind than "
                "torch.utils.checkpoint(use_reentrant=False). Checkpoint the blocks one by one, once"
            )
        if record.handover is None or record.run is frame.run:
            return None
        record.run = frame.run
        return record.handover(args, kwargs)

    # -- running statistics --------------------------------------------------------------------------------------------

    def before_norm(self, norm: nn.Module, args: Any) -> None:
        """Forward pre-hook: batch statistics in every cycle, running statistics from cycle 1, the deployed one."""
        run, frame = self.current, enclosing_frame()
        if run is not None:
            self._remember(frame, run)
            follows = run.cycle == 0
        else:
            record = self.frames.get(frame.key) if frame is not None and frame.recomputing else None
            follows = record is None or record.tracks_statistics
        setattr(norm, TRACKS, follows)

    def after_norm(self, norm: nn.Module, args: Any, output: Any) -> None:
        """Forward hook that undoes `before_norm`."""
        setattr(norm, TRACKS, True)


class Handover:
    """Puts the carried tokens where the stem's would enter the first block."""

    def __init__(self, path: str, slots: tuple[Slot, ...], carried: tuple[Tensor, ...]) -> None:
        self.path, self.slots, self.carried = path, slots, carried

    def __call__(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        inputs: tuple[Any, Any] = (args, kwargs)
        for (entry, _), tokens in zip(self.slots, self.carried, strict=True):
            replaced = get(inputs, entry)
            if isinstance(replaced, Tensor) and not _fits(tokens, replaced):
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
        # Inside a checkpoint the recomputation would miss what a remembered output saved itself from computing.
        if run is None or run.first_block is not None or not self.reentry.remembers_stem or enclosing_frame():
            return self.run(args, kwargs)
        call, self.calls = self.calls, self.calls + 1
        if run.cycle > 0 and call < len(self.kept) and self.kept[call].usable():
            return self.kept[call].output()
        output = self.run(args, kwargs)
        if run.cycle == 0:
            # LayerDrop may have the first pass drawn again: what the last draw returned counts.
            self.kept[call:] = [Kept(output)]
        return output

    def run(self, args: Any, kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


class Kept:
    """A stem output to give again, unless it holds more than tensors or was written on since."""

    def __init__(self, output: Any) -> None:
        # In a compiled graph versions cannot be compared, and copies that nothing overwrites cost nothing.
        self.value = _copied(output) if torch.compiler.is_compiling() else output
        self.versions = _versions(output)

    def usable(self) -> bool:
        return _only_tensors(self.value) and (torch.compiler.is_compiling() or self.versions == _versions(self.value))

    def output(self) -> Any:
        return _copied(self.value) if torch.compiler.is_compiling() else self.value


def _slots_by_identity(result: Any, inputs: Any) -> tuple[Slot, ...]:
    """Tensors of one block's result that are, as the same objects, inputs of the next block."""
    left = leaves(result)
    slots = []
    for entry, tensor in leaves(inputs):
        for exit_, handed in left:
            if handed is tensor:
                slots.append((entry, exit_))
                break
    return tuple(slots)


def _slots_by_shape(run: Pass) -> tuple[Slot, ...]:
    """Where something happens to the tokens between the blocks: the leading tensors that agree in order and shape."""
    slots: list[Slot] = []
    for (entry, before), (exit_, after) in zip(_floating(run.entry), _floating(run.last), strict=False):
        # Only the first may leave with fewer tokens: a mask or an attention map behind it must not pass for tokens.
        if before.shape != after.shape and (slots or not _fits(after, before)):
            break
        slots.append((entry, exit_))
    return tuple(slots)


def _leaving(run: Pass, slots: tuple[Slot, ...]) -> tuple[Tensor, ...]:
    """The carried tensors as they left the stack, one for each slot."""
    found = [get(run.last, exit_) for _, exit_ in slots]
    tokens = tuple(each for each in found if isinstance(each, Tensor))
    if not slots or len(tokens) != len(found):
        raise CycleError(_no_tokens(run))
    if run.versions != _versions(run.last):
        raise CycleError(
            f"something after {type(run.first_block).__name__}'s stack wrote in place on the tokens that left it, so "
            "that they are no longer what the next cycle starts from: write x = x + y there instead of x += y"
        )
    return tokens


def _no_tokens(run: Pass) -> str:
    name = type(run.first_block).__name__
    entered = [tuple(t.shape) for _, t in leaves(run.entry)]
    left = [tuple(t.shape) for _, t in leaves(run.last)]
    if not left:
        return (
            f"{name} returned {type(run.last).__name__}, in which no tensor was found: blocks of a stack return a "
            "tensor, or a tuple, list or dict of tensors. Choose another stack=..., or let the block return its tokens"
        )
    return (
        f"no tensor that enters {name} ({entered}) has the rank and feature width of one that leaves the stack "
        f'({left}), so it cannot be entered again: choose a part that keeps them, as in stack="blocks.4:10"; '
        "find_stacks(model) lists what fits"
    )


def _fits(tokens: Tensor, replaced: Tensor) -> bool:
    """One rank, one kind of number and one feature width, which stands last or, in [B, C, H, W], second."""
    if tokens.ndim != replaced.ndim or tokens.is_floating_point() != replaced.is_floating_point():
        return False
    width_last = tokens.shape[-1] == replaced.shape[-1]
    return width_last or (tokens.ndim == 4 and tokens.shape[1] == replaced.shape[1])


def _floating(value: Any) -> list[Leaf]:
    return [(path, tensor) for path, tensor in leaves(value) if tensor.is_floating_point()]


def _versions(value: Any) -> list[int]:
    if torch.compiler.is_compiling():
        return []
    return [0 if tensor.is_inference() else tensor._version for _, tensor in leaves(value)]


def _copied(value: Any) -> Any:
    for path, tensor in leaves(value):
        value = replace(value, path, tensor.clone())
    return value


def _only_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_only_tensors(item) for item in value.values())
    if isinstance(value, (tuple, list)):
        return all(_only_tensors(item) for item in value)
    return value is None or isinstance(value, (Tensor, int, float, str))


def _calls_with_own_caches(args: Any, kwargs: Any, cycles: int) -> list[tuple[Any, Any]]:
    """The arguments of every pass: an empty cache is copied for each, a filled one refused."""
    named = [*((f"argument {i}", arg) for i, arg in enumerate(args)), *kwargs.items()]
    caches = [(name, value) for name, value in named if _is_cache(name, value)]
    if cycles == 1 or not caches:
        return [(args, kwargs)] * cycles
    for name, cache in caches:
        if _is_filled(cache):
            raise CycleError(
                f"{name} brings a filled cache ({type(cache).__name__}) into {cycles} cycles: the second would "
                "attend to keys of the first. Leave it out and pass use_cache=False; generate() makes one pass in "
                "every mode and takes caches as ever"
            )
    empty = {id(cache): cache for _, cache in caches}
    return [(args, kwargs), *(_with_copies(args, kwargs, empty) for _ in range(cycles - 1))]


def _with_copies(args: Any, kwargs: Any, caches: dict[int, Any]) -> tuple[Any, Any]:
    def own(value: Any) -> Any:
        return copy.deepcopy(value) if id(value) in caches else value

    return tuple(own(arg) for arg in args), {name: own(value) for name, value in kwargs.items()}


CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "past_buckets_states")


def _is_cache(name: str, value: Any) -> bool:
    return value is not None and (name in CACHE_NAMES or hasattr(value, "get_seq_length"))


def _is_filled(cache: Any) -> bool:
    if hasattr(cache, "get_seq_length"):
        return bool(cache.get_seq_length() > 0)
    return not isinstance(cache, (tuple, list)) or len(cache) > 0
