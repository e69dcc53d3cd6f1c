"""What the cost benchmarks share: where and in which precision they run, and how that is told beside the results."""

from __future__ import annotations

import argparse
import platform
from contextlib import AbstractContextManager, nullcontext

import timm
import torch

from benchmarks.records import origin


def add_device_arguments(parser: argparse.ArgumentParser, bf16: str, compiled: str) -> None:
    """`--device`, `--threads`, `--bf16`, `--compile` and `--seed`; `bf16` and `compiled` say what these do."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU; with one, other work disturbs least")
    parser.add_argument("--bf16", action="store_true", help=bf16)
    parser.add_argument("--compile", action="store_true", help=compiled)
    parser.add_argument("--seed", type=int, default=0)


def use_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set the number of threads; ends the program where the device is not there."""
    torch.set_num_threads(args.threads)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is there")


def autocast(args: argparse.Namespace) -> AbstractContextManager[object]:
    return torch.autocast(torch.device(args.device).type, torch.bfloat16) if args.bf16 else nullcontext()


def mode(args: argparse.Namespace) -> str:
    """For file names, such as cuda-bf16-compiled."""
    return "-".join([args.device.split(":")[0], *(["bf16"] * args.bf16), *(["compiled"] * args.compile)])


def provenance(args: argparse.Namespace) -> dict[str, str]:
    """Columns that tell where a row was measured."""
    cuda = args.device.startswith("cuda")
    return {
        "rounds": str(args.rounds),
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "timm": timm.__version__,
        **origin(),
    }
