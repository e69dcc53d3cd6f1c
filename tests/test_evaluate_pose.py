"""The command that evaluates a pose model: what it prints, what it writes, whose boxes it says, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

pytest.importorskip("pycocotools")

from pycocotools.coco import COCO as PublishedCoco
from pycocotools.cocoeval import COCOeval

from cyclekd.integrations.tokenpose import from_pretrained, save_pretrained
from cyclekd.integrations.tokenpose.data.crops import EvaluationCrops
from cyclekd.integrations.tokenpose.data.people import read_people
from cyclekd.integrations.tokenpose.evaluation import evaluate, pictures, speed
from cyclekd.integrations.tokenpose.evaluation.arguments import parse_arguments
from cyclekd.integrations.tokenpose.evaluation.evaluate import main
from cyclekd.integrations.tokenpose.evaluation.precision import NAMES
from cyclekd.integrations.tokenpose.evaluation.predicting import predict_cycles
from cyclekd.integrations.tokenpose.evaluation.report import table
from cyclekd.integrations.tokenpose.evaluation.subject import load_model
from cyclekd.integrations.tokenpose.figures.draw import write_figures
from cyclekd.integrations.tokenpose.skeletons import CROWDPOSE
from test_pose_predicting import lively
from test_pose_reference import published

Command = Callable[..., tuple[int, list[str], list[str]]]
SCRIPT = Path(__file__).parents[1] / "examples/evaluate_pose.py"
PEOPLE = 9
SIGMAS = [0.5 + 0.1 * k for k in range(17)]
"""Far more lenient than COCO's, so that a model with random weights has an AP."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic figures, one in an image."""
    folder = tmp_path_factory.mktemp("figures") / "data"
    return write_figures(folder, train=1, val=PEOPLE, seed=3, size=(96, 128), people=(1, 1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a training leaves it, trained in two cycles."""
    torch.manual_seed(0)
    return save_pretrained(lively(num_keypoints=17), tmp_path_factory.mktemp("run") / "model").parent


@pytest.fixture
def start(data: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs the command on the figures unless told otherwise: exit code, lines of stdout, lines of stderr."""

    def command(*more: Any, out: Path | None = None, **others: Any) -> tuple[int, list[str], list[str]]:
        forget()
        options = {"model": saved, "data": data, "workers": 0, "out": out, **others}
        given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
        code = main("what it is", [*given, "--cpu", *map(str, more)])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    yield command
    forget()


def forget() -> None:
    """Accelerate's state is global: the next start begins without it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def truth(data: Path) -> Path:
    return data / "annotations/person_keypoints_val2017.json"


def detected(data: Path, folder: Path) -> Path:
    """A detector's boxes: the true ones, a little off, with scores 0.1, 0.2, ..."""
    boxes = [
        {"image_id": each["image_id"], "category_id": 1, "bbox": [v + 1.5 for v in each["bbox"]], "score": number / 10}
        for number, each in enumerate(read(truth(data))["annotations"], start=1)
    ]
    (folder / "boxes.json").write_text(json.dumps(boxes))
    return folder / "boxes.json"


def image_list(data: Path, folder: Path) -> Path:
    """As COCO publishes its test images: no annotations, and categories without key points."""
    content = {"images": read(truth(data))["images"], "categories": [{"id": 1, "name": "person"}]}
    (folder / "image_info_test-dev2017.json").write_text(json.dumps(content))
    return folder / "image_info_test-dev2017.json"


def as_published(annotations: Path, results: Path) -> list[float]:
    """pycocotools on both files, as its documentation uses it."""
    ground_truth = PublishedCoco(str(annotations))
    evaluator = COCOeval(ground_truth, ground_truth.loadRes(str(results)), "keypoints")
    evaluator.params.kpt_oks_sigmas = np.array(SIGMAS)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.stats.tolist()


# -- figures ------------------------------------------------------------------------------------------------------


def test_figures_are_pycocotools_of_the_result_file_of_each_cycle(start: Command, data: Path, tmp_path: Path) -> None:
    code, printed, _ = start("--sigmas", *SIGMAS, out=tmp_path / "out", batch_size=4)
    assert code == 0
    result, lines = read(tmp_path / "out/results.json"), [line for line in printed if line.startswith("ground truth")]
    assert [row["cycle"] for row in result["cycles"]] == [1, 2] and len(lines) == 2
    for row, line, name in zip(result["cycles"], lines, ("predictions.json", "predictions_2.json"), strict=True):
        expected = as_published(truth(data), tmp_path / "out" / name)
        assert [row[each] for each in NAMES] == pytest.approx(expected, abs=1e-12) and 0 < row["AP"] < 1
        assert row["people"] == PEOPLE and f"{row['AP']:.4f}" in line and f"{row['PCK@0.05']:.4f}" in line
    assert result["cycles"][0]["AP"] != result["cycles"][1]["AP"]
    assert "(deployed)" in lines[0] and "(deployed)" not in lines[1]
    assert all(each in printed[3] for each in ("AP50", "AP75", "AR", "PCK@0.1"))


def test_figures_without_anybody_are_a_dash() -> None:
    rows = [{"boxes": "ground truth", "cycle": 1, "people": 3, "AP": 0.5, "APM": -1.0, "PCK@0.1": float("nan")}]
    assert table(rows)[1].split() == ["ground", "truth", "1", "(deployed)", "3", "0.5000", "-", "-"]


def test_crowdpose_is_evaluated_by_how_crowded_images_are(start: Command, data: Path, tmp_path: Path) -> None:
    content, folder = read(truth(data)), tmp_path / "crowdpose/annotations"
    content["categories"] = [{"id": 1, "name": "person", "keypoints": list(CROWDPOSE.names)}]
    for number, image in enumerate(content["images"]):
        image["crowdIndex"] = number / PEOPLE
    for person in content["annotations"]:
        person["keypoints"] = person["keypoints"][9:]
        person["num_keypoints"] = sum(v == 2 for v in person["keypoints"][2::3])
    shutil.copytree(data / "val2017", tmp_path / "crowdpose/images")
    folder.mkdir()
    for split in ("trainval", "test"):
        (folder / f"crowdpose_{split}.json").write_text(json.dumps(content))
    model = save_pretrained(lively(num_keypoints=14), tmp_path / "model")
    code, printed, errors = start("--no-speed", data=tmp_path / "crowdpose", model=model, out=tmp_path / "out")
    assert code == 0, errors
    heading = printed[3].split()
    assert heading[3:10] == ["AP", "AP50", "AP75", "AP_easy", "AP_medium", "AP_hard", "AR"]
    assert {"AP_easy", "AP_medium", "AP_hard"} <= read(tmp_path / "out/results.json")["cycles"][0].keys()


def test_everything_that_decides_about_figures_is_recorded(start: Command, saved: Path, tmp_path: Path) -> None:
    assert start("--no-speed", out=tmp_path / "out")[0] == 0
    result = read(tmp_path / "out/results.json")
    assert (result["boxes"], result["people"], result["images"]) == ("ground truth", PEOPLE, PEOPLE)
    assert result["settings"]["decoding"] == "dark" and result["settings"]["no_flip_test"] is False
    assert result["config"]["cycles"] == 2 and str(saved) in result["model"]
    assert {"pycocotools", "packages", "command"} <= result["environment"].keys()


def test_speed_is_of_one_pass_and_of_everything_on_a_named_device(start: Command, tmp_path: Path) -> None:
    code, printed, _ = start(out=tmp_path / "out", batch_size=3)
    speed = read(tmp_path / "out/results.json")["speed"]
    assert code == 0 and [each["batch"] for each in speed["network"]] == [1, 3]
    assert all(each["passes"] >= 3 and each["people/s"] > 0 for each in speed["network"])
    assert speed["everything"]["passes per person"] == 4  # two cycles, and the mirrored image
    lines = [line for line in printed if "people/s" in line]
    assert len(lines) == 3 and all("fp32 on cpu with 1 thread" in line for line in lines)


def test_the_network_is_timed_by_the_median_of_single_passes() -> None:
    class Slow(torch.nn.Module):
        config, calls = lively().config, 0

        def forward(self, images: torch.Tensor) -> None:
            assert images.shape == (2, 3, 64, 48)
            self.calls += 1

    class Process:
        device = torch.device("cpu")

        def autocast(self) -> Any:
            return torch.autocast("cpu", torch.bfloat16)

    model = Slow()
    assert len(speed.seconds_per_pass(model, 2, Process())) == speed.MOST == model.calls - speed.WARM_UP


# -- whose boxes --------------------------------------------------------------------------------------------------


def test_detector_boxes_are_named_in_every_line_of_figures_and_in_the_file(
    start: Command, data: Path, tmp_path: Path
) -> None:
    boxes = detected(data, tmp_path)
    code, printed, _ = start("--no-speed", out=tmp_path / "out", boxes=boxes)
    assert code == 0 and f"boxes: detector ({boxes})" in printed[0]
    result = read(tmp_path / "out/results.json")
    assert [row["boxes"] for row in result["cycles"]] == ["detector", "detector"] and result["boxes"] == "detector"
    figures = [line for line in printed if line.split()[1:2] in (["1"], ["2"])]
    assert len(figures) == 2 and all(line.split()[0] == "detector" for line in figures)
    assert "ground truth" not in "".join(printed) and "PCK" not in "".join(printed)
    scores = {each["score"] for each in read(tmp_path / "out/predictions.json")}
    assert len(scores) == PEOPLE  # box scores count


def test_boxes_below_a_score_are_left_out_and_counted(start: Command, data: Path, tmp_path: Path) -> None:
    boxes = detected(data, tmp_path)
    code, printed, _ = start("--no-speed", out=tmp_path / "out", boxes=boxes, box_score=0.35)
    assert code == 0 and "6 people in 6 images" in printed[0] and "3 with a score below 0.35" in printed[0]
    assert len(read(tmp_path / "out/predictions.json")) == 6
    assert read(tmp_path / "out/results.json")["skipped"] == {"with a score below 0.35": 3}


def test_a_list_of_test_images_gives_the_file_for_the_server_and_no_figures(
    start: Command, data: Path, tmp_path: Path
) -> None:
    images, boxes = image_list(data, tmp_path), detected(data, tmp_path)
    of_test = {"data": None, "annotations": images, "images": data / "val2017"}
    code, printed, _ = start("--no-speed", out=tmp_path / "out", boxes=boxes, **of_test)
    assert code == 0 and read(tmp_path / "out/results.json")["cycles"] == []
    assert any(line.startswith("no figures: image_info_test-dev2017.json has nobody") for line in printed)
    results = read(tmp_path / "out/predictions.json")
    ids = {each["id"] for each in read(images)["images"]}
    assert len(results) == PEOPLE and {each["image_id"] for each in results} == ids
    for each in results:
        assert set(each) == {"image_id", "category_id", "keypoints", "score"} and each["category_id"] == 1
        assert len(each["keypoints"]) == 51 and isinstance(each["score"], float)
    code, _, errors = start(out=tmp_path / "other", **of_test)
    assert code == 2 and errors[-1].endswith("has images and no people: give a detector's boxes with --boxes")


# -- which model --------------------------------------------------------------------------------------------------


def predicted(folder: Path, model: torch.nn.Module, data: Path, **options: Any) -> bool:
    """Whether predictions.json in `folder` is what `predict_cycles` finds."""
    people = read_people(truth(data), data / "val2017", for_training=False)
    exact = options.pop("exact", False)
    crops = EvaluationCrops(people, model.config.input_size, exact=exact)
    (found,) = predict_cycles(model, crops, cycles=1, batch=64, **options)
    results = {each["image_id"]: each["keypoints"] for each in read(folder / "predictions.json")}
    here = torch.tensor([results[int(people.image_ids[index])] for index in people.image_index]).view(PEOPLE, -1, 3)
    return torch.allclose(here[..., :2], found.keypoints) and torch.allclose(here[..., 2], found.scores)


def test_published_weights_are_evaluated_as_they_were_trained(start: Command, data: Path, tmp_path: Path) -> None:
    for layout, aligned in (("official TokenPose-S", True), ("mmpose-style TokenPose", False)):
        source, weights = published(layout, stage1_width=8)
        file, out = tmp_path / f"{layout}.pth", tmp_path / layout
        torch.save(weights, file)
        given = {"model": None, "checkpoint": file, "preset": "tokenpose_s_v1", "out": out}
        of_model = ["input_size=64,48", "depth=2", "dim=8", "heads=2", "stage1_width=8"]
        of_model += [f"attention_scale={source.config.attention_scale}"]
        code, printed, errors = start("--no-speed", "--exact-crops", "--model-args", *of_model, **given)
        assert code == 0, errors
        assert layout in printed[1] and ("aligned" in printed[1]) == aligned
        assert predicted(out, source, data, aligned=aligned, exact=True)
        assert not predicted(out, source, data, aligned=not aligned, exact=True)


def test_the_preset_of_published_weights_is_seen_in_them(tmp_path: Path) -> None:
    _, weights = published("official TokenPose-S", depth=12, dim=192, heads=8)
    torch.save(weights, tmp_path / "weights.pth")
    args = parse_arguments("", ["--checkpoint", str(tmp_path / "weights.pth")])
    model, name, aligned = load_model(args, num_keypoints=17)
    assert name.startswith("tokenpose_s_v1 of ") and aligned
    assert (model.config.input_size, model.config.attention_scale) == ((64, 48), "dim")


# -- every option -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "settings"),
    [
        (["--no-flip-test"], {"flip_test": False}),
        (["--decoding", "argmax"], {"method": "argmax"}),
        (["--aligned"], {"aligned": True}),
        (["--exact-crops"], {"exact": True}),
    ],
)
def test_an_option_does_what_it_does_in_predict_cycles(
    start: Command, data: Path, saved: Path, tmp_path: Path, option: list[str], settings: dict[str, Any]
) -> None:
    assert start("--no-speed", "--cycles", 1, *option, out=tmp_path / "out")[0] == 0
    assert predicted(tmp_path / "out", from_pretrained(saved / "model"), data, **settings)
    assert not predicted(tmp_path / "out", from_pretrained(saved / "model"), data)


def test_more_cycles_than_in_training_fewer_and_other_fields_of_the_config(start: Command, tmp_path: Path) -> None:
    for cycles in (1, 3):
        assert start("--no-speed", out=tmp_path / str(cycles), cycles=cycles)[0] == 0
        result = read(tmp_path / f"{cycles}/results.json")
        assert len(result["cycles"]) == cycles and len(list((tmp_path / str(cycles)).glob("pred*.json"))) == cycles
    assert start("--no-speed", "--model-args", "mlp_ratio=3.0", out=tmp_path / "same")[0] == 0
    code, _, errors = start("--model-args", "mlp_ratio=2.0", out=tmp_path / "other")
    assert code == 2 and "mlp_ratio=2.0" in errors[-1]


def test_bf16_batches_workers_a_picture_and_a_cache(
    start: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(evaluate, "predict_cycles", lambda *a, **kw: given.update(kw) or predict_cycles(*a, **kw))
    options = ["--mixed-precision", "bf16", "--picture", "--no-speed", "--cache-dir", tmp_path / "cache"]
    code, printed, _ = start(*options, out=tmp_path / "out", workers=1, batch_size=4)
    assert (given["batch"], given["workers"]) == (4, 1)
    assert code == 0 and "bf16 on cpu" in printed[1] and "predictions.png" in printed[-1]
    assert read(tmp_path / "out/results.json")["speed"]["precision"] == "bf16"
    assert Image.open(tmp_path / "out/predictions.png").size[0] > 300
    assert list((tmp_path / "cache").glob("*.arrow"))


def test_the_picture_is_decoded_as_the_figures_are(
    start: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, model = [], pictures.KeypointModel
    monkeypatch.setattr(pictures, "KeypointModel", lambda _, *how: given.append(how) or model(_, *how))
    options = ["--no-speed", "--picture", "--no-flip-test", "--decoding", "quarter", "--aligned"]
    assert start(*options, out=tmp_path / "out")[0] == 0
    assert given == [("quarter", True)]


# -- what goes wrong ----------------------------------------------------------------------------------------------


def test_people_of_an_unreadable_photograph_are_told_and_count_as_not_found(
    start: Command, data: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(data, tmp_path / "damaged")
    photo = sorted((damaged / "val2017").iterdir())[2]
    photo.write_bytes(photo.read_bytes()[:100])
    code, printed, _ = start("--no-speed", out=tmp_path / "out", data=damaged)
    assert code == 0 and any("1 people without prediction" in line and photo.name in line for line in printed)
    result = read(tmp_path / "out/results.json")
    assert result["unreadable"] == 1 and result["cycles"][0]["people"] == PEOPLE - 1
    for photo in (damaged / "val2017").iterdir():
        photo.write_bytes(b"")
    code, _, errors = start("--no-speed", out=tmp_path / "none", data=damaged)
    assert code == 2 and f"none of the {PEOPLE} people can be predicted" in errors[-1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": None}, "which model? Give --model or --checkpoint"),
        ({"checkpoint": "a.pth"}, "which model? Give --model or --checkpoint"),
        ({"model": "nowhere"}, "there is no folder nowhere"),
        ({"model": None, "checkpoint": "a.pth"}, "a.pth: there is no such file"),
        ({"preset": "tokenpose_s_v1"}, "--preset: goes with --checkpoint"),
        ({"data": None}, "which people? Give --data, or --annotations and --images"),
        ({"data": "nowhere"}, "nowhere has no val split"),
        ({"annotations": "a.json"}, "--annotations and --images go together"),
        ({"boxes": "a.json"}, "a.json cannot be read"),
        ({"box_score": 0.3}, "--box-score: goes with --boxes"),
        ({"batch_size": 0}, "--batch-size 0: has to be between 1 and"),
        ({"cycles": 0}, "--cycles 0: has to be between 1 and"),
        ({"sigmas": 0.1}, "sigmas are 17 numbers above 0"),
        ({"exact_crops": "", "cache_dir": "c"}, "--exact-crops, --cache-dir"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(
    start: Command, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    flags = [f"--{name.replace('_', '-')}" for name, value in more.items() if value == ""]
    given = {name: value for name, value in more.items() if value != ""}
    code, printed, errors = start(*flags, out=tmp_path / "out", **given)
    assert code == 2 and not printed and not (tmp_path / "out").exists()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]


def test_a_model_of_other_key_points_is_refused(start: Command, tmp_path: Path) -> None:
    model = save_pretrained(lively(num_keypoints=14), tmp_path / "model")
    code, _, errors = start(out=tmp_path / "out", model=model)
    assert code == 2 and "predicts 14 key points" in errors[-1] and "has 17" in errors[-1]


def test_earlier_results_stay(start: Command, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/predictions.json").write_text("mine")
    code, _, errors = start(out=tmp_path / "out")
    assert code == 2 and "holds predictions.json" in errors[-1] and "choose another --out" in errors[-1]
    assert (tmp_path / "out/predictions.json").read_text() == "mine"


# -- the example --------------------------------------------------------------------------------------------------


def test_the_example_is_the_command_and_its_help_begins_with_how_to_run_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.spec_from_file_location("evaluate_pose", SCRIPT)
    example = importlib.util.module_from_spec(found)
    found.loader.exec_module(example)
    assert example.main is main
    with pytest.raises(SystemExit, match="0"):
        example.main(example.__doc__, ["--help"])
    assert "    python examples/evaluate_pose.py --model runs/mine --data coco\n" in capsys.readouterr().out
