"""The Jaccard index of label sets, called accuracy in the literature, over batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uncertainty_mm._checks import check_probability
from uncertainty_mm.metrics._base import OfPredictions
from uncertainty_mm.metrics.functional import sample_jaccard

__all__ = ["SampleJaccard"]


class SampleJaccard(OfPredictions):
    """Mean Jaccard index of predicted and true label sets, called accuracy in the literature.

    `update(probs, labels, unknown=None)` takes the arguments of
    :func:`~uncertainty_mm.metrics.functional.sample_jaccard`. A sample whose sets are both empty counts as 0; one
    without any known label does not count.

    Args:
        threshold: A label is predicted where its probability is above this, in [0, 1].
        validate_args: Check values on the CPU only (None), never (False), or always (True).
        settings: For `torchmetrics.Metric`.

    Raises:
        ValueError: If `threshold` is out of range.
        TypeError: If `threshold` is not a number.

    Example:
        >>> metric = SampleJaccard()
        >>> metric(torch.tensor([[0.9, 0.6, 0.1]]), torch.tensor([[1, 0, 0]]))
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    threshold: float
    total: Tensor
    count: Tensor

    def __init__(
        self, *, threshold: float = 0.5, validate_args: bool | None = None, **settings: Any
    ) -> None:
        super().__init__(validate_args, settings)
        check_probability("threshold", threshold)
        self._set(threshold=threshold)
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("count", zero.long(), dist_reduce_fx="sum")
        # A `MetricCollection` merges metrics of equal state; this keeps those of different thresholds apart.
        self.add_state("at", zero + threshold, dist_reduce_fx="max")

    def _add(self, probs: Tensor, labels: Tensor, unknown: Tensor | None) -> None:
        scores = sample_jaccard(
            probs, labels, unknown, threshold=self.threshold, validate_args=False
        )
        self.total = self.total + scores.nansum()
        self.count = self.count + (~scores.isnan()).sum()

    def compute(self) -> Tensor:
        """The mean so far; nan without samples."""
        return self.total / self.count
