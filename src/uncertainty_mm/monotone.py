"""Keeps confidence from rising when modalities are removed: :class:`MonotoneConfidenceLoss`."""

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
    r"""Penalises predictions that become more confident when modalities are removed.

    With the confidence :math:`\kappa` of a prediction from all modalities, and :math:`\kappa_S` of one from some of
    them, it is the mean, over all entries that are not left out, of

    .. math::
        \max(0,\; \kappa_S - \kappa)

    which is 0 unless fewer modalities give more confidence. Both confidences receive a gradient: detach `subset` to
    only raise the confidence for all modalities, or `full` to only lower the one for some.

    Source: Ma et al. 2023, "Calibrating Multimodal Learning", arXiv 2306.01265.

    Args:
        validate_args: Check values on the CPU only (None), never (False), or always (True), which stalls an
            accelerator.

    Raises:
        TypeError: If an argument has the wrong type.

    Example:
        >>> loss = MonotoneConfidenceLoss()
        >>> full = torch.tensor([0.9, 0.6])
        >>> subset = torch.tensor([0.7, 0.8])  # the second rose
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
            full: Tensor (B,), or (B, Q) for a confidence per label, from all modalities; larger means more confident.
            subset: Tensor of the same shape, from some modalities.
            mask: Bool tensor of the same shape, True to leave an entry out: where no modality was removed, or where the
                prediction from all modalities is wrong. Values there are ignored.

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
        # Entries left out are filled before any arithmetic, because their derivative would be NaN times 0.
        whole, part = (at_least_float32(x).masked_fill(mask, 0) for x in (full, subset))
        return (part - whole).relu().sum() / (~mask).sum().clamp_min(1)
