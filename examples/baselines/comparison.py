"""Is LDDU better than what is simpler? Other methods on the same data, with the same measures.

    python examples/baselines --data FILE FILE                         # all methods, five seeds
    python examples/baselines --data FILE --arms lddu late --seeds 0 1 2 -- --config small
    python examples/baselines --data FILE --modality text -- --config small  # text alone, too
    python examples/baselines --data FILE --borrow pooling typicality -- --config small  # with parts of LDDU, too

A sweep (`sweep.py`) over methods. All networks share the encoders, the training, the choice of the checkpoint, the
calibration and the thresholds of `lddu_full.py`; what follows `--` holds for all of them. The classical methods
(scikit-learn) are chosen, calibrated and given thresholds on the validation split too. Nothing sees the test split
before its evaluation.

It writes in `baselines.md` mean and standard deviation over seeds, parameters, and time, as well as how far LDDU is
ahead of each method, with paired bootstrap intervals (of whole groups where the data have them), and in a word: ahead,
level or behind.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uncertainty_mm.examples import sweep
from uncertainty_mm.examples.baselines import classical
from uncertainty_mm.examples.baselines.amp import Adversarial
from uncertainty_mm.examples.baselines.bootstrap import compare, groups_of, verdict
from uncertainty_mm.examples.baselines.carat import Reconstruction
from uncertainty_mm.examples.baselines.dfg import FusionGraph
from uncertainty_mm.examples.baselines.hhmpn import MessagePassing
from uncertainty_mm.examples.baselines.lsan import LabelAttention
from uncertainty_mm.examples.baselines.misa import InvariantSpecific
from uncertainty_mm.examples.baselines.ml_gcn import LabelGraph
from uncertainty_mm.examples.baselines.mms2s import SequenceToSet
from uncertainty_mm.examples.baselines.mult import CrossModal
from uncertainty_mm.examples.baselines.networks import EarlyFusion, LateFusion, PooledMLP
from uncertainty_mm.examples.baselines.raven import ShiftedWords
from uncertainty_mm.examples.baselines.sequence import OneSequence
from uncertainty_mm.examples.baselines.sgm import SequenceGeneration
from uncertainty_mm.examples.baselines.tailor import CommonPrivate
from uncertainty_mm.lightning.cli import one_line_errors

CONFIGS = Path(__file__).with_name("configs")
NETWORKS = {
    "mlp": PooledMLP,
    "early": EarlyFusion,
    "late": LateFusion,
    "mult": CrossModal,
    "misa": InvariantSpecific,
    "dfg": FusionGraph,
    "raven": ShiftedWords,
    "sgm": SequenceGeneration,
    "lsan": LabelAttention,
    "ml-gcn": LabelGraph,
    "mms2s": SequenceToSet,
    "hhmpn": MessagePassing,
    "tailor": CommonPrivate,
    "amp": Adversarial,
    "carat": Reconstruction,
}
LDDU = {"lddu": sweep.Arm()}
ARMS = {name: sweep.Arm((), PooledMLP, CONFIGS) for name in classical.METHODS}
ARMS |= {name: sweep.Arm((), network, CONFIGS) for name, network in NETWORKS.items()}
ARMS |= LDDU
# No early stopping: some networks need many steps before the first gain, and the checkpoint is chosen anyway.
BASE = ["--trainer.max_epochs", "30", "--early_stopping.patience", "1000"]


def work(run: sweep.Run) -> dict[str, Any]:
    """Trains one method with one seed, and evaluates it."""
    start = time.perf_counter()
    if run.name in classical.METHODS:
        row = classical.fit(run.name, run.arm.configs, run.options, run.folder)
    else:
        results = sweep.train(run)
        row = results["test"] | {name: results[name] for name in ("parameters", "epochs")}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def differences(rows: Sequence[sweep.Row], folder: Path, name: str) -> list[str]:
    """Markdown, a title and one line a method: LDDU (or a variant, `name`) minus the method, over the seeds of both."""
    seeds: dict[str, set[int]] = {name: set()}
    for row in rows:
        seeds.setdefault(row["arm"], set()).add(row["seed"])
    lines = []
    for arm in [arm for arm in seeds if arm not in LDDU]:
        if both := sorted(seeds[arm] & seeds[name]):
            found = compare(folder, name, arm, both)
            groups = groups_of(folder / name / str(both[0]))
            cells = (arm, str(len(both)), str(found["miF1"]), str(found["Brier"]), verdict(found))
            lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return []
    clustered = "" if groups is None else f" clustered by group ({len(np.unique(groups))} groups)"
    title = f"{name} minus the other, 95 % interval{clustered}, * where it excludes 0:"
    header = ["| arm | seeds | miF1 | Brier | verdict |", "|---|---:|---:|---:|---|"]
    return [title, "", *header, *lines]


def report(rows: Sequence[sweep.Row], output: Path) -> str:
    """Markdown: the measures of all methods, and how far LDDU is ahead, for each data set."""

    def tables(name: str, here: list[sweep.Row]) -> list[str]:
        sizes = {row["arm"]: f"{row['parameters']:,}" for row in here if "parameters" in row}
        seconds: dict[str, list[float]] = {}
        for row in here:
            seconds.setdefault(row["arm"], []).append(row["seconds"])
        times = {arm: f"{np.mean(each):,.0f} s" for arm, each in seconds.items()}
        lines = sweep.table(here, sweep.COLUMNS[:-1], {"parameters": sizes, "time": times})
        for ours in LDDU:
            if compared := differences(here, output / name, ours):
                lines += ["", *compared]
        return lines

    return sweep.by_data(rows, tables)


def variants(
    arms: Sequence[str], modalities: Sequence[str], borrowed: Sequence[str]
) -> dict[str, sweep.Arm]:
    """Of these arms, those for one sequence reading one modality alone, and those that can borrow a part of LDDU."""
    found = {}
    for arm in arms:
        model = ARMS[arm].model
        read = modalities if issubclass(model, OneSequence) else ()
        can = getattr(model, "can_borrow", ())
        options = {f"{arm}-of-{each}": ("--model.modality", each) for each in read}
        options |= {
            f"{arm}-with-{each}": ("--model.borrows", f"[{each}]")
            for each in borrowed
            if each in can
        }
        found |= {name: ARMS[arm]._replace(options=each) for name, each in options.items()}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        parser = sweep.parser("LDDU and simpler methods.", "runs/baselines", list(ARMS))
        alone = "methods for one sequence read each of these alone, too: sgm-of-text"
        parser.add_argument("--modality", nargs="*", default=[], metavar="NAME", help=alone)
        borrow = "methods that can also take these over from LDDU: late-with-pooling"
        parts = ("pooling", "typicality")
        parser.add_argument("--borrow", nargs="*", default=[], choices=parts, help=borrow)
        args = parser.parse_args(arguments)
        more = variants(args.arms, args.modality, args.borrow)
        args.arms += more
        rows, failed = sweep.run_all(work, ARMS | more, args, BASE)
        sweep.publish(args.output / "baselines.md", report(rows, args.output), failed)


if __name__ == "__main__":
    main()
