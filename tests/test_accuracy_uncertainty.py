"""AccuracyUncertaintyLoss, by its equation and by what it must do where a kind of prediction is absent."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

from support import HALF, Bad, close, gradient, poisoned, record_validate_args, refused
from uncertainty_mm import AccuracyUncertaintyLoss


def draw(dtype=torch.float64, samples=6):
    probs = torch.rand(samples, 4, dtype=dtype)
    uncertainty = 0.7 * torch.rand(samples, 4, dtype=dtype)
    return {
        "probs": probs.requires_grad_(),
        "uncertainty": uncertainty.requires_grad_(),
        "labels": torch.randint(2, (samples, 4)),
    }


def one_of_each(uncertainty):
    """Accurate and inaccurate, each of the confidence 0.8."""
    return {
        "probs": torch.full((1, 2), 0.8, dtype=torch.float64, requires_grad=True),
        "uncertainty": torch.tensor([uncertainty], dtype=torch.float64, requires_grad=True),
        "labels": torch.tensor([[1, 0]]),
    }


def test_a_prediction_of_each_kind_by_hand():
    low, high = math.tanh(0.1), math.tanh(0.5)
    loss = AccuracyUncertaintyLoss(threshold=0.3)
    good, bad = 0.8 * (1 - low), 0.2 * (1 - low)
    close(loss(**one_of_each([0.1, 0.1])), -math.log(good / (good + bad)))
    good, bad = 0.2 * high, 0.8 * high
    close(loss(**one_of_each([0.5, 0.5])), -math.log(good / (good + bad)))
    for each in (loss, AccuracyUncertaintyLoss()):
        close(each(**one_of_each([0.1, 0.5])), 0.0)  # as it should be


def test_threshold_of_the_batch_is_halfway_between_the_means():
    batch = draw()
    accurate = (batch["probs"] > 0.5) == (batch["labels"] > 0)
    u = batch["uncertainty"].detach()
    halfway = (u[accurate].mean() + u[~accurate].mean()).item() / 2
    close(AccuracyUncertaintyLoss()(**batch), AccuracyUncertaintyLoss(threshold=halfway)(**batch))


@pytest.mark.parametrize("wrong", [math.nan, -1.0])
def test_unknown_labels_are_as_if_they_were_not_there(wrong):
    batch, loss = draw(), AccuracyUncertaintyLoss()
    unknown = torch.zeros(6, 4, dtype=torch.bool)
    unknown[[0, 2]] = True  # whole samples, and a label
    unknown[:, 3] = True
    spoilt = {name: poisoned(x.double(), unknown, wrong) for name, x in batch.items()}
    leaves = [spoilt[name].requires_grad_() for name in ("probs", "uncertainty")]
    found = loss(**spoilt, unknown=unknown)
    rest = {name: x[[1, 3, 4, 5], :3] for name, x in batch.items()}
    close(found, loss(**rest))
    for grad, leaf in zip(gradient(found, *leaves), ("probs", "uncertainty"), strict=True):
        (expected,) = gradient(loss(**rest), batch[leaf])
        close(grad, expected)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.3, 9.0])
def test_finite_whatever_kinds_are_absent(threshold):
    loss = AccuracyUncertaintyLoss(threshold=threshold)
    sure, spread = ([1.0, 1.0], [0.0, 1.0], [0.8, 0.6]), ([0.0, 0.0], [0.1, 0.6], [0.6, 0.1])
    for *pair, labels in itertools.product(sure, spread, ([1, 1], [0, 0], [1, 0])):
        leaves = [torch.tensor([x]).requires_grad_() for x in pair]
        found = loss(probs=leaves[0], uncertainty=leaves[1], labels=torch.tensor([labels]))
        assert 0 <= found < 30
        assert all(x.isfinite().all() for x in gradient(found, *leaves))


def test_all_that_is_wrong_still_has_a_gradient():
    batch = one_of_each([0.5, 0.1])  # accurate and uncertain, inaccurate and certain
    found = AccuracyUncertaintyLoss(threshold=0.3)(**batch)
    (grad,) = gradient(found, batch["uncertainty"])
    assert found > 10
    assert grad[0, 0] > 0 > grad[0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_of_full_confidence_cost_what_those_of_nearly_full_do(dtype):
    loss = AccuracyUncertaintyLoss(threshold=0.3)
    u = torch.tensor([[0.1, 0.6, 0.2, 5.0]], dtype=dtype, requires_grad=True)
    labels, unknown = torch.tensor([[1, 0, 1, 1]]), torch.tensor([[False, False, False, True]])

    def of(sure):
        probs = torch.tensor([[1 - sure, sure, 1 - sure, 0.5]], dtype=dtype, requires_grad=True)
        found = loss(probs=probs, uncertainty=u, labels=labels, unknown=unknown)
        return found, *gradient(found, probs, u)

    (exact, grad, grad_u), (nearly, _, expected) = of(1.0), of(1 - 1e-4)
    assert nearly > 0.3
    torch.testing.assert_close(exact, nearly, rtol=1e-3, atol=0)
    torch.testing.assert_close(grad_u, expected, rtol=1e-3, atol=1e-6)
    assert grad.isfinite().all()
    certain = {"uncertainty": torch.zeros(1, 2), "labels": torch.tensor([[0, 1]])}
    assert loss(probs=torch.tensor([[1.0, 0.0]]), **certain) == pytest.approx(15.9, abs=0.1)


def test_nothing_known_costs_nothing():
    batch = draw()
    found = AccuracyUncertaintyLoss()(**batch, unknown=torch.ones(6, 4, dtype=torch.bool))
    assert found == 0
    assert all((x == 0).all() for x in gradient(found, batch["probs"], batch["uncertainty"]))


def test_descent_moves_uncertainty_to_the_errors():
    torch.manual_seed(0)
    accurate = torch.arange(40).view(10, 4) % 3 > 0
    raw = torch.randn(10, 4).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.1)
    batch = {"probs": torch.full((10, 4), 0.7), "labels": accurate}
    for _ in range(60):
        optimizer.zero_grad()
        AccuracyUncertaintyLoss()(uncertainty=0.7 * raw.sigmoid(), **batch).backward()
        optimizer.step()
    u = raw.detach().sigmoid()
    assert u[accurate].mean() < u[~accurate].mean() - 0.2


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_gradients(threshold):
    batch = draw()

    def run(probs, uncertainty):
        loss = AccuracyUncertaintyLoss(threshold=threshold)
        return loss(probs=probs, uncertainty=uncertainty, labels=batch["labels"])

    assert gradcheck(run, (batch["probs"], batch["uncertainty"]))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_computed_in_float32(dtype):
    found = AccuracyUncertaintyLoss()(**draw(dtype))
    assert found.dtype == torch.float32
    assert found.isfinite()


@pytest.mark.parametrize("settings", [{}, {"validate_args": False}, {"validate_args": True}])
def test_validate_args_is_passed_on(monkeypatch, settings):
    passed = record_validate_args(monkeypatch)
    AccuracyUncertaintyLoss(**settings)(**draw())
    assert passed == [settings.get("validate_args")]


GOOD = {
    "probs": torch.full((2, 3), 0.5),
    "uncertainty": torch.ones(2, 3),
    "labels": torch.ones(2, 3),
}


def made(error, **settings):
    return lambda _: AccuracyUncertaintyLoss(**settings), error


def called(error=ValueError, **change):
    return lambda loss: loss(**(GOOD | change)), error


BAD = [
    Bad(name, *call, f"^Expected {message}$")
    for name, call, message in [
        ("below 0", made(ValueError, threshold=-0.1), "`threshold` .* at least 0, but got -0.1"),
        ("nan", made(ValueError, threshold=math.nan), "`threshold` .* but got nan"),
        ("word", made(TypeError, threshold="mean"), "`threshold` .* but got 'mean'"),
        ("check", made(TypeError, validate_args=1), "`validate_args` .* but got 1"),
        ("probs", called(probs=torch.full((2, 3), 1.5)), r"`probs` to be in \[0, 1\], but got 1.5"),
        ("certain", called(uncertainty=-torch.ones(2, 3)), "`uncertainty` .* but got -1.0"),
        ("infinite", called(uncertainty=torch.ones(2, 3) / 0), "`uncertainty` to be finite, .*"),
        ("labels", called(labels=torch.full((2, 3), -1)), "`labels` .* -1; mark .* `unknown` .*"),
        ("size", called(labels=torch.ones(2, 4)), r"`labels` .* \(B=2, Q=3\), but got \(2, 4\)"),
        ("integers", called(TypeError, uncertainty=torch.ones(2, 3).int()), "`uncertainty` .*"),
        ("numbers", called(TypeError, unknown=torch.ones(2, 3)), "`unknown` to have a bool .*"),
        ("place", called(uncertainty=torch.ones(2, 3, device="meta")), ".* on cpu, but got meta"),
    ]
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_refuses(case):
    refused(case, AccuracyUncertaintyLoss())
