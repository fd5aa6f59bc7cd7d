"""An endpoint that speaks the chat-completions protocol: how often it is tried, how long it has, what it may cost."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from uncertainty_mm.examples.language_models.prompt import Messages
from uncertainty_mm.lightning import UsageError

TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # worth another try
HOPELESS = (401, 403, 404)  # for every other question too
LONGEST_WAIT = 60.0  # seconds
LARGEST = 2**24  # bytes of a reply


class Reply(NamedTuple):
    """An answer, and the tokens of question and answer where they are known."""

    text: str
    tokens: int | None


class FailedError(Exception):
    """This question has no answer, whatever was tried."""


class SpentError(Exception):
    """The budget allows no further request."""


class Budget:
    """Bounds requests, each try being one, and tokens; safe between threads.

    Tokens are known only afterwards, so no request is made when those under way and one more, each as large as the
    largest so far, could exceed the bound; only the very first answers can.

    Args:
        requests: At most so many requests; None is no bound.
        tokens: At most so many tokens of questions and answers; None is no bound.
    """

    def __init__(self, requests: int | None = None, tokens: int | None = None) -> None:
        self.requests, self.tokens = requests, tokens
        self.made = self.used = 0
        self._largest = self._under_way = 0
        self._lock = threading.Lock()

    def take(self) -> None:
        """Counts a request that is about to be made; raises SpentError where the budget forbids it."""
        with self._lock:
            if self.requests is not None and self.made >= self.requests:
                raise SpentError(f"the bound of {self.requests} requests is reached")
            expected = self.used + self._largest * (self._under_way + 1)
            if self.tokens is not None and (expected > self.tokens or self.used >= self.tokens):
                raise SpentError(f"{self.used} of {self.tokens} tokens are used")
            self.made += 1
            self._under_way += 1

    def settle(self, tokens: int = 0) -> None:
        """Counts the tokens of a request that has come to its end."""
        with self._lock:
            self._under_way -= 1
            self.used += tokens
            self._largest = max(self._largest, tokens)


class _NoRedirect(HTTPRedirectHandler):
    """Follows no redirection, which would hand the key to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Endpoint:
    """Asks a language model over HTTP.

    What may pass by itself (a limit of rates, an overload, a time-out, a broken reply) is tried again, after the time
    that the server names, or a doubling, random one. The key is sent in a header, only over https or to this machine,
    and is in no message, whatever a server echoes.

    Args:
        url: Where `chat/completions` is, such as `https://api.openai.com/v1`.
        model: Name of the model.
        key: Sent as a bearer token; None sends none.
        options: Further fields of the request, such as `temperature`.
        timeout: Seconds that one request may take.
        tries: Requests for one question, at most.
        wait: Seconds before the second try; each further one waits twice as long.
        budget: What all questions together may cost.

    Raises:
        ValueError: If the address is none, would send the key in the clear, or holds a password; or if a number is out
            of range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        options: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        tries: int = 5,
        wait: float = 1.0,
        budget: Budget | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ValueError("Expected `url` to begin with http:// or https://, with no user in it")
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if key is not None and parts.scheme == "http" and not local:
            raise ValueError(f"Expected `url` to be https where a key is sent, but got {url}")
        if key is not None and (not key.isascii() or not key.isprintable() or " " in key):
            raise ValueError("Expected `key` to be printable ASCII without spaces")  # not which
        if timeout <= 0 or tries < 1 or wait < 0:
            raise ValueError(
                "Expected `timeout` above 0, `tries` at least 1 and `wait` at least 0, "
                f"but got {timeout}, {tries}, {wait}"
            )
        self.url, self.model = url.rstrip("/") + "/chat/completions", model
        self.options = dict(options or {})
        self.timeout, self.tries, self.wait = timeout, tries, wait
        self.budget = budget or Budget()
        self._key = key
        self._opener = build_opener(_NoRedirect)

    @property
    def identity(self) -> dict[str, Any]:
        """What an answer depends on besides the question."""
        return {"url": self.url, "model": self.model, "options": self.options}

    def __call__(self, messages: Messages) -> Reply:
        """The answer to a question.

        Raises:
            FailedError: If there is none to this question.
            SpentError: If the budget is spent.
            UsageError: If there will be none to any other question either.
        """
        body = json.dumps({"model": self.model, "messages": messages, **self.options}).encode()
        for attempt in range(self.tries):
            self.budget.take()
            tokens = 0
            try:
                reply = self._request(body)
                tokens = reply.tokens or 0
                break
            except HTTPError as error:
                problem = self._public(f"HTTP status {error.code}: {_beginning(error)}")
                if error.code in HOPELESS or 300 <= error.code < 400:
                    raise UsageError(f"{self.url}: {problem}") from None
                if error.code not in TRANSIENT:
                    raise FailedError(problem) from None
                pause = _asked_pause(error.headers.get("Retry-After"))
            except (
                OSError,
                HTTPException,
                ValueError,
                RecursionError,
            ) as error:  # time-outs, garbage
                problem, pause = self._public(f"{type(error).__name__}: {error}"), None
            finally:
                self.budget.settle(tokens)
            if attempt == self.tries - 1:
                raise FailedError(f"{problem}, after {self.tries} tries")
            if pause is None:
                pause = self.wait * 2**attempt * random.uniform(0.5, 1)
            time.sleep(min(pause, LONGEST_WAIT))
        if reply.tokens is None and self.budget.tokens is not None:
            raise UsageError(
                f"{self.url}: does not say how many tokens it used: bound the requests"
            )
        return reply

    def _request(self, body: bytes) -> Reply:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        deadline, text = time.monotonic() + self.timeout, b""
        request = Request(self.url, body, headers)
        with self._opener.open(request, timeout=self.timeout) as response:
            while chunk := response.read1(2**16):
                text += chunk
                if time.monotonic() > deadline:  # though every piece came in time
                    raise TimeoutError("timed out")
                if len(text) > LARGEST:
                    raise ValueError("an endless reply")
        reply = json.loads(text)
        try:
            answer = reply["choices"][0]["message"]["content"]
            tokens = (reply.get("usage") or {}).get("total_tokens")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError("a reply without an answer") from None
        if not isinstance(answer, str) or not (tokens is None or isinstance(tokens, int)):
            raise ValueError("a reply without an answer")
        return Reply(answer, tokens)

    def _public(self, text: str) -> str:
        """A message in one line, without the key."""
        line = " ".join(text.split())
        return line if self._key is None else line.replace(self._key, "***")


def _beginning(error: HTTPError) -> str:
    """How the body of an error begins; nothing where it does not come."""
    try:
        with error:
            return error.read(500).decode(errors="replace")
    except (OSError, HTTPException):
        return ""


def _asked_pause(header: str | None) -> float | None:
    """Seconds of a header Retry-After, which holds seconds or a date; None where it holds neither."""
    try:
        return max(0.0, float(header or ""))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(header or "")
        return max(0.0, (until - datetime.now(timezone.utc)).total_seconds())
    except (TypeError, ValueError):  # a date without a zone is one
        return None
