"""What the cycles of a model do to its tokens and predictions, and what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cyclekd.losses import prediction
from cyclekd.outputs import CycleOutput
from cyclekd.probe import evaluation_mode
from cyclekd.reentry import Reentry
from cyclekd.stacks import stack_blocks
from cyclekd.wrap import STATE, find_wrapped, run_cycles, sync_hooks

COLLAPSED = 0.01
"""Relative token distance under which the next cycle is nearly the identity, so that it has nothing left to teach."""
GROWING = 3.0
"""Growth of the token norm from one cycle to the next from which on values are on their way to overflow."""


@dataclass(frozen=True)
class CycleReport:
    """Per cycle, measured in evaluation mode; `print` it, or read the figures."""

    stack: str
    blocks: int
    token_norm: tuple[float, ...]
    """N values: root mean square of the tokens that leave each cycle."""
    token_distance: tuple[float, ...]
    """N - 1 values: ||t_i - t_i+1||^2 / ||t_i+1||^2."""
    agreement: tuple[float, ...] | None
    """N - 1 values: share of predictions of cycle i that equal the last cycle's; None where outputs hold no logits."""
    parameters: int
    macs_trained: int
    """Multiply-accumulates of one forward of these inputs with all cycles."""
    macs_deployed: int
    """The same with one pass, as `model.eval()` runs it."""
    warnings: tuple[str, ...]

    @property
    def cycles(self) -> int:
        return len(self.token_norm)

    def __str__(self) -> str:
        lines = [
            f"stack {self.stack} ({self.blocks} blocks), {self.cycles} cycles",
            "cycle  token norm  distance to next  agreement with last",
        ]
        for i, norm in enumerate(self.token_norm):
            last = i == self.cycles - 1
            distance = "-" if last else f"{self.token_distance[i]:.4f}"
            agreement = "-" if last or self.agreement is None else f"{self.agreement[i]:.1%}"
            lines.append(f"{i + 1:5}  {norm:10.4g}  {distance:>16}  {agreement:>19}")
        lines += [
            f"parameters {self.parameters:,}",
            f"MACs of these inputs: {self.macs_deployed:,} deployed, {self.macs_trained:,} with all cycles "
            f"({self.macs_trained / max(self.macs_deployed, 1):.2f} x)",
        ]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def cycle_report(model: nn.Module, *args: Any, **kwargs: Any) -> CycleReport:
    """A `CycleReport` on `model(*args, **kwargs)`: token distances and norms, agreement of predictions, cost.

    Runs all cycles once and one pass once, in evaluation mode without gradients; the modes of all modules are restored.
    Warns where cycles have collapsed (relative distance below 0.01), where token norms grow, and where values are not
    finite.
    """
    wrapped = find_wrapped(model, "cycle_report")
    state: Reentry = wrapped.__dict__[STATE]
    try:
        # The plain attention kernel is counted alike on every device.
        with evaluation_mode(wrapped), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as trained:
                output = run_cycles(wrapped, *args, **kwargs)
            with FlopCounterMode(display=False) as deployed:
                run_cycles(wrapped, *args, cycles=1, **kwargs)
    finally:
        sync_hooks(wrapped)
    norms, distances = _norms(output), _distances(output)
    return CycleReport(
        stack=" + ".join(state.paths),
        blocks=sum(len(stack_blocks(wrapped, path)) for path in state.paths),
        token_norm=norms,
        token_distance=distances,
        agreement=_agreement(output),
        parameters=sum(p.numel() for p in wrapped.parameters()),
        macs_trained=trained.get_total_flops() // 2,
        macs_deployed=deployed.get_total_flops() // 2,
        warnings=_warnings(norms, distances),
    )


def _flat(tokens: Tensor | tuple[Tensor, ...]) -> Tensor:
    parts = (tokens,) if isinstance(tokens, Tensor) else tokens
    return torch.cat([part.float().flatten() for part in parts])


def _norms(output: CycleOutput) -> tuple[float, ...]:
    return tuple(float(_flat(tokens).square().mean().sqrt()) for tokens in output.tokens)


def _distances(output: CycleOutput) -> tuple[float, ...]:
    """NaN for a pair of cycles that left different numbers of tokens."""
    flat = [_flat(tokens) for tokens in output.tokens]
    return tuple(
        float((s - t).square().sum() / t.square().sum()) if s.shape == t.shape else math.nan for s, t in pairwise(flat)
    )


def _agreement(output: CycleOutput) -> tuple[float, ...] | None:
    predictions = [prediction(each) for each in output.outputs]
    choices = [_choice(p) for p in predictions if p is not None]
    if len(choices) != len(predictions):
        return None
    return tuple(float((choice == choices[-1]).float().mean()) for choice in choices[:-1])


def _choice(scores: Tensor) -> Tensor:
    """The class of [..., C] logits; the place of the peak in [B, K, H, W] heat maps."""
    return (scores.flatten(2) if scores.ndim == 4 else scores).argmax(-1)


def _warnings(norms: tuple[float, ...], distances: tuple[float, ...]) -> tuple[str, ...]:
    found = []
    for i, distance in enumerate(distances):
        if distance < COLLAPSED:
            found.append(
                f"cycles {i + 1} and {i + 2} have collapsed: relative token distance {distance:.2g}, so the later "
                "one adds next to nothing; lower rho or alpha"
            )
    for i, (before, after) in enumerate(pairwise(norms)):
        if after > GROWING * before:
            found.append(
                f"the token norm grows {after / before:.3g} times from cycle {i + 1} to {i + 2}: raise rho or alpha, "
                "lower the learning rate, or clip gradients"
            )
    if not all(map(math.isfinite, norms)):
        found.append(
            "tokens are not finite: the run has diverged; lower the learning rate and do not detach the teacher"
        )
    return tuple(found)
