"""Re-entry against a block list that is really repeated, with every trait that could make it silently wrong."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import cyclekd.slots
import toys
from cyclekd import CycleError, run_cycles, wrap_multicycle
from cyclekd.caches import calls_with_own_caches
from cyclekd.checkpointing import FRAMES_ARE_VISIBLE
from cyclekd.reentry import DRAWS_BEFORE_REFUSAL


def gradients(model, scalar):
    named = dict(model.named_parameters())
    found = torch.autograd.grad(scalar, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6, msg=name)


def assert_cycles_match_repeated_blocks(model, x, cycles=3):
    longer = [toys.repeated(model, times) for times in range(1, cycles + 1)]
    output = wrap_multicycle(model, cycles, stack="blocks")(x)
    for times, (found, plain) in enumerate(zip(output.outputs, longer, strict=True), start=1):
        expected = plain.train()(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=f"cycle {times}")
        assert_same_gradients(gradients(model, found.square().sum()), gradients(plain, expected.square().sum()))
    first, second = output.outputs[:2]
    assert (first - second).abs().max() > 1e-3
    return output


@pytest.mark.parametrize(
    "make",
    [toys.Toy, toys.InPlaceStem, toys.TwoStreamToy, toys.ResidualToy, toys.BiasToy],
    ids=lambda make: make.__name__,
)
def test_cycles_match_a_model_with_repeated_blocks(make):
    assert_cycles_match_repeated_blocks(make(), toys.images())


def test_blocks_that_write_in_place_match_repeated_blocks_and_keep_their_tokens_apart():
    model, x = toys.Toy(toys.InPlaceBlock), toys.images()
    output = assert_cycles_match_repeated_blocks(model, x)
    assert torch.equal(output.tokens[0], model.forward_features(x))
    assert (output.tokens[0] - output.tokens[1]).abs().max() > 1e-3


def test_skipping_the_handover_makes_every_cycle_the_first(monkeypatch):
    monkeypatch.setattr(cyclekd.slots.Handover, "__call__", lambda self, args, kwargs: (args, kwargs))
    with pytest.raises(AssertionError, match=r"cycle 2"):
        assert_cycles_match_repeated_blocks(toys.Toy(), toys.images())


def test_glue_between_blocks_follows_the_models_own_loop():
    model = toys.GluedToy()
    x = toys.images()
    output = wrap_multicycle(model, 3)(x)
    tokens = model.stem(x)
    for found in output.tokens:
        tokens = model.loop(tokens)  # the hand-written loop: positions never enter block 0, in any cycle
        torch.testing.assert_close(found, tokens, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["plain", "in place", "pairs"])
@pytest.mark.parametrize("mode", ["training", "frozen stem", "evaluation"])
def test_a_residual_that_passes_the_blocks_by_is_refused(way, mode):
    model = toys.OuterResidualToy(depth=4)
    model.way = way
    model.stem.requires_grad_(mode != "frozen stem")
    wrap_multicycle(model, 2, inference_cycles=2).train(mode != "evaluation")
    with pytest.raises(CycleError, match=r"enters the stack 'blocks' reaches.*past the first Block.*residual inside"):
        with torch.set_grad_enabled(mode != "evaluation"):
            model(toys.images())


def test_looking_between_the_blocks_happens_once_and_changes_nothing():
    model, calls = toys.GluedToy(), []
    model.norm.register_forward_hook(lambda *_: calls.append(1))
    wrap_multicycle(model, 2)
    state = torch.get_rng_state()
    for expected in (3, 5):
        x = toys.images()
        model(x)
        assert len(calls) == expected and not x.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_what_stands_between_blocks_has_to_be_seen_outside_inference_mode_first():
    model = wrap_multicycle(toys.GluedToy(), 2, inference_cycles=2).eval()
    with (
        torch.inference_mode(),
        pytest.raises(CycleError, match=r"between the blocks of 'blocks'.*call the model once"),
    ):
        model(toys.images())
    model(toys.images())
    with torch.inference_mode():
        model(toys.images())


def masked(step):
    """A loop over blocks (x, mask) -> (x, mask) in which `step(block, x, mask)` is one turn."""

    def loop(model, x):
        mask = torch.ones(2, 5, 1)
        for block in model.blocks:
            x, mask = step(block, x, mask)
        return x

    return loop


def residual_outside(block, x, mask):
    y, mask = block(x, mask)
    return x + y, mask


def changed_between(block, x, mask):
    return block(torch.tanh(x), mask)


@pytest.mark.parametrize("step", [residual_outside, changed_between], ids=lambda step: step.__name__)
def test_a_mask_that_is_handed_on_does_not_hide_tokens_that_are_not(step):
    model = toys.FunctionToy(toys.MaskedBlock, loop=masked(step))
    with pytest.raises(CycleError, match=r"'blocks' hand on several tensors, and one of them is changed between"):
        wrap_multicycle(model, 2)(toys.images())


def test_a_mask_beside_the_tokens_is_no_token():
    model = toys.FunctionToy(toys.MaskedBlock, loop=masked(lambda block, x, mask: block(x, mask)))
    output = assert_cycles_match_repeated_blocks(model, toys.images())
    assert output.tokens[0].shape == (2, 5, toys.WIDTH)


def test_what_the_first_block_makes_is_handed_to_later_cycles_too():
    def loop(model, x):
        value = None
        for block in model.blocks:
            x, value = block(x, value)
        return x

    output = assert_cycles_match_repeated_blocks(toys.FunctionToy(toys.ValueBlock, loop=loop), toys.images())
    assert isinstance(output.tokens[0], torch.Tensor)


def reading_all_before(model, x):
    states = x[:, :0]
    for block in model.blocks:
        states, x = torch.cat([states, x], 1), block(x, states)
    return x


def reading_a_gate(model, x):
    for block in model.blocks:
        x = block(x, 2 * x)
    return x


def with_a_residual_stream_beside(model, x):
    stream, x = x, model.norm(x)
    for block in model.blocks:
        x = block(x, stream)
        stream = stream + x
    return x


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (reading_all_before, r"what enters the stack 'blocks' reaches its later blocks past the first BesideBlock"),
        (with_a_residual_stream_beside, r"what enters the stack 'blocks' reaches its later blocks past the first"),
        (reading_a_gate, r"computed from them before every block \(BesideBlock, argument \(0, 1\)\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_what_tells_of_the_stems_tokens_beside_the_carried_ones_is_refused(loop, message, mode):
    model = wrap_multicycle(toys.FunctionToy(toys.BesideBlock, loop=loop), 2, inference_cycles=2)
    with torch.set_grad_enabled(mode == "training"), pytest.raises(CycleError, match=message):
        model.train(mode == "training")(toys.images())


def test_two_blocks_around_which_a_residual_is_added_are_refused():
    def loop(model, x):
        for block in model.blocks:
            x = x + block(model.norm(x))
        return x

    with pytest.raises(CycleError, match="reaches its later blocks past the first Block"):
        wrap_multicycle(toys.FunctionToy(loop=loop, depth=2), 2)(toys.images())


def test_a_similarity_of_the_tokens_before_every_block_is_seen_without_gradients_too():
    def loop(model, x):
        for block in model.blocks:
            x = block(x, x @ x.mT)
        return x

    model = wrap_multicycle(toys.FunctionToy(SimilarityBlock, loop=loop), 2, inference_cycles=2).eval()
    with torch.no_grad(), pytest.raises(CycleError, match=r"computed from them before every block \(SimilarityBlock"):
        model(toys.images())


class SimilarityBlock(toys.Block):
    def forward(self, x, similarity):
        return super().forward(x) + similarity.softmax(-1) @ x


@pytest.mark.parametrize("where", ["beside", "added between"])
def test_a_skip_from_an_earlier_block_is_one_within_the_cycle(where):
    def loop(model, x):
        skip = None
        for number, block in enumerate(model.blocks):
            x = block(x, skip) if where == "beside" and number == 3 else block(x)
            skip = x if number == 0 else skip
            x = x + skip if where == "added between" and number == 2 else x
        return x

    model = toys.FunctionToy(toys.BesideBlock, loop=loop, depth=4)
    output, tokens = wrap_multicycle(model, 3)(toys.images()), model.stem(toys.images())
    for found in output.tokens:
        tokens = loop(model, tokens)
        torch.testing.assert_close(found, tokens, rtol=1e-5, atol=1e-6)


def test_a_frozen_stem_before_blocks_that_write_in_place_cannot_be_looked_past():
    def loop(model, x):
        for block in model.blocks:
            x = block(x) + 1
        return x

    model = toys.FunctionToy(toys.InPlaceBlock, loop=loop)
    model.stem.requires_grad_(False)
    with pytest.raises(CycleError, match=r"writes in place on its input, which comes from a frozen stem"):
        wrap_multicycle(model, 2)(toys.images())


def test_a_share_of_the_stem_for_every_block_is_the_same_in_every_cycle():
    def loop(model, x):
        shares = torch.tanh(x).chunk(5, 1)
        for i, block in enumerate(model.blocks):
            x = block(x, shares[i % 3])
        return x

    assert_cycles_match_repeated_blocks(toys.FunctionToy(toys.BesideBlock, loop=loop), toys.images())


def test_what_is_computed_between_blocks_starts_anew_in_every_cycle():
    def loop(model, x):
        beside = None
        for block in model.blocks:
            x = block(x, beside)
            beside = 2 * x[:, :2]
        return x

    model = toys.FunctionToy(toys.BesideBlock, loop=loop)
    output, tokens = wrap_multicycle(model, 3)(toys.images()), model.stem(toys.images())
    for found in output.tokens:
        tokens = loop(model, tokens)
        torch.testing.assert_close(found, tokens, rtol=1e-5, atol=1e-6)


def test_what_enters_as_query_and_key_is_one_token_tensor():
    class Attending(toys.Block):
        def forward(self, query, key):
            return super().forward(query) + key.mean(1, keepdim=True)

    def loop(model, x):
        for block in model.blocks:
            x = block(x, x)
        return x

    output = assert_cycles_match_repeated_blocks(toys.FunctionToy(Attending, loop=loop), toys.images())
    assert isinstance(output.tokens[0], torch.Tensor)


def test_blocks_side_by_side_are_no_stack():
    def loop(model, x):
        return model.blocks[0](x) + model.blocks[1](-x) + model.blocks[2](2 * x)

    with pytest.raises(CycleError, match=r"'blocks' \(Block\) does not receive what the one before it returned"):
        wrap_multicycle(toys.FunctionToy(loop=loop), 2)(toys.images())


def test_containers_that_blocks_and_tail_write_to_are_kept_apart():
    def loop(model, x):
        state = {"x": x}
        for block in model.blocks:
            state = block(state)
        return state

    def tail(model, state):
        state["x"] = model.norm(state["x"])
        return model.head(state["x"].mean(1))

    assert_cycles_match_repeated_blocks(toys.FunctionToy(toys.DictBlock, loop=loop, tail=tail), toys.images())


def test_arguments_and_outputs_that_the_forward_writes_to_are_kept_apart():
    def stem(model, batch):
        batch["x"] = batch["x"] * 2
        model.batch = batch
        return model.stem(batch["x"])

    def tail(model, x):
        model.batch["y"] = model.forward_head(x)
        return model.batch

    model = wrap_multicycle(toys.FunctionToy(stem=stem, tail=tail), 2)
    output = model({"x": toys.images()})
    assert torch.equal(output.outputs[0]["x"], output.outputs[1]["x"])
    assert not torch.equal(output.outputs[0]["y"], output.outputs[1]["y"])


def test_the_pass_that_looks_between_blocks_does_not_write_to_the_callers_arguments():
    def stem(model, batch):
        batch["x"] = batch["x"] * 2
        return model.stem(batch["x"])

    def glued(model, x):
        for i, block in enumerate(model.blocks):
            x = block(x + 1 if i else x)
        return x

    batch, model = {"x": toys.images()}, toys.FunctionToy(stem=stem, loop=glued)
    output = wrap_multicycle(model, 2)(batch)
    assert torch.equal(batch["x"], toys.images())
    torch.testing.assert_close(output.tokens[1], glued(model, output.tokens[0]))
    cyclekd.unwrap_multicycle(model)
    torch.testing.assert_close(output.outputs[0], model({"x": toys.images()}))


def test_random_numbers_before_the_stack_are_those_of_one_stem():
    def stem(model, x):
        model.order = torch.rand(5).argsort()
        return model.stem(x)[:, model.order]

    def tail(model, x):
        return model.head(model.norm(x)[:, model.order.argsort()]).flatten(1)  # back in place, as an autoencoder does

    model = toys.FunctionToy(stem=stem, tail=tail)
    longer = toys.repeated(model, 2)
    for seed in range(3):
        torch.manual_seed(seed)
        found = wrap_multicycle(toys.copy.deepcopy(model), 2)(toys.images()).outputs[1]
        torch.manual_seed(seed)
        torch.testing.assert_close(found, longer(toys.images()))


def test_dropout_in_the_blocks_is_drawn_anew_in_every_cycle():
    model = toys.Toy()
    model.blocks.insert(1, nn.Dropout(0.5))
    output = wrap_multicycle(model, 3, stack="blocks.1:2")(torch.ones(2, 5, 4))
    zeros = [tokens == 0 for tokens in output.tokens]
    assert (zeros[1] & ~zeros[0]).any() and (zeros[2] & ~zeros[1]).any()


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_others_are_part_of_the_block(when):
    model = toys.Toy()

    def put_on(target):
        for block in target.blocks:
            block.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
            block.register_forward_hook(lambda module, args, output: torch.tanh(output))

    longer = toys.repeated(model, 2)
    put_on(model) if when == "before" else wrap_multicycle(model, 2)
    wrap_multicycle(model, 2) if when == "before" else put_on(model)
    longer.blocks = nn.ModuleList([*model.blocks, *model.blocks])
    output = model(toys.images())
    cyclekd.unwrap_multicycle(model)
    torch.testing.assert_close(output.outputs[1], longer(toys.images()))


def test_blocks_exchanged_after_wrapping_are_cycled():
    model = wrap_multicycle(toys.Toy(), 2)
    model.blocks[0] = toys.Block()
    model.blocks.append(toys.Block())
    output = model(toys.images())
    cyclekd.unwrap_multicycle(model)
    torch.testing.assert_close(output.outputs[1], toys.repeated(model, 2)(toys.images()))


def test_a_module_called_inside_a_remembered_one_is_not_mistaken_for_its_own_call():
    class Embedding(nn.Module):
        def __init__(self, project):
            super().__init__()
            self.__dict__["project"] = project  # a child of the root, not of this

        def forward(self, x):
            return torch.tanh(self.project(x))

    def stem(model, x):
        return model.embedding(x) + model.stem(2 * x)

    model = toys.FunctionToy(stem=stem)
    model.embedding = Embedding(model.stem)
    assert_cycles_match_repeated_blocks(model, toys.images())


def test_one_block_with_several_inputs_for_its_tokens_is_refused():
    def loop(model, x):
        return model.blocks[0](toys.images(tokens=5) @ torch.ones(4, 8), x)

    class Cross(toys.Block):
        def forward(self, context, x):
            return super().forward(x + context)

    model = wrap_multicycle(toys.FunctionToy(Cross, loop=loop, depth=1), 2, stack="blocks")
    with pytest.raises(CycleError, match=r"only one block of the stack 'blocks' was called, and 2 of its inputs"):
        model(toys.images())


def test_what_is_carried_is_known_from_earlier_passes_where_layerdrop_leaves_one_block():
    class Conditioned(toys.Block):
        def forward(self, x, condition):
            return super().forward(x + condition)

    def loop(model, x):
        condition = torch.ones_like(x)
        for block in model.blocks:
            if model.kept is None or block in model.kept:
                x = block(x, condition)
        return x

    model = toys.FunctionToy(Conditioned, loop=loop)
    model.kept = [model.blocks[1]]
    wrap_multicycle(model, 2, stack="blocks")
    with pytest.raises(CycleError, match=r"only one block"):
        model(toys.images())
    model.kept = None
    model(toys.images())
    model.kept = [model.blocks[1]]
    first, second = model(toys.images()).tokens
    torch.testing.assert_close(second, model.blocks[1](first, torch.ones_like(first)))


def test_nested_tensors_are_carried():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = wrap_multicycle(nn.TransformerEncoder(layer, 3), 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        first, second = run_cycles(model, x, src_key_padding_mask=padding).outputs
        assert torch.equal(first, model(x, src_key_padding_mask=padding))
    assert (first - second).abs().max() > 1e-3


def test_tokens_are_a_tuple_where_blocks_carry_several_tensors():
    output = wrap_multicycle(toys.TwoStreamToy(), 2, stack="blocks")(toys.images())
    assert [t.shape for t in output.tokens[1]] == [(2, 5, toys.WIDTH), (2, 2, toys.WIDTH)]


def test_a_tensor_that_blocks_hand_through_untouched_is_no_token():
    output = wrap_multicycle(toys.BiasToy(), 2)(toys.images())
    assert isinstance(output.tokens[0], torch.Tensor)


@pytest.mark.parametrize("changing", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_a_tensor_that_some_block_hands_through_untouched_is_carried_and_no_token(changing):
    class Positioned(toys.Block):
        index = 0

        def forward(self, x, table):
            return super().forward(x + table), 2 * table if self.index in changing else table

    def loop(model, x):
        table = torch.full_like(x, 0.1)
        for index, block in enumerate(model.blocks):
            block.index = index
            x, table = block(x, table)
        return x

    model = toys.FunctionToy(Positioned, loop=loop)
    assert len(model.blocks) == 3
    first, second = wrap_multicycle(model, 2, stack="blocks")(toys.images()).tokens
    x, table = first, torch.full_like(first, 0.1 * 2 ** len(changing))  # as it left the stack
    for block in model.blocks:
        x, table = block(x, table)
    torch.testing.assert_close(second, x)


def test_token_count_may_shrink_through_the_stack():
    model = toys.PruningToy()
    output = wrap_multicycle(model, 2, stack="blocks")(toys.images())
    assert [tokens.shape[1] for tokens in output.tokens] == [3, 3]
    x = output.tokens[0]
    for block in model.blocks:
        x = block(x)
    torch.testing.assert_close(output.tokens[1], x)


def test_a_tail_that_writes_on_the_tokens_is_refused():
    with pytest.raises(CycleError, match=r"Block's stack wrote in place.*x = x \+ y"):
        wrap_multicycle(toys.InPlaceTail(), 2)(toys.images())


# -- the stem runs once ------------------------------------------------------------------------------------------------


def test_stem_runs_once_and_stack_and_tail_n_times():
    model = wrap_multicycle(toys.Toy(), 3)
    calls = {"stem": 0, "blocks": 0, "head": 0}
    for name, module in [("stem", model.stem), ("blocks", model.blocks[0]), ("head", model.head)]:
        original = type(module).forward
        counted = type(type(module).__name__, (type(module),), {})

        def forward(self, *args, name=name, original=original):
            calls[name] += 1
            return original(self, *args)

        counted.forward = forward
        module.__class__ = counted
    model(toys.images())
    assert calls == {"stem": 1, "blocks": 3, "head": 3}


def test_stem_dropout_is_the_same_in_every_cycle():
    model = toys.Toy()
    model.stem = nn.Sequential(model.stem, nn.Dropout(0.5))
    for block in model.blocks:
        nn.init.zeros_(block.mix.weight), nn.init.zeros_(block.mix.bias)  # so that tokens are the stem's
    output = wrap_multicycle(model, 2)(toys.images())
    torch.testing.assert_close(output.tokens[0], output.tokens[1])


def test_nothing_is_remembered_from_one_forward_to_the_next():
    model = wrap_multicycle(toys.Toy(), 2)
    model(toys.images())
    x = torch.zeros(2, 5, 4)
    torch.testing.assert_close(model(x).outputs[0], toys.repeated(model, 1).eval()(x))


# -- running statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", ["none", "one", "each"] if FRAMES_ARE_VISIBLE else ["none"])
def test_running_statistics_follow_the_first_cycle_alone(frames):
    class Model(toys.BatchNormToy, toys.CheckpointedToy):
        forward_features = toys.CheckpointedToy.forward_features

    model = Model()
    model.frames = frames
    plain = toys.copy.deepcopy(model)
    wrap_multicycle(model, 3)(toys.images()).outputs[2].sum().backward()
    plain(toys.images()).sum().backward()
    for (name, found), (_, expected) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(found, expected), name
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm1d))


def test_modules_exchanged_after_wrapping_are_seen_from_the_next_train_call_on():
    model = wrap_multicycle(toys.BatchNormToy(), 3)
    model.blocks[1] = toys.BatchNormBlock()
    model.norm.bn = nn.BatchNorm1d(toys.WIDTH)
    plain = toys.copy.deepcopy(model)
    model.train()(toys.images())
    cyclekd.unwrap_multicycle(plain)(toys.images())
    for (name, found), (_, expected) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(found, expected), name


def test_batch_norm_arithmetic_in_training_matches_repeated_blocks():
    assert_cycles_match_repeated_blocks(toys.BatchNormToy(), toys.images())


def test_instance_norm_with_running_statistics_is_refused():
    model = toys.Toy()
    model.norm = nn.InstanceNorm1d(5, track_running_stats=True)
    with pytest.raises(CycleError, match=r"'norm' \(InstanceNorm1d\).*track_running_stats=False"):
        wrap_multicycle(model, 2)


# -- LayerDrop ---------------------------------------------------------------------------------------------------------


def test_layerdrop_cycles_are_those_of_the_blocks_that_ran():
    model = toys.LayerDropToy()
    ran = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    output = wrap_multicycle(model, 2)(toys.images())
    assert 0 < len(ran) < 6
    model.rate = 0.0
    x = model.stem(toys.images())
    for i in list(ran):
        x = model.blocks[i](x)
    torch.testing.assert_close(output.tokens[1], x)


def test_a_pass_that_drops_every_block_is_drawn_again():
    model = wrap_multicycle(toys.LayerDropToy(), 2)
    for seed in range(40):  # 1 pass in 8 is empty
        torch.manual_seed(seed)
        output = model(toys.images())
        assert not torch.equal(output.tokens[0], output.tokens[1])


def test_a_stack_that_the_forward_never_calls_is_refused():
    model = toys.LayerDropToy()
    model.rate = 2.0
    counted = []
    model.stem.register_forward_hook(lambda *_: counted.append(1))
    with pytest.raises(CycleError, match=r"no block of the stack 'blocks' was called.*find_stacks"):
        wrap_multicycle(model, 2)(toys.images())
    assert len(counted) == DRAWS_BEFORE_REFUSAL


# -- what cannot be entered again --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "stack", "message"),
    [
        (toys.WideningToy, "blocks", r"leave the stack 'blocks' as \(2, 5, 16\) and enter it as \(2, 5, 8\).*stack="),
        (toys.FlatteningToy, "blocks", r"leave the stack 'blocks' as \(2, 8\) and enter it as \(2, 5, 8\).*stack="),
        (toys.WideningToy, "blocks.2", r"no tensor that enters Widening .*2, 5, 8.*2, 5, 16.*stack="),
        (toys.BoxingToy, "blocks", "BoxingBlock returned Box, in which no tensor was found.*stack="),
        (toys.SiameseToy, "blocks", "stack 'blocks' is entered more than once.*stack="),
    ],
    ids=["width", "rank", "width of one block", "no tensor", "entered twice"],
)
def test_refused_with_module_and_way_out(make, stack, message):
    model = wrap_multicycle(make(), 2, stack=stack)
    with pytest.raises(CycleError, match=message):
        model(toys.images())


def test_an_argument_that_the_first_block_does_not_get_is_refused():
    class Model(toys.ResidualToy):
        def forward_features(self, x):
            x, residual = self.blocks[0](self.stem(x))
            for block in self.blocks[1:]:
                x, residual = block(x, residual)
            return x + residual

    with pytest.raises(CycleError, match=r"first block of the stack 'blocks' is called without the argument"):
        wrap_multicycle(Model(), 2, stack="blocks")(toys.images())


# -- caches ------------------------------------------------------------------------------------------------------------


def test_a_filled_cache_is_refused():
    cache = toys.Cache()
    cache.states.append(torch.randn(2, 5, toys.WIDTH))
    model = wrap_multicycle(toys.CachingToy(), 2)
    with pytest.raises(CycleError, match=r"past_key_values brings a filled cache \(Cache\).*use_cache=False"):
        model(toys.images(), past_key_values=cache)
    with pytest.raises(CycleError, match=r"argument 1 brings a filled cache"):
        model(toys.images(), cache)
    with pytest.raises(CycleError, match=r"past_key_values brings a filled cache"):
        model(toys.images(), past_key_values=((torch.zeros(1), torch.zeros(1)),))


def test_an_empty_cache_is_filled_by_the_first_cycle_alone():
    model = toys.CachingToy()
    cache = toys.Cache()
    output = wrap_multicycle(model, 2)(toys.images(), past_key_values=cache)
    assert len(cache.states) == 1 and torch.equal(cache.states[0], output.tokens[0])
    torch.testing.assert_close(output.outputs[1], model.forward_head(output.tokens[1]))


def test_a_cache_is_no_concern_of_one_cycle():
    cache = toys.Cache()
    cache.states.append(torch.randn(2, 5, toys.WIDTH))
    output = wrap_multicycle(toys.CachingToy(), 1)(toys.images(), past_key_values=cache)
    assert len(output.outputs) == 1 and len(cache.states) == 2


# -- ways in besides forward -------------------------------------------------------------------------------------------


def test_other_entry_points_make_one_pass_in_training():
    model = wrap_multicycle(toys.Toy(), 2)
    x = toys.images()
    assert torch.equal(model.forward_features(x), run_cycles(model, x, cycles=1).tokens[0])


def test_an_exception_in_the_forward_leaves_the_model_usable():
    model = wrap_multicycle(toys.Toy(), 2)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2"):
        model(torch.randn(2, 5, 7))
    assert len(model(toys.images()).outputs) == 2


class RecurrentCache:
    """As transformers keeps the states of Mamba layers: without a length."""

    def __init__(self, filled):
        self.layers = [SimpleNamespace(has_previous_state={0: filled})]

    def get_seq_length(self):
        raise ValueError("no attention layer")


def test_a_recurrent_cache_is_taken_empty_and_refused_filled():
    calls = calls_with_own_caches((), {"cache_params": RecurrentCache(filled=False)}, cycles=2)
    assert len({id(kwargs["cache_params"]) for _, kwargs in calls}) == len(calls)
    with pytest.raises(CycleError, match=r"cache_params brings a filled cache \(RecurrentCache\)"):
        calls_with_own_caches((), {"cache_params": RecurrentCache(filled=True)}, cycles=2)


def test_the_stem_runs_in_every_cycle_where_its_states_are_collected():
    class Collecting(toys.Toy):
        def forward(self, x, output_hidden_states=False):
            return super().forward(x)

    model = wrap_multicycle(Collecting(), 3)
    plain, collected = model(toys.images()), model(toys.images(), output_hidden_states=True)
    for found, expected in zip(collected.outputs, plain.outputs, strict=True):
        assert torch.equal(found, expected)
    assert stem_runs(model) == 1 and stem_runs(model, output_hidden_states=True) == 3


def stem_runs(model, **kwargs):
    """How often the stem's own forward runs in one call, and not what is remembered of it."""
    ran, forward = [], type(model.stem).forward

    def counting(self, x):
        ran.extend([1] if self is model.stem else [])
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.stem), "forward", counting)
        model(toys.images(), **kwargs)
    return len(ran)


def test_tokens_that_every_block_changes_in_place_are_tokens():
    class InPlace(toys.Block):
        def forward(self, x):
            return x.copy_(super().forward(x.clone()))

    def loop(model, x):
        for block in model.blocks:
            x = block(x)
        return x

    model = toys.FunctionToy(InPlace, loop=loop)
    with torch.no_grad():
        first, second = run_cycles(wrap_multicycle(model, 2, stack="blocks"), toys.images()).tokens
        assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
        x = first.clone()
        for block in model.blocks:
            x = block(x)
    torch.testing.assert_close(second, x)


def test_where_one_block_in_place_hands_everything_through_the_others_tell_what_is_a_token():
    class Positioned(toys.Block):
        index = 0

        def forward(self, x, table):
            new = super().forward(x + table)
            return (x.copy_(new) if self.index == 0 else new), table

    def loop(model, x):
        x, table = x.clone(), torch.full_like(x, 0.1)
        for index, block in enumerate(model.blocks):
            block.index = index
            x, table = block(x, table)
        return x

    model = wrap_multicycle(toys.FunctionToy(Positioned, loop=loop), 2, stack="blocks")
    with torch.no_grad():
        tokens = run_cycles(model, toys.images()).tokens
    assert all(isinstance(each, torch.Tensor) for each in tokens)


def test_whole_numbers_that_blocks_count_up_are_carried_and_no_tokens():
    class Counting(toys.Block):
        def forward(self, x, order):
            return super().forward(x), order + 1

    def loop(model, x):
        order = torch.zeros(x.shape[:2], dtype=torch.long)
        for block in model.blocks:
            x, order = block(x, order)
        return x

    tokens = wrap_multicycle(toys.FunctionToy(Counting, loop=loop), 2, stack="blocks")(toys.images()).tokens
    assert all(isinstance(each, torch.Tensor) and each.is_floating_point() for each in tokens)
