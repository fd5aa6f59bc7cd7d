"""Soft ranks by sorting, over all pairs but, in a large batch, without a matrix of pairs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Entries up to which the matrix of pairs is faster than log2(B) steps. An accelerator spends its time on starting them.
_SMALL, _SMALL_ON_ACCELERATOR = 256, 1024


def _neighbours(scores: Tensor, weights: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    r"""Sums of :math:`w_j \exp(-|s_i - s_j| / \tau)` over the smaller and over the larger of ascending scores (..., B).

    In a large batch no matrix of pairs exists. The sum over the last `reach` entries doubles its reach by adding the
    sum that ends where it begins, scaled by the distance between the two, so log2(B) steps are needed. All terms have
    the sign of their weight, and every distance is one subtraction, so nothing overflows or cancels, unlike in
    cumulative sums of exponentials.
    """
    if scores.shape[-1] <= (_SMALL if scores.is_cpu else _SMALL_ON_ACCELERATOR):
        near = ((scores.unsqueeze(-1) - scores.unsqueeze(-2)).abs() / -temperature).exp()
        weights = weights.unsqueeze(-2)
        return (near.tril(-1) * weights).sum(-1), (near.triu(1) * weights).sum(-1)
    # Larger scores are the smaller ones of the mirrored batch.
    scores = torch.stack([scores, -scores.flip(-1)], -2)
    totals = torch.stack([weights, weights.flip(-1)], -2)

    def from_before(reach: int) -> Tensor:
        """The contribution to each total from the one `reach` places before it."""
        faded = ((scores[..., :-reach] - scores[..., reach:]) / temperature).exp()
        return F.pad(faded * totals[..., :-reach], (reach, 0))

    reach = 1
    while reach < scores.shape[-1]:
        totals = totals + from_before(reach)
        reach *= 2
    smaller, larger = from_before(1).unbind(-2)  # without the entry itself
    return smaller, larger.flip(-1)


def laplace_rank(scores: Tensor, kept: Tensor, temperature: float) -> Tensor:
    """Soft ranks of scores (..., B) among those kept; see :func:`uncertainty_mm.functional.soft_rank`."""
    if torch.compiler.is_compiling():  # a compiler manages the memory itself
        return _rank(scores, kept, temperature)
    return _Rank.apply(scores, kept, temperature)  # type: ignore[no-any-return, no-untyped-call]


def _rank(scores: Tensor, kept: Tensor, temperature: float) -> Tensor:
    order = scores.detach().argsort(-1)
    kept = kept.expand_as(order).gather(-1, order)
    below = kept.cumsum(-1) - kept.long()  # integers are exact and deterministic on every device
    smaller, larger = _neighbours(scores.gather(-1, order), kept.to(scores.dtype), temperature)
    # A smaller score adds 1 - exp(-distance) / 2 to the rank, a larger one exp(-distance) / 2.
    ranks = 1 + (below - 0.5 * smaller) + 0.5 * larger
    return ranks.gather(-1, order.argsort(-1))


class _Rank(torch.autograd.Function):
    """The derivative written out, so that the backward pass needs only the scores and not every step of the sums."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, kept: Tensor, temperature: float) -> Tensor:
        return _rank(scores, kept, temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.temperature = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        scores, kept = ctx.saved_tensors
        order = scores.detach().argsort(-1)
        kept = kept.expand_as(order).gather(-1, order).to(grad.dtype)
        grad = grad.gather(-1, order)
        # Moving a score changes its own rank, and every other rank by its share in the opposite direction.
        weights = torch.stack([kept, kept * grad])
        smaller, larger = _neighbours(scores.gather(-1, order), weights, ctx.temperature)
        near, moved = smaller + larger
        slope = kept * (grad * near - moved) * (0.5 / ctx.temperature)
        return slope.gather(-1, order.argsort(-1)), None, None


def divergence(a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """Along the last axis of a and b (..., B); see :func:`uncertainty_mm.functional.ordinality_divergence`."""

    def log_softmax(x: Tensor) -> Tensor:
        if mask is not None:
            x = x.masked_fill(mask, torch.finfo(x.dtype).min)
        return x.log_softmax(-1)

    log_a, log_b = log_softmax(a), log_softmax(b)
    difference = log_a - log_b
    if mask is not None:
        difference = difference.masked_fill(mask, 0)
    return ((log_a.exp() - log_b.exp()) * difference).sum(-1)
