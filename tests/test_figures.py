"""Figures of the paper: they show what the model says."""

import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from examples_support import QUIET, TINY, ends_in_one_line, need_extras, toy

need_extras()
from uncertainty_mm.examples import lddu_figures as figures  # noqa: E402
from uncertainty_mm.examples import lddu_full, sweep  # noqa: E402

pytestmark = QUIET
COUNT = 90  # a third for each split
LABELS = ["happy", "sad", "fear"]
WITHOUT_B = 5  # position in the test split of the sample that lacks modality `b`
LENGTHS = np.where(np.arange(COUNT) == 60 + WITHOUT_B, 0, 1 + np.arange(COUNT) % 7)


def write(path, **changes):
    return toy(path, COUNT, **{"lengths.b": LENGTHS, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The data and the folders of two runs, the second without the contrastive loss."""
    folder = tmp_path_factory.mktemp("runs")
    data = write(folder / "data.npz")
    for name, options in (("with", []), ("without", ["--model.scl_weight=0"])):
        where = ["--data.path", str(data), "--output", str(folder / name)]
        lddu_full.main(arguments=[*sweep.QUIET, *TINY, *options, *where])
    return data, folder / "with", folder / "without"


@pytest.fixture(scope="module")
def applied(trained):
    """The first run's model, the test split, and the outputs for it that training has written."""
    data = sweep.data_of(trained[1]).part("test")
    model = lddu_full.LDDU.load(trained[1] / "best.ckpt")
    with np.load(trained[1] / "predictions.npz") as file:
        outputs = {key: torch.from_numpy(file[key]) for key in ("probs", "std_norm", "missing")}
    return model, data, outputs


def call(*arguments):
    figures.main([str(argument) for argument in arguments])


@pytest.mark.long
def test_all_figures_are_written(trained, tmp_path, capsys):
    data, run, without = trained
    call(run, without, "--data", data, "--sample", "clip 65", "--output", tmp_path / "x" / "y")
    assert "case: test sample 5" in capsys.readouterr().out
    call(run)
    for folder in (tmp_path / "x" / "y", run / "figures"):
        files = sorted(folder.iterdir())
        assert [path.name for path in files] == ["case.png", "correlations.png", "tsne.png"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    assert files[2].read_bytes() != (tmp_path / "x" / "y" / "tsne.png").read_bytes()  # one panel


def silhouette(points, classes):
    """Rousseeuw 1987, point by point."""
    values = []
    for i, point in enumerate(points):
        distance = np.linalg.norm(points - point, axis=1)
        mine = (classes == classes[i]) & (np.arange(len(points)) != i)
        if not mine.any():
            values.append(0.0)
            continue
        a = distance[mine].mean()
        others = set(classes.tolist()) - {classes[i]}
        b = min(distance[classes == other].mean() for other in others)
        values.append((b - a) / max(a, b))
    return np.mean(values)


def test_tsne_shows_present_labels_of_both_runs(trained, applied, monkeypatch):
    drawn = []
    plot = figures.plots.latent_tsne
    monkeypatch.setattr(
        figures.plots, "latent_tsne", lambda *a, **k: drawn.append((a, k)) or plot(*a, **k)
    )
    model, data, _ = applied
    other = lddu_full.LDDU.load(trained[2] / "best.ckpt")
    panels = figures.tsne([model, other], data).axes
    assert len(panels) == len(drawn) == 2
    assert [panel.get_legend() is None for panel in panels] == [True, False]
    expected = int(data.labels.sum()) * 2 - int(data.labels[WITHOUT_B].sum())
    for panel, name, ((embedding, *_), options) in zip(
        panels, ("with $", "without $"), drawn, strict=True
    ):
        assert sum(len(points.get_offsets()) for points in panel.collections) == expected
        shown = options["shown"]
        assert int(shown.sum()) == expected
        _, modality, label = shown.nonzero(as_tuple=True)
        value = silhouette(embedding[shown].numpy(), (10 * modality + label).numpy())
        assert panel.get_title().startswith(name)
        assert panel.get_title().endswith(f"(silhouette {value:.2f})")
    assert "weight 0.1" in panels[0].get_title()
    # every sample once, and each with its own labels and Gaussians
    shown, embedding = drawn[0][1]["shown"], drawn[0][0][0]
    with torch.no_grad():
        output = model(data.features, data.padding_mask)
    mine = output.latent.embedding("joint")
    rows = (embedding[:, None, 0] - mine[None, :, 0]).abs().amax((2, 3)).argmin(1)
    assert sorted(rows.tolist()) == list(range(len(data)))
    torch.testing.assert_close(embedding, mine[rows])
    assert torch.equal(shown[:, 0], data.labels[rows] > 0)


def test_case_shows_what_the_model_says(applied):
    model, data, outputs = applied
    position = 3
    figure = figures.case(model, data, outputs, position)
    above, below = figure.subfigs
    bars, dots, shares = above.axes
    labels = data.labels[position]
    present = [name for name, y in zip(LABELS, labels, strict=True) if y]
    assert figure.get_suptitle() == f"sample clip 63: {', '.join(present) or 'no label'}"

    drawn = [bar.get_width() for bar in bars.patches]
    np.testing.assert_allclose(drawn, outputs["probs"][position], rtol=1e-5)
    blue, grey = to_hex(figures.PRESENT), to_hex(figures.ABSENT)
    colors = [to_hex(bar.get_facecolor()) for bar in bars.patches]
    assert colors == [blue if y else grey for y in labels]
    [lines] = bars.collections
    drawn = [part[0, 0] for part in lines.get_segments()]
    np.testing.assert_allclose(drawn, model.threshold.expand(3))
    assert [tick.get_text() for tick in bars.get_yticklabels()] == LABELS

    batch = next(iter(data.loader(len(data))))
    with torch.no_grad():
        output = model(batch.features, batch.padding_mask)
        encoded = model.encoder["b"](batch.features["b"], batch.padding_mask["b"])[position]
    first = [1 / (1 + math.exp(-logit)) for logit in output.dir_logits[position].tolist()]
    np.testing.assert_allclose(bars.lines[0].get_xdata(), first, rtol=1e-5)
    d = [1 - (p * (1 - p) + (1 - p) * p) for p in first]
    np.testing.assert_allclose(dots.lines[0].get_xdata(), d, rtol=1e-5)
    assert dots.get_ylim() == bars.get_ylim()  # the rows are those of the labels

    def share(sample):
        precision = [
            0
            if outputs["missing"][sample, m]
            else 1 / float((outputs["std_norm"][sample, m] ** 2).sum())
            for m in range(2)
        ]
        return [value / sum(precision) for value in precision]

    np.testing.assert_allclose([bar.get_width() for bar in shares.patches], share(position))
    alike = [sample for sample in range(len(data)) if sample != WITHOUT_B]
    mean = np.mean([share(sample) for sample in alike], axis=0)  # adds up to 1
    [lines] = shares.collections
    np.testing.assert_allclose([part[0, 0] for part in lines.get_segments()], mean, rtol=1e-6)

    maps = {ax.get_title(): ax.images[0].get_array() for ax in below.axes if ax.get_title()}
    valid = int((~data.padding_mask["b"][position]).sum())
    assert 0 < valid < 7
    assert [drawn.shape for drawn in maps.values()] == [(3, 5), (3, valid)]
    for drawn in maps.values():
        np.testing.assert_allclose(drawn.sum(1), 1, rtol=1e-5)
    part = model.attention.attention["b"]
    with torch.no_grad():
        key = part.key(encoded[:valid])
        query = part.query(model.attention.label_embedding.weight)
        score = (query @ key.T * model.attention.scale).exp()
    np.testing.assert_allclose(maps["attention to b"], score / score.sum(1, True), rtol=1e-4)


def test_case_says_that_a_modality_is_missing(applied):
    figure = figures.case(*applied, WITHOUT_B)
    shares = [bar.get_width() for bar in figure.subfigs[0].axes[2].patches]
    assert shares == [1, 0]
    a, b = (ax for ax in figure.subfigs[1].axes if ax.get_title())
    assert (len(a.images), len(b.images)) == (1, 0)
    assert [text.get_text() for text in b.texts] == ["missing"]


def test_default_case_is_the_most_uncertain_of_those_with_several_labels_all_predicted():
    labels = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    probs = torch.tensor(
        [
            [0.9, 0.8, 0.1],  # right
            [0.9, 0.7, 0.2],  # right and less certain
            [0.6, 0.4, 0.4],  # one label
            [0.6, 0.5, 0.3],  # wrong
            [0.6, 0.55, 0.4],  # lacks a modality
        ]
    )
    missing = torch.tensor([[False, row == 4] for row in range(5)])
    threshold = torch.tensor([0.5])
    known = torch.ones_like(labels).bool()
    assert figures.interesting(probs, threshold, missing, labels, known) == 1
    nothing = torch.zeros_like(labels)
    assert figures.interesting(probs, threshold, missing, nothing, known) == 4
    known[1, 2] = False
    assert figures.interesting(probs, threshold, missing, labels, known) == 0


def test_correlations_are_of_the_decisions(applied):
    _, data, outputs = applied
    threshold = outputs["probs"].median(0).values  # no label is always or never predicted
    true, predicted, *_ = figures.correlations(outputs["probs"], threshold, data).axes
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]

    def correlation(columns, i, j):
        x, y = (columns[:, k] - columns[:, k].mean() for k in (i, j))
        return float((x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum()))

    decisions = (outputs["probs"] > threshold).double().numpy()
    a, b = (
        [correlation(columns, *pair) for pair in pairs]
        for columns in (data.labels.double().numpy(), decisions)
    )
    cosine = sum(map(math.prod, zip(a, b, strict=True))) / math.hypot(*a) / math.hypot(*b)
    for ax, expected in ((true, a), (predicted, b)):
        matrix = ax.images[0].get_array()
        np.testing.assert_allclose([matrix[pair] for pair in pairs], expected, atol=1e-9)
    assert predicted.get_title() == f"predicted (cosine similarity {cosine:.2f})"


def test_other_models_are_beside_in_the_correlations(trained, applied):
    _, data, outputs = applied
    threshold, other = outputs["probs"].median(0).values, figures.decisions_of(trained[2], data)
    drawn = figures.correlations(outputs["probs"], threshold, data, {"other": other}).axes
    assert [ax.get_title().split(" (")[0] for ax in drawn[:3]] == ["true", "LDDU", "other"]
    with np.load(trained[2] / "predictions.npz") as file:
        assert torch.equal(other > 0, torch.from_numpy(file["probs"] > file["threshold"]))
    with pytest.raises(figures.UsageError, match="not of these test samples"):
        figures.decisions_of(trained[2], data.select(torch.arange(5)))
    with pytest.raises(figures.UsageError, match="no such file"):
        figures.decisions_of(trained[0].parent, data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run", "best.ckpt: no such file"),
        ("checkpoint", "best.ckpt: not a checkpoint of this program"),
        ("data", "nothing.npz"),
        ("labels", r"labels \['happy', 'sad', 'other'\] are not those of the checkpoint"),
        ("name", "--sample clip 1: neither the name of a test sample nor a position, 0 to 29"),
        ("position", "--sample 30: neither the name"),
        ("size", "the figures need at least two test samples and two labels"),
        ("present", "t-SNE needs at least 3 distributions of labels that are present, got 2"),
        ("output", "Not a directory"),
    ],
)
def test_bad_input_ends_in_one_line(trained, tmp_path, capsys, change, message):
    data, run, _ = trained
    options = []
    if change == "run":
        run = tmp_path
    elif change == "checkpoint":
        run = tmp_path
        (run / "best.ckpt").write_bytes(b"nothing")
    elif change == "data":
        data = tmp_path / "nothing.npz"
    elif change == "labels":
        data = write(tmp_path / "data.npz", label_names=np.array(["happy", "sad", "other"]))
    elif change == "size":
        split = np.zeros(COUNT, int)
        split[0] = 2
        data = write(tmp_path / "data.npz", split=split)
    elif change == "present":
        labels = np.zeros((COUNT, 3), int)
        labels[-1, 0] = 1
        data = write(tmp_path / "data.npz", labels=labels)
    elif change == "output":
        (tmp_path / "file").touch()
        options = ["--output", tmp_path / "file" / "folder"]
    else:
        options = ["--sample", "clip 1" if change == "name" else "30"]
    with ends_in_one_line(capsys, f"^error: .*{message}"):
        call(run, "--data", data, *options)
