"""The queue of runs: one after the other in this process, or side by side in several that share the device.

A small model leaves a large GPU idle most of the time, because it waits for the next kernel to be launched. Processes
are started afresh (spawn) and each makes run after run, so that imports and images are loaded once per process.
"""

from __future__ import annotations

import os
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event
from typing import Any

import torch

from benchmarks.experiment.runs import Advance, Job, Measured, Plan, train
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.stopping import Stopping, leave_signals_to_the_parent

MOST = 6  # trainings at once; each needs a CPU core or two to launch its kernels
MEMORY_PER_RUN = 6 * 2**30  # bytes, with room to spare for a model of a few million weights
REPORT_EVERY_S = 0.5

Finished = tuple[Job, Measured]


def jobs_for(device: str) -> int:
    """How many trainings to make at once: what the GPU's memory and the CPU's cores allow, at most 6; 1 on the CPU."""
    if device != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(MOST, (os.cpu_count() or 1) // 2, free // MEMORY_PER_RUN))


def run_all(plan: Plan, todo: list[Job], jobs: int, stopping: Stopping, advance: Advance) -> Iterator[Finished]:
    """Runs in the order in which they finish, until all are done or `stopping` asks; the first ones always start."""
    if jobs == 1:
        yield from run_here(plan, todo, stopping, advance)
    else:
        yield from run_side_by_side(plan, todo, min(jobs, len(todo)), stopping, advance)


def run_here(plan: Plan, todo: list[Job], stopping: Stopping, advance: Advance) -> Iterator[Finished]:
    def must_stop(seconds: float) -> bool:
        return stopping.asked or ends_before(stopping.deadline, seconds)

    for index, job in enumerate(todo):
        if index > 0 and stopping.asked:
            return
        measured = train(plan, job, advance, must_stop)
        if measured is not None:
            yield job, measured


def ends_before(deadline: float | None, seconds: float) -> bool:
    return deadline is not None and time.monotonic() + seconds > deadline


# -- side by side ------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    process: Any
    job: Job | None = None


def run_side_by_side(
    plan: Plan, todo: list[Job], jobs: int, stopping: Stopping, advance: Advance
) -> Iterator[Finished]:
    context = get_context("spawn")
    stop, waiting, workers = context.Event(), deque(todo), {}
    left_s = None if stopping.deadline is None else stopping.deadline - time.monotonic()
    deadline = None if left_s is None else time.time() + left_s  # the one clock that processes share everywhere
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(plan, theirs, stop, deadline), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            workers[ours] = Worker(process)
            hand_out(ours, workers, waiting)
        while workers:
            if stopping.asked:
                stop.set()
                waiting.clear()
            for connection in wait(list(workers), timeout=REPORT_EVERY_S):
                job = workers[connection].job
                kind, value = receive(connection, workers[connection])
                if kind == "advance":
                    advance(*value)
                    continue
                hand_out(connection, workers, waiting)
                if value is not None:
                    yield job, value
    finally:
        for worker in workers.values():
            worker.process.kill()  # they leave SIGTERM to us; their checkpoints are whole or not there
        for worker in workers.values():
            worker.process.join()


def hand_out(connection: Connection, workers: dict[Connection, Worker], waiting: deque[Job]) -> None:
    """The next run to the process behind `connection`, or its end."""
    worker = workers[connection]
    worker.job = waiting.popleft() if waiting else None
    connection.send(worker.job)
    if worker.job is None:
        del workers[connection]
        worker.process.join()
        connection.close()


def receive(connection: Connection, worker: Worker) -> tuple[str, Any]:
    try:
        kind, value = connection.recv()
    except EOFError:
        worker.process.join()
        raise RunError(
            f"the process that trained {worker.job} ended with exit code {worker.process.exitcode}; finished runs are "
            "kept. Where memory was short, ask for fewer at once with --jobs"
        ) from None
    if kind == "failed":
        raise RunError(f"the training of {worker.job} failed; finished runs are kept\n{value}")
    return kind, value


def work(plan: Plan, connection: Connection, stop: Event, deadline: float | None) -> None:
    """A process of `run_side_by_side`: run after run, until there is none."""
    leave_signals_to_the_parent(0)
    report = Report(connection)

    def must_stop(seconds: float) -> bool:
        return stop.is_set() or (deadline is not None and time.time() + seconds > deadline)

    while (job := connection.recv()) is not None:
        try:
            measured = train(plan, job, report, must_stop)
        except Exception:
            connection.send(("failed", traceback.format_exc()))
            return
        report.flush()
        connection.send(("finished", measured))


class Report:
    """Collects progress and sends it now and then: a message per step would cost more than it tells."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.passes, self.images, self.sent = connection, 0.0, 0, time.monotonic()

    def __call__(self, passes: float, images: int) -> None:
        self.passes, self.images = self.passes + passes, self.images + images
        if time.monotonic() - self.sent > REPORT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        self.connection.send(("advance", (self.passes, self.images)))
        self.passes, self.images, self.sent = 0.0, 0, time.monotonic()
