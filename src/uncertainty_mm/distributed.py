"""Exact exchange between ranks, for losses that compare samples with each other.

With :func:`gather_rows` a loss sees the rows of all ranks, and its gradient is that of one process on the joined batch.
All functions take the ranks that take part as `process_group`, a group or its name; None means all ranks. Exchanges are
operators that compilers do not look into, and refer to the group by name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from uncertainty_mm._checks import check_positive_int, check_tensor

__all__ = [
    "gather_rows",
    "group_name",
    "largest_of_ranks",
    "rank",
    "sum_over_ranks",
    "world_size",
]


def group_name(process_group: dist.ProcessGroup | str | None = None) -> str:
    """Name of a process group, which unlike the group can be copied, saved and compiled; empty for all ranks.

    Raises:
        TypeError: If it is not a process group, or not one that this rank belongs to.
    """
    if process_group is None or isinstance(process_group, str):
        return process_group or ""
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "Expected `process_group` to be a process group that this rank belongs to, or None, "
            f"but got {process_group!r}"
        )
    return str(process_group.group_name)


def world_size(process_group: dist.ProcessGroup | str | None = None) -> int:
    """Number of processes, 1 without `torch.distributed`."""
    _, size = _place(group_name(process_group))
    return int(size)


def rank(process_group: dist.ProcessGroup | str | None = None) -> int:
    """Rank of this process in the group, 0 without `torch.distributed`."""
    place, _ = _place(group_name(process_group))
    return int(place)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _place(group: str) -> tuple[int, int]:
    """Rank and number of ranks."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(_group(group)), dist.get_world_size(_group(group))


def _group(name: str) -> dist.ProcessGroup | None:
    if not name:
        return None
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _function(name: str, older: str) -> Any:
    """Under its newest name: torch 2.13 renamed some, and warns of the older ones."""
    return getattr(dist, name, None) or getattr(dist, older)


def largest_of_ranks(
    number: int, device: torch.device, process_group: dist.ProcessGroup | str | None = None
) -> int:
    """The largest `number` of all ranks; makes the host wait."""
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_group(group_name(process_group)))
    return int(largest)


def sum_over_ranks(tensor: Tensor, process_group: dist.ProcessGroup | str | None = None) -> Tensor:
    """Sum of the tensors of all ranks; has no derivative."""
    total: Tensor = _sum(tensor, group_name(process_group))
    return total


def gather_rows(
    rows: Tensor,
    classes: Tensor,
    *,
    max_rows: int | None = None,
    process_group: dist.ProcessGroup | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gathers the rows and classes of all ranks, in the order of the ranks, with gradient.

    All ranks send the same number of rows, padded with rows of 0 and class -1, so the rows of rank r start at
    r * `max_rows`. The gradient of a row is the sum of its gradients on all ranks. If every rank computes its share of
    a loss, the gradients summed over the ranks are therefore those of one process on the joined batch.
    (`DistributedDataParallel` averages, so multiply the share by :func:`world_size`.)

    Without `torch.distributed`, or with one rank, the rows are only padded.

    Args:
        rows: Tensor (N, ...). N may differ between ranks and be 0; the other sizes and the dtype may not differ.
        classes: Integer tensor (N,); any numbers of at least 0 if only the padding matters.
        max_rows: Largest N that any rank will have. With None the ranks agree on it, which makes the host wait and
            cannot be compiled with `fullgraph=True`.
        process_group: Ranks that take part; None for all.

    Returns:
        Tensors (W * max_rows, ...) and (W * max_rows,), for W ranks.

    Raises:
        ValueError: If shapes or devices disagree, or there are more rows than `max_rows`.
        TypeError: If an argument has the wrong type.

    Example:
        >>> rows, classes = gather_rows(torch.ones(2, 1), torch.tensor([5, 7]), max_rows=3)
        >>> rows.flatten(), classes
        (tensor([1., 1., 0.]), tensor([ 5,  7, -1]))
    """
    sizes: dict[str, int] = {}
    check_tensor("classes", classes, "integer", "N", sizes)
    others = " ".join(f"d{axis}" for axis in range(1, rows.dim()))
    check_tensor("rows", rows, "number", f"N {others}", sizes, classes.device)
    group = group_name(process_group)
    if max_rows is None:
        max_rows = classes.shape[0]
        if world_size(group) > 1:
            max_rows = largest_of_ranks(max_rows, classes.device, group)
    elif max_rows != 0 or isinstance(max_rows, bool):
        check_positive_int("max_rows", max_rows)
    room = max_rows - classes.shape[0]
    if room < 0:
        raise ValueError(
            f"Expected `rows` to have at most `max_rows` = {max_rows} rows, but got {classes.shape[0]}"
        )
    rows = F.pad(rows, (*(0, 0) * (rows.dim() - 1), 0, room))
    classes = F.pad(classes, (0, room), value=-1)
    if world_size(group) == 1:
        return rows, classes
    gathered: tuple[Tensor, Tensor] = _gather_rows(rows, classes, group)
    return gathered


@torch.library.custom_op("uncertainty_mm::sum_over_ranks", mutates_args=())
def _sum(tensor: Tensor, group: str) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_group(group))
    return total


@_sum.register_fake
def _(tensor: Tensor, group: str) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@torch.library.custom_op("uncertainty_mm::own_sum", mutates_args=())
def _own_sum(tensor: Tensor, group: str) -> Tensor:
    """This rank's rows of the sum over ranks: half of what the whole sum would exchange."""
    own = tensor.new_empty(tensor.shape[0] // world_size(group), *tensor.shape[1:])
    reduce_scatter = _function("reduce_scatter_single", "reduce_scatter_tensor")
    reduce_scatter(own, tensor.contiguous(), group=_group(group))
    return own


@_own_sum.register_fake
def _(tensor: Tensor, group: str) -> Tensor:
    return tensor.new_empty(tensor.shape[0] // world_size(group), *tensor.shape[1:])


@torch.library.custom_op("uncertainty_mm::gather_rows", mutates_args=())
def _gather_rows(rows: Tensor, classes: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Both in one exchange, as bytes: an exchange of little takes as long as one of nothing."""
    parts = [rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1), classes.unsqueeze(1)]
    parts = [part.contiguous().view(torch.uint8) for part in parts]
    sent = torch.cat(parts, 1)
    received = sent.new_empty(world_size(group) * sent.shape[0], sent.shape[1])
    all_gather = _function("all_gather_single", "all_gather_into_tensor")
    all_gather(received, sent, group=_group(group))
    every, of_every = (
        x.clone(memory_format=torch.contiguous_format)
        for x in received.split([x.shape[1] for x in parts], 1)
    )
    return every.view(rows.dtype).view(-1, *rows.shape[1:]), of_every.view(classes.dtype).squeeze(1)


@_gather_rows.register_fake
def _(rows: Tensor, classes: Tensor, group: str) -> tuple[Tensor, Tensor]:
    ranks = world_size(group)
    return rows.new_empty(ranks * rows.shape[0], *rows.shape[1:]), classes.new_empty(
        ranks * classes.shape[0]
    )


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, str], output: tuple[Tensor, Tensor]
) -> None:
    ctx.group = inputs[2]


def _own_gradient(ctx: Any, grad: Tensor, _: object) -> tuple[Tensor, None, None]:
    return _own_sum(grad, ctx.group), None, None


_gather_rows.register_autograd(_own_gradient, setup_context=_setup_context)
