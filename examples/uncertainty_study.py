"""Does the standard deviation mean something? Variants of LDDU, measured where the answer is known.

    python examples/uncertainty_study.py                                       # synthetic data, exact posterior
    python examples/uncertainty_study.py --data FILE FILE                      # also your data
    python examples/uncertainty_study.py --arms default paper --seeds 0 1      # part of it
    python examples/uncertainty_study.py -- --trainer.max_epochs 25            # with other options for all runs

A sweep (`sweep.py`) over the files `configs/study`, so that the command can be stopped and started again, and extended
by arms, seeds and files. It writes mean and standard deviation over seeds (`study.md`), and figures of the first seed
of the arm `default`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uncertainty_mm import plots
from uncertainty_mm._files import replacing
from uncertainty_mm.data import MultimodalDataset, SyntheticMMER
from uncertainty_mm.data.transforms import corrupted
from uncertainty_mm.examples import sweep
from uncertainty_mm.examples.lddu_full import LDDU
from uncertainty_mm.lightning import MultilabelModule, UsageError, mean_over_known
from uncertainty_mm.lightning.cli import one_line_errors
from uncertainty_mm.metrics.functional import (
    auroc,
    modality_attribution,
    predictive_entropy,
    spearman,
)

NAMES = sorted(path.stem for path in (sweep.CONFIGS / "study").glob("*.yaml"))
NAMES.sort(key=lambda name: name != "default")  # first
ARMS = {name: sweep.Arm(["--config", f"study/{name}"]) for name in NAMES}
BASE = ["--config", "small", "--data.drop_modality", "0.2", "--trainer.max_epochs", "10"]
PREDICTION = ("miF1", "mAP", "Brier", "ECE before", "ECE", "AURC", "entropy ~ error")
BY_MODALITY = "corruption AUROC, "  # then the name of the modality
LEVELS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)  # of noise, in standard deviations of the features
EMOTIONS = ["happy", "sad", "anger", "surprise", "disgust", "fear"]


def synthetic_file(path: Path, sizes: Sequence[int]) -> None:
    """Writes samples of `SyntheticMMER` with what is known of them, in the layout of `read_npz`."""
    world = SyntheticMMER()
    samples = world.sample(sum(sizes), seed=1)
    posterior = world.posterior(samples)
    arrays = {
        "labels": samples.labels,
        "noise": samples.noise,
        "posterior": posterior.marginals,
        "posterior_entropy": posterior.entropy,
    }
    for name, features in samples.features.items():
        arrays[f"features.{name}"] = features
        arrays[f"lengths.{name}"] = (~samples.padding_mask[name]).sum(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        np.savez(
            partial,
            split=np.repeat(np.arange(3), sizes),
            label_names=np.array(EMOTIONS),
            **{name: array.numpy() for name, array in arrays.items()},
        )


def truth(file: Path) -> dict[str, Tensor]:
    """What is known of the test samples of a synthetic file: level of noise (N, M), entropy of the posterior (N,)."""
    if file.suffix != ".npz":
        return {}
    with np.load(file, allow_pickle=False) as arrays:
        if "noise" not in arrays:
            return {}
        test = arrays["split"] == 2
        return {
            name: torch.from_numpy(arrays[name][test]) for name in ("noise", "posterior_entropy")
        }


class Answers:
    """What a model says of a data set, about the samples that have any modality.

    Attributes:
        there: (N,) bool, the samples that have any modality; all else is of these.
        probs: (N, Q).
        sizes: (N, M), size of the standard deviations of every modality, over its labels; NaN where it is missing.
        missing: (N, M) bool.
        total: (N,), root mean square of the sizes, so that samples with few modalities compare with those with many.
        entropy: (N,), predictive.
    """

    def __init__(self, model: MultilabelModule, data: MultimodalDataset) -> None:
        outputs = model.predict(data)
        self.there = ~outputs["missing"].all(1)
        outputs = {name: x[self.there] for name, x in outputs.items()}
        self.probs, self.missing = outputs["probs"], outputs["missing"]
        self.sizes = torch.linalg.vector_norm(outputs["std_norm"], dim=2)
        self.total = self.sizes.square().nanmean(1).sqrt()
        self.entropy = predictive_entropy(self.probs)

    @property
    def shares(self) -> Tensor:
        """Share of every modality, (N, M)."""
        return modality_attribution(self.sizes, self.missing)


def error_of(answers: Answers, data: MultimodalDataset) -> Tensor:
    """Mean absolute error of every sample over its known labels, (N,)."""
    unknown = None if data.unknown is None else data.unknown[answers.there]
    return mean_over_known((answers.probs - data.labels[answers.there]).abs(), unknown)


def std_against_noise(answers: Answers, noise: Tensor) -> float:
    """Spearman correlation of the standard deviations with the level of noise (N, M), of the worst modality."""
    each = zip(answers.sizes.T, noise[answers.there].T, strict=True)
    return min(float(spearman(x[~x.isnan()], y[~x.isnan()])) for x, y in each)


def measure(folder: Path, file: Path) -> dict[str, Any]:
    """What the test split says of the best checkpoint of a run."""
    results = json.loads((folder / "metrics.json").read_text())
    model, data = LDDU.load(folder / "best.ckpt"), sweep.data_of(folder).part("test")
    said = Answers(model, data)
    row = {name: results["test"][name] for name in ("miF1", "mAP", "Brier", "ECE", "AURC")}
    row["ECE before"] = results["uncalibrated"]["ECE"]
    row["entropy ~ error"] = results["test"]["rho"]
    row["std ~ error"] = float(spearman(said.total, error_of(said, data)))
    spread = [each[~each.isnan()] for each in said.sizes.T]
    row["CV of std"] = float(torch.stack([each.std() / each.mean() for each in spread]).mean())
    aurocs, shifts = {}, []
    for index, name in enumerate(data.dims):
        changed, there = Answers(model, corrupted(data, name)), ~said.missing[:, index]
        both = torch.cat([said.sizes[there, index], changed.sizes[there, index]])
        spoilt = torch.arange(len(both)) >= len(both) // 2
        aurocs[BY_MODALITY + name] = float(auroc(both, spoilt.float()))
        shifts.append(float((changed.shares - said.shares)[there, index].mean()))
    row |= {"corruption AUROC": min(aurocs.values()), **aurocs}
    row["attribution shift"] = max(shifts)
    if known := truth(file):
        row["std ~ noise"] = std_against_noise(said, known["noise"])
        entropy = known["posterior_entropy"][said.there]
        row["entropy ~ truth"] = float(spearman(said.entropy, entropy))
        row["std ~ truth"] = float(spearman(said.total, entropy))
    if data.soft_labels is not None:
        raters = predictive_entropy(data.soft_labels[said.there].clamp(0, 1))
        row["entropy ~ raters"] = float(spearman(said.entropy, raters))
        row["std ~ raters"] = float(spearman(said.total, raters))
    return row


def work(run: sweep.Run) -> dict[str, Any]:
    """Trains one arm with one seed, and measures it."""
    sweep.train(run)
    return measure(run.folder, run.file)


def tables(name: str, rows: list[sweep.Row]) -> list[str]:
    """Three tables of a data set: of predictions, of uncertainties, and of corrupted modalities."""
    rest = [key for key in rows[0] if key not in (*sweep.NOTED, *PREDICTION)]
    by_modality = [key for key in rest if key.startswith(BY_MODALITY)]
    others = [key for key in rest if key not in by_modality]
    parts = [sweep.table(rows, columns) for columns in (PREDICTION, others, by_modality)]
    return [*parts[0], "", *parts[1], "", *parts[2]]


def figures(folder: Path, file: Path, output: Path) -> None:
    """Reliability, risk and coverage, attribution, and, of synthetic data, standard deviations against the noise."""
    model, data = LDDU.load(folder / "best.ckpt"), sweep.data_of(folder).part("test")
    said, names = Answers(model, data), list(data.dims)
    labels = data.labels[said.there]
    unknown = None if data.unknown is None else data.unknown[said.there]
    axes: dict[str, Any] = {
        "reliability": plots.reliability_diagram(
            said.probs, labels, data.label_names, unknown=unknown
        ),
        "risk_coverage": plots.risk_coverage(
            {
                "predictive entropy": said.entropy,
                "size of the standard deviations": said.total,
            },
            error_of(said, data),
        ),
    }
    whole = ~said.missing.any(1)  # shares of samples with other modalities do not compare
    if whole.any():
        shares = [
            Answers(model, corrupted(data, names[0], size=level)).shares[whole].mean(0)
            for level in LEVELS
        ]
        ax = plots.modality_attribution(LEVELS, torch.stack(shares), names)
        ax.set_xlabel(f"noise added to {names[0]}, in standard deviations of its features")
        axes["attribution"] = ax
    if known := truth(file):
        noise = known["noise"][said.there]
        sizes = said.sizes.nan_to_num(1.0)
        axes["noise"] = plots.uncertainty_against_noise(noise, sizes, names, missing=said.missing)
    for name, ax in axes.items():
        with replacing(output / f"{file.stem}_{name}.png") as partial:
            np.ravel(ax)[0].figure.savefig(partial, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        parser = sweep.parser("What the uncertainty of LDDU is worth.", "runs/uncertainty", NAMES)
        add = parser.add_argument
        add("--no-synthetic", action="store_true", help="leave the synthetic data out")
        add("--sizes", type=int, nargs=3, default=[4000, 1000, 2000], help="of synthetic splits")
        args = parser.parse_args(arguments)
        if min(args.sizes) < 1:
            raise UsageError(f"--sizes must be above 0, got {args.sizes}")
        if not args.no_synthetic:
            args.data.insert(0, args.output / "synthetic.npz")
            if not args.data[0].exists():
                synthetic_file(args.data[0], args.sizes)
        rows, failed = sweep.run_all(work, ARMS, args, BASE)
        for file in args.data:
            folder = args.output / file.stem / "default" / str(args.seeds[0])
            if (folder / "metrics.json").exists():
                figures(folder, file, args.output)
        sweep.publish(args.output / "study.md", sweep.by_data(rows, tables), failed)


if __name__ == "__main__":
    main()
