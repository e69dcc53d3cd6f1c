"""What the pose models cost: parameters and MACs of every system beside the paper's figures, and times in one run.

    python benchmarks/cost.py pose                                        # sizes, and times on the CPU: some minutes
    python benchmarks/cost.py pose --rounds 0                             # sizes alone: seconds
    python benchmarks/cost.py pose --device cuda --batch-size 128 --compile --bf16

Sizes are counted on one image. "conv + linear" leaves out the two products of attention, as the counter does that the
paper's GFLOPs come from (they are multiply-accumulates, of one cycle, without attention); "with attention" is what is
computed. Times are of evaluation, where running all cycles is what the released code does, and of training steps
against the same architecture written plainly in fp32 (plain.py). Variants take turns; ratios are paired medians with
their 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.pose.plain import PlainPose
from benchmarks.records import RESULTS, free_path, print_rows, write_rows
from benchmarks.settings import add_device_arguments, autocast, mode, provenance, use_device
from benchmarks.speed.timing import paired_ratio, time_in_turns
from cyclekd import CycleLoss, CycleOutput, run_cycles
from cyclekd.integrations.tokenpose.losses.supervised import HeatmapLoss
from cyclekd.integrations.tokenpose.losses.targets import Target
from cyclekd.integrations.tokenpose.models.config import PRESETS
from cyclekd.integrations.tokenpose.models.create import create_model
from cyclekd.integrations.tokenpose.models.tokenpose import token_groups

PAPER = {  # Tables 1, 2, 3 and 8 of SDPose (CVPR 2024): million parameters, "GFLOPs"
    "tokenpose_s_v1": (6.6, 2.4),
    "tokenpose_s_v2": (6.2, 4.7),
    "tokenpose_b_narrow": (13.2, 5.2),
    "ppt_s": (6.6, 2.0),
    "ppt_b_narrow": (13.2, 4.7),
    "sdpose_t": (4.4, 1.8),
    "sdpose_s_v1": (6.6, 2.4),
    "sdpose_s_v2": (6.2, 4.7),
    "sdpose_b_narrow": (13.2, 5.2),
    "sdpose_s_v1_ppt": (6.6, 2.0),
    "tokenreg_s": (5.4, 2.4),
    "sdpose_reg": (5.4, 2.4),
    "simplebaseline_r50": (34.0, 8.9),
    "simplebaseline_r101": (53.0, 12.4),
    "simplebaseline_r152": (68.6, 15.7),
    "rle_r50": (23.6, 4.0),
}
PAPER_ONLY = {
    "OKDHP-2HG": (13.0, 25.5),
    "OKDHP-4HG": (24.0, 47.0),
    "PRTR ResNet-50, 384x288": (41.5, 11.0),
    "PRTR ResNet-50, 512x384": (41.5, 18.8),
    "PRTR ResNet-101, 512x384": (60.4, 33.4),
    "Poseur MobileNetV2": (11.4, 0.5),
    "Poseur ResNet-50": (33.3, 4.6),
}
NOTES = """\
Differences that are left standing:
  B models        The paper's are the narrow ones: a first stage of HRNet of half the width, which the released
                  configuration sets by a slip. 13.146 M would round to 13.1; 13.2 fits rounding twice, over 13.15.
  narrow B, PPT-B 5.13 and 4.74 against 5.2 and 4.7. The counter of the paper's tools adds batch norm, ReLU and
                  upsampling, 5.16 and 4.78; each of the two figures fits another one.
  S-V2            4.65 is the paper's 4.7, without attention; with it, which grows with the square of the tokens, 7.5.
  SimpleBaseline  The published figures count a transposed convolution at the size of its output, four times what is
                  computed, and divide by 2^30: so counted, these models have 8.99, 12.38 and 15.76.
  all cycles      This is what the released evaluation computes; the paper's figures are of one cycle."""

TIMED = ("sdpose_s_v1", "sdpose_t", "sdpose_s_v2")
TRAINED = ("tokenpose_s_v1", "sdpose_s_v1")


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    sizes = [size_row(name) for name in tqdm(PRESETS, desc="counting")] + [paper_row(name) for name in PAPER_ONLY]
    print("\nMillion parameters, and 10^9 multiply-accumulates of one image of 256x192")
    print_rows(sizes)
    print(f"\n{NOTES}")
    times = [*evaluation_rows(args), *training_rows(args)] if args.rounds else []
    if times:
        print(f"\n{args.rounds} rounds, {mode(args)}, {provenance(args)['device']}")
        print_rows(times)
    write("cost-pose", sizes, args)
    if times:
        write(f"cost-pose-times-{mode(args)}", times, args)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cost.py pose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12, help="each times every variant once; 0 counts sizes alone")
    parser.add_argument("--batch-size", type=int, default=16, help="images per training step")
    parser.add_argument("--eval-batch-size", type=int, default=8, help="images per evaluation")
    add_device_arguments(
        parser,
        bf16="our models under bf16 autocast; the plain loop stays fp32",
        compiled="our models through torch.compile; the plain loop stays eager",
    )
    args = parser.parse_args(arguments)
    if args.rounds < 0 or args.rounds == 1 or args.batch_size < 2 or args.eval_batch_size < 1:
        parser.error("--rounds is 0 or at least 2, --batch-size at least 2, --eval-batch-size at least 1")
    use_device(parser, args)
    return args


# -- sizes -------------------------------------------------------------------------------------------------------------


def size_row(name: str) -> dict[str, object]:
    model, config = create_model(name).eval(), PRESETS[name]
    image = torch.zeros(1, 3, *config.input_size)
    plain, whole = giga_macs(lambda: model(image))
    every = giga_macs(lambda: run_cycles(model, image)) if config.cycles > 1 else None
    params = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    paper_params, paper_macs = PAPER.get(name, (None, None))
    return {
        "model": name,
        "params": f"{params:.3f}",
        "paper params": paper_params or "",
        "difference": f"{params - paper_params:+.3f}" if paper_params else "",
        "conv + linear": f"{plain:.3f}",
        "paper GFLOPs": paper_macs or "",
        "difference ": f"{plain - paper_macs:+.3f}" if paper_macs else "",
        "with attention": f"{whole:.3f}",
        "cycles": config.cycles,
        "all cycles, conv + linear": f"{every[0]:.3f}" if every else "",
        "all cycles, with attention": f"{every[1]:.3f}" if every else "",
    }


def paper_row(name: str) -> dict[str, object]:
    """A system that is not built here."""
    paper_params, paper_macs = PAPER_ONLY[name]
    blank = dict.fromkeys(size_columns(), "")
    return blank | {
        "model": name,
        "params": "paper only",
        "paper params": paper_params,
        "conv + linear": "paper only",
        "paper GFLOPs": paper_macs,
        "with attention": "paper only",
    }


def size_columns() -> list[str]:
    ours = ["params", "paper params", "difference", "conv + linear", "paper GFLOPs", "difference ", "with attention"]
    return ["model", *ours, "cycles", "all cycles, conv + linear", "all cycles, with attention"]


@torch.no_grad()
def giga_macs(call: Callable[[], object]) -> tuple[float, float]:
    """10^9 multiply-accumulates of convolutions and linear layers, and the same with the products of attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    flops = counter.get_flop_counts()["Global"]
    batched = sum(count for op, count in flops.items() if "bmm" in str(op))
    total = sum(flops.values())
    return (total - batched) / 2e9, total / 2e9


# -- times -------------------------------------------------------------------------------------------------------------


def evaluation_rows(args: argparse.Namespace) -> list[dict[str, object]]:
    """The wrapped model against the plain one, and against all cycles."""
    steps: dict[str, Callable[[], None]] = {}
    for name in TIMED:
        plain, wrapped = make(name, args, cycles=1).eval(), make(name, args).eval()
        steps |= {
            f"{name}, plain model": evaluation(plain, args),
            f"{name}, plain model again": evaluation(plain, args),
            f"{name}, wrapped": evaluation(wrapped, args),
            f"{name}, all cycles": evaluation(partial(run_cycles, wrapped), args),
        }
    seconds = time_in_turns(steps, args.rounds, args.seed)
    return [
        time_row("evaluation", step, seconds, f"{step.split(',')[0]}, plain model", args.eval_batch_size)
        for step in steps
    ]


def training_rows(args: argparse.Namespace) -> list[dict[str, object]]:
    """Training steps against the plain loop in fp32."""
    steps: dict[str, Callable[[], None]] = {}
    for name in TRAINED:
        model = make(name, args).train()
        plain = PlainPose(model)
        criterion = CycleLoss.paper(HeatmapLoss(), groups=token_groups(model))
        steps[f"{name}, plain loop in fp32"] = training(plain, plain_cycles(plain), criterion, args, nullcontext())
        run = torch.compile(model, fullgraph=True) if args.compile else model
        steps[name] = training(model, run, criterion, args, autocast(args))
    seconds = time_in_turns(steps, args.rounds, args.seed)
    return [
        time_row("training", step, seconds, f"{step.split(',')[0]}, plain loop in fp32", args.batch_size)
        for step in steps
    ]


def time_row(what: str, step: str, seconds: dict[str, list[float]], base: str, images: int) -> dict[str, object]:
    typical = statistics.median(seconds[step])
    return {
        "what": what,
        "variant": step,
        "images": images,
        "milliseconds": f"{1000 * typical:.2f}",
        "images/s": f"{images / typical:.1f}",
        "time x base": paired_ratio(seconds[step], seconds[base]),
        "speed x base": paired_ratio(seconds[base], seconds[step]),
    }


def make(name: str, args: argparse.Namespace, **overrides: int) -> nn.Module:
    """The same weights for every variant of a name."""
    torch.manual_seed(args.seed)
    return create_model(name, **overrides).to(args.device)


def evaluation(call: Callable[[Tensor], object], args: argparse.Namespace) -> Callable[[], None]:
    """One batch, eager."""
    images = torch.randn(args.eval_batch_size, 3, 256, 192, device=args.device)

    def step() -> None:
        with torch.no_grad(), autocast(args):
            call(images)

    return step


def training(
    model: nn.Module,
    run: Callable[[Tensor], CycleOutput],
    criterion: CycleLoss,
    args: argparse.Namespace,
    precision: AbstractContextManager[object],
) -> Callable[[], None]:
    """One forward and one backward."""
    images = torch.randn(args.batch_size, 3, 256, 192, device=args.device)
    heatmaps = torch.rand(args.batch_size, 17, 64, 48, device=args.device)
    target = Target(heatmaps, torch.ones(args.batch_size, 17, 1, device=args.device))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with precision:
            output = run(images)
        criterion(output, target).total.backward()

    return step


def plain_cycles(plain: PlainPose) -> Callable[[Tensor], CycleOutput]:
    def run(images: Tensor) -> CycleOutput:
        cycles = plain(images)
        return CycleOutput(None, tuple(each.output for each in cycles), tuple(each.tokens for each in cycles))

    return run


# -- records -----------------------------------------------------------------------------------------------------------


def write(stem: str, rows: list[dict[str, object]], args: argparse.Namespace) -> None:
    path = free_path(RESULTS / f"{stem}-torch{torch.__version__}.csv")
    source = provenance(args)
    write_rows(path, [row | source for row in rows])
    print(f"written to {path}")
