"""BeliefFusion by its closed forms, and the loss of Beta evidence against quadrature."""

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from support import Bad, close, gradient, poisoned, record_validate_args, refused
from uncertainty_mm import BeliefFusion
from uncertainty_mm.beliefs import BeliefRule
from uncertainty_mm.functional import beta_evidence_loss

RULES = get_args(BeliefRule)
MISSING = torch.tensor([[False] * 3, [True, False, False], [False, True, True], [True] * 3])


def of(*modalities, dtype=torch.float64):
    """One sample with one label: (evidence for, evidence against) of each modality."""
    return torch.tensor(modalities, dtype=dtype).view(1, -1, 1, 2)


def random_evidence(*shape):
    return 5 * torch.rand(*shape, 2, dtype=torch.float64)


@pytest.fixture(params=RULES)
def fusion(request):
    return BeliefFusion(request.param)


def same(left, right):
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize(
    ("rule", "evidence"),
    [
        ("cumulative", [4.0, 10.0]),
        ("average", [2.0, 5.0]),
        ("dempster", [2 * (2 * 2 - 1), 2 * (2 * 5 - 1)]),
    ],
)
def test_evidence_is_that_of_the_rule(rule, evidence):
    fused = BeliefFusion(rule)(of((2, 2), (2, 8)))
    close(fused.evidence.flatten(), evidence)
    close(fused.probs.flatten(), [(evidence[0] + 1) / (sum(evidence) + 2)])
    close(fused.uncertainty.flatten(), [2 / (sum(evidence) + 2)])


def test_dempster_is_the_orthogonal_sum():
    first, second = (8.0, 1.0), (3.0, 5.0)

    def masses(e):
        return [x / (sum(e) + 2) for x in (*e, 2)]

    (b1, d1, u1), (b2, d2, u2) = masses(first), masses(second)
    kept = 1 - b1 * d2 - d1 * b2
    wanted = (b1 * b2 + b1 * u2 + u1 * b2) / kept, (d1 * d2 + d1 * u2 + u1 * d2) / kept
    fused = BeliefFusion("dempster")(of(first, second))
    total = fused.evidence.sum() + 2
    close((fused.evidence / total).flatten(), wanted)
    close(fused.uncertainty.flatten(), [u1 * u2 / kept])


def test_discounting_multiplies_belief_by_trust():
    first, second = (18.0, 0.0), (0.0, 6.0)
    conflict = (19 / 20 - 1 / 8) * (18 / 20) * (6 / 8)
    fused = BeliefFusion("discounted")(of(first, second))
    close(fused.conflict.flatten(), [conflict])

    def trusted(e):  # belief trust * e / (e + 2), and the rest is uncertain
        belief = (1 - conflict) * e / (e + 2)
        return 2 * belief / (1 - belief)

    close(fused.evidence.flatten(), [trusted(18.0), trusted(6.0)])


def test_discounted_is_cumulative_without_conflict():
    copies = random_evidence(4, 1, 5).expand(4, 3, 5, 2)
    same(BeliefFusion("discounted")(copies), BeliefFusion("cumulative")(copies))


def test_the_odd_one_out_is_trusted_least():
    fused = BeliefFusion("discounted")(of((50, 0), (50, 0), (0, 50)))
    for_it, against = fused.evidence.flatten()
    assert for_it > 10 * against
    sure = BeliefFusion("dempster")(of((50, 0), (0, 50)))
    unsure = BeliefFusion("discounted")(of((50, 0), (0, 50)))
    alone = 2 / 52
    assert sure.uncertainty < alone < 0.5 < unsure.uncertainty


# ------------------------------------------------------------------------------------- identities


def test_order_changes_nothing(fusion):
    evidence = random_evidence(4, 3, 5)
    fused = fusion(evidence, MISSING)
    for order in itertools.permutations(range(3)):
        same(fusion(evidence[:, order], MISSING[:, order]), fused)


def test_masked_is_absent(fusion):
    evidence = random_evidence(4, 3, 5)
    fused = fusion(poisoned(evidence, MISSING), MISSING)
    for sample, mask in enumerate(MISSING):
        left = fusion(evidence[sample : sample + 1, ~mask])
        same([x[sample : sample + 1] for x in fused], left)


def test_one_is_the_result(fusion):
    evidence = random_evidence(4, 1, 5)
    fused = fusion(evidence)
    close(fused.evidence, evidence[:, 0])
    assert (fused.conflict == 0).all()


@pytest.mark.parametrize("modalities", [0, 3])
def test_no_modality_is_no_evidence(fusion, modalities):
    mask = torch.ones(2, modalities, dtype=torch.bool)
    evidence = random_evidence(2, modalities, 5).requires_grad_()
    fused = fusion(evidence, mask)
    for x, value in zip(fused, (0, 0.5, 1, 0), strict=True):
        assert (x == value).all()
    assert (gradient(sum(x.sum() for x in fused), evidence)[0] == 0).all()


@pytest.mark.parametrize("rule", ["cumulative", "dempster", "discounted"])
def test_no_evidence_changes_nothing(rule):
    evidence = random_evidence(4, 2, 5)
    more = torch.cat([evidence, torch.zeros(4, 2, 5, 2)], 1)
    same(BeliefFusion(rule)(more), BeliefFusion(rule)(evidence))


def test_no_evidence_is_averaged():
    close(BeliefFusion("average")(of((4, 2), (0, 0))).evidence.flatten(), [2.0, 1.0])


def test_copies_are_averaged(fusion):
    evidence = random_evidence(4, 1, 5)
    fused = fusion(evidence.expand(4, 3, 5, 2))
    assert (fused.conflict < 1e-12).all()
    surer = fused.uncertainty < fusion(evidence).uncertainty - 1e-3
    assert surer.all() != (fusion.rule == "average")


@pytest.mark.parametrize(
    ("modalities", "conflict"),
    [
        (((1e6, 0), (0, 1e6)), 1.0),
        (((1e6, 0), (0, 1e6), (0, 0)), 1.0),  # who says nothing is of neither side
        (((1e6, 1e6), (1e6, 1e6)), 0.0),
        (((1e6, 0), (0, 0)), 0.0),
        (((1e6, 0), (1e6, 1e6)), 0.5),
    ],
)
def test_conflict_is_that_of_sure_opinions(fusion, modalities, conflict):
    assert abs(fusion(of(*modalities)).conflict.item() - conflict) < 1e-4


@given(
    seed=st.integers(0, 2**16), rule=st.sampled_from(RULES), size=st.sampled_from([1e-3, 1, 1e6])
)
def test_results_are_in_their_ranges(seed, rule, size):
    torch.manual_seed(seed)
    evidence = size * random_evidence(3, 3, 2)
    fused = BeliefFusion(rule)(evidence)
    assert (fused.evidence >= 0).all()
    assert ((fused.probs > 0) & (fused.probs < 1)).all()
    assert ((fused.uncertainty > 0) & (fused.uncertainty <= 1)).all()
    assert ((fused.conflict >= 0) & (fused.conflict <= 1)).all()
    close(fused.probs, (fused.evidence[..., 0] + 1) / (fused.evidence.sum(-1) + 2))


@pytest.mark.parametrize("value", [0.0, 6e4, 1e30, 3e38])
def test_no_evidence_is_too_much(fusion, value):
    evidence = torch.full((1, 8, 1, 2), value).index_fill(3, torch.tensor(1), 0).requires_grad_()
    fused = fusion(evidence)
    grads = gradient(sum(x.sum() for x in fused[1:]), evidence)
    assert all(x.isfinite().all() for x in (*fused, *grads))
    assert fused.probs > 0.99 or value == 0
    half = fusion(evidence.detach().clamp_max(6e4).half())
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in half)


@pytest.mark.parametrize("rule", ["cumulative", "average", "discounted"])
def test_gradient_of_much_evidence_is_finite(rule):
    evidence = (1e30 * random_evidence(4, 3, 2).float()).requires_grad_()
    fused = BeliefFusion(rule)(evidence)
    assert gradient(sum(x.sum() for x in fused), evidence)[0].isfinite().all()


def test_no_labels_are_no_error(fusion):
    assert [x.shape for x in fusion(torch.ones(2, 3, 0, 2))] == [(2, 0, 2), *[(2, 0)] * 3]


def test_dempster_knows_the_side_also_where_its_evidence_is_beyond_the_dtype():
    surest = of(*[(1e6, 2e6)] * 8, dtype=torch.float32)
    close(BeliefFusion("dempster")(surest).probs.flatten(), [1 / (1 + 2**8)])


def test_passes_gradcheck(fusion):
    evidence = (0.1 + random_evidence(4, 3, 2)).requires_grad_()
    assert gradcheck(lambda evidence: fusion(evidence, MISSING), evidence)


# -------------------------------------------------------------------------------- loss of evidence


def test_loss_is_the_expected_cross_entropy():
    nodes, weights = np.polynomial.legendre.leggauss(2000)
    p = torch.tensor((nodes + 1) / 2)
    evidence = torch.tensor([[[0.0, 0.0], [3.0, 0.5], [0.25, 7.0], [40.0, 20.0]]]).double()
    for label in (0, 1):
        loss = beta_evidence_loss(evidence, torch.full((1, 4), label))
        for (e, f), actual in zip(evidence[0], loss[0], strict=True):
            density = torch.distributions.Beta(e + 1, f + 1).log_prob(p).exp()
            surprise = -p.log() if label else -torch.log1p(-p)
            wanted = (torch.tensor(weights) / 2 * density * surprise).sum()
            assert abs(actual - wanted) < 1e-5


def test_loss_is_the_mean_over_draws():
    evidence = torch.tensor([[[3.0, 0.5]]]).double()
    p = torch.distributions.Beta(4.0, 1.5).sample((400_000,))
    for label, wanted in ((1, -p.log()), (0, -torch.log1p(-p))):
        loss = beta_evidence_loss(evidence, torch.tensor([[label]]))
        assert abs(loss.item() - wanted.mean().item()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("more", [0.0, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("size", [0.0, 1.0, 10.0, 1e3, 1e6])
def test_loss_keeps_its_digits(size, more, dtype):
    """Against sums of reciprocals: digamma(a + n) - digamma(a) = sum of 1 / (a + i) over i < n."""
    evidence = torch.tensor([[[size, more]]], dtype=dtype, requires_grad=True)
    loss = beta_evidence_loss(evidence, torch.ones(1, 1))
    steps = np.arange(int(more) + 1)
    wanted = math.fsum(1 / (size + 1 + steps))
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    assert abs(loss.item() / wanted - 1) < rtol
    slope = gradient(loss, evidence)[0][0, 0, 0].item()
    assert abs(slope / -math.fsum(1 / (size + 1 + steps) ** 2) - 1) < 100 * rtol


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loss_of_half_precision_is_that_of_float32(dtype):
    evidence = (100 * torch.rand(4, 3, 2)).to(dtype)
    labels = torch.randint(2, (4, 3))
    loss = beta_evidence_loss(evidence, labels)
    assert torch.equal(loss, beta_evidence_loss(evidence.float(), labels))


def test_unknown_labels_have_no_part():
    unknown = torch.tensor([[True, False]])
    evidence = torch.tensor([[[math.nan, -1.0], [2.0, 3.0]]], requires_grad=True)
    loss = beta_evidence_loss(evidence, torch.tensor([[math.nan, 1.0]]), unknown)
    assert loss[0, 0] == 0
    assert loss[0, 1] > 0
    grad = gradient(loss, evidence)[0]
    assert (grad[0, 0] == 0).all()
    assert (grad[0, 1] != 0).all()


def test_loss_passes_gradcheck():
    evidence = random_evidence(4, 3).requires_grad_()
    labels = torch.randint(2, (4, 3))
    assert gradcheck(lambda evidence: beta_evidence_loss(evidence, labels), evidence)


# ---------------------------------------------------------------------------------------- bad input


def test_validate_args_reaches_the_checks(monkeypatch):
    passed = record_validate_args(monkeypatch)
    BeliefFusion("average", validate_args=True)(of((1, 1)))
    beta_evidence_loss(random_evidence(1, 1), torch.ones(1, 1), validate_args=True)
    assert passed
    assert all(passed)


CUMULATIVE = BeliefFusion("cumulative")
ONE = torch.ones(1, 1)


@pytest.mark.parametrize(
    "case",
    [
        Bad("rule", lambda _: BeliefFusion("sum"), ValueError, "`rule` to be one of"),
        Bad("negative", lambda _: CUMULATIVE(of((-1, 1))), ValueError, r"`evidence` to be in \[0"),
        Bad(
            "infinite",
            lambda _: CUMULATIVE(of((math.inf, 1))),
            ValueError,
            "`evidence` to be finite",
        ),
        Bad(
            "sides",
            lambda _: CUMULATIVE(torch.ones(1, 2, 3, 3)),
            ValueError,
            r"\(B, M, Q, 2\).*3\)",
        ),
        Bad(
            "integer",
            lambda _: CUMULATIVE(of((1, 1)).long()),
            TypeError,
            "`evidence` to have a float",
        ),
        Bad(
            "mask",
            lambda _: CUMULATIVE(of((1, 1)), MISSING),
            ValueError,
            r"`missing`.*\(B=1, M=1\)",
        ),
        Bad(
            "labels",
            lambda _: beta_evidence_loss(random_evidence(1, 1), 2 * ONE),
            ValueError,
            "`labels` to hold only 0 and 1, but got 2",
        ),
        Bad(
            "loss of negative",
            lambda _: beta_evidence_loss(-random_evidence(1, 1), ONE),
            ValueError,
            "`evidence` to be in",
        ),
        Bad(
            "unknown",
            lambda _: beta_evidence_loss(random_evidence(1, 1), ONE, ONE),
            TypeError,
            "`unknown` to have a bool dtype",
        ),
    ],
    ids=lambda case: case.name,
)
def test_bad_input_is_refused(case):
    refused(case, None)
