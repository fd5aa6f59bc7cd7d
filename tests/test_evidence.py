"""BetaEvidenceLoss and the exact uncertainties of evidence, against quadrature."""

import copy
import math
from decimal import Decimal, localcontext

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from cases import plain_mutual_information
from support import Bad, close, gradient, record_validate_args, refused
from uncertainty_mm import BetaEvidenceLoss
from uncertainty_mm.functional import (
    beta_evidence_kl,
    beta_evidence_loss,
    beta_expected_entropy,
    beta_mutual_information,
)

PAIRS = [[0.0, 0.0], [3.0, 0.5], [0.25, 7.0], [40.0, 20.0]]
EVIDENCE = torch.tensor([PAIRS], dtype=torch.float64)
LABELS = torch.tensor([[1, 0, 1, 0]])
UNKNOWN = torch.tensor([[False, True, False, False]])


def expectation(a, b, function):
    """Of `function(logit, log density)` under a Beta distribution, by the trapezoidal rule along the logit."""
    logit = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    log_p, log_q = F.logsigmoid(logit), F.logsigmoid(-logit)
    log_density = (a - 1) * log_p + (b - 1) * log_q
    log_density = log_density - (math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    mass = (log_density + log_p + log_q).exp() * (logit[1] - logit[0])
    return (mass * function(logit, log_density)).sum()


def advanced(steps, **kwargs):
    loss = BetaEvidenceLoss(**kwargs)
    for _ in range(steps):
        loss.advance()
    return loss


def entropy(logit, _=None):
    return torch.distributions.Bernoulli(logits=logit).entropy()


# ------------------------------------------------------------------------------------ closed forms


def test_entropies_are_those_of_quadrature():
    expected = [expectation(e + 1, f + 1, entropy) for e, f in PAIRS]
    actual = beta_expected_entropy(EVIDENCE)[0]
    close(actual, torch.stack(expected))
    logit = (EVIDENCE[0] + 1).log()
    close(beta_mutual_information(EVIDENCE)[0] + actual, entropy(logit[:, 0] - logit[:, 1]))


@pytest.mark.parametrize("label", [0, 1])
def test_divergence_is_that_of_quadrature(label):
    left = [(1, f + 1) if label else (e + 1, 1) for e, f in PAIRS]
    expected = [expectation(a, b, lambda _, log_density: log_density) for a, b in left]
    close(beta_evidence_kl(EVIDENCE, torch.full((1, 4), label))[0], torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_of_little_evidence_keeps_its_digits(dtype):
    wrong = torch.cat([torch.logspace(-17, 4, 64), torch.linspace(0.15, 0.25, 64)]).to(dtype)
    evidence = torch.stack([torch.zeros_like(wrong), wrong], 1).unsqueeze(0).requires_grad_()
    actual = beta_evidence_kl(evidence, torch.ones(1, len(wrong)))
    with localcontext() as context:
        context.prec = 60
        exact = [Decimal(x) for x in wrong.tolist()]
        values = [float((1 + e).ln() - e / (1 + e)) for e in exact]
        slopes = [float(e / (1 + e) ** 2) for e in exact]
    tolerance = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 0}
    slope = gradient(actual, evidence)[0][0, :, 1]
    for x, expected in ((actual[0].detach(), values), (slope, slopes)):
        torch.testing.assert_close(
            x.double(), torch.tensor(expected, dtype=torch.float64), **tolerance
        )


@pytest.mark.parametrize("size", [1e3, 1e6, 1e30])
def test_much_evidence_has_little_information(size):
    evidence = torch.tensor([[[size, size]]])
    assert abs(beta_mutual_information(evidence).item() * 4 * size - 1) < 2 / size + 1e-4
    assert abs(beta_expected_entropy(evidence).item() - math.log(2)) < 1 / size + 1e-6


def test_float32_has_the_information_of_float64():
    evidence = torch.logspace(-4, 3, 20)
    evidence = torch.cartesian_prod(evidence, evidence).unsqueeze(0)
    wanted = plain_mutual_information(None, evidence.double())
    actual = beta_mutual_information(evidence)
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=0)
    assert (actual <= math.log(2) - 0.5 + 1e-6).all()


@pytest.mark.parametrize("value", [0.0, 6e4, 3e38])
def test_extremes_give_numbers_and_gradients(value):
    for pair in ((value, value), (value, 0.0), (0.0, value)):
        evidence = torch.tensor([[pair]]).clamp_max(6e4 if value == 6e4 else math.inf)
        evidence = (evidence.half() if value == 6e4 else evidence).requires_grad_()
        results = [f(evidence) for f in (beta_expected_entropy, beta_mutual_information)]
        results += [advanced(10)(evidence, torch.ones(1, 1))]
        grads = gradient(sum(x.sum() for x in results), evidence)
        assert all(x.isfinite().all() for x in (*results, *grads))
        assert all(x.dtype == torch.float32 for x in results)


def test_passes_gradcheck():
    evidence = (EVIDENCE + 0.1).requires_grad_()
    for function in (beta_expected_entropy, beta_mutual_information):
        assert gradcheck(function, evidence)
    assert gradcheck(lambda evidence: advanced(3)(evidence, LABELS, UNKNOWN), evidence)


# ------------------------------------------------------------------------------------------ annealing


@pytest.mark.parametrize(("steps", "weight"), [(0, 0.0), (1, 0.25), (4, 1.0), (7, 1.0)])
def test_divergence_counts_by_the_step(steps, weight):
    given = EVIDENCE, LABELS, UNKNOWN
    wanted = beta_evidence_loss(*given) + weight * beta_evidence_kl(*given)
    for reduction, result in (("none", wanted), ("sum", wanted.sum()), ("mean", wanted.sum() / 3)):
        close(advanced(steps, annealing_steps=4, reduction=reduction)(*given), result)


def test_only_misleading_evidence_costs():
    grad = gradient(advanced(10)(evidence := EVIDENCE.clone().requires_grad_(), LABELS), evidence)[
        0
    ]
    right = grad.gather(-1, 1 - LABELS.unsqueeze(-1))
    assert (right < 0).all()
    assert (grad.sum(-1, keepdim=True) - right > 0).all()


def test_unknown_labels_have_no_part():
    loss, none = advanced(5), torch.ones_like(UNKNOWN)
    evidence = EVIDENCE.clone()
    evidence[UNKNOWN] = math.nan
    result = loss(evidence.requires_grad_(), LABELS.masked_fill(UNKNOWN, -1), UNKNOWN)
    close(result, loss(EVIDENCE[~UNKNOWN].unsqueeze(0), LABELS[~UNKNOWN].unsqueeze(0)))
    assert (gradient(result, evidence)[0][UNKNOWN] == 0).all()
    assert loss(evidence, LABELS, none) == 0


def test_step_is_state():
    loss = advanced(3)
    fresh = BetaEvidenceLoss()
    fresh.load_state_dict(loss.state_dict())
    assert fresh.step == copy.deepcopy(loss).half().step == 3
    assert fresh.step.dtype == torch.int64
    loss(EVIDENCE, LABELS)
    assert loss.step == 3  # a forward pass changes nothing
    loss.reset_parameters()
    assert loss.step == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_sees_the_step_of_the_first_pass(use_reentrant):
    loss = advanced(5)
    evidence, plain = (EVIDENCE.clone().requires_grad_() for _ in range(2))

    def run(evidence):
        return loss(evidence.square(), LABELS)

    for x, each in (
        (evidence, lambda x: checkpoint(run, x, use_reentrant=use_reentrant)),
        (plain, run),
    ):
        (each(x) + each(2 * x)).backward()
    close(evidence.grad, plain.grad)

    def advancing(evidence):
        result = run(evidence)
        loss.advance()
        return result

    with pytest.raises(RuntimeError, match="outside the checkpointed function"):
        checkpoint(advancing, evidence, use_reentrant=use_reentrant).backward()


def test_compiles_once_for_all_steps():
    loss, twin = BetaEvidenceLoss(annealing_steps=3), BetaEvidenceLoss(annealing_steps=3)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def run(evidence):
        result = loss(evidence, LABELS)
        loss.advance()
        return result

    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(5):
            close(run(EVIDENCE), twin(EVIDENCE, LABELS))
            twin.advance()
    assert loss.step == 5
    torch.compiler.reset()


# ---------------------------------------------------------------------------------------- bad input


def test_validate_args_reaches_the_checks(monkeypatch):
    passed = record_validate_args(monkeypatch)
    beta_expected_entropy(EVIDENCE, validate_args=True)
    beta_mutual_information(EVIDENCE, validate_args=True)
    beta_evidence_kl(EVIDENCE, LABELS, validate_args=True)
    assert passed
    assert all(passed)
    BetaEvidenceLoss(validate_args=True)(EVIDENCE, LABELS)
    assert True in passed


LOSS = BetaEvidenceLoss()


@pytest.mark.parametrize(
    "case",
    [
        Bad(
            "steps",
            lambda _: BetaEvidenceLoss(annealing_steps=0),
            ValueError,
            "`annealing_steps` to be a positive integer, but got 0",
        ),
        Bad(
            "reduction",
            lambda _: BetaEvidenceLoss(reduction="max"),
            ValueError,
            "`reduction` to be one of",
        ),
        Bad("negative", lambda _: LOSS(-EVIDENCE, LABELS), ValueError, "`evidence` to be in"),
        Bad("labels", lambda _: LOSS(EVIDENCE, 2 * LABELS), ValueError, "`labels` to hold only"),
        Bad(
            "shape",
            lambda _: LOSS(EVIDENCE, LABELS[:, :2]),
            ValueError,
            r"`labels` to have shape \(B=1, Q=4\)",
        ),
        Bad(
            "unknown",
            lambda _: LOSS(EVIDENCE, LABELS, LABELS),
            TypeError,
            "`unknown` to have a bool dtype",
        ),
        Bad(
            "sides",
            lambda _: beta_expected_entropy(EVIDENCE[0]),
            ValueError,
            r"`evidence` to have shape \(B, Q, 2\)",
        ),
        Bad(
            "infinite",
            lambda _: beta_mutual_information(EVIDENCE + math.inf),
            ValueError,
            "`evidence` to be finite",
        ),
    ],
    ids=lambda case: case.name,
)
def test_bad_input_is_refused(case):
    refused(case, None, lambda _: LOSS.step)
