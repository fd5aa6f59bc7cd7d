"""Measures the quality of probabilities and uncertainties over batches and processes, as `torchmetrics.Metric`.

The functions in :mod:`uncertainty_mm.metrics.functional` need only torch; the classes need torchmetrics,
which the extra `metrics` installs. They are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from uncertainty_mm.metrics import functional as functional

if TYPE_CHECKING:
    from uncertainty_mm.metrics.calibration import (
        MultilabelBrierDecomposition,
        MultilabelCalibrationError,
        MultilabelSmoothCalibrationError,
    )
    from uncertainty_mm.metrics.jaccard import SampleJaccard
    from uncertainty_mm.metrics.ranking import DetectionAUROC, FPRAtTPR, SpearmanCorrelation
    from uncertainty_mm.metrics.selective import (
        AUGRC,
        AURC,
        CoverageAtRisk,
        RiskAtCoverage,
        SelectiveF1,
    )

__all__ = [
    "AUGRC",
    "AURC",
    "CoverageAtRisk",
    "DetectionAUROC",
    "FPRAtTPR",
    "MultilabelBrierDecomposition",
    "MultilabelCalibrationError",
    "MultilabelSmoothCalibrationError",
    "RiskAtCoverage",
    "SampleJaccard",
    "SelectiveF1",
    "SpearmanCorrelation",
]

_FILES = ("calibration", "jaccard", "ranking", "selective")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for file in _FILES:
            module = import_module(f"{__name__}.{file}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
