"""DistributedDataParallel over two processes: averaged gradients are those of one process on the whole batch.

Every rank sees samples of its own; with the same ones a missing reduction could not be seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ddp_worker
from ddp_worker import CYCLES, MODELS, WORLD, Gradients

HAS_GLOO = dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")
pytestmark = pytest.mark.skipif(not HAS_GLOO, reason="needs torch.distributed with gloo, and fork")

every_number_of_cycles = pytest.mark.parametrize("cycles", CYCLES)
every_model = pytest.mark.parametrize("name", MODELS)
Results = dict[tuple[str, str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What both processes left behind: gradients before and after the averaging, by model, kind and cycles."""
    folder = tmp_path_factory.mktemp("ddp")
    tests = Path(__file__).parent
    search = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(tests / "ddp_worker.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


def reference(name: str, cycles: int) -> Gradients:
    """One process, the samples of all ranks."""
    loss = ddp_worker.criterion(name, alpha=0.1)
    model = ddp_worker.wrapped(name, loss)
    ddp_worker.set_cycles(model, cycles)
    ddp_worker.objective(name, model, ddp_worker.samples(name, None), loss)[0].backward()
    return ddp_worker.gradients(model)


def distance(found: Gradients, expected: Gradients) -> float:
    a, b = (torch.cat([gradients[name].flatten() for name in expected]) for gradients in (found, expected))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", ["fixed", "find_unused"])
@every_number_of_cycles
@every_model
def test_averaged_gradients_equal_one_process_on_the_whole_batch(ranks, name: str, cycles: int, kind: str) -> None:
    expected = reference(name, cycles)
    for rank in ranks:
        assert distance(rank[name, kind, cycles]["averaged"], expected) < 1e-6


@every_number_of_cycles
@every_model
def test_gradients_before_the_averaging_differ_clearly(ranks, name: str, cycles: int) -> None:
    """The control of the claim above."""
    expected = reference(name, cycles)
    for rank in ranks:
        assert distance(rank[name, "fixed", cycles]["local"], expected) > 0.1


@every_model
def test_gradients_differ_clearly_between_numbers_of_cycles(name: str) -> None:
    """The other control: a rank that trained with other cycles would be seen."""
    assert distance(reference(name, 2), reference(name, 3)) > 0.1


@every_number_of_cycles
@every_model
def test_set_cycles_on_the_ddp_module_reaches_the_wrapped_model(ranks, name: str, cycles: int) -> None:
    assert [rank[name, "fixed", cycles]["cycles"] for rank in ranks] == [cycles] * WORLD


@every_number_of_cycles
@every_model
def test_the_scale_free_weight_trains_under_ddp(ranks, name: str, cycles: int) -> None:
    """A statistic of each rank's own batch, so only the reduction can be compared."""
    found = [rank[name, "scale_free", cycles] for rank in ranks]
    assert all(torch.isfinite(each["loss"]) for each in found)
    mean = {key: (found[0]["local"][key] + found[1]["local"][key]) / WORLD for key in found[0]["local"]}
    assert distance(found[0]["averaged"], mean) < 1e-6
    assert distance(found[1]["averaged"], mean) < 1e-6
