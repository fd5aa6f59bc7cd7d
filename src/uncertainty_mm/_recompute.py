"""Gradient checkpointing: whether a forward pass is the first, or one that a backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Added in torch 2.7; the hooks are the only sign that a first pass is within a (non-reentrant) checkpointed function.
_top_hooks: Callable[[bool], Any] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)


def recomputing() -> bool:
    """Whether gradient checkpointing computes a forward pass again: nothing else does during a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def checkpoint_hook(ignore_is_tracing: bool) -> Any:
    """What stands for the checkpointed function that a pass is in; None in none, and where torch cannot tell."""
    hooks = None if _top_hooks is None else _top_hooks(ignore_is_tracing)
    return None if hooks is None else hooks[1]


def may_be_recomputed() -> bool:
    """Whether checkpointing may surround a forward pass, which it runs without gradients or with hooks."""
    return _top_hooks is None or not torch.is_grad_enabled() or checkpoint_hook(False) is not None


@torch.library.custom_op("uncertainty_mm::in_first_pass", mutates_args=())
def in_first_pass(tensor: Tensor, refusal: str) -> Tensor:
    """A copy, or an error in a recomputation, of which compiled code knows only when it runs."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(refusal)
    return tensor.clone(memory_format=torch.contiguous_format)


@in_first_pass.register_fake
def _(tensor: Tensor, refusal: str) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
