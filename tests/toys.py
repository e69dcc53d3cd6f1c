"""Models of a few lines, each with one trait that cycling has to get right or refuse."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8


class Block(nn.Module):
    """Mixes tokens and features; [B, T, D] in and out."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + torch.tanh(self.mix(y + y.mean(1, keepdim=True)))


class Toy(nn.Module):
    """Stem, three blocks, norm and head: the shape of a ViT. [B, T, 4] -> [B, 3]."""

    def __init__(self, make_block: type[nn.Module] = Block, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList([make_block() for _ in range(depth)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean(1))


def images(batch: int = 2, tokens: int = 5) -> Tensor:
    return torch.randn(batch, tokens, 4, generator=torch.Generator().manual_seed(1))


def repeated(model: Toy, times: int) -> Toy:
    """The same model with its block list really repeated; every parameter is shared."""
    longer = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    longer.blocks = nn.ModuleList(list(longer.blocks) * times)
    return longer


class InPlaceBlock(Block):
    """Writes its result onto its input."""

    def forward(self, x: Tensor) -> Tensor:
        x += super().forward(x.clone())
        return x


class InPlaceStem(Toy):
    """Adds positions in place onto what its stem module returned."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 5, WIDTH))

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x += self.position
        for block in self.blocks:
            x = block(x)
        return x


class InPlaceTail(Toy):
    """Writes on the tokens after they have left the stack."""

    def forward_head(self, x: Tensor) -> Tensor:
        x *= 2
        return super().forward_head(x)


class GluedToy(Toy):
    """Adds positions between its blocks, as TokenPose does; so they never enter block 0."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 5, WIDTH))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.loop(self.stem(x))

    def loop(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x + self.position if i else x)
        return x


class OuterResidualToy(Toy):
    """Adds each block's input to its output outside of the block; `way` names how."""

    way = "plain"

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            if self.way == "plain":
                x = x + block(x)
            elif self.way == "in place":
                x += block(x.clone())
            elif i % 2 == 0:  # "pairs": attention and MLP are blocks of their own, with one residual around both
                y = block(x)
            else:
                x = x + block(y)
        return x


class LayerDropToy(Toy):
    """Leaves out each block with probability `rate` in training."""

    rate = 0.5

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if not (self.training and torch.rand(()) < self.rate):
                x = block(x)
        return x


class BatchNormToy(Toy):
    """Batch norm in the stem, between the blocks' linear layers and in the tail."""

    def __init__(self) -> None:
        super().__init__(BatchNormBlock)
        self.stem = nn.Sequential(nn.Linear(4, WIDTH), TokenBatchNorm())
        self.norm = TokenBatchNorm()


class TokenBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.transpose(1, 2)).transpose(1, 2)


class BatchNormBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = TokenBatchNorm()


class CheckpointedToy(Toy):
    """Checkpoints its blocks; `frames` says how: all in one, each by itself, within a second one, or with the stem."""

    frames = "one"
    bend = False  # a last operation in the outer of two frames, without which it would not be run to its end again
    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        if self.frames == "with stem":
            return self.forward_head(self.checkpointed(self.forward_features, x))
        return super().forward(x)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.frames in ("none", "with stem"):
            return self.bent(self.loop(x))
        if self.frames == "nested":
            return self.checkpointed(lambda x: self.bent(self.checkpointed(self.loop, x)), x)
        if self.frames == "each":
            return self.loop_of_frames(x)
        return self.checkpointed(self.loop if self.frames == "one" else self.loop_of_frames, x)

    def loop(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def loop_of_frames(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.checkpointed(block, x)
        return x

    def bent(self, x: Tensor) -> Tensor:
        return x.tanh() if self.bend else x

    def checkpointed(self, function, x: Tensor) -> Tensor:
        return checkpoint(function, x, use_reentrant=self.use_reentrant)


class PruningToy(Toy):
    """Keeps at most half of the tokens after its second block, as token pruning does."""

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        most = (x.shape[1] + 1) // 2
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 1:
                x = x[:, :most]
        return x


class Pair(nn.Module):
    """Carries two streams that see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = Block(), Block()

    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(fine + coarse.mean(1, keepdim=True))
        return fine, self.coarse(coarse + fine.mean(1, keepdim=True))


class TwoStreamToy(Toy):
    def __init__(self) -> None:
        super().__init__(Pair)

    def forward_features(self, x: Tensor) -> Tensor:
        fine, coarse = self.stem(x), self.stem(x[:, :2])
        for block in self.blocks:
            fine, coarse = block(fine, coarse)
        return torch.cat([fine, coarse], 1)


class ResidualBlock(Block):
    """Hands on its branch and the residual apart from each other; the first block gets no residual."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        residual = x if residual is None else x + residual
        return torch.tanh(self.mix(self.norm(residual))), residual


class ResidualToy(Toy):
    def __init__(self) -> None:
        super().__init__(ResidualBlock)

    def forward_features(self, x: Tensor) -> Tensor:
        x, residual = self.stem(x), None
        for block in self.blocks:
            x, residual = block(x, residual)
        return x + residual


class BiasBlock(Block):
    """Hands a bias through untouched, as T5 does with its position bias."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        bias = torch.ones(1, 1, WIDTH) if bias is None else bias
        return super().forward(x + bias), bias


class BiasToy(Toy):
    def __init__(self) -> None:
        super().__init__(BiasBlock)

    def forward_features(self, x: Tensor) -> Tensor:
        x, bias = self.stem(x), None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x


class WideningToy(Toy):
    """Leaves its stack wider than it entered it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[-1] = Widening()
        self.norm, self.head = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, 3)


class Widening(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x)] * 2, -1)


class FlatteningToy(Toy):
    """Leaves its stack with one axis less."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[-1] = Flattening()

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


class Flattening(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


class Box:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class BoxingBlock(Block):
    """Returns an object in which no tensor can be found."""

    def forward(self, x) -> Box:
        return Box(super().forward(x.value if isinstance(x, Box) else x))


class BoxingToy(Toy):
    def __init__(self) -> None:
        super().__init__(BoxingBlock)

    def forward_head(self, x) -> Tensor:
        return super().forward_head(x.value)


class SiameseToy(Toy):
    """Sends two views through one stack."""

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x)) + self.forward_head(self.forward_features(-x))


class TwinToy(Toy):
    """Two equal stacks in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleList([Block() for _ in self.blocks])

    def forward_features(self, x: Tensor) -> Tensor:
        x = super().forward_features(x)
        for block in self.more:
            x = block(x)
        return x


class Cache:
    """Counts what it holds, as Hugging Face's caches do."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def get_seq_length(self) -> int:
        return sum(state.shape[1] for state in self.states)


class CachingToy(Toy):
    """Attends to what its caller's cache holds, and adds to it."""

    def forward(self, x: Tensor, past_key_values: Cache | None = None) -> Tensor:
        tokens = self.forward_features(x)
        if past_key_values is not None:
            past_key_values.states.append(tokens)
            tokens = torch.cat(past_key_values.states, 1)
        return self.forward_head(tokens)


class LossToy(Toy):
    """Computes its own loss when it gets labels, as Hugging Face models do."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = super().forward(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class FunctionToy(Toy):
    """Its loop, stem and tail are functions of the model that a test hands in."""

    def __init__(self, make_block=Block, *, loop=None, stem=None, tail=None, depth: int = 3) -> None:
        super().__init__(make_block, depth)
        self.functions = {"loop": loop, "stem": stem, "tail": tail}

    def forward(self, x):
        x = self.functions["stem"](self, x) if self.functions["stem"] else self.stem(x)
        loop = self.functions["loop"] or (lambda model, x: run_blocks(model, x))
        x = loop(self, x)
        return self.functions["tail"](self, x) if self.functions["tail"] else self.forward_head(x)


def run_blocks(model, x):
    for block in model.blocks:
        x = block(x)
    return x


class MaskedBlock(Block):
    """Hands a mask through beside its tokens."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x * mask), mask


class ValueBlock(Block):
    """The first block makes a value that all later ones, and those of later cycles, are handed (a value residual)."""

    def forward(self, x: Tensor, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value = torch.tanh(x) if value is None else value
        return super().forward(x) + value, value


class BesideBlock(Block):
    """Reads something beside its tokens, of their shape or of another number of rows."""

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        return super().forward(x) if beside is None else super().forward(x) + torch.sin(beside).mean(1, keepdim=True)


class DictBlock(Block):
    """Works on the dict that it is given."""

    def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state["x"] = super().forward(state["x"])
        return state
