"""A Hugging Face classifier, self-distilled by the stock Trainer: one line is new, and it is marked below.

    python examples/wrap_hf.py   # a quarter of a minute on one CPU core; nothing is downloaded

A tiny ViT is built from a config, with random weights, and trained on the digits inside scikit-learn. What
it saves is an ordinary checkpoint: a stock ViTForImageClassification loads it and must reach the same
accuracy. A callback, which you may copy, logs every term of the loss. This shows how the pieces fit, not
that they pay off: quickstart.py compares with plain trainings.
"""

import argparse
from collections import defaultdict
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from cyclekd import CycleLoss, cycle_report, wrap_multicycle


def main():
    args = parse_arguments()
    torch.set_num_threads(1)  # enough for matrices this small, and steady where other work shares the cores

    # Data: three parts, so that the best epoch is chosen on other images than it is judged by.
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype(np.float32) / 8 - 1  # grey values 0..16 to -1..1
    digits = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    train, rest = train_test_split(digits, train_size=1000, random_state=0)
    validation, test = train_test_split(rest, train_size=397, random_state=0)

    # Model: `from_pretrained(...)` goes here just as well.
    set_seed(0)
    data = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = ViTForImageClassification(ViTConfig(**data, **size))

    # The new line: the model's loss now covers all cycles. Without `loss` it is CycleLoss() as well; here it
    # has a name for the callback.
    criterion = CycleLoss()
    model = wrap_multicycle(model, cycles=args.cycles, loss=criterion)

    # Training: the Trainer as ever. While it evaluates, the model is the base model, one pass. For a loss other
    # than the model's own, criterion = CycleLoss(your_loss), give the Trainer one argument more:
    #     compute_loss_func=lambda out, y, **k: criterion(out, y).total
    # divided by gradient_accumulation_steps if there are any: the Trainer leaves that to such a function.
    settings = TrainingArguments(
        output_dir=args.out / "checkpoints",
        num_train_epochs=args.epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=400,
        learning_rate=3e-3,
        weight_decay=0.05,
        warmup_steps=32,  # one epoch
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="best",
        save_total_limit=1,
        metric_for_best_model="accuracy",
        logging_strategy="epoch",
        report_to="none",  # or "tensorboard", "wandb", ...: they get the terms too
        use_cpu=True,  # quickest for a model this small
    )
    trainer = Trainer(model, settings, train_dataset=train, eval_dataset=validation, compute_metrics=accuracy)
    trainer.callback_handler.callbacks.insert(0, LossTerms(criterion))  # add_callback would put it behind the trackers
    trainer.train()

    # The Trainer's checkpoints are ordinary ones as well. `load_best_model_at_end` does not fetch the best
    # here: in transformers 5.23 it skips the blocks of a ViT, wrapped or not, because saving renames their
    # keys.
    best = ViTForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    model.load_state_dict(best.state_dict())
    trained = trainer.evaluate(test)["eval_accuracy"]
    print(cycle_report(model, **trainer.data_collator(test)))

    # Deployment: save_pretrained writes the base model's keys and config, which load without cyclekd.
    model.save_pretrained(args.out / "model")
    stock = ViTForImageClassification.from_pretrained(args.out / "model")
    stock_trainer = Trainer(stock, settings, eval_dataset=test, compute_metrics=accuracy)
    reloaded = stock_trainer.evaluate()["eval_accuracy"]
    print(f"Test accuracy, one pass: {trained:.4f} when trained, {reloaded:.4f} in stock transformers.")
    print("Wrote", *sorted(args.out.iterdir()), sep="\n  ")
    if reloaded != trained:
        raise SystemExit("error: the checkpoint does not give the accuracy of the trained model")


class LossTerms(TrainerCallback):
    """Puts the mean of every loss term since the last log into the Trainer's own logs; no step waits for a device.

    Of the training alone, and of the first process where there are several.
    """

    def __init__(self, criterion):
        self.sums, self.shares = defaultdict(float), 0.0
        criterion.register_forward_hook(self.keep, with_kwargs=True)

    def keep(self, criterion, args, kwargs, parts):
        if not parts.total.requires_grad:  # an evaluation
            return
        share = kwargs.get("batch_share", 1.0)  # of the accumulated batch, by which all but the distances are scaled
        self.shares += share
        for name, term in parts.logs().items():
            self.sums[name] += term * share if name.startswith("mse") else term

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs and self.sums:
            terms = {name: float(total / self.shares) for name, total in self.sums.items() if name != "loss"}
            logs.update(terms)  # for the callbacks after this one: trackers, the progress bar
            state.log_history[-1].update(terms)
            self.sums, self.shares = defaultdict(float), 0.0


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def parse_arguments():
    layout = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=layout)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the 1,000 training images")
    parser.add_argument("--cycles", type=int, default=2, help="times the blocks run per training step")
    parser.add_argument("--out", type=Path, default="runs/wrap_hf", help="folder; if it has files, OUT-2, ...")
    args = parser.parse_args()
    for name, least in {"epochs": 1, "cycles": 2}.items():
        if getattr(args, name) < least:
            parser.error(f"argument --{name}: needs at least {least}, got {getattr(args, name)}")
    folders = chain([args.out], (args.out.with_name(f"{args.out.name}-{number}") for number in count(2)))
    args.out = next(path for path in folders if not path.exists() or (path.is_dir() and not any(path.iterdir())))
    return args


if __name__ == "__main__":
    main()
