"""The kernel of :func:`uncertainty_mm.functional.supcon_loss`.

The necessary work is three matrix products: scores of the anchors with the keys, and the gradient of either side. The
rest is arranged around them:

- Scores are made in tiles that stay in the cache and are reduced at once (an online softmax, as in fused attention), so
  that memory grows with N * E and not with N * (N + Q).
- The gradient of log sum exp with respect to an anchor is the softmax-weighted mean of the keys. It is accumulated
  along with the sum, tile by tile. The keys of the batch come last, when the sum of a row is known, and receive their
  gradient from the same tile.
- Similarity is a dot product, so the positives need no mask: their mean score is the anchor's product with the mean of
  the class without itself.
- Logarithms are to base 2: exp2 is several times faster than exp on a CPU, and the factor goes into the anchors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]

# Entries of a tile of scores, and keys of the bank in it. Of the sizes tried on a CPU these were the fastest: such a
# tile of 8 MiB in float32 (4 MiB for the bank) stays in the cache. An accelerator wants more work at once.
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
) -> Tensor:
    """The loss for checked arguments; see :func:`uncertainty_mm.functional.supcon_loss`.

    `anchor_mask` may be shorter than the batch: the other rows are keys alone, and have no entry in the result.
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
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and what its gradient needs; an operator, so that compilers take it as one step.

    For a scalar loss that is the gradient itself. For `"none"` it is the bank: copied here, because the queue may be
    overwritten before the backward pass, to which a compiler may put off any other copy.
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
    weights: Tensor,
) -> Tensor:
    return torch.empty_like(embeddings, memory_format=torch.contiguous_format)


@torch.library.custom_op("uncertainty_mm::supcon_scale", mutates_args=())
def _scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The backward pass of a scalar loss; an operator of its own because it has no derivative."""
    return (gradient * factor).to(dtype, copy=True)


@_scale.register_fake
def _(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, classes, anchor_mask, _, _, ctx.temperature, reduction, *rest = inputs
    ctx.bf16_products, needs_grad = rest
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
        return (_scale(gradient, grad_loss, ctx.dtype), *[None] * 8)
    grad = _backward(*ctx.saved_tensors, ctx.temperature, ctx.bf16_products, grad_loss)
    return (grad, *[None] * 8)


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
    weights: Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient; `weights` of the anchors replace those of the reduction in the gradient."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    num_rows = classes.shape[0]
    if num_rows == 0:
        loss = embeddings.new_zeros((0,) if reduction == "none" else (), dtype=dtype)
        return loss, embeddings.new_zeros(embeddings.shape if needs_grad else (0,), dtype=dtype)
    with torch.autocast(embeddings.device.type, enabled=False):
        valid = classes >= 0
        rows = embeddings.to(dtype).masked_fill(~valid.unsqueeze(1), 0)
        bank, bank_classes = _without_empty_slots(bank, bank_classes)

        totals, counts, segment = _class_sums(rows, classes, bank, bank_classes)
        first = slice(anchor_mask.shape[0])
        anchor_rows, anchor_segment = rows[first], segment[first]
        num_positives = counts[anchor_segment] - 1
        anchors = anchor_mask & valid[first] & (num_positives > 0)
        inverse = num_positives.clamp_min(1).reciprocal()
        mean_positive = (totals[anchor_segment] - anchor_rows) * inverse.unsqueeze(1)
        if weights is None:
            weights = anchors.to(dtype)
            if reduction == "mean":
                weights = weights / weights.sum().clamp_min(1)
        weights = weights.to(dtype).masked_fill(~anchors, 0)

        losses, grad = _log_sum_exp(
            rows,
            valid,
            anchors,
            weights,
            bank,
            bank_classes,
            temperature,
            bf16_products,
            needs_grad,
        )
        losses = losses - (anchor_rows * mean_positive).sum(1) / temperature
        losses = losses.masked_fill(~anchors, 0)
        if needs_grad:
            weighted = anchor_rows * (weights * inverse).unsqueeze(1)
            per_class = torch.zeros_like(rows).index_add_(0, anchor_segment, weighted)
            grad -= per_class[segment]
            grad[first] -= weights.unsqueeze(1) * mean_positive - weighted
            grad /= temperature
        loss = losses if reduction == "none" else (losses * weights).sum()
        return loss, grad


def _without_empty_slots(bank: Tensor, bank_classes: Tensor) -> tuple[Tensor, Tensor]:
    """Drops empty slots where their number can be asked for; elsewhere they only lose what they hold."""
    full = bank_classes >= 0
    if bank.device.type != "cpu":
        return bank.masked_fill(~full.unsqueeze(1), 0), bank_classes
    length = int(full.sum())
    if full[:length].all():  # a queue fills up from the front: no copy
        return bank[:length], bank_classes[:length]
    return bank[full], bank_classes[full]


def _class_sums(
    rows: Tensor, classes: Tensor, bank: Tensor, bank_classes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and number of all keys of each class of the batch, and where to find the class of a row in both.

    A class is known by its first place among the sorted classes; keys of a class that the batch does not have go to
    the last entry.
    """
    num_rows, dim = rows.shape
    ordered = classes.sort().values
    segment = torch.searchsorted(ordered, classes.contiguous())
    place = torch.searchsorted(ordered, bank_classes.to(classes.dtype).contiguous()).clamp_max(
        num_rows - 1
    )
    bank_segment = torch.where(ordered[place] == bank_classes, place, num_rows)
    totals = rows.new_zeros(num_rows + 1, dim).index_add_(0, segment, rows)
    counts = rows.new_zeros(num_rows + 1)
    counts.index_add_(0, segment, torch.ones_like(rows[:, 0]))
    counts.index_add_(0, bank_segment, counts.new_ones(()).expand(bank.shape[0]))
    for keys, places in zip(bank.split(_CPU_KEYS), bank_segment.split(_CPU_KEYS), strict=True):
        totals.index_add_(0, places, keys.to(rows.dtype))
    return totals, counts, segment


def _log_sum_exp(
    rows: Tensor,
    valid: Tensor,
    anchors: Tensor,
    weights: Tensor,
    bank: Tensor,
    bank_classes: Tensor,
    temperature: float,
    bf16_products: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each anchor over its keys, and temperature times the gradient of their weighted sum."""
    num_rows, dim = rows.shape
    scale = math.log2(math.e) / temperature
    result = torch.zeros_like(weights)
    grad = rows.new_zeros(num_rows, dim) if needs_grad else rows.new_zeros(0)
    on_cpu = rows.device.type == "cpu"
    places = torch.arange(anchors.shape[0], device=rows.device)
    if on_cpu:
        places = places[anchors]
    size, num_keys = (_CPU_TILE, _CPU_KEYS) if on_cpu else (_ACCELERATOR_TILE, _ACCELERATOR_KEYS)
    if bf16_products:
        size //= 2  # there are two tiles
    product_dtype = torch.bfloat16 if bf16_products else rows.dtype
    width = max(num_rows, min(num_keys, bank.shape[0]))
    height = max(1, size // width)
    tile = rows.new_empty(min(height, places.shape[0]), width)
    product_tile = torch.empty_like(tile, dtype=product_dtype) if bf16_products else tile
    for place in places.split(height):
        anchor = rows[place]
        scaled = (anchor * scale).to(product_dtype)
        # The maximum of no scores is the lowest number, not -inf: the difference of two of them is 0.
        highest = anchor.new_full((place.shape[0], 1), torch.finfo(anchor.dtype).min)
        total = torch.zeros_like(highest)
        gathered = torch.zeros_like(anchor)
        factors = product_tile
        for keys, bias, is_batch in _key_tiles(rows, valid, bank, bank_classes, num_keys):
            keys = keys.to(product_dtype)
            probs, factors = (x[: place.shape[0], : keys.shape[0]] for x in (tile, product_tile))
            torch.mm(scaled, keys.t(), out=factors)
            if bf16_products:
                probs.copy_(factors)
            if bias is not None:
                probs += bias
            if is_batch:  # itself; before the maximum is taken, which it would dominate
                probs.scatter_(1, place.unsqueeze(1), -math.inf)
            previous, highest = highest, torch.maximum(highest, probs.amax(1, keepdim=True))
            probs.sub_(highest).exp2_()
            shrink = (previous - highest).exp2_()
            total = torch.addcmul(probs.sum(1, keepdim=True), total, shrink)
            if needs_grad:
                if bf16_products:
                    factors.copy_(probs)
                gathered.mul_(shrink).add_(factors @ keys)
        total.clamp_min_(torch.finfo(total.dtype).tiny)  # an anchor without any key
        result[place] = ((highest + total.log2()) * math.log(2)).squeeze(1)
        if needs_grad:
            share = weights[place].unsqueeze(1) / total
            # the keys of the batch, whose tile came last
            grad += factors.t() @ (anchor * share).to(product_dtype)
            grad.index_add_(0, place, gathered * share)
    return result, grad


def _key_tiles(
    rows: Tensor, valid: Tensor, bank: Tensor, bank_classes: Tensor, num_keys: int
) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
    """Keys, what is added to their scores (-inf for no key), and whether they are the batch, which comes last."""
    for keys, classes in zip(bank.split(num_keys), bank_classes.split(num_keys), strict=True):
        if keys.shape[0]:
            yield keys.to(rows.dtype), _bias(classes >= 0, rows), False
    yield rows, _bias(valid, rows), True


def _bias(valid: Tensor, rows: Tensor) -> Tensor | None:
    if valid.device.type == "cpu" and valid.all():
        return None
    return torch.zeros_like(valid, dtype=rows.dtype).masked_fill(~valid, -math.inf)
