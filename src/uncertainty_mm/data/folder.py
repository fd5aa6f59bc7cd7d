"""A folder of memory-mapped arrays, for features that do not fit into memory: :func:`read_folder`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from uncertainty_mm.data._sequences import need
from uncertainty_mm.data.dataset import MultimodalDataset, check_parts
from uncertainty_mm.data.npz import SPLITS

_UNFINISHED = ".unfinished"


def write_folder(parts: Mapping[str, MultimodalDataset], folder: str | PathLike[str]) -> None:
    """Writes data sets as plain `.npy` files, one folder a split, for :func:`read_folder`.

    Args:
        parts: Data sets by split, as any reader returns them. Features keep their dtype.
        folder: The folder to write; it must not exist, or be empty. Where writing fails it is left empty. A file
            `.unfinished` is there until the end, so that :func:`read_folder` knows of a process that was killed.

    Raises:
        ValueError: If the folder is not empty, or a split or modality cannot name a file.
        TypeError: If `parts` holds anything but data sets.

    Example:
        >>> import tempfile
        >>> data = MultimodalDataset(
        ...     {"text": torch.ones(4, 5, 8)}, {"text": torch.zeros(4, 5).bool()}, torch.ones(4, 1), ["happy"]
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
    (root / _UNFINISHED).touch()
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
        "labels": data.labels.numpy(),
        "label_names": np.array(data.label_names),
        "modalities": np.array(list(data.features)),
        "invalid_steps": np.array(list(data.invalid_steps.values())),
    }
    if data.soft_labels is not None:
        arrays["soft_labels"] = data.soft_labels.numpy()
    if data.ids is not None:
        arrays["ids"] = np.array(data.ids, np.str_)
    for name, x in data.features.items():
        arrays[f"features.{name}"] = x.numpy()
        arrays[f"padding_mask.{name}"] = data.padding_mask[name].numpy()
    folder.mkdir()
    for key, array in arrays.items():
        with open(folder / f"{key}.npy", "wb") as file:
            # NumPy writes into a real file by itself, and is silent where the disk is full when it closes it.
            np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)


def read_folder(folder: str | PathLike[str]) -> dict[str, MultimodalDataset]:
    """Opens a folder of :func:`write_folder`: features stay on disk, and a batch reads its rows alone.

    The tensors are private maps: writing into them changes no file. Workers of a `DataLoader` share them where they
    are forked, as on Linux; where they are spawned each gets a copy in memory.

    Args:
        folder: The folder.

    Returns:
        The data sets by the name of their folder.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a file is missing, broken, or does not fit the others.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    need(not (root / _UNFINISHED).exists(), root, "was not written to its end; write it anew")
    splits = sorted(
        (each for each in root.iterdir() if each.is_dir()),
        key=lambda each: (
            SPLITS.index(each.name) if each.name in SPLITS else len(SPLITS),
            each.name,
        ),
    )
    need(splits, root, "holds no split, that is, no folder")
    parts = {}
    for split in splits:
        arrays = {}
        for file in sorted(split.glob("*.npy")):
            mapped = file.name.startswith("features.")
            try:
                arrays[file.stem] = np.load(
                    file, mmap_mode="c" if mapped else None, allow_pickle=False
                )
            except Exception as error:  # a damaged header may raise anything
                raise ValueError(
                    f"{file}: not a readable .npy file of a plain array ({error})"
                ) from error
        for key in ("modalities", "invalid_steps", "labels", "label_names"):
            need(key in arrays, split, f"missing `{key}.npy`")
        names = [str(name) for name in arrays["modalities"].reshape(-1)]
        for name in names:
            for key in (f"features.{name}", f"padding_mask.{name}"):
                need(key in arrays, split, f"missing `{key}.npy`")
        try:
            parts[split.name] = MultimodalDataset(
                {name: torch.from_numpy(arrays[f"features.{name}"]) for name in names},
                {name: torch.from_numpy(arrays[f"padding_mask.{name}"]) for name in names},
                torch.from_numpy(arrays["labels"]),
                [str(name) for name in arrays["label_names"].reshape(-1)],
                soft_labels=torch.from_numpy(arrays["soft_labels"])
                if "soft_labels" in arrays
                else None,
                ids=[str(name) for name in arrays["ids"]] if "ids" in arrays else None,
                invalid_steps=dict(zip(names, arrays["invalid_steps"].tolist(), strict=True)),
                validate_args=False,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{split}: {error}") from error
    return parts
