"""Tensors by path in nested arguments."""

from collections import namedtuple

import torch

from cyclekd.structure import get, leaves, own_containers, replace

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


def test_own_containers_are_new_where_they_can_be_written_to_and_hold_the_same_tensors():
    a = torch.zeros(1)
    value = {"list": [a, {"inner": a}], "point": Point(a, [a])}
    own = own_containers(value)
    own["list"][1]["inner"] = own["point"].y[0] = None
    own["list"].append(a)
    assert len(value["list"]) == 2 and value["list"][1]["inner"] is a and value["point"].y[0] is a
    assert own["list"][0] is a and isinstance(own["point"], Point)


def test_own_containers_leaves_objects_and_dicts_that_refuse_writing_alone():
    class Record:
        _fields = ("a",)

    class Frozen(dict):
        def __setitem__(self, key, value):
            raise TypeError("frozen")

    record, frozen = Record(), Frozen(a=torch.zeros(1))
    assert own_containers(record) is record
    assert own_containers(frozen) == frozen
