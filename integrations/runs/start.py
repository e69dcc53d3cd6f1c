"""How a run starts: in a new folder, or in the one it is to go on in, with the settings it was started with."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from cyclekd import CycleError
from cyclekd.integrations.runs.arguments import FREE_ON_RESUME
from cyclekd.integrations.runs.environment import describe_environment
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import RunFolder, require_empty, settings_that_differ, write_json
from cyclekd.integrations.runs.processes import on_main_process


def run_command(make: Callable[[], Accelerator], work: Callable[[Accelerator], int]) -> int:
    """The exit code that `work` returns; 2, with a message on stderr, for what a user can put right."""
    accelerator = None
    try:
        accelerator = make()
        return work(accelerator)
    except (RunError, CycleError) as error:
        return report(error, accelerator)
    finally:
        if accelerator is not None:
            accelerator.end_training()


def check_out(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Before work that takes long: RunError for what `open_run` would refuse after it, as far as arguments tell.

    Nothing is written.
    """

    def check() -> None:
        _require_out(args)
        if _goes_on(args):
            saved = RunFolder.open(args.out).read_config()
            _refuse_other_settings(args, {name: saved[name] for name in saved if name in vars(args)}, vars(args))
        elif args.out is not None:
            require_empty(args.out)

    on_main_process(accelerator, check)


def open_run(
    accelerator: Accelerator, args: argparse.Namespace, name: str, settings: Mapping[str, object]
) -> RunFolder:
    """The run's folder, with config.json and environment.json; the same on every process.

    Errors: RunError where --out holds something else, and where a resumed run was started with other settings.
    """
    folder = on_main_process(accelerator, lambda: _open_or_create(args, name, settings))
    environment = describe_environment(accelerator.device)
    on_main_process(accelerator, lambda: write_json(folder.environment, environment))
    if args.report_to:
        accelerator.project_configuration = ProjectConfiguration(str(folder.path), logging_dir=str(folder.path))
        accelerator.init_trackers(folder.path.name, config={k: str(v) for k, v in settings.items()})
    return folder


def precision_of(accelerator: Accelerator) -> str:
    """As people write it: fp32 is what Accelerate calls "no"."""
    return {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)


def report(error: Exception, accelerator: Accelerator | None = None) -> int:
    """The message on stderr; the exit code 2. What all processes raise is said by the main one alone.

    What is wrong before there is an Accelerator is wrong with the arguments, which are the same for all processes of a
    machine: the first of each says it.
    """
    # one from a loader's worker carries its traceback
    message = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
    is_main = os.environ.get("LOCAL_RANK", "0") == "0" if accelerator is None else accelerator.is_main_process
    if is_main:
        print(f"error: {message}", file=sys.stderr, flush=True)
    elif accelerator is not None and not getattr(error, "shared", False):
        print(f"error: process {accelerator.process_index}: {message}", file=sys.stderr, flush=True)
    return 2


def _open_or_create(args: argparse.Namespace, name: str, settings: Mapping[str, object]) -> RunFolder:
    _require_out(args)
    if not _goes_on(args):
        folder = RunFolder.create(args.out, name)
        folder.write_config(settings)
        return folder
    folder = RunFolder.open(args.out)
    _refuse_other_settings(args, folder.read_config(), settings)
    return folder


def _require_out(args: argparse.Namespace) -> None:
    if args.resume and args.out is None:
        raise RunError("--resume: which run? Name its folder with --out")


def _goes_on(args: argparse.Namespace) -> bool:
    return args.resume and (args.out / "config.json").is_file()


def _refuse_other_settings(args: argparse.Namespace, saved: Mapping[str, object], now: Mapping[str, object]) -> None:
    different = settings_that_differ(saved, now, FREE_ON_RESUME)
    if different:
        changed = "; ".join(f"{key} was {was!r} and is {now!r}" for key, (was, now) in sorted(different.items()))
        raise RunError(
            f"--resume: the run in {args.out} was started with other settings: {changed}. Give the earlier ones again, "
            "or another --out"
        )
