"""The example: what the command line writes, repeats, resumes and refuses."""

import copy
import csv
import json
import pickle
import re
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from examples_support import EXAMPLES, QUIET, ends_in_one_line, example_module, need_extras
from pages import DOCS, blocks
from support import poisoned
from uncertainty_mm import DiagonalGaussian, PlattScaling
from uncertainty_mm.data import write_folder

need_extras()
yaml = pytest.importorskip("yaml")
average_precision_score = pytest.importorskip("sklearn.metrics").average_precision_score
f1_score = pytest.importorskip("sklearn.metrics").f1_score

ROOT = EXAMPLES.parent
pytestmark = QUIET
SMALL = [
    *("--hidden-dim=16", "--heads=2", "--layers=1", "--z-dim=8", "--latent-dim=4"),
    *("--queue-size=64", "--batch-size=16", "--accelerator=cpu"),
]


@pytest.fixture(scope="module")
def example():
    with example_module("lddu_full") as module:
        yield module


def arrays(seed=0, count=60):
    """A data set in the documented layout; label 0 shows in modality `a`, sample 0 lacks modality `b`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (count, 2)).astype(np.uint8)
    a = rng.normal(size=(count, 5, 3)) + 3 * labels[:, :1, None]
    lengths = rng.integers(1, 8, count).astype(np.int32)
    lengths[0] = 0
    return {
        "features.a": a.astype(np.float16),
        "lengths.a": np.full(count, 5, np.int32),
        "features.b": rng.normal(size=(count, 7, 2)).astype(np.float16),
        "lengths.b": lengths,
        "labels": labels,
        "label_names": np.array(["first", "second"]),
        "split": np.repeat([0, 1, 2], count // 3).astype(np.uint8),
    }


def save(path, **changes):
    content = {key: value for key, value in (arrays() | changes).items() if value is not None}
    np.savez(path, **content)
    return path


def run(example, *arguments):
    example.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(example, tmp_path_factory):
    """A short training run: its folder and its data file."""
    folder = tmp_path_factory.mktemp("run")
    data = save(folder / "data.npz")
    run(example, "--data", data, "--epochs", 3, "--lr", 0.01, "--output", folder / "out", *SMALL)
    return folder / "out", data


def test_run_folder(finished):
    folder, _ = finished
    assert {
        *("best.ckpt", "last.ckpt", "metrics.json", "metrics.csv", "training.png"),
        *("config.yaml", "environment.json", "predictions.npz", "tensorboard"),
    } <= {path.name for path in folder.iterdir()}
    assert list(folder.glob("tensorboard/version_0/events.*"))
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    results = json.loads((folder / "metrics.json").read_text())
    measures = {"Acc", "P", "R", "miF1", "mAP", "Brier", "ECE", "AURC", "rho"}
    for part in ("validation", "test", "uncalibrated"):
        assert set(results[part]) == measures
    assert "Bayes" not in results  # nobody knows it of a file
    assert results["seed"] == 0
    first, second = results["threshold"]
    assert 0.01 <= first == second <= 0.99


def test_every_subset_of_the_modalities_is_evaluated(example, finished):
    folder, data = finished
    results = json.loads((folder / "metrics.json").read_text())
    rows = results["modalities"]
    assert list(rows) == ["a + b", "a", "b", "none"]
    assert {name: rows["a + b"][name] for name in results["test"]} == results["test"]
    lit = example.LitLDDU.load_from_checkpoint(folder / "best.ckpt", weights_only=True).eval()
    test = example.read_data(data)["test"]
    padding = test.padding_mask | {"b": torch.ones_like(test.padding_mask["b"])}
    with torch.no_grad():
        logits = lit.model(test.features, padding).fused.logits
    brier = (lit.calibration(logits).sigmoid() - test.labels).square().mean()
    assert rows["a"]["Brier"] == pytest.approx(float(brier), abs=1e-4)


def test_same_seed_gives_same_metrics(example, finished, tmp_path):
    folder, data = finished
    run(example, "--data", data, "--epochs", 3, "--lr", 0.01, "--output", tmp_path, *SMALL)
    assert (tmp_path / "metrics.csv").read_text() == (folder / "metrics.csv").read_text()


@pytest.mark.parametrize(
    "options", [[], ["--drop-modality", 0.5], ["--corrupt-modality", 0.5, "--thresholds", "label"]]
)
def test_resumed_run_equals_the_uninterrupted_one(
    example, finished, tmp_path, monkeypatch, options
):
    folder, data = finished
    common = ["--data", data, "--epochs", 3, "--lr", 0.01, *SMALL, *options]
    if options:
        folder = tmp_path / "whole"
        run(example, *common, "--output", folder)
        assert (folder / "metrics.csv").read_text() != (finished[0] / "metrics.csv").read_text()
    tmp_path = tmp_path / "resumed"

    def interrupted(self):
        if self.current_epoch == 2:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(example.LitLDDU, "on_train_epoch_start", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            run(example, *common, "--output", tmp_path)
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    tmp_path = moved
    run(example, *common, "--output", tmp_path, "--ckpt", tmp_path / "last.ckpt")
    assert (tmp_path / "metrics.csv").read_text() == (folder / "metrics.csv").read_text()
    for name in ("best.ckpt", "last.ckpt"):
        whole, resumed = (
            torch.load(path / name, weights_only=True)["state_dict"] for path in (folder, tmp_path)
        )
        assert whole.keys() == resumed.keys()
        for key, value in whole.items():
            assert torch.equal(value, resumed[key]), (name, key)


def test_one_label_and_longer_test_sequences(example, tmp_path):
    labels = arrays()["labels"][:, :1]
    data = save(tmp_path / "data.npz", labels=labels, label_names=np.array(["only"]))
    parts = example.read_data(data)
    longer = {name: torch.cat([x, x], dim=1) for name, x in parts["test"].features.items()}
    masks = {name: torch.cat([x, x], dim=1) for name, x in parts["test"].padding_mask.items()}
    parts["test"] = example.MultimodalDataset(longer, masks, parts["test"].labels, ["only"])
    write_folder(parts, tmp_path / "folder")
    out = tmp_path / "out"
    run(example, "--data", tmp_path / "folder", "--epochs", 1, "--output", out, *SMALL)
    results = json.loads((out / "metrics.json").read_text())
    with np.load(out / "predictions.npz") as file:
        probs, threshold = file["probs"], file["threshold"]
    test = labels[40:, 0]
    score = f1_score(test, probs[:, 0] > threshold[0])
    assert results["test"]["miF1"] == pytest.approx(score, abs=1e-4)
    precision = average_precision_score(test, probs[:, 0])
    assert results["test"]["mAP"] == pytest.approx(precision, abs=1e-4)


def test_statistics_are_those_of_the_valid_steps(example, monkeypatch):
    torch.manual_seed(0)
    features = {"a": 3 + 5 * torch.randn(50, 4, 3), "b": torch.randn(50, 2, 1)}
    masks = {"a": torch.rand(50, 4) < 0.4, "b": torch.ones(50, 2).bool()}
    data = example.MultimodalDataset(features, masks, torch.ones(50, 1), ["x"])
    loader = data.loader
    monkeypatch.setattr(data, "loader", lambda _: loader(7))  # several batches, one of them small
    encoders = torch.nn.ModuleDict(
        {
            name: example.SequenceEncoder(dim, 4, 8, 1, 2, 0.0, "apart")
            for name, dim in data.dims.items()
        }
    )
    example.set_statistics(encoders, data)
    valid = features["a"][~masks["a"]]
    torch.testing.assert_close(encoders["a"].mean, valid.mean(0))
    torch.testing.assert_close(encoders["a"].std, valid.std(0, correction=0))
    assert encoders["b"].mean == 0  # nobody has this modality
    assert encoders["b"].std == 1


def test_built_in_data_train(example, tmp_path, monkeypatch):
    full = example.synthetic
    monkeypatch.setattr(example, "synthetic", lambda seed: full(seed, (64, 32, 32)))
    run(example, "--epochs", 1, "--output", tmp_path, *SMALL)
    results = json.loads((tmp_path / "metrics.json").read_text())
    assert results["Bayes"]["Brier"] < results["test"]["Brier"]
    assert len(results["modalities"]) == 2**3


@pytest.mark.parametrize("option", ["--gate=oracle", "--precision=bf16-mixed"])
def test_options_train(example, tmp_path, option):
    data = save(tmp_path / "data.npz")
    run(example, "--data", data, "--epochs", 1, option, "--output", tmp_path / "out", *SMALL)
    assert (tmp_path / "out" / "best.ckpt").exists()


def test_two_processes_train_and_share_their_history(tmp_path):
    data = save(tmp_path / "data.npz", split=np.repeat([0, 1, 2], (20, 33, 7)).astype(np.uint8))
    script = (
        tmp_path / "train.py"
    )  # fails if the processes ask each other for the sizes of their batches
    script.write_text(
        "import runpy, uncertainty_mm.contrastive\n"
        "del uncertainty_mm.contrastive.largest_of_ranks\n"
        f"runpy.run_path({str(ROOT / 'examples' / 'lddu_full.py')!r}, run_name='__main__')\n"
    )
    command = [sys.executable, script, "--data", data, "--epochs", "2", *SMALL]
    command += ["--output", tmp_path / "out", "--devices", "2", "--strategy", "ddp"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    state = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["state_dict"]
    # every sample once an epoch, its modalities apart; sample 0 lacks the second
    assert state["model.tracker.history"][1].tolist() == [[2, 0]] + [[2, 2]] * 19
    assert state["model.contrastive.queue_classes"].ge(0).all()
    # The 33 samples, of which one process had a batch more, were counted once: both say of them what one says.
    with open(tmp_path / "out" / "metrics.csv", newline="") as file:
        logged = max(float(row["val/miF1"]) for row in csv.DictReader(file))
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert results["validation"]["miF1"] == pytest.approx(logged, abs=1e-4)


def test_validation_split_needs_a_sample_for_every_process(example, tmp_path, capsys):
    data = save(tmp_path / "data.npz", split=np.repeat([0, 1, 2], (20, 1, 39)).astype(np.uint8))
    with pytest.raises(SystemExit):
        run(example, "--data", data, "--devices", 2, "--output", tmp_path / "out", *SMALL)
    assert "--devices 2: the validation split has only 1 samples" in capsys.readouterr().err


def test_predict_csv_and_npz_agree(example, finished, tmp_path):
    folder, data = finished
    common = ["predict", "--ckpt", folder / "best.ckpt", "--data", data, "--split", "train"]
    run(example, *common, "--output", tmp_path / "p.csv", "--accelerator", "cpu")
    run(example, *common, "--output", tmp_path / "p.npz", "--accelerator", "cpu")
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with np.load(tmp_path / "p.npz") as file:
        outputs = dict(file)
    assert len(rows) == 20
    assert outputs["probs"].shape == (20, 2)
    assert outputs["std_norm"].shape == (20, 2, 2)  # sample, modality, label
    p = outputs["probs"].astype(float)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum(1)
    assert outputs["uncertainty"] == pytest.approx(entropy, rel=1e-4)
    assert list(outputs["modalities"]) == ["a", "b"]
    for index, row in enumerate(rows):
        assert float(row["prob.second"]) == pytest.approx(outputs["probs"][index, 1], rel=1e-4)
        assert float(row["gate.first"]) == pytest.approx(outputs["gate"][index, 0], rel=1e-4)
        assert float(row["std_norm.b.first"]) == pytest.approx(
            outputs["std_norm"][index, 1, 0], rel=1e-4
        )
        assert float(row["uncertainty"]) == pytest.approx(entropy[index], rel=1e-4)
        predicted = outputs["probs"][index] > outputs["threshold"]
        assert [float(row["predicted.first"]), float(row["predicted.second"])] == predicted.tolist()
    assert outputs["missing"][0].tolist() == [0, 1]
    assert outputs["std_norm"][0, 1] == pytest.approx(2.0)  # the prior: norm of four ones


def test_predict_calibrates_as_the_validation_set_asks(example, finished, tmp_path):
    """Scale, shift and thresholds are fitted on the validation set and travel in the checkpoint."""
    _, data = finished
    options = ["--epochs", 1, "--lr", 0.01, "--thresholds", "label"]
    run(example, "--data", data, *options, "--output", tmp_path, *SMALL)
    ckpt = tmp_path / "best.ckpt"
    lit = example.LitLDDU.load_from_checkpoint(ckpt, weights_only=True).eval()
    parts = example.read_data(data)
    with torch.no_grad():
        validation, test = (
            lit.model(parts[part].features, parts[part].padding_mask).fused.logits
            for part in ("validation", "test")
        )
    labels = parts["validation"].labels
    fitted = PlattScaling(2).fit(validation, labels)
    probs = fitted(validation).sigmoid()
    state = torch.load(ckpt, weights_only=True)["state_dict"]
    torch.testing.assert_close(state["calibration.scale"], fitted.scale, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state["calibration.shift"], fitted.shift, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(fitted.scale, torch.ones(2), atol=0.01)
    torch.testing.assert_close(state["threshold"], example.best_threshold(probs, labels, "label"))

    output = tmp_path / "p.npz"
    common = ["predict", "--ckpt", ckpt, "--data", data, "--accelerator", "cpu"]
    run(example, *common, "--output", output)
    with np.load(output) as file:
        outputs = {
            key: torch.from_numpy(file[key]) for key in ("probs", "uncalibrated", "threshold")
        }
    torch.testing.assert_close(outputs["probs"], lit.calibration(test).sigmoid())
    torch.testing.assert_close(outputs["uncalibrated"], test.sigmoid())
    assert torch.equal(outputs["threshold"], state["threshold"])
    results = json.loads((tmp_path / "metrics.json").read_text())
    assert results["threshold"] == pytest.approx(state["threshold"].tolist(), abs=1e-6)
    predicted = (outputs["probs"] > outputs["threshold"]).int()
    f1 = f1_score(parts["test"].labels, predicted, average="micro")
    assert results["test"]["miF1"] == pytest.approx(f1, abs=1e-4)


@pytest.mark.parametrize(("thresholds", "average"), [("single", "micro"), ("label", None)])
def test_best_threshold_has_the_best_f1_of_the_grid(example, thresholds, average):
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(80, 3, generator=generator) < 0.4).long()
    noise = torch.rand(80, 3, generator=generator)
    probs = (0.5 * labels + 0.7 * noise).clamp(0, 1) * torch.tensor([0.3, 0.6, 1.0])
    found = example.best_threshold(probs, labels, thresholds)
    assert found.shape == ((1,) if thresholds == "single" else (3,))
    score = f1_score(labels, probs > found, average=average)
    others = np.stack([f1_score(labels, probs > t / 100, average=average) for t in range(1, 100)])
    assert score == pytest.approx(others.max(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "missing `labels`"),
        ({"split": np.zeros(60, np.uint8)}, "no sample in the validation split"),
        ({"label_names": np.array(["x", None], dtype=object)}, "not a readable"),
    ],
)
def test_bad_data_ends_in_one_line(example, tmp_path, capsys, changes, message):
    data = save(tmp_path / "data.npz", **changes)
    with ends_in_one_line(capsys, f"^error: {re.escape(str(data))}: .*{re.escape(message)}"):
        run(example, "--data", data, "--output", tmp_path / "out", *SMALL)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none.npz", [], "no such file"),
        ("data.csv", [], "--format must say what it is"),
        ("data.npz", ["--labels", "table.csv"], "--labels goes with --format mmsa, got npz"),
        ("data.npz", ["--format", "m3ed"], "data.npz"),
        ("data.npz", ["--format", "tailor"], "data.npz"),
    ],
)
def test_file_of_another_layout_ends_in_one_line(example, tmp_path, capsys, name, options, message):
    save(tmp_path / "data.npz")
    with ends_in_one_line(capsys, f"^error: .*{re.escape(message)}"):
        run(example, "--data", tmp_path / name, *options, *SMALL)


def mmsa(path):
    """A pickle in the layout of MMSA and a table with its emotions in another order of rows."""
    rng, content, rows = np.random.default_rng(0), {}, []
    for split, count in (("train", 20), ("valid", 10), ("test", 10)):
        ids = [f"{split}{number}$_$0" for number in range(count)]
        intensities = np.round(rng.uniform(0, 3, (count, 6)) * rng.integers(0, 2, (count, 6)), 2)
        content[split] = {
            "id": np.array(ids),
            "text": rng.normal(size=(count, 5, 4)).astype(np.float32),
            "audio": rng.normal(size=(count, 9, 3)),
            "vision": rng.normal(size=(count, 7, 2)),
            "audio_lengths": rng.integers(1, 10, count).tolist(),
            "vision_lengths": rng.integers(1, 8, count).tolist(),
        }
        rows += [[name, *row] for name, row in zip(ids, intensities.tolist(), strict=True)]
    path.write_bytes(pickle.dumps(content))
    table = path.with_suffix(".csv")
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "happy", "sad", "anger", "surprise", "disgust", "fear"])
        writer.writerows(rows[::-1])
    return path, table


@pytest.mark.parametrize("layout", ["mmsa", "folder"])
def test_other_layouts_train_and_are_predicted(example, tmp_path, layout):
    data, table = mmsa(tmp_path / "aligned_50.pkl")
    where = ["--data", data, "--labels", table]
    if layout == "folder":
        write_folder(example.read_data(data, labels=table), tmp_path / "folder")
        where = ["--data", tmp_path / "folder"]
    out = tmp_path / "out"
    run(example, *where, "--config", "mosei-unaligned", "--epochs", 1, "--output", out, *SMALL)
    run(example, "predict", "--ckpt", out / "best.ckpt", *where, "--output", out / "rows.csv")
    with open(out / "rows.csv") as file:
        assert [row["sample"] for row in csv.DictReader(file)] == [
            f"test{number}$_$0" for number in range(10)
        ]


PRESETS = sorted(path.stem for path in (ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_overridden_by_the_command_line(example, preset):
    arguments = ["train", *example.options_from_file(["--config", preset, "--lr", "1"])]
    args = example.parser().parse_args(arguments)
    content = yaml.safe_load((ROOT / "examples" / "configs" / f"{preset}.yaml").read_text())
    assert args.lr == 1
    for name in content.keys() - {"lr"}:
        assert getattr(args, name) == content[name], name


def test_presets_have_the_values_of_the_paper(example):
    assert PRESETS == ["m3ed", "mosei-aligned", "mosei-unaligned", "released", "small"]
    first, *others = (example.options_from_file(["--config", name]) for name in PRESETS[:3])
    assert others == [first, first]
    args = example.parser().parse_args(["train", *first])
    sizes = (args.hidden_dim, args.z_dim, args.latent_dim, args.layers, args.queue_size)
    assert sizes == (256, 128, 64, 3, 8192)
    assert (args.batch_size, args.lr, args.epochs) == (128, 2e-5, 30)
    assert (args.ocl_weight, args.scl_weight, args.dir_weight) == (0.1, 0.8, 0.1)


def test_start_page_makes_data_to_train_on(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for _, source in blocks(DOCS / "start.md", "testcode"):
        exec(source, names)
    assert {parameter.grad is None for parameter in names["model"].parameters()} == {False}
    assert capsys.readouterr().out.startswith("torch.Size([16, 3])")
    run(example, "--data", "mine.npz", "--config", "small", "--fast-dev-run")
    assert "Acc" in capsys.readouterr().out


def test_built_in_data_get_the_small_model_unless_told_otherwise(example):
    small = yaml.safe_load((example.PRESETS / "small.yaml").read_text())
    for name, value in small.items():
        assert getattr(example.parse([]), name) == float(value), name
    defaults = example.parse(["--data", "mine.npz"])
    assert (defaults.hidden_dim, defaults.layers, defaults.epochs) == (256, 3, 30)
    assert example.parse(["--hidden-dim", "32"]).hidden_dim == 32
    assert example.parse(["--hidden-dim", "32"]).layers == 1
    assert example.parse(["--config", "released"]).batch_size == 64
    assert example.parse(["--config=released"]).hidden_dim == 256


def test_saved_options_repeat_the_run(example, finished, tmp_path):
    folder, data = finished
    config = folder / "config.yaml"
    assert yaml.safe_load(config.read_text())["data"] == str(data)
    run(example, "--config", config, "--output", tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == (folder / "metrics.csv").read_text()
    assert (tmp_path / "config.yaml").read_text() == config.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", "must hold options"),
        ("a: [", "neither a file of options nor one of m3ed, mosei"),
        (None, "neither a file of options"),
    ],
)
def test_bad_config_ends_in_one_line(example, tmp_path, content, message, capsys):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with ends_in_one_line(capsys, re.escape(message)):
        run(example, "--config", path)


def test_unknown_option_of_a_config_is_refused(example, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("learning_rate: 1")
    with ends_in_one_line(capsys, "--learning-rate=1"):
        run(example, "--config", tmp_path / "config.yaml")


def test_fast_dev_run_keeps_nothing(example, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ends_in_one_line(capsys, "--fast-dev-run keeps nothing"):
        run(example, "--fast-dev-run", "--output", "out")
    run(example, "--data", finished[1], "--fast-dev-run", *SMALL)
    assert "test split" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_predict_refuses_other_labels_and_foreign_checkpoints(example, finished, tmp_path, capsys):
    folder, data = finished
    other = save(tmp_path / "other.npz", label_names=np.array(["second", "first"]))
    with ends_in_one_line(capsys, r"labels .* are not those of the checkpoint"):
        run(example, "predict", "--ckpt", folder / "best.ckpt", "--data", other)
    content = dict(sorted(arrays().items(), reverse=True))
    np.savez(tmp_path / "order.npz", **content)
    with ends_in_one_line(capsys, r"modalities .* are not those of the checkpoint"):
        run(example, "predict", "--ckpt", folder / "best.ckpt", "--data", tmp_path / "order.npz")
    with ends_in_one_line(capsys, "no such folder"):
        run(
            example,
            "predict",
            "--ckpt",
            folder / "best.ckpt",
            "--data",
            data,
            "--output",
            "no/x.csv",
        )
    old = torch.load(folder / "best.ckpt", weights_only=True)
    del old["state_dict"]["model.modality_bias"]
    torch.save(old, tmp_path / "old.ckpt")
    for ckpt, message in (
        (data, "not a checkpoint"),
        (tmp_path / "none.ckpt", "no such file"),
        (tmp_path / "old.ckpt", "of another model or version .*modality_bias"),
    ):
        with ends_in_one_line(capsys, message):
            run(example, "predict", "--ckpt", ckpt, "--data", data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs must be above 0"),
        (["--batch-size", "0"], "--batch-size must be above 0"),
        (["--heads", "3"], "--hidden-dim 16 is no multiple of --heads 3"),
        (["--dropout", "1"], "--dropout must be below 1"),
        (["--drop-modality", "1"], "--drop-modality must be below 1"),
        (["--seed", str(2**32)], "--seed must be below 2**32"),
        (["--ckpt", "nowhere.ckpt"], "nowhere.ckpt: no such file"),
        (["--output", "/dev/null/folder"], "cannot write there"),
        (["--accelerator", "abacus"], "accelerator"),
        (["--precision", "7"], "recision"),
    ],
)
def test_bad_options_end_in_one_line(example, finished, options, message, capsys):
    with ends_in_one_line(capsys, re.escape(message)):
        run(example, "--data", finished[1], *SMALL, *options)


@pytest.mark.parametrize(
    "options", [["--lr", "-1"], ["--lr", "x"], ["--layers", "1.5"], ["--gate", "x"]]
)
def test_argparse_refuses(example, options, capsys):
    with ends_in_one_line(capsys, f"argument {options[0]}"):
        run(example, *options)


def test_checkpoint_of_another_model_is_not_resumed(example, finished, capsys):
    folder, data = finished
    options = ["--data", data, "--ckpt", folder / "last.ckpt", *SMALL, "--lr", 0.01]
    with ends_in_one_line(capsys, "cannot resume, `model` is"):
        run(example, *options, "--latent-dim", 5)
    with ends_in_one_line(capsys, "3 epochs are done, --epochs is 3"):
        run(example, *options, "--epochs", 3)
    with ends_in_one_line(capsys, "a run resumes where its checkpoint is"):
        run(example, *options, "--output", folder / "other")


def small_model(example, **options):
    """A model of two modalities and four labels, without dropout."""
    options = {"hidden_dim": 16, "heads": 2, "layers": 1, "z_dim": 8, "latent_dim": 4} | options
    dims, steps = {"a": 3, "b": 2}, {"a": 5, "b": 7}
    return example.LDDU(dims, steps, 4, 10, queue_size=32, dropout=0.0, **options)


def small_inputs():
    """Features and padding of six samples; the last one lacks `b`."""
    features = {"a": torch.randn(6, 5, 3), "b": torch.randn(6, 7, 2)}
    padding = {name: torch.rand(x.shape[:2]) < 0.3 for name, x in features.items()}
    padding["a"][:, 0] = padding["b"][:, 0] = False
    padding["b"][5] = True
    return features, padding


@pytest.mark.parametrize("combine", ["product", "concat"])
@pytest.mark.parametrize("size", ["apart", "within"])
def test_masked_modality_equals_a_missing_one(example, combine, size):
    """Whatever stands at padded steps, the prediction is that without the modality."""
    model = small_model(example, combine=combine, size=size).eval()
    features, padding = small_inputs()
    padding["b"] = torch.ones(6, 7, dtype=torch.bool)
    first = model(features, padding)
    other = {"a": features["a"].masked_fill(padding["a"].unsqueeze(2), 1e4)}
    second = model(other | {"b": 100 * torch.randn(6, 7, 2)}, padding)
    for one, two in zip(tree_leaves(first), tree_leaves(second), strict=True):
        assert torch.equal(one, two)
    assert first.missing.tolist() == [[False, True]] * 6
    assert torch.equal(first.latent.std[:, 1], torch.ones(6, 4, 4))
    assert torch.equal(first.latent.mean[:, 1], torch.zeros(6, 4, 4))
    assert not torch.equal(first.fused.logits[0], first.fused.logits[1])  # `a` is still read
    latent = DiagonalGaussian(*(poisoned(x, first.missing, 9.0) for x in first.latent))
    uncertainty = model.uncertainty(first.dir_logits.sigmoid(), None)
    assert torch.equal(model.fusion(latent, uncertainty, first.missing).logits, first.fused.logits)


@pytest.mark.parametrize("combine", ["product", "concat"])
def test_samples_without_any_modality_get_one_answer(example, combine):
    model = small_model(example, combine=combine)
    features, _ = small_inputs()
    padding = {name: torch.ones(x.shape[:2], dtype=torch.bool) for name, x in features.items()}
    with torch.no_grad():
        output = model(features, padding)
    for leaf in tree_leaves(output):
        assert leaf.float().isfinite().all()
        assert torch.equal(leaf, leaf[:1].expand_as(leaf))
    labels, indices = torch.randint(0, 2, (6, 4)), torch.arange(6)
    for _ in range(2):
        losses = model.losses(model(features, padding), labels, indices)
        losses["total"].backward()
        assert losses["ocl"] == losses["modality"] == losses["scl"] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.tracker.counts(indices).sum() == 0  # nothing was seen, so nothing was right


CHOICES = {"gate", "mean_weight", "size", "combine", "ordinality", "pairs", "targets", "embedding"}
CHOICES |= {"anchors", "final", "std_branch"}


def test_every_choice_is_tested(example):
    assert {k for k, (v, _) in example.MODEL_OPTIONS.items() if isinstance(v, tuple)} == CHOICES


def test_every_choice_is_documented(example):
    page = (ROOT / "docs" / "example.md").read_text()
    for option, (choices, _) in (example.MODEL_OPTIONS | example.TRAINING_OPTIONS).items():
        if isinstance(choices, tuple) and option != "strategy":  # Lightning's
            (row,) = re.findall(rf"^\| `--{option.replace('_', '-')}` \|.*", page, re.MULTILINE)
            assert set(re.findall(r"`([^`]+)`", row)) >= set(choices)
            assert f"| `{choices[0]}`" in row  # the default has a column of its own


@pytest.mark.parametrize("option", sorted(CHOICES))
def test_every_choice_takes_a_step_of_its_own(example, option):
    totals = []
    for choice in example.MODEL_OPTIONS[option][0]:
        torch.manual_seed(0)
        model = small_model(example, **{option: choice})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        labels, indices = torch.randint(0, 2, (6, 4)), torch.arange(6)
        features, padding = small_inputs()
        for _ in range(2):  # samples have a history in the second step only
            losses = model.losses(model(features, padding, labels), labels, indices)
            optimizer.zero_grad()
            losses["total"].backward()
            assert losses["ocl"].isfinite()
            for name, parameter in model.named_parameters():
                assert parameter.grad is None or parameter.grad.isfinite().all(), (choice, name)
            optimizer.step()
        totals.append(float(losses["total"]))
    assert len(set(totals)) == len(totals) > 1, totals


def test_soft_labels_are_what_the_classifiers_are_trained_towards(example):
    """The three cross-entropies read the targets; the contrastive and the ordinality loss keep the labels."""
    model = small_model(example)
    features, padding = small_inputs()
    labels, indices = torch.randint(0, 2, (6, 4)), torch.arange(6)
    shares = torch.rand(6, 4)
    output = model(features, padding)
    hard, soft, same = (
        copy.deepcopy(model).losses(output, labels, indices, targets)
        for targets in (None, shares, labels.float())
    )
    for name, logits in (("cls", output.logits), ("dir", output.dir_logits)):
        probs = logits.sigmoid()
        entropy = -(shares * probs.log() + (1 - shares) * (1 - probs).log()).mean()
        torch.testing.assert_close(soft[name], entropy)
    probs = output.modality_logits.sigmoid()
    entropy = -(shares[:, None] * probs.log() + (1 - shares[:, None]) * (1 - probs).log())
    seen = ~output.missing.unsqueeze(2)
    torch.testing.assert_close(soft["modality"], (entropy * seen).mean())
    assert soft["scl"] == hard["scl"] > 0
    assert same == hard


def test_gaussians_are_pulled_towards_the_prior(example):
    """The mean divergence, a modality that is missing having none; its gradient makes large deviations smaller."""
    features, padding = small_inputs()
    padding["b"] = torch.ones_like(padding["b"])
    labels, indices = torch.randint(0, 2, (6, 4)), torch.arange(6)
    totals = []
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        model = small_model(example, kl_weight=weight).eval()
        with torch.no_grad():
            model.decoupler.log_var_head.bias.fill_(3.0)
        output = model(features, padding)
        mean, std = output.latent.mean[:, 0], output.latent.std[:, 0]
        divergence = (mean**2 + std**2 - 1 - 2 * std.log()).sum(-1) / 2
        losses = model.losses(output, labels, indices)
        torch.testing.assert_close(losses["kl"], divergence.mean() / 2)  # of two modalities
        totals.append(losses["total"])
    torch.testing.assert_close(totals[1], totals[0] + 0.5 * losses["kl"])
    (slope,) = torch.autograd.grad(losses["kl"], model.decoupler.log_var_head.bias)
    assert (slope[0] > 0).all()
    assert (slope[1] == 0).all()


@pytest.mark.parametrize("largest", [1, 3])
def test_soft_labels_of_a_file(example, tmp_path, monkeypatch, largest):
    """Shares are taken as they are, intensities as a share of the largest; in between is a mixture with the labels."""
    content = arrays()
    soft = np.random.default_rng(1).random((60, 2)).astype(np.float32)
    soft[3, 1] = 1.0
    data = save(tmp_path / "data.npz", soft_labels=largest * soft)
    seen = []
    targets = example.LitLDDU.targets

    def spy(self, batch):
        seen.append((batch.indices, targets(self, batch)))
        return seen[-1][1]

    monkeypatch.setattr(example.LitLDDU, "targets", spy)
    common = ["--data", data, "--epochs", 1, "--soft-labels", 0.25, *SMALL]
    run(example, *common, "--output", tmp_path / "out")
    rows, values = (torch.cat(x) for x in zip(*seen, strict=True))
    train = rows.sort().values
    assert train.tolist() == list(range(20))  # every training sample once
    expected = 0.25 * soft[:20] + 0.75 * content["labels"][:20]
    np.testing.assert_allclose(values[rows.argsort()], expected, rtol=1e-5, atol=1e-6)


def test_soft_labels_have_to_be_there(example, tmp_path, capsys):
    data = save(tmp_path / "data.npz")
    for value, problem in ((1, "the training split has none"), (2, "must be in [0, 1]")):
        with ends_in_one_line(capsys, re.escape(problem)):
            run(example, "--data", data, "--soft-labels", value, "--output", tmp_path / "out")


def test_residual_prediction_adds_the_first_one(example):
    torch.manual_seed(0)
    model = small_model(example, final="residual").eval()
    features, padding = small_inputs()
    output = model(features, padding)
    torch.testing.assert_close(output.logits, output.dir_logits + output.fused.logits)
    labels = torch.randint(0, 2, (6, 4))
    loss = model.losses(output, labels, torch.arange(6))["cls"]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, labels.float())
    torch.testing.assert_close(loss, expected)
    model.residual = False
    assert torch.equal(model(features, padding).logits, output.fused.logits)


@pytest.mark.parametrize("targets", ["both", "modality", "pooled"])
def test_modality_answers_for_its_own_errors(example, targets):
    """The ordinality loss compares each modality's standard deviations with its own predictions."""
    model = small_model(example, targets=targets)
    features, padding = small_inputs()
    labels, indices = torch.randint(0, 2, (6, 4)), torch.tensor([7, 0, 3, 9, 2, 5])
    output = model(features, padding)
    assert model.calibration(output, labels, indices) == 0  # no history yet
    distance = (output.modality_logits.sigmoid() - labels.unsqueeze(1)).abs().mean(2)
    history = model.tracker(indices)
    assert model.tracker.counts(indices).tolist() == [[1, 1]] * 5 + [[1, 0]]
    torch.testing.assert_close(history[:5], 1 - distance[:5])
    padding["b"][0] = True  # lost since: its history of `b` stays, and is not compared
    output = model(features, padding)
    distance = (output.modality_logits.sigmoid() - labels.unsqueeze(1)).abs().mean(2)
    std = output.latent.std.flatten(2).norm(dim=2)
    within, everything = 0, []
    for modality, samples in enumerate((slice(0, 6), slice(1, 5))):
        own = [score[samples, modality] for score in (std, distance, history)]
        within = within + model.ordinality(*own)
        everything.append(own)
    across = model.ordinality(*(torch.cat(scores) for scores in zip(*everything, strict=True)))
    expected = {"modality": within, "pooled": across, "both": within + across}[targets]
    torch.testing.assert_close(model.calibration(output, labels, indices), expected)
    assert model.tracker.counts(indices).tolist() == [[2, 1]] + [[2, 2]] * 4 + [[2, 0]]


def test_disturbed_training_samples(example):
    """As many sequences as asked are left out or get noise, of the size asked, and none at padding."""
    options = {"hidden_dim": 16, "heads": 2, "layers": 1, "queue_size": 0}
    lit = example.LitLDDU({"a": 3}, {"a": 5}, ["x"], 4000, options, drop_modality=0.4)
    lit.model.encoders["a"].std.copy_(torch.tensor([0.1, 1.0, 10.0]))
    batch = example.MultimodalBatch(
        {"a": torch.ones(4000, 5, 3)},
        {"a": torch.arange(5) >= torch.full((4000, 1), 3)},
        torch.zeros(4000, 1),
        torch.arange(4000),
    )
    features, padding = lit.disturbed(batch)
    assert torch.equal(features["a"], batch.features["a"])
    lost = padding["a"].all(1)
    assert torch.equal(padding["a"][~lost], batch.padding_mask["a"][~lost])
    assert float(lost.float().mean()) == pytest.approx(0.2, abs=0.03)
    lit.hparams["drop_modality"], lit.hparams["corrupt_modality"] = 0.0, 0.4
    features, padding = lit.disturbed(batch)
    assert torch.equal(padding["a"], batch.padding_mask["a"])
    noise = features["a"] - 1
    assert not noise[batch.padding_mask["a"]].any()
    changed = noise.flatten(1).any(1)
    assert float(changed.float().mean()) == pytest.approx(0.4, abs=0.04)
    # the variance of a uniform size in [0, 5] times a standard normal is 25 / 3
    spread = noise[changed][:, :3].square().mean((0, 1)).sqrt() / lit.model.encoders["a"].std
    torch.testing.assert_close(spread, torch.full((3,), (25 / 3) ** 0.5), rtol=0.1, atol=0)


def test_accuracy_is_the_mean_jaccard_index(example):
    from sklearn.metrics import jaccard_score, precision_recall_fscore_support

    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(50, 4, generator=generator)
    labels = (torch.rand(50, 4, generator=generator) < 0.4).long()
    labels[0], probs[0] = 0, 0  # nothing there, nothing said: counts as 0
    result = example.evaluate(probs, labels, 0.5)
    predicted = (probs > 0.5).long()
    expected = jaccard_score(labels, predicted, average="samples", zero_division=0)
    assert result["Acc"] == pytest.approx(expected, abs=1e-4)
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, average="micro")
    assert (result["P"], result["R"], result["miF1"]) == pytest.approx(
        (precision, recall, f1), abs=1e-4
    )
