"""Many runs, each on its own: over data sets, variants and seeds, some at a time, resumable.

A run has a folder, prints into `run.log` there, and leaves its measures in `measures.json`. A run that is finished is
not repeated, and one that fails does not stop the others. `uncertainty_study.py`, `lddu_ablation.py` and `baselines.py`
are such sweeps.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from uncertainty_mm._files import replacing

try:
    from . import lddu_full
except ImportError:  # run as a script
    import lddu_full  # type: ignore[no-redef]


class Run(NamedTuple):
    """One run of a sweep."""

    file: Path  # the data
    arm: str  # the variant
    seed: int
    folder: Path  # where the run is written
    args: argparse.Namespace  # command line of the sweep

    def __str__(self) -> str:
        return f"{self.file.stem}, {self.arm}, seed {self.seed}"


Row = dict[str, Any]
Work = Callable[[Run], Mapping[str, float]]


def add_arguments(parser: argparse.ArgumentParser, arms: Sequence[str], output: str) -> None:
    """The options that all sweeps share."""
    add = parser.add_argument
    add("--data", type=Path, nargs="*", default=[], help="files, in a layout of lddu_full.py")
    add("--arms", nargs="*", default=list(arms), choices=list(arms), metavar="ARM", help="variants")
    add("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="default: 0 to 4")
    add("--options", default="", help="options of lddu_full.py for all runs, in quotes")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    add("--output", type=Path, default=Path(output), help="folder (default: %(default)s)")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where a run could only fail, or two would write into one folder."""
    for name in ("data", "arms", "seeds"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            parser.error(f"--{name} must be different, got {' '.join(map(str, values))}")
        if not values and name != "data":
            parser.error(f"--{name} must name at least one")
    if min(args.seeds) < 0:
        parser.error(f"--seeds must not be negative, got {min(args.seeds)}")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs must be above 0, got {args.jobs}")
    if args.epochs is not None and args.epochs < 1:
        parser.error(f"--epochs must be above 0, got {args.epochs}")
    for file in args.data:
        if not file.exists():
            parser.error(f"--data: no such file, {file}")
    stems = [file.stem for file in args.data]
    if len(set(stems)) < len(stems):
        parser.error(f"--data must have different names, got {' '.join(stems)}")
    lddu_full.check_options(lddu_full.parse(["train", *args.options.split()]))
    args.output.mkdir(parents=True, exist_ok=True)


def sweep(work: Work, files: Sequence[Path], args: argparse.Namespace) -> tuple[list[Row], int]:
    """Runs `work` for all files, arms and seeds, `args.jobs` at a time; writes `runs.json` and `runs.csv`.

    Args:
        work: Takes a run, writes into its folder, and returns its measures. It must be importable by its name.
        files: Data sets.
        args: What :func:`add_arguments` has added, parsed.

    Returns:
        A row for every finished run (`data`, `arm`, `seed`, and its measures), and how many runs failed.
    """
    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        raise lddu_full.UsageError(f"Expected files of different names, but got {names}")
    runs = [
        Run(file, arm, seed, args.output / file.stem / slug(arm) / str(seed), args)
        for seed in args.seeds  # a stopped sweep has all arms of the first seeds
        for file in files
        for arm in args.arms
    ]
    rows: dict[int, Row] = {}
    with ProcessPoolExecutor(
        args.jobs, mp_context=get_context("spawn"), initializer=end_with_parent
    ) as pool:
        futures = {pool.submit(finish, work, run): index for index, run in enumerate(runs)}
        with tqdm(total=len(runs), unit="run", smoothing=0) as bar:
            for future in as_completed(futures):
                index = futures[future]
                try:
                    rows[index] = future.result()
                except (Exception, SystemExit) as error:  # the other runs go on
                    bar.write(f"{runs[index]}: failed: {error}, see {runs[index].folder}/run.log")
                bar.update()
    finished = [rows[index] for index in sorted(rows)]
    args.output.mkdir(parents=True, exist_ok=True)
    lddu_full.write_text(args.output / "runs.json", json.dumps(finished, indent=1) + "\n")
    with replacing(args.output / "runs.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in finished for key in row)))
        writer.writeheader()
        writer.writerows(finished)
    return finished, len(runs) - len(finished)


def end_with_parent() -> None:
    """Ends this process when the one that started it does, however it does.

    A sweep that was killed would else leave runs behind, and the next would start them again in the same folders.
    """

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def finish(work: Work, run: Run) -> Row:
    """Does a run unless it was done; its measures appear in one piece or not at all.

    Raises:
        ValueError: If it was done on other data or with other options.
    """
    done = run.folder / "measures.json"
    same_for_all = ("data", "arms", "seeds", "jobs", "output")  # may differ where runs are added
    settings = {name: value for name, value in vars(run.args).items() if name not in same_for_all}
    settings = json.loads(json.dumps({"file": run.file.resolve(), **settings}, default=str))
    if done.exists():
        before = json.loads((run.folder / "settings.json").read_text())
        if before != settings:
            raise ValueError(f"done with {before}, not with {settings}; choose another --output")
    else:
        torch.set_num_threads(1)
        run.folder.mkdir(parents=True, exist_ok=True)
        lddu_full.write_text(run.folder / "settings.json", json.dumps(settings, indent=2) + "\n")
        with (
            open(run.folder / "run.log", "w") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            try:
                measures = work(run)
            except BaseException:
                traceback.print_exc()
                raise
        lddu_full.write_text(done, json.dumps(measures, indent=2) + "\n")
    return {
        "data": run.file.stem,
        "arm": run.arm,
        "seed": run.seed,
        **json.loads(done.read_text()),
    }


def table(
    rows: Sequence[Row],
    columns: Sequence[str],
    notes: Mapping[str, Mapping[str, str]] | None = None,
) -> list[str]:
    """Markdown, one line an arm: mean and standard deviation over seeds, then `notes[column][arm]`."""
    notes = notes or {}
    lines = [
        "| " + " | ".join(("arm", "seeds", *columns, *notes)) + " |",
        "|---|---:|" + "---:|" * (len(columns) + len(notes)),
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        cells = [cell([row.get(column) for row in of_arm]) for column in columns]
        cells += [note[arm] for note in notes.values()]
        lines.append("| " + " | ".join((arm, str(len(of_arm)), *cells)) + " |")
    return lines


def cell(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over seeds; nan where a run has none."""
    array = np.array(values, dtype=float)
    spread = f" ±{array.std(ddof=1):.3f}" if len(array) > 1 else ""
    return f"{array.mean():.3f}{spread}"


def slug(arm: str) -> str:
    """Name of an arm's folder."""
    return "".join(c if c.isalnum() else "_" for c in arm)
