"""ConformalRiskControl, by hand and by simulation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support import Bad, refused
from uncertainty_mm import ConformalRiskControl

RISKS = [0.05, 0.1, 0.3]


def simulate(samples, labels=6):
    """Probabilities that are wrong, labels, and samples without any of them."""
    logits = torch.randn(samples, labels).double() - 1
    return (2 * logits + 1).sigmoid(), torch.bernoulli(logits.sigmoid())


def missed(sets, labels):
    """Mean share of the true labels that the sets miss."""
    return ((labels * ~sets).sum(1) / labels.sum(1).clamp_min(1)).mean().item()


@pytest.mark.parametrize("samples", [15, 60])
@pytest.mark.parametrize("risk", RISKS)
def test_risk_of_new_samples_is_at_most_what_was_asked_for(risk, samples):
    """Over 400 draws, each with 500 new samples; and not much less where samples are many."""
    risks = []
    for _ in range(400):
        control = ConformalRiskControl(risk).double().fit(*simulate(samples))
        probs, labels = simulate(500)
        risks.append(missed(control(probs), labels))
    risks = torch.tensor(risks)
    error = risks.std() / len(risks) ** 0.5
    assert risks.mean() <= risk + 3 * error
    assert risks.mean() >= risk - 2 / (samples + 1) - 3 * error  # Angelopoulos et al., theorem 2


@given(
    seed=st.integers(0, 2**16),
    samples=st.integers(1, 30),
    risk=st.floats(0, 1),
    ties=st.booleans(),
)
def test_threshold_is_the_largest_that_controls(seed, samples, risk, ties):
    torch.manual_seed(seed)
    probs, labels = simulate(samples)
    probs = (5 * probs).round() / 5 if ties else probs
    threshold = ConformalRiskControl(risk).double().fit(probs, labels).threshold.item()

    def controls(t):
        total = sum(
            missed(row >= t, y) for row, y in zip(probs.split(1), labels.split(1), strict=True)
        )
        return (total + 1) / (samples + 1) <= risk + 1e-12

    candidates = [0.0, 1.0, *probs.flatten().tolist()]
    assert threshold == max([t for t in candidates if controls(t)], default=0.0)


def test_by_hand():
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.2, 0.7], [0.6, 0.4]])
    labels = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 1]])
    # (sum of shares + 1) / 5: 0.2 up to 0.4, 0.3 up to 0.6, 0.4 up to 0.7, 0.6 up to 0.8
    for risk, threshold in ((0.19, 0), (0.2, 0.4), (0.3, 0.6), (0.4, 0.7), (0.6, 0.8), (1, 1)):
        assert (
            ConformalRiskControl(risk).fit(probs, labels).threshold
            == torch.tensor(threshold).float()
        )


def test_few_samples_predict_everything():
    probs, labels = simulate(8)
    control = ConformalRiskControl(0.1).fit(probs, labels)  # 1 / 9 > 0.1
    assert control.threshold == 0
    assert control(torch.zeros(1, 6)).all()


def test_sets_grow_as_the_risk_falls():
    batch, probs = simulate(100), simulate(50)[0]
    sets = [ConformalRiskControl(risk).double().fit(*batch)(probs) for risk in RISKS]
    assert (sets[0] >= sets[1]).all()
    assert (sets[1] >= sets[2]).all()


def test_sample_of_which_nothing_is_known_does_not_count():
    """Ten samples control a risk of 0.1, nine known ones do not... but for what one label leaves."""
    probs, labels = torch.full((9, 2), 0.5), torch.ones(9, 2)
    unknown = torch.zeros(9, 2, dtype=torch.bool)
    assert ConformalRiskControl(0.1).fit(probs, labels, unknown).threshold == 0.5
    unknown[0, 0] = True
    assert ConformalRiskControl(0.1).fit(probs, labels, unknown).threshold == 0.5
    unknown[0] = True
    assert ConformalRiskControl(0.1).fit(probs, labels, unknown).threshold == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_threshold_is_rounded_down(dtype):
    """A label that only just counted must count still."""
    probs = torch.tensor([[0.1 + 1e-9], [0.7 - 1e-9]]).double().repeat(5, 1)
    control = ConformalRiskControl(0.1).to(dtype).fit(probs, torch.ones(10, 1))
    assert control(probs).all()


BAD = [
    Bad("risk", lambda _: ConformalRiskControl(1.5), ValueError, "^Expected `risk` .* got 1.5$"),
    Bad("name", lambda _: ConformalRiskControl("a"), TypeError, "^Expected `risk` .* got 'a'$"),
    Bad(
        "logits", lambda c: c(torch.full((2, 6), 3.0)), ValueError, "^Expected `probs` .* got 3.0$"
    ),
    Bad("one", lambda c: c(torch.ones(6)), ValueError, r"^Expected `probs` to have shape \(B, Q\)"),
    Bad(
        "labels",
        lambda c: c.fit(torch.ones(2, 6), torch.ones(2, 5)),
        ValueError,
        r"^Expected `labels` to have shape \(B=2, Q=6\), but got \(2, 5\)$",
    ),
    Bad(
        "none",
        lambda c: c.fit(torch.ones(0, 6), torch.ones(0, 6)),
        ValueError,
        "^Expected `probs` to hold at least one sample",
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_refuses_and_stays_as_it_was(case):
    refused(case, ConformalRiskControl().fit(*simulate(20)), ConformalRiskControl.state_dict)


def test_threshold_of_another_risk_does_not_load():
    """Which would give its guarantee for the wrong risk."""
    source = ConformalRiskControl(0.3).fit(torch.rand(50, 3), torch.ones(50, 3))
    assert source.threshold > 0
    other = ConformalRiskControl(0.05)
    for options in ({}, {"strict": False}, {"assign": True}):
        with pytest.raises(
            RuntimeError, match=r"`meaning` to be `risk` 0\.05, but got `risk` 0\.3"
        ):
            other.load_state_dict(source.state_dict(), **options)
        assert other.threshold == 0
    same = ConformalRiskControl(0.3).half()
    same.load_state_dict(source.half().state_dict())
    assert same.threshold == source.threshold
