"""Which blocks are taken for the stack, and how the choice is named, shown and refused."""

import pytest
import timm
import torch
from torch import nn

import toys
from cyclekd import CycleError, find_stacks, wrap_multicycle
from cyclekd.stacks import choose_stack, stack_blocks, stem_modules


class NeverCalled(toys.Toy):
    def forward(self, x):
        raise AssertionError("a forward was run")


def test_a_single_list_of_alike_blocks_is_chosen_without_a_forward():
    assert choose_stack(NeverCalled()) == "blocks"


def test_hierarchical_models_are_settled_by_a_forward():
    model = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, num_heads=(1, 1, 2, 2))
    found = find_stacks(model)
    assert found[0].path == choose_stack(model) == "layers.2.blocks"
    assert found[0].blocks == 6 and found[0].shape == (1, 14, 14, 96)
    assert {stack.path for stack in found} == {f"layers.{i}.blocks" for i in range(4)}


def test_blocks_that_change_the_shape_are_left_out_of_the_run():
    model = timm.create_model("hiera_tiny_224", embed_dim=24, num_heads=1)
    assert choose_stack(model) == "blocks.4:10"


def test_candidates_print_as_a_table():
    text = str(find_stacks(toys.Toy(), toys.images()))
    assert text.splitlines() == ["stack   blocks  share  tokens", "blocks       3  76.1%  2x5x8"]
    assert str(find_stacks(nn.Linear(2, 2), torch.zeros(1, 2))) == "no stack found"


def test_example_inputs_may_be_a_tensor_a_tuple_or_a_dict():
    for inputs in (toys.images(), (toys.images(),), {"x": toys.images()}):
        assert find_stacks(toys.Toy(), inputs)[0].shape == (2, 5, 8)
    with pytest.raises(CycleError, match=r"example_inputs is a list: give a tensor, a tuple"):
        find_stacks(toys.Toy(), [toys.images()])


def test_without_a_forward_candidates_have_no_shape():
    (stack,) = find_stacks(toys.Toy())  # no image fits it
    assert stack.path == "blocks" and stack.shape is None and stack.blocks == 3


def test_the_forward_changes_no_mode_no_statistics_and_no_random_state():
    model = toys.BatchNormToy()
    model.blocks[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    find_stacks(model, toys.images())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_forward_does_not_move_the_first_training_step():
    swin = dict(embed_dim=24, num_heads=(1, 1, 2, 2), img_size=56, window_size=7)
    models = [timm.create_model("swin_tiny_patch4_window7_224", **swin) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    wrap_multicycle(models[1], 1)
    x, outputs = torch.randn(1, 3, 56, 56), []
    for model in models:
        torch.manual_seed(3)
        outputs.append(model.train()(x))
    assert torch.equal(outputs[0], outputs[1].outputs[0])


# -- paths -------------------------------------------------------------------------------------------------------------


def test_a_part_of_the_stack_can_be_cycled():
    model = toys.Toy()
    output = wrap_multicycle(model, 2, stack="blocks.1:3")(toys.images())
    x = output.tokens[0]
    for block in model.blocks[1:]:
        x = block(x)
    torch.testing.assert_close(output.tokens[1], x)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("blocks", [0, 1, 2]), ("blocks.:2", [0, 1]), ("blocks.1:", [1, 2]), ("blocks.1:2", [1]), ("blocks.2", [2])],
)
def test_paths_name_blocks(path, expected):
    model = toys.Toy()
    assert stack_blocks(model, path) == [model.blocks[i] for i in expected]


def test_lists_within_lists_are_laid_flat():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleList([toys.Block(), toys.Block()]) for _ in range(2)])
    assert stack_blocks(model, "layers") == [block for layer in model.layers for block in layer]


def test_numbered_children_are_a_list():
    model = nn.Module()
    model.stage = nn.Module()
    model.stage.b1, model.stage.b2 = toys.Block(), toys.Block()
    assert stack_blocks(model, "stage") == [model.stage.b1, model.stage.b2]


def test_a_block_with_some_numbered_children_is_one_block():
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3)  # its blocks have norm1 and norm2
    assert stack_blocks(model, "blocks.1") == [model.blocks[1]]


def test_stem_is_what_stands_outside_the_stack():
    model = toys.Toy()
    assert stem_modules(model, ["blocks"]) == [model.stem, model.norm, model.head]
    assert stem_modules(model, ["blocks.1:3"]) == [model.stem, model.blocks[0], model.norm, model.head]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_path_that_leads_nowhere_is_refused_with_those_that_do():
    with pytest.raises(CycleError, match=r"Toy has no module 'layers' \(from stack='layers'\).*: blocks"):
        wrap_multicycle(toys.Toy(), 2, stack="layers")
    with pytest.raises(CycleError, match=r"selects none of the 3 blocks of 'blocks'"):
        wrap_multicycle(toys.Toy(), 2, stack="blocks.7:9")


def test_no_stack_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(CycleError, match=r"found no stack in Sequential.*stack="):
        wrap_multicycle(model, 2, example_inputs=torch.zeros(1, 4))


def test_several_equal_stacks_are_listed_and_refused():
    with pytest.raises(
        CycleError, match=r"found 2 equal stacks in TwinToy: blocks \(3\), more \(3\).*Choose one.*stack="
    ):
        wrap_multicycle(toys.TwinToy(), 2, example_inputs=toys.images())


def test_without_inputs_that_fit_example_inputs_are_asked_for():
    with pytest.raises(CycleError, match=r"TwinToy.*no inputs.*blocks \(3\), more \(3\).*example_inputs.*stack="):
        wrap_multicycle(toys.TwinToy(), 2)


def test_on_the_meta_device_an_unclear_stack_has_to_be_named():
    with torch.device("meta"):
        model, clear = toys.TwinToy(), toys.Toy()
    with pytest.raises(CycleError, match=r"TwinToy.*meta device.*name the stack"):
        wrap_multicycle(model, 2)
    output = wrap_multicycle(model, 2, stack="more")(torch.zeros(2, 5, 4, device="meta"))
    assert output.tokens[1].shape == (2, 5, 8) and output.tokens[1].is_meta
    assert len(wrap_multicycle(clear, 2)(torch.zeros(2, 5, 4, device="meta")).outputs) == 2


def test_an_error_of_the_callers_own_inputs_is_not_hidden():
    with pytest.raises(RuntimeError, match=r"mat1 and mat2"):
        wrap_multicycle(toys.TwinToy(), 2, example_inputs=torch.zeros(2, 5, 7))


def test_lists_that_take_turns_are_no_stack():
    class TakingTurns(toys.Toy):
        def __init__(self):
            super().__init__()
            self.mixers = nn.ModuleList([nn.Linear(8, 8) for _ in self.blocks])

        def forward_features(self, x):
            x = self.stem(x)
            for mixer, block in zip(self.mixers, self.blocks, strict=True):
                x = x + mixer(x)
                x = x + block(x)  # the residual passes by the block and would not be carried
            return x

    assert find_stacks(TakingTurns(), toys.images()) == []
    with pytest.raises(CycleError, match=r"found no stack in TakingTurns.*take turns"):
        wrap_multicycle(TakingTurns(), 2, example_inputs=toys.images())
    with pytest.raises(CycleError, match=r"TakingTurns does not show which.*example_inputs"):
        wrap_multicycle(TakingTurns(), 2)


def test_a_stack_of_next_to_no_parameters_has_to_be_named():
    model = toys.Toy()
    model.table = nn.Embedding(10_000, 8)
    with pytest.raises(CycleError, match=r"largest stack found in Toy, blocks, holds 0\.\d%.*stack=\"blocks\""):
        wrap_multicycle(model, 2, example_inputs=toys.images())
    assert len(wrap_multicycle(model, 2, stack="blocks")(toys.images()).outputs) == 2
