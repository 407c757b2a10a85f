"""One server that speaks OpenAI's /v1/embeddings: ask it for vectors, and bear what it does.

A request that failed for a reason that passes (no connection, 429, 5xx, an answer that was cut off) is sent
again, later and later; whatever a person must mend ends the run, with what to do. Each attempt waits for
its turn, so that the limits of the account are kept, and for its money.

The key stands in two headers and nowhere else. What a server says is shown to people without it.

This file is long because whatever a server may do is answered in one place.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import httpx2

from stages.outcome import log
from stages.params import ApiParams
from stages.teaching.api_answers import Reply, message_in, read_reply, retry_after
from stages.teaching.api_budget import Purse
from stages.teaching.api_pace import Pace
from stages.teaching.interface import StoppedTeacherError
from storage.errors import TeachonceError, shown

ATTEMPTS = 8
"""Of a request, with up to two minutes of waiting between them in all if the server names no time."""

BROKEN_ATTEMPTS = 3
"""Of a request that is answered with something else than vectors: each answer may have been paid for."""

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds, doubled with each failure; half of it is random, so that requests do not come in step."""

LONGEST_RETRY_AFTER = 900.0
"""Seconds. A server that asks for a longer pause has an empty quota, not too many requests a minute."""

VALUE_BYTES, MOST_VALUES = 32, 1 << 16
"""Of a number in JSON, and of a vector: a longer answer is no answer."""

PASSING = {408, 409, 425, 429}
"""Statuses below 500 after which the same request may succeed."""

OF_TEXTS = {400, 413, 422}
"""Statuses that may be due to the texts of a request: too many, too long, or of no use to the server."""

TOO_LARGE = (
    "too large",
    "too many",
    "too long",
    "maximum",
    "exceed",
    "at most",
    "limit",
    "longer than",
)
"""What servers say of such a request; needed only until the first one is answered."""


class RefusedRequestError(TeachonceError):
    """The server refuses a request for its texts; a smaller one may be answered."""


class Passing(Exception):
    """A failure after which the same request may succeed.

    Args:
        problem: What happened.
        after: Seconds that the server asks to wait; None if it names none.
        may_be_paid: Whether the server may have read the texts.
        is_broken: Whether it answered with something else than vectors.
    """

    def __init__(
        self,
        problem: str,
        *,
        after: float | None = None,
        may_be_paid: bool = False,
        is_broken: bool = False,
    ) -> None:
        super().__init__(problem)
        self.problem, self.after = problem, after
        self.may_be_paid, self.is_broken = may_be_paid, is_broken


class Server:
    """The server of one model. Safe to use from several threads.

    Args:
        model: Name of the model.
        params: The settings `embed.api`.
        purse: Pays for each request.
        environment: Has the key.
        clock: Seconds of a monotonic clock.
        sleep: Waits this many seconds; None to wait until `close` at the longest.
        now: Seconds since the epoch, which a Retry-After may name.
        draw: Random numbers from 0 to 1.

    Raises:
        TeachonceError: the variable that should hold the key does not, or the settings name no server.
    """

    def __init__(
        self,
        model: str,
        params: ApiParams,
        purse: Purse,
        *,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
        now: Callable[[], float] = time.time,
        draw: Callable[[], float] = random.random,
    ) -> None:
        if params.url is None:
            raise TeachonceError("embed.api.url", "null", "name the server of the model")
        self.model, self.params, self.purse = model, params, purse
        self.url = endpoint(params.url)
        self.where = self.url.partition("?")[0]
        self._key = key_in(environment, params.key_env)
        headers = {"Accept-Encoding": "gzip, deflate"}
        if self._key:
            # The second is what Azure's older addresses want.
            headers |= {"Authorization": f"Bearer {self._key}", "api-key": self._key}
        self._client = httpx2.Client(
            headers=headers,
            timeout=params.timeout,
            limits=httpx2.Limits(max_connections=params.concurrency),
        )
        self._closing = threading.Event()
        self._clock, self._now, self._draw = clock, now, draw
        self._sleep = sleep or self._closing.wait
        self._pace = Pace(params.requests_per_minute, params.tokens_per_minute, clock, self._sleep)
        self._in_base64 = True
        self._counts_characters: bool | None = None  # known by the first answer
        self.dim = params.dimensions
        self.answered = 0

    def ask(
        self, texts: Sequence[str], *, input_type: str | None, tokens: int, about: int
    ) -> Reply:
        """Returns the vectors of n texts, as often as it takes.

        Args:
            texts: One text or more.
            input_type: The field of that name; None for none.
            tokens: Of these texts, an estimate from above.
            about: The same, more likely; it counts where the server names no number.

        Raises:
            RefusedRequestError: the server refuses these texts, or so many of them.
            StoppedTeacherError: something must be mended, or the server does not answer any more.
            TeachonceError: this request fails again and again, while others are answered.
        """
        answered, broken = self.answered, 0
        for attempt in range(ATTEMPTS):
            with self.purse.reserved(tokens) as bill:
                try:
                    self._pace.wait(tokens)
                    self._check_open()
                    reply = self._counted(self._ask_once(texts, input_type), texts)
                except Passing as error:
                    failure = error
                    bill.paid = tokens if error.may_be_paid else 0
                else:
                    bill.paid = about if reply.tokens is None else reply.tokens
                    self._check_width(reply.vectors.shape[1])
                    self._pace.correct(bill.paid - tokens)
                    self.answered += 1
                    return reply
            broken += failure.is_broken
            if broken == BROKEN_ATTEMPTS or attempt == ATTEMPTS - 1:
                break
            log.info("embed: %s: %s; asking again", self.where, failure.problem)
            self._wait(attempt, failure.after)
        is_alone = self.answered > answered
        raise (TeachonceError if is_alone else StoppedTeacherError)(
            self.where,
            f"{failure.problem}, {attempt + 1} times in a row",
            "see what the server's own log or status page says, then run `teachonce embed` again: what was "
            "answered is kept",
        )

    def close(self) -> None:
        """Let no further request begin."""
        self._closing.set()

    def disconnect(self) -> None:
        """Close the connections, after all requests have ended."""
        self._client.close()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise StoppedTeacherError(self.where, "is not asked any more", "run the command again")

    def _wait(self, failures: int, after: float | None) -> None:
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2**failures)
        wait *= 0.5 + 0.5 * self._draw()
        if after is not None and after > LONGEST_RETRY_AFTER:
            raise StoppedTeacherError(
                self.where,
                f"asks to wait for {after:,.0f} s",
                "look at the limits of the account, and run `teachonce embed` again then: what was "
                "answered is kept",
            )
        if after is not None:
            self._pace.pause(after)
        self._sleep(wait if after is None else max(after, 0.1 * wait))
        self._check_open()

    def _ask_once(self, texts: Sequence[str], input_type: str | None) -> Reply:
        wanted: dict[str, Any] = {"model": self.model, "input": list(texts)}
        in_base64 = self._in_base64
        if in_base64:
            wanted["encoding_format"] = "base64"
        if self.params.dimensions is not None:
            wanted["dimensions"] = self.params.dimensions
        if input_type is not None:
            wanted["input_type"] = input_type
        status, headers, content = self._send(json.dumps(wanted).encode(), len(texts))
        if status != 200:
            if status in OF_TEXTS and in_base64 and b"encoding_format" in content:
                self._in_base64 = False  # what a server does not know, it need not do
                return self._ask_once(texts, input_type)
            raise self._refusal(status, headers, content, len(texts))
        try:
            vectors, tokens = read_reply(content, len(texts))
        except ValueError as error:
            problem = f"sent no answer to {len(texts)} texts: {self._harmless(str(error))}"
            raise Passing(problem, may_be_paid=True, is_broken=True) from None
        return Reply(vectors, tokens)

    def _send(self, body: bytes, texts: int) -> tuple[int, httpx2.Headers, bytes]:
        """Returns status, headers and content of an answer."""
        most, started = 100_000 + texts * MOST_VALUES * VALUE_BYTES, self._clock()
        slow = f"gave no whole answer within {self.params.timeout:g} s (embed.api.timeout)"
        headers = {"Content-Type": "application/json"}
        try:
            with self._client.stream("POST", self.url, content=body, headers=headers) as response:
                content = bytearray()
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) > most:
                        raise Passing("sends without end", may_be_paid=True, is_broken=True)
                    if self._clock() - started > self.params.timeout:
                        raise Passing(slow, may_be_paid=True)
                return response.status_code, response.headers, bytes(content)
        except (httpx2.ConnectTimeout, httpx2.PoolTimeout):
            problem = f"cannot be reached within {self.params.timeout:g} s (embed.api.timeout)"
            raise Passing(problem) from None
        except httpx2.TimeoutException:
            raise Passing(slow, may_be_paid=True) from None
        except httpx2.ConnectError as error:
            raise Passing(f"cannot be reached ({self._harmless(str(error))})") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            reason = self._harmless(str(error) or type(error).__name__)
            raise Passing(f"cut its answer off ({reason})", may_be_paid=True) from None

    def _counted(self, reply: Reply, texts: Sequence[str]) -> Reply:
        """Returns a reply without the count of a server that counts characters, as infinity does."""
        if self._counts_characters is None:
            characters = sum(map(len, texts))  # of the probe texts, which have half as many tokens
            self._counts_characters = 0.95 * characters < (reply.tokens or 0) <= characters
            if self._counts_characters:
                log.warning(
                    "embed: %s counts characters, not tokens: whether it cuts texts cannot be known",
                    self.where,
                )
        return Reply(reply.vectors, None) if self._counts_characters else reply

    def _check_width(self, dim: int) -> None:
        """Raise unless all vectors have as many values as the first ones, or as asked for."""
        if self.dim is None:
            self.dim = dim
        if dim == self.dim:
            return
        if dim != self.params.dimensions is not None:
            raise StoppedTeacherError(
                "embed.api.dimensions",
                f"{self.params.dimensions}, but {self.where} sends vectors of {dim} values",
                "set it to a width that the model has, or to null for its own",
            )
        raise StoppedTeacherError(
            self.where,
            f"sends vectors of {dim} values, after some of {self.dim}: behind it are several models",
            "name a server, or a version in embed.teacher, that has one; nothing of this answer is kept",
        )

    def _refusal(
        self, status: int, headers: httpx2.Headers, content: bytes, texts: int
    ) -> Exception:
        """Returns the exception for an answer with another status than 200."""
        answer = f"{status}: {self._harmless(message_in(content))}"
        if b"insufficient_quota" in content or status == 402:
            return StoppedTeacherError(
                self.where,
                f"has no credit left for this key ({answer})",
                "pay there, then " + AGAIN,
            )
        if status in PASSING or status >= 500:
            after = retry_after(headers, self._now())
            what = "asks to slow down" if status == 429 else "fails"
            return Passing(f"{what} ({answer})", after=after)
        if status in OF_TEXTS:
            is_large = any(word in answer.lower() for word in TOO_LARGE)
            if status == 413 or self.answered or is_large:
                return RefusedRequestError(
                    self.where,
                    f"refuses {'this text' if texts == 1 else f'these {texts} texts'} ({answer})",
                    TEXT_CURE,
                )
        variable = f"${self.params.key_env}" if self.params.key_env else None
        problem, cure = REFUSALS.get(status, ("refuses the request", REQUEST_CURE))
        if status in {401, 403} and variable is None:
            problem, cure = (
                "asks for a key",
                ("set embed.api.key_env to the name of an environment variable that holds one"),
            )
        elif 300 <= status < 400:
            to = self._harmless(headers.get("location", "?"))
            problem, cure = f"sends one elsewhere, to {to}", "write that address into embed.api.url"
        cure = cure.format(variable=variable, model=shown(self.model))
        return StoppedTeacherError(self.where, f"{problem} ({answer})", cure)

    def _harmless(self, text: str) -> str:
        """What a server said, on one line and without the key."""
        if self._key:
            for form in {self._key, quote(self._key, safe=""), json.dumps(self._key)[1:-1]}:
                text = text.replace(form, "***")
        return shown(text)


AGAIN = "run `teachonce embed` again: what was answered is kept"

TEXT_CURE = (
    "name the model's tokenizer in embed.api.tokenizer, which cuts longer texts at embed.max_tokens, or "
    "reject them by shard.max_chars"
)

REQUEST_CURE = "mend what it names: embed.teacher, embed.api.dimensions or embed.api.input_type"

REFUSALS = {
    401: ("refuses the key", "put a key of this server into {variable}"),
    403: (
        "does not let this key use the model",
        "take a key that may, in {variable}, or another model",
    ),
    404: (
        "knows no such model or address",
        "mend embed.api.url, which ends in /v1 for most servers, or the name {model} in embed.teacher",
    ),
    405: ("knows no such address", "mend embed.api.url, which ends in /v1 for most servers"),
}
"""Status -> what it means, and what a person can do."""


def endpoint(url: str) -> str:
    """Returns the address that requests go to: `url` with /embeddings, unless it ends so."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    path = path if path.endswith("/embeddings") else f"{path}/embeddings"
    return urlunsplit(parts._replace(path=path, fragment=""))


def key_in(environment: Mapping[str, str], name: str | None) -> str | None:
    """Returns the key in an environment variable; None if the server asks for none.

    Raises:
        TeachonceError: there is none, or what is there cannot be one; it is not told.
    """
    if name is None:
        return None
    key = environment.get(name, "").strip()
    if not key:
        raise TeachonceError(
            "embed.api.key_env", f"${name} is not set", f"export {name}=…, in this shell alone"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise TeachonceError(
            "embed.api.key_env",
            f"what is in ${name} is no key: it has blanks or other than plain characters",
            f"export {name}=… with the key alone",
        )
    return key
