"""Data sets: what people have on disk, read into one form, and synthetic data whose uncertainty is known."""

from uncertainty_mm.data import transforms
from uncertainty_mm.data.convert.label_table import (
    M3ED_LABELS,
    MOSEI_LABELS,
    LabelTable,
    read_label_csv,
)
from uncertainty_mm.data.convert.m3ed import read_m3ed
from uncertainty_mm.data.convert.mmsa import read_mmsa
from uncertainty_mm.data.convert.tailor import read_tailor
from uncertainty_mm.data.dataset import (
    DatasetSummary,
    FeatureStatistics,
    ModalitySummary,
    MultimodalBatch,
    MultimodalDataset,
)
from uncertainty_mm.data.folder import read_folder, write_folder
from uncertainty_mm.data.npz import SPLITS, read_npz, write_npz
from uncertainty_mm.data.reading import Format, read
from uncertainty_mm.data.synthetic import (
    Posterior,
    SyntheticMMER,
    SyntheticModality,
    SyntheticSamples,
)

__all__ = [
    "M3ED_LABELS",
    "MOSEI_LABELS",
    "SPLITS",
    "DatasetSummary",
    "FeatureStatistics",
    "Format",
    "LabelTable",
    "ModalitySummary",
    "MultimodalBatch",
    "MultimodalDataset",
    "Posterior",
    "SyntheticMMER",
    "SyntheticModality",
    "SyntheticSamples",
    "read",
    "read_folder",
    "read_label_csv",
    "read_m3ed",
    "read_mmsa",
    "read_npz",
    "read_tailor",
    "transforms",
    "write_folder",
    "write_npz",
]
