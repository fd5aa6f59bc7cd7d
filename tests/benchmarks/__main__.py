"""All measurements in one command: tests of the device, contrastive loss, training step, epoch, one sample.

    python tests/benchmarks                      # on CUDA where there is one, else on the processor: minutes
    python tests/benchmarks --quick              # small sizes, to see that all of it runs
    python tests/benchmarks --only loss step --out results

Needs the extra `test`, and measures pytorch-metric-learning too where it is installed. Writes `benchmarks.json` and, as
a page, `benchmarks.md`.
"""

import argparse
import importlib.util
import json
import math
import platform
import signal
import subprocess
import sys
import time
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from tempfile import TemporaryDirectory

import contrastive
import torch
import training
from measuring import captured, in_turn, peak_mb, status

TESTS = Path(__file__).parent.parent


def tests(device, quick):
    """The tests that touch the device, the pretended one where there is none."""
    chosen = "cuda" if device == "cuda" else "pretend"
    files = [TESTS / "test_cuda.py", TESTS / "test_accelerator.py"][device == "cpu" :]
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", *map(str, files), f"--junitxml={report}"]
        command += ["-k", f"{chosen} and Queue" if quick else chosen, "-p", "no:cacheprovider"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", "8", "-p", "no:benchmark"]  # which refuses to run with it
        run = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
        if not report.exists():
            raise RuntimeError(run.stdout + run.stderr)
        if run.returncode:
            print(run.stdout[-20_000:], flush=True)
        suite = ElementTree.parse(report).getroot()[0]
    failed = [
        case.get("name")
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {name: int(suite.get(name)) for name in ("tests", "skipped")}
    counts["passed"] = counts["tests"] - counts["skipped"] - len(failed)
    return [{**counts, "failed": len(failed), "names of the failed": ", ".join(failed)}]


def loss(device, quick):
    """Forward and backward pass of the contrastive loss, against the time of its bare matrix products."""
    cuda = device == "cuda"
    sizes = [(128, 8192), (128, 65_536)]
    sizes += [(1024, 8192), (1024, 65_536)] if cuda else []
    for batch, queue in [(8, 512)] if quick else sizes:
        for anchors in ("all", "present"):
            inputs = contrastive.Inputs(anchors, queue, rows=batch * 18, device=device)
            names = list(contrastive.IMPLEMENTATIONS)
            if not importlib.util.find_spec("pytorch_metric_learning"):
                names.remove("pytorch-metric-learning")
            if not cuda and queue > 8192:
                names = names[:2]  # the others take gigabytes
            jobs = {name: contrastive.step(name, inputs) for name in names}
            if cuda:
                for name in ("uncertainty_mm", "dense, compiled"):
                    jobs[name + ", in a CUDA graph"] = captured(jobs[name])
            jobs = {"products": contrastive.floor(inputs), **jobs}
            for threads in [1] if cuda else [1, 2]:
                times = in_turn(jobs, device, threads, rounds=3 if quick else 9)
                for name in jobs:
                    row = {"batch": batch, "queue": queue, "anchors": anchors}
                    row |= {} if cuda else {"threads": threads}
                    row["implementation"] = name
                    if name not in times:
                        yield {**row, "ms": "out of memory"}
                        continue
                    row |= times[name]
                    row["/ products"] = times[name]["ms"] / times["products"]["ms"]
                    if name in contrastive.IMPLEMENTATIONS and cuda:
                        row["peak MB"] = peak_mb(jobs[name], device)
                    elif name in contrastive.IMPLEMENTATIONS and threads == 1 and batch == 128:
                        row["peak MB"] = contrastive.memory(name, anchors, queue)
                    yield row


def step(device, quick):
    """A training step of the example's model at the paper's sizes, against its encoders' bare matrix products."""
    cuda = device == "cuda"
    sizes = [8] if quick else [64, 128, 1024] if cuda else [64, 128]
    precisions = ["float32", *(["tf32"] if cuda else []), "bfloat16"]
    forms = [(size, precision, False) for size in sizes for precision in precisions]
    forms += [(sizes[:2][-1], precision, True) for precision in ("float32", "bfloat16")]  # minutes
    for size, precision, compiled in forms:
        torch.manual_seed(0)
        batch = training.drawn(size, device=device)
        rows = int((~batch.padding_mask["text"]).sum())
        job = training.TrainingStep(batch, precision, compiled)
        jobs = {"compiled" if compiled else "plain": job}
        if cuda:
            jobs[" ".join([*jobs, "in a CUDA graph"])] = captured(job)
        jobs["products"] = training.encoder_products(rows, device, precision)
        times = in_turn(jobs, device, rounds=3 if quick else 15)
        products = times.pop("products")["ms"]
        for form, spent in times.items():
            row = {"batch": size, "precision": precision, "form": form, **spent}
            row |= {"samples/s": 1e3 * size / spent["ms"], "/ products": spent["ms"] / products}
            if cuda and "graph" not in form:
                row |= training.on_device(job) | {"peak MB": peak_mb(job, device)}
            yield row


def parts(device, quick):
    """The shares of the parts in a training step in %, batch 128, one thread, with many modalities and many labels."""
    torch.set_num_threads(1)
    for modalities, labels in [(2, 4)] if quick else [(3, 6), (7, 8), (2, 28), (2, 527)]:
        extra = ((f"more {i}", 64) for i in range(4))
        dims = dict([*training.DIMS.items(), *extra][:modalities])
        batch = training.drawn(8 if quick else 128, 50, dims, labels, device)
        clock = time.perf_counter if device == "cuda" else time.process_time
        shares = training.TrainingStep(batch).parts(clock)
        yield {"modalities": modalities, "labels": labels, **shares}


def memory(device, quick):
    """Memory that hundreds of training steps leave behind, after 50."""
    job = training.TrainingStep(training.drawn(4, device=device))

    def taken():
        return torch.cuda.memory_allocated() / 2**20 if device == "cuda" else status("VmRSS")

    for _ in range(50):
        job()
    before, steps = taken(), 20 if quick else 450
    for _ in range(steps):
        job()
    yield {"steps": steps, "MB more": taken() - before}


def sample(device, quick):
    """One sample at a time, evaluation, one thread."""
    for steps in (1, 50):
        jobs = training.serving(steps, device)
        for name, times in in_turn(jobs, device, rounds=5 if quick else 40, seconds=0).items():
            yield {"steps": steps, "call": name, **times}


def data(device, quick):
    """An epoch of CMU-MOSEI's size through the loader, no workers, one thread; of 500 steps a fifth (5.7 GB)."""
    torch.set_num_threads(1)
    for samples, steps in [(256, 50)] if quick else [(training.SAMPLES, 50), (3265, 500)]:
        for layout in ("folder", ".npz"):
            row = {"samples": samples, "steps": steps, "layout": layout}
            yield {**row, **training.loading(samples, steps, layout == "folder")}


def epoch(device, quick):
    """An epoch of CMU-MOSEI's size (16,326 samples, 2.9 GB) at batch 128 through the trainer."""
    samples = 256 if quick else training.SAMPLES
    for precision in ("float32", "bfloat16") if device == "cuda" else ("float32",):
        yield {
            "samples": samples,
            "precision": precision,
            **training.epoch(samples, device, precision),
        }


SECTIONS = {x.__name__: x for x in (tests, loss, step, parts, memory, sample, data, epoch)}


def shown(value):
    """A cell of a table."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    digits = 3 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 3)}f}"


def table(rows):
    """Rows as a Markdown table, whose columns are the keys of all of them."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    right = {c for c in columns if any(isinstance(row.get(c), (int, float)) for row in rows)}
    lines = [columns, ["---:" if c in right else "---" for c in columns]]
    lines += [[shown(row.get(c, "")) for c in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(device):
    """What it was measured on."""
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the result")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # others' do not matter here
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of `timeout`
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(device), "quick": options.quick, "seconds": {}}
    page = [", ".join(f"{name} {value}" for name, value in result["machine"].items())]
    for name in options.only:
        start, rows = time.perf_counter(), result.setdefault(name, [])
        try:
            for row in SECTIONS[name](device, options.quick):
                rows.append(row)
                result["seconds"][name] = time.perf_counter() - start
                (options.out / "benchmarks.json").write_text(json.dumps(result, indent=1) + "\n")
        finally:  # what there is, also when it is stopped
            page += [f"## {name.capitalize()}", SECTIONS[name].__doc__, table(rows)]
            print(*page[-3:], f"({time.perf_counter() - start:.0f} s)", "", sep="\n\n", flush=True)
            (options.out / "benchmarks.md").write_text("\n\n".join(page) + "\n")
    sys.exit(any(row["failed"] for row in result.get("tests", [])))


if __name__ == "__main__":
    main()
