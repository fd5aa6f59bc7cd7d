"""Base classes of all metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from uncertainty_mm._checks import check_validate_args
from uncertainty_mm._component import FixedSettings
from uncertainty_mm.metrics._inputs import check_predictions, check_scores, precision


class Accumulated(FixedSettings, Metric):
    """A metric that a refused batch does not change, and whose state keeps its precision.

    The state is in float64 where the device has it. `model.to(torch.bfloat16)`, which rounds the sums of other metrics,
    does not change its dtype.
    """

    is_differentiable = False
    full_state_update = False
    validate_args: bool | None

    def __init__(self, validate_args: bool | None, settings: dict[str, Any]) -> None:
        super().__init__(**settings)
        check_validate_args(validate_args)
        self._set(validate_args=validate_args)
        self.set_dtype(precision(self.device))  # a process without samples needs it too

    def _check(self, *args: Any, **kwargs: Any) -> None:
        """Raises for a batch that cannot be added."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adds a batch and returns the measure of that batch alone."""
        # torchmetrics resets the metric before it passes on a batch; an error there would lose all earlier batches.
        self._check(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draws one value or several, as all metrics of torchmetrics do.

        Args:
            val: A result of `compute` or `forward`, or a list of results; None draws the accumulated measure.
            ax: Axes to draw into.

        Returns:
            Figure (None if `ax` is given) and Axes.
        """
        return self._plot(val, ax)

    def _apply(  # type: ignore[override]  # as in torchmetrics, but `to_empty` names `recurse`
        self,
        fn: Callable[[Tensor], Tensor],
        exclude_state: Sequence[str] = "",
        recurse: bool = True,
    ) -> Any:
        if self._dtype_convert:  # `set_dtype`
            return super()._apply(fn, exclude_state)
        device = fn(torch.zeros(0, device=self.device)).device
        dtype = precision(device)

        def move(state: Tensor) -> Tensor:
            if state.is_meta and device.type != "meta":  # `to_empty`; every initial state is 0
                state = torch.zeros_like(state, device=device)
            if not state.is_floating_point():
                return state.to(device)
            # narrowed before the move to a device without float64
            narrow = state.to(dtype) if dtype == torch.float32 else state
            return narrow.to(device).to(dtype)

        return super()._apply(move, exclude_state)


class OfPredictions(Accumulated):
    """A metric of probabilities and labels."""

    num_labels: int | None = None

    def _check(self, probs: Tensor, labels: Tensor, unknown: Tensor | None = None) -> None:
        check_predictions(probs, labels, unknown, self.validate_args, self.num_labels)

    def update(self, probs: Tensor, labels: Tensor, unknown: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            probs: Tensor (N, Q) of probabilities in [0, 1].
            labels: Tensor (N, Q) of 0 and 1, any real dtype.
            unknown: Bool tensor (N, Q), True where a label is not known.

        Raises:
            ValueError: If shapes or devices disagree, or values are out of range.
            TypeError: If a dtype is wrong.
        """
        self._check(probs, labels, unknown)
        self._add(probs.detach(), labels.detach(), unknown)

    def _add(self, probs: Tensor, labels: Tensor, unknown: Tensor | None) -> None:
        """Adds a batch that has been checked."""
        raise NotImplementedError


class OfScores(Accumulated):
    """A metric of the order of samples, which stores the uncertainty and the error of each."""

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
            uncertainty: Tensor (N,) of finite numbers; larger is less certain.
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
