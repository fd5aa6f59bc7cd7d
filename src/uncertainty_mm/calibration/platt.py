"""A scale and a shift for every label: :class:`PlattScaling`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uncertainty_mm._checks import check_flag, check_positive_int, check_validate_args
from uncertainty_mm._component import Component
from uncertainty_mm.calibration._data import checked_input, fitting_data

# Strength of the prior that labels are alike, by cross-validation on a small real set (documentation, uncertainty).
LABEL_PRECISION = 20.0


class PlattScaling(Component):
    r"""Corrects the logits of a trained classifier for over- or underconfidence by a scale and a shift.

    .. math::
        \operatorname{calibrated}(\ell)_q = s_q \ell_q + t_q, \qquad s_q > 0

    The order of the samples stays the same for every label. Without `shift` this is temperature scaling with
    :math:`s = 1/T`. :meth:`fit` finds :math:`s` and :math:`t` on samples that the classifier was not trained on; before
    that nothing is changed. Both are saved with the model; optimizers and weight averaging do not change them.

    Source: Platt 1999, "Probabilistic Outputs for Support Vector Machines"; Guo et al. 2017, arXiv 1706.04599; the
    priors of :meth:`fit` are additions.

    Args:
        num_labels: Number of labels :math:`Q`.
        per_label: Let each label depart from the shared scale and shift; False fits one pair for all labels.
        shift: Fit a shift as well; False leaves it at 0.
        validate_args: Check values (NaN, infinity) on the CPU only (None; always in :meth:`fit`), never (False), or
            always (True), which stalls an accelerator. Unchecked, a label above 0.5 counts as present, and logits that
            are not finite are left out.

    Attributes:
        scale: Tensor (Q,), above 0; 1 before :meth:`fit`.
        shift: Tensor (Q,); 0 before :meth:`fit`.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> logits = torch.full((300, 1), 9.0)  # confident,
        >>> labels = torch.arange(300).unsqueeze(1) % 3 > 0  # but right two times in three
        >>> calibration = PlattScaling(num_labels=1).fit(logits, labels)
        >>> calibration(logits[:1]).sigmoid()
        tensor([[0.6672]])
    """

    num_labels: int
    per_label: bool
    with_shift: bool
    validate_args: bool | None
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        num_labels: int,
        *,
        per_label: bool = True,
        shift: bool = True,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("num_labels", num_labels)
        check_flag("per_label", per_label)
        check_flag("shift", shift)
        check_validate_args(validate_args)
        self._set(
            num_labels=num_labels,
            per_label=per_label,
            with_shift=shift,
            validate_args=validate_args,
        )
        self._keep(scale=torch.empty(num_labels), shift=torch.empty(num_labels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Removes the fit, so that nothing is changed."""
        self.scale.fill_(1)
        self.shift.zero_()

    def forward(self, logits: Tensor) -> Tensor:
        """Calibrates logits.

        Args:
            logits: Tensor (B, Q).

        Returns:
            Tensor (B, Q) in at least float32.

        Raises:
            ValueError: If the shape or the device is wrong, or `logits` is not finite.
            TypeError: If the dtype is wrong.
        """
        logits = checked_input(self, "logits", logits, self.scale)
        return logits * self.scale.to(logits.device) + self.shift.to(logits.device)

    @torch.no_grad()
    def fit(
        self,
        logits: Tensor,
        labels: Tensor,
        unknown: Tensor | None = None,
        *,
        groups: Tensor | None = None,
    ) -> PlattScaling:
        r"""Fits scale and shift.

        First one pair is fitted for all labels, then another pair per label to the logits calibrated by the first.
        Both minimise

        .. math::
            \sum_i \operatorname{BCE}(s \ell_i + t, y_i) + \tfrac{\lambda}{2} \left((\log s)^2 + t^2\right)

        which is the maximum a posteriori under a normal prior of :math:`\log s` and :math:`t`. :math:`\lambda = 1` for
        the shared pair; :math:`\lambda = 20` for the labels, which therefore depart from it only if some twenty samples
        or more support it. With 40 samples, labels fitted alone are calibrated worse than by the shared pair; with many
        samples the prior becomes negligible. Computed in float64 on the CPU.

        Args:
            logits: Tensor (B, Q), of a validation set.
            labels: Tensor (B, Q) of 0 and 1.
            unknown: Bool tensor (B, Q), True where a label is not known. Values there are ignored.
            groups: Integer tensor (B,), the source of each sample, such as a user. The samples of a group together
                count as one, because hundreds of samples of a few users say little about the next user, but would
                override the prior.

        Returns:
            The module itself.

        Raises:
            ValueError: If shapes or devices disagree, values are out of range, or no label is known; scale and shift
                are then unchanged.
            TypeError: If a dtype is wrong.
        """
        x, y, weight = fitting_data(self, "logits", logits, labels, unknown, groups=groups)
        column = [values.reshape(-1, 1) for values in (x, y, weight)]
        log_scale, shift = _maximum_a_posteriori(*column, with_shift=self.with_shift, precision=1.0)
        if self.per_label:
            calibrated = x * log_scale.exp() + shift
            own = _maximum_a_posteriori(
                calibrated, y, weight, with_shift=self.with_shift, precision=LABEL_PRECISION
            )
            log_scale, shift = log_scale + own[0], shift * own[0].exp() + own[1]
        # within the range of the dtype, because a scale of 0 would lose the order of the samples
        limits = torch.finfo(self.scale.dtype)
        self.scale.copy_(log_scale.exp().clamp(limits.tiny, limits.max))
        self.shift.copy_(shift.clamp(limits.min, limits.max))
        return self


def _objective(
    parameters: Tensor, x: Tensor, y: Tensor, weight: Tensor, precision: float
) -> Tensor:
    """Negative log-posterior (Q,) of parameters (2, Q), log-scale and shift, up to a constant."""
    z = x * parameters[0].exp() + parameters[1]
    log_likelihood = (weight * F.logsigmoid((2 * y - 1) * z)).sum(0)  # -BCE, without cancellation
    return -log_likelihood + 0.5 * precision * parameters.square().sum(0)


def _newton_step(
    parameters: Tensor, x: Tensor, y: Tensor, weight: Tensor, with_shift: bool, precision: float
) -> Tensor:
    """Newton step (2, Q) with the absolute eigenvalues of the Hessian.

    The objective is not convex in the log-scale, and so saddle points are left (Dauphin et al. 2014, arXiv 1406.2572).
    """
    scaled = x * parameters[0].exp()
    z, sign = scaled + parameters[1], 2 * y - 1
    residual = -weight * sign * (-sign * z).sigmoid()
    curvature = weight * z.sigmoid() * (-z).sigmoid()
    slope = torch.stack([(residual * scaled).sum(0), residual.sum(0)])
    cross = (curvature * scaled).sum(0)
    hessian = torch.stack(
        [(curvature * scaled.square()).sum(0) + slope[0], cross, cross, curvature.sum(0)], -1
    ).unflatten(-1, (2, 2)) + precision * torch.eye(2, dtype=x.dtype, device=x.device)
    gradient = slope + precision * parameters
    if not with_shift:
        gradient[1], hessian[:, 0, 1], hessian[:, 1, 0] = 0, 0, 0
    values, vectors = torch.linalg.eigh(hessian)
    along = (vectors * gradient.T.unsqueeze(-1)).sum(1)  # the gradient along each eigenvector
    step: Tensor = -(vectors * (along / values.abs().clamp_min(1e-3)).unsqueeze(1)).sum(-1)
    return step.T


def _maximum_a_posteriori(
    x: Tensor, y: Tensor, weight: Tensor, *, with_shift: bool, precision: float
) -> Tensor:
    """Log-scale and shift (2, Q) of the samples x (B, Q) with labels y, for all columns at once."""
    parameters = x.new_zeros(2, x.shape[1])  # the identity
    value, size = _objective(parameters, x, y, weight, precision), x.new_ones(x.shape[1])
    for _ in range(200):  # about ten are needed, unless the logits are huge
        step = _newton_step(parameters, x, y, weight, with_shift, precision)
        if (step.abs() <= 1e-10).all():
            break
        trial = parameters + size * step
        trial_value = _objective(trial, x, y, weight, precision)
        better = trial_value <= value * (1 + 1e-13)  # up to rounding
        parameters = torch.where(better, trial, parameters)
        value = torch.where(better, trial_value, value)
        size = torch.where(better, (4 * size).clamp_max(1), size / 4)
    return parameters
