"""The workflows: pinned actions, few permissions, and only commands that people are told to run themselves."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
if not FILES:
    pytest.skip("not part of a source distribution", allow_module_level=True)


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def workflow(request):
    return yaml.safe_load(request.param.read_text()), request.param.read_text()


def steps(content):
    return [step for job in content["jobs"].values() for step in job["steps"]]


def test_actions_are_pinned_to_commits_and_say_their_version(workflow):
    content, text = workflow
    lines = re.findall(r"^\s*(?:- )?uses: (.*)$", text, re.MULTILINE)
    assert len(lines) == sum("uses" in step for step in steps(content)) > 0
    for line in lines:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+(\.\d+\.\d+)?", line), line


def test_an_action_has_one_commit():
    text = "".join(path.read_text() for path in FILES)
    pins = set(re.findall(r"uses: (\S+)@(\S+) # (\S+)", text))
    assert len(pins) == len({action for action, _, _ in pins})


def test_permissions_are_few(workflow):
    content, _ = workflow
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        writes = {scope for scope, what in job.get("permissions", {}).items() if what != "read"}
        assert writes <= {"attest": {"id-token", "attestations"}, "publish": {"id-token"}}.get(
            name, set()
        )
        if writes:  # whoever may sign or publish runs nothing of this repository
            assert all("run" not in step for step in job["steps"])
            assert not any("checkout" in step["uses"] for step in job["steps"])
        assert job["timeout-minutes"] <= 90
    assert "secrets." not in workflow[1]


def test_checkout_leaves_no_token_behind(workflow):
    for step in steps(workflow[0]):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"] == {"persist-credentials": False}


def test_commands_are_those_of_the_pages(workflow):
    pages = ("README.md", "docs/contributing.md")
    told = "\n".join((ROOT / page).read_text() for page in pages)
    for step in steps(workflow[0]):
        if "run" in step:
            assert step["run"] in told
            assert "${{" not in step["run"]  # nothing from outside becomes part of a command


def test_tried_versions_are_those_of_the_requirements():
    content = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = content["jobs"]["tests"]["strategy"]["matrix"]
    requirements = (ROOT / "pyproject.toml").read_text()
    oldest = dict(
        line.split("==")
        for line in (ROOT / "tests" / "oldest.txt").read_text().split("\n")
        if "==" in line
    )
    assert f'requires-python = ">={matrix["python"][0]}"' in requirements
    assert oldest["torch"] == matrix["torch"][0]
    assert f"torch=={matrix['torch'][1]}" in (ROOT / ".ci" / "run").read_text()
    for name, bound in re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)"', requirements):
        if name in oldest:
            assert (oldest[name] + ".0.0").startswith(bound), (name, bound)
    section = re.search(r"dependencies = .*?docs = \[", requirements, re.DOTALL)[0]
    needed = set(re.findall(r'"([\w-]+)>=', section))
    assert needed <= oldest.keys()
