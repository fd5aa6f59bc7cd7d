"""What happens when one modality breaks? The models of a sweep of baselines, on input spoilt on purpose.

    python examples/baselines --data FILE FILE --output runs/baselines       # train first
    python examples/robustness.py runs/baselines --quick                     # in about a minute: a part of all below
    python examples/robustness.py runs/baselines

Every finished run predicts the test split with one modality corrupted at a time, in every way of
`uncertainty_mm.data.transforms` and in several sizes, and with the modality masked: the ideal reaction, where the model
is told. No model has seen the corruption in training, unless the sweep was asked for it; nothing is trained or chosen.
`swapped`, the sequence of another sample, is as usual as any, so only a conflict between the modalities can tell it.

It writes `robustness.md`, with means over seeds and paired bootstrap intervals, `robustness.csv` with all that was
measured, and a figure for each data set.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from uncertainty_mm import plots
from uncertainty_mm._files import replacing
from uncertainty_mm.data import MultimodalDataset
from uncertainty_mm.data.transforms import Corruption, corrupted
from uncertainty_mm.examples import sweep
from uncertainty_mm.examples.baselines import classical
from uncertainty_mm.examples.baselines.bootstrap import paired_bootstrap, sample_terms, scores
from uncertainty_mm.examples.baselines.comparison import ARMS, LDDU
from uncertainty_mm.lightning import UsageError
from uncertainty_mm.lightning.cli import Parser, one_line_errors
from uncertainty_mm.metrics.functional import auroc

SIZES = (0.75, 1.5, 3.0, 6.0)
REFERENCE = 3.0  # of the tables
WITH_SIZE = ("noise", "scaled", "offset", "clipped", "burst", "blurred", "dropped")
KINDS = tuple(kind for kind in get_args(Corruption) if kind != "swapped")
WITHOUT = ", no typicality"  # after the name of an arm
# What should rise; `named` is the share in which `foreign` names the right modality.
SCORES = ("typicality", "std", "entropy", "conflict", "foreign", "named")
QUICK = 500  # samples
BATCH = 1024
COLORS = [color for color in plots.COLORS if color != "#000000"]  # black is LDDU


class Version(NamedTuple):
    """What was done to the test split."""

    kind: str  # "clean", "masked", or a kind of corruption
    size: float = REFERENCE
    modality: str = ""  # all of them

    def of(self, data: MultimodalDataset) -> MultimodalDataset:
        """The data after it."""
        if self.kind == "clean":
            return data
        if self.kind == "masked":
            return data.only([name for name in data.dims if name != self.modality])
        kind: Any = self.kind
        return corrupted(data, self.modality, kind, size=self.size)


class Task(NamedTuple):
    """A run to evaluate."""

    folder: Path
    arm: str
    sizes: Sequence[float]
    samples: int | None  # at most

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.folder.name)


class Result(NamedTuple):
    """What an arm is worth with one seed."""

    data: str
    arm: str
    seed: int
    rows: list[dict[str, Any]]  # measures by version
    terms: np.ndarray  # (4, N), mean over kinds and modalities at the size of reference


def versions(modalities: Sequence[str], sizes: Sequence[float] = SIZES) -> Iterator[Version]:
    """All that is done to a test split, first nothing."""
    yield Version("clean")
    for modality in modalities:
        for kind in ("masked", *KINDS, "swapped"):
            each = sizes if kind in WITH_SIZE else (REFERENCE,)
            yield from (Version(kind, size, modality) for size in each)


def finished(folder: Path, arms: Sequence[str]) -> dict[tuple[str, str], list[Path]]:
    """The folders of the runs of a sweep whose models were kept, in the order of seeds, by data set and arm."""
    runs = {}
    for data in sorted(each for each in folder.glob("*") if each.is_dir()):
        for arm in arms:
            found = []
            for record in sorted((data / arm).glob("*.json"), key=lambda path: int(path.stem)):
                run = record.with_suffix("")
                kept = any((run / name).exists() for name in ("best.ckpt", classical.FILE))
                if kept and "measures" in json.loads(record.read_text()):
                    found.append(run)
            runs[data.name, arm] = found
    return runs


def test_split(task: Task) -> MultimodalDataset:
    """The test split of a run; the classical methods read the data of the networks next to them."""
    configs = sorted(task.folder.parents[1].glob("*/*/config.yaml"))
    if not configs:
        raise UsageError(f"{task.folder.parents[1]}: needs the run of a network, which names data")
    return drawn(sweep.data_of(configs[0].parent).part("test"), task.samples)


def drawn(data: MultimodalDataset, samples: int | None) -> MultimodalDataset:
    """At most so many samples, drawn at random, always the same ones; None takes all."""
    if samples is None or len(data) <= samples:
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data.select(order[:samples].sort().values)


def models_of(task: Task, batches: int = 0) -> Iterator[tuple[str, Any]]:
    """The model of a run; LDDU with and without its typicality."""
    if task.arm in classical.METHODS:
        fitted = classical.Fitted.load(task.folder)
        remember(fitted.network, batches)
        yield task.arm, fitted
        return
    model = ARMS[task.arm].model.load(task.folder / "best.ckpt")
    remember(model, batches)
    yield task.arm, model
    if task.arm == "lddu":
        model.use_typicality = False
        yield task.arm + WITHOUT, model


def remember(model: Any, batches: int) -> None:
    """Lets the encoders of a model recognise the first batches: only one modality changes at a time.

    That saves most of the time, and changes no number.
    """

    def wrapped(encode: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def forward(x: Tensor, padding: Tensor) -> Tensor:
            for known, mask, answer in seen:
                if torch.equal(x, known) and torch.equal(padding, mask):
                    return answer
            answer = encode(x, padding)
            if len(seen) < batches:
                seen.append((x, padding, answer))
            return answer

        return forward

    for encoder in model.encoder.values():
        encoder.forward = wrapped(encoder.forward)


def unease(said: Mapping[str, Tensor], modality: int) -> dict[str, Tensor]:
    """What of the answers of a model should be larger where a modality is spoilt: tensors (N,) by name."""
    found = {"entropy": said["uncertainty"]}
    if "std_norm" in said:
        found["std"] = torch.linalg.vector_norm(said["std_norm"][:, modality], dim=1)
    if "typicality" in said:
        found["typicality"] = said["typicality"][:, modality]
    if "missing" in said:
        alone = (~said["missing"]).sum(1) < 2  # with nothing to contradict
    if "conflict" in said:
        found["conflict"] = said["conflict"].mean(1).masked_fill(alone, torch.nan)
    if "foreign" in said:
        found["foreign"] = said["foreign"].sum(1).masked_fill(alone, torch.nan)
    return found


def detection(clean: Tensor, spoilt: Tensor, changed: Tensor) -> float:
    """AUROC of a score (N,) between clean and spoilt input, of the samples that changed; nan if none did."""
    here = changed & clean.isfinite() & spoilt.isfinite()
    both = torch.cat([clean[here], spoilt[here]])
    return float(auroc(both, torch.arange(len(both)) >= len(both) // 2)) if len(both) else math.nan


def evaluate(task: Task) -> list[Result]:
    """Measures a run in all versions of its test split."""
    torch.set_num_threads(1)
    data, results = test_split(task), []
    names = list(data.dims)
    for arm, model in models_of(task, math.ceil(len(data) / BATCH)):
        rows, total, clean = [], [], {}
        for version in versions(names, task.sizes):
            changed = version.of(data)
            said = model.predict(changed, BATCH)
            unknown = None if data.unknown is None else data.unknown.numpy()
            terms = sample_terms(
                said["probs"].numpy(), data.labels.numpy(), model.threshold.numpy(), unknown
            )
            f1, brier = scores(np.ones((1, len(data))), terms[None])[:, 0]
            row = {**version._asdict(), "miF1": f1, "Brier": brier}
            if version.kind == "clean":
                clean = said
            elif version.kind != "masked":
                index = names.index(version.modality)
                before, after = data.features[version.modality], changed.features[version.modality]
                moved = (before != after).flatten(1).any(1)
                usual, now = unease(clean, index), unease(said, index)
                row |= {name: detection(usual[name], now[name], moved) for name in now}
                if version.kind == "swapped" and "foreign" in said:
                    named = said["foreign"][moved].argmax(1) == index
                    row["named"] = float(named.float().mean())
            if version.kind in KINDS and version.size == REFERENCE:
                total.append(terms)
            rows.append(row)
        name = task.folder.parents[1].name
        results.append(Result(name, arm, task.seed, rows, np.mean(total, axis=0)))
    return results


# --- What comes of it ------------------------------------------------------------------------------------------------


def mean(rows: Sequence[Mapping[str, Any]], measure: str, **where: Any) -> float:
    """Mean of a measure over the rows that are as asked and have it; nan where none has."""
    found = [
        row[measure]
        for row in rows
        if all(row[key] in wanted for key, wanted in where.items())
        and not math.isnan(row.get(measure, math.nan))
    ]
    return sum(found) / len(found) if found else math.nan


def table(columns: Sequence[str], lines: Mapping[str, Sequence[float | str]]) -> list[str]:
    """Markdown; numbers with four digits, nothing where there is none."""

    def cell(value: float | str) -> str:
        return value if isinstance(value, str) else "" if math.isnan(value) else f"{value:.4f}"

    return [
        "| " + " | ".join(columns) + " |",
        "|---|" + "---:|" * (len(columns) - 1),
        *(f"| {name} | " + " | ".join(map(cell, line)) + " |" for name, line in lines.items()),
    ]


def predictions(rows: Mapping[str, list[dict[str, Any]]], measure: str) -> list[str]:
    """A line an arm: a measure by kind, mean over modalities and seeds."""
    kinds = [[kind] for kind in ("clean", *KINDS)] + [KINDS, ["masked"]]
    lines = {
        arm: [mean(of_arm, measure, kind=kind, size=[REFERENCE]) for kind in kinds]
        for arm, of_arm in rows.items()
    }
    return table(["arm", "clean", *KINDS, "mean", "masked"], lines)


def detections(rows: Mapping[str, list[dict[str, Any]]], ours: str) -> list[str]:
    """A line a score and modality: AUROC by kind, mean over seeds."""
    kinds = [[kind] for kind in KINDS] + [KINDS, ["swapped"]]
    names = list(dict.fromkeys(row["modality"] for row in rows[ours] if row["modality"]))
    lines = {
        f"{score}{arm.removeprefix(ours)}: {which}": [
            mean(rows[arm], score, kind=kind, size=[REFERENCE], modality=of) for kind in kinds
        ]
        for score, arm in [(score, ours) for score in SCORES] + [("std", ours + WITHOUT)]
        if any(score in row for row in rows.get(arm, ()))
        for which, of in {**{name: [name] for name in names}, "all": names}.items()
    }
    return table(["score: modality", *KINDS, "mean", "swapped"], lines)


def intervals(results: Sequence[Result], ours: str) -> list[str]:
    """A line an arm: Brier score of LDDU minus its own, over the seeds that both have."""
    terms: dict[str, dict[int, np.ndarray]] = {}
    for result in results:
        terms.setdefault(result.arm, {})[result.seed] = result.terms
    lines = {}
    for arm in terms:
        both = sorted(terms[ours].keys() & terms[arm].keys())
        if arm != ours and both:
            pair = (np.stack([terms[each][seed] for seed in both]) for each in (ours, arm))
            lines[arm] = [str(len(both)), str(paired_bootstrap(*pair)["Brier"])]
    return table(["arm", "seeds", "Brier"], lines)


def curves(rows: Mapping[str, list[dict[str, Any]]]) -> Figure:
    """Micro F1 and Brier score against the size of the corruption, mean over kinds that have one, and modalities."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    sizes = sorted({row["size"] for of_arm in rows.values() for row in of_arm})
    arms = [arm for arm in rows if not arm.endswith(WITHOUT)]
    for panel, measure in zip(figure.subplots(1, 2), ("miF1", "Brier"), strict=True):
        for arm in [each for each in rows if each != "prior"]:  # far from all others
            index, ours = arms.index(arm.removesuffix(WITHOUT)), arm.removesuffix(WITHOUT) in LDDU
            y = [mean(rows[arm], measure, kind=["clean"])]
            y += [mean(rows[arm], measure, kind=WITH_SIZE, size=[size]) for size in sizes]
            style = {"linestyle": ":" if arm.endswith(WITHOUT) else "-"}
            style["color"] = "black" if ours else COLORS[index % len(COLORS)]
            style["marker"] = plots.MARKERS[index % len(plots.MARKERS)]
            panel.plot([0, *sizes], y, label=arm, linewidth=2 if ours else 1, markersize=4, **style)
            if arm == "lddu":
                ideal = mean(rows[arm], measure, kind=["masked"])
                panel.axhline(
                    ideal, color=style["color"], linestyle="--", label="lddu, told (masked)"
                )
        panel.set(xlabel="size of the corruption", ylabel=measure)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def report(results: Sequence[Result], output: Path) -> str:
    """Markdown with the tables of all data sets; their figures are written next to it."""
    lines = []
    for name in dict.fromkeys(result.data for result in results):
        here = [result for result in results if result.data == name]
        rows: dict[str, list[dict[str, Any]]] = {}
        for result in here:
            rows.setdefault(result.arm, []).extend(result.rows)
        with replacing(output / f"robustness_{name}.png") as partial:
            curves(rows).savefig(partial, dpi=110)
        for measure in ("Brier", "miF1"):
            title = f"{name}, {measure} with one modality corrupted, size {REFERENCE:g}:"
            lines += [title, "", *predictions(rows, measure), ""]
        for ours in [arm for arm in LDDU if arm in rows]:
            title = f"{name}, AUROC of the scores of {ours}, clean against corrupted:"
            lines += [title, "", *detections(rows, ours), ""]
            title = (
                f"{name}, {ours} minus the other, corrupted, 95 % interval, * where it excludes 0:"
            )
            lines += [title, "", *intervals(here, ours), ""]
    return "\n".join(lines)


def write_rows(path: Path, results: Sequence[Result]) -> None:
    """All measures as .csv, a line for every run and version."""
    rows = [
        {"data": each.data, "arm": each.arm, "seed": each.seed, **row}
        for each in results
        for row in each.rows
    ]
    with replacing(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        parser = Parser(description="The models of a sweep of baselines on corrupted input.")
        add = parser.add_argument
        add("runs", type=Path, help="--output of the baselines")
        add("--arms", nargs="*", default=list(ARMS), metavar="ARM", choices=list(ARMS))
        add("--samples", type=int, help="so many of a test split, drawn at random; default all")
        add("--quick", action="store_true", help=f"one seed, one size, {QUICK} samples")
        add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
        add("--output", type=Path, help="folder, default that of the runs")
        args = parser.parse_args(arguments)
        if args.jobs < 1 or (args.samples is not None and args.samples < 1):
            given = f"{args.jobs}, {args.samples}"
            raise UsageError(f"--jobs and --samples must be at least 1, got {given}")
        sizes = (REFERENCE,) if args.quick else SIZES
        samples = args.samples or (QUICK if args.quick else None)
        tasks = [
            Task(run, arm, sizes, samples)
            for (_, arm), runs in finished(args.runs, args.arms).items()
            for run in runs[: 1 if args.quick else None]
        ]
        if not tasks:
            raise UsageError(f"{args.runs}: no finished run of {', '.join(args.arms)}")
        output = args.output or args.runs
        output.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            run = map
            if args.jobs > 1:
                run = stack.enter_context(get_context("spawn").Pool(args.jobs)).imap
            each = tqdm(run(evaluate, tasks), total=len(tasks), unit="run")
            results = [result for of_run in each for result in of_run]
        write_rows(output / "robustness.csv", results)
        sweep.publish(output / "robustness.md", report(results, output), 0)


if __name__ == "__main__":
    main()
