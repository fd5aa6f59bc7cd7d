"""GaussianFusion: a table of what each rule does; `python tests/test_rules.py` prints it."""

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from support import Bad, close, gradient, poisoned, random_latent, record_validate_args, refused
from uncertainty_mm import DiagonalGaussian, GaussianFusion
from uncertainty_mm.rules import Rule

RULES = get_args(Rule)
MISSING = torch.tensor([[False] * 3, [True, False, False], [False, True, True], [True] * 3])


def latent_of(means, stds, dtype=torch.float64):
    """One sample with one label and one dimension, a number a modality."""
    return DiagonalGaussian(
        *(torch.tensor(x, dtype=dtype).view(1, -1, 1, 1) for x in (means, stds))
    )


def same(left, right):
    return all(
        torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(left, right, strict=True)
    )


def parts(latent, modalities):
    return DiagonalGaussian(*(x[:, modalities] for x in latent))


# ---------------------------------------------------------------------------- the table of identities


def copies_keep_the_mean(fuse):
    one = random_latent(4, 1, 5, 7)
    return same(fuse(parts(one, [0] * 3))[:1], [one.mean[:, 0]])


def copies_keep_the_std(fuse):
    one = random_latent(4, 1, 5, 7)
    return same(fuse(parts(one, [0] * 3))[1:2], [one.std[:, 0]])


def conflict_is_seen(fuse):
    agree, differ = (fuse(latent_of([3.0, x], [1.0, 1.0])).std for x in (3.0, -3.0))
    assert (differ >= agree - 1e-12).all()
    return bool(differ > 1.5 * agree)


def infinite_std_does_not_count(fuse):
    latent = random_latent(4, 3, 5, 7)
    infinite = poisoned(latent.std.transpose(0, 1), 1, math.inf).transpose(0, 1)
    latent = DiagonalGaussian(latent.mean, infinite)
    if fuse.rule in ("mixture", "mixture_of_products", "barycenter"):
        with pytest.raises(ValueError, match=r"latent\.std"):
            fuse(latent)
        return False
    fused, left = fuse(latent), fuse(parts(latent, [0, 2]))
    assert (fused.weights[:, 1] == 0).all()
    return same((*fused[:2], fused.weights[:, [0, 2]]), left)


def order_changes_nothing(fuse):
    latent = random_latent(4, 3, 5, 7)
    fused = fuse(latent, MISSING)
    orders = itertools.permutations(range(3))
    turned = [(fuse(parts(latent, order), MISSING[:, order]), order) for order in orders]
    return all(same(x, (*fused[:2], fused.weights[:, order])) for x, order in turned)


def masked_is_absent(fuse):
    latent = random_latent(4, 3, 5, 7)
    fused = fuse(DiagonalGaussian(*(poisoned(x, MISSING) for x in latent)), MISSING)
    answers = []
    for sample in range(3):
        there = ~MISSING[sample]
        left = fuse(DiagonalGaussian(*(x[sample : sample + 1, there] for x in latent)))
        masked = [x[sample : sample + 1] for x in fused]
        answers.append(same((*masked[:2], masked[2][:, there]), left))
    assert (fused.weights[MISSING] == 0).all()
    return all(answers)


def one_is_the_result(fuse):
    latent = random_latent(4, 1, 5, 7)
    return same(fuse(latent)[:2], [x.squeeze(1) for x in latent])


def none_gives_the_prior(fuse):
    latent = random_latent(2, 3, 5, 7)
    mean, std, weights = fuse(latent, torch.ones(2, 3, dtype=torch.bool))
    return bool((mean == 0).all() and (std == 1).all() and (weights == 0).all())


def weights_sum_to_one(fuse):
    weights = fuse(random_latent(4, 3, 5, 7), MISSING).weights
    assert (weights[MISSING] == 0).all()
    assert (weights >= 0).all()
    return same([weights.sum(1)[:3]], [torch.ones(3, 5).double()])


IDENTITIES = {  # and the rules for which they do not hold
    copies_keep_the_mean: ["product"],
    copies_keep_the_std: ["product", "mixture_of_products"],
    conflict_is_seen: ["product", "generalized_product", "barycenter"],
    infinite_std_does_not_count: ["mixture", "mixture_of_products", "barycenter"],
    order_changes_nothing: [],
    masked_is_absent: [],
    one_is_the_result: ["product"],
    none_gives_the_prior: [],
    weights_sum_to_one: ["product"],
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda identity: identity.__name__)
def test_table_of_identities(identity, rule):
    assert identity(GaussianFusion(rule)) == (rule not in IDENTITIES[identity])


# --------------------------------------------------------------------------------- what each rule is


def test_product_is_that_of_the_gaussian():
    latent = random_latent(4, 3, 5, 7)
    fused = GaussianFusion("product")(latent, MISSING)
    assert same(fused[:2], latent.product(MISSING))
    shares = (~MISSING)[:, :, None, None] * fused.std.unsqueeze(1) ** 2 / latent.std**2
    close(fused.weights, shares.mean(-1))
    close(1 - fused.weights.sum(1), (fused.std**2).mean(-1))  # what the prior keeps


def test_moments_of_mixtures_are_those_of_draws():
    latent, number = latent_of([3.0, -1.0], [0.5, 2.0]), 400_000
    draws = torch.stack([m + s * torch.randn(number) for m, s in ((3.0, 0.5), (-1.0, 2.0))])
    product = latent_of([3.0, -1.0], [0.5, 2.0], torch.float64)
    product = GaussianFusion("generalized_product")(product)
    both = product.mean.item() + product.std.item() / 2**0.5 * torch.randn(number)
    for rule, sample in (("mixture", draws), ("mixture_of_products", torch.stack([*draws, both]))):
        mean, std, _ = GaussianFusion(rule)(latent)
        assert abs(mean.item() - sample.mean().item()) < 0.01
        assert abs(std.item() - sample.std().item()) < 0.01


def test_norm_weights_follow_the_norm():
    std = torch.tensor([[3.0, 4.0], [0.6, 0.8]]).view(1, 2, 1, 2)  # norms 5 and 1
    weights = GaussianFusion("norm_weighted")(DiagonalGaussian(torch.zeros_like(std), std)).weights
    close(weights.flatten(), [1 / 6, 5 / 6])


def test_generalized_product_has_the_weights_that_were_learned():
    fusion = GaussianFusion("generalized_product", 3, 5, 7).double()
    latent = random_latent(4, 3, 5, 7)
    assert same(fusion(latent, MISSING), GaussianFusion("generalized_product")(latent, MISSING))
    fusion.weight_logits.data[0] = 30
    fused = fusion(latent, MISSING)
    close(fused.mean[0], latent.mean[0, 0])
    assert (fused.weights[0, 0] > 1 - 1e-9).all()
    assert not same(fused, GaussianFusion("generalized_product")(latent, MISSING))
    fusion.reset_parameters()
    assert (fusion.weight_logits == 0).all()


@pytest.mark.parametrize(("sizes", "shape"), [((3,), (3, 1, 1)), ((3, None, 7), (3, 1, 7))])
def test_weights_are_shared_along_sizes_that_are_not_given(sizes, shape):
    fusion = GaussianFusion("generalized_product", *sizes)
    assert fusion.weight_logits.shape == shape
    fused = fusion(random_latent(4, 3, 5, 7, dtype=torch.float32))
    assert all(grad.isfinite().all() for grad in gradient(fused.mean, fusion.weight_logits))


@pytest.mark.parametrize("rule", sorted({*RULES} - {"generalized_product"}))
def test_other_rules_have_no_parameters(rule):
    assert not [*GaussianFusion(rule, 3, 5, 7).parameters()]


# ------------------------------------------------------------------------------------- the limits


@pytest.mark.parametrize("rule", RULES)
def test_passes_gradcheck(rule):
    fusion, latent = GaussianFusion(rule), random_latent(4, 3, 2, 2, requires_grad=True)
    assert gradcheck(lambda mean, std: fusion(DiagonalGaussian(mean, std), MISSING), tuple(latent))


def test_learned_weights_pass_gradcheck():
    fusion, latent = (
        GaussianFusion("generalized_product", 3, 2, 2).double(),
        random_latent(4, 3, 2, 2),
    )
    logits = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(logits):
        return torch.func.functional_call(fusion, {"weight_logits": logits}, (latent, MISSING))

    assert gradcheck(run, logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stds", [(0, 0, 0), (0, 1, 2), (1e-4, 1e4, 1), (0, 1e-4, 6e4)])
@pytest.mark.parametrize("rule", RULES)
def test_extreme_stds_give_numbers_and_gradients(rule, stds, dtype):
    mean = torch.tensor([2.0, -3.0, 1.0]).expand(4, 3)[..., None, None].to(dtype).requires_grad_()
    std = torch.tensor(stds, dtype=torch.float64).to(dtype).expand(4, 3)[..., None, None]
    std = std.clone().requires_grad_()
    fusion = GaussianFusion(rule, 3).to(dtype)
    fused = fusion(DiagonalGaussian(mean, std), MISSING)
    total = sum(x.double().sum() for x in fused)
    grads = torch.autograd.grad(total, [mean, std, *fusion.parameters()], materialize_grads=True)
    assert all(x.isfinite().all() for x in (*fused, *grads))
    assert all((x[MISSING] == 0).all() for x in grads[:2])
    assert ((fused.mean >= -3) & (fused.mean <= 2)).all()


@pytest.mark.parametrize("rule", RULES)
def test_stds_near_the_ends_of_float32_give_numbers(rule):
    mean, std = latent_of([1e20, -1.0, 1e-20], [1e-35, 1e-25, 1e15], torch.float32)
    mean.requires_grad_(), std.requires_grad_()
    fused = GaussianFusion(rule)(DiagonalGaussian(mean, std))
    grads = gradient(fused.mean / 1e20 + fused.std / 1e20, mean, std)
    assert all(x.isfinite().all() for x in (*fused, *grads))


@pytest.mark.parametrize("rule", RULES)
def test_infinite_stds_that_are_not_looked_at_give_no_nan(rule):
    fused = GaussianFusion(rule, validate_args=False)(latent_of([1.0, 2.0], [1.0, math.inf]))
    assert all(x.isfinite().all() for x in fused)


@pytest.mark.parametrize("rule", ["product", "generalized_product"])
def test_stds_of_zero_decide_alone(rule):
    fused = GaussianFusion(rule)(latent_of([3.0, 1.0, 100.0], [0.0, 0.0, 1.0]))
    close(fused.mean.flatten(), [2.0])
    assert (fused.std == 0).all()


@pytest.mark.parametrize("rule", ["mixture", "mixture_of_products", "norm_weighted"])
def test_points_have_the_spread_of_their_means(rule):
    fused = GaussianFusion(rule)(latent_of([3.0, 1.0], [0.0, 0.0]))
    close(fused.mean.flatten(), [2.0])
    # the product of both, at 2, is one of three parts
    close(fused.std.flatten(), [(2 / 3) ** 0.5 if rule == "mixture_of_products" else 1.0])


@pytest.mark.parametrize("rule", RULES)
def test_std_of_one_point_is_zero(rule):
    fused = GaussianFusion(rule)(latent_of([3.0], [0.0]))
    close(fused.mean.flatten(), [3.0])
    assert (fused.std == 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_far_means_do_not_cancel(rule):
    wide = latent_of([1e4, 1e4 + 1, 1e4 - 2], [1e-2, 2e-2, 1e2], torch.float32)
    exact = GaussianFusion(rule)(DiagonalGaussian(*(x.double() for x in wide)))
    for x, y in zip(GaussianFusion(rule)(wide), exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["mixture", "mixture_of_products", "barycenter", "norm_weighted"])
def test_copies_far_away_keep_their_std_to_the_bit_of_rounding(rule):
    one = latent_of([1e7 + 1], [1e-3], torch.float32)
    fused = GaussianFusion(rule)(parts(one, [0] * 3))
    assert fused.mean == one.mean.flatten()
    assert rule == "mixture_of_products" or abs(fused.std.item() / 1e-3 - 1) < 1e-6


def test_precisions_that_vary_by_orders_are_exact_in_float32():
    latent = latent_of([1.0, 5.0, -2.0], [1e-6, 1.0, 1e6], torch.float32)
    fused = GaussianFusion("mixture_of_products")(latent)
    exact = GaussianFusion("mixture_of_products")(DiagonalGaussian(*(x.double() for x in latent)))
    for x, y in zip(fused, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-9)
    # of 4 subsets with the first it decides all; of 2 with the second but not the first, that
    close(fused.weights.flatten(), [4 / 7, 2 / 7, 1 / 7])


@given(seed=st.integers(0, 2**16), rule=st.sampled_from(RULES))
def test_a_mean_lies_between_those_of_the_modalities(seed, rule):
    torch.manual_seed(seed)
    latent = random_latent(3, 4, 2, 2)
    low, high = torch.cat([latent.mean, 0 * latent.mean[:, :1]], 1).aminmax(dim=1)
    mean, std, _ = GaussianFusion(rule)(latent)
    assert ((mean >= low - 1e-9) & (mean <= high + 1e-9)).all()
    assert (std > 0).all()


def test_eight_modalities_have_255_products():
    latent = random_latent(2, 8, 1, 2, requires_grad=True)
    fused = GaussianFusion("mixture_of_products")(latent)
    close(fused.weights.sum(1), torch.ones(2, 1))
    close(fused.mean, (gradient(fused.mean, latent.mean)[0] * latent.mean).sum(1))


# ---------------------------------------------------------------------------------------- bad input


def test_validate_args_reaches_the_checks(monkeypatch):
    passed = record_validate_args(monkeypatch)
    GaussianFusion("mixture", validate_args=True)(latent_of([1.0], [1.0]))
    assert passed
    assert all(passed)


@pytest.mark.parametrize(
    "case",
    [
        Bad("rule", lambda _: GaussianFusion("mean"), ValueError, "`rule` to be one of"),
        Bad("size", lambda _: GaussianFusion("mixture", 0), ValueError, "`num_modalities`.*got 0"),
        Bad("type", lambda _: GaussianFusion("mixture", 2, 1.0), TypeError, "`num_labels`.*1.0"),
        Bad(
            "labels alone",
            lambda _: GaussianFusion("generalized_product", None, 3),
            ValueError,
            "`num_modalities` along with",
        ),
        Bad(
            "nine",
            lambda _: GaussianFusion("mixture_of_products", 9),
            ValueError,
            "`num_modalities` to have at most 8 modalities .* got 9",
        ),
        Bad(
            "nine given",
            lambda _: GaussianFusion("mixture_of_products")(random_latent(1, 9, 1, 1)),
            ValueError,
            "`latent` to have at most 8 modalities .* got 9",
        ),
        Bad(
            "none given",
            lambda _: GaussianFusion("product")(random_latent(1, 0, 1, 1)),
            ValueError,
            "`latent` to have at least one modality, but got 0",
        ),
        Bad(
            "other number",
            lambda _: GaussianFusion("mixture", 3)(random_latent(1, 2, 1, 1)),
            ValueError,
            r"`latent.mean` to have shape \(B, M=3, Q, K\), but got \(1, 2, 1, 1\)",
        ),
        Bad(
            "tensor",
            lambda _: GaussianFusion("mixture")(torch.ones(1, 2, 1, 1)),
            TypeError,
            "`latent` to be a DiagonalGaussian",
        ),
        Bad(
            "negative",
            lambda _: GaussianFusion("mixture")(latent_of([1.0], [-1.0])),
            ValueError,
            "`latent.std` to be in",
        ),
        Bad(
            "nan",
            lambda _: GaussianFusion("mixture")(latent_of([math.nan], [1.0])),
            ValueError,
            "`latent.mean` to be finite",
        ),
    ],
    ids=lambda case: case.name,
)
def test_bad_input_is_refused(case):
    refused(case, None)
