"""All measures in one table."""

from __future__ import annotations

import torch
from torch import Tensor

from uncertainty_mm.metrics._inputs import precision, predictions
from uncertainty_mm.metrics.functional.calibration import calibration_error
from uncertainty_mm.metrics.functional.predictions import entropy, sample_jaccard
from uncertainty_mm.metrics.functional.ranking import spearman
from uncertainty_mm.metrics.functional.selective import risk_coverage

__all__ = ["evaluate"]


def evaluate(
    probs: Tensor,
    labels: Tensor,
    threshold: float | Tensor,
    unknown: Tensor | None = None,
    *,
    validate_args: bool | None = None,
) -> dict[str, float | None]:
    r"""Computes a table of the usual measures of prediction and uncertainty for a whole data set.

    ========  ==========================================================================================================
    `Acc`     mean of :func:`sample_jaccard`, over the samples with any known label
    `P`       micro precision: the share of the predicted labels that are present; 0 where none is predicted
    `R`       micro recall: the share of the labels that are present that are predicted; 0 where none is present
    `miF1`    micro F1: :math:`2 P R / (P + R)`
    `mAP`     average precision, without interpolation, mean over the labels that some sample has
    `Brier`   mean of :math:`(p - y)^2` over all entries
    `ECE`     :func:`calibration_error`
    `AURC`    of :func:`risk_coverage`, from the entropy of a sample's labels and its error
    `rho`     :func:`spearman` of the same two
    ========  ==========================================================================================================

    The error of a sample is the mean of :math:`|p - y|` over its known labels, and its uncertainty the mean of their
    entropies. If all labels are known, this orders the samples as :func:`predictive_entropy` does.

    A sample without any label counts as 0 in `Acc` however well it is predicted. With one such sample among six, `Acc`
    is at most 0.833, even if P, R and F1 are all 1.

    Args:
        probs: Tensor (N, Q) of probabilities in [0, 1].
        labels: Tensor (N, Q) of 0 and 1, any real dtype.
        threshold: A label is predicted where its probability is above this, in [0, 1]: a number, or a tensor (Q,) or
            (1,).
        unknown: Bool tensor (N, Q), True where a label is not known.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        The measures by name, rounded to 4 digits; None where a measure is undefined.

    Raises:
        ValueError: If shapes or devices disagree, or values are out of range.
        TypeError: If a dtype is wrong.

    Example:
        >>> probs = torch.tensor([[0.9, 0.2], [0.4, 0.7], [0.1, 0.3]])
        >>> labels = torch.tensor([[1, 0], [0, 1], [0, 0]])
        >>> table = evaluate(probs, labels, threshold=0.5)
        >>> table["miF1"], table["Acc"]  # the third sample counts 0
        (1.0, 0.6667)
        >>> unknown = labels.sum(1, keepdim=True).expand(3, 2) == 0
        >>> evaluate(probs, labels, 0.5, unknown=unknown)["Acc"]
        1.0
    """
    accuracy = sample_jaccard(
        probs, labels, unknown, threshold=threshold, validate_args=validate_args
    )
    calibration = calibration_error(probs, labels, unknown, validate_args=False)
    p, present, known = predictions(probs, labels, unknown)
    predicted = (p > threshold) & known
    dtype = precision(p.device)
    hits, said, true = (x.sum().to(dtype) for x in (predicted & present, predicted, present))
    nothing = ~known.any()
    p, y, count = p.to(dtype), present.to(dtype), known.sum(1).to(dtype)
    error = (p - y).abs().sum(1) / count
    uncertainty = (entropy(p) * known).sum(1) / count  # nan, so left out, where nothing is known
    measures = {
        "Acc": accuracy.nanmean(),
        "P": (hits / said.clamp_min(1)).masked_fill(nothing, float("nan")),
        "R": (hits / true.clamp_min(1)).masked_fill(nothing, float("nan")),
        "miF1": (2 * hits / (said + true).clamp_min(1)).masked_fill(nothing, float("nan")),
        "mAP": _average_precision(p, present, known).nanmean(),
        "Brier": (p - y).square().sum() / count.sum(),
        "ECE": calibration,
        "AURC": risk_coverage(uncertainty, error, validate_args=False).aurc,
        "rho": spearman(uncertainty, error, validate_args=False),
    }
    values = {name: round(float(value.detach()), 4) for name, value in measures.items()}
    return {name: None if value != value else value for name, value in values.items()}


def _average_precision(probs: Tensor, present: Tensor, known: Tensor) -> Tensor:
    """Average precision (Q,), with equal probabilities at one rank; nan for a label that no sample has.

    It is the mean, over the samples with the label, of the precision among all samples at least as probable.
    """
    columns = probs.T.contiguous()

    def at_least(counted: Tensor) -> Tensor:
        ordered = probs.masked_fill(~counted, -1).T.sort(dim=1).values
        return len(probs) - torch.searchsorted(ordered.contiguous(), columns)

    share = at_least(present) / at_least(known).to(probs.dtype).clamp_min(1)
    return (share * present.T).sum(1) / present.sum(0)
