"""CorrectnessTracker (3.4.2), against a dict of lists."""

import math
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from support import TELLS_FUNCTIONS, Bad, close, poisoned, record_validate_args, refused
from uncertainty_mm import CorrectnessTracker

SAMPLES, LABELS = 6, 3
EVERY = torch.arange(SAMPLES)


def indices(*values):
    return torch.tensor(values, dtype=torch.long)


def naive_forgetting(history):
    return sum(before >= 0.5 > after for before, after in pairwise(history))


@pytest.mark.parametrize("labels", [None, 3])
def test_masked_entries_leave_no_trace(labels):
    """As one entry after the other, without those that are left out."""
    generator = torch.Generator().manual_seed(1)
    tracker = CorrectnessTracker(4, labels)
    every = torch.arange(4)
    columns = 1 if labels is None else labels
    alone = [CorrectnessTracker(4) for _ in range(columns)]
    for _ in range(30):
        rows = torch.randint(4, (6,), generator=generator)
        shape = (6,) if labels is None else (6, labels)
        correct = torch.rand(shape, generator=generator)
        mask = torch.rand(shape, generator=generator) < 0.5
        tracker.update(rows, correct.masked_fill(mask, float("nan")), mask)
        for column, single in enumerate(alone):
            for i, row in enumerate(rows):
                if not mask.view(6, -1)[i, column]:
                    single.update(row[None], correct.view(6, -1)[i, column][None])
        for read in ("forward", "counts", "forgetting_events"):
            expected = torch.stack([getattr(single, read)(every) for single in alone], 1)
            close(getattr(tracker, read)(every).view(4, -1).double(), expected.double())


# --------------------------------------------------------------------------- proportions and counts


def test_unseen_samples_have_the_prior():
    close(CorrectnessTracker(SAMPLES, prior=0.25)(indices(0, 3)), [0.25, 0.25])


def test_prior_is_one_half_by_default():
    close(CorrectnessTracker(SAMPLES)(indices(0)), [0.5])


def test_proportion_of_correct_predictions():
    tracker = CorrectnessTracker(SAMPLES)
    for correct in ([True, False], [True, True], [False, False], [True, False]):
        tracker.update(indices(4, 1), torch.tensor(correct))
    close(tracker(indices(4, 1, 0)), [0.75, 0.25, 0.5])


def test_prior_does_not_weigh_in_once_seen():
    tracker = CorrectnessTracker(SAMPLES, prior=0.9)
    tracker.update(indices(2), torch.tensor([False]))
    close(tracker(indices(2)), [0.0])


def test_soft_correctness_is_averaged():
    tracker = CorrectnessTracker(SAMPLES)
    tracker.update(indices(2), torch.tensor([0.25]))
    tracker.update(indices(2), torch.tensor([1.0]))
    close(tracker(indices(2)), [0.625])


def test_duplicates_within_a_batch_count_each():
    tracker = CorrectnessTracker(SAMPLES)
    tracker.update(indices(3, 3, 5, 3), torch.tensor([True, False, True, True]))
    close(tracker(indices(3, 5)), [2 / 3, 1.0])
    assert tracker.counts(indices(3, 5, 0)).tolist() == [3, 1, 0]


def test_labels_are_tracked_one_by_one():
    tracker = CorrectnessTracker(SAMPLES, LABELS)
    tracker.update(indices(1), torch.tensor([[True, False, True]]))
    tracker.update(indices(1), torch.tensor([[True, False, False]]))
    close(tracker(indices(1, 0)), [[1.0, 0.0, 0.5], [0.5, 0.5, 0.5]])


def test_counts_start_at_zero():
    assert (CorrectnessTracker(SAMPLES).counts(EVERY) == 0).all()


def test_indices_may_repeat_when_reading():
    tracker = CorrectnessTracker(SAMPLES)
    tracker.update(indices(1), torch.tensor([True]))
    close(tracker(indices(1, 0, 1)), [1.0, 0.5, 1.0])


def test_empty_batch_changes_nothing():
    tracker = CorrectnessTracker(SAMPLES)
    tracker.update(indices(), torch.empty(0, dtype=torch.bool))
    assert (tracker.counts(EVERY) == 0).all()
    assert tracker(indices()).shape == (0,)


def test_reading_has_the_default_float_dtype_and_no_gradient():
    tracker = CorrectnessTracker(SAMPLES)
    tracker.update(indices(1), torch.tensor([0.5], dtype=torch.float64, requires_grad=True))
    proportion = tracker(indices(1))
    assert proportion.dtype == torch.get_default_dtype()
    assert not proportion.requires_grad


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_correct_may_have_any_of_the_dtypes(dtype):
    tracker = CorrectnessTracker(SAMPLES)
    tracker.update(indices(0, 1), torch.tensor([1, 0], dtype=dtype))
    close(tracker(indices(0, 1)), [1.0, 0.0])


def test_long_histories_stay_exact():
    tracker = CorrectnessTracker(1)
    many = torch.zeros(100_000, dtype=torch.long)
    for _ in range(3):
        tracker.update(many, torch.arange(100_000) % 4 == 0)
    assert tracker.counts(indices(0)).item() == 300_000
    close(tracker(indices(0)), [0.25])


def test_reset_forgets_everything():
    tracker = CorrectnessTracker(SAMPLES)
    for correct in (True, False):
        tracker.update(EVERY, torch.full((SAMPLES,), correct))
    tracker.reset()
    close(tracker(EVERY), [0.5] * SAMPLES)
    assert (tracker.counts(EVERY) == 0).all()
    assert (tracker.forgetting_events(EVERY) == 0).all()


def test_reset_gives_the_state_of_a_new_tracker():
    tracker = CorrectnessTracker(SAMPLES)
    tracker.update(EVERY, torch.ones(SAMPLES, dtype=torch.bool))
    tracker.synchronize()
    tracker.reset()
    fresh = CorrectnessTracker(SAMPLES)
    for name in ("history", "last", "merged"):
        assert torch.equal(getattr(tracker, name), getattr(fresh, name)), name


def test_reset_forgets_the_last_prediction_too():
    tracker = CorrectnessTracker(SAMPLES)
    tracker.update(indices(0), torch.tensor([True]))
    tracker.reset()
    tracker.update(indices(0), torch.tensor([False]))
    assert tracker.forgetting_events(indices(0)).item() == 0


def test_synchronize_without_a_process_group_changes_nothing():
    tracker = CorrectnessTracker(SAMPLES)
    tracker.update(indices(0, 0), torch.tensor([True, False]))
    tracker.synchronize()
    assert tracker.counts(indices(0)).item() == 2
    close(tracker(indices(0)), [0.5])
    assert tracker.forgetting_events(indices(0)).item() == 1


# --------------------------------------------------------------------------------- forgetting events


@pytest.mark.parametrize(
    ("history", "events"),
    [
        ([False], 0),
        ([True], 0),
        ([False, False], 0),
        ([True, True], 0),
        ([False, True], 0),
        ([True, False], 1),
        ([True, False, False], 1),
        ([True, False, True, False], 2),
        ([False, True, False, True, True, False], 2),
    ],
)
@pytest.mark.parametrize("at_once", [False, True])
def test_forgetting_is_correct_then_wrong(history, events, at_once):
    tracker = CorrectnessTracker(SAMPLES)
    if at_once:
        tracker.update(torch.full((len(history),), 2), torch.tensor(history))
    else:
        for correct in history:
            tracker.update(indices(2), torch.tensor([correct]))
    assert tracker.forgetting_events(indices(2)).item() == events


def test_forgetting_within_a_batch_follows_its_order():
    tracker = CorrectnessTracker(SAMPLES)
    tracker.update(indices(0, 1, 0, 1), torch.tensor([True, False, False, True]))
    assert tracker.forgetting_events(indices(0, 1)).tolist() == [1, 0]


def test_forgetting_goes_on_after_duplicates():
    tracker = CorrectnessTracker(SAMPLES)
    tracker.update(indices(0, 1, 0, 1), torch.tensor([False, True, True, False]))
    tracker.update(indices(0, 1), torch.tensor([False, False]))
    assert tracker.forgetting_events(indices(0, 1)).tolist() == [1, 1]


def test_forgetting_within_a_large_batch_follows_its_order():
    # Sorting that does not keep the order of equal indices shows in large batches only.
    where, correct = torch.randint(SAMPLES, (5000,)), torch.rand(5000) < 0.5
    tracker = CorrectnessTracker(SAMPLES)
    tracker.update(where, correct)
    expected = [naive_forgetting(correct[where == i].tolist()) for i in range(SAMPLES)]
    assert tracker.forgetting_events(EVERY).tolist() == expected


@pytest.mark.parametrize(("after", "events"), [(0.5, 0), (0.49, 1)])
def test_one_half_counts_as_correct_for_forgetting(after, events):
    tracker = CorrectnessTracker(SAMPLES)
    tracker.update(indices(0), torch.tensor([0.5]))
    tracker.update(indices(0), torch.tensor([after]))
    assert tracker.forgetting_events(indices(0)).item() == events


def test_labels_are_forgotten_one_by_one():
    tracker = CorrectnessTracker(SAMPLES, LABELS)
    tracker.update(indices(1), torch.tensor([[True, True, False]]))
    tracker.update(indices(1), torch.tensor([[False, True, False]]))
    assert tracker.forgetting_events(indices(1)).tolist() == [[1, 0, 0]]


# --------------------------------------------------------------------------------------------- state


def test_state_is_a_history_and_the_last_predictions_in_integers():
    tracker = CorrectnessTracker(SAMPLES, LABELS)
    assert {name: (x.dtype, x.shape) for name, x in tracker.state_dict().items()} == {
        "history": (torch.int64, (3, SAMPLES, LABELS)),
        "last": (torch.int8, (SAMPLES, LABELS)),
    }
    assert (tracker.last == -1).all()
    assert tracker.merged.dtype == torch.int64


def test_repr_names_labels_only_where_there_are_some():
    assert repr(CorrectnessTracker(6)) == "CorrectnessTracker(num_samples=6, prior=0.5)"
    assert repr(CorrectnessTracker(6, 3)) == (
        "CorrectnessTracker(num_samples=6, num_labels=3, prior=0.5)"
    )


def test_a_loaded_history_is_common_to_all_ranks_even_if_it_is_the_same():
    tracker = CorrectnessTracker(3)
    tracker.update(indices(0, 2), torch.tensor([True, False]))
    tracker.load_state_dict(tracker.state_dict())
    assert tracker.merged.equal(tracker.history)


def test_a_history_that_does_not_fit_leaves_all_as_it_was():
    tracker = CorrectnessTracker(3)
    tracker.update(indices(0, 2), torch.tensor([True, False]))
    with pytest.raises(RuntimeError, match="history"):
        tracker.load_state_dict(CorrectnessTracker(4).state_dict())
    assert (tracker.merged == 0).all()


def test_tracker_of_the_meta_device_takes_a_state_by_assignment():
    with torch.device("meta"):
        tracker = CorrectnessTracker(SAMPLES)
    other = CorrectnessTracker(SAMPLES)
    other.update(indices(0, 1), torch.tensor([True, False]))
    tracker.load_state_dict(other.state_dict(), assign=True)
    tracker.to("cpu")
    tracker.update(indices(0, 1), torch.tensor([False, False]))
    tracker.synchronize()
    assert tracker.forgetting_events(indices(0, 1)).tolist() == [1, 0]
    assert tracker.merged.equal(tracker.history)


# ------------------------------------------------------------------------- what is not known or finite


def test_unknown_labels_are_left_out_as_masked_ones():
    tracker, expected = CorrectnessTracker(SAMPLES, LABELS), CorrectnessTracker(SAMPLES, LABELS)
    correct, mask, unknown = torch.rand(5, LABELS), *(torch.rand(2, 5, LABELS) < 0.4)
    where = indices(0, 3, 0, 1, 3)
    tracker.update(where, poisoned(correct, unknown), mask, unknown)
    expected.update(where, correct, mask | unknown)
    assert tracker.history.equal(expected.history)
    assert tracker.last.equal(expected.last)


def test_unknown_is_for_histories_by_label():
    with pytest.raises(ValueError, match="`unknown` only with `num_labels`"):
        CorrectnessTracker(3).update(indices(0), torch.ones(1), unknown=torch.zeros(1).bool())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_what_is_not_finite_enters_nothing_where_values_are_not_looked_at(value, dtype):
    tracker, expected = (CorrectnessTracker(SAMPLES, validate_args=x) for x in (False, None))
    correct = torch.tensor([1.0, value, 0.25], dtype=dtype)
    tracker.update(indices(0, 0, 2), correct)
    expected.update(indices(0, 2), correct[[0, 2]])
    assert tracker.history.equal(expected.history)
    assert tracker.last.equal(expected.last)


def test_finite_outcomes_out_of_range_are_clamped_where_values_are_not_looked_at():
    tracker = CorrectnessTracker(SAMPLES, validate_args=False)
    tracker.update(indices(0, 1), torch.tensor([1e30, -1e30]))
    close(tracker(indices(0, 1)), [1.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_indices_may_have_any_integer_dtype(dtype):
    tracker = CorrectnessTracker(200)
    where = torch.tensor([3, 100, 3], dtype=dtype)
    tracker.update(where, torch.tensor([True, False, False]))
    close(tracker(where), [0.5, 0.0, 0.5])


# ------------------------------------------------------------------------------- gradient checkpointing


def step_of(tracker, order):
    """A differentiable step that reads and updates as `order` says, and what it read in the first pass."""
    seen = []

    def step(z):
        for what in order:
            if what == "update":
                tracker.update(indices(0, 1, 0), torch.tensor([True, True, False]))
            else:
                share = tracker(indices(0, 1, 0))
                seen.append(share)
                z = (z * (1 + share)).sin()
        return z.sum()

    return step, seen


ORDERS = ["read", "update"], ["update", "read"], ["read", "update", "update", "read"]


@pytest.mark.parametrize(
    ("order", "reentrant"),
    [
        (ORDERS[0], False),
        (ORDERS[0], True),
        (ORDERS[1], False),
        (ORDERS[1], True),
        (ORDERS[2], False),
    ],
)
def test_checkpointed_step_counts_once_and_has_the_gradient_of_the_first_pass(order, reentrant):
    if order is ORDERS[2] and not TELLS_FUNCTIONS:
        pytest.skip("torch does not tell a checkpointed pass from a plain one")
    plain, saved = CorrectnessTracker(SAMPLES), CorrectnessTracker(SAMPLES)
    for _ in range(3):
        grads = []
        for tracker in (plain, saved):
            step, seen = step_of(tracker, order)
            z = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
            if tracker is saved:
                checkpoint(step, z, use_reentrant=reentrant).backward()
                assert len(seen) == 2 * order.count("read")  # it was repeated
            else:
                step(z).backward()
            grads.append(z.grad)
        assert torch.equal(*grads)
        assert saved.history.equal(plain.history)
        assert saved.last.equal(plain.last)


@pytest.mark.parametrize("reentrant", [False, True])
def test_readings_of_a_checkpointed_function_outlast_updates_outside_of_it(reentrant):
    tracker = CorrectnessTracker(SAMPLES)
    step, seen = step_of(tracker, ["read"])
    z = torch.ones(3, requires_grad=True)
    update = step_of(tracker, ["update"])[0]
    update(z)
    loss = checkpoint(step, z, use_reentrant=reentrant)
    update(z)
    tracker(indices(0, 1, 0))  # outside, and of another value
    loss.backward()
    assert torch.equal(*seen)
    assert tracker.counts(indices(0, 1)).tolist() == [4, 2]


def test_several_checkpointed_functions_are_repeated_each_as_it_was():
    plain, saved = CorrectnessTracker(SAMPLES), CorrectnessTracker(SAMPLES)
    grads = []
    for tracker in (plain, saved):
        z = torch.ones(3, requires_grad=True)
        total = 0
        for shift in range(3):

            def step(z, tracker=tracker, where=(EVERY[:3] + shift)):
                share = tracker(where)
                tracker.update(where, torch.tensor([True, False, True]))
                return (z * share).sin().sum()

            total = total + (
                checkpoint(step, z, use_reentrant=False) if tracker is saved else step(z)
            )
        total.backward()
        grads.append(z.grad)
    assert torch.equal(*grads)
    assert saved.history.equal(plain.history)


def test_ambiguous_repetition_is_refused():
    """Two functions that read the same samples, one before and one after an update."""
    tracker = CorrectnessTracker(SAMPLES)
    step, _ = step_of(tracker, ["read"])
    z = torch.ones(3, requires_grad=True)
    before = checkpoint(step, z, use_reentrant=False)
    step_of(tracker, ["update"])[0](z)
    after = checkpoint(step, z, use_reentrant=False)
    with pytest.raises(RuntimeError, match="before and after an update of the same indices"):
        (before + after).backward()


def test_reentrant_function_that_reads_before_and_after_an_update_is_refused():
    tracker = CorrectnessTracker(SAMPLES)
    step, _ = step_of(tracker, ORDERS[2])
    loss = checkpoint(step, torch.ones(3, requires_grad=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match="before and after an update of the same indices"):
        loss.backward()


def test_repetition_with_other_indices_is_refused():
    tracker, batches = CorrectnessTracker(SAMPLES), iter([indices(0), indices(1)])

    def step(z):
        tracker.update(next(batches), torch.tensor([True]))
        return z.sin().sum()

    loss = checkpoint(step, torch.ones(3, requires_grad=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match="call the tracker outside of the checkpointed function"):
        loss.backward()
    assert tracker.counts(EVERY).tolist() == [1, 0, 0, 0, 0, 0]


def test_compiled_step_inside_of_a_checkpointed_function_is_refused():
    torch.compiler.reset()
    tracker = CorrectnessTracker(SAMPLES)
    step = torch.compile(step_of(tracker, ["update"])[0], backend="eager", fullgraph=True)

    def through(z):
        step(z)
        return z.sin().sum()

    loss = checkpoint(through, torch.ones(3, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError, match="cannot be repeated"):
        loss.backward()
    assert tracker.counts(indices(0, 1)).tolist() == [2, 1]


# --------------------------------------------------------------------------------------- bad inputs

INTEGER = r"`indices` to have an integer dtype \(uint8, int8 to int64\), but got torch"
RANGE = r"`indices` to be in \[0, 5\], but got values from"
POSITIVE = "to be a positive integer, but got"


def bad(name, call, message, error=ValueError):
    return Bad(name, call, error, f"^Expected {message}$")


def update(where=None, correct=None, **left_out):
    where = indices(0, 4) if where is None else where
    correct = torch.ones(2, LABELS) if correct is None else correct
    return lambda tracker: tracker.update(where, correct, **left_out)


META = torch.zeros(2, LABELS, device="meta")
BAD = [
    bad("no sample", lambda _: CorrectnessTracker(0), f"`num_samples` {POSITIVE} 0"),
    bad(
        "half a one", lambda _: CorrectnessTracker(1.5), f"`num_samples` {POSITIVE} 1.5", TypeError
    ),
    bad("no label", lambda _: CorrectnessTracker(5, 0), f"`num_labels` {POSITIVE} 0"),
    bad("2.0", lambda _: CorrectnessTracker(5, 2.0), f"`num_labels` {POSITIVE} 2.0", TypeError),
    bad("prior 2", lambda _: CorrectnessTracker(5, prior=2), r"`prior` .* in \[0, 1\], but got 2"),
    bad("nan", lambda _: CorrectnessTracker(5, prior=math.nan), "`prior` .*, but got nan"),
    bad("a word", lambda _: CorrectnessTracker(5, prior="0"), "`prior` .*, but got '0'", TypeError),
    bad(
        "check 1",
        lambda _: CorrectnessTracker(5, validate_args=1),
        "`validate_args` .* 1",
        TypeError,
    ),
    bad("index too large", update(indices(0, 6)), f"{RANGE} 0 to 6"),
    bad("index negative", update(indices(-1, 0)), f"{RANGE} -1 to 0"),
    bad("mask for indices", update(torch.ones(2).bool()), rf"{INTEGER}\.bool", TypeError),
    bad("unsigned", update(indices(0).to(torch.uint16)), rf"{INTEGER}\.uint16", TypeError),
    bad("fractions", update(torch.zeros(2)), rf"{INTEGER}\.float32", TypeError),
    bad("list", update([0, 1]), "`indices` to be a tensor, but got list", TypeError),
    bad("matrix", update(indices([0, 1])), r"`indices` to have shape \(B\), but got \(1, 2\)"),
    bad("elsewhere", update(META[:, 0].long()), "`indices` to be on cpu, but got meta"),
    bad("share: too large", lambda t: t(indices(9)), f"{RANGE} 9 to 9"),
    bad("share: list", lambda t: t([0]), "`indices` to be a tensor, but got list", TypeError),
    bad("counts: negative", lambda t: t.counts(indices(-2)), f"{RANGE} -2 to -2"),
    bad("counts: bool", lambda t: t.counts(torch.ones(2).bool()), rf"{INTEGER}\.bool", TypeError),
    bad("events: matrix", lambda t: t.forgetting_events(indices([0])), r"`indices` .* \(1, 1\)"),
    bad("events: elsewhere", lambda t: t.forgetting_events(META[:, 0].long()), ".* but got meta"),
    bad("no labels", update(correct=torch.ones(2)), r"`correct` .* \(B=2, Q=3\), but got \(2,\)"),
    bad("other batch", update(correct=torch.ones(3, 3)), r"`correct` .*, but got \(3, 3\)"),
    bad("above 1", update(correct=torch.full((2, 3), 1.5)), r"`correct` to be in .*, but got 1.5"),
    bad("below 0", update(correct=torch.full((2, 3), -0.5)), r"`correct` .*, but got -0.5"),
    bad("nan in it", update(correct=torch.full((2, 3), math.nan)), "`correct` .*, but got nan"),
    bad("integer", update(correct=torch.ones(2, 3).long()), "`correct` .* torch.int64", TypeError),
    bad("lists", update(correct=[[True] * 3] * 2), "`correct` to be a tensor, .* list", TypeError),
    bad("on meta", update(correct=META), "`correct` to be on cpu, but got meta"),
    bad("numbers", update(mask=torch.zeros(2, 3)), "`mask` to have a bool dtype, .*", TypeError),
    bad("mask list", update(mask=[1]), "`mask` to be a tensor, but got list", TypeError),
    bad("of samples", update(mask=torch.zeros(2).bool()), r"`mask` .*, but got \(2,\)"),
    bad("mask elsewhere", update(mask=META.bool()), "`mask` to be on cpu, but got meta"),
    bad("unknown numbers", update(unknown=torch.zeros(2, 3)), "`unknown` .* bool .*", TypeError),
    bad("unknown of samples", update(unknown=torch.zeros(2).bool()), r"`unknown` .* \(2,\)"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_refuses_and_stays_as_it_was(case):
    tracker = CorrectnessTracker(SAMPLES, LABELS)
    tracker.update(indices(0, 1, 1), torch.rand(3, LABELS))
    refused(case, tracker, lambda t: (t.state_dict(), t.merged))


def test_one_outcome_a_sample_without_labels():
    with pytest.raises(ValueError, match=r"`correct` to have shape \(B=2\), but got \(2, 3\)"):
        CorrectnessTracker(SAMPLES).update(indices(0, 1), torch.ones(2, LABELS))


def test_a_loaded_history_is_common_to_all_ranks():
    """Else `synchronize` would count it once for every rank that loaded it."""
    tracker, loaded = CorrectnessTracker(3), CorrectnessTracker(3)
    tracker.update(torch.tensor([0, 2]), torch.tensor([True, False]))
    loaded.load_state_dict(tracker.state_dict())
    assert loaded.merged.equal(tracker.history)


@pytest.mark.parametrize("settings", [{}, {"validate_args": False}, {"validate_args": True}])
def test_validate_args_is_passed_on(monkeypatch, settings):
    passed = record_validate_args(monkeypatch)
    tracker = CorrectnessTracker(SAMPLES, **settings)
    tracker.update(indices(0, 1), torch.tensor([True, False]))
    tracker(indices(0))
    assert passed == [settings.get("validate_args")] * 3  # indices and correct, indices
