"""State and parameters of every component in the hands of other tools: one table, component x situation.

A situation asserts that state survives to the bit; where it cannot, `REFUSED` has the words of the error. The page
`docs/howto/state.md` has a row for each situation.
"""

import contextlib
import copy
import functools
import io
import pickle
import re
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import ranks
from cases import MODULES, all_equal, flattened, in_turn, run_steps, weighted
from pages import DOCS
from support import TELLS_FUNCTIONS, close
from uncertainty_mm import (
    Conflict,
    ConformalRiskControl,
    CorrectnessTracker,
    Typicality,
    calibration,
    functional,
)
from uncertainty_mm._component import states

NAMES = [name for name, case in MODULES.items() if case.build().state_dict()]
SITUATIONS = {}

AGAIN = "outside the checkpointed function"
REPLICA = "copy that `DataParallel` makes"
REFUSED = {
    ("EmbeddingQueue", "gradient checkpointing"): AGAIN,
    ("EmbeddingQueue", "several checkpointed passes before the backward pass"): AGAIN,
    ("DistributionSupConLoss", "several checkpointed passes before the backward pass"): AGAIN,
    ("EmbeddingQueue", "`DataParallel`"): REPLICA,
    ("DistributionSupConLoss", "`DataParallel`"): REPLICA,
    ("CorrectnessTracker", "`DataParallel`"): REPLICA,
}


def situation(title, *options):
    """Registers a check of one case, or one check for each option."""

    def register(check):
        SITUATIONS[title] = [functools.partial(check, option=x) for x in options] or [check]
        return check

    return register


class Model(nn.Module):
    """A component among others: its inputs have a gradient to pass on, and there is a buffer that is a statistic."""

    def __init__(self, case):
        super().__init__()
        self.case, self.part = case, case.build()
        self.weight = nn.Parameter(torch.zeros(()))
        self.norm = nn.BatchNorm1d(1)

    def forward(self, step):
        """The loss of a step, which alone decides about its batch."""
        inputs = pytree.tree_map(self.scaled, self.case.inputs(step))
        loss = weighted(flattened(self.case.run(self.part, *inputs)))
        return loss + self.norm(self.weight + torch.arange(2.0).view(2, 1)).square().sum()

    def scaled(self, x):
        return x * self.weight.sigmoid() if x.is_floating_point() else x


def begun(case):
    """A model in the middle of a run, and a twin that goes on by itself."""
    model = Model(case)
    with torch.no_grad():
        for step in range(3):
            model(step)
    return model, copy.deepcopy(model)


def train(model, steps, run=None):
    """Loss and gradients of each step."""
    results = []
    for step in steps:
        model.zero_grad()
        loss = (run or model)(step)
        loss.backward()
        results += [loss.detach(), *(x.grad for x in model.parameters())]
    return results


def same(left, right):
    """Whether two modules, or dictionaries of tensors, hold the same."""
    left, right = (x.state_dict() if isinstance(x, nn.Module) else x for x in (left, right))
    return left.keys() == right.keys() and all_equal([*left.values()], [*right.values()])


def kept(module):
    """A copy of the state alone, without parameters."""
    return {name: x.clone() for name, x in states(module).items()}


@contextlib.contextmanager
def unfitted():
    """Calibrations as they are made: there is nothing to fit on the meta device."""
    with contextlib.ExitStack() as stack:
        for kind in (
            *(x for x in map(calibration.__dict__.get, calibration.__all__) if isinstance(x, type)),
            Conflict,
            ConformalRiskControl,
            Typicality,
        ):
            stack.enter_context(mock.patch.object(kind, "fit", lambda self, *_: self))
        yield


def made_on_meta(case):
    with torch.device("meta"), unfitted():
        return case.build()


def goes_on_as(case, module, twin):
    return all_equal(*(run_steps(case, x, range(3, 6)) for x in (module, twin))) and same(
        module, twin
    )


# ------------------------------------------------------------------------------ passes that are repeated


def checkpointed(model, use_reentrant):
    one = torch.ones((), requires_grad=True)

    def run(step):
        return checkpoint(lambda one: one * model(step), one, use_reentrant=use_reentrant)

    return run


@situation("gradient checkpointing", False, True)
def check_checkpointing(case, option):
    model, twin = begun(case)
    # batches from which nobody would go back
    seen = [] if option or not TELLS_FUNCTIONS else [0, 2]
    results = train(model, [*seen, 3, 4, 5], checkpointed(model, option))
    assert all_equal(results, train(twin, [*seen, 3, 4, 5]))
    assert same(model.part, twin.part)


@situation("several checkpointed passes before the backward pass", False, True)
def check_checkpointing_of_several(case, option):
    model, twin = begun(case)
    run = checkpointed(model, option)
    results = train(model, [3], lambda step: run(step) + run(step + 1))
    expected = train(twin, [3], lambda step: twin(step) + twin(step + 1))
    torch.testing.assert_close(results, expected)  # reentrant ones add gradients in another order
    assert same(model.part, twin.part)


# How a loss is computed without remembering its batch, and how the batch is remembered.
READS = {
    "DistributionSupConLoss": lambda loss, *batch: loss(*batch, enqueue=False),
    "EmbeddingQueue": lambda queue, rows, classes: functional.supcon_loss(
        rows, classes, bank=queue.rows, bank_classes=queue.classes
    ),
    "CorrectnessTracker": lambda tracker, indices, _: tracker(indices),
}
REMEMBERS = {
    "DistributionSupConLoss": lambda loss, *batch: loss.enqueue(*batch),
    "EmbeddingQueue": lambda queue, *batch: queue.enqueue(*batch),
    "CorrectnessTracker": lambda tracker, *batch: tracker.update(*batch),
}


@situation("an optimiser that calls the loss several times")
def check_closure(case):
    model, twin = begun(case)
    kind = type(model.part).__name__
    read = mock.Mock(side_effect=READS.get(kind, case.run))
    model.case = mock.Mock(inputs=case.inputs, run=read)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=4)
    for step in range(3, 6):

        def closure(step=step):
            optimizer.zero_grad()
            loss = model(step)
            loss.backward()
            return loss

        optimizer.step(closure)
        REMEMBERS.get(kind, case.run)(model.part, *case.inputs(step))
        case.run(twin.part, *case.inputs(step))
    assert read.call_count > 3
    assert same(kept(model), kept(twin))


# ----------------------------------------------------------------------------------- training's other tools


@situation("averaged weights (`AveragedModel`)", False, True)
def check_averaging(case, option):
    model, twin = begun(case)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=option)
    before, expected = kept(model), []
    for step in (3, 4):
        for each in (model, twin):
            train(each, [step])
            nn.init.constant_(each.weight, step)
        averaged.update_parameters(model)
        expected = [*expected, model.weight.item()]
    assert averaged.module.weight == sum(expected) / 2
    assert same(kept(averaged.module), before)  # as it was when it was copied
    assert same(kept(model), kept(twin))


@situation("`update_bn` after averaging")
def check_update_bn(case):
    model, twin = begun(case)
    averaged = AveragedModel(model)
    update_bn([3, 4], averaged)
    assert same(kept(model), kept(twin))
    twin(3), twin(4)
    assert same(kept(averaged.module), kept(twin))  # in training mode


@pytest.fixture(scope="module")
def averaged_by_lightning(tmp_path_factory):
    """Models after two steps of Lightning's averaging, and their checkpoint."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.models = nn.ModuleDict({name: Model(MODULES[name]) for name in NAMES})

        def training_step(self, batch, _):
            return sum(model(int(batch)) for model in self.models.values())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    lit = Lit()
    twin = copy.deepcopy(lit)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar"], False)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        enable_model_summary=False,
        **quiet,
        callbacks=[EMAWeightAveraging(decay=0.5)],
    )
    file = tmp_path_factory.mktemp("averaged") / "last.ckpt"
    lit.on_train_epoch_end = lambda: trainer.save_checkpoint(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers, and of what Lightning itself uses
        trainer.fit(lit, torch.utils.data.DataLoader([3, 4]))
    saved = torch.load(file, weights_only=True)
    return {
        MODULES[name]: (lit.models[name], twin.models[name], saved, f"models.{name}.")
        for name in NAMES
    }


@situation("averaged weights (Lightning's `EMAWeightAveraging`)")
def check_lightning(case, averaged_by_lightning):
    model, twin, saved, prefix = averaged_by_lightning[case]
    averaged = {x: saved["state_dict"][prefix + x] for x in kept(twin)}
    assert same(averaged, kept(twin))  # as it was when training began
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
    for step in (3, 4):
        train(twin, [step])
        optimizer.step()
    assert same({x: saved["current_model_state"][prefix + x] for x in kept(twin)}, kept(twin))
    assert same(kept(model), kept(twin))


@situation("gradient accumulation")
def check_accumulation(case):
    model, twin = begun(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in (3, 4):
        (model(step) / 2).backward()
        twin(step)
    optimizer.step()
    assert same(kept(model), kept(twin))


@situation("a gradient scaler that skips a step")
def check_scaler(case):
    model, twin = begun(case)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), torch.amp.GradScaler("cpu")
    scaler.scale(model(3) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    twin(3)  # the batch has entered all the same
    assert scaler.get_scale() < 2**16
    assert same(model, twin)


@situation("a batch that is not finite")
def check_not_finite(case):
    inputs = pytree.tree_map(
        lambda x: x * torch.nan if x.is_floating_point() else x, case.inputs(3)
    )
    for validate_args in (None, False):
        module = case.build(validate_args=validate_args)
        run_steps(case, module, range(3))
        before = copy.deepcopy(module)
        if isinstance(module, CorrectnessTracker):
            inputs = inputs[0], torch.full(inputs[1].shape, torch.nan)
        with contextlib.ExitStack() as refused:
            if validate_args is None:
                refused.enter_context(
                    pytest.raises(ValueError, match=r"to be (finite|in \[0, 1\])")
                )
            case.run(module, *inputs)
        assert same(module, before)
        assert goes_on_as(case, module, before)


# ------------------------------------------------------------------------------------------- copies and files


@situation("`copy.deepcopy` and `pickle`", copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)))
def check_copy(case, option):
    module = case.build()
    run_steps(case, module, range(3))
    twin, before = option(module), copy.deepcopy(module.state_dict())
    run_steps(case, module, range(3, 5))
    assert same(twin.state_dict(), before)  # nothing is shared
    assert goes_on_as(case, option(module), module)


@situation("a file of the `state_dict`, also with `assign=True`", False, True)
def check_file(case, option):
    module, file = case.build(), io.BytesIO()
    run_steps(case, module, range(3))
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = made_on_meta(case) if option else case.build()
    fresh.load_state_dict(torch.load(file, weights_only=True), assign=option)
    assert goes_on_as(case, fresh.to("cpu"), module)


def unlike(case, change):
    """For each name of the state: a module, its state, and a dictionary that is wrong in that name."""
    source = case.build()
    run_steps(case, source, range(3))
    for name in kept(source):
        module = case.build()
        given = source.state_dict()
        change(given, name)
        yield name, module, kept(module), given


def owned(state, name):
    """The state of the part that `name` belongs to, which loads whole or not at all."""
    owner = name.rpartition(".")[0]
    return {key: value for key, value in state.items() if key.rpartition(".")[0] == owner}


@situation("a `state_dict` that lacks a part of a state")
def check_missing_part(case):
    for name, module, before, given in unlike(case, lambda given, name: given.pop(name)):
        with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
            module.load_state_dict(given)
        assert same(owned(kept(module), name), owned(before, name))
        keys = module.load_state_dict(given, strict=False)
        assert keys.missing_keys == [name]
        assert not keys.unexpected_keys
        assert same(owned(kept(module), name), owned(before, name))


def other_size(given, name):
    given[name] = given[name].new_zeros(7, *given[name].shape)


def other_kind(given, name):
    floating = given[name].is_floating_point()
    given[name] = given[name].long() if floating else given[name].half()


def check_refused_state(case, change, words):
    for name, module, before, given in unlike(case, change):
        for options in ({}, {"strict": False}, {"assign": True}):
            with pytest.raises(RuntimeError, match=f"Expected `{name}` to have {words}, but got"):
                module.load_state_dict(given, **options)
            assert same(owned(kept(module), name), owned(before, name))


SITUATIONS["a `state_dict` of another size"] = [
    functools.partial(check_refused_state, change=other_size, words="shape .*")
]
SITUATIONS["a `state_dict` whose counts and classes were made floating"] = [
    functools.partial(check_refused_state, change=other_kind, words="an? (integer|floating) dtype")
]


@situation("`torch.distributed.checkpoint`")
def check_distributed_checkpoint(case, tmp_path_factory):
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    module, fresh = case.build(), case.build()
    run_steps(case, module, range(3))
    folder = tmp_path_factory.mktemp("checkpoint")
    with alone():
        dcp.save({"model": get_model_state_dict(module)}, checkpoint_id=folder)
        loaded = {"model": get_model_state_dict(fresh)}
        dcp.load(loaded, checkpoint_id=folder)
        set_model_state_dict(fresh, loaded["model"])
    assert goes_on_as(case, fresh, module)


@situation("the meta device, `to_empty`, `reset_parameters`")
def check_meta(case):
    with unfitted():
        new = case.build()
    for whole in (False, True):
        module = made_on_meta(case).to_empty(device="cpu")
        for x in module.state_dict().values():
            x.detach().fill_(torch.nan if x.is_floating_point() else 77)  # as garbage, but surely
        for part in [module] if whole else module.modules():
            getattr(part, "reset_parameters", lambda: None)()
        assert same(kept(module), kept(new))
        for name, x in new.named_parameters():
            parameter = module.get_parameter(name)
            if name == "prior_mean":
                assert not parameter.any()
            elif not name.endswith("bias") and x.std() > 0:  # some biases the case sets
                assert 1 / 3 < parameter.std() / x.std() < 3
        assert all(x.isfinite().all() for x in run_steps(case, module, [0]))


@situation("`half`, `bfloat16`, `double`", torch.half, torch.bfloat16, torch.double)
def check_dtype(case, option):
    module = case.build()
    run_steps(case, module, range(3))
    before = module.state_dict()
    wanted = torch.float32 if case.float32 else option
    for name, x in module.to(option).state_dict().items():
        assert torch.equal(x, before[name].to(wanted) if x.is_floating_point() else before[name])
        assert x.is_floating_point() or x.dtype == before[name].dtype


# ------------------------------------------------------------------------------------------------ processes


@pytest.fixture(scope="module")
def spawned():
    """What all components do in a process that they were passed to, and what they are here afterwards."""
    modules = {name: MODULES[name].build() for name in NAMES}
    twins = copy.deepcopy(modules)
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=ranks.go_on, args=(modules, theirs), daemon=True)
    process.start()
    assert ours.poll(ranks.START)
    answers = pickle.loads(ours.recv_bytes())
    process.join()
    return {MODULES[name]: (modules[name], twins[name], answers[name]) for name in NAMES}


@situation("a spawned process")
def check_spawned(case, spawned):
    module, twin, answer = spawned[case]
    assert all_equal(answer, run_steps(case, twin, range(3)))
    assert same(module, twin)  # memory is shared, as with parameters


@situation("`share_memory`")
def check_shared(case):
    module = case.build().share_memory()
    assert all(x.is_shared() for x in module.state_dict().values())


def replicated(module):
    """As `torch.nn.parallel.replicate` does, which needs accelerators."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replica, name, replicated(child))
    for name, parameter in module.named_parameters(recurse=False):
        setattr(replica, name, parameter * 1)  # a tensor: replicas have no parameters
    return replica


@situation("`DataParallel`")
def check_replicas(case):
    module = case.build()
    run_steps(case, module, range(3))
    before = copy.deepcopy(module)
    elsewhere = replicated(module)
    for part in elsewhere.modules():
        for name, x in [*vars(part).items()]:
            if isinstance(x, torch.Tensor) and name not in getattr(part, "_states", ()):
                setattr(part, name, x.to("meta"))  # as on another device
    with torch.no_grad():
        replica = replicated(module.eval())
        read = READS.get(type(module).__name__, case.run)
        for step in (3, 4):
            outputs = [read(x, *case.inputs(step)) for x in (replica, before.eval())]
            assert all_equal(*map(flattened, outputs))
    if not states(module) or type(module).__name__ not in READS:
        case.run(elsewhere, *case.inputs(3, device="meta"))
    try:
        case.run(replicated(module.train()), *case.inputs(3))
    finally:
        assert same(module, before)


@contextlib.contextmanager
def alone():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@situation("`DistributedDataParallel`")
def check_ddp(case):
    model, twin = begun(case)
    with alone():
        parallel = DistributedDataParallel(model)
        assert all_equal(train(parallel, range(3, 6)), train(twin, range(3, 6)))
        assert same(model, twin)
        plain = {name.removeprefix("module."): x for name, x in parallel.state_dict().items()}
        assert same(plain, twin)


@situation("`fully_shard`, also in bfloat16", None, torch.bfloat16)
def check_sharding(case, option):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not (hasattr(fsdp, "fully_shard") and hasattr(torch.cpu.Stream, "record_event")):
        pytest.skip("torch has no FSDP2 for the CPU")
    policy = fsdp.MixedPrecisionPolicy(param_dtype=option, output_dtype=option and torch.float32)
    for whole in (False, True):
        module = case.build()
        twin = copy.deepcopy(module)
        with alone() as mesh:
            for part in [module] if whole else module.children():
                each = (
                    part.children() if isinstance(part, (nn.ModuleDict, nn.ModuleList)) else [part]
                )
                for x in each:
                    fsdp.fully_shard(x, mesh=mesh, mp_policy=policy)
            for step in range(2):
                inputs = case.inputs(step)
                results = flattened(case.run(module, *inputs))
                for x, y in zip(results, flattened(case.run(twin, *inputs)), strict=True):
                    close(x.double(), y.detach(), option or torch.float32)
                if hasattr(module, "missing"):
                    assert torch.equal(module.missing(*inputs), twin.missing(*inputs))
                live = [x.float().sum() for x in results if x.requires_grad]
                if live:
                    sum(live).backward()
            assert all(x.grad is not None for x in module.parameters())
            for name, x in kept(twin).items():  # inputs are cast, state is not
                assert states(module)[name].dtype == x.dtype
                close(states(module)[name].double(), x, option or torch.float32)


# ----------------------------------------------------------------------------------------- torch's other tools


@situation("`torch.compile`")
def check_compiled(case):
    module = case.build()
    twin = copy.deepcopy(module)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        for step in range(2):
            case.run(compiled, *case.inputs(step))
            case.run(twin, *case.inputs(step))
    torch.compiler.reset()
    plain = {n.removeprefix("_orig_mod."): x for n, x in compiled.state_dict().items()}
    assert same(plain, twin)
    assert same(module, twin)


@situation("`torch.func.functional_call`")
def check_functional_call(case):
    model, other = begun(case)[0], Model(case)
    before = copy.deepcopy(other)
    state = copy.deepcopy(model.state_dict())
    result = torch.func.functional_call(other, state, (3,))
    assert torch.equal(result, model(3))
    assert same(state, model)  # what was passed changes
    assert same(other, before)


@situation("`zero_grad`, `requires_grad_`, `train`, `eval`, `apply`")
def check_quiet(case):
    module = begun(case)[0].part
    before = copy.deepcopy(module)
    module.zero_grad()
    module.eval().train().requires_grad_(False).requires_grad_(True)
    seen = []
    module.apply(seen.append)
    assert seen[-1] is module
    assert same(module, before)
    assert not any(x.requires_grad for x in states(module).values())
    named = [*dict(module.named_parameters()), *dict(module.named_buffers()), *kept(module)]
    assert sorted(named) == sorted(module.state_dict())
    assert not [*module.buffers()]


@situation("`parametrize` and `prune`")
def check_parametrized(case):
    module = case.build()
    twin = copy.deepcopy(module)
    owners = [
        (part, name)
        for part in module.modules()
        for name, _ in part.named_parameters(recurse=False)
    ]
    for part, name in owners:
        parametrize.register_parametrization(part, name, nn.Identity())
    assert all_equal(*(flattened(case.run(x, *case.inputs(0))) for x in (module, twin)))
    assert kept(module).keys() <= module.state_dict().keys()
    for part, name in owners:
        parametrize.remove_parametrizations(part, name)
        prune.identity(part, name)
    assert all_equal(*(flattened(case.run(x, *case.inputs(1))) for x in (module, twin)))
    for part, name in owners:
        prune.remove(part, name)
    assert goes_on_as(case, module, twin)


# ------------------------------------------------------------------------------------------------- the table


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # of views, not changed here
@pytest.mark.parametrize(
    ("title", "check"),
    [
        pytest.param(title, check, id=title + (f" {i}" if len(checks) > 1 else ""))
        for title, checks in SITUATIONS.items()
        for i, check in enumerate(checks)
    ],
)
@pytest.mark.parametrize("name", in_turn(NAMES))
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch 2.6, of itself
def test_state_survives_or_is_refused(name, title, check, request):
    words = REFUSED.get((name.partition(" (")[0], title))  # whatever the similarity
    code = (check.func if isinstance(check, functools.partial) else check).__code__
    wanted = {"averaged_by_lightning", "spawned", "tmp_path_factory"} & {
        *code.co_varnames[: code.co_argcount]
    }
    fixtures = {fixture: request.getfixturevalue(fixture) for fixture in wanted}
    with pytest.raises(RuntimeError, match=words) if words else contextlib.nullcontext():
        check(MODULES[name], **fixtures)


def test_every_situation_is_on_the_page():
    page = (DOCS / "howto" / "state.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \|", page, re.MULTILINE)
    assert [row for row in rows if row in SITUATIONS] == [*SITUATIONS]
