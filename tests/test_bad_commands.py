"""Everything that can be wrong with a command line, and writing that does not come to its end.

A table of `Bad` cases, as in `test_bad_input.py`: each ends with exit code 2 and one line on stderr, and leaves the
files of a finished run, its data among them, as they are. The second part lets the disk take no more, or has the
process killed, in the middle of writing: what was there before stays, whole.
"""

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from examples_support import EXAMPLES, QUIET, ends_in_one_line, example_module, need_extras
from support import Bad
from uncertainty_mm._files import replacing
from uncertainty_mm.data import MultimodalDataset, read_folder, read_npz, write_folder, write_npz

need_extras()
pytestmark = QUIET
SMALL = [
    *("--hidden-dim=8", "--heads=2", "--layers=1", "--z-dim=4", "--latent-dim=2"),
    *("--queue-size=16", "--batch-size=16", "--accelerator=cpu", "--epochs=2"),
]


class Place(NamedTuple):
    """Where the commands are tried."""

    modules: dict[str, Any]
    folder: Path  # holds `data.npz` and the finished run `run`; cases may write anything else
    data: Path
    run: Path

    def __call__(self, program, *arguments):
        self.modules[program].main([str(argument) for argument in arguments])


def parts(seed=0, names=("first", "second"), steps=3, modalities=("a", "b")):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for split in ("train", "validation", "test"):
        labels = torch.randint(2, (16, 2), generator=generator)
        features = {name: torch.randn(16, steps, 2, generator=generator) for name in modalities}
        padding = {name: torch.zeros(16, steps).bool() for name in modalities}
        made[split] = MultimodalDataset(features, padding, labels, names)
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    with ExitStack() as stack:
        names = ("baselines", "lddu_ablation", "uncertainty_study", "lddu_figures", "lddu_full")
        modules = {name: stack.enter_context(example_module(name)) for name in names}
        modules |= {name: sys.modules[name] for name in ("sweep", "lddu_full")}
        place = Place(modules, folder, folder / "data.npz", folder / "run")
        write_npz(parts(), place.data)
        place("lddu_full", "--data", place.data, "--output", place.run, *SMALL)
        yield place


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Evil:
    """Would run code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise RuntimeError('run')",)


def train(*options, data=True):
    def call(place):
        source = ["--data", place.data] if data else []
        place("lddu_full", *source, "--output", place.folder / "new", *SMALL, *options)

    return call


def resume(ckpt="run/last.ckpt", *options):
    return lambda place: place(
        "lddu_full", "--data", place.data, "--ckpt", place.folder / ckpt, *SMALL, *options
    )


def predict(*options, data="data.npz", ckpt="run/best.ckpt", output="new.csv"):
    def call(place):
        data_path, ckpt_path, output_path = (place.folder / each for each in (data, ckpt, output))
        where = ["--data", data_path, "--ckpt", ckpt_path, "--output", output_path]
        place("lddu_full", "predict", *where, "--accelerator=cpu", *options)

    return call


def with_file(name, write, call):
    """Writes a file first: `write(path, place)`."""

    def written(place):
        write(place.folder / name, place)
        call(place)

    return written


def other_data(**change):
    return lambda path, _: write_npz(parts(**change), path)


def changed_checkpoint(change):
    """Writes the last checkpoint of the run after `change(content)`."""

    def write(path, place):
        content = torch.load(place.run / "last.ckpt", weights_only=True)
        change(content)
        torch.save(content, path)

    return write


def half(path, place):
    content = (place.run / "last.ckpt").read_bytes()
    path.write_bytes(content[: len(content) // 2])


def changed_bit(path, place):
    weights = torch.load(place.run / "last.ckpt", weights_only=True)["state_dict"]
    content = bytearray((place.run / "last.ckpt").read_bytes())
    content[content.index(weights["model.fusion.mean_head.0.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)


def rename_weights(content):
    """As if another network had been trained with these options."""
    state = content["state_dict"]
    content["state_dict"] = {key.replace("fusion", "mixing"): x for key, x in state.items()}


def sweep_of(program, *options, data=("data.npz",), output="sweep"):
    def call(place):
        files = [place.folder / each for each in data]
        where = ["--data", *files, "--output", place.folder / output]
        place(program, *where, *options)

    return call


def exits(name, call, message):
    return Bad(name, call, SystemExit, message)


COMMANDS = {
    "train": [
        exits(
            "unknown option",
            train("--learning-rate", 1),
            "unrecognized arguments: --learning-rate 1",
        ),
        exits("shortened option", train("--epoch", 1), "unrecognized arguments: --epoch 1"),
        exits("unknown choice", train("--gate", "open"), "argument --gate: invalid choice: 'open'"),
        exits(
            "word for a number", train("--layers", "many"), "argument --layers: invalid .*'many'"
        ),
        exits("fraction of layers", train("--layers", "1.5"), "argument --layers: invalid .*'1.5'"),
        exits(
            "negative rate",
            train("--lr=-1"),
            "argument --lr: must not be negative or infinite, got -1",
        ),
        exits(
            "rate nan",
            train("--lr=nan"),
            "argument --lr: must not be negative or infinite, got nan",
        ),
        exits(
            "rate infinite",
            train("--lr=inf"),
            "argument --lr: must not be negative or infinite, got inf",
        ),
        exits("rate 0", train("--lr=0"), "error: --lr must be above 0"),
        exits("no epoch", train("--epochs=0"), "error: --epochs must be above 0"),
        exits("batches of 0", train("--batch-size=0"), "error: --batch-size must be above 0"),
        exits("temperature 0", train("--temperature=0"), "error: --temperature must be above 0"),
        exits("dropout 1", train("--dropout=1"), "error: --dropout must be below 1, got 1.0"),
        exits(
            "seed negative",
            train("--seed=-1"),
            "argument --seed: must not be negative or infinite, got -1",
        ),
        exits(
            "seed too large",
            train("--seed", 2**32),
            r"--seed must be below 2\*\*32, got 4294967296",
        ),
        exits(
            "heads that do not divide",
            train("--heads=3"),
            "--hidden-dim 8 is no multiple of --heads 3",
        ),
        exits("precision unknown", train("--precision=8"), "error: Precision '8' is invalid"),
        exits("accelerator unknown", train("--accelerator=abacus"), "error: .*abacus"),
        exits(
            "no soft labels there",
            train("--soft-labels=1"),
            "--soft-labels: the training split has none",
        ),
        exits(
            "data absent", train("--data", "none.npz", data=False), "error: none.npz: no such file"
        ),
        exits(
            "suffix unknown",
            train("--data", "data.h5", data=False),
            "data.h5: --format must say what it is",
        ),
        exits("another layout", train("--format=mmsa"), "data.npz: not a readable pickle"),
        exits(
            "labels without need",
            train("--labels=x.csv"),
            "x.csv: --labels goes with --format mmsa, got npz",
        ),
        exits(
            "data truncated",
            with_file(
                "cut.npz",
                lambda path, place: path.write_bytes(place.data.read_bytes()[:500]),
                lambda place: train("--data", place.folder / "cut.npz", data=False)(place),
            ),
            "cut.npz: not a readable .npz file of plain arrays",
        ),
        exits(
            "data malicious",
            with_file(
                "evil.pkl",
                lambda path, _: path.write_bytes(pickle.dumps(Evil())),
                lambda place: train("--data", place.folder / "evil.pkl", data=False)(place),
            ),
            "evil.pkl: refused, because it names `builtins.exec`",
        ),
        exits(
            "output onto a file",
            lambda p: p("lddu_full", "--data", p.data, "--output", p.data, *SMALL),
            "data.npz: cannot write there",
        ),
        exits(
            "output below a file",
            lambda p: p("lddu_full", "--data", p.data, "--output", p.data / "x", *SMALL),
            r"data.npz.x: cannot write there \(Not a directory\)",
        ),
        exits(
            "options absent",
            train("--config=none.yaml"),
            "none.yaml: neither a file of options nor one of",
        ),
        exits(
            "options that are a list",
            with_file(
                "list.yaml",
                lambda path, _: path.write_text("- 1\n"),
                lambda place: train("--config", place.folder / "list.yaml")(place),
            ),
            "list.yaml: must hold options, `name: value`, got list",
        ),
        exits("trial with an output", train("--fast-dev-run"), "--fast-dev-run keeps nothing"),
    ],
    "resume": [
        exits("absent", resume("none.ckpt"), "none.ckpt: no such file"),
        exits(
            "truncated",
            with_file("run2/half.ckpt", half, resume("run2/half.ckpt", "--epochs=4")),
            "half.ckpt: not a checkpoint of this program",
        ),
        exits(
            "malicious",
            with_file(
                "run2/evil.ckpt",
                lambda path, _: torch.save({"state_dict": Evil()}, path),
                resume("run2/evil.ckpt", "--epochs=4"),
            ),
            "evil.ckpt: not a checkpoint of this program",
        ),
        exits(
            "not of a training",
            with_file(
                "run2/x.ckpt",
                changed_checkpoint(lambda c: c.pop("optimizer_states")),
                resume("run2/x.ckpt", "--epochs=4"),
            ),
            "x.ckpt: cannot resume, it has no state of a training",
        ),
        exits(
            "of another class",
            with_file(
                "run2/x.ckpt",
                changed_checkpoint(rename_weights),
                resume("run2/x.ckpt", "--epochs=4"),
            ),
            "x.ckpt: cannot resume, of another model or version: `model.fusion.* has shape .* now and had None",
        ),
        exits(
            "nothing left to do",
            resume("run/last.ckpt"),
            "last.ckpt: 2 epochs are done, --epochs is 2",
        ),
        exits(
            "of other options",
            resume("run/last.ckpt", "--epochs=4", "--latent-dim=3"),
            "cannot resume, `model` is",
        ),
        exits(
            "into another folder",
            resume("run/last.ckpt", "--epochs=4", "--output=elsewhere"),
            "a run resumes where its checkpoint is",
        ),
    ],
    "predict": [
        exits(
            "no checkpoint given",
            lambda p: p("lddu_full", "predict", "--data", p.data),
            "the following arguments are required: --ckpt",
        ),
        exits("checkpoint absent", predict(ckpt="none.ckpt"), "none.ckpt: no such file"),
        exits("checkpoint a folder", predict(ckpt="run"), "run: not a checkpoint of this program"),
        exits(
            "checkpoint truncated",
            with_file("half.ckpt", half, predict(ckpt="half.ckpt")),
            "half.ckpt: not a checkpoint of this program",
        ),
        exits(
            "checkpoint of which a bit has changed",
            with_file("x.ckpt", changed_bit, predict(ckpt="x.ckpt")),
            r"x.ckpt: not a checkpoint of this program \(the check sum of `.*` is wrong\)",
        ),
        exits(
            "checkpoint of tensors",
            with_file(
                "x.ckpt", lambda path, _: torch.save(torch.ones(3), path), predict(ckpt="x.ckpt")
            ),
            "x.ckpt: not a checkpoint of this program",
        ),
        exits(
            "checkpoint of another class",
            with_file("x.ckpt", changed_checkpoint(rename_weights), predict(ckpt="x.ckpt")),
            "x.ckpt: of another model or version",
        ),
        exits("data absent", predict(data="none.npz"), "none.npz: no such file"),
        exits("split unknown", predict("--split=dev"), "argument --split: invalid choice: 'dev'"),
        exits("batches of 0", predict("--batch-size=0"), "error: --batch-size must be above 0"),
        exits(
            "labels in another order",
            with_file("x.npz", other_data(names=("second", "first")), predict(data="x.npz")),
            "x.npz: labels .* are not those of the checkpoint",
        ),
        exits(
            "modality lacking",
            with_file("x.npz", other_data(modalities=("a",)), predict(data="x.npz")),
            "x.npz: modalities and feature sizes .* are not those of the checkpoint",
        ),
        exits(
            "modalities in another order",
            with_file("x.npz", other_data(modalities=("b", "a")), predict(data="x.npz")),
            "x.npz: modalities and feature sizes .* are not those of the checkpoint",
        ),
        exits(
            "longer sequences",
            with_file("x.npz", other_data(steps=4), predict(data="x.npz")),
            "x.npz: modality `a` has 4 steps, the checkpoint knows 3",
        ),
        exits("output into no folder", predict(output="none/new.csv"), "no such folder"),
        exits(
            "output a folder", predict(output="run"), "run: is a folder, --output must be a file"
        ),
        exits(
            "output onto the data",
            predict(output="data.npz"),
            "data.npz: --output would replace what is read",
        ),
        exits(
            "output onto the checkpoint",
            predict(output="run/best.ckpt"),
            "best.ckpt: --output would replace what is read",
        ),
    ],
    "figures": [
        exits(
            "no run there",
            lambda p: p("lddu_figures", p.folder / "none", "--data", p.data),
            "best.ckpt: no such file",
        ),
        exits(
            "output onto a file",
            lambda p: p("lddu_figures", p.run, "--data", p.data, "--output", p.data),
            "data.npz: cannot write there",
        ),
    ],
    "sweeps": [
        exits("ablation: no data", sweep_of("lddu_ablation", data=()), "error: --data is needed"),
        exits(
            "ablation: data absent",
            sweep_of("lddu_ablation", data=("none.npz",)),
            "--data: no such file, .*none.npz",
        ),
        exits(
            "ablation: data twice",
            sweep_of("lddu_ablation", data=("data.npz",) * 2),
            "--data must be different, got",
        ),
        exits(
            "ablation: row unknown",
            sweep_of("lddu_ablation", "--arms", "(99)"),
            r"argument --arms: invalid choice: '\(99\)'",
        ),
        exits(
            "ablation: no row", sweep_of("lddu_ablation", "--arms"), "--arms must name at least one"
        ),
        exits(
            "ablation: no epoch",
            sweep_of("lddu_ablation", "--epochs", 0),
            "--epochs must be above 0, got 0",
        ),
        exits(
            "ablation: model unknown",
            sweep_of("lddu_ablation", "--model", "theirs"),
            "argument --model: invalid choice: 'theirs'",
        ),
        exits(
            "baselines: seed twice",
            sweep_of("baselines", "--seeds", 1, 1),
            "--seeds must be different, got 1 1",
        ),
        exits(
            "baselines: no seed", sweep_of("baselines", "--seeds"), "--seeds must name at least one"
        ),
        exits(
            "baselines: negative seed",
            sweep_of("baselines", "--seeds", 0, -1),
            "--seeds must not be negative, got -1",
        ),
        exits(
            "baselines: seed a word",
            sweep_of("baselines", "--seeds", "all"),
            "argument --seeds: invalid int value: 'all'",
        ),
        exits(
            "baselines: no job", sweep_of("baselines", "--jobs", 0), "--jobs must be above 0, got 0"
        ),
        exits(
            "baselines: option unknown",
            sweep_of("baselines", "--options", "--depth 3"),
            "unrecognized arguments: --depth 3",
        ),
        exits(
            "baselines: option out of range",
            sweep_of("baselines", "--options", "--dropout 1"),
            "--dropout must be below 1, got 1.0",
        ),
        exits(
            "baselines: output onto a file",
            sweep_of("baselines", output="data.npz"),
            "error: .*File exists.*data.npz",
        ),
        exits(
            "study: no .npz",
            sweep_of("uncertainty_study", data=("data.pkl",)),
            "--data takes .npz files here, got .*data.pkl",
        ),
        exits(
            "study: no sample",
            sweep_of("uncertainty_study", "--sizes", 10, 0, 10),
            "--sizes must be above 0, got 0",
        ),
        exits(
            "study: nothing to do",
            sweep_of("uncertainty_study", "--no-synthetic", data=()),
            "--no-synthetic leaves nothing without --data",
        ),
        exits(
            "study: data named as the synthetic one",
            with_file(
                "synthetic.npz",
                other_data(),
                sweep_of("uncertainty_study", data=("synthetic.npz",)),
            ),
            r"--data must not be named synthetic",
        ),
        exits(
            "two files of one name",
            with_file(
                "two/data.npz",
                other_data(),
                sweep_of("baselines", data=("data.npz", "two/data.npz")),
            ),
            "--data must have different names, got data data",
        ),
    ],
}


def all_commands():
    return [
        pytest.param(case, id=f"{group}: {case.name}")
        for group, cases in COMMANDS.items()
        for case in cases
    ]


@pytest.mark.parametrize("case", all_commands())
def test_command_is_refused_in_one_line(place, case, capsys):
    for path in place.folder.iterdir():  # of other cases
        if path not in (place.data, place.run):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("run2", "two"):
        (place.folder / name).mkdir()
    before = contents(place.run), place.data.read_bytes()
    with ends_in_one_line(capsys, case.message):
        case.call(place)
    assert (contents(place.run), place.data.read_bytes()) == before
    left = {path.name for path in contents(place.folder)} - {path.name for path in before[0]}
    assert not {name for name in left if ".part" in name}


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


def outputs(seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (16, 2)
    return {
        "probs": torch.rand(shape, generator=generator),
        "gate": torch.rand(shape, generator=generator),
        "std_norm": torch.rand(16, 2, 2, generator=generator),
    }


def write_checkpoint(example, path, seed):
    weights = torch.randn(500, generator=torch.Generator().manual_seed(seed))
    example.CompleteCheckpoints().save_checkpoint({"weights": weights}, path)


def write_history(example, path, seed):
    history = example.History(path.parent)
    history.rows = [{"epoch": epoch, "loss": seed} for epoch in range(60)]
    trainer = SimpleNamespace(callback_metrics={}, current_epoch=60, is_global_zero=True)
    history.on_train_epoch_end(trainer, None)


def draw(example, path, seed):
    history = [{"epoch": 0, "loss/cls": seed}]
    example.plot(history, outputs(seed)["probs"], torch.ones(16, 2), path)


# A name of a file, and how it is written: write(example, path, seed).
WRITERS = {
    "data.npz": lambda _, path, seed: write_npz(parts(seed), path),
    "last.ckpt": write_checkpoint,
    "metrics.json": lambda example, path, seed: example.write_text(path, json.dumps([seed] * 999)),
    "predictions.npz": lambda example, path, seed: example.save_arrays(
        path, torch.tensor([0.5]), parts(seed)["test"], outputs(seed)
    ),
    "predictions.csv": lambda example, path, seed: example.save_rows(
        path, torch.tensor([0.5]), parts(seed)["test"], outputs(seed)
    ),
    "metrics.csv": write_history,
    "training.png": draw,
}


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_leaves_the_old_file(place, tmp_path, name):
    example, path, write = place.modules["lddu_full"], tmp_path / name, WRITERS[name]
    write(example, path, 1)
    before = path.read_bytes()
    with pytest.raises(OSError, match="File too large"), small_disk(len(before) // 2):
        write(example, path, 2)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.part*"))
    write(example, path, 2)
    assert path.read_bytes() != before


def test_links_and_devices_stay_and_protected_files_too(tmp_path, monkeypatch):
    target, link = tmp_path / "target.npz", tmp_path / "link.npz"
    link.symlink_to(target)
    write_npz(parts(1), link)
    assert link.is_symlink()
    before = target.read_bytes()
    assert len(read_npz(target)["test"]) == 16
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
    assert len(read_folder(folder)["test"]) == 16


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
            write_folder(parts(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_full_disk_ends_predict_in_one_line(place, tmp_path, capsys):
    output = tmp_path / "new.npz"
    output.write_bytes(b"old")
    with small_disk(200), ends_in_one_line(capsys, "error: .*File too large"):
        predict(output=output)(place)
    assert contents(tmp_path) == {output: b"old"}


def test_full_disk_ends_training_in_one_line_with_the_last_whole_checkpoint(
    place, tmp_path, capsys
):
    """The disk is full when the second epoch is saved; then there is room again, and the run goes on."""
    example = place.modules["lddu_full"]
    run = tmp_path / "run"
    save = example.CompleteCheckpoints.save_checkpoint
    written = []

    def full_later(self, checkpoint, path, storage_options=None):
        if checkpoint["epoch"] == 1:
            with small_disk(1000):
                save(self, checkpoint, path)
        save(self, checkpoint, path)
        written.append(path)

    command = ["--data", place.data, *SMALL, "--epochs=3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.CompleteCheckpoints, "save_checkpoint", full_later)
        with ends_in_one_line(capsys, "error: .*File too large"):
            place("lddu_full", *command, "--output", run)
    assert written
    assert torch.load(run / "last.ckpt", weights_only=True)["epoch"] == 0
    place("lddu_full", *command, "--ckpt", run / "last.ckpt")
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 3


KILLED = """
import os, resource, signal, sys, warnings
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
warnings.simplefilter("ignore")
import lddu_full
import test_bad_commands as tests

folder = Path(sys.argv[3])
for name, write in tests.WRITERS.items():
    path = folder / name.replace(".", "_") / name
    path.parent.mkdir()
    write(lddu_full, path, 1)
    size = path.stat().st_size
    if os.fork() == 0:  # killed by the kernel at the write that passes the limit
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        write(lddu_full, path, 2)
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.wait()[1]))
if os.fork() == 0:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    tests.write_folder(tests.parts(2), folder / "arrays")
    os._exit(0)
print("arrays", os.waitstatus_to_exitcode(os.wait()[1]))
sys.stdout.flush()
lddu_full.main(["--data", str(folder / "data_npz" / "data.npz"), "--epochs", "0"])
"""


@pytest.mark.skipif(not hasattr(__import__("signal"), "SIGXFSZ"), reason="needs a limit of files")
def test_killed_while_writing(place, tmp_path):
    """What was there before is there, whole, and writing anew succeeds in spite of what was left.

    Last the process itself, which had to be started anyway, is given a bad option, and ends with its exit code.
    """
    import signal

    example = place.modules["lddu_full"]
    command = [sys.executable, "-c", KILLED, EXAMPLES, Path(__file__).parent, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: --epochs must be above 0"
    killed = dict(line.split() for line in done.stdout.splitlines())
    assert killed == dict.fromkeys([*WRITERS, "arrays"], str(-signal.SIGXFSZ))
    for name, write in WRITERS.items():
        path, again = tmp_path / name.replace(".", "_") / name, tmp_path / "again" / name
        again.parent.mkdir(exist_ok=True)
        write(example, again, 1)
        left = [each.name for each in path.parent.iterdir() if ".part" in each.name]
        assert len(left) == 1
        assert re.fullmatch(rf"\.{path.stem}\.[0-9a-f]{{8}}\.part{path.suffix}", left[0])
        if path.suffix not in (".npz", ".png", ".ckpt"):
            assert path.read_bytes() == again.read_bytes()
        write(example, path, 2)
        assert not (path.parent / left[0]).exists()
    read_npz(tmp_path / "data_npz" / "data.npz")
    torch.load(tmp_path / "last_ckpt" / "last.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=re.escape("arrays: was not written to its end")):
        read_folder(tmp_path / "arrays")
