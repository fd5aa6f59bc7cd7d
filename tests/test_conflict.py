"""Conflict, against the mathematics it claims, and data of which is known what was exchanged."""

import copy
import math
import warnings

import pytest
import torch
from torch.autograd import gradcheck

from support import (
    HALF,
    NO_EXPORT_OF_ANY_BATCH,
    TORCH_2_6,
    Bad,
    close,
    no_default_device,
    poisoned,
    record_validate_args,
    refused,
)
from uncertainty_mm import Conflict, Typicality, conflict
from uncertainty_mm.metrics.functional import auroc

NAMES = ["voice", "face", "text"]


def draw(samples, modalities=3, dim=2, noise=0.5):
    """Rows of one topic, seen differently by each modality."""
    topic = torch.randn(samples, dim)
    return {name: topic + noise * torch.randn(samples, dim) for name in NAMES[:modalities]}


def fitted(rows, missing=None, **settings):
    return Conflict({name: x.shape[1] for name, x in rows.items()}, **settings).fit(rows, missing)


def exchanged(rows, name):
    return rows | {name: rows[name].roll(1, 0)}


def known(correlations, slope=1.0, **settings):
    """A fit that is known: one column a modality."""
    module = Conflict(dict.fromkeys(NAMES[: len(correlations)], 1), **settings)
    module.weight.fill_(1)
    module.projection.fill_diagonal_(1)
    module.covariance.copy_(torch.tensor(correlations))
    module.slope.fill_(slope)
    return module


# ------------------------------------------------------------------------------------ exact facts


@pytest.mark.parametrize("correlation", [0.0, 0.5, -0.9])
def test_two_columns_have_the_ratio_of_the_textbook(correlation):
    module = known([[1.0, correlation], [correlation, 1.0]])
    x, y = torch.randn(2, 20, 1)
    rest = 1 - correlation**2
    conditional = (y - correlation * x).square() / rest + math.log(rest)
    expected = 0.5 * (conditional - y.square())
    close(module.log_ratios({"voice": x, "face": y}), expected.expand(-1, 2))


def test_of_two_modalities_neither_can_be_named():
    rows = draw(200, modalities=2)
    ratios = fitted(rows).log_ratios(exchanged(rows, "face"))
    torch.testing.assert_close(ratios[:, 0], ratios[:, 1], rtol=1e-3, atol=1e-3)


def test_what_depends_on_nothing_leaves_the_prior():
    module = known([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], prior=0.3)
    rows = draw(10, dim=1)
    close(module(rows), torch.full((10, 3), 0.1))
    assert torch.equal(module.log_ratios(rows), torch.zeros(10, 3))
    unfitted = Conflict(dict.fromkeys(NAMES, 1), prior=0.3)
    close(unfitted(rows), torch.full((10, 3), 0.1))


def test_prior_is_the_odds_before_looking():
    rows = draw(100)
    even, rare = fitted(rows), fitted(rows, prior=0.01)
    close(rare.log_ratios(rows), even.log_ratios(rows))
    odds = [module(rows).sum(1).logit() for module in (even, rare)]
    torch.testing.assert_close(
        odds[0] - odds[1], torch.full((100,), math.log(99)), rtol=1e-3, atol=1e-3
    )


def test_missing_modality_is_integrated_out():
    rows = draw(300)
    module = fitted(rows)
    at = torch.tensor([0, 1, 4, 5])
    without = Conflict({"voice": 2, "text": 2})
    for name in ("shift", "weight"):
        getattr(without, name).copy_(getattr(module, name)[at])
    without.projection.copy_(module.projection[at][:, at])
    without.covariance.copy_(module.covariance[at][:, at])
    without.slope.copy_(module.slope)
    expected = without.log_ratios({name: rows[name] for name in ("voice", "text")})
    missing = torch.tensor([False, True, False]).expand(300, 3)
    spoilt = rows | {"face": poisoned(rows["face"], torch.ones(300, 2).bool())}
    absent = {name: rows[name] for name in ("voice", "text")}
    for given in ((spoilt, missing), (absent, None), (absent, torch.zeros(300, 3).bool())):
        ratios = module.log_ratios(*given)
        torch.testing.assert_close(ratios[:, [0, 2]], expected, rtol=1e-4, atol=1e-4)
        assert not ratios[:, 1].any()
        assert not module(*given)[:, 1].any()


def test_mask_of_nothing_is_no_mask():
    rows = draw(100)
    module = fitted(rows)
    torch.testing.assert_close(
        module(rows, torch.zeros(100, 3).bool()), module(rows), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("there", [[], [1]])
def test_modality_alone_contradicts_nothing(there):
    rows = draw(50)
    missing = torch.ones(50, 3).bool()
    missing[:, there] = False
    module = fitted(rows)
    assert torch.equal(module(rows, missing), torch.zeros(50, 3))
    assert torch.equal(module.log_ratios(rows, missing), torch.zeros(50, 3))


def test_order_of_modalities_and_unit_of_columns_do_not_matter():
    rows = draw(200)
    before = fitted(rows).log_ratios(rows)
    turned = {name: 2.0**9 * rows[name] + 3 for name in reversed(NAMES)}
    torch.testing.assert_close(
        fitted(turned).log_ratios(turned).flip(1), before, rtol=1e-2, atol=1e-2
    )


# --------------------------------------------------------------------------------- what it is for


@pytest.mark.parametrize(("noise", "prior"), [(0.3, 0.1), (1.0, 0.5)])
def test_probability_is_the_share_of_the_foreign(noise, prior):
    module, fresh = fitted(draw(2000, noise=noise), prior=prior), draw(4000, noise=noise)
    foreign = torch.rand(4000) < prior
    which = torch.randint(3, (4000,)).masked_fill(~foreign, -1)
    mixed = {
        name: torch.where((which == m).unsqueeze(1), x.roll(1, 0), x)
        for m, (name, x) in enumerate(fresh.items())
    }
    probs = module(mixed)
    assert module.slope.item() == pytest.approx(1, abs=0.15)
    for m in range(3):
        assert probs[:, m].mean().item() == pytest.approx(prior / 3, abs=0.02)
    believed = probs.sum(1)
    for group in believed.argsort().chunk(4):
        share = foreign[group].float().mean().item()
        assert believed[group].mean().item() == pytest.approx(share, abs=0.05)


def test_the_foreign_one_is_noticed_and_named():
    module, fresh = fitted(draw(500, noise=0.3)), draw(500, noise=0.3)
    clean = module.log_ratios(fresh).amax(1)
    for m, name in enumerate(NAMES):
        swapped = exchanged(fresh, name)
        both = torch.cat([clean, module.log_ratios(swapped).amax(1)])
        assert auroc(both, torch.arange(1000) >= 500) > 0.9
        assert (module(swapped).argmax(1) == m).float().mean() > 0.8


def test_summaries_of_sequences_tell_of_a_shared_room():
    room = torch.randn(400, 1, 3)
    features = {name: room + 0.5 * torch.randn(400, 8, 3) for name in NAMES}
    padding_mask = {name: torch.rand(400, 8) < 0.2 for name in NAMES}
    typicality = Typicality(dict.fromkeys(NAMES, 3))
    for part in typicality.modality.values():
        part.step_weight.fill_(1)
        part.step_root.fill_diagonal_(1)
    rows = typicality.summaries(features, padding_mask)
    module = fitted(rows)
    assert {name: tuple(x.shape) for name, x in rows.items()} == dict.fromkeys(NAMES, (400, 9))
    assert module(rows).sum(1).median() < 0.1
    assert module(exchanged(rows, "text")).sum(1).median() > 0.9
    assert list(typicality.summaries({"face": features["face"]})) == ["face"]


# ---------------------------------------------------------------------------------------------- fit


def test_missing_rows_do_not_count_in_the_fit():
    rows = draw(200)
    missing = torch.rand(200, 3) < 0.3
    spoilt = {
        name: poisoned(x, missing[:, m : m + 1].expand_as(x))
        for m, (name, x) in enumerate(rows.items())
    }
    module, other = fitted(rows, missing), fitted(spoilt, missing)
    for name, state in module.state_dict().items():
        assert torch.equal(state, other.state_dict()[name])
    there = ~missing[:, 0]
    close(module.shift[:2], rows["voice"][there].mean(0))
    close(module.weight[:2], 1 / rows["voice"][there].std(0, correction=0))


@pytest.mark.parametrize("samples", [12, 13, 40])  # fewer, and more, than columns
def test_directions_are_those_of_the_correlations(samples):
    x, fold = torch.randn(samples, 12) @ torch.randn(12, 12) + 3, torch.arange(samples) % 5
    x[:, 3] = 7  # never varied
    rows = conflict._Rows(x, fold, 4)
    for k in (0, 4, 5):
        x_k = x[fold != k].double()
        z = (x_k - x_k.mean(0)).nan_to_num() / x_k.std(0, correction=0).where(x_k.std(0) > 0, 1)
        _, vectors = torch.linalg.eigh(z.T @ z)
        shift, weight, directions = rows.directions(k)
        close(shift, x_k.mean(0))
        assert weight.count_nonzero() == 11
        close(directions @ directions.T, vectors[:, -4:] @ vectors[:, -4:].T)


def test_modality_that_was_never_there_says_nothing():
    rows = draw(100)
    module = Conflict(dict.fromkeys(NAMES, 2)).fit({name: rows[name] for name in NAMES[:2]})
    ratios = module.log_ratios(rows)
    assert not ratios[:, 2].any()
    torch.testing.assert_close(ratios[:, 0], ratios[:, 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("offset", [1e-3, 1.0, 1e6])
def test_column_that_never_varied_says_nothing(offset):
    rows = draw(100)
    rows["face"][:, 1] = 0.1
    module = fitted(rows)
    before = module.log_ratios(rows)
    rows["face"][:, 1] += offset
    assert torch.equal(module.log_ratios(rows), before)


@pytest.mark.filterwarnings("ignore:.*fewer than the .* directions")
@pytest.mark.parametrize("samples", [2, 3, 7, 40])
@pytest.mark.parametrize("kind", ["all equal", "equal modalities", "bits", "many columns", "huge"])
def test_no_data_raise_or_blow_up(kind, samples):
    rows = {
        "all equal": lambda: {name: torch.ones(samples, 2) for name in NAMES},
        "equal modalities": lambda: dict.fromkeys(NAMES, torch.randn(samples, 2)),
        "bits": lambda: {name: torch.randint(2, (samples, 2)).float() for name in NAMES},
        "many columns": lambda: draw(samples, dim=30),
        "huge": lambda: {name: 1e38 * torch.rand(samples, 2) for name in NAMES},
    }[kind]()
    module = fitted(rows)
    for scale in (1, -1, 3):
        given = {name: (scale * x).requires_grad_() for name, x in rows.items()}
        probs = module(given)
        assert ((probs >= 0) & (probs <= 1)).all()
        grads = torch.autograd.grad(probs.sum(), list(given.values()), allow_unused=True)
        assert all(grad.isfinite().all() for grad in grads)


def test_leading_directions_are_enough_where_modalities_share_few():
    topic = torch.randn(400, 2)
    mixed = {name: topic @ torch.randn(2, 12) for name in NAMES}
    rows = {name: x + 0.3 * torch.randn_like(x) for name, x in mixed.items()}
    module = fitted(rows, num_directions=2)
    assert module.projection.shape == (36, 6)
    assert module.covariance.shape == (6, 6)
    blocks = torch.block_diag(*[torch.ones(12, 2)] * 3).bool()
    assert not module.projection[~blocks].any()
    z = (rows["face"] - module.shift[12:24]) * module.weight[12:24]
    seen = z @ module.projection[12:24, 2:4]
    products = seen.T @ seen / 400
    close(
        products, products.diagonal().diag()
    )  # directions that are not correlated, of the largest
    assert products.trace() > 0.7 * z.square().sum() / 400
    assert module(rows).sum(1).median() < 0.1
    assert module(exchanged(rows, "text")).sum(1).median() > 0.9


@pytest.mark.parametrize("names", [NAMES[:1], NAMES])
def test_nothing_in_common_is_not_fitted(names):
    rows = draw(9)
    module = fitted(rows) if len(names) > 1 else Conflict({"voice": 2})
    some = {"voice": rows["voice"]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.fit(some)
    said = [str(each.message) for each in caught]
    assert len(said) == (len(names) > 1)
    assert all("`rows` hold 0 samples with two modalities" in each for each in said)
    assert torch.equal(module.covariance, torch.eye(2 * len(names)))
    assert not module(some).any()
    assert torch.equal(
        module.log_ratios(rows if len(names) > 1 else some), torch.zeros(9, len(names))
    )


def test_state_of_another_order_of_modalities_does_not_load():
    """Which would say, without an error, that the wrong modality is foreign."""
    module = fitted(draw(60))
    for names, told in (
        (NAMES[::-1], r"\['text', 'face', 'voice'\], but got .* \['voice', 'face', 'text'\]"),
        (["voice", "face", "odour"], r".*'odour'\], but got .*'face', 'another'\]"),
    ):
        other = Conflict(dict.fromkeys(names, 2))
        for options in ({}, {"strict": False}, {"assign": True}):
            with pytest.raises(RuntimeError, match=f"`meaning` to be of the modalities {told}"):
                other.load_state_dict(module.state_dict(), **options)
            assert not other.projection.any()
    same = Conflict(dict.fromkeys(NAMES, 2), prior=0.1)
    same.half().load_state_dict(module.half().state_dict())
    assert torch.equal(same.covariance, module.covariance)


def test_fewer_samples_than_directions_are_said_to_be_few():
    with pytest.warns(UserWarning, match="5 samples with two modalities, fewer than the 6 direct"):
        Conflict(dict.fromkeys(NAMES, 2)).fit(draw(5))


def test_fit_starts_anew_and_reset_forgets():
    rows, other = draw(60), draw(60, noise=2)
    module, expected = fitted(other).fit(rows), fitted(rows)
    for name, state in expected.state_dict().items():
        assert torch.equal(state, module.state_dict()[name])
    module.reset_parameters()
    for name, state in Conflict(dict.fromkeys(NAMES, 2)).state_dict().items():
        assert torch.equal(state, module.state_dict()[name])


ROWS = draw(20)
BAD = [
    Bad("prior", lambda _: Conflict({"a": 1}, prior=1), ValueError, "`prior` .* 1$"),
    Bad("directions", lambda _: Conflict({"a": 1}, num_directions=0), ValueError, "positive"),
    Bad("prior word", lambda _: Conflict({"a": 1}, prior="x"), TypeError, "`prior` .* 'x'"),
    Bad("sizes", lambda _: Conflict([3]), TypeError, "`modality_dims` .* list"),
    Bad("flag", lambda _: Conflict({"a": 1}, validate_args=1), TypeError, "`validate_args`"),
    Bad("none", lambda m: m({}), ValueError, "`rows` .* at least one"),
    Bad("tensor", lambda m: m(torch.ones(2, 3)), TypeError, "`rows` .* mapping"),
    Bad("name", lambda m: m({"smell": torch.ones(1, 2)}), ValueError, r"`rows` .*\['smell'\]$"),
    Bad("dim", lambda m: m({"face": torch.ones(1, 3)}), ValueError, r"`rows\['face'\]` .*P=2"),
    Bad("dtype", lambda m: m({"face": torch.ones(1, 2).long()}), TypeError, "floating"),
    Bad("batch", lambda m: m(ROWS | {"text": torch.ones(9, 2)}), ValueError, r"'text'.*B=20"),
    Bad("nan", lambda m: m({"face": torch.full((1, 2), torch.nan)}), ValueError, "finite"),
    Bad("mask", lambda m: m(ROWS, torch.ones(20, 2).bool()), ValueError, "`missing` .*M=3"),
    Bad("mask dtype", lambda m: m(ROWS, torch.ones(20, 3)), TypeError, "`missing` .*bool"),
    Bad(
        "device",
        lambda m: m({"face": torch.ones(1, 2, device="meta")}),
        ValueError,
        "`rows` to be on cpu, where the module is, but got meta",
    ),
    Bad(
        "fit nan",
        lambda m: m.fit(ROWS | {"face": torch.full((20, 2), torch.nan)}),
        ValueError,
        r"`rows\['face'\]` .*finite",
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_bad_arguments(case):
    refused(case, fitted(ROWS), lambda module: list(module.state_dict().values()))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_cast_to_half_precision_changes_nothing(dtype):
    rows = draw(50)
    module = fitted(rows)
    expected = module(rows)
    assert torch.equal(copy.deepcopy(module).to(dtype)(rows), expected)
    probs = module({name: x.to(dtype) for name, x in rows.items()})
    assert probs.dtype == torch.float32
    close(probs, expected, dtype)


def test_gradient_reaches_the_rows():
    module = fitted(draw(100))
    missing = torch.tensor([[False, False, False], [True, False, False], [True, True, False]])
    rows = [x.double().requires_grad_() for x in draw(3).values()]
    assert gradcheck(lambda *x: module(dict(zip(NAMES, x, strict=True)), missing), rows)


def test_validate_args_reaches_every_check(monkeypatch):
    rows = draw(20)
    module = fitted(rows, validate_args=True)
    passed = record_validate_args(monkeypatch)
    module(rows)
    assert passed == [True, True, True]


def test_column_of_next_to_nothing_makes_no_nan():
    """One over its standard deviation is beyond float32, and infinity times 0 is NaN."""
    rows = draw(50)
    rows["face"][:, 0] *= 1e-40
    conflict = fitted(rows)
    means = conflict.shift.view(3, 1, 2)  # where all rows are the mean
    assert conflict(dict(zip(NAMES, means, strict=True))).isfinite().all()


def test_default_device_does_not_matter_to_the_fit():
    rows = draw(50)
    expected, module = fitted(rows), Conflict(dict.fromkeys(NAMES, 2))
    torch.set_default_device("meta")
    try:
        module.fit(rows)
    finally:
        no_default_device()
    close(module.covariance, expected.covariance)
    close(module.slope, expected.slope)


@pytest.mark.skipif(TORCH_2_6, reason=NO_EXPORT_OF_ANY_BATCH)
def test_is_exported_for_any_batch():
    class Served(torch.nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.conflict = fitted(rows)

        def forward(self, voice, face, text, missing):
            return self.conflict(dict(zip(NAMES, (voice, face, text), strict=True)), missing)

    module, batch = Served(draw(50)), torch.export.Dim("batch")
    inputs, other = ((*draw(n).values(), torch.rand(n, 3) < 0.3) for n in (3, 7))
    served = torch.export.export(module, inputs, dynamic_shapes=({0: batch},) * 4).module()
    close(served(*other), module(*other))
