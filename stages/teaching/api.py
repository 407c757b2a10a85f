"""A teacher behind an API: an `Encode` that asks a server, keeps its answers, and pays within a budget.

The texts of a shard are cut into requests by the shard alone, so that a run that was killed asks what is
missing in the same requests. Each answer goes to the journal of the store at once. The requests of the next
shard begin while those of this one end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stages.outcome import log
from stages.teaching.api_server import AGAIN, TEXT_CURE, RefusedRequestError, Server
from stages.teaching.api_texts import PROBE_CHARACTERS, ReadyText, TextCounter
from stages.teaching.interface import PlainOutput, RefusedTextsError, StoppedTeacherError
from storage.corpus import text_key
from storage.errors import StorageError
from storage.journal import Journal
from storage.roles import Role

MARGIN = 2
"""A request is taken to have at most so many times the tokens for a byte that the worst one had."""


@dataclass(frozen=True)
class ReadAs:
    """How the texts of a role are asked for."""

    teacher: str  # the fingerprint under which their vectors are stored
    prompt: str  # stands before each
    input_type: str | None  # the field of that name; None for none


@dataclass
class Pending:
    """The texts of a shard while they are asked for."""

    ready: list[ReadyText]  # as they are sent
    keys: list[bytes]  # their text keys
    read_as: ReadAs  # how they are asked for
    journal: Journal | None  # keeps the answers; None to keep none
    # Whether a text of which the server may have read only a part is refused.
    is_judged: bool = True
    vectors: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # place -> (dim,) float32
    tokens: dict[int, int] = field(default_factory=dict)  # place -> number of tokens
    # Place -> why the server refuses the text.
    refused: dict[int, str] = field(default_factory=dict)
    asked: list[Future[None]] = field(default_factory=list)  # the requests under way

    def output(self) -> PlainOutput:
        """Returns the vectors of all texts."""
        vectors = (
            np.stack([self.vectors[place] for place in range(len(self.ready))])
            if self.ready
            else np.empty((0, 0), np.float32)
        )
        cut = sum(text.is_cut for text in self.ready)
        return PlainOutput(vectors, vectors, sum(self.tokens.values()), cut)


class ApiTeacher:
    """An `Encode`, and a model that can be evaluated.

    Args:
        server: Answers.
        counter: Counts and cuts the texts.
        roles: How the texts of each role are asked for.
        journal: Keeps the answers that are in no published shard yet; None to keep none.
    """

    # What a server does not say of its model; its speed is that of a line and of others who ask.
    parameters = megabytes = None
    copied_parameters = 0
    in_windows = False

    def __init__(
        self,
        server: Server,
        counter: TextCounter,
        roles: Mapping[Role, ReadAs],
        journal: Journal | None,
    ) -> None:
        self.server, self.counter, self.roles, self.journal = server, counter, roles, journal
        self.max_tokens, self.device = counter.max_tokens, server.where
        self._most_texts = server.params.batch_texts
        self._tokens_per_byte = 0.0
        self._stop: StoppedTeacherError | None = None
        self._pool = ThreadPoolExecutor(server.params.concurrency, thread_name_prefix="ask")

    def __call__(self, texts: Sequence[str], role: Role = "text") -> PlainOutput:
        """Ask anew for the probe texts, each cut to its beginning."""
        beginnings = [text[:PROBE_CHARACTERS] for text in texts]
        return self.encode_read(self._begin(beginnings, role, None, is_judged=False))

    def read(self, texts: Sequence[str], role: Role = "text") -> Pending:
        """First step: begin to ask for what the journal has not got."""
        return self._begin(texts, role, self.journal)

    def encode_read(self, pending: Pending) -> PlainOutput:
        """Second step: wait for the answers.

        Raises:
            RefusedTextsError: the server refuses some of the texts, or read only a part of them.
            StoppedTeacherError: the run must end.
            TeachonceError: requests failed.
        """
        try:
            done, _ = wait(pending.asked, return_when=FIRST_EXCEPTION)
            for error in (future.exception() for future in done):
                if error is not None:
                    raise self._stop or error
        finally:  # after an error, or Ctrl-C, what is not asked yet is not paid for
            for future in pending.asked:
                future.cancel()
        if pending.refused:
            raise RefusedTextsError(
                self.server.where, dict(sorted(pending.refused.items())), TEXT_CURE
            )
        return pending.output()

    def encode_counted(self, texts: Sequence[str], *, role: Role = "text") -> PlainOutput:
        """Returns vectors of n texts with counts of tokens; nothing is kept."""
        return self.encode_read(self._begin(texts, role, None))

    def encode(self, texts: Sequence[str], *, role: Role = "text") -> NDArray[np.float32]:
        """Returns (n, dim) float32 vectors of n texts, in their order."""
        return self.encode_counted(texts, role=role).vectors

    def speed(self, texts: Sequence[str]) -> None:
        """Not measured: it is not the model's alone."""

    def close(self) -> None:
        """Begin no further request, wait for those under way, and log what was paid."""
        self.server.close()
        self._pool.shutdown(cancel_futures=True)
        self.server.disconnect()
        log.info("%s: %s", self.server.where, self.server.purse.summary())

    def _begin(
        self, texts: Sequence[str], role: Role, journal: Journal | None, *, is_judged: bool = True
    ) -> Pending:
        read_as = self.roles[role]
        ready = self.counter.ready(texts, read_as.prompt, role)
        keys = [text_key(text, role) for text in texts]
        pending = Pending(ready, keys, read_as, journal, is_judged)
        if journal is not None:
            for place, key in enumerate(keys):
                if (answer := journal.find(read_as.teacher, key)) is not None:
                    self._take(pending, place, answer.vector, answer.tokens)
        for places in self._requests(ready):
            if missing := [place for place in places if place not in pending.tokens]:
                pending.asked.append(self._pool.submit(self._ask, pending, missing))
        return pending

    def _requests(self, ready: Sequence[ReadyText]) -> Iterator[list[int]]:
        """Yield the places of the texts of each request.

        Without a tokenizer a text that may be longer than the limit is asked for alone, so that the count
        of the server says whether it is.
        """
        together = []
        for place, text in enumerate(ready):
            if self._may_be_longer(text):
                yield [place]
            else:
                together.append(place)
        most = self.server.params.batch_texts
        for first in range(0, len(together), most):
            yield together[first : first + most]

    def _may_be_longer(self, text: ReadyText) -> bool:
        return self.counter.tokenizer is None and text.most_tokens > self.max_tokens

    def _ask(self, pending: Pending, places: Sequence[int]) -> None:
        """Ask for some texts, in halves if the server refuses all of them at once."""
        half = len(places) // 2
        try:
            if len(places) > self._most_texts:
                raise RefusedRequestError(self.server.where, "takes fewer texts", "none")
            self._ask_once(pending, places)
            return
        except RefusedRequestError as error:
            if len(places) == 1:
                pending.refused[places[0]] = error.problem
                return
        before = len(pending.refused)
        for part in (places[:half], places[half:]):
            self._ask(pending, part)
        if len(pending.refused) == before:  # it was for their number
            self._most_texts = min(self._most_texts, len(places) - half)

    def _ask_once(self, pending: Pending, places: Sequence[int]) -> None:
        ready = [pending.ready[place] for place in places]
        try:
            reply = self.server.ask(
                [text.sent for text in ready],
                input_type=pending.read_as.input_type,
                tokens=self._most_tokens(ready),
                about=sum(text.tokens for text in ready),
            )
            self._learn(ready, reply.tokens)
            tokens = self._tokens_of(ready, reply.tokens)
            vectors = reply.vectors
            usable = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
            kept = range(len(places)) if not pending.is_judged else np.flatnonzero(usable).tolist()
            if pending.journal is not None and kept:
                pending.journal.keep(
                    pending.read_as.teacher,
                    [pending.keys[places[row]] for row in kept],
                    vectors[kept],
                    [tokens[row] for row in kept],
                )
        except StorageError as error:
            # What cannot be kept would be paid for again.
            raise self._stopped_by(
                StoppedTeacherError(error.where, error.problem, error.cure)
            ) from error
        except StoppedTeacherError as error:
            raise self._stopped_by(error) from None
        for row in kept:
            self._take(pending, places[row], vectors[row], tokens[row])
        for row in sorted(set(range(len(places))) - set(kept)):
            if len(places) == 1:
                pending.refused[places[0]] = (
                    "the server's vector has NaN, null, infinity or only zeros"
                )
            else:  # it may be a matter of the texts beside it
                self._ask(pending, [places[row]])

    def _stopped_by(self, error: StoppedTeacherError) -> StoppedTeacherError:
        """Let no further request begin; returns the first error that ended the run."""
        self._stop = self._stop or error
        self.server.close()
        return self._stop

    def _take(self, pending: Pending, place: int, vector: NDArray[np.float32], tokens: int) -> None:
        """Take an answer; a text of which the server may have read only a part is refused."""
        pending.vectors[place], pending.tokens[place] = vector, tokens
        is_longer = self._may_be_longer(pending.ready[place]) and tokens >= self.max_tokens
        if is_longer and pending.is_judged:
            pending.refused[place] = (
                f"the server counts {tokens:,} tokens, and embed.max_tokens is {self.max_tokens:,}: "
                "it may have read only the beginning"
            )

    def _most_tokens(self, ready: Sequence[ReadyText]) -> int:
        """Returns how many tokens a request has at most, by what the server counted before."""
        most = sum(text.most_tokens for text in ready)
        if self.counter.tokenizer is not None or not self._tokens_per_byte:
            return most
        return min(most, 1 + int(MARGIN * self._tokens_per_byte * most))

    def _learn(self, ready: Sequence[ReadyText], counted: int | None) -> None:
        """Compare the server's count with ours.

        Raises:
            StoppedTeacherError: the server read fewer tokens than the texts have.
        """
        if counted is None:
            return
        most = sum(text.most_tokens for text in ready)
        if self.counter.tokenizer is None:
            self._tokens_per_byte = max(self._tokens_per_byte, counted / most)
            return
        least = sum(text.tokens - self.counter.special for text in ready)
        if counted < least:
            raise StoppedTeacherError(
                "embed.api.tokenizer",
                f"counts {most:,} tokens in {len(ready)} texts of which {self.server.where} read "
                f"{counted:,}: it reads less of a text than embed.max_tokens, or that is not its tokenizer",
                f"set embed.max_tokens to what the model reads, or name its own tokenizer; then {AGAIN}",
            )

    def _tokens_of(self, ready: Sequence[ReadyText], counted: int | None) -> list[int]:
        """Returns the tokens of each text: by the tokenizer, or its part of the server's count."""
        if self.counter.tokenizer is not None or counted is None:
            return [text.tokens for text in ready]
        sizes = np.cumsum([0, *(text.most_tokens for text in ready)])
        parts: list[int] = np.diff(np.rint(sizes * counted / sizes[-1]).astype(np.int64)).tolist()
        return parts
