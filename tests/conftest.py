"""Shared by all tests: no hub access, one thread (tiny models are fastest so, and the suite runs in two processes)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)  # module fixtures and imports come before the first test


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)  # a training under test may have set more
    torch.manual_seed(0)
