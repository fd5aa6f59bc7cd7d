"""Messages between steps, modalities and labels, in the manner of HHMPN (doi 10.1609/aaai.v35i16.17686).

    v_i <- v_i + sum_j a_ij W v_j,   a_i = softmax over j of v_i' A v_j,   then v_i <- v_i + MLP(v_i)

over the edges of a graph (Zhang et al. 2021): between all steps (feature to feature), from the steps of a modality to
the labels (feature to label), from the modalities to a label (modality to label), and between labels (label to label).
What differs: the steps come from our encoders; the messages of a kind pass once, with the attention and normalisation
of our Transformer layers; a modality sends each label one vector, which the label weighs against those of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uncertainty_mm.examples.baselines.base import Baseline, Sizes, Transformer, Vectors
from uncertainty_mm.examples.baselines.labels import LabelHead, ModalityAttention
from uncertainty_mm.examples.baselines.mult import CrossModalLayer


class MessagePassing(Baseline):
    """A graph of steps, modalities and labels. No message knows an order of the modalities or of the labels."""

    def build(self, sizes: Sizes) -> None:
        options = sizes.dim, sizes.heads, sizes.dropout
        self.labels = nn.Parameter(0.5 * torch.randn(sizes.labels, sizes.dim))
        self.feature_to_feature = Transformer(*options)
        self.feature_to_label = nn.ModuleList(
            CrossModalLayer(*options) for _ in range(sizes.modalities)
        )
        self.modality_to_label = ModalityAttention(sizes.dim)
        self.label_to_label = Transformer(*options)
        self.head = LabelHead(sizes)

    can_borrow = ("typicality",)

    def fuse(self, encoded: Vectors, padding: Vectors, factor: Tensor | None = None) -> Tensor:
        lengths = [mask.shape[1] for mask in padding]
        steps = self.feature_to_feature(torch.cat([*encoded], dim=1), torch.cat([*padding], dim=1))
        labels = self.labels.expand(len(steps), -1, -1)
        edges = zip(self.feature_to_label, steps.split(lengths, dim=1), padding, strict=True)
        sent = torch.stack([layer(labels, x, mask) for layer, x, mask in edges], dim=1)
        missing = torch.stack([mask.all(1) for mask in padding], dim=1)
        labels = labels + self.modality_to_label(sent, missing, factor)
        nobody = torch.zeros(labels.shape[:2], dtype=torch.bool, device=labels.device)
        return self.head(self.label_to_label(labels, nobody))
