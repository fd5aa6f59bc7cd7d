"""From the output of a trained model to probabilities that mean what they say, and where to cut them.

One file a method; all are fitted on samples that the model was not trained on, by `fit(logits or probs, labels)`.
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
