"""Features as distributions (section 3.3.2): :class:`DiagonalGaussian` and :class:`GaussianDecoupler`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from uncertainty_mm._checks import (
    any_dims,
    check_choice,
    check_dropout,
    check_finite,
    check_flag,
    check_gaussian,
    check_gaussians,
    check_like_parameters,
    check_missing,
    check_number,
    check_positive_int,
    check_tensor,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import Component
from uncertainty_mm.functional import EmbeddingKind, at_least_float32, embed, unit

# Upper limit of the standard deviations of GaussianDecoupler, which float16 can still represent.
_MAX_STD = 1e4

DistanceKind = Literal["wasserstein", "sampled"]


class DiagonalGaussian(NamedTuple):
    r"""Independent normal distributions, stored as means and standard deviations.

    Attributes:
        mean: Tensor (..., K), the mean: what the features say.
        std: Tensor (..., K), the standard deviation, above 0: how uncertain they are.

    Example:
        >>> latent = DiagonalGaussian(torch.zeros(2, 3), torch.ones(2, 3))
        >>> latent.kl_to_standard_normal()
        tensor([0., 0.])
        >>> latent.embedding().shape
        torch.Size([2, 6])
    """

    mean: Tensor
    std: Tensor

    @property
    def variance(self) -> Tensor:
        r"""Variance :math:`\sigma^2` in at least float32, shape (..., K)."""
        return at_least_float32(self.std).square()

    @property
    def log_var(self) -> Tensor:
        r"""Logarithm of the variance :math:`\log \sigma^2` in at least float32, shape (..., K)."""
        return 2 * at_least_float32(self.std).log()

    def rsample(self) -> Tensor:
        r"""One draw :math:`\mu + \sigma \epsilon` with :math:`\epsilon \sim \mathcal N(0, 1)`, shape (..., K).

        Gradients reach the mean and the standard deviation (reparameterisation, Kingma and Welling 2014).

        Raises:
            ValueError: If shapes or devices disagree, a value is not finite, or `std` is negative.
            TypeError: If a dtype is wrong.
        """
        check_gaussian(self.mean, self.std)
        return self.mean + self.std * torch.randn_like(self.std)

    def kl_to_standard_normal(self) -> Tensor:
        r"""KL divergence to the prior :math:`\mathcal N(0, 1)` in nats, summed over the latent dimensions.

        .. math::
            \mathrm{KL}\bigl(\mathcal N(\mu, \sigma^2) \,\|\, \mathcal N(0, 1)\bigr)
            = \tfrac12 \sum_k \bigl(\mu_k^2 + \sigma_k^2 - 1 - \log \sigma_k^2\bigr)

        Near the prior the terms cancel: in float32 the relative error is up to 6e-5 at a standard deviation of 1.001
        and 4e-3 at 1.00001.

        Returns:
            Tensor (...) in at least float32.

        Raises:
            ValueError: If shapes or devices disagree, a value is not finite, or `std` is negative.
            TypeError: If a dtype is wrong.
        """
        check_gaussian(self.mean, self.std)
        mean, std = at_least_float32(self.mean), at_least_float32(self.std)
        log_var = 2 * std.log()  # the property of a named tuple does not compile in torch 2.6
        # variance - 1 as expm1, because the terms cancel near the prior
        return 0.5 * (mean.square() + torch.expm1(log_var) - log_var).sum(-1)

    def embedding(self, kind: EmbeddingKind = "both") -> Tensor:
        r"""Vector that represents the distribution in the contrastive loss.

        Args:
            kind: `"both"`: mean and standard deviation, each divided by its own length (Eq. 4); `"joint"`: mean and
                standard deviation divided by their common length, which keeps the size of the standard deviation
                relative to the mean; `"mean"` or `"std"`: one of the two halves of `"both"`.

        Returns:
            Tensor (..., 2K), or (..., K) for one half; see
            :func:`uncertainty_mm.functional.distribution_embedding`.

        Raises:
            ValueError: If `kind` is unknown, shapes or devices disagree, a value is not finite, or `std` is negative.
            TypeError: If a dtype is wrong.
        """
        check_choice("kind", kind, ("joint", "both", "mean", "std"))
        check_gaussian(self.mean, self.std)
        return embed(self.mean, self.std, kind)

    def squared_distance(
        self, other: DiagonalGaussian, kind: DistanceKind = "wasserstein"
    ) -> Tensor:
        r"""Squared distance from these Gaussians to others, which depends on their standard deviations as well.

        .. math::
            \lVert \mu_1 - \mu_2 \rVert^2 + \begin{cases}
            \lVert \sigma_1 - \sigma_2 \rVert^2 & \text{(wasserstein)} \\
            \lVert \sigma_1 \rVert^2 + \lVert \sigma_2 \rVert^2 & \text{(sampled)}
            \end{cases}

        The first is the squared 2-Wasserstein distance, which is 0 for equal Gaussians. The second is the expected
        squared distance between one independent draw from each, which is above 0 even for equal Gaussians.

        Source: Dowson and Landau 1982, doi 10.1016/0047-259X(82)90077-X; Chun 2024, arXiv 2305.18171.

        Args:
            other: Gaussians of a shape (..., K) that can be broadcast with the shape of these.
            kind: `"wasserstein"` or `"sampled"`.

        Returns:
            Tensor (...) of values of at least 0, in at least float32.

        Raises:
            ValueError: If `kind` is unknown, shapes or devices disagree, a value is not finite, or `std` is negative.
            TypeError: If `other` is not a DiagonalGaussian, or a dtype is wrong.

        Example:
            >>> sure = DiagonalGaussian(torch.tensor([[0.0], [3.0]]), torch.ones(2, 1))
            >>> unsure = DiagonalGaussian(torch.tensor([0.0]), torch.tensor([5.0]))
            >>> sure.squared_distance(unsure)  # 4 squared; 3 squared more
            tensor([16., 25.])
            >>> sure.squared_distance(unsure, "sampled")  # 1 and 5 squared
            tensor([26., 35.])
        """
        check_choice("kind", kind, ("wasserstein", "sampled"))
        check_gaussian(self.mean, self.std)
        if not isinstance(other, DiagonalGaussian):
            raise TypeError(
                f"Expected `other` to be a DiagonalGaussian, but got {type(other).__name__}"
            )
        check_gaussian(*other)
        _check_broadcastable("other.mean", other.mean, self.mean)
        one, two = (DiagonalGaussian(*map(at_least_float32, x)) for x in (self, other))
        squares = (one.mean - two.mean).square()
        if kind == "wasserstein":
            return (squares + (one.std - two.std).square()).sum(-1)
        return (squares + one.std.square() + two.std.square()).sum(-1)

    def product(
        self, missing: Tensor | None = None, prior_mean: Tensor | None = None
    ) -> DiagonalGaussian:
        r"""Combines the modalities: the renormalised product of their Gaussians and a prior.

        .. math::
            \frac{1}{\sigma^2} = 1 + \sum_m \frac{1}{\sigma_m^2}, \qquad
            \mu = \sigma^2 \Bigl( \mu_0 + \sum_m \frac{\mu_m}{\sigma_m^2} \Bigr)

        Each modality is weighted by its precision :math:`1 / \sigma_m^2`. Missing modalities do not count, and if all
        are missing, the prior remains.

        The standard deviation of the product does not depend on whether the means agree: it is the same for +3 and -3
        as for +3 and +3 (:func:`~uncertainty_mm.functional.reduced_chi2` measures the disagreement). The factors are
        taken as independent, so :math:`M` copies of one Gaussian have :math:`M` times its precision.

        Source: Hinton 2002, doi 10.1162/089976602760128018; with missing modalities: Wu and Goodman 2018,
        arXiv 1802.05335.

        Args:
            missing: Bool tensor (B, M), True where a modality is missing. Values there are ignored.
            prior_mean: Mean of the prior, broadcastable to (B, Q, K); None for 0. Its standard deviation is 1.

        Returns:
            Gaussians of shape (B, Q, K), for a latent of shape (B, M, Q, K). A modality with an infinite standard
            deviation counts as missing. Where some standard deviations are 0, only these count: the result has the
            average of their means, and a standard deviation of 0.

        Raises:
            ValueError: If shapes or devices disagree, or, for a modality that is not missing, a mean is not finite or
                `std` is negative or NaN.
            TypeError: If a dtype is wrong.

        Example:
            >>> latent = DiagonalGaussian(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1))
            >>> latent.product()
            DiagonalGaussian(mean=tensor([[[0.6667]]]), std=tensor([[[0.5774]]]))
            >>> latent.product(torch.tensor([[True, True]]))
            DiagonalGaussian(mean=tensor([[[0.]]]), std=tensor([[[1.]]]))
        """
        sizes: dict[str, int] = {}
        check_gaussians(self.mean, self.std, missing, sizes, infinite=True)
        if prior_mean is not None:
            _check_prior_mean(prior_mean, sizes, self.mean.device)
        return self._product(missing, prior_mean)

    def _product(self, missing: Tensor | None, prior_mean: Tensor | None) -> DiagonalGaussian:
        """The product, for arguments that have been checked."""
        mean, std = self
        if missing is not None:
            left_out = missing[:, :, None, None]
            mean, std = mean.masked_fill(left_out, 0), std.masked_fill(left_out, math.inf)
        decided = (std == 0).any(1)
        wide = at_least_float32(std)
        # An std of 0 has an infinite log-precision, for which a softmax is NaN, so the smallest number replaces it.
        log_precision = -2 * wide.clamp_min(torch.finfo(wide.dtype).tiny).log()
        log_precision = F.pad(log_precision, (0, 0, 0, 0, 1, 0))  # log 1, of the prior, comes first
        weight = log_precision.softmax(1)
        fused = (weight[:, 1:] * at_least_float32(mean)).sum(1)
        if prior_mean is not None:
            fused = fused + weight[:, 0] * prior_mean
        std = torch.exp(-0.5 * log_precision.logsumexp(1))
        std = std.masked_fill(decided, 0)
        return DiagonalGaussian(fused.to(self.mean.dtype), std.to(self.std.dtype))

    def inflated(self, factor: Tensor) -> DiagonalGaussian:
        r"""Makes modalities less certain: multiplies every variance by a factor of its modality, and keeps the means.

        .. math::
            \sigma' = \sigma \sqrt{s}

        Args:
            factor: :math:`s`, tensor (B, M), above 0. A factor of 1 leaves every bit as it is; infinity makes the
                standard deviation infinite, which a :meth:`product` takes for a missing modality.

        Returns:
            Gaussians of the same shape, (B, M, Q, K).

        Raises:
            ValueError: If shapes or devices disagree, or a factor is not above 0.
            TypeError: If a dtype is wrong.

        Example:
            >>> latent = DiagonalGaussian(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1))
            >>> latent.inflated(torch.tensor([[4.0, torch.inf]])).std.flatten()
            tensor([2., inf])
        """
        sizes: dict[str, int] = {}
        check_tensor("mean", self.mean, "floating", "B M Q K", sizes)
        check_tensor("std", self.std, "floating", "B M Q K", sizes, self.mean.device)
        check_tensor("factor", factor, "floating", "B M", sizes, self.mean.device)
        if checks_values(factor) and not (factor > 0).all():
            wrong = factor[~(factor > 0)][0].item()
            raise ValueError(f"Expected `factor` to be above 0, but got {wrong}")
        std = at_least_float32(self.std)
        root = factor.to(std.dtype).sqrt()[:, :, None, None]
        infinite = (std == math.inf) | (root == math.inf)  # filled, since 0 times infinity is NaN
        std = std.masked_fill(infinite, 1) * root.masked_fill(root == math.inf, 1)
        std = std.masked_fill(infinite, math.inf)
        return DiagonalGaussian(self.mean, std.to(self.std.dtype))

    def to_distribution(self) -> Independent[Normal]:
        """Converts to a `torch.distributions` object with batch shape (...) and event shape (K,).

        Raises:
            ValueError: If shapes or devices disagree, a value is not finite, or `std` is negative.
            TypeError: If a dtype is wrong.
        """
        check_gaussian(self.mean, self.std)
        return Independent(Normal(self.mean, self.std, validate_args=False), 1)


def _check_broadcastable(name: str, x: Tensor, other: Tensor) -> None:
    """Raises unless the shapes can be broadcast and the last axes are equal."""
    if x.device != other.device:
        raise ValueError(f"Expected `{name}` to be on {other.device}, but got {x.device}")
    pairs = zip(reversed(x.shape[:-1]), reversed(other.shape[:-1]), strict=False)
    if x.shape[-1] != other.shape[-1] or any(a != b and 1 not in (a, b) for a, b in pairs):
        raise ValueError(
            f"Expected `{name}` to be broadcastable with {tuple(other.shape)}, and of its last size, "
            f"but got {tuple(x.shape)}"
        )


def _check_prior_mean(prior_mean: Tensor, sizes: dict[str, int], device: torch.device) -> None:
    check_tensor("prior_mean", prior_mean, "floating", any_dims(prior_mean), {}, device)
    shape = (sizes["B"], sizes["Q"], sizes["K"])
    pairs = zip(reversed(prior_mean.shape), reversed(shape), strict=False)
    if prior_mean.dim() > 3 or any(size not in (1, wanted) for size, wanted in pairs):
        raise ValueError(
            f"Expected `prior_mean` to be broadcastable to (B, Q, K) = {shape}, "
            f"but got {tuple(prior_mean.shape)}"
        )
    if checks_values(prior_mean):
        check_finite("prior_mean", prior_mean)


def check_latent(
    latent: DiagonalGaussian,
    missing: Tensor | None,
    sizes: dict[str, int],
    validate_args: bool | None,
    *,
    infinite: bool = False,
) -> None:
    """Checks Gaussians of shape (B, M, Q, K) and the mask of missing modalities."""
    mean, std = getattr(latent, "mean", None), getattr(latent, "std", None)
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        raise TypeError(
            f"Expected `latent` to be a DiagonalGaussian, but got {type(latent).__name__}"
        )
    check_gaussians(mean, std, missing, sizes, validate_args, prefix="latent.", infinite=infinite)


class _ModalityLinear(nn.Module):
    """One linear layer per modality, computed as one batched matrix product on (M, N, in_dim)."""

    def __init__(self, num_modalities: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_modalities, out_dim, in_dim))
        self.bias = nn.Parameter(torch.empty(num_modalities, out_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and biases anew, as `torch.nn.Linear` does."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        modalities, out_dim, in_dim = self.weight.shape
        return f"num_modalities={modalities}, in_dim={in_dim}, out_dim={out_dim}"

    def forward(self, x: Tensor) -> Tensor:
        check_like_parameters("z", x, self.weight)  # a sharded weight is whole only here
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))


class GaussianDecoupler(Component):
    r"""Encodes the vector of every modality and label as a Gaussian, which says how uncertain the vector is.

    Each modality has one encoder, shared by its labels: a ReLU network with hidden layers `hidden_dims`, then one
    linear head for the mean :math:`\mu` and one for the raw log-variance :math:`r`. The standard deviation is

    .. math::
        \sigma = \sigma_{\min} + \exp\Bigl(\tfrac12\, \frac{r}{\sqrt{1 + (r / h)^2}}\Bigr),
        \qquad h = \begin{cases} 2 \log 10^4 & r \ge 0 \\ -2 \log \sigma_{\min} & r < 0 \end{cases}

    so that :math:`\log \sigma^2 \approx r` over the useful range and :math:`\sigma` stays within
    :math:`[\sigma_{\min}, 10^4 + \sigma_{\min}]`. The gradient decays like :math:`|r|^{-3}` rather than exponentially,
    so that an encoder which starts far outside the range can still return.

    Source: Huang et al. 2025, arXiv 2502.13954, section 3.3.2, which has no bound, nor has the released code.

    Args:
        num_modalities: Number of modalities :math:`M`.
        in_dim: Size of an input vector.
        latent_dim: Number of latent dimensions :math:`K`.
        hidden_dims: Sizes of the hidden layers; empty for linear encoders.
        dropout: Dropout probability after every hidden layer.
        min_std: Lower limit of the standard deviation, in (0, 1).
        normalize_mean: Give every mean the length :math:`\sqrt K`. The mean then says what was seen, and only the
            standard deviation can say how clearly, which gives it a meaning in :meth:`DiagonalGaussian.product`. The
            paper does not normalise.
        validate_args: Check values (NaN, infinity) on the CPU only (None), never (False), or always (True), which
            stalls an accelerator.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> decoupler = GaussianDecoupler(num_modalities=3, in_dim=128, latent_dim=64)
        >>> latent = decoupler(torch.randn(4, 3, 6, 128))
        >>> latent.mean.shape, latent.std.shape
        (torch.Size([4, 3, 6, 64]), torch.Size([4, 3, 6, 64]))
        >>> bool((latent.std > 0).all())
        True
    """

    num_modalities: int
    in_dim: int
    latent_dim: int
    min_std: float
    normalize_mean: bool
    validate_args: bool | None

    def __init__(
        self,
        num_modalities: int,
        in_dim: int,
        latent_dim: int = 64,
        *,
        hidden_dims: Sequence[int] = (128,),
        dropout: float = 0.1,
        min_std: float = 1e-4,
        normalize_mean: bool = True,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("num_modalities", num_modalities)
        check_positive_int("in_dim", in_dim)
        check_positive_int("latent_dim", latent_dim)
        if not isinstance(hidden_dims, Sequence):
            raise TypeError(f"Expected `hidden_dims` to be a sequence, but got {hidden_dims!r}")
        for index, size in enumerate(hidden_dims):
            check_positive_int(f"hidden_dims[{index}]", size)
        check_dropout(dropout)
        check_number("min_std", min_std, "in (0, 1)", isinstance(min_std, Real) and 0 < min_std < 1)
        check_flag("normalize_mean", normalize_mean)
        check_validate_args(validate_args)
        self._set(
            num_modalities=num_modalities,
            in_dim=in_dim,
            latent_dim=latent_dim,
            min_std=min_std,
            normalize_mean=normalize_mean,
            validate_args=validate_args,
        )
        layers: list[nn.Module] = []
        size = in_dim
        for hidden_dim in hidden_dims:
            layers += [
                _ModalityLinear(num_modalities, size, hidden_dim),
                nn.ReLU(),
                nn.Dropout(dropout),
            ]
            size = hidden_dim
        self.encoder = nn.Sequential(*layers)
        self.mean_head = _ModalityLinear(num_modalities, size, latent_dim)
        self.log_var_head = _ModalityLinear(num_modalities, size, latent_dim)

    def forward(self, z: Tensor, missing: Tensor | None = None) -> DiagonalGaussian:
        """Encodes the vectors of all modalities and labels.

        Args:
            z: Tensor (B, M, Q, in_dim).
            missing: Bool tensor (B, M), True where a modality is missing. Values of `z` there are ignored.

        Returns:
            Gaussians of shape (B, M, Q, latent_dim). Missing modalities get exactly the prior: mean 0 and standard
            deviation 1.

        Raises:
            ValueError: If shapes or devices disagree, or `z` is not finite.
            TypeError: If a dtype is wrong.
        """
        sizes = {"M": self.num_modalities, "in_dim": self.in_dim}
        check_tensor("z", z, "floating", "B M Q in_dim", sizes)
        check_missing(missing, sizes, z.device)
        left_out = None if missing is None else missing[:, :, None, None]
        if checks_values(z, self.validate_args):
            check_finite("z", z, left_out)
        if left_out is not None:
            z = z.masked_fill(left_out, 0)
        batch, _, labels, _ = z.shape
        hidden = self.encoder(z.transpose(0, 1).flatten(1, 2))  # (M, B * Q, in_dim)
        mean = self.mean_head(hidden).unflatten(1, (batch, labels)).transpose(0, 1)
        raw = self.log_var_head(hidden).unflatten(1, (batch, labels)).transpose(0, 1)
        std = self._bounded_std(raw)
        if self.normalize_mean:
            mean = unit(mean) * math.sqrt(self.latent_dim)
        if left_out is not None:
            mean, std = mean.masked_fill(left_out, 0), std.masked_fill(left_out, 1)
        return DiagonalGaussian(mean, std)

    def _bounded_std(self, raw: Tensor) -> Tensor:
        wide = at_least_float32(raw)
        half_range = torch.full_like(wide, 2 * math.log(_MAX_STD))
        half_range = half_range.masked_fill(raw < 0, -2 * math.log(self.min_std))
        x = wide / half_range
        x = x.clamp(-1e15, 1e15)  # half precision may have overflowed; the square must not
        log_var = half_range * x / (1 + x.square()).sqrt()
        std = self.min_std + torch.exp(0.5 * log_var)
        return std.clamp_min(torch.finfo(raw.dtype).tiny).to(raw.dtype)
