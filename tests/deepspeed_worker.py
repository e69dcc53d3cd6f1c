"""Two processes of DeepSpeed on the CPU, prepared by Accelerate, for test_deepspeed.py.

    DS_ACCELERATOR=cpu ACCELERATE_USE_DEEPSPEED=true python deepspeed_worker.py <folder>

Each rank trains every model on its own half of a batch and leaves in the folder how far the weights have moved.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from cyclekd import set_cycles, wrap_multicycle
from distributed_worker import BATCH, FIXED, MODELS, WORLD, Gradients, base, criterion, meet, objective, plain

CYCLES = (2, 3, 3)
"""Of one step after another."""
STAGES = (2, 3)
RATE = 0.01
Prepare = Callable[[nn.Module, torch.optim.Optimizer], tuple[Any, Any, Callable[[Tensor], None]]]

# -- the same on both ranks and in the test's own process ----------------------------------------------------


def train(name: str, prepare: Prepare, rank: int | None) -> nn.Module:
    """In single precision, as DeepSpeed keeps its weights."""
    loss = criterion(name, FIXED)
    model = wrap_multicycle(base(name).float(), loss=loss)
    model, optimizer, backward = prepare(model, torch.optim.SGD(model.parameters(), RATE))
    for cycles in CYCLES:
        set_cycles(model, cycles)
        value, ran = objective(name, model, rank, loss)
        assert ran == cycles
        backward(value)
        optimizer.step()
        optimizer.zero_grad()
    return model


def moved(name: str, weights: dict[str, Tensor]) -> Gradients:
    return {key: weights[key].detach() - start.detach() for key, start in base(name).float().named_parameters()}


# -- one rank ------------------------------------------------------------------------------------------------


def prepare_for(stage: int) -> Prepare:
    config = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the default clips
        "zero_allow_untested_optimizer": True,
    }
    AcceleratorState._reset_state()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    return lambda model, optimizer: (*accelerator.prepare(model, optimizer), accelerator.backward)


def whole_weights(engine: nn.Module) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param  # not above: the test imports this file without DeepSpeed

    return {plain(name): safe_get_full_fp32_param(parameter) for name, parameter in engine.named_parameters()}


def run_rank(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_SIZE": str(WORLD)}
    meet(rank, folder)
    results = {
        (name, stage): moved(name, whole_weights(train(name, prepare_for(stage), rank)))
        for stage in STAGES
        for name in MODELS
    }
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(run_rank, (Path(sys.argv[1]),), nprocs=WORLD, start_method="fork")
