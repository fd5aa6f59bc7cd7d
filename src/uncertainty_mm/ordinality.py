"""Ranks uncertainty like the errors (Eq. 10-15): :class:`SoftRankOrdinalityLoss`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from uncertainty_mm._checks import (
    check_choice,
    check_finite,
    check_flag,
    check_positive,
    check_range,
    check_tensor,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import Component
from uncertainty_mm.distributed import gather_rows, group_name, world_size
from uncertainty_mm.functional import ordinality_divergence, soft_rank

Mode = Literal["rank", "standardized", "raw", "pearson"]
Pair = Literal["SR", "DR", "DS"]


class SoftRankOrdinalityLoss(Component):
    r"""Trains the standard deviations to rank the samples of a batch as their errors and their history do.

    There are three views of certainty, each with one number per sample of the batch:

    .. math::
        S_i = \frac{1}{\lVert \sigma_i \rVert_2}, \qquad D_i = 1 - d_i, \qquad R_i = r_i
        \qquad \text{(Eq. 12-14)}

    (small standard deviation, small error, often correct in the past). Each becomes a distribution over the batch,
    :math:`P_X = \operatorname{softmax}(f(X))`, and the loss is

    .. math::
        \sum_{(X, Y) \in \text{pairs}} \mathrm{KL}(P_X \| P_Y) + \mathrm{KL}(P_Y \| P_X) \qquad \text{(Eq. 15)}

    The mode chooses :math:`f`, where :math:`\tau` is the temperature and :math:`Z(X)` are the scores with mean 0 and
    variance 1 over the batch:

    - `"raw"`: :math:`f(X) = X / \tau`, which for :math:`\tau = 1` is Eq. 15 as printed. It is zero only for
      :math:`S = R + \text{const}`. The norm of many standard deviations hardly varies between samples, so :math:`P_S`
      is nearly uniform and little gradient reaches :math:`\sigma`.
    - `"standardized"`: :math:`f(X) = Z(X) / \tau`.
    - `"rank"`: the soft rank of :math:`Z(X)` at temperature :math:`\tau`, scaled to [0, 1]. As :math:`\tau \to 0`, the
      loss is zero if both views give the same ranks. It takes :math:`O(B \log B)` time and :math:`O(B)` memory.
    - `"pearson"`: :math:`1 - \operatorname{corr}(X, Y)` instead of a divergence, with Pearson's correlation over the
      batch. A pair costs from 0 to 2, without a temperature; it costs 1, with zero gradient, if a score is the same
      for all samples.

    All modes but `"raw"` are invariant to a positive affine map of a score. :math:`R` is history and receives no
    gradient.

    Source: Huang et al. 2025, arXiv 2502.13954, section 3.4.2; `"pearson"`: the form of SURE, Nguyen et al. 2025, "Are
    you SURE? Enhancing multimodal pretraining with missing modalities through uncertainty estimation".

    Args:
        mode: `"rank"`, `"standardized"`, `"raw"` or `"pearson"`.
        pairs: Which views are compared: any of `"SR"`, `"DR"`, `"DS"`.
        temperature: Divides the scores before the soft rank (`"rank"`) or the softmax (`"standardized"`, `"raw"`).
        gather: Under `torch.distributed`, compare the samples of all ranks, which may have batches of different sizes.
            Every rank gets the loss of the joined batch; after averaging over ranks, as `DistributedDataParallel` does,
            the gradient is that of one process on the joined batch. All ranks must call it, and the host waits for the
            largest size. Without `gather`, samples are compared within each rank, which is a different objective.
        process_group: With `gather`, the ranks that take part; None for all.
        validate_args: Check values on the CPU only (None), never (False), or always (True), which stalls an
            accelerator.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument has the wrong type.

    Example:
        >>> loss = SoftRankOrdinalityLoss()
        >>> views = {"std_norm": torch.tensor([1.0, 2.0, 4.0]), "distance": torch.tensor([0.1, 0.3, 0.5])}
        >>> agrees = loss(**views, correctness=torch.tensor([0.9, 0.6, 0.2]))
        >>> differs = loss(**views, correctness=torch.tensor([0.2, 0.6, 0.9]))
        >>> bool(agrees < differs)
        True
    """

    mode: Mode
    pairs: tuple[Pair, ...]
    temperature: float
    gather: bool
    process_group: str
    validate_args: bool | None

    def __init__(
        self,
        *,
        mode: Mode = "rank",
        pairs: Sequence[Pair] = ("SR",),
        temperature: float = 1.0,
        gather: bool = False,
        process_group: dist.ProcessGroup | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("rank", "standardized", "raw", "pearson"))
        if isinstance(pairs, str) or not isinstance(pairs, Sequence):
            raise TypeError(
                f"Expected `pairs` to be a sequence such as ('SR', 'DR'), but got {pairs!r}"
            )
        if not pairs:
            raise ValueError("Expected `pairs` to name at least one pair, but got none")
        for pair in pairs:
            check_choice("pairs", pair, ("SR", "DR", "DS"))
        if len(set(pairs)) < len(pairs):
            raise ValueError(f"Expected `pairs` to name each pair once, but got {tuple(pairs)}")
        check_positive("temperature", temperature)
        check_flag("gather", gather)
        check_validate_args(validate_args)
        self._set(
            mode=mode,
            pairs=tuple(pairs),
            temperature=temperature,
            gather=gather,
            process_group=group_name(process_group),
            validate_args=validate_args,
        )

    def forward(
        self,
        *,
        std_norm: Tensor,
        distance: Tensor,
        correctness: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        r"""Computes the loss of one batch.

        Args:
            std_norm: Tensor (B,), the norm :math:`\lVert \sigma_i \rVert_2` of a sample's standard deviations, above 0.
            distance: Tensor (B,) in [0, 1], how far the prediction is from the labels.
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
        check_tensor("std_norm", std_norm, "floating", "B", sizes)
        device = std_norm.device
        check_tensor("distance", distance, "floating", "B", sizes, device)
        check_tensor("correctness", correctness, "floating", "B", sizes, device)
        if mask is None:
            mask = torch.zeros_like(std_norm, dtype=torch.bool)
        check_tensor("mask", mask, "bool", "B", sizes, device)
        if checks_values(std_norm, self.validate_args):
            check_finite("std_norm", std_norm, mask)
            if ((std_norm <= 0) & ~mask).any():
                lowest = std_norm[~mask].min().item()
                raise ValueError(f"Expected `std_norm` to be above 0, but got {lowest}")
            check_range("distance", distance, 0, 1, mask)
            check_range("correctness", correctness, 0, 1, mask)
        dtype = torch.promote_types(std_norm.dtype, torch.float32)
        rows = torch.stack([x.to(dtype) for x in (std_norm, distance, correctness.detach())], 1)
        if self.gather and world_size(self.process_group) > 1:
            # smaller batches are padded with class -1
            rows, left_out = gather_rows(rows, mask.long(), process_group=self.process_group)
            mask = left_out != 0
        # Samples left out are filled before any arithmetic, because their derivative would be NaN times 0.
        rows = rows.masked_fill(mask.unsqueeze(1), 1)
        std_norm, distance, correctness = rows.unbind(1)
        scores = {
            "S": std_norm.clamp_min(torch.finfo(dtype).tiny).reciprocal(),
            "D": 1 - distance,
            "R": correctness,
        }
        count = (~mask).sum()
        scores = {
            name: self._transform(scores[name], mask, count)
            for name in dict.fromkeys("".join(self.pairs))
        }
        terms = []
        for one, other in self.pairs:
            if self.mode == "pearson":
                correlation = (scores[one] * scores[other]).sum() / count.clamp_min(1)
                terms.append((1 - correlation) * (count > 1))
            else:
                terms.append(
                    ordinality_divergence(
                        scores[one], scores[other], mask=mask, validate_args=False
                    )
                )
        return torch.stack(terms).sum()

    def _transform(self, score: Tensor, mask: Tensor, count: Tensor) -> Tensor:
        if self.mode == "raw":
            return score / self.temperature
        score = _standardize(score, ~mask)
        if self.mode == "pearson":
            return score
        if self.mode == "standardized":
            return score / self.temperature
        ranks = soft_rank(score, self.temperature, mask=mask, validate_args=False)
        return (ranks - 1) / (count - 1).clamp_min(1)


def _standardize(score: Tensor, kept: Tensor) -> Tensor:
    """Scores with mean 0 and variance 1 over the samples that are kept; equal scores give exactly 0, at any scale."""
    if score.shape[0] == 0:
        return score
    left_out = ~kept
    # Subtracting the minimum is exact for equal scores, where subtracting their rounded mean is not.
    low = score.detach().masked_fill(left_out, math.inf).amin()
    high = score.detach().masked_fill(left_out, -math.inf).amax()
    spread = high - low
    some_spread = (spread > 0) & torch.isfinite(spread)  # infinite if nothing is kept
    unit = (score - low).masked_fill(left_out | ~some_spread, 0) / torch.where(
        some_spread, spread, 1
    )
    count = kept.sum().clamp_min(1)
    centered = (unit - unit.sum() / count) * kept
    variance = centered.square().sum() / count
    return centered * torch.where(some_spread, variance, 1).rsqrt()
