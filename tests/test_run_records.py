"""What a run records: its log, its running means, its progress, its curves and its model card."""

import io
import json
import math
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from cyclekd.integrations.runs import progress as progress_module
from cyclekd.integrations.runs.card import model_card, settings_given
from cyclekd.integrations.runs.curves import POINTS, draw_curves
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.progress import Log, Meter, Progress, measure_and_cycles

# -- log ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "log.jsonl")


def test_a_record_is_a_line_of_json_that_comes_back(log):
    log.write("train", 1, loss=0.1, lr=1e-3)
    log.write("note", 2, text="two\u2028lines\n", values=torch.tensor([1.5, 2.0]))
    assert len(log.path.read_text().splitlines()) == 2
    assert log.read() == [
        {"kind": "train", "step": 1, "loss": 0.1, "lr": 1e-3},
        {"kind": "note", "step": 2, "text": "two\u2028lines\n", "values": [1.5, 2.0]},
    ]


def test_nan_and_infinity_are_valid_json_and_come_back(log):
    log.write("train", 1, loss=math.nan, task_1=math.inf, task_2=-math.inf, tokens=torch.tensor(math.inf))
    json.loads(log.path.read_text(), parse_constant=pytest.fail)
    (record,) = log.read()
    assert math.isnan(record["loss"])
    assert (record["task_1"], record["task_2"], record["tokens"]) == (math.inf, -math.inf, math.inf)


def test_truncation_drops_later_steps_and_a_half_written_line(log):
    for step in range(1, 6):
        log.write("train", step, loss=step / 3)
    whole = log.path.read_text()
    log.path.write_bytes(whole.encode() + b'{"kind": "train", "step": 6, "lo\xff')
    assert [record["step"] for record in log.read()] == [1, 2, 3, 4, 5]
    log.truncate(3)
    assert log.path.read_text() == "".join(whole.splitlines(keepends=True)[:3])
    log.write("train", 4, loss=4)
    assert [record["step"] for record in log.read()] == [1, 2, 3, 4]


def test_no_log_is_an_empty_log(log):
    log.truncate(3)
    assert log.read() == [] and not log.path.exists()


def test_a_broken_line_amid_the_others_is_refused(log):
    log.path.write_text('{"kind": "train", "step": 1}\nnonsense\n{"kind": "train", "step": 2}\n')
    with pytest.raises(RunError, match=r"log.jsonl, line 2: is no record"):
        log.read()


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(RunError, match=r"cannot write .*log\.jsonl: No such file"):
        Log(tmp_path / "absent" / "log.jsonl").write("train", 1)


# -- meter -------------------------------------------------------------------------------------------------------------


def test_means_are_weighted_and_per_name():
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0), "lr": 0.5}, weight=3)
    meter.add({"loss": torch.tensor(5.0), "lr": 0.5, "late": torch.tensor(7.0)})
    assert meter.means() == {"loss": 2.0, "lr": 0.5, "late": 7.0}
    meter.reset()
    assert meter.means() == {}


def test_sums_keep_what_fp32_and_bf16_would_lose():
    meter = Meter()
    for _ in range(1000):
        meter.add({"a": torch.tensor(1.0, dtype=torch.bfloat16), "b": torch.tensor(0.1)})
    assert meter.means() == {"a": 1.0, "b": pytest.approx(float(torch.tensor(0.1)), rel=1e-14)}


def test_a_float_is_not_rounded_to_fp32():
    meter = Meter()
    meter.add({"seconds": 0.1})
    assert meter.means() == {"seconds": 0.1}


def test_a_meter_does_not_hold_the_graph():
    meter = Meter()
    meter.add({"loss": torch.ones((), requires_grad=True) * 2})
    ((parts, _),) = meter._waiting
    assert not any(tensor.requires_grad for tensor in parts.values())


def test_what_was_added_counts_as_it_was_then():
    """A step's memory may be written on by the next, as under CUDA graphs."""
    meter, value = Meter(), torch.tensor(1.0)
    for _ in range(3):
        meter.add({"loss": value})
        value.add_(1)
    assert meter.means() == {"loss": 2.0}


def test_it_does_not_matter_when_the_sums_are_made():
    often, once = Meter(), Meter()
    for step in random_steps(40):
        often.add(step)
        often.means()
        once.add(step)
    assert often.state() == once.state(), "equal floats, not close ones"


def test_a_meter_forgets_what_it_has_not_summed_yet():
    meter, other = Meter(), Meter()
    meter.add({"loss": 1.0})
    meter.reset()
    assert meter.means() == {}
    meter.add({"loss": 1.0})
    other.add({"loss": 3.0})
    meter.load(other.state())
    assert meter.means() == {"loss": 3.0}


def random_steps(count):
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        values = torch.randn(3, generator=generator)
        yield {"loss": values[0], "task_1": values[1], "lr": 0.1 * i, **({"tokens_1_2": values[2]} if i % 3 else {})}


def test_a_resumed_meter_goes_on_bit_for_bit():
    steps = list(random_steps(40))
    undisturbed, first, second = Meter(), Meter(), Meter()
    for i, step in enumerate(steps):
        undisturbed.add(step, weight=1 + i % 5)
        (first if i < 17 else second).add(step, weight=1 + i % 5)
        if i == 16:
            second.load(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert second.means() == undisturbed.means(), "equal floats, not close ones"
    assert second.state() == undisturbed.state()


def test_a_state_with_nan_is_valid_json():
    meter, other = Meter(), Meter()
    meter.add({"loss": torch.tensor(math.nan)})
    other.load(json.loads(json.dumps(meter.state(), allow_nan=False)))
    assert math.isnan(other.means()["loss"])


@pytest.fixture
def transfers(monkeypatch):
    """Names of the calls that would wait for a device."""
    calls = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original):
            calls.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return calls


def test_adding_waits_for_nothing_and_means_make_one_transfer(transfers):
    meter = Meter()
    for step in random_steps(6):
        meter.add({name: value for name, value in step.items() if name != "lr"}, weight=2)
    assert transfers == []
    assert len(meter.means()) == 3
    assert transfers == ["tolist"]


# -- progress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", ("loss", ())),
        ("top1", ("top1", ())),
        ("top1_2", ("top1", (2,))),
        ("top1_2_ema", ("top1_ema", (2,))),
        ("tokens_1_2", ("tokens", (1, 2))),
        ("mse_class_1_2", ("mse_class", (1, 2))),
    ],
)
def test_names_tell_measure_and_cycles(name, expected):
    assert measure_and_cycles(name) == expected


class Terminal(io.StringIO):
    def isatty(self):
        return True


VALUES = {"loss": 4.615, "task_1": 2.31, "task_2": 2.3, "tokens_1_2": 0.0123}


def test_the_bar_shows_epoch_every_term_rate_and_speed(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    progress = Progress(total_steps=20, start_step=5, steps_per_epoch=5)
    progress.update(6, VALUES, lr=1e-3, samples_per_second=1234.5)
    progress.update(7)
    progress.message("a message")
    progress.close()
    last = re.split(r"[\r\n]+", terminal.getvalue().strip())[-1]
    assert "epoch 2/4" in last and "7/20" in last
    assert "loss 4.62, task 2.31 2.3, tokens 0.0123, lr 1.00e-03, 1,234 samples/s" in last
    assert capsys.readouterr().out == "a message\n"


def test_where_there_is_no_terminal_lines_come_rarely_and_the_last_state_does(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    progress = Progress(total_steps=100, start_step=0, steps_per_epoch=50)
    for step in range(1, 91):
        now += 1.0
        progress.update(step, VALUES)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r" (\d+)/100 ", line).group(1) for line in lines] == ["1", "31", "61", "90"]
    assert "\r" not in "".join(lines) and "epoch 2/2" in lines[-1] and "task 2.31 2.3" in lines[-1]


def test_other_processes_say_nothing(capsys):
    progress = Progress(total_steps=2, start_step=0, steps_per_epoch=1, enabled=False)
    progress.update(1, VALUES)
    progress.message("a message")
    progress.close()
    assert capsys.readouterr() == ("", "")


# -- curves ------------------------------------------------------------------------------------------------------------


def records(count):
    """A log with an evaluation every tenth step, and one loss that was not finite."""
    found = []
    for step in range(1, count + 1):
        task = 2 + 5 * math.exp(-step / 300)
        terms = {"loss": 2 * task if step != 5 else math.nan, "task_1": task, "task_2": task, "tokens_1_2": 0.02}
        found.append(
            {"kind": "train", "step": step, "lr": 1e-3, "alpha_tokens_1_2": 3.0, "predictions_1_2": 0.0, **terms}
        )
        if step % 10 == 0 or count == 1:
            metrics = {
                "top1_1": 50.0,
                "top1_2": 51.0,
                "top1_1_ema": 52.0,
                "loss_1": 2.0,
                "seconds": 1.0,
                "samples_seen": 10_000,
            }
            found.append({"kind": "evaluation", "step": step, "epoch": step // 10, **metrics})
    return found


@pytest.fixture
def figures(monkeypatch):
    """Figures that were saved, to look into them."""
    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), savefig(self, *args, **kwargs))
    )
    return saved


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title() == title)


@pytest.mark.parametrize("count", [0, 1, 2 * POINTS])
def test_a_picture_is_drawn_of_a_log_of_any_length(tmp_path, figures, count):
    path = tmp_path / "curves.png"
    path.write_text("old")
    draw_curves(path, records(count), "a_title with $_{$")
    picture = np.asarray(Image.open(path).convert("L"))
    assert picture.shape[0] > 400 and picture.min() < 100
    assert [each.name for each in tmp_path.iterdir()] == ["curves.png"]
    lines = [line for axes in figures[0].axes for line in axes.lines]
    assert bool(lines) == bool(count)
    assert all(line.get_marker() == "o" for line in lines) if count == 1 else True


def test_the_picture_shows_every_term_and_metric_and_the_rate(tmp_path, figures):
    draw_curves(tmp_path / "curves.png", records(100), "title")
    (figure,) = figures
    terms = panel(figure, "training loss and its terms")
    assert [line.get_label() for line in terms.lines] == ["loss", "task_1", "task_2", "tokens_1_2"]
    assert terms.get_yscale() == "log" and list(terms.lines[0].get_xdata()) == list(range(1, 101))
    metrics = panel(figure, "evaluation")
    assert [line.get_label() for line in metrics.lines] == ["top1, cycle 1", "top1, cycle 2", "top1_ema, cycle 1"]
    assert list(metrics.lines[1].get_ydata()) == [51.0] * 10 and list(metrics.lines[1].get_xdata()) == list(
        range(1, 11)
    )
    first, second, ema = metrics.lines
    assert first.get_color() == ema.get_color() != second.get_color() and first.get_linestyle() != ema.get_linestyle()
    assert [line.get_label() for line in panel(figure, "evaluation loss").lines] == ["loss, cycle 1"]
    assert set(panel(figure, "learning rate").lines[0].get_ydata()) == {1e-3}


def test_the_picture_can_show_some_metrics_alone(tmp_path, figures):
    draw_curves(tmp_path / "curves.png", records(100), "title", measures=("top1",))
    assert [line.get_label() for line in panel(figures[0], "evaluation").lines] == ["top1, cycle 1", "top1, cycle 2"]


def test_a_loss_that_may_be_negative_keeps_a_linear_axis(tmp_path, figures):
    draw_curves(
        tmp_path / "curves.png", [{"kind": "train", "step": s, "loss": 100.0**s - 150} for s in (1, 2)], "title"
    )
    assert panel(figures[0], "training loss and its terms").get_yscale() == "linear"


# -- card --------------------------------------------------------------------------------------------------------------


def card(**changes):
    values = {
        "library": "timm",
        "base_model": "timm/deit_tiny_patch16_224.fb_in1k",
        "datasets": ["ILSVRC/imagenet-1k"],
        "metrics": {"top1_1": 72.25, "top1_2": 73.5, "top1_1_ema": 72.75, "samples": 50000.0},
        "settings": {"lr": 5e-4, "betas": (0.9, 0.999), "a|b": "x|y", "ema": None},
        "environment": {"python": "3.12", "gpus": ["A", "A"], "packages": {"torch": "2.14"}, "commit": None},
        "usage": "import timm\n\nmodel = timm.create_model('x')\n",
        "notes": ["Not a reproduction."],
    }
    return model_card('DeiT: "tiny"', **(values | changes))


def test_a_card_has_the_arguments_that_were_given_and_zero_is_one():
    args = Namespace(alpha=0.0, seed=0, lr=0.1, rho=None, compile=False, report_to=[], model_args={}, resume=True)
    assert settings_given(args) == {"alpha": 0.0, "seed": 0, "lr": 0.1}


def front_matter(text):
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_the_front_matter_is_what_the_hub_reads():
    matter, body = front_matter(card(library='odd: "name" #'))
    assert matter == {
        "library_name": 'odd: "name" #',
        "base_model": "timm/deit_tiny_patch16_224.fb_in1k",
        "datasets": ["ILSVRC/imagenet-1k"],
        "tags": ['odd: "name" #', "cyclekd", "self-distillation"],
    }
    assert body.startswith('\n# DeiT: "tiny"\n')


def test_what_is_not_on_the_hub_stays_out_of_the_front_matter():
    matter, body = front_matter(card(base_model="deit_tiny_patch16_224", datasets=["/data/mine"]))
    assert set(matter) == {"library_name", "tags"}
    assert "Model: `deit_tiny_patch16_224`." in body and "Data: `/data/mine`." in body
    assert "base_model" not in front_matter(card(base_model=None))[0]


def test_metrics_stand_in_a_table_by_cycle():
    text = card()
    assert (
        "| measure | cycle 1 | cycle 2 |\n| --- | --- | --- |\n| top1 | 72.25 | 73.5 |\n| top1_ema | 72.75 |  |\n"
        in text
    )
    assert "| samples | 50000 |" in text
    assert "Every number was measured in this run." in text
    assert "No evaluation was run." in card(metrics={})


def test_the_card_holds_recipe_environment_usage_and_notes():
    text = card()
    for row in ("| lr | `0.0005` |", "| betas | `[0.9, 0.999]` |", r"| a\|b | `x\|y` |", "| ema | `null` |"):
        assert row in text
    for row in ("| python | `3.12` |", "| gpus | `A, A` |", "| torch | `2.14` |"):
        assert row in text
    assert "commit" not in text
    assert "```python\nimport timm\n\nmodel = timm.create_model('x')\n```" in text
    assert "* Not a reproduction." in text and "## Notes" not in card(notes=[])
