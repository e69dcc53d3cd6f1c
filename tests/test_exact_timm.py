"""Cycle i of a wrapped timm model equals the same model with its block list really repeated i times.

Outputs, tokens, and in training the gradients of all parameters, for 1 to 3 cycles; the wrapper finds the stack by
itself. Two controls keep this from holding for nothing: the longer models differ from each other, and with the
substitution of tokens taken out no row passes.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from benchmarks.matrix.repeated import Cycle, Truth, all_finite, blocks_at, gradients, relative_error
from cyclekd import CycleOutput, find_stacks, run_cycles, set_cycles, wrap_multicycle
from cyclekd.slots import Handover
from zoo import TIMM, Row

TOLERANCE = 1e-5
VISIBLE = 1e-3


class Case(NamedTuple):
    """A row with its wrapped model and, built anew from the same seed, the truth about it."""

    row: Row
    wrapped: nn.Module
    truth: Truth


def make_case(row: Row) -> Case:
    return Case(row, wrap_multicycle(row.build(), cycles=3), row.truth())


@pytest.fixture(scope="module", params=TIMM, ids=lambda row: row.name)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def test_the_stack_is_found(case: Case) -> None:
    assert find_stacks(case.truth.model)[0].path == case.row.path


def test_longer_models_differ_and_every_block_learns(case: Case) -> None:
    for cycles in (case.truth.evaluation, case.truth.training):
        assert all_finite(cycles)
        for shorter, longer in combinations(cycles, 2):
            assert VISIBLE < relative_error(shorter.output, longer.output) < math.inf
            assert VISIBLE < relative_error(shorter.tokens, longer.tokens) < math.inf
    names = {parameter: name for name, parameter in case.truth.model.named_parameters()}
    for cycle in case.truth.training:
        for block in blocks_at(case.truth.model, case.row.path):
            assert any(cycle.gradients[names[p]].any() for p in block.parameters() if p.requires_grad)


def test_cycles_in_evaluation_equal_longer_models(case: Case) -> None:
    for cycles in (1, 2, 3):
        assert_equal(evaluate(case, cycles), case.truth.evaluation[:cycles])


def test_cycles_in_training_equal_longer_models_with_their_gradients(case: Case) -> None:
    for cycles in (1, 2, 3):
        found = train(case, cycles)
        assert_equal(found, case.truth.training[:cycles])
        for output, tokens, expected in zip(found.outputs, found.tokens, case.truth.training, strict=False):
            assert relative_error(gradients(case.wrapped, (output, tokens)), expected.gradients) <= TOLERANCE


def test_no_later_cycle_is_right_without_the_substitution(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handover, "__call__", lambda self, args, kwargs: (args, kwargs))
    for found, expected in (
        (evaluate(case, 3), case.truth.evaluation),
        (train(case, 3), case.truth.training),
    ):
        for cycle in (1, 2):
            assert VISIBLE < relative_error(found.outputs[cycle], expected[cycle].output) < math.inf
            assert VISIBLE < relative_error(found.tokens[cycle], expected[cycle].tokens) < math.inf


def evaluate(case: Case, cycles: int) -> CycleOutput:
    args, kwargs = case.row.inputs()
    with torch.no_grad():
        return run_cycles(case.wrapped.eval(), *args, cycles=cycles, **kwargs)


def train(case: Case, cycles: int) -> CycleOutput:
    args, kwargs = case.row.inputs()
    set_cycles(case.wrapped, cycles)
    found: Any = case.wrapped.train()(*args, **kwargs)
    assert isinstance(found, CycleOutput)
    return found


def assert_equal(found: CycleOutput, expected: list[Cycle]) -> None:
    assert len(found.outputs) == len(found.tokens) == len(expected)
    for cycle, truth in enumerate(expected):
        assert relative_error(found.outputs[cycle], truth.output) <= TOLERANCE
        assert relative_error(found.tokens[cycle], truth.tokens) <= TOLERANCE
