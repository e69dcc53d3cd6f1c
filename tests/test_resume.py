"""A killed training that is resumed ends as if nothing had happened; two processes end as one does."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

pytest.importorskip("datasets")

ROOT = Path(__file__).parents[1]
TRAIN, VALIDATION, CLASSES = 200, 45, 10
STEPS_PER_EPOCH = 6
EVERYTHING = ["--accumulate", "2", "--ema", "0.9", "--mixup", "0.8", "--cutmix", "1", "--drop-path", "0.2"]
EVERYTHING += ["--rand-augment", "rand-m9-n2-mstd0.5-inc1", "--erase", "0.25", "--repeated-augmentation", "3"]
EVERYTHING += ["--workers", "1", "--checkpoint-every", "4", "--clip-grad", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as class folders: 200 images to train on, and 45, which neither 2 nor 8 divides, to validate."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    for number, (pixels, label) in enumerate(zip(images[: TRAIN + VALIDATION], labels, strict=False)):
        place = folder / ("train" if number < TRAIN else "val") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels.reshape(8, 8) * 15).astype("uint8")).save(place / f"{number:04}.png")
    return folder


def arguments(data: Path, out: Path, *more: str, batch: int = 8) -> list[str]:
    model = "img_size=8 patch_size=4 depth=2 embed_dim=24 num_heads=2".split()
    options = {
        "data": data,
        "out": out,
        "input-size": 8,
        "crop": "pad",
        "crop-pct": 1,
        "epochs": 2,
        "batch-size": batch,
    }
    options |= {"warmup-epochs": 1, "lr": 1e-2, "log-every": 1, "cycles": 2}
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [*given, "--model-args", *model, *more]


def run(folder: Path, *jobs: dict[str, Any]) -> tuple[list[list[int]], str]:
    """Exit codes of every process of every job, and all that was printed."""
    listed = folder / "jobs.json"
    listed.write_text(json.dumps([{**job, "arguments": [str(a) for a in job["arguments"]]} for job in jobs]))
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    worker = [sys.executable, str(ROOT / "tests/training_worker.py"), str(listed)]
    done = subprocess.run(worker, env=environment, cwd=folder, capture_output=True, encoding="utf-8", timeout=400)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def records(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in lines]


def all_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_killed_run_that_is_resumed_ends_bit_for_bit_like_an_undisturbed_one(data: Path, tmp_path: Path) -> None:
    """Two processes, a worker each, mixup, cutmix, dropped paths, averaged weights, accumulation, three kills."""
    dice = random.Random(os.getpid())  # other steps in every run of the tests
    in_accumulation, between_steps, checkpoint = dice.randrange(4, 8), dice.randrange(4, 8), 1
    plain, killed = (arguments(data, tmp_path / name, *EVERYTHING) for name in ("undisturbed", "killed"))
    kill = {"signal_number": signal.SIGKILL}
    blows = [
        {"place": "in accumulation", "step": in_accumulation, "accumulate": 2, **kill},
        {"place": "between steps", "step": between_steps, **kill},
        {"place": "in checkpoint", "number": checkpoint},
        None,
    ]
    jobs = [{"arguments": plain, "processes": 2}]
    jobs += [{"arguments": [*killed, "--resume"], "processes": 2, "blow": blow} for blow in blows]
    codes, printed = run(tmp_path, *jobs)
    where = f"killed in accumulation of step {in_accumulation}, after step {between_steps}\n{printed}"
    assert codes[0] == codes[-1] == [0, 0], where
    assert all(code == [-9, -9] for code in codes[1:-1]), where

    for name in ("model/model.safetensors", "best/model.safetensors", "checkpoints/step-00000012/averaged.safetensors"):
        one, other = (load_file(tmp_path / run / name) for run in ("undisturbed", "killed"))
        assert all_equal(one, other), f"{name} {where}"
    assert records(tmp_path / "undisturbed") == records(tmp_path / "killed"), where
    assert not list((tmp_path / "killed/checkpoints").glob(".*")), "half a checkpoint was left behind"


@pytest.mark.slow
def test_a_run_of_four_processes_resumes_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """More than two have an order in which gradients are summed, which PyTorch changes after the first backward."""
    more = ["--workers", "0", "--checkpoint-every", "4"]
    plain, killed = (arguments(data, tmp_path / name, *more) for name in ("undisturbed", "killed"))
    blow = {"place": "between steps", "step": 6, "signal_number": signal.SIGKILL}
    jobs = [{"arguments": plain, "processes": 4}, {"arguments": killed, "processes": 4, "blow": blow}]
    codes, printed = run(tmp_path, *jobs, {"arguments": [*killed, "--resume"], "processes": 4})
    assert codes == [[0] * 4, [-9] * 4, [0] * 4], printed
    one, other = (load_file(tmp_path / run / "model/model.safetensors") for run in ("undisturbed", "killed"))
    assert all_equal(one, other)
    assert records(tmp_path / "undisturbed") == records(tmp_path / "killed")


@pytest.mark.slow
def test_an_evaluation_that_a_stop_put_off_is_logged_once(data: Path, tmp_path: Path) -> None:
    """Stopped at the end of an epoch of 25 steps, resumed, killed before the next checkpoint, resumed again."""
    more = ["--workers", "0", "--checkpoint-every", "100"]
    plain, stopped = (arguments(data, tmp_path / name, *more) for name in ("undisturbed", "stopped"))
    blows = [
        {"place": "between steps", "step": 24, "signal_number": signal.SIGTERM},
        {"place": "between steps", "step": 26, "signal_number": signal.SIGKILL},
        None,
    ]
    jobs = [{"arguments": plain}, *({"arguments": [*stopped, "--resume"], "blow": blow} for blow in blows)]
    codes, printed = run(tmp_path, *jobs)
    assert codes == [[0], [143], [-9], [0]], printed
    assert records(tmp_path / "undisturbed") == records(tmp_path / "stopped")


@pytest.mark.slow
def test_running_statistics_of_two_processes_see_every_batch_once(data: Path, tmp_path: Path) -> None:
    options = {"data": data, "out": tmp_path / "run", "model": "resnet10t", "input-size": 32, "crop": "pad"}
    options |= {"cycles": 1, "epochs": 1, "warmup-epochs": 0, "batch-size": 8, "workers": 0}
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    codes, printed = run(tmp_path, {"arguments": given, "processes": 2})
    assert codes == [[0, 0]], printed
    weights = load_file(tmp_path / "run/model/model.safetensors")
    counts = {int(value) for name, value in weights.items() if name.endswith("num_batches_tracked")}
    assert counts == {TRAIN // 16}


@pytest.mark.slow
def test_an_error_while_workers_read_ends_the_process(tmp_path: Path) -> None:
    """Workers leave SIGTERM to their parent, which Python would then wait for in vain."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from cyclekd.integrations.runs.loading import load_batches
batches = iter(load_batches(list(range(100)), [[i] for i in range(100)], 2, torch.device("cpu")))
next(batches)
raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 7


@pytest.mark.slow
def test_two_processes_have_the_losses_and_metrics_of_one(data: Path, tmp_path: Path) -> None:
    """The same global batch, with augmentation on the device, mixup and cutmix; the token weight is a fixed one."""
    more = ["--augment-on", "device", "--drop-path", "0", "--alpha", "0.1", "--workers", "0"]
    one = arguments(data, tmp_path / "one", *more, batch=32)
    accumulated = arguments(data, tmp_path / "accumulated", *more, "--accumulate", "4", batch=8)
    two = arguments(data, tmp_path / "two", *more, batch=16)
    jobs = [{"arguments": one}, {"arguments": accumulated}, {"arguments": two, "processes": 2}]
    codes, printed = run(tmp_path, *jobs)
    assert codes == [[0], [0], [0, 0]], printed

    expected = records(tmp_path / "one")
    assert sum(record["kind"] == "train" for record in expected) == 2 * STEPS_PER_EPOCH
    for name in ("accumulated", "two"):
        found = records(tmp_path / name)
        assert len(found) == len(expected)
        for one_record, record in zip(expected, found, strict=True):
            assert record.pop("kind") == one_record["kind"]
            numbers = {name: value for name, value in one_record.items() if name != "kind"}
            assert record == pytest.approx(numbers, rel=1e-5, abs=1e-6)
    evaluations = [record for record in records(tmp_path / "two") if record["kind"] == "evaluation"]
    assert [record["images"] for record in evaluations] == [VALIDATION, VALIDATION]


@pytest.mark.slow
def test_signals_end_a_run_with_a_checkpoint_and_a_full_disk_keeps_the_one_before(data: Path, tmp_path: Path) -> None:
    plain = [*EVERYTHING, "--workers", "0"]
    stopped, full = (arguments(data, tmp_path / name, *plain) for name in ("stopped", "full"))
    jobs: list[dict[str, Any]] = [
        {"arguments": stopped, "blow": {"place": "between steps", "step": 1, "signal_number": signal.SIGTERM}},
        {
            "arguments": [*stopped, "--resume"],
            "blow": {"place": "between steps", "step": 2, "signal_number": signal.SIGINT},
        },
        {"arguments": full, "blow": {"place": "full disk", "after_step": 5, "largest_file": 20_000}},
        {"arguments": [*full, "--resume", "--minutes", "1e-6"]},
    ]
    codes, printed = run(tmp_path, *jobs)
    assert codes == [[143], [130], [2], [0]], printed
    written = sorted(path.name for path in (tmp_path / "stopped/checkpoints").iterdir())
    assert written == ["step-00000002", "step-00000003"]
    assert "stopped by SIGTERM: go on with --out" in printed
    assert "the checkpoint of step 8 could not be written" in printed
    assert "step-00000004 is complete and can be resumed from" in printed
    assert "stopped by the time limit" in printed
    left = sorted(path.name for path in (tmp_path / "full/checkpoints").iterdir())
    assert left[:1] == ["step-00000004"] and not any(name.startswith(".") for name in left)
