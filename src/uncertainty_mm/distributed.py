"""Exchange between ranks: operators, so that compilers take each as one step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes, 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def largest_of_ranks(number: int, device: torch.device) -> int:
    """The largest `number` that a rank passes; makes the host wait."""
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


@torch.library.custom_op("uncertainty_mm::sum_over_ranks", mutates_args=())
def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of the tensors of all ranks; has no derivative."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


@sum_over_ranks.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@torch.library.custom_op("uncertainty_mm::gather_rows", mutates_args=())
def gather_rows(rows: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and classes of all ranks, in the order of the ranks; the gradients of all ranks are summed.

    Every rank passes as many. One operator for both, so that all ranks exchange them in the same order, however each
    of them was compiled.
    """
    return _gather(rows), _gather(classes)


def _gather(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


@gather_rows.register_fake
def _(rows: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    ranks = dist.get_world_size()
    return rows.new_empty(ranks * rows.shape[0], *rows.shape[1:]), classes.new_empty(
        ranks * classes.shape[0]
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.num_rows = inputs[0].shape[0]


def _own_gradient(ctx: Any, grad: Tensor, _: object) -> tuple[Tensor, None]:
    start = dist.get_rank() * ctx.num_rows
    return sum_over_ranks(grad)[start : start + ctx.num_rows], None


gather_rows.register_autograd(_own_gradient, setup_context=_setup_context)
