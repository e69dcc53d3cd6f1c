"""One training, three ways: the stock Trainer, a loop around the wrapped model, a loop that repeats the blocks itself.

Same seed, same order of the data; with dropout, weight decay, clipping, a schedule, gradient accumulation and a last
batch that is smaller. After all steps every weight has to have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.matrix.repeated import make_nondegenerate, relative_error, repeat_blocks
from cyclekd import CycleLoss, wrap_multicycle

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SEED, EPOCHS, BATCH, ACCUMULATE, ROWS, RHO = 7, 2, 3, 2, 14, 0.3  # 5 batches, 3 steps per epoch
STEPS = EPOCHS * math.ceil(ROWS / BATCH / ACCUMULATE)

Batch = dict[str, Tensor]


# -- two families, and their forwards written by hand ------------------------------------------------------------


def vit(dropout: float) -> hf.PreTrainedModel:
    """The same weights at every call."""
    hf.set_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = hf.ViTConfig(**SIZE, **rates, image_size=16, patch_size=8, num_labels=3)
    return make_nondegenerate(hf.ViTForImageClassification(config))


def vit_cycles(model: Any, batch: Batch, cycles: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and summed task loss of every cycle."""
    x = model.vit.embeddings(batch["pixel_values"])
    for _ in range(cycles):
        for layer in model.vit.layers:
            x = layer(x)
        logits = model.classifier(model.vit.layernorm(x)[:, 0])
        yield x, F.cross_entropy(logits, batch["labels"], reduction="sum")
        x = x.clone()  # a node of its own: the gradients of the next cycle are summed before that of the head is added


def llama(dropout: float) -> hf.PreTrainedModel:
    hf.set_seed(0)
    config = hf.LlamaConfig(**SIZE, vocab_size=31, num_key_value_heads=1, attention_dropout=dropout)
    return make_nondegenerate(hf.LlamaForCausalLM(config))


def llama_cycles(model: Any, batch: Batch, cycles: int) -> Iterator[tuple[Tensor, Tensor]]:
    x = model.model.embed_tokens(batch["input_ids"])
    positions = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()  # the last token predicts nothing
    for _ in range(cycles):
        for layer in model.model.layers:
            x = layer(x, position_embeddings=positions)
        logits = model.lm_head(model.model.norm(x))
        yield x, F.cross_entropy(logits.flatten(0, 1), shifted, reduction="sum")
        x = x.clone()


def image_rows() -> list[dict[str, Any]]:
    images = torch.randn(ROWS, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]


def text_rows() -> list[dict[str, Any]]:
    texts = torch.randint(3, 31, (ROWS, 6), generator=torch.Generator().manual_seed(2))
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in texts]
    for i, row in enumerate(rows):
        row["labels"][: i % 4] = -100  # prompts of many lengths: every micro-batch has another number of items
    return rows


class Family(NamedTuple):
    make: Callable[[float], hf.PreTrainedModel]
    rows: Callable[[], list[dict[str, Any]]]
    cycles: Callable[[Any, Batch, int], Iterator[tuple[Tensor, Tensor]]]
    path: str
    items: Callable[[Tensor], Tensor]  # how many predictions the labels ask for


FAMILIES = {
    "vit": Family(vit, image_rows, vit_cycles, "vit.layers", lambda labels: labels.ne(-100).sum()),
    "llama": Family(llama, text_rows, llama_cycles, "model.layers", lambda labels: labels[:, 1:].ne(-100).sum()),
}


# -- three ways to train -----------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "seed": SEED,
    "num_train_epochs": EPOCHS,
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATE,
    "learning_rate": 1e-2,
    "weight_decay": 0.05,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "optim": "adamw_torch",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
}


def train_by_trainer(model: nn.Module, family: Family, folder: Path) -> None:
    args = hf.TrainingArguments(output_dir=str(folder), **SETTINGS)
    hf.Trainer(model, args, train_dataset=family.rows()).train()
    AcceleratorState._reset_state(reset_partial_state=True)


def train_by_loop(model: nn.Module, family: Family, objective: Callable[[Batch, Tensor], Tensor]) -> None:
    """What the Trainer does, spelled out; `objective` gets a micro-batch and the items of all that are accumulated."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = hf.get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    rows = family.rows()
    hf.set_seed(SEED)
    model.train()
    for epoch in range(EPOCHS):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
        batches = list(DataLoader(rows, BATCH, sampler=order, collate_fn=hf.default_data_collator))
        for start in range(0, len(batches), ACCUMULATE):
            accumulated = batches[start : start + ACCUMULATE]
            items = sum(family.items(batch["labels"]) for batch in accumulated)
            for batch in accumulated:
                objective(batch, items).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def of_the_wrapped_model(model: nn.Module) -> Callable[[Batch, Tensor], Tensor]:
    return lambda batch, items: model(**batch, num_items_in_batch=items).loss


def of_repeated_blocks(model: nn.Module, family: Family, cycles: int) -> Callable[[Batch, Tensor], Tensor]:
    def objective(batch: Batch, items: Tensor) -> Tensor:
        tokens, sums = zip(*family.cycles(model, batch, cycles), strict=True)
        return objective_by_hand(tokens, [each / items for each in sums])

    return objective


def objective_by_hand(tokens: Any, task: Any) -> Tensor:
    """The sum of all task losses, and rho of it for every cycle's tokens as far from the next cycle's as they vary."""
    task_sum = task[0]
    for loss in task[1:]:
        task_sum = task_sum + loss
    total = task_sum
    for student, teacher in pairwise(tokens):
        weight = RHO * task_sum.detach().abs() / teacher.detach().var(correction=0)
        total = total + weight * F.mse_loss(student, teacher)  # not (s - t).square().mean(): last bits of the gradient
    return total


# -- what they have to agree on ----------------------------------------------------------------------------------


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def equal(a: nn.Module, b: nn.Module) -> bool:
    """Bit for bit, every parameter."""
    return all(map(torch.equal, weights(a).values(), weights(b).values()))


@pytest.mark.parametrize("cycles", [1, 2, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_trainer_loop_and_repeated_blocks_train_the_same_bits(name: str, cycles: int, tmp_path: Path) -> None:
    family = FAMILIES[name]
    start, by_trainer, by_loop, repeated = (family.make(0.1) for _ in range(4))
    train_by_trainer(wrap_multicycle(by_trainer, cycles), family, tmp_path)
    train_by_loop(wrap_multicycle(by_loop, cycles), family, of_the_wrapped_model(by_loop))
    train_by_loop(repeated, family, of_repeated_blocks(repeated, family, cycles))
    assert equal(by_trainer, by_loop)
    assert equal(by_loop, repeated)
    assert not any(map(torch.equal, weights(repeated).values(), weights(start).values()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrapped_model_of_one_cycle_trains_the_bits_of_the_plain_one(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    plain, wrapped, two = (family.make(0.1) for _ in range(3))
    train_by_trainer(plain, family, tmp_path)
    train_by_trainer(wrap_multicycle(wrapped, 1), family, tmp_path)
    train_by_trainer(wrap_multicycle(two, 2), family, tmp_path)
    assert equal(wrapped, plain)
    assert not equal(two, plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_trainings_on_separate_longer_models_agree_up_to_rounding(name: str) -> None:
    """Each cycle from a model of its own with a longer block list: the same gradients, summed in another order."""
    family, cycles = FAMILIES[name], 3
    wrapped, separate = family.make(0.0).double(), family.make(0.0).double()
    longer = [repeat_blocks(separate, family.path, times + 1) for times in range(cycles)]
    left: list[Tensor] = []
    separate.get_submodule(family.path)[-1].register_forward_hook(lambda block, args, output: left.append(output))

    def objective(batch: Batch, items: Tensor) -> Tensor:
        tokens, task = [], []
        for model in longer:
            task.append(model(**batch, num_items_in_batch=items).loss)
            tokens.append(left[-1])
            left.clear()
        return objective_by_hand(tokens, task)

    train_by_loop(wrap_multicycle(wrapped, cycles, loss=CycleLoss(rho=RHO)), family, of_the_wrapped_model(wrapped))
    for model in longer:
        model.train()
        model.config.use_cache = False  # a layer that stands in the list twice would find its own keys there
    train_by_loop(separate, family, objective)
    # Both are doubles, but transformers computes the loss of a causal LM in fp32.
    assert relative_error(weights(wrapped), weights(separate)) < {"vit": 1e-9, "llama": 1e-6}[name]
