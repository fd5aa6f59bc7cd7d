"""How much better predictions are without the uncertain samples, over batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from uncertainty_mm._checks import check_flag, check_probability
from uncertainty_mm.metrics._base import Accumulated, OfScores
from uncertainty_mm.metrics._inputs import back
from uncertainty_mm.metrics.functional import (
    augrc,
    coverage_at_risk,
    risk_at_coverage,
    risk_coverage,
)
from uncertainty_mm.metrics.functional.selective import (
    agreement,
    check_coverage,
    check_risk,
    check_selection,
    f1_at,
)

__all__ = ["AUGRC", "AURC", "CoverageAtRisk", "RiskAtCoverage", "SelectiveF1"]


class AURC(OfScores):
    """Area under the risk-coverage curve, :func:`~uncertainty_mm.metrics.functional.risk_coverage` over batches.

    `update(uncertainty, errors)` takes the arguments of the function. It stores two numbers per sample.

    Args:
        excess: Return E-AURC, the excess over the area of the best order, instead of AURC.
        validate_args: Check values on the CPU only (None), never (False), or always (True).
        settings: For `torchmetrics.Metric`.

    Raises:
        TypeError: If `excess` is not a bool.

    Example:
        >>> metric = AURC()
        >>> metric.update(uncertainty=torch.tensor([0.1, 0.9]), errors=torch.tensor([0, 1]))
        >>> metric.compute()  # (0 + 1/2) / 2
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    excess: bool

    def __init__(
        self, *, excess: bool = False, validate_args: bool | None = None, **settings: Any
    ) -> None:
        super().__init__(validate_args, settings)
        check_flag("excess", excess)
        self._set(excess=excess)

    def compute(self) -> Tensor:
        """The area so far, a scalar; nan without samples."""
        curve = risk_coverage(*self._all(), validate_args=False)
        return curve.eaurc if self.excess else curve.aurc


class AUGRC(OfScores):
    """Area under the generalised risk-coverage curve, :func:`~uncertainty_mm.metrics.functional.augrc` over batches.

    `update(uncertainty, errors)` takes the arguments of the function. It stores two numbers per sample.

    Args:
        validate_args: Check values on the CPU only (None), never (False), or always (True).
        settings: For `torchmetrics.Metric`.

    Example:
        >>> metric = AUGRC()
        >>> metric.update(uncertainty=torch.tensor([0.1, 0.9]), errors=torch.tensor([0, 1]))
        >>> metric.compute()  # 1/2 * 1 / 4
        tensor(0.1250, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def __init__(self, *, validate_args: bool | None = None, **settings: Any) -> None:
        super().__init__(validate_args, settings)

    def compute(self) -> Tensor:
        """The area so far, a scalar; nan without samples."""
        return augrc(*self._all(), validate_args=False)


class RiskAtCoverage(OfScores):
    """Mean error at a given coverage, :func:`~uncertainty_mm.metrics.functional.risk_at_coverage` over batches.

    `update(uncertainty, errors)` takes the arguments of the function. It stores two numbers per sample.

    Args:
        coverage: The share of samples to answer, above 0 and at most 1.
        validate_args: Check values on the CPU only (None), never (False), or always (True).
        settings: For `torchmetrics.Metric`.

    Raises:
        ValueError: If `coverage` is out of range.
        TypeError: If `coverage` is not a number.

    Example:
        >>> metric = RiskAtCoverage(0.75)
        >>> metric.update(torch.tensor([0.1, 0.2, 0.3, 0.9]), torch.tensor([0, 1, 0, 1]))
        >>> metric.compute()
        tensor(0.3333, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    coverage: float

    def __init__(
        self, coverage: float, *, validate_args: bool | None = None, **settings: Any
    ) -> None:
        super().__init__(validate_args, settings)
        check_coverage(coverage)
        self._set(coverage=coverage)

    def compute(self) -> Tensor:
        """The mean error so far, a scalar; nan without samples."""
        return risk_at_coverage(*self._all(), self.coverage, validate_args=False)


class CoverageAtRisk(OfScores):
    """Coverage at a given risk, :func:`~uncertainty_mm.metrics.functional.coverage_at_risk` over batches.

    `update(uncertainty, errors)` takes the arguments of the function. It stores two numbers per sample.

    Args:
        risk: The largest acceptable mean error.
        validate_args: Check values on the CPU only (None), never (False), or always (True).
        settings: For `torchmetrics.Metric`.

    Raises:
        ValueError: If `risk` is not finite.
        TypeError: If `risk` is not a number.

    Example:
        >>> metric = CoverageAtRisk(0.4)
        >>> metric.update(torch.tensor([0.1, 0.2, 0.3, 0.9]), torch.tensor([0, 1, 0, 1]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    risk: float

    def __init__(self, risk: float, *, validate_args: bool | None = None, **settings: Any) -> None:
        super().__init__(validate_args, settings)
        check_risk(risk)
        self._set(risk=risk)

    def compute(self) -> Tensor:
        """The share so far, a scalar; nan without samples."""
        return coverage_at_risk(*self._all(), self.risk, validate_args=False)


class SelectiveF1(Accumulated):
    """Micro F1 of the most certain samples, :func:`~uncertainty_mm.metrics.functional.selective_f1` over batches.

    `update(uncertainty, probs, labels, unknown=None)` takes the arguments of the function. It stores three numbers per
    sample.

    Args:
        coverage: The share of samples to answer, above 0 and at most 1.
        threshold: A label is predicted where its probability is above this, in [0, 1].
        validate_args: Check values on the CPU only (None), never (False), or always (True).
        settings: For `torchmetrics.Metric`.

    Raises:
        ValueError: If `coverage` or `threshold` is out of range.
        TypeError: If `coverage` or `threshold` is not a number.

    Example:
        >>> metric = SelectiveF1(coverage=0.6)
        >>> probs = torch.tensor([[0.9, 0.2], [0.6, 0.7], [0.4, 0.4]])
        >>> labels = torch.tensor([[1, 0], [0, 1], [1, 0]])
        >>> metric.update(torch.tensor([0.1]), probs[:1], labels[:1])
        >>> metric.update(torch.tensor([0.3, 0.9]), probs[1:], labels[1:])
        >>> metric.compute()
        tensor(0.8000, dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    coverage: float
    threshold: float
    uncertainty: list[Tensor]
    sets: list[Tensor]

    def __init__(
        self,
        coverage: float,
        *,
        threshold: float = 0.5,
        validate_args: bool | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(validate_args, settings)
        check_coverage(coverage)
        check_probability("threshold", threshold)
        self._set(coverage=coverage, threshold=threshold)
        self.add_state("uncertainty", [], dist_reduce_fx="cat")
        self.add_state("sets", [], dist_reduce_fx="cat")
        # A `MetricCollection` merges metrics of equal state; this keeps those of different thresholds apart.
        at = torch.full((), float(threshold), dtype=self.dtype, device=self.device)
        self.add_state("at", at, dist_reduce_fx="max")

    def _check(
        self, uncertainty: Tensor, probs: Tensor, labels: Tensor, unknown: Tensor | None = None
    ) -> None:
        check_selection(uncertainty, probs, labels, unknown, self.validate_args)

    def update(
        self, uncertainty: Tensor, probs: Tensor, labels: Tensor, unknown: Tensor | None = None
    ) -> None:
        """Adds a batch.

        Args:
            uncertainty: Tensor (N,) of finite numbers; larger is less certain.
            probs: Tensor (N, Q) of probabilities in [0, 1].
            labels: Tensor (N, Q) of 0 and 1, any real dtype.
            unknown: Bool tensor (N, Q), True where a label is not known.

        Raises:
            ValueError: If shapes or devices disagree, or a value is not finite or out of range.
            TypeError: If a dtype is wrong.
        """
        self._check(uncertainty, probs, labels, unknown)
        score, sets = agreement(
            uncertainty.detach(), probs.detach(), labels, unknown, self.threshold
        )
        self.uncertainty.append(score)
        self.sets.append(sets)

    def compute(self) -> Tensor:
        """Micro F1 of the most certain samples so far, a scalar; nan without samples."""
        if not len(self.uncertainty):
            return torch.full((), float("nan"), dtype=self.dtype, device=self.device)
        score, sets = dim_zero_cat(self.uncertainty), dim_zero_cat(self.sets)
        return back(f1_at(self.coverage, score, sets), score)
