"""The ground truth of every exactness test: the same model with its block list really repeated.

Knows nothing of cyclekd and imports nothing from it. A longer model holds the very parameters, buffers and block
modules of the short one, so that the gradients of all its cycles accumulate where the short one keeps its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# -- the longer model --------------------------------------------------------------------------------------------


def repeat_blocks(model: nn.Module, path: str, times: int) -> nn.Module:
    """A model whose block list at `path` is `times` times as long; every parameter is shared with `model`.

    Hugging Face decoders cut their list at `config.num_hidden_layers` and look up a type per layer, and ALBERT
    counts calls by it, so the depth in the config is multiplied too.
    """
    owner, part = _split(model, path)
    shared = [*model.parameters(), *model.buffers(), *blocks_at(model, path)]
    longer = copy.deepcopy(model, {id(each): each for each in shared})
    container = longer.get_submodule(owner)
    every = list(container._modules.items())
    if isinstance(container, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        blocks = [block for _, block in every]
        repeated = blocks[: part.start] + blocks[part] * times + blocks[part.stop :]
        container._modules = {str(i): block for i, block in enumerate(repeated)}
    elif times > 1:  # its forward calls blocks by their names: what is to come after the last one is put into its place
        name, last = every[part][-1]
        setattr(container, name, nn.Sequential(last, *[block for _, block in every[part]] * (times - 1)))
    for each in _configs(longer).keys() - _configs(model).keys():  # the blocks still hold the short model's
        _deepen(_configs(longer)[each], times)
    return longer


def blocks_at(model: nn.Module, path: str) -> list[nn.Module]:
    """The blocks of the stack at `path`, in order; `"blocks.1:4"` leaves out the first."""
    owner, part = _split(model, path)
    return [block for block in model.get_submodule(owner)._modules.values() if block is not None][part]


def _split(model: nn.Module, path: str) -> tuple[str, slice]:
    owner, _, last = path.rpartition(".")
    if ":" in last:
        start, stop = (int(number) for number in last.split(":"))
        return owner, slice(start, stop)
    return path, slice(0, len(model.get_submodule(path)._modules))


def _configs(model: nn.Module) -> dict[int, Any]:
    found = (getattr(module, "config", None) for module in model.modules())
    return {id(config): config for config in found if config is not None}


def _deepen(config: Any, times: int) -> None:
    for name in ("num_hidden_layers", "layer_types"):
        if getattr(config, name, None) is not None:
            with suppress(AttributeError, NotImplementedError, TypeError):  # worked out from others by some configs
                setattr(config, name, getattr(config, name) * times)


# -- what it computes --------------------------------------------------------------------------------------------


class Cycle(NamedTuple):
    """What a model computes whose stack is so many times as long."""

    output: Any
    tokens: Any
    gradients: dict[str, Tensor]


Loop = Callable[[nn.Module, int, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]]
"""A forward written by hand, `loop(model, times, args, kwargs)`: the output, and what left the last block."""


class Truth:
    """Cycles 1 to 3 of `model`, each from a longer model or a hand-written loop, computed when first asked for."""

    def __init__(
        self,
        model: nn.Module,
        path: str,
        inputs: tuple[tuple[Any, ...], dict[str, Any]],
        tokens: Callable[[Any], Any],
        lengthen: Callable[[nn.Module, int], None] | None = None,
        loop: Loop | None = None,
        last_round: Callable[[Any, int], Any] | None = None,
    ) -> None:
        self.model, self.path, self.tokens, self.loop, self.last_round = model, path, tokens, loop, last_round
        self.args, self.kwargs = inputs
        if loop is not None:
            self.longer = [model] * 3
            return
        self.longer = [repeat_blocks(model, path, times) for times in (1, 2, 3)]
        for times, longer in enumerate(self.longer, start=1):
            if lengthen is not None:
                lengthen(longer, times)

    @cached_property
    def evaluation(self) -> list[Cycle]:
        with torch.no_grad():
            return [Cycle(*self.run(longer.eval(), times), {}) for times, longer in enumerate(self.longer, start=1)]

    @cached_property
    def training(self) -> list[Cycle]:
        ran = [self.run(longer.train(), times) for times, longer in enumerate(self.longer, start=1)]
        return [Cycle(output, tokens, gradients(self.model, (output, tokens))) for output, tokens in ran]

    def run(self, longer: nn.Module, times: int) -> tuple[Any, Any]:
        """Output and tokens of one forward."""
        torch.manual_seed(0)
        if self.loop is not None:
            output, left = self.loop(longer, times, self.args, self.kwargs)
            return output, self.tokens(left)
        return self.run_longer(longer, times)

    def run_longer(self, longer: nn.Module, times: int) -> tuple[Any, Any]:
        left: list[Any] = []

        def keep(block: nn.Module, args: Any, output: Any) -> None:
            left[:] = [output]  # of the last of several calls

        handle = blocks_at(self.model, self.path)[-1].register_forward_hook(keep)
        try:
            output = longer(*copy.deepcopy(self.args), **copy.deepcopy(self.kwargs))  # some models write on theirs
        finally:
            handle.remove()
        if self.last_round is not None:
            output = self.last_round(output, times)
        return output, self.tokens(left[0])


def first_tensor(left: Any) -> Tensor:
    """The tokens in what a block returned: itself, or the first tensor in it."""
    return left if isinstance(left, Tensor) else next(tensor for tensor in left if isinstance(tensor, Tensor))


def gradients(model: nn.Module, value: Any) -> dict[str, Tensor]:
    """Of one random scalar of `value`, by the names of all trainable parameters; 0 where nothing arrives."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(projection(value), list(named.values()), retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def projection(value: Any) -> Tensor:
    """A fixed random scalar of all floating tensors in `value`, each counting alike."""
    draw = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for tensor in leaves(value).values():
        if tensor.is_floating_point():
            weights = torch.randn(tensor.shape, generator=draw)
            total = total + (tensor * weights).sum() / max(tensor.numel(), 1) ** 0.5
    return total


# -- comparing ---------------------------------------------------------------------------------------------------


def relative_error(found: Any, expected: Any) -> float:
    """Largest difference over the largest value of each tensor, the worst of all; inf where two do not match."""
    a, b = leaves(found), leaves(expected)
    if not b or a.keys() != b.keys():
        return math.inf
    return max(_error(a[where], b[where]) for where in b)


def _error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    if torch.equal(found, expected):
        return 0.0
    if not expected.is_floating_point():
        return math.inf
    error = (found - expected).abs().max() / expected.abs().max()
    return error.item() if error.isfinite() else math.inf


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The same by parameter; gradients that are rounding alone (of key biases) count by the largest of all."""
    largest = max(_peak(gradient) for gradient in expected.values())
    errors = [_peak(found[name] - each) / max(_peak(each), 1e-3 * largest) for name, each in expected.items()]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def _peak(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def all_finite(value: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in leaves(value).values())


def leaves(value: Any) -> dict[str, Tensor]:
    """Every tensor in an output by where it stands; tuples, lists, dicts and dataclasses are looked into."""
    if isinstance(value, Tensor):
        return {"": value}
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    elif is_dataclass(value):
        items = ((field.name, getattr(value, field.name)) for field in fields(value))
    else:
        return {}
    return {f".{key}{where}": tensor for key, item in items for where, tensor in leaves(item).items()}


# -- weights that show a difference ------------------------------------------------------------------------------


def make_nondegenerate(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights under which every block moves the tokens and every parameter matters; returns `model`.

    Zero-initialised heads, layer scales of 1e-5 and biases of 0 would let cycle 2 equal cycle 1, and then an exact
    comparison of the two proves nothing.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draw)

    drawn: set[nn.Parameter] = set()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter not in drawn and parameter.numel():  # tied ones once
                    parameter.copy_(_redrawn(module, name, parameter, normal))
                    drawn.add(parameter)
            if getattr(module, "running_var", None) is not None:
                module.running_mean.add_(0.1 * normal(module.running_mean))
                module.running_var.mul_(0.8 + 0.4 * torch.rand(module.running_var.shape, generator=draw))
    return model


def _redrawn(module: nn.Module, name: str, old: Tensor, normal: Callable[[Tensor], Tensor]) -> Tensor:
    if isinstance(module, nn.Embedding):
        return 0.5 * normal(old)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and name == "weight":
        return 1 + 0.1 * normal(old)  # some start close to 0
    if not old.isfinite().all() or old.abs().max() > 1e3:
        old = torch.zeros_like(old)  # memory that nothing was written to yet
    if name == "weight" and old.ndim >= 2:
        gain = 0.5 if getattr(module, "groups", 1) > 1 else 1.0  # DaVit adds depthwise convolutions unnormed
        return gain * normal(old) / math.sqrt(old[0].numel())  # keeps the scale of what passes through
    if "norm" in type(module).__name__.lower() or name == "bias":
        return old + 0.1 * normal(old)  # most norm weights start at 1, Gemma's at 0
    if max(old.shape, default=1) == old.numel() and old.abs().max() < 0.2:
        return 0.5 + 0.1 * normal(old)  # a layer scale that was born close to 0
    return old + 0.2 * normal(old)
