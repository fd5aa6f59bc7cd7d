"""Uncertainty-aware fusion of modalities for multi-label emotion recognition, as PyTorch layers and losses."""

from uncertainty_mm import functional
from uncertainty_mm.attention import EmotionQueryAttention
from uncertainty_mm.calibration import PlattScaling
from uncertainty_mm.contrastive import DistributionSupConLoss
from uncertainty_mm.correctness import CorrectnessTracker
from uncertainty_mm.fusion import FusedPrediction, UncertaintyGatedFusion
from uncertainty_mm.gaussian import DiagonalGaussian, GaussianDecoupler
from uncertainty_mm.ordinality import SoftRankOrdinalityLoss
from uncertainty_mm.queue import EmbeddingQueue

__version__ = "0.1.0"

__all__ = [
    "CorrectnessTracker",
    "DiagonalGaussian",
    "DistributionSupConLoss",
    "EmbeddingQueue",
    "EmotionQueryAttention",
    "FusedPrediction",
    "GaussianDecoupler",
    "PlattScaling",
    "SoftRankOrdinalityLoss",
    "UncertaintyGatedFusion",
    "functional",
]
