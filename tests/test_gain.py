"""The experiment pairs what it compares, resumes bit by bit, keeps earlier rows, and does its statistics right."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from benchmarks import gain
from benchmarks.experiment import cifar, pose, runs, workers
from benchmarks.experiment.statistics import paired_difference, retention, t_interval
from benchmarks.records import read_rows
from cyclekd import wrap_multicycle
from cyclekd.integrations.tokenpose.data.views import (
    View,
    view_keypoints,
    view_matrices,
)
from cyclekd.integrations.tokenpose.figures.draw import write_figures
from cyclekd.integrations.tokenpose.keypoints.flips import exchange_sides
from cyclekd.integrations.tokenpose.keypoints.geometry import transform_points
from cyclekd.integrations.tokenpose.skeletons import COCO

SELF = "self-distilled"

CLASSES = """
import hashlib, json, os, signal
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from benchmarks.experiment.tasks import Data, Recipe

HERE = Path(__file__).parent
RECIPE = Recipe(epochs=1, learning_rate=1e-2)
MODEL = None

def digest(*tensors):
    return hashlib.sha1(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()

def build_model(seed):
    global MODEL
    size = {"img_size": 4, "patch_size": 2, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 1}
    MODEL = VisionTransformer(**size, num_classes=3, proj_drop_rate=0.2)
    return MODEL

def load_data(seed, device):
    draw = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(12, 1, 4, 4, generator=draw), torch.arange(12) % 3

    def batches(epoch):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(100 * seed + epoch))
        for step, batch in enumerate(order.split(4)):
            with (HERE / "log.jsonl").open("a") as log:
                log.write(json.dumps([seed, epoch, step, digest(*MODEL.parameters()), digest(images[batch])]) + "\\n")
            if epoch == 1 and (HERE / "interrupt").exists():
                (HERE / "interrupt").unlink()
                signal.raise_signal(signal.SIGINT)
            if (HERE / "die").exists():
                os._exit(3)
            yield images[batch], labels[batch]

    def evaluate(outputs_of):  # a metric that moves with every bit of the weights
        return 100 * outputs_of(images).double().softmax(-1)[torch.arange(12), labels].mean().item()

    return Data(batches, 3, F.cross_entropy, evaluate, "probability")
"""

HEAT_MAPS = """
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import nn
from benchmarks.experiment.tasks import Data

class Pose(nn.Module):
    def __init__(self):
        super().__init__()
        size = {"img_size": 4, "patch_size": 2, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 1}
        self.vit, self.head = VisionTransformer(**size, num_classes=0), nn.Linear(8, 16)

    def forward(self, images):
        return self.head(self.vit.forward_features(images)[:, 1:3]).unflatten(-1, (4, 4))  # [B, 2 key points, 4, 4]

def build_model(seed):
    return Pose()

def load_data(seed, device):
    images, maps = torch.randn(8, 1, 4, 4), torch.rand(8, 2, 4, 4)

    def evaluate(outputs_of):
        peaks = [each.flatten(2).argmax(-1) for each in (outputs_of(images), maps)]
        return 100 * (peaks[0] == peaks[1]).double().mean().item()

    groups = {"keypoint": (slice(1, 3), 1.0), "visual": (slice(3, None), 0.5)}
    return Data(lambda epoch: iter([(images, maps)]), 1, F.mse_loss, evaluate, "PCK", groups)
"""


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "classes.py"
    path.write_text(CLASSES)
    return path


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the real command in this process; its exit code."""

    def run(*arguments, jobs=1, out=tmp_path):
        places = [
            "--results",
            str(out / "results"),
            "--work",
            str(out / "work"),
            "--device",
            "cpu",
            "--jobs",
            str(jobs),
        ]
        monkeypatch.setattr(sys, "argv", ["gain.py", *map(str, arguments), *places])
        return gain.main()

    return run


@pytest.fixture
def no_figure(monkeypatch):
    monkeypatch.setattr(gain, "draw", lambda *_: None)


def rows_in(folder):
    (path,) = (folder / "results").glob("*.csv")
    return read_rows(path)


def measured(row):
    """What training has decided, and not the clock."""
    return [row[name] for name in ("arm", "seed", "steps", "one pass", "all cycles", "token distance", "curve")]


# -- the runs ----------------------------------------------------------------------------------------------------------


def test_runs_of_a_seed_start_from_the_same_weights_and_see_the_same_batches(command, task, tmp_path, no_figure):
    assert command(task, "--seeds", 2, "--epochs", 2) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    starts = [i for i, (_, epoch, step, *_) in enumerate(lines) if (epoch, step) == (0, 0)]
    trained = [lines[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    assert [len(run) for run in trained] == [6, 12, 6] * 2
    seen = [[(seed, epoch, step, images) for seed, epoch, step, _, images in run] for run in trained]
    for plain, longer, distilled in ((0, 1, 2), (3, 4, 5)):
        assert seen[plain] == seen[distilled] == seen[longer][:6]
        assert trained[plain][0] == trained[longer][0] == trained[distilled][0]  # the weights too
        assert trained[plain][1][3] != trained[distilled][1][3]  # and no longer after a step
    assert trained[0][0][3] != trained[3][0][3]


def test_every_run_is_a_row_with_its_cost_and_source(command, task, tmp_path, capsys):
    assert command(task, "--seeds", 2, "--alpha", "1e-2", "--supervise-only") == 0
    rows = rows_in(tmp_path)
    arms = ["plain", "equal compute", "supervised only", "self-distilled rho 0.3", "self-distilled alpha 0.01"]
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, str(seed)) for seed in (0, 1) for arm in arms]
    assert [(row["training passes"], row["steps"]) for row in rows[:3]] == [("1", "3"), ("2", "6"), ("2", "3")]
    assert all(row["commit"] and row["torch"] and float(row["seconds"]) > 0 for row in rows)
    assert not rows[0]["all cycles"] and float(rows[3]["all cycles"]) != float(rows[3]["one pass"])
    assert len({row["one pass"] for row in rows}) == 10  # no two of them trained alike
    (figure,) = (tmp_path / "results").glob("*.png")
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(arm in printed for arm in arms) and "An interval that contains 0 means" in printed


def test_a_run_stopped_after_every_epoch_ends_bit_by_bit_as_an_undisturbed_one(command, task, tmp_path, no_figure):
    for minutes in ((), ("--minutes", 0)):
        out = tmp_path / f"out{len(minutes)}"
        for _ in range(1 if not minutes else 3 + 6 + 3):  # a call with no time makes one epoch
            assert command(task, "--seeds", 1, "--epochs", 3, *minutes, out=out) == 0
    undisturbed, stopped = rows_in(tmp_path / "out0"), rows_in(tmp_path / "out2")
    assert len(stopped) == 3
    assert [measured(row) for row in stopped] == [measured(row) for row in undisturbed]
    assert not list((tmp_path / "out2" / "work").rglob("*-seed*"))  # a finished run needs no checkpoint


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(command, task, tmp_path, capsys, no_figure):
    (tmp_path / "interrupt").touch()
    assert command(task, "--seeds", 1, "--epochs", 4) == 130
    assert [path.name for path in (tmp_path / "work").rglob("*.pt")] == ["plain-seed0-epoch00002.pt"]
    assert not list((tmp_path / "results").glob("*.csv"))
    assert command(task, "--seeds", 1, "--epochs", 4) == 0
    assert len(rows_in(tmp_path)) == 3


def test_a_later_call_adds_seeds_and_arms_and_runs_nothing_twice(command, task, tmp_path, no_figure):
    command(task, "--seeds", 1)
    first, log = rows_in(tmp_path), (tmp_path / "log.jsonl").read_text()
    assert command(task, "--seeds", 2, "--rho", 0.3, 1) == 0
    rows = rows_in(tmp_path)
    assert rows[:3] == first
    arms = ["plain", "equal compute", f"{SELF} rho 0.3", f"{SELF} rho 1"]
    assert [(row["arm"], row["seed"]) for row in rows[3:]] == [(arms[3], "0"), *((arm, "1") for arm in arms)]
    assert (tmp_path / "log.jsonl").read_text().startswith(log)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3 * (1 + 2 + 1) + 3 + 3 * (1 + 2 + 1 + 1)


@pytest.mark.parametrize("change", ["argument", "file"])
def test_other_settings_than_those_of_the_file_are_refused(command, task, tmp_path, capsys, no_figure, change):
    command(task, "--seeds", 1)
    before = rows_in(tmp_path)
    if change == "file":
        task.write_text(CLASSES.replace("proj_drop_rate=0.2", "proj_drop_rate=0.1"))
    assert command(task, "--seeds", 2, *(["--learning-rate", 0.5] if change == "argument" else [])) == 2
    told = capsys.readouterr().err
    assert ("learning rate '0.01', and '0.5' was asked" if change == "argument" else "with source") in told
    assert rows_in(tmp_path) == before


def test_heat_maps_are_trained_and_measured_like_classes(command, tmp_path, no_figure):
    (tmp_path / "pose.py").write_text(HEAT_MAPS)
    assert command(tmp_path / "pose.py", "--seeds", 1, "--epochs", 2, "--stack", "vit.blocks") == 0
    rows = rows_in(tmp_path)
    assert {row["metric"] for row in rows} == {"PCK"} and all(0 <= float(row["one pass"]) <= 100 for row in rows)
    assert json.loads(rows[2]["token distance"])[0] > 0


def test_the_digits_of_the_quickstart_need_no_arguments(command, tmp_path, no_figure):
    assert command("digits", "--seeds", 1, "--epochs", 1) == 0
    assert [row["steps"] for row in rows_in(tmp_path)] == ["10", "20", "10"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nothing"], "task 'nothing'"),
        (["digits", "--cycles", "1"], "--cycles"),
        (["digits", "--rho", "-1"], "--rho"),
        (["digits", "--seeds", "0"], "--seeds"),
        (["cifar100"], "--data"),
        (["cifar100", "--data", "."], "train*.parquet"),
        (["incomplete.py"], "has a function load_data"),
        (["digits", "--stack", "layers"], "layers"),
        (["pose"], "--data"),
        (["pose", "--data", "nowhere"], "nowhere has no train split"),
        (["pose", "--data", ".", "--model", "tokenpose"], "--model tokenpose: not a plain model"),
        (["pose", "--data", ".", "--model", "sdpose_s_v1"], "there are tokenpose_s_v1"),
        (["pose", "--data", ".", "--model", "tokenreg_s"], "and heat maps"),
        (["pose", "--data", ".", "--input-size", "100", "75"], "input_size=(100, 75)"),
        (["digits", "--model", "tokenpose_s_v1"], "--model"),
    ],
)
def test_bad_arguments_are_refused_with_a_message(command, monkeypatch, tmp_path, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    Path("incomplete.py").write_text("def build_model(seed): ...")
    try:
        code = command(*arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and told in capsys.readouterr().err
    assert not Path("results").exists()  # before any training


# -- side by side ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_side_by_side_end_as_one_after_the_other(command, task, tmp_path, no_figure):
    assert command(task, "--seeds", 1, out=tmp_path / "one") == 0
    assert command(task, "--seeds", 1, jobs=2, out=tmp_path / "two") == 0
    one, two = (sorted(measured(row) for row in rows_in(tmp_path / name)) for name in ("one", "two"))
    assert one == two and {row["runs at once"] for row in rows_in(tmp_path / "two")} == {"2"}


@pytest.mark.slow
def test_a_training_that_dies_ends_the_call_with_a_message(command, task, tmp_path, capsys):
    (tmp_path / "die").touch()
    assert command(task, "--seeds", 1, jobs=2) == 2
    assert "ended with exit code 3; finished runs are kept" in capsys.readouterr().err


def test_as_many_runs_at_once_as_memory_and_cores_allow(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    for free_gib, jobs in ((78, 6), (20, 3), (2, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free_gib: (free * 2**30, 80 * 2**30))
        assert workers.jobs_for("cuda") == jobs
    assert workers.jobs_for("cpu") == 1


# -- statistics --------------------------------------------------------------------------------------------------------


def test_the_interval_is_students():
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2 and interval.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    values, others = np.random.default_rng(0).normal(size=(2, 7))
    expected = stats.ttest_rel(values, others).confidence_interval(0.95)
    found = paired_difference(values, others)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(tuple(expected))


def test_a_single_seed_gives_no_interval():
    assert str(t_interval([0.5])) == "+0.50 n/a" and t_interval([0.5]).contains_zero


def test_retention_is_a_ratio_of_mean_gains_with_fiellers_interval():
    plain, one, every = [50.0, 51.0, 52.0, 50.5], [50.6, 51.4, 52.7, 51.0], [51.0, 52.1, 52.9, 51.6]
    found = retention(plain, one, every)
    assert found.share == pytest.approx(2.2 / 4.1)  # sums of the four differences
    kept, gained = np.subtract(one, plain), np.subtract(every, plain)
    for bound in (found.low, found.high):  # where the t-test of kept - share * gained just turns
        assert stats.ttest_1samp(kept - bound * gained, 0).pvalue == pytest.approx(0.05)
    assert found.low < found.share < found.high


def test_no_retention_where_the_gain_may_be_nothing():
    plain, one = [50.0, 51.0, 52.0], [50.5, 51.2, 52.1]
    assert retention(plain, one, [50.2, 50.9, 52.1]) is None
    assert retention(plain, one, [51.0, 52.1, 53.1]) is not None
    assert retention([50.0], [51.0], [52.0]) is None  # no interval, so it may be nothing


# -- CIFAR-100 ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Twelve training and six test images in CIFAR-100's columns."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, draw = tmp_path / "parquet", np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 12), ("test", 6)):
        images = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        columns = {"img": list(images), "fine_label": list(range(count))}
        features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.Value("int64")})
        datasets.Dataset.from_dict(columns, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_packed_images_are_those_of_the_parquet_files(parquet, tmp_path, monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["gain.py", "pack", str(parquet), str(tmp_path / "packed")])
    assert gain.main() == 0
    monkeypatch.setitem(sys.modules, "datasets", None)  # packed images need none
    packed = cifar.load_file(cifar.decoded(tmp_path / "packed", tmp_path / "b"))
    monkeypatch.undo()
    direct = cifar.load_file(cifar.decoded(parquet, tmp_path / "a"))
    assert direct["train_images"].shape == (12, 3, 32, 32) and direct["test_labels"].tolist() == [0, 1, 2, 3, 4, 5]
    assert all(torch.equal(packed[name], direct[name]) for name in direct)
    assert len(cifar.load_file(cifar.decoded(parquet, tmp_path / "a", images=4))["train_labels"]) == 4


def test_batches_of_cifar_follow_from_seed_and_epoch(parquet, tmp_path):
    cache = cifar.decoded(parquet, tmp_path)
    first, again, other_seed = (cifar.load_data(seed, torch.device("cpu"), cache) for seed in (0, 0, 1))
    images, targets = next(first.batches(3))
    torch.manual_seed(1), np.random.seed(1)  # what the model draws does not matter
    for expected, found in zip((images, targets), next(again.batches(3)), strict=True):
        assert torch.equal(expected, found)
    assert images.shape == (12, 3, 32, 32) and targets.shape == (12, 100)
    assert not torch.equal(images, next(other_seed.batches(3))[0])


def test_an_epoch_of_cifar_shows_every_image_once_in_a_new_order(parquet, tmp_path, monkeypatch):
    monkeypatch.setitem(cifar.MIXUP, "prob", 0.0)  # so that targets tell labels
    monkeypatch.setattr(cifar, "BATCH", 4)
    data = cifar.load_data(0, torch.device("cpu"), cifar.decoded(parquet, tmp_path))
    orders = [[int(t) for _, targets in data.batches(epoch) for t in targets.argmax(-1)] for epoch in (0, 1)]
    assert data.steps_per_epoch == 3 and orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))


def test_a_handful_of_cifar_images_trains(parquet, command, tmp_path, no_figure):
    assert command("cifar100", "--data", parquet, "--seeds", 1, "--epochs", 1, "--images", 4) == 0
    rows = rows_in(tmp_path)
    assert [row["images"] for row in rows] == ["4"] * 3 and rows[0]["metric"] == "test top-1"


def test_the_model_of_cifar_is_deit_tiny_with_four_blocks():
    model = cifar.build_model(0)
    assert len(model.blocks) == 4 and model.embed_dim == 192 and model.pos_embed.shape == (1, 65, 192)
    assert runs.Arm("x", cycles=3).passes == runs.Arm("y", longer=3).passes == 3


# -- pose --------------------------------------------------------------------------------------------------------------

SIZE = (64, 48)  # the smallest that two patches of the model fit into


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """A dozen synthetic images, up to three figures in each."""
    return write_figures(tmp_path_factory.mktemp("data") / "figures", train=8, val=4, seed=0, size=(120, 160))


@pytest.fixture(scope="module")
def people(figures, tmp_path_factory):
    return pose.decoded(figures, tmp_path_factory.mktemp("cache"), SIZE)


@pytest.fixture
def shallow(monkeypatch):
    """TokenPose-S of two blocks."""
    preset = replace(pose.PRESETS["tokenpose_s_v1"], depth=2, dim=48, heads=2)
    monkeypatch.setitem(pose.PRESETS, "tokenpose_s_v1", preset)


@pytest.fixture
def task_of_figures(people, shallow):
    return pose.pose_task("tokenpose_s_v1", people)


@pytest.fixture
def data(task_of_figures):
    return task_of_figures.load_data(0, torch.device("cpu"))


def test_pose_trains_in_every_arm_and_names_model_and_size(command, figures, shallow, tmp_path, no_figure):
    size = ["--input-size", *SIZE]
    assert command("pose", "--data", figures, *size, "--seeds", 1, "--epochs", 2, "--learning-rate", 1e-2) == 0
    (path,) = (tmp_path / "results").glob("*.csv")
    assert path.name == f"gain-pose-figures-tokenpose_s_v1-64x48-n2-2epochs-cpu-fp32-torch{torch.__version__}.csv"
    rows = read_rows(path)
    assert [row["arm"] for row in rows] == ["plain", "equal compute", f"{SELF} alpha 5e-06"]
    assert {(row["task"], row["model"], row["input size"], row["stack"]) for row in rows} == {
        ("pose-figures", "tokenpose_s_v1", "64x48", "blocks")
    }
    assert {row["weight decay"] for row in rows} == {"0.0"} and all(row["source"] for row in rows)
    assert all(0 <= float(row["one pass"]) <= 100 for row in rows)
    assert [int(row["steps"]) for row in rows] == [2, 4, 2]


def test_people_are_decoded_once_and_anew_for_other_photographs_sizes_and_numbers(figures, tmp_path):
    data, work = shutil.copytree(figures, tmp_path / "data"), tmp_path / "cache"
    path = pose.decoded(data, work, SIZE)
    made = path.stat().st_mtime_ns
    assert pose.decoded(data, work, SIZE) == path and path.stat().st_mtime_ns == made
    few = pose.decoded(data, work, SIZE, images=3)
    assert [len(split.images) for split in pose.on_device(few, torch.device("cpu"))] == [
        3,
        len(pose.load_file(path)["val_images"]),
    ]
    photo = sorted((data / "train2017").iterdir())[0]
    Image.new("RGB", Image.open(photo).size).save(photo)  # another of the same name, size and labels
    black = pose.decoded(data, work, SIZE)
    assert len({path, few, black, pose.decoded(data, work, (96, 72))}) == 4
    assert pose.load_file(black)["train_images"][0].max() == 0 < pose.load_file(path)["train_images"][0].max()


def test_what_pose_cannot_use_is_refused_before_training(command, figures, shallow, tmp_path, capsys, monkeypatch):
    def told(change):
        data = shutil.copytree(figures, tmp_path / "other", dirs_exist_ok=True)
        annotations = data / "annotations/person_keypoints_val2017.json"
        content = json.loads(annotations.read_text())
        change(content)
        annotations.write_text(json.dumps(content))
        assert command("pose", "--data", data, "--input-size", *SIZE, "--seeds", 1, "--epochs", 1) == 2
        assert not (tmp_path / "results").exists()
        return capsys.readouterr().err

    def rename(content):
        content["categories"][0]["keypoints"][0] = "beak"

    assert "both splits need the same key points" in told(rename)
    monkeypatch.setattr(pose, "LARGEST", 1000)
    assert "train on fewer with --images" in told(lambda content: None)


def test_batches_of_people_follow_from_seed_and_epoch(task_of_figures, data):
    torch.manual_seed(1)  # what the model draws does not matter
    again, other = (task_of_figures.load_data(seed, torch.device("cpu")) for seed in (0, 1))
    images, target = next(data.batches(3))
    found_images, found_target = next(again.batches(3))
    assert torch.equal(images, found_images) and all(map(torch.equal, target, found_target))
    assert images.shape[1:] == (3, *SIZE) and target.values.shape[1:] == (17, 16, 12)
    for another in (next(data.batches(4)), next(other.batches(3))):
        assert not torch.equal(images, another[0])


def test_few_people_at_a_time_see_the_views_of_many(data, task_of_figures, monkeypatch):
    monkeypatch.setattr(pose, "BATCH", 4)
    many = list(task_of_figures.load_data(0, torch.device("cpu")).batches(0))
    monkeypatch.setattr(pose, "AT_ONCE", 1)
    few = list(task_of_figures.load_data(0, torch.device("cpu")).batches(0))
    assert len(many) == len(few) > 1 and all(len(images) == 4 for images, _ in few)
    for (images, target), (found_images, found_target) in zip(many, few, strict=True):
        assert torch.equal(images, found_images) and torch.equal(target.values, found_target.values)


def test_heat_maps_stand_where_crops_show_the_key_points(people, task_of_figures, monkeypatch):
    """A white square at everybody's nose, which mirroring exchanges with nothing, in black images."""
    train, test = pose.on_device(people, torch.device("cpu"))
    noses = transform_points(train.matrices, train.keypoints[:, :1, :2])[:, 0].round().int().tolist()
    images = torch.zeros_like(train.images)
    for image, (x, y) in zip(images, noses, strict=True):
        image[:, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3] = 255
    monkeypatch.setattr(pose, "on_device", lambda *_: (replace(train, images=images), test))
    data, seen = task_of_figures.load_data(0, torch.device("cpu")), []
    for epoch in range(10):
        for crops, (maps, weights) in data.batches(epoch):
            crops, maps = crops[:, 0] - crops[:, 0].amin((1, 2), keepdim=True), maps[:, 0]
            y, x = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
            for crop, heat_map, weight in zip(crops, maps, weights[:, 0], strict=True):
                place = [(crop * axis).sum() / crop.sum() for axis in (x, y)]  # the square's centre
                if weight > 0 and 8 < place[0] < SIZE[1] - 8 and 8 < place[1] < SIZE[0] - 8:
                    row, column = divmod(int(heat_map.argmax()), SIZE[1] // 4)
                    seen.append(max(abs(place[0] - 4 * column), abs(place[1] - 4 * row)))
    assert len(seen) > 30 and max(seen) < 3.5  # of 4 pixels, half of them are rounding


def test_a_mirrored_view_exchanges_left_and_right(task_of_figures, monkeypatch):
    def batch(mirrored):
        def upright(center, scale, *_):
            return View(center, scale, torch.zeros(len(center)), torch.full((len(center),), mirrored))

        monkeypatch.setattr(pose, "random_views", upright)
        return next(task_of_figures.load_data(0, torch.device("cpu")).batches(0))[1]

    (maps, weights), (mirrored, _) = batch(False), batch(True)
    exchanged = exchange_sides(mirrored.flatten(2), COCO.flip_pairs).argmax(-1) % (SIZE[1] // 4)
    columns = maps.flatten(2).argmax(-1) % (SIZE[1] // 4)
    seen = (weights[..., 0] > 0) & (columns > 1) & (columns < 10)
    assert seen.sum() > 50 and ((SIZE[1] // 4 - columns - exchanged)[seen].abs() <= 1).all()


@pytest.mark.parametrize("size, sigma", [((256, 192), 2.0), ((128, 96), 1.0), (SIZE, 1.0)])
def test_gaussians_are_of_the_papers_width_relative_to_the_map(size, sigma):
    config = pose.config_of("tokenpose_s_v1", size)
    maps = pose.target_of(torch.tensor([[[24.0, 32.0]]]), torch.ones(1, 1), config).values[0, 0]
    assert maps[8, 6] == 1 and maps[8, 7].item() == maps[9, 6].item() == pytest.approx(math.exp(-1 / (2 * sigma**2)))


def test_people_cut_out_of_photographs_and_whole_ones_give_the_same_crops(figures, people):
    small = pose.decoded(figures, people.parent, (96, 72))  # 160 pixels are less than twice 96
    cut, whole = pose.on_device(people, torch.device("cpu")), pose.on_device(small, torch.device("cpu"))
    assert cut[0].images.shape[-1] < whole[0].images.shape[-1] == 160
    everybody = torch.arange(len(cut[1].images))
    matrices = torch.tensor([[0.4, 0.0, -10.0], [0.0, 0.4, -5.0]]).expand(len(everybody), 2, 3)
    crops, expected = (split.crops(everybody, matrices, SIZE) for split in (cut[1], whole[1]))
    assert (crops - expected).abs().mean() < 0.35  # one is scaled down first, and black far from the person


def test_pck_is_the_share_of_labelled_key_points_within_a_tenth_of_the_box(task_of_figures, people):
    test, config = pose.on_device(people, torch.device("cpu"))[1], task_of_figures.load_data.keywords["config"]
    keypoints = test.keypoints.clone()
    keypoints[:, ::3, 2] = 0  # not labelled, though they are where they are
    box = 200 * test.scale
    left_top = test.center - box / 2
    shares = (keypoints[..., :2] - left_top[:, None]) / box[:, None]  # of the box
    # peaks on pixels of the 16 x 12 map, so that decoding is exact: at the truth, or up to 3 pixels to the right of it
    peaks = (shares * torch.tensor([12, 16])).round() + torch.stack((torch.arange(17) % 4, torch.zeros(17)), -1)
    peaks = torch.stack((peaks[..., 0].clamp(3, 8), peaks[..., 1].clamp(3, 12)), -1)
    rows = iter(range(len(keypoints)))

    def outputs_of(images):
        x, y = peaks[[next(rows) for _ in images]].unbind(-1)
        across = (torch.arange(12) - x[..., None]).square()[:, :, None, :]
        down = (torch.arange(16) - y[..., None]).square()[..., None]
        return torch.exp(-(across + down) / 2)

    near = []
    for person, truth in enumerate(keypoints.tolist()):
        (left, top), (width, height) = left_top[person].tolist(), box[person].tolist()
        for (x, y, visibility), (column, row) in zip(truth, peaks[person].tolist(), strict=True):
            if visibility > 0:
                found = left + column / 12 * width, top + row / 16 * height
                near.append(math.hypot((found[0] - x) / width, (found[1] - y) / height) < 0.1)
    assert len(near) > 50 and 0.1 < np.mean(near) < 0.9
    assert pose.pck_of(replace(test, keypoints=keypoints), config, outputs_of) == pytest.approx(100 * np.mean(near))


def test_the_true_heat_maps_score_all_key_points_within_the_map(task_of_figures, people, data):
    test, config = pose.on_device(people, torch.device("cpu"))[1], task_of_figures.load_data.keywords["config"]
    upright = View(test.center, test.scale, torch.zeros(len(test.center)), torch.zeros(len(test.center)).bool())
    matrices = view_matrices(upright, SIZE)
    target = pose.target_of(*view_keypoints(test.keypoints, upright, COCO, matrices), config)
    assert data.evaluate(lambda images: target.values) > 95


def test_the_token_term_of_pose_counts_keypoint_and_visual_tokens(data, task_of_figures):
    model = wrap_multicycle(task_of_figures.build_model(0), 2, stack="blocks")
    images, target = next(data.batches(0))
    output = model(images)
    term = runs.cycle_loss(runs.Arm("x", 2, alpha=1.0), data)(output, target)
    task = sum(data.loss(each, target) for each in output.outputs)
    first, second = output.tokens
    parts = [(first[:, part] - second[:, part]).square().mean() for part in (slice(17), slice(17, None))]
    torch.testing.assert_close(term, task + sum(parts))
