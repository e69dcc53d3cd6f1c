"""PEFT around and inside a wrapped model: adapters train as in really repeated blocks, and merge into the base.

That both orders of wrapping work at all, `test_wrap.py` holds on a toy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from benchmarks.matrix.repeated import first_tensor, gradients, make_nondegenerate, relative_error, repeat_blocks
from cyclekd import CycleLoss, CycleOutput, unwrap_multicycle, wrap_multicycle

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT asks it

CYCLES = 3


def bert() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = hf.BertConfig(**size, **drop, vocab_size=50, num_labels=3)
    return make_nondegenerate(hf.BertForSequenceClassification(config))


def batch() -> dict[str, Tensor]:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2])}


def lora(**options: Any) -> Any:
    """On two layers of each block, with a classifier that is trained whole."""
    targets = {"target_modules": ["query", "output.dense"], "modules_to_save": ["classifier"]}
    return peft.LoraConfig(r=2, init_lora_weights=False, **targets, **options)


def adapted(model: nn.Module, config: Any) -> nn.Module:
    """With the same random adapters at every call."""
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


def wrap_first(config: Any) -> tuple[nn.Module, Callable[[], nn.Module]]:
    model = adapted(wrap_multicycle(bert(), CYCLES), config)
    return model, lambda: unwrap_multicycle(model.merge_and_unload())


def peft_first(config: Any) -> tuple[nn.Module, Callable[[], nn.Module]]:
    model = wrap_multicycle(adapted(bert(), config), CYCLES)
    return model, lambda: unwrap_multicycle(model).merge_and_unload()


def wrap_inside(config: Any) -> tuple[nn.Module, Callable[[], nn.Module]]:
    model = adapted(bert(), config)
    wrap_multicycle(model.get_base_model(), CYCLES)
    return model, lambda: unwrap_multicycle(model.merge_and_unload())


ORDERS = pytest.mark.parametrize("order", [wrap_first, peft_first, wrap_inside], ids=lambda order: order.__name__)


def every_cycle(plain: nn.Module) -> CycleOutput:
    """What a wrapped model has to return, from a never-wrapped one whose block list is repeated."""
    path, blocks = next((name, each) for name, each in plain.named_modules() if name.endswith("encoder.layer"))
    left: list[Tensor] = []
    hook = blocks[-1].register_forward_hook(lambda block, args, output: left.append(first_tensor(output)))
    outputs, tokens = [], []
    for times in range(1, CYCLES + 1):
        outputs.append(repeat_blocks(plain, path, times)(**batch()))
        tokens.append(left[-1])
    hook.remove()
    return CycleOutput(None, tuple(outputs), tuple(tokens))


# -- training ------------------------------------------------------------------------------------------------


CONFIGS: dict[str, Callable[[], Any]] = {
    "LoRA": lora,
    "DoRA": lambda: lora(use_dora=True),
    "IA3": lambda: peft.IA3Config(
        target_modules=["query", "output.dense"], feedforward_modules=["output.dense"], init_ia3_weights=False
    ),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
}


@ORDERS
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_cycle_and_every_adapters_gradient_are_bitwise_those_of_repeated_blocks(
    kind: str, order: Callable
) -> None:
    plain, (model, _) = adapted(bert(), CONFIGS[kind]()).train(), order(CONFIGS[kind]())
    expected, found = every_cycle(plain), model.train()(**batch())
    assert type(found) is CycleOutput
    names = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for cycle in range(CYCLES):
        assert relative_error(found.outputs[cycle], expected.outputs[cycle]) == 0
        assert torch.equal(found.tokens[cycle], expected.tokens[cycle])
        a, b = (gradients(each, out.outputs[cycle]) for each, out in ((model, found), (plain, expected)))
        assert relative_error(a, b) == 0
    assert relative_error(found.outputs[2].logits, found.outputs[1].logits) > 1e-2


@ORDERS
def test_a_trained_merged_and_unwrapped_model_is_the_never_wrapped_one_trained_alike(order: Callable) -> None:
    plain, (model, back) = adapted(bert(), lora()).train(), order(lora())
    CycleLoss()(every_cycle(plain)).total.backward()
    model.train()(**batch()).loss.backward()
    for each in (plain, model):
        torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.05).step()
    before = adapted(bert(), lora()).eval()(**batch()).logits
    base, expected = back().eval(), plain.merge_and_unload().eval()
    assert type(base) is hf.BertForSequenceClassification
    assert list(base.state_dict()) == list(bert().state_dict())
    found = base(**batch()).logits
    torch.testing.assert_close(found, expected(**batch()).logits, rtol=1e-5, atol=1e-5)
    assert (found - before).abs().max() > 1e-2
    assert not isinstance(base.train()(**batch()), CycleOutput)


@ORDERS
def test_a_disabled_adapter_leaves_the_cycles_of_the_bare_model(order: Callable) -> None:
    bare = every_cycle(bert().train())
    model, _ = order(lora())
    with model.train().disable_adapter():
        found = model(**batch())
    assert all(torch.equal(a, b) for a, b in zip(found.tokens, bare.tokens, strict=True))
    assert not torch.equal(model(**batch()).tokens[0], bare.tokens[0])


# -- files ---------------------------------------------------------------------------------------------------


@ORDERS
def test_an_adapter_saved_in_training_loads_onto_the_plain_model(order: Callable, tmp_path: Path) -> None:
    model, _ = order(lora())
    model.train().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    found = loaded(**batch()).logits
    assert torch.equal(found, model.eval()(**batch()).logits)
    assert not torch.equal(found, bert().eval()(**batch()).logits)


def test_an_adapter_added_by_transformers_itself_trains_in_cycles_and_is_saved_alone(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    model = wrap_multicycle(bert(), CYCLES)
    model.add_adapter(config)
    output = model.train()(**batch())
    output.loss.backward()
    assert len(output.outputs) == CYCLES
    assert all((p.grad is not None) == ("lora" in name) for name, p in model.named_parameters())
    model.save_pretrained(tmp_path)
    stock = bert()
    stock.load_adapter(str(tmp_path))
    assert torch.equal(stock.eval()(**batch()).logits, model.eval()(**batch()).logits)
    assert not (tmp_path / "model.safetensors").exists()
