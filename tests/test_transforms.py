"""Modalities left out and spoilt: what is touched, and what is not."""

from typing import get_args

import pytest
import torch

from data_support import make
from support import Bad, close, refused
from uncertainty_mm.data import MultimodalDataset
from uncertainty_mm.data.transforms import (
    Corruption,
    corrupt,
    corrupted,
    drop_modalities,
    noise,
)

KINDS = get_args(Corruption)
SIZED = ["noise", "scaled", "offset", "clipped", "burst", "blurred", "dropped"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def held(count=200):
    """Data with steps masked in the middle too, and NaN where masked."""
    data = make(count)
    data.padding_mask["b"][:, 3] = True
    data.features["b"] = data.features["b"].masked_fill(
        data.padding_mask["b"].unsqueeze(2), torch.nan
    )
    return data


# --- In training ------------------------------------------------------------------------------------------------------


def test_a_share_of_the_samples_loses_half_of_its_modalities():
    batch = make(4000).batch(range(4000))
    changed = drop_modalities(batch, 0.4, seeded())
    for name, mask in changed.padding_mask.items():
        lost = mask.all(1) & ~batch.padding_mask[name].all(1)
        assert abs(lost.double().mean() - 0.2) < 0.03
        assert torch.equal(mask[~lost], batch.padding_mask[name][~lost])
        assert torch.equal(changed.features[name], batch.features[name] * ~mask.unsqueeze(2))
    together = torch.stack([mask.all(1) for mask in changed.padding_mask.values()], 1)
    assert abs(together.any(1).double().mean() - 0.4 * 7 / 8) < 0.03  # of three, one at least
    assert changed.labels is batch.labels
    assert not batch.padding_mask["a"].all(1).any()


def test_noise_is_as_large_as_said_where_said():
    data = make(4000)
    batch = data.batch(range(4000))
    spread = {"a": torch.tensor([0.1, 1.0, 10.0]), "b": 2.0}
    changed = noise(batch, 0.5, spread, size=3.0, generator=seeded())
    assert changed.features["c"] is batch.features["c"]
    for name, each in spread.items():
        valid = ~batch.padding_mask[name]
        added = changed.features[name] - batch.features[name]
        assert not added[~valid].any()
        noisy = added.flatten(1).any(1) & valid.any(1)
        assert abs(noisy.double().mean() - 0.5) < 0.03
        # the mean square of a uniform size is a third of that of the largest
        got = added[noisy][valid[noisy]].double().square().mean(0).sqrt()
        torch.testing.assert_close(
            got, (torch.as_tensor(each) * 3**0.5).double().expand_as(got), rtol=0.08, atol=0
        )


def test_nothing_happens_to_no_share():
    batch = make().batch(range(20))
    for changed in (
        drop_modalities(batch, 0.0),
        noise(batch, 0.0, {"a": 1.0}),
        noise(batch, 1.0, {"a": 1.0}, size=0.0),
        noise(batch, 1.0, {}),
    ):
        for name in batch.features:
            assert torch.equal(changed.features[name], batch.features[name])
            assert torch.equal(changed.padding_mask[name], batch.padding_mask[name])


# --- One by one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_is_left_alone_and_the_seed_decides(kind):
    data = held()
    before = {name: x.clone() for name, x in data.features.items()}
    first, again, other = (corrupted(data, "b", kind, seed=seed) for seed in (1, 1, 2))
    for name, x in before.items():
        torch.testing.assert_close(data.features[name], x, rtol=0, atol=0, equal_nan=True)
    mask = data.padding_mask["b"]
    assert first.padding_mask["b"] is mask
    assert first.features["a"] is data.features["a"]
    assert first.labels is data.labels
    assert first.soft_labels is data.soft_labels
    assert first.features["b"][mask].isnan().all()
    x, y, z = (each.features["b"][~mask] for each in (first, again, other))
    assert torch.equal(x, y)
    assert x.isfinite().all()
    assert not torch.equal(x, data.features["b"][~mask])
    # what is left to chance depends on the seed
    by_chance = kind in (
        "noise",
        "burst",
        "dropped",
        "shuffled",
        "swapped",
    )  # two features: one way
    assert torch.equal(x, z) != by_chance


@pytest.mark.parametrize("kind", SIZED)
def test_size_0_changes_nothing(kind):
    data = held()
    same = corrupted(data, "b", kind, size=0.0).features["b"]
    assert torch.equal(same.nan_to_num(), data.features["b"].nan_to_num())
    larger = [
        (corrupted(data, "b", kind, size=size).features["b"] - data.features["b"])
        .nan_to_num()
        .norm()
        for size in (1.0, 2.0, 4.0)
    ]
    assert 0 < larger[0] < larger[1] < larger[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_spoilt_like_the_data(kind):
    data = held()
    statistics = data.statistics(min_std=1e-3)["b"]
    batch = data.batch(range(200))
    got = corrupt(batch, "b", kind, size=2.0, statistics=statistics, generator=seeded(5))
    expected = corrupted(data, "b", kind, size=2.0, seed=5)
    assert torch.equal(got.features["b"], expected.features["b"].nan_to_num())
    assert got.padding_mask is batch.padding_mask
    own = corrupt(batch, "b", kind, size=2.0, generator=seeded(5)).features["b"]
    torch.testing.assert_close(own, got.features["b"], rtol=1e-4, atol=1e-4)
    half = batch._replace(features=batch.features | {"b": batch.features["b"].half()})
    assert corrupt(half, "b", kind).features["b"].dtype == torch.float16


def one(values, valid, kind, **options):
    """One sample of single numbers, spoilt."""
    x = torch.tensor(values).view(1, -1, 1)
    data = MultimodalDataset(
        {"a": x}, {"a": ~torch.tensor(valid).view(1, -1).bool()}, torch.ones(1, 1), ["happy"]
    )
    return corrupted(data, "a", kind, **options).features["a"].flatten().tolist()


def test_kinds_by_hand():
    values, valid = [9.0, 2.0, 4.0, 9.0, 6.0], [0, 1, 1, 0, 1]
    assert one(values, valid, "dead") == [9, 0, 0, 9, 0]
    assert one(values, valid, "stuck") == [9, 2, 2, 9, 2]
    assert one(values, valid, "scaled", size=0.5) == [9, 3, 6, 9, 9]
    assert one(values, valid, "blurred", size=1) == [9, 3, 3, 9, 6]
    assert sorted(one(values, valid, "shuffled", seed=1)) == [2, 4, 6, 9, 9]
    std = (8 / 3) ** 0.5
    close(
        torch.tensor(one(values, valid, "offset", size=2)),
        [9, 2 + 2 * std, 4 + 2 * std, 9, 6 + 2 * std],
    )
    close(torch.tensor(one(values, valid, "clipped", size=2)), [9, 4 - std / 2, 4, 9, 4 + std / 2])
    assert one(values, valid, "swapped") == values  # there is no other sample
    assert one(values, [0] * 5, "burst") == values  # nor a step


def test_noise_of_the_data_is_as_large_as_said():
    data = make(3000)
    data.features["a"] *= torch.tensor([0.1, 1.0, 10.0])
    valid = ~data.padding_mask["a"]
    added = (corrupted(data, "a", size=3.0).features["a"] - data.features["a"])[valid]
    close(added.std(0) / data.features["a"][valid].std(0) / 3, torch.ones(3), torch.bfloat16)


def test_burst_is_a_quarter_of_the_steps_in_a_row():
    features = {"a": torch.zeros(300, 40, 2) + torch.randn(40, 1)}
    mask = torch.arange(40) >= torch.randint(20, 41, (300, 1))
    data = MultimodalDataset(features, {"a": mask}, torch.ones(300, 1), ["happy"])
    noisy = (corrupted(data, "a", "burst").features["a"] != features["a"]).any(2)
    assert torch.equal(noisy.sum(1), ((~mask).sum(1) / 4).ceil().long())
    assert ((noisy[:, 1:] & ~noisy[:, :-1]).sum(1) + noisy[:, 0] == 1).all()
    assert noisy.any(0)[:25].all()


def test_swapped_steps_are_those_of_another_sample_that_has_them():
    count = 50
    x = torch.arange(count).view(count, 1, 1).expand(count, 6, 1).float()
    x = x + torch.arange(6).view(1, 6, 1) / 10
    lengths = torch.arange(count) % 7
    mask = torch.arange(6) >= lengths.unsqueeze(1)
    data = MultimodalDataset({"a": x}, {"a": mask}, torch.ones(count, 1), ["happy"])
    got = corrupted(data, "a", "swapped").features["a"].squeeze(2)
    for row in range(count):
        if lengths[row]:
            other = int(got[row, 0])
            assert other != row
            assert lengths[other] > 0
            steps = torch.arange(int(lengths[row])) % lengths[other]
            close(got[row, : lengths[row]], x[other, steps, 0])


def test_permuted_features_are_the_same_for_all_samples():
    data = make(100)
    got, x = corrupted(data, "a", "permuted", seed=3).features["a"], data.features["a"]
    places = [next(j for j in range(3) if torch.equal(got[..., i], x[..., j])) for i in range(3)]
    assert sorted(places) == [0, 1, 2]
    assert not any(i == j for i, j in enumerate(places))


BATCH = [
    Bad("share", lambda b: drop_modalities(b, 1.5), ValueError, r"`share` to be a number in \[0, 1\], but got 1.5"),
    Bad("noise: share", lambda b: noise(b, -1, {}), ValueError, r"`share` to be a number in \[0, 1\], but got -1"),
    Bad("noise: size", lambda b: noise(b, 1, {}, size=-1), ValueError, "`size` to be a number at least 0, but got -1"),
    Bad("noise: modality", lambda b: noise(b, 1, {"x": 1}), ValueError, r"`spread` to name .* but got \['x'\]"),
    Bad("modality", lambda b: corrupt(b, "x"), ValueError, "`modality` to be one of .*, but got 'x'"),
    Bad("kind", lambda b: corrupt(b, "a", "wet"), ValueError, "`kind` to be one of .*, but got 'wet'"),
    Bad("size", lambda b: corrupt(b, "a", size=-1), ValueError, "`size` to be a number at least 0, but got -1"),
    Bad("a batch for data", lambda b: corrupted(b, "a"), TypeError, "`data` to be a MultimodalDataset, but got"),
    Bad("seed", lambda b: corrupted(make(), "a", seed=0.5), TypeError, "`seed` to be an integer, but got 0.5"),
]  # fmt: skip


@pytest.mark.parametrize("case", BATCH, ids=lambda case: case.name)
def test_refused_and_unchanged(case):
    refused(case, make().batch(range(20)), lambda batch: batch)
