"""The whole training command: what it prints and leaves behind, what it refuses, and its figures recomputed by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from timm.data import Mixup
from torch import Tensor, nn

from cyclekd import CycleLoss, run_cycles, wrap_multicycle
from cyclekd.integrations.deit import train as train_module
from cyclekd.integrations.deit.data import load_data
from cyclekd.integrations.deit.distillation import DistillationLoss, Teacher
from cyclekd.integrations.deit.task import Classification
from cyclekd.integrations.deit.train import main, parse_arguments, training_batches
from cyclekd.integrations.runs.sampling import TrainingBatches

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples/train_deit.py"
TRAIN, VALIDATION = 50, 35
SIZE = {"img_size": 8, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's

Command = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Class folders of 50 and 35 images of 10 classes."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    for number, (pixels, label) in enumerate(zip(images[: TRAIN + VALIDATION], labels, strict=False)):
        place = folder / ("train" if number < TRAIN else "val") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels.reshape(8, 8) * 15).astype("uint8")).save(place / f"{number:03}.png")
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate's state is global: the next start, and the next test, begin without it."""
    forget()
    yield
    forget()


def forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def start(
    digits: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs the command on the digits in an empty folder: exit code, stdout, lines of stderr."""
    monkeypatch.chdir(tmp_path)
    options = {"data": digits, "cache-dir": cache, "input-size": 8, "crop": "pad", "crop-pct": 1, "workers": 0}
    options |= {"epochs": 1, "warmup-epochs": 0, "batch-size": 10, "lr": 0.1, "log-every": 1}
    options |= {"rand-augment": "none", "repeated-augmentation": 1}
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    datasets.disable_progress_bars()

    def run(*more: str) -> tuple[int, str, list[str]]:
        forget()
        size = [f"{name}={value}" for name, value in SIZE.items()]
        code = main("what it is", [*given, "--cpu", "--model-args", *size, *more])
        printed = capsys.readouterr()
        return code, printed.out, printed.err.splitlines()

    yield run
    datasets.enable_progress_bars()


def listed(printed: str) -> list[str]:
    """The files that the summary names."""
    _, _, files = printed.rpartition("\nin ")
    return [line.strip() for line in files.splitlines()[1:]]


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def sized(option: str, **changed: object) -> list[str]:
    return [option, *(f"{name}={value}" for name, value in {**SIZE, **changed}.items())]


# -- what a run leaves behind ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_accelerate_launch_trains_on_the_embedded_digits_and_lists_its_files(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1"]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, str(SCRIPT), "--epochs", "1"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/deit_tiny_patch16_224-cycles2"
    assert "embedded digits, split 'train': 1,397 images of 10 classes" in done.stdout
    assert "run folder: runs/deit_tiny_patch16_224-cycles2" in done.stdout
    assert "the recipe's is 1024" not in done.stdout, "the first look has a recipe of its own"

    last = records(folder, "evaluation")[-1]
    assert last["images"] == 400 and last["epoch"] == 1
    for cycle, which in ((1, "one pass, as deployed"), (2, "2 cycles")):
        found = re.search(rf"^  {which} +top1 ([\d.]+)  top5 ([\d.]+)  loss ([\d.]+)$", done.stdout, re.MULTILINE)
        expected = [last[f"{name}_{cycle}"] for name in ("top1", "top5", "loss")]
        assert [float(number) for number in found.groups()] == pytest.approx(expected, abs=0.006)
    assert last["top1_1"] > 15 and records(folder, "train")[-1]["loss"] < records(folder, "train")[0]["loss"]

    names = listed(done.stdout)
    expected = ["README.md", "best/model.safetensors", "config.json", "curves.png", "environment.json", "log.jsonl"]
    assert {*expected, "model/config.json", "model/model.safetensors"} < set(names)
    assert any(name.startswith("checkpoints/step-") for name in names)
    assert [name for name in names if not (folder / name).exists()] == []


def test_without_out_every_run_gets_a_folder_of_its_own_and_the_first_one_stays(start: Command) -> None:
    assert start()[0] == 0
    folder = Path("runs/deit_tiny_patch16_224-cycles2")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, printed, _ = start()
    second = Path("runs/deit_tiny_patch16_224-cycles2-2")
    assert code == 0 and f"run folder: {second}" in printed
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sorted(Path("runs").iterdir()) == [folder, second]
    one, other = (load_file(each / "model/model.safetensors") for each in (folder, second))
    assert all(torch.equal(value, other[name]) for name, value in one.items()), "the seed is the same"


def test_a_run_says_what_it_does_before_it_begins(start: Command) -> None:
    _, printed, _ = start("--out", "here", "--accumulate", "2", "--cycles", "3")
    assert "split 'train': 50 images of 10 classes\n" in printed and "split 'validation': 35 images\n" in printed
    assert "deit_tiny_patch16_224, 3 cycles, fp32 on cpu\n" in printed
    assert "1 epochs of 2 steps; global batch 20 (10 x 1 processes x 2 accumulated)\n" in printed
    assert "note: the global batch is 20, the recipe's is 1024" in printed
    written = {str(path.relative_to("here")) for path in Path("here").rglob("*") if path.is_file()}
    assert {name for name in written if "checkpoints" not in name} | {"checkpoints/step-00000002"} == set(
        listed(printed)
    )
    assert "unreadable" not in printed and records(Path("here"), "skipped") == []
    for which in ("one pass, as deployed", "2 cycles", "3 cycles"):
        assert len(re.findall(rf"^  {which} +top1 [\d.]+  top5 [\d.]+  loss [\d.]+$", printed, re.MULTILINE)) == 1


def test_the_finished_model_and_card_need_timm_alone(start: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start("--out", "here", "--ema", "0.5")[0] == 0
    monkeypatch.chdir("here")
    card = Path("README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {"images": torch.randn(2, 3, 8, 8)}
    exec(code, names)
    assert "cyclekd" not in code and names["logits"].shape == (2, 10)
    averaged = load_file(next(Path("checkpoints").iterdir()) / "averaged.safetensors")
    found = names["model"].state_dict()
    assert found.keys() == averaged.keys()
    assert all(torch.equal(value, averaged[name]) for name, value in found.items())
    last = records(Path(), "evaluation")[-1]
    assert f"| top1 | {last['top1_1']:.5g} | {last['top1_2']:.5g} |" in card
    assert f"| top1_ema | {last['top1_1_ema']:.5g} | {last['top1_2_ema']:.5g} |" in card


def test_a_finished_run_that_is_resumed_trains_no_further(start: Command) -> None:
    start("--out", "here")
    before = {path: path.read_bytes() for path in Path("here").rglob("*.safetensors")}
    code, printed, _ = start("--out", "here", "--resume")
    assert code == 0 and "finished after 5 of 5 steps" in printed
    assert {path: path.read_bytes() for path in Path("here").rglob("*.safetensors")} == before


@pytest.mark.parametrize("cycles", [1, 2])
def test_the_trained_weights_are_those_of_a_loop_written_by_hand(start: Command, digits, cache, cycles: int) -> None:
    """Nothing random but weights and order: the images are whole, and no label is mixed or smoothed."""
    fixed = ["--crop", "random-resized", "--scale", "1", "1", "--hflip", "0", "--erase", "0", "--drop-path", "0"]
    fixed += ["--mixup", "0", "--cutmix", "0", "--smoothing", "0", "--cycles", str(cycles)]
    fixed += ["--alpha", "0.1"] if cycles > 1 else []
    code, *_ = start("--out", "here", *fixed, "--lr", "0.5", "--epochs", "2", "--warmup-epochs", "1")
    assert code == 0
    found = load_file("here/model/model.safetensors")

    table = load_data(str(digits), cache_dir=str(cache)).train
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=10, **SIZE).train()
    first = {name: value.clone() for name, value in model.state_dict().items()}
    decays = {name: p.ndim > 1 and name not in ("cls_token", "pos_embed") for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in decays if decays[name]], "weight_decay": 0.05},
            {"params": [parameters[name] for name in decays if not decays[name]], "weight_decay": 0.0},
        ]
    )
    if cycles == 2:
        wrap_multicycle(model, cycles=2)
    peak = 0.5 * 10 / 512
    for step, draws in enumerate(TrainingBatches(TRAIN, batch=10, epochs=2, seed=0)):
        for group in optimizer.param_groups:
            warming = 1e-6 + (peak - 1e-6) * step / 5
            falling = 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * step / 10)) / 2
            group["lr"] = warming if step < 5 else falling
        images = torch.stack([pixels(table.read(draw.index)) for draw in draws])
        labels = torch.tensor([table.labels[draw.index] for draw in draws])
        output = model(images)
        if cycles == 1:
            loss = F.cross_entropy(output, labels)
        else:
            loss = sum(F.cross_entropy(each, labels) for each in output.outputs) + 0.1 * F.mse_loss(*output.tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert max((value - first[name]).abs().max() for name, value in found.items()) > 1e-2


def pixels(image: Image.Image) -> Tensor:
    """[3, 8, 8], normalised as ImageNet is."""
    grey = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).view(1, 8, 8) / 255
    return (grey - MEAN[:, None, None]) / STD[:, None, None]


def test_repeated_augmentation_reaches_the_order_of_training(digits: Path, cache: Path) -> None:
    args = parse_arguments("", ["--data", str(digits), "--cache-dir", str(cache), "--batch-size", "12"])
    alone = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    data = load_data(str(digits), cache_dir=str(cache))
    order, _, _ = training_batches(alone, args, data, transform=lambda image, seed: {}, workers=0)
    drawn = [draw.index for batch in list(order)[: order.steps_per_epoch] for draw in batch]
    assert {drawn.count(index) for index in drawn} == {3}


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.fixture
def refused(start: Command, tmp_path: Path) -> Callable[..., str]:
    """The one line on stderr of a start that fails with exit code 2 and leaves nothing behind."""

    def run(*arguments: str) -> str:
        before = everything(tmp_path)
        code, printed, errors = start(*arguments)
        assert code == 2 and printed == "" and len(errors) == 1, errors
        assert everything(tmp_path) == before
        assert errors[0].startswith("error: ")
        return errors[0]

    return run


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


INPUT = {
    "missing folder": (["--data", "./absent"], r"--data ./absent: there is no such folder"),
    "no cycle": (["--cycles", "0"], r"--cycles 0: has to be at least 1"),
    "odd batch": (["--batch-size", "5"], r"--batch-size 5: mixup pairs images, so it has to be even"),
    "large batch": (["--batch-size", "52"], r"one global batch is 52 samples .*there are 50 .* smaller --batch-size"),
    "no batch": (["--batch-size", "0"], r"--batch-size 0: has to be at least 1"),
    "unknown model": (["--model", "deit_tinny"], r"--model deit_tinny: timm has no model of this name"),
    "unknown tracker": (["--report-to", "nothing"], r"--report-to nothing: Accelerate has .*tensorboard"),
    "number of classes": (["--num-classes", "7"], r"has 10 classes, and --num-classes says 7"),
    "average": (["--ema", "1.5"], r"--ema 1.5: a decay is between 0 and 1"),
    "weights": (["--init-from", "absent"], r"--init-from absent: there is no such file"),
    "teacher": (["--teacher", "absent"], r"--teacher absent: timm has no model of this name"),
    "augmentation": (["--rand-augment", "junk"], r"timm does not understand 'junk'"),
    "probability": (["--erase", "2"], r"erase 2.0: a probability is between 0 and 1"),
    "negative weight": (["--rho", "-1"], r"--rho -1.0: has to be at least 0"),
    "rhythm": (["--checkpoint-every", "0"], r"--checkpoint-every 0: has to be above 0"),
    "several stacks": (["--model", "resnet18", "--model-args", "in_chans=3"], r"ResNet"),
}


@pytest.mark.parametrize(("arguments", "message"), INPUT.values(), ids=INPUT)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(refused, arguments, message) -> None:
    assert re.search(message, refused(*arguments))
    assert re.search(message, refused(*arguments, "--out", "chosen"))


NOT_INSTALLED = next(name for name in ("dvclive", "swanlab") if not importlib.util.find_spec(name))
MORE_INPUT = {
    "no epoch": (["--epochs", "0"], r"--epochs 0"),
    "negative rate": (["--lr", "-1"], r"--lr -1"),
    "negative seed": (["--seed", "-1"], r"--seed -1"),
    "dropped paths": (["--drop-path", "2"], r"--drop-path 2"),
    "smoothing": (["--mixup", "0", "--cutmix", "0", "--smoothing", "2"], r"--smoothing 2"),
    "size of images": (sized("--model-args", img_size=16), r"--input-size 8 .*16"),
    "absent tracker": (["--report-to", NOT_INSTALLED], rf"{NOT_INSTALLED} is not installed"),
    "no clipping": (["--clip-grad", "0"], r"--clip-grad 0.0: has to be above 0"),
    "head of nothing": (["--new-head"], r"--new-head: goes with --init-from"),
    "half precision": (["--mixed-precision", "fp16"], r"fp16: needs a GPU"),
}


@pytest.mark.parametrize(("arguments", "message"), MORE_INPUT.values(), ids=MORE_INPUT)
def test_more_bad_input_is_refused_in_one_line(refused, arguments: list[str], message: str) -> None:
    assert re.search(message, refused(*arguments))


def test_resuming_needs_the_name_of_a_folder(refused) -> None:
    assert "--resume: which run? Name its folder with --out" in refused("--resume")


def test_folders_without_images_are_refused(refused, tmp_path: Path) -> None:
    Path("none").mkdir()
    assert "--data none has no splits. Looked for" in refused("--data", "none")
    for split in ("train", "val"):
        (Path("empty") / split / "cat").mkdir(parents=True)
    assert "--data empty" in refused("--data", "empty") and "no images" in refused("--data", "empty")


def test_a_folder_that_holds_something_is_not_written_into(refused) -> None:
    Path("mine").mkdir()
    (Path("mine") / "thesis.tex").write_text("years of work")
    message = "--out mine: holds thesis.tex, which are no run: choose another --out"
    assert message in refused("--out", "mine") and message in refused("--out", "mine", "--resume")


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(start: Command, refused) -> None:
    assert start("--out", "mine")[0] == 0
    assert "--out mine: holds a run: continue it with --resume" in refused("--out", "mine")
    changed = ["--lr", "0.5", "--cycles", "3"]
    message = refused("--out", "mine", "--resume", *changed)
    assert "the run in mine was started with other settings: cycles was 2 and is 3; lr was 0.1 and is 0.5" in message


@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_out_of_range_are_refused_with_split_and_row(refused, split: str) -> None:
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    Path("table").mkdir()
    image = Image.new("RGB", (8, 8))
    for name in ("train", "validation"):
        labels = [0, 1, 2, 9 if name == split else 3] * 3
        table = datasets.Dataset.from_dict({"image": [image] * 12, "label": labels}, columns)
        table.to_parquet(f"table/{name}-00000-of-00001.parquet")
    message = refused("--data", "table", "--num-classes", "4")
    assert f"split {split!r}: 3 of 12 labels lie outside of 0 .. 3; the first is 9 in row 3" in message


def test_weights_of_other_classes_are_refused_with_the_way_out(refused, start: Command) -> None:
    save_file(timm.create_model("deit_tiny_patch16_224", num_classes=7, **SIZE).state_dict(), "other.safetensors")
    message = refused("--init-from", "other.safetensors")
    assert "has 7 classes" in message and "the data has 10" in message and "--new-head" in message
    assert start("--init-from", "other.safetensors", "--new-head")[0] == 0


# -- images that cannot be read --------------------------------------------------------------------------------


def test_unreadable_images_are_replaced_in_training_not_counted_in_evaluation_and_told(
    start: Command, digits: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    broken, truncated = (data / "train/3/003.png"), (data / "train/5/005.png")
    missing_in_val = sorted((data / "val").rglob("*.png"))[4]
    broken.write_text("no image")
    truncated.write_bytes(truncated.read_bytes()[:-30])
    missing_in_val.write_bytes(b"")
    code, printed, _ = start("--data", str(data), "--out", "here", "--epochs", "2")
    assert code == 0
    assert "  2 unreadable training images were replaced: see log.jsonl\n" in printed
    assert "  1 unreadable validation images do not count\n" in printed
    told = {
        Path(re.search(r"\((.*?)\)", each["why"])[1]).name: each["why"] for each in records(Path("here"), "skipped")
    }
    assert told.keys() == {"003.png", "005.png"} and len(records(Path("here"), "skipped")) == 2
    assert told["003.png"].endswith(": no image format that PIL knows")
    assert "truncated" in told["005.png"]
    last = records(Path("here"), "evaluation")[-1]
    assert last["images"] == VALIDATION - 1 and last["skipped"] == 2
    assert "Validation images: 34." in Path("here/README.md").read_text()


# -- the task: losses and metrics ------------------------------------------------------------------------------


class Validation(torch.utils.data.Dataset):
    """Thirteen random images of which the fourth cannot be read; what is beyond the end does not count."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(2)
        self.images = torch.randint(0, 256, (13, 3, 8, 8), generator=draw, dtype=torch.uint8)
        self.labels = torch.randint(0, 10, (13,), generator=draw)

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> dict[str, Any]:
        valid = index not in (-1, 3)
        image = self.images[index] if valid else torch.zeros(3, 8, 8, dtype=torch.uint8)
        return {"image": image, "label": self.labels[max(index, 0)], "index": index, "valid": valid}


def network(cycles: int, **changed: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=10, **{**SIZE, **changed})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return wrap_multicycle(model, cycles=cycles) if cycles > 1 else model


def task_of(cycles: int, **options: Any) -> Classification:
    return Classification(
        Accelerator(cpu=True),
        options.pop("criterion", CycleLoss(F.cross_entropy)),
        augment=lambda batch: batch["image"].clone(),  # mixup works in place
        normalise=lambda images: images.float() / 255 - 0.5,
        validation=Validation(),
        batch=4,
        workers=0,
        cycles=cycles,
        seed=0,
        **options,
    )


@pytest.mark.parametrize("cycles", [1, 3])
def test_evaluation_gives_what_a_loop_over_single_images_gives_for_every_cycle(cycles: int) -> None:
    model, data = network(cycles), Validation()
    found = task_of(cycles).evaluate(model.train())
    model.eval()
    counted = [index for index in range(13) if index != 3]
    expected: dict[str, float] = {"images": 12}
    for cycle in range(cycles):
        top1 = top5 = loss = 0.0
        for index in counted:
            image = data.images[index][None].float() / 255 - 0.5
            logits = (run_cycles(model, image).outputs[cycle] if cycles > 1 else model(image))[0].tolist()
            label = int(data.labels[index])
            rank = sum(value > logits[label] for value in logits)
            top1, top5 = top1 + (rank < 1), top5 + (rank < 5)
            loss += math.log(sum(math.exp(value) for value in logits)) - logits[label]
        expected |= {f"top1_{cycle + 1}": 100 * top1 / 12, f"top5_{cycle + 1}": 100 * top5 / 12}
        expected[f"loss_{cycle + 1}"] = loss / 12
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < found["top5_1"] < 100
    if cycles > 1:
        assert len({round(found[f"loss_{cycle}"], 3) for cycle in (1, 2, 3)}) == 3


def test_fewer_than_five_classes_have_a_top5_of_all() -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=3, **SIZE)
    task = task_of(1)
    task.validation.labels %= 3
    assert task.evaluate(model)["top5_1"] == 100


def test_the_teacher_sees_the_mixed_images_that_the_model_sees() -> None:
    seen: dict[str, Tensor] = {}
    teacher, model = network(1, depth=1), network(2)
    teacher.register_forward_pre_hook(lambda module, args: seen.update(teacher=args[0]))
    model.register_forward_pre_hook(lambda module, args: seen.update(model=args[0]))
    loss = DistillationLoss(
        lambda logits, target: -(target * logits.log_softmax(1)).sum(1).mean(), hard=True, alpha=0.5
    )
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=0, num_classes=10)
    task = task_of(2, criterion=CycleLoss(loss, alpha=0.1), mixup=mixup, teacher=Teacher(teacher))
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 3, 4])
    batch = {"image": images.clone(), "label": labels}
    terms = task.loss(model.train(), batch, step=7)
    assert torch.equal(seen["model"], seen["teacher"]) and not torch.equal(seen["model"], images)
    assert {"loss", "task_1", "task_2", "tokens_1_2"} <= terms.keys()
    torch.testing.assert_close(terms["loss"], terms["task_1"] + terms["task_2"] + terms["tokens_1_2"])
    terms["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())

    def mixed(step: int) -> Tensor:
        task.loss(model, {"image": images.clone(), "label": labels}, step)
        return seen["model"]

    assert torch.equal(mixed(7), mixed(7)) and not torch.equal(mixed(7), mixed(8))


def test_the_example_is_the_command_and_its_help_begins_with_how_to_run_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.spec_from_file_location("train_deit", SCRIPT)
    example = importlib.util.module_from_spec(found)
    found.loader.exec_module(example)
    assert example.main is train_module.main
    with pytest.raises(SystemExit) as ended:
        example.main(example.__doc__, ["--help"])
    assert ended.value.code == 0
    assert "accelerate launch examples/train_deit.py  " in capsys.readouterr().out
