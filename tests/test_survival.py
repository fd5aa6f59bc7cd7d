"""A training that is killed by the operating system ends, resumed, as the undisturbed one."""

import subprocess
import sys
from pathlib import Path

import pytest

from examples_support import need_extras

need_extras()
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="kills and looks into processes")
def test_killed_training_ends_as_the_undisturbed_one():
    command = [sys.executable, ROOT / "tests" / "endurance.py", "kills", "--count=2", "--seed=1"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    assert "2 kills" in output
