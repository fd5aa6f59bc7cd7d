"""Uncertainty-aware fusion of modalities for multi-label emotion recognition, as PyTorch layers and losses."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from uncertainty_mm import functional
from uncertainty_mm.accuracy_uncertainty import AccuracyUncertaintyLoss
from uncertainty_mm.attention import EmotionQueryAttention
from uncertainty_mm.beliefs import BeliefFusion, FusedBelief
from uncertainty_mm.calibration import (
    BetaCalibration,
    HistogramBinning,
    IsotonicCalibration,
    LogitPool,
    PlattScaling,
    TemperatureScaling,
)
from uncertainty_mm.conflict import Conflict
from uncertainty_mm.conformal import ConformalRiskControl
from uncertainty_mm.contrastive import DistributionSupConLoss
from uncertainty_mm.correctness import CorrectnessTracker
from uncertainty_mm.decisions import DecisionFusion, FusedDecision
from uncertainty_mm.evidence import BetaEvidenceLoss
from uncertainty_mm.fusion import FusedPrediction, UncertaintyGatedFusion
from uncertainty_mm.gaussian import DiagonalGaussian, GaussianDecoupler
from uncertainty_mm.monotone import MonotoneConfidenceLoss
from uncertainty_mm.ordinality import SoftRankOrdinalityLoss
from uncertainty_mm.queue import EmbeddingQueue
from uncertainty_mm.ranking import CorrectnessRankingLoss
from uncertainty_mm.rules import FusedGaussian, GaussianFusion
from uncertainty_mm.typicality import Typicality

if TYPE_CHECKING:
    from uncertainty_mm import data as data
    from uncertainty_mm import encoder as encoder
    from uncertainty_mm import metrics as metrics
    from uncertainty_mm import plots as plots

__version__ = "0.1.0"

__all__ = [
    "AccuracyUncertaintyLoss",
    "BeliefFusion",
    "BetaCalibration",
    "BetaEvidenceLoss",
    "Conflict",
    "ConformalRiskControl",
    "CorrectnessRankingLoss",
    "CorrectnessTracker",
    "DecisionFusion",
    "DiagonalGaussian",
    "DistributionSupConLoss",
    "EmbeddingQueue",
    "EmotionQueryAttention",
    "FusedBelief",
    "FusedDecision",
    "FusedGaussian",
    "FusedPrediction",
    "GaussianDecoupler",
    "GaussianFusion",
    "HistogramBinning",
    "IsotonicCalibration",
    "LogitPool",
    "MonotoneConfidenceLoss",
    "PlattScaling",
    "SoftRankOrdinalityLoss",
    "TemperatureScaling",
    "Typicality",
    "UncertaintyGatedFusion",
    "functional",
]

# Imported on first use, because they take time or need an extra.
_ROOMS = ("data", "encoder", "metrics", "plots")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
