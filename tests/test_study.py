"""The study of the uncertainty: what it writes, what it repeats, what a failing run costs."""

import csv
import json

import numpy as np
import pytest
import torch

from examples_support import QUIET, example_module, need_extras
from uncertainty_mm.data import SyntheticMMER

need_extras()

pytestmark = QUIET
SMALL = "--hidden-dim 16 --heads 2 --z-dim 8 --latent-dim 4 --queue-size 64 --batch-size 16"
MEASURES = {
    *("miF1", "mAP", "Brier", "ECE", "ECE before", "AURC", "entropy ~ error", "std ~ error"),
    *("CV of std", "corruption AUROC", "attribution shift"),
    *(f"corruption AUROC, {name}" for name in ("text", "audio", "vision")),
    *("std ~ noise", "entropy ~ truth", "std ~ truth"),
}


@pytest.fixture(scope="module")
def study():
    with example_module("uncertainty_study") as module:
        yield module


def test_failing_arm_costs_itself_and_a_finished_one_is_not_repeated(study, tmp_path, capsys):
    command = ["--sizes", "64", "32", "32", "--epochs", "1", "--seeds", "0", "--jobs", "1"]
    command += ["--arms", "default", "paper", "--options", SMALL, "--output", str(tmp_path)]
    in_the_way = tmp_path / "synthetic" / "paper"
    in_the_way.parent.mkdir()
    in_the_way.touch()  # where the folder of the run should be
    with pytest.raises(SystemExit, match="1 runs failed"):
        study.main(command)
    assert "paper, seed 0: failed: " in "".join(capsys.readouterr())
    (row,) = json.loads((tmp_path / "runs.json").read_text())
    assert (row["data"], row["arm"], row["seed"]) == ("synthetic", "default", 0)
    assert set(row) == MEASURES | {"data", "arm", "seed"}
    each = [row[key] for key in row if key.startswith("corruption AUROC, ")]
    assert row["corruption AUROC"] == min(each)

    finished = [tmp_path / "synthetic.npz"]
    finished += [p for p in (tmp_path / "synthetic" / "default").rglob("*") if p.is_file()]
    assert {"best.ckpt", "measures.json", "run.log"} <= {path.name for path in finished}
    before = [path.stat().st_mtime_ns for path in finished]
    in_the_way.unlink()
    study.main(command)
    assert [path.stat().st_mtime_ns for path in finished] == before

    with pytest.raises(SystemExit, match="2 runs failed"):  # other options, same folder
        study.main([*command, "--epochs", "2"])
    assert "choose another --output" in "".join(capsys.readouterr())
    study.main(command)

    rows = json.loads((tmp_path / "runs.json").read_text())
    assert [row["arm"] for row in rows] == ["default", "paper"]
    assert rows[0] == row
    with open(tmp_path / "runs.csv", newline="") as file:
        assert [float(line["miF1"]) for line in csv.DictReader(file)] == [r["miF1"] for r in rows]
    assert (tmp_path / "study.md").read_text() == study.report(rows)
    for figure in ("reliability", "risk_coverage", "attribution", "noise"):
        assert (tmp_path / f"synthetic_{figure}.png").stat().st_size > 0
    model = torch.load(tmp_path / "synthetic" / "paper" / "0" / "best.ckpt", weights_only=True)
    options = model["hyper_parameters"]["model"]
    assert (options["combine"], options["targets"], options["pairs"]) == (
        "concat",
        "sample",
        "SR+DR",
    )


def test_every_arm_changes_the_default(study):
    parse = study.lddu_full.parser().parse_args
    arms = [str(parse(f"train {study.SMALL} {options}".split())) for options in study.ARMS.values()]
    assert len(set(arms)) == len(arms)
    assert len({study.slug(arm) for arm in study.ARMS}) == len(arms)  # each has its own folder


def test_synthetic_file_holds_what_is_known(study, tmp_path):
    study.synthetic_file(tmp_path / "data.npz", (5, 3, 2))
    parts = study.read_npz(tmp_path / "data.npz")
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [5, 3, 2]
    world = SyntheticMMER()
    samples = world.sample(10, seed=1)
    posterior = world.posterior(samples)
    with np.load(tmp_path / "data.npz") as file:
        assert np.array_equal(file["noise"], samples.noise)
        assert np.array_equal(file["posterior_entropy"], posterior.entropy)
        assert np.array_equal(file["posterior"], posterior.marginals)
    for name, features in samples.features.items():
        joined = torch.cat([part.features[name] for part in parts.values()])
        assert torch.equal(joined, features)
        padding = torch.cat([part.padding_mask[name] for part in parts.values()])
        assert torch.equal(padding, samples.padding_mask[name])


def test_corruption_touches_valid_steps_of_one_modality(study, tmp_path):
    study.synthetic_file(tmp_path / "data.npz", (500, 1, 1))
    data = study.read_npz(tmp_path / "data.npz")["train"]
    changed = study.corrupted(data, "audio", 3.0)
    assert all(torch.equal(changed.features[m], data.features[m]) for m in ("text", "vision"))
    valid = ~data.padding_mask["audio"]
    added = changed.features["audio"] - data.features["audio"]
    assert not added[~valid].any()
    ratio = added[valid].std(0) / data.features["audio"][valid].std(0)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 3.0), rtol=0.1, atol=0)
    assert torch.equal(
        study.corrupted(data, "audio", 0.0).features["audio"], data.features["audio"]
    )


def test_tables_have_mean_and_standard_deviation_over_seeds(study):
    others = dict.fromkeys(set(study.PREDICTION) - {"miF1"}, 0.0)
    rows = [
        {"data": "one", "arm": arm, "seed": seed, "miF1": score, "std": std, **others}
        | {"corruption AUROC, text": score}
        for arm, seed, score, std in (
            ("default", 0, 0.6, 1.0),
            ("paper", 0, None, 0.3),  # not measurable there
            ("default", 1, 0.8, 2.0),
        )
    ]
    lines = study.report(rows).split("\n")
    assert lines[0] == "one:"
    assert lines[2].startswith("| arm | seeds | miF1 | mAP |")
    assert lines[4].startswith("| default | 2 | 0.700 ±0.141 | 0.000 ±0.000 |")
    assert lines[5].startswith("| paper | 1 | nan | 0.000 |")
    assert lines[7:] == [
        "| arm | seeds | std |",
        "|---|---:|---:|",
        "| default | 2 | 1.500 ±0.707 |",
        "| paper | 1 | 0.300 |",
        "",
        "| arm | seeds | corruption AUROC, text |",
        "|---|---:|---:|",
        "| default | 2 | 0.700 ±0.141 |",
        "| paper | 1 | nan |",
        "",
    ]
