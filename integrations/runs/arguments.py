"""Arguments that every long training has, and the Accelerator they ask for."""

from __future__ import annotations

import argparse
import ast
import math
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from cyclekd.integrations.runs.checkpoints import save_under_plain_names
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.processes import all_or_none
from cyclekd.integrations.runs.training import Rhythm

FREE_ON_RESUME = {
    "out",
    "resume",
    "workers",
    "log_every",
    "checkpoint_every",
    "evaluate_every",
    "keep",
    "minutes",
    "report_to",
    "cpu",
    "compile",
    "mixed_precision",
    "batch_size",
    "accumulate",
    "processes",
    "cache_dir",
    "threads",
}
"""Settings that a resumed run may change; of those that share out the global batch, only their product may not."""

PATIENCE = timedelta(hours=2)
"""In which other processes wait for one that makes a cache; NCCL's own would be ten minutes."""


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """`--out`, `--resume`, `--seed`, ... under the heading "the run"."""
    text = (
        "Ctrl-C and SIGTERM end a run with a checkpoint, a second one at once. --resume goes on as if nothing had "
        "happened: with the same number of processes and threads, on CPUs, bit for bit, with any number of workers."
    )
    add = parser.add_argument_group("the run", text).add_argument
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="of this run (default: first free of runs/NAME, runs/NAME-2, ...)",
    )
    add("--resume", action="store_true", help="go on with the run in --out; start it if there is none")
    add("--seed", type=int, default=0, metavar="N", help="of weights, order, augmentation and dropout (default: 0)")
    add("--workers", type=int, metavar="N", help="per process, that read samples (default: its share of the cores)")
    add(
        "--minutes",
        type=float,
        metavar="X",
        help="stop with a checkpoint after this time",
    )
    add("--log-every", type=int, default=50, metavar="STEPS", help="a line in log.jsonl and the bar (default: 50)")
    add("--evaluate-every", type=int, default=1, metavar="EPOCHS", help="every cycle, on all of it (default: 1)")
    add("--checkpoint-every", type=int, metavar="STEPS", help="what a killed run can lose at most (default: an epoch)")
    add("--keep", type=int, default=2, metavar="K", help="checkpoints; the best weights are kept besides (default: 2)")
    add(
        "--report-to",
        nargs="+",
        default=[],
        metavar="TRACKER",
        help="also send every record to Accelerate's trackers: tensorboard, wandb, trackio, ...",
    )
    add("--cpu", action="store_true", help="use the CPU where a GPU is there too")
    add("--threads", type=int, metavar="N", help="of a process on the CPU (default: OMP_NUM_THREADS, mostly 1)")
    add(
        "--mixed-precision",
        choices=["no", "bf16", "fp16"],
        help="default: what accelerate launch says, else bf16 on a GPU that has it, else no",
    )
    add("--compile", action="store_true", help="torch.compile: slow first steps, faster ones after")


class KeyValues(argparse.Action):
    """`depth=4 global_pool=avg` as a dict, {} where not given; values are Python literals where they are, else text."""

    def __init__(self, *names, **options):
        super().__init__(*names, nargs="+", default={}, metavar="NAME=VALUE", **options)

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for each in values:
            name, found, value = each.partition("=")
            if not found:
                parser.error(f"{option_string}: {each!r} is not of the form name=value")
            try:
                pairs[name] = ast.literal_eval(value)
            except (SyntaxError, ValueError):
                pairs[name] = value
        setattr(namespace, self.dest, pairs)


def require_ranges(args: argparse.Namespace, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Errors: RunError for an argument below the least or above the largest value that `ranges` has for it."""
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            bounds = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
            raise RunError(f"{option(name)} {value}: has to be {bounds}")


def refuse_given(args: argparse.Namespace, defaults: Mapping[str, object], why: str) -> None:
    """Errors: RunError naming those of the arguments in `defaults` that are not as there: they would say nothing."""
    given = [option(name) for name, default in defaults.items() if getattr(args, name) != default]
    if given:
        raise RunError(f"{', '.join(given)}: {why}")


def option(name: str) -> str:
    """As it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def rhythm_of(args: argparse.Namespace) -> Rhythm:
    """Errors: RunError for a number that makes no sense."""
    for name in ("log_every", "evaluate_every", "checkpoint_every", "keep", "minutes", "clip_grad"):
        value = getattr(args, name)
        if value is not None and not value > 0:  # neither is NaN
            raise RunError(f"{option(name)} {value}: has to be above 0")
    return Rhythm(args.log_every, args.evaluate_every, args.checkpoint_every, args.keep, args.minutes)


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Set up for what `accelerate launch` says and these arguments; saves checkpoints under the model's own keys.

    Besides those of `add_run_arguments`, reads `epochs`, `batch_size`, `accumulate` and `clip_grad`.
    Errors: RunError for a number that makes no sense, and for a tracker or a precision that is not to be had here.
    """
    for name in ("batch_size", "accumulate", "epochs"):
        if getattr(args, name) < 1:
            raise RunError(f"{option(name)} {getattr(args, name)}: has to be at least 1")
    if args.seed < 0:
        raise RunError(f"--seed {args.seed}: has to be at least 0")
    if args.workers is not None and args.workers < 0:
        raise RunError(f"--workers {args.workers}: 0 reads in the training process itself, below that is nothing")
    if args.threads is not None and args.threads < 1:
        raise RunError(f"--threads {args.threads}: has to be at least 1")
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=_mixed_precision(args),
        gradient_accumulation_steps=args.accumulate,
        log_with=_trackers(args.report_to),
        project_dir=".",  # trackers ask for one now; `start.open_run` sets the run's folder
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    if args.threads is not None:
        torch.set_num_threads(args.threads)  # Accelerate may have set another number
    with all_or_none():
        _check_machine(accelerator, args)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # it cannot read the batch off our loaders, and clips by itself, by 1.0 unless told otherwise
        config = {"train_micro_batch_size_per_gpu": args.batch_size, "gradient_clipping": args.clip_grad or 0.0}
        accelerator.state.deepspeed_plugin.deepspeed_config |= config
    save_under_plain_names(accelerator)
    return accelerator


def workers_of(args: argparse.Namespace) -> int:
    """`--workers`, or this process' share of the cores."""
    if args.workers is not None:
        return args.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(16, cores // here - 1))


def _mixed_precision(args: argparse.Namespace) -> str | None:
    if args.mixed_precision is not None or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return args.mixed_precision  # None takes the environment's
    return "bf16" if not args.cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def _trackers(names: list[str]) -> list[str] | None:
    """Those of them that are installed here. Errors: RunError for a name that Accelerate does not know."""
    if not set(names) <= LOGGER_TYPE_TO_CLASS.keys():
        raise RunError(f"--report-to {' '.join(names)}: Accelerate has {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
    return [name for name in names if name in map(str, get_available_trackers())] or None


def _check_machine(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Errors: RunError for what may be otherwise on another machine of the same run."""
    missing = set(args.report_to) - {*map(str, get_available_trackers())}
    if missing:
        raise RunError(f"--report-to {' '.join(args.report_to)}: {', '.join(sorted(missing))} is not installed")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise RunError("--mixed-precision fp16: needs a GPU; bf16 and no work on the CPU too")
