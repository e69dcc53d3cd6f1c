"""The state of PyTorch's random generators, so that what runs before the stack draws the same in every cycle."""

from __future__ import annotations

import torch
from torch import Tensor

RandomState = tuple[Tensor, Tensor | None]


def random_state() -> RandomState:
    """Of the CPU and of the current CUDA device, where one is in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if _cuda_draws() else None


def set_random_state(state: RandomState) -> None:
    """Go on drawing from where `random_state` was called."""
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


def _cuda_draws() -> bool:
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and not torch.cuda.is_current_stream_capturing()
