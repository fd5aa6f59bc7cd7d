"""UncertaintyGatedFusion (Eq. 8-9), against a mixture computed in 60 decimal digits."""

import math
from decimal import Decimal, localcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from support import HALF, close, gradient, poisoned, random_latent, record_validate_args, refuses
from uncertainty_mm import DiagonalGaussian, FusedPrediction, UncertaintyGatedFusion
from uncertainty_mm.functional import expected_distance

BATCH, MODALITIES, LABELS, LATENT, HIDDEN = 4, 3, 5, 2, 8
MISSING = torch.tensor([[False] * 3, [True, False, False], [False, True, True], [True] * 3])


def build(**kwargs):
    settings = {"hidden_dim": HIDDEN, "dropout": 0.0} | kwargs
    return UncertaintyGatedFusion(MODALITIES, LABELS, LATENT, **settings).double()


def build_paper(**kwargs):
    return build(combine="concat", detach_std=False, **kwargs)


def random_batch(dtype=torch.float64, requires_grad=False):
    latent = random_latent(
        BATCH, MODALITIES, LABELS, LATENT, dtype=dtype, requires_grad=requires_grad
    )
    return latent, torch.rand(BATCH, LABELS, dtype=dtype)


def constant_heads(mean_logit, std_logit, **kwargs):
    """A fusion whose heads answer the same logits to everything, through their last bias."""
    fusion = build(**kwargs).float()
    for head, logit in ((fusion.mean_head, mean_logit), (fusion.std_head, std_logit)):
        torch.nn.init.zeros_(head[-1].weight)
        torch.nn.init.constant_(head[-1].bias, logit)
    return fusion


def exact_mixture_logit(mean_logit, std_logit, weight):
    """The logit of w * sigmoid(m) + (1 - w) * sigmoid(s); both it and its complement are sums."""
    with localcontext() as context:
        context.prec = 60
        m, s, w = (Decimal(x) for x in (mean_logit, std_logit, weight))
        present = w / (1 + (-m).exp()) + (1 - w) / (1 + (-s).exp())
        absent = w / (1 + m.exp()) + (1 - w) / (1 + s.exp())
        return float((present / absent).ln())


def naive_head(head, values):
    """Logits of a head for values (B, M, Q, K), one (sample, label) at a time."""
    first, last = head[0], head[-1]
    rows = []
    for sample in values:
        row = []
        for q in range(LABELS):
            inputs = torch.cat([sample[m, q] for m in range(MODALITIES)])
            hidden = (first.weight @ inputs + first.bias).clamp(min=0)
            row.append(last.weight @ hidden + last.bias)
        rows.append(torch.cat(row))
    return torch.stack(rows)


# ------------------------------------------------------------------------------------ the equations


def test_prediction_is_four_tensors_of_samples_and_labels():
    out = build()(*random_batch())
    assert isinstance(out, FusedPrediction)
    assert out._fields == ("logits", "mean_logits", "std_logits", "mean_weight")
    assert all(field.shape == (BATCH, LABELS) for field in out)


def test_heads_classify_the_concatenated_modalities():
    fusion, (latent, uncertainty) = build_paper(), random_batch()
    out = fusion(latent, uncertainty)
    close(out.mean_logits, naive_head(fusion.mean_head, latent.mean).detach())
    close(out.std_logits, naive_head(fusion.std_head, latent.std).detach())


@pytest.mark.parametrize("mean_weight", ["certainty", "uncertainty"])
def test_probs_are_the_mixture(mean_weight):
    fusion, (latent, uncertainty) = build_paper(mean_weight=mean_weight), random_batch()
    out = fusion(latent, uncertainty)
    weight = uncertainty if mean_weight == "uncertainty" else 1 - uncertainty
    mean_probs = torch.sigmoid(naive_head(fusion.mean_head, latent.mean))
    std_probs = torch.sigmoid(naive_head(fusion.std_head, latent.std))
    close(out.mean_weight, weight)
    close(out.probs, (weight * mean_probs + (1 - weight) * std_probs).detach())


def test_certainty_is_the_default():
    latent, _ = random_batch()
    out = build()(latent, torch.full((BATCH,), 0.25, dtype=torch.float64))
    close(out.mean_weight, torch.full((BATCH, LABELS), 0.75))


def test_uncertainty_of_a_sample_counts_for_its_labels():
    fusion, (latent, uncertainty) = build(), random_batch()
    out = fusion(latent, uncertainty[:, 0])
    expected = fusion(latent, uncertainty[:, :1].expand(BATCH, LABELS))
    assert out.mean_weight.shape == (BATCH, LABELS)
    close(out.logits, expected.logits.detach())


@pytest.mark.parametrize(("weight", "branch"), [(1.0, "mean_logits"), (0.0, "std_logits")])
def test_all_the_weight_on_a_branch_gives_that_branch(weight, branch):
    fusion, (latent, _) = build(mean_weight="uncertainty"), random_batch()
    out = fusion(latent, torch.full((BATCH,), weight, dtype=torch.float64))
    close(out.logits, getattr(out, branch).detach())


def test_equal_branches_give_their_logit():
    out = constant_heads(1.5, 1.5)(*random_batch(torch.float32))
    close(out.logits, torch.full((BATCH, LABELS), 1.5))


def test_binary_cross_entropy_of_the_logits_is_equation_9():
    latent, uncertainty = random_batch()
    out = build()(latent, uncertainty)
    labels = torch.randint(2, (BATCH, LABELS)).double()
    expected = 0.0
    for p, y in zip(out.probs.flatten().tolist(), labels.flatten().tolist(), strict=True):
        expected -= (y * math.log(p) + (1 - y) * math.log(1 - p)) / (BATCH * LABELS)
    close(F.binary_cross_entropy_with_logits(out.logits, labels), expected)


@pytest.mark.parametrize("mean_logit", [-100.0, -20.0, 0.5, 20.0, 100.0])
@pytest.mark.parametrize("std_logit", [-100.0, -20.0, 0.5, 20.0, 100.0])
@pytest.mark.parametrize("weight", [0.0, 1e-6, 0.3, 1.0])
def test_logits_are_exact_at_extremes(mean_logit, std_logit, weight):
    fusion = constant_heads(mean_logit, std_logit, mean_weight="uncertainty")
    latent, _ = random_batch(torch.float32)
    uncertainty = torch.full((BATCH,), weight)
    expected = exact_mixture_logit(mean_logit, std_logit, uncertainty[0].item())
    close(fusion(latent, uncertainty).logits, torch.full((BATCH, LABELS), expected))


logits = st.floats(-100, 100, width=32)


@given(mean_logit=logits, std_logit=logits, weight=st.floats(0, 1, width=32))
def test_mixture_lies_between_its_branches(mean_logit, std_logit, weight):
    fusion = constant_heads(mean_logit, std_logit, mean_weight="uncertainty")
    latent, _ = random_batch(torch.float32)
    out = fusion(latent, torch.full((BATCH,), weight))
    low, high = sorted([mean_logit, std_logit])
    slack = 1e-5 * max(1.0, abs(low), abs(high))
    assert (out.logits >= low - slack).all()
    assert (out.logits <= high + slack).all()


@given(seed=st.integers(0, 2**16))
def test_permutation_of_samples_and_labels_permutes_the_output(seed):
    torch.manual_seed(seed)
    fusion, (latent, uncertainty) = build(), random_batch()
    samples, labels = torch.randperm(BATCH), torch.randperm(LABELS)
    moved = DiagonalGaussian(*(x[samples][:, :, labels] for x in latent))
    out = fusion(moved, uncertainty[samples][:, labels])
    close(out.logits, fusion(latent, uncertainty).logits[samples][:, labels])


# --------------------------------------------------------------------------- product of modalities


@pytest.fixture
def product_fusion():
    """A fusion by product, whose prior has learned something."""
    fusion = build()
    torch.nn.init.normal_(fusion.prior_mean)
    return fusion


def test_heads_classify_the_product_of_the_modalities(product_fusion):
    latent, uncertainty = random_batch()
    out = product_fusion(latent, uncertainty, MISSING)
    precision = (~MISSING).double()[:, :, None, None] / latent.std**2
    variance = 1 / (1 + precision.sum(1))
    mean = variance * (product_fusion.prior_mean + (precision * latent.mean).sum(1))
    mean_logits = product_fusion.mean_head(mean).squeeze(-1)
    std_logits = product_fusion.std_head(variance.sqrt()).squeeze(-1)
    close(out.mean_logits, mean_logits.detach())
    close(out.std_logits, std_logits.detach())
    mixture = uncertainty * std_logits.sigmoid() + (1 - uncertainty) * mean_logits.sigmoid()
    close(out.probs, mixture.detach())


@pytest.mark.parametrize("combine", ["concat", "product"])
def test_detached_standard_deviations_are_read_but_not_shaped(combine):
    shaping, reading = (build(combine=combine, detach_std=x) for x in (False, True))
    reading.load_state_dict(shaping.state_dict())
    latent, uncertainty = random_batch(requires_grad=True)

    def run(fusion):
        return fusion(latent, uncertainty, MISSING)

    assert all(map(torch.equal, run(shaping), run(reading)))
    (shaped,) = gradient(run(shaping).std_logits, latent.std)
    (read,) = gradient(run(reading).std_logits, latent.std)
    assert (shaped[~MISSING] != 0).any()
    assert (read == 0).all()
    expected = gradient(
        run(shaping).mean_logits, *latent
    )  # in a product, precision weighs the means
    assert all(map(torch.equal, gradient(run(reading).mean_logits, *latent), expected))
    (slope,) = gradient(run(reading).std_logits, reading.std_head[0].weight)
    assert (slope != 0).any()  # the classifier itself learns


def test_prior_is_standard_at_first_and_learned_for_each_label():
    prior_mean = build().prior_mean
    assert prior_mean.shape == (LABELS, LATENT)
    assert prior_mean.requires_grad
    assert (prior_mean == 0).all()


def test_product_needs_no_parameters_for_another_modality():
    one, many = (UncertaintyGatedFusion(m, LABELS, LATENT) for m in (1, 20))
    shapes = [{n: p.shape for n, p in module.named_parameters()} for module in (one, many)]
    assert shapes[0] == shapes[1]


def test_product_does_not_depend_on_the_order_of_modalities(product_fusion):
    latent, uncertainty = random_batch()
    order = torch.tensor([2, 0, 1])
    moved = DiagonalGaussian(*(x[:, order] for x in latent))
    out = product_fusion(moved, uncertainty, MISSING[:, order])
    close(out.logits, product_fusion(latent, uncertainty, MISSING).logits.detach())


def test_product_without_any_modality_is_what_the_prior_expects(product_fusion):
    latent, _ = random_batch()
    everything = torch.ones(BATCH, MODALITIES, dtype=torch.bool)
    uncertainty = torch.full((BATCH,), 0.3, dtype=torch.float64)
    out = product_fusion(latent, uncertainty, everything)
    expected = product_fusion.mean_head(product_fusion.prior_mean).squeeze(-1)
    close(out.mean_logits, expected.expand(BATCH, LABELS).detach())
    assert torch.equal(out.logits, out.logits[:1].expand(BATCH, LABELS))
    (grad,) = gradient(out.logits, product_fusion.prior_mean)
    assert (grad != 0).any(-1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_missing_modality_does_not_influence_the_product_nor_its_gradients(product_fusion, value):
    latent, uncertainty = random_batch()

    def results(value):
        dirty = [poisoned(x, MISSING, value).requires_grad_() for x in latent]
        out = product_fusion(DiagonalGaussian(*dirty), uncertainty, MISSING).logits
        return out, *gradient(out.square(), *dirty, *product_fusion.parameters())

    for actual, expected in zip(results(value), results(1.0), strict=True):
        close(actual, expected.detach())


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("combine", ["concat", "product"])
def test_passes_gradcheck(combine):
    fusion = build(combine=combine, detach_std=False)
    latent = random_latent(2, MODALITIES, LABELS, LATENT, requires_grad=True)
    uncertainty = torch.rand(2, LABELS, dtype=torch.float64, requires_grad=True)

    def forward(mean, std, uncertainty):
        return fusion(DiagonalGaussian(mean, std), uncertainty).logits

    assert gradcheck(forward, (*latent, uncertainty))


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("logit", [0.0, 20.0, 100.0])
def test_gradients_are_finite_at_extremes(weight, logit):
    fusion = constant_heads(logit, -logit, mean_weight="uncertainty")
    latent, _ = random_batch(torch.float32)
    uncertainty = torch.full((BATCH, LABELS), weight, requires_grad=True)
    labels = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]).expand(BATCH, LABELS)
    loss = F.binary_cross_entropy_with_logits(fusion(latent, uncertainty).logits, labels)
    grads = gradient(loss, uncertainty, *fusion.parameters())
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_gradient_of_the_uncertainty_is_that_of_the_mixture_at_0_and_1(weight):
    fusion = constant_heads(1.0, -2.0, mean_weight="uncertainty")
    latent, _ = random_batch(torch.float32)
    uncertainty = torch.full((BATCH, LABELS), weight, requires_grad=True)
    (grad,) = gradient(fusion(latent, uncertainty).probs, uncertainty)
    difference = 1 / (1 + math.exp(-1.0)) - 1 / (1 + math.exp(2.0))
    close(grad, torch.full((BATCH, LABELS), difference))


@pytest.mark.parametrize(
    ("mean_logit", "std_logit", "slope"),
    [(100.0, -100.0, 1e15), (-100.0, 100.0, -1e15), (math.inf, math.inf, 0.0)],
)
def test_slope_in_the_uncertainty_is_bounded(mean_logit, std_logit, slope):
    # (sigmoid(a) - sigmoid(b)) / (p (1 - p)) is exp(100) where the branch of no weight says the opposite.
    fusion = constant_heads(mean_logit, std_logit, mean_weight="uncertainty")
    latent, _ = random_batch(torch.float32)
    uncertainty = torch.zeros(BATCH, LABELS, requires_grad=True)
    (grad,) = gradient(fusion(latent, uncertainty).logits, uncertainty)
    assert torch.equal(grad, torch.full((BATCH, LABELS), slope))


# -------------------------------------------------------------------------------- missing modalities


def without_modality(fusion, modality):
    """The same heads for one modality less: its columns of the first layer are taken out."""
    smaller = UncertaintyGatedFusion(
        MODALITIES - 1, LABELS, LATENT, hidden_dim=HIDDEN, dropout=0.0, combine="concat"
    ).double()
    columns = [i for i in range(MODALITIES * LATENT) if i // LATENT != modality]
    state = fusion.state_dict()
    for name in ("mean_head.0.weight", "std_head.0.weight"):
        state[name] = state[name][:, columns]
    smaller.load_state_dict(state)
    return smaller


@pytest.mark.parametrize("modality", range(MODALITIES))
def test_missing_modality_equals_a_model_without_it(modality):
    fusion, (latent, uncertainty) = build_paper(), random_batch()
    missing = torch.zeros(BATCH, MODALITIES, dtype=torch.bool)
    missing[:, modality] = True
    kept = [m for m in range(MODALITIES) if m != modality]
    smaller = without_modality(fusion, modality)
    expected = smaller(DiagonalGaussian(*(x[:, kept] for x in latent)), uncertainty)
    for actual, wanted in zip(fusion(latent, uncertainty, missing), expected, strict=True):
        close(actual, wanted.detach())


@pytest.mark.parametrize("value", [math.nan, math.inf, 5.0])
def test_missing_modality_does_not_influence_the_output(value):
    fusion, (latent, uncertainty) = build_paper(), random_batch()
    dirty = DiagonalGaussian(*(poisoned(x, MISSING, value) for x in latent))
    zeros = [poisoned(x, MISSING, 0.0) for x in latent]
    out = fusion(dirty, uncertainty, MISSING)
    close(out.mean_logits, naive_head(fusion.mean_head, zeros[0]).detach())
    close(out.std_logits, naive_head(fusion.std_head, zeros[1]).detach())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_missing_modality_does_not_influence_gradients(value):
    fusion, (latent, uncertainty) = build_paper(), random_batch()

    def gradients(value):
        dirty = [poisoned(x, MISSING, value).requires_grad_() for x in latent]
        out = fusion(DiagonalGaussian(*dirty), uncertainty, MISSING)
        return gradient(out.logits.square(), *dirty, *fusion.parameters())

    for actual, expected in zip(gradients(value), gradients(1.0), strict=True):
        close(actual, expected)


def test_missing_modality_gets_no_gradient():
    fusion, (latent, uncertainty) = build_paper(), random_batch(requires_grad=True)
    for grad in gradient(fusion(latent, uncertainty, MISSING).logits, *latent):
        assert (grad[MISSING] == 0).all()
        assert (grad[~MISSING] != 0).any()


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_near_float64(dtype):
    fusion, (latent, uncertainty) = build_paper().to(dtype), random_batch(dtype)
    out = fusion(latent, uncertainty)
    assert out.logits.dtype == torch.float32
    fusion.double()
    mean_probs = torch.sigmoid(naive_head(fusion.mean_head, latent.mean.double()))
    std_probs = torch.sigmoid(naive_head(fusion.std_head, latent.std.double()))
    weight = 1 - uncertainty.double()
    close(out.probs, (weight * mean_probs + (1 - weight) * std_probs).detach(), dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("mean_logit", "std_logit"), [(100.0, -100.0), (-100.0, -100.0)])
def test_mixture_is_safe_under_autocast(dtype, weight, mean_logit, std_logit):
    fusion = constant_heads(mean_logit, std_logit, mean_weight="uncertainty")
    latent, _ = random_batch(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = fusion(latent, torch.full((BATCH,), weight))
        loss = F.binary_cross_entropy_with_logits(out.logits, torch.ones(BATCH, LABELS))
    assert out.logits.dtype == torch.float32
    expected = exact_mixture_logit(mean_logit, std_logit, torch.tensor(weight).item())
    close(out.logits, torch.full((BATCH, LABELS), expected))
    assert all(grad.isfinite().all() for grad in gradient(loss, *fusion.parameters()))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_mixture_is_safe_in_half_precision(dtype, weight):
    fusion = constant_heads(100.0, -100.0, mean_weight="uncertainty").to(dtype)
    latent, _ = random_batch(dtype)
    uncertainty = torch.full((BATCH,), weight, dtype=dtype)
    out = fusion(latent, uncertainty)
    expected = exact_mixture_logit(100.0, -100.0, uncertainty[0].item())
    close(out.logits, torch.full((BATCH, LABELS), expected))
    grads = gradient(out.logits, *fusion.parameters())
    assert all(grad.isfinite().all() for grad in grads)


def test_dropout_is_on_in_training_only():
    fusion, (latent, uncertainty) = build_paper(dropout=0.5), random_batch()
    assert not torch.equal(fusion(latent, uncertainty).logits, fusion(latent, uncertainty).logits)
    fusion.eval()
    close(
        fusion(latent, uncertainty).mean_logits, naive_head(fusion.mean_head, latent.mean).detach()
    )


def test_defaults_are_those_of_the_contract():
    fusion = UncertaintyGatedFusion(2, 3, 4)
    assert (fusion.mean_weight, fusion.combine, fusion.detach_std) == ("certainty", "product", True)
    for head, width in (
        (fusion.mean_head, 4),
        (UncertaintyGatedFusion(2, 3, 4, combine="concat").std_head, 2 * 4),
    ):
        assert head[0].weight.shape == (128, width)
        assert [layer.p for layer in head if isinstance(layer, torch.nn.Dropout)] == [0.1]


@pytest.mark.parametrize(("scale", "largest"), [(1, 0.5), (2, 1.0)])
def test_expected_distance_reaches_the_standard_deviations_with_half_the_weight(scale, largest):
    probs = torch.linspace(0, 1, 101, dtype=torch.float64).expand(LABELS, -1).T
    latent = random_latent(101, MODALITIES, LABELS, LATENT)
    out = build()(latent, scale * expected_distance(probs))
    assert (1 - out.mean_weight).max().item() == largest


# --------------------------------------------------------------------------------------- bad inputs

POSITIVE = "to be a positive integer, but got"
SHAPE = r"to have shape \({}\), but got \({}\)"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_modalities": 0}, ValueError, f"{POSITIVE} 0"),
        ({"num_labels": 0}, ValueError, f"{POSITIVE} 0"),
        ({"latent_dim": 1.5}, TypeError, f"{POSITIVE} 1.5"),
        ({"latent_dim": -3}, ValueError, f"{POSITIVE} -3"),
        ({"hidden_dim": 0}, ValueError, f"{POSITIVE} 0"),
        ({"dropout": 2.0}, ValueError, r"to be a number in \[0, 1\), but got 2.0"),
        ({"dropout": math.nan}, ValueError, r"to be a number in \[0, 1\), but got nan"),
        (
            {"mean_weight": "mean"},
            ValueError,
            r"to be one of \['certainty', 'uncertainty'\], but got 'mean'",
        ),
        ({"combine": "sum"}, ValueError, r"to be one of \['concat', 'product'\], but got 'sum'"),
        ({"combine": ["concat"]}, ValueError, r"to be one of .*, but got \['concat'\]"),
        ({"detach_std": 1}, TypeError, "to be True or False, but got 1"),
        ({"validate_args": "yes"}, TypeError, "to be True, False or None, but got 'yes'"),
    ],
)
def test_constructor_rejects(change, error, message):
    [name] = change
    settings = {"num_modalities": 2, "num_labels": 3, "latent_dim": 4}
    with pytest.raises(error, match=f"^Expected `{name}` {message}$"):
        UncertaintyGatedFusion(**(settings | change))


@pytest.mark.parametrize(
    ("uncertainty", "error", "message"),
    [
        (torch.rand(BATCH + 1), ValueError, SHAPE.format("B=4", "5,")),
        (torch.rand(BATCH, LABELS + 1), ValueError, SHAPE.format("B=4, Q=5", "4, 6")),
        (torch.rand(BATCH, 3, LABELS), ValueError, SHAPE.format("B=4, Q=5", "4, 3, 5")),
        (torch.tensor(0.5), ValueError, SHAPE.format("B=4, Q=5", "")),
        (torch.ones(BATCH, dtype=torch.long), TypeError, "to have a floating .* torch.int64"),
        (torch.ones(BATCH).bool(), TypeError, "to have a floating .*, but got torch.bool"),
        (torch.full((BATCH,), 1.5), ValueError, r"to be in \[0, 1\], but got 1.5"),
        (torch.full((BATCH, LABELS), -0.5), ValueError, r"to be in \[0, 1\], but got -0.5"),
        (torch.full((BATCH, LABELS), math.nan), ValueError, r"to be in \[0, 1\], but got nan"),
        (torch.rand(BATCH, device="meta"), ValueError, "to be on cpu, but got meta"),
        ([0.5] * BATCH, TypeError, "to be a tensor, but got list"),
        (0.5, TypeError, "to be a tensor, but got float"),
    ],
)
def test_rejects_uncertainty(uncertainty, error, message):
    module, (latent, _) = build().float(), random_batch(torch.float32)
    refuses(module, lambda: module(latent, uncertainty), error, f"`uncertainty` {message}")


ONES = torch.ones(BATCH, MODALITIES, LABELS, LATENT)
B_M_Q_K = "B, M=3, Q=5, K=2"


@pytest.mark.parametrize(
    ("mean", "std", "error", "message"),
    [
        (torch.ones(4, 3, 5, 3), ONES, ValueError, "mean` " + SHAPE.format(B_M_Q_K, "4, 3, 5, 3")),
        (torch.ones(4, 4, 5, 2), ONES, ValueError, "mean` " + SHAPE.format(B_M_Q_K, "4, 4, 5, 2")),
        (torch.ones(4, 3, 6, 2), ONES, ValueError, "mean` " + SHAPE.format(B_M_Q_K, "4, 3, 6, 2")),
        (ONES, ONES[..., 0], ValueError, "std` " + SHAPE.format("B=4, M=3, Q=5, K=2", "4, 3, 5")),
        (ONES, ONES[:3], ValueError, "std` " + SHAPE.format("B=4, M=3, Q=5, K=2", "3, 3, 5, 2")),
        (ONES * math.nan, ONES, ValueError, "mean` to be finite, but got 120 NaN .*"),
        (ONES * math.inf, ONES, ValueError, "mean` to be finite, but got 120 NaN .*"),
        (ONES, -0.5 * ONES, ValueError, r"std` to be in \[0, inf\], but got -0.5"),
        (ONES, ONES * math.nan, ValueError, r"std` to be (finite|in \[0, inf\]), but got .*"),
        (ONES, ONES.to("meta"), ValueError, "std` to be on cpu, but got meta"),
    ],
)
@pytest.mark.parametrize("make", [build, build_paper])
def test_rejects_latent(make, mean, std, error, message):
    module, latent = make().float(), DiagonalGaussian(mean, std)
    message = rf"`latent\.{message}"
    refuses(module, lambda: module(latent, torch.rand(BATCH)), error, message)


def test_infinite_std_is_missing_in_a_product_and_refused_in_a_row():
    latent, uncertainty = random_batch()
    unsure = latent._replace(std=latent.std.masked_fill(MISSING[:, :, None, None], math.inf))
    fusion, row = build(), build_paper()
    for x, y in zip(fusion(unsure, uncertainty), fusion(latent, uncertainty, MISSING), strict=True):
        assert torch.equal(x, y)
    message = r"`latent\.std` to be finite, but got 60 NaN or infinite values"
    refuses(row, lambda: row(unsure, uncertainty), ValueError, message)


@pytest.mark.parametrize("parts", [{}, {"mean": torch.ones(1)}, {"std": torch.ones(1)}])
def test_rejects_what_is_no_gaussian(parts):
    module = build()
    for latent in (SimpleNamespace(**parts), ONES):
        message = f"`latent` to be a DiagonalGaussian, but got {type(latent).__name__}"
        refuses(module, lambda x=latent: module(x, torch.rand(BATCH)), TypeError, message)


@pytest.mark.parametrize(
    ("missing", "error", "message"),
    [
        (torch.zeros(BATCH, MODALITIES), TypeError, "to have a bool .* but got torch.float32"),
        (torch.zeros(BATCH, 4).bool(), ValueError, SHAPE.format("B=4, M=3", "4, 4")),
    ],
)
def test_rejects_missing(missing, error, message):
    module = build()
    refuses(module, lambda: module(*random_batch(), missing), error, f"`missing` {message}")


@pytest.mark.parametrize("validate_args", [None, False, True])
def test_validate_args_is_passed_on(monkeypatch, validate_args):
    passed = record_validate_args(monkeypatch)
    build(validate_args=validate_args)(*random_batch())
    assert passed == [validate_args] * 2  # of latent and uncertainty


@pytest.mark.parametrize("mean_weight", ["certainty", "uncertainty"])
def test_unchecked_uncertainty_beyond_its_range_counts_as_its_end(mean_weight):
    fusion = UncertaintyGatedFusion(2, 3, 4, mean_weight=mean_weight, validate_args=False).eval()
    latent = random_latent(5, 2, 3, 4, dtype=torch.float32)
    for beyond, end in ((1.0001, 1.0), (torch.inf, 1.0), (-0.5, 0.0)):
        gate = torch.full((5, 3), beyond, requires_grad=True)
        found, expected = fusion(latent, gate), fusion(latent, torch.full((5, 3), end))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        assert gradient(found.logits, gate)[0].isfinite().all()
