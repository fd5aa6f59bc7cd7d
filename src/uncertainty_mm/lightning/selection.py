"""Which checkpoint to keep: :class:`OneStandardError`, by the losses of validation samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class OneStandardError:
    r"""Selects the latest step of a training that is at most one standard error worse than the best one.

    A few hundred validation samples cannot distinguish neighbouring epochs, so the epoch with the lowest mean loss is
    partly luck, and often comes before the learning rate has decreased. The rule of one standard error (Breiman et al.
    1984) tests whether a difference is more than chance. With losses :math:`\ell_n` now and :math:`b_n` at the best
    step so far, the present step is kept if

    .. math::
        \operatorname{mean}(\ell - b) \le \operatorname{std}(\ell - b) / \sqrt N

    Attributes:
        chosen: The selected step, -1 before the first one.

    Example:
        >>> import torch
        >>> from uncertainty_mm.lightning import OneStandardError
        >>> rule = OneStandardError()
        >>> rule.update(10, torch.tensor([0.5, 0.3, 0.4]))
        10
        >>> rule.update(20, torch.tensor([0.6, 0.2, 0.5]))  # worse by 0.03 ± 0.07
        20
        >>> rule.update(30, torch.tensor([0.7, 0.5, 0.6]))  # worse by 0.2 ± 0
        20
    """

    def __init__(self) -> None:
        self.chosen = -1
        self._latest = -1
        self._best: Tensor | None = None

    def update(self, step: int, losses: Tensor) -> int:
        """Compares a step with the best one so far.

        Args:
            step: Number of the step; a number below the latest one starts a new training.
            losses: Tensor (N,), a loss for each validation sample or group, in the same order at every step.

        Returns:
            The step to keep.
        """
        losses = losses.detach().cpu().double()
        if step < self._latest or (self._best is not None and len(self._best) != len(losses)):
            self._best = None
        self._latest = step
        if not len(losses):
            return self.chosen
        if self._best is None or self._best.mean().isnan() or losses.mean() < self._best.mean():
            self.chosen, self._best = step, losses
        else:
            excess = losses - self._best
            error = excess.std() / len(excess) ** 0.5 if len(excess) > 1 else 0.0
            if excess.mean() <= error:
                self.chosen = step
        return self.chosen

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed training needs."""
        return {"chosen": self.chosen, "latest": self._latest, "best": self._best}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores a :meth:`state_dict`."""
        self.chosen, self._latest = state_dict["chosen"], state_dict["latest"]
        self._best = state_dict["best"]


def losses_of(
    logits: Tensor, labels: Tensor, unknown: Tensor | None, groups: Tensor | None
) -> Tensor:
    """Cross-entropies of calibrated logits (N, Q), a mean over the known labels of each sample, then of each group.

    They choose among models: they say more than counts of predictions on the right side of a threshold.
    """
    if unknown is None:
        unknown = torch.zeros_like(logits, dtype=torch.bool)
    target = labels.float().masked_fill(unknown, 0)
    each = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    each = each.nan_to_num(torch.inf, torch.inf)  # a prediction of NaN is not an unknown label
    return mean_by(groups, each.masked_fill(unknown, torch.nan).nanmean(1))


def mean_by(groups: Tensor | None, values: Tensor) -> Tensor:
    """Means of values (N,) over each group, without NaN; if there are no groups, the values that are not NaN."""
    known = ~values.isnan()
    values = values[known]
    if groups is None:
        return values
    which = groups[known].unique(return_inverse=True)[1]
    total = values.new_zeros(int(which.max()) + 1 if len(which) else 0)
    means: Tensor = total.index_add(0, which, values) / which.bincount()
    return means
