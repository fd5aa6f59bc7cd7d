"""Six rules to fuse the Gaussians of all modalities into one: :class:`GaussianFusion`."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncertainty_mm._checks import (
    check_choice,
    check_like_parameters,
    check_positive_int,
    check_validate_args,
)
from uncertainty_mm._component import Component
from uncertainty_mm.functional import at_least_float32
from uncertainty_mm.gaussian import DiagonalGaussian, check_latent

Rule = Literal[
    "product",
    "generalized_product",
    "mixture",
    "mixture_of_products",
    "barycenter",
    "norm_weighted",
]

# Rules that ignore an infinite standard deviation; with the others it would make the result infinite.
_DISCOUNTS = ("product", "generalized_product", "norm_weighted")
_MOST_MODALITIES = 8  # for a mixture of products, which has 2^M - 1 parts


class FusedGaussian(NamedTuple):
    """The result of :class:`GaussianFusion`.

    Attributes:
        mean: Tensor (B, Q, K), the mean.
        std: Tensor (B, Q, K), the standard deviation.
        weights: Tensor (B, M, Q), the weight of each modality, averaged over the latent dimensions, in at least
            float32; 0 where it is missing. They sum to 1 over the modalities present (in a product, to 1 minus the
            weight of the prior), and to 0 where all are missing.
    """

    mean: Tensor
    std: Tensor
    weights: Tensor


class GaussianFusion(Component):
    r"""Fuses the Gaussians of all modalities into one; the rules differ in how they treat disagreement and repetition.

    With :math:`P` modalities present and precisions :math:`\tau_m = \sigma_m^{-2}`, in each latent dimension:

    - `"product"` of all modalities and the prior :math:`\mathcal N(0, 1)`, where each counts as new evidence:
      :math:`\tau = 1 + \sum_m \tau_m,\ \mu = \tau^{-1} \sum_m \tau_m \mu_m`; `weights` are :math:`\tau_m / \tau`, and
      the prior has the rest.
    - `"generalized_product"`, without prior: :math:`\tau = \sum_m \alpha_m \tau_m,
      \mu = \tau^{-1} \sum_m \alpha_m \tau_m \mu_m` with `weights` :math:`\alpha_m` that sum to 1, equal or learned.
    - `"mixture"`: mean and standard deviation of a modality drawn at random with :math:`w_m = 1 / P`:
      :math:`\mu = \sum_m w_m \mu_m,\ \sigma^2 = \sum_m w_m (\sigma_m^2 + (\mu_m - \mu)^2)`.
    - `"mixture_of_products"`: a mixture of the products, without prior, of all :math:`2^P - 1` non-empty subsets with
      equal weights; `weights` are the mean shares :math:`\tau_m / \sum_{n \in S} \tau_n` of precision.
    - `"barycenter"` of the 2-Wasserstein distance: :math:`\mu = \sum_m \mu_m / P,\ \sigma = \sum_m \sigma_m / P`.
    - `"norm_weighted"`: a mixture with :math:`w_m \propto 1 / \lVert \sigma_m \rVert_2`, the norm over the latent
      dimensions.

    The order of modalities does not matter, missing modalities are ignored, and without any modality the result is
    :math:`\mathcal N(0, 1)`. A single modality is returned unchanged, except by `"product"`, which has a prior. Only
    the two mixtures and `"norm_weighted"` reflect conflict: they give a larger standard deviation for +3 and -3 than
    for +3 and +3.

    Source: Hinton 2002, doi 10.1162/089976602760128018 (product); Cao and Fleet 2014, arXiv 1410.7827 (generalised
    product; unlike here, their weights depend on the input); Shi et al. 2019, arXiv 1911.03393 (mixture); Sutter et al.
    2021, arXiv 2105.02470 (mixture of products); Agueh and Carlier 2011, doi 10.1137/100805741 (barycentre);
    Tellamekala et al. 2023, arXiv 2206.05833 (weights by the norm).

    Args:
        rule: One of the six rules.
        num_modalities: Number of modalities :math:`M`; None for any. If given, the weights of `"generalized_product"`
            are learned, starting from equal weights.
        num_labels: Number of labels :math:`Q`; None for any, and for learned weights shared by the labels.
        latent_dim: Number of latent dimensions :math:`K`; None for any, and for learned weights shared by them.
        validate_args: Check values (NaN, a negative standard deviation) on the CPU only (None), never (False), or
            always (True), which stalls an accelerator.

    Attributes:
        weight_logits: Logits of learned weights, a parameter (M, Q, K), with 1 for each size that is not given.

    Raises:
        ValueError: If `rule` is unknown, a size is not above 0, there are more than 8 modalities for a mixture of
            products, or `"generalized_product"` is given `num_labels` or `latent_dim` without `num_modalities`.
        TypeError: If an argument has the wrong type.

    Example:
        >>> std = torch.ones(1, 2, 1, 1)
        >>> agree = torch.tensor([3.0, 3.0]).view(1, 2, 1, 1)
        >>> differ = torch.tensor([3.0, -3.0]).view(1, 2, 1, 1)
        >>> fusion = GaussianFusion("mixture")
        >>> [fusion(DiagonalGaussian(mean, std)).std for mean in (agree, differ)]
        [tensor([[[1.]]]), tensor([[[3.1623]]])]
        >>> fusion(DiagonalGaussian(differ, std), torch.tensor([[False, True]])).mean
        tensor([[[3.]]])
    """

    rule: Rule
    num_modalities: int | None
    num_labels: int | None
    latent_dim: int | None
    validate_args: bool | None

    def __init__(
        self,
        rule: Rule,
        num_modalities: int | None = None,
        num_labels: int | None = None,
        latent_dim: int | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_choice("rule", rule, get_args(Rule))
        sizes = {
            "num_modalities": num_modalities,
            "num_labels": num_labels,
            "latent_dim": latent_dim,
        }
        for name, size in sizes.items():
            if size is not None:
                check_positive_int(name, size)
        check_validate_args(validate_args)
        self._set(rule=rule, **sizes, validate_args=validate_args)
        if num_modalities is not None:
            self._check_modalities("num_modalities", num_modalities)
        elif rule == "generalized_product" and (num_labels, latent_dim) != (None, None):
            raise ValueError(
                "Expected `num_modalities` along with `num_labels` or `latent_dim`, since weights are learned "
                "for each modality, but got None"
            )
        if rule == "generalized_product" and num_modalities is not None:
            shape = num_modalities, num_labels or 1, latent_dim or 1
            self.weight_logits = nn.Parameter(torch.zeros(shape))

    def reset_parameters(self) -> None:
        """Makes learned weights equal."""
        for logits in self.parameters():
            nn.init.zeros_(logits)

    def forward(self, latent: DiagonalGaussian, missing: Tensor | None = None) -> FusedGaussian:
        """Fuses the modalities of every label.

        Args:
            latent: Gaussians of shape (B, M, Q, K). A standard deviation of 0 is allowed; where precisions count it has
                an infinite one, so that only modalities with 0 count. An infinite standard deviation is ignored by
                `"product"` and `"generalized_product"` (in its dimension) and by `"norm_weighted"` (in all), and
                refused by the other rules.
            missing: Bool tensor (B, M), True where a modality is missing. Values there are ignored.

        Returns:
            Mean and standard deviation in the dtypes of `latent`, computed in at least float32, and the weights.

        Raises:
            ValueError: If shapes or devices disagree, there is no modality or more than 8 for a mixture of products, a
                mean is not finite, or `std` is negative, NaN, or infinite where that is refused.
            TypeError: If a dtype is wrong.
        """
        named = {"M": self.num_modalities, "Q": self.num_labels, "K": self.latent_dim}
        sizes = {name: size for name, size in named.items() if size is not None}
        infinite = self.rule in _DISCOUNTS
        check_latent(latent, missing, sizes, self.validate_args, infinite=infinite)
        self._check_modalities("latent", sizes["M"])
        mean, std = at_least_float32(latent.mean), at_least_float32(latent.std)
        counted = torch.ones_like(mean[:, :, :1, :1], dtype=torch.bool)
        if missing is not None:
            counted = ~missing[:, :, None, None]
        if self.rule == "norm_weighted":
            counted = counted & (std < math.inf).all(-1, keepdim=True)
        elif infinite:
            counted = counted & (std < math.inf)
        mean, std = mean.masked_fill(~counted, 0), std.masked_fill(~counted, 1)
        std = std.clamp_max(1 / _least(std))  # an infinite one may pass unchecked
        fused, spread, weights = self._fuse(mean, std, counted)
        spread = spread.masked_fill(~counted.any(1), 1)  # the means are 0 there
        weights = weights.expand(*mean.shape[:3], -1).mean(-1)
        return FusedGaussian(fused.to(latent.mean.dtype), spread.to(latent.std.dtype), weights)

    def _fuse(self, mean: Tensor, std: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation (B, Q, K), and weights (B, M, Q or 1, K or 1)."""
        if self.rule == "product":
            return _product(mean, std, counted)
        if self.rule == "generalized_product":
            logits = torch.zeros_like(mean)
            if self.num_modalities is not None:
                check_like_parameters("latent.mean", mean, at_least_float32(self.weight_logits))
                logits = logits + at_least_float32(self.weight_logits)
            return _generalized_product(mean, std, counted, logits)
        if self.rule == "mixture_of_products":
            return _mixture_of_products(mean, std, counted)
        if self.rule == "norm_weighted":
            log_norm = _norm(std, -1).clamp_min(_least(std)).log()
            weights = (-log_norm).masked_fill(~counted, _lowest(std)).softmax(1) * counted
        else:
            weights = counted.to(mean.dtype) / counted.sum(1, keepdim=True).clamp_min(1)
        if self.rule == "barycenter":
            return _average(weights, mean), _average(weights, std), weights
        return *_moments(weights, mean, std), weights

    def _check_modalities(self, name: str, number: int) -> None:
        if number < 1:
            raise ValueError(f"Expected `{name}` to have at least one modality, but got {number}")
        if self.rule == "mixture_of_products" and number > _MOST_MODALITIES:
            raise ValueError(
                f"Expected `{name}` to have at most {_MOST_MODALITIES} modalities with "
                f"'mixture_of_products', which has a part for every subset, but got {number}"
            )


def _least(x: Tensor) -> float:
    """Least standard deviation inside logarithms, whose square does not underflow."""
    return float(torch.finfo(x.dtype).tiny ** 0.5)


def _lowest(x: Tensor) -> float:
    return float(torch.finfo(x.dtype).min)


def _log_precision(std: Tensor) -> Tensor:
    return -2 * std.clamp_min(_least(std)).log()


def _norm(x: Tensor, dim: int) -> Tensor:
    """Euclidean norm, with `dim` kept; squares neither overflow nor underflow, and the gradient at 0 is 0."""
    scale = x.detach().abs().amax(dim, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    norm: Tensor = torch.linalg.vector_norm(x / scale, dim=dim, keepdim=True) * scale
    return norm


def _average(weights: Tensor, x: Tensor) -> Tensor:
    """Weighted mean over modalities, for weights that sum to 1 or are all 0; exact for equal numbers."""
    rough = (weights * x).sum(1, keepdim=True).detach()
    return (rough + (weights * (x - rough)).sum(1, keepdim=True)).squeeze(1)


def _moments(weights: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a mixture, from deviations, because differences of squares would cancel."""
    fused = _average(weights, mean)
    parts = torch.stack([std, mean - fused.unsqueeze(1)]).masked_fill(weights == 0, 0)
    scale = parts.detach().abs().amax((0, 2)).clamp_min(torch.finfo(std.dtype).tiny)
    variance = (weights * (parts / scale.unsqueeze(1)).square().sum(0)).sum(1)
    zero = variance == 0  # where the root has no gradient
    return fused, (variance.masked_fill(zero, 1).sqrt() * scale).masked_fill(zero, 0)


def _product(mean: Tensor, std: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_precision = _log_precision(std).masked_fill(~counted, _lowest(std))
    log_precision = F.pad(log_precision, (0, 0, 0, 0, 1, 0))  # log 1, of the prior, comes first
    weights = log_precision.softmax(1)[:, 1:]
    decided = ((std == 0) & counted).any(1)
    fused = torch.exp(-0.5 * log_precision.logsumexp(1)).masked_fill(decided, 0)
    return (weights * mean).sum(1), fused, weights


def _generalized_product(
    mean: Tensor, std: Tensor, counted: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    log_weights = logits.masked_fill(~counted, _lowest(std)).log_softmax(1)
    weighted = (log_weights + _log_precision(std)).masked_fill(~counted, _lowest(std))
    total = weighted.logsumexp(1).masked_fill(~counted.any(1), 0)
    decided = ((std == 0) & counted).any(1)
    fused = torch.exp(-0.5 * total).masked_fill(decided, 0)
    return _average(weighted.softmax(1) * counted, mean), fused, log_weights.exp() * counted


def _mixture_of_products(
    mean: Tensor, std: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Subsets are numbered by bits, so that each modality doubles their number; the first one is empty."""
    log_precision = _log_precision(std)
    totals = torch.full_like(log_precision[:, :1], -math.inf)
    means, there = torch.zeros_like(totals), torch.ones_like(counted[:, :1])
    for m in range(mean.shape[1]):
        own = log_precision[:, m : m + 1]
        gain = own - totals
        joined = (-gain).sigmoid() * means + gain.sigmoid() * mean[:, m : m + 1]
        means = torch.cat([means, joined], 1)
        totals = torch.cat([totals, torch.logaddexp(totals, own)], 1)
        there = torch.cat([there, there & counted[:, m : m + 1]], 1)
    there, totals_of_some = there[:, 1:].to(mean.dtype), totals[:, 1:]
    subset_weights = there / there.sum(1, keepdim=True).clamp_min(1)
    stds = torch.exp(-0.5 * totals_of_some)
    stds = stds.masked_fill(stds < 2 * _least(std), 0)  # a factor has a std of 0
    fused, spread = _moments(subset_weights, means[:, 1:], stds)
    subset_weights = F.pad(subset_weights, (0, 0, 0, 0, 1, 0))
    weights = []
    for m in range(mean.shape[1]):  # its share in every subset with the modality
        of_m, in_m = (x.unflatten(1, (-1, 2, 2**m))[:, :, 1] for x in (totals, subset_weights))
        share = torch.exp(log_precision[:, m, None, None] - of_m)
        weights.append((in_m * share).sum((1, 2)))
    return fused, spread, torch.stack(weights, 1)
