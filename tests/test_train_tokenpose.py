"""The whole pose training: what it leaves behind, what it refuses, killed and resumed, on one process or two."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

pytest.importorskip("pycocotools")

from cyclekd.integrations.tokenpose import from_pretrained
from cyclekd.integrations.tokenpose.figures.draw import write_figures
from cyclekd.integrations.tokenpose.training.train import main
from test_resume import all_equal, records, run

Command = Callable[..., tuple[int, str, list[str]]]
SIZE = ["input_size=64,48", "depth=2", "dim=32", "heads=4", "stage1_width=8"]
PEOPLE, VALIDATED = 45, 13


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic figures, one in an image."""
    folder = tmp_path_factory.mktemp("figures") / "data"
    return write_figures(folder, train=PEOPLE, val=VALIDATED, seed=1, size=(96, 128), people=(1, 1))


def arguments(data: Path, out: Path, *more: str, batch: int = 8) -> list[str]:
    options = {"data": data, "out": out, "model": "sdpose_s_v1", "epochs": 2, "batch-size": batch, "log-every": 1}
    options |= {"workers": 0, "warmup-steps": 2, "lr-drop-epochs": 1, "cache-dir": data.parent / "cache"}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))] + [
        "--model-args",
        *SIZE,
        *more,
    ]


@pytest.fixture
def start(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs the command on the figures: exit code, stdout, lines of stderr."""

    def command(*more: str) -> tuple[int, str, list[str]]:
        forget()
        code = main("what it is", [*arguments(data, tmp_path / "run", *more), "--cpu"])
        printed = capsys.readouterr()
        return code, printed.out, printed.err.splitlines()

    yield command
    forget()


def forget() -> None:
    """Accelerate's state is global: the next start begins without it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_run_ends_with_ap_per_cycle_and_the_plain_model(start: Command, tmp_path: Path) -> None:
    code, printed, _ = start()
    assert code == 0
    folder = tmp_path / "run"
    evaluations = [record for record in records(folder) if record["kind"] == "evaluation"]
    assert [record["people"] for record in evaluations] == [VALIDATED, VALIDATED]
    assert all(f"{name}_{cycle}" in evaluations[-1] for name in ("AP", "AP50", "AR") for cycle in (1, 2))
    assert f"AP {evaluations[-1]['AP_1']:.4f}" in printed and "2 cycles" in printed
    for name in ("model/model.safetensors", "model/config.json", "curves.png", "README.md", "log.jsonl"):
        assert (folder / name).is_file() and name in printed
    model = from_pretrained(folder / "model", cycles=1)
    assert model(torch.randn(1, 3, 64, 48)).shape == (1, 17, 16, 12)


def test_a_run_learns(start: Command, tmp_path: Path) -> None:
    assert start("--epochs", "6", "--evaluate-every", "6", "--lr-drop-epochs", "--warmup-steps", "0")[0] == 0
    losses = [record["task_1"] for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])


def test_one_cycle_is_the_plain_baseline(start: Command, tmp_path: Path) -> None:
    code, printed, _ = start("--cycles", "1")
    assert code == 0 and "1 cycles" in printed
    assert not any(name.startswith("tokens") for record in records(tmp_path / "run") for name in record)


def test_a_model_with_other_key_points_starts_from_an_earlier_one(start: Command, data: Path, tmp_path: Path) -> None:
    assert start()[0] == 0
    (tmp_path / "run").rename(tmp_path / "first")
    earlier = str(tmp_path / "first/model")
    assert start("--init-from", earlier, "--epochs", "1")[0] == 0
    shutil.rmtree(tmp_path / "run")
    other = shutil.copytree(data, tmp_path / "other")
    for file in (other / "annotations").glob("*.json"):
        keep_key_points(file, 13)
    forget()
    options = ["--data", str(other), "--cache-dir", str(tmp_path / "cache"), "--init-from", earlier, "--epochs", "1"]
    code, _, errors = start(*options)
    assert code == 2 and "strict=False" in errors[-1]
    assert start(*options, "--new-head")[0] == 0
    assert from_pretrained(tmp_path / "run/model").config.num_keypoints == 13


def keep_key_points(file: Path, count: int) -> None:
    content = json.loads(file.read_text())
    content["categories"][0]["keypoints"] = content["categories"][0]["keypoints"][:count]
    content["categories"][0].pop("skeleton", None)
    content["categories"][0]["sigmas"] = [0.05] * count
    for annotation in content["annotations"]:
        annotation["keypoints"] = annotation["keypoints"][: 3 * count]
        annotation["num_keypoints"] = sum(visible > 0 for visible in annotation["keypoints"][2::3])
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "nowhere has no train split"),
        (["--model", "deit_tiny"], "no pose model is called 'deit_tiny'"),
        (["--model", "sdpose_reg"], "this training is for heat maps"),
        (["--scale", "2"], "--scale 2.0: has to be between 0 and 0.99"),
        (["--train-annotations", "a.json"], "--train-annotations and --train-images go together"),
        (["--batch-size", "500"], "give a smaller --batch-size"),
        (["--new-head"], "--new-head: goes with --init-from"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(start: Command, tmp_path: Path, more: list[str], message: str) -> None:
    code, _, errors = start(*more)
    assert code == 2 and errors[-1].startswith("error: ") and message in errors[-1]
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_truncated_photograph_is_replaced_in_training_and_told(start: Command, data: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(data, tmp_path / "damaged")
    photo = sorted((damaged / "train2017").iterdir())[3]
    photo.write_bytes(photo.read_bytes()[:200])
    code, printed, _ = start("--data", str(damaged), "--no-cache", "--epochs", "1", "--batch-size", "9")
    assert code == 0 and "1 people with unreadable images were replaced" in printed
    (skipped,) = [record for record in records(tmp_path / "run") if record["kind"] == "skipped"]
    assert photo.name in skipped["why"]


@pytest.mark.slow
def test_a_killed_run_that_is_resumed_ends_bit_for_bit_like_an_undisturbed_one(data: Path, tmp_path: Path) -> None:
    """Two processes, a worker each, accumulation, half bodies and all other views, two kills."""
    step = random.Random().randrange(1, 3)  # another in every run of the tests
    more = ["--accumulate", "2", "--workers", "1", "--checkpoint-every", "1", "--clip-grad", "1"]
    plain, killed = (arguments(data, tmp_path / name, *more, batch=5) for name in ("undisturbed", "killed"))
    blows = [
        {"place": "between steps", "step": step, "signal_number": signal.SIGKILL},
        {"place": "in checkpoint", "number": 1},
        None,
    ]
    both = {"command": "tokenpose", "processes": 2}
    jobs = [
        {"arguments": plain, **both},
        *({"arguments": [*killed, "--resume"], "blow": blow, **both} for blow in blows),
    ]
    codes, printed = run(tmp_path, *jobs)
    assert codes == [[0, 0], [-9, -9], [-9, -9], [0, 0]], f"killed after step {step}\n{printed}"
    for name in ("model/model.safetensors", "best/model.safetensors"):
        one, other = (load_file(tmp_path / folder / name) for folder in ("undisturbed", "killed"))
        assert all_equal(one, other), f"{name}, killed after step {step}"
    assert records(tmp_path / "undisturbed") == records(tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_have_the_losses_and_figures_of_one(data: Path, tmp_path: Path) -> None:
    """That accumulates as many batches: statistics of batch norm are those of a batch on one device."""
    one = arguments(data, tmp_path / "one", "--accumulate", "2")
    two = arguments(data, tmp_path / "two")
    jobs = [{"arguments": one, "command": "tokenpose"}, {"arguments": two, "command": "tokenpose", "processes": 2}]
    codes, printed = run(tmp_path, *jobs)
    assert codes == [[0], [0, 0]], printed
    expected, found = (records(tmp_path / name) for name in ("one", "two"))
    for record, other in zip(expected, found, strict=True):
        assert other.pop("kind") == record["kind"]
        numbers: dict[str, Any] = {name: value for name, value in record.items() if name != "kind"}
        if record["kind"] == "train":
            assert other == pytest.approx(numbers, rel=1e-5, abs=1e-6)
        else:  # running statistics see both batches in turn, or one device's each
            assert other["people"] == VALIDATED
