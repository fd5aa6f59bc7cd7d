"""Tolerances by dtype and the small builders that the tests share."""

import copy
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.multiprocessing as mp
from torch.utils import _pytree as pytree

from uncertainty_mm import DiagonalGaussian, _recomputation

# The dtype in which a value was computed -> (relative, absolute) tolerance.
TOLERANCE = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (5e-2, 5e-2),
}
HALF = (torch.float16, torch.bfloat16)
# What torch 2.6 lacks, and 2.13 does not; those between were not tried.
TORCH_2_6 = torch.__version__.startswith("2.6.")
# What its torch.export says of state that is not in `buffers()`.
QUIET_EXPORT = [
    "ignore:Attempted to insert a get_attr:UserWarning",
    "ignore:Node .* does not reference an nn.Module:UserWarning",
    "ignore:Additional .* about get_attr:UserWarning",
]
NO_EXPORT_OF_ANY_BATCH = "torch 2.6 exports no `x[:, i]` for any size of the first dimension"
# Whether torch tells which checkpointed function a pass is in (2.6 does not): else a batch that was seen before may be
# refused in a recomputation.
TELLS_FUNCTIONS = _recomputation._top_hooks is not None


def close(actual, expected, dtype=None):
    """Assert equal shapes and equal values within the tolerance of `dtype` (that of `actual`)."""
    actual = actual.detach()
    rtol, atol = TOLERANCE[dtype or actual.dtype]
    expected = torch.as_tensor(expected, dtype=torch.float64, device="cpu")
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=rtol, atol=atol)


def all_close(actual, expected, dtype):
    """Results of a run in `dtype` that are near their float64 values; integers are equal to them."""
    for x, y in zip(actual, expected, strict=True):
        own = x.dtype if x.is_floating_point() else torch.float64
        # a loss comes back in float32 from half precision, a share of the tracker in the default dtype
        close(x.double(), y, max(dtype if x.is_floating_point() else own, own, key=TOLERANCE.get))


def processes():
    """How tests start processes: each fresh, and where that can be had without the seconds that imports take."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "uncertainty_mm", "lightning", "torchmetrics"])
    return context


def no_default_device():
    """As if none had been set."""
    torch.set_default_device(None)
    if (
        TORCH_2_6
    ):  # where torch.get_default_device fails from now on, and with it torchmetrics and Lightning
        vars(torch._GLOBAL_DEVICE_CONTEXT).clear()


def gradient(output, *inputs):
    """Gradients of the sum of `output`, zeros where it does not depend on an input."""
    return torch.autograd.grad(output.sum(), inputs, materialize_grads=True)


def random_latent(*shape, dtype=torch.float64, requires_grad=False):
    """A Gaussian with random means and stds of 0.1 to 1.1."""
    mean = torch.randn(*shape, dtype=dtype)
    std = 0.1 + torch.rand(*shape, dtype=dtype)
    return DiagonalGaussian(mean.requires_grad_(requires_grad), std.requires_grad_(requires_grad))


def poisoned(tensor, where, value=float("nan")):
    """A copy of `tensor` that holds `value` where `where` (of its leading axes) is True."""
    tensor = tensor.detach().clone()
    tensor[where] = value
    return tensor


def record_validate_args(monkeypatch):
    """A list that grows by what the modules pass on as `validate_args`; values are then not looked at.

    It matters on accelerators only; this shows it without one.
    """
    passed = []
    for name, module in list(sys.modules.items()):
        if name.startswith("uncertainty_mm.") and hasattr(module, "checks_values"):
            monkeypatch.setattr(module, "checks_values", lambda _, *given: passed.extend(given))
    return passed


def refuses(module, call, error, message):
    """Asserts that a call raises just this, worded as the library does, and leaves the module as it was."""
    before = {name: x.clone() for name, x in module.state_dict().items()}
    with pytest.raises(error, match=f"^Expected {message}$") as caught:
        call()
    assert type(caught.value) is error
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


class Bad(NamedTuple):
    """A call that must be refused."""

    name: str
    call: Callable[[object], object]  # with what the group of cases is made on
    error: type[BaseException]
    message: str  # regular expression


def refused(case, given, state=lambda given: None):
    """Asserts that a call raises just what it must, in one line, and leaves the tensors of `state` as they were."""
    before = copy.deepcopy(pytree.tree_leaves(state(given)))
    with pytest.raises(Exception, match=case.message) as caught:
        case.call(given)
    assert type(caught.value) is case.error
    assert "\n" not in str(caught.value)
    for old, new in zip(before, pytree.tree_leaves(state(given)), strict=True):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new
