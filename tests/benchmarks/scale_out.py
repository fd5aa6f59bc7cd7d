"""What several processes exchange in a training step of LDDU, and what that costs: over gloo, on one machine.

python tests/benchmarks/scale_out.py --output scale_out.json
python tests/benchmarks/scale_out.py --expect 8 64 --batch 128     # by the formula alone, nothing is run

The model is of the size of the paper (3 modalities of 50 steps, 6 labels, queue 8192), only the batch is smaller.
Every process takes steps in turn with two copies of it: one exchanges, the other does all but that, so that others on
the machine slow both down. `bytes_sent` is the formula; what it says is held against the collectives that ran, and
against what went through the loopback interface.
"""

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.testing._internal.distributed.fake_pg  # the backend "fake", which exchanges nothing
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from uncertainty_mm.data import MultimodalBatch
from uncertainty_mm.examples.lddu_full import LDDU

PAPER = {"dims": {"text": 768, "audio": 74, "vision": 35}, "steps": 50, "labels": 6}
SAMPLES = 16_326  # of the training split of CMU-MOSEI
LINKS = (300, 12.5)  # GB/s that are assumed of NVLink, and of Ethernet of 100 Gbit/s
FLOAT, LONG = 4, 8  # bytes
BYTES = {"unsigned char": 1, "float": FLOAT, "long int": LONG}


# --- The formula -----------------------------------------------------------------------------------------------------


def bytes_sent(world_size, batch_size, model, strategy="ddp", backend="nccl"):
    """Bytes that each process sends in a step, by purpose, in float32.

    A ring of W processes sends (W - 1) / W of a tensor once to gather or to scatter it, and twice to reduce it for all.
    (gloo scatters as it reduces, twice.) DDP reduces the gradient; FSDP2 gathers the parameters, those of the parts
    again for the backward pass, and scatters the gradient. The losses gather rows, and scatter their gradient.

    Args:
        world_size: Number of processes W.
        batch_size: Samples per process, which is also the `max_batch_size` of the losses.
        model: An LDDU, not yet wrapped.
        strategy: `"ddp"` or `"fsdp2"`, with the parts of `sharded_parts`.
        backend: `"nccl"` or `"gloo"`.
    """
    ring = (world_size - 1) / world_size
    scattered = ring * (2 if backend == "gloo" else 1)
    every = sum(x.numel() for x in model.parameters())
    if strategy == "ddp":
        sent = {"gradient": 2 * ring * every * FLOAT}
    else:
        every = _sharded(model, world_size)
        again = sum(_sharded(part, world_size) for part in sharded_parts(model))
        sent = {
            "parameters": ring * (every + again) * FLOAT,
            "gradient": scattered * every * FLOAT,
        }
    modalities, labels = model.contrastive.num_modalities, model.contrastive.num_labels
    width = model.contrastive.queue.rows.shape[1]
    samples = batch_size if model.scl_samples is None else min(batch_size, model.scl_samples)
    rows = world_size * samples * modalities * labels
    sent["contrastive loss"] = (
        ring * rows * (width * FLOAT + LONG)  # with their classes
        + scattered * rows * width * FLOAT
        + 2 * ring * FLOAT  # its value
    )
    rows = world_size * batch_size * (1 if model.errors_of == "sample" else modalities)
    scores = 4  # std_norm, distance, correctness, mask
    sent["ordinality loss"] = (
        ring * (rows * scores * FLOAT + world_size * batch_size * LONG)
        + scattered * rows * scores * FLOAT
    )
    return sent


def _sharded(module, world_size):
    """Numbers of all parameters: each is cut along its first axis into W pieces of equal size."""
    return sum(
        world_size * math.ceil(len(x) / world_size) * x[0].numel() for x in module.parameters()
    )


def sharded_parts(model):
    """What FSDP2 gathers by itself, just before it is used; the rest is gathered with the whole model."""
    return [*model.encoder.values(), model.places]


# --- The step --------------------------------------------------------------------------------------------------------


def make_model(batch_size, group, dims, steps, labels, **options):
    options = {"contrastive": {}, "ordinality": {}} | options
    name = None if group is None else group.group_name
    gathers = {"gather": True, "process_group": name, "max_batch_size": batch_size}
    for loss in ("contrastive", "ordinality"):
        options[loss] = gathers | options[loss]
    torch.manual_seed(0)
    names = [str(label) for label in range(labels)]
    return LDDU(dims, dict.fromkeys(dims, steps), names, SAMPLES, **options)


def training_step(batch_size, group, strategy, silent, dims, steps, labels, **options):
    """A function that takes a step, and what the formula says of it."""
    model = make_model(batch_size, group, dims, steps, labels, **options)
    by_formula = bytes_sent(dist.get_world_size(), batch_size, model, strategy, "gloo")
    if strategy == "ddp":
        parallel = DistributedDataParallel(model, process_group=group)
        if silent:
            parallel.register_comm_hook(None, _keep)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(group, "cpu")
        for part in [*sharded_parts(model), model]:
            fully_shard(part, mesh=mesh)
        parallel = model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    torch.manual_seed(dist.get_rank())
    lengths = torch.randint(steps // 5, steps + 1, (batch_size, 1))
    padding = {name: torch.arange(steps) >= lengths for name in dims}
    features = {name: torch.randn(batch_size, steps, dim) for name, dim in dims.items()}
    target = (torch.rand(batch_size, labels) < 0.225).to(torch.uint8)
    batch = MultimodalBatch(features, padding, target, torch.arange(batch_size))

    def step():
        output = parallel(features, padding, target)
        model.losses(output, batch)["total"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, by_formula


def _keep(_, bucket):
    """In place of the reduction of a gradient."""
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


# --- The measurements ------------------------------------------------------------------------------------------------


def counted(step):
    """The collectives that run in a step, and the bytes that this process sends in them, as a ring does."""
    world_size = dist.get_world_size()
    factor = {
        "gloo:all_reduce": 2 * (world_size - 1) / world_size,
        "gloo:all_gather": world_size - 1,
    }
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
        dist.barrier()
    events = [x for x in profiler.events() if x.name in factor]
    sent = 0.0
    for event in events:
        for shape, dtype in zip(event.input_shapes, event.input_dtypes, strict=True):
            sent += factor[event.name] * math.prod(shape) * BYTES[dtype]
    return len(events), sent


def bytes_on_loopback():
    """Bytes sent so far by all processes of the machine to each other, None where the system does not say."""
    file = Path("/proc/net/dev")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(x.split()[9]) for x in lines if x.split()[0] == "lo:"), None)


def measure(rank, batch_size, strategy, rounds, sizes=PAPER):
    """What a process of the default group measures; all of them call it."""
    step, by_formula = training_step(batch_size, dist.group.WORLD, strategy, False, **sizes)
    nobody = dist.new_group(backend="fake")
    alone, _ = training_step(batch_size, nobody, strategy, True, **sizes)
    for _ in range(2):
        step()
        alone()
    world_size = dist.get_world_size()
    exchanges, by_count = counted(step)
    dist.barrier()
    before = bytes_on_loopback()
    for _ in range(rounds):
        step()
    dist.barrier()
    after = bytes_on_loopback()
    seconds = {"exchanging": [], "alone": []}
    for _ in range(rounds):
        for name, take in (("exchanging", step), ("alone", alone)):
            dist.barrier()
            start = time.perf_counter()
            take()
            longest = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX)
            seconds[name].append(float(longest))
    return {
        "strategy": strategy,
        "world_size": world_size,
        "batch_size": batch_size,
        "exchanges": exchanges,
        "seconds": {name: statistics.median(x) for name, x in seconds.items()},
        "bytes": {
            "formula": by_formula,
            "counted": by_count,
            "loopback": None if before is None else (after - before) / rounds / world_size,
        },
    }


def _process(rank, world_size, folder, *arguments):
    torch.set_num_threads(1)
    meeting_point = f"file://{folder}/{world_size}"
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=world_size)
    result = measure(rank, *arguments)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def run(world_size, *arguments):
    """What the first of so many processes measures."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (world_size, folder, *arguments), nprocs=world_size)
        return json.loads(Path(folder, "result.json").read_text())


def print_expected(world_sizes, batch_size):
    """What the formula says of more processes than there are."""
    model = make_model(batch_size, None, **PAPER)
    print("| | processes | MB sent | of it by the losses | ", end="")
    print(" | ".join(f"ms at {speed} GB/s" for speed in LINKS), "|\n|---|---:|---:|---:|---:|---:|")
    for strategy in ("ddp", "fsdp2"):
        for world_size in world_sizes:
            sent = bytes_sent(world_size, batch_size, model, strategy)
            whole = sum(sent.values())
            cells = [strategy, world_size, f"{whole / 1e6:.1f}"]
            cells += [f"{sum(x for name, x in sent.items() if 'loss' in name) / 1e6:.1f}"]
            cells += [f"{whole / speed / 1e6:.2f}" for speed in LINKS]
            print("|", " | ".join(map(str, cells)), "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2"])
    parser.add_argument("--batch", type=int, default=16, help="samples per process")
    parser.add_argument("--rounds", type=int, default=15, help="steps of which the median is taken")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--expect", type=int, nargs="+", help="numbers of processes to compute")
    given = parser.parse_args()
    if given.expect:
        return print_expected(given.expect, given.batch)
    rows = [
        run(world_size, given.batch, strategy, given.rounds)
        for strategy in given.strategies
        for world_size in given.processes
    ]
    print(
        "| | processes | ms per step | without exchange | share, % | samples/s | exchanges | ",
        end="",
    )
    print(
        "MB sent, formula | counted | loopback |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for row in rows:
        whole, silent = row["seconds"]["exchanging"], row["seconds"]["alone"]
        sent = [sum(row["bytes"]["formula"].values()), *list(row["bytes"].values())[1:]]
        cells = [row["strategy"], row["world_size"], f"{1e3 * whole:.0f}", f"{1e3 * silent:.0f}"]
        cells += [f"{100 * (1 - silent / whole):.0f}"]
        cells += [f"{row['world_size'] * row['batch_size'] / whole:.0f}", row["exchanges"]]
        cells += ["" if x is None else f"{x / 1e6:.2f}" for x in sent]
        print("|", " | ".join(map(str, cells)), "|")
    if given.output:
        machine = {
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        }
        given.output.write_text(json.dumps({**machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
