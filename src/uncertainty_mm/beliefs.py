"""Evidence for and against every label, of all modalities together: :class:`BeliefFusion`."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_choice,
    check_finite,
    check_missing,
    check_range,
    check_tensor,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import Component
from uncertainty_mm.functional import at_least_float32

BeliefRule = Literal["cumulative", "average", "dempster", "discounted"]


class FusedBelief(NamedTuple):
    """What :class:`BeliefFusion` returns, all in at least float32.

    Attributes:
        evidence: Tensor (B, Q, 2), evidence that a label is present, `[..., 0]`, and that it is absent, `[..., 1]`.
        probs: Tensor (B, Q), expected probabilities: mean of the Beta distribution with these two plus 1.
        uncertainty: Tensor (B, Q) in (0, 1], the share of belief that nothing supports: 1 without evidence.
        conflict: Tensor (B, Q) in [0, 1], the largest degree of conflict between two modalities.
    """

    evidence: Tensor
    probs: Tensor
    uncertainty: Tensor
    conflict: Tensor


class BeliefFusion(Component):
    r"""Fuses what modalities say for and against each label, as counts of observations, and says where they disagree.

    Evidence :math:`(e, \bar e)` is an opinion on a label: with :math:`S = e + \bar e + 2` the belief
    :math:`b = e / S`, the disbelief :math:`\bar e / S`, the uncertainty :math:`u = 2 / S`, and the expected
    probability :math:`p = (e + 1) / S`. For either side

    - `"cumulative"`: :math:`\sum_m e_m`, for independent observations;
    - `"average"`: :math:`\sum_m e_m / P` over the :math:`P` modalities present, for repeated ones;
    - `"dempster"`: :math:`1 + e / 2 = \prod_m (1 + e_m / 2)`, Dempster's rule in closed form;
    - `"discounted"`: cumulative, after each modality has been trusted as far as others do not contradict it:

      .. math::
          e = \sum_m \frac{2 t_m e_m}{(1 - t_m) S_m + 2 t_m}, \qquad
          t_m = \prod_{n \ne m} (1 - c_{mn})

      which multiplies belief and disbelief by :math:`t_m` and gives the rest to uncertainty.

    The degree of conflict of two opinions is how far their probabilities differ, as far as both are sure

    .. math::
        c_{mn} = |p_m - p_n| (1 - u_m)(1 - u_n)

    and `conflict` the largest of all pairs. No rule depends on the order of modalities. Evidence of zero changes
    nothing, except that it is averaged.

    Source: Jøsang 2016, doi 10.1007/978-3-319-42337-1 (opinions, cumulative and averaging fusion, degree of conflict,
    trust discounting); Dempster 1967, doi 10.1214/aoms/1177698950. The product over the others as trust is new here.

    Args:
        rule: One of the four.
        validate_args: Look at values (NaN, negative evidence): on the CPU only (None), never (False), or everywhere
            (True), at the price of a wait for an accelerator.

    Raises:
        ValueError: If `rule` is unknown.
        TypeError: If `validate_args` is not True, False or None.

    Example:
        >>> evidence = torch.tensor([[98.0, 0.0], [0.0, 98.0]]).view(1, 2, 1, 2)  # one for, one against
        >>> BeliefFusion("dempster")(evidence).uncertainty  # contradicted, and yet surer than each: 0.02
        tensor([[0.0101]])
        >>> fused = BeliefFusion("discounted")(evidence)
        >>> fused.conflict, fused.uncertainty
        (tensor([[0.9412]]), tensor([[0.8910]]))
    """

    rule: BeliefRule
    validate_args: bool | None

    def __init__(self, rule: BeliefRule, *, validate_args: bool | None = None) -> None:
        super().__init__()
        check_choice("rule", rule, get_args(BeliefRule))
        check_validate_args(validate_args)
        self._set(rule=rule, validate_args=validate_args)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"rule={self.rule!r}"

    def forward(self, evidence: Tensor, missing: Tensor | None = None) -> FusedBelief:
        """Fuses the modalities of every label.

        Args:
            evidence: Tensor (B, M, Q, 2), at least 0, such as `F.softplus` of two outputs a label: for its presence,
                `[..., 0]`, and its absence, `[..., 1]`. Any number of modalities.
            missing: Bool tensor (B, M), True where a modality is missing. What stands there has no influence.

        Returns:
            Evidence, expected probability, uncertainty and conflict. Without any modality no evidence, 0.5, 1 and 0.

        Raises:
            ValueError: If shapes or devices disagree, or evidence is negative or not finite.
            TypeError: If a dtype is wrong.
        """
        sizes = {"2": 2}
        check_tensor("evidence", evidence, "floating", "B M Q 2", sizes)
        check_missing(missing, sizes, evidence.device)
        left_out = None if missing is None else missing[:, :, None, None]
        if checks_values(evidence, self.validate_args):
            check_finite("evidence", evidence, left_out)
            check_range("evidence", evidence, 0, math.inf, left_out)
        evidence = at_least_float32(evidence)
        # no more than this on either side, so that their sum is a number, and products where trust has a gradient
        most = torch.finfo(evidence.dtype).max / 8
        if self.rule == "discounted":
            most = most**0.5
        evidence = evidence.clamp_max(most)
        if left_out is not None:
            evidence = evidence.masked_fill(left_out, 0)
        degrees = _conflict(evidence)
        if self.rule == "dempster":
            log_product = torch.log1p(evidence / 2).sum(1)
            fused = 2 * torch.expm1(log_product.clamp_max(math.log(most / 2)))
            # log(1 + e) where e itself is beyond the dtype
            log_strength = log_product + torch.log1p(-torch.expm1(-log_product))
        else:
            if self.rule == "discounted":
                evidence = _discounted(evidence, degrees)
            fused = evidence.sum(1)
            if self.rule == "average":
                present = evidence.new_ones(evidence.shape[:2])
                if missing is not None:
                    present = present.masked_fill(missing, 0)
                fused = fused / present.sum(1).clamp_min(1)[:, None, None]
            fused = fused.clamp_max(most)
            log_strength = torch.log1p(fused)
        probs = (log_strength[..., 0] - log_strength[..., 1]).sigmoid()
        uncertainty = 2 / (2 + fused.sum(-1))
        # one more row of zeros, for no modality at all
        conflict = torch.cat([degrees.flatten(1, 2), torch.zeros_like(probs).unsqueeze(1)], 1)
        return FusedBelief(fused, probs, uncertainty, conflict.amax(1))


def _conflict(evidence: Tensor) -> Tensor:
    """Degree of conflict of every pair of modalities, (B, M, M, Q); 0 of one with itself."""
    total = evidence.sum(-1)
    certainty = total / (2 + total)
    probs = (evidence[..., 0] + 1) / (2 + total)
    distance = (probs.unsqueeze(1) - probs.unsqueeze(2)).abs()
    return distance * certainty.unsqueeze(1) * certainty.unsqueeze(2)


def _discounted(evidence: Tensor, degrees: Tensor) -> Tensor:
    """Evidence of each modality, as far as it is trusted."""
    largest = 1 - torch.finfo(degrees.dtype).eps  # of which the logarithm is a number
    trust = torch.log1p(-degrees.clamp_max(largest)).sum(2).exp().unsqueeze(-1)
    strength = 2 + evidence.sum(-1, keepdim=True)
    return evidence * (2 * trust / ((1 - trust) * strength + 2 * trust))
