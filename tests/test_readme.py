"""The README keeps its word."""

import re
from pathlib import Path

import uncertainty_mm

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def block(marker):
    match = re.search(re.escape(f"<!-- {marker} -->") + r"\n```\w+\n(.*?)```", README, re.DOTALL)
    assert match, marker
    return match[1]


def test_composing_example_runs_as_shown():
    names = {}
    exec(block("snippet: compose"), names)
    assert names["z"].shape == (8, 2, 6, 128)
    assert names["latent"].std.shape == (8, 2, 6, 64)
    assert names["prediction"].logits.shape == (8, 6)
    assert names["attention"].label_embedding.weight.grad.abs().sum() > 0
    assert names["first"].weight.grad.abs().sum() > 0


def test_composing_example_is_short():
    lines = [line for line in block("snippet: compose").splitlines() if line]
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 80


def test_exactly_two_commands():
    markers = re.findall(r"<!-- command: (\w+) -->", README)
    assert sorted(markers) == ["example", "tests"]
    assert README.count("```bash") == 2
    for marker in markers:
        assert len(block(f"command: {marker}").strip().splitlines()) == 1


def test_every_component_is_in_the_table():
    for name in uncertainty_mm.__all__:
        assert f"`{name}`" in README


def test_links_to_files_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target.split("#")[0]).exists(), target
