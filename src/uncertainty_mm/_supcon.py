"""The kernel of :func:`uncertainty_mm.functional.supcon_loss`.

Three matrix products are necessary: the scores of the anchors with the keys, and the gradients of both sides. The rest
is arranged around them:

- Scores are computed in tiles that stay in the cache and are reduced at once (an online softmax, as in fused
  attention), so that memory grows with N * E and not with N * (N + Q).
- The gradient of log-sum-exp with respect to an anchor is the softmax-weighted mean of the keys, which is accumulated
  with the sum, tile by tile. The keys of the batch come last, when the sum of a row is known, and so receive their
  gradient from the same tile.
- Similarity is a dot product, so the positives need no mask: their mean score is the product of the anchor and the mean
  of its class without itself. (A single positive is picked from its tile.)
- On a CPU logarithms are to base 2, because exp2 is several times faster than exp; the factor goes into the anchors. On
  an accelerator, where every pass over a tile is as long as its product, a softmax does the work of four passes.
- A squared distance is a dot product as well: in the softmax over the keys the square of the anchor cancels, and minus
  half the square of the key is added to its scores (`has_offset`). This offset is the last feature of the rows, where
  an anchor has a 1. It is kept out of the products, which are fastest with the sizes that users choose, and where it
  would lose digits in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from uncertainty_mm import _bfloat16

Reduction = Literal["none", "mean", "sum"]

# Entries of a tile of scores, and keys of the bank in it. These were the fastest of the sizes tried on a CPU, because a
# tile of 8 MiB in float32 (4 MiB for the bank) stays in the cache. An accelerator needs larger tiles.
_CPU_TILE, _CPU_KEYS = 2**21, 1024
_ACCELERATOR_TILE, _ACCELERATOR_KEYS = 2**26, 2**14


def supcon(
    embeddings: Tensor,
    classes: Tensor,
    anchor_mask: Tensor,
    bank: Tensor,
    bank_classes: Tensor,
    temperature: float,
    reduction: Reduction,
    bf16_products: bool = False,
    has_offset: bool = False,
) -> Tensor:
    """The loss for checked arguments; see :func:`uncertainty_mm.functional.supcon_loss`.

    `anchor_mask` may be shorter than the batch: the remaining rows are keys only, without an entry in the result. With
    `has_offset` the last feature of a key is added to its products with the anchors; that of an anchor is ignored.
    """
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(
        embeddings
    ):
        raise RuntimeError("supcon_loss does not work under the transforms of torch.func")
    needs_grad = embeddings.requires_grad and torch.is_grad_enabled()
    loss: Tensor = _forward(
        embeddings,
        classes,
        anchor_mask,
        bank,
        bank_classes,
        temperature,
        reduction,
        bf16_products,
        has_offset,
        needs_grad,
    )[0]
    return loss


@torch.library.custom_op("uncertainty_mm::supcon", mutates_args=())
def _forward(
    embeddings: Tensor,
    classes: Tensor,
    anchor_mask: Tensor,
    bank: Tensor,
    bank_classes: Tensor,
    temperature: float,
    reduction: str,
    bf16_products: bool,
    has_offset: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and what its gradient needs, as an operator that compilers do not look into.

    A scalar loss returns its gradient. For `"none"` the bank is returned, copied here because the queue may be
    overwritten before the backward pass, until which a compiler might delay any other copy.
    """
    scalar = reduction != "none"
    loss, grad = _compute(
        embeddings,
        classes,
        anchor_mask,
        bank,
        bank_classes,
        temperature,
        reduction,
        bf16_products,
        has_offset,
        None,
        needs_grad and scalar,
    )
    kept = slice(None if needs_grad and not scalar else 0)
    return loss, grad, bank[kept].clone(), bank_classes[kept].clone()


@_forward.register_fake
def _(
    embeddings: Tensor,
    classes: Tensor,
    anchor_mask: Tensor,
    bank: Tensor,
    bank_classes: Tensor,
    temperature: float,
    reduction: str,
    bf16_products: bool,
    has_offset: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    scalar = reduction != "none"
    loss = embeddings.new_empty(() if scalar else anchor_mask.shape, dtype=dtype)
    grad = embeddings.new_empty(embeddings.shape if needs_grad and scalar else (0,), dtype=dtype)
    kept = slice(None if needs_grad and not scalar else 0)
    return loss, grad, torch.empty_like(bank[kept]), torch.empty_like(bank_classes[kept])


@torch.library.custom_op("uncertainty_mm::supcon_backward", mutates_args=())
def _backward(
    embeddings: Tensor,
    classes: Tensor,
    anchor_mask: Tensor,
    bank: Tensor,
    bank_classes: Tensor,
    temperature: float,
    bf16_products: bool,
    has_offset: bool,
    weights: Tensor,
) -> Tensor:
    """Gradient of the weighted sum of the anchors' losses."""
    grad = _compute(
        embeddings,
        classes,
        anchor_mask,
        bank,
        bank_classes,
        temperature,
        "none",
        bf16_products,
        has_offset,
        weights,
        True,
    )[1]
    return grad.to(embeddings.dtype)  # contiguous, as made


@_backward.register_fake
def _(
    embeddings: Tensor,
    classes: Tensor,
    anchor_mask: Tensor,
    bank: Tensor,
    bank_classes: Tensor,
    temperature: float,
    bf16_products: bool,
    has_offset: bool,
    weights: Tensor,
) -> Tensor:
    return torch.empty_like(embeddings, memory_format=torch.contiguous_format)


@torch.library.custom_op("uncertainty_mm::supcon_scale", mutates_args=())
def _scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The backward pass of a scalar loss, a separate operator because it has no derivative."""
    return (gradient * factor).to(dtype, copy=True, memory_format=torch.contiguous_format)


@_scale.register_fake
def _(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, classes, anchor_mask, _, _, ctx.temperature, reduction, *rest = inputs
    ctx.bf16_products, ctx.has_offset, needs_grad = rest
    _, grad, bank, bank_classes = output
    ctx.dtype, ctx.scalar = embeddings.dtype, reduction != "none"
    if not needs_grad:
        return
    if ctx.scalar:
        ctx.save_for_backward(grad)
    else:
        ctx.save_for_backward(embeddings, classes, anchor_mask, bank, bank_classes)


def _differentiate(ctx: Any, grad_loss: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    if ctx.scalar:
        (gradient,) = ctx.saved_tensors
        return (_scale(gradient, grad_loss, ctx.dtype), *[None] * 9)
    settings = ctx.temperature, ctx.bf16_products, ctx.has_offset
    return (_backward(*ctx.saved_tensors, *settings, grad_loss), *[None] * 9)


def _refuse_double_backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "supcon_loss forms its gradient in the forward pass and cannot be differentiated twice"
    )


_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(_refuse_double_backward)
_scale.register_autograd(_refuse_double_backward)


def _compute(
    embeddings: Tensor,
    classes: Tensor,
    anchor_mask: Tensor,
    bank: Tensor,
    bank_classes: Tensor,
    temperature: float,
    reduction: str,
    bf16_products: bool,
    has_offset: bool,
    weights: Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient; `weights` of the anchors replace those of the reduction in the gradient."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    num_rows = classes.shape[0]
    if num_rows == 0:
        loss = embeddings.new_zeros((0,) if reduction == "none" else (), dtype=dtype)
        return loss, embeddings.new_zeros(embeddings.shape if needs_grad else (0,), dtype=dtype)
    if bf16_products and embeddings.device.type == "cpu":
        bf16_products = _bfloat16.is_native_or_warns()
    with torch.autocast(embeddings.device.type, enabled=False):
        valid = classes >= 0
        rows = embeddings.to(dtype).masked_fill(~valid.unsqueeze(1), 0)
        bank, bank_classes = _without_empty_slots(bank, bank_classes)

        segment, bank_segment = _segments(classes, bank_classes)
        first = slice(anchor_mask.shape[0])
        num_positives, single = (x[first] for x in _positives(segment, bank_segment))
        anchors = anchor_mask & valid[first] & (num_positives > 0)
        num_positives = num_positives.clamp_min(1).to(dtype)
        inverse = num_positives.reciprocal()
        positives = _sum_of_others(rows, segment, _sums(bank, bank_segment, rows))[first]
        mean_positive = positives * inverse.unsqueeze(1)
        queries = rows[first]
        if has_offset:
            queries = F.pad(queries[:, :-1], (0, 1), value=1)
        positive = (queries * mean_positive).sum(1) / temperature
        if weights is None:
            weights = anchors.to(dtype)
            if reduction == "mean":
                weights = weights / weights.sum().clamp_min(1)
        weights = weights.to(dtype).masked_fill(~anchors, 0)

        losses, slope, grad = _against_all(
            rows,
            valid,
            anchors,
            weights,
            queries,
            positive,
            single.masked_fill(~anchors, -1),
            bank,
            bank_classes,
            temperature,
            bf16_products,
            has_offset,
            needs_grad,
        )
        losses = torch.maximum(losses, num_positives.log())  # only rounding leads below it
        losses = losses.masked_fill(~anchors, 0)
        if needs_grad:
            pull = (weights * slope).unsqueeze(1)
            if has_offset:
                mean_positive[:, -1] = 0  # for an anchor this feature is the constant 1
            grad[first] -= pull * mean_positive
            pulls = torch.zeros_like(rows)
            pulls[first] = queries * (pull * inverse.unsqueeze(1))
            grad -= _sum_of_others(pulls, segment, rows.new_zeros(len(rows) + 1, rows.shape[1]))
            grad /= temperature
        loss = losses if reduction == "none" else (losses * weights).sum()
        return loss, grad


def _without_empty_slots(bank: Tensor, bank_classes: Tensor) -> tuple[Tensor, Tensor]:
    """Drops empty slots on a CPU; on an accelerator, where counting them would wait, sets them to 0."""
    full = bank_classes >= 0
    if bank.device.type != "cpu":
        return bank.masked_fill(~full.unsqueeze(1), 0), bank_classes
    length = int(full.sum())
    if full[:length].all():  # no copy, since a queue fills up from the front
        return bank[:length], bank_classes[:length]
    return bank[full], bank_classes[full]


def _segments(classes: Tensor, bank_classes: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the class of each row of batch and bank: its first position among the sorted classes of the batch.

    Keys of a class that the batch does not have get one more index, after all others.
    """
    num_rows = classes.shape[0]
    ordered = classes.sort().values
    segment = torch.searchsorted(ordered, classes.contiguous())
    place = torch.searchsorted(ordered, bank_classes.to(classes.dtype).contiguous())
    place.clamp_max_(num_rows - 1)
    return segment, place.masked_fill(ordered.index_select(0, place) != bank_classes, num_rows)


def _positives(segment: Tensor, bank_segment: Tensor) -> tuple[Tensor, Tensor]:
    """Number of positives of each row, and the index of a single positive among bank and batch, otherwise -1."""
    keys = torch.cat([bank_segment, segment])
    places = torch.arange(keys.shape[0], device=keys.device)
    number, sum_of_places = (
        values.new_zeros(segment.shape[0] + 1).index_add_(0, keys, values).index_select(0, segment)
        for values in (torch.ones_like(places), places)
    )
    only = sum_of_places - places[bank_segment.shape[0] :]
    return number - 1, only.masked_fill(number != 2, -1)


def _sums(bank: Tensor, bank_segment: Tensor, rows: Tensor) -> Tensor:
    """Sum of the keys of the bank in each class of the batch."""
    totals = rows.new_zeros(rows.shape[0] + 1, rows.shape[1])
    size = _CPU_KEYS if bank.device.type == "cpu" else max(1, bank.shape[0])
    for keys, places in zip(bank.split(size), bank_segment.split(size), strict=True):
        totals.index_add_(0, places, keys.to(rows.dtype))
    return totals


def _sum_of_others(rows: Tensor, segment: Tensor, totals: Tensor) -> Tensor:
    """For each row, the sum of the other rows of its class and of its class in `totals`, which is changed in place.

    A row is subtracted from the sum of its class. The longest row of the class is kept out of that sum, so that what is
    subtracted is never longer than what is left, and no digits are lost.
    """
    num_rows = rows.shape[0]
    places = torch.arange(num_rows, device=rows.device)
    length = rows.abs().amax(1)
    longest = length.new_zeros(num_rows + 1).scatter_reduce(0, segment, length, "amax")
    candidate = places.masked_fill(length != longest.index_select(0, segment), num_rows)
    chosen = segment.new_full((num_rows + 1,), num_rows - 1)
    chosen = chosen.scatter_reduce(0, segment, candidate, "amin").index_select(0, segment)
    is_other = (chosen != places).unsqueeze(1).to(rows.dtype)
    # on a CPU products and index_select take a tenth of the time of masked_fill and indexing
    shorter = rows * is_other
    others = totals.index_add_(0, segment, shorter).index_select(0, segment)
    return others.sub_(shorter).add_(rows.index_select(0, chosen).mul_(is_other))


def _against_all(
    rows: Tensor,
    valid: Tensor,
    anchors: Tensor,
    weights: Tensor,
    queries: Tensor,
    positive: Tensor,
    single: Tensor,
    bank: Tensor,
    bank_classes: Tensor,
    temperature: float,
    bf16_products: bool,
    has_offset: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the anchors, their slopes with respect to the positive score, and the rest of the gradient.

    The gradient is that of the weighted sum of the losses, times the temperature. With several positives the loss is
    the log-sum-exp over the keys minus the mean score `positive`, and at least the logarithm of their number. With a
    `single` positive it may be so small that a difference would lose all digits, so it is log(1 + exp(L - s)), where L
    is the log-sum-exp of the other keys and s the score of the positive.
    """
    on_cpu = rows.device.type == "cpu"
    unit = math.log(2) if on_cpu else 1.0  # of the scores, see `_Tile`
    scale = 1 / (temperature * unit)
    offset = bank_offset = None
    if has_offset:
        offset, bank_offset = (scale * x[:, -1].to(rows.dtype) for x in (rows, bank))
        rows, bank, queries = (x[:, :-1].contiguous() for x in (rows, bank, queries))
    num_rows, dim = rows.shape
    result, slope = torch.zeros_like(weights), torch.ones_like(weights)
    grad = rows.new_zeros(num_rows, dim) if needs_grad else rows.new_zeros(0)
    to_offset = rows.new_zeros(num_rows, 1)
    places = torch.arange(anchors.shape[0], device=rows.device)
    if on_cpu:
        places = places[anchors]
    any_single = not on_cpu or bool((single >= 0).any())
    size, num_keys = (_CPU_TILE, _CPU_KEYS) if on_cpu else (_ACCELERATOR_TILE, _ACCELERATOR_KEYS)
    # fewer and larger products are faster on an accelerator: what whole tiles of the bank leave joins the batch
    alone = bank.shape[0] if on_cpu else bank.shape[0] - bank.shape[0] % num_keys
    width = max(num_rows + bank.shape[0] - alone, min(num_keys, alone))
    height = min(max(1, size // width), places.shape[0])
    tile = _Tile(height * width, rows, bf16_products)
    for place in places.split(height):
        anchor, spot = queries.index_select(0, place), single.index_select(0, place).unsqueeze(1)
        scaled = anchor * scale
        highest = anchor.new_full((place.shape[0], 1), tile.lowest)  # of no scores
        total, gathered = torch.zeros_like(highest), torch.zeros_like(anchor)
        for first, keys, bias in _key_tiles(
            rows, valid, offset, bank, bank_classes, bank_offset, alone, num_keys, tile.lowest
        ):
            tile.fill(scaled, keys, bias)
            batch = bank.shape[0] - first  # where the batch begins in this tile
            if batch < keys.shape[0]:  # without the anchor itself, which would be the maximum
                tile.scores.scatter_(1, place.unsqueeze(1) + batch, tile.lowest)
            if any_single:
                here = spot - first
                limit = highest.new_full(here.shape, math.inf)
                limit.masked_fill_((here >= 0) & (here < keys.shape[0]), tile.lowest)
                here.clamp_(0, keys.shape[0] - 1)
                tile.scores.scatter_reduce_(1, here, limit, "amin")
            level, part, factor = tile.exponentiate()
            previous, highest = highest, torch.maximum(highest, level)
            shrink = ((previous - highest) * unit).exp_()
            grow = ((level - highest) * unit).exp_()
            total = torch.addcmul(grow * part, total, shrink)
            grow *= factor
            if needs_grad:
                factors = tile.factors()
                gathered.mul_(shrink).addcmul_(factors @ keys.to(factors.dtype), grow)
        total.clamp_min_(torch.finfo(total.dtype).tiny)  # an anchor without any key
        log_total = highest * unit + total.log()
        score = positive.index_select(0, place).unsqueeze(1)
        lead = log_total - score
        is_single = spot >= 0
        losses = torch.where(is_single, F.softplus(lead), lead).squeeze(1)
        result.index_copy_(0, place, losses)
        slope.index_copy_(0, place, torch.where(is_single, lead.sigmoid(), 1).squeeze(1))
        if needs_grad:
            pushes = (weights * slope).index_select(0, place).unsqueeze(1) / total
            grad.index_add_(0, place, gathered * pushes)
            pushes *= grow  # the last tile held the keys of the batch
            factors = factors[:, batch:]
            grad += (factors.t() @ (anchor * pushes).to(factors.dtype)).to(grad.dtype)
            if has_offset:
                to_offset += tile.scores[:, batch:].t() @ pushes
    return result, slope, torch.cat([grad, to_offset], 1) if needs_grad and has_offset else grad


class _Tile:
    """The scores of some anchors with some keys, in memory that is taken once.

    On a CPU they are to base 2, so in units of log(2), and exponentiated in place while they are in the cache.

    Attributes:
        scores: (anchors, keys), of :meth:`fill`; after :meth:`exponentiate` what is proportional to their exponentials.
        lowest: Score of a key to leave out, finite because the softmax of nothing but -inf is NaN.
    """

    def __init__(self, size: int, rows: Tensor, bf16_products: bool) -> None:
        self.on_cpu = rows.device.type == "cpu"
        self.lowest = torch.finfo(rows.dtype).min / 2
        self._memory = rows.new_empty(size)
        self._more = self._memory if self.on_cpu else torch.empty_like(self._memory)
        self._half = torch.empty_like(self._memory, dtype=torch.bfloat16) if bf16_products else None

    def _view(self, memory: Tensor) -> Tensor:
        return memory[: self.shape[0] * self.shape[1]].view(self.shape)

    def fill(self, anchors: Tensor, keys: Tensor, bias: Tensor | None) -> None:
        """Sets the scores to the products of (n, D) and (k, D), plus a bias (k,)."""
        self.shape = anchors.shape[0], keys.shape[0]
        self.scores = self._view(self._memory)
        if self._half is not None:
            anchors, keys = anchors.bfloat16(), keys.bfloat16()
            half = torch.mm(anchors, keys.t(), out=self._view(self._half))
            if bias is None:
                self.scores.copy_(half)
            else:
                torch.add(half, bias, out=self.scores)
        elif bias is None:
            torch.mm(anchors, keys.t(), out=self.scores)
        else:
            torch.addmm(bias, anchors, keys.t(), out=self.scores)

    def exponentiate(self) -> tuple[Tensor, Tensor, Tensor | float]:
        """Replaces the scores s by p with exp(s - level) = factor * p; level, sum of exp(s - level), and factor."""
        if self.on_cpu:
            level = self.scores.amax(1, keepdim=True)
            total = self.scores.sub_(level).exp2_().sum(1, keepdim=True)
            return level, total, 1.0
        level, place = self.scores.max(1, keepdim=True)
        probs = torch.softmax(self.scores, 1, out=self._view(self._more))
        self.scores = probs
        total = probs.gather(1, place).reciprocal_()
        return level, total, total

    def factors(self) -> Tensor:
        """What :meth:`exponentiate` left, in the precision of products."""
        if self._half is None:
            return self.scores
        return self._view(self._half).copy_(self.scores)


def _key_tiles(
    rows: Tensor,
    valid: Tensor,
    offset: Tensor | None,
    bank: Tensor,
    bank_classes: Tensor,
    bank_offset: Tensor | None,
    alone: int,
    num_keys: int,
    lowest: float,
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Number of the first key of a tile, its keys, and the bias of their scores.

    The last tile holds what the bank has after its `alone` first keys, and then the batch.
    """
    bias = _bias(bank_classes >= 0, bank_offset, rows, lowest)
    own_bias = _bias(valid, offset, rows, lowest)
    for first in range(0, alone, num_keys):
        tile = slice(first, min(first + num_keys, alone))
        yield first, bank[tile].to(rows.dtype), None if bias is None else bias[tile]
    if alone < bank.shape[0]:
        rows = torch.cat([bank[alone:].to(rows.dtype), rows])
        if bias is not None and own_bias is not None:  # as on every accelerator
            own_bias = torch.cat([bias[alone:], own_bias])
    yield alone, rows, own_bias


def _bias(valid: Tensor, offset: Tensor | None, rows: Tensor, lowest: float) -> Tensor | None:
    if valid.device.type == "cpu" and valid.all():
        return offset
    if offset is None:
        offset = torch.zeros_like(valid, dtype=rows.dtype)
    return offset.masked_fill(~valid, lowest)
