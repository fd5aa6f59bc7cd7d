"""Pickles that nobody vouches for: what is read comes back whole, what could act is refused and never called."""

import argparse
import builtins
import bz2
import codecs
import contextlib
import ctypes
import gzip
import io
import itertools
import lzma
import os
import pickle
import re
import zipfile
from collections import ChainMap, Counter, OrderedDict, defaultdict
from datetime import datetime
from fractions import Fraction
from functools import partial

import numpy as np
import numpy.testing
import pytest
import torch

from uncertainty_mm.data.convert._restricted import load_pickle, load_torch

CONTENT = {
    "numbers": [1, -2.5, True, None, 2**70],
    "text": ("a", "ü", b"", b"\x00\xff"),
    "sets": {1, 2},
    "ordered": OrderedDict(a=[1], b={"c": 2}),
    "float32": np.arange(12, dtype=np.float32).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "big": np.arange(5, dtype=">i4"),
    "half": np.ones((2, 2), np.float16),
    "bools": np.array([True, False]),
    "empty": np.zeros((0, 3)),
    "zero_dim": np.array(3),
    "strings": np.array(["video$_$1", "ü"]),
    "bytes": np.array([b"a", b"bc"]),
    "objects": np.array([["x", None], [1, [2, 3]]], dtype=object),
    "scalars": [np.float32(1.5), np.int64(-3), np.bool_(True), np.str_("s")],
}


def check_same(actual, expected):
    if isinstance(expected, np.ndarray):
        actual = np.asarray(actual)
        assert actual.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")
        assert actual.shape == expected.shape
        np.testing.assert_array_equal(actual, expected)
    elif isinstance(expected, dict):
        assert isinstance(actual, type(expected))
        assert list(actual) == list(expected)
        for key, value in expected.items():
            check_same(actual[key], value)
    else:
        assert type(actual) is type(expected)
        assert actual == expected


@pytest.mark.parametrize("protocol", range(6))
def test_content_comes_back(tmp_path, protocol):
    content = CONTENT | {"frozen": frozenset({1})}
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    check_same(load_pickle(path), content)


TRANSPOSED = [
    np.arange(24.0).reshape(2, 3, 4).transpose(axes) for axes in itertools.permutations(range(3))
]


@pytest.mark.parametrize(
    "array", [*TRANSPOSED, np.asfortranarray(TRANSPOSED[0]), TRANSPOSED[3][:, ::2]]
)
def test_arrays_of_protocol_5_in_every_order(tmp_path, array):
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(array, 5))
    check_same(load_pickle(tmp_path / "data.pkl"), array)


@pytest.mark.parametrize("package", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize(
    ("order", "shape"), [(("C",), (2, 3)), (("F",), (2, 3)), (("K", (1, 0)), (3, 2))]
)
def test_arrays_of_protocol_5_by_any_numpy(tmp_path, package, order, shape):
    value = Reduce(frombuffer, np.arange(6.0).tobytes(), F8, (2, 3), *order)
    content = pickle.dumps(value, 2).replace(b"numpy._core", package)
    (tmp_path / "data.pkl").write_bytes(content)
    loaded = load_pickle(tmp_path / "data.pkl")
    assert loaded.shape == shape
    expected = np.arange(6.0).reshape(2, 3, order="F" if order[0] == "F" else "C")
    check_same(loaded, expected.T if order[0] == "K" else expected)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_in_a_pickle(tmp_path, protocol):
    base = torch.arange(24.0).reshape(2, 3, 4)
    content = {
        "tensor": base,
        "view": base[:, 1:, ::2].transpose(0, 2),
        "double": base.double(),
        "integers": torch.tensor([1, -2]),
        "bools": torch.tensor([True, False]),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "expanded": torch.ones(1, 2).expand(3, 2),
        "parameter": torch.nn.Parameter(base),
        "bfloat16 parameter": torch.nn.Parameter(base.bfloat16()),
        "of gradients": base.clone().requires_grad_(),
    }
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    loaded = load_pickle(path)
    for name, tensor in content.items():
        tensor = tensor.detach()
        tensor = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
        check_same(loaded[name], tensor.numpy())
        assert not loaded[name].flags.writeable  # tensors may share their memory


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_containers_of_the_standard_library(tmp_path, protocol):
    content = {
        "counter": Counter("aab"),
        "lists": defaultdict(list, a=[1]),
        "counts": defaultdict(int, b=2),
        "none": defaultdict(None, c=3),
        "dicts": defaultdict(dict),
        "texts": defaultdict(str, d="x"),
    }
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(content, protocol))
    assert load_pickle(tmp_path / "data.pkl") == content
    torch.save(content, tmp_path / "data.pt")
    assert load_torch(tmp_path / "data.pt") == content


def test_code_within_the_memory_of_a_tensor_is_refused(tmp_path):
    for inner in (Reduce(os.system, f"touch {tmp_path / 'touched'}"), Reduce(eval, "1/0")):
        value = {"train": [Reduce(storage, torch_bytes(inner))]}
        (tmp_path / "data.pkl").write_bytes(pickle.dumps(value, 4))
        with pytest.raises(ValueError, match=r"data\.pkl: refused, because it names `[\w.]+`"):
            load_pickle(tmp_path / "data.pkl")
    assert not (tmp_path / "touched").exists()


def test_names_of_numpy_1_and_of_python_2(tmp_path):
    array = np.arange(3.0)
    path = tmp_path / "data.pkl"
    for old, new in ((b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")):
        path.write_bytes(pickle.dumps(array, 2).replace(old, new))
        np.testing.assert_array_equal(load_pickle(path), array)
    # an array as Python 2 writes it: its data are a string of bytes
    path.write_bytes(
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00 \xc0tb."
    )
    np.testing.assert_array_equal(load_pickle(path), np.array([1, -2.5], np.float32))


class Reduce:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def object_array(*values):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


class OnCall:
    """Refused calls would leave this trace."""

    happened = False


def trap():
    OnCall.happened = True


REFUSED = {
    "posix.system": Reduce(os.system, "exit 1"),
    "builtins.eval": Reduce(eval, "1/0"),
    "builtins.exec": Reduce(exec, "1/0"),
    "builtins.getattr": Reduce(getattr, "a", "upper"),
    "builtins.__import__": Reduce(builtins.__import__, "os"),
    "builtins.open": Reduce(open, "x", "w"),
    "builtins.bytearray": Reduce(bytearray, 10),
    "numpy.load": Reduce(np.load, "x.npy", None, True),
    "numpy.fromfile": Reduce(np.fromfile, "x"),
    "numpy.memmap": Reduce(np.memmap, "x"),
    "numpy.testing._private.utils.runstring": Reduce(
        numpy.testing._private.utils.runstring, "1/0", {}
    ),
    "collections.ChainMap": ChainMap({}),
    "collections.defaultdict of a function": defaultdict(os.getcwd),
    "functools.partial": defaultdict(partial(os.system, "exit 1")),
    "torch._utils._rebuild_from_type_v2": Reduce(
        torch._tensor._rebuild_from_type_v2, eval, int, ("1/0",), {}
    ),
    "torch._utils._rebuild_sparse_tensor": Reduce(torch._utils._rebuild_sparse_tensor, 0, ()),
    "torch.load": Reduce(torch.load, "x.pt"),
    "torch.serialization.add_safe_globals": Reduce(torch.serialization.add_safe_globals, [eval]),
    "ctypes.string_at": Reduce(ctypes.string_at, 1, 1),
    "datetime.datetime": datetime(2020, 1, 1),
    "fractions.Fraction": Fraction(1, 2),
    "numpy.ma.core._mareconstruct": np.ma.array([1, 2]),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_by_name(tmp_path, name, protocol):
    for value in (REFUSED[name], [{"a": object_array(REFUSED[name])}]):
        path = tmp_path / "data.pkl"
        path.write_bytes(pickle.dumps(value, protocol))
        with pytest.raises(ValueError, match=r"data\.pkl: refused") as error:
            load_pickle(path)
        shown = str(error.value).split("`")[1]
        assert shown.rpartition(".")[2] in (name.rpartition(".")[2], "getcwd")
        assert "\n" not in str(error.value)


def test_refused_functions_are_not_called(tmp_path):
    (tmp_path / "data.pkl").write_bytes(b"c%b\ntrap\n(tR." % __name__.encode())
    with pytest.raises(ValueError, match="trap"):
        load_pickle(tmp_path / "data.pkl")
    torch.save({"a": [Reduce(os.system, f"touch {tmp_path / 'touched'}")]}, tmp_path / "data.pt")
    with pytest.raises(ValueError, match=r"posix\.system"):
        load_torch(tmp_path / "data.pt")
    assert not OnCall.happened
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "dtype", [[("a", "f4"), ("b", "O")], "M8[s]", "c16", "V8", ("f4", (2,))], ids=str
)
def test_arrays_of_other_types_are_refused(tmp_path, dtype):
    array = np.zeros(3, np.dtype((np.void, 8)) if dtype == "V8" else dtype)
    if dtype == ("f4", (2,)):
        array = Reduce(np.ndarray, (3,), np.dtype([("x", "f4", (2,))]))
    for protocol in (2, 5):
        (tmp_path / "data.pkl").write_bytes(pickle.dumps(array, protocol))
        with pytest.raises(
            ValueError, match=r"not a readable pickle \((the array type|an array type)"
        ):
            load_pickle(tmp_path / "data.pkl")


class Array:
    """Pickles as an array with a state of our choice."""

    def __init__(self, *state):
        self.state = state

    def __reduce__(self):
        return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


class Dtype:
    """Pickles as a dtype with a state of our choice."""

    def __init__(self, code, *state):
        self.code, self.state = code, state

    def __reduce__(self):
        return np.dtype, (self.code, False, True), self.state


F8, O8 = np.dtype("f8"), np.dtype("O")
scalar = np.float32(1).__reduce__()[0]
frombuffer = np.ones(1).__reduce_ex__(5)[0]
storage = torch.storage._load_from_bytes
tensor = torch._utils._rebuild_tensor_v2
parameter = torch._utils._rebuild_parameter
STORAGE = torch.ones(4).untyped_storage()


def torch_bytes(content):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


class Changed:
    """Pickles as an array or a tensor, which is then given another state."""

    def __init__(self, value, state):
        self.reduced = *value.__reduce_ex__(5)[:2], state

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    "value",
    [
        Array(1, (4,), F8, False, b"\0" * 8),  # too little data
        Array(1, (1,), F8, False, b"\0" * 80),
        Array(1, (-1,), F8, False, b""),
        Array(1, (2**62, 4), F8, False, b""),
        Array(1, ("a",), F8, False, b""),
        Array(1, (1,), O8, False, b"\x41" * 8),  # bytes taken for pointers
        Array(1, (3,), O8, False, [1]),
        Array(1, (1,), F8, False, [1.0]),
        Array(1, (1,), "f8", False, b"\0" * 8),
        Array(1, (1,)),
        # a type of objects that says it holds none
        Array(1, (1,), Dtype("O", 3, "|", None, None, None, -1, -1, 0), False, b"\x41" * 8),
        Array(1, (1,), Dtype("V8", 3, "|", None, ("a",), {"a": (O8, 0)}, 8, 1, 0), False, b"A" * 8),
        Array(1, (1,), Dtype("f8", 3, "|", None, ("a",), {"a": (O8, 0)}, 8, 1, 0), False, b"A" * 8),
    ],
)
def test_hostile_states_of_arrays_are_refused(tmp_path, value):
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(value, 2))
    with pytest.raises(ValueError, match="not a readable pickle"):
        load_pickle(tmp_path / "data.pkl")


@pytest.mark.parametrize(
    "value",
    [
        Reduce(scalar, O8, b"A" * 8),
        Reduce(scalar, F8, b"A" * 4),
        Reduce(scalar, F8, None),
        Reduce(scalar, "f8", b"A" * 8),
        Reduce(frombuffer, b"A" * 8, O8, (1,), "C"),
        Reduce(frombuffer, b"A" * 8, F8, (1,), "K"),
        Reduce(frombuffer, b"A" * 8, F8, (1,), "K", (1,)),
        Reduce(frombuffer, b"A" * 8, F8, (1, 1), "K", (0, 0)),
        Reduce(frombuffer, b"A" * 8, F8, (1, 1), "K", (0,)),
        Reduce(frombuffer, b"A" * 8, F8, (1, 1), "K", (-1, 0)),
        Reduce(frombuffer, b"A" * 8, F8, (1, 1), "K", (False, True)),
        Reduce(frombuffer, b"A" * 8, F8, (1, 1), "C", (1, 0)),
        Reduce(frombuffer, b"A" * 8, O8, (1,), "K", (0,)),
        Reduce(storage, b"no file"),
        Reduce(storage, torch_bytes({"a": 1})),  # a file of torch.save, but no memory
        Reduce(storage, torch_bytes(torch.ones(1))),
        Reduce(tensor, STORAGE, 0, (5,), (1,), False, OrderedDict()),  # beyond its memory
        Reduce(tensor, STORAGE, 3, (2,), (1,), False, OrderedDict()),
        Reduce(tensor, STORAGE, 0, (2, 2), (3, 1), False, OrderedDict()),
        Reduce(tensor, STORAGE, 0, (2,), (2**62,), False, OrderedDict()),
        Reduce(tensor, STORAGE, -1, (2,), (1,), False, OrderedDict()),
        Reduce(tensor, STORAGE, 0, (2,), (-1,), False, OrderedDict()),
        Reduce(tensor, STORAGE, 0, (2,), (1, 1), False, OrderedDict()),
        Reduce(tensor, np.ones(4), 0, (2,), (1,), False, OrderedDict()),
        Reduce(parameter, {}, True, OrderedDict()),
        Changed(torch.ones(4), (STORAGE, 0, (2**40,), (1,))),
        Changed(np.ones((2, 2)).T, (1, (1,), O8, False, b"A" * 8)),
        Reduce(frombuffer, b"A" * 8, F8, (2,), "C"),
        Reduce(frombuffer, b"A" * 8, F8, (-1,), "C"),
        Reduce(frombuffer, np.ones(1), F8, (1,), "C"),  # a view of an array that may be replaced
        Reduce(codecs.encode, "a", "rot13"),
        Reduce(codecs.encode, b"a", "latin1"),
    ],
)
def test_admitted_functions_take_only_what_arrays_need(tmp_path, value):
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(value, 5))
    with pytest.raises(ValueError, match="not a readable pickle"):
        load_pickle(tmp_path / "data.pkl")


def test_an_array_made_by_arguments_is_empty(tmp_path):
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(Reduce(np.ndarray, (2,), "O", bytes(16)), 2))
    assert load_pickle(tmp_path / "data.pkl").shape == (0,)


@pytest.mark.parametrize("extra", [b"", b"K\x01b", b"N}X\x01\x00\x00\x00aK\x01s\x86b"])
def test_stand_ins_cannot_be_changed_by_a_file(tmp_path, extra):
    # BUILD on the admitted names themselves, not on what they return
    for name in (
        "numpy\nndarray",
        "numpy\ndtype",
        "numpy.core.multiarray\n_reconstruct",
        "argparse\nNamespace",
    ):
        (tmp_path / "data.pkl").write_bytes(b"\x80\x02c" + name.encode() + b"\n" + extra + b".")
        with contextlib.suppress(ValueError):
            load_pickle(tmp_path / "data.pkl")
    test_content_comes_back(tmp_path, 2)


def test_damaged_pickles_end_in_one_error(tmp_path):
    good = pickle.dumps(CONTENT, 4)
    path = tmp_path / "data.pkl"
    for end in range(0, len(good) - 1, 7):
        path.write_bytes(good[:end])
        with pytest.raises(ValueError, match=r"data\.pkl: "):
            load_pickle(path)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(good)
        for position in rng.integers(0, len(good), 3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):  # many changes only change a value
            load_pickle(path)
    for content in (b"", b"no pickle", b"PK\x03\x04", np.arange(100).tobytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable pickle"):
            load_pickle(path)


def test_a_refusal_is_one_line_whatever_the_name(tmp_path):
    (tmp_path / "data.pkl").write_bytes(b"\x80\x04\x8c\x02a\n\x8c\x02\n`\x93.")
    with pytest.raises(ValueError, match=r"refused, because it names `a\\n\.\\n``;"):
        load_pickle(tmp_path / "data.pkl")


def test_absent_files_stay_absent(tmp_path):
    for load in (load_pickle, load_torch):
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "none")


# --- torch.save -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_content_comes_back(tmp_path, zipped):
    path = tmp_path / "data.pt"
    content = CONTENT | {
        "tensor": torch.arange(6).reshape(2, 3).T,
        "settings": argparse.Namespace(a=1, b=[2]),
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = load_torch(path)
    assert torch.equal(loaded.pop("tensor"), content.pop("tensor"))
    loaded.pop("settings")
    content.pop("settings")
    check_same(loaded, content)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "name", ["posix.system", "builtins.eval", "numpy.load", "fractions.Fraction"]
)
def test_torch_refuses_everything_else_by_name(tmp_path, name, zipped):
    path = tmp_path / "data.pt"
    for value in (REFUSED[name], {"a": object_array(REFUSED[name])}):
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=rf"data\.pt: refused.*{name.rpartition('.')[2]}"):
            load_torch(path)


def test_torch_refuses_hostile_arrays(tmp_path):
    torch.save(Array(1, (1,), O8, False, b"\x41" * 8), tmp_path / "data.pt")
    with pytest.raises(ValueError, match="objects without a list"):
        load_torch(tmp_path / "data.pt")


def test_torch_leaves_no_global_admitted(tmp_path):
    before = set(torch.serialization.get_safe_globals())  # a list in no fixed order
    torch.save(np.ones(2), tmp_path / "data.pt")
    load_torch(tmp_path / "data.pt")
    assert set(torch.serialization.get_safe_globals()) == before


def test_damaged_torch_files_end_in_one_error(tmp_path):
    path = tmp_path / "data.pt"
    for zipped in (True, False):
        torch.save(CONTENT, path, _use_new_zipfile_serialization=zipped)
        good = path.read_bytes()
        for end in range(0, len(good) - 30, len(good) // 15):
            path.write_bytes(good[:end])
            with pytest.raises(ValueError, match=r"data\.pt: ") as error:
                load_torch(path)
            assert "\n" not in str(error.value)
    for content in (b"", b"no file", pickle.dumps(CONTENT)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not a readable file of torch\.save"):
            load_torch(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", "b")
    with pytest.raises(ValueError, match=r"not a readable file of torch\.save"):
        load_torch(path)


# --- Other formats ----------------------------------------------------------------------------------------------------


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return file.getvalue()


def archived(save, *content, **options):
    file = io.BytesIO()
    save(file, *content, **options)
    return file.getvalue()


CONTAINERS = {
    "gzip": (gzip.compress(pickle.dumps(CONTENT)), "a gzip file; unpack it"),
    "bzip2": (bz2.compress(b"x"), "a bzip2 file; unpack it"),
    "xz": (lzma.compress(b"x"), "an xz file; unpack it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(504), "an HDF5 file"),
    "npy": (archived(np.save, np.ones(2)), r"a \.npy file of NumPy"),
    "npz": (archived(np.savez, np.ones(2)), r"a \.npz archive of NumPy"),
    "zip": (zipped("readme.txt"), "a zip archive; unpack it"),
    "zip, damaged": (zipped("readme.txt")[:40], "a zip archive, damaged"),
    "excel": (zipped("xl/workbook.xml"), r"an Excel workbook; export it as \.csv"),
    "torchscript": (zipped("m/data.pkl", "m/constants.pkl"), "a TorchScript archive"),
    "tar": (bytes(257) + b"ustar" + bytes(250), "a tar archive; unpack it"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
    "html": (b"<!DOCTYPE html><html>", "a page of HTML"),
    "safetensors": ((2).to_bytes(8, "little") + b"{}", "a file of safetensors"),
}
TORCH = {
    "torch": (archived(lambda file: torch.save(CONTENT, file)), r"a file of torch\.save"),
    "old torch": (torch_bytes(CONTENT), r"an old file of torch\.save"),
}
PICKLE = {"pickle": (pickle.dumps(CONTENT), "a pickle")}


@pytest.mark.parametrize(
    ("load", "what", "content", "found"),
    [
        pytest.param(load, what, *case, id=f"{what}: {name}")
        for load, what, cases in (
            (load_pickle, "pickle", CONTAINERS | TORCH),
            (load_torch, r"file of torch\.save", CONTAINERS | PICKLE),
        )
        for name, case in cases.items()
    ],
)
def test_another_format_is_named(tmp_path, load, what, content, found):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data: not a readable {what} \(it is {found}"):
        load(tmp_path / "data")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("value", [np.float64, datetime(2020, 1, 1), Reduce(os.system, "x")])
@pytest.mark.parametrize("protocol", [2, 4])
def test_nobody_is_advised_to_load_unsafely(tmp_path, value, zipped, protocol):
    path = tmp_path / "data.pt"
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"data\.pt: (refused|not a readable)") as error:
        load_torch(path)
    assert not re.search(r"weights_only|trust|safe_globals|Re-running", str(error.value))
