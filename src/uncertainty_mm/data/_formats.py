"""Recognises the format of a file by its first bytes, for error messages: :func:`format_of`."""

from __future__ import annotations

import zipfile
from os import PathLike

PICKLE, TORCH, OLD_TORCH = "a pickle", "a file of torch.save", "an old file of torch.save"

_LAST_OF_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # its magic number, pickled
_BEGINNINGS = (
    (b"\x1f\x8b", "a gzip file; unpack it"),
    (b"BZh", "a bzip2 file; unpack it"),
    (b"\xfd7zXZ\x00", "an xz file; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"MATLAB 7.3", "an HDF5 file of MATLAB"),
    (b"MATLAB 5.0", "a MATLAB file"),
    (b"\x93NUMPY", "a .npy file of NumPy"),
    (b"PAR1", "a Parquet file"),
    (b"SQLite format 3", "an SQLite file"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
    (b"<!DOCTYPE html", "a page of HTML, not the file itself"),
    (b"<!doctype html", "a page of HTML, not the file itself"),
    (b"<html", "a page of HTML, not the file itself"),
)
# Ends of names in a zip archive, and the formats that they reveal.
_MEMBERS = (
    ("/constants.pkl", "a TorchScript archive"),
    ("data.pkl", TORCH),
    (".npy", "a .npz archive of NumPy"),
    ("xl/workbook.xml", "an Excel workbook; export it as .csv"),
)


def format_of(path: str | PathLike[str]) -> str | None:
    """The format of a file in words, or None if it is not recognised."""
    with open(path, "rb") as file:
        head = file.read(512)
    for beginning, name in _BEGINNINGS:
        if head.startswith(beginning):
            return name
    if head.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except Exception:  # a damaged archive may raise anything
            return "a zip archive, damaged"
        for end, name in _MEMBERS:
            if any(member.endswith(end) for member in names):
                return name
        return "a zip archive; unpack it"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    if _LAST_OF_TORCH in head[:32]:
        return OLD_TORCH
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return PICKLE
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return "a file of safetensors"
    return None
