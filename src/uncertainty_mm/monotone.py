"""No surer of less: :class:`MonotoneConfidenceLoss`."""

from __future__ import annotations

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    any_dims,
    check_finite,
    check_tensor,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import Component
from uncertainty_mm.functional import at_least_float32


class MonotoneConfidenceLoss(Component):
    r"""Asks that a prediction does not become surer when modalities are taken away.

    For the confidence :math:`\kappa` of a prediction from all modalities, and :math:`\kappa_S` of that from some of
    them, the mean over all that is not left out of

    .. math::
        \max(0,\; \kappa_S - \kappa)

    0 as long as less evidence is never the surer one. Both confidences receive a gradient, which is that of a step:
    detach `subset` to raise the confidence in the whole only, `full` to lower that in the part only.

    Source: Ma et al. 2023, "Calibrating Multimodal Learning", arXiv 2306.01265.

    Args:
        validate_args: Check values on the CPU only (None), never (False), or everywhere (True), which makes the host
            wait for an accelerator.

    Raises:
        TypeError: If an argument has the wrong type.

    Example:
        >>> loss = MonotoneConfidenceLoss()
        >>> full, subset = torch.tensor([0.9, 0.6]), torch.tensor([0.7, 0.8])  # the second became surer
        >>> loss(full=full, subset=subset)
        tensor(0.1000)
        >>> loss(full=full, subset=subset, mask=torch.tensor([False, True]))
        tensor(0.)
    """

    validate_args: bool | None

    def __init__(self, *, validate_args: bool | None = None) -> None:
        super().__init__()
        check_validate_args(validate_args)
        self._set(validate_args=validate_args)

    def forward(self, *, full: Tensor, subset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes the loss of one batch.

        Args:
            full: Tensor (B,), or (B, Q) for a confidence in every label, of all modalities; the larger the surer.
            subset: Tensor of that shape, of some of them.
            mask: Bool tensor of that shape, True leaves out: where nothing was taken away, or where the prediction of
                all modalities is wrong and should not be surer. Values there are ignored.

        Returns:
            Scalar of at least 0, in at least float32; 0 with zero gradient if everything is left out.

        Raises:
            ValueError: If shapes or devices disagree, or a value is not finite.
            TypeError: If a dtype is wrong.
        """
        sizes: dict[str, int] = {}
        dims = any_dims(full)
        check_tensor("full", full, "floating", dims, sizes)
        check_tensor("subset", subset, "floating", dims, sizes, full.device)
        if mask is None:
            mask = torch.zeros_like(full, dtype=torch.bool)
        check_tensor("mask", mask, "bool", dims, sizes, full.device)
        if checks_values(full, self.validate_args):
            check_finite("full", full, mask)
            check_finite("subset", subset, mask)
        # What is left out is filled before any arithmetic: its derivative would be NaN times 0.
        whole, part = (at_least_float32(x).masked_fill(mask, 0) for x in (full, subset))
        return (part - whole).relu().sum() / (~mask).sum().clamp_min(1)
