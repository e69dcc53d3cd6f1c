"""One forward that changes nothing, with every module call noted; and inputs for it, from the model's description."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cyclekd.structure import leaves

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Call:
    """One call of one module; `start` and `end` count calls and returns, so that nesting and order can be read off."""

    module: nn.Module
    start: int
    end: int = -1
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the first tensor that leaves, where a tensor of that shape also enters; None for calls that change it."""
        left = next((tensor for tensor in self.outputs if tensor.is_floating_point()), None)
        if left is None or left.is_nested or left.ndim < 2:
            return None
        if not any(tensor.shape == left.shape for tensor in self.inputs if not tensor.is_nested):
            return None
        return tuple(left.shape)

    def carried(self) -> list[Tensor]:
        """The inputs of the shape that leaves."""
        return [tensor for tensor in self.inputs if not tensor.is_nested and tuple(tensor.shape) == self.shape]


def record_calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
    """Every module call of one evaluation forward, in order of entry; modes and random state stay as they were."""
    calls: list[Call] = []
    running: list[Call] = []
    clock = iter(range(10**9))

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(Call(module, next(clock), inputs=[tensor for _, tensor in leaves((args, kwargs))]))
        calls.append(running[-1])

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        while running and running[-1].module is not module:  # a call that ended by an exception
            running.pop()
        call = running.pop()
        call.end, call.outputs = next(clock), [tensor for _, tensor in leaves(output)]

    modules = list(model.modules())
    handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in modules]
    handles += [m.register_forward_hook(leave, with_kwargs=True) for m in modules]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(devices):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [call for call in calls if call.end >= 0]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while; then every module is back in the mode it was in, frozen parts too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def input_candidates(model: nn.Module) -> Iterator[Arguments]:
    """Arguments that may fit the model, likeliest first; on its device and in its dtype."""
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    dtype = parameter.dtype if parameter is not None else torch.float32
    of_hugging_face = hasattr(getattr(model, "config", None), "model_type")
    candidates = _from_config(model) if of_hugging_face else _images(model)
    for args, kwargs in candidates:
        yield tuple(_to(arg, device, dtype) for arg in args), {k: _to(v, device, dtype) for k, v in kwargs.items()}


def _to(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() and dtype.is_floating_point else value.to(device)


# -- image models, as timm writes them ---------------------------------------------------------------------------------


def _images(model: nn.Module) -> Iterator[Arguments]:
    for channels in _image_channels(model):
        for height, width in _image_sizes(model):
            yield (torch.zeros(1, channels, height, width),), {}


def _image_sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    sizes = [getattr(getattr(model, "patch_embed", None), "img_size", None), getattr(model, "img_size", None)]
    described = getattr(model, "pretrained_cfg", None) or {}
    # The pretrained size comes late: a model built for another size keeps the description of the one it came from.
    sizes += [described.get("input_size", (None,))[1:] if isinstance(described, dict) else None, 224, 256, 64, 32]
    for size in sizes:
        if isinstance(size, int):
            yield size, size
        elif isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, int) for n in size):
            yield size[0], size[1]


def _image_channels(model: nn.Module) -> list[int]:
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    return list(dict.fromkeys((first, 3)))  # the first convolution listed is mostly, not always, the first called


# -- Hugging Face models -----------------------------------------------------------------------------------------------


def _from_config(model: nn.Module) -> Iterator[Arguments]:
    """Keyword arguments by the model's main input; `dummy_inputs` last: about half of the models run on theirs."""
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    text = {"input_ids": _token_ids(config)}
    decoder = {"decoder_input_ids": _token_ids(config)} if getattr(config, "is_encoder_decoder", False) else {}
    mains: dict[str, list[Tensor]] = {
        "pixel_values": _pixels(config),
        "pixel_values_videos": _videos(config),
        "input_values": _waves(config),
        "input_features": _spectra(config),
        "input_ids": [text["input_ids"]],
    }
    main = getattr(model, "main_input_name", "input_ids")
    for name in dict.fromkeys((*([main] if isinstance(main, str) else main), *mains)):
        for value in mains.get(name, []):
            if name not in accepted:
                continue
            companions = {**decoder, **({} if name == "input_ids" else text)}
            for extra in (companions, decoder, {}):
                yield (), {name: value, **{k: v for k, v in extra.items() if k in accepted}}
    dummies = getattr(model, "dummy_inputs", None)
    if isinstance(dummies, dict):
        yield (), dummies


def _token_ids(config: Any, length: int = 8) -> Tensor:
    """[1, length] ids, the last one the end of sequence where there is one (BART's classifier reads off its place)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = _first_int(text, ("vocab_size",), 16)
    ids = 3 + torch.arange(length) % max(vocabulary - 3, 1)
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[-1] = end
    return ids.clamp(max=vocabulary - 1)[None]


def _pixels(config: Any) -> list[Tensor]:
    vision = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None) or config
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 224
    sizes = [size if isinstance(size, (tuple, list)) else (size, size), (224, 224), (64, 64)]
    channels = _first_int(vision, ("num_channels", "in_channels", "in_chans"), 3)
    return [torch.zeros(1, channels, *each) for each in sizes] + _videos(config)


def _videos(config: Any) -> list[Tensor]:
    frames = getattr(config, "num_frames", None)
    if not isinstance(frames, int):
        return []
    size = _first_int(config, ("image_size",), 224)
    return [torch.zeros(1, frames, _first_int(config, ("num_channels",), 3), size, size)]


def _waves(config: Any) -> list[Tensor]:
    spectrum = (_first_int(config, ("max_length",), 1024), _first_int(config, ("num_mel_bins",), 128))
    noise = torch.linspace(-1, 1, 16000)
    return [noise[None], torch.zeros(1, *spectrum)]


def _spectra(config: Any) -> list[Tensor]:
    bins = _first_int(config, ("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim"), 80)
    positions = _first_int(config, ("max_source_positions",), 1500)
    return [torch.zeros(1, bins, 2 * positions), torch.zeros(1, 128, bins), torch.zeros(1, bins, 128)]


def _first_int(config: Any, names: tuple[str, ...], default: int) -> int:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), default)
