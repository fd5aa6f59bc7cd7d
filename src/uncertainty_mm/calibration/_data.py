"""Checks and prepares the arguments of all calibrations."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from uncertainty_mm._checks import (
    check_finite,
    check_labels,
    check_range,
    check_tensor,
    check_unknown,
    checks_values,
)
from uncertainty_mm.functional import at_least_float32

Kind = Literal["logits", "probs"]


class _Fitted(Protocol):
    validate_args: bool | None
    _is_replica: bool


def checked_input(
    module: _Fitted, name: Kind, values: Tensor, state: Tensor, dims: str = "B Q"
) -> Tensor:
    """Checked logits or probabilities, in at least float32."""
    device = None if module._is_replica else state.device
    check_tensor(name, values, "floating", dims, _sizes(module), device)
    if checks_values(values, module.validate_args):
        _check_values(name, values, None)
    return at_least_float32(values)


def fitting_data(
    module: _Fitted,
    name: Kind,
    values: Tensor,
    labels: Tensor,
    unknown: Tensor | None,
    dims: str = "B Q",
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked logits or probabilities, labels, and weights, each (B, Q) in float64 on the CPU.

    Unknown entries are 0 in all three, since 0 times NaN is NaN. Values (B, E, Q) of several experts become (E, B, Q),
    and an entry is known if all of them are finite. Weights are 1, or sum to 1 per label in each group.
    """
    sizes = _sizes(module)
    check_tensor(name, values, "floating", dims, sizes)
    check_tensor("labels", labels, "number", "B Q", sizes, values.device)
    check_unknown(unknown, "B Q", sizes, values.device)
    if groups is not None:
        check_tensor("groups", groups, "integer", "B", sizes, values.device)
    if sizes["B"] == 0:
        raise ValueError(f"Expected `{name}` to hold at least one sample, but got none")
    values = values.transpose(0, -2)  # experts, if any, go first to match labels (B, Q)
    if module.validate_args is not False:
        _check_values(name, values, unknown)
        check_labels("labels", labels, unknown)
    known = values.cpu().isfinite()
    known = known.all(0) if known.dim() > 2 else known
    if unknown is not None:
        known = known & ~unknown.cpu()
    if not known.any():
        raise ValueError("Expected `unknown` to leave at least one label, but got all of them")
    x, y = values.cpu().double().masked_fill(~known, 0), (labels.cpu() > 0.5) & known
    weight = known.double()
    if groups is not None:
        which = groups.cpu().unique(return_inverse=True)[1]
        size = weight.new_zeros(len(weight), weight.shape[1]).index_add_(0, which, weight)
        weight = weight / size[which].clamp_min(1)
    return x if name == "logits" else x.clamp(0, 1), y.double(), weight


def _sizes(module: _Fitted) -> dict[str, int]:
    settings = {"Q": "num_labels", "E": "num_experts"}
    return {dim: getattr(module, name) for dim, name in settings.items() if hasattr(module, name)}


def _check_values(name: Kind, values: Tensor, unknown: Tensor | None) -> None:
    if name == "logits":
        check_finite(name, values, unknown)
    else:
        check_range(name, values, 0, 1, unknown)


def one_sided(y: Tensor, weight: Tensor) -> Tensor:
    """Bool tensor (Q,), True for a label that all known samples have, or none of them, or that is never known."""
    present = y.sum(0)
    return (present == 0) | (present == weight.sum(0))
