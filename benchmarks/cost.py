"""What N cycles cost: a training step of a wrapped timm ViT against the same step written by hand, in one run.

    python benchmarks/cost.py                                       # DeiT-Tiny, 2 cycles, on the CPU: about 6 minutes
    python benchmarks/cost.py --device cuda --batch-size 256 --bf16
    python benchmarks/cost.py --device cuda --batch-size 256 --bf16 --compile
    python benchmarks/cost.py pose                                  # the pose models instead: pose/costs.py

The ideal is stem + N x stack + N x head with the same loss. Variants take turns within every round, so that a busy
machine slows all of them alike; a ratio is the median over rounds of paired ratios, with the 95 % bootstrap interval of
that median. Absolute times mean little elsewhere. FLOPs are counted, not estimated.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

if not __package__:  # run as a script: the folder in which `benchmarks` lies is where imports start
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.pose import costs
from benchmarks.records import RESULTS, free_path, print_rows, write_rows
from benchmarks.settings import add_device_arguments, autocast, mode, provenance, use_device
from benchmarks.speed.timing import paired_ratio, time_in_turns
from cyclekd import CycleLoss, CycleOutput, wrap_multicycle

TRAINING = ("plain", "ideal", "wrapped", "plain checkpointed", "wrapped checkpointed")
EVALUATION = ("plain eval", "plain eval again", "wrapped eval")


def main() -> None:
    if sys.argv[1:2] == ["pose"]:
        costs.main(sys.argv[2:])
        return
    args = parse_arguments()
    torch.manual_seed(args.seed)
    steps = {name: make_step(name, args) for name in (*TRAINING, *EVALUATION)}
    flops = {name: count_flops(name, args) for name in (*TRAINING, *EVALUATION)}
    seconds = time_in_turns(steps, args.rounds, args.seed)
    memory = {name: peak_memory(name, args) for name in (*TRAINING, *EVALUATION)}
    rows = [as_row(name, seconds, flops, memory) for name in (*TRAINING, *EVALUATION)]
    print_table(rows, args)
    path = free_path(RESULTS / f"cost-{args.model}-n{args.cycles}-{mode(args)}-torch{torch.__version__}.csv")
    source = {"batch size": str(args.batch_size), **provenance(args)}
    write_rows(path, [row | source for row in rows])
    print(f"\nwritten to {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="any timm VisionTransformer")
    parser.add_argument("--cycles", type=int, default=2, help="N, at least 2")
    parser.add_argument("--batch-size", type=int, default=8, help="images per step")
    parser.add_argument("--rounds", type=int, default=30, help="each times every variant once")
    add_device_arguments(parser, bf16="under bf16 autocast", compiled="torch.compile(fullgraph=True) for every variant")
    args = parser.parse_args()
    if args.cycles < 2 or args.batch_size < 1 or args.rounds < 2:
        parser.error("--cycles and --rounds are at least 2, --batch-size at least 1")
    use_device(parser, args)
    if not isinstance(timm.create_model(args.model), timm.models.VisionTransformer):
        parser.error(f"--model {args.model}: the hand-written loop is one of timm's VisionTransformer")
    return args


# -- the variants ------------------------------------------------------------------------------------------------------


class HandWritten(nn.Module):
    """The ideal: what somebody would write who knows this model and nothing of hooks."""

    def __init__(self, model: nn.Module, cycles: int) -> None:
        super().__init__()
        self.model, self.cycles = model, cycles

    def forward(self, images: Tensor) -> CycleOutput:
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        outputs, tokens = [], []
        for _ in range(self.cycles):
            x = model.blocks(x)
            tokens.append(x)
            outputs.append(model.forward_head(model.norm(x)))
        return CycleOutput(None, tuple(outputs), tuple(tokens))


def make_model(name: str, args: argparse.Namespace) -> nn.Module:
    """The variant's model, all with the same initial weights."""
    torch.manual_seed(args.seed)
    model = timm.create_model(args.model).to(args.device)
    if "checkpointed" in name:
        model.set_grad_checkpointing(True)
    if name.startswith("wrapped"):
        model = wrap_multicycle(model, args.cycles)
    elif name == "ideal":
        model = HandWritten(model, args.cycles)
    return model.eval() if "eval" in name else model.train()


def make_step(name: str, args: argparse.Namespace, compiled: bool | None = None) -> Callable[[], None]:
    """One forward, and in training one backward through the same criterion."""
    model = make_model(name, args)
    criterion = CycleLoss(F.cross_entropy)
    images = torch.randn(args.batch_size, 3, *model_size(args), device=args.device)
    labels = torch.randint(0, 1000, (args.batch_size,), device=args.device)
    run = torch.compile(model, fullgraph=True) if (args.compile if compiled is None else compiled) else model

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(args):
            output = run(images)
        criterion(output, labels).total.backward()

    def evaluate() -> None:
        with torch.no_grad(), autocast(args):
            run(images)

    return evaluate if "eval" in name else train


def model_size(args: argparse.Namespace) -> tuple[int, int]:
    return timm.get_pretrained_cfg(args.model).input_size[1:]


# -- measuring ---------------------------------------------------------------------------------------------------------


def count_flops(name: str, args: argparse.Namespace) -> int:
    """Of one step; with the plain attention kernel, which is counted alike on every device."""
    step = make_step(name, args, compiled=False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """MiB that two steps add to what model, gradients and inputs hold: allocated on CUDA, resident on the CPU."""
    if args.device.startswith("cuda"):
        step = make_step(name, args)
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with get_context("spawn").Pool(1) as pool:  # the peak of a process never comes down again
        return pool.apply(resident_growth, (name, args))


def resident_growth(name: str, args: argparse.Namespace) -> float:
    torch.set_num_threads(args.threads)
    step = make_step(name, args)
    before = peak_resident()
    step(), step()
    return peak_resident() - before


def peak_resident() -> float:
    """MiB that this process has held at most; nothing where the system does not tell by itself.

    Not getrusage, whose peak a started process takes over from the one that started it.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM")), math.nan)


# -- the table ---------------------------------------------------------------------------------------------------------


def as_row(
    name: str, seconds: dict[str, list[float]], flops: dict[str, int], memory: dict[str, float]
) -> dict[str, object]:
    base = "plain eval" if "eval" in name else "plain"
    ideal = None if "eval" in name else "ideal"
    return {
        "variant": name,
        "milliseconds": f"{1000 * statistics.median(seconds[name]):.2f}",
        "x plain": paired_ratio(seconds[name], seconds[base]),
        "x ideal": paired_ratio(seconds[name], seconds[ideal]) if ideal else "",
        "GFLOPs": f"{flops[name] / 1e9:.6f}",
        "FLOPs x plain": f"{flops[name] / flops[base]:.4f}",
        "FLOPs x ideal": f"{flops[name] / flops[ideal]:.6f}" if ideal else "",
        "peak MiB": f"{memory[name]:.0f}",
        "peak x plain": f"{memory[name] / memory[base]:.2f}",
    }


def print_table(rows: list[dict[str, object]], args: argparse.Namespace) -> None:
    print(f"\n{args.model}, {args.cycles} cycles, batch {args.batch_size}, {mode(args)}, {args.rounds} rounds")
    print_rows(rows)


if __name__ == "__main__":
    main()
