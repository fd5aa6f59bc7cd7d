"""Time and memory of a training step of LDDU at the sizes of the paper: 3 modalities of 50 steps, batch 128.

python -m pytest -s tests/benchmarks/test_lddu_step.py
"""

import os
import statistics
import time
from collections import Counter

import pytest
import supcon_cases as cases
import torch

from uncertainty_mm.data import MultimodalBatch
from uncertainty_mm.examples.lddu_full import LDDU

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIMS = {"text": 768, "audio": 74, "vision": 35}


torch.set_num_threads(os.cpu_count() or 1)  # the tests take one


def now():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def spent():
    """Of the processor, which others on the machine do not add to."""
    return now() if DEVICE == "cuda" else time.process_time()


def training_step(batch_size, precision="float32", dims=DIMS, num_labels=6):
    """A function that takes a step, the seconds it spent by part, and its padding masks."""
    torch.manual_seed(0)
    half = precision == "bfloat16"
    names = [str(label) for label in range(num_labels)]
    options = {"bf16_products": half, "max_batch_size": batch_size}
    sizes = dims, dict.fromkeys(dims, 50), names, 16_326
    model = LDDU(*sizes, contrastive=options).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    lengths = torch.randint(10, 51, (batch_size, 1), device=DEVICE)
    padding = {name: torch.arange(50, device=DEVICE) >= lengths for name in dims}
    features = {name: torch.randn(batch_size, 50, dim, device=DEVICE) for name, dim in dims.items()}
    labels = (torch.rand(batch_size, num_labels, device=DEVICE) < 0.225).to(torch.uint8)
    indices = torch.arange(batch_size, device=DEVICE)
    seconds = Counter()

    def measure(part, module):
        module.register_forward_pre_hook(lambda *_: seconds.subtract({part: spent()}))
        module.register_forward_hook(lambda *_: seconds.update({part: spent()}))

    for encoder in model.encoder.values():
        measure("encoders", encoder)
    measure("label attention", model.attention)
    measure("predictions by place", model.places)
    measure("decoupler", model.decoupler)
    measure("fusion", model.fusion)
    measure("contrastive loss", model.contrastive)
    measure("ordinality, tracker", model.ordinality)
    measure("ordinality, tracker", model.tracker)

    def run():
        start = spent()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            output = model(features, padding, labels)
            loss = model.losses(output, MultimodalBatch(features, padding, labels, indices))[
                "total"
            ]
        forward = spent()
        loss.backward()
        backward = spent()
        optimizer.step()
        optimizer.zero_grad()
        seconds.update(backward=backward - forward, optimizer=spent() - backward)
        seconds.update({"whole forward": forward - start})

    return run, seconds, padding


def encoder_products(rows, width=256, layers=3):
    """The matrix products of the encoders: forward, for the weights and for the inputs."""
    jobs = []
    for dim in DIMS.values():
        sizes = [(dim, width), *[(width, 3 * width), *[(width, width)] * 3] * layers]
        for number, (fan_in, fan_out) in enumerate(sizes):
            x = torch.randn(rows, fan_in, device=DEVICE)
            weight = torch.randn(fan_out, fan_in, device=DEVICE)
            grad = torch.randn(rows, fan_out, device=DEVICE)
            jobs.append((x, weight, grad, number > 0))  # features need no gradient

    def run():
        for x, weight, grad, deep in jobs:
            x @ weight.T
            grad.T @ x
            if deep:
                grad @ weight

    return run


def print_shares(seconds):
    forward = seconds.pop("whole forward")
    steps = seconds["backward"] + seconds["optimizer"] + forward
    seconds["rest of the forward pass"] = steps - sum(seconds.values())
    for part, of_part in seconds.items():
        print(f"  {part:24} {100 * of_part / steps:5.1f} %")


@pytest.mark.parametrize(("modalities", "labels"), [(3, 6), (7, 8), (2, 28), (2, 527)])
def test_parts_of_a_step(modalities, labels):
    """With many modalities and many labels, one thread."""
    dims = dict([*DIMS.items(), *((f"more {i}", 64) for i in range(4))][:modalities])
    threads, steps = torch.get_num_threads(), 3
    torch.set_num_threads(1)
    run, seconds, _ = training_step(128, dims=dims, num_labels=labels)
    run()
    seconds.clear()
    for _ in range(steps):
        run()
    torch.set_num_threads(threads)
    whole = seconds["whole forward"] + seconds["backward"] + seconds["optimizer"]
    print(f"\n{modalities} modalities, {labels} labels: {whole / steps:.2f} s a step")
    print_shares(seconds)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_size", [64, 128])
def test_training_step(benchmark, batch_size, precision):
    """Steps and their floor alternate, so that others on the machine slow both down."""
    run, seconds, padding = training_step(batch_size, precision)
    mask = padding["text"]
    products = {"steps": int((~mask).sum()), "steps and padding": mask.numel()}
    products = {name: (encoder_products(rows), []) for name, rows in products.items()}

    def setup():
        for multiply, times in products.values():
            start = now()
            multiply()
            times.append(now() - start)

    def timed():
        run()
        now()

    benchmark.group = f"LDDU training step, batch {batch_size}, {precision}"
    benchmark.pedantic(timed, setup=setup, rounds=15, warmup_rounds=3)
    median = benchmark.stats.stats.median
    print(
        f"\nbatch {batch_size}, {precision}: {1e3 * median:.0f} ms, {batch_size / median:.0f} samples/s"
    )
    for name, (_, times) in products.items():
        floor = statistics.median(times)
        print(f"  encoder products of {name}: {1e3 * floor:.0f} ms, ratio {median / floor:.2f}")
    print_shares(seconds)
    benchmark.extra_info["name"] = f"{batch_size / median:.0f} samples/s"


def test_resident_memory_is_flat():
    """500 steps at a small batch: nothing is kept from step to step."""
    run, _, _ = training_step(4)
    for _ in range(50):
        run()
    before = cases.status("VmRSS")
    for _ in range(450):
        run()
    assert cases.status("VmRSS") - before < 20
