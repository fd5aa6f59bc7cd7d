"""The best monotone map of probabilities: :class:`IsotonicCalibration`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uncertainty_mm._checks import check_number, check_positive_int, check_validate_args
from uncertainty_mm._component import Component
from uncertainty_mm.calibration._data import checked_input, fitting_data


class IsotonicCalibration(Component):
    r"""Replaces probabilities by the frequencies that fit the labels best while keeping the order of the samples.

    .. math::
        \min_f \sum_i (f(p_{iq}) - y_{iq})^2 \quad \text{over all non-decreasing } f

    for every label separately. Pooling adjacent violators gives a map that is constant on blocks of samples and linear
    between them, and constant beyond the outermost samples. It can correct any error that keeps the order of the
    samples, but needs many samples. Before :meth:`fit`, and for a label that is never known, nothing is changed. A
    label that no known sample has becomes 0 everywhere, and one that all have becomes 1. The fit is saved with the
    model; optimizers and weight averaging do not change it.

    Source: Zadrozny and Elkan 2002, "Transforming classifier scores into accurate multiclass probability estimates";
    equal to `sklearn.isotonic.IsotonicRegression(out_of_bounds="clip")`.

    Args:
        num_labels: Number of labels :math:`Q`.
        max_knots: Number :math:`N` of points kept for the map of a label, at least 2. If a map has more, evenly
            spaced ones are kept, and it stays non-decreasing.
        validate_args: Check values (probabilities in [0, 1]) on the CPU only (None; always in :meth:`fit`), never
            (False), or always (True), which stalls an accelerator. Unchecked, a label above 0.5 counts as present, and
            probabilities that are not finite are left out.

    Attributes:
        knots: Tensor (Q, N) in [0, 1], ascending: the points of the map. The last is repeated to fill the row.
        levels: Tensor (Q, N) in [0, 1], ascending: the values of the map there.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> probs = torch.tensor([[0.1], [0.2], [0.6], [0.7], [0.8]])
        >>> labels = torch.tensor([[0], [0], [1], [0], [1]])
        >>> calibration = IsotonicCalibration(num_labels=1).fit(probs, labels)
        >>> calibration(torch.tensor([[0.15], [0.4], [0.65], [0.99]])).T
        tensor([[0.0000, 0.2500, 0.5000, 1.0000]])
    """

    num_labels: int
    max_knots: int
    validate_args: bool | None
    knots: Tensor
    levels: Tensor

    def __init__(
        self, num_labels: int, *, max_knots: int = 512, validate_args: bool | None = None
    ) -> None:
        super().__init__()
        check_positive_int("num_labels", num_labels)
        check_positive_int("max_knots", max_knots)
        check_number("max_knots", max_knots, "of at least 2", max_knots >= 2)
        check_validate_args(validate_args)
        self._set(num_labels=num_labels, max_knots=max_knots, validate_args=validate_args)
        self._keep(
            knots=torch.empty(num_labels, max_knots), levels=torch.empty(num_labels, max_knots)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Removes the fit, so that nothing is changed."""
        for state in (self.knots, self.levels):
            state.fill_(1)
            state[:, 0] = 0

    def forward(self, probs: Tensor) -> Tensor:
        """Calibrates probabilities.

        Args:
            probs: Tensor (B, Q) in [0, 1].

        Returns:
            Tensor (B, Q) in [0, 1], in at least float32. The gradient is the slope of the map.

        Raises:
            ValueError: If the shape or the device is wrong, or `probs` is out of range.
            TypeError: If the dtype is wrong.
        """
        probs = checked_input(self, "probs", probs, self.knots)
        dtype = torch.promote_types(probs.dtype, self.knots.dtype)
        p, knots, levels = (x.to(probs.device, dtype) for x in (probs.T, self.knots, self.levels))
        # the first knot that is not below p; the map is linear from the knot before it
        right = torch.searchsorted(knots, p.detach().contiguous())
        left, right = (right - 1).clamp_min(0), right.clamp_max(self.max_knots - 1)
        start, end = knots.gather(1, left), knots.gather(1, right)
        low, high = levels.gather(1, left), levels.gather(1, right)
        width = end - start
        share = (p - start) / torch.where(width > 0, width, 1)
        # `lerp` does not overshoot the ends by rounding.
        return torch.where(width > 0, torch.lerp(low, high, share), high).T.to(probs.dtype)

    @torch.no_grad()
    def fit(
        self, probs: Tensor, labels: Tensor, unknown: Tensor | None = None
    ) -> IsotonicCalibration:
        """Fits the map exactly, on the CPU.

        Args:
            probs: Tensor (B, Q) in [0, 1], of a validation set.
            labels: Tensor (B, Q) of 0 and 1.
            unknown: Bool tensor (B, Q), True where a label is not known. Values there are ignored.

        Returns:
            The module itself.

        Raises:
            ValueError: If shapes or devices disagree, values are out of range, or no label is known; the map is then
                unchanged.
            TypeError: If a dtype is wrong.
        """
        p, present, known = (x.T for x in fitting_data(self, "probs", probs, labels, unknown))
        label, sample = known.nonzero(as_tuple=True)
        entries = label, p[label, sample], present[label, sample]
        maps = p.new_ones(2, self.num_labels, self.max_knots)
        maps[:, :, 0] = 0
        for q, knots_and_levels in enumerate(_maps(*entries, self.num_labels)):
            count = knots_and_levels.shape[1]
            place = torch.arange(self.max_knots, device="cpu").clamp_max(count - 1)
            if count > self.max_knots:
                place = torch.linspace(0, count - 1, self.max_knots, device="cpu").long()
            if count > 0:
                maps[:, q] = knots_and_levels[:, place]
        self.knots.copy_(maps[0])
        self.levels.copy_(maps[1])
        return self


def _maps(label: Tensor, p: Tensor, present: Tensor, num_labels: int) -> list[Tensor]:
    """Knots and levels (2, N) of every label, by pooling adjacent violators in all labels at once.

    Args:
        label: Tensor (N,), ascending, the label of each known entry.
        p: Tensor (N,), the probability of each entry.
        present: Tensor (N,), 1 where the label is present.
        num_labels: Number of labels.
    """
    order = p.sort(stable=True).indices
    order = order[label[order].sort(stable=True).indices]
    label, p, present = label[order], p[order], present[order]
    first, last = p, p
    # Entries of equal probability are joined to blocks first, then neighbouring blocks whose share does not rise.
    count, joins = torch.ones_like(p), (label[1:] == label[:-1]) & (p[1:] == p[:-1])
    while True:
        begins = ~F.pad(joins, (1, 0))
        starts, block = begins.nonzero().flatten(), begins.cumsum(0) - 1
        ends = torch.cat([starts[1:], starts.new_tensor([len(begins)])]) - 1
        label, first, last = label[starts], first[starts], last[ends]
        present, count = (
            x.new_zeros(len(starts)).index_add_(0, block, x) for x in (present, count)
        )
        # shares are compared as products of integers, which are exact
        joins = present[1:] * count[:-1] <= present[:-1] * count[1:]
        joins &= label[1:] == label[:-1]
        if not joins.any():
            break
    level = present / count
    maps = []
    for q in range(num_labels):
        own = label == q
        knots = torch.stack([first[own], last[own]], 1).flatten()
        twice = torch.stack([torch.ones_like(own[own]), first[own] < last[own]], 1).flatten()
        maps.append(torch.stack([knots, level[own].repeat_interleave(2)])[:, twice])
    return maps
