"""Reads the source pickle of M3ED, by utterances or whole dialogues: :func:`read_m3ed`."""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from uncertainty_mm._checks import check_choice
from uncertainty_mm.data._sequences import (
    Invalid,
    Labels,
    beyond,
    finish,
    make_dataset,
    need,
    plain_array,
    report_invalid,
    shown,
)
from uncertainty_mm.data.convert._restricted import load_pickle
from uncertainty_mm.data.convert.label_table import M3ED_LABELS
from uncertainty_mm.data.dataset import MultimodalDataset

Level = Literal["utterance", "dialogue"]

_UTTERANCES, _LABELS = 0, 2  # positions in the list of ten
_MODALITIES = {"text": 3, "audio": 4, "vision": 5}
_SPLITS = {"train": 7, "validation": 8, "test": 9}


def read_m3ed(
    path: str | PathLike[str], level: Level = "utterance", *, invalid: Invalid = "step"
) -> dict[str, MultimodalDataset]:
    """Reads the features of M3ED from their source, a pickled list of ten entries by dialogue.

    Args:
        path: The pickle. Code in it is refused, not run.
        level: `"utterance"`: a sample is an utterance, a sequence of one step with exactly one label.
            `"dialogue"`: a sample is a dialogue, a sequence of utterances with the labels of any of them, as in CARAT
            and LDDU, but not truncated, and with masked padding.
        invalid: For a value that is not finite, mask its `"step"` or set only the `"value"` to 0; see
            :func:`read_mmsa`.

    Returns:
        The splits `"train"`, `"validation"` and `"test"` with the modalities `text`, `audio` and `vision`, labels in
        the order of :data:`M3ED_LABELS`, and the ids of the utterances or dialogues. Warnings count values that are not
        finite. Features of only zeros are missing.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read, names code, or breaks the layout.
    """
    check_choice("level", level, get_args(Level))
    check_choice("invalid", invalid, get_args(Invalid))
    content = load_pickle(path)
    need(
        isinstance(content, list | tuple) and len(content) == 10,
        path,
        f"must hold a list of 10, got {type(content).__name__}"
        + (f" of {len(content)}" if hasattr(content, "__len__") else ""),
    )
    for position in (_UTTERANCES, _LABELS, *_MODALITIES.values()):
        got = type(content[position]).__name__
        need(isinstance(content[position], dict), path, f"[{position}] must be a dict, got {got}")
    dialogues: dict[str, list[str]] = {}
    for split, position in _SPLITS.items():
        names = content[position]
        need(
            isinstance(names, list | tuple)
            and len(names) > 0
            and all(isinstance(name, str) for name in names),
            path,
            f"[{position}] must list the dialogues of the {split} split, got {names!r:.80}",
        )
        dialogues[split] = list(names)
    labels = {name: _labels(content, name, path) for names in dialogues.values() for name in names}
    sizes: dict[str, int] = {}
    steps = max(map(len, labels.values()))
    parts = {}
    for split, names in dialogues.items():
        read = {}
        lengths = np.array([len(labels[name]) for name in names])
        for modality, position in _MODALITIES.items():
            rows = [
                _features(content[position], name, len(labels[name]), f"[{position}]", path)
                for name in names
            ]
            for name, row in zip(names, rows, strict=True):
                size = sizes.setdefault(modality, row.shape[1])
                need(
                    row.shape[1] == size,
                    path,
                    f"[{position}] of dialogue {name!r} has {row.shape[1]} features, others {size}",
                )
            values = np.concatenate(rows)
            if level == "utterance":
                values = values[:, None]
                mask = ~shown(values)
            else:
                mask = beyond(steps, lengths)
                padded = np.zeros((len(names), steps, size), np.float32)
                padded[~mask] = values
                values = padded
                mask = mask | ~shown(values).any(axis=1, keepdims=True)
            read[modality] = finish(values, mask, invalid)
            report_invalid(path, split, modality, read[modality])
        codes = np.concatenate([labels[name] for name in names])
        if level == "utterance":
            sample = np.arange(len(codes))
            ids = [str(each) for name in names for each in content[_UTTERANCES][name]]
        else:
            sample = np.repeat(np.arange(len(names)), lengths)
            ids = names
        multi_hot = np.zeros((len(ids), len(M3ED_LABELS)), np.uint8)
        multi_hot[sample, codes] = 1
        parts[split] = make_dataset(read, Labels(multi_hot), M3ED_LABELS, ids)
    return parts


def _labels(content: Any, dialogue: str, path: str | PathLike[str]) -> NDArray[Any]:
    """The label of every utterance of a dialogue, 0 to 6."""
    for position in (_UTTERANCES, _LABELS):
        need(dialogue in content[position], path, f"[{position}] lacks dialogue {dialogue!r}")
    codes = plain_array(content[_LABELS][dialogue])
    need(
        codes.ndim == 1 and len(codes) > 0 and codes.dtype.kind in "iu",
        path,
        f"[{_LABELS}] of dialogue {dialogue!r} must hold one integer an utterance, got {codes.dtype} {codes.shape}",
    )
    known = len(M3ED_LABELS)
    need(
        ((codes >= 0) & (codes < known)).all(),
        path,
        f"[{_LABELS}] of dialogue {dialogue!r} must be in [0, {known - 1}], got {codes.min()} to {codes.max()}",
    )
    utterances = len(content[_UTTERANCES][dialogue])
    need(
        utterances == len(codes),
        path,
        f"dialogue {dialogue!r} has {utterances} utterances, but {len(codes)} labels",
    )
    return codes


def _features(
    table: Any, dialogue: str, utterances: int, where: str, path: str | PathLike[str]
) -> NDArray[np.float32]:
    """Features (L, D) of a dialogue."""
    need(dialogue in table, path, f"{where} lacks dialogue {dialogue!r}")
    array = plain_array(table[dialogue])
    need(
        array.ndim == 2
        and array.shape[0] == utterances
        and array.dtype.kind in "fiu"
        and array.shape[1] > 0,
        path,
        f"{where} of dialogue {dialogue!r} must hold numbers of shape ({utterances}, D), "
        f"got {array.dtype} {array.shape}",
    )
    with np.errstate(over="ignore"):  # overflow gives infinity, which is left out
        return array.astype(np.float32)
