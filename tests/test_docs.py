"""The pages of the documentation compute what they say."""

import doctest
import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"^```\{doctest\}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_doctests_of_the_page(page):
    names = {}
    exec(runpy.run_path(str(DOCS / "conf.py"))["doctest_global_setup"], names)
    source = "\n".join(BLOCK.findall(page.read_text()))
    test = doctest.DocTestParser().get_doctest(source, names, page.name, str(page), 0)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_page_with_arithmetic_is_found():
    assert {"conventions", "equations", "reproducibility"} <= {page.stem for page in PAGES}
