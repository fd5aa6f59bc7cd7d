"""The example: what the command line writes, repeats, resumes and refuses."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for extra in ("lightning", "torchmetrics", "matplotlib"):
    pytest.importorskip(extra)

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*:UserWarning"
    ),  # Lightning's advice on workers and devices
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SMALL = [
    *("--hidden-dim=16", "--heads=2", "--layers=1", "--z-dim=8", "--latent-dim=4"),
    *("--queue-size=64", "--batch-size=16", "--accelerator=cpu"),
]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("lddu_full", ROOT / "examples" / "lddu_full.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["lddu_full"] = module
    spec.loader.exec_module(module)
    return module


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
    assert {"best.ckpt", "last.ckpt", "metrics.json", "metrics.csv", "training.png"} <= {
        path.name for path in folder.iterdir()
    }
    results = json.loads((folder / "metrics.json").read_text())
    assert set(results["test"]) == {"Acc", "P", "R", "miF1", "mAP", "Brier"}
    assert results["seed"] == 0
    assert 0.01 <= results["threshold"] <= 0.99


def test_same_seed_gives_same_metrics(example, finished, tmp_path):
    folder, data = finished
    run(example, "--data", data, "--epochs", 3, "--lr", 0.01, "--output", tmp_path, *SMALL)
    assert (tmp_path / "metrics.csv").read_text() == (folder / "metrics.csv").read_text()


def test_resumed_run_equals_the_uninterrupted_one(example, finished, tmp_path, monkeypatch):
    folder, data = finished

    def interrupted(self):
        if self.current_epoch == 2:
            raise RuntimeError("power cut")

    arguments = ["--data", data, "--epochs", 3, "--lr", 0.01, "--output", tmp_path, *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(example.LitLDDU, "on_train_epoch_start", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            run(example, *arguments)
    run(example, *arguments, "--ckpt", tmp_path / "last.ckpt")
    assert (tmp_path / "metrics.csv").read_text() == (folder / "metrics.csv").read_text()
    whole, resumed = (
        torch.load(path / "last.ckpt", weights_only=True)["state_dict"]
        for path in (folder, tmp_path)
    )
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


def test_built_in_data_train(example, tmp_path, monkeypatch):
    full = example.synthetic
    monkeypatch.setattr(example, "synthetic", lambda seed: full(seed, (64, 32, 32)))
    run(example, "--epochs", 1, "--output", tmp_path, *SMALL)
    assert (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("option", ["--gate=oracle", "--gate=released", "--precision=bf16-mixed"])
def test_options_train(example, tmp_path, option):
    data = save(tmp_path / "data.npz")
    run(example, "--data", data, "--epochs", 1, option, "--output", tmp_path / "out", *SMALL)
    assert (tmp_path / "out" / "best.ckpt").exists()


def test_two_processes_train_and_share_their_history(tmp_path):
    data = save(tmp_path / "data.npz")
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
    assert state["model.tracker.history"][1].tolist() == [2] * 20  # every sample once an epoch
    assert state["model.contrastive.queue_classes"].ge(0).all()


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
    assert list(outputs["modalities"]) == ["a", "b"]
    for index, row in enumerate(rows):
        assert float(row["prob.second"]) == pytest.approx(outputs["probs"][index, 1], rel=1e-4)
        assert float(row["gate.first"]) == pytest.approx(outputs["gate"][index, 0], rel=1e-4)
        assert float(row["std_norm.b.first"]) == pytest.approx(
            outputs["std_norm"][index, 1, 0], rel=1e-4
        )
        predicted = outputs["probs"][index, 0] > outputs["threshold"]
        assert float(row["predicted.first"]) == predicted
    assert outputs["missing"][0].tolist() == [0, 1]
    assert outputs["std_norm"][0, 1] == pytest.approx(2.0)  # the prior: norm of four ones


def test_steps_that_are_not_finite_become_padding(example, tmp_path, capsys):
    content = arrays()
    features = content["features.a"].copy()
    features[3, 1, 0] = -np.inf
    features[4, 0, 2] = np.nan
    features[4, 4, 0] = np.nan
    parts = example.load_npz(save(tmp_path / "data.npz", **{"features.a": features}))
    assert "3 steps of `a` in 2 samples are not finite" in capsys.readouterr().out
    padding = parts["train"].padding["a"]
    assert padding.nonzero().tolist() == [[3, 1], [4, 0], [4, 4]]
    assert parts["train"].features["a"].isfinite().all()


def bad(key, change):
    content = arrays()
    return {key: change(content[key].copy())}


def put(index, value):
    def change(array):
        array = array.astype(np.result_type(array, np.min_scalar_type(value)))
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "missing `labels`"),
        ({"lengths.b": None}, "missing `lengths.b`"),
        ({"features.a": None, "features.b": None}, "no array `features.<modality>`"),
        (bad("labels", put((2, 1), 2)), "label `second` must be 0 or 1, got 2"),
        (bad("labels", lambda x: x.astype(float) * np.nan), "label `first` must be 0 or 1"),
        (bad("labels", lambda x: x[:, 0]), "`labels` must have shape"),
        ({"label_names": np.array(["x"])}, "1 names for 2 columns"),
        ({"label_names": np.array(["x", "x"])}, "repeats a name"),
        (bad("split", put(slice(None), 0)), "no sample in the validation split"),
        (bad("split", put(0, 3)), "`split` must hold"),
        (bad("split", lambda x: x[1:]), "`split` must have shape"),
        (bad("features.a", lambda x: x[:, :0]), "modality `a` is empty"),
        (bad("features.a", lambda x: x[1:]), "`features.a` must have shape"),
        (bad("features.a", lambda x: x.astype(str)), "must hold numbers"),
        (bad("lengths.b", put(0, 8)), "`lengths.b` must be in [0, 7]"),
        (bad("lengths.b", put(0, -1)), "`lengths.b` must be in [0, 7]"),
        (bad("lengths.b", lambda x: x / 2), "`lengths.b` must hold 60 integers"),
    ],
)
def test_bad_data_ends_in_one_line(example, tmp_path, changes, message):
    data = save(tmp_path / "data.npz", **changes)
    with pytest.raises(SystemExit) as stop:
        run(example, "--data", data, "--output", tmp_path / "out", *SMALL)
    assert str(stop.value).startswith(f"error: {data}: ")
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no archive", None])
def test_unreadable_file_ends_in_one_line(example, tmp_path, content):
    data = tmp_path / "data.npz"
    if content is not None:
        data.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        run(example, "--data", data, *SMALL)
    assert str(stop.value).startswith(f"error: {data}: ")
    assert "\n" not in str(stop.value)


def test_pickled_arrays_are_refused(example, tmp_path):
    data = save(tmp_path / "data.npz", label_names=np.array(["x", None], dtype=object))
    with pytest.raises(SystemExit, match="not a readable"):
        run(example, "--data", data, *SMALL)


def test_predict_refuses_other_labels_and_foreign_checkpoints(example, finished, tmp_path):
    folder, data = finished
    other = save(tmp_path / "other.npz", label_names=np.array(["second", "first"]))
    with pytest.raises(SystemExit, match=r"labels .* are not those of the checkpoint"):
        run(example, "predict", "--ckpt", folder / "best.ckpt", "--data", other)
    for ckpt, message in ((data, "not a checkpoint"), (tmp_path / "none.ckpt", "no such file")):
        with pytest.raises(SystemExit, match=message):
            run(example, "predict", "--ckpt", ckpt, "--data", data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs must be above 0"),
        (["--batch-size", "0"], "--batch-size must be above 0"),
        (["--heads", "3"], "--hidden-dim 16 is no multiple of --heads 3"),
        (["--dropout", "1"], "--dropout must be below 1"),
        (["--seed", str(2**32)], "--seed must be below 2**32"),
        (["--ckpt", "nowhere.ckpt"], "nowhere.ckpt: no such file"),
        (["--output", "/dev/null/folder"], "cannot write there"),
        (["--accelerator", "abacus"], "accelerator"),
        (["--precision", "7"], "recision"),
    ],
)
def test_bad_options_end_in_one_line(example, finished, options, message):
    with pytest.raises(SystemExit) as stop:
        run(example, "--data", finished[1], *SMALL, *options)
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(
    "options", [["--lr", "-1"], ["--lr", "x"], ["--layers", "1.5"], ["--gate", "x"]]
)
def test_argparse_refuses(example, options, capsys):
    with pytest.raises(SystemExit):
        run(example, *options)
    assert f"argument {options[0]}" in capsys.readouterr().err


def test_checkpoint_of_another_model_is_not_resumed(example, finished):
    folder, data = finished
    options = ["--data", data, "--ckpt", folder / "last.ckpt", *SMALL, "--lr", 0.01]
    with pytest.raises(SystemExit, match="cannot resume, `model` is"):
        run(example, *options, "--latent-dim", 5)
    with pytest.raises(SystemExit, match="3 epochs are done, --epochs is 3"):
        run(example, *options, "--epochs", 3)
    with pytest.raises(SystemExit, match="a run resumes where its checkpoint is"):
        run(example, *options, "--output", folder / "other")


def test_masked_modality_equals_a_missing_one(example):
    """Whatever stands at padded steps, the prediction is that without the modality."""
    torch.manual_seed(0)
    dims, steps = {"a": 3, "b": 2}, {"a": 5, "b": 7}
    model = example.LDDU(dims, steps, 4, 10, hidden_dim=16, heads=2, layers=1, queue_size=8).eval()
    features = {"a": torch.randn(6, 5, 3), "b": torch.randn(6, 7, 2)}
    padding = {"a": torch.zeros(6, 5, dtype=torch.bool), "b": torch.ones(6, 7, dtype=torch.bool)}
    first = model(features, padding)
    second = model(features | {"b": 100 * torch.randn(6, 7, 2)}, padding)
    torch.testing.assert_close(first.fused.logits, second.fused.logits, rtol=0, atol=0)
    assert first.missing.tolist() == [[False, True]] * 6
    assert torch.equal(first.latent.std[:, 1], torch.ones(6, 4, 64))


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


@pytest.mark.parametrize("lacking", [0, 1, 6])
def test_encoder_leaves_padding_out(example, monkeypatch, lacking):
    """Values and gradients are those of the padded computation, whoever lacks the modality."""
    encoder = example.SequenceEncoder(3, 9, 16, layers=2, heads=2, dropout=0.0).double()
    x = torch.randn(6, 7, 3, dtype=torch.double)
    padding = torch.rand(6, 7) < 0.4  # also between steps that are there
    padding[:lacking] = True

    class Padded(example.Steps):  # as on an accelerator
        def __init__(self, padding):
            super().__init__(torch.zeros_like(padding))

    results = []
    for steps in (example.Steps, Padded):
        monkeypatch.setattr(example, "Steps", steps)
        encoder.zero_grad()
        encoded = encoder(x, padding)
        assert encoded.isfinite().all()
        encoded[~padding].square().sum().backward()
        results.append([encoded[~padding], *(p.grad for p in encoder.parameters())])
    for packed, padded in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded)
