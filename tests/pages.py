"""The blocks of code of the documentation's pages."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(
    r"^```(?:\{(doctest|testcode)\}|(python|console|bash))\n(.*?)^```$", re.DOTALL | re.MULTILINE
)


def blocks(page, *kinds):
    """[(kind, source)] of a page's blocks of the given kinds: doctest, testcode, python, console, bash."""
    found = [(marked or plain, source) for marked, plain, source in BLOCK.findall(page.read_text())]
    return [(kind, source) for kind, source in found if kind in kinds]
