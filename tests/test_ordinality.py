"""SoftRankOrdinalityLoss (Eq. 10-15), against lists of floats."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from cases import ordered
from support import HALF, close, gradient, poisoned, record_validate_args
from uncertainty_mm import SoftRankOrdinalityLoss

BATCH = 7
MODES = ["rank", "standardized", "raw", "pearson"]
AFFINE = ["rank", "standardized", "pearson"]  # unchanged by positive affine maps of a score
PAIRS = [("SR",), ("DR",), ("DS",), ("SR", "DR"), ("SR", "DR", "DS")]


def random_batch(n=BATCH, dtype=torch.float64):
    """Norms of std, distances and proportions of correct predictions."""
    return 0.5 + torch.rand(n, dtype=dtype), torch.rand(n, dtype=dtype), torch.rand(n, dtype=dtype)


def build(**settings):
    """With both views that receive a gradient."""
    return SoftRankOrdinalityLoss(**({"pairs": ("SR", "DR")} | settings))


def standardize(scores):
    n, mean = len(scores), sum(scores) / len(scores)
    spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / n)
    return [(s - mean) / spread if spread > 0 else 0.0 for s in scores]


def laplace(x):
    return 1 - math.exp(-x / 2) / 2 if x > 0 else math.exp(x / 2) / 2


def soft_rank_share(scores, temperature):
    """Soft ranks scaled from [1, n] to [0, 1]."""
    n = len(scores)
    ranks = [
        1 + sum(laplace((a - b) / temperature) for j, b in enumerate(scores) if j != i)
        for i, a in enumerate(scores)
    ]
    return [(rank - 1) / (n - 1) for rank in ranks]


def log_softmax(scores):
    top = max(scores)
    log_total = top + math.log(sum(math.exp(s - top) for s in scores))
    return [s - log_total for s in scores]


def naive_loss(std_norm, distance, correctness, mode="rank", pairs=("SR", "DR"), temperature=1.0):
    scores = {
        "S": [1 / s for s in std_norm.tolist()],
        "D": [1 - d for d in distance.tolist()],
        "R": correctness.tolist(),
    }
    for name, values in scores.items():
        if mode == "rank":
            scores[name] = soft_rank_share(standardize(values), temperature)
        elif mode == "standardized":
            scores[name] = [z / temperature for z in standardize(values)]
        elif mode == "pearson":
            scores[name] = standardize(values)
        else:
            scores[name] = [v / temperature for v in values]
    total = 0.0
    for pair in pairs:
        if mode == "pearson":
            total += 1 - sum(a * b for a, b in zip(*(scores[x] for x in pair), strict=True)) / len(
                scores["R"]
            )
            continue
        p, q = (log_softmax(scores[name]) for name in pair)
        total += sum((math.exp(a) - math.exp(b)) * (a - b) for a, b in zip(p, q, strict=True))
    return total


# ------------------------------------------------------------------------------------ the equations


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pairs", PAIRS)
def test_equals_the_lists(mode, pairs):
    batch = random_batch()
    loss = build(mode=mode, pairs=pairs)
    close(ordered(loss, *batch), naive_loss(*batch, mode=mode, pairs=pairs))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.1, 5.0])
def test_equals_the_lists_at_other_temperatures(mode, temperature):
    batch = random_batch()
    loss = build(mode=mode, temperature=temperature)
    close(ordered(loss, *batch), naive_loss(*batch, mode=mode, temperature=temperature))


def test_rank_of_s_against_r_is_the_default():
    batch = random_batch()
    expected = naive_loss(*batch, mode="rank", pairs=("SR",), temperature=1.0)
    close(ordered(SoftRankOrdinalityLoss(), *batch), expected)


def test_raw_is_equation_15_by_hand():
    # S = (2, 1), R = (1, 0), D = (1, 0): softmax of each is (e, 1) / (e + 1), so nothing diverges.
    half, one, zero = torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    loss = build(mode="raw")
    close(ordered(loss, half, zero, one), 0.0)
    # R reversed: both pairs cost 2 (p - q) log(p / q) with p = e / (e + 1), q = 1 / (e + 1).
    each = 2 * (math.e - 1) / (math.e + 1)
    close(ordered(loss, half, zero, zero), 2 * each)


@pytest.mark.parametrize("mode", MODES)
def test_scores_in_step_cost_nothing(mode):
    correctness = torch.rand(BATCH, dtype=torch.float64)
    std_norm, distance = 1 / (1 + correctness), 1 - correctness
    loss = build(mode=mode, pairs=("SR", "DR", "DS"))
    close(ordered(loss, std_norm, distance, correctness), 0.0)


@pytest.mark.parametrize("mode", AFFINE)
def test_reversed_scores_cost_more_than_ranked_ones(mode):
    correctness = torch.linspace(0, 1, BATCH, dtype=torch.float64)
    ranked, reverse = 1 / (1 + 5 * correctness), 1 / (6 - 5 * correctness)
    loss = build(mode=mode, pairs=("SR",))
    distance = 1 - correctness
    assert (
        ordered(loss, reverse, distance, correctness)
        > ordered(loss, ranked, distance, correctness) + 0.01
    )


@pytest.mark.parametrize("mode", MODES)
def test_equal_scores_do_not_diverge_and_have_finite_gradients(mode):
    batch = [torch.full((BATCH,), 0.5, requires_grad=True) for _ in range(3)]
    value = ordered(build(mode=mode), *batch)
    close(
        value, 2.0 if mode == "pearson" else 0.0
    )  # they correlate with nothing, so not with each other
    assert all(grad.isfinite().all() for grad in gradient(value, *batch[:2]))


@pytest.mark.parametrize("mode", MODES)
def test_one_constant_score_gives_finite_gradients(mode):
    std_norm, distance, _ = (x.requires_grad_() for x in random_batch())
    correctness = torch.full((BATCH,), 0.3, dtype=torch.float64)
    value = ordered(build(mode=mode), std_norm, distance, correctness)
    close(value, naive_loss(std_norm, distance, correctness, mode=mode))
    assert all(grad.isfinite().all() for grad in gradient(value, std_norm, distance))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_samples_give_zero_with_zero_gradient(mode, n):
    batch = [x.requires_grad_() for x in random_batch(n)]
    value = ordered(build(mode=mode), *batch)
    value.backward()
    assert value == 0
    assert (batch[0].grad == 0).all()
    assert (batch[1].grad == 0).all()


scales, shifts = st.floats(0.05, 0.5), st.floats(0.0, 0.5)


@pytest.mark.parametrize("mode", AFFINE)
@given(seed=st.integers(0, 2**16), scale=scales, shift=shifts)
def test_positive_affine_maps_of_a_score_change_nothing(mode, seed, scale, shift):
    torch.manual_seed(seed)
    std_norm, distance, correctness = random_batch()
    expected = naive_loss(std_norm, distance, correctness, mode=mode)
    loss = build(mode=mode)
    close(
        ordered(loss, 1 / (scale / std_norm + shift), distance, correctness),
        expected,
        torch.float32,
    )
    close(
        ordered(loss, std_norm, 1 - (scale * (1 - distance) + shift), correctness),
        expected,
        torch.float32,
    )
    close(ordered(loss, std_norm, distance, scale * correctness + shift), expected, torch.float32)


@pytest.mark.parametrize("mode", AFFINE)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_size_of_the_norms_does_not_matter_at_the_ends_of_the_range(mode, scale):
    std_norm, distance, correctness = random_batch(dtype=torch.float32)
    expected = naive_loss(std_norm, distance, correctness, mode=mode)
    close(ordered(build(mode=mode), scale * std_norm, distance, correctness), expected)


@pytest.mark.parametrize("mode", AFFINE)
def test_scores_that_differ_in_the_last_bit_are_told_apart_exactly(mode):
    std_norm, distance, _ = random_batch(dtype=torch.float32)
    steps = torch.randperm(BATCH)
    expected = naive_loss(std_norm, distance, steps.double(), mode=mode)
    close(ordered(build(mode=mode), std_norm, distance, 0.5 + steps * 2.0**-24), expected)


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 2**16), n=st.integers(2, 9))
def test_order_of_samples_does_not_matter(mode, seed, n):
    torch.manual_seed(seed)
    batch, order = random_batch(n), torch.randperm(n)
    expected = naive_loss(*batch, mode=mode)
    close(ordered(build(mode=mode), *(x[order] for x in batch)), expected)


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 2**16), n=st.integers(0, 9))
def test_loss_is_never_negative(mode, seed, n):
    torch.manual_seed(seed)
    assert ordered(build(mode=mode), *random_batch(n)) >= -1e-12


@pytest.mark.parametrize("mode", MODES)
def test_columns_are_losses_of_their_own(mode):
    loss = SoftRankOrdinalityLoss(mode=mode, pairs=("SR", "DS"))
    columns = [
        dict(zip(("std_norm", "distance", "correctness"), random_batch(), strict=True))
        for _ in range(3)
    ]
    for number, each in enumerate(columns):
        each["mask"] = torch.arange(BATCH) < 3 * number  # of the last but one sample is left
    together = {name: torch.stack([each[name] for each in columns], 1) for name in columns[0]}
    std_norm = together["std_norm"].requires_grad_()
    found, apart = loss(**together), torch.stack([loss(**each) for each in columns]).sum()
    torch.testing.assert_close(found, apart)
    assert not torch.autograd.grad(found, std_norm)[0][:, 2].any()


def test_pearson_of_equal_scores_costs_one_with_zero_gradient():
    std_norm, distance, _ = (x.requires_grad_() for x in random_batch())
    for views in (
        (std_norm, distance, torch.full((BATCH,), 0.3, dtype=torch.float64)),
        ((0 * std_norm + 1.7), distance, torch.rand(BATCH, dtype=torch.float64)),
    ):
        value = ordered(SoftRankOrdinalityLoss(mode="pearson"), *views)
        assert value == 1
        assert all((grad == 0).all() for grad in gradient(value, std_norm, distance))


def test_pearson_is_that_of_numpy():
    std_norm, distance, correctness = random_batch()
    actual = ordered(
        SoftRankOrdinalityLoss(mode="pearson", pairs=("DS",)), std_norm, distance, correctness
    )
    close(actual, 1 - np.corrcoef(1 / std_norm, 1 - distance)[0, 1])


def test_views_are_told_apart_by_name():
    with pytest.raises(TypeError, match="positional"):
        SoftRankOrdinalityLoss()(*random_batch())


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("mode", MODES)
def test_passes_gradcheck(mode):
    std_norm, distance, correctness = random_batch()
    loss = build(mode=mode, pairs=("SR", "DR", "DS"))
    inputs = (std_norm.requires_grad_(), distance.requires_grad_())
    assert gradcheck(lambda s, d: ordered(loss, s, d, correctness), inputs)


@pytest.mark.parametrize("mode", MODES)
def test_correctness_gets_no_gradient(mode):
    std_norm, distance, correctness = (x.requires_grad_() for x in random_batch())
    ordered(build(mode=mode), std_norm, distance, correctness).backward()
    assert correctness.grad is None or (correctness.grad == 0).all()
    assert (std_norm.grad != 0).any()
    assert (distance.grad != 0).any()


def test_rank_mode_has_a_live_gradient_for_nearly_constant_norms():
    # With 64 latent dimensions 1 / norm hardly varies; "raw" would give a gradient of about 1e-6.
    std_norm = (8 + 1e-3 * torch.rand(BATCH, dtype=torch.float64)).requires_grad_()
    correctness = torch.rand(BATCH, dtype=torch.float64)
    loss = SoftRankOrdinalityLoss(pairs=("SR",))
    (grad,) = gradient(ordered(loss, std_norm, correctness, correctness), std_norm)
    assert grad.abs().max() > 1


# ---------------------------------------------------------------------------------------------- mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_masked_samples_equal_a_batch_without_them(mode, value):
    batch, loss = random_batch(), build(mode=mode)
    mask = torch.tensor([True, False, False, True, False, False, False])
    dirty = [poisoned(x, mask, value) for x in batch]
    close(ordered(loss, *dirty, mask), naive_loss(*(x[~mask] for x in batch), mode=mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_masked_samples_do_not_influence_gradients(mode, value):
    batch, loss = random_batch(), build(mode=mode)
    mask = torch.tensor([True, False, False, True, False, False, False])
    dirty = [poisoned(x, mask, value).requires_grad_() for x in batch]
    rest = [x[~mask].requires_grad_() for x in batch]
    actual = gradient(ordered(loss, *dirty, mask), *dirty[:2])
    expected = gradient(ordered(loss, *rest), *rest[:2])
    for a, e in zip(actual, expected, strict=True):
        assert (a[mask] == 0).all()
        close(a[~mask], e)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kept", [0, 1])
def test_fewer_than_two_unmasked_samples_give_zero_with_zero_gradient(mode, kept):
    mask = torch.arange(BATCH) >= kept
    batch = [x.requires_grad_() for x in random_batch()]
    value = ordered(build(mode=mode), *batch, mask)
    value.backward()
    assert value == 0
    assert (batch[0].grad == 0).all()
    assert (batch[1].grad == 0).all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_anomaly_mode_passes_with_nan_at_masked_samples(mode):
    mask = torch.arange(BATCH) % 3 == 0
    views = [poisoned(x, mask).requires_grad_() for x in random_batch()]
    with torch.autograd.detect_anomaly(check_nan=True):
        ordered(build(mode=mode, pairs=("SR", "DR", "DS")), *views, mask).backward()
    assert all(x.grad.isfinite().all() for x in views[:2])


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_computes_in_float32(mode, dtype):
    batch = random_batch(dtype=dtype)
    value = ordered(build(mode=mode), *batch)
    assert value.dtype == torch.float32
    close(value, naive_loss(*(x.double() for x in batch), mode=mode), dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", HALF)
def test_autocast_computes_in_float32(mode, dtype):
    batch = random_batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        value = ordered(build(mode=mode), *batch)
    assert value.dtype == torch.float32
    close(value, naive_loss(*batch, mode=mode))


@pytest.mark.parametrize("mode", MODES)
def test_tiny_norms_are_finite_in_float16(mode):
    _, distance, correctness = random_batch(dtype=torch.float16)
    std_norm = torch.linspace(
        1e-5, 1e-3, BATCH, dtype=torch.float16
    ).requires_grad_()  # 1/s > 65504
    value = ordered(build(mode=mode), std_norm, distance, correctness)
    assert value.isfinite()


def test_float64_stays_float64():
    assert ordered(SoftRankOrdinalityLoss(), *random_batch()).dtype == torch.float64


# --------------------------------------------------------------------------------------- bad inputs

FLOATING = r"a floating dtype \(float16 to float64\)"
META = {"device": "meta"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "ranks"}, ValueError, r"`mode` to be one of \['pearson', .*\], but got 'ranks'"),
        ({"pairs": ("RS",)}, ValueError, r"`pairs` to be one of \['DR', 'DS', 'SR'\], .* 'RS'"),
        ({"pairs": ()}, ValueError, "`pairs` to name at least one pair, but got none"),
        ({"pairs": "SR"}, TypeError, "`pairs` to be a sequence such as .*, but got 'SR'"),
        ({"pairs": {"SR"}}, TypeError, "`pairs` to be a sequence such as .*, but got {'SR'}"),
        ({"pairs": ("SR", "SR")}, ValueError, r"`pairs` to name each pair once, but .* 'SR'\)"),
        ({"gather": 1}, TypeError, "`gather` to be True or False, but got 1"),
        ({"max_batch_size": 0}, ValueError, "`max_batch_size` to be a positive integer, but got 0"),
        ({"validate_args": 1}, TypeError, "`validate_args` to be True, False or None, but got 1"),
        ({"temperature": 0.0}, ValueError, "`temperature` to be a number above 0, but got 0.0"),
        ({"temperature": math.inf}, ValueError, "`temperature` to be a number .*, but got inf"),
        ({"temperature": torch.ones(())}, TypeError, r"`temperature` .*, but got tensor\(1\.\)"),
    ],
)
def test_constructor_refuses(change, error, message):
    with pytest.raises(error, match=f"^Expected {message}$"):
        SoftRankOrdinalityLoss(**change)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("std_norm", torch.ones(BATCH, 1), ValueError, r"to have shape \(B\), but got \(7, 1\)"),
        (
            "std_norm",
            torch.ones(BATCH).long(),
            TypeError,
            f"to have {FLOATING}, but .* torch.int64",
        ),
        ("std_norm", torch.full((BATCH,), math.nan), ValueError, "to be finite, but got 7 NaN .*"),
        ("std_norm", torch.full((BATCH,), -1.0), ValueError, "to be above 0, but got -1.0"),
        ("std_norm", torch.zeros(BATCH), ValueError, "to be above 0, but got 0.0"),
        ("distance", torch.ones(2), ValueError, r"to have shape \(B=7\), but got \(2,\)"),
        (
            "distance",
            torch.ones(BATCH).long(),
            TypeError,
            f"to have {FLOATING}, but .* torch.int64",
        ),
        ("distance", torch.full((BATCH,), 1.5), ValueError, r"to be in \[0, 1\], but got 1.5"),
        ("distance", torch.full((BATCH,), -0.5), ValueError, r"to be in \[0, 1\], but got -0.5"),
        ("distance", torch.full((BATCH,), math.nan), ValueError, r"to be in \[0, 1\], but got nan"),
        ("distance", torch.ones(BATCH, **META), ValueError, "to be on cpu, but got meta"),
        ("correctness", torch.ones(2), ValueError, r"to have shape \(B=7\), but got \(2,\)"),
        ("correctness", torch.ones(BATCH).bool(), TypeError, f"to have {FLOATING}, .* torch.bool"),
        ("correctness", torch.full((BATCH,), -0.5), ValueError, r"to be in \[0, 1\], but got -0.5"),
        ("correctness", torch.full((BATCH,), 1.5), ValueError, r"to be in \[0, 1\], but got 1.5"),
        ("correctness", torch.full((BATCH,), math.nan), ValueError, r"to be in .*, but got nan"),
        ("correctness", torch.ones(BATCH, **META), ValueError, "to be on cpu, but got meta"),
        ("mask", torch.zeros(BATCH), TypeError, "to have a bool dtype, but got torch.float32"),
        ("mask", torch.zeros(2).bool(), ValueError, r"to have shape \(B=7\), but got \(2,\)"),
        ("mask", torch.zeros(BATCH, **META).bool(), ValueError, "to be on cpu, but got meta"),
    ],
)
def test_refuses(name, value, error, message):
    views = dict(zip(("std_norm", "distance", "correctness"), random_batch(), strict=True))
    with pytest.raises(error, match=f"^Expected `{name}` {message}$"):
        SoftRankOrdinalityLoss()(**(views | {name: value}))


def test_refuses_a_batch_above_the_largest():
    with pytest.raises(ValueError, match=r"^Expected `std_norm` .* `max_batch_size` = 6 .* got 7$"):
        ordered(SoftRankOrdinalityLoss(max_batch_size=6), *random_batch())


@pytest.mark.parametrize("settings", [{}, {"validate_args": False}, {"validate_args": True}])
def test_validate_args_is_passed_on(monkeypatch, settings):
    passed = record_validate_args(monkeypatch)
    ordered(SoftRankOrdinalityLoss(**settings), *random_batch())
    assert passed[0] is settings.get("validate_args")
    assert set(passed[1:]) <= {False}  # what it computes itself is not looked at again
