"""Forwards of timm models written by hand, where a longer list would not do what a cycle is defined to do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def twins(model: nn.Module, times: int, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """Positions are added after block 0 of the longest stage in every round; a longer list adds them once."""
    (x,) = args
    longest = max(range(len(model.blocks)), key=lambda stage: len(model.blocks[stage]))
    for stage, blocks in enumerate(model.blocks):
        x, size = model.patch_embeds[stage](x)
        x = model.pos_drops[stage](x)
        for _ in range(times if stage == longest else 1):
            for number, block in enumerate(blocks):
                x = block(x, size)
                if stage == longest and number == len(blocks) - 1:
                    left = x
                if number == 0:
                    x = model.pos_block[stage](x, size)
        if stage < len(model.blocks) - 1:
            x = x.reshape(len(x), *size, -1).permute(0, 3, 1, 2).contiguous()
    return model.forward_head(model.norm(x)), left
