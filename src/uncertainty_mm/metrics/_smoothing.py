"""Differences between labels and probabilities, smoothed along the probability."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uncertainty_mm._checks import check_positive
from uncertainty_mm.metrics._inputs import precision

GRID = 4096  # intervals of [0, 1]


def check_bandwidth(bandwidth: float | None) -> None:
    if bandwidth is not None:
        check_positive("bandwidth", bandwidth)


def gaps(probs: Tensor, present: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (Q, GRID + 1) of y - p around every point of the grid, and the number of samples (Q,)."""
    p, y, one = (x.to(precision(probs.device)) for x in (probs, present, known))
    place = p * GRID
    left = place.long().clamp_max(GRID - 1)
    right_share = place - left
    num_labels = p.shape[1]
    flat = left + (GRID + 1) * torch.arange(num_labels, device=p.device)
    sums = p.new_zeros(num_labels * (GRID + 1))
    for index, share in ((flat, 1 - right_share), (flat + 1, right_share)):
        sums.index_add_(0, index.flatten(), ((y - p) * share).flatten())
    return sums.view(num_labels, GRID + 1), one.sum(0)


def smoothed_error(sums: Tensor, count: Tensor, bandwidth: float | None) -> Tensor:
    """The integral (Q,) of the absolute smoothed gap, for the given bandwidth, or the one equal to the integral.

    It is nan without samples. A function reflected at both ends is periodic and even, so a convolution is a product of
    Fourier transforms. The kernel is that of a continuous-time random walk on the grid with variance sigma^2: it tends
    to the Gaussian as the grid gets finer, and is never negative, so the integral decreases with sigma as it must.
    """
    if not len(count):
        return count  # there is no transform of nothing
    mean = sums / count.unsqueeze(1)
    around = torch.cat([mean, mean[:, 1:-1].flip(1)], 1)
    around[:, [0, GRID]] *= 2  # each end is its own reflection
    spectrum = torch.fft.rfft(around)
    angle = torch.arange(GRID + 1, dtype=mean.dtype, device=mean.device) * (math.pi / GRID)
    decay = 2 * (GRID * (angle / 2).sin()).square()

    def error(sigma: Tensor) -> Tensor:
        smooth: Tensor = torch.fft.irfft(spectrum * (-decay * sigma.square()).exp(), n=2 * GRID)
        return smooth.abs().sum(1, keepdim=True) / 2

    high = torch.ones_like(mean[:, :1])
    if bandwidth is not None:
        return error(high * bandwidth).squeeze(1)
    low = torch.zeros_like(high)
    for _ in range(40):
        middle = (low + high) / 2
        above = error(middle) > middle
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return error(high).squeeze(1)
