"""Fuses the evidence of all modalities for and against each label: :class:`BeliefFusion`."""

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
    """The result of :class:`BeliefFusion`, all in at least float32.

    Attributes:
        evidence: Tensor (B, Q, 2), evidence that a label is present, `[..., 0]`, and that it is absent, `[..., 1]`.
        probs: Tensor (B, Q), expected probabilities: the mean of the Beta distribution with `evidence + 1`.
        uncertainty: Tensor (B, Q) in (0, 1], the share of belief without any support: 1 without evidence.
        conflict: Tensor (B, Q) in [0, 1], the largest degree of conflict between two modalities.
    """

    evidence: Tensor
    probs: Tensor
    uncertainty: Tensor
    conflict: Tensor


class BeliefFusion(Component):
    r"""Fuses the evidence of the modalities for and against each label, and measures how far they disagree.

    Evidence :math:`(e, \bar e)`, like counts of observations for and against, is an opinion on a label. With
    :math:`S = e + \bar e + 2` it has the belief :math:`b = e / S`, the disbelief :math:`\bar e / S`, the uncertainty
    :math:`u = 2 / S`, and the expected probability :math:`p = (e + 1) / S`. The rules are, for each of the two sides:

    - `"cumulative"`: :math:`\sum_m e_m`, for independent observations;
    - `"average"`: :math:`\sum_m e_m / P` over the :math:`P` modalities present, for repeated observations;
    - `"dempster"`: :math:`1 + e / 2 = \prod_m (1 + e_m / 2)`, Dempster's rule in closed form;
    - `"discounted"`: cumulative, where each modality is trusted as far as the others do not contradict it:

      .. math::
          e = \sum_m \frac{2 t_m e_m}{(1 - t_m) S_m + 2 t_m}, \qquad
          t_m = \prod_{n \ne m} (1 - c_{mn})

      which multiplies belief and disbelief by :math:`t_m` and gives the rest to uncertainty.

    The degree of conflict of two opinions is the difference of their probabilities, weighted by both certainties,

    .. math::
        c_{mn} = |p_m - p_n| (1 - u_m)(1 - u_n)

    and `conflict` is the largest over all pairs. The order of modalities does not matter. Zero evidence has no effect,
    except on an average.

    Source: Jøsang 2016, doi 10.1007/978-3-319-42337-1 (opinions, cumulative and averaging fusion, degree of conflict,
    trust discounting); Dempster 1967, doi 10.1214/aoms/1177698950. The product over the others as trust is new here.

    Args:
        rule: One of the four rules.
        validate_args: Check values (NaN, negative evidence) on the CPU only (None), never (False), or always (True),
            which stalls an accelerator.

    Raises:
        ValueError: If `rule` is unknown.
        TypeError: If `validate_args` is not True, False or None.

    Example:
        >>> for_it, against = [98.0, 0.0], [0.0, 98.0]
        >>> evidence = torch.tensor([for_it, against]).view(1, 2, 1, 2)
        >>> BeliefFusion("dempster")(evidence).uncertainty  # below 0.02, that of each
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

    def forward(self, evidence: Tensor, missing: Tensor | None = None) -> FusedBelief:
        """Fuses the modalities of every label.

        Args:
            evidence: Tensor (B, M, Q, 2), at least 0, such as `F.softplus` of two outputs per label: for its presence,
                `[..., 0]`, and its absence, `[..., 1]`. Any number of modalities.
            missing: Bool tensor (B, M), True where a modality is missing. Values there are ignored.

        Returns:
            Evidence, expected probability, uncertainty and conflict: 0, 0.5, 1 and 0 if all modalities are missing.

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
        # the limit on either side keeps their sum finite, and products where the trust has a gradient
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
            # log(1 + e) is finite even if e overflows
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
        # one more row of zeros, in case there is no modality at all
        conflict = torch.cat([degrees.flatten(1, 2), torch.zeros_like(probs).unsqueeze(1)], 1)
        return FusedBelief(fused, probs, uncertainty, conflict.amax(1))


def _conflict(evidence: Tensor) -> Tensor:
    """Degree of conflict of every pair of modalities, (B, M, M, Q), with 0 on the diagonal."""
    total = evidence.sum(-1)
    certainty = total / (2 + total)
    probs = (evidence[..., 0] + 1) / (2 + total)
    distance = (probs.unsqueeze(1) - probs.unsqueeze(2)).abs()
    return distance * certainty.unsqueeze(1) * certainty.unsqueeze(2)


def _discounted(evidence: Tensor, degrees: Tensor) -> Tensor:
    """Evidence of each modality, discounted by its trust."""
    largest = 1 - torch.finfo(degrees.dtype).eps  # keeps the logarithm finite
    trust = torch.log1p(-degrees.clamp_max(largest)).sum(2).exp().unsqueeze(-1)
    strength = 2 + evidence.sum(-1, keepdim=True)
    return evidence * (2 * trust / ((1 - trust) * strength + 2 * trust))
