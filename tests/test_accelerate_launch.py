"""The Accelerate example under `accelerate launch`: two processes train the model that one process trains."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples/train_accelerate.py"
ALONE = [sys.executable]
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
LAUNCHED = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
EPOCHS = 2


def run(command: list[str], *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options: dict[str, Any] = {"cwd": folder, "capture_output": True, "encoding": "utf-8", "timeout": 300}
    return subprocess.run([*command, str(SCRIPT), *arguments], env=environment, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accelerate")


@pytest.fixture(scope="module")
def printed(folder: Path) -> list[str]:
    """By one process and by two, with the same arguments and one after the other."""
    arguments = ["--cpu", "--alpha", "0.1", "--epochs", str(EPOCHS)]
    outputs = []
    for command in (ALONE, LAUNCHED):
        done = run(command, *arguments, folder=folder)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    return outputs


@pytest.fixture(scope="module")
def results(printed: list[str], folder: Path) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """What each left behind, the second beside the first."""
    folders = [folder / "runs" / name for name in ("train_accelerate", "train_accelerate-2")]
    assert sorted((folder / "runs").iterdir()) == folders
    return [
        (json.loads((each / "results.json").read_text(encoding="utf-8")), load_file(each / "model.safetensors"))
        for each in folders
    ]


@pytest.mark.slow
def test_the_launched_run_is_of_two_processes(results) -> None:
    assert [result["processes"] for result, _ in results] == [1, 2]


@pytest.mark.slow
def test_two_processes_reach_the_weights_of_one(results) -> None:
    (_, one), (_, two) = results
    assert one.keys() == two.keys()
    a, b = (torch.cat([weights[name].flatten() for name in one]) for weights in (one, two))
    assert (a - b).norm() / a.norm() < 2e-3  # AdamW makes steps of full length out of rounding where gradients are 0


@pytest.mark.slow
def test_two_processes_report_the_losses_and_accuracies_of_one(results) -> None:
    (one, _), (two, _) = results
    assert len(one["epochs"]) == len(two["epochs"]) == EPOCHS
    for expected, found in zip(one["epochs"], two["epochs"], strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=0.003)
    assert one["epochs"][-1]["loss"] < one["epochs"][0]["loss"]


@pytest.mark.slow
def test_the_summary_names_every_file_and_is_printed_once(printed: list[str], results) -> None:
    for output, processes, out in zip(printed, (1, 2), ("train_accelerate", "train_accelerate-2"), strict=True):
        for file in ("model.safetensors", "results.json"):
            assert output.count(str(Path("runs") / out / file)) == 1
        assert f"Processes: {processes}, batch: 32, epochs: {EPOCHS}" in output


@pytest.mark.slow
def test_stock_timm_takes_the_checkpoint_whole_and_reaches_the_accuracy(printed: list[str], results) -> None:
    build_model = runpy.run_path(str(SCRIPT), run_name="train_accelerate")["build_model"]
    for output, (result, weights) in zip(printed, results, strict=True):
        build_model().load_state_dict(weights, strict=True)
        trained, reloaded = re.search(r"([\d.]+) when trained, ([\d.]+) in stock timm", output).groups()
        assert trained == f"{result['epochs'][-1]['accuracy']:.4f}"
        assert float(reloaded) == pytest.approx(float(trained), abs=0.003)


@pytest.mark.slow
def test_processes_that_would_each_train_alone_are_refused(tmp_path: Path) -> None:
    done = run(LAUNCHED, folder=tmp_path)
    assert done.returncode != 0
    assert "2 processes were started; without a GPU each would train alone: add --cpu" in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_lists_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    options = set(re.findall(r"^  (--\w+)", text, re.MULTILINE))
    assert options == {"--epochs", "--batch", "--cycles", "--rho", "--alpha", "--seed", "--cpu", "--out"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cycles", "1"], "--cycles: needs a finite number of at least 2, got 1"),
        (["--epochs", "0"], "--epochs: needs a finite number of at least 1, got 0"),
        (["--batch", "0"], "--batch: needs a finite number of at least 1, got 0"),
        (["--batch", "1001"], "--batch: there are 1000 images, got 1001"),
        (["--rho", "nan"], "--rho: needs a finite number of at least 0, got nan"),
        (["--alpha", "-1"], "--alpha: needs a finite number of at least 0, got -1.0"),
        (["--seed", "-1"], "--seed: needs a finite number of at least 0, got -1"),
    ],
)
def test_bad_arguments_end_before_any_work(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
