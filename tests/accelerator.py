"""An accelerator for machines without one: tensors on a device of its own, which refuses what would make the host wait.

The processor computes the numbers, so results are real; but to torch the tensors lie on the device `pretend` (the
dispatch key PrivateUse1, as for any accelerator that lives outside torch), and the library sees what it sees on a GPU.
Registering it changes a process for good, and has to come before its first backward pass; so the tests run in one of
its own, to which they send jobs, the functions at the end of this file.
"""

import copy
import importlib
import inspect
import itertools
import math
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

from cases import CASES, flattened
from support import all_close, close
from uncertainty_mm import _supcon
from uncertainty_mm.data import MultimodalBatch

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


class RefusedError(RuntimeError):
    """What the device does not do without making the host wait, or not at all."""


class Strict:
    """What is refused at present: what makes the host wait, unless so many are allowed; and new float64."""

    waits = float64 = False
    allowed = 0

    @classmethod
    def wait(cls, why):
        cls.allowed -= 1
        if cls.waits and cls.allowed < 0:
            raise RefusedError(why)


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
                raise RefusedError(f"{function} makes float64, which not every device has")
        return return_and_correct_aliasing(function, args, kwargs, result)


def refuse(function, args, kwargs, leaves):
    """Raises for what a GPU cannot do, and if so told for what it does only once the host has waited."""
    strange = [x for x in leaves if type(x) is not Pretended]
    copies = function in (aten.copy_.default, aten._to_copy.default, aten._copy_from.default)
    if not copies and any(x.dim() for x in strange):
        raise RefusedError(f"{function}: expected all tensors to be on one device")
    if strange and not (copies and kwargs.get("non_blocking", len(args) > 2 and args[2])):
        Strict.wait(f"{function} takes a tensor of the host")
    if torch.device(kwargs.get("device") or "pretend").type == "cpu":
        Strict.wait(f"{function} copies to the host")
    if function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        masked = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        filled = function is not aten.index.Tensor and args[2].numel() == 1  # by masked_fill
        if masked and not filled:
            Strict.wait(f"{function} by a mask counts what is True")
    elif TOLD & set(function.tags) or function is aten._linalg_check_errors.default:
        Strict.wait(f"{function} tells the host a value")


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
        Strict.wait("`torch.tensor` of numbers copies them to the device")
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
def strict(device, *, allowed=0, float64=True):
    """Within it the host has to wait for the device exactly `allowed` times.

    Without `float64` the pretended device makes no such tensor unless it was given one.
    """
    if device == "pretend":
        Strict.waits, Strict.allowed, Strict.float64 = True, allowed, not float64
        try:
            yield
            if Strict.allowed:
                raise RefusedError(f"the host waited {Strict.allowed} times less than {allowed}")
        finally:
            Strict.waits = Strict.float64 = False
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn" if allowed else "error")
    try:
        with warnings.catch_warnings(record=allowed > 0) as seen:
            if allowed:
                warnings.simplefilter("always")  # the tests make errors of them
            yield
        if allowed and len([x for x in seen if "synchronizing" in str(x.message)]) != allowed:
            raise RefusedError(
                f"the host did not wait {allowed} times: {[str(x.message) for x in seen]}"
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------- jobs


def gradients(module, outputs, inputs):
    """Of the outputs, each in its own dtype, with respect to inputs and parameters."""
    live = [x for x in outputs if x.requires_grad]
    leaves = [x for x in (*pytree.tree_leaves(inputs), *module.parameters()) if x.requires_grad]
    ones = [torch.ones_like(x) for x in live]
    return torch.autograd.grad(live, leaves, ones, materialize_grads=True) if live else ()


def run_case(device, name, training):
    """Forward and backward passes of a component, of which none waits."""
    case = CASES[name]
    module = case.build().to(device).train(training)
    batches = [case.inputs(step, device=device) for step in range(4)]
    case.results(module, batches[0])  # whatever is set up once may wait
    with strict(device, float64=False):
        for batch in batches[1:]:
            gradients(module, flattened(case.run(module, *batch)), batch)


def compare_case(device, name):
    """A component on the device against itself on the CPU, state included."""
    case = CASES[name]
    module = case.build()
    moved = copy.deepcopy(module).to(device)
    for step in range(4):
        expected = case.results(module, case.inputs(step))
        actual = case.results(moved, case.inputs(step, device=device))
        for a, e in zip(actual, expected, strict=True):
            assert a.device.type == device
            close(a.double(), e, torch.float32)
    for name, state in moved.state_dict().items():
        assert state.device.type == device
        close(state.double(), module.state_dict()[name], torch.float32)


def autocast_case(device, name, dtype):
    """A component under autocast against its plain equation; no pass waits."""
    case = CASES[name]
    module = case.build()
    expected = case.expected(copy.deepcopy(module), case.inputs(0))
    module.to(device)
    twin, batch = copy.deepcopy(module), case.inputs(0, device=device)
    with torch.autocast(device, dtype=dtype):
        all_close(case.results(module, batch), expected, dtype)
        with strict(device, float64=False):
            outputs = flattened(case.run(twin, *batch))
    with strict(device, float64=False):
        gradients(twin, outputs, batch)


def check_values(device):
    """Values are looked at there on request alone, devices always."""
    case = CASES["UncertaintyGatedFusion"]
    latent, uncertainty, missing = case.inputs(0, device=device)
    outside = uncertainty.detach() + 1
    case.build().to(device)(latent, outside, missing)
    for module, arguments, wrong in (
        (case.build(validate_args=True), (latent, outside, missing), "uncertainty"),
        (case.build(), (latent, uncertainty, missing.cpu()), "missing"),
    ):
        with pytest.raises(ValueError, match=f"`{wrong}`"):
            module.to(device)(*arguments)


def supcon_in_tiles(device, keys, size):
    """The loss by tiles of few keys and scores: the bank ends inside one, next to the batch, or is empty."""
    generator = torch.Generator().manual_seed(0)
    for slots, filled, has_offset in itertools.product((0, 3, 37), (True, False), (False, True)):
        rows, bank = (torch.randn(count, 6, generator=generator) for count in (24, slots))
        classes = torch.arange(24) % 9  # two or three of a class, so that one has a single positive
        classes[5] = -1
        bank_classes = torch.randint(-1, 3, (slots,), generator=generator) if filled else -1
        bank_classes = torch.as_tensor(bank_classes).expand(slots)
        inputs = [rows, classes, torch.arange(24) % 4 > 0, bank, bank_classes]
        results = []
        with (
            mock.patch.object(_supcon, "_ACCELERATOR_KEYS", keys),
            mock.patch.object(_supcon, "_ACCELERATOR_TILE", size),
        ):
            for where in ("cpu", device):
                rows, *rest = (x.to(where) for x in inputs)
                rows = rows.detach().requires_grad_()
                losses = _supcon.supcon(rows, *rest, 0.3, "none", has_offset=has_offset)
                (losses * torch.arange(24, device=where)).sum().backward()
                results.append((losses.detach().cpu(), rows.grad.cpu()))
        all_close(*results, torch.float32)


def fit_there(device):
    """A module on the device is fitted to batches on the device, as on the CPU."""
    case = CASES["Typicality"]
    moved = case.build().to(device)
    batches = [pytree.tree_map(torch.Tensor.detach, case.inputs(step)) for step in range(9)]
    given = [
        MultimodalBatch(*batch, torch.ones(4, 1), 4 * step + torch.arange(4))
        for step, batch in enumerate(batches)
    ]
    here = copy.deepcopy(moved).cpu().fit(given)
    moved.fit([batch.to(device) for batch in given])
    for name, state in moved.state_dict().items():
        assert state.device.type == device
        assert torch.equal(state.cpu(), here.state_dict()[name])


def waiting():
    """What makes a host wait, by name: functions of a tensor (3, 4) on the device."""
    return {
        "item": lambda x: x.sum().item(),
        "bool": lambda x: bool((x > 0).all()),
        "index of a list": lambda x: [0, 1, 2][(x > 9).sum()],
        "cpu": lambda x: x.cpu(),
        "copy to the host": lambda x: torch.ones(3, 4).copy_(x),
        "copy from the host": lambda x: torch.ones(3, 4).to(x.device),
        "tensor of numbers": lambda x: torch.tensor([1.0], device=x.device),
        "new tensor of numbers": lambda x: x.new_tensor([1.0]),
        "mask": lambda x: x[x > 0],
        "set by mask": lambda x: x.__setitem__(x[:, 0] > -99, x.clone()),
        "nonzero": lambda x: x.nonzero(),
        "unique": lambda x: x.unique(),
        "repeats": lambda x: (
            torch.arange(3).to(x.device, non_blocking=True).repeat_interleave((x > 0).sum(1))
        ),
        "equal": lambda x: torch.equal(x, x.clone()),
        "cholesky": lambda x: torch.linalg.cholesky(x @ x.mT + 9 * torch.eye(3, device=x.device)),
    }


def wait(device, name):
    """Makes the host wait, which has to be noticed."""
    x, waits = torch.randn(3, 4).to(device), waiting()[name]
    waits(x)
    message = "synchronizing" if device == "cuda" else "aten|numbers"
    with pytest.raises(RuntimeError, match=message), strict(device):
        waits(x)


def count_waits(device):
    """Waits that are allowed are counted."""
    x = torch.ones(()).to(device)
    with strict(device, allowed=2):
        x.item(), bool(x)
    for number in (0, 2):
        with pytest.raises(RuntimeError), strict(device, allowed=number):
            x.item()


def wait_for_nothing(device):
    """What looks like it, but is done without a wait."""
    x, y = torch.randn(3, 4).to(device), torch.randn(3, 4).to(device).requires_grad_()
    with strict(device, float64=False):
        x[x > 0] = 1.0
        x = torch.where(x > 0, x, 0.0) * 2 + torch.arange(4, device=device)
        x = x + torch.full((4,), 2.0, device=device) + torch.eye(4, device=device)[2]
        x = F.dropout(x.masked_fill(x > 9, 0.5)) * y
        x.index_select(0, torch.randperm(3, device=device)).sum().backward()
        nn.utils.clip_grad_norm_([y], 1.0)


def move(device):
    """What lies elsewhere is refused, and what comes back holds the same numbers."""
    x = torch.arange(12.0).view(3, 4)
    moved = x.to(device)
    assert (moved.device.type, moved.is_cpu, moved.cpu().equal(x)) == (device, False, True)
    with pytest.raises(RuntimeError, match="device"):
        moved + x
    assert (moved.T[1:, ::2] + 1).cpu().equal(x.T[1:, ::2] + 1)
    moved.T[1].mul_(2)
    assert moved.cpu()[:, 1].tolist() == [2, 10, 18]


# ----------------------------------------------------------------------------------- whole models


def small_model(file, name):
    """A model of an example, small, and batches for it: unknown labels, missing modalities, padding."""
    kind = getattr(importlib.import_module(f"uncertainty_mm.examples.{file}"), name)
    dims, steps, labels = {"text": 5, "audio": 3}, {"text": 6, "audio": 9}, ["joy", "fear", "anger"]
    sizes = {
        "encoder": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2},
        "attention": {"out_dim": 8},
        "decoupler": {"latent_dim": 4},
        "contrastive": {"queue_size": 64},
    }
    sizes = {part: options for part, options in sizes.items() if part in kind.parts}
    samples = [20] if name == "LDDU" else []  # whose history is kept
    model = kind(dims, steps, labels, *samples, **sizes)

    def batch(step, size=8):
        torch.manual_seed(step)
        features = {m: torch.randn(size, steps[m], dim) for m, dim in dims.items()}
        padding = {m: torch.rand(size, steps[m]) < 0.3 for m in dims}
        padding["text"][0] = padding["audio"][:2] = True  # nothing of the first is there
        unknown = torch.rand(size, len(labels)) < 0.2
        unknown[3] = True
        answers = torch.randint(2, (size, len(labels))), torch.randint(20, (size,))
        return MultimodalBatch(features, padding, *answers, torch.rand(size, 3), unknown)

    return model, batch


def loss_of(model, batch):
    model.zero_grad()
    return model.training_step(batch, 0)


def train_model(device, file, name, kernel):
    """Steps of training, on the device as on the CPU: no pass, no optimiser, no clipping waits."""
    model, batch = small_model(file, name)
    moved = copy.deepcopy(model).to(device)
    kernels = {} if kernel == "default" else {kernel: True}
    # A large eps: else Adam makes a whole step of the rounding of a gradient that is all but 0.
    kernels |= {"lr": 1e-3, "eps": 1e-2}
    optimizers = [torch.optim.AdamW(x.parameters(), **kernels) for x in (model, moved)]
    for x in (model, moved):
        x.train().apply(without_dropout)
        x.log_dict = x.log = lambda *_, **__: None
    for step in range(4):
        here, there = batch(step), batch(step).to(device)
        same = mock.patch("torch.rand", the_same_everywhere)
        with same:
            losses = loss_of(model, here), None
        losses[0].backward()
        with nullcontext() if step == 0 else strict(device, float64=False), same:
            losses = losses[0], loss_of(moved, there)
            losses[1].backward()
            for x in (model, moved):
                nn.utils.clip_grad_norm_(x.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
        close(losses[1].detach(), losses[0].detach())
    for (key, here), there in zip(
        model.state_dict().items(), moved.state_dict().values(), strict=True
    ):
        assert there.device.type == device, key
        torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4, msg=key)


def the_same_everywhere(*size, device=None):
    """In place of `torch.rand`, whose numbers depend on the device."""
    return (torch.arange(math.prod(size), device=device) * 0.618034 % 1).view(size)


def without_dropout(module):
    if isinstance(module, nn.Dropout):
        module.p = 0.0


def predict_model(device, file, name):
    """Prediction and validation wait for nothing, and say the same as on the CPU."""
    model, batch = small_model(file, name)
    model.eval()
    moved = copy.deepcopy(model).to(device)
    expected = model.predict_step(batch(0), 0)
    there = batch(0).to(device)
    with torch.no_grad():
        moved.predict_step(there, 0)
        with strict(device):
            answers = moved.predict_step(there, 0)
    assert answers.keys() == expected.keys()
    for key, answer in answers.items():
        torch.testing.assert_close(
            answer.cpu(), expected[key].detach(), rtol=1e-3, atol=1e-4, equal_nan=True
        )


def guard_model(device, file, name, on_nan):
    """The guard waits once a step."""
    from uncertainty_mm.lightning import FiniteGuard

    model, batch = small_model(file, name)
    model.to(device).train()
    model.log_dict = model.log = lambda *_, **__: None
    guard = FiniteGuard(on_nan)
    trainer = SimpleNamespace(
        precision="32-true",
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
    )
    for step in range(3):
        there = batch(step).to(device)
        with strict(device, allowed=1) if step else nullcontext():
            guard.on_train_batch_start(trainer, model, there, step)
            loss = loss_of(model, there)
            guard.on_before_backward(trainer, model, loss)
            loss.backward()
            guard.on_before_optimizer_step(trainer, model, None)


# ---------------------------------------------------------------------------------------- metrics


def update_metric(device, name):
    """Updates of a metric that does not look at values."""
    from uncertainty_mm import metrics

    kind = getattr(metrics, name)
    settings = {"num_labels": 3, "coverage": 0.5, "risk": 0.4}
    settings = {k: v for k, v in settings.items() if k in inspect.signature(kind).parameters}
    here, there = (kind(validate_args=False, **settings) for _ in range(2))
    there.to(device)
    batches = []
    for step in range(3):
        torch.manual_seed(step)
        probs, labels = torch.rand(8, 3), torch.randint(2, (8, 3))
        given = {"uncertainty": probs[:, 0], "errors": labels[:, 0], "probs": probs}
        given |= {"labels": labels, "unknown": probs < 0.2}
        taken = inspect.signature(kind.update).parameters
        batches.append([x for name, x in given.items() if name in taken])
    for step, batch in enumerate(batches):
        here.update(*batch)
        moved = [x.to(device) for x in batch]
        with nullcontext() if step == 0 else strict(device):
            there.update(*moved)
    for x, y in zip(
        *(pytree.tree_leaves(metric.compute()) for metric in (there, here)), strict=True
    ):
        close(x, y)
