"""Two processes against one: the loss with `gather=True` and the tracker's `synchronize`."""

import pytest
import torch
import torch.distributed as dist

from ranks import Ranks, average_gradient, contrast, track
from support import close
from uncertainty_mm import DiagonalGaussian, DistributionSupConLoss

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs gloo", allow_module_level=True)

BATCH, MODALITIES, LABELS, LATENT = 8, 2, 3, 4
EVEN, RAGGED, LOPSIDED = [(0, 4), (4, 8)], [(0, 3), (3, 8)], [(0, 7), (7, 8)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pool = Ranks(2, tmp_path_factory.mktemp("gloo") / "meeting-point")
    yield pool
    pool.close()


def random_batch():
    shape = (BATCH, MODALITIES, LABELS, LATENT)
    mean = torch.randn(shape, dtype=torch.float64)
    std = 0.1 + torch.rand(shape, dtype=torch.float64)
    return mean, std, torch.randint(2, (BATCH, LABELS)), torch.rand(BATCH, MODALITIES) < 0.25


def joined(batches, settings):
    """The same as ranks.contrast in one process on whole batches."""
    return contrast(0, [(0, BATCH)], batches, settings)


def compare(ranks, shares, batches, **settings):
    """Loss and gradient, averaged over the ranks, and queues: as in one process."""
    (left, left_state), (right, right_state) = ranks.run(
        contrast, shares, batches, settings | {"gather": True}
    )
    expected, state = joined(batches, settings)
    for a, b, (loss, *grads) in zip(left, right, expected, strict=True):
        close((a[0] + b[0]) / 2, loss)
        for i, grad in enumerate(grads, start=1):
            close(torch.cat([a[i], b[i]]) / 2, grad)
    for name, expected_buffer in state.items():
        assert torch.equal(left_state[name], right_state[name]), name
        close(left_state[name].double(), expected_buffer)


@pytest.mark.parametrize("shares", [EVEN, RAGGED, LOPSIDED])
@pytest.mark.parametrize("anchors", ["present", "all"])
def test_gathered_loss_equals_that_of_one_process(ranks, shares, anchors):
    batches = [random_batch() for _ in range(3)]
    compare(ranks, shares, batches, queue_size=100, anchors=anchors)


def test_gathered_sum_equals_that_of_one_process(ranks):
    compare(ranks, RAGGED, [random_batch() for _ in range(2)], queue_size=100, reduction="sum")


@pytest.mark.parametrize("queue_size", [0, 7, 50])
def test_gathered_queue_wraps_as_that_of_one_process(ranks, queue_size):
    compare(ranks, RAGGED, [random_batch() for _ in range(4)], queue_size=queue_size)


def test_rank_without_anchors_takes_part(ranks):
    mean, std, labels, missing = random_batch()
    labels[4:] = 0
    compare(ranks, EVEN, [(mean, std, labels, missing)], queue_size=100)


def test_rank_with_everything_missing_takes_part(ranks):
    mean, std, labels, missing = random_batch()
    missing[4:] = True
    compare(ranks, EVEN, [(mean, std, labels, missing)], queue_size=100)


def test_rank_without_samples_takes_part(ranks):
    compare(ranks, [(0, 8), (8, 8)], [random_batch()], queue_size=100)


def test_no_anchor_anywhere_gives_zero_with_zero_gradient(ranks):
    mean, std, labels, missing = random_batch()
    batch = (mean, std, torch.zeros_like(labels), missing)
    for steps, _ in ranks.run(contrast, EVEN, [batch], {"gather": True}):
        loss, *grads = steps[0]
        assert loss == 0
        assert all((grad == 0).all() for grad in grads)


def test_value_of_the_gathered_loss_is_the_same_on_all_ranks(ranks):
    (left, _), (right, _) = ranks.run(contrast, RAGGED, [random_batch()], {"gather": True})
    close(left[0][0], right[0][0])


def test_gathered_losses_of_the_anchors_are_those_of_one_process(ranks):
    batch = random_batch()
    (left, _), (right, _) = ranks.run(
        contrast, RAGGED, [batch], {"gather": True, "reduction": "none"}
    )
    expected, _ = joined([batch], {"reduction": "none"})
    close(torch.cat([left[0][0], right[0][0]]), expected[0][0])


def test_gradient_of_an_encoder_under_ddp_equals_that_of_one_process(ranks):
    mean, std, labels, missing = random_batch()
    left, right = ranks.run(
        average_gradient, RAGGED, (mean, std, labels, missing), {"gather": True}
    )
    weight = torch.eye(LATENT, dtype=torch.float64, requires_grad=True)
    loss = DistributionSupConLoss(MODALITIES, LABELS, LATENT).double()
    loss(DiagonalGaussian(mean @ weight.T, std), labels, missing).backward()
    close(left, weight.grad)
    close(right, weight.grad)


def test_without_gather_ranks_know_nothing_of_each_other(ranks):
    mean, std, labels, missing = random_batch()
    results = ranks.run(contrast, EVEN, [(mean, std, labels, missing)], {"queue_size": 100})
    for (start, end), (steps, _) in zip(EVEN, results, strict=True):
        share = [(mean[start:end], std[start:end], labels[start:end], missing[start:end])]
        expected, _ = contrast(0, [(0, end - start)], share, {"queue_size": 100})
        for actual, wanted in zip(steps[0], expected[0], strict=True):
            close(actual, wanted)


# ----------------------------------------------------------------------------------- synchronize


def follow(ranks, *histories, samples=4):
    """[(share, counts, forgetting)] by round, after making sure that both ranks agree."""
    left, right = ranks.run(track, histories, torch.arange(samples))
    assert left == right
    return left


def test_synchronize_joins_disjoint_samples(ranks):
    share, counts, _ = follow(ranks, ([(0, True), (0, False)], [(2, True)]))[0]
    assert share == [0.5, 0.5, 1.0, 0.5]
    assert counts == [2, 0, 1, 0]


def test_synchronize_joins_the_histories_of_one_sample(ranks):
    share, counts, _ = follow(ranks, ([(1, True)], [(1, False), (1, False), (1, False)]))[0]
    assert share[1] == 0.25
    assert counts[1] == 4


def test_synchronize_twice_counts_once(ranks):
    share, counts, forgetting = follow(ranks, ([(0, True), (0, False)], [(1, True)]), ([], []))[1]
    assert share == [0.5, 1.0, 0.5, 0.5]
    assert counts == [2, 1, 0, 0]
    assert forgetting == [1, 0, 0, 0]


def test_synchronize_adds_what_came_since_the_last_time(ranks):
    rounds = follow(ranks, ([(0, True)], [(0, False)]), ([(0, True)], []), ([], [(0, True)]))
    assert [counts[0] for _, counts, _ in rounds] == [2, 3, 4]
    assert [share[0] for share, _, _ in rounds] == pytest.approx([1 / 2, 2 / 3, 3 / 4])


def test_synchronize_adds_forgetting_events(ranks):
    _, _, forgetting = follow(
        ranks, ([(0, True), (0, False)], [(1, True), (1, False), (1, True), (1, False)])
    )[0]
    assert forgetting == [1, 2, 0, 0]


@pytest.mark.parametrize(("before", "after", "events"), [(True, False, 1), (False, True, 0)])
def test_forgetting_is_seen_when_a_sample_moves_to_another_rank(ranks, before, after, events):
    rounds = follow(ranks, ([(0, before)], []), ([], [(0, after)]))
    assert rounds[0][2][0] == 0
    assert rounds[1][2][0] == events


def test_last_prediction_survives_rounds_of_other_samples(ranks):
    rounds = follow(ranks, ([(0, True)], []), ([(1, True)], [(2, True)]), ([], [(0, False)]))
    assert rounds[2][2][0] == 1
