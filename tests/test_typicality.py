"""Typicality, against the mathematics it claims, scikit-learn, and data that make a covariance singular."""

import copy

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS, EmpiricalCovariance
from torch import nn
from torch.autograd import gradcheck
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DistributedSampler, Subset

from support import HALF, Bad, close, poisoned, random_latent, record_validate_args, refused
from uncertainty_mm import DiagonalGaussian, Typicality, typicality
from uncertainty_mm.data import MultimodalDataset

NAME = "voice"


def draw(samples, steps=6, dim=3):
    """Sequences of correlated features, and their padding; none is missing."""
    mixing = torch.linspace(-1, 1, dim * dim).view(dim, dim) + torch.eye(dim)
    padding = torch.rand(samples, steps) < 0.3
    padding[:, 0] = False
    return torch.randn(samples, steps, dim) @ mixing + 2, padding


def dataset(x, padding):
    labels = torch.ones(len(x), 1)
    return MultimodalDataset({NAME: x}, {NAME: padding}, labels, ["joy"], validate_args=False)


def fitted(x, padding, **settings):
    return Typicality({NAME: x.shape[2]}, **settings).fit(dataset(x, padding))


def ask(module, x, padding):
    """Factors and distances (N,)."""
    features, padding_mask = {NAME: x}, {NAME: padding}
    return module(features, padding_mask)[:, 0], module.distances(features, padding_mask)[:, 0]


def rows_of(module, x, padding):
    """The summaries, whose definition the plain equation of tests/cases.py checks."""
    part = module.modality[NAME]
    step = typicality._Whitening(part.step_shift, part.step_weight, part.step_root)
    return typicality._summary(x, ~padding, step).double().numpy()


# ------------------------------------------------------------------------------------ exact facts


@pytest.mark.parametrize(("steps", "dim"), [(6, 3), (500, 4), (5, 8)])
def test_mean_distance_of_the_fitted_rows_is_their_dimension(steps, dim):
    given = draw(400, steps, dim)
    _, distances = ask(fitted(*given, covariance="empirical"), *given)
    assert distances.double().mean().item() == pytest.approx(2 * dim + 3, rel=1e-3)


def test_dimensions_are_those_in_which_summaries_vary():
    for steps, dim, varying in ((9, 1, 4), (1, 5, 7)):  # of one feature, size and distance agree
        x, padding = torch.randn(300, steps, dim), torch.zeros(300, steps, dtype=torch.bool)
        _, distances = ask(fitted(x, padding, covariance="empirical"), x, padding)
        assert distances.double().mean().item() == pytest.approx(varying, rel=1e-3)


@pytest.mark.parametrize("covariance", ["oas", "empirical"])
def test_distances_do_not_change_when_columns_are_rescaled(covariance):
    x, padding = draw(300)
    fresh, mask = draw(50)
    scale = torch.tensor([2.0**-20, 1.0, 2.0**12])  # without rounding
    _, before = ask(fitted(x, padding, covariance=covariance), fresh, mask)
    _, after = ask(fitted(x * scale, padding, covariance=covariance), fresh * scale, mask)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_padding_is_never_read():
    x, padding = draw(300)
    module, spoilt = (fitted(each, padding) for each in (x, poisoned(x, padding)))
    for name, state in module.state_dict().items():
        assert torch.equal(state, spoilt.state_dict()[name])
    for one, other in zip(
        ask(module, x, padding), ask(module, poisoned(x, padding), padding), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_whole_sequences_are_summarised_as_beside_padding(steps):
    module, (x, padding) = fitted(*draw(60)), draw(5, steps)
    padding = torch.zeros_like(padding)
    longer = torch.cat([x, x], 1), torch.cat([padding, ~padding], 1)
    beside = module({NAME: longer[0]}, {NAME: longer[1]}, need_summaries=True)
    factor, summaries = module({NAME: x}, {NAME: padding}, need_summaries=True)
    torch.testing.assert_close(factor, beside[0])
    torch.testing.assert_close(summaries, beside[1])
    torch.testing.assert_close(module.summaries({NAME: x}), summaries, rtol=0, atol=0)


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("samples", [60, 3000])  # 21 dimensions: the first are few
def test_as_many_clean_rows_grow_as_the_level_says(samples, level):
    steps, dim = 8, 9
    factors, _ = ask(fitted(*draw(samples, steps, dim), level=level), *draw(3000, steps, dim))
    assert (factors > 1).float().mean().item() == pytest.approx(
        1 - level, abs=0.02 if samples > 100 else 0.12
    )


@pytest.mark.parametrize(("rows", "dim"), [(50, 8), (6, 20), (300, 1), (2, 3)])
def test_shrunk_covariance_is_that_of_scikit_learn(rows, dim):
    x = torch.randn(rows, dim).double() @ torch.randn(dim, dim).double()
    centred = x - x.mean(0)
    shrunk = typicality._shrunk(centred.T @ centred / rows, rows)
    close(shrunk, OAS().fit(x.numpy()).covariance_)


def test_triangles_by_halves_are_those_of_torch(monkeypatch):
    monkeypatch.setattr(typicality, "_BLOCK", 3)
    x = torch.randn(30, 13).double()
    gram = typicality._gram(x)
    close(gram, x.T @ x)
    monkeypatch.setattr(typicality, "_MANY", 7)
    moments = typicality._Moments.of(x)
    close(moments.scatter / 29, x.T.cov())
    close(moments.largest, x.abs().amax(0))
    root = torch.linalg.cholesky(gram)
    close(typicality._inverse(root), torch.linalg.inv(root).tril())


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4, 1e-6, 0.0])  # 1e-4: eigenvalues of 1e-8
@pytest.mark.parametrize("covariance", ["oas", "empirical"])
@pytest.mark.parametrize("rows", [5, 40])
def test_distances_are_those_by_eigenvectors(rows, covariance, spread):
    """Those of next to no variance are left out, however the root is computed."""
    x = torch.randn(rows, 8).double()
    x[:, 4:] = x[:, :4] + spread * x[:, 4:]
    given = x.T @ x / rows
    given = typicality._shrunk(given, rows) if covariance == "oas" else given
    values, vectors = torch.linalg.eigh(given)
    expected = x @ vectors[:, kept := values > 1e-9 * values[-1]] / values[kept].sqrt()
    root = typicality._inverse_root(given)
    torch.testing.assert_close(
        (x @ root.T).square().sum(1), expected.square().sum(1), rtol=1e-6, atol=0
    )


def test_shrunk_identity_is_the_identity():
    close(typicality._shrunk(torch.eye(3).double(), 10), np.eye(3))


@pytest.mark.parametrize(
    ("covariance", "reference"), [("oas", OAS), ("empirical", EmpiricalCovariance)]
)
def test_distances_and_quantile_are_those_of_scikit_learn(covariance, reference):
    x, padding = draw(203)
    module = fitted(x, padding, covariance=covariance)
    rows = rows_of(module, x, padding)

    def distances(fit, of):
        mean, std = fit.mean(0), fit.std(0)
        return reference().fit((fit - mean) / std).mahalanobis((of - mean) / std)

    expected = distances(rows, rows)
    np.testing.assert_allclose(ask(module, x, padding)[1], expected, rtol=2e-3, atol=2e-3)
    fold = np.arange(203) % 5
    held_out = np.concatenate([distances(rows[fold != k], rows[fold == k]) for k in range(5)])
    quantile = module.modality[NAME].quantile.item()
    assert quantile == pytest.approx(np.quantile(held_out, 0.95), rel=1e-3)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_factor_is_the_power_of_the_ratio_that_the_docstring_says(power):
    x, padding = draw(100)
    module = fitted(x, padding, power=power)
    factors, distances = ask(module, 4 * x, padding)
    ratio = (distances / module.modality[NAME].quantile).clamp_min(1).double()
    assert (ratio > 1).any()
    close(factors, 1 + (ratio**power - 1) / power if power else 1 + ratio.log())


def test_factor_of_one_changes_no_bit_and_infinity_is_the_missing_mask():
    latent = random_latent(4, 2, 3, 5)
    unfitted = Typicality({"voice": 3, "face": 2})
    features = {"voice": torch.randn(4, 6, 3), "face": torch.randn(4, 2, 2)}
    factor = unfitted(features)
    assert torch.equal(factor, torch.ones(4, 2))
    for one, other in zip(latent.inflated(factor).product(), latent.product(), strict=True):
        assert torch.equal(one, other)
    missing = torch.tensor([[True, False], [False, True], [False, False], [True, True]])
    factor = factor.masked_fill(missing, torch.inf)
    for one, other in zip(latent.inflated(factor).product(), latent.product(missing), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------- singular and small


@pytest.mark.parametrize("covariance", ["oas", "empirical"])
@pytest.mark.parametrize("offset", [1e-3, 1.0, 1e6])
def test_what_never_varied_says_nothing(covariance, offset):
    x, padding = draw(200)
    x[..., 1] = 0.1
    module = fitted(x, padding, covariance=covariance)
    before = ask(module, x, padding)
    x[..., 1] += offset
    for one, other in zip(ask(module, x, padding), before, strict=True):
        assert torch.equal(one, other)
    assert before[1].max() > 1


def test_spread_and_roughness_of_one_step_say_nothing():
    x, padding = draw(200, steps=1)
    module = fitted(x, padding)
    longer = x.repeat(1, 3, 1) + torch.tensor([-0.5, 0.0, 0.5]).view(3, 1)
    assert (ask(module, longer, padding.repeat(1, 3))[1] < 100).all()


DISCRETE = {
    "all equal": lambda n: torch.ones(n, 4, 3),
    "all 0": lambda n: torch.zeros(n, 4, 3),
    "one-hot": lambda n: torch.eye(3)[torch.randint(3, (n, 1))],
    "two equal columns": lambda n: torch.randn(n, 4, 1).expand(-1, -1, 3),
    "one differs": lambda n: (torch.arange(n) == n // 2).float().view(n, 1, 1).expand(n, 4, 3),
    "bits": lambda n: torch.randint(2, (n, 4, 3)).float(),
    "equal steps": lambda n: torch.randn(n, 1, 3).expand(n, 4, 3),
    "tiny": lambda n: 1e-40 * torch.randn(n, 4, 3),
    "huge": lambda n: 1e38 * torch.rand(n, 4, 3),
    "far from 0": lambda n: 1e6 + torch.randn(n, 4, 3),
}


@pytest.mark.parametrize("covariance", ["oas", "empirical"])
@pytest.mark.parametrize("samples", [2, 3, 6, 100])
@pytest.mark.parametrize("kind", DISCRETE)
def test_no_data_raise_or_blow_up(kind, samples, covariance):
    x = DISCRETE[kind](samples).contiguous()
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    module = fitted(x, padding, covariance=covariance)
    factors, distances = ask(module, x, padding)
    assert distances.isfinite().all()
    assert (distances <= 2 * max(samples, 9)).all()  # 9 dimensions
    largest = torch.full_like(x, 3e38) * torch.tensor([1, -1, 1])
    for each in (largest, -largest, x + 1):
        each.requires_grad_()
        factors, _ = ask(module, each, padding)
        assert factors.isfinite().all()
        assert (factors < 100).all()
        assert torch.autograd.grad(factors.sum(), each)[0].isfinite().all()


@pytest.mark.parametrize("covariance", ["oas", "empirical"])
def test_fewer_rows_than_dimensions(covariance):
    x, padding = draw(8, dim=20)
    factors, distances = ask(fitted(x, padding, covariance=covariance), x, padding)
    assert distances.isfinite().all()
    assert (factors >= 1).all()


def test_rows_of_one_fold_are_their_own_measure():
    x, padding = draw(500)
    batch = dataset(x, padding).batch(range(0, 500, 5))
    module = Typicality({NAME: 3}).fit([batch])
    factors, _ = ask(module, x[::5], padding[::5])
    assert 0 < (factors > 1).sum() <= 5


@pytest.mark.parametrize("samples", [0, 1])
def test_modality_with_too_few_sequences_is_not_fitted(samples):
    (x, padding), dims = draw(30), {NAME: 3, "face": 3}
    gone = padding.clone()
    gone[samples:] = True
    masks = {NAME: padding, "face": gone}
    data = MultimodalDataset({NAME: x, "face": x}, masks, torch.ones(30, 1), ["joy"])
    message = f"^`data` holds {samples} sequences of 'face', .* factor stays 1$"
    with pytest.warns(UserWarning, match=message) as caught:
        module = Typicality(dims).fit(data)
    assert caught[0].filename == __file__
    features, masks = {NAME: 9 * x, "face": 9 * x}, {NAME: padding, "face": padding}
    factors, distances = module(features, masks), module.distances(features, masks)
    assert (factors[:, 0] > 1).all()
    assert torch.equal(factors[:, 1], torch.ones(30))
    assert torch.equal(distances[:, 1], torch.zeros(30))


# --------------------------------------------------------------------------------- what is left out


def test_missing_modality_has_a_factor_of_one():
    dims = {NAME: 3, "face": 3}
    (x, padding), (y, _) = draw(30), draw(30)
    whole = {NAME: padding, "face": padding}
    module = Typicality(dims).fit(
        MultimodalDataset({NAME: x, "face": y}, whole, torch.ones(30, 1), ["joy"])
    )
    features = {NAME: 9 * x, "face": 9 * y}
    factors = module(features, whole)
    assert (factors > 1).all()
    absent = module({NAME: 9 * x}, {NAME: padding})
    padded = module(features, whole | {"face": torch.ones_like(padding)})
    no_step = module(features | {"face": y[:, :0]}, {NAME: padding})
    for each in (absent, padded, no_step):
        assert torch.equal(each, torch.stack([factors[:, 0], torch.ones(30)], 1))
    assert torch.equal(module.distances({NAME: x}, {NAME: padding})[:, 1], torch.zeros(30))


def test_missing_sequences_do_not_count_in_the_fit():
    x, padding = draw(100)
    there = torch.arange(100) % 10 < 5  # so that the folds keep their members
    gone = padding | ~there.unsqueeze(1)
    module, other = fitted(x, gone), Typicality({NAME: 3})
    other.fit([dataset(x, padding).batch(there.nonzero().squeeze(1))])
    for name, state in module.state_dict().items():
        torch.testing.assert_close(state, other.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_steps_that_are_not_finite_do_not_count(value):
    x, padding = draw(100)
    bad = torch.rand(100, 6) < 0.2
    bad[0], bad[1, 0] = True, False
    spoilt = poisoned(x, bad, value)
    module, other = fitted(spoilt, padding, validate_args=False), fitted(x, padding | bad)
    for name, state in module.state_dict().items():
        assert torch.equal(state, other.state_dict()[name])
    answers = ask(module, spoilt, padding), ask(module, x, padding | bad)
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------- reading twice


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batches_do_not_matter(batch_size):
    x, padding = draw(100)
    data = dataset(x, padding)
    expected, module = fitted(x, padding), Typicality({NAME: 3})
    _, distances = ask(expected, x, padding)
    for loader in (data.loader(batch_size), data.loader(batch_size, shuffle=True)):
        assert module.fit(loader) is module
        torch.testing.assert_close(ask(module, x, padding)[1], distances, rtol=1e-3, atol=1e-3)


def test_data_come_in_any_precision():
    x, padding = draw(100)
    x = x.half()
    expected = ask(fitted(x.float(), padding), x.float(), padding)
    for dtype in (torch.float16, torch.float64):
        batch = dataset(x.float(), padding).batch(range(100))
        batch = batch._replace(features={NAME: x.to(dtype)})
        module = Typicality({NAME: 3}).fit([batch])
        for one, other in zip(ask(module, x.to(dtype), padding), expected, strict=True):
            assert one.dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(one.float(), other, rtol=1e-3, atol=1e-3)


def test_fit_starts_anew():
    (x, padding), other = draw(100), draw(50)
    module = fitted(*other).fit(dataset(x, padding))
    for name, state in fitted(x, padding).state_dict().items():
        assert torch.equal(state, module.state_dict()[name])
    with pytest.warns(UserWarning, match="not fitted"):
        module.fit(dataset(x[:1], padding[:1]))
    assert torch.equal(ask(module, 9 * x, padding)[0], torch.ones(100))


def test_fit_gives_the_summaries_it_read():
    (x, padding), dims = draw(40), {NAME: 3, "face": 3}
    masks = {NAME: padding, "face": padding | (torch.arange(40) % 3 == 0).unsqueeze(1)}
    data = MultimodalDataset({NAME: x, "face": x}, masks, torch.ones(40, 1), ["joy"])
    module, expected = Typicality(dims), Typicality(dims).fit(data)
    rows, missing = module.fit_and_summarize(data)
    for name, state in module.state_dict().items():
        assert torch.equal(state, expected.state_dict()[name])
    wanted, gone = module.summaries_of(data)
    assert torch.equal(missing, gone)
    for m, name in enumerate(dims):
        torch.testing.assert_close(rows[name][~gone[:, m]], wanted[name][~gone[:, m]])
    batch = data.batch(range(40))
    batch.features["face"][1] = torch.nan  # of which no step counts
    unchecked = Typicality(dims, validate_args=False)
    missing = unchecked.fit_and_summarize([batch])[1]
    assert missing[1].tolist() == [False, True]
    assert torch.equal(unchecked.summaries_of([batch])[1], missing)
    del batch.features["face"], batch.padding_mask["face"]
    with pytest.warns(UserWarning, match="holds 0 sequences of 'face'") as caught:
        rows, missing = module.fit_and_summarize([batch])
    assert caught[0].filename == __file__
    assert missing.sum(0).tolist() == [0, 40]
    assert rows["face"].shape == (40, 9)


class Changing:
    """Gives a batch less each time."""

    def __init__(self, data):
        self.batches = [data.batch(range(9)) for _ in range(3)]

    def __iter__(self):
        yield from self.batches
        self.batches.pop()


def loader_of_a_rank(data):
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    return data.loader(4, sampler=sampler)


DATA = dataset(*draw(20))
FITS = [
    Bad("iterator", lambda m: m.fit(iter(DATA.loader(4))), TypeError, "`data` .* iterator, .*once"),
    Bad("generator", lambda m: m.fit(x for x in [DATA]), TypeError, "`data`.*generator"),
    Bad("number", lambda m: m.fit(3), TypeError, "`data`.* but got int$"),
    Bad("samples", lambda m: m.fit(Subset(DATA, [0, 1])), TypeError, "`data`.* but got Subset$"),
    Bad("tensors", lambda m: m.fit([torch.ones(3)]), TypeError, "`data`.* but got Tensor among"),
    Bad("single", lambda m: m.fit([DATA[0]]), ValueError, r"`features\['voice'\]`.*shape"),
    Bad("nothing", lambda m: m.fit([]), ValueError, "`data` .* at least one sample"),
    Bad("no rows", lambda m: m.fit([DATA.batch([])]), ValueError, "`data` .* at least one sample"),
    Bad("changing", lambda m: m.fit(Changing(DATA)), ValueError, "twice, but got 27, then 18"),
    Bad("part", lambda m: m.fit(loader_of_a_rank(DATA)), ValueError, "`data` .* every rank"),
    Bad("wide", lambda m: m.fit(dataset(*draw(9, dim=4))), ValueError, r"`features\['voice'\]`"),
]


@pytest.mark.parametrize("case", FITS, ids=lambda case: case.name)
def test_bad_fits_leave_the_module_as_it_was(case):
    refused(case, fitted(*draw(30)), lambda module: list(module.state_dict().values()))


# ------------------------------------------------------------------------------------------- module


BAD = [
    Bad("no modality", lambda _: Typicality({}), ValueError, "`modality_dims` .* at least one"),
    Bad("size", lambda _: Typicality({"a": 0}), ValueError, r"`modality_dims\['a'\]`"),
    Bad("sizes", lambda _: Typicality([3]), TypeError, "`modality_dims` .* list"),
    Bad("level", lambda _: Typicality({"a": 1}, level=1), ValueError, "`level` .* 1$"),
    Bad("level word", lambda _: Typicality({"a": 1}, level="x"), TypeError, "`level` .* 'x'"),
    Bad("power", lambda _: Typicality({"a": 1}, power=-1), ValueError, "`power` .* -1$"),
    Bad("power nan", lambda _: Typicality({"a": 1}, power=torch.nan), ValueError, "`power`"),
    Bad("power word", lambda _: Typicality({"a": 1}, power="x"), TypeError, "`power` .* 'x'"),
    Bad("covariance", lambda _: Typicality({"a": 1}, covariance="lw"), ValueError, "'lw'$"),
    Bad("flag", lambda _: Typicality({"a": 1}, validate_args=1), TypeError, "`validate_args`"),
    Bad("name", lambda m: m({"face": torch.ones(1, 1, 3)}), ValueError, r"\['face'\]$"),
    Bad("none", lambda m: m({}), ValueError, "`features` .* at least one"),
    Bad("tensor", lambda m: m(torch.ones(1, 1, 3)), TypeError, "`features` .* mapping"),
    Bad("dim", lambda m: m({NAME: torch.ones(1, 1, 4)}), ValueError, "shape .*D=3"),
    Bad("dtype", lambda m: m({NAME: torch.ones(1, 1, 3).long()}), TypeError, "floating"),
    Bad("nan", lambda m: m({NAME: torch.full((1, 1, 3), torch.nan)}), ValueError, "finite"),
    Bad(
        "mask",
        lambda m: m({NAME: torch.ones(1, 2, 3)}, {NAME: torch.ones(1, 3).bool()}),
        ValueError,
        r"`padding_mask\['voice'\]` .*shape",
    ),
    Bad(
        "device",
        lambda m: m({NAME: torch.ones(1, 1, 3, device="meta")}),
        ValueError,
        r"`features\['voice'\]` to be on cpu, where the module is, but got meta",
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_bad_arguments(case):
    refused(case, Typicality({NAME: 3}), lambda module: list(module.state_dict().values()))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_cast_to_half_precision_changes_nothing(dtype):
    x, padding = draw(100)
    module = fitted(x, padding)
    expected = ask(module, 2 * x, padding)
    for cast in (
        module.to(dtype),
        nn.ModuleList([module]).to(dtype)[0],
        copy.deepcopy(module).double(),
    ):
        for one, other in zip(ask(cast, 2 * x, padding), expected, strict=True):
            assert torch.equal(one, other)
    factors, _ = ask(module, (2 * x).to(dtype), padding)
    assert factors.dtype == torch.float32
    close(factors, expected[0], dtype)


def test_state_of_other_settings_does_not_load():
    state = fitted(*draw(60)).state_dict()
    for settings, told in (({"level": 0.5}, "0.5"), ({"covariance": "empirical"}, ".*'empirical'")):
        other = Typicality({NAME: 3}, **settings)
        words = (
            rf"`modality.voice.meaning` to be of `level` {told}.*, but got of `level` 0.95 .*'oas'"
        )
        for options in ({}, {"strict": False}, {"assign": True}):
            with pytest.raises(RuntimeError, match=words):
                other.load_state_dict(state, **options)
            assert other.modality[NAME].quantile.isinf()
    Typicality({NAME: 3}, power=1).half().load_state_dict(state)  # which is not of the power


def test_made_on_the_meta_device_it_works_as_new():
    x, padding = draw(30)
    with torch.device("meta"):
        module = Typicality({NAME: 3})
    module.to_empty(device="cpu").reset_parameters()
    assert torch.equal(ask(module, x, padding)[0], torch.ones(30))
    expected = fitted(x, padding)
    module.fit(dataset(x, padding))
    with torch.device("meta"):
        assigned = Typicality({NAME: 3})
    assigned.load_state_dict(module.state_dict(), assign=True)
    for each in (module, assigned):
        assert torch.equal(ask(each, 9 * x, padding)[0], ask(expected, 9 * x, padding)[0])


def test_default_device_does_not_matter():
    x, padding = draw(30)
    module, expected = Typicality({NAME: 3}), fitted(x, padding)
    data = dataset(x, padding)
    batches = [data.batch(range(30))]
    torch.set_default_device("meta")
    try:
        answers = ask(module.fit(batches), 9 * x, padding)
    finally:
        torch.set_default_device(None)
    for one, other in zip(answers, ask(expected, 9 * x, padding), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_averaging_of_weights_leaves_the_fit_alone():
    x, padding = draw(30)
    module = fitted(x, padding)
    assert not list(module.parameters())
    assert not list(module.buffers())
    model = nn.ModuleDict({"typicality": module, "head": nn.Linear(2, 2)})
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    for name, state in module.state_dict().items():
        assert torch.equal(averaged.module["typicality"].state_dict()[name], state)


def test_gradient_of_the_factor():
    x, padding = draw(40)
    module = fitted(x, padding)
    loud = (4 * x[:3]).double().requires_grad_()
    assert (ask(module, loud, padding[:3])[0] > 1).any()
    assert gradcheck(lambda y: ask(module, y, padding[:3])[0], loud)


def test_validate_args_reaches_every_check(monkeypatch):
    x, padding = draw(5)
    module = Typicality({NAME: 3}, validate_args=True)
    passed = record_validate_args(monkeypatch)
    ask(module, x, padding)
    assert passed == [True, True]


def test_a_model_grows_its_variances_before_fusion():
    x, padding = draw(60)
    module = fitted(x, padding)
    latent = DiagonalGaussian(torch.ones(60, 1, 2, 4), torch.ones(60, 1, 2, 4))
    factor = module({NAME: 9 * x}, {NAME: padding})
    fused = latent.inflated(factor).product()
    assert (fused.std > latent.product().std).all()
    assert (fused.mean < latent.product().mean).all()
