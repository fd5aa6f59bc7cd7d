r"""How good probabilities and uncertainties are, as functions that need only torch.

:mod:`uncertainty_mm.metrics` accumulates the same measures over batches and processes. Results are in float64, and nan
where a measure does not exist (no sample, or nothing to compare). Values are always checked, on an accelerator too:
who evaluates waits for the result anyway. Probabilities are never logits: what is outside [0, 1] is an error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_choice,
    check_finite,
    check_missing,
    check_probability,
    check_range,
    check_tensor,
    finite_scores,
)
from uncertainty_mm.metrics._binning import (
    brier_of,
    calibration_of,
    check_binning,
    check_predictions,
    equal_mass,
    equal_width,
    histogram,
)

__all__ = [
    "BrierDecomposition",
    "RiskCoverage",
    "auroc",
    "brier_decomposition",
    "calibration_error",
    "modality_attribution",
    "predictive_entropy",
    "risk_coverage",
    "sample_jaccard",
    "spearman",
]


def calibration_error(
    probs: Tensor,
    labels: Tensor,
    *,
    bins: int = 15,
    binning: str = "width",
    norm: str = "l1",
    average: str = "macro",
) -> Tensor:
    r"""How far predicted probabilities are from observed frequencies, label by label.

    The predictions of a label fall into bins; with :math:`n_b` of the :math:`N` samples in bin :math:`b`, and there the
    mean probability :math:`\bar p_b` and the share of positives :math:`\bar y_b`,

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
        bins: Number of bins.
        binning: `"width"`: bins of equal width, closed below, the last one also above. `"mass"`: bins with equally
            many samples, chosen for each label; equal probabilities share a bin, so the order of rows has no
            influence.
        norm: `"l1"` (the expected calibration error), `"l2"` or `"max"`.
        average: `"macro"`, the mean over labels, or `"none"`.

    Returns:
        Scalar, or (Q,) for `"none"`, in [0, 1]; nan without samples.

    Raises:
        ValueError: If shapes or devices disagree, values are out of range, or an option is unknown.
        TypeError: If a dtype is wrong.

    Example:
        >>> probs = torch.tensor([[0.1], [0.3], [0.8], [0.8]])
        >>> labels = torch.tensor([[0], [0], [1], [0]])
        >>> calibration_error(probs, labels, bins=2)  # 1/2 |0.2 - 0| + 1/2 |0.8 - 0.5|
        tensor(0.2500, dtype=torch.float64)
    """
    check_choice("norm", norm, ("l1", "l2", "max"))
    error = calibration_of(_binned(probs, labels, bins, binning, average), norm)
    return error.mean() if average == "macro" else error


class BrierDecomposition(NamedTuple):
    """The Brier score and its parts: `brier = reliability - resolution + uncertainty + within_bins`.

    Each is a scalar, or (Q,) for `average="none"`.

    Attributes:
        brier: Mean of :math:`(p - y)^2`, in [0, 1]; smaller is better.
        reliability: Squared distance of probability and frequency over bins, at least 0; smaller is better.
        resolution: Variance of the frequency over bins, at least 0; larger is better.
        uncertainty: Variance of the labels, in [0, 1/4]; a property of the data.
        within_bins: What binning hides: the variance of the probabilities in a bin minus twice their covariance with
            the labels. 0 when all probabilities of a bin are equal; either sign.
    """

    brier: Tensor
    reliability: Tensor
    resolution: Tensor
    uncertainty: Tensor
    within_bins: Tensor


def brier_decomposition(
    probs: Tensor,
    labels: Tensor,
    *,
    bins: int = 15,
    binning: str = "width",
    average: str = "macro",
) -> BrierDecomposition:
    r"""Brier score, taken apart into calibration and discrimination.

    With the bins of :func:`calibration_error` and the share of positives :math:`\bar y` over all samples,

    .. math::
        \frac{1}{N} \sum_i (p_i - y_i)^2
        = \underbrace{\sum_b \tfrac{n_b}{N} (\bar p_b - \bar y_b)^2}_{\text{reliability}}
        - \underbrace{\sum_b \tfrac{n_b}{N} (\bar y_b - \bar y)^2}_{\text{resolution}}
        + \underbrace{\bar y (1 - \bar y)}_{\text{uncertainty}}
        + \underbrace{\sum_b \tfrac{n_b}{N} \bigl(\operatorname{var}_b(p) - 2 \operatorname{cov}_b(p, y)\bigr)}
        _{\text{within bins}}

    The last term makes the identity exact when probabilities differ within a bin.

    Source: Murphy 1973; Stephenson et al. 2008 (within bins).

    Args:
        probs: Tensor (N, Q) of probabilities in [0, 1].
        labels: Tensor (N, Q) of 0 and 1, any real dtype.
        bins: Number of bins.
        binning: `"width"` or `"mass"`, as in :func:`calibration_error`.
        average: `"macro"`, the mean over labels, or `"none"`.

    Returns:
        The score and its parts; nan without samples.

    Raises:
        ValueError: If shapes or devices disagree, values are out of range, or an option is unknown.
        TypeError: If a dtype is wrong.

    Example:
        >>> probs = torch.tensor([[0.25], [0.25], [0.75], [0.75]])
        >>> parts = brier_decomposition(probs, torch.tensor([[0], [0], [1], [0]]), bins=2)
        >>> {name: round(float(part), 4) for name, part in parts._asdict().items()}
        {'brier': 0.1875, 'reliability': 0.0625, 'resolution': 0.0625, 'uncertainty': 0.1875, 'within_bins': 0.0}
    """
    parts = brier_of(_binned(probs, labels, bins, binning, average))
    return BrierDecomposition(*(x.mean() if average == "macro" else x for x in parts))


class RiskCoverage(NamedTuple):
    """What is risked when only the most certain samples are answered.

    Attributes:
        coverage: Tensor (N,), the shares 1/N, 2/N, ..., 1 of samples that are answered.
        risk: Tensor (N,), the mean error of these samples.
        aurc: Scalar, area under the risk-coverage curve: the mean of `risk`. Smaller is better.
        eaurc: Scalar, `aurc` minus that of the best order of the same errors, at least 0. Smaller is better.
    """

    coverage: Tensor
    risk: Tensor
    aurc: Tensor
    eaurc: Tensor


def risk_coverage(errors: Tensor, uncertainty: Tensor) -> RiskCoverage:
    r"""Risk-coverage curve: the mean error of the k most certain samples, for every k.

    .. math::
        \text{risk}(k) = \frac{1}{k} \sum_{i=1}^{k} e_{(i)}, \qquad
        \mathrm{AURC} = \frac{1}{N} \sum_{k=1}^{N} \text{risk}(k), \qquad
        \text{E-AURC} = \mathrm{AURC} - \mathrm{AURC}^*

    where (i) sorts by uncertainty and :math:`\mathrm{AURC}^*` sorts by the errors themselves (exactly, not by the
    approximation :math:`r + (1 - r) \ln(1 - r)`). Samples of equal uncertainty have no order: each counts with their
    mean error, which is the expectation over random orders, so permuting the rows changes nothing.

    Source: Geifman et al. 2019, arXiv 1805.08206.

    Args:
        errors: Tensor (N,) of finite errors: 0 and 1 (or bool), or graded ones, such as 1 minus
            :func:`sample_jaccard`.
        uncertainty: Tensor (N,) of finite numbers; larger is less sure.

    Returns:
        Curve and areas; the areas are nan without samples.

    Raises:
        ValueError: If shapes or devices disagree, or a value is not finite.
        TypeError: If a dtype is wrong.

    Example:
        >>> errors = torch.tensor([0, 1, 0, 1])
        >>> curve = risk_coverage(errors, torch.tensor([0.1, 0.2, 0.2, 0.9]))
        >>> curve.risk  # the second and third sample count 1/2 each
        tensor([0.0000, 0.2500, 0.3333, 0.5000], dtype=torch.float64)
        >>> risk_coverage(errors, uncertainty=errors).eaurc
        tensor(0., dtype=torch.float64)
    """
    errors, uncertainty = finite_scores(errors=errors, uncertainty=uncertainty)
    device = errors.device
    # Where deterministic algorithms are asked for, CUDA refuses running sums.
    errors, uncertainty = errors.cpu(), uncertainty.cpu()
    steps = torch.arange(1, len(errors) + 1, dtype=torch.float64)
    _, group, count = torch.unique(uncertainty, return_inverse=True, return_counts=True)
    mean = errors.new_zeros(len(count)).index_add_(0, group, errors) / count
    risk = mean.repeat_interleave(count).cumsum(0) / steps
    best = errors.sort().values.cumsum(0) / steps
    excess = (risk.mean() - best.mean()).clamp_min(0)  # rounding
    curve = (steps / max(len(steps), 1), risk, risk.mean(), excess)
    return RiskCoverage(*(x.to(device) for x in curve))


def auroc(positive: Tensor, negative: Tensor) -> Tensor:
    r"""Probability that a score of the first sample exceeds one of the second, ties counted half.

    .. math::
        \mathrm{AUROC} = P(u^+ > u^-) + \tfrac12 P(u^+ = u^-)

    It measures how well an uncertainty `u` finds the samples with wrong predictions, `auroc(u[wrong], u[~wrong])`, and
    whether it rises on corrupted input, `auroc(u_corrupted, u_clean)`. The scores may be any finite numbers
    (`torchmetrics.functional.auroc` passes scores outside [0, 1] through a sigmoid, which makes large ones equal).

    Args:
        positive: Tensor (n,), the scores that should be larger.
        negative: Tensor (m,), the scores that should be smaller.

    Returns:
        Scalar in [0, 1], 1/2 for scores that tell nothing; nan if either is empty.

    Raises:
        ValueError: If a shape is wrong, devices disagree, or a value is not finite.
        TypeError: If a dtype is wrong.

    Example:
        >>> uncertainty = torch.tensor([0.1, 0.5, 0.5, 2.0])
        >>> wrong = torch.tensor([False, False, True, True])
        >>> auroc(uncertainty[wrong], uncertainty[~wrong])  # 3 pairs in order, one tie
        tensor(0.8750, dtype=torch.float64)
    """
    [positive] = finite_scores(positive=positive)
    check_tensor("negative", negative, "number", "m", {}, positive.device)
    [negative] = finite_scores(negative=negative)
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive).double()
    not_above = torch.searchsorted(ordered, positive, right=True).double()
    wins = (below + not_above).sum() / 2
    return wins / positive.new_tensor(positive.numel() * negative.numel())  # nan for 0 / 0


def spearman(x: Tensor, y: Tensor) -> Tensor:
    r"""Spearman's rank correlation: Pearson's correlation of the ranks, ties with their average rank.

    For an uncertainty against the errors (larger is better), or against a known noise level. It is nan when an input is
    constant, as in SciPy (`torchmetrics.functional.spearman_corrcoef` gives 0 there, and its 32-bit rank sums overflow
    when some 65,000 values are equal).

    Args:
        x: Tensor (N,) of finite numbers.
        y: Tensor (N,) of finite numbers.

    Returns:
        Scalar in [-1, 1]; nan for fewer than two samples or constant input.

    Raises:
        ValueError: If shapes or devices disagree, or a value is not finite.
        TypeError: If a dtype is wrong.

    Example:
        >>> spearman(torch.tensor([0.1, 0.2, 0.3, 5.0]), torch.tensor([0.0, 1.0, 0.5, 3.0]))
        tensor(0.8000, dtype=torch.float64)
    """
    a, b = (_centred_ranks(z) for z in finite_scores(x=x, y=y))
    return ((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()).clamp(-1, 1)


def _centred_ranks(x: Tensor) -> Tensor:
    """Average ranks minus their mean, doubled."""
    ordered = x.sort().values
    below, not_above = (torch.searchsorted(ordered, x, right=right) for right in (False, True))
    return (below + not_above - x.numel()).double()


def sample_jaccard(probs: Tensor, labels: Tensor, *, threshold: float = 0.5) -> Tensor:
    r"""Jaccard index of predicted and true label set of every sample; its mean is the "accuracy" of the field.

    .. math::
        J_i = \frac{|y_i \wedge \hat y_i|}{\max(|y_i \vee \hat y_i|, 1)}, \qquad \hat y_i = [p_i > t]

    It is 0, not 1, when both sets are empty, as in `sklearn.metrics.jaccard_score(..., average="samples",
    zero_division=0)`. (`torchmetrics.functional.jaccard_index` averages over labels, not over samples.)

    Args:
        probs: Tensor (N, Q) of probabilities in [0, 1].
        labels: Tensor (N, Q) of 0 and 1, any real dtype.
        threshold: A label is predicted where its probability is above this, in [0, 1].

    Returns:
        Tensor (N,) in [0, 1].

    Raises:
        ValueError: If shapes or devices disagree, or values are out of range.
        TypeError: If a dtype is wrong.

    Example:
        >>> probs = torch.tensor([[0.9, 0.6, 0.1], [0.2, 0.3, 0.1]])
        >>> sample_jaccard(probs, torch.tensor([[1, 0, 0], [0, 0, 0]]))
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    check_probability("threshold", threshold)
    check_predictions(probs, labels)
    predicted, true = probs > threshold, labels.bool()
    return (predicted & true).sum(1).double() / (predicted | true).sum(1).clamp_min(1)


def predictive_entropy(probs: Tensor) -> Tensor:
    r"""Entropy of the predicted labels, taken as independent: the usual uncertainty of a multi-label prediction.

    .. math::
        H_i = -\sum_q p_{iq} \ln p_{iq} + (1 - p_{iq}) \ln(1 - p_{iq})

    Args:
        probs: Tensor (N, Q) of probabilities in [0, 1]; 0 and 1 contribute nothing.

    Returns:
        Tensor (N,) in nats, in [0, Q ln 2].

    Raises:
        ValueError: If the shape is wrong or values are out of range.
        TypeError: If the dtype is wrong.

    Example:
        >>> predictive_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([1.3863, 0.0000], dtype=torch.float64)
    """
    check_tensor("probs", probs, "floating", "N Q", {})
    check_range("probs", probs, 0, 1)
    p = probs.double()
    entropy: Tensor = torch.special.entr(p) - torch.special.xlog1py(1 - p, -p)
    return entropy.sum(1)


def modality_attribution(sizes: Tensor, missing: Tensor | None = None) -> Tensor:
    r"""Share of every modality when each counts with its precision.

    .. math::
        a_{im} = \frac{s_{im}^{-2}}{\sum_{m'} s_{im'}^{-2}} \quad \text{over the modalities that are there}

    the weights of the best unbiased combination of independent measurements with standard deviations :math:`s`.

    Args:
        sizes: Tensor (B, M), the size of the uncertainty of every modality, above 0: the norm of its standard
            deviations, say. Only ratios within a row matter.
        missing: Bool tensor (B, M), True where a sample does not have a modality. What stands there has no influence.

    Returns:
        Tensor (B, M); rows sum to 1, with 0 for what is missing. All 0 if everything is missing.

    Raises:
        ValueError: If shapes or devices disagree, or a size is not finite or not above 0.
        TypeError: If a dtype is wrong.

    Example:
        >>> missing = torch.tensor([[False, False, True]])
        >>> modality_attribution(torch.tensor([[1.0, 2.0, 0.1]]), missing)
        tensor([[0.8000, 0.2000, 0.0000]], dtype=torch.float64)
    """
    dims: dict[str, int] = {}
    check_tensor("sizes", sizes, "floating", "B M", dims)
    check_missing(missing, dims, sizes.device)
    check_finite("sizes", sizes, missing)
    left_out = torch.zeros_like(sizes, dtype=torch.bool) if missing is None else missing
    kept = sizes[~left_out]
    if (kept <= 0).any():
        raise ValueError(f"Expected `sizes` to be above 0, but got {kept.min().item()}")
    size = sizes.double().masked_fill(left_out, float("inf"))
    if size.shape[1] == 0:
        return size
    smallest = size.amin(1, keepdim=True).clamp_max(torch.finfo(torch.float64).max)
    precision = (smallest / size).square()  # at most 1; 0 where the size is infinite
    return precision / precision.sum(1, keepdim=True).clamp_min(1)


def _binned(probs: Tensor, labels: Tensor, bins: int, binning: str, average: str) -> Tensor:
    check_binning(bins, binning, average)
    check_predictions(probs, labels)
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    index = equal_width(probs, bins) if binning == "width" else equal_mass(probs, bins)
    return histogram(probs, labels, index, bins)
