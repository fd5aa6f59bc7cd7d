"""Checks and prepares the input of the measures: predictions and labels, or uncertainties and errors."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_finite,
    check_labels,
    check_probability,
    check_range,
    check_tensor,
    check_unknown,
    check_validate_args,
    checks_values,
)


@functools.cache
def precision(device: torch.device) -> torch.dtype:
    """The dtype in which a measure is computed: float64 where the device has it, otherwise float32."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).sqrt()
    except (TypeError, RuntimeError):  # Apple's devices and some of Intel's
        return torch.float32
    return torch.float64


def check_predictions(
    probs: Tensor,
    labels: Tensor,
    unknown: Tensor | None,
    validate_args: bool | None,
    num_labels: int | None = None,
) -> None:
    check_validate_args(validate_args)
    sizes = {} if num_labels is None else {"Q": num_labels}
    check_tensor("probs", probs, "floating", "N Q", sizes)
    check_tensor("labels", labels, "number", "N Q", sizes, probs.device)
    check_unknown(unknown, "N Q", sizes, probs.device)
    if checks_values(probs, validate_args):
        check_range("probs", probs, 0, 1, unknown)
        check_labels("labels", labels, unknown)


def predictions(
    probs: Tensor, labels: Tensor, unknown: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities in at least float32, which labels are present, and which entries count.

    Unknown entries do not count, nor do entries that are not finite where values are not checked; there the other two
    are 0 and False.
    """
    known = probs.isfinite() & labels.isfinite()
    if unknown is not None:
        known = known & ~unknown
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    return probs.masked_fill(~known, 0), (labels > 0.5) & known, known


def check_scores(uncertainty: Tensor, errors: Tensor, validate_args: bool | None) -> None:
    check_validate_args(validate_args)
    sizes: dict[str, int] = {}
    check_tensor("uncertainty", uncertainty, "number", "N", sizes)
    check_tensor("errors", errors, "number", "N", sizes, uncertainty.device)
    if checks_values(uncertainty, validate_args):
        dtype = precision(uncertainty.device)
        check_finite("uncertainty", uncertainty.to(dtype))
        check_finite("errors", errors.to(dtype))


def finite_scores(uncertainty: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 on the CPU, without samples that are not finite, which unchecked values may include.

    Measures of order have to wait for all samples anyway, and not every device sorts and sums as exactly.
    """
    u, e = (x.detach().cpu().double() for x in (uncertainty, errors))
    kept = u.isfinite() & e.isfinite()
    return u[kept], e[kept]


def back(result: Tensor, given: Tensor) -> Tensor:
    """Moves a result from the CPU to the device of the data."""
    return result.to(precision(given.device)).to(given.device)


def check_threshold(threshold: float | Tensor, probs: Tensor, validate_args: bool | None) -> None:
    if not isinstance(threshold, Tensor):
        check_probability("threshold", threshold)
        return
    num_labels = 1 if threshold.shape == (1,) else probs.shape[1]
    check_tensor("threshold", threshold, "floating", "Q", {"Q": num_labels}, probs.device)
    if checks_values(threshold, validate_args):
        check_range("threshold", threshold, 0, 1)


def enough(share: float, count: int) -> int:
    """The smallest integer of at least share * count, up to rounding: a share of 0.1 + 0.2 of ten gives three."""
    return math.ceil(share * count - 1e-6)
