r"""Attention of each label, by what a step says and by what the label is, in the manner of LSAN (Xiao et al. 2019).

"Label-Specific Document Representation for Multi-Label Text Classification", EMNLP 2019. Of the encoded steps
:math:`H` (S x D) each label reads a mixture of two views, one from the steps alone and one from how near they are to an
embedding of the label, the rows of :math:`C`,

.. math::
    M^s = \mathrm{softmax}\big(W_2 \tanh(W_1 H^\top)\big) H, \quad M^l = (C H^\top) H, \qquad
    M = \alpha \odot M^s + \beta \odot M^l, \quad \alpha + \beta = 1

where each view asks for its share, :math:`\alpha \propto \sigma(M^s w_3)`, :math:`\beta \propto \sigma(M^l w_4)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uncertainty_mm.examples.baselines.base import Sizes, Vectors, mlp
from uncertainty_mm.examples.baselines.sequence import OneSequence


class LabelAttention(OneSequence):
    """A vector for each label, its own reading of the sequence, classified by one network for all labels.

    It reads one sequence, of all modalities unless `modality` names one. Our encoders stand in for a bidirectional
    LSTM, the embeddings of the labels are learned from nothing instead of from their words, and what they are near to
    passes a softmax too: without it :math:`M^l` would grow with the length. A bias for each label, which the paper has
    not, says how frequent it is where there is nothing to read.
    """

    def build(self, sizes: Sizes) -> None:
        super().build(sizes)
        dim, labels = sizes.dim, sizes.labels
        self.hidden = nn.Linear(dim, dim, bias=False)  # W_1
        self.content = nn.Parameter(torch.empty(labels, dim))  # W_2
        self.embedding = nn.Parameter(torch.empty(labels, dim))  # C
        self.content_share, self.label_share = nn.Linear(dim, 1), nn.Linear(dim, 1)
        self.head = mlp(dim, dim, 1, sizes.dropout)
        self.bias = nn.Parameter(torch.zeros(labels))
        for rows in (self.content, self.embedding):
            nn.init.normal_(rows, std=dim**-0.5)

    def attention(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """The weights (B, Q, S) of both views; 0 at padding, and they sum to 1 unless all is padding."""
        missing = padding.all(1).view(-1, 1, 1)  # the softmax needs a step all the same
        left_out = padding.unsqueeze(1) & ~missing
        scores = (self.hidden(x).tanh() @ self.content.T, x @ self.embedding.T)
        content, label = (
            each.transpose(1, 2)
            .masked_fill(left_out, -torch.inf)
            .softmax(2)
            .masked_fill(missing, 0)
            for each in scores
        )
        return content, label

    def fuse(self, encoded: Vectors, padding: Vectors) -> Tensor:
        x, mask = self.read(encoded, padding)
        by_content, by_label = (weights @ x for weights in self.attention(x, mask))
        alpha = self.content_share(by_content).sigmoid()
        beta = self.label_share(by_label).sigmoid()
        mixed = torch.lerp(by_content, by_label, beta / (alpha + beta))
        return self.head(mixed).squeeze(2) + self.bias
