"""DistributionSupConLoss (Eq. 4-7) and its queue, against loops; against a deque in `test_properties.py`."""

import math
from collections import deque

import pytest
import torch
from torch.autograd import gradcheck

from support import HALF, close, gradient, poisoned, random_latent, record_validate_args
from uncertainty_mm import DiagonalGaussian, DistributionSupConLoss

BATCH, MODALITIES, LABELS, LATENT = 4, 2, 3, 5
WIDTH = 2 * LATENT
ROWS = BATCH * MODALITIES * LABELS
MISSING = torch.tensor([[False, False], [True, False], [False, True], [True, True]])


def build(**kwargs):
    loss = DistributionSupConLoss(MODALITIES, LABELS, LATENT, **({"queue_size": 40} | kwargs))
    return loss.double()


def random_batch(requires_grad=False, batch=BATCH, dtype=torch.float64):
    latent = random_latent(
        batch, MODALITIES, LABELS, LATENT, dtype=dtype, requires_grad=requires_grad
    )
    return latent, torch.randint(2, (batch, LABELS))


def naive_rows(latent, labels, missing=None, use_mean=True, use_std=True):
    """[(cell, embedding, class, present)] in (B, M, Q) order without missing modalities."""
    rows = []
    batch, modalities, num_labels, _ = latent.mean.shape
    for b in range(batch):
        for m in range(modalities):
            for q in range(num_labels):
                if missing is not None and missing[b, m]:
                    continue
                halves = [latent.mean[b, m, q]] * use_mean + [latent.std[b, m, q]] * use_std
                embedding = torch.cat([half.double() / half.double().norm() for half in halves])
                present = bool(labels[b, q])
                class_id = m * num_labels + q + (0 if present else modalities * num_labels)
                rows.append(((b, m, q), embedding, class_id, present))
    return rows


def naive_losses(rows, queued=(), anchors="present", temperature=0.07):
    """{cell: loss} of every anchor with a positive; `queued` holds (embedding, class) pairs."""
    keys = [(embedding, class_id) for _, embedding, class_id, _ in rows] + list(queued)
    losses = {}
    for i, (cell, embedding, class_id, present) in enumerate(rows):
        if anchors == "present" and not present:
            continue
        others = [keys[j] for j in range(len(keys)) if j != i]
        scores = [torch.dot(embedding, key) / temperature for key, _ in others]
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
    size, pointer = loss.queue_classes.shape[0], int(loss.queue_pointer)
    slots = [(pointer + i) % size for i in range(size)]
    filled = [s for s in slots if loss.queue_classes[s] != -1]
    return loss.queue[filled], loss.queue_classes[filled].tolist()


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
    expected = DistributionSupConLoss(sizes[0], sizes[1], both.shape[-1], use_std=False).double()
    loss = DistributionSupConLoss(*sizes, joint=True).double()
    for _ in range(2):  # without and with keys in the queue
        close(loss(latent, labels), expected(alone, labels))
    close(loss.queue, expected.queue)


@pytest.mark.parametrize(("use_mean", "use_std"), [(True, False), (False, True)])
def test_equals_the_loops_with_one_half_of_the_embedding(use_mean, use_std):
    (latent, labels), loss = random_batch(), build(use_mean=use_mean, use_std=use_std)
    rows = naive_rows(latent, labels, use_mean=use_mean, use_std=use_std)
    assert loss.queue.shape == (40, LATENT)
    close(loss(latent, labels), mean_of(naive_losses(rows)))


@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_equals_the_loops_at_other_temperatures(temperature):
    (latent, labels), loss = random_batch(), build(temperature=temperature)
    rows = naive_rows(latent, labels)
    close(loss(latent, labels), mean_of(naive_losses(rows, temperature=temperature)))


def test_anchors_are_the_present_ones_by_default():
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
    assert not loss.queue.requires_grad
    assert loss.queue.grad_fn is None


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
    assert int(loss.queue_length) == 0


# -------------------------------------------------------------------------------- missing modalities


def test_missing_modality_equals_a_model_without_it():
    (latent, labels), (other, other_labels) = random_batch(requires_grad=True), random_batch()
    missing = torch.tensor([[False, True]] * BATCH)
    loss = build()
    smaller = DistributionSupConLoss(1, LABELS, LATENT, queue_size=40).double()
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
    assert loss.queue.isfinite().all()
    for grad in gradient(result, *dirty):
        assert grad.isfinite().all()
        assert (grad[MISSING] == 0).all()
        assert (grad[~MISSING] != 0).any()


# --------------------------------------------------------------------------------------- the queue


def test_defaults_are_those_of_the_contract():
    assert repr(DistributionSupConLoss(MODALITIES, LABELS, LATENT)) == (
        "DistributionSupConLoss(queue_size=8192, temperature=0.07, anchors='present', use_mean=True, "
        "use_std=True, joint=False, reduction='mean', gather=False, max_batch_size=None, "
        "bf16_products=False)"
    )


def test_queue_starts_empty():
    loss = DistributionSupConLoss(MODALITIES, LABELS, LATENT)
    assert loss.queue.shape == (8192, WIDTH)
    assert loss.queue_classes.dtype == torch.int64
    assert (loss.queue_classes == -1).all()
    assert loss.queue_pointer.shape == ()
    assert int(loss.queue_pointer) == 0
    assert int(loss.queue_length) == 0


def test_rows_are_queued_in_the_order_sample_modality_label():
    (latent, labels), loss = random_batch(), build()
    loss(latent, labels)
    rows = naive_rows(latent, labels)
    close(loss.queue[:ROWS], torch.stack([embedding for _, embedding, _, _ in rows]))
    assert loss.queue_classes[:ROWS].tolist() == [class_id for _, _, class_id, _ in rows]
    assert int(loss.queue_pointer) == ROWS


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
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    loss(latent, labels, torch.ones(BATCH, MODALITIES, dtype=torch.bool))
    assert all(torch.equal(buffer, before[name]) for name, buffer in loss.named_buffers())


def test_a_single_row_is_queued():
    loss = DistributionSupConLoss(2, 1, LATENT, queue_size=4).double()
    latent = random_latent(1, 2, 1, LATENT)
    loss(latent, torch.ones(1, 1), torch.tensor([[True, False]]))
    close(loss.queue[0], naive_rows(latent, torch.ones(1, 1))[1][1])
    assert loss.queue_classes.tolist() == [1, -1, -1, -1]
    assert int(loss.queue_pointer) == 1


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
    assert int(loss.queue_length) == length


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("enqueue", "length"), [(True, ROWS), (False, 0)])
def test_enqueue_overrides_the_mode(training, enqueue, length):
    loss = build().train(training)
    loss(*random_batch(), enqueue=enqueue)
    assert int(loss.queue_length) == length


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
    loss.reset_queue()
    assert int(loss.queue_length) == 0
    assert int(loss.queue_pointer) == 0
    close(loss(latent, labels), mean_of(naive_losses(naive_rows(latent, labels))))


def test_state_dict_resumes_mid_stream_to_the_bit():
    loss, fresh = build(queue_size=10), build(queue_size=10)
    for _ in range(3):
        loss(*random_batch())
    fresh.load_state_dict(loss.state_dict())
    for _ in range(3):
        batch = random_batch()
        assert torch.equal(fresh(*batch), loss(*batch))
    assert torch.equal(fresh.queue, loss.queue)


def test_gather_without_a_process_group_changes_nothing():
    (latent, labels), loss = random_batch(), build(gather=True)
    close(loss(latent, labels), mean_of(naive_losses(naive_rows(latent, labels))))


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_near_float64(dtype):
    loss = DistributionSupConLoss(MODALITIES, LABELS, LATENT, queue_size=40)
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
    loss = DistributionSupConLoss(MODALITIES, LABELS, LATENT, queue_size=40)
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


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"num_modalities": 0}, ValueError, "num_modalities"),
        ({"num_labels": -1}, ValueError, "num_labels"),
        ({"latent_dim": 2.0}, TypeError, "latent_dim"),
        ({"queue_size": -1}, ValueError, "queue_size"),
        ({"queue_size": 1.5}, TypeError, "queue_size"),
        ({"queue_size": False}, TypeError, "queue_size"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": "0.07"}, TypeError, "temperature"),
        ({"anchors": "absent"}, ValueError, "anchors"),
        ({"use_mean": 1}, TypeError, "use_mean"),
        ({"use_std": 1}, TypeError, "use_std"),
        ({"joint": 1}, TypeError, "joint"),
        ({"gather": "yes"}, TypeError, "gather"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size"),
        ({"max_batch_size": 8.0}, TypeError, "max_batch_size"),
        ({"reduction": "avg"}, ValueError, "reduction"),
        ({"use_mean": False, "use_std": False}, ValueError, "use_mean"),
    ],
)
def test_constructor_rejects(change, error, name):
    arguments = {"num_modalities": 2, "num_labels": 3, "latent_dim": 4}
    with pytest.raises(error, match=f"`{name}`"):
        DistributionSupConLoss(**(arguments | change))


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (torch.zeros(BATCH, LABELS + 1, dtype=torch.long), ValueError),
        (torch.zeros(BATCH + 1, LABELS, dtype=torch.long), ValueError),
        (torch.zeros(BATCH, dtype=torch.long), ValueError),
        (torch.full((BATCH, LABELS), 2), ValueError),
        (torch.full((BATCH, LABELS), -1), ValueError),
        (torch.full((BATCH, LABELS), 0.5), ValueError),
        (torch.full((BATCH, LABELS), math.nan), ValueError),
        ([[0, 1, 0]] * BATCH, TypeError),
        (torch.zeros(BATCH, LABELS, dtype=torch.long, device="meta"), ValueError),
    ],
)
def test_rejects_labels(labels, error):
    with pytest.raises(error, match="`labels`"):
        build()(random_batch()[0], labels)


@pytest.mark.parametrize(
    ("mean_shape", "std_shape"),
    [
        ((BATCH, MODALITIES, LABELS, LATENT + 1), (BATCH, MODALITIES, LABELS, LATENT + 1)),
        ((BATCH, MODALITIES + 1, LABELS, LATENT), (BATCH, MODALITIES + 1, LABELS, LATENT)),
        ((BATCH, MODALITIES, LABELS, LATENT), (BATCH, MODALITIES, LABELS, LATENT + 1)),
        ((BATCH, LABELS, LATENT), (BATCH, LABELS, LATENT)),
    ],
)
def test_rejects_shapes_of_latent(mean_shape, std_shape):
    latent = DiagonalGaussian(torch.randn(mean_shape).double(), torch.rand(std_shape).double())
    with pytest.raises(ValueError, match="`latent"):
        build()(latent, random_batch()[1])


def test_rejects_another_number_of_labels_though_latent_and_labels_agree():
    latent = random_latent(BATCH, MODALITIES, LABELS + 1, LATENT)
    with pytest.raises(ValueError, match=r"`latent\.mean` to have shape"):
        build()(latent, torch.ones(BATCH, LABELS + 1))


def test_rejects_a_batch_larger_than_the_largest():
    build(max_batch_size=BATCH)(*random_batch())
    with pytest.raises(
        ValueError, match=f"`max_batch_size` = {BATCH - 1} samples, but got {BATCH}"
    ):
        build(max_batch_size=BATCH - 1)(*random_batch())


@pytest.mark.parametrize("field", ["mean", "std"])
def test_rejects_nan_in_latent(field):
    latent, labels = random_batch()
    getattr(latent, field)[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=rf"`latent\.{field}`"):
        build()(latent, labels)


def test_rejects_latent_on_another_device_than_the_queue():
    latent, labels = random_batch()
    latent = DiagonalGaussian(*(x.to("meta") for x in latent))
    with pytest.raises(ValueError, match="`latent` to be on cpu, but got meta"):
        build()(latent, labels.to("meta"))


@pytest.mark.parametrize("settings", [{}, {"validate_args": False}, {"validate_args": True}])
def test_validate_args_is_passed_on(monkeypatch, settings):
    passed = record_validate_args(monkeypatch)
    build(**settings)(*random_batch())
    assert passed == [settings.get("validate_args", False)] * 2  # of latent and labels


@pytest.mark.parametrize(
    ("missing", "error"),
    [
        (torch.zeros(BATCH, MODALITIES), TypeError),
        (torch.zeros(BATCH, MODALITIES + 1, dtype=torch.bool), ValueError),
    ],
)
def test_rejects_missing(missing, error):
    with pytest.raises(error, match="`missing`"):
        build()(*random_batch(), missing)


def test_rejected_batch_leaves_the_queue_alone():
    loss, (latent, _) = build(), random_batch()
    with pytest.raises(ValueError, match="`labels`"):
        loss(latent, torch.full((BATCH, LABELS), 2))
    assert int(loss.queue_length) == 0
