"""Key-value caches in the arguments of a forward that is run several times."""

from __future__ import annotations

import copy
from typing import Any

from cyclekd.errors import CycleError

CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "past_buckets_states")


def calls_with_own_caches(args: Any, kwargs: Any, cycles: int) -> list[tuple[Any, Any]]:
    """The arguments of every pass: an empty cache is copied for each, a filled one refused.

    One more than `cycles` is returned, for a pass that only looks.
    """
    named = [*((f"argument {i}", arg) for i, arg in enumerate(args)), *kwargs.items()]
    caches = [(name, value) for name, value in named if _is_cache(name, value)]
    if cycles == 1 or not caches:
        return [(args, kwargs) for _ in range(cycles + 1)]
    for name, cache in caches:
        if _is_filled(cache):
            raise CycleError(
                f"{name} brings a filled cache ({type(cache).__name__}) into {cycles} cycles: the second would "
                "attend to keys of the first. Leave it out and pass use_cache=False; generate() makes one pass in "
                "every mode and takes caches as ever"
            )
    empty = {id(cache): cache for _, cache in caches}
    return [(args, kwargs), *(_with_copies(args, kwargs, empty) for _ in range(cycles))]


def _with_copies(args: Any, kwargs: Any, caches: dict[int, Any]) -> tuple[Any, Any]:
    def own(value: Any) -> Any:
        return copy.deepcopy(value) if id(value) in caches else value

    return tuple(own(arg) for arg in args), {name: own(value) for name, value in kwargs.items()}


def _is_cache(name: str, value: Any) -> bool:
    return value is not None and (name in CACHE_NAMES or hasattr(value, "get_seq_length"))


def _is_filled(cache: Any) -> bool:
    if hasattr(cache, "get_seq_length"):
        return _length(cache) > 0 or any(_holds_state(layer) for layer in getattr(cache, "layers", ()))
    return not isinstance(cache, (tuple, list)) or len(cache) > 0


def _length(cache: Any) -> int:
    try:
        return int(cache.get_seq_length())
    except ValueError:  # a cache of recurrent layers alone, which have no length
        return 0


def _holds_state(layer: Any) -> bool:
    """Of a recurrent layer, such as Mamba's."""
    states = getattr(layer, "has_previous_state", False)
    return any(states.values()) if isinstance(states, dict) else states is True
