"""What the measures take: predictions with labels, or an uncertainty and an error for every sample."""

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
    """The dtype that a measure is computed in: float64 where the device has it, else float32."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).sqrt()
    except (TypeError, RuntimeError):  # Apple's devices; some of Intel's
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

    What is unknown does not count, and neither does what is not finite where values were not looked at; the other two
    are 0 and False there.
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
    """Both in float64 on the CPU, without samples that are not finite, which were let in unchecked.

    What needs the order of all samples waits for them anyway, and not every device sorts, or sums, as exactly.
    """
    u, e = (x.detach().cpu().double() for x in (uncertainty, errors))
    kept = u.isfinite() & e.isfinite()
    return u[kept], e[kept]


def back(result: Tensor, given: Tensor) -> Tensor:
    """A result of the CPU where the data are."""
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
    """The smallest number that is at least a share of `count`; 0.1 + 0.2 of ten are three."""
    return math.ceil(share * count - 1e-6)
