"""Does self-distillation help my model? Paired trainings of it, plain, plain with equal compute, and self-distilled.

    python benchmarks/gain.py digits                              # built-in, 8 paired seeds on the CPU: some minutes
    python benchmarks/gain.py digits --seeds 2 --epochs 5         # a first look, half a minute
    python benchmarks/gain.py my_task.py --seeds 5                # your model and data: benchmarks/experiment/tasks.py
    python benchmarks/gain.py cifar100 --data FOLDER --seeds 4 --alpha 1e-3 1e-2 --supervise-only --minutes 9
    python benchmarks/gain.py pack FOLDER OUT                     # CIFAR-100 for a machine without `datasets`
    python benchmarks/gain.py pose --data FOLDER --seeds 3 --compile           # people in COCO's layout, on a GPU
    python benchmarks/gain.py pose --data FOLDER --model tokenpose_t_6 --cycles 3 --input-size 256 192

Pose is a plain model of cyclekd.integrations.tokenpose, with Adam, the paper's random views drawn on the device and its
alpha of 5e-6 for keypoint and visual tokens. FOLDER has annotations/person_keypoints_{train,val}.json beside train/ and
val/, with or without 2017, or CrowdPose's layout; decoded it has to fit into the device's memory. The metric is PCK@0.1
on val: percent of the labelled key points that are found within a tenth of the padded ground-truth box.

"Equal compute" is plain training for N times the epochs. Where layers come before the blocks, which cycles do not run
again, that is more than N cycles cost ("seconds" shows by how much): two of TokenPose-S-V1 cost 1.58 plain passes.

All runs of a seed start from the same weights and see the same batches in the same order; only so are their
differences worth an interval. A call that runs out of --minutes, or is stopped with Ctrl-C, leaves checkpoints: the
same call goes on. A later call with more seeds or arms adds rows to the same file and runs nothing twice.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import torch
from tqdm import tqdm

if not __package__:  # run as a script: the folder in which `benchmarks` lies is where imports start
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.experiment.figure import draw
from benchmarks.experiment.results import EQUAL, PLAIN, Results, accuracy_table, cost_table, print_table
from benchmarks.experiment.runs import Advance, Arm, Job, Plan, Settings, checkpoint_files, epochs_done
from benchmarks.experiment.tasks import Recipe, Task, load_task
from benchmarks.experiment.workers import jobs_for, run_all
from benchmarks.records import RESULTS
from cyclekd import CycleError, wrap_multicycle
from cyclekd.integrations.runs.errors import RunError
from cyclekd.integrations.runs.stopping import Stopping

LEGEND = """
{metric} in percent, mean over seeds; differences are paired, and ± is half the width of a 95 % t-interval. "All
cycles": all {cycles} run at inference, at about {cycles} times the cost. Retention is the share of that gain which one
pass keeps, (one pass - plain) / (all cycles - plain), with Fieller's 95 % interval; n/a where the interval of all
cycles - plain contains 0 or one seed gives none: a share of what may be nothing is no number.
"""
NOT_SHOWN = """
An interval that contains 0 means that these runs show no difference in either direction. It does not mean that
there is none: more seeds make it narrower. Intervals are not corrected for the number of arms, so the best of
several looks better than it is. Read "one pass - equal compute" first: self-distillation costs about as much as
training plainly for that many passes, and less where layers come before the blocks: compare the seconds. Seconds
and images/s are of training, with as many runs side by side as the file says; they compare only where that number and
the device are the same.
"""


def main() -> int:
    if sys.argv[1:2] == ["pack"]:
        return told(pack)
    return told(experiment)


def told(command: Callable[[], int]) -> int:
    """Exit code of `command`; what a user can cause is a message and exit code 2."""
    try:
        return command()
    except (RunError, CycleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def experiment() -> int:
    args = parse_arguments()
    cache = cache_of(args)
    task = load_task(args.task, cache, args.images, args.model)
    settings = settings_of(args, task)
    check_cycling(task, settings)
    results = Results(args.results / f"gain-{name_of(settings)}-torch{torch.__version__}.csv", settings)
    work = args.work / f"{results.path.stem.removeprefix('gain-')}-{digest(settings)}"
    jobs = args.jobs or jobs_for(settings.device)
    plan = Plan(settings, args.task, cache, work, args.threads)
    todo = [job for job in jobs_of(args, task.recipe) if not results.holds(job)]
    with Stopping(args.minutes) as stopping, progress(plan, todo, jobs) as advance:
        for job, measured in run_all(plan, todo, jobs, stopping, advance):
            results.append(job, measured, min(jobs, len(todo)))
            for file in checkpoint_files(work, job):
                file.unlink()
    report(results, settings)
    if left := sum(not results.holds(job) for job in todo):
        print(f"\n{left} of {len(todo)} runs are not over ({stopping.why}); the same command goes on with them.")
    return stopping.exit_code


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("task", help="digits, cifar100, pose, or a Python file with build_model and load_data")
    add("--seeds", type=int, default=8, help="paired seeds, from 0 up; 1 gives no interval (default: 8)")
    add("--epochs", type=int, help="of every run but equal compute; default: the task's")
    add("--cycles", type=int, default=2, help="N: times the blocks run in a training step, and its cost (default: 2)")
    add("--stack", help="path of the blocks to cycle, where cyclekd does not find them by itself")
    add("--rho", type=float, nargs="*", help="self-distilled arms by scale-free weight (default: 0.3; pose: none)")
    add("--alpha", type=float, nargs="*", help="and by fixed weight of the token term (default: none; pose: 5e-6)")
    add("--supervise-only", action="store_true", help="an arm with every cycle supervised and no token term")
    add("--learning-rate", type=float, help="AdamW's peak; default: the task's, as for the next two")
    add("--weight-decay", type=float)
    add("--warmup", type=float, help="share of all steps")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=["fp32", "bf16"], help="bf16 is autocast; default: bf16 on CUDA, else fp32")
    add("--compile", action="store_true", help="torch.compile the training step's forward")
    add("--minutes", type=float, help="stop after that long, at the end of an epoch; the same call goes on later")
    add("--jobs", type=count_or_auto, help="trainings at once; auto, the default: up to 6 on CUDA, 1 on the CPU")
    add("--threads", type=int, default=1, help="CPU threads per training (default: 1)")
    add("--data", type=Path, help="cifar100: folder of parquet files, or one made by `gain.py pack`; pose: see above")
    add("--model", help="pose: the plain model, which --cycles wraps (default: tokenpose_s_v1)")
    add("--input-size", type=int, nargs=2, metavar=("H", "W"), help="pose: of the network, in pixels (default: 128 96)")
    add("--images", type=int, help="built-in tasks: train on that many images (pose: people), for a first look")
    add("--results", type=Path, default=RESULTS, help="folder of the CSV file and the figure")
    add("--work", type=Path, default=Path("runs/gain"), help="folder of checkpoints and decoded images")
    args = parser.parse_args()

    least = {"seeds": 1, "epochs": 1, "cycles": 2, "threads": 1, "images": 2, "minutes": 0, "learning_rate": 0}
    for name, smallest in (least | {"weight_decay": 0, "warmup": 0, "rho": 0, "alpha": 0}).items():
        asked = getattr(args, name)
        for value in asked if isinstance(asked, list) else [asked]:
            if value is not None and not smallest <= value < math.inf:
                option = name.replace("_", "-")
                parser.error(f"argument --{option}: needs a finite number of at least {smallest}, got {value}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: no CUDA device is there")
    if args.task in ("cifar100", "pose") and args.data is None:
        parser.error(f"argument --data: {args.task} needs the folder with its images")
    if args.task == "pose":
        args.model, args.input_size = args.model or "tokenpose_s_v1", tuple(args.input_size or (128, 96))
        args.stack = args.stack or "blocks"  # not its stem's, of which a small model has more
    elif args.model or args.input_size:
        parser.error("arguments --model, --input-size: are pose's; other tasks have a model of their own")
    return args


def count_or_auto(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a number of at least 1 or auto, got {text!r}")
    return int(text)


def settings_of(args: argparse.Namespace, task: Task) -> Settings:
    """Arguments where they were given, else the task's recipe."""
    recipe = task.recipe

    def chosen(name: str) -> float:
        given = getattr(args, name)
        return getattr(recipe, name) if given is None else given

    return Settings(
        task=task.name,
        source=task.source,
        images=args.images,
        epochs=int(chosen("epochs")),
        cycles=args.cycles,
        stack=args.stack,
        learning_rate=chosen("learning_rate"),
        weight_decay=chosen("weight_decay"),
        warmup=chosen("warmup"),
        precision=args.precision or ("bf16" if args.device == "cuda" else "fp32"),
        compiled=args.compile,
        device=args.device,
        model=args.model,
        input_size="x".join(map(str, args.input_size)) if args.input_size else None,
    )


def name_of(settings: Settings) -> str:
    parts = [*subject(settings), f"n{settings.cycles}", f"{settings.epochs}epochs"]
    parts += [f"{settings.images}images"] * (settings.images is not None)
    return "-".join([*parts, settings.device, settings.precision, *(["compiled"] * settings.compiled)])


def subject(settings: Settings) -> list[str]:
    """Task, and where it has several, model and input size."""
    return [part for part in (settings.task, settings.model, settings.input_size) if part is not None]


def digest(settings: Settings) -> str:
    """Of all settings: a checkpoint is for a run with exactly these."""
    return blake2b(repr(settings).encode(), digest_size=4).hexdigest()


def check_cycling(task: Task, settings: Settings) -> None:
    """CycleError now where the model cannot be cycled, and not after the plain runs."""
    wrap_multicycle(task.build_model(0), settings.cycles, stack=settings.stack)


def cache_of(args: argparse.Namespace) -> Path | None:
    """The decoded images of a task that needs them."""
    folder = args.work / "cache"
    if args.task == "cifar100":
        from benchmarks.experiment import cifar  # not above: torchvision, which other tasks can do without

        return cifar.decoded(args.data, folder, args.images)
    if args.task == "pose":
        from benchmarks.experiment import pose  # not above, likewise: einops

        pose.config_of(args.model, args.input_size)  # refuses a model before thousands of images are decoded
        return pose.decoded(args.data, folder, args.input_size, args.images)
    return None


def jobs_of(args: argparse.Namespace, recipe: Recipe) -> list[Job]:
    """Seed after seed, so that what a short call finishes can be compared."""
    return [Job(arm, seed) for seed in range(args.seeds) for arm in arms_of(args, recipe)]


def arms_of(args: argparse.Namespace, recipe: Recipe) -> list[Arm]:
    """Each once; a weight of 0 is the arm without a token term."""
    rhos = recipe.rho if args.rho is None else args.rho
    alphas = recipe.alpha if args.alpha is None else args.alpha
    arms = [Arm(PLAIN), Arm(EQUAL, longer=args.cycles)]
    if args.supervise_only or 0 in [*rhos, *alphas]:
        arms.append(Arm("supervised only", args.cycles, alpha=0.0))
    arms += [Arm(f"self-distilled rho {rho:g}", args.cycles, rho=rho) for rho in rhos if rho > 0]
    arms += [Arm(f"self-distilled alpha {alpha:g}", args.cycles, alpha=alpha) for alpha in alphas if alpha > 0]
    return list(dict.fromkeys(arms))


@contextmanager
def progress(plan: Plan, todo: list[Job], jobs: int) -> Iterator[Advance]:
    """One bar for all runs, counted in training passes over the data."""
    epochs = plan.settings.epochs
    left = sum(job.arm.cycles * (epochs * job.arm.longer - epochs_done(plan.work, job)) for job in todo)
    name = f"{len(todo)} runs, {min(jobs, len(todo))} at once"
    layout = "{desc}: {percentage:5.1f}% |{bar:30}| {elapsed}<{remaining}{postfix}"
    every_s = 0.1 if sys.stderr.isatty() else 30  # a log file keeps every line
    with tqdm(total=left, desc=name, bar_format=layout, mininterval=every_s, maxinterval=every_s) as bar:
        images = 0

        def advance(passes: float, more_images: int) -> None:
            nonlocal images
            images += more_images
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{images / max(elapsed, 1e-3):,.0f} images/s", refresh=False)
            bar.update(min(passes, left - bar.n))  # sums of shares end a little above or below

        yield advance


def report(results: Results, settings: Settings) -> None:
    rows = results.rows()
    if not rows:
        return
    metric = rows[0].metric
    figure = results.path.with_suffix(".png")
    draw(figure, rows, f"{', '.join(subject(settings))}, {settings.cycles} cycles, {settings.epochs} epochs", metric)
    print(LEGEND.format(metric=metric[0].upper() + metric[1:], cycles=settings.cycles))
    print_table(accuracy_table(rows))
    print()
    print_table(cost_table(rows))
    print(NOT_SHOWN)
    print(f"Wrote\n  {results.path}\n  {figure}")


def pack() -> int:
    parser = argparse.ArgumentParser(
        prog="gain.py pack", description="CIFAR-100's encoded images in two safetensors files."
    )
    parser.add_argument("data", type=Path, help="folder with train*.parquet and test*.parquet (img, fine_label)")
    parser.add_argument("out", type=Path, help="folder for train.safetensors and test.safetensors")
    args = parser.parse_args(sys.argv[2:])
    from benchmarks.experiment.cifar import pack as write_packed

    write_packed(args.data, args.out)
    print("Wrote", *sorted(args.out.glob("*.safetensors")), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
