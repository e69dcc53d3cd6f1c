"""Shared by all tests: no hub access, one thread (tiny models are fastest so, and the suite runs in two processes)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
