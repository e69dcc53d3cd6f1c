"""Wrapping a model in place and back: its class becomes a subclass of the same name whose `forward` cycles."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cyclekd.errors import CycleError
from cyclekd.losses import CycleLoss, base_loss
from cyclekd.outputs import CycleOutput
from cyclekd.reentry import Reentry
from cyclekd.stacks import choose_stack, stack_blocks, stem_modules

ModuleT = TypeVar("ModuleT", bound=nn.Module)

STATE = "_cyclekd"
"""The attribute that holds a wrapped model's `Reentry`; a plain object, so it is in no state_dict."""


def wrap_multicycle(
    model: ModuleT,
    cycles: int = 2,
    *,
    inference_cycles: int = 1,
    stack: str | Sequence[str] | None = None,
    example_inputs: Any = None,
    loss: CycleLoss | None = None,
) -> ModuleT:
    """Let `model` send its tokens through its own block stack `cycles` times in training; the same object comes back.

    In training a call returns a `CycleOutput` with the base output and tokens of every cycle (SDPose, CVPR 2024,
    section 3), each equal to the same model with its block list repeated; what the model does between two blocks is not
    done between the last and the first. In evaluation it returns the base model's own output from one pass, or from the
    last of `inference_cycles`. `generate()`, `forward_features()` and other ways in always make one pass. Parameters,
    their names, `state_dict`, `config` and `save_pretrained` stay what they were.

    `stack` is the dotted path of the blocks to cycle, such as "blocks" or "blocks.4:10"; without it `find_stacks`
    chooses, for which some models need `example_inputs` (a tensor, a tuple of arguments or a dict of keyword
    arguments). A list of paths, such as ["encoder.block", "decoder.block"], cycles several stacks in the same passes:
    each starts from the tokens with which it was itself left in the pass before, so that the decoder's second cycle
    reads the encoder's second; `tokens` then holds those of all stacks, in order.

    `loss` makes the objective in `CycleOutput.loss` where the base computes a loss itself, as Hugging Face models do
    when they get labels; the default is `CycleLoss()`.

    Wrap before `accelerator.prepare`, DDP, `torch.compile` and the like. Raises CycleError where a model cannot be
    cycled.
    """
    for name, value in (("cycles", cycles), ("inference_cycles", inference_cycles)):
        _check_count("wrap_multicycle", name, value)
    _check_wrappable(model)
    if loss is not None and not isinstance(loss, CycleLoss):
        raise CycleError(f"wrap_multicycle(loss={loss!r}): give a CycleLoss, such as CycleLoss({loss!r})")
    paths = _stack_paths(model, stack, example_inputs)
    _check_statistics(model)
    _drop_leftover_forward(model)
    model.__dict__[STATE] = Reentry(paths, cycles, inference_cycles, loss or CycleLoss())
    base: Any = type(model)
    model.__class__ = _cycling_class(base)
    sync_hooks(model)
    return model


def unwrap_multicycle(model: ModuleT) -> ModuleT:
    """Remove every trace of `wrap_multicycle` and return the same object with its own class.

    A `forward` that Accelerate has put on the object in the meantime stays, and runs the base model.
    """
    cls: Any = type(model)
    if "_cyclekd_base" not in vars(cls):
        raise CycleError(
            f"{type(model).__name__} is not a wrapped model itself: pass the object that wrap_multicycle returned "
            "(accelerator.unwrap_model(model), ddp.module, compiled._orig_mod; PEFT: after merge_and_unload(); "
            "FSDP2: before fully_shard, or load the gathered state_dict into a new model)"
        )
    state: Reentry = model.__dict__[STATE]
    if state.owes_recomputation():
        raise CycleError(
            f"{cls.__name__} cannot be unwrapped while a checkpointed forward waits for its backward, which will run "
            "the blocks of later cycles again: call backward first, or let go of the outputs"
        )
    del model.__dict__[STATE]
    state.remove()
    _drop_leftover_forward(model)
    model.__class__ = cls._cyclekd_base
    return model


def set_cycles(model: nn.Module, cycles: int | None = None, *, inference_cycles: int | None = None) -> None:
    """Change the number of cycles between two steps, for schedules; finds the wrapped model inside DDP and the like."""
    wrapped = find_wrapped(model, "set_cycles")
    state: Reentry = wrapped.__dict__[STATE]
    if cycles is not None:
        _check_count("set_cycles", "cycles", cycles)
        state.cycles = cycles
    if inference_cycles is not None:
        _check_count("set_cycles", "inference_cycles", inference_cycles)
        state.inference_cycles = inference_cycles
    sync_hooks(wrapped)


def run_cycles(model: nn.Module, *args: Any, cycles: int | None = None, **kwargs: Any) -> CycleOutput:
    """Every cycle of one call as a `CycleOutput`, in the mode the model is in and with gradients as they are enabled.

    For evaluation per cycle, figures and ablations; `cycles=None` takes the number set for training. Finds the wrapped
    model inside DDP and the like and calls it directly.
    """
    wrapped = find_wrapped(model, "run_cycles")
    state: Reentry = wrapped.__dict__[STATE]
    if cycles is not None:
        _check_count("run_cycles", "cycles", cycles)
    state.requested = cycles or state.cycles
    sync_hooks(wrapped)
    try:
        output: CycleOutput = wrapped(*args, **kwargs)
    finally:
        state.requested = None
        sync_hooks(wrapped)
    return output


def find_wrapped(model: nn.Module, asked: str) -> nn.Module:
    """The one wrapped model that `model` is or contains."""
    found = [module for module in model.modules() if STATE in module.__dict__]
    if len(found) != 1:
        raise CycleError(
            f"{asked}({type(model).__name__}) needs one model wrapped by wrap_multicycle and found {len(found)}: "
            "call wrap_multicycle(model) first, or pass the wrapped part itself"
        )
    return found[0]


# -- the subclass ------------------------------------------------------------------------------------------------------


@functools.cache
def _cycling_class(base: Any) -> Any:
    """The subclass of `base` that cycles; one per base, so that copies of a model are of one class."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: Reentry | None = self.__dict__.get(STATE)
        if state is None:  # unwrapped, and reached through a forward that Accelerate kept
            return base.forward(self, *args, **kwargs)
        return _forward(self, state, functools.partial(base.forward, self), args, kwargs)

    # Trainer and generate() read the signature. Not functools.wraps: Accelerate takes its own wrapper off by following
    # __wrapped__ to the end, and would arrive at the base, which then trains without cycles.
    forward.__doc__ = base.forward.__doc__
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        base.train(self, mode)
        sync_hooks(self)
        return self

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # type(model)(config) and from_pretrained make a model of their own, which is not wrapped.
        return base(*args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        for method in ("__reduce__", "__reduce_ex__"):
            if getattr(base, method) is not getattr(object, method):
                raise CycleError(_uncopyable(base, method))
        # Python 3.10 has no default.
        state = base.__getstate__(self) if hasattr(base, "__getstate__") else self.__dict__
        if not isinstance(state, dict) or STATE not in state:
            raise CycleError(_uncopyable(base, "__getstate__"))
        return _new_wrapped, (base,), state

    def deepcopy(self: nn.Module, memo: Any) -> Any:
        raise CycleError(_uncopyable(base, "__deepcopy__"))

    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__new__": new,
        "__reduce_ex__": reduce,  # pickle and deepcopy: the class itself stands in no module
        "_cyclekd_base": base,
        "forward": forward,
        "train": train,
    }
    if hasattr(base, "generate"):
        members["generate"] = _single_pass(base.generate)
    if hasattr(base, "__deepcopy__"):
        members["__deepcopy__"] = deepcopy
    try:
        return type(base.__name__, (base,), members)
    except TypeError as error:
        raise CycleError(
            f"{base.__name__} allows no subclass of itself ({error}), which wrapping in place needs: wrap a module "
            "that holds it, with a forward that calls it"
        ) from error


def _new_wrapped(base: Any) -> Any:
    return object.__new__(_cycling_class(base))


def _uncopyable(base: Any, method: str) -> str:
    return (
        f"{base.__name__} says by its own {method} how it is copied, and that leaves the cycles out: unwrap_multicycle "
        "first, copy, and wrap both"
    )


def _single_pass(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def one_pass(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: Reentry = self.__dict__[STATE]
        if state.inference_cycles > 1:
            raise CycleError(
                f"{type(self).__name__}.{method.__name__}() makes one pass, since a key-value cache belongs to one "
                f"cycle, and inference_cycles is {state.inference_cycles}: call set_cycles(model, inference_cycles=1) "
                "first, or call the model on the whole sequence for every token"
            )
        before, state.single_pass = state.single_pass, True
        try:
            return method(self, *args, **kwargs)
        finally:
            state.single_pass = before

    return one_pass


def _forward(
    model: nn.Module, state: Reentry, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if state.single_pass or state.current is not None:
        return forward(*args, **kwargs)
    all_cycles = model.training or state.requested is not None
    cycles = state.requested or (state.cycles if model.training else state.inference_cycles)
    if not all_cycles and cycles == 1:
        return forward(*args, **kwargs)
    if getattr(model, "_is_replica", False):
        raise CycleError(
            f"{type(model).__name__} runs in several threads under nn.DataParallel, which share one set of hooks: use "
            "DistributedDataParallel (accelerate launch, torchrun), or set CUDA_VISIBLE_DEVICES to one device"
        )
    if not torch.compiler.is_compiling() and not state.stands_on(stack_blocks(model, path) for path in state.paths):
        sync_hooks(model)  # `training` was set by hand, blocks were exchanged, or others put hooks on them
    output = state.run(forward, cycles, args, kwargs, remembers_stem=not _collects_states(model, kwargs))
    if not all_cycles:
        return output.outputs[-1]
    return CycleOutput(_objective(model, state, output, kwargs), output.outputs, output.tokens)


def _collects_states(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether every pass has to run the stem too, since Hugging Face models collect the states of its layers."""
    config = getattr(model, "config", None)
    names = ("output_hidden_states", "output_attentions")
    return any(kwargs.get(name, getattr(config, name, False)) for name in names)


def _objective(model: nn.Module, state: Reentry, output: CycleOutput, kwargs: dict[str, Any]) -> Tensor | None:
    first = output.outputs[0]
    by_convention = isinstance(first, tuple) and not hasattr(first, "loss")  # a leading scalar need not be a loss
    if base_loss(first) is None or (by_convention and kwargs.get("labels") is None):
        return None
    share = _batch_share(model, kwargs)
    total: Tensor = state.loss(output, kwargs.get("labels"), batch_share=share).total
    return total


def _batch_share(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | float:
    """The items of this call over those of the whole accumulated batch, where Hugging Face's Trainer passes them.

    The base divides its loss by `num_items_in_batch`, and the Trainer then leaves out its division by the accumulation
    steps; a mean over this call's tokens has to be scaled to match.
    """
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    if isinstance(kwargs.get("shift_labels"), Tensor):
        labels = kwargs["shift_labels"]
    elif getattr(model, "loss_type", None) in SHIFTING_LOSSES and not _is_encoder_decoder(model):
        labels = labels[..., 1:]  # the first label is predicted by nothing, and the Trainer does not count it
    share: Tensor = labels.ne(-100).sum() / items
    return share


SHIFTING_LOSSES = ("ForCausalLM", "ForConditionalGeneration")
"""Names under which Hugging Face models ask for the loss that compares each token with the next label."""


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


# -- hooks follow the mode ---------------------------------------------------------------------------------------------


def sync_hooks(model: nn.Module) -> None:
    """Hooks stand on the blocks in training or where several cycles were asked for, and nowhere otherwise.

    They are put on anew at every call of `train()`, since modules may have been exchanged since (SyncBatchNorm, PEFT).
    """
    state: Reentry | None = model.__dict__.get(STATE)
    if state is None:
        return
    several = state.inference_cycles > 1 or state.requested is not None
    wanted = model.training or several or state.owes_recomputation()
    state.remove()
    if wanted:
        blocks = [stack_blocks(model, path) for path in state.paths]
        state.install(blocks, stem_modules(model, state.paths), _batch_norms(model))


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    batch_norm = torch.nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, batch_norm) and m.track_running_stats]


# -- refusals ----------------------------------------------------------------------------------------------------------

WRAPPERS = {
    "DataParallel": "use DistributedDataParallel, and wrap first",
    "DistributedDataParallel": "wrap first, then DistributedDataParallel(model)",
    "FullyShardedDataParallel": "wrap first, then FullyShardedDataParallel(model)",
    "DeepSpeedEngine": "wrap first, then deepspeed.initialize(model=model)",
    "OptimizedModule": "wrap first, then torch.compile(model)",
}


def _check_count(function: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CycleError(f"{function}({name}={value!r}): {name} is a whole number of at least 1 (1 is the plain model)")


def _check_wrappable(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise CycleError(f"wrap_multicycle wraps a torch.nn.Module and got {name}: pass the model object itself")
    if name in WRAPPERS:
        raise CycleError(f"wrap_multicycle got {name}, which hides the model: {WRAPPERS[name]}")
    if isinstance(model, torch.jit.ScriptModule):
        raise CycleError(f"{name} is a TorchScript module, whose forward is fixed: wrap the Python model instead")
    wrapped = [path or name for path, module in model.named_modules() if STATE in module.__dict__]
    if wrapped:
        raise CycleError(
            f"{name} is wrapped already, at {', '.join(map(repr, wrapped))}: change the cycles with "
            "set_cycles(model, n), or call unwrap_multicycle on it first"
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise CycleError(f"{name} was compiled by model.compile(): wrap first, then compile")
    if "forward" in model.__dict__ and not _has_leftover_forward(model):
        raise CycleError(
            f"{name} carries a forward on the object itself, put there by accelerator.prepare, device_map or the "
            "like; it would hide the cycles. Wrap before accelerator.prepare, or take it off with "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )


def _has_leftover_forward(model: nn.Module) -> bool:
    """Whether the forward on the object is its class's own: Accelerate leaves that when it takes its wrapper off."""
    own = getattr(model.__dict__.get("forward"), "__func__", None)
    return own in (type(model).forward, inspect.unwrap(type(model).forward))


def _drop_leftover_forward(model: nn.Module) -> None:
    if _has_leftover_forward(model):
        del model.forward


def _stack_paths(model: nn.Module, stack: str | Sequence[str] | None, example_inputs: Any) -> list[str]:
    """The paths of the stacks to cycle, each of which leads to blocks, and no two to the same."""
    if stack is None:
        return [choose_stack(model, example_inputs)]
    paths: list[Any] = list(stack) if isinstance(stack, (list, tuple)) else [stack]
    if not paths or not all(isinstance(path, str) for path in paths):
        raise CycleError(f'wrap_multicycle(stack={stack!r}): give a path such as "blocks", or a list of paths')
    inside = [{part for block in stack_blocks(model, path) for part in block.modules()} for path in paths]
    for (path, parts), (other, others) in combinations(zip(paths, inside, strict=True), 2):
        if parts & others:
            raise CycleError(f"wrap_multicycle(stack=[...]): {path!r} and {other!r} have blocks in common: name one")
    return paths


def _check_statistics(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise CycleError(
                f"{path!r} ({type(module).__name__}) keeps running statistics, which every cycle would change while "
                "one cycle is deployed: build it with track_running_stats=False, or use batch norm, where this is "
                "handled"
            )
