"""Figures of the paper, drawn from runs of `lddu_full.py`.

    python examples/lddu_figures.py RUN                  # the folder of a run
    python examples/lddu_figures.py RUN RUN_WITHOUT_SCL  # second run: trained with --model.scl_weight 0
    python examples/lddu_figures.py RUN --sample 17      # another sample for the case study
    python examples/lddu_figures.py RUN --data FILE      # other data than those of the run, or where they are now
    python examples/lddu_figures.py RUN --beside TAILOR_RUN CARAT_RUN  # correlations of other models, too

The best checkpoint of a run is applied to the test split. Huang et al. 2025, arXiv 2502.13954, have such figures:

- `tsne.png` (Fig. 4): the latent distributions of the labels that are present, by t-SNE, with and without the
  contrastive loss.
- `case.png` (Fig. 5): one sample; its probabilities and how sure the first prediction is of them, what every label
  attends to, and how much every modality counts.
- `correlations.png` (Fig. 5 too): how labels go together, in the data and in the predictions, also of other models,
  such as the runs of `baselines`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from sklearn.metrics import silhouette_score
from torch import Tensor

from uncertainty_mm import plots
from uncertainty_mm._files import replacing
from uncertainty_mm.data import MultimodalDataset
from uncertainty_mm.examples.lddu_full import LDDU, Output
from uncertainty_mm.examples.sweep import data_of
from uncertainty_mm.functional import expected_distance
from uncertainty_mm.lightning import UsageError
from uncertainty_mm.lightning.cli import Parser, check_fits, one_line_errors
from uncertainty_mm.metrics.functional import modality_attribution, predictive_entropy

TSNE_SAMPLES = 250  # t-SNE then takes seconds
PRESENT, ABSENT, ACCENT = plots.COLORS[0], "0.75", plots.COLORS[1]


def explain(model: LDDU, data: MultimodalDataset) -> tuple[Output, dict[str, Tensor]]:
    """What the model says of a few samples, and its attention weights (B, Q, S_m) by modality."""
    batch = next(iter(data.loader(len(data))))
    with torch.no_grad():
        output = model.eval()(batch.features, batch.padding_mask)
        encoded = {
            name: encoder(batch.features[name], batch.padding_mask[name])
            for name, encoder in model.encoder.items()
        }
        _, weights = model.attention(encoded, batch.padding_mask, need_weights=True)
    return output, weights


def known(data: MultimodalDataset) -> Tensor:
    """(N, Q), True where a label is known."""
    return torch.ones_like(data.labels).bool() if data.unknown is None else ~data.unknown


# --- Fig. 4 ----------------------------------------------------------------------------------------------------------


def tsne(models: Sequence[LDDU], data: MultimodalDataset) -> Figure:
    """The Gaussians of the labels that are present, one panel a run, for the same samples.

    Drawn is what the contrastive loss compares (Eq. 4, as the first run has it). The title has the silhouette
    (Rousseeuw 1987, doi 10.1016/0377-0427(87)90125-7) of the classes that the loss pulls together, a modality and a
    label each, in the space of Eq. 4, not in the plane: 1 for tight clusters far apart, 0 or less for none.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    few = data.select(order[:TSNE_SAMPLES])
    figure = Figure(figsize=(1.6 + 4 * len(models), 4.2), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        output, _ = explain(model, few)
        embedding = output.latent.embedding(models[0].contrastive.embedding)
        present = (few.labels > 0) & known(few)
        shown = present.unsqueeze(1) & ~output.missing.unsqueeze(2)  # (B, M, Q)
        if shown.sum() < 3:
            raise UsageError(
                f"t-SNE needs at least 3 distributions of labels that are present, got {shown.sum()}"
            )
        plots.latent_tsne(embedding, few.label_names, list(few.dims), shown=shown, ax=panel)
        _, modality, label = shown.nonzero(as_tuple=True)
        classes = modality * len(few.label_names) + label
        silhouette = math.nan  # unless there are classes of several points
        if 1 < len(classes.unique()) < len(classes):
            silhouette = silhouette_score(embedding[shown].numpy(), classes.numpy())
        weight = model.hparams["scl_weight"]
        loss = r"$\mathcal{L}_{scl}$"
        title = f"with {loss}, weight {weight:g}" if weight else f"without {loss}"
        panel.set_title(f"{title} (silhouette {silhouette:.2f})", fontsize="medium")
    for panel in panels[:-1]:
        panel.get_legend().remove()  # that of the last panel is for all
    return figure


# --- Fig. 5 ----------------------------------------------------------------------------------------------------------


def position_of(sample: str, data: MultimodalDataset) -> int:
    """Position of a sample that is given by its name or by its position."""
    if data.ids is not None and sample in data.ids:
        return data.ids.index(sample)
    if sample.isdecimal() and int(sample) < len(data):
        return int(sample)
    raise UsageError(
        f"--sample {sample}: neither the name of a test sample nor a position, 0 to {len(data) - 1}"
    )


def interesting(
    probs: Tensor, threshold: Tensor, missing: Tensor, labels: Tensor, known: Tensor
) -> int:
    """The most uncertain sample of those with several labels, all known and predicted, and all modalities.

    Where none is like that, the most uncertain of all.
    """
    right = (((probs > threshold) == (labels > 0)) & known).all(1)
    wanted = right & (labels.sum(1) > 1) & ~missing.any(1)
    left_out = ~wanted if wanted.any() else torch.zeros_like(wanted)
    return int(predictive_entropy(probs).masked_fill(left_out, -1).argmax())


def case(
    model: LDDU,
    data: MultimodalDataset,
    outputs: Mapping[str, Tensor],
    position: int,
) -> Figure:
    """One sample: probabilities, D of the first prediction, modality attribution, attention.

    Args:
        model: The model.
        data: The split.
        outputs: Those of `model.predict` for the split.
        position: Of the sample in the split.
    """
    sample = data.select([position])
    output, weights = explain(model, sample)
    names, rows = data.label_names, len(data.label_names)
    figure = Figure(figsize=(max(9.5, 3.2 * len(weights)), 3.4 + 0.5 * rows), layout="constrained")
    above, below = figure.subfigures(2, 1)
    name = position if data.ids is None else data.ids[position]
    there = (sample.labels[0] > 0) & known(sample)[0]
    present = [label for label, y in zip(names, there.tolist(), strict=True) if y]
    figure.suptitle(f"sample {name}: {', '.join(present) or 'no label'}")

    bars, dots, shares = above.subplots(1, 3, width_ratios=(3, 1.8, 2.4))
    first = output.dir_logits[0].sigmoid()
    draw_probs(bars, outputs["probs"][position], first, model.threshold, there, names)
    certainty = 1 - expected_distance(first)
    dots.hlines(range(rows), 0.5, certainty, color=ABSENT)
    dots.plot(certainty, range(rows), "o", color=ACCENT)
    dots.set(xlim=(0.48, 1.02), ylim=bars.get_ylim(), xlabel="D of the first prediction")
    dots.set_xticks([0.5, 0.75, 1])
    dots.set_yticks(range(rows), [])

    sizes = torch.linalg.vector_norm(outputs["std_norm"], dim=2)
    draw_shares(shares, sizes, outputs["missing"], position, list(data.dims))

    maps = below.subplots(1, len(weights), squeeze=False)[0]
    for index, (panel, modality) in enumerate(zip(maps, weights, strict=True)):
        valid = ~sample.padding_mask[modality][0]
        panel.set_title(f"attention to {modality}", fontsize="medium")
        if valid.any():
            plots.attention_map(weights[modality][0, :, valid], names, ax=panel)
        else:
            panel.set_axis_off()
            panel.text(0.5, 0.5, "missing", ha="center", transform=panel.transAxes)
        if index and maps[0].axison:
            panel.tick_params(labelleft=False)
    return figure


def draw_probs(
    ax: Axes, probs: Tensor, first: Tensor, threshold: Tensor, labels: Tensor, names: Sequence[str]
) -> None:
    """Bars of the final probabilities, dark where the label is present."""
    rows = torch.arange(len(names))
    ax.barh(rows, probs, 0.7, color=[PRESENT if y else ABSENT for y in labels.tolist()])
    (diamonds,) = ax.plot(
        first,
        rows,
        "D",
        color=ACCENT,
        markersize=5,
        zorder=3,
        clip_on=False,
        label="first prediction",
    )
    lines = ax.vlines(
        threshold.expand(len(names)),
        rows - 0.5,
        rows + 0.5,
        color="black",
        linestyle="--",
        label="threshold",
    )
    ax.set(xlim=(0, 1), xlabel="probability")
    ax.set_yticks(rows, names)
    ax.invert_yaxis()
    patches = [Patch(color=PRESENT, label="present"), Patch(color=ABSENT, label="absent")]
    ax.legend(
        handles=[*patches, lines, diamonds],
        fontsize="small",
        ncols=2,
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )


def draw_shares(
    ax: Axes, sizes: Tensor, missing: Tensor, position: int, names: Sequence[str]
) -> None:
    """Bars of the shares of the modalities in one sample, with their means over all that have the same modalities."""
    shares = modality_attribution(sizes, missing)
    rows = torch.arange(len(names))
    alike = (missing == missing[position]).all(1)
    mean = shares[alike].mean(0)
    ax.barh(rows, shares[position], 0.6, color=PRESENT)
    ax.vlines(
        mean,
        rows - 0.4,
        rows + 0.4,
        color="black",
        label="mean of the samples with the same modalities",
    )
    ax.set(xlim=(0, 1), xlabel="share of the modality")
    ax.set_yticks(rows, names)
    ax.invert_yaxis()
    ax.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1))


# --- Correlations ----------------------------------------------------------------------------------------------------


def correlations(
    probs: Tensor,
    threshold: Tensor,
    data: MultimodalDataset,
    others: Mapping[str, Tensor] | None = None,
) -> Figure:
    """Correlations of the labels and of the decisions, with their cosine similarity.

    With the decisions (N, Q) of other models by name, how far each model is from the labels instead.
    """
    decisions: Any = (probs > threshold).float()
    if others:
        decisions = {"LDDU": decisions, **others}
    axes = plots.label_correlation(data.labels, decisions, data.label_names, unknown=data.unknown)
    figure: Figure = axes[0].figure
    return figure


def decisions_of(run: Path, data: MultimodalDataset) -> Tensor:
    """What the run of any model has decided of the same test samples, (N, Q)."""
    path = run / "predictions.npz"
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    with np.load(path) as file:
        labels = torch.from_numpy(file["labels"])
        if labels.shape != data.labels.shape or (labels != data.labels)[known(data)].any():
            raise UsageError(f"{path}: not of these test samples and labels")
        return torch.from_numpy(file["probs"] > file["threshold"]).float()


# --- Command line ----------------------------------------------------------------------------------------------------


def draw(args: argparse.Namespace) -> None:
    """Writes all figures."""
    models = [LDDU.load(run / "best.ckpt") for run in args.runs]
    changes = {} if args.data is None else {"path": args.data, "format": "auto", "labels": None}
    source, model = data_of(args.runs[0], **changes), models[0]
    for each in models:
        check_fits(source, each.hparams)
    data = source.part("test")
    if min(data.labels.shape) < 2:
        raise UsageError(
            f"{source.name}: the figures need at least two test samples and two labels"
        )
    position = None if args.sample is None else position_of(args.sample, data)
    outputs = model.predict(data)
    if position is None:
        position = interesting(
            outputs["probs"], model.threshold, outputs["missing"], data.labels, known(data)
        )
    others = {"/".join(run.resolve().parts[-2:]): decisions_of(run, data) for run in args.beside}
    figures = {
        "tsne": tsne(models, data),
        "case": case(model, data, outputs, position),
        "correlations": correlations(outputs["probs"], model.threshold, data, others),
    }
    folder = args.output or args.runs[0] / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        with replacing(folder / f"{name}.png") as partial:
            figure.savefig(partial, dpi=110, bbox_inches="tight")  # titles of many panels, too
    names = ", ".join(f"{name}.png" for name in figures)
    print(f"{folder}/: {names}; case: test sample {position}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        parser = Parser(description="Figures of the paper, from runs of lddu_full.py.")
        add = parser.add_argument
        add("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run; others for t-SNE")
        add("--data", type=Path, help="file or folder (default: the data of the run)")
        add("--sample", help="name or position of the test sample of the case study (see docs)")
        beside = (
            "folders MODEL/SEED of runs of other models, whose label correlations are drawn, too"
        )
        add("--beside", type=Path, nargs="*", default=[], metavar="RUN", help=beside)
        add("--output", type=Path, help="folder (default: RUN/figures)")
        draw(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
