"""Checkpoints are whole or not there, and what was there before a failure still is."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor, nn

from cyclekd.integrations.runs import checkpoints as module
from cyclekd.integrations.runs.checkpoints import Checkpoints, read_progress, save_under_plain_names
from cyclekd.integrations.runs.errors import RunError


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Accelerator]]:
    """Makes accelerators on the CPU, whose state is global."""

    def make(**options: Any) -> Accelerator:
        _forget()
        made = Accelerator(cpu=True, **options)
        save_under_plain_names(made)
        return made

    yield make
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def prepared(accelerator: Callable[..., Accelerator]) -> tuple[Accelerator, nn.Module, Any]:
    return prepare(accelerator())


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def prepare(accelerator: Accelerator, width: int = 3) -> tuple[Accelerator, nn.Module, Any]:
    model = nn.Linear(width, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return accelerator, *accelerator.prepare(model, optimizer)


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, steps: int = 1) -> Tensor:
    """The weights after a few steps."""
    for step in range(steps):
        accelerator.backward((model(torch.ones(1, 3) * (step + 1)) ** 2).sum())
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.unwrap_model(model).weight.detach().clone()


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


# -- saving --------------------------------------------------------------------------------------------------


def test_the_newest_are_kept(prepared: tuple[Any, ...], tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    paths = [checkpoints.save(prepared[0], step, {}) for step in (5, 9, 10, 11)]
    assert checkpoints.complete() == paths[2:]
    assert names(checkpoints) == ["step-00000010", "step-00000011"]
    assert checkpoints.latest() == paths[3]


def test_a_folder_without_checkpoints_has_no_latest(checkpoints: Checkpoints) -> None:
    assert checkpoints.complete() == [] and checkpoints.latest() is None
    checkpoints.sweep()


def test_weights_and_averaged_weights_are_safetensors_under_the_models_own_names(
    prepared: tuple[Any, ...], checkpoints: Checkpoints
) -> None:
    accelerator, model, _ = prepared
    path = checkpoints.save(accelerator, 1, {"note": "here"}, averaged=nn.Linear(3, 2))
    assert load_file(path / "model.safetensors").keys() == {"weight", "bias"}
    assert torch.equal(load_file(path / "model.safetensors")["weight"], model.weight)
    assert load_file(path / "averaged.safetensors").keys() == {"weight", "bias"}
    assert read_progress(path) == {"step": 1, "note": "here"}


# -- failing and being killed --------------------------------------------------------------------------------


def fail_to_save_the_state(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_state(folder: str, **options: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(accelerator, "save_state", save_state)


def fail_to_save_the_averaged_weights(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_file(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", save_file)


def fail_to_reach_the_disk(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    "fail",
    [
        fail_to_save_the_state,
        fail_to_save_the_averaged_weights,
        fail_to_reach_the_disk,
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_removed_and_the_one_before_named(
    prepared: tuple[Any, ...],
    checkpoints: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[..., None],
) -> None:
    accelerator = prepared[0]
    first = checkpoints.save(accelerator, 1, {}, nn.Linear(3, 2))
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    fail(accelerator, monkeypatch)
    wanted = r"checkpoint of step 2 could not be written \(.*No space left.*step-00000001 is complete"
    with pytest.raises(RunError, match=wanted):
        checkpoints.save(accelerator, 2, {}, nn.Linear(3, 2))
    assert names(checkpoints) == [first.name]
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before


def test_where_there_is_no_earlier_checkpoint_the_message_says_so(
    prepared: tuple[Any, ...], checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_save_the_state(prepared[0], monkeypatch)
    with pytest.raises(RunError, match=r"RuntimeError: No space left on device\); there is no earlier one"):
        checkpoints.save(prepared[0], 2, {})
    assert checkpoints.complete() == []


def test_a_folder_that_cannot_be_made_is_told_like_a_full_disk(prepared: tuple[Any, ...], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="checkpoint of step 1 could not be written"):
        Checkpoints(tmp_path / "file").save(prepared[0], 1, {})


def test_a_process_learns_that_another_one_failed(
    prepared: tuple[Any, ...], checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared[0], "reduce", lambda value, how: value + 1)
    with pytest.raises(RunError, match="another process failed"):
        checkpoints.save(prepared[0], 1, {})
    assert checkpoints.complete() == []


class Killed(BaseException):
    pass


def kill(*args: Any, **options: Any) -> None:
    raise Killed


@pytest.mark.parametrize("place", ["save_file", "_flush_to_disk"])
def test_what_was_killed_in_writing_is_no_checkpoint_and_is_swept_away(
    prepared: tuple[Any, ...], checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    first = checkpoints.save(prepared[0], 1, {})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, place, kill)
        checkpoints.save(prepared[0], 2, {}, nn.Linear(3, 2))
    assert len(names(checkpoints)) == 2, "this test kills too early"
    assert checkpoints.latest() == first
    checkpoints.sweep()
    assert names(checkpoints) == [first.name]


def test_what_was_killed_in_removing_is_no_checkpoint_and_is_swept_away(
    prepared: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(prepared[0], 1, {})
    original = shutil.rmtree

    def remove_half(path: Path, **options: Any) -> None:
        if Path(path).exists():
            (Path(path) / "model.safetensors").unlink()
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", remove_half)
        checkpoints.save(prepared[0], 2, {})
    assert shutil.rmtree is original
    assert [path.name for path in checkpoints.complete()] == ["step-00000002"]
    assert len(names(checkpoints)) == 2, "this test kills too early"
    checkpoints.sweep()
    assert names(checkpoints) == ["step-00000002"]


def test_everything_is_on_the_disk_before_it_has_the_name_of_a_checkpoint(
    prepared: tuple[Any, ...], checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, at_rename = set(), []
    monkeypatch.setattr(module, "_sync", lambda path: synced.add(path.name))
    rename = Path.rename

    def noting_rename(self: Path, target: Path) -> Path:
        at_rename.append({path.name for path in self.iterdir()} - synced)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", noting_rename)
    checkpoints.save(prepared[0], 1, {}, nn.Linear(3, 2))
    assert at_rename == [set()]
    assert {"model.safetensors", "averaged.safetensors", "optimizer.bin", "progress.json"} <= synced


# -- loading -------------------------------------------------------------------------------------------------


def test_what_is_loaded_goes_on_like_what_was_saved(
    accelerator: Callable[..., Accelerator], checkpoints: Checkpoints
) -> None:
    first = prepare(accelerator())
    average = nn.Linear(3, 2)
    train(*first, steps=2)
    path = checkpoints.save(first[0], 2, {"metrics": {"top1": 3.5}}, average)
    expected = train(*first, steps=2)  # the momentum counts

    second, averaged = prepare(accelerator()), nn.Linear(3, 2)
    assert checkpoints.load(second[0], path, averaged) == {"step": 2, "metrics": {"top1": 3.5}}
    assert torch.equal(averaged.weight, average.weight)
    assert torch.equal(train(*second, steps=2), expected)


def test_accumulation_starts_anew_after_a_checkpoint(
    accelerator: Callable[..., Accelerator], checkpoints: Checkpoints
) -> None:
    accelerate, model, _ = prepare(accelerator(gradient_accumulation_steps=4))
    for _ in range(3):
        with accelerate.accumulate(model):
            pass
    path = checkpoints.save(accelerate, 1, {})

    accelerate, model, _ = prepare(accelerator(gradient_accumulation_steps=2))
    checkpoints.load(accelerate, path)
    flags = []
    for _ in range(4):
        with accelerate.accumulate(model):
            flags.append(accelerate.sync_gradients)
    assert flags == [False, True, False, True]


def test_the_checkpoint_of_another_model_is_refused_by_its_path(
    accelerator: Callable[..., Accelerator], checkpoints: Checkpoints
) -> None:
    path = checkpoints.save(prepare(accelerator())[0], 1, {})
    with pytest.raises(RunError, match=r"(?s)step-00000001 does not fit this model or is damaged .*size mismatch"):
        checkpoints.load(prepare(accelerator(), width=4)[0], path)


def test_a_checkpoint_without_averaged_weights_is_refused_where_they_are_needed(
    prepared: tuple[Any, ...], checkpoints: Checkpoints
) -> None:
    path = checkpoints.save(prepared[0], 1, {})
    with pytest.raises(RunError, match=r"step-00000001 does not fit.*averaged\.safetensors"):
        checkpoints.load(prepared[0], path, nn.Linear(3, 2))


@pytest.mark.parametrize("name", ["model.safetensors", "averaged.safetensors", "optimizer.bin", "progress.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named(
    prepared: tuple[Any, ...], checkpoints: Checkpoints, name: str, damage: str
) -> None:
    train(*prepared)
    path = checkpoints.save(prepared[0], 1, {"metrics": {}}, nn.Linear(3, 2))
    if damage == "cut":
        os.truncate(path / name, (path / name).stat().st_size // 2)
    else:
        (path / name).unlink()
    with pytest.raises(RunError, match=r"step-00000001"):
        checkpoints.load(prepared[0], path, nn.Linear(3, 2))


def test_progress_is_json_that_anyone_can_read(prepared: tuple[Any, ...], checkpoints: Checkpoints) -> None:
    path = checkpoints.save(prepared[0], 7, {"best": {"top1_1": 50.0}})
    assert json.loads((path / "progress.json").read_text()) == {"step": 7, "best": {"top1_1": 50.0}}
