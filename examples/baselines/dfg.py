r"""A vertex for every subset of modalities, in the manner of the Dynamic Fusion Graph (Zadeh et al. 2018).

From "Multimodal Language Analysis in the Wild", ACL 2018. With :math:`z_{\{m\}}` what is known of modality m,
every larger subset P of modalities, and the output :math:`\tau` as if it stood above all, is made of its parts,

.. math::
    z_P = D_P\big([\alpha_{S, P}\, z_S]_{\emptyset \ne S \subset P}\big), \qquad
    \alpha = \sigma\big(D_\alpha([z_{\{m\}}]_m)\big) \in [0, 1]

so the efficacies :math:`\alpha` decide for each sample which paths of the graph are open.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from uncertainty_mm.examples.baselines.base import Baseline, Sizes, Vectors, mean_over_steps, mlp

Subset = tuple[int, ...]  # of the modalities, by their places


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
        self.edges = [*((s, p) for p in joint for s in self.below[p])]
        self.edges += [(s, None) for s in self.subsets]  # to the output
        self.vertices = nn.ModuleList(
            mlp(len(self.below[p]) * dim, dim, dim, sizes.dropout) for p in joint
        )
        self.efficacy = mlp(sizes.modalities * dim, dim, len(self.edges), sizes.dropout)
        self.output = mlp(len(self.subsets) * dim, dim, sizes.labels, sizes.dropout)

    def efficacies(
        self, vectors: Vectors, there: Tensor
    ) -> dict[tuple[Subset, Subset | None], Tensor]:
        """The weights (B, 1) of the edges; 0 to and from a subset of which a modality is missing.

        Args:
            vectors: One (B, D) a modality.
            there: Bool tensor (B, M).
        """
        weights = self.efficacy(torch.cat([*vectors], dim=1)).sigmoid()
        whole = {subset: there[:, list(subset)].all(1, keepdim=True) for subset in self.subsets}
        return {
            (part, target): weights[:, [i]] * whole[part if target is None else target]
            for i, (part, target) in enumerate(self.edges)
        }

    def fuse(self, encoded: Vectors, padding: Vectors) -> Tensor:
        means = [mean_over_steps(x, mask) for x, mask in zip(encoded, padding, strict=True)]
        there = ~torch.stack([mask.all(1) for mask in padding], dim=1)
        alpha = self.efficacies(means, there)
        known = {(m,): x for m, x in enumerate(means)}
        for (target, parts), vertex in zip(self.below.items(), self.vertices, strict=True):
            x = vertex(torch.cat([alpha[part, target] * known[part] for part in parts], dim=1))
            known[target] = x * there[:, list(target)].all(1, keepdim=True)
        return self.output(torch.cat([alpha[part, None] * x for part, x in known.items()], dim=1))
