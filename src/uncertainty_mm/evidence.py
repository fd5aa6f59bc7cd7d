"""Trains evidence for and against each label: :class:`BetaEvidenceLoss`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from uncertainty_mm import functional
from uncertainty_mm._checks import (
    check_choice,
    check_positive_int,
    check_validate_args,
)
from uncertainty_mm._component import Component
from uncertainty_mm._recomputation import in_first_pass, recomputing

_ADVANCED = (
    "`advance` of a BetaEvidenceLoss was called in a forward pass that is now computed again, and the loss of the "
    "first pass had another step. Call it after the backward pass, outside the checkpointed function"
)


class BetaEvidenceLoss(Component):
    r"""Rewards evidence for the correct side of each label and, increasingly, penalises evidence for the wrong side.

    With the evidence :math:`e_w` for the wrong side of a label, present or absent, it is the mean over labels of

    .. math::
        \ell + \lambda_t \operatorname{KL}\bigl(\mathrm{Beta}(1, 1 + e_w) \,\|\, \mathrm{Beta}(1, 1)\bigr),
        \qquad \lambda_t = \min(1, t / T)

    where :math:`\ell` is :func:`~uncertainty_mm.functional.beta_evidence_loss`, the expected cross entropy, and the
    divergence is :func:`~uncertainty_mm.functional.beta_evidence_kl`. Its weight starts at 0, since a network that is
    penalised early for misleading evidence learns to give none at all.

    :math:`t` is the number of calls of :meth:`advance`. Call it once at the end of each epoch, as in the paper, or
    after each step of the optimiser; without any call the divergence never counts. A forward pass does not change
    :math:`t`.

    Source: Sensoy et al. 2018, arXiv 1806.01768, section 4, for two classes; with the cross entropy of their Eq. 4.

    Args:
        annealing_steps: :math:`T`, the steps until the divergence has its full weight; 10 epochs in the paper.
        reduction: `"mean"` over the known labels of the batch (0 without any), `"sum"`, or `"none"`.
        validate_args: Check values (negative evidence, labels) on the CPU only (None), never (False), or always (True),
            which stalls an accelerator.

    Attributes:
        step: Int64 tensor (), :math:`t`, saved with the model.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> loss = BetaEvidenceLoss(annealing_steps=2)
        >>> evidence = torch.tensor([[[0.0, 8.0]]])  # all of it misleading
        >>> labels = torch.tensor([[1]])
        >>> for epoch in range(4):
        ...     print(f"{loss(evidence, labels):.4f}")
        ...     loss.advance()
        2.8290
        3.4831
        4.1373
        4.1373
    """

    annealing_steps: int
    reduction: Literal["mean", "sum", "none"]
    validate_args: bool | None
    step: Tensor

    def __init__(
        self,
        *,
        annealing_steps: int = 10,
        reduction: Literal["mean", "sum", "none"] = "mean",
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("annealing_steps", annealing_steps)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        check_validate_args(validate_args)
        self._set(annealing_steps=annealing_steps, reduction=reduction, validate_args=validate_args)
        self._keep(step=torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Goes back to step 0."""
        self.step.zero_()

    def advance(self) -> None:
        """Advances by one step. Call it after the backward pass, in which checkpointing may repeat the loss.

        Raises:
            RuntimeError: If gradient checkpointing repeats the call.
        """
        self._check_remembers()
        one = torch.ones_like(self.step)
        if torch.compiler.is_compiling():
            one = in_first_pass(one, _ADVANCED)
        elif recomputing():
            raise RuntimeError(_ADVANCED)
        elif torch.is_grad_enabled():
            # Saves a tensor for the backward pass, so that a recomputation does not stop before it gets here.
            torch.zeros((), requires_grad=True).square()
        self.step.add_(one)

    def forward(self, evidence: Tensor, labels: Tensor, unknown: Tensor | None = None) -> Tensor:
        """Computes the loss of one batch.

        Args:
            evidence: Tensor (B, Q, 2), at least 0, such as `F.softplus` of two outputs per label: for its presence,
                `[..., 0]`, and its absence, `[..., 1]`.
            labels: Tensor (B, Q) of 0 and 1, any real dtype. If unchecked, above 0.5 counts as present.
            unknown: Bool tensor (B, Q), True where a label is not known. Values there are ignored.

        Returns:
            Scalar, or (B, Q) for `"none"` with 0 and zero gradient where unknown; in at least float32.

        Raises:
            ValueError: If shapes or devices disagree, evidence is negative or not finite, or labels are not 0 or 1.
            TypeError: If a dtype is wrong.
        """
        given = evidence, labels, unknown
        cost = functional.beta_evidence_loss(*given, validate_args=self.validate_args)
        divergence = functional.beta_evidence_kl(*given, validate_args=False)
        weight = (self.step.to(cost) / self.annealing_steps).clamp_max(1)
        loss = cost + weight * divergence
        if self.reduction == "none":
            return loss
        if self.reduction == "sum":
            return loss.sum()
        if unknown is None:
            return loss.sum() / max(loss.numel(), 1)
        return loss.sum() / (~unknown).sum().clamp_min(1)
