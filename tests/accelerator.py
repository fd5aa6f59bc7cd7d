"""An accelerator for machines without one: tensors on a device of its own, which refuses what would make the host wait.

The processor computes the numbers, so results are real; but to torch the tensors lie on the device `pretend` (the
dispatch key PrivateUse1, as for any accelerator that lives outside torch), and the library sees what it sees on a GPU.
Registering it changes the process for good, so all of it happens in one of its own: :class:`Elsewhere`.
"""

import multiprocessing
import pickle
import traceback
from contextlib import contextmanager

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

aten = torch.ops.aten
FACTORIES = (
    *("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step"),
    *("linspace", "eye", "eye.m", "randperm", "randperm.generator"),
)
# Of the lists of torch/amp (aten/src/ATen/autocast_mode.h), what the library calls.
LOWERED = ("linear", "mm", "matmul", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
RAISED = ("exp", "log", "pow.Tensor_Scalar", "reciprocal", "rsqrt", "softplus", "sum")
RAISED += ("cumsum", "log_softmax.int", "softmax.int", "layer_norm", "logsumexp")
TOLD = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Refused(RuntimeError):
    """What the device does not do without making the host wait, or not at all."""


class Strict:
    """What is refused at present: waits and tensors of the host, float64."""

    waits = float64 = False


class Pretended(torch.Tensor):
    """A tensor on the device `pretend`, computed by the processor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("pretend", 0),
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Pretended({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace != "aten":  # an operator of the library: step by step, here
            return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        refuse(function, args, kwargs, leaves)
        inner_args, inner_kwargs = pytree.tree_map_only(cls, lambda x: x.inner, (args, kwargs))
        to_host = False
        if (device := kwargs.get("device")) is not None:
            inner_kwargs["device"] = "cpu"
            to_host = torch.device(device).type == "cpu"
        result = function(*inner_args, **inner_kwargs)
        if to_host or (function is aten.copy_.default and type(args[0]) is not cls):
            return result if to_host else args[0]
        result = pytree.tree_map_only(torch.Tensor, cls, result)
        if Strict.float64 and torch.float64 not in {x.dtype for x in leaves}:
            made = {x.dtype for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)}
            if torch.float64 in made:
                raise Refused(f"{function} makes float64, which not every device has")
        return return_and_correct_aliasing(function, args, kwargs, result)


def refuse(function, args, kwargs, leaves):
    """Raises for what a GPU cannot do, and if so told for what it does only once the host has waited."""
    strange = [x for x in leaves if type(x) is not Pretended]
    copies = function in (aten.copy_.default, aten._to_copy.default, aten._copy_from.default)
    if not copies and any(x.dim() for x in strange):
        raise Refused(f"{function}: expected all tensors to be on one device")
    if not Strict.waits:
        return
    if strange and not (copies and kwargs.get("non_blocking", len(args) > 2 and args[2])):
        raise Refused(f"{function} takes a tensor of the host")
    if torch.device(kwargs.get("device") or "pretend").type == "cpu":
        raise Refused(f"{function} copies to the host, which waits")
    index = function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
    if index:
        masked = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        filled = function is not aten.index.Tensor and args[2].numel() == 1  # by masked_fill
        if masked and not filled:
            raise Refused(f"{function} by a mask counts what is True, for which the host waits")
    elif TOLD & set(function.tags) or function is aten._linalg_check_errors.default:
        raise Refused(f"{function} tells the host a value, for which it waits")


def register():
    """Makes the device known to torch, once in a process."""
    from torch.utils import backend_registration

    class Backend(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.float16, torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend("pretend", Backend())
    library = torch.library.Library("aten", "IMPL")
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

    def overload(name):
        packet, _, which = name.partition(".")
        return getattr(getattr(aten, packet), which or "default")

    def factory(function):
        def made(*args, device=None, **kwargs):
            kwargs.pop("pin_memory", None)
            return Pretended(function(*args, device="cpu", **kwargs))

        return made

    def literal(numbers, to, non_blocking=False):  # `torch.tensor` of a list hides from subclasses
        if Strict.waits:
            raise Refused("`torch.tensor` of numbers copies them to the device, which waits")
        to.inner.copy_(numbers)
        return to

    def cast(function, lowered):
        off = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

        def to(x):
            wide = x.dtype is torch.float64
            dtype = torch.get_autocast_dtype("pretend") if lowered else torch.float32
            return x.to(dtype) if x.is_floating_point() and not wide else x

        def run(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(off):
                args, kwargs = pytree.tree_map_only(torch.Tensor, to, (args, kwargs))
                return function(*args, **kwargs)

        return run

    for name in FACTORIES:
        library.impl(name, factory(overload(name)), "PrivateUse1")
    for name in LOWERED + RAISED:
        library.impl(name, cast(overload(name), name in LOWERED), "AutocastPrivateUse1")
    library.impl("_copy_from", literal, "PrivateUse1")
    register.kept = library, rest  # for as long as the process


@contextmanager
def strict(device, *, float64=True):
    """Within it a wait of the host is an error on the device, and so is, where it is pretended, a new float64 tensor."""
    if device == "pretend":
        Strict.waits, Strict.float64 = True, not float64
    else:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        Strict.waits = Strict.float64 = False
        if device != "pretend":
            torch.cuda.set_sync_debug_mode("default")
