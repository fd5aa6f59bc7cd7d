"""How far two methods are apart on a test set, and how much of that is the choice of the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

# A method is not behind another where its micro F1 is less by at most, and its Brier score more by at most:
MARGINS = {"miF1": 0.005, "Brier": 0.001}


class Interval(NamedTuple):
    """A difference and where it lies in 95 % of the draws."""

    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        mark = " *" if self.low > 0 or self.high < 0 else ""
        return f"{self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}]{mark}"


def contributions(folder: Path) -> np.ndarray:
    """What every test sample adds to micro F1 and Brier score, from the predictions of a run: :func:`sample_terms`."""
    with np.load(folder / "predictions.npz") as file:
        unknown = file.get("unknown")
        return sample_terms(file["probs"], file["labels"], file["threshold"], unknown)


def sample_terms(
    probs: np.ndarray, labels: np.ndarray, threshold: np.ndarray, unknown: np.ndarray | None = None
) -> np.ndarray:
    """What every sample adds to micro F1 and Brier score, from its known labels.

    Returns:
        (4, N): hits, labels predicted and present, squared errors, known labels.
    """
    known = np.ones(labels.shape, bool) if unknown is None else ~unknown
    present, predicted = (labels > 0) & known, (probs > threshold) & known
    errors = np.where(known, probs - present, 0)
    each = (predicted & present, predicted.astype(int) + present, np.square(errors), known)
    return np.stack([x.sum(1) for x in each])


def groups_of(folder: Path) -> np.ndarray | None:
    """Who every test sample is of, (N,), where the data of a run say so."""
    with np.load(folder / "predictions.npz") as file:
        return file.get("groups")


def by_group(terms: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Sums of contributions (..., N) over the samples of each of G groups, (..., G)."""
    return np.stack([terms[..., groups == each].sum(-1) for each in np.unique(groups)], axis=-1)


def scores(weights: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """Micro F1 and Brier score, mean over seeds, of samples counted by weights (draws, N): (2, draws)."""
    hits, sizes, errors, known = np.einsum("dn,skn->ksd", weights, terms, optimize=True)
    ratios = 2 * hits / np.maximum(sizes, 1), errors / np.maximum(known, 1)
    return np.stack([ratio.mean(0) for ratio in ratios])


def paired_bootstrap(
    ours: np.ndarray,
    theirs: np.ndarray,
    draws: int = 10_000,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> dict[str, Interval]:
    """Difference of two methods, and its 95 % percentile interval over samples drawn with replacement.

    Both methods are evaluated on the same draws (Efron, Tibshirani 1993). The interval tells how much the test set
    decides; the models are given. Samples of one user are alike, and tell less than as many users would: with `groups`,
    whole groups are drawn (the cluster bootstrap). Where these are few, a dozen or less, the interval is too narrow.

    Args:
        ours: :func:`contributions` of the same N samples by seed, (S, 4, N).
        theirs: The same of the other method.
        draws: How often N samples, or as many groups as there are, are drawn.
        seed: Of the draws.
        groups: (N,), equal for the samples that are drawn together; None draws each by itself.
    """
    if groups is not None:  # the scores are ratios of sums: a group is what its samples add up to
        ours, theirs = by_group(ours, groups), by_group(theirs, groups)
    samples, rng = ours.shape[2], np.random.default_rng(seed)

    def difference(weights: np.ndarray) -> np.ndarray:
        return scores(weights, ours) - scores(weights, theirs)

    drawn = []
    for start in range(0, draws, 500):  # so many fit in memory
        count = min(500, draws - start)
        places = rng.integers(samples, size=(count, samples)) + samples * np.arange(count)[:, None]
        weights = np.bincount(places.ravel(), minlength=count * samples).reshape(count, samples)
        drawn.append(difference(weights.astype(float)))
    low, high = np.percentile(np.concatenate(drawn, axis=1), (2.5, 97.5), axis=1)
    observed = difference(np.ones((1, samples)))[:, 0]
    return {
        name: Interval(*map(float, values))
        for name, *values in zip(("miF1", "Brier"), observed, low, high, strict=True)
    }


def compare(folder: Path, ours: str, theirs: str, seeds: Sequence[int]) -> dict[str, Interval]:
    """:func:`paired_bootstrap` of two arms of a sweep, from the runs of these seeds: `folder/ARM/SEED`.

    Groups are drawn as a whole where the data have them.
    """
    pair = (
        np.stack([contributions(folder / arm / str(seed)) for seed in seeds])
        for arm in (ours, theirs)
    )
    return paired_bootstrap(*pair, groups=groups_of(folder / ours / str(seeds[0])))


def verdict(found: Mapping[str, Interval]) -> str:
    """What the intervals of :func:`paired_bootstrap` say of our method, in a word.

    `"behind"` where one of them excludes 0 to our disadvantage; `"ahead"` where one excludes 0 in our favour and the
    other stays within its margin (:data:`MARGINS`); `"level"` where both stay within; else `"open"`: the test set is
    too small to tell.
    """
    f1, brier = found["miF1"], found["Brier"]
    if f1.high < 0 or brier.low > 0:
        return "behind"
    if -f1.low > MARGINS["miF1"] or brier.high > MARGINS["Brier"]:
        return "open"
    return "ahead" if f1.low > 0 or brier.high < 0 else "level"
