"""How well an uncertainty ranks samples by their errors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_choice,
    check_finite,
    check_labels,
    check_probability,
    check_tensor,
    check_unknown,
    check_validate_args,
    checks_values,
)
from uncertainty_mm.metrics._binning import Average, averaged
from uncertainty_mm.metrics._inputs import back, check_scores, enough, finite_scores, precision

__all__ = ["auroc", "by_label", "fpr_at_tpr", "spearman"]


def auroc(uncertainty: Tensor, errors: Tensor, *, validate_args: bool | None = None) -> Tensor:
    r"""Probability that a wrong prediction is more uncertain than a correct one, where ties count half.

    .. math::
        \mathrm{AUROC} = P(u^+ > u^-) + \tfrac12 P(u^+ = u^-)

    It measures how well an uncertainty `u` detects errors. It can also measure whether `u` rises on corrupted input, by
    `auroc(torch.cat([u_clean, u_corrupted]), corrupted)` with 1 for corrupted samples. The scores may be any finite
    numbers (`torchmetrics.functional.auroc` passes scores outside [0, 1] through a sigmoid, which makes large ones
    equal).

    Args:
        uncertainty: Tensor (N,) of finite numbers; larger is less certain.
        errors: Tensor (N,) of 0 and 1 or bool, whether the prediction was wrong.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        Scalar in [0, 1], 1/2 for uninformative scores; nan unless there are both errors and correct predictions.

    Raises:
        ValueError: If shapes or devices disagree, an uncertainty is not finite, or an error is not 0 or 1.
        TypeError: If a dtype is wrong.

    Example:
        >>> uncertainty = torch.tensor([0.1, 0.5, 0.5, 2.0])
        >>> auroc(uncertainty, torch.tensor([0, 0, 1, 1]))  # 3 pairs in order, one tie
        tensor(0.8750, dtype=torch.float64)
    """
    wrong, right = _wrong_and_right(uncertainty, errors, validate_args)
    right = right.sort().values
    below = torch.searchsorted(right, wrong)
    not_above = torch.searchsorted(right, wrong, right=True)
    wins = (below + not_above).sum() / 2
    pairs = wins.new_tensor(len(wrong) * len(right), dtype=torch.float64)
    return back(wins / pairs, uncertainty)  # nan for 0 / 0


def fpr_at_tpr(
    uncertainty: Tensor,
    errors: Tensor,
    *,
    tpr: float = 0.95,
    validate_args: bool | None = None,
) -> Tensor:
    r"""Share of correct predictions that are flagged when most of the wrong ones are: FPR95.

    .. math::
        \mathrm{FPR} = P(u^- \ge t), \qquad t = \max \{\, t' : P(u^+ \ge t') \ge \mathrm{TPR} \,\}

    where :math:`u^+` is the uncertainty of a wrong prediction and :math:`u^-` that of a correct one. Samples of equal
    uncertainty are on the same side of the threshold, so the order of rows does not matter.

    As in :func:`auroc`, `errors` marks the samples to detect. In the detection of foreign input, it is often 95 % of
    the familiar input that is kept: `fpr_at_tpr(score, familiar)`, with a score that is larger for familiar input, such
    as :func:`joint_energy`.

    Args:
        uncertainty: Tensor (N,) of finite numbers; larger is less certain.
        errors: Tensor (N,) of 0 and 1 or bool, whether the prediction was wrong.
        tpr: The least share of errors to detect, in [0, 1].
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        Scalar in [0, 1], smaller is better; nan unless there are both errors and correct predictions.

    Raises:
        ValueError: If shapes or devices disagree, a value is not finite or out of range, or an error is not 0 or 1.
        TypeError: If a dtype is wrong.

    Example:
        >>> uncertainty = torch.tensor([0.1, 0.5, 0.4, 2.0])
        >>> errors = torch.tensor([0, 0, 1, 1])  # at 0.4 both are detected
        >>> fpr_at_tpr(uncertainty, errors)
        tensor(0.5000, dtype=torch.float64)
    """
    check_probability("tpr", tpr)
    wrong, right = _wrong_and_right(uncertainty, errors, validate_args)
    if not len(wrong) or not len(right):
        return back(wrong.new_tensor(float("nan")), uncertainty)
    found = enough(tpr, len(wrong))
    threshold = wrong.sort(descending=True).values[found - 1] if found else float("inf")
    return back((right >= threshold).double().mean(), uncertainty)


def spearman(uncertainty: Tensor, errors: Tensor, *, validate_args: bool | None = None) -> Tensor:
    r"""Spearman's rank correlation: Pearson's correlation of the ranks, where ties get their average rank.

    It compares an uncertainty with the errors (larger is better) or with a known noise level, and is symmetric. It is
    nan if one of the two is constant, as in SciPy (`torchmetrics.functional.spearman_corrcoef` gives 0 there, and its
    32-bit rank sums overflow if some 65,000 values are equal).

    Args:
        uncertainty: Tensor (N,) of finite numbers.
        errors: Tensor (N,) of finite numbers.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

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
    return back(correlation.clamp(-1, 1), uncertainty)


def by_label(
    measure: Callable[[Tensor, Tensor], Tensor],
    uncertainty: Tensor,
    errors: Tensor,
    unknown: Tensor | None = None,
    *,
    average: Average = "macro",
    validate_args: bool | None = None,
) -> Tensor:
    """Applies a measure of uncertainty and error to each label separately, over the samples whose label is known.

    Args:
        measure: Function of `(uncertainty, errors)`, both (n,), that returns a scalar: :func:`auroc`, :func:`augrc`, or
            `lambda u, e: risk_coverage(u, e).aurc`.
        uncertainty: Tensor (N, Q) of finite numbers; larger is less certain.
        errors: Tensor (N, Q) of finite errors.
        unknown: Bool tensor (N, Q), True where a label is not known and left out.
        average: `"macro"`, the mean over the labels for which the measure is defined, or `"none"`.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        Scalar, or (Q,) for `"none"`; nan where the measure is undefined.

    Raises:
        ValueError: If shapes or devices disagree, a known value is not finite, or an option is unknown.
        TypeError: If a dtype is wrong.

    Example:
        >>> uncertainty = torch.tensor([[0.1, 0.2], [0.6, 0.5], [0.9, 0.7]])
        >>> wrong = torch.tensor([[0, 1], [0, 0], [1, 0]])
        >>> by_label(auroc, uncertainty, wrong, average="none")
        tensor([1., 0.], dtype=torch.float64)
    """
    check_choice("average", average, ("macro", "none"))
    check_validate_args(validate_args)
    sizes: dict[str, int] = {}
    check_tensor("uncertainty", uncertainty, "number", "N Q", sizes)
    check_tensor("errors", errors, "number", "N Q", sizes, uncertainty.device)
    check_unknown(unknown, "N Q", sizes, uncertainty.device)
    if checks_values(uncertainty, validate_args):
        dtype = precision(uncertainty.device)
        check_finite("uncertainty", uncertainty.to(dtype), unknown)
        check_finite("errors", errors.to(dtype), unknown)
    known = uncertainty.isfinite() & errors.isfinite()
    if unknown is not None:
        known = known & ~unknown
    columns = zip(uncertainty.T, errors.T, known.T, strict=True)
    values = [measure(u[kept], e[kept]) for u, e, kept in columns]
    none = torch.zeros(0, dtype=precision(uncertainty.device), device=uncertainty.device)
    return averaged(torch.stack(values) if values else none, average)


def _wrong_and_right(
    uncertainty: Tensor, errors: Tensor, validate_args: bool | None
) -> tuple[Tensor, Tensor]:
    """The uncertainties of wrong and of correct predictions."""
    check_scores(uncertainty, errors, validate_args)
    if checks_values(errors, validate_args):
        check_labels("errors", errors)
    score, error = finite_scores(uncertainty, errors)
    return score[error > 0.5], score[error <= 0.5]


def _centred_ranks(x: Tensor) -> Tensor:
    """Twice the average ranks, minus their mean."""
    ordered = x.sort().values
    below, not_above = (torch.searchsorted(ordered, x, right=right) for right in (False, True))
    return (below + not_above - x.numel()).double()
