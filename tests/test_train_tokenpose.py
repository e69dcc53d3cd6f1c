"""The whole pose training: what it leaves behind, what it refuses, killed and resumed, on one process or two."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

pytest.importorskip("pycocotools")

from cyclekd.integrations.runs import training as curves
from cyclekd.integrations.tokenpose import (
    COCO,
    CROWDPOSE,
    Target,
    TokenPose,
    from_pretrained,
    read_people,
    save_pretrained,
)
from cyclekd.integrations.tokenpose.data import crops
from cyclekd.integrations.tokenpose.data.crops import EvaluationCrops
from cyclekd.integrations.tokenpose.data.views import ViewSettings
from cyclekd.integrations.tokenpose.data.warp import warp_exact
from cyclekd.integrations.tokenpose.evaluation import pictures
from cyclekd.integrations.tokenpose.evaluation.predicting import evaluate_cycles, predict_cycles
from cyclekd.integrations.tokenpose.figures.draw import write_figures
from cyclekd.integrations.tokenpose.losses.targets import usual_sigma
from cyclekd.integrations.tokenpose.models.create import create_model
from cyclekd.integrations.tokenpose.training import data as training_data
from cyclekd.integrations.tokenpose.training import train as training_command
from cyclekd.integrations.tokenpose.training.arguments import (
    FIRST_LOOK,
    check_arguments,
    check_objective,
    parse_arguments,
    recipe_warnings,
)
from cyclekd.integrations.tokenpose.training.data import view_settings
from cyclekd.integrations.tokenpose.training.model import build_model, named_config
from cyclekd.integrations.tokenpose.training.objective import Supervised, make_criterion, weights_of_model
from cyclekd.integrations.tokenpose.training.task import PoseTraining
from cyclekd.integrations.tokenpose.training.train import build_schedule, main
from test_resume import all_equal, records, run

Command = Callable[..., tuple[int, str, list[str]]]
SIZE = ["input_size=64,48", "depth=2", "dim=32", "heads=4", "stage1_width=8"]
PEOPLE, VALIDATED = 45, 13


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic figures, one in an image."""
    folder = tmp_path_factory.mktemp("figures") / "data"
    return write_figures(folder, train=PEOPLE, val=VALIDATED, seed=1, size=(96, 128), people=(1, 1))


def arguments(data: Path, out: Path, *more: str, batch: int = 8, cache: Path | None = None) -> list[str]:
    options = {"data": data, "out": out, "model": "sdpose_s_v1", "epochs": 2, "batch-size": batch, "log-every": 1}
    options |= {"workers": 0, "warmup-steps": 2, "lr-drop-epochs": 1}
    if cache is not None:
        options["cache-dir"] = cache
    return [part for name, value in options.items() for part in (f"--{name}", str(value))] + [
        "--model-args",
        *SIZE,
        *more,
    ]


def start_run(data: Path, folder: Path, *more: str, cache: Path | None = None) -> int:
    forget()
    return main("what it is", [*arguments(data, folder, *more, cache=cache), "--cpu"])


def forget() -> None:
    """Accelerate's state is global: the next start begins without it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def changed(data: Path, folder: Path, change: Callable[[dict[str, Any]], None], *splits: str) -> Path:
    """A copy of the data whose annotations are changed in these splits, or both."""
    shutil.copytree(data, folder)
    for split in splits or ("train", "val"):
        file = annotations_of(folder, split)
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    return folder


def annotations_of(folder: Path, split: str) -> Path:
    return folder / f"annotations/person_keypoints_{split}2017.json"


# -- what a run leaves behind --------------------------------------------------------------------------------------


@pytest.fixture
def start(data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Runs the command on the figures: exit code, stdout, lines of stderr. Pictures, most of the time, are left out."""
    monkeypatch.setattr(curves, "draw_curves", lambda *_: None)
    monkeypatch.setattr(training_command, "draw_predictions", lambda *_: None)

    def command(*more: str, data: Path = data, cache: Path | None = tmp_path / "cache") -> tuple[int, str, list[str]]:
        code = start_run(data, tmp_path / "run", *more, cache=cache)
        printed = capsys.readouterr()
        return code, printed.out, printed.err.splitlines()

    yield command
    forget()


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A whole run's folder, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert start_run(data, folder, "--lr", "3e-3") == 0
    yield folder, printed.getvalue()
    forget()


def test_a_run_ends_with_ap_per_cycle_pictures_and_the_plain_model(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    evaluations = [record for record in records(folder) if record["kind"] == "evaluation"]
    assert [record["people"] for record in evaluations] == [VALIDATED, VALIDATED]
    assert all(f"{name}_{cycle}" in evaluations[-1] for name in ("AP", "AP50", "AR") for cycle in (1, 2))
    assert f"AP {evaluations[-1]['AP_1']:.4f}" in printed and "  2 cycles  " in printed
    for name in ("model/model.safetensors", "model/config.json", "curves.png", "predictions.png", "README.md"):
        assert (folder / name).is_file() and name in printed
    model = from_pretrained(folder / "model", cycles=1)
    assert model(torch.randn(1, 3, 64, 48)).shape == (1, 17, 16, 12)
    last = load_file(folder / f"checkpoints/step-{2 * (PEOPLE // 8):08}/model.safetensors")
    assert all_equal(load_file(folder / "model/model.safetensors"), weights_of_model(last))


def test_ground_truth_boxes_are_told_wherever_figures_are(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    record, *_ = records(folder)
    assert (record["kind"], record["boxes"], record["validation_people"]) == ("data", "ground truth", VALIDATED)
    assert printed.count("ground truth boxes") == 2
    assert f"{VALIDATED} people" in (card := (folder / "README.md").read_text()) and "ground truth boxes" in card


def test_a_finished_run_that_is_resumed_stays_as_it_is(finished: tuple[Path, str], data: Path, capsys: Any) -> None:
    folder, _ = finished
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    before = {path: path.read_bytes() for path in paths}
    assert start_run(data, folder, "--lr", "3e-3", "--resume") == 0
    assert "finished after 10 of 10 steps" in capsys.readouterr().out
    assert [path for path in sorted(folder.rglob("*")) if path.is_file()] == paths
    assert [path for path in paths if path.read_bytes() != before[path]] == []


@pytest.mark.parametrize("labelled", [True, False])
def test_the_truth_is_drawn_at_the_left_and_the_prediction_at_the_right(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labelled: bool
) -> None:
    """The network says the upper left pixel for every key point; a detector's boxes have no truth."""
    people = read_people(annotations_of(data, "val"), data / "val2017", for_training=False)
    if not labelled:
        people = replace(people, keypoints=torch.zeros_like(people.keypoints))
    samples, drawn, titles = EvaluationCrops(people, (64, 48)), [], []
    monkeypatch.setattr(pictures.Figure, "suptitle", lambda figure, title, **_: titles.append(title))
    monkeypatch.setattr(pictures, "draw_poses", lambda image, *poses, **_: drawn.append(poses) or image)
    model = create_model("tokenpose_t_6", input_size=(64, 48), depth=2, dim=32, heads=4, stage1_width=8)
    monkeypatch.setattr(model, "forward", lambda images: torch.eye(1, 192).reshape(1, 1, 16, 12).repeat(12, 17, 1, 1))
    pictures.draw_predictions(tmp_path / "picture.png", model, samples, "name")
    assert titles == ["name: annotated (left) and predicted in one pass (right), ground truth boxes"]
    assert len(drawn) == 24 and not np.array_equal(drawn[0][0], drawn[2][0])
    rows = [samples[round(row)] for row in np.linspace(0, VALIDATED - 1, 12).astype(int).tolist()]
    for sample, (points, shown, _), (predicted, all_shown, _) in zip(rows, drawn[::2], drawn[1::2], strict=True):
        assert np.allclose(points[0], (sample["keypoints"].numpy() + 0.5) * 6 - 0.5, atol=1e-3)
        assert shown[0].tolist() == (sample["visible"] > 0).tolist() and shown.any() == labelled
        assert np.allclose(predicted, 2.5) and all_shown.all()


def test_the_curves_show_the_loss_terms_and_three_figures_of_every_cycle(
    start: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[dict[str, object]], object]] = []
    monkeypatch.setattr(curves, "draw_curves", lambda path, records, title, measures: drawn.append((records, measures)))
    assert start("--epochs", "1")[0] == 0
    records, measures = drawn[-1]
    assert measures == ("AP", "AP50", "AR")
    names = {kind: {name for r in records if r["kind"] == kind for name in r} for kind in ("train", "evaluation")}
    assert names["evaluation"] >= {f"{name}_{cycle}" for name in measures for cycle in (1, 2)}
    assert names["train"] >= {"loss", "lr", "task_1", "task_2", "tokens_1_2", "mse_keypoint_1_2", "mse_visual_1_2"}
    assert not any(name.startswith("alpha") for name in names["train"])


def test_a_run_learns(start: Command, tmp_path: Path) -> None:
    assert start("--epochs", "3", "--evaluate-every", "3", "--lr-drop-epochs", "--warmup-steps", "0")[0] == 0
    losses = [record["task_1"] for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])


def test_one_cycle_is_the_plain_baseline(start: Command, tmp_path: Path) -> None:
    code, printed, _ = start("--cycles", "1", "--epochs", "1")
    assert code == 0 and ", 1 cycle, " in printed
    assert not any(name.startswith("tokens") for record in records(tmp_path / "run") for name in record)


def test_bf16_accumulation_clipping_and_exact_crops_go_together(
    start: Command, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = []
    monkeypatch.setattr(crops, "warp_exact", lambda *given: exact.append(given) or warp_exact(*given))
    options = "--mixed-precision bf16 --accumulate 2 --clip-grad 0.5 --no-flip-test --exact-crops --epochs 1".split()
    before = sorted(data.rglob("*"))
    code, printed, _ = start(*options, cache=None)
    assert code == 0 and "bf16 on cpu" in printed and "global batch 16" in printed
    assert len(exact) == 2 * 16 + VALIDATED
    assert sorted(data.rglob("*")) == before, "a cache was made"


def test_the_cache_of_people_is_beside_the_annotations_and_used_again(
    start: Command, data: Path, tmp_path: Path
) -> None:
    own = changed(data, tmp_path / "own", lambda content: None)
    assert start("--epochs", "1", "--minutes", "1e-9", data=own, cache=None)[0] == 0
    (cache,) = own.glob("annotations/.cyclekd/people-*.arrow")
    made = cache.stat()
    assert start("--epochs", "1", "--minutes", "1e-9", "--resume", data=own, cache=None)[0] == 0
    assert cache.stat().st_mtime_ns == made.st_mtime_ns
    people = read_people(annotations_of(own, "train"), own / "train2017", for_training=True)
    cache.parent.chmod(0o555)
    assert training_data.default_cache(people) == Path("runs/cache"), "data that are not to be written to"
    cache.parent.chmod(0o755)
    assert training_data.default_cache(people) == cache.parent
    (tmp_path / "file").write_text("")
    code, _, errors = start("--epochs", "1", "--resume", data=own, cache=tmp_path / "file")
    assert code == 2 and "--cache-dir" in errors[-1] and "--no-cache" in errors[-1]


def test_compiling_is_of_the_pose_model_in_its_place(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """So that the names of its weights, and the model that is evaluated and saved, stay as they are."""
    compiled = []
    monkeypatch.setattr(TokenPose, "compile", lambda model: compiled.append(model))
    stopped = RuntimeError("it is set up")
    monkeypatch.setattr(PoseTraining, "run", lambda training: (_ for _ in ()).throw(stopped))
    for more in ([], ["--compile"]):
        with pytest.raises(RuntimeError, match="it is set up"):
            start_run(data, tmp_path / f"run{len(more)}", "--no-cache", *more)
    assert len(compiled) == 1
    forget()


def test_a_cache_of_pixels_is_made_when_it_is_asked_for(start: Command, tmp_path: Path) -> None:
    sizes = {}
    for name, more in {"jpeg": [], "pixels": ["--cache-pixels"]}.items():
        assert start("--epochs", "1", "--minutes", "1e-9", "--out", str(tmp_path / name), *more, cache=tmp_path / name)
        (file,) = (tmp_path / name).glob("people-*.arrow")
        sizes[name] = file.stat().st_size
    assert sizes["pixels"] > 2 * sizes["jpeg"]


# -- whose boxes, which key points ------------------------------------------------------------------------------------


def test_a_detectors_boxes_are_used_and_told_with_their_least_score(start: Command, data: Path, tmp_path: Path) -> None:
    boxes = tmp_path / "boxes.json"
    truth = json.loads(annotations_of(data, "val").read_text())["annotations"]
    found = [
        {"image_id": a["image_id"], "category_id": 1, "bbox": a["bbox"], "score": 0.1 + 0.7 * (a["image_id"] % 2)}
        for a in truth
    ]
    boxes.write_text(json.dumps(found + found[:4]))
    kept = sum(box["score"] > 0.5 for box in found + found[:4])
    code, printed, _ = start("--epochs", "1", "--boxes", str(boxes), "--box-score", "0.5")
    assert code == 0
    first, *_, last = records(tmp_path / "run")
    assert (first["boxes"], first["least_box_score"], first["validation_people"], last["people"]) == (
        *("detector", 0.5),
        *(kept, kept),
    )
    words = f"detector boxes of {boxes} with scores from 0.5"
    assert printed.count(words) == 2 and words in (tmp_path / "run/README.md").read_text()
    assert f"{len(found) + 4 - kept} with a score below 0.5" in printed


def test_a_model_with_other_key_points_starts_from_an_earlier_one(start: Command, data: Path, tmp_path: Path) -> None:
    assert start("--epochs", "1")[0] == 0
    (tmp_path / "run").rename(tmp_path / "first")
    earlier = str(tmp_path / "first")
    other = changed(data, tmp_path / "other", keep_13_key_points)
    options = ["--init-from", earlier, "--epochs", "1"]
    code, _, errors = start(*options, data=other)
    assert code == 2 and "predicts 17 key points, and the data have 13: add --new-head" in errors[-1]
    code, _, errors = start(*options, "--new-head", "--model", "ppt_s", data=other)
    assert code == 2 and "holds sdpose_s_v1 and not --model ppt_s" in errors[-1]
    code, _, errors = start(*options, "--model-args", *SIZE, "mlp_ratio=2", data=data)
    assert code == 2 and re.search(r"--model-args ask for, \d+: blocks.* add --new-head to begin at random", errors[-1])
    code, printed, _ = start(*options, "--new-head", "--minutes", "1e-9", data=other)
    assert code == 0 and f"the weights of {earlier}, and at random with 1: keypoint_tokens" in printed
    args = parse_arguments("", arguments(other, tmp_path / "run", *options, "--new-head"))
    args.model = None
    model, before = build_model(args, 13), load_file(tmp_path / "first/model/model.safetensors")
    assert model.config.num_keypoints == 13 and model.training
    same = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert set(before) - set(same) == {"keypoint_tokens"}


def keep_13_key_points(content: dict[str, Any]) -> None:
    category = content["categories"][0]
    category["keypoints"] = category["keypoints"][:13]
    category.pop("skeleton", None)
    category["sigmas"] = [0.05] * 13
    for annotation in content["annotations"]:
        annotation["keypoints"] = annotation["keypoints"][: 3 * 13]


def own_key_points(content: dict[str, Any]) -> None:
    """Five of no known names, with a pair and sigmas that the file tells."""
    content["categories"][0] = {
        "id": 1,
        "name": "beast",
        "keypoints": ["snout", "paw one", "paw two", "rump", "tail"],
        "flip_pairs": [[1, 2]],
        "sigmas": [0.3, 0.3, 0.3, 0.3, 0.3],
    }
    for annotation in content["annotations"]:
        annotation["keypoints"] = [
            value for point in (0, 5, 6, 11, 12) for value in annotation["keypoints"][3 * point :][:3]
        ]


def test_any_key_points_of_a_cocos_file_can_be_learned(start: Command, data: Path, tmp_path: Path) -> None:
    own = changed(data, tmp_path / "own", own_key_points)
    code, printed, _ = start("--epochs", "1", data=own)
    assert code == 0 and ", 5 key points" in printed
    assert from_pretrained(tmp_path / "run/model").config.num_keypoints == 5
    assert all(record["AR50_1"] > 0 for record in records(tmp_path / "run") if record["kind"] == "evaluation")


def test_crowdposes_folder_has_its_own_figures_and_views(start: Command, data: Path, tmp_path: Path) -> None:
    def crowd(content: dict[str, Any]) -> None:
        content["categories"] = [{"id": 1, "name": "person", "keypoints": list(CROWDPOSE.names)}]
        for number, image in enumerate(content["images"]):
            image["crowdIndex"] = (number % 10) / 10
        for annotation in content["annotations"]:
            annotation["keypoints"] = annotation["keypoints"][15:] + annotation["keypoints"][:6]

    folder = changed(data, tmp_path / "coco", crowd)
    crowdpose = tmp_path / "crowdpose"
    shutil.copytree(folder / "train2017", crowdpose / "images")
    shutil.copytree(folder / "val2017", crowdpose / "images", dirs_exist_ok=True)
    (crowdpose / "json").mkdir()
    annotations_of(folder, "train").rename(crowdpose / "json/crowdpose_trainval.json")
    annotations_of(folder, "val").rename(crowdpose / "json/crowdpose_test.json")
    code, printed, _ = start("--epochs", "1", "--no-cache", data=crowdpose, cache=None)
    assert code == 0 and "14 key points" in printed
    *_, last = records(tmp_path / "run")
    assert {"AP_1", "AP_2", "AR_1"} < set(last) and any("hard" in name.lower() for name in last)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["sigma"] is None and config["target_sigma"] == 1.0
    assert (config["views"]["scale"], config["views"]["rotation"], config["views"]["half_body_keypoints"]) == (
        0.5,
        40,
        6,
    )


def test_views_are_the_recipes_of_the_data_set_but_for_what_is_given() -> None:
    args = parse_arguments("", ["--data", "d"])
    assert view_settings(args, COCO) == ViewSettings() and view_settings(args, CROWDPOSE) == ViewSettings.crowdpose()
    args = parse_arguments("", "--data d --shift 0.1 --flip 0 --half-body 0.2 --scale 0.1 --rotation 3".split())
    given = {"shift_probability": 0.1, "flip": 0, "half_body": 0.2, "scale": 0.1, "rotation": 3}
    assert view_settings(args, CROWDPOSE) == replace(ViewSettings.crowdpose(), **given)


def test_without_data_synthetic_figures_are_drawn_and_called_so(
    start: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training_data, "FIGURES", {"train": 4, "val": 2, "size": (96, 128)})
    forget()
    small = "--batch-size 2 --epochs 1 --workers 0 --cpu --model-args input_size=64,48 depth=2 dim=32 stage1_width=8"
    assert main("what it is", small.split()) == 0
    printed = capsys.readouterr().out
    assert printed.count("synthetic figures of runs/synthetic-figures/annotations") == 2
    assert "Data: `synthetic figures`" in (tmp_path / "runs/sdpose_t-cycles2/README.md").read_text()
    assert "paper" not in printed


# -- regression ---------------------------------------------------------------------------------------------------


def test_the_density_that_rle_learns_is_trained_and_saved_but_not_in_the_plain_model(
    start: Command, tmp_path: Path
) -> None:
    code, _, _ = start("--model", "sdpose_reg", "--lr-drop-epochs")
    assert code == 0
    folder, flow = tmp_path / "run", "criterion.task.flow."
    saved = [load_file(path / "model.safetensors") for path in sorted((folder / "checkpoints").iterdir())]
    names = [name for name in saved[0] if name.startswith(flow)]
    assert len(names) == 72 and not any(torch.equal(saved[0][name], saved[1][name]) for name in names)
    for plain in (load_file(folder / "model/model.safetensors"), load_file(folder / "best/model.safetensors")):
        assert not any("flow" in name or name.startswith("model.") for name in plain)
    model = from_pretrained(folder / "model")
    assert model.config.cycles == 2 and model(torch.randn(1, 3, 64, 48)).shape == (1, 17, 4)
    losses = [record["task_1"] for record in records(folder) if record["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_every_parameter_of_rles_density_gets_a_gradient_in_one_forward() -> None:
    model = create_model("sdpose_reg", input_size=(64, 48), depth=2, dim=32, heads=4, stage1_width=8)
    supervised = Supervised(model, make_criterion(model))
    batch = torch.randn(2, 3, 64, 48), Target(torch.rand(2, 17, 2), torch.ones(2, 17, 2))
    supervised(*batch)["loss"].backward()
    assert all(parameter.grad is not None for parameter in supervised.parameters())
    plain = weights_of_model(supervised.state_dict())
    assert all_equal(plain, model.state_dict()) and len(supervised.state_dict()) == len(plain) + 72


# -- the recipe ---------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers() -> None:
    args = parse_arguments("", ["--data", "coco"])
    assert (args.lr, args.epochs, args.lr_drop_epochs, args.warmup_steps) == (1e-3, 300, [200, 260], 500)
    assert (args.batch_size, args.clip_grad, args.rho) == (64, None, None)
    assert args.sigma is None and usual_sigma(create_model("sdpose_s_v1").config.feature_size) == 2.0
    model = create_model("sdpose_s_v1")
    criterion = make_criterion(model, alpha=args.alpha, rho=args.rho)
    assert criterion.alpha == 5e-6 and [factor for _, factor in criterion.groups.values()] == [1.0, 1.0]
    assert not criterion.detach_teacher


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_rate_is_mmcvs_at_every_step(warmup: int) -> None:
    """Its warm-up: base * (1 - (1 - step / warmup) * (1 - 0.001)); its steps: by epochs from the start of the run."""
    args = argparse.Namespace(lr=1e-2, lr_drop_epochs=[3, 5], warmup_steps=warmup)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    schedule, rates = build_schedule(optimizer, args, steps_per_epoch=7), []
    for step in range(7 * 6):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    for step, rate in enumerate(rates):
        expected = args.lr * 0.1 ** sum(step // 7 >= epoch for epoch in args.lr_drop_epochs)
        if step < warmup:
            expected = args.lr * (1 - (1 - step / warmup) * (1 - 0.001))
        assert math.isclose(rate, expected), f"step {step}"


def test_a_run_unlike_the_recipe_says_so() -> None:
    args = parse_arguments("", ["--data", "coco", "--accumulate", "2"])
    assert recipe_warnings(args, "sdpose_s_v1", 512, 10**6) == []
    assert recipe_warnings(args, "sdpose_b", 256, 10**6) == []
    (warning,) = recipe_warnings(args, "sdpose_s_v1", 128, 10**6)
    assert warning == "the global batch is 128, and the paper's 512 at a rate of 1e-3: --accumulate 8 makes it so"
    (warning,) = recipe_warnings(args, "sdpose_s_v1", 96, 10**6)
    assert warning.endswith("at a rate of 1e-3")
    args = parse_arguments("", ["--data", "coco", "--epochs", "9"])
    found = recipe_warnings(args, "sdpose_s_v1", 512, 400)
    assert [warning for warning in found if "--warmup-steps 500" in warning and "--lr-drop" not in warning]
    assert [warning for warning in found if "--lr-drop-epochs 260 is not reached in 9 epochs" in warning]


def test_the_first_looks_settings_are_of_its_own_model_alone() -> None:
    look = parse_arguments("", [])
    assert {name: getattr(look, name) for name in FIRST_LOOK} == FIRST_LOOK
    deeper = parse_arguments("", ["--model-args", "depth=6", "--cycles", "1"])
    assert deeper.model_args == {**FIRST_LOOK["model_args"], "depth": 6} and deeper.cycles == 1
    plain = parse_arguments("", ["--model", "tokenpose_s_v1"])  # not in the first look's cycles
    assert (plain.model_args, plain.cycles, plain.epochs) == ({}, None, FIRST_LOOK["epochs"])
    earlier = parse_arguments("", ["--init-from", "run", "--model-args", "depth=6"])
    assert (earlier.model, earlier.model_args, earlier.cycles) == (None, {"depth": 6}, None)
    recipe = parse_arguments("", ["--data", "coco"])
    assert not any(getattr(recipe, name) == value for name, value in FIRST_LOOK.items())


def test_the_help_names_every_setting_of_the_first_look(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_arguments("what it is", ["--help"])
    page = " ".join(capsys.readouterr().out.split())
    for name, value in FIRST_LOOK.items():
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        assert f"--{name.replace('_', '-')} " in page and (
            isinstance(value, dict) or f"{name.replace('_', '-')} {shown}" in page
        )


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "nowhere has no train split"),
        (["--model", "deit_tiny"], "no pose model is called 'deit_tiny'"),
        (["--model", "tokenreg_s"], "--model tokenreg_s --model-args head=rle"),
        (["--model", "sdpose_reg", "--rho", "0.3"], "--rho: weighs tokens by the size of the task loss"),
        (["--model", "rle_r50", "--cycles", "2", "--model-args", "input_size=64,64"], "rle_r50 has no cycles"),
        (["--scale", "2"], "--scale 2.0: has to be between 0 and 0.99"),
        (["--lr", "nan"], "--lr nan: has to be at least 0"),
        (["--lr-drop-epochs", "5", "3"], "--lr-drop-epochs 5 3: these are epochs from 1 on, in order"),
        (["--train-annotations", "a.json"], "--train-annotations and --train-images go together"),
        (["--train-annotations", "a.json", "--train-images", "b"], "a.json cannot be read"),
        (
            [*("--train-annotations", "a", "--train-images", "b"), *("--val-annotations", "a", "--val-images", "b")],
            "the annotations and images of both splits are given too; leave it out",
        ),
        (["--batch-size", "500"], "give a smaller --batch-size"),
        (["--init-from", "nowhere"], "no folder nowhere"),
        (["--boxes", "nowhere.json"], "nowhere.json cannot be read"),
        (["--mixed-precision", "fp16"], "--mixed-precision fp16: needs a GPU"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    start: Command, tmp_path: Path, more: list[str], message: str
) -> None:
    code, _, errors = start(*more)
    assert code == 2 and errors[-1].startswith("error: ") and message in errors[-1]
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--alpha", "1e-5", "--rho", "0.3"], "--alpha, --rho: both weigh the tokens"),
        (["--cycles", "1", "--alpha", "1e-5"], "--alpha: weighs the tokens of one cycle .* sdpose_s_v1 has 1 here"),
        (["--cycles", "1", "--rho", "0.3"], "--rho: weighs the tokens of one cycle .* sdpose_s_v1 has 1 here"),
        (["--model", "tokenpose_s_v1", "--rho", "0.3"], "--rho: .* tokenpose_s_v1 has 1 here: write --cycles 2"),
        (["--model", "rle_r50", "--alpha", "1e-5"], "--alpha: .* rle_r50 has 1 here: leave it out"),
        (["--model-args", "cycles=1"], "--model-args cycles=1: write --cycles 1"),
        (["--init-from", "one-cycle", "--alpha", "1e-5"], "--alpha: .* tokenpose_s_v1 has 1 here"),
        (["--model", "sdpose_reg", "--sigma", "2"], "--sigma: .* the rle head of sdpose_reg predicts coordinates"),
        (
            ["--model", "tokenreg_s", "--model-args", "head=rle", "--sigma", "2"],
            "--sigma: .* the rle head of tokenreg_s",
        ),
        (["--box-score", "0.5"], "--box-score: goes with --boxes"),
        (["--new-head"], "--new-head: goes with --init-from"),
        (["--no-cache"], "--cache-dir: there is no cache with --no-cache"),
        (["--exact-crops"], "--exact-crops, --cache-dir: exact crops are of whole photographs"),
        (["--no-cache", "--cache-pixels"], "--cache-pixels, --cache-dir: there is no cache with --no-cache"),
        (["--exact-crops", "--cache-pixels"], "--exact-crops, --cache-dir"),
    ],
)
def test_arguments_that_say_nothing_together_are_refused_before_data_are_looked_for(
    start: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--init-from" in more:
        save_pretrained(create_model("tokenpose_s_v1", input_size=(64, 48), depth=1, dim=8, heads=2), "one-cycle/model")
        more = ["--model", "tokenpose_s_v1", *more]
    code, printed, errors = start(*more, data=Path("nowhere"))
    assert code == 2 and printed == "" and len(errors) == 1, errors
    assert re.match(f"error: {message}", errors[0])


@pytest.mark.parametrize(
    "more",
    [
        ["--cycles", "1"],
        ["--alpha", "1e-5"],
        ["--model", "tokenpose_s_v1", "--cycles", "2", "--rho", "0.3"],
        ["--model", "tokenpose_s_v1", "--cycles", "3", "--alpha", "1e-5"],
        ["--sigma", "2"],
        ["--no-cache", "--exact-crops"],
        ["--cache-dir", "cache", "--cache-pixels"],
    ],
)
def test_arguments_that_say_something_together_are_taken(more: list[str]) -> None:
    args = parse_arguments("", ["--data", "coco", *more])
    check_arguments(args)
    check_objective(args, named_config(args))


def every(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            annotation[name] = value

    return change


def same_ids(content: dict[str, Any]) -> None:
    content["annotations"][1]["id"] = content["annotations"][0]["id"]


def same_image_ids(content: dict[str, Any]) -> None:
    content["images"][1]["id"] = content["images"][0]["id"]


def nobody(content: dict[str, Any]) -> None:
    content["annotations"] = []


def unnamed_sides(content: dict[str, Any]) -> None:
    content["categories"][0]["keypoints"] = [f"point {i}" for i in range(17)]


def no_sigmas(content: dict[str, Any]) -> None:
    unnamed_sides(content)
    content["categories"][0]["flip_pairs"] = [[1, 2]]


@pytest.mark.parametrize(
    ("change", "splits", "message"),
    [
        (same_ids, ["train"], "two of its annotations have the id"),
        (same_image_ids, ["val"], "two of its images have the id"),
        (nobody, ["train"], "the split is empty"),
        (nobody, ["val"], "the split is empty"),
        (keep_13_key_points, ["val"], "the 17 key points of .* and the 13 of .*: both splits need the same"),
        (every("keypoints", [1, 2, 2] * 13), ["train"], "without 17 key points of three numbers"),
        (every("keypoints", [0] * 51), ["train"], "without a labelled key point"),
        (every("keypoints", [math.nan] * 51), ["val"], "with NaN"),
        (every("bbox", [5, 5, 0, 9]), ["train"], "skipped 45: 45 with a box of "),
        (every("bbox", [500, 5, 9, 9]), ["val"], "with a box outside the image"),
        (every("bbox", [math.nan, 5, 9, 9]), ["train"], "with NaN"),
        (unnamed_sides, [], "a mirrored image exchanges"),
        (no_sigmas, [], r"AP needs the category's sigmas.*\"sigmas\": \[0.05, 0.05"),
    ],
)
def test_annotations_that_cannot_be_used_are_one_line_before_any_work(
    start: Command,
    data: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    splits: list[str],
    message: str,
) -> None:
    bad = changed(data, tmp_path / "bad", change, *splits)
    code, printed, errors = start(data=bad)
    assert code == 2 and printed == "" and not (tmp_path / "cache").exists()
    assert len(errors) == 1, errors
    assert re.search(message, errors[0])
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize("damage", ["cut off", "no file", "no images", "one image missing"])
def test_files_that_cannot_be_used_are_one_line_before_any_work(
    start: Command, data: Path, tmp_path: Path, damage: str
) -> None:
    bad = changed(data, tmp_path / "bad", lambda content: None)
    file, message = annotations_of(bad, "train"), "is no JSON"
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-20])
    elif damage == "no file":
        file.unlink()
        message = "has no train split"
    elif damage == "no images":
        shutil.rmtree(bad / "train2017")
        message = "train2017 is no folder"
    else:
        next((bad / "val2017").iterdir()).unlink()
        message = "lacks 1 of the images"
    code, printed, errors = start(data=bad)
    assert code == 2 and printed == "" and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "cache").exists()


def test_persons_that_cannot_be_used_are_skipped_counted_and_printed(
    start: Command, data: Path, tmp_path: Path
) -> None:
    def spoil(content: dict[str, Any]) -> None:
        wrong = [("bbox", [5, 5, 0, 9]), ("bbox", [900, 5, 9, 9]), ("keypoints", [0] * 51), ("keypoints", [1, 2])]
        for annotation, (name, value) in zip(content["annotations"], wrong, strict=False):
            annotation[name] = value

    bad = changed(data, tmp_path / "bad", spoil, "train")
    missing = bad / "train2017" / json.loads(annotations_of(bad, "train").read_text())["images"][-1]["file_name"]
    missing.unlink()
    code, printed, _ = start("--epochs", "1", data=bad)
    assert code == 0 and f"training on {PEOPLE - 5} people" in printed and "skipped 5: 1 " in printed
    first, *_ = records(tmp_path / "run")
    assert sum(first["train_skipped"].values()) == 5 and set(first["train_skipped"].values()) == {1}
    assert not any("NaN" in str(record) for record in records(tmp_path / "run"))


def test_an_output_folder_that_holds_something_is_left_alone_before_any_work(start: Command, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    code, _, errors = start()
    assert code == 2 and "holds thesis.tex" in errors[-1] and not (tmp_path / "cache").exists()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_run_that_cannot_go_on_is_refused_before_any_work(start: Command, tmp_path: Path) -> None:
    assert start("--epochs", "1", "--minutes", "1e-9", "--no-cache", cache=None)[0] == 0
    for more, message in (
        (["--resume", "--epochs", "1"], "model_args was {"),
        (["--resume", "--epochs", "2"], "epochs was 1 and is 2"),
    ):
        code, printed, errors = start(*more, "--model-args", "input_size=128,96")
        assert code == 2 and message in errors[-1] and printed == "" and not (tmp_path / "cache").exists()


def test_truncated_photographs_are_replaced_in_training_and_count_as_not_found_in_evaluation(
    start: Command, data: Path, tmp_path: Path
) -> None:
    damaged, photos = changed(data, tmp_path / "damaged", lambda content: None), {}
    for split in ("train", "val"):
        photos[split] = sorted((damaged / f"{split}2017").iterdir())[3]
        photos[split].write_bytes(photos[split].read_bytes()[:200])
    options = ["--epochs", "1", "--batch-size", "9"]
    code, printed, _ = start(*options, data=damaged)
    assert code == 0 and "1 people with unreadable images were replaced" in printed
    assert "1 people in unreadable validation images count as not found" in printed
    (skipped,) = [record for record in records(tmp_path / "run") if record["kind"] == "skipped"]
    assert photos["train"].name in skipped["why"] and "truncated" in skipped["why"]
    assert records(tmp_path / "run")[-1]["people"] == VALIDATED - 1


# -- killed, resumed, on two processes -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sdpose_s_v1", "sdpose_reg"])
def test_a_killed_run_that_is_resumed_ends_bit_for_bit_like_an_undisturbed_one(
    data: Path, tmp_path: Path, model: str
) -> None:
    """Two processes, a worker each, accumulation, half bodies and all other views, two kills."""
    step = random.Random().randrange(1, 3)  # another in every run of the tests
    more = ["--accumulate", "2", "--workers", "1", "--checkpoint-every", "1", "--clip-grad", "1", "--model", model]
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
    last = f"checkpoints/step-{2 * (PEOPLE // 20):08}/model.safetensors"  # with the density of RLE
    for name in ("model/model.safetensors", "best/model.safetensors", last):
        one, other = (load_file(tmp_path / folder / name) for folder in ("undisturbed", "killed"))
        assert all_equal(one, other), f"{name}, killed after step {step}"
    assert records(tmp_path / "undisturbed") == records(tmp_path / "killed")
    assert not list((tmp_path / "killed/checkpoints").glob(".*")), "half a checkpoint was left behind"


def lenient(content: dict[str, Any]) -> None:
    """Sigmas with which even a model that has learned little finds people, so that figures can differ."""
    content["categories"][0]["sigmas"] = [0.4] * 17


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sdpose_s_v1", "sdpose_reg"])
def test_two_processes_have_the_losses_and_figures_of_one(data: Path, tmp_path: Path, model: str) -> None:
    """One that accumulates as many batches: statistics of batch norm are those of a batch on one device.

    For the same reason running statistics, and what is evaluated with them, are one device's of all its batches. The
    figures are compared by evaluating the model that the two processes saved on one, whom 13 people do not divide among
    evenly, nor do their batches of 4.
    """
    figures = changed(data, tmp_path / "lenient", lenient)
    shared = ["--model", model, "--lr", "3e-3", "--evaluate-every", "2"]
    one = arguments(figures, tmp_path / "one", *shared, "--accumulate", "2", batch=4)
    two = arguments(figures, tmp_path / "two", *shared, batch=4)
    jobs = [{"arguments": one, "command": "tokenpose"}, {"arguments": two, "command": "tokenpose", "processes": 2}]
    codes, printed = run(tmp_path, *jobs)
    assert codes == [[0], [0, 0]], printed
    expected, found = (records(tmp_path / name) for name in ("one", "two"))
    assert [record["kind"] for record in found] == [record["kind"] for record in expected]
    steps = [(record, other) for record, other in zip(expected, found, strict=True) if record["kind"] == "train"]
    assert len(steps) == 2 * (PEOPLE // 8)
    for record, other in steps:
        numbers = [{name: value for name, value in each.items() if name != "kind"} for each in (record, other)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-4, abs=1e-6)

    (evaluation,) = [record for record in found if record["kind"] == "evaluation"]
    people = read_people(annotations_of(figures, "val"), figures / "val2017", for_training=False)
    saved = from_pretrained(tmp_path / "two/model")
    predictions = predict_cycles(saved, EvaluationCrops(people, saved.config.input_size), cycles=2, batch=8)
    assert [len(each.rows.unique()) for each in predictions] == [VALIDATED, VALIDATED] == [evaluation["people"]] * 2
    for cycle, alone in enumerate(evaluate_cycles(people, predictions, saved.config), start=1):
        together = {name: evaluation[f"{name}_{cycle}"] for name in alone.figures}
        assert together == pytest.approx(alone.figures, abs=1e-9)
        assert 0 < together["AP"] < 1, "figures that all models have"


@pytest.mark.slow
def test_what_no_process_can_do_is_said_once_and_none_waits_for_another(data: Path, tmp_path: Path) -> None:
    """What is wrong with arguments, data, or what is made of them; and what one process alone cannot read."""
    bad = changed(data, tmp_path / "bad", same_ids, "train")
    out, model = tmp_path / "run", ["--model", tmp_path, "--workers", 0]
    jobs: dict[str, dict[str, Any]] = {
        "--scale 2.0": {"command": "tokenpose", "arguments": arguments(data, out, "--scale", "2")},
        "--seed -1": {"command": "tokenpose", "arguments": arguments(data, out, "--seed", "-1")},
        "fp16: needs a GPU": {"command": "tokenpose", "arguments": arguments(data, out, "--mixed-precision", "fp16")},
        "no folder absent": {
            "command": "tokenpose",
            "arguments": arguments(data, out, "--init-from", "absent", "--rho", "1"),
        },
        "two of its annotations": {"command": "tokenpose", "arguments": arguments(bad, out)},
        "smaller --batch-size": {"command": "tokenpose", "arguments": arguments(data, out, batch=400)},
        "error: process 1: a disk of its own": {
            "command": "tokenpose",
            "arguments": arguments(data, out),
            "blow": {"place": "reading on process 1", "problem": "a disk of its own"},
        },
        "deit_tinny": {"command": "deit", "arguments": ["--out", out, "--model", "deit_tinny"]},
        "mixup pairs": {"command": "deit", "arguments": ["--out", out, "--mixup", "1", "--batch-size", "5"]},
        "--batch-size 0": {"command": "evaluate", "arguments": [*model, "--data", data, "--batch-size", "0"]},
        "nowhere has no val": {"command": "evaluate", "arguments": [*model, "--data", "nowhere"]},
    }
    codes, printed = run(tmp_path, *({**job, "processes": 2} for job in jobs.values()))
    said = [line for line in printed.splitlines() if "error: " in line]
    assert codes == [[2, 2]] * len(jobs), printed
    assert len(said) == len(jobs), printed
    assert all(message in line for message, line in zip(jobs, said, strict=True)), printed
    assert not out.exists()
