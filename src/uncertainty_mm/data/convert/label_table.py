"""Labels in separate files: :func:`read_label_csv`, lists of tokens, and the names of emotions."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uncertainty_mm._checks import check_labels, check_tensor
from uncertainty_mm.data._formats import format_of
from uncertainty_mm.data._sequences import (
    SPLIT_KEYS,
    SPLIT_NAMES,
    Labels,
    Path,
    Split,
    need,
    plain_array,
)

MOSEI_LABELS = ("happy", "sad", "anger", "surprise", "disgust", "fear")
"""Emotions of CMU-MOSEI in the order of the codes 4 to 9 of TAILOR, CARAT and LDDU."""

M3ED_LABELS = ("happy", "neutral", "sad", "disgust", "anger", "fear", "surprise")
"""Emotions of M3ED in the order of its codes 0 to 6."""

_ALIASES = {
    "angry": "anger",
    "disgusted": "disgust",
    "fearful": "fear",
    "happiness": "happy",
    "sadness": "sad",
    "surprised": "surprise",
}
_BEGIN, _END, _FIRST = 2, 3, 4  # tokens of <s>, of </s> and of the first label
_ID_COLUMNS = (("id",), ("video_id", "clip_id"), ("file", "index"))
_SPLIT_COLUMNS = ("mode", "split")
_HIGHEST = 3  # of the intensities of CMU-MOSEI; means over more raters than planned may exceed it
_INTENSITY = "a number of at least 0, or NaN where the label is unknown"

JoinBy = Literal["auto", "id", "order"]


def canonical(name: str) -> str:
    """The name of an emotion in one spelling, since the sources differ."""
    name = name.strip().lower()
    return _ALIASES.get(name, name)


def order(found: Sequence[str], wanted: Sequence[str], path: Path, where: str) -> list[int]:
    """The position in `found` of every label in `wanted`; raises unless both name the same labels."""
    names = [canonical(name) for name in found]
    need(len(set(names)) == len(names), path, f"{where} repeats a label: {list(found)}")
    need(
        sorted(names) == sorted(map(canonical, wanted)),
        path,
        f"{where} names the labels {list(found)}, expected {list(wanted)}",
    )
    return [names.index(canonical(name)) for name in wanted]


class LabelTable(NamedTuple):
    """Labels without features.

    Attributes:
        labels: (N, Q) of 0 and 1, uint8.
        label_names: Names of the columns.
        soft_labels: (N, Q) float32, the intensities behind the labels, or None.
        ids: N names `video$_$clip`, or None.
        splits: `"train"`, `"validation"` or `"test"` for every row, or None.
        unknown: (N, Q) bool, True where a label is not known, or None if all are known. Readers of tables set it where
            there is NaN; in your own table, NaN in `labels` or `soft_labels` has the same effect.
    """

    labels: Tensor
    label_names: tuple[str, ...]
    soft_labels: Tensor | None = None
    ids: list[str] | None = None
    splits: list[str] | None = None
    unknown: Tensor | None = None


def checked(table: LabelTable, label_names: Sequence[str]) -> LabelTable:
    """The checked table of a user, with columns in the order of `label_names`, and NaN moved to `unknown`."""
    sizes = {"Q": len(table.label_names)}
    labels = check_tensor("labels.labels", table.labels, "number", "N Q", sizes).cpu().double()
    soft_labels, unknown = table.soft_labels, labels.isnan()
    if table.unknown is not None:
        unknown |= check_tensor("labels.unknown", table.unknown, "bool", "N Q", sizes).cpu()
    if soft_labels is not None:
        unknown |= (
            check_tensor("labels.soft_labels", soft_labels, "floating", "N Q", sizes).cpu().isnan()
        )
        soft_labels = soft_labels.cpu().float().masked_fill(unknown, 0)
    labels = labels.masked_fill(unknown, 0)
    if (labels == -1).any():
        raise ValueError(
            "Expected `labels.labels` to hold 0 and 1, or NaN where a label is unknown, but got -1"
        )
    check_labels("labels.labels", labels)
    for name, rows in (("ids", table.ids), ("splits", table.splits)):
        if rows is not None and len(rows) != sizes["N"]:
            raise ValueError(
                f"Expected `labels.{name}` to name {sizes['N']} samples, but got {len(rows)}"
            )
    columns = order(table.label_names, label_names, "labels", "the table")
    return LabelTable(
        labels[:, columns].byte(),
        tuple(label_names),
        None if soft_labels is None else soft_labels[:, columns],
        table.ids,
        table.splits,
        unknown[:, columns] if unknown.any() else None,
    )


def from_intensities(values: NDArray[Any], path: Path, name: Callable[[int, int], str]) -> Labels:
    """Makes labels (N, Q), present above 0 and unknown at NaN; intensities above 3 count as 3.

    Args:
        values: (N, Q) of numbers.
        path: Name of the file, for messages.
        name: Gives the name of the value in a row and column, for messages.
    """
    values = values.astype(np.float64)
    unknown = np.isnan(values)
    wrong = np.argwhere(~unknown & ~((values >= 0) & np.isfinite(values)))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"{path}: {name(row, column)} must be {_INTENSITY}, got {values[row, column]:g}"
        )
    values[unknown] = 0
    high = values > _HIGHEST
    if high.any():
        warnings.warn(
            f"{path}: {int(high.sum())} intensities are above {_HIGHEST} (up to {values.max():g}); "
            f"they are taken as {_HIGHEST}",
            stacklevel=2,
        )
        values[high] = _HIGHEST
    labels = (values > 0).astype(np.uint8)
    return Labels(
        labels,
        values.astype(np.float32) if (values != labels).any() else None,
        unknown if unknown.any() else None,
    )


def from_tokens(
    tokens: Any, codes: Mapping[int, int], num_labels: int, path: Path, where: str
) -> Labels:
    """Makes labels (N, Q) from N lists `[2, code, ..., 3]`; `codes` gives the column of every code.

    NaN instead of a list means that none of the labels is known.
    """
    need(hasattr(tokens, "__len__"), path, f"`{where}` must be lists of tokens")
    labels = np.zeros((len(tokens), num_labels), np.uint8)
    unknown = np.zeros(labels.shape, np.bool_)
    for index, row in enumerate(tokens):
        row = row.tolist() if isinstance(row, np.ndarray | Tensor) else row
        if isinstance(row, float) and math.isnan(row):
            unknown[index] = True
            continue
        need(
            isinstance(row, list | tuple)
            and all(type(token) is int or isinstance(token, np.integer) for token in row)
            and len(row) >= 2
            and (row[0], row[-1]) == (_BEGIN, _END),
            path,
            f"`{where}` of sample {index} must be tokens [{_BEGIN}, ..., {_END}], got {row!r}",
        )
        for token in row[1:-1]:
            need(
                token in codes,
                path,
                f"`{where}` of sample {index} holds the token {token}, the labels are {sorted(codes)}",
            )
            labels[index, codes[token]] = 1
    return Labels(labels, None, unknown if unknown.any() else None)


def from_array(values: Any, columns: Sequence[int], path: Path, where: str) -> Labels:
    """Makes labels (N, Q) from the array of a file.

    It holds pairs `[absent, present]` (N, Q, 2) as in MulT's IEMOCAP, or intensities (N, Q), or (N, Q + 1) with the
    sentiment first as from the SDK of CMU-MOSEI; axes of size 1 are ignored.

    Args:
        values: The array.
        columns: Position in the file of every label.
        path: Name of the file, for messages.
        where: Its key there.
    """

    def name(row: int, column: int) -> str:
        return f"`{where}` of sample {row}"

    array = plain_array(values)
    count, num_labels = len(array) if array.ndim else 0, len(columns)
    shape = tuple(size for size in array.shape[1:] if size != 1)
    number = array.dtype.kind in "biuf"
    if number and shape == (num_labels, 2):
        absent, present = array.reshape(count, num_labels, 2).astype(np.float64).transpose(2, 0, 1)
        known = ~np.isnan(absent + present)
        need(
            (np.isin(present, (0, 1)) & (absent + present == 1))[known].all(),
            path,
            f"`{where}` must be pairs [absent, present] of which one is 1",
        )
        return from_intensities(np.where(known, present, np.nan)[:, columns], path, name)
    size = array.size // max(count, 1)
    need(
        number and len(shape) <= 1 and count and size in (num_labels, num_labels + 1),
        path,
        f"no emotions: `{where}` has {array.dtype} {array.shape}, but {num_labels} labels need (N, {num_labels}), "
        f"(N, {num_labels + 1}) with the sentiment first, or pairs (N, {num_labels}, 2)",
    )
    emotions = array.reshape(count, size)[:, size - num_labels :]
    return from_intensities(emotions[:, columns], path, name)


def labels_of(
    split: Split, count: int, codes: Mapping[int, int], columns: Sequence[int], path: Path
) -> Labels:
    """Reads the labels that are in a split itself, as tokens `tgt` or as an array `labels`.

    Args:
        split: The split.
        count: Number of its samples.
        codes: The column of every token.
        columns: The position in an array of every label.
        path: Name of the file, for messages.
    """
    if "tgt" in split.content:
        key = "tgt"
        labels = from_tokens(split.content[key], codes, len(columns), path, f"{split.key}.{key}")
    else:
        key = "labels"
        need(
            key in split.content,
            path,
            f"no emotions: missing `{split.key}.tgt`, and no `labels` were given; "
            f"found {sorted(map(str, split.content))}",
        )
        labels = from_array(split.content[key], columns, path, f"{split.key}.{key}")
    need(
        len(labels.labels) == count,
        path,
        f"`{split.key}.{key}` has {len(labels.labels)} samples, the features {count}",
    )
    return labels


def codes_in_order(label_names: Sequence[str]) -> dict[int, int]:
    """Columns by code, where labels in this order have the codes 4, 5, ..."""
    return {_FIRST + column: column for column in range(len(label_names))}


def read_label_csv(
    path: str | PathLike[str], label_names: Sequence[str] = MOSEI_LABELS
) -> LabelTable:
    r"""Reads labels from a CSV file with a header.

    The columns are found by name in any order, regardless of case and spelling (`Happiness` is `happy`):

    - one column of intensities per label, 0 to 3 as in CMU-MOSEI, where a label is present above 0; or one column
      `tgt` of token lists such as `[2, 4, 9, 3]`, which follow the order of `label_names`. NaN or an empty cell means
      that the label is not known. Intensities above 3 count as 3, and a warning counts them;
    - optionally the name of the sample: `id`, or `video_id` and `clip_id`, or `file` and `index`;
    - optionally the split: `mode` or `split`, which is train, valid or test.

    Other columns are ignored.

    Args:
        path: The file.
        label_names: Names of the labels, in the desired order.

    Returns:
        The table, with soft labels if some value is neither 0 nor 1.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a label has no column, or a value is invalid.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "labels.csv")
        >>> with open(path, "w") as file:
        ...     _ = file.write("video_id,clip_id,sadness,happiness\n")
        ...     _ = file.write("abc,0,0,0.67\nabc,1,3,0\n")
        >>> table = read_label_csv(path, ["happy", "sad"])
        >>> table.ids, table.labels.tolist()
        (['abc$_$0', 'abc$_$1'], [[1, 0], [0, 1]])
    """
    header, rows = _rows(path)
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    emotions = {canonical(name): name for name in header}
    for name in label_names:
        same = [column for column in header if canonical(column) == canonical(name)]
        need(len(same) <= 1, path, f"several columns for the label `{name}`: {same}")
    absent = [name for name in label_names if canonical(name) not in emotions]
    need(
        not absent or "tgt" in columns,
        path,
        f"no column for the labels {absent}, and none of tokens `tgt`, found {header}",
    )
    if absent:
        tokens = _parsed(path, "tgt", columns["tgt"], json.loads, "a list of tokens")
        labels = from_tokens(tokens, codes_in_order(label_names), len(label_names), path, "tgt")
    else:
        keys = [emotions[canonical(name)] for name in label_names]
        values = [_parsed(path, key, columns[key], float, _INTENSITY) for key in keys]
        labels = from_intensities(
            np.array(values).T, path, lambda row, column: f"`{keys[column]}` of row {row}"
        )
    ids = splits = None
    for parts in _ID_COLUMNS:
        if ids is None and all(key in columns for key in parts):
            named = zip(*(columns[key] for key in parts), strict=True)
            ids = ["$_$".join(each) for each in named]
    for key in _SPLIT_COLUMNS:
        if splits is None and key in columns:
            for line, text in enumerate(columns[key]):
                need(
                    text.strip().lower() in SPLIT_NAMES,
                    path,
                    f"`{key}` of row {line} must be train, valid or test, got {text!r}",
                )
            splits = [SPLIT_NAMES[text.strip().lower()] for text in columns[key]]
    return LabelTable(
        torch.from_numpy(labels.labels),
        tuple(label_names),
        None if labels.soft_labels is None else torch.from_numpy(labels.soft_labels),
        ids,
        splits,
        None if labels.unknown is None else torch.from_numpy(labels.unknown),
    )


def _rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table; raises unless all have the same length."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            rows = [row for row in reader if row]
        except (csv.Error, UnicodeDecodeError) as error:
            found = format_of(path)
            reason = error if found is None else f"it is {found}"
            raise ValueError(f"{path}: not a readable .csv file ({reason})") from error
    need(rows, path, "no row below the header")
    for line, row in enumerate(rows):
        need(
            len(row) == len(header),
            path,
            f"row {line} has {len(row)} fields, the header {len(header)}",
        )
    return header, rows


def _parsed(
    path: Path, key: str, texts: Sequence[str], parse: Callable[[str], Any], what: str
) -> list[Any]:
    """The cells of a column; empty ones are NaN, as pandas writes it."""
    values = []
    for row, text in enumerate(texts):
        try:
            values.append(math.nan if text.strip().lower() in ("", "nan") else parse(text))
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: `{key}` of row {row} must be {what}, got {text!r}") from None
    return values


def join(
    table: LabelTable,
    ids: Mapping[str, list[str] | None],
    counts: Mapping[str, int],
    path: Path,
    how: JoinBy,
) -> dict[str, Labels]:
    """Joins the labels to the samples of every split, by name or by the order of rows.

    Args:
        table: The labels.
        ids: By split, the names of the samples, or None.
        counts: By split, the number of samples.
        path: Name of the file with the samples, for messages.
        how: `"id"`, `"order"`, or `"auto"`: by name if both sides have names.
    """
    named = table.ids is not None and all(each is not None for each in ids.values())
    if how == "auto":
        how = "id" if named else "order"
    rows: dict[str, list[int]] = {}
    if how == "id":
        need(named, path, "labels cannot be joined by id: the file or the table has no ids")
        positions: dict[str, int] = {}
        for position, name in enumerate(table.ids or ()):
            need(name not in positions, path, f"the table of labels names sample {name!r} twice")
            positions[name] = position
        for split, names in ids.items():
            absent = [name for name in names or () if name not in positions]
            need(
                not absent,
                path,
                f"{len(absent)} of {counts[split]} samples of the {split} split have no labels, such as "
                f"{absent[:1]}; the table names samples such as {(table.ids or [])[:1]}",
            )
            rows[split] = [positions[name] for name in names or ()]
    else:
        start = 0
        for split in SPLIT_KEYS:
            if table.splits is None:
                rows[split] = list(range(start, start + counts[split]))
                start += counts[split]
            else:
                rows[split] = [row for row, name in enumerate(table.splits) if name == split]
            need(
                table.splits is None or len(rows[split]) == counts[split],
                path,
                f"{counts[split]} samples in the {split} split, {len(rows[split])} rows of labels",
            )
        need(
            table.splits is not None or start == len(table.labels),
            path,
            f"{start} samples, {len(table.labels)} rows of labels",
        )

    def taken(tensor: Tensor | None, chosen: list[int]) -> NDArray[Any] | None:
        return None if tensor is None else tensor[chosen].numpy()

    return {
        split: Labels(
            table.labels[chosen].numpy(),
            taken(table.soft_labels, chosen),
            taken(table.unknown, chosen),
        )
        for split, chosen in rows.items()
    }
