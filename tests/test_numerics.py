"""Overflow, underflow and cancellation: values and gradients at the ends of the range, against float64 or closed forms.

docs/laboratory/numerics.md lists every such place of the library and the test that watches it, here or next to the
component.
"""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cases import CASES, FUNCTIONS, plain_divergence, plain_rank, plain_supcon, weighted
from support import HALF, close, gradient
from uncertainty_mm import (
    CorrectnessTracker,
    DiagonalGaussian,
    DistributionSupConLoss,
    SoftRankOrdinalityLoss,
    UncertaintyGatedFusion,
    functional,
    metrics,
)
from uncertainty_mm.data import SyntheticMMER
from uncertainty_mm.data._sequences import stack
from uncertainty_mm.metrics import functional as measures

DTYPES = (torch.float32, *HALF)
ALL = torch.zeros(9, dtype=torch.bool)  # the mask that leaves nothing out

in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def near(function, plain, *inputs, dtype=torch.float32):
    """Value and gradient are finite and near those of `plain` in float64, measured by the largest entry."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    value, expected = function(*inputs), plain(*doubles)
    grads = gradient(weighted([value]), *inputs), gradient(weighted([expected]), *doubles)
    for x, y in zip((value, *grads[0]), (expected, *grads[1]), strict=True):
        assert x.isfinite().all()
        size = y.detach().abs().max().item() or 1.0
        close(x.detach().double() / size, y.detach() / size, dtype)


# -------------------------------------------------------------------------------- contrastive loss


def loss_of(classes, temperature, bank=None, bank_classes=None):
    def loss(rows):
        keys = rows[:0] if bank is None else bank.to(rows.dtype)
        of_keys = classes[:0] if bank is None else bank_classes
        return functional.supcon_loss(
            rows, classes, bank=keys, bank_classes=of_keys, temperature=temperature
        )

    def plain(rows):
        keys = rows[:0] if bank is None else bank.to(rows.dtype)
        of_keys = classes[:0] if bank is None else bank_classes
        return plain_supcon(None, rows, classes, keys, of_keys, temperature)

    return loss, plain


@in_every_dtype
@pytest.mark.parametrize("temperature", [0.005, 100.0])
def test_supcon_at_the_ends_of_the_temperature(dtype, temperature):
    rows = F.normalize(torch.randn(12, 6), dim=1)
    bank = F.normalize(torch.randn(7, 6), dim=1).to(dtype)
    functions = loss_of(torch.arange(12) % 4, temperature, bank, torch.arange(7) % 3 - 1)
    near(*functions, rows, dtype=dtype)


@in_every_dtype
def test_supcon_of_identical_rows_is_the_log_of_their_number(dtype):
    rows = torch.full((12, 4), 0.5, dtype=dtype, requires_grad=True)
    loss = functional.supcon_loss(rows, torch.arange(12) % 3, temperature=0.005)
    close(loss, math.log(11))
    close(*gradient(loss, rows), torch.zeros(12, 4), torch.float32)


@in_every_dtype
def test_sums_and_counts_of_a_class_leave_the_range_of_half_precision(dtype):
    # 3000 rows of 30: their sum is beyond float16, their number is no bfloat16
    rows = torch.full((3000, 2), 30.0, dtype=dtype)
    loss = functional.supcon_loss(rows, torch.zeros(3000, dtype=torch.long), temperature=1e3)
    close(loss, math.log(2999), torch.float32)


def test_supcon_of_rows_of_very_different_lengths():
    rows = F.normalize(torch.randn(12, 6), dim=1)
    rows[0] *= 100  # taken off the sum of its class again, which leaves rounding of its own size
    near(*loss_of(torch.arange(12) % 4, 1.0), rows)


def test_supcon_of_similarities_below_any_other():
    # 1e32 and -1e32 in float32. With rows e0, e1 = e2 the loss is (e0 (e1 + e2) / 2 - 2 e0 e1 + e1 e2) / 2, as
    # softmaxes are (1/2, 1/2) and (0, 1).
    rows = (torch.tensor([[1.0], [-1.0], [-1.0]]) * 1e16).requires_grad_()
    loss = functional.supcon_loss(rows, torch.tensor([0, 0, 1]), temperature=1.0)
    close(loss / 1e32, 1.0)
    close(gradient(loss, rows)[0] / 1e16, [[0.5], [-1.25], [-0.25]])


@in_every_dtype
@pytest.mark.parametrize(("mean", "std"), [(1e-6, 1e-6), (1e-3, 6e4), (6e4, 1e-3)])
def test_contrastive_loss_of_gaussians_of_any_size(dtype, mean, std):
    parts = mean * torch.randn(4, 2, 3, 5).clamp(-1, 1), std * (0.5 + torch.rand(4, 2, 3, 5) / 2)
    latent = DiagonalGaussian(*(x.to(dtype).requires_grad_() for x in parts))
    labels = torch.randint(2, (4, 3))
    loss = DistributionSupConLoss(2, 3, 5, temperature=0.005)
    result = loss(latent, labels, enqueue=False)
    expected = loss(DiagonalGaussian(*(x.detach().double() for x in latent)), labels)
    close(result, expected, dtype)
    if dtype != torch.float16:  # gradients are up to 2 / (0.005 * size), beyond it
        assert all(x.isfinite().all() for x in gradient(result, *latent))


# --------------------------------------------------------------------------------------- Gaussians


@pytest.mark.parametrize(
    ("dtype", "std"),
    [(torch.float16, std) for std in (1e-3, 1.0, 1e3)]  # 1 / std, the gradient, is one as well
    + [(dtype, std) for dtype in (torch.float32, torch.bfloat16) for std in (1e-6, 1.0, 1e6)],
)
def test_properties_of_a_gaussian_at_the_ends_of_the_range(dtype, std):
    def kl(mean, std):
        return DiagonalGaussian(mean, std).kl_to_standard_normal()

    def plain_kl(mean, std):
        return 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum(-1)

    stds = std * (0.5 + torch.rand(3, 5))
    near(kl, plain_kl, torch.randn(3, 5), stds, dtype=dtype)
    near(lambda s: DiagonalGaussian(s, s).log_var, lambda s: 2 * s.log(), stds, dtype=dtype)
    near(lambda s: DiagonalGaussian(s, s).variance, torch.square, stds, dtype=dtype)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_kl_near_the_prior_keeps_its_digits(distance):
    # of 1 + 1e-4 the variance, 1 and the logarithm cancel to 2e-8; it is 1 + 1e-4 as float32 rounds it
    std = torch.full((8,), 1 + distance)
    exact = std.double() - 1
    expected = 8 * 0.5 * (exact * (exact + 2) - 2 * torch.log1p(exact))[0]
    kl = DiagonalGaussian(torch.zeros(8), std).kl_to_standard_normal()
    assert kl.item() == pytest.approx(expected.item(), rel=2e-3)


@in_every_dtype
@pytest.mark.parametrize(("mean", "std"), [(1.0, 1e-4), (1e-4, 1.0), (6e4, 6e4)])
def test_joint_embedding_of_unequal_sizes(dtype, mean, std):
    def joint(mean, std):
        return DiagonalGaussian(mean, std).embedding("joint")

    parts = mean * torch.randn(3, 5).clamp(-1, 1), std * (0.5 + torch.rand(3, 5) / 2)
    near(joint, lambda *x: F.normalize(torch.cat(x, -1), dim=-1), *parts, dtype=dtype)


def test_embedding_of_sizes_whose_squares_leave_the_range():
    parts = 1e30 * torch.randn(3, 5), 1e25 * (0.5 + torch.rand(3, 5))
    plain = FUNCTIONS["distribution_embedding"].plain
    near(functional.distribution_embedding, lambda *x: plain(None, *x), *parts)


# --------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("name", ["EmotionQueryAttention", "EmotionQueryAttention (weights)"])
def test_attention_scores_of_10000(name):
    case = CASES[name]
    module, inputs = case.build(scale=1e4), case.inputs(0)
    expected = case.expected(copy.deepcopy(module), inputs)
    results = case.results(module, inputs)
    close(results[0], expected[0])
    largest = max(x.abs().max() for x in expected)
    for x, y in zip(
        results, expected, strict=True
    ):  # the fused kernel leaves 3 digits of a gradient
        assert (x - y).abs().max() <= 1e-3 * largest


# ------------------------------------------------------------------------------------------ fusion


def mixture(a, b, weight):
    """Logits of heads that answer a and b to everything, and gradients of a, b and the weight."""
    fusion = UncertaintyGatedFusion(1, 1, 1, hidden_dim=1, dropout=0, mean_weight="uncertainty")
    for head, logit in ((fusion.mean_head, a), (fusion.std_head, b)):
        torch.nn.init.zeros_(head[-1].weight)
        torch.nn.init.constant_(head[-1].bias, logit)
    weight = torch.tensor([weight], requires_grad=True)
    latent = DiagonalGaussian(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    logits = fusion(latent, weight).logits
    biases = fusion.mean_head[-1].bias, fusion.std_head[-1].bias
    return logits.item(), *(x.item() for x in gradient(logits, *biases, weight))


@pytest.mark.parametrize("size", [1e4, 1e6])
@pytest.mark.parametrize("weight", [1e-6, 0.25, 1 - 2**-24])
def test_mixture_of_opposed_logits_is_the_weight(size, weight):
    weight = torch.tensor(weight).item()
    logits, mean, std, slope = mixture(size, -size, weight)
    assert logits == pytest.approx(math.log(weight / (1 - weight)), rel=1e-5)
    assert (mean, std) == (0, 0)
    assert slope == pytest.approx(1 / weight / (1 - weight), rel=1e-4)


@pytest.mark.parametrize("size", [-1e4, 1e4])
@pytest.mark.parametrize("weight", [0.0, 1e-6, 0.25, 1.0])
def test_mixture_of_equal_logits_is_their_value(size, weight):
    logits, mean, std, slope = mixture(size, size, weight)
    assert logits == size
    assert mean == pytest.approx(weight, rel=2e-3)  # logarithms of 1e4 leave 3 digits
    assert std == pytest.approx(1 - weight, rel=2e-3)
    assert slope == 0


@in_every_dtype
def test_distances_of_certain_probabilities(dtype):
    def probs():
        return torch.tensor([[0.0, 1.0, 0.0, 1.0]], dtype=dtype, requires_grad=True)

    p, labels = probs(), torch.tensor([[0, 1, 1, 0]])
    expected = functional.expected_distance(p)
    assert expected.tolist() == [[0, 0, 0, 0]]
    assert gradient(expected, p)[0].tolist() == [[2, -2, 2, -2]]
    distance = functional.prediction_distance(p, labels)
    assert distance.tolist() == [[0, 0, 1, 1]]
    assert gradient(distance, p)[0].tolist() == [[0, 0, -1, 1]]


# -------------------------------------------------------------------------------------- ordinality


@in_every_dtype
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e4])
def test_soft_rank_of_scores_of_any_size(dtype, size):
    near(functional.soft_rank, lambda s: plain_rank(s, 1, ALL), size * torch.randn(9), dtype=dtype)


def test_soft_rank_of_a_small_temperature_is_the_rank():
    scores = torch.tensor([3e38, -3e38, 1.0, 1.0], requires_grad=True)  # differences overflow
    ranks = functional.soft_rank(scores, 2e-38)
    assert ranks.tolist() == [4, 1, 2.5, 2.5]
    with pytest.raises(ValueError, match="`temperature`"):  # float32 rounds it to 0
        functional.soft_rank(scores, 1e-60)


@in_every_dtype
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_divergence_of_probabilities_down_to_zero(dtype, size):
    def plain(a, b):
        return plain_divergence(None, a, b, ALL)

    near(functional.ordinality_divergence, plain, *size * torch.randn(2, 9), dtype=dtype)


def test_divergence_of_nearly_equal_scores_keeps_its_digits():
    a = torch.randn(9)
    functions = functional.ordinality_divergence, lambda a, b: plain_divergence(None, a, b, ALL)
    near(*functions, a, a + 1e-2 * torch.randn(9), dtype=torch.float32)


@pytest.mark.parametrize("mode", ["rank", "standardized", "raw", "pearson"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_ordinality_of_any_size_with_certain_distances(mode, dtype, size):
    norms = (size * torch.linspace(0.5, 1, 8)).to(dtype)
    distance = (torch.arange(8) % 2).to(dtype)  # 0 and 1 alone
    correctness = torch.arange(8).to(dtype) / 7
    loss = SoftRankOrdinalityLoss(mode=mode, pairs=("SR", "DR"))

    def view(norms, distance):
        correct = correctness.to(norms.dtype)
        return loss(std_norm=norms, distance=distance, correctness=correct)

    near(view, view, norms, distance, dtype=dtype)  # the same in float64


# ------------------------------------------------------------------------------ counts and measures


def test_share_of_a_billion_predictions():
    tracker = CorrectnessTracker(1)
    many = 10**9
    state = tracker.state_dict()
    state["history"] = torch.tensor([[many // 4 * 2**32], [many], [many // 8]])
    tracker.load_state_dict(state)
    place = torch.tensor([0])
    for correct in (True, False, True):
        tracker.update(place, torch.tensor([correct]))
    assert tracker.counts(place).item() == many + 3
    assert tracker.forgetting_events(place).item() == many // 8 + 1
    assert tracker.history[0].item() == (many // 4 + 2) * 2**32
    close(tracker(place), [0.25])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_share_in_a_default_dtype_of_half_precision(dtype):
    tracker, place = CorrectnessTracker(1), torch.tensor([0])
    for correct in (True, True, False):
        tracker.update(place, torch.tensor([correct]))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        share = tracker(place)
    finally:
        torch.set_default_dtype(before)
    assert share.dtype == dtype
    close(share, [2 / 3])


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_histogram_counts_beyond_float32(binning):
    metric = metrics.MultilabelBrierDecomposition(1, n_bins=4, binning=binning)
    probs, labels = torch.tensor([[0.0], [1.0], [0.25], [1.0]]), torch.tensor([[0], [1], [0], [0]])
    metric.update(probs, labels)
    metric.sums = metric.sums * 10**9
    parts = metric.compute()
    assert parts["brier"].item() == pytest.approx((1 + 1 / 16) / 4, rel=1e-12)
    metric.update(probs, labels)
    assert metric.sums[0].sum().item() == 4 * 10**9 + 4


def test_jaccard_of_a_billion_samples():
    metric = metrics.SampleJaccard()
    metric.update(torch.tensor([[0.9]]), torch.tensor([[1]]))
    metric.total, metric.count = metric.total * 10**9, metric.count * 10**9
    metric.update(torch.tensor([[0.9]]), torch.tensor([[0]]))
    assert metric.count.item() == 10**9 + 1
    assert 1 - metric.compute().item() == pytest.approx(1e-9, rel=1e-6, abs=0)


def test_auroc_of_more_pairs_than_int32_counts():
    scores, errors = torch.arange(100_000).repeat(2), torch.arange(200_000) < 100_000
    assert measures.auroc(scores, errors).item() == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attribution_of_sizes_whose_squares_leave_the_range(dtype):
    limits = torch.finfo(dtype)
    sizes = torch.tensor([[limits.tiny, limits.max, 2 * limits.tiny]], dtype=dtype)
    close(measures.modality_attribution(sizes), [[0.8, 0.0, 0.2]])


def test_entropy_of_nearly_certain_labels():
    probs = torch.tensor([[1e-30], [1 - 2**-24]])
    expected = [1e-30 * (1 + 30 * math.log(10)), 2**-24 * (1 + 24 * math.log(2))]
    for x, y in zip(measures.predictive_entropy(probs).tolist(), expected, strict=True):
        assert x == pytest.approx(y, rel=1e-6, abs=0)


@pytest.mark.parametrize("noise", [1e-30, 1e-3, 1e3])
def test_posterior_of_5000_frames_and_a_prior_with_zeros(noise):
    prior = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0, 0.0, 0.0])
    world = SyntheticMMER(3, {"text": (5000, 4, 1.0)}, prior=prior, noise=(1e-3, 1e3))
    samples = world.sample(20, seed=0, noise=torch.full((20, 1), noise))
    posterior = world.posterior(samples)
    close(posterior.joint.sum(1), torch.ones(20))
    assert (posterior.joint[:, prior == 0] == 0).all()
    assert posterior.entropy.isfinite().all()
    if noise < 1:
        close(posterior.marginals, samples.labels, torch.float32)


def test_features_beyond_float32_become_infinite_without_a_warning():
    # of which the readers say what they left out; warnings are errors here
    rows = [np.full((2, 1), 1e300), np.zeros((3, 1))]
    features, lengths = stack(rows, Path("file"), "text")
    assert features.dtype == np.float32
    assert np.isinf(features[0, :2]).all()
    assert lengths.tolist() == [2, 3]
