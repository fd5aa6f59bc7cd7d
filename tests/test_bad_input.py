"""Everything that can be wrong with an argument or a file, tried on every public call of the library.

One table: a `Bad` case is a call that must raise the stated error, whose message names the argument, the rule and what
was received. Cases are grouped by component. A `Component` says what the calls are made on, what its state is and how
it is used; after a refused call the state is the same to the bit, and a use gives what it gives without that call.
The command lines have their own table, in `test_bad_commands.py`.
"""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import uncertainty_mm as umm
from support import Bad
from uncertainty_mm import DiagonalGaussian, functional

NAN, INF = math.nan, math.inf
B, M, Q, K, D = 3, 2, 3, 4, 5


class Component(NamedTuple):
    """What a group of bad calls is made on."""

    cases: list[Bad]
    given: Callable[[Path], object] = lambda folder: None  # made anew for every case
    state: Callable[[object], object] = lambda given: None
    use: Callable[[object], object] = lambda given: None


def rejects(name, call, message, error=ValueError):
    """A case whose message has the wording of the library: `rejects(..., "`x` to be ..., but got 5")`."""
    return Bad(name, call, error, f"^Expected {message}$")


def rejects_type(name, call, message):
    return rejects(name, call, message, TypeError)


def ints(*values):
    return torch.tensor(values)


def filled(shape, value, place, wrong):
    x = torch.full(shape, value)
    x[place] = wrong
    return x


def meta(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device="meta")


LABELS = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 1]])
ANY = ".*"  # what was received, where it is long
TENSOR_LIST = "but got list"
POSITIVE = "to be a positive integer, but got"
SHAPE = r"to have shape \({}\), but got \({}\)"

# ----------------------------------------------------------------------------------------- Gaussians


def latent(shape=(B, M, Q, K), mean=0.5, std=0.5):
    return DiagonalGaussian(torch.full(shape, mean), torch.full(shape, std))


def with_std(value):
    return latent()._replace(std=filled((B, M, Q, K), 0.5, (0, 0, 0, 0), value))


def with_mean(value):
    return latent()._replace(mean=filled((B, M, Q, K), 0.5, (0, 0, 0, 0), value))


# ---------------------------------------------------------------------------------------- ordinality


def ordinal(change, mask=None):
    arguments = {"std_norm": torch.ones(B), "distance": torch.ones(B), "correctness": torch.ones(B)}
    return lambda loss: loss(**(arguments | change), mask=mask)


def build_ordinality(**change):
    return lambda _: umm.SoftRankOrdinalityLoss(**change)


ORDINALITY = [
    rejects(
        "mode unknown",
        build_ordinality(mode="ranks"),
        r"`mode` to be one of \['rank', 'raw', 'standardized'\], but got 'ranks'",
    ),
    rejects_type(
        "pairs a word",
        build_ordinality(pairs="SR"),
        r"`pairs` to be a sequence such as \(.*\), but got 'SR'",
    ),
    rejects(
        "no pair", build_ordinality(pairs=()), "`pairs` to name at least one pair, but got none"
    ),
    rejects(
        "pair unknown",
        build_ordinality(pairs=("RS",)),
        r"`pairs` to be one of \['DR', 'DS', 'SR'\], but got 'RS'",
    ),
    rejects(
        "pair twice",
        build_ordinality(pairs=("SR", "SR")),
        r"`pairs` to name each pair once, but got \('SR', 'SR'\)",
    ),
    rejects(
        "temperature 0",
        build_ordinality(temperature=0),
        "`temperature` to be a number above 0, but got 0",
    ),
    rejects_type(
        "temperature a tensor",
        build_ordinality(temperature=torch.tensor(1.0)),
        r"`temperature` to be a number above 0, but got tensor\(1\.\)",
    ),
    rejects(
        "std_norm 0", ordinal({"std_norm": torch.zeros(B)}), "`std_norm` to be above 0, but got 0.0"
    ),
    rejects(
        "std_norm nan",
        ordinal({"std_norm": torch.full((B,), NAN)}),
        "`std_norm` to be finite, but got 3 NaN .*",
    ),
    rejects(
        "std_norm of a matrix",
        ordinal({"std_norm": torch.ones(B, 1)}),
        "`std_norm` " + SHAPE.format("B", "3, 1"),
    ),
    rejects(
        "distance above 1",
        ordinal({"distance": torch.full((B,), 2.0)}),
        r"`distance` to be in \[0, 1\], but got 2.0",
    ),
    rejects(
        "distance of another batch",
        ordinal({"distance": torch.ones(2)}),
        "`distance` " + SHAPE.format("B=3", "2,"),
    ),
    rejects(
        "correctness negative",
        ordinal({"correctness": -torch.ones(B)}),
        r"`correctness` to be in \[0, 1\], but got -1.0",
    ),
    rejects_type(
        "correctness bool",
        ordinal({"correctness": torch.ones(B).bool()}),
        r"`correctness` to have a floating dtype \(.*\), but got torch.bool",
    ),
    rejects(
        "correctness on another device",
        ordinal({"correctness": meta(B)}),
        "`correctness` to be on cpu, but got meta",
    ),
    rejects_type(
        "mask of numbers",
        ordinal({}, torch.zeros(B)),
        "`mask` to have a bool dtype, but got torch.float32",
    ),
    rejects(
        "mask of another batch",
        ordinal({}, torch.zeros(2).bool()),
        "`mask` " + SHAPE.format("B=3", "2,"),
    ),
]

# ------------------------------------------------------------------------------------------- tracker


def tracker_with_history(folder=None):
    tracker = umm.CorrectnessTracker(5, Q)
    tracker.update(ints(0, 1, 1), torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 0]]).bool())
    return tracker


def update(indices=None, correct=None, mask=None):
    indices = ints(0, 4) if indices is None else indices
    correct = torch.ones(2, Q) if correct is None else correct
    return lambda tracker: tracker.update(indices, correct, mask)


TRACKER = [
    rejects("no sample", lambda _: umm.CorrectnessTracker(0), f"`num_samples` {POSITIVE} 0"),
    rejects("no label", lambda _: umm.CorrectnessTracker(5, 0), f"`num_labels` {POSITIVE} 0"),
    rejects(
        "prior above 1",
        lambda _: umm.CorrectnessTracker(5, prior=2),
        r"`prior` to be a number in \[0, 1\], but got 2",
    ),
    rejects_type(
        "prior a word",
        lambda _: umm.CorrectnessTracker(5, prior="0"),
        r"`prior` to be a number in \[0, 1\], but got '0'",
    ),
    rejects(
        "index too large",
        update(ints(0, 5)),
        r"`indices` to be in \[0, 4\], but got values from 0 to 5",
    ),
    rejects(
        "index negative",
        update(ints(-1, 0)),
        r"`indices` to be in \[0, 4\], but got values from -1 to 0",
    ),
    rejects_type(
        "a mask for indices",
        update(torch.tensor([True, False])),
        r"`indices` to have an integer dtype \(.*\), but got torch.bool",
    ),
    rejects_type(
        "indices of 16 bits without sign",
        update(ints(0, 1).to(torch.uint16)),
        r"`indices` to have an integer dtype \(.*\), but got torch.uint16",
    ),
    rejects_type(
        "fractions for indices",
        update(torch.tensor([0.0, 1.0])),
        r"`indices` to have an integer dtype \(.*\), but got torch.float32",
    ),
    rejects_type("a list for indices", update([0, 1]), f"`indices` to be a tensor, {TENSOR_LIST}"),
    rejects(
        "indices on another device",
        update(meta(2, dtype=torch.int64)),
        "`indices` to be on cpu, but got meta",
    ),
    rejects(
        "reading: index too large",
        lambda t: t(ints(9)),
        r"`indices` to be in \[0, 4\], but got values from 9 to 9",
    ),
    rejects(
        "counts: index negative",
        lambda t: t.counts(ints(-2)),
        r"`indices` to be in \[0, 4\], but got values from -2 to -2",
    ),
    rejects(
        "forgetting: wrong rank",
        lambda t: t.forgetting_events(ints([0])),
        "`indices` " + SHAPE.format("B", "1, 1"),
    ),
    rejects(
        "correct without labels",
        update(correct=torch.ones(2)),
        "`correct` " + SHAPE.format("B=2, Q=3", "2,"),
    ),
    rejects(
        "correct of another batch",
        update(correct=torch.ones(3, Q)),
        "`correct` " + SHAPE.format("B=2, Q=3", "3, 3"),
    ),
    rejects(
        "correct above 1",
        update(correct=torch.full((2, Q), 1.5)),
        r"`correct` to be in \[0, 1\], but got 1.5",
    ),
    rejects(
        "correct nan",
        update(correct=filled((2, Q), 1.0, (1, 2), NAN)),
        r"`correct` to be in \[0, 1\], but got nan",
    ),
    rejects_type(
        "correct an integer",
        update(correct=torch.ones(2, Q).long()),
        "`correct` to have a bool or floating dtype, but got torch.int64",
    ),
    rejects(
        "correct on another device",
        update(correct=meta(2, Q)),
        "`correct` to be on cpu, but got meta",
    ),
    rejects_type(
        "mask of numbers",
        update(mask=torch.zeros(2, Q)),
        "`mask` to have a bool dtype, but got torch.float32",
    ),
    rejects(
        "mask of samples",
        update(mask=torch.zeros(2).bool()),
        "`mask` " + SHAPE.format("B=2, Q=3", "2,"),
    ),
    Bad(
        "state of more samples",
        lambda t: t.load_state_dict(umm.CorrectnessTracker(6, Q).state_dict()),
        RuntimeError,
        r"Expected `history` to have shape \(3, 5, 3\), but got \(3, 6, 3\)",
    ),
    Bad(
        "state without the last predictions",
        lambda t: t.load_state_dict({"history": torch.ones(3, 5, Q, dtype=torch.int64)}),
        RuntimeError,
        'Missing key.*"last"',
    ),
]

# --------------------------------------------------------------------------------------- calibration


def calibration(folder=None):
    torch.manual_seed(0)
    return umm.PlattScaling(Q).fit(torch.randn(20, Q), torch.randint(2, (20, Q)))


CALIBRATION = [
    rejects_type(
        "labels by name",
        lambda _: umm.PlattScaling(["happy"]),
        rf"`num_labels` {POSITIVE} \['happy'\]",
    ),
    rejects_type(
        "per_label None",
        lambda _: umm.PlattScaling(Q, per_label=None),
        "`per_label` to be True or False, but got None",
    ),
    rejects_type(
        "shift 0", lambda _: umm.PlattScaling(Q, shift=0), "`shift` to be True or False, but got 0"
    ),
    rejects(
        "logits of one sample",
        lambda c: c(torch.zeros(Q)),
        "`logits` " + SHAPE.format("B, Q=3", "3,"),
    ),
    rejects(
        "logits of other labels",
        lambda c: c(torch.zeros(B, 2)),
        "`logits` " + SHAPE.format("B, Q=3", "3, 2"),
    ),
    rejects(
        "infinite logits",
        lambda c: c(torch.full((B, Q), INF)),
        "`logits` to be finite, but got 9 NaN .*",
    ),
    rejects_type(
        "integer logits",
        lambda c: c(torch.zeros(B, Q).long()),
        r"`logits` to have a floating dtype \(.*\), but got torch.int64",
    ),
    rejects(
        "logits on another device", lambda c: c(meta(B, Q)), "`logits` to be on cpu, but got meta"
    ),
    rejects(
        "fit: nan",
        lambda c: c.fit(torch.full((B, Q), NAN), LABELS),
        "`logits` to be finite, but got 9 NaN .*",
    ),
    rejects(
        "fit: no sample",
        lambda c: c.fit(torch.zeros(0, Q), torch.zeros(0, Q)),
        "`logits` to hold at least one sample, but got none",
    ),
    rejects(
        "fit: labels of another batch",
        lambda c: c.fit(torch.zeros(B, Q), LABELS[:2]),
        "`labels` " + SHAPE.format("B=3, Q=3", "2, 3"),
    ),
    rejects(
        "fit: a label of 3",
        lambda c: c.fit(torch.zeros(B, Q), LABELS * 3),
        "`labels` to hold only 0 and 1, but got 3",
    ),
    rejects(
        "fit: soft labels",
        lambda c: c.fit(torch.zeros(B, Q), LABELS * 0.5),
        "`labels` to hold only 0 and 1, but got 0.5",
    ),
    rejects(
        "fit: labels on another device",
        lambda c: c.fit(torch.zeros(B, Q), meta(B, Q)),
        "`labels` to be on cpu, but got meta",
    ),
    rejects_type(
        "fit: labels of lists",
        lambda c: c.fit(torch.zeros(B, Q), LABELS.tolist()),
        f"`labels` to be a tensor, {TENSOR_LIST}",
    ),
    Bad(
        "state of other labels",
        lambda c: c.load_state_dict({"scale": torch.full((Q,), 2.0), "shift": torch.ones(2)}),
        RuntimeError,
        r"Expected `shift` to have shape \(3,\), but got \(2,\)",
    ),
    Bad(
        "state of another class",
        lambda c: c.load_state_dict(umm.CorrectnessTracker(3).state_dict()),
        RuntimeError,
        'Missing key.*"scale", "shift"',
    ),
]

# ---------------------------------------------------------------------------------------- functional

ROWS, CLASSES = torch.eye(4), ints(0, 0, 1, 1)


def supcon(embeddings=ROWS, classes=CLASSES, **options):
    return lambda _: functional.supcon_loss(embeddings, classes, **options)


FUNCTIONAL = [
    rejects("supcon: vector", supcon(torch.ones(4)), "`embeddings` " + SHAPE.format("N, E", "4,")),
    rejects(
        "supcon: without features",
        supcon(torch.ones(4, 0)),
        r"`embeddings` to have at least one feature, but got shape \(4, 0\)",
    ),
    rejects(
        "supcon: nan",
        supcon(filled((4, 4), 1.0, (0, 0), NAN)),
        "`embeddings` to be finite, but got 1 NaN .*",
    ),
    rejects_type(
        "supcon: bool classes",
        supcon(classes=CLASSES.bool()),
        r"`classes` to have an integer dtype \(.*\), but got torch.bool",
    ),
    rejects_type(
        "supcon: classes without sign",
        supcon(classes=CLASSES.to(torch.uint32)),
        r"`classes` to have an integer dtype \(.*\), but got torch.uint32",
    ),
    rejects(
        "supcon: too few classes",
        supcon(classes=CLASSES[:3]),
        "`classes` " + SHAPE.format("N=4", "3,"),
    ),
    rejects(
        "supcon: classes elsewhere",
        supcon(classes=meta(4, dtype=torch.int64)),
        "`classes` to be on cpu, but got meta",
    ),
    rejects_type(
        "supcon: anchors by number",
        supcon(anchor_mask=ints(0, 1, 1, 1)),
        "`anchor_mask` to have a bool dtype, but got torch.int64",
    ),
    rejects(
        "supcon: bank without classes",
        supcon(bank=ROWS),
        "`bank` and `bank_classes` together, but got `bank` without `bank_classes`",
    ),
    rejects(
        "supcon: bank of another width",
        supcon(bank=torch.ones(2, 3), bank_classes=ints(0, 1)),
        "`bank` " + SHAPE.format("Q, E=4", "2, 3"),
    ),
    rejects(
        "supcon: infinite bank",
        supcon(bank=torch.full((1, 4), INF), bank_classes=ints(0)),
        "`bank` to be finite, but got 4 NaN .*",
    ),
    rejects(
        "supcon: temperature infinite",
        supcon(temperature=INF),
        "`temperature` to be a number above 0, but got inf",
    ),
    rejects(
        "supcon: reduction unknown",
        supcon(reduction="avg"),
        r"`reduction` to be one of \['mean', 'none', 'sum'\], but got 'avg'",
    ),
    rejects(
        "embedding: number",
        lambda _: functional.distribution_embedding(torch.tensor(1.0), torch.tensor(1.0)),
        r"`mean` to have shape \(\.\.\., K\), but got \(\)",
    ),
    rejects(
        "embedding: negative std",
        lambda _: functional.distribution_embedding(torch.ones(2), -torch.ones(2)),
        r"`std` to be in \[0, inf\], but got -1.0",
    ),
    rejects(
        "soft rank: matrix",
        lambda _: functional.soft_rank(torch.ones(2, 2)),
        "`scores` " + SHAPE.format("B", "2, 2"),
    ),
    rejects(
        "soft rank: infinite",
        lambda _: functional.soft_rank(torch.tensor([INF, 0.0])),
        "`scores` to be finite, but got 1 NaN .*",
    ),
    rejects(
        "soft rank: temperature 0",
        lambda _: functional.soft_rank(torch.ones(2), 0.0),
        "`temperature` to be a number above 0, but got 0.0",
    ),
    rejects(
        "soft rank: mask of another batch",
        lambda _: functional.soft_rank(torch.ones(2), mask=torch.zeros(3).bool()),
        "`mask` " + SHAPE.format("B=2", "3,"),
    ),
    rejects(
        "divergence: lengths differ",
        lambda _: functional.ordinality_divergence(torch.ones(2), torch.ones(3)),
        "`b` " + SHAPE.format("B=2", "3,"),
    ),
    rejects(
        "divergence: devices",
        lambda _: functional.ordinality_divergence(torch.ones(2), meta(2)),
        "`b` to be on cpu, but got meta",
    ),
]

PROBS = torch.full((B, Q), 0.25)
SCORES = torch.tensor([0.1, 0.5, 0.3])


# ---------------------------------------------------------------------------------------- the tests


def module_state(module):
    return module.state_dict()


COMPONENTS = {
    "SoftRankOrdinalityLoss": Component(
        ORDINALITY,
        lambda _: umm.SoftRankOrdinalityLoss(),
        module_state,
        lambda o: o(SCORES, SCORES, SCORES),
    ),
    "CorrectnessTracker": Component(
        TRACKER,
        tracker_with_history,
        lambda t: (t.state_dict(), t.merged),
        lambda t: (update()(t), t(ints(0, 1, 4))),
    ),
    "PlattScaling": Component(
        CALIBRATION, calibration, module_state, lambda c: c(torch.ones(B, Q))
    ),
    "functional": Component(
        FUNCTIONAL, state=lambda _: (ROWS, CLASSES), use=lambda _: supcon()(None)
    ),
}


def same(a, b):
    """Equal to the bit, tensors at any depth."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def all_cases():
    return [
        pytest.param(component, case, id=f"{component}: {case.name}")
        for component, (cases, *_) in COMPONENTS.items()
        for case in cases
    ]


@pytest.mark.parametrize(("component", "case"), all_cases())
def test_refused_and_unchanged(component, case, tmp_path):
    _, given, state, use = COMPONENTS[component]
    each, untouched = given(tmp_path / "given"), given(tmp_path / "untouched")
    before = copy.deepcopy(state(each))
    with pytest.raises(Exception, match=case.message) as caught:
        case.call(each)
    assert type(caught.value) is case.error
    assert "\n" not in str(caught.value) or case.error is RuntimeError  # those are torch's
    assert same(state(each), before)
    assert same(use(each), use(untouched))


def test_cases_have_names_of_their_own():
    for component, (cases, *_) in COMPONENTS.items():
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), component


def test_every_public_call_has_cases():
    beside = {"EmotionQueryAttention", "DiagonalGaussian", "GaussianDecoupler"}  # their other tests
    beside |= {"UncertaintyGatedFusion", "FusedPrediction", "functional"}
    beside |= {"DistributionSupConLoss", "EmbeddingQueue"}
    assert set(umm.__all__) - beside <= set(COMPONENTS)
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for name in functional.__all__:
        assert re.search(rf"\bfunctional\.{name}\(", source), name
