"""The pickles of MMSA, and of MulT and the released LDDU code, which share their layout: :func:`read_mmsa`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath

import torch

from uncertainty_mm._checks import check_choice, check_labels, check_tensor
from uncertainty_mm.data._sequences import (
    SPLIT_KEYS,
    Labels,
    assemble,
    check_splits,
    count_samples,
    need,
    sample_ids,
)
from uncertainty_mm.data.convert._restricted import load_pickle, load_torch
from uncertainty_mm.data.convert.label_table import (
    MOSEI_LABELS,
    LabelTable,
    codes_in_order,
    join,
    order,
    read_label_csv,
    tokens_to_labels,
)
from uncertainty_mm.data.convert.tailor import tailor_labels
from uncertainty_mm.data.dataset import MultimodalDataset


def read_mmsa(
    path: str | PathLike[str],
    labels: str | PathLike[str] | LabelTable | None = None,
    label_names: Sequence[str] = MOSEI_LABELS,
    *,
    join_by: str = "auto",
    padding: str = "auto",
) -> dict[str, MultimodalDataset]:
    """Reads CMU-MOSEI features from a pickle in the layout of MMSA, and joins emotions to them.

    That is `aligned_50.pkl` or `unaligned_50.pkl` of MMSA, `mosei_senti_data_noalign.pkl` of MulT, and
    `aligned_501.pkl` or `no_align_501.pkl` of the released LDDU code: a dict of splits `train`, `valid` and `test`
    with arrays `text`, `audio` and `vision`. Code in the pickle is refused, not run.

    The pickles of MMSA and MulT know the sentiment alone; emotions come from `labels`. Those of LDDU hold them as
    lists of tokens, `tgt`, without saying which token is which emotion: it is the order of `label_names`.

    Args:
        path: The pickle.
        labels: Emotions: a `.csv` file (:func:`read_label_csv`), a `.pt` file of TAILOR or CARAT, which has no ids
            and is joined by the order of rows, or a table. None takes `tgt` of the pickle.
        label_names: Labels in the order wanted. Names in `labels` are matched to them, whatever their order there.
        join_by: `"id"`, `"order"` (of rows, within each split if the table has splits), or `"auto"`: by id where
            pickle and table have ids. The order of rows cannot be checked, except for their number.
        padding: Where the masks come from.

            - `"auto"`: from `audio_lengths` and `vision_lengths`, else from the attention mask `text_bert[:, 1]` for
              the text and what is aligned with it, else as with `"zeros"`. Padding may lie before or behind. A
              sequence of nothing but zeros is missing.
            - `"zeros"`: frames of zeros before and behind a sequence are padding.
            - `"none"`: nothing is padding, as in the released code of LDDU.

    Returns:
        The splits `"train"`, `"validation"` and `"test"` with the modalities `text`, `audio` and `vision`. Steps with
        -inf or NaN are masked, and a warning counts them. Ids are those of the file, `video$_$clip`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file cannot be read, names code, or breaks the layout, or if labels and samples do not fit.
    """
    check_choice("join_by", join_by, ("auto", "id", "order"))
    check_choice("padding", padding, ("auto", "zeros", "none"))
    content = load_pickle(path)
    check_splits(content, path)
    counts = {split: count_samples(content[key], path, key) for split, key in SPLIT_KEYS.items()}
    if labels is None:
        by_split = {}
        for split, key in SPLIT_KEYS.items():
            need(
                "tgt" in content[key],
                path,
                f"no emotions: missing `{key}.tgt`, and no `labels` were given; found {sorted(map(str, content[key]))}",
            )
            rows = tokens_to_labels(
                content[key]["tgt"],
                codes_in_order(label_names),
                len(label_names),
                path,
                f"{key}.tgt",
            )
            need(
                len(rows) == counts[split],
                path,
                f"`{key}.tgt` has {len(rows)} samples, the features {counts[split]}",
            )
            by_split[split] = Labels(rows)
    else:
        table = _table(labels, label_names)
        ids = {
            split: sample_ids(content[key]["id"], counts[split], path, f"{key}.id")
            if "id" in content[key]
            else None
            for split, key in SPLIT_KEYS.items()
        }
        by_split = join(table, ids, counts, path, join_by)
    return assemble(content, path, by_split, label_names, padding)


def _check_table(table: LabelTable) -> None:
    sizes = {"Q": len(table.label_names)}
    check_tensor("labels.labels", table.labels, "number", "N Q", sizes)
    check_labels("labels.labels", table.labels)
    if table.soft_labels is not None:
        check_tensor("labels.soft_labels", table.soft_labels, "floating", "N Q", sizes)
    for name, rows in (("ids", table.ids), ("splits", table.splits)):
        if rows is not None and len(rows) != sizes["N"]:
            raise ValueError(
                f"Expected `labels.{name}` to name {sizes['N']} samples, but got {len(rows)}"
            )


def _table(labels: str | PathLike[str] | LabelTable, label_names: Sequence[str]) -> LabelTable:
    if isinstance(labels, LabelTable):
        _check_table(labels)
        columns = order(labels.label_names, label_names, "labels", "the table")
        soft = labels.soft_labels
        return labels._replace(
            labels=labels.labels[:, columns],
            label_names=tuple(label_names),
            soft_labels=None if soft is None else soft[:, columns],
        )
    if not fspath(labels).endswith(".pt"):
        return read_label_csv(labels, label_names)
    content = load_torch(labels)
    check_splits(content, labels)
    by_split, _ = tailor_labels(content, labels, label_names)
    return LabelTable(
        torch.cat([torch.from_numpy(each.labels) for each in by_split.values()]),
        tuple(label_names),
        splits=[split for split, each in by_split.items() for _ in range(len(each.labels))],
    )
