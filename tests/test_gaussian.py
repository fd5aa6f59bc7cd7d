"""DiagonalGaussian, against torch.distributions, and GaussianDecoupler by its properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.distributions import Independent, Normal, kl_divergence

from support import (
    HALF,
    Bad,
    close,
    gradient,
    poisoned,
    random_latent,
    record_validate_args,
    refused,
    refuses,
)
from uncertainty_mm import DiagonalGaussian, GaussianDecoupler

BATCH, MODALITIES, LABELS, IN, LATENT = 4, 3, 5, 6, 7
MISSING = torch.tensor([[False] * 3, [True, False, False], [False, True, True], [True] * 3])


def build(**kwargs):
    settings = {"hidden_dims": (9,), "dropout": 0.0} | kwargs
    return GaussianDecoupler(MODALITIES, IN, LATENT, **settings).double()


def random_input(dtype=torch.float64):
    return torch.randn(BATCH, MODALITIES, LABELS, IN, dtype=dtype)


# --------------------------------------------------------------------------------- DiagonalGaussian


def test_gaussian_unpacks_into_mean_and_std():
    mean, std = DiagonalGaussian(torch.zeros(2), torch.ones(2))
    assert (mean == 0).all()
    assert (std == 1).all()


def test_variance_is_the_square_of_std():
    latent = random_latent(3, 4)
    close(latent.variance, [[s * s for s in row] for row in latent.std.tolist()])


def test_log_var_is_the_log_of_the_variance():
    latent = random_latent(3, 4)
    close(latent.log_var, [[2 * math.log(s) for s in row] for row in latent.std.tolist()])


def test_kl_to_standard_normal_is_that_of_torch():
    latent = random_latent(3, 2, 4)
    prior = Independent(Normal(torch.zeros(4).double(), torch.ones(4).double()), 1)
    expected = kl_divergence(Independent(Normal(*latent), 1), prior.expand((3, 2)))
    close(latent.kl_to_standard_normal(), expected)


def test_kl_of_the_prior_is_zero_with_zero_gradient():
    latent = DiagonalGaussian(
        torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3).requires_grad_()
    )
    kl = latent.kl_to_standard_normal()
    close(kl, [0.0, 0.0])
    assert all((grad == 0).all() for grad in gradient(kl, *latent))


@given(seed=st.integers(0, 2**16))
def test_kl_is_never_negative(seed):
    torch.manual_seed(seed)
    assert (random_latent(5, 4).kl_to_standard_normal() >= -1e-12).all()


def test_kl_passes_gradcheck():
    latent = random_latent(2, 3, requires_grad=True)
    assert gradcheck(lambda m, s: DiagonalGaussian(m, s).kl_to_standard_normal(), tuple(latent))


def test_kl_does_not_overflow_in_float16():
    mean = torch.full((1, 4), 400.0, dtype=torch.float16)  # its square is 1.6e5
    kl = DiagonalGaussian(mean, torch.ones_like(mean)).kl_to_standard_normal()
    close(kl, [4 * 400.0**2 / 2], torch.float32)


def test_rsample_follows_the_distribution():
    latent = DiagonalGaussian(torch.full((200_000,), 2.0), torch.full((200_000,), 0.5))
    sample = latent.rsample()
    assert sample.mean().item() == pytest.approx(2.0, abs=0.01)
    assert sample.std().item() == pytest.approx(0.5, abs=0.01)


def test_rsample_is_reparameterised():
    latent = random_latent(3, 4, requires_grad=True)
    sample = latent.rsample()
    grad_mean, grad_std = gradient(sample, *latent)
    close(grad_mean, torch.ones(3, 4))
    close(grad_std, ((sample - latent.mean) / latent.std).detach())


def test_embedding_is_equation_4():
    latent = random_latent(2, 3)
    rows = []
    for mean, std in zip(latent.mean.tolist(), latent.std.tolist(), strict=True):
        mean_norm, std_norm = math.hypot(*mean), math.hypot(*std)
        rows.append([x / mean_norm for x in mean] + [x / std_norm for x in std])
    close(latent.embedding(), rows)


def test_embedding_of_one_half_is_that_half():
    latent = random_latent(2, 3)
    both = latent.embedding()
    assert torch.equal(latent.embedding("mean"), both[:, :3])
    assert torch.equal(latent.embedding("std"), both[:, 3:])


def test_joint_embedding_keeps_the_size_of_std_relative_to_the_mean():
    latent = random_latent(4, 3)
    embedding = latent.embedding("joint")
    close(embedding.norm(dim=-1), [1.0] * 4)
    ratio = latent.std.norm(dim=-1) / latent.mean.norm(dim=-1)
    close(embedding[:, 3:].norm(dim=-1) / embedding[:, :3].norm(dim=-1), ratio)
    close(DiagonalGaussian(7 * latent.mean, 7 * latent.std).embedding("joint"), embedding)


def test_embedding_of_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="`kind` to be one of"):
        random_latent(2, 3).embedding(True)


def test_squared_distances_are_those_of_draws_and_of_quantiles():
    one, other = random_latent(2, 1, 3), random_latent(4, 3)
    steps = (torch.arange(2000).double() + 0.5) / 2000
    normal = torch.distributions.Normal(0, 1).icdf(steps).view(-1, 1, 1, 1)
    quantiles = (x.mean + x.std * normal for x in (one, other))
    moved = (next(quantiles) - next(quantiles)).square().mean(0).sum(-1)  # the cheapest transport
    torch.testing.assert_close(one.squared_distance(other), moved, rtol=0.01, atol=0.01)
    apart = one.squared_distance(other, "sampled") - one.squared_distance(other)
    close(apart, 2 * (one.std * other.std).sum(-1))
    close(one.squared_distance(one), torch.zeros(2, 1))


@pytest.mark.parametrize("kind", ["wasserstein", "sampled"])
def test_gradients_of_squared_distances(kind):
    pair = (random_latent(2, 3, requires_grad=True) for _ in range(2))
    tensors = tuple(x for latent in pair for x in latent)
    assert gradcheck(
        lambda *x: DiagonalGaussian(*x[:2]).squared_distance(DiagonalGaussian(*x[2:]), kind),
        tensors,
    )


PAIR = DiagonalGaussian(torch.zeros(2, 3), torch.ones(2, 3))
BAD_DISTANCES = [
    Bad("kind", lambda x: x.squared_distance(x, "cosine"), ValueError, "`kind` .* got 'cosine'"),
    Bad("tuple", lambda x: x.squared_distance(tuple(x)), TypeError, "`other` to be .* got tuple"),
    Bad(
        "batch",
        lambda x: x.squared_distance(DiagonalGaussian(*torch.ones(2, 4, 3))),
        ValueError,
        r"`other.mean` to be broadcastable with \(2, 3\), .* but got \(4, 3\)",
    ),
    Bad(
        "width",
        lambda x: x.squared_distance(DiagonalGaussian(*torch.ones(2, 2, 1))),
        ValueError,
        r"of its last size, but got \(2, 1\)",
    ),
    Bad(
        "elsewhere",
        lambda x: x.squared_distance(DiagonalGaussian(*(y.to("meta") for y in x))),
        ValueError,
        "`other.mean` to be on cpu, but got meta",
    ),
]


@pytest.mark.parametrize("case", BAD_DISTANCES, ids=lambda case: case.name)
def test_squared_distance_refuses(case):
    refused(case, PAIR)


def test_embedding_norms_are_those_of_unit_halves():
    close(random_latent(5, 3).embedding().norm(dim=-1), [math.sqrt(2)] * 5)


def test_to_distribution_is_independent_over_the_last_axis():
    latent = random_latent(2, 3, 4)
    distribution = latent.to_distribution()
    assert isinstance(distribution, Independent)
    assert distribution.batch_shape == (2, 3)
    assert distribution.event_shape == (4,)


def test_to_distribution_has_the_density_of_the_gaussian():
    latent = random_latent(4)
    x = torch.randn(4, dtype=torch.float64)
    density = sum(
        -((a - m) ** 2) / (2 * s * s) - math.log(s) - math.log(2 * math.pi) / 2
        for a, m, s in zip(x.tolist(), latent.mean.tolist(), latent.std.tolist(), strict=True)
    )
    close(latent.to_distribution().log_prob(x), density)


# ---------------------------------------------------------------------------- product of modalities


def naive_product(latent, missing=None, prior_mean=0.0):
    """Sums of precisions and of means times precision, over the modalities that are there."""
    present = torch.ones(latent.mean.shape[:2]) if missing is None else (~missing)
    precision = present.double()[:, :, None, None] / latent.std**2
    variance = 1 / (1 + precision.sum(1))
    return variance * (prior_mean + (precision * latent.mean).sum(1)), variance.sqrt()


def one_label(means, stds, dtype=torch.float64):
    """The Gaussians of one sample, one label and one dimension, a modality each."""
    return DiagonalGaussian(
        *(torch.tensor(x, dtype=dtype).view(1, -1, 1, 1) for x in (means, stds))
    )


def test_product_is_the_product_of_the_densities():
    latent = one_label([1.5, -0.5, 2.0], [0.6, 1.1, 0.8])
    prior_mean = torch.tensor(0.4).double()
    x = torch.linspace(-15, 15, 30_001, dtype=torch.float64)
    log_density = Normal(prior_mean, 1).log_prob(x) + Normal(*latent).log_prob(x).sum(1)
    density = log_density.exp() / torch.trapezoid(log_density.exp(), x)
    close(density, Normal(*latent.product(prior_mean=prior_mean)).log_prob(x).exp())


@given(seed=st.integers(0, 2**16))
def test_product_sums_precisions(seed):
    torch.manual_seed(seed)
    latent, missing = random_latent(4, 3, 2, 5), torch.rand(4, 3) < 0.4
    prior_mean = torch.randn(2, 5).double()
    for actual, expected in zip(
        latent.product(missing, prior_mean),
        naive_product(latent, missing, prior_mean),
        strict=True,
    ):
        close(actual, expected)


@pytest.mark.parametrize(
    ("dtype", "tiny", "huge"),
    [
        (torch.float16, 1e-4, 6e4),
        (torch.bfloat16, 1e-30, 1e30),
        (torch.float32, 1e-30, 1e30),
        (torch.float64, 1e-200, 1e200),
    ],
)
def test_product_at_the_ends_of_the_range(dtype, tiny, huge):
    tiny, huge = (torch.tensor(x, dtype=dtype).item() for x in (tiny, huge))
    for stds, mean, std in [
        ((tiny, 1.0), 3.0, tiny),  # the sure one decides
        ((tiny, huge), 3.0, tiny),
        ((tiny, tiny), 4.0, tiny / math.sqrt(2)),
        ((huge, huge), 0.0, 1.0),  # the prior decides
    ]:
        latent = one_label([3.0, 5.0], stds, dtype)
        leaves = [x.requires_grad_() for x in latent]
        product = latent.product()
        assert product.mean.dtype == product.std.dtype == dtype
        close(product.mean, [[[mean]]])
        close(product.std / std, [[[1.0]]])  # relative, however small
        assert all(grad.isfinite().all() for grad in gradient(product.mean, *leaves))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_product_of_missing_modalities_is_that_without_them(value):
    latent = random_latent(1, 3, 4, 5)
    for kept in ([], [1], [0, 2], [0, 1, 2]):
        missing = torch.ones(1, 3, dtype=torch.bool)
        missing[:, kept] = False
        dirty = DiagonalGaussian(*(poisoned(x, missing, value).requires_grad_() for x in latent))
        rest = DiagonalGaussian(*(x[:, kept].requires_grad_() for x in latent))
        actual, expected = dirty.product(missing), rest.product()
        for a, e in zip(actual, expected, strict=True):
            close(a, e.detach())
        for a, e in zip(
            gradient(sum(x.sum() for x in actual), *dirty),
            gradient(sum(x.sum() for x in expected), *rest),
            strict=True,
        ):
            close(a[:, kept], e)
            assert (a[missing] == 0).all()


def test_product_without_any_modality_is_the_prior_exactly():
    prior_mean = torch.randn(LABELS, LATENT).double()
    latent = random_latent(BATCH, MODALITIES, LABELS, LATENT)
    everything = torch.ones(BATCH, MODALITIES, dtype=torch.bool)
    mean, std = latent.product(everything, prior_mean)
    assert torch.equal(mean, prior_mean.expand(BATCH, LABELS, LATENT))
    assert (std == 1).all()


def test_product_does_not_depend_on_the_order_of_modalities():
    latent = random_latent(4, 3, 2, 5)
    order = torch.tensor([2, 0, 1])
    moved = DiagonalGaussian(*(x[:, order] for x in latent)).product(MISSING[:, order])
    for actual, expected in zip(moved, latent.product(MISSING), strict=True):
        close(actual, expected)


@given(seed=st.integers(0, 2**16), modality=st.integers(0, 2))
def test_surer_modality_draws_the_product_to_itself(seed, modality):
    torch.manual_seed(seed)
    latent = random_latent(2, 3, 2, 5)
    target, before = latent.mean[:, modality], latent.product()
    latent.std[:, modality] *= 0.5
    after = latent.product()
    assert ((after.mean - target).abs() < (before.mean - target).abs()).all()
    assert (after.std < before.std).all()
    assert (after.std < latent.std.amin(1)).all()


def test_product_passes_gradcheck():
    latent = random_latent(4, 3, 2, 2, requires_grad=True)
    prior_mean = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def product(mean, std, prior_mean):
        return tuple(DiagonalGaussian(mean, std).product(MISSING, prior_mean))

    assert gradcheck(product, (*latent, prior_mean))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("prior_mean", [None, 0.25])
def test_std_of_0_decides_the_product(dtype, prior_mean):
    if prior_mean is not None:
        prior_mean = torch.tensor(prior_mean, dtype=dtype)
    for stds, mean in [
        ((0.0, 1.0, 0.5), 3.0),
        ((1e-3, 0.0, 0.0), 1.5),
        ((0.0, 0.0, math.inf), 4.0),
    ]:
        latent = one_label([3.0, 5.0, -2.0], stds, dtype)
        leaves = [x.requires_grad_() for x in latent]
        fused = latent.product(prior_mean=prior_mean)
        close(fused.mean, [[[mean]]])
        assert fused.std.item() == 0
        mean_grad, std_grad = gradient(fused.mean + fused.std, *leaves)
        assert std_grad.isfinite().all()
        weights = [s == 0 for s in stds]
        close(mean_grad.flatten(), [w / sum(weights) for w in weights])


def test_std_of_0_of_a_missing_modality_decides_nothing():
    latent, missing = one_label([3.0, 5.0], [0.0, 1.0]), torch.tensor([[True, False]])
    close(latent.product(missing).mean, [[[2.5]]])


@given(seed=st.integers(0, 2**16))
def test_infinite_std_is_the_missing_mask(seed):
    torch.manual_seed(seed)
    latent, missing = random_latent(4, 3, 2, 5), torch.rand(4, 3) < 0.5
    prior_mean = torch.randn(2, 5).double()
    leaves = [x.requires_grad_() for x in latent]
    unsure = latent._replace(std=latent.std.masked_fill(missing[:, :, None, None], math.inf))
    factor = torch.ones(4, 3).double().masked_fill(missing, math.inf)
    results = []
    for fused in (
        latent.product(missing, prior_mean),
        unsure.product(None, prior_mean),
        latent.inflated(factor).product(None, prior_mean),
    ):
        results.append([*fused, *gradient(fused.mean + fused.std, *leaves)])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_product_does_not_see_conflict_and_counts_copies():
    agree, differ = one_label([3.0, 3.0], [1.0, 1.0]), one_label([3.0, -3.0], [1.0, 1.0])
    assert torch.equal(agree.product().std, differ.product().std)
    close(one_label([3.0] * 8, [1.0] * 8).product().std ** -2, [[[9.0]]])  # 8 and the prior


# ------------------------------------------------------------------------------------------ inflated


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_inflated_multiplies_the_variance(dtype):
    latent, factor = random_latent(2, 3, 4, 5, dtype=dtype), 1 + 9 * torch.rand(2, 3)
    wider = latent.inflated(factor)
    assert wider.mean is latent.mean
    assert wider.std.dtype == dtype
    close(wider.variance, latent.variance * factor[:, :, None, None].double(), dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("of_factor", [torch.float16, torch.float32, torch.float64])
def test_factor_of_1_changes_no_bit(dtype, of_factor):
    latent = random_latent(2, 3, 4, 5, dtype=dtype)
    assert torch.equal(latent.inflated(torch.ones(2, 3, dtype=of_factor)).std, latent.std)


def test_gradients_of_inflated_are_finite():
    std = torch.tensor([0.0, 1.0, math.inf] * 3).view(1, 9, 1, 1).requires_grad_()
    factor = torch.tensor([1.0] * 3 + [4.0] * 3 + [math.inf] * 3).view(1, 9).requires_grad_()
    wider = DiagonalGaussian(torch.ones_like(std), std).inflated(factor)
    assert wider.std.flatten().tolist() == [0, 1, math.inf, 0, 2] + [math.inf] * 4
    std_grad, factor_grad = gradient(wider.std, std, factor)
    assert std_grad.flatten().tolist() == [1, 1, 0, 2, 2, 0, 0, 0, 0]
    assert factor_grad.flatten().tolist() == [0, 0.5, 0, 0, 0.25, 0, 0, 0, 0]


def test_inflated_passes_gradcheck():
    factor = (0.5 + torch.rand(2, 3, dtype=torch.float64)).requires_grad_()
    mean, std = random_latent(2, 3, 2, 2, requires_grad=True)
    assert gradcheck(lambda s, f: DiagonalGaussian(mean, s).inflated(f).std, (std, factor))


# ------------------------------------------------------------------------------------- what is refused

SHAPE = r"to have shape \({}\), but got \({}\)"
FOUR, PRIOR = (
    (2, 3, 4, 5),
    r"`prior_mean` to be broadcastable to \(B, Q, K\) = \(2, 4, 5\), but got",
)


def standing(shape=FOUR, mean=0.5, std=0.5):
    return DiagonalGaussian(torch.full(shape, mean), torch.full(shape, std))


def other(**parts):
    return standing()._replace(**parts)


@pytest.mark.parametrize(
    "call",
    [
        DiagonalGaussian.kl_to_standard_normal,
        DiagonalGaussian.rsample,
        DiagonalGaussian.to_distribution,
        DiagonalGaussian.embedding,
        DiagonalGaussian.product,
        lambda latent: latent.squared_distance(latent),
    ],
)
@pytest.mark.parametrize(
    ("latent", "error", "message"),
    [
        (other(std=torch.ones(3)), ValueError, "`std` " + SHAPE.format(".*=5", "3,")),
        (
            other(std=torch.ones(2, 3, 4, 6)),
            ValueError,
            "`std` " + SHAPE.format(".*", "2, 3, 4, 6"),
        ),
        (other(std=standing().std.to("meta")), ValueError, "`std` to be on cpu, but got meta"),
        (other(std=standing().std.long()), TypeError, "`std` to have a floating .* torch.int64"),
        (other(mean=standing().mean.int()), TypeError, "`mean` to have a floating .* torch.int32"),
        (DiagonalGaussian([1.0], [1.0]), TypeError, "`mean` to be a tensor, but got list"),
        (DiagonalGaussian(*torch.ones(2)), ValueError, r"`mean` to have shape .*, but got \(\)"),
        (standing(std=-1.0), ValueError, r"`std` to be in \[0, inf\], but got -1.0"),
        (standing(mean=math.nan), ValueError, "`mean` to be finite, but got 120 NaN .*"),
        (standing(mean=math.inf), ValueError, "`mean` to be finite, but got 120 NaN .*"),
        (standing(std=math.nan), ValueError, r"`std` to be (finite|in \[0, inf\]), but got .*"),
    ],
)
def test_gaussian_refuses(call, latent, error, message):
    refuses(nn.Identity(), lambda: call(latent), error, message)


@pytest.mark.parametrize("call", ["kl_to_standard_normal", "rsample", "to_distribution"])
def test_infinite_std_is_refused_where_it_means_nothing(call):
    message = "`std` to be finite, but got 120 NaN or infinite values"
    refuses(nn.Identity(), getattr(standing(std=math.inf), call), ValueError, message)


@pytest.mark.parametrize(
    ("latent", "arguments", "error", "message"),
    [
        (standing((2, 4, 5)), {}, ValueError, "`mean` " + SHAPE.format("B, M, Q, K", "2, 4, 5")),
        (
            standing(),
            {"missing": torch.zeros(2, 3)},
            TypeError,
            "`missing` to have a bool dtype, but got torch.float32",
        ),
        (
            standing(),
            {"missing": torch.zeros(3, 3).bool()},
            ValueError,
            "`missing` " + SHAPE.format("B=2, M=3", "3, 3"),
        ),
        (standing(), {"prior_mean": torch.ones(4, 6)}, ValueError, rf"{PRIOR} \(4, 6\)"),
        (standing(), {"prior_mean": torch.ones(1, *FOUR)}, ValueError, rf"{PRIOR} \(1, 2, .*\)"),
        (standing(), {"prior_mean": [0.0]}, TypeError, "`prior_mean` to be a tensor, but got list"),
        (
            standing(),
            {"prior_mean": torch.full((5,), math.nan)},
            ValueError,
            "`prior_mean` to be finite, but got 5 NaN .*",
        ),
        (
            standing(),
            {"prior_mean": torch.ones(5, device="meta")},
            ValueError,
            "`prior_mean` to be on cpu, but got meta",
        ),
    ],
)
def test_product_refuses(latent, arguments, error, message):
    refuses(nn.Identity(), lambda: latent.product(**arguments), error, message)


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [
        (torch.ones(2, 4), ValueError, SHAPE.format("B=2, M=3", "2, 4")),
        (torch.ones(2), ValueError, SHAPE.format("B=2, M=3", "2,")),
        (torch.ones(2, 3).int(), TypeError, "to have a floating dtype .* but got torch.int32"),
        (torch.ones(2, 3, device="meta"), ValueError, "to be on cpu, but got meta"),
        (2.0, TypeError, "to be a tensor, but got float"),
        (torch.zeros(2, 3), ValueError, "to be above 0, but got 0.0"),
        (torch.full((2, 3), math.nan), ValueError, "to be above 0, but got nan"),
    ],
)
def test_inflated_refuses(factor, error, message):
    refuses(nn.Identity(), lambda: standing().inflated(factor), error, f"`factor` {message}")


# -------------------------------------------------------------------------------- GaussianDecoupler


def test_output_shapes():
    latent = build()(random_input())
    assert isinstance(latent, DiagonalGaussian)
    assert latent.mean.shape == latent.std.shape == (BATCH, MODALITIES, LABELS, LATENT)


def test_defaults_are_those_of_the_contract():
    module = GaussianDecoupler(2, 3)
    assert module(torch.randn(1, 2, 4, 3)).mean.shape == (1, 2, 4, 64)
    assert module.encoder[0].weight.shape == (2, 128, 3)
    assert [layer.p for layer in module.encoder if isinstance(layer, nn.Dropout)] == [0.1]
    assert module.min_std == 1e-4
    assert module.normalize_mean


@pytest.mark.parametrize("hidden_dims", [(8,), (8, 5), (8, 5, 3)])
def test_hidden_dims_set_the_depth(hidden_dims):
    module = build(hidden_dims=hidden_dims)
    latent = module(random_input())
    assert latent.mean.shape == (BATCH, MODALITIES, LABELS, LATENT)
    widths = (IN, *hidden_dims)
    hidden = sum((a + 1) * b for a, b in zip(widths, hidden_dims, strict=False))
    heads = 2 * (hidden_dims[-1] + 1) * LATENT
    assert sum(p.numel() for p in module.parameters()) == MODALITIES * (hidden + heads)


def test_without_hidden_layers_the_mean_is_linear():
    module, (a, b) = (
        build(hidden_dims=(), normalize_mean=False),
        torch.randn(2, 1, MODALITIES, 2, IN).double(),
    )
    middle = (module(a).mean + module(b).mean) / 2
    close(module((a + b) / 2).mean, middle.detach())


def test_labels_share_the_encoder_of_their_modality():
    module, z = build(), random_input()
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted, latent = module(z[:, :, order]), module(z)
    close(permuted.mean, latent.mean[:, :, order])
    close(permuted.std, latent.std[:, :, order])


def test_modalities_have_encoders_of_their_own():
    z = torch.randn(1, 1, LABELS, IN, dtype=torch.float64).expand(1, MODALITIES, LABELS, IN)
    mean, std = build()(z)
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert not torch.allclose(mean[:, i], mean[:, j])
        assert not torch.allclose(std[:, i], std[:, j])


def test_no_cell_depends_on_another():
    z = random_input().requires_grad_()
    mean, std = build()(z)
    (grad,) = gradient(mean[1, 2, 3] + std[1, 2, 3], z)
    assert (grad[1, 2, 3] != 0).any()
    grad[1, 2, 3] = 0
    assert (grad == 0).all()


def test_initialisation_has_the_scale_of_torch_layers():
    # A batched weight of shape (M, in, out) misleads the fan computation of torch.nn.init.
    module = GaussianDecoupler(3, 256, 64, hidden_dims=(128,), dropout=0.0, normalize_mean=False)
    twin = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))
    z = torch.randn(64, 3, 2, 256)
    ratio = (module(z).mean.std() / twin(z).std()).item()
    assert 1 / 3 < ratio < 3
    for layer, in_dim in ((module.encoder[0], 256), (module.mean_head, 128)):
        for parameter in (layer.weight, layer.bias):  # uniform between these bounds
            bound = in_dim**-0.5
            assert -bound <= parameter.min() < -0.8 * bound
            assert 0.8 * bound < parameter.max() <= bound


def test_passes_gradcheck():
    module = build()
    z = torch.randn(2, MODALITIES, 2, IN, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda z: tuple(module(z)), (z,))


def test_every_parameter_gets_a_gradient():
    module = build()
    mean, std = module(random_input())
    (mean.square().sum() + std.square().sum()).backward()
    assert all((p.grad != 0).any() for p in module.parameters())


@pytest.mark.parametrize("min_std", [1e-4, 0.5])
def test_std_follows_its_equation(min_std):
    module = GaussianDecoupler(1, 1, 1, hidden_dims=(), min_std=min_std).double()
    nn.init.ones_(module.log_var_head.weight)
    nn.init.zeros_(module.log_var_head.bias)
    raw = [-1e20, -1e3, -15.0, -2.0, -0.3, 0.0, 0.3, 0.7, 2.0, 15.0, 1e3, 1e20]
    expected = []
    for r in raw:
        h = 2 * math.log(1e4) if r >= 0 else -2 * math.log(min_std)
        expected.append(min_std + math.exp(0.5 * r / math.sqrt(1 + (r / h) ** 2)))
    std = module(torch.tensor(raw, dtype=torch.float64).view(-1, 1, 1, 1)).std
    close(std.flatten() / torch.tensor(expected, dtype=torch.float64), [1.0] * len(raw))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e2, 1e4, 1e10])
@pytest.mark.parametrize("min_std", [1e-4, 0.5])
def test_std_is_above_min_std_and_finite(scale, min_std):
    std = build(min_std=min_std).float()(scale * random_input(torch.float32)).std
    assert (std > min_std).all()
    assert std.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_std_stays_alive_far_outside(scale, dtype):
    z = (scale * random_input(dtype)).requires_grad_()
    (grad,) = gradient(build().to(dtype)(z).std, z)
    assert grad.isfinite().all()
    assert (grad != 0).any(-1).all()


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float16, 1e3), (torch.bfloat16, 1e30), (torch.float32, 1e30), (torch.float64, 1e300)],
)
def test_std_is_finite_for_the_largest_inputs(dtype, largest):
    z = largest * random_input(dtype).sign()
    std = build().to(dtype)(z).std
    assert std.isfinite().all()
    assert (std > 0).all()


@pytest.mark.parametrize("dtype", HALF)
def test_small_min_std_is_finite_in_half_precision(dtype):
    z = (3e4 * random_input(torch.float64)).clamp(-6e4, 6e4).to(dtype)
    std = build(min_std=1e-6).to(dtype)(z).std
    assert std.isfinite().all()
    assert (std >= torch.tensor(1e-6, dtype=dtype)).all()


def test_std_has_some_spread():
    std = build()(random_input()).std
    assert std.amax() > 1.01 * std.amin()


def test_normalized_mean_has_the_length_of_root_k():
    z = random_input()
    module = build(normalize_mean=True)
    mean, std = module(z, MISSING)
    close(mean[~MISSING].square().sum(-1), torch.full((6, LABELS), LATENT))
    assert (mean[MISSING] == 0).all()
    other = build(normalize_mean=False)
    other.load_state_dict(module.state_dict())
    plain = other(z, MISSING)
    close(torch.cosine_similarity(mean, plain.mean, dim=-1)[~MISSING], torch.ones(6, LABELS))
    assert torch.equal(std, plain.std)


def test_gradient_does_not_stretch_a_normalized_mean():
    module, raw = build(normalize_mean=True), []
    module.mean_head.register_forward_hook(lambda *call: raw.append(call[-1]))
    mean = module(random_input()).mean
    (grad,) = gradient((mean * torch.randn_like(mean)).sum(), raw[0])
    assert (grad.norm(dim=-1) > 1e-3).all()
    close((grad * raw[0]).sum(-1), torch.zeros(MODALITIES, BATCH * LABELS))


def test_dropout_is_on_in_training_only():
    module, z = build(dropout=0.5), random_input()
    assert not torch.equal(module(z).mean, module(z).mean)
    module.eval()
    assert torch.equal(module(z).mean, module(z).mean)


# -------------------------------------------------------------------------------- missing modalities


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_missing_modality_is_the_prior_exactly(value):
    mean, std = build()(poisoned(random_input(), MISSING, value), MISSING)
    assert (mean[MISSING] == 0).all()
    assert (std[MISSING] == 1).all()


def test_missing_modality_leaves_the_others_alone():
    module, z = build(), random_input()
    whole, latent = module(z), module(poisoned(z, MISSING), MISSING)
    close(latent.mean[~MISSING], whole.mean[~MISSING].detach())
    close(latent.std[~MISSING], whole.std[~MISSING].detach())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_missing_modality_does_not_influence_gradients(value):
    module, z = build(), random_input()

    def gradients(value):
        dirty = poisoned(z, MISSING, value).requires_grad_()
        latent = module(dirty, MISSING)
        return gradient(latent.mean.square() + latent.std.square(), dirty, *module.parameters())

    for actual, expected in zip(gradients(value), gradients(0.0), strict=True):
        close(actual, expected)


def test_missing_modality_gets_no_gradient():
    z = random_input().requires_grad_()
    latent = build()(z, MISSING)
    (grad,) = gradient(latent.mean.square() + latent.std.square(), z)
    assert (grad[MISSING] == 0).all()
    assert (grad[~MISSING] != 0).any(-1).all()


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_half_precision_is_finite_and_near_float64(dtype, scale):
    module, z = build().to(dtype), (scale * random_input()).to(dtype)
    latent = module(z)
    expected = module.double()(z.double())
    assert latent.mean.dtype == latent.std.dtype == dtype
    close(latent.mean / scale, expected.mean.detach() / scale, dtype)
    close(latent.std.log(), expected.std.detach().log(), dtype)
    assert (latent.std > 0).all()


# --------------------------------------------------------------------------------------- bad inputs

POSITIVE = "to be a positive integer, but got"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_modalities": 0}, ValueError, f"{POSITIVE} 0"),
        ({"num_modalities": "3"}, TypeError, f"{POSITIVE} '3'"),
        ({"in_dim": 0}, ValueError, f"{POSITIVE} 0"),
        ({"latent_dim": 0}, ValueError, f"{POSITIVE} 0"),
        ({"latent_dim": None}, TypeError, f"{POSITIVE} None"),
        ({"hidden_dims": (8, 0)}, ValueError, f"{POSITIVE} 0"),
        ({"hidden_dims": "12"}, TypeError, f"{POSITIVE} '1'"),
        ({"hidden_dims": 8}, TypeError, "to be a sequence, but got 8"),
        ({"dropout": -0.1}, ValueError, r"to be a number in \[0, 1\), but got -0.1"),
        ({"min_std": 0.0}, ValueError, r"to be a number in \(0, 1\), but got 0.0"),
        ({"min_std": -1.0}, ValueError, r"to be a number in \(0, 1\), but got -1.0"),
        ({"min_std": 1}, ValueError, r"to be a number in \(0, 1\), but got 1"),
        ({"min_std": math.nan}, ValueError, r"to be a number in \(0, 1\), but got nan"),
        ({"min_std": "small"}, TypeError, r"to be a number in \(0, 1\), but got 'small'"),
        ({"normalize_mean": 1}, TypeError, "to be True or False, but got 1"),
        ({"validate_args": "yes"}, TypeError, "to be True, False or None, but got 'yes'"),
    ],
)
def test_constructor_rejects(change, error, message):
    [name] = change
    with pytest.raises(error, match=rf"^Expected `{name}(\[\d\])?` {message}$"):
        GaussianDecoupler(**({"num_modalities": 2, "in_dim": 3} | change))


Z = torch.ones(BATCH, MODALITIES, LABELS, IN)
B_M_Q_IN = "B, M=3, Q, in_dim=6"


@pytest.mark.parametrize(
    ("z", "error", "message"),
    [
        (Z[:, 0], ValueError, SHAPE.format(B_M_Q_IN, "4, 5, 6")),
        (Z[:, :1], ValueError, SHAPE.format(B_M_Q_IN, "4, 1, 5, 6")),
        (Z[..., :5], ValueError, SHAPE.format(B_M_Q_IN, "4, 3, 5, 5")),
        (Z.long(), TypeError, "to have a floating dtype .*, but got torch.int64"),
        (Z * math.nan, ValueError, "to be finite, but got 360 NaN or infinite values"),
        (poisoned(Z, (0, 0, 0, 0), math.inf), ValueError, "to be finite, but got 1 NaN .*"),
        (Z.double(), TypeError, "to have the dtype of the module, torch.float32, but got .*64"),
        (Z.half(), TypeError, "to have the dtype of the module, torch.float32, but got .*16"),
        (Z.to("meta"), ValueError, "to be on cpu, where the module is, but got meta"),
    ],
)
def test_rejects_z(z, error, message):
    module = build().float()
    refuses(module, lambda: module(z), error, f"`z` {message}")


@pytest.mark.parametrize(
    ("missing", "error", "message"),
    [
        (torch.zeros(BATCH, MODALITIES), TypeError, "to have a bool .* but got torch.float32"),
        (torch.zeros(BATCH, MODALITIES).long(), TypeError, "to have a bool .* got torch.int64"),
        (MISSING.mT, ValueError, SHAPE.format("B=4, M=3", "3, 4")),
        (MISSING[0], ValueError, SHAPE.format("B=4, M=3", "3,")),
        (MISSING.to("meta"), ValueError, "to be on cpu, but got meta"),
    ],
)
def test_rejects_missing(missing, error, message):
    module = build()
    refuses(module, lambda: module(random_input(), missing), error, f"`missing` {message}")
    latent = random_latent(BATCH, MODALITIES, LABELS, LATENT)
    refuses(module, lambda: latent.product(missing), error, f"`missing` {message}")


def test_rejects_values_that_are_not_missing():
    z = random_input()
    z[1, 1] = math.nan  # there; (1, 0) is missing
    with pytest.raises(ValueError, match="`z`"):
        build()(z, MISSING)


@pytest.mark.parametrize("validate_args", [None, False, True])
def test_validate_args_is_passed_on(monkeypatch, validate_args):
    passed = record_validate_args(monkeypatch)
    build(validate_args=validate_args)(random_input())
    assert passed == [validate_args]


def test_variance_does_not_leave_the_range_of_half_precision():
    latent = DiagonalGaussian(torch.zeros(2).half(), torch.tensor([1e4, 1e-4]).half())
    close(latent.variance, latent.std.float() ** 2)
    close(latent.log_var, 2 * latent.std.float().log())


def test_tiny_min_std_stays_above_zero_under_float16():
    std = GaussianDecoupler(1, 1, 1, min_std=1e-8)._bounded_std(
        torch.tensor([-6e4, -math.inf]).half()
    )
    assert (std > 0).all()


def test_overflown_log_variance_is_the_largest_std():
    std = GaussianDecoupler(1, 1, 1)._bounded_std(torch.tensor([6e4, math.inf]).half())
    close(std, [1e4, 1e4])
