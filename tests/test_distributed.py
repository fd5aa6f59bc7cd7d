"""Several processes against one: the loss with `gather=True`, the tracker's `synchronize` and the metrics."""

from itertools import accumulate, pairwise

import pytest
import torch
import torch.distributed as dist

from cases import ordered
from pages import DOCS, blocks
from ranks import (
    Ranks,
    average_gradient,
    contrast,
    contrast_compiled,
    contrast_in_group,
    contrast_within_ddp,
    evaluate,
    exchanged,
    gathered_scores,
    gathered_supcon,
    left_alone,
    rank_errors,
    synchronize_two,
    track,
    track_in_parallel,
)
from support import TORCH_2_6, close, poisoned
from uncertainty_mm import (
    DiagonalGaussian,
    DistributionSupConLoss,
    SoftRankOrdinalityLoss,
    functional,
)

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs gloo", allow_module_level=True)

BATCH, MODALITIES, LABELS, LATENT = 12, 2, 3, 4
# How the batch is divided among two and among three ranks.
DIVISIONS = {
    "even": {2: (6, 6), 3: (4, 4, 4)},
    "ragged": {2: (3, 9), 3: (3, 7, 2)},
    "lopsided": {2: (11, 1), 3: (1, 1, 10)},
    "one empty": {2: (12, 0), 3: (5, 0, 7)},
}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    pool = Ranks(request.param, tmp_path_factory.mktemp("gloo") / "meeting-point")
    yield pool
    pool.close()


def divide(ranks, division):
    """[(start, end)] of the samples of each rank."""
    return list(pairwise(accumulate(DIVISIONS[division][ranks.world_size], initial=0)))


def random_batch():
    shape = (BATCH, MODALITIES, LABELS, LATENT)
    mean = torch.randn(shape, dtype=torch.float64)
    std = 0.1 + torch.rand(shape, dtype=torch.float64)
    return mean, std, torch.randint(2, (BATCH, LABELS)), torch.rand(BATCH, MODALITIES) < 0.25


def joined(batches, settings):
    """The same as ranks.contrast in one process on whole batches."""
    return contrast(0, [(0, BATCH)], batches, settings)


def compare(ranks, division, batches, *, max_batch_size=None, job=contrast, **settings):
    """Loss and gradient, averaged over the ranks, and queues: as in one process."""
    several = settings | {"gather": True, "max_batch_size": max_batch_size}
    results = ranks.run(job, divide(ranks, division), batches, several)
    expected, state = joined(batches, settings)
    for step, (loss, *grads) in enumerate(expected):
        losses, *shares = zip(*(steps[step] for steps, _ in results), strict=True)
        if settings.get("reduction") == "none":  # each rank has its own; their sum is not averaged
            close(torch.cat(losses), loss)
            divisor = 1
        else:
            assert all(torch.equal(value, losses[0]) for value in losses)
            close(losses[0], loss)
            divisor = ranks.world_size
        for share, grad in zip(shares, grads, strict=True):
            close(torch.cat(share) / divisor, grad)
    for name, expected_buffer in state.items():
        buffers = [state[name] for _, state in results]
        assert all(torch.equal(buffer, buffers[0]) for buffer in buffers), name
        close(buffers[0].double(), expected_buffer)


@pytest.mark.parametrize("max_batch_size", [None, BATCH, 20])
@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("anchors", ["present", "all"])
def test_gathered_loss_equals_that_of_one_process(ranks, division, anchors, max_batch_size):
    compare(
        ranks,
        division,
        [random_batch() for _ in range(3)],
        max_batch_size=max_batch_size,
        queue_size=150,
        anchors=anchors,
    )


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2], indirect=True, scope="module")
@pytest.mark.parametrize("division", ["ragged", "one empty"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gathered_loss_compiles_whole_and_once(ranks, division, reduction):
    if TORCH_2_6 and division == "one empty":
        pytest.skip("torch 2.6 compiles no gradient of what pads an empty tensor")
    compare(
        ranks,
        division,
        [random_batch() for _ in range(4)],  # the queue fills up in the third step
        max_batch_size=BATCH,
        job=contrast_compiled,
        queue_size=150,
        reduction=reduction,
    )


def test_gathered_sum_equals_that_of_one_process(ranks):
    compare(ranks, "ragged", [random_batch() for _ in range(2)], queue_size=100, reduction="sum")


@pytest.mark.parametrize("similarity", ["wasserstein", "sampled"])
def test_gathered_distances_equal_those_of_one_process(ranks, similarity):
    batches = [random_batch() for _ in range(2)]
    compare(ranks, "ragged", batches, queue_size=100, similarity=similarity)


@pytest.mark.parametrize("max_batch_size", [None, 20])
@pytest.mark.parametrize("queue_size", [0, 7, 100])
def test_gathered_queue_wraps_as_that_of_one_process(ranks, queue_size, max_batch_size):
    batches = [random_batch() for _ in range(4)]
    compare(ranks, "ragged", batches, max_batch_size=max_batch_size, queue_size=queue_size)


def test_anchors_without_a_positive_do_not_count_in_the_gathered_mean(ranks):
    mean, std, labels, missing = random_batch()
    labels[:, 0] = 0
    labels[4, 0] = 1  # alone in its class
    missing[4] = False
    compare(ranks, "even", [(mean, std, labels, missing)], queue_size=0)


def test_rank_without_anchors_takes_part(ranks):
    mean, std, labels, missing = random_batch()
    labels[6:] = 0
    compare(ranks, "even", [(mean, std, labels, missing)], queue_size=100)


def test_rank_with_everything_missing_takes_part(ranks):
    mean, std, labels, missing = random_batch()
    missing[6:] = True
    compare(ranks, "even", [(mean, std, labels, missing)], queue_size=100)


@pytest.mark.parametrize("max_batch_size", [None, 2])
def test_no_samples_anywhere_change_nothing(ranks, max_batch_size):
    nowhere = [(0, 0)] * ranks.world_size
    settings = {"gather": True, "max_batch_size": max_batch_size, "queue_size": 10}
    for steps, state in ranks.run(contrast, nowhere, [random_batch()], settings):
        assert steps[0][0] == 0
        assert (state["queue.classes"] == -1).all()
        assert state["queue.pointer"] == 0


def test_no_anchor_anywhere_gives_zero_with_zero_gradient(ranks):
    mean, std, labels, missing = random_batch()
    batch = (mean, std, torch.zeros_like(labels), missing)
    settings = {"gather": True, "anchors": "present"}
    for steps, _ in ranks.run(contrast, divide(ranks, "even"), [batch], settings):
        loss, *grads = steps[0]
        assert loss == 0
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("max_batch_size", [None, 20])
def test_gathered_losses_of_the_anchors_are_those_of_one_process(ranks, max_batch_size):
    batches = [random_batch() for _ in range(2)]
    compare(ranks, "ragged", batches, max_batch_size=max_batch_size, reduction="none")


def test_gradient_of_an_encoder_under_ddp_equals_that_of_one_process(ranks):
    mean, std, labels, missing = random_batch()
    grads = ranks.run(
        average_gradient, divide(ranks, "ragged"), (mean, std, labels, missing), {"gather": True}
    )
    weight = torch.eye(LATENT, dtype=torch.float64, requires_grad=True)
    loss = DistributionSupConLoss(MODALITIES, LABELS, LATENT).double()
    loss(DiagonalGaussian(mean @ weight.T, std), labels, missing).backward()
    for grad in grads:
        close(grad, weight.grad)


def test_without_gather_ranks_know_nothing_of_each_other(ranks):
    mean, std, labels, missing = random_batch()
    shares = divide(ranks, "even")
    results = ranks.run(contrast, shares, [(mean, std, labels, missing)], {"queue_size": 100})
    for (start, end), (steps, _) in zip(shares, results, strict=True):
        share = [(mean[start:end], std[start:end], labels[start:end], missing[start:end])]
        expected, _ = contrast(0, [(0, end - start)], share, {"queue_size": 100})
        for actual, wanted in zip(steps[0], expected[0], strict=True):
            close(actual, wanted)


# ------------------------------------------------------------------------------------- ordinality


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize(
    ("mode", "max_batch_size", "joined"), [("rank", None, False), ("pearson", 20, True)]
)
def test_gathered_ordinality_is_that_of_the_joined_batch(
    ranks, mode, division, max_batch_size, joined
):
    views, mask = torch.randn(BATCH, 3, dtype=torch.float64), torch.arange(BATCH) % 5 == 1
    correctness = poisoned(torch.rand(BATCH, dtype=torch.float64), mask)
    settings = {"mode": mode, "pairs": ("SR", "DR", "DS"), "temperature": 0.5}
    weight = torch.eye(2, 3, dtype=torch.float64, requires_grad=True)
    loss = ordered(
        SoftRankOrdinalityLoss(**settings),
        *(views @ weight.T).sigmoid().unbind(1),
        correctness,
        mask,
    )
    loss.backward()
    settings |= {"max_batch_size": max_batch_size}
    arguments = divide(ranks, division), views, correctness, mask, joined, settings
    for value, grad in ranks.run(rank_errors, *arguments):
        close(value, loss.detach())
        close(grad, weight.grad)


@pytest.mark.parametrize("ranks", [3], indirect=True, scope="module")
@pytest.mark.parametrize("members", [[0, 2], [2], [1, 2]])
def test_gathered_loss_of_a_group_equals_that_of_one_process(ranks, members):
    batches = [random_batch() for _ in range(2)]
    settings = {"queue_size": 100, "gather": True, "reduction": "sum"}
    shares = list(pairwise([0, 3, BATCH] if len(members) == 2 else [0, BATCH]))
    answers = ranks.run(contrast_in_group, members, shares, batches, settings)
    assert [answer is None for answer in answers] == [r not in members for r in range(3)]
    expected, state = joined(batches, {"queue_size": 100, "reduction": "sum"})
    answers = [answer for answer in answers if answer is not None]
    for step, (loss, *grads) in enumerate(expected):
        losses, *parts = zip(*(steps[step] for steps, _ in answers), strict=True)
        close(losses[0], loss)
        for part, grad in zip(parts, grads, strict=True):
            close(torch.cat(part) / len(members), grad)
    for _, other in answers:
        assert all(torch.equal(other[name], x) for name, x in state.items() if "rows" not in name)
        close(other["queue.rows"], state["queue.rows"])


def test_queue_without_gather_is_left_alone_by_ddp(ranks):
    batches = [random_batch() for _ in range(3)]
    answers = ranks.run(contrast_within_ddp, divide(ranks, "even"), batches, {"queue_size": 100})
    per_rank = BATCH // ranks.world_size
    for (start, end), (state, before) in zip(divide(ranks, "even"), answers, strict=True):
        fresh = DistributionSupConLoss(MODALITIES, LABELS, LATENT, queue_size=100).double()
        for mean, std, labels, missing in batches:
            own = (x[start:end] for x in (mean, std))
            fresh(DiagonalGaussian(*own), labels[start:end], missing[start:end])
        assert end - start == per_rank
        assert torch.equal(state["queue.classes"], fresh.queue.classes)
        assert not torch.equal(state["queue.classes"], before[1])
    assert not torch.equal(answers[0][0]["queue.rows"], answers[1][0]["queue.rows"])


@pytest.mark.parametrize("max_rows", [None, BATCH + 1])
@pytest.mark.parametrize("division", ["ragged", "one empty"])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_gathered_rows_of_any_shape_have_the_gradients_of_all_ranks(
    ranks, division, max_rows, shape
):
    scores = torch.randn(BATCH, *shape, dtype=torch.float64)
    shares = divide(ranks, division)
    answers = ranks.run(gathered_scores, shares, scores, max_rows)
    factor = sum(range(1, ranks.world_size + 1))
    for (start, end), (gathered, kept, grad) in zip(shares, answers, strict=True):
        assert len(gathered) == ranks.world_size * (max_rows or max(e - s for s, e in shares))
        close(gathered[kept == 0], scores)
        assert (gathered[kept != 0] == 0).all()
        close(grad, 2 * factor * scores[start:end])


# ----------------------------------------------------------------------------------- synchronize


def follow(ranks, *histories, samples=4):
    """[(share, counts, forgetting)] by round, after making sure that all ranks agree.

    Ranks that `histories` does not name see nothing.
    """
    idle = [[]] * (ranks.world_size - len(histories[0]))
    first, *others = ranks.run(
        track, [[*history, *idle] for history in histories], torch.arange(samples)
    )
    assert all(other == first for other in others)
    return first


def test_default_of_ddp_leaves_the_histories_alone(ranks):
    for rank, counts in enumerate(ranks.run(track_in_parallel)):
        assert counts == [int(rank == sample) for sample in range(4)]


def test_synchronize_joins_a_process_group(ranks):
    first, second, *others = ranks.run(synchronize_two)
    assert first == second == [1, 1, 0, 0]
    assert others in ([], [[0, 0, 1, 0]])


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


def test_synchronize_equals_a_history_kept_by_hand(ranks):
    samples, rounds = 6, 5
    draw = torch.randint(2 * samples, (rounds, ranks.world_size, 8)).tolist()
    histories = [[[(x // 2, x % 2 == 1) for x in seen] for seen in round] for round in draw]
    correct, counts, events = ([0] * samples for _ in range(3))
    last = [None] * samples
    for history, actual in zip(histories, follow(ranks, *histories, samples=samples), strict=True):
        latest = []
        for seen in history:
            mine = list(last)
            for i, now in seen:
                correct[i] += now
                counts[i] += 1
                events[i] += mine[i] is True and not now
                mine[i] = now
            latest.append({i: mine[i] for i, _ in seen})
        for i in set().union(*latest):
            last[i] = any(mine.get(i, False) for mine in latest)
        share = [c / n if n else 0.5 for c, n in zip(correct, counts, strict=True)]
        assert actual[0] == pytest.approx(share)
        assert actual[1:] == [counts, events]


# -------------------------------------------------------------------------------- a loss of one's own


@pytest.mark.parametrize("division", DIVISIONS)
def test_loss_of_the_page_equals_that_of_one_process(ranks, division):
    [source] = [
        code
        for _, code in blocks(DOCS / "howto" / "gather.md", "testcode")
        if "def gathered_supcon" in code
    ]
    embeddings = torch.randn(BATCH, 5, dtype=torch.float64, requires_grad=True)
    classes = torch.randint(4, (BATCH,))
    expected = functional.supcon_loss(embeddings, classes)
    expected.backward()
    answers = ranks.run(
        gathered_supcon, source, divide(ranks, division), embeddings.detach(), classes
    )
    losses, gradients = zip(*answers, strict=True)
    close(sum(losses) / ranks.world_size, expected.detach())
    close(torch.cat(gradients) / ranks.world_size, embeddings.grad)


# --------------------------------------------------------------------------------------- metrics


@pytest.mark.long
@pytest.mark.parametrize("division", ["ragged", "one empty"])
@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")  # by the rank without data
def test_metrics_of_several_processes_are_those_of_one(ranks, division):
    probs, labels = torch.rand(BATCH, LABELS), torch.randint(2, (BATCH, LABELS))
    errors, uncertainty = torch.tensor([0, 1] * (BATCH // 2)), torch.randint(3, (BATCH,)).float()
    data = (probs, labels, errors, uncertainty)
    expected = evaluate(0, [(0, BATCH)], *data)
    for answer in ranks.run(evaluate, divide(ranks, division), *data):
        assert answer.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(answer[name], value)


# ------------------------------------------------------------------------------- what a step exchanges


@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "targets", "exchanges"),
    [("ddp", "both", 7), ("ddp", "sample", 7), ("fsdp2", "both", 16)],
)
def test_step_sends_what_the_formula_says(ranks, strategy, targets, exchanges):
    if TORCH_2_6:
        pytest.skip("torch 2.6 has no FSDP2 for the CPU, and does not tell what was sent")
    for by_formula, number, counted in ranks.run(exchanged, strategy, targets):
        assert number == exchanges
        assert counted == pytest.approx(sum(by_formula.values()), rel=1e-6)


# -------------------------------------------------------------------------------- a rank that is gone


@pytest.mark.long
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_rank_left_alone_ends_with_an_error_in_bounded_time(tmp_path, how):
    if TORCH_2_6 and how == "hangs":
        pytest.skip("torch 2.6 does not change the timeout of a group that is at work")
    timeout = 2
    ranks = Ranks(2, tmp_path / "meeting-point")
    try:
        met, queue_unchanged, counts = ranks.run_first(left_alone, how, timeout)
    finally:
        ranks.stop()
    assert len(met) == 3
    for name, (error, seconds) in met.items():
        assert error is not None, name
        assert seconds < timeout + 10, name  # the machine may be busy
    assert queue_unchanged
    assert counts == [1, 1, 1, 0, 0]  # what this rank saw is not lost
