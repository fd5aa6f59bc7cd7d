"""What gradient checkpointing does to a forward pass: it may be computed again, by the backward pass.

torch tells neither in public, so this file is the only one that asks its private parts.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

# torch 2.6 has nothing of the kind: there a pass is never known to be outside of all checkpointed functions.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def recomputing() -> bool:
    """Whether a forward pass is computed again: nothing else computes one during a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def function_hook() -> weakref.ref[Any] | None:
    """The hook of the checkpointed function around this code, alive as long as its graph.

    None outside of all functions, and in reentrant ones, which have no hooks.
    """
    hooks = None if _top_hooks is None else _top_hooks(True)
    return None if hooks is None else weakref.ref(hooks[1])


def may_be_recomputed() -> bool:
    """Whether a checkpointed function may be around this code: the reentrant ones run without gradients."""
    return _top_hooks is None or not torch.is_grad_enabled() or _top_hooks(True) is not None


@torch.library.custom_op("uncertainty_mm::in_first_pass", mutates_args=())
def in_first_pass(tensor: Tensor, refusal: str) -> Tensor:
    """A copy; an error in a recomputation, which what a compiler makes of Python does not notice."""
    if recomputing():
        raise RuntimeError(refusal)
    return tensor.clone(memory_format=torch.contiguous_format)


@in_first_pass.register_fake
def _(tensor: Tensor, refusal: str) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
