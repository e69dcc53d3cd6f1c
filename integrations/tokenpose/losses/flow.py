"""A normalising flow of the plane: the density of regression errors that the RLE loss learns along with the network.

Needed in training only. All of it computes in the points' precision, float32 at least, whatever that of the parameters
is: a log-likelihood in half precision is noise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cyclekd.integrations.tokenpose.shapes import full_precision


class RealNVP(nn.Module):
    """An invertible map between points x of the plane and z ~ N(0, I), with the density that it gives to x.

    Affine couplings (Real NVP, ICLR 2017, arXiv:1605.08803, section 3). Each keeps one coordinate and moves the other
    by functions of the kept one, x = z * exp(s(kept)) + t(kept); the kept one alternates, beginning with the second.
    Six couplings of 64 hidden units, 53,784 parameters, as in Residual Log-likelihood Estimation (ICCV 2021,
    arXiv:2107.11291). The weights start near zero, and the flow so near the identity.
    """

    kept: Tensor
    """[couplings, 2], 1 where a coupling keeps a coordinate."""

    def __init__(self, couplings: int = 6, hidden: int = 64) -> None:
        super().__init__()
        self.s = nn.ModuleList([nn.Sequential(*_layers(hidden), nn.Tanh()) for _ in range(couplings)])
        self.t = nn.ModuleList([nn.Sequential(*_layers(hidden)) for _ in range(couplings)])
        kept = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[torch.arange(couplings) % 2]
        self.register_buffer("kept", kept, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
                nn.init.xavier_uniform_(module.weight, gain=0.01)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density at points [..., 2], shape [...]."""
        z, logdet = self.encode(x)
        return logdet - 0.5 * z.square().sum(-1) - math.log(2 * math.pi)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Points [..., 2] to z [..., 2] and log |det dz/dx| [...], through the couplings from last to first."""
        with torch.autocast(x.device.type, enabled=False):
            z = full_precision(x)
            logdet = torch.zeros_like(z[..., 0])
            for i in reversed(range(len(self.s))):
                s, t = self._coupling(i, z)
                z = (z - t) * torch.exp(-s)
                logdet = logdet - s.sum(-1)
            return z, logdet

    def decode(self, z: Tensor) -> Tensor:
        """The points [..., 2] that `encode` maps to z."""
        with torch.autocast(z.device.type, enabled=False):
            x = full_precision(z)
            for i in range(len(self.s)):
                s, t = self._coupling(i, x)
                x = x * torch.exp(s) + t
            return x

    def sample(self, count: int) -> Tensor:
        """[count, 2] points drawn from the density, without gradient."""
        with torch.no_grad():
            return self.decode(torch.randn(count, 2, device=self.kept.device, dtype=self.kept.dtype))

    def _coupling(self, i: int, points: Tensor) -> tuple[Tensor, Tensor]:
        """Log-scale and shift [..., 2] of coupling i; both are 0 at the coordinate that it keeps."""
        kept = self.kept[i].to(points.dtype)
        return self.s[i](points * kept) * (1 - kept), self.t[i](points * kept) * (1 - kept)


def _layers(hidden: int) -> list[nn.Module]:
    return [_Linear(2, hidden), nn.LeakyReLU(), _Linear(hidden, hidden), nn.LeakyReLU(), _Linear(hidden, 2)]


class _Linear(nn.Linear):
    """Computes in the precision of its input, not of its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
