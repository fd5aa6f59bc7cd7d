"""The data set itself, and what torch's own tools make of it."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    default_collate,
    random_split,
)

from data_support import check_same, make
from support import Bad, close, no_default_device, refused
from uncertainty_mm import EmotionQueryAttention
from uncertainty_mm.data import FeatureStatistics, MultimodalBatch, MultimodalDataset, SyntheticMMER

# --- The data set -----------------------------------------------------------------------------------------------------


def test_a_batch_is_the_samples_of_its_indices():
    data = make(ids=[f"s{i}" for i in range(20)])
    indices = [3, 0, 19, 3]
    batch = data.batch(indices)
    assert batch.indices.tolist() == indices
    for row, index in enumerate(indices):
        sample = data[index]
        assert sample.indices == index
        for name in data.dims:
            assert torch.equal(batch.features[name][row], data.features[name][index])
            assert torch.equal(sample.features[name], data.features[name][index])
            assert torch.equal(sample.padding_mask[name], data.padding_mask[name][index])
        assert torch.equal(batch.labels[row], data.labels[index])
        assert torch.equal(sample.soft_labels, data.soft_labels[index])
    assert data[-1].indices == 19
    with pytest.raises(IndexError):
        data[20]


def test_a_batch_is_float32_and_masked_steps_are_0():
    data = make()
    mask = data.padding_mask["a"].unsqueeze(2)
    poisoned = data.features["a"].half().masked_fill(mask, float("nan"))
    features = data.features | {"a": poisoned}
    data = MultimodalDataset(features, data.padding_mask, data.labels, data.label_names)
    batch = data.batch(range(20))
    assert batch.features["a"].dtype == torch.float32
    assert torch.equal(batch.features["a"], poisoned.float().nan_to_num())
    assert poisoned.isnan().any()  # the data themselves are left alone
    assert batch.soft_labels is None


def test_loaders():
    data = make(ids=None)
    seen = torch.cat([batch.indices for batch in data.loader(6)])
    assert torch.equal(seen, torch.arange(20))
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(0))
    for loader in (
        data.loader(6, sampler=sampler),
        data.loader(6, shuffle=True),
        DataLoader(Subset(data, range(20)), 6, shuffle=True),
    ):
        seen = torch.cat([batch.indices for batch in loader])
        assert sorted(seen.tolist()) == list(range(20))
    dropped = list(data.loader(6, drop_last=True))
    assert [len(batch.labels) for batch in dropped] == [6, 6, 6]


def test_a_batch_feeds_the_attention():
    world = SyntheticMMER(num_labels=3)
    samples = world.sample(8, seed=0)
    names = ["x", "y", "z"]
    data = MultimodalDataset(samples.features, samples.padding_mask, samples.labels, names)
    batch = next(iter(data.only(["text"]).loader(4)))
    attention = EmotionQueryAttention(data.dims, 3)
    assert attention(batch.features, batch.padding_mask).shape == (4, 3, 3, 128)
    missing = attention.missing(batch.features, batch.padding_mask)
    assert missing.tolist() == [[False, True, True]] * 4


def test_select():
    data = make(ids=list(map(str, range(20))), groups=range(20), unknown=UNKNOWN)
    part = data.select(torch.tensor([7, 2, -1]))
    assert (len(part), part.ids, part.label_names) == (3, ["7", "2", "19"], data.label_names)
    assert part.groups.tolist() == [7, 2, 19]
    for row, index in enumerate([7, 2, 19]):
        got, expected = part[row], data[index]
        assert got.indices == row
        for name in data.dims:
            assert torch.equal(got.features[name], expected.features[name])
            assert torch.equal(got.padding_mask[name], expected.padding_mask[name])
        assert torch.equal(got.labels, expected.labels)
        assert torch.equal(got.soft_labels, expected.soft_labels)
        assert torch.equal(got.unknown, expected.unknown)
    assert len(data.select([])) == 0
    with pytest.raises(IndexError):
        data.select([20])


def test_only():
    data = make(ids=list(map(str, range(20))))
    rest = data.only(["c", "a"])
    assert list(rest.dims) == ["a", "c", "b"]
    assert rest.padding_mask["b"].all()
    assert torch.equal(rest.padding_mask["a"], data.padding_mask["a"])
    assert rest.features["a"] is data.features["a"]
    assert rest.ids == data.ids
    assert not rest[1].features["b"].any()
    for wrong in (["a", "d"], "a", "abc"):
        with pytest.raises(ValueError, match="Expected `modalities` to be among"):
            data.only(wrong)


def test_summary():
    data = make(4, invalid_steps={"b": 2})
    data.padding_mask["b"] = torch.arange(7) >= torch.tensor([[0], [2], [7], [3]])
    data.labels[:] = torch.tensor([[0, 0], [1, 0], [1, 0], [1, 1]])
    summary = data.summary()
    assert summary.samples == 4
    assert summary.label_counts == {"first": 3, "second": 1}
    assert summary.label_shares == {"first": 0.75, "second": 0.25}
    assert summary.unlabelled == 1
    b = summary.modalities["b"]
    assert b == (7, 2, (2, 3.0, 7), 1, 16, 2)
    assert "b: 7 x 2, lengths 2 / 3 / 7, 1 missing, 16 steps masked, 2 of them not finite" in str(
        summary
    )
    assert "first         3  0.750" in str(summary)
    assert repr(data) == (
        "MultimodalDataset(4 samples, {'a': (5, 3), 'c': (1, 4), 'b': (7, 2)}, labels ['first', 'second'])"
    )


def test_pickle():
    data = make()
    check_same(pickle.loads(pickle.dumps(data)), data)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": {}}, ValueError, "same modalities, at least one"),
        ({"padding_mask": {"a": torch.zeros(4, 5).bool()}}, ValueError, r"got \['a', 'b'\] and \['a'\]"),
        ({"labels": torch.zeros(4)}, ValueError, r"`labels` to have shape \(N, Q=2\), but got \(4,\)"),
        ({"labels": torch.zeros(4, 3)}, ValueError, "`labels` to have shape"),
        ({"labels": torch.full((4, 2), 0.5)}, ValueError, "`labels` to hold only 0 and 1"),
        ({"labels": np.zeros((4, 2))}, TypeError, "`labels` to be a tensor"),
        ({"label_names": ["x", "x"]}, ValueError, r"different names, at least one, but got \['x', 'x'\]"),
        ({"label_names": []}, ValueError, "different names"),
        ({"label_names": "xy"}, TypeError, "`label_names` to be a sequence of names"),
        ({"label_names": [1, 2]}, TypeError, "`label_names` to be a sequence of names"),
        ({"b": torch.zeros(3, 7, 2)}, ValueError, r"`features\['b'\]` to have shape \(N=4, S, D\)"),
        ({"b": torch.zeros(4, 7)}, ValueError, r"`features\['b'\]` to have shape"),
        ({"b": torch.zeros(4, 0, 2)}, ValueError, r"`features\['b'\]` to have steps and features"),
        ({"b": torch.zeros(4, 7, 2).int()}, TypeError, r"`features\['b'\]` to have a floating dtype"),
        ({"b": torch.full((4, 7, 2), torch.inf)}, ValueError, r"`features\['b'\]` to be finite"),
        ({"b": torch.zeros(4, 7, 2).to("meta")}, ValueError, r"`features\['b'\]` to be on cpu"),
        ({"mask": torch.zeros(4, 6).bool()}, ValueError, r"`padding_mask\['b'\]` to have shape \(N=4, S=7\)"),
        ({"mask": torch.zeros(4, 7)}, TypeError, r"`padding_mask\['b'\]` to have a bool dtype"),
        ({"soft_labels": torch.zeros(4, 3)}, ValueError, "`soft_labels` to have shape"),
        ({"soft_labels": torch.full((4, 2), -1.0)}, ValueError, "`soft_labels` to be in"),
        ({"soft_labels": torch.full((4, 2), torch.nan)}, ValueError, "`soft_labels` to be in"),
        ({"soft_labels": torch.zeros(4, 2).int()}, TypeError, "`soft_labels` to have a floating"),
        ({"ids": ["a"]}, ValueError, "`ids` to name 4 samples, but got 1"),
        ({"ids": "abcd"}, TypeError, "`ids` to be a sequence of names, but got 'abcd'"),
        ({"ids": [1, 2, 3, 4]}, TypeError, "`ids` to be a sequence of names, but got 1 among them"),
        ({"features": [1]}, TypeError, "`features` to be a mapping of names, but got list"),
        ({"features": {1: torch.zeros(4, 3, 2)}}, TypeError, "`features` to be a mapping of names, but got 1"),
        ({"label_names": 2}, TypeError, "`label_names` to be a sequence of names, but got int"),
        ({"invalid_steps": {"face": 3}}, ValueError, r"`invalid_steps` to name modalities of \['a', 'b'\], but got"),
        ({"labels": -torch.ones(4, 2)}, ValueError, "only 0 and 1, but got -1.0; mark .* `unknown` .*, or by NaN"),
        ({"unknown": torch.zeros(4, 3).bool()}, ValueError, r"`unknown` to have shape \(N=4, Q=2\)"),
        ({"unknown": torch.zeros(4, 2)}, TypeError, "`unknown` to have a bool dtype"),
        ({"groups": [1, 2]}, ValueError, r"`groups` to have shape \(N=4\)"),
        ({"groups": list("abcd")}, TypeError, "`groups` to hold integers"),
        ({"groups": torch.zeros(4)}, TypeError, "`groups` to have an integer dtype"),
        ({"validate_args": 1}, TypeError, "`validate_args` to be True, False or None"),
    ],
)  # fmt: skip
def test_broken_arguments(change, error, message):
    b, mask = change.pop("b", torch.zeros(4, 7, 2)), change.pop("mask", torch.zeros(4, 7).bool())
    arguments = {
        "features": {"a": torch.zeros(4, 5, 3), "b": b},
        "padding_mask": {"a": torch.zeros(4, 5).bool(), "b": mask},
        "labels": torch.zeros(4, 2),
        "label_names": ["x", "y"],
    }
    with pytest.raises(error, match=message):
        MultimodalDataset(**(arguments | change))


REFUSED = [
    Bad("only: unknown", lambda d: d.only(["face"]), ValueError, r"among \['a', 'c', 'b'\], but got \['face'\]"),
    Bad("only: a number", lambda d: d.only(1), TypeError, "`modalities` to be a collection of names, but got 1"),
    Bad("select: a mask", lambda d: d.select(torch.ones(20) > 0), TypeError, "an integer dtype .* torch.bool"),
    Bad("select: fractions", lambda d: d.select([0.7]), TypeError, "an integer dtype .* torch.float32"),
    Bad("select: lists", lambda d: d.select([[0]]), ValueError, r"`indices` to have shape \(n\), but got \(1, 1\)"),
    Bad("select: names", lambda d: d.select(["a"]), TypeError, r"`indices` to hold integers, but got \['a'\]"),
    Bad("select: out of range", lambda d: d.select([20]), IndexError, "index 20 is out of bounds"),
    Bad("batch: out of range", lambda d: d.batch([20]), IndexError, "index 20 is out of bounds"),
    Bad("position out of range", lambda d: d[20], IndexError, "out of range"),
    Bad("loader: batches of 0", lambda d: d.loader(0), ValueError, "batch_size .* got batch_size=0"),
    Bad("in order: others", lambda d: d.in_order(["first"]), ValueError, "in some order, but got"),
    Bad("statistics: floor", lambda d: d.statistics(-1), ValueError, "`min_std` to be a number at least 0, but got -1"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused_and_unchanged(case):
    refused(case, make(ids=list(map(str, range(20)))), vars)


# --- Labels that are not known ----------------------------------------------------------------------------------------

UNKNOWN = torch.arange(40).view(20, 2) % 3 == 0


def test_nan_in_floating_labels_is_unknown():
    labels = make().labels.float().masked_fill(UNKNOWN, torch.nan)
    data = make(labels=labels)
    assert torch.equal(data.unknown, UNKNOWN)
    assert torch.equal(data.labels, labels.nan_to_num())
    batch = next(iter(data.loader(20)))
    assert torch.equal(batch.unknown, UNKNOWN)
    assert make(labels=make().labels.float()).unknown is None
    both = make(labels=labels, unknown=UNKNOWN.roll(1, 0))
    assert torch.equal(both.unknown, UNKNOWN | UNKNOWN.roll(1, 0))


@pytest.mark.parametrize("value", [-1, 7, 255])
def test_nothing_is_read_where_a_label_is_unknown(value):
    labels = make().labels.short().masked_fill(UNKNOWN, value)
    soft_labels = make().soft_labels.masked_fill(UNKNOWN, torch.nan)
    data = make(labels=labels, soft_labels=soft_labels, unknown=UNKNOWN)
    assert not data.labels[UNKNOWN].any()
    assert not data.soft_labels[UNKNOWN].any()
    assert torch.equal(data.labels[~UNKNOWN], labels[~UNKNOWN])


def test_summary_of_labels_that_are_not_known():
    labels = torch.tensor([[1, torch.nan], [torch.nan, torch.nan], [0, 0], [0, 1]])
    summary = make(4, labels=labels, soft_labels=None).summary()
    assert summary.label_counts == {"first": 1, "second": 1}
    assert summary.label_shares == {"first": 1 / 3, "second": 1 / 2}
    assert summary.unknown == {"first": 1, "second": 2}
    assert summary.unlabelled == 1
    assert "second        1  0.500  (2 unknown)" in str(summary)


def test_labels_in_another_order():
    data = make(unknown=UNKNOWN, groups=range(20))
    other = data.in_order(["second", "first"])
    assert other.label_names == ["second", "first"]
    for name in ("labels", "soft_labels", "unknown"):
        assert torch.equal(getattr(other, name), getattr(data, name).flip(1))
    check_same(other.in_order(["first", "second"]), data)


# --- Torch's own tools ------------------------------------------------------------------------------------------------

STOCK = {
    "loader": lambda data: data.loader(4),
    "stock": lambda data: DataLoader(data, 4),
    "workers": lambda data: DataLoader(data, 4, num_workers=1),
    "workers of the loader": lambda data: data.loader(4, num_workers=1),
    "batch_sampler": lambda data: data.loader(batch_sampler=BatchSampler(SequentialSampler(data), 4, False)),
    "stock batch_sampler": lambda data: DataLoader(
        data, batch_sampler=BatchSampler(SequentialSampler(data), 4, False)
    ),
    "subset": lambda data: DataLoader(Subset(data, range(20)), 4),
    "of the loader's data": lambda data: DataLoader(data.loader(7).dataset.data, 4),
    "its own collate": lambda data: DataLoader(data, 4, collate_fn=data.collate),
    "a collate_fn": lambda data: data.loader(4, collate_fn=default_collate),
}  # fmt: skip


@pytest.mark.parametrize("unknown", [None, UNKNOWN], ids=["known", "unknown"])
@pytest.mark.parametrize("name", STOCK)
def test_every_loader_gives_the_same_batches(name, unknown):
    data = make(unknown=unknown, soft_labels=None if unknown is None else make().soft_labels)
    batches = list(STOCK[name](data))
    assert len(batches) == 5
    for start, batch in zip(range(0, 20, 4), batches, strict=True):
        assert isinstance(batch, MultimodalBatch)
        same_batch(batch, data.batch(range(start, start + 4)))


@pytest.mark.parametrize("kind", [MultimodalDataset, lambda *x: Augmented(*x)])
def test_a_trimmed_batch_ends_where_its_longest_sequence_does(kind):
    padding = {"a": torch.arange(5) >= torch.tensor([[2], [3], [0], [0], [5]])}
    features = {"a": torch.randn(5, 5, 3)}
    data = kind(features, padding, torch.zeros(5, 2), ["first", "second"])
    steps = []
    for batch, whole in zip(data.loader(2, trim=True), data.loader(2), strict=True):
        count = batch.features["a"].shape[1]
        assert whole.features["a"].shape[1] == 5
        assert torch.equal(batch.features["a"], whole.features["a"][:, :count])
        assert torch.equal(batch.padding_mask["a"], whole.padding_mask["a"][:, :count])
        assert whole.padding_mask["a"][:, count:].all()
        steps.append(count)
    assert steps == [3, 1, 5]
    assert data[1].trimmed().features["a"].shape == (3, 3)


def same_batch(actual, expected):
    for part, other in zip(actual, expected, strict=True):
        if isinstance(other, dict):
            assert list(part) == list(other)
            assert all(torch.equal(part[name], other[name]) for name in other)
        else:
            assert part is other is None or torch.equal(part, other)


def test_parts_and_joins_keep_the_positions_of_their_data():
    data = make()
    first, second = random_split(data, [15, 5], torch.Generator().manual_seed(0))
    for part in (first, second):
        seen = torch.cat([batch.indices for batch in DataLoader(part, 4)])
        assert seen.tolist() == list(part.indices)
    joined = ConcatDataset([data, data.select([3, 4])])
    seen = torch.cat([batch.indices for batch in DataLoader(joined, 8)])
    assert seen.tolist() == [*range(20), 0, 1]
    assert data.__getitems__([2, 5])[1].indices == 5
    assert isinstance(data.__getitems__(torch.tensor([2, 5])), list)


def test_joined_data_of_other_lengths_are_padded_and_known_where_nothing_is_said():
    long, short = make(3), make(3, unknown=UNKNOWN[:3])
    short.features["a"], short.padding_mask["a"] = torch.ones(3, 2, 3), torch.zeros(3, 2).bool()
    batch = next(iter(DataLoader(ConcatDataset([long, short]), 6)))
    assert batch.features["a"].shape == (6, 5, 3)
    assert torch.equal(batch.features["a"][3:, :2], torch.ones(3, 2, 3))
    assert batch.padding_mask["a"][3:, 2:].all()
    assert not batch.padding_mask["a"][3:, :2].any()
    assert not batch.features["a"][3:, 2:].any()
    assert torch.equal(batch.unknown, torch.cat([torch.zeros(3, 2).bool(), UNKNOWN[:3]]))


def test_what_cannot_be_one_batch_is_told():
    data, other = make(2), make(2, soft_labels=None)
    with pytest.raises(ValueError, match=r"`soft_labels` in all samples .* in 1 of 2"):
        default_collate([data[0], other[0]])
    other = make(2)
    other.features["c"], other.padding_mask["c"] = torch.ones(2, 1, 5), torch.zeros(2, 1).bool()
    with pytest.raises(ValueError, match=r"the same modalities, .*'c': 4.*'c': 5"):
        default_collate([data[0], other[0]])


class Augmented(MultimodalDataset):
    """Doubles the first modality."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample._replace(features=sample.features | {"a": 2 * sample.features["a"]})


class AugmentedInPlace(MultimodalDataset):
    """The same for several samples at once."""

    def __getitems__(self, indices):
        samples = super().__getitems__(indices)
        for sample in samples:
            sample.features["a"] *= 2
        return samples


@pytest.mark.parametrize("kind", [Augmented, AugmentedInPlace])
@pytest.mark.parametrize("name", [name for name in STOCK if "data" not in name])
def test_no_way_around_an_augmentation(kind, name):
    plain = make()
    data = kind(plain.features, plain.padding_mask, plain.labels, plain.label_names)
    for each in (data, data.select(range(20)), data.only(["a", "b", "c"])):
        assert type(each) is kind
        seen = torch.cat([batch.features["a"] for batch in STOCK[name](each)])
        assert torch.equal(seen, 2 * plain.features["a"])
    assert torch.equal(data.batch([1, 2]).features["a"], 2 * plain.features["a"][1:3])
    assert torch.equal(plain.features["a"], make().features["a"])


def test_samples_of_another_form_are_left_to_torch():
    class Pairs(MultimodalDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample.features["c"], {"label": sample.labels}

    plain = make()
    data = Pairs(plain.features, plain.padding_mask, plain.labels, plain.label_names)
    features, rest = next(iter(data.loader(4)))
    assert features.shape == (4, 1, 4)
    assert torch.equal(rest["label"], plain.labels[:4])


def test_loader_knows_the_data():
    data = make(ids=list(map(str, range(20))))
    loader = data.loader(6)
    assert loader.dataset.label_names == data.label_names
    assert loader.dataset.ids is data.ids
    assert len(loader.dataset) == 20
    assert (len(loader), loader.batch_size) == (4, 6)
    same_batch(next(iter(pickle.loads(pickle.dumps(loader)))), data.batch(range(6)))
    same_batch(next(iter(data.loader(None))), data[0])


def test_batch_moves_as_a_whole():
    for unknown in (None, UNKNOWN):
        batch = make(unknown=unknown, soft_labels=None).batch([0, 1])
        same_batch(batch.to("cpu"), batch)
        moved = batch.to("meta", non_blocking=True)
        assert isinstance(moved, MultimodalBatch)
        tensors = [
            *moved.features.values(),
            *moved.padding_mask.values(),
            moved.labels,
            moved.indices,
        ]
        assert all(x.is_meta for x in tensors)
        assert moved.soft_labels is None
        assert moved.unknown is None if unknown is None else moved.unknown.is_meta
        assert batch.labels.device.type == "cpu"


@pytest.fixture
def _meta_by_default():
    torch.set_default_device("meta")
    yield
    no_default_device()


def test_default_device_does_not_matter(request):
    data = make(unknown=UNKNOWN, ids=list(map(str, range(20))))
    expected = data.batch([3, 1]), data.select([3, 1]), data.statistics(), str(data.summary())
    request.getfixturevalue("_meta_by_default")
    same_batch(data.batch([3, 1]), expected[0])
    same_batch(default_collate([data[3], data[1]]), expected[0])
    check_same(data.select([3, 1]), expected[1])
    for name, each in data.statistics().items():
        assert torch.equal(each.mean, expected[2][name].mean)
    assert str(data.summary()) == expected[3]
    assert data.only(["a"]).in_order(["second", "first"]).labels.device.type == "cpu"
    MultimodalDataset(
        data.features, data.padding_mask, data.labels, data.label_names, groups=range(20)
    )


def test_values_are_looked_at_as_asked():
    wrong = torch.full((20, 2), 0.7)
    with pytest.raises(ValueError, match="only 0 and 1"):
        make(labels=wrong)
    unchecked = make(labels=wrong, validate_args=False)
    assert unchecked.summary().label_counts == {"first": 20, "second": 20}
    plain = make(3, soft_labels=None)
    MultimodalDataset(
        {name: x.to("meta") for name, x in plain.features.items()},
        {name: x.to("meta") for name, x in plain.padding_mask.items()},
        plain.labels.to("meta"),
        plain.label_names,
    )


# --- Statistics -------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_valid_finite_steps():
    data = make(50)
    data.features["a"][3, 0, 1] = torch.inf
    data.features["a"][data.padding_mask["a"]] = torch.nan
    for name, got in data.statistics().items():
        assert isinstance(got, FeatureStatistics)
        x = data.features[name][~data.padding_mask[name]].double()
        x = x[x.isfinite().all(1)]
        assert got.count == len(x)
        assert got.mean.dtype == got.std.dtype == torch.float32
        close(got.mean, x.mean(0))
        close(got.std, x.std(0, correction=0))


def test_statistics_in_pieces(monkeypatch):
    data = make(50)
    data.features["a"] += 1e4  # a sum of squares in float32 would have no digit left
    whole = data.statistics()
    monkeypatch.setattr("uncertainty_mm.data.dataset._CHUNK", 31)
    for name, each in data.statistics().items():
        torch.testing.assert_close(each.mean, whole[name].mean, rtol=1e-7, atol=0)
        torch.testing.assert_close(each.std, whole[name].std, rtol=1e-6, atol=0)
        assert each.count == whole[name].count


def test_statistics_of_nothing_and_of_what_never_changes():
    data = make().only(["a"])
    data.features["a"][..., 1] = 5.0
    assert data.statistics()["b"].count == 0
    assert data.statistics()["b"].mean.tolist() == [0, 0]
    assert data.statistics()["b"].std.tolist() == [1, 1]
    assert data.statistics()["a"].std[1] == 0
    assert data.statistics(min_std=1e-3)["a"].std[1] == torch.tensor(1e-3)
    assert data.select([]).statistics()["a"].count == 0
