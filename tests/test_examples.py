"""The examples run as users run them, at a size of seconds, and what they leave behind is what they claim."""

import csv
import json
import os
import random
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Subset
from transformers import LlamaForCausalLM, ViTForImageClassification

from cyclekd import wrap_multicycle

ROOT = Path(__file__).parents[1]
QUICKSTART, WRAP_HF = ROOT / "examples/quickstart.py", ROOT / "examples/wrap_hf.py"
SCHEDULES, TRAIN_LM = ROOT / "examples/schedules.py", ROOT / "examples/train_lm.py"

pytestmark = pytest.mark.slow


def run(script, *arguments, folder):
    """Start `script` in `folder`, so that its default output folder is found below it."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    started = {"cwd": folder, "env": environment, "capture_output": True, "encoding": "utf-8"}
    done = subprocess.run([sys.executable, str(script), *arguments], **started)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    printed = run(QUICKSTART, "--seeds", "2", "--epochs", "1", folder=folder)
    return printed, folder / "runs/quickstart"


@pytest.fixture(scope="module")
def functions():
    return runpy.run_path(str(QUICKSTART), run_name="quickstart")


def test_quickstart_names_every_file_it_wrote(quickstart):
    printed, folder = quickstart
    names = {path.name for path in folder.iterdir()}
    assert names == {"curves.png", "results.csv", "results.json", "self-distilled.safetensors"}
    assert all(str(Path("runs/quickstart") / name) in printed for name in names)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_quickstart_prints_the_table_it_saves(quickstart):
    printed, folder = quickstart
    with (folder / "results.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["measure", "plain", "equal compute", "self-distilled"]
    for row in rows:
        assert re.search(r"\s+".join(re.escape(cell) for cell in row if cell), printed)


def test_quickstart_reports_what_it_promises(quickstart):
    _, folder = quickstart
    with (folder / "results.csv").open(encoding="utf-8") as file:
        table = {row["measure"]: row for row in csv.DictReader(file)}
    difference = re.compile(r"[+-]\d+\.\d\d ± \d+\.\d\d")
    assert difference.fullmatch(table["one pass minus plain"]["self-distilled"])
    assert difference.fullmatch(table["one pass minus plain"]["equal compute"])
    assert difference.fullmatch(table["one pass minus equal compute"]["self-distilled"])
    assert difference.fullmatch(table["all 2 cycles minus plain"]["self-distilled"])
    for measure in ("parameters", "MACs per image, one pass"):
        assert table[measure]["self-distilled"] == table[measure]["plain"]
    assert table["step FLOPs / hand-written loop"]["self-distilled"] == "1.000"
    for measure in ("step time / plain", "step time / hand-written loop"):
        assert re.fullmatch(r"\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]", table[measure]["self-distilled"])


def test_quickstart_checkpoint_gives_the_trained_accuracy(quickstart, functions):
    _, folder = quickstart
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    stock = functions["build_model"](seed=5, device="cpu")
    stock.load_state_dict(load_file(folder / "self-distilled.safetensors"), strict=True)
    test_set = functions["load_split"](0, "cpu")[2:]
    accuracy = functions["evaluate"](stock, *test_set, cycles=1)["one_pass"]
    assert accuracy == results["curves"]["self-distilled"][0]["one_pass"][-1] == results["reloaded_accuracy"]


def test_quickstart_gives_no_interval_for_one_seed(functions):
    assert functions["difference"]([91.5], [90.0]) == "+1.50 n/a (needs 2 seeds)"


def test_quickstart_difference_is_a_paired_t_interval(functions):
    # differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t quantile 4.3027 at 2 degrees of freedom
    assert functions["difference"]([11.0, 22.0, 33.0], [10.0, 20.0, 30.0]) == "+2.00 ± 2.48"


def test_quickstart_never_writes_into_a_folder_with_files(functions, tmp_path):
    wanted = tmp_path / "run"
    assert functions["new_folder"](wanted) == wanted
    assert functions["new_folder"](wanted) == wanted  # still empty
    for folder in (wanted, tmp_path / "run-2"):
        folder.mkdir(exist_ok=True)
        (folder / "results.csv").touch()
    assert functions["new_folder"](wanted) == tmp_path / "run-3"


@pytest.fixture(scope="module")
def wrap_hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrap_hf")
    return run(WRAP_HF, "--epochs", "1", folder=folder), folder / "runs/wrap_hf"


def test_wrap_hf_checkpoint_gives_the_trained_accuracy(wrap_hf):
    printed, _ = wrap_hf
    trained, reloaded = re.search(r"([\d.]+) when trained, ([\d.]+) in stock transformers", printed).groups()
    assert trained == reloaded


def test_wrap_hf_saves_a_checkpoint_that_stock_transformers_takes_whole(wrap_hf):
    _, folder = wrap_hf
    model, loading = ViTForImageClassification.from_pretrained(folder / "model", output_loading_info=True)
    assert type(model) is ViTForImageClassification
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert "cycle" not in (folder / "model/config.json").read_text()


def test_wrap_hf_logs_every_term_of_the_loss(wrap_hf):
    printed, folder = wrap_hf
    saved = next((folder / "checkpoints").glob("*/trainer_state.json"))
    (log,) = [each for each in json.loads(saved.read_text(encoding="utf-8"))["log_history"] if "loss" in each]
    assert log["task_1"] + log["task_2"] + log["tokens_1_2"] == pytest.approx(log["loss"], rel=1e-4)
    assert f"'task_2': '{log['task_2']:.4}" in printed  # what the Trainer prints comes from a callback too


@pytest.fixture(scope="module")
def schedules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schedules")
    (folder / "runs/schedules").mkdir(parents=True)
    (folder / "runs/schedules/steps.csv").write_text("of an earlier run")
    return run(SCHEDULES, "--epochs", "1", "--schedule", "random", folder=folder), folder / "runs"


def test_schedules_names_every_file_it_wrote_and_none_was_there_before(schedules):
    printed, runs = schedules
    assert {path.name for path in (runs / "schedules-2").iterdir()} == {"steps.csv", "steps.png"}
    assert all(str(Path("runs/schedules-2") / name) in printed for name in ("steps.csv", "steps.png"))
    assert (runs / "schedules-2/steps.png").read_bytes().startswith(b"\x89PNG")
    assert (runs / "schedules/steps.csv").read_text() == "of an earlier run"


def test_schedules_prints_the_mean_of_the_table_it_saves(schedules):
    printed, runs = schedules
    with (runs / "schedules-2/steps.csv").open(encoding="utf-8") as file:
        cycles = [int(row["cycles"]) for row in csv.DictReader(file)]
    assert len(cycles) == 32 and set(cycles) == {1, 2, 3}
    assert f"{sum(cycles) / 32:.2f} passes through the blocks per step, mean of 32 steps" in printed


DRAWN = random.Random(5)
SIX_STEPS = {
    "ramp": ([1, 1, 2, 2, 3, 3], [0.3] * 6),
    "random": ([DRAWN.randint(1, 3) for _ in range(6)], [0.3] * 6),
    "weight": ([3] * 6, [0.0, 0.05, 0.1, 0.15, 0.2, 0.25]),
}


@pytest.mark.parametrize("schedule", SIX_STEPS)
def test_every_step_runs_the_blocks_as_often_as_its_schedule_says(schedule):
    functions = runpy.run_path(str(SCHEDULES), run_name="schedules")
    torch.manual_seed(0)
    model = wrap_multicycle(functions["tiny_vit"](), cycles=3)
    runs = []
    model.register_forward_pre_hook(lambda *args: runs.append(0))
    model.blocks[0].register_forward_hook(lambda *args: runs.append(runs.pop() + 1))
    settings = Namespace(schedule=schedule, epochs=3, cycles=3, rho=0.3, seed=5)
    rows = functions["train"](model.train(), Subset(functions["digits"]()[0], range(40)), settings)
    cycles, weights = SIX_STEPS[schedule]
    assert runs == [row["cycles"] for row in rows] == cycles
    assert [row["rho"] for row in rows] == pytest.approx(weights)
    assert [row["token term"] > 0 for row in rows] == [
        n > 1 and weight > 0 for n, weight in zip(cycles, weights, strict=True)
    ]


@pytest.fixture(scope="module")
def train_lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train_lm")
    return run(TRAIN_LM, "--steps", "3", "--cycles", "3", folder=folder), folder / "runs/train_lm"


def test_train_lm_checkpoint_writes_the_text_it_prints(train_lm):
    printed, folder = train_lm
    written_by = runpy.run_path(str(TRAIN_LM), run_name="train_lm")["written_by"]
    model, loading = LlamaForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert f"The model writes: {written_by(model)!r}" in printed


def test_train_lm_prints_a_loss_for_every_cycle(train_lm):
    printed, _ = train_lm
    losses = re.search(r"cycle 1 \(the deployed one\) to 3: (.*)", printed).group(1).split(", ")
    assert len(set(losses)) == 3
    assert all(1 < float(loss) < 6 for loss in losses)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (QUICKSTART, ["--cycles", "1"], "--cycles: needs a finite number of at least 2, got 1"),
        (QUICKSTART, ["--seeds", "0"], "--seeds: needs a finite number of at least 1, got 0"),
        (QUICKSTART, ["--epochs", "0"], "--epochs: needs a finite number of at least 1, got 0"),
        (QUICKSTART, ["--rho", "nan"], "--rho: needs a finite number of at least 0, got nan"),
        (QUICKSTART, ["--alpha", "-1"], "--alpha: needs a finite number of at least 0, got -1.0"),
        (QUICKSTART, ["--device", "abacus"], "--device: 'abacus' does not work here"),
        (QUICKSTART, ["--out", "file/below"], "--out: "),
        (WRAP_HF, ["--cycles", "1"], "--cycles: needs at least 2, got 1"),
        (WRAP_HF, ["--epochs", "0"], "--epochs: needs at least 1, got 0"),
        (SCHEDULES, ["--epochs", "0"], "--epochs: needs a finite number of at least 1, got 0"),
        (SCHEDULES, ["--cycles", "1"], "--cycles: needs a finite number of at least 2, got 1"),
        (SCHEDULES, ["--rho", "inf"], "--rho: needs a finite number of at least 0, got inf"),
        (SCHEDULES, ["--schedule", "spiral"], "--schedule: invalid choice: 'spiral'"),
        (TRAIN_LM, ["--steps", "0"], "--steps: needs at least 1, got 0"),
        (TRAIN_LM, ["--cycles", "1"], "--cycles: needs at least 2, got 1"),
    ],
)
def test_bad_arguments_end_before_any_work(script, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.name, *arguments])
    Path("file").touch()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()
