"""What must hold for any input, tried on many: state machines, permutations, masks, invariances, bounds, references.

The number of examples is that of the profile: a few dozen, or 10,000 with `pytest --hypothesis-profile=thorough`.
Properties of a single component that need its naive reference are beside it (`test_functional.py`, ...).
"""

import copy
import io
import math
import pickle
import tempfile
import warnings
from collections import defaultdict, deque
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scipy.stats import entropy, rankdata, spearmanr
from sklearn.metrics import jaccard_score, roc_auc_score
from torch.nn import functional as F

from cases import ordered
from support import close, poisoned, random_latent
from uncertainty_mm import (
    CorrectnessTracker,
    DiagonalGaussian,
    DistributionSupConLoss,
    EmotionQueryAttention,
    GaussianDecoupler,
    PlattScaling,
    SoftRankOrdinalityLoss,
    UncertaintyGatedFusion,
    functional,
    metrics,
)
from uncertainty_mm.data import (
    MultimodalDataset,
    read_folder,
    read_npz,
    write_folder,
    write_npz,
)
from uncertainty_mm.data.convert import read_label_csv, read_m3ed, read_mmsa, read_tailor
from uncertainty_mm.metrics import functional as measures

MODALITIES, LABELS, LATENT = 3, 2, 4
NAN = math.nan

seeds = st.integers(0, 2**32)
counts = st.integers(0, 6)  # of samples, rows, entries
batches = st.integers(1, 5)
positive = st.floats(1e-3, 1e3)
shifts = st.floats(-1e3, 1e3)
ties = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0])


def seeded(seed):
    torch.manual_seed(seed)


def some(*shape, share=0.4):
    return torch.rand(shape) < share


def order_of(count):
    return torch.randperm(count)


def through_a_file(module, fresh):
    """`fresh` with the state of `module`, written and read."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


# -------------------------------------------------------------------------------------- the queue


class QueueAgainstDeque(RuleBasedStateMachine):
    """Ragged batches into a queue and into a deque: the same rows in the same order, and the loss that they give."""

    @initialize(size=st.integers(0, 25), seed=seeds, anchors=st.sampled_from(["present", "all"]))
    def build(self, size, seed, anchors):
        self.generator = torch.Generator().manual_seed(seed)
        self.fresh = lambda: DistributionSupConLoss(
            MODALITIES, LABELS, LATENT, queue_size=size, anchors=anchors, embedding="both"
        )
        self.loss = self.fresh().double()
        self.model = deque(maxlen=size)  # (embedding, class), oldest first
        self.tolerance = torch.float64

    def batch(self, batch, with_missing):
        shape = (batch, MODALITIES, LABELS, LATENT)
        mean = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        std = 0.1 + torch.rand(shape, generator=self.generator, dtype=torch.float64)
        labels = torch.randint(2, (batch, LABELS), generator=self.generator)
        missing = torch.rand(batch, MODALITIES, generator=self.generator) < 0.3
        return DiagonalGaussian(mean, std), labels, missing if with_missing else None

    def rows(self, latent, labels, missing):
        """(embedding, class) of the distributions that are there, sample by sample."""
        for b, m, q in torch.cartesian_prod(*map(torch.arange, latent.mean.shape[:3])).tolist():
            if missing is None or not missing[b, m]:
                halves = (half[b, m, q] / half[b, m, q].norm() for half in latent)
                present = bool(labels[b, q])
                absent = 0 if present else MODALITIES * LABELS
                yield torch.cat([*halves]), m * LABELS + q + absent

    def expected_loss(self, rows):
        embeddings = [
            torch.stack([e for e, _ in x]) if x else torch.empty(0, 2 * LATENT).double()
            for x in (rows, self.model)
        ]
        classes = [torch.tensor([c for _, c in x], dtype=torch.long) for x in (rows, self.model)]
        limit = MODALITIES * LABELS * (1 if self.loss.anchors == "present" else 2)
        return functional.supcon_loss(
            embeddings[0],
            classes[0],
            anchor_mask=classes[0] < limit,
            bank=embeddings[1],
            bank_classes=classes[1],
        )

    @rule(batch=st.integers(0, 5), with_missing=st.booleans(), train=st.booleans())
    def run_batch(self, batch, with_missing, train):
        batch = self.batch(batch, with_missing)
        rows = list(self.rows(*batch))
        expected = self.expected_loss(rows)
        actual = self.loss.train(train)(*batch)
        # queue rows in half precision are a thousandth off, and the temperature makes 14 of it
        if self.tolerance is torch.float64:
            close(actual, expected)
        else:
            assert abs(float(actual - expected)) < (
                1e-3 if self.tolerance is torch.float32 else 0.5
            )
        if train:
            self.model.extend(rows)

    @rule(batch=st.integers(0, 3), enqueue=st.booleans())
    def enqueue_or_look(self, batch, enqueue):
        batch = self.batch(batch, True)
        self.loss.train(not enqueue)(*batch, enqueue=enqueue)
        if enqueue:
            self.model.extend(self.rows(*batch))

    @rule()
    def refuse(self):
        latent, labels, _ = self.batch(2, False)
        with pytest.raises(ValueError, match="`labels`"):
            self.loss(latent, labels + 2)

    @rule()
    def reset(self):
        self.loss.queue.reset()
        self.model.clear()

    @rule()
    def save_and_load(self):
        self.loss = through_a_file(self.loss, self.fresh().to(self.loss.queue.rows.dtype))

    @rule()
    def copy(self):
        self.loss = copy.deepcopy(self.loss)

    @rule(dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    def move(self, dtype):
        self.loss.to(dtype)
        if dtype.itemsize <= self.tolerance.itemsize:
            self.tolerance = dtype if self.tolerance is not torch.bfloat16 else torch.bfloat16

    @invariant()
    def same_rows_in_the_same_order(self):
        size, pointer = self.loss.queue.classes.shape[0], int(self.loss.queue.pointer)
        slots = [(pointer + i) % size for i in range(size)]
        filled = [slot for slot in slots if self.loss.queue.classes[slot] != -1]
        assert self.loss.queue.length == len(self.model) == len(filled)
        assert 0 <= pointer < max(size, 1)
        assert self.loss.queue.classes[filled].tolist() == [class_id for _, class_id in self.model]
        assert not self.loss.queue.rows.requires_grad
        if self.model:
            embeddings = torch.stack([embedding for embedding, _ in self.model])
            close(self.loss.queue.rows[filled], embeddings, self.tolerance)


TestQueueAgainstDeque = QueueAgainstDeque.TestCase
TestQueueAgainstDeque.settings = settings(stateful_step_count=15)

# ------------------------------------------------------------------------------------ the tracker

SAMPLES = 5
EVERY = torch.arange(SAMPLES)


class TrackerAgainstLists(RuleBasedStateMachine):
    """Updates of a tracker and of a dict of lists: repeated indices in any order, masks, soft and hard correctness."""

    @initialize(prior=st.sampled_from([0.0, 0.5, 1.0]), labels=st.sampled_from([None, 1, 3]))
    def build(self, prior, labels):
        self.prior, self.labels = prior, labels
        self.fresh = lambda: CorrectnessTracker(SAMPLES, labels, prior=prior)
        self.tracker = self.fresh()
        self.history = defaultdict(list)  # by sample and label

    updates = st.lists(
        st.tuples(
            st.integers(0, SAMPLES - 1),
            st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=3, max_size=3),
            st.lists(st.booleans(), min_size=3, max_size=3),
        ),
        max_size=10,
    )

    @rule(
        updates=updates,
        hard=st.booleans(),
        masked=st.booleans(),
        dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
    )
    def update(self, updates, hard, masked, dtype):
        columns = self.labels or 1
        indices = torch.tensor([i for i, _, _ in updates], dtype=dtype)
        correct = torch.tensor([c[:columns] for _, c, _ in updates]).reshape(-1, columns)
        mask = torch.tensor([m[:columns] for _, _, m in updates]).reshape(-1, columns).bool()
        correct = correct > 0.5 if hard else correct.masked_fill(mask & masked, NAN)
        if self.labels is None:
            correct, mask = correct.squeeze(1), mask.squeeze(1)
        self.tracker.update(indices, correct, mask if masked else None)
        for i, values, left_out in updates:
            for q in range(columns):
                if not (masked and left_out[q]):
                    self.history[i, q].append(float(values[q] > 0.5) if hard else values[q])

    @rule(index=st.sampled_from([-1, SAMPLES, 2**40]))
    def refuse(self, index):
        shape = (1,) if self.labels is None else (1, self.labels)
        with pytest.raises(ValueError, match="`indices`"):
            self.tracker.update(torch.tensor([index]), torch.ones(shape))

    @rule()
    def reset(self):
        self.tracker.reset()
        self.history.clear()

    @rule()
    def synchronize(self):
        self.tracker.synchronize()

    @rule()
    def save_and_load(self):
        self.tracker = through_a_file(self.tracker, self.fresh())

    @rule()
    def copy(self):
        self.tracker = copy.deepcopy(self.tracker)

    @rule(dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
    def move(self, dtype):
        self.tracker.to(dtype)

    @invariant()
    def same_history(self):
        cells = [[self.history[i, q] for q in range(self.labels or 1)] for i in range(SAMPLES)]
        shape = (SAMPLES,) if self.labels is None else (SAMPLES, self.labels)

        def forgotten(history):
            return sum(before >= 0.5 > after for before, after in pairwise(history))

        def expected(function):
            return torch.tensor([[function(cell) for cell in row] for row in cells]).view(shape)

        share = expected(lambda cell: sum(cell) / len(cell) if cell else self.prior)
        close(self.tracker(EVERY), share)
        assert self.tracker.counts(EVERY).equal(expected(len))
        assert self.tracker.forgetting_events(EVERY).equal(expected(forgotten))


TestTrackerAgainstLists = TrackerAgainstLists.TestCase
TestTrackerAgainstLists.settings = settings(stateful_step_count=15)

# ------------------------------------------------------------------------------------ permutations

DIMS = {"text": 4, "audio": 2, "vision": 3}


def attention():
    return EmotionQueryAttention(DIMS, LABELS, label_dim=3, proj_dim=4, out_dim=5).double()


def sequences(batch):
    features = {name: torch.randn(batch, 4, dim).double() for name, dim in DIMS.items()}
    return features, {name: some(batch, 4) for name in DIMS}


@given(seed=seeds, batch=batches)
def test_attention_is_equivariant_to_samples_labels_modalities_and_frames(seed, batch):
    seeded(seed)
    model, (features, mask) = attention(), sequences(batch)
    before = model(features, mask)
    samples, labels, names = order_of(batch), order_of(LABELS), order_of(MODALITIES)
    frames = {name: order_of(4) for name in DIMS}
    dims = {list(DIMS)[m]: list(DIMS.values())[m] for m in names}
    other = EmotionQueryAttention(dims, LABELS, label_dim=3, proj_dim=4, out_dim=5).double()
    other.load_state_dict(model.state_dict())
    other.label_embedding.weight.data = other.label_embedding.weight.data[labels]
    after, weights = other(
        {name: x[samples][:, frames[name]] for name, x in features.items()},
        {name: x[samples][:, frames[name]] for name, x in mask.items()},
        need_weights=True,
    )
    close(after, before[samples][:, names][:, :, labels])
    _, expected = model(features, mask, need_weights=True)
    for name, weight in weights.items():
        close(weight, expected[name][samples][:, labels][:, :, frames[name]])


@given(seed=seeds, batch=batches)
def test_decoupler_is_equivariant_to_samples_labels_and_modalities(seed, batch):
    seeded(seed)
    model = GaussianDecoupler(MODALITIES, 3, LATENT, hidden_dims=(4,), dropout=0).double()
    z, missing = torch.randn(batch, MODALITIES, LABELS, 3).double(), some(batch, MODALITIES)
    before = model(z, missing)
    samples, labels, names = order_of(batch), order_of(LABELS), order_of(MODALITIES)
    for parameter in model.parameters():  # (M, ...)
        parameter.data = parameter.data[names]
    after = model(z[samples][:, names][:, :, labels], missing[samples][:, names])
    for x, y in zip(after, before, strict=True):
        close(x, y[samples][:, names][:, :, labels])


@given(
    seed=seeds,
    batch=batches,
    anchors=st.sampled_from(["present", "all"]),
    kind=st.sampled_from(["both", "joint"]),
)
def test_contrastive_loss_is_equivariant_and_blind_to_the_order_of_the_queue(
    seed, batch, anchors, kind
):
    seeded(seed)
    options = {"queue_size": 30, "anchors": anchors, "embedding": kind, "reduction": "none"}
    model = DistributionSupConLoss(MODALITIES, LABELS, LATENT, **options).double()
    latent, missing = random_latent(batch, MODALITIES, LABELS, LATENT), some(batch, MODALITIES)
    present = torch.randint(2, (batch, LABELS))
    first = model(latent, present, missing)
    samples, labels, names = order_of(batch), order_of(LABELS), order_of(MODALITIES)
    moved = DiagonalGaussian(*(x[samples][:, names][:, :, labels] for x in latent))
    others = present[samples][:, labels], missing[samples][:, names]
    model.queue.reset()
    close(model(moved, *others), first[samples][:, names][:, :, labels])
    second = model(moved, *others, enqueue=False)
    rows = order_of(30)
    model.queue.rows.copy_(model.queue.rows[rows])
    model.queue.classes.copy_(model.queue.classes[rows])
    close(model(moved, *others, enqueue=False), second)


@given(seed=seeds, batch=batches, combine=st.sampled_from(["concat", "product"]))
def test_fusion_is_equivariant_to_samples_labels_and_modalities(seed, batch, combine):
    seeded(seed)
    model = UncertaintyGatedFusion(
        MODALITIES, LABELS, LATENT, hidden_dim=5, dropout=0, combine=combine
    ).double()
    latent, missing = random_latent(batch, MODALITIES, LABELS, LATENT), some(batch, MODALITIES)
    uncertainty = torch.rand(batch, LABELS).double()
    before = model(latent, uncertainty, missing)
    samples, labels, names = order_of(batch), order_of(LABELS), order_of(MODALITIES)
    if combine == "product":
        model.prior_mean.data = model.prior_mean.data[labels]
    else:  # the columns of a modality move with it
        for head in (model.mean_head, model.std_head):
            columns = head[0].weight.data.unflatten(1, (MODALITIES, LATENT))
            head[0].weight.data = columns[:, names].flatten(1)
    moved = DiagonalGaussian(*(x[samples][:, names][:, :, labels] for x in latent))
    after = model(moved, uncertainty[samples][:, labels], missing[samples][:, names])
    for x, y in zip(after, before, strict=True):
        close(x, y[samples][:, labels])


@given(seed=seeds, batch=batches)
def test_product_is_equivariant_and_blind_to_the_order_of_modalities(seed, batch):
    seeded(seed)
    latent, missing = random_latent(batch, MODALITIES, LABELS, LATENT), some(batch, MODALITIES)
    samples, labels, names = order_of(batch), order_of(LABELS), order_of(MODALITIES)
    moved = DiagonalGaussian(*(x[samples][:, names][:, :, labels] for x in latent))
    after = moved.product(missing[samples][:, names])
    for x, y in zip(after, latent.product(missing), strict=True):
        close(x, y[samples][:, labels])


@given(seed=seeds, batch=batches, factor=positive)
def test_chi2_is_equivariant_and_blind_to_the_order_of_modalities_and_to_the_unit(
    seed, batch, factor
):
    seeded(seed)
    (mean, std), missing = random_latent(batch, MODALITIES, LABELS, LATENT), some(batch, MODALITIES)
    before = functional.reduced_chi2(mean, std, missing)
    samples, labels, names = order_of(batch), order_of(LABELS), order_of(MODALITIES)
    moved = [x[samples][:, names][:, :, labels] for x in (factor * mean - 7, factor * std)]
    close(functional.reduced_chi2(*moved, missing[samples][:, names]), before[samples][:, labels])
    factors = torch.full((batch, MODALITIES), factor, dtype=torch.float64)
    wider = DiagonalGaussian(mean, std).inflated(factors)
    close(functional.reduced_chi2(*wider, missing), before / factor)


@given(seed=seeds, count=counts, mode=st.sampled_from(["rank", "standardized", "raw", "pearson"]))
def test_ordinality_is_blind_to_the_order_of_samples(seed, count, mode):
    seeded(seed)
    loss, mask = SoftRankOrdinalityLoss(mode=mode, pairs=("SR", "DR", "DS")), some(count)
    scores = [0.1 + torch.rand(count).double(), *torch.rand(2, count).double()]
    order = order_of(count)
    moved = [x[order] for x in (*scores, mask)]
    close(ordered(loss, *moved), ordered(loss, *scores, mask))


@given(seed=seeds, count=counts)
def test_tracker_is_blind_to_the_order_of_different_samples(seed, count):
    seeded(seed)
    one, other = CorrectnessTracker(8), CorrectnessTracker(8)
    for _ in range(3):
        indices, correct = order_of(8)[:count], torch.rand(count)
        order = order_of(count)
        one.update(indices, correct)
        other.update(indices[order], correct[order])
    assert all(one.state_dict()[name].equal(x) for name, x in other.state_dict().items())


@given(seed=seeds, count=st.integers(1, 12), shift=st.booleans())
def test_calibration_is_equivariant_to_labels_and_blind_to_the_order_of_samples(seed, count, shift):
    seeded(seed)
    logits, labels = 3 * torch.randn(count, 3).double(), torch.randint(2, (count, 3))
    samples, columns = order_of(count), order_of(3)
    one, other = (PlattScaling(3, shift=shift).double() for _ in range(2))
    one.fit(logits, labels)
    other.fit(logits[samples][:, columns], labels[samples][:, columns])
    for name in ("scale", "shift"):
        torch.testing.assert_close(
            getattr(other, name), getattr(one, name)[columns], rtol=1e-5, atol=1e-6
        )


@given(seed=seeds, count=counts, binning=st.sampled_from(["width", "mass"]))
def test_measures_are_equivariant_to_labels_and_blind_to_the_order_of_samples(seed, count, binning):
    seeded(seed)
    probs, labels = (torch.randint(6, (count, 3)) / 5).double(), torch.randint(2, (count, 3))
    samples, columns = order_of(count), order_of(3)
    moved = probs[samples][:, columns], labels[samples][:, columns]
    settings = {"n_bins": 4, "binning": binning, "average": "none"}
    before = measures.calibration_error(probs, labels, **settings)
    after = measures.calibration_error(*moved, **settings)
    torch.testing.assert_close(after, before[columns], equal_nan=True)
    for x, y in zip(
        measures.brier_decomposition(*moved, **settings),
        measures.brier_decomposition(probs, labels, **settings),
        strict=True,
    ):
        torch.testing.assert_close(x, y[columns], equal_nan=True)
    close(measures.sample_jaccard(*moved), measures.sample_jaccard(probs, labels)[samples])
    close(measures.predictive_entropy(moved[0]), measures.predictive_entropy(probs)[samples])


# -------------------------------------------------------------------------- what is masked is absent


@given(seed=seeds, batch=batches, padding=st.integers(0, 3), wrong=st.sampled_from([NAN, 1e30]))
def test_padding_of_a_sequence_is_as_if_it_were_not_there(seed, batch, padding, wrong):
    seeded(seed)
    model, (features, mask) = attention(), sequences(batch)
    padded = {
        name: torch.cat([x, x.new_full((batch, padding, x.shape[2]), wrong)], 1)
        for name, x in features.items()
    }
    longer = {name: F.pad(x, (0, padding), value=True) for name, x in mask.items()}
    close(model(padded, longer), model(features, mask))
    row = {name: x[:1, ~mask[name][0]] for name, x in features.items()}  # the first sample, cut
    if any(x.shape[1] for x in row.values()):
        close(model(row), model(features, mask)[:1])


@given(seed=seeds, batch=batches, name=st.sampled_from([*DIMS]), wrong=st.sampled_from([NAN, 7.0]))
def test_absent_modality_equals_a_padded_one_through_all_components(seed, batch, name, wrong):
    seeded(seed)
    model, (features, mask) = attention(), sequences(batch)
    decoupler = GaussianDecoupler(MODALITIES, 5, LATENT, hidden_dims=(4,), dropout=0).double()
    fusion = UncertaintyGatedFusion(MODALITIES, LABELS, LATENT, hidden_dim=5, dropout=0).double()
    loss = DistributionSupConLoss(MODALITIES, LABELS, LATENT, queue_size=10).double()
    present = torch.randint(2, (batch, LABELS))

    def results(features, mask):
        missing = model.missing(features, mask)
        latent = decoupler(model(features, mask), missing)
        loss.queue.reset()
        first, second = (loss(latent, present, missing) for _ in range(2))
        fused = fusion(latent, torch.full((batch,), 0.3).double(), missing)
        return [missing.double(), *latent, *fused, first, second, loss.queue.rows.clone()]

    left_out = torch.ones(batch, 4).bool()
    padded = features | {name: poisoned(features[name], left_out, wrong)}, mask | {name: left_out}
    absent = {key: x for key, x in features.items() if key != name}, mask
    for x, y in zip(results(*padded), results(*absent), strict=True):
        close(x, y)


@given(seed=seeds, batch=st.integers(0, 4), wrong=st.sampled_from([NAN, math.inf, -1.0]))
def test_missing_distributions_take_no_part_in_the_loss(seed, batch, wrong):
    seeded(seed)
    loss = DistributionSupConLoss(
        MODALITIES, LABELS, LATENT, queue_size=20, embedding="both"
    ).double()
    latent, missing = random_latent(batch, MODALITIES, LABELS, LATENT), some(batch, MODALITIES)
    present = torch.randint(2, (batch, LABELS))
    spoilt = DiagonalGaussian(*(poisoned(x, missing, wrong) for x in latent))
    there = ~missing
    classes = torch.arange(MODALITIES * LABELS).view(MODALITIES, LABELS).expand(batch, -1, -1)
    classes = classes + MODALITIES * LABELS * (1 - present.unsqueeze(1))
    rows = functional.distribution_embedding(*latent)[there].flatten(0, 1)
    expected = functional.supcon_loss(rows, classes[there].flatten())
    close(loss(spoilt, present, missing), expected)
    assert loss.queue.length == min(20, len(rows))


@given(seed=seeds, count=counts, wrong=st.sampled_from([NAN, math.inf, 5.0]))
def test_rows_of_class_minus_one_are_no_rows(seed, count, wrong):
    seeded(seed)
    embeddings, bank = torch.randn(2, count, 3).double()
    classes, bank_classes = torch.randint(-1, 3, (2, count))
    kept, bank_kept = classes >= 0, bank_classes >= 0
    options = {"reduction": "none", "temperature": 0.5}
    loss = functional.supcon_loss(
        poisoned(embeddings, ~kept, wrong),
        classes,
        bank=poisoned(bank, ~bank_kept, wrong),
        bank_classes=bank_classes,
        **options,
    )
    expected = functional.supcon_loss(
        embeddings[kept],
        classes[kept],
        bank=bank[bank_kept],
        bank_classes=bank_classes[bank_kept],
        **options,
    )
    close(loss[kept], expected)
    assert not loss[~kept].any()


@given(
    seed=seeds,
    batch=batches,
    index=st.integers(0, MODALITIES - 1),
    wrong=st.sampled_from([NAN, -1.0]),
)
def test_product_without_a_modality_is_that_of_the_others(seed, batch, index, wrong):
    seeded(seed)
    latent, missing = random_latent(batch, MODALITIES, LABELS, LATENT), some(batch, MODALITIES)
    missing[:, index] = True
    others = [m for m in range(MODALITIES) if m != index]
    prior = torch.randn(LABELS, LATENT).double()
    spoilt = DiagonalGaussian(*(poisoned(x, missing, wrong) for x in latent))
    rest = DiagonalGaussian(*(x[:, others] for x in latent))
    expected = rest.product(missing[:, others], prior)
    for x, y in zip(spoilt.product(missing, prior), expected, strict=True):
        close(x, y)


@given(
    seed=seeds,
    count=counts,
    mode=st.sampled_from(["rank", "standardized", "raw", "pearson"]),
    wrong=st.sampled_from([NAN, -math.inf]),
)
def test_masked_samples_take_no_part_in_the_ordinality(seed, count, mode, wrong):
    seeded(seed)
    mask, loss = some(count), SoftRankOrdinalityLoss(mode=mode, pairs=("SR", "DR", "DS"))
    scores = [0.1 + torch.rand(count).double(), *torch.rand(2, count).double()]
    spoilt = [poisoned(x, mask, wrong) for x in scores]
    close(ordered(loss, *spoilt, mask), ordered(loss, *(x[~mask] for x in scores)))
    ranks = functional.soft_rank(spoilt[0], mask=mask)
    close(ranks[~mask], functional.soft_rank(scores[0][~mask]))
    divergence = functional.ordinality_divergence(spoilt[1], spoilt[2], mask=mask)
    close(divergence, functional.ordinality_divergence(scores[1][~mask], scores[2][~mask]))


@given(seed=seeds, count=counts, wrong=st.sampled_from([NAN, 0.0, -2.0]))
def test_missing_modalities_have_no_share(seed, count, wrong):
    seeded(seed)
    sizes, missing = 0.1 + torch.rand(count, 4).double(), some(count, 4)
    share = measures.modality_attribution(poisoned(sizes, missing, wrong), missing)
    assert not share[missing].any()
    for row in range(count):
        there = ~missing[row]
        close(share[row, there], measures.modality_attribution(sizes[row : row + 1, there])[0])


@given(seed=seeds, batch=batches, name=st.sampled_from([*DIMS]))
def test_data_without_a_modality_is_data_that_masks_it(seed, batch, name):
    seeded(seed)
    features, mask = sequences(batch)
    data = MultimodalDataset(features, mask, torch.ones(batch, 1), ["happy"])
    one = data.only([other for other in DIMS if other != name]).batch(range(batch))
    model = attention().float()
    both = data.batch(range(batch))
    absent = {other: x for other, x in both.features.items() if other != name}
    close(model(one.features, one.padding_mask), model(absent, both.padding_mask))
    assert not one.features[name].any()


# ----------------------------------------------------------------------------- scales and shifts


@given(seed=seeds, count=counts, factor=positive, shift=shifts)
def test_soft_ranks_measure_scores_in_temperatures(seed, count, factor, shift):
    seeded(seed)
    scores = torch.randn(count).double()
    before = functional.soft_rank(scores, 0.7)
    torch.testing.assert_close(
        functional.soft_rank(factor * scores + shift, 0.7 * factor), before, rtol=1e-6, atol=1e-6
    )


@given(
    seed=seeds,
    count=counts,
    mean_factor=positive,
    std_factor=positive,
    sign=st.sampled_from([-1, 1]),
)
def test_embedding_has_no_size(seed, count, mean_factor, std_factor, sign):
    seeded(seed)
    latent = random_latent(count, LATENT)
    scaled = DiagonalGaussian(sign * mean_factor * latent.mean, std_factor * latent.std)
    before, after = latent.embedding(), scaled.embedding()
    close(after[:, :LATENT], sign * before[:, :LATENT])
    close(after[:, LATENT:], before[:, LATENT:])
    similarity = after @ before.T
    assert (similarity.abs() <= 2 + 1e-12).all()
    joint = DiagonalGaussian(mean_factor * latent.mean, mean_factor * latent.std)
    close(joint.embedding("joint"), latent.embedding("joint"))


@given(seed=seeds, count=st.integers(1, 6))
def test_supcon_loss_is_blind_to_rotations(seed, count):
    seeded(seed)
    rotation = torch.linalg.qr(torch.randn(3, 3).double()).Q
    embeddings, bank = torch.randn(2, count, 3).double()
    classes, bank_classes = torch.randint(2, (count,)), torch.randint(-1, 2, (count,))
    before = functional.supcon_loss(embeddings, classes, bank=bank, bank_classes=bank_classes)
    after = functional.supcon_loss(
        embeddings @ rotation, classes, bank=bank @ rotation, bank_classes=bank_classes
    )
    close(after, before)


@given(seed=seeds, count=counts, left=shifts, right=shifts)
def test_divergence_is_symmetric_and_blind_to_shifts(seed, count, left, right):
    seeded(seed)
    a, b = torch.randn(2, count).double()
    divergence = functional.ordinality_divergence(a, b)
    assert divergence >= 0
    close(functional.ordinality_divergence(b, a), divergence)
    close(functional.ordinality_divergence(a + left, b + right), divergence)
    close(functional.ordinality_divergence(a, a + left), 0)


@given(
    seed=seeds,
    count=st.integers(2, 6),
    factor=st.floats(0.01, 100),
    shift=st.floats(0, 10),
    mode=st.sampled_from(["rank", "standardized", "pearson"]),
)
def test_ordinality_is_blind_to_positive_affine_maps_of_each_score(
    seed, count, factor, shift, mode
):
    seeded(seed)
    loss = SoftRankOrdinalityLoss(mode=mode, pairs=("SR", "DR", "DS"))
    certainty, distance, correctness = 0.1 + 0.8 * torch.rand(3, count).double()
    before = ordered(loss, 1 / certainty, distance, correctness)
    mapped = 1 / (factor * certainty + shift), 0.5 * distance, 0.2 + 0.5 * correctness
    close(ordered(loss, *mapped), before)


@given(probs=st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_expected_distance_is_symmetric_and_what_it_says(probs):
    p = torch.tensor(probs, dtype=torch.float64)
    distance = functional.expected_distance(p)
    close(functional.expected_distance(1 - p), distance)
    ones = torch.ones_like(p)
    if_present = functional.prediction_distance(p, ones)
    if_absent = functional.prediction_distance(p, 0 * ones)
    close(distance, p * if_present + (1 - p) * if_absent)
    assert distance.min() >= 0
    assert distance.max() <= 0.5
    entropies = measures.predictive_entropy(p.unsqueeze(1))
    close(measures.predictive_entropy(1 - p.unsqueeze(1)), entropies)
    assert (distance <= entropies + 1e-12).all()  # 2p(1-p) <= H(p) in nats


@given(seed=seeds, count=counts, factor=st.floats(1e-100, 1e100))
def test_shares_depend_on_ratios_alone(seed, count, factor):
    seeded(seed)
    sizes, missing = 0.1 + torch.rand(count, 3).double(), some(count, 3)
    share = measures.modality_attribution(sizes, missing)
    close(measures.modality_attribution(factor * sizes, missing), share)
    close(share.sum(1), (~missing).any(1).double())


@given(seed=seeds, count=counts)
def test_measures_of_order_are_blind_to_monotone_maps(seed, count):
    seeded(seed)
    errors, uncertainty = torch.randint(2, (count,)), torch.randint(5, (count,)).double()
    changed = torch.exp(uncertainty) - 7
    for x, y in zip(
        measures.risk_coverage(changed, errors),
        measures.risk_coverage(uncertainty, errors),
        strict=True,
    ):
        torch.testing.assert_close(x, y, equal_nan=True)
    x, y = measures.spearman(errors, uncertainty), measures.spearman(errors, changed)
    torch.testing.assert_close(x, y, equal_nan=True)
    torch.testing.assert_close(measures.spearman(errors, -changed), -x, equal_nan=True)
    area = measures.auroc(uncertainty, errors)
    torch.testing.assert_close(measures.auroc(changed, errors), area, equal_nan=True)
    swapped = measures.auroc(uncertainty, 1 - errors)
    torch.testing.assert_close(swapped, 1 - area, equal_nan=True)


# ------------------------------------------------------------------------------------------ bounds


@given(
    seed=seeds,
    batch=batches,
    size=st.floats(0.01, 300),
    mean_weight=st.sampled_from(["certainty", "uncertainty"]),
    combine=st.sampled_from(["concat", "product"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_fused_prediction_lies_between_its_branches(seed, batch, size, mean_weight, combine, dtype):
    seeded(seed)
    model = UncertaintyGatedFusion(
        MODALITIES,
        LABELS,
        LATENT,
        hidden_dim=5,
        dropout=0,
        mean_weight=mean_weight,
        combine=combine,
    ).to(dtype)
    for parameter in model.parameters():
        parameter.data *= size
    latent = random_latent(batch, MODALITIES, LABELS, LATENT, dtype=dtype)
    uncertainty = torch.rand(batch, LABELS, dtype=dtype)
    uncertainty = torch.where(some(batch, LABELS), uncertainty.round(), uncertainty)
    out = model(latent, uncertainty, some(batch, MODALITIES))
    low = torch.minimum(out.mean_logits, out.std_logits)
    high = torch.maximum(out.mean_logits, out.std_logits)
    slack = 64 * torch.finfo(dtype).eps * (1 + low.abs() + high.abs())
    assert ((out.logits >= low - slack) & (out.logits <= high + slack)).all()
    assert ((out.mean_weight >= 0) & (out.mean_weight <= 1)).all()
    close(out.mean_weight, uncertainty if mean_weight == "uncertainty" else 1 - uncertainty)
    w, (a, b) = out.mean_weight, (out.mean_logits.sigmoid(), out.std_logits.sigmoid())
    close(out.probs, w * a + (1 - w) * b)
    for weight, branch in ((1, out.mean_logits), (0, out.std_logits)):
        alone = out.mean_weight == weight
        close(out.logits[alone], branch[alone])
    entropy_ = F.binary_cross_entropy_with_logits(out.logits, torch.ones_like(out.logits))
    (gradient,) = torch.autograd.grad(entropy_, model.mean_head[0].weight)
    assert gradient.isfinite().all()


@given(seed=seeds, batch=batches, size=st.floats(1e-3, 1e3))
def test_product_is_surer_than_each_and_lies_among_them(seed, batch, size):
    seeded(seed)
    latent = random_latent(batch, MODALITIES, LABELS, LATENT)
    latent = DiagonalGaussian(latent.mean, size * latent.std)
    fused = latent.product()
    assert (fused.std <= latent.std.amin(1).clamp_max(1) * (1 + 1e-12)).all()
    zero = torch.zeros(batch, 1, LABELS, LATENT).double()
    centres = torch.cat([latent.mean, zero], 1)  # those of the modalities and of the prior
    assert (fused.mean >= centres.amin(1) - 1e-12).all()
    assert (fused.mean <= centres.amax(1) + 1e-12).all()


@given(seed=seeds, batch=batches, size=st.floats(0.01, 1e6), min_std=st.floats(1e-6, 0.5))
def test_standard_deviations_and_weights_stay_in_their_range(seed, batch, size, min_std):
    seeded(seed)
    model = GaussianDecoupler(MODALITIES, 3, LATENT, hidden_dims=(4,), dropout=0, min_std=min_std)
    latent = model(size * torch.randn(batch, MODALITIES, LABELS, 3))
    assert (latent.std >= min_std).all()
    assert (latent.std <= 1.0001e4 + min_std).all()
    assert latent.mean.isfinite().all()
    features, mask = sequences(batch)
    scaled = {name: size * x for name, x in features.items()}
    _, weights = attention()(scaled, mask, need_weights=True)
    for name, weight in weights.items():
        assert ((weight >= 0) & (weight <= 1)).all()
        assert not weight.masked_select(mask[name].unsqueeze(1)).any()
        close(weight.sum(2), (~mask[name]).any(1, keepdim=True).expand(-1, LABELS).double())


@given(seed=seeds, count=st.integers(2, 20), size=st.floats(0.01, 100))
def test_calibration_keeps_order_and_is_finite(seed, count, size):
    seeded(seed)
    logits, labels = size * torch.randn(count, 2), torch.randint(2, (count, 2))
    calibration = PlattScaling(2).fit(logits, labels)
    assert (calibration.scale > 0).all()
    calibrated = calibration(logits)
    assert calibrated.isfinite().all()
    order = logits.argsort(0)
    assert (calibrated.gather(0, order).diff(dim=0) >= 0).all()


# --------------------------------------------------------------------------------------- references


@st.composite
def predictions(draw, max_labels=3):
    """Probabilities with many ties, and labels; no sample or a single class may be among them."""
    rows, columns = draw(st.integers(0, 12)), draw(st.integers(1, max_labels))
    size = rows * columns
    value = st.one_of(ties, st.floats(0, 1, width=32))
    probs = draw(st.lists(value, min_size=size, max_size=size))
    kind = draw(st.sampled_from([st.just(0), st.just(1), st.integers(0, 1)]))
    truth = draw(st.lists(kind, min_size=size, max_size=size))
    shape = (rows, columns)
    return torch.tensor(probs, dtype=torch.float64).view(shape), torch.tensor(
        truth, dtype=torch.long
    ).view(shape)


@given(predictions())
def test_prediction_measures_equal_scikit_learn_and_scipy(data):
    probs, labels = data
    if not len(probs):
        assert measures.calibration_error(probs, labels).isnan()
        assert measures.sample_jaccard(probs, labels).shape == (0,)
        return
    brier = measures.brier_decomposition(probs, labels, average="none").brier
    for column in range(probs.shape[1]):
        close(brier[column], (probs[:, column] - labels[:, column]).square().mean())
    if probs.shape[1] > 1:  # of one column scikit-learn makes a binary problem
        mean = jaccard_score(
            labels.numpy(), (probs > 0.5).int().numpy(), average="samples", zero_division=0
        )
        close(measures.sample_jaccard(probs, labels).mean(), mean)
    expected = [sum(entropy([p, 1 - p]) for p in row) for row in probs.tolist()]
    close(measures.predictive_entropy(probs), expected)


scores = st.lists(st.tuples(st.integers(0, 1), st.one_of(ties, st.floats(-1e6, 1e6))), max_size=15)


@given(scores)
def test_measures_of_order_equal_scikit_learn_and_scipy(rows):
    wrong = torch.tensor([each for each, _ in rows], dtype=torch.long)
    uncertainty = torch.tensor([each for _, each in rows], dtype=torch.float64)
    area = measures.auroc(uncertainty, wrong)
    if len(set(wrong.tolist())) == 2:
        close(area, roc_auc_score(wrong.numpy(), uncertainty.numpy()))
    else:
        assert area.isnan()
    rank = measures.spearman(uncertainty, wrong)
    if len(set(wrong.tolist())) == 2 and len(set(uncertainty.tolist())) > 1:
        close(rank, spearmanr(uncertainty.numpy(), wrong.numpy()).statistic)
    else:
        assert rank.isnan()
    if rows:
        close(
            functional.soft_rank(100 * (uncertainty / 1e4).round(), 0.5),
            rankdata((uncertainty / 1e4).round().numpy()),
        )
        curve = measures.risk_coverage(uncertainty, wrong)
        close(curve.risk[-1], wrong.double().mean())
        assert 0 <= curve.eaurc <= curve.aurc


@given(predictions(), st.data())
def test_metrics_over_ragged_batches_equal_the_measures(data, draw):
    probs, labels = data
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(probs)), max_size=4)))
    edges = [0, *cuts, len(probs)]
    errors, uncertainty = labels[:, 0], probs[:, 0]
    brier = measures.brier_decomposition(probs, labels)
    jaccard = measures.sample_jaccard(probs, labels, threshold=0.3).mean()
    ece = measures.calibration_error(probs, labels, n_bins=5)
    made = (
        (metrics.MultilabelCalibrationError(probs.shape[1], n_bins=5), (probs, labels), ece),
        (metrics.MultilabelBrierDecomposition(probs.shape[1]), (probs, labels), brier._asdict()),
        (metrics.SampleJaccard(threshold=0.3), (probs, labels), jaccard),
        *(
            (metric, (uncertainty, errors), expected)
            for metric, expected in (
                (metrics.AURC(), measures.risk_coverage(uncertainty, errors).aurc),
                (metrics.SpearmanCorrelation(), measures.spearman(uncertainty, errors)),
                (metrics.DetectionAUROC(), measures.auroc(uncertainty, errors)),
            )
        ),
    )
    for metric, given_, expected in made:
        for start, end in pairwise(edges):
            metric.update(*(x[start:end] for x in given_))
        torch.testing.assert_close(metric.compute(), expected, equal_nan=True)


# ------------------------------------------------------------------------------------ damaged files


def written(name, folder):
    """Writes a small data set in one of the layouts; returns the file to damage and how the set is read."""
    names = ("happy", "sad")
    if name in ("npz", "folder"):
        features, mask = torch.ones(2, 3, 2), torch.zeros(2, 3).bool()
        part = MultimodalDataset({"text": features}, {"text": mask}, torch.ones(2, 2), names)
        parts = {split: part for split in ("train", "validation", "test")}
        if name == "npz":
            write_npz(parts, folder / "x.npz")
            return folder / "x.npz", lambda: read_npz(folder / "x.npz")
        write_folder(parts, folder / "x")
        return folder / "x" / "test" / "features.text.npy", lambda: read_folder(folder / "x")
    path = folder / f"x.{name}"
    if name == "csv":
        path.write_text("id,happy,sad\na,0,1\nb,2,0.5\n")
        return path, lambda: read_label_csv(path, names)
    if name == "m3ed":
        dialogues = ("d0", "d1", "d2")
        content = [{}, {}, {}, {}, {}, {}, {}, *([each] for each in dialogues)]
        for each in dialogues:
            content[0][each], content[2][each] = ["u0", "u1"], [0, 6]
            for position in (3, 4, 5):
                content[position][each] = np.ones((2, 3))
        path.write_bytes(pickle.dumps(content))
        return path, lambda: read_m3ed(path)
    part = {"id": ["a", "b"], "tgt": [[2, 4, 3], [2, 5, 3]]}
    array = np.ones if name == "pkl" else torch.ones
    part |= {key: array((2, 3, 2)) for key in ("src-text", "src-audio", "src-visual")}
    content = {"train": part, "valid": part, "test": part}
    if name == "pkl":
        path.write_bytes(pickle.dumps(content))
        return path, lambda: read_mmsa(path, label_names=names)
    torch.save(content | {"dict": {"tgt": {"happy": 4, "sad": 5}}}, path)
    return path, lambda: read_tailor(path)


@given(
    name=st.sampled_from(["npz", "folder", "csv", "pkl", "pt", "m3ed"]),
    end=st.floats(0.2, 3),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)
def test_damaged_file_is_read_or_refused(name, end, changes):
    """Truncated, or with bytes changed, near the beginning more often than elsewhere."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, read = written(name, Path(folder))
        content = bytearray(path.read_bytes())
        content = content[: math.ceil(end * len(content))]
        for place, byte in changes:
            content[int(place**2 * len(content))] = byte
        path.write_bytes(content)
        try:
            read()
        except ValueError as error:
            message = str(error)
        else:
            message = folder
    assert folder in message  # which names the file
