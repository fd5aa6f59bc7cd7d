"""The library's own layouts, an archive and a folder of arrays, `read` for any layout, and how files are written."""

import gzip
import io
import os
import pickle
import re
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from data_support import check_same, make
from support import Bad, refused
from uncertainty_mm._files import replacing
from uncertainty_mm.data import (
    MultimodalDataset,
    read,
    read_folder,
    read_npz,
    write_folder,
    write_npz,
)

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


def compressed_garbage():
    """An archive whose compressed data cannot be inflated."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("labels.npy", bytes(1000))
    content = bytearray(buffer.getvalue())
    start = content.index(b"labels.npy") + len(b"labels.npy")
    content[start : start + 4] = b"\xff\xff\xff\xff"
    return bytes(content)


def unknown_compression():
    """An archive whose entries are compressed in no known way."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays())
    content = bytearray(buffer.getvalue())
    for entry in re.finditer(rb"PK\x01\x02", bytes(content)):
        content[entry.start() + 10] = 99
    return bytes(content)


class Evil:
    """Would run a command when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


def archive(content):
    buffer = io.BytesIO()
    np.savez(buffer, x=content)
    return buffer.getvalue()


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def npy(content):
    buffer = io.BytesIO()
    np.save(buffer, content)
    return buffer.getvalue()


# What stands in a file, and what is said of it.
UNREADABLE = {
    "empty": (b"", ""),
    "text": (b"no archive", "it holds neither numbers nor strings"),
    "truncated": (b"PK\x03\x04 cut", ""),
    "not to be inflated": (compressed_garbage(), ""),
    "compression unknown": (unknown_compression(), ""),
    "objects": (archive(np.array([Evil()], object)), "it holds neither numbers nor strings"),
    "gzip": (gzip.compress(archive(1)), "it is a gzip file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "it is an HDF5 file"),
    "npy": (npy(np.ones(3)), "it is a .npy file"),
    "pickle": (pickle.dumps([1]), "it is a pickle"),
    "torch": (saved([1]), "it is a file of torch.save"),
    "old torch": (
        saved([1], _use_new_zipfile_serialization=False),
        "it is an old file of torch.save",
    ),
}


@pytest.mark.parametrize("how", [read_npz, read], ids=["read_npz", "read"])
@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_npz(tmp_path, name, how):
    content, said = UNREADABLE[name]
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    message = rf"data\.npz: not a readable \.npz file of plain arrays \({said}"
    with pytest.raises(ValueError, match=message) as error:
        how(path)
    assert "allow_pickle" not in str(error.value)


def test_no_npz(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz: no such file"):
        read_npz(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="not a readable"):
        read_npz(tmp_path)
    for splits in (["tset"], "test"):
        with pytest.raises(ValueError, match=r"Expected `splits` to name splits of .* but got"):
            read_npz(tmp_path / "data.npz", splits=splits)
    with pytest.raises(ValueError, match="Expected `invalid` to be one of"):
        read_npz(tmp_path / "data.npz", invalid="all")
    with pytest.raises(TypeError, match="`label_names` to be a sequence of names, but got 'ab'"):
        read_npz(save(tmp_path / "data.npz"), label_names="ab")


def test_splits_that_are_not_wanted_may_be_empty(tmp_path):
    path = save(tmp_path / "data.npz", split=np.full(60, 2))
    parts = read_npz(path, splits=["test"])
    assert [len(data) for data in parts.values()] == [0, 0, 60]
    assert parts["train"].summary().samples == 0


UNKNOWN = torch.arange(40).view(20, 2) % 3 == 0
# How data are written, and how they are read.
LAYOUTS = {
    "npz": (
        lambda parts, path: write_npz(parts, path / "data.npz"),
        lambda path: path / "data.npz",
    ),
    "folder": (lambda parts, path: write_folder(parts, path / "data"), lambda path: path / "data"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_comes_back(tmp_path, layout):
    write, place = LAYOUTS[layout]
    parts = {
        "train": make(20, ids=[f"ü{i}" for i in range(20)], groups=range(20), unknown=UNKNOWN),
        "validation": make(5, 1, ids=list("abcde"), groups=[2**40] * 5, unknown=UNKNOWN[:5]),
        "test": make(6, 2, ids=list("fghijk"), groups=range(6), unknown=UNKNOWN[:6]),
    }
    write(parts, tmp_path)
    again = read(place(tmp_path))
    assert list(again) == list(parts)
    for name, data in parts.items():
        check_same(again[name], data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_numpy_lacks_is_written_as_float32(tmp_path, layout):
    write, place = LAYOUTS[layout]
    plain = make(20)
    data = MultimodalDataset(
        {name: x.bfloat16() for name, x in plain.features.items()},
        plain.padding_mask,
        plain.labels.bfloat16(),
        plain.label_names,
        soft_labels=plain.soft_labels.bfloat16(),
    )
    write({"test": data}, tmp_path)
    again = read(place(tmp_path), splits=["test"])["test"]
    for name, x in data.features.items():
        assert again.features[name].dtype == torch.float32
        assert torch.equal(again.features[name], x.float())
    assert torch.equal(again.labels.float(), plain.labels.float())
    assert torch.equal(again.soft_labels.float(), data.soft_labels.float())


def test_npz_of_parts_of_which_one_alone_has_unknown_labels(tmp_path):
    parts = {"train": make(20, unknown=UNKNOWN), "test": make(6, 2, groups=range(6))}
    write_npz(parts, tmp_path / "data.npz")
    again = read_npz(tmp_path / "data.npz", splits=())
    assert torch.equal(again["train"].unknown, UNKNOWN)
    assert not again["test"].unknown.any()
    assert again["test"].groups is None


def test_nan_in_labels_of_a_file_is_unknown(tmp_path):
    labels = arrays()["labels"].astype(np.float32)
    labels[::4, 1] = np.nan
    shares = np.where(np.isnan(labels), np.nan, 0.25)
    parts = read_npz(save(tmp_path / "data.npz", labels=labels, label_shares=shares))
    unknown = torch.cat([data.unknown for data in parts.values()])
    order = np.argsort(arrays()["split"], kind="stable")
    assert np.array_equal(unknown, np.isnan(labels)[order])
    found = torch.cat([data.labels for data in parts.values()])
    assert np.array_equal(found, np.nan_to_num(labels)[order])
    assert set(torch.cat([data.soft_labels for data in parts.values()]).unique().tolist()) == {
        0,
        0.25,
    }
    # beside integers a mask says it; what stands there is not looked at
    integers = np.where(np.isnan(labels), -1, labels).astype(np.int8)
    again = read_npz(save(tmp_path / "data.npz", labels=integers, unknown=np.isnan(labels)))
    for name, data in parts.items():
        assert torch.equal(again[name].unknown, data.unknown)
        assert torch.equal(again[name].labels, data.labels)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "validation", "test"),
        ("Train", "DEV", "test"),
        (b"train", b"val", b"test"),
        ("train", "valid", "test"),
    ],
)
def test_splits_by_name(tmp_path, names):
    path = save(tmp_path / "data.npz", split=np.tile(np.array(names), 20))
    expected = read_npz(save(tmp_path / "numbers.npz"))
    for name, data in read_npz(path).items():
        check_same(data, expected[name])


# --- New data ---------------------------------------------------------------------------------------------------------

NOTHING = {"labels": None, "label_names": None, "split": None}


def test_new_data_need_names_alone(tmp_path):
    path = save(tmp_path / "new.npz", ids=np.array([f"s{i}" for i in range(60)]), **NOTHING)
    for parts in (
        read(path, label_names=["x", "y", "z"]),
        read_npz(path, label_names=["x", "y", "z"]),
    ):
        assert list(parts) == ["all"]
        data = parts["all"]
        assert len(data) == 60
        assert data.label_names == ["x", "y", "z"]
        assert data.unknown.all()
        assert not data.labels.any()
        assert data.labels.shape == (60, 3)
        assert data.ids[7] == "s7"
        assert np.array_equal(data.padding_mask["b"].sum(1), 7 - arrays()["lengths.b"].astype(int))
    with pytest.raises(
        ValueError, match=r"missing `labels`.*; data without labels are read with `label"
    ):
        read(path)
    with pytest.raises(ValueError, match=r"missing `lengths\.b`"):
        read(save(path, **NOTHING | {"lengths.b": None}), label_names=["x"])
    empty = {key: value[:0] for key, value in arrays().items() if "." in key}
    with pytest.raises(ValueError, match="no sample in the all split"):
        read(save(path, **NOTHING | empty), label_names=["x"])
    assert len(read(path, label_names=["x"], splits=())["all"]) == 0


def test_new_data_with_splits_or_labels(tmp_path):
    parts = read(save(tmp_path / "data.npz", labels=None, label_names=None), label_names=["x"])
    assert [len(data) for data in parts.values()] == [20, 20, 20]
    assert all(data.unknown.all() for data in parts.values())
    path = save(tmp_path / "data.npz", split=None)
    data = read(path, splits=())["all"]
    assert np.array_equal(data.labels, arrays()["labels"])
    assert data.unknown is None
    with pytest.raises(ValueError, match=r"data\.npz: no sample in the train split"):
        read(path)
    write_npz({"all": data}, tmp_path / "again.npz")
    check_same(read(tmp_path / "again.npz", splits=())["all"], data)


def test_new_data_in_a_folder(tmp_path):
    data, names = make(4, soft_labels=None), ["x", "y"]
    write_folder({"all": data}, tmp_path / "data")
    for file in ("labels", "label_names", "modalities", "invalid_steps"):
        (tmp_path / "data" / "all" / f"{file}.npy").unlink()
    for folder in (
        tmp_path / "data",
        tmp_path / "data" / "all",
    ):  # by split, or the arrays themselves
        parts = read(folder, label_names=names)
        assert list(parts) == ["all"]
        assert parts["all"].unknown.all()
        for name, x in data.features.items():
            assert torch.equal(parts["all"].features[name], x)
    with pytest.raises(ValueError, match=r"missing `labels\.npy`"):
        read(tmp_path / "data")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_a_file_are_put_into_the_order_wanted(tmp_path, layout):
    write, place = LAYOUTS[layout]
    write({"test": make(20, unknown=UNKNOWN)}, tmp_path)
    parts = read(place(tmp_path), label_names=["second", "first"], splits=["test"])
    check_same(parts["test"], make(20, unknown=UNKNOWN).in_order(["second", "first"]))
    for names in (["first"], ["first", "third"]):
        with pytest.raises(
            ValueError, match=r"data[.npz]*: names the labels \['first', 'second'\], expected"
        ):
            read(place(tmp_path), label_names=names, splits=["test"])


# --- What one number costs --------------------------------------------------------------------------------------------


def warned(read, *message):
    """What `read` gives, after checking that it warned with just these."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = read()
    assert len(caught) == len(message)
    for each, wanted in zip(caught, message, strict=True):
        assert re.search(wanted, str(each.message)), each.message
    return result


def test_a_number_costs_its_step_or_itself(tmp_path):
    features = arrays()["features.a"]
    features[3, 1, 0], features[4, 0, 2] = -np.inf, np.nan
    path = save(tmp_path / "data.npz", **{"features.a": features})
    parts = warned(
        lambda: read(path), "2 steps of `a` in 2 samples are not finite and are left out"
    )
    assert sum(int(data.padding_mask["a"].sum()) for data in parts.values()) == 2
    parts = warned(
        lambda: read(path, invalid="value"), "2 values of `a` are not finite and are taken as 0"
    )
    assert not any(data.padding_mask["a"].any() for data in parts.values())
    expected = np.where(np.isfinite(features), features, 0).astype(np.float32)
    assert np.array_equal(parts["train"].features["a"], expected[::3])
    assert np.array_equal(parts["validation"].features["a"], expected[1::3])


def test_a_modality_that_is_gone_is_told(tmp_path):
    features = arrays()["features.a"]
    features[..., 1] = -np.inf
    path = save(tmp_path / "data.npz", **{"features.a": features})
    gone = r"no step of `a` is left, it is missing in all samples; never finite: column 1"
    parts = warned(lambda: read(path), "300 steps of `a` in 60 samples are not finite", gone)
    assert parts["train"].summary().modalities["a"].missing == 20
    warned(lambda: read(path, invalid="value"), "300 values of `a` .* 0; never finite: column 1")
    features = arrays()["features.a"]
    features[2::3, :, 1] = np.nan  # the test split alone
    path = save(tmp_path / "data.npz", **{"features.a": features})
    gone = "no step of `a` of the test split is left"
    warned(
        lambda: read(path), "100 steps of `a` in 20 samples are", "of the test split are not", gone
    )


def test_npz_round_trip_of_masked_steps(tmp_path):
    parts = {"train": make(20), "validation": make(5, 1), "test": make(6, 2)}
    write_npz(parts, tmp_path / "data.npz")
    again = read_npz(tmp_path / "data.npz")
    for name, data in parts.items():
        check_same(again[name], data)


def test_npz_wants_splits_that_fit(tmp_path):
    for parts in ({}, {"dev": make()}, {"train": make(), "all": make()}):
        with pytest.raises(ValueError, match="Expected `parts` to name splits"):
            write_npz(parts, tmp_path / "data.npz")
    for parts, got in (
        ([make()], "a mapping of names, but got list"),
        ({"train": 1}, "a MultimodalDataset, but got int"),
    ):
        with pytest.raises(TypeError, match=got):
            write_npz(parts, tmp_path / "data.npz")
    with pytest.raises(FileNotFoundError, match="none"):
        write_npz({"train": make()}, tmp_path / "none" / "data.npz")
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
    for name in ("../a", "..", ".", "a/b"):
        with pytest.raises(ValueError, match=f"`{re.escape(name)}` cannot be the name of a file"):
            write_folder({name: make()}, tmp_path / "other")
    with pytest.raises(ValueError, match="`parts` to name splits, at least one, but got none"):
        write_folder({}, tmp_path / "other")
    with pytest.raises(TypeError, match="to be a MultimodalDataset, but got int"):
        write_folder({"train": 1}, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    train = folder / "train"
    kept = (train / "features.b.npy").read_bytes()
    for content, message in (
        (kept[:50], r"features\.b\.npy: not a readable"),
        (b"", r"features\.b\.npy: not a readable"),
        (pickle.dumps([1]), r"features\.b\.npy: not a readable .* \(it is a pickle\)"),
        (saved([1]), r"features\.b\.npy: not a readable .* \(it is a file of torch.save\)"),
        (
            npy(np.array([Evil()], object)),
            r"b\.npy: not a readable .* \(it holds neither numbers nor",
        ),
        (b"\x93NUMPY\x01\x00\x08\x00((((((((" + bytes(8), r"features\.b\.npy: not a readable"),
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
    write_folder({"test": make()}, tmp_path / "other")
    file = tmp_path / "other" / "test" / "labels.npy"
    np.save(file, np.full((20, 2), 2))
    with pytest.raises(
        ValueError, match=r"test: Expected `labels` to hold only 0 and 1, but got 2"
    ):
        read_folder(tmp_path / "other")
    np.save(file, np.where(UNKNOWN, np.nan, 1))
    assert torch.equal(read_folder(tmp_path / "other")["test"].unknown, UNKNOWN)
    (tmp_path / "other" / ".unfinished").touch()
    with pytest.raises(ValueError, match="was not written to its end"):
        read_folder(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"labels\.npy: no such folder"):
        read_folder(file)


def test_other_names_of_splits(tmp_path):
    write_folder({"train": make(), "dev": make(5), "extra": make(3)}, tmp_path / "data")
    assert list(read_folder(tmp_path / "data")) == ["train", "validation", "extra"]
    write_folder({"val": make(5)}, tmp_path / "data" / "new")
    (tmp_path / "data" / "new" / "val").rename(tmp_path / "data" / "val")
    (tmp_path / "data" / "new").rmdir()
    with pytest.raises(ValueError, match="holds the validation split twice, in `val` too"):
        read_folder(tmp_path / "data")


# --- Any layout -------------------------------------------------------------------------------------------------------


def test_read_goes_by_the_suffix_or_as_told(tmp_path):
    write_npz({"test": make(6)}, tmp_path / "data.npz")
    (tmp_path / "data.npz").rename(tmp_path / "data.bin")
    check_same(read(str(tmp_path / "data.bin"), format="npz", splits=["test"])["test"], make(6))
    write_folder({"test": make(6)}, tmp_path / "data.v2")
    check_same(read(tmp_path / "data.v2", splits=["test"])["test"], make(6))
    tokens = {
        "train": [[2, 4, 3], [2, 3]],
        "valid": [[2, 5, 3], [2, 3]],
        "test": [[2, 3], [2, 4, 3]],
    }
    content = {
        split: {name: np.ones((2, 3, 4)) for name in ("text", "audio", "vision")} | {"tgt": each}
        for split, each in tokens.items()
    }
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(content))
    parts = read(tmp_path / "data.pkl", label_names=["happy", "sad"], padding="none")
    assert parts["validation"].labels.tolist() == [[0, 1], [0, 0]]
    (tmp_path / "labels.csv").write_text("sad,happy\n" + "0,1\n" * 6)
    parts = read(
        tmp_path / "data.pkl", labels=tmp_path / "labels.csv", label_names=["happy", "sad"]
    )
    assert parts["test"].labels.tolist() == [[1, 0], [1, 0]]
    for split in content:
        content[split] = {
            f"src-{name}": torch.ones(2, 3, 4) for name in ("text", "audio", "visual")
        } | {"tgt": tokens[split]}
    torch.save(content | {"dict": {"tgt": {"happy": 4, "sad": 5}}}, tmp_path / "data.pt")
    assert read(tmp_path / "data.pt", label_names=["sad", "happy"])["train"].labels.tolist() == [
        [0, 1],
        [0, 0],
    ]
    m3ed = [{}, {}, {}, {}, {}, {}, {}, ["d0"], ["d1"], ["d2"]]
    for name in ("d0", "d1", "d2"):
        m3ed[0][name], m3ed[2][name] = ["u0", "u1"], [0, 6]
        for position in (3, 4, 5):
            m3ed[position][name] = np.ones((2, 3))
    (tmp_path / "m3ed.pkl").write_bytes(pickle.dumps(m3ed))
    assert len(read(tmp_path / "m3ed.pkl", format="m3ed")["train"]) == 2
    assert len(read(tmp_path / "m3ed.pkl", format="m3ed-dialogue")["train"]) == 1


REFUSED = {
    "absent": (lambda p: read(p / "none.npz"), FileNotFoundError, r"none\.npz: no such file or folder"),
    "labels absent": (lambda p: read(p / "data.npz", labels=p / "no.csv"), FileNotFoundError, r"no\.csv: no such"),
    "suffix": (lambda p: read(p / "data.gz"), ValueError, r"data\.gz: the suffix .* \(it is a gzip file"),
    "labels of npz": (lambda p: read(p / "data.npz", labels=p / "data.gz"), ValueError, "`labels` go with"),
    "folder as npz": (lambda p: read(p, format="npz"), ValueError, "a folder is not of the format npz"),
    "file as folder": (lambda p: read(p / "data.npz", format="folder"), ValueError, "a file is not of the format"),
    "npz as pickle": (lambda p: read(p / "data.npz", format="mmsa"), ValueError, r"data\.npz: .*\.npz archive"),
    "npz as torch": (lambda p: read(p / "data.npz", format="tailor"), ValueError, r"data\.npz: .*\.npz archive"),
    "format": (lambda p: read(p / "data.npz", format="csv"), ValueError, "`format` to be one of"),
    "splits a word": (lambda p: read(p / "data.npz", splits="test"), TypeError, "`splits` to be a sequence of names"),
    "names a word": (lambda p: read(p / "data.npz", label_names="test"), TypeError, "`label_names` to be a sequence"),
    "no such split": (lambda p: read(p / "data.npz", splits=["dev"]), ValueError, r"data\.npz: no sample in the dev"),
    "option": (lambda p: read(p / "data.npz", invalid="all"), ValueError, r"`invalid` to be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_read_refuses_in_one_line(tmp_path, name):
    save(tmp_path / "data.npz")
    (tmp_path / "data.gz").write_bytes(gzip.compress(b"a,b"))
    refused(Bad(name, *REFUSED[name]), tmp_path)


# --- Written in one step ----------------------------------------------------------------------------------------------


def test_no_file_of_the_user_is_touched(tmp_path):
    mine = [
        tmp_path / name
        for name in ("data.part.npz", "data.tmp.npz", ".data.part.npz", "data.npz.tmp")
    ]
    for path in mine:
        path.write_text("mine")
    write_npz({"train": make()}, tmp_path / "data.npz")
    assert all(path.read_text() == "mine" for path in mine)
    assert {*tmp_path.iterdir()} == {*mine, tmp_path / "data.npz"}


def test_two_writers_of_one_path(tmp_path):
    """Many at once, in threads: each file that is seen is whole, and nothing is left behind."""
    path = tmp_path / "data.npz"

    def write(number):
        for _ in range(40):
            with replacing(path) as partial:
                partial.write_text(str(number) * 5000)
            seen = path.read_text()
            assert len(seen) == 5000
            assert len(set(seen)) == 1

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(write, range(5)))
    assert list(tmp_path.iterdir()) == [path]


def test_one_write_within_another(tmp_path):
    path = tmp_path / "data.npz"
    with replacing(path) as outer:
        outer.write_text("outer")
        with replacing(path) as inner:
            inner.write_text("inner")
        assert path.read_text() == "inner"
        assert outer.exists()
    assert path.read_text() == "outer"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_a_plain_open(tmp_path, umask):
    before = os.umask(umask)
    try:
        for name in ("ours", "plain"):
            with (
                replacing(tmp_path / name)
                if name == "ours"
                else nullcontext(tmp_path / name) as path
            ):
                path.write_text("first")
        modes = [(tmp_path / name).stat().st_mode for name in ("ours", "plain")]
        assert modes[0] == modes[1]
        (tmp_path / "ours").chmod(0o640)
        with replacing(tmp_path / "ours") as path:
            path.write_text("second")
        assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_long_names_and_names_that_are_patterns(tmp_path):
    for name in ("x" * 251 + ".npz", "data [0-9]*.npz", "no suffix", "ü" * 120):
        with replacing(tmp_path / name) as path:
            path.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("error", [FileExistsError, OSError, KeyboardInterrupt])
def test_what_is_raised_while_writing_passes(tmp_path, error):
    def write(path):
        with replacing(path) as partial:
            partial.write_text("half")
            raise error("mine")

    with pytest.raises(error, match="mine"):
        write(tmp_path / "x")
    assert not list(tmp_path.iterdir())
