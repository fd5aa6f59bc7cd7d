r"""Measures the quality of probabilities and uncertainties, with functions that need only torch.

:mod:`uncertainty_mm.metrics` accumulates the same measures over batches and processes. Results are in float64 (float32
on a device without it), and nan where a measure is undefined, as without samples. Probabilities are never logits, so
values outside [0, 1] are an error.

All functions of labels take `unknown`, a bool tensor of their shape, True where a label is not known. The result is
that of the data without these entries, whatever their values (NaN, or -1).

`validate_args` tells where values are checked: on the CPU only (None), never (False), or always (True), which stalls an
accelerator. Where values are not checked, a label above 0.5 counts as present, and values that are not finite are left
out as if unknown.
"""

from uncertainty_mm.metrics.functional.calibration import (
    BrierDecomposition,
    brier_decomposition,
    calibration_error,
    smooth_calibration_error,
)
from uncertainty_mm.metrics.functional.predictions import (
    joint_energy,
    modality_attribution,
    predictive_entropy,
    sample_jaccard,
)
from uncertainty_mm.metrics.functional.ranking import auroc, by_label, fpr_at_tpr, spearman
from uncertainty_mm.metrics.functional.selective import (
    RiskCoverage,
    augrc,
    coverage_at_risk,
    risk_at_coverage,
    risk_coverage,
    selective_f1,
)
from uncertainty_mm.metrics.functional.table import evaluate

__all__ = [
    "BrierDecomposition",
    "RiskCoverage",
    "augrc",
    "auroc",
    "brier_decomposition",
    "by_label",
    "calibration_error",
    "coverage_at_risk",
    "evaluate",
    "fpr_at_tpr",
    "joint_energy",
    "modality_attribution",
    "predictive_entropy",
    "risk_at_coverage",
    "risk_coverage",
    "sample_jaccard",
    "selective_f1",
    "smooth_calibration_error",
    "spearman",
]
