"""Tensors inside nested tuples, lists and dicts, addressed by path: how block arguments and results are compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

Path = tuple[Any, ...]
Leaf = tuple[Path, Tensor]


def leaves(value: Any, path: Path = ()) -> list[Leaf]:
    """The tensors inside `value` with their paths, in order; only tuples, lists and dicts are looked into."""
    if isinstance(value, Tensor):
        return [(path, value)]
    found: list[Leaf] = []
    for key, item in _items(value):
        found += leaves(item, (*path, key))
    return found


def get(value: Any, path: Path) -> Any:
    """What stands at `path`, or None where `value` does not reach so far."""
    for key in path:
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, (tuple, list)) and key < len(value):
            value = value[key]
        else:
            return None
    return value


def replace(value: Any, path: Path, new: Any) -> Any:
    """`value` with `new` at `path`; containers on the way are copied, never written to."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, Mapping):
        items = {**value, key: replace(value.get(key), rest, new)}
        if type(value) is dict:
            return items
        if is_dataclass(value):
            return type(value)(**items)  # Hugging Face's outputs are both
        other: Any = copy.copy(value)
        other[key] = items[key]
        return other
    row = [replace(item, rest, new) if i == key else item for i, item in enumerate(value)]
    if isinstance(value, list):
        return row
    return _like(value, row)


def own_containers(value: Any) -> Any:
    """The same tensors in lists and dicts of their own, however deep, so that a write stays where it is made."""
    if isinstance(value, dict):
        try:
            fresh = copy.copy(value)
            for key, item in value.items():
                fresh[key] = own_containers(item)
        except TypeError:  # a dict that refuses to be written to needs no copy
            return value
        return fresh
    if isinstance(value, list):
        return [own_containers(item) for item in value]
    if isinstance(value, tuple):
        return _like(value, [own_containers(item) for item in value])
    return value


def copied(value: Any) -> Any:
    """`value` with a copy of every tensor in it."""
    for path, tensor in leaves(value):
        value = replace(value, path, tensor.clone())
    return value


def _like(value: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    """A tuple of these items, or a named one of the kind of `value`."""
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    return []
