"""How a run starts, and how it goes on: with the settings it was started with, or not at all."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from torch._utils import ExceptionWrapper

from cyclekd import CycleError
from cyclekd.integrations.runs import arguments as arguments_module
from cyclekd.integrations.runs import processes
from cyclekd.integrations.runs.arguments import (
    FREE_ON_RESUME,
    add_run_arguments,
    make_accelerator,
    rhythm_of,
    workers_of,
)
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.processes import all_or_none, main_process_first, on_main_process
from cyclekd.integrations.runs.start import check_out, open_run, report, run_command
from cyclekd.integrations.runs.training import Rhythm


@pytest.fixture(autouse=True)
def no_state_from_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate's state is global, and `accelerate launch` tells its wishes by environment variables."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    _forget()
    yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def arguments(*given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--clip-grad", type=float)
    parser.add_argument("--lr", type=float, default=0.1)
    add_run_arguments(parser)
    return parser.parse_args([*map(str, given), "--cpu"])


def start(accelerator: Accelerator, *given: object, **settings: object) -> Path:
    args = arguments(*given)
    return open_run(accelerator, args, "model", {**vars(args), "global_batch": 8, **settings}).path


# -- the folder ----------------------------------------------------------------------------------------------


def test_a_run_begins_with_its_settings_and_what_it_runs_on(accelerator: Accelerator, tmp_path: Path) -> None:
    path = start(accelerator, "--out", tmp_path / "run", "--lr", 0.3)
    assert path == tmp_path / "run"
    assert json.loads((path / "config.json").read_text())["lr"] == 0.3
    assert "torch" in json.loads((path / "environment.json").read_text())["packages"]


def test_without_out_the_folder_is_named_after_the_model(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert [start(accelerator) for _ in range(2)] == [Path("runs/model"), Path("runs/model-2")]


def test_a_run_that_is_there_is_not_begun_again(accelerator: Accelerator, tmp_path: Path) -> None:
    start(accelerator, "--out", tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(RunError, match="continue it with --resume"):
        start(accelerator, "--out", tmp_path, "--lr", 7)
    assert (tmp_path / "config.json").read_bytes() == before


def test_resume_has_to_be_told_which_run(accelerator: Accelerator) -> None:
    with pytest.raises(RunError, match="--resume: which run"):
        start(accelerator, "--resume")


def test_resume_starts_where_there_is_no_run(accelerator: Accelerator, tmp_path: Path) -> None:
    """The same command can stand in a job that a cluster starts again and again."""
    given = ["--out", tmp_path / "run", "--resume"]
    assert start(accelerator, *given) == start(accelerator, *given) == tmp_path / "run"


def test_resume_does_not_start_among_other_files(accelerator: Accelerator, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match=r"thesis\.tex, which are no run"):
        start(accelerator, "--out", tmp_path, "--resume")


def test_a_resumed_run_with_other_settings_is_refused_with_what_changed(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    start(accelerator, "--out", tmp_path)
    with pytest.raises(RunError, match=r"other settings: global_batch was 8 and is 16; lr was 0\.1 and is 0\.2\. Give"):
        start(accelerator, "--out", tmp_path, "--resume", "--lr", 0.2, global_batch=16)
    with pytest.raises(RunError, match="seed was 0 and is 3"):
        start(accelerator, "--out", tmp_path, "--resume", "--seed", 3)
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.1


def test_what_arguments_tell_is_refused_before_the_work_that_the_rest_takes(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    start(accelerator, "--out", tmp_path / "run")
    check_out(accelerator, arguments("--out", tmp_path / "run", "--resume", "--workers", 3))
    check_out(accelerator, arguments("--out", tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    for given, message in (
        (["--resume"], "--resume: which run"),
        (["--out", tmp_path / "run"], "continue it with --resume"),
        (["--out", tmp_path / "run", "--resume", "--lr", 0.2], r"lr was 0\.1 and is 0\.2\. Give"),
    ):
        with pytest.raises(RunError, match=message):
            check_out(accelerator, arguments(*given))


@pytest.mark.parametrize("name", sorted(FREE_ON_RESUME - {"out", "resume", "report_to"}))
def test_what_does_not_change_the_result_may_change(accelerator: Accelerator, tmp_path: Path, name: str) -> None:
    start(accelerator, "--out", tmp_path, **{name: "before"})
    assert start(accelerator, "--out", tmp_path, "--resume", **{name: "now"}) == tmp_path


def test_the_global_batch_may_be_shared_out_anew(accelerator: Accelerator, tmp_path: Path) -> None:
    start(accelerator, "--out", tmp_path, "--batch-size", 4, processes=2)
    assert start(accelerator, "--out", tmp_path, "--resume", "--batch-size", 8, processes=1) == tmp_path


def test_trackers_begin_with_the_settings_and_the_name_of_the_run(tmp_path: Path) -> None:
    class Recorder(GeneralTracker):
        name, requires_logging_directory, main_process_only = "recorder", False, True
        begun: dict[str, Any]

        @property
        def tracker(self) -> None: ...

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.begun = values

    recorder = Recorder()
    accelerator = Accelerator(cpu=True, log_with=recorder)
    args = arguments("--out", tmp_path / "run", "--report-to", "recorder")
    open_run(accelerator, args, "model", vars(args))
    assert recorder.begun["lr"] == "0.1"
    assert Path(accelerator.project_dir) == Path(accelerator.logging_dir) == tmp_path / "run"


# -- problems ------------------------------------------------------------------------------------------------


def test_what_the_main_process_finds_is_raised_and_its_value_comes_back(accelerator: Accelerator) -> None:
    def refuse() -> None:
        raise RunError("no such thing")

    assert on_main_process(accelerator, lambda: 5) == 5
    with pytest.raises(RunError, match="no such thing"):
        on_main_process(accelerator, refuse)


@pytest.mark.parametrize("error", [RunError, CycleError, OSError])
def test_what_a_user_can_cause_is_raised_by_all_processes_alike(
    accelerator: Accelerator, error: type[Exception]
) -> None:
    def refuse() -> None:
        raise error("no such thing")

    with pytest.raises(RunError, match="no such thing") as of_main:
        on_main_process(accelerator, refuse)
    with pytest.raises(RunError, match="no such thing") as of_first:
        main_process_first(accelerator, refuse)
    with pytest.raises(RunError, match="no such thing") as of_all, all_or_none():
        refuse()
    assert of_main.value.shared and of_first.value.shared and of_all.value.shared
    with all_or_none():
        pass


def test_a_problem_of_another_process_is_raised_with_its_number(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for found, message in (([None, None, "mine", "too"], "^process 2: mine$"), (["mine", "too"], "^mine$")):
        monkeypatch.setattr(processes, "gather_object", lambda _, found=found: found)
        with pytest.raises(RunError, match=message), all_or_none():
            pass


def test_a_mistake_in_the_code_is_not_taken_for_a_users(accelerator: Accelerator) -> None:
    with pytest.raises(ZeroDivisionError), all_or_none():
        print(1 / 0)


def test_a_problem_is_one_line_on_stderr_and_exit_code_2(
    accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(RunError("no such thing")) == report(RunError("no such thing"), accelerator) == 2
    captured = capsys.readouterr()
    assert captured.err == 2 * "error: no such thing\n" and not captured.out


@pytest.mark.parametrize("error", [RunError, CycleError])
def test_a_command_ends_its_accelerator_and_gives_the_exit_code(
    error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    class Process:
        is_main_process, ended = True, 0

        def end_training(self) -> None:
            self.ended += 1

    def refuse(_: Any = None) -> Any:
        raise error("no such thing")

    process: Any = Process()
    assert run_command(lambda: process, lambda _: 143) == 143 and process.ended == 1
    assert run_command(lambda: process, refuse) == 2 and process.ended == 2
    assert run_command(refuse, lambda _: 0) == 2
    assert capsys.readouterr().err == 2 * "error: no such thing\n"


def test_a_problem_in_a_worker_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise RunError("no such thing")
    except RunError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(RunError, match="Traceback") as raised:
        wrapped.reraise()
    assert report(raised.value) == 2
    assert capsys.readouterr().err == "error: no such thing\n"


def test_other_processes_do_not_repeat_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    other = argparse.Namespace(is_main_process=False, process_index=3)
    assert report(RunError("no such thing", shared=True), other) == 2
    assert not capsys.readouterr().err


def test_of_bad_arguments_which_all_have_the_first_process_of_a_machine_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, said in (("0", "error: no such thing\n"), ("3", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert report(RunError("no such thing")) == 2
        assert capsys.readouterr().err == said


def test_a_problem_of_one_process_is_said_by_it(capsys: pytest.CaptureFixture[str]) -> None:
    other = argparse.Namespace(is_main_process=False, process_index=3)
    assert report(RunError("no such thing"), other) == 2
    assert capsys.readouterr().err == "error: process 3: no such thing\n"


# -- arguments -----------------------------------------------------------------------------------------------


def test_a_rhythm_is_what_was_given() -> None:
    assert rhythm_of(arguments()) == Rhythm(50, 1, None, 2, None) == Rhythm()
    given = "--log-every 3 --evaluate-every 4 --checkpoint-every 5 --keep 6 --minutes 0.5".split()
    expected = Rhythm(log_every=3, evaluate_every=4, checkpoint_every=5, keep=6, minutes=0.5)
    assert rhythm_of(arguments(*given)) == expected


@pytest.mark.parametrize(
    "option", ["--log-every", "--evaluate-every", "--checkpoint-every", "--keep", "--minutes", "--clip-grad"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_a_rhythm_that_never_comes_is_refused(option: str, value: int) -> None:
    with pytest.raises(RunError, match=f"{option} {value}.*above 0"):
        rhythm_of(arguments(option, value))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch-size", 0),
        ("--accumulate", 0),
        ("--accumulate", -2),
        ("--epochs", 0),
        ("--seed", -1),
        ("--workers", -1),
        ("--threads", 0),
    ],
)
def test_numbers_that_make_no_sense_are_refused(option: str, value: int) -> None:
    with pytest.raises(RunError, match=f"{option} {value}"):
        make_accelerator(arguments(option, value))


def test_the_accelerator_is_what_was_asked_for() -> None:
    accelerator = make_accelerator(arguments("--accumulate", 3, "--mixed-precision", "bf16"))
    assert (accelerator.gradient_accumulation_steps, accelerator.mixed_precision) == (3, "bf16")
    assert accelerator.device.type == "cpu"


def test_threads_are_those_given_whatever_accelerate_set(monkeypatch: pytest.MonkeyPatch) -> None:
    class Starting(Accelerator):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            torch.set_num_threads(3)  # as Accelerate does for several processes without OMP_NUM_THREADS

    monkeypatch.setattr(arguments_module, "Accelerator", Starting)
    before = torch.get_num_threads()
    try:
        make_accelerator(arguments("--threads", 2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_processes_wait_longer_for_a_cache_than_nccl_would() -> None:
    assert make_accelerator(arguments()).init_handler.to_kwargs() == {"timeout": timedelta(hours=2)}


def test_precision_is_the_arguments_else_that_of_the_launch_else_full_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_accelerator(arguments()).mixed_precision == "no"
    _forget()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert make_accelerator(arguments()).mixed_precision == "bf16"
    _forget()
    assert make_accelerator(arguments("--mixed-precision", "no")).mixed_precision == "no"


def test_an_unknown_tracker_is_refused_by_name() -> None:
    with pytest.raises(RunError, match=r"--report-to abacus: Accelerate has .*tensorboard"):
        make_accelerator(arguments("--report-to", "abacus"))


def test_a_tracker_that_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments_module, "get_available_trackers", lambda: [])
    with pytest.raises(RunError, match="--report-to tensorboard: tensorboard is not installed"):
        make_accelerator(arguments("--report-to", "tensorboard"))


def test_workers_are_those_given_else_the_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers_of(arguments("--workers", 0)) == 0
    assert workers_of(arguments("--workers", 40)) == 40
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    assert workers_of(arguments()) == 11
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers_of(arguments()) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "12")
    assert workers_of(arguments()) == 0
