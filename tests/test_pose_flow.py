"""The flow of the RLE loss: a density that integrates to one, an exact inverse, and the published code's numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cyclekd.integrations.tokenpose.losses.flow import RealNVP
from golden import golden

POINTS = torch.tensor([[0.0, 0.0], [1.0, -1.25], [0.75, -0.5], [1.25, -2.0]])

LOG_PROB = [-19.21901, 0.83875, -4.34608, -3.42089]
"""At the points, of the flow filled by the formula; noted once the flow's numbers were those of the published one."""


def fill(flow: nn.Module) -> None:
    """Parameters from a formula: the density is a narrow peak near (1, -1.25)."""
    for index, parameter in enumerate(flow.parameters()):
        places = torch.arange(parameter.numel(), dtype=parameter.dtype).reshape(parameter.shape)
        parameter.data = torch.sin(places * 1.7 + index) / math.sqrt(parameter.shape[-1])


def filled_flow(dtype: torch.dtype = torch.float32) -> RealNVP:
    flow = RealNVP().to(dtype)
    fill(flow)
    return flow


def published_flow() -> RealNVP:
    prefix, flow = "rle.flow_model.", RealNVP()
    weights = {name.removeprefix(prefix): value for name, value in golden("weights_reg_heads").items()}
    flow.load_state_dict({name: weights[name] for name in flow.state_dict()})
    return flow


def plain_log_prob(flow: RealNVP, x: float, y: float) -> float:
    """The same density one number at a time."""
    parameters = {name: value.tolist() for name, value in flow.state_dict().items()}

    def network(kind: str, i: int, kept: int, moved: int) -> float:
        (w0, b0), (w2, b2), (w4, b4) = (
            [parameters[f"{kind}.{i}.{layer}.{part}"] for part in ("weight", "bias")] for layer in (0, 2, 4)
        )
        hidden = [leaky(row[kept] * point[kept] + bias) for row, bias in zip(w0, b0, strict=True)]
        hidden = [leaky(dot(row, hidden) + bias) for row, bias in zip(w2, b2, strict=True)]
        out = dot(w4[moved], hidden) + b4[moved]
        return math.tanh(out) if kind == "s" else out

    def leaky(value: float) -> float:
        return value if value > 0 else 0.01 * value

    def dot(row: list[float], other: list[float]) -> float:
        return sum(a * b for a, b in zip(row, other, strict=True))

    point, logdet = [x, y], 0.0
    for i in (5, 4, 3, 2, 1, 0):
        kept, moved = (1, 0) if i % 2 == 0 else (0, 1)
        s, t = (network(kind, i, kept, moved) for kind in ("s", "t"))
        point[moved] = (point[moved] - t) * math.exp(-s)
        logdet -= s
    return logdet - 0.5 * (point[0] ** 2 + point[1] ** 2) - math.log(2 * math.pi)


def test_log_prob_equals_the_published_flow():
    flow, numbers = published_flow(), golden("reg_heads")
    z, logdet = flow.encode(numbers["rle.flow_x"])
    torch.testing.assert_close(z, numbers["rle.flow_z"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logdet, numbers["rle.flow_logdet"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flow.log_prob(numbers["rle.flow_x"]), numbers["rle.flow_logprob"], atol=1e-5, rtol=1e-5)


def test_log_prob_equals_a_plain_loop():
    flow = filled_flow()
    expected = torch.tensor([plain_log_prob(flow, x, y) for x, y in POINTS.tolist()])
    torch.testing.assert_close(flow.log_prob(POINTS), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flow.log_prob(POINTS), torch.tensor(LOG_PROB), atol=2e-5, rtol=0)


def test_decode_is_the_inverse_of_encode():
    flow = filled_flow(torch.float64)
    points = POINTS.double().reshape(2, 2, 2)
    z, logdet = flow.encode(points)
    assert z.shape == (2, 2, 2) and logdet.shape == (2, 2)
    assert (z - points).abs().amax(-1).min() > 0.5  # far from the identity
    torch.testing.assert_close(flow.decode(z), points)


def test_logdet_is_that_of_the_jacobian():
    flow = filled_flow(torch.float64)
    _, logdet = flow.encode(POINTS.double())
    for point, value in zip(POINTS.double(), logdet, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: flow.encode(x)[0], point)
        torch.testing.assert_close(jacobian.det().abs().log(), value)


def test_the_density_integrates_to_one():
    flow, step = filled_flow(), 0.05
    x, y = torch.arange(-1, 3, step), torch.arange(-3, 1, step)
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(x, y)).exp()
    assert density.sum().item() * step**2 == pytest.approx(1, abs=2e-3)


def test_samples_follow_the_density():
    flow, count = filled_flow(), 20_000
    samples = flow.sample(count)
    assert samples.shape == (count, 2) and not samples.requires_grad
    corner, step = torch.tensor([1.0, -1.25]), 0.02  # of a square of side 0.5, cut into cells
    cells = torch.cartesian_prod(*(start + step * (torch.arange(25) + 0.5) for start in corner))
    with torch.no_grad():
        probability = flow.log_prob(cells).exp().sum().item() * step**2
    found = ((samples > corner) & (samples < corner + 0.5)).all(-1).float().mean().item()
    assert 0.1 < probability < 0.9
    assert found == pytest.approx(probability, abs=5 * math.sqrt(0.25 / count))


def test_a_new_flow_is_nearly_the_identity():
    flow = RealNVP()
    weights = [value for name, value in flow.named_parameters() if name.endswith(".2.weight")]
    bound = 0.01 * math.sqrt(6 / 128)
    assert len(weights) == 12
    assert all(0.9 * bound < weight.abs().max() <= bound for weight in weights)
    assert (flow.encode(POINTS)[0] - POINTS).abs().max() < 1  # the biases are those of any nn.Linear


def test_size_and_names_are_those_of_published_checkpoints():
    flow = RealNVP()
    assert sum(parameter.numel() for parameter in flow.parameters()) == 53_784
    names = {f"{kind}.{i}.{layer}" for kind in "st" for i in range(6) for layer in (0, 2, 4)}
    assert set(flow.state_dict()) == {f"{name}.{part}" for name in names for part in ("weight", "bias")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_flow_of_another_precision_computes_in_its_points(dtype):
    flow = filled_flow(dtype)
    parameters = {name: value.float() for name, value in flow.state_dict().items()}
    plain = RealNVP()
    plain.load_state_dict(parameters)
    for points in (POINTS, POINTS.bfloat16(), POINTS.half()):
        torch.testing.assert_close(flow.log_prob(points), plain.log_prob(points), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(flow.decode(points), plain.decode(points), atol=1e-5, rtol=1e-5)
    assert flow.log_prob(POINTS.double()).dtype == flow.decode(POINTS.double()).dtype == torch.float64
    assert flow.sample(3).isfinite().all()


def test_log_prob_is_in_full_precision_under_autocast():
    flow, points = filled_flow(), POINTS.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob, decoded = flow.log_prob(points), flow.decode(points)
    assert log_prob.dtype == decoded.dtype == torch.float32
    assert torch.equal(log_prob, flow.log_prob(points.float()))
    assert torch.equal(decoded, flow.decode(points.float()))
