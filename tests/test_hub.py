"""To a model hub and back: what is uploaded is the plain model, and loads by its name into the stock class.

Uploading ends in a folder laid out as the hub's own download cache, so that loading by name is the real code, offline.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from huggingface_hub import HfApi, PyTorchModelHubMixin, RepoUrl
from huggingface_hub.repocard import RepoCard
from safetensors.torch import load_file
from torch import Tensor, nn

import toys
from benchmarks.matrix.repeated import make_nondegenerate
from cyclekd import CycleOutput, wrap_multicycle

COMMIT = "0" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder in which everything uploaded can be found; nothing goes over the network."""
    cache = tmp_path / "hub"

    def snapshot(repo_id: str) -> Path:
        repository = cache / f"models--{repo_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        (repository / "snapshots" / COMMIT).mkdir(parents=True)
        return repository / "snapshots" / COMMIT

    def upload_folder(api: HfApi, *, repo_id: str, folder_path: str, **options: Any) -> None:
        shutil.copytree(folder_path, snapshot(repo_id), dirs_exist_ok=True)

    def create_commit(api: HfApi, *, repo_id: str, operations: list[Any], **options: Any) -> None:
        folder = snapshot(repo_id)
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, folder / operation.path_in_repo)

    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **options: RepoUrl(repo_id))
    monkeypatch.setattr(HfApi, "file_exists", lambda api, *args, **options: False)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(RepoCard, "validate", lambda card, *args, **options: None)
    return cache


def uploaded(hub: Path, repo_id: str) -> Path:
    return hub / f"models--{repo_id.replace('/', '--')}" / "snapshots" / COMMIT


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """After a step as a wrapped model, which it still is, in training."""
    wrap_multicycle(model).train()
    output = model(x)
    assert type(output) is CycleOutput
    getattr(output.outputs[1], "logits", output.outputs[1]).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    return model


def assert_same_files(found: Path, expected: Path) -> None:
    """Byte by byte; weights tensor by tensor and in their order."""
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    for name in names:
        if name.endswith(".safetensors"):
            a, b = load_file(found / name), load_file(expected / name)
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)
        elif not name.endswith(".bin"):
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name


# -- Hugging Face --------------------------------------------------------------------------------------------

SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def bert() -> hf.PreTrainedModel:
    config = hf.BertConfig(**SIZE, vocab_size=50, num_labels=3)
    return make_nondegenerate(hf.BertForSequenceClassification(config))


def vit() -> hf.PreTrainedModel:
    config = hf.ViTConfig(**SIZE, image_size=16, patch_size=8, num_labels=3)
    return make_nondegenerate(hf.ViTForImageClassification(config))


FAMILIES: dict[str, tuple[Callable[[], hf.PreTrainedModel], Tensor, Any]] = {
    "bert": (bert, torch.tensor([[3, 4, 5], [6, 7, 8]]), hf.AutoModelForSequenceClassification),
    "vit": (vit, torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16), hf.AutoModelForImageClassification),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hugging_face_model_uploads_what_the_plain_one_does_and_loads_by_name(family: str, hub: Path) -> None:
    make, x, auto = FAMILIES[family]
    model, plain = trained(make(), x), make()
    plain.load_state_dict(model.state_dict())
    model.push_to_hub("me/wrapped")
    plain.push_to_hub("me/plain")
    assert_same_files(uploaded(hub, "me/wrapped"), uploaded(hub, "me/plain"))
    loaded = auto.from_pretrained("me/wrapped", cache_dir=hub)
    assert type(loaded) is type(plain)
    assert torch.equal(loaded.eval()(x).logits, model.eval()(x).logits)


# -- timm ----------------------------------------------------------------------------------------------------


def deit() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3, num_classes=5)


def test_a_timm_model_uploads_what_the_plain_one_does_and_loads_by_name(hub: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    model, plain = trained(make_nondegenerate(deit()), x), deit()
    plain.load_state_dict(model.state_dict())
    card = {"details": {"Dataset": "none"}}
    for name, each in (("me/model", model), ("you/model", plain)):
        timm.models.push_to_hf_hub(each, name, model_card=card)
    assert_same_files(uploaded(hub, "me/model"), uploaded(hub, "you/model"))
    loaded = timm.create_model("hf-hub:me/model", pretrained=True, cache_dir=str(hub))
    assert type(loaded) is type(plain)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_a_timm_model_loads_from_a_local_folder(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = trained(make_nondegenerate(deit()), x)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert type(loaded) is type(deit())
    assert torch.equal(loaded.eval()(x), model.eval()(x))


# -- models of one's own -------------------------------------------------------------------------------------


class OnHub(toys.Toy, PyTorchModelHubMixin, license="mit", repo_url="https://example.org", tags=["toy"]):
    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth=depth)


def test_a_custom_module_uploads_what_the_plain_one_does_and_loads_by_name(hub: Path, tmp_path: Path) -> None:
    x = toys.images()
    model, plain = trained(OnHub(depth=4), x), OnHub(depth=4)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(tmp_path / "plain")
    model.push_to_hub("me/toy")
    assert_same_files(uploaded(hub, "me/toy"), tmp_path / "plain")
    loaded = OnHub.from_pretrained("me/toy", cache_dir=hub)
    assert type(loaded) is OnHub and len(loaded.blocks) == 4
    assert torch.equal(loaded.eval()(x), model.eval()(x))
