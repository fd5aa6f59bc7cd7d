"""Combines several predictions into one: :class:`LogitPool`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from uncertainty_mm._checks import check_positive_ints, check_validate_args
from uncertainty_mm._component import Component
from uncertainty_mm.calibration._data import checked_input, fitting_data
from uncertainty_mm.calibration.platt import LABEL_PRECISION


class LogitPool(Component):
    r"""Combines several predictions of the same labels, with weights that reflect how good each prediction is.

    .. math::
        \operatorname{pooled}(\ell)_q = \sum_e w_e \ell_{eq}, \qquad w_e \ge 0, \quad \sum_e w_e = 1

    A weighted sum of logits multiplies the odds, each to the power of its weight, which is a logarithmic opinion pool.
    The weights are the same for all labels. :meth:`fit` finds them on samples that the experts were not trained on;
    before that they are equal. They are saved with the model; optimizers and weight averaging do not change them. The
    pool can be over- or underconfident even if the experts are not, so let :class:`~uncertainty_mm.PlattScaling`
    follow.

    Source: Genest and Zidek 1986, doi 10.1214/ss/1177013825 (logarithmic opinion pool); Hinton 2002,
    doi 10.1162/089976602760128018 (product of experts); the prior of :meth:`fit` is an addition.

    Args:
        num_experts: Number of predictions :math:`E`.
        num_labels: Number of labels :math:`Q`.
        validate_args: Check values (NaN, infinity) on the CPU only (None; always in :meth:`fit`), never (False), or
            always (True), which stalls an accelerator. Unchecked, a label above 0.5 counts as present, and is left out
            where the logit of an expert is not finite.

    Attributes:
        weight: Tensor (E,), at least 0, of sum 1; 1 / E before :meth:`fit`.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> labels = torch.arange(300).unsqueeze(1) % 2
        >>> knows, guesses = 2.0 * labels - 1, torch.arange(300).unsqueeze(1) % 3 - 1.0
        >>> logits = torch.stack([knows, guesses], 1)  # (300, 2, 1)
        >>> pool = LogitPool(num_experts=2, num_labels=1).fit(logits, labels)
        >>> pool.weight
        tensor([0.8281, 0.1719])
        >>> pool(logits).shape
        torch.Size([300, 1])
    """

    num_experts: int
    num_labels: int
    validate_args: bool | None
    weight: Tensor

    def __init__(
        self, num_experts: int, num_labels: int, *, validate_args: bool | None = None
    ) -> None:
        super().__init__()
        check_positive_ints(num_experts=num_experts, num_labels=num_labels)
        check_validate_args(validate_args)
        self._set(num_experts=num_experts, num_labels=num_labels, validate_args=validate_args)
        self._keep(weight=torch.empty(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Removes the fit: the weights become equal."""
        self.weight.fill_(1 / self.num_experts)

    def forward(self, logits: Tensor) -> Tensor:
        """Pools logits.

        Args:
            logits: Tensor (B, E, Q).

        Returns:
            Tensor (B, Q) in at least float32; for one expert exactly its logits.

        Raises:
            ValueError: If the shape or the device is wrong, or `logits` is not finite.
            TypeError: If the dtype is wrong.
        """
        logits = checked_input(self, "logits", logits, self.weight, "B E Q")
        weight = self.weight.to(logits)
        weight = weight / weight.sum()  # the sum is not 1 after rounding to half precision
        return (weight.unsqueeze(1) * logits).sum(1)

    @torch.no_grad()
    def fit(
        self,
        logits: Tensor,
        labels: Tensor,
        unknown: Tensor | None = None,
        *,
        groups: Tensor | None = None,
    ) -> LogitPool:
        r"""Fits the weights.

        With :math:`w = \operatorname{softmax}(a)` they minimise, together with a scale :math:`s` for all labels and a
        shift :math:`t_q` for each,

        .. math::
            \sum_{i, q} \operatorname{BCE}\Big(s \sum_e w_e \ell_{ieq} + t_q,\, y_{iq}\Big)
            + \tfrac12 \lVert a \rVert^2 + \tfrac12 (\log s)^2 + \tfrac{20}{2} \lVert t \rVert^2

        Without scale and shifts the weights would have to correct confidence and base rates as well; both are discarded
        afterwards. With few samples the prior keeps the weights nearly equal; with many it becomes negligible. Computed
        in float64 on the CPU.

        Args:
            logits: Tensor (B, E, Q), of a validation set.
            labels: Tensor (B, Q) of 0 and 1.
            unknown: Bool tensor (B, Q), True where a label is not known. Values there are ignored.
            groups: Integer tensor (B,), the source of each sample, such as a user. The samples of a group together
                count as one.

        Returns:
            The module itself.

        Raises:
            ValueError: If shapes or devices disagree, values are out of range, or no label is known; the weights are
                then unchanged.
            TypeError: If a dtype is wrong.
        """
        data = fitting_data(self, "logits", logits, labels, unknown, "B E Q", groups)
        self.weight.copy_(_maximum_a_posteriori(*data).softmax(0))
        return self


# Scale and weights are fitted as c = log(s w), so that each expert has one number, as in Platt scaling. From c follow
# log s = logsumexp(c), w = softmax(c), and a = c - mean(c), the shortest of all a with this softmax.


def _objective(c: Tensor, shift: Tensor, x: Tensor, y: Tensor, known: Tensor) -> Tensor:
    """Negative log-posterior of c (E,) and shift (Q,), up to a constant."""
    z = torch.einsum("e,ebq->bq", c.exp(), x) + shift
    log_likelihood = (known * F.logsigmoid((2 * y - 1) * z)).sum()
    prior = (c - c.mean()).square().sum() + c.logsumexp(0).square()
    return 0.5 * (prior + LABEL_PRECISION * shift.square().sum()) - log_likelihood


def _newton_step(
    c: Tensor, shift: Tensor, x: Tensor, y: Tensor, known: Tensor
) -> tuple[Tensor, Tensor]:
    """Newton steps (E,) and (Q,) with the absolute eigenvalues of the Hessian.

    As in Platt scaling, the objective is convex only in the shifts, which are eliminated first.
    """
    scaled = x * c.exp()[:, None, None]  # the derivative of the logits by c, and its own derivative
    z, sign = scaled.sum(0) + shift, 2 * y - 1
    residual = -known * sign * (-sign * z).sigmoid()
    curvature = known * z.sigmoid() * (-z).sigmoid()
    weight, log_scale = c.softmax(0), c.logsumexp(0)
    slope = (residual * scaled).sum((1, 2))
    gradient = slope + c - c.mean() + log_scale * weight
    hessian = (
        torch.einsum("ebq,fbq->ef", curvature * scaled, scaled)
        + torch.diag(slope + 1 + log_scale * weight)
        + (1 - log_scale) * torch.outer(weight, weight)
        - 1 / len(c)
    )
    by_shift = residual.sum(0) + LABEL_PRECISION * shift
    cross = (curvature * scaled).sum(1)
    share = cross / (curvature.sum(0) + LABEL_PRECISION)
    values, vectors = torch.linalg.eigh(hessian - share @ cross.T)
    along = vectors.T @ (gradient - share @ by_shift)
    step = -vectors @ (along / values.abs().clamp_min(1e-3))
    return step, -(by_shift / (curvature.sum(0) + LABEL_PRECISION)) - share.T @ step


def _maximum_a_posteriori(x: Tensor, y: Tensor, known: Tensor) -> Tensor:
    """The c (E,) of experts x (E, B, Q) on labels y (B, Q)."""
    c, shift = x.new_zeros(len(x)) - math.log(len(x)), x.new_zeros(y.shape[1])
    value, size = _objective(c, shift, x, y, known), 1.0
    for _ in range(200):  # about ten are needed, unless the logits are huge
        steps = _newton_step(c, shift, x, y, known)
        if max(step.abs().max() for step in steps) <= 1e-10:
            break
        trial = c + size * steps[0], shift + size * steps[1]
        trial_value = _objective(*trial, x, y, known)
        if trial_value <= value * (1 + 1e-13):  # up to rounding
            (c, shift), value, size = trial, trial_value, min(4 * size, 1.0)
        else:
            size /= 4
    return c
