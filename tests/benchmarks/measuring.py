"""Time of jobs that take turns, and the memory of one."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Job = Callable[[], object]


def status(field: str) -> float:
    """A field of this process's memory in MB (Linux)."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(field)).split()[1]) / 1024


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def captured(job: Job) -> Job:
    """The kernels of a job as one CUDA graph, which starts them together."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph.replay


def in_turn(
    jobs: Mapping[str, Job], device: str, threads: int = 1, rounds: int = 9, seconds: float = 0.02
) -> dict[str, dict[str, float]]:
    """Times jobs in one process, each once a round, so that other work on the machine slows all of them down.

    Args:
        jobs: The jobs by name. One that runs out of the device's memory is left out of the result.
        device: `"cpu"` or `"cuda"`.
        threads: Threads that torch may use.
        rounds: How many rounds, after two that do not count.
        seconds: A short job is repeated until it takes about so long.

    Returns:
        By job the medians `ms`, of the clock, and `processor_ms`, of all threads.
    """
    torch.set_num_threads(threads)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    repeats = dict.fromkeys(jobs, 1)
    for number in range(-2, rounds):
        for name in list(taken):
            wait(device)
            clock, processor = time.perf_counter(), time.process_time()
            try:
                for _ in range(repeats[name]):
                    jobs[name]()
                wait(device)
            except torch.OutOfMemoryError:
                del taken[name]
                torch.cuda.empty_cache()
                continue
            spent = time.perf_counter() - clock, time.process_time() - processor
            if number >= 0:
                taken[name].append(tuple(1e3 * x / repeats[name] for x in spent))
            elif number == -1:
                repeats[name] = max(1, min(1000, round(seconds / spent[0])))
    medians = {name: map(statistics.median, zip(*x, strict=True)) for name, x in taken.items()}
    return {name: dict(zip(("ms", "processor_ms"), x, strict=True)) for name, x in medians.items()}


def peak_mb(job: Job, device: str) -> float:
    """Peak memory of a job above what was taken before it: of the device, or resident (Linux, once a process)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = status("VmRSS")
    job()
    return status("VmHWM") - before
