"""Pose losses: the published code's numbers, slow plain loops, gradients, and what a wrong shape is told."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cyclekd import CycleLoss, CycleOutput, run_cycles, wrap_multicycle
from cyclekd.integrations.tokenpose.errors import PoseError
from cyclekd.integrations.tokenpose.losses.distilpose import (
    DistilPoseLoss,
    ScoreLoss,
    SimulatedHeatmapLoss,
    simulated_heatmaps,
)
from cyclekd.integrations.tokenpose.losses.supervised import CoordinateLoss, HeatmapLoss, RLELoss
from cyclekd.integrations.tokenpose.losses.targets import Target
from cyclekd.integrations.tokenpose.models.create import create_model
from golden import golden, golden_json
from test_pose_flow import fill, plain_log_prob

KEYPOINT_WEIGHTS = torch.tensor([[[1.0], [0.0], [1.0]], [[1.0], [1.0], [0.0]]])  # [2, 3, 1]


def wave(*shape: int, seed: float = 0.0) -> Tensor:
    """Numbers between -1 and 1, from a formula."""
    return torch.sin(torch.arange(math.prod(shape)) * 1.3 + seed).reshape(shape)


def heatmap_example() -> tuple[Tensor, Target]:
    return wave(2, 3, 5, 4), Target(wave(2, 3, 5, 4, seed=1).abs(), KEYPOINT_WEIGHTS)


def coordinate_target() -> Target:
    return Target(wave(2, 3, 2, seed=2).abs(), KEYPOINT_WEIGHTS.expand(2, 3, 2))


def student_prediction() -> Tensor:
    """[2, 3, 5]: points inside the image, confidences, sigmas between 1 and 2 pixels."""
    return torch.cat([0.5 + 0.4 * wave(2, 3, 2), wave(2, 3, 1), 1.5 + 0.5 * wave(2, 3, 2, seed=3)], -1)


def teacher_target() -> Target:
    return Target(wave(2, 3, 8, 6, seed=4).abs(), KEYPOINT_WEIGHTS)


# -- heat maps ---------------------------------------------------------------------------------------------------------


def test_heatmap_loss_equals_the_published_numbers():
    tensors, numbers = golden("sdpose_s_v1_loss"), golden_json("sdpose_s_v1_loss")
    maps = tuple(tensors[f"train.cycle{cycle}.heatmap"] for cycle in (1, 2))
    target = Target(tensors["target"], tensors["target_weight"])
    parts = CycleLoss(HeatmapLoss(), rho=0)(CycleOutput(None, maps, ()), target)
    expected = [numbers[f"train.heatmap_loss_cycle{cycle}"] for cycle in (1, 2)]
    torch.testing.assert_close(parts.task, torch.tensor(expected), rtol=1e-6, atol=0)
    assert parts.total.item() == pytest.approx(numbers["train.heatmap_loss"], rel=1e-6)
    official = numbers["tokenpose_official_loss_on_train_cycle1"]
    assert HeatmapLoss(factor=0.5)(maps[0], target).item() == pytest.approx(official, rel=1e-6)


def test_heatmap_loss_equals_a_plain_loop():
    prediction, target = heatmap_example()
    total = 0.0
    for b in range(2):
        for k in range(3):
            pairs = zip(prediction[b, k].flatten().tolist(), target.values[b, k].flatten().tolist(), strict=True)
            total += target.weights[b, k, 0].item() * sum((p - t) ** 2 for p, t in pairs) / 20
    assert HeatmapLoss()(prediction, target).item() == pytest.approx(total / 6, rel=1e-5)
    assert HeatmapLoss(factor=0.5)(prediction, target).item() == pytest.approx(total / 12, rel=1e-5)


def test_an_unlabelled_keypoint_teaches_nothing():
    prediction, target = heatmap_example()
    prediction.requires_grad_()
    HeatmapLoss()(prediction, target).backward()
    taught = prediction.grad.abs().amax((2, 3), keepdim=True).squeeze(-1) > 0
    assert torch.equal(taught, KEYPOINT_WEIGHTS > 0)


# -- RLE ---------------------------------------------------------------------------------------------------------------


def published_rle(**kwargs) -> tuple[RLELoss, dict[str, Tensor]]:
    loss, weights = RLELoss(**kwargs), golden("weights_reg_heads")
    loss.flow.load_state_dict({name: weights[f"rle.flow_model.{name}"] for name in loss.flow.state_dict()})
    return loss, {name[4:]: value for name, value in golden("reg_heads").items() if name.startswith("rle.")}


def filled_rle(dtype: torch.dtype = torch.float32, **kwargs) -> RLELoss:
    loss = RLELoss(**kwargs).to(dtype)
    fill(loss.flow)
    return loss


def test_rle_loss_and_its_gradients_equal_the_published_numbers():
    (loss, tensors), numbers = published_rle(), golden_json("reg_rle")
    prediction = tensors["pred"].requires_grad_()
    value = loss(prediction, Target(tensors["target"], tensors["target_weight"]))
    value.backward()
    assert value.item() == pytest.approx(numbers["loss"], rel=1e-6)
    torch.testing.assert_close(prediction.grad, tensors["grad_pred"], rtol=1e-4, atol=1e-4)
    norms = {f"flow_model.{name}": value.grad.norm().item() for name, value in loss.flow.named_parameters()}
    assert norms == pytest.approx(numbers["param_gradnorm"], rel=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "key"), [({"residual": False}, "{'residual': False}"), ({"base": "gaussian"}, "{'q_dis': 'gaussian'}")]
)
def test_rle_variants_equal_the_published_numbers(kwargs, key):
    loss, tensors = published_rle(**kwargs)
    value = loss(tensors["pred"], Target(tensors["target"], tensors["target_weight"]))
    assert value.item() == pytest.approx(golden_json("reg_rle")[key], rel=1e-6)


def test_rle_weights_and_division_equal_the_published_numbers():
    (loss, tensors), numbers = published_rle(), golden_json("reg_rle")
    everywhere = loss(tensors["pred"], Target(tensors["target"], torch.ones(4, 17, 2)))
    assert everywhere.item() == pytest.approx(numbers["{'use_target_weight': False}"], rel=1e-6)
    assert numbers["{'size_average': False}"] == pytest.approx(4 * numbers["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "literal"), [({}, 330.196), ({"residual": False}, 321.585), ({"base": "gaussian"}, 333.101)]
)
def test_rle_loss_equals_a_plain_loop(kwargs, literal):
    loss, prediction, target = filled_rle(**kwargs), wave(2, 3, 4), coordinate_target()
    total = 0.0
    for b in range(2):
        for k in range(3):
            numbers, values = prediction[b, k].tolist(), target.values[b, k].tolist()
            sigmas = [1 / (1 + math.exp(-raw)) for raw in numbers[2:]]
            errors = [(p - t) / s for p, t, s in zip(numbers[:2], values, sigmas, strict=True)]
            log_prob = plain_log_prob(loss.flow, *errors)
            for sigma, error, weight in zip(sigmas, errors, target.weights[b, k].tolist(), strict=True):
                element = math.log(sigma) - log_prob
                if kwargs == {}:
                    element += math.log(2 * sigma) + abs(error)
                elif kwargs == {"base": "gaussian"}:
                    element += math.log(sigma * math.sqrt(2 * math.pi)) + error**2 / 2
                total += weight * element
    value = loss(prediction, target).item()
    assert value == pytest.approx(total / 2, rel=1e-5)
    assert value == pytest.approx(literal, abs=5e-3)


@pytest.mark.parametrize("base", ["laplace", "gaussian"])
def test_rle_gradients_are_those_of_finite_differences(base):
    loss, target = filled_rle(torch.float64, base=base), coordinate_target()
    bias = loss.flow.s[2][4].bias.detach().clone().requires_grad_()

    def value(prediction: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(loss, {"flow.s.2.4.bias": bias}, (prediction, target))

    assert torch.autograd.gradcheck(value, (wave(2, 3, 4).double().requires_grad_(), bias))


def test_rle_loss_survives_certainty_without_bound():
    prediction = torch.tensor([[[0.5, 0.5, -200.0, -200.0]]]).requires_grad_()
    value = RLELoss()(prediction, Target(torch.full((1, 1, 2), 0.5), torch.ones(1, 1, 2)))
    value.backward()
    assert value.isfinite() and prediction.grad.isfinite().all()  # log(sigmoid(-200)) alone is -inf in float32


def test_rle_loss_compiles_without_graph_breaks():
    loss, prediction, target = filled_rle(), wave(2, 3, 4), coordinate_target()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert compiled(prediction, target).item() == pytest.approx(loss(prediction, target).item(), rel=1e-6)


def test_rle_refuses_an_unknown_base():
    with pytest.raises(PoseError, match=r"RLELoss\(base='normal'\): write base=\"laplace\""):
        RLELoss(base="normal")


# -- DistilPose --------------------------------------------------------------------------------------------------------


def published_distilpose() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The student's prediction [2, 17, 5]; coordinates, weights [2, 17, 2]; the teacher's and simulated maps."""
    tensors = golden("reg_heads")
    prediction = torch.cat([tensors[f"distilpose.{name}"] for name in ("pred", "score", "sigma")], -1)
    target = (tensors["rle.target"][:2], tensors["rle.target_weight"][:2])
    return prediction, *target, tensors["distilpose.teacher_hm"], tensors["distilpose.simulated_hm"]


def test_coordinate_and_score_loss_equal_the_published_numbers():
    prediction, values, weights, teacher, _ = published_distilpose()
    numbers = golden_json("reg_rle")
    coordinate = CoordinateLoss()(prediction, Target(values, weights)).item()
    assert coordinate == pytest.approx(numbers["distilpose.smoothl1_reg"], rel=1e-6)
    score = ScoreLoss()(prediction, Target(teacher, weights[..., :1])).item()
    assert 0.01 * score == pytest.approx(numbers["distilpose.score_loss(w=0.01)"], rel=1e-6)


def test_simulated_heatmaps_equal_the_published_ones():
    prediction, _, _, teacher, maps = published_distilpose()
    simulated, reaches = simulated_heatmaps(prediction, tuple(teacher.shape[2:]))
    torch.testing.assert_close(simulated, maps, rtol=0, atol=1e-6)
    assert reaches.shape == (2, 17, 1) and bool((reaches == 1).all())


def test_simulated_heatmap_loss_equals_the_published_number_with_weights_averaged_over_the_batch():
    prediction, _, weights, teacher, _ = published_distilpose()
    # The published code broadcasts [B, 1, 1] against [B, pixels], so that all images share each key point's weight.
    shared = weights[..., :1].mean(0, keepdim=True).expand(2, -1, -1)
    value = SimulatedHeatmapLoss()(prediction, Target(teacher, shared)).item()
    assert value == pytest.approx(golden_json("reg_rle")["distilpose.reg2hm_loss"], rel=1e-6)


def test_simulated_heatmaps_equal_noted_pixels():
    # two key points of the published run, and five pixels around each
    points = torch.tensor([[0.5068436861, 0.4613979459], [0.5736750960, 0.4440911412]])
    sigmas = torch.tensor([[1.7647376060, 0.8400175571], [1.4478862286, 1.0270817280]])
    prediction = torch.cat([points, torch.zeros(2, 1), sigmas], -1)[None]
    maps = simulated_heatmaps(prediction, (64, 48))[0][0]
    first = maps[0, [30, 30, 29, 31, 32], [24, 25, 24, 22, 26]]
    second = maps[1, [28, 28, 27, 29, 30], [28, 29, 28, 26, 30]]
    assert first.tolist() == pytest.approx([0.840124, 0.795109, 0.805761, 0.090466, 0.008451], abs=1e-5)
    assert second.tolist() == pytest.approx([0.873190, 0.551424, 0.364415, 0.486049, 0.072218], abs=1e-5)


def test_coordinate_loss_equals_a_plain_loop():
    prediction, target = 3 * student_prediction(), coordinate_target()
    total = 0.0
    for b, k, axis in [(b, k, axis) for b in range(2) for k in range(3) for axis in range(2)]:
        error = abs(prediction[b, k, axis].item() - target.values[b, k, axis].item())
        total += target.weights[b, k, axis].item() * (0.5 * error**2 if error < 1 else error - 0.5)
    for numbers in (2, 4, 5):
        assert CoordinateLoss()(prediction[..., :numbers], target).item() == pytest.approx(total / 12, rel=1e-5)


def test_score_loss_reads_the_map_at_the_rounded_point_and_nothing_outside():
    maps = torch.arange(48.0).reshape(1, 1, 8, 6).expand(1, 7, -1, -1)
    # (column, row) of 5 x 7 steps: corners, rounded down and up, a half to even, then outside
    points = torch.tensor([[0, 0], [1, 1], [1.4 / 5, 2.6 / 7], [2.5 / 5, 3 / 7], [1.01, 0.5], [0.5, -0.01], [0.5, 9]])[
        None
    ]
    read = torch.tensor([0.0, 47.0, 3 * 6 + 1, 3 * 6 + 2, 0.0, 0.0, 0.0])
    prediction = torch.cat([points, torch.full((1, 7, 1), 100.0), torch.ones(1, 7, 2)], -1)
    for k in range(7):
        weights = torch.zeros(1, 7, 1).index_fill(1, torch.tensor(k), 1.0)
        assert ScoreLoss()(prediction, Target(maps, weights)).item() == pytest.approx((100 - read[k].item()) / 7)


def test_score_loss_finds_the_pixel_in_full_precision():
    # 0.287109375 is exact in bfloat16, and 0.287109375 * 47 = 13.494 is rounded there to 14
    prediction = torch.tensor([[[0.287109375, 0.0, 0.0, 1.0, 1.0]]]).bfloat16()
    maps = torch.arange(48.0).expand(1, 1, 64, 48)
    assert ScoreLoss()(prediction, Target(maps, torch.ones(1, 1, 1))).item() == 13


def test_score_loss_of_a_lost_point_does_not_read_outside_the_map():
    prediction = torch.full((2, 3, 5), float("nan"))
    prediction[..., 2] = 0.5
    assert ScoreLoss()(prediction, Target(torch.ones(2, 3, 8, 6), torch.ones(2, 3, 1))).item() == 0.5


def test_simulated_heatmap_loss_equals_a_plain_loop():
    prediction, target = student_prediction(), teacher_target()
    total = 0.0
    for b, k in [(b, k) for b in range(2) for k in range(3)]:
        x, y, _, sigma_x, sigma_y = prediction[b, k].tolist()
        for row, column in [(row, column) for row in range(8) for column in range(6)]:
            gauss = math.exp(-((column - 6 * x) ** 2) / (2 * sigma_x**2) - (row - 8 * y) ** 2 / (2 * sigma_y**2))
            total += target.weights[b, k, 0].item() * (gauss - target.values[b, k, row, column].item()) ** 2
    value = SimulatedHeatmapLoss()(prediction, target).item()
    assert value == pytest.approx(total / (2 * 3 * 8 * 6), rel=1e-5)


@pytest.mark.parametrize(
    ("point", "reaches"),
    [((0.5, 0.5), 1), ((-0.6, 0.5), 1), ((-0.7, 0.5), 0), ((1.49, 0.5), 1), ((1.51, 0.5), 0), ((0.5, 1.4), 0)],
)
def test_a_gaussian_whose_window_misses_the_map_teaches_nothing(point, reaches):
    prediction = torch.tensor([[[*point, 0.0, 1.0, 1.0]]])  # the map is 6 wide and 8 high: three sigma are 3 / 6, 3 / 8
    target = Target(torch.ones(1, 1, 8, 6), torch.ones(1, 1, 1))
    assert simulated_heatmaps(prediction, (8, 6))[1].item() == reaches
    assert (SimulatedHeatmapLoss()(prediction, target).item() > 0) == bool(reaches)


@pytest.mark.parametrize(
    ("loss", "columns"),
    [(CoordinateLoss(), [1, 1, 0, 0, 0]), (ScoreLoss(), [0, 0, 1, 0, 0]), (SimulatedHeatmapLoss(), [1, 1, 0, 1, 1])],
)
def test_each_loss_teaches_its_own_numbers_of_the_labelled_keypoints(loss, columns):
    prediction = student_prediction().requires_grad_()
    loss(prediction, coordinate_target() if isinstance(loss, CoordinateLoss) else teacher_target()).backward()
    assert torch.equal(prediction.grad != 0, (KEYPOINT_WEIGHTS * torch.tensor(columns)) > 0)


def test_simulated_heatmap_gradients_are_those_of_finite_differences():
    prediction = student_prediction().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: SimulatedHeatmapLoss()(p, teacher_target()), (prediction,))


def distilpose_example(cycles: int = 1) -> tuple[CycleOutput, CycleOutput, Target]:
    outputs = tuple((student_prediction() * (1 - 0.1 * i)).requires_grad_() for i in range(cycles))
    tokens = tuple(wave(2, 3 + 4, 8, seed=5 + i).requires_grad_() for i in range(cycles))
    maps, teacher_tokens = teacher_target().values.requires_grad_(), wave(2, 3 + 4, 8, seed=9).requires_grad_()
    return CycleOutput(None, outputs, tokens), CycleOutput(None, (maps,), (teacher_tokens,)), coordinate_target()


def test_distilpose_adds_up_its_terms_over_the_cycles():
    student, teacher, target = distilpose_example(cycles=2)
    parts = DistilPoseLoss()(student, teacher, target)
    taught, teacher_tokens = teacher_target(), teacher.tokens[0]
    for i, (output, tokens) in enumerate(zip(student.outputs, student.tokens, strict=True)):
        squares = (tokens - teacher_tokens) ** 2
        torch.testing.assert_close(parts.coordinate[i], CoordinateLoss()(output, target))
        torch.testing.assert_close(parts.score[i], 0.01 * ScoreLoss()(output, taught))
        torch.testing.assert_close(parts.heatmap[i], SimulatedHeatmapLoss()(output, taught))
        torch.testing.assert_close(parts.keypoint_tokens[i], 5e-4 * squares[:, :3].mean(), rtol=1e-5, atol=0)
        torch.testing.assert_close(parts.visual_tokens[i], 5e-4 * squares[:, 3:].mean(), rtol=1e-5, atol=0)
    names = ("coordinate", "score", "heatmap", "keypoint_tokens", "visual_tokens")
    torch.testing.assert_close(parts.total, sum(getattr(parts, name).sum() for name in names))
    logs = parts.logs()
    assert set(logs) == {"loss", *(f"{name}_{i}" for name in names for i in (1, 2))}
    assert torch.equal(logs["score_2"], parts.score[1]) and not logs["loss"].requires_grad


def test_distilpose_weights_are_arguments():
    student, teacher, target = distilpose_example()
    parts = DistilPoseLoss(score_weight=0.02, heatmap_weight=3.0, token_weight=1e-3)(student, teacher, target)
    paper = DistilPoseLoss()(student, teacher, target)
    torch.testing.assert_close(parts.coordinate, paper.coordinate)
    torch.testing.assert_close(parts.score, 2 * paper.score)
    torch.testing.assert_close(parts.heatmap, 3 * paper.heatmap)
    torch.testing.assert_close(parts.keypoint_tokens, 2 * paper.keypoint_tokens, rtol=1e-5, atol=0)
    torch.testing.assert_close(parts.visual_tokens, 2 * paper.visual_tokens, rtol=1e-5, atol=0)


def test_distilpose_teaches_the_student_and_not_the_teacher():
    student, teacher, target = distilpose_example()
    DistilPoseLoss()(student, teacher, target).total.backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in (*student.outputs, *student.tokens))
    assert all(tensor.grad is None for tensor in (*teacher.outputs, *teacher.tokens))


def test_distilpose_learns_from_wrapped_models():
    sizes = {"depth": 2, "input_size": (64, 48)}
    student = wrap_multicycle(create_model("tokenreg_s", **sizes), cycles=1, stack="blocks").train()
    teacher = wrap_multicycle(create_model("tokenpose_s_v1", **sizes), cycles=1, stack="blocks").eval()
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        taught = run_cycles(teacher, images, cycles=1)
    parts = DistilPoseLoss()(student(images), taught, Target(torch.rand(2, 17, 2), torch.ones(2, 17, 2)))
    parts.total.backward()
    assert all(value.isfinite() and value > 0 for value in parts.logs().values())
    assert all(parameter.grad is not None for parameter in student.parameters() if parameter.requires_grad)


# -- precision and wrong shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "prediction", "target"),
    [
        (HeatmapLoss(), *heatmap_example()),
        (filled_rle(), wave(2, 3, 4), coordinate_target()),
        (CoordinateLoss(), student_prediction(), coordinate_target()),
        (ScoreLoss(), student_prediction(), teacher_target()),
        (SimulatedHeatmapLoss(), student_prediction(), teacher_target()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_losses_of_half_precision_tensors_are_in_full_precision(loss, prediction, target):
    rounded, values = prediction.bfloat16(), target.values.bfloat16()
    expected = loss(rounded.float(), Target(values.float(), target.weights))
    for autocast in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = loss(rounded, Target(values, target.weights))
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)


@pytest.mark.parametrize("module", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("values", [torch.float16, torch.float64])
def test_rle_loss_of_any_precisions_is_that_of_its_rounded_numbers(module, prediction, values):
    loss, output, target = filled_rle(), wave(2, 3, 4).to(prediction).requires_grad_(), coordinate_target()
    target = Target(target.values.to(values), target.weights)
    value = loss.to(module)(output, target)
    value.backward()
    wide = Target(target.values.double(), target.weights.double())
    torch.testing.assert_close(value.double(), loss.double()(output.double(), wide), rtol=1e-5, atol=0)
    assert value.dtype in (torch.float32, torch.float64) and output.grad.abs().sum() > 0


def maps(*shape: int) -> Tensor:
    return torch.zeros(2, *shape)


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (
            maps(17, 64, 48),
            Target(maps(14, 64, 48), maps(14, 1)),
            r"prediction \[2, 17, 64, 48\] and target maps \[2, 14, 64, 48\]: 17 key points against 14, write "
            r"create_model\(name, num_keypoints=14\)",
        ),
        (
            maps(17, 64, 48),
            Target(maps(17, 96, 72), maps(17, 1)),
            r"\[2, 17, 64, 48\] and target maps \[2, 17, 96, 72\]: write heatmap_target\(..., "
            r"heatmap_size=\(64, 48\)\), or for these maps create_model\(name, input_size=\(384, 288\)\)",
        ),
        (maps(17, 64, 48), Target(maps(17, 64, 48)[:1], maps(17, 1)[:1]), "2 images against 1"),
        (
            maps(17, 64, 48),
            Target(maps(17, 64, 48), maps(17)),
            r"weights \[2, 17\] .* needs \[2, 17, 1\]: write Target",
        ),
        (maps(17, 64, 48), Target(maps(17, 2), maps(17, 2)), "such maps are made by heatmap_target"),
        (maps(17, 4), Target(maps(17, 64, 48), maps(17, 1)), r"write RLELoss\(\) or CoordinateLoss\(\)"),
    ],
)
def test_heatmap_loss_says_what_does_not_fit(prediction, target, message):
    with pytest.raises(PoseError, match=message):
        HeatmapLoss()(prediction, target)


@pytest.mark.parametrize(
    ("loss", "prediction", "target", "message"),
    [
        (RLELoss(), maps(17, 5), Target(maps(17, 2), maps(17, 2)), r"RLELoss got the prediction \[2, 17, 5\] .* 4\]"),
        (RLELoss(), maps(17, 4), Target(maps(14, 2), maps(14, 2)), r"write create_model\(name, num_keypoints=14\)"),
        (RLELoss(), maps(17, 4), Target(maps(17, 2), maps(17, 1)), r"weights \[2, 17, 1\] .* needs \[2, 17, 2\]"),
        (RLELoss(), maps(17, 4), Target(maps(17, 64, 48), maps(17, 1)), r"for heat maps write HeatmapLoss\(\)"),
        (CoordinateLoss(), maps(17, 1), Target(maps(17, 2), maps(17, 2)), r"needs \[B, K, 2 or 4 or 5\]"),
        (CoordinateLoss(), maps(17, 64, 48), Target(maps(17, 2), maps(17, 2)), r"for heat maps write HeatmapLoss\(\)"),
        (ScoreLoss(), maps(17, 4), Target(maps(17, 64, 48), maps(17, 1)), r"\[B, K, 5\], as from tokenreg_s"),
        (SimulatedHeatmapLoss(), maps(17, 5), Target(maps(14, 64, 48), maps(14, 1)), "17 key points against 14"),
    ],
)
def test_regression_losses_say_what_does_not_fit(loss, prediction, target, message):
    with pytest.raises(PoseError, match=message):
        loss(prediction, target)


@pytest.mark.parametrize(
    ("loss", "prediction"),
    [
        (HeatmapLoss(), maps(17, 64, 48)),
        (RLELoss(), maps(17, 4)),
        (CoordinateLoss(), maps(17, 5)),
        (ScoreLoss(), maps(17, 5)),
        (SimulatedHeatmapLoss(), maps(17, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_losses_say_that_they_take_one_prediction_and_a_target(loss, prediction):
    name, weights = type(loss).__name__, maps(17, 1)
    for target, seen in (
        (maps(17, 64, 48), r"\[2, 17, 64, 48\]"),
        ((maps(17, 64, 48), weights), "tuple"),
        (Target(None, weights), r"NoneType, \[2, 17, 1\]"),
        (None, "NoneType"),
    ):
        message = rf"{name} takes a Target\(values, weights\), .* heatmap_target or coordinate_target, and got {seen}$"
        with pytest.raises(PoseError, match=message):
            loss(prediction, target)
    with pytest.raises(PoseError, match=rf"{name} .* and got CycleOutput: .*\.outputs\[0\] .* CycleLoss\({name}\(\)\)"):
        loss(CycleOutput(None, (prediction,), ()), Target(maps(17, 64, 48), weights))


def test_distilpose_says_what_is_missing():
    student, teacher, target = distilpose_example()
    with pytest.raises(
        PoseError, match=r"teacher's outputs and tokens, a CycleOutput, not Tensor: write wrap_multicycle"
    ):
        DistilPoseLoss()(student, teacher.outputs[0], target)
    with pytest.raises(PoseError, match=r"the student's outputs .* run_cycles\(student, images\)"):
        DistilPoseLoss()(student.outputs[0], teacher, target)
    with pytest.raises(PoseError, match=r"holds 2 cycles: write run_cycles\(teacher, images, cycles=1\)"):
        DistilPoseLoss()(student, CycleOutput(None, teacher.outputs * 2, teacher.tokens * 2), target)
    with pytest.raises(PoseError, match=r"student's are \[2, 7, 8\], the teacher's \[2, 6, 8\]"):
        DistilPoseLoss()(student, CycleOutput(None, teacher.outputs, (teacher.tokens[0][:, 1:],)), target)
