"""The cost benchmark counts what it says, runs, and keeps earlier results."""

import argparse
import csv
import sys

import pytest

from benchmarks import cost
from benchmarks.records import free_path
from benchmarks.speed.timing import paired_ratio

SMALL = argparse.Namespace(
    model="deit_tiny_patch16_224", cycles=2, batch_size=1, rounds=2, device="cpu", threads=1, bf16=False, compile=False,
    seed=0,
)  # fmt: skip


def test_a_training_step_costs_exactly_stem_plus_n_stacks_plus_n_heads():
    assert cost.count_flops("wrapped", SMALL) == cost.count_flops("ideal", SMALL)
    assert cost.count_flops("wrapped checkpointed", SMALL) > cost.count_flops("wrapped", SMALL)
    assert cost.count_flops("wrapped eval", SMALL) == cost.count_flops("plain eval", SMALL)


def test_a_ratio_is_the_paired_median_within_its_interval():
    ratio = paired_ratio([2.0, 4.2, 5.7, 8.0, 10.2], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert ratio.median == 2.0 and 1.9 <= ratio.low <= 2.0 <= ratio.high <= 2.1


def test_earlier_results_are_kept(tmp_path):
    assert free_path(tmp_path / "cost-1.2.csv") == tmp_path / "cost-1.2.csv"
    (tmp_path / "cost-1.2.csv").touch(), (tmp_path / "cost-1.2-2.csv").touch()
    assert free_path(tmp_path / "cost-1.2.csv") == tmp_path / "cost-1.2-3.csv"


@pytest.mark.parametrize(
    "arguments", [["--cycles", "1"], ["--rounds", "0"], ["--device", "cuda"], ["--model", "resnet18"]]
)
def test_bad_arguments_are_refused_before_work(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["cost.py", *arguments])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cost.parse_arguments()
    assert stopped.value.code == 2 and arguments[0] in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_writes_a_row_per_variant_with_its_source(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cost, "RESULTS", tmp_path)
    monkeypatch.setattr(cost, "peak_memory", lambda name, args: 1.0)  # would start eight processes
    monkeypatch.setattr(sys, "argv", ["cost.py", "--batch-size", "1", "--rounds", "2"])
    cost.main()
    (path,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(path.open()))
    assert [row["variant"] for row in rows] == [*cost.TRAINING, *cost.EVALUATION]
    assert rows[2]["FLOPs x ideal"] == "1.000000" and rows[2]["device"] and rows[2]["command"]
    assert "wrapped checkpointed" in capsys.readouterr().out
