"""TokenPose, SDPose and PPT written out plainly, one operation at a time: the truth in tests, and the loop to beat.

Nothing of the library runs in it: attention is two einsums with a softmax between them, cycles are a loop over a list
of layers, pruning goes image by image. Only the names of the parameters agree, so that weights can be taken over.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cyclekd.integrations.tokenpose.models.tokenpose import TokenPose


class Cycle(NamedTuple):
    """What one pass through the layers gives."""

    output: Tensor
    """Heat maps [B, K, h, w], or what a regression head returns, [B, K, 4 or 5]."""
    tokens: Tensor
    """[B, K + N, D] after the last layer: keypoints, then the visual tokens that are left."""
    kept: list[Tensor]
    """For each layer that pruned, [B, kept]: places among the visual tokens that entered it, best first."""


class PlainPose(nn.Module):
    """The same model as `model` with copies of its weights; `forward` gives the cycles that `model.config` asks for."""

    def __init__(self, model: TokenPose) -> None:
        super().__init__()
        config = model.config
        self.config = config
        self.keep_rate = config.keep_rate
        # not hrnet_w18_small, whose stages are of other lengths
        channels = {"stem": 4 * config.stage1_width, "hrnet_w32": 32, "hrnet_w48": 48}[config.backbone]
        if config.backbone == "stem":
            self.backbone = Stem(config.stage1_width)
        else:
            self.backbone = HRNet(config.stage1_width, channels)
        patch_h, patch_w = config.patch_size
        self.patch_embed = nn.Linear(patch_h * patch_w * channels, config.dim)
        self.keypoint_tokens = nn.Parameter(torch.empty(1, config.num_keypoints, config.dim))
        self.blocks = nn.ModuleList(
            Layer(config.dim, config.heads, int(config.dim * config.mlp_ratio), config.attention_scale == "dim")
            for _ in range(config.depth)
        )
        self.head = Head(config.head, config.groups * config.dim, config.input_size, config.head_hidden)
        grid = config.input_size[0] // 4 // patch_h, config.input_size[1] // 4 // patch_w
        self.register_buffer("sine", sine_table(*grid, config.dim), persistent=False)  # [N, D]
        self.to(model.keypoint_tokens)  # dtype and device, before values in fp64 are copied
        self.load_state_dict(model.state_dict())
        self.train(model.training)

    def forward(self, images: Tensor, cycles: int | None = None) -> list[Cycle]:
        """Normalised images [B, 3, H, W] to one `Cycle` per pass; `cycles` asks for another number of them."""
        tokens = self.first_tokens(images)
        positions = self.sine.expand(len(images), -1, -1)  # [B, N, D]: pruning makes them differ between images
        done = []
        for cycle in range(cycles or self.config.cycles):
            read, kept = [], []
            layers_per_group = self.config.depth // self.config.groups
            for index, layer in enumerate(self.blocks):
                if index % layers_per_group > 0:
                    tokens[:, self.config.num_keypoints :] += positions
                tokens, attention = layer.attend(tokens)
                if cycle == 0 and index in self.config.prune_at and self.keep_rate < 1:
                    tokens, positions, chosen = self.prune(tokens, positions, attention)
                    kept.append(chosen)
                tokens = layer.transform(tokens)
                if (index + 1) % layers_per_group == 0:
                    read.append(tokens[:, : self.config.num_keypoints])
            done.append(Cycle(self.head(torch.cat(read, dim=2)), tokens, kept))
        return done

    def first_tokens(self, images: Tensor) -> Tensor:
        """[B, K + N, D]: learned keypoint tokens, then a token per patch with its position added."""
        features = self.backbone(images)
        B, C, H, W = features.shape
        h, w = self.config.patch_size
        patches = features.reshape(B, C, H // h, h, W // w, w).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, h * w * C)
        visual = self.patch_embed(patches) + self.sine
        return torch.cat([self.keypoint_tokens.repeat(B, 1, 1), visual], dim=1)

    def prune(self, tokens: Tensor, positions: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and positions that stay, and which visual tokens these were."""
        K = self.config.num_keypoints
        left_tokens, left_positions, chosen = [], [], []
        for image in range(len(tokens)):
            score = attention[image, :, :K, K:].mean(dim=0).sum(dim=0)  # over heads, then keypoints: [N]
            best = score.detach().sort(descending=True).indices[: math.ceil(len(score) * self.keep_rate)]
            left_tokens.append(torch.cat([tokens[image, :K], tokens[image, K:][best]]))
            left_positions.append(positions[image][best])
            chosen.append(best)
        return torch.stack(left_tokens), torch.stack(left_positions), torch.stack(chosen)


class Layer(nn.Module):
    """Pre-norm attention and MLP, apart from each other because pruning comes between them."""

    def __init__(self, dim: int, heads: int, hidden: int, scale_by_dim: bool) -> None:
        super().__init__()
        self.heads = heads
        self.scale = dim**-0.5 if scale_by_dim else (dim / heads) ** -0.5
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim, bias=False), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def attend(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, T, D], and the attention [B, heads, T, T] that they paid."""
        B, T, D = tokens.shape
        q, k, v = self.attn["qkv"](self.norm1(tokens)).chunk(3, dim=2)
        q, k, v = (each.reshape(B, T, self.heads, D // self.heads).transpose(1, 2) for each in (q, k, v))
        attention = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * self.scale, dim=-1)
        mixed = torch.einsum("bhij,bhjd->bhid", attention, v).transpose(1, 2).reshape(B, T, D)
        return tokens + self.attn["proj"](mixed), attention

    def transform(self, tokens: Tensor) -> Tensor:
        return tokens + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens))))


class Head(nn.Module):
    """LayerNorm and Linear, or that twice; what comes out is a heat map, raw numbers, or numbers in their ranges."""

    def __init__(self, kind: str, dim: int, input_size: tuple[int, int], hidden: int) -> None:
        super().__init__()
        self.kind, self.height, self.width = kind, input_size[0] // 4, input_size[1] // 4
        outputs = {"heatmap": self.height * self.width, "rle": 4, "distilpose": 5}[kind]
        if kind == "heatmap":
            hidden = self.height * self.width // 8
        layers = [nn.LayerNorm(dim), nn.Linear(dim, outputs)]
        if dim <= 0.5 * hidden:
            layers = [nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, outputs)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, tokens: Tensor) -> Tensor:
        out = self.mlp(tokens)
        if self.kind == "heatmap":
            return out.reshape(*out.shape[:2], self.height, self.width)
        if self.kind == "distilpose":
            return torch.cat([out[..., :2].sigmoid(), out[..., 2:3], F.softplus(out[..., 3:])], dim=-1)
        return out


def sine_table(height: int, width: int, dim: int) -> Tensor:
    """[height * width, dim]: the first half of the channels says the row, the second the column."""
    half = dim // 2
    frequency = 10000 ** (torch.arange(half) // 2 * 2 / half)

    def encode(size: int) -> Tensor:
        place = torch.arange(1, size + 1) / (size + 1e-6) * (2 * math.pi)
        angle = place[:, None] / frequency
        return torch.where(torch.arange(half) % 2 == 0, angle.sin(), angle.cos())  # [size, half]

    y, x = encode(height), encode(width)
    return torch.stack([torch.cat([y[i], x[j]]) for i in range(height) for j in range(width)])


# -- the backbone ------------------------------------------------------------------------------------------------------


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, planes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = convolution(planes, planes, 3), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = convolution(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if inputs != 4 * planes:
            self.downsample = nn.Sequential(convolution(inputs, 4 * planes, 1), nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class BasicBlock(nn.Module):
    def __init__(self, planes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(planes, planes, 3), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = convolution(planes, planes, 3), nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class Stem(nn.Module):
    """Two strided convolutions and four bottlenecks: [B, 3, H, W] to [B, 4 x planes, H/4, W/4]."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(3, 64, 3, stride=2), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = convolution(64, 64, 3, stride=2), nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Bottleneck(64, planes), *(Bottleneck(4 * planes, planes) for _ in range(3)))

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.layer1(x)


class HRNet(Stem):
    """Stages 1 to 3, and of these the branch of highest resolution: [B, width, H/4, W/4]."""

    def __init__(self, planes: int, width: int) -> None:
        super().__init__(planes)
        first, second, third = width, 2 * width, 4 * width
        self.transition1 = nn.ModuleList(
            [strided(4 * planes, first, stride=1), nn.Sequential(strided(4 * planes, second, stride=2))]
        )
        self.stage2 = nn.Sequential(Fusion([first, second], 2))
        new = nn.Sequential(strided(second, third, stride=2))
        self.transition2 = nn.ModuleList([nn.Identity(), nn.Identity(), new])
        self.stage3 = nn.Sequential(*(Fusion([first, second, third], outputs) for outputs in (3, 3, 3, 1)))

    def forward(self, images: Tensor) -> Tensor:
        x = super().forward(images)
        high, low = self.stage2[0]([self.transition1[0](x), self.transition1[1](x)])
        branches = [high, low, self.transition2[2](low)]
        for module in self.stage3:
            branches = module(branches)
        return branches[0]


def strided(inputs: int, outputs: int, stride: int, relu: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [convolution(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


class Fusion(nn.Module):
    """Four basic blocks on every branch, then each branch that goes on is the sum of all, brought to its size."""

    def __init__(self, widths: list[int], outputs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(width) for _ in range(4))) for width in widths)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self.path(widths, source, target) for source in range(len(widths)))
            for target in range(outputs)
        )

    @staticmethod
    def path(widths: list[int], source: int, target: int) -> nn.Module:
        """From one branch to another: upsampled by nearest, left alone, or halved as often as is needed."""
        if source == target:
            return nn.Identity()
        if source > target:
            return nn.Sequential(convolution(widths[source], widths[target], 1), nn.BatchNorm2d(widths[target]))
        steps = target - source
        return nn.Sequential(
            *(strided(widths[source], widths[source], stride=2) for _ in range(steps - 1)),
            strided(widths[source], widths[target], stride=2, relu=False),
        )

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        branches = [blocks(x) for blocks, x in zip(self.branches, branches, strict=True)]
        fused = []
        for target, paths in enumerate(self.fuse_layers):
            total = 0
            for source, (path, x) in enumerate(zip(paths, branches, strict=True)):
                y = path(x)
                if source > target:
                    y = y.repeat_interleave(2 ** (source - target), 2).repeat_interleave(2 ** (source - target), 3)
                total = total + y
            fused.append(F.relu(total))
        return fused
