"""Reads untrusted pickles of plain containers, numbers, strings, NumPy arrays and tensors, and nothing else.

A pickle is a program that may call whatever it names. These readers give it stand-ins for the few names that arrays
need, and refuse all others. Even NumPy's own classes are withheld: the state of a dtype, set by a hostile file, could
make NumPy take plain bytes for pointers to objects.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection
from os import PathLike
from typing import IO, Any

import numpy as np
import torch
from torch.storage import TypedStorage, UntypedStorage

from uncertainty_mm._files import check_sums
from uncertainty_mm.data._formats import OLD_TORCH, PICKLE, TORCH, format_of

_KINDS = "biufSU"  # booleans, integers, floats, strings; O (objects) is read as a list


class _Dtype:
    """Stand-in for `numpy.dtype`, which reads only the byte order of its state."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?(O8?|[biufSU]\d+)", code):
            raise ValueError(f"the array type {code!r} is not numbers, strings or objects")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, subarray, names, fields = state[1:5]
        if (subarray, names, fields) != (None, None, None) or order not in ("<", ">", "|", "="):
            raise ValueError("an array type with fields or of arrays")
        self.dtype = self.dtype.newbyteorder(order)


def _dtype(value: object) -> np.dtype[Any]:
    if not isinstance(value, _Dtype):
        raise ValueError("an array without a type")
    return value.dtype


def _bytes(data: object) -> bytes:
    if isinstance(data, str):  # written by Python 2
        return data.encode("latin1")
    if not isinstance(data, bytes | bytearray):
        raise ValueError("an array without data")
    return bytes(data)


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(size) is int and size >= 0 for size in value):
        raise ValueError(f"an array of shape {value!r}")
    return value


class _Array(np.ndarray[Any, Any]):
    """Stand-in for `numpy.ndarray`, which checks a state before NumPy uses it."""

    def __new__(cls, *_: object) -> _Array:
        return super().__new__(cls, (0,), np.int8)

    def __setstate__(self, state: Any) -> None:
        _, shape, wrapped, fortran, data = state
        shape, dtype = _shape(shape), _dtype(wrapped)
        if dtype.kind == "O":
            if not isinstance(data, list):
                raise ValueError("an array of objects without a list")
            expected = math.prod(shape)
        else:
            data = _bytes(data)
            expected = math.prod(shape) * dtype.itemsize
        if len(data) != expected:
            raise ValueError(f"an array of shape {shape} with data for another")
        super().__setstate__((1, shape, dtype, bool(fortran), data))  # type: ignore[arg-type]


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _frombuffer(
    buffer: object, wrapped: object, shape: object, order: object, axes: object = None
) -> _Array:
    """Makes an array written with protocol 5; since NumPy 2.3 one with permuted axes has the order K."""
    flat = np.frombuffer(
        buffer if isinstance(buffer, bytearray) else bytearray(_bytes(buffer)), _plain(wrapped)
    )
    sizes = _shape(shape)
    if order in ("C", "F") and axes is None:
        return flat.reshape(sizes, order=order).view(_Array)
    if order != "K" or sorted(_shape(axes)) != list(range(len(sizes))):
        raise ValueError(f"an array in the order {order!r} with the axes {axes!r}")
    return flat.reshape(sizes).transpose(_shape(axes)).view(_Array)


def _scalar(wrapped: object, data: object) -> Any:
    dtype, raw = _plain(wrapped), _bytes(data)
    if len(raw) != dtype.itemsize:
        raise ValueError("a number with data for another type")
    return np.frombuffer(raw, dtype)[0]


def _plain(wrapped: object) -> np.dtype[Any]:
    dtype = _dtype(wrapped)
    if dtype.kind not in _KINDS:
        raise ValueError(f"an array of type {dtype} in a buffer")
    return dtype


def _encode(text: object, encoding: object) -> bytes:
    """Makes bytes written with protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    return b""


def _dict(content: object = None) -> dict[Any, Any]:
    """A plain dict in place of a `Counter`, or of a `defaultdict`, whose default is dropped."""
    return dict(content) if isinstance(content, dict) else {}


def _default(*_: object) -> None:
    """Stand-in for the types that a `defaultdict` may name."""


class _Settings:
    """Stand-in for `argparse.Namespace`, which TAILOR's files carry under `settings`; its content is dropped."""

    def __setstate__(self, state: object) -> None:
        pass


def _storage(data: object) -> TypedStorage:
    """The memory of a tensor, which is a file of torch.save inside the pickle."""
    storage = _torch_load(io.BytesIO(_bytes(data)))
    if not isinstance(storage, TypedStorage):
        raise ValueError("a tensor without data")
    return storage


def _tensor(
    storage: object, offset: object, shape: object, strides: object, *_: object
) -> np.ndarray[Any, Any]:
    """A tensor as a read-only array, because others may share its memory."""
    sizes, steps = _shape(shape), _shape(strides)
    if not isinstance(storage, TypedStorage) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor without data")
    held: UntypedStorage = storage._untyped_storage
    empty = torch.empty(0, dtype=storage.dtype, device="cpu")
    last = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    # torch would enlarge the memory of a tensor that exceeds it
    if 0 not in sizes and last >= held.nbytes() // empty.element_size():
        raise ValueError(f"a tensor of shape {sizes} with data for another")
    tensor = empty.set_(held, offset, sizes, steps)
    array = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy().view(_Array)
    array.flags.writeable = False
    return array


def _parameter(tensor: object, *_: object) -> _Array:
    if not isinstance(tensor, _Array):
        raise ValueError("a parameter without a tensor")
    return tensor


_ADMITTED: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": _Settings,
    "builtins.bytes": _empty_bytes,
    "builtins.frozenset": frozenset,
    "builtins.set": set,
    "collections.Counter": _dict,
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": _dict,
    "_codecs.encode": _encode,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
}
for _name in ("bool", "dict", "float", "int", "list", "long", "str", "tuple", "unicode"):
    _ADMITTED[f"builtins.{_name}"] = _default
for _package in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _ADMITTED[f"{_package}.multiarray._reconstruct"] = _reconstruct
    _ADMITTED[f"{_package}.multiarray.scalar"] = _scalar
    _ADMITTED[f"{_package}.numeric._frombuffer"] = _frombuffer
# For tensors in a pickle; torch itself reads those in a file of torch.save.
_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
}


class _Refused(pickle.UnpicklingError):
    """The file names something that is not admitted."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full in _ADMITTED:
            return _ADMITTED[full]
        if full not in _TENSORS:
            raise _Refused(full)
        return _TENSORS[full]


def _torch_load(file: IO[bytes]) -> Any:
    """`torch.load` of admitted names only, with errors that do not advise to admit more."""
    admitted: list[Any] = [(value, name) for name, value in _ADMITTED.items()]
    try:
        with torch.serialization.safe_globals(admitted), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise _Refused(refused[1]) from None
        if "Unsupported operand" in str(error):
            raise ValueError("damaged, or written with another `pickle_protocol` than 2") from None
        raise ValueError("damaged, or it holds other things than tensors and arrays") from None


def _read(
    path: str | PathLike[str], what: str, formats: Collection[str], load: Callable[[IO[bytes]], Any]
) -> Any:
    """Applies `load` to a file of one of the formats; `what` names it in messages."""
    found = format_of(path)
    if found is not None and found not in formats:
        raise ValueError(f"{path}: not a readable {what} (it is {found})")
    with open(path, "rb") as file:
        try:
            return load(file)
        except _Refused as error:
            raise ValueError(
                f"{path}: refused, because it names `{ascii(str(error))[1:-1]}`; "
                "only arrays, tensors, numbers, strings and plain containers are read"
            ) from None
        except Exception as error:  # a broken file may raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path}: not a readable {what} ({reason})") from error


def load_pickle(path: str | PathLike[str]) -> Any:
    """Reads a pickle of plain containers, numbers, strings, NumPy arrays and tensors.

    Args:
        path: The file, of any protocol, written by Python 2 or 3 and NumPy 1 or 2.

    Returns:
        The content; arrays and tensors become a subclass of `numpy.ndarray`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is broken or of another format, or names anything else, which is not called.
    """
    return _read(path, "pickle", (PICKLE,), lambda file: _Unpickler(file, encoding="latin1").load())


def load_torch(path: str | PathLike[str]) -> Any:
    """Reads a file of `torch.save`, zip or legacy, with the same types as :func:`load_pickle`.

    Args:
        path: The file.

    Returns:
        The content; arrays become a subclass of `numpy.ndarray`, tensors are on the CPU.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is broken or of another format, or names anything else, which is not called.
    """

    def load(file: IO[bytes]) -> Any:
        check_sums(path)
        return _torch_load(file)

    return _read(path, "file of torch.save", (TORCH, OLD_TORCH), load)
