"""The library's own layout, a NumPy archive of plain arrays: :func:`read_npz` and :func:`write_npz`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from uncertainty_mm._checks import check_choice
from uncertainty_mm._files import replacing
from uncertainty_mm.data._arrays import SPLITS, named, tensor_array, unreadable
from uncertainty_mm.data._sequences import (
    SPLIT_NAMES,
    Invalid,
    Sequences,
    beyond,
    finish,
    integers,
    need,
    report_invalid,
)
from uncertainty_mm.data.dataset import MultimodalDataset, check_names, check_parts


def read_npz(
    path: str | PathLike[str],
    *,
    splits: Sequence[str] = SPLITS,
    label_names: Sequence[str] | None = None,
    invalid: Invalid = "step",
) -> dict[str, MultimodalDataset]:
    """Reads a data set from an archive of plain arrays, without unpickling anything.

    ==========================  ====================  ==========================================================
    Key                         Shape, type           Meaning
    ==========================  ====================  ==========================================================
    ``features.<modality>``     (N, S_m, D_m) number  sequence of this modality, padded at the end
    ``lengths.<modality>``      (N,) integer          number of valid steps; 0 if the sample lacks the modality
    ``labels``                  (N, Q) 0 or 1         1 where the label is present; NaN (floating) where unknown
    ``label_names``             (Q,) str              names of the labels, in the order of the columns
    ``split``                   (N,) integer or str   0 train, 1 validation, 2 test; or such names, also dev and val
    ``unknown`` (optional)      (N, Q) bool           True where a label is not known
    ``soft_labels`` (optional)  (N, Q) number         at least 0; ``label_shares`` means the same
    ``ids`` (optional)          (N,) str              names of the samples
    ``groups`` (optional)       (N,) integer          source of the sample, such as a user
    ==========================  ====================  ==========================================================

    Other keys are ignored. New data with nothing but features need no `labels`, `label_names` and `split`: pass
    `label_names`, and all labels are unknown. Without `split` all samples are in the single part `"all"`.

    Args:
        path: The file.
        splits: Splits that must have samples, if the file has splits.
        label_names: Labels in the desired order, into which the columns of the file are put. None for the order of the
            file.
        invalid: For a value that is not finite (COVAREP has -inf), `"step"` masks its step, and `"value"` sets only the
            value to 0. A warning counts them, and another tells if a modality has lost all its steps.

    Returns:
        The splits `"train"`, `"validation"` and `"test"`, or `"all"`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read or breaks the layout.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "data.npz")
        >>> lengths = np.array([5, 4, 3, 2, 1, 0])
        >>> features = {"features.text": np.ones((6, 5, 8)), "lengths.text": lengths}
        >>> np.savez(
        ...     path,
        ...     **features,
        ...     labels=np.ones((6, 2)),
        ...     label_names=np.array(["happy", "sad"]),
        ...     split=np.array([0, 0, 0, 1, 1, 2]),
        ... )
        >>> parts = read_npz(path)
        >>> parts["train"].padding_mask["text"].sum(1)
        tensor([0, 1, 2])
        >>> parts["test"].summary().modalities["text"].missing
        1
        >>> np.savez(path, **features)
        >>> read_npz(path, label_names=["happy", "sad"])["all"].unknown.all()
        tensor(True)
    """
    check_choice("invalid", invalid, get_args(Invalid))
    if isinstance(splits, str) or not set(splits) <= set(SPLITS):
        raise ValueError(f"Expected `splits` to name splits of {SPLITS}, but got {splits!r}")
    arrays = _arrays(path)
    names = [key.removeprefix("features.") for key in arrays if key.startswith("features.")]
    need(names, path, f"no array `features.<modality>` among {sorted(arrays)}")
    wanted = [f"lengths.{name}" for name in names]
    if label_names is None:
        wanted = ["labels", "label_names", *(["split"] if splits else []), *wanted]
    absent = [f"`{key}`" for key in wanted if key not in arrays]
    hint = "" if "labels" in arrays else "; data without labels are read with `label_names`"
    need(not absent, path, f"missing {', '.join(absent)}{hint * (label_names is None)}")
    labels, unknown, file_names = _labels(arrays, label_names, path)
    count = len(labels)
    codes = _codes(arrays.get("split"), count, path)
    soft_key = "soft_labels" if "soft_labels" in arrays else "label_shares"
    soft_labels = arrays.get(soft_key)
    if soft_labels is not None:
        need(
            soft_labels.shape == labels.shape and soft_labels.dtype.kind in "fiu",
            path,
            f"`{soft_key}` must hold numbers of shape {labels.shape}, got {soft_labels.dtype} {soft_labels.shape}",
        )
        known = soft_labels[np.ones_like(labels, np.bool_) if unknown is None else ~unknown]
        need(
            (np.isfinite(known) & (known >= 0)).all(),
            path,
            f"`{soft_key}` must be at least 0, got {known.min() if known.size else ''}",
        )
    ids, groups = arrays.get("ids"), arrays.get("groups")
    if ids is not None:
        need(ids.shape == (count,), path, f"`ids` must name {count} samples, got shape {ids.shape}")
    if groups is not None:
        groups = integers(groups, count, path, "groups")

    read: dict[str, Sequences] = {}
    for name in names:
        values, lengths = arrays.pop(f"features.{name}"), arrays[f"lengths.{name}"]
        need(
            values.ndim == 3 and values.shape[0] == count,
            path,
            f"`features.{name}` must have shape ({count}, S, D), got {values.shape}",
        )
        need(0 not in values.shape[1:], path, f"modality `{name}` is empty: shape {values.shape}")
        need(
            values.dtype.kind in "fiu",
            path,
            f"`features.{name}` must hold numbers, got {values.dtype}",
        )
        need(
            lengths.shape == (count,) and lengths.dtype.kind in "iu",
            path,
            f"`lengths.{name}` must hold {count} integers, got {lengths.dtype} {lengths.shape}",
        )
        need(
            ((lengths >= 0) & (lengths <= values.shape[1])).all(),
            path,
            f"`lengths.{name}` must be in [0, {values.shape[1]}], "
            f"got {lengths.min() if count else ''} to {lengths.max() if count else ''}",
        )
        with np.errstate(over="ignore"):  # overflow gives infinity, which is left out
            values = values.astype(np.float32, copy=False)
        read[name] = finish(values, beyond(values.shape[1], lengths), invalid)
        report_invalid(path, "", name, read[name])

    parts = {}
    found = (
        {"all": np.ones(count, np.bool_)}
        if codes is None
        else {part: codes == code for code, part in enumerate(SPLITS)}
    )
    for part, chosen in found.items():
        rows = torch.from_numpy(np.flatnonzero(chosen))
        needed = part in splits or (part == "all" and splits)
        need(len(rows) or not needed, path, f"no sample in the {part} split")
        own = {
            name: Sequences(each.features[rows], each.padding_mask[rows], each.invalid[rows])
            for name, each in read.items()
        }
        for name, each in own.items():
            if each.padding_mask.all() and not read[name].padding_mask.all():
                report_invalid(path, part, name, each)
        parts[part] = MultimodalDataset(
            {name: each.features for name, each in own.items()},
            {name: each.padding_mask for name, each in own.items()},
            torch.from_numpy(labels[chosen]),
            file_names,
            soft_labels=None
            if soft_labels is None
            else torch.from_numpy(soft_labels[chosen].astype(np.float32)),
            unknown=None if unknown is None else torch.from_numpy(unknown[chosen]),
            ids=None if ids is None else [str(name) for name in ids[chosen]],
            groups=None if groups is None else torch.from_numpy(groups[chosen]),
            invalid_steps={name: int(each.invalid.sum()) for name, each in own.items()},
            validate_args=False,
        )
    return named(parts, label_names, path)


def _arrays(path: str | PathLike[str]) -> dict[str, NDArray[Any]]:
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # zipfile, zlib and NumPy may raise anything for a damaged archive
        raise unreadable(path, ".npz", error) from error
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise unreadable(path, ".npz", "it holds other files")
    return arrays


def _labels(
    arrays: Mapping[str, NDArray[Any]], label_names: Sequence[str] | None, path: str | PathLike[str]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None, list[str]]:
    """Labels, 0 where unknown; the mask of unknown ones, if any; and the names of the labels."""
    if label_names is not None:
        check_names("label_names", label_names, "sequence")
    given = arrays.get("label_names")
    names = list(label_names or ()) if given is None else [str(name) for name in given.reshape(-1)]
    need(len(set(names)) == len(names) > 0, path, f"`label_names` repeats a name: {names}")
    labels, unknown = arrays.get("labels"), arrays.get("unknown")
    if labels is None:
        count = next(
            len(x) if x.ndim else 0 for key, x in arrays.items() if key.startswith("features.")
        )
        empty = np.zeros((count, len(names)), np.uint8)
        return empty, np.ones_like(empty, np.bool_), names
    need(labels.ndim == 2, path, f"`labels` must have shape (N, Q), got {labels.shape}")
    need(
        len(names) == labels.shape[1],
        path,
        f"`label_names` has {len(names)} names for {labels.shape[1]} columns of `labels`",
    )
    need(
        unknown is None or (unknown.shape == labels.shape and unknown.dtype.kind == "b"),
        path,
        "`unknown` must be bool of the shape of `labels`",
    )
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        unknown = np.isnan(labels) if unknown is None else np.isnan(labels) | unknown
    known = np.ones(labels.shape, np.bool_) if unknown is None else ~unknown
    for column, there, name in zip(labels.T, known.T, names, strict=True):
        wrong = column[there & ~_among(column, (0, 1))]
        got = wrong[0] if wrong.size else ""
        hint = (
            "; one that is not known is NaN, or True in `unknown`" if str(got)[:2] == "-1" else ""
        )
        need(wrong.size == 0, path, f"label `{name}` must be 0 or 1, got {got}{hint}")
    return np.where(known, labels, 0).astype(np.uint8), unknown, names


def _codes(
    split: NDArray[Any] | None, count: int, path: str | PathLike[str]
) -> NDArray[Any] | None:
    """The index in SPLITS of the split of every sample, from numbers or names."""
    if split is None:
        return None
    need(split.shape == (count,), path, f"`split` must have shape ({count},), got {split.shape}")
    if split.dtype.kind in "US":
        if split.dtype.kind == "S":
            split = np.char.decode(split, "latin1")
        codes = {name: SPLITS.index(split_name) for name, split_name in SPLIT_NAMES.items()}
        split = np.array([codes.get(str(name).lower(), -1) for name in split], np.int64)
    need(
        _among(split, (0, 1, 2)).all(),
        path,
        "`split` must hold 0 (train), 1 (validation), 2 (test), or these names",
    )
    return split


def write_npz(parts: Mapping[str, MultimodalDataset], path: str | PathLike[str]) -> None:
    """Writes a data set in the layout of :func:`read_npz`, so that a pickle has to be read only once.

    The layout pads at the end, so padding before a sequence moves behind it. A masked step inside a sequence is written
    as NaN, which :func:`read_npz` masks again. Features become float32. Soft labels, ids and groups are left out if
    only some of the parts have them.

    Args:
        parts: Data sets by split, with the same modalities, feature sizes and label names; or one data set `"all"`.
        path: The file to write; `.npz` is appended if the name does not end so. An existing file is replaced once the
            new one is complete.

    Raises:
        ValueError: If the name of a split is not in `SPLITS`, or the splits do not match each other.
        TypeError: If `parts` holds anything but data sets.
    """
    check_parts(parts)
    if not set(parts) <= set(SPLITS) and set(parts) != {"all"}:
        raise ValueError(f"Expected `parts` to name splits of {SPLITS}, but got {sorted(parts)}")
    order = [name for name in (*SPLITS, "all") if name in parts]
    chosen = [parts[name] for name in order]
    for data in chosen:
        got, first = (data.dims, data.label_names), (chosen[0].dims, chosen[0].label_names)
        if got != first:
            raise ValueError(
                f"Expected all `parts` to have the same features and labels, but got {got} and {first}"
            )
    arrays: dict[str, NDArray[Any]] = {
        "labels": np.concatenate([tensor_array(data.labels > 0.5) for data in chosen]).astype(
            np.uint8
        ),
        "label_names": np.array(chosen[0].label_names),
    }
    if order != ["all"]:
        arrays["split"] = np.repeat(
            np.array([SPLITS.index(name) for name in order], np.uint8), [*map(len, chosen)]
        )
    if any(data.unknown is not None for data in chosen):
        arrays["unknown"] = np.concatenate(
            [
                np.zeros(data.labels.shape, np.bool_)
                if data.unknown is None
                else tensor_array(data.unknown)
                for data in chosen
            ]
        )
    for key in ("soft_labels", "groups"):
        each = [getattr(data, key) for data in chosen]
        if all(x is not None for x in each):
            arrays[key] = np.concatenate([tensor_array(x) for x in each])
    if all(data.ids is not None for data in chosen):
        arrays["ids"] = np.array([name for data in chosen for name in data.ids or ()], np.str_)
    for name in chosen[0].dims:
        steps = max(data.steps[name] for data in chosen)
        count = sum(map(len, chosen))
        features = np.zeros((count, steps, chosen[0].dims[name]), np.float32)
        lengths = np.zeros(count, np.int32)
        start = 0
        for data in chosen:
            rows = slice(start, start + len(data))
            start += len(data)
            valid = ~tensor_array(data.padding_mask[name])
            positions = np.arange(valid.shape[1])
            first_step = valid.argmax(1)
            last_step = valid.shape[1] - valid[:, ::-1].argmax(1)
            lengths[rows] = np.where(valid.any(1), last_step - first_step, 0)
            source = (positions + first_step[:, None]) % valid.shape[1]
            x = np.take_along_axis(tensor_array(data.features[name].float()), source[..., None], 1)
            valid = np.take_along_axis(valid, source, 1)
            x[~valid] = 0
            x[~valid & (positions < lengths[rows, None])] = np.nan
            features[rows, : valid.shape[1]] = x
        arrays[f"features.{name}"] = features
        arrays[f"lengths.{name}"] = lengths
    path = Path(path)
    with replacing(path.with_name(path.name.removesuffix(".npz") + ".npz")) as partial:
        np.savez_compressed(partial, allow_pickle=False, **arrays)


def _among(values: NDArray[Any], numbers: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which of the values are among the numbers; strings never are, and are not compared."""
    if values.dtype.kind not in "biuf":
        return np.zeros(values.shape, bool)
    return np.isin(values, numbers)
