"""The pose models against outputs, losses and gradients of the published reference code, which lie in files.

All of it skips where these files are not; tests/test_pose_models.py checks the same models without them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.pose.plain import PlainPose, sine_table
from cyclekd import CycleLoss, CycleOutput, run_cycles
from cyclekd.integrations.tokenpose.losses.supervised import HeatmapLoss
from cyclekd.integrations.tokenpose.losses.targets import Target
from cyclekd.integrations.tokenpose.models.create import create_model
from cyclekd.integrations.tokenpose.models.tokenpose import token_groups
from cyclekd.integrations.tokenpose.models.transformer import sine_positions
from cyclekd.integrations.tokenpose.weights.layouts import parse_checkpoint
from cyclekd.integrations.tokenpose.weights.reference import load_reference_checkpoint
from golden import golden, golden_json

HEATMAPS = {"rtol": 0, "atol": 1e-5}  # tolerances of the reference files, in fp32
TOKENS = {"rtol": 0, "atol": 5e-5}
HEAD = "keypoint_head.tokenpose."
FULL_GRADIENTS = (
    HEAD + "keypoint_token",
    HEAD + "transformer_layer1.layers.0.0.fn.norm.weight",
    HEAD + "transformer_layer1.layers.11.1.fn.fn.net.3.bias",
)


def reference_model(name: str, strict: bool = True, **overrides: object) -> nn.Module:
    """A model of an S preset with the reference weights, in evaluation."""
    model = create_model(name, **overrides).eval()
    load_reference_checkpoint(model, golden("weights_s_v1"), strict=strict)
    return model


def regression_model(name: str, head: str, **overrides: object) -> nn.Module:
    model = reference_model(name, strict=False, **overrides)
    weights = {key: value for key, value in golden("weights_reg_heads").items() if key.startswith(f"{head}.")}
    model.head.mlp.load_state_dict({key.removeprefix(f"{head}."): value for key, value in weights.items()})
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return golden("input_common")["input"]


@pytest.fixture(scope="module")
def sdpose() -> nn.Module:
    return reference_model("sdpose_s_v1")


@pytest.fixture(scope="module")
def both_cycles(sdpose: nn.Module, images: Tensor) -> CycleOutput:
    with torch.no_grad():
        return run_cycles(sdpose, images)


def test_the_sine_table_is_the_reference_bit_for_bit() -> None:
    table = golden("weights_s_v1")[HEAD + "pos_embedding"][0]
    assert torch.equal(sine_positions((16, 16), 192), table)
    assert torch.equal(sine_table(16, 16, 192), table)  # of the plain model


def test_the_stem_gives_the_reference_features(sdpose: nn.Module, images: Tensor) -> None:
    # with gradients: in the memory format of the reference, and so with its rounding
    features = sdpose.backbone(images)
    torch.testing.assert_close(features.detach(), golden("sdpose_s_v1")["feature"], **HEATMAPS)


@pytest.mark.parametrize("cycle", [1, 2])
def test_each_cycle_gives_the_reference_tokens_and_heatmaps(both_cycles: CycleOutput, cycle: int) -> None:
    expected = golden("sdpose_s_v1")
    tokens = both_cycles.tokens[cycle - 1]
    torch.testing.assert_close(tokens[:, :17], expected[f"cycle{cycle}.kpt_token"], **TOKENS)
    torch.testing.assert_close(tokens[:, 17:], expected[f"cycle{cycle}.vis_token"], **TOKENS)
    torch.testing.assert_close(both_cycles.outputs[cycle - 1], expected[f"cycle{cycle}.heatmap"], **HEATMAPS)


def test_in_evaluation_a_call_is_the_first_cycle(sdpose: nn.Module, images: Tensor, both_cycles: CycleOutput) -> None:
    with torch.no_grad():
        assert torch.equal(sdpose(images), both_cycles.outputs[0])


def test_the_plain_model_gives_the_reference_too(sdpose: nn.Module, images: Tensor) -> None:
    expected = golden("sdpose_s_v1")
    with torch.no_grad():
        for number, cycle in enumerate(PlainPose(sdpose)(images), start=1):
            torch.testing.assert_close(cycle.output, expected[f"cycle{number}.heatmap"], **HEATMAPS)
            torch.testing.assert_close(cycle.tokens[:, 17:], expected[f"cycle{number}.vis_token"], **TOKENS)


@pytest.mark.parametrize(
    "scale, name", [("dim", "heatmap_official_scale_dim"), ("head", "heatmap_scale_head")], ids=["dim", "head"]
)
def test_attention_has_the_scale_of_either_repository(images: Tensor, scale: str, name: str) -> None:
    model = create_model("tokenpose_s_v1", attention_scale=scale).eval()
    model.load_state_dict(reference_model("tokenpose_s_v1").state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(images), golden("tokenpose_s_v1")[name], **HEATMAPS)


def test_sdpose_t_is_the_first_six_blocks_in_three_cycles() -> None:
    model, batch = reference_model("sdpose_t", strict=False), golden("sdpose_s_v1_loss")
    with torch.no_grad():
        output = run_cycles(model, batch["input"])
        parts = CycleLoss.paper(HeatmapLoss(), groups=token_groups(model))(output, target_of(batch))
    expected = golden_json("sdpose_s_v1_loss")["sdpose_t.eval"]
    assert len(output.outputs) == 3
    assert parts.total.item() == pytest.approx(expected["total"], rel=1e-5)
    assert parts.task.sum().item() == pytest.approx(expected["heatmap_loss"], rel=1e-5)
    assert 5e-6 * parts.token_mse["visual"].sum().item() == pytest.approx(expected["vis_dist_loss"], rel=1e-5)
    assert 5e-6 * parts.token_mse["keypoint"].sum().item() == pytest.approx(expected["kpt_dist_loss"], rel=1e-5)


# -- losses and gradients ----------------------------------------------------------------------------------------------


def target_of(batch: dict[str, Tensor]) -> Target:
    return Target(batch["target"], batch["target_weight"])


@pytest.fixture(scope="module", params=["train", pytest.param("eval", marks=pytest.mark.slow)])
def step(request: pytest.FixtureRequest) -> tuple[str, nn.Module, CycleOutput]:
    """The mode of batch norm, the model, and its forward with a graph for several losses."""
    model = reference_model("sdpose_s_v1").train(request.param == "train")
    return request.param, model, run_cycles(model, golden("sdpose_s_v1_loss")["input"])


def no_task(output: Tensor, target: object) -> Tensor:
    return output.new_zeros(())


OBJECTIVES: dict[str, Callable[..., CycleLoss]] = {
    "official_attached": lambda groups: CycleLoss.paper(HeatmapLoss(), groups=groups),
    "teacher_detached": lambda groups: CycleLoss.paper(HeatmapLoss(), groups=groups, detach_teacher=True),
    "distill_only_attached": lambda groups: CycleLoss(no_task, alpha=1.0, groups=groups),
    "distill_only_detached": lambda groups: CycleLoss(no_task, alpha=1.0, groups=groups, detach_teacher=True),
    "heatmap_only": lambda groups: CycleLoss(HeatmapLoss(), alpha=0.0),
}


@pytest.mark.parametrize("step", ["train"], indirect=True)
def test_a_training_forward_gives_the_reference_with_the_statistics_of_the_batch(
    step: tuple[str, nn.Module, CycleOutput],
) -> None:
    _, _, output = step
    expected = golden("sdpose_s_v1_loss")
    for cycle, (heatmaps, tokens) in enumerate(zip(output.outputs, output.tokens, strict=True), start=1):
        torch.testing.assert_close(heatmaps.float(), expected[f"train.cycle{cycle}.heatmap"], **HEATMAPS)
        torch.testing.assert_close(tokens[:, :17].float(), expected[f"train.cycle{cycle}.kpt_token"], **TOKENS)


def test_the_terms_of_the_loss_are_those_of_the_reference(step: tuple[str, nn.Module, CycleOutput]) -> None:
    mode, model, output = step
    batch, expected = golden("sdpose_s_v1_loss"), golden_json("sdpose_s_v1_loss")
    parts = CycleLoss.paper(HeatmapLoss(), groups=token_groups(model))(output, target_of(batch))
    assert parts.total.item() == pytest.approx(expected[f"{mode}.total"], rel=1e-6)
    for cycle, task in enumerate(parts.task.tolist(), start=1):
        assert task == pytest.approx(expected[f"{mode}.heatmap_loss_cycle{cycle}"], rel=1e-5)
    assert parts.token_mse["visual"].item() == pytest.approx(expected[f"{mode}.raw_vis_mse"], rel=1e-5)
    assert parts.token_mse["keypoint"].item() == pytest.approx(expected[f"{mode}.raw_kpt_mse"], rel=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        "official_attached",
        "distill_only_attached",
        "distill_only_detached",
        pytest.param("teacher_detached", marks=pytest.mark.slow),
        pytest.param("heatmap_only", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_the_reference(step: tuple[str, nn.Module, CycleOutput], objective: str) -> None:
    mode, model, output = step
    batch, numbers = golden("sdpose_s_v1_loss"), golden_json("sdpose_s_v1_loss")
    total = OBJECTIVES[objective](token_groups(model))(output, target_of(batch)).total
    assert total.item() == pytest.approx(numbers[f"{mode}.{objective}.loss"], rel=1e-5)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(total, list(parameters.values()), retain_graph=True, allow_unused=True)
    by_name = dict(zip(parameters, gradients, strict=True))
    ours = {theirs: name for name, theirs in parse_checkpoint(golden("weights_s_v1")).keys.items()}
    norms = {ours[key]: norm for key, norm in numbers[f"{mode}.{objective}.gradnorm"].items()}
    assert {name for name, gradient in by_name.items() if gradient is not None} == norms.keys()
    for name, norm in norms.items():
        assert by_name[name].norm().item() == pytest.approx(norm, rel=1e-3), name
    for key in FULL_GRADIENTS:
        if f"{mode}.{objective}.grad.{key}" in batch:
            expected = batch[f"{mode}.{objective}.grad.{key}"]
            atol = 1e-4 * expected.abs().max().item()
            torch.testing.assert_close(by_name[ours[key]].float(), expected, rtol=0, atol=atol)


# -- regression heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [64, 384])
def test_the_rle_head_gives_the_reference_in_both_cycles(images: Tensor, hidden: int) -> None:
    model = regression_model("sdpose_reg", f"mlp_head_hidden{hidden}", head_hidden=hidden)
    expected = golden("reg_heads")
    with torch.no_grad():
        output = run_cycles(model, images)
    for cycle in (1, 2):
        name = f"hidden{hidden}.cycle{cycle}"
        torch.testing.assert_close(output.outputs[cycle - 1], expected[f"{name}.pred"], **HEATMAPS)
        torch.testing.assert_close(output.tokens[cycle - 1][:, :17], expected[f"{name}.kpt_token"], **TOKENS)


def test_the_distilpose_head_gives_the_reference(images: Tensor) -> None:
    with torch.no_grad():
        output = regression_model("tokenreg_s", "distilpose_mlp_head")(images)
    expected = golden("reg_heads")
    torch.testing.assert_close(output[..., :2], expected["distilpose.pred"], **HEATMAPS)
    torch.testing.assert_close(output[..., 2:3], expected["distilpose.score"], **HEATMAPS)
    torch.testing.assert_close(output[..., 3:], expected["distilpose.sigma"], **HEATMAPS)
