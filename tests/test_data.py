import math
from itertools import product

import pytest
import torch

from support import close, no_default_device
from uncertainty_mm.data import SyntheticMMER, SyntheticModality, SyntheticSamples

SMALL = {"a": SyntheticModality(3, 2, 0.7), "b": SyntheticModality(2, 3, 0.4)}


def brute_force(world, samples, index):
    """P(y | x) of one sample: the sum over the source and intensity of every frame, one sequence at a time."""
    joint = []
    for code, prior in enumerate(world.prior.tolist()):
        present = [q for q in range(world.num_labels) if code >> q & 1]
        density = prior
        for m, (name, modality) in enumerate(world.modalities.items()):
            kept = ~samples.padding_mask[name][index]
            frames = samples.features[name][index][kept].double()
            sources = [(1 - modality.rate if present else 1.0, torch.zeros(modality.dim).double())]
            sources += [
                (modality.rate / len(present) / 3, a * world.prototypes[name][q])
                for q in present
                for a in world.INTENSITIES
            ]
            std = samples.noise[index, m]
            total = 0.0
            for path in product(sources, repeat=len(frames)):
                term = 1.0
                for (weight, mean), x in zip(path, frames, strict=True):
                    normal = torch.exp(-0.5 * ((x - mean) / std).square()) / std
                    term *= weight * float(normal.prod())
                total += term
            density *= total
        joint.append(density)
    return torch.tensor(joint, dtype=torch.float64) / sum(joint)


def entropy(joint):
    return torch.special.entr(joint).sum(-1)


@pytest.fixture(scope="module")
def world():
    return SyntheticMMER()


def test_posterior_equals_the_sum_over_all_sources():
    world = SyntheticMMER(2, SMALL, noise=(0.3, 2.0), missing_rate=0.2, seed=3)
    samples = world.sample(12, seed=4)
    posterior = world.posterior(samples)
    expected = torch.stack([brute_force(world, samples, i) for i in range(12)])
    torch.testing.assert_close(posterior.joint, expected, rtol=1e-9, atol=1e-12)
    close(
        posterior.marginals,
        torch.stack([expected[:, 1] + expected[:, 3], expected[:, 2:].sum(1)], 1),
    )
    close(posterior.entropy, entropy(expected))


def test_posterior_is_calibrated():
    """Of the predictions of a probability, that share comes true, within four standard errors."""
    world = SyntheticMMER(3, {"a": (6, 4, 0.5), "b": (6, 4, 0.3)}, missing_rate=0.1, seed=1)
    samples = world.sample(100_000, seed=2)
    posterior = world.posterior(samples)
    codes = (samples.labels.long() << torch.arange(3)).sum(1)
    events = torch.nn.functional.one_hot(codes, 8).double()
    for probs, outcome in ((posterior.joint, events), (posterior.marginals, samples.labels)):
        for p, y in zip(probs.T, outcome.double().T, strict=True):
            bins = (p * 10).long().clamp_max(9)
            for each in bins.unique():
                inside = bins == each
                error = (y[inside] - p[inside]).sum().abs()
                assert error <= 4.5 * (p[inside] * (1 - p[inside])).sum().sqrt() + 1e-6


def test_expected_log_loss_is_the_entropy():
    world = SyntheticMMER(3, {"a": (6, 4, 0.5)}, seed=5)
    samples = world.sample(50_000, seed=6)
    posterior = world.posterior(samples)
    codes = (samples.labels.long() << torch.arange(3)).sum(1)
    excess = -posterior.joint.gather(1, codes[:, None]).log().squeeze(1) - posterior.entropy
    assert abs(excess.mean()) < 4.5 * excess.std() / math.sqrt(50_000)


def test_normalised(world):
    posterior = world.posterior(world.sample(200, seed=1))
    close(posterior.joint.sum(1), torch.ones(200).double())
    assert ((posterior.marginals >= 0) & (posterior.marginals <= 1 + 1e-12)).all()
    assert (posterior.entropy <= 6 * math.log(2) + 1e-12).all()


@pytest.mark.parametrize("noise", [1e-6, 1e-2])
def test_without_noise_the_labels_are_known(world, noise):
    """All labels that a frame shows are certain, and with 60 frames all are shown but rarely."""
    samples = world.sample(500, seed=1, noise=torch.full((500, 3), noise))
    posterior = world.posterior(samples)
    assert ((posterior.marginals > 0.5) == samples.labels.bool()).double().mean() > 0.999
    assert posterior.entropy.mean() < 0.02


def test_noise_without_bound_leaves_the_prior(world):
    samples = world.sample(50, seed=1, noise=torch.full((50, 3), 1e6))
    torch.testing.assert_close(
        world.posterior(samples).joint, world.prior.expand(50, -1), rtol=1e-3, atol=1e-5
    )


def test_uncertainty_grows_with_noise(world):
    clean = torch.full((300, 3), 0.7)
    entropies = [
        world.posterior(world.sample(300, seed=1, noise=clean * factor)).entropy.mean()
        for factor in (1, 2, 4, 8)
    ]
    assert entropies == sorted(entropies)


def test_nothing_is_known_without_modalities():
    world = SyntheticMMER(missing_rate=1.0)
    samples = world.sample(20, seed=1)
    assert samples.missing.all()
    assert all(mask.all() for mask in samples.padding_mask.values())
    close(world.posterior(samples).joint, world.prior.expand(20, -1))


def test_masked_modality_is_a_missing_one():
    world = SyntheticMMER(2, SMALL, seed=3)
    samples = world.sample(30, seed=1)
    masked = samples._replace(
        padding_mask=samples.padding_mask | {"b": torch.ones(30, 2, dtype=torch.bool)}
    )
    alone = SyntheticMMER(2, {"a": SMALL["a"]}, prior=world.prior)
    alone.prototypes = {"a": world.prototypes["a"]}
    close(world.posterior(masked).joint, alone.posterior(samples).joint)


def test_rate_zero_tells_nothing():
    world = SyntheticMMER(2, {"a": (4, 3, 0.0)})
    close(world.posterior(world.sample(10, seed=1)).joint, world.prior.expand(10, -1))


def test_prior_is_that_of_the_draws():
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4])
    labels = SyntheticMMER(2, SMALL, prior=prior).sample(100_000, seed=1).labels.long()
    share = torch.bincount(labels[:, 0] + 2 * labels[:, 1], minlength=4) / 100_000
    torch.testing.assert_close(share, prior, rtol=0, atol=0.01)


def test_frames_have_the_noise_and_the_rate_that_are_said():
    world = SyntheticMMER(1, {"a": (50, 8, 0.3)}, prior=torch.tensor([0.0, 1.0]))
    clean = world.sample(400, seed=1, noise=torch.full((400, 1), 1e-9))
    kept = ~clean.padding_mask["a"]
    shown = clean.features["a"][kept].abs().sum(1) > 1e-6
    assert abs(shown.double().mean() - 0.3) < 4.5 * math.sqrt(0.21 / len(shown))
    size = clean.features["a"][kept][shown].norm(dim=1) / world.prototypes["a"].norm()
    for a in world.INTENSITIES:
        share = (size - a).abs().lt(1e-4).double().mean()
        assert abs(share - 1 / 3) < 4.5 * math.sqrt(2 / 9 / len(size))
    noisy = world.sample(400, seed=1, noise=torch.full((400, 1), 2.0))
    errors = (noisy.features["a"] - clean.features["a"])[kept]
    assert abs(errors.std() - 2) < 0.02


def test_noise_is_log_uniform():
    world = SyntheticMMER(2, SMALL, noise=(0.5, 5.0))
    level = (world.sample(50_000, seed=1).noise / 0.5).log() / math.log(10)
    assert level.min() >= 0
    assert level.max() <= 1
    for share in (0.25, 0.5, 0.75):
        torch.testing.assert_close(
            level.quantile(share, dim=0), torch.full((2,), share).double(), rtol=0, atol=0.01
        )


def test_lengths_and_padding(world):
    samples = world.sample(200, seed=1)
    for name, x in samples.features.items():
        padded = samples.padding_mask[name]
        assert x.dtype == torch.float32
        assert (x[padded] == 0).all()
        assert (padded.sort(1).values == padded).all()
        assert ((~padded).sum(1) >= 10).all()
        assert (~padded).sum(1).unique().numel() > 5


def test_the_same_seed_gives_the_same_samples_whatever_the_noise():
    world = SyntheticMMER(missing_rate=0.2)
    first, again = world.sample(50, seed=1), world.sample(50, seed=1)
    other = world.sample(50, seed=1, noise=torch.ones(50, 3))
    assert torch.equal(first.labels, other.labels)
    assert torch.equal(first.missing, other.missing)
    for name, x in first.features.items():
        assert torch.equal(x, again.features[name])
        assert torch.equal(first.padding_mask[name], other.padding_mask[name])
    assert not torch.equal(first.labels, world.sample(50, seed=2).labels)
    assert not torch.equal(world.prior, SyntheticMMER(seed=1).prior)


def test_posterior_does_not_read_the_labels_and_no_sample_has_an_influence_on_another(world):
    samples = world.sample(700, seed=1)
    joint = world.posterior(samples._replace(labels=torch.zeros_like(samples.labels))).joint
    half = SyntheticSamples(
        *(
            {name: x[300:] for name, x in part.items()} if isinstance(part, dict) else part[300:]
            for part in samples
        )
    )
    close(world.posterior(half).joint, joint[300:])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_labels": 9}, ValueError, "num_labels"),
        ({"num_labels": 0}, ValueError, "num_labels"),
        ({"num_labels": 2.0}, TypeError, "num_labels"),
        ({"modalities": {}}, ValueError, "modalities"),
        ({"modalities": [("a", 1, 1)]}, TypeError, "modalities"),
        ({"modalities": {"a": (0, 1, 0.5)}}, ValueError, "steps"),
        ({"modalities": {"a": (1, 1, 1.5)}}, ValueError, "rate"),
        ({"noise": 1.0}, TypeError, "noise"),
        ({"noise": (0.0, 1.0)}, ValueError, "noise"),
        ({"noise": (2.0, 1.0)}, ValueError, "noise"),
        ({"prior": torch.ones(4)}, ValueError, "prior"),
        ({"num_labels": 2, "prior": torch.ones(4)}, ValueError, "prior"),
        ({"missing_rate": -0.1}, ValueError, "missing_rate"),
        (
            {"modalities": {"text": 5}},
            TypeError,
            r"`modalities\['text'\]` to be a SyntheticModality, but got 5",
        ),
        (
            {"modalities": {"text": (1, 2, 0.3, 4)}},
            TypeError,
            r"to be a SyntheticModality, but got \(1, 2, 0.3, 4\)",
        ),
        ({"seed": "a"}, TypeError, "`seed` to be an integer, but got 'a'"),
        (
            {"num_labels": 2, "prior": torch.ones(4, device="meta")},
            ValueError,
            "`prior` to be on cpu, but got meta",
        ),
    ],
)
def test_bad_world(arguments, error, message):
    with pytest.raises(error, match=message):
        SyntheticMMER(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples"),
        ({"noise": torch.ones(3, 2)}, ValueError, "noise"),
        ({"noise": torch.zeros(3, 3)}, ValueError, "noise"),
        ({"noise": 1.0}, TypeError, "noise"),
        (
            {"noise": torch.ones(3, 3, device="meta")},
            ValueError,
            "`noise` to be on cpu, but got meta",
        ),
        ({"seed": 0.5}, TypeError, "`seed` to be an integer, but got 0.5"),
        ({"seed": 2**64}, ValueError, r"`seed` to be in \[-2\*\*63, 2\*\*64\), but got"),
    ],
)
def test_bad_draw(world, arguments, error, message):
    with pytest.raises(error, match=message):
        world.sample(**{"num_samples": 3, "seed": 0} | arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": {}}, ValueError, r"`samples` to have the modalities \['text', 'audio', 'vision'\], but got \[\]"),
        ({"noise": -torch.ones(3, 3)}, ValueError, r"`samples.noise` to be in \[.*, inf\], but got -1.0"),
        ({"noise": torch.ones(2, 3)}, ValueError, r"`samples.noise` to have shape \(N=3, M=3\), but got \(2, 3\)"),
        ({"labels": torch.ones(3, 5)}, ValueError, r"`samples.labels` to have shape \(N, Q=6\), but got \(3, 5\)"),
        ({"labels": torch.ones(3, 6, device="meta")}, ValueError, "`samples.labels` to be on cpu, but got meta"),
    ],
)  # fmt: skip
def test_bad_samples(world, change, error, message):
    with pytest.raises(error, match=message):
        world.posterior(world.sample(3, seed=0)._replace(**change))
    with pytest.raises(TypeError, match="`samples` to be SyntheticSamples, but got int"):
        world.posterior(3)


@pytest.fixture
def _defaults_of_their_own():
    yield
    no_default_device()
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_defaults_of_their_own")
@pytest.mark.parametrize("default", [torch.device("meta"), torch.float64], ids=str)
def test_default_device_and_dtype_do_not_matter(default):
    def made():
        world = SyntheticMMER(2, SMALL, missing_rate=0.3)
        samples = world.sample(5, seed=1)
        return samples, world.posterior(samples), world.prior

    samples, posterior, prior = made()
    is_device = isinstance(default, torch.device)
    (torch.set_default_device if is_device else torch.set_default_dtype)(default)
    again = made()
    for name, x in samples.features.items():
        assert torch.equal(again[0].features[name], x)
        assert torch.equal(again[0].padding_mask[name], samples.padding_mask[name])
    assert torch.equal(again[0].labels, samples.labels)
    assert torch.equal(again[1].joint, posterior.joint)
    assert torch.equal(again[2], prior)
