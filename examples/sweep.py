"""Many runs, each on its own: data files x arms x seeds, some at a time, resumable.

    python examples/sweep.py --data FILE FILE --arms study/default study/paper --seeds 0 1 2 -- --config small

An arm is a file of options, bundled in `configs` or your own. What follows `--` holds for all runs, in the options of
`lddu_full.py`; where an arm says otherwise, the arm holds. A run has a process and a folder of its own, as any run of
`lddu_full.py` has; next to the folder it prints into a `.log`, and its measures appear in a `.json`. A run that is
finished is not repeated, one that was killed goes on from its last checkpoint, and one that fails costs only itself.
With `--quick` all runs are cut to minutes, to steer by: fewer training samples, three epochs, the first seed.
All measures are in `runs.json` and `runs.csv`, mean and standard deviation over the seeds in `table.md`.

`lddu_ablation.py`, `uncertainty_study.py` and `baselines` are such sweeps.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from tqdm import tqdm

from uncertainty_mm._files import replacing
from uncertainty_mm.examples.lddu_full import LDDU
from uncertainty_mm.lightning import (
    MultilabelModule,
    MultimodalDataModule,
    UsageError,
    run_command_line,
)
from uncertainty_mm.lightning.cli import Parser, one_line_errors, write_text

CONFIGS = Path(__file__).with_name("configs")
NOTED = ("data", "arm", "seed", "options", "quick")  # of a row, besides its measures
COLUMNS = ("Acc", "P", "R", "miF1", "mAP", "Brier", "ECE", "rho")
QUICK = ("--data.max_train_samples", "2000", "--trainer.max_epochs", "3")
QUICK_TITLE = "quick form: at most 2,000 training samples, 3 epochs, one seed"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")


class Arm(NamedTuple):
    """What is varied."""

    options: Sequence[str] = ()
    model: type[MultilabelModule] = LDDU
    configs: Path = CONFIGS  # the files that `--config` knows by name


class Run(NamedTuple):
    """One run of a sweep."""

    file: Path  # the data
    name: str  # of the arm
    seed: int
    folder: Path
    arm: Arm
    options: list[str]  # all but where it is written

    def beside(self, suffix: str) -> Path:
        """A file of the sweep next to the folder of the run."""
        return self.folder.with_suffix(suffix)

    def __str__(self) -> str:
        return f"{self.file.stem}, {self.name}, seed {self.seed}"


Row = dict[str, Any]
# Writes into the folder of a run and returns its measures; processes import it by its name.
Work = Callable[[Run], Mapping[str, Any]]

# --- A run -----------------------------------------------------------------------------------------------------------


def train(run: Run) -> dict[str, Any]:
    """Trains and tests a model, or goes on where an earlier try was killed; returns what `metrics.json` holds."""
    results, last = run.folder / "metrics.json", run.folder / "last.ckpt"
    if not results.exists():
        if not last.exists():
            shutil.rmtree(run.folder, ignore_errors=True)
        where = ["--ckpt_path", last] if last.exists() else ["--output", run.folder]
        options = [*run.options, "--brief", "true", *map(str, where)]
        run_command_line(run.arm.model, run.arm.configs, options)
    return json.loads(results.read_text())


def data_of(folder: Path, **changes: Any) -> MultimodalDataModule:
    """The data of a run, read as it read them."""
    options = yaml.safe_load((folder / "config.yaml").read_text())
    return MultimodalDataModule(**options["data"] | {"seed": options["seed_everything"]} | changes)


def finished(run: Run) -> Row | None:
    """The measures of a run if it is done.

    Raises:
        UsageError: If it was begun with other options, or its folder is not of this sweep.
    """
    record = run.beside(".json")
    if not record.exists():
        if run.folder.exists():
            raise UsageError(f"{run.folder}: exists already, and no run of a sweep made it")
        return None
    found = json.loads(record.read_text())
    if found["options"] != run.options:
        raise UsageError(
            f"begun with {found['options']}, not {run.options}; choose another --output"
        )
    if "measures" not in found:
        return None
    return {"data": run.file.stem, "arm": run.name, "seed": run.seed, **found["measures"]}


def carry_out(work: Work, run: Run) -> None:
    """Does a run; its measures appear in one piece or not at all."""

    def record(**measures: Any) -> None:
        content = json.dumps({"options": run.options, **measures}, indent=2)
        write_text(run.beside(".json"), content + "\n")

    record()
    record(measures=work(run))


def in_a_process(work: Work, run: Run) -> None:
    """Does a run in a process of its own, whose end, however it comes, is nobody else's.

    Raises:
        RuntimeError: If it does not end well.
    """
    process = processes(work.__module__).Process(target=alone, args=(work, run))
    process.start()
    process.join()
    if process.exitcode:
        log = run.beside(".log")
        last = log.read_text().strip().rpartition("\n")[2] if log.exists() else ""
        raise RuntimeError(f"exit code {process.exitcode}, {last!r}, see {log}")


@cache
def processes(module: str) -> Any:
    """Makes processes that count with one thread; on Linux forked from one that has imported `module` and all else.

    That server does nothing but import and fork, so nothing of one run is in another.
    """
    os.environ |= dict.fromkeys(THREADS, "1")  # before the libraries that read it are loaded
    if not sys.platform.startswith("linux"):
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["uncertainty_mm.examples.sweep", module])
    return context


def alone(work: Work, run: Run) -> None:
    """Does a run, prints into its log, and ends with the sweep: a killed one leaves no run behind for the next."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with open(run.beside(".log"), "a") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    sys.stdout.reconfigure(line_buffering=True)
    os.environ |= dict.fromkeys(THREADS, "1")  # where somebody else started the server
    torch.set_num_threads(1)
    carry_out(work, run)


def attempt(work: Work, run: Run) -> Row:
    """The measures of a run, which is done if it was not done before."""
    row = finished(run)
    if row is None:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        in_a_process(work, run)
        row = finished(run)
        assert row is not None
    return row


# --- All runs --------------------------------------------------------------------------------------------------------


def run_all(
    work: Work, arms: Mapping[str, Arm], args: argparse.Namespace, base: Sequence[str] = ()
) -> tuple[list[Row], int]:
    """Runs `work` for all files, arms and seeds, `args.jobs` at a time; writes `runs.json` and `runs.csv`.

    The options `base` hold for all runs, before `args.options`, which hold before those of the arms.

    Returns:
        A row for every finished run (`data`, `arm`, `seed`, and its measures), and how many runs failed.

    Raises:
        UsageError: If a run could only fail, or two would write into one folder.
    """
    for file in args.data:
        if not file.exists():
            raise UsageError(f"--data: no such file, {file}")
    base, seeds = [*QUIET, *base, *args.options], args.seeds
    if args.quick:
        seeds = seeds[:1]
        arms = {name: arm._replace(options=[*arm.options, *QUICK]) for name, arm in arms.items()}
    runs = [
        make_run(file, name, arms[name], seed, base, args.output)
        for seed in seeds  # a stopped sweep has all arms of the first seeds
        for file in args.data
        for name in args.arms
    ]
    if not runs or len({run.folder for run in runs}) < len(runs):
        raise UsageError("--data, --arms, --seeds: at least one of each is needed, no two alike")
    if args.jobs < 1 or min(seeds) < 0:
        given = f"{args.jobs}, {args.seeds}"
        raise UsageError(f"--jobs must be at least 1 and --seeds at least 0, got {given}")
    for run in [run for run in runs if (run.file, run.seed) == (runs[0].file, runs[0].seed)]:
        check_options(run)  # those of other files and seeds are the same
    args.output.mkdir(parents=True, exist_ok=True)
    rows: dict[int, Row] = {}
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(runs), unit="run") as bar:
        futures = {pool.submit(attempt, work, run): index for index, run in enumerate(runs)}
        try:
            for future in as_completed(futures):
                index = futures[future]
                try:
                    rows[index] = future.result()
                except (Exception, SystemExit) as error:  # the other runs go on
                    bar.write(f"{runs[index]}: failed: {error}")
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)  # of an interrupted sweep
    noted = {"options": " ".join(args.options)} if args.options else {}
    if args.quick:
        noted["quick"] = True
    done = [{**rows[index], **noted} for index in sorted(rows)]
    write_text(args.output / "runs.json", json.dumps(done, indent=1) + "\n")
    with replacing(args.output / "runs.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in done for key in row)))
        writer.writeheader()
        writer.writerows(done)
    return done, len(runs) - len(done)


def make_run(file: Path, name: str, arm: Arm, seed: int, base: Sequence[str], output: Path) -> Run:
    """A run, whose folder is `output/FILE/ARM/SEED`; the options of the arm hold before those of all runs."""
    folder = output / file.stem / re.sub(r"[^\w.-]+", "-", name) / str(seed)
    own = ["--seed_everything", str(seed), "--data.path", str(file.resolve())]
    return Run(file, name, seed, folder, arm, [*base, *arm.options, *own])


def check_options(run: Run) -> None:
    """Ends the program with one line where an option is not one of the model."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            run_command_line(run.arm.model, run.arm.configs, [*run.options, "--print_config"])
        except SystemExit as stop:
            if stop.code:
                raise


# --- What comes of it ------------------------------------------------------------------------------------------------


def table(
    rows: Sequence[Row],
    columns: Sequence[str] = COLUMNS,
    notes: Mapping[str, Mapping[str, str]] | None = None,
    titles: Mapping[str, str] | None = None,
) -> list[str]:
    """Markdown, one line an arm: mean and standard deviation over seeds, then `notes[column][arm]`."""
    notes, titles = notes or {}, titles or {}
    lines = [
        "| " + " | ".join(("arm", "seeds", *columns, *notes)) + " |",
        "|---|---:|" + "---:|" * (len(columns) + len(notes)),
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        cells = [cell([row.get(column) for row in of_arm]) for column in columns]
        cells += [note.get(arm, "") for note in notes.values()]
        lines.append("| " + " | ".join((titles.get(arm, arm), str(len(of_arm)), *cells)) + " |")
    return lines


def cell(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over seeds; nan where a run has none."""
    array = np.array(values, dtype=float)
    spread = f" ±{array.std(ddof=1):.3f}" if len(array) > 1 else ""
    return f"{array.mean():.3f}{spread}"


def by_data(rows: Sequence[Row], tables: Callable[[str, list[Row]], list[str]]) -> str:
    """Markdown: what `tables` makes of the rows of every data set, under a title that has the options of all runs."""
    lines = []
    for name in dict.fromkeys(row["data"] for row in rows):
        here = [row for row in rows if row["data"] == name]
        options, quick = here[0].get("options"), here[0].get("quick")
        title = [name, *([f"`{options}`"] if options else []), *([QUICK_TITLE] if quick else [])]
        lines += [", ".join(title) + ":", "", *tables(name, here), ""]
    return "\n".join(lines)


def publish(path: Path, text: str, failed: int) -> None:
    """Writes and prints a report; ends the program with an exit code where runs failed."""
    write_text(path, text)
    print(text)
    if failed:
        sys.exit(f"{failed} runs failed")


# --- Command line ----------------------------------------------------------------------------------------------------


def parser(description: str, output: str, arms: Sequence[str] = ()) -> Parser:
    """The options that all sweeps share."""
    result = Parser(description=description)
    add = result.add_argument
    add("--data", type=Path, nargs="*", default=[], help="files, in a layout of lddu_full.py")
    known = {"choices": list(arms)} if arms else {}
    add("--arms", nargs="*", default=list(arms), metavar="ARM", help="what is varied", **known)
    add("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    add("--jobs", type=int, default=cores(), help="runs at a time, each with one thread")
    add("--quick", action="store_true", help=f"{QUICK_TITLE}; choose an --output of its own")
    add("--output", type=Path, default=Path(output))
    add("options", nargs="*", default=[], help="after --: options of lddu_full.py for all runs")
    return result


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def work(run: Run) -> dict[str, Any]:
    """Trains one arm with one seed."""
    return train(run)["test"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        args = parser("LDDU with various options.", "runs/sweep").parse_args(arguments)
        arms = {name: Arm(["--config", name]) for name in args.arms}
        rows, failed = run_all(work, arms, args)
        publish(args.output / "table.md", by_data(rows, lambda _, here: table(here)), failed)


if __name__ == "__main__":
    main()
