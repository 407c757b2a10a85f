"""Cut a model down to the tokens that a corpus uses, and prove that it still reads texts as it did.

The tokenizer is edited as the JSON that it is saved as (`stages.models.pieces`), the table of word
embeddings is cut to the same rows, and ids in the configuration move along. Nothing of this is known to be
right for next year's models. So texts whose tokens are all kept must have the same tokens and the same
vectors as before, and no text may have more unknown tokens: in memory, and after it was saved and loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.models.abilities import first_position
from stages.models.layers import distance, token_vectors
from stages.models.likeness import PROBES
from stages.models.loading import load_model
from stages.models.pieces import WHOLE, check_number, no_transformer
from stages.models.renumbering import Pieces, cut_body, cut_tokenizer, ids_in
from stages.models.token_counts import AnyTokenizer, token_counts
from stages.outcome import Facts
from stages.params import VocabularyShare
from stages.vectors import evenly
from storage.corpus import Corpus
from storage.errors import TeachonceError, shown

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SAMPLE = 1000
"""Texts of the corpus that are tokenised before and after."""

COMPARED = 32
"""Those of them whose vectors are compared."""

TOLERANCE = 1e-5
"""Largest difference between token vectors, relative to their largest value; rounding gives about 1e-6."""


@dataclass(frozen=True)
class CutVocabulary:
    """What was kept of a tokenizer, and what must still hold when the model was saved and loaded."""

    kept: int  # number of its tokens
    before: int  # how many there were before
    share: float  # of the corpus' tokens that are among them; 0 to 1
    texts: Sequence[str]  # all texts that are looked at
    unknown: str | None  # the token of what is unknown; None if there is none
    unknowns: Sequence[int]  # how many of it each text had
    tokens: Mapping[str, Sequence[str]]  # text whose tokens are all kept -> these tokens
    address: str  # the setting, to name in an error

    @property
    def summary(self) -> str:
        """How much was kept, for a person."""
        share = f"{100 * self.share:.1f} % of the corpus' tokens"
        return f"{self.kept:,} of {self.before:,} tokens ({share})"

    @property
    def facts(self) -> Facts:
        """The same for a program."""
        return {"tokens": self.kept, "tokens_before": self.before, "corpus_tokens_kept": self.share}

    @property
    def compared(self) -> list[str]:
        """The texts whose vectors are compared."""
        return list(self.tokens)[: COMPARED + len(PROBES)]

    def check(
        self, model: SentenceTransformer, vectors: Sequence[Tensor], *, when: str = ""
    ) -> None:
        """Raise if a model with the smaller vocabulary does not read the texts as it must.

        `vectors` is what it must give for the tokens of each text in `compared`; `when` is for an error.
        """
        plain = _plain(model.tokenizer)
        if plain.get_vocab_size() != self.kept:
            self._refuse(
                f"{when}its tokenizer has {plain.get_vocab_size()} tokens, not {self.kept}"
            )
        first: Any = model[0]
        table = first.auto_model.get_input_embeddings() if _has_body(model) else first.embedding
        rows = table.num_embeddings
        if rows > self.kept:
            self._refuse(f"{when}its table of word embeddings has {rows} rows")
        now = dict(zip(self.texts, plain.encode_batch(list(self.texts)), strict=True))
        # By its id: the name that Unigram gives such a token is what it stands for.
        unknown = None if self.unknown is None else plain.token_to_id(self.unknown)
        for text, before in zip(self.texts, self.unknowns, strict=True):
            if now[text].ids.count(unknown) > before:
                self._refuse(f"{when}it knows less of the text {shown(text[:80])}")
        for text, tokens in self.tokens.items():
            if now[text].tokens != list(tokens):
                self._refuse(f"{when}other tokens of the text {shown(text[:80])}")
        apart = max(map(distance, vectors, _vectors(model, self.compared)))
        if not apart <= TOLERANCE:
            self._refuse(f"{when}its vectors of tokens are off by {100 * apart:.2g} %")

    def check_saved(
        self, folder: Path, model: SentenceTransformer, *, trust_remote_code: bool
    ) -> None:
        """As `check`, for the folder in which `model` was saved.

        Since the cut it may have lost layers, too, or be static.
        """
        try:
            saved = load_model(
                folder, device=torch.device("cpu"), trust_remote_code=trust_remote_code
            )
        except TeachonceError as error:
            self._refuse(f"it was saved, and then {error.problem}")
        vectors = _vectors(model, self.compared)
        self.check(saved, vectors, when="saved and loaded again, ")

    def _refuse(self, problem: str) -> NoReturn:
        raise _refusal(problem, self.address)


def keep_tokens(
    model: SentenceTransformer, wanted: int | VocabularyShare, *, corpus: Corpus, address: str
) -> CutVocabulary:
    """As `cut_vocabulary`, with the counts and the sample of a corpus."""
    _check_model(model, address)
    counts = token_counts(model.tokenizer, corpus)
    sample = corpus.take(evenly(np.arange(corpus.rows), min(SAMPLE, corpus.rows)))
    return cut_vocabulary(model, counts, wanted=wanted, sample=sample, address=address)


def cut_vocabulary(
    model: SentenceTransformer,
    counts: NDArray[np.int64],
    *,
    wanted: int | VocabularyShare,
    sample: Sequence[str],
    address: str,
) -> CutVocabulary:
    """Cut a transformer and its tokenizer down to the tokens that a corpus uses most, in place.

    Args:
        model: The model, on the CPU, with one transformer and a fast tokenizer.
        counts: (V,) what `token_counts` says of its tokenizer.
        wanted: How many tokens to keep, or the share of the corpus' tokens that they are to cover.
        sample: Texts of the corpus, to try the model on.
        address: The setting to name in an error.

    Returns:
        What was kept, and what must still hold when the model was saved and loaded.

    Raises:
        TeachonceError: the tokenizer cannot be cut, there is nothing to cut, more tokens are needed than
            are wanted, or the model does not read as before without the others.
    """
    _check_model(model, address)
    tokenizer: Any = model.tokenizer
    body: Any = model[0].auto_model
    pieces = Pieces(json.loads(tokenizer.backend_tokenizer.to_str()), address=address)
    needed = pieces.needed() | (ids_in(body.config) & set(pieces.names))
    # Their positions are counted from the id of padding, so that one must stay.
    needed |= set(range(first_position(body.config.to_dict()))) & set(pieces.names)
    kept = _chosen(pieces, counts, needed, wanted=wanted, address=address)
    texts = list(dict.fromkeys([*PROBES, *sample]))
    cut = _promised(tokenizer, pieces, texts, kept, counts=counts)
    try:
        vectors = token_vectors(model, cut.compared)
        cut_tokenizer(tokenizer, pieces, kept)
        cut_body(body, kept)
        cut.check(model, vectors)
    except TeachonceError:
        raise
    # Models are built and read by code of their makers, which raises whatever it likes.
    except Exception as error:
        raise _refusal(str(error) or type(error).__name__, address) from error
    return cut


def _check_model(model: SentenceTransformer, address: str) -> None:
    """Raise for a model without exactly one transformer, or with a tokenizer that is no JSON."""
    transformers = [module for module in model.modules() if hasattr(module, "auto_model")]
    if len(transformers) != 1 or not hasattr(model[0], "auto_model"):
        raise no_transformer(type(model[0]).__name__, address=address)
    if not getattr(model.tokenizer, "is_fast", False):
        raise TeachonceError(
            address,
            "the tokens of a tokenizer with a tokenizer.json can be cut, and "
            f"{shown(type(model.tokenizer).__name__)} has none",
            WHOLE,
        )


def _chosen(
    pieces: Pieces,
    counts: NDArray[np.int64],
    needed: set[int],
    *,
    wanted: int | VocabularyShare,
    address: str,
) -> list[int]:
    total = len(pieces.ids)
    if isinstance(wanted, int):
        check_number(wanted, total, address=address)
        if wanted < len(needed):
            raise TeachonceError(
                address,
                f"{wanted}, but {len(needed)} tokens are needed to spell any text",
                f"set it to {len(needed)} or more",
            )
        return pieces.choose(counts, needed, most=wanted, share=np.inf)
    kept = pieces.choose(counts, needed, most=total, share=wanted.keep)
    if len(kept) == total:
        raise TeachonceError(
            address,
            f"the corpus uses all {total} tokens, or they are needed to spell any text; there is nothing "
            "to cut",
            f"set keep to less than {wanted.keep:g}, or {WHOLE}",
        )
    return kept


def _promised(
    tokenizer: AnyTokenizer,
    pieces: Pieces,
    texts: Sequence[str],
    kept: Sequence[int],
    *,
    counts: NDArray[np.int64],
) -> CutVocabulary:
    """What must hold after the cut."""
    encodings = dict(zip(texts, _plain(tokenizer).encode_batch(list(texts)), strict=True))
    name = pieces.kind.unknown
    unknown = None if name is None else pieces.ids.get(name)
    kept_ids = set(kept)
    return CutVocabulary(
        kept=len(kept),
        before=len(pieces.ids),
        share=float(counts[list(kept)].sum() / max(counts.sum(), 1)),
        texts=texts,
        unknown=name,
        unknowns=[encodings[text].ids.count(unknown) for text in texts],
        tokens={
            text: encoding.tokens
            for text, encoding in encodings.items()
            if kept_ids >= {*encoding.ids}
        },
        address=pieces.address,
    )


def _has_body(model: SentenceTransformer) -> bool:
    """Whether a model begins with a transformer; else it is a static one."""
    return hasattr(model[0], "auto_model")


def _vectors(model: SentenceTransformer, texts: Sequence[str]) -> list[Tensor]:
    """The token vectors of each text; of a static model, which has none of its own, the text's vector."""
    if _has_body(model):
        return token_vectors(model, texts)
    return [model.encode([text], convert_to_tensor=True) for text in texts]


def _plain(tokenizer: AnyTokenizer) -> AnyTokenizer:
    """A copy of a tokenizer's core, or of a static model's tokenizer, that neither truncates nor pads."""
    from tokenizers import Tokenizer

    core: AnyTokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    plain = Tokenizer.from_str(core.to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain


def _refusal(problem: str, address: str) -> TeachonceError:
    return TeachonceError(
        address,
        f"without the other tokens the model does not read texts as it did: {shown(problem)}",
        WHOLE,
    )
