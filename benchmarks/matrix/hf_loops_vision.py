"""Forwards of vision models written by hand, where a longer list would not do what a cycle is defined to do."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from benchmarks.matrix.repeated import blocks_at, first_tensor

Left = tuple[Any, Any]
"""The output, and what left the last block of the last round."""


def conditional_detr_decoder(model: nn.Module, times: int, args: Any, kwargs: Any) -> Left:
    """Block 0 of every round gets the untransformed query positions and is told to be the first."""
    return entered_again("model.decoder.layers", model, times, args, kwargs)


def dab_detr_decoder(model: nn.Module, times: int, args: Any, kwargs: Any) -> Left:
    """The boxes that the loop refines between blocks start anew with every round, as do the outputs by block."""
    return entered_again("model.decoder.layers", model, times, args, kwargs)


def deformable_decoder(model: nn.Module, times: int, args: Any, kwargs: Any) -> Left:
    """Each block of a round is followed by the heads of its number, and the reference points start anew."""
    return entered_again("model.decoder.layers", model, times, args, kwargs)


def yolos_encoder(model: nn.Module, times: int, args: Any, kwargs: Any) -> Left:
    """Positions are added between the blocks of a round, and not between the last and the first of the next."""
    return entered_again("vit.encoder.layer", model, times, args, kwargs)


def eomt_queries(model: nn.Module, times: int, args: Any, kwargs: Any) -> Left:
    """The queries join before the stack, once; block 0 of every round keeps the mask that was predicted there."""
    return entered_again("layers.1:3", model, times, args, kwargs)


def sam3_decoder(model: nn.Module, times: int, args: Any, kwargs: Any) -> Left:
    """The boxes that are refined after every block start anew with every round, as do the outputs by block."""
    return entered_again("layers", model, times, args, kwargs)


def mllama_encoder(model: nn.Module, times: int, args: Any, kwargs: Any) -> Left:
    """The outputs of single blocks that stand beside the last are those of the last round."""
    return entered_again("transformer.layers", model, times, args, kwargs)


def oneformer_decoder(model: nn.Module, times: int, args: Any, kwargs: Any) -> Left:
    """Block 0 of every round keeps the mask that was predicted before it, and the predictions by block start anew."""
    return entered_again("model.transformer_module.decoder.layers", model, times, args, kwargs, tokens="output")


def beit_taps(model: nn.Module, times: int, args: Any, kwargs: Any) -> Left:
    """The head reads what the blocks of the last round left."""
    return entered_again("beit.layers", model, times, args, kwargs)


def data2vec_taps(model: nn.Module, times: int, args: Any, kwargs: Any) -> Left:
    """The head reads what the blocks of the last round left."""
    return entered_again("data2vec_vision.encoder.layer", model, times, args, kwargs)


def depth_pro_patches(model: nn.Module, times: int, args: Any, kwargs: Any) -> Left:
    """The single blocks that the neck reads beside the last are those of the last round."""
    return entered_again("depth_pro.encoder.patch_encoder.model.encoder.layer", model, times, args, kwargs)


def entered_again(
    path: str, model: nn.Module, times: int, args: Any, kwargs: Any, tokens: str = "hidden_states"
) -> Left:
    """One forward per round: its first block gets the tokens that left the last one in the round before.

    They are its first argument, or the one called `tokens` where it is called by names alone. So whatever the loop
    passes beside them, counts by block or collects starts anew with every round.
    """
    blocks = blocks_at(model, path)
    left: Any = None

    def keep(block: nn.Module, given: Any, made: Any) -> None:
        nonlocal left
        left = made

    def enter(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        again = first_tensor(left)
        return ((again, *given[1:]), named) if given else ((), {**named, tokens: again})

    random = torch.get_rng_state()
    for number in range(times):
        torch.set_rng_state(random)
        with ExitStack() as hooks:
            hooks.enter_context(blocks[-1].register_forward_hook(keep))
            if number:
                hooks.enter_context(blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
            output = model(*args, **kwargs)
    return output, left
