"""`benchmarks/cost.py pose` counts what the papers' tools count, and what they leave out."""

import csv
import sys

import pytest
import torch

from benchmarks import cost
from benchmarks.pose import costs
from cyclekd import run_cycles
from cyclekd.integrations.tokenpose import create_model, list_models

COUNTED = {  # name: million parameters, conv + linear, with attention; of the published modules, by other counters
    "tokenpose_s_v1": (6.621, 2.383, 2.726),
    "tokenpose_s_v2": (6.228, 4.648, 7.487),
    "tokenpose_b": (13.465, 5.933, 6.276),
    "tokenpose_b_narrow": (13.146, 5.127, 5.471),
    "tokenpose_l_d24": (27.482, 11.506, 12.193),
    "sdpose_t": (4.399, 1.779, 1.951),
    "ppt_s": (6.621, 1.995, 2.186),
    "tokenreg_s": (5.364, 2.361, 2.705),
}
ALL_CYCLES = {"sdpose_t": 3.544, "sdpose_s_v1": 4.299, "sdpose_s_v2": 13.821, "sdpose_b_narrow": 7.043}


@pytest.mark.parametrize("name", COUNTED)
def test_sizes_are_those_of_the_published_modules(name):
    row = costs.size_row(name)
    found = [float(row[column]) for column in ("params", "conv + linear", "with attention")]
    assert found == pytest.approx(COUNTED[name], abs=0.003)  # what pruning needs to choose is counted here


@pytest.mark.parametrize("name", ALL_CYCLES)
def test_all_cycles_cost_what_the_released_forward_costs(name):
    assert float(costs.size_row(name)["all cycles, with attention"]) == pytest.approx(ALL_CYCLES[name], abs=0.002)


def test_a_single_pass_of_a_wrapped_model_computes_what_the_plain_one_does():
    images = torch.zeros(1, 3, 256, 192)
    plain, wrapped = create_model("tokenpose_s_v1").eval(), create_model("sdpose_s_v1").eval()
    assert costs.giga_macs(lambda: wrapped(images)) == costs.giga_macs(lambda: plain(images))
    assert costs.giga_macs(lambda: run_cycles(wrapped, images))[1] > 1.5 * costs.giga_macs(lambda: plain(images))[1]


def test_every_system_of_the_paper_has_a_row_and_none_has_two(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(costs, "RESULTS", tmp_path)
    monkeypatch.setattr(costs, "giga_macs", lambda call: (1.0, 2.0))
    monkeypatch.setattr(costs, "PRESETS", {name: costs.PRESETS[name] for name in ("tokenpose_t_6", "sdpose_t")})
    monkeypatch.setattr(sys, "argv", ["cost.py", "pose", "--rounds", "0"])
    cost.main()
    (path,) = tmp_path.glob("cost-pose-*.csv")
    rows = {row["model"]: row for row in csv.DictReader(path.open())}
    assert rows.keys() == {"tokenpose_t_6", "sdpose_t", *costs.PAPER_ONLY}
    assert rows["tokenpose_t_6"]["paper params"] == "" and rows["sdpose_t"]["paper GFLOPs"] == "1.8"
    assert rows["OKDHP-4HG"]["params"] == "paper only" and rows["OKDHP-4HG"]["paper params"] == "24.0"
    assert all(row["torch"] and row["command"] for row in rows.values())
    assert "left standing" in capsys.readouterr().out


def test_what_the_paper_lists_is_built_or_said_to_be_the_papers_alone():
    assert costs.PAPER.keys() <= set(list_models())
    assert not costs.PAPER_ONLY.keys() & set(list_models())


@pytest.mark.parametrize("arguments", [["--rounds", "1"], ["--batch-size", "1"], ["--device", "cuda"]])
def test_bad_arguments_are_refused_before_work(arguments, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        costs.parse_arguments(arguments)
    assert stopped.value.code == 2 and arguments[0] in capsys.readouterr().err


@pytest.mark.slow
def test_times_are_rows_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(costs, "RESULTS", tmp_path)
    monkeypatch.setattr(costs, "size_row", lambda name: {"model": name})
    monkeypatch.setattr(costs, "paper_row", lambda name: {"model": name})
    monkeypatch.setattr(costs, "TIMED", ("sdpose_t",))
    monkeypatch.setattr(costs, "TRAINED", ("tokenpose_t_6",))
    monkeypatch.setattr("benchmarks.speed.timing.WARM_UP", 1)
    costs.main(["--rounds", "2", "--batch-size", "2", "--eval-batch-size", "1"])
    (path,) = tmp_path.glob("cost-pose-times-cpu-*.csv")
    rows = list(csv.DictReader(path.open()))
    assert [row["variant"] for row in rows] == [
        "sdpose_t, plain model",
        "sdpose_t, plain model again",
        "sdpose_t, wrapped",
        "sdpose_t, all cycles",
        "tokenpose_t_6, plain loop in fp32",
        "tokenpose_t_6",
    ]
    assert all(float(row["milliseconds"]) > 0 and "[" in row["speed x base"] for row in rows)


def test_differences_are_ours_minus_the_papers_and_of_one_cycle_without_attention():
    row = costs.size_row("sdpose_t")
    assert (row["paper params"], row["paper GFLOPs"]) == (4.4, 1.8)
    assert float(row["difference"]) == pytest.approx(4.399 - 4.4, abs=1e-3)
    assert float(row["difference "]) == pytest.approx(1.779 - 1.8, abs=1e-3)
    first_cycle, whole = float(row["conv + linear"]), float(row["all cycles, conv + linear"])
    assert whole < float(row["all cycles, with attention"])
    assert whole == pytest.approx(3.029, abs=2e-3) and whole < 3 * first_cycle  # the stem runs once


def test_the_papers_figures_are_near_what_is_counted_here():
    for name, (params, macs) in costs.PAPER.items():
        with torch.device("meta"):
            model = create_model(name)
        ours = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        assert abs(ours - params) < 0.06, name
        assert 0 < macs < 16


@pytest.fixture
def tiny_models(monkeypatch):
    """In place of `make`: tiny models by (name, overrides), which count the calls of their first block."""
    made = []

    def make(name, args, **overrides):
        model = create_model(name, depth=2, dim=16, heads=2, stage1_width=8, **overrides)
        model.calls = 0

        def count(block, inputs):
            model.calls += 1
            model.autocast = torch.is_autocast_enabled("cpu")
            model.was_training = model.training

        model.blocks[0].register_forward_pre_hook(count)
        made.append(model)
        return model

    monkeypatch.setattr(costs, "make", make)
    return made


def steps_alone(steps, rounds, seed):
    return {name: [float(i + 1)] * 2 for i, name in enumerate(steps)}


def test_each_evaluation_runs_the_model_and_the_cycles_that_its_row_names(tiny_models, monkeypatch):
    calls = {}

    def run_once(steps, rounds, seed):
        for name, step in steps.items():
            before = [model.calls for model in tiny_models]
            step()
            calls[name] = [model.calls - old for model, old in zip(tiny_models, before, strict=True)]
        return steps_alone(steps, rounds, seed)

    monkeypatch.setattr(costs, "TIMED", ("sdpose_t",))
    monkeypatch.setattr(costs, "time_in_turns", run_once)
    rows = costs.evaluation_rows(costs.parse_arguments(["--eval-batch-size", "1"]))
    plain, wrapped = tiny_models
    assert plain.config.cycles == 1 and not hasattr(plain, "_cyclekd") and wrapped._cyclekd.cycles == 3
    assert calls == {
        "sdpose_t, plain model": [1, 0],
        "sdpose_t, plain model again": [1, 0],
        "sdpose_t, wrapped": [0, 1],
        "sdpose_t, all cycles": [0, 3],
    }
    assert not plain.was_training and not wrapped.was_training
    assert str(rows[3]["time x base"]).startswith("4.0") and str(rows[3]["speed x base"]).startswith("0.25")
    assert rows[3]["images/s"] == "0.2" and rows[3]["milliseconds"] == "4000.00"


def test_our_training_steps_have_the_precision_asked_for_and_the_plain_loop_fp32(tiny_models, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(options) or model)
    seen = {}

    def run_once(steps, rounds, seed):
        for name, step in steps.items():
            tiny_models[0].zero_grad()
            before = tiny_models[0].calls
            step()
            seen[name] = (tiny_models[0].calls - before, tiny_models[0].keypoint_tokens.grad is not None)
        return steps_alone(steps, rounds, seed)

    monkeypatch.setattr(costs, "TRAINED", ("sdpose_t",))
    monkeypatch.setattr(costs, "time_in_turns", run_once)
    costs.training_rows(costs.parse_arguments(["--batch-size", "2", "--bf16", "--compile"]))
    assert seen == {"sdpose_t, plain loop in fp32": (0, False), "sdpose_t": (3, True)}
    assert tiny_models[0].autocast and tiny_models[0].was_training and compiled == [{"fullgraph": True}]
