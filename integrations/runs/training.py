"""The loop of a long training: steps, records, evaluation, checkpoints, and going on where one ended.

What is trained is a `Task`; everything here is the same for all of them. Nothing in a step depends on how the run came
to it, so a resumed run ends with the weights, bit for bit, of an undisturbed one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from safetensors.torch import save
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cyclekd.integrations.runs.checkpoints import Checkpoints, read_progress
from cyclekd.integrations.runs.curves import draw_curves
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import RunFolder, write_atomically
from cyclekd.integrations.runs.loading import Batch, on_device
from cyclekd.integrations.runs.processes import on_main_process, share_buffers
from cyclekd.integrations.runs.progress import Log, Meter, Progress, describe
from cyclekd.integrations.runs.seeds import derive_seed, seed_all
from cyclekd.integrations.runs.stopping import Stopping

ON_THE_HOST = ("plan", "index", "skipped")
"""Parts of a batch that are read by Python and therefore stay where they are."""


class Task(Protocol):
    """What a training is about."""

    best_metric: str
    """The evaluation metric by which the best weights are chosen; higher is better."""

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Mapping[str, Tensor]:
        """Scalars by name; backward is called on `loss`, all are logged."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics over the whole validation set, the same on every process."""
        ...


class Order(Protocol):
    """What is trained on, in which steps; `sampling.TrainingBatches` is one."""

    start: int
    steps: int
    steps_per_epoch: int
    global_batch: int
    accumulate: int


@dataclass(frozen=True)
class Rhythm:
    """When a run logs, evaluates, saves and stops."""

    log_every: int = 50
    """Optimizer steps between records; several processes also agree on stopping at these steps."""
    evaluate_every: int = 1
    """Epochs."""
    checkpoint_every: int | None = None
    """Optimizer steps; None is once per epoch."""
    keep: int = 2
    """Checkpoints."""
    minutes: float | None = None
    """Stop with a checkpoint after this time."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    step: int
    finished: bool
    why: str
    exit_code: int
    metrics: dict[str, float]
    """Of the last evaluation."""
    best: dict[str, float]
    """Of the evaluation with the highest `best_metric`."""
    seconds: float
    """Over all calls of this run; writing checkpoints is left out."""


@dataclass
class Training:
    """Everything one run needs; `model` and `optimizer` come from `accelerator.prepare`."""

    accelerator: Accelerator
    folder: RunFolder
    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    order: Order
    load: Callable[[], Iterable[Batch]]
    """This process' batches in `order`, from `order.start` on."""
    seed: int
    clip_norm: float | None = None
    average: ModelEmaV3 | None = None
    rhythm: Rhythm = field(default_factory=Rhythm)
    problem_of: Callable[[int], str] | None = None
    """What was wrong with a sample that was skipped, for the log."""
    measures: Collection[str] | None = None
    """Those that the curves show; all of them unless told."""

    def __post_init__(self) -> None:
        self.log, self.meter = Log(self.folder.log), Meter()
        self.checkpoints = Checkpoints(self.folder.checkpoints, self.rhythm.keep)
        self.metrics: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.skipped: set[int] = set()
        self._told: set[int] = set()
        self.seconds = 0.0

    def run(self) -> Outcome:
        """Train to the end, or until a signal or the time limit; goes on from the latest checkpoint if there is one.

        Errors: RunError where a checkpoint does not fit or cannot be written, and for a loss that is no number.
        """
        latest, step = self._latest()
        self.order.start = step
        stream = self._settle(on_device(self.load(), self.accelerator.device, ON_THE_HOST))
        self._restore(latest)
        main = self.accelerator.is_main_process
        bar = Progress(self.order.steps, step, self.order.steps_per_epoch, enabled=main)
        self._since, self._samples = time.perf_counter(), 0
        stop = False
        self.model.train()
        with Stopping(self.rhythm.minutes) as stopping:
            if self._evaluation_is_due(step):  # it was stopped before that
                self._evaluate_epoch(step, bar)
            while step < self.order.steps and not stop:
                self.optimizer_step(step, islice(stream, self.order.accumulate))
                step += 1
                self._samples += self.order.global_batch
                records = step % self.rhythm.log_every == 0
                epoch_ends = step % self.order.steps_per_epoch == 0
                if records or epoch_ends:
                    self._record(step, bar)
                if step < self.order.steps and (records or epoch_ends or self.accelerator.num_processes == 1):
                    stop = stopping.agreed(self.accelerator)
                if self._evaluation_is_due(step) and not stop:
                    self._evaluate_epoch(step, bar)
                if stop or self._checkpoint_is_due(step):
                    self._checkpoint(step)
            bar.close()
        finished = step == self.order.steps
        return Outcome(
            step=step,
            finished=finished,
            why="finished" if finished else stopping.why,
            exit_code=0 if finished else stopping.exit_code,
            metrics=self.metrics,
            best=self.best,
            seconds=self.seconds,
        )

    def optimizer_step(self, step: int, batches: Iterator[Batch]) -> None:
        """Forward and backward over this process' part of the global batch, and one update of the weights.

        The model is in training mode: setting it takes a millisecond, in which a GPU may wait.
        """
        in_parts = self.accelerator.gradient_accumulation_steps > 1
        for part, batch in enumerate(batches):
            seed_all(derive_seed(self.seed, "step", step, part, self.accelerator.process_index))
            self._notice_skipped(batch)
            with self.accelerator.accumulate(self.model) if in_parts else nullcontext():
                terms = self.task.loss(self.model, batch, step)
                self.accelerator.backward(terms["loss"])
                self.meter.add(terms)
                if self.accelerator.sync_gradients:
                    self._update_weights()
        self.schedule.step_update(step + 1)
        if self.average is not None:
            self.average.update(self.accelerator.unwrap_model(self.model), step=step + 1)

    def _update_weights(self) -> None:
        if self.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        optimizer = _without_wrapper(self.optimizer)
        optimizer.step()
        optimizer.zero_grad()

    def _latest(self) -> tuple[Path | None, int]:
        """The checkpoint to go on from and its step, as the main process sees it; the log ends there from now on."""

        def prepare() -> tuple[Path | None, int]:
            self.checkpoints.sweep()
            latest = self.checkpoints.latest()
            if latest is None:
                self.log.truncate(0)
                return None, 0
            saved = read_progress(latest)
            evaluated = saved["metrics"].get("epoch") == saved["step"] // self.order.steps_per_epoch
            self.log.truncate(saved["step"], again=() if evaluated else ("evaluation",))
            return latest, saved["step"]

        return on_main_process(self.accelerator, prepare)

    def _settle(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, after one backward over the first whose gradients are thrown away.

        DistributedDataParallel lays its gradients out anew after the first backward it sees, and sums more than two
        processes in another order from then on. A resumed run must not see that at another step.
        """
        if not isinstance(self.model, DistributedDataParallel) or self.order.start == self.order.steps:
            return stream
        first = next(stream)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.model.train()
        seed_all(self.seed)
        copy = {name: value.clone() for name, value in first.items()}  # mixup changes images in place
        self.accelerator.backward(self.task.loss(self.model, copy, self.order.start)["loss"])
        self.model.zero_grad()
        for buffer, before in buffers:
            buffer.copy_(before)
        return chain([first], stream)

    def _restore(self, latest: Path | None) -> None:
        if latest is None:
            self.schedule.step_update(0)
            return
        averaged = self.average.module if self.average is not None else None
        saved = self.checkpoints.load(self.accelerator, latest, averaged)
        # the meter is this process' own; with another number of processes the record begun is dropped
        meters = saved["meters"]
        if len(meters) == self.accelerator.num_processes:
            self.meter.load(meters[self.accelerator.process_index])
        self.metrics, self.best = saved["metrics"], saved["best"]
        self.skipped, self.seconds = set(saved["skipped"]), saved["seconds"]
        self._told = set(self.skipped)
        self.schedule.step_update(saved["step"])

    def _notice_skipped(self, batch: Batch) -> None:
        if "skipped" in batch:
            self.skipped.update(i for i in batch["skipped"].tolist() if i >= 0)

    def _tell_skipped(self, step: int) -> None:
        """Samples that any process skipped, into the log, each once."""
        self.skipped = set(gather_object(sorted(self.skipped)))
        untold = sorted(self.skipped - self._told)

        def write() -> None:
            for index in untold:
                self.log.write("skipped", step, index=index, why=self.problem_of(index) if self.problem_of else "")

        on_main_process(self.accelerator, write)
        self._told = set(self.skipped)

    def _record(self, step: int, bar: Progress) -> None:
        """Means since the last record, over all processes, to the log, the trackers and the bar."""
        means = self._means()
        lr, speed = self.optimizer.param_groups[0]["lr"], self._samples_per_second()
        self._refuse_no_number(means, step)
        bar.update(step, means, lr, speed)
        record = {**means, "lr": lr, "samples_per_second": speed}
        on_main_process(self.accelerator, lambda: self.log.write("train", step, **record))
        self.accelerator.log({f"train/{name}": value for name, value in {**means, "lr": lr}.items()}, step=step)
        self.meter.reset()

    def _means(self) -> dict[str, float]:
        means = self.meter.means()
        if self.accelerator.num_processes > 1 and means:
            values = torch.tensor(list(means.values()), device=self.accelerator.device)
            means = dict(zip(means, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        return means

    def _samples_per_second(self) -> float:
        now = time.perf_counter()
        elapsed, samples = now - self._since, self._samples
        self.seconds += elapsed
        self._since, self._samples = now, 0
        return samples / elapsed

    def _refuse_no_number(self, means: Mapping[str, float], step: int) -> None:
        if not all(math.isfinite(value) for value in means.values()):
            self._refuse(", ".join(f"{name} = {value:.4g}" for name, value in means.items()), step)

    def _refuse_weights_of_no_number(self, step: int) -> None:
        """A finite loss can have gradients that are not; its weights must not take the place of good ones."""
        shards = (getattr(weight, "_local_tensor", weight).detach() for weight in self.model.parameters())
        finite = torch.stack([shard.isfinite().all() for shard in shards]).all()
        if self.accelerator.reduce((~finite).int(), "sum") > 0:
            self._refuse("weights that are no numbers", step)

    def _refuse(self, seen: str, step: int) -> None:
        latest = self.checkpoints.latest()
        raise RunError(
            f"the training diverged: {seen} at step {step}. Lower the learning rate or clip gradients; "
            + (f"{latest} holds the weights from before" if latest else "there is no checkpoint from before")
        )

    def _evaluation_is_due(self, step: int) -> bool:
        epoch, rest = divmod(step, self.order.steps_per_epoch)
        if step == 0 or rest or self.metrics.get("epoch") == epoch:
            return False
        return epoch % self.rhythm.evaluate_every == 0 or step == self.order.steps

    def _evaluate_epoch(self, step: int, bar: Progress) -> None:
        self._refuse_weights_of_no_number(step)
        self._tell_skipped(step)
        self.metrics = {"epoch": step // self.order.steps_per_epoch, **self._evaluate()}
        self.model.train()
        if self.metrics[self.deciding] > self.best.get(self.deciding, -math.inf):
            self.best = self.metrics
            self._save_best()

        def write() -> None:
            self.log.write("evaluation", step, **self.metrics, skipped=len(self.skipped))
            draw_curves(self.folder.curves, self.log.read(), self.folder.path.name, self.measures)

        on_main_process(self.accelerator, write)
        bar.message(describe(self.metrics))
        self.accelerator.log({f"evaluation/{name}": value for name, value in self.metrics.items()}, step=step)
        self._samples_per_second()  # the time of an evaluation is not that of training steps

    def _evaluate(self) -> dict[str, float]:
        """Metrics of the trained weights and, with `_ema` behind their names, of the averaged ones."""
        self._share_buffers()
        metrics = self.task.evaluate(self.model)
        if self.average is not None:
            metrics |= {f"{name}_ema": value for name, value in self.task.evaluate(self.average.module).items()}
        return metrics

    @property
    def deciding(self) -> str:
        return self.task.best_metric + ("_ema" if self.average is not None else "")

    def deployable_weights(self) -> dict[str, Tensor]:
        """The averaged weights if there are any, else the trained ones, under the base model's own keys.

        Every process has to call this: sharded weights are gathered.
        """
        if self.average is not None:
            state = self.average.module.state_dict()
        else:
            state = self.accelerator.get_state_dict(self.model)
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def _share_buffers(self) -> None:
        average = [self.average.module] if self.average is not None else []
        share_buffers(self.accelerator, self.accelerator.unwrap_model(self.model), *average)

    def _save_best(self) -> None:
        weights = self.deployable_weights()

        def write() -> None:
            self.folder.best.mkdir(exist_ok=True)
            write_atomically(self.folder.best / "model.safetensors", save(weights))

        on_main_process(self.accelerator, write)

    def _checkpoint_is_due(self, step: int) -> bool:
        every = self.rhythm.checkpoint_every or self.order.steps_per_epoch
        return step % every == 0 or step == self.order.steps

    def _checkpoint(self, step: int) -> None:
        self._refuse_no_number(self._means(), step)
        self._refuse_weights_of_no_number(step)
        self._tell_skipped(step)
        self._share_buffers()
        self.seconds += time.perf_counter() - self._since
        progress = {
            "meters": gather_object([self.meter.state()]),
            "metrics": self.metrics,
            "best": self.best,
            "skipped": sorted(self.skipped),
            "seconds": self.seconds,
        }
        averaged = self.average.module if self.average is not None else None
        self.checkpoints.save(self.accelerator, step, progress, averaged)
        self._since, self._samples = time.perf_counter(), 0


def _without_wrapper(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What Accelerate wrapped, where the wrapper has nothing to do: it searches the disk for a package at every step.

    It has for a gradient scaler, and in its subclasses, as for DeepSpeed.
    """
    has_nothing_to_do = type(optimizer) is AcceleratedOptimizer and optimizer.scaler is None
    return optimizer.optimizer if has_nothing_to_do else optimizer
