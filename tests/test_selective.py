"""Measures of what an uncertainty leaves out and finds, against loops over samples and orders and scikit-learn."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import auc, f1_score, roc_auc_score, roc_curve
from torchmetrics import MetricCollection
from torchmetrics.wrappers import MultioutputWrapper

from support import Bad, close, refused
from uncertainty_mm import metrics
from uncertainty_mm.metrics.functional import (
    augrc,
    auroc,
    by_label,
    coverage_at_risk,
    fpr_at_tpr,
    joint_energy,
    risk_at_coverage,
    risk_coverage,
    selective_f1,
)

NAN = float("nan")
N, Q = 23, 3


def orders_of(uncertainty):
    """All orders of the rows in which the uncertainty rises."""
    places = range(len(uncertainty))
    rising = sorted(uncertainty)
    return [o for o in itertools.permutations(places) if [uncertainty[i] for i in o] == rising]


# ---------------------------------------------------------------------------------- risk and coverage


def test_augrc_is_the_area_of_the_trapezia_over_all_orders():
    errors, uncertainty = [1.0, 0.0, 3.0, 0.5, 2.0], [0.2, 0.1, 0.2, 0.2, 0.1]
    joint = [np.cumsum([0, *(errors[i] for i in order)]) / 5 for order in orders_of(uncertainty)]
    areas = [auc(np.arange(6) / 5, curve) for curve in joint]
    close(augrc(torch.tensor(uncertainty), torch.tensor(errors)), np.mean(areas))


rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), min_size=1, max_size=30)


@given(rows, st.randoms(use_true_random=False))
def test_augrc_of_wrong_and_right_is_that_of_the_auroc(pairs, random):
    uncertainty, wrong = torch.tensor(pairs).T
    right = 1 - wrong.double().mean()
    ranked = auroc(uncertainty, wrong).nan_to_num(0)  # nan only where the factor is 0
    area = augrc(uncertainty, wrong)
    close(area, (1 - ranked) * right * (1 - right) + (1 - right) ** 2 / 2)
    shuffled = torch.tensor(random.sample(pairs, len(pairs))).T
    close(augrc(*shuffled), area)


@pytest.mark.parametrize("levels", [4, 1000])
def test_risk_and_coverage_are_points_of_the_curve(levels):
    uncertainty, errors = torch.randint(levels, (20,)), torch.randint(3, (20,))
    curve = risk_coverage(uncertainty, errors)
    for k, risk in enumerate(curve.risk.tolist(), 1):
        close(risk_at_coverage(uncertainty, errors, k / 20), risk)
        close(risk_at_coverage(uncertainty, errors, (k - 0.5) / 20), risk)
        close(risk_at_coverage(uncertainty, errors, min(0.1 * k / 2 + 1e-15, 1)), risk)  # rounding
        allowed = [j for j, other in enumerate(curve.risk.tolist(), 1) if other <= risk]
        close(coverage_at_risk(uncertainty, errors, risk), max(allowed) / 20)
    assert coverage_at_risk(uncertainty, errors + 1, 0.5) == 0
    assert coverage_at_risk(uncertainty, errors, 2) == 1


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 12))
def test_a_risk_that_is_just_allowed_is_allowed(ties, wrong, more):
    # The ratio of whole numbers is what a division of them gives, also within equal uncertainties.
    wrong = min(wrong, ties)
    errors = torch.arange(ties) < wrong
    errors = torch.cat([errors, torch.zeros(more, dtype=torch.bool)])
    uncertainty = torch.cat([torch.zeros(ties), torch.ones(more)])
    assert risk_at_coverage(uncertainty, errors, 1) == wrong / (ties + more)
    assert coverage_at_risk(uncertainty, errors, wrong / (ties + more)) == 1
    for k in range(1, ties + 1):
        assert risk_coverage(uncertainty, errors).risk[k - 1] == wrong / ties


# ------------------------------------------------------------------------------------- selective F1


def some_predictions():
    probs = torch.rand(N, Q, dtype=torch.float64)
    return torch.randint(4, (N,)), probs, (torch.rand(N, Q) < probs).long(), torch.rand(N, Q) < 0.3


@pytest.mark.parametrize("threshold", [0.4, torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)])
def test_selective_f1_is_that_of_the_samples_that_are_kept(threshold):
    _, probs, labels, unknown = some_predictions()
    unknown[4] = True  # does not count, whatever stands there
    order = torch.randperm(N).double()
    kept = [i for i in order.argsort().tolist() if i != 4]
    order[4] = NAN
    spoilt = probs.masked_fill(unknown, NAN), labels.masked_fill(unknown, -1)
    for k in (1, 7, N - 1):
        rows = kept[:k]
        known = ~unknown[rows]
        truth, said = labels[rows][known], (probs > threshold)[rows][known]
        expected = f1_score(truth.numpy(), said.numpy(), zero_division=0)
        actual = selective_f1(order, *spoilt, unknown, coverage=k / (N - 1), threshold=threshold)
        close(actual, expected)


def test_selective_f1_of_ties_is_that_of_the_mean_numbers():
    uncertainty = [0.5, 0.1, 0.5, 0.5, 0.1]
    probs, labels = torch.rand(5, Q, dtype=torch.float64), torch.randint(2, (5, Q))
    said = probs > 0.5
    for k in range(1, 6):
        kept = [list(order[:k]) for order in orders_of(uncertainty)]
        both = np.mean([(said & labels.bool())[i].sum() for i in kept])
        either = np.mean([said[i].sum() + labels[i].sum() for i in kept])
        actual = selective_f1(torch.tensor(uncertainty), probs, labels, coverage=k / 5)
        close(actual, 2 * both / max(either, 1e-9))


def test_selective_f1_of_nothing():
    empty, scores = torch.zeros(0, Q), torch.rand(2)
    assert selective_f1(torch.zeros(0), empty, empty, coverage=0.5).isnan()
    assert selective_f1(scores, torch.zeros(2, Q), torch.zeros(2, Q), coverage=1) == 0
    nothing = torch.ones(2, Q, dtype=torch.bool)
    assert selective_f1(scores, torch.rand(2, Q), torch.ones(2, Q), nothing, coverage=1).isnan()


def test_selective_f1_over_batches_with_unknown_labels():
    uncertainty, probs, labels, unknown = some_predictions()
    unknown[:2] = True
    metric = metrics.SelectiveF1(0.6)
    for rows in (slice(0, 9), slice(9, N)):
        metric.update(uncertainty[rows], probs[rows], labels[rows], unknown[rows])
    close(metric.compute(), selective_f1(uncertainty, probs, labels, unknown, coverage=0.6))


def test_collection_keeps_coverages_and_thresholds_apart():
    uncertainty, probs, labels, _ = some_predictions()
    made = {
        "low": metrics.SelectiveF1(0.5, threshold=0.2),
        "high": metrics.SelectiveF1(0.5),
        "risk": metrics.RiskAtCoverage(0.5),
        "more": metrics.RiskAtCoverage(0.9),
    }
    collection = MetricCollection(made)
    wrong = labels[:, 0]
    for _ in range(2):
        collection.update(uncertainty=uncertainty, errors=wrong, probs=probs, labels=labels)
    u, p, y, e = (torch.cat([x, x]) for x in (uncertainty, probs, labels, wrong))
    expected = {
        "low": selective_f1(u, p, y, coverage=0.5, threshold=0.2),
        "high": selective_f1(u, p, y, coverage=0.5),
        "risk": risk_at_coverage(u, e, 0.5),
        "more": risk_at_coverage(u, e, 0.9),
    }
    for name, value in collection.compute().items():
        close(value, expected[name])


# ------------------------------------------------------------------------------------------ detection


@given(rows, st.sampled_from([0.0, 0.3, 0.5, 0.95, 1.0]))
def test_fpr_at_tpr_equals_scikit_learn(pairs, tpr):
    uncertainty, wrong = torch.tensor(pairs).T
    actual = fpr_at_tpr(uncertainty, wrong, tpr=tpr)
    if wrong.min() == wrong.max():
        assert actual.isnan()
        return
    false, true, _ = roc_curve(wrong.numpy(), uncertainty.numpy(), drop_intermediate=False)
    close(actual, false[true >= tpr - 1e-9].min())


def test_fpr_of_all_scores_equal_is_one():
    assert fpr_at_tpr(torch.ones(9), torch.arange(9) < 4) == 1
    assert fpr_at_tpr(torch.arange(40), torch.arange(40) >= 20) == 0


def test_joint_energy_is_the_sum_over_the_labels():
    logits = torch.tensor([[-800.0, 800.0, 0.0], [20.0, -20.0, 5.0]], dtype=torch.float64)
    close(joint_energy(logits), np.logaddexp(0, logits.numpy()).sum(1))
    assert (joint_energy(logits.half()) - joint_energy(logits)).abs().max() == 0
    known, foreign = torch.randn(40, Q) + 3, torch.randn(40, Q) - 3
    energy = joint_energy(torch.cat([known, foreign]))
    is_known = (torch.arange(80) < 40).long()
    close(auroc(energy, is_known), roc_auc_score(is_known.numpy(), energy.numpy()))
    assert fpr_at_tpr(energy, is_known) < 0.1


# -------------------------------------------------------------------------------------- label by label


@pytest.mark.parametrize("measure", [augrc, auroc, fpr_at_tpr])
def test_each_label_has_its_own_samples(measure):
    uncertainty, wrong = torch.rand(N, Q), torch.randint(2, (N, Q))
    unknown = torch.rand(N, Q) < 0.3
    unknown[:, 1] = True
    expected = [
        measure(u[~out], e[~out])
        for u, e, out in zip(uncertainty.T, wrong.T, unknown.T, strict=True)
    ]
    given_ = uncertainty.masked_fill(unknown, NAN), wrong.float().masked_fill(unknown, NAN), unknown
    torch.testing.assert_close(
        by_label(measure, *given_, average="none"), torch.stack(expected), equal_nan=True
    )
    close(by_label(measure, *given_), torch.stack(expected).nanmean())
    assert expected[1].isnan()
    assert by_label(measure, torch.zeros(4, 0), torch.zeros(4, 0), average="none").shape == (0,)


def test_each_label_over_batches():
    uncertainty, wrong = torch.rand(N, Q), torch.randint(2, (N, Q)).float()
    unknown = torch.rand(N, Q) < 0.3
    metric = MultioutputWrapper(metrics.AUGRC(), num_outputs=Q)
    spoilt = uncertainty.masked_fill(unknown, NAN)
    for rows_ in (slice(0, 9), slice(9, N)):
        metric.update(spoilt[rows_], wrong[rows_])
    close(metric.compute(), by_label(augrc, uncertainty, wrong, unknown, average="none"))


# ------------------------------------------------------------------------------------------- bad input

SCORES, WRONG = torch.tensor([0.1, 0.5, 0.3]), torch.tensor([0, 1, 0])
PROBS = torch.full((3, Q), 0.25)
LABELS = torch.eye(3).long()


def f1(**changed):
    given_ = {"uncertainty": SCORES, "probs": PROBS, "labels": LABELS, "coverage": 0.5} | changed
    return selective_f1(**given_)


COVERAGE = "Expected `coverage` to be a number above 0 and at most 1, but got"
BAD = [
    *(
        Bad(f"{name} {value}", lambda _, call=call, v=value: call(v), error, f"{COVERAGE} {value}")
        for value, error in (
            (0, ValueError),
            (1.5, ValueError),
            (NAN, ValueError),
            ("1", TypeError),
        )
        for name, call in (
            ("risk", lambda c: risk_at_coverage(SCORES, WRONG, c)),
            ("RiskAtCoverage", metrics.RiskAtCoverage),
            ("F1", lambda c: f1(coverage=c)),
            ("SelectiveF1", metrics.SelectiveF1),
        )
        if value != "1"
    ),
    Bad("no number", lambda _: f1(coverage="1"), TypeError, f"{COVERAGE} '1'"),
    Bad(
        "risk",
        lambda _: coverage_at_risk(SCORES, WRONG, NAN),
        ValueError,
        "`risk` to be a number that is finite, but got nan",
    ),
    Bad("CoverageAtRisk", lambda _: metrics.CoverageAtRisk(None), TypeError, "`risk` to be a num"),
    Bad("tpr", lambda _: fpr_at_tpr(SCORES, WRONG, tpr=2), ValueError, "`tpr` to be a number in"),
    Bad("FPRAtTPR", lambda _: metrics.FPRAtTPR(tpr=-1), ValueError, "`tpr` to be a number in"),
    Bad(
        "graded", lambda _: fpr_at_tpr(SCORES, SCORES), ValueError, "`errors` to hold only 0 and 1"
    ),
    Bad("threshold", lambda _: f1(threshold=2), ValueError, "`threshold` to be a number in"),
    Bad(
        "SelectiveF1",
        lambda _: metrics.SelectiveF1(0.5, threshold=2),
        ValueError,
        "`threshold` to be a number in",
    ),
    Bad("nan", lambda _: f1(uncertainty=SCORES * NAN), ValueError, "`uncertainty` to be finite"),
    Bad(
        "rows",
        lambda _: f1(uncertainty=SCORES[:2]),
        ValueError,
        r"`uncertainty` to have shape \(N=3\), but got \(2,\)",
    ),
    Bad("probs", lambda _: f1(probs=-PROBS), ValueError, r"`probs` to be in \[0, 1\]"),
    Bad("labels", lambda _: f1(labels=LABELS * 2), ValueError, "`labels` to hold only 0 and 1"),
    Bad("energy", lambda _: joint_energy(PROBS * NAN), ValueError, "`logits` to be finite"),
    Bad("energy of one", lambda _: joint_energy(SCORES), ValueError, "`logits` to have shape"),
    Bad(
        "average",
        lambda _: by_label(auroc, PROBS, LABELS, average="micro"),
        ValueError,
        "`average` to be one of",
    ),
    Bad("one", lambda _: by_label(auroc, SCORES, WRONG), ValueError, "`uncertainty` to have shape"),
    Bad("nan of", lambda _: by_label(auroc, PROBS, PROBS * NAN), ValueError, "`errors` to be fin"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_bad_input_is_refused(case):
    refused(case, None)


def test_refused_batch_leaves_the_state_as_it_was():
    metric = metrics.SelectiveF1(1)
    metric(SCORES, PROBS, LABELS)
    before = metric.compute()
    bad = Bad(
        "nan", lambda m: m(SCORES * NAN, PROBS, LABELS), ValueError, "`uncertainty` to be fin"
    )
    refused(bad, metric)
    metric.update(SCORES[:0], PROBS[:0], LABELS[:0])
    assert metric.compute() == before


def test_what_is_not_finite_is_left_out_where_values_are_not_looked_at():
    with_nan = torch.cat([SCORES, torch.tensor([NAN])])
    probs, labels = torch.cat([PROBS, PROBS[:1]]), torch.cat([LABELS, LABELS[:1]])
    given_ = {"coverage": 0.5, "threshold": 0.1, "validate_args": False}
    close(selective_f1(with_nan, probs, labels, **given_), f1(threshold=0.1))
