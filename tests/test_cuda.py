"""In a CUDA graph: the same results as without, step after step; test_accelerator.py has the rest."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

from cases import CASES
from support import all_close, close

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


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
