"""DDP and FSDP2 over two processes: their gradients are those of one process on the whole batch.

Every rank sees samples of its own; with the same ones a missing reduction could not be seen.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cyclekd import CycleError, CycleOutput, unwrap_multicycle, wrap_multicycle

pytest.importorskip("torch.distributed.fsdp", reason="needs torch.distributed")
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import distributed_worker as worker
from distributed_worker import CASES, FIXED, KINDS, MODELS, SCALE_FREE, WORLD, Gradients, Step

HAS_GLOO = dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")
pytestmark = pytest.mark.skipif(not HAS_GLOO, reason="needs torch.distributed with gloo, and fork")

every_model = pytest.mark.parametrize("name", MODELS)
averaging = [(name, kind) for name, kind in CASES if kind not in ("ddp_no_sync", "ddp_scale_free")]
Ranks = list[dict[tuple[str, str], Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What both processes left behind: the steps, or the error, of every case."""
    folder = tmp_path_factory.mktemp("distributed")
    tests = Path(__file__).parent
    search = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(tests / "distributed_worker.py"), str(folder)]
    run = functools.partial(subprocess.run, command, env=environment, capture_output=True, text=True, timeout=300)
    done = run()
    if "terminated with signal SIGABRT" in done.stderr:  # seen once, in PyTorch's own memory
        (folder / "meeting").unlink(missing_ok=True)
        done = run()
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


def steps(ranks: Ranks, name: str, kind: str) -> list[tuple[int, Step]]:
    """Every step of every rank."""
    for rank in ranks:
        assert not isinstance(rank[name, kind], str), rank[name, kind]
    return [(number, step) for number, rank in enumerate(ranks) for step in rank[name, kind]]


@functools.cache
def one_process(name: str, cycles: int, rank: int | None = None, scale_free: bool = False) -> Gradients:
    """On the samples of one rank, or of all."""
    loss = worker.criterion(name, SCALE_FREE if scale_free else FIXED)
    model = wrap_multicycle(worker.base(name), cycles, loss=loss)
    worker.objective(name, model, rank, loss)[0].backward()
    return worker.gradients(model)


def distance(found: Gradients, expected: Gradients) -> float:
    assert found.keys() == expected.keys()
    a, b = (torch.cat([gradients[name].flatten() for name in expected]) for gradients in (found, expected))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("name", "kind"), averaging)
def test_gradients_are_those_of_one_process_on_the_whole_batch(ranks: Ranks, name: str, kind: str) -> None:
    for _, step in steps(ranks, name, kind):
        assert distance(step["gradients"], one_process(name, step["cycles"])) < 1e-6


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_set_cycles_on_the_parallel_module_reaches_the_wrapped_model(ranks: Ranks, name: str, kind: str) -> None:
    assert [step["cycles"] for _, step in steps(ranks, name, kind)] == [*KINDS[kind].cycles] * WORLD


@pytest.mark.parametrize("kind", ["fsdp2_checkpointed", "fsdp2_checkpointed_inside"])
@every_model
def test_blocks_checkpointed_under_fsdp2_run_twice_per_cycle(ranks: Ranks, name: str, kind: str) -> None:
    """Otherwise the equal gradients say nothing of recomputation."""
    for _, step in steps(ranks, name, kind):
        assert step["block_runs"] == 2 * step["cycles"]
    for _, step in steps(ranks, name, "fsdp2"):
        assert step["block_runs"] == step["cycles"]


@every_model
def test_under_no_sync_a_rank_keeps_the_gradients_of_its_own_samples(ranks: Ranks, name: str) -> None:
    for rank, step in steps(ranks, name, "ddp_no_sync"):
        assert distance(step["gradients"], one_process(name, step["cycles"], rank)) < 1e-6


@every_model
def test_the_scale_free_weight_is_of_each_rank_and_its_gradients_are_averaged(ranks: Ranks, name: str) -> None:
    for _, step in steps(ranks, name, "ddp_scale_free"):
        own = [one_process(name, step["cycles"], rank, scale_free=True) for rank in range(WORLD)]
        mean = {key: sum(gradients[key] for gradients in own) / WORLD for key in own[0]}
        assert distance(step["gradients"], mean) < 1e-6


@every_model
def test_a_missing_reduction_would_be_seen(name: str) -> None:
    """A control of the claims above, as is the next."""
    for rank in range(WORLD):
        assert distance(one_process(name, 3, rank), one_process(name, 3)) > 0.1


@every_model
def test_another_number_of_cycles_would_be_seen(name: str) -> None:
    assert distance(one_process(name, 2), one_process(name, 3)) > 0.1


# -- the way back, which one process can show ----------------------------------------------------------------


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_model
def test_a_model_sharded_after_wrapping_is_unwrapped_by_way_of_its_weights(group_of_one: None, name: str) -> None:
    model = fully_shard(wrap_multicycle(worker.base(name)))
    with pytest.raises(CycleError, match=r"FSDP2: before fully_shard, or load the gathered state_dict into a new"):
        unwrap_multicycle(model)
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    expected = worker.base(name).state_dict()
    assert gathered.keys() == expected.keys()
    assert all(torch.equal(gathered[key], expected[key]) for key in expected)


@every_model
def test_a_model_sharded_before_wrapping_is_unwrapped_to_what_it_was(group_of_one: None, name: str) -> None:
    sharded = fully_shard(worker.base(name))
    before = type(sharded)
    wrapped = wrap_multicycle(sharded)
    assert isinstance(worker.output(name, wrapped), CycleOutput)
    assert type(unwrap_multicycle(wrapped)) is before
    assert not isinstance(worker.output(name, wrapped), CycleOutput)
