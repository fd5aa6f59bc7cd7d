"""Labels that come apart from the features: :func:`read_label_csv`, lists of tokens, and the names of emotions."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uncertainty_mm.data._sequences import SPLIT_KEYS, Labels, Path, need

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
_BEGIN, _END, _FIRST = 2, 3, 4  # tokens <s> and </s>, and that of the first label
_ID_COLUMNS = (("id",), ("video_id", "clip_id"), ("file", "index"))
_SPLIT_COLUMNS = ("mode", "split")
_SPLIT_VALUES = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def canonical(name: str) -> str:
    """The name of an emotion without the differences in spelling between the sources."""
    name = name.strip().lower()
    return _ALIASES.get(name, name)


def order(found: Sequence[str], wanted: Sequence[str], path: Path, where: str) -> list[int]:
    """The position in `found` of every wanted label; raises unless both name the same labels."""
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
        soft_labels: (N, Q) float32, the intensities that the labels were made from, or None.
        ids: N names `video$_$clip`, or None.
        splits: `"train"`, `"validation"` or `"test"` for every row, or None.
    """

    labels: Tensor
    label_names: tuple[str, ...]
    soft_labels: Tensor | None = None
    ids: list[str] | None = None
    splits: list[str] | None = None


def tokens_to_labels(
    tokens: Any, codes: Mapping[int, int], num_labels: int, path: Path, where: str
) -> NDArray[np.uint8]:
    """(N, Q) from N lists `[2, code, ..., 3]`; `codes` gives the column of every code."""
    need(hasattr(tokens, "__len__"), path, f"`{where}` must be lists of tokens")
    labels = np.zeros((len(tokens), num_labels), np.uint8)
    for index, row in enumerate(tokens):
        row = row.tolist() if isinstance(row, np.ndarray | Tensor) else row
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
    return labels


def codes_in_order(label_names: Sequence[str]) -> dict[int, int]:
    """Columns of the codes 4, 5, ... of labels in this order."""
    return {_FIRST + column: column for column in range(len(label_names))}


def read_label_csv(
    path: str | PathLike[str], label_names: Sequence[str] = MOSEI_LABELS
) -> LabelTable:
    r"""Reads labels from a CSV file with a header.

    The columns are found by name, whatever their order, without regard to case and spelling (`Happiness` is `happy`):

    - one column of intensities for every label, 0 to 3 as in CMU-MOSEI, where a label is present if above 0; or one
      column `tgt` of token lists such as `[2, 4, 9, 3]`, which follow the order of `label_names`;
    - optionally a name of the sample: `id`, or `video_id` and `clip_id`, or `file` and `index`;
    - optionally a split: `mode` or `split`, which is train, valid or test.

    Other columns are ignored.

    Args:
        path: The file.
        label_names: Names of the labels, in the order wanted.

    Returns:
        The table. It has soft labels if a value is other than 0 and 1.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a label has no column, or a value is not what it must be.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "labels.csv")
        >>> with open(path, "w") as file:
        ...     _ = file.write("video_id,clip_id,sadness,happiness\nabc,0,0,0.67\nabc,1,3,0\n")
        >>> table = read_label_csv(path, ["happy", "sad"])
        >>> table.ids, table.labels.tolist()
        (['abc$_$0', 'abc$_$1'], [[1, 0], [0, 1]])
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            rows = [row for row in reader if row]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a readable .csv file ({error})") from error
    need(rows, path, "no row below the header")
    for line, row in enumerate(rows):
        need(
            len(row) == len(header),
            path,
            f"row {line} has {len(row)} fields, the header {len(header)}",
        )
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    emotions = {canonical(name): name for name in header}
    for name in label_names:
        same = [column for column in header if canonical(column) == canonical(name)]
        need(len(same) <= 1, path, f"several columns for the label `{name}`: {same}")
    absent = [name for name in label_names if canonical(name) not in emotions]
    soft_labels = None
    if not absent:
        values = np.empty((len(rows), len(label_names)))
        for column, name in enumerate(label_names):
            key = emotions[canonical(name)]
            for line, text in enumerate(columns[key]):
                try:
                    values[line, column] = float(text)
                except ValueError:
                    values[line, column] = np.nan
                need(
                    0 <= values[line, column] <= 3,
                    path,
                    f"`{key}` of row {line} must be a number in [0, 3], got {text!r}",
                )
        labels = (values > 0).astype(np.uint8)
        if (values != labels).any():
            soft_labels = torch.from_numpy(values.astype(np.float32))
    else:
        need(
            "tgt" in columns,
            path,
            f"no column for the labels {absent}, and none of tokens `tgt`, found {header}",
        )
        tokens = []
        for line, text in enumerate(columns["tgt"]):
            try:
                tokens.append(json.loads(text))
            except (ValueError, RecursionError):
                raise ValueError(
                    f"{path}: `tgt` of row {line} must be a list of tokens, got {text!r}"
                ) from None
        labels = tokens_to_labels(
            tokens, codes_in_order(label_names), len(label_names), path, "tgt"
        )
    ids = splits = None
    for keys in _ID_COLUMNS:
        if ids is None and all(key in columns for key in keys):
            ids = ["$_$".join(parts) for parts in zip(*(columns[key] for key in keys), strict=True)]
    for key in _SPLIT_COLUMNS:
        if splits is None and key in columns:
            for line, text in enumerate(columns[key]):
                need(
                    text.strip().lower() in _SPLIT_VALUES,
                    path,
                    f"`{key}` of row {line} must be train, valid or test, got {text!r}",
                )
            splits = [_SPLIT_VALUES[text.strip().lower()] for text in columns[key]]
    return LabelTable(torch.from_numpy(labels), tuple(label_names), soft_labels, ids, splits)


def join(
    table: LabelTable,
    ids: Mapping[str, list[str] | None],
    counts: Mapping[str, int],
    path: Path,
    how: str,
) -> dict[str, Labels]:
    """The labels of every split's samples, by name or by the order of rows.

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
    return {
        split: Labels(
            table.labels[chosen].numpy(),
            None if table.soft_labels is None else table.soft_labels[chosen].numpy(),
        )
        for split, chosen in rows.items()
    }
