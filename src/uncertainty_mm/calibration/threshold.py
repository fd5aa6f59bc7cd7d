"""Decision thresholds for probabilities: :func:`best_threshold`, :func:`expected_threshold`."""

from __future__ import annotations

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_flag,
    check_labels,
    check_range,
    check_tensor,
    check_unknown,
    check_validate_args,
    checks_values,
)


def best_threshold(
    probs: Tensor,
    labels: Tensor,
    unknown: Tensor | None = None,
    *,
    per_label: bool = False,
    validate_args: bool | None = None,
) -> Tensor:
    r"""Finds the decision threshold with the best F1 on a validation split.

    .. math::
        \operatorname*{arg\,max}_{t \in \{0.01, \dots, 0.99\}} \frac{2 \sum [p > t][y = 1]}{\sum [p > t] + \sum [y = 1]}

    with sums over all samples and labels (micro F1), or over the samples of each label. The smallest of equally good
    thresholds is taken. If no known label is present, every threshold has an F1 of 0, and 0.5 is returned. It takes
    :math:`O(BQ)` memory, because probabilities are counted between thresholds rather than compared with each.

    Args:
        probs: Tensor (B, Q) of calibrated probabilities in [0, 1] (:class:`PlattScaling`).
        labels: Tensor (B, Q) of 0 and 1, any real dtype.
        unknown: Bool tensor (B, Q), True where a label is not known. Values there are ignored.
        per_label: One threshold for each label instead of one for all.
        validate_args: Check values on the CPU only (None), never (False), or always (True). If unchecked, a label above
            0.5 counts as present, and probabilities of NaN are left out.

    Returns:
        Tensor (1,), or (Q,) with `per_label`, on the device of `probs`; `probs > threshold` decides.

    Raises:
        ValueError: If shapes or devices disagree, or values are out of range.
        TypeError: If a dtype is wrong.

    Example:
        >>> probs = torch.tensor([[0.905, 0.305], [0.605, 0.205], [0.505, 0.105]])
        >>> labels = torch.tensor([[1, 1], [0, 1], [0, 0]])
        >>> best_threshold(probs, labels)
        tensor([0.1100])
        >>> best_threshold(probs, labels, per_label=True)
        tensor([0.6100, 0.1100])
    """
    sizes: dict[str, int] = {}
    check_tensor("probs", probs, "floating", "B Q", sizes)
    device = probs.device
    check_tensor("labels", labels, "number", "B Q", sizes, device)
    check_unknown(unknown, "B Q", sizes, device)
    check_flag("per_label", per_label)
    check_validate_args(validate_args)
    if checks_values(probs, validate_args):
        check_range("probs", probs, 0, 1, unknown)
        check_labels("labels", labels, unknown)
    known = ~probs.isnan()
    if unknown is not None:
        known = known & ~unknown
    present = (labels > 0.5) & known
    grid = torch.linspace(0.01, 0.99, 99, device=device)
    # The number of thresholds that an entry exceeds, and the number of entries of each label for every such number.
    wide = torch.promote_types(probs.dtype, grid.dtype)
    exceeded = torch.searchsorted(grid.to(wide), probs.detach().to(wide).contiguous())
    place = exceeded * sizes["Q"] + torch.arange(sizes["Q"], device=device)
    counts = torch.zeros(2, (len(grid) + 1) * sizes["Q"], dtype=torch.int64, device=device)
    counts.index_add_(1, place.flatten(), torch.stack([present, known]).flatten(1).long())
    counts = counts.view(2, len(grid) + 1, sizes["Q"])
    if not per_label:
        counts = counts.sum(2, keepdim=True)
    # Entries that exceed more than i thresholds are those that exceed threshold i.
    hits, predicted = counts.flip(1).cumsum(1).flip(1)[:, 1:]
    positives = counts[0].sum(0)
    f1 = 2 * hits / (predicted + positives).clamp_min(1)
    return torch.where(positives > 0, grid[f1.argmax(0)], grid[len(grid) // 2])


def expected_threshold(
    probs: Tensor,
    unknown: Tensor | None = None,
    *,
    per_label: bool = False,
    validate_args: bool | None = None,
) -> Tensor:
    r"""Finds the decision threshold with the best expected F1, from calibrated probabilities without any labels.

    On a small validation split, the number of hits varies a lot from one threshold to the next. Calibrated
    probabilities give the expected number of hits instead. The best expected F1, as a ratio of expectations, is reached
    at a threshold of half its value (Lipton et al. 2014):

    .. math::
        F = \max_t \frac{2 \sum p \, [p > t]}{\sum [p > t] + \sum p}, \qquad t = \frac{F}{2}

    with sums over all samples and labels (micro F1), or over the samples of each label. If all probabilities are 0, or
    nothing is known, 0.5 is returned. Computed in float64 on the CPU. For probabilities that are not calibrated, use
    :func:`best_threshold`.

    Args:
        probs: Tensor (B, Q) of calibrated probabilities in [0, 1] (:class:`PlattScaling`), of a validation split.
        unknown: Bool tensor (B, Q), True to leave the entry out. Values there are ignored.
        per_label: One threshold for each label instead of one for all.
        validate_args: Check values on the CPU only (None), never (False), or always (True). If unchecked, probabilities
            of NaN are left out.

    Returns:
        Tensor (1,), or (Q,) with `per_label`, in float32 on the device of `probs`; `probs > threshold` decides.

    Raises:
        ValueError: If a shape is wrong, devices disagree, or values are out of range.
        TypeError: If a dtype is wrong.

    Example:
        >>> probs = torch.tensor([[0.9, 0.3], [0.6, 0.2], [0.5, 0.1]])
        >>> expected_threshold(probs)  # F1 = 2 (0.9 + 0.6 + 0.5) / (3 + 2.6)
        tensor([0.3571])
        >>> expected_threshold(probs, per_label=True)
        tensor([0.4000, 0.1923])
    """
    sizes: dict[str, int] = {}
    check_tensor("probs", probs, "floating", "B Q", sizes)
    check_unknown(unknown, "B Q", sizes, probs.device)
    check_flag("per_label", per_label)
    check_validate_args(validate_args)
    if checks_values(probs, validate_args):
        check_range("probs", probs, 0, 1, unknown)
    device, probs = probs.device, probs.detach().cpu().double()
    # An entry of 0 comes last and only lowers F1, so it never counts.
    if unknown is not None:
        probs = probs.masked_fill(unknown.cpu(), 0)
    probs = probs.nan_to_num(0)
    groups = probs if per_label else probs.reshape(-1, 1)
    hits = groups.sort(dim=0, descending=True).values.cumsum(0)
    decided = torch.arange(1, len(groups) + 1, device=probs.device).unsqueeze(1)
    total = groups.sum(0)
    half = hits / (decided + total)  # half of F1, for every number of decisions
    best = half.amax(0) if len(half) else total
    return torch.where(total > 0, best, 0.5).float().to(device)
