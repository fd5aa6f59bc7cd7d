"""On an accelerator: the same results as on the CPU, and the host never waits."""

import pytest
import torch
from torch.utils import _pytree as pytree

from cases import CASES
from support import close

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_results_are_those_of_the_cpu(case):
    module = case.build()
    device_module = case.build()
    device_module.load_state_dict(module.state_dict())
    device_module.cuda()
    for step in range(4):
        expected = case.results(module, case.inputs(step))
        actual = case.results(device_module, case.inputs(step, device="cuda"))
        for a, e in zip(actual, expected, strict=True):
            assert a.is_cuda
            close(a.double(), e, torch.float32)
    for name, state in device_module.state_dict().items():
        close(state.double(), module.state_dict()[name], torch.float32)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_host_never_waits(case):
    module = case.build().cuda()
    batches = [case.inputs(step, device="cuda") for step in range(4)]
    case.results(module, batches[0])  # whatever is set up once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            case.results(module, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_under_autocast_are_finite(case, dtype):
    module = case.build().cuda()
    with torch.autocast("cuda", dtype=dtype):
        outputs = pytree.tree_leaves(case.run(module, *case.inputs(0, device="cuda")))
    assert all(x.isfinite().all() for x in outputs)


def test_values_are_checked_on_request():
    build = CASES["UncertaintyGatedFusion"].build
    latent, uncertainty, missing = CASES["UncertaintyGatedFusion"].inputs(0, device="cuda")
    outside = uncertainty.detach() + 1
    build().cuda()(latent, outside, missing)
    with pytest.raises(ValueError, match="`uncertainty`"):
        build(validate_args=True).cuda()(latent, outside, missing)


def test_devices_are_always_checked():
    module = CASES["GaussianDecoupler"].build().cuda()
    z, missing = CASES["GaussianDecoupler"].inputs(0, device="cuda")
    with pytest.raises(ValueError, match="`missing`"):
        module(z, missing.cpu())
