"""Checkpoints that are whole or not there: written beside, renamed when complete, the last few kept.

One checkpoint is a folder `step-00001234` with Accelerate's state (weights as safetensors, optimizer, gradient scaler),
the averaged weights if there are any, and `progress.json`; Accelerate adds random states that nothing here needs. What
a killed process left half-written has another name and is swept away at the next start.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cyclekd.integrations.runs.errors import RunError

COMPLETE, PARTIAL = "step-", ".partial-"
UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError)


class Checkpoints:
    """The checkpoints in one folder, the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def complete(self) -> list[Path]:
        """Checkpoints that can be resumed from, oldest first."""
        return sorted(self.folder.glob(f"{COMPLETE}*"))

    def latest(self) -> Path | None:
        found = self.complete()
        return found[-1] if found else None

    def sweep(self) -> None:
        """Remove what was not written to its end, by this run's main process before it starts."""
        for partial in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(partial, ignore_errors=True)

    def save(
        self, accelerator: Accelerator, step: int, progress: Mapping[str, Any], averaged: nn.Module | None = None
    ) -> Path:
        """Write the checkpoint of `step`; every process has to call this. The path of the complete checkpoint.

        Errors: RunError where it could not be written, on a full disk for example; earlier checkpoints are as before.
        """
        partial, complete = self.folder / f"{PARTIAL}{step:08d}", self.folder / f"{COMPLETE}{step:08d}"
        with _all_or_none(accelerator, partial, f"the checkpoint of step {step}", self.latest()):
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with _all_or_none(accelerator, partial, f"the checkpoint of step {step}", self.latest()):
            accelerator.save_state(str(partial), safe_serialization=True)
            if accelerator.is_main_process:
                if averaged is not None:
                    save_file(_contiguous(averaged.state_dict()), partial / "averaged.safetensors")
                (partial / "progress.json").write_text(json.dumps({"step": step, **progress}), encoding="utf-8")
        with _all_or_none(accelerator, partial, f"the checkpoint of step {step}", self.latest()):
            if accelerator.is_main_process:
                _flush_to_disk(partial)
                partial.rename(complete)
                _sync(self.folder)
        if accelerator.is_main_process:
            for old in self.complete()[: -self.keep]:
                _remove(old)
        accelerator.wait_for_everyone()
        return complete

    def load(self, accelerator: Accelerator, path: Path, averaged: nn.Module | None = None) -> dict[str, Any]:
        """Put the state of a checkpoint into what was prepared; the progress that was saved with it."""
        progress = read_progress(path)
        try:
            accelerator.load_state(str(path))
            if averaged is not None:
                averaged.load_state_dict(load_file(path / "averaged.safetensors"))
        except UNREADABLE as error:
            others = [each.name for each in self.complete() if each != path]
            raise RunError(
                f"the checkpoint {path} does not fit this model or is damaged ({type(error).__name__}: {error}). "
                + (f"Delete it to go on from {others[-1]}" if others else "There is no earlier one")
            ) from error
        accelerator.step = 0  # checkpoints lie between optimizer steps: accumulation starts anew
        return progress


def read_progress(path: Path) -> dict[str, Any]:
    """What was saved beside the weights of a checkpoint: at least its `step`. Errors: RunError where it is damaged."""
    try:
        progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        return {**progress, "step": int(progress["step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"the checkpoint {path} is damaged ({type(error).__name__}: {error}). "
            "Delete it to go on from an earlier one"
        ) from error


def save_under_plain_names(accelerator: Accelerator) -> None:
    """Make Accelerate save the model's own keys, so that any number of processes can go on from a checkpoint."""

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        # empty for sharded models, which Accelerate saves by itself
        weights[:] = [accelerator.unwrap_model(model).state_dict() for model, _ in zip(models, weights, strict=False)]

    def load(models: list[nn.Module], folder: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


@contextmanager
def _all_or_none(accelerator: Accelerator, partial: Path, what: str, latest: Path | None) -> Iterator[None]:
    """Nobody waits for a process that failed: all learn of it, the rest is removed, all raise."""
    error = None
    try:
        yield
    except Exception as raised:  # the libraries underneath tell a full disk in many ways
        error = raised
    failed = torch.tensor(int(error is not None), device=accelerator.device)
    if accelerator.reduce(failed, "sum") == 0:
        return
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    reason = f"{type(error).__name__}: {error}" if error is not None else "another process failed"
    kept = f"{latest} is complete and can be resumed from" if latest else "there is no earlier one"
    raise RunError(f"{what} could not be written ({reason}); {kept}", shared=True) from error


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in state.items()}


def _flush_to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    """First its name, then its content: what is killed in between leaves no broken checkpoint behind."""
    doomed = checkpoint.with_name(f"{PARTIAL}{checkpoint.name}")
    with suppress(OSError):  # it is in nobody's way, and the next start sweeps it away
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)
