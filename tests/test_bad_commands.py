"""Everything that can be wrong with the command line of the example, and writing that does not come to its end.

A table of `Bad` cases: each ends with exit code 2 and one line on stderr, and leaves the files of a finished run, its
data among them, as they are. The second part lets the disk take no more, or has the process killed, in the middle of
writing: what was there before stays, whole.
"""

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from data_support import make
from examples_support import QUIET, TINY, ends_in_one_line, need_extras, toy
from support import Bad
from uncertainty_mm._files import replacing
from uncertainty_mm.data import SPLITS, read, read_folder, read_npz, write_folder, write_npz

need_extras()
rooms = pytest.importorskip("uncertainty_mm.lightning")
cli = pytest.importorskip("uncertainty_mm.lightning.cli")
pytestmark = QUIET
FAST = [*TINY, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


class Place(NamedTuple):
    """Where the commands are tried."""

    folder: Path  # holds `data.npz` and the finished run `run`; cases may write anything else
    data: Path
    run: Path

    def __call__(self, *arguments):
        from uncertainty_mm.examples.lddu_full import main

        main(arguments=[str(argument).replace("@", f"{self.folder}/") for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    place = Place(folder, toy(folder / "data.npz"), folder / "run")
    place("--data.path=@data.npz", "--output=@run", *FAST, "--trainer.max_epochs=2")
    return place


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Evil:
    """Would run code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise RuntimeError('run')",)


def train(*options):
    """`@` in an option is the folder of the place."""
    return lambda place: place("--data.path=@data.npz", "--output=@new", *FAST, *options)


def resume(ckpt="@run/last.ckpt", *options):
    return lambda place: place("--ckpt_path", ckpt, *options)


def predict(*options, data="@data.npz", ckpt="@run/best.ckpt", output="@new.csv"):
    where = [f"--data.path={data}", f"--ckpt_path={ckpt}", f"--output={output}"]
    return lambda place: place("predict", *where, *options)


def with_file(name, write, call):
    """Writes a file first: `write(path, place)`."""

    def written(place):
        write(place.folder / name, place)
        call(place)

    return written


def text(content):
    return lambda path, _: path.write_text(content)


def other_data(**changes):
    return lambda path, _: toy(path, **changes)


def fewer(*keys):
    """The data without some of its arrays."""

    def write(path, place):
        with np.load(place.data) as file:
            np.savez(path, **{key: file[key] for key in file.files if key not in keys})

    return write


def changed_checkpoint(change):
    """Writes the last checkpoint of the run after `change(content)`."""

    def write(path, place):
        content = torch.load(place.run / "last.ckpt", weights_only=True)
        change(content)
        torch.save(content, path)

    return write


def with_config(content):
    return with_file("x.yaml", text(content), train("--config=@x.yaml"))


FEATURES = {"features.a": np.ones((90, 6, 3)), "lengths.a": np.full(90, 6)}
CASES = {  # what is wrong: the command, and what is said
    "train": {
        "unknown option": (train("--model.depth=1"), "unrecognized arguments: --model.depth=1"),
        "option of old": (train("--epochs=1"), "unrecognized arguments: --epochs=1"),
        "unknown option of a part": (train("--model.fusion.depth=1"), "--model.fusion.depth=1"),
        "size that follows from the data": (train("--model.label_names=[x]"), "label_names"),
        "unknown choice": (train("--model.gate=open"), "model.gate.*open"),
        "unknown choice of a part": (train("--model.fusion.combine=mean"), "combine.*mean"),
        "unknown prediction": (train("--model.predictions=[last]"), "model.predictions.*last"),
        "no prediction": (train("--model.predictions=[]"), r"some `predictions`, each once.*\[\]"),
        "a prediction twice": (
            train("--model.predictions=[first,first]"),
            "some `predictions`, each once, but got",
        ),
        "no row": (train("--model.scl_rows=0"), "`scl_rows` to be None or at least 1, but got 0"),
        "word for a number": (train("--model.encoder.num_layers=many"), "num_layers.*many"),
        "fraction of layers": (train("--model.encoder.num_layers=1.5"), r"num_layers.*1\.5"),
        "negative rate": (train("--model.lr=-1"), "`lr` to be above 0, but got -1"),
        "rate nan": (train("--model.lr=nan"), "model.lr.*nan"),
        "rate infinite": (train("--model.lr=inf"), "model.lr.*inf"),
        "share above 1": (train("--model.soft_labels=2"), r"`soft_labels` to be in \[0, 1\]"),
        "warm-up of everything": (train("--model.warmup=1"), r"`warmup` to be in \[0, 1\)"),
        "negative decay": (train("--model.weight_decay=-1"), "`weight_decay` to be at least 0"),
        "dropout of a part": (train("--model.fusion.dropout=2"), "`dropout` .*2"),
        "dropout of the model": (train("--model.dropout=-1"), "dropout.*-1"),
        "heads that do not divide": (train("--model.encoder.num_heads=3"), "num_heads.*3"),
        "temperature 0": (train("--model.contrastive.temperature=0"), "`temperature` .*0"),
        "negative queue": (train("--model.contrastive.queue_size=-1"), "`queue_size` .*-1"),
        "no epoch": (train("--trainer.max_epochs=0"), "max_epochs must be at least 1, got 0"),
        "epochs without end": (train("--trainer.max_epochs=-1"), "max_epochs must be at least 1"),
        "batches of 0": (train("--data.batch_size=0"), "`batch_size` to be a positive integer"),
        "all modalities dropped": (train("--data.drop_modality=1"), r"`drop_modality` .*got 1\.0"),
        "seed a word": (train("--seed_everything=x"), "seed_everything"),
        "seed negative": (train("--seed_everything=-1"), "-1"),
        "seed too large": (train(f"--seed_everything={2**32}"), str(2**32)),
        "choice of the guard": (train("--finite_guard.on_nan=maybe"), "on_nan.*maybe"),
        "precision unknown": (train("--trainer.precision=8"), "precision.*8"),
        "accelerator unknown": (train("--trainer.accelerator=abacus"), "abacus"),
        "accelerator absent": (train("--trainer.accelerator=tpu"), "(?i)tpu|xla"),
        "strategy unknown": (train("--trainer.strategy=chess"), "chess"),
        "no device": (train("--trainer.devices=0"), "devices"),
        "no soft labels": (train("--model.soft_labels=1"), "soft_labels: the training split has"),
        "data absent": (train("--data.path=none.npz"), "error: none.npz: no such file or folder"),
        "suffix unknown": (
            with_file("x.h5", text("x"), train("--data.path=@x.h5")),
            "the suffix does not tell the format",
        ),
        "format unknown": (train("--data.format=csv"), "data.format.*csv"),
        "another layout": (train("--data.format=mmsa"), "data.npz"),
        "labels without need": (
            train("--data.labels=@data.npz"),
            "`labels` go with the format mmsa",
        ),
        "data truncated": (
            with_file(
                "cut.npz",
                lambda path, place: path.write_bytes(place.data.read_bytes()[:500]),
                train("--data.path=@cut.npz"),
            ),
            "cut.npz: not a readable .npz file of plain arrays",
        ),
        "data malicious": (
            with_file(
                "evil.pkl",
                lambda path, _: path.write_bytes(pickle.dumps(Evil())),
                train("--data.path=@evil.pkl"),
            ),
            "evil.pkl: refused, because it names `builtins.exec`",
        ),
        "objects for names": (
            with_file(
                "x.npz",
                other_data(label_names=np.array(["x", None, "y"], dtype=object)),
                train("--data.path=@x.npz"),
            ),
            "x.npz: not a readable",
        ),
        "no labels": (
            with_file("x.npz", fewer("labels"), train("--data.path=@x.npz")),
            "x.npz: missing `labels`",
        ),
        "no splits": (
            with_file("x.npz", fewer("split"), train("--data.path=@x.npz")),
            "x: no sample in the train split",
        ),
        "no validation": (
            with_file("x.npz", other_data(split=np.zeros(90, int)), train("--data.path=@x.npz")),
            "x: no sample in the validation split",
        ),
        "no test": (
            with_file(
                "x.npz", other_data(split=np.repeat([0, 1], 45)), train("--data.path=@x.npz")
            ),
            "x: no sample in the test split",
        ),
        "output onto a file": (
            train("--output=@data.npz"),
            "data.npz: exists already; a run never",
        ),
        "output onto a run": (train("--output=@run"), "run: exists already; a run never"),
        "output below a file": (
            train("--output=@data.npz/x"),
            r"data.npz.x: cannot write there \(Not a directory\)",
        ),
        "config absent": (train("--config=none"), "none: neither a file nor one of ablation"),
        "config a list": (with_config("- 1\n"), "config"),
        "config broken": (with_config("a: ["), "config"),
        "config of unknown options": (with_config("model:\n  depth: 3\n"), "depth"),
        "config of old": (with_config("hidden_dim: 3\n"), "hidden_dim"),
        "config with a wrong choice": (with_config("model:\n  gate: open\n"), "open"),
        "config with a wrong type": (with_config("data:\n  batch_size: many\n"), "many"),
    },
    "resume": {
        "absent": (resume("none.ckpt"), "none.ckpt: no such file"),
        "truncated": (
            with_file(
                "half.ckpt",
                lambda path, p: path.write_bytes((p.run / "last.ckpt").read_bytes()[:9999]),
                resume("@half.ckpt", "--data.path=@data.npz", *FAST),
            ),
            "half.ckpt: not a checkpoint of this program",
        ),
        "malicious": (
            with_file(
                "x.ckpt",
                changed_checkpoint(lambda c: c.update(evil=Evil())),
                resume("@x.ckpt", "--data.path=@data.npz", *FAST),
            ),
            "x.ckpt: not a checkpoint of this program",
        ),
        "of an earlier version": (
            with_file(
                "x.ckpt",
                changed_checkpoint(lambda c: c["state_dict"].pop("raw_threshold")),
                resume("@x.ckpt", "--data.path=@data.npz", *FAST),
            ),
            "x.ckpt: written by an earlier version, whose layout is no longer read; train again$",
        ),
        "not of a training": (
            with_file(
                "x.ckpt",
                changed_checkpoint(lambda c: c.pop("optimizer_states")),
                resume("@x.ckpt", "--data.path=@data.npz", *FAST),
            ),
            "x.ckpt: cannot resume, it has no state of a training",
        ),
        "nothing left to do": (resume(), "last.ckpt: 2 epochs are done, trainer.max_epochs is 2"),
        **{
            f"other {name}": (
                resume("@run/last.ckpt", "--trainer.max_epochs=4", f"--{name}={value}"),
                f"last.ckpt: cannot resume, `{name}` is {value} now and was",
            )
            for name, value in {
                "model.lr": 0.25,
                "model.encoder.num_layers": 2,
                "model.targets": "sample",
                "data.batch_size": 8,
                "data.drop_modality": 0.5,
                "seed_everything": 1,
                "trainer.accumulate_grad_batches": 2,
                "trainer.gradient_clip_val": 0.5,
            }.items()
        },
        "other modalities": (
            with_file(
                "x.npz",
                fewer("features.b", "lengths.b"),
                resume("@run/last.ckpt", "--trainer.max_epochs=4", "--data.path=@x.npz"),
            ),
            "x: modalities and feature sizes .* are not those of the checkpoint",
        ),
        "into another folder": (
            resume("@run/last.ckpt", "--trainer.max_epochs=4", "--output=elsewhere"),
            "elsewhere: a run resumes where its checkpoint is",
        ),
    },
    "predict": {
        "no checkpoint given": (
            lambda place: place("predict", "--data.path=@data.npz"),
            "predict: --ckpt_path is needed",
        ),
        "test without a checkpoint": (
            lambda place: place("test", "--data.path=@data.npz"),
            "test: --ckpt_path is needed",
        ),
        "validate without a checkpoint": (
            lambda place: place("validate", "--data.path=@data.npz"),
            "validate: --ckpt_path is needed",
        ),
        "unknown subcommand": (lambda place: place("apply"), "apply"),
        "unknown option": (predict("--threshold=1"), "--threshold=1"),
        "checkpoint absent": (predict(ckpt="none.ckpt"), "none.ckpt: no such file"),
        "checkpoint a folder": (predict(ckpt="@run"), "run: not a checkpoint of this program"),
        "checkpoint another file": (predict(ckpt="@data.npz"), "data.npz: not a checkpoint"),
        "several devices": (
            predict("--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp"),
            "predict: --trainer.devices must be 1",
        ),
        "data absent": (predict(data="none.npz"), "none.npz: no such file"),
        "split unknown": (predict("--data.split=dev"), "no sample in the dev split"),
        "other labels": (
            with_file(
                "x.npz",
                other_data(label_names=np.array(["sad", "angry", "fear"])),
                predict(data="@x.npz"),
            ),
            "x.npz: ",
        ),
        "modality lacking": (
            with_file("x.npz", fewer("features.b", "lengths.b"), predict(data="@x.npz")),
            "x: modalities and feature sizes .* are not those of the checkpoint",
        ),
        "modalities in another order": (
            with_file(
                "x.npz",
                lambda path, place: np.savez(
                    path, **dict(sorted(np.load(place.data).items(), reverse=True))
                ),
                predict(data="@x.npz"),
            ),
            "x: modalities and feature sizes .* are not those of the checkpoint",
        ),
        "longer sequences": (
            with_file("x.npz", other_data(**FEATURES), predict(data="@x.npz")),
            "x: modality `a` has 6 steps in the train split, the checkpoint knows 5; cut longer",
        ),
        "output into no folder": (predict(output="none/new.csv"), "a file in a folder that exists"),
        "output of another kind": (
            predict(output="@run"),
            "run: --output must end in .csv or .npz",
        ),
        "output a folder": (
            with_file("x.csv", lambda path, _: path.mkdir(), predict(output="@x.csv")),
            "x.csv: exists already",
        ),
        "output onto the data": (predict(output="@data.npz"), "data.npz: exists already"),
        "output onto the checkpoint": (
            predict(output="@run/best.ckpt"),
            "best.ckpt: --output must end in .csv or .npz",
        ),
        "output into the folder of the data": (
            with_file(
                "arrays",
                lambda path, place: write_folder(read(place.data), path),
                predict(data="@arrays", output="@arrays/test/new.npz"),
            ),
            "new.npz: --output would lie within the data",
        ),
        "predict without data": (
            lambda place: place("predict", "--ckpt_path=@run/best.ckpt"),
            "predict: --data.path is needed",
        ),
    },
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Bad(name, call, SystemExit, message), id=f"{group}: {name}")
        for group, cases in CASES.items()
        for name, (call, message) in cases.items()
    ],
)
def test_command_is_refused_in_one_line(place, case, capsys):
    for path in place.folder.iterdir():  # of other cases
        if path not in (place.data, place.run):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(place.run), place.data.read_bytes()
    with ends_in_one_line(capsys, case.message):
        case.call(place)
    assert (contents(place.run), place.data.read_bytes()) == before
    assert not (place.folder / "new").exists()
    assert not [path for path in contents(place.folder) if ".part" in path.name]


# ------------------------------------------------------------------------------- interrupted writing


@contextmanager
def small_disk(limit):
    """No file may grow beyond `limit` bytes: the write that would fails with `OSError`."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def drawn(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def parts(seed):
    return {split: make(20, seed) for split in SPLITS}


def write_checkpoint(path, seed):
    rooms.WholeCheckpointIO().save_checkpoint({"weights": drawn(seed, 500)}, path)


def write_history(path, seed):
    history = rooms.History(path)
    history.rows = [{"epoch": epoch, "loss": seed} for epoch in range(60)]
    trainer = SimpleNamespace(callback_metrics={}, current_epoch=60, is_global_zero=True)
    history.on_train_epoch_end(trainer, None)


def write_predictions(path, seed):
    outputs = {
        "uncertainty": drawn(seed, 20),
        "probs": drawn(seed, 20, 2),
        "gate": drawn(seed, 20, 2),
    }
    rooms.PredictionWriter(path).write(outputs, make(20, seed), torch.tensor([0.5]))


# A name of a file, and how it is written.
WRITERS = {
    "data.npz": lambda path, seed: write_npz(parts(seed), path),
    "last.ckpt": write_checkpoint,
    "metrics.json": lambda path, seed: cli.write_text(path, json.dumps([seed] * 999)),
    "predictions.npz": write_predictions,
    "predictions.csv": write_predictions,
    "metrics.csv": write_history,
}


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_leaves_the_old_file(tmp_path, name):
    path, write = tmp_path / name, WRITERS[name]
    write(path, 1)
    before = path.read_bytes()
    with pytest.raises(OSError, match="File too large"), small_disk(len(before) // 2):
        write(path, 2)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.part*"))
    write(path, 2)
    assert path.read_bytes() != before


def test_links_and_devices_stay_and_protected_files_too(tmp_path, monkeypatch):
    target, link = tmp_path / "target.npz", tmp_path / "link.npz"
    link.symlink_to(target)
    write_npz(parts(1), link)
    assert link.is_symlink()
    before = target.read_bytes()
    assert len(read_npz(target)["test"]) == 20
    device = Path(os.devnull)
    with replacing(device) as path:
        path.write_text("nothing")
    assert device.exists()
    assert not device.is_file()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != target)  # root may all
    with pytest.raises(PermissionError, match=r"target\.npz"):
        write_npz(parts(2), link)
    assert contents(tmp_path) == {link: before, target: before}


def test_full_disk_leaves_no_half_folder(tmp_path):
    folder = tmp_path / "arrays"
    write_folder(parts(1), folder)
    size = max(map(len, contents(folder).values()))
    shutil.rmtree(folder)
    with pytest.raises(OSError, match="File too large"), small_disk(size - 1):
        write_folder(parts(1), folder)
    assert not list(folder.iterdir())
    write_folder(parts(1), folder)
    assert len(read_folder(folder)["test"]) == 20


@pytest.mark.parametrize("number", [0, 10, 20])
def test_full_device_in_the_middle_of_a_folder(tmp_path, monkeypatch, number):
    save, files = np.save, iter(range(100))

    def full(*args, **kwargs):
        if next(files) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space left"):
            write_folder(parts(0), tmp_path)
    assert not list(tmp_path.iterdir())


def test_full_disk_ends_predict_in_one_line(place, tmp_path, capsys):
    with small_disk(200), ends_in_one_line(capsys, "error: .*File too large"):
        predict(output=tmp_path / "new.npz")(place)
    assert contents(tmp_path) == {}


def test_full_disk_ends_training_in_one_line_with_the_last_whole_checkpoint(
    place, tmp_path, capsys
):
    """The disk is full when the second epoch is saved; then there is room again, and the run goes on."""
    run, save = tmp_path / "run", rooms.WholeCheckpointIO.save_checkpoint
    written = []

    def full_later(self, checkpoint, path, storage_options=None):
        if checkpoint["epoch"] == 1:
            with small_disk(1000):
                save(self, checkpoint, path)
        save(self, checkpoint, path)
        written.append(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms.WholeCheckpointIO, "save_checkpoint", full_later)
        with ends_in_one_line(capsys, "error: .*File too large"):
            place("--data.path=@data.npz", *FAST, "--trainer.max_epochs=3", f"--output={run}")
    assert written
    assert torch.load(run / "last.ckpt", weights_only=True)["epoch"] == 0
    place(f"--ckpt_path={run}/last.ckpt")
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 3


KILLED = """
import os, resource, signal, sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
import test_bad_commands as tests

folder = Path(sys.argv[2])

def killed(limit, write, *arguments):  # by the kernel at the write that passes the limit
    if os.fork() == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        write(*arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.wait()[1])

for name, write in tests.WRITERS.items():
    path = folder / name.replace(".", "_") / name
    path.parent.mkdir()
    write(path, 1)
    print(name, killed(path.stat().st_size // 2, write, path, 2))
print("arrays", killed(250, tests.write_folder, tests.parts(2), folder / "arrays"))
sys.stdout.flush()
from uncertainty_mm.examples.lddu_full import main
main(arguments=["--trainer.max_epochs=0"])
"""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(__import__("signal"), "SIGXFSZ"), reason="needs a limit of files")
def test_killed_while_writing(tmp_path):
    """What was there before is there, whole, and writing anew succeeds in spite of what was left.

    Last the process itself, which had to be started anyway, is given a bad option, and ends with its exit code.
    """
    import signal

    command = [sys.executable, "-c", KILLED, Path(__file__).parent, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == "error: trainer.max_epochs must be at least 1, got 0"
    killed = dict(line.split() for line in done.stdout.splitlines())
    assert killed == dict.fromkeys([*WRITERS, "arrays"], str(-signal.SIGXFSZ))
    for name, write in WRITERS.items():
        path, again = tmp_path / name.replace(".", "_") / name, tmp_path / "again" / name
        again.parent.mkdir(exist_ok=True)
        write(again, 1)
        left = [each.name for each in path.parent.iterdir() if ".part" in each.name]
        assert len(left) == 1
        assert re.fullmatch(rf"\.{path.stem}\.[0-9a-f]{{8}}\.part{path.suffix}", left[0])
        if path.suffix not in (".npz", ".ckpt"):
            assert path.read_bytes() == again.read_bytes()
        write(path, 2)
        assert not (path.parent / left[0]).exists()
    read_npz(tmp_path / "data_npz" / "data.npz")
    torch.load(tmp_path / "last_ckpt" / "last.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=re.escape("arrays: was not written to its end")):
        read_folder(tmp_path / "arrays")
