"""From a dataset to batches on the device, one batch ahead of the training."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from cyclekd.integrations.runs.stopping import leave_signals_to_the_parent

Batch = dict[str, Tensor]


def _end_workers() -> None:
    """Before Python waits for them: they leave signals to their parent, so that an error would never end."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or PyTorch reports each as an error of its own
    for process in workers:
        process.kill()
        process.join()


atexit.register(_end_workers)  # runs before multiprocessing's own, which torch has imported by now


def load_batches(dataset: Dataset[Any], batches: Sampler[Any], workers: int, device: torch.device) -> DataLoader[Any]:
    """Loader over `batches`; samples must not depend on the state of a worker, see `seeds.py`."""
    return DataLoader(dataset, batch_sampler=batches, **_options(workers, device))


def load_stream(stream: IterableDataset[Any], batch: int, workers: int, device: torch.device) -> DataLoader[Any]:
    """Loader over what a stream yields, in batches; sharing it out among workers is the stream's business."""
    return DataLoader(stream, batch_size=batch, **_options(workers, device))


def _options(workers: int, device: torch.device) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": leave_signals_to_the_parent,
        "generator": torch.Generator(),  # its own, or every new loader would draw from the training's
    }


def on_device(batches: Iterable[Batch], device: torch.device, stay: tuple[str, ...] = ()) -> Iterator[Batch]:
    """Batches with their tensors on the device, except those named in `stay`.

    On CUDA the next batch is copied by a stream of its own while the current one is computed.
    """
    if device.type != "cuda":
        for batch in batches:
            yield _move(batch, device, stay)
        return
    copying, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copying):
            following = _move(batch, device, stay)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(copying)
        for tensor in following.values():
            if tensor.is_cuda:  # the allocator must not give it away before the training has used it
                tensor.record_stream(torch.cuda.current_stream(device))
        ahead = following
    if ahead is not None:
        yield ahead


def _move(batch: Batch, device: torch.device, stay: tuple[str, ...]) -> Batch:
    return {name: value if name in stay else value.to(device, non_blocking=True) for name, value in batch.items()}
