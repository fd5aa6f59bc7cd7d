r"""How good probabilities and uncertainties are, as functions that need only torch.

:mod:`uncertainty_mm.metrics` accumulates the same measures over batches and processes. Results are in float64 (float32
on a device that has none), and nan where a measure does not exist: no sample, or nothing to compare. Probabilities are
never logits: what is outside [0, 1] is an error.

All functions of labels take `unknown`, a bool tensor of their shape, True where a label is not known. The result is
that of the data without these entries, whatever stands there (NaN, or -1).

`validate_args` says whether values are looked at, for which an accelerator has to be waited for: None, on the CPU only;
False, never; True, everywhere. Where they are not, a label is present above 0.5, and what is not finite is left out,
like what is unknown.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_choice,
    check_finite,
    check_labels,
    check_missing,
    check_probability,
    check_range,
    check_tensor,
    check_validate_args,
    checks_values,
)
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
from uncertainty_mm.metrics._inputs import (
    check_predictions,
    check_scores,
    finite_scores,
    precision,
    predictions,
)

__all__ = [
    "BrierDecomposition",
    "RiskCoverage",
    "auroc",
    "brier_decomposition",
    "calibration_error",
    "evaluate",
    "modality_attribution",
    "predictive_entropy",
    "risk_coverage",
    "sample_jaccard",
    "spearman",
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
        unknown: Bool tensor (N, Q), True where a label is not known: each label has its own samples.
        n_bins: Number of bins.
        binning: `"width"`: bins of equal width, closed below, the last one also above. `"mass"`: bins with equally
            many samples, chosen for each label; equal probabilities share a bin, so the order of rows has no
            influence.
        norm: `"l1"` (the expected calibration error), `"l2"` or `"max"`.
        average: `"macro"`, the mean over labels (with any sample), or `"none"`.
        validate_args: Whether values are looked at, see above.

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
    unknown: Tensor | None = None,
    *,
    n_bins: int = 15,
    binning: Binning = "width",
    average: Average = "macro",
    validate_args: bool | None = None,
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
        unknown: Bool tensor (N, Q), True where a label is not known: each label has its own samples.
        n_bins: Number of bins.
        binning: `"width"` or `"mass"`, as in :func:`calibration_error`.
        average: `"macro"`, the mean over labels (with any sample), or `"none"`.
        validate_args: Whether values are looked at, see above.

    Returns:
        The score and its parts; nan without samples.

    Raises:
        ValueError: If shapes or devices disagree, values are out of range, or an option is unknown.
        TypeError: If a dtype is wrong.

    Example:
        >>> probs = torch.tensor([[0.25], [0.25], [0.75], [0.75]])
        >>> parts = brier_decomposition(probs, torch.tensor([[0], [0], [1], [0]]), n_bins=2)
        >>> {name: round(float(part), 4) for name, part in parts._asdict().items()}
        {'brier': 0.1875, 'reliability': 0.0625, 'resolution': 0.0625, 'uncertainty': 0.1875, 'within_bins': 0.0}
    """
    sums = _binned(probs, labels, unknown, n_bins, binning, average, validate_args)
    return BrierDecomposition(*(averaged(part, average) for part in brier_of(sums)))


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


def risk_coverage(
    uncertainty: Tensor, errors: Tensor, *, validate_args: bool | None = None
) -> RiskCoverage:
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
        uncertainty: Tensor (N,) of finite numbers; larger is less sure.
        errors: Tensor (N,) of finite errors: 0 and 1 (or bool), or graded ones, such as 1 minus
            :func:`sample_jaccard`.
        validate_args: Whether values are looked at, see above.

    Returns:
        Curve and areas; the areas are nan without samples.

    Raises:
        ValueError: If shapes or devices disagree, or a value is not finite.
        TypeError: If a dtype is wrong.

    Example:
        >>> errors = torch.tensor([0, 1, 0, 1])
        >>> curve = risk_coverage(torch.tensor([0.1, 0.2, 0.2, 0.9]), errors)
        >>> curve.risk  # the second and third sample count 1/2 each
        tensor([0.0000, 0.2500, 0.3333, 0.5000], dtype=torch.float64)
        >>> risk_coverage(errors, errors).eaurc
        tensor(0., dtype=torch.float64)
    """
    check_scores(uncertainty, errors, validate_args)
    score, error = finite_scores(uncertainty, errors)
    steps = torch.arange(1, len(error) + 1, dtype=torch.float64, device="cpu")
    _, group, count = torch.unique(score, return_inverse=True, return_counts=True)
    mean = error.new_zeros(len(count)).index_add_(0, group, error) / count
    risk = mean.repeat_interleave(count).cumsum(0) / steps
    best = error.sort().values.cumsum(0) / steps
    excess = (risk.mean() - best.mean()).clamp_min(0)  # rounding
    curve = (steps / max(len(steps), 1), risk, risk.mean(), excess)
    return RiskCoverage(*(_back(x, uncertainty) for x in curve))


def auroc(uncertainty: Tensor, errors: Tensor, *, validate_args: bool | None = None) -> Tensor:
    r"""Probability that the uncertainty of a wrong prediction exceeds that of a right one, ties counted half.

    .. math::
        \mathrm{AUROC} = P(u^+ > u^-) + \tfrac12 P(u^+ = u^-)

    It measures how well an uncertainty `u` finds the errors. Whether it rises on corrupted input is the same question:
    `auroc(torch.cat([u_clean, u_corrupted]), corrupted)`, with 1 for what is corrupted. The scores may be any finite
    numbers (`torchmetrics.functional.auroc` passes scores outside [0, 1] through a sigmoid, which makes large ones
    equal).

    Args:
        uncertainty: Tensor (N,) of finite numbers; larger is less sure.
        errors: Tensor (N,) of 0 and 1 or bool, whether the prediction was wrong.
        validate_args: Whether values are looked at, see above.

    Returns:
        Scalar in [0, 1], 1/2 for scores that tell nothing; nan unless there are errors and right predictions.

    Raises:
        ValueError: If shapes or devices disagree, an uncertainty is not finite, or an error is not 0 or 1.
        TypeError: If a dtype is wrong.

    Example:
        >>> uncertainty = torch.tensor([0.1, 0.5, 0.5, 2.0])
        >>> auroc(uncertainty, torch.tensor([0, 0, 1, 1]))  # 3 pairs in order, one tie
        tensor(0.8750, dtype=torch.float64)
    """
    check_scores(uncertainty, errors, validate_args)
    if checks_values(errors, validate_args):
        check_labels("errors", errors)
    score, error = finite_scores(uncertainty, errors)
    wrong, right = score[error > 0.5], score[error <= 0.5].sort().values
    below = torch.searchsorted(right, wrong)
    not_above = torch.searchsorted(right, wrong, right=True)
    wins = (below + not_above).sum() / 2
    pairs = wins.new_tensor(len(wrong) * len(right), dtype=torch.float64)
    return _back(wins / pairs, uncertainty)  # nan for 0 / 0


def spearman(uncertainty: Tensor, errors: Tensor, *, validate_args: bool | None = None) -> Tensor:
    r"""Spearman's rank correlation: Pearson's correlation of the ranks, ties with their average rank.

    For an uncertainty against the errors (larger is better), or against a known noise level; the two may be exchanged.
    It is nan when one of them is constant, as in SciPy (`torchmetrics.functional.spearman_corrcoef` gives 0 there, and
    its 32-bit rank sums overflow when some 65,000 values are equal).

    Args:
        uncertainty: Tensor (N,) of finite numbers.
        errors: Tensor (N,) of finite numbers.
        validate_args: Whether values are looked at, see above.

    Returns:
        Scalar in [-1, 1]; nan for fewer than two samples or constant input.

    Raises:
        ValueError: If shapes or devices disagree, or a value is not finite.
        TypeError: If a dtype is wrong.

    Example:
        >>> spearman(torch.tensor([0.1, 0.2, 0.3, 5.0]), torch.tensor([0.0, 1.0, 0.5, 3.0]))
        tensor(0.8000, dtype=torch.float64)
    """
    check_scores(uncertainty, errors, validate_args)
    a, b = (_centred_ranks(x) for x in finite_scores(uncertainty, errors))
    correlation = (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()
    return _back(correlation.clamp(-1, 1), uncertainty)


def _back(result: Tensor, given: Tensor) -> Tensor:
    """The result where the data are."""
    return result.to(precision(given.device)).to(given.device)


def _centred_ranks(x: Tensor) -> Tensor:
    """Average ranks minus their mean, doubled."""
    ordered = x.sort().values
    below, not_above = (torch.searchsorted(ordered, x, right=right) for right in (False, True))
    return (below + not_above - x.numel()).double()


def sample_jaccard(
    probs: Tensor,
    labels: Tensor,
    unknown: Tensor | None = None,
    *,
    threshold: float | Tensor = 0.5,
    validate_args: bool | None = None,
) -> Tensor:
    r"""Jaccard index of predicted and true label set of every sample; its mean is the "accuracy" of the field.

    .. math::
        J_i = \frac{|y_i \wedge \hat y_i|}{\max(|y_i \vee \hat y_i|, 1)}, \qquad \hat y_i = [p_i > t]

    It is 0, not 1, when both sets are empty, as in `sklearn.metrics.jaccard_score(..., average="samples",
    zero_division=0)`. (`torchmetrics.functional.jaccard_index` averages over labels, not over samples.)

    Args:
        probs: Tensor (N, Q) of probabilities in [0, 1].
        labels: Tensor (N, Q) of 0 and 1, any real dtype.
        unknown: Bool tensor (N, Q), True where a label is not known: it is in neither set.
        threshold: A label is predicted where its probability is above this, in [0, 1]: one, or a tensor (Q,) or (1,).
        validate_args: Whether values are looked at, see above.

    Returns:
        Tensor (N,) in [0, 1]; nan for a sample of which no label is known, so `.nanmean()` is over those that count.

    Raises:
        ValueError: If shapes or devices disagree, or values are out of range.
        TypeError: If a dtype is wrong.

    Example:
        >>> probs = torch.tensor([[0.9, 0.6, 0.1], [0.2, 0.3, 0.1]])
        >>> sample_jaccard(probs, torch.tensor([[1, 0, 0], [0, 0, 0]]))
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    check_predictions(probs, labels, unknown, validate_args)
    _check_threshold(threshold, probs, validate_args)
    probs, present, known = predictions(probs, labels, unknown)
    predicted = (probs > threshold) & known
    union = (predicted | present).sum(1).to(precision(probs.device)).clamp_min(1)
    return ((predicted & present).sum(1) / union).masked_fill(~known.any(1), float("nan"))


def _check_threshold(threshold: float | Tensor, probs: Tensor, validate_args: bool | None) -> None:
    if not isinstance(threshold, Tensor):
        check_probability("threshold", threshold)
        return
    num_labels = 1 if threshold.shape == (1,) else probs.shape[1]
    check_tensor("threshold", threshold, "floating", "Q", {"Q": num_labels}, probs.device)
    if checks_values(threshold, validate_args):
        check_range("threshold", threshold, 0, 1)


def predictive_entropy(probs: Tensor, *, validate_args: bool | None = None) -> Tensor:
    r"""Entropy of the predicted labels, taken as independent: the usual uncertainty of a multi-label prediction.

    .. math::
        H_i = -\sum_q p_{iq} \ln p_{iq} + (1 - p_{iq}) \ln(1 - p_{iq})

    Args:
        probs: Tensor (N, Q) of probabilities in [0, 1]; 0 and 1 contribute nothing.
        validate_args: Whether values are looked at, see above.

    Returns:
        Tensor (N,) in nats, in [0, Q ln 2].

    Raises:
        ValueError: If the shape is wrong or values are out of range.
        TypeError: If the dtype is wrong.

    Example:
        >>> predictive_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([1.3863, 0.0000], dtype=torch.float64)
    """
    check_validate_args(validate_args)
    check_tensor("probs", probs, "floating", "N Q", {})
    if checks_values(probs, validate_args):
        check_range("probs", probs, 0, 1)
    return _entropy(probs).sum(1)


def _entropy(probs: Tensor) -> Tensor:
    p = probs.to(precision(probs.device))
    entropy: Tensor = torch.special.entr(p) - torch.special.xlog1py(1 - p, -p)
    return entropy


def modality_attribution(
    sizes: Tensor, missing: Tensor | None = None, *, validate_args: bool | None = None
) -> Tensor:
    r"""Share of every modality when each counts with its precision.

    .. math::
        a_{im} = \frac{s_{im}^{-2}}{\sum_{m'} s_{im'}^{-2}} \quad \text{over the modalities that are there}

    the weights of the best unbiased combination of independent measurements with standard deviations :math:`s`.

    To average over samples, take those that have the same modalities, or all of them with the 0 of what is missing. The
    mean of every modality over the samples that have it is over other samples for each, and does not add up to 1.

    Args:
        sizes: Tensor (B, M), the size of the uncertainty of every modality, above 0: the norm of its standard
            deviations, say. Only ratios within a row matter.
        missing: Bool tensor (B, M), True where a sample does not have a modality. What stands there has no influence.
        validate_args: Whether values are looked at, see above.

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
    check_validate_args(validate_args)
    dims: dict[str, int] = {}
    check_tensor("sizes", sizes, "floating", "B M", dims)
    check_missing(missing, dims, sizes.device)
    left_out = torch.zeros_like(sizes, dtype=torch.bool) if missing is None else missing
    if checks_values(sizes, validate_args):
        check_finite("sizes", sizes, missing)
        kept = sizes[~left_out]
        if (kept <= 0).any():
            raise ValueError(f"Expected `sizes` to be above 0, but got {kept.min().item()}")
    dtype = precision(sizes.device)
    size = sizes.to(dtype).masked_fill(left_out, float("inf"))
    if size.shape[1] == 0:
        return size
    smallest = size.amin(1, keepdim=True).clamp_max(torch.finfo(dtype).max)
    share = (smallest / size).square()  # at most 1; 0 where the size is infinite
    return share / share.sum(1, keepdim=True).clamp_min(1)


def evaluate(
    probs: Tensor,
    labels: Tensor,
    threshold: float | Tensor,
    unknown: Tensor | None = None,
    *,
    validate_args: bool | None = None,
) -> dict[str, float | None]:
    r"""The table of the field's measures and of those of uncertainty, for a whole data set.

    ========  ==========================================================================================================
    `Acc`     mean of :func:`sample_jaccard`, over the samples with any known label
    `P`       micro precision: the share of the predicted labels that are present; 0 where none is predicted
    `R`       micro recall: the share of the labels that are present that are predicted; 0 where none is present
    `miF1`    micro F1: :math:`2 P R / (P + R)`
    `mAP`     average precision, without interpolation, mean over the labels that somebody has
    `Brier`   mean of :math:`(p - y)^2` over all entries
    `ECE`     :func:`calibration_error`
    `AURC`    of :func:`risk_coverage`, from the entropy of a sample's labels and its error
    `rho`     :func:`spearman` of the same two
    ========  ==========================================================================================================

    The error of a sample is the mean of :math:`|p - y|`, and its uncertainty the mean of the entropies, over its known
    labels. With all labels known that orders the samples as :func:`predictive_entropy` does.

    A sample without any label counts 0 in `Acc` however well it is predicted, so `Acc` can be 0.833 where P, R and F1
    are all 1: one such sample among six.

    Args:
        probs: Tensor (N, Q) of probabilities in [0, 1].
        labels: Tensor (N, Q) of 0 and 1, any real dtype.
        threshold: A label is predicted where its probability is above this, in [0, 1]: one, or a tensor (Q,) or (1,).
        unknown: Bool tensor (N, Q), True where a label is not known.
        validate_args: Whether values are looked at, see above.

    Returns:
        The measures by name, rounded to 4 digits; None where a measure does not exist.

    Raises:
        ValueError: If shapes or devices disagree, or values are out of range.
        TypeError: If a dtype is wrong.

    Example:
        >>> probs = torch.tensor([[0.9, 0.2], [0.4, 0.7], [0.1, 0.3]])
        >>> labels = torch.tensor([[1, 0], [0, 1], [0, 0]])
        >>> table = evaluate(probs, labels, threshold=0.5)
        >>> table["miF1"], table["Acc"]  # the third sample counts 0
        (1.0, 0.6667)
        >>> evaluate(probs, labels, 0.5, unknown=labels.sum(1, keepdim=True).expand(3, 2) == 0)["Acc"]
        1.0
    """
    accuracy = sample_jaccard(
        probs, labels, unknown, threshold=threshold, validate_args=validate_args
    )
    calibration = calibration_error(probs, labels, unknown, validate_args=False)
    p, present, known = predictions(probs, labels, unknown)
    predicted = (p > threshold) & known
    dtype = precision(p.device)
    hits, said, true = (x.sum().to(dtype) for x in (predicted & present, predicted, present))
    nothing = ~known.any()
    p, y, count = p.to(dtype), present.to(dtype), known.sum(1).to(dtype)
    error = (p - y).abs().sum(1) / count
    uncertainty = (_entropy(p) * known).sum(
        1
    ) / count  # nan, and so left out, where nothing is known
    measures = {
        "Acc": accuracy.nanmean(),
        "P": (hits / said.clamp_min(1)).masked_fill(nothing, float("nan")),
        "R": (hits / true.clamp_min(1)).masked_fill(nothing, float("nan")),
        "miF1": (2 * hits / (said + true).clamp_min(1)).masked_fill(nothing, float("nan")),
        "mAP": _average_precision(p, present, known).nanmean(),
        "Brier": (p - y).square().sum() / count.sum(),
        "ECE": calibration,
        "AURC": risk_coverage(uncertainty, error, validate_args=False).aurc,
        "rho": spearman(uncertainty, error, validate_args=False),
    }
    values = {name: round(float(value.detach()), 4) for name, value in measures.items()}
    return {name: None if value != value else value for name, value in values.items()}


def _average_precision(probs: Tensor, present: Tensor, known: Tensor) -> Tensor:
    """Average precision (Q,), equal probabilities at one rank; nan for a label that nobody has.

    It is the mean, over those who have the label, of the precision among all that are at least as probable.
    """
    columns = probs.T.contiguous()

    def at_least(counted: Tensor) -> Tensor:
        ordered = probs.masked_fill(~counted, -1).T.sort(dim=1).values
        return len(probs) - torch.searchsorted(ordered.contiguous(), columns)

    share = at_least(present) / at_least(known).to(probs.dtype).clamp_min(1)
    return (share * present.T).sum(1) / present.sum(0)


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
