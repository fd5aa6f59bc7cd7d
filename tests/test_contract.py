"""What holds for every public component (tests/cases.py) and for the package as a whole."""

import copy
import importlib
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torchmetrics
from torch import nn
from torch.utils import _pytree as pytree

import uncertainty_mm
from cases import (
    CASES,
    FUNCTIONS,
    LATENT,
    MEASURES,
    MODULES,
    SMALL,
    WIDTH,
    Sizes,
    all_equal,
    flattened,
    in_turn,
    run_steps,
    weighted,
)
from support import HALF, QUIET_EXPORT, TOLERANCE, TORCH_2_6, all_close, close, gradient
from uncertainty_mm import functional
from uncertainty_mm.metrics import functional as measures

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=in_turn(CASES))
def case(request):
    return CASES[request.param]


@pytest.fixture(params=in_turn(MODULES))
def module_case(request):
    return MODULES[request.param]


class Run(nn.Module):
    """A case as a module, for what takes modules only."""

    def __init__(self, case, module):
        super().__init__()
        self.module = module
        self.run = case.run

    def forward(self, *inputs):
        return self.run(self.module, *inputs)


def test_every_public_component_has_a_case():
    public = {name: getattr(uncertainty_mm, name) for name in uncertainty_mm.__all__}
    modules = {n for n, o in public.items() if inspect.isclass(o) and issubclass(o, nn.Module)}
    modules |= {"PlaceClassifier", "PlaceReads", "SequenceEncoder"}  # of rooms of their own
    assert modules == {name.split()[0] for name in MODULES}
    assert {*functional.__all__, "DiagonalGaussian"} == set(FUNCTIONS)
    functions = {n for n in measures.__all__ if inspect.isfunction(getattr(measures, n))}
    assert functions == set(MEASURES)


# ------------------------------------------------------------------------- precision, sizes, layout


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_dtype_is_near_the_plain_equation(case, dtype):
    module = case.build()
    run_steps(case, module, range(2))  # what is in the buffers moves to the dtype as well
    before = copy.deepcopy(module.state_dict())
    module.to(dtype)
    for name, state in module.state_dict().items():
        moves = state.is_floating_point() and not case.float32
        assert state.dtype == (dtype if moves else before[name].dtype)
        assert state.is_floating_point() or torch.equal(state, before[name])
    inputs = case.inputs(2, dtype=dtype)
    expected = case.expected(copy.deepcopy(module), inputs)
    results = case.results(module, inputs)
    all_close(results, expected, dtype)
    if dtype == torch.float64 and "Tracker" not in type(module).__name__:
        assert all(x.dtype == dtype for x in results)  # the tracker answers in the default dtype


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_is_near_the_plain_equation(case, dtype):
    module, inputs = case.build(), case.inputs(0)
    expected = case.expected(copy.deepcopy(module), inputs)
    with torch.autocast("cpu", dtype=dtype):
        results = case.results(module, inputs)
    all_close(results, expected, dtype)


SIZES = {
    "one sample": Sizes(batch=1),
    "one label": Sizes(labels=1),
    "one modality": Sizes(modalities=1),
    "1000 labels": Sizes(batch=2, labels=1000, modalities=1),
    "one step": Sizes(steps=1),
    "5000 steps": Sizes(steps=5000),
}


def shapes(case, sizes):
    return [x.shape for x in pytree.tree_leaves(case.draw(sizes))]


# Each size where it makes a difference.
SIZED = [
    pytest.param(case, sizes, id=f"{name}-{size}")
    for name, case in CASES.items()
    for size, sizes in SIZES.items()
    if shapes(case, sizes) != shapes(case, SMALL)
]


@pytest.mark.parametrize(("case", "sizes"), SIZED)
def test_every_size_is_near_the_plain_equation(case, sizes):
    module = case.build(sizes)
    for step in range(2):
        inputs = case.inputs(step, sizes=sizes)
        expected = case.expected(copy.deepcopy(module), inputs)
        results = case.results(module, inputs)
        assert all(x.isfinite().all() for x in results)
        all_close(results, expected, torch.float32)


def test_nothing_comes_of_an_empty_batch(case):
    module, sizes = case.build(), Sizes(batch=0)
    before = copy.deepcopy(module.state_dict())
    results = case.results(module, case.inputs(0, sizes=sizes))
    assert all((x == 0).all() for x in results)  # no sample, or a loss of 0; the gradients of both
    some = case.results(module, case.inputs(0))
    assert [x.shape[1:] for x in results] == [x.shape[1:] for x in some]
    fresh = case.build()
    fresh.load_state_dict(before)
    assert all_equal(some, case.results(fresh, case.inputs(0)))


def strided(x):
    """Columns first in memory, and only every second number is one of its own."""
    return (
        torch.stack([x.mT, x.mT], -1)[..., 0].mT if x.dim() > 1 else torch.stack([x, x], -1)[:, 0]
    )


def expanded(x):
    return x[:1].expand_as(x)


@pytest.mark.parametrize("layout", [strided, expanded])
@pytest.mark.parametrize("name", CASES | MEASURES)
def test_layout_in_memory_has_no_influence(name, layout):
    case = (CASES | MEASURES)[name]
    module = case.build().double()
    twin = copy.deepcopy(module)
    leaves = case.inputs(0, dtype=torch.float64)
    views = pytree.tree_map(layout, leaves)
    assert not all(x.is_contiguous() for x in pytree.tree_leaves(views))
    copied = pytree.tree_map(torch.Tensor.contiguous, views)
    results = case.results(module, views, leaves)
    for x, y in zip(results, case.results(twin, copied, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("sizes", [Sizes(batch=0), Sizes(labels=0), Sizes(batch=0, labels=0)])
@pytest.mark.parametrize("name", MEASURES)
def test_measures_take_no_samples_and_no_labels(name, sizes):
    case = MEASURES[name]
    assert not any(x.isinf().any() for x in case.results(case.build(), case.inputs(0, sizes=sizes)))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_those_of_the_values_in_float64(name, dtype):
    case = MEASURES[name]
    module, inputs = case.build(), case.inputs(0, dtype=dtype)
    double = pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)
    assert all_equal(case.results(module, inputs)[:1], case.results(module, double)[:1])


# ------------------------------------------------------------------------------------------- state


def test_state_dict_is_all_that_changes_in_a_run(module_case):
    module = module_case.build()
    derived = {"merged"}  # of the tracker: all of the history, once it is loaded
    kept = module.state_dict().keys() | derived
    plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in kept}
    before = pickle.dumps(plain)
    run_steps(module_case, module, range(3))
    assert pickle.dumps({k: vars(module)[k] for k in plain}) == before
    assert dict(module.named_buffers()).keys() <= module.state_dict().keys()


@pytest.mark.parametrize("name", MODULES)
def test_repr_shows_class_and_settings(name):
    shown = repr(MODULES[name].build())
    assert shown.startswith(f"{name.split()[0]}(")
    assert re.search(MODULES[name].shown, shown)


def test_validate_args_changes_no_result(module_case):
    checked, unchecked = module_case.build(validate_args=True), module_case.build()
    checked.load_state_dict(unchecked.state_dict())
    results = [run_steps(module_case, module, range(3)) for module in (checked, unchecked)]
    assert all_equal(*results)


# ----------------------------------------------------------------------------------------- devices


OF_ONE_TENSOR = "expected_distance", "beta_expected_entropy", "beta_mutual_information"


def test_module_on_the_meta_device_gives_shapes(case):
    # No value exists there, so whoever looks at one fails, as it would stall an accelerator.
    expected = [x.shape for x in case.results(case.build(), case.inputs(0))]
    module = case.build().to("meta")
    shapes = [x.shape for x in case.results(module, case.inputs(0, device="meta"))]
    assert shapes == expected


@pytest.mark.parametrize("name", [name for name in CASES if name not in OF_ONE_TENSOR])
def test_tensors_on_different_devices_are_an_error(name):
    case = CASES[name]
    leaves, structure = pytree.tree_flatten(case.inputs(0))
    strayed = pytree.tree_unflatten([*leaves[:-1], leaves[-1].to("meta")], structure)
    with pytest.raises(ValueError, match="to be on cpu, but got meta"):
        case.run(case.build(), *strayed)


# --------------------------------------------------------------------- compile, export, torch.func


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def skip_if_read_by_properties(case):
    """Cases that read properties of what they get or give."""
    names = "DiagonalGaussian", "UncertaintyGatedFusion", "UncertaintyGatedFusion (concat)"
    if TORCH_2_6 and any(case is CASES[name] for name in names):
        pytest.skip("torch 2.6 does not trace a property of a named tuple")


@pytest.mark.long
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_whole_and_once(case):
    skip_if_read_by_properties(case)
    module = case.build()
    twin = copy.deepcopy(module)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.run, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(10):  # the queue is full after three steps and wraps three times
            results = case.results(module, case.inputs(step), run=compiled)
            all_close(results, case.results(twin, case.inputs(step)), torch.float32)
    assert counter.frame_count == 1
    for name, state in module.state_dict().items():
        close(state.double(), twin.state_dict()[name], torch.float32)


@pytest.mark.filterwarnings(*QUIET_EXPORT)
def test_exports(case):
    skip_if_read_by_properties(case)
    model = Run(case, case.build()).eval()
    program = torch.export.export(copy.deepcopy(model), case.inputs(0)).module()
    for step in (1, 2):
        wanted = flattened(model(*case.inputs(step)))
        for x, y in zip(flattened(program(*case.inputs(step))), wanted, strict=True):
            close(x.double(), y.detach(), torch.float32)


def functional_run(case, module, inputs):
    """A function of parameters and floating inputs, and these."""
    leaves, structure = pytree.tree_flatten(inputs)
    places = [i for i, x in enumerate(leaves) if x.requires_grad]
    model = Run(case, module)

    def run(live, parameters):
        filled = [x.detach() for x in leaves]
        for place, x in zip(places, live, strict=True):
            filled[place] = x
        arguments = tuple(pytree.tree_unflatten(filled, structure))
        return flattened(torch.func.functional_call(model, parameters, arguments))

    parameters = {name: x.detach() for name, x in model.named_parameters()}
    return run, [leaves[place].detach() for place in places], parameters


def test_torch_func_grad_is_that_of_autograd(case):
    module = case.build()
    run, *arguments = functional_run(case, module, case.inputs(0))

    def total(live, parameters):
        return weighted(run(live, parameters))

    if case.untransformed:
        with pytest.raises(RuntimeError, match=case.untransformed):
            torch.func.grad(total, argnums=(0, 1))(*arguments)
        return
    live, parameters = torch.func.grad(total, argnums=(0, 1))(*arguments)
    grads = [*live, *parameters.values()]
    for x, y in zip(grads, case.results(module, case.inputs(0))[-len(grads) :], strict=True):
        close(x, y)


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
def test_vmap_is_the_loop(case):
    module = case.build()
    leaves = [pytree.tree_leaves(case.inputs(step)) for step in range(3)]
    structure = pytree.tree_structure(case.inputs(0))

    def run(*leaves):
        return flattened(case.run(module, *pytree.tree_unflatten(leaves, structure)))

    stacked = [torch.stack(x) for x in zip(*leaves, strict=True)]
    if case.untransformed:
        with pytest.raises(RuntimeError, match=case.untransformed):
            torch.func.vmap(run)(*stacked)
        return
    for x, y in zip(
        torch.func.vmap(run)(*stacked), zip(*(run(*x) for x in leaves), strict=True), strict=True
    ):
        close(x, torch.stack(y).detach())


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_supcon_compiles_with_its_gradient(reduction):
    embeddings, classes = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 0, 1, 1, 1, 2])

    def weighted(embeddings):
        return (functional.supcon_loss(embeddings, classes, reduction=reduction) * 3).sum()

    compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager")
    close(*gradient(compiled(embeddings), embeddings), *gradient(weighted(embeddings), embeddings))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_gradient_is_that_before_the_batch_entered_the_queue(reduction):
    case = CASES["DistributionSupConLoss"]
    module, twin = case.build(reduction=reduction), case.build(reduction=reduction)
    module.compile(fullgraph=True, backend="aot_eager")
    for step in range(3):
        for actual, expected in zip(
            case.results(module, case.inputs(step)),
            case.results(twin, case.inputs(step)),
            strict=True,
        ):
            close(actual, expected)


@pytest.mark.long
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # from the compiler itself
@pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning")  # that of torch 2.6
@pytest.mark.parametrize("name", ["DistributionSupConLoss", "UncertaintyGatedFusion"])
def test_default_compiler_gives_the_same_results(name):
    case = CASES[name]
    module, twin = case.build(), case.build()
    twin.load_state_dict(module.state_dict())
    compiled = torch.compile(case.run, fullgraph=True)
    for step in range(2):
        outputs = pytree.tree_leaves(compiled(module, *case.inputs(step)))
        for actual, wanted in zip(outputs, case.results(twin, case.inputs(step)), strict=False):
            close(actual, wanted)


class Inference(nn.Module):
    """Attention, Gaussians and fusion in a row, gated by the distance that the means expect."""

    def __init__(self):
        super().__init__()
        self.attention = CASES["EmotionQueryAttention"].build()
        self.decoupler = CASES["GaussianDecoupler"].build()
        self.fusion = CASES["UncertaintyGatedFusion"].build()
        self.direct = nn.Linear(SMALL.modalities * WIDTH, 1)

    def forward(self, features, padding_mask):
        z = self.attention(features, padding_mask)
        missing = self.attention.missing(features, padding_mask)
        latent = self.decoupler(z, missing)
        probs = self.direct(z.transpose(1, 2).flatten(2)).squeeze(-1).sigmoid()
        return self.fusion(latent, functional.expected_distance(probs), missing).logits


@pytest.mark.parametrize("strict", [False, True])
def test_inference_exports(strict):
    model = Inference().eval()
    first, second = (CASES["EmotionQueryAttention"].inputs(step) for step in (0, 1))
    program = torch.export.export(model, first, strict=strict)
    close(program.module()(*second), model(*second).detach())


def test_inference_exports_with_any_batch_size():
    model = Inference().eval()
    inputs = CASES["EmotionQueryAttention"].inputs(0)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = pytree.tree_map(lambda _: {0: batch}, inputs)
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    longer = pytree.tree_map(lambda x: torch.cat([x, x.flip(0), x]), inputs)
    output = program.module()(*longer)
    assert output.shape == (12, SMALL.labels)
    close(output, model(*longer).detach())


# ------------------------------------------------------------------------------------- the package


PUBLIC_NAMES = [
    "AccuracyUncertaintyLoss",
    "BeliefFusion",
    "BetaCalibration",
    "BetaEvidenceLoss",
    "Conflict",
    "ConformalRiskControl",
    "CorrectnessRankingLoss",
    "CorrectnessTracker",
    "DecisionFusion",
    "DiagonalGaussian",
    "DistributionSupConLoss",
    "EmbeddingQueue",
    "EmotionQueryAttention",
    "FusedBelief",
    "FusedDecision",
    "FusedGaussian",
    "FusedPrediction",
    "GaussianDecoupler",
    "GaussianFusion",
    "HistogramBinning",
    "IsotonicCalibration",
    "LogitPool",
    "MonotoneConfidenceLoss",
    "PlattScaling",
    "SoftRankOrdinalityLoss",
    "TemperatureScaling",
    "Typicality",
    "UncertaintyGatedFusion",
    "functional",
]
FUNCTION_NAMES = [
    "beta_evidence_kl",
    "beta_evidence_loss",
    "beta_expected_entropy",
    "beta_mutual_information",
    "distribution_embedding",
    "expected_distance",
    "logistic_normal_probs",
    "ordinality_divergence",
    "prediction_distance",
    "reduced_chi2",
    "soft_rank",
    "supcon_loss",
]
# Submodules that `import uncertainty_mm` leaves alone: for evaluation, some with more than torch.
SUBMODULES = [
    *("data", "data.convert", "data.transforms", "distributed", "encoder"),
    *("lightning", "metrics", "metrics.functional", "places", "plots"),
]


def names_of(submodule):
    return importlib.import_module(f"uncertainty_mm.{submodule}").__all__


def documented():
    """Dotted names that the pages under docs/api document by a directive."""
    pages = sorted((ROOT / "docs" / "api").rglob("*.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    names = set(re.findall(r"\.\. auto(?:class|function|module|data):: (\S+)", text))
    whole = re.findall(r"\.\. automodule:: uncertainty_mm\.(\S+)\n(?!   :no-members:)", text)
    return names | {f"uncertainty_mm.{s}.{name}" for s in whole for name in names_of(s)}


def test_public_names_are_those_of_the_contract():
    assert sorted(uncertainty_mm.__all__) == PUBLIC_NAMES
    assert sorted(functional.__all__) == FUNCTION_NAMES


def test_documented_names_are_the_public_ones():
    public = {*uncertainty_mm.__all__, *SUBMODULES}
    public |= {f"{s}.{name}" for s in ["functional", *SUBMODULES] for name in names_of(s)}
    public |= {"calibration.best_threshold", "calibration.expected_threshold"}
    assert documented() == {f"uncertainty_mm.{name}" for name in public}


@pytest.mark.parametrize(
    "name", [*PUBLIC_NAMES, *(f"functional.{name}" for name in FUNCTION_NAMES)]
)
def test_every_public_name_has_a_docstring(name):
    item = uncertainty_mm
    for part in name.split("."):
        item = getattr(item, part)
    assert item.__doc__
    # NamedTuple and nn.Module would supply one of their own.
    assert not item.__doc__.startswith(f"{name}(")
    assert item.__doc__ != nn.Module.__doc__


@pytest.mark.parametrize("submodule", SUBMODULES)
def test_every_name_of_a_submodule_has_a_docstring(submodule):
    module = importlib.import_module(f"uncertainty_mm.{submodule}")
    for name in module.__all__:
        item = getattr(module, name)
        if not (inspect.isclass(item) or inspect.isfunction(item)):  # a constant
            continue
        assert f"{item.__module__}.".startswith(f"{module.__name__}.")
        assert item.__doc__
        assert not item.__doc__.startswith(f"{name}(")
        assert item.__doc__ != torchmetrics.Metric.__doc__


def test_gaussian_of_the_docs_has_the_members_of_the_contract():
    members = {"mean", "std", "log_var", "variance", "rsample", "kl_to_standard_normal"}
    members |= {"embedding", "to_distribution", "product", "inflated"}
    assert members <= set(
        dir(uncertainty_mm.DiagonalGaussian(torch.zeros(LATENT), torch.ones(LATENT)))
    )


def test_import_is_silent_and_light_and_rooms_open_when_they_are_asked_for():
    code = (
        "import sys, warnings, uncertainty_mm as umm\n"
        "assert {'data', 'metrics', 'plots'} <= set(dir(umm))\n"
        "assert 'uncertainty_mm.metrics' not in sys.modules\n"
        "umm.metrics.functional.auroc, umm.data.MultimodalDataset\n"
        "heavy = {'lightning', 'matplotlib', 'sklearn', 'torchmetrics', 'scipy'}\n"
        "assert not heavy & set(sys.modules)\n"
        "assert 'AURC' in dir(umm.metrics)\n"
        "warnings.simplefilter('ignore')  # of what others import\n"
        "umm.metrics.AURC, umm.plots.risk_coverage\n"
        "print(hasattr(umm, 'measures'), hasattr(umm.metrics, 'aurc'))"
    )
    own = "ignore:Implicitly cleaning up:ResourceWarning"  # of torch.distributed in torch 2.6
    command = [sys.executable, "-W", "error", "-W", own, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "False False", "")
