"""Everybody's key points after every cycle: from their own outputs, with the mirrored image, once each in any share."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

pytest.importorskip("pycocotools")

from cyclekd import CycleError, run_cycles
from cyclekd.integrations.tokenpose import create_model
from cyclekd.integrations.tokenpose.data.crops import EvaluationCrops, cut_views
from cyclekd.integrations.tokenpose.data.people import People, read_people
from cyclekd.integrations.tokenpose.data.warp import normalize
from cyclekd.integrations.tokenpose.evaluation import predicting
from cyclekd.integrations.tokenpose.evaluation.precision import Predictions, average_precision
from cyclekd.integrations.tokenpose.evaluation.predicting import evaluate_cycles, predict_cycles, results_of
from cyclekd.integrations.tokenpose.keypoints.decoding import Keypoints, to_image
from cyclekd.integrations.tokenpose.keypoints.export import decode_output
from cyclekd.integrations.tokenpose.keypoints.flips import predict_flipped, predict_flipped_regression
from cyclekd.integrations.tokenpose.models.config import config_for
from golden import FOLDER, golden_json

PEOPLE, SIZE = 7, (64, 48)
PAIRS = [(1, 2)]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's


class Spots(nn.Module):
    """Stands in for a trained model: its maps are the red, the green and the blue of the image."""

    def __init__(self, head: str = "heatmap") -> None:
        super().__init__()
        self.config = config_for("tokenpose_s_v1", input_size=SIZE, num_keypoints=3, head=head)
        self.weight = nn.Parameter(torch.zeros(1))  # tells on which device it is
        self.autocast: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return (images * STD[:, None, None] + MEAN[:, None, None])[..., ::4, ::4]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of a person each, who is a red, a green and a blue spot."""
    folder = tmp_path_factory.mktemp("spots")
    y, x = np.mgrid[:120, :100].astype(float)
    images, annotations = [], []
    for number in range(1, PEOPLE + 1):
        points = [(40.0 + 2 * number, 35.0), (35.0, 60.0 + 2 * number), (62.0 - number, 75.0)]
        spots = np.stack([np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 11.0**2)) for px, py in points], -1)
        Image.fromarray((255 * spots).round().astype(np.uint8)).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 120, "width": 100})
        keypoints = [value for px, py in points for value in (px, py, 2)]
        person = {"id": number, "image_id": number, "category_id": 1, "bbox": [15, 15, 60, 80], "area": 2000}
        annotations.append(person | {"keypoints": keypoints, "num_keypoints": 3, "iscrowd": 0})
    category = {"id": 1, "name": "person", "keypoints": ["red", "green", "blue"], "sigmas": [0.05] * 3}
    category["flip_pairs"] = PAIRS
    content = {"images": images, "annotations": annotations, "categories": [category]}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def people(data: Path) -> People:
    return read_people(data / "annotations.json", data, for_training=False)


@pytest.fixture(scope="module")
def crops(people: People) -> EvaluationCrops:
    return EvaluationCrops(people, SIZE)


@pytest.fixture(scope="module")
def batch(crops: EvaluationCrops) -> dict[str, Tensor]:
    """All of them at once."""
    return default_collate([crops[row] for row in range(PEOPLE)])


def lively(**overrides: Any) -> nn.Module:
    """A model whose outputs follow the image, in two cycles."""
    settings = {"num_keypoints": 3, "input_size": SIZE, "depth": 2, "dim": 32, "heads": 4, "stage1_width": 8}
    model = create_model("sdpose_s_v1", **{**settings, "cycles": 2, **overrides}).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def network_input(batch: dict[str, Tensor]) -> Tensor:
    return normalize(cut_views(batch, SIZE))


def in_image(found: Keypoints, batch: dict[str, Tensor]) -> Tensor:
    return to_image(found.coordinates, batch["center"], batch["scale"], SIZE)


def same(found: Predictions, coordinates: Tensor, scores: Tensor) -> bool:
    return torch.equal(found.keypoints, coordinates) and torch.equal(found.scores, scores)


# -- which key points -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_cycle_is_decoded_from_its_own_output(crops: EvaluationCrops, batch: dict[str, Tensor]) -> None:
    model = lively()
    found = predict_cycles(model, crops, cycles=2, batch=PEOPLE, flip_test=False)
    for predictions, output in zip(found, run_cycles(model, network_input(batch), cycles=2).outputs, strict=True):
        expected = decode_output(model.config, output)
        assert same(predictions, in_image(expected, batch), expected.scores)
        assert predictions.rows.tolist() == list(range(PEOPLE))
    assert (found[0].keypoints - found[1].keypoints).abs().max() > 1
    plain = decode_output(model.config, model(network_input(batch)))
    assert same(found[0], in_image(plain, batch), plain.scores)  # the pass that is deployed


def test_a_plain_model_has_one_cycle(crops: EvaluationCrops) -> None:
    assert len(predict_cycles(Spots(), crops, cycles=1, batch=4)) == 1
    with pytest.raises(CycleError, match=r"needs one model wrapped by wrap_multicycle"):
        predict_cycles(Spots(), crops, cycles=2, batch=4)


def test_a_model_in_training_mode_is_evaluated(crops: EvaluationCrops) -> None:
    (expected,) = predict_cycles(model := lively(cycles=1), crops, cycles=1, batch=4)
    (found,) = predict_cycles(model.train(), crops, cycles=1, batch=4)
    assert same(found, expected.keypoints, expected.scores)


@torch.no_grad()
@pytest.mark.parametrize("aligned", [False, True])
def test_the_flip_test_is_that_of_predict_flipped(
    crops: EvaluationCrops, batch: dict[str, Tensor], aligned: bool
) -> None:
    model = lively()
    found, _ = predict_cycles(model, crops, cycles=2, batch=PEOPLE, aligned=aligned)
    maps = predict_flipped(model, network_input(batch), PAIRS, shift=not aligned)
    expected = decode_output(model.config, maps, aligned=aligned)
    assert same(found, in_image(expected, batch), expected.scores)
    (plain,) = predict_cycles(model, crops, cycles=1, batch=PEOPLE, aligned=aligned, flip_test=False)
    assert not torch.equal(found.keypoints, plain.keypoints)


@torch.no_grad()
def test_regressed_key_points_are_averaged_after_decoding(crops: EvaluationCrops, batch: dict[str, Tensor]) -> None:
    model = lively(head="rle", cycles=1)
    (found,) = predict_cycles(model, crops, cycles=1, batch=PEOPLE)
    expected = predict_flipped_regression(model, network_input(batch), PAIRS, image_width=SIZE[1])
    coordinates = to_image(expected.coordinates, batch["center"], batch["scale"], (1, 1))
    torch.testing.assert_close(found.keypoints, coordinates)
    torch.testing.assert_close(found.scores, expected.scores)


def test_a_regression_that_is_right_is_right_after_the_flip_test(people: People) -> None:
    class Centroids(Spots):
        def forward(self, images: Tensor) -> Tensor:
            light = (images * STD[:, None, None] + MEAN[:, None, None]) ** 4
            light = light / light.sum((2, 3), keepdim=True)
            x, y = ((light.sum(axis) * torch.arange(n)).sum(-1) / n for axis, n in ((2, SIZE[1]), (3, SIZE[0])))
            return torch.stack((x, y, *[0 * x] * (2 if self.config.head == "rle" else 3)), -1)

    no_sides = replace(people, skeleton=replace(people.skeleton, flip_pairs=()))  # colours have none
    crops = EvaluationCrops(no_sides, SIZE)
    for head, off in (("rle", 0.0), ("distilpose", 0.5 * 75 / 48)):  # half a pixel, as in DistilPose's own evaluation
        model = Centroids(head)
        (plain,), (both,) = (predict_cycles(model, crops, cycles=1, batch=4, flip_test=flip) for flip in (False, True))
        moved = both.keypoints - plain.keypoints
        torch.testing.assert_close(moved, torch.tensor([off, 0.0]).expand_as(moved), atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", ["dark", "quarter", "argmax"])
def test_maps_are_decoded_as_asked(crops: EvaluationCrops, batch: dict[str, Tensor], method: str) -> None:
    model = Spots()
    (found,) = predict_cycles(model, crops, cycles=1, batch=PEOPLE, flip_test=False, method=method)
    expected = decode_output(model.config, model(network_input(batch)), method)
    assert same(found, in_image(expected, batch), expected.scores)
    least, most = {"dark": (0, 1), "quarter": (1, 2.3), "argmax": (2.3, 4.5)}[method]  # 6.25 px are one of the map
    assert least < (found.keypoints - crops.people.keypoints[..., :2]).norm(dim=-1).max() < most


# -- who ------------------------------------------------------------------------------------------------------------


def shares(
    monkeypatch: pytest.MonkeyPatch, predict: Callable[[Any], list[Predictions]], processes: int
) -> list[Predictions]:
    """What the last of several processes returns, which are one after the other here."""
    gathered: list[Any] = []
    monkeypatch.setattr(predicting, "gather_object", lambda share: gathered.extend(share) or gathered)
    for rank in range(processes):
        process = {"num_processes": processes, "process_index": rank, "device": torch.device("cpu")}
        found = predict(SimpleNamespace(**process, unwrap_model=lambda model: model, autocast=nullcontext))
    assert len(gathered) == processes
    return found


@pytest.mark.parametrize(("processes", "batch"), [(2, 2), (2, 7), (3, 1)])
def test_processes_find_together_everybody_once_as_one_does(
    crops: EvaluationCrops, monkeypatch: pytest.MonkeyPatch, processes: int, batch: int
) -> None:
    def predict(accelerator: Any) -> list[Predictions]:
        return predict_cycles(model, crops, cycles=1, batch=batch, accelerator=accelerator)

    model = Spots()
    (expected,) = predict(None)
    (found,) = shares(monkeypatch, predict, processes)
    assert found.rows.tolist() == list(range(PEOPLE)) == expected.rows.tolist()
    assert same(found, expected.keypoints, expected.scores)


def test_nobody_is_lost_between_two_moves_off_the_device(
    crops: EvaluationCrops, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = predict_cycles(Spots(), crops, cycles=1, batch=PEOPLE)
    moves = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: moves.append(tensor.shape) or cpu(tensor))
    monkeypatch.setattr(predicting, "MOVE_EVERY", 3)
    (found,) = predict_cycles(Spots(), crops, cycles=1, batch=1)
    assert same(found, expected.keypoints, expected.scores)
    assert moves == [(1, 3, 3, 3), (1, 3, 3, 3), (1, 1, 3, 3)]  # seven batches, not seven moves


def test_people_of_an_unreadable_photograph_have_no_prediction(data: Path, people: People, tmp_path: Path) -> None:
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 60 if path.name == "3.png" else None])
    damaged = read_people(tmp_path / "annotations.json", tmp_path, for_training=False)
    predictions = predict_cycles(Spots(), EvaluationCrops(damaged, SIZE), cycles=1, batch=3, flip_test=False)
    assert predictions[0].rows.tolist() == [0, 1, 3, 4, 5, 6]
    (evaluation,) = evaluate_cycles(damaged, predictions, Spots().config)
    assert (evaluation.persons, evaluation.without) == (6, 1)
    assert evaluation.figures["AR"] == pytest.approx(6 / 7)


def test_the_accelerators_precision_is_used_for_the_network_alone(crops: EvaluationCrops) -> None:
    def predict(accelerator: Any) -> list[Predictions]:
        return predict_cycles(model, crops, cycles=1, batch=PEOPLE, accelerator=accelerator)

    model, process = Spots(), {"num_processes": 1, "process_index": 0, "device": torch.device("cpu")}
    half = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    (found,) = predict(SimpleNamespace(**process, unwrap_model=lambda each: each, autocast=half))
    assert model.autocast == [True, True] and found.keypoints.dtype == found.scores.dtype == torch.float32


# -- how good -------------------------------------------------------------------------------------------------------


def test_a_model_that_finds_its_people_has_an_ap_of_one_after_the_cycle_it_does(
    people: People, crops: EvaluationCrops
) -> None:
    (good,) = predict_cycles(Spots(), crops, cycles=1, batch=4, flip_test=False)
    bad = good._replace(keypoints=good.keypoints + 30)
    first, second = evaluate_cycles(people, [good, bad], Spots().config)
    assert first.figures["AP"] == pytest.approx(1) and second.figures["AP"] == 0
    assert first.boxes == "ground truth" and first.persons == PEOPLE


def test_results_are_what_the_figures_are_of_and_scored_as_the_head_is(people: People, crops: EvaluationCrops) -> None:
    (found,) = predict_cycles(Spots(), crops, cycles=1, batch=4, flip_test=False)
    maps, rle = (results_of(people, found, Spots(head).config) for head in ("heatmap", "rle"))
    assert average_precision(people, maps) == evaluate_cycles(people, [found], Spots().config)[0].figures
    scores = found.scores[0]
    assert maps[0]["score"] == pytest.approx(scores.mean().item())
    assert rle[0]["score"] == pytest.approx(1 + scores.mean().item() + scores.max().item())


@pytest.mark.parametrize(("name", "library"), [("coco", "pycocotools"), ("crowdpose", "xtcocotools")])
def test_published_figures_are_those_of_the_files_people(tmp_path: Path, name: str, library: str) -> None:
    expected, results = golden_json("coco_ap")[f"{name}.{library}"], golden_json(f"{name}_dt")
    annotations = FOLDER / f"{name}_gt.json"
    for image in json.loads(annotations.read_text())["images"]:
        (tmp_path / image["file_name"]).touch()
    people = read_people(annotations, tmp_path, for_training=False)
    figures = average_precision(people, results)
    if name == "crowdpose":
        assert figures == pytest.approx(expected, abs=1e-12)
    else:
        assert list(figures.values()) == pytest.approx(expected, abs=1e-12)
