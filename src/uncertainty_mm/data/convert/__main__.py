"""Converts a foreign file once, so that it does not have to be read, or trusted, again.

.. code-block:: console

    $ python -m uncertainty_mm.data.convert unaligned_50.pkl mosei.npz --labels label.csv
    $ python -m uncertainty_mm.data.convert m3ed.pkl m3ed     # a folder of memory maps

Only torch and NumPy are needed. Any problem with a file is reported in one line on stderr with exit code 2, and leaves
nothing half-written.
"""

from __future__ import annotations

import argparse
import errno
import os
import pickletools
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from uncertainty_mm.data._formats import OLD_TORCH, PICKLE, TORCH, format_of
from uncertainty_mm.data._sequences import Invalid, Padding, need
from uncertainty_mm.data.convert.m3ed import read_m3ed
from uncertainty_mm.data.convert.mmsa import read_mmsa
from uncertainty_mm.data.convert.tailor import read_tailor
from uncertainty_mm.data.dataset import MultimodalDataset
from uncertainty_mm.data.folder import write_folder
from uncertainty_mm.data.npz import write_npz

Parts = dict[str, MultimodalDataset]
# Reader of each layout, and the options that it takes in addition to `invalid`.
_READERS: dict[str, tuple[Callable[..., Parts], set[str]]] = {
    "mmsa": (read_mmsa, {"labels", "label_names", "padding"}),
    "tailor": (read_tailor, {"label_names", "padding"}),
    "m3ed": (read_m3ed, set()),
    "m3ed-dialogue": (lambda path, **options: read_m3ed(path, "dialogue", **options), set()),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m uncertainty_mm.data.convert",
        description="Converts features of MMSA, MulT, LDDU, TAILOR, CARAT or M3ED. "
        "Pickles are read without running code in them.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="the file to read")
    parser.add_argument(
        "target", type=Path, metavar="OUT", help="a file .npz, or a folder for memory-mapped arrays"
    )
    parser.add_argument(
        "--format",
        choices=["auto", *_READERS],
        default="auto",
        help="the layout of IN; auto: as its first bytes say, M3ED as utterances",
    )
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="emotions, .csv or .pt, for the layout mmsa"
    )
    parser.add_argument(
        "--label-names",
        type=lambda text: text.split(","),
        metavar="A,B,...",
        help="labels in the order wanted",
    )
    parser.add_argument("--padding", choices=get_args(Padding), help="where the masks come from")
    parser.add_argument(
        "--invalid",
        choices=get_args(Invalid),
        default="step",
        help="what a number that is not finite costs (default: step)",
    )
    return parser


def _layout(path: Path) -> str:
    """The layout of a file by its first bytes; M3ED's source is a list, all others are dicts."""
    found = format_of(path)
    if found in (TORCH, OLD_TORCH):
        return "tailor"
    need(
        found in (None, PICKLE), path, f"neither a pickle nor a file of torch.save (it is {found})"
    )
    with open(path, "rb") as file:
        try:
            names = (code.name for code, _, _ in pickletools.genops(file))
            first = next(name for name in names if name not in ("PROTO", "FRAME", "MARK"))
        except (ValueError, StopIteration):
            first = ""  # not a pickle, which its reader reports
    return "m3ed" if first in ("EMPTY_LIST", "LIST") else "mmsa"


def _check_target(target: Path, read: Sequence[Path]) -> None:
    """Raises if the target cannot be written, before a long time of reading."""
    if target.exists():
        for path in read:
            need(not path.exists() or not target.samefile(path), target, "is what is read")
    need(target.suffix in ("", ".npz"), target, "must be a file .npz, or a folder without a suffix")
    parent = target.parent
    need(parent.is_dir(), target, f"there is no folder {parent}")
    if not os.access(parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))
    if target.suffix:
        need(not target.is_dir(), target, "is a folder")
    elif target.exists():
        need(target.is_dir() and not any(target.iterdir()), target, "is there already")


def convert(
    source: Path, target: Path, layout: str, options: dict[str, Any]
) -> tuple[Parts, list[str]]:
    """Reads and writes; returns the data sets and the warnings about them."""
    _check_target(target, [source, *([options["labels"]] if "labels" in options else [])])
    read, known = _READERS[_layout(source) if layout == "auto" else layout]
    for name in options.keys() - known - {"invalid"}:
        raise ValueError(f"--{name.replace('_', '-')} has no meaning for this layout")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = read(source, **options)
        write: Callable[..., None] = write_npz if target.suffix else write_folder
        write(parts, target)
    return parts, [str(each.message) for each in caught]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with code 2 if files or options cannot be used."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    source, target, layout = (options.pop(name) for name in ("source", "target", "format"))
    options = {name: value for name, value in options.items() if value is not None}
    try:
        parts, warned = convert(source, target, layout, options)
    except FileNotFoundError as error:
        parser.error(f"{error.filename or error}: no such file")
    except OSError as error:  # such as a full disk
        parser.error(f"{error.filename or target}: {error.strerror or error}")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    except MemoryError:
        parser.error(f"{source}: not enough memory")
    except (TypeError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    for message in warned:
        print(f"warning: {message}", file=sys.stderr)
    for split, data in parts.items():
        print(f"{split}: {data.summary()}")
    print(f"{source} -> {target}")


if __name__ == "__main__":
    main()
