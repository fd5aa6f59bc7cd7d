"""What the tests of the examples share: a data set, a model that trains in a second, work that processes import."""

import importlib
import os
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# Lightning advises on workers and devices, and its dependencies use what others have deprecated.
QUIET = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ENCODER = (
    "--model.encoder.hidden_dim=8",
    "--model.encoder.num_heads=2",
    "--model.encoder.num_layers=1",
)
TINY = (  # LDDU that trains in a second
    *ENCODER,
    "--model.attention.label_dim=8",
    "--model.attention.out_dim=8",
    "--model.decoupler.latent_dim=4",
    "--model.contrastive.queue_size=64",
    "--data.batch_size=16",
    "--trainer.max_epochs=1",
)


def need_extras():
    """Skips a module of tests where the extra `examples` is not installed."""
    for extra in ("lightning", "torchmetrics", "matplotlib", "sklearn", "yaml"):
        pytest.importorskip(extra)


@contextmanager
def example_module(name):
    """The example `name`."""
    yield importlib.import_module(f"uncertainty_mm.examples.{name}")


def toy(path, count=90, **changes):
    """A data set that is read fast, a third for each split; `a` shows the labels, `b` is missing in some samples."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (count, 3)).astype(np.uint8)
    arrays = {
        "features.a": rng.normal(size=(count, 5, 3)) + labels[:, None],
        "lengths.a": np.full(count, 5),
        "features.b": rng.normal(size=(count, 7, 2)),
        "lengths.b": rng.integers(0, 8, count),
        "labels": labels,
        "label_names": np.array(["happy", "sad", "fear"]),
        "split": np.repeat([0, 1, 2], count // 3),
        "ids": np.array([f"clip {index}" for index in range(count)]),
    }
    np.savez(path, **arrays | changes)
    return path


def finishes(run):
    """Work of a sweep that ends well."""
    print(f"seed {run.seed}")
    return {"value": 10 * run.seed}


def breaks(run):
    """Work of a sweep whose process seed 1 brings down."""
    if run.seed == 1:
        print("about to go down", flush=True)
        os._exit(9)
    threads = [torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]]
    return finishes(run) | {"threads": threads}


@contextmanager
def ends_in_one_line(capsys, message=""):
    """Within it a command line ends with exit code 2 and one line on stderr, in which `message`, a regex, is found."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
