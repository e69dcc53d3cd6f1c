"""The README's first snippet runs as it stands, and what it says about the tests is so."""

import ast
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import zoo
from benchmarks.matrix import page
from benchmarks.records import read_rows

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_snippet_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(SNIPPETS[0], names)
    assert names["logits"].shape == (2, 1000)
    stock = timm.create_model("deit_tiny_patch16_224")
    assert type(names["base"]) is type(stock)
    stock.load_state_dict(load_file("plain.safetensors"), strict=True)
    assert torch.equal(stock.eval()(names["images"]), names["logits"])


def test_the_pose_snippet_runs():
    (snippet,) = (snippet for snippet in SNIPPETS if "tokenpose" in snippet)
    names = {}
    exec(snippet, names)
    assert names["coordinates"].shape == (2, 17, 2) and names["scores"].shape == (2, 17)
    assert names["model"].keypoint_tokens.grad.abs().sum() > 0
    assert names["small"].eval()(torch.randn(1, 3, 128, 96)).shape == (1, 14, 32, 24)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_is_python(snippet):
    ast.parse(snippet)


def test_it_counts_the_compared_models_rightly():
    counted = re.search(r"hold (\d+) timm and (\d+) Hugging Face models", " ".join(README.split()))
    assert (int(counted[1]), int(counted[2])) == (len(zoo.TIMM), len(zoo.HF))


def test_it_gives_the_totals_of_the_matrix():
    for library, name in (("timm", "timm"), ("hf", "Hugging Face")):
        counts = page.totals(read_rows(page.newest(library)))
        cells = [counts[column] for column in ("models", "rows", "exact", "defined", "refused", "wrong")]
        assert f"| {name} | {' | '.join(map(str, cells))} |" in README
