"""Tools that move, shard, copy or quantize parameters, and a default device, on components that have parameters."""

import copy

import pytest
import torch
from torch import nn

from cases import CASES, MODULES, flattened
from support import close


@pytest.fixture(params=[name for name, case in MODULES.items() if [*case.build().parameters()]])
def case(request):
    return MODULES[request.param]


def outputs(case, module, step=0):
    return [x.detach() for x in flattened(case.run(module, *case.inputs(step)))]


@pytest.mark.parametrize("name", MODULES)
def test_settings_are_read_only(name):
    module = MODULES[name].build()
    values = {name: getattr(module, name) for name in type(module).__annotations__}
    settings = {name for name, value in values.items() if not isinstance(value, torch.Tensor)}
    assert "validate_args" in settings
    for name in settings:
        with pytest.raises(AttributeError, match=f"`{name}` is a setting of"):
            setattr(module, name, getattr(module, name))


@pytest.mark.parametrize("name", CASES)
def test_default_device_of_the_user_has_no_influence(name):
    case = CASES[name]
    module, inputs = case.build(), case.inputs(0)
    expected = case.results(copy.deepcopy(module), inputs)
    with torch.device("meta"):
        outputs = flattened(case.run(module, *inputs))
    assert all(map(torch.equal, outputs, expected))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantized_layers_are_near_the_plain_ones(case):
    module = case.build().eval()
    quantized = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    for x, y in zip(outputs(case, quantized), outputs(case, module), strict=True):
        close(x, y, torch.bfloat16)
