"""The library's own layout, one NumPy archive of plain arrays: :func:`read_npz` and :func:`write_npz`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from uncertainty_mm._files import replacing
from uncertainty_mm.data._sequences import Sequences, beyond, finish, need, report_invalid
from uncertainty_mm.data.dataset import MultimodalDataset, check_parts

SPLITS = ("train", "validation", "test")
"""Names of the splits, in the order of the codes 0, 1 and 2."""


def read_npz(
    path: str | PathLike[str], *, splits: Sequence[str] = SPLITS
) -> dict[str, MultimodalDataset]:
    """Reads a data set from one archive of plain arrays; nothing in it is unpickled.

    ==========================  ====================  ==========================================================
    Key                         Shape, type           Meaning
    ==========================  ====================  ==========================================================
    ``features.<modality>``     (N, S_m, D_m) number  sequence of this modality, padded at the end
    ``lengths.<modality>``      (N,) integer          number of valid steps; 0 if the sample lacks the modality
    ``labels``                  (N, Q) 0 or 1         1 where the label is present
    ``label_names``             (Q,) str              names of the labels, in the order of the columns
    ``split``                   (N,) integer          0 train, 1 validation, 2 test
    ``soft_labels`` (optional)  (N, Q) number         at least 0; ``label_shares`` means the same
    ``ids`` (optional)          (N,) str              names of the samples
    ==========================  ====================  ==========================================================

    Other keys are ignored. Steps with a value that is not finite (COVAREP has -inf) are masked, and a warning counts
    them.

    Args:
        path: The file.
        splits: Splits that must have samples.

    Returns:
        The splits `"train"`, `"validation"` and `"test"`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read or breaks the layout.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "data.npz")
        >>> np.savez(
        ...     path,
        ...     **{"features.text": np.ones((6, 5, 8)), "lengths.text": np.array([5, 4, 3, 2, 1, 0])},
        ...     labels=np.ones((6, 2)),
        ...     label_names=np.array(["happy", "sad"]),
        ...     split=np.array([0, 0, 0, 1, 1, 2]),
        ... )
        >>> parts = read_npz(path)
        >>> parts["train"].padding_mask["text"].sum(1)
        tensor([0, 1, 2])
        >>> parts["test"].summary().modalities["text"].missing
        1
    """
    if isinstance(splits, str) or not set(splits) <= set(SPLITS):
        raise ValueError(f"Expected `splits` to name splits of {SPLITS}, but got {splits!r}")
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # a damaged archive may raise anything, of zipfile, zlib or NumPy
        raise ValueError(f"{path}: not a readable .npz file of plain arrays ({error})") from error

    names = [key.removeprefix("features.") for key in arrays if key.startswith("features.")]
    wanted = ["labels", "label_names", "split", *(f"lengths.{name}" for name in names)]
    absent = [key for key in wanted if key not in arrays]
    need(names, path, f"no array `features.<modality>` among {sorted(arrays)}")
    need(not absent, path, f"missing {', '.join(f'`{key}`' for key in absent)}")
    labels, split = arrays["labels"], arrays["split"]
    label_names = [str(name) for name in arrays["label_names"].reshape(-1)]
    need(labels.ndim == 2, path, f"`labels` must have shape (N, Q), got {labels.shape}")
    need(
        len(label_names) == labels.shape[1] > 0,
        path,
        f"`label_names` has {len(label_names)} names for {labels.shape[1]} columns of `labels`",
    )
    need(
        len(set(label_names)) == len(label_names),
        path,
        f"`label_names` repeats a name: {label_names}",
    )
    for column, name in zip(labels.T, label_names, strict=True):
        wrong = column[~_among(column, (0, 1))]
        got = wrong[0] if wrong.size else ""
        need(wrong.size == 0, path, f"label `{name}` must be 0 or 1, got {got}")
    count = labels.shape[0]
    need(split.shape == (count,), path, f"`split` must have shape ({count},), got {split.shape}")
    need(
        _among(split, (0, 1, 2)).all(),
        path,
        "`split` must hold 0 (train), 1 (validation), 2 (test)",
    )
    soft_key = "soft_labels" if "soft_labels" in arrays else "label_shares"
    soft_labels = arrays.get(soft_key)
    if soft_labels is not None:
        need(
            soft_labels.shape == labels.shape and soft_labels.dtype.kind in "fiu",
            path,
            f"`{soft_key}` must hold numbers of shape {labels.shape}, got {soft_labels.dtype} {soft_labels.shape}",
        )
        need(
            (np.isfinite(soft_labels) & (soft_labels >= 0)).all(),
            path,
            f"`{soft_key}` must be at least 0, got {soft_labels.min()}",
        )
    ids = arrays.get("ids")
    if ids is not None:
        need(ids.shape == (count,), path, f"`ids` must name {count} samples, got shape {ids.shape}")

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
        with np.errstate(over="ignore"):  # becomes infinite, and is left out
            values = values.astype(np.float32, copy=False)
        read[name] = finish(values, beyond(values.shape[1], lengths))
        report_invalid(path, "", name, read[name])

    parts = {}
    for code, part in enumerate(SPLITS):
        chosen = np.flatnonzero(split == code)
        rows = torch.from_numpy(chosen)
        need(len(rows) or part not in splits, path, f"no sample in the {part} split")
        parts[part] = MultimodalDataset(
            {name: each.features[rows] for name, each in read.items()},
            {name: each.padding_mask[rows] for name, each in read.items()},
            torch.from_numpy(labels.astype(np.uint8))[rows],
            label_names,
            soft_labels=None
            if soft_labels is None
            else torch.from_numpy(soft_labels.astype(np.float32))[rows],
            ids=None if ids is None else [str(name) for name in ids[chosen]],
            invalid_steps={name: int(each.invalid[rows].sum()) for name, each in read.items()},
            validate_args=False,
        )
    return parts


def write_npz(parts: Mapping[str, MultimodalDataset], path: str | PathLike[str]) -> None:
    """Writes a data set in the layout of :func:`read_npz`, so that a pickle is read but once.

    The layout pads at the end: padding in front of a sequence moves behind it. A masked step inside a sequence is
    written as NaN, which :func:`read_npz` masks again.

    Args:
        parts: Data sets by split, with the same modalities, feature sizes and label names.
        path: The file to write; `.npz` is appended if it has no such end. A file of that name is replaced once the new
            one is complete.

    Raises:
        ValueError: If a split has another name than those of `SPLITS`, or the splits do not fit each other.
        TypeError: If `parts` holds anything but data sets.
    """
    check_parts(parts)
    if not set(parts) <= set(SPLITS):
        raise ValueError(f"Expected `parts` to name splits of {SPLITS}, but got {sorted(parts)}")
    chosen = [parts[name] for name in SPLITS if name in parts]
    for data in chosen:
        got, first = (data.dims, data.label_names), (chosen[0].dims, chosen[0].label_names)
        if got != first:
            raise ValueError(
                f"Expected all `parts` to have the same features and labels, but got {got} and {first}"
            )
    arrays: dict[str, NDArray[Any]] = {
        "labels": np.concatenate([data.labels.numpy() for data in chosen]).astype(np.uint8),
        "label_names": np.array(chosen[0].label_names),
        "split": np.concatenate(
            [
                np.full(len(parts[name]), SPLITS.index(name), np.uint8)
                for name in SPLITS
                if name in parts
            ]
        ),
    }
    if all(data.soft_labels is not None for data in chosen):
        arrays["soft_labels"] = torch.cat(
            [data.soft_labels for data in chosen if data.soft_labels is not None]
        ).numpy()
    if all(data.ids is not None for data in chosen):
        arrays["ids"] = np.array([name for data in chosen for name in data.ids or ()])
    for name in chosen[0].dims:
        steps = max(data.steps[name] for data in chosen)
        count = sum(map(len, chosen))
        features = np.zeros((count, steps, chosen[0].dims[name]), np.float32)
        lengths = np.zeros(count, np.int32)
        start = 0
        for data in chosen:
            rows = slice(start, start + len(data))
            start += len(data)
            valid = ~data.padding_mask[name].numpy()
            positions = np.arange(valid.shape[1])
            first_step = valid.argmax(1)
            last_step = valid.shape[1] - valid[:, ::-1].argmax(1)
            lengths[rows] = np.where(valid.any(1), last_step - first_step, 0)
            source = (positions + first_step[:, None]) % valid.shape[1]
            x = np.take_along_axis(data.features[name].float().numpy(), source[..., None], 1)
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
    """Which of the values are among the numbers; a word is not, and never compared with one."""
    if values.dtype.kind not in "biuf":
        return np.zeros(values.shape, bool)
    return np.isin(values, numbers)
