"""PlattScaling, against simulated classifiers, scikit-learn and its own optimality conditions."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch.autograd import gradcheck

from support import HALF, close, gradient
from uncertainty_mm import PlattScaling

LABELS = 3
SCALE = torch.tensor([0.3, 1.0, 2.5]).double()
SHIFT = torch.tensor([-1.0, 0.0, 0.7]).double()


def build(num_labels=LABELS, **kwargs):
    return PlattScaling(num_labels, **kwargs).double()


def simulate(samples, scale=SCALE, shift=SHIFT):
    """Logits, and labels drawn from sigmoid(scale * logits + shift)."""
    logits = 2 * torch.randn(samples, LABELS, dtype=torch.float64)
    return logits, torch.bernoulli((scale * logits + shift).sigmoid())


def objective(logits, labels, log_scale, shift, precision):
    """What the docstring of `fit` says, summed over the labels."""
    calibrated = log_scale.exp() * logits + shift
    loss = F.binary_cross_entropy_with_logits(calibrated, labels, reduction="sum")
    return loss + precision * (log_scale.square() + shift.square()).sum() / 2


def expected_calibration_error(logits, labels, bins=10):
    probs = logits.sigmoid().flatten()
    index = (probs * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins).double().index_add_(0, index, probs - labels.flatten())
    return gaps.abs().sum().item() / probs.numel()


# ------------------------------------------------------------------------------------------ forward


def test_nothing_changes_before_fit():
    logits = torch.randn(4, LABELS)
    assert torch.equal(PlattScaling(LABELS)(logits), logits)


def test_forward_is_affine_in_each_label():
    module, (logits, labels) = build(), simulate(50)
    module.fit(logits, labels)
    for q, (scale, shift) in enumerate(
        zip(module.scale.tolist(), module.shift.tolist(), strict=True)
    ):
        close(module(logits)[:, q], [scale * x + shift for x in logits[:, q].tolist()])


def test_gradients_pass_through():
    module = build().fit(*simulate(50))
    assert gradcheck(module, torch.randn(4, LABELS, dtype=torch.float64, requires_grad=True))


def test_there_is_nothing_to_optimize_and_everything_to_save():
    module = PlattScaling(LABELS).fit(*simulate(50))
    assert not list(module.parameters())
    assert set(module.state_dict()) == {"scale", "shift"}
    twin = PlattScaling(LABELS)
    twin.load_state_dict(module.state_dict())
    logits = torch.randn(4, LABELS)
    assert torch.equal(twin(logits), module(logits))


@given(seed=st.integers(0, 2**16))
def test_order_of_the_samples_stays(seed):
    torch.manual_seed(seed)
    logits, labels = torch.randn(8, LABELS), torch.randint(2, (8, LABELS))
    module = PlattScaling(LABELS).fit(logits, labels)
    assert (module.scale > 0).all()
    assert torch.equal(module(logits).argsort(0), logits.argsort(0))


# ---------------------------------------------------------------------------------------------- fit


def test_recovers_what_the_labels_were_drawn_from():
    module = build().fit(*simulate(200_000))
    torch.testing.assert_close(module.scale, SCALE, rtol=0.03, atol=0)
    torch.testing.assert_close(module.shift, SHIFT, rtol=0, atol=0.03)


def test_is_logistic_regression_where_the_prior_does_not_count():
    logits, labels = simulate(200_000)
    module = build().fit(logits, labels)
    for q in range(LABELS):
        reference = LogisticRegression(C=1e12, tol=1e-10)
        reference.fit(logits[:, q : q + 1].numpy(), labels[:, q].numpy())
        assert module.scale[q].item() == pytest.approx(reference.coef_[0, 0], abs=5e-3)
        assert module.shift[q].item() == pytest.approx(reference.intercept_[0], abs=5e-3)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("samples", [1, 5, 500])
def test_gradient_of_both_objectives_is_zero_at_the_fit(samples, size):
    logits, labels = simulate(samples)
    shared = build(per_label=False).fit(size * logits, labels)
    own = build().fit(size * logits, labels)
    # the pairs of the labels, as they act on logits that the shared pair has calibrated
    log_scale = own.scale.log() - shared.scale.log()
    stages = (
        (size * logits, shared.scale[:1].log(), shared.shift[:1], 1.0),
        (shared(size * logits), log_scale, own.shift - log_scale.exp() * shared.shift, 20.0),
    )
    for x, *pair, precision in stages:
        pair = [value.clone().requires_grad_() for value in pair]
        for grad in gradient(objective(x, labels, *pair, precision), *pair):
            assert grad.abs().max() < 1e-6 * samples


@given(seed=st.integers(0, 2**16), size=st.floats(1e-3, 1e5), samples=st.integers(1, 9))
def test_likelihood_never_falls_from_logits_to_shared_to_own_pairs(seed, size, samples):
    torch.manual_seed(seed)
    logits = size * torch.randn(samples, LABELS, dtype=torch.float64)
    labels = torch.randint(2, (samples, LABELS)).double()
    for shift in (True, False):
        fits = [build(shift=shift, per_label=each).fit(logits, labels) for each in (False, True)]
        losses = [
            F.binary_cross_entropy_with_logits(z, labels, reduction="sum")
            for z in (logits, *(module(logits) for module in fits))
        ]
        for before, after in pairwise(losses):
            assert after <= before * (1 + 1e-10) + 1e-10


def test_few_samples_share_one_pair_and_many_have_their_own():
    few, many = simulate(5), simulate(20_000)
    apart = []
    for batch in (few, many):
        shared, own = build(per_label=False).fit(*batch), build().fit(*batch)
        apart.append(float((own.scale.log() - shared.scale.log()).abs().max()))
        truth = (SCALE.log() - shared.scale.log()).abs().max()
    assert apart[0] < 0.2 < 0.9 * truth < apart[1]


@pytest.mark.parametrize("present", [0.0, 1.0])
def test_one_sided_labels_stay_finite_and_near_the_identity(present):
    few, many = (torch.linspace(-1, 1, n).unsqueeze(1).expand(n, LABELS) for n in (3, 3000))
    module = build().fit(few, torch.full_like(few, present))
    assert (module.scale.log().abs() < 0.7).all()
    assert (module.shift.abs() < 2).all()
    assert ((module.shift > 0) == bool(present)).all()
    module.fit(many, torch.full_like(many, present))
    assert (module.scale.log().abs() < 5).all()
    assert (module.shift.abs() < 10).all()


def test_separable_labels_do_not_diverge():
    logits, _ = simulate(1000)
    module = build().fit(logits, (logits > 0).double())
    assert ((module.scale > 1) & (module.scale < 1000)).all()


def test_reversed_logits_are_flattened_not_turned_around():
    logits, labels = simulate(1000, scale=-SCALE)
    module = build().fit(logits, labels)
    assert ((module.scale > 0) & (module.scale < 0.2)).all()


def test_without_shift_it_is_a_temperature():
    logits, labels = simulate(100_000, shift=0)
    module = build(shift=False).fit(logits, labels)
    assert (module.shift == 0).all()
    torch.testing.assert_close(module.scale, SCALE, rtol=0.03, atol=0)


def test_order_of_the_labels_does_not_count():
    logits, labels = simulate(50)
    module, twin = build().fit(logits, labels), build().fit(logits.flip(1), labels.flip(1))
    close(twin.scale.flip(0), module.scale)
    close(twin.shift.flip(0), module.shift)


def test_shared_pair_is_that_of_all_labels_in_one_column():
    logits, labels = simulate(50)
    module = build(per_label=False).fit(logits, labels)
    columns = logits.reshape(-1, 1), labels.reshape(-1, 1)
    single = build(1, per_label=False).fit(*columns)
    close(module.scale, single.scale.expand(LABELS))
    close(module.shift, single.shift.expand(LABELS))


def test_order_of_the_samples_does_not_count_for_the_fit():
    logits, labels = simulate(50)
    order = torch.randperm(50)
    module, twin = build().fit(logits, labels), build().fit(logits[order], labels[order])
    close(twin.scale, module.scale)
    close(twin.shift, module.shift)


def test_fit_starts_afresh():
    batch = simulate(50)
    module, twin = build().fit(*simulate(50)).fit(*batch), build().fit(*batch)
    assert torch.equal(module.scale, twin.scale)
    assert torch.equal(module.shift, twin.shift)


def test_overconfident_logits_become_calibrated():
    logits, labels = simulate(20_000, scale=0.2)
    held_out, truth = simulate(20_000, scale=0.2)
    module = build().fit(logits, labels)
    assert expected_calibration_error(held_out, truth) > 0.1
    assert expected_calibration_error(module(held_out), truth) < 0.02


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", HALF)
def test_large_logits_in_half_precision_are_finite(dtype):
    logits = 1e4 * torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]], dtype=dtype)
    module = PlattScaling(LABELS).to(dtype).fit(logits, torch.tensor([[1, 1, 0], [0, 0, 1]]))
    out = module(logits)
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    assert (module.scale > 0).all()


def test_scale_stays_above_zero_in_the_dtype_of_the_module():
    logits = torch.tensor([[1e30], [-1e30]])
    module = PlattScaling(1).half().fit(logits, torch.tensor([[False], [True]]))
    assert module.scale > 0


# --------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"num_labels": 0}, ValueError, "num_labels"),
        ({"num_labels": 2.0}, TypeError, "num_labels"),
        ({"per_label": 1}, TypeError, "per_label"),
        ({"shift": None}, TypeError, "shift"),
    ],
)
def test_constructor_rejects(change, error, name):
    with pytest.raises(error, match=f"`{name}"):
        PlattScaling(**({"num_labels": 3} | change))


BAD_LOGITS = [
    (torch.randn(4, LABELS + 1), ValueError),
    (torch.randn(LABELS), ValueError),
    (torch.ones(4, LABELS, dtype=torch.long), TypeError),
    (torch.full((4, LABELS), math.nan), ValueError),
    (torch.full((4, LABELS), math.inf), ValueError),
]


@pytest.mark.parametrize(("logits", "error"), BAD_LOGITS)
def test_forward_rejects_logits(logits, error):
    with pytest.raises(error, match="`logits`"):
        PlattScaling(LABELS)(logits)


@pytest.mark.parametrize(("logits", "error"), [*BAD_LOGITS, (torch.randn(0, LABELS), ValueError)])
def test_fit_rejects_logits(logits, error):
    with pytest.raises(error, match="`logits`"):
        PlattScaling(LABELS).fit(logits, torch.ones(logits.shape[0], LABELS))


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (torch.ones(5, LABELS), ValueError),
        (torch.ones(4, LABELS + 1), ValueError),
        (torch.ones(4, LABELS, dtype=torch.complex64), TypeError),
        (torch.full((4, LABELS), 0.5), ValueError),
        (torch.full((4, LABELS), math.nan), ValueError),
        (torch.full((4, LABELS), -1), ValueError),
    ],
)
def test_fit_rejects_labels_and_stays_as_it_was(labels, error):
    module = PlattScaling(LABELS)
    with pytest.raises(error, match="`labels`"):
        module.fit(torch.randn(4, LABELS), labels)
    assert (module.scale == 1).all()
    assert (module.shift == 0).all()
