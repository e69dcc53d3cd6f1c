"""How a run starts: in a new folder, or in the one it is to go on in, with the settings it was started with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from cyclekd.integrations.runs.arguments import FREE_ON_RESUME
from cyclekd.integrations.runs.environment import describe_environment
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import RunFolder, settings_that_differ, write_json
from cyclekd.integrations.runs.processes import on_main_process


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


def report(error: Exception, accelerator: Accelerator | None = None) -> int:
    """The message on stderr; the exit code 2. What all processes raise is said by the main one alone."""
    # one from a loader's worker carries its traceback
    message = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
    if accelerator is None or accelerator.is_main_process:
        print(f"error: {message}", file=sys.stderr, flush=True)
    elif not getattr(error, "shared", False):
        print(f"error: process {accelerator.process_index}: {message}", file=sys.stderr, flush=True)
    return 2


def _open_or_create(args: argparse.Namespace, name: str, settings: Mapping[str, object]) -> RunFolder:
    if args.resume and args.out is None:
        raise RunError("--resume: which run? Name its folder with --out")
    if not (args.resume and (args.out / "config.json").is_file()):
        folder = RunFolder.create(args.out, name)
        folder.write_config(settings)
        return folder
    folder = RunFolder.open(args.out)
    different = settings_that_differ(folder.read_config(), settings, FREE_ON_RESUME)
    if different:
        changed = "; ".join(f"{key} was {was!r} and is {now!r}" for key, (was, now) in sorted(different.items()))
        raise RunError(f"--resume: the run in {args.out} was started with other settings: {changed}")
    return folder
