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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import HALF, Bad, close, gradient, no_default_device, poisoned, refused
from uncertainty_mm import PlattScaling
from uncertainty_mm.calibration import best_threshold, expected_threshold

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


# ------------------------------------------------------------------------------------- what is not known


@pytest.mark.parametrize("wrong", [math.nan, -1.0])
@pytest.mark.parametrize("settings", [{}, {"shift": False}, {"per_label": False}])
def test_fit_with_unknown_samples_is_that_of_the_rest(settings, wrong):
    logits, labels = simulate(60)
    rows = torch.rand(60) < 0.5
    spoilt = poisoned(logits, rows, math.nan), poisoned(labels, rows, wrong)
    fit = build(**settings).fit(*spoilt, rows.unsqueeze(1).expand(-1, LABELS))
    expected = build(**settings).fit(logits[~rows], labels[~rows])
    close(fit.scale, expected.scale)
    close(fit.shift, expected.shift)


def test_gradient_of_both_objectives_over_what_is_known_is_zero_at_the_fit():
    logits, labels = simulate(60)
    unknown = torch.rand(60, LABELS) < torch.tensor([0.0, 0.5, 1.0])
    batch = poisoned(logits, unknown), poisoned(labels, unknown), unknown
    shared, own = build(per_label=False).fit(*batch), build().fit(*batch)
    log_scale = own.scale.log() - shared.scale.log()
    shift = own.shift - log_scale.exp() * shared.shift
    pair = [shared.scale[:1].log().requires_grad_(), shared.shift[:1].clone().requires_grad_()]
    whole = objective(logits[~unknown], labels[~unknown], *pair, 1.0)
    assert all(grad.abs().max() < 1e-6 for grad in gradient(whole, *pair))
    for q in range(LABELS - 1):
        known = ~unknown[:, q]
        pair = [x[q].clone().requires_grad_() for x in (log_scale, shift)]
        value = objective(shared(logits)[known, q], labels[known, q], *pair, 20.0)
        assert all(grad.abs().max() < 1e-6 for grad in gradient(value, *pair))
    close(own.scale[-1], shared.scale[-1])  # nothing is known of the last label
    close(own.shift[-1], shared.shift[-1])


def test_fit_leaves_out_what_is_not_finite_where_values_are_not_looked_at():
    logits, labels = simulate(40)
    bad = torch.rand(40, LABELS) < 0.2
    fit = build(validate_args=False).fit(poisoned(logits, bad, math.inf), labels)
    expected = build().fit(logits, labels, bad)
    assert torch.equal(fit.scale, expected.scale)
    assert torch.equal(fit.shift, expected.shift)


# -------------------------------------------------------------------------------------------- state


def test_default_device_does_not_matter():
    module, (logits, labels) = build(), simulate(50)
    expected = build().fit(logits, labels)
    threshold = best_threshold(logits.sigmoid(), labels)
    try:
        torch.set_default_device("meta")
        module.fit(logits, labels)
        assert torch.equal(best_threshold(logits.sigmoid(), labels), threshold)
        assert expected_threshold(logits.sigmoid()).device == logits.device
    finally:
        no_default_device()
    assert torch.equal(module.scale, expected.scale)
    assert torch.equal(module.shift, expected.shift)


# --------------------------------------------------------------------------------------- thresholds


def grid_search(probs, labels, unknown, per_label=False):
    """Every threshold tried on every label, in whole numbers."""
    columns = range(probs.shape[1])
    found = []
    for group in [[q] for q in columns] if per_label else [list(columns)]:
        scores = []
        for threshold in torch.linspace(0.01, 0.99, 99).split(1):
            hits = wrong = missed = 0
            for q in group:
                known = ~unknown[:, q]
                predicted, present = probs[known, q] > threshold, labels[known, q] > 0.5
                hits += int((predicted & present).sum())
                wrong += int((predicted & ~present).sum())
                missed += int((~predicted & present).sum())
            scores.append(2 * hits / max(2 * hits + wrong + missed, 1))
        nobody = not any((labels[~unknown[:, q], q] > 0.5).any() for q in group)
        found.append(0.5 if nobody else 0.01 + 0.01 * scores.index(max(scores)))
    return torch.tensor(found)


@given(
    seed=st.integers(0, 2**16),
    samples=st.integers(0, 9),
    dtype=st.sampled_from([*HALF, torch.float32, torch.float64]),
    per_label=st.booleans(),
)
def test_best_threshold_is_the_first_best_of_the_grid(seed, samples, dtype, per_label):
    torch.manual_seed(seed)
    probs = torch.rand(samples, LABELS).to(dtype)
    labels, unknown = torch.randint(2, (samples, LABELS)), torch.rand(samples, LABELS) < 0.3
    labels[:, 0] = 0  # a label that nobody has
    expected = grid_search(probs, labels, unknown, per_label)
    dirty = poisoned(probs, unknown), labels.masked_fill(unknown, -1), unknown
    close(best_threshold(*dirty, per_label=per_label), expected)


def test_best_threshold_of_probabilities_on_the_grid_leaves_these_out():
    grid = torch.linspace(0.01, 0.99, 99).unsqueeze(1)
    labels = grid > 0.305
    close(best_threshold(grid, labels), [0.3])


def test_best_threshold_takes_little_memory():
    """A comparison with every threshold would take 99 numbers an entry."""
    probs, labels = torch.rand(1000, 20), torch.randint(2, (1000, 20))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(
                [largest, *(x.numel() for x in tree_leaves(result) if hasattr(x, "numel"))]
            )
            return result

    with Watch():
        best_threshold(probs, labels, per_label=True)
    assert largest <= 2 * probs.numel()


def test_best_threshold_leaves_out_nan_and_smooth_labels_are_cut_where_values_are_not_looked_at():
    probs, labels = torch.rand(50, LABELS), torch.randint(2, (50, LABELS))
    bad = torch.rand(50, LABELS) < 0.2
    actual = best_threshold(poisoned(probs, bad), 0.1 + 0.8 * labels, validate_args=False)
    assert torch.equal(actual, best_threshold(probs, labels, bad))


@given(seed=st.integers(0, 2**16), samples=st.integers(0, 9), per_label=st.booleans())
def test_expected_threshold_is_half_of_the_best_expected_f1(seed, samples, per_label):
    torch.manual_seed(seed)
    probs, unknown = torch.rand(samples, LABELS), torch.rand(samples, LABELS) < 0.3
    columns, found = range(LABELS), []
    for group in [[q] for q in columns] if per_label else [list(columns)]:
        known = [float(probs[i, q]) for q in group for i in range(samples) if not unknown[i, q]]
        scores = []
        for cut in known:  # who is at least as likely
            chosen = [p for p in known if p >= cut]
            scores.append(2 * sum(chosen) / (len(chosen) + sum(known)))
        found.append(max(scores) / 2 if scores else 0.5)
    close(expected_threshold(poisoned(probs, unknown), unknown, per_label=per_label), found)


@pytest.mark.parametrize("per_label", [False, True])
def test_expected_threshold_is_near_the_best_one_of_labels_drawn_from_the_probabilities(per_label):
    torch.manual_seed(0)
    probs = torch.rand(100_000, LABELS) ** torch.tensor([1.0, 2.0, 4.0])
    labels = (torch.rand_like(probs) < probs).int()
    expected = best_threshold(probs, labels, per_label=per_label)
    assert (expected_threshold(probs, per_label=per_label) - expected).abs().max() < 0.02


@pytest.mark.parametrize("threshold", [best_threshold, expected_threshold])
def test_threshold_without_labels(threshold):
    probs = torch.rand(4, 0)
    given = (probs, probs.long()) if threshold is best_threshold else (probs,)
    close(threshold(*given), [0.5])
    assert threshold(*given, per_label=True).shape == (0,)


def test_expected_threshold_of_nothing_and_of_zeros():
    close(expected_threshold(torch.rand(4, LABELS), torch.ones(4, LABELS).bool()), [0.5])
    probs = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    close(expected_threshold(probs, per_label=True), [0.5, 0.5])
    nan = torch.tensor([[math.nan, 0.8]])
    close(expected_threshold(nan, validate_args=False), expected_threshold(nan[:, 1:]))


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

ONES = torch.ones(4, LABELS)
META = torch.zeros(4, LABELS, device="meta")
SHAPE = r"to have shape \(B(=4)?, Q=3\), but got"


def bad(name, call, message, error=ValueError):
    return Bad(name, call, error, f"^Expected {message}$")


def fit(logits=ONES, labels=ONES, unknown=None):
    return lambda module: module.fit(logits, labels, unknown)


def cut(probs=ONES, labels=ONES, unknown=None, **settings):
    return lambda _: best_threshold(probs, labels, unknown, **settings)


def expect(probs=ONES, unknown=None, **settings):
    return lambda _: expected_threshold(probs, unknown, **settings)


BAD = [
    bad("expect: 2", expect(2 * ONES), r"`probs` .*, but got 2.0"),
    bad("expect: labels", expect(ONES.int()), "`probs` .*, but got torch.int32", TypeError),
    bad("expect: other", expect(unknown=ONES[:2].bool()), r"`unknown` .*, but got \(2, 3\)"),
    bad("expect: 1", expect(per_label=1), "`per_label` .* got 1", TypeError),
    bad("expect: check", expect(validate_args=0), "`validate_args` .* got 0", TypeError),
    bad("no label", lambda _: PlattScaling(0), "`num_labels` .*, but got 0"),
    bad("names", lambda _: PlattScaling(["a"]), r"`num_labels` .*, but got \['a'\]", TypeError),
    bad("per_label 1", lambda _: PlattScaling(3, per_label=1), "`per_label` .* got 1", TypeError),
    bad("shift None", lambda _: PlattScaling(3, shift=None), "`shift` .* got None", TypeError),
    bad("check 0", lambda _: PlattScaling(3, validate_args=0), "`validate_args` .* 0", TypeError),
    bad("logits of one", lambda c: c(ONES[0]), rf"`logits` {SHAPE} \(3,\)"),
    bad("other labels", lambda c: c(ONES[:, :2]), rf"`logits` {SHAPE} \(4, 2\)"),
    bad("infinite", lambda c: c(ONES / 0), "`logits` to be finite, but got 12 NaN .*"),
    bad("nan", lambda c: c(ONES * math.nan), "`logits` to be finite, but got 12 NaN .*"),
    bad("integers", lambda c: c(ONES.long()), "`logits` .*, but got torch.int64", TypeError),
    bad("elsewhere", lambda c: c(META), "`logits` to be on cpu, but got meta"),
    bad("fit: nan", fit(ONES * math.nan), "`logits` to be finite, but got 12 NaN .*"),
    bad("fit: integers", fit(ONES.long()), "`logits` .*, but got torch.int64", TypeError),
    bad("fit: no sample", fit(ONES[:0], ONES[:0]), "`logits` to hold .* one sample, but got none"),
    bad(
        "fit: nothing known", fit(unknown=ONES.bool()), "`unknown` to leave at least one label, .*"
    ),
    bad("fit: other batch", fit(labels=ONES[:2]), rf"`labels` {SHAPE} \(2, 3\)"),
    bad("fit: 3", fit(labels=3 * ONES), "`labels` to hold only 0 and 1, but got 3.0"),
    bad("fit: soft", fit(labels=0.5 * ONES), "`labels` to hold only 0 and 1, but got 0.5"),
    bad("fit: -1", fit(labels=-ONES), "`labels` .*, but got -1.0; mark .* in `unknown` .*"),
    bad("fit: complex", fit(labels=ONES + 0j), "`labels` .* torch.complex64", TypeError),
    bad("fit: lists", fit(labels=ONES.tolist()), "`labels` to be a tensor, .* list", TypeError),
    bad("fit: elsewhere", fit(labels=META), "`labels` to be on cpu, but got meta"),
    bad("fit: unknown samples", fit(unknown=ONES[:, 0].bool()), rf"`unknown` {SHAPE} \(4,\)"),
    bad("fit: unknown numbers", fit(unknown=ONES), "`unknown` to have a bool dtype, .*", TypeError),
    bad("cut: logits", cut(3 * ONES), r"`probs` to be in \[0, 1\], but got 3.0"),
    bad("cut: nan", cut(ONES * math.nan), r"`probs` to be in \[0, 1\], but got nan"),
    bad("cut: one sample", cut(ONES[0]), r"`probs` to have shape \(B, Q\), but got \(3,\)"),
    bad("cut: other batch", cut(labels=ONES[:2]), rf"`labels` {SHAPE} \(2, 3\)"),
    bad("cut: soft", cut(labels=0.5 * ONES), "`labels` to hold only 0 and 1, but got 0.5"),
    bad("cut: elsewhere", cut(labels=META), "`labels` to be on cpu, but got meta"),
    bad("cut: unknown numbers", cut(unknown=ONES), "`unknown` to have a bool dtype, .*", TypeError),
    bad("cut: per_label 1", cut(per_label=1), "`per_label` to be True or False, .*", TypeError),
    bad("cut: check 1", cut(validate_args=1), "`validate_args` to be True, .*", TypeError),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_refuses_and_stays_as_it_was(case):
    refused(case, PlattScaling(LABELS).fit(*simulate(20)), PlattScaling.state_dict)


# --- Groups ----------------------------------------------------------------------------------------------------------


def test_samples_of_a_group_count_as_one():
    logits, labels = simulate(40)
    once, alone = build().fit(logits, labels), torch.arange(40)
    assert torch.equal(build().fit(logits, labels, groups=alone).scale, once.scale)
    times = torch.randint(1, 6, (40,))
    repeated = [x.repeat_interleave(times, 0) for x in (logits, labels)]
    many = build().fit(*repeated, groups=alone.repeat_interleave(times))
    close(many.scale, once.scale)
    close(many.shift, once.shift)


def test_unknown_labels_of_a_group_do_not_count_in_it():
    logits, labels = simulate(30)
    groups, unknown = torch.arange(30) // 5, torch.rand(30, LABELS) < 0.4
    found = build().fit(logits, labels, unknown, groups=groups)
    for label in range(LABELS):
        known = ~unknown[:, label]
        assert known.any()
    # what stands at unknown labels has no influence, and neither has how many there are in a group
    same = build().fit(poisoned(logits, unknown), labels, unknown, groups=groups)
    assert torch.equal(found.scale, same.scale)


def test_few_groups_leave_the_logits_nearly_as_they_are():
    logits, labels = simulate(1000)
    apart = build().fit(logits, labels)
    together = build().fit(logits, labels, groups=torch.arange(1000) % 2)
    assert ((together.scale - 1).abs() < 0.5 * (apart.scale - 1).abs() + 0.1).all()
    assert (together.shift.abs() < 0.3).all()
    assert (apart.shift.abs() > 0.3).any()


@pytest.mark.parametrize("groups", [torch.zeros(4), torch.zeros(3).long()], ids=["float", "short"])
def test_groups_are_integers_one_a_sample(groups):
    with pytest.raises((TypeError, ValueError), match="groups"):
        build().fit(torch.zeros(4, LABELS), torch.zeros(4, LABELS), groups=groups)
