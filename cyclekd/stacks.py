"""Which run of alike blocks is the stack.

Read off the modules where they leave no choice; otherwise one forward without gradients shows which blocks hand tokens
of one shape to each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from cyclekd.errors import CycleError
from cyclekd.probe import Call, input_candidates, record_calls

HEAVY = 0.25
"""A list of blocks with this share of the largest one's parameters leaves the choice to a forward."""


SLIGHT = 0.02
"""A best candidate below this share of the parameters is hardly what was meant, and has to be named to be cycled."""


@dataclass(frozen=True)
class Stack:
    """A run of blocks that can be cycled."""

    path: str
    """What to pass as `stack=`."""
    blocks: int
    """Block calls in one forward, or the length of the list where no forward was run."""
    share: float
    """Of the model's parameters."""
    shape: tuple[int, ...] | None
    """Of the tokens in the forward that was run."""


class Stacks(list[Stack]):
    """Candidate stacks, best first; printing shows them as a table."""

    def __str__(self) -> str:
        if not self:
            return "no stack found"
        width = max(len("stack"), *(len(stack.path) for stack in self))
        lines = [f"{'stack':{width}}  blocks  share  tokens"]
        for stack in self:
            shape = "x".join(map(str, stack.shape)) if stack.shape else "-"
            lines.append(f"{stack.path:{width}}  {stack.blocks:6}  {stack.share:5.1%}  {shape}")
        return "\n".join(lines)


def find_stacks(model: nn.Module, example_inputs: Any = None) -> Stacks:
    """The stacks that `wrap_multicycle(model, stack=...)` could cycle, best first; the first is what it would choose.

    Ranked by parameters times block calls, so that in a hierarchical model the deep stage comes before the wide one,
    and in an encoder-decoder the decoder before an equally deep encoder. Runs one forward on `example_inputs` (a
    tensor, a tuple of arguments or a dict of keyword arguments), or on inputs built from the model's own description;
    where neither runs, what can be read off the modules is returned, without shapes.
    """
    calls = _probe(model, example_inputs)
    return _called_stacks(model, calls) if calls is not None else _listed_stacks(model)


def choose_stack(model: nn.Module, example_inputs: Any = None) -> str:
    """The path of the stack to cycle; CycleError where there is none, or several that nothing tells apart."""
    name = type(model).__name__
    listed = _listed_stacks(model)
    if example_inputs is None and len(listed) == 1 and _is_alone(model, listed[0]):
        return listed[0].path
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    calls = None if on_meta else _probe(model, example_inputs)
    if calls is None:
        reason = "the model is on the meta device" if on_meta else "no inputs could be built for it"
        way_out = "" if on_meta else "Pass example_inputs=(...) as for model(...), or "
        seen = ", ".join(f"{s.path} ({s.blocks})" for s in listed) or "none whose blocks are alike"
        raise CycleError(
            f"{name} does not show which of its lists of blocks is the stack, and {reason}, so that no forward can "
            f"tell; lists seen: {seen}. {way_out}name the stack: wrap_multicycle(model, stack=...)"
        )
    found = _called_stacks(model, calls)
    if not found:
        raise CycleError(
            f"found no stack in {name}: cycling needs at least two block calls in a row that hand on tokens of one "
            "shape; lists that take turns (attentions[i], ffns[i]) are none. Where there is one, name it: "
            "wrap_multicycle(model, stack=...)"
        )
    best = found[0]
    equals = [s for s in found if _rank(s) >= 0.999 * _rank(best)]
    if len(equals) > 1:
        raise CycleError(
            f"found {len(equals)} equal stacks in {name}: {', '.join(f'{s.path} ({s.blocks})' for s in equals)}. "
            f'Choose one: wrap_multicycle(model, stack="{best.path}")'
        )
    if best.share < SLIGHT:
        raise CycleError(
            f"the largest stack found in {name}, {best.path}, holds {best.share:.1%} of the parameters, so cycling it "
            f'would do little. If it is meant, name it: wrap_multicycle(model, stack="{best.path}")'
        )
    return best.path


def stack_blocks(model: nn.Module, path: str) -> list[nn.Module]:
    """The blocks at a path such as "encoder.layer" or "blocks.4:10", in order."""
    container_path, part = _split_slice(path)
    try:
        container = model.get_submodule(container_path)
    except AttributeError:
        names = [name for name, module in model.named_modules() if name and len(block_list(module)) > 1]
        raise CycleError(
            f"{type(model).__name__} has no module {container_path!r} (from stack={path!r}); its lists of blocks are: "
            f"{', '.join(names[:20]) or 'none'}"
        ) from None
    blocks = block_list(container) or [container]
    chosen = blocks[part]
    if not chosen:
        raise CycleError(f"stack={path!r} selects none of the {len(blocks)} blocks of {container_path!r}")
    return chosen


def stem_modules(model: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """The largest modules outside the stacks that a forward can call: what of them runs before those is the stem."""
    blocks = {block for path in paths for block in stack_blocks(model, path)}
    inside = {module for block in blocks for module in block.modules()}
    return [module for module in _outside(model, blocks) if module not in inside]


def block_list(container: nn.Module) -> list[nn.Module]:
    """The blocks of a list, or of a module whose children all have numbered names; lists within lists are laid flat."""
    children = list(container.named_children())
    if not isinstance(container, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        if len(children) < 2 or not all(re.search(r"\d$", name) for name, _ in children):
            return []
    flat: list[nn.Module] = []
    for _, child in children:
        flat += block_list(child) if isinstance(child, nn.ModuleList) else [child]
    return flat


def _split_slice(path: str) -> tuple[str, slice]:
    container, _, last = path.rpartition(".")
    match = re.fullmatch(r"(\d*):(\d*)", last)
    if match is None:
        return path, slice(None)
    start, stop = (int(number) if number else None for number in match.groups())
    return container, slice(start, stop)


def _outside(module: nn.Module, blocks: set[nn.Module]) -> Iterator[nn.Module]:
    for child in module.children():
        holds_blocks = any(inner in blocks for inner in child.modules())
        if child in blocks:
            continue
        if holds_blocks or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _outside(child, blocks)
        else:
            yield child


# -- read off the modules ----------------------------------------------------------------------------------------------


def _containers(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Every list of modules that have parts of their own; lists of single layers or norms are no stacks."""
    for path, module in model.named_modules():
        blocks = block_list(module)
        if path and blocks and all(_is_substantial(block) for block in blocks):
            yield path, blocks


def _is_substantial(block: nn.Module) -> bool:
    return sum(1 for m in block.modules() if next(m.parameters(recurse=False), None) is not None) > 1


def _listed_stacks(model: nn.Module) -> Stacks:
    total = _parameters([model])
    found = [
        Stack(path, len(blocks), _parameters(blocks) / max(total, 1), None)
        for path, blocks in _containers(model)
        if len(blocks) > 1 and len({_likeness(block) for block in blocks}) == 1
    ]
    return _best_first(found)


def _is_alone(model: nn.Module, stack: Stack) -> bool:
    own = _parameters(stack_blocks(model, stack.path))
    others = [_parameters(blocks) for path, blocks in _containers(model) if path != stack.path]
    return (
        all(other < HEAVY * own for other in others) and stack.share >= SLIGHT and not _lists_beside(model, stack.path)
    )


def _lists_beside(model: nn.Module, path: str) -> list[set[nn.Module]]:
    """Lists of the same owner and length, which may take turns with the one at `path`."""
    owner, _, name = path.rpartition(".")
    siblings = [block_list(child) for n, child in model.get_submodule(owner).named_children() if n != name]
    length = len(block_list(model.get_submodule(path)))
    return [set(blocks) for blocks in siblings if len(blocks) == length and _parameters(blocks)]


def _likeness(block: nn.Module) -> tuple[Any, ...]:
    return type(block), *((name, tuple(p.shape)) for name, p in block.named_parameters())


def _parameters(modules: list[nn.Module]) -> int:
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})


# -- seen in a forward -------------------------------------------------------------------------------------------------


def _probe(model: nn.Module, example_inputs: Any) -> list[Call] | None:
    if example_inputs is not None:
        args, kwargs = _as_call(example_inputs)
        return record_calls(model, args, kwargs)
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    for args, kwargs in input_candidates(model):
        try:
            return record_calls(model, args, kwargs)
        except Exception:  # any model may fail in its own way on an input that is not its own
            continue
    return None


def _as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    raise CycleError(
        f"example_inputs is a {type(example_inputs).__name__}: give a tensor, a tuple of arguments or a dict of "
        "keyword arguments, as for model(...)"
    )


def _called_stacks(model: nn.Module, calls: list[Call]) -> Stacks:
    total = _parameters([model])
    found: list[Stack] = []
    for path, module in model.named_modules():
        blocks = block_list(module)
        if path and blocks and not _takes_turns(model, path, blocks, calls):
            found += _runs(path, blocks, calls, total)
    ranked = _best_first(found)
    return Stacks(s for i, s in enumerate(ranked) if not any(_within(model, s, better) for better in ranked[:i]))


def _runs(path: str, blocks: list[nn.Module], calls: list[Call], total: int) -> Iterator[Stack]:
    """The runs of consecutive calls among `blocks` that keep the shape of their tokens."""
    position = {block: i for i, block in enumerate(blocks) if _is_substantial(block)}
    run: list[Call] = []
    for call in [*(c for c in calls if c.module in position), None]:
        if call is not None and call.shape is not None and (not run or _continues(run[-1], call, position)):
            run.append(call)
            continue
        if len(run) > 1:
            yield _as_stack(path, blocks, run, position, total)
        run = [call] if call is not None and call.shape is not None else []


def _takes_turns(model: nn.Module, path: str, blocks: list[nn.Module], calls: list[Call]) -> bool:
    """Whether a list beside this one is called in every gap between its calls (XLM's attentions[i] and ffns[i]).

    Such blocks are parts of a larger one that nobody wrote down, and what bypasses them would not be carried.
    """
    own = [call for call in calls if call.module in set(blocks)]
    return any(
        all(any(c.module in beside and a.end < c.start < b.start for c in calls) for a, b in pairwise(own))
        for beside in (_lists_beside(model, path) if len(own) > 1 else [])
    )


def _continues(before: Call, call: Call, position: dict[nn.Module, int]) -> bool:
    step = position[call.module] - position[before.module]
    if before.end > call.start or step not in (0, 1) or before.shape != call.shape:
        return False
    if any(left is entered for left in before.outputs for entered in call.inputs):
        return True
    fed_in_parallel = any(a is b for a in before.carried() for b in call.carried())
    return not fed_in_parallel


def _as_stack(path: str, blocks: list[nn.Module], run: list[Call], position: dict[nn.Module, int], total: int) -> Stack:
    first, last = position[run[0].module], position[run[-1].module]
    whole = first == 0 and last == len(blocks) - 1
    share = _parameters(blocks[first : last + 1]) / max(total, 1)
    return Stack(path if whole else f"{path}.{first}:{last + 1}", len(run), share, run[0].shape)


def _within(model: nn.Module, stack: Stack, better: Stack) -> bool:
    inside = {module for block in stack_blocks(model, better.path) for module in block.modules()}
    return all(block in inside for block in stack_blocks(model, stack.path))


def _best_first(stacks: list[Stack]) -> Stacks:
    return Stacks(sorted(stacks, key=lambda s: (_rank(s), ":" not in s.path), reverse=True))


def _rank(stack: Stack) -> float:
    return stack.share * stack.blocks
