"""PlaceClassifier: what is left out has no influence, what is unlike the training data has less."""

import math

import pytest
import torch
from torch import nn

from cases import plain_places
from support import HALF, Bad, close, poisoned, record_validate_args, refused
from uncertainty_mm.places import PlaceClassifier

DIMS, LONGEST, LABELS = {"upper": 3, "lower": 2}, {"upper": 6, "lower": 4}, 5
BOTH, ONES = torch.ones(7, 2), torch.ones(7)


def build(**options):
    return PlaceClassifier(
        DIMS, LONGEST, LABELS, **{"num_reads": 4, "hidden_dim": 16, "dropout": 0.0} | options
    )


def draw(dtype=torch.float32):
    """Some steps are padding; the second sample lacks `lower`."""
    features = {name: torch.randn(7, LONGEST[name], dim, dtype=dtype) for name, dim in DIMS.items()}
    padding = {name: torch.rand(x.shape[:2]) < 0.4 for name, x in features.items()}
    padding["upper"][:, 0] = padding["lower"][:, 0] = False
    padding["lower"][1] = True
    return features, padding


def results(module, features, *others):
    """Logits, and the gradients of parameters and features."""
    leaves = {name: x.detach().requires_grad_() for name, x in features.items()}
    logits = module(leaves, *others)
    wanted = [*module.parameters(), *leaves.values()]
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), wanted)]


def all_equal(left, right):
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def test_equals_a_loop_over_the_sequences():
    module, (features, padding) = build().double(), draw(torch.float64)
    factor = 1 + 3 * torch.rand(7, 2, dtype=torch.float64)
    close(module(features, padding, factor), plain_places(module, features, padding, factor))


def test_sequences_may_be_shorter_than_the_longest_and_masks_are_optional():
    module, (features, padding) = build(), draw()
    short = {name: x[:, :3] for name, x in features.items()}
    padding = {name: torch.arange(steps).expand(7, -1) >= 3 for name, steps in LONGEST.items()}
    for masks in (None, {}, {"upper": torch.zeros(7, 3).bool()}):
        close(module(short, masks), module(features, padding))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_padding_has_no_influence(value):
    module, (features, padding) = build(), draw()
    spoilt = {name: poisoned(x, padding[name], value) for name, x in features.items()}
    found = results(module, spoilt, padding, BOTH)
    assert all_equal(found, results(module, features, padding, BOTH))
    for grad, mask in zip(found[-2:], padding.values(), strict=True):
        assert not grad[mask].any()


def test_missing_modality_is_absent_or_padded():
    module, (features, padding) = build(), draw()
    upper = {"upper": features["upper"]}
    expected = module(upper, padding)
    gone = padding | {"lower": torch.ones_like(padding["lower"])}
    empty = features | {"lower": features["lower"][:, :0]}
    assert torch.equal(module(features, gone), expected)
    assert torch.equal(module(empty, {"upper": padding["upper"]}), expected)
    seen = module(features, padding)
    assert (seen == expected).all(1).tolist() == [False, True, *[False] * 5]
    everything = module(features, {name: torch.ones_like(mask) for name, mask in gone.items()})
    close(everything, module.classify(torch.zeros(7, 20)))


# ------------------------------------------------------------------------------------------- factor


def test_factor_of_one_changes_no_bit():
    module, (features, padding) = build(), draw()
    expected = results(module, features, padding)
    assert all_equal(results(module, features, padding, BOTH), expected)


def test_the_larger_the_factor_the_nearer_to_the_missing_modality():
    module, (features, padding) = build(), draw()
    features["lower"] = 10 * features["lower"]
    there = ~padding["lower"].all(1)
    missing = module({"upper": features["upper"]}, padding)
    distances = []
    for size in (1.0, 10.0, 1e4, math.inf):
        logits = module(features, padding, torch.stack([ONES, size * ONES], 1))
        distances.append((logits - missing).abs().amax(1)[there])
    nearest = torch.stack(distances)
    assert (nearest.diff(dim=0) < 0).all()
    assert (nearest[2] < 0.01).all()
    assert not nearest[3].any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_factor_may_be_of_higher_precision_than_the_module(dtype):
    module, (features, padding) = build().to(dtype), draw(dtype)
    logits = module(features, padding, 1e6 * BOTH)
    assert logits.dtype == dtype
    close(logits, module(features, padding, math.inf * BOTH))


# ----------------------------------------------------------------------------------------- learning


def test_learns_what_depends_on_the_place():
    """A step of 1 in the upper half or in the lower one: by content they are the same."""
    place = torch.arange(64) % 6
    features = {"upper": nn.functional.one_hot(place, 6).float().unsqueeze(2).expand(-1, -1, 3)}
    labels = (place < 3).float().unsqueeze(1).expand(-1, LABELS)
    module = build()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(module(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


# ---------------------------------------------------------------------------------------- bad input


def test_values_are_looked_at_as_told(monkeypatch):
    passed = record_validate_args(monkeypatch)
    build(validate_args=True)(*draw(), BOTH)
    assert passed.count(True) == 3  # two sequences and the factor


def make(**options):
    return lambda _: build(**options)


def ask(factor=None, padding=None, **changes):
    features = {name: torch.zeros(7, steps, DIMS[name]) for name, steps in LONGEST.items()}
    return lambda module: module(features | changes, padding, factor)


def bad(name, call, message, error=ValueError):
    return Bad(name, call, error, f"^Expected {message}$")


SIZES = {"upper": 3}
NAN = torch.full((7, 4, 2), math.nan)
BAD = [
    bad("no modality", lambda _: PlaceClassifier({}, {}, 1), "`modality_dims` .* but got none"),
    bad(
        "other names",
        lambda _: PlaceClassifier(DIMS, SIZES, 1),
        r"`max_steps` to name \['upper', 'lower'\], but got \['upper'\]",
    ),
    bad(
        "one length",
        lambda _: PlaceClassifier(DIMS, 9, 1),
        "`max_steps` to be a mapping .*, but got 9",
        TypeError,
    ),
    bad(
        "no step",
        lambda _: PlaceClassifier(SIZES, {"upper": 0}, 1),
        r"`max_steps\['upper'\]` to be a positive integer, but got 0",
    ),
    bad("no label", lambda _: PlaceClassifier(SIZES, SIZES, 0), "`num_labels` .*, but got 0"),
    bad("half a read", make(num_reads=0.5), "`num_reads` .*, but got 0.5", TypeError),
    bad("no width", make(hidden_dim=0), "`hidden_dim` .*, but got 0"),
    bad("dropout", make(dropout=1.0), r"`dropout` .* in \[0, 1\), but got 1.0"),
    bad("check 0", make(validate_args=0), "`validate_args` .*, but got 0", TypeError),
    bad("a tensor", lambda m: m(BOTH), "`features` to be a mapping .* Tensor", TypeError),
    bad("nothing", lambda m: m({}), "`features` to hold at least one modality, .*"),
    bad("other modality", ask(left=BOTH), r"`features` to hold only .* but got \['left'\]"),
    bad("narrow", ask(lower=NAN[..., :1]), r"`features\['lower'\]` to have shape .*\(7, 4, 1\)"),
    bad("long", ask(lower=torch.zeros(7, 5, 2)), r"`features\['lower'\]` .* 4 steps, but got 5"),
    bad("nan", ask(lower=NAN), r"`features\['lower'\]` to be finite, but got 56 .* values"),
    bad("batch", ask(lower=NAN[:2]), r"`features\['lower'\]` to have shape .*\(2, 4, 2\)"),
    bad(
        "mask of numbers",
        ask(padding={"lower": NAN[..., 0]}),
        r"`padding_mask\['lower'\]` .* bool .*",
        TypeError,
    ),
    bad("one factor", ask(ONES), r"`factor` to have shape \(B=7, M=2\), but got \(7,\)"),
    bad("whole factor", ask(BOTH.long()), "`factor` to have a floating .* torch.int64", TypeError),
    bad("factor 0", ask(0 * BOTH), "`factor` to be above 0, but got 0.0"),
    bad("factor nan", ask(math.nan * BOTH), "`factor` to be above 0, but got nan"),
    bad("elsewhere", ask(BOTH.to("meta")), "`factor` to be on cpu, but got meta"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_refuses(case):
    refused(case, build(), lambda module: module.state_dict())
