"""Reads the `.pt` files of TAILOR and CARAT, including CARAT's M3ED: :func:`read_tailor`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, get_args

from uncertainty_mm._checks import check_choice
from uncertainty_mm.data._sequences import (
    Invalid,
    Labels,
    Padding,
    Path,
    Split,
    assemble,
    check_splits,
    count_samples,
    integers,
    need,
)
from uncertainty_mm.data.convert._restricted import load_torch
from uncertainty_mm.data.convert.label_table import canonical, labels_of, order
from uncertainty_mm.data.dataset import MultimodalDataset

_SPECIAL = {"<blank>", "<unk>", "<s>", "</s>"}
_M3ED_AUDIO = (1024, 1582)  # wav2vec2-large, IS10
_M3ED_VISION = 342  # DenseFace


def read_tailor(
    path: str | PathLike[str],
    label_names: Sequence[str] | None = None,
    *,
    padding: Padding = "auto",
    invalid: Invalid = "step",
) -> dict[str, MultimodalDataset]:
    """Reads a `.pt` file of TAILOR or CARAT: `train_valid_test.pt` of CMU-MOSEI, or `m3ed_data_60.pt` of M3ED.

    The file holds, for every split, sequences `src-text`, `src-audio` and `src-visual`, and labels as lists of tokens
    `tgt` (`[2, code, ..., 3]`); `dict` has the meaning of the codes. Pickled code in it is refused, not run.

    CARAT's M3ED files have audio and vision exchanged, which their sizes reveal (vision has 342 features). They are
    exchanged back with a warning. These files truncate dialogues to 60 utterances, but have the labels of the whole
    dialogue; a warning counts the dialogues concerned.

    Args:
        path: The file.
        label_names: Labels in the desired order; None for the order of the file.
        padding: `"auto"`: lengths from the file (`len_list`), otherwise frames of zeros before and behind a sequence;
            `"zeros"`: always these frames; `"none"`: no padding, as in the released code. See :func:`read_mmsa`.
        invalid: For a value that is not finite, mask its `"step"` or set only the `"value"` to 0; see
            :func:`read_mmsa`.

    Returns:
        The splits `"train"`, `"validation"` and `"test"` with the modalities `text`, `audio` and `vision`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read, names code, or breaks the layout, or if its labels are not
            `label_names`.
    """
    check_choice("padding", padding, get_args(Padding))
    check_choice("invalid", invalid, get_args(Invalid))
    content = load_torch(path)
    splits = check_splits(content, path)
    labels, names = tailor_labels(content, splits, path, label_names)
    del content  # `assemble` frees what it has read
    _exchange_back(splits, path)
    parts = assemble(splits, path, labels, names, padding, invalid)
    for name, split in splits.items():
        if "len_list" in split.content:
            steps = max(parts[name].steps.values())
            where = f"{split.key}.len_list"
            lengths = integers(split.content["len_list"], len(parts[name]), path, where)
            cut = int((lengths > steps).sum())
            if cut:
                warnings.warn(
                    f"{path}: {cut} sequences of the {name} split were cut to {steps} steps, their labels were not",
                    stacklevel=2,
                )
    return parts


def tailor_labels(
    content: Mapping[str, Any],
    splits: Mapping[str, Split],
    path: Path,
    label_names: Sequence[str] | None,
) -> tuple[dict[str, Labels], list[str]]:
    """Reads the labels of every split from `tgt` and `dict`, and returns them with their names."""
    vocabulary = content.get("dict")
    vocabulary = vocabulary.get("tgt") if isinstance(vocabulary, dict) else None
    need(isinstance(vocabulary, dict), path, "missing `dict.tgt`, which says what the tokens mean")
    assert isinstance(vocabulary, dict)
    need(
        all(type(name) is str and type(code) is int for name, code in vocabulary.items()),
        path,
        f"`dict.tgt` must give every label a number, got {vocabulary}",
    )
    found = sorted((code, name) for name, code in vocabulary.items() if name not in _SPECIAL)
    need(found, path, f"`dict.tgt` names no label: {vocabulary}")
    file_names = [name for _, name in found]
    if label_names is None:
        label_names = [canonical(name) for name in file_names]
    columns = order(file_names, label_names, path, "`dict.tgt`")
    codes = {found[position][0]: column for column, position in enumerate(columns)}
    labels = {
        name: labels_of(split, count_samples(split, path), codes, columns, path)
        for name, split in splits.items()
    }
    return labels, list(label_names)


def _exchange_back(splits: Mapping[str, Split], path: Path) -> None:
    """Puts audio under `src-audio` and vision under `src-visual` if they are exchanged."""

    def size(key: str) -> int:
        rows = splits["train"].content.get(key, ())
        first = next(iter(rows), None) if hasattr(rows, "__iter__") else None
        return int((getattr(first, "shape", None) or (0,))[-1])

    if size("src-visual") not in _M3ED_AUDIO or size("src-audio") != _M3ED_VISION:
        return
    warnings.warn(
        f"{path}: `src-visual` holds audio ({size('src-visual')} features) and `src-audio` vision ({_M3ED_VISION}); "
        "they are exchanged back",
        stacklevel=3,
    )
    for _, part in splits.values():
        part["src-visual"], part["src-audio"] = part.get("src-audio"), part.get("src-visual")
