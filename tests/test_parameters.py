"""Tools that move, shard, copy or quantize parameters, and a default device, on components that have parameters."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cases import CASES, MODULES, flattened
from support import close

NAMES = [name for name, case in MODULES.items() if [*case.build().parameters()]]


@pytest.fixture(params=NAMES)
def case(request):
    return MODULES[request.param]


def outputs(case, module, step=0):
    return [x.detach() for x in flattened(case.run(module, *case.inputs(step)))]


def test_settings_are_read_only(case):
    module = case.build()
    settings = type(module).__annotations__.keys() - module.state_dict().keys()
    assert "validate_args" in settings
    for name in settings:
        with pytest.raises(AttributeError, match=f"`{name}` is a setting of"):
            setattr(module, name, getattr(module, name))


@pytest.mark.parametrize("whole", [False, True])
def test_meta_device_and_reset_parameters_make_a_module_as_new(case, whole):
    with torch.device("meta"):
        module = case.build()
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, torch.nan)  # as garbage, but surely
    for part in [module] if whole else module.modules():
        if part is module or [*part.parameters(recurse=False)]:
            part.reset_parameters()
    for name, new in case.build().named_parameters():
        parameter = module.get_parameter(name)
        if name == "prior_mean":
            assert not parameter.any()
        elif not name.endswith("bias") and new.std() > 0:  # some biases the case sets
            assert 1 / 3 < parameter.std() / new.std() < 3
    assert all(x.isfinite().all() for x in outputs(case, module))


OTHERS = ["DiagonalGaussian", "expected_distance", "prediction_distance", "reduced_chi2"]


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_default_device_of_the_user_has_no_influence(name):
    case = CASES[name]
    module, inputs = case.build(), case.inputs(0)
    expected = case.results(module, inputs)
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


def test_replica_of_data_parallel_computes_the_same(case):
    module = case.build()
    replicas = {}  # as torch.nn.parallel.replicate makes them, which needs accelerators

    def replicate(part):
        replica = replicas[part] = part._replicate_for_data_parallel()
        for name, child in part.named_children():
            setattr(replica, name, replicate(child))
        for name, parameter in part.named_parameters(recurse=False):
            setattr(replica, name, parameter * 1)  # a tensor: replicas have no parameters
        return replica

    replica = replicate(module)
    assert not [*replica.parameters()]
    assert all(map(torch.equal, outputs(case, replica), outputs(case, module)))


@pytest.fixture
def mesh():
    """A process group of this process alone."""
    fully_shard = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fully_shard, "fully_shard"):
        pytest.skip("torch has no FSDP2")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # of views, not changed here
@pytest.mark.parametrize("parts", ["whole", "label_embedding", "mean_head", "children"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_sharded_parameters_compute_the_same(case, mesh, parts, dtype):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    module = case.build()
    twin = copy.deepcopy(module)
    policy = MixedPrecisionPolicy(param_dtype=dtype, output_dtype=dtype and torch.float32)
    if parts == "whole":
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for name, part in module.named_children():
        if parts in (name, "children") and [*part.parameters()]:
            if isinstance(part, (nn.ModuleDict, nn.ModuleList)):  # without a forward pass
                for each in part.children():
                    fully_shard(each, mesh=mesh, mp_policy=policy)
            else:
                fully_shard(part, mesh=mesh, mp_policy=policy)
    for step in range(2):
        inputs = case.inputs(step)
        if hasattr(module, "missing"):
            assert torch.equal(module.missing(*inputs), twin.missing(*inputs))
        results = flattened(case.run(module, *inputs))
        for x, y in zip(results, outputs(case, twin, step), strict=True):
            close(x.double(), y, dtype or torch.float32)
        sum(x.float().sum() for x in results if x.requires_grad).backward()
    assert all(x.grad is not None for x in module.parameters())
