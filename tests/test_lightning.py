"""What a Lightning run needs around a model: guard, checkpoints, data module, calibration, weight averaging."""

import contextlib
import copy
import math
import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

from endurance import same
from examples_support import QUIET, need_extras, toy
from support import TORCH_2_6, no_default_device
from uncertainty_mm import Conflict, LogitPool, PlattScaling
from uncertainty_mm._component import states
from uncertainty_mm.calibration import best_threshold, expected_threshold
from uncertainty_mm.data import MultimodalBatch, MultimodalDataset

need_extras()
L = pytest.importorskip("lightning")
rooms = pytest.importorskip("uncertainty_mm.lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")
CombinedLoader = pytest.importorskip("lightning.pytorch.utilities").CombinedLoader
pytestmark = QUIET

SIZES = {
    "encoder": {"hidden_dim": 8, "num_heads": 2, "num_layers": 1},
    "attention": {"out_dim": 4, "label_dim": 4},
    "decoupler": {"latent_dim": 2},
    "contrastive": {"queue_size": 64},
    "lr": 0.01,
}


@pytest.fixture(scope="module")
def lddu():
    from uncertainty_mm.examples.lddu_full import LDDU

    return LDDU


@pytest.fixture
def data(tmp_path):
    """30 samples a split, in batches of 8."""
    return rooms.MultimodalDataModule(toy(tmp_path / "data.npz"), batch_size=8)


def model_for(kind, data, **options):
    torch.manual_seed(0)
    sizes = (data.modality_dims, data.max_steps, data.label_names, data.num_train_samples)
    return kind(*sizes, **SIZES | options)


def trainer_with(*added, **options):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(x, callbacks.ModelCheckpoint) for x in added),
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
        "max_epochs": 1,
    }
    plugins = [rooms.WholeCheckpointIO()]
    return L.Trainer(callbacks=list(added), plugins=plugins, **quiet | options)


# --- Not finite -------------------------------------------------------------------------------------------------------

BROKEN = (7, 20)  # samples of the training split


def spoilt(lddu, data, cause):
    """Something that is not finite in two samples, or in loss or gradient of their batches."""
    if cause == "features":
        part = data.parts["train"]
        for sample in BROKEN:
            part.features["a"][sample, 0, 0] = math.inf if sample == 7 else math.nan
            part.padding_mask["a"][sample, 0] = False

    class Spoilt(lddu):
        def losses(self, output, batch):
            losses = super().losses(output, batch)
            if torch.isin(batch.indices, torch.tensor(BROKEN)).any():
                if cause == "loss":
                    losses["total"] = losses["total"] * math.nan
                if cause == "gradient":  # 0 * inf in the backward pass of the root
                    losses["total"] = losses["total"] + (0 * losses["total"]).sqrt()
            return losses

    return model_for(Spoilt, data)


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (
            "features",
            r"^epoch 0 .*, training samples clip (7|20|20, clip 7|7, clip 20): features are",
        ),
        ("loss", r"^epoch 0 .* clip (7|20)[,:].*: loss or gradient is not finite$"),
        ("gradient", r"^epoch 0 .* clip (7|20)[,:].*: loss or gradient is not finite$"),
    ],
)
def test_batch_that_is_not_finite_stops_the_run(lddu, data, cause, message):
    model = spoilt(lddu, data, cause)
    with pytest.raises(rooms.UsageError, match=message):
        trainer_with(rooms.FiniteGuard()).fit(model, data)
    assert all(x.isfinite().all() for x in model.state_dict().values())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("cause", ["features", "loss", "gradient"])
def test_batch_that_is_not_finite_is_skipped_without_a_trace(
    lddu, data, capsys, cause, accumulate, tmp_path
):
    """Weights, queue, history and optimiser are as before the step, whose batches may be several."""
    model = spoilt(lddu, data, cause)
    skipped = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx % accumulate == 0:
                optimizer = trainer.optimizers[0].state_dict()["state"]
                self.before = copy.deepcopy([module.state_dict(), optimizer])
                self.broken = False
            self.broken |= bool(torch.isin(batch.indices, torch.tensor(BROKEN)).any())

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx % accumulate == accumulate - 1 or trainer.is_last_batch:
                now = [module.state_dict(), trainer.optimizers[0].state_dict()["state"]]
                try:
                    same(self.before, now)
                except AssertionError:
                    equal = False
                else:
                    equal = True
                assert equal == self.broken
                skipped.append(equal)

    guard = rooms.FiniteGuard("skip")
    history = rooms.History(tmp_path / "metrics.csv")
    trainer = trainer_with(
        Watch(), guard, history, accumulate_grad_batches=accumulate, max_epochs=2
    )
    trainer.fit(model, data)
    assert len(skipped) == 8 / accumulate
    assert guard.skipped == guard.state_dict()["skipped"] == sum(skipped) > 0
    printed = capsys.readouterr().out
    assert printed.count("skipped a batch: epoch 0") == sum(skipped[: 4 // accumulate])
    assert all(f"clip {sample}" in printed for sample in BROKEN)
    if sum(skipped) < len(skipped):
        assert "nan" not in (tmp_path / "metrics.csv").read_text()
    other = rooms.FiniteGuard()
    other.load_state_dict(guard.state_dict())
    assert other.skipped == guard.skipped


@pytest.mark.parametrize("split", ["validation", "test", "prediction"])
def test_features_that_are_not_finite_end_an_evaluation_with_their_names(lddu, data, split):
    part = data.parts["validation" if split == "validation" else "test"]
    part.features["a"][[3, 9]] = torch.nan
    part.padding_mask["a"][[3, 9]] = False
    trainer, model = trainer_with(rooms.FiniteGuard()), model_for(lddu, data)
    names = [name for name in part.ids if name in (part.ids[3], part.ids[9])]
    run = {"validation": trainer.validate, "test": trainer.test, "prediction": trainer.predict}
    with pytest.raises(
        rooms.UsageError, match=f"^{split} samples {', '.join(names[:1])}: features are not finite$"
    ):
        run[split](model, datamodule=data)


def test_on_nan_is_a_choice():
    with pytest.raises(ValueError, match="Expected `on_nan` to be one of"):
        rooms.FiniteGuard("ignore")


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(lddu, tmp_path_factory):
    """A model and its checkpoint after two epochs, with a threshold for each label."""
    folder = tmp_path_factory.mktemp("trained")
    data = rooms.MultimodalDataModule(toy(folder / "data.npz"), batch_size=8)
    model = model_for(lddu, data, thresholds="label")
    last = rooms.MovableCheckpoint(folder, "last", save_on_train_epoch_end=True)
    trainer_with(last, max_epochs=2).fit(model, data)
    return SimpleNamespace(model=model.eval(), data=data, ckpt=folder / "last.ckpt")


def test_earlier_file_survives_a_death_while_the_next_is_written(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "last.ckpt"
    checkpoints = rooms.WholeCheckpointIO()
    checkpoints.save_checkpoint({"epoch": 0}, path)

    def power_cut(*_):
        raise OSError("power cut")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, power_cut)
            with pytest.raises(OSError, match="power cut"):
                checkpoints.save_checkpoint({"epoch": 1}, path)
        assert checkpoints.load_checkpoint(path) == {"epoch": 0}
    checkpoints.save_checkpoint({"epoch": 1}, path)
    assert checkpoints.load_checkpoint(path) == {"epoch": 1}
    assert list(path.parent.iterdir()) == [path]


class Linear(rooms.MultilabelModule):
    """As simple as a model can be: the mean step of one modality."""

    def __init__(self, label_names, **training):
        super().__init__(label_names, **training)
        self.linear = nn.Linear(3, len(label_names))

    def forward(self, features, padding_mask):
        return SimpleNamespace(logits=self.linear(features["a"].mean(1)))

    def training_step(self, batch, batch_idx):
        return self(batch.features, batch.padding_mask).logits.square().mean()


# A loader of a data set, as users hand it to a trainer.
HANDED = {
    "a loader": lambda data: data.loader(8),
    "a list": lambda data: [data.loader(8)],
    "a dictionary": lambda data: {"validation": data.loader(8)},
    "a combined loader": lambda data: CombinedLoader([data.loader(8)], "sequential"),
    "a subset": lambda data: DataLoader(Subset(data, range(len(data))), 8),
}


@pytest.mark.parametrize(
    ("grouped", "handed"), [(False, "a loader"), *((True, name) for name in HANDED)]
)
def test_calibration_counts_groups_whoever_loads_the_data(tmp_path, grouped, handed):
    """Without a data module of ours, or any; samples of a group count as one."""
    groups = {"groups": np.arange(90) // 10} if grouped else {}
    parts = rooms.MultimodalDataModule(toy(tmp_path / "data.npz", **groups)).parts
    model = Linear(["happy", "sad", "fear"])
    part = parts["validation"]
    trainer_with(max_epochs=1).fit(model, parts["train"].loader(8), HANDED[handed](part))
    assert (part.groups is not None) == grouped
    with torch.no_grad():
        logits = model(part.features, part.padding_mask).logits
    fitted = PlattScaling(3).fit(logits, part.labels, groups=part.groups)
    torch.testing.assert_close(model.calibration.scale, fitted.scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.calibration.shift, fitted.shift, rtol=1e-4, atol=1e-5)
    other = PlattScaling(3).fit(logits, part.labels)
    assert torch.allclose(other.scale, fitted.scale, rtol=1e-3) != grouped


@pytest.mark.filterwarnings("error:Expected one data set in validation")
def test_groups_of_several_data_sets_are_not_used_and_it_is_said_once(tmp_path):
    parts = rooms.MultimodalDataModule(toy(tmp_path / "data.npz", groups=np.arange(90) // 10)).parts
    data = ConcatDataset([parts["validation"], parts["test"]])
    trainer, model = trainer_with(max_epochs=2), Linear(["happy", "sad", "fear"])
    with pytest.warns(UserWarning, match="every sample counts for itself") as told:
        trainer.fit(model, parts["train"].loader(8), DataLoader(data, 8))
    assert len([x for x in told if "every sample counts" in str(x.message)]) == 1


def test_indices_of_a_validation_are_exact(tmp_path):
    """However large, and whatever the default dtype."""
    parts = rooms.MultimodalDataModule(toy(tmp_path / "data.npz")).parts
    batch = parts["validation"].batch(range(30))
    batch = batch._replace(indices=batch.indices + 2**40)
    model = Linear(["happy", "sad", "fear"])
    model.calibrate = mock.Mock()
    trainer = trainer_with(max_epochs=1, precision="bf16-true")
    trainer.fit(model, parts["train"].loader(8), DataLoader([batch], batch_size=None))
    assert torch.equal(model.calibrate.call_args.args[0]["indices"], batch.indices)


def test_calibration_and_thresholds_travel_with_the_checkpoint(lddu, trained):
    """They are what the validation split asks for, and are there after `load`."""
    model = lddu.load(trained.ckpt)
    assert not model.training
    part = trained.data.part("validation")
    with torch.no_grad():
        output = model(part.features, part.padding_mask)
        experts, logits = model.experts(output), model.final_logits(output)
    weight = LogitPool(4, 3).fit(experts, part.labels).weight
    torch.testing.assert_close(model.pool.weight, weight, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(weight, torch.full((4,), 1 / 4), atol=1e-2)
    fitted = PlattScaling(3).fit(logits, part.labels)
    for name in ("scale", "shift"):
        found, wanted = getattr(model.calibration, name), getattr(fitted, name)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(fitted.scale, torch.ones(3), atol=1e-3)
    wanted = expected_threshold(fitted(logits).sigmoid(), per_label=True)
    torch.testing.assert_close(model.threshold, wanted, rtol=1e-3, atol=1e-4)
    raw = best_threshold(logits.sigmoid(), part.labels, per_label=True)
    torch.testing.assert_close(model.raw_threshold, raw)
    assert not torch.equal(model.threshold, model.raw_threshold)
    same(model.state_dict(), trained.model.state_dict())


def test_what_agrees_travels_with_the_checkpoint(lddu, trained):
    """It is what the training split says, and the same again."""
    model, part = lddu.load(trained.ckpt), trained.data.part("train")
    before = torch.get_rng_state()
    rows, missing = model.typicality.summaries_of(part)
    assert torch.equal(torch.get_rng_state(), before)  # training goes on as without it
    rows, missing = model.typicality.fit_and_summarize(part)
    fitted = Conflict(model.typicality.summary_dims).fit(rows, missing)
    assert fitted.projection.any()
    same(model.conflict.state_dict(), fitted.state_dict())
    whole = model.predict(part)
    torch.testing.assert_close(whole["foreign"], fitted(rows, missing))
    assert torch.equal(whole["missing"], missing)
    assert not whole["foreign"][missing].any()


def test_one_modality_is_never_foreign(lddu, tmp_path):
    data = rooms.MultimodalDataModule(toy(tmp_path / "data.npz"), batch_size=8)
    for name, part in list(data.parts.items()):
        kept = {"a": part.features["a"]}, {"a": part.padding_mask["a"]}
        data.parts[name] = MultimodalDataset(*kept, part.labels, part.label_names)
    data.modality_dims, data.max_steps = {"a": 3}, {"a": 5}
    model = model_for(lddu, data)
    trainer_with().fit(model, data)
    assert torch.equal(model.predict(data.part("test"))["foreign"], torch.zeros(30, 1))


def test_the_most_likely_foreign_modality_is_named():
    foreign = torch.tensor([[0.05, 0.91], [0.9, 0.1], [0.95, 0.05], [0.48, 0.48]])
    said = rooms.predictions.reasons({"foreign": foreign}, ["audio", "face"], ["happy"])
    assert said == [
        "face seems to be of another sample",
        "one of the modalities seems to be of another sample",
        "audio seems to be of another sample",
        "one of the modalities seems to be of another sample",
    ]
    unsure = torch.tensor([[0.3, 0.3], [0.0, 0.0]])
    assert rooms.predictions.reasons({"foreign": unsure}, ["audio", "face"], []) == ["", ""]


def test_default_device_does_not_matter_to_reasons():
    outputs = {"foreign": torch.tensor([[0.95, 0.05]])}
    torch.set_default_device("meta")
    try:
        said = rooms.predictions.reasons(outputs, ["audio", "face"], ["happy"])
    finally:
        no_default_device()
    assert said == ["audio seems to be of another sample"]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["ask", "predict"])
def test_modes_of_the_parts_are_as_they_were(lddu, trained, name, fails):
    model, part = lddu.load(trained.ckpt).train(), trained.data.part("test")
    model.encoder.eval()
    modes = [x.training for x in model.modules()]
    if fails:
        model.calibration.forward = mock.Mock(side_effect=ArithmeticError)
    given = {"a": torch.zeros(2, 3)} if name == "ask" else part
    with pytest.raises(ArithmeticError) if fails else contextlib.nullcontext():
        getattr(model, name)(given)
    assert [x.training for x in model.modules()] == modes


def test_sample_is_asked(lddu, trained):
    model = lddu.load(trained.ckpt).train()
    part = trained.data.part("test")
    index = int((~part.padding_mask["b"]).any(1).nonzero()[0])
    sample = {name: x[index][~part.padding_mask[name][index]] for name, x in part.features.items()}
    batch = part.batch([index])
    whole = trained.model.predict_step(batch, 0)
    answer = model.ask({"a": sample["a"].numpy().tolist(), "b": sample["b"].double()})
    assert set(answer) == {*whole, "predicted"}
    torch.testing.assert_close(answer["probs"], whole["probs"][0])
    assert torch.equal(answer["predicted"], answer["probs"] > model.threshold)
    assert answer["uncertainty"].shape == ()
    assert model.training  # as it was
    left_out = model.ask({"a": sample["a"]})
    for key, value in model.ask({"a": sample["a"], "b": sample["b"][:0]}).items():
        torch.testing.assert_close(value, left_out[key], rtol=0, atol=0, equal_nan=True)
    assert model.ask({})["missing"].all()  # what the model says of nothing at all
    assert left_out["std_norm"][1].isnan().all()
    assert left_out["missing"].tolist() == [False, True]
    alone = batch.padding_mask | {"b": torch.ones_like(batch.padding_mask["b"])}
    wanted = trained.model.predict_step(batch._replace(padding_mask=alone), 0)
    torch.testing.assert_close(left_out["probs"], wanted["probs"][0])
    for bad, message in (
        ({"c": sample["a"]}, r"some of \['a', 'b'\], but got \['c'\]"),
        ({"a": sample["b"]}, r"`features\['a'\]` to have shape \(S, 3\) with S at most 5, but got"),
        (
            {"a": sample["a"][0]},
            r"`features\['a'\]` to have shape \(S, 3\) with S at most 5, but got \(3,\)",
        ),
        ({"a": torch.zeros(6, 3)}, r"`features\['a'\]` .* S at most 5, but got \(6, 3\)"),
        ({"a": torch.full((2, 3), math.nan)}, r"`features\['a'\]` to be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            model.ask(bad)


class Evil:
    """Would run code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise RuntimeError('run')",)


def rename(content):
    """As if another network had been trained with these options."""
    state = content["state_dict"]
    content["state_dict"] = {key.replace("fusion", "mixing"): x for key, x in state.items()}


def old_layout(content):
    """Hyper-parameters and names of weights as version 0.0 had them."""
    content["hyper_parameters"] = {"model": {"hidden_dim": 8}, "thresholds": "label"}
    content["state_dict"] = {f"model.{key}": x for key, x in content["state_dict"].items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(evil=Evil()), "not a checkpoint of this program"),
        (lambda c: c.pop("state_dict"), "not a checkpoint of this program"),
        (old_layout, "written by an earlier version, whose layout is no longer read; train again$"),
        (rename, r"of another model or version \(.*Missing key.*fusion"),
        (lambda c: c["state_dict"].pop("modality_bias"), r"another model .*modality_bias"),
        (lambda c: c["hyper_parameters"].update(depth=3), "of another model or version .*'depth'"),
        (lambda c: c["hyper_parameters"].update(encoder=[1]), "of another model or version"),
        (lambda c: c["hyper_parameters"].update(modality_dims=7), "of another model or version"),
        (
            lambda c: c["hyper_parameters"].update(_instantiator="test_lightning_evil.run"),
            "of another model or version .*'_instantiator'",
        ),
        (
            lambda c: c["hyper_parameters"].update(_class_path="test_lightning_evil.run"),
            "of another model or version .*'_class_path'",
        ),
    ],
)
def test_foreign_checkpoint_is_refused_in_one_line_and_runs_nothing(
    lddu, trained, tmp_path, monkeypatch, change, message
):
    (tmp_path / "test_lightning_evil.py").write_text("raise SystemExit('code has run')")
    monkeypatch.syspath_prepend(tmp_path)
    content = torch.load(trained.ckpt, weights_only=True)
    change(content)
    path = tmp_path / "x.ckpt"
    torch.save(content, path)
    with pytest.raises(rooms.UsageError, match=message) as caught:
        lddu.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_damaged_checkpoint_is_refused(lddu, trained, tmp_path):
    content, path = trained.ckpt.read_bytes(), tmp_path / "x.ckpt"
    weights = trained.model.state_dict()["fusion.mean_head.0.weight"].numpy().tobytes()
    flipped = bytearray(content)
    flipped[content.index(weights)] ^= 1
    for damaged, reason in (
        (content[: len(content) // 2], ""),
        (flipped, r"\(the check sum of `.*` is wrong\)"),
        (b"", ""),
        (trained.ckpt.with_name("data.npz").read_bytes(), ""),
    ):
        path.write_bytes(damaged)
        with pytest.raises(rooms.UsageError, match=f"not a checkpoint of this program.*{reason}"):
            lddu.load(path)
    torch.save(torch.ones(3), path)
    with pytest.raises(rooms.UsageError, match="not a checkpoint"):
        lddu.load(path)
    with pytest.raises(rooms.UsageError, match=r"none\.ckpt: no such file"):
        lddu.load(tmp_path / "none.ckpt")


@pytest.mark.parametrize("average", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_averaged_weights_leave_the_state_alone(lddu, data, tmp_path, average):
    """Queue, history, calibration and thresholds of the checkpoint are those of the run, weights the average."""
    if TORCH_2_6 and average == "StochasticWeightAveraging":
        pytest.skip("torch 2.6 does not load with `weights_only` what this callback saves")
    make = {
        "EMAWeightAveraging": lambda: callbacks.EMAWeightAveraging(decay=0.5),
        "StochasticWeightAveraging": lambda: callbacks.StochasticWeightAveraging(
            0.01, swa_epoch_start=1, annealing_epochs=1
        ),
    }
    model = model_for(lddu, data)
    runs = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            runs.append(copy.deepcopy([states(module), dict(module.named_parameters())]))

    last = rooms.MovableCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    trainer = trainer_with(make[average](), Watch(), last, max_epochs=3)
    trainer.fit(model, data)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    kept, weights = runs[-1]
    assert set(kept) >= {"threshold", "calibration.scale", "tracker.history"}
    same({name: saved[name] for name in kept}, kept)
    assert saved["contrastive.queue.classes"].max() > 0
    if average == "EMAWeightAveraging":
        assert not torch.equal(saved["modality_readout"], weights["modality_readout"])
        again = model_for(lddu, data)
        resumed = trainer_with(make[average](), max_epochs=4)
        resumed.fit(again, data, ckpt_path=tmp_path / "last.ckpt")
        assert again.tracker.counts(torch.arange(30)).max() == 4
        assert lddu.load(tmp_path / "last.ckpt").encoder["a"].mean.any()


# --- Data -------------------------------------------------------------------------------------------------------------


def record(model, data, **options):
    """Batches of a training as the model gets them."""
    batches = []

    class Record(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            batches.append(copy.deepcopy(batch))

    trainer_with(Record(), limit_val_batches=0, **options).fit(model, data)
    return batches


def test_training_samples_are_dropped_and_corrupted_at_random(lddu, tmp_path):
    """As many as asked, others in every epoch, each sample once an epoch, in another order."""
    path = toy(tmp_path / "data.npz", count=900)
    plain = rooms.MultimodalDataModule(path, batch_size=50)
    disturbed = rooms.MultimodalDataModule(
        path, batch_size=50, drop_modality=0.4, corrupt_modality=0.4
    )
    before, after = (
        record(model_for(lddu, data), data, max_epochs=2) for data in (plain, disturbed)
    )
    lost, noisy, orders = [], [], []
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one.indices, two.indices)
        orders.append(one.indices)
        gone = two.padding_mask["a"].all(1)
        lost.append(gone)
        changed = (one.features["a"] != two.features["a"]).flatten(1).any(1)
        noisy.append(changed[~gone])
    assert float(torch.cat(lost).float().mean()) == pytest.approx(0.2, abs=0.05)
    assert float(torch.cat(noisy).float().mean()) == pytest.approx(0.4, abs=0.06)
    first, second = torch.cat(orders).view(2, 300)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(300))
    assert first.tolist() != second.tolist()
    assert not torch.equal(torch.cat(lost)[:300], torch.cat(lost)[300:])


def test_numbers_that_drop_modalities_are_not_those_of_dropout(lddu, data, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    drop = rooms.data.transforms.drop_modalities

    def spy(batch, share, generator):
        seeds.append(generator.initial_seed())
        return drop(batch, share, generator)

    monkeypatch.setattr(rooms.data.transforms, "drop_modalities", spy)
    data.drop_modality = 0.5
    model = model_for(lddu, data)
    trainer_with(rooms.DeterministicDropout(), limit_val_batches=0, max_epochs=2).fit(model, data)
    seeds = [seed for seed in seeds if seed]  # `model_for` has set 0
    assert len(set(seeds)) == len(seeds) >= 15


@pytest.mark.parametrize("largest", [1, 3])
def test_soft_labels_of_a_file(lddu, tmp_path, largest):
    """Shares are taken as they are, intensities as a share of the largest that is known."""
    soft = np.random.default_rng(1).random((90, 3)).astype(np.float32)
    soft[3, 1] = 1.0
    soft *= largest
    unknown = np.zeros((90, 3), bool)
    unknown[5] = True
    soft[5] = np.nan
    path = toy(tmp_path / "data.npz", soft_labels=soft, unknown=unknown)
    data = rooms.MultimodalDataModule(path, batch_size=30)
    model = model_for(lddu, data, soft_labels=0.25)
    (batch,) = record(model, data)
    labels = data.part("train").labels[batch.indices]
    wanted = 0.25 * torch.from_numpy(soft)[batch.indices] / largest + 0.75 * labels
    wanted[batch.indices == 5] = 0
    torch.testing.assert_close(model.targets(batch), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` to be a positive integer, but got 0"),
        ({"num_workers": -1}, "`num_workers` to be at least 0, but got -1"),
        ({"drop_modality": 1.0}, r"`drop_modality` to be in \[0, 1\), but got 1.0"),
        ({"corrupt_modality": -0.1}, r"`corrupt_modality` to be in \[0, 1\), but got -0.1"),
        ({"max_train_samples": 0}, "`max_train_samples` to be a positive integer or None"),
    ],
)
def test_options_of_the_data_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        rooms.MultimodalDataModule(toy(tmp_path / "data.npz"), **options)


def test_training_split_is_thinned_evenly(tmp_path):
    path = toy(tmp_path / "data.npz")
    whole = rooms.MultimodalDataModule(path)
    for limit, positions in ((30, range(30)), (31, range(30)), (4, (0, 7, 15, 22)), (1, (0,))):
        data = rooms.MultimodalDataModule(path, max_train_samples=limit)
        ids = [whole.part("train").ids[each] for each in positions]
        assert data.part("train").ids == ids
        assert data.num_train_samples == len(ids)
        assert data.part("test").ids == whole.part("test").ids


def test_file_without_splits_is_predicted_whole_and_not_trained_on(lddu, tmp_path):
    path = tmp_path / "new.npz"
    features = np.random.default_rng(0).normal(size=(5, 4, 3))
    np.savez(path, **{"features.a": features, "lengths.a": np.full(5, 4)})
    data = rooms.MultimodalDataModule(path, label_names=["x", "y"])
    assert len(data.predict_dataloader().dataset) == 5
    with pytest.raises(rooms.UsageError, match="new: no sample in the train split"):
        data.part("train")


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_subsets_are_all_up_to_four_modalities_and_bounded_above():
    from uncertainty_mm.lightning.module import subsets

    assert subsets(["a", "b"]) == [("a", "b"), ("a",), ("b",), ()]
    assert len(set(subsets("abcd"))) == 2**4
    many = [f"m{i}" for i in range(9)]
    found = subsets(many)
    assert len(found) == len(set(found)) == 2 * 9 + 2
    assert found[0] == tuple(many)
    assert found[-1] == ()
    assert {len(each) for each in found} == {9, 8, 1, 0}


def test_losses_of_known_labels(lddu):
    logits, target = torch.randn(3, 2, requires_grad=True), torch.tensor([[1.0, math.nan]] * 3)
    unknown = target.isnan()
    wanted = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], target[:, 0])
    loss = rooms.masked_bce(logits, target, unknown)
    torch.testing.assert_close(loss, wanted)
    (slope,) = torch.autograd.grad(loss, logits)
    assert (slope[:, 1] == 0).all()
    assert rooms.masked_bce(logits, target, torch.ones(3, 2).bool()) == 0
    assert rooms.masked_mean(torch.arange(4.0), None) == 1.5


def test_the_latest_step_within_one_standard_error_of_the_best_is_kept():
    generator = torch.Generator().manual_seed(0)
    base, noise = torch.rand(50, generator=generator), torch.randn(50, generator=generator)
    noise = (noise - noise.mean()) / noise.std() / 50**0.5  # one standard error is 1/50
    rule = rooms.OneStandardError()
    assert rule.update(1, base) == 1
    assert rule.update(2, base + 0.019 + noise) == 2
    assert rule.update(3, base + 0.021 + noise) == 2
    resumed = rooms.OneStandardError()
    resumed.load_state_dict(rule.state_dict())
    for each in (rule, resumed):
        assert each.update(4, base - 0.1) == 4  # now the best
        assert each.update(5, base) == 4
        assert each.update(6, base[:9]) == 6  # other samples, so another training
        assert each.update(2, base[:9] + 1) == 2
    assert rooms.OneStandardError().update(1, base[:0]) == -1


def test_a_step_that_is_validated_again_leaves_the_best_one():
    rule = rooms.OneStandardError()
    given = [(10, 0.1), (20, 0.9), (20, 0.9), (30, 0.8)]
    assert [rule.update(n, torch.tensor([x, x])) for n, x in given] == [10] * 4


def test_losses_that_are_not_finite_are_never_the_best():
    for bad in (math.nan, math.inf):
        rule, first = rooms.OneStandardError(), torch.tensor([bad, 0.1])
        assert rule.update(1, first) == 1
        assert rule.update(3, torch.tensor([5.0, 5.0])) == 3
        assert rule.update(4, first) == 3


def test_one_sample_says_nothing_of_chance():
    rule = rooms.OneStandardError()
    assert [rule.update(i, torch.tensor([x])) for i, x in enumerate((1.0, 1.1, 0.9))] == [0, 0, 2]


def test_losses_of_a_group_count_as_one():
    from uncertainty_mm.lightning.selection import mean_by

    losses, groups = torch.tensor([1.0, 2.0, math.nan, 6.0]), torch.tensor([7, 7, 7, 3])
    assert sorted(mean_by(groups, losses).tolist()) == [1.5, 6.0]
    assert mean_by(None, losses).tolist() == [1.0, 2.0, 6.0]
    assert len(mean_by(groups[:0], losses[:0])) == 0


class Pooled(rooms.MultilabelModule):
    """Anybody's model: one linear layer on the mean of what is there."""

    def __init__(self, modality_dims, label_names, **training):
        super().__init__(label_names, **training)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(dim, len(label_names)) for name, dim in modality_dims.items()}
        )

    def forward(self, features, padding_mask):
        there = {name: ~mask.unsqueeze(2) for name, mask in padding_mask.items()}
        return SimpleNamespace(
            logits=sum(
                head((features[name] * there[name]).sum(1) / there[name].sum(1).clamp_min(1))
                for name, head in self.heads.items()
            )
        )

    def training_step(self, batch: MultimodalBatch, batch_idx):
        loss = rooms.masked_bce(
            self(batch.features, batch.padding_mask).logits, self.targets(batch)
        )
        self.log_losses({"total": loss}, batch)
        return loss


def test_any_model_is_trained_tested_and_predicts(data, tmp_path):
    model = Pooled(data.modality_dims, data.label_names, lr=0.05)
    history = rooms.History(tmp_path / "metrics.csv")
    last = rooms.MovableCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    guard, dropout = rooms.FiniteGuard(), rooms.DeterministicDropout()
    trainer = trainer_with(history, last, guard, dropout, max_epochs=8)
    trainer.fit(model, data)
    assert [row["epoch"] for row in history.rows] == list(range(8))
    assert history.rows[-1]["loss/total"] < history.rows[0]["loss/total"]
    header, *_ = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == "epoch,loss/total,val/chosen,val/cls,val/miF1,val/nll"
    trainer.test(model, data, verbose=False)
    assert list(model.results["modalities"]) == ["a + b", "a", "b", "none"]
    tested, model.by_modality = model.results, False
    trainer.test(model, data, verbose=False)
    assert tested == {**model.results, "modalities": tested["modalities"]}
    assert "modalities" not in model.results
    writer = rooms.PredictionWriter(tmp_path / "p.npz")
    trainer_with(writer).predict(Pooled.load(tmp_path / "last.ckpt"), data)
    with np.load(tmp_path / "p.npz") as file:
        score = ((file["probs"] > file["threshold"]) == file["labels"]).mean()
    assert score > 0.6


class Diverges(Pooled):
    """In the second epoch one prediction is NaN; as on an accelerator, nobody looks at values."""

    def observed(self, output):
        logits = super().observed(output)["logits"]
        if self.current_epoch == 1:
            logits = logits.index_fill(0, torch.tensor([0]), math.nan)
        return {"logits": logits}

    def calibrate(self, seen):
        pass


def test_a_prediction_that_is_not_finite_is_not_chosen(data, monkeypatch):
    monkeypatch.setattr("uncertainty_mm.lightning.module.evaluate", lambda *_: {"miF1": 0.5})
    model = Diverges(data.modality_dims, data.label_names, lr=0.01)
    num_labels = len(data.label_names)
    model.pool = LogitPool(1, num_labels, validate_args=False)
    model.calibration = PlattScaling(num_labels, validate_args=False)
    trainer = trainer_with(max_epochs=2)
    trainer.fit(model, data)
    metrics = trainer.callback_metrics
    assert metrics["val/nll"] == math.inf
    assert metrics["val/chosen"] == trainer.global_step / 2


def test_a_second_training_chooses_anew(data):
    model = Pooled(data.modality_dims, data.label_names, lr=0.05)
    trainer_with(max_epochs=1).fit(model, data)
    model._selection._best.zero_()  # nothing can be better
    again = trainer_with(max_epochs=1)
    again.fit(model, data)
    assert again.callback_metrics["val/chosen"] == again.global_step
    assert model._selection._best.sum() > 0


@pytest.mark.parametrize("chosen", [range(30), [7, 3, 20]])
def test_predictions_are_of_the_samples_that_they_stand_beside(data, tmp_path, chosen):
    """Whatever the order in which a loader gives them."""
    part = data.part("test")
    model = Pooled(data.modality_dims, data.label_names)
    rows = torch.tensor(chosen).sort().values
    wanted = model.predict(part.select(rows))["probs"]
    loader = DataLoader(Subset(part, chosen), batch_size=4, shuffle=True, collate_fn=part.collate)
    trainer_with(rooms.PredictionWriter(tmp_path / "p.npz")).predict(model, [loader])
    with np.load(tmp_path / "p.npz") as file:
        np.testing.assert_allclose(file["probs"], wanted, rtol=1e-5)
        assert file["ids"].tolist() == [part.ids[row] for row in rows.tolist()]
        np.testing.assert_array_equal(file["labels"], part.labels[rows])


def test_predictions_of_several_processes_or_loaders_are_refused(data, tmp_path):
    writer = rooms.PredictionWriter(tmp_path / "p.csv")
    with pytest.raises(rooms.UsageError, match="devices must be 1"):
        writer.write_on_epoch_end(SimpleNamespace(world_size=2), None, [], [])
    two = SimpleNamespace(world_size=1, predict_dataloaders=[data.part("test").loader()] * 2)
    with pytest.raises(rooms.UsageError, match="of one loader, but there are 2"):
        writer.write_on_epoch_end(two, None, [], [])
