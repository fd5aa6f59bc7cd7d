"""Time and memory of a training step of LDDU at the sizes of the paper: 3 modalities of 50 steps, batch 128.

python -m pytest tests/benchmarks/test_lddu_step.py
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import supcon_cases as cases
import torch

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIMS = {"text": 768, "audio": 74, "vision": 35}


torch.set_num_threads(os.cpu_count() or 1)  # the tests take one


def load_example():
    spec = importlib.util.spec_from_file_location("lddu_full", ROOT / "examples" / "lddu_full.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["lddu_full"] = module
    spec.loader.exec_module(module)
    return module


def training_step(batch_size, weights=None):
    torch.manual_seed(0)
    example = load_example()
    model = example.LDDU(DIMS, dict.fromkeys(DIMS, 50), 6, 16_326, **(weights or {})).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    lengths = torch.randint(10, 51, (batch_size, 1), device=DEVICE)
    padding = {name: torch.arange(50, device=DEVICE) >= lengths for name in DIMS}
    features = {name: torch.randn(batch_size, 50, dim, device=DEVICE) for name, dim in DIMS.items()}
    labels = (torch.rand(batch_size, 6, device=DEVICE) < 0.225).to(torch.uint8)
    indices = torch.arange(batch_size, device=DEVICE)

    def run():
        output = model(features, padding, labels)
        model.losses(output, labels, indices)["total"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return run, model


@pytest.mark.parametrize("batch_size", [64, 128])
def test_training_step(benchmark, batch_size):
    run, _ = training_step(batch_size)

    def timed():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"LDDU training step, batch {batch_size}"
    benchmark.pedantic(timed, rounds=7, warmup_rounds=3)
    rate = batch_size / benchmark.stats.stats.median
    benchmark.extra_info.update(name=f"{rate:.0f} samples/s", device=DEVICE)


def test_resident_memory_is_flat():
    """500 steps at a small batch: nothing is kept from step to step."""
    run, _ = training_step(4)
    for _ in range(50):
        run()
    before = cases.status("VmRSS")
    for _ in range(450):
        run()
    assert cases.status("VmRSS") - before < 20
