"""Figures: what is drawn is what was given."""

import itertools

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from scipy.stats import binomtest, spearmanr
from sklearn.manifold import TSNE

from support import Bad
from uncertainty_mm import plots
from uncertainty_mm.metrics import functional as measures

N, Q, M = 120, 4, 3
NAN = float("nan")
NAMES = ["happy", "sad", "anger", "fear"]
MODALITIES = ["text", "vision", "audio"]


def new_axes(count):
    return Figure().subplots(1, count, squeeze=False)[0]


def predictions():
    probs = torch.rand(N, Q)
    return probs, (torch.rand(N, Q) < probs).long()


CALLS = {
    "reliability_diagram": (lambda ax: plots.reliability_diagram(*predictions(), ax=ax), Q),
    "risk_coverage": (lambda ax: plots.risk_coverage(torch.rand(N), torch.rand(N), ax=ax), 1),
    "uncertainty_against_noise": (
        lambda ax: plots.uncertainty_against_noise(torch.rand(N, M), torch.rand(N, M) + 0.1, ax=ax),
        M,
    ),
    "modality_attribution": (
        lambda ax: plots.modality_attribution([0, 1], [[0.2, 0.8], [0.4, 0.6]], ax=ax),
        1,
    ),
    "latent_tsne": (lambda ax: plots.latent_tsne(torch.randn(5, M, Q, 3), ax=ax), 1),
    "attention_map": (lambda ax: plots.attention_map(torch.rand(Q, 9), ax=ax), 1),
    "label_correlation": (lambda ax: plots.label_correlation(*predictions()[::-1], ax=ax), 2),
    "training_curves": (
        lambda ax: plots.training_curves([{"epoch": 0, "loss/cls": 0.5, "val/miF1": 0.4}], ax=ax),
        2,
    ),
}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def test_every_plot_is_called():
    assert sorted(CALLS) == sorted(plots.__all__)


def test_new_axes_are_returned_and_the_figure_can_be_saved(call, tmp_path):
    draw, count = call
    drawn = draw(None)
    axes = [drawn] if count == 1 else list(drawn)
    assert len(axes) == count
    assert all(isinstance(ax, Axes) for ax in axes)
    assert isinstance(axes[0].figure, Figure)
    axes[0].figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_given_axes_are_drawn_into(call):
    draw, count = call
    given = new_axes(count)
    drawn = draw(given[0] if count == 1 else given)
    if count == 1:
        assert drawn is given[0]
    else:
        assert list(drawn) == list(given)
        assert list(draw(list(new_axes(count)))) != list(given)
    assert all(ax.has_data() for ax in given)


def test_wrong_number_of_axes_is_refused(call):
    draw, count = call
    if count > 1:
        with pytest.raises(ValueError, match=f"Expected `ax` to hold {count} Axes"):
            draw(new_axes(count + 1))


def test_global_state_is_left_alone(call):
    import matplotlib.pyplot as plt

    before, figures = dict(mpl.rcParams), plt.get_fignums()
    call[0](None)
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == figures


# ------------------------------------------------------------------------- what is drawn is what was given


@pytest.mark.parametrize("bins", [4, 10])
def test_reliability_shows_bins_counts_and_intervals(bins):
    probs, labels = predictions()
    axes = plots.reliability_diagram(probs, labels, NAMES, n_bins=bins)
    errors = measures.calibration_error(probs, labels, n_bins=bins, average="none")
    for q, ax in enumerate(axes):
        assert ax.get_title() == f"{NAMES[q]} (ECE {errors[q]:.3f})"
        [(line, _, [segments])] = ax.containers
        parts = [
            (probs[inside, q].double(), labels[inside, q])
            for inside in (probs[:, q] * bins).long() == torch.arange(bins).unsqueeze(1)
        ]
        filled = [(p, y) for p, y in parts if len(p)]
        expected = [[p.mean(), y.double().mean()] for p, y in filled]
        np.testing.assert_allclose(line.get_xydata(), expected, rtol=1e-6)
        for (_, y), segment in zip(filled, segments.get_segments(), strict=True):
            interval = binomtest(int(y.sum()), len(y)).proportion_ci(method="wilson")
            np.testing.assert_allclose(segment[:, 1], [interval.low, interval.high], atol=1e-6)
        [counts] = ax.child_axes
        assert [bar.get_height() for bar in counts.patches] == [len(p) for p, _ in parts]
        assert [int(text.get_text()) for text in counts.texts] == [len(p) for p, _ in parts]


def test_panels_of_new_figures_label_the_outer_ones_only():
    axes = plots.reliability_diagram(*predictions())  # three, and one below the first
    assert [ax.xaxis.label.get_visible() for ax in axes] == [False, True, True, True]
    assert [ax.yaxis.label.get_visible() for ax in axes] == [True, False, False, True]


def test_risk_coverage_shows_the_curves():
    errors = torch.randint(2, (N,))
    named = {"a": torch.rand(N), "b": torch.randint(3, (N,))}
    ax = plots.risk_coverage(named, errors)
    a, b, best, random = ax.lines
    for (name, uncertainty), line in zip(named.items(), (a, b), strict=True):
        curve = measures.risk_coverage(uncertainty, errors)
        assert line.get_label() == f"{name} (AURC {curve.aurc:.3f})"
        np.testing.assert_array_equal(line.get_xdata(), curve.coverage)
        np.testing.assert_array_equal(line.get_ydata(), curve.risk)
    np.testing.assert_allclose(best.get_ydata(), np.sort(errors).cumsum() / np.arange(1, N + 1))
    np.testing.assert_allclose(random.get_ydata(), errors.double().mean())


def test_noise_shows_samples_that_are_there_their_median_and_correlation():
    noise = torch.randint(4, (N, M)).double()
    std_norm, missing = torch.rand(N, M) + 0.1, torch.rand(N, M) < 0.3
    std_norm[missing] = float("nan")
    axes = plots.uncertainty_against_noise(noise, std_norm, MODALITIES, missing=missing)
    for m, ax in enumerate(axes):
        x, y = (z[~missing[:, m], m].numpy().astype(float) for z in (noise, std_norm))
        [points], [line] = ax.collections, ax.lines
        assert isinstance(points, PathCollection)
        np.testing.assert_array_equal(points.get_offsets(), np.stack([x, y], axis=1))
        expected = [[level, np.median(y[x == level])] for level in range(4)]
        np.testing.assert_allclose(line.get_xydata(), expected)
        assert ax.get_title() == f"{MODALITIES[m]} (Spearman {spearmanr(x, y).statistic:.2f})"
        assert ax.get_yscale() == "log"


def test_many_samples_are_counted_in_hexagons_and_grouped_by_mass():
    noise = torch.rand(3600, 1).double()
    [ax] = plots.uncertainty_against_noise(noise, noise.exp())
    [hexagons], [line] = ax.collections, ax.lines
    assert isinstance(hexagons, PolyCollection)
    assert hexagons.get_array().sum() == 3600
    medians = np.median(np.sort(noise[:, 0]).reshape(12, 300), axis=1)
    np.testing.assert_allclose(line.get_xdata(), medians)
    np.testing.assert_allclose(line.get_ydata(), np.exp(medians), rtol=1e-4)


def test_attribution_shows_a_line_for_each_modality():
    levels, shares = np.array([0, 0.5, 2]), torch.rand(3, M).softmax(1)
    ax = plots.modality_attribution(levels, shares, MODALITIES)
    for line, name, share in zip(ax.lines, MODALITIES, shares.T, strict=True):
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_xdata(), levels)
        np.testing.assert_allclose(line.get_ydata(), share)
    assert len({(line.get_color(), line.get_marker()) for line in ax.lines}) == M


def test_tsne_shows_its_points_coloured_by_label_and_marked_by_modality():
    embeddings, shown = torch.randn(12, M, Q, 5), torch.rand(12, M, Q) < 0.5
    embeddings[~shown] = float("nan")
    ax = plots.latent_tsne(embeddings, NAMES, MODALITIES, shown=shown, perplexity=5, seed=3)
    points = embeddings[shown].double().numpy()
    plane = TSNE(perplexity=5, random_state=3).fit_transform(points)
    _, modality, label = shown.nonzero(as_tuple=True)
    drawn = iter(ax.collections)
    shapes = set()
    for m in range(M):
        for q in range(Q):
            scatter = next(drawn)
            expected = plane[((modality == m) & (label == q)).numpy()]
            np.testing.assert_allclose(scatter.get_offsets(), expected)
            assert tuple(scatter.get_facecolor()[0][:3]) == to_rgba(plots.COLORS[q])[:3]
            shapes.add((m, scatter.get_paths()[0].vertices.tobytes()))
    assert len(shapes) == len({shape for _, shape in shapes}) == M
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [*NAMES, *MODALITIES]


def test_tsne_tells_more_labels_than_colours_apart():
    labels = len(plots.COLORS) + 1
    ax = plots.latent_tsne(torch.randn(4, 1, labels, 3))
    first, *_, last = ax.collections
    assert tuple(first.get_facecolor()[0][:3]) == to_rgba(plots.COLORS[0])[:3]
    assert len(last.get_facecolor()) == 0
    assert tuple(last.get_edgecolor()[0][:3]) == to_rgba(plots.COLORS[0])[:3]
    keys = ax.get_legend().legend_handles[:labels]
    assert [key.get_markerfacecolor() for key in keys] == [*plots.COLORS, "none"]


@pytest.mark.parametrize("steps", [1, 2, 60, 500])
def test_steps_have_whole_numbers_that_do_not_overlap(steps):
    figure = Figure(figsize=(2, 2), layout="constrained")
    ax = plots.attention_map(torch.rand(Q, steps), ax=figure.subplots())
    figure.canvas.draw()
    inside = [t for t in ax.get_xticklabels() if -0.5 <= t.get_position()[0] <= steps - 0.5]
    assert inside
    assert all(t.get_text().isdecimal() for t in inside)
    boxes = [t.get_window_extent() for t in inside]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_attention_shows_the_weights():
    weights = torch.rand(Q, 9)
    ax = plots.attention_map(weights, NAMES)
    [image] = ax.images
    np.testing.assert_allclose(image.get_array(), weights)
    assert image.get_clim()[0] == 0
    assert [t.get_text() for t in ax.get_yticklabels()] == NAMES
    assert len(ax.figure.axes) == 2  # with the scale of colours


def test_correlations_are_those_of_numpy_and_their_cosine_leaves_out_the_diagonal():
    probs, labels = predictions()
    labels[:, 2] = 0  # has no correlation
    axes = plots.label_correlation(labels, probs, NAMES)
    kept = [0, 1, 3]
    off = ~np.eye(3, dtype=bool)
    vectors = []
    for ax, data in zip(axes, (labels, probs), strict=True):
        [image] = ax.images
        drawn = image.get_array()[np.ix_(kept, kept)]
        expected = np.corrcoef(data[:, kept].double().numpy(), rowvar=False)
        np.testing.assert_allclose(drawn, expected)
        vectors.append(expected[off])
        assert image.get_clim() == (-1, 1)
    a, b = vectors
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert axes[1].get_title() == f"predicted (cosine similarity {cosine:.2f})"
    assert axes[0].images[0].get_array().mask[2].all()


def test_correlations_of_several_models_have_their_mean_difference_from_the_truth():
    probs, labels = predictions()
    axes = plots.label_correlation(labels, {"right": labels, "other": probs}, NAMES)
    assert [ax.get_title() for ax in axes[:2]] == ["true", "right (mean difference 0.000)"]
    true, _, other = (np.asarray(ax.images[0].get_array()) for ax in axes)
    apart = np.abs(true - other)[~np.eye(Q, dtype=bool)].mean()
    assert axes[2].get_title() == f"other (mean difference {apart:.3f})"
    with pytest.raises(ValueError, match=r"predictions of a model, but got \{\}"):
        plots.label_correlation(labels, {})


def test_tensors_with_a_gradient_arrays_and_lists_are_drawn_alike():
    shares = [[0.25, 0.75], [0.5, 0.5]]
    for given in (shares, np.array(shares)[::1], torch.tensor(shares, requires_grad=True)):
        ax = plots.modality_attribution([0, 1], given)
        np.testing.assert_array_equal(ax.lines[1].get_ydata(), [0.75, 0.5])


DRAWN = {
    "reliability_diagram": lambda t: plots.reliability_diagram(t(N, Q), t(N, Q).round()),
    "risk_coverage": lambda t: plots.risk_coverage({"a": t(N)}, t(N)),
    "uncertainty_against_noise": lambda t: plots.uncertainty_against_noise(t(N, M), t(N, M) + 0.1),
    "modality_attribution": lambda t: plots.modality_attribution(t(5), t(5, M) / M),
    "latent_tsne": lambda t: plots.latent_tsne(t(5, M, Q, 3)),
    "attention_map": lambda t: plots.attention_map(t(Q, 9)),
    "label_correlation": lambda t: plots.label_correlation(t(N, Q).round(), t(N, Q)),
    "of rows": lambda t: plots.attention_map([t(9) for _ in range(Q)]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_tensors_of_a_training_step_are_drawn(name):
    assert {*plots.__all__, "of rows"} == {*DRAWN, "training_curves"}

    def tensors(*shape):
        return torch.rand(shape, dtype=torch.bfloat16, requires_grad=True)

    assert DRAWN[name](tensors) is not None


@pytest.mark.parametrize("value", [NAN, -1.0])
def test_what_is_unknown_is_not_drawn(value):
    probs, labels = predictions()
    unknown = torch.rand(N, Q) < 0.3
    plots.reliability_diagram(probs, labels, unknown=unknown | (torch.arange(Q) == 1))  # none known
    given = [x.double().masked_fill(unknown, value) for x in (probs, labels)]
    axes = plots.reliability_diagram(*given, NAMES, unknown=unknown)
    for q, ax in enumerate(axes):
        known = ~unknown[:, q]
        [alone] = plots.reliability_diagram(
            probs[known, q : q + 1], labels[known, q : q + 1], NAMES[q : q + 1]
        )
        assert ax.get_title() == alone.get_title()
        [(line, *_)], [other, *_] = ax.containers, alone.containers
        np.testing.assert_allclose(line.get_xydata(), other[0].get_xydata(), rtol=1e-6)
    axes = plots.label_correlation(given[1], given[0], unknown=unknown)
    for ax, data in zip(axes, (labels, probs), strict=True):
        [image] = ax.images
        for a, b in itertools.combinations(range(Q), 2):
            both = ~unknown[:, a] & ~unknown[:, b]
            expected = np.corrcoef(data[both][:, [a, b]].double().numpy(), rowvar=False)[0, 1]
            np.testing.assert_allclose(image.get_array()[a, b], expected)


# ------------------------------------------------------------------------------------------ bad input


ONE = [[0.5]], [[1]]
BAD = [
    Bad(
        "p",
        lambda draw: draw([[1.5]], [[1]]),
        ValueError,
        r"`probs` to be in \[0, 1\], but got 1.5",
    ),
    Bad("labels", lambda draw: draw([[0.5]], [[2]]), ValueError, "`labels` to hold only 0 and 1"),
    Bad("shape", lambda draw: draw([[0.5]], [[1, 0]]), ValueError, "`labels` to have shape"),
    Bad("names", lambda draw: draw(*ONE, ["a", "b"]), ValueError, "`label_names` to hold 1 names"),
    Bad("word", lambda draw: draw(*ONE, "a"), ValueError, "`label_names` to hold 1 names, but got"),
    Bad("number", lambda draw: draw(*ONE, 1), TypeError, "`label_names` to hold names, but got 1"),
    Bad("bins", lambda draw: draw(*ONE, n_bins=0), ValueError, "`n_bins` to be a positive integer"),
    Bad("axes", lambda draw: draw(*ONE, ax=[]), ValueError, r"`ax` to hold 1 Axes, but got \[\]"),
    Bad(
        "mask", lambda draw: draw(*ONE, unknown=[[1]]), TypeError, "`unknown` to have a bool dtype"
    ),
    Bad("none", lambda draw: draw(*torch.zeros(2, 0, 2)), ValueError, "`probs` to hold samples"),
    *(
        Bad(f"risk {given}", lambda _, given=given: plots.risk_coverage(*given), error, message)
        for given, error, message in (
            (([], []), ValueError, "`errors` to hold samples"),
            (({}, [1]), ValueError, "`uncertainty` to name at least one uncertainty, but got none"),
            (({"a": [1, NAN]}, [0, 1]), ValueError, "`uncertainty` to be finite"),
            (([1], [0, 1]), ValueError, r"`errors` to have shape \(N=1\), but got \(2,\)"),
            (([1], ["a"]), TypeError, "`errors` to hold numbers, but got list"),
        )
    ),
    Bad(
        "one", lambda _: plots.risk_coverage([1], [1], ax="a"), TypeError, "`ax` to be an Axes, but"
    ),
    *(
        Bad(
            f"noise {given}",
            lambda _, given=given: plots.uncertainty_against_noise([[1.0]], **given),
            error,
            message,
        )
        for given, error, message in (
            ({"std_norm": [[0.0]]}, ValueError, "`std_norm` to be above 0, but got 0.0"),
            (
                {"std_norm": [[1.0]], "missing": [[True, False]]},
                ValueError,
                "`missing` to have shape",
            ),
            (
                {"std_norm": [[1.0]], "missing": [[0.0]]},
                TypeError,
                "`missing` to have a bool dtype",
            ),
        )
    ),
    *(
        Bad(
            f"attribution {given}",
            lambda _, given=given: plots.modality_attribution(*given),
            ValueError,
            message,
        )
        for given, message in (
            (([0], [[1.2]]), r"`shares` to be in \[0, 1\], but got 1.2"),
            (([0, 1], [[1.0]]), "`shares` to have shape"),
            (([float("inf")], [[1.0]]), "`levels` to be finite"),
            (
                ([0, 1], [[0.5, 0.5], [0.6, 0.51]]),
                "`shares` to add up to at most 1 in every row, but got 1.11; take their mean",
            ),
        )
    ),
    *(
        Bad(
            f"t-SNE {message}",
            lambda _, given=given, more=more: plots.latent_tsne(given, **more),
            error,
            message,
        )
        for given, more, error, message in (
            (
                torch.ones(1, 1, 2, 3),
                {},
                ValueError,
                "`embeddings` to show at least 3 points, but got 2",
            ),
            (torch.full((1, 1, 3, 3), NAN), {}, ValueError, "`embeddings` to be finite"),
            (torch.ones(4, 1, 1, 3), {"perplexity": 0}, ValueError, "`perplexity` to be a number"),
            (
                torch.ones(4, 1, 1, 3),
                {"shown": torch.ones(4, 1, 1)},
                TypeError,
                "`shown` to have a bool dtype",
            ),
        )
    ),
    *(
        Bad(
            f"weights {message}",
            lambda _, given=given: plots.attention_map(given),
            error,
            message,
        )
        for given, error, message in (
            ([[2.0]], ValueError, r"`weights` to be in \[0, 1\], but got 2.0"),
            (torch.zeros(2, 0), ValueError, r"`weights` to hold samples, but got shape \(2, 0\)"),
            ([[0.5, 0.5], [1.0]], ValueError, "`weights` to be an array, but got"),
            (
                torch.ones(2, 2) + 0j,
                TypeError,
                "`weights` to hold numbers, but got torch.complex64",
            ),
        )
    ),
    Bad(
        "one label",
        lambda _: plots.label_correlation([[1], [0]], [[0.5], [0.1]]),
        ValueError,
        r"`probs` to be at least \(2, 2\), but got \(2, 1\)",
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_input_is_refused(bad):
    with pytest.raises(bad.error, match=f"^Expected {bad.message}"):
        bad.call(plots.reliability_diagram)
