"""The command line of the example: what a run writes, repeats, resumes, tests and predicts."""

import contextlib
import csv
import importlib
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from endurance import content, same
from examples_support import EXAMPLES, QUIET, TINY, need_extras, toy
from pages import DOCS
from uncertainty_mm.data import MultimodalDataset, read, write_folder

need_extras()
yaml = pytest.importorskip("yaml")
metrics = pytest.importorskip("sklearn.metrics")
cli = pytest.importorskip("uncertainty_mm.lightning.cli")
pytestmark = QUIET

FAST = [*TINY, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
CONFIGS = EXAMPLES / "configs"


@pytest.fixture(scope="module")
def example():
    return importlib.import_module("uncertainty_mm.examples.lddu_full")


@pytest.fixture(scope="module")
def run(example):
    """Runs the command line; returns what it printed and the object behind it."""

    def run(*arguments, main=example.main):
        main(arguments=list(map(str, arguments)))

    return run


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A training of three epochs, of modalities that are dropped and corrupted, with a threshold for each label."""
    folder = tmp_path_factory.mktemp("run")
    data = toy(folder / "data.npz")
    options = ["--data.path", data, *FAST, "--trainer.max_epochs=3", "--model.lr=0.01"]
    options += ["--data.drop_modality=0.5", "--data.corrupt_modality=0.5"]
    options += ["--model.thresholds=label", "--seed_everything=3"]
    run(*options, "--output", folder / "out")
    return SimpleNamespace(out=folder / "out", data=data, options=options)


def results_of(folder):
    return json.loads((folder / "metrics.json").read_text())


# --- A run and its folder ---------------------------------------------------------------------------------------------


def best_row(rows):
    """Of the epoch whose checkpoint is kept."""
    return next(row for row in rows if row["val/chosen"] == rows[-1]["val/chosen"])


def test_run_folder(finished):
    assert {path.name for path in finished.out.iterdir()} == {
        *("best.ckpt", "last.ckpt", "metrics.json", "metrics.csv", "training.png"),
        *("config.yaml", "environment.json", "predictions.npz"),
    }
    environment = json.loads((finished.out / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    results = results_of(finished.out)
    measures = {"Acc", "P", "R", "miF1", "mAP", "Brier", "ECE", "AURC", "rho"}
    for part in ("validation", "test", "uncalibrated"):
        assert set(results[part]) == measures
    assert "Bayes" not in results  # nobody knows it of a file
    assert (results["seed"], results["epochs"], results["data"]) == (3, 3, "data")
    assert len(set(results["threshold"])) > 1
    with open(finished.out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    losses = {"cls", "dir", "modality", "scl", "ocl", "kl", "places", "total"}
    measured = {"val/chosen", "val/cls", "val/miF1", "val/nll"}
    assert set(rows[0]) == {"epoch", *measured, *(f"loss/{name}" for name in losses)}
    best = float(best_row(rows)["val/miF1"])
    assert results["validation"]["miF1"] == pytest.approx(best, abs=1e-4)


def test_predictions_of_a_run_are_what_is_measured(example, finished):
    """Calibrated with the thresholds of the checkpoint, uncalibrated with one of its own, by subset of modalities."""
    results = results_of(finished.out)
    model = example.LDDU.load(finished.out / "best.ckpt")
    test = read(finished.data)["test"]
    with np.load(finished.out / "predictions.npz") as file:
        arrays = dict(file)
    assert arrays["ids"].tolist() == test.ids
    for row, probs, threshold in (
        ("test", arrays["probs"], model.threshold),
        ("uncalibrated", arrays["uncalibrated"], model.raw_threshold),
    ):
        predicted = torch.from_numpy(probs) > threshold
        score = metrics.f1_score(test.labels, predicted, average="micro")
        assert results[row]["miF1"] == pytest.approx(score, abs=1e-4)
        precision = metrics.average_precision_score(test.labels, probs)
        assert results[row]["mAP"] == pytest.approx(precision, abs=1e-4)
    assert not torch.equal(model.threshold, model.raw_threshold)
    rows = results["modalities"]
    assert list(rows) == ["a + b", "a", "b", "none"]
    assert {name: rows["a + b"][name] for name in results["test"]} == results["test"]
    for kept in ("a", "b", "none"):
        logits = model.final_logits(model(*without(test, kept)))
        probs = model.calibration(logits).sigmoid()
        brier = (probs - test.labels).square().mean()
        assert rows[kept]["Brier"] == pytest.approx(float(brier), abs=1e-4)


def without(data, kept):
    padding = {
        name: mask if name == kept else torch.ones_like(mask)
        for name, mask in data.padding_mask.items()
    }
    return data.features, padding


def test_saved_options_repeat_the_run(run, finished, tmp_path):
    config = finished.out / "config.yaml"
    assert yaml.safe_load(config.read_text())["data"]["path"] == str(finished.data)
    run("--config", config, "--output", tmp_path / "again")
    again = tmp_path / "again"
    for name in ("metrics.csv", "config.yaml"):
        assert (again / name).read_text() == (finished.out / name).read_text()
    same(content(again), content(finished.out))


def test_folder_is_never_shared(run, finished, tmp_path, monkeypatch):
    """Two runs of one second have two folders, and of many that claim one at once only one gets it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    for _ in range(2):
        run("--data.path", finished.data, *FAST)
    assert {path.name for path in tmp_path.glob("runs/*")} == {"data-now", "data-now-1"}
    for path in tmp_path.glob("runs/*"):
        assert results_of(path)["epochs"] == 1

    def claim(output, claimed):
        options = SimpleNamespace(output=output)
        one = SimpleNamespace(
            folder=None,
            options=options,
            datamodule=SimpleNamespace(name="data"),
            _saved_options=lambda: "{}",
        )
        with contextlib.suppress(cli.UsageError):
            claimed.append(cli.ModelCLI._claim_folder(one))

    for output, count in ((None, 16), ("runs/mine", 1)):
        claimed = []
        threads = [threading.Thread(target=claim, args=(output, claimed)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(claimed)) == len(claimed) == count


def test_run_that_cannot_start_leaves_no_folder(run, finished, tmp_path):
    """So that the command can be corrected and repeated."""
    for wrong in (["--trainer.precision=7"], ["--model.soft_labels=1"], ["--trainer.max_epochs=0"]):
        with pytest.raises(SystemExit):
            run("--data.path", finished.data, *FAST, "--output", tmp_path / "out", *wrong)
        assert not (tmp_path / "out").exists()


def test_fast_dev_run_keeps_nothing(run, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    fast = ["--data.path", finished.data, *FAST, "--trainer.fast_dev_run=true"]
    run(*fast, "--output", "out")
    assert "test split" in capsys.readouterr().out
    run(
        "predict",
        *fast[:2],
        "--trainer.fast_dev_run=true",
        "--ckpt_path",
        finished.out / "best.ckpt",
    )
    assert not list(tmp_path.iterdir())


def test_built_in_data_get_the_small_model_unless_told_otherwise(run, tmp_path, monkeypatch):
    make = cli.MultimodalDataModule._synthetic
    monkeypatch.setattr(
        cli.MultimodalDataModule, "_synthetic", lambda self: make(self, (64, 32, 32))
    )
    run(*FAST, "--output", tmp_path / "out")
    results = results_of(tmp_path / "out")
    assert results["Bayes"]["Brier"] < results["test"]["Brier"]
    assert len(results["modalities"]) == 2**3
    assert results["data"] == "synthetic"
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["model"]["lr"] == 1e-3
    small = ["--config", "small"]
    assert cli._configs_before([]) == cli._configs_before(["--model.lr", "1"]) == small
    for told in (["--data.path=x.npz"], ["--config", "paper"], ["-c", "x.yaml"], ["--help"]):
        assert cli._configs_before(told) == []


def test_options_train(run, finished, tmp_path):
    options = ["--model.gate=oracle", "--trainer.precision=bf16-mixed"]
    run("--data.path", finished.data, *FAST, *options, "--output", tmp_path / "out")
    assert results_of(tmp_path / "out")["test"]["Brier"] < 0.5
    assert (
        not torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["state_dict"][
            "tracker.history"
        ]
        .isnan()
        .any()
    )


@pytest.mark.usefixtures("no_native_bfloat16")
def test_without_instructions_for_bfloat16_a_training_is_in_float32(example, finished):
    options = ["--data.path", str(finished.data), *FAST, "--trainer.precision=bf16-mixed"]
    with pytest.warns(UserWarning, match="no instructions for bfloat16") as warned:
        made = cli.ModelCLI(example.LDDU, CONFIGS, options)
    assert sum("float32 takes its place" in str(each.message) for each in warned) == 1
    assert made.trainer.precision == "32-true"


def test_one_label_some_unknown_and_longer_test_sequences(run, tmp_path):
    parts = read(toy(tmp_path / "data.npz"))
    for split, part in parts.items():
        wide = 1 if split != "test" else 2
        unknown = torch.zeros(30, 1).bool()
        unknown[::5] = True
        parts[split] = MultimodalDataset(
            {name: torch.cat([x] * wide, dim=1) for name, x in part.features.items()},
            {name: torch.cat([x] * wide, dim=1) for name, x in part.padding_mask.items()},
            part.labels[:, :1],
            ["only"],
            unknown=unknown,
        )
    write_folder(parts, tmp_path / "folder")
    run("--data.path", tmp_path / "folder", *FAST, "--output", tmp_path / "out")
    with np.load(tmp_path / "out" / "predictions.npz") as file:
        probs, threshold = file["probs"][:, 0], file["threshold"][0]
        known = ~file["unknown"][:, 0]
    test = parts["test"].labels[:, 0].numpy()[known]
    score = metrics.f1_score(test, probs[known] > threshold)
    assert results_of(tmp_path / "out")["test"]["miF1"] == pytest.approx(score, abs=1e-4)


# --- Resumed ----------------------------------------------------------------------------------------------------------


def interrupt(patch, owner, name, when=lambda module: True):
    original = getattr(owner, name)

    def interrupted(self, *arguments):
        if when(self):
            raise RuntimeError("power cut")
        return original(self, *arguments)

    patch.setattr(owner, name, interrupted)
    return pytest.raises(RuntimeError, match="power cut")


@pytest.mark.parametrize(
    "place", ["in the third epoch", pytest.param("in the evaluation", marks=pytest.mark.long)]
)
def test_resumed_run_equals_the_uninterrupted_one(run, example, finished, tmp_path, place):
    """The checkpoint is all that the command names; the folder was moved."""
    first, moved = tmp_path / "resumed", tmp_path / "moved"
    with pytest.MonkeyPatch.context() as patch:
        if place == "in the evaluation":
            cut = interrupt(patch, example.LDDU, "on_test_start")
        else:
            third = lambda module: module.current_epoch == 2  # noqa: E731
            cut = interrupt(patch, example.LDDU, "on_train_epoch_start", third)
        with cut:
            run(*finished.options, "--output", first)
    assert not (first / "metrics.json").exists()
    first.rename(moved)
    run("--ckpt_path", moved / "last.ckpt")
    assert (moved / "metrics.csv").read_text() == (finished.out / "metrics.csv").read_text()
    same(content(moved), content(finished.out))
    assert not first.exists()


@pytest.mark.long
def test_run_that_had_stopped_early_is_completed_and_not_trained_on(
    run, example, finished, tmp_path, monkeypatch
):
    options = [*finished.options, "--trainer.max_epochs=50", "--early_stopping.patience=1"]
    run(*options, "--output", tmp_path / "whole")
    assert results_of(tmp_path / "whole")["epochs"] < 50
    with (
        pytest.MonkeyPatch.context() as patch,
        interrupt(patch, example.LDDU, "on_test_start"),
    ):
        run(*options, "--output", tmp_path / "resumed")
    run("--ckpt_path", tmp_path / "resumed" / "last.ckpt")
    same(content(tmp_path / "whole"), content(tmp_path / "resumed"))
    with pytest.raises(SystemExit):  # nothing is left to do
        run("--ckpt_path", tmp_path / "resumed" / "last.ckpt")


@pytest.mark.long
def test_more_epochs_may_follow(run, finished, tmp_path):
    run("--data.path", finished.data, *FAST, "--output", tmp_path / "out")
    run("--ckpt_path", tmp_path / "out" / "last.ckpt", "--trainer.max_epochs=2")
    assert results_of(tmp_path / "out")["epochs"] == 2
    assert len((tmp_path / "out" / "metrics.csv").read_text().splitlines()) == 3


# --- Tested and applied -----------------------------------------------------------------------------------------------


def test_subcommands_measure_what_the_run_measured(run, finished, capsys):
    capsys.readouterr()
    where = ["--data.path", finished.data, "--ckpt_path", finished.out / "best.ckpt"]
    results = results_of(finished.out)
    for subcommand, row in (("validate", "validation"), ("test", "test")):
        run(subcommand, *where, "--trainer.accelerator=cpu")
        (line,) = (
            line
            for line in capsys.readouterr().out.splitlines()
            if line.split()[:1] == [row] and len(line.split()) == 10
        )
        wanted = ["-" if x is None else f"{x:.3f}" for x in results[row].values()]
        assert line.split()[1:] == wanted


@pytest.mark.long
def test_fit_alone_trains_as_the_whole_does(run, finished, tmp_path):
    run("fit", *finished.options, "--output", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("best.ckpt", "last.ckpt", "metrics.csv", "config.yaml", "environment.json")
    }
    assert (tmp_path / "out" / "metrics.csv").read_text() == (
        finished.out / "metrics.csv"
    ).read_text()


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_predict_csv_and_npz_agree(run, finished, tmp_path):
    common = ["predict", "--ckpt_path", finished.out / "best.ckpt", "--data.path", finished.data]
    for name in ("p.csv", "p.npz"):
        run(*common, "--data.split=train", "--output", tmp_path / name)
    rows = rows_of(tmp_path / "p.csv")
    with np.load(tmp_path / "p.npz") as file:
        outputs = dict(file)
    labels, modalities = ["happy", "sad", "fear"], ["a", "b"]
    assert outputs["label_names"].tolist() == labels
    assert outputs["modalities"].tolist() == modalities
    assert outputs["labels"].shape == (30, 3)
    p = outputs["probs"].astype(float)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum(1)
    assert outputs["uncertainty"] == pytest.approx(entropy, rel=1e-4)
    assert list(rows[0])[:2] == ["sample", "uncertainty"]
    for index, row in enumerate(rows):
        assert row["sample"] == outputs["ids"][index] == f"clip {index}"
        read = {"uncertainty": outputs["uncertainty"][index]}
        for q, label in enumerate(labels):
            read[f"prob.{label}"] = outputs["probs"][index, q]
            read[f"predicted.{label}"] = p[index, q] > outputs["threshold"][q]
            read[f"uncalibrated.{label}"] = outputs["uncalibrated"][index, q]
            read[f"gate.{label}"] = outputs["gate"][index, q]
            read[f"conflict.{label}"] = outputs["conflict"][index, q]
        for m, name in enumerate(modalities):
            read[f"missing.{name}"] = outputs["missing"][index, m]
            read[f"typicality.{name}"] = outputs["typicality"][index, m]
            read[f"foreign.{name}"] = outputs["foreign"][index, m]
            for q, label in enumerate(labels):
                std = read[f"std_norm.{name}.{label}"] = outputs["std_norm"][index, m, q]
                assert np.isnan(std) == outputs["missing"][index, m]
        assert set(row) == {"sample", "reason", *read}
        for name, value in read.items():
            wanted = "" if np.isnan(float(value)) else pytest.approx(float(value), rel=1e-4)
            assert (float(row[name]) if row[name] else "") == wanted, name
    assert outputs["missing"].any()
    assert not outputs["missing"].all()


@pytest.mark.parametrize("layout", ["npz", "folder"])
def test_new_data_need_no_labels_names_and_splits(run, finished, tmp_path, layout):
    """All rows are predicted, as those of the file that has them."""
    with np.load(finished.data) as file:
        arrays = {
            key: file[key] for key in file.files if key.partition(".")[0] in ("features", "lengths")
        }
    new = tmp_path / "new.npz"
    np.savez(new, **arrays)
    if layout == "folder":
        parts = read(new, label_names=["happy", "sad", "fear"])
        new = tmp_path / "new"
        write_folder(parts, new)
    run(
        *("predict", "--ckpt_path", finished.out / "best.ckpt", "--data.path", new),
        *("--output", tmp_path / "p.csv"),
    )
    rows = rows_of(tmp_path / "p.csv")
    assert [row["sample"] for row in rows] == [str(index) for index in range(90)]
    with np.load(finished.out / "predictions.npz") as file:
        for row, probs in zip(rows[60:], file["probs"], strict=True):
            assert float(row["prob.fear"]) == pytest.approx(probs[2], rel=1e-4)


def test_labels_in_another_order_are_put_right(run, finished, tmp_path):
    with np.load(finished.data) as file:
        arrays = dict(file)
    swapped = tmp_path / "swapped.npz"
    np.savez(
        swapped,
        **arrays
        | {"labels": arrays["labels"][:, ::-1], "label_names": arrays["label_names"][::-1]},
    )
    out = tmp_path / "p.npz"
    run(
        *("predict", "--ckpt_path", finished.out / "best.ckpt"),
        "--data.path",
        swapped,
        "--output",
        out,
    )
    with np.load(out) as file:
        assert file["label_names"].tolist() == ["happy", "sad", "fear"]
        assert (file["labels"] == arrays["labels"][60:]).all()


# --- Options ----------------------------------------------------------------------------------------------------------


def flat(options):
    return cli._flat(options)


@pytest.fixture(scope="module")
def parser(example):
    """The options without a subcommand, and nothing made of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.ModelCLI, "instantiate_classes", lambda self: None)
        return cli.ModelCLI(example.LDDU, CONFIGS, []).parser


@pytest.mark.parametrize("name", cli.names_in(CONFIGS))
def test_every_config_sets_what_it_says(parser, name):
    text = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) or {}
    options = flat(parser.parse_args(["--config", name]).as_dict())
    for key, value in flat(text).items():
        given = list(options[key]) if isinstance(value, list) else options[key]
        assert given == value, key
    # what comes later wins
    options = parser.parse_args(["--config", name, "--model.lr", "0.125", "--config", "small"])
    assert options.model.lr == 1e-3
    assert parser.parse_args(["--config", name, "--model.lr=0.125"]).model.lr == 0.125


def test_paper_has_the_values_of_the_paper(parser):
    options = flat(parser.parse_args(["--config", "paper"]).as_dict())
    assert options["data.batch_size"] == 128
    assert options["trainer.max_epochs"] == 30
    wanted = {
        "lr": 2e-5,
        "encoder.hidden_dim": 256,
        "attention.out_dim": 128,
        "decoupler.latent_dim": 64,
        "contrastive.queue_size": 8192,
        "ocl_weight": 0.1,
        "scl_weight": 0.8,
        "dir_weight": 0.1,
    }
    assert {name: options[f"model.{name}"] for name in wanted} == wanted


def test_parts_have_the_defaults_of_their_classes(parser, example):
    options = parser.parse_args([]).model
    for part, made in example.LDDU.parts.items():
        parameters = inspect.signature(made).parameters
        shown = options[part].as_dict()
        changed = example.LDDU.defaults.get(part, {})
        for name, value in shown.items():
            if name != "max_batch_size":  # that of the data
                default = changed.get(name, parameters[name].default)
                assert value == default or tuple(value) == default, (part, name)
        assert shown.keys() == cli.options_of(made, example.LDDU.fixed.get(part, ()))
    assert options.contrastive.max_batch_size == 128


@pytest.mark.parametrize("command", [[], *([name] for name in cli.SUBCOMMANDS)])
def test_help_explains_the_options(run, command, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*command, "--help")
    assert not stop.value.code
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "--model.contrastive.anchors {present,all}",
        "Weight beta of Eq. 16",
        "--data.drop_modality",
        "names the samples" if not command else "ckpt_path",
    ):
        assert text in said


def exchanged():
    spec = importlib.util.spec_from_file_location(
        "exchange_of_the_page", DOCS / "howto" / "exchange.py"
    )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class PlainFusion(exchanged().MeanFusion):
    """A fusion without options."""

    def __init__(self, num_modalities, num_labels, latent_dim):
        super().__init__(num_modalities, num_labels, latent_dim)


@pytest.mark.parametrize("plain", [False, pytest.param(True, marks=pytest.mark.long)])
def test_exchanged_part_trains_predicts_and_loads(run, example, finished, tmp_path, plain):
    page = exchanged()
    kind = page.MeanLDDU

    class PlainLDDU(example.LDDU):
        parts = example.LDDU.parts | {"fusion": PlainFusion}

    def main(arguments):
        page.main(PlainLDDU if plain else kind, arguments)

    options = [x for x in FAST if "fusion" not in x] + (
        [] if plain else ["--model.fusion.hidden_dim=5"]
    )
    run("--data.path", finished.data, *options, "--output", tmp_path / "out", main=main)
    ckpt = tmp_path / "out" / "best.ckpt"
    run(
        *("predict", "--ckpt_path", ckpt),
        "--data.path",
        finished.data,
        "--output",
        tmp_path / "p.npz",
        main=main,
    )
    model = (PlainLDDU if plain else kind).load(ckpt)
    assert model.fusion.head[0].out_features == (64 if plain else 5)
    test = read(finished.data)["test"]
    with np.load(tmp_path / "p.npz") as file:
        probs = model.predict_step(test.batch(range(30)), 0)["probs"]
        np.testing.assert_allclose(file["probs"], probs.detach(), rtol=1e-4)
        assert (file["gate"] == 1).all()
    assert model.ask({"a": test.features["a"][0]})["probs"].shape == (3,)
    for wrong in ("combine=product", "dropout=0.1"):
        with pytest.raises(SystemExit):
            run(f"--model.fusion.{wrong}", main=main)
    with pytest.raises(cli.UsageError, match="another model"):
        example.LDDU.load(ckpt)


# --- Several processes ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_two_processes_train_and_share_their_history(tmp_path):
    split = np.repeat([0, 1, 2], (20, 33, 37))
    data = toy(tmp_path / "data.npz", split=split)
    command = [sys.executable, EXAMPLES / "lddu_full.py", "--data.path", data, *FAST]
    command += ["--trainer.max_epochs=2"]
    command += ["--output", tmp_path / "out", "--trainer.devices=2", "--trainer.strategy=ddp"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    state = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["state_dict"]
    # every sample once an epoch, its modalities apart
    missing = read(data)["train"].padding_mask["b"].all(1)
    assert state["tracker.history"][1].tolist() == [[2, 0 if gone else 2] for gone in missing]
    assert state["contrastive.queue.classes"].ge(0).all()
    # The 33 samples, of which one process had a batch more, were counted once: both say of them what one says.
    logged = float(best_row(rows_of(tmp_path / "out" / "metrics.csv"))["val/miF1"])
    assert results_of(tmp_path / "out")["validation"]["miF1"] == pytest.approx(logged, abs=1e-4)
    assert len(list(tmp_path.glob("out*"))) == 1
    refused = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert refused.returncode == 2
    assert "exists already" in refused.stderr


@pytest.mark.long
def test_module_runs_in_an_editable_install(tmp_path):
    command = [sys.executable, "-m", "uncertainty_mm.examples.lddu_full", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ})
    assert done.returncode == 0
    assert "The model of the paper" in done.stdout
