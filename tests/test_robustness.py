"""Robustness: what is evaluated, the arithmetic of its tables, what the command writes."""

import csv
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from examples_support import QUIET, TINY, ends_in_one_line, need_extras, toy
from uncertainty_mm.data import MultimodalDataset
from uncertainty_mm.data.transforms import corrupted

need_extras()
from uncertainty_mm.examples import robustness, sweep  # noqa: E402
from uncertainty_mm.examples.baselines import comparison  # noqa: E402
from uncertainty_mm.metrics.functional import evaluate  # noqa: E402

pytestmark = QUIET
SIZED = [option for option in TINY if option.startswith(("--data", "--trainer", "--model.encoder"))]


def data():
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(40, 8, 3, generator=generator) for name in "ab"}
    padding = {name: torch.zeros(40, 8).bool() for name in "ab"}
    return MultimodalDataset(features, padding, torch.ones(40, 2), ["happy", "sad"])


@pytest.mark.parametrize("kind", [*robustness.KINDS, "swapped"])
def test_kinds_with_a_size_are_those_that_depend_on_it(kind):
    changed = [corrupted(data(), "a", kind, size=size).features["a"] for size in robustness.SIZES]
    depends = [not torch.equal(one, other) for one, other in pairwise(changed)]
    assert depends == [kind in robustness.WITH_SIZE] * (len(changed) - 1)


def test_versions_are_all_kinds_in_all_sizes_one_modality_at_a_time():
    found = list(robustness.versions(["a", "b"]))
    assert len(found) == len(set(found)) == 1 + 2 * (1 + 5 + 7 * 4)
    quick = list(robustness.versions(["a", "b"], [robustness.REFERENCE]))
    assert len(quick) == 1 + 2 * (1 + 12)
    assert set(quick) == {v for v in found if v.size == robustness.REFERENCE}
    given = data()
    assert robustness.Version("clean").of(given) is given
    masked = robustness.Version("masked", modality="b").of(given)
    assert masked.padding_mask["b"].all()
    assert not masked.padding_mask["a"].any()
    spoilt = robustness.Version("offset", 2.0, "a").of(given)
    assert torch.equal(spoilt.features["b"], given.features["b"])
    moved = (spoilt.features["a"] - given.features["a"]) / given.statistics()["a"].std
    torch.testing.assert_close(moved, torch.full((40, 8, 3), 2.0))


def test_detection_is_of_the_samples_that_changed():
    clean, spoilt = torch.tensor([1.0, 2.0, 9.0, 3.0]), torch.tensor([1.5, 4.0, 0.0, torch.nan])
    changed = torch.tensor([True, True, False, True])
    assert (
        robustness.detection(clean, spoilt, changed) == 0.75
    )  # 1.5 > 1, 4 > 1, 4 > 2, not 1.5 > 2
    assert math.isnan(robustness.detection(clean, spoilt, ~changed & changed))


def test_unease_is_larger_for_what_is_less_sure():
    said = {"uncertainty": torch.tensor([0.5, 0.7])}
    assert list(robustness.unease(said, 0)) == ["entropy"]
    said["std_norm"] = torch.tensor([[[3.0, 4.0]], [[5.0, 12.0]]])
    said["typicality"] = torch.tensor([[1.0], [2.0]])
    said["conflict"] = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    said["missing"] = torch.tensor([[False, False], [False, True]])
    expected = {"entropy": [0.5, 0.7], "std": [5, 13], "typicality": [1, 2]}
    expected["conflict"] = [2, math.nan]  # the second has one modality
    found = robustness.unease(said, 0)
    assert {name: x.tolist() for name, x in found.items()} == {
        name: pytest.approx(x, nan_ok=True) for name, x in expected.items()
    }


def test_tables_have_means_over_modalities_and_seeds():
    rows = []
    for kind in ("clean", "masked", *robustness.KINDS):
        for modality, value in (("", 0.5),) if kind == "clean" else (("a", 0.1), ("b", 0.3)):
            row = {"kind": kind, "size": robustness.REFERENCE, "modality": modality}
            rows.append(row | {"Brier": value + (kind == "dead") * 0.11})
    rows.append({"kind": "noise", "size": 0.75, "modality": "a", "Brier": 9.0})  # not the reference
    header, _, line = robustness.predictions({"lddu": rows}, "Brier")
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert cells["clean"] == "0.5000"
    assert cells["noise"] == "0.2000"
    assert cells["dead"] == "0.3100"
    assert cells["mean"] == "0.2100"  # of eleven kinds
    assert line.endswith("| 0.2000 |")
    assert robustness.table(["arm", "x"], {"lddu": [math.nan]})[-1] == "| lddu |  |"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A sweep of baselines."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "in_a_process", sweep.carry_out)
        patch.setitem(comparison.ARMS, "lddu", sweep.Arm(TINY))
        unknown = np.random.default_rng(1).random((90, 3)) < 0.1
        toy(folder / "toy.npz", unknown=unknown)
        command = ["--data", str(folder / "toy.npz"), "--seeds", "0", "--jobs", "1", "--arms"]
        command += ["br-logistic", "late", "lddu", "--output", str(folder / "out")]
        comparison.main([*command, "--", *SIZED])
    return folder / "out"


@pytest.mark.long
def test_what_the_command_writes(runs, tmp_path):
    robustness.main(
        [str(runs), "--quick", "--samples", "100", "--jobs", "1", "--output", str(tmp_path)]
    )
    assert {each.name for each in tmp_path.iterdir()} == {
        *("robustness.md", "robustness.csv", "robustness_toy.png")
    }
    arms = ["br-logistic", "late", "lddu", "lddu" + robustness.WITHOUT]
    with open(tmp_path / "robustness.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["arm"] for row in rows)) == arms
    assert len(rows) == len(arms) * (1 + 2 * 13)
    for row in rows:
        if row["kind"] == "clean" and row["arm"] in arms[:3]:  # what the run itself measured
            folder = runs / "toy" / row["arm"] / "0"
            with np.load(folder / "predictions.npz") as file:
                names = ("probs", "labels", "threshold", "unknown")
                expected = evaluate(*(torch.from_numpy(file[name]) for name in names))
            for measure in ("miF1", "Brier"):
                assert float(row[measure]) == pytest.approx(expected[measure], abs=5e-5)
    seen = [row for row in rows if row["arm"] == "lddu" and row["kind"] in robustness.KINDS]
    told = [score for score in robustness.SCORES if score != "named"]
    assert set(told) <= set(rows[0])
    assert all(0 <= float(row[score]) <= 1 for row in seen for score in told)
    text = (tmp_path / "robustness.md").read_text()
    _, _, compared = text.partition("lddu minus the other")
    lines = [line.split(" | ")[0][2:] for line in compared.split("\n") if line.startswith("| ")]
    assert lines == ["arm", *arms[:2], arms[3]]


@pytest.mark.long
@pytest.mark.parametrize("arm", ["br-logistic", "late", "lddu"])
def test_encoders_that_recognise_their_input_change_no_number(runs, arm, monkeypatch):
    task = robustness.Task(runs / "toy" / arm / "0", arm, robustness.SIZES[:1], 25)
    found = robustness.evaluate(task)
    monkeypatch.setattr(robustness, "remember", lambda model, batches: None)
    for one, other in zip(found, robustness.evaluate(task), strict=True):
        np.testing.assert_equal(one.rows, other.rows)  # nan is equal to nan
        assert np.array_equal(one.terms, other.terms)
        assert one.terms.shape == (4, 25)


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "nothing: no finished run of "),
        (["RUNS", "--arms", "mult"], "no finished run of mult"),
        (["RUNS", "--arms", "other"], "invalid choice: 'other'"),
        (["RUNS", "--jobs", "0"], "--jobs and --samples must be at least 1, got 0, None"),
    ],
)
def test_bad_command_ends_in_one_line(runs, capsys, options, message):
    with ends_in_one_line(capsys, message):
        robustness.main([str(runs) if each == "RUNS" else each for each in options])
