"""Two processes on the CPU, for test_distributed.py.

    python distributed_worker.py <folder>

Each rank trains every model in every kind of data parallelism on its own half of a batch and leaves its gradients in
the folder. A program of its own, so that it can import once and then fork, which a process that runs tests should not.
"""

from __future__ import annotations

import functools
import gc
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.t5.modeling_t5 import T5Block

from benchmarks.matrix.repeated import make_nondegenerate
from cyclekd import CycleLoss, set_cycles, wrap_multicycle

WORLD = 2
BATCH = 3  # on each rank
FIXED = {"alpha": 0.1}
SCALE_FREE: dict[str, float] = {}
Gradients = dict[str, Tensor]
Step = dict[str, Any]
Wrap = Callable[[nn.Module], nn.Module]

# -- the same on both ranks and in the test's own process ----------------------------------------------------


def vit() -> nn.Module:
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("deit_tiny_patch16_224", **size, num_classes=3)


SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 31}


def bert() -> nn.Module:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZE, **still, max_position_embeddings=16, num_labels=3))


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, num_key_value_heads=1, max_position_embeddings=16))


def t5() -> nn.Module:
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 31}
    # no cache: a block that fills it cannot be recomputed, in the plain model neither
    config = hf.T5Config(**size, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False)
    return hf.T5ForConditionalGeneration(config)


MODELS = {"vit": vit, "bert": bert, "llama": llama, "t5": t5}
BLOCKS = (Block, BertLayer, LlamaDecoderLayer, T5Block)


def base(name: str) -> nn.Module:
    """In double precision, so that only a wrong gradient differs."""
    torch.manual_seed(0)
    return make_nondegenerate(MODELS[name]()).double().train()


def samples(name: str, rank: int | None) -> dict[str, Tensor]:
    """The part of one rank, or the whole batch."""
    draw = torch.Generator().manual_seed(1)
    count = WORLD * BATCH
    images = torch.randn(count, 3, 16, 16, generator=draw, dtype=torch.float64)
    words, classes = torch.randint(3, 31, (count, 6), generator=draw), torch.arange(count) % 3
    both = {
        "vit": {"x": images, "labels": classes},
        "bert": {"input_ids": words, "labels": classes},
        "llama": {"input_ids": words, "labels": words},
        "t5": {"input_ids": words, "labels": words[:, :4].flip(1)},
    }[name]
    part = slice(None) if rank is None else slice(rank * BATCH, (rank + 1) * BATCH)
    return {key: value[part] for key, value in both.items()}


def criterion(name: str, weights: dict[str, float]) -> CycleLoss:
    return CycleLoss(F.cross_entropy if name == "vit" else None, **weights)


def objective(name: str, model: nn.Module, rank: int | None, loss: CycleLoss) -> tuple[Tensor, int]:
    """The loss on the samples of one rank, or of all, and the number of cycles that it was made of."""
    found = output(name, model, rank)
    total = found.loss if found.loss is not None else loss(found, samples(name, rank)["labels"]).total
    return total, len(found.outputs)


def output(name: str, model: nn.Module, rank: int | None = None) -> Any:
    batch = samples(name, rank)
    return model(batch["x"].to(next(model.parameters()).dtype)) if name == "vit" else model(**batch)


def gradients(model: nn.Module) -> Gradients:
    return {plain(name): whole(parameter.grad) for name, parameter in model.named_parameters()}


def plain(name: str) -> str:
    """The parameter's name in the base model."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


# -- kinds of data parallelism -------------------------------------------------------------------------------


def ddp(model: nn.Module, wrap: Wrap, **options: Any) -> nn.Module:
    return DistributedDataParallel(wrap(model), **options)


def fsdp2(model: nn.Module, wrap: Wrap) -> nn.Module:
    return shard(wrap(model))


def fsdp2_before_wrapping(model: nn.Module, wrap: Wrap) -> nn.Module:
    return wrap(shard(model))


def fsdp2_checkpointed(model: nn.Module, wrap: Wrap) -> nn.Module:
    model = wrap(model)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, BLOCKS))
    return shard(model)


def fsdp2_checkpointed_inside(model: nn.Module, wrap: Wrap) -> nn.Module:
    """By the model's own switch; the checkpoints of timm enclose the hooks on the blocks."""
    if isinstance(model, hf.PreTrainedModel):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.set_grad_checkpointing()
    return shard(wrap(model))


def fsdp2_by_accelerate(model: nn.Module, wrap: Wrap) -> nn.Module:
    """In Accelerate's own units, such as the embeddings; its Accelerator itself has FSDP on GPUs only."""
    names = {type(block).__name__ for block in blocks(model)}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(names),
        cpu_ram_efficient_loading=True,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        device=torch.device("cpu"),
        is_main_process=dist.get_rank() == 0,
    )
    return fsdp2_prepare_model(accelerator, wrap(model))


def shard(model: nn.Module) -> nn.Module:
    for block in blocks(model):
        fully_shard(block, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BLOCKS)]


@functools.cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD,))


class Kind(NamedTuple):
    parallel: Callable[[nn.Module, Wrap], nn.Module]
    cycles: tuple[int, ...] = (2, 3, 3)
    """Of one step after another."""
    weights: dict[str, float] = FIXED
    models: tuple[str, ...] = tuple(MODELS)


KINDS = {
    "ddp": Kind(ddp),
    "ddp_find_unused": Kind(partial(ddp, find_unused_parameters=True)),
    "ddp_static_graph": Kind(partial(ddp, static_graph=True), (3, 3)),
    "fsdp2": Kind(fsdp2),
    "fsdp2_before_wrapping": Kind(fsdp2_before_wrapping),
    "fsdp2_checkpointed": Kind(fsdp2_checkpointed),
    "fsdp2_checkpointed_inside": Kind(fsdp2_checkpointed_inside),
    # Accelerate 1.15 refuses tied embeddings (T5) and parameters of the model itself (ViT), wrapped or not.
    "fsdp2_by_accelerate": Kind(fsdp2_by_accelerate, models=("bert", "llama")),
    "ddp_no_sync": Kind(ddp),
    "ddp_scale_free": Kind(ddp, weights=SCALE_FREE),
}

CASES = [(name, kind) for kind in KINDS for name in KINDS[kind].models]

# -- one rank ------------------------------------------------------------------------------------------------


def train(name: str, kind: str, rank: int) -> list[Step]:
    """`block_runs` are of the last block, recomputations included."""
    loss = criterion(name, KINDS[kind].weights)
    model = KINDS[kind].parallel(base(name), partial(wrap_multicycle, loss=loss))
    runs: list[None] = []
    first_leaf(blocks(model)[-1]).register_forward_pre_hook(lambda module, args: runs.append(None))
    steps = []
    for cycles in KINDS[kind].cycles:
        set_cycles(model, cycles)
        runs.clear()
        # around the forward too: DDP decides there whether the backward will reduce
        with model.no_sync() if kind == "ddp_no_sync" else nullcontext():
            model.zero_grad()
            value, ran = objective(name, model, rank, loss)
            value.backward()
        steps.append({"gradients": gradients(model), "cycles": ran, "block_runs": len(runs)})
    return steps


def first_leaf(module: nn.Module) -> nn.Module:
    return next(part for part in module.modules() if not any(part.children()))


def train_or_tell(name: str, kind: str, rank: int) -> list[Step] | str:
    """An error ends one case, not all of them; both ranks meet it."""
    try:
        return train(name, kind, rank)
    except Exception:
        return traceback.format_exc()


def run_rank(rank: int, folder: Path) -> None:
    meet(rank, folder)
    results = {}
    gc.disable()  # a DDP reducer that is collected on another thread, in the middle of a backward, was seen to abort
    for name, kind in CASES:
        results[name, kind] = train_or_tell(name, kind, rank)
        gc.collect()
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def meet(rank: int, folder: Path) -> None:
    """At a file, so that no port has to be free."""
    torch.set_num_threads(1)
    meeting = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": WORLD}
    dist.init_process_group("gloo", **meeting, timeout=timedelta(seconds=60))


if __name__ == "__main__":
    torch.multiprocessing.start_processes(run_rank, (Path(sys.argv[1]),), nprocs=WORLD, start_method="fork")
