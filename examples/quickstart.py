"""Self-distillation on real handwritten digits, beside the two trainings it has to be compared with.

    python examples/quickstart.py                        # 8 paired seeds, 3 minutes on one CPU core
    python examples/quickstart.py --seeds 2 --epochs 5   # a first look, 20 seconds

Three runs per seed start from the same weights and see the same images in the same order: a plain vision
transformer; the same one trained N times as long (equal compute); and one whose blocks run N times in every
training step while each cycle learns from the next. The third ends up as small and as fast as the first:
its weights are saved as an ordinary checkpoint and loaded into stock timm. Nothing is downloaded: the 1,797
scans of digits come with scikit-learn.
"""

import argparse
import csv
import json
import math
import random
from collections import defaultdict
from functools import partial
from itertools import chain, count, pairwise
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import VisionTransformer
from timm.scheduler import CosineLRScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cyclekd import CycleLoss, CycleOutput, run_cycles, unwrap_multicycle, wrap_multicycle

TRAIN_IMAGES, BATCH = 300, 32  # few enough to leave room for a gain; the other 1,497 images are the test set
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05
CURVE_POINTS, TIMING_ROUNDS = 20, 60
PLAIN, LONGER, DISTILLED = "plain", "equal compute", "self-distilled"
COLORS = {PLAIN: "#767676", LONGER: "#d55e00", DISTILLED: "#0072b2"}

LEGEND = """
Test accuracy in percent, mean over paired seeds; ± is the 95% t-interval of a paired difference, [ ] the 95%
bootstrap interval of a median over timing rounds.
"""
NOT_SHOWN = """
What this does not show: 300 images of 8 x 8 pixels and a model of 40 thousand weights say little about
yours. The setting and rho were chosen where an effect is visible, partly on such seeds, so the intervals
are too kind. Often there is no clear difference from equal compute: read that row first. Nothing here
speaks of large models trained to convergence. Step times at this size need not carry over. Measure on your
own model.
"""


def main():
    args = parse_arguments()
    # Measured: a second thread gains little on matrices this small, and was ten times slower on busy cores.
    torch.set_num_threads(1)
    longer = args.epochs * args.cycles
    runs = {PLAIN: (args.epochs, 1), LONGER: (longer, 1), DISTILLED: (args.epochs, args.cycles)}
    curves = {name: [] for name in runs}  # one curve per seed
    with tqdm(total=args.seeds * (args.epochs + 2 * longer) + TIMING_ROUNDS, unit="pass", smoothing=0) as bar:
        for seed in range(args.seeds):
            digits = load_split(seed, args.device)
            for name, (epochs, cycles) in runs.items():
                bar.set_description(f"seed {seed + 1} of {args.seeds}, {name}")
                model = build_model(seed, args.device)
                curves[name].append(train(model, digits, epochs, cycles, seed, args, bar))
            if seed == 0:
                first_model, first_digits = model, digits  # the model of the last run: self-distilled
        bar.set_description("timing training steps")
        cost = measure_cost(first_digits, args, bar)

    folder, trained = args.out, curves[DISTILLED][0]["one_pass"][-1]
    reloaded = save_and_reload(first_model, folder / "self-distilled.safetensors", first_digits, args.device)
    table = result_table(curves, cost, args)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
    everything = {"settings": vars(args), "curves": curves, "cost": cost, "reloaded_accuracy": reloaded}
    (folder / "results.json").write_text(json.dumps(everything, indent=1, default=str), encoding="utf-8")
    draw(folder / "curves.png", curves, args.cycles)

    print(LEGEND)
    for row in table:
        print("{:32}{:>9}{:>27}{:>27}".format(*row))
    print("\nWrote", *sorted(folder.iterdir()), sep="\n  ")
    print(f"\nSeed 0, self-distilled: {trained:.4f} when trained, {reloaded:.4f} reloaded into stock timm.")
    print(NOT_SHOWN)
    if reloaded != trained:
        raise SystemExit("error: the checkpoint does not give the accuracy of the trained model")


def load_split(seed, device):
    """Training images and labels, test images and labels: a random split, the same for all runs of a seed."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype(np.float32) / 8 - 1  # grey values 0..16 to -1..1
    split = train_test_split(images, labels, train_size=TRAIN_IMAGES, random_state=seed)
    images, test_images, labels, test_labels = (torch.from_numpy(part).to(device) for part in split)
    return images, labels, test_images, test_labels


def build_model(seed, device):
    torch.manual_seed(seed)
    data = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    size = {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    model = VisionTransformer(**data, **size, class_token=False, global_pool="avg")
    with torch.no_grad():
        model.pos_embed *= 25  # timm's scale is for long trainings: 40 epochs end at 74% with it, at 89% so
    return model.to(device)


def train(model, digits, epochs, cycles, seed, args, bar):
    """Train `model` in place, plainly where `cycles` is 1; the result is its curve."""
    images, labels, *test = digits
    order = torch.Generator().manual_seed(seed)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * math.ceil(TRAIN_IMAGES / BATCH)
    warmup = {"warmup_t": steps // 10, "warmup_lr_init": LEARNING_RATE / 100}
    schedule = CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False, **warmup)

    loss = F.cross_entropy
    if cycles > 1:  # all that self-distillation adds to a training script
        wrap_multicycle(model, cycles=cycles)
        loss = cycle_loss(args)

    curve, step = defaultdict(list), 0
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(TRAIN_IMAGES, generator=order).split(BATCH):
            training_step(optimizer, model, loss, images[batch], labels[batch])
            schedule.step_update(step := step + 1)
        if epoch % max(1, epochs // CURVE_POINTS) == 0 or epoch == epochs:
            for name, value in evaluate(model, *test, cycles).items():
                curve[name].append(value)
            curve["passes"].append(epoch * cycles)
        bar.update(cycles)
    return curve


def cycle_loss(args):
    criterion = CycleLoss(F.cross_entropy, rho=args.rho, alpha=args.alpha)
    return lambda outputs, labels: criterion(outputs, labels).total


def training_step(optimizer, forward, loss, images, labels):
    optimizer.zero_grad()
    loss(forward(images), labels).backward()
    optimizer.step()


@torch.no_grad()
def evaluate(model, images, labels, cycles):
    """Accuracy of one pass; if wrapped, also of all cycles, and how far each further one moves the tokens."""
    model.eval()
    values = {"one_pass": accuracy(model(images), labels)}
    if cycles > 1:
        every = run_cycles(model, images)
        values["all_cycles"] = accuracy(every.outputs[-1], labels)
        for cycle, (tokens, moved) in enumerate(pairwise(every.tokens), start=1):
            distance = (tokens - moved).square().sum() / moved.square().sum()
            values[f"cycle {cycle} to {cycle + 1}"] = distance.item()
    model.train()
    return values


def accuracy(logits, labels):
    return 100 * (logits.argmax(-1) == labels).double().mean().item()


def save_and_reload(model, path, digits, device):
    """Accuracy of a stock timm model that gets nothing but the saved file."""
    save_file(unwrap_multicycle(model).state_dict(), path)
    stock = build_model(seed=1, device=device)
    stock.load_state_dict(load_file(path, device=device), strict=True)
    return evaluate(stock, *digits[2:], cycles=1)["one_pass"]


def measure_cost(digits, args, bar):
    """Seconds and FLOPs of a training step: plain, wrapped, and as written by hand for this one model.

    The three take turns in every round, so that whatever else the machine does meets all of them alike.
    """
    batch = digits[0][:BATCH], digits[1][:BATCH]
    plain, by_hand, wrapped = (build_model(0, args.device) for _ in range(3))
    wrap_multicycle(wrapped, cycles=args.cycles)
    loop = partial(hand_written_loop, by_hand, args.cycles)
    steps = {
        "plain": repeatable_step(plain, plain, F.cross_entropy, batch),
        "by hand": repeatable_step(by_hand, loop, cycle_loss(args), batch),
        "wrapped": repeatable_step(wrapped, wrapped, cycle_loss(args), batch),
    }
    flops = {name: count_flops(step) for name, step in steps.items()}
    seconds, turns = defaultdict(list), random.Random(0)
    for _ in range(TIMING_ROUNDS):
        for name in turns.sample(sorted(steps), len(steps)):
            seconds[name].append(time_of(steps[name]))
        bar.update()

    deployed = {PLAIN: plain.eval(), DISTILLED: wrapped.eval()}
    macs = {name: count_flops(partial(model, batch[0][:1])) // 2 for name, model in deployed.items()}
    macs["all"] = count_flops(partial(run_cycles, wrapped, batch[0][:1])) // 2
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in deployed.items()}
    return {"seconds": seconds, "flops": flops, "macs": macs, "parameters": parameters}


def hand_written_loop(model, cycles, images):
    """The least it can cost: one stem, then blocks and head once per cycle, with no wrapper in between."""
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    outputs, states = [], []
    for _ in range(cycles):
        tokens = model.blocks(tokens)
        outputs.append(model.forward_head(model.norm(tokens)))
        states.append(tokens)
    return CycleOutput(None, tuple(outputs), tuple(states))


def repeatable_step(model, forward, loss, batch):
    """A training step at rate 0, so that every repetition does the same arithmetic."""
    return partial(training_step, AdamW(model.parameters(), lr=0.0), forward, loss, *batch)


def count_flops(function):
    # the counter skips fused attention on CPU; unfused, it is matrix products like the rest
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def time_of(step, repeats=3):
    start = perf_counter()
    for _ in range(repeats):
        step()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return (perf_counter() - start) / repeats


def result_table(curves, cost, args):
    """One measure per row, one run per column."""
    runs = (PLAIN, LONGER, DISTILLED)
    plain, longer, one = ([curve["one_pass"][-1] for curve in curves[name]] for name in runs)
    every = [curve["all_cycles"][-1] for curve in curves[DISTILLED]]
    seconds, flops, macs, parameters = (cost[key] for key in ("seconds", "flops", "macs", "parameters"))
    cycles, passes = f"all {args.cycles} cycles", args.epochs * args.cycles
    return [
        ["measure", *runs],
        ["training passes over the images", args.epochs, passes, passes],
        ["accuracy, one pass", *(f"{np.mean(values):.2f}" for values in (plain, longer, one))],
        [f"accuracy, {cycles}", "", "", f"{np.mean(every):.2f}"],
        ["one pass minus plain", "", difference(longer, plain), difference(one, plain)],
        ["one pass minus equal compute", "", "", difference(one, longer)],
        [f"{cycles} minus plain", "", "", difference(every, plain)],
        [f"{cycles} minus equal compute", "", "", difference(every, longer)],
        ["parameters", *(f"{parameters[name]:,}" for name in (PLAIN, PLAIN, DISTILLED))],
        ["MACs per image, one pass", *(f"{macs[name]:,}" for name in (PLAIN, PLAIN, DISTILLED))],
        [f"MACs per image, {cycles}", "", "", f"{macs['all']:,}"],
        ["step time / plain", "1", "1", ratio(seconds["wrapped"], seconds["plain"])],
        ["step time / hand-written loop", "", "", ratio(seconds["wrapped"], seconds["by hand"])],
        ["step FLOPs / plain", "1", "1", f"{flops['wrapped'] / flops['plain']:.3f}"],
        ["step FLOPs / hand-written loop", "", "", f"{flops['wrapped'] / flops['by hand']:.3f}"],
    ]


def difference(values, others):
    """Mean of the paired differences and its 95% t-interval."""
    paired = np.subtract(values, others)
    if len(paired) < 2:
        return f"{paired[0]:+.2f} n/a (needs 2 seeds)"
    return f"{paired.mean():+.2f} ± {stats.t.ppf(0.975, len(paired) - 1) * stats.sem(paired):.2f}"


def ratio(seconds, others):
    """Median of the paired ratios and its 95% bootstrap interval."""
    paired = np.divide(seconds, others)
    resampled = np.random.default_rng(0).choice(paired, (2000, len(paired)))
    low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
    return f"{np.median(paired):.2f} [{low:.2f}, {high:.2f}]"


def draw(path, curves, cycles):
    """Left: accuracy over compute. Right: how far further cycles move the tokens."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    finals = [draw_line(left, of_run, "one_pass", COLORS[name], name) for name, of_run in curves.items()]
    distilled = curves[DISTILLED]
    draw_line(left, distilled, "all_cycles", COLORS[DISTILLED], f"the same, all {cycles} cycles run", ":")
    for number, pair in enumerate(name for name in distilled[0] if name.startswith("cycle ")):
        draw_line(right, distilled, pair, f"C{number}", pair)
    seeds = f"mean and standard deviation of {len(distilled)} seeds"
    left.set(title=f"Digits, {TRAIN_IMAGES} training images, {seeds}", ylabel="test accuracy, %")
    left.set_ylim(min(finals) - 12, max(finals) + 4)  # the start is alike for all and would flatten the rest
    right.set(title="How far a cycle still moves the tokens", ylabel="relative squared distance")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("compute, passes over the training images")
        axes.set_xlim(left=0)
        axes.legend(loc="lower right", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def draw_line(axes, of_run, value, color, label, style="-"):
    """Mean over seeds as a line, one standard deviation as a band; the result is the last mean."""
    passes, values = of_run[0]["passes"], np.array([curve[value] for curve in of_run])
    mean, spread = values.mean(axis=0), values.std(axis=0)
    axes.plot(passes, mean, style, color=color, label=label, linewidth=2)
    axes.fill_between(passes, mean - spread, mean + spread, color=color, alpha=0.12, linewidth=0)
    return mean[-1]


def parse_arguments():
    layout = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=layout)
    add = parser.add_argument
    add("--seeds", type=int, default=8, help="paired seeds, from 0 up; 1 gives no interval")
    add("--epochs", type=int, default=40, help="epochs of the plain and the self-distilled run")
    add("--cycles", type=int, default=2, help="times the blocks run per training step, and its cost")
    add("--rho", type=float, default=0.3, help="token term as a share of the task loss; 0.3 to 1 did well")
    add("--alpha", type=float, help="fixed token weight instead of rho; follows no change of scale")
    add("--device", default="cpu", help="a model this small gains nothing from a GPU")
    add("--out", type=Path, default="runs/quickstart", help="folder; if it has files, OUT-2, OUT-3, ...")
    args = parser.parse_args()

    for name, least in {"seeds": 1, "epochs": 1, "cycles": 2, "rho": 0, "alpha": 0}.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            parser.error(f"argument --{name}: needs a finite number of at least {least}, got {value}")
    try:
        torch.empty(1, device=args.device)
        args.out = new_folder(args.out)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {args.device!r} does not work here: {str(error).splitlines()[0]}")
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return args


def new_folder(wanted):
    """`wanted` if nothing is in it yet, else the first numbered folder beside it of which that is true."""
    numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in count(2))
    folder = next(path for path in chain([wanted], numbered) if not path.exists() or not any(path.iterdir()))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
