"""Does the standard deviation mean something? Variants of LDDU, measured where the answer is known.

    python examples/uncertainty_study.py                                       # synthetic data, exact posterior
    python examples/uncertainty_study.py --data FILE.npz FILE.npz              # also your data
    python examples/uncertainty_study.py --arms default paper --seeds 0 1      # part of it

Every run is a run of `lddu_full.py` with a few options changed (`ARMS`), for several seeds. A finished run is not
repeated, so the command can be stopped and started again, and extended by arms, seeds and files (`sweep.py`). It writes
every run (`runs.json`, `runs.csv`), mean and standard deviation over seeds (`study.md`) and figures of the default arm.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uncertainty_mm import plots
from uncertainty_mm._files import replacing
from uncertainty_mm.data import MultimodalDataset, SyntheticMMER, read_npz
from uncertainty_mm.measures import (
    auroc,
    calibration_error,
    modality_attribution,
    predictive_entropy,
    risk_coverage,
    spearman,
)

try:
    from . import lddu_full
    from .sweep import Row, Run, add_arguments, check_arguments, slug, sweep, table
except ImportError:  # run as a script
    import lddu_full  # type: ignore[no-redef]
    from sweep import Row, Run, add_arguments, check_arguments, slug, sweep, table  # type: ignore[no-redef]

# What an arm changes. Everything else is the default of `lddu_full.py`, but for the size of the model (`SMALL`).
ARMS: dict[str, str] = {
    "default": "",
    "gate: constant": "--gate constant",
    "gate: oracle in training": "--gate oracle",
    "gate: released code": "--gate released",
    "mean weight: uncertainty": "--mean-weight uncertainty",
    "ordinality: raw": "--ordinality raw",
    "ordinality: standardized": "--ordinality standardized",
    "ordinality: none": "--ocl-weight 0",
    "ordinality: pairs SR, DR": "--pairs SR+DR",
    "targets: modality": "--targets modality",
    "targets: pooled": "--targets pooled",
    "targets: sample": "--targets sample",
    "final: residual": "--final residual",
    "combine: concatenation": "--combine concat",
    "size: within": "--size within",
    "embedding: Eq. 4": "--embedding both",
    "embedding: mean only": "--embedding mean",
    "anchors: present": "--anchors present",
    "queue: none": "--queue-size 0",
    "contrastive: none": "--scl-weight 0",
    "prior: none": "--kl-weight 0",
    "std branch: shapes": "--std-branch shapes",
    "prior: none, std branch: shapes": "--kl-weight 0 --std-branch shapes",
    "corruption in training": "--corrupt-modality 0.2",
    "paper": "--embedding both --anchors present --size within --combine concat --targets sample "
    "--ordinality raw --pairs SR+DR --ocl-weight 0.1 --scl-weight 0.8 "
    "--modality-weight 0 --kl-weight 0 --std-branch shapes",
}
SMALL = "--config small --drop-modality 0.2"
PREDICTION = ("miF1", "mAP", "Brier", "ECE before", "ECE", "AURC", "entropy ~ error")
APPLY = argparse.Namespace(accelerator="cpu", batch_size=256)  # how a checkpoint is applied
BY_MODALITY = "corruption AUROC, "  # then the name of the modality
CORRUPTION = 3.0  # standard deviation of the noise that is added, in that of the features


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
            label_names=np.array(["happy", "sad", "anger", "surprise", "disgust", "fear"]),
            **{name: array.numpy() for name, array in arrays.items()},
        )


def corrupted(
    data: MultimodalDataset, modality: str, size: float, seed: int = 0
) -> MultimodalDataset:
    """The same samples with noise added to one modality, `size` times as large as its features."""
    x, valid = data.features[modality], ~data.padding_mask[modality].unsqueeze(2)
    spread = x[valid.squeeze(2)].std(0).clamp_min(1e-3)
    generator = torch.Generator().manual_seed(seed)
    noise = size * spread * torch.randn(x.shape, generator=generator)
    return MultimodalDataset(
        data.features | {modality: x + noise * valid},
        data.padding_mask,
        data.labels,
        data.label_names,
    )


def sizes_of(outputs: Mapping[str, Tensor]) -> Tensor:
    """Size of the standard deviations of every modality, over its labels, (N, M)."""
    return torch.linalg.vector_norm(outputs["std_norm"], dim=2)


def best_of(folder: Path, file: Path) -> tuple[lddu_full.LitLDDU, MultimodalDataset]:
    """The best checkpoint of a run, and the test split."""
    return lddu_full.load(folder / "best.ckpt"), read_npz(file, splits=["test"])["test"]


def measure(folder: Path, file: Path) -> dict[str, float]:
    """What the test split says of the best checkpoint of a run."""
    results = json.loads((folder / "metrics.json").read_text())
    lit, data = best_of(folder, file)
    outputs = lddu_full.apply(lit, data, APPLY)
    probs, sizes, missing = outputs["probs"], sizes_of(outputs), outputs["missing"].bool()
    total = torch.linalg.vector_norm(sizes, dim=1)
    error, entropy = (probs - data.labels).abs().mean(1), predictive_entropy(probs)
    row = {name: results["test"][name] for name in ("miF1", "mAP", "Brier", "ECE")}
    row["ECE before"] = float(calibration_error(outputs["uncalibrated"], data.labels))
    row["AURC"] = float(risk_coverage(error, entropy).aurc)
    row["entropy ~ error"] = float(spearman(entropy, error))
    row["std ~ error"] = float(spearman(total, error))
    row["CV of std"] = float((sizes.std(0) / sizes.mean(0)).mean())
    aurocs, shifts = {}, []
    share = modality_attribution(sizes, missing)
    for index, name in enumerate(data.dims):
        there = ~missing[:, index]
        changed = sizes_of(lddu_full.apply(lit, corrupted(data, name, CORRUPTION), APPLY))
        aurocs[BY_MODALITY + name] = float(auroc(changed[there, index], sizes[there, index]))
        shift = modality_attribution(changed, missing)[there, index] - share[there, index]
        shifts.append(float(shift.mean()))
    row |= {"corruption AUROC": min(aurocs.values()), **aurocs}
    row["attribution shift"] = max(shifts)
    with np.load(file, allow_pickle=False) as arrays:
        test = arrays["split"] == 2
        if "noise" in arrays:
            noise = torch.from_numpy(arrays["noise"][test])
            truth = torch.from_numpy(arrays["posterior_entropy"][test])
            each = [
                float(spearman(size, level)) for size, level in zip(sizes.T, noise.T, strict=True)
            ]
            row["std ~ noise"] = min(each)
            row["entropy ~ truth"] = float(spearman(entropy, truth))
            row["std ~ truth"] = float(spearman(total, truth))
        if "label_shares" in arrays:
            shares = torch.from_numpy(arrays["label_shares"][test].astype(np.float32))
            raters = predictive_entropy(shares.clamp(0, 1))
            row["entropy ~ raters"] = float(spearman(entropy, raters))
            row["std ~ raters"] = float(spearman(total, raters))
    return row


def work(run: Run) -> dict[str, float]:
    """Trains one arm with one seed, and measures it."""
    args = run.args
    options = f"{SMALL} {args.options} --seed {run.seed} --epochs {args.epochs} "
    options += ARMS[run.arm]  # last: what the arm is about holds
    where = ["--accelerator", "cpu", "--data", str(run.file), "--output", str(run.folder)]
    lddu_full.quiet()
    lddu_full.train(lddu_full.parse(["train", *options.split(), *where]))
    return measure(run.folder, run.file)


def report(rows: Sequence[Row]) -> str:
    """Markdown: three tables a data set, of predictions, of uncertainties, and of corrupted modalities."""
    lines = []
    for name in dict.fromkeys(row["data"] for row in rows):
        here = [row for row in rows if row["data"] == name]
        rest = [key for key in here[0] if key not in ("data", "arm", "seed", *PREDICTION)]
        by_modality = [key for key in rest if key.startswith(BY_MODALITY)]
        lines += [f"{name}:", "", *table(here, PREDICTION), ""]
        lines += [*table(here, [key for key in rest if key not in by_modality]), ""]
        lines += [*table(here, by_modality), ""]
    return "\n".join(lines)


def figures(folder: Path, file: Path, output: Path) -> None:
    """Reliability, risk and coverage, and, of synthetic data, the standard deviations against the noise."""
    lit, data = best_of(folder, file)
    outputs = lddu_full.apply(lit, data, APPLY)
    probs, sizes, missing = outputs["probs"], sizes_of(outputs), outputs["missing"].bool()
    names = list(data.dims)
    axes: dict[str, Any] = {
        "reliability": plots.reliability_diagram(probs, data.labels, data.label_names)[0],
        "risk_coverage": plots.risk_coverage(
            (probs - data.labels).abs().mean(1),
            {
                "predictive entropy": predictive_entropy(probs),
                "size of the standard deviations": torch.linalg.vector_norm(sizes, dim=1),
            },
        ),
    }
    levels = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 4.0])
    shares = []
    for level in levels.tolist():
        changed = sizes_of(lddu_full.apply(lit, corrupted(data, names[0], level), APPLY))
        shares.append(modality_attribution(changed, missing).mean(0))
    axes["attribution"] = plots.modality_attribution(levels, torch.stack(shares), names)
    axes["attribution"].set_xlabel(
        f"noise added to {names[0]}, in standard deviations of its features"
    )
    with np.load(file, allow_pickle=False) as arrays:
        if "noise" in arrays:
            noise = arrays["noise"][arrays["split"] == 2]
            axes["noise"] = plots.uncertainty_against_noise(noise, sizes, names)[0]
    for name, ax in axes.items():
        ax = ax if not isinstance(ax, np.ndarray) else ax.flat[0]
        with replacing(output / f"{file.stem}_{name}.png") as partial:
            ax.figure.savefig(partial, dpi=110)


def study(args: argparse.Namespace) -> int:
    """All runs of all data sets; writes tables and figures. Returns how many runs failed."""
    files = list(args.data)
    if not args.no_synthetic:
        files.insert(0, args.output / "synthetic.npz")
        if not files[0].exists():
            synthetic_file(files[0], args.sizes)
    rows, failed = sweep(work, files, args)
    lddu_full.write_text(args.output / "study.md", report(rows))
    for file in files:
        folder = args.output / file.stem / slug("default") / str(args.seeds[0])
        if (folder / "best.ckpt").exists():
            figures(folder, file, args.output)
    return failed


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = lddu_full.Parser(description="Variants of LDDU and what their uncertainty is worth.")
    add_arguments(result, list(ARMS), "runs/uncertainty")
    add = result.add_argument
    add("--no-synthetic", action="store_true", help="leave the synthetic data out")
    add("--sizes", type=int, nargs=3, default=(4000, 1000, 2000), help="of the synthetic splits")
    add("--epochs", type=int, default=10)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    if other := [str(file) for file in args.data if file.suffix != ".npz"]:
        parser().error(f"--data takes .npz files here, got {' '.join(other)}")
    if min(args.sizes) < 1:
        parser().error(f"--sizes must be above 0, got {min(args.sizes)}")
    if not args.no_synthetic and any(file.stem == "synthetic" for file in args.data):
        parser().error("--data must not be named synthetic, as the built-in set is")
    if args.no_synthetic and not args.data:
        parser().error("--no-synthetic leaves nothing without --data")
    with lddu_full.ending_in_one_line():
        check_arguments(parser(), args)
        failed = study(args)
    print((args.output / "study.md").read_text())
    if failed:
        sys.exit(f"{failed} runs failed")


if __name__ == "__main__":
    main()
