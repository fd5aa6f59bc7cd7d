"""The example where something goes wrong: it is killed, a checkpoint is half written, a batch is not finite."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from endurance import LENGTHS, SMALL, content, same, small_example
from examples_support import QUIET, ends_in_one_line, example_module, need_extras

need_extras()
pytestmark = QUIET
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def example():
    with example_module("lddu_full"):
        yield small_example()


@pytest.mark.skipif(sys.platform != "linux", reason="kills and looks into processes")
def test_killed_training_ends_as_the_undisturbed_one():
    command = [sys.executable, ROOT / "tests" / "endurance.py", "kills", "--count=1", "--seed=1"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    assert "1 kills" in output


def test_earlier_file_survives_a_death_while_the_next_is_written(example, tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    checkpoints = example.CompleteCheckpoints()
    checkpoints.save_checkpoint({"epoch": 0}, path)

    def power_cut(*_):
        raise OSError("power cut")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, power_cut)
            with pytest.raises(OSError, match="power cut"):
                checkpoints.save_checkpoint({"epoch": 1}, path)
        assert torch.load(path, weights_only=True) == {"epoch": 0}
    checkpoints.save_checkpoint({"epoch": 1}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("length", LENGTHS)
def test_run_that_died_in_its_evaluation_is_completed(example, tmp_path, monkeypatch, length):
    def run(folder, *options):
        example.main([*SMALL, *LENGTHS[length], "--output", str(tmp_path / folder), *options])

    def interrupted(*_):
        raise RuntimeError("power cut")

    run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(example, "evaluate", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            run("resumed")
    assert not (tmp_path / "resumed" / "metrics.json").exists()
    run("resumed", "--ckpt", str(tmp_path / "resumed" / "last.ckpt"))
    same(content(tmp_path / "whole"), content(tmp_path / "resumed"))


def test_new_run_in_a_folder_does_not_pass_for_complete(example, tmp_path, monkeypatch):
    options = [*SMALL, "--epochs=1", "--output", str(tmp_path)]
    example.main(options)

    def interrupted(*_):
        raise RuntimeError("power cut")

    monkeypatch.setattr(example.LitLDDU, "on_train_epoch_start", interrupted)
    with pytest.raises(RuntimeError, match="power cut"):
        example.main(options)
    assert not (tmp_path / "metrics.json").exists()


# --- Not finite ------------------------------------------------------------------------------------------------------

BROKEN = (7, 50)  # samples of different batches in both epochs


def spoil(example, monkeypatch, cause):
    """Something that is not finite in two samples, or in loss or gradient of their batches; or what a layer refuses."""
    small = example.synthetic

    def synthetic(seed):
        parts, bayes = small(seed)
        data = parts["train"]
        data.ids = [f"clip{i}" for i in range(len(data))]
        if cause == "data":
            name = next(iter(data.features))
            data.features[name][list(BROKEN)] = math.inf
            data.padding_mask[name][list(BROKEN)] = False
        return parts, bayes

    class Spoiled(example.LDDU):
        def losses(self, output, labels, indices, targets=None):
            losses = super().losses(output, labels, indices, targets)
            if torch.isin(indices, torch.tensor(BROKEN)).any():
                if cause == "loss":
                    losses["total"] = losses["total"] * math.nan
                if cause == "model":
                    raise ValueError("Expected `logits` to be finite")
                if cause == "gradient":  # 0 * inf in the backward pass of the root
                    losses["total"] = losses["total"] + (0 * losses["total"]).sqrt()
            return losses

    monkeypatch.setattr(example, "synthetic", synthetic)
    monkeypatch.setattr(example.LitLDDU, "network", Spoiled)


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ("data", r"epoch 0 .*, training samples clip(7, clip50|50, clip7): features or"),
        ("loss", r"epoch 0 .* clip7[,:].*: loss or gradient is not finite$"),
        ("gradient", r"epoch 0 .* clip7[,:].*: loss or gradient is not finite$"),
        ("model", r"epoch 0 .* clip7[,:].*: loss or gradient is not finite: Expected `logits`"),
    ],
)
def test_batch_that_is_not_finite_stops_the_run(
    example, tmp_path, monkeypatch, capsys, cause, message
):
    spoil(example, monkeypatch, cause)
    with ends_in_one_line(capsys, message):
        example.main([*SMALL, "--epochs=2", "--batch-size=96", "--output", str(tmp_path)])
    assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize("cause", ["data", "loss", "gradient"])
def test_batch_that_is_not_finite_is_skipped_without_a_trace(
    example, tmp_path, monkeypatch, capsys, cause
):
    spoil(example, monkeypatch, cause)
    unchanged = []

    def state(lit):
        return copy.deepcopy(
            {"model": lit.model.state_dict(), "optimizer": lit.optimizers().state_dict()["state"]}
        )

    class Watched(example.LitLDDU):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            self.before = state(self)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            try:
                same(self.before, state(self))
            except AssertionError:
                equal = False
            else:
                equal = True
            broken = bool(torch.isin(batch.indices, torch.tensor(BROKEN)).any())
            assert equal == broken
            unchanged.append(equal)

    arguments = example.parse([*SMALL, "--epochs=2", "--on-nan=skip", "--output", str(tmp_path)])
    example.train(arguments, Watched)
    results = json.loads((tmp_path / "metrics.json").read_text())
    assert results["skipped_batches"] == sum(unchanged)
    assert 2 <= sum(unchanged) <= 4
    assert len(unchanged) == 12
    printed = capsys.readouterr().out
    assert printed.count("skipped a batch: epoch 0") + printed.count("batch: epoch 1") == sum(
        unchanged
    )
    assert "clip7" in printed
    assert "clip50" in printed
    assert "nan" not in (tmp_path / "metrics.csv").read_text()
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["skipped_batches"] == sum(unchanged)
    assert all(x.isfinite().all() for x in last["state_dict"].values())
