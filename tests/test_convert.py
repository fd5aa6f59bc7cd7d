"""Files generated in the layouts that people have, and every way in which they may be broken."""

import csv
import gzip
import pickle
import subprocess
import sys
import warnings
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from uncertainty_mm.data import read_folder, read_npz, write_npz
from uncertainty_mm.data.convert import (
    M3ED_LABELS,
    MOSEI_LABELS,
    LabelTable,
    read_label_csv,
    read_m3ed,
    read_mmsa,
    read_tailor,
)
from uncertainty_mm.data.convert.__main__ import main
from uncertainty_mm.data.convert.label_table import checked, join
from uncertainty_mm.data.convert.mmsa import read_table

COUNTS = {"train": 6, "valid": 3, "test": 4}
SPLITS = {"train": "train", "valid": "validation", "test": "test"}
DIMS = {"text": 768, "audio": 74, "vision": 35}


def padded(rng, lengths, steps, dim, front=False, dtype=np.float32):
    """Sequences of these lengths, zero-padded."""
    features = rng.normal(size=(len(lengths), steps, dim)).astype(dtype)
    valid = np.arange(steps) < np.asarray(lengths)[:, None]
    if front:
        valid = valid[:, ::-1]
    return features * valid[..., None]


def outside(lengths, steps, front=False):
    mask = np.arange(steps) >= np.asarray(lengths)[:, None]
    return torch.from_numpy((mask[:, ::-1] if front else mask).copy())


def token_lists(rng, count, labels=6):
    """Lists of tokens in random order, some empty, and the labels they mean."""
    chosen = rng.random((count, labels)) < 0.3
    chosen[0] = False
    tokens = [[2, *(rng.permutation(np.flatnonzero(row)) + 4).tolist(), 3] for row in chosen]
    return tokens, torch.from_numpy(chosen.astype(np.uint8))


def mmsa(seed=0, steps=(50, 500, 375), front=False, aligned=False):
    """The content of `aligned_50.pkl` or `unaligned_50.pkl`, and the lengths of its sequences."""
    rng = np.random.default_rng(seed)
    content, lengths = {}, {}
    if aligned:
        steps = (50, 50, 50)
    for split, count in COUNTS.items():
        held = [rng.integers(1, size + 1, count) for size in steps]
        if aligned:
            held = held[:1] * 3
        lengths[split] = dict(zip(DIMS, held, strict=True))
        text_bert = np.zeros((count, 3, 50), np.float32)
        text_bert[:, 0] = rng.integers(100, 30000, (count, 50))
        text_bert[:, 1] = np.arange(50) < held[0][:, None]
        part = {
            name: padded(rng, held[i], steps[i], dim, front)
            for i, (name, dim) in enumerate(DIMS.items())
        }
        part["text"] = rng.normal(
            size=(count, 50, 768)
        )  # BERT gives padding features, too; float64
        if not aligned:
            part["audio_lengths"] = held[1].tolist()
            part["vision_lengths"] = held[2][:, None].astype(np.float32)
        content[split] = part | {
            "text_bert": text_bert,
            "raw_text": np.array([f"text {i}" for i in range(count)], dtype=object),
            "annotations": ["Positive"] * count,
            "id": [f"{split}{i}$_${i % 2}" for i in range(count)],
            "regression_labels": rng.uniform(-3, 3, count),
            "classification_labels": rng.integers(0, 3, count),
        }
    return content, lengths


def with_tokens(content, seed=1):
    rng = np.random.default_rng(seed)
    labels = {}
    for split, part in content.items():
        part["tgt"], labels[split] = token_lists(rng, COUNTS[split])
    return content, labels


def dump(content, path, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def lddu(tmp_path, change=None):
    content, _ = with_tokens(mmsa(aligned=True)[0])
    if change is not None:
        change(content)
    return dump(content, tmp_path / "aligned_501.pkl")


# --- Pickles of MMSA and LDDU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_unaligned_values_masks_and_labels(tmp_path, protocol):
    content, lengths = mmsa()
    content, labels = with_tokens(content)
    parts = read_mmsa(dump(content, tmp_path / "no_align_501.pkl", protocol))
    assert list(parts) == ["train", "validation", "test"]
    for key, split in SPLITS.items():
        data = parts[split]
        assert data.dims == DIMS
        assert data.steps == {"text": 50, "audio": 500, "vision": 375}
        assert data.label_names == list(MOSEI_LABELS)
        assert data.ids == content[key]["id"]
        assert data.soft_labels is None
        assert torch.equal(data.labels, labels[key])
        for name in DIMS:
            mask = outside(lengths[key][name], data.steps[name])
            assert torch.equal(data.padding_mask[name], mask)
            expected = torch.from_numpy(content[key][name]).float().masked_fill(mask[..., None], 0)
            assert torch.equal(data.features[name], expected)


@pytest.mark.parametrize("front", [False, True])
def test_aligned_masks_come_from_the_tokens_on_the_side_of_the_padding(tmp_path, front):
    content, lengths = mmsa(aligned=True, front=front)
    path = dump(with_tokens(content)[0], tmp_path / "aligned_501.pkl")
    parts = read_mmsa(path)
    for key, split in SPLITS.items():
        for name in ("audio", "vision"):
            mask = outside(lengths[key][name], 50, front)
            assert torch.equal(parts[split].padding_mask[name], mask)
    # a zero frame within a sequence is not padding; the frames at its edges tell no length that tokens do
    content["train"]["audio"][2, : lengths["train"]["audio"][2]] = 0
    content["train"]["audio"][2, 0 if not front else -1] = 1
    parts = read_mmsa(dump(content, path))
    mask = outside(lengths["train"]["audio"], 50, front)
    assert torch.equal(parts["train"].padding_mask["audio"], mask)


@pytest.mark.parametrize("front", [False, True])
def test_without_lengths_frames_of_zeros_at_the_edges_are_padding(tmp_path, front):
    content, lengths = mmsa(front=front)
    for part in content.values():
        for key in ("audio_lengths", "vision_lengths", "text_bert"):
            del part[key]
    content["train"]["audio"][0] = np.random.default_rng(0).normal(size=(500, 74))
    content["train"]["audio"][0, 3:7] = 0  # within the sequence
    lengths["train"]["audio"][0] = 500
    path = dump(with_tokens(content)[0], tmp_path / "data.pkl")
    for padding in ("auto", "zeros"):
        parts = read_mmsa(path, padding=padding)
        for key, split in SPLITS.items():
            for name in ("audio", "vision"):
                mask = outside(lengths[key][name], parts[split].steps[name], front)
                assert torch.equal(parts[split].padding_mask[name], mask)
    everything = read_mmsa(path, padding="none")["train"].padding_mask
    assert not any(mask.any() for mask in everything.values())


def test_a_mask_with_gaps_is_taken_as_it_is(tmp_path):
    content, _ = mmsa(aligned=True)
    part = content["train"]
    part["audio"] = np.ones_like(part["audio"])
    part["text_bert"][:, 1, 3] = 0
    part["text_bert"][:, 1, 10:20] = 1
    data = read_mmsa(dump(with_tokens(content)[0], tmp_path / "data.pkl"))["train"]
    expected = torch.from_numpy(part["text_bert"][:, 1] == 0)
    assert torch.equal(data.padding_mask["text"], expected)
    assert torch.equal(data.padding_mask["audio"], expected)


def test_the_side_of_the_padding_is_found_for_given_lengths(tmp_path):
    content, lengths = mmsa(front=True)
    path = dump(with_tokens(content)[0], tmp_path / "data.pkl")
    mask = outside(lengths["test"]["audio"], 500, front=True)
    assert torch.equal(read_mmsa(path)["test"].padding_mask["audio"], mask)


def test_frames_beyond_the_lengths_are_reported(tmp_path):
    content, lengths = mmsa()
    content["train"]["audio_lengths"] = [length - 1 for length in lengths["train"]["audio"]]
    content["train"]["audio"][:, 0] = 1
    content["train"]["audio"][lengths["train"]["audio"] == 500] = 1
    path = dump(with_tokens(content)[0], tmp_path / "data.pkl")
    with pytest.warns(UserWarning, match=r"6 steps of `train\.audio` beyond the lengths"):
        read_mmsa(path)


def test_values_that_are_not_finite_and_missing_modalities(tmp_path):
    content, lengths = mmsa()
    lengths = lengths["train"]["audio"]
    content["train"]["audio_lengths"][3] = lengths[3] = 400
    content["train"]["audio"][3] = padded(np.random.default_rng(0), [400], 500, 74)[0]
    content["train"]["audio"][3, [5, 9], 1] = -np.inf
    content["train"]["audio"][3, 9, 2] = np.nan
    content["train"]["audio"][1] = 0
    path = dump(with_tokens(content)[0], tmp_path / "data.pkl")
    with pytest.warns(UserWarning, match="2 steps of `audio` in 1 samples of the train split"):
        data = read_mmsa(path)["train"]
    mask = outside(lengths, 500)
    mask[3, [5, 9]] = True
    mask[1] = True
    assert torch.equal(data.padding_mask["audio"], mask)
    assert data.features["audio"].isfinite().all()
    assert not data.features["audio"][mask].any()
    audio = data.summary().modalities["audio"]
    assert (audio.missing, audio.invalid_steps) == (1, 2)


def test_lists_of_sequences_of_different_lengths(tmp_path):
    content, _ = with_tokens(mmsa(aligned=True)[0])
    rng = np.random.default_rng(0)
    for key, part in content.items():
        part["audio"] = [rng.normal(size=(2 + i, 74)) for i in range(COUNTS[key])]
    data = read_mmsa(dump(content, tmp_path / "data.pkl"))["train"]
    assert torch.equal(data.padding_mask["audio"], outside(range(2, 8), 7))
    expected = torch.from_numpy(content["train"]["audio"][1]).float()
    assert torch.equal(data.features["audio"][1, :3], expected)


def test_mult_layout(tmp_path):
    rng = np.random.default_rng(0)
    content = {
        split: {
            "text": rng.normal(size=(count, 50, 300)),
            "audio": padded(rng, [400] * count, 500, 74, front=True),
            "vision": padded(rng, [300] * count, 500, 35, front=True),
            "labels": rng.normal(size=(count, 1, 1)),
            "id": np.array([[f"{split}{i}".encode(), b"1.0", b"2.5"] for i in range(count)]),
        }
        for split, count in COUNTS.items()
    }
    tokens = {split: token_lists(rng, count) for split, count in COUNTS.items()}
    path = dump(content, tmp_path / "mosei_senti_data_noalign.pkl")
    labels = tailor(tokens={split: each[0] for split, each in tokens.items()})
    torch.save(labels, tmp_path / "train_valid_test.pt")
    parts = read_mmsa(path, tmp_path / "train_valid_test.pt")
    assert parts["test"].ids[1] == "test1$_$1.0$_$2.5"
    for key, split in SPLITS.items():
        assert torch.equal(parts[split].labels, tokens[key][1])
        mask = outside([400] * COUNTS[key], 500, front=True)
        assert torch.equal(parts[split].padding_mask["audio"], mask)


def broken(split, key, change):
    def apply(content):
        content[split][key] = change(content[split][key])

    return apply


def without(split, *keys):
    def apply(content):
        for key in keys:
            del content[split][key]

    return apply


class Evil:
    """Would run a command when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("valid"), r"missing split `valid`, found \['test', 'train'\]"),
        (lambda c: c.update(valid=[1]), "split `valid` must be a dict, got list"),
        (without("train", "text", "audio", "vision"), "no modality in split `train`"),
        (lambda c: c.update(train={1: 0, "x": 0}), "no modality in split `train`"),
        (without("test", "audio"), "modality `audio` is missing in split `test`"),
        (without("train", "audio"), r"`valid\.audio` has features of size 74.* none"),
        (without("test", "tgt"), r"no emotions: missing `test\.tgt`"),
        (broken("train", "audio", lambda x: x[1:]), r"`train\.audio` has 5 samples, other modalities 6"),
        (broken("train", "audio", lambda x: x[:, 0]), r"`train\.audio` must hold numbers of shape \(N, S, D\)"),
        (broken("train", "audio", lambda x: x[:, :0]), r"`train\.audio` must hold numbers .* \(6, 0, 74\)"),
        (broken("train", "audio", lambda x: x.astype(str)), r"`train\.audio` must hold numbers"),
        (broken("train", "audio", lambda x: None), r"`train\.audio` must hold one sequence a sample"),
        (broken("train", "audio", lambda x: [*x[:5], None]), r"`train\.audio` of sample 5 must be numbers"),
        (broken("train", "audio", lambda x: [*x[:5], x[5][:, 1:]]), r"sample 5 .*\(S, 74\), got .*\(50, 73\)"),
        (broken("test", "audio", lambda x: x[..., :20]), r"`test\.audio` has features of size 20, .* 74"),
        (broken("train", "text", lambda x: 3), r"`train\.text` holds no samples"),
        (broken("train", "text_bert", lambda x: x[:, :2]), r"`train\.text_bert` must have shape \(6, 3, S\)"),
        (broken("train", "text_bert", lambda x: x + 7), r"`train\.text_bert\[:, 1\]` must be a mask"),
        (broken("train", "id", lambda x: x[1:]), r"`train\.id` must name 6 samples, got 5"),
        (broken("train", "tgt", lambda x: x[1:]), r"`train\.tgt` has 5 samples, the features 6"),
        (broken("train", "tgt", put(2, [2, 10, 3])), r"`train\.tgt` of sample 2 holds the token 10"),
        (broken("train", "tgt", put(2, [2, 4])), r"`train\.tgt` of sample 2 must be .* got \[2, 4\]"),
        (broken("train", "tgt", put(2, [])), r"`train\.tgt` of sample 2 must be tokens"),
        (broken("train", "tgt", put(2, None)), r"`train\.tgt` of sample 2 must be tokens"),
        (broken("train", "tgt", put(2, [2, 4.5, 3])), r"`train\.tgt` of sample 2 must be tokens"),
        (broken("train", "tgt", lambda x: 1), r"`train\.tgt` must be lists"),
        (broken("train", "tgt", lambda x: Evil()), r"refused, because it names `builtins\.exec`"),
        (lambda c: c["train"].update(audio_lengths=[-1] * 6), r"`train\.audio_lengths` must be at least 0, got -1"),
        (lambda c: c["train"].update(audio_lengths=[5] * 7), r"`train\.audio_lengths` must hold 6 integers"),
        (lambda c: c["train"].update(audio_lengths=[5.5] * 6), r"`train\.audio_lengths` must hold 6 integers"),
        (lambda c: c["train"].update(audio_lengths=[np.inf] * 6), r"`train\.audio_lengths` must hold 6 integers"),
        (lambda c: c.update(dev=c["valid"]), r"several splits for validation: \['valid', 'dev'\]"),
        (lambda c: c["train"].update(audio_lengths=None), r"`train\.audio_lengths` must hold 6 integers"),
    ],
)  # fmt: skip
def test_broken_pickles_are_refused_with_file_and_key(tmp_path, change, message):
    path = lddu(tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        read_mmsa(path)
    assert str(error.value).startswith(f"{path}: ")


def test_other_content_and_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"data\.pkl: must hold a dict, got list"):
        read_mmsa(dump([1], tmp_path / "data.pkl"))
    with pytest.raises(ValueError, match="Expected `padding` to be one of"):
        read_mmsa(tmp_path / "data.pkl", padding="left")
    with pytest.raises(ValueError, match="Expected `join_by` to be one of"):
        read_mmsa(tmp_path / "data.pkl", join_by="name")
    with pytest.raises(FileNotFoundError):
        read_mmsa(tmp_path / "none.pkl")


# --- What the field repairs -------------------------------------------------------------------------------------------


def messages(call):
    """The result of a call, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(each.message) for each in caught]


def equal_parts(parts, expected):
    for split, data in expected.items():
        assert torch.equal(parts[split].labels, data.labels)
        for name in data.dims:
            assert torch.equal(parts[split].features[name], data.features[name])
            assert torch.equal(parts[split].padding_mask[name], data.padding_mask[name])


def transposed(array):
    """Equal, with its axes in another order in memory, which NumPy 2.3 and later write as `K`."""
    return np.ascontiguousarray(array.transpose(1, 0, 2)).transpose(1, 0, 2)


def as_tensors(part):
    return {
        key: torch.nn.Parameter(torch.tensor(value)) if key == "vision" else torch.tensor(value)
        for key, value in part.items()
        if key in DIMS or key.endswith("_lengths")
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda part: {key: transposed(part[key]) for key in DIMS},
        lambda part: {key: np.asfortranarray(part[key]) for key in DIMS},
        as_tensors,
        lambda part: {key: list(map(torch.tensor, part[key])) for key in DIMS},
        lambda part: {"counts": Counter("ab"), "index": defaultdict(list), "names": {"a", "b"}},
    ],
    ids=["transposed", "fortran", "tensors", "lists of tensors", "containers"],
)
def test_however_it_is_pickled(tmp_path, change):
    content, _ = with_tokens(mmsa()[0])
    expected = read_mmsa(dump(content, tmp_path / "data.pkl"))
    for protocol in (2, 5):
        other = {split: part | change(part) for split, part in content.items()}
        equal_parts(read_mmsa(dump(other, tmp_path / "data.pkl", protocol)), expected)


@pytest.mark.parametrize("validation", ["dev", "val", "validation", "Valid"])
def test_splits_by_another_name_in_any_dict(tmp_path, validation):
    content, _ = with_tokens(mmsa(aligned=True)[0])
    expected = read_mmsa(dump(content, tmp_path / "data.pkl"))
    other = defaultdict(dict, {"train": OrderedDict(content["train"]), "test": content["test"]})
    other[validation] = defaultdict(list, content["valid"])
    equal_parts(read_mmsa(dump(other, tmp_path / "data.pkl")), expected)
    other[validation]["audio"] = None
    with pytest.raises(ValueError, match=rf"`{validation}\.audio` must hold one sequence"):
        read_mmsa(dump(other, tmp_path / "data.pkl"))


def test_bfloat16_is_read(tmp_path):
    content, _ = with_tokens(mmsa(aligned=True)[0])
    for part in content.values():
        part["audio"] = torch.tensor(part["audio"]).bfloat16()
    audio = read_mmsa(dump(content, tmp_path / "data.pkl"))["train"].features["audio"]
    assert torch.equal(audio, content["train"]["audio"].float())
    content = tailor()
    content["test"]["src-audio"] = content["test"]["src-audio"].bfloat16()
    content["test"]["src-visual"] = [
        torch.from_numpy(row).bfloat16() for row in content["test"]["src-visual"]
    ]
    features = read_tailor(save(content, tmp_path / "data.pt"))["test"].features
    assert torch.equal(features["audio"], content["test"]["src-audio"].float())
    assert torch.equal(features["vision"], torch.stack(content["test"]["src-visual"]).float())


@pytest.mark.parametrize("value", [torch.eye(3).to_sparse(), None, 3, "text"])
def test_features_that_are_no_plain_numbers(tmp_path, value):
    content = tailor()
    content["test"]["src-audio"] = value
    with pytest.raises(ValueError, match=r"data\.pt: `test\.src-audio`"):
        read_tailor(save(content, tmp_path / "data.pt"))


def test_lengths_from_before_the_sequences_were_cut(tmp_path):
    content, lengths = mmsa(steps=(50, 23, 375))
    content["train"]["audio"] = padded(np.random.default_rng(0), [23] * 6, 23, 74)
    content["train"]["audio_lengths"] = [5, 29, 24, 23, 7, 300]
    content["train"]["audio"][[0, 4]] *= outside([5, 7], 23).logical_not().numpy()[..., None]
    path = dump(with_tokens(content)[0], tmp_path / "data.pkl")
    parts, told = messages(lambda: read_mmsa(path))
    assert told == [
        f"{path}: 3 of `train.audio_lengths` are above the 23 steps of the file (up to 300), "
        "from before the sequences were cut; they are taken as 23"
    ]
    expected = outside([5, 23, 23, 23, 7, 23], 23)
    assert torch.equal(parts["train"].padding_mask["audio"], expected)
    expected = outside(lengths["test"]["audio"], 23)
    assert torch.equal(parts["test"].padding_mask["audio"], expected)


# --- Emotions in an array ---------------------------------------------------------------------------------------------

IEMOCAP = ("neutral", "happy", "sad", "angry")


def with_arrays(make, seed=3):
    """The content of a pickle whose emotions are `make` of intensities (N, 6), and these."""
    rng = np.random.default_rng(seed)
    content, _ = mmsa(aligned=True)
    values = {}
    for key, count in COUNTS.items():
        values[key] = rng.integers(0, 10, (count, 6)).clip(6) / 3 - 2
        content[key]["labels"] = make(values[key])
    return content, values


def with_sentiment(values):
    return np.concatenate([np.linspace(-3, 3, len(values))[:, None], values], 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda values: with_sentiment(values)[:, None],  # (N, 1, 7), as the SDK writes it
        with_sentiment,
        lambda values: values[:, None].tolist(),
        lambda values: torch.tensor(values[..., None]),
    ],
)
def test_intensities_beside_the_features(tmp_path, make):
    content, values = with_arrays(make)
    path = dump(content, tmp_path / "data.pkl")
    names = MOSEI_LABELS[::-1]  # matched by name
    for each, columns in ((MOSEI_LABELS, slice(None)), (names, slice(None, None, -1))):
        for key, split in SPLITS.items():
            data = read_mmsa(path, label_names=each)[split]
            expected = torch.from_numpy(values[key][:, columns].copy())
            assert torch.equal(data.soft_labels, expected.float())
            assert torch.equal(data.labels, (expected > 0).byte())


def test_pairs_of_absent_and_present(tmp_path):
    content, values = with_arrays(lambda values: np.eye(2)[(values[:, :4] > 0).astype(int)])
    assert content["train"]["labels"].shape == (6, 4, 2)
    data = read_mmsa(dump(content, tmp_path / "data.pkl"), label_names=IEMOCAP)["train"]
    assert data.label_names == list(IEMOCAP)
    assert data.soft_labels is None
    assert torch.equal(data.labels, torch.from_numpy(values["train"][:, :4] > 0).byte())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((6, 1, 1)), r"no emotions: `train\.labels` has float64 \(6, 1, 1\), but 6 labels need \(N, 6\)"),
        (np.zeros((6, 4, 2)), r"no emotions: `train\.labels` has float64 \(6, 4, 2\)"),
        (np.zeros((6, 2, 3)), r"no emotions: `train\.labels` has float64 \(6, 2, 3\)"),
        (np.full((6, 6), "x"), r"no emotions: `train\.labels` has <U1 \(6, 6\)"),
        (None, r"no emotions: `train\.labels` has object \(\)"),
        (np.zeros((6, 6, 2)), r"`train\.labels` must be pairs \[absent, present\]"),
        (np.zeros((5, 7)), r"`train\.labels` has 5 samples, the features 6"),
        (np.full((6, 7), -1), r"`train\.labels` of sample 0 must be .*, or NaN where the label is unknown, got -1"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_told_by_their_shape(tmp_path, labels, message):
    content, _ = with_arrays(with_sentiment)
    content["train"]["labels"] = labels
    with pytest.raises(ValueError, match=message):
        read_mmsa(dump(content, tmp_path / "data.pkl"))


# --- Values that are not finite ---------------------------------------------------------------------------------------


def with_infinite(tmp_path, where):
    """A pickle whose audio is -inf where `where` of its array is."""
    content, lengths = mmsa()
    with_tokens(content)
    for key in COUNTS:
        content[key]["audio_lengths"] = lengths[key]["audio"] = np.full(COUNTS[key], 500)
        content[key]["audio"] = np.random.default_rng(0).normal(size=(COUNTS[key], 500, 74))
        where(content[key]["audio"])
    return content, dump(content, tmp_path / "data.pkl")


def scattered(array, share=0.01):
    array[np.random.default_rng(1).random(array.shape) < share] = -np.inf


def test_a_value_need_not_cost_its_step(tmp_path):
    content, path = with_infinite(tmp_path, scattered)
    parts, told = messages(lambda: read_mmsa(path))
    audio = content["train"]["audio"]
    masked = parts["train"].padding_mask["audio"]
    assert torch.equal(masked, torch.from_numpy(~np.isfinite(audio).all(2)))
    assert 0.5 < masked.double().mean() < 0.55  # 1 - 0.99^74
    parts, told = messages(lambda: read_mmsa(path, invalid="value"))
    assert not parts["train"].padding_mask["audio"].any()
    expected = torch.from_numpy(np.where(np.isfinite(audio), audio, 0)).float()
    assert torch.equal(parts["train"].features["audio"], expected)
    assert parts["train"].invalid_steps["audio"] == 0
    count = int((~np.isfinite(audio)).sum())
    assert told[0] == (
        f"{path}: {count} values of `audio` of the train split are not finite and are taken as 0"
    )
    assert len(told) == 3
    with pytest.raises(ValueError, match="Expected `invalid` to be one of"):
        read_mmsa(path, invalid="row")


def bad_columns(array, columns=(3, 70)):
    array[..., list(columns)] = np.nan


@pytest.mark.parametrize("invalid", ["step", "value"])
def test_a_modality_that_is_gone_is_told_with_its_columns(tmp_path, invalid):
    content, path = with_infinite(tmp_path, bad_columns)
    parts, told = messages(lambda: read_mmsa(path, invalid=invalid))
    assert [len(told), sum("never finite: column 3, 70" in each for each in told)] == (
        [6, 3] if invalid == "step" else [3, 3]
    )
    audio = parts["test"].features["audio"]
    if invalid == "step":
        assert parts["test"].summary().modalities["audio"].missing == 4
        assert told[5] == (
            f"{path}: no step of `audio` of the test split is left, it is missing in all samples; "
            'never finite: column 3, 70; `invalid="value"` keeps the other values'
        )
    else:
        assert not audio[..., [3, 70]].any()
        kept = [column for column in range(74) if column not in (3, 70)]
        expected = torch.from_numpy(content["test"]["audio"][..., kept]).float()
        assert torch.equal(audio[..., kept], expected)


def test_a_modality_that_is_gone_in_one_split_or_without_a_bad_column(tmp_path):
    def one_of_every_step(array):
        array[:, np.arange(500), np.arange(500) % 74] = np.inf

    _, path = with_infinite(tmp_path, one_of_every_step)
    _, told = messages(lambda: read_mmsa(path))
    assert sum("is left, it is missing in all samples; `invalid=" in each for each in told) == 3
    _, path = with_infinite(tmp_path, lambda x: bad_columns(x) if len(x) == 3 else None)
    _, told = messages(lambda: read_mmsa(path))
    assert ["validation split is left" in each for each in told] == [False, True]


def test_the_other_readers_have_the_choice_too(tmp_path):
    content = tailor()
    content["train"]["src-visual"][0] = np.ones((60, 35))
    content["train"]["src-visual"][0][5, 2] = np.nan
    path = save(content, tmp_path / "a.pt")
    parts, told = messages(lambda: read_tailor(path, invalid="value"))
    assert not parts["train"].padding_mask["vision"][0].any()
    assert parts["train"].features["vision"][0, 5].tolist() == [1, 1, 0] + [1] * 32
    assert ["1 values of `vision`" in each for each in told] == [True]
    content = m3ed()
    for name in content[7]:
        content[4][name][:, 9] = -np.inf
    path = dump(content, tmp_path / "m3ed.pkl")
    for level in ("utterance", "dialogue"):
        _, told = messages(lambda level=level: read_m3ed(path, level))
        assert ["never finite: column 9;" in each for each in told] == [False, True]
        parts, _ = messages(lambda level=level: read_m3ed(path, level, invalid="value"))
        assert parts["train"].features["audio"].isfinite().all()
        assert parts["train"].features["audio"].any()
    for read in (read_tailor, read_m3ed):
        with pytest.raises(ValueError, match="Expected `invalid` to be one of"):
            read(path, invalid="steps")


# --- Tables of labels -------------------------------------------------------------------------------------------------


def write_csv(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def intensities(content, seed=2):
    """Intensities of all samples, and a row `[video, clip, mode, happiness, ...]` for each, shuffled."""
    rng = np.random.default_rng(seed)
    values = {key: rng.integers(0, 10, (count, 6)).clip(6) / 3 - 2 for key, count in COUNTS.items()}
    rows = [
        [*name.split("$_$"), key, *map(repr, values[key][i].tolist())]
        for key in content
        for i, name in enumerate(content[key]["id"])
    ]
    return values, [rows[i] for i in rng.permutation(len(rows))]


def test_emotions_are_joined_by_id_and_by_name(tmp_path):
    content, _ = mmsa()
    values, rows = intensities(content)
    # the columns in another order and spelling, more rows than samples, and other columns
    names = ["Anger", "disgust", "fear", "happiness", "sadness", "surprise"]
    order = [
        MOSEI_LABELS.index(n) for n in ("anger", "disgust", "fear", "happy", "sad", "surprise")
    ]
    rows = [[*row[:3], *(row[3 + column] for column in order), "x"] for row in rows]
    rows.insert(4, ["other", "1", "test", *["0"] * 6, "x"])
    header = ["video_id", "clip_id", "mode", *names, "sentiment"]
    table = write_csv(tmp_path / "label.csv", header, rows)
    path = dump(content, tmp_path / "unaligned_50.pkl")
    for labels in (table, str(table), read_label_csv(table)):
        parts = read_mmsa(path, labels)
        for key, split in SPLITS.items():
            expected = torch.from_numpy(values[key])
            assert torch.equal(parts[split].soft_labels, expected.float())
            assert torch.equal(parts[split].labels, (expected > 0).byte())
    # another order is asked for: columns follow, names too
    parts = read_mmsa(path, table, MOSEI_LABELS[::-1])
    assert parts["train"].label_names == list(MOSEI_LABELS[::-1])
    assert torch.equal(
        parts["train"].soft_labels.flip(1), torch.from_numpy(values["train"]).float()
    )
    parts = read_mmsa(path, read_label_csv(table), MOSEI_LABELS[::-1])
    assert torch.equal(
        parts["train"].soft_labels.flip(1), torch.from_numpy(values["train"]).float()
    )


@pytest.mark.parametrize("splits", [True, False])
def test_token_lists_are_joined_by_order(tmp_path, splits):
    content, _ = mmsa()
    rng = np.random.default_rng(0)
    tokens = {key: token_lists(rng, count) for key, count in COUNTS.items()}
    order = ["test", "train", "valid"] if splits else list(COUNTS)
    rows = [[key, str(each)] for key in order for each in tokens[key][0]]
    header = ["mode" if splits else "comment", "tgt"]
    table = write_csv(tmp_path / "mmsa.csv", header, rows)
    parts = read_mmsa(dump(content, tmp_path / "unaligned_50.pkl"), table)
    for key, split in SPLITS.items():
        assert torch.equal(parts[split].labels, tokens[key][1])
        assert parts[split].soft_labels is None


def test_labels_of_0_and_1_are_no_soft_labels(tmp_path):
    table = read_label_csv(write_csv(tmp_path / "a.csv", ["a", "b"], [["1", "0"]]), ["b", "a"])
    assert table.soft_labels is None
    assert table.labels.tolist() == [[0, 1]]


def test_intensities_above_3_are_3(tmp_path):
    rows = [["3.333", "0"], ["4.333", "3"], ["1", "2.667"]]
    path = write_csv(tmp_path / "a.csv", ["happy", "sad"], rows)
    table, told = messages(lambda: read_label_csv(path, ["happy", "sad"]))
    assert told == [f"{path}: 2 intensities are above 3 (up to 4.333); they are taken as 3"]
    assert table.labels.tolist() == [[1, 0], [1, 1], [1, 1]]
    expected = torch.tensor([[3, 0], [3, 3], [1, 2.667]])
    assert torch.equal(table.soft_labels, expected)


def test_labels_that_are_not_known(tmp_path):
    rows = [["1", "nan"], ["", "0"], ["0", "1"], ["NaN", " nan "]]
    path = write_csv(tmp_path / "a.csv", ["happy", "sad"], rows)
    table = read_label_csv(path, ["sad", "happy"])
    assert table.labels.tolist() == [[0, 1], [0, 0], [1, 0], [0, 0]]
    assert table.unknown.tolist() == [[True, False], [False, True], [False, False], [True, True]]
    assert table.soft_labels is None  # nothing but 0 and 1 is known
    rows = [["[2, 4, 3]"], ["nan"], [" "], ["[2, 3]"]]
    table = read_label_csv(write_csv(tmp_path / "a.csv", ["tgt"], rows), ["happy", "sad"])
    assert table.labels.tolist() == [[1, 0], [0, 0], [0, 0], [0, 0]]
    assert table.unknown.tolist() == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]
    known = read_label_csv(write_csv(tmp_path / "a.csv", ["happy"], [["1"]]), ["happy"])
    assert known.unknown is None


def test_nan_in_a_table_of_ones_own():
    nan = float("nan")
    labels = torch.tensor([[1, nan, 0], [0, 1, 1]])
    soft_labels = torch.tensor([[2, nan, 0], [nan, 1, 0.5]])
    unknown = torch.tensor([[False, False, True], [False, False, False]])
    table = LabelTable(labels, ("a", "b", "c"), soft_labels, unknown=unknown)
    found = checked(table, ("c", "b", "a"))
    assert found.labels.tolist() == [[0, 0, 1], [1, 1, 0]]
    assert found.soft_labels.tolist() == [[0, 0, 2], [0.5, 1, 0]]
    assert found.unknown.tolist() == [[True, True, False], [False, False, True]]
    assert checked(LabelTable(labels[1:], ("a", "b", "c")), ("a", "b", "c")).unknown is None


@pytest.mark.parametrize("key", ["labels", "tgt"])
def test_labels_that_are_not_known_in_a_file_of_torch(tmp_path, key):
    content = tailor()
    expected = torch.zeros(13, 6).bool()
    if key == "tgt":
        content["train"]["tgt"][1] = float("nan")
        expected[1] = True
    else:
        for part in content.values():
            part.pop("tgt", None)
        content["dict"] = {"tgt": TAILOR_TOKENS}
        for split, count in COUNTS.items():
            content[split]["labels"] = torch.zeros(count, 6)
        content["train"]["labels"][1, 2] = float("nan")
        expected[1, 2] = True
    table = read_table(save(content, tmp_path / "labels.pt"), MOSEI_LABELS)
    assert torch.equal(table.unknown, expected)
    assert not table.labels[expected].any()
    # every split gets its rows
    counts = {SPLITS[key]: count for key, count in COUNTS.items()}
    parts = join(table, dict.fromkeys(counts), counts, tmp_path, "auto")
    unknown = np.concatenate([parts[split].unknown for split in parts])
    assert torch.equal(torch.from_numpy(unknown), expected)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (LabelTable(torch.full((2, 1), 2), ("a",)), "`labels.labels` to hold only 0 and 1, but got 2"),
        (LabelTable(torch.full((2, 1), -1), ("a",)), "or NaN where a label is unknown, but got -1"),
        (LabelTable(torch.zeros(2, 1), ("a",), ids=["x"]), "`labels.ids` to name 2 samples, but got 1"),
        (LabelTable(torch.zeros(2, 1), ("a",), splits=["test"]), "`labels.splits` to name 2 samples, but got 1"),
        (LabelTable(torch.zeros(2, 1), ("a",), torch.zeros(2, 2)), r"`labels.soft_labels` to have shape \(N=2, Q=1\)"),
        (LabelTable(torch.zeros(2, 1), ("a",), unknown=torch.zeros(1, 1).bool()), "`labels.unknown` to have shape"),
        (LabelTable(torch.zeros(2, 1), ("b",)), r"the table names the labels \['b'\], expected \['a'\]"),
    ],
)  # fmt: skip
def test_tables_of_ones_own_that_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        checked(table, ("a",))


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (["happy"], ["1"], r"no column for the labels \['sad'\], and none of tokens `tgt`"),
        (["happy", "sad"], ["1", "x"], r"`sad` of row 0 must be a number of at least 0, or NaN .*, got 'x'"),
        (["happy", "sad"], ["1", "-1"], r"`sad` of row 0 .* or NaN where the label is unknown, got -1"),
        (["happy", "sad"], ["inf", "1"], r"`happy` of row 0 must be a number .*, got inf"),
        (["happy", "sad", "Sadness"], ["1", "1", "1"], r"several columns for the label `sad`: \['sad', 'sadness'\]"),
        (["happy", "sad"], ["1"], r"row 0 has 1 fields, the header 2"),
        (["happy", "sad", "mode"], ["1", "1", "dev2"], r"`mode` of row 0 must be train, valid or test, got 'dev2'"),
        (["tgt"], ["[2, 6, 3]"], r"`tgt` of sample 0 holds the token 6, the labels are \[4, 5\]"),
        (["tgt"], ["print()"], r"`tgt` of row 0 must be a list of tokens, got 'print\(\)'"),
        (["tgt"], ["4"], r"`tgt` of sample 0 must be tokens"),
        (["tgt"], ["[" * 100_000], r"`tgt` of row 0 must be a list of tokens"),
        (["tgt"], [f"[2, {'9' * 5000}, 3]"], r"`tgt` of row 0 must be a list of tokens"),
    ],
)  # fmt: skip
def test_broken_tables_are_refused(tmp_path, header, row, message):
    path = write_csv(tmp_path / "labels.csv", header, [row])
    with pytest.raises(ValueError, match=message) as error:
        read_label_csv(path, ["happy", "sad"])
    assert str(error.value).startswith(f"{path}: ")


def test_empty_and_unreadable_tables(tmp_path):
    path = tmp_path / "labels.csv"
    for content, message in (
        (b"", "no row"),
        (b"happy,sad\n", "no row"),
        (b"\xff\xfe\x00", "not a readable"),
        (gzip.compress(b"happy,sad\n"), r"not a readable \.csv file \(it is a gzip file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_label_csv(path)


def test_labels_that_do_not_fit_the_samples_are_refused(tmp_path):
    content, _ = mmsa()
    path = dump(content, tmp_path / "unaligned_50.pkl")
    _, rows = intensities(content)
    header = ["video_id", "clip_id", "mode", *MOSEI_LABELS]

    def refused(message, header=header, rows=rows, **options):
        table = write_csv(tmp_path / "labels.csv", header, rows)
        with pytest.raises(ValueError, match=message) as error:
            read_mmsa(path, table, **options)
        assert str(error.value).startswith(f"{path}: ")

    name = rows[0][0] + r"\$_\$" + rows[0][1]
    refused(
        rf"1 of \d samples of the \w+ split have no labels, such as \['{name}'\]", rows=rows[1:]
    )
    refused("names sample .* twice", rows=[rows[0], *rows])
    refused(r"samples in the \w+ split, \d+ rows of labels", ["x", "y", *header[2:]], rows[1:])
    refused("13 samples, 14 rows", ["x", "y", "z", *header[3:]], [rows[0], *rows])
    refused("13 samples, 12 rows", ["x", "y", "z", *header[3:]], rows[1:])
    refused("cannot be joined by id", ["x", "y", *header[2:]], join_by="id")
    with pytest.raises(ValueError, match=r"labels: the table names the labels \['a'\], expected"):
        read_mmsa(path, LabelTable(torch.zeros(13, 1), ("a",)))


# --- TAILOR and CARAT -------------------------------------------------------------------------------------------------

TAILOR_TOKENS = {"<blank>": 0, "<unk>": 1, "<s>": 2, "</s>": 3} | {
    name: 4 + code for code, name in enumerate(MOSEI_LABELS)
}


def tailor(seed=0, front=False, tokens=None):
    """The content of `train_valid_test.pt`."""
    rng = np.random.default_rng(seed)
    content = {"dict": {"src": {"<blank>": 0}, "tgt": TAILOR_TOKENS}, "settings": {"a": None}}
    for split, count in COUNTS.items():
        lengths = rng.integers(1, 61, count)
        content[split] = {
            "src-visual": list(padded(rng, lengths, 60, 35, front)),
            "src-audio": torch.from_numpy(padded(rng, lengths, 60, 74, front, np.float64)),
            "src-text": padded(rng, lengths, 60, 30, front).tolist(),
            "tgt": tokens[split] if tokens else token_lists(rng, count)[0],
        }
    return content


def save(content, path, **options):
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_tailor_values_masks_and_labels(tmp_path, zipped, front):
    content = tailor(front=front)
    path = save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    parts = read_tailor(path)
    for key, split in SPLITS.items():
        data = parts[split]
        assert data.dims == {"text": 30, "audio": 74, "vision": 35}
        assert data.label_names == list(MOSEI_LABELS)
        for name, source in (
            ("text", "src-text"),
            ("audio", "src-audio"),
            ("vision", "src-visual"),
        ):
            rows = [np.asarray(row) for row in content[key][source]]
            expected = torch.from_numpy(np.stack(rows)).float()
            assert torch.equal(data.features[name], expected)
            assert torch.equal(data.padding_mask[name], (expected == 0).all(2))
        for row, tokens in zip(data.labels, content[key]["tgt"], strict=True):
            assert set(row.nonzero()[:, 0].add(4).tolist()) == set(tokens) - {2, 3}


def test_the_order_of_emotions_comes_from_the_file(tmp_path):
    content = tailor()
    names = ["Anger", "Disgust", "Fear", "Happy", "Sad", "Surprise"]
    content["dict"]["tgt"] = {"<s>": 2, "</s>": 3} | {n: 4 + i for i, n in enumerate(names)}
    content["train"]["tgt"] = [[2, 4 + i, 3] for i in range(6)]
    path = save(content, tmp_path / "a.pt")
    data = read_tailor(path)["train"]
    assert data.label_names == [name.lower() for name in names]
    assert torch.equal(data.labels, torch.eye(6).byte())
    data = read_tailor(path, MOSEI_LABELS)["train"]
    assert data.label_names == list(MOSEI_LABELS)
    present = [data.label_names[row] for row in data.labels.argmax(1).tolist()]
    assert present == [name.lower() for name in names]
    with pytest.raises(ValueError, match=r"a\.pt: `dict\.tgt` names the labels .* expected"):
        read_tailor(path, M3ED_LABELS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("dict"), r"missing `dict\.tgt`"),
        (lambda c: c.update(dict={"tgt": [1]}), r"missing `dict\.tgt`"),
        (lambda c: c.update(dict={"tgt": {"<s>": 2}}), r"`dict\.tgt` names no label"),
        (lambda c: c["dict"].update(tgt=TAILOR_TOKENS | {"happiness": 10}), "repeats a label"),
        (lambda c: c["dict"].update(tgt={"happy": "4"}), "`dict.tgt` must give every label a number"),
        (lambda c: c["dict"].update(tgt={("a",): 4, "b": 4}), "`dict.tgt` must give every label a number"),
        (broken("test", "tgt", lambda x: [Evil()] * 4), r"refused, because it names `(builtins\.)?exec`"),
        (lambda c: c.pop("test"), "missing split `test`"),
        (without("test", "tgt"), r"missing `test\.tgt`"),
        (broken("test", "tgt", lambda x: x[1:]), r"`test\.tgt` has 3 samples, the features 4"),
        (broken("test", "tgt", put(1, [2, 10, 3])), r"`test\.tgt` of sample 1 holds the token 10"),
        (broken("test", "src-audio", lambda x: x[1:]), r"`test\.src-audio` has 3 samples"),
        (broken("test", "src-visual", put(1, np.zeros((60, 3)))), r"`test\.src-visual` of sample 1"),
        (broken("test", "src-visual", lambda x: 1), r"`test\.src-visual` must hold one sequence"),
        (lambda c: c["test"].update(len_list=[5]), r"`test\.len_list` must hold 4 integers"),
    ],
)  # fmt: skip
def test_broken_tailor_files_are_refused(tmp_path, change, message):
    content = tailor()
    content["dict"] = dict(content["dict"])
    change(content)
    path = save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message) as error:
        read_tailor(path)
    assert str(error.value).startswith(f"{path}: ")


# --- M3ED -------------------------------------------------------------------------------------------------------------

M3ED_DIALOGUES = {"train": [3, 70, 1], "valid": [4, 2], "test": [5]}


def m3ed(seed=0, audio_dim=1024):
    """The list of ten of M3ED's source."""
    rng = np.random.default_rng(seed)
    utterances, speakers, labels, sentences = (
        OrderedDict(),
        OrderedDict(),
        OrderedDict(),
        OrderedDict(),
    )
    features = [OrderedDict() for _ in range(3)]
    splits = []
    for split, lengths in M3ED_DIALOGUES.items():
        names = [f"{split}_{i}" for i in range(len(lengths))]
        splits.append(names)
        for name, length in zip(names, lengths, strict=True):
            utterances[name] = [f"A_{name}_{i}" for i in range(length)]
            speakers[name] = ["A"] * length
            sentences[name] = ["..."] * length
            labels[name] = rng.integers(0, 7, length).tolist()
            for each, dim in zip(features, (768, audio_dim, 342), strict=True):
                each[name] = rng.normal(size=(length, dim)).astype(np.float32)
    return [utterances, speakers, labels, *features, sentences, *splits]


def test_m3ed_utterances(tmp_path):
    content = m3ed()
    content[5]["train_1"][7] = 0  # no face found
    content[4]["test_0"][2, 5] = np.nan
    with pytest.warns(UserWarning, match="1 steps of `audio` in 1 samples of the test split"):
        parts = read_m3ed(dump(content, tmp_path / "m3ed.pkl"))
    assert [len(data) for data in parts.values()] == [74, 6, 5]
    data = parts["train"]
    assert data.dims == {"text": 768, "audio": 1024, "vision": 342}
    assert data.label_names == list(M3ED_LABELS)
    assert data.ids == [name for d in content[7] for name in content[0][d]]
    assert data.labels.argmax(1).tolist() == [code for d in content[7] for code in content[2][d]]
    assert data.labels.sum(1).eq(1).all()
    for name, position in (("text", 3), ("audio", 4), ("vision", 5)):
        expected = torch.from_numpy(np.concatenate([content[position][d] for d in content[7]]))
        assert torch.equal(data.features[name], expected.unsqueeze(1))
    assert data.padding_mask["vision"].nonzero().tolist() == [[3 + 7, 0]]
    assert parts["test"].padding_mask["audio"].nonzero().tolist() == [[2, 0]]


def test_m3ed_dialogues(tmp_path):
    content = m3ed()
    parts = read_m3ed(dump(content, tmp_path / "m3ed.pkl"), level="dialogue")
    for key, split in SPLITS.items():
        data = parts[split]
        lengths = M3ED_DIALOGUES[key]
        assert data.ids == [f"{key}_{i}" for i in range(len(lengths))]
        assert data.steps == {"text": 70, "audio": 70, "vision": 70}
        for name, position in (("text", 3), ("audio", 4), ("vision", 5)):
            assert torch.equal(data.padding_mask[name], outside(lengths, 70))
            for row, dialogue in zip(data.features[name], data.ids, strict=True):
                expected = torch.from_numpy(content[position][dialogue])
                assert torch.equal(row[: len(expected)], expected)
                assert not row[len(expected) :].any()
        for row, dialogue in zip(data.labels, data.ids, strict=True):
            assert set(row.nonzero()[:, 0].tolist()) == set(content[2][dialogue])


def carat_m3ed(content, swapped=True):
    """What CARAT's converter makes of M3ED's source: cut at 60, labels of the whole dialogue."""
    visual, audio = (4, 5) if swapped else (5, 4)
    codes = {n.capitalize(): 4 + i for i, n in enumerate(M3ED_LABELS)}
    tgt = {"<s>": 2, "</s>": 3, "<unk>": 1, "<blank>": 0} | codes
    result = {"dict": {"src": {}, "tgt": tgt}, "settings": {}}
    for split, names in zip(COUNTS, content[7:], strict=True):
        part = {"len_list": [len(content[2][name]) for name in names]}
        for key, position in (("src-visual", visual), ("src-audio", audio), ("src-text", 3)):
            part[key] = []
            for name in names:
                row = np.zeros((100, content[position][name].shape[1]), np.float32)
                row[: len(content[position][name])] = content[position][name]
                part[key].append(row[:60])
        part["tgt"] = [
            [2, *(code + 4 for code in dict.fromkeys(content[2][name])), 3] for name in names
        ]
        result[split] = part
    return result


@pytest.mark.parametrize("swapped", [True, False])
def test_carat_m3ed_is_exchanged_back_and_agrees_with_the_source(tmp_path, swapped):
    content = m3ed()
    path = save(carat_m3ed(content, swapped), tmp_path / "m3ed_data_60.pt")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        parts = read_tailor(path)
    messages = [str(each.message) for each in warned]
    assert any("1 sequences of the train split were cut to 60 steps" in each for each in messages)
    assert any("`src-visual` holds audio (1024 features)" in each for each in messages) == swapped
    assert len(messages) == 1 + swapped
    source = read_m3ed(dump(content, tmp_path / "m3ed.pkl"), level="dialogue")
    for split, data in parts.items():
        assert data.dims == {"text": 768, "audio": 1024, "vision": 342}
        assert data.label_names == list(M3ED_LABELS)
        assert torch.equal(data.labels, source[split].labels)
        for name in data.dims:
            assert torch.equal(data.features[name], source[split].features[name][:, :60])
            assert torch.equal(data.padding_mask[name], source[split].padding_mask[name][:, :60])


def change(position, key, value):
    def apply(content):
        content[position][key] = value(content[position][key])

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop(), r"must hold a list of 10, got list of 9"),
        (lambda c: c.__setitem__(4, []), r"\[4\] must be a dict, got list"),
        (lambda c: c.__setitem__(8, [["test_0"]]), r"\[8\] must list the dialogues of the validation split"),
        (lambda c: c.__setitem__(6, Evil()), r"refused, because it names `builtins\.exec`"),
        (lambda c: c.__setitem__(8, []), r"\[8\] must list the dialogues of the validation split"),
        (lambda c: c[2].pop("test_0"), r"\[2\] lacks dialogue 'test_0'"),
        (lambda c: c[0].pop("test_0"), r"\[0\] lacks dialogue 'test_0'"),
        (lambda c: c[5].pop("test_0"), r"\[5\] lacks dialogue 'test_0'"),
        (change(2, "test_0", lambda x: [7, *x[1:]]), r"\[2\] of dialogue 'test_0' must be in \[0, 6\], got \d to 7"),
        (change(2, "test_0", lambda x: x[1:]), r"'test_0' has 5 utterances, but 4 labels"),
        (change(2, "test_0", lambda x: ["sad"] * 5), r"\[2\] of dialogue 'test_0' must hold one integer"),
        (change(4, "test_0", lambda x: x[1:]), r"\[4\] of dialogue 'test_0' must hold numbers of shape \(5, D\)"),
        (change(4, "test_0", lambda x: x[:, 1:]), r"\[4\] of dialogue 'test_0' has 1023 features, others 1024"),
    ],
)  # fmt: skip
def test_broken_m3ed_is_refused(tmp_path, damage, message):
    content = m3ed()
    damage(content)
    path = dump(content, tmp_path / "m3ed.pkl")
    for level in ("utterance", "dialogue"):
        with pytest.raises(ValueError, match=message) as error:
            read_m3ed(path, level)
        assert str(error.value).startswith(f"{path}: ")


def test_m3ed_level(tmp_path):
    with pytest.raises(ValueError, match="Expected `level` to be one of"):
        read_m3ed(tmp_path / "m3ed.pkl", "sentence")


# --- From one layout to the other -------------------------------------------------------------------------------------


@pytest.mark.parametrize("front", [False, True])
def test_a_pickle_is_converted_once(tmp_path, front):
    content, _ = mmsa(front=front)
    content["test"]["audio"][1, 0 if not front else -1, 3] = np.nan
    content["test"]["audio"][2] = 0
    path = dump(with_tokens(content)[0], tmp_path / "data.pkl")
    with pytest.warns(UserWarning, match="not finite"):
        parts = read_mmsa(path)
    write_npz(parts, tmp_path / "data.npz")
    again = read_npz(tmp_path / "data.npz")
    for split, data in parts.items():
        assert torch.equal(again[split].labels, data.labels)
        assert again[split].label_names == data.label_names
        assert again[split].ids == data.ids
        for name in data.dims:
            for row in range(len(data)):
                kept = ~data.padding_mask[name][row]
                now = ~again[split].padding_mask[name][row]
                assert torch.equal(
                    again[split].features[name][row][now], data.features[name][row][kept]
                )
                assert not now[int(kept.sum()) :].any()


# --- The command ------------------------------------------------------------------------------------------------------


def command(capsys, *arguments):
    """Exit code, stdout and the lines on stderr of `python -m uncertainty_mm.data.convert`."""
    code = 0
    try:
        main([str(each) for each in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def write_example(folder, name):
    """A file to convert in one of the layouts, and what its reader makes of it."""
    path = folder / f"data.{'pt' if name == 'tailor' else 'pkl'}"
    if name == "tailor":
        save(tailor(), path)
        return path, read_tailor(path)
    if name == "mmsa":
        return lddu(folder).rename(path), read_mmsa(path)
    dump(m3ed(), path)
    return path, read_m3ed(path, "dialogue" if name == "m3ed-dialogue" else "utterance")


@pytest.mark.parametrize("name", ["mmsa", "tailor", "m3ed", "m3ed-dialogue"])
@pytest.mark.parametrize("target", ["out.npz", "out"])
def test_the_command_writes_what_the_reader_reads(tmp_path, capsys, name, target):
    source, expected = write_example(tmp_path, name)
    options = ["--format", name] if name == "m3ed-dialogue" else []
    code, out, err = command(capsys, source, tmp_path / target, *options)
    assert (code, err) == (0, [])
    for split, data in expected.items():
        assert f"{split}: {data.summary()}" in out
    read = read_npz if target.endswith(".npz") else read_folder
    equal_parts(read(tmp_path / target), expected)
    # once more: a file is replaced, a folder is not
    code, out, err = command(capsys, source, tmp_path / target, *options)
    assert code == (0 if target.endswith(".npz") else 2)


def test_the_options_of_the_command(tmp_path, capsys):
    content, path = with_infinite(tmp_path, bad_columns)
    _, rows = intensities(content)
    labels = write_csv(
        tmp_path / "labels.csv", ["video_id", "clip_id", "mode", *MOSEI_LABELS], rows
    )
    options = ["--labels", labels, "--label-names", ",".join(MOSEI_LABELS[::-1])]
    options += ["--padding", "none", "--invalid", "value"]
    code, _, err = command(capsys, path, tmp_path / "out.npz", *options)
    assert code == 0
    assert ["never finite: column 3, 70" in each for each in err] == [True] * 3
    assert all(each.startswith("warning: ") for each in err)
    expected, _ = messages(
        lambda: read_mmsa(path, labels, MOSEI_LABELS[::-1], padding="none", invalid="value")
    )
    equal_parts(read_npz(tmp_path / "out.npz"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none.pkl out.npz", "none.pkl: no such file"),
        ("data.pkl data.pkl", "data.pkl: is what is read"),
        ("data.npz data.npz", "data.npz: is what is read"),
        ("link.pkl data.pkl", "data.pkl: is what is read"),
        ("data.pkl labels.csv --labels labels.csv", "labels.csv: is what is read"),
        ("data.pkl out.h5", "out.h5: must be a file .npz, or a folder without a suffix"),
        ("data.pkl none/out.npz", "none/out.npz: there is no folder"),
        ("data.pkl full", "full: is there already"),
        ("data.pkl folder.npz", "folder.npz: is a folder"),
        ("full out.npz", "full: Is a directory"),
        ("data.npz out.npz", "data.npz: neither a pickle nor a file of torch.save (it is a .npz archive of NumPy)"),
        ("data.pkl out.npz --format m3ed", "data.pkl: must hold a list of 10, got dict of 3"),
        ("data.pkl out.npz --format tailor", "data.pkl: not a readable file of torch.save (it is a pickle)"),
        ("labels.csv out.npz", "labels.csv: not a readable pickle"),
        ("data.pkl out.npz --labels none.csv", "none.csv: no such file"),
        ("data.pkl out.npz --labels data.npz", "data.npz: not a readable .csv file (it is a .npz archive"),
        ("data.pkl out.npz --label-names happy,sad", "holds the token 7, the labels are [4, 5]"),
        ("m3ed.pkl out.npz --padding none", "--padding has no meaning for this layout"),
        ("data.pkl out.npz --invalid row", "argument --invalid: invalid choice: 'row'"),
        ("evil.pkl out.npz", "evil.pkl: refused, because it names `builtins.exec`"),
        ("data.pkl", "the following arguments are required: OUT"),
    ],
)  # fmt: skip
def test_what_a_user_can_do_wrong_is_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    lddu(tmp_path).rename("data.pkl")
    dump(m3ed(), tmp_path / "m3ed.pkl")
    dump({"train": Evil()}, tmp_path / "evil.pkl")
    Path("link.pkl").symlink_to("data.pkl")
    Path("full/train").mkdir(parents=True)
    Path("folder.npz").mkdir()
    np.savez("data.npz", np.ones(2))
    write_csv(tmp_path / "labels.csv", MOSEI_LABELS, [["1"] * 6])
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    code, out, err = command(capsys, *arguments.split())
    assert (code, out, len(err)) == (2, "", 1)
    assert message in err[0]
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # numpy 1.24
@pytest.mark.parametrize("target", ["out.npz", "out"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, capsys, target):
    resource = pytest.importorskip("resource")
    source, _ = write_example(tmp_path, "tailor")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        code, _, err = command(capsys, source, tmp_path / target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, len(err)) == (2, 1)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [source.name]


def test_other_ends_of_the_command(tmp_path, capsys, monkeypatch):
    source, _ = write_example(tmp_path, "tailor")
    for error, code, text in (
        (MemoryError, 2, "not enough memory"),
        (KeyboardInterrupt, 130, "interrupted"),
    ):

        def write(*_, error=error):
            raise error

        monkeypatch.setattr("uncertainty_mm.data.convert.__main__.write_npz", write)
        got, out, err = command(capsys, source, tmp_path / "out.npz")
        assert (got, out, len(err)) == (code, "", 1)
        assert text in err[0]
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])


def test_the_command_as_a_module(tmp_path):
    path = dump([1], tmp_path / "data.pkl")
    called = [sys.executable, "-m", "uncertainty_mm.data.convert", path, tmp_path / "out.npz"]
    done = subprocess.run(called, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"python -m uncertainty_mm.data.convert: error: {path}: must hold a list of 10, got list of 1\n"
    )
