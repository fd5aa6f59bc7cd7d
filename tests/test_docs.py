"""The pages of the documentation compute what they say."""

import doctest
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

import uncertainty_mm
from examples_support import toy
from pages import DOCS, blocks
from support import NO_EXPORT_OF_ANY_BATCH, TORCH_2_6

# They train, or export for other run times.
LONG = {"howto/serve", "howto/thresholds", "laboratory/uncertainty"}
PAGES = {
    page.relative_to(DOCS).with_suffix("").as_posix(): page
    for page in sorted(DOCS.rglob("*.md"))
    if blocks(page, "doctest")
}


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.11
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in PAGES],
)
def test_doctests_of_the_page(name):
    if TORCH_2_6 and name == "howto/serve":
        pytest.skip(NO_EXPORT_OF_ANY_BATCH)
    names, failed = {}, 0
    if not name.startswith("howto/"):  # how-to pages import what they use
        exec(runpy.run_path(str(DOCS / "conf.py"))["doctest_global_setup"], names)
    for kind, source in blocks(PAGES[name], "doctest", "testcode"):
        if kind == "testcode":
            exec(source, names)
            continue
        test = doctest.DocTestParser().get_doctest(source, names, name, str(PAGES[name]), 0)
        result = doctest.DocTestRunner().run(test, clear_globs=False)
        assert result.attempted > 0
        failed += result.failed
        names.update(test.globs)
    assert failed == 0


def test_every_page_with_arithmetic_is_found():
    assert {"conventions", "equations", "reproducibility", "howto/fusion"} <= PAGES.keys()


PYTHON = {  # pages with code that only a test can give what it needs, and that test
    "api/lightning": "test_lightning_of_the_page_trains",
    "howto/serve": "test_onnx_of_the_page_answers_as_torch",
}


def test_all_code_of_the_pages_is_run():
    shown = {
        page.relative_to(DOCS).with_suffix("").as_posix()
        for page in DOCS.rglob("*.md")
        if blocks(page, "python") and page.parent.name != "laboratory"
    }
    assert shown == PYTHON.keys()
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert all(f"def {name}(" in tests for name in PYTHON.values())


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_lightning_of_the_page_trains(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    toy("mine.npz")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def training_step(self, batch, batch_idx):
            return self.layer(batch.features["a"].mean(1)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    names = {"model": Model()}
    [(_, source)] = blocks(DOCS / "api" / "lightning.md", "python")
    exec(source.replace("max_epochs=10", "fast_dev_run=True"), names)
    assert names["trainer"].global_step == 1


def test_script_of_typicality_writes_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["typicality.py", str(toy(tmp_path / "toy.npz"))])
    runpy.run_path(str(DOCS / "laboratory" / "typicality.py"))
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4
    assert all(row.count("|") == 9 for row in rows)


def test_code_of_the_pages_is_narrow():
    for page in DOCS.rglob("*.md"):
        if page.parent.name == "laboratory":  # not built
            continue
        for kind, source in blocks(page, "doctest", "testcode", "python", "console", "bash"):
            for line in source.splitlines():
                prompt = line[:4] in (">>> ", "... ")
                shown = prompt or kind != "doctest"  # not what is printed
                if shown and not source.startswith(":hide:"):
                    assert len(line) - 4 * prompt <= 80, f"{page.name}: {line}"


def test_examples_of_the_docstrings_are_narrow():
    for path in Path(uncertainty_mm.__file__).parent.rglob("*.py"):
        for line in path.read_text().splitlines():
            if line.lstrip()[:4] in (">>> ", "... "):
                assert len(line.lstrip()) - 4 <= 80, f"{path.name}: {line}"


# Those with a class of the package itself, not of a submodule.
COMPONENTS = [
    page
    for page in sorted((DOCS / "api").glob("*.md"))
    if re.search(r"autoclass:: uncertainty_mm\.[A-Z]", page.read_text())
]


@pytest.mark.parametrize("page", COMPONENTS, ids=lambda page: page.stem)
def test_page_of_a_component_has_its_parts(page):
    text = page.read_text()
    assert blocks(page, "doctest")
    assert "| Shape |" in text
    assert "**When not to use it**" in text
    assert "**See also**" in text
    assert re.search(r"\{cite:[pt]\}`", text)


# ------------------------------------------------------------------------- the example's options

TEXTS = [
    re.sub(r"\\\n +", "", page.read_text())  # one line for each command
    for page in (*sorted(DOCS.rglob("*.md")), DOCS.parent / "README.md")
]
COMMANDS = dict.fromkeys(  # each once, in order
    command.partition("  #")[0]
    for text in TEXTS
    for command in re.findall(r"^\$ python \S*examples/lddu_full\.py(.*)$", text, re.MULTILINE)
)


def printed_config(arguments, capsys):
    """What a command of the example would run with."""
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("jsonargparse")
    example = pytest.importorskip("uncertainty_mm.examples.lddu_full")
    with pytest.raises(SystemExit) as stop:
        example.main(arguments=[*arguments, "--print_config"])
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    return yaml.safe_load(out)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_are_understood(command, capsys):
    assert "model" in printed_config(shlex.split(command), capsys)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_options_that_the_pages_name_exist(capsys):
    config = printed_config([], capsys)
    groups = ("trainer", "model", "data", "early_stopping", "finite_guard")
    named = {
        x for text in TEXTS for x in re.findall(rf"--((?:{'|'.join(groups)})(?:\.\w+)+)", text)
    }
    assert len(named) > 20
    elsewhere = {"trainer.strategy.timeout"}  # of another strategy
    for option in named - elsewhere:
        inner = config
        for part in option.split("."):
            assert part in inner, option
            inner = inner[part]
