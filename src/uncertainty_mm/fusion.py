"""Two classifiers mixed by uncertainty (Eq. 8-9): :class:`UncertaintyGatedFusion`."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncertainty_mm._checks import (
    check_choice,
    check_dropout,
    check_flag,
    check_positive_int,
    check_positive_ints,
    check_range,
    check_tensor,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import Component
from uncertainty_mm.functional import at_least_float32
from uncertainty_mm.gaussian import DiagonalGaussian, check_latent


class FusedPrediction(NamedTuple):
    """The result of :class:`UncertaintyGatedFusion`; each tensor has shape (B, Q) and is in at least float32.

    Attributes:
        logits: Logits of the mixture; `F.binary_cross_entropy_with_logits(logits, y)` is Eq. 9.
        mean_logits: Logits of the classifier of the means.
        std_logits: Logits of the classifier of the standard deviations.
        mean_weight: Weight of the classifier of the means in the mixture, in [0, 1].
    """

    logits: Tensor
    mean_logits: Tensor
    std_logits: Tensor
    mean_weight: Tensor

    @property
    def probs(self) -> Tensor:
        """Probabilities of the mixture (Eq. 8), shape (B, Q)."""
        return self.logits.sigmoid()


class UncertaintyGatedFusion(Component):
    r"""Predicts once from the means and once from the standard deviations, and mixes both by uncertainty.

    For each label the Gaussians of all modalities are multiplied (:meth:`~uncertainty_mm.DiagonalGaussian.product`), so
    that a modality is weighted by its precision. One network classifies the mean of the product and another one its
    standard deviation; both are shared by the labels. With their logits :math:`a` and :math:`b`

    .. math::
        p = w\, \operatorname{sigmoid}(a) + (1 - w) \operatorname{sigmoid}(b) \qquad \text{(Eq. 8)}

    where :math:`w` is 1 - uncertainty (`"certainty"`: an uncertain sample is judged by its standard deviation, as the
    paper's text argues) or the uncertainty itself (`"uncertainty"`: Eq. 8 as printed; text and equation disagree). The
    output is the logit of this mixture, computed in log space:

    .. math::
        \log \frac{p}{1 - p} =
        \log\bigl(w \varsigma(a) + (1 - w) \varsigma(b)\bigr) - \log\bigl(w \varsigma(-a) + (1 - w) \varsigma(-b)\bigr)

    The prior in the product has a learned mean for each label, which is the expectation when nothing was seen.

    With the usual gate, :func:`~uncertainty_mm.functional.expected_distance` in [0, 0.5], and `"certainty"`, the
    standard deviations never outweigh the means; with `2 * expected_distance(probs)`, in [0, 1], they can.

    The classifier of the standard deviations learns to tell present from absent labels. Its gradient would turn them
    into a second mean, for example large where a label is present, whatever the noise. With `detach_std` it reads them
    without changing them.

    The paper concatenates the means of all modalities, and likewise the standard deviations, instead of multiplying,
    and lets the gradient through: `combine="concat", detach_std=False`.

    Source: Huang et al. 2025, arXiv 2502.13954, section 3.4.1; the product and `detach_std` are not in it.

    Args:
        num_modalities: Number of modalities :math:`M`.
        num_labels: Number of labels :math:`Q`.
        latent_dim: Number of latent dimensions :math:`K`.
        hidden_dim: Size of the hidden layer of both classifiers.
        dropout: Dropout probability after the hidden layer.
        mean_weight: `"certainty"` or `"uncertainty"`, see above.
        combine: How the modalities are combined: `"product"` or `"concat"` (the paper).
        detach_std: Stop the gradient from the second classifier to the standard deviations.
        validate_args: Check values (NaN, uncertainty out of [0, 1]) on the CPU only (None), never (False), or always
            (True), which stalls an accelerator. If unchecked, an uncertainty is clamped to [0, 1].

    Attributes:
        mean_head: The classifier of the means.
        std_head: The classifier of the standard deviations.
        prior_mean: With `"product"`, the mean of the prior of every label, (Q, K), initially 0.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> fusion = UncertaintyGatedFusion(num_modalities=3, num_labels=6, latent_dim=64)
        >>> latent = DiagonalGaussian(torch.randn(4, 3, 6, 64), torch.ones(4, 3, 6, 64))
        >>> prediction = fusion(latent, uncertainty=torch.rand(4, 6))
        >>> prediction.probs.shape
        torch.Size([4, 6])
        >>> labels = torch.ones(4, 6)
        >>> loss = F.binary_cross_entropy_with_logits(prediction.logits, labels)  # Eq. 9
    """

    num_modalities: int
    num_labels: int
    latent_dim: int
    mean_weight: Literal["certainty", "uncertainty"]
    combine: Literal["product", "concat"]
    detach_std: bool
    validate_args: bool | None

    def __init__(
        self,
        num_modalities: int,
        num_labels: int,
        latent_dim: int,
        *,
        hidden_dim: int = 128,
        dropout: float = 0.1,
        mean_weight: Literal["certainty", "uncertainty"] = "certainty",
        combine: Literal["product", "concat"] = "product",
        detach_std: bool = True,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_positive_ints(
            num_modalities=num_modalities, num_labels=num_labels, latent_dim=latent_dim
        )
        check_positive_int("hidden_dim", hidden_dim)
        check_dropout(dropout)
        check_choice("mean_weight", mean_weight, ("certainty", "uncertainty"))
        check_choice("combine", combine, ("concat", "product"))
        check_flag("detach_std", detach_std)
        check_validate_args(validate_args)
        self._set(
            num_modalities=num_modalities,
            num_labels=num_labels,
            latent_dim=latent_dim,
            mean_weight=mean_weight,
            combine=combine,
            detach_std=detach_std,
            validate_args=validate_args,
        )

        def head() -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(latent_dim * (num_modalities if combine == "concat" else 1), hidden_dim),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(hidden_dim, 1),
            )

        if combine == "product":
            self.prior_mean = nn.Parameter(torch.zeros(num_labels, latent_dim))
        self.mean_head = head()
        self.std_head = head()

    def reset_parameters(self) -> None:
        """Gives all parameters their initial distribution; the mean of the prior is 0."""
        super().reset_parameters()
        if self.combine == "product":
            nn.init.zeros_(self.prior_mean)

    def forward(
        self, latent: DiagonalGaussian, uncertainty: Tensor, missing: Tensor | None = None
    ) -> FusedPrediction:
        """Predicts every label.

        Args:
            latent: Gaussians of shape (B, M, Q, K). In a product, an infinite standard deviation counts as missing.
            uncertainty: Tensor (B,) or (B, Q) in [0, 1], such as :func:`~uncertainty_mm.functional.expected_distance`
                of a first prediction, or twice that (see above).
            missing: Bool tensor (B, M), True where a modality is missing. It then contributes nothing to either
                classifier.

        Returns:
            The logits of the mixture and of both classifiers, and the weight of the first classifier.

        Raises:
            ValueError: If shapes or devices disagree, or values are out of range.
            TypeError: If a dtype is wrong.
        """
        sizes = {"M": self.num_modalities, "Q": self.num_labels, "K": self.latent_dim}
        product = self.combine == "product"
        check_latent(latent, missing, sizes, self.validate_args, infinite=product)
        per_sample = isinstance(uncertainty, Tensor) and uncertainty.dim() == 1
        check_tensor(
            "uncertainty",
            uncertainty,
            "floating",
            "B" if per_sample else "B Q",
            sizes,
            latent.mean.device,
        )
        if checks_values(uncertainty, self.validate_args):
            check_range("uncertainty", uncertainty, 0, 1)
        if product:
            latent = latent._product(missing, self.prior_mean)
            latent, missing = DiagonalGaussian(*(x.unsqueeze(1) for x in latent)), None
        mean_logits = self._classify(self.mean_head, latent.mean, missing)
        std = latent.std.detach() if self.detach_std else latent.std
        std_logits = self._classify(self.std_head, std, missing)
        uncertainty = uncertainty.to(mean_logits.dtype).clamp(0, 1)  # where values are not checked
        uncertainty = (uncertainty.unsqueeze(1) if per_sample else uncertainty).expand_as(
            mean_logits
        )
        if self.mean_weight == "uncertainty":
            weight, logits = uncertainty, _mixture_logits(mean_logits, std_logits, uncertainty)
        else:  # swapped, so that the weight is exact even where 1 - uncertainty rounds to 1
            weight, logits = 1 - uncertainty, _mixture_logits(std_logits, mean_logits, uncertainty)
        return FusedPrediction(logits, mean_logits, std_logits, weight)

    @staticmethod
    def _classify(head: nn.Sequential, parts: Tensor, missing: Tensor | None) -> Tensor:
        if missing is not None:
            parts = parts.masked_fill(missing[:, :, None, None], 0)
        logits: Tensor = head(parts.transpose(1, 2).flatten(2)).squeeze(-1)
        return at_least_float32(logits)


def _mixture_logits(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Logit of weight * sigmoid(a) + (1 - weight) * sigmoid(b), exact for any logits and any weight in [0, 1].

    log(weight) has no gradient at 0, although the mixture has one: (sigmoid(a) - sigmoid(b)) / (p (1 - p)). So the
    weight is a constant inside the logarithms, and its gradient is added as the slope of a term whose value is 0.
    Second derivatives with respect to the weight are therefore not those of the mixture.
    """
    fixed = weight.detach()
    log_w, log_1_w = fixed.log(), torch.log1p(-fixed)
    log_p = torch.logaddexp(log_w + F.logsigmoid(a), log_1_w + F.logsigmoid(b))
    log_1_p = torch.logaddexp(log_w + F.logsigmoid(-a), log_1_w + F.logsigmoid(-b))
    logits = log_p - log_1_p
    if not weight.requires_grad:
        return logits
    with torch.no_grad():
        # for a > b: sigmoid(a) - sigmoid(b) = (1 - exp(b - a)) sigmoid(a) sigmoid(-b)
        log_difference = (
            torch.log(-torch.expm1(-(a - b).abs()))
            + F.logsigmoid(torch.maximum(a, b))
            + F.logsigmoid(-torch.minimum(a, b))
        )
        slope = torch.sign(a - b) * torch.exp(log_difference - log_p - log_1_p)
        # NaN if both are infinite, or beyond the range of the dtype
        slope = slope.nan_to_num().clamp(-1e15, 1e15)
    return logits + (weight - fixed) * slope
