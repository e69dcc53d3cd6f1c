"""The stock Hugging Face Trainer on wrapped models: what it optimises, evaluates, saves and refuses.

Weights are doubles and the optimiser is plain SGD, so that one step's change of the weights is the gradient that
the Trainer arrived at, to many more digits than the tolerances ask for.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from benchmarks.matrix.repeated import make_nondegenerate
from cyclekd import CycleError, CycleLoss, CycleOutput, run_cycles, set_cycles, unwrap_multicycle, wrap_multicycle
from examples.wrap_hf import LossTerms

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True, scope="module")
def quick_garbage_collection() -> Iterator[None]:
    """Every Trainer collects garbage when it is done, most of its time here: what is imported need not be looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# -- tiny models and data ------------------------------------------------------------------------------------


def seeded(model_class: type[hf.PreTrainedModel], config: hf.PretrainedConfig) -> hf.PreTrainedModel:
    """The same weights at every call, and no dropout."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_nondegenerate(model_class(config))


def vit() -> hf.PreTrainedModel:
    config = hf.ViTConfig(**SIZE, image_size=16, patch_size=8, num_labels=3)
    return seeded(hf.ViTForImageClassification, config)


def convnext() -> hf.PreTrainedModel:
    config = hf.ConvNextConfig(num_stages=2, depths=[1, 3], hidden_sizes=[8, 16], patch_size=2, num_labels=3)
    return seeded(hf.ConvNextForImageClassification, config)


def gpt2() -> hf.PreTrainedModel:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = hf.GPT2Config(vocab_size=31, n_positions=32, n_embd=16, n_layer=2, n_head=2, **ids)
    return seeded(hf.GPT2LMHeadModel, config)


def llama() -> hf.PreTrainedModel:
    config = hf.LlamaConfig(**SIZE, vocab_size=31, max_position_embeddings=32, num_key_value_heads=1)
    return seeded(hf.LlamaForCausalLM, config)


def llama_named_as_a_generator() -> hf.PreTrainedModel:
    """The loss of LLaVA and its like: shifted as a causal LM's, under another name."""
    model = llama()
    model.loss_type = "ForConditionalGeneration"
    return model


def swin() -> hf.PreTrainedModel:
    config = hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=(1, 3), num_heads=(1, 2), window_size=2, num_labels=3
    )
    return seeded(hf.SwinForImageClassification, config)


def bert() -> hf.PreTrainedModel:
    config = hf.BertConfig(**SIZE, vocab_size=31, max_position_embeddings=32)
    return seeded(hf.BertForSequenceClassification, config)


def image_rows(count: int = 8, dtype: torch.dtype = torch.float64) -> Rows:
    draw = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, 16, 16, generator=draw, dtype=dtype)
    return [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]


def text_rows(count: int = 8) -> Rows:
    draw = torch.Generator().manual_seed(2)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 31, (count, 6), generator=draw)]


def sentence_rows() -> Rows:
    return [{**row, "labels": i % 2} for i, row in enumerate(text_rows())]


def whole_batch(rows: Rows) -> dict[str, Tensor]:
    return hf.default_data_collator(rows)


FAMILIES: dict[str, tuple[Callable[[], hf.PreTrainedModel], Callable[[], Rows]]] = {
    "vit": (vit, image_rows),
    "convnext": (convnext, image_rows),
    "gpt2": (gpt2, text_rows),
    "llama": (llama, text_rows),
    "llama_named_as_a_generator": (llama_named_as_a_generator, text_rows),
}


def trainer(model: nn.Module, rows: Rows, folder: Path, more: dict[str, Any] | None = None, **args: Any) -> hf.Trainer:
    """A stock Trainer that makes one step of SGD over the rows in order; `more` goes to the Trainer itself."""
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        **args,
    }
    return hf.Trainer(model=model, args=hf.TrainingArguments(**options), train_dataset=rows, **(more or {}))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def change(model: nn.Module, rows: Rows, folder: Path, batch: int, accumulate: int, **more: Any) -> Tensor:
    """What one optimiser step of the Trainer adds to all weights."""
    model.double()
    before = weights(model)
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
    run = trainer(model, rows, folder, more.get("more"), **sizes)
    if "loss_is_scaled_for_ga" in more:
        run.loss_is_scaled_for_ga = more["loss_is_scaled_for_ga"]
    run.train()
    return weights(model) - before


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# -- gradient accumulation -----------------------------------------------------------------------------------

OBJECTIVES = {
    "whole_objective": lambda: CycleLoss(alpha=0.5),
    "token_term_alone": lambda: CycleLoss(alpha=0.5, cycle_weights=[0.0, 0.0]),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_with_4x2_accumulation_equals_1x8(family: str, objective: str, tmp_path: Path) -> None:
    make, rows = FAMILIES[family]

    def step(batch: int, accumulate: int) -> Tensor:
        model = wrap_multicycle(make(), loss=OBJECTIVES[objective]())
        return change(model, rows(), tmp_path, batch, accumulate)

    assert distance(step(2, 4), step(8, 1)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_term_of_an_undivided_batch_is_the_plain_mean(family: str, tmp_path: Path) -> None:
    """Whatever the Trainer counts as items: a batch that is not accumulated has the weight that alpha says."""
    make, rows = FAMILIES[family]
    loss = OBJECTIVES["token_term_alone"]
    found = change(wrap_multicycle(make(), loss=loss()), rows(), tmp_path, 8, 1)

    model = wrap_multicycle(make(), loss=loss()).double().train()
    before = weights(model)
    model(**whole_batch(rows())).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert distance(found, weights(model) - before) < 1e-5


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_the_token_term_has_a_visible_part_in_the_update(family: str, tmp_path: Path) -> None:
    make, rows = FAMILIES[family]
    with_tokens, without = (
        change(wrap_multicycle(make(), loss=CycleLoss(alpha=alpha)), rows(), tmp_path, 8, 1) for alpha in (0.5, 0.0)
    )
    assert distance(with_tokens, without) > 0.05


def test_the_families_cover_models_with_and_without_num_items_in_batch(tmp_path: Path) -> None:
    accepts = {
        name: trainer(make(), rows(), tmp_path).model_accepts_loss_kwargs for name, (make, rows) in FAMILIES.items()
    }
    assert accepts.pop("convnext") is False
    assert all(accepts.values())


@pytest.mark.parametrize("family", ["vit", "convnext", "gpt2", "llama"])
def test_four_identical_micro_batches_equal_one_with_the_scale_free_weight(family: str, tmp_path: Path) -> None:
    make, rows = FAMILIES[family]
    two = rows()[:2]
    four_times = change(wrap_multicycle(make()), two * 4, tmp_path, 2, 4)
    once = change(wrap_multicycle(make()), two, tmp_path, 2, 1)
    assert distance(four_times, once) < 1e-5


# -- evaluation, checkpoints, columns, precision -------------------------------------------------------------


def accuracy(prediction: hf.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_trainer_evaluates_the_plain_model_with_compute_metrics(tmp_path: Path) -> None:
    rows = image_rows(dtype=torch.float32)
    model = wrap_multicycle(vit())
    run = trainer(model, rows, tmp_path, {"eval_dataset": rows, "compute_metrics": accuracy}, max_steps=3)
    run.train()
    found = run.evaluate()
    plain = unwrap_multicycle(model).eval()(**whole_batch(rows))
    assert found["eval_loss"] == pytest.approx(plain.loss.item(), rel=1e-5)
    expected = (plain.logits.argmax(-1) == whole_batch(rows)["labels"]).double().mean().item()
    assert found["eval_accuracy"] == pytest.approx(expected)


def test_evaluating_between_the_steps_shows_the_plain_model_and_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    rows = image_rows(dtype=torch.float32)
    undisturbed, evaluated = wrap_multicycle(vit()), wrap_multicycle(vit())
    trainer(undisturbed, rows, tmp_path, max_steps=3).train()
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    more = {"eval_dataset": rows, "compute_metrics": accuracy}
    run = trainer(evaluated, rows, tmp_path, more, max_steps=3, per_device_eval_batch_size=3, **every_step)
    run.train()
    assert torch.equal(weights(evaluated), weights(undisturbed))
    for step, log in enumerate((log for log in run.state.log_history if "eval_loss" in log), start=1):
        plain = hf.ViTForImageClassification.from_pretrained(tmp_path / f"checkpoint-{step}")
        expected = trainer(plain, rows, tmp_path, more, per_device_eval_batch_size=3).evaluate()
        assert (log["eval_loss"], log["eval_accuracy"]) == (expected["eval_loss"], expected["eval_accuracy"])


def test_trainer_predicts_one_row_of_logits_per_image(tmp_path: Path) -> None:
    rows = image_rows(dtype=torch.float32)
    model = vit()
    expected = model.eval()(**whole_batch(rows)).logits.detach()
    found = trainer(wrap_multicycle(model), rows, tmp_path).predict(rows)
    torch.testing.assert_close(torch.as_tensor(found.predictions), expected)


# Not a ViT: transformers 5.23 renames its keys on saving, and then finds no block of a plain one either (see below).
@pytest.mark.parametrize("family", ["convnext", "bert"])
def test_trainer_loads_the_best_checkpoint_into_the_wrapped_model(family: str, tmp_path: Path) -> None:
    make, rows = {**FAMILIES, "bert": (bert, sentence_rows)}[family]
    scores = iter([1.0, 0.5, 0.25])  # the first evaluation is the best
    model = wrap_multicycle(make())
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    more = {"eval_dataset": rows(), "compute_metrics": lambda prediction: {"score": next(scores)}}
    model.double()
    trainer(model, rows(), tmp_path, more, max_steps=3, **every_step, **best).train()
    first, last = (weights(type(make()).from_pretrained(tmp_path / f"checkpoint-{step}")) for step in (1, 3))
    assert torch.equal(weights(model), first)
    assert not torch.equal(first, last)
    assert isinstance(model.train()(**whole_batch(rows())), CycleOutput)


# -- resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped_after", [1, 3], ids=["within the first epoch", "within the second"])
def test_a_resumed_training_ends_with_the_bits_of_an_uninterrupted_one(stopped_after: int, tmp_path: Path) -> None:
    """With dropout, so that the random numbers too have to go on where they were."""
    args = {
        "max_steps": 5,
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "random",
        "save_strategy": "steps",
        "save_steps": 1,
    }

    def make_dropping() -> hf.PreTrainedModel:
        model = bert()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        return wrap_multicycle(model)

    uninterrupted, resumed = make_dropping(), make_dropping()
    trainer(uninterrupted, sentence_rows(), tmp_path, **args).train()
    make_nondegenerate(resumed, seed=5)  # whatever it starts from
    torch.manual_seed(5)
    run = trainer(resumed, sentence_rows(), tmp_path / "resumed", **args)
    run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stopped_after}"))
    assert torch.equal(weights(resumed), weights(uninterrupted))
    saved = type(resumed).from_pretrained(tmp_path / f"checkpoint-{stopped_after}")
    assert not torch.equal(weights(saved), weights(uninterrupted))


def test_a_vit_is_resumed_as_far_as_the_plain_one_is(tmp_path: Path) -> None:
    """transformers 5.23 leaves the blocks of both at their new weights, and says so only in a warning."""

    def restored(wrap: Callable[[nn.Module], nn.Module], folder: Path) -> list[bool]:
        rows = image_rows(dtype=torch.float32)
        saved, resumed = wrap(vit()), wrap(make_nondegenerate(vit(), seed=5))
        trainer(saved, rows, folder, save_strategy="steps", save_steps=1).train()
        trainer(resumed, rows, folder).train(resume_from_checkpoint=str(folder / "checkpoint-1"))
        return [torch.equal(a, b) for a, b in zip(saved.parameters(), resumed.parameters(), strict=True)]

    found, plain = restored(wrap_multicycle, tmp_path / "wrapped"), restored(lambda model: model, tmp_path / "plain")
    assert found == plain
    assert any(plain)


def test_a_model_saved_by_trainer_loads_into_the_stock_class_with_equal_logits(tmp_path: Path) -> None:
    rows = image_rows(dtype=torch.float32)
    model = wrap_multicycle(vit())
    run = trainer(model, rows, tmp_path)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    stock = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert type(stock) is hf.ViTForImageClassification
    images = whole_batch(rows)["pixel_values"]
    assert torch.equal(stock.eval()(images).logits, model.eval()(images).logits)


def test_trainer_drops_columns_that_the_forward_does_not_name(tmp_path: Path) -> None:
    """It reads them off the forward's signature, which therefore has to survive the wrapping."""
    rows = [{**row, "row_id": i} for i, row in enumerate(image_rows(dtype=torch.float32))]
    model = wrap_multicycle(vit())
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer(model, rows, tmp_path).train()
    assert seen[0].keys() == {"pixel_values", "labels", "num_items_in_batch"}


def test_trainer_trains_in_bf16_and_the_objective_comes_back_in_fp32(tmp_path: Path) -> None:
    rows = image_rows(dtype=torch.float32)
    model = wrap_multicycle(vit())
    before = weights(model)
    run = trainer(model, rows, tmp_path, {"eval_dataset": rows, "compute_metrics": accuracy}, bf16=True, max_steps=2)
    run.train()
    assert 0 < distance(weights(model), before) < 1
    output = run.model_wrapped(**whole_batch(rows))
    assert isinstance(output, CycleOutput)
    assert {output.loss.dtype, *(each.logits.dtype for each in output.outputs)} == {torch.float32}
    assert math.isfinite(run.evaluate()["eval_loss"])
    assert type(unwrap_multicycle(run.model)) is hf.ViTForImageClassification


# -- other losses --------------------------------------------------------------------------------------------


def test_label_smoothing_is_refused_with_the_way_out(tmp_path: Path) -> None:
    run = trainer(wrap_multicycle(vit()), image_rows(), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(CycleError, match=r"label_smoothing_factor.*compute_loss_func"):
        run.model.double()
        run.train()


def test_a_loss_function_that_reads_logits_is_told_where_they_are(tmp_path: Path) -> None:
    def reads_logits(outputs: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        return F.cross_entropy(outputs.logits, labels)

    rows = image_rows(dtype=torch.float32)
    run = trainer(wrap_multicycle(vit()), rows, tmp_path, {"compute_loss_func": reads_logits})
    with pytest.raises(AttributeError, match=r"outputs\[0\]\.logits"):
        run.train()


def smoothed(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, labels, label_smoothing=0.1)


def one_liner(criterion: CycleLoss) -> dict[str, Any]:
    return {"compute_loss_func": lambda out, y, **k: criterion(out, y).total}


def test_the_one_liner_for_compute_loss_func_trains_the_whole_objective(tmp_path: Path) -> None:
    criterion = CycleLoss(smoothed)
    rows = image_rows()
    found = change(wrap_multicycle(vit()), rows, tmp_path, 8, 1, more=one_liner(criterion))

    model = wrap_multicycle(vit().double()).train()
    before, batch = weights(model), whole_batch(rows)
    criterion(model(batch["pixel_values"]), batch["labels"]).total.backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert distance(found, weights(model) - before) < 1e-9


def test_the_one_liner_accumulates_rightly_once_the_trainer_knows_it_is_a_mean(tmp_path: Path) -> None:
    """A Trainer takes what compute_loss_func returns as summed up already, unless told otherwise."""

    def step(batch: int, accumulate: int, **told: bool) -> Tensor:
        more = one_liner(CycleLoss(smoothed, alpha=0.5))
        return change(wrap_multicycle(vit()), image_rows(), tmp_path, batch, accumulate, more=more, **told)

    at_once = step(8, 1)
    # So it is with a plain model: without the attribute, accumulation multiplies the step.
    assert distance(step(2, 4), 4 * at_once) < 1e-5
    assert distance(step(2, 4, loss_is_scaled_for_ga=False), at_once) < 1e-5


# -- every term in the logs ----------------------------------------------------------------------------------


class Tracker(hf.TrainerCallback):
    """Stands where `report_to` puts TensorBoard and the like, and keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.seen.append({**logs, "step": state.global_step})


TERMS = {"task_1", "task_2", "tokens_1_2", "mse_tokens_1_2", "alpha_tokens_1_2"}


def logged(
    model: nn.Module, criterion: CycleLoss, rows: Rows, folder: Path, more: dict[str, Any] | None = None, **args: Any
) -> list[dict[str, Any]]:
    """The training logs, in which `LossTerms` has put its own, and which a tracker has seen alike."""
    tracker = Tracker()
    options = {"logging_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **args}
    run = trainer(model.double(), rows, folder, {"callbacks": [tracker], **(more or {})}, **options)
    run.callback_handler.callbacks.insert(0, LossTerms(criterion))
    run.train()
    assert tracker.seen == run.state.log_history
    return [log for log in tracker.seen if "loss" in log]


@pytest.mark.parametrize("family", ["vit", "convnext", "llama"])
def test_the_logs_hold_the_mean_of_every_term_over_all_micro_batches(family: str, tmp_path: Path) -> None:
    make, rows = FAMILIES[family]
    criterion = CycleLoss(alpha=0.5)
    model = wrap_multicycle(make(), loss=criterion)
    found = logged(model, criterion, rows(), tmp_path, max_steps=6, learning_rate=0.0)  # three epochs of two steps
    assert [log["step"] for log in found] == [2, 4, 6]

    micro = [whole_batch(rows()[i : i + 2]) for i in range(0, 8, 2)]
    parts = [criterion(model.train()(**batch)).logs() for batch in micro]
    for name in TERMS:
        expected = sum(part[name].item() for part in parts) / 4
        assert [log[name] for log in found] == pytest.approx([expected] * 3, rel=1e-5)


@pytest.mark.parametrize("objective", [CycleLoss, lambda: CycleLoss(alpha=0.5)], ids=["rho", "alpha"])
@pytest.mark.parametrize("family", ["vit", "convnext", "llama"])
def test_the_logged_terms_add_up_to_the_loss_that_the_trainer_logs(
    family: str, objective: Callable[[], CycleLoss], tmp_path: Path
) -> None:
    make, rows = FAMILIES[family]
    uneven = rows()[:7]  # the second step of an epoch has a micro-batch of two rows and one of a single row
    if family == "llama":
        uneven = [{**row, "labels": row["labels"].clone()} for row in uneven]
        for i, row in enumerate(uneven):
            row["labels"][:i] = -100
    criterion = objective()
    model = wrap_multicycle(make(), loss=criterion)
    found = logged(model, criterion, uneven, tmp_path, max_steps=5, logging_steps=1)
    assert len(found) == 5
    for log in found:
        assert log.keys() >= TERMS
        assert log["task_1"] + log["task_2"] + log["tokens_1_2"] == pytest.approx(log["loss"], rel=1e-5)
        assert log["tokens_1_2"] > 0


def test_terms_of_a_loss_of_ones_own_are_logged_too(tmp_path: Path) -> None:
    criterion = CycleLoss(smoothed, prediction_weight=0.1)
    half = {"compute_loss_func": lambda out, y, **k: criterion(out, y).total / 2}
    found = logged(wrap_multicycle(vit()), criterion, image_rows(), tmp_path, half, max_steps=2)
    assert found[0].keys() >= {*TERMS, "predictions_1_2"}
    whole = sum(found[0][name] for name in ("task_1", "task_2", "tokens_1_2", "predictions_1_2"))
    assert whole == pytest.approx(found[0]["loss"], rel=1e-5)


def test_evaluation_leaves_no_mark_on_the_logged_terms(tmp_path: Path) -> None:
    class Evaluating(hf.TrainerCallback):
        """Computes the objective of other data at every evaluation, as a report of all cycles does."""

        def on_evaluate(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            with torch.no_grad():
                assert run_cycles(model, **whole_batch(image_rows(5))).loss is not None

    def terms(**args: Any) -> list[dict[str, Any]]:
        criterion = CycleLoss()
        model = wrap_multicycle(vit(), inference_cycles=2, loss=criterion)
        more = {"eval_dataset": image_rows(5), "callbacks": [Evaluating(), Tracker()]}
        run = trainer(model.double(), image_rows(), tmp_path, more, max_steps=4, logging_steps=2, **args)
        run.callback_handler.callbacks.insert(0, LossTerms(criterion))
        run.train()
        return [{name: log[name] for name in TERMS} for log in run.state.log_history if "loss" in log]

    assert terms(eval_strategy="steps", eval_steps=1) == terms()


def test_terms_wait_for_the_log_as_tensors_without_their_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = CycleLoss()
    terms = LossTerms(criterion)
    model = wrap_multicycle(vit(), loss=criterion).train()
    for name in ("item", "__float__", "tolist"):
        monkeypatch.setattr(Tensor, name, lambda tensor: pytest.fail("a step waited for the device"))
    model(**whole_batch(image_rows(dtype=torch.float32)), num_items_in_batch=torch.tensor(8)).loss.backward()
    assert terms.sums.keys() == TERMS | {"loss"}
    assert all(isinstance(value, Tensor) and value.grad_fn is None for value in terms.sums.values())


# -- schedules -----------------------------------------------------------------------------------------------


def test_a_callback_sets_the_cycles_of_every_step(tmp_path: Path) -> None:
    class Ramp(hf.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            set_cycles(model, 1 + state.global_step)

    model = wrap_multicycle(vit())
    runs: list[int] = []
    model.register_forward_pre_hook(lambda *args: runs.append(0))
    model.vit.layers[0].register_forward_hook(lambda *args: runs.append(runs.pop() + 1))
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3}
    trainer(model, image_rows(dtype=torch.float32), tmp_path, {"callbacks": [Ramp()]}, **sizes).train()
    assert runs == [1, 1, 2, 2, 3, 3]


# -- gradient checkpointing ----------------------------------------------------------------------------------


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor | None]:
    model.zero_grad()
    model(**batch).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def enable_checkpointing(model: hf.PreTrainedModel, use_reentrant: bool) -> None:
    """Under its newer name, or the older one that is deprecated where both exist."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def count_runs_inside(block: nn.Module) -> list[int]:
    """Grows by one whenever the first linear layer of the block runs, in a recomputation too."""
    calls: list[int] = []
    linear = next(module for module in block.modules() if isinstance(module, nn.Linear))
    linear.register_forward_hook(lambda *args: calls.append(1))
    return calls


CHECKPOINTED = {
    "vit": (vit, "vit.layers.0", lambda: whole_batch(image_rows(3, torch.float32))),
    "swin": (swin, "swin.encoder.layers.1.blocks.0", lambda: whole_batch(image_rows(3, torch.float32))),
    "bert": (
        bert,
        "bert.encoder.layer.0",
        lambda: whole_batch(sentence_rows()[:3]),
    ),
}


@pytest.mark.parametrize("family", CHECKPOINTED)
def test_gradient_checkpointing_leaves_the_gradients_as_they_are(family: str) -> None:
    make, block, inputs = CHECKPOINTED[family]
    model = wrap_multicycle(make()).train()
    calls = count_runs_inside(model.get_submodule(block))
    expected = gradients(model, inputs())
    without = len(calls)
    assert without == 2
    enable_checkpointing(model, use_reentrant=False)
    found = gradients(model, inputs())
    assert len(calls) - without >= 2 * without  # both cycles were recomputed; Swin nests two checkpoints
    floor = 1e-3 * max(grad.abs().max().item() for grad in expected)  # of gradients that are 0 but for rounding
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max().item() <= 1e-6 * max(b.abs().max().item(), floor)


def test_reentrant_checkpointing_around_the_stack_is_refused() -> None:
    model = wrap_multicycle(swin()).train()
    enable_checkpointing(model, use_reentrant=True)
    with pytest.raises(CycleError, match="use_reentrant=False"):
        model(**whole_batch(image_rows(3, torch.float32)))


def test_trainer_with_gradient_checkpointing_makes_the_same_step(tmp_path: Path) -> None:
    def step(**args: Any) -> Tensor:
        model = wrap_multicycle(swin()).double()
        before = weights(model)
        trainer(model, image_rows(), tmp_path, **args).train()
        return weights(model) - before

    known = {field.name for field in dataclasses.fields(hf.TrainingArguments)}
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    assert distance(step(**{name: True}), step()) < 1e-9
