"""Temperature, histogram, isotonic and beta calibration, against scikit-learn and loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from torch.autograd import gradcheck

from support import HALF, Bad, all_close, close, poisoned, record_validate_args, refused
from uncertainty_mm import (
    BetaCalibration,
    ConformalRiskControl,
    HistogramBinning,
    IsotonicCalibration,
    TemperatureScaling,
)

LABELS = 3
KINDS = {
    "temperature": lambda **kwargs: TemperatureScaling(LABELS, **kwargs),
    "temperatures": lambda **kwargs: TemperatureScaling(LABELS, per_label=True, **kwargs),
    "mass": lambda **kwargs: HistogramBinning(LABELS, num_bins=4, **kwargs),
    "width": lambda **kwargs: HistogramBinning(LABELS, num_bins=4, binning="width", **kwargs),
    "isotonic": lambda **kwargs: IsotonicCalibration(LABELS, **kwargs),
    "beta": lambda **kwargs: BetaCalibration(LABELS, **kwargs),
    "conformal": lambda **kwargs: ConformalRiskControl(0.3, **kwargs),
}
PER_LABEL = [name for name in KINDS if name not in ("temperature", "conformal")]
MONOTONE = [name for name in KINDS if name not in ("mass", "width")]


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


def build(name, **kwargs):
    return KINDS[name](**kwargs).double()


def simulate(samples, name=""):
    """Probabilities, or logits for a temperature, that are too sure, and labels."""
    logits = torch.randn(samples, LABELS, dtype=torch.float64)
    labels = torch.bernoulli(logits.sigmoid())
    sure = 3 * logits
    return (sure if "temp" in name else sure.sigmoid()), labels


def same(left, right):
    left, right = left.state_dict(), right.state_dict()
    return all(torch.equal(left[key], right[key]) for key in left)


# ---------------------------------------------------------------------------------------- all of them


def test_nothing_changes_before_fit(name):
    x, _ = simulate(20, name)
    if name == "conformal":
        assert build(name)(x).all()
    else:
        close(build(name)(x), x)


def test_fit_with_unknown_samples_is_that_of_the_rest(name):
    x, labels = simulate(60, name)
    rows = torch.rand(60) < 0.5
    spoilt = poisoned(x, rows), poisoned(labels, rows, -1.0)
    fit = build(name).fit(*spoilt, rows.unsqueeze(1).expand(-1, LABELS))
    expected = build(name).fit(x[~rows], labels[~rows])
    all_close(fit.state_dict().values(), expected.state_dict().values(), torch.float64)


@pytest.mark.parametrize("name", PER_LABEL)
def test_fit_with_unknown_labels_is_that_of_the_label_alone(name):
    x, labels = simulate(60, name)
    unknown = torch.rand(60, LABELS) < torch.tensor([0.0, 0.5, 1.0])
    fit = build(name).fit(poisoned(x, unknown), poisoned(labels, unknown, math.nan), unknown)
    for q in range(LABELS - 1):
        rows = ~unknown[:, q]
        alone = build(name).fit(x[rows], labels[rows])
        close(fit(x)[:, q], alone(x)[:, q])
    close(fit(x)[:, -1], x[:, -1])  # nothing is known of the last label


def test_fit_leaves_out_what_is_not_finite_where_values_are_not_looked_at(name):
    x, labels = simulate(40, name)
    bad = torch.rand(40, LABELS) < 0.2
    fit = build(name, validate_args=False).fit(poisoned(x, bad), 0.1 + 0.8 * labels)
    assert same(fit, build(name).fit(x, labels, bad))


def test_fit_starts_afresh_and_returns_itself(name):
    batch = simulate(50, name)
    module = build(name).fit(*simulate(50, name))
    assert module.fit(*batch) is module
    assert same(module, build(name).fit(*batch))


def test_default_device_does_not_matter(name):
    module, (x, labels) = build(name), simulate(50, name)
    expected = build(name).fit(x, labels)
    try:
        torch.set_default_device("meta")
        module.fit(x, labels)
        found = module(x)
    finally:
        torch.set_default_device(None)
    assert same(module, expected)
    assert torch.equal(found, expected(x))


@pytest.mark.parametrize("name", MONOTONE)
@given(seed=st.integers(0, 2**16), samples=st.integers(1, 40))
def test_order_of_the_samples_stays(name, seed, samples):
    torch.manual_seed(seed)
    x, labels = simulate(samples, name)
    found = build(name).fit(x, labels)(torch.linspace(0, 1, 50).double().repeat(LABELS, 1).T)
    assert (found.double().diff(dim=0) >= 0).all()


@pytest.mark.parametrize("present", [0.0, 1.0])
@pytest.mark.parametrize("samples", [1, 30])
def test_labels_of_one_kind_leave_all_as_it_is_or_give_their_frequency(name, samples, present):
    x, labels = simulate(samples, name)
    found = build(name).fit(x, torch.full_like(labels, present))(x)
    if name in ("mass", "width", "isotonic"):
        assert (found == present).all()
    elif name != "conformal":
        close(found, x)


def test_separated_labels_stay_finite(name):
    x, _ = simulate(200, name)
    module = build(name).fit(x, x > (0 if "temp" in name else 0.5))
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert module(x).isfinite().all()


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_dtypes(name, dtype):
    x, labels = simulate(100, name)
    module = KINDS[name]().to(dtype).fit(x.to(dtype), labels)
    found = module(x.to(dtype))
    assert found.dtype == (torch.bool if name == "conformal" else torch.float32)
    assert found.isfinite().all()


@pytest.mark.parametrize("name", [name for name in KINDS if "temp" not in name])
def test_ends_of_the_range_are_finite(name):
    x, labels = simulate(100)
    ends = torch.tensor([[0.0], [1.0]]).expand(2, LABELS).double().requires_grad_()
    found = build(name).fit(x.round(), labels)(ends)
    assert found.isfinite().all()
    if found.requires_grad:
        assert torch.autograd.grad(found.sum(), ends)[0].isfinite().all()


@pytest.mark.parametrize("name", ["temperatures", "isotonic", "beta"])
def test_gradients_pass_through(name):
    module = build(name).fit(*simulate(50, name))
    assert gradcheck(module, simulate(4, name)[0].requires_grad_())


@pytest.mark.parametrize("name", ["mass", "isotonic"])
def test_state_of_another_size_is_refused_whole(name):
    module = build(name).fit(*simulate(50))
    other = (
        HistogramBinning(3, num_bins=7) if name == "mass" else IsotonicCalibration(3, max_knots=9)
    )
    before = build(name).fit(*simulate(50))
    before.load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match="to have shape"):
        module.load_state_dict(other.state_dict())
    assert same(module, before)


@pytest.mark.parametrize("settings", [{}, {"validate_args": False}, {"validate_args": True}])
def test_validate_args_is_passed_on(name, monkeypatch, settings):
    passed = record_validate_args(monkeypatch)
    build(name, **settings)(simulate(4, name)[0])
    assert passed == [settings.get("validate_args")]


@pytest.mark.parametrize("name", ["temperature", "mass", "isotonic", "beta"])
def test_overconfident_predictions_become_calibrated(name):
    module = build(name).fit(*simulate(20_000, name))
    x, labels = simulate(20_000, name)
    found = module(x).sigmoid() if name == "temperature" else module(x)
    before = x.sigmoid() if name == "temperature" else x
    briers = [(p - labels).square().mean() for p in (found, before)]
    assert briers[0] < 0.95 * briers[1]
    for low, high in ((0.0, 0.3), (0.3, 0.6), (0.6, 1.0)):
        inside = (found >= low) & (found <= high)
        assert abs(float((found - labels)[inside].mean())) < 0.03


# ---------------------------------------------------------------------------------------- temperature


@pytest.mark.parametrize("per_label", [False, True])
@pytest.mark.parametrize("size", [0.1, 1.0, 20.0])
def test_temperature_is_that_of_the_likeliest_labels(size, per_label):
    x, labels = simulate(300, "temperature")
    temperature = (
        TemperatureScaling(LABELS, per_label=per_label).double().fit(size * x, labels).temperature
    )

    def loss(temperature):
        each = F.binary_cross_entropy_with_logits(size * x / temperature, labels, reduction="none")
        return each.sum(0) if per_label else each.sum()

    for factor in (0.999, 1.001):
        assert (loss(temperature) < loss(factor * temperature)).all()


def test_temperature_of_the_labels_is_bounded():
    logits = torch.randn(40, 1).double()
    assert TemperatureScaling(1).fit(logits, logits > 0).temperature == pytest.approx(0.01)
    assert TemperatureScaling(1).fit(logits, logits < 0).temperature == pytest.approx(100)
    assert TemperatureScaling(1).fit(0 * logits, logits < 0).temperature == 1


# ------------------------------------------------------------------------------------------ histogram


def test_width_bins_are_loops_over_the_samples():
    x, labels = simulate(200)
    module = build("width").fit(x, labels)
    for q in range(LABELS):
        for low in (0.0, 0.25, 0.5, 0.75):
            inside = (x[:, q] >= low) & (x[:, q] < low + 0.25)
            found = module(x)[inside, q]
            close(found, labels[inside, q].mean().expand_as(found))


@given(seed=st.integers(0, 2**16), samples=st.integers(4, 60))
def test_mass_bins_hold_equally_many_samples(seed, samples):
    torch.manual_seed(seed)
    x = torch.rand(samples, LABELS).double()
    module = build("mass").fit(x, torch.randint(2, (samples, LABELS)))
    for q in range(LABELS):
        sizes = (x[:, q : q + 1] >= module.edges[q]).sum(1).bincount(minlength=4)
        assert sizes.max() - sizes.min() <= 1


def test_bins_without_samples_change_nothing():
    module = build("width").fit(torch.full((5, LABELS), 0.6), torch.ones(5, LABELS))
    x = torch.tensor([[0.1], [0.5], [0.6], [0.8], [1.0]], dtype=torch.float64)
    x = x.expand(5, LABELS)
    close(module(x)[:, 0], [0.1, 1.0, 1.0, 0.8, 1.0])


# ------------------------------------------------------------------------------------------- isotonic


@given(seed=st.integers(0, 2**16), samples=st.integers(1, 60), ties=st.booleans())
def test_isotonic_is_that_of_scikit_learn(seed, samples, ties):
    torch.manual_seed(seed)
    x, labels = simulate(samples)
    x = (10 * x).round() / 10 if ties else x
    new = torch.cat([x, torch.rand(50, LABELS).double()])
    found = build("isotonic").fit(x, labels)(new)
    for q in range(LABELS):
        reference = IsotonicRegression(out_of_bounds="clip").fit(x[:, q].numpy(), labels[:, q])
        close(found[:, q], torch.from_numpy(reference.predict(new[:, q].numpy())))


def test_isotonic_of_many_samples_has_few_knots():
    x, labels = simulate(20_000)
    module = build("isotonic").fit(x, labels)
    assert (module.knots < module.knots[:, -1:]).sum(1).max() < 200
    reference = IsotonicRegression(out_of_bounds="clip").fit(x[:, 0].numpy(), labels[:, 0])
    close(module(x)[:, 0], torch.from_numpy(reference.predict(x[:, 0].numpy())))


def test_isotonic_with_too_few_knots_is_near_and_never_falls():
    x, labels = simulate(5000)
    whole = build("isotonic").fit(x, labels)
    few = IsotonicCalibration(LABELS, max_knots=12).double().fit(x, labels)
    assert (few.levels.diff(dim=1) >= 0).all()
    assert (few(x) - whole(x)).abs().mean() < 0.05


# ----------------------------------------------------------------------------------------------- beta


def features(x):
    return torch.stack([x.log(), -(1 - x).log()], 1).numpy()


def test_beta_is_the_logistic_regression_on_both_logarithms():
    x, labels = simulate(2000)
    module = build("beta").fit(x, labels)
    for q in range(LABELS):
        reference = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000)
        reference.fit(features(x[:, q]), labels[:, q].numpy())
        found = torch.stack([module.a, module.b, module.c])[:, q]
        wanted = torch.tensor([*reference.coef_[0], reference.intercept_[0]])
        assert (wanted[:2] > 0).all()
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@given(seed=st.integers(0, 2**16), samples=st.integers(2, 30))
def test_beta_is_the_best_of_all_that_rise(seed, samples):
    """The gradient is 0 along what is free, and does not fall along what is 0."""
    torch.manual_seed(seed)
    x, labels = simulate(samples)
    labels[0], labels[1] = 0, 1
    module = build("beta").fit(x, labels)
    theta = torch.stack([module.a, module.b, module.c]).requires_grad_()
    z = theta[0] * x.log() - theta[1] * (1 - x).log() + theta[2]
    loss = F.binary_cross_entropy_with_logits(z, labels, reduction="sum")
    ridge = 5e-7 * (theta - torch.tensor([[1.0], [1.0], [0.0]])).square().sum()
    (grad,) = torch.autograd.grad(loss + ridge, theta)
    assert (theta[:2] >= 0).all()
    assert (grad.abs()[theta != 0] < 1e-5).all()
    assert (grad[:2][theta[:2] == 0] > -1e-5).all()


def test_beta_recovers_what_the_labels_were_drawn_from():
    x = torch.rand(100_000, 1).double()
    labels = torch.bernoulli((0.5 * x.log() - 2 * (1 - x).log() + 0.3).sigmoid())
    module = BetaCalibration(1).double().fit(x, labels)
    for found, wanted in ((module.a, 0.5), (module.b, 2), (module.c, 0.3)):
        assert found.item() == pytest.approx(wanted, abs=0.1)


# ----------------------------------------------------------------------------------------- bad inputs

ONES = torch.ones(4, LABELS)
META = torch.zeros(4, LABELS, device="meta")


def bad(name, call, message, error=ValueError):
    return Bad(name, call, error, f"^Expected {message}$")


BAD = [
    bad("nobody", lambda _: BetaCalibration(0), "`num_labels` .*, but got 0"),
    bad("temperature: 1.5", lambda _: TemperatureScaling(1.5), "`num_labels` .* 1.5", TypeError),
    bad(
        "temperature: per_label",
        lambda _: TemperatureScaling(3, per_label=1),
        "`per_label` to be True or False, but got 1",
        TypeError,
    ),
    bad("histogram: bins", lambda _: HistogramBinning(3, num_bins=0), "`num_bins` .* got 0"),
    bad("histogram: name", lambda _: HistogramBinning(3, binning="log"), "`binning` .* got 'log'"),
    bad("isotonic: knots", lambda _: IsotonicCalibration(3, max_knots=1), "`max_knots` .* got 1"),
    bad("isotonic: check", lambda _: IsotonicCalibration(3, validate_args=0), ".*", TypeError),
    bad("logits", lambda c: c(3 * ONES), r"`probs` to be in \[0, 1\], but got 3.0"),
    bad("nan", lambda c: c(ONES * math.nan), r"`probs` to be in \[0, 1\], but got nan"),
    bad("shape", lambda c: c(ONES[:, :2]), r"`probs` to have shape .*Q=3\), but got \(4, 2\)"),
    bad("integers", lambda c: c(ONES.long()), "`probs` .*, but got torch.int64", TypeError),
    bad("elsewhere", lambda c: c(META), "`probs` to be on cpu, but got meta"),
    bad("fit: logits", lambda c: c.fit(-ONES, ONES), r"`probs` to be in \[0, 1\], but got -1.0"),
    bad("fit: soft", lambda c: c.fit(ONES, ONES / 2), "`labels` to hold only 0 and 1, .* 0.5"),
    bad("fit: batch", lambda c: c.fit(ONES, ONES[:2]), "`labels` to have shape .*"),
    bad(
        "fit: none", lambda c: c.fit(ONES[:0], ONES[:0]), "`probs` to hold at least one sample, .*"
    ),
    bad("fit: unknown", lambda c: c.fit(ONES, ONES, ONES.bool()), "`unknown` to leave .*"),
    bad("fit: floats", lambda c: c.fit(ONES, ONES, ONES), "`unknown` to have a bool .*", TypeError),
]


@pytest.mark.parametrize("name", ["mass", "isotonic", "beta"])
@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_refuses_and_stays_as_it_was(case, name):
    module = build(name).fit(*simulate(20))
    refused(case, module, type(module).state_dict)
