"""Measures and metrics of calibration and uncertainty, against SciPy, scikit-learn, closed forms and brute force."""

import copy
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy, rankdata, spearmanr
from sklearn.metrics import brier_score_loss, jaccard_score, roc_auc_score
from torchmetrics import MetricCollection
from torchmetrics.functional.classification import binary_calibration_error

from support import close
from uncertainty_mm import metrics
from uncertainty_mm.metrics import functional as measures
from uncertainty_mm.metrics._binning import FINE_BINS
from uncertainty_mm.metrics.functional import (
    auroc,
    brier_decomposition,
    calibration_error,
    modality_attribution,
    predictive_entropy,
    risk_coverage,
    sample_jaccard,
    spearman,
)

NORMS = ["l1", "l2", "max"]
BINNINGS = ["width", "mass"]
N, Q = 57, 3


def random_predictions(n=N, q=Q):
    """Probabilities in float64 and labels that are somewhat likelier where the probability is high."""
    probs = torch.rand(n, q, dtype=torch.float64)
    return probs, (torch.rand(n, q) < probs**2).long()


def coarse_predictions(n=N, q=Q):
    """Probabilities 0, 0.1, ..., 1: ties, and values on the edges of bins."""
    return torch.randint(11, (n, q)).double() / 10, torch.randint(2, (n, q))


def bins_of(column, bins, binning):
    """Bin of every entry of a list, one at a time."""
    if binning == "width":
        return [max(k for k in range(bins) if p >= k / bins) for p in column]
    ranks = rankdata(column)  # average ranks from 1
    return [math.floor((rank - 0.5) * bins / len(column)) for rank in ranks]


def groups(probs, labels, bins, binning):
    """For each label the (p, y) of the bins that are not empty."""
    for p, y in zip(probs.T.numpy(), labels.T.numpy(), strict=True):
        index = np.array(bins_of(p.tolist(), bins, binning))
        yield [(p[index == b], y[index == b]) for b in range(bins) if (index == b).any()]


def naive_calibration(probs, labels, bins, binning, norm):
    errors = []
    for filled in groups(probs, labels, bins, binning):
        gaps = np.array([abs(p.mean() - y.mean()) for p, y in filled])
        share = np.array([len(p) for p, _ in filled]) / len(probs)
        value = {"l1": gaps @ share, "l2": math.sqrt(gaps**2 @ share), "max": gaps.max()}
        errors.append(value[norm])
    return errors


# ------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("predictions", [random_predictions, coarse_predictions])
@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("binning", BINNINGS)
@pytest.mark.parametrize("norm", NORMS)
def test_calibration_error_equals_the_loops(predictions, bins, binning, norm):
    probs, labels = predictions()
    settings = {"bins": bins, "binning": binning, "norm": norm}
    expected = naive_calibration(probs, labels, **settings)
    close(calibration_error(probs, labels, **settings, average="none"), expected)
    close(calibration_error(probs, labels, **settings), np.mean(expected))


@pytest.mark.parametrize("norm", NORMS)
def test_calibration_error_of_equal_width_equals_torchmetrics_label_by_label(norm):
    probs, labels = random_predictions()
    expected = [
        binary_calibration_error(p, y, n_bins=15, norm=norm)
        for p, y in zip(probs.T.contiguous(), labels.T, strict=True)
    ]
    close(calibration_error(probs, labels, norm=norm, average="none"), expected)


def test_bins_of_equal_mass_are_those_of_the_sorted_samples():
    probs, labels = random_predictions(60, 1)
    order = probs[:, 0].argsort()
    parts = zip(probs[order].split(6), labels[order].split(6), strict=True)
    expected = np.mean([abs(float(p.mean() - y.double().mean())) for p, y in parts])
    close(calibration_error(probs, labels, bins=10, binning="mass"), expected)


def test_probability_on_an_edge_belongs_to_the_bin_above():
    # 0.29 * 100 < 29 in binary floating point
    for dtype in (torch.float32, torch.float64):
        probs = torch.tensor([[0.29], [0.295]], dtype=dtype)
        error = calibration_error(probs, torch.tensor([[1], [0]]), bins=100)
        close(error, abs(0.29 + 0.295 - 1) / 2, torch.float32)


@pytest.mark.parametrize("binning", BINNINGS)
def test_predictions_equal_to_frequencies_are_calibrated(binning):
    probs = torch.tensor([0.25] * 4 + [0.5] * 4, dtype=torch.float64).unsqueeze(1)
    labels = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0]).unsqueeze(1)
    for norm in NORMS:
        close(calibration_error(probs, labels, bins=2, binning=binning, norm=norm), 0)


@pytest.mark.parametrize("binning", BINNINGS)
@pytest.mark.parametrize("norm", NORMS)
def test_certain_and_always_wrong_has_error_one(binning, norm):
    labels = torch.randint(2, (N, Q))
    close(calibration_error(1.0 - labels, labels, binning=binning, norm=norm), 1)


@pytest.mark.parametrize("binning", BINNINGS)
def test_layout_in_memory_has_no_influence(binning):
    probs, labels = random_predictions()
    close(
        calibration_error(probs.T.contiguous().T, labels, binning=binning),
        calibration_error(probs, labels, binning=binning),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("binning", BINNINGS)
def test_half_precision_is_computed_as_its_float64_values(dtype, binning):
    probs, labels = random_predictions()
    probs = probs.to(dtype)
    close(
        calibration_error(probs, labels, binning=binning),
        calibration_error(probs.double(), labels, binning=binning),
    )


# ------------------------------------------------------------------------------------------- Brier


@pytest.mark.parametrize("predictions", [random_predictions, coarse_predictions])
@pytest.mark.parametrize("binning", BINNINGS)
def test_brier_parts_equal_the_loops(predictions, binning):
    probs, labels = predictions()
    parts = brier_decomposition(probs, labels, bins=10, binning=binning, average="none")
    for label, filled in enumerate(groups(probs, labels, 10, binning)):
        rate = labels[:, label].double().mean().item()
        share = [len(p) / N for p, _ in filled]
        expected = {
            "brier": brier_score_loss(labels[:, label].numpy(), probs[:, label].numpy()),
            "reliability": sum(
                w * (p.mean() - y.mean()) ** 2 for w, (p, y) in zip(share, filled, strict=True)
            ),
            "resolution": sum(
                w * (y.mean() - rate) ** 2 for w, (_, y) in zip(share, filled, strict=True)
            ),
            "uncertainty": rate * (1 - rate),
            "within_bins": sum(
                w * (p.var() - 2 * ((p - p.mean()) * (y - y.mean())).mean())
                for w, (p, y) in zip(share, filled, strict=True)
            ),
        }
        for name, value in expected.items():
            close(getattr(parts, name)[label], value)


@st.composite
def predictions(draw, max_labels=3):
    """Probabilities with many ties, and labels."""
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, max_labels)))
    size = math.prod(shape)
    value = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.floats(0, 1))
    probs = draw(st.lists(value, min_size=size, max_size=size))
    truth = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    return torch.tensor(probs, dtype=torch.float64).view(shape), torch.tensor(truth).view(shape)


@given(predictions(), st.integers(1, 20), st.sampled_from(BINNINGS))
def test_brier_identity_is_exact(data, bins, binning):
    for parts in (
        brier_decomposition(*data, bins=bins, binning=binning),
        fed(
            metrics.MultilabelBrierDecomposition(data[0].shape[1], bins=bins, binning=binning), data
        ),
    ):
        close(parts.brier, (data[0] - data[1]).square().mean())
        close(
            parts.reliability - parts.resolution + parts.uncertainty + parts.within_bins,
            parts.brier,
        )
        assert parts.reliability >= 0
        assert parts.resolution >= 0


def test_equal_probabilities_leave_nothing_within_bins():
    probs, labels = coarse_predictions()
    parts = brier_decomposition(probs.clamp_max(0.9), labels, bins=10)
    close(parts.within_bins, 0)


# ----------------------------------------------------------------------------------- risk-coverage


def naive_risk(errors, order):
    return [float(np.mean([errors[i] for i in order[:k]])) for k in range(1, len(errors) + 1)]


def test_risk_coverage_without_ties_equals_the_loops():
    errors, uncertainty = torch.rand(N).double(), torch.randperm(N)
    order = uncertainty.argsort().tolist()
    curve = risk_coverage(errors, uncertainty)
    risk = naive_risk(errors.tolist(), order)
    best = naive_risk(sorted(errors.tolist()), range(N))
    close(curve.coverage, [k / N for k in range(1, N + 1)])
    close(curve.risk, risk)
    close(curve.aurc, np.mean(risk))
    close(curve.eaurc, np.mean(risk) - np.mean(best))


def test_ties_are_the_mean_over_all_orders():
    errors = [1.0, 0.0, 3.0, 0.5, 2.0]
    uncertainty = [0.2, 0.1, 0.2, 0.2, 0.1]
    orders = [
        order
        for order in itertools.permutations(range(5))
        if [uncertainty[i] for i in order] == sorted(uncertainty)
    ]
    assert len(orders) == 12
    expected = np.mean([naive_risk(errors, order) for order in orders], axis=0)
    close(risk_coverage(torch.tensor(errors), torch.tensor(uncertainty)).risk, expected)


def test_constant_uncertainty_risks_the_mean_error_everywhere():
    errors = torch.randint(2, (N,))
    close(risk_coverage(errors, torch.ones(N)).risk, [errors.double().mean().item()] * N)


def test_aurc_of_the_best_order_tends_to_its_limit():
    n, rate = 20_000, 0.3  # Geifman et al. 2019
    errors = (torch.arange(n) < rate * n).long()
    curve = risk_coverage(errors, uncertainty=errors)
    assert curve.eaurc == 0
    close(risk_coverage(errors, errors + torch.arange(n) / n).aurc, curve.aurc)
    assert curve.aurc.item() == pytest.approx(rate + (1 - rate) * math.log(1 - rate), abs=1e-4)


pairs = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.3, 2.5])), min_size=1, max_size=30
)


@given(pairs, st.randoms(use_true_random=False))
def test_permuting_rows_changes_nothing(rows, random):
    shuffled = random.sample(rows, len(rows))
    before, after = (torch.tensor(x, dtype=torch.float64).T for x in (rows, shuffled))
    for a, b in zip(risk_coverage(*before), risk_coverage(*after), strict=True):
        close(a, b)
    torch.testing.assert_close(spearman(*before), spearman(*after), equal_nan=True)
    probs, labels = (before[1] / 2.5).unsqueeze(1), (before[0] > 1).long().unsqueeze(1)
    order = torch.tensor(random.sample(range(len(rows)), len(rows)))
    for binning in BINNINGS:
        close(
            calibration_error(probs[order], labels[order], bins=4, binning=binning),
            calibration_error(probs, labels, bins=4, binning=binning),
        )


@given(pairs)
def test_excess_is_between_zero_and_that_of_the_worst_order(rows):
    errors, uncertainty = torch.tensor(rows, dtype=torch.float64).T
    curve, worst = risk_coverage(errors, uncertainty), risk_coverage(errors, -errors)
    assert -1e-12 <= curve.eaurc <= worst.eaurc + 1e-12


# ------------------------------------------------------------------------------ AUROC and Spearman


@given(pairs, st.lists(st.sampled_from([0.0, 0.1, 0.3, 7.0]), min_size=1, max_size=30))
def test_auroc_equals_all_pairs_and_scikit_learn(rows, negative):
    positive = [u for _, u in rows]
    wins = [(a > b) + 0.5 * (a == b) for a in positive for b in negative]
    actual = auroc(torch.tensor(positive), torch.tensor(negative))
    close(actual, np.mean(wins))
    truth = [1] * len(positive) + [0] * len(negative)
    close(actual, roc_auc_score(truth, positive + negative))


def test_auroc_keeps_the_order_of_large_scores():
    # A sigmoid in float32 would make them equal.
    assert auroc(torch.tensor([60.0, 70.0]), torch.tensor([40.0, 50.0])) == 1


@pytest.mark.parametrize("levels", [4, 1000])
def test_spearman_equals_scipy(levels):
    x, y = torch.randint(levels, (200,)), torch.randint(levels, (200,))
    close(spearman(x, y + x), spearmanr(x.numpy(), (y + x).numpy()).statistic)


def test_spearman_is_exact_for_many_ties():
    # The sum of these ranks does not fit into 32 bits.
    low = -torch.arange(1.0, 1001)
    x, y = torch.cat([torch.zeros(70_000), low]), torch.cat([torch.rand(70_000), low])
    close(spearman(x, y), spearmanr(x.numpy(), y.numpy()).statistic)


def test_spearman_of_monotone_maps_is_one():
    x = torch.randn(N)
    close(spearman(x, x.exp()), 1)
    close(spearman(x, -x), -1)


# ------------------------------------------------------------- Jaccard, entropy, attribution


def test_sample_jaccard_equals_scikit_learn():
    probs, labels = random_predictions()
    labels[0], probs[0] = 0, 0.1  # both sets empty
    for threshold in (0.3, 0.5):
        predicted = (probs > threshold).long().numpy()
        expected = [
            jaccard_score(y, p, zero_division=0)
            for y, p in zip(labels.numpy(), predicted, strict=True)
        ]
        close(sample_jaccard(probs, labels, threshold=threshold), expected)
        whole = jaccard_score(labels.numpy(), predicted, average="samples", zero_division=0)
        close(fed(metrics.SampleJaccard(threshold=threshold), (probs, labels)), whole)


def test_sample_jaccard_is_zero_for_two_empty_sets():
    close(sample_jaccard(torch.zeros(1, 3), torch.zeros(1, 3)), [0])


def test_probability_at_the_threshold_is_not_predicted():
    close(sample_jaccard(torch.tensor([[0.5, 0.6]]), torch.tensor([[1, 1]])), [0.5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_predictive_entropy_equals_scipy(dtype):
    probs = torch.cat([torch.rand(5, Q), torch.eye(Q), torch.full((1, Q), 1e-6)]).to(dtype)
    expected = [sum(entropy([p, 1 - p]) for p in row) for row in probs.double().tolist()]
    close(predictive_entropy(probs), expected)
    assert (predictive_entropy(torch.eye(Q)) == 0).all()
    close(predictive_entropy(torch.full((1, 4), 0.5)), [4 * math.log(2)])


def test_attribution_equals_the_formula():
    sizes, missing = torch.rand(N, Q).double() + 0.1, torch.rand(N, Q) < 0.4
    missing[0], missing[1] = True, False
    shares = modality_attribution(sizes, missing)
    for row, size, left_out in zip(shares, sizes.tolist(), missing.tolist(), strict=True):
        weights = [0 if out else s**-2 for s, out in zip(size, left_out, strict=True)]
        close(row, [w / (sum(weights) or 1) for w in weights])
    close(shares.sum(1), (~missing).any(1).double())


@given(st.lists(st.floats(1e-150, 1e150), min_size=1, max_size=5), st.floats(1e-100, 1e100))
def test_attribution_depends_on_ratios_only(sizes, factor):
    sizes = torch.tensor([sizes], dtype=torch.float64)
    shares = modality_attribution(sizes)
    close(shares.sum(1), [1])
    close(modality_attribution(sizes * factor), shares)


def test_what_stands_at_a_missing_modality_has_no_influence():
    missing = torch.tensor([[False, True, False]])
    for garbage in (float("nan"), float("inf"), -1.0, 0.0):
        close(modality_attribution(torch.tensor([[1.0, garbage, 1.0]]), missing), [[0.5, 0, 0.5]])


# ------------------------------------------------------------------------- metrics over batches


def score_batch(n=N):
    return torch.randint(3, (n,)).double(), torch.randint(5, (n,)).double() * 10


CASES = {
    "calibration, width": (
        lambda: metrics.MultilabelCalibrationError(Q, norm="l2", average="none"),
        random_predictions,
        lambda p, y: calibration_error(p, y, norm="l2", average="none"),
    ),
    "calibration, mass": (
        lambda: metrics.MultilabelCalibrationError(Q, bins=4, binning="mass"),
        coarse_predictions,
        lambda p, y: calibration_error(p, y, bins=4, binning="mass"),
    ),
    "Brier, width": (
        lambda: metrics.MultilabelBrierDecomposition(Q),
        random_predictions,
        brier_decomposition,
    ),
    "Brier, mass": (
        lambda: metrics.MultilabelBrierDecomposition(Q, bins=4, binning="mass", average="none"),
        coarse_predictions,
        lambda p, y: brier_decomposition(p, y, bins=4, binning="mass", average="none"),
    ),
    "Jaccard": (
        lambda: metrics.SampleJaccard(threshold=0.4),
        coarse_predictions,
        lambda p, y: sample_jaccard(p, y, threshold=0.4).mean(),
    ),
    "AURC": (metrics.AURC, score_batch, lambda e, u: risk_coverage(e, u).aurc),
    "E-AURC": (
        lambda: metrics.AURC(excess=True),
        score_batch,
        lambda e, u: risk_coverage(e, u).eaurc,
    ),
    "AUROC": (
        metrics.DetectionAUROC,
        lambda n=N: (score_batch(n)[1], torch.randint(2, (n,))),
        lambda u, wrong: auroc(u[wrong == 1], u[wrong == 0]),
    ),
    "Spearman": (metrics.SpearmanCorrelation, score_batch, spearman),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def fed(metric, *batches):
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10, equal_nan=True)


def parts_of(data, sizes):
    return list(zip(*(x.split(sizes) for x in data), strict=True))


def test_every_metric_has_a_case():
    assert {type(build()).__name__ for build, _, _ in CASES.values()} == set(metrics.__all__)


def test_batches_give_what_the_function_gives_on_all(case):
    build, make, function = case
    data = make()
    same(fed(build(), data), function(*data))
    same(fed(build(), *parts_of(data, [1, 0, 30, 26])), function(*data))


def test_merged_states_are_those_of_joined_data(case):
    build, make, function = case
    data = make()
    left, right = (build() for _ in range(2))
    for metric, part in zip((left, right), parts_of(data, [40, 17]), strict=True):
        metric.update(*part)
    left.merge_state(right)
    same(left.compute(), function(*data))


def test_forward_gives_the_batch_and_accumulates(case):
    build, make, function = case
    first, second = make(), make()
    metric = build()
    same(metric(*first), function(*first))
    same(metric(*second), function(*second))
    same(metric.compute(), function(*(torch.cat(x) for x in zip(first, second, strict=True))))
    metric.reset()
    same(fed(metric, first), function(*first))


@pytest.mark.parametrize("travel", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_copy_goes_on_like_the_original(case, travel):
    build, make, function = case
    data = make()
    first, second = parts_of(data, [40, 17])
    metric = build()
    metric.update(*first)
    same(fed(travel(metric), second), function(*data))


def test_persistent_state_resumes(case):
    build, make, function = case
    data = make()
    first, second = parts_of(data, [40, 17])
    metric, fresh = build(), build()
    for each in (metric, fresh):
        each.persistent(True)
    metric.update(*first)
    fresh.load_state_dict(metric.state_dict())
    same(fed(fresh, second), function(*data))


def test_without_samples_it_is_nan(case):
    build, make, function = case
    empty = make(0)
    leaves = function(*empty)
    for result in (leaves, fed(build(), empty)):
        for value in result if isinstance(result, tuple) else [result]:
            assert value.isnan().all()
    with pytest.warns(UserWarning, match="before the ``update``"):
        never = build().compute()
    same(never, leaves)


def test_state_of_binned_metrics_does_not_grow():
    for binning, size in (("width", 15), ("mass", FINE_BINS)):
        metric = metrics.MultilabelCalibrationError(Q, binning=binning)
        for _ in range(3):
            metric.update(*random_predictions())
            assert metric.metric_state["sums"].shape == (5, Q, size)


@given(predictions(max_labels=1), st.integers(1, 8))
def test_equal_mass_in_constant_memory_is_near_the_exact_one(data, bins):
    # Equal after rounding to the middle of fine bins, which moves a probability by at most half a bin.
    probs, labels = data
    metric = metrics.MultilabelCalibrationError(1, bins=bins, binning="mass")
    rounded = ((probs.sqrt().asin() * 2 / math.pi * FINE_BINS).floor() + 0.5) / FINE_BINS
    rounded = (rounded.clamp_max(1) * math.pi / 2).sin().square()
    exact = calibration_error(rounded, labels, bins=bins, binning="mass")
    assert fed(metric, data).item() == pytest.approx(exact.item(), abs=math.pi / 2 / FINE_BINS)


def test_equal_mass_separates_small_probabilities():
    # Bins of equal width in p would hold all of these in one.
    probs = torch.linspace(1e-5, 2e-4, 400, dtype=torch.float64).unsqueeze(1)
    metric = metrics.MultilabelCalibrationError(1, bins=4, binning="mass")
    metric.update(probs, torch.zeros(400, 1))
    counts = metric._histogram()[0, 0]
    assert (counts - 100).abs().max() <= 20


def test_metrics_join_a_collection():
    collection = MetricCollection(
        [metrics.MultilabelCalibrationError(Q), metrics.SampleJaccard()],
    )
    data = random_predictions()
    collection.update(*data)
    result = collection.compute()
    same(result["MultilabelCalibrationError"], calibration_error(*data))
    same(result["SampleJaccard"], sample_jaccard(*data).mean())


# --------------------------------------------------------------------- limiting cases and errors


def test_one_sample():
    probs, labels = torch.tensor([[0.2]]), torch.tensor([[1]])
    for binning in BINNINGS:
        close(calibration_error(probs, labels, binning=binning), 0.8, torch.float32)
        parts = brier_decomposition(probs, labels, binning=binning)
        close(parts.brier, 0.64, torch.float32)
        close(parts.uncertainty, 0)
    close(risk_coverage(torch.tensor([0.5]), torch.tensor([3.0])).aurc, 0.5)
    assert spearman(torch.tensor([1.0]), torch.tensor([2.0])).isnan()


def test_what_does_not_exist_is_nan_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spearman(torch.ones(N), torch.rand(N)).isnan()
        assert spearman(torch.ones(N), torch.ones(N)).isnan()
        assert auroc(torch.rand(0), torch.rand(3)).isnan()
        assert auroc(torch.rand(3), torch.rand(0)).isnan()
        assert fed(metrics.DetectionAUROC(), (torch.rand(3), torch.ones(3))).isnan()


def test_constant_scores():
    close(auroc(torch.ones(4), torch.ones(7)), 0.5)
    probs, labels = torch.full((N, Q), 0.5), torch.randint(2, (N, Q))
    rate = labels.double().mean(0)
    for binning in BINNINGS:
        error = calibration_error(probs, labels, binning=binning, average="none")
        close(error, (rate - 0.5).abs())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("binning", BINNINGS)
def test_calibration_error_of_no_samples_is_nan(norm, binning):
    empty = torch.zeros(0, Q)
    error = calibration_error(empty, empty, norm=norm, binning=binning, average="none")
    assert error.shape == (Q,)
    assert error.isnan().all()


def test_empty_rows_give_empty_results():
    assert sample_jaccard(torch.zeros(0, Q), torch.zeros(0, Q)).shape == (0,)
    assert predictive_entropy(torch.zeros(0, Q)).shape == (0,)
    assert modality_attribution(torch.zeros(0, 2)).shape == (0, 2)
    assert risk_coverage(torch.zeros(0), torch.zeros(0)).risk.shape == (0,)


TAKES_PROBS = {
    "calibration_error": calibration_error,
    "brier_decomposition": brier_decomposition,
    "sample_jaccard": sample_jaccard,
    "predictive_entropy": lambda probs, labels: predictive_entropy(probs),
    "MultilabelCalibrationError": metrics.MultilabelCalibrationError(Q).update,
    "MultilabelBrierDecomposition": metrics.MultilabelBrierDecomposition(Q, binning="mass").update,
    "SampleJaccard": metrics.SampleJaccard().update,
}


@pytest.mark.parametrize("name", TAKES_PROBS)
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_probabilities_outside_the_unit_interval_are_refused(name, value):
    probs = torch.full((2, Q), 0.5)
    probs[1, 1] = value
    with pytest.raises(ValueError, match=r"Expected `probs` to be in \[0, 1\], but got"):
        TAKES_PROBS[name](probs, torch.zeros(2, Q))


@pytest.mark.parametrize("name", set(TAKES_PROBS) - {"predictive_entropy"})
def test_labels_other_than_zero_and_one_are_refused(name):
    with pytest.raises(ValueError, match="Expected `labels` to hold only 0 and 1"):
        TAKES_PROBS[name](torch.full((1, Q), 0.5), torch.tensor([[0, 1, 2]]))
    with pytest.raises(ValueError, match=r"Expected `labels` to have shape \(N=1, Q=3\)"):
        TAKES_PROBS[name](torch.full((1, Q), 0.5), torch.zeros(1, Q + 1))


def test_metric_refuses_another_number_of_labels():
    with pytest.raises(ValueError, match=r"Expected `probs` to have shape \(N, Q=3\)"):
        metrics.MultilabelCalibrationError(Q).update(torch.rand(4, 2), torch.zeros(4, 2))


TAKES_SCORES = {
    "risk_coverage": risk_coverage,
    "spearman": spearman,
    "AURC": metrics.AURC().update,
    "SpearmanCorrelation": metrics.SpearmanCorrelation().update,
    "DetectionAUROC": metrics.DetectionAUROC().update,
}


@pytest.mark.parametrize("name", TAKES_SCORES)
def test_scores_that_are_not_finite_or_differ_in_shape_are_refused(name):
    function = TAKES_SCORES[name]
    with pytest.raises(ValueError, match="to be finite, but got 1 NaN"):
        function(torch.tensor([0.0, float("nan")]), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"to have shape \(N=2\), but got \(3,\)"):
        function(torch.zeros(2), torch.zeros(3))
    with pytest.raises(TypeError, match="to be a tensor, but got list"):
        function([0.0, 1.0], torch.zeros(2))


def test_auroc_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="Expected `negative` to be finite"):
        auroc(torch.zeros(2), torch.tensor([float("inf")]))
    with pytest.raises(ValueError, match="Expected `positive` to hold only 0 and 1"):
        metrics.DetectionAUROC().update(torch.rand(2), torch.tensor([0.5, 1]))


def test_attribution_refuses_sizes_that_are_not_positive():
    with pytest.raises(ValueError, match="Expected `sizes` to be above 0, but got 0"):
        modality_attribution(torch.tensor([[1.0, 0.0]]))
    with pytest.raises(ValueError, match="Expected `sizes` to be finite"):
        modality_attribution(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="Expected `missing` to have shape"):
        modality_attribution(torch.ones(1, 2), torch.zeros(1, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"bins": 0}, ValueError),
        ({"bins": 2.0}, TypeError),
        ({"binning": "quantile"}, ValueError),
        ({"norm": "l3"}, ValueError),
        ({"average": "micro"}, ValueError),
    ],
)
def test_unknown_settings_are_refused(settings, error):
    [name] = settings
    with pytest.raises(error, match=f"Expected `{name}` to be"):
        calibration_error(*random_predictions(), **settings)
    with pytest.raises(error, match=f"Expected `{name}` to be"):
        metrics.MultilabelCalibrationError(Q, **settings)


def test_other_settings_are_refused():
    with pytest.raises(ValueError, match="Expected `num_labels` to be a positive integer"):
        metrics.MultilabelBrierDecomposition(0)
    with pytest.raises(ValueError, match="Expected `threshold` to be a number in"):
        metrics.SampleJaccard(threshold=1.5)
    with pytest.raises(ValueError, match="Expected `threshold` to be a number in"):
        sample_jaccard(*random_predictions(), threshold=-1)
    with pytest.raises(TypeError, match="Expected `excess` to be True or False"):
        metrics.AURC(excess=1)


def test_all_measures_are_in_float64():
    data = [x.float() for x in random_predictions()]
    assert calibration_error(*data).dtype == torch.float64
    assert predictive_entropy(data[0]).dtype == torch.float64
    assert measures.spearman(data[0][:, 0], data[1][:, 0]).dtype == torch.float64
