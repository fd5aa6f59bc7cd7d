r"""Which rule and which loss for which problem? All of them in one small model, on the same data.

    python examples/bakeoff --data FILE FILE --seeds 0 1 2                  # all arms
    python examples/bakeoff --data FILE --arms product mixture contrastive  # some
    python examples/bakeoff/identities.py                                   # what the rules promise, computed

A sweep (`sweep.py`) over rules of fusion (`rules.py`), and over losses (`losses.py`) on top of one of them, the arm
`product`. All else is shared: encoders, label queries, Gaussians, dropped modalities, training, the choice of the
checkpoint, calibration and thresholds (`model.py`; options in `configs/bakeoff.yaml`, and after `--` for all runs).

It writes `bakeoff.md`, with mean and standard deviation over seeds and paired bootstrap intervals of the differences
from `product` (`bakeoff_DATA.md` is the part of a data set), and `bakeoff.svg`, which shows these intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uncertainty_mm._files import replacing
from uncertainty_mm.examples import sweep
from uncertainty_mm.examples.bakeoff.losses import LOSSES
from uncertainty_mm.examples.bakeoff.measures import measure
from uncertainty_mm.examples.bakeoff.model import FusionModel
from uncertainty_mm.examples.bakeoff.report import DEFAULT, differences, figure, report
from uncertainty_mm.examples.bakeoff.rules import RULES
from uncertainty_mm.lightning.cli import one_line_errors, write_text

OPTIONS = {name: ["--model.rule", name] for name in RULES}
OPTIONS |= {name: ["--model.rule", DEFAULT, "--model.loss", name] for name in LOSSES}
ARMS = {name: sweep.Arm(options, FusionModel) for name, options in OPTIONS.items()}
# No early stopping, as for the baselines.
BASE = ["--config", "bakeoff", "--early_stopping.patience", "1000"]


def work(run: sweep.Run) -> dict[str, Any]:
    """Trains one arm with one seed, and measures it."""
    sweep.train(run)
    return measure(run.folder, run.file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        parser = sweep.parser("Rules of fusion and losses, compared.", "runs/bakeoff", list(ARMS))
        args = parser.parse_args(arguments)
        rows, failed = sweep.run_all(work, ARMS, args, BASE)
        intervals = differences(rows, args.output)
        if intervals:
            with replacing(args.output / "bakeoff.svg") as partial:
                figure(intervals).savefig(partial, format="svg")
        for name in dict.fromkeys(row["data"] for row in rows):
            of_data = report([row for row in rows if row["data"] == name], intervals)
            write_text(args.output / f"bakeoff_{name}.md", of_data)
        sweep.publish(args.output / "bakeoff.md", report(rows, intervals), failed)


if __name__ == "__main__":
    main()
