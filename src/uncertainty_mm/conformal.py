"""Sets of labels with a guaranteed bound on the share of true labels missed: :class:`ConformalRiskControl`."""

from __future__ import annotations

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_probability,
    check_validate_args,
)
from uncertainty_mm._component import UNIT, Component
from uncertainty_mm.calibration._data import checked_input, fitting_data


class ConformalRiskControl(Component):
    r"""Predicts sets of labels that miss, on average, no more than a given share of the true labels.

    .. math::
        C(p) = \{q : p_q \ge \lambda\}, \qquad
        \mathbb{E}\left[\frac{|\{q : y_q = 1\} \setminus C(p)|}{|\{q : y_q = 1\}|}\right] \le \text{risk}

    for any distribution, model and number of samples in :meth:`fit`, as long as these and the new samples are
    exchangeable; the expectation is over both. A sample without labels misses nothing. Better probabilities give
    smaller sets. Before :meth:`fit` all labels are predicted. The threshold is saved with the model; optimizers and
    weight averaging do not change it.

    Source: Angelopoulos et al. 2022, "Conformal Risk Control", arXiv 2208.02814.

    Args:
        risk: Expected share of a sample's true labels that its set misses, in [0, 1].
        validate_args: Check values (probabilities in [0, 1]) on the CPU only (None; always in :meth:`fit`), never
            (False), or always (True), which stalls an accelerator. Unchecked, a label above 0.5 counts as present, and
            probabilities that are not finite are left out.

    Attributes:
        threshold: Tensor (), :math:`\lambda` in [0, 1]; 0 before :meth:`fit`. It is saved with the `risk` that it is
            for (`meaning`), and not loaded where another is asked for.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.2, 0.7], [0.6, 0.4]])
        >>> labels = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 1]])
        >>> sets = ConformalRiskControl(risk=0.3).fit(probs, labels)
        >>> sets.threshold  # (4 / 5) 1/8 + 1/5 = 0.3
        tensor(0.6000)
        >>> sets(torch.tensor([[0.65, 0.7], [0.2, 0.9]]))
        tensor([[ True,  True],
                [False,  True]])
    """

    risk: float
    validate_args: bool | None
    threshold: Tensor

    def __init__(self, risk: float = 0.1, *, validate_args: bool | None = None) -> None:
        super().__init__()
        check_probability("risk", risk)
        check_validate_args(validate_args)
        self._set(risk=risk, validate_args=validate_args)
        self._keep(threshold=torch.empty(()))
        self._keep_meaning(round(risk * UNIT))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Removes the fit, so that all labels are predicted."""
        self.threshold.zero_()
        self._reset_meaning()

    def _in_words(self, meaning: tuple[int, ...]) -> str:
        return f"`risk` {meaning[0] / UNIT:g}"

    def forward(self, probs: Tensor) -> Tensor:
        """Predicts sets.

        Args:
            probs: Tensor (B, Q) in [0, 1].

        Returns:
            Bool tensor (B, Q), True for a label in the set.

        Raises:
            ValueError: If the shape or the device is wrong, or `probs` is out of range.
            TypeError: If the dtype is wrong.
        """
        probs = checked_input(self, "probs", probs, self.threshold)
        return probs >= self.threshold.to(probs.device)

    @torch.no_grad()
    def fit(
        self, probs: Tensor, labels: Tensor, unknown: Tensor | None = None
    ) -> ConformalRiskControl:
        r"""Fits the threshold.

        .. math::
            \lambda = \max \left\{ t \in [0, 1] : \frac{n}{n + 1} \hat R(t) + \frac{1}{n + 1} \le \text{risk} \right\}

        where :math:`\hat R(t)` is the mean over the :math:`n` samples of the share of true labels below :math:`t`. If
        no threshold satisfies this, as for :math:`n < 1 / \text{risk} - 1`, it is 0 and all labels are predicted.
        Computed in float64 on the CPU, and rounded down.

        Args:
            probs: Tensor (B, Q) in [0, 1], of samples that neither the model nor its calibration was fitted to.
            labels: Tensor (B, Q) of 0 and 1.
            unknown: Bool tensor (B, Q), True where a label is not known. Values there are ignored; a sample of which
                nothing is known does not count, and the guarantee is for known labels.

        Returns:
            The module itself.

        Raises:
            ValueError: If shapes or devices disagree, values are out of range, or no label is known; the threshold is
                then unchanged.
            TypeError: If a dtype is wrong.
        """
        p, present, known = fitting_data(self, "probs", probs, labels, unknown)
        count = known.any(1).sum()
        # The increase of the risk when the threshold exceeds the probability of a true label.
        share = (present / present.sum(1, keepdim=True).clamp_min(1)).flatten()
        ordered, order = p.flatten().sort()
        total = share[order].cumsum(0) + 1
        lost = total > self.risk * (count + 1) + 1e-9  # up to rounding of the shares
        threshold = ordered[lost.double().argmax()] if lost.any() else ordered.new_ones(())
        if self.risk * (count + 1) + 1e-9 < 1:
            threshold = ordered.new_zeros(())
        rounded = threshold.to(self.threshold.dtype)
        down = torch.nextafter(rounded, torch.zeros_like(rounded))
        self.threshold.copy_(torch.where(rounded.double() > threshold, down, rounded))
        return self
