"""Common and private parts by an adversary, in the manner of TAILOR (Zhang et al. 2022, arXiv 2201.05834).

    min over C, P, max over D:  log D(C(x_m))_m - log D(P_m(x_m))_m + cos^2(C(x_m), P_m(x_m))

A discriminator D is to tell the modality m of a vector. The common part C, one for all modalities, is made so that D
cannot tell; the private parts P_m so that it can. Then each label asks what the parts say together. What differs: the
two sides play at once, by reversed gradients (Ganin et al. 2016, arXiv 1505.07818), and each part has a discriminator
of its own; a common part is one vector a modality, a private one has all steps, and one Transformer layer joins them
where the paper has a ladder of them; orthogonal is the cosine of the two; the weights of the losses are chosen here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncertainty_mm.data import MultimodalBatch
from uncertainty_mm.examples.baselines.base import (
    Baseline,
    Output,
    Sizes,
    Transformer,
    mean_over_steps,
    mlp,
)
from uncertainty_mm.examples.baselines.labels import LabelHead, LabelQueries
from uncertainty_mm.lightning import masked_bce, masked_mean


class Reversed(torch.autograd.Function):
    """The identity, whose gradient has the other sign: what is before it works against what is behind it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Refinement(nn.Module):
    """Splits the steps of the modalities into a common and a private part, against a discriminator."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        dim, self.modalities = sizes.dim, sizes.modalities
        self.common = mlp(dim, dim, dim, sizes.dropout)
        self.private = nn.ModuleList(
            mlp(dim, dim, dim, sizes.dropout) for _ in range(self.modalities)
        )
        self.discriminators = nn.ModuleList(mlp(dim, dim, self.modalities, 0.0) for _ in range(2))

    def forward(
        self, encoded: Sequence[Tensor], padding: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """Private steps (B, S_m, D) by modality; common and private means, (B, M, D), normalised."""
        private = [layer(x) for layer, x in zip(self.private, encoded, strict=True)]
        parts = [self.common(x) for x in encoded], private
        means = [
            torch.stack([mean_over_steps(*each) for each in zip(part, padding, strict=True)], dim=1)
            for part in parts
        ]
        common, own = (F.layer_norm(x, x.shape[-1:]) for x in means)
        return private, common, own

    def losses(self, common: Tensor, private: Tensor, missing: Tensor) -> dict[str, Tensor]:
        """How well the modalities are told from either part, and how alike the two parts of one are."""
        modality = torch.arange(self.modalities, device=common.device).expand(missing.shape)
        modality = modality.masked_fill(missing, -100)  # what the cross-entropy leaves out

        parts = zip(self.discriminators, (Reversed.apply(common), private), strict=True)
        told = [F.cross_entropy(f(x).transpose(1, 2), modality, reduction="none") for f, x in parts]
        alike = F.cosine_similarity(common, private, dim=2).square()
        losses = {"common": told[0], "private": told[1], "orthogonal": alike}
        return {name: masked_mean(loss, missing) for name, loss in losses.items()}


class CommonPrivate(Baseline):
    """Common parts that show no modality, private parts that show it, and labels that ask both."""

    can_borrow = ("pooling",)

    def build(self, sizes: Sizes) -> None:
        self.refinement = Refinement(sizes)
        self.common_head = mlp(sizes.dim, sizes.dim, sizes.labels, sizes.dropout)
        self.transformer = Transformer(sizes.dim, sizes.heads, sizes.dropout)
        self.queries = LabelQueries(1, sizes)
        self.tailor = mlp(sizes.dim, sizes.dim, sizes.dim, sizes.dropout)
        self.head = LabelHead(sizes)

    def fuse(self, encoded: Sequence[Tensor], padding: Sequence[Tensor]) -> Output:
        private_steps, common, private = self.refinement(encoded, padding)
        missing = torch.stack([mask.all(1) for mask in padding], dim=1)
        left_out = torch.cat([*padding, missing], dim=1)
        fused = self.transformer(torch.cat([*private_steps, common], dim=1), left_out)
        tailored = self.queries([fused], [left_out]).squeeze(1)
        losses = self.refinement.losses(common, private, missing)
        told = self.common_head(mean_over_steps(common, missing))
        return Output(
            self.head(self.tailor(tailored)),
            {name: 0.1 * loss for name, loss in losses.items()},
            others=(told,),
        )

    def auxiliary(self, output: Output, batch: MultimodalBatch) -> Mapping[str, Tensor]:
        """The common parts tell the labels too."""
        told = masked_bce(output.others[0], self.targets(batch), batch.unknown)
        return {**output.auxiliary, "common_labels": 0.5 * told}
