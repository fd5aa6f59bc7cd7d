"""Measures as torchmetrics classes; their functional half, `uncertainty_mm.metrics.functional`, needs torch alone."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = [
    "AURC",
    "DetectionAUROC",
    "MultilabelBrierDecomposition",
    "MultilabelCalibrationError",
    "SampleJaccard",
    "SpearmanCorrelation",
]


def __getattr__(name: str) -> Any:
    """Imports the classes, and with them torchmetrics, when one of them is asked for."""
    if name in __all__:
        return getattr(import_module("uncertainty_mm.metrics.classes"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
