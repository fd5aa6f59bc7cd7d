"""What every test shares: the seed, the number of threads and the hypothesis profiles."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from uncertainty_mm import _bfloat16

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


@pytest.fixture
def native_bfloat16(monkeypatch):
    """Rounds to bfloat16 on any processor, however slowly."""
    monkeypatch.setattr("uncertainty_mm._bfloat16.is_native", lambda: True)


@pytest.fixture
def no_native_bfloat16(monkeypatch):
    """As on a processor that would have to emulate bfloat16, and that has not warned yet."""
    monkeypatch.setattr("uncertainty_mm._bfloat16.is_native", lambda: False)
    _bfloat16._warn.cache_clear()
    yield
    _bfloat16._warn.cache_clear()
