"""One training of the experiment: an arm with a seed, from its initial weights to its measurements.

Every epoch seeds the random generators anew, so that no checkpoint has to hold their state: a run that was stopped
between two epochs ends bit by bit as an undisturbed one, where the device itself is deterministic.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.optim import AdamW

from benchmarks.experiment.tasks import load_task
from cyclekd import CycleLoss, run_cycles, wrap_multicycle
from cyclekd.integrations.runs.seeds import derive_seed, seed_all

CURVE_POINTS = 10
SAVE_EVERY_S = 60


@dataclass(frozen=True)
class Arm:
    """One way to train; plain where `cycles` is 1."""

    name: str
    cycles: int = 1
    longer: int = 1  # times as many epochs
    rho: float = 0.0
    alpha: float | None = None

    @property
    def passes(self) -> int:
        """Training passes per epoch of the recipe: what the arm costs."""
        return self.cycles * self.longer


@dataclass(frozen=True)
class Settings:
    """What all runs of one experiment have in common; rows that differ in any of it are not compared."""

    task: str
    source: str  # one version of the task or its data: a digest
    images: int | None
    epochs: int
    cycles: int
    stack: str | None
    learning_rate: float
    weight_decay: float
    warmup: float
    precision: str  # "fp32" or "bf16", the latter by autocast
    compiled: bool
    device: str  # "cpu" or "cuda"
    model: str | None = None  # of tasks that have several
    input_size: str | None = None  # likewise, as in 128x96

    def columns(self) -> dict[str, str]:
        """As the results file has them; what only some tasks have is no column for the others."""
        values = {name.replace("_", " "): value for name, value in asdict(self).items()}
        for name in ("model", "input size"):
            if values[name] is None:
                del values[name]
        return {name: "" if value is None else str(value) for name, value in values.items()}


@dataclass(frozen=True)
class Plan:
    """An experiment as a process needs it to make one of its runs."""

    settings: Settings
    task: str  # built-in name or path of the file
    cache: Path | None  # decoded images
    work: Path  # checkpoints of runs that are not over
    threads: int


@dataclass(frozen=True)
class Job:
    arm: Arm
    seed: int

    def __str__(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"


@dataclass(frozen=True)
class Measured:
    """A finished run. Seconds are those of training (and compiling) alone, over all calls in which it was trained."""

    one_pass: float
    all_cycles: float | None
    token_distance: tuple[float, ...]
    """||t_i - t_i+1||^2 / ||t_i+1||^2 over the test data, for each cycle but the last."""
    steps: int
    seconds: float
    images: int
    curve: tuple[tuple[float, float], ...]
    """(training passes, metric of one pass)."""
    metric: str


Advance = Callable[[float, int], None]  # training passes, images


def train(plan: Plan, job: Job, advance: Advance, must_stop: Callable[[float], bool]) -> Measured | None:
    """The finished run, or None where it had to stop: then its checkpoint is left in `plan.work`.

    Stops after an epoch if `must_stop(seconds that one more will take)`; at least one is made.
    """
    run = Run(plan, job)
    run.resume()
    saved = time.monotonic()
    while run.epoch < run.epochs:
        began = time.monotonic()
        run.train_epoch(advance)
        now = time.monotonic()
        if run.epoch == run.epochs:
            break
        if must_stop(now - began):
            run.save()
            return None
        if now - saved > SAVE_EVERY_S:
            run.save()
            saved = now
    return run.measure()


class Run:
    """A training between two epochs."""

    def __init__(self, plan: Plan, job: Job) -> None:
        settings = plan.settings
        self.job, self.work, self.settings = job, plan.work, settings
        self.device = torch.device(settings.device)
        torch.set_num_threads(plan.threads)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if settings.compiled:
            torch.compiler.reset()  # each run compiles a model of its own; past eight, PyTorch would give up compiling
        task = load_task(plan.task, plan.cache, settings.images, settings.model)
        self.data = task.load_data(job.seed, self.device)
        seed_all(job.seed)
        self.model = task.build_model(job.seed).to(self.device).train()
        self.loss: Callable[[Any, Any], Tensor] = self.data.loss
        if job.arm.cycles > 1:
            wrap_multicycle(self.model, job.arm.cycles, stack=settings.stack)
            self.loss = cycle_loss(job.arm, self.data)
        self.forward = torch.compile(self.model) if settings.compiled else self.model
        self.epochs = settings.epochs * job.arm.longer
        self.optimizer = AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=self.device.type == "cuda",
        )
        steps = self.epochs * self.data.steps_per_epoch
        warmup = {"warmup_t": round(settings.warmup * steps), "warmup_lr_init": settings.learning_rate / 100}
        self.schedule = CosineLRScheduler(self.optimizer, t_initial=steps, t_in_epochs=False, **warmup)
        self.epoch = self.step = self.images = 0
        self.seconds = 0.0
        self.curve: list[tuple[float, float]] = []

    def train_epoch(self, advance: Advance) -> None:
        seed_all(derive_seed("epoch", self.job.seed, self.epoch))  # dropout and the like
        share = self.job.arm.cycles / self.data.steps_per_epoch
        self.finish_on_device()
        began = time.perf_counter()
        for inputs, targets in self.data.batches(self.epoch):
            self.optimizer.zero_grad()
            with self.autocast():
                loss = self.loss(self.forward(inputs), targets)
            loss.backward()
            self.optimizer.step()
            self.step += 1
            self.schedule.step_update(self.step)
            self.images += len(inputs)
            advance(share, len(inputs))
        self.finish_on_device()
        self.seconds += time.perf_counter() - began
        self.epoch += 1
        if self.epoch % -(-self.epochs // CURVE_POINTS) == 0 or self.epoch == self.epochs:
            self.curve.append((self.epoch * self.job.arm.cycles, self.one_pass()))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def finish_on_device(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    @torch.no_grad()
    def one_pass(self) -> float:
        """The metric of the model as it is deployed, in fp32."""
        self.model.eval()
        value = self.data.evaluate(self.model)
        self.model.train()
        return float(value)

    @torch.no_grad()
    def all_cycles(self) -> tuple[float, tuple[float, ...]]:
        """The metric of the last cycle, and how far each further cycle moves the tokens."""
        self.model.eval()
        cycles = self.job.arm.cycles
        moved, size = torch.zeros(2, cycles - 1, dtype=torch.float64, device=self.device)

        def outputs_of(inputs: Tensor) -> Any:
            every = run_cycles(self.model, inputs)
            for i, (tokens, further) in enumerate(pairwise(map(flat, every.tokens))):
                moved[i] += (tokens - further).square().sum()
                size[i] += further.square().sum()
            return every.outputs[-1]

        value = self.data.evaluate(outputs_of)
        self.model.train()
        return float(value), tuple((moved / size).tolist())

    def measure(self) -> Measured:
        every, distance = self.all_cycles() if self.job.arm.cycles > 1 else (None, ())
        curve = tuple(self.curve)
        return Measured(curve[-1][1], every, distance, self.step, self.seconds, self.images, curve, self.data.metric)

    # -- checkpoints: weights, then the rest; a checkpoint is there when the second file is ----------------------------

    def save(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        earlier = checkpoint_files(self.work, self.job)
        path = self.work / f"{stem(self.job)}-epoch{self.epoch:05d}.pt"
        save_model(self.model, str(path.with_suffix(".safetensors")))
        progress = {"step": self.step, "seconds": self.seconds, "images": self.images, "curve": self.curve}
        torch.save(
            {"optimizer": self.optimizer.state_dict(), "progress": json.dumps(progress)}, path.with_suffix(".tmp")
        )
        path.with_suffix(".tmp").replace(path)
        for file in earlier:
            file.unlink(missing_ok=True)

    def resume(self) -> None:
        epoch = epochs_done(self.work, self.job)
        if epoch == 0:
            return
        path = self.work / f"{stem(self.job)}-epoch{epoch:05d}.pt"
        load_model(self.model, path.with_suffix(".safetensors"), device=str(self.device))
        rest = torch.load(path, map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(rest["optimizer"])
        progress = json.loads(rest["progress"])
        self.epoch, self.step, self.images = epoch, progress["step"], progress["images"]
        self.seconds, self.curve = progress["seconds"], [tuple(point) for point in progress["curve"]]


def cycle_loss(arm: Arm, data: Any) -> Callable[[Any, Any], Tensor]:
    criterion = CycleLoss(data.loss, rho=arm.rho, alpha=arm.alpha, groups=data.groups)
    return lambda output, targets: criterion(output, targets).total


def flat(tokens: Tensor | tuple[Tensor, ...]) -> Tensor:
    parts = (tokens,) if isinstance(tokens, Tensor) else tokens
    return torch.cat([part.float().flatten() for part in parts])


def stem(job: Job) -> str:
    return f"{job.arm.name.replace(' ', '-')}-seed{job.seed}"


def checkpoint_files(work: Path, job: Job) -> list[Path]:
    return sorted(work.glob(f"{stem(job)}-epoch*"))


def epochs_done(work: Path, job: Job) -> int:
    """Epochs in the run's checkpoint, 0 without one."""
    return max((int(path.stem[-5:]) for path in checkpoint_files(work, job) if path.suffix == ".pt"), default=0)
