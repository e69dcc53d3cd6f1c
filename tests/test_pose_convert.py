"""The command that turns a published checkpoint into a folder of our own; run as a user would, in this process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from cyclekd.integrations.tokenpose.models.create import create_model
from cyclekd.integrations.tokenpose.weights.convert import main
from cyclekd.integrations.tokenpose.weights.hub import from_pretrained

TINY = ["--set", "input_size=64,48", "--set", "depth=1", "--set", "dim=8", "--set", "heads=2"]


def official(path: Path, *, num_keypoints: int = 17) -> torch.nn.Module:
    """A file in the layout of the official TokenPose-S, and the model it is of."""
    model = create_model(
        "tokenpose_s_v1",
        input_size=(64, 48),
        depth=1,
        dim=8,
        heads=2,
        num_keypoints=num_keypoints,
        attention_scale="dim",
    ).eval()
    names = {
        "keypoint_tokens": "keypoint_token",
        "patch_embed": "patch_to_embedding",
        "head.mlp": "mlp_head",
        "blocks": "transformer.layers",
        "norm1": "0.fn.norm",
        "attn.qkv": "0.fn.fn.to_qkv",
        "attn.proj": "0.fn.fn.to_out.0",
        "norm2": "1.fn.norm",
        "mlp.fc1": "1.fn.fn.net.0",
        "mlp.fc2": "1.fn.fn.net.3",
    }
    weights = {}
    for key, tensor in model.state_dict().items():
        for ours, theirs in {**names, "backbone.": ""}.items():
            key = key.replace(ours, theirs)
        weights[f"features.{key}"] = tensor
    weights["features.pos_embedding"] = model.positions[:, num_keypoints:]
    torch.save({"epoch": 300, "model": "pose_tokenpose_s", "state_dict": weights}, path)
    return model


def test_a_converted_file_predicts_what_its_model_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = official(tmp_path / "best.pth")
    command = [str(tmp_path / "best.pth"), str(tmp_path / "ours"), "--model", "tokenpose_s_v1", *TINY]
    assert main([*command, "--set", "attention_scale=dim"]) == 0
    out = capsys.readouterr().out
    assert "layout           official TokenPose-S\n" in out and "loaded           112 tensors\n" in out
    assert "written          " in out
    images = torch.rand(1, 3, 64, 48)
    assert torch.equal(from_pretrained(tmp_path / "ours")(images), model(images))
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]


def test_a_file_that_does_not_fit_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official(tmp_path / "best.pth")
    command = [str(tmp_path / "best.pth"), str(tmp_path / "ours"), "--model", "tokenpose_s_v1", *TINY]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert 'attention_scale="dim"' in captured.err
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tokenpose"], "no pose model is called 'tokenpose'"),
        (["--model", "tokenpose_s_v1", "--set", "width=3"], "tokenpose_s_v1 has no width; what can be set is"),
        (
            ["--model", "tokenpose_b", "--set", "pretrained_backbone=True"],
            "tokenpose_b has no pretrained_backbone; what can be set is",
        ),
        (["--model", "tokenpose_s_v1", "--set", "name=mine"], "tokenpose_s_v1 has no name; what can be set is"),
        ([], "is none of the presets: say which model it is"),
    ],
)
def test_what_the_arguments_get_wrong_is_said(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official(tmp_path / "best.pth")
    assert main([str(tmp_path / "best.pth"), str(tmp_path / "ours"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_setting_without_a_value_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["best.pth", str(tmp_path / "ours"), "--set", "num_keypoints"])
    assert caught.value.code == 2
    assert "'num_keypoints' is not FIELD=VALUE, such as num_keypoints=14" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official(tmp_path / "best.pth")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    command = [str(tmp_path / "best.pth"), "", "--model", "tokenpose_s_v1", *TINY, "--set", "attention_scale=dim"]
    for folder in (tmp_path / "ours", tmp_path / "ours" / "notes.txt"):
        command[1] = str(folder)
        assert main(command) == 2
        assert f"{folder} is there already and not empty: give a new folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["notes.txt"]


def test_a_part_is_converted_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = official(tmp_path / "best.pth", num_keypoints=14)
    command = [str(tmp_path / "best.pth"), str(tmp_path / "ours"), "--model", "tokenpose_s_v1", *TINY]
    command += ["--set", "attention_scale=dim"]
    assert main(command) == 2
    assert "num_keypoints is 14 there and 17 here" in capsys.readouterr().err
    assert main([*command, "--partial"]) == 0
    assert (
        "does not fit     keypoint_tokens: (1, 14, 8) in the file, (1, 17, 8) in the model" in capsys.readouterr().out
    )
    converted = from_pretrained(tmp_path / "ours")
    assert torch.equal(converted.patch_embed.weight, model.patch_embed.weight)
    assert converted.keypoint_tokens.shape == (1, 17, 8)


def test_the_model_is_read_from_the_file_where_it_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    official(tmp_path / "best.pth")
    seen = {"attention_scale": "dim", "input_size": (64, 48), "depth": 1, "dim": 8, "heads": 2}
    monkeypatch.setattr(
        "cyclekd.integrations.tokenpose.weights.convert.reference_model", lambda file: ("tokenpose_s_v1", seen)
    )
    assert main([str(tmp_path / "best.pth"), str(tmp_path / "ours")]) == 0
    assert capsys.readouterr().out.startswith(
        "model            create_model(\"tokenpose_s_v1\", attention_scale='dim', "
    )


def test_it_runs_as_a_module_and_explains_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", "--help"])
    monkeypatch.delitem(sys.modules, "cyclekd.integrations.tokenpose.weights.convert")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("cyclekd.integrations.tokenpose.weights.convert", run_name="__main__")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("FILE FOLDER", "--model NAME", "--set FIELD=VALUE", "--partial", "attention_scale=dim"):
        assert part in text
