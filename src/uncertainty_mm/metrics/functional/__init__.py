r"""How good probabilities and uncertainties are, as functions that need only torch.

:mod:`uncertainty_mm.metrics` accumulates the same measures over batches and processes. Results are in float64 (float32
on a device that has none), and nan where a measure does not exist: no sample, or nothing to compare. Probabilities are
never logits: what is outside [0, 1] is an error.

All functions of labels take `unknown`, a bool tensor of their shape, True where a label is not known. The result is
that of the data without these entries, whatever stands there (NaN, or -1).

`validate_args` says whether values are looked at, for which an accelerator has to be waited for: None, on the CPU only;
False, never; True, everywhere. Where they are not, a label is present above 0.5, and what is not finite is left out,
like what is unknown.
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
