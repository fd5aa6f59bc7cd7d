"""What must go on when processes die, tried: kills, dead ranks, 10,000 steps. Takes minutes, so no part of `pytest`.

    python tests/endurance.py kills --count 20   # trainings killed at random and resumed: the same to the bit
    python tests/endurance.py sweep --count 5    # sweeps killed and repeated: no run lost, none twice
    python tests/endurance.py ranks              # one of two processes dies or hangs: the other ends
    python tests/endurance.py memory             # 10,000 steps: the memory of the process

Needs Linux. Ends with an error as soon as something is not as it must be.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from examples_support import EXAMPLES, TINY

SMALL = [
    *(*TINY, "--model.lr=0.01", "--model.contrastive.queue_size=200", "--data.drop_modality=0.3"),
    *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
]
LENGTHS = {  # of a training
    "all epochs": ["--trainer.max_epochs=3"],
    "stopped early": ["--trainer.max_epochs=100", "--early_stopping.patience=2"],
}

# --- Kills -----------------------------------------------------------------------------------------------------------


def small_example():
    """The example with built-in data of 96 training samples: 6 steps an epoch."""
    import torch

    from uncertainty_mm.examples import lddu_full
    from uncertainty_mm.lightning import MultimodalDataModule

    torch.set_num_threads(1)
    full = MultimodalDataModule._synthetic
    MultimodalDataModule._synthetic = lambda self: full(self, (96, 48, 48))
    return lddu_full


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def after(calls, function, last):
    """`function`, whose call number `calls` (from 0) does `last` instead."""
    left = iter(range(calls))

    def replacement(*args, **options):
        if next(left, None) is None:
            last(*args)
        return function(*args, **options)

    return replacement


def halve(descriptor):
    os.truncate(f"/proc/self/fd/{descriptor}", os.fstat(descriptor).st_size // 2)
    die()


def child(example, options, log, where, number):
    """A training that dies at call number `number` of what `where` names; runs in a process of its own."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    lit = example.LDDU
    if where == "before a step":
        lit.training_step = after(number, lit.training_step, die)
    elif where == "in a checkpoint or table, half written":
        os.fsync = after(number, os.fsync, halve)
    elif where == "before a file is replaced":
        os.replace = after(number, os.replace, die)
    elif where == "in the calibration":
        lit.on_validation_epoch_end = after(number, lit.on_validation_epoch_end, die)
    elif where == "in the evaluation":
        lit.test_step = after(number, lit.test_step, die)
    example.main(arguments=options)


# Where a training is killed: the largest number of calls to wait for; None: at a random time
PLACES = {
    "at any time": None,
    "before a step": 30,
    "in a checkpoint or table, half written": 16,
    "before a file is replaced": 16,
    "in the calibration": 4,
    "in the evaluation": 3,
}


def start(example, folder, length, where=None, number=0):
    """A training in a process of its own, new or resumed; returns the process."""
    if (folder / "last.ckpt").exists():
        options = ["--ckpt_path", str(folder / "last.ckpt")]
    else:
        shutil.rmtree(
            folder, ignore_errors=True
        )  # no epoch was complete; a folder is never written over
        options = [*SMALL, *LENGTHS[length], "--output", str(folder)]
    context = multiprocessing.get_context("fork")  # without the seconds that imports take
    log = folder.with_suffix(".log")
    process = context.Process(target=child, args=(example, options, log, where, number))
    process.start()
    return process


def content(folder):
    """All that a training leaves, without paths and durations."""
    import numpy as np
    import torch

    results = json.loads((folder / "metrics.json").read_text())
    del results["seconds"]
    with np.load(folder / "predictions.npz") as file:
        arrays = dict(file)
    found = {
        "metrics.json": results,
        "metrics.csv": (folder / "metrics.csv").read_text(),
        "predictions.npz": {name: (x.dtype.str, x.tobytes()) for name, x in arrays.items()},
    }
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = torch.load(folder / name, weights_only=True)
        for state in checkpoint["callbacks"].values():
            if "dirpath" in state:
                state.clear()  # paths and scores of the checkpoints; the scores are in metrics.csv
        options = checkpoint[
            "hyper_parameters"
        ]  # what was a tuple comes from config.yaml as a list
        found[name] = checkpoint | {"hyper_parameters": json.loads(json.dumps(options))}
    return found


def same(one, other, place=""):
    """Raises AssertionError unless both hold the same, tensors to the bit."""
    import torch

    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert list(one) == list(other), place
        for key in one:
            same(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{place}/{index}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, place
        assert one.shape == other.shape, place
        assert one.numpy().tobytes() == other.numpy().tobytes(), place
    else:
        assert one == other, (place, one, other)


def kills(count, seed, root):
    """Kills trainings `count` times, resumes each until it is done, and compares it with one that was left alone."""
    example = small_example()
    draw = random.Random(seed)
    expected, seconds = {}, {}

    def undisturbed(length):
        folder = root / f"undisturbed {length}"
        begin = time.monotonic()
        process = start(example, folder, length)
        process.join()
        assert process.exitcode == 0, folder.with_suffix(".log").read_text()
        seconds[length] = time.monotonic() - begin
        expected[length] = content(folder)
        epochs = expected[length]["metrics.json"]["epochs"]
        assert epochs < 100
        print(f"{length}: {epochs} epochs, {seconds[length]:.1f} s", flush=True)

    done, trainings, places = 0, 0, dict.fromkeys(PLACES, 0)
    while done < count:
        length = list(LENGTHS)[trainings % len(LENGTHS)]
        if length not in expected:
            undisturbed(length)
        folder = root / f"killed {trainings}"
        alive = True
        while alive and done < count:
            where = draw.choice(list(PLACES))
            number = draw.randrange(PLACES[where] or 1)
            process = start(example, folder, length, where, number)
            if PLACES[where] is None:
                process.join(draw.uniform(0, seconds[length]))
                process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), folder.with_suffix(".log").read_text()
            if alive := process.exitcode != 0:
                done += 1
                places[where] += 1
                readable(folder)
        if alive:
            process = start(example, folder, length)
            process.join()
            assert process.exitcode == 0, folder.with_suffix(".log").read_text()
        same(expected[length], content(folder))
        trainings += 1
    print(f"{done} kills of {trainings} trainings, each the same to the bit as the undisturbed one")
    for where, times in places.items():
        print(f"  {times:3} {where}")


def readable(folder):
    """Raises unless all checkpoints load that a killed training has left."""
    import torch

    for path in folder.glob("[!.]*.ckpt"):  # what was half written beside them is hidden
        torch.load(path, weights_only=True)


# --- Sweeps ----------------------------------------------------------------------------------------------------------


def work(run):
    """A run of a sweep that takes its time and says that it was there."""
    with open(run.beside(".starts"), "a") as file:
        file.write("start\n")
    time.sleep(0.3)
    return {"value": 10 * run.seed}


RUNS = 12


def one_sweep(folder):
    from uncertainty_mm.examples import sweep

    data = folder.parent / "data.npz"
    data.touch()
    args = sweep.parser("", str(folder), ["x"]).parse_args(["--data", str(data), "--jobs", "2"])
    args.seeds = list(range(RUNS))
    sweep.run_all(work, {"x": sweep.Arm()}, args)


def sweeps(count, seed, root):
    """Kills a sweep `count` times, its workers left alone, and repeats it until it is done."""
    draw = random.Random(seed)
    folder = root / "sweep"
    command = [sys.executable, __file__, "one-sweep", "--folder", str(folder)]
    finished, killed = {}, 0
    while killed < count:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        begin = len(list(folder.rglob("*.starts")))
        while len(list(folder.rglob("*.starts"))) == begin and process.poll() is None:
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, 0.8))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        killed += 1
        deadline = time.monotonic() + 10
        while left := members(process.pid):
            assert time.monotonic() < deadline, f"processes {left} outlive their sweep"
            time.sleep(0.02)
        for path, before in finished.items():
            assert path.stat().st_mtime_ns == before, f"{path} was done again"
        done = [path for path in folder.rglob("x/*.json") if "measures" in path.read_text()]
        finished = {path: path.stat().st_mtime_ns for path in done}
        starts = {path: path.with_suffix(".starts").read_text() for path in finished}
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    for path, before in finished.items():
        assert path.stat().st_mtime_ns == before, f"{path} was done again"
        assert path.with_suffix(".starts").read_text() == starts[path]
    rows = json.loads((folder / "runs.json").read_text())
    assert [(row["seed"], row["value"]) for row in rows] == [(i, 10 * i) for i in range(RUNS)]
    print(
        f"{killed} kills of a sweep of {RUNS} runs, {len(finished)} finished before the last kill:"
    )
    print("no run lost, no finished run repeated, no worker left behind")


def members(session):
    """Processes of a session that are alive, those of the resource tracker of Python left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            helper = b"resource_tracker" in (stat.parent / "cmdline").read_bytes()
            if int(its_session) == session and state != "Z" and not helper:
                found.append(int(stat.parent.name))
    return found


# --- Ranks -----------------------------------------------------------------------------------------------------------


TWO = [sys.executable, str(EXAMPLES / "lddu_full.py"), "--trainer.devices=2"]


def ranks(root, timeout=20):
    """Trains in two processes; one dies or hangs, and the other must end by itself."""
    small_example()
    from uncertainty_mm.lightning import MultimodalDataModule

    parts = MultimodalDataModule().parts
    from uncertainty_mm.data import write_folder

    write_folder(parts, root / "data")
    for number, (victim, what) in enumerate(
        [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)]
    ):
        folder = root / f"ranks {number}"
        command = [*TWO, "--data.path", str(root / "data"), *SMALL, "--trainer.max_epochs=100000"]
        command += ["--early_stopping.patience=100000", "--output", str(folder)]
        command += ["--trainer.strategy=DDPStrategy", f"--trainer.strategy.timeout=0:00:{timeout}"]
        with open(folder.with_suffix(".log"), "w") as log:
            first = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                while not (folder / "last.ckpt").exists():
                    assert first.poll() is None, folder.with_suffix(".log").read_text()
                    time.sleep(0.2)
                pids = sorted(members(first.pid))  # the first process starts the second
                assert pids[0] == first.pid
                assert len(pids) == 2, pids
                os.kill(pids[victim], what)
                begin = time.monotonic()
                other = pids[1 - victim]
                while other in members(first.pid):
                    first.poll()
                    assert time.monotonic() < begin + timeout + 30, "the other process hangs"
                    time.sleep(0.1)
                seconds = time.monotonic() - begin
            finally:
                for pid in members(first.pid):
                    os.kill(pid, signal.SIGKILL)
                first.wait()
        readable(folder)
        print(
            f"process {victim} gets {what.name}: the other ended after {seconds:.1f} s", flush=True
        )
    not_finite(root, root / "data")


def not_finite(root, data):
    """Trains in two processes on data of which sample 7 is not finite: both stop, or both skip its batch."""
    import numpy as np
    import torch

    folder = data / "train"
    name = np.load(folder / "modalities.npy")[0]
    features = np.load(folder / f"features.{name}.npy")
    padding = np.load(folder / f"padding_mask.{name}.npy")
    features[7], padding[7] = np.nan, False
    np.save(folder / f"features.{name}.npy", features)
    np.save(folder / f"padding_mask.{name}.npy", padding)
    for choice in ("stop", "skip"):
        output = root / choice
        command = [*TWO, "--data.path", str(data), *SMALL, "--trainer.max_epochs=2"]
        command += ["--trainer.strategy=ddp", f"--finite_guard.on_nan={choice}"]
        begin = time.monotonic()
        done = subprocess.run(
            [*command, "--output", str(output)], capture_output=True, text=True, timeout=300
        )
        seconds = time.monotonic() - begin
        said = done.stdout + done.stderr
        assert "training samples 7: features are not finite" in said, said
        assert (done.returncode == 0) == (choice == "skip"), said
        if choice == "skip":
            state = torch.load(output / "last.ckpt", weights_only=True)
            assert state["callbacks"]["FiniteGuard"] == {"skipped": 2}  # one an epoch
            assert all(x.isfinite().all() for x in state["state_dict"].values())
            # On both processes: the history, which they share, lacks all samples of both batches.
            history = state["state_dict"]["tracker.history"][1]
            left_out = (history.amax(1) < 2).sum()
            assert 32 < left_out <= 64, left_out
        print(f"two processes, --finite_guard.on_nan {choice}: {seconds:.1f} s", flush=True)


# --- Memory ----------------------------------------------------------------------------------------------------------


def memory(root, steps=10_000):
    """Trains for many steps; the memory must not grow after the first 1,000."""
    import torch

    found, example = {}, small_example()

    class Watched(example.LDDU):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.global_step in (100, 1_000, 2_000, 5_000, steps):
                resident = int(Path("/proc/self/statm").read_text().split()[1])
                resident *= os.sysconf("SC_PAGE_SIZE")
                cuda = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
                found[self.global_step] = resident
                print(
                    f"step {self.global_step}: resident {resident / 2**20:.1f} MiB, "
                    f"CUDA {cuda / 2**20:.1f} MiB",
                    file=sys.__stdout__,
                    flush=True,
                )

    epochs = -(-steps // 24)
    options = [*SMALL, "--data.batch_size=4", f"--trainer.max_epochs={epochs}"]
    options += [f"--early_stopping.patience={epochs}", "--trainer.accelerator=auto"]
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        example.main(Watched, [*options, "--output", str(root / "memory")])
    grown = found[steps] - found[1_000]
    print(f"{grown / 2**20:+.1f} MiB from step 1,000 to step {steps:,}")
    assert grown < 20 * 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["kills", "sweep", "ranks", "memory", "one-sweep"])
    parser.add_argument("--count", type=int, default=20, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is random")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "one-sweep":
        one_sweep(args.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        root, begin = Path(folder), time.monotonic()
        if args.what == "kills":
            kills(args.count, args.seed, root)
        elif args.what == "sweep":
            sweeps(args.count, args.seed, root)
        else:
            {"ranks": ranks, "memory": memory}[args.what](root)
        print(f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
