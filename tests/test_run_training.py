"""The loop of a long training, on a task of nine numbers: records, evaluation, checkpoints, its ends, going on."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import Dataset

from cyclekd.integrations.runs import training as module
from cyclekd.integrations.runs.checkpoints import save_under_plain_names
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import RunFolder
from cyclekd.integrations.runs.loading import Batch, load_batches
from cyclekd.integrations.runs.sampling import Draw, TrainingBatches
from cyclekd.integrations.runs.training import Rhythm, Training

ROOT = Path(__file__).parents[1]
LENGTH, BATCH, EPOCHS = 22, 4, 4
STEPS_PER_EPOCH = 5
STEPS = EPOCHS * STEPS_PER_EPOCH


class Points(Dataset[dict[str, Tensor]]):
    """Nine numbers per sample; sample 7 cannot be read and is replaced."""

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        points = torch.randn(9, generator=torch.Generator().manual_seed(draw.index))
        skipped = torch.tensor(draw.index if draw.index == 7 else -1)
        return {"points": points, "skipped": skipped}


class Blow(BaseException):
    """The end of a process, for a test that wants to live on."""


@dataclass
class Regression:
    """Predict the sum of nine numbers, with dropout, so that a step depends on its seed."""

    best_metric = "score"
    scores: list[float] = field(default_factory=list)
    """What the evaluations find, one after the other; without them the negative distance to the solution."""
    at_step: dict[int, Callable[[], None]] = field(default_factory=dict)
    """What happens in the loss of a step."""
    loss_at_step: dict[int, Callable[[Tensor, nn.Module], Tensor]] = field(default_factory=dict)
    """What a step makes of its loss."""
    evaluated: list[Tensor] = field(default_factory=list)
    """Weights that were evaluated."""

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Mapping[str, Tensor]:
        assert model.training
        points = batch["points"]
        distance = (model(points)[:, 0] - points.sum(dim=1)).square().mean()
        self.at_step.get(step, lambda: None)()
        change = self.loss_at_step.get(step, lambda loss, model: loss)
        return {"distance": distance, "loss": change(distance, model)}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        weight = model.eval()[1].weight.detach().clone()  # for the loop to undo
        self.evaluated.append(weight)
        distance = (weight - 1).square().sum().item()
        return {"score": self.scores.pop(0) if self.scores else -distance}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are tested with the records, and take longer than all else here."""
    monkeypatch.setattr(module, "draw_curves", lambda *args: None)


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """Makes trainings, all from the same weights; those with the same `name` go on from each other."""

    def make(
        name: str = "run",
        task: Regression | None = None,
        rhythm: Rhythm | None = None,
        decay: float | None = None,
        accumulate: int = 1,
        batch: int = BATCH,
        lr: float = 0.02,
        log_with: Any = None,
        **options: Any,
    ) -> Training:
        _forget()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, log_with=log_with)
        save_under_plain_names(accelerator)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Dropout(0.1), nn.Linear(9, 1))
        average = ModelEmaV3(model, decay=decay) if decay else None
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        schedule = CosineLRScheduler(optimizer, STEPS, warmup_t=3, warmup_lr_init=1e-3, t_in_epochs=False)
        order = TrainingBatches(LENGTH, batch=batch, accumulate=accumulate, epochs=EPOCHS, seed=0)
        model, optimizer = accelerator.prepare(model, optimizer)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return Training(
            accelerator,
            folder=RunFolder(folder),
            task=task or Regression(),
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            order=order,
            load=lambda: load_batches(Points(), order, 0, torch.device("cpu")),
            seed=0,
            average=average,
            rhythm=rhythm or Rhythm(log_every=3),
            problem_of=lambda index: f"sample {index} is torn",
            **options,
        )

    yield make
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def records(training: Training, kind: str) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    found = [record for record in training.log.read() if record["kind"] == kind]
    return [{name: value for name, value in record.items() if name != "samples_per_second"} for record in found]


def steps(training: Training, kind: str) -> list[int]:
    return [record["step"] for record in records(training, kind)]


def weights(training: Training) -> Tensor:
    return training.accelerator.unwrap_model(training.model)[1].weight.detach().clone()


def checkpoints(training: Training) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in training.checkpoints.complete()]


# -- an undisturbed run --------------------------------------------------------------------------------------


def test_a_run_learns_and_says_how_it_ended(training: Callable[..., Training]) -> None:
    run = training()
    before = (weights(run) - 1).square().sum()
    outcome = run.run()
    assert (outcome.step, outcome.finished, outcome.why, outcome.exit_code) == (STEPS, True, "finished", 0)
    assert (weights(run) - 1).square().sum() < before / 4
    assert outcome.metrics["epoch"] == EPOCHS and outcome.metrics["score"] == records(run, "evaluation")[-1]["score"]
    assert outcome.seconds > 0


def test_records_come_every_few_steps_and_at_the_end_of_every_epoch(training: Callable[..., Training]) -> None:
    run = training()
    run.run()
    assert steps(run, "train") == sorted({*range(3, STEPS + 1, 3), *range(5, STEPS + 1, 5)})


def test_a_record_has_every_term_as_its_mean_since_the_last_record_and_the_rate(
    training: Callable[..., Training],
) -> None:
    fine, coarse = training("fine", rhythm=Rhythm(log_every=1)), training("coarse", rhythm=Rhythm(log_every=5))
    fine.run()
    coarse.run()
    each, means = records(fine, "train"), records(coarse, "train")
    assert [record["step"] for record in means] == [5, 10, 15, 20]
    for number, record in enumerate(means):
        part = each[5 * number : 5 * number + 5]
        for name in ("distance", "loss"):
            assert record[name] == pytest.approx(sum(one[name] for one in part) / 5)
        assert record["lr"] == part[-1]["lr"]
    assert len({record["lr"] for record in each}) == STEPS, "a rate of its own for every step"


def test_the_first_step_is_taken_at_the_first_rate_of_the_schedule(training: Callable[..., Training]) -> None:
    rates: list[float] = []
    task = Regression(at_step={0: lambda: rates.append(run.optimizer.param_groups[0]["lr"])})
    run = training(task=task)
    run.run()
    assert rates == [1e-3]


def test_evaluation_comes_every_few_epochs_and_at_the_end(training: Callable[..., Training]) -> None:
    every, third = training("every"), training("third", rhythm=Rhythm(evaluate_every=3))
    every.run()
    third.run()
    assert [record["epoch"] for record in records(every, "evaluation")] == [1, 2, 3, 4]
    assert [record["epoch"] for record in records(third, "evaluation")] == [3, 4]


def test_curves_are_drawn_of_the_log_at_every_evaluation(
    training: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Path, int]] = []
    monkeypatch.setattr(module, "draw_curves", lambda path, log, *_: drawn.append((path, log[-1]["step"])))
    run = training(rhythm=Rhythm(evaluate_every=2))
    run.run()
    assert drawn == [(run.folder.curves, 10), (run.folder.curves, 20)]


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory, main_process_only = "recorder", False, True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, dict[str, float]]] = []

    @property
    def tracker(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, float], step: int, **options: Any) -> None:
        self.told.append((step, values))


def test_trackers_are_told_what_the_log_is(training: Callable[..., Training]) -> None:
    recorder = Recorder()
    run = training(log_with=recorder, rhythm=Rhythm(log_every=3, evaluate_every=2))
    run.accelerator.init_trackers("run")
    run.run()
    for kind in ("train", "evaluation"):
        told = [(step, values) for step, values in recorder.told if any(name.startswith(kind) for name in values)]
        assert [step for step, _ in told] == steps(run, kind)
        for (_, values), record in zip(told, records(run, kind), strict=True):
            assert values.items() <= {f"{kind}/{name}": value for name, value in record.items()}.items()


def test_gradients_are_clipped_over_the_whole_accumulated_batch(training: Callable[..., Training]) -> None:
    moved = {}
    for clip in (None, 1e-3):
        run = training(f"{clip}", accumulate=2, batch=2, clip_norm=clip)
        before = weights(run)
        run.optimizer.param_groups[0]["momentum"] = 0.0
        run.schedule.step_update(3)  # past the warm-up
        rate = run.optimizer.param_groups[0]["lr"]
        run.optimizer_step(0, iter([next(iter(run.load())) for _ in range(2)]))
        moved[clip] = (weights(run) - before).norm().item() / rate
    assert moved[None] > 0.1
    assert 0.5e-3 < moved[1e-3] <= 1.001e-3


def test_accumulated_parts_make_one_step(training: Callable[..., Training]) -> None:
    """Without dropout, whose draws are each part's own."""
    ends = []
    for split in ({}, {"accumulate": 2, "batch": 2}):
        run = training(f"{split}", **split)
        run.accelerator.unwrap_model(run.model)[0].p = 0.0
        run.run()
        ends.append(weights(run))
    assert torch.allclose(*ends, atol=1e-6)


def test_a_step_in_one_part_leaves_out_what_accelerate_would_do_in_vain(
    training: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_vain(*_: Any) -> None:
        raise AssertionError("takes time of every step")

    run = training()
    monkeypatch.setattr(accelerate.optimizer, "is_lomo_available", in_vain, raising=False)  # searches the disk
    monkeypatch.setattr(run.accelerator, "accumulate", in_vain)
    before = weights(run).clone()
    run.optimizer_step(0, iter([next(iter(run.load()))]))
    assert not torch.equal(weights(run), before)
    assert all(weight.grad is None for weight in run.model.parameters())


def test_a_gradient_scaler_leaves_out_a_step_of_infinite_gradients(training: Callable[..., Training]) -> None:
    for factor, moves in ((math.inf, False), (1.0, True)):
        run = training(f"{factor}", task=Regression(loss_at_step={0: lambda loss, _, by=factor: loss * by}))
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        run.optimizer = AcceleratedOptimizer(run.optimizer.optimizer, scaler=run.accelerator.scaler)
        before = weights(run).clone()
        run.optimizer_step(0, iter([next(iter(run.load()))]))
        assert torch.equal(weights(run), before) is not moves
        assert run.accelerator.scaler.get_scale() == (4.0 if moves else 2.0)


def test_a_wrapper_with_a_step_of_its_own_is_asked_for_it(training: Callable[..., Training]) -> None:
    """As DeepSpeed's, whose step is made in the backward."""

    class Wrapper(AcceleratedOptimizer):
        def step(self, closure: Any = None) -> None: ...

    run = training()
    run.optimizer = Wrapper(run.optimizer.optimizer)
    before = weights(run).clone()
    run.optimizer_step(0, iter([next(iter(run.load()))]))
    assert torch.equal(weights(run), before)


def test_every_step_and_part_draws_for_itself(training: Callable[..., Training]) -> None:
    drawn: list[float] = []
    task = Regression(at_step={step: lambda: drawn.append(torch.rand(()).item()) for step in range(STEPS)})
    training(task=task, accumulate=2, batch=2).run()
    assert len(set(drawn)) == len(drawn) == 2 * STEPS


def test_a_skipped_sample_is_told_once_with_its_reason_and_counted(training: Callable[..., Training]) -> None:
    run = training()
    run.run()
    assert [(each["index"], each["why"]) for each in records(run, "skipped")] == [(7, "sample 7 is torn")]
    assert run.skipped == {7}
    assert records(run, "evaluation")[-1]["skipped"] == 1


# -- the best and the averaged weights -----------------------------------------------------------------------


def test_the_best_weights_are_those_of_the_highest_metric(training: Callable[..., Training]) -> None:
    task = Regression(scores=[1.0, 5.0, 5.0, 3.0])
    run = training(task=task)
    outcome = run.run()
    assert outcome.best == {"epoch": 2, "score": 5.0} and outcome.metrics == {"epoch": 4, "score": 3.0}
    best = load_file(run.folder.best / "model.safetensors")
    assert torch.equal(best["1.weight"], task.evaluated[1])
    assert best.keys() == {"1.weight", "1.bias"}


def test_an_evaluation_that_is_no_number_is_never_the_best(training: Callable[..., Training]) -> None:
    task = Regression(scores=[math.nan, -7.0, math.nan, -8.0])
    run = training(task=task)
    assert run.run().best == {"epoch": 2, "score": -7.0}
    assert torch.equal(load_file(run.folder.best / "model.safetensors")["1.weight"], task.evaluated[1])


def test_averaged_weights_are_evaluated_decide_and_are_what_is_deployed(training: Callable[..., Training]) -> None:
    scores = [9.0, 1.0, 2.0, 7.0, 3.0, 4.0, 4.0, 5.0]  # trained and averaged weights in turn
    task = Regression(scores=scores.copy())
    run = training(task=task, decay=0.9)
    outcome = run.run()
    found = [(record["score"], record["score_ema"]) for record in records(run, "evaluation")]
    assert found == list(zip(scores[::2], scores[1::2], strict=True))
    assert run.deciding == "score_ema" and outcome.best["epoch"] == 2

    trained, averaged = task.evaluated[::2], task.evaluated[1::2]
    assert not any(torch.equal(one, other) for one, other in zip(trained, averaged, strict=True))
    assert torch.equal(load_file(run.folder.best / "model.safetensors")["1.weight"], averaged[1])
    assert torch.equal(run.deployable_weights()["1.weight"], averaged[3])
    assert torch.equal(weights(run), trained[3])


def test_the_average_is_the_running_mean_of_the_weights_after_every_step(training: Callable[..., Training]) -> None:
    seen: list[Tensor] = []
    run = training(decay=0.75)
    run.task.at_step = {step: lambda: seen.append(weights(run)) for step in range(STEPS)}
    run.run()
    expected = seen[1]  # the first update takes the weights as they are
    for after in [*seen[2:], weights(run)]:
        expected = 0.75 * expected + 0.25 * after
    assert torch.allclose(run.average.module[1].weight, expected, atol=1e-6)


def test_without_an_average_the_trained_weights_are_deployed(training: Callable[..., Training]) -> None:
    run = training()
    run.run()
    deployed = run.deployable_weights()
    assert deployed.keys() == {"1.weight", "1.bias"} and torch.equal(deployed["1.weight"], weights(run))


# -- checkpoints and going on --------------------------------------------------------------------------------


def test_checkpoints_come_once_per_epoch_or_as_asked_and_at_the_end(training: Callable[..., Training]) -> None:
    epochs = training("epochs", rhythm=Rhythm(keep=9))
    asked = training("asked", rhythm=Rhythm(checkpoint_every=8, keep=9))
    few = training("few", rhythm=Rhythm(checkpoint_every=1, keep=3))
    for run in (epochs, asked, few):
        run.run()
    assert (checkpoints(epochs), checkpoints(asked), checkpoints(few)) == ([5, 10, 15, 20], [8, 16, 20], [18, 19, 20])


def die() -> None:
    raise Blow


@pytest.mark.parametrize("step", [0, 4, 7, 12, STEPS - 1])
def test_a_run_that_died_and_goes_on_ends_as_if_nothing_had_happened(
    training: Callable[..., Training], step: int
) -> None:
    options = {"decay": 0.9, "accumulate": 2, "batch": 2, "rhythm": Rhythm(log_every=4, checkpoint_every=3)}
    whole = training("whole", **options)
    expected = whole.run()

    with pytest.raises(Blow):
        training("died", task=Regression(at_step={step: die}), **options).run()
    resumed = training("died", **options)
    outcome = resumed.run()
    assert torch.equal(weights(resumed), weights(whole))
    assert torch.equal(resumed.average.module[1].weight, whole.average.module[1].weight)
    for kind in ("train", "evaluation", "skipped"):
        assert records(resumed, kind) == records(whole, kind)
    assert (outcome.metrics, outcome.best, resumed.skipped) == (expected.metrics, expected.best, whole.skipped)
    best = [load_file(run.folder.best / "model.safetensors")["1.weight"] for run in (resumed, whole)]
    assert torch.equal(*best)


def test_a_resumed_run_begins_at_the_rate_and_the_step_of_its_checkpoint(training: Callable[..., Training]) -> None:
    rates: dict[str, list[float]] = {"whole": [], "died": []}

    def noting(name: str, **at_step: Any) -> Training:
        run = training(name, rhythm=Rhythm(checkpoint_every=3))

        def note() -> None:
            rates[name].append(run.optimizer.param_groups[0]["lr"])

        run.task.at_step = {step: note for step in range(STEPS)} | {int(key[1:]): each for key, each in at_step.items()}
        return run

    noting("whole").run()
    with pytest.raises(Blow):
        noting("died", _10=die).run()
    rates["died"].clear()
    noting("died").run()
    assert rates["died"] == rates["whole"][9:]


def test_a_finished_run_that_is_resumed_is_finished(training: Callable[..., Training]) -> None:
    first = training()
    expected = first.run()
    again = training(task=Regression(at_step={step: die for step in range(STEPS)}))
    outcome = again.run()
    assert (outcome.finished, outcome.exit_code) == (True, 0)
    assert (outcome.metrics, outcome.best) == (expected.metrics, expected.best)
    assert torch.equal(weights(again), weights(first))
    assert outcome.seconds == pytest.approx(expected.seconds)


def test_the_time_of_a_run_is_that_of_all_its_calls(training: Callable[..., Training]) -> None:
    with pytest.raises(Blow):
        training(task=Regression(at_step={12: die})).run()
    saved = json.loads((training().checkpoints.latest() / "progress.json").read_text())["seconds"]
    assert 0 < saved < training().run().seconds


def test_half_a_checkpoint_is_swept_away_before_the_first_step(training: Callable[..., Training]) -> None:
    run = training()
    (run.folder.checkpoints / ".partial-00000099").mkdir(parents=True)
    run.task.at_step = {0: lambda: left.extend(run.folder.checkpoints.iterdir())}
    left: list[Path] = []
    run.run()
    assert left == []


# -- ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(
    training: Callable[..., Training], number: int, code: int
) -> None:
    handler = signal.getsignal(number)
    run = training(task=Regression(at_step={6: lambda: signal.raise_signal(number)}))
    outcome = run.run()
    assert (outcome.step, outcome.finished, outcome.exit_code) == (7, False, code)
    assert outcome.why == signal.Signals(number).name
    assert checkpoints(run) == [5, 7]
    assert signal.getsignal(number) is handler


def test_the_end_of_the_time_ends_a_run_with_a_checkpoint_and_exit_code_0(training: Callable[..., Training]) -> None:
    run = training(rhythm=Rhythm(minutes=1e-9))
    outcome = run.run()
    assert (outcome.step, outcome.finished, outcome.exit_code, outcome.why) == (1, False, 0, "the time limit")
    assert checkpoints(run) == [1]


def test_a_run_in_slices_of_time_ends_as_one_in_one_go(training: Callable[..., Training]) -> None:
    whole, slices = training("whole"), 0
    whole.run()
    while True:
        run = training("sliced", rhythm=Rhythm(log_every=3, minutes=1e-9))
        slices += 1
        if run.run().finished:
            break
    assert slices == STEPS
    assert torch.equal(weights(run), weights(whole))
    assert records(run, "train") == records(whole, "train")


def test_a_loss_that_is_no_number_ends_a_run_and_names_the_checkpoint_before(
    training: Callable[..., Training],
) -> None:
    task = Regression(loss_at_step={6: lambda loss, model: loss * math.nan})
    run = training(task=task, rhythm=Rhythm(log_every=3))
    with pytest.raises(
        RunError, match=r"diverged: .*loss = nan at step 9.*learning rate.*step-00000005 holds the weights"
    ):
        run.run()
    assert checkpoints(run) == [5]
    assert steps(run, "train") == [3, 5, 6], "what is no number is not recorded"


def test_a_run_that_diverges_at_once_says_that_there_is_no_checkpoint(training: Callable[..., Training]) -> None:
    task = Regression(loss_at_step={0: lambda loss, model: loss * math.inf})
    with pytest.raises(RunError, match="there is no checkpoint from before"):
        training(task=task).run()


def nan_gradients(loss: Tensor, model: nn.Module) -> Tensor:
    """The loss as it is; the slope of a square root at 0 times 0 is no number."""
    return loss + (model[1].weight.sum() * 0).sqrt()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(nan_gradients, id="gradients"),
        pytest.param(lambda loss, model: loss * math.nan, id="loss"),
    ],
)
@pytest.mark.parametrize("step", [4, 6])
def test_weights_that_are_no_numbers_are_never_saved(
    training: Callable[..., Training], step: int, spoil: Callable[..., Tensor]
) -> None:
    run = training(task=Regression(loss_at_step={step: spoil}), decay=0.9, rhythm=Rhythm(checkpoint_every=1))
    with pytest.raises(RunError, match=f"step-{step:08d} holds the weights from before"):
        run.run()
    assert checkpoints(run)[-1] == step
    for path in run.folder.path.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path


# -- several processes ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(tmp_path: Path) -> None:
    """On the embedded digits: with twice the batch per process, so that the global batch is the same."""
    pytest.importorskip("datasets")
    model = "--model-args img_size=8 patch_size=4 depth=2 embed_dim=24 num_heads=2".split()
    common = ["--epochs", "1", "--log-every", "1", "--workers", "0", *model]

    def arguments(out: str, batch: int, *more: str) -> list[str]:
        return ["--out", str(tmp_path / out), "--batch-size", str(batch), *common, *more]

    jobs = [
        {"arguments": arguments("run", 128, "--minutes", "1e-6"), "processes": 2},
        {"arguments": arguments("run", 256, "--resume")},
        {"arguments": arguments("whole", 256)},
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/training_worker.py"), str(tmp_path / "jobs.json")],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[0, 0], [0], [0]], done.stderr
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    trained = [record["step"] for record in log if record["kind"] == "train"]
    assert trained == list(range(1, len(trained) + 1)) and len(trained) > 2
    last = f"checkpoints/step-{len(trained):08d}/model.safetensors"
    run, whole = (load_file(tmp_path / name / last) for name in ("run", "whole"))
    first = load_file(tmp_path / "run/checkpoints/step-00000001/model.safetensors")  # of two processes
    assert first.keys() == run.keys() == whole.keys()
    assert all(torch.allclose(run[name], whole[name], atol=1e-4) for name in run)
