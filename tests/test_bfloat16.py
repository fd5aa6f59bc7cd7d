"""What a processor says of bfloat16, and what happens on one that has to emulate it."""

import platform

import pytest
import torch

from uncertainty_mm import _bfloat16
from uncertainty_mm.functional import supcon_loss


@pytest.mark.parametrize(
    ("machine", "library", "avx512", "amx", "native"),
    [
        ("x86_64", False, False, False, False),  # AVX2
        ("x86_64", True, False, False, False),  # AVX-512 alone
        ("AMD64", True, True, False, True),
        ("x86_64", True, False, True, True),
        ("x86_64", False, True, False, False),  # ONEDNN_MAX_CPU_ISA=AVX2
        ("aarch64", True, False, False, True),
        ("arm64", None, False, False, False),  # built without the library
    ],
)
def test_native_is_what_processor_and_library_both_have(
    monkeypatch, machine, library, avx512, amx, native
):
    operators = type("operators", (), {})()
    if library is not None:
        operators._is_mkldnn_bf16_supported = lambda: library
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert _bfloat16.is_native.__wrapped__() is native


def test_this_processor_is_asked_without_an_error():
    assert _bfloat16.is_native() in (True, False)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("no_native_bfloat16")
def test_without_instructions_products_are_those_of_float32_and_one_warning_says_so(reduction):
    embeddings = torch.randn(12, 8).requires_grad_()
    classes = torch.randint(3, (12,))

    def result(bf16_products):
        options = {"reduction": reduction, "bf16_products": bf16_products}
        loss = supcon_loss(embeddings, classes, **options)
        return loss, *torch.autograd.grad(loss.sum(), embeddings)

    with pytest.warns(UserWarning, match="no instructions for bfloat16"):
        assert all(map(torch.equal, result(True), result(False)))
    assert all(map(torch.equal, result(True), result(False)))  # a second warning were an error
