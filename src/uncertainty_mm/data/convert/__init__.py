"""Readers for foreign files; `python -m` of this package converts them to the layouts of :mod:`uncertainty_mm.data`."""

from uncertainty_mm.data.convert.label_table import (
    M3ED_LABELS,
    MOSEI_LABELS,
    LabelTable,
    read_label_csv,
)
from uncertainty_mm.data.convert.m3ed import read_m3ed
from uncertainty_mm.data.convert.mmsa import read_mmsa
from uncertainty_mm.data.convert.tailor import read_tailor

__all__ = [
    "M3ED_LABELS",
    "MOSEI_LABELS",
    "LabelTable",
    "read_label_csv",
    "read_m3ed",
    "read_mmsa",
    "read_tailor",
]
