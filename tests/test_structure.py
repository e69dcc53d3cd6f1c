"""Tensors by path in nested arguments."""

from collections import namedtuple

import torch

from cyclekd.structure import get, leaves, replace

Point = namedtuple("Point", ["x", "y"])


def test_leaves_come_in_order_with_their_paths():
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    value = ((a, [None, b]), {"mask": {"inner": c}, "flag": True})
    assert [path for path, _ in leaves(value)] == [(0, 0), (0, 1, 1), (1, "mask", "inner")]
    assert all(get(value, path) is tensor for path, tensor in leaves(value))


def test_get_beyond_the_value_is_none():
    assert get(((1,), {}), (0, 3)) is None
    assert get(((1,), {}), (1, "mask", "inner")) is None


def test_replace_copies_containers_and_keeps_their_types():
    value = ([1, Point(2, 3)], {"k": 4})
    new = replace(value, (0, 1, 1), 9)
    assert new == ([1, Point(2, 9)], {"k": 4}) and isinstance(new[0][1], Point)
    assert replace(value, (1, "new"), 5)[1] == {"k": 4, "new": 5}
    assert value == ([1, Point(2, 3)], {"k": 4})
