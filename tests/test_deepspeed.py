"""DeepSpeed ZeRO-2 and ZeRO-3, prepared by Accelerate, over two processes: they train as one process does."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import deepspeed_worker as worker
from deepspeed_worker import MODELS, STAGES, WORLD, Gradients

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], Gradients]]:
    """How far the weights moved in each process, by model and stage."""
    folder = tmp_path_factory.mktemp("deepspeed")
    tests = Path(__file__).parent
    search = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    on_the_cpu = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **on_the_cpu, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tests / "deepspeed_worker.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


@functools.cache
def one_process(name: str, rank: int | None = None) -> Gradients:
    """On the samples of one rank, or of all."""
    model = worker.train(name, lambda model, optimizer: (model, optimizer, torch.Tensor.backward), rank)
    return worker.moved(name, dict(model.named_parameters()))


def distance(found: Gradients, expected: Gradients) -> float:
    assert found.keys() == expected.keys()
    a, b = (torch.cat([moved[name].flatten() for name in expected]) for moved in (found, expected))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", MODELS)
def test_three_steps_move_the_weights_as_one_process_does_on_the_whole_batch(ranks, name: str, stage: int) -> None:
    for rank in ranks:
        assert distance(rank[name, stage], one_process(name)) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_reduction_would_be_seen(name: str) -> None:
    for rank in range(WORLD):
        assert distance(one_process(name, rank), one_process(name)) > 0.1
