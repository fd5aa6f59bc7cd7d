"""Four rules to fuse the logits of all modalities: :class:`DecisionFusion`."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from uncertainty_mm._checks import (
    check_choice,
    check_finite,
    check_missing,
    check_range,
    check_std,
    check_tensor,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import Component
from uncertainty_mm.functional import at_least_float32, moderated
from uncertainty_mm.rules import _average, _log_precision, _lowest

DecisionRule = Literal["mean", "precision", "energy", "predictive"]

_NEEDS = {"precision": "std", "predictive": "confidence"}


class FusedDecision(NamedTuple):
    """The result of :class:`DecisionFusion`, all in at least float32.

    Attributes:
        logits: Tensor (B, Q), the fused logits.
        weights: Tensor (B, M, Q), the weight of each modality. They sum to 1 over the modalities that count, or to 0 if
            none does.
        conflict: Tensor (B, Q) in [0, 1], how far the probabilities of the modalities differ.
    """

    logits: Tensor
    weights: Tensor
    conflict: Tensor

    @property
    def probs(self) -> Tensor:
        """Fused probabilities, shape (B, Q)."""
        return self.logits.sigmoid()


class DecisionFusion(Component):
    r"""Averages the logits of all modalities with weights from a rule, and measures how far they disagree.

    With logits :math:`l_m` of the :math:`P` modalities present, for each label

    .. math::
        l = \sum_m w_m l_m, \qquad w = \operatorname{softmax}_m(r_m)

    - `"mean"`: :math:`r_m = 0`, so that each has the weight :math:`1 / P`;
    - `"precision"`: :math:`r_m = \log \tau_m` with :math:`\tau_m = \sigma_m^{-2}`, for logits with a standard
      deviation. The mean and the precision of the fused logit are averages with the same weights, and `logits` is the
      logit of its expected probability (:func:`~uncertainty_mm.functional.logistic_normal_probs`):

      .. math::
          \mu = \sum_m w_m l_m, \quad \frac{1}{\sigma^2} = \sum_m w_m \tau_m, \quad
          l = \frac{\mu}{\sqrt{1 + \pi \sigma^2 / 8}}

    - `"energy"`: :math:`r_m = \log \sum_q \log(1 + e^{l_{mq}})`, which weights each modality by its share of the total
      energy, equally for all labels. High logits for some label indicate input like the training data; a modality that
      finds no label has little energy, and hardly counts.
    - `"predictive"`: from a predicted confidence :math:`c_m`, the probability that the modality gives to the true
      value. With the resulting losses :math:`\ell_m = -\log c_m`

      .. math::
          r_m = k_m \Bigl(c_m + \frac{\sum_{n \ne m} \ell_n}{\sum_n \ell_n}\Bigr), \qquad
          k_m = \min\Bigl(1, \frac{d_m}{\frac{1}{P - 1} \sum_{n \ne m} d_n}\Bigr), \qquad
          d_m = \bigl|\operatorname{sigmoid}(l_m) - \tfrac{1}{2}\bigr|

      that is, its own confidence plus the share of the losses that the others have, reduced if it is less decided than
      the others.

    The order of modalities does not matter, and missing modalities are ignored. Copies of one modality give the same
    result as this modality alone. Without any modality, the logit is 0.

    Conflict is the Jensen-Shannon divergence of the modalities in bits, with equal weights for any rule. With the
    binary entropy :math:`H` and the probabilities :math:`p_m` (with `"precision"` the expected ones) it is

    .. math::
        H\Bigl(\frac{1}{P} \sum_m p_m\Bigr) - \frac{1}{P} \sum_m H(p_m)

    which is 0 if all agree, and 1 if half of them are certain that the label is present and half that it is absent.

    Source: Kendall and Gal 2017, arXiv 1703.04977 (logits with a standard deviation); Zhang et al. 2023, arXiv
    2306.02050 (QMF: weights linear in the energy, here their shares), with the energy of labels that do not exclude
    each other of Wang et al. 2021, arXiv 2109.14162; Cao et al. 2024, arXiv 2406.04802 (PDF: its uniformity is
    :math:`d_m` for present and absent as the two classes); Lin 1991, doi 10.1109/18.61115 (the divergence). Averaging
    the precisions, and comparing :math:`d_m` with the mean of the others, are additions.

    Args:
        rule: One of the four rules.
        validate_args: Check values (NaN, a negative standard deviation) on the CPU only (None), never (False), or
            always (True), which stalls an accelerator.

    Raises:
        ValueError: If `rule` is unknown.
        TypeError: If `validate_args` is not True, False or None.

    Example:
        >>> logits = torch.tensor([3.0, -2.0]).view(1, 2, 1)  # one for it, one against
        >>> fused = DecisionFusion("mean")(logits)
        >>> fused.logits, fused.conflict
        (tensor([[0.5000]]), tensor([[0.5951]]))
        >>> std = torch.tensor([0.5, 2.0]).view(1, 2, 1)
        >>> fused = DecisionFusion("precision")(logits, std=std)
        >>> fused.weights.flatten(), fused.logits
        (tensor([0.9412, 0.0588]), tensor([[2.5754]]))
    """

    rule: DecisionRule
    validate_args: bool | None

    def __init__(self, rule: DecisionRule, *, validate_args: bool | None = None) -> None:
        super().__init__()
        check_choice("rule", rule, get_args(DecisionRule))
        check_validate_args(validate_args)
        self._set(rule=rule, validate_args=validate_args)

    def forward(
        self,
        logits: Tensor,
        *,
        std: Tensor | None = None,
        confidence: Tensor | None = None,
        missing: Tensor | None = None,
    ) -> FusedDecision:
        """Fuses the modalities of every label.

        Args:
            logits: Tensor (B, M, Q), for any number of modalities.
            std: Tensor (B, M, Q), at least 0, the standard deviations of the logits; needed by `"precision"`, and not
                used by other rules. If some are 0, only these count; infinite ones do not count.
            confidence: Tensor (B, M, Q) in [0, 1], such as the output of a head that is trained to predict
                `torch.where(labels, probs, 1 - probs)`; needed by `"predictive"`, and not used by other rules.
            missing: Bool tensor (B, M), True where a modality is missing. Values there are ignored.

        Returns:
            Logits, weights and conflict; all are 0 if all modalities are missing.

        Raises:
            ValueError: If shapes or devices disagree, an argument that the rule needs is None, a logit is not finite,
                `std` is negative or NaN, or `confidence` is not in [0, 1].
            TypeError: If a dtype is wrong.
        """
        sizes: dict[str, int] = {}
        check_tensor("logits", logits, "floating", "B M Q", sizes)
        given = {"std": std, "confidence": confidence}
        for name, value in given.items():
            if value is not None:
                check_tensor(name, value, "floating", "B M Q", sizes, logits.device)
        check_missing(missing, sizes, logits.device)
        needed = _NEEDS.get(self.rule)
        if needed is not None and given[needed] is None:
            raise ValueError(f"Expected `{needed}` with rule {self.rule!r}, but got None")
        left_out = None if missing is None else missing.unsqueeze(-1)
        if checks_values(logits, self.validate_args):
            check_finite("logits", logits, left_out)
            if std is not None:
                check_std("std", std, left_out, infinite=True)
            if confidence is not None:
                check_range("confidence", confidence, 0, 1, left_out)

        std = std if self.rule == "precision" else None
        counted = torch.ones_like(logits, dtype=torch.bool)
        if left_out is not None:
            counted = ~left_out.expand_as(logits)
        if std is not None:
            counted = counted & (std < math.inf)
            std = at_least_float32(std).masked_fill(~counted, 1)
        logits = at_least_float32(logits).masked_fill(~counted, 0)

        if std is not None:
            scores = _log_precision(std)
        elif self.rule == "energy":
            scores = _log_softplus(logits).logsumexp(-1, keepdim=True).expand_as(logits)
        elif self.rule == "predictive" and confidence is not None:
            confidence = at_least_float32(confidence).masked_fill(~counted, 1)
            scores = _calibrated_belief(logits, confidence, counted)
        else:
            scores = torch.zeros_like(logits)
        log_weights = scores.masked_fill(~counted, _lowest(logits)).log_softmax(1)
        weights = log_weights.exp() * counted
        fused = _average(weights, logits)
        if std is not None:
            parts = (log_weights + scores).masked_fill(~counted, _lowest(logits))
            log_precision = parts.logsumexp(1).masked_fill(~counted.any(1), 0)
            fused = moderated(fused, torch.exp(-0.5 * log_precision))
            logits = moderated(logits, std)
        return FusedDecision(fused, weights, _divergence(logits, counted))


def _log_softplus(x: Tensor) -> Tensor:
    """Logarithm of log(1 + exp(x)), even where exp(x) overflows; below -15 it is x - exp(x) / 2, up to 1e-13."""
    low = x < -15
    return torch.where(
        low, x - x.clamp_max(-15).exp() / 2, (-F.logsigmoid(-x.clamp_min(-15))).log()
    )


def _others(x: Tensor) -> Tensor:
    """Sum over the other modalities."""
    return x.sum(1, keepdim=True) - x


def _calibrated_belief(logits: Tensor, confidence: Tensor, counted: Tensor) -> Tensor:
    """The calibrated collaborative belief of PDF; modalities that do not count have confidence 1 and logit 0."""
    tiny = torch.finfo(logits.dtype).tiny
    present = counted.to(logits.dtype).sum(1, keepdim=True).clamp_min(1)
    loss = -confidence.clamp_min(tiny).log()
    total = loss.sum(1, keepdim=True)
    share = torch.where(total > 0, loss / total.masked_fill(total == 0, 1), 1 / present)
    decided = (logits / 2).tanh().abs()  # twice the distance from 1/2
    own, others = (present - 1) * decided, _others(decided)
    calibration = torch.where(own < others, own / others.clamp_min(tiny), 1)
    return calibration * (confidence + 1 - share)


def _divergence(logits: Tensor, counted: Tensor) -> Tensor:
    """Jensen-Shannon divergence in bits, as the mean divergence from the mean, which avoids cancellation."""
    present = counted.to(logits.dtype).sum(1).clamp_min(1)
    log_probs = F.logsigmoid(torch.stack([logits, -logits]))
    log_mean = log_probs.masked_fill(~counted, _lowest(logits)).logsumexp(2) - present.log()
    log_mean = log_mean.masked_fill(~counted.any(1), 0).unsqueeze(2)
    divergence = (log_probs.exp() * (log_probs - log_mean)).sum(0)
    mean = divergence.masked_fill(~counted, 0).sum(1) / present
    return (mean / math.log(2)).clamp(0, 1)
