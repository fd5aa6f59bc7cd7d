"""Data sets: readers for common files, and synthetic data whose uncertainty is known."""

from uncertainty_mm.data import transforms as transforms
from uncertainty_mm.data._arrays import SPLITS
from uncertainty_mm.data.dataset import (
    DatasetSummary,
    FeatureStatistics,
    ModalitySummary,
    MultimodalBatch,
    MultimodalDataset,
)
from uncertainty_mm.data.folder import read_folder, write_folder
from uncertainty_mm.data.npz import read_npz, write_npz
from uncertainty_mm.data.reading import read
from uncertainty_mm.data.synthetic import (
    Posterior,
    SyntheticMMER,
    SyntheticModality,
    SyntheticSamples,
)

__all__ = [
    "SPLITS",
    "DatasetSummary",
    "FeatureStatistics",
    "ModalitySummary",
    "MultimodalBatch",
    "MultimodalDataset",
    "Posterior",
    "SyntheticMMER",
    "SyntheticModality",
    "SyntheticSamples",
    "read",
    "read_folder",
    "read_npz",
    "write_folder",
    "write_npz",
]
