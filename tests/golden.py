"""Outputs of the published reference implementations, to compare with where the folder that holds them is there."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "shared/golden"


def golden(name: str) -> dict[str, Tensor]:
    """The tensors of one file by name; skips the test where there is none."""
    return load_file(_path(f"{name}.safetensors"))


def golden_json(name: str) -> dict:
    """One file of numbers; skips the test where there is none."""
    return json.loads(_path(f"{name}.json").read_text())


def _path(name: str) -> Path:
    if not (FOLDER / name).exists():
        pytest.skip(f"the reference numbers {name} are not on this machine")
    return FOLDER / name
