"""CorrectnessRankingLoss, against loops over pairs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from support import HALF, Bad, close, gradient, poisoned, record_validate_args, refused
from uncertainty_mm import CorrectnessRankingLoss

PAIRS = ["all", "neighbours"]


def loss(confidence, correctness, mask=None, **settings):
    return CorrectnessRankingLoss(**settings)(
        confidence=confidence, correctness=correctness, mask=mask
    )


def draw(samples, dtype=torch.float64):
    confidence = torch.rand(samples, dtype=dtype).requires_grad_()
    return confidence, torch.randint(5, (samples,)).to(dtype) / 4


def looped(confidence, correctness, pairs):
    k, c = confidence.tolist(), correctness.tolist()
    places = range(len(k))
    every = [(i, j) for i in places for j in places if i < j]
    if pairs == "neighbours":
        every = [(i, (i + 1) % len(k)) for i in places]
    costs = []
    for i, j in every:
        sign = (c[i] > c[j]) - (c[i] < c[j])
        costs.append(max(0, -sign * (k[i] - k[j]) + abs(c[i] - c[j])))
    return sum(costs) / len(costs)


@pytest.mark.parametrize("pairs", PAIRS)
@given(seed=st.integers(0, 2**16), samples=st.integers(2, 9))
def test_is_the_mean_over_the_pairs(pairs, seed, samples):
    torch.manual_seed(seed)
    batch = draw(samples)
    close(loss(*batch, pairs=pairs), looped(*batch, pairs))


@pytest.mark.parametrize("pairs", PAIRS)
@given(seed=st.integers(0, 2**16))
def test_masked_samples_are_as_if_they_were_not_there(pairs, seed):
    torch.manual_seed(seed)
    (confidence, correctness), mask = draw(9), torch.rand(9) < 0.4
    spoilt = poisoned(confidence, mask).requires_grad_(), poisoned(correctness, mask, math.nan)
    found = loss(*spoilt, mask, pairs=pairs)
    rest = confidence.detach()[~mask].requires_grad_()
    expected = loss(rest, correctness[~mask], pairs=pairs)
    close(found, expected.detach())
    (grad,) = gradient(found, spoilt[0])
    close(grad[~mask], *gradient(expected, rest))
    assert (grad[mask] == 0).all()


@pytest.mark.parametrize("pairs", PAIRS)
def test_equal_histories_cost_nothing(pairs):
    confidence, _ = draw(6)
    found = loss(confidence, torch.full((6,), 0.5).double(), pairs=pairs)
    assert found == 0
    assert (gradient(found, confidence)[0] == 0).all()


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("samples", [0, 1])
def test_fewer_than_two_samples_cost_nothing(pairs, samples):
    batch = draw(samples)
    found = loss(*batch, pairs=pairs)
    assert found == 0
    assert (gradient(found, batch[0])[0] == 0).all()
    (confidence, correctness), mask = draw(3), torch.tensor([True, False, True])
    assert loss(confidence, correctness, mask, pairs=pairs) == 0


def test_order_of_the_batch_does_not_count_for_all_pairs():
    batch, order = draw(9), torch.randperm(9)
    close(loss(*batch), loss(*(x[order] for x in batch)).detach())


def test_confidence_equal_to_correctness_costs_nothing_and_reversed_the_most():
    share = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert loss(share, share) == 0
    assert loss(1 - share, share) > loss(share.roll(1), share) > 0


def test_descent_brings_the_confidence_into_the_order_of_the_history():
    confidence, correctness = torch.rand(8).requires_grad_(), torch.linspace(0, 1, 8)
    optimizer = torch.optim.SGD([confidence], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        loss(confidence, correctness).backward()
        optimizer.step()
    assert torch.equal(confidence.argsort(), correctness.argsort())


@pytest.mark.parametrize("pairs", PAIRS)
def test_gradients(pairs):
    confidence, correctness = draw(6)
    assert gradcheck(lambda k: loss(k, correctness, pairs=pairs), confidence)
    correctness.requires_grad_()
    assert (gradient(loss(confidence, correctness, pairs=pairs), correctness)[0] == 0).all()


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_computed_in_float32(dtype):
    assert loss(*draw(8, dtype)).dtype == torch.float32


@pytest.mark.parametrize("settings", [{}, {"validate_args": False}, {"validate_args": True}])
def test_validate_args_is_passed_on(monkeypatch, settings):
    passed = record_validate_args(monkeypatch)
    loss(*draw(4), **settings)
    assert passed == [settings.get("validate_args")]


GOOD = torch.linspace(0, 1, 4)


def bad(name, call, message, error=ValueError):
    return Bad(name, call, error, f"^Expected {message}$")


BAD = [
    bad("pairs", lambda _: CorrectnessRankingLoss(pairs="some"), "`pairs` .* got 'some'"),
    bad("check", lambda _: CorrectnessRankingLoss(validate_args=1), ".* got 1", TypeError),
    bad("nan", lambda c: c(confidence=GOOD / 0, correctness=GOOD), "`confidence` to be finite, .*"),
    bad("share", lambda c: c(confidence=GOOD, correctness=2 * GOOD), "`correctness` to be in .*"),
    bad("size", lambda c: c(confidence=GOOD, correctness=GOOD[:2]), "`correctness` .* shape .*"),
    bad(
        "bool",
        lambda c: c(confidence=GOOD, correctness=GOOD > 0),
        "`correctness` to have a floating dtype .*",
        TypeError,
    ),
    bad(
        "mask",
        lambda c: c(confidence=GOOD, correctness=GOOD, mask=GOOD),
        "`mask` to have a bool dtype, .*",
        TypeError,
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_refuses(case):
    refused(case, CorrectnessRankingLoss())
