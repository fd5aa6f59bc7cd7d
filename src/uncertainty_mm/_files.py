"""Writing files so that what was there before is not lost: :func:`replacing`."""

from __future__ import annotations

import os
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
