"""Rank helpers that are safe without a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes, 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rows_of_ranks(tensor: Tensor) -> list[int]:
    """Length of `tensor` on every rank; makes the host wait, since shapes live there."""
    length = torch.tensor([tensor.shape[0]], device=tensor.device)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    return [int(length) for length in lengths]


def gather_rows(rows: Tensor, lengths: list[int]) -> Tensor:
    """Concatenates the rows of all ranks, in the order of the ranks; gradients of all ranks are summed.

    Ranks may have different numbers of rows (`lengths`, from :func:`rows_of_ranks`).
    """
    gathered: Tensor = _GatherRows.apply(rows, lengths)  # type: ignore[no-untyped-call]
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, lengths: list[int]) -> Tensor:
        ctx.lengths = lengths
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.split(ctx.lengths)[dist.get_rank()], None
