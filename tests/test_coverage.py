"""The matrix of models: rows drawn from it are judged again, the judge sees what is broken, the page is up to date."""

import random
import sys

import pytest
import torch

import cyclekd.reentry
import cyclekd.slots
import toys
from benchmarks import coverage
from benchmarks.matrix import page
from benchmarks.matrix.judge import judge
from benchmarks.matrix.row import Row
from benchmarks.records import read_rows

DRAWN = 40


def recorded():
    """The rows of the results files that were evaluated, by library, name and task."""
    rows = [row for library in coverage.LIBRARIES for row in read_rows(page.newest(library))]
    return {(row["library"], row["name"], row["task"]): row for row in rows if row["verdict"]}


def drawn():
    return random.Random(0).sample(sorted(recorded()), DRAWN)


@pytest.fixture(scope="module")
def rows():
    return {library: coverage.rows_of(library) for library in coverage.LIBRARIES}


@pytest.mark.parametrize("key", drawn(), ids="-".join)
def test_a_row_of_the_matrix_is_judged_as_recorded(rows, key):
    library, *name = key
    expected = recorded()[key]
    if tuple(name) not in rows[library]:
        pytest.skip(f"this version of {library} has no such model")
    found = judge(library, rows[library][tuple(name)])
    assert (found.verdict, found.stack) == (expected["verdict"], expected["stack"]), found.reason


def toy_row(make=toys.Toy, inputs=lambda: ((toys.images(),), {}), **more):
    return Row("toy", make, inputs, **more)


def labelled():
    return (toys.images(),), {"labels": torch.tensor([0, 1])}


def test_the_judge_sees_a_handover_that_is_left_out(monkeypatch):
    monkeypatch.setattr(cyclekd.slots.Handover, "__call__", lambda self, args, kwargs: (args, kwargs))
    found = judge("toys", toy_row())
    assert found.verdict == "wrong" and "differ from the repeated list" in found.reason


def test_the_judge_sees_tokens_that_are_off_by_little(monkeypatch):
    class Inexact(cyclekd.slots.Handover):
        def __init__(self, path, slots, carried):
            super().__init__(path, slots, tuple(tokens * (1 + 1e-4) for tokens in carried))

    monkeypatch.setattr("cyclekd.stack_hooks.Handover", Inexact)
    assert judge("toys", toy_row()).verdict == "wrong"


def test_the_judge_sees_gradients_that_are_no_numbers(monkeypatch):
    class Unbounded(cyclekd.slots.Handover):
        def __call__(self, args, kwargs):
            args, kwargs = super().__call__(args, kwargs)
            for tensor in args:
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: gradient * float("nan"))
            return args, kwargs

    monkeypatch.setattr("cyclekd.stack_hooks.Handover", Unbounded)
    found = judge("toys", toy_row())
    assert found.verdict == "wrong" and "gradients differ" in found.reason


@pytest.mark.parametrize("broken", [{"tokens": ((),) * 3}, {"loss": None}], ids=str)
def test_the_judge_misses_neither_tokens_nor_the_objective(monkeypatch, broken):
    run = cyclekd.reentry.Reentry.run
    monkeypatch.setattr("cyclekd.reentry.Reentry.run", lambda *args, **kw: run(*args, **kw)._replace(**broken))
    monkeypatch.setattr("cyclekd.wrap._objective", lambda model, state, output, kwargs: output.loss)
    assert judge("toys", toy_row(toys.LossToy, inputs=labelled)).verdict == "wrong"


def test_the_judge_demands_cycles_that_differ():
    found = judge("toys", toy_row(lambda: toys.FunctionToy(tail=lambda model, x: 0 * x + 1)))
    assert not found.verdict and "no control" in found.reason


def test_a_refusal_is_told_with_its_message():
    found = judge("toys", toy_row(toys.OuterResidualToy))
    assert found.verdict == "refused" and "reaches its later blocks past the first" in found.reason


def test_a_model_that_cannot_be_built_is_not_evaluated():
    found = judge("toys", toy_row(lambda: toys.Toy(depth="three")))
    assert not found.verdict and found.reason.startswith("not built: TypeError")


def test_a_loop_written_by_hand_can_be_the_truth():
    def loop(model, times, args, kwargs):
        x = model.stem(*args)
        for _ in range(times):
            x = model.loop(x)
        return model.forward_head(x), x

    assert judge("toys", toy_row(toys.GluedToy, loop=loop)).verdict == "defined"
    assert judge("toys", toy_row(toys.GluedToy)).verdict == "wrong"  # a longer list adds positions once more


def test_the_page_shows_the_newest_results():
    assert page.PAGE.read_text() == page.page(), "run python benchmarks/coverage.py page"


def test_nothing_in_the_results_is_wrong_and_refusals_have_a_reason():
    assert all(row["verdict"] in ("exact", "defined", "refused") for row in recorded().values())
    assert all(row["reason"] for row in recorded().values() if row["verdict"] != "exact")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jax"], "invalid choice: 'jax'"),
        (["timm", "no_such_model"], "no model of timm in the matrix: no_such_model"),
        (["hf", "--processes", "0"], "--processes and --timeout are at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_work(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["coverage.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        coverage.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_keeps_earlier_results(monkeypatch, tmp_path, capsys):
    rows = dict(list(coverage.rows_of("timm").items())[:2])
    monkeypatch.setattr(coverage, "rows_of", lambda library: rows)
    monkeypatch.setattr(coverage, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["coverage.py", "timm", "--processes", "1"])
    for _ in range(2):
        with pytest.raises(SystemExit):
            coverage.main()
    first, second = sorted(tmp_path.glob("coverage-timm-*.csv"), key=lambda path: len(path.name))
    done = read_rows(first)
    assert [row["name"] for row in done] == [row["name"] for row in read_rows(second)]
    first.rename(first.with_suffix(".partial"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        coverage.main()
    assert "going on after 2 rows" in capsys.readouterr().out
