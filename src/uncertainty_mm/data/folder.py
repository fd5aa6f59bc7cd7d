"""A folder of memory-mapped arrays, for features that do not fit in memory: :func:`read_folder`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from uncertainty_mm.data._arrays import SPLITS, named, tensor_array, unreadable
from uncertainty_mm.data._sequences import SPLIT_NAMES, need
from uncertainty_mm.data.dataset import (
    MultimodalDataset,
    check_names,
    check_parts,
    check_targets,
)

_UNFINISHED = ".unfinished"


def write_folder(parts: Mapping[str, MultimodalDataset], folder: str | PathLike[str]) -> None:
    """Writes data sets as plain `.npy` files, one folder per split, for :func:`read_folder`.

    Args:
        parts: Data sets by split, as any reader returns them. Features keep their dtype, except that bfloat16, which
            NumPy lacks, becomes float32.
        folder: The folder to write, which must be empty or not exist. It is left empty if writing fails. It contains a
            file `.unfinished` until the end, by which :func:`read_folder` notices if the process was killed.

    Raises:
        ValueError: If the folder is not empty, or a split or modality cannot name a file.
        TypeError: If `parts` holds anything but data sets.

    Example:
        >>> import tempfile
        >>> data = MultimodalDataset(
        ...     {"text": torch.ones(4, 5, 8)},
        ...     {"text": torch.zeros(4, 5).bool()},
        ...     torch.ones(4, 1),
        ...     ["happy"],
        ... )
        >>> folder = tempfile.mkdtemp()
        >>> write_folder({"train": data}, folder)
        >>> read_folder(folder)["train"][0].features["text"].shape
        torch.Size([5, 8])
    """
    root = Path(folder)
    check_parts(parts)
    need(not root.exists() or root.is_dir(), root, "not a folder")
    need(not root.exists() or not any(root.iterdir()), root, "the folder is not empty")
    for split, data in parts.items():
        for name in (split, *data.features):
            plain = Path(name).name == name and not name.startswith(".")
            need(plain, root, f"`{name}` cannot be the name of a file")
    root.mkdir(parents=True, exist_ok=True)
    try:
        (root / _UNFINISHED).touch(exist_ok=False)
    except FileExistsError:
        raise ValueError(f"{root}: another process writes into this folder") from None
    try:
        for split, data in parts.items():
            _write_split(data, root / split)
    except BaseException:  # such as a full disk
        for split in parts:
            shutil.rmtree(root / split, ignore_errors=True)
        (root / _UNFINISHED).unlink()
        raise
    (root / _UNFINISHED).unlink()


def _write_split(data: MultimodalDataset, folder: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "labels": tensor_array(data.labels),
        "label_names": np.array(data.label_names),
        "modalities": np.array(list(data.features)),
        "invalid_steps": np.array(list(data.invalid_steps.values())),
    }
    for key in ("soft_labels", "unknown", "groups"):
        if getattr(data, key) is not None:
            arrays[key] = tensor_array(getattr(data, key))
    if data.ids is not None:
        arrays["ids"] = np.array(data.ids, np.str_)
    for name, x in data.features.items():
        arrays[f"features.{name}"] = tensor_array(x)
        arrays[f"padding_mask.{name}"] = tensor_array(data.padding_mask[name])
    folder.mkdir()
    for key, array in arrays.items():
        with open(folder / f"{key}.npy", "wb") as file:
            # To a real file NumPy writes directly, and does not report a full disk when it closes the file.
            np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)


def read_folder(
    folder: str | PathLike[str], *, label_names: Sequence[str] | None = None
) -> dict[str, MultimodalDataset]:
    """Opens a folder of :func:`write_folder`; features stay on disk, and a batch reads only its rows.

    The tensors are private maps, so writing to them does not change the files. Forked workers of a `DataLoader`, as on
    Linux, share them; spawned workers each get a copy in memory. The features are not read, so they are not checked for
    values that are not finite.

    New data with only `features.<modality>.npy` and `padding_mask.<modality>.npy` need no `labels.npy` and
    `label_names.npy`: pass `label_names`, and all labels are unknown. Files directly in the folder, without a folder
    for a split, are the single part `"all"`.

    Args:
        folder: The folder.
        label_names: Labels in the desired order, into which the columns of the folder are put. None for the order of
            the folder.

    Returns:
        The data sets by the name of their folder; `dev`, `val` and `valid` become `"validation"`.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If a file is missing, broken, or does not match the others.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    need(not (root / _UNFINISHED).exists(), root, "was not written to its end; write it anew")
    if label_names is not None:
        check_names("label_names", label_names, "sequence")
    found: dict[str, Path] = {"all": root} if any(root.glob("features.*.npy")) else {}
    if not found:
        for each in sorted(root.iterdir()):
            if each.is_dir() and not each.name.startswith("."):
                name = SPLIT_NAMES.get(each.name.lower(), each.name)
                need(name not in found, root, f"holds the {name} split twice, in `{each.name}` too")
                found[name] = each
    need(found, root, "holds no split, that is, no folder")
    order = [name for name in SPLITS if name in found]
    order += [name for name in found if name not in SPLITS]
    return named({name: _read_split(found[name], label_names) for name in order}, label_names, root)


def _read_split(split: Path, label_names: Sequence[str] | None) -> MultimodalDataset:
    arrays: dict[str, NDArray[Any]] = {}
    for file in sorted(split.glob("*.npy")):
        mapped = file.name.startswith("features.")
        try:
            array = np.load(file, mmap_mode="c" if mapped else None, allow_pickle=False)
        except Exception as error:  # a damaged header may raise anything
            raise unreadable(file, ".npy", error) from error
        if not isinstance(array, np.ndarray):  # an archive
            array.close()
            raise unreadable(file, ".npy", "it is a zip archive")
        arrays[file.stem] = array
    if "modalities" in arrays:
        names = [str(name) for name in arrays["modalities"].reshape(-1)]
    else:
        names = [key.removeprefix("features.") for key in arrays if key.startswith("features.")]
    need(names, split, "holds no `features.<modality>.npy`")
    wanted = [f"{kind}.{name}" for name in names for kind in ("features", "padding_mask")]
    for key in [*wanted, *(("labels", "label_names") if label_names is None else ())]:
        need(key in arrays, split, f"missing `{key}.npy`")
    tensors = {}
    try:
        for key, array in arrays.items():
            if array.dtype.kind != "U":
                tensors[key] = torch.from_numpy(array)
        columns = arrays["label_names"].reshape(-1) if "label_names" in arrays else None
        file_names = [str(name) for name in (label_names or () if columns is None else columns)]
        labels, unknown = tensors.get("labels"), tensors.get("unknown")
        if labels is None:
            labels = torch.full((len(arrays[wanted[0]]), len(file_names)), torch.nan, device="cpu")
        data = MultimodalDataset(
            {name: tensors[f"features.{name}"] for name in names},
            {name: tensors[f"padding_mask.{name}"] for name in names},
            labels,
            file_names,
            soft_labels=tensors.get("soft_labels"),
            unknown=unknown,
            ids=[str(name) for name in arrays["ids"]] if "ids" in arrays else None,
            groups=tensors.get("groups"),
            invalid_steps=dict(zip(names, arrays["invalid_steps"].tolist(), strict=True))
            if "invalid_steps" in arrays
            else None,
            validate_args=False,  # the features are on the disk
        )
        check_targets(labels, data.soft_labels, data.unknown)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{split}: {error}") from error
    return data
