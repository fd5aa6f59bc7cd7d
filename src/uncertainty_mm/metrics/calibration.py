"""Calibration error and Brier score over batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from uncertainty_mm._checks import check_choice, check_positive_int
from uncertainty_mm.metrics._base import OfPredictions
from uncertainty_mm.metrics._binning import (
    FINE_BINS,
    Average,
    Binning,
    Norm,
    averaged,
    brier_of,
    calibration_of,
    check_binning,
    equal_width,
    fine_bins,
    histogram,
    merged,
)
from uncertainty_mm.metrics._inputs import predictions
from uncertainty_mm.metrics._smoothing import GRID, check_bandwidth, gaps, smoothed_error
from uncertainty_mm.metrics.functional import BrierDecomposition

__all__ = [
    "MultilabelBrierDecomposition",
    "MultilabelCalibrationError",
    "MultilabelSmoothCalibrationError",
]


class _Binned(OfPredictions):
    """A metric of a histogram of constant size, which is summed over processes in one reduction."""

    higher_is_better = False
    plot_legend_name = "Label"
    n_bins: int
    binning: Binning
    average: Average
    sums: Tensor

    def __init__(
        self,
        num_labels: int,
        n_bins: int,
        binning: Binning,
        average: Average,
        validate_args: bool | None,
        settings: dict[str, Any],
    ) -> None:
        super().__init__(validate_args, settings)
        check_positive_int("num_labels", num_labels)
        check_binning(n_bins, binning, average)
        self._set(num_labels=num_labels, n_bins=n_bins, binning=binning, average=average)
        shape = (5, num_labels, n_bins if binning == "width" else FINE_BINS)
        empty = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.add_state("sums", empty, dist_reduce_fx="sum")

    def _add(self, probs: Tensor, labels: Tensor, unknown: Tensor | None) -> None:
        p, present, known = predictions(probs, labels, unknown)
        index = equal_width(p, self.n_bins) if self.binning == "width" else fine_bins(p)
        self.sums = self.sums + histogram(p, present, known, index, self.sums.shape[2])

    def _histogram(self) -> Tensor:
        return self.sums if self.binning == "width" else merged(self.sums, self.n_bins)


class MultilabelCalibrationError(_Binned):
    """Calibration error of every label, :func:`~uncertainty_mm.metrics.functional.calibration_error` over batches.

    `update(probs, labels, unknown=None)` takes the arguments of the function. The state is a histogram whose size does
    not depend on the number of samples. Bins of equal width are exact. For bins of equal mass it stores 4096 fine bins,
    of equal width in arcsin(sqrt(p)), and joins neighbours. Fine bins are not split, so the masses are equal up to the
    mass of one, and the result equals the function's if no fine bin has two different probabilities.

    Args:
        num_labels: Number Q of labels.
        n_bins: Number of bins.
        binning: `"width"` or `"mass"`.
        norm: `"l1"`, `"l2"` or `"max"`.
        average: `"macro"`, the mean over labels, or `"none"`.
        validate_args: Check values on the CPU only (None), never (False), or always (True).
        settings: For `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument has the wrong type.

    Example:
        >>> metric = MultilabelCalibrationError(num_labels=1, n_bins=2)
        >>> metric.update(torch.tensor([[0.1], [0.3]]), torch.tensor([[0], [0]]))
        >>> metric.update(torch.tensor([[0.8], [0.8]]), torch.tensor([[1], [0]]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    norm: Norm

    def __init__(
        self,
        num_labels: int,
        *,
        n_bins: int = 15,
        binning: Binning = "width",
        norm: Norm = "l1",
        average: Average = "macro",
        validate_args: bool | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(num_labels, n_bins, binning, average, validate_args, settings)
        check_choice("norm", norm, ("l1", "l2", "max"))
        self._set(norm=norm)

    def compute(self) -> Tensor:
        """The calibration error so far: a scalar, or (Q,) for `average="none"`; nan without samples."""
        return averaged(calibration_of(self._histogram(), self.norm), self.average)


class MultilabelSmoothCalibrationError(OfPredictions):
    """Calibration error without bins, :func:`~uncertainty_mm.metrics.functional.smooth_calibration_error` over batches.

    `update(probs, labels, unknown=None)` takes the arguments of the function and gives the same result. The state has
    4097 numbers per label, for any number of samples.

    Args:
        num_labels: Number Q of labels.
        bandwidth: The width of the kernel, above 0; None for the choice of the paper.
        average: `"macro"`, the mean over labels, or `"none"`.
        validate_args: Check values on the CPU only (None), never (False), or always (True).
        settings: For `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument has the wrong type.

    Example:
        >>> metric = MultilabelSmoothCalibrationError(num_labels=1)
        >>> metric.update(torch.tensor([[0.1], [0.3]]), torch.tensor([[0], [0]]))
        >>> metric.update(torch.tensor([[0.8], [0.8]]), torch.tensor([[1], [0]]))
        >>> round(float(metric.compute()), 4)
        0.25
    """

    higher_is_better = False
    plot_legend_name = "Label"
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    bandwidth: float | None
    average: Average
    gaps: Tensor
    count: Tensor

    def __init__(
        self,
        num_labels: int,
        *,
        bandwidth: float | None = None,
        average: Average = "macro",
        validate_args: bool | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(validate_args, settings)
        check_positive_int("num_labels", num_labels)
        check_bandwidth(bandwidth)
        check_choice("average", average, ("macro", "none"))
        self._set(num_labels=num_labels, bandwidth=bandwidth, average=average)
        empty = torch.zeros(num_labels, GRID + 1, dtype=self.dtype, device=self.device)
        self.add_state("gaps", empty, dist_reduce_fx="sum")
        self.add_state("count", empty[:, 0].clone(), dist_reduce_fx="sum")

    def _add(self, probs: Tensor, labels: Tensor, unknown: Tensor | None) -> None:
        sums, count = gaps(*predictions(probs, labels, unknown))
        self.gaps = self.gaps + sums
        self.count = self.count + count

    def compute(self) -> Tensor:
        """The calibration error so far: a scalar, or (Q,) for `average="none"`; nan without samples."""
        return averaged(smoothed_error(self.gaps, self.count, self.bandwidth), self.average)


class _OfLabels(dict[str, Tensor]):
    """Parts (Q,) by name. Iteration raises, because `ClasswiseWrapper` would name the parts after the labels."""

    def __iter__(self) -> Iterator[str]:
        raise TypeError(
            "Expected the parts of the Brier score to be read by name (`.items()`, `.keys()`, `parts['brier']`), "
            "but got an iteration. For ClasswiseWrapper take one part: ClasswiseWrapper(metric['brier'], labels)"
        )


class MultilabelBrierDecomposition(_Binned):
    """Brier score and its parts, :func:`~uncertainty_mm.metrics.functional.brier_decomposition` over batches.

    `update(probs, labels, unknown=None)` takes the arguments of the function, and the state is that of
    :class:`MultilabelCalibrationError`. The parts add up exactly with both kinds of bins.

    Wrappers that need one number, or one per label (`BootStrapper`, `MetricTracker.best_metric`, `ClasswiseWrapper`),
    can take one part, which is a metric too: `metric["reliability"]`.

    Args:
        num_labels: Number Q of labels.
        n_bins: Number of bins.
        binning: `"width"` or `"mass"`.
        average: `"macro"`, the mean over labels, or `"none"`.
        validate_args: Check values on the CPU only (None), never (False), or always (True).
        settings: For `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument has the wrong type.

    Example:
        >>> metric = MultilabelBrierDecomposition(num_labels=1, n_bins=2)
        >>> metric.update(torch.tensor([[0.25], [0.25]]), torch.tensor([[0], [0]]))
        >>> metric.update(torch.tensor([[0.75], [0.75]]), torch.tensor([[1], [0]]))
        >>> for name, part in metric.compute().items():
        ...     print(f"{name:11} {float(part):.4f}")
        brier       0.1875
        reliability 0.0625
        resolution  0.0625
        uncertainty 0.1875
        within_bins 0.0000
    """

    def __init__(
        self,
        num_labels: int,
        *,
        n_bins: int = 15,
        binning: Binning = "width",
        average: Average = "macro",
        validate_args: bool | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(num_labels, n_bins, binning, average, validate_args, settings)

    def compute(self) -> dict[str, Tensor]:
        """The score and its parts so far, by name: scalars, or (Q,) for `average="none"`; nan without samples."""
        parts = zip(BrierDecomposition._fields, brier_of(self._histogram()), strict=True)
        kind = dict if self.average == "macro" else _OfLabels
        return kind((name, averaged(part, self.average)) for name, part in parts)
