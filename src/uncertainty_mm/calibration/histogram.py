"""Frequencies of the labels in bins of predictions: :class:`HistogramBinning`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from uncertainty_mm._checks import check_choice, check_positive_ints, check_validate_args
from uncertainty_mm._component import Component
from uncertainty_mm.calibration._data import checked_input, fitting_data

Binning = Literal["mass", "width"]


class HistogramBinning(Component):
    r"""Replaces a probability by the frequency of the label among samples with a similar probability.

    .. math::
        \operatorname{calibrated}(p)_q = \frac{\sum_i [p_{iq} \in b(p_q)] \, y_{iq}}{\sum_i [p_{iq} \in b(p_q)]}

    over the samples of :meth:`fit`, where :math:`b(p)` is the bin of :math:`p`, and each label has its own bins. It
    assumes nothing about the shape of the error, but needs some dozens of samples per bin, and makes all probabilities
    of a bin equal. Probabilities are left unchanged before :meth:`fit`, in a bin without samples, and for a label that
    is never known. In all other bins, a label that no known sample has becomes 0, and one that all have becomes 1. The
    fit is saved with the model; optimizers and weight averaging do not change it.

    Source: Zadrozny and Elkan 2001, "Obtaining calibrated probability estimates from decision trees and naive Bayesian
    classifiers".

    Args:
        num_labels: Number of labels :math:`Q`.
        num_bins: Number of bins :math:`N`.
        binning: `"mass"`: bins with equally many samples of :meth:`fit`, as far as ties allow. `"width"`: bins of equal
            width.
        validate_args: Check values (probabilities in [0, 1]) on the CPU only (None; always in :meth:`fit`), never
            (False), or always (True), which stalls an accelerator. Unchecked, a label above 0.5 counts as present, and
            probabilities that are not finite are left out.

    Attributes:
        edges: Tensor (Q, N - 1), ascending. A bin includes its lower edge, and the last one also its upper edge.
        frequency: Tensor (Q, N) in [0, 1]; -1 in a bin without samples.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument has the wrong type.

    Example:
        >>> probs = torch.tensor([[0.9], [0.8], [0.7], [0.2], [0.1]])
        >>> labels = torch.tensor([[1], [1], [0], [0], [0]])
        >>> calibration = HistogramBinning(num_labels=1, num_bins=2, binning="width")
        >>> calibration = calibration.fit(probs, labels)
        >>> calibration(torch.tensor([[0.99], [0.3]]))
        tensor([[0.6667],
                [0.0000]])
    """

    num_labels: int
    num_bins: int
    binning: Binning
    validate_args: bool | None
    edges: Tensor
    frequency: Tensor

    def __init__(
        self,
        num_labels: int,
        *,
        num_bins: int = 15,
        binning: Binning = "mass",
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_positive_ints(num_labels=num_labels, num_bins=num_bins)
        check_choice("binning", binning, ("mass", "width"))
        check_validate_args(validate_args)
        self._set(
            num_labels=num_labels, num_bins=num_bins, binning=binning, validate_args=validate_args
        )
        self._keep(
            edges=torch.empty(num_labels, num_bins - 1), frequency=torch.empty(num_labels, num_bins)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Removes the fit, so that nothing is changed."""
        steps = torch.arange(1, self.num_bins, device=self.edges.device)
        self.edges.copy_((steps / self.num_bins).expand_as(self.edges))
        self.frequency.fill_(-1)

    def forward(self, probs: Tensor) -> Tensor:
        """Calibrates probabilities.

        Args:
            probs: Tensor (B, Q) in [0, 1].

        Returns:
            Tensor (B, Q) in [0, 1], in at least float32. The gradient is 0 wherever a frequency is returned.

        Raises:
            ValueError: If the shape or the device is wrong, or `probs` is out of range.
            TypeError: If the dtype is wrong.
        """
        probs = checked_input(self, "probs", probs, self.edges)
        frequency = self.frequency.to(probs.device, probs.dtype)
        found = frequency.gather(1, _bins(self.edges.to(probs.device), probs)).T
        return torch.where(found >= 0, found, probs)

    @torch.no_grad()
    def fit(self, probs: Tensor, labels: Tensor, unknown: Tensor | None = None) -> HistogramBinning:
        """Counts the labels in each bin, on the CPU.

        Args:
            probs: Tensor (B, Q) in [0, 1], of a validation set.
            labels: Tensor (B, Q) of 0 and 1.
            unknown: Bool tensor (B, Q), True where a label is not known. Values there are ignored.

        Returns:
            The module itself.

        Raises:
            ValueError: If shapes or devices disagree, values are out of range, or no label is known; an earlier fit is
                then unchanged.
            TypeError: If a dtype is wrong.
        """
        p, present, known = fitting_data(self, "probs", probs, labels, unknown)
        steps = torch.arange(1, self.num_bins, device="cpu").double()
        edges = (steps / self.num_bins).expand(self.num_labels, -1)
        if self.binning == "mass":
            count = known.sum(0).long().unsqueeze(1)
            ordered = p.masked_fill(known == 0, 2).T.sort(1).values  # unknown entries come last
            # A bin begins halfway between two samples.
            place = (edges * count).round().long().clamp_min(1)
            above = ordered.gather(1, torch.minimum(place, count - 1).clamp_min(0))
            below = ordered.gather(1, place - 1)
            edges = torch.where(count > 0, (below + above) / 2, edges)
        edges = edges.to(self.edges.dtype)  # so that fit and forward compare with the same numbers
        index = _bins(edges, p)
        counts = p.new_zeros(2, self.num_labels, self.num_bins)
        counts[0].scatter_add_(1, index, present.T)
        counts[1].scatter_add_(1, index, known.T)
        self.edges.copy_(edges)
        self.frequency.copy_(torch.where(counts[1] > 0, counts[0] / counts[1], -1))
        return self


def _bins(edges: Tensor, probs: Tensor) -> Tensor:
    """Index (Q, B) of the bin of every probability (B, Q): the number of edges that it reaches."""
    dtype = torch.promote_types(edges.dtype, probs.dtype)
    columns = probs.detach().to(dtype).T.contiguous()
    return torch.searchsorted(edges.to(dtype).contiguous(), columns, right=True)
