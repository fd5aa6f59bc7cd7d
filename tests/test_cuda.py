"""On an accelerator: the same results as on the CPU, also in a CUDA graph, and the host never waits."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

from cases import CASES
from support import HALF, all_close, close

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


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_is_near_the_plain_equation(case, dtype):
    module = case.build()
    expected = case.expected(copy.deepcopy(module), case.inputs(0))
    with torch.autocast("cuda", dtype=dtype):
        results = case.results(module.cuda(), case.inputs(0, device="cuda"))
    all_close(results, expected, dtype)


def test_runs_in_a_cuda_graph(case):
    module = case.build().cuda()
    twin = copy.deepcopy(module)
    inputs = case.inputs(0, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # whatever is set up once is no part of the graph
        for _ in range(3):
            case.results(module, inputs)
    torch.cuda.current_stream().wait_stream(side)
    module.load_state_dict(twin.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.results(module, inputs)
    for step in range(8):  # the queue fills up and wraps
        batch = case.inputs(step, device="cuda")
        for place, x in zip(pytree.tree_leaves(inputs), pytree.tree_leaves(batch), strict=True):
            place.detach().copy_(x.detach())
        graph.replay()
        all_close(results, case.results(twin, batch), torch.float32)
    for name, state in module.state_dict().items():
        close(state.double(), twin.state_dict()[name], torch.float32)


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
