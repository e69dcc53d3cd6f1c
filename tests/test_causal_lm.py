"""Causal language models: padded and packed batches, the loss of every cycle, caches, and generate() as it was.

Packing puts several texts into one row. What keeps them apart, be it positions, a mask or the lengths of the texts, is
the model's own business in every cycle.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor

from benchmarks.matrix.repeated import Truth, first_tensor, gradients, make_nondegenerate, relative_error, repeat_blocks
from cyclekd import CycleError, CycleLoss, run_cycles, set_cycles, wrap_multicycle

SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": 31, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def seeded(model_class: Callable[[Any], Any], config: hf.PretrainedConfig) -> hf.PreTrainedModel:
    """The same weights at every call."""
    torch.manual_seed(0)
    return make_nondegenerate(model_class(config)).eval()


def llama() -> hf.PreTrainedModel:
    return seeded(hf.LlamaForCausalLM, hf.LlamaConfig(**SIZE, **TEXT, num_key_value_heads=1))


def qwen3() -> hf.PreTrainedModel:
    return seeded(hf.Qwen3ForCausalLM, hf.Qwen3Config(**SIZE, **TEXT, num_key_value_heads=1, head_dim=8))


def gpt2() -> hf.PreTrainedModel:
    size = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
    config = hf.GPT2Config(**size, **TEXT, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    return seeded(hf.GPT2LMHeadModel, config)


MODELS = {"llama": (llama, "model.layers"), "qwen3": (qwen3, "model.layers"), "gpt2": (gpt2, "transformer.h")}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# -- batches: texts of several lengths, padded or packed ---------------------------------------------------------

TEXTS = [[3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13, 14]]
Batch = dict[str, Any]


def padded() -> Batch:
    """On the left, with the labels of the padding and of a prompt left out."""
    width = max(map(len, TEXTS))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in TEXTS])
    labels = ids.masked_fill(ids == 0, -100)
    labels[2, :2] = -100
    return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": labels}


def packed_by_positions() -> Batch:
    """Positions that start anew with each text, in which transformers looks for packed texts where no cache is used."""
    return dict(hf.DataCollatorWithFlattening()([{"input_ids": text} for text in TEXTS]))


def packed_by_mask() -> Batch:
    """A mask of [1, 1, T, T] that is block diagonal and causal, 0 where a token may look."""
    batch = packed_by_positions()
    text = batch["position_ids"].eq(0).cumsum(-1)
    seen = text[:, :, None].eq(text[:, None, :]).tril()
    return {**batch, "attention_mask": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo().min)[:, None]}


def packed_by_lengths() -> Batch:
    """What FlashAttention takes, here for an attention of a few lines."""
    collator = hf.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    return dict(collator([{"input_ids": text} for text in TEXTS]))


def attend_within_texts(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, cu_seq_lens_q: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention to the own text alone; [B, heads, T, D] in, [B, T, heads, D] out."""
    lengths = cu_seq_lens_q.diff().tolist()
    texts = zip(*(each.split(lengths, dim=2) for each in (q, k, v)), strict=True)
    options = {"is_causal": True, "scale": kwargs["scaling"], "enable_gqa": True}
    return torch.cat([F.scaled_dot_product_attention(*text, **options) for text in texts], 2).transpose(1, 2), None


hf.AttentionInterface.register("within_texts", attend_within_texts)

PACKED = {"positions": packed_by_positions, "mask": packed_by_mask, "lengths": packed_by_lengths}
LAYOUTS = {"padded": padded, **PACKED}


def built(name: str, layout: str) -> hf.PreTrainedModel:
    model = MODELS[name][0]()
    if layout == "lengths":
        model.set_attn_implementation("within_texts")
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_cycle_equals_the_repeated_list(name: str, layout: str) -> None:
    """Losses, logits and tokens bit for bit, the gradients of each cycle up to the order of their sums."""
    inputs = {**LAYOUTS[layout](), "use_cache": False}
    expected = Truth(built(name, layout), MODELS[name][1], ((), inputs), first_tensor).training
    model = wrap_multicycle(built(name, layout), 3).train()
    found = model(**inputs)
    for output, tokens, cycle in zip(found.outputs, found.tokens, expected, strict=True):
        assert torch.equal(output.loss, cycle.output.loss)
        assert relative_error((output, tokens), (cycle.output, cycle.tokens)) == 0
        assert relative_error(gradients(model, (output, tokens)), cycle.gradients) < 1e-5
    losses = [output.loss.item() for output in found.outputs]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("layout", PACKED)
def test_packed_texts_do_not_see_each_other_in_any_cycle(name: str, layout: str) -> None:
    model = wrap_multicycle(built(name, layout), 3).train()
    packed = model(**PACKED[layout](), use_cache=False)
    alone = wrap_multicycle(MODELS[name][0](), 3).train()
    each = [alone(torch.tensor([text]), use_cache=False) for text in TEXTS]
    for cycle in range(3):
        expected = torch.cat([output.outputs[cycle].logits for output in each], 1)
        torch.testing.assert_close(packed.outputs[cycle].logits, expected, rtol=1e-5, atol=1e-5)
        together = torch.cat([output.tokens[cycle] for output in each], 1)
        torch.testing.assert_close(packed.tokens[cycle], together, rtol=1e-5, atol=1e-5)


def test_a_trainer_s_step_on_packed_texts_is_that_of_the_same_texts_one_by_one(tmp_path: Path) -> None:
    """The Trainer turns the cache off, without which transformers would not look for packed texts."""
    packed, separate = (wrap_multicycle(llama(), 3, loss=CycleLoss(rho=0)) for _ in range(2))
    options = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "max_steps": 1,
    }
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = hf.TrainingArguments(output_dir=str(tmp_path), dataloader_pin_memory=False, **options, **quiet)
    rows = [{"input_ids": text} for text in TEXTS]
    hf.Trainer(packed, args, train_dataset=rows, data_collator=hf.DataCollatorWithFlattening()).train()

    separate.train()
    items = sum(len(text) - 1 for text in TEXTS)
    for text in (torch.tensor([text]) for text in TEXTS):
        separate(text, labels=text, num_items_in_batch=items).loss.backward()
    torch.optim.SGD(separate.parameters(), lr=0.1).step()
    for a, b, start in zip(packed.parameters(), separate.parameters(), llama().parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not torch.equal(a, start)


# -- caches ------------------------------------------------------------------------------------------------------


def ids() -> Tensor:
    return torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda config: hf.DynamicCache(config=config),
    "static": lambda config: hf.StaticCache(config=config, max_cache_len=8),
}


def keys(cache: Any) -> Tensor:
    return torch.stack([layer.keys[:, :, :4] for layer in cache.layers])


@pytest.mark.parametrize("kind", CACHES)
def test_every_cycle_starts_with_an_empty_cache_and_cycle_one_fills_the_given_one(name: str, kind: str) -> None:
    plain, (make, path) = MODELS[name][0](), MODELS[name]
    model = wrap_multicycle(make(), 3).train()
    given, expected = CACHES[kind](model.config), CACHES[kind](plain.config)
    found = model(ids(), past_key_values=given)
    plain(ids(), past_key_values=expected)
    assert torch.equal(keys(given), keys(expected))
    assert found.outputs[0].past_key_values is given
    for times, output in enumerate(found.outputs, start=1):
        uncached = repeat_blocks(plain, path, times)(ids(), use_cache=False)
        torch.testing.assert_close(output.logits, uncached.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CACHES)
def test_a_filled_cache_is_refused_where_there_are_several_cycles(name: str, kind: str) -> None:
    model = wrap_multicycle(MODELS[name][0](), 2, inference_cycles=2)
    filled = CACHES[kind](model.config)
    MODELS[name][0]()(ids(), past_key_values=filled)
    with pytest.raises(CycleError, match=r"past_key_values brings a filled cache .* into 2 cycles.*use_cache=False"):
        model(ids()[:, :1], past_key_values=filled)
    with pytest.raises(CycleError, match="filled cache"):
        model.train()(ids()[:, :1], past_key_values=filled)


def test_the_cache_that_several_inference_cycles_return_is_refused_at_the_next_token(name: str) -> None:
    model = wrap_multicycle(MODELS[name][0](), inference_cycles=2)
    first = model(ids(), use_cache=True)
    with pytest.raises(CycleError, match="filled cache"):
        model(ids()[:, :1], past_key_values=first.past_key_values)


def test_decoding_step_by_step_with_a_cache_is_the_plain_model_s(name: str) -> None:
    plain, model = MODELS[name][0](), wrap_multicycle(MODELS[name][0](), 2)
    caches = [hf.DynamicCache(config=plain.config) for _ in range(2)]
    for part in ids().split(2, dim=1):
        expected, found = (
            each(part, past_key_values=cache).logits for each, cache in zip((plain, model), caches, strict=True)
        )
        assert torch.equal(found, expected)
    assert torch.equal(keys(caches[1]), keys(caches[0]))


# -- generate ----------------------------------------------------------------------------------------------------

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 1.5},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}
CACHING = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "uncached": {"use_cache": False},
}


def generated(model: hf.PreTrainedModel, path: str, **options: Any) -> tuple[Tensor, int]:
    """Token ids, and how often the first block ran for them."""
    calls: list[int] = []
    handle = model.get_submodule(path)[0].register_forward_hook(lambda *args: calls.append(1))
    torch.manual_seed(3)
    lengths = {"max_new_tokens": 6, "min_new_tokens": 6}
    found = model.generate(ids(), attention_mask=torch.ones_like(ids()), **lengths, **options)
    handle.remove()
    return found, len(calls)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("caching", CACHING)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_generate_is_the_plain_model_s(name: str, strategy: str, caching: str, training: bool) -> None:
    (make, path), options = MODELS[name], {**STRATEGIES[strategy], **CACHING[caching]}
    model = wrap_multicycle(make(), 3).train(training)
    expected, calls = generated(make(), path, **options)
    found, own_calls = generated(model, path, **options)
    assert torch.equal(found, expected)
    assert own_calls == calls
    assert model.training is training
    assert len(run_cycles(model, ids()).outputs) == 3  # and cycling goes on afterwards


def test_sampling_and_beams_find_other_texts_than_greedy_search(name: str) -> None:
    make, path = MODELS[name]
    greedy, sampled, beams = (generated(make(), path, **options)[0] for options in STRATEGIES.values())
    assert not torch.equal(sampled, greedy)
    assert len(beams.unique(dim=0)) == 4


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_generate_with_several_inference_cycles_is_refused(name: str, training: bool) -> None:
    make, path = MODELS[name]
    model = wrap_multicycle(make(), inference_cycles=2).train(training)
    with pytest.raises(CycleError, match=r"set_cycles\(model, inference_cycles=1\)"):
        generated(model, path)
    set_cycles(model, inference_cycles=1)
    assert torch.equal(generated(model, path)[0], generated(make(), path)[0])


def test_several_inference_cycles_write_text_from_the_whole_sequence(name: str) -> None:
    """The way that the refusal names, next to the longer model's own greedy generation."""
    make, path = MODELS[name]
    expected, _ = generated(repeat_blocks(make(), path, 2), path, use_cache=False)
    model, text = wrap_multicycle(make(), inference_cycles=2), ids()
    with torch.no_grad():
        for _ in range(6):
            scores = model(text, use_cache=False).logits[:, -1]
            scores[:, TEXT["eos_token_id"]] = -torch.inf  # min_new_tokens
            text = torch.cat([text, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(text, expected)
    one_pass, _ = generated(make(), path)
    assert not torch.equal(text, one_pass)
