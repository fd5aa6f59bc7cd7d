"""How well an uncertainty ranks samples by their errors, over batches."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401  # for the examples
from torch import Tensor

from uncertainty_mm._checks import check_labels, check_probability, checks_values
from uncertainty_mm.metrics._base import OfScores
from uncertainty_mm.metrics._inputs import finite_scores
from uncertainty_mm.metrics.functional import auroc, fpr_at_tpr, spearman

__all__ = ["DetectionAUROC", "FPRAtTPR", "SpearmanCorrelation"]


class _Detection(OfScores):
    """A metric of errors that are 0 or 1."""

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def _check(self, uncertainty: Tensor, errors: Tensor) -> None:
        super()._check(uncertainty, errors)
        if checks_values(errors, self.validate_args):
            check_labels("errors", errors)

    def compute(self) -> Tensor:
        """The measure so far, a scalar; nan unless there are both errors and correct predictions.

        Raises:
            ValueError: If another metric of a `MetricCollection`, which shares its state, has added graded errors.
        """
        uncertainty, errors = self._all()
        if checks_values(errors, self.validate_args):
            check_labels("errors", finite_scores(uncertainty, errors)[1])
        return self._measure(uncertainty, errors)

    def _measure(self, uncertainty: Tensor, errors: Tensor) -> Tensor:
        """The measure of errors that have been checked."""
        raise NotImplementedError


class DetectionAUROC(_Detection):
    """How well an uncertainty detects errors or corrupted input: :func:`~uncertainty_mm.metrics.functional.auroc`.

    `update(uncertainty, errors)` takes the arguments of the function, with errors of 0 and 1, or bool. It stores two
    numbers per sample. Unlike `torchmetrics.AUROC` it does not transform scores outside [0, 1].

    Args:
        validate_args: Check values on the CPU only (None), never (False), or always (True).
        settings: For `torchmetrics.Metric`.

    Example:
        >>> metric = DetectionAUROC()
        >>> metric.update(torch.tensor([0.1, 0.5, 0.5, 2.0]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.8750, dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, *, validate_args: bool | None = None, **settings: Any) -> None:
        super().__init__(validate_args, settings)

    def _measure(self, uncertainty: Tensor, errors: Tensor) -> Tensor:
        return auroc(uncertainty, errors, validate_args=False)


class FPRAtTPR(_Detection):
    """Share of correct predictions flagged with the errors: :func:`~uncertainty_mm.metrics.functional.fpr_at_tpr`.

    `update(uncertainty, errors)` takes the arguments of the function, with errors of 0 and 1, or bool. It stores two
    numbers per sample.

    Args:
        tpr: The least share of errors to detect, in [0, 1].
        validate_args: Check values on the CPU only (None), never (False), or always (True).
        settings: For `torchmetrics.Metric`.

    Raises:
        ValueError: If `tpr` is out of range.
        TypeError: If `tpr` is not a number.

    Example:
        >>> metric = FPRAtTPR()
        >>> metric.update(torch.tensor([0.1, 0.5, 0.4, 2.0]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False
    tpr: float

    def __init__(
        self, *, tpr: float = 0.95, validate_args: bool | None = None, **settings: Any
    ) -> None:
        super().__init__(validate_args, settings)
        check_probability("tpr", tpr)
        self._set(tpr=tpr)

    def _measure(self, uncertainty: Tensor, errors: Tensor) -> Tensor:
        return fpr_at_tpr(uncertainty, errors, tpr=self.tpr, validate_args=False)


class SpearmanCorrelation(OfScores):
    """Rank correlation of uncertainty and error, :func:`~uncertainty_mm.metrics.functional.spearman` over batches.

    `update(uncertainty, errors)` takes the arguments of the function; `errors` may be any reference. It stores two
    numbers per sample. Unlike `torchmetrics.SpearmanCorrCoef` it gives nan for constant input, and is correct for any
    number of ties.

    Args:
        validate_args: Check values on the CPU only (None), never (False), or always (True).
        settings: For `torchmetrics.Metric`.

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
