"""Reads the pickles of MMSA, MulT and the released LDDU code, which share a layout: :func:`read_mmsa`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import get_args

import numpy as np
import torch

from uncertainty_mm._checks import check_choice
from uncertainty_mm.data._formats import OLD_TORCH, TORCH, format_of
from uncertainty_mm.data._sequences import (
    Invalid,
    Padding,
    assemble,
    check_splits,
    count_samples,
    sample_ids,
)
from uncertainty_mm.data.convert._restricted import load_pickle, load_torch
from uncertainty_mm.data.convert.label_table import (
    MOSEI_LABELS,
    JoinBy,
    LabelTable,
    canonical,
    checked,
    codes_in_order,
    join,
    labels_of,
    read_label_csv,
)
from uncertainty_mm.data.convert.tailor import tailor_labels
from uncertainty_mm.data.dataset import MultimodalDataset


def read_mmsa(
    path: str | PathLike[str],
    labels: str | PathLike[str] | LabelTable | None = None,
    label_names: Sequence[str] = MOSEI_LABELS,
    *,
    join_by: JoinBy = "auto",
    padding: Padding = "auto",
    invalid: Invalid = "step",
) -> dict[str, MultimodalDataset]:
    """Reads CMU-MOSEI features from a pickle in the layout of MMSA, and joins emotions to them.

    Such pickles are `aligned_50.pkl` and `unaligned_50.pkl` of MMSA, `mosei_senti_data_noalign.pkl` of MulT, and
    `aligned_501.pkl` and `no_align_501.pkl` of the released LDDU code: a dict of splits `train`, `valid` (or `dev`,
    `val`) and `test` with arrays `text`, `audio` and `vision`. Code in the pickle is refused, not run.

    The pickles of MMSA and MulT have only the sentiment; emotions come from `labels`. Those of LDDU have lists of
    tokens, `tgt`, without the meaning of the tokens, which follow the order of `label_names`. An array `labels` is read
    as emotions if its shape matches: intensities (N, Q), (N, Q + 1) with the sentiment first, or pairs absent, present
    (N, Q, 2), where axes of size 1 are ignored. There the six emotions of CMU-MOSEI are in the order of
    :data:`MOSEI_LABELS`, as from the SDK, and others in the order of `label_names`. NaN becomes `unknown`.

    Args:
        path: The pickle.
        labels: Emotions: a `.csv` file (:func:`read_label_csv`), a `.pt` file of TAILOR or CARAT, which has no ids
            and is joined by the order of rows, or a table. None takes the emotions of the pickle.
        label_names: Labels in the desired order. Names in `labels` are matched to them, whatever their order there.
        join_by: `"id"`, `"order"` (of rows, within each split if the table has splits), or `"auto"`: by id if pickle
            and table have ids. The order of rows cannot be checked, except for their number.
        padding: Source of the masks.

            - `"auto"`: `audio_lengths` and `vision_lengths`, otherwise the attention mask `text_bert[:, 1]` for the
              text and modalities aligned with it, otherwise as with `"zeros"`. Padding may be before or behind a
              sequence. A sequence of only zeros is missing. Lengths from before a truncation are limited to the steps
              of the file, and a warning counts them.
            - `"zeros"`: frames of zeros before and behind a sequence are padding.
            - `"none"`: nothing is padding, as in the released code of LDDU.
        invalid: For a value that is not finite (COVAREP has -inf), mask its `"step"`, or set only the `"value"` to 0.
            If one value in a thousand is bad, 7 % of the steps with 74 values are affected.

    Returns:
        The splits `"train"`, `"validation"` and `"test"` with the modalities `text`, `audio` and `vision`, and the ids
        of the file, `video$_$clip`. Warnings count values that are not finite, name columns that never are, and tell if
        nothing is left of a modality.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a file cannot be read, names code, or breaks the layout, or if labels and samples do not match.
    """
    check_choice("join_by", join_by, get_args(JoinBy))
    check_choice("padding", padding, get_args(Padding))
    check_choice("invalid", invalid, get_args(Invalid))
    splits = check_splits(load_pickle(path), path)
    counts = {name: count_samples(split, path) for name, split in splits.items()}
    if labels is None:
        columns = list(range(len(label_names)))
        names = [canonical(name) for name in label_names]
        if sorted(names) == sorted(MOSEI_LABELS):
            columns = [MOSEI_LABELS.index(name) for name in names]
        codes = codes_in_order(label_names)
        by_split = {
            name: labels_of(split, counts[name], codes, columns, path)
            for name, split in splits.items()
        }
    else:
        table = read_table(labels, label_names)
        ids = {name: sample_ids(split, counts[name], path) for name, split in splits.items()}
        by_split = join(table, ids, counts, path, join_by)
    return assemble(splits, path, by_split, label_names, padding, invalid)


def read_table(labels: str | PathLike[str] | LabelTable, label_names: Sequence[str]) -> LabelTable:
    """Reads labels from a `.csv` file, a `.pt` file of TAILOR or CARAT, or a table, in the order of `label_names`."""
    if isinstance(labels, LabelTable):
        return checked(labels, label_names)
    if not fspath(labels).endswith(".pt") and format_of(labels) not in (TORCH, OLD_TORCH):
        return read_label_csv(labels, label_names)
    content = load_torch(labels)
    by_split, _ = tailor_labels(content, check_splits(content, labels), labels, label_names)
    unknown = [
        np.zeros(each.labels.shape, np.bool_) if each.unknown is None else each.unknown
        for each in by_split.values()
    ]
    return checked(
        LabelTable(
            torch.from_numpy(np.concatenate([each.labels for each in by_split.values()])),
            tuple(label_names),
            splits=[name for name, each in by_split.items() for _ in each.labels],
            unknown=torch.from_numpy(np.concatenate(unknown)),
        ),
        label_names,
    )
