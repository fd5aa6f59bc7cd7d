"""Files that are whole: written in one step (:func:`replacing`), checked for damage (:func:`check_sums`)."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place in one step when the block ends well.

    Where the block raises (a full disk, an interruption), the process is killed or the power fails, `path` is as it was
    before. A link stays, and what it leads to is replaced. A device, such as /dev/null, is written to.

    Raises:
        PermissionError: If `path` is protected against writing.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    partial = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_sums(path: str | PathLike[str]) -> None:
    """Raises ValueError if a part of an archive, such as a file of `torch.save`, has changed since it was written.

    `torch.load` does not look at the check sums, so that damaged weights would pass for others.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise ValueError(f"the check sum of `{damaged}` is wrong")
