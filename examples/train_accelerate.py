"""A training loop written by hand with Accelerate, self-distilled: two lines are new, and they are marked below.

    python examples/train_accelerate.py --cpu                                             # 20 seconds on one core
    accelerate launch --multi_gpu --num_processes 2 examples/train_accelerate.py --cpu    # two processes on the CPU

(`accelerate launch --cpu` starts one process, whatever --num_processes says.) A small vision transformer of timm
learns the digits inside scikit-learn; nothing is downloaded. The processes share every batch, so their number changes
the result only by rounding if --alpha is given, and a little more without: rho follows each process' own part of the
batch. What is saved is an ordinary checkpoint: stock timm loads it and must reach the same accuracy.

Without --cpu the same commands use GPUs (not run). Nothing in the loop changes for FSDP2 (`--use_fsdp --fsdp_version
2`), which Accelerate offers on GPUs only. This shows how the pieces fit, not that they pay off: quickstart.py compares
with plain trainings.
"""

import argparse
import json
import math
import os
from collections import defaultdict
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import VisionTransformer
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from cyclekd import CycleLoss, cycle_report, wrap_multicycle

TRAIN_IMAGES = 1000  # the other 797 are the test set
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05


def main():
    args = parse_arguments()
    shared_batches = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    accelerator = Accelerator(cpu=args.cpu, dataloader_config=shared_batches)
    check_processes(accelerator)
    torch.set_num_threads(1)  # enough for matrices this small, and steady where other work shares the cores
    set_seed(args.seed)
    train, test = load_data()
    model = build_model()

    model = wrap_multicycle(model, cycles=args.cycles)  # <- new; before prepare
    criterion = CycleLoss(F.cross_entropy, rho=args.rho, alpha=args.alpha)  # <- new; covers all cycles

    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    loader = DataLoader(train, batch_size=args.batch, shuffle=True, drop_last=True)
    schedule = OneCycleLR(optimizer, LEARNING_RATE, total_steps=args.epochs * len(loader), pct_start=0.1)
    test_loader = DataLoader(test, batch_size=4 * args.batch)
    model, optimizer, loader, schedule, test_loader = accelerator.prepare(
        model, optimizer, loader, schedule, test_loader
    )

    epochs = []
    with tqdm(range(args.epochs), unit="epoch", disable=not accelerator.is_main_process) as bar:
        for _ in bar:
            terms = train_epoch(accelerator, model, criterion, optimizer, schedule, loader)
            accuracy = evaluate(accelerator, model, test_loader)
            epochs.append({**terms, "accuracy": accuracy})
            bar.set_postfix(loss=f"{terms['loss']:.3f}", accuracy=f"{accuracy:.4f}")
    report = cycle_report(model, test.tensors[0][:100].to(accelerator.device))
    weights = accelerator.get_state_dict(model)  # whole tensors under the base model's keys

    if accelerator.is_main_process:
        folder = new_folder(args.out)
        save_file(weights, folder / "model.safetensors")
        results = {"settings": vars(args), "processes": accelerator.num_processes, "epochs": epochs}
        (folder / "results.json").write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")
        print(f"\n{report}\n\nWrote", *sorted(folder.iterdir()), sep="\n  ")
        print(f"\nProcesses: {accelerator.num_processes}, batch: {args.batch}, epochs: {args.epochs}")
        check_in_stock_timm(accelerator, folder / "model.safetensors", test, trained=accuracy)
    accelerator.end_training()


def load_data():
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype(np.float32) / 8 - 1  # grey values 0..16 to -1..1
    split = train_test_split(images, labels, train_size=TRAIN_IMAGES, random_state=0)
    images, test_images, labels, test_labels = map(torch.from_numpy, split)
    return TensorDataset(images, labels), TensorDataset(test_images, test_labels)


def build_model():
    data = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    size = {"embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    return VisionTransformer(**data, **size, class_token=False, global_pool="avg")


def train_epoch(accelerator, model, criterion, optimizer, schedule, loader):
    """The mean of every term of the loss, over steps and processes."""
    model.train()
    sums = defaultdict(float)
    for images, labels in loader:
        parts = criterion(model(images), labels)
        accelerator.backward(parts.total)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for name, value in parts.logs().items():
            sums[name] += value / len(loader)
    return {name: value.item() for name, value in accelerator.reduce(dict(sums), "mean").items()}


@torch.no_grad()
def evaluate(accelerator, model, loader):
    """Accuracy of one pass: in evaluation the wrapped model is the base model."""
    model.eval()
    right = []
    for images, labels in loader:
        right.append(accelerator.gather_for_metrics(model(images).argmax(-1) == labels))
    return torch.cat(right).double().mean().item()


@torch.no_grad()
def check_in_stock_timm(accelerator, path, test, trained):
    """A stock model that gets nothing but the saved file reaches the accuracy of the trained one."""
    stock = build_model().to(accelerator.device).eval()
    stock.load_state_dict(load_file(path), strict=True)
    images, labels = (tensor.to(accelerator.device) for tensor in test.tensors)
    with accelerator.autocast():
        reloaded = (stock(images).argmax(-1) == labels).double().mean().item()
    print(f"Test accuracy, one pass: {trained:.4f} when trained, {reloaded:.4f} in stock timm.")
    if abs(reloaded - trained) > 0.005:  # other batches may turn a close call
        raise SystemExit("error: the checkpoint does not give the accuracy of the trained model")


def check_processes(accelerator):
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise SystemExit(f"error: {started} processes were started; without a GPU each would train alone: add --cpu")


def parse_arguments():
    layout = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=layout)
    add = parser.add_argument
    add("--epochs", type=int, default=20, help=f"passes over the {TRAIN_IMAGES:,} training images")
    add("--batch", type=int, default=32, help="images per step, of all processes together")
    add("--cycles", type=int, default=2, help="times the blocks run per training step, and its cost")
    add("--rho", type=float, default=0.3, help="token term as a share of the task loss; 0.3 to 1 did well")
    add("--alpha", type=float, help="fixed token weight instead of rho; the same for any number of processes")
    add("--seed", type=int, default=0, help="of the weights and of the order of the images")
    add("--cpu", action="store_true", help="leave GPUs alone; several processes without a GPU need it")
    add("--out", type=Path, default="runs/train_accelerate", help="folder; if it has files, OUT-2, OUT-3, ...")
    args = parser.parse_args()
    for name, least in {"epochs": 1, "batch": 1, "cycles": 2, "rho": 0, "alpha": 0, "seed": 0}.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            parser.error(f"argument --{name}: needs a finite number of at least {least}, got {value}")
    if args.batch > TRAIN_IMAGES:
        parser.error(f"argument --batch: there are {TRAIN_IMAGES} images, got {args.batch}")
    return args


def new_folder(wanted):
    """`wanted` if nothing is in it yet, else the first numbered folder beside it of which that is true."""
    numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in count(2))
    folder = next(path for path in chain([wanted], numbered) if not path.exists() or not any(path.iterdir()))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
