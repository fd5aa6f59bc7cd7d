r"""Labels said one after another: what to say in training, and what a beam of sequences says of each label.

A decoder gives a probability to each label that has not been said and to the end, given what has been said. Said in a
fixed order, a set of labels is one sequence, and a label is present with the probability of all sequences in which it
occurs. These differ in what comes before it, so with the prefixes of a beam

.. math::
    P(q) = \sum_{\text{prefix}} P(\text{prefix})\, P(q \mid \text{prefix})

is a lower bound, and P(q) itself when the beam is wide enough for all prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

State = Sequence[Tensor]  # (N, ...) each: what a decoder remembers
# From what was last said (N,), Q at the begin, to the scores (N, Q + 1) of the labels and the end, and a new state.
Step = Callable[[Tensor, State], tuple[Tensor, State]]

UNLIKELY = -1e4  # a logarithm; infinity would have no gradient


def log_probs(scores: Tensor, left_out: Tensor) -> Tensor:
    """Log-probabilities (N, Q + 1) of what can be said: all but labels that are left out, (N, Q)."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.masked_fill(F.pad(left_out, (0, 1)), UNLIKELY).log_softmax(-1)


def sequence_loss(
    step: Step, state: State, labels: Tensor, unknown: Tensor | None, order: Tensor
) -> Tensor:
    """Cross-entropy of the labels that are present, in order, and the end; each step is told what the last should say.

    Args:
        step: The decoder.
        state: What it begins with, (B, ...) each.
        labels: Tensor (B, Q), above 0.5 where present.
        unknown: Bool tensor (B, Q), True where a label is not known: nobody says it.
        order: Int64 tensor (Q,), the labels in the order in which they are said.

    Returns:
        Mean over the samples with any known label of the sum over steps, a scalar; 0 without such a sample.
    """
    count = labels.shape[1]
    if unknown is None:
        unknown = torch.zeros_like(labels, dtype=torch.bool)
    present = ((labels > 0.5) & ~unknown)[:, order]
    places = torch.where(present, torch.arange(count, device=order.device), count).sort(1).values
    ends = F.pad(places, (0, 1), value=count)
    said = F.pad(order, (0, 1), value=count)[ends]  # (B, Q + 1), the end again and again
    left_out, silent = unknown, unknown.all(1)
    last = torch.full_like(said[:, 0], count)
    losses = []
    for target in said.unbind(1):
        scores, state = step(last, state)
        entropy = F.nll_loss(log_probs(scores, left_out), target, reduction="none")
        losses.append(entropy.masked_fill(silent, 0))
        left_out = left_out | F.one_hot(target, count + 1)[:, :count].bool()
        silent = silent | (target == count)
        last = target
    return torch.stack(losses).sum() / (~unknown.all(1)).sum().clamp_min(1)


def label_logits(step: Step, state: State, count: int, width: int) -> Tensor:
    """Logits (B, Q) of the labels, P(q) above, from a beam of at most `width` prefixes.

    Args:
        step: The decoder.
        state: What it begins with, (B, ...) each.
        count: Number of labels.
        width: Prefixes that are kept, of all that are one label longer.
    """
    batch = len(state[0])
    last = torch.full((batch, 1), count, device=state[0].device)
    said = torch.zeros(batch, 1, count, dtype=torch.bool, device=last.device)
    path, found = torch.zeros((), device=last.device), []
    for _ in range(count):
        scores, state = step(last.flatten(), state)
        next_said = log_probs(scores, said.flatten(0, 1))[:, :count].unflatten(0, last.shape)
        joint = path + next_said  # (B, width, Q)
        found.append(joint.logsumexp(1))
        best, chosen = joint.flatten(1).topk(min(width, joint[0].numel()), dim=1)
        path, last, before = best.unsqueeze(2), chosen % count, chosen // count
        said = said.gather(1, before.unsqueeze(2).expand(-1, -1, count))
        said = said | F.one_hot(last, count).bool()
        rows = before + joint.shape[1] * torch.arange(batch, device=last.device).unsqueeze(1)
        state = [x.index_select(0, rows.flatten()) for x in state]
    log_p = torch.stack(found).logsumexp(0).clamp(-15, -1e-6)
    return log_p - torch.log(-torch.expm1(log_p))
