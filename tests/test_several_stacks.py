"""Several stacks in the same passes: each goes on from the tokens with which it was left itself."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from torch.utils.checkpoint import checkpoint

import toys
from benchmarks.matrix.repeated import gradient_error, gradients, make_nondegenerate, relative_error, repeat_blocks
from cyclekd import CycleError, CycleLoss, cycle_report, run_cycles, set_cycles, unwrap_multicycle, wrap_multicycle
from cyclekd.checkpointing import FRAMES_ARE_VISIBLE

BOTH = ["encoder", "decoder"]

needs_frames = pytest.mark.skipif(not FRAMES_ARE_VISIBLE, reason="PyTorch shows checkpoint frames from 2.8 on")


class ReadingBlock(toys.Block):
    """Adds what it reads in the memory."""

    def forward(self, x, memory):
        return super().forward(x) + F.softmax(x @ memory.mT, -1) @ memory


class EncoderDecoder(nn.Module):
    """Two stacks, the second of which reads what the first returns."""

    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, toys.WIDTH)
        self.encoder = nn.ModuleList(toys.Block() for _ in range(2))
        self.decoder = nn.ModuleList(ReadingBlock() for _ in range(3))
        self.head = nn.Linear(toys.WIDTH, 3)
        self.checkpointed = checkpointed

    def forward(self, source, target):
        if self.checkpointed:
            return checkpoint(self.run, source, target, use_reentrant=False)
        return self.run(source, target)

    def run(self, source, target):
        memory, x = self.stem(source), self.stem(target)
        for block in self.encoder:
            memory = block(memory)
        for block in self.decoder:
            x = block(x, memory)
        return self.head(x.mean(1))

    def cycles(self, source, target, times):
        """Written by hand: outputs and tokens of both stacks, cycle by cycle."""
        memory, x = self.stem(source), self.stem(target)
        found = []
        for _ in range(times):
            for block in self.encoder:
                memory = block(memory)
            for block in self.decoder:
                x = block(x, memory)
            found.append((self.head(x.mean(1)), (memory, x)))
        return found


class TwoStages(toys.Toy):
    """The second list receives what the first returns, and nothing else does."""

    def __init__(self):
        super().__init__()
        self.later = nn.ModuleList(toys.Block() for _ in range(2))

    def forward_features(self, x):
        x = super().forward_features(x)
        for block in self.later:
            x = block(x)
        return x


def batch():
    return toys.images(), toys.images(tokens=3)


@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=needs_frames)])
def test_both_stacks_equal_a_loop_written_by_hand(checkpointed):
    model = EncoderDecoder(checkpointed)
    expected = model.cycles(*batch(), times=3)
    found = wrap_multicycle(model, 3, stack=BOTH)(*batch())
    for output, tokens, truth in zip(found.outputs, found.tokens, expected, strict=True):
        assert relative_error((output, tokens), truth) == 0
        assert gradient_error(gradients(model, output), gradients(model, truth[0])) < 1e-6
    assert relative_error(found.outputs[1], found.outputs[0]) > 1e-3


def test_both_stacks_differ_from_either_alone():
    found = [wrap_multicycle(EncoderDecoder(), 2, stack=stack)(*batch()) for stack in (BOTH, *BOTH)]
    for alone in found[1:]:
        assert relative_error(found[0].outputs[1], alone.outputs[1]) > 1e-3


def test_bart_reads_each_encoder_cycle_in_the_decoder_cycle_of_the_same_number():
    model = make_nondegenerate(hf.BartForConditionalGeneration(bart()).eval()).double()
    words = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": words, "labels": words[:, :4].contiguous(), "use_cache": False}
    expected = [longer_bart(model, inputs, times)(**inputs) for times in (1, 2, 3)]
    stacks = ["model.encoder.layers", "model.decoder.layers"]
    found = run_cycles(wrap_multicycle(model, 3, stack=stacks), **inputs)
    for output, truth in zip(found.outputs, expected, strict=True):
        assert relative_error((output.loss, output.logits), (truth.loss, truth.logits)) < 1e-5
        assert gradient_error(gradients(model, output.logits), gradients(model, truth.logits)) < 1e-9
    assert relative_error(expected[1].logits, expected[0].logits) > 1e-3


def bart():
    sizes = {"d_model": 32, "vocab_size": 99, "max_position_embeddings": 64}
    layers = {f"{side}_{name}": 2 for side in BOTH for name in ("layers", "attention_heads")}
    return hf.BartConfig(**sizes, **layers, encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.0)


def longer_bart(model, inputs, times):
    """Both lists repeated, the k-th round of the decoder's reading what the k-th round of the encoder's returned."""
    longer = repeat_blocks(model, "model.decoder.layers", times)
    rounds = []
    for cycle in range(1, times + 1):
        encoder = repeat_blocks(model, "model.encoder.layers", cycle).model.encoder
        memory = encoder(inputs["input_ids"]).last_hidden_state
        rounds += [Reading(layer, memory) for layer in model.model.decoder.layers]
    longer.model.decoder.layers = nn.ModuleList(rounds)
    return longer


class Reading(nn.Module):
    """A decoder layer that reads this memory, whatever it is given."""

    def __init__(self, layer, memory):
        super().__init__()
        self.layer, self.memory = layer, memory

    def forward(self, hidden_states, attention_mask, encoder_hidden_states, *args, **kwargs):
        return self.layer(hidden_states, attention_mask, self.memory, *args, **kwargs)


def test_a_stack_whose_later_cycles_would_have_no_effect_is_refused():
    model = wrap_multicycle(TwoStages(), 2, stack=["blocks", "later"])
    with pytest.raises(CycleError, match=r"'blocks'.*other than through the entry of another stack.*stack='blocks'"):
        model(toys.images())


def test_one_cycle_of_several_stacks_is_not_looked_at_and_bitwise_the_base():
    base = TwoStages()
    expected = base(toys.images())
    model = wrap_multicycle(base, 1, stack=["blocks", "later"])
    assert torch.equal(model(toys.images()).outputs[0], expected)


def test_every_stack_has_its_token_term():
    found = wrap_multicycle(EncoderDecoder(), 3, stack=BOTH)(*batch())
    parts = CycleLoss(lambda output, target: output.square().mean())(found)
    assert list(parts.token_mse) == ["tokens0", "tokens1"]
    assert all(len(distances) == 2 and distances.all() for distances in parts.token_mse.values())


def test_evaluation_runs_once_and_unwrapping_leaves_nothing():
    base = EncoderDecoder().eval()
    before = copy.deepcopy(vars(base))
    expected = base(*batch())
    model = wrap_multicycle(base, 2, stack=BOTH)
    assert torch.equal(model(*batch()), expected)
    assert unwrap_multicycle(model) is base
    assert vars(base).keys() == before.keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_inference_cycles_schedules_copies_and_reports_cover_all_stacks():
    model = wrap_multicycle(EncoderDecoder(), 2, stack=BOTH)
    expected = [output for output, _ in EncoderDecoder().cycles(*batch(), times=3)]
    set_cycles(model, inference_cycles=3)
    assert relative_error(model.eval()(*batch()), expected[2]) == 0
    assert relative_error(copy.deepcopy(model).train()(*batch()).outputs, tuple(expected[:2])) == 0
    report = cycle_report(model, *batch())
    assert (report.stack, report.blocks) == ("encoder + decoder", 5)


def test_one_call_before_compiling_is_enough_of_a_look():
    model = wrap_multicycle(EncoderDecoder(), 2, stack=BOTH)
    expected = model(*batch())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(*batch()), expected) < 1e-6
    unseen = wrap_multicycle(EncoderDecoder(), 2, stack=BOTH)
    with torch.inference_mode(), pytest.raises(CycleError, match=r"reaches the output.*call the model once on a batch"):
        unseen(*batch())


@pytest.mark.parametrize("stack", [[], ["encoder", 3], 5])
def test_what_names_no_stack_is_refused(stack):
    with pytest.raises(CycleError, match=r"stack=.*give a path"):
        wrap_multicycle(EncoderDecoder(), 2, stack=stack)


def test_stacks_that_overlap_are_refused():
    with pytest.raises(CycleError, match=r"'decoder.0:2' and 'decoder.1:3' have blocks in common"):
        wrap_multicycle(EncoderDecoder(), 2, stack=["decoder.0:2", "decoder.1:3"])
