"""How much better predictions are without the most uncertain samples."""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from uncertainty_mm._checks import check_finite, check_number, check_tensor, checks_values
from uncertainty_mm.metrics._inputs import (
    back,
    check_predictions,
    check_scores,
    check_threshold,
    enough,
    finite_scores,
    precision,
    predictions,
)

__all__ = [
    "RiskCoverage",
    "augrc",
    "coverage_at_risk",
    "risk_at_coverage",
    "risk_coverage",
    "selective_f1",
]


class RiskCoverage(NamedTuple):
    """The mean error if only the most certain samples are answered.

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
    r"""Computes the risk-coverage curve: the mean error of the k most certain samples, for every k.

    .. math::
        \text{risk}(k) = \frac{1}{k} \sum_{i=1}^{k} e_{(i)}, \qquad
        \mathrm{AURC} = \frac{1}{N} \sum_{k=1}^{N} \text{risk}(k), \qquad
        \text{E-AURC} = \mathrm{AURC} - \mathrm{AURC}^*

    where (i) sorts by uncertainty, and :math:`\mathrm{AURC}^*` sorts by the errors themselves (exactly, not with the
    approximation :math:`r + (1 - r) \ln(1 - r)`). Samples of equal uncertainty each count with their mean error, which
    is the expectation over random orders, so the order of rows does not matter.

    Source: Geifman et al. 2019, arXiv 1805.08206.

    Args:
        uncertainty: Tensor (N,) of finite numbers; larger is less certain.
        errors: Tensor (N,) of finite errors: 0 and 1 (or bool), or graded ones, such as 1 minus
            :func:`sample_jaccard`.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

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
    risk, best = _risk(score, error), _risk(error, error)
    excess = (risk.mean() - best.mean()).clamp_min(0)  # rounding
    curve = (_steps(risk) / max(len(risk), 1), risk, risk.mean(), excess)
    return RiskCoverage(*(back(x, uncertainty) for x in curve))


def augrc(uncertainty: Tensor, errors: Tensor, *, validate_args: bool | None = None) -> Tensor:
    r"""Area under the generalised risk-coverage curve: how often a wrong answer is given.

    .. math::
        \mathrm{AUGRC} = \int_0^1 \mathrm{GRC}(c) \, dc
        = \frac{1}{N^2} \sum_{i=1}^{N} \bigl(N - i + \tfrac12\bigr) e_{(i)}, \qquad
        \mathrm{GRC}\Bigl(\frac{k}{N}\Bigr) = \frac{1}{N} \sum_{i=1}^{k} e_{(i)}

    with straight lines between these points, from 0 at coverage 0. It is the mean error over all thresholds, where an
    answer that is not given costs nothing; AURC divides by the number of answers instead, and so gives most weight to
    the first few. For errors of 0 and 1 it is :math:`(1 - \mathrm{AUROC}) a (1 - a) + (1 - a)^2 / 2`, with :math:`a`
    the share of correct predictions. Equal uncertainties are treated as in :func:`risk_coverage`.

    Source: Traub et al. 2024, arXiv 2407.01032.

    Args:
        uncertainty: Tensor (N,) of finite numbers; larger is less certain.
        errors: Tensor (N,) of finite errors, as for :func:`risk_coverage`.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        Scalar, in [0, 1/2] for errors in [0, 1], smaller is better; nan without samples.

    Raises:
        ValueError: If shapes or devices disagree, or a value is not finite.
        TypeError: If a dtype is wrong.

    Example:
        >>> uncertainty, errors = torch.tensor([[0.1, 0.2, 0.2, 0.9], [0, 1, 0, 1]])
        >>> augrc(uncertainty, errors)  # (2.5 / 2 + 1.5 / 2 + 0.5) / 16
        tensor(0.1562, dtype=torch.float64)
    """
    check_scores(uncertainty, errors, validate_args)
    risk = _risk(*finite_scores(uncertainty, errors))
    wrong = risk * _steps(risk)  # among the k most certain, for every k
    middle = (wrong + F.pad(wrong, (1, 0))[:-1]) / 2
    return back(middle.mean() / max(len(risk), 1), uncertainty)


def risk_at_coverage(
    uncertainty: Tensor, errors: Tensor, coverage: float, *, validate_args: bool | None = None
) -> Tensor:
    r"""Mean error if only a given share of the samples, the most certain ones, is answered.

    It is :math:`\text{risk}(k)` of :func:`risk_coverage`, at the smallest :math:`k` for which :math:`k / N` is at least
    the coverage.

    Args:
        uncertainty: Tensor (N,) of finite numbers; larger is less certain.
        errors: Tensor (N,) of finite errors, as for :func:`risk_coverage`.
        coverage: The share of samples to answer, above 0 and at most 1.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        Scalar; nan without samples.

    Raises:
        ValueError: If shapes or devices disagree, a value is not finite, or `coverage` is out of range.
        TypeError: If a dtype is wrong, or `coverage` is not a number.

    Example:
        >>> uncertainty = torch.tensor([0.1, 0.2, 0.3, 0.9])
        >>> risk_at_coverage(uncertainty, torch.tensor([0, 1, 0, 1]), coverage=0.75)
        tensor(0.3333, dtype=torch.float64)
    """
    check_coverage(coverage)
    check_scores(uncertainty, errors, validate_args)
    risk = _risk(*finite_scores(uncertainty, errors))
    return back(_at(coverage, risk), uncertainty)


def coverage_at_risk(
    uncertainty: Tensor, errors: Tensor, risk: float, *, validate_args: bool | None = None
) -> Tensor:
    r"""Largest share of samples, the most certain ones, that can be answered with a mean error of at most `risk`.

    .. math::
        \max \{ \tfrac{k}{N} : \text{risk}(k) \le r \} \quad \text{or 0}

    of the curve of :func:`risk_coverage`. It describes only these samples; to bound the risk of other samples, use
    :class:`~uncertainty_mm.ConformalRiskControl`.

    Args:
        uncertainty: Tensor (N,) of finite numbers; larger is less certain.
        errors: Tensor (N,) of finite errors, as for :func:`risk_coverage`.
        risk: The largest acceptable mean error.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        Scalar in [0, 1], larger is better; nan without samples.

    Raises:
        ValueError: If shapes or devices disagree, or a value is not finite.
        TypeError: If a dtype is wrong, or `risk` is not a number.

    Example:
        >>> uncertainty = torch.tensor([0.1, 0.2, 0.3, 0.9])
        >>> coverage_at_risk(uncertainty, torch.tensor([0, 1, 0, 1]), risk=0.4)
        tensor(0.7500, dtype=torch.float64)
    """
    check_risk(risk)
    check_scores(uncertainty, errors, validate_args)
    curve = _risk(*finite_scores(uncertainty, errors))
    answered = (_steps(curve) * (curve <= risk)).amax() if len(curve) else curve.sum()
    return back(answered / len(curve), uncertainty)


def selective_f1(
    uncertainty: Tensor,
    probs: Tensor,
    labels: Tensor,
    unknown: Tensor | None = None,
    *,
    coverage: float,
    threshold: float | Tensor = 0.5,
    validate_args: bool | None = None,
) -> Tensor:
    r"""Micro F1 of a given share of the samples, the most certain ones.

    .. math::
        F_1(k) = \frac{2 \sum_{i=1}^{k} |y_{(i)} \wedge \hat y_{(i)}|}{\sum_{i=1}^{k} |y_{(i)}| + |\hat y_{(i)}|},
        \qquad \hat y_i = [p_i > t]

    where (i) sorts by uncertainty, at the smallest :math:`k` for which :math:`k / N` is at least the coverage. Samples
    of equal uncertainty each count with the means of their terms, so the order of rows does not matter.

    Args:
        uncertainty: Tensor (N,) of finite numbers; larger is less certain.
        probs: Tensor (N, Q) of probabilities in [0, 1].
        labels: Tensor (N, Q) of 0 and 1, any real dtype.
        unknown: Bool tensor (N, Q), True where a label is not known. A sample without known labels does not count.
        coverage: The share of samples to answer, above 0 and at most 1.
        threshold: A label is predicted where its probability is above this, in [0, 1]: a number, or a tensor (Q,) or
            (1,).
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        Scalar in [0, 1], larger is better; 0 if no label is present or predicted, nan without samples.

    Raises:
        ValueError: If shapes or devices disagree, or a value is not finite or out of range.
        TypeError: If a dtype is wrong, or `coverage` is not a number.

    Example:
        >>> probs = torch.tensor([[0.9, 0.2], [0.6, 0.7], [0.4, 0.4]])
        >>> labels = torch.tensor([[1, 0], [0, 1], [1, 0]])
        >>> selective_f1(torch.tensor([0.1, 0.3, 0.9]), probs, labels, coverage=0.6)
        tensor(0.8000, dtype=torch.float64)
    """
    check_coverage(coverage)
    check_selection(uncertainty, probs, labels, unknown, validate_args)
    check_threshold(threshold, probs, validate_args)
    given = agreement(uncertainty, probs, labels, unknown, threshold)
    return back(f1_at(coverage, *given), uncertainty)


def check_coverage(coverage: float) -> None:
    ok = isinstance(coverage, Real) and 0 < coverage <= 1
    check_number("coverage", coverage, "above 0 and at most 1", ok)


def check_risk(risk: float) -> None:
    check_number(
        "risk", risk, "that is finite", isinstance(risk, Real) and abs(risk) < float("inf")
    )


def check_selection(
    uncertainty: Tensor,
    probs: Tensor,
    labels: Tensor,
    unknown: Tensor | None,
    validate_args: bool | None,
) -> None:
    check_predictions(probs, labels, unknown, validate_args)
    check_tensor("uncertainty", uncertainty, "number", "N", {"N": len(probs)}, probs.device)
    if checks_values(uncertainty, validate_args):
        left_out = None if unknown is None else unknown.all(1)
        check_finite("uncertainty", uncertainty.to(precision(probs.device)), left_out)


def agreement(
    uncertainty: Tensor,
    probs: Tensor,
    labels: Tensor,
    unknown: Tensor | None,
    threshold: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Uncertainty (N,), nan if no label is known, and the numerator and denominator of F1, (N, 2)."""
    probs, present, known = predictions(probs, labels, unknown)
    predicted = (probs > threshold) & known
    score = uncertainty.to(precision(probs.device)).masked_fill(~known.any(1), float("nan"))
    sets = torch.stack([2 * (predicted & present).sum(1), predicted.sum(1) + present.sum(1)], 1)
    return score, sets


def f1_at(coverage: float, score: Tensor, sets: Tensor) -> Tensor:
    """Micro F1 of the samples that are kept, from the results of :func:`agreement`."""
    score, sets = score.detach().cpu().double(), sets.cpu().double()
    counts = score.isfinite()
    sums, _ = _summed(score[counts], sets[counts])
    both, either = sums.unbind(1)
    return _at(coverage, both / either.masked_fill(either == 0, 1))


def _risk(score: Tensor, error: Tensor) -> Tensor:
    """Mean error (N,) of the k samples with the lowest scores, for every k."""
    sums, size = _summed(score, error.unsqueeze(1))
    return sums.squeeze(1) / (size * _steps(error))


def _summed(score: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (N, C) of the values (N, C) of the k samples with the lowest scores, for every k, and their scale (N,).

    For samples of equal score, this is the expectation over random orders. The sums are multiplied by the number of
    such samples, the scale, so that sums of integers are exact.
    """
    _, group, size = torch.unique(score, return_inverse=True, return_counts=True)
    of_group = values.new_zeros(len(size), values.shape[1]).index_add_(0, group, values)
    before = F.pad(of_group.cumsum(0), (0, 0, 1, 0))[:-1]
    # position in its group, from 1
    place = _steps(score) - (size.cumsum(0) - size).repeat_interleave(size)
    before, of_group = (x.repeat_interleave(size, dim=0) for x in (before, of_group))
    scale = size.repeat_interleave(size).double()
    return before * scale.unsqueeze(1) + of_group * place.unsqueeze(1), scale


def _steps(like: Tensor) -> Tensor:
    """The numbers 1, 2, ..., N."""
    return torch.arange(1, len(like) + 1, dtype=torch.float64, device="cpu")


def _at(coverage: float, curve: Tensor) -> Tensor:
    """The value of a curve over 1/N, 2/N, ..., 1; nan without samples."""
    if not len(curve):
        return curve.mean()
    return curve[max(enough(coverage, len(curve)), 1) - 1]
