"""Pose models to folders and hub repositories and back, with their config; what is damaged or does not fit is refused.

Uploading ends in a folder laid out as the hub's own download cache, so that loading by name is the real code, offline.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from cyclekd import CycleOutput, set_cycles, unwrap_multicycle, wrap_multicycle
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.models.create import create_model
from cyclekd.integrations.tokenpose.models.tokenpose import set_keep_rate
from cyclekd.integrations.tokenpose.weights import hub as pose_hub
from cyclekd.integrations.tokenpose.weights.hub import from_pretrained, push_to_hub, save_pretrained

COMMIT = "0" * 40
TINY: dict[str, Any] = {"input_size": (64, 48), "depth": 2, "dim": 8, "heads": 2}
IMAGES = torch.linspace(-1, 1, 3 * 64 * 48).reshape(1, 3, 64, 48)


def tiny(name: str = "tokenpose_s_v1", **overrides: Any) -> nn.Module:
    """Made once and copied, as HRNet takes its time."""
    return copy.deepcopy(_made(name, tuple(overrides.items())))


@functools.cache
def _made(name: str, overrides: tuple[tuple[str, Any], ...]) -> nn.Module:
    return create_model(name, **{**TINY, **dict(overrides)}).eval()


def outputs(model: nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    with torch.no_grad():
        return model(images)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_pretrained(tiny(), tmp_path / "saved")


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tokenpose_s_v1", TINY),
        ("sdpose_s_v1", TINY),
        ("sdpose_s_v1_ppt", {**TINY, "depth": 3, "prune_at": (0, 1), "keep_rate": 0.5, "cycles": 3}),
        ("sdpose_reg", {**TINY, "num_keypoints": 14}),
        ("tokenreg_s", {**TINY, "attention_scale": "dim"}),
        ("rle_r50", {"input_size": (64, 64), "num_keypoints": 3}),
    ],
)
def test_a_saved_model_comes_back_with_its_config_and_predictions(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = create_model(name, **settings).eval()
    loaded = from_pretrained(save_pretrained(model, tmp_path / "new" / "folder"))
    assert loaded.config == model.config and type(loaded) is type(model) and not loaded.training
    images = torch.rand(2, 3, *model.config.input_size)
    assert torch.equal(outputs(loaded, images), outputs(model, images))


def test_a_folder_holds_plain_weights_and_every_field_of_the_config(tmp_path: Path) -> None:
    model = tiny("sdpose_s_v1", num_keypoints=14)
    save_pretrained(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("architecture") == "TokenPose"
    assert config.keys() == vars(model.config).keys()
    assert config["name"] == "sdpose_s_v1" and config["input_size"] == [64, 48] and config["num_keypoints"] == 14
    assert load_file(tmp_path / "model.safetensors").keys() == tiny(num_keypoints=14).state_dict().keys()


def test_the_cycles_of_the_moment_are_saved(tmp_path: Path) -> None:
    model = tiny("sdpose_s_v1")
    set_cycles(model, 3)
    loaded = from_pretrained(save_pretrained(model, tmp_path / "three"))
    output = loaded.train()(IMAGES.expand(2, -1, -1, -1))
    assert loaded.config.cycles == 3 and type(output) is CycleOutput and len(output.outputs) == 3
    loaded = from_pretrained(save_pretrained(unwrap_multicycle(model), tmp_path / "one"))
    assert loaded.config.cycles == 1 and isinstance(loaded.train()(IMAGES.expand(2, -1, -1, -1)), torch.Tensor)
    loaded = from_pretrained(save_pretrained(wrap_multicycle(loaded, cycles=2, stack="blocks"), tmp_path / "two"))
    assert loaded.config.cycles == 2


def test_the_keep_rate_of_the_moment_is_saved(tmp_path: Path) -> None:
    model = tiny("sdpose_s_v1_ppt", prune_at=(0,))
    set_keep_rate(model, 0.25)
    loaded = from_pretrained(save_pretrained(model, tmp_path))
    assert loaded.config.keep_rate == 0.25 and loaded.blocks[0].keep == model.blocks[0].keep == 4
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"stack": "blocks.1:3"}, r"\['blocks.1:3'\] and 1"),
        ({"stack": "blocks", "inference_cycles": 2}, r"\['blocks'\] and 2"),
    ],
)
def test_a_model_wrapped_in_another_way_is_not_saved(settings: dict[str, Any], seen: str, tmp_path: Path) -> None:
    model = wrap_multicycle(tiny(depth=3), cycles=2, **settings)
    with pytest.raises(PoseError, match=rf"this model has {seen}: unwrap_multicycle\(model\) first"):
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_again_replaces_what_was_there(saved: Path) -> None:
    model = tiny("sdpose_s_v1")
    save_pretrained(model, saved)
    assert torch.equal(outputs(from_pretrained(saved)), outputs(model))
    assert len(list(saved.iterdir())) == 2


def test_an_interrupted_save_leaves_the_old_files_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PoseError, match=r"save_pretrained: .*saved cannot be written: .*No space left on device"):
        save_pretrained(tiny(), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_other_models_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(PoseError, match=r"got a DataParallel: take it out of DDP \(model.module\)"):
        save_pretrained(nn.DataParallel(tiny()), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -- overrides ---------------------------------------------------------------------------------------------------------


def test_settings_that_no_weight_depends_on_can_be_overridden(tmp_path: Path) -> None:
    save_pretrained(tiny("sdpose_s_v1_ppt", prune_at=(0,)), tmp_path)
    plain = from_pretrained(tmp_path, cycles=1, keep_rate=0.5)
    assert plain.config.cycles == 1 and not hasattr(plain, "_cyclekd")
    assert plain.blocks[0].keep == 8
    assert torch.equal(plain.patch_embed.weight, from_pretrained(tmp_path).patch_embed.weight)


def test_an_override_that_needs_other_weights_is_refused_unless_asked_for(saved: Path) -> None:
    with pytest.raises(PoseError) as caught:
        from_pretrained(saved, num_keypoints=14)
    for part in (
        "num_keypoints=14) makes other tensors than there are weights for: of another shape 1: ",
        "keypoint_tokens is (1, 17, 8) there and (1, 14, 8) here",
        "Leave that out, or add strict=False to begin with random weights in these and to take over all others",
    ):
        assert part in str(caught.value)
    with pytest.raises(PoseError, match=r"depth=3\) makes other tensors .*: missing 11: blocks.2.norm1.weight"):
        from_pretrained(saved, depth=3)
    fewer = from_pretrained(saved, num_keypoints=14, strict=False)
    assert fewer.keypoint_tokens.shape == (1, 14, 8) and fewer.keypoint_tokens.abs().sum() > 0
    assert torch.equal(fewer.head.mlp[3].weight, from_pretrained(saved).head.mlp[3].weight)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"width": 3}, "tokenpose_s_v1 has no width; what can be set is num_keypoints, input_size, "),
        ({"name": "mine"}, "tokenpose_s_v1 has no name; what can be set is"),
        ({"cycles": 0}, "cycles=0 has to be a whole number of at least 1"),
        ({"input_size": 64}, "input_size=64 has to be (height, width) in whole numbers"),
    ],
)
def test_overrides_that_make_no_sense_are_refused(overrides: dict[str, Any], message: str, saved: Path) -> None:
    with pytest.raises(PoseError) as caught:
        from_pretrained(saved, **overrides)
    assert message in str(caught.value)


# -- damaged folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, saved: Path) -> None:
    (saved / name).unlink()
    with pytest.raises(
        PoseError, match=f"saved has no {name}; save_pretrained writes config.json and model.safetensors"
    ):
        from_pretrained(saved)


def test_a_pickle_in_the_place_of_the_weights_is_not_read(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / "pytorch_model.bin")
    with pytest.raises(PoseError, match=r"saved has no model\.safetensors"):
        from_pretrained(saved)
    torch.save(weights, saved / "model.safetensors")
    with pytest.raises(PoseError, match=r"model\.safetensors cannot be read as safetensors"):
        from_pretrained(saved)


CONFIGS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "cannot be read as JSON"),
    "a list": ("[1]", '"architecture" has to be one of TokenPose, ConvPose, and is [1]'),
    "no architecture": ({"architecture": None}, '"architecture" has to be one of TokenPose, ConvPose, and is None'),
    "a list for one": ({"architecture": ["TokenPose"]}, "ConvPose, and is ['TokenPose']"),
    "a name of null": ({"name": None}, "has no name, such as tokenpose_s_v1"),
    "a number for a name": ({"name": 5}, "has no name, such as tokenpose_s_v1"),
    "deep JSON": ("[" * 100_000, "cannot be read as JSON"),
    "infinity": ({"mlp_ratio": float("inf")}, "mlp_ratio=inf has to be a finite number above 0"),
    "another": ({"architecture": "BertModel"}, "ConvPose, and is 'BertModel'"),
    "an unknown field": ({"auto_map": "evil.py", "zoom": 2}, "has auto_map, zoom, which no TokenPoseConfig has"),
    "no name": ({"name": ...}, "has no name, such as tokenpose_s_v1"),
    "a wrong type": ({"dim": "192"}, "dim='192' has to be a whole number"),
    "a wrong value": ({"head": "softmax"}, "head='softmax' is none of heatmap, rle, distilpose"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_describes_no_model_is_refused(what: str, saved: Path) -> None:
    change, message = CONFIGS[what]
    if not isinstance(change, str):
        config = json.loads((saved / "config.json").read_text()) | change
        change = json.dumps({name: value for name, value in config.items() if value is not ...})
    (saved / "config.json").write_text(change)
    with pytest.raises(PoseError) as caught:
        from_pretrained(saved)
    assert message in str(caught.value)
    assert str(saved / "config.json") in str(caught.value)


def test_weights_that_do_not_fit_their_config_are_refused(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["extra"] = weights.pop("patch_embed.bias")
    weights["keypoint_tokens"] = torch.zeros(1, 14, 8)
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(PoseError) as caught:
        from_pretrained(saved)
    assert str(caught.value) == (
        f"the weights of {saved} do not fit the config.json beside them, which is of tokenpose_s_v1: missing 1: "
        "patch_embed.bias; surplus 1: extra; of another shape 1: "
        "keypoint_tokens is (1, 14, 8) there and (1, 17, 8) here"
    )


def test_weights_of_8_bits_load_as_their_rounded_values_and_whole_numbers_do_not(saved: Path) -> None:
    weights, counts = load_file(saved / "model.safetensors"), "num_batches_tracked"
    for dtype in (torch.float8_e4m3fn, torch.int8):
        cast = {name: value if name.endswith(counts) else value.to(dtype) for name, value in weights.items()}
        save_file(cast, saved / "model.safetensors")
        if dtype == torch.int8:
            with pytest.raises(PoseError, match=r"has no floating-point numbers in \d+: "):
                from_pretrained(saved)
        else:
            assert torch.equal(from_pretrained(saved).head.mlp[1].weight, cast["head.mlp.1.weight"].float())


def test_weights_that_the_config_has_no_place_for_are_refused(saved: Path) -> None:
    save_file({**load_file(saved / "model.safetensors"), "extra": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(PoseError, match=r"of tokenpose_s_v1: surplus 1: extra$"):
        from_pretrained(saved)


@pytest.mark.parametrize("strict", [True, False])
def test_weights_that_are_not_finite_are_refused(strict: bool, saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["blocks.1.mlp.fc2.bias"][3] = torch.nan
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(PoseError, match=r"model.safetensors has NaN or infinity in 1: blocks.1.mlp.fc2.bias"):
        from_pretrained(saved, strict=strict)


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder in which everything uploaded can be found; nothing goes over the network."""
    cache = tmp_path / "hub"

    def upload_folder(api: HfApi, *, repo_id: str, folder_path: str, **options: Any) -> None:
        repository = cache / f"models--{repo_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        shutil.copytree(folder_path, repository / "snapshots" / COMMIT)

    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **options: RepoUrl(repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return cache


def test_a_model_uploads_and_loads_by_its_name(hub: Path) -> None:
    model = tiny("sdpose_s_v1")
    assert push_to_hub(model, "me/pose").endswith("me/pose")
    loaded = from_pretrained("me/pose", cache_dir=hub)
    assert loaded.config == model.config and torch.equal(outputs(loaded), outputs(model))
    assert torch.equal(outputs(from_pretrained("me/pose", revision=COMMIT, cache_dir=hub)), outputs(model))
    files = (hub / "models--me--pose" / "snapshots" / COMMIT).iterdir()
    assert sorted(path.name for path in files) == ["config.json", "model.safetensors"]


def test_a_repository_that_cannot_be_had_is_said(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PoseError) as caught:
        from_pretrained("me/other", cache_dir=hub)
    assert "there is no folder me/other, and config.json of a repository of that name is not in the cache" in str(
        caught.value
    )
    push_to_hub(tiny(), "me/pose")
    with pytest.raises(PoseError, match=r"config\.json of a repository of that name is not in the cache"):
        from_pretrained("me/pose", revision="1" * 40, cache_dir=hub)

    def not_there(*arguments: Any, **options: Any) -> None:
        raise EntryNotFoundError("404")

    def no_network(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(pose_hub, "hf_hub_download", not_there)
    with pytest.raises(PoseError, match=r"the repository me/pose has no config\.json, as push_to_hub writes it"):
        from_pretrained("me/pose")
    monkeypatch.setattr(pose_hub, "hf_hub_download", no_network)
    with pytest.raises(PoseError, match=r"config\.json of a repository of that name cannot be had: no route$"):
        from_pretrained("me/pose")


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "../me/pose", Path("me/pose"), ""])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(
    source: str | Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PoseError, match=r"from_pretrained: (there is no folder|\. has no config)"):
        from_pretrained(source)


@pytest.mark.parametrize("source", [None, 5, ["me/pose"]])
def test_what_can_be_no_source_is_said(source: Any) -> None:
    with pytest.raises(PoseError, match=r"from_pretrained\(.*\) takes a folder, or the name of a repository"):
        from_pretrained(source)


def test_an_upload_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "create_repo", unreachable)
    with pytest.raises(PoseError, match="push_to_hub: cannot upload to me/pose: no route to host"):
        push_to_hub(tiny(), "me/pose")
    assert issubclass(PoseError, RunError)  # which the example scripts show without a traceback


def test_weights_say_that_they_are_pytorchs(saved: Path) -> None:
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without which transformers and others refuse a file


def test_a_model_laid_out_channels_last_is_saved_too(tmp_path: Path) -> None:
    model = tiny().to(memory_format=torch.channels_last)
    assert not model.backbone.layer1[0].conv2.weight.is_contiguous()
    torch.testing.assert_close(outputs(from_pretrained(save_pretrained(model, tmp_path))), outputs(tiny()))


def test_an_upload_goes_where_and_as_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def create_repo(api: HfApi, repo_id: str, **options: Any) -> RepoUrl:
        seen.update(repo_id=repo_id, token=api.token, private=options.get("private"))
        return RepoUrl(repo_id)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **options: seen.update(options))
    push_to_hub(tiny(), "me/pose", private=True, token="hf_of_me", commit_message="Train longer")
    assert (seen["repo_id"], seen["private"], seen["token"]) == ("me/pose", True, "hf_of_me")
    assert seen["commit_message"] == "Train longer"


def test_both_files_come_from_the_revision_that_was_asked_for(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str]] = []

    def download(repo_id: str, name: str, *, revision: str, cache_dir: str) -> str:
        asked.append((name, revision, cache_dir))
        return str(saved / name)

    monkeypatch.setattr(pose_hub, "hf_hub_download", download)
    from_pretrained("me/pose", revision="v2", cache_dir="cache")
    assert asked == [("config.json", "v2", "cache"), ("model.safetensors", "v2", "cache")]
