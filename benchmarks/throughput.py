"""Images per second of training: a model in timm's train.py loop, plain and in N cycles in ours, all in one run.

    python benchmarks/throughput.py --photos PHOTOS --minutes 8            # one GPU: DeiT-Tiny at 224, batch 256, bf16
    python benchmarks/throughput.py --device cpu --data-rounds 1           # fp32, batch 8: some minutes

Rows are the four loops of speed/loops.py, eager and compiled, fed by one batch that stays on the device and by JPEG
files through timm's loader and ours (speed/feeds.py). Variants take turns within every round, in an order drawn anew;
a ratio is the median over rounds of paired ratios of times, with the 95 % bootstrap interval of that median. Blocks of
steps are timed, never single ones. "waits for data" is the share of the time with JPEG files that is not accounted for
by the same loop without them (and, for ours, by the augmentation on the device).

PHOTOS is a folder of photographs, from which files of ImageNet's size are cut; without it they are smooth noise.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import ParseKwargs
from tqdm import tqdm

if not __package__:  # run as a script: the folder in which `benchmarks` lies is where imports start
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.records import RESULTS, free_path, origin, print_rows, write_rows
from benchmarks.speed.feeds import OurLoader, TimmLoader, make_jpegs, resident_batches, resident_pairs
from benchmarks.speed.loops import LOOPS, OurLoop, TimmLoop, bytes_held, make_loop
from benchmarks.speed.timing import Peak, paired_ratio, shuffled_rounds, timed

MODES = ("eager", "compiled")
Loops = dict[tuple[str, str], TimmLoop | OurLoop]
"""By name, and eager or compiled."""
Name = tuple[str, str, str]
"""The same and where the batches come from: resident or JPEG."""
TIMM_LOADER, OUR_LOADER = ("timm loader alone", ""), ("our loader alone", "")
AUGMENTATION = ("our augmentation alone", "")
RATIOS = {"timm loop": ("plain",), "plain": ("cycles", "ideal"), "ideal": ("cycles",)}
"""Whose time is divided by that of the key."""


def main() -> None:
    args = parse_arguments()
    end = time.perf_counter() + 60 * args.minutes
    torch.backends.cudnn.benchmark = True  # as timm's train.py sets it
    loops, first_steps = make_loops(args)
    middle = (time.perf_counter() + end) / 2 if args.data_rounds else end
    seconds, peaks = time_resident(loops, middle, args)
    with tempfile.TemporaryDirectory() as folder:
        bytes_per_file = 0.0
        if args.data_rounds:
            paths = make_jpegs(Path(folder), args.files, args.photos, args.seed)
            bytes_per_file = statistics.mean(path.stat().st_size for path in paths)
            seconds |= time_with_jpegs(loops, paths, end, args)
    rows = [as_row(name, seconds, peaks, first_steps, args) for name in seconds]
    print(f"\n{args.model} {args.model_args or ''}, {args.cycles} cycles, batch {args.batch}, {args.workers} workers")
    print_rows(rows)
    source = provenance(args, bytes_per_file)
    write_rows(args.out, [row | source for row in rows])
    print(f"\nwritten to {args.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="deit_tiny_patch16_224", help="any timm VisionTransformer")
    add("--model-args", nargs="*", default={}, action=ParseKwargs, help="of timm's create_model, such as depth=1")
    add("--cycles", type=int, default=2, help="N, at least 2")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu (fp32) or cuda (bf16)")
    add("--batch", type=int, help="images per step, an even number; 256 on a GPU, 8 on the CPU")
    add("--rounds", type=int, default=10, help="without data loading; each times every variant once")
    add("--steps", type=int, help="per variant and round; 20 on a GPU, 2 on the CPU")
    add("--data-rounds", type=int, default=2, help="with data loading; 0 leaves it out")
    add("--workers", type=int, default=cores(), help="of each loader; as many as there are cores")
    add("--modes", nargs="+", choices=MODES, help="rows of these; both on a GPU, eager alone on the CPU")
    add("--photos", type=Path, help="folder of .jpg files from which the JPEG files are cut")
    add("--files", type=int, default=512, help="JPEG files to make")
    add("--minutes", type=float, default=60, help="no new round where it would end later; one of each is always done")
    add("--out", type=Path, help="results file; throughput-<device>-torch<version>.csv in benchmarks/results")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is there")
    args.batch, args.steps = args.batch or (256 if on_gpu else 8), args.steps or (20 if on_gpu else 2)
    args.modes = list(dict.fromkeys(args.modes or (MODES if on_gpu else ("eager",))))
    if args.batch < 2 or args.batch % 2:
        parser.error(f"--batch {args.batch}: mixup pairs images, so an even number is needed")
    if args.cycles < 2 or min(args.rounds, args.steps, args.files) < 1 or min(args.data_rounds, args.workers) < 0:
        parser.error("--cycles is at least 2, --rounds, --steps and --files at least 1, the others no less than 0")
    if args.photos and not any(args.photos.rglob("*.jp*g")):
        parser.error(f"--photos {args.photos}: holds no .jpg file")
    model = timm.create_model(args.model, **args.model_args)
    if not isinstance(model, timm.models.VisionTransformer):
        parser.error(f"--model {args.model}: the hand-written loop is one of timm's VisionTransformer")
    args.size = model.patch_embed.img_size[0]
    kind = args.device.split(":")[0]
    args.out = free_path(args.out or RESULTS / f"throughput-{kind}-torch{torch.__version__}.csv")
    return args


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- measuring ---------------------------------------------------------------------------------------------------------


def make_loops(args: argparse.Namespace) -> tuple[Loops, dict[Name, float]]:
    """Every loop after three steps, and how long the first step took: of compiled ones, the compilation."""
    loops, first_steps = {}, {}
    names = list(product(LOOPS, args.modes))
    for name, mode in tqdm(names, desc="first steps"):
        loop = loops[name, mode] = make_loop(name, mode == "compiled", args)
        batches = resident(loop, 3, args)
        first_steps[name, mode, "resident"] = timed(loop.step, islice(batches, 1))
        timed(loop.step, batches)
    return loops, first_steps


def time_resident(
    loops: Loops, end: float, args: argparse.Namespace
) -> tuple[dict[Name, list[float]], dict[Name, float]]:
    """Seconds per step of every round, and peak memory in MiB, with one batch that stays on the device."""
    seconds: dict[Name, list[float]] = {(*name, "resident"): [] for name in loops}
    peaks: dict[Name, float] = {}
    for order in shuffled_rounds(list(loops), args.rounds, end, args.seed, "without data loading"):
        for name in order:
            step, peak = time_loop(loops[name], args)
            seconds[(*name, "resident")].append(step)
            if args.device.startswith("cuda"):
                peaks[(*name, "resident")] = peak / 2**20
    return seconds, peaks


def time_loop(loop: TimmLoop | OurLoop, args: argparse.Namespace) -> tuple[float, int]:
    """Seconds per step, and the most bytes at once; no batch of another loop is alive here."""
    memory = Peak()
    batches = resident(loop, 2 + args.steps, args)
    timed(loop.step, islice(batches, 2))
    return timed(loop.step, batches) / args.steps, memory.grown() + bytes_held(loop)


def time_with_jpegs(loops: Loops, paths: list[Path], end: float, args: argparse.Namespace) -> dict[Name, list[float]]:
    """Seconds per step with timm's loader for timm's loop and ours for ours, of the loaders alone, of augmentation."""
    timms, ours = TimmLoader(paths, args), OurLoader(paths, args)
    names = [*loops, TIMM_LOADER, OUR_LOADER, AUGMENTATION]
    seconds: dict[Name, list[float]] = {(*name, "JPEG"): [] for name in names}
    for order in shuffled_rounds(names, args.data_rounds, end, args.seed, "with data loading"):
        for name in order:
            step = loops[name].step if name in loops else do_nothing
            if name == AUGMENTATION:
                before, counted, batches = 2, args.steps, ours.augmented(2 + args.steps)
            else:
                loader = timms if name[0].startswith("timm") else ours
                (before, counted, _), batches = loader.pass_, iter(loader)
            timed(step, islice(batches, before))
            seconds[(*name, "JPEG")].append(timed(step, islice(batches, counted)) / counted)
            timed(do_nothing, batches)
    return seconds


def resident(loop: TimmLoop | OurLoop, times: int, args: argparse.Namespace) -> Iterator[Any]:
    return (resident_pairs if isinstance(loop, TimmLoop) else resident_batches)(times, args)


def do_nothing(batch: object) -> None: ...


# -- the table ---------------------------------------------------------------------------------------------------------


def as_row(
    name: Name,
    seconds: dict[Name, list[float]],
    peaks: dict[Name, float],
    first_steps: dict[Name, float],
    args: argparse.Namespace,
) -> dict[str, object]:
    loop, mode, data = name
    ratios = {
        f"x {base}": paired_ratio(seconds[name], seconds[base, mode, data]) if loop in over else ""
        for base, over in RATIOS.items()
    }
    speed = args.batch / statistics.median(seconds[name])
    return {
        "variant": f"{args.cycles} cycles" if loop == "cycles" else loop,
        "mode": mode,
        "data": data,
        "images/s": f"{speed:.1f}",
        "per core": f"{speed / min(max(args.workers, 1), cores()):.1f}" if "loader" in loop else "",
        "ms per step": f"{1000 * statistics.median(seconds[name]):.2f}",
        **ratios,
        "waits for data": f"{waiting(name, seconds):.2f}" if data == "JPEG" and loop in LOOPS else "",
        "peak MiB": f"{peaks[name]:.0f}" if name in peaks else "",
        "first step s": f"{first_steps[name]:.1f}" if name in first_steps else "",
        "rounds": len(seconds[name]),
    }


def waiting(name: Name, seconds: dict[Name, list[float]]) -> float:
    """Share of the time with JPEG files in which there is nothing to compute."""
    loop, mode, _ = name
    computing = statistics.median(seconds[loop, mode, "resident"])
    if loop != "timm loop":
        computing += statistics.median(seconds[(*AUGMENTATION, "JPEG")])
    return max(0.0, 1 - computing / statistics.median(seconds[name]))


def provenance(args: argparse.Namespace, bytes_per_file: float) -> dict[str, str]:
    on_gpu = args.device.startswith("cuda")
    return {
        "model": " ".join([args.model, *(f"{key}={value}" for key, value in args.model_args.items())]),
        "cycles": str(args.cycles),
        "batch": str(args.batch),
        "steps": str(args.steps),
        "workers": str(args.workers),
        "KiB per file": f"{bytes_per_file / 2**10:.0f}",
        "files": "photographs" if args.photos else "noise",
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "precision": "bf16" if on_gpu else "fp32",
        "cores": str(cores()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "timm": timm.__version__,
        **origin(),
    }


if __name__ == "__main__":
    main()
