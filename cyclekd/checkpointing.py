"""Which activation-checkpoint frame encloses the code that is running now.

A non-reentrant `torch.utils.checkpoint` runs its function once in the forward and again in the backward, where nothing
in the arguments says to which pass the second run belongs. PyTorch keeps that in a frame object, reachable only through
the saved-tensor hooks that are on top; they are private, so everything that touches them stands here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

_top_hooks = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)
_graph_task = getattr(torch._C, "_current_graph_task_id", None)

FRAMES_ARE_VISIBLE = _top_hooks is not None
"""False before PyTorch 2.8: a checkpoint around the stack is then refused in the backward."""


class Frame(NamedTuple):
    """One run of a checkpointed function: `key` stays the same in recomputation, `run` is of this run alone."""

    key: Any
    run: Any
    recomputing: bool


def enclosing_frame() -> Frame | None:
    """The innermost checkpoint that is running, or None."""
    if torch.compiler.is_compiling() or _top_hooks is None:
        return None
    hooks = _top_hooks(True)
    if hooks is None:
        return None
    pack = hooks[0]
    cells = _closure(pack)
    if "target_frame_ref" in cells:
        return Frame(cells["target_frame_ref"](), pack, True)
    if "frame" in cells:
        return Frame(cells["frame"], pack, False)
    return None


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread; True as well where this PyTorch does not tell."""
    return not torch.compiler.is_compiling() and (_graph_task is None or _graph_task() != -1)


def _closure(function: Any) -> dict[str, Any]:
    while hasattr(function, "__wrapped__"):  # torch 2.9 and later decorate the hook of the recomputation
        function = function.__wrapped__
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or not cells:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
