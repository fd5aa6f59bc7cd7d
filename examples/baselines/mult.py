"""Modalities that ask each other, in the manner of MulT (Tsai et al. 2019, arXiv 1906.00295)."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor, nn

from uncertainty_mm.encoder import EncoderLayer
from uncertainty_mm.examples.baselines.base import Baseline, Sizes, Vectors, mean_over_steps, mlp


class CrossModalLayer(nn.Module):
    """A Transformer layer in which the steps of one modality ask those of another."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.source_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = EncoderLayer(dim, heads, dropout).feed_forward

    def forward(self, x: Tensor, source: Tensor, padding: Tensor) -> Tensor:
        """Expects x (B, S, D), and of the other modality (B, T, D) and its padding (B, T)."""
        missing = padding.all(dim=1, keepdim=True)
        source = self.source_norm(source)
        # Where there is nothing to ask, the softmax needs keys all the same; the answer is left out.
        answer, _ = self.attention(
            self.norm(x), source, source, key_padding_mask=padding & ~missing, need_weights=False
        )
        x = x + self.dropout(answer).masked_fill(missing.unsqueeze(2), 0)
        return x + self.feed_forward(x)


class CrossModal(Baseline):
    """Every modality asks every other one.

    Its features come from our encoders instead of convolutions, one layer reads a modality instead of several, and the
    mean over the steps is classified instead of the last step behind more Transformer layers.
    """

    def build(self, sizes: Sizes) -> None:
        self.pairs = list(permutations(range(sizes.modalities), 2))
        self.layers = nn.ModuleList(
            CrossModalLayer(sizes.dim, sizes.heads, sizes.dropout) for _ in self.pairs
        )
        vectors = sizes.modalities + len(self.pairs)
        self.head = mlp(vectors * sizes.dim, sizes.dim, sizes.labels, sizes.dropout)

    def fuse(self, encoded: Vectors, padding: Vectors) -> Tensor:
        vectors = [mean_over_steps(x, mask) for x, mask in zip(encoded, padding, strict=True)]
        for (target, source), layer in zip(self.pairs, self.layers, strict=True):
            read = layer(encoded[target], encoded[source], padding[source])
            vectors.append(mean_over_steps(read, padding[target]))
        return self.head(torch.cat(vectors, dim=1))
