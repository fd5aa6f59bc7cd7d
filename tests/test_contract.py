"""What holds for every public module and for the package as a whole."""

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
from cases import CASES, DIMS, LABELS, LATENT
from support import close, gradient
from uncertainty_mm import functional

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def run_steps(case, module, steps):
    return [x for step in steps for x in case.results(module, case.inputs(step))]


def all_equal(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


# --------------------------------------------------------------------------------- every module


def test_every_public_module_has_a_case():
    public = {name: getattr(uncertainty_mm, name) for name in uncertainty_mm.__all__}
    modules = {n for n, o in public.items() if inspect.isclass(o) and issubclass(o, nn.Module)}
    assert modules == set(CASES)


@pytest.mark.parametrize("travel", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_copy_goes_on_mid_stream_like_the_original(case, travel):
    module = case.build()
    run_steps(case, module, range(3))
    twin = travel(module)
    assert all_equal(run_steps(case, twin, range(3, 6)), run_steps(case, module, range(3, 6)))


def test_copy_shares_nothing_with_the_original(case):
    module = case.build()
    twin = copy.deepcopy(module)
    before = pickle.dumps(twin.state_dict())
    run_steps(case, module, range(3))
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    assert pickle.dumps(twin.state_dict()) == before


def test_state_dict_resumes_mid_stream_to_the_bit(case, tmp_path):
    module, fresh = case.build(), case.build()
    run_steps(case, module, range(3))
    torch.save(module.state_dict(), tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all_equal(run_steps(case, fresh, range(3, 6)), run_steps(case, module, range(3, 6)))


def test_state_dict_is_all_that_changes_in_a_run(case):
    module = case.build()
    plain = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    before = pickle.dumps(plain)
    run_steps(case, module, range(3))
    assert pickle.dumps({k: vars(module)[k] for k in plain}) == before
    derived = {"merged"}  # of the tracker: all of the history, once it is loaded
    assert dict(module.named_buffers()).keys() - derived <= module.state_dict().keys()


def test_repr_shows_class_and_settings(case, request):
    name = request.node.callspec.params["case"]
    assert repr(case.build()).startswith(f"{name}(")
    assert re.search(case.shown, repr(case.build()))


def test_validate_args_changes_no_result(case):
    checked, unchecked = case.build(validate_args=True), case.build()
    checked.load_state_dict(unchecked.state_dict())
    assert all_equal(run_steps(case, checked, range(3)), run_steps(case, unchecked, range(3)))


def test_float64_module_computes_in_float64(case):
    module, double = case.build(), case.build()
    double.load_state_dict(module.state_dict())
    double.to(torch.float64)
    floating = [t for t in double.state_dict().values() if t.is_floating_point()]
    assert all(t.dtype == torch.float64 for t in floating)
    exact = case.results(double, case.inputs(0, dtype=torch.float64))
    rounded = case.results(module, case.inputs(0))
    for a, b in zip(exact, rounded, strict=True):
        close(b, a) if b.is_floating_point() else close(b.double(), a)
    if "Tracker" not in type(module).__name__:  # it answers in the default dtype
        assert all(t.dtype == torch.float64 for t in exact)


def test_module_on_the_meta_device_gives_shapes(case):
    # No value exists there, so whoever looks at one fails, as it would stall an accelerator.
    expected = [x.shape for x in case.results(case.build(), case.inputs(0))]
    module = case.build().to("meta")
    shapes = [x.shape for x in case.results(module, case.inputs(0, device="meta"))]
    assert shapes == expected


def test_tensors_on_different_devices_are_an_error(case):
    leaves, structure = pytree.tree_flatten(case.inputs(0))
    strayed = pytree.tree_unflatten([*leaves[:-1], leaves[-1].to("meta")], structure)
    with pytest.raises(ValueError, match="to be on cpu, but got meta"):
        case.run(case.build(), *strayed)


# ------------------------------------------------------------------------------ compile and export


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_whole_and_once(case):
    module, twin = case.build(), case.build()
    twin.load_state_dict(module.state_dict())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.run, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(5):  # the queue fills up in the third step
            inputs = case.inputs(step)
            expected = case.results(twin, case.inputs(step))
            outputs = pytree.tree_leaves(compiled(module, *inputs))
            for actual, wanted in zip(outputs, expected, strict=False):
                close(actual, wanted) if actual.is_floating_point() else close(
                    actual.double(), wanted
                )
            live = [x.sum() for x in outputs if x.requires_grad]
            if live:
                sum(live).backward()
                grads = [x.grad for x in pytree.tree_leaves(inputs) if x.requires_grad]
                wanted = expected[len(outputs) : len(outputs) + len(grads)]
                for grad, exact in zip(grads, wanted, strict=True):
                    close(torch.zeros_like(exact) if grad is None else grad, exact)
    assert counter.frame_count == 1
    for name, state in module.state_dict().items():
        close(state.double(), twin.state_dict()[name], torch.float32)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_supcon_compiles_with_its_gradient(reduction):
    embeddings, classes = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 0, 1, 1, 1, 2])

    def weighted(embeddings):
        return (functional.supcon_loss(embeddings, classes, reduction=reduction) * 3).sum()

    compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager")
    close(*gradient(compiled(embeddings), embeddings), *gradient(weighted(embeddings), embeddings))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
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


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # from the compiler itself
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
        self.direct = nn.Linear(len(DIMS) * 6, 1)

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
    assert output.shape == (12, LABELS)
    close(output, model(*longer).detach())


# ------------------------------------------------------------------------------------- the package


PUBLIC_NAMES = [
    "CorrectnessTracker",
    "DiagonalGaussian",
    "DistributionSupConLoss",
    "EmotionQueryAttention",
    "FusedPrediction",
    "GaussianDecoupler",
    "PlattScaling",
    "SoftRankOrdinalityLoss",
    "UncertaintyGatedFusion",
    "functional",
]
FUNCTIONS = [
    "distribution_embedding",
    "expected_distance",
    "ordinality_divergence",
    "prediction_distance",
    "soft_rank",
    "supcon_loss",
]
# Submodules that `import uncertainty_mm` leaves alone: for evaluation, some with more than torch.
SUBMODULES = ["data", "measures", "metrics", "plots"]


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
    assert sorted(functional.__all__) == FUNCTIONS


def test_documented_names_are_the_public_ones():
    public = {*uncertainty_mm.__all__, *SUBMODULES}
    public |= {f"{s}.{name}" for s in ["functional", *SUBMODULES] for name in names_of(s)}
    assert documented() == {f"uncertainty_mm.{name}" for name in public}


@pytest.mark.parametrize("name", [*PUBLIC_NAMES, *(f"functional.{name}" for name in FUNCTIONS)])
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
        if isinstance(item, tuple):  # a constant
            continue
        assert f"{item.__module__}.".startswith(f"{module.__name__}.")
        assert item.__doc__
        assert not item.__doc__.startswith(f"{name}(")
        assert item.__doc__ != torchmetrics.Metric.__doc__


def test_gaussian_of_the_docs_has_the_members_of_the_contract():
    members = {"mean", "std", "log_var", "variance", "rsample", "kl_to_standard_normal"}
    members |= {"embedding", "to_distribution"}
    assert members <= set(
        dir(uncertainty_mm.DiagonalGaussian(torch.zeros(LATENT), torch.ones(LATENT)))
    )


def test_import_is_silent_and_light():
    code = (
        "import sys, uncertainty_mm, uncertainty_mm.data, uncertainty_mm.measures\n"
        "heavy = {'lightning', 'matplotlib', 'sklearn', 'torchmetrics', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


@pytest.mark.parametrize(
    "name", ["EmotionQueryAttention", "GaussianDecoupler", "UncertaintyGatedFusion"]
)
def test_dtype_and_device_other_than_the_module_s_are_refused(name):
    case = CASES[name]
    module, arguments = case.build(), case.inputs(0)
    for change, error in ((torch.Tensor.double, TypeError), (lambda x: x.to("meta"), ValueError)):

        def changed(x, change=change):
            return change(x) if x.is_floating_point() else x

        with pytest.raises(error, match="Expected `"):
            module(*pytree.tree_map(changed, arguments))
