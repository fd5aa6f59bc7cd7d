"""What modalities share apart from what each has, in the manner of MISA (Hazarika et al. 2020, arXiv 2005.03545)."""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncertainty_mm.examples.baselines.base import (
    Baseline,
    Output,
    Sizes,
    Transformer,
    Vectors,
    mean_over_steps,
    mlp,
)


def mean_of(x: Tensor, there: Tensor) -> Tensor:
    """Mean (D,) of the samples (B, D) that are there (B, 1)."""
    return (x * there).sum(0) / there.sum().clamp_min(1)


def similarity_loss(shared: Vectors, there: Vectors) -> Tensor:
    """Central moment discrepancy (Zellinger et al. 2017) of vectors in (0, 1), mean over pairs of modalities."""
    moments = []  # mean and central moments 2 to 5, (5, D)
    for x, here in zip(shared, there, strict=True):
        mean = mean_of(x, here)
        central = [mean_of((x - mean) ** order, here) for order in range(2, 6)]
        moments.append(torch.stack([mean, *central]))
    terms = [shared[0].new_zeros(())]  # of a single modality
    for i, j in combinations(range(len(shared)), 2):
        distance = torch.linalg.vector_norm(moments[i] - moments[j], dim=1).sum()
        terms.append(distance * (there[i].any() & there[j].any()))
    return torch.stack(terms).sum() / max(1, len(terms) - 1)


def difference_loss(private: Vectors, shared: Vectors, there: Vectors) -> Tensor:
    """How far the two vectors of a modality, and the private ones of two, are from orthogonal over a batch."""

    def unit(x: Tensor, here: Tensor) -> Tensor:
        return F.normalize(x - mean_of(x, here), dim=1, eps=1e-6) * here

    own = [unit(x, here) for x, here in zip(private, there, strict=True)]
    common = [unit(x, here) for x, here in zip(shared, there, strict=True)]
    pairs = [*zip(own, common, strict=True), *combinations(own, 2)]
    return torch.stack([(a.T @ b).square().mean() for a, b in pairs]).sum()


class InvariantSpecific(Baseline):
    """What modalities share, and what each has alone.

    Each modality is projected twice, into a space of its own and into a common one. Losses make the common vectors of
    the modalities alike, the two of a modality orthogonal, and both together tell all. A Transformer layer joins the
    2 M vectors. The losses weigh a tenth of what they do in the released code: with its weights all samples of a small
    training set became alike, which satisfies all three.
    """

    def build(self, sizes: Sizes) -> None:
        dim, modalities = sizes.dim, range(sizes.modalities)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim)) for _ in modalities
        )
        self.private = nn.ModuleList(nn.Linear(dim, dim) for _ in modalities)
        self.shared = nn.Linear(dim, dim)
        self.decoders = nn.ModuleList(nn.Linear(dim, dim) for _ in modalities)
        self.transformer = Transformer(dim, sizes.heads, sizes.dropout)
        self.head = mlp(2 * sizes.modalities * dim, dim, sizes.labels, sizes.dropout)

    def fuse(self, encoded: Vectors, padding: Vectors) -> Output:
        there = [~mask.all(1, keepdim=True) for mask in padding]

        def each(layers: nn.ModuleList, inputs: Vectors) -> list[Tensor]:
            return [f(x) * here for f, x, here in zip(layers, inputs, there, strict=True)]

        means = [mean_over_steps(x, mask) for x, mask in zip(encoded, padding, strict=True)]
        vectors = each(self.projections, means)
        private = [x.sigmoid() for x in each(self.private, vectors)]
        shared = [self.shared(x).sigmoid() for x in vectors]
        decoded = each(self.decoders, [a + b for a, b in zip(private, shared, strict=True)])
        missing = ~torch.cat([*there, *there], dim=1)
        joined = self.transformer(torch.stack([*private, *shared], dim=1), missing)
        return Output(
            self.head(joined.flatten(1)),
            {
                "similarity": 0.1 * similarity_loss(shared, there),
                "difference": 0.03 * difference_loss(private, shared, there),
                "reconstruction": 0.1 * F.mse_loss(torch.stack(decoded), torch.stack(vectors)),
            },
        )
