"""The saved model is a stock timm model: its weights, its config and its card are read without this library."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch import Tensor, nn

from cyclekd import run_cycles
from cyclekd.integrations.deit import deploy
from cyclekd.integrations.deit.recipe import add_cycles, augment_settings, build_criterion, build_model
from cyclekd.integrations.deit.train import parse_arguments
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.folder import RunFolder

CLASSES = ["cat", "dog", "hen", "cow"]
SIZE = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2, "global_pool": "avg"}


class Saved(NamedTuple):
    """A model after training, still wrapped, and what was saved of it."""

    model: nn.Module
    folder: RunFolder
    args: argparse.Namespace

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder.final / "model.safetensors")

    def stock(self) -> nn.Module:
        return timm.create_model(self.args.model, num_classes=len(CLASSES), **self.args.model_args).eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Two cycles and, for the second model, a teacher; three steps, after which one pass and two differ."""
    size = {name: value for name, value in SIZE.items() if name != "global_pool" or "distilled" not in request.param}
    given = ["--data", "x", "--model", request.param, "--mixup", "0", "--cutmix", "0", "--crop-pct", "0.85"]
    given += ["--input-size", "16", "--model-args", *(f"{name}={value}" for name, value in size.items())]
    teacher = ["--teacher", "t"] if "distilled" in request.param else []
    args = parse_arguments("", [*given, *teacher])
    torch.manual_seed(0)
    model = add_cycles(build_model(args, len(CLASSES)), args).train()
    criterion, optimizer = build_criterion(model, args), torch.optim.AdamW(model.parameters(), lr=0.01)
    labels = torch.tensor([1, 3, 0])
    for _ in range(3):
        criterion(model(images()), (labels, torch.eye(4)[:3]) if teacher else labels).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = RunFolder.create(tmp_path_factory.mktemp("run") / "mine", "name")
    deploy.save_plain_model(folder, model.state_dict(), args, CLASSES, augment_settings(args))
    return Saved(model.eval(), folder, args)


def test_stock_timm_takes_the_weights_strictly_and_gives_the_logits_of_the_trained_models_single_pass(saved) -> None:
    plain = saved.stock()
    before = plain(images())
    plain.load_state_dict(saved.weights(), strict=True)
    once, twice = run_cycles(saved.model, images()).outputs
    assert torch.equal(plain(images()), saved.model(images())) and torch.equal(plain(images()), once)
    assert (once - twice).abs().max() > 1e-2 and (once - before).abs().max() > 1e-2  # either would be seen


def test_timm_makes_the_model_from_the_folder_alone(saved) -> None:
    if not hasattr(timm.models._hub, "load_model_config_from_path"):
        pytest.skip("this timm does not open folders")
    model = timm.create_model(f"local-dir:{saved.folder.final}", pretrained=True)
    assert torch.equal(model.eval()(images()), saved.model(images()))


def test_the_config_says_how_images_were_prepared_and_what_the_classes_are(saved) -> None:
    config = json.loads((saved.folder.final / "config.json").read_text())
    assert config["architecture"] == saved.args.model
    assert config["num_classes"] == 4 and config["label_names"] == CLASSES
    expected = {"input_size": [3, 16, 16], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    expected |= {"crop_pct": 0.85, "interpolation": "bicubic"}
    read = resolve_data_config(pretrained_cfg=config["pretrained_cfg"])  # as timm's own validate.py reads it
    for found in (config["pretrained_cfg"], read):
        plain = {name: list(found[name]) if isinstance(found[name], tuple) else found[name] for name in expected}
        assert plain == expected


def test_the_usage_in_the_card_runs_in_the_run_folder(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.folder.path)
    names: dict[str, Any] = {"images": images()}
    code = deploy.usage_of(saved.args, len(CLASSES))
    exec(code, names)
    assert "cyclekd" not in code
    assert torch.equal(names["logits"], saved.model(images()))


def test_onnx_runtime_agrees_with_the_trained_model_to_1e_5(saved, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    plain = saved.stock()
    plain.load_state_dict(saved.weights(), strict=True)
    torch.onnx.export(plain, (images(),), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    torch._dynamo.reset()
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    once, twice = run_cycles(saved.model, images()).outputs
    assert (torch.from_numpy(found) - once).abs().max() <= 1e-5
    assert (once - twice).abs().max() > 1e-2


def test_nothing_but_weights_and_config_is_left(saved) -> None:
    assert sorted(str(path.relative_to(saved.folder.path)) for path in saved.folder.path.rglob("*")) == [
        "model",
        "model/config.json",
        "model/model.safetensors",
    ]


FULL_DISK = [
    OSError(28, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL_DISK, ids=["config", "weights"])
def test_a_full_disk_is_named_and_the_model_saved_before_stays(
    saved, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: nn.Module, place: str, **options: Any) -> None:
        Path(place).mkdir(exist_ok=True)
        (Path(place) / "model.safetensors").write_bytes(b"half")
        raise error

    before = {path: path.read_bytes() for path in saved.folder.final.iterdir()}
    monkeypatch.setattr(deploy, "save_for_hf", fail)
    other = {name: torch.zeros_like(value) for name, value in saved.model.state_dict().items()}
    try:
        with pytest.raises(RunError, match=r"model could not be written: .*No space left"):
            deploy.save_plain_model(saved.folder, other, saved.args, CLASSES, augment_settings(saved.args))
    finally:
        shutil.rmtree(saved.folder.path / ".partial-model", ignore_errors=True)
    assert {path: path.read_bytes() for path in saved.folder.final.iterdir()} == before


def test_saving_again_replaces_the_model(saved) -> None:
    doubled = {name: 2 * value for name, value in saved.model.state_dict().items()}
    try:
        deploy.save_plain_model(saved.folder, doubled, saved.args, CLASSES, augment_settings(saved.args))
        assert all(torch.equal(value, doubled[name]) for name, value in saved.weights().items())
    finally:
        state = saved.model.state_dict()
        deploy.save_plain_model(saved.folder, state, saved.args, CLASSES, augment_settings(saved.args))
