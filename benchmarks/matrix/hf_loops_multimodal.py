"""Forwards written by hand of audio and multimodal models, where a longer list would not do what a cycle is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.matrix.repeated import blocks_at, repeat_blocks


def residual_units(model: nn.Module, times: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
    """The three units of the encoder's last block stand in no list: the block names each of them in its forward."""
    blocks = [block for block in model.modules() if type(block).__name__.endswith("DacEncoderBlock")]
    return _units_again(blocks[-1], model, times, args, kwargs)


def residual_units_of_decoder(
    model: nn.Module, times: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tensor]:
    """The three units of the decoder's first block, which likewise names each of them."""
    blocks = [block for block in model.modules() if type(block).__name__.endswith("DacDecoderBlock")]
    return _units_again(blocks[0], model, times, args, kwargs)


def _units_again(
    owner: Any, model: nn.Module, times: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tensor]:
    left: list[Tensor] = []

    def again(unit: nn.Module, args: Any, tokens: Tensor) -> Tensor:
        for _ in range(times - 1):
            for each in (owner.res_unit1, owner.res_unit2, owner.res_unit3):
                tokens = each.forward(tokens)
        left[:] = [tokens]
        return tokens

    handle = owner.res_unit3.register_forward_hook(again)
    try:
        return model(*args, **kwargs), left[0]
    finally:
        handle.remove()


def trend_of_last_round(model: nn.Module, times: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Autoformer's decoder adds up a trend over its blocks, which every cycle begins anew."""
    blocks, longer = blocks_at(model, "decoder.layers"), repeat_blocks(model, "decoder.layers", times)
    left: list[Any] = []

    def keep(block: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        left.append(output)
        earlier = len(left) <= len(blocks) * (times - 1)
        return (output[0], torch.zeros_like(output[1])) if earlier else output

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        return longer(*args, **kwargs), left[-1]
    finally:
        for handle in handles:
            handle.remove()


def guess_in_every_round(
    model: nn.Module, times: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """Granite's speech encoder adds to the middle block's tokens what they are read as, by the block's number."""
    blocks, longer = blocks_at(model, "layers"), repeat_blocks(model, "layers", times)
    longer.num_layers, left = 0, []

    def add(block: nn.Module, args: Any, tokens: Tensor) -> Tensor:
        return tokens + longer.out_mid(longer.out(tokens).softmax(-1))

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        left[:] = [output]

    handles = [
        blocks[model.num_layers // 2 - 1].register_forward_hook(add),
        blocks[-1].register_forward_hook(keep),
    ]
    try:
        return longer(*args, **kwargs), left[0]
    finally:
        for handle in handles:
            handle.remove()


class Skipped(nn.Module):
    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tokens


def images_between_blocks(
    model: nn.Module, times: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """Idefics looks at the images before every block; before the first one only when the tokens enter the stack."""
    longer, left = repeat_blocks(model, "model.layers", times), []
    decoder = longer.model
    first, *others = decoder.gated_cross_attn_layers
    decoder.gated_cross_attn_layers = nn.ModuleList([first, *others, *[Skipped(), *others] * (times - 1)])

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        left[:] = [output]

    handle = blocks_at(model, "model.layers")[-1].register_forward_hook(keep)
    try:
        return longer(*args, **kwargs), left[0]
    finally:
        handle.remove()
