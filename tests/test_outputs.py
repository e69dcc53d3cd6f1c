"""What a CycleOutput answers to code that expects the base's output."""

import pytest
import torch

from cyclekd import CycleError, CycleOutput


def test_an_attribute_of_the_base_output_is_pointed_to():
    output = CycleOutput(None, (torch.zeros(1),) * 2, (torch.zeros(1),) * 2)
    with pytest.raises(AttributeError, match=r"one output per cycle.*'logits'.*\.outputs\[0\]\.logits.*model\.eval"):
        output.logits  # noqa: B018


def test_a_loss_that_was_never_computed_is_refused_by_index():
    output = CycleOutput(None, (), ())
    assert output.loss is None
    with pytest.raises(CycleError, match=r"pass it `labels`.*label_smoothing_factor.*compute_loss_func="):
        output[0]


def test_it_is_a_named_tuple_with_the_loss_first():
    output = CycleOutput(torch.ones(()), (1, 2), (3, 4))
    assert output[0] == 1 and output[1:] == ((1, 2), (3, 4)) and output[-1] == (3, 4)
    loss, outputs, tokens = output
    assert (loss, outputs, tokens) == (1, (1, 2), (3, 4))


def test_a_loss_function_that_gets_it_says_what_to_write():
    output = CycleOutput(None, (torch.zeros(2, 3),) * 2, (torch.zeros(1),) * 2)
    with pytest.raises(CycleError, match=r"cross_entropy.*CycleLoss\(task\)\(outputs, labels\)\.total.*outputs\[0\]"):
        torch.nn.functional.cross_entropy(output, torch.tensor([0, 1]))
