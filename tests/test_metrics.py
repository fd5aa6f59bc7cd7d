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
from matplotlib.figure import Figure
from scipy.stats import entropy, rankdata, spearmanr
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    f1_score,
    jaccard_score,
    precision_score,
    recall_score,
    roc_auc_score,
)
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MetricTracker

from support import Bad, close
from uncertainty_mm import metrics
from uncertainty_mm.metrics import functional as measures
from uncertainty_mm.metrics._base import OfPredictions
from uncertainty_mm.metrics._binning import FINE_BINS
from uncertainty_mm.metrics.functional import (
    auroc,
    brier_decomposition,
    calibration_error,
    evaluate,
    modality_attribution,
    predictive_entropy,
    risk_coverage,
    sample_jaccard,
    spearman,
)

NORMS = ["l1", "l2", "max"]
BINNINGS = ["width", "mass"]
N, Q = 57, 3
NAN = float("nan")


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


def naive_calibration(probs, labels, n_bins, binning, norm):
    errors = []
    for filled in groups(probs, labels, n_bins, binning):
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
    settings = {"n_bins": bins, "binning": binning, "norm": norm}
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
    close(calibration_error(probs, labels, n_bins=10, binning="mass"), expected)


def test_probability_on_an_edge_belongs_to_the_bin_above():
    # 0.29 * 100 < 29 in binary floating point
    for dtype in (torch.float32, torch.float64):
        probs = torch.tensor([[0.29], [0.295]], dtype=dtype)
        error = calibration_error(probs, torch.tensor([[1], [0]]), n_bins=100)
        close(error, abs(0.29 + 0.295 - 1) / 2, torch.float32)


@pytest.mark.parametrize("binning", BINNINGS)
def test_predictions_equal_to_frequencies_are_calibrated(binning):
    probs = torch.tensor([0.25] * 4 + [0.5] * 4, dtype=torch.float64).unsqueeze(1)
    labels = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0]).unsqueeze(1)
    for norm in NORMS:
        close(calibration_error(probs, labels, n_bins=2, binning=binning, norm=norm), 0)


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
    parts = brier_decomposition(probs, labels, n_bins=10, binning=binning, average="none")
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
    metric = metrics.MultilabelBrierDecomposition(data[0].shape[1], n_bins=bins, binning=binning)
    for parts in (
        brier_decomposition(*data, n_bins=bins, binning=binning),
        measures.BrierDecomposition(**fed(metric, data)),
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
    parts = brier_decomposition(probs.clamp_max(0.9), labels, n_bins=10)
    close(parts.within_bins, 0)


# ----------------------------------------------------------------------------------- risk-coverage


def naive_risk(errors, order):
    return [float(np.mean([errors[i] for i in order[:k]])) for k in range(1, len(errors) + 1)]


def test_risk_coverage_without_ties_equals_the_loops():
    errors, uncertainty = torch.rand(N).double(), torch.randperm(N)
    order = uncertainty.argsort().tolist()
    curve = risk_coverage(uncertainty, errors)
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
    close(risk_coverage(torch.tensor(uncertainty), torch.tensor(errors)).risk, expected)


def test_constant_uncertainty_risks_the_mean_error_everywhere():
    errors = torch.randint(2, (N,))
    close(risk_coverage(torch.ones(N), errors).risk, [errors.double().mean().item()] * N)


def test_aurc_of_the_best_order_tends_to_its_limit():
    n, rate = 20_000, 0.3  # Geifman et al. 2019
    errors = (torch.arange(n) < rate * n).long()
    curve = risk_coverage(errors, errors)
    assert curve.eaurc == 0
    close(risk_coverage(errors + torch.arange(n) / n, errors).aurc, curve.aurc)
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
            calibration_error(probs[order], labels[order], n_bins=4, binning=binning),
            calibration_error(probs, labels, n_bins=4, binning=binning),
        )


@given(pairs)
def test_excess_is_between_zero_and_that_of_the_worst_order(rows):
    errors, uncertainty = torch.tensor(rows, dtype=torch.float64).T
    curve, worst = risk_coverage(uncertainty, errors), risk_coverage(-errors, errors)
    assert -1e-12 <= curve.eaurc <= worst.eaurc + 1e-12


# ------------------------------------------------------------------------------ AUROC and Spearman


@given(pairs, st.lists(st.sampled_from([0.0, 0.1, 0.3, 7.0]), min_size=1, max_size=30))
def test_auroc_equals_all_pairs_and_scikit_learn(rows, negative):
    positive = [u for _, u in rows]
    wins = [(a > b) + 0.5 * (a == b) for a in positive for b in negative]
    truth = [1] * len(positive) + [0] * len(negative)
    actual = auroc(torch.tensor(positive + negative), torch.tensor(truth))
    close(actual, np.mean(wins))
    close(actual, roc_auc_score(truth, positive + negative))


def test_auroc_keeps_the_order_of_large_scores():
    # A sigmoid in float32 would make them equal.
    assert auroc(torch.tensor([60.0, 40.0, 70.0, 50.0]), torch.tensor([1, 0, 1, 0])) == 1


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
    return torch.randint(5, (n,)).double() * 10, torch.randint(3, (n,)).double()


CASES = {
    "calibration, width": (
        lambda: metrics.MultilabelCalibrationError(Q, norm="l2", average="none"),
        random_predictions,
        lambda p, y: calibration_error(p, y, norm="l2", average="none"),
    ),
    "calibration, mass": (
        lambda: metrics.MultilabelCalibrationError(Q, n_bins=4, binning="mass"),
        coarse_predictions,
        lambda p, y: calibration_error(p, y, n_bins=4, binning="mass"),
    ),
    "Brier, width": (
        lambda: metrics.MultilabelBrierDecomposition(Q),
        random_predictions,
        lambda p, y: brier_decomposition(p, y)._asdict(),
    ),
    "Brier, mass": (
        lambda: metrics.MultilabelBrierDecomposition(Q, n_bins=4, binning="mass", average="none"),
        coarse_predictions,
        lambda p, y: brier_decomposition(p, y, n_bins=4, binning="mass", average="none")._asdict(),
    ),
    "Jaccard": (
        lambda: metrics.SampleJaccard(threshold=0.4),
        coarse_predictions,
        lambda p, y: sample_jaccard(p, y, threshold=0.4).mean(),
    ),
    "AURC": (metrics.AURC, score_batch, lambda u, e: risk_coverage(u, e).aurc),
    "E-AURC": (
        lambda: metrics.AURC(excess=True),
        score_batch,
        lambda u, e: risk_coverage(u, e).eaurc,
    ),
    "AUGRC": (metrics.AUGRC, score_batch, measures.augrc),
    "risk": (
        lambda: metrics.RiskAtCoverage(0.6),
        score_batch,
        lambda u, e: measures.risk_at_coverage(u, e, 0.6),
    ),
    "coverage": (
        lambda: metrics.CoverageAtRisk(1.0),
        score_batch,
        lambda u, e: measures.coverage_at_risk(u, e, 1.0),
    ),
    "F1": (
        lambda: metrics.SelectiveF1(0.6, threshold=0.4),
        lambda n=N: (score_batch(n)[0], *coarse_predictions(n)),
        lambda u, p, y: measures.selective_f1(u, p, y, coverage=0.6, threshold=0.4),
    ),
    "smooth": (
        lambda: metrics.MultilabelSmoothCalibrationError(Q, average="none"),
        random_predictions,
        lambda p, y: measures.smooth_calibration_error(p, y, average="none"),
    ),
    "FPR": (
        lambda: metrics.FPRAtTPR(tpr=0.8),
        lambda n=N: (score_batch(n)[0], torch.randint(2, (n,))),
        lambda u, e: measures.fpr_at_tpr(u, e, tpr=0.8),
    ),
    "AUROC": (
        metrics.DetectionAUROC,
        lambda n=N: (score_batch(n)[0], torch.randint(2, (n,))),
        auroc,
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
        for value in result.values() if isinstance(result, dict) else [result]:
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
    metric = metrics.MultilabelCalibrationError(1, n_bins=bins, binning="mass")
    rounded = ((probs.sqrt().asin() * 2 / math.pi * FINE_BINS).floor() + 0.5) / FINE_BINS
    rounded = (rounded.clamp_max(1) * math.pi / 2).sin().square()
    exact = calibration_error(rounded, labels, n_bins=bins, binning="mass")
    assert fed(metric, data).item() == pytest.approx(exact.item(), abs=math.pi / 2 / FINE_BINS)


def test_equal_mass_separates_small_probabilities():
    # Bins of equal width in p would hold all of these in one.
    probs = torch.linspace(1e-5, 2e-4, 400, dtype=torch.float64).unsqueeze(1)
    metric = metrics.MultilabelCalibrationError(1, n_bins=4, binning="mass")
    metric.update(probs, torch.zeros(400, 1))
    counts = metric._histogram()[0, 0]
    assert (counts - 100).abs().max() <= 20


# ------------------------------------------------------- in the company of torchmetrics and Lightning


def test_one_order_of_arguments_serves_a_whole_collection():
    u, wrong = torch.rand(N), torch.randint(2, (N,))
    collection = MetricCollection(
        [metrics.AURC(), metrics.DetectionAUROC(), metrics.SpearmanCorrelation()]
    )
    expected = [risk_coverage(u, wrong).aurc, auroc(u, wrong), spearman(u, wrong)]
    for args, kwargs in (((u, wrong), {}), ((), {"errors": wrong, "uncertainty": u})):
        collection.reset()
        for part in (slice(0, 20), slice(20, N)):
            given = [x[part] for x in args]
            collection.update(*given, **{name: x[part] for name, x in kwargs.items()})
        same(list(collection.compute().values()), expected)


def test_graded_errors_do_not_reach_the_auroc_by_a_collection():
    collection = MetricCollection([metrics.AURC(), metrics.DetectionAUROC()])
    collection.update(torch.rand(3), torch.tensor([0.0, 1.0, 1.0]))
    collection.update(
        torch.rand(3), torch.tensor([0.2, 1.0, 0.0])
    )  # only the first one looks at it
    with pytest.raises(ValueError, match="Expected `errors` to hold only 0 and 1, but got 0"):
        collection.compute()


def test_collection_keeps_thresholds_apart():
    made = {"low": metrics.SampleJaccard(threshold=0.2), "high": metrics.SampleJaccard()}
    collection = MetricCollection(made)
    collection.update(torch.tensor([[0.9, 0.1]]), torch.tensor([[1, 0]]))  # equal so far
    collection.update(torch.tensor([[0.3, 0.1]]), torch.tensor([[1, 0]]))
    assert {name: float(value) for name, value in collection.compute().items()} == {
        "low": 1,
        "high": 0.5,
    }


def test_predictions_and_their_unknown_labels_go_through_a_collection():
    probs, labels = random_predictions()
    unknown = torch.rand(N, Q) < 0.3
    collection = MetricCollection(
        [
            metrics.MultilabelCalibrationError(Q),
            metrics.MultilabelBrierDecomposition(Q),
            metrics.SampleJaccard(),
        ]
    )
    collection.update(probs, labels, unknown=unknown)
    result = collection.compute()
    same(result.pop("MultilabelCalibrationError"), calibration_error(probs, labels, unknown))
    same(result.pop("SampleJaccard"), sample_jaccard(probs, labels, unknown).nanmean())
    same(result, brier_decomposition(probs, labels, unknown)._asdict())
    assert all(value.dim() == 0 for value in result.values())  # what `log_dict` takes


def test_bootstrap_and_tracker_take_every_metric(case):
    build, make, _ = case
    metric, data = build(), make()
    one = metric["brier"] if isinstance(metric, metrics.MultilabelBrierDecomposition) else metric
    bootstrap = BootStrapper(one, num_bootstraps=3, sampling_strategy="multinomial")
    bootstrap.update(*data)
    assert all(value.isfinite().all() for value in bootstrap.compute().values())
    tracker = MetricTracker(metric)  # which needs `higher_is_better`
    for batch in (data, make()):
        tracker.increment()
        tracker.update(*batch)
    if one is metric and metric.compute_with_cache and tracker.compute().dim() == 0:
        best, _step = tracker.best_metric(return_step=True)
        choose = max if metric.higher_is_better else min
        assert best == choose(tracker.compute_all().tolist())


def test_parts_of_the_score_never_stand_under_the_names_of_labels():
    data, names = random_predictions(), ["a", "b", "c"]
    metric = metrics.MultilabelBrierDecomposition(Q, average="none")
    whole = ClasswiseWrapper(metric, labels=names)
    whole.update(*data)
    with pytest.raises(TypeError, match="take one part: ClasswiseWrapper"):
        whole.compute()
    with pytest.raises(TypeError, match="take one part: ClasswiseWrapper"):
        whole(*data)
    metric.reset()
    for part, expected in brier_decomposition(*data, average="none")._asdict().items():
        wrapper = ClasswiseWrapper(copy.deepcopy(metric)[part], labels=names, prefix=f"{part}_")
        wrapper.update(*data)
        same(
            wrapper.compute(),
            {f"{part}_{n}": x for n, x in zip(names, expected, strict=True)},
        )
    error = ClasswiseWrapper(metrics.MultilabelCalibrationError(Q, average="none"), labels=names)
    expected = calibration_error(*data, average="none")
    same(list(error(*data).values()), list(expected))


def test_every_metric_draws_itself(case):
    build, make, _ = case
    metric = build()
    values = [metric(*make()) for _ in range(3)]
    axes = Figure().subplots()
    metric.plot(ax=axes)
    assert axes.get_ylabel() == type(metric).__name__
    assert axes.has_data()
    if getattr(metric, "average", None) != "none" or isinstance(values[0], torch.Tensor):
        several = Figure().subplots()
        metric.plot(values, ax=several)
        assert len(several.lines[0].get_xdata()) == 3


def test_lightning_logs_them(tmp_path):
    import lightning

    data = random_predictions()
    u, wrong = torch.rand(N), torch.randint(2, (N,))

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.aurc, self.brier = metrics.AURC(), metrics.MultilabelBrierDecomposition(Q)
            self.both = MetricCollection([metrics.DetectionAUROC(), metrics.SpearmanCorrelation()])

        def test_step(self, rows):
            self.aurc.update(u[rows], wrong[rows])
            self.both.update(u[rows], wrong[rows])
            self.brier.update(*(x[rows] for x in data))
            self.log("aurc", self.aurc)
            self.log_dict(self.both)

        def on_test_epoch_end(self):
            self.log_dict(self.brier.compute())

    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        barebones=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader(torch.arange(N), batch_size=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of workers and devices
        [logged] = trainer.test(Module(), loader, verbose=False)
    expected = brier_decomposition(*data)._asdict()
    expected |= {"aurc": risk_coverage(u, wrong).aurc, "DetectionAUROC": auroc(u, wrong)}
    expected["SpearmanCorrelation"] = spearman(u, wrong)
    assert logged == pytest.approx({name: float(x) for name, x in expected.items()}, rel=1e-5)


# ------------------------------------------------------------------------------------- unknown labels


def whole(unknown, shape):
    """A mask of some entries, of whole samples, and of a whole label."""
    mask = torch.rand(shape) < 0.3
    mask[:3], mask[:, 0] = True, mask[:, 0] | (unknown == "a label")
    return mask


def spoilt(probs, labels, unknown, value):
    return probs.masked_fill(unknown, value), labels.double().masked_fill(unknown, value)


@pytest.mark.parametrize("which", ["entries", "a label"])
@pytest.mark.parametrize("value", [NAN, -1.0, 7.0])
def test_what_is_unknown_is_left_out_exactly(case, which, value):
    build, make, function = case
    if not isinstance(build(), OfPredictions):
        return
    probs, labels = make()
    unknown = whole(which, probs.shape)
    given = *spoilt(probs, labels, unknown, value), unknown
    # label by label, each with its own samples
    metric = build()
    columns = [
        (probs[~out, q : q + 1], labels[~out, q : q + 1])
        for q, out in enumerate(unknown.T)
        if not out.all()
    ]
    if isinstance(metric, metrics.SampleJaccard):
        rows = [(p[~out][None], y[~out][None]) for p, y, out in zip(*given, strict=True)]
        expected = torch.stack([function(p, y) for p, y in rows if p.numel()]).mean()
    elif metric.average == "macro":
        parts = [function(*column) for column in columns]
        expected = torch.utils._pytree.tree_map(lambda *x: torch.stack(x).mean(), *parts)
    else:
        parts = [function(*column) for column in columns]
        gap = [torch.full((unknown.all(0).sum(),), NAN, dtype=torch.float64)]
        expected = torch.utils._pytree.tree_map(lambda *x: torch.cat([*gap, *x]), *parts)
    same(fed(metric, given), expected)
    same(fed(build(), *parts_of(given, [20, 37])), expected)
    same(metric(*given), expected)
    same(fed(build(), (*given[:2], unknown)), expected)


def test_functions_leave_out_what_is_unknown():
    for probs, labels in (random_predictions(), coarse_predictions()):
        unknown = whole("entries", probs.shape)
        given = *spoilt(probs, labels, unknown, NAN), unknown
        scores = sample_jaccard(*given, threshold=0.4)
        for row, score in enumerate(scores):
            known = ~unknown[row]
            alone = sample_jaccard(probs[row, known][None], labels[row, known][None], threshold=0.4)
            torch.testing.assert_close(
                score, alone[0] if known.any() else score * NAN, equal_nan=True
            )
        for binning in BINNINGS:
            settings = {"n_bins": 4, "binning": binning, "average": "none"}
            for q in range(Q):
                column = probs[~unknown[:, q], q : q + 1], labels[~unknown[:, q], q : q + 1]
                for norm in NORMS:
                    whole_ = calibration_error(*given, **settings, norm=norm)
                    same(whole_[q : q + 1], calibration_error(*column, **settings, norm=norm))
                for part, alone in zip(
                    brier_decomposition(*given, **settings),
                    brier_decomposition(*column, **settings),
                    strict=True,
                ):
                    same(part[q : q + 1], alone)


# ---------------------------------------------------------------- values that are not looked at


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_what_is_not_finite_enters_no_state_unchecked(value):
    probs, labels = random_predictions()
    wrong = torch.rand(N, Q) < 0.2
    checked = {"validate_args": False}
    for metric in (
        metrics.MultilabelCalibrationError(Q, **checked),
        metrics.MultilabelCalibrationError(Q, binning="mass", **checked),
        metrics.MultilabelBrierDecomposition(Q, **checked),
        metrics.SampleJaccard(**checked),
    ):
        expected = fed(metric, (probs, labels, wrong))
        for poisoned in (
            (probs.masked_fill(wrong, value), labels),
            (probs, labels.double().masked_fill(wrong, value)),
        ):
            metric.reset()
            same(fed(metric, poisoned), expected)
    u, e = score_batch()
    e, bad = (e > 1).double(), wrong[:, 0]
    for build in (metrics.AURC, metrics.DetectionAUROC, metrics.SpearmanCorrelation):
        expected = fed(build(), (u[~bad], e[~bad]))
        for poisoned in ((u.masked_fill(bad, value), e), (u, e.masked_fill(bad, value))):
            same(fed(build(**checked), poisoned), expected)


def test_unchecked_labels_are_present_above_a_half():
    probs, labels = random_predictions()
    smooth = labels * 0.8 + 0.1
    for function in (calibration_error, sample_jaccard):
        same(function(probs, smooth, validate_args=False), function(probs, labels))
    metric = metrics.MultilabelCalibrationError(Q, validate_args=False)
    same(fed(metric, (probs, smooth)), calibration_error(probs, labels))
    u, wrong = torch.rand(N), torch.randint(2, (N,))
    same(auroc(u, wrong * 0.8 + 0.1, validate_args=False), auroc(u, wrong))


def test_update_looks_at_no_value_unchecked(case):
    build, make, _ = case
    metric = build().to("meta")  # where every look at a value raises
    for _ in range(2):
        metric.update(*(x.to("meta") for x in make()))
    state = metric.metric_state
    assert all(
        x.is_meta for part in state.values() for x in (part if isinstance(part, list) else [part])
    )


# ------------------------------------------------------------------------- precision and devices


def states(metric):
    every = metric.metric_state.values()
    return [x for part in every for x in (part if isinstance(part, list) else [part])]


@pytest.mark.parametrize(
    "convert", [lambda m: m.to(torch.bfloat16), lambda m: torch.nn.ModuleList([m]).half()[0]]
)
def test_state_keeps_its_precision_when_the_model_changes(case, convert):
    build, make, function = case
    data = make()
    first, second = parts_of(data, [40, 17])
    metric = build()
    metric.update(*first)
    same(fed(convert(metric), second), function(*data))
    assert all(x.dtype in (torch.float64, torch.int64) for x in states(metric))


def test_state_is_float32_where_there_is_no_float64(case, monkeypatch):
    build, make, function = case
    data = make()
    first, second = parts_of(data, [40, 17])
    metric = build()
    metric.update(*first)
    rooms = ("predictions", "ranking", "selective", "table")
    for module in (
        "_inputs",
        "_base",
        "_binning",
        "_smoothing",
        *(f"functional.{r}" for r in rooms),
    ):
        monkeypatch.setattr(f"uncertainty_mm.metrics.{module}.precision", lambda _: torch.float32)
    metric.to("cpu")
    metric.update(*second)
    assert all(x.dtype in (torch.float32, torch.int64) for x in states(metric))
    result = metric.compute()
    for value in result.values() if isinstance(result, dict) else [result]:
        assert value.dtype == torch.float32
    torch.testing.assert_close(
        result, function(*data), check_dtype=False, rtol=1e-4, atol=1e-5, equal_nan=True
    )


def test_metric_of_the_meta_device_is_as_new_after_to_empty(case):
    build, make, function = case
    with torch.device("meta"):
        metric = build()
    data = make()
    same(fed(metric.to_empty(device="cpu"), data), function(*data))
    metric.reset()
    same(fed(metric, data), function(*data))


def test_default_device_has_no_influence(case):
    build, make, function = case
    data, metric = make(), build()
    expected = function(*data)
    with torch.device("meta"):
        same(function(*data), expected)
        same(fed(metric, data), expected)


def test_batch_is_copied(case):
    build, make, function = case
    data, metric = [x.double() for x in make()], build()
    expected = function(*data)
    metric.update(*data)
    for x in data:
        x.zero_()
    same(metric.compute(), expected)


# ------------------------------------------------------------------------------------ the whole table


def by_scikit_learn(probs, labels, threshold, unknown):
    """The measures of `evaluate`, sample by sample and label by label."""
    known, said = ~unknown, probs > threshold
    decisions = said[known].numpy()
    truth = labels[known].numpy()
    columns = [(probs[k, q], labels[k, q]) for q, k in enumerate(known.T) if k.any()]
    rows = [i for i, k in enumerate(known) if k.any()]
    jaccard = [
        (said[i] & labels[i].bool() & known[i]).sum()
        / ((said[i] | labels[i].bool()) & known[i]).sum().clamp_min(1)
        for i in rows
    ]
    pairs = [(probs[i, known[i]], labels[i, known[i]]) for i in rows]
    error = torch.stack([(p - y).abs().mean() for p, y in pairs])
    uncertainty = torch.stack([predictive_entropy(p[None])[0] / len(p) for p, _ in pairs])
    ece = [calibration_error(p[:, None], y[:, None]) for p, y in columns]
    return {
        "Acc": float(torch.stack(jaccard).mean()),
        "P": precision_score(truth, decisions, zero_division=0),
        "R": recall_score(truth, decisions, zero_division=0),
        "miF1": f1_score(truth, decisions, zero_division=0),
        "mAP": np.mean(
            [average_precision_score(y.numpy(), p.numpy()) for p, y in columns if y.any()]
        ),
        "Brier": brier_score_loss(truth, probs[known].numpy()),
        "ECE": float(torch.stack(ece).mean()),
        "AURC": float(risk_coverage(uncertainty, error).aurc),
        "rho": spearmanr(uncertainty.numpy(), error.numpy()).statistic,
    }


@pytest.mark.parametrize("make", [random_predictions, coarse_predictions])
@pytest.mark.parametrize("threshold", [0.4, torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)])
@pytest.mark.parametrize("share", [0, 0.4])
def test_evaluate_equals_scikit_learn(make, threshold, share):
    probs, labels = make()
    unknown = torch.rand(N, Q) < share
    unknown[0] = share > 0
    expected = by_scikit_learn(probs, labels, threshold, unknown)
    given = spoilt(probs, labels, unknown, NAN)
    assert evaluate(*given, threshold, unknown) == pytest.approx(expected, abs=5.1e-5)
    if not share:
        assert evaluate(probs, labels, threshold) == pytest.approx(expected, abs=5.1e-5)
        order = predictive_entropy(probs)
        close(risk_coverage(order, (probs - labels).abs().mean(1)).aurc, expected["AURC"])


def test_evaluate_of_what_does_not_exist_is_none():
    probs, labels = torch.rand(4, Q), torch.zeros(4, Q)
    assert evaluate(probs, labels, 0.5)["mAP"] is None  # a label that nobody has
    labels[:, 1] = 1
    assert evaluate(probs, labels, 0.5)["mAP"] == 1
    nothing = evaluate(probs, labels, 0.5, torch.ones(4, Q, dtype=torch.bool))
    assert nothing == dict.fromkeys(nothing)
    assert evaluate(torch.zeros(0, Q), torch.zeros(0, Q), 0.5) == nothing
    assert list(nothing) == ["Acc", "P", "R", "miF1", "mAP", "Brier", "ECE", "AURC", "rho"]


def test_sample_without_labels_counts_nothing_in_acc_alone():
    labels = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 0], [0, 1], [0, 0]])
    table = evaluate(labels * 0.8 + 0.1, labels, 0.5)
    assert [table[name] for name in ("Acc", "P", "R", "miF1")] == [0.8333, 1, 1, 1]


# --------------------------------------------------------------------- limiting cases and errors


def test_one_sample():
    probs, labels = torch.tensor([[0.2]]), torch.tensor([[1]])
    for binning in BINNINGS:
        close(calibration_error(probs, labels, binning=binning), 0.8, torch.float32)
        parts = brier_decomposition(probs, labels, binning=binning)
        close(parts.brier, 0.64, torch.float32)
        close(parts.uncertainty, 0)
    close(risk_coverage(torch.tensor([3.0]), torch.tensor([0.5])).aurc, 0.5)
    assert spearman(torch.tensor([1.0]), torch.tensor([2.0])).isnan()


def test_what_does_not_exist_is_nan_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spearman(torch.ones(N), torch.rand(N)).isnan()
        assert spearman(torch.ones(N), torch.ones(N)).isnan()
        assert auroc(torch.rand(3), torch.zeros(3)).isnan()
        assert auroc(torch.rand(3), torch.ones(3)).isnan()
        assert fed(metrics.DetectionAUROC(), (torch.rand(3), torch.ones(3))).isnan()


def test_constant_scores():
    close(auroc(torch.ones(11), torch.arange(11) < 4), 0.5)
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


# ------------------------------------------------------------------------------------ bad input

PROBS, LABELS = torch.full((3, Q), 0.25), torch.eye(3).long()
SCORES, WRONG = torch.tensor([0.1, 0.5, 0.3]), torch.tensor([0, 1, 0])
UNKNOWN = torch.zeros(3, Q, dtype=torch.bool)

OF_PREDICTIONS = {
    "calibration_error": calibration_error,
    "brier_decomposition": brier_decomposition,
    "sample_jaccard": sample_jaccard,
    "evaluate": lambda *given: evaluate(*given[:2], 0.5, *given[2:]),
    "ece": metrics.MultilabelCalibrationError(Q, n_bins=4),
    "mass": metrics.MultilabelCalibrationError(Q, n_bins=4, binning="mass"),
    "brier": metrics.MultilabelBrierDecomposition(Q, n_bins=4),
    "smooth_calibration_error": measures.smooth_calibration_error,
    "smooth": metrics.MultilabelSmoothCalibrationError(Q),
    "jaccard": metrics.SampleJaccard(threshold=0.2),
}
OF_SCORES = {
    "auroc": auroc,
    "risk_coverage": risk_coverage,
    "spearman": spearman,
    "augrc": measures.augrc,
    "fpr_at_tpr": measures.fpr_at_tpr,
    "risk_at_coverage": lambda u, e: measures.risk_at_coverage(u, e, 0.5),
    "coverage_at_risk": lambda u, e: measures.coverage_at_risk(u, e, 0.5),
    "aurc": metrics.AURC(),
    "detection": metrics.DetectionAUROC(),
    "rank": metrics.SpearmanCorrelation(),
}
HOW = [lambda call: call, lambda call: getattr(call, "update", call)]  # a metric both ways
BAD_PREDICTIONS = [
    ((-PROBS, LABELS), ValueError, r"`probs` to be in \[0, 1\], but got -0.25"),
    ((PROBS * 8, LABELS), ValueError, r"`probs` to be in \[0, 1\], but got 2.0"),
    ((PROBS * NAN, LABELS), ValueError, r"`probs` to be in \[0, 1\], but got nan"),
    ((PROBS, LABELS * 2), ValueError, "`labels` to hold only 0 and 1, but got 2"),
    ((PROBS, -LABELS), ValueError, "`labels` to hold .* but got -1; mark .* in `unknown`"),
    ((PROBS, LABELS * NAN), ValueError, "`labels` to hold .* but got nan; mark .* in `unknown`"),
    ((PROBS, LABELS[:2]), ValueError, r"`labels` to have shape \(N=3, Q=3\), but got \(2, 3\)"),
    ((PROBS, LABELS.to("meta")), ValueError, "`labels` to be on cpu, but got meta"),
    ((LABELS, LABELS), TypeError, "`probs` to have a floating dtype .*, but got torch.int64"),
    ((PROBS[0], LABELS[0]), ValueError, r"`probs` to have shape \(N, Q(=3)?\), but got \(3,\)"),
    ((PROBS, LABELS, LABELS), TypeError, "`unknown` to have a bool dtype, but got torch.int64"),
    ((PROBS, LABELS, UNKNOWN[:, 0]), ValueError, "`unknown` to have shape .* but got"),
]
BAD_SCORES = [
    ((SCORES * NAN, WRONG), ValueError, "`uncertainty` to be finite, but got 3 NaN"),
    ((SCORES, SCORES / 0), ValueError, "`errors` to be finite, but got 3 NaN"),
    ((SCORES, WRONG[:2]), ValueError, r"`errors` to have shape \(N=3\), but got \(2,\)"),
    ((PROBS, WRONG), ValueError, r"`uncertainty` to have shape \(N\), but got \(3, 3\)"),
    ((SCORES, WRONG.to("meta")), ValueError, "`errors` to be on cpu, but got meta"),
    (([0.5], WRONG), TypeError, "`uncertainty` to be a tensor, but got list"),
    ((SCORES, WRONG + 0j), TypeError, "`errors` to have a number dtype, but got torch.complex64"),
]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("calls", "good", "bad"),
    [
        *((OF_PREDICTIONS, (PROBS, LABELS), bad) for bad in BAD_PREDICTIONS),
        *((OF_SCORES, (SCORES, WRONG), bad) for bad in BAD_SCORES),
    ],
)
def test_bad_input_is_refused_and_leaves_the_state_as_it_was(calls, good, bad, how):
    given, error, message = bad
    for call in calls.values():
        before = None
        if isinstance(call, Metric):
            call.reset()
            call.update(*good)
            before = copy.deepcopy(call.metric_state)
        with pytest.raises(error, match=f"^Expected {message}"):
            how(call)(*given)
        if before:
            torch.testing.assert_close(call.metric_state, before, rtol=0, atol=0)


BAD = [
    Bad("labels", lambda m: m.update(PROBS[:, :2], LABELS[:, :2]), ValueError, r"`probs` .*Q=3\)"),
    Bad("auroc", lambda _: auroc(SCORES, SCORES), ValueError, r"`errors` to hold only 0 and 1"),
    Bad("detect", lambda _: OF_SCORES["detection"](SCORES, SCORES), ValueError, "`errors` to hold"),
    Bad("entropy", lambda _: predictive_entropy(-PROBS), ValueError, r"`probs` to be in \[0, 1\]"),
    Bad("entropy", lambda _: predictive_entropy(SCORES), ValueError, r"`probs` to have shape"),
    Bad(
        "size", lambda _: modality_attribution(PROBS * 0), ValueError, "`sizes` to be above 0, but"
    ),
    Bad("size", lambda _: modality_attribution(PROBS * NAN), ValueError, "`sizes` to be finite"),
    Bad(
        "missing",
        lambda _: modality_attribution(PROBS, UNKNOWN[:, :2]),
        ValueError,
        r"`missing` to have shape \(B=3, M=3\), but got \(3, 2\)",
    ),
    *(
        Bad(
            name,
            lambda _, call=call: call(threshold=2),
            ValueError,
            "`threshold` to be a number in",
        )
        for name, call in (
            ("jaccard", lambda **given: sample_jaccard(PROBS, LABELS, **given)),
            ("evaluate", lambda **given: evaluate(PROBS, LABELS, **given)),
            ("SampleJaccard", metrics.SampleJaccard),
        )
    ),
    *(
        Bad(
            f"threshold {name}",
            lambda _, given=given: evaluate(PROBS, LABELS, given),
            ValueError,
            rf"`threshold` to {message}",
        )
        for name, given, message in (
            ("nan", NAN, r"be a number in \[0, 1\], but got nan"),
            ("of others", torch.zeros(2), r"have shape \(Q=3\), but got \(2,\)"),
            ("out of range", torch.full((Q,), 1.5), r"be in \[0, 1\], but got 1.5"),
        )
    ),
    *(
        Bad(
            str(settings),
            lambda _, call=call, s=settings: call(**s),
            error,
            f"`{next(iter(settings))}` to",
        )
        for settings, error in (
            ({"n_bins": 0}, ValueError),
            ({"n_bins": 2.0}, TypeError),
            ({"binning": "quantile"}, ValueError),
            ({"norm": "l3"}, ValueError),
            ({"average": "micro"}, ValueError),
            ({"validate_args": 1}, TypeError),
        )
        for call in (
            lambda **given: calibration_error(PROBS, LABELS, **given),
            lambda **given: metrics.MultilabelCalibrationError(Q, **given),
        )
    ),
    Bad(
        "no label", lambda _: metrics.MultilabelBrierDecomposition(0), ValueError, "`num_labels` to"
    ),
    Bad("excess", lambda _: metrics.AURC(excess=1), TypeError, "`excess` to be True or False"),
    Bad(
        "flag", lambda _: metrics.SampleJaccard(validate_args="no"), TypeError, "`validate_args` to"
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_settings_are_refused(bad):
    with pytest.raises(bad.error, match=f"^Expected {bad.message}"):
        bad.call(metrics.MultilabelCalibrationError(Q))


def test_settings_stay_as_they_were_made():
    metric = metrics.MultilabelCalibrationError(Q)
    for name in ("norm", "n_bins", "binning", "average", "num_labels", "validate_args"):
        with pytest.raises(AttributeError, match=f"`{name}` is a setting of Multilabel"):
            setattr(metric, name, "maen")


def test_all_measures_are_in_float64():
    data = [x.float() for x in random_predictions()]
    assert calibration_error(*data).dtype == torch.float64
    assert predictive_entropy(data[0]).dtype == torch.float64
    assert measures.spearman(data[0][:, 0], data[1][:, 0]).dtype == torch.float64
