r"""Labels as a sequence to generate, in the manner of SGM (Yang et al. 2018, arXiv 1806.04822).

An LSTM that attends to the encoded steps :math:`h_i` says one label after another, frequent ones first, and then that
these were all. What it says passes a mask, so that it says nothing twice, and what it hears of its last word is the
label mixed with all that it might have said,

.. math::
    p_t = \mathrm{softmax}\big(W_o \tanh(W_d s_t + V_d c_t) + I_t\big), \quad
    I_t^q = -\infty \text{ if } q \text{ was said}, \qquad
    g = (1 - H) \odot e + H \odot \bar e, \quad \bar e = \sum_q p_{t-1}^q\, e_q

with :math:`c_t = \sum_i \alpha_{ti} h_i`, :math:`\alpha_t = \mathrm{softmax}_i(v^\top \tanh(W_a s_t + U_a h_i))`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from uncertainty_mm.data import MultimodalBatch
from uncertainty_mm.examples.baselines.base import Output, Sizes, Vectors, mean_over_steps
from uncertainty_mm.examples.baselines.decoder import State, label_logits, sequence_loss
from uncertainty_mm.examples.baselines.sequence import OneSequence


class Generator(nn.Module):
    """Says the next label. Its state: steps, keys, padding, hidden state, cell, context, what it might have said."""

    def __init__(self, dim: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(labels + 1, dim)  # the last: begin, end
        self.gate = nn.Linear(2 * dim, dim)  # H
        self.lstm = nn.Linear(3 * dim, 4 * dim)
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.score = nn.Linear(dim, 1, bias=False)  # v
        self.first = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Sequential(nn.Linear(2 * dim, dim), nn.Tanh(), nn.Linear(dim, labels + 1))

    def begin(self, steps: Tensor, padding: Tensor) -> State:
        """The state before anything was said of steps (B, S, D) with padding (B, S)."""
        hidden = self.first(mean_over_steps(steps, padding)).tanh()
        begin = self.embedding.weight[-1].expand_as(hidden)
        nothing = torch.zeros_like(hidden)
        return steps, self.key(steps), padding, hidden, nothing, nothing, begin

    def attend(self, hidden: Tensor, steps: Tensor, keys: Tensor, padding: Tensor) -> Tensor:
        """The weights (N, S) of the steps; 0 at padding."""
        scores = self.score((self.query(hidden).unsqueeze(1) + keys).tanh()).squeeze(2)
        missing = padding.all(1, keepdim=True)  # the softmax needs a step all the same
        return scores.masked_fill(padding & ~missing, -torch.inf).softmax(1).masked_fill(missing, 0)

    def forward(self, last: Tensor, state: State) -> tuple[Tensor, State]:
        steps, keys, padding, hidden, cell, context, expected = state
        word = self.embedding(last)
        gate = self.gate(torch.cat([word, expected], dim=1)).sigmoid()
        heard = self.dropout(word + gate * (expected - word))
        *gates, new = self.lstm(torch.cat([heard, context, hidden], dim=1)).chunk(4, dim=1)
        take, keep, show = (gate.sigmoid() for gate in gates)
        cell = keep * cell + take * new.tanh()
        hidden = show * cell.tanh()
        weights = self.attend(hidden, steps, keys, padding)
        context = (weights.unsqueeze(1) @ steps).squeeze(1)
        scores = self.out(self.dropout(torch.cat([hidden, context], dim=1)))
        expected = scores.softmax(1) @ self.embedding.weight
        return scores, (steps, keys, padding, hidden, cell, context, expected)


class SequenceGeneration(OneSequence):
    """Says the labels that are present, the most frequent first.

    It reads one sequence, of all modalities unless `modality` names one. Our encoders stand in for a bidirectional
    LSTM, the gate H goes through a sigmoid, and the mean of the steps begins. The paper decides by the best sequence of
    a beam; here every prefix in the beam adds to the probability of each label (`decoder.py`), so that there is
    something to calibrate. Trained with the cross-entropy of the sequence: soft labels have no part in it. In training
    mode logits are those of a beam of one, and no loss depends on them.
    """

    order: Tensor  # of the labels, by how frequent they are in training
    width = 8  # of the beam

    def build(self, sizes: Sizes) -> None:
        super().build(sizes)
        self.generator = Generator(sizes.dim, sizes.labels, sizes.dropout)
        self._keep(order=torch.arange(sizes.labels))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = self.trainer.datamodule.part("train")
        frequency = data.labels.float().sum(0)
        known = len(data) if data.unknown is None else (~data.unknown).sum(0).clamp_min(1)
        self.order.copy_((frequency / known).argsort(descending=True, stable=True))

    def fuse(self, encoded: Vectors, padding: Vectors) -> Output:
        state = self.generator.begin(*self.read(encoded, padding))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
            width = 1 if self.training else self.width
            logits = label_logits(self.generator, state, len(self.order), width)
        return Output(logits, {}, state)

    def auxiliary(self, output: Output, batch: MultimodalBatch) -> Mapping[str, Tensor]:
        state, unknown = output.hidden, batch.unknown
        return {"cls": sequence_loss(self.generator, state, batch.labels, unknown, self.order)}
