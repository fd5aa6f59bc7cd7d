"""Histograms of predictions, from which calibration error and Brier decomposition are computed.

A histogram is a tensor (5, Q, R): for each of Q labels and R bins, the sums of 1, y, p, p^2 and p y over the samples
whose label is known.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from uncertainty_mm._checks import check_choice, check_positive_int
from uncertainty_mm.metrics._inputs import precision

Binning = Literal["width", "mass"]
Norm = Literal["l1", "l2", "max"]
Average = Literal["macro", "none"]

FINE_BINS = 4096  # joined to bins of equal mass, in a histogram of constant size


def check_binning(n_bins: int, binning: str, average: str) -> None:
    check_positive_int("n_bins", n_bins)
    check_choice("binning", binning, ("width", "mass"))
    check_choice("average", average, ("macro", "none"))


def equal_width(probs: Tensor, n_bins: int) -> Tensor:
    """Bin of every probability: [0, 1/n_bins), [1/n_bins, 2/n_bins), ..., the last one including 1."""
    edges = torch.arange(1, n_bins, dtype=probs.dtype, device=probs.device) / n_bins
    return torch.bucketize(probs.contiguous(), edges, right=True)


def equal_mass(probs: Tensor, known: Tensor, n_bins: int) -> Tensor:
    """Bin of every probability (N, Q), for each label by its average rank; equal probabilities share a bin."""
    columns = probs.masked_fill(~known, float("inf")).T.contiguous()  # unknown ones come last
    ordered = columns.sort(dim=1).values
    below = torch.searchsorted(ordered, columns)
    not_above = torch.searchsorted(ordered, columns, right=True)
    twice_count = 2 * known.sum(0).clamp_min(1).unsqueeze(1)
    return ((below + not_above) * n_bins // twice_count).clamp_max(n_bins - 1).T


def fine_bins(probs: Tensor) -> Tensor:
    """Bins of equal width in arcsin(sqrt(p)), narrow near 0 and 1, where the probabilities of rare labels lie."""
    share: Tensor = probs.to(precision(probs.device)).clamp(0, 1).sqrt().asin() * (2 / math.pi)
    return (share * FINE_BINS).long().clamp_max(FINE_BINS - 1)


def histogram(probs: Tensor, present: Tensor, known: Tensor, index: Tensor, n_bins: int) -> Tensor:
    """The histogram (5, Q, n_bins) of the known ones of (N, Q) predictions in the bins `index` (N, Q)."""
    p, y, one = (x.to(precision(probs.device)) for x in (probs, present, known))
    return _sums_by_bin(torch.stack([one, y, p, p * p, p * y]), index, n_bins)


def merged(fine: Tensor, n_bins: int) -> Tensor:
    """Joins neighbouring bins to `n_bins` of about equal mass, by the average rank of their samples."""
    count = fine[0].long()
    twice_rank = 2 * count.cumsum(1) - count
    index = twice_rank * n_bins // (2 * count.sum(1, keepdim=True)).clamp_min(1)
    index = index.clamp_max(n_bins - 1)  # for empty bins after the last sample
    return _sums_by_bin(fine.transpose(1, 2), index.T, n_bins)


def _sums_by_bin(values: Tensor, index: Tensor, n_bins: int) -> Tensor:
    """Sums (C, Q, n_bins) of `values` (C, N, Q) with equal `index` (N, Q)."""
    columns, _, num_labels = values.shape
    place = torch.arange(num_labels, device=index.device) * n_bins + index
    flat = values.new_zeros(columns, num_labels * n_bins)
    flat.index_add_(1, place.flatten(), values.flatten(1))
    return flat.view(columns, num_labels, n_bins)


def averaged(values: Tensor, average: str) -> Tensor:
    """The values (Q,) of the labels, or their mean over the labels that have samples."""
    return values.nanmean() if average == "macro" else values


def calibration_of(sums: Tensor, norm: str) -> Tensor:
    """Calibration error (Q,) of a histogram; nan without samples."""
    count, positives, expected = sums[:3]
    total = count.sum(1)
    gap: Tensor = (positives - expected).abs() / count.clamp_min(1)
    share: Tensor = count / total.unsqueeze(1)
    if norm == "l1":
        return (share * gap).sum(1)
    if norm == "l2":
        return (share * gap.square()).sum(1).sqrt()
    return gap.amax(1).masked_fill(total == 0, float("nan"))


def brier_of(sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Brier score, reliability, resolution, uncertainty and the terms within bins, each (Q,); nan without samples."""
    total, positives, _, squares, products = sums.sum(2)
    rate = positives / total
    count, y, p, pp, py = sums
    share, count = count / total.unsqueeze(1), count.clamp_min(1)
    y, p = y / count, p / count
    variance, covariance = pp / count - p * p, py / count - p * y
    return (
        (squares - 2 * products + positives) / total,
        (share * (p - y).square()).sum(1),
        (share * (y - rate.unsqueeze(1)).square()).sum(1),
        rate * (1 - rate),
        (share * (variance - 2 * covariance)).sum(1),
    )
