"""The harness for language models, against a server on this machine that also misbehaves."""

import json
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from examples_support import QUIET, ends_in_one_line, need_extras

need_extras()
from uncertainty_mm.examples.baselines.bootstrap import contributions  # noqa: E402
from uncertainty_mm.examples.language_models import endpoint, harness, prompt  # noqa: E402
from uncertainty_mm.examples.language_models.endpoint import Budget, Endpoint  # noqa: E402
from uncertainty_mm.lightning import UsageError  # noqa: E402
from uncertainty_mm.metrics.functional import evaluate  # noqa: E402

pytestmark = QUIET
KEY, NAMES = "sk-very-secret", ["happy", "sad", "fear"]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append((self.path, self.headers.get("Authorization"), body))
            what = server.script.pop(0) if server.script else server.default(body)
        status, text, headers = (*what, {})[:3] if isinstance(what, tuple) else (200, what, {})
        if text == "hang":
            time.sleep(0.5)
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for piece in [text] if text != "drip" else ["x"] * 12:
                time.sleep(0.05 * (text == "drip"))
                self.wfile.write(piece.encode())
        except OSError:  # who asked has gone
            pass


def reply(content, tokens=10):
    usage = {} if tokens is None else {"usage": {"total_tokens": tokens}}
    return json.dumps({"choices": [{"message": {"content": content}}], **usage})


@pytest.fixture(scope="module")
def running():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.lock = threading.Lock()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def server(running, monkeypatch):
    """A server that says what its `script` says, then always `["sad"]`."""
    monkeypatch.setenv("no_proxy", "*")
    running.script, running.seen = [], []
    running.default = lambda body: reply('["sad"]')
    running.url = f"http://127.0.0.1:{running.server_port}/v1"
    return running


def client(server, **options):
    return Endpoint(server.url, "m", **{"wait": 0.001, "timeout": 30, "key": KEY} | options)


@pytest.fixture
def clips(tmp_path):
    """Four clips; one lacks frames, one a transcript; a label of the last is not known."""
    rows = ["id,happy,sad,fear", "a,1,0,0", "b,0,1,0", "c,0,1,1", "d,0,,0"]
    (tmp_path / "clips" / "transcripts").mkdir(parents=True)
    (tmp_path / "clips" / "labels.csv").write_text("\n".join(rows) + "\n")
    for name in "abcd":
        if name != "b":
            (tmp_path / "clips" / "transcripts" / f"{name}.txt").write_text(f"I am {name}.\n")
        if name != "c":
            (tmp_path / "clips" / "frames" / name).mkdir(parents=True)
            for i in range(5):
                (tmp_path / "clips" / "frames" / name / f"{i}.jpg").write_bytes(b"%d" % i)
    return tmp_path / "clips"


QUESTION = [{"role": "user", "content": "?"}]


def test_question_holds_the_transcript_the_labels_and_frames_evenly_spaced(clips):
    found = prompt.read_clips(clips)
    assert found.label_names == NAMES
    assert found.unknown.nonzero().tolist() == [[3, 1]]
    (message,) = prompt.question(found.clips[0], NAMES, 3)
    text, *pictures = message["content"]
    assert "I am a." in text["text"]
    assert "happy, sad, fear" in text["text"]
    urls = [each["image_url"]["url"] for each in pictures]
    assert urls == [f"data:image/jpeg;base64,{x}" for x in ("MA==", "Mg==", "NA==")]  # 0 2 4
    (message,) = prompt.question(found.clips[1], NAMES, 99)
    assert len(message["content"]) == 6
    assert "transcript" not in message["content"][0]["text"]
    (message,) = prompt.question(found.clips[2], NAMES, 3)
    assert len(message["content"]) == 1
    assert "frames" not in message["content"][0]["text"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('["sad", "happy"]', ["sad", "happy"]),
        (" []\n", []),
        ('```json\n["fear"]\n```', ["fear"]),
        ("sad", None),
        ('The answer: ["sad"]', None),
        ('["Sad"]', None),
        ('["sad", "sad"]', None),
        ('["sad", "angry"]', None),
        ('{"sad": 1}', None),
        ("[1]", None),
        ("[[]]", None),
        ("null", None),
        ("", None),
        ("[" * 100_000, None),
    ],
)
def test_answers_are_parsed_strictly(answer, said):
    assert prompt.parse(answer, NAMES) == said


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name,sad\na,1\n", "header must be `id`"),
        ("id,sad,sad\na,1,1\n", "header must be `id`"),
        ("id,sad\n", "at least one sample"),
        ("id,sad\na,1\na,0\n", "none twice"),
        ("id,sad\na,2\n", "1 of 0, 1 or nothing"),
        ("id,sad\na,1,0\n", "1 of 0, 1 or nothing"),
        ("id,sad\n../a,1\n", "cannot be the name of a file"),
        ("id,sad\nz,1\n", "z has neither frames nor a transcript"),
        ("", "header must be `id`"),
        (None, "no such file"),
    ],
)
def test_bad_folders_are_refused(clips, table, message):
    (clips / "labels.csv").unlink()
    if table is not None:
        (clips / "labels.csv").write_text(table)
    with pytest.raises(UsageError, match=message):
        prompt.read_clips(clips)


def test_a_request_is_that_of_the_protocol(server):
    found = client(server, options={"temperature": 0})(QUESTION)
    assert found == ('["sad"]', 10)
    path, authorization, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert authorization == f"Bearer {KEY}"
    assert body == {"model": "m", "messages": QUESTION, "temperature": 0}
    client(server, key=None)(QUESTION)
    assert server.seen[1][1] is None


@pytest.mark.parametrize(
    "trouble",
    [
        (429, "slow down", {"Retry-After": "0"}),
        (503, "busy", {"Retry-After": formatdate(0, usegmt=True)}),
        (500, "", {"Retry-After": "soon"}),
        "hang",
        "drip",
        "<html>garbage",
        "[" * 100_000,
        '{"choices": []}',
        "null",
        reply(None),
        (200, reply("cut")[:20], {"Content-Length": "9999"}),
    ],
    ids=lambda trouble: str(trouble)[:20],
)
def test_what_may_pass_is_tried_again(server, trouble):
    server.script = [trouble, trouble]
    slow = trouble in ("hang", "drip")  # so may others be, on a busy machine
    found = client(server, timeout=0.2 if slow else 30, tries=9)(QUESTION)
    assert found.text == '["sad"]'
    assert len(server.seen) == 3 or (slow and len(server.seen) > 3)


def test_pauses_double_unless_the_server_names_them(server, monkeypatch):
    pauses = []
    clock = SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic)
    monkeypatch.setattr(endpoint, "time", clock)
    server.script = [
        (500, ""),
        (500, ""),
        (429, "", {"Retry-After": "7"}),
        (429, "", {"Retry-After": "999"}),
    ]
    client(server, wait=1.0)(QUESTION)
    assert 0.5 <= pauses[0] <= 1 <= pauses[1] <= 2
    assert pauses[2:] == [7, endpoint.LONGEST_WAIT]


def test_tries_come_to_an_end(server):
    server.script = [(429, KEY)] * 9
    with pytest.raises(endpoint.FailedError, match=r"429: \*\*\*, after 3 tries"):
        client(server, tries=3)(QUESTION)
    assert len(server.seen) == 3
    server.script = [(400, "too large")]
    with pytest.raises(endpoint.FailedError, match="400: too large"):
        client(server)(QUESTION)
    assert len(server.seen) == 4


def test_a_refusal_stops_at_once_and_does_not_show_the_key(server):
    server.script = [(401, f"wrong key: {KEY}")]
    with pytest.raises(UsageError, match=r"wrong key: \*\*\*$") as error:
        client(server)(QUESTION)
    assert KEY not in str(error.value)
    server.script = [(302, "", {"Location": server.url + "/elsewhere"})]
    with pytest.raises(UsageError, match="302"):
        client(server)(QUESTION)
    assert len(server.seen) == 2  # the key went nowhere else


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "ftp://x"}, "`url` to begin with"),
        ({"url": "https://me:pw@x"}, "no user in it"),
        ({"url": "http://example.org/v1"}, "https where a key is sent"),
        ({"key": "a\nb"}, "printable ASCII"),
        ({"timeout": 0}, "`timeout` above 0"),
        ({"tries": 0}, "`tries` at least 1"),
    ],
)
def test_bad_endpoints_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as error:
        Endpoint(**{"url": "https://x", "model": "m", "key": KEY} | change)
    assert "a\nb" not in str(error.value)
    assert "pw" not in str(error.value)


def test_budget_counts_every_try_and_is_not_exceeded(server):
    budget = Budget(requests=3)
    ask = client(server, budget=budget)
    server.script = [(500, "")]
    ask(QUESTION)
    ask(QUESTION)
    with pytest.raises(endpoint.SpentError, match="bound of 3 requests"):
        ask(QUESTION)
    assert len(server.seen) == 3
    budget = Budget(tokens=35)
    ask = client(server, budget=budget)
    for _ in range(3):
        ask(QUESTION)
    with pytest.raises(endpoint.SpentError, match="30 of 35 tokens"):
        ask(QUESTION)
    server.script = [reply("[]", tokens=None)]
    with pytest.raises(UsageError, match="does not say how many tokens"):
        client(server, budget=Budget(tokens=35))(QUESTION)


def test_answers_are_cached_and_wrong_ones_counted(server, clips, tmp_path):
    found = prompt.read_clips(clips)
    said = {"I am a": '["happy"]', "I am c": '["sad"]', "I am d": "[]"}

    def default(body):
        text = body["messages"][0]["content"][0]["text"]
        return reply(next((said[each] for each in said if each in text), "I see a sad man"))

    server.default = default
    ask = client(server)
    cache = harness.Cache(tmp_path / "cache", ask.identity)
    outcomes = harness.ask_all(found, ask, cache, frames=2, jobs=3)
    assert [each.status for each in outcomes] == ["answered", "wrong", "answered", "answered"]
    assert [each.said for each in outcomes] == [["happy"], [], ["sad"], []]
    (tmp_path / "out").mkdir()
    results = harness.write(tmp_path / "out", found, outcomes)
    probs = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]])
    assert results["all"] == evaluate(probs, found.labels, 0.5, found.unknown)
    kept = torch.tensor([0, 2, 3])
    expected = evaluate(probs[kept], found.labels[kept], 0.5, found.unknown[kept])
    assert results["answered"] == expected
    assert results["counts"] == {
        "answered": 3,
        "wrong": 1,
        "failed": 0,
        "not asked": 0,
        "tokens": 40,
    }
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [*"abcd"]
    assert contributions(tmp_path / "out").shape[1] == 4
    again = harness.ask_all(found, ask, cache, frames=2)
    assert [each[:3] for each in again] == [each[:3] for each in outcomes]
    assert len(server.seen) == 4  # nobody was asked twice
    next(iter((tmp_path / "cache").glob("*.json"))).write_text('{"ans')  # damaged
    harness.ask_all(found, ask, cache, frames=2)
    assert len(server.seen) == 5
    harness.ask_all(found, ask, harness.Cache(tmp_path / "cache", "another model"), frames=2)
    assert len(server.seen) == 9
    assert not any(KEY in path.read_text() for path in tmp_path.rglob("*.json*"))


def test_questions_without_an_answer_are_left_out(clips):
    def ask(messages):
        text = messages[0]["content"][0]["text"]
        if "I am a" in text:
            raise RuntimeError("out of memory")
        if "I am c" in text:
            raise endpoint.SpentError("spent")
        return '["sad"]'

    found = prompt.read_clips(clips)
    outcomes = harness.ask_all(found, ask)
    assert [each.status for each in outcomes] == ["failed", "answered", "not asked", "answered"]
    assert "out of memory" in outcomes[0].text
    results = harness.score(found, outcomes)
    assert results["all"] == results["answered"]
    assert results["all"]["P"] == 1.0  # b is sad, d not known


def test_many_failures_in_a_row_stop_the_run(clips):
    found = prompt.read_clips(clips)
    found = found._replace(clips=[found.clips[0]] * 9)

    def ask(messages):
        raise RuntimeError("broken")

    with pytest.raises(UsageError, match="5 questions in a row failed: RuntimeError: broken"):
        harness.ask_all(found, ask)


def test_command_line(server, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SOME_KEY", KEY)
    output = tmp_path / "out"
    command = [str(clips), "--url", server.url, "--model", "m", "--output", str(output)]
    harness.main([*command, "--key", "SOME_KEY", "--max_requests", "3", "--jobs", "1"])
    printed = capsys.readouterr()
    assert "3 answered, 0 wrong, 0 failed, 1 not asked, 30 tokens" in printed.out
    assert KEY not in printed.out + printed.err
    harness.main([*command, "--key", "SOME_KEY"])  # goes on
    assert len(server.seen) == 4
    assert json.loads((output / "results.json").read_text())["counts"]["answered"] == 4
    with np.load(output / "predictions.npz") as file:
        assert file["ids"].tolist() == [*"abcd"]
    for wrong, message in (
        (["--key", "NO_SUCH_KEY"], "no variable NO_SUCH_KEY"),
        (["--function", "json:loads"], "or --function"),
        (["--tries", "0"], "`tries` at least 1"),
        (["--options", "[]"], "options"),
        (["--jobs", "0"], "--jobs 1"),
    ):
        with ends_in_one_line(capsys, message):
            harness.main([*command, *wrong])
    for name in ("json", "json:nothing", "no_such_module:f", "json:__doc__"):
        with ends_in_one_line(capsys, "--function"):
            harness.main([str(clips), "--function", name, "--output", str(output)])
