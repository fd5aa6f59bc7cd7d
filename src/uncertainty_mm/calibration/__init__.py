"""Calibrates the output of a trained model to probabilities that match frequencies, and chooses decision thresholds.

Each method has its own file, and is fitted by `fit(logits or probs, labels)` to samples that the model was not
trained on.
"""

from uncertainty_mm.calibration.beta import BetaCalibration
from uncertainty_mm.calibration.histogram import HistogramBinning
from uncertainty_mm.calibration.isotonic import IsotonicCalibration
from uncertainty_mm.calibration.platt import PlattScaling
from uncertainty_mm.calibration.pool import LogitPool
from uncertainty_mm.calibration.temperature import TemperatureScaling
from uncertainty_mm.calibration.threshold import best_threshold, expected_threshold

__all__ = [
    "BetaCalibration",
    "HistogramBinning",
    "IsotonicCalibration",
    "LogitPool",
    "PlattScaling",
    "TemperatureScaling",
    "best_threshold",
    "expected_threshold",
]
