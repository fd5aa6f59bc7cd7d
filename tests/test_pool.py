"""LogitPool, against the objective of its docstring minimised by other means, and simulated experts."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from support import HALF, Bad, close, no_default_device, poisoned, record_validate_args, refused
from uncertainty_mm import LogitPool, PlattScaling

EXPERTS, LABELS = 3, 4
NOISE = torch.tensor([0.3, 1.0, 3.0]).double().unsqueeze(1)


def build(num_experts=EXPERTS, **kwargs):
    return LogitPool(num_experts, LABELS, **kwargs).double()


def simulate(samples, size=1.0):
    """Logits of experts that see the truth through more and more noise, and labels."""
    truth = torch.randn(samples, LABELS, dtype=torch.float64)
    noise = NOISE * torch.randn(samples, EXPERTS, LABELS, dtype=torch.float64)
    return size * (truth.unsqueeze(1) + noise), torch.bernoulli(truth.sigmoid())


def plain_weight(logits, labels, known=1.0):
    """The weights at the minimum of what the docstring of `fit` says, by LBFGS and then Newton with autograd."""
    sizes = [logits.shape[1], 1, LABELS]

    def objective(parameters):
        a, log_scale, shift = parameters.split(sizes)
        z = log_scale.exp() * (a.softmax(0).unsqueeze(1) * logits).sum(1) + shift
        loss = F.binary_cross_entropy_with_logits(z, labels, reduction="none") * known
        prior = a.square().sum() + log_scale.square().sum() + 20 * shift.square().sum()
        return loss.sum() + prior / 2

    def closure():
        parameters.grad = None
        loss = objective(parameters)
        loss.backward()
        return loss

    parameters = torch.zeros(sum(sizes), dtype=torch.float64, requires_grad=True)
    torch.optim.LBFGS([parameters], max_iter=1000, line_search_fn="strong_wolfe").step(closure)
    parameters = parameters.detach()
    for _ in range(5):
        hessian = torch.autograd.functional.hessian(objective, parameters)
        gradient = torch.autograd.functional.jacobian(objective, parameters)
        parameters -= torch.linalg.solve(hessian, gradient)
    return parameters[: sizes[0]].softmax(0)


# ------------------------------------------------------------------------------------------ forward


def test_weights_are_equal_before_fit():
    logits = simulate(5)[0].float()
    close(LogitPool(EXPERTS, LABELS)(logits), logits.mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_one_expert_is_the_identity(dtype):
    logits, labels = simulate(50)
    logits = logits[:, :1].to(dtype)
    for module in (build(1).to(dtype), build(1).to(dtype).fit(logits, labels)):
        pooled = module(logits)
        assert pooled.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(pooled, logits.squeeze(1).to(pooled.dtype))


# ---------------------------------------------------------------------------------------------- fit


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("samples", [1, 5, 200])
def test_fit_is_the_minimum_of_the_docstring(samples, size):
    logits, labels = simulate(samples, size)
    torch.testing.assert_close(
        build().fit(logits, labels).weight, plain_weight(logits, labels), rtol=0, atol=1e-8
    )


def test_recovers_what_the_labels_were_drawn_from():
    logits = torch.randn(50_000, EXPERTS, LABELS, dtype=torch.float64)
    weight = torch.tensor([0.6, 0.3, 0.1]).double()
    pooled = (weight.unsqueeze(1) * logits).sum(1)
    labels = torch.bernoulli((3 * pooled + torch.linspace(-1, 1, LABELS)).sigmoid())
    torch.testing.assert_close(build().fit(logits, labels).weight, weight, rtol=0, atol=0.01)


def test_few_samples_leave_the_weights_near_equal_and_many_do_not():
    few, some, many = (build().fit(*simulate(samples)).weight for samples in (1, 20, 20_000))
    assert few.max() < some.max() < many.max()
    assert few.max() < 0.6
    assert many.max() > 0.9
    assert many.argsort().tolist() == [2, 1, 0]


def test_pool_predicts_better_than_any_expert_and_than_equal_weights():
    (logits, labels), (held_out, truth) = simulate(500), simulate(5000)
    module = build().fit(logits, labels)
    sources = [*logits.unbind(1), logits.mean(1), module(logits)]
    targets = [*held_out.unbind(1), held_out.mean(1), module(held_out)]
    losses = [
        F.binary_cross_entropy_with_logits(PlattScaling(LABELS).fit(x, labels)(z), truth).item()
        for x, z in zip(sources, targets, strict=True)
    ]
    assert min(losses) == losses[-1]


def test_equal_experts_have_equal_weights():
    logits, labels = simulate(100, 1e4)
    pair = logits[:, [0, 1, 0]]
    weight = build().fit(pair, labels).weight
    close(weight[0], weight[2])
    close(build().fit(logits[:, :1].expand(-1, EXPERTS, -1), labels).weight, [1 / 3] * 3)


def test_order_does_not_count():
    logits, labels = simulate(50)
    rows, weight = torch.randperm(50), build().fit(logits, labels).weight
    close(build().fit(logits[rows], labels[rows]).weight, weight)
    close(build().fit(logits.flip(2), labels.flip(1)).weight, weight)
    close(build().fit(logits.flip(1), labels).weight.flip(0), weight)


def test_base_rates_do_not_count():
    """An expert is not trusted for a shift that Platt scaling gives to all."""
    logits, labels = simulate(2000)
    labels[:, 0] = torch.bernoulli(torch.full((2000,), 0.9).double())
    logits[:, :, 0] = 0
    weight = build().fit(logits, labels).weight
    logits[:, 2, 0] = 3
    torch.testing.assert_close(build().fit(logits, labels).weight, weight, rtol=0, atol=0.03)


@given(seed=st.integers(0, 2**16), size=st.floats(1e-3, 1e4), samples=st.integers(1, 9))
@example(seed=1, size=1e30, samples=2)
def test_weights_are_on_the_simplex_whatever_the_logits(seed, size, samples):
    torch.manual_seed(seed)
    logits, labels = simulate(samples, size)
    logits[:, 0] /= size  # among large ones, too
    for y in (labels, torch.ones_like(labels)):
        weight = build().fit(logits, y).weight
        assert (weight >= 0).all()
        close(weight.sum(), 1.0)


def test_fit_starts_afresh_and_returns_itself():
    batch = simulate(50)
    module = build().fit(*simulate(50))
    assert module.fit(*batch) is module
    assert torch.equal(module.weight, build().fit(*batch).weight)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_large_logits_in_half_precision(dtype):
    logits, labels = simulate(50)
    logits = (logits * 1e4).clamp(-6e4, 6e4).to(dtype)
    module = LogitPool(EXPERTS, LABELS).to(dtype).fit(logits, labels)
    close(module.weight, build().fit(logits.double(), labels).weight)
    assert module(logits).isfinite().all()


# ------------------------------------------------------------------------------------- what is not known


def test_weights_rounded_to_half_precision_still_sum_to_one():
    pool = LogitPool(3, 1).bfloat16()  # 1/3 is 0.334 there
    close(pool(torch.full((2, 3, 1), 30.0)), [[30.0], [30.0]])


@pytest.mark.parametrize("wrong", [math.nan, -1.0])
def test_fit_with_unknown_samples_is_that_of_the_rest(wrong):
    logits, labels = simulate(60)
    rows = torch.rand(60) < 0.5
    spoilt = poisoned(logits, rows), poisoned(labels, rows, wrong)
    fit = build().fit(*spoilt, rows.unsqueeze(1).expand(-1, LABELS))
    close(fit.weight, build().fit(logits[~rows], labels[~rows]).weight)


def test_fit_with_unknown_labels_is_that_of_the_known():
    logits, labels = simulate(60)
    unknown = torch.rand(60, LABELS) < torch.tensor([0.0, 0.3, 0.7, 1.0])
    spoilt = logits.masked_fill(unknown.unsqueeze(1), math.nan), poisoned(labels, unknown)
    fit = build().fit(*spoilt, unknown)
    close(fit.weight, plain_weight(logits, labels, (~unknown).double()))


def test_fit_leaves_out_what_one_expert_does_not_know_where_values_are_not_looked_at():
    logits, labels = simulate(40)
    bad = torch.rand(40, EXPERTS, LABELS) < 0.1
    fit = build(validate_args=False).fit(poisoned(logits, bad, math.inf), 0.1 + 0.8 * labels)
    assert torch.equal(fit.weight, build().fit(logits, labels, bad.any(1)).weight)


# ----------------------------------------------------------------------------------- devices, bad input


def test_default_device_does_not_matter():
    module, batch = build(), simulate(50)
    expected = build().fit(*batch)
    try:
        torch.set_default_device("meta")
        found = module.fit(*batch)(batch[0])
    finally:
        no_default_device()
    assert torch.equal(found, expected(batch[0]))


def test_values_are_looked_at_as_told(monkeypatch):
    passed = record_validate_args(monkeypatch)
    build(validate_args=False)(simulate(2)[0])
    assert False in passed


LOGITS, ONES = torch.ones(5, EXPERTS, LABELS), torch.ones(5, LABELS)
META = LOGITS.to("meta")
SHAPE = r"to have shape \(B(=5)?, (E=3, )?Q=4\), but got"


def bad(name, call, message, error=ValueError):
    return Bad(name, call, error, f"^Expected {message}$")


def fit(logits=LOGITS, labels=ONES, unknown=None):
    return lambda module: module.fit(logits, labels, unknown)


BAD = [
    bad("no expert", lambda _: LogitPool(0, 1), "`num_experts` .*, but got 0"),
    bad("half", lambda _: LogitPool(1, 0.5), "`num_labels` .*, but got 0.5", TypeError),
    bad("check 0", lambda _: LogitPool(1, 1, validate_args=0), "`validate_args` .* 0", TypeError),
    bad("one prediction", lambda c: c(ONES), rf"`logits` {SHAPE} \(5, 4\)"),
    bad("experts first", lambda c: c(LOGITS.mT), rf"`logits` {SHAPE} \(5, 4, 3\)"),
    bad("infinite", lambda c: c(LOGITS / 0), "`logits` to be finite, but got 60 NaN .*"),
    bad("integers", lambda c: c(LOGITS.long()), "`logits` .*, but got torch.int64", TypeError),
    bad("elsewhere", lambda c: c(META), "`logits` to be on cpu, but got meta"),
    bad("fit: one prediction", fit(ONES), rf"`logits` {SHAPE} \(5, 4\)"),
    bad("fit: nan", fit(LOGITS * math.nan), "`logits` to be finite, but got 60 NaN .*"),
    bad("fit: no sample", fit(LOGITS[:0], ONES[:0]), "`logits` to hold .* one sample, .* none"),
    bad("fit: nothing known", fit(unknown=ONES.bool()), "`unknown` to leave at least one .*"),
    bad("fit: other batch", fit(labels=ONES[:2]), rf"`labels` {SHAPE} \(2, 4\)"),
    bad("fit: soft", fit(labels=0.5 * ONES), "`labels` to hold only 0 and 1, but got 0.5"),
    bad("fit: elsewhere", fit(labels=META[:, 0]), "`labels` to be on cpu, but got meta"),
    bad("fit: of experts", fit(unknown=LOGITS.bool()), rf"`unknown` {SHAPE} \(5, 3, 4\)"),
    bad("fit: unknown numbers", fit(unknown=ONES), "`unknown` to have a bool dtype, .*", TypeError),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_refuses_and_stays_as_it_was(case):
    refused(case, build().float().fit(*simulate(20)), LogitPool.state_dict)


def test_samples_of_a_group_count_as_one():
    logits, labels = simulate(30)
    times, alone = torch.randint(1, 6, (30,)), torch.arange(30)
    repeated = [x.repeat_interleave(times, 0) for x in (logits, labels)]
    many = build().fit(*repeated, groups=alone.repeat_interleave(times))
    close(many.weight, build().fit(logits, labels).weight)
