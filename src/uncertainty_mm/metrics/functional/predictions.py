"""Measures of single samples, from their predictions and in part from their labels."""

from __future__ import annotations

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_finite,
    check_missing,
    check_range,
    check_tensor,
    check_validate_args,
    checks_values,
)
from uncertainty_mm.metrics._inputs import (
    check_predictions,
    check_threshold,
    precision,
    predictions,
)

__all__ = ["joint_energy", "modality_attribution", "predictive_entropy", "sample_jaccard"]


def sample_jaccard(
    probs: Tensor,
    labels: Tensor,
    unknown: Tensor | None = None,
    *,
    threshold: float | Tensor = 0.5,
    validate_args: bool | None = None,
) -> Tensor:
    r"""Jaccard index of predicted and true label set of every sample; its mean is often called accuracy.

    .. math::
        J_i = \frac{|y_i \wedge \hat y_i|}{\max(|y_i \vee \hat y_i|, 1)}, \qquad \hat y_i = [p_i > t]

    It is 0, not 1, if both sets are empty, as in `sklearn.metrics.jaccard_score(..., average="samples",
    zero_division=0)`. (`torchmetrics.functional.jaccard_index` averages over labels, not over samples.)

    Args:
        probs: Tensor (N, Q) of probabilities in [0, 1].
        labels: Tensor (N, Q) of 0 and 1, any real dtype.
        unknown: Bool tensor (N, Q), True where a label is not known: it is in neither set.
        threshold: A label is predicted where its probability is above this, in [0, 1]: a number, or a tensor (Q,) or
            (1,).
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        Tensor (N,) in [0, 1]; nan for a sample without known labels, so take the mean with `.nanmean()`.

    Raises:
        ValueError: If shapes or devices disagree, or values are out of range.
        TypeError: If a dtype is wrong.

    Example:
        >>> probs = torch.tensor([[0.9, 0.6, 0.1], [0.2, 0.3, 0.1]])
        >>> sample_jaccard(probs, torch.tensor([[1, 0, 0], [0, 0, 0]]))
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    check_predictions(probs, labels, unknown, validate_args)
    check_threshold(threshold, probs, validate_args)
    probs, present, known = predictions(probs, labels, unknown)
    predicted = (probs > threshold) & known
    union = (predicted | present).sum(1).to(precision(probs.device)).clamp_min(1)
    return ((predicted & present).sum(1) / union).masked_fill(~known.any(1), float("nan"))


def predictive_entropy(probs: Tensor, *, validate_args: bool | None = None) -> Tensor:
    r"""Entropy of the predicted labels, treated as independent: the usual uncertainty of a multi-label prediction.

    .. math::
        H_i = -\sum_q p_{iq} \ln p_{iq} + (1 - p_{iq}) \ln(1 - p_{iq})

    Args:
        probs: Tensor (N, Q) of probabilities in [0, 1]; 0 and 1 contribute 0.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        Tensor (N,) in nats, in [0, Q ln 2].

    Raises:
        ValueError: If the shape is wrong or values are out of range.
        TypeError: If the dtype is wrong.

    Example:
        >>> predictive_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([1.3863, 0.0000], dtype=torch.float64)
    """
    check_validate_args(validate_args)
    check_tensor("probs", probs, "floating", "N Q", {})
    if checks_values(probs, validate_args):
        check_range("probs", probs, 0, 1)
    return entropy(probs).sum(1)


def entropy(probs: Tensor) -> Tensor:
    p = probs.to(precision(probs.device))
    entropy: Tensor = torch.special.entr(p) - torch.special.xlog1py(1 - p, -p)
    return entropy


def joint_energy(logits: Tensor, *, validate_args: bool | None = None) -> Tensor:
    r"""Measures how familiar an input looks: large if some label is clearly present, near 0 if all are clearly absent.

    .. math::
        E_i = \sum_q \ln(1 + e^{z_{iq}})

    The energies of all labels are added, with the sign of the paper's score, so that familiar input has larger values
    than foreign input. Its negative is an uncertainty, as in `auroc(-joint_energy(logits), foreign)`.

    Source: Wang et al. 2021, arXiv 2109.14162.

    Args:
        logits: Tensor (N, Q) of finite logits.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        Tensor (N,), at least 0.

    Raises:
        ValueError: If the shape is wrong or a logit is not finite.
        TypeError: If the dtype is wrong.

    Example:
        >>> joint_energy(torch.tensor([[4.0, -4.0], [-3.0, -4.0]]))
        tensor([4.0363, 0.0667], dtype=torch.float64)
    """
    check_validate_args(validate_args)
    check_tensor("logits", logits, "floating", "N Q", {})
    if checks_values(logits, validate_args):
        check_finite("logits", logits)
    z = logits.to(precision(logits.device))
    return torch.logaddexp(z, torch.zeros_like(z)).sum(1)


def modality_attribution(
    sizes: Tensor, missing: Tensor | None = None, *, validate_args: bool | None = None
) -> Tensor:
    r"""Share of each modality in a result that weights modalities by their precision.

    .. math::
        a_{im} = \frac{s_{im}^{-2}}{\sum_{m'} s_{im'}^{-2}} \quad \text{over the modalities present}

    These are the weights of the best unbiased combination of independent measurements with standard deviations
    :math:`s`.

    To average over samples, take samples with the same modalities, or all samples, with 0 for missing modalities. If
    each modality is averaged over the samples that have it, the shares do not add up to 1.

    Args:
        sizes: Tensor (B, M), above 0: the size of the uncertainty of each modality, such as the norm of its standard
            deviations. Only ratios within a row matter.
        missing: Bool tensor (B, M), True where a modality is missing. Values there are ignored.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Returns:
        Tensor (B, M) whose rows sum to 1, with 0 for missing modalities; all 0 if all are missing.

    Raises:
        ValueError: If shapes or devices disagree, or a size is not finite or not above 0.
        TypeError: If a dtype is wrong.

    Example:
        >>> missing = torch.tensor([[False, False, True]])
        >>> modality_attribution(torch.tensor([[1.0, 2.0, 0.1]]), missing)
        tensor([[0.8000, 0.2000, 0.0000]], dtype=torch.float64)
    """
    check_validate_args(validate_args)
    dims: dict[str, int] = {}
    check_tensor("sizes", sizes, "floating", "B M", dims)
    check_missing(missing, dims, sizes.device)
    left_out = torch.zeros_like(sizes, dtype=torch.bool) if missing is None else missing
    if checks_values(sizes, validate_args):
        check_finite("sizes", sizes, missing)
        kept = sizes[~left_out]
        if (kept <= 0).any():
            raise ValueError(f"Expected `sizes` to be above 0, but got {kept.min().item()}")
    dtype = precision(sizes.device)
    size = sizes.to(dtype).masked_fill(left_out, float("inf"))
    if size.shape[1] == 0:
        return size
    smallest = size.amin(1, keepdim=True).clamp_max(torch.finfo(dtype).max)
    share = (smallest / size).square()  # at most 1; 0 where the size is infinite
    return share / share.sum(1, keepdim=True).clamp_min(1)
