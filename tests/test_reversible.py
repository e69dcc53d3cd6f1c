"""One cycle is the plain model, evaluation the base, unwrapping leaves nothing: bitwise, for all models of the zoo."""

from __future__ import annotations

import copy

import pytest
import torch

import zoo
from benchmarks.matrix.repeated import leaves
from cyclekd import unwrap_multicycle, wrap_multicycle


def run(model, row, seed=0):
    torch.manual_seed(seed)
    args, kwargs = row.inputs()
    return model(*args, **kwargs)


def gradients(model, output):
    total = sum(tensor.square().mean() for tensor in leaves(output).values() if tensor.is_floating_point())
    model.zero_grad()
    total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_bitwise(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def hooks_and_patches(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    hooks = {(name, kind): len(getattr(m, kind)) for name, m in model.named_modules() for kind in kinds}
    return hooks, {name for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize("row", [*zoo.TIMM, *zoo.HF], ids=lambda row: row.name)
def test_one_cycle_evaluation_and_unwrapping_are_bitwise_the_base(row):
    model = row.build()
    plain, keys = copy.deepcopy(model), list(model.state_dict())
    wrap_multicycle(model, cycles=1).train()
    plain.train()
    found, expected = run(model, row), run(plain, row)
    assert_bitwise(leaves(found.outputs[0]), leaves(expected))
    assert_bitwise(gradients(model, found.outputs[0]), gradients(plain, expected))
    if found.loss is not None:
        assert torch.equal(found.loss, found.outputs[0].loss)
    for each in (model, plain):
        each.eval()
    assert hooks_and_patches(model) == hooks_and_patches(plain)
    with torch.no_grad():
        expected = leaves(run(plain, row))
        assert_bitwise(leaves(run(model, row)), expected)
        base = unwrap_multicycle(model)
        assert base is model and type(base) is type(plain) and list(base.state_dict()) == keys
        assert set(vars(base)) == set(vars(plain)) and hooks_and_patches(base) == hooks_and_patches(plain)
        assert_bitwise(leaves(run(base, row)), expected)
