"""Texts to vectors with the graph of an export, without torch: as somebody who serves it would do it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.models.config import NO_PROMPTS
from stages.models.folder import TOKENIZER
from stages.models.onnx import INPUTS, OUTPUTS
from stages.models.speed import Speed, measure
from storage.roles import Role

RunGraph = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
"""(B, L) token ids and mask -> (B, dim) vectors."""

MOST_TEXTS = 32
"""Texts of a batch: on one core more at once are not faster."""

STEP = 8
"""Texts are padded to a multiple of this many tokens. With 1, ONNX Runtime takes as long, within the noise
(`benchmarks/graphs.py`), but OpenVINO prepares each new shape: batches of 8 took 1.7 times as long
(by hand)."""


@dataclass(frozen=True)
class GraphVectors:
    """Vectors of n texts with counts of tokens, as `Encoded`."""

    vectors: NDArray[np.float32]
    truncated: int


class GraphEncoder:
    """An `EvaluatedModel` that runs a graph on one thread of a CPU.

    Texts of a batch have nearly the same number of tokens, so little is padded.

    Args:
        run: Runs the graph.
        folder: The export, which has the tokenizer.
        max_tokens: Tokens that are read of a text, special ones and the prompt included; None for all.
        truncation: Where a longer text is cut: left or right.
        padding: Id of the token that pads a batch.
        megabytes: Size of the graph's files.
        parameters: Number of weights of the model.
        prompts: Role -> what the model reads before texts of that role.
    """

    in_windows = False
    copied_parameters = 0

    def __init__(
        self,
        run: RunGraph,
        folder: Path,
        *,
        max_tokens: int | None,
        truncation: str,
        padding: int,
        megabytes: float,
        parameters: int,
        prompts: Mapping[Role, str] = NO_PROMPTS,
    ) -> None:
        from tokenizers import Tokenizer

        self.run = run
        self.tokenizer: Any = Tokenizer.from_file(str(folder / TOKENIZER))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        if max_tokens is not None:
            self.tokenizer.enable_truncation(max_tokens, direction=truncation)
        self.prompts, self.parameters, self.megabytes = prompts, parameters, megabytes
        self.max_tokens, self.padding = max_tokens or sys.maxsize, padding

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Returns (n, dim) vectors of n >= 1 texts of the role `text`."""
        return self.encode_counted(texts, role="text").vectors

    def speed(self, texts: Sequence[str]) -> Speed:
        """Measure the speed of encoding texts of the corpus."""
        import torch

        return measure(self.encode, texts, torch.device("cpu"))

    def encode_counted(self, texts: Sequence[str], *, role: Role) -> GraphVectors:
        """Returns vectors of n >= 1 texts of one role, with the number of those that were cut."""
        prompt = self.prompts.get(role, "")
        read = self.tokenizer.encode_batch_fast([prompt + text for text in texts])
        of_length: dict[int, list[int]] = {}
        for place, encoding in enumerate(read):
            # A graph reads one token at least, if only one that is hidden.
            length = max(math.ceil(len(encoding.ids) / STEP) * STEP, STEP)
            of_length.setdefault(min(length, self.max_tokens), []).append(place)
        rows: dict[int, NDArray[np.float32]] = {}
        for length, places in of_length.items():
            for first in range(0, len(places), MOST_TEXTS):
                batch = places[first : first + MOST_TEXTS]
                vectors = self.run(*self._padded([read[place].ids for place in batch], length))
                rows.update(zip(batch, vectors, strict=True))
        cut = sum(bool(encoding.overflowing) for encoding in read)
        return GraphVectors(np.stack([rows[place] for place in range(len(texts))]), cut)

    def _padded(
        self, texts: Sequence[Sequence[int]], length: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns (B, length) token ids and mask."""
        ids = np.full((len(texts), length), self.padding, np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask


def openvino_runner(path: Path) -> RunGraph:
    """Returns what runs a model of OpenVINO on one thread of the CPU."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        outputs = request.infer(dict(zip(INPUTS, (ids, mask), strict=True)))
        vectors: NDArray[np.float32] = outputs[OUTPUTS[1]].copy()  # the next one is written over it
        return vectors

    return run


def onnx_runner(path: Path) -> RunGraph:
    """Returns what runs an ONNX graph on one thread of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        [vectors] = session.run([OUTPUTS[1]], dict(zip(INPUTS, (ids, mask), strict=True)))
        outputs: NDArray[np.float32] = vectors
        return outputs

    return run
