"""Uncertainty in the order of the errors (Eq. 10-15): :class:`SoftRankOrdinalityLoss`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uncertainty_mm._checks import (
    check_choice,
    check_finite,
    check_flag,
    check_positive,
    check_range,
    check_tensor,
    checks_values,
)
from uncertainty_mm.functional import ordinality_divergence, soft_rank


class SoftRankOrdinalityLoss(nn.Module):
    r"""Asks that a batch is ordered alike by three views of certainty.

    With one number per sample of the batch for each view,

    .. math::
        S_i = \frac{1}{\lVert \sigma_i \rVert_2}, \qquad D_i = 1 - d_i, \qquad R_i = r_i
        \qquad \text{(Eq. 12-14)}

    (small variance, small error of the prediction, often correct in the past), each becomes a distribution over the
    batch, :math:`P_X = \operatorname{softmax}(f(X))`, and the loss is

    .. math::
        \sum_{(X, Y) \in \text{pairs}} \mathrm{KL}(P_X \| P_Y) + \mathrm{KL}(P_Y \| P_X) \qquad \text{(Eq. 15)}

    The mode chooses :math:`f`, with :math:`\tau` the temperature:

    - `"raw"`: :math:`f(X) = X / \tau`, Eq. 15 to the letter for :math:`\tau = 1`. It is zero only for
      :math:`S = R + \text{const}` and its gradient is of order :math:`1/B`.
    - `"standardized"`: :math:`f(X) = Z(X) / \tau`, the scores with mean 0 and variance 1 over the batch.
    - `"rank"`: the soft rank of :math:`Z(X)` at temperature :math:`\tau`, scaled to [0, 1]; zero when both views rank
      alike, whatever their shapes, as :math:`\tau \to 0`.

    The last two do not change under a positive affine map of a score. :math:`R` is history and receives no gradient.

    Source: Huang et al. 2025, arXiv 2502.13954, section 3.4.2.

    Args:
        mode: `"rank"`, `"standardized"` or `"raw"`.
        pairs: Which views are compared: any of `"SR"`, `"DR"`, `"DS"`.
        temperature: Divides the scores before the soft rank (`"rank"`) or the softmax (the others).
        validate_args: Look at values also on an accelerator, at the price of a wait for it.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument has the wrong type.

    Example:
        >>> loss = SoftRankOrdinalityLoss()
        >>> std_norm = torch.tensor([1.0, 2.0, 4.0])
        >>> distance = torch.tensor([0.1, 0.3, 0.5])
        >>> agrees = loss(std_norm, distance, correctness=torch.tensor([0.9, 0.6, 0.2]))
        >>> differs = loss(std_norm, distance, correctness=torch.tensor([0.2, 0.6, 0.9]))
        >>> bool(agrees < differs)
        True
    """

    def __init__(
        self,
        *,
        mode: str = "rank",
        pairs: Sequence[str] = ("SR", "DR"),
        temperature: float = 1.0,
        validate_args: bool = False,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("rank", "standardized", "raw"))
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
        self.mode = mode
        self.pairs = tuple(pairs)
        self.temperature = temperature
        check_flag("validate_args", validate_args)
        self.validate_args = validate_args

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"mode={self.mode!r}, pairs={self.pairs}, temperature={self.temperature}"

    def forward(
        self, std_norm: Tensor, distance: Tensor, correctness: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        r"""Computes the loss of one batch.

        Args:
            std_norm: Tensor (B,), the norm :math:`\lVert \sigma_i \rVert_2` of a sample's standard deviations, above 0.
            distance: Tensor (B,) in [0, 1], how far the prediction is from the labels.
            correctness: Tensor (B,) in [0, 1], the share of correct predictions so far, of
                :class:`CorrectnessTracker`; receives no gradient.
            mask: Bool tensor (B,), True leaves the sample out (no history yet). What stands there has no influence.

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
        if mask is not None:
            check_tensor("mask", mask, "bool", "B", sizes, device)
        if checks_values(std_norm, self.validate_args):
            check_finite("std_norm", std_norm, mask)
            kept = std_norm if mask is None else std_norm[~mask]
            if (kept <= 0).any():
                raise ValueError(f"Expected `std_norm` to be above 0, but got {kept.min().item()}")
            check_range("distance", distance, 0, 1, mask)
            check_range("correctness", correctness, 0, 1, mask)
        dtype = torch.promote_types(std_norm.dtype, torch.float32)
        std_norm, distance, correctness = (x.to(dtype) for x in (std_norm, distance, correctness))
        scores = {
            "S": std_norm.clamp_min(torch.finfo(dtype).tiny).reciprocal(),
            "D": 1 - distance,
            "R": correctness.detach(),
        }
        scores = {name: self._transform(score, mask) for name, score in scores.items()}
        terms = [
            ordinality_divergence(scores[pair[0]], scores[pair[1]], mask=mask)
            for pair in self.pairs
        ]
        return torch.stack(terms).sum()

    def _transform(self, score: Tensor, mask: Tensor | None) -> Tensor:
        if self.mode == "raw":
            return score / self.temperature
        kept = torch.ones_like(score, dtype=torch.bool) if mask is None else ~mask
        score = _standardize(score, kept)
        if self.mode == "standardized":
            return score / self.temperature
        return (soft_rank(score, self.temperature, mask=mask) - 1) / (kept.sum() - 1).clamp_min(1)


def _standardize(score: Tensor, kept: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the samples that are kept; equal scores give exactly 0, at any scale."""
    if score.shape[0] == 0:
        return score
    left_out = ~kept
    # Subtracting the minimum is exact for equal scores, where subtracting their rounded mean is not.
    low = score.detach().masked_fill(left_out, math.inf).amin()
    high = score.detach().masked_fill(left_out, -math.inf).amax()
    spread = high - low
    some_spread = (spread > 0) & torch.isfinite(spread)  # infinite: nothing is kept
    unit = (score - low).masked_fill(left_out | ~some_spread, 0) / torch.where(
        some_spread, spread, 1
    )
    count = kept.sum().clamp_min(1)
    centered = (unit - unit.sum() / count) * kept
    variance = centered.square().sum() / count
    return centered * torch.where(some_spread, variance, 1).rsqrt()
