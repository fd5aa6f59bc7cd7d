"""What the tests of the examples share: the modules, under the names by which worker processes import them too."""

import importlib
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# Lightning advises on workers and devices, and its dependencies use what others have deprecated.
QUIET = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def need_extras():
    """Skips a module of tests where the extra `examples` is not installed."""
    for extra in ("lightning", "torchmetrics", "matplotlib", "sklearn", "yaml"):
        pytest.importorskip(extra)


@contextmanager
def example_module(name):
    """The example `name`, imported from its folder, and forgotten afterwards with all that it imports from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module(name)
        for path in EXAMPLES.glob("*.py"):
            sys.modules.pop(path.stem, None)


@contextmanager
def ends_in_one_line(capsys, message=""):
    """Within it a command line ends with exit code 2 and one line on stderr, in which `message`, a regex, is found."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
