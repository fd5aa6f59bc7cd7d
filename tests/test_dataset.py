"""The data set itself, its own two layouts, and what a `DataLoader` makes of it."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Subset

from uncertainty_mm import EmotionQueryAttention
from uncertainty_mm.data import (
    MultimodalDataset,
    SyntheticMMER,
    read_folder,
    read_npz,
    write_folder,
    write_npz,
)


def make(count=20, seed=0, **options):
    """Samples of three modalities, the first without `b`."""
    generator = torch.Generator().manual_seed(seed)
    features, padding_mask = {}, {}
    for name, steps, dim in (("a", 5, 3), ("c", 1, 4), ("b", 7, 2)):
        lengths = torch.randint(1, steps + 1, (count, 1), generator=generator)
        if name == "b":
            lengths[0] = 0
        padding_mask[name] = torch.arange(steps) >= lengths
        x = torch.randn(count, steps, dim, generator=generator)
        features[name] = x.masked_fill(padding_mask[name].unsqueeze(2), 0)
    return MultimodalDataset(
        features,
        padding_mask,
        torch.randint(2, (count, 2), generator=generator, dtype=torch.uint8),
        ["first", "second"],
        **({"soft_labels": torch.rand(count, 2, generator=generator)} | options),
    )


def check_same(actual, expected):
    """Equal data, in the same order of modalities."""
    assert list(actual.dims.items()) == list(expected.dims.items())
    for name in expected.dims:
        assert torch.equal(actual.features[name], expected.features[name])
        assert torch.equal(actual.padding_mask[name], expected.padding_mask[name])
    assert torch.equal(actual.labels, expected.labels)
    assert actual.label_names == expected.label_names
    assert actual.ids == expected.ids
    assert (actual.soft_labels is None) == (expected.soft_labels is None)
    if expected.soft_labels is not None:
        assert torch.equal(actual.soft_labels, expected.soft_labels)


# --- The data set -----------------------------------------------------------------------------------------------------


def test_a_batch_is_the_samples_of_its_indices():
    data = make(ids=[f"s{i}" for i in range(20)])
    indices = [3, 0, 19, 3]
    batch = data.batch(indices)
    assert batch.indices.tolist() == indices
    for row, index in enumerate(indices):
        sample = data[index]
        assert sample.indices == index
        for name in data.dims:
            assert torch.equal(batch.features[name][row], data.features[name][index])
            assert torch.equal(sample.features[name], data.features[name][index])
            assert torch.equal(sample.padding_mask[name], data.padding_mask[name][index])
        assert torch.equal(batch.labels[row], data.labels[index])
        assert torch.equal(sample.soft_labels, data.soft_labels[index])
    assert data[-1].indices == 19
    with pytest.raises(IndexError):
        data[20]


def test_a_batch_is_float32_and_masked_steps_are_0():
    data = make()
    mask = data.padding_mask["a"].unsqueeze(2)
    poisoned = data.features["a"].half().masked_fill(mask, float("nan"))
    features = data.features | {"a": poisoned}
    data = MultimodalDataset(features, data.padding_mask, data.labels, data.label_names)
    batch = data.batch(range(20))
    assert batch.features["a"].dtype == torch.float32
    assert torch.equal(batch.features["a"], poisoned.float().nan_to_num())
    assert poisoned.isnan().any()  # the data themselves are left alone
    assert batch.soft_labels is None


def test_loaders():
    data = make(ids=None)
    seen = torch.cat([batch.indices for batch in data.loader(6)])
    assert torch.equal(seen, torch.arange(20))
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(0))
    for loader in (
        data.loader(6, sampler=sampler),
        data.loader(6, shuffle=True),
        DataLoader(Subset(data, range(20)), 6, shuffle=True, collate_fn=data.collate),
    ):
        seen = torch.cat([batch.indices for batch in loader])
        assert sorted(seen.tolist()) == list(range(20))
    dropped = list(data.loader(6, drop_last=True))
    assert [len(batch.labels) for batch in dropped] == [6, 6, 6]


def test_a_batch_feeds_the_attention():
    world = SyntheticMMER(num_labels=3)
    samples = world.sample(8, seed=0)
    names = ["x", "y", "z"]
    data = MultimodalDataset(samples.features, samples.padding_mask, samples.labels, names)
    batch = next(iter(data.only(["text"]).loader(4)))
    attention = EmotionQueryAttention(data.dims, 3)
    assert attention(batch.features, batch.padding_mask).shape == (4, 3, 3, 128)
    missing = attention.missing(batch.features, batch.padding_mask)
    assert missing.tolist() == [[False, True, True]] * 4


def test_select():
    data = make(ids=list(map(str, range(20))))
    part = data.select(torch.tensor([7, 2, -1]))
    assert (len(part), part.ids, part.label_names) == (3, ["7", "2", "19"], data.label_names)
    for row, index in enumerate([7, 2, 19]):
        got, expected = part[row], data[index]
        assert got.indices == row
        for name in data.dims:
            assert torch.equal(got.features[name], expected.features[name])
            assert torch.equal(got.padding_mask[name], expected.padding_mask[name])
        assert torch.equal(got.labels, expected.labels)
        assert torch.equal(got.soft_labels, expected.soft_labels)
    assert len(data.select([])) == 0
    with pytest.raises(IndexError):
        data.select([20])


def test_only():
    data = make(ids=list(map(str, range(20))))
    rest = data.only(["c", "a"])
    assert list(rest.dims) == ["a", "c", "b"]
    assert rest.padding_mask["b"].all()
    assert torch.equal(rest.padding_mask["a"], data.padding_mask["a"])
    assert rest.features["a"] is data.features["a"]
    assert rest.ids == data.ids
    assert not rest[1].features["b"].any()
    for wrong in (["a", "d"], "a", "abc"):
        with pytest.raises(ValueError, match="Expected `modalities` to be among"):
            data.only(wrong)


def test_summary():
    data = make(4, invalid_steps={"b": 2})
    data.padding_mask["b"] = torch.arange(7) >= torch.tensor([[0], [2], [7], [3]])
    data.labels[:] = torch.tensor([[0, 0], [1, 0], [1, 0], [1, 1]])
    summary = data.summary()
    assert summary.samples == 4
    assert summary.label_counts == {"first": 3, "second": 1}
    assert summary.label_shares == {"first": 0.75, "second": 0.25}
    assert summary.unlabelled == 1
    b = summary.modalities["b"]
    assert b == (7, 2, (2, 3.0, 7), 1, 16, 2)
    assert "b: 7 x 2, lengths 2 / 3 / 7, 1 missing, 16 steps masked, 2 of them not finite" in str(
        summary
    )
    assert "first         3  0.750" in str(summary)
    assert repr(data) == (
        "MultimodalDataset(4 samples, {'a': (5, 3), 'c': (1, 4), 'b': (7, 2)}, labels ['first', 'second'])"
    )


def test_pickle():
    data = make()
    check_same(pickle.loads(pickle.dumps(data)), data)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": {}}, ValueError, "same modalities, at least one"),
        ({"padding_mask": {"a": torch.zeros(4, 5).bool()}}, ValueError, r"got \['a', 'b'\] and \['a'\]"),
        ({"labels": torch.zeros(4)}, ValueError, r"`labels` to have shape \(N, Q=2\), but got \(4,\)"),
        ({"labels": torch.zeros(4, 3)}, ValueError, "`labels` to have shape"),
        ({"labels": torch.full((4, 2), 0.5)}, ValueError, "`labels` to hold only 0 and 1"),
        ({"labels": np.zeros((4, 2))}, TypeError, "`labels` to be a tensor"),
        ({"label_names": ["x", "x"]}, ValueError, r"different names, at least one, but got \['x', 'x'\]"),
        ({"label_names": []}, ValueError, "different names"),
        ({"label_names": "xy"}, TypeError, "`label_names` to be a sequence of names"),
        ({"label_names": [1, 2]}, TypeError, "`label_names` to be a sequence of names"),
        ({"b": torch.zeros(3, 7, 2)}, ValueError, r"`features\['b'\]` to have shape \(N=4, S, D\)"),
        ({"b": torch.zeros(4, 7)}, ValueError, r"`features\['b'\]` to have shape"),
        ({"b": torch.zeros(4, 0, 2)}, ValueError, r"`features\['b'\]` to have steps and features"),
        ({"b": torch.zeros(4, 7, 2).int()}, TypeError, r"`features\['b'\]` to have a floating dtype"),
        ({"b": torch.full((4, 7, 2), torch.inf)}, ValueError, r"`features\['b'\]` to be finite"),
        ({"b": torch.zeros(4, 7, 2).to("meta")}, ValueError, r"`features\['b'\]` to be on cpu"),
        ({"mask": torch.zeros(4, 6).bool()}, ValueError, r"`padding_mask\['b'\]` to have shape \(N=4, S=7\)"),
        ({"mask": torch.zeros(4, 7)}, TypeError, r"`padding_mask\['b'\]` to have a bool dtype"),
        ({"soft_labels": torch.zeros(4, 3)}, ValueError, "`soft_labels` to have shape"),
        ({"soft_labels": torch.full((4, 2), -1.0)}, ValueError, "`soft_labels` to be in"),
        ({"soft_labels": torch.full((4, 2), torch.nan)}, ValueError, "`soft_labels` to be in"),
        ({"soft_labels": torch.zeros(4, 2).int()}, TypeError, "`soft_labels` to have a floating"),
        ({"ids": ["a"]}, ValueError, "`ids` to name 4 samples, but got 1"),
    ],
)  # fmt: skip
def test_broken_arguments(change, error, message):
    b, mask = change.pop("b", torch.zeros(4, 7, 2)), change.pop("mask", torch.zeros(4, 7).bool())
    arguments = {
        "features": {"a": torch.zeros(4, 5, 3), "b": b},
        "padding_mask": {"a": torch.zeros(4, 5).bool(), "b": mask},
        "labels": torch.zeros(4, 2),
        "label_names": ["x", "y"],
    }
    with pytest.raises(error, match=message):
        MultimodalDataset(**(arguments | change))


# --- One archive of arrays --------------------------------------------------------------------------------------------


def arrays(count=60):
    """A data set in the documented layout; sample 0 lacks modality `b`."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 8, count).astype(np.uint32)
    lengths[0] = 0
    return {
        "features.a": rng.normal(size=(count, 5, 3)).astype(np.float16),
        "lengths.a": np.full(count, 5, np.int32),
        "features.b": rng.normal(size=(count, 7, 2)).astype(np.float16),
        "lengths.b": lengths,
        "labels": rng.integers(0, 2, (count, 2)).astype(np.uint8),
        "label_names": np.array(["first", "second"]),
        "split": np.tile([0, 1, 2], count // 3).astype(np.uint8),
    }


def save(path, **changes):
    content = {key: value for key, value in (arrays() | changes).items() if value is not None}
    np.savez(path, **content)
    return path


def test_npz_comes_back(tmp_path):
    content = arrays()
    shares = np.random.default_rng(1).random((60, 2))
    ids = np.array([f"s{i}" for i in range(60)])
    for key in ("label_shares", "soft_labels"):
        parts = read_npz(save(tmp_path / "data.npz", ids=ids, **{key: shares}))
        assert list(parts) == ["train", "validation", "test"]
        for code, data in enumerate(parts.values()):
            rows = content["split"] == code
            lengths = content["lengths.b"][rows].astype(int)
            mask = np.arange(7) >= lengths[:, None]
            assert np.array_equal(data.padding_mask["b"], mask)
            expected = np.where(mask[..., None], 0, content["features.b"][rows])
            assert np.array_equal(data.features["b"], expected.astype(np.float32))
            assert np.array_equal(data.labels, content["labels"][rows])
            assert np.array_equal(data.soft_labels, shares[rows].astype(np.float32))
            assert data.ids == ids[rows].tolist()
    assert parts["train"].summary().modalities["b"].missing == 1


def test_npz_masks_steps_that_are_not_finite(tmp_path):
    features = arrays()["features.a"]
    features[3, 1, 0] = -np.inf
    features[4, 0, 2] = np.nan
    features[6, 4, 0] = np.inf
    features[6, 2, 0] = np.nan
    path = save(tmp_path / "data.npz", **{"features.a": features})
    with pytest.warns(
        UserWarning, match=r"4 steps of `a` in 3 samples are not finite and are left out"
    ):
        parts = read_npz(path)
    assert parts["train"].padding_mask["a"].nonzero().tolist() == [[1, 1], [2, 2], [2, 4]]
    assert parts["validation"].padding_mask["a"].nonzero().tolist() == [[1, 0]]
    assert parts["train"].features["a"].isfinite().all()
    assert parts["train"].summary().modalities["a"].invalid_steps == 3


def bad(key, change):
    return {key: change(arrays()[key])}


def put(index, value):
    def change(array):
        array = array.astype(np.result_type(array, np.min_scalar_type(value)))
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "missing `labels`"),
        ({"lengths.b": None}, "missing `lengths.b`"),
        ({"features.a": None, "features.b": None}, "no array `features.<modality>`"),
        (bad("labels", put((2, 1), 2)), "label `second` must be 0 or 1, got 2"),
        (bad("labels", lambda x: x.astype(float) - 1), "label `first` must be 0 or 1, got -1.0; one that is not known"),
        ({"unknown": np.zeros((60, 2))}, "`unknown` must be bool of the shape of `labels`"),
        ({"groups": np.full(60, 0.5)}, "`groups` must hold 60 integers"),
        (bad("labels", lambda x: x[:, 0]), "`labels` must have shape"),
        ({"label_names": np.array(["x"])}, "1 names for 2 columns"),
        ({"label_names": np.array(["x", "x"])}, "repeats a name"),
        ({"label_names": np.array(["x", None], dtype=object)}, "not a readable"),
        (bad("split", put(slice(None), 0)), "no sample in the validation split"),
        (bad("split", put(0, 3)), "`split` must hold"),
        (bad("split", lambda x: x[1:]), "`split` must have shape"),
        (bad("features.a", lambda x: x[:, :0]), "modality `a` is empty"),
        (bad("features.a", lambda x: x[1:]), "`features.a` must have shape"),
        (bad("features.a", lambda x: x.astype(str)), "must hold numbers"),
        (bad("lengths.b", put(0, 8)), "`lengths.b` must be in [0, 7]"),
        (bad("lengths.b", put(0, -1)), "`lengths.b` must be in [0, 7]"),
        (bad("lengths.b", lambda x: x / 2), "`lengths.b` must hold 60 integers"),
        ({"ids": np.array(["x"])}, "`ids` must name 60 samples"),
        ({"soft_labels": np.zeros((60, 3))}, "`soft_labels` must hold numbers of shape (60, 2)"),
        ({"label_shares": np.full((60, 2), "a")}, "`label_shares` must hold numbers"),
        ({"label_shares": np.full((60, 2), -1.0)}, "`label_shares` must be at least 0"),
        ({"split": np.repeat("tset", 60)}, "`split` must hold 0 (train), 1 (validation), 2 (test), or these names"),
        ({"split": None}, "missing `split`"),
    ],
)  # fmt: skip
def test_broken_npz(tmp_path, changes, message):
    path = save(tmp_path / "data.npz", **changes)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        read_npz(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no archive"])
def test_unreadable_npz(tmp_path, content):
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.npz: not a readable \.npz file"):
        read_npz(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_npz(tmp_path / "none.npz")


def test_splits_that_are_not_wanted_may_be_empty(tmp_path):
    path = save(tmp_path / "data.npz", split=np.full(60, 2))
    parts = read_npz(path, splits=["test"])
    assert [len(data) for data in parts.values()] == [0, 0, 60]
    assert parts["train"].summary().samples == 0


def test_npz_round_trip(tmp_path):
    parts = {"train": make(20), "validation": make(5, 1), "test": make(6, 2)}
    write_npz(parts, tmp_path / "data.npz")
    again = read_npz(tmp_path / "data.npz")
    for name, data in parts.items():
        check_same(again[name], data)


def test_npz_wants_splits_that_fit(tmp_path):
    for parts in ({}, {"dev": make()}):
        with pytest.raises(ValueError, match="Expected `parts` to name splits"):
            write_npz(parts, tmp_path / "data.npz")
    other = make()
    other.label_names = ["second", "first"]
    with pytest.raises(ValueError, match="the same features and labels"):
        write_npz({"train": make(), "test": other}, tmp_path / "data.npz")


# --- A folder of memory-mapped arrays ---------------------------------------------------------------------------------


def test_folder_round_trip_stays_on_disk(tmp_path):
    parts = {
        "test": make(4, ids=["a", "b", "c", "ü"], soft_labels=None),
        "train": make(20, invalid_steps={"b": 3}),
    }
    write_folder(parts, tmp_path / "data")
    again = read_folder(tmp_path / "data")
    assert list(again) == ["train", "test"]
    for name, data in parts.items():
        check_same(again[name], data)
        assert again[name].summary() == data.summary()
    # the tensors are maps of the files: what is written into a file shows in a batch
    file = np.lib.format.open_memmap(tmp_path / "data" / "train" / "features.a.npy", mode="r+")
    file[2, 0] = 7.0
    file.flush()
    assert (again["train"][2].features["a"][0] == 7).all()
    # but not the other way round
    again["train"].features["a"][3, 0] = 8.0
    assert not (read_folder(tmp_path / "data")["train"].features["a"][3, 0] == 8).any()
    batch = next(iter(again["train"].loader(5, shuffle=True, num_workers=0)))
    for row, index in enumerate(batch.indices):
        assert torch.equal(batch.features["b"][row], parts["train"].features["b"][index])


def test_broken_folders(tmp_path):
    folder = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_folder(folder)
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no split"):
        read_folder(folder)
    write_folder({"train": make()}, folder)
    with pytest.raises(ValueError, match="the folder is not empty"):
        write_folder({"train": make()}, folder)
    with pytest.raises(ValueError, match=r"`\.\./a` cannot be the name of a file"):
        write_folder({"../a": make()}, tmp_path / "other")
    train = folder / "train"
    kept = (train / "features.b.npy").read_bytes()
    for content, message in (
        (kept[:50], r"features\.b\.npy: not a readable"),
        (b"", r"features\.b\.npy: not a readable"),
        (pickle.dumps([1]), r"features\.b\.npy: not a readable"),
        (
            (train / "features.a.npy").read_bytes(),
            r"train: Expected `padding_mask\['b'\]` to have shape",
        ),
        (None, r"train: missing `features\.b\.npy`"),
    ):
        (train / "features.b.npy").unlink(missing_ok=True)
        if content is not None:
            (train / "features.b.npy").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_folder(folder)
    (train / "features.b.npy").write_bytes(kept)
    (train / "labels.npy").unlink()
    with pytest.raises(ValueError, match=r"missing `labels\.npy`"):
        read_folder(folder)
