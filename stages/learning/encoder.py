"""Texts to vectors with any model that sentence-transformers can load: teacher, start or student.

Batches are cut from the texts of one call alone (sorted by length, a bounded number of tokens each),
so the same shard gives the same vectors whatever was encoded before it in the process.
"""

from __future__ import annotations

import contextlib
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from stages.models import weights_bytes
from storage.errors import TeachonceError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Precision = Literal["fp32", "bf16", "fp16"]
Role = Literal["text", "query", "document"]

NO_LIMIT = sys.maxsize

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# A model's own prompts by role, in the order in which they are looked for.
ROLE_PROMPTS: dict[Role, tuple[str, ...]] = {
    "text": (),
    "query": ("query",),
    "document": ("document", "passage"),
}


@dataclass(frozen=True)
class Encoded:
    """What came of some texts.

    Args:
        vectors: (n, dim) float32, in the order of the texts, as the model's own pipeline returns them.
        tokens: Tokens read, after cutting.
        truncated: Texts that were longer than the limit.
    """

    vectors: NDArray[np.float32]
    tokens: int
    truncated: int


def pick_device(setting: str) -> torch.device:
    """The device a setting means; `auto` is the first of CUDA, MPS, CPU that is there."""
    if setting == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(setting)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise TeachonceError(
            "device", f"{setting} cannot be used: {first_line}", "set device: auto"
        ) from None
    return device


def pick_precision(setting: str, device: torch.device) -> str:
    """What a precision of training means; `auto` is bf16 where the device multiplies it faster."""
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def device_name(device: torch.device) -> str:
    """A name under which speeds may be compared, such as `AMD EPYC, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def load_model(
    folder: Path, *, device: torch.device, trust_remote_code: bool = False
) -> SentenceTransformer:
    """A sentence-transformers model in float32; a bare transformers folder gets mean pooling.

    The dtype is always given: transformers 5 would take the checkpoint's own.
    """
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    # A bar for 0.1 s of loading would stand between our own lines.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return SentenceTransformer(
            str(folder),
            device=str(device),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise TeachonceError(
            folder,
            f"sentence-transformers cannot load it: {first_line}",
            "check that `SentenceTransformer(folder)` works; a model with code of its own needs "
            "embed.trust_remote_code: true",
        ) from error


class Encoder:
    """A loaded model that turns texts into vectors.

    Args:
        folder: The model.
        device: Where it runs.
        precision: Of the matrix products; weights and sums stay float32.
        max_tokens: Longer texts are cut; at most what the model can read.
        batch_tokens: Tokens in a batch, padding included. Speed only.
        prompt: Put before every text that has no prompt of the model's own for its role.
        trust_remote_code: Whether code in the model's folder may run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        precision: Precision = "fp32",
        max_tokens: int | None = None,
        batch_tokens: int = 4096,
        prompt: str = "",
        trust_remote_code: bool = False,
    ) -> None:
        self.model = load_model(folder, device=device, trust_remote_code=trust_remote_code).eval()
        self.torch_device, self.precision = device, precision
        self.batch_tokens, self.prompt = batch_tokens, prompt
        self.device = device_name(device)
        self.parameters = sum(weight.numel() for weight in self.model.parameters())
        self.megabytes = weights_bytes(folder) / 1e6
        self.max_tokens = self._limit(max_tokens, folder)
        if self.max_tokens != NO_LIMIT:
            self.model.max_seq_length = self.max_tokens

    def _limit(self, wanted: int | None, folder: Path) -> int:
        own = self.model.max_seq_length
        if own == math.inf:  # a static model: a bag of words of any length
            return NO_LIMIT
        config = getattr(self.model[0], "config", None)
        positions = getattr(config, "max_position_embeddings", None)
        if wanted is not None and positions is not None and wanted > positions:
            raise TeachonceError(
                "embed.max_tokens",
                f"{wanted}, but the model in {folder} reads {positions} tokens at most",
                f"set it to {positions} or less",
            )
        return wanted or own or positions or 512

    def encode(self, texts: Sequence[str], *, role: Role = "text") -> NDArray[np.float32]:
        """(n, dim) float32 vectors of `texts`, in their order."""
        return self.encode_counted(texts, role=role).vectors

    def encode_counted(self, texts: Sequence[str], *, role: Role = "text") -> Encoded:
        """Vectors of `texts` with counts of what was read."""
        prompt = self._prompt(role)
        lengths = self._lengths([prompt + text for text in texts])
        cut = np.minimum(lengths, self.max_tokens)
        vectors: NDArray[np.float32] | None = None
        for places in token_batches(cut, self.batch_tokens):
            batch = self._forward([texts[place] for place in places], prompt)
            if vectors is None:
                vectors = np.empty((len(texts), batch.shape[1]), np.float32)
            vectors[places] = batch
        if vectors is None:
            vectors = np.empty((0, self.model.get_embedding_dimension() or 0), np.float32)
        return Encoded(vectors, tokens=int(cut.sum()), truncated=int((lengths > cut).sum()))

    def _prompt(self, role: Role) -> str:
        for name in ROLE_PROMPTS[role]:
            if self.model.prompts.get(name):
                return str(self.model.prompts[name])
        return self.prompt

    def _lengths(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """(n,) tokens of each text before cutting, special tokens included."""
        if not texts:
            return np.empty(0, np.int64)
        tokenizer = self.model.tokenizer
        if not callable(tokenizer):  # word-level and static models count words
            return np.array([len(text.split()) + 2 for text in texts], np.int64)
        found = tokenizer(
            list(texts), truncation=False, padding=False, return_attention_mask=False, verbose=False
        )
        return np.array([len(ids) for ids in found["input_ids"]], np.int64)

    @torch.inference_mode()
    def _forward(self, texts: list[str], prompt: str) -> NDArray[np.float32]:
        features: dict[str, Any] = self.model.preprocess(texts, prompt=prompt or None)
        features = {
            name: value.to(self.torch_device) if isinstance(value, torch.Tensor) else value
            for name, value in features.items()
        }
        with autocast(self.torch_device, self.precision):
            vectors = self.model(features)["sentence_embedding"]
        array: NDArray[np.float32] = vectors.float().cpu().numpy()
        return array


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which matrix products run at `precision`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[precision])


def token_batches(lengths: NDArray[np.int64], batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Cut texts into batches of similar length.

    Args:
        lengths: (n,) tokens of each text.
        batch_tokens: A batch of m texts padded to its longest has at most this many tokens, unless it
            is one text.

    Yields:
        Places in `lengths`; every place once, longest texts first, ties in order.
    """
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        longest = max(int(lengths[order[first]]), 1)
        count = max(1, batch_tokens // longest)
        yield order[first : first + count]
        first += count
