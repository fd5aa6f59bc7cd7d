"""Makes features and masks of the arrays of a file: stacks, finds padding on either side, and masks invalid values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uncertainty_mm.data.dataset import MultimodalDataset

Path = str | PathLike[str]

# Keys of each modality in the files of MMSA and of TAILOR.
MODALITIES = {
    "text": ("text", "src-text"),
    "audio": ("audio", "src-audio"),
    "vision": ("vision", "src-visual"),
}
# Key of each split in the files, then all names that files use for a split.
SPLIT_KEYS = {"train": "train", "validation": "valid", "test": "test"}
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}

Padding = Literal["auto", "zeros", "none"]
Invalid = Literal["step", "value"]


class Split(NamedTuple):
    """One split of a file."""

    key: str  # its name in the file
    content: dict[str, Any]  # entries are removed once read, to free their memory


class Labels(NamedTuple):
    """Labels of one split."""

    labels: NDArray[Any]  # (N, Q) of 0 and 1
    soft_labels: NDArray[Any] | None = None  # (N, Q)
    unknown: NDArray[np.bool_] | None = None  # (N, Q)


class Sequences(NamedTuple):
    """One modality of one split."""

    features: Tensor  # (N, S, D) float32, 0 where masked
    padding_mask: Tensor  # (N, S) bool
    invalid: Tensor  # (N, S) bool, masked because the values were not finite
    zeroed: int = 0  # values that are 0 because they were not finite
    never_finite: tuple[int, ...] = ()  # columns without a finite value


def need(ok: object, path: Path, problem: str) -> None:
    """Raises with the name of the file unless `ok`."""
    if not ok:
        raise ValueError(f"{path}: {problem}")


def plain_array(value: Any) -> NDArray[Any]:
    """An array of numbers or strings from an array, a tensor, or lists of them; an array of objects if impossible."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            return np.array(None)
        value = value.detach().cpu().resolve_conj().resolve_neg()
        if value.is_floating_point() and value.element_size() < 4:
            value = value.float()  # NumPy has no bfloat16
        return np.asarray(value.numpy())
    if isinstance(value, np.ndarray) and value.dtype.kind != "O":
        return np.asarray(value)
    try:
        return np.array(value if isinstance(value, np.ndarray) else list(value))
    except (TypeError, ValueError):  # None, a number, or rows of different lengths
        return np.array(None)


def stack(value: Any, path: Path, key: str) -> tuple[NDArray[np.float32], NDArray[Any] | None]:
    """Sequences as one array (N, S, D), and their lengths if they differ; shorter ones are padded at the end."""
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
    with np.errstate(over="ignore"):  # overflow gives infinity, which is left out
        # Copied unless it may be written to.
        owned = array.dtype == np.float32 and not isinstance(value, Tensor)
        owned = owned and bool(array.flags.writeable)
        return (array if owned else array.astype(np.float32)), lengths


def integers(value: Any, count: int, path: Path, key: str) -> NDArray[Any]:
    """N integers, from integers or whole floats."""
    array = plain_array(value)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    need(
        array.shape == (count,) and (array.dtype.kind in "iu" or _whole(array)),
        path,
        f"`{key}` must hold {count} integers, got {array.dtype} {array.shape}",
    )
    return array.astype(np.int64)


def _whole(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "f" and bool(
        ((abs(array) < 2**53) & (array == np.rint(array))).all()
    )


def shown(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Bool (N, S), True at the frames that are not all zeros."""
    return np.asarray(values.any(axis=2), np.bool_)


def edges(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Bool (N, S), True at the frames of zeros before the first other frame and after the last one."""
    frames = shown(values)
    started = np.logical_or.accumulate(frames, axis=1)
    unfinished = np.logical_or.accumulate(frames[:, ::-1], axis=1)[:, ::-1]
    return ~(started & unfinished)


def beyond(steps: int, lengths: NDArray[Any]) -> NDArray[np.bool_]:
    """Bool (N, S), True at the steps beyond the lengths."""
    mask: NDArray[np.bool_] = np.less_equal.outer(lengths, np.arange(steps))
    return mask


def place(
    values: NDArray[Any], lengths: NDArray[Any], path: Path, key: str, *, quiet: bool = False
) -> NDArray[np.bool_]:
    """Bool (N, S), True outside sequences of known lengths, which are at the start or at the end of their rows.

    Producers pad at the end (MMSA) or at the start (MulT, MultiBench) without stating it. Padding is taken to be at the
    start if only then all padded steps are zeros.
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


def finish(
    values: NDArray[np.float32], mask: NDArray[np.bool_], invalid: Invalid = "step"
) -> Sequences:
    """Sets masked steps, and values that are not finite, to 0, in place.

    Args:
        values: (N, S, D).
        mask: (N, S), True where a step is to be left out.
        invalid: For a value that is not finite, mask its `"step"`, or set only the `"value"` to 0.
    """
    finite = np.isfinite(values)
    bad = ~finite.all(axis=2) & ~mask
    zeroed, never = 0, np.zeros(0, np.int64)
    if bad.any():
        never = np.flatnonzero(~(finite & ~mask[..., None]).any(axis=(0, 1)))
        if invalid == "value":
            zeroed = int((~finite[bad]).sum())
            values[~finite] = 0
            bad = np.zeros_like(bad)
    mask = mask | bad
    values[mask] = 0
    features, padding_mask, masked = map(torch.from_numpy, (values, mask, bad))
    return Sequences(features, padding_mask, masked, zeroed, tuple(never.tolist()))


def report_invalid(path: Path, split: str, name: str, read: Sequences) -> None:
    """Warns of values that were not finite, and of a modality without any step left."""
    where = f" of the {split} split" if split else ""
    columns = ", ".join(map(str, read.never_finite[:8]))
    if columns:
        columns = f"; never finite: column {columns}" + ", ..." * (len(read.never_finite) > 8)

    def warn(problem: str) -> None:
        warnings.warn(f"{path}: {problem}", stacklevel=3)

    if read.zeroed:
        warn(f"{read.zeroed} values of `{name}`{where} are not finite and are taken as 0{columns}")
    if read.invalid.any():
        warn(
            f"{int(read.invalid.sum())} steps of `{name}` in {int(read.invalid.any(1).sum())} samples{where} "
            "are not finite and are left out"
        )
        if read.padding_mask.all():
            warn(
                f"no step of `{name}`{where} is left, it is missing in all samples{columns}; "
                '`invalid="value"` keeps the other values'
            )


def read_modality(
    split: Split, name: str, key: str, path: Path, count: int, padding: str, invalid: Invalid
) -> Sequences:
    """Reads one modality of one split of MMSA's or TAILOR's files, with the mask that these files imply.

    Args:
        split: The split, from which the modality is removed.
        name: Name of the modality.
        key: Its key in the split.
        path: Name of the file, for messages.
        count: Number of samples N of the split.
        padding: `"auto"`, `"zeros"` or `"none"`; see :func:`read_mmsa`.
        invalid: See :func:`finish`.
    """
    where = f"{split.key}.{key}"
    values, lengths = stack(split.content.pop(key), path, where)
    steps = values.shape[1]
    need(
        len(values) == count, path, f"`{where}` has {len(values)} samples, other modalities {count}"
    )
    if padding == "none":
        return finish(values, np.zeros((count, steps), np.bool_), invalid)
    mask = None
    if padding == "auto":
        quiet = False
        if lengths is None:
            lengths = _given_lengths(split, name, count, steps, path)
        if lengths is None and "text_bert" in split.content:
            tokens = plain_array(split.content["text_bert"])
            need(
                tokens.ndim == 3 and tokens.shape[:2] == (count, 3) and tokens.dtype.kind in "fiu",
                path,
                f"`{split.key}.text_bert` must have shape ({count}, 3, S), got {tokens.shape}",
            )
            valid = tokens[:, 1]
            need(
                np.isin(valid, (0, 1)).all(),
                path,
                f"`{split.key}.text_bert[:, 1]` must be a mask of 0 and 1, got {valid.min()} to {valid.max()}",
            )
            if valid.shape[1] == steps:  # text, and modalities aligned with it
                lengths = valid.sum(1).astype(np.int64)
                if (valid.astype(bool) != (np.arange(steps) < lengths[:, None])).any():
                    mask = valid == 0
                quiet = name == "text"  # BERT gives features for padding, too
        if lengths is not None and mask is None:
            mask = place(values, lengths, path, where, quiet=quiet)
    outside = edges(values)
    if mask is None:
        mask = outside
    # in a sample of only zeros, the modality is missing
    return finish(values, mask | outside.all(axis=1, keepdims=True), invalid)


def _given_lengths(
    split: Split, name: str, count: int, steps: int, path: Path
) -> NDArray[Any] | None:
    """The lengths that a split states for a modality, limited to its number of steps."""
    own = f"{name}_lengths"
    key = own if own in split.content else "len_list"
    if key not in split.content:
        return None
    lengths = integers(split.content[key], count, path, f"{split.key}.{key}")
    need(
        (lengths >= 0).all(),
        path,
        f"`{split.key}.{key}` must be at least 0, got {lengths.min(initial=0)}",
    )
    cut = int((lengths > steps).sum())
    if cut and key == own:  # the reader of TAILOR's files reports `len_list`
        warnings.warn(
            f"{path}: {cut} of `{split.key}.{key}` are above the {steps} steps of the file (up to "
            f"{lengths.max()}), from before the sequences were cut; they are taken as {steps}",
            stacklevel=2,
        )
    return lengths.clip(max=steps)


def sample_ids(split: Split, count: int, path: Path) -> list[str] | None:
    """N names, if the split has any; names of several parts, as in MulT's files, are joined by `$_$`."""

    def text(part: Any) -> str:
        return part.decode() if isinstance(part, bytes) else str(part)

    rows = split.content.get("id")
    if rows is None:
        return None
    rows = rows.tolist() if isinstance(rows, np.ndarray | Tensor) else rows
    need(
        isinstance(rows, list | tuple) and len(rows) == count,
        path,
        f"`{split.key}.id` must name {count} samples, got {len(rows) if hasattr(rows, '__len__') else rows}",
    )
    return [
        "$_$".join(map(text, row)) if isinstance(row, list | tuple | np.ndarray) else text(row)
        for row in rows
    ]


def check_splits(content: Any, path: Path) -> dict[str, Split]:
    """The three splits in the content of a file; raises unless content and splits are dicts."""
    need(isinstance(content, dict), path, f"must hold a dict, got {type(content).__name__}")
    keys: dict[str, list[str]] = {split: [] for split in SPLIT_KEYS}
    for key in content:
        if isinstance(key, str) and key.lower() in SPLIT_NAMES:
            keys[SPLIT_NAMES[key.lower()]].append(key)
    splits = {}
    for split, found in keys.items():
        need(found, path, f"missing split `{SPLIT_KEYS[split]}`, found {sorted(map(str, content))}")
        need(len(found) == 1, path, f"several splits for {split}: {found}")
        part = content[found[0]]
        need(
            isinstance(part, dict),
            path,
            f"split `{found[0]}` must be a dict, got {type(part).__name__}",
        )
        splits[split] = Split(found[0], dict(part))
    return splits


def count_samples(split: Split, path: Path) -> int:
    """Number of samples of a split, from its first modality."""
    wanted = [key for keys in MODALITIES.values() for key in keys]
    for key in wanted:
        if key in split.content:
            rows = split.content[key]
            need(hasattr(rows, "__len__"), path, f"`{split.key}.{key}` holds no samples")
            return len(rows)
    raise ValueError(
        f"{path}: no modality in split `{split.key}`: "
        f"none of {wanted} in {sorted(map(str, split.content))}"
    )


def make_dataset(
    read: Mapping[str, Sequences],
    labels: Labels,
    label_names: Sequence[str],
    ids: Sequence[str] | None,
) -> MultimodalDataset:
    """Makes a data set of one split."""

    def tensor(array: NDArray[Any], dtype: type) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype))

    options: dict[str, Any] = {}
    if labels.soft_labels is not None:
        options["soft_labels"] = tensor(labels.soft_labels, np.float32)
    if labels.unknown is not None:
        options["unknown"] = tensor(labels.unknown, np.bool_)
    return MultimodalDataset(
        {name: each.features for name, each in read.items()},
        {name: each.padding_mask for name, each in read.items()},
        tensor(labels.labels, np.uint8),
        label_names,
        ids=ids,
        invalid_steps={name: int(each.invalid.sum()) for name, each in read.items()},
        validate_args=False,
        **options,
    )


def assemble(
    splits: Mapping[str, Split],
    path: Path,
    labels: Mapping[str, Labels],
    label_names: Sequence[str],
    padding: Padding,
    invalid: Invalid,
) -> dict[str, MultimodalDataset]:
    """The three splits of MMSA's or TAILOR's files as data sets."""
    parts = {}
    sizes: dict[str, int] = {}
    for split, part in splits.items():
        count = count_samples(part, path)
        read: dict[str, Sequences] = {}
        for name, keys in MODALITIES.items():
            key = next((key for key in keys if key in part.content), None)
            if key is None:
                need(name not in sizes, path, f"modality `{name}` is missing in split `{part.key}`")
                continue
            each = read_modality(part, name, key, path, count, padding, invalid)
            dim = each.features.shape[2]
            need(
                (not sizes or name in sizes or split == "train")
                and sizes.setdefault(name, dim) == dim,
                path,
                f"`{part.key}.{key}` has features of size {dim}, in split `train` {sizes.get(name, 'none')}",
            )
            report_invalid(path, split, name, each)
            read[name] = each
        parts[split] = make_dataset(read, labels[split], label_names, sample_ids(part, count, path))
    return parts
