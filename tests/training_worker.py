"""Runs trainings as processes that can be killed; imports once and forks, since importing takes longer than training.

    python tests/training_worker.py JOBS.json

A job is {"arguments": [...], "command": a name in COMMANDS, "processes": n, "blow": {...} or null}; printed is one
JSON list of exit codes per job. A blow falls on every process at once: SIGKILL or another signal at a given place, or a
limit to the size of files; or one process cannot read.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cyclekd.integrations.deit import train as deit
from cyclekd.integrations.deit.task import Classification
from cyclekd.integrations.runs.training import Training
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.evaluation import evaluate
from cyclekd.integrations.tokenpose.training import data as pose_data
from cyclekd.integrations.tokenpose.training import train as tokenpose

COMMANDS = {"deit": deit.main, "tokenpose": tokenpose.main, "evaluate": evaluate.main}


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(run(**job)), flush=True)


def run(
    arguments: list[str], command: str = "deit", processes: int = 1, blow: dict[str, Any] | None = None
) -> list[int]:
    """Exit codes by rank; when one process was killed, the others are too, as when a machine goes down."""
    port = free_port()
    ranks = {start(rank, processes, port, command, arguments, blow): rank for rank in range(processes)}
    codes = [0] * processes
    for _ in range(processes):
        process, status = os.wait()
        codes[ranks.pop(process)] = os.waitstatus_to_exitcode(status)
        if os.WIFSIGNALED(status):
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    time.sleep(0.1)  # for workers to notice
    return codes


def start(rank: int, processes: int, port: int, command: str, arguments: list[str], blow: dict[str, Any] | None) -> int:
    process = os.fork()
    if process:
        return process
    sys.stdout = os.fdopen(os.dup2(2, 1, inheritable=True), "w", buffering=1)  # stdout is for the exit codes
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if blow:
        PLACES[blow["place"]](**{name: value for name, value in blow.items() if name != "place"})
    try:
        code = COMMANDS[command]("a training under test", [*arguments, "--cpu"])
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    os._exit(code)


def in_accumulation(step: int, accumulate: int, signal_number: int) -> None:
    """Before the second batch of a step."""
    original, calls = Classification.loss, iter(range(10**6))

    def loss(self, model, batch, step_now):
        if next(calls) and step_now == step and next(parts):
            os.kill(os.getpid(), signal_number)
        return original(self, model, batch, step_now)

    parts = iter([False, *[True] * accumulate])
    Classification.loss = loss


def between_steps(step: int, signal_number: int) -> None:
    """After the update of the averaged weights at the end of a step."""
    original = Training.optimizer_step

    def optimizer_step(self, step_now, batches):
        original(self, step_now, batches)
        if step_now == step:
            os.kill(os.getpid(), signal_number)

    Training.optimizer_step = optimizer_step


def in_checkpoint(number: int) -> None:
    """When a checkpoint, the `number`-th of this process, has its weights and half of its optimizer's state."""
    original, saves = torch.save, iter(range(1, 10**6))

    def save(state, file, *args, **kwargs):
        original(state, file, *args, **kwargs)
        if "optimizer" in str(file) and next(saves) == number:
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


def full_disk(after_step: int, largest_file: int) -> None:
    """From a step on, no file can grow beyond a size."""
    original = Training.optimizer_step

    def optimizer_step(self, step_now, batches):
        original(self, step_now, batches)
        if step_now == after_step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    Training.optimizer_step = optimizer_step


def reading(problem: str) -> None:
    """Process 1 alone cannot read the annotations of people."""
    original = pose_data.read_people

    def read_people(*args, **kwargs):
        if os.environ["RANK"] == "1":
            raise PoseError(problem)
        return original(*args, **kwargs)

    pose_data.read_people = read_people


PLACES = {
    "in accumulation": in_accumulation,
    "between steps": between_steps,
    "in checkpoint": in_checkpoint,
    "full disk": full_disk,
    "reading on process 1": reading,
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    main()
