"""Detects that gradient checkpointing repeats a forward pass during the backward pass.

torch has no public interface for this, so this file is the only one that uses its private parts.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

# torch 2.6 lacks it, so there every pass may be inside a checkpointed function.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def recomputing() -> bool:
    """Whether a forward pass is being repeated; nothing else runs one during a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def function_hook() -> weakref.ref[Any] | None:
    """The hook of the checkpointed function around this code, which lives as long as its graph.

    None outside of checkpointed functions, and in reentrant ones, which have no hooks.
    """
    hooks = None if _top_hooks is None else _top_hooks(True)
    return None if hooks is None else weakref.ref(hooks[1])


def may_be_recomputed() -> bool:
    """Whether a checkpointed function may be around this code; reentrant ones run it without gradients."""
    return _top_hooks is None or not torch.is_grad_enabled() or _top_hooks(True) is not None


@torch.library.custom_op("uncertainty_mm::in_first_pass", mutates_args=())
def in_first_pass(tensor: Tensor, refusal: str) -> Tensor:
    """A copy, or an error in a recomputation; an operator, because compiled Python code cannot notice one."""
    if recomputing():
        raise RuntimeError(refusal)
    return tensor.clone(memory_format=torch.contiguous_format)


@in_first_pass.register_fake
def _(tensor: Tensor, refusal: str) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
