"""The speed of a model, measured so that models measured at different times can be compared.

A busy machine also does less per second of CPU time, since caches and memory are shared and the clock may
fall. So a fixed workload takes turns with the model, a twentieth of a second each. The number of texts in
the time of one pass of that workload (`texts_per_reference`) does not change when the machine slows both.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from stages.models.devices import device_name
from stages.outcome import seconds_of
from storage.roles import Role

CPU_PIECES, CPU_ROUNDS = 16, 3
"""A piece of 256 short texts takes a 12-layer model of 384 dimensions a tenth of a second."""

GPU_ROUNDS = 16
"""A GPU takes all texts in one turn: it reads them in one batch."""

MOST_SECONDS = 20.0
"""After this many no further round begins: a model a hundred times as slow is read once or twice."""

TOKENS, WIDTH, HEADS, LENGTH, LAYERS = 256, 384, 12, 16, 4
"""Of the reference. Changed, it makes all `texts_per_reference` measured before incomparable."""


CALLS = 8
"""A longest call takes about so much of the time that is given for a rate."""


@dataclass(frozen=True)
class Speed:
    """The speed of a model."""

    # Texts per CPU second of one thread; on other devices per second of wall-clock time.
    texts_per_second: float
    # Texts in the time of one pass of `Reference`, measured in turns with it.
    texts_per_reference: float
    device: str  # name of the device; speeds on different devices are not comparable


class Reference:
    """The fixed workload: four layers of a transformer's arithmetic, float32, on 256 tokens.

    Its weights are drawn from a fixed seed and have the size of MiniLM's (28 MB): like a model's, they do
    not fit into a core's own cache.
    """

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * 0.05).to(device)

        self.states = drawn(TOKENS, WIDTH)
        self.layers = [
            (
                drawn(WIDTH, 3 * WIDTH),
                drawn(WIDTH, WIDTH),
                drawn(WIDTH, 4 * WIDTH),
                drawn(4 * WIDTH, WIDTH),
            )
            for _ in range(LAYERS)
        ]

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        """One pass.

        Returns:
            (256, 384).
        """
        states = self.states
        for inward, outward, up, down in self.layers:
            parts = (states @ inward).view(-1, LENGTH, 3, HEADS, WIDTH // HEADS)
            query, key, value = parts.permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
            states = F.layer_norm(states + seen.reshape(states.shape) @ outward, (WIDTH,))
            states = F.layer_norm(states + F.gelu(states @ up) @ down, (WIDTH,))
        return states


def measure(
    encode: Callable[[Sequence[str]], object], texts: Sequence[str], device: torch.device
) -> Speed:
    """Measure how fast `encode` encodes `texts` on a device.

    On a CPU torch and the tokenizers run in one thread, and the CPU time of the process is measured. Takes
    a few seconds for a model of MiniLM's size.

    Args:
        encode: Encodes texts, and waits for the device.
        texts: At least one text.
        device: The device that `encode` runs on.
    """
    with _one_thread():
        reference = Reference(device)
        encode(texts)
        reference()
        is_cpu = device.type == "cpu"
        rates = in_turns(
            encode,
            texts,
            reference,
            clock=time.process_time if is_cpu else lambda: _wall(device),
            pieces=CPU_PIECES if is_cpu else 1,
            rounds=CPU_ROUNDS if is_cpu else GPU_ROUNDS,
            most_seconds=MOST_SECONDS,
        )
        return Speed(*rates, device=device_name(device))


def reference_seconds(device: torch.device) -> float:
    """Returns the seconds that the reference takes of one `measure` on a CPU."""
    return (1 + CPU_PIECES * CPU_ROUNDS) * min(map(seconds_of, 3 * [Reference(device)]))


def in_turns(
    encode: Callable[[Sequence[str]], object],
    texts: Sequence[str],
    reference: Callable[[], object],
    *,
    clock: Callable[[], float],
    pieces: int,
    rounds: int,
    most_seconds: float,
) -> tuple[float, float]:
    """Returns texts per second, and texts per pass of the reference.

    Each piece of the texts takes its turn after a pass of the reference. Of its rounds the median counts,
    for the time and for the quotient of the two times; for all texts, the sum over the pieces.

    Args:
        encode: The function to measure.
        texts: Cut into pieces of like texts: every n-th.
        reference: The reference workload.
        clock: Seconds.
        pieces: Number of pieces that texts are cut into; at most one for each text.
        rounds: Number of times that each piece is encoded.
        most_seconds: Seconds of wall-clock time after which no further round begins.
    """
    parts = [texts[first::pieces] for first in range(min(pieces, len(texts)))]
    turns: list[list[tuple[float, float]]] = []
    started = clock()
    while len(turns) < rounds and (not turns or clock() - started < most_seconds):
        turns.append([_turn(encode, part, reference, clock) for part in parts])
    # A clock that did not move must not end an evaluation.
    seconds, references = np.maximum(turns, 1e-9).transpose(2, 0, 1)
    in_seconds = np.median(seconds, axis=0).sum()
    in_references = np.median(seconds / references, axis=0).sum()
    return len(texts) / float(in_seconds), len(texts) / float(in_references)


def _turn(
    encode: Callable[[Sequence[str]], object],
    texts: Sequence[str],
    reference: Callable[[], object],
    clock: Callable[[], float],
) -> tuple[float, float]:
    """Returns the seconds of `encode`, and of the reference just before it."""
    begin = clock()
    reference()
    middle = clock()
    encode(texts)
    return clock() - middle, middle - begin


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch and the tokenizers to the calling thread."""
    threads, rust = torch.get_num_threads(), os.environ.get("TOKENIZERS_PARALLELISM")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if rust is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = rust


def _wall(device: torch.device) -> float:
    """Wait for the device; returns the wall-clock time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def rate_of(
    load: Callable[[], Any], texts: Sequence[tuple[str, Role]], most: int, seconds: float
) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """How fast a model reads texts like a sample, as the wall clock sees it, and the vectors that it makes.

    Texts of a call are sorted by length and cut into batches, so small calls are slower: they grow to
    `most` texts, or to what time allows. What is read until then is the warm-up.

    Args:
        load: Returns an `Encoder`.
        texts: The sample, one text or more, each with its role, in random order.
        most: Texts of a call.
        seconds: To read; the last call may go beyond.

    Returns:
        Its limit, seconds to load it, texts and tokens per second, tokens of a text, share cut; (n, dim).
    """
    started = time.perf_counter()
    model = load()
    load_seconds, most = time.perf_counter() - started, min(most, len(texts))
    calls: list[Any] = []

    def encode(some: Sequence[tuple[str, Role]]) -> None:
        of_role: dict[Role, list[str]] = {}
        for text, role in some:
            of_role.setdefault(role, []).append(text)
        calls.extend(model.encode_counted(batch, role=role) for role, batch in of_role.items())

    size = min(4, most)  # a model may need seconds for each
    while seconds_of(partial(encode, texts[:size])) < seconds / CALLS and size < most:
        size = min(2 * size, most)
    calls.clear()
    read, started = 0, time.perf_counter()
    while read < len(texts) and time.perf_counter() - started < seconds:
        encode(texts[read : read + size])
        read = min(read + size, len(texts))
    taken, tokens = time.perf_counter() - started, sum(call.tokens for call in calls)
    at = {"device": model.device, "max_tokens": model.max_tokens, "load_seconds": load_seconds}
    at |= {"texts": read, "seconds": taken, "texts_per_second": read / taken}
    at |= {"tokens_per_second": tokens / taken, "tokens_per_text": tokens / read}
    at |= {"truncated": sum(call.truncated for call in calls) / read}
    return at, np.concatenate([call.vectors for call in calls])
