"""How well probabilities match frequencies."""

from __future__ import annotations

from typing import NamedTuple

import torch  # noqa: F401  # for the examples
from torch import Tensor

from uncertainty_mm._checks import check_choice
from uncertainty_mm.metrics._binning import (
    Average,
    Binning,
    Norm,
    averaged,
    brier_of,
    calibration_of,
    check_binning,
    equal_mass,
    equal_width,
    histogram,
)
from uncertainty_mm.metrics._inputs import check_predictions, predictions
from uncertainty_mm.metrics._smoothing import check_bandwidth, gaps, smoothed_error

__all__ = [
    "BrierDecomposition",
    "brier_decomposition",
    "calibration_error",
    "smooth_calibration_error",
]


def calibration_error(
    probs: Tensor,
    labels: Tensor,
    unknown: Tensor | None = None,
    *,
    n_bins: int = 15,
    binning: Binning = "width",
    norm: Norm = "l1",
    average: Average = "macro",
    validate_args: bool | None = None,
) -> Tensor:
    r"""Measures how far predicted probabilities are from observed frequencies, for each label.

    The predictions of a label are put into bins. Let bin :math:`b` hold :math:`n_b` of the :math:`N` samples, with mean
    probability :math:`\bar p_b` and share of positives :math:`\bar y_b`. Then

    .. math::
        \ell_1 = \sum_b \frac{n_b}{N} |\bar p_b - \bar y_b|, \qquad
        \ell_2^2 = \sum_b \frac{n_b}{N} (\bar p_b - \bar y_b)^2, \qquad
        \ell_\infty = \max_b |\bar p_b - \bar y_b|

    Unlike the calibration error of a multi-class model, this is about the probability that a label is present, not
    about the confidence in the most probable class.

    Source: Guo et al. 2017 (equal width); Nixon et al. 2019, arXiv 1904.01685 (equal mass).

    Args:
        probs: Tensor (N, Q) of probabilities in [0, 1].
        labels: Tensor (N, Q) of 0 and 1, any real dtype.
        unknown: Bool tensor (N, Q), True where a label is not known and left out.
        n_bins: Number of bins.
        binning: `"width"`: bins of equal width that include their lower edge, the last one also its upper edge.
            `"mass"`: bins with equally many samples, chosen for each label; equal probabilities share a bin, so the
            order of rows does not matter.
        norm: `"l1"` (the expected calibration error), `"l2"` or `"max"`.
        average: `"macro"`, the mean over labels that have samples, or `"none"`.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        Scalar, or (Q,) for `"none"`, in [0, 1]; nan without samples.

    Raises:
        ValueError: If shapes or devices disagree, values are out of range, or an option is unknown.
        TypeError: If a dtype is wrong.

    Example:
        >>> probs = torch.tensor([[0.1], [0.3], [0.8], [0.8]])
        >>> labels = torch.tensor([[0], [0], [1], [0]])
        >>> calibration_error(probs, labels, n_bins=2)  # 1/2 |0.2 - 0| + 1/2 |0.8 - 0.5|
        tensor(0.2500, dtype=torch.float64)
    """
    check_choice("norm", norm, ("l1", "l2", "max"))
    sums = _binned(probs, labels, unknown, n_bins, binning, average, validate_args)
    return averaged(calibration_of(sums, norm), average)


def smooth_calibration_error(
    probs: Tensor,
    labels: Tensor,
    unknown: Tensor | None = None,
    *,
    bandwidth: float | None = None,
    average: Average = "macro",
    validate_args: bool | None = None,
) -> Tensor:
    r"""Measures calibration error without bins, by averaging neighbours with a kernel that chooses its own width.

    The differences between labels and probabilities are smoothed along the probability by a Gaussian kernel
    :math:`\tilde K_\sigma`, reflected at 0 and 1, and their absolute values are integrated:

    .. math::
        \mathrm{smECE}_\sigma = \int_0^1 \Bigl| \frac{1}{N} \sum_i \tilde K_\sigma(t, p_i) (y_i - p_i) \Bigr| \, dt,
        \qquad
        \tilde K_\sigma(t, p) = \sum_{k \in \mathbb{Z}} \varphi_\sigma(t - p - 2k) + \varphi_\sigma(t + p - 2k)

    It decreases with :math:`\sigma`, from the calibration error with a bin for every distinct probability to
    :math:`|\bar y - \bar p|`. The chosen width is the one with :math:`\mathrm{smECE}_\sigma = \sigma`. Unlike
    :func:`calibration_error`, it does not jump when a probability crosses the edge of a bin.

    It is computed by Fourier transforms on 4097 points of [0, 1]; every sample is split between its two neighbouring
    points.

    Source: Blasiok and Nakkiran 2023, arXiv 2309.12236.

    Args:
        probs: Tensor (N, Q) of probabilities in [0, 1].
        labels: Tensor (N, Q) of 0 and 1, any real dtype.
        unknown: Bool tensor (N, Q), True where a label is not known and left out.
        bandwidth: The width :math:`\sigma` of the kernel, above 0; None for the choice of the paper.
        average: `"macro"`, the mean over labels that have samples, or `"none"`.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        Scalar, or (Q,) for `"none"`, in [0, 1]; nan without samples.

    Raises:
        ValueError: If shapes or devices disagree, values are out of range, or an option is unknown.
        TypeError: If a dtype is wrong.

    Example:
        >>> probs = torch.tensor([[0.1], [0.3], [0.8], [0.8]])
        >>> labels = torch.tensor([[0], [0], [1], [0]])
        >>> round(float(smooth_calibration_error(probs, labels)), 4)
        0.25
    """
    check_bandwidth(bandwidth)
    check_choice("average", average, ("macro", "none"))
    check_predictions(probs, labels, unknown, validate_args)
    return averaged(smoothed_error(*gaps(*predictions(probs, labels, unknown)), bandwidth), average)


class BrierDecomposition(NamedTuple):
    """The Brier score and its parts: `brier = reliability - resolution + uncertainty + within_bins`.

    Each is a scalar, or (Q,) for `average="none"`.

    Attributes:
        brier: Mean of :math:`(p - y)^2`, in [0, 1]; smaller is better.
        reliability: Squared difference between probability and frequency over bins, at least 0; smaller is better.
        resolution: Variance of the frequency over bins, at least 0; larger is better.
        uncertainty: Variance of the labels, in [0, 1/4]; a property of the data.
        within_bins: The part hidden by binning: the variance of the probabilities in a bin minus twice their
            covariance with the labels. It can have either sign, and is 0 if all probabilities of a bin are equal.
    """

    brier: Tensor
    reliability: Tensor
    resolution: Tensor
    uncertainty: Tensor
    within_bins: Tensor


def brier_decomposition(
    probs: Tensor,
    labels: Tensor,
    unknown: Tensor | None = None,
    *,
    n_bins: int = 15,
    binning: Binning = "width",
    average: Average = "macro",
    validate_args: bool | None = None,
) -> BrierDecomposition:
    r"""Splits the Brier score into calibration and discrimination.

    With the bins of :func:`calibration_error` and the share of positives :math:`\bar y` over all samples,

    .. math::
        \frac{1}{N} \sum_i (p_i - y_i)^2
        = \underbrace{\sum_b \tfrac{n_b}{N} (\bar p_b - \bar y_b)^2}_{\text{reliability}}
        - \underbrace{\sum_b \tfrac{n_b}{N} (\bar y_b - \bar y)^2}_{\text{resolution}}
        + \underbrace{\bar y (1 - \bar y)}_{\text{uncertainty}}
        + \underbrace{\sum_b \tfrac{n_b}{N} \bigl(\operatorname{var}_b(p) - 2 \operatorname{cov}_b(p, y)\bigr)}
        _{\text{within bins}}

    The last term makes the identity exact if probabilities differ within a bin.

    Source: Murphy 1973; Stephenson et al. 2008 (within bins).

    Args:
        probs: Tensor (N, Q) of probabilities in [0, 1].
        labels: Tensor (N, Q) of 0 and 1, any real dtype.
        unknown: Bool tensor (N, Q), True where a label is not known and left out.
        n_bins: Number of bins.
        binning: `"width"` or `"mass"`, as in :func:`calibration_error`.
        average: `"macro"`, the mean over labels that have samples, or `"none"`.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        The score and its parts; nan without samples.

    Raises:
        ValueError: If shapes or devices disagree, values are out of range, or an option is unknown.
        TypeError: If a dtype is wrong.

    Example:
        >>> probs = torch.tensor([[0.25], [0.25], [0.75], [0.75]])
        >>> parts = brier_decomposition(probs, torch.tensor([[0], [0], [1], [0]]), n_bins=2)
        >>> for name, part in parts._asdict().items():
        ...     print(f"{name:11} {float(part):.4f}")
        brier       0.1875
        reliability 0.0625
        resolution  0.0625
        uncertainty 0.1875
        within_bins 0.0000
    """
    sums = _binned(probs, labels, unknown, n_bins, binning, average, validate_args)
    return BrierDecomposition(*(averaged(part, average) for part in brier_of(sums)))


def _binned(
    probs: Tensor,
    labels: Tensor,
    unknown: Tensor | None,
    n_bins: int,
    binning: Binning,
    average: Average,
    validate_args: bool | None,
) -> Tensor:
    check_binning(n_bins, binning, average)
    check_predictions(probs, labels, unknown, validate_args)
    p, present, known = predictions(probs, labels, unknown)
    index = equal_width(p, n_bins) if binning == "width" else equal_mass(p, known, n_bins)
    return histogram(p, present, known, index, n_bins)
