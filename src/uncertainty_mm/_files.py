"""Files that are whole: written in one step (:func:`replacing`), checked for damage (:func:`check_sums`)."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place in one step when the block ends well.

    Where the block raises (a full disk, an interruption), or the process is killed, `path` is as it was before.
    """
    path = Path(path)
    partial = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        yield partial
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
