"""Every pose model equals the plain one of benchmarks/pose/plain.py: outputs, tokens, pruned places and gradients.

That one shares no code with ours, and is itself held against the published reference in tests/test_pose_golden.py. In
fp64, so that equality means 1e-9 and not a choice of tolerance.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise

import einops
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from benchmarks.pose.plain import Cycle, PlainPose
from cyclekd import CycleLoss, find_stacks, run_cycles, unwrap_multicycle, wrap_multicycle
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.models import tokenpose as pose_model
from cyclekd.integrations.tokenpose.models.config import PRESETS, tokens_kept
from cyclekd.integrations.tokenpose.models.create import create_model, list_models
from cyclekd.integrations.tokenpose.models.tokenpose import annealed_keep_rate, set_keep_rate, token_groups
from cyclekd.integrations.tokenpose.models.transformer import Block

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
SMALL = (64, 48)  # a grid of 4 x 4 tokens with patches of 4 x 3
TINY = {"input_size": SMALL, "stage1_width": 8, "dim": 32, "heads": 4, "depth": 4, "num_keypoints": 5}

MILLIONS = {  # of trainable parameters, counted on the published code
    "tokenpose_s_v1": 6.621,
    "tokenpose_s_v2": 6.228,
    "tokenpose_t_6": 4.399,
    "tokenpose_b": 13.465,
    "tokenpose_b_narrow": 13.146,
    "tokenpose_l_d24": 27.482,
    "sdpose_t": 4.399,
    "sdpose_s_v1": 6.621,
    "sdpose_s_v2": 6.228,
    "sdpose_b": 13.465,
    "sdpose_b_narrow": 13.146,
    "ppt_s": 6.621,
    "ppt_b": 13.465,
    "ppt_b_narrow": 13.146,
    "sdpose_s_v1_ppt": 6.621,
    "tokenreg_s": 5.364,
    "sdpose_reg": 5.364,
}


def lively(name: str, **overrides: object) -> nn.Module:
    """A model whose weights make a difference, in fp64; those of the initialisation are tiny."""
    model = create_model(name, **overrides)
    torch.manual_seed(0)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight.normal_(std=(1.5 / module.weight[0].numel()) ** 0.5)
                if module.bias is not None:
                    module.bias.normal_(std=0.1)
            elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
                module.weight.normal_(1, 0.1)
                module.bias.normal_(std=0.1)
        model.keypoint_tokens.normal_(std=0.5)
        for norm in norms:
            norm.momentum = 1.0
        model.backbone(pictures(model))  # running statistics that fit
        for norm in norms:
            norm.momentum = 0.1
    return model.double()


def pictures(model: nn.Module, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *model.config.input_size, dtype=model.keypoint_tokens.dtype)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What pruning blocks chose, in the order of the calls."""
    calls: list[Tensor] = []
    choose = Block.choose

    def recording(self: Block, q: Tensor, k: Tensor) -> Tensor:
        calls.append(choose(self, q, k))
        return calls[-1]

    monkeypatch.setattr(Block, "choose", recording)
    yield calls


def cycles_of(model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(output, tokens) of every cycle, or of the only pass."""
    if model.config.cycles > 1:
        output = run_cycles(model, images)
        return list(zip(output.outputs, output.tokens, strict=True))
    left: list[Tensor] = []
    hook = model.blocks[-1].register_forward_hook(lambda block, inputs, result: left.append(result[0]))
    output = model(images)
    hook.remove()
    return [(output, left[0])]


def check_equal(ours: list[tuple[Tensor, Tensor]], chosen: list[Tensor], plain: list[Cycle], keypoints: int) -> None:
    for (output, tokens), cycle in zip(ours, plain, strict=True):
        torch.testing.assert_close(output, cycle.output, **CLOSE)
        torch.testing.assert_close(tokens, cycle.tokens, **CLOSE)
    expected = [kept for cycle in plain for kept in cycle.kept]
    for ours_kept, kept in zip(chosen, expected, strict=True):
        assert torch.equal(ours_kept[:, keypoints:] - keypoints, kept)
        assert torch.equal(ours_kept[:, :keypoints], torch.arange(keypoints).expand(len(kept), -1))
    for one, next_ in pairwise(plain):
        assert (one.output - next_.output).abs().max() > 1e-3  # or this would compare little


def objective(cycles: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Another weight for every number, so that no gradient cancels."""
    total = torch.zeros((), dtype=torch.float64)
    for output, tokens in cycles:
        for each in (output, tokens):
            total = total + (each * torch.linspace(-1, 1, each.numel()).view_as(each)).sum()
    return total


# -- equality with the plain model -------------------------------------------------------------------------------------

EACH_PART_ONCE = (
    "tokenpose_s_v2",
    "tokenpose_l_d24",
    "sdpose_t",
    "sdpose_b_narrow",
    "ppt_b",
    "sdpose_s_v1_ppt",
    "tokenreg_s",
    "sdpose_reg",
)


@pytest.mark.parametrize(
    "name", [name if name in EACH_PART_ONCE else pytest.param(name, marks=pytest.mark.slow) for name in MILLIONS]
)
def test_outputs_tokens_and_gradients_are_those_of_the_plain_model(name: str, chosen: list[Tensor]) -> None:
    model = lively(name, input_size=SMALL).eval()
    plain, images = PlainPose(model), pictures(model)
    with torch.no_grad():
        check_equal(cycles_of(model, images), chosen, plain(images), model.config.num_keypoints)
    chosen.clear()
    ours, expected = cycles_of(model.train(), images), plain.train()(images)
    check_equal(ours, chosen, expected, model.config.num_keypoints)
    objective(ours).backward()
    objective([(cycle.output, cycle.tokens) for cycle in expected]).backward()
    check_gradients(model, plain)
    running = dict(plain.named_buffers())
    for key, buffer in model.backbone.named_buffers():
        torch.testing.assert_close(buffer, running[f"backbone.{key}"], **CLOSE)


def check_gradients(model: nn.Module, plain: nn.Module) -> None:
    expected = dict(plain.named_parameters())
    for key, parameter in model.named_parameters():
        atol = 1e-9 * expected[key].grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-6, atol=atol, msg=f"gradient of {key}")


@pytest.mark.parametrize("name", ["sdpose_s_v1_ppt", pytest.param("tokenpose_s_v2", marks=pytest.mark.slow)])
def test_the_published_size_equals_the_plain_model(name: str, chosen: list[Tensor]) -> None:
    model = lively(name).eval()
    plain, images = PlainPose(model), pictures(model, batch=1)
    with torch.no_grad():
        ours, expected = cycles_of(model, images), plain(images)
    check_equal(ours, chosen, expected, 17)
    assert ours[0][0].shape == (1, 17, 64, 48)
    assert len(model.head.mlp) == 4  # two layers, each after a LayerNorm


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_keypoints": 14},
        {"input_size": (128, 96)},
        {"input_size": (128, 96), "dim": 48},  # a head of two layers: 48 is half of 32 * 24 / 8
        {"input_size": (96, 144), "patch_size": (2, 4)},  # wider than high
        {"attention_scale": "dim"},
        {"mlp_ratio": 2.0, "heads": 4},
        {"groups": 2, "depth": 6, "keep_rate": 0.5, "prune_at": (2, 4)},
        {"head": "rle", "head_hidden": 384},
    ],
    ids=str,
)
def test_other_sizes_equal_the_plain_model(overrides: dict[str, object], chosen: list[Tensor]) -> None:
    model = lively("sdpose_t", **{"input_size": SMALL, "depth": 4, **overrides}).eval()
    images = pictures(model)
    with torch.no_grad():
        ours = cycles_of(model, images)
        check_equal(ours, chosen, PlainPose(model)(images), model.config.num_keypoints)
    assert len(model.head.mlp) == (4 if {"dim", "head"} & overrides.keys() else 2)


# -- pruning -----------------------------------------------------------------------------------------------------------


def test_pruning_leaves_180_then_126_then_89_of_256_tokens() -> None:
    assert tokens_kept(PRESETS["ppt_s"], 0.7) == {3: 180, 6: 126, 9: 89}
    model = create_model("ppt_s").eval()
    left = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, result: left.append(result[0].shape[1] - 17))
    with torch.no_grad():
        model(pictures(model, batch=1))
    assert left == [256] * 3 + [180] * 3 + [126] * 3 + [89] * 3


def test_images_of_a_batch_keep_tokens_of_their_own(chosen: list[Tensor]) -> None:
    model = lively("ppt_s", input_size=SMALL).eval()
    images = pictures(model)
    with torch.no_grad():
        both = model(images)
        assert not torch.equal(chosen[0][0], chosen[0][1])
        torch.testing.assert_close(model(images[1:]), both[1:], **CLOSE)


def test_only_the_first_cycle_prunes_and_positions_follow_the_tokens_into_the_second(chosen: list[Tensor]) -> None:
    model = lively("sdpose_s_v1_ppt", input_size=SMALL).eval()
    positions = []
    model.blocks[-1].register_forward_hook(lambda block, inputs, result: positions.append(result[1]))
    with torch.no_grad():
        output = run_cycles(model, pictures(model))
    assert [kept.shape[1] for kept in chosen] == [17 + 12, 17 + 9, 17 + 7]  # and no fourth
    assert [tokens.shape[1] for tokens in output.tokens] == [17 + 7, 17 + 7]
    place = chosen[0]  # in the grid, of the tokens that are left
    for kept in chosen[1:]:
        place = place.gather(1, kept)
    assert torch.equal(positions[0], model.positions[0][place])
    assert torch.equal(positions[1], positions[0])


def test_no_gradient_and_no_parameter_belongs_to_the_choice(chosen: list[Tensor]) -> None:
    model = lively("ppt_s", input_size=SMALL)
    model(pictures(model)).sum().backward()
    assert not any(kept.requires_grad for kept in chosen)
    assert create_model("ppt_s", **TINY, prune_at=(2,)).state_dict().keys() == (
        create_model("tokenpose_s_v1", **TINY).state_dict().keys()
    )


@pytest.mark.parametrize("pruning", [{}, {"keep_rate": 0.7, "prune_at": (1,)}], ids=["plain", "pruning"])
def test_wrapping_by_hand_finds_the_blocks_as_in_any_other_model(pruning: dict[str, object]) -> None:
    model = create_model("tokenpose_s_v1", **TINY, **pruning)
    images = torch.randn(2, 3, *SMALL)
    assert find_stacks(model)[0].path == "blocks"
    by_hand = run_cycles(wrap_multicycle(model, 2), images)
    named = create_model("sdpose_s_v1", **TINY, **pruning)
    named.load_state_dict(model.state_dict())
    for found, expected in zip(by_hand.outputs, run_cycles(named, images).outputs, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("prune_at", [(0,), (1,), (0, 1), (2,)])
def test_positions_are_no_tokens_wherever_pruning_begins(prune_at: tuple[int, ...]) -> None:
    model = create_model("sdpose_s_v1", **{**TINY, "depth": 4}, keep_rate=0.5, prune_at=prune_at)
    output = run_cycles(model, torch.randn(2, 3, 64, 48))
    assert all(isinstance(tokens, Tensor) for tokens in output.tokens)
    loss = CycleLoss.paper(lambda heatmaps, _: heatmaps.square().mean(), groups=token_groups(model))
    assert loss(output).token_mse.keys() == {"keypoint", "visual"}


def test_the_published_schedule_waits_10_epochs_and_falls_for_100() -> None:
    assert [annealed_keep_rate(epoch) for epoch in (0, 10)] == [1.0, 1.0]
    assert [annealed_keep_rate(epoch) for epoch in (60, 110, 300)] == pytest.approx([0.85, 0.7, 0.7])
    assert annealed_keep_rate(35) == pytest.approx(0.7 + 0.3 * (1 + 0.5**0.5) / 2)
    assert [annealed_keep_rate(epoch, anneal=0) for epoch in (9, 10)] == pytest.approx([1.0, 0.7])


def test_the_keep_rate_can_be_annealed_between_steps() -> None:
    model = lively("sdpose_s_v1_ppt", input_size=SMALL).eval()
    plain, images = PlainPose(model), pictures(model)
    for keep_rate, left in [(1.0, 16), (0.85, 11), (0.7, 7), (0.3, 1)]:
        set_keep_rate(model, keep_rate)
        plain.keep_rate = keep_rate
        with torch.no_grad():
            ours, expected = cycles_of(model, images), plain(images)
        assert ours[0][1].shape[1] == ours[1][1].shape[1] == 17 + left
        check_equal(ours, [], [cycle._replace(kept=[]) for cycle in expected], 17)


# -- cycles ------------------------------------------------------------------------------------------------------------


def test_patches_are_cut_once_for_all_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[str] = []

    def rearrange(tensor: Tensor, pattern: str, **sizes: int) -> Tensor:
        cut.append(pattern)
        return einops.rearrange(tensor, pattern, **sizes)

    monkeypatch.setattr(pose_model, "rearrange", rearrange)
    model = create_model("sdpose_t", **TINY)
    assert len(model(pictures(model)).outputs) == 3 and len(cut) == 1


@pytest.mark.parametrize("backbone", ["stem", "hrnet_w18_small", "hrnet_w32"])
def test_a_backbone_works_channels_last_but_in_training_on_a_cpu(backbone: str) -> None:
    model = create_model("tokenpose_s_v1", **TINY, backbone=backbone)
    assert model.backbone(pictures(model)).is_contiguous()
    with torch.no_grad():
        assert model.backbone(pictures(model)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("backbone", "features"), [("stem", 32), ("hrnet_w18_small", 16), ("hrnet_w32", 32), ("hrnet_w48", 48)]
)
def test_a_backbone_has_so_many_features_at_a_quarter_of_the_input(backbone: str, features: int) -> None:
    with torch.device("meta"):
        model = create_model("tokenpose_s_v1", **TINY, backbone=backbone)
        found = model.backbone(torch.zeros(2, 3, *model.config.input_size))
    assert found.shape == (2, features, *model.config.feature_size) and model.backbone.num_features == features


def test_evaluation_of_a_wrapped_model_is_bit_equal_to_the_plain_pass() -> None:
    model = create_model("sdpose_s_v1_ppt", **TINY, prune_at=(2,)).eval()
    single = create_model("sdpose_s_v1_ppt", **TINY, prune_at=(2,), cycles=1).eval()
    single.load_state_dict(model.state_dict())
    images = pictures(model)
    assert torch.equal(model(images), single(images))
    assert torch.equal(model.train()(images).outputs[0], single.train()(images))


def test_forward_features_are_the_tokens_of_the_first_cycle() -> None:
    model = lively("sdpose_t", **TINY).eval()
    images = pictures(model)
    with torch.no_grad():
        assert torch.equal(model.forward_features(images), run_cycles(model, images).tokens[0])


def test_token_groups_are_keypoints_and_the_rest() -> None:
    model = lively("sdpose_s_v1", **TINY)
    output = model(pictures(model))
    parts = CycleLoss(lambda heatmaps, target: heatmaps.sum(), alpha=2.0, groups=token_groups(model))(output)
    first, second = output.tokens
    torch.testing.assert_close(parts.token_mse["keypoint"][0], (first - second)[:, :5].square().mean())
    torch.testing.assert_close(parts.token_mse["visual"][0], (first - second)[:, 5:].square().mean())


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_compiled_model_cycles_and_prunes_alike_without_a_graph_break(backend: str) -> None:
    model = lively("sdpose_s_v1_ppt", **{**TINY, "depth": 3}, prune_at=(2,))
    images = pictures(model)
    expected = model(images)
    compiled_model = torch.compile(model, fullgraph=True, backend=backend)
    assert token_groups(compiled_model) == token_groups(model)
    compiled = compiled_model(images)
    for ours, theirs in zip((*compiled.outputs, *compiled.tokens), (*expected.outputs, *expected.tokens), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    sum(output.sum() for output in compiled.outputs).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_autocast_in_bf16_stays_near_and_trains() -> None:
    model = lively("sdpose_s_v1_ppt", **TINY, prune_at=(2,)).float()
    images = pictures(model)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    for near, heatmaps in zip(output.outputs, expected.outputs, strict=True):
        assert (near - heatmaps).abs().mean() < 0.05 * heatmaps.std()
    sum(heatmaps.float().sum() for heatmaps in output.outputs).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_of_a_wrapped_model_cycle_too(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = lively("sdpose_s_v1_ppt", **TINY, prune_at=(2,)).eval()
    other, images = copied(model), pictures(model)
    with torch.no_grad():
        for ours, theirs in zip(run_cycles(model, images).outputs, run_cycles(other, images).outputs, strict=True):
            assert torch.equal(ours, theirs)
    assert other.config == model.config
    assert type(unwrap_multicycle(other)).__name__ == "TokenPose"


# -- presets -----------------------------------------------------------------------------------------------------------


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in create_model(name).parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", MILLIONS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert round(parameters(name) / 1e6, 3) == MILLIONS[name]


def test_the_two_widths_of_hrnet_have_their_exact_numbers_of_parameters() -> None:
    assert parameters("tokenpose_b") == 13_465_216
    assert parameters("tokenpose_b_narrow") == 13_145_984  # the released configuration's slip


@pytest.mark.parametrize(
    "name, millions",  # table 1 of HRNet (CVPR 2019) for the first three; ResNet-50 and one linear layer for the last
    [("simplebaseline_r50", 34.0), ("simplebaseline_r101", 53.0), ("simplebaseline_r152", 68.6), ("rle_r50", 23.6)],
)
def test_the_baselines_have_their_number_of_parameters(name: str, millions: float) -> None:
    assert round(parameters(name) / 1e6, 1) == millions


def test_every_preset_is_listed_and_counted() -> None:
    assert set(list_models()) == MILLIONS.keys() | set(list_models("simplebaseline*")) | {"rle_r50"}
    assert list_models("ppt*") == ["ppt_b", "ppt_b_narrow", "ppt_s"]
    assert list_models("nothing*") == []


@pytest.mark.parametrize("name, shape", [("simplebaseline_r50", (1, 14, 16, 8)), ("rle_r50", (1, 14, 4))])
def test_the_baselines_give_heatmaps_or_coordinates(name: str, shape: tuple[int, ...]) -> None:
    model = create_model(name, num_keypoints=14, input_size=(64, 32)).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 32)).shape == shape


def test_new_models_have_the_published_initialisation() -> None:
    model = create_model("tokenpose_s_v1")
    for weight, std in [
        (model.keypoint_tokens, 0.02),
        (model.patch_embed.weight, 0.02),
        (model.blocks[0].attn.qkv.weight, 0.02),
        (model.head.mlp[3].weight, 0.02),
        (model.backbone.conv2.weight, 0.001),
        (model.backbone.layer1[3].conv2.weight, 0.001),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert not model.blocks[5].mlp.fc1.bias.any()
    assert torch.equal(model.blocks[5].norm1.weight, torch.ones(192))


# -- sampled numbers ---------------------------------------------------------------------------------------------------


def spread(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers from -0.5 to 0.5 made of whole-number arithmetic, the same on every machine."""
    index = torch.arange(math.prod(shape), dtype=torch.int64)
    return ((index * 7919 + (index // 17) * 31 + seed * 104_729) % 10_007 / 10_007 - 0.5).double().view(shape)


def formula_model(scale: str) -> nn.Module:
    """Two cycles of a tiny pruning model, every number in it by a formula."""
    model = create_model("sdpose_s_v1_ppt", **TINY, prune_at=(2,), attention_scale=scale).double().eval()
    state = {}
    for seed, (key, value) in enumerate(sorted(model.state_dict().items())):
        drawn = spread(tuple(value.shape), seed)
        if key.endswith("num_batches_tracked"):
            state[key] = value
        elif value.ndim == 1:
            state[key] = drawn.abs() + 0.5 if key.endswith(("weight", "running_var")) else drawn
        else:
            state[key] = drawn * (12 / math.prod(value.shape[1:])) ** 0.5
    model.load_state_dict(state)
    return model


PICKS = [0, 0, 1, 1, 1, 0], [0, 2, 4, 0, 3, 4], [0, 7, 15, 3, 8, 12], [0, 5, 11, 2, 6, 9]  # image, keypoint, y, x
SAMPLED = {
    "head": (
        [-1.74804916, 0.20464348, -0.47555548, 1.37165520, 1.11836582, 0.60665303],
        [-1.56613330, 0.47250727, -0.69602889, 1.37681788, 1.25120553, 0.75945196],
    ),
    "dim": (
        [-1.70556365, 0.25047711, -0.40485344, 1.36394962, 1.11005089, 0.53732404],
        [-1.53201149, 0.49864094, -0.66890578, 1.36526462, 1.24581666, 0.72442425],
    ),
}


@pytest.mark.parametrize("scale", SAMPLED)
def test_sampled_heatmap_values_are_what_they_were(scale: str) -> None:
    model = formula_model(scale)
    with torch.no_grad():
        output = run_cycles(model, 4 * spread((2, 3, *SMALL), seed=999))
    for heatmaps, values in zip(output.outputs, SAMPLED[scale], strict=True):
        assert heatmaps[PICKS].tolist() == pytest.approx(values, abs=1e-6)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 192, 256), (3, 256, 192), (1, 4, 256, 192)])
@pytest.mark.parametrize("name", ["tokenpose_s_v1", "rle_r50"])
def test_images_of_another_size_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = create_model(name)
    with pytest.raises(PoseError) as error:
        model(torch.zeros(shape))
    assert f"{name} takes images of ('B', 3, 256, 192), and got {shape}" in str(error.value)
    assert f"create_model({name!r}, input_size=(H, W))" in str(error.value)
    with pytest.raises(PoseError, match=rf"{name} takes normalised images, and got torch.uint8: divide by 255"):
        model(torch.zeros(1, 3, 256, 192, dtype=torch.uint8))


@pytest.mark.parametrize(
    "name, overrides, said",
    [
        ("sdpose_xl", {}, "no pose model is called 'sdpose_xl'; there are tokenpose_s_v1, "),
        ("sdpose_t", {"width": 3, "drop": 1}, "sdpose_t has no drop, width; what can be set is num_keypoints, "),
        ("simplebaseline_r50", {"cycles": 2}, "has no cycles; what can be set is num_keypoints, input_size, "),
        ("sdpose_t", {"backbone": "resnet50"}, "backbone='resnet50' is none of stem, hrnet_w18_small,"),
        ("rle_r50", {"backbone": "stem"}, "backbone='stem' is none of resnet50, "),
        ("sdpose_t", {"attention_scale": "heads"}, "attention_scale='heads' is none of head, dim"),
        ("sdpose_t", {"head": "simcc"}, "head='simcc' is none of heatmap, rle, distilpose"),
        ("sdpose_t", {"input_size": (250, 192)}, "has to be (height, width) in pixels, in multiples of 16 and 12"),
        ("sdpose_t", {"input_size": (256,)}, "input_size=(256,) has to be (height, width) in whole numbers"),
        ("tokenpose_s_v2", {"input_size": (256, 100)}, "in multiples of 8 and 8"),
        ("simplebaseline_r50", {"input_size": (250, 192)}, "in multiples of 32 and 32"),
        ("tokenpose_b", {"input_size": (256, 204)}, "in multiples of 16 and 48"),  # strides of 4, 8 and 16
        ("sdpose_t", {"cycles": True}, "cycles=True has to be a whole number of at least 1"),
        ("sdpose_t", {"depth": 1}, "cycles=3 need at least 2 blocks, and depth=1"),
        ("sdpose_t", {"mlp_ratio": math.inf}, "mlp_ratio=inf has to be a finite number above 0"),
        ("sdpose_t", {"mlp_ratio": 0.001}, "mlp_ratio=0.001 leaves no unit in an MLP"),
        ("ppt_s", {"prune_at": (3, 3)}, "prune_at=(3, 3) names blocks of 0 to 11, each once"),
        (
            "sdpose_s_v1_ppt",
            {"depth": 2, "prune_at": (0, 1)},
            "is every block, and cycles=2 need one that does not prune",
        ),
        ("sdpose_t", {"num_keypoints": 0}, "num_keypoints=0 has to be a whole number of at least 1"),
        ("sdpose_t", {"depth": 2.5}, "depth=2.5 has to be a whole number of at least 1"),
        ("sdpose_t", {"cycles": 0}, "cycles=0 has to be a whole number of at least 1"),
        ("sdpose_t", {"heads": 7}, "dim=192 has to be a multiple of heads=7, and of 4"),
        ("sdpose_t", {"dim": 6, "heads": 3}, "dim=6 has to be a multiple of heads=3, and of 4"),
        ("sdpose_t", {"groups": 4}, "depth=6 does not divide into groups=4"),
        ("sdpose_t", {"patch_size": (0, 3)}, "patch_size=(0, 3) has to be at least 1 each way"),
        ("sdpose_t", {"mlp_ratio": 0}, "mlp_ratio=0 has to be a finite number above 0"),
        ("ppt_s", {"prune_at": 3}, "prune_at=3 has to be indices such as (3, 6, 9) in whole numbers"),
        ("sdpose_t", {"keep_rate": 0.7}, "keep_rate=0.7 needs blocks that prune, as in prune_at=(3, 6, 9)"),
        ("ppt_s", {"keep_rate": 0.0}, "keep_rate=0.0 has to be a finite number above 0"),
        ("ppt_s", {"keep_rate": 1.1}, "keep_rate=1.1 is a share of the tokens, above 0 and at most 1"),
        ("ppt_s", {"depth": 9}, "prune_at=(3, 6, 9) names blocks of 0 to 8"),
        ("tokenpose_s_v1", {"pretrained_backbone": True}, "leave it out, or take tokenpose_b"),
        ("tokenpose_b_narrow", {"pretrained_backbone": True}, "backbone='hrnet_w32', stage1_width=32: leave it out"),
        (
            "sdpose_t",
            {"backbone": "hrnet_w18_small", "pretrained_backbone": True},
            "hrnet_w18_small with 32; this model",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_words(name: str, overrides: dict[str, object], said: str) -> None:
    with pytest.raises(PoseError) as error:
        create_model(name, **overrides)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["tokenpose_b", "rle_r50"])
def test_imagenet_weights_that_cannot_be_had_are_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **settings: object) -> None:
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(PoseError, match=r"the ImageNet weights of \w+ cannot be had \(LocalEntryNotFoundError\)"):
        create_model(name, pretrained_backbone=True)


def test_models_without_keypoint_tokens_are_refused_by_what_needs_them() -> None:
    token_pose = create_model("ppt_s", **TINY, prune_at=(2,))
    for model in (nn.DataParallel(token_pose), create_model("rle_r50", input_size=(64, 64)), nn.Linear(1, 1)):
        seen = rf"takes a model with keypoint tokens, .* and got a {type(model).__name__}: pass model.module where"
        with pytest.raises(PoseError, match=f"token_groups {seen}"):
            token_groups(model)
        with pytest.raises(PoseError, match=f"set_keep_rate {seen}"):
            set_keep_rate(model, 0.7)


def test_a_keep_rate_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(PoseError, match=r"sdpose_t has no pruning blocks: create it with prune_at=\(3, 6, 9\)"):
        set_keep_rate(create_model("sdpose_t", **TINY), 0.7)
    model = create_model("ppt_s", **TINY, prune_at=(2,))
    for keep_rate in (0.0, -1.0, 1.5):
        with pytest.raises(PoseError, match=f"keep_rate={keep_rate} is a share of the tokens"):
            set_keep_rate(model, keep_rate)
    assert model.blocks[2].keep == 12  # as it was: 0.7 of 16
