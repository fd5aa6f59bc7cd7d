"""Ranks confidence by past correctness: :class:`CorrectnessRankingLoss`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_choice,
    check_finite,
    check_range,
    check_tensor,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import Component
from uncertainty_mm.functional import at_least_float32

Pairs = Literal["all", "neighbours"]


class CorrectnessRankingLoss(Component):
    r"""Asks for more confidence in samples that were correct more often, by at least the difference in correctness.

    With confidences :math:`\kappa` and shares :math:`c` of correct predictions so far, it is the mean over pairs of
    samples of

    .. math::
        \max\left(0,\; -\operatorname{sign}(c_i - c_j) (\kappa_i - \kappa_j) + |c_i - c_j|\right)

    which is 0 for a pair of equal shares. If all shares are equal, the loss is 0 with zero gradient.

    Source: Moon et al. 2020, "Confidence-Aware Learning for Deep Neural Networks", arXiv 2007.01458.

    Args:
        pairs: `"all"`: every sample with every other, so that the order of the batch does not matter, in
            :math:`O(B^2)` time and memory, which is little for up to a few thousand samples. `"neighbours"`, as in the
            paper: each sample with the next one that is not left out, and the last one with the first, in
            :math:`O(B)`.
        validate_args: Check values on the CPU only (None), never (False), or always (True), which stalls an
            accelerator.

    Raises:
        ValueError: If an argument is unknown.
        TypeError: If an argument has the wrong type.

    Example:
        >>> loss = CorrectnessRankingLoss()
        >>> correctness = torch.tensor([0.9, 0.5])
        >>> apart = torch.tensor([0.8, 0.3])  # by more than 0.4
        >>> loss(confidence=apart, correctness=correctness)
        tensor(0.)
        >>> loss(confidence=torch.tensor([0.3, 0.8]), correctness=correctness)  # 0.5 + 0.4
        tensor(0.9000)
    """

    pairs: Pairs
    validate_args: bool | None

    def __init__(self, *, pairs: Pairs = "all", validate_args: bool | None = None) -> None:
        super().__init__()
        check_choice("pairs", pairs, ("all", "neighbours"))
        check_validate_args(validate_args)
        self._set(pairs=pairs, validate_args=validate_args)

    def forward(
        self, *, confidence: Tensor, correctness: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Computes the loss of one batch.

        Args:
            confidence: Tensor (B,), larger means more confident, on the scale of `correctness`.
            correctness: Tensor (B,) in [0, 1], the share of correct predictions so far, from
                :class:`CorrectnessTracker`; receives no gradient.
            mask: Bool tensor (B,), True to leave the sample out (no history yet). Values there are ignored.

        Returns:
            Scalar in at least float32; 0 with zero gradient for fewer than two samples.

        Raises:
            ValueError: If shapes or devices disagree, or values are out of range.
            TypeError: If a dtype is wrong.
        """
        sizes: dict[str, int] = {}
        check_tensor("confidence", confidence, "floating", "B", sizes)
        device = confidence.device
        check_tensor("correctness", correctness, "floating", "B", sizes, device)
        if mask is None:
            mask = torch.zeros_like(confidence, dtype=torch.bool)
        check_tensor("mask", mask, "bool", "B", sizes, device)
        if checks_values(confidence, self.validate_args):
            check_finite("confidence", confidence, mask)
            check_range("correctness", correctness, 0, 1, mask)
        # Samples left out are filled before any arithmetic, because their derivative would be NaN times 0.
        k = at_least_float32(confidence).masked_fill(mask, 0)
        c = at_least_float32(correctness.detach()).masked_fill(mask, 0)
        count = (~mask).sum()
        if self.pairs == "all":
            counted, total = ~mask.unsqueeze(1) & ~mask, count * (count - 1)
            margin, gap = c.unsqueeze(1) - c, k.unsqueeze(1) - k
        else:
            # The samples that are kept come first, in their order.
            place = torch.arange(k.shape[0], device=device)
            order = mask.long().argsort(stable=True)
            next_one = torch.where(place + 1 < count, place + 1, 0)
            k, c = k[order], c[order]
            counted, total = place < count, count
            margin, gap = c - c[next_one], k - k[next_one]
        costs = (margin.abs() - margin.sign() * gap).relu()
        return costs.masked_fill(~counted, 0).sum() / total.clamp_min(1)
