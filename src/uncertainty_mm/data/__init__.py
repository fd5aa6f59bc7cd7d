"""Data sets: what people have on disk, read into one form, and synthetic data whose uncertainty is known."""

from uncertainty_mm.data.dataset import (
    DatasetSummary,
    ModalitySummary,
    MultimodalBatch,
    MultimodalDataset,
)
from uncertainty_mm.data.folder import read_folder, write_folder
from uncertainty_mm.data.npz import SPLITS, read_npz, write_npz
from uncertainty_mm.data.synthetic import (
    Posterior,
    SyntheticMMER,
    SyntheticModality,
    SyntheticSamples,
)

__all__ = [
    "SPLITS",
    "DatasetSummary",
    "ModalitySummary",
    "MultimodalBatch",
    "MultimodalDataset",
    "Posterior",
    "SyntheticMMER",
    "SyntheticModality",
    "SyntheticSamples",
    "read_folder",
    "read_npz",
    "write_folder",
    "write_npz",
]
