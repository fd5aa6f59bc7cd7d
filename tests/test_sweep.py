"""Sweeps: what they write, what they repeat and resume, and what a failing run costs."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

from examples_support import (
    QUIET,
    TINY,
    breaks,
    ends_in_one_line,
    finishes,
    need_extras,
    toy,
)

need_extras()
from uncertainty_mm.examples import sweep  # noqa: E402

pytestmark = QUIET
ROW = {"data": "data", "arm": "x", "seed": 4, "value": 40}


@pytest.fixture
def here(monkeypatch):
    """Runs take place in this process."""
    monkeypatch.setattr(sweep, "in_a_process", sweep.carry_out)
    monkeypatch.setattr(sweep, "check_options", lambda *given: None)


def arguments(folder, *more, seeds=(0, 1, 2), jobs=1, arms=("x",)):
    args = sweep.parser("", "runs").parse_args(
        ["--data", str(folder / "data.npz"), "--output", str(folder / "out"), "--arms", *arms]
    )
    (folder / "data.npz").touch()
    args.seeds, args.jobs, args.options = list(seeds), jobs, list(more)
    return args


def test_finished_runs_are_not_repeated(here, tmp_path):
    arms = {"x": sweep.Arm(["--a", "b"]), "y z": sweep.Arm()}
    args = arguments(tmp_path, "--of-all", arms=tuple(arms))
    rows, failed = sweep.run_all(finishes, arms, args, ["--base"])
    assert failed == 0
    assert [(row["arm"], row["seed"], row["value"]) for row in rows] == [
        (arm, seed, 10 * seed) for seed in (0, 1, 2) for arm in arms
    ]
    out = tmp_path / "out"
    options = json.loads((out / "data" / "x" / "2.json").read_text())["options"]
    order = ["--base", "--of-all", "--a", "--seed_everything"]  # what is more special holds
    assert sorted(order, key=options.index) == order
    assert json.loads((out / "runs.json").read_text()) == rows
    with open(out / "runs.csv", newline="") as file:
        assert [float(line["value"]) for line in csv.DictReader(file)] == [r["value"] for r in rows]

    def never(run):
        raise AssertionError("done again")

    assert sweep.run_all(never, arms, args, ["--base"]) == (rows, 0)


def test_failing_runs_cost_themselves(here, tmp_path, capsys):
    args = arguments(tmp_path)
    out = tmp_path / "out" / "data" / "x"
    out.mkdir(parents=True)
    (out / "0").mkdir()  # made by somebody else
    (out / "1.json").write_text('{"options": ["--other"]}')
    rows, failed = sweep.run_all(finishes, {"x": sweep.Arm()}, args)
    assert ([row["seed"] for row in rows], failed) == ([2], 2)
    printed = "".join(capsys.readouterr())
    assert "data, x, seed 0: failed: " in printed
    assert "no run of a sweep made it" in printed
    assert "choose another --output" in printed
    assert (out / "0").is_dir()

    def fails(run):
        raise OSError("a disk")

    rows, failed = sweep.run_all(fails, {"x": sweep.Arm()}, arguments(tmp_path, seeds=(3, 2)))
    assert ([row["seed"] for row in rows], failed) == ([2], 1)
    assert "seed 3: failed: a disk" in "".join(capsys.readouterr())
    again, failed = sweep.run_all(finishes, {"x": sweep.Arm()}, arguments(tmp_path, seeds=(3,)))
    assert ([row["value"] for row in again], failed) == ([30], 0)


@pytest.mark.long
def test_process_that_breaks_down_costs_one_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "check_options", lambda *given: None)
    args = arguments(tmp_path, seeds=(0, 1), jobs=2)
    rows, failed = sweep.run_all(breaks, {"x": sweep.Arm()}, args)
    assert ([row["value"] for row in rows], failed) == ([0], 1)
    assert rows[0]["threads"] == [1, "1"]
    assert "exit code 9, 'about to go down', see " in "".join(capsys.readouterr())
    assert (tmp_path / "out" / "data" / "x" / "0.log").read_text() == "seed 0\n"


def test_a_killed_run_goes_on_from_its_last_checkpoint(here, tmp_path):
    toy(tmp_path / "data.npz")
    options = ["--trainer.max_epochs=2", "--model.lr=0.01"]
    args = arguments(tmp_path, *TINY, *options, seeds=(0,))
    (row,), _ = sweep.run_all(sweep.work, {"x": sweep.Arm()}, args)
    folder = tmp_path / "out" / "data" / "x" / "0"
    first = torch.load(folder / "last.ckpt", weights_only=True)
    # brief, and nothing of it in the options, which a test by modality would share
    assert "modalities" not in json.loads((folder / "metrics.json").read_text())
    assert not (folder / "training.png").exists()
    assert "brief" not in (folder / "config.yaml").read_text()

    def kill(after):
        """Makes of the finished run one that was killed in the epoch `after`."""
        record = json.loads(folder.with_suffix(".json").read_text())
        del record["measures"]
        folder.with_suffix(".json").write_text(json.dumps(record))
        (folder / "metrics.json").unlink(missing_ok=True)
        if after == 0:
            (folder / "last.ckpt").unlink()

    kill(after=2)  # between the last epoch and the evaluation
    before = (folder / "last.ckpt").stat().st_mtime_ns
    assert sweep.run_all(sweep.work, {"x": sweep.Arm()}, args)[0] == [row]
    assert (folder / "last.ckpt").stat().st_mtime_ns == before
    kill(after=0)
    (folder / "half.written").touch()
    assert sweep.run_all(sweep.work, {"x": sweep.Arm()}, args)[0] == [row]
    assert not (folder / "half.written").exists()
    again = torch.load(folder / "last.ckpt", weights_only=True)
    for name, value in first["state_dict"].items():
        assert torch.equal(value, again["state_dict"][name]), name
    data = sweep.data_of(folder)
    assert (data.name, len(data.part("test")), data.seed, data.batch_size) == ("data", 30, 0, 16)
    shutil.rmtree(folder)


def test_quick_form_says_so(here, tmp_path):
    arms = {"x": sweep.Arm(["--trainer.max_epochs", "12"])}
    args = arguments(tmp_path, "--trainer.max_epochs", "30", seeds=(4, 1))
    args.quick = True
    rows, failed = sweep.run_all(finishes, arms, args)
    noted = {"options": "--trainer.max_epochs 30"}
    assert (rows, failed) == ([{**ROW, **noted, "quick": True}], 0)
    options = json.loads((tmp_path / "out" / "data" / "x" / "4.json").read_text())["options"]
    read = dict(zip(options[::2], options[1::2], strict=True))  # the last one holds
    assert (read["--trainer.max_epochs"], read["--data.max_train_samples"]) == ("3", "2000")
    title, *_ = sweep.by_data(rows, lambda name, here: []).split("\n")
    quick = "quick form: at most 2,000 training samples, 3 epochs, one seed"
    assert title == f"data, `--trainer.max_epochs 30`, {quick}:"
    args.quick = False  # another sweep, which does not take the quick runs for its own
    assert sweep.run_all(finishes, arms, args) == ([{**ROW, **noted, "seed": 1, "value": 10}], 1)


def test_options_are_checked_once_for_each_arm(monkeypatch, tmp_path):
    checked = []
    monkeypatch.setattr(sweep, "in_a_process", sweep.carry_out)
    monkeypatch.setattr(sweep, "check_options", lambda run: checked.append(run.name))
    args = arguments(tmp_path, arms=("x", "y"))
    args.data.append(tmp_path / "more.npz")
    args.data[1].touch()
    sweep.run_all(finishes, {"x": sweep.Arm(), "y": sweep.Arm()}, args)
    assert checked == ["x", "y"]


def test_as_many_runs_at_a_time_as_there_are_cores(monkeypatch):
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda process: {1, 3, 5}, raising=False)
    assert sweep.parser("", "runs").parse_args([]).jobs == 3


def test_help_asks_for_nothing(capsys):
    parser = sweep.parser("", "runs")
    assert parser.parse_args([]).options == []
    assert "required" not in parser.format_help()


def test_tables_have_mean_and_standard_deviation_over_seeds():
    rows = [
        {"data": "one", "arm": arm, "seed": seed, "miF1": score}
        for arm, seed, score in (("default", 0, 0.6), ("paper", 0, None), ("default", 1, 0.8))
    ]
    lines = sweep.table(rows, ["miF1"], {"note": {"default": "n"}}, {"paper": "the paper"})
    assert lines == [
        "| arm | seeds | miF1 | note |",
        "|---|---:|---:|---:|",
        "| default | 2 | 0.700 ±0.141 | n |",
        "| the paper | 1 | nan |  |",
    ]
    text = sweep.by_data(rows, lambda name, here: [f"{len(here)} of {name}"])
    assert text == "one:\n\n3 of one\n"
    assert sweep.cell([0.25]) == "0.250"
    assert np.isnan(float(sweep.cell([None])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data"], "at least one of each"),
        (["--data", "DATA", "DATA"], "at least one of each"),
        (["--data", "nothing.npz"], "no such file, nothing.npz"),
        (["--arms"], "at least one of each"),
        (["--seeds", "1", "1"], "no two alike"),
        (["--seeds", "-1"], "--seeds at least 0"),
        (["--seeds", "x"], "seeds"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--arms", "nothing"], "nothing: neither a file nor one of"),
        (["--", "--nonsense", "3"], "nonsense"),
        (["--", "--model.fusion.combine", "sum"], "combine"),
    ],
)
def test_bad_command_ends_in_one_line(here, monkeypatch, tmp_path, capsys, options, message):
    monkeypatch.undo()
    path = toy(tmp_path / "data.npz")
    given = ["--data", "DATA", "--arms", "study/default", "--output", str(tmp_path / "out")]
    command = [str(path) if each == "DATA" else each for each in [*given, *options]]
    with ends_in_one_line(capsys, message):
        sweep.main(command)
    assert not (tmp_path / "out").exists()
