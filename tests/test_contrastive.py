"""DistributionSupConLoss (Eq. 4-7) and its queue, against loops; against a deque in `test_properties.py`."""

import math
from collections import deque

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from support import (
    HALF,
    TELLS_FUNCTIONS,
    Bad,
    close,
    gradient,
    poisoned,
    random_latent,
    record_validate_args,
)
from uncertainty_mm import DiagonalGaussian, DistributionSupConLoss, EmbeddingQueue

BATCH, MODALITIES, LABELS, LATENT = 4, 2, 3, 5
WIDTH = 2 * LATENT
ROWS = BATCH * MODALITIES * LABELS
MISSING = torch.tensor([[False, False], [True, False], [False, True], [True, True]])


PAPER = {"anchors": "present", "embedding": "both"}


def build(**kwargs):
    settings = {"queue_size": 40} | PAPER | kwargs
    return DistributionSupConLoss(MODALITIES, LABELS, LATENT, **settings).double()


def random_batch(requires_grad=False, batch=BATCH, dtype=torch.float64):
    latent = random_latent(
        batch, MODALITIES, LABELS, LATENT, dtype=dtype, requires_grad=requires_grad
    )
    return latent, torch.randint(2, (batch, LABELS))


def naive_rows(latent, labels, missing=None, use_mean=True, use_std=True, plain=False):
    """[(cell, embedding, class, present)] in (B, M, Q) order without missing modalities."""
    rows = []
    batch, modalities, num_labels, _ = latent.mean.shape
    for b in range(batch):
        for m in range(modalities):
            for q in range(num_labels):
                if missing is not None and missing[b, m]:
                    continue
                halves = [latent.mean[b, m, q]] * use_mean + [latent.std[b, m, q]] * use_std
                length = (lambda x: 1) if plain else torch.Tensor.norm
                embedding = torch.cat([half.double() / length(half.double()) for half in halves])
                present = bool(labels[b, q])
                class_id = m * num_labels + q + (0 if present else modalities * num_labels)
                rows.append(((b, m, q), embedding, class_id, present))
    return rows


def naive_losses(
    rows, queued=(), anchors="present", temperature=0.07, similar=lambda x, y: torch.dot(x, y)
):
    """{cell: loss} of every anchor with a positive; `queued` holds (embedding, class) pairs."""
    keys = [(embedding, class_id) for _, embedding, class_id, _ in rows] + list(queued)
    losses = {}
    for i, (cell, embedding, class_id, present) in enumerate(rows):
        if anchors == "present" and not present:
            continue
        others = [keys[j] for j in range(len(keys)) if j != i]
        scores = [similar(embedding, key) / temperature for key, _ in others]
        positives = [s for s, (_, c) in zip(scores, others, strict=True) if c == class_id]
        if positives:
            log_total = torch.logsumexp(torch.stack(scores), 0)
            losses[cell] = sum(log_total - s for s in positives) / len(positives)
    return losses


def mean_of(losses):
    return sum(losses.values()) / len(losses)


def queued(rows):
    return [(embedding.detach(), class_id) for _, embedding, class_id, _ in rows]


def contents(loss):
    """(embeddings, classes) of the queue, oldest first."""
    size, pointer = loss.queue.classes.shape[0], int(loss.queue.pointer)
    slots = [(pointer + i) % size for i in range(size)]
    filled = [s for s in slots if loss.queue.classes[s] != -1]
    return loss.queue.rows[filled], loss.queue.classes[filled].tolist()


# ------------------------------------------------------------------------------------ the equations


@pytest.mark.parametrize("anchors", ["present", "all"])
@pytest.mark.parametrize("missing", [None, MISSING])
def test_equals_the_loops(anchors, missing):
    (latent, labels), loss = random_batch(), build(anchors=anchors)
    expected = mean_of(naive_losses(naive_rows(latent, labels, missing), anchors=anchors))
    close(loss(latent, labels, missing), expected)


def test_joint_embedding_is_that_of_a_mean_of_twice_the_size():
    latent, labels = random_batch()
    both = torch.cat(latent, dim=-1)
    alone = DiagonalGaussian(both, torch.ones_like(both))
    sizes = latent.mean.shape[1:]
    expected = DistributionSupConLoss(sizes[0], sizes[1], both.shape[-1], embedding="mean").double()
    loss = DistributionSupConLoss(*sizes).double()
    for _ in range(2):  # without and with keys in the queue
        close(loss(latent, labels), expected(alone, labels))
    close(loss.queue.rows, expected.queue.rows)


@pytest.mark.parametrize("half", ["mean", "std"])
def test_equals_the_loops_with_one_half_of_the_embedding(half):
    (latent, labels), loss = random_batch(), build(embedding=half)
    rows = naive_rows(latent, labels, use_mean=half == "mean", use_std=half == "std")
    assert loss.queue.rows.shape == (40, LATENT)
    close(loss(latent, labels), mean_of(naive_losses(rows)))


@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_equals_the_loops_at_other_temperatures(temperature):
    (latent, labels), loss = random_batch(), build(temperature=temperature)
    rows = naive_rows(latent, labels)
    close(loss(latent, labels), mean_of(naive_losses(rows, temperature=temperature)))


def test_anchors_can_be_the_present_ones():
    (latent, labels), loss = random_batch(), build(reduction="none")
    losses = naive_losses(naive_rows(latent, labels), anchors="present")
    rows = loss(latent, labels)
    assert {tuple(cell) for cell in rows.nonzero().tolist()} == set(losses)


@pytest.mark.parametrize("anchors", ["present", "all"])
def test_without_reduction_every_cell_has_its_loss(anchors):
    (latent, labels), loss = random_batch(), build(reduction="none", anchors=anchors)
    losses = naive_losses(naive_rows(latent, labels, MISSING), anchors=anchors)
    expected = torch.zeros(BATCH, MODALITIES, LABELS, dtype=torch.float64)
    for cell, value in losses.items():
        expected[cell] = value
    close(loss(latent, labels, MISSING), expected)


def test_sum_is_over_the_anchors():
    (latent, labels), loss = random_batch(), build(reduction="sum")
    close(loss(latent, labels), sum(naive_losses(naive_rows(latent, labels)).values()))


def test_queued_distributions_are_keys_of_the_next_batch():
    (first, first_labels), (second, second_labels), loss = random_batch(), random_batch(), build()
    loss(first, first_labels)
    bank = queued(naive_rows(first, first_labels))
    expected = mean_of(naive_losses(naive_rows(second, second_labels), bank))
    close(loss(second, second_labels), expected)


def test_the_oldest_distributions_leave_a_full_queue():
    loss, bank = build(queue_size=10), deque(maxlen=10)
    for _ in range(4):
        latent, labels = random_batch()
        rows = naive_rows(latent, labels)
        close(loss(latent, labels), mean_of(naive_losses(rows, bank)))
        bank.extend(queued(rows))


def test_queue_of_size_0_remembers_nothing():
    (first, first_labels), (second, second_labels) = random_batch(), random_batch()
    loss = build(queue_size=0)
    loss(first, first_labels)
    close(loss(second, second_labels), mean_of(naive_losses(naive_rows(second, second_labels))))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_labels_of_any_dtype_mean_the_same(dtype):
    latent, labels = random_batch()
    expected = mean_of(naive_losses(naive_rows(latent, labels)))
    close(build()(latent, labels.to(dtype)), expected)


def test_size_of_mean_and_std_does_not_matter():
    latent, labels = random_batch()
    scaled = DiagonalGaussian(1000 * latent.mean, 0.01 * latent.std)
    close(build()(scaled, labels), mean_of(naive_losses(naive_rows(latent, labels))))


# ---------------------------------------------------------------------------------------- distances


def distance_loss(similarity, **kwargs):
    return build(**{"embedding": "joint", "similarity": similarity} | kwargs)


def similar_by(similarity):
    """Minus the squared distance over 2K, of means and standard deviations behind each other."""

    def similar(x, y):
        total = (x[:LATENT] - y[:LATENT]).square().sum()
        x, y = x[LATENT:], y[LATENT:]
        spread = (x - y) ** 2 if similarity == "wasserstein" else x**2 + y**2
        return -(total + spread.sum()) / (2 * LATENT)

    return similar


DISTANCES = ["wasserstein", "sampled"]


@pytest.mark.parametrize("anchors", ["present", "all"])
@pytest.mark.parametrize("similarity", DISTANCES)
def test_distances_equal_the_loops(similarity, anchors):
    missing = torch.cat([MISSING, MISSING[:1], MISSING[:1]])
    unknown = torch.arange(6 * LABELS).view(6, LABELS) % 7 == 0
    loss = distance_loss(similarity, anchors=anchors, queue_size=10, temperature=0.3)
    bank = deque(maxlen=10)
    for step in range(2):
        latent, labels = random_batch(requires_grad=step == 1, batch=6)
        rows = naive_rows(latent, labels, missing, plain=True)
        rows = [row for row in rows if not unknown[row[0][0], row[0][2]]]
        expected = mean_of(naive_losses(rows, bank, anchors, 0.3, similar_by(similarity)))
        result = loss(latent, labels, missing, unknown=unknown)
        close(result, expected.detach())
        bank.extend(queued(rows))
    for a, e in zip(gradient(result, *latent), gradient(expected, *latent), strict=True):
        close(a, e)
    close(contents(loss)[0], torch.stack([row for row, _ in bank]))


@pytest.mark.parametrize("similarity", DISTANCES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_distances_pass_gradcheck(similarity, reduction):
    labels = torch.tensor([[1], [0], [1]])
    loss = DistributionSupConLoss(1, 1, 2, similarity=similarity, reduction=reduction).double()
    loss(random_latent(3, 1, 1, 2), labels)
    latent = random_latent(3, 1, 1, 2, requires_grad=True)

    def forward(*latent):
        return loss(DiagonalGaussian(*latent), labels, enqueue=False)

    assert gradcheck(forward, tuple(latent))


@pytest.mark.parametrize("bf16_products", [False, True])
@pytest.mark.parametrize("similarity", DISTANCES)
def test_distances_do_not_depend_on_where_the_means_are(similarity, bf16_products):
    settings = {"similarity": similarity, "temperature": 1.0, "bf16_products": bf16_products}
    here, there = (distance_loss(**settings) for _ in range(2))
    for _ in range(2):  # the second time with a queue
        latent, labels = random_batch()
        mean = latent.mean.float().mul(1024).round().div(1024)  # whose digits 4096 leaves alone
        result, moved = (
            loss(DiagonalGaussian(mean + shift, latent.std.float()), labels)
            for loss, shift in ((here, 0), (there, 4096))
        )
        torch.testing.assert_close(moved, result, atol=0, rtol=1e-4)


@pytest.mark.parametrize("similarity", DISTANCES)
def test_distances_see_the_size_of_the_std(similarity):
    latent, labels = random_batch()
    wide = DiagonalGaussian(latent.mean, 3 * latent.std)
    cosine, loss = build(), distance_loss(similarity, queue_size=0)
    close(cosine(latent, labels, enqueue=False), cosine(wide, labels, enqueue=False))
    assert (loss(latent, labels) - loss(wide, labels)).abs() > 0.01


@pytest.mark.parametrize("similarity", DISTANCES)
def test_equal_stds_and_means_of_one_length_are_a_cosine(similarity):
    (latent, labels), cosine = random_batch(), build(embedding="mean")
    length = latent.mean.norm(dim=-1, keepdim=True) / LATENT**0.5
    even = DiagonalGaussian(latent.mean / length, torch.full_like(latent.std, 0.7))
    for _ in range(2):
        close(distance_loss(similarity)(even, labels), cosine(even, labels, enqueue=False))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("similarity", DISTANCES)
def test_distances_of_half_precision_are_finite_at_its_limits(similarity, dtype):
    loss = distance_loss(similarity).to(dtype)
    for size in (1.0, 6e4):
        latent, labels = random_batch(dtype=dtype)
        latent = DiagonalGaussian(*((size * x.clamp(-1, 1)).requires_grad_() for x in latent))
        result = loss(latent, labels)
        assert result.isfinite()
        assert all(x.isfinite().all() for x in gradient(result, *latent))
        assert result.dtype == torch.float32


@pytest.mark.parametrize("similarity", DISTANCES)
def test_distances_of_huge_numbers_are_finite_and_leave_the_queue_usable(similarity):
    loss = distance_loss(similarity).float()
    for size in (1.0, 1e20, torch.finfo(torch.float32).max, 1.0):
        latent, labels = random_batch(dtype=torch.float32)
        latent = DiagonalGaussian(*((size * x.clamp(-1, 1)).requires_grad_() for x in latent))
        result = loss(latent, labels)
        assert result.isfinite()
        assert all(x.isfinite().all() for x in gradient(result, *latent))
    unseen = distance_loss(similarity, validate_args=False).float()
    unseen(DiagonalGaussian(torch.full_like(latent.mean, math.inf), latent.std), labels)
    assert unseen.queue.length == 0


@pytest.mark.parametrize("similarity", DISTANCES)
def test_distances_in_bfloat16_products_keep_the_squares(similarity):
    batches = [random_batch() for _ in range(2)]
    exact, rounded = (distance_loss(similarity, bf16_products=x) for x in (False, True))
    for latent, labels in batches:
        far = DiagonalGaussian(latent.mean + 3, latent.std)
        a, b = (
            loss.float()(DiagonalGaussian(*(x.float() for x in far)), labels)
            for loss in (exact, rounded)
        )
        close(b, a, torch.bfloat16)


def test_nothing_without_anchors_in_a_distance():
    latent, _ = random_batch(requires_grad=True)
    for bf16_products in (False, True):
        loss = distance_loss("wasserstein", bf16_products=bf16_products)
        value = loss(latent, torch.zeros(BATCH, LABELS))
        assert value == 0
        assert all((x == 0).all() for x in gradient(value, *latent))


# ---------------------------------------------------------------------------------------- gradients


def test_gradient_equals_that_of_the_loops():
    (latent, labels), loss = random_batch(requires_grad=True), build()
    other, other_labels = random_batch()
    loss(other, other_labels)
    bank = queued(naive_rows(other, other_labels))
    expected = mean_of(naive_losses(naive_rows(latent, labels, MISSING), bank))
    actual = gradient(loss(latent, labels, MISSING), *latent)
    for a, e in zip(actual, gradient(expected, *latent), strict=True):
        close(a, e)


def test_passes_gradcheck():
    loss, labels = build(temperature=0.5), torch.randint(2, (2, LABELS))
    loss(*random_batch())
    latent = random_latent(2, MODALITIES, LABELS, LATENT, requires_grad=True)

    def forward(mean, std):
        return loss(DiagonalGaussian(mean, std), labels, enqueue=False)

    assert gradcheck(forward, tuple(latent))


def test_two_forwards_before_the_backwards_give_the_sum_of_gradients():
    loss, batches = build(queue_size=7), [random_batch(requires_grad=True) for _ in range(2)]
    bank = deque(maxlen=7)
    total, expected = 0.0, 0.0
    for latent, labels in batches:
        rows = naive_rows(latent, labels)
        total = total + loss(latent, labels)
        expected = expected + mean_of(naive_losses(rows, bank))
        bank.extend(queued(rows))
    leaves = [x for latent, _ in batches for x in latent]
    for a, e in zip(gradient(total, *leaves), gradient(expected, *leaves), strict=True):
        close(a, e)


def test_queue_holds_no_graph():
    loss = build()
    loss(*random_batch(requires_grad=True))
    assert not loss.queue.rows.requires_grad
    assert loss.queue.rows.grad_fn is None


def test_without_anchors_the_loss_is_zero_with_zero_gradient():
    (latent, _), loss = random_batch(requires_grad=True), build()
    value = loss(latent, torch.zeros(BATCH, LABELS, dtype=torch.long))
    value.backward()
    assert value == 0
    assert all((x.grad == 0).all() for x in latent)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_with_everything_missing_the_loss_is_zero_with_zero_gradient(reduction):
    (latent, labels), loss = random_batch(requires_grad=True), build(reduction=reduction)
    value = loss(latent, labels, torch.ones(BATCH, MODALITIES, dtype=torch.bool))
    value.sum().backward()
    assert (value == 0).all()
    assert all((x.grad == 0).all() for x in latent)


def test_without_samples_the_loss_is_zero():
    (latent, labels), loss = random_batch(batch=0, requires_grad=True), build()
    value = loss(latent, labels)
    value.backward()
    assert value == 0
    assert int(loss.queue.length) == 0


# -------------------------------------------------------------------------------- missing modalities


def test_missing_modality_equals_a_model_without_it():
    (latent, labels), (other, other_labels) = random_batch(requires_grad=True), random_batch()
    missing = torch.tensor([[False, True]] * BATCH)
    loss = build()
    smaller = DistributionSupConLoss(1, LABELS, LATENT, queue_size=40, **PAPER).double()
    loss(other, other_labels, missing)
    smaller(DiagonalGaussian(*(x[:, :1] for x in other)), other_labels)
    actual = loss(latent, labels, missing)
    expected = smaller(DiagonalGaussian(*(x[:, :1] for x in latent)), labels)
    close(actual, expected.detach())
    for a, e in zip(gradient(actual, *latent), gradient(expected, *latent), strict=True):
        close(a, e)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_missing_modality_does_not_influence_the_loss_or_the_queue(value):
    (latent, labels), loss = random_batch(), build()
    dirty = DiagonalGaussian(*(poisoned(x, MISSING, value).requires_grad_() for x in latent))
    rows = naive_rows(latent, labels, MISSING)
    result = loss(dirty, labels, MISSING)
    close(result, mean_of(naive_losses(rows)))
    assert loss.queue.rows.isfinite().all()
    for grad in gradient(result, *dirty):
        assert grad.isfinite().all()
        assert (grad[MISSING] == 0).all()
        assert (grad[~MISSING] != 0).any()


# --------------------------------------------------------------------------------------- the queue


@pytest.mark.parametrize("sizes", [(MODALITIES, LABELS), (LABELS, MODALITIES)])
@pytest.mark.parametrize("settings", [{"similarity": "sampled"}, {}, {"embedding": "both"}])
def test_queue_of_another_meaning_does_not_load(settings, sizes):
    source = DistributionSupConLoss(*sizes, LATENT, queue_size=8, similarity="wasserstein")
    source(random_latent(2, *sizes, LATENT), torch.ones(2, sizes[1]))
    loss = DistributionSupConLoss(MODALITIES, LABELS, LATENT, queue_size=8, **settings)
    if "similarity" in settings and sizes == (MODALITIES, LABELS):  # the same rows
        loss.load_state_dict(source.state_dict())
        assert torch.equal(loss.queue.rows, source.queue.rows)
        return
    own = "'wasserstein' or 'sampled'" if settings.get("similarity") else "'cosine'"
    words = rf"Expected `queue.meaning` to be similarity {own}.*, but got similarity 'wasserstein' "
    for options in ({}, {"strict": False}, {"assign": True}):
        with pytest.raises(RuntimeError, match=words):
            loss.load_state_dict(source.state_dict(), **options)
        assert loss.queue.length == 0


def test_defaults_are_those_of_the_contract():
    assert repr(DistributionSupConLoss(MODALITIES, LABELS, LATENT)) == (
        f"DistributionSupConLoss(\n  num_modalities={MODALITIES}, num_labels={LABELS}, latent_dim={LATENT}, "
        "temperature=0.07, anchors='all', embedding='joint', similarity='cosine', reduction='mean', "
        "gather=False, bf16_products=False\n"
        "  (queue): EmbeddingQueue(size=8192, dim=10)\n)"
    )


def test_queue_starts_empty():
    loss = DistributionSupConLoss(MODALITIES, LABELS, LATENT)
    assert loss.queue.rows.shape == (8192, WIDTH)
    assert loss.queue.classes.dtype == torch.int64
    assert (loss.queue.classes == -1).all()
    assert loss.queue.pointer.shape == ()
    assert int(loss.queue.pointer) == 0
    assert int(loss.queue.length) == 0


def test_rows_are_queued_in_the_order_sample_modality_label():
    (latent, labels), loss = random_batch(), build()
    loss(latent, labels)
    rows = naive_rows(latent, labels)
    close(loss.queue.rows[:ROWS], torch.stack([embedding for _, embedding, _, _ in rows]))
    assert loss.queue.classes[:ROWS].tolist() == [class_id for _, _, class_id, _ in rows]
    assert int(loss.queue.pointer) == ROWS


def test_missing_modalities_are_not_queued():
    (latent, labels), loss = random_batch(), build()
    loss(latent, labels, MISSING)
    rows = naive_rows(latent, labels, MISSING)
    embeddings, classes = contents(loss)
    close(embeddings, torch.stack([embedding for _, embedding, _, _ in rows]))
    assert classes == [class_id for _, _, class_id, _ in rows]


def test_wholly_missing_batch_leaves_a_full_queue_alone():
    (latent, labels), loss = random_batch(), build(queue_size=7)
    loss(*random_batch())
    before = {name: state.clone() for name, state in loss.state_dict().items()}
    loss(latent, labels, torch.ones(BATCH, MODALITIES, dtype=torch.bool))
    assert all(torch.equal(state, before[name]) for name, state in loss.state_dict().items())


def test_a_single_row_is_queued():
    loss = DistributionSupConLoss(2, 1, LATENT, queue_size=4, **PAPER).double()
    latent = random_latent(1, 2, 1, LATENT)
    loss(latent, torch.ones(1, 1), torch.tensor([[True, False]]))
    close(loss.queue.rows[0], naive_rows(latent, torch.ones(1, 1))[1][1])
    assert loss.queue.classes.tolist() == [1, -1, -1, -1]
    assert int(loss.queue.pointer) == 1


def test_newest_rows_of_a_batch_larger_than_the_queue_are_kept():
    (latent, labels), loss = random_batch(), build(queue_size=7)
    loss(latent, labels)
    rows = naive_rows(latent, labels)[-7:]
    embeddings, classes = contents(loss)
    close(embeddings, torch.stack([embedding for _, embedding, _, _ in rows]))
    assert classes == [class_id for _, _, class_id, _ in rows]


@pytest.mark.parametrize(("training", "length"), [(True, ROWS), (False, 0)])
def test_queue_fills_in_training_only(training, length):
    loss = build().train(training)
    loss(*random_batch())
    assert int(loss.queue.length) == length


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("enqueue", "length"), [(True, ROWS), (False, 0)])
def test_enqueue_overrides_the_mode(training, enqueue, length):
    loss = build().train(training)
    loss(*random_batch(), enqueue=enqueue)
    assert int(loss.queue.length) == length


def test_queue_is_read_in_evaluation_too():
    (first, first_labels), (second, second_labels), loss = random_batch(), random_batch(), build()
    loss(first, first_labels)
    loss.eval()
    bank = queued(naive_rows(first, first_labels))
    expected = mean_of(naive_losses(naive_rows(second, second_labels), bank))
    close(loss(second, second_labels), expected)


def test_reset_empties_the_queue():
    loss, (latent, labels) = build(), random_batch()
    loss(*random_batch())
    loss.queue.reset()
    assert int(loss.queue.length) == 0
    assert int(loss.queue.pointer) == 0
    close(loss(latent, labels), mean_of(naive_losses(naive_rows(latent, labels))))


def test_gather_without_a_process_group_changes_nothing():
    (latent, labels), loss = random_batch(), build(gather=True)
    close(loss(latent, labels), mean_of(naive_losses(naive_rows(latent, labels))))


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_near_float64(dtype):
    loss = build().float()
    (first, first_labels), (second, second_labels) = (
        random_batch(dtype=dtype),
        random_batch(dtype=dtype),
    )
    loss(first, first_labels)
    bank = queued(naive_rows(first, first_labels))
    result = loss(second, second_labels)
    assert result.dtype == torch.float32  # from the normalisation on
    close(result, mean_of(naive_losses(naive_rows(second, second_labels), bank)))


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_computes_in_float32(dtype):
    loss = build().float()
    latent, labels = random_batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        result = loss(latent, labels)
    assert result.dtype == torch.float32
    close(result, mean_of(naive_losses(naive_rows(latent, labels))))


def test_module_of_half_precision_still_computes_in_float32():
    loss, (latent, labels) = build().half(), random_batch(dtype=torch.float16)
    result = loss(latent, labels)
    assert result.dtype == torch.float32
    assert result.isfinite()


# --------------------------------------------------------------------------------------- bad inputs

SIZES = {"num_modalities": MODALITIES, "num_labels": LABELS, "latent_dim": LATENT}
PRESENT = torch.ones(BATCH, LABELS)


def made(**change):
    return lambda _: DistributionSupConLoss(**(SIZES | change))


def called(labels=PRESENT, missing=None, mean=None, std=None, **options):
    """A call with one argument changed."""
    latent = random_latent(BATCH, MODALITIES, LABELS, LATENT)
    latent = DiagonalGaussian(
        latent.mean if mean is None else mean(latent.mean),
        latent.std if std is None else std(latent.std),
    )
    return lambda loss: loss(latent, labels, missing, **options)


def spoilt(value):
    return lambda x: poisoned(x, (0, 0, 0, 0), value)


def loading(**change):
    state = DistributionSupConLoss(**SIZES, queue_size=20).state_dict() | change
    kept = {name: value for name, value in state.items() if value is not None}
    return lambda loss: loss.load_state_dict(kept)


def entering(rows, classes):
    return lambda loss: loss.queue.enqueue(rows, classes)


WHOLE, NO = "to be a positive integer, but got", torch.zeros
ROWS_2, CLASSES_2 = torch.ones(2, WIDTH), torch.tensor([0, 1])
BAD = [
    Bad("no modality", made(num_modalities=0), ValueError, f"`num_modalities` {WHOLE} 0"),
    Bad("labels negative", made(num_labels=-1), ValueError, f"`num_labels` {WHOLE} -1"),
    Bad("dimensions float", made(latent_dim=2.0), TypeError, f"`latent_dim` {WHOLE} 2.0"),
    Bad("queue negative", made(queue_size=-1), ValueError, f"`queue_size` {WHOLE} -1"),
    Bad("queue False", made(queue_size=False), TypeError, f"`queue_size` {WHOLE} False"),
    Bad("queue a fraction", made(queue_size=0.5), TypeError, f"`queue_size` {WHOLE} 0.5"),
    Bad("temperature 0", made(temperature=0.0), ValueError, "`temperature` .* above 0, but got 0"),
    Bad("temperature nan", made(temperature=math.nan), ValueError, "`temperature` .* but got nan"),
    Bad("temperature a word", made(temperature="1"), TypeError, "`temperature` .* but got '1'"),
    Bad("anchors", made(anchors="absent"), ValueError, r"`anchors` .* \['all', 'present'\], but"),
    Bad("embedding", made(embedding="std_mean"), ValueError, "`embedding` .* but got 'std_mean'"),
    Bad("similarity", made(similarity="dot"), ValueError, "`similarity` .* but got 'dot'"),
    Bad(
        "embedding of a distance",
        made(similarity="sampled", embedding="both"),
        ValueError,
        "`embedding` to be left alone with `similarity` = 'sampled', .* but got 'both'",
    ),
    Bad("reduction", made(reduction=None), ValueError, "`reduction` .* but got None"),
    Bad("gather a word", made(gather="yes"), TypeError, "`gather` to be True or False"),
    Bad("group a number", made(process_group=3), TypeError, "`process_group` .* but got 3"),
    Bad("largest batch 0", made(max_batch_size=0), ValueError, f"`max_batch_size` {WHOLE} 0"),
    Bad("largest batch 8.0", made(max_batch_size=8.0), TypeError, f"`max_batch_size` {WHOLE} 8.0"),
    Bad("bf16_products 1", made(bf16_products=1), TypeError, "`bf16_products` to be True or False"),
    Bad(
        "validate_args 1", made(validate_args=1), TypeError, "`validate_args` to be True, False or"
    ),
    Bad("size of a queue", lambda _: EmbeddingQueue(-1, 2), ValueError, f"`size` {WHOLE} -1"),
    Bad("rows without width", lambda _: EmbeddingQueue(4, 0), ValueError, f"`dim` {WHOLE} 0"),
    Bad(
        "latent a tuple", lambda loss: loss((PRESENT,) * 2, PRESENT), TypeError, "`latent` .* tuple"
    ),
    Bad("mean short", called(mean=lambda x: x[..., 1:]), ValueError, r"`latent\.mean` .* K=5"),
    Bad("mean flat", called(mean=lambda x: x[:, 0]), ValueError, r"`latent\.mean` to have shape"),
    Bad("mean of more labels", called(mean=lambda x: x.repeat(1, 1, 2, 1)), ValueError, "Q=3, K"),
    Bad("std short", called(std=lambda x: x[..., 1:]), ValueError, r"`latent\.std` to have shape"),
    Bad("mean nan", called(mean=spoilt(math.nan)), ValueError, r"`latent\.mean` to be finite"),
    Bad("std infinite", called(std=spoilt(math.inf)), ValueError, r"`latent\.std` to be finite"),
    Bad("std negative", called(std=spoilt(-0.5)), ValueError, r"`latent\.std` .* but got -0.5"),
    Bad(
        "std elsewhere",
        called(std=lambda x: x.to("meta")),
        ValueError,
        r"`latent\.std` to be on cpu",
    ),
    Bad("a label of 2", called(2 * PRESENT), ValueError, "`labels` .* only 0 and 1, but got 2"),
    Bad("a label of -1", called(-PRESENT), ValueError, "but got -1.0; mark a label .* `unknown`"),
    Bad("a label of 0.5", called(PRESENT / 2), ValueError, "`labels` .* but got 0.5"),
    Bad("a label of nan", called(PRESENT * math.nan), ValueError, "but got nan; mark .* `unknown`"),
    Bad("complex labels", called(PRESENT + 0j), TypeError, "`labels` to have a number dtype"),
    Bad("labels a list", called([[0, 1, 0]] * BATCH), TypeError, "`labels` to be a tensor"),
    Bad("labels of another batch", called(PRESENT[1:]), ValueError, r"`labels` .* \(3, 3\)"),
    Bad("labels of one class", called(PRESENT[:, 0]), ValueError, r"`labels` .* got \(4,\)"),
    Bad("labels elsewhere", called(PRESENT.to("meta")), ValueError, "`labels` to be on cpu"),
    Bad(
        "missing of numbers", called(missing=NO(4, 2)), TypeError, "`missing` to have a bool dtype"
    ),
    Bad(
        "missing of labels", called(missing=NO(4, 3).bool()), ValueError, "`missing` to have shape"
    ),
    Bad(
        "unknown of numbers", called(unknown=NO(4, 3)), TypeError, "`unknown` to have a bool dtype"
    ),
    Bad("unknown of modalities", called(unknown=NO(4, 2).bool()), ValueError, "`unknown` .* Q=3"),
    Bad("enqueue a word", called(enqueue="no"), TypeError, "`enqueue` to be True or False"),
    Bad("rows too wide", entering(torch.ones(2, 11), CLASSES_2), ValueError, "`rows` .* E=10"),
    Bad(
        "rows of integers",
        entering(ROWS_2.int(), CLASSES_2),
        TypeError,
        "`rows` to have a floating",
    ),
    Bad("rows nan", entering(ROWS_2 * math.nan, CLASSES_2), ValueError, "`rows` to be finite"),
    Bad(
        "rows elsewhere", entering(ROWS_2.to("meta"), CLASSES_2), ValueError, "`rows` to be on cpu"
    ),
    Bad(
        "classes of floats",
        entering(ROWS_2, ROWS_2[:, 0]),
        TypeError,
        "`classes` to have an integer",
    ),
    Bad(
        "classes too many",
        entering(ROWS_2, torch.arange(3)),
        ValueError,
        r"`classes` to have shape \(N=2\)",
    ),
    Bad("state with a list", loading(**{"queue.classes": [0] * 20}), RuntimeError, "but got list"),
]


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_refused_call_changes_nothing(bad):
    loss = DistributionSupConLoss(**SIZES, queue_size=20)
    for _ in range(2):
        loss(*random_batch(dtype=torch.float32))
    before = {name: x.clone() for name, x in loss.state_dict().items()}
    with pytest.raises(bad.error, match=bad.message):
        bad.call(loss)
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())


def test_rejects_latent_on_another_device_than_the_queue():
    latent, labels = random_batch()
    latent = DiagonalGaussian(*(x.to("meta") for x in latent))
    with pytest.raises(ValueError, match="`latent` to be on cpu, but got meta"):
        build()(latent, labels.to("meta"))


def test_rejects_a_batch_larger_than_the_largest():
    build(max_batch_size=BATCH)(*random_batch())
    with pytest.raises(
        ValueError, match=f"`max_batch_size` = {BATCH - 1} samples, but got {BATCH}"
    ):
        build(max_batch_size=BATCH - 1)(*random_batch())


@pytest.mark.parametrize("settings", [{}, {"validate_args": False}, {"validate_args": True}])
def test_validate_args_is_passed_on(monkeypatch, settings):
    passed = record_validate_args(monkeypatch)
    build(**settings)(*random_batch())
    assert passed == [settings.get("validate_args")] * 2  # of latent and labels


# ----------------------------------------------------------------------------------- unknown labels


@pytest.mark.parametrize("wrong", [math.nan, -1.0, 1.0])
@pytest.mark.parametrize("anchors", ["all", "present"])
def test_unknown_labels_are_as_if_their_distributions_were_not_there(anchors, wrong):
    unknown = torch.tensor([[True, False, False], [False, True, True], [True] * 3, [False] * 3])
    loss, (latent, labels) = build(anchors=anchors), random_batch(requires_grad=True)
    other, other_labels = random_batch()
    loss(other, other_labels, unknown=unknown)
    left_out = unknown.unsqueeze(1).expand(BATCH, MODALITIES, LABELS)
    bank = [x for x in naive_rows(other, other_labels) if not left_out[x[0]]]
    rows = [x for x in naive_rows(latent, labels, MISSING) if not left_out[x[0]]]
    expected = mean_of(naive_losses(rows, queued(bank), anchors))
    result = loss(latent, poisoned(labels.double(), unknown, wrong), MISSING, unknown=unknown)
    close(result, expected.detach())
    for a, e in zip(gradient(result, *latent), gradient(expected, *latent), strict=True):
        close(a, e)
        assert (a[left_out] == 0).all()
    assert contents(loss)[1] == [x[2] for x in (bank + rows)[-40:]]


def test_unknown_labels_give_zero_without_reduction():
    unknown = torch.rand(BATCH, LABELS) < 0.5
    (latent, labels), loss = random_batch(), build(reduction="none", anchors="all")
    rows = loss(latent, labels, unknown=unknown)
    assert (rows.transpose(0, 1)[:, unknown] == 0).all()


@pytest.mark.parametrize("wrong", [0.3, math.nan, -1.0])
def test_a_label_that_nobody_looks_at_is_present_above_one_half(wrong):
    latent, labels = random_batch()
    loss = build(validate_args=False)
    soft = torch.where(labels > 0, 0.7, wrong)
    close(loss(latent, soft), mean_of(naive_losses(naive_rows(latent, labels))))


# -------------------------------------------------------------------------------- state and its ways


def numbers(loss):
    return {name: x.tolist() for name, x in loss.state_dict().items()}


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_does_not_enter_unseen(wrong):
    latent, labels = random_batch()
    loss = build(validate_args=False)
    loss(latent._replace(mean=spoilt(wrong)(latent.mean)), labels)
    rows = naive_rows(latent, labels)[1:]
    embeddings, classes = contents(loss)
    close(embeddings, torch.stack([embedding for _, embedding, _, _ in rows]))
    assert classes == [class_id for _, _, class_id, _ in rows]
    assert loss(*random_batch()).isfinite()


def test_rows_beyond_half_precision_do_not_enter_it():
    queue = EmbeddingQueue(4, 1).half()
    queue.enqueue(torch.tensor([[1e6], [2.0]]), torch.tensor([0, 1]))
    assert queue.classes.tolist() == [1, -1, -1, -1]


def test_enqueue_is_what_a_forward_pass_does():
    loss, twin = build(queue_size=10), build(queue_size=10)
    for _ in range(3):
        latent, labels = random_batch()
        unknown = torch.rand(BATCH, LABELS) < 0.3
        loss(latent, labels, MISSING, unknown=unknown)
        twin(latent, labels, MISSING, unknown=unknown, enqueue=False)
        twin.enqueue(latent, labels, MISSING, unknown)
        assert numbers(loss) == numbers(twin)


# ---------------------------------------------------------------------------- gradient checkpointing


def steps(loss, batches, checkpointed=None, enqueue=None):
    """Loss and gradients of each batch; `checkpointed` is `use_reentrant`, or None for none."""
    results = []
    for latent, labels in batches:

        def step(mean, std, labels=labels):
            value = loss(DiagonalGaussian(mean * 2, std * 2), labels, enqueue=enqueue)
            return value * value

        leaves = [x.detach().requires_grad_() for x in latent]
        value = (
            step(*leaves)
            if checkpointed is None
            else checkpoint(step, *leaves, use_reentrant=checkpointed)
        )
        if enqueue is False:
            loss.enqueue(latent, labels)
        value.backward()
        results += [value.detach(), *(x.grad for x in leaves)]
    return results


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("enqueue", [None, False])
@pytest.mark.parametrize("queue_size", [0, 7, 40])
@pytest.mark.parametrize("same", [False, True])
def test_recomputation_sees_the_queue_as_it_was(use_reentrant, enqueue, queue_size, same):
    if same and not TELLS_FUNCTIONS:
        pytest.skip("torch does not tell a checkpointed pass from a plain one")
    loss, twin = build(queue_size=queue_size), build(queue_size=queue_size)
    batches = [random_batch() for _ in range(4)]
    batches = [batches[0]] * 4 if same else batches
    steps(loss, batches[:2]), steps(twin, batches[:2])
    actual = steps(loss, batches[2:], use_reentrant, enqueue)
    assert all(map(torch.equal, actual, steps(twin, batches[2:])))
    assert numbers(loss) == numbers(twin)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_without_the_queue_it_saw_is_an_error(use_reentrant):
    loss, total = build(), 0
    for _ in range(2):
        latent, labels = random_batch(requires_grad=True)

        def step(*leaves, labels=labels):
            return loss(DiagonalGaussian(*(2 * x for x in leaves)), labels, enqueue=False)

        total = total + checkpoint(step, *latent, use_reentrant=use_reentrant)
        loss.enqueue(latent, labels)
    with pytest.raises(RuntimeError, match="outside the checkpointed function"):
        total.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputations_of_several_passes_over_one_queue(use_reentrant):
    loss, twin = build(), build()
    batches = [random_batch() for _ in range(3)]
    results = []
    for module, reentrant in ((loss, use_reentrant), (twin, None)):
        leaves = [x.detach().requires_grad_() for latent, _ in batches for x in latent]
        total = 0
        for i, (_, labels) in enumerate(batches):

            def step(*pair, labels=labels, module=module):
                return module(DiagonalGaussian(*(2 * x for x in pair)), labels, enqueue=False)

            pair = leaves[2 * i : 2 * i + 2]
            value = (
                step(*pair)
                if reentrant is None
                else checkpoint(step, *pair, use_reentrant=reentrant)
            )
            total = total + value
        total.backward()
        results.append([total.detach(), *(x.grad for x in leaves)])
    assert all(map(torch.equal, *results))


def test_compiled_loss_in_a_checkpointed_function_is_an_error():
    loss, (latent, labels) = build(), random_batch(requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *x: loss(DiagonalGaussian(*x), labels), fullgraph=True, backend="aot_eager"
    )
    value = checkpoint(compiled, *latent, use_reentrant=False)
    with pytest.raises(RuntimeError, match="a compiled loss in any case"):
        value.backward()
    torch.compiler.reset()
