"""The throughput benchmark times every loop with and without data, and a pass over a loader where it is steady."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.speed.feeds import SIZE, make_jpegs, plan_pass
from benchmarks.speed.loops import make_loop
from benchmarks.speed.timing import shuffled_rounds, timed
from benchmarks.throughput import parse_arguments

SCRIPT = Path(__file__).parents[1] / "benchmarks/throughput.py"
SMALL = ["--device", "cpu", "--batch", "4", "--model-args", "depth=2", "img_size=32", "embed_dim=24", "num_heads=2"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What the command writes at its smallest size."""
    path = tmp_path_factory.mktemp("throughput") / "small.csv"
    rounds = ["--rounds", "1", "--steps", "1", "--data-rounds", "1", "--workers", "0", "--files", "2"]
    command = [sys.executable, str(SCRIPT), *SMALL, *rounds, "--out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    assert "our augmentation alone" in done.stdout and f"written to {path}" in done.stdout
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_there_is_a_row_for_every_loop_with_and_without_data_and_for_the_parts(rows: list[dict[str, str]]) -> None:
    loops = ["timm loop", "plain", "2 cycles", "ideal"]
    parts = ["timm loader alone", "our loader alone", "our augmentation alone"]
    found = [(row["variant"], row["data"]) for row in rows]
    assert found == [(loop, "resident") for loop in loops] + [(each, "JPEG") for each in loops + parts]
    assert all(row["command"] and row["device"] and row["torch"] == torch.__version__ for row in rows)


def test_speeds_and_ratios_are_of_the_same_times(rows: list[dict[str, str]]) -> None:
    rate = {(row["variant"], row["data"]): float(row["images/s"]) for row in rows}
    ratio = {(row["variant"], row["data"], base): row[f"x {base}"] for row in rows for base in ("plain", "timm loop")}
    for data in ("resident", "JPEG"):
        expected = rate["plain", data] / rate["2 cycles", data]
        assert float(ratio["2 cycles", data, "plain"].split()[0]) == pytest.approx(expected, rel=0.01, abs=1e-3)
        expected = rate["timm loop", data] / rate["plain", data]
        assert float(ratio["plain", data, "timm loop"].split()[0]) == pytest.approx(expected, rel=0.01, abs=1e-3)
        assert ratio["timm loop", data, "plain"] == ""


def test_every_loop_trains_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(monkeypatch)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    starts = []
    for name in ("timm loop", "plain", "cycles", "ideal"):
        loop = make_loop(name, False, args)
        blocks = [value for key, value in loop.model.state_dict().items() if "blocks.1.mlp.fc1.weight" in key]
        starts.append(blocks[0].clone())
        mixed = (images, torch.nn.functional.one_hot(labels, 1000).float())
        for _ in range(2):  # the recipe's rate starts at nearly nothing
            loop.step(mixed if name == "timm loop" else {"image": images.clone(), "label": labels})
        assert not torch.equal(blocks[0], starts[-1])
    assert all(torch.equal(start, starts[0]) for start in starts)  # from the same weights


def test_the_cycles_and_the_ideal_have_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(monkeypatch)
    losses = {}
    for name in ("plain", "cycles", "ideal"):
        loop = make_loop(name, False, args)
        batch = {"image": torch.ones(4, 3, 32, 32), "label": torch.tensor([1, 2, 3, 4])}
        loop.step(batch)
        losses[name] = loop.training.meter.means()["loss"]
    assert losses["cycles"] == pytest.approx(losses["ideal"], rel=1e-6)
    assert losses["cycles"] > 1.5 * losses["plain"]


class Slow(Dataset[int]):
    """Samples of 10 ms each."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return index


@pytest.mark.parametrize(("step_ms", "expected_ms"), [(0, 5), (3, 5), (20, 20)])
def test_a_pass_takes_no_less_than_the_slower_of_loader_and_steps(step_ms: int, expected_ms: int) -> None:
    """Two workers make a batch of one sample in 5 ms; what they prepared while nobody looked must not count."""
    before, counted, after = plan_pass(2, ahead=0, turns=8)
    batches = iter(DataLoader(Slow(), batch_size=1, num_workers=2, sampler=range(before + counted + after)))
    timed(lambda batch: time.sleep(0.05), islice(batches, before))
    seconds = timed(lambda batch: time.sleep(step_ms / 1000), islice(batches, counted))
    assert 1000 * seconds / counted > 0.8 * expected_ms
    assert len(list(batches)) == after


def test_no_round_starts_that_would_end_too_late() -> None:
    orders = []
    for order in shuffled_rounds(["a", "b"], 100, time.perf_counter() + 0.25, seed=0, what="test"):
        orders.append(sorted(order))
        time.sleep(0.1)
    assert 1 < len(orders) <= 3 and orders[0] == ["a", "b"]
    assert len(list(shuffled_rounds(["a"], 100, time.perf_counter() - 1, seed=0, what="test"))) == 1


def test_waiting_for_batches_counts_as_time() -> None:
    def slowly() -> Iterator[int]:
        time.sleep(0.05)
        yield 1

    assert timed(lambda batch: None, slowly()) >= 0.05


def test_files_are_of_imagenets_size_and_cut_from_photos(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (640, 480), (200, 30, 30)).save(tmp_path / "photos/red.jpg")
    for path in make_jpegs(tmp_path, 2, tmp_path / "photos"):
        with Image.open(path) as image:
            assert image.format == "JPEG" and image.size == SIZE
            assert image.getpixel((250, 180))[0] > 190 > 60 > image.getpixel((250, 180))[1]
    noise = make_jpegs(tmp_path, 1)[0]
    assert 30_000 < noise.stat().st_size < 150_000  # as a photo's


@pytest.mark.parametrize(
    "wrong", [["--batch", "3"], ["--cycles", "1"], ["--photos", "nowhere"], ["--model", "resnet18"], ["--rounds", "0"]]
)
def test_bad_arguments_are_refused_before_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        arguments(monkeypatch, *wrong)
    assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err.splitlines()[-1]


def test_modes_are_those_asked_for_each_once_and_eager_alone_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments(monkeypatch).modes == ["eager"]
    assert arguments(monkeypatch, "--modes", "compiled", "eager", "compiled").modes == ["compiled", "eager"]


def arguments(monkeypatch: pytest.MonkeyPatch, *more: str):
    small = SMALL if "--model" not in more else SMALL[:4]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *small, *more])
    return parse_arguments()
