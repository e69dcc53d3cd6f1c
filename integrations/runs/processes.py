"""What one process does for all, and what all do at once, so that nobody waits for one that failed.

What went wrong is then raised by all of them, and said once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import nn

from cyclekd import CycleError
from cyclekd.integrations.runs.errors import RunError

T = TypeVar("T")
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
CAUSED = (RunError, CycleError, OSError)
"""What a user can put right."""


def on_main_process(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What `function` returns on the main process, which alone calls it; on every process.

    Errors: RunError on every process where it raised one of `CAUSED`.
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

    For caches: the first fills them, the others find them. Errors: RunError on every process where one raised one of
    `CAUSED`.
    """
    value, problem = _attempt(function) if accelerator.is_local_main_process else (None, None)
    _raise_first(problem)
    if not accelerator.is_local_main_process:
        value, problem = _attempt(function)
    _raise_first(problem)
    return value


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block that every process runs, and after which none goes on where one cannot; there has to be an Accelerator.

    Nothing in it may wait for another process, which may have failed. Errors: RunError on every process where one
    raised one of `CAUSED`.
    """
    problem = None
    try:
        yield
    except CAUSED as error:
        problem = str(error)
    _raise_first(problem)


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
    except CAUSED as error:
        return None, str(error)


def _raise_first(problem: str | None) -> None:
    """On every process the problem of the first that has one; the main one, which says it, tells whose it is."""
    for rank, each in enumerate(gather_object([problem])):
        if each is not None:
            raise RunError(each if rank == 0 else f"process {rank}: {each}", shared=True)
