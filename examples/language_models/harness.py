"""How well does a multimodal language model recognise emotions? It is asked, sample by sample, and scored.

    python examples/language_models CLIPS --url https://api.openai.com/v1 --model NAME
    python examples/language_models CLIPS --url http://localhost:8000/v1 --model NAME        # a server of your own
    python examples/language_models CLIPS --function package.module:name                     # a function of your own

`prompt.py` says how the folder CLIPS looks, what is asked, and what counts as an answer. An answer in another form
predicts no label and is counted; it is not guessed at. A question without any answer (after several tries, or beyond
the budget) is left out of the measures, and counted too. Answers are kept in a cache, so that a run that was stopped,
or hit its bound, goes on where it was, and costs nothing twice.

It writes `results.json`, `answers.jsonl`, and `predictions.npz` in the layout of a run of `lddu_full.py`. A key is sent
only where `--key` names the environment variable that holds it, and is written nowhere.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from uncertainty_mm._files import replacing
from uncertainty_mm.examples.language_models.endpoint import (
    Budget,
    Endpoint,
    FailedError,
    Reply,
    SpentError,
)
from uncertainty_mm.examples.language_models.prompt import (
    Clips,
    Messages,
    parse,
    question,
    read_clips,
)
from uncertainty_mm.lightning import UsageError
from uncertainty_mm.lightning.cli import Parser, one_line_errors, print_table, write_text
from uncertainty_mm.metrics.functional import evaluate

Ask = Callable[[Messages], "Reply | str"]
IN_A_ROW = 5  # questions without an answer, after which nothing is wrong with the questions


class Outcome(NamedTuple):
    """What became of a question."""

    status: Literal["answered", "wrong", "failed", "not asked"]
    said: list[str]  # labels; none unless answered
    text: str = ""  # the answer, or why there is none
    tokens: int | None = None  # known and paid now, not from the cache


class Cache:
    """Answers on disk, one file a question, by a hash of the question and of who was asked."""

    def __init__(self, folder: Path, identity: Any) -> None:
        self.folder, self.identity = folder, identity

    def _path(self, messages: Messages) -> Path:
        text = json.dumps([self.identity, messages], sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

    def get(self, messages: Messages) -> str | None:
        """The answer, if it is there and whole."""
        try:
            answer = json.loads(self._path(messages).read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return answer if isinstance(answer, str) else None

    def put(self, messages: Messages, answer: str) -> None:
        """Keeps an answer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._path(messages), json.dumps({"answer": answer}) + "\n")


def ask_all(
    clips: Clips, ask: Ask, cache: Cache | None = None, *, frames: int = 8, jobs: int = 1
) -> list[Outcome]:
    """Asks for every clip what the cache does not know, `jobs` at a time.

    Args:
        clips: The samples.
        ask: An :class:`~uncertainty_mm.examples.language_models.endpoint.Endpoint`, or a function of messages that
            returns a string. What a function raises is a question without an answer.
        cache: Where answers are kept.
        frames: At most so many frames of a clip are sent.
        jobs: Questions under way at a time.

    Returns:
        An outcome for each clip, in order.

    Raises:
        UsageError: If the endpoint refuses all questions, or several in a row have no answer.
    """
    outcomes = [Outcome("not asked", [])] * len(clips.clips)
    failures = 0

    def answer(index: int) -> Outcome:
        messages = question(clips.clips[index], clips.label_names, frames)
        text, tokens = cache.get(messages) if cache else None, None
        if text is None:
            try:
                reply = ask(messages)
            except (UsageError, SpentError):
                raise
            except FailedError as error:
                return Outcome("failed", [], str(error))
            except Exception as error:  # of a function
                return Outcome("failed", [], f"{type(error).__name__}: {error}")
            text, tokens = (reply, None) if isinstance(reply, str) else reply
            if cache:
                cache.put(messages, text)
        said = parse(text, clips.label_names)
        status: Literal["answered", "wrong"] = "wrong" if said is None else "answered"
        return Outcome(status, said or [], text, tokens)

    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(outcomes), unit="clip") as bar:
        futures = {pool.submit(answer, index): index for index in range(len(outcomes))}
        try:
            for future in as_completed(futures):
                try:
                    outcome = future.result()
                except SpentError as error:  # those in the cache still have an answer
                    outcome = Outcome("not asked", [], str(error))
                outcomes[futures[future]] = outcome
                failures = failures + 1 if outcome.status == "failed" else 0
                if failures == IN_A_ROW:
                    raise UsageError(f"{IN_A_ROW} questions in a row failed: {outcome.text}")
                bar.set_postfix(counts(outcomes), refresh=False)
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return outcomes


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many questions ended how, and the tokens of those that were paid now."""
    statuses = ("answered", "wrong", "failed", "not asked")
    found = {status: sum(each.status == status for each in outcomes) for status in statuses}
    return found | {"tokens": sum(each.tokens or 0 for each in outcomes)}


def predictions(outcomes: Sequence[Outcome], label_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Probabilities (N, Q), 0 or 1, and whether there was any answer, (N,) bool; a wrong one says nothing."""
    probs = [[float(name in each.said) for name in label_names] for each in outcomes]
    there = [each.status in ("answered", "wrong") for each in outcomes]
    return torch.tensor(probs), torch.tensor(there)


def score(clips: Clips, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts, and the measures of :func:`~uncertainty_mm.metrics.functional.evaluate` by what they are over.

    `all` is over every answer, a wrong one predicting nothing; `answered` is over those in the right form alone.
    """
    probs, there = predictions(outcomes, clips.label_names)
    parsed = torch.tensor([each.status == "answered" for each in outcomes])
    rows = {
        name: evaluate(probs[kept], clips.labels[kept], 0.5, clips.unknown[kept])
        for name, kept in (("all", there), ("answered", parsed))
    }
    return {"counts": counts(outcomes), **rows}


def write(folder: Path, clips: Clips, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Writes all files of a run, and returns its :func:`score`."""
    results = score(clips, outcomes)
    lines = [
        json.dumps({"id": clip.id, **outcome._asdict()})
        for clip, outcome in zip(clips.clips, outcomes, strict=True)
    ]
    write_text(folder / "answers.jsonl", "\n".join(lines) + "\n")
    probs, there = predictions(outcomes, clips.label_names)
    with replacing(folder / "predictions.npz") as partial:
        np.savez(
            partial,
            probs=probs.numpy(),
            labels=clips.labels.long().numpy(),
            unknown=(clips.unknown | ~there.unsqueeze(1)).numpy(),
            threshold=np.array([0.5], dtype=np.float32),
            ids=np.array([clip.id for clip in clips.clips]),
        )
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def function_of(name: str) -> Ask:
    """The function `package.module:name`."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--function {name}: {error}") from error
    if not callable(found):
        raise UsageError(f"--function {name}: not a function")
    return found


def parser() -> Parser:
    """The options of the command line."""
    result = Parser(description="Asks a multimodal language model for emotions, and scores it.")
    add = result.add_argument
    add("clips", type=Path, help="folder with labels.csv, frames/ID/*.jpg and transcripts/ID.txt")
    add("--url", help="where chat/completions is, such as http://localhost:8000/v1")
    add("--model", help="name of the model there")
    add("--key", metavar="VARIABLE", help="of the environment, that holds the key to send there")
    fields = {"temperature": 0, "max_tokens": 100}
    add("--options", type=dict, default=fields, help="further fields of a request, JSON")
    add("--timeout", type=float, default=60.0, help="seconds of a request")
    add("--tries", type=int, default=5, help="requests for one question, at most")
    add("--max_requests", type=int, default=1000, help="each try being one")
    add("--max_tokens", type=int, help="of all questions and answers together")
    add("--jobs", type=int, default=4, help="questions under way at a time")
    add("--function", metavar="MODULE:NAME", help="instead of all these: your own, one at a time")
    add("--frames", type=int, default=8, help="of a clip, at most")
    add("--output", type=Path, default=Path("runs/language_models"))
    return result


def endpoint_of(args: Any) -> Endpoint:
    """The endpoint that the options describe."""
    if args.key and not os.environ.get(args.key):
        raise UsageError(f"--key: the environment has no variable {args.key}")
    try:
        return Endpoint(
            args.url,
            args.model,
            key=os.environ[args.key].strip() if args.key else None,
            options=args.options,
            timeout=args.timeout,
            tries=args.tries,
            budget=Budget(args.max_requests, args.max_tokens),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        args = parser().parse_args(arguments)
        if bool(args.function) == bool(args.url) or bool(args.url) != bool(args.model):
            raise UsageError("give --url and --model, or --function")
        if min(args.frames, args.max_requests, args.max_tokens or 0) < 0 or args.jobs < 1:
            raise UsageError("--frames, --max_requests and --max_tokens are at least 0, --jobs 1")
        clips = read_clips(args.clips)
        if args.function:
            ask, identity, jobs = function_of(args.function), {"function": args.function}, 1
        else:
            ask = endpoint_of(args)
            identity, jobs = ask.identity, args.jobs
        args.output.mkdir(parents=True, exist_ok=True)
        cache = Cache(args.output / "cache", identity)
        outcomes = ask_all(clips, ask, cache, frames=args.frames, jobs=jobs)
        results = write(args.output, clips, outcomes)
        print_table({name: results[name] for name in ("all", "answered")})
        print(", ".join(f"{count} {status}" for status, count in results["counts"].items()))
