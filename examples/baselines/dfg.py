r"""A vertex for every subset of modalities, in the manner of the Dynamic Fusion Graph (Zadeh et al. 2018).

From "Multimodal Language Analysis in the Wild", ACL 2018. With :math:`z_{\{m\}}` what is known of modality m,
every larger subset P of modalities, and the output :math:`\tau` as if it stood above all, is made of its parts,

.. math::
    z_P = D_P\big([\alpha_{S, P}\, z_S]_{\emptyset \ne S \subset P}\big), \qquad
    \alpha = \sigma\big(D_\alpha([z_{\{m\}}]_m)\big) \in [0, 1]

so the efficacies :math:`\alpha` decide for each sample which paths of the graph are open.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from uncertainty_mm.examples.baselines.base import Baseline, Sizes, Vectors, mean_over_steps, mlp

Subset = tuple[int, ...]  # of the modalities, by their places
Edge = tuple[Subset, Subset | None]  # from a subset to a larger one, or to the output


class FusionGraph(Baseline):
    """What subsets of the modalities say together, each as far as it helps.

    The graph joins the mean over the steps of each modality once; Graph-MFN runs it at every step of aligned LSTMs, and
    feeds a gated memory. There is no such thing as a missing modality in the paper: here every subset that contains one
    has neither a vector nor an efficacy.
    """

    def build(self, sizes: Sizes) -> None:
        dim, places = sizes.dim, range(sizes.modalities)
        self.subsets = [s for n in places for s in combinations(places, n + 1)]
        joint = self.subsets[sizes.modalities :]
        self.below = {p: [s for s in self.subsets if set(s) < set(p)] for p in joint}
        self.edges: list[Edge] = [(s, p) for p in joint for s in self.below[p]]
        self.edges += [(s, None) for s in self.subsets]
        self.vertices = nn.ModuleList(
            mlp(len(self.below[p]) * dim, dim, dim, sizes.dropout) for p in joint
        )
        self.efficacy = mlp(sizes.modalities * dim, dim, len(self.edges), sizes.dropout)
        self.output = mlp(len(self.subsets) * dim, dim, sizes.labels, sizes.dropout)

    def whole(self, there: Vectors) -> dict[Subset, Tensor]:
        """Whether all of a subset is there, (B, 1), from whether each modality is, (B, 1)."""
        return {s: torch.stack([there[m] for m in s]).all(0) for s in self.subsets}

    def efficacies(self, vectors: Vectors, whole: Mapping[Subset, Tensor]) -> dict[Edge, Tensor]:
        """The weights (B, 1) of the edges; 0 where the larger subset is not whole.

        Args:
            vectors: One (B, D) a modality.
            whole: Which subsets are, as :meth:`whole` says.
        """
        weights = self.efficacy(torch.cat([*vectors], dim=1)).sigmoid().split(1, dim=1)
        each = zip(self.edges, weights, strict=True)
        return {(s, p): weight * whole[s if p is None else p] for (s, p), weight in each}

    def fuse(self, encoded: Vectors, padding: Vectors) -> Tensor:
        means = [mean_over_steps(x, mask) for x, mask in zip(encoded, padding, strict=True)]
        whole = self.whole([~mask.all(1, keepdim=True) for mask in padding])
        alpha = self.efficacies(means, whole)
        z = {(m,): x for m, x in enumerate(means)}
        for (p, below), vertex in zip(self.below.items(), self.vertices, strict=True):
            z[p] = vertex(torch.cat([alpha[s, p] * z[s] for s in below], dim=1)) * whole[p]
        return self.output(torch.cat([alpha[s, None] * x for s, x in z.items()], dim=1))
