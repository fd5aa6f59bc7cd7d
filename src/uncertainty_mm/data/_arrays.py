"""Helpers for both layouts of NumPy files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from uncertainty_mm.data._formats import format_of
from uncertainty_mm.data._sequences import need
from uncertainty_mm.data.dataset import MultimodalDataset

SPLITS = ("train", "validation", "test")
"""Names of the splits, in the order of the codes 0, 1 and 2."""


def tensor_array(tensor: Tensor) -> NDArray[Any]:
    """A tensor on any device as an array; bfloat16, which NumPy lacks, becomes float32."""
    tensor = tensor.detach().cpu()
    array: NDArray[Any] = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def unreadable(path: str | PathLike[str], wanted: str, error: object) -> ValueError:
    """Makes the error for a file that is damaged, or of another format, which is named.

    Args:
        path: The file.
        wanted: The expected format, `".npz"` or `".npy"`.
        error: The error of reading it.
    """
    found = None
    with suppress(OSError):
        found = format_of(path)
    if found is not None and wanted not in found:
        error = f"it is {found}"
    elif "pickle" in str(error) or "Python objects" in str(error):
        # replaces NumPy's advice to allow pickles
        error = "it holds neither numbers nor strings"
    content = "a plain array" if wanted == ".npy" else "plain arrays"
    return ValueError(f"{path}: not a readable {wanted} file of {content} ({error})")


def named(
    parts: dict[str, MultimodalDataset],
    label_names: Sequence[str] | None,
    path: str | PathLike[str],
) -> dict[str, MultimodalDataset]:
    """The parts with their labels in the desired order."""
    if label_names is None:
        return parts
    for data in parts.values():
        need(
            sorted(data.label_names) == sorted(label_names),
            path,
            f"names the labels {data.label_names}, expected {list(label_names)}",
        )
    return {name: data.in_order(label_names) for name, data in parts.items()}
