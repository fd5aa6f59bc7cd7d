"""Time and memory of the contrastive loss: forward and backward, float32.

python -m pytest tests/benchmarks/test_supcon.py --benchmark-json=supcon.json
"""

import subprocess
import sys
from pathlib import Path

import pytest
import supcon_cases as cases
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure(benchmark, run, group, name, threads=2, **info):
    def timed():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    torch.set_num_threads(threads)
    benchmark.group = group
    benchmark.extra_info.update(
        name=name, device=DEVICE, threads=threads, torch=torch.__version__, **info
    )
    benchmark.pedantic(timed, rounds=9, warmup_rounds=2)


def peak_mb(name, anchors, queue):
    script = Path(cases.__file__)
    command = [sys.executable, str(script), name, anchors, str(queue)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("name", ["floor", *cases.IMPLEMENTATIONS])
@pytest.mark.parametrize("anchors", ["all", "present"])
@pytest.mark.parametrize("threads", [1, 2])
def test_paper_size(benchmark, name, anchors, threads):
    if name == "pytorch-metric-learning":
        pytest.importorskip("pytorch_metric_learning")
    inputs = cases.Inputs(anchors, 8192, device=DEVICE)
    run = cases.floor(inputs) if name == "floor" else cases.step(name, inputs)
    info = {}
    if name != "floor" and threads == 2 and DEVICE == "cpu":
        info["peak_mb"] = peak_mb(name, anchors, 8192)
    measure(benchmark, run, f"{anchors} anchors, Q 8192, {threads} threads", name, threads, **info)


@pytest.mark.parametrize("name", ["floor", "uncertainty_mm"])
@pytest.mark.parametrize("queue", [0, 2048, 16384, 65536])
def test_growth_with_queue(benchmark, name, queue):
    inputs = cases.Inputs("all", queue, device=DEVICE)
    run = cases.floor(inputs) if name == "floor" else cases.step(name, inputs)
    info = {} if name == "floor" or DEVICE == "cuda" else {"peak_mb": peak_mb(name, "all", queue)}
    measure(benchmark, run, f"all anchors, Q {queue}, 2 threads", name, **info)


@pytest.mark.parametrize("name", ["floor", "uncertainty_mm"])
@pytest.mark.parametrize("batch", [32, 512])
def test_growth_with_batch(benchmark, name, batch):
    inputs = cases.Inputs("present", 8192, rows=batch * 18, device=DEVICE)
    run = cases.floor(inputs) if name == "floor" else cases.step(name, inputs)
    measure(benchmark, run, f"present anchors, batch {batch}, Q 8192, 2 threads", name)
