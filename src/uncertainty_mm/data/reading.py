"""Reads a data set in any known layout: :func:`read`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from uncertainty_mm._checks import check_choice
from uncertainty_mm.data._arrays import SPLITS, named
from uncertainty_mm.data._formats import format_of
from uncertainty_mm.data._sequences import need
from uncertainty_mm.data.dataset import MultimodalDataset, check_names
from uncertainty_mm.data.folder import read_folder
from uncertainty_mm.data.npz import read_npz

Format = Literal["auto", "npz", "folder", "mmsa", "tailor", "m3ed", "m3ed-dialogue"]
"""Names of the layouts of files."""

_SUFFIXES: dict[str, Format] = {
    ".npz": "npz",
    ".pkl": "mmsa",
    ".pickle": "mmsa",
    ".pt": "tailor",
    ".pth": "tailor",
}


def read(
    path: str | PathLike[str],
    *,
    format: Format = "auto",
    labels: str | PathLike[str] | None = None,
    label_names: Sequence[str] | None = None,
    splits: Sequence[str] = SPLITS,
    **options: Any,
) -> dict[str, MultimodalDataset]:
    """Reads a data set in any layout that the library supports.

    - `"npz"` (`"auto"`: `.npz`): :func:`read_npz`
    - `"folder"` (`"auto"`: a folder): :func:`read_folder`
    - `"mmsa"` (`"auto"`: `.pkl`, `.pickle`): features of MMSA, MulT and the released LDDU code
    - `"tailor"` (`"auto"`: `.pt`, `.pth`): files of TAILOR and CARAT
    - `"m3ed"`, `"m3ed-dialogue"`: the source pickle of M3ED, where a sample is an utterance or a dialogue

    The last four are the readers in :mod:`uncertainty_mm.data.convert`.

    For new data without labels and splits, in an archive or a folder, give `label_names`: all their labels are unknown,
    and their only part is `"all"`.

    Args:
        path: The file or folder.
        format: Its layout; `"auto"` uses the suffix.
        labels: The file with the labels, if they are in another file (only for `"mmsa"`).
        label_names: Labels in the desired order, whatever their order in the file; None for the order of the file.
        splits: Splits that must have samples; `()` for none. This does not apply to new data (`"all"`).
        options: Passed on to the reader, such as `invalid="value"`, or `padding` if the reader has it.

    Returns:
        Data sets by the name of their split.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is of another kind, cannot be read, breaks its layout or lacks a split. The message is
            one line that begins with the file.

    Example:
        >>> import os, tempfile
        >>> import numpy as np
        >>> path = os.path.join(tempfile.mkdtemp(), "new.npz")
        >>> features = {"features.text": np.ones((6, 5, 8))}
        >>> np.savez(path, **features, **{"lengths.text": np.full(6, 5)})
        >>> read(path, label_names=["happy", "sad"])
        {'all': MultimodalDataset(6 samples, {'text': (5, 8)}, labels ['happy', 'sad'])}
    """
    check_choice("format", format, get_args(Format))
    if isinstance(splits, str):
        raise TypeError(f"Expected `splits` to be a sequence of names, but got {splits!r}")
    if label_names is not None:
        check_names("label_names", label_names, "sequence")
    path = Path(path)
    for each in (path, *([] if labels is None else [Path(labels)])):
        if not each.exists():
            raise FileNotFoundError(f"{each}: no such file or folder")
    if format == "auto":
        hint = "" if path.is_dir() or format_of(path) is None else f" (it is {format_of(path)})"
        need(
            path.is_dir() or path.suffix.lower() in _SUFFIXES,
            path,
            f"the suffix does not tell the format{hint}; give one of {get_args(Format)[1:]}",
        )
        format = "folder" if path.is_dir() else _SUFFIXES[path.suffix.lower()]
    need(
        labels is None or format == "mmsa",
        path,
        f"`labels` go with the format mmsa, got {format} and {labels}",
    )
    what = "folder" if path.is_dir() else "file"
    need(
        (what == "folder") == (format == "folder"), path, f"a {what} is not of the format {format}"
    )
    try:
        if labels is not None:
            options["labels"] = labels
        parts = _open(path, format, label_names, options)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        message = " ".join(str(error).split())
        of_a_file = str(path) in message or str(labels) in message
        raise ValueError(message if of_a_file else f"{path}: {message}") from error
    parts = named(parts, label_names, path)
    new = set(parts) == {"all"} and label_names is not None
    for split in ["all"] if new and splits else splits:
        need(len(parts.get(split, ())), path, f"no sample in the {split} split")
    return parts


def _open(
    path: Path, format: Format, label_names: Sequence[str] | None, options: dict[str, Any]
) -> dict[str, MultimodalDataset]:
    if format == "npz":
        return read_npz(path, splits=(), label_names=label_names, **options)
    if format == "folder":
        return read_folder(path, label_names=label_names, **options)
    # Foreign files are rare, so their readers are imported only when needed.
    from uncertainty_mm.data.convert import read_m3ed, read_mmsa, read_tailor

    if format in ("m3ed", "m3ed-dialogue"):
        return read_m3ed(path, "utterance" if format == "m3ed" else "dialogue", **options)
    if label_names is not None:
        options["label_names"] = label_names
    return read_mmsa(path, **options) if format == "mmsa" else read_tailor(path, **options)
