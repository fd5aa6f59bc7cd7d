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
    check_positive_int,
    check_range,
    check_tensor,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import Component
from uncertainty_mm._rank import divergence, laplace_rank
from uncertainty_mm.distributed import gather_rows, group_name, world_size

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
            the gradient is that of one process on the joined batch. All ranks must call it. Without `gather`, samples
            are compared within each rank, which is a different objective.
        process_group: With `gather`, the ranks that take part; None for all.
        max_batch_size: Largest batch that any rank will ever have; a larger one is refused. Pass it with `gather`: None
            makes the ranks ask each other for the largest batch at every call, for which the host waits.
        validate_args: Check values on the CPU only (None), never (False), or everywhere (True), which makes the host
            wait for an accelerator.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument has the wrong type.

    Example:
        >>> loss = SoftRankOrdinalityLoss()
        >>> views = {
        ...     "std_norm": torch.tensor([1.0, 2.0, 4.0]),
        ...     "distance": torch.tensor([0.1, 0.3, 0.5]),
        ... }
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
    max_batch_size: int | None
    validate_args: bool | None

    def __init__(
        self,
        *,
        mode: Mode = "rank",
        pairs: Sequence[Pair] = ("SR",),
        temperature: float = 1.0,
        gather: bool = False,
        process_group: dist.ProcessGroup | None = None,
        max_batch_size: int | None = None,
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
        if max_batch_size is not None:
            check_positive_int("max_batch_size", max_batch_size)
        check_validate_args(validate_args)
        self._set(
            mode=mode,
            pairs=tuple(pairs),
            temperature=temperature,
            gather=gather,
            process_group=group_name(process_group),
            max_batch_size=max_batch_size,
            validate_args=validate_args,
        )

    def forward(
        self,
        *,
        std_norm: Tensor,
        distance: Tensor,
        correctness: Tensor,
        mask: Tensor | None = None,
        joined: bool = False,
    ) -> Tensor:
        r"""Computes the loss of one batch.

        Args:
            std_norm: Tensor (B,), the norm :math:`\lVert \sigma_i \rVert_2` of a sample's standard deviations, above 0;
                or (B, M) for M losses at once, whose samples are compared within each column.
            distance: Tensor of the same shape in [0, 1], how far the prediction is from the labels.
            correctness: Tensor of the same shape in [0, 1], the share of correct predictions so far, from
                :class:`CorrectnessTracker`; receives no gradient.
            mask: Bool tensor of the same shape, True to leave the sample out (no history yet). Its values are ignored.
            joined: The scores are :meth:`gathered` already; nothing is exchanged.

        Returns:
            Scalar in at least float32, the sum over columns; a column of fewer than two samples adds 0 with zero
            gradient.

        Raises:
            ValueError: If shapes or devices disagree, or values are out of range.
            TypeError: If a dtype is wrong.
        """
        check_flag("joined", joined)
        sizes: dict[str, int] = {}
        given = std_norm, distance, correctness
        axes = "B M" if all(isinstance(x, Tensor) and x.dim() == 2 for x in given) else "B"
        check_tensor("std_norm", std_norm, "floating", axes, sizes)
        device = std_norm.device
        check_tensor("distance", distance, "floating", axes, sizes, device)
        check_tensor("correctness", correctness, "floating", axes, sizes, device)
        if mask is None:
            mask = torch.zeros_like(std_norm, dtype=torch.bool)
        check_tensor("mask", mask, "bool", axes, sizes, device)
        if checks_values(std_norm, self.validate_args):
            check_finite("std_norm", std_norm, mask)
            if ((std_norm <= 0) & ~mask).any():
                lowest = std_norm[~mask].min().item()
                raise ValueError(f"Expected `std_norm` to be above 0, but got {lowest}")
            check_range("distance", distance, 0, 1, mask)
            check_range("correctness", correctness, 0, 1, mask)
        views = {"std_norm": std_norm, "distance": distance, "correctness": correctness.detach()}
        if not joined:
            views = self.gathered(**views, mask=mask)
            mask = views.pop("mask")
        if axes == "B":
            mask, views = mask.unsqueeze(1), {name: x.unsqueeze(1) for name, x in views.items()}
        # Samples left out are filled before any arithmetic, because their derivative would be NaN times 0.
        dtype, mask = torch.promote_types(std_norm.dtype, torch.float32), mask.T
        std_norm, distance, correctness = (
            x.T.to(dtype).masked_fill(mask, 1) for x in views.values()
        )
        scores = {
            "S": std_norm.clamp_min(torch.finfo(dtype).tiny).reciprocal(),
            "D": 1 - distance,
            "R": correctness,
        }
        names = list(dict.fromkeys("".join(self.pairs)))
        count = (~mask).sum(-1, keepdim=True)
        transformed = self._transform(torch.stack([scores[name] for name in names]), mask, count)
        of = dict(zip(names, transformed, strict=True))
        one, other = (torch.stack([of[pair[i]] for pair in self.pairs]) for i in (0, 1))
        if self.mode == "pearson":
            correlation = (one * other).sum(-1, keepdim=True) / count.clamp_min(1)
            return ((1 - correlation) * (count > 1)).sum()
        return divergence(one, other, mask).sum()

    def gathered(
        self, *, std_norm: Tensor, distance: Tensor, correctness: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """The scores of all ranks by name, for several losses of one exchange; without `gather`, those given.

        Args:
            std_norm: Tensor (B, ...), as the other scores.
            distance: Likewise.
            correctness: Likewise; receives no gradient.
            mask: Bool tensor, likewise.

        Returns:
            Tensors (W * B, ...) for W ranks and the largest B, in at least float32. Smaller batches are followed by
            samples that are left out.

        Raises:
            ValueError: If there are more samples than `max_batch_size`.
        """
        if self.max_batch_size is not None and len(mask) > self.max_batch_size:
            raise ValueError(
                f"Expected `std_norm` to have at most `max_batch_size` = {self.max_batch_size} samples, "
                f"but got {len(mask)}"
            )
        scores = {"std_norm": std_norm, "distance": distance, "correctness": correctness.detach()}
        if not self.gather or world_size(self.process_group) == 1:
            return scores | {"mask": mask}
        dtype = torch.promote_types(std_norm.dtype, torch.float32)
        rows, places = gather_rows(
            torch.stack([x.to(dtype) for x in (*scores.values(), mask)], 1),
            torch.zeros(len(mask), dtype=torch.long, device=mask.device),
            max_rows=self.max_batch_size,
            process_group=self.process_group,
        )
        *values, left_out = rows.unbind(1)
        filled = (places < 0).view(-1, *(1,) * (mask.dim() - 1))
        return {**dict(zip(scores, values, strict=True)), "mask": (left_out > 0) | filled}

    def _transform(self, score: Tensor, mask: Tensor, count: Tensor) -> Tensor:
        """What a mode makes of scores (..., B) over the samples that are not in the mask."""
        if self.mode == "raw":
            return score / self.temperature
        score = _standardize(score, ~mask)
        if self.mode == "pearson":
            return score
        if self.mode == "standardized":
            return score / self.temperature
        ranks = laplace_rank(score.masked_fill(mask, 0), ~mask, 2 * self.temperature)
        return (ranks.masked_fill(mask, 1) - 1) / (count - 1).clamp_min(1)


def _standardize(score: Tensor, kept: Tensor) -> Tensor:
    """Scores with mean 0 and variance 1 over the samples that are kept; equal scores give exactly 0, at any scale."""
    if score.shape[-1] == 0:
        return score
    left_out = ~kept
    # Subtracting the minimum is exact for equal scores, where subtracting their rounded mean is not.
    low = score.detach().masked_fill(left_out, math.inf).amin(-1, keepdim=True)
    high = score.detach().masked_fill(left_out, -math.inf).amax(-1, keepdim=True)
    spread = high - low
    some_spread = (spread > 0) & torch.isfinite(spread)  # infinite if nothing is kept
    unit = (score - low).masked_fill(left_out | ~some_spread, 0) / torch.where(
        some_spread, spread, 1
    )
    count = kept.sum(-1, keepdim=True).clamp_min(1)
    centered = (unit - unit.sum(-1, keepdim=True) / count) * kept
    variance = centered.square().sum(-1, keepdim=True) / count
    return centered * torch.where(some_spread, variance, 1).rsqrt()
