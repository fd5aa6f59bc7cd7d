"""Argument checks whose messages name the argument, the rule, and what was received.

Shape, dtype and device cost nothing to check, and always are. Reading values makes the host wait for an accelerator;
:func:`checks_values` tells when that is acceptable.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real

import torch
from torch import Tensor, nn

_BOOL = {torch.bool}
_INTEGER = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}  # torch cannot compare or index with them
_DTYPES = {
    "floating": _FLOATING,
    "bool": _BOOL,
    "integer": _INTEGER,
    "number": _FLOATING | _BOOL | _INTEGER | _UNSIGNED,
}
_KINDS = {
    "floating": "a floating dtype (float16 to float64)",
    "bool": "a bool dtype",
    "integer": "an integer dtype (uint8, int8 to int64)",
    "number": "a number dtype",
}


def checks_values(tensor: Tensor, validate_args: bool | None = None) -> bool:
    """Whether to check values: None on the CPU only, False never, True always; never while tracing."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    if validate_args is None:
        return tensor.device.type == "cpu"
    return validate_args and tensor.device.type != "meta"


def check_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"Expected `{name}` to be a positive integer, but got {value!r}")
    if value < 1:
        raise ValueError(f"Expected `{name}` to be a positive integer, but got {value}")


def check_positive_ints(**values: object) -> None:
    for name, value in values.items():
        check_positive_int(name, value)


def check_number(name: str, value: object, rule: str, ok: bool) -> None:
    """Raises unless `ok`, the rule as evaluated by the caller, is True; comparisons with NaN are always False."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Expected `{name}` to be a number {rule}, but got {value!r}")
    if not ok:
        raise ValueError(f"Expected `{name}` to be a number {rule}, but got {value}")


def check_probability(name: str, value: float) -> None:
    check_number(name, value, "in [0, 1]", isinstance(value, Real) and 0 <= value <= 1)


def check_dropout(value: float) -> None:
    check_number("dropout", value, "in [0, 1)", isinstance(value, Real) and 0 <= value < 1)


def check_positive(name: str, value: float) -> None:
    check_number(name, value, "above 0", isinstance(value, Real) and 0 < value < float("inf"))
    limits = torch.finfo(torch.float32)  # beyond them, a division is by 0 or by infinity
    check_number(name, value, "in the range of float32", limits.tiny <= value <= limits.max)


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"Expected `{name}` to be True or False, but got {value!r}")


def check_validate_args(value: object) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"Expected `validate_args` to be True, False or None, but got {value!r}")


def check_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"Expected `seed` to be an integer, but got {seed!r}")
    if not -(2**63) <= int(seed) < 2**64:  # what torch.Generator takes
        raise ValueError(f"Expected `seed` to be in [-2**63, 2**64), but got {seed}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {sorted(choices)}, but got {value!r}")


def check_tensor(
    name: str,
    value: object,
    kind: str,
    dims: str,
    sizes: dict[str, int],
    device: torch.device | None = None,
) -> Tensor:
    """Checks type, dtype, shape and device of a tensor argument.

    Args:
        name: Name of the argument, for the message.
        value: The argument.
        kind: `"floating"`, `"bool"`, `"integer"` or `"number"` (any of these).
        dims: Names of the dimensions, such as `"B M Q"`.
        sizes: Known sizes by dimension name; names met for the first time are added.
        device: Where the tensor has to be; None for any device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected `{name}` to be a tensor, but got {type(value).__name__}")
    if value.dtype not in _DTYPES[kind]:
        hint = (
            "; True leaves out, so `attention_mask == 0`" if name.startswith("padding_mask") else ""
        )
        raise TypeError(f"Expected `{name}` to have {_KINDS[kind]}, but got {value.dtype}{hint}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"Expected `{name}` to be a dense tensor, but got {layout}")
    names = dims.split()
    known = [sizes.get(dim) for dim in names]
    agrees = value.dim() == len(names) and all(
        size is None or size == received for size, received in zip(known, value.shape, strict=True)
    )
    if not agrees:
        wanted = ", ".join(
            dim if size is None or dim.isdigit() else f"{dim}={size}"
            for dim, size in zip(names, known, strict=True)
        )
        raise ValueError(
            f"Expected `{name}` to have shape ({wanted}), but got {tuple(value.shape)}"
        )
    for dim, received in zip(names, value.shape, strict=True):
        sizes[dim] = received
    if device is not None and value.device != device:
        raise ValueError(f"Expected `{name}` to be on {device}, but got {value.device}")
    return value


def check_like_parameters(name: str, tensor: Tensor, parameter: Tensor) -> None:
    """Raises unless a tensor has the device and, without autocast, the dtype of the parameters of the module."""
    if tensor.device != parameter.device:
        raise ValueError(
            f"Expected `{name}` to be on {parameter.device}, where the module is, but got {tensor.device}"
        )
    kind = tensor.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    if tensor.dtype != parameter.dtype and not autocast:
        raise TypeError(
            f"Expected `{name}` to have the dtype of the module, {parameter.dtype}, but got {tensor.dtype}"
        )


def sum_is_finite(tensor: Tensor) -> bool:
    """One pass without a temporary: where it is, all values are. A sum that overflows says nothing."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return math.isfinite(tensor.detach().sum(dtype=dtype).item())


def check_finite(name: str, tensor: Tensor, left_out: Tensor | None = None) -> None:
    """Raises for NaN and infinity, except where `left_out` (broadcastable) is True."""
    if sum_is_finite(tensor):
        return
    bad = ~torch.isfinite(tensor)
    if left_out is not None:
        bad = bad & ~left_out
    if bad.any():
        raise ValueError(
            f"Expected `{name}` to be finite, but got {int(bad.sum())} NaN or infinite values"
        )


def _extremes(tensor: Tensor) -> tuple[float, float]:
    """Smallest and largest value, both NaN if any value is; one pass without a temporary."""
    smallest, largest = tensor.detach().aminmax()
    return smallest.item(), largest.item()


def check_range(
    name: str, tensor: Tensor, low: float, high: float, left_out: Tensor | None = None
) -> None:
    """Raises unless all values are in [low, high]; NaN fails."""
    if tensor.numel() == 0:
        return
    smallest, largest = _extremes(tensor)
    if low <= smallest and largest <= high:
        return
    outside = ~((tensor >= low) & (tensor <= high))
    if left_out is not None:
        outside = outside & ~left_out
    if outside.any():
        example = tensor[outside.expand_as(tensor)][0].item()
        raise ValueError(f"Expected `{name}` to be in [{low}, {high}], but got {example}")


def check_labels(
    name: str,
    labels: Tensor,
    unknown: Tensor | None = None,
    hint: str = "mark a label that is not known in `unknown` (True: leave out)",
) -> None:
    """Raises unless all values are 0 or 1, except where `unknown` is True; for -1 and NaN with a hint."""
    if labels.dtype is torch.bool or labels.numel() == 0:
        return
    if labels.dtype in _INTEGER:
        smallest, largest = _extremes(labels)
        if smallest >= 0 and largest <= 1:
            return
    wrong = (labels != 0) & (labels != 1)
    if unknown is not None:
        wrong = wrong & ~unknown
    if wrong.any():
        value = labels[wrong][0].item()
        hint = f"; {hint}" if value == -1 or value != value else ""
        raise ValueError(f"Expected `{name}` to hold only 0 and 1, but got {value}{hint}")


def check_unknown(
    unknown: Tensor | None, dims: str, sizes: dict[str, int], device: torch.device
) -> Tensor | None:
    """Checks that the mask of unknown labels is bool, with the shape and on the device of the labels."""
    if unknown is not None:
        check_tensor("unknown", unknown, "bool", dims, sizes, device)
    return unknown


def any_dims(tensor: object) -> str:
    """Names for the dimensions of a tensor of any number of dimensions."""
    return " ".join(
        f"d{index}" for index in range(tensor.dim() if isinstance(tensor, Tensor) else 0)
    )


def check_gaussian(mean: Tensor, std: Tensor, validate_args: bool | None = None) -> None:
    """Checks mean and standard deviation (..., K) of a Gaussian."""
    if isinstance(mean, Tensor) and mean.dim() == 0:
        raise ValueError("Expected `mean` to have shape (..., K), but got ()")
    sizes: dict[str, int] = {}
    dims = any_dims(mean)
    check_tensor("mean", mean, "floating", dims, sizes)
    check_tensor("std", std, "floating", dims, sizes, mean.device)
    if checks_values(mean, validate_args):
        check_finite("mean", mean)
        check_std("std", std)


def check_std(
    name: str, std: Tensor, left_out: Tensor | None = None, infinite: bool = False
) -> None:
    """Raises unless all values are at least 0 and, unless `infinite` is True, finite."""
    if std.numel() == 0:
        return
    smallest, largest = _extremes(std)
    if smallest >= 0 and (infinite or largest < math.inf):
        return
    if not infinite:
        check_finite(name, std, left_out)
    check_range(name, std, 0, math.inf, left_out)


def check_gaussians(
    mean: Tensor,
    std: Tensor,
    missing: Tensor | None,
    sizes: dict[str, int],
    validate_args: bool | None = None,
    *,
    prefix: str = "",
    infinite: bool = False,
) -> None:
    """Checks Gaussians of shape (B, M, Q, K), their values except where a modality is missing."""
    check_tensor(f"{prefix}mean", mean, "floating", "B M Q K", sizes)
    check_tensor(f"{prefix}std", std, "floating", "B M Q K", sizes, mean.device)
    check_missing(missing, sizes, mean.device)
    if checks_values(mean, validate_args):
        left_out = None if missing is None else missing[:, :, None, None]
        check_finite(f"{prefix}mean", mean, left_out)
        check_std(f"{prefix}std", std, left_out, infinite)


def check_missing(
    missing: Tensor | None, sizes: dict[str, int], device: torch.device
) -> Tensor | None:
    if missing is not None:
        check_tensor("missing", missing, "bool", "B M", sizes, device)
    return missing


def check_modality_dims(value: object) -> None:
    """Raises unless `modality_dims` maps names, usable for submodules, to sizes."""
    if not isinstance(value, Mapping):
        raise TypeError(
            "Expected `modality_dims` to be a mapping from names to sizes, "
            f"but got {type(value).__name__}"
        )
    if not value:
        raise ValueError("Expected `modality_dims` to name at least one modality, but got none")
    for name, dim in value.items():
        if not isinstance(name, str):
            raise TypeError(f"Expected `modality_dims` to have str keys, but got {name!r}")
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                "Expected the keys of `modality_dims` to be usable as submodule names "
                f"(not empty, no dot, no attribute of nn.ModuleDict), but got {name!r}"
            )
        check_positive_int(f"modality_dims[{name!r}]", dim)


def check_known_names(argument: str, value: object, modality_dims: Mapping[str, int]) -> None:
    """Raises unless the argument is a mapping whose keys are modalities."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"Expected `{argument}` to be a mapping from modality names to tensors, "
            f"but got {type(value).__name__}"
        )
    unknown = sorted(str(name) for name in value if name not in modality_dims)
    if unknown:
        raise ValueError(
            f"Expected `{argument}` to hold only the modalities {list(modality_dims)}, "
            f"but got {unknown}"
        )


def check_features(
    features: Mapping[str, Tensor],
    padding_mask: Mapping[str, Tensor] | None,
    modality_dims: Mapping[str, int],
) -> None:
    """Checks sequences (B, S, D) and masks (B, S) by modality: names, shapes, dtypes and devices."""
    arguments = {"features": features, "padding_mask": {} if padding_mask is None else padding_mask}
    for argument, mapping in arguments.items():
        check_known_names(argument, mapping, modality_dims)
    if not features:
        raise ValueError(
            "Expected `features` to hold at least one modality, but got none: "
            "batch size and device are unknown without any"
        )
    sizes: dict[str, int] = {}
    device: torch.device | None = None
    for name, dim in modality_dims.items():
        if name not in features:
            continue
        sizes["D"] = dim
        sizes.pop("S", None)
        device = check_tensor(
            f"features[{name!r}]", features[name], "floating", "B S D", sizes, device
        ).device
        mask = None if padding_mask is None else padding_mask.get(name)
        if mask is not None:
            check_tensor(f"padding_mask[{name!r}]", mask, "bool", "B S", sizes, device)


def missing_modalities(
    features: Mapping[str, Tensor],
    padding_mask: Mapping[str, Tensor] | None,
    names: Iterable[str],
) -> Tensor:
    """Bool tensor (B, M), True where a modality is absent from `features` or wholly padded."""
    some = next(iter(features.values()))
    columns = []
    for name in names:
        mask = None if padding_mask is None else padding_mask.get(name)
        if name not in features or features[name].shape[1] == 0:
            columns.append(some.new_ones(some.shape[0], dtype=torch.bool))
        elif mask is None:
            columns.append(some.new_zeros(some.shape[0], dtype=torch.bool))
        else:
            columns.append(mask.all(dim=1))
    return torch.stack(columns, dim=1)
