"""Logistic regression on log p and log(1 - p): :class:`BetaCalibration`."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from uncertainty_mm._checks import check_positive_int, check_validate_args
from uncertainty_mm._component import Component
from uncertainty_mm.calibration._data import checked_input, fitting_data, one_sided

SMALLEST = 2.0**-24  # the step below 1 in float32; probabilities keep this distance from 0 and 1
RIDGE = 1e-6  # makes the optimum unique, and finite where the labels are separated


class BetaCalibration(Component):
    r"""Corrects probabilities near 0 and near 1 by different amounts.

    .. math::
        \operatorname{logit} \operatorname{calibrated}(p)_q = a_q \ln p_q - b_q \ln(1 - p_q) + c_q, \quad a_q, b_q \ge 0

    This map is exact where the probabilities of positives and of negatives have beta distributions. With :math:`a = b`
    it is Platt scaling of the logits. For every label the order of the samples stays the same, except for ties. Before
    :meth:`fit`, :math:`a = b = 1` and :math:`c = 0`, which changes nothing. All three are saved with the model;
    optimizers and weight averaging do not change them.

    Source: Kull, Silva Filho and Flach 2017, "Beta calibration: a well-founded and easily implemented improvement on
    logistic calibration for binary classifiers".

    Args:
        num_labels: Number of labels :math:`Q`.
        validate_args: Check values (probabilities in [0, 1]) on the CPU only (None; always in :meth:`fit`), never
            (False), or always (True), which stalls an accelerator. Unchecked, a label above 0.5 counts as present, and
            probabilities that are not finite are left out.

    Attributes:
        a: Tensor (Q,), at least 0.
        b: Tensor (Q,), at least 0.
        c: Tensor (Q,).

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> probs = torch.full((300, 1), 0.99)  # confident,
        >>> labels = torch.arange(300).unsqueeze(1) % 3 > 0  # but right two times in three
        >>> calibration = BetaCalibration(num_labels=1).fit(probs, labels)
        >>> calibration(probs[:1])
        tensor([[0.6667]])
    """

    num_labels: int
    validate_args: bool | None
    a: Tensor
    b: Tensor
    c: Tensor

    def __init__(self, num_labels: int, *, validate_args: bool | None = None) -> None:
        super().__init__()
        check_positive_int("num_labels", num_labels)
        check_validate_args(validate_args)
        self._set(num_labels=num_labels, validate_args=validate_args)
        self._keep(**{name: torch.empty(num_labels) for name in "abc"})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Removes the fit, so that nothing is changed."""
        self.a.fill_(1)
        self.b.fill_(1)
        self.c.zero_()

    def forward(self, probs: Tensor) -> Tensor:
        r"""Calibrates probabilities.

        Args:
            probs: Tensor (B, Q) in [0, 1], clamped to :math:`[2^{-24}, 1 - 2^{-24}]`.

        Returns:
            Tensor (B, Q) in [0, 1], in at least float32.

        Raises:
            ValueError: If the shape or the device is wrong, or `probs` is out of range.
            TypeError: If the dtype is wrong.
        """
        probs = checked_input(self, "probs", probs, self.a)
        a, b, c = (x.to(probs.device, probs.dtype) for x in (self.a, self.b, self.c))
        present, absent = _features(probs)
        return (a * present + b * absent + c).sigmoid()

    @torch.no_grad()
    def fit(self, probs: Tensor, labels: Tensor, unknown: Tensor | None = None) -> BetaCalibration:
        r"""Fits the coefficients by maximum likelihood.

        .. math::
            \min_{a, b \ge 0,\, c} \sum_i \operatorname{BCE}(a \ln p_i - b \ln(1 - p_i) + c, y_i)
            + \tfrac{10^{-6}}{2} \left((a - 1)^2 + (b - 1)^2 + c^2\right)

        for every label separately. The problem is convex and is solved by Newton's method in float64 on the CPU, once
        for each choice of coefficients fixed at 0, of which the best is taken. The last term only makes the optimum
        unique. A label that all known samples have, or none of them, or that is never known, is left unchanged.

        Args:
            probs: Tensor (B, Q) in [0, 1], of a validation set.
            labels: Tensor (B, Q) of 0 and 1.
            unknown: Bool tensor (B, Q), True where a label is not known. Values there are ignored.

        Returns:
            The module itself.

        Raises:
            ValueError: If shapes or devices disagree, values are out of range, or no label is known; the coefficients
                are then unchanged.
            TypeError: If a dtype is wrong.
        """
        p, y, weight = fitting_data(self, "probs", probs, labels, unknown)
        x = torch.stack([*_features(p), torch.ones_like(p)], -1)
        best, lowest = x.new_ones(self.num_labels, 3), x.new_full(x.shape[1:2], torch.inf)
        for free in itertools.product((True, False), repeat=2):
            found, value = _newton(x, y, weight, torch.tensor([*free, True], device="cpu"))
            better = (found[:, :2] >= 0).all(1) & (value < lowest)
            best = torch.where(better.unsqueeze(1), found, best)
            lowest = torch.where(better, value, lowest)
        identity = x.new_tensor([1, 1, 0])
        best = torch.where(one_sided(y, weight).unsqueeze(1), identity, best)
        limits = torch.finfo(self.a.dtype)
        for state, values in zip((self.a, self.b, self.c), best.unbind(1), strict=True):
            state.copy_(values.clamp(limits.min, limits.max))
        return self


def _features(probs: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of p and of 1 / (1 - p), both of which increase with p."""
    probs = probs.clamp(SMALLEST, 1 - SMALLEST)
    return probs.log(), -(-probs).log1p()


def _objective(theta: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """The objective (Q,) of :meth:`BetaCalibration.fit`, for coefficients (Q, 3) and features (B, Q, 3)."""
    z = (x * theta).sum(-1)
    log_likelihood = (weight * F.logsigmoid((2 * y - 1) * z)).sum(0)  # -BCE, without cancellation
    away = theta - theta.new_tensor([1, 1, 0])
    return 0.5 * RIDGE * away.square().sum(1) - log_likelihood


def _newton(x: Tensor, y: Tensor, weight: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (Q, 3), 0 where they are not `free` (3,), and the values of the objective (Q,)."""
    theta = (x.new_tensor([1, 1, 0]) * free).expand(x.shape[1], 3)
    value, size = _objective(theta, x, y, weight), x.new_ones(x.shape[1])
    fixed = torch.diag((~free).to(x.dtype))
    for _ in range(200):  # about ten are needed, unless the labels are separated
        z = (x * theta).sum(-1)
        residual = weight * (z.sigmoid() - y)
        curvature = weight * z.sigmoid() * (-z).sigmoid()
        away = theta - x.new_tensor([1, 1, 0])
        gradient = ((residual.unsqueeze(-1) * x).sum(0) + RIDGE * away) * free
        hessian = torch.einsum("bq,bqi,bqj->qij", curvature, x, x)
        hessian = (hessian + RIDGE * torch.eye(3, dtype=x.dtype, device=x.device)) * (
            free & free.unsqueeze(1)
        ) + fixed
        step = -torch.linalg.solve(hessian, gradient)
        if (step.abs() <= 1e-10).all():
            break
        trial = theta + size.unsqueeze(1) * step
        trial_value = _objective(trial, x, y, weight)
        better = trial_value <= value * (1 + 1e-13)  # up to rounding
        theta = torch.where(better.unsqueeze(1), trial, theta)
        value = torch.where(better, trial_value, value)
        size = torch.where(better, (4 * size).clamp_max(1), size / 4)
    return theta, value
