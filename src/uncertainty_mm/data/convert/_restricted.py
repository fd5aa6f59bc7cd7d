"""Reading pickles that nobody vouches for: plain containers, numbers, strings, NumPy arrays and tensors, nothing else.

A pickle is a program that may call whatever it names. These readers give it stand-ins for the few names that arrays
need, and refuse all others. NumPy's own classes are not given out either: the state of a dtype, set by a hostile file,
could make NumPy take plain bytes for pointers to objects.
"""

from __future__ import annotations

import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
import torch

from uncertainty_mm._files import check_sums

_KINDS = "biufSU"  # booleans, integers, floats, strings; O (objects) is read as a list


class _Dtype:
    """Stand-in for `numpy.dtype`: of its state only the byte order is read."""

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
    """Stand-in for `numpy.ndarray`: checks a state before NumPy takes it over."""

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


def _frombuffer(buffer: object, wrapped: object, shape: object, order: object) -> Any:
    """How protocol 5 writes an array."""
    if order not in ("C", "F"):
        raise ValueError(f"an array in the order {order!r}")
    flat = np.frombuffer(bytearray(_bytes(buffer)), _plain(wrapped))
    return flat.reshape(_shape(shape), order=order)


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
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    return b""


class _Settings:
    """Stand-in for `argparse.Namespace`, which TAILOR's files carry under `settings`; its content is dropped."""

    def __setstate__(self, state: object) -> None:
        pass


_ADMITTED: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": _Settings,
    "builtins.bytes": _empty_bytes,
    "builtins.frozenset": frozenset,
    "builtins.set": set,
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
}
for _package in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _ADMITTED[f"{_package}.multiarray._reconstruct"] = _reconstruct
    _ADMITTED[f"{_package}.multiarray.scalar"] = _scalar
    _ADMITTED[f"{_package}.numeric._frombuffer"] = _frombuffer


class _Refused(pickle.UnpicklingError):
    """The file names something that is not admitted."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in _ADMITTED:
            raise _Refused(full)
        return _ADMITTED[full]


def _refusal(path: str | PathLike[str], name: str) -> ValueError:
    return ValueError(
        f"{path}: refused, because it names `{name}`; "
        "only arrays, tensors, numbers, strings and plain containers are read"
    )


def _unreadable(path: str | PathLike[str], what: str, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"{path}: not a readable {what} ({reason})")


def load_pickle(path: str | PathLike[str]) -> Any:
    """Reads a pickle of plain containers, numbers, strings and NumPy arrays.

    Args:
        path: The file; of any protocol, written by Python 2 or 3, by NumPy 1 or 2.

    Returns:
        The content; arrays are of a subclass of `numpy.ndarray`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is broken, or names anything else, which is not called.
    """
    with open(path, "rb") as file:
        try:
            return _Unpickler(file, encoding="latin1").load()
        except _Refused as error:
            raise _refusal(path, str(error)) from None
        except Exception as error:  # a broken pickle may raise anything
            raise _unreadable(path, "pickle", error) from error


def load_torch(path: str | PathLike[str]) -> Any:
    """Reads a file of `torch.save`, zip or legacy: what :func:`load_pickle` reads, and tensors.

    Args:
        path: The file.

    Returns:
        The content; arrays are of a subclass of `numpy.ndarray`, tensors are on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is broken, or names anything else, which is not called.
    """
    admitted: list[Any] = [(value, name) for name, value in _ADMITTED.items()]
    try:
        check_sums(path)
        with torch.serialization.safe_globals(admitted):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise _refusal(path, refused[1]) from None
        raise _unreadable(path, "file of torch.save", error) from error
