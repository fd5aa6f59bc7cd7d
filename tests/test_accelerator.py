"""On an accelerator, and on a pretended one where there is none: the host never waits, and results are the CPU's."""

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch.utils import backend_registration

import accelerator
from cases import CASES, in_turn
from examples_support import need_extras
from support import HALF, processes

PRETENDABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
DEVICES = [
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
        ],
    ),
    pytest.param(
        "pretend",
        marks=pytest.mark.skipif(not PRETENDABLE, reason="this torch takes no device from Python"),
    ),
]


@pytest.fixture(scope="module")
def elsewhere():
    """A process of its own, started when first asked, in which the pretended device is known."""
    with ProcessPoolExecutor(1, processes(), accelerator.register) as pool:
        yield pool


@pytest.fixture(params=DEVICES)
def on(request, elsewhere):
    """Runs a job of accelerator.py on a device."""

    def run(job, *arguments):
        if request.param == "cuda":
            return job("cuda", *arguments)
        return elsewhere.submit(job, "pretend", *arguments).result()

    return run


# ------------------------------------------------------- the device itself, where there is one the real one


@pytest.mark.parametrize("name", accelerator.waiting())
def test_device_notices_a_wait(on, name):
    on(accelerator.wait, name)


def test_waits_are_counted(on):
    on(accelerator.count_waits)


def test_device_notices_no_other(on):
    on(accelerator.wait_for_nothing)


def test_tensors_come_and_go(on):
    on(accelerator.move)


# ------------------------------------------------------------------------------------ every component


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", in_turn(CASES))
def test_host_never_waits(on, name, training):
    on(accelerator.run_case, name, training)


@pytest.mark.parametrize("name", in_turn(CASES))
def test_results_are_those_of_the_cpu(on, name):
    on(accelerator.compare_case, name)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", in_turn(CASES))
def test_autocast_is_near_the_plain_equation(on, name, dtype):
    on(accelerator.autocast_case, name, dtype)


def test_values_are_checked_on_request_and_devices_always(on):
    on(accelerator.check_values)


def test_fit_there_is_that_on_the_cpu(on):
    on(accelerator.fit_there)


# -------------------------------------------------------------------------------- models and metrics


# File and class of every model of the examples.
MODELS = {
    "LDDU": "lddu_full",
    "EarlyFusion": "baselines.networks",
    "LateFusion": "baselines.networks",
    "PooledMLP": "baselines.networks",
    "CrossModal": "baselines.mult",
    "InvariantSpecific": "baselines.misa",
    "SequenceToSet": "baselines.mms2s",
    "MessagePassing": "baselines.hhmpn",
    "CommonPrivate": "baselines.tailor",
    "Adversarial": "baselines.amp",
    "Reconstruction": "baselines.carat",
}
MORE_MODELS = {
    "FusionGraph": "baselines.dfg",
    "ShiftedWords": "baselines.raven",
    "SequenceGeneration": "baselines.sgm",
    "LabelAttention": "baselines.lsan",
    "LabelGraph": "baselines.ml_gcn",
}


@pytest.mark.parametrize(("keys", "size"), [(4, 32), (3, 7), (100, 50), (16, 4096)])
def test_contrastive_loss_in_tiles_is_that_of_the_cpu(on, keys, size):
    on(accelerator.supcon_in_tiles, keys, size)


@pytest.fixture(
    params=[*MODELS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_MODELS)]
)
def model(request):
    need_extras()
    return (MODELS | MORE_MODELS)[request.param], request.param


def test_training_of_a_model_never_waits(on, model):
    on(accelerator.train_model, *model, "default")


@pytest.mark.long
@pytest.mark.parametrize("kernel", ["foreach", "fused"])
def test_training_with_other_optimisers_never_waits(on, kernel):
    need_extras()
    on(accelerator.train_model, MODELS["LDDU"], "LDDU", kernel)


def test_prediction_of_a_model_never_waits(on, model):
    on(accelerator.predict_model, *model)


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_guard_waits_once_a_step(on, on_nan):
    need_extras()
    on(accelerator.guard_model, MODELS["LDDU"], "LDDU", on_nan)


METRICS = ["AUGRC", "AURC", "CoverageAtRisk", "DetectionAUROC", "FPRAtTPR"]
METRICS += ["MultilabelBrierDecomposition", "MultilabelCalibrationError"]
METRICS += ["MultilabelSmoothCalibrationError", "RiskAtCoverage", "SampleJaccard", "SelectiveF1"]
METRICS += ["SpearmanCorrelation"]


@pytest.mark.parametrize("name", METRICS)
def test_update_of_a_metric_never_waits(on, name):
    pytest.importorskip("torchmetrics")
    on(accelerator.update_metric, name)
