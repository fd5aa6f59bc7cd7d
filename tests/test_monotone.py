"""MonotoneConfidenceLoss, by its equation."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from support import HALF, Bad, close, gradient, poisoned, record_validate_args, refused
from uncertainty_mm import MonotoneConfidenceLoss


def draw(*shape, dtype=torch.float64):
    return {name: torch.rand(*shape, dtype=dtype).requires_grad_() for name in ("full", "subset")}


@pytest.mark.parametrize("shape", [(6,), (5, 3)])
def test_is_the_mean_of_what_was_gained(shape):
    pair = draw(*shape)
    gains = [
        max(0, b - a) for a, b in zip(*(x.flatten().tolist() for x in pair.values()), strict=True)
    ]
    close(MonotoneConfidenceLoss()(**pair), sum(gains) / len(gains))


def test_less_is_never_the_surer_one_costs_nothing():
    pair = draw(6)
    found = MonotoneConfidenceLoss()(full=pair["full"], subset=pair["full"] - pair["subset"])
    assert found == 0
    assert all((x == 0).all() for x in gradient(found, *pair.values()))


@pytest.mark.parametrize("shape", [(9,), (3, 3)])
def test_what_is_left_out_is_as_if_it_were_not_there(shape):
    pair, mask, loss = draw(*shape), torch.arange(9).view(shape) % 3 == 1, MonotoneConfidenceLoss()
    spoilt = {name: poisoned(x, mask, math.nan).requires_grad_() for name, x in pair.items()}
    found = loss(**spoilt, mask=mask)
    rest = loss(**{name: x[~mask] for name, x in pair.items()})
    close(found, rest.detach())
    grads = zip(gradient(found, *spoilt.values()), gradient(rest, *pair.values()), strict=True)
    for grad, expected in grads:
        close(grad, expected)
    assert loss(**spoilt, mask=torch.ones_like(mask)) == 0


def test_gradient_raises_the_whole_and_lowers_the_part():
    pair = {"full": torch.tensor([0.2]), "subset": torch.tensor([0.9])}
    found = MonotoneConfidenceLoss()(**{k: x.requires_grad_() for k, x in pair.items()})
    assert [x.item() for x in gradient(found, *pair.values())] == [-1, 1]


def test_gradients():
    pair = draw(3, 2)
    assert gradcheck(
        lambda full, subset: MonotoneConfidenceLoss()(full=full, subset=subset), (*pair.values(),)
    )


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_computed_in_float32(dtype):
    largest = torch.finfo(dtype).max
    found = MonotoneConfidenceLoss()(
        full=torch.tensor([-largest / 4], dtype=dtype),
        subset=torch.tensor([largest / 4], dtype=dtype),
    )
    assert found.dtype == torch.float32
    assert found.isfinite()


@pytest.mark.parametrize("settings", [{}, {"validate_args": False}, {"validate_args": True}])
def test_validate_args_is_passed_on(monkeypatch, settings):
    passed = record_validate_args(monkeypatch)
    MonotoneConfidenceLoss(**settings)(**draw(4))
    assert passed == [settings.get("validate_args")]


GOOD = torch.ones(4)


def bad(name, call, message, error=ValueError):
    return Bad(name, call, error, f"^Expected {message}$")


BAD = [
    bad("check", lambda _: MonotoneConfidenceLoss(validate_args=1), ".* but got 1", TypeError),
    bad("nan", lambda c: c(full=GOOD, subset=GOOD * math.nan), "`subset` to be finite, .*"),
    bad("inf", lambda c: c(full=GOOD / 0, subset=GOOD), "`full` to be finite, .*"),
    bad("size", lambda c: c(full=GOOD, subset=GOOD[:2]), r"`subset` .*=4\), but got \(2,\)"),
    bad("list", lambda c: c(full=[1.0], subset=GOOD), "`full` to be a tensor, .* list", TypeError),
    bad("int", lambda c: c(full=GOOD, subset=GOOD.int()), "`subset` .* floating .*", TypeError),
    bad("mask", lambda c: c(full=GOOD, subset=GOOD, mask=GOOD), "`mask` .* bool .*", TypeError),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_refuses(case):
    refused(case, MonotoneConfidenceLoss())
