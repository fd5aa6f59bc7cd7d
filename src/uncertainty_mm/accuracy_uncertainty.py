"""Trains certainty where predictions are accurate: :class:`AccuracyUncertaintyLoss`."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_labels,
    check_number,
    check_range,
    check_std,
    check_tensor,
    check_unknown,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import Component
from uncertainty_mm.functional import at_least_float32


class AccuracyUncertaintyLoss(Component):
    r"""Asks that predictions are certain where they are accurate, and uncertain where they are not.

    Every prediction of a label is accurate or inaccurate, certain or uncertain. With its confidence
    :math:`c = \max(p, 1 - p)`, its uncertainty :math:`u`, and sums over the predictions of each kind,

    .. math::
        n_{AC} &= \sum c\, (1 - \tanh u) &\quad n_{AU} &= \sum c \tanh u \\
        n_{IC} &= \sum (1 - c)(1 - \tanh u) &\quad n_{IU} &= \sum (1 - c) \tanh u

    .. math::
        \ell = -\log \frac{n_{AC} + n_{IU}}{n_{AC} + n_{IU} + n_{AU} + n_{IC}}

    The sums run over all labels of the batch. If no prediction is accurate and certain, or inaccurate and uncertain,
    the loss is about 16 in float32 instead of infinite, and still has a gradient. If all predictions are inaccurate and
    of confidence 1, all sums are 0; the loss is then the limit for equal confidences.

    Source: Krishnan and Tickoo 2020, "Improving model calibration with accuracy versus uncertainty optimization",
    arXiv 2012.07923, for two classes.

    Args:
        threshold: Uncertainty up to which a prediction counts as certain. None computes it for every batch, halfway
            between the mean uncertainties of accurate and inaccurate predictions (if there is only one kind, its
            mean). The paper does this once, after some epochs.
        validate_args: Check values on the CPU only (None), never (False), or always (True), which stalls an
            accelerator.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> loss = AccuracyUncertaintyLoss()
        >>> probs = torch.tensor([[0.9, 0.9]])  # right, wrong
        >>> labels = torch.tensor([[1, 0]])
        >>> knows = loss(probs=probs, uncertainty=torch.tensor([[0.1, 0.6]]), labels=labels)
        >>> errs = loss(probs=probs, uncertainty=torch.tensor([[0.6, 0.1]]), labels=labels)
        >>> bool(knows < errs)
        True
    """

    threshold: float | None
    validate_args: bool | None

    def __init__(
        self, *, threshold: float | None = None, validate_args: bool | None = None
    ) -> None:
        super().__init__()
        if threshold is not None:
            in_range = isinstance(threshold, Real) and 0 <= threshold < float("inf")
            check_number("threshold", threshold, "of at least 0", in_range)
        check_validate_args(validate_args)
        self._set(threshold=threshold, validate_args=validate_args)

    def forward(
        self,
        *,
        probs: Tensor,
        uncertainty: Tensor,
        labels: Tensor,
        unknown: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of one batch.

        Args:
            probs: Tensor (B, Q) of probabilities in [0, 1]. Above 0.5 the label is predicted.
            uncertainty: Tensor (B, Q) of at least 0, on a scale where `tanh` does not saturate: the entropy of each
                label in nats, as in the paper, or values of about [0, 1].
            labels: Tensor (B, Q) of 0 and 1, any real dtype. If unchecked, above 0.5 counts as present.
            unknown: Bool tensor (B, Q), True where a label is not known; a whole row leaves the sample out. Values
                there are ignored.

        Returns:
            Scalar of at least 0, in at least float32; 0 with zero gradient if nothing is known.

        Raises:
            ValueError: If shapes or devices disagree, or values are out of range.
            TypeError: If a dtype is wrong.
        """
        sizes: dict[str, int] = {}
        check_tensor("probs", probs, "floating", "B Q", sizes)
        device = probs.device
        check_tensor("uncertainty", uncertainty, "floating", "B Q", sizes, device)
        check_tensor("labels", labels, "number", "B Q", sizes, device)
        check_unknown(unknown, "B Q", sizes, device)
        if checks_values(probs, self.validate_args):
            check_range("probs", probs, 0, 1, unknown)
            check_std("uncertainty", uncertainty, unknown)
            check_labels("labels", labels, unknown)
        p, u = at_least_float32(probs), at_least_float32(uncertainty)
        known = torch.ones_like(p)
        if unknown is not None:
            known = known.masked_fill(unknown, 0)
            p, u = p.masked_fill(unknown, 0), u.masked_fill(unknown, 0)
        accurate = (p > 0.5) == (labels > 0.5)
        certain = u <= (_halfway(u, accurate, known) if self.threshold is None else self.threshold)
        limits = torch.finfo(p.dtype)
        weight = known * torch.where(accurate, torch.maximum(p, 1 - p), torch.minimum(p, 1 - p))
        weight = torch.where(
            weight.sum() > limits.eps, weight, known
        )  # else all are wrong, and equally sure
        weight = weight * torch.where(certain, 1 - u.tanh(), u.tanh())
        as_it_should = accurate == certain
        good = weight.masked_fill(~as_it_should, 0).sum()
        bad = weight.masked_fill(as_it_should, 0).sum()
        least = limits.eps * (good + bad).detach().clamp_min(limits.tiny / limits.eps**2)
        return torch.log1p(bad / torch.maximum(good, least))


def _halfway(u: Tensor, accurate: Tensor, known: Tensor) -> Tensor:
    """The middle of the mean uncertainties of accurate and inaccurate predictions, or the one of the only kind."""
    groups = torch.stack([known * accurate, known * ~accurate])
    counts = groups.sum((1, 2))
    means = (u.detach() * groups).sum((1, 2)) / counts.clamp_min(1)
    return means.sum() / (counts > 0).sum().clamp_min(1)
