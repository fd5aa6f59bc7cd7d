r"""Words whose meaning is shifted by how they are said, in the manner of RAVEN (Wang et al. 2019, arXiv 1811.09362).

With a word :math:`e` and what another modality m shows meanwhile, :math:`h_m`, the word is shifted to

.. math::
    h = \sum_m \sigma(w_m^\top [h_m; e] + b_m)\, W_m h_m, \qquad
    e' = e + \min\Big(\frac{\lVert e \rVert}{\lVert h \rVert}\, \beta,\; 1\Big)\, h

so that no shift is longer than :math:`\beta` of the word itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncertainty_mm.examples.baselines.base import (
    Baseline,
    Sizes,
    Transformer,
    Vectors,
    mean_over_steps,
    mlp,
)


class Shift(nn.Module):
    """How one modality moves each word, (B, S, D), 0 where the modality is missing."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.gate = nn.Linear(2 * dim, 1)
        self.project = nn.Linear(dim, dim)

    def forward(self, words: Tensor, steps: Tensor, padding: Tensor) -> Tensor:
        """Expects words (B, S, D), and of the other modality the steps (B, T, D) and their padding (B, T)."""
        missing = padding.all(1).view(-1, 1, 1)
        # Where there is nothing to ask, the softmax needs keys all the same; the answer is left out.
        mask = ~padding.unsqueeze(1) | missing
        shown = F.scaled_dot_product_attention(self.query(words), steps, steps, attn_mask=mask)
        weight = self.gate(torch.cat([shown, words], dim=2)).sigmoid()
        return (weight * self.project(shown)).masked_fill(missing, 0)


def bounded(shift: Tensor, words: Tensor, limit: float) -> Tensor:
    """The shift (..., D), no longer than `limit` times the word (..., D)."""
    most = limit * torch.linalg.vector_norm(words, dim=-1, keepdim=True)
    length = torch.linalg.vector_norm(shift, dim=-1, keepdim=True)
    return shift * (most / length.clamp_min(1e-6)).clamp_max(1)


class ShiftedWords(Baseline):
    """The steps of the first modality, the words, shifted by all others.

    The paper has words aligned with what is seen and heard meanwhile; here each word asks the steps of another modality
    by attention. A Transformer layer reads the shifted words instead of an LSTM. A learned word stands before the
    others, so that there is something to shift where a sample has no words. Words are normalised (all are about as
    long), and the bound is a constant, half a word.
    """

    limit = 0.5  # beta

    def build(self, sizes: Sizes) -> None:
        dim = sizes.dim
        self.first = nn.Parameter(torch.empty(dim).normal_())
        self.shifts = nn.ModuleList(Shift(dim) for _ in range(sizes.modalities - 1))
        self.transformer = Transformer(dim, sizes.heads, sizes.dropout)
        self.head = mlp(dim, dim, sizes.labels, sizes.dropout)

    def fuse(self, encoded: Vectors, padding: Vectors) -> Tensor:
        words = torch.cat([self.first.expand(len(encoded[0]), 1, -1), encoded[0]], dim=1)
        mask = F.pad(padding[0], (1, 0))  # the learned word is always there
        shift = torch.zeros_like(words)
        for layer, steps, missing in zip(self.shifts, encoded[1:], padding[1:], strict=True):
            shift = shift + layer(words, steps, missing)
        shifted = words + bounded(shift, words, self.limit)
        return self.head(mean_over_steps(self.transformer(shifted, mask), mask))
