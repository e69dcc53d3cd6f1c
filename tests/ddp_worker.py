"""Two DistributedDataParallel processes on the CPU, for test_distributed.py.

    python ddp_worker.py <folder>

Each rank trains on its own half of a batch and leaves its gradients in the folder, with and without the averaging.
A program of its own, so that it can import once and then fork, which a process that runs tests should not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.matrix.repeated import make_nondegenerate
from cyclekd import CycleLoss, set_cycles, wrap_multicycle

WORLD = 2
BATCH = 3  # on each rank
CYCLES = (2, 3)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of CycleLoss and of DDP
    "fixed": ({"alpha": 0.1}, {}),
    "find_unused": ({"alpha": 0.1}, {"find_unused_parameters": True}),
    "scale_free": ({}, {}),
}
Gradients = dict[str, Tensor]

# -- the same on both ranks and in the test's own process ----------------------------------------------------


def timm_vit() -> nn.Module:
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("deit_tiny_patch16_224", **size, num_classes=3)


def hf_bert() -> nn.Module:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = hf.BertConfig(**size, **still, vocab_size=31, max_position_embeddings=16, num_labels=3)
    return hf.BertForSequenceClassification(config)


MODELS = {"timm_vit": timm_vit, "hf_bert": hf_bert}


def wrapped(name: str, loss: CycleLoss) -> nn.Module:
    """In double precision, so that only a wrong gradient differs; the cycles are set later."""
    torch.manual_seed(0)
    return wrap_multicycle(make_nondegenerate(MODELS[name]()), loss=loss).double().train()


def samples(name: str, rank: int | None) -> dict[str, Tensor]:
    """The part of one rank, or the whole batch."""
    draw = torch.Generator().manual_seed(1)
    count = WORLD * BATCH
    images = torch.randn(count, 3, 16, 16, generator=draw, dtype=torch.float64)
    whole = {"x": images} if name == "timm_vit" else {"input_ids": torch.randint(3, 31, (count, 6), generator=draw)}
    whole["labels"] = torch.arange(count) % 3
    part = slice(None) if rank is None else slice(rank * BATCH, (rank + 1) * BATCH)
    return {key: value[part] for key, value in whole.items()}


def objective(name: str, model: nn.Module, batch: dict[str, Tensor], criterion: CycleLoss) -> tuple[Tensor, int]:
    """The loss of one step and the number of cycles it was made of."""
    if name == "timm_vit":
        output = model(batch["x"])
        return criterion(output, batch["labels"]).total, len(output.outputs)
    output = model(**batch)
    return output.loss, len(output.outputs)


def criterion(name: str, **weights: Any) -> CycleLoss:
    return CycleLoss(F.cross_entropy if name == "timm_vit" else None, **weights)


def gradients(model: nn.Module) -> Gradients:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# -- one rank ------------------------------------------------------------------------------------------------


def train(name: str, kind: str, rank: int) -> Iterator[tuple[int, dict[str, Any]]]:
    weights, options = KINDS[kind]
    loss = criterion(name, **weights)
    model = wrapped(name, loss)
    parallel = DistributedDataParallel(model, **options)
    for cycles in CYCLES:
        set_cycles(parallel, cycles)
        found: dict[str, Any] = {}
        for key in ("local", "averaged"):
            model.zero_grad()
            # Around the forward, since DDP decides there whether the backward will reduce.
            with parallel.no_sync() if key == "local" else nullcontext():
                value, found["cycles"] = objective(name, parallel, samples(name, rank), loss)
            value.backward()
            found[key], found["loss"] = gradients(model), value.detach()
        yield cycles, found


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # A file to meet at, so that no port has to be free.
    meeting = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": WORLD}
    dist.init_process_group("gloo", **meeting, timeout=timedelta(seconds=60))
    results = {
        (name, kind, cycles): found for name in MODELS for kind in KINDS for cycles, found in train(name, kind, rank)
    }
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(run_rank, (Path(sys.argv[1]),), nprocs=WORLD, start_method="fork")
