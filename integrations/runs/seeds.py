"""Seeds derived from what they are for, so that nothing has to remember the state of a random generator.

A sample's augmentation follows from (run seed, epoch, position in the epoch), a step's dropout from (run seed, step,
process). The number of workers then changes nothing, and a run that is resumed at step k draws what it would have
drawn at step k: no random state has to be saved.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """An integer in [0, 2**63) that is the same for the same parts, on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def seed_all(seed: int) -> None:
    """Python's, NumPy's and PyTorch's generators, the CPU's and the current device's, from here on."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would take half a millisecond for devices that are not there
    torch.default_generator.manual_seed(seed)
    if torch.accelerator.is_available():
        torch.get_device_module().manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's CPU generators inside the block; as they were after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
