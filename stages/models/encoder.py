"""Texts to vectors with any model that sentence-transformers can load: teacher, start or student.

Batches are cut from the texts of one call alone (sorted by length, a bounded number of tokens each),
so the same shard gives the same vectors whatever was encoded before it in the process.

This file is long because a reader for each kind of model (packed, padded, routed, in windows) is chosen and
proved right in one place.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stages.models.abilities import NO_MIXES, check_length
from stages.models.config import NO_PROMPTS, decided_routes, room_for_texts
from stages.models.devices import AUTOCAST, Precision, autocast, batch_tokens_on, device_name
from stages.models.factors import folded_in
from stages.models.folder import weights_bytes
from stages.models.likeness import MIXED_PROBES, PROBES, likeness, probes
from stages.models.loading import ends_in_normalize, limit_of_positions, load_model, models_by_role
from stages.models.mixing import read_mixed
from stages.models.packed import CANNOT_PACK, PackedReader, TokenizedTexts
from stages.models.shared_layers import copied
from stages.models.speed import Speed, measure
from stages.models.windows import Windows, windows_of
from stages.outcome import log
from stages.vectors import unit
from storage.errors import TeachonceError, first_line
from storage.mixes import MixedTexts
from storage.roles import ROLES, Role

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


NO_LIMIT = sys.maxsize

LEAST_LENGTH = 1e-5
"""Shortest vector of a probe text that can be compared: float32 sums have errors of about 1e-7."""


@dataclass(frozen=True)
class Encoded:
    """Vectors of n texts with counts of tokens."""

    # (n, dim) float32, in the order of the texts, as the model's own pipeline returns them, cut to
    # `dim` values.
    vectors: NDArray[np.float32]
    tokens: int  # number of tokens read, after truncation
    truncated: int  # number of texts longer than the limit; they were truncated, or read in windows
    # (n, width) float32, uncut; the same array as `vectors` if `dim` is None.
    whole: NDArray[np.float32]


@dataclass(frozen=True)
class ReadTexts:
    """Tokenised texts of one role, or their windows (None if read whole), and the encoder of that role."""

    encoder: Encoder
    windows: Windows | None
    tokenized: TokenizedTexts


class Encoder:
    """A loaded model that turns texts into vectors.

    A transformer reads texts without padding if a test shows that this gives the same vectors (see
    `packed`); other models read batches of similar length, padded to the longest.

    Args:
        folder: Folder of the model.
        device: The device that runs the model.
        precision: Precision of matrix products; sums and activations between layers stay float32.
        max_tokens: Truncation length of a text or a window, special tokens included. None for the model's
            own.
        or_fewer: Whether a model with fewer positions than `max_tokens` uses these, instead of an error.
        in_windows: Whether a longer text is read in windows, whose mean is its vector, instead of
            truncated.
        batch_tokens: Tokens in a batch, padding included; None for a default by device. Changes speed only.
        prompts: Role -> text put before the texts of that role; none for a role that is not named. The
            model's own prompts are not used.
        dim: Number of first values of each vector to return, normalised again if the model ends in
            Normalize; None for all.
        pooling: Pooling of a transformers folder, which has no modules.json; None otherwise.
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
        prompts: Mapping[Role, str] = NO_PROMPTS,
        dim: int | None = None,
        pooling: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        loaded = load_model(
            folder, device=device, trust_remote_code=trust_remote_code, pooling=pooling
        ).eval()
        self.torch_device, self.precision = device, precision
        self.batch_tokens = batch_tokens or batch_tokens_on(device)
        self.or_fewer = or_fewer
        self.device = device_name(device)
        self.parameters = sum(weight.numel() for weight in loaded.parameters())
        self.copied_parameters = copied(loaded) + folded_in(loaded)
        self.megabytes = weights_bytes(folder, trust_remote_code=trust_remote_code) / 1e6
        self._mixing_is_proved = False
        # A router has a model for each route; else one reads all texts.
        models = models_by_role(loaded, decided_routes(folder, address=str(folder)))
        self.prompts: dict[Role, str] = {role: prompts.get(role, "") for role in ROLES}
        self.role: Role = "text"
        self.prompt = self.prompts["text"]
        self.by_role: dict[Role, Encoder] = {}
        alike: dict[tuple[int, str], Encoder] = {}
        for role, prompt in self.prompts.items():
            model = models.get(role, models["text"])
            if (id(model), prompt) not in alike:
                reader = copy(self) if alike else self
                reader.role, reader.prompt = role, prompt
                reader._use_model(model, folder, max_tokens, in_windows, dim)
                alike[id(model), prompt] = reader
            self.by_role[role] = alike[id(model), prompt]

    def _use_model(
        self,
        model: SentenceTransformer,
        folder: Path,
        max_tokens: int | None,
        in_windows: bool,
        dim: int | None,
    ) -> None:
        """Set `model`, which has no router, as the one that reads texts."""
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
        self.window_tokens = self._tokens_for_text()
        self.reader = self._reader()
        self.dim = self._dim(dim, folder)
        if self.precision != "fp32":
            self._cast_products(AUTOCAST[self.precision])

    def _tokens_for_text(self) -> int:
        """Returns the number of tokens of a text or a window that fit behind the prompt."""
        tokenizer = self.model.tokenizer
        if self.max_tokens == NO_LIMIT or not hasattr(tokenizer, "num_special_tokens_to_add"):
            return self.max_tokens
        prompt = tokenizer(self.prompt, add_special_tokens=False)["input_ids"]
        around = tokenizer.num_special_tokens_to_add() + len(prompt)
        prompted = self.role if self.prompt else None
        return room_for_texts(self.max_tokens, around=around, prompted=prompted)

    def _dim(self, wanted: int | None, folder: Path) -> int | None:
        """Returns the number of values to cut vectors to; None for no cut."""
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

    def _reader(self) -> PackedReader | PaddedReader:
        """Returns the fastest reader that gives each probe text the vector that it has when read alone.

        A padded batch is no reference: with padding on the left a model may count positions from there.

        Raises:
            TeachonceError: a text's vector depends on the other texts of its batch, even of equal length.
        """
        padded = PaddedReader(self.model)
        if self.max_tokens == NO_LIMIT:
            return padded
        texts = [*MIXED_PROBES, *probes(self.max_tokens)]
        # A text without tokens cannot be read alone, so it is not compared.
        places = np.flatnonzero(padded.read(texts, self.prompt).lengths > 0)
        alone = np.concatenate([self._probe_vectors(padded, [texts[place]]) for place in places])
        # NaN equals nothing, and the direction of a vector near 0 is rounding error; `embed` refuses both.
        lengths = np.linalg.norm(alone, axis=1)
        judged = np.isfinite(lengths) & (lengths > LEAST_LENGTH)
        places, alone = places[judged], alone[judged]
        if not len(places):
            return padded
        try:
            likeness(alone, self._probe_vectors(PackedReader(self.model), texts)[places])
            return PackedReader(self.model)
        except CANNOT_PACK as error:
            log.info("texts are padded for this model; without padding: %s", first_line(error))
        # Without the last text, which is the longest possible: a batch padded to it would be very large.
        mixed = np.arange(len(texts) - 1)
        with torch.inference_mode():
            batch = padded.read(texts, self.prompt).forward(mixed).float().cpu().numpy()
        try:
            likeness(alone[places < len(mixed)], batch[places[places < len(mixed)]])
            return padded
        except ValueError as error:
            log.info("only texts of one length are read together; in other batches: %s", error)
        equal_lengths = PaddedReader(self.model, equal_lengths=True)
        try:
            likeness(alone, self._probe_vectors(equal_lengths, texts)[places])
        except ValueError as error:
            raise TeachonceError(
                self.device,
                f"the vectors of this model depend on the texts that are read together: {error}",
                "report this, with the model's name",
            ) from None
        return equal_lengths

    def _probe_vectors(
        self, reader: PackedReader | PaddedReader, texts: Sequence[str]
    ) -> NDArray[np.float32]:
        return self._vectors(reader.read(texts, self.prompt), precision="fp32")

    def _cast_products(self, dtype: torch.dtype) -> None:
        """Cast the weights of matrix products once, which autocast would do for every batch."""
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)

    def encode(self, texts: Sequence[str], *, role: Role = "text") -> NDArray[np.float32]:
        """Returns (n, dim) float32 vectors of n texts, in their order."""
        return self.encode_counted(texts, role=role).vectors

    def speed(self, texts: Sequence[str]) -> Speed:
        """Measure the speed of encoding texts of the corpus."""
        return measure(self.encode, texts, self.torch_device)

    def encode_counted(self, texts: Sequence[str], role: Role = "text") -> Encoded:
        """Returns vectors of `texts` of one role with counts of tokens."""
        return self.encode_read(self.read(texts, role))

    def __call__(self, texts: Sequence[str], role: Role = "text") -> Encoded:
        """As `encode_counted`."""
        return self.encode_counted(texts, role)

    def as_teacher(self) -> Callable[[Sequence[str], Role], Encoded]:
        """Returns an `Encode` for `embed`: in two steps, or one if the second needs the tokenizer, too."""
        readers = {type(encoder.reader) for encoder in self.by_role.values()}
        return self if readers == {PackedReader} else OneStep(self)

    def encode_mixed(self, mixed: MixedTexts) -> Encoded:
        """Returns vectors of n mixes of two texts; none is counted as longer than the limit.

        Raises:
            TeachonceError: the model cannot read mixes.
        """
        if not self._mixing_is_proved:
            self._prove_mixing()
            self._mixing_is_proved = True
        read = read_mixed(self.model, mixed.first, mixed.second, mixed.ratio, self.prompt)
        whole = self._vectors(read, precision=self.precision)
        tokens = int(read.lengths.sum())
        return Encoded(self._first_values(whole), tokens=tokens, truncated=0, whole=whole)

    def read(self, texts: Sequence[str], role: Role = "text") -> ReadTexts:
        """First step, on the CPU: tokenise."""
        encoder = self.by_role[role]
        windows = encoder._windows(texts)
        pieces = texts if windows is None else windows.texts
        return ReadTexts(encoder, windows, encoder.reader.read(pieces, encoder.prompt))

    def encode_read(self, read: ReadTexts) -> Encoded:
        """Second step, on the device: returns vectors with counts of tokens."""
        return read.encoder._encode_tokenized(read.windows, read.tokenized)

    def _encode_tokenized(self, windows: Windows | None, read: TokenizedTexts) -> Encoded:
        cut = np.minimum(read.lengths, self.max_tokens)
        whole = self._vectors(read, precision=self.precision)
        longer = int((read.lengths > cut).sum())
        if windows is not None:
            whole, longer = windows.means(whole), windows.split_texts
            # The mean of vectors of length 1 is shorter.
            whole = unit(whole) if longer and ends_in_normalize(self.model) else whole
        return Encoded(
            self._first_values(whole), tokens=int(cut.sum()), truncated=longer, whole=whole
        )

    def _prove_mixing(self) -> None:
        """Check that a text mixed with nothing of an empty one has the vector that it has by itself.

        Raises:
            TeachonceError: it has another, or the model does not read embeddings.
        """
        texts = [*MIXED_PROBES, *PROBES]
        try:
            mixed = read_mixed(
                self.model, texts, [""] * len(texts), np.ones(len(texts), np.float32), self.prompt
            )
            own = self._probe_vectors(self.reader, texts)
            judged = np.linalg.norm(own, axis=1) > LEAST_LENGTH
            likeness(own[judged], self._vectors(mixed, precision="fp32")[judged])
        except CANNOT_PACK as error:
            raise TeachonceError(
                "embed.mixes", f"the teacher cannot read mixed texts: {first_line(error)}", NO_MIXES
            ) from error

    def _windows(self, texts: Sequence[str]) -> Windows | None:
        return (
            windows_of(texts, self.model.tokenizer, window_tokens=self.window_tokens)
            if self.in_windows
            else None
        )

    def _first_values(self, whole: NDArray[np.float32]) -> NDArray[np.float32]:
        """Cut (n, width) vectors to (n, dim) float32."""
        if self.dim is None:
            return whole
        first = whole[:, : self.dim]
        # By the model, not by the lengths of its vectors, so that all vectors of a cache are scaled alike.
        return unit(first) if ends_in_normalize(self.model) else np.ascontiguousarray(first)

    @torch.inference_mode()
    def _vectors(self, read: TokenizedTexts, *, precision: Precision) -> NDArray[np.float32]:
        """Returns (n, dim) vectors of tokenised texts, encoded in batches, longest texts first.

        If the device runs out of memory, the batch and `batch_tokens` are halved; no text is left out.
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
                self._halve_batches(len(places), int(cut[places[0]]), error)
                rest = np.concatenate([places, *waiting])
                smaller_batches = token_batches(
                    cut[rest], self.batch_tokens, equal_lengths=read.equal_lengths
                )
                waiting = [rest[batch_places] for batch_places in smaller_batches]
                continue
            if vectors is None:
                vectors = np.empty((len(cut), batch.shape[1]), np.float32)
            vectors[places] = batch
        if vectors is None:
            return np.empty((0, self.model.get_embedding_dimension() or 0), np.float32)
        return vectors

    def _halve_batches(self, texts: int, longest: int, error: torch.OutOfMemoryError) -> None:
        """Halve `batch_tokens` after a batch of `texts` texts did not fit into memory."""
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


@dataclass(frozen=True)
class OneStep:
    """An `Encode` that tokenises and encodes in one step."""

    encoder: Encoder

    def __call__(self, texts: Sequence[str], role: Role = "text") -> Encoded:
        """Returns vectors of texts of one role."""
        return self.encoder.encode_counted(texts, role)

    def encode_mixed(self, mixed: MixedTexts) -> Encoded:
        """Returns vectors of mixes."""
        return self.encoder.encode_mixed(mixed)


class PaddedReader:
    """Reads texts with any model, as sentence-transformers does: batches are padded to the longest text.

    Args:
        model: The sentence-transformers model.
        equal_lengths: Whether to batch only texts of equal length, so that nothing is padded.
    """

    def __init__(self, model: SentenceTransformer, *, equal_lengths: bool = False) -> None:
        self.model, self.equal_lengths = model, equal_lengths

    def read(self, texts: Sequence[str], prompt: str) -> TokenizedTexts:
        """Count the tokens; the model tokenises batch by batch."""

        def forward(places: NDArray[np.int64]) -> torch.Tensor:
            batch = [texts[place] for place in places]
            features: dict[str, Any] = self.model.preprocess(batch, prompt=prompt or None)
            features = {
                name: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
                for name, value in features.items()
            }
            vectors: torch.Tensor = self.model(features)["sentence_embedding"]
            return vectors

        return TokenizedTexts(
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
        tokenized = tokenizer(
            texts, truncation=False, padding=False, return_attention_mask=False, verbose=False
        )
        return np.array([len(ids) for ids in tokenized["input_ids"]], np.int64)


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
