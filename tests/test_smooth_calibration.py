"""The calibration error without bins: against its integral, and the properties that its paper proves."""

import itertools
import math

import pytest
import torch

from support import Bad, close, refused
from uncertainty_mm import metrics
from uncertainty_mm.metrics.functional import calibration_error, smooth_calibration_error


def predictions(n=200, power=2.0, q=1):
    """Probabilities, and labels that are calibrated at power 1."""
    probs = torch.rand(n, q, dtype=torch.float64)
    return probs, (torch.rand(n, q) < probs**power).long()


def naive(p, y, sigma, points=2001):
    """The integral by trapezia, with the reflected kernel as a sum over the images of every sample."""
    t = torch.linspace(0, 1, points, dtype=torch.float64).unsqueeze(1)
    reach = 1 + math.ceil(4 * sigma)
    kernel = sum(
        torch.exp(-((t - image - 2 * k) ** 2) / (2 * sigma**2))
        for k in range(-reach, reach + 1)
        for image in (p, -p)
    ) / (sigma * math.sqrt(2 * math.pi))
    return torch.trapezoid((kernel * (y - p)).mean(1).abs(), dx=1 / (points - 1))


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.7])
def test_it_is_the_integral_of_the_smoothed_gap(sigma):
    probs, labels = predictions(q=2)
    expected = [naive(p, y, sigma) for p, y in zip(probs.T, labels.T, strict=True)]
    actual = smooth_calibration_error(probs, labels, bandwidth=sigma, average="none")
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=0)


def test_the_bandwidth_is_where_the_error_equals_it():
    for power in (0.5, 1.0, 2.0):
        probs, labels = predictions(power=power)
        error = float(smooth_calibration_error(probs, labels))
        close(smooth_calibration_error(probs, labels, bandwidth=error), error)
        assert naive(probs[:, 0], labels[:, 0], error).item() == pytest.approx(error, rel=1e-3)


def test_it_falls_with_the_bandwidth_between_its_limits():
    probs, labels = predictions(50)
    probs = (probs * 8).round() / 8  # on points of the grid
    of_values = sum(
        float((labels - probs)[probs == value].sum().abs()) for value in probs.unique()
    ) / len(probs)
    widths = [1e-7, 1e-4, 2e-4, 5e-4, 0.01, 0.1, 1.0, 30.0]
    errors = [float(smooth_calibration_error(probs, labels, bandwidth=w)) for w in widths]
    assert errors[0] == pytest.approx(of_values)
    assert errors[-1] == pytest.approx(float((labels - probs).mean().abs()))
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))
    assert errors[-1] <= smooth_calibration_error(probs, labels) <= errors[0]


def test_it_vanishes_where_probabilities_are_frequencies():
    probs = torch.tensor([0.3] * 10 + [0.0] * 3 + [1.0] * 4, dtype=torch.float64).unsqueeze(1)
    labels = torch.tensor([1] * 3 + [0] * 10 + [1] * 4).unsqueeze(1)
    close(smooth_calibration_error(probs, labels), 0)
    errors = [float(smooth_calibration_error(*predictions(n, power=1.0))) for n in (50, 20_000)]
    assert errors[1] < 0.03 < errors[0]


def test_it_finds_what_the_calibration_error_finds():
    made = [predictions(3000, power) for power in (1.0, 1.3, 1.8, 3.0)]
    smooth = [float(smooth_calibration_error(*data)) for data in made]
    binned = [float(calibration_error(*data)) for data in made]
    assert smooth == sorted(smooth)
    assert binned == sorted(binned)
    assert smooth[-1] == pytest.approx(binned[-1], rel=0.05)


def test_shifted_probabilities_have_the_error_of_the_shift():
    # The gap is the same everywhere, so smoothing takes nothing off; reflected, not cut off, at the ends.
    probs = torch.linspace(0, 0.8, 2001, dtype=torch.float64).unsqueeze(1)
    labels = torch.ones_like(probs)
    shifted = 0.5 * probs, labels
    close(smooth_calibration_error(*shifted), (1 - 0.5 * probs).mean())


def test_it_does_not_jump_where_a_bin_ends():
    labels = torch.tensor([[0], [1]] * 20)
    base = torch.full((40, 1), 0.5, dtype=torch.float64)
    step = 1e-4 * (1 - 2 * labels)  # all of one label to either side
    before, after = (smooth_calibration_error(base + s, labels) for s in (step, -step))
    assert abs(before - after) < 3e-4
    binned = [calibration_error(base + s, labels, n_bins=2) for s in (step, -step)]
    assert min(binned) > 0.4


def test_unknown_labels_are_left_out():
    probs, labels = predictions(60, q=3)
    unknown = torch.rand(60, 3) < 0.3
    unknown[:, 1] = True
    alone = [
        smooth_calibration_error(probs[~out, q : q + 1], labels[~out, q : q + 1])
        for q, out in enumerate(unknown.T)
    ]
    spoilt = probs.masked_fill(unknown, float("nan")), labels.masked_fill(unknown, -1), unknown
    actual = smooth_calibration_error(*spoilt, average="none")
    torch.testing.assert_close(actual, torch.stack(alone), equal_nan=True)
    close(smooth_calibration_error(*spoilt), torch.stack(alone).nanmean())


PROBS, LABELS = predictions(4)
BAD = [
    Bad("width", lambda w: w(bandwidth=0.0), ValueError, "`bandwidth` to be a number above 0"),
    Bad("type", lambda w: w(bandwidth="wide"), TypeError, "`bandwidth` to be a number above 0"),
    Bad("average", lambda w: w(average="micro"), ValueError, "`average` to be one of"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "call",
    [
        lambda **settings: smooth_calibration_error(PROBS, LABELS, **settings),
        lambda **settings: metrics.MultilabelSmoothCalibrationError(1, **settings),
    ],
)
def test_bad_settings_are_refused(case, call):
    refused(case, call)
