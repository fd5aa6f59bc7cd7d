"""What every test shares: the seed, the number of threads and the hypothesis profiles."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Test modules are imported with --import-mode=importlib, which leaves sys.path alone; the helper
# modules beside this file (and the processes that test_distributed starts) need it.
sys.path.insert(0, str(Path(__file__).parent))

# `pytest --hypothesis-profile=thorough tests/test_properties.py` takes the better part of an hour.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=20)
settings.register_profile("local", deadline=None, max_examples=20)
settings.register_profile("thorough", deadline=None, max_examples=10_000)
settings.load_profile("ci" if os.environ.get("CI") else "local")

torch.set_num_threads(1)  # the tensors are small
torch.set_warn_always(True)  # else a warning fails only the first test that meets it


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
