"""Labels said one after the other, in the manner of MMS2S (Zhang et al. 2020, EMNLP).

    p(Y) = sum over the orders y_1 ... y_n of Y of  p(end | Y) prod_t p(y_t | {y_1, ..., y_(t-1)}, modalities)

A decoder says a label, or that it has said all; what it says depends on what it has said and on the modalities, which
it weighs anew each time. What differs: it knows which labels were said, not in which order, so there are only 2^Q
states, and the sum is exact where the paper keeps the likeliest sequences. So is the probability of a label, p(q) = sum
of p(Y) over the sets with q: how often q is said before the end, whatever else is said.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from uncertainty_mm.data import MultimodalBatch
from uncertainty_mm.examples.baselines.base import (
    Baseline,
    Output,
    Sizes,
    Transformer,
    Vectors,
    mlp,
)
from uncertainty_mm.examples.baselines.labels import ModalityAttention
from uncertainty_mm.examples.baselines.mult import CrossModalLayer

MOST_LABELS = 12


class LabelSets(nn.Module):
    """All sets of Q labels, the small ones first, and how likely each is to be what is said.

    Attributes:
        members: Bool tensor (2^Q, Q), the labels of each set.
        before: Int64 tensor (2^Q, Q), the set without the label; 0 where it has not got it.
    """

    members: Tensor
    before: Tensor

    def __init__(self, labels: int) -> None:
        super().__init__()
        if labels > MOST_LABELS:
            raise ValueError(
                f"Expected at most {MOST_LABELS} labels, since all sets of them are gone through, but got {labels}"
            )
        codes = torch.tensor(sorted(range(2**labels), key=int.bit_count))
        bits = 1 << torch.arange(labels)
        members = (codes.unsqueeze(1) & bits) > 0
        before = codes.argsort()[codes.unsqueeze(1) & ~bits].masked_fill(~members, 0)
        self.register_buffer("members", members, persistent=False)
        self.register_buffer("before", before, persistent=False)
        self.counts = members.sum(1).bincount().tolist()  # sets by size

    def forward(self, said: Tensor) -> Tensor:
        """Log-probabilities (B, 2^Q) of the sets, from those (B, 2^Q, Q + 1) of what is said next, last the end."""
        reached = said.new_zeros(len(said), 1)  # the empty set is where all begin
        labels = torch.arange(self.members.shape[1], device=said.device)
        steps = zip(self.members.split(self.counts), self.before.split(self.counts), strict=True)
        for members, before in list(steps)[1:]:
            come = reached[:, before] + said[:, before, labels]
            come = come.masked_fill(~members, -torch.inf).logsumexp(2)
            reached = torch.cat([reached, come], dim=1)
        return reached + said[:, :, -1]

    def logits(self, sets: Tensor) -> Tensor:
        """Logits (B, Q) of a label to be in the set, from the log-probabilities of the sets."""
        sets = sets.unsqueeze(2)
        inside = sets.masked_fill(~self.members, -torch.inf).logsumexp(1)
        return inside - sets.masked_fill(self.members, -torch.inf).logsumexp(1)


class SequenceToSet(Baseline):
    """Labels are said one after the other until the end is said, none twice."""

    can_borrow = ("typicality",)

    def build(self, sizes: Sizes) -> None:
        dim, options = sizes.dim, (sizes.dim, sizes.heads, sizes.dropout)
        self.sets = LabelSets(sizes.labels)
        self.tokens = nn.Parameter(0.5 * torch.randn(1 + sizes.labels, dim))  # the first: to begin
        self.memory = Transformer(*options)
        self.readers = nn.ModuleList(CrossModalLayer(*options) for _ in range(sizes.modalities))
        self.modality = ModalityAttention(dim)
        self.speaker = mlp(dim, dim, sizes.labels + 1, sizes.dropout)

    def decode(self, encoded: Vectors, padding: Vectors, factor: Tensor | None = None) -> Tensor:
        """Log-probabilities (B, 2^Q, Q + 1) of what is said when a set of labels has been said."""
        members = self.sets.members
        forgotten = torch.cat([torch.zeros_like(members[:, :1]), ~members], dim=1)
        said = self.tokens.expand(len(members), -1, -1)
        state = self.memory(said, forgotten)[:, 0].expand(len(encoded[0]), -1, -1)
        each = zip(self.readers, encoded, padding, strict=True)
        answers = torch.stack([read(state, x, mask) for read, x, mask in each], dim=1)
        missing = torch.stack([mask.all(1) for mask in padding], dim=1)
        logits = self.speaker(state + self.modality(answers, missing, factor)).float()
        twice = torch.cat([members, torch.zeros_like(members[:, :1])], dim=1)
        return logits.masked_fill(twice, -torch.inf).log_softmax(2)

    def fuse(self, encoded: Vectors, padding: Vectors, factor: Tensor | None = None) -> Output:
        sets = self.sets(self.decode(encoded, padding, factor))
        return Output(self.sets.logits(sets), {}, sets)

    def auxiliary(self, output: Output, batch: MultimodalBatch) -> Mapping[str, Tensor]:
        """In place of the cross-entropy, that of the set; of all sets that agree with it on the known labels."""
        unknown = torch.zeros_like(batch.labels) if batch.unknown is None else batch.unknown
        known = ~unknown.bool()
        drawn = self.targets(batch).bernoulli() > 0  # a set, where labels are soft
        differs = self.sets.members != drawn.unsqueeze(1)
        differs = (differs & known.unsqueeze(1)).any(2)
        likelihood = output.hidden.masked_fill(differs, -torch.inf).logsumexp(1)
        return {"cls": -likelihood.sum() / known.sum().clamp_min(1)}  # as large as of each label
