"""The claims of test_exact_timm.py for Hugging Face models, with labels wherever the class computes a loss."""

from __future__ import annotations

import pytest

from benchmarks.matrix.repeated import relative_error
from test_exact_timm import (  # noqa: F401
    TOLERANCE,
    Case,
    make_case,
    test_cycles_in_evaluation_equal_longer_models,
    test_cycles_in_training_equal_longer_models_with_their_gradients,
    test_longer_models_differ_and_every_block_learns,
    test_no_later_cycle_is_right_without_the_substitution,
    test_the_stack_is_found,
    train,
)
from zoo import HF


@pytest.fixture(scope="module", params=HF, ids=lambda row: row.name)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def test_every_cycle_has_the_loss_of_its_longer_model(case: Case) -> None:
    found, expected = train(case, 3), case.truth.training
    if expected[0].output.get("loss") is None:
        assert "labels" not in case.row.inputs()[1]
        assert found.loss is None
        return
    assert found.loss is not None and found.loss.isfinite()
    for output, cycle in zip(found.outputs, expected, strict=True):
        assert relative_error(output.loss, cycle.output.loss) <= TOLERANCE
