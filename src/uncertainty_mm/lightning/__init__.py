"""Parts for Lightning runs: data, training, calibration, safe checkpoints, predictions.

Each part works with any `LightningModule`. They need the extra `examples`.
"""

from uncertainty_mm.lightning.callbacks import DeterministicDropout, FiniteGuard, History
from uncertainty_mm.lightning.checkpoints import (
    MovableCheckpoint,
    Patience,
    UsageError,
    WholeCheckpointIO,
    read_checkpoint,
)
from uncertainty_mm.lightning.cli import run_command_line
from uncertainty_mm.lightning.data import MultimodalDataModule
from uncertainty_mm.lightning.module import (
    MultilabelModule,
    masked_bce,
    masked_mean,
    mean_over_known,
)
from uncertainty_mm.lightning.predictions import PredictionWriter
from uncertainty_mm.lightning.selection import OneStandardError

__all__ = [
    "DeterministicDropout",
    "FiniteGuard",
    "History",
    "MovableCheckpoint",
    "MultilabelModule",
    "MultimodalDataModule",
    "OneStandardError",
    "Patience",
    "PredictionWriter",
    "UsageError",
    "WholeCheckpointIO",
    "masked_bce",
    "masked_mean",
    "mean_over_known",
    "read_checkpoint",
    "run_command_line",
]
