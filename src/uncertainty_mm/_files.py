"""Writes files in one step (:func:`replacing`) and checks them for damage (:func:`check_sums`)."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from os import PathLike
from pathlib import Path
from typing import BinaryIO

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # on Windows, remnants of a killed writer are not removed
    flock = None  # type: ignore[assignment]


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Gives a temporary file next to `path` to write to, which replaces it in one step if the block succeeds.

    If the block raises (a full disk, an interruption), the process is killed or the power fails, `path` is unchanged. A
    link is kept, and its target is replaced. A device, such as /dev/null, is written to directly. Each writer has its
    own temporary file, so several may write to one path, and the last to finish wins. The permissions are those that
    opening `path` for writing would have left.

    Raises:
        PermissionError: If `path` is protected against writing.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    _clear_remnants(path)
    partial, lock = _own_file(path)
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            partial.chmod(stat.S_IMODE(path.stat().st_mode))
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        lock.close()


def _beside(path: Path) -> tuple[str, str]:
    """Start and end of the names of temporary files for `path`, which are hidden and limited in length."""
    return f".{path.stem[:50]}.", f".part{path.suffix}"


def _own_file(path: Path) -> tuple[Path, BinaryIO]:
    """A new, empty file next to `path`, and the handle that keeps it locked as long as its writer lives."""
    start, end = _beside(path)
    while True:
        own = path.with_name(start + secrets.token_hex(4) + end)
        try:
            file = open(own, "xb")  # noqa: SIM115 (closed by the caller)
        except FileExistsError:
            continue
        if flock is None:
            file.close()
            return own, file
        with suppress(OSError):  # a file system without locks
            flock(file, LOCK_EX)
        if own.exists():  # otherwise another writer has removed it as a remnant
            return own, file
        file.close()


def _clear_remnants(path: Path) -> None:
    """Removes the files that killed writers of `path` have left, which nobody has locked."""
    if flock is None:
        return
    start, end = map(escape, _beside(path))
    for remnant in path.parent.glob(start + "[0-9a-f]" * 8 + end):
        with suppress(OSError), open(remnant, "rb+") as file:
            flock(file, LOCK_EX | LOCK_NB)
            remnant.unlink()


def check_sums(path: str | PathLike[str]) -> None:
    """Raises ValueError if a part of an archive, such as a file of `torch.save`, has changed since it was written.

    `torch.load` does not read the check sums, so it would accept damaged weights.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise ValueError(f"the check sum of `{damaged}` is wrong")
