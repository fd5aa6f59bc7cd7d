"""DecisionFusion: a table of what each rule does; `python tests/test_decisions.py` prints it."""

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from support import Bad, close, gradient, poisoned, record_validate_args, refused
from uncertainty_mm import DecisionFusion
from uncertainty_mm.decisions import DecisionRule
from uncertainty_mm.functional import logistic_normal_probs

RULES = get_args(DecisionRule)
MISSING = torch.tensor([[False] * 3, [True, False, False], [False, True, True], [True] * 3])


def drawn(*shape):
    """Logits, their standard deviations and confidences."""
    logits = 3 * torch.randn(*shape, dtype=torch.float64)
    return logits, *(0.1 + 0.8 * torch.rand(2, *shape, dtype=torch.float64))


def fuse(rule, given, missing=None, **kwargs):
    logits, std, confidence = given
    fusion = DecisionFusion(rule, **kwargs)
    return fusion(logits, std=std, confidence=confidence, missing=missing)


def of(values, **kwargs):
    """One sample with one label, a number a modality."""
    values = [values, *(kwargs.get(name, [0.5] * len(values)) for name in ("std", "confidence"))]
    return tuple(torch.tensor(x, dtype=torch.float64).view(1, -1, 1) for x in values)


def same(left, right):
    return all(
        torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(left, right, strict=True)
    )


def parts(given, modalities):
    return [x[:, modalities] for x in given]


# ---------------------------------------------------------------------------- the table of identities


def one_is_the_result(rule):
    given = drawn(4, 1, 5)
    fused = fuse(rule, given)
    assert (fused.weights == 1).all()
    assert (fused.conflict == 0).all()
    if rule == "precision":
        close(fused.probs, logistic_normal_probs(*given[:2]).squeeze(1))
    return same([fused.logits], [given[0][:, 0]])


def sure_one_is_the_result(rule):
    logits, std, confidence = drawn(4, 1, 5)
    return same([fuse(rule, (logits, 0 * std, confidence)).logits], [logits[:, 0]])


def copies_are_one(rule):
    one = drawn(4, 1, 5)
    fused = fuse(rule, parts(one, [0] * 3))
    assert (fused.conflict < 1e-12).all()
    close(fused.weights, torch.full((4, 3, 5), 1 / 3).double(), torch.float32)
    return same([fused.logits], [fuse(rule, one).logits])


def order_changes_nothing(rule):
    given = drawn(4, 3, 5)
    fused = fuse(rule, given, MISSING)
    orders = itertools.permutations(range(3))
    turned = [(fuse(rule, parts(given, x), MISSING[:, x]), x) for x in orders]
    return all(same(x, fused._replace(weights=fused.weights[:, order])) for x, order in turned)


def masked_is_absent(rule):
    given = drawn(4, 3, 5)
    fused = fuse(rule, [poisoned(x, MISSING) for x in given], MISSING)
    answers = []
    for sample, mask in enumerate(MISSING):
        left = fuse(rule, [x[sample : sample + 1, ~mask] for x in given])
        masked = fused._replace(weights=fused.weights[:, ~mask])
        answers.append(same([x[sample : sample + 1] for x in masked], left))
    assert (fused.weights[MISSING] == 0).all()
    return all(answers)


def infinite_std_does_not_count(rule):
    logits, std, confidence = drawn(4, 3, 5)
    std[:, 1] = math.inf
    fused = fuse(rule, (logits, std, confidence))
    left = fuse(rule, parts((logits, std, confidence), [0, 2]))
    return same(fused._replace(weights=fused.weights[:, [0, 2]]), left)


def none_gives_zero(rule):
    fused = fuse(rule, drawn(2, 3, 5), torch.ones(2, 3, dtype=torch.bool))
    return all((x == 0).all() for x in fused)


def weights_sum_to_one(rule):
    weights = fuse(rule, drawn(4, 3, 5), MISSING).weights
    assert (weights >= 0).all()
    return same([weights.sum(1)[:3]], [torch.ones(3, 5).double()])


IDENTITIES = {  # and the rules for which they do not hold
    one_is_the_result: ["precision"],
    sure_one_is_the_result: [],
    copies_are_one: [],
    order_changes_nothing: [],
    masked_is_absent: [],
    infinite_std_does_not_count: ["mean", "energy", "predictive"],
    none_gives_zero: [],
    weights_sum_to_one: [],
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda identity: identity.__name__)
def test_table_of_identities(identity, rule):
    assert identity(rule) == (rule not in IDENTITIES[identity])


# --------------------------------------------------------------------------------- what each rule is


def test_precisions_are_averaged_by_the_weights_of_the_logits():
    fused = fuse("precision", of([2.0, -1.0], std=[1.0, 2.0]))
    close(fused.weights.flatten(), [0.8, 0.2])
    variance = 1 / (0.8 * 1 + 0.2 * 0.25)
    close(fused.logits.flatten(), [1.4 / (1 + math.pi / 8 * variance) ** 0.5])


def test_a_vague_modality_hardly_counts():
    vague, alone = (fuse("precision", of(x, std=s)) for x, s in (([2, -9], [1, 1e6]), ([2], [1])))
    assert abs(vague.logits - alone.logits) < 1e-9


def test_energy_is_that_of_all_labels():
    logits = torch.tensor([[[1.0, -2.0], [0.5, 3.0]]], dtype=torch.float64)
    energy = torch.log1p(logits.exp()).sum(-1)
    weights = DecisionFusion("energy")(logits).weights
    close(weights, (energy / energy.sum(1)).unsqueeze(-1).expand_as(logits))


def test_belief_is_the_own_confidence_and_what_others_leave():
    fused = fuse("predictive", of([2.0, -2.0], confidence=[0.8, 0.3]))  # equally decided
    total = math.log(0.8) + math.log(0.3)
    beliefs = torch.tensor([0.8 + math.log(0.3) / total, 0.3 + math.log(0.8) / total])
    close(fused.weights.flatten(), beliefs.softmax(0), torch.float32)


def test_undecided_modalities_are_believed_less():
    fused = fuse("predictive", of([math.log(3), math.log(9)], confidence=[0.5, 0.5]))
    calibrated = torch.tensor([0.25 / 0.4, 1.0])  # probabilities of 0.75 and 0.9
    close(fused.weights.flatten(), calibrated.softmax(0), torch.float32)


def test_modalities_that_are_all_sure_are_believed_equally():
    fused = fuse("predictive", of([2.0, 2.0, 2.0], confidence=[1.0, 1.0, 1.0]))
    close(fused.weights.flatten(), [1 / 3] * 3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("logits", "conflict"),
    [
        ([100.0, -100.0], 1.0),
        ([100.0, 100.0, -100.0, -100.0], 1.0),
        ([100.0, 100.0], 0.0),
        ([100.0, -100.0, -100.0], 0.918295834),  # entropy of 1/3
        ([0.0, 100.0], 0.811278124 - 0.5),
    ],
)
def test_conflict_is_in_bits(rule, logits, conflict):
    assert abs(fuse(rule, of(logits, std=[0.0] * len(logits))).conflict - conflict) < 1e-6


def test_conflict_is_that_of_the_expected_probabilities():
    given = of([3.0, -3.0], std=[1e3, 1e3])
    assert fuse("precision", given).conflict < 1e-4 < 0.5 < fuse("mean", given).conflict


@pytest.mark.parametrize(("largest", "error"), [(1.0, 0.005), (100.0, 0.018)])
def test_expected_probability_is_near_quadrature(largest, error):
    """The largest errors that were found: 0.0046 at (3.8, 1), and 0.01767 at 1.75 standard deviations."""
    z = torch.linspace(-12, 12, 8_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / (2 * math.pi) ** 0.5 * (z[1] - z[0])
    worst = 0.0
    for std in torch.linspace(0, 1, 9, dtype=torch.float64) ** 3 * largest:
        mean = torch.linspace(0, 8, 81, dtype=torch.float64) * std.clamp_min(1)
        exact = (density * (mean.unsqueeze(1) + std * z).sigmoid()).sum(1)
        difference = logistic_normal_probs(mean, std.expand_as(mean)) - exact
        worst = max(worst, difference.abs().max().item())
    assert 0.9 * error < worst < error


def test_expected_probability_of_any_std():
    close(logistic_normal_probs(torch.tensor(3.0), torch.tensor(0.0)), torch.tensor(3.0).sigmoid())
    mean = torch.full((2,), 100.0, requires_grad=True)
    std = torch.tensor([3e38, math.inf], requires_grad=True)
    probs = logistic_normal_probs(mean, std)
    close(probs, [0.5, 0.5])
    assert all(x.isfinite().all() for x in gradient(probs, mean, std))


# ------------------------------------------------------------------------------------- the limits


@pytest.mark.parametrize("rule", RULES)
def test_passes_gradcheck(rule):
    inputs = tuple(x.requires_grad_() for x in drawn(4, 3, 2))
    assert gradcheck(lambda *given: fuse(rule, given, MISSING), inputs)


def test_expected_probability_passes_gradcheck():
    mean, std, _ = drawn(4)
    assert gradcheck(logistic_normal_probs, (mean.requires_grad_(), std.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("std", "confidence"),
    [((0, 0, 0),) * 2, ((0, 1e4, 1), (1, 1, 1)), ((1e4, 1e4, math.inf), (0, 1, 1e-4))],
)
@pytest.mark.parametrize("logits", [(100, -100, 0), (-100, -100, -100), (0, 0, 0), (100, 100, 1)])
@pytest.mark.parametrize("rule", RULES)
def test_extremes_give_numbers_and_gradients(rule, logits, std, confidence, dtype):
    given = [
        torch.tensor(x, dtype=dtype).expand(4, 3).unsqueeze(-1).clone().requires_grad_()
        for x in (logits, std, confidence)
    ]
    fused = fuse(rule, given, MISSING)
    grads = gradient(sum(x.sum() for x in fused), *given)
    assert all(x.isfinite().all() for x in (*fused, *grads))
    assert all(x.dtype == torch.float32 for x in fused)
    assert all((x[MISSING] == 0).all() for x in grads)
    assert ((fused.logits >= min(*logits, 0)) & (fused.logits <= max(*logits, 0))).all()


@pytest.mark.parametrize("rule", RULES)
def test_no_modality_is_none_that_is_missing(rule):
    assert all((x == 0).all() for x in fuse(rule, drawn(2, 0, 5)))


def test_shares_of_energy_are_exact_where_energies_are_no_numbers():
    weights = DecisionFusion("energy")(torch.tensor([[[-200.0], [-201.0]]])).weights
    close(weights.flatten(), torch.tensor([1.0, 0.0]).softmax(0))


@given(seed=st.integers(0, 2**16), rule=st.sampled_from(RULES), size=st.sampled_from([1e-3, 1, 50]))
def test_results_are_in_their_ranges(seed, rule, size):
    torch.manual_seed(seed)
    logits, std, confidence = drawn(3, 4, 2)
    fused = fuse(rule, (size * logits, size * std, confidence))
    low, high = torch.cat([size * logits, 0 * logits[:, :1]], 1).aminmax(dim=1)
    assert ((fused.logits >= low) & (fused.logits <= high)).all()
    assert ((fused.conflict >= 0) & (fused.conflict <= 1)).all()
    close(fused.probs, fused.logits.sigmoid())


# ---------------------------------------------------------------------------------------- bad input


def test_validate_args_reaches_the_checks(monkeypatch):
    passed = record_validate_args(monkeypatch)
    fuse("mean", of([1.0]), validate_args=True)
    logistic_normal_probs(torch.ones(1), torch.ones(1), validate_args=True)
    assert passed
    assert all(passed)


ONE = torch.ones(1, 2, 3)


@pytest.mark.parametrize(
    "case",
    [
        Bad("rule", lambda _: DecisionFusion("sum"), ValueError, "`rule` to be one of"),
        Bad(
            "no std",
            lambda _: DecisionFusion("precision")(ONE),
            ValueError,
            "`std` with rule 'precision', but got None",
        ),
        Bad(
            "no confidence",
            lambda _: DecisionFusion("predictive")(ONE),
            ValueError,
            "`confidence` with rule 'predictive', but got None",
        ),
        Bad("nan", lambda _: fuse("mean", of([math.nan])), ValueError, "`logits` to be finite"),
        Bad(
            "std", lambda _: fuse("precision", of([1.0], std=[-1.0])), ValueError, "`std` to be in"
        ),
        Bad(
            "confidence",
            lambda _: fuse("predictive", of([1.0], confidence=[1.5])),
            ValueError,
            r"`confidence` to be in \[0, 1\], but got 1.5",
        ),
        Bad(
            "shape",
            lambda _: DecisionFusion("precision")(ONE, std=ONE[:, :1]),
            ValueError,
            r"`std` to have shape \(B=1, M=2, Q=3\), but got \(1, 1, 3\)",
        ),
        Bad("integer", lambda _: DecisionFusion("mean")(ONE.long()), TypeError, "`logits` to have"),
        Bad(
            "mask",
            lambda _: DecisionFusion("mean")(ONE, missing=ONE[..., 0]),
            TypeError,
            "`missing` to have a bool dtype",
        ),
        Bad(
            "negative",
            lambda _: logistic_normal_probs(ONE, -ONE),
            ValueError,
            r"`std` to be in \[0",
        ),
    ],
    ids=lambda case: case.name,
)
def test_bad_input_is_refused(case):
    refused(case, None)
