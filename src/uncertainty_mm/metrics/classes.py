"""The measures of :mod:`uncertainty_mm.metrics.functional` that torchmetrics lacks, as `torchmetrics.Metric`.

They accumulate over batches and over the processes of `torch.distributed`. They need torchmetrics:
`pip install 'uncertainty-mm[metrics]'`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from uncertainty_mm._checks import (
    check_choice,
    check_flag,
    check_labels,
    check_positive_int,
    check_probability,
    finite_scores,
)
from uncertainty_mm.metrics._binning import (
    FINE_BINS,
    brier_of,
    calibration_of,
    check_binning,
    check_predictions,
    equal_width,
    fine_bins,
    histogram,
    merged,
)
from uncertainty_mm.metrics.functional import (
    BrierDecomposition,
    auroc,
    risk_coverage,
    sample_jaccard,
    spearman,
)

__all__ = [
    "AURC",
    "DetectionAUROC",
    "MultilabelBrierDecomposition",
    "MultilabelCalibrationError",
    "SampleJaccard",
    "SpearmanCorrelation",
]


class _Checked(Metric):
    """A metric that a refused batch leaves as it was."""

    def _check(self, *args: Any, **kwargs: Any) -> None:
        """Raises for a batch that cannot be added."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adds a batch and gives the measure of that batch alone."""
        # Before torchmetrics hands on a batch it resets the metric; what then raises would lose all batches so far.
        self._check(*args, **kwargs)
        return super().forward(*args, **kwargs)


class _Binned(_Checked):
    """Keeps a histogram of constant size, summed over processes in one reduction."""

    is_differentiable = False
    full_state_update = False
    sums: Tensor

    def __init__(
        self, num_labels: int, bins: int, binning: str, average: str, settings: dict[str, Any]
    ) -> None:
        super().__init__(**settings)
        check_positive_int("num_labels", num_labels)
        check_binning(bins, binning, average)
        self.num_labels = num_labels
        self.bins = bins
        self.binning = binning
        self.average = average
        size = bins if binning == "width" else FINE_BINS
        empty = torch.zeros(5, num_labels, size, dtype=torch.float64)
        self.add_state("sums", empty, dist_reduce_fx="sum")

    def _check(self, probs: Tensor, labels: Tensor) -> None:
        check_predictions(probs, labels, self.num_labels)

    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            probs: Tensor (N, Q) of probabilities in [0, 1].
            labels: Tensor (N, Q) of 0 and 1, any real dtype.

        Raises:
            ValueError: If shapes or devices disagree, or values are out of range.
            TypeError: If a dtype is wrong.
        """
        self._check(probs, labels)
        probs = probs.detach().to(torch.promote_types(probs.dtype, torch.float32))
        by_width = self.binning == "width"
        index = equal_width(probs, self.bins) if by_width else fine_bins(probs)
        self.sums = self.sums + histogram(probs, labels, index, self.sums.shape[2])

    def _histogram(self) -> Tensor:
        return self.sums if self.binning == "width" else merged(self.sums, self.bins)


class MultilabelCalibrationError(_Binned):
    """Calibration error of every label, :func:`~uncertainty_mm.metrics.functional.calibration_error` over batches.

    `update(probs, labels)` takes what the function takes. The state is a histogram, of a size that does not depend on
    the number of samples. Bins of equal width are exact. For bins of equal mass it keeps 4096 fine bins, of equal width
    in arcsin(sqrt(p)), and joins neighbours: a fine bin is not split, so the masses are equal up to that of a fine bin,
    and the result is that of the function where no fine bin holds two different probabilities.

    Args:
        num_labels: Number Q of labels.
        bins: Number of bins.
        binning: `"width"` or `"mass"`.
        norm: `"l1"`, `"l2"` or `"max"`.
        average: `"macro"`, the mean over labels, or `"none"`.
        settings: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument has the wrong type.

    Example:
        >>> metric = MultilabelCalibrationError(num_labels=1, bins=2)
        >>> metric.update(torch.tensor([[0.1], [0.3]]), torch.tensor([[0], [0]]))
        >>> metric.update(torch.tensor([[0.8], [0.8]]), torch.tensor([[1], [0]]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(
        self,
        num_labels: int,
        *,
        bins: int = 15,
        binning: str = "width",
        norm: str = "l1",
        average: str = "macro",
        **settings: Any,
    ) -> None:
        super().__init__(num_labels, bins, binning, average, settings)
        check_choice("norm", norm, ("l1", "l2", "max"))
        self.norm = norm

    def compute(self) -> Tensor:
        """The calibration error so far: a scalar, or (Q,) for `average="none"`; nan without samples."""
        error = calibration_of(self._histogram(), self.norm)
        return error.mean() if self.average == "macro" else error


class MultilabelBrierDecomposition(_Binned):
    """Brier score and its parts, :func:`~uncertainty_mm.metrics.functional.brier_decomposition` over batches.

    `update(probs, labels)` takes what the function takes, and the state is that of :class:`MultilabelCalibrationError`.
    The identity of the parts is exact for both ways of binning. To log them: `log_dict(metric.compute()._asdict())`.

    Args:
        num_labels: Number Q of labels.
        bins: Number of bins.
        binning: `"width"` or `"mass"`.
        average: `"macro"`, the mean over labels, or `"none"`.
        settings: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument has the wrong type.

    Example:
        >>> metric = MultilabelBrierDecomposition(num_labels=1, bins=2)
        >>> metric.update(torch.tensor([[0.25], [0.25]]), torch.tensor([[0], [0]]))
        >>> metric.update(torch.tensor([[0.75], [0.75]]), torch.tensor([[1], [0]]))
        >>> metric.compute().brier
        tensor(0.1875, dtype=torch.float64)
    """

    def __init__(
        self,
        num_labels: int,
        *,
        bins: int = 15,
        binning: str = "width",
        average: str = "macro",
        **settings: Any,
    ) -> None:
        super().__init__(num_labels, bins, binning, average, settings)

    def compute(self) -> BrierDecomposition:
        """The score and its parts so far; nan without samples."""
        parts = brier_of(self._histogram())
        return BrierDecomposition(*(x.mean() if self.average == "macro" else x for x in parts))


class SampleJaccard(_Checked):
    """Mean Jaccard index of a sample's label sets, the "accuracy" of the field.

    See :func:`~uncertainty_mm.metrics.functional.sample_jaccard`; a sample whose sets are both empty counts 0.

    Args:
        threshold: A label is predicted where its probability is above this, in [0, 1].
        settings: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If `threshold` is out of range.
        TypeError: If `threshold` is no number.

    Example:
        >>> metric = SampleJaccard()
        >>> metric(torch.tensor([[0.9, 0.6, 0.1]]), torch.tensor([[1, 0, 0]]))
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, *, threshold: float = 0.5, **settings: Any) -> None:
        super().__init__(**settings)
        check_probability("threshold", threshold)
        self.threshold = threshold
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _check(self, probs: Tensor, labels: Tensor) -> None:
        check_predictions(probs, labels)

    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            probs: Tensor (N, Q) of probabilities in [0, 1].
            labels: Tensor (N, Q) of 0 and 1, any real dtype.

        Raises:
            ValueError: If shapes or devices disagree, or values are out of range.
            TypeError: If a dtype is wrong.
        """
        self.total = self.total + sample_jaccard(probs, labels, threshold=self.threshold).sum()
        self.count = self.count + len(probs)

    def compute(self) -> Tensor:
        """The mean so far; nan without samples."""
        return self.total / self.count


class _Scores(_Checked):
    """Keeps two numbers of every sample, which a measure of order needs."""

    is_differentiable = False
    full_state_update = False
    first: list[Tensor]
    second: list[Tensor]

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(**settings)
        self.set_dtype(torch.float64)  # what torchmetrics gathers from a process without samples
        self.add_state("first", [], dist_reduce_fx="cat")
        self.add_state("second", [], dist_reduce_fx="cat")

    def _add(self, **scores: Tensor) -> None:
        first, second = finite_scores(**scores)
        self.first.append(first.detach())
        self.second.append(second.detach())

    def _all(self) -> list[Tensor]:
        empty = torch.empty(0, dtype=torch.float64, device=self.device)
        return [dim_zero_cat(x) if len(x) else empty for x in (self.first, self.second)]


class AURC(_Scores):
    """Area under the risk-coverage curve, :func:`~uncertainty_mm.metrics.functional.risk_coverage` over batches.

    It keeps two numbers of every sample.

    Args:
        excess: Give E-AURC, the area in excess of that of the best order, instead of AURC.
        settings: Of `torchmetrics.Metric`.

    Raises:
        TypeError: If `excess` is no bool.

    Example:
        >>> metric = AURC()
        >>> metric.update(errors=torch.tensor([0, 1]), uncertainty=torch.tensor([0.1, 0.9]))
        >>> metric.compute()  # (0 + 1/2) / 2
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, *, excess: bool = False, **settings: Any) -> None:
        super().__init__(settings)
        check_flag("excess", excess)
        self.excess = excess

    def update(self, errors: Tensor, uncertainty: Tensor) -> None:
        """Adds a batch.

        Args:
            errors: Tensor (N,) of finite errors, 0 and 1 or graded.
            uncertainty: Tensor (N,) of finite numbers; larger is less sure.

        Raises:
            ValueError: If shapes or devices disagree, or a value is not finite.
            TypeError: If a dtype is wrong.
        """
        self._add(errors=errors, uncertainty=uncertainty)

    def _check(self, errors: Tensor, uncertainty: Tensor) -> None:
        finite_scores(errors=errors, uncertainty=uncertainty)

    def compute(self) -> Tensor:
        """The area so far, a scalar; nan without samples."""
        curve = risk_coverage(*self._all())
        return curve.eaurc if self.excess else curve.aurc


class DetectionAUROC(_Scores):
    """How well an uncertainty detects errors (or corrupted input), :func:`~uncertainty_mm.metrics.functional.auroc` over batches.

    It keeps two numbers of every sample. Unlike `torchmetrics.AUROC` it takes scores of any size as they are.

    Args:
        settings: Of `torchmetrics.Metric`.

    Example:
        >>> metric = DetectionAUROC()
        >>> metric.update(torch.tensor([0.1, 0.5, 0.5, 2.0]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.8750, dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(settings)

    def update(self, uncertainty: Tensor, positive: Tensor) -> None:
        """Adds a batch.

        Args:
            uncertainty: Tensor (N,) of finite numbers.
            positive: Tensor (N,) of 0 and 1 or bool, whether the prediction was wrong (the input corrupted).

        Raises:
            ValueError: If shapes or devices disagree, or values are out of range.
            TypeError: If a dtype is wrong.
        """
        self._check(uncertainty, positive)
        self._add(uncertainty=uncertainty, positive=positive)

    def _check(self, uncertainty: Tensor, positive: Tensor) -> None:
        finite_scores(uncertainty=uncertainty, positive=positive)
        check_labels("positive", positive)

    def compute(self) -> Tensor:
        """The area so far, a scalar; nan unless there are positive and negative samples."""
        uncertainty, positive = self._all()
        return auroc(uncertainty[positive == 1], uncertainty[positive == 0])


class SpearmanCorrelation(_Scores):
    """Rank correlation of an uncertainty with errors or a reference, :func:`~uncertainty_mm.metrics.functional.spearman`.

    It keeps two numbers of every sample. Unlike `torchmetrics.SpearmanCorrCoef` it gives nan for constant input, and is
    right for any number of ties.

    Args:
        settings: Of `torchmetrics.Metric`.

    Example:
        >>> metric = SpearmanCorrelation()
        >>> metric.update(torch.tensor([0.1, 0.2]), torch.tensor([0.0, 1.0]))
        >>> metric.update(torch.tensor([0.3, 5.0]), torch.tensor([0.5, 3.0]))
        >>> metric.compute()
        tensor(0.8000, dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(settings)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds a batch.

        Args:
            x: Tensor (N,) of finite numbers.
            y: Tensor (N,) of finite numbers.

        Raises:
            ValueError: If shapes or devices disagree, or a value is not finite.
            TypeError: If a dtype is wrong.
        """
        self._add(x=x, y=y)

    def _check(self, x: Tensor, y: Tensor) -> None:
        finite_scores(x=x, y=y)

    def compute(self) -> Tensor:
        """The correlation so far, a scalar; nan for fewer than two samples or constant input."""
        return spearman(*self._all())
