"""Three schedules of self-distillation, each of them one line in an ordinary training loop (see `follow`).

    python examples/schedules.py --schedule ramp     # from one cycle to --cycles, equally long with each
    python examples/schedules.py --schedule random   # a number from 1 to --cycles, drawn anew for every step
    python examples/schedules.py --schedule weight   # all cycles in every step, the token weight from 0 to --rho

Trains a small timm vision transformer on scikit-learn's digits, a quarter of a minute on one CPU core;
nothing is downloaded. Saves what every step did as a table and a plot.

This shows how to write a schedule. It does not show which is best, or that one pays off: one seed, no plain
training beside it, and the three differ in how much they compute. quickstart.py makes such a comparison.
"""

import argparse
import csv
import random
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import VisionTransformer
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from cyclekd import CycleLoss, set_cycles, wrap_multicycle


def follow(schedule, done, model, criterion, args, draw):
    """Set up one step; `done` is the part of the training that is over, from 0 to just under 1."""
    if schedule == "ramp":
        set_cycles(model, 1 + int(args.cycles * done))
    elif schedule == "random":
        set_cycles(model, draw.randint(1, args.cycles))  # under DDP draw from one seed in every process
    else:
        criterion.rho = args.rho * done  # or criterion.alpha, if that is what it was made with


def main():
    args = parse_arguments()
    torch.set_num_threads(1)  # enough for matrices this small, and steady where other work shares the cores
    torch.manual_seed(args.seed)
    train_set, test_set = digits()
    model = wrap_multicycle(tiny_vit(), cycles=args.cycles)
    steps = train(model, train_set, args)
    model.eval()
    with torch.no_grad():
        images, labels = test_set.tensors
        accuracy = 100 * (model(images).argmax(-1) == labels).double().mean().item()

    with (args.out / "steps.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, steps[0])
        table.writeheader()
        table.writerows(steps)
    draw_steps(args.out / "steps.png", steps, args.schedule)
    passes = np.mean([step["cycles"] for step in steps])
    print(f"Schedule {args.schedule}: {passes:.2f} passes through the blocks per step, mean of {len(steps)} steps.")
    print(f"Test accuracy, one pass: {accuracy:.2f} %. One seed: it ranks no schedule.")
    print("Wrote", *sorted(args.out.iterdir()), sep="\n  ")


def digits():
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype(np.float32) / 8 - 1  # grey values 0..16 to -1..1
    split = train_test_split(images, labels, train_size=1000, random_state=0)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, split)
    return TensorDataset(train_images, train_labels), TensorDataset(test_images, test_labels)


def tiny_vit():
    data = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    size = {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    return VisionTransformer(**data, **size, class_token=False, global_pool="avg")


def train(model, train_set, args):
    """Train `model` in place; the result is one row per step."""
    loader = DataLoader(train_set, batch_size=32, shuffle=True)
    criterion = CycleLoss(F.cross_entropy, rho=args.rho)
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    draw, rows, steps = random.Random(args.seed), [], args.epochs * len(loader)
    with tqdm(total=steps, unit="step") as bar:
        for images, labels in chain.from_iterable(loader for _ in range(args.epochs)):
            follow(args.schedule, len(rows) / steps, model, criterion, args, draw)
            output = model(images)
            parts = criterion(output, labels)
            parts.total.backward()
            optimizer.step()
            optimizer.zero_grad()
            terms = {"first task loss": parts.task[0].item(), "token term": parts.tokens.sum().item()}
            rows.append({"step": len(rows) + 1, "cycles": len(output.outputs), "rho": criterion.rho, **terms})
            bar.set_postfix(cycles=len(output.outputs), rho=f"{criterion.rho:.2f}", refresh=False)
            bar.update()
    return rows


def draw_steps(path, rows, schedule):
    """What the schedule set, and what the loss did, step by step."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    drawn = {"cycles": "C0", "rho": "C1", "first task loss": "C2", "token term": "C3"}
    for axes, (name, color) in zip(figure.subplots(4, sharex=True), drawn.items(), strict=True):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], ".", color=color, markersize=3)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(f"Schedule: {schedule}")
    axes.set_xlabel("step")
    figure.savefig(path, dpi=150)


def parse_arguments():
    layout = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=layout)
    add = parser.add_argument
    add("--schedule", choices=["ramp", "random", "weight"], default="ramp", help="what changes from step to step")
    add("--epochs", type=int, default=15, help="passes over the 1,000 training images")
    add("--cycles", type=int, default=3, help="most times that the blocks run in a step")
    add("--rho", type=float, default=0.3, help="token term as a share of the task loss; with `weight`, at the end")
    add("--seed", type=int, default=0, help="of the weights, the order of the images and the drawn numbers")
    add("--out", type=Path, default="runs/schedules", help="folder; if it has files, OUT-2, OUT-3, ...")
    args = parser.parse_args()
    for name, least in {"epochs": 1, "cycles": 2, "rho": 0}.items():
        if not least <= getattr(args, name) < float("inf"):
            parser.error(f"argument --{name}: needs a finite number of at least {least}, got {getattr(args, name)}")
    folders = chain([args.out], (args.out.with_name(f"{args.out.name}-{number}") for number in count(2)))
    args.out = next(path for path in folders if not path.exists() or (path.is_dir() and not any(path.iterdir())))
    args.out.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
