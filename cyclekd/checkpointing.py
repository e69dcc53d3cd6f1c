"""Which activation-checkpoint frames enclose the code that is running now.

A non-reentrant `torch.utils.checkpoint` runs its function once in the forward and again in the backward, where nothing
in the arguments says to which pass the second run belongs. PyTorch keeps that in a frame object, reachable only through
the saved-tensor hooks that are on; they are private, so everything that touches them stands here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

_autograd = getattr(torch._C, "_autograd", None)
_top_hooks: Any = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
_push_hooks: Any = getattr(_autograd, "_push_saved_tensors_default_hooks", None)
_pop_hooks: Any = getattr(_autograd, "_pop_saved_tensors_default_hooks", None)
_graph_task: Any = getattr(torch._C, "_current_graph_task_id", None)

FRAMES_ARE_VISIBLE = _top_hooks is not None and _push_hooks is not None and _pop_hooks is not None
"""False before PyTorch 2.8: a checkpoint around the stack is then refused in the backward."""


class Frame(NamedTuple):
    """One run of a checkpointed function: `key` stays the same in recomputation, `run` is of this run alone."""

    key: Any
    run: Any
    recomputing: bool


def enclosing_frames() -> list[Frame]:
    """The checkpoints that are running, the innermost first."""
    if torch.compiler.is_compiling() or not FRAMES_ARE_VISIBLE or _top_hooks(True) is None:
        return []
    taken: list[Any] = []
    try:
        while (hooks := _top_hooks(True)) is not None:
            taken.append(hooks)
            _pop_hooks()
    finally:
        for hooks in reversed(taken):
            _push_hooks(*hooks)
    return [frame for frame in map(_as_frame, taken) if frame is not None]


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread; True as well where this PyTorch does not tell."""
    return not torch.compiler.is_compiling() and (_graph_task is None or _graph_task() != -1)


def _as_frame(hooks: tuple[Any, Any]) -> Frame | None:
    pack = hooks[0]
    cells = _closure(pack)
    if "target_frame_ref" in cells:
        return Frame(cells["target_frame_ref"](), pack, True)
    if "frame" in cells:
        return Frame(cells["frame"], pack, False)
    return None  # somebody's own hooks, such as save_on_cpu


def _closure(function: Any) -> dict[str, Any]:
    while hasattr(function, "__wrapped__"):  # torch 2.9 and later decorate the hook of the recomputation
        function = function.__wrapped__
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or not cells:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
