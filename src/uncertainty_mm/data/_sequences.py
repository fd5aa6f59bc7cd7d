"""From the arrays of a file to features and masks: stacking, padding on either side, values that are not finite."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uncertainty_mm._files import kind_of
from uncertainty_mm.data.dataset import MultimodalDataset

Path = str | PathLike[str]

# Name of a modality: its keys in MMSA's files and in TAILOR's.
MODALITIES = {
    "text": ("text", "src-text"),
    "audio": ("audio", "src-audio"),
    "vision": ("vision", "src-visual"),
}
# Name that a source may give to a split: ours.
SPLIT_NAMES = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
# Name of a split: its key in the files.
SPLIT_KEYS = {"train": "train", "validation": "valid", "test": "test"}


class Labels(NamedTuple):
    """Labels of one split."""

    labels: NDArray[Any]  # (N, Q) of 0 and 1
    soft_labels: NDArray[Any] | None = None  # (N, Q)


class Sequences(NamedTuple):
    """One modality of one split."""

    features: Tensor  # (N, S, D) float32, 0 where masked
    padding_mask: Tensor  # (N, S) bool
    invalid: Tensor  # (N, S) bool, masked because the values were not finite


def need(ok: object, path: Path, problem: str) -> None:
    """Raises with the name of the file unless `ok`."""
    if not ok:
        raise ValueError(f"{path}: {problem}")


def tensor_array(tensor: Tensor) -> NDArray[Any]:
    """The numbers of a tensor, wherever it is; bfloat16, which NumPy lacks, as float32."""
    tensor = tensor.detach().cpu()
    array: NDArray[Any] = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def plain_array(value: Any) -> NDArray[Any]:
    """An array of numbers or strings from an array, a tensor, or lists of them; of objects if it is none."""
    if isinstance(value, Tensor):
        return tensor_array(value)
    if isinstance(value, np.ndarray) and value.dtype.kind != "O":
        return np.asarray(value)
    try:
        return np.array(value if isinstance(value, np.ndarray) else list(value))
    except (TypeError, ValueError):  # None, a number, or rows of different lengths
        return np.array(None)


def stack(value: Any, path: Path, key: str) -> tuple[NDArray[np.float32], NDArray[Any] | None]:
    """Sequences as one array (N, S, D), and their lengths if they differ: then shorter ones are padded at the end."""
    lengths = None
    if not isinstance(value, Tensor | np.ndarray) or value.dtype == object:
        try:
            rows = [plain_array(row) for row in value]
        except TypeError:
            raise ValueError(
                f"{path}: `{key}` must hold one sequence a sample, got {type(value).__name__}"
            ) from None
        need(rows, path, f"`{key}` is empty")
        width = rows[0].shape[-1] if rows[0].ndim else "D"
        for index, row in enumerate(rows):
            need(
                row.ndim == 2 and row.dtype.kind in "fiu" and row.shape[1] == width,
                path,
                f"`{key}` of sample {index} must be numbers of shape (S, {width}), "
                f"got {row.dtype} {row.shape}",
            )
        sizes = np.array([len(row) for row in rows])
        if (sizes == sizes[0]).all():
            value = np.stack(rows)
        else:
            lengths = sizes
            value = np.zeros((len(rows), sizes.max(), rows[0].shape[1]), np.float32)
            with np.errstate(over="ignore"):  # as below
                for index, row in enumerate(rows):
                    value[index, : len(row)] = row
    array = plain_array(value)
    need(
        array.ndim == 3 and array.dtype.kind in "fiu" and 0 not in array.shape,
        path,
        f"`{key}` must hold numbers of shape (N, S, D), got {array.dtype} {array.shape}",
    )
    with np.errstate(over="ignore"):  # becomes infinite, and is left out
        # A copy unless it is ours to write into.
        owned = array.dtype == np.float32 and not isinstance(value, Tensor)
        owned = owned and bool(array.flags.writeable)
        return (array if owned else array.astype(np.float32)), lengths


def integers(value: Any, count: int, path: Path, key: str) -> NDArray[Any]:
    """N integers, from integers or whole floats."""
    array = plain_array(value)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    need(
        array.shape == (count,)
        and (array.dtype.kind in "iu" or (array.dtype.kind == "f" and (array % 1 == 0).all())),
        path,
        f"`{key}` must hold {count} integers, got {array.dtype} {array.shape}",
    )
    return array.astype(np.int64)


def shown(values: NDArray[Any]) -> NDArray[np.bool_]:
    """(N, S) bool, True at the frames that are not zero throughout."""
    return np.asarray(values.any(axis=2), np.bool_)


def edges(values: NDArray[Any]) -> NDArray[np.bool_]:
    """(N, S) bool, True at the frames of zeros before the first other frame and behind the last."""
    frames = shown(values)
    started = np.logical_or.accumulate(frames, axis=1)
    unfinished = np.logical_or.accumulate(frames[:, ::-1], axis=1)[:, ::-1]
    return ~(started & unfinished)


def beyond(steps: int, lengths: NDArray[Any]) -> NDArray[np.bool_]:
    """(N, S) bool, True at the steps behind the lengths."""
    mask: NDArray[np.bool_] = np.less_equal.outer(lengths, np.arange(steps))
    return mask


def place(
    values: NDArray[Any], lengths: NDArray[Any], path: Path, key: str, *, quiet: bool = False
) -> NDArray[np.bool_]:
    """(N, S) bool, True outside sequences of known lengths, which stand at the start of their row, or at the end.

    Producers pad behind (MMSA) or in front (MulT, MultiBench), and do not say which: it is in front if that, and only
    that, leaves out nothing but zeros.
    """
    frames = shown(values)
    behind = beyond(values.shape[1], lengths)
    in_front = behind[:, ::-1]
    lost = int((frames & behind).sum())
    if lost and not (frames & in_front).any():
        return in_front
    if lost and not quiet:
        warnings.warn(
            f"{path}: {lost} steps of `{key}` beyond the lengths of the file are not zero; they are left out",
            stacklevel=2,
        )
    return behind


def finish(values: NDArray[np.float32], mask: NDArray[np.bool_]) -> Sequences:
    """Masks steps that are not finite, and writes 0 into all masked ones (in place)."""
    invalid = ~np.isfinite(values).all(axis=2) & ~mask
    mask = mask | invalid
    values[mask] = 0
    return Sequences(torch.from_numpy(values), torch.from_numpy(mask), torch.from_numpy(invalid))


def zero_invalid(
    values: NDArray[np.float32], mask: NDArray[np.bool_], path: Path, name: str
) -> None:
    """Writes 0 in place of values that are not finite, and warns of them; their steps stay (in place)."""
    wrong = ~np.isfinite(values) & ~mask[..., None]
    if wrong.any():
        warnings.warn(
            f"{path}: {wrong.sum()} values of `{name}` in {wrong.any((1, 2)).sum()} samples are not finite "
            "and are set to 0",
            stacklevel=2,
        )
        values[wrong] = 0


def report_invalid(
    path: Path, split: str, name: str, invalid: Tensor, padding_mask: Tensor | None = None
) -> None:
    """Warns of steps that were masked because they were not finite.

    Args:
        path: The file, for the message.
        split: Name of the split, for the message; empty for all samples.
        name: Name of the modality.
        invalid: (N, S) bool, steps masked because they were not finite.
        padding_mask: (N, S) bool, all masked steps; then samples that lose the modality are counted too.
    """
    if not invalid.any():
        return
    where = f" of the {split} split" if split else ""
    lost = 0
    if padding_mask is not None:
        lost = int((invalid.any(1) & padding_mask.all(1)).sum())
    warnings.warn(
        f"{path}: {int(invalid.sum())} steps of `{name}` in {int(invalid.any(1).sum())} samples{where} "
        "are not finite and are left out" + f"; {lost} samples lose the modality" * (lost > 0),
        stacklevel=2,
    )
    if padding_mask is not None:
        report_lost(path, split, name, invalid, padding_mask)


def report_lost(path: Path, split: str, name: str, invalid: Tensor, padding_mask: Tensor) -> None:
    """Warns where steps that are not finite leave nothing of a modality."""
    if invalid.any() and padding_mask.all():
        where = f"of the {split} split" if split else "at all"
        warnings.warn(
            f"{path}: modality `{name}` has no sample left {where}, because its steps are not finite; "
            'a column that is never finite costs every step, with invalid="value" only itself',
            stacklevel=2,
        )


def unreadable(path: Path, wanted: str, error: object = "") -> ValueError:
    """The error for a file of another kind, which is named by its first bytes, or for a damaged one.

    Args:
        path: The file.
        wanted: The kind wanted, `".npz"` or `".npy"`.
        error: What reading it said.
    """
    kind = None
    with suppress(OSError):
        kind = kind_of(path)
    if kind not in (None, wanted, "zip"):
        error = f"this is {kind}"
    elif "pickle" in str(error):  # NumPy hints at reading it all the same
        error = "neither numbers nor strings"
    content = "a plain array" if wanted == ".npy" else "plain arrays"
    return ValueError(f"{path}: not a readable {wanted} file of {content} ({error})")


def named(
    parts: dict[str, MultimodalDataset], label_names: Sequence[str] | None, path: Path
) -> dict[str, MultimodalDataset]:
    """The parts with their labels in the order wanted."""
    for data in parts.values():
        need(
            label_names is None or sorted(data.label_names) == sorted(label_names),
            path,
            f"names the labels {data.label_names}, expected {list(label_names or ())}",
        )
    return {
        name: data if label_names is None else data.in_order(label_names)
        for name, data in parts.items()
    }


def read_modality(
    part: Mapping[str, Any], name: str, key: str, path: Path, split: str, count: int, padding: str
) -> Sequences:
    """One modality of one split of MMSA's or TAILOR's files, with the mask that these files imply.

    Args:
        part: The split as the file holds it.
        name: Name of the modality.
        key: Its key in `part`.
        path: Name of the file, for messages.
        split: Key of the split, for messages.
        count: Number of samples N of the split.
        padding: `"auto"`, `"zeros"` or `"none"`; see :func:`read_mmsa`.
    """
    where = f"{split}.{key}"
    values, lengths = stack(part[key], path, where)
    steps = values.shape[1]
    need(
        len(values) == count, path, f"`{where}` has {len(values)} samples, other modalities {count}"
    )
    if padding == "none":
        return finish(values, np.zeros((count, steps), np.bool_))
    mask = None
    if padding == "auto":
        quiet = False
        given = f"{name}_lengths" if f"{name}_lengths" in part else "len_list"
        if lengths is None and given in part:
            lengths = integers(part[given], count, path, f"{split}.{given}")
            if given == "len_list":  # written before the sequences were cut
                lengths = lengths.clip(max=steps)
            need(
                ((lengths >= 0) & (lengths <= steps)).all(),
                path,
                f"`{split}.{given}` must be in [0, {steps}], got {lengths.min()} to {lengths.max()}",
            )
        elif lengths is None and "text_bert" in part:
            tokens = plain_array(part["text_bert"])
            need(
                tokens.ndim == 3 and tokens.shape[:2] == (count, 3) and tokens.dtype.kind in "fiu",
                path,
                f"`{split}.text_bert` must have shape ({count}, 3, S), got {tokens.shape}",
            )
            valid = tokens[:, 1]
            need(
                np.isin(valid, (0, 1)).all(),
                path,
                f"`{split}.text_bert[:, 1]` must be a mask of 0 and 1, got {valid.min()} to {valid.max()}",
            )
            if valid.shape[1] == steps:  # the text, and what is aligned with it
                lengths = valid.sum(1).astype(np.int64)
                if (valid.astype(bool) != (np.arange(steps) < lengths[:, None])).any():
                    mask = valid == 0
                quiet = name == "text"  # BERT gives padding features too
        if lengths is not None and mask is None:
            mask = place(values, lengths, path, where, quiet=quiet)
    outside = edges(values)
    if mask is None:
        mask = outside
    mask = (
        mask | np.asarray(outside.all(axis=1))[:, None]
    )  # nothing but zeros: the sample lacks the modality
    return finish(values, mask)


def sample_ids(value: Any, count: int, path: Path, key: str) -> list[str]:
    """N names; several parts of a name, as MulT's files have them, are joined by `$_$`."""

    def text(part: Any) -> str:
        return part.decode() if isinstance(part, bytes) else str(part)

    rows = value.tolist() if isinstance(value, np.ndarray) else value
    need(
        isinstance(rows, list | tuple) and len(rows) == count,
        path,
        f"`{key}` must name {count} samples, got {len(rows) if hasattr(rows, '__len__') else rows}",
    )
    return [
        "$_$".join(map(text, row)) if isinstance(row, list | tuple | np.ndarray) else text(row)
        for row in rows
    ]


def check_splits(content: Any, path: Path) -> None:
    """Raises unless the content of a file is a dict with the three splits, each a dict."""
    need(isinstance(content, dict), path, f"must hold a dict, got {type(content).__name__}")
    found = sorted(map(str, content))
    for key in SPLIT_KEYS.values():
        need(key in content, path, f"missing split `{key}`, found {found}")
        got = type(content[key]).__name__
        need(isinstance(content[key], dict), path, f"split `{key}` must be a dict, got {got}")


def count_samples(part: Mapping[str, Any], path: Path, split: str) -> int:
    """Number of samples of a split, from its first modality."""
    for keys in MODALITIES.values():
        for key in keys:
            if key in part:
                need(hasattr(part[key], "__len__"), path, f"`{split}.{key}` holds no samples")
                return len(part[key])
    wanted = [key for keys in MODALITIES.values() for key in keys]
    raise ValueError(
        f"{path}: no modality in split `{split}`: none of {wanted} in {sorted(map(str, part))}"
    )


def assemble(
    content: Mapping[str, Any],
    path: Path,
    labels: Mapping[str, Labels],
    label_names: Sequence[str],
    padding: str,
) -> dict[str, MultimodalDataset]:
    """The three splits of MMSA's or TAILOR's files as data sets."""
    parts = {}
    sizes: dict[str, int] = {}
    for split, split_key in SPLIT_KEYS.items():
        part = content[split_key]
        count = count_samples(part, path, split_key)
        read: dict[str, Sequences] = {}
        for name, keys in MODALITIES.items():
            key = next((key for key in keys if key in part), None)
            if key is None:
                need(
                    name not in sizes, path, f"modality `{name}` is missing in split `{split_key}`"
                )
                continue
            each = read_modality(part, name, key, path, split_key, count, padding)
            dim = each.features.shape[2]
            need(
                (not sizes or name in sizes or split == "train")
                and sizes.setdefault(name, dim) == dim,
                path,
                f"`{split_key}.{key}` has features of size {dim}, in split `train` {sizes.get(name, 'none')}",
            )
            report_invalid(path, split, name, each.invalid, each.padding_mask)
            read[name] = each
        ids = part.get("id")
        given = labels[split]
        parts[split] = MultimodalDataset(
            {name: each.features for name, each in read.items()},
            {name: each.padding_mask for name, each in read.items()},
            torch.from_numpy(np.ascontiguousarray(given.labels, np.uint8)),
            label_names,
            soft_labels=None
            if given.soft_labels is None
            else torch.from_numpy(np.ascontiguousarray(given.soft_labels, np.float32)),
            ids=None if ids is None else sample_ids(ids, count, path, f"{split_key}.id"),
            invalid_steps={name: int(each.invalid.sum()) for name, each in read.items()},
            validate_args=False,
        )
    return parts
