"""What one process does for all, so that nobody waits for one that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import nn

from cyclekd.integrations.runs.errors import RunError

T = TypeVar("T")
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def on_main_process(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What `function` returns on the main process, which alone calls it; on every process.

    Errors: RunError on every process where it raised that, or OSError.
    """
    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        result = list(_attempt(function))
    value, problem = broadcast_object_list(result)
    if problem is not None:
        raise RunError(problem, shared=True)
    return value


def main_process_first(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What `function` returns, called by one process of each machine and then by the others.

    For caches: the first fills them, the others find them. Errors: RunError on every process where one raised it.
    """
    value, problem = _attempt(function) if accelerator.is_local_main_process else (None, None)
    _raise_first(problem)
    if not accelerator.is_local_main_process:
        value, problem = _attempt(function)
    _raise_first(problem)
    return value


def share_buffers(accelerator: Accelerator, *modules: nn.Module) -> None:
    """The main process' buffers on every process.

    In training each process keeps running statistics of its own batches; what is evaluated and saved has to be one
    model. Sharded models are left alone: their shards differ by design.
    """
    if accelerator.num_processes == 1 or accelerator.distributed_type in SHARDED:
        return
    for module in modules:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                torch.distributed.broadcast(buffer, src=0)


def _attempt(function: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return function(), None
    except (RunError, OSError) as error:
        return None, str(error)


def _raise_first(problem: str | None) -> None:
    problems = [each for each in gather_object([problem]) if each is not None]
    if problems:
        raise RunError(problems[0], shared=True)
