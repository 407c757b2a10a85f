"""Texts to vectors with any model that sentence-transformers can load: teacher, start or student.

Batches are cut from the texts of one call alone (sorted by length, a bounded number of tokens each),
so the same shard gives the same vectors whatever was encoded before it in the process.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stages.models.abilities import check_length
from stages.models.config import Role, decided_routes, room_for_texts
from stages.models.devices import AUTOCAST, Precision, autocast, batch_tokens_on, device_name
from stages.models.folder import weights_bytes
from stages.models.likeness import MIXED_PROBES, likeness, probes
from stages.models.loading import ends_in_normalize, limit_of_positions, load_model, models_by_role
from stages.models.packed import NOT_PACKED, Packed, Read
from stages.models.speed import Speed, measure
from stages.models.windows import Windows, windows_of
from stages.outcome import log
from stages.vectors import unit
from storage.errors import TeachonceError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


NO_LIMIT = sys.maxsize


LEAST_LENGTH = 1e-5
"""Of a vector that says how texts are to be read: float32 adds up values near 1 to within 1e-7 or so."""


@dataclass(frozen=True)
class Encoded:
    """What came of some texts.

    Args:
        vectors: (n, dim) float32, in the order of the texts, as the model's own pipeline returns them; the
            first values of those, if only so many were asked for.
        tokens: Tokens read, after cutting.
        truncated: Texts that were longer than the limit; they were cut, or read in windows.
        whole: (n, width) float32, all values; the same array as `vectors` if all were asked for.
    """

    vectors: NDArray[np.float32]
    tokens: int
    truncated: int
    whole: NDArray[np.float32]


class Encoder:
    """A loaded model that turns texts into vectors.

    A transformer reads texts without padding where that is proved right (see `packed`); other models
    read batches of similar length, padded to the longest.

    Args:
        folder: The model.
        device: Where it runs.
        precision: Of the matrix products; sums and what lies between layers stay float32.
        max_tokens: Of a text, or of a window; at most what the model can read. None: what it reads by
            itself.
        or_fewer: A model with fewer positions than `max_tokens` reads what it can, and is not refused.
        in_windows: A longer text is read in windows, and its vector is their mean; else it is cut.
        batch_tokens: Tokens in a batch, padding included; None for what suits the device. Speed only.
        prompt: Put before every text. The model's own prompts are not used: a person chose among them.
        dim: Return the first so many values of each vector, with its length made 1 again if the model
            ends in Normalize; None for all.
        pooling: Of a transformers folder, which has no modules.json.
        trust_remote_code: Whether code in the model's folder may run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        precision: Precision = "fp32",
        max_tokens: int | None = None,
        or_fewer: bool = False,
        in_windows: bool = False,
        batch_tokens: int | None = None,
        prompt: str = "",
        dim: int | None = None,
        pooling: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        whole = load_model(
            folder, device=device, trust_remote_code=trust_remote_code, pooling=pooling
        ).eval()
        self.torch_device, self.precision = device, precision
        self.batch_tokens = batch_tokens or batch_tokens_on(device)
        self.prompt, self.or_fewer = prompt, or_fewer
        self.device = device_name(device)
        self.parameters = sum(weight.numel() for weight in whole.parameters())
        self.megabytes = weights_bytes(folder, trust_remote_code=trust_remote_code) / 1e6
        self.by_role: dict[Role, Encoder] = {}
        models = models_by_role(whole, decided_routes(folder, address=str(folder)))
        for role, model in models.items():
            # A router has a model for each route; else one reads all texts.
            reader = self if role == "text" else copy(self)
            if role == "text" or model is not models["text"]:
                reader._take(model, folder, max_tokens, in_windows, dim)
                self.by_role[role] = reader

    def _take(
        self,
        model: SentenceTransformer,
        folder: Path,
        max_tokens: int | None,
        in_windows: bool,
        dim: int | None,
    ) -> None:
        """Read texts with `model`, which has no router."""
        self.model = model
        self.max_tokens = self._limit(max_tokens, folder)
        if self.max_tokens != NO_LIMIT:
            self.model.max_seq_length = self.max_tokens
        self.in_windows = in_windows and self.max_tokens != NO_LIMIT
        if self.in_windows and not getattr(self.model.tokenizer, "is_fast", False):
            raise TeachonceError(
                "embed.long_texts",
                f"windows, but the tokenizer of the model in {folder} does not say where a token stands",
                "set it to cut, or take a model with a tokenizer.json",
            )
        self.room = self._room()
        self.reader = self._reader()
        self.dim = self._dim(dim, folder)
        if self.precision != "fp32":
            self._cast_products(AUTOCAST[self.precision])

    def _room(self) -> int:
        """Tokens of a text, or of a window, that are read behind the prompt."""
        tokenizer = self.model.tokenizer
        if self.max_tokens == NO_LIMIT or not hasattr(tokenizer, "num_special_tokens_to_add"):
            return self.max_tokens
        prompt = tokenizer(self.prompt, add_special_tokens=False)["input_ids"]
        around = tokenizer.num_special_tokens_to_add() + len(prompt)
        return room_for_texts(self.max_tokens, around=around, has_prompt=bool(self.prompt))

    def _dim(self, wanted: int | None, folder: Path) -> int | None:
        """How many values of a vector are returned; None if it is left as it is."""
        if wanted is None:
            return None
        width = self._vectors(self.reader.read(["width"], ""), precision="fp32").shape[1]
        if wanted > width:
            raise TeachonceError(
                "embed.dim",
                f"{wanted}, but the vectors of the model in {folder} have {width} values",
                f"set it to {width} or less, or to null for all of them",
            )
        return wanted

    def _limit(self, wanted: int | None, folder: Path) -> int:
        own = self.model.max_seq_length
        if own == math.inf:  # a static model: a bag of words of any length
            return NO_LIMIT
        limit = limit_of_positions(self.model)
        if wanted is None:
            return own or limit or 512
        if limit is not None and self.or_fewer:
            return min(wanted, limit)
        check_length(wanted, limit, address="embed.max_tokens", who=f"the model in {folder}")
        return wanted

    def _reader(self) -> Packed | Padded:
        """The fastest way of reading that gives each probe text the vector it has when it is read alone.

        A batch is no judge: with padding on the left, say, a model may count its positions from there.

        Raises:
            TeachonceError: what a text's vector is depends on the texts that are read with it.
        """
        padded = Padded(self.model)
        if self.max_tokens == NO_LIMIT:
            return padded
        texts = [*MIXED_PROBES, *probes(self.max_tokens)]
        # A text of no token cannot be read alone. Its vector is what a batch makes of it.
        places = np.flatnonzero(padded.read(texts, self.prompt).lengths > 0)
        alone = np.concatenate([self._probed(padded, [texts[place]]) for place in places])
        # NaN is like nothing, and what is nearly 0 has rounding for a direction; `embed` refuses both.
        lengths = np.linalg.norm(alone, axis=1)
        judged = np.isfinite(lengths) & (lengths > LEAST_LENGTH)
        places, alone = places[judged], alone[judged]
        if not len(places):
            return padded
        try:
            likeness(alone, self._probed(Packed(self.model), texts)[places])
            return Packed(self.model)
        except NOT_PACKED as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            log.info("texts are padded for this model; without padding: %s", first_line)
        # The last text is as long as any, and a batch of all would be as large as all of them.
        mixed = np.arange(len(texts) - 1)
        with torch.inference_mode():
            batch = padded.read(texts, self.prompt).forward(mixed).float().cpu().numpy()
        try:
            likeness(alone[places < len(mixed)], batch[places[places < len(mixed)]])
            return padded
        except ValueError as error:
            log.info("only texts of one length are read together; in other batches: %s", error)
        equal_lengths = Padded(self.model, equal_lengths=True)
        try:
            likeness(alone, self._probed(equal_lengths, texts)[places])
        except ValueError as error:
            raise TeachonceError(
                self.device,
                f"the vectors of this model depend on the texts that are read together: {error}",
                "report this, with the model's name",
            ) from None
        return equal_lengths

    def _probed(self, reader: Packed | Padded, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._vectors(reader.read(texts, self.prompt), precision="fp32")

    def _cast_products(self, dtype: torch.dtype) -> None:
        """Keep the weights of matrix products as autocast would cast them, anew for every batch."""
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)

    def encode(self, texts: Sequence[str], *, role: Role = "text") -> NDArray[np.float32]:
        """(n, dim) float32 vectors of `texts`, in their order."""
        return self.encode_counted(texts, role=role).vectors

    def speed(self, texts: Sequence[str]) -> Speed:
        """How fast it encodes texts of a corpus."""
        return measure(self.encode, texts, self.torch_device)

    def encode_counted(self, texts: Sequence[str], *, role: Role = "text") -> Encoded:
        """Vectors of `texts` with counts of what was read."""
        encoder = self.by_role.get(role, self)
        return encoder.encode_read(encoder.read(texts))

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Vectors of a corpus' texts."""
        return self.encode_counted(texts)

    def as_teacher(self) -> Callable[[Sequence[str]], Encoded]:
        """What `embed` calls: this, in two steps; or in one, if the second needs the tokenizer, too."""
        return self if isinstance(self.reader, Packed) else self.encode_counted

    def read(self, texts: Sequence[str]) -> tuple[Windows | None, Read]:
        """The first step, all on the CPU: tokens."""
        windows = self._windows(texts)
        return windows, self.reader.read(texts if windows is None else windows.texts, self.prompt)

    def encode_read(self, windows_and_read: tuple[Windows | None, Read]) -> Encoded:
        """The second step, on the device: vectors, with counts of what was read."""
        windows, read = windows_and_read
        cut = np.minimum(read.lengths, self.max_tokens)
        whole = self._vectors(read, precision=self.precision)
        longer = int((read.lengths > cut).sum())
        if windows is not None:
            whole, longer = windows.means(whole), windows.longer
            # The mean of vectors of length 1 is shorter.
            whole = unit(whole) if longer and ends_in_normalize(self.model) else whole
        return Encoded(
            self._first_values(whole), tokens=int(cut.sum()), truncated=longer, whole=whole
        )

    def lengths(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """(n,) tokens of each of `texts` before cutting, with the prompt's; nothing is encoded."""
        return self.reader.read(texts, self.prompt).lengths

    def _windows(self, texts: Sequence[str]) -> Windows | None:
        return windows_of(texts, self.model.tokenizer, room=self.room) if self.in_windows else None

    def _first_values(self, whole: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, width) -> (n, dim) float32."""
        if self.dim is None:
            return whole
        first = whole[:, : self.dim]
        # Judged by the model, not by the lengths of its vectors: all of a cache are scaled alike.
        return unit(first) if ends_in_normalize(self.model) else np.ascontiguousarray(first)

    @torch.inference_mode()
    def _vectors(self, read: Read, *, precision: Precision) -> NDArray[np.float32]:
        """(n, dim) vectors of what was read, batch by batch, longest texts first.

        A batch that the device has no memory for is halved, and so is `batch_tokens` from then on; no
        text is left out.
        """
        cut = np.minimum(read.lengths, self.max_tokens)
        waiting = list(token_batches(cut, self.batch_tokens, equal_lengths=read.equal_lengths))
        vectors: NDArray[np.float32] | None = None
        while waiting:
            places = waiting.pop(0)
            try:
                with autocast(self.torch_device, precision):
                    batch = read.forward(places).float().cpu().numpy()
            except torch.OutOfMemoryError as error:
                self._take_less(len(places), int(cut[places[0]]), error)
                rest = np.concatenate([places, *waiting])
                again = token_batches(
                    cut[rest], self.batch_tokens, equal_lengths=read.equal_lengths
                )
                waiting = [rest[some] for some in again]
                continue
            if vectors is None:
                vectors = np.empty((len(cut), batch.shape[1]), np.float32)
            vectors[places] = batch
        if vectors is None:
            return np.empty((0, self.model.get_embedding_dimension() or 0), np.float32)
        return vectors

    def _take_less(self, texts: int, longest: int, error: torch.OutOfMemoryError) -> None:
        """Halve `batch_tokens` after a batch of so many texts did not fit."""
        if texts == 1:
            raise TeachonceError(
                str(self.torch_device),
                f"no memory for one text of {longest} tokens",
                "set embed.max_tokens lower, embed.precision: bf16, or use a larger device",
            ) from error
        self.batch_tokens = texts * longest // 2
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()
        log.info("no memory for %d texts: batches of %d tokens now", texts, self.batch_tokens)


class Padded:
    """Any model, as sentence-transformers runs it: a batch is padded to its longest text.

    Args:
        model: Of sentence-transformers.
        equal_lengths: Read only equally long texts together, so that nothing is padded.
    """

    def __init__(self, model: SentenceTransformer, *, equal_lengths: bool = False) -> None:
        self.model, self.equal_lengths = model, equal_lengths

    def read(self, texts: Sequence[str], prompt: str) -> Read:
        """Count the tokens; the model tokenises batch by batch."""

        def forward(places: NDArray[np.int64]) -> torch.Tensor:
            some = [texts[place] for place in places]
            features: dict[str, Any] = self.model.preprocess(some, prompt=prompt or None)
            features = {
                name: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
                for name, value in features.items()
            }
            vectors: torch.Tensor = self.model(features)["sentence_embedding"]
            return vectors

        return Read(
            self._lengths([prompt + text for text in texts]),
            forward,
            equal_lengths=self.equal_lengths,
        )

    def _lengths(self, texts: list[str]) -> NDArray[np.int64]:
        if not texts:
            return np.empty(0, np.int64)
        tokenizer = self.model.tokenizer
        if not callable(tokenizer):  # word-level and static models count words
            return np.array([len(text.split()) + 2 for text in texts], np.int64)
        found = tokenizer(
            texts, truncation=False, padding=False, return_attention_mask=False, verbose=False
        )
        return np.array([len(ids) for ids in found["input_ids"]], np.int64)


def token_batches(
    lengths: NDArray[np.int64], batch_tokens: int, *, equal_lengths: bool = False
) -> Iterator[NDArray[np.int64]]:
    """Cut texts into batches of similar length.

    Args:
        lengths: (n,) tokens of each text.
        batch_tokens: A batch of m texts padded to its longest has at most this many tokens, unless it
            is one text.
        equal_lengths: The texts of a batch are of one length.

    Yields:
        Places in `lengths`; every place once, longest texts first, ties in order.
    """
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        longest = max(int(lengths[order[first]]), 1)
        count = max(1, batch_tokens // longest)
        if equal_lengths:
            count = int((lengths[order[first : first + count]] == lengths[order[first]]).sum())
        yield order[first : first + count]
        first += count
