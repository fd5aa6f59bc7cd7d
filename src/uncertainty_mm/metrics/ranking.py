"""Whether an uncertainty ranks the samples as their errors do, over batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from uncertainty_mm._checks import check_flag, check_labels, checks_values
from uncertainty_mm.metrics._base import Accumulated
from uncertainty_mm.metrics._inputs import check_scores, finite_scores
from uncertainty_mm.metrics.functional import auroc, risk_coverage, spearman

__all__ = ["AURC", "DetectionAUROC", "SpearmanCorrelation"]


class _Ranking(Accumulated):
    """Keeps uncertainty and error of every sample, which a measure of order needs."""

    uncertainty: list[Tensor]
    errors: list[Tensor]

    def __init__(self, validate_args: bool | None, settings: dict[str, Any]) -> None:
        super().__init__(validate_args, settings)
        self.add_state("uncertainty", [], dist_reduce_fx="cat")
        self.add_state("errors", [], dist_reduce_fx="cat")

    def _check(self, uncertainty: Tensor, errors: Tensor) -> None:
        check_scores(uncertainty, errors, self.validate_args)

    def update(self, uncertainty: Tensor, errors: Tensor) -> None:
        """Adds a batch.

        Args:
            uncertainty: Tensor (N,) of finite numbers; larger is less sure.
            errors: Tensor (N,) of finite errors: 0 and 1 (or bool), or graded ones.

        Raises:
            ValueError: If shapes or devices disagree, or a value is not finite.
            TypeError: If a dtype is wrong.
        """
        self._check(uncertainty, errors)
        self.uncertainty.append(uncertainty.detach().to(self.dtype, copy=True))
        self.errors.append(errors.detach().to(self.dtype, copy=True))

    def _all(self) -> tuple[Tensor, Tensor]:
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        uncertainty, errors = (
            dim_zero_cat(x) if len(x) else empty for x in (self.uncertainty, self.errors)
        )
        return uncertainty, errors


class AURC(_Ranking):
    """Area under the risk-coverage curve, :func:`~uncertainty_mm.metrics.functional.risk_coverage` over batches.

    `update(uncertainty, errors)` takes what the function takes. It keeps two numbers of every sample.

    Args:
        excess: Give E-AURC, the area in excess of that of the best order, instead of AURC.
        validate_args: Whether values are looked at: None, on the CPU only; False, never; True, everywhere.
        settings: Of `torchmetrics.Metric`.

    Raises:
        TypeError: If `excess` is no bool.

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


class DetectionAUROC(_Ranking):
    """How well an uncertainty detects errors, or corrupted input: :func:`~uncertainty_mm.metrics.functional.auroc`.

    `update(uncertainty, errors)` takes what the function takes, errors of 0 and 1, or bool. It keeps two numbers of
    every sample. Unlike `torchmetrics.AUROC` it takes scores of any size as they are.

    Args:
        validate_args: Whether values are looked at: None, on the CPU only; False, never; True, everywhere.
        settings: Of `torchmetrics.Metric`.

    Example:
        >>> metric = DetectionAUROC()
        >>> metric.update(torch.tensor([0.1, 0.5, 0.5, 2.0]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.8750, dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, *, validate_args: bool | None = None, **settings: Any) -> None:
        super().__init__(validate_args, settings)

    def _check(self, uncertainty: Tensor, errors: Tensor) -> None:
        super()._check(uncertainty, errors)
        if checks_values(errors, self.validate_args):
            check_labels("errors", errors)

    def compute(self) -> Tensor:
        """The area so far, a scalar; nan unless there are errors and right predictions.

        Raises:
            ValueError: If graded errors came in by another metric of a `MetricCollection` that shares its state.
        """
        uncertainty, errors = self._all()
        if checks_values(errors, self.validate_args):
            check_labels("errors", finite_scores(uncertainty, errors)[1])
        return auroc(uncertainty, errors, validate_args=False)


class SpearmanCorrelation(_Ranking):
    """Rank correlation of uncertainty and error, :func:`~uncertainty_mm.metrics.functional.spearman` over batches.

    `update(uncertainty, errors)` takes what the function takes; `errors` may be any reference. It keeps two numbers of
    every sample. Unlike `torchmetrics.SpearmanCorrCoef` it gives nan for constant input, and is right for any number of
    ties.

    Args:
        validate_args: Whether values are looked at: None, on the CPU only; False, never; True, everywhere.
        settings: Of `torchmetrics.Metric`.

    Example:
        >>> metric = SpearmanCorrelation()
        >>> metric.update(torch.tensor([0.1, 0.2]), torch.tensor([0.0, 1.0]))
        >>> metric.update(torch.tensor([0.3, 5.0]), torch.tensor([0.5, 3.0]))
        >>> metric.compute()
        tensor(0.8000, dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    def __init__(self, *, validate_args: bool | None = None, **settings: Any) -> None:
        super().__init__(validate_args, settings)

    def compute(self) -> Tensor:
        """The correlation so far, a scalar; nan for fewer than two samples or constant input."""
        return spearman(*self._all(), validate_args=False)
