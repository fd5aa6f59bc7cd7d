"""Figures of calibration and uncertainty. They need matplotlib, which the extra `plots` installs.

Every function takes tensors or arrays, draws into `ax`, or into a new figure if `ax` is None, and returns the Axes, or
an array of them. Nothing global is changed, and nothing is shown; `ax.figure.savefig(path)` writes the figure. The
colours are those of Okabe and Ito, which colour-blind readers can distinguish.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator
from sklearn.manifold import TSNE
from torch import Tensor

from uncertainty_mm._checks import (
    check_finite,
    check_positive,
    check_positive_int,
    check_range,
    check_tensor,
)
from uncertainty_mm.metrics import functional
from uncertainty_mm.metrics._binning import equal_mass, equal_width, histogram
from uncertainty_mm.metrics._inputs import check_predictions, predictions

__all__ = [
    "attention_map",
    "label_correlation",
    "latent_tsne",
    "modality_attribution",
    "reliability_diagram",
    "risk_coverage",
    "training_curves",
    "uncertainty_against_noise",
]

Array = Tensor | npt.ArrayLike
AxesArray = npt.NDArray[np.object_]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
GREY = "0.45"
COLUMNS = 3  # of panels in a figure
GROUPS = 12  # of samples in a running median


def reliability_diagram(
    probs: Array,
    labels: Array,
    label_names: Sequence[str] | None = None,
    n_bins: int = 10,
    *,
    unknown: Array | None = None,
    ax: Sequence[Axes] | AxesArray | None = None,
) -> AxesArray:
    """Plots how often a label is present where it is predicted with probability p, in one panel per label.

    Points are bins of equal width, at the mean probability and the share of positives of their samples, with the 95 %
    interval of Wilson 1927. The bars above count the samples of the bins. The title shows the expected calibration
    error over the same bins (:func:`~uncertainty_mm.metrics.functional.calibration_error`).

    Args:
        probs: (N, Q) probabilities in [0, 1].
        labels: (N, Q) of 0 and 1.
        label_names: Q names, for the titles.
        n_bins: Number of bins.
        unknown: (N, Q) bool, True where a label is not known. Values there are not drawn.
        ax: Q Axes to draw into.

    Returns:
        Array (Q,) of Axes.

    Raises:
        ValueError: If shapes disagree, values are out of range, or there is no sample.
        TypeError: If a type is wrong.

    Example:
        >>> from uncertainty_mm import plots
        >>> probs = torch.tensor([[0.2, 0.9], [0.4, 0.6]])
        >>> labels = torch.tensor([[0, 1], [1, 1]])
        >>> axes = plots.reliability_diagram(probs, labels, ["sad", "happy"])
        >>> axes[1].get_title()
        'happy (ECE 0.250)'
        >>> axes[0].figure.savefig("reliability.png")  # doctest: +SKIP
    """
    p, y = _tensor("probs", probs).double(), _tensor("labels", labels)
    out = None if unknown is None else _tensor("unknown", unknown)
    check_predictions(p, y, out, validate_args=True)
    check_positive_int("n_bins", n_bins)
    _check_samples("probs", p)
    names = _names("label_names", label_names, p.shape[1], "label")
    axes = _panels(ax, p.shape[1], height=3.0)
    errors = functional.calibration_error(p, y, out, n_bins=n_bins, average="none")
    known = predictions(p, y, out)
    sums = histogram(*known, equal_width(known[0], n_bins), n_bins)[:3].numpy()
    for panel, name, error, (count, positives, expected) in zip(
        axes, names, errors.tolist(), sums.swapaxes(0, 1), strict=True
    ):
        filled = count > 0
        n = count[filled]
        rate = positives[filled] / n
        low, high = _wilson(rate, n)
        panel.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
        panel.errorbar(
            expected[filled] / n,
            rate,
            np.clip([rate - low, high - rate], 0, None),
            color=COLORS[0],
            marker="o",
            markersize=4,
            linewidth=1.2,
            elinewidth=1,
            label="observed, 95 %",
            clip_on=False,
        )
        panel.set(xlim=(0, 1), ylim=(0, 1))
        panel.set(xlabel="predicted probability", ylabel="share present")
        panel.set_title(f"{name} (ECE {error:.3f})", fontsize="medium", y=1.2)
        panel.set(xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))
        _draw_counts(panel.inset_axes((0, 1.02, 1, 0.18)), count)
    if ax is None:
        _label_outer(axes)
    axes[0].legend(fontsize="x-small", loc="upper left")
    return axes


def _draw_counts(ax: Axes, count: npt.NDArray[Any]) -> None:
    """Draws a bar for the number of samples in every bin, with the number on it."""
    bins = len(count)
    middle = (np.arange(bins) + 0.5) / bins
    ax.bar(middle, count, 0.9 / bins, color="0.8")
    ax.set(xlim=(0, 1), ylim=(0, max(count.max(), 1)))  # all counts may be 0
    ax.set_axis_off()
    if bins <= 15:
        for x, number in zip(middle, count.astype(int), strict=True):
            ax.text(x, 0, f" {number}", ha="center", va="bottom", rotation=90, fontsize="xx-small")


def risk_coverage(
    uncertainty: Array | Mapping[str, Array],
    errors: Array,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Plots the mean error of the most certain samples against their share of all samples.

    The grey lines show the best order of the same errors and a random one. See
    :func:`~uncertainty_mm.metrics.functional.risk_coverage`.

    Args:
        uncertainty: (N,) uncertainties, or several by name.
        errors: (N,) errors, 0 and 1 or graded.
        ax: Axes to draw into.

    Returns:
        The Axes.

    Raises:
        ValueError: If shapes disagree, a value is not finite, or there is no sample.
        TypeError: If a type is wrong.

    Example:
        >>> from uncertainty_mm import plots
        >>> scores = {"entropy": [0.2, 0.5, 0.9], "constant": [1, 1, 1]}
        >>> ax = plots.risk_coverage(scores, [0, 1, 1])
        >>> [line.get_label() for line in ax.lines][:2]
        ['entropy (AURC 0.389)', 'constant (AURC 0.667)']
    """
    named = uncertainty if isinstance(uncertainty, Mapping) else {"uncertainty": uncertainty}
    if not named:
        raise ValueError("Expected `uncertainty` to name at least one uncertainty, but got none")
    error = _tensor("errors", errors)
    scores = {name: _tensor(f"uncertainty[{name!r}]", value) for name, value in named.items()}
    curves = {name: functional.risk_coverage(score, error) for name, score in scores.items()}
    _check_samples("errors", error)
    best = functional.risk_coverage(error, error)
    ax = _figure(5, 3.6).subplots() if ax is None else _one(ax)
    for index, (name, curve) in enumerate(curves.items()):
        ax.plot(
            curve.coverage.numpy(),
            curve.risk.numpy(),
            **_line(index),
            label=f"{name} (AURC {curve.aurc:.3f})",
        )
    coverage = best.coverage.numpy()
    ax.plot(
        coverage,
        best.risk.numpy(),
        color=GREY,
        linestyle=":",
        label=f"best order ({best.aurc:.3f})",
    )
    mean = float(best.risk[-1])
    ax.axhline(mean, color=GREY, linewidth=1, linestyle="--", label=f"random order ({mean:.3f})")
    ax.set(xlabel="coverage (most certain first)", ylabel="risk (mean error)", xlim=(0, 1))
    ax.set_ylim(bottom=min(0.0, float(best.risk.min())))
    ax.legend(fontsize="small")
    return ax


def uncertainty_against_noise(
    noise: Array,
    std_norm: Array,
    modality_names: Sequence[str] | None = None,
    *,
    missing: Array | None = None,
    ax: Sequence[Axes] | AxesArray | None = None,
) -> AxesArray:
    """Plots the size of the uncertainty, on a log axis, against the noise in the input, in one panel per modality.

    Points are samples; more than 3000 are counted in hexagons, which are darker for more samples. The line is a running
    median over the samples of each noise level if there are up to 12 levels, otherwise over 12 groups of equal size.
    The title shows Spearman's rank correlation, nan if either is constant.

    Args:
        noise: (N, M) level of the noise in every modality.
        std_norm: (N, M) size of the uncertainty, above 0: the norm of the standard deviations.
        modality_names: M names, for the titles.
        missing: (N, M) bool, True where a modality is missing. Values there are not drawn.
        ax: M Axes to draw into.

    Returns:
        Array (M,) of Axes.

    Raises:
        ValueError: If shapes disagree, a value is not finite, an uncertainty is not above 0, or there is no sample.
        TypeError: If a type is wrong.

    Example:
        >>> from uncertainty_mm import plots
        >>> noise = torch.tensor([[0.0], [1.0], [2.0]])
        >>> axes = plots.uncertainty_against_noise(noise, noise.exp(), ["audio"])
        >>> axes[0].get_title()
        'audio (Spearman 1.00)'
    """
    x, y = _tensor("noise", noise).double(), _tensor("std_norm", std_norm).double()
    sizes: dict[str, int] = {}
    check_tensor("noise", x, "floating", "N M", sizes)
    check_tensor("std_norm", y, "floating", "N M", sizes)
    out = torch.zeros_like(x, dtype=torch.bool) if missing is None else _tensor("missing", missing)
    check_tensor("missing", out, "bool", "N M", sizes)
    check_finite("noise", x, out)
    check_finite("std_norm", y, out)
    _check_samples("noise", x)
    if (y[~out] <= 0).any():
        raise ValueError(f"Expected `std_norm` to be above 0, but got {y[~out].min().item()}")
    names = _names("modality_names", modality_names, x.shape[1], "modality")
    axes = _panels(ax, x.shape[1], height=2.6)
    for index, (panel, name) in enumerate(zip(axes, names, strict=True)):
        a, b = x[~out[:, index], index], y[~out[:, index], index]
        panel.set_yscale("log")
        if len(a) > 3000 and len(a.unique()) > GROUPS:
            panel.hexbin(
                a.numpy(), b.numpy(), yscale="log", gridsize=30, mincnt=1, cmap="Greys", bins="log"
            )
        else:
            panel.scatter(a.numpy(), b.numpy(), s=8, color="0.6", linewidths=0, alpha=0.6)
        middle, median = _running_median(a, b)
        panel.plot(middle, median, color=COLORS[1], marker="o", markersize=4, label="median")
        panel.set_title(f"{name} (Spearman {functional.spearman(a, b):.2f})", fontsize="medium")
        panel.set(xlabel="noise level", ylabel="norm of standard deviation")
        panel.yaxis.set_major_formatter(LogFormatter())
        panel.yaxis.set_minor_formatter(LogFormatter())
    if ax is None:
        _label_outer(axes)
    axes[0].legend(fontsize="small")
    return axes


def modality_attribution(
    levels: Array,
    shares: Array,
    modality_names: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Plots the share of every modality against the level of a corruption.

    Args:
        levels: (L,) levels of the corruption.
        shares: (L, M) shares in [0, 1], with a sum of at most 1 in each row, such as the mean of
            :func:`~uncertainty_mm.metrics.functional.modality_attribution` over samples with the same modalities.
        modality_names: M names, for the legend.
        ax: Axes to draw into.

    Returns:
        The Axes.

    Raises:
        ValueError: If shapes disagree, a level is not finite, a share is out of range, or a row adds up to more than 1,
            as means over different samples for each modality may.
        TypeError: If a type is wrong.

    Example:
        >>> from uncertainty_mm import plots
        >>> shares = [[0.6, 0.4], [0.2, 0.8]]
        >>> ax = plots.modality_attribution([0.0, 1.0], shares, ["text", "audio"])
        >>> ax.set_xlabel("standard deviation of the noise in text")  # doctest: +SKIP
    """
    x, y = _tensor("levels", levels).double(), _tensor("shares", shares).double()
    sizes: dict[str, int] = {}
    check_tensor("levels", x, "floating", "L", sizes)
    check_tensor("shares", y, "floating", "L M", sizes)
    check_finite("levels", x)
    check_range("shares", y, 0, 1)
    if (y.sum(1) > 1.01).any():  # beyond the rounding of half precision
        raise ValueError(
            f"Expected `shares` to add up to at most 1 in every row, but got {y.sum(1).max():.2f}; "
            "take their mean over samples that have the same modalities"
        )
    names = _names("modality_names", modality_names, y.shape[1], "modality")
    ax = _figure(5, 3.6).subplots() if ax is None else _one(ax)
    for index, name in enumerate(names):
        marker = MARKERS[index % len(MARKERS)]
        ax.plot(x.numpy(), y[:, index].numpy(), **_line(index), marker=marker, label=name)
    ax.set(xlabel="level of corruption", ylabel="share of modality", ylim=(0, 1))
    ax.legend(fontsize="small")
    return ax


def latent_tsne(
    embeddings: Array,
    label_names: Sequence[str] | None = None,
    modality_names: Sequence[str] | None = None,
    *,
    shown: Array | None = None,
    perplexity: float = 30.0,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Plots the latent distributions in the plane by t-SNE, with a colour per label and a marker per modality.

    It is like Fig. 4 of Huang et al. 2025, arXiv 2502.13954. From the ninth label on, the colours repeat with open
    markers. With M Q points per sample, a few hundred samples are enough and take seconds. In t-SNE, distances between
    clusters and their sizes have no meaning.

    Args:
        embeddings: (B, M, Q, E): `latent.mean`, or `latent.embedding()`, which the contrastive loss compares.
        label_names: Q names, for the legend.
        modality_names: M names, for the legend.
        shown: (B, M, Q) bool, True for the points to embed and draw, at least 3; for example where the label is present
            and the modality not missing. None takes all.
        perplexity: Effective number of neighbours, limited to a third of the points.
        seed: Seed of the random numbers of t-SNE.
        ax: Axes to draw into.

    Returns:
        The Axes.

    Raises:
        ValueError: If shapes disagree, a value is not finite, or there are fewer than 3 points.
        TypeError: If a type is wrong.

    Example:
        >>> from uncertainty_mm import plots
        >>> means = torch.randn(4, 2, 3, 8)  # 4 samples, 2 modalities, 3 labels
        >>> ax = plots.latent_tsne(means, ["sad", "happy", "angry"], ["text", "audio"])
        >>> sum(len(points.get_offsets()) for points in ax.collections)
        24
    """
    points = _tensor("embeddings", embeddings).double()
    sizes: dict[str, int] = {}
    check_tensor("embeddings", points, "floating", "B M Q E", sizes)
    modalities, labels = points.shape[1:3]
    kept = torch.ones(points.shape[:3], dtype=torch.bool, device=points.device)
    if shown is not None:
        kept = check_tensor("shown", _tensor("shown", shown), "bool", "B M Q", sizes)
    points = points[kept]
    check_finite("embeddings", points)
    if len(points) < 3:
        raise ValueError(f"Expected `embeddings` to show at least 3 points, but got {len(points)}")
    check_positive("perplexity", perplexity)
    label_list = _names("label_names", label_names, labels, "label")
    modality_list = _names("modality_names", modality_names, modalities, "modality")
    perplexity = min(perplexity, (len(points) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, random_state=seed)
    plane = tsne.fit_transform(points.numpy())
    _, modality, label = (index.numpy() for index in kept.nonzero(as_tuple=True))
    ax = _figure(6.4, 4.4).subplots() if ax is None else _one(ax)
    for m in range(modalities):
        for q in range(labels):
            x, y = plane[(modality == m) & (label == q)].T
            color, marker = COLORS[q % len(COLORS)], MARKERS[m % len(MARKERS)]
            style: dict[str, Any] = {"color": color, "linewidths": 0}
            if q >= len(COLORS):
                style = {"facecolors": "none", "edgecolors": color, "linewidths": 1}
            ax.scatter(x, y, s=14, marker=marker, alpha=0.7, **style)
    ax.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    handles = [
        *(
            _key(COLORS[q % len(COLORS)], "o", name, q < len(COLORS))
            for q, name in enumerate(label_list)
        ),
        *(_key(GREY, MARKERS[m % len(MARKERS)], name) for m, name in enumerate(modality_list)),
    ]
    ax.legend(handles=handles, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax


def attention_map(
    weights: Array, label_names: Sequence[str] | None = None, *, ax: Axes | None = None
) -> Axes:
    """Plots a heat map of the steps of a sequence that every label attends to.

    Args:
        weights: (Q, S) attention weights of one sample and modality, in [0, 1]:
            `attention(..., need_weights=True)[1]["text"][0]`.
        label_names: Q names, for the rows.
        ax: Axes to draw into.

    Returns:
        The Axes.

    Raises:
        ValueError: If the shape is wrong or a weight is out of range.
        TypeError: If a type is wrong.

    Example:
        >>> from uncertainty_mm import plots
        >>> ax = plots.attention_map([[0.1, 0.9], [0.5, 0.5]], ["sad", "happy"])
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['sad', 'happy']
    """
    w = _tensor("weights", weights).double()
    check_tensor("weights", w, "floating", "Q S", {})
    check_range("weights", w, 0, 1)
    _check_samples("weights", w)
    names = _names("label_names", label_names, w.shape[0], "label")
    ax = _figure(7, 1.2 + 0.3 * len(names)).subplots() if ax is None else _one(ax)
    image = ax.imshow(w.numpy(), aspect="auto", vmin=0, cmap="viridis", interpolation="nearest")
    ax.set_yticks(range(len(names)), names)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    ax.set(xlabel="step of the sequence")
    ax.figure.colorbar(image, ax=ax, label="weight")
    return ax


def label_correlation(
    labels: Array,
    probs: Array | Mapping[str, Array],
    label_names: Sequence[str] | None = None,
    *,
    unknown: Array | None = None,
    ax: Sequence[Axes] | AxesArray | None = None,
) -> AxesArray:
    """Plots the correlations between true labels, and those between predicted labels.

    The title shows the cosine similarity of both matrices without their diagonals, which are always 1; with several
    models, each shows its mean absolute difference from the truth there. Correlations with a constant label are
    undefined; they are drawn in grey and left out.

    Args:
        labels: (N, Q) of 0 and 1.
        probs: (N, Q) predictions in [0, 1], probabilities or decisions; or those of several models by name.
        label_names: Q names.
        unknown: (N, Q) bool, True where a label is not known. Each correlation is over the samples in which both labels
            are known.
        ax: Two Axes to draw into, or one more than there are models.

    Returns:
        Array (2,) of Axes: true, predicted; (1 + models,) of several.

    Raises:
        ValueError: If shapes disagree, values are out of range, or there are fewer than two labels or samples.
        TypeError: If a type is wrong.

    Example:
        >>> from uncertainty_mm import plots
        >>> labels = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 1]])
        >>> axes = plots.label_correlation(labels, 0.1 + 0.8 * labels, ["sad", "happy"])
        >>> axes[1].get_title()
        'predicted (cosine similarity 1.00)'
    """
    several = probs if isinstance(probs, Mapping) else {"predicted": probs}
    if not several:
        raise ValueError("Expected `probs` to hold the predictions of a model, but got {}")
    y = _tensor("labels", labels).double()
    out = None if unknown is None else _tensor("unknown", unknown)
    drawn: list[tuple[str, npt.NDArray[Any]]] = []
    for name, given in several.items():
        p = _tensor("probs", given).double()
        check_predictions(p, y, out, validate_args=True)
        if min(p.shape) < 2:
            raise ValueError(f"Expected `probs` to be at least (2, 2), but got {tuple(p.shape)}")
        p, present, known = predictions(p, y, out)
        true, predicted = _correlation(present.double(), known), _correlation(p, known)
        used = ~np.eye(len(true), dtype=bool) & np.isfinite(true) & np.isfinite(predicted)
        a, b = true[used], predicted[used]
        if several is probs:
            apart = float(np.abs(a - b).mean()) if used.any() else float("nan")
            title = f"{name} (mean difference {apart:.3f})"
        else:
            norm = np.linalg.norm(a) * np.linalg.norm(b)
            cosine = float(a @ b / norm) if norm > 0 else float("nan")
            title = f"{name} (cosine similarity {cosine:.2f})"
        drawn.append((title, predicted))
    drawn.insert(0, ("true", true))
    names = _names("label_names", label_names, len(true), "label")
    if ax is None:
        side, count = max(3.0, 1.6 + 0.42 * len(names)), len(drawn)
        axes = np.array(_figure(count * side + 0.6, side).subplots(1, count, sharey=True))
    else:
        axes = _given(ax, len(drawn))
    for panel, (title, matrix) in zip(axes, drawn, strict=True):
        panel.set_facecolor("0.8")
        image = panel.imshow(np.ma.masked_invalid(matrix), vmin=-1, vmax=1, cmap="RdBu_r")
        panel.set_xticks(range(len(names)), names, rotation=45, ha="right")
        panel.set_yticks(range(len(names)), names)
        panel.set_title(title, fontsize="medium")
        if len(names) <= 8:
            for (row, column), value in np.ndenumerate(matrix):
                if np.isfinite(value):
                    color = "white" if abs(value) > 0.6 else "black"
                    text = f"{value:.2f}".replace("-0.00", "0.00")
                    panel.text(
                        column, row, text, ha="center", va="center", fontsize="x-small", color=color
                    )
    axes[0].figure.colorbar(image, ax=list(axes), label="correlation", shrink=0.8)
    return axes


def training_curves(
    rows: Sequence[Mapping[str, float]],
    panels: Sequence[Sequence[str]] = (("loss/cls", "loss/dir", "val/nll"), ("val/miF1",)),
    *,
    ax: Sequence[Axes] | AxesArray | None = None,
) -> AxesArray:
    """Plots logged quantities over the epochs, several in a panel.

    Args:
        rows: Logged values by name, one mapping per epoch with its number under `"epoch"` (the first is 0), such as
            the rows of :class:`~uncertainty_mm.lightning.History`.
        panels: Names of the quantities of every panel; quantities that were never logged are left out.
        ax: Axes to draw into, one per panel.

    Returns:
        Array of Axes.

    Raises:
        ValueError: If there is no row or no panel, or a row lacks its epoch.

    Example:
        >>> from uncertainty_mm import plots
        >>> rows = [{"epoch": 0, "val/miF1": 0.5}, {"epoch": 1, "val/miF1": 0.7}]
        >>> (axes,) = plots.training_curves(rows, [["val/miF1"]])
        >>> axes.lines[0].get_xydata().tolist()
        [[1.0, 0.5], [2.0, 0.7]]
    """
    if not rows or not panels:
        raise ValueError(
            f"Expected `rows` and `panels` to hold something, but got {len(rows)} and {len(panels)}"
        )
    if not all("epoch" in row for row in rows):
        raise ValueError("Expected every row of `rows` to have `epoch`, but got one without")
    axes = _panels(ax, len(panels), height=3.0)
    for panel, names in zip(axes, panels, strict=True):
        for index, name in enumerate(names):
            points = [(row["epoch"] + 1, row[name]) for row in rows if name in row]
            if points:
                panel.plot(*zip(*points, strict=True), label=name, **_line(index))
        panel.set(xlabel="epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend(fontsize="x-small")
    return axes


def _tensor(name: str, value: Array) -> Tensor:
    if isinstance(value, Tensor):
        if value.is_complex():
            raise TypeError(f"Expected `{name}` to hold numbers, but got {value.dtype}")
        return value.detach().cpu()
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        return torch.stack([_tensor(name, each) for each in value])
    try:
        array = np.array(value)
    except ValueError as error:
        raise ValueError(f"Expected `{name}` to be an array, but got {value!r}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"Expected `{name}` to hold numbers, but got {type(value).__name__}")
    return torch.from_numpy(array)


def _names(argument: str, names: Sequence[str] | None, count: int, kind: str) -> list[str]:
    if names is None:
        return [f"{kind} {index}" for index in range(count)]
    if not isinstance(names, Collection):
        raise TypeError(f"Expected `{argument}` to hold names, but got {names!r}")
    if isinstance(names, str) or len(names) != count:
        raise ValueError(f"Expected `{argument}` to hold {count} names, but got {names!r}")
    return list(names)


def _check_samples(name: str, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        raise ValueError(f"Expected `{name}` to hold samples, but got shape {tuple(tensor.shape)}")


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _panels(ax: Sequence[Axes] | AxesArray | None, count: int, height: float) -> AxesArray:
    """The given Axes, or new ones in rows of at most three."""
    if ax is not None:
        return _given(ax, count)
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = _figure(0.6 + 2.5 * columns, 0.4 + height * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for unused in grid[count:]:
        unused.remove()
    return np.array(grid[:count])


def _label_outer(axes: AxesArray) -> None:
    """Shows labels only at the lowest panel of each column and the first panel of each row."""
    columns = min(len(axes), COLUMNS)
    for index, panel in enumerate(axes):
        lowest, first = index + columns >= len(axes), index % columns == 0
        panel.tick_params(which="both", labelbottom=lowest, labelleft=first)
        panel.xaxis.label.set_visible(lowest)
        panel.yaxis.label.set_visible(first)


def _given(ax: Sequence[Axes] | AxesArray, count: int) -> AxesArray:
    axes = np.array(ax, dtype=object).ravel()
    if len(axes) != count or not all(isinstance(each, Axes) for each in axes):
        raise ValueError(f"Expected `ax` to hold {count} Axes, but got {ax!r}")
    return axes


def _one(ax: Axes) -> Axes:
    if not isinstance(ax, Axes):
        raise TypeError(f"Expected `ax` to be an Axes, but got {ax!r}")
    return ax


def _line(index: int) -> dict[str, Any]:
    styles = ("-", "--", "-.", ":")
    return {"color": COLORS[index % len(COLORS)], "linestyle": styles[index % len(styles)]}


def _key(color: str, marker: str, name: str, filled: bool = True) -> Line2D:
    face = color if filled else "none"
    return Line2D([], [], color=color, marker=marker, mfc=face, ls="", markersize=5, label=name)


def _wilson(
    rate: npt.NDArray[Any], n: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Limits of the 95 % interval of Wilson 1927 for a share of `n` samples."""
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    middle = rate + z**2 / (2 * n)
    half = z * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def _running_median(x: Tensor, y: Tensor) -> tuple[list[float], list[float]]:
    levels, index = x.unique(return_inverse=True)
    if len(levels) > GROUPS:
        column = x.unsqueeze(1)
        index = equal_mass(column, column.isfinite(), GROUPS).squeeze(1)
    parts = [(x[index == i].numpy(), y[index == i].numpy()) for i in index.unique()]
    return [float(np.median(a)) for a, _ in parts], [float(np.median(b)) for _, b in parts]


def _correlation(columns: Tensor, known: Tensor) -> npt.NDArray[Any]:
    """Pearson's correlation of all pairs of columns, over the rows known in both; nan if one is constant there."""
    w = known.double()
    x = (columns - columns.sum(0) / w.sum(0)).masked_fill(~known, 0)
    count, sums, squares = w.T @ w, x.T @ w, x.square().T @ w
    covariance = x.T @ x - sums * sums.T / count
    variance = squares - sums.square() / count
    correlation: npt.NDArray[Any] = (covariance / (variance * variance.T).sqrt()).numpy()
    return correlation
