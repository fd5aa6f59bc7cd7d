"""Synthetic data whose uncertainty is known: :class:`SyntheticMMER`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_number,
    check_positive_int,
    check_probability,
    check_range,
    check_seed,
    check_tensor,
)

__all__ = ["Posterior", "SyntheticMMER", "SyntheticModality", "SyntheticSamples"]

_CPU = torch.device("cpu")  # all is drawn and computed here, whatever the default device
_CHUNK = 2**22  # size of the temporaries in SyntheticMMER.posterior, in numbers


class SyntheticModality(NamedTuple):
    """One modality of :class:`SyntheticMMER`.

    Attributes:
        steps: Largest number of frames.
        dim: Size of a frame.
        rate: Probability that a frame shows a present label rather than nothing, in [0, 1]: its informativeness.
    """

    steps: int = 20
    dim: int = 16
    rate: float = 0.5


class SyntheticSamples(NamedTuple):
    """The samples of :meth:`SyntheticMMER.sample`, with noise levels that a model does not see.

    Attributes:
        features: Frames (N, S_m, D_m) by modality, 0 where padded.
        padding_mask: Bool (N, S_m) by modality, True where padded; all True where the modality is missing.
        labels: (N, Q) of 0 and 1, uint8.
        noise: (N, M), standard deviation of the noise in every feature of a modality's frames.
        missing: (N, M) bool, True where the modality is missing.
    """

    features: dict[str, Tensor]
    padding_mask: dict[str, Tensor]
    labels: Tensor
    noise: Tensor
    missing: Tensor


class Posterior(NamedTuple):
    """The exact posterior of the labels of N samples.

    Attributes:
        joint: (N, 2^Q), probability of every set of labels; bit q of the column index is 1 if label q is present.
        marginals: (N, Q), probability of every label: the best possible prediction.
        entropy: (N,), entropy of `joint` in nats: the aleatoric uncertainty.
    """

    joint: Tensor
    marginals: Tensor
    entropy: Tensor


class SyntheticMMER:
    r"""Generates multimodal multi-label data with an exact posterior, to test a predicted uncertainty.

    A sample has a set of labels :math:`y` from a correlated prior, given as a table over all :math:`2^Q` sets. Each
    modality shows it as a sequence of frames, which are independently

    .. math::
        x_t = a_t\, \mu_{s_t} + \sigma\, \epsilon_t, \qquad \epsilon_t \sim \mathcal N(0, I)

    where the source :math:`s_t` is a present label, each with probability :math:`r / |y|`, or nothing
    (:math:`\mu = 0`); :math:`\mu_q` is the prototype of label q in this modality, and the intensity :math:`a_t` is
    0.3, 0.6 or 1 with equal probability. The noise :math:`\sigma` is drawn log-uniformly for every sample and
    modality, so a modality may be clear in one sample and useless in the next, to a known degree.

    Given the noise, the posterior of the labels is exact (:meth:`posterior`). A model does not see the noise, but can
    estimate it almost exactly from some hundred numbers of a sequence.

    Args:
        num_labels: Number of labels :math:`Q`, 1 to 8.
        modalities: A :class:`SyntheticModality` by name: number of frames, their size, and their informativeness.
        noise: Lower and upper limit of :math:`\sigma`, above 0. The features of a prototype have a variance of 1.
        prior: Tensor (2^Q,), the probability of every set of labels; None for a random one in which labels attract and
            repel each other and a sample has 1 to 2 labels on average.
        missing_rate: Probability that a modality is missing, independently for each sample and modality.
        seed: Determines prototypes and prior.

    Attributes:
        prior: (2^Q,), float64.
        prototypes: (Q, D_m) by modality, float64.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> world = SyntheticMMER(num_labels=3)
        >>> samples = world.sample(100, seed=1)
        >>> samples.features["text"].shape
        torch.Size([100, 20, 16])
        >>> posterior = world.posterior(samples)
        >>> posterior.marginals.shape, posterior.entropy.shape
        (torch.Size([100, 3]), torch.Size([100]))
        >>> clear = world.sample(100, seed=1, noise=torch.full((100, 3), 0.1))
        >>> clear = world.posterior(clear)
        >>> bool(clear.entropy.mean() < posterior.entropy.mean())
        True
    """

    INTENSITIES = (0.3, 0.6, 1.0)

    def __init__(
        self,
        num_labels: int = 6,
        modalities: Mapping[str, SyntheticModality | tuple[int, int, float]] | None = None,
        *,
        noise: tuple[float, float] = (0.5, 5.0),
        prior: Tensor | None = None,
        missing_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_positive_int("num_labels", num_labels)
        if num_labels > 8:
            raise ValueError(f"Expected `num_labels` to be at most 8, but got {num_labels}")
        if modalities is None:
            modalities = {
                "text": SyntheticModality(rate=0.6),
                "audio": SyntheticModality(rate=0.4),
                "vision": SyntheticModality(rate=0.3),
            }
        if not isinstance(modalities, Mapping):
            raise TypeError(
                f"Expected `modalities` to be a mapping, but got {type(modalities).__name__}"
            )
        if not modalities:
            raise ValueError("Expected `modalities` to name at least one modality, but got none")
        for name, each in modalities.items():
            if not isinstance(each, tuple) or len(each) > len(SyntheticModality._fields):
                raise TypeError(
                    f"Expected `modalities[{name!r}]` to be a SyntheticModality, but got {each!r}"
                )
        check_seed(seed)
        self.modalities = {name: SyntheticModality(*each) for name, each in modalities.items()}
        for name, (steps, dim, rate) in self.modalities.items():
            check_positive_int(f"modalities[{name!r}].steps", steps)
            check_positive_int(f"modalities[{name!r}].dim", dim)
            check_probability(f"modalities[{name!r}].rate", rate)
        if not isinstance(noise, Sequence) or len(noise) != 2:
            raise TypeError(f"Expected `noise` to be a pair of numbers, but got {noise!r}")
        low, high = noise
        for limit in noise:
            ordered = 0 < low <= high < math.inf
            check_number("noise", limit, "above 0, the lower limit first", ordered)
        check_probability("missing_rate", missing_rate)
        self.num_labels = num_labels
        self.noise = (float(low), float(high))
        self.missing_rate = missing_rate
        generator = torch.Generator("cpu").manual_seed(seed)
        self.prototypes = {
            name: torch.randn(
                num_labels, each.dim, dtype=torch.float64, generator=generator, device="cpu"
            )
            for name, each in self.modalities.items()
        }
        sets = torch.arange(2**num_labels, device="cpu").unsqueeze(1)
        self._members = (sets >> torch.arange(num_labels, device="cpu") & 1).double()  # (2^Q, Q)
        if prior is None:
            self.prior = self._random_prior(generator)
        else:
            check_tensor("prior", prior, "floating", "sets", {"sets": 2**num_labels}, _CPU)
            check_range("prior", prior, 0, 1)
            self.prior = prior.double()
            if abs(float(self.prior.sum()) - 1) > 1e-5:
                raise ValueError(f"Expected `prior` to sum to 1, but got {float(self.prior.sum())}")
            self.prior = self.prior / self.prior.sum()

    def _random_prior(self, generator: torch.Generator) -> Tensor:
        """A prior in which pairs of labels attract or repel each other (an Ising model)."""
        pairs = torch.randn(
            self.num_labels, self.num_labels, dtype=torch.float64, generator=generator, device="cpu"
        )
        members = self._members
        energy = torch.einsum("yq,qr,yr->y", members, pairs.triu(1), members) - members.sum(1)
        return energy.softmax(0)

    @torch.no_grad()
    def sample(
        self, num_samples: int, *, seed: int, noise: Tensor | None = None
    ) -> SyntheticSamples:
        """Draws samples; the same seed gives the same samples.

        Args:
            num_samples: Number of samples N.
            seed: Determines everything random. Labels, sources and the shape of the noise do not depend on `noise`, so
                the same samples can be drawn clean and corrupted.
            noise: Tensor (N, M), standard deviations of the noise, above 0; None for random ones.

        Returns:
            The samples, with features in float32.

        Raises:
            ValueError: If an argument is out of range.
            TypeError: If an argument has the wrong type.
        """
        check_positive_int("num_samples", num_samples)
        check_seed(seed)
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (num_samples, len(self.modalities))
        labels = self._members[
            torch.multinomial(self.prior, num_samples, replacement=True, generator=generator)
        ]
        low, high = (math.log(limit) for limit in self.noise)
        log_noise = low + (high - low) * torch.rand(
            shape, dtype=torch.float64, generator=generator, device="cpu"
        )
        missing = torch.rand(shape, dtype=torch.float32, generator=generator, device="cpu")
        missing = missing < self.missing_rate
        if noise is None:
            noise = log_noise.exp()
        else:
            check_tensor(
                "noise", noise, "floating", "N M", dict(zip("NM", shape, strict=True)), _CPU
            )
            check_range(
                "noise", noise, torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
            )
        features, padding_mask = {}, {}
        for index, (name, each) in enumerate(self.modalities.items()):
            frames = (num_samples, each.steps)
            at_least = (each.steps + 1) // 2
            lengths = torch.randint(
                at_least, each.steps + 1, frames[:1], generator=generator, device="cpu"
            )
            # the present label with the largest random score, or nothing
            scores = torch.rand(
                *frames, self.num_labels, dtype=torch.float32, generator=generator, device="cpu"
            )
            source = (scores * labels.unsqueeze(1)).argmax(2)
            shown = torch.rand(frames, dtype=torch.float32, generator=generator, device="cpu")
            shown = (shown < each.rate) & (labels.sum(1, keepdim=True) > 0)
            intensity = torch.tensor(self.INTENSITIES, dtype=torch.float64, device="cpu")[
                torch.randint(len(self.INTENSITIES), frames, generator=generator, device="cpu")
            ]
            x = self.prototypes[name][source] * (intensity * shown).unsqueeze(2)
            errors = torch.randn(
                *frames, each.dim, dtype=torch.float64, generator=generator, device="cpu"
            )
            x = x + noise[:, index, None, None] * errors
            padded = torch.arange(each.steps, device="cpu") >= lengths.unsqueeze(1)
            padded = padded | missing[:, index, None]
            features[name] = x.masked_fill(padded.unsqueeze(2), 0).float()
            padding_mask[name] = padded
        return SyntheticSamples(features, padding_mask, labels.to(torch.uint8), noise, missing)

    @torch.no_grad()
    def posterior(self, samples: SyntheticSamples) -> Posterior:
        r"""Computes the exact probability of every set of labels, given frames and noise.

        .. math::
            P(y \mid x) \propto P(y) \prod_m \prod_t \Bigl((1 - r_m) \mathcal N(x_t; 0, \sigma_m^2)
            + \frac{r_m}{|y|} \sum_{q \in y} \frac13 \sum_a \mathcal N(x_t; a \mu_q, \sigma_m^2) \Bigr)

        for a set that is not empty; for the empty set every frame shows nothing. Computed in log space and float64.

        Args:
            samples: Samples of this world; their labels are not read. A masked modality counts as missing, so mask
                modalities for the posterior given fewer of them.

        Returns:
            The posterior of every sample.

        Raises:
            ValueError: If the samples have other modalities, sizes or labels, or noise that is not above 0.
            TypeError: If `samples` has the wrong type.
        """
        self._check_samples(samples)
        rows = max(
            1, _CHUNK // (2**self.num_labels * max(each.steps for each in self.modalities.values()))
        )
        count = samples.labels.shape[0]
        log_joint = torch.cat(
            [
                self._log_likelihood(samples, slice(start, start + rows))
                for start in range(0, max(count, 1), rows)
            ]
        )
        log_joint = (log_joint + self.prior.log()).log_softmax(1)
        joint = log_joint.exp()
        return Posterior(joint, joint @ self._members, torch.special.entr(joint).sum(1))

    def _check_samples(self, samples: SyntheticSamples) -> None:
        if not isinstance(samples, SyntheticSamples):
            raise TypeError(
                f"Expected `samples` to be SyntheticSamples, but got {type(samples).__name__}"
            )
        if not set(self.modalities) <= set(samples.features):
            raise ValueError(
                f"Expected `samples` to have the modalities {list(self.modalities)}, "
                f"but got {list(samples.features)}"
            )
        sizes = {"Q": self.num_labels, "M": len(samples.features)}
        check_tensor("samples.labels", samples.labels, "number", "N Q", sizes, _CPU)
        check_tensor("samples.noise", samples.noise, "floating", "N M", sizes, _CPU)
        check_range("samples.noise", samples.noise, torch.finfo(torch.float32).tiny, math.inf)
        for name, each in self.modalities.items():
            frames = {"N": sizes["N"], "S": each.steps, "D": each.dim}
            x, mask = samples.features[name], samples.padding_mask[name]
            check_tensor(f"samples.features[{name!r}]", x, "floating", "N S D", frames, _CPU)
            check_tensor(f"samples.padding_mask[{name!r}]", mask, "bool", "N S", frames, _CPU)

    def _log_likelihood(self, samples: SyntheticSamples, rows: slice) -> Tensor:
        """Log-likelihood of every set of labels, up to a constant per sample, (rows, 2^Q)."""
        size = self._members.sum(1)
        intensity = torch.tensor(self.INTENSITIES, dtype=torch.float64, device="cpu")
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for index, (name, each) in enumerate(self.modalities.items()):
            prototypes, variance = self.prototypes[name], samples.noise[rows, index].double() ** 2
            products = samples.features[name][rows].double() @ prototypes.T
            energy = 0.5 * prototypes.square().sum(1)
            # log of N(x; a mu, v) / N(x; 0, v), then the mean over the intensities: (rows, S, Q)
            ratio = (
                products.unsqueeze(3) * intensity - energy.unsqueeze(1) * intensity.square()
            ) / variance[:, None, None, None]
            shown = ratio.logsumexp(3) - math.log(len(intensity))
            # With little noise these are huge, so a term common to all sets is removed for the digits of the sums.
            common = shown.amax(2, keepdim=True).clamp_min(0)
            shown = shown - common
            # the log of the sum over the members of a set, for all sets: each label doubles their number
            by_set = torch.full_like(shown[:, :, :1], -math.inf)
            for label in range(self.num_labels):
                added = torch.logaddexp(by_set, shown[:, :, label : label + 1])
                by_set = torch.cat([by_set, added], dim=2)
            nothing = (1 - each.rate * size.clamp_max(1)).log()
            something = math.log(each.rate) if each.rate > 0 else -math.inf
            frames = torch.logaddexp(nothing - common, something - size.clamp_min(1).log() + by_set)
            padded = samples.padding_mask[name][rows].unsqueeze(2)
            total = total + frames.masked_fill(padded, 0).sum(1)
        return total
