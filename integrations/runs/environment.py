"""What a run ran on, for its records. Environment variables and the host's name stay out: records get published."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import cyclekd

PACKAGES = ("torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "numpy")


def describe_environment(*devices: torch.device | str) -> dict[str, object]:
    """Versions, hardware, commit and command line, ready for JSON.

    GPUs are those of `devices`, where none are given all that are visible. The commit is the working folder's, with
    "-dirty" where tracked files were changed; None outside git.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": _usable_cpus(),
        "gpus": _gpu_names(*devices),
        "cuda": torch.version.cuda,
        "packages": {"cyclekd": cyclekd.__version__, **_versions()},
        "commit": _commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def _usable_cpus() -> int:
    """Those this process may run on, which in a container or under Slurm are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu_names(*devices: torch.device | str) -> list[str]:
    if not torch.cuda.is_available():
        return []
    chosen = [torch.device(each) for each in devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())]]
    return [torch.cuda.get_device_name(each) for each in chosen if each.type == "cuda"]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    describe = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(describe, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a network disk that hangs
        return None
    return answer.stdout.strip() or None
