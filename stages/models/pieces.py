"""Which tokens of a tokenizer.json a text needs, and how it is cut down to some of its tokens.

Three kinds are cut. Of each, the tokens that spell any text are kept, so that no text has more unknown
tokens than before; and a text whose tokens are all kept has exactly these tokens afterwards:

- WordPiece takes, from the left, the longest piece that fits. Where the longest of all is kept, it is the
  longest of the kept ones.
- BPE begins with characters (or bytes) and applies its merges, the first of the list first. Inside a token
  no merge reaches beyond it, so it comes about in one way, whatever stands beside it. It is kept with
  all the tokens on that way; the merges of other tokens are dropped, and the order of the rest stays.
- Unigram takes the pieces with the highest sum of scores. Fewer pieces leave fewer choices, and the best
  one is still there. An unknown character has the lowest score of all pieces less ten, so that piece stays.

Imports no torch: `check` asks this module, too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from storage.errors import TeachonceError, shown

Content = Mapping[str, Any]
"""The content of a tokenizer.json, or a part of it."""

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""The token of a byte, for characters that have none."""

WHOLE = "take `vocabulary` out: the start then has all tokens of its model"


class Kind:
    """A way in which tokens are found: the part `model` of a tokenizer.json."""

    def __init__(self, model: Content) -> None:
        self.model = model
        self.ids: Mapping[str, int] = model["vocab"]

    @property
    def unknown(self) -> str | None:
        """The token of what cannot be spelled; None if there is none."""
        unknown: str | None = self.model["unk_token"]
        return unknown

    def spelling(self) -> list[str]:
        """The tokens that spell any text: characters, which stand for bytes in many models, and bytes."""
        return [piece for piece in self.ids if len(piece) == 1 or BYTE.fullmatch(piece)]

    def problem(self, own: Collection[str]) -> str | None:
        """Why it cannot be cut, such as that a text could have more unknown tokens; None if it can.

        `own` are added tokens, which are found before the text is cut.
        """
        raise NotImplementedError

    def way(self, piece: str) -> list[str] | None:
        """The tokens without which a token of the vocabulary does not come about; None if it never does."""
        return []

    def cut(self, places: Mapping[int, int]) -> Content:
        """Returns the part `model` with some of its tokens; places: id of a kept token -> its new one."""
        kept = {piece: places[number] for piece, number in self.ids.items() if number in places}
        return {**self.model, "vocab": kept}


class WordPiece(Kind):
    """Words are cut from the left into the longest pieces; all but the first begin with `##`."""

    def __init__(self, model: Content) -> None:
        super().__init__(model)
        self.prefix: str = model["continuing_subword_prefix"]

    def spelling(self) -> list[str]:
        """The tokens that spell any text: single characters, at the beginning of a word and inside."""
        inside = len(self.prefix) + 1
        return [
            piece
            for piece in self.ids
            if len(piece) == 1 or (len(piece) == inside and piece.startswith(self.prefix))
        ]

    def problem(self, own: Collection[str]) -> str | None:  # noqa: D102 - as above
        for piece in self.ids:
            if piece in own:
                continue
            is_first = not piece.startswith(self.prefix)
            letters = piece if is_first else piece.removeprefix(self.prefix)
            for place, letter in enumerate(letters):
                single = letter if is_first and place == 0 else self.prefix + letter
                if single not in self.ids:
                    return f"the token {shown(piece)} cannot be spelled: there is no token {shown(single)}"
        return None


class Bpe(Kind):
    """Characters or bytes are merged in pairs, by the rank of the pair."""

    def __init__(self, model: Content) -> None:
        super().__init__(model)
        self.ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}

    def problem(self, own: Collection[str]) -> str | None:  # noqa: D102 - as above
        for name in ("continuing_subword_prefix", "end_of_word_suffix"):
            if self.model[name]:
                return f"its tokens differ by where they stand in a word ({name})"
        if any(BYTE.fullmatch(piece) for pair in self.ranks for piece in pair):
            return "it merges the tokens of bytes"
        if self.model.get("ignore_merges"):
            return _unspelled(self.ids, own)
        return None

    def way(self, piece: str) -> list[str] | None:
        """The tokens that merging makes before a token, in order; None if merging does not make it."""
        parts, merged = list(piece), []
        while len(parts) > 1:
            ranked = [
                (self.ranks[pair], place)
                for place, pair in enumerate(pairwise(parts))
                if pair in self.ranks
            ]
            if not ranked:
                # A word that is a token is taken whole.
                return [] if self.model.get("ignore_merges") else None
            _, place = min(ranked)
            parts[place : place + 2] = ["".join(parts[place : place + 2])]
            merged.append(parts[place])
        return merged[:-1]

    def cut(self, places: Mapping[int, int]) -> Content:
        """Returns the part `model` with some of its tokens, and the merges among them."""
        content = super().cut(places)
        kept = content["vocab"]
        merges = [
            [left, right]
            for left, right in self.model["merges"]
            if left in kept and right in kept and left + right in kept
        ]
        return {**content, "merges": merges}


class Unigram(Kind):
    """A text is cut into the pieces with the highest sum of scores."""

    def __init__(self, model: Content) -> None:
        self.model = model
        self.scores: Sequence[tuple[str, float]] = model["vocab"]
        self.ids = {piece: place for place, (piece, _) in enumerate(self.scores)}

    @property
    def unknown(self) -> str | None:  # noqa: D102 - as above
        place = self.model["unk_id"]
        return None if place is None else self.scores[place][0]

    def spelling(self) -> list[str]:
        """The tokens that spell any text: characters and bytes, and one of the lowest score."""
        lowest, _ = min(self.scores, key=lambda entry: entry[1])
        return [lowest, *super().spelling()]

    def problem(self, own: Collection[str]) -> str | None:  # noqa: D102 - as above
        if self.unknown is None:
            return "it has no token for what is unknown"
        has_bytes = sum(bool(BYTE.fullmatch(piece)) for piece in self.ids) == 256
        if has_bytes and self.model.get("byte_fallback"):
            return None
        return _unspelled(self.ids, {*own, self.unknown})

    def cut(self, places: Mapping[int, int]) -> Content:
        """Returns the part `model` with some of its tokens; their scores stay."""
        kept = [entry for place, entry in enumerate(self.scores) if place in places]
        return {**self.model, "vocab": kept, "unk_id": places[self.model["unk_id"]]}


KINDS: dict[str, type[Kind]] = {"WordPiece": WordPiece, "BPE": Bpe, "Unigram": Unigram}


def _unspelled(pieces: Iterable[str], own: Collection[str]) -> str | None:
    vocabulary = set(pieces)
    for piece in pieces:
        for letter in () if piece in own or BYTE.fullmatch(piece) else piece:
            if letter not in vocabulary:
                return (
                    f"the token {shown(piece)} cannot be spelled: there is no token {shown(letter)}"
                )
    return None


def check_kind(kind: str, *, address: str) -> None:
    """Raise for a kind of tokenizer, by its tokenizer.json, that cannot be cut."""
    if kind not in KINDS:
        raise TeachonceError(
            address,
            f"the tokens of a tokenizer of the kind {', '.join(KINDS)} can be cut, not of {shown(kind)}",
            WHOLE,
        )


def no_transformer(kind: str, *, address: str) -> TeachonceError:
    """Returns the error for a model that is not one transformer, but begins with another kind of module."""
    return TeachonceError(
        address,
        f"the tokens of a model with one transformer can be cut, not those of {shown(kind)}",
        WHOLE,
    )


def check_number(wanted: int, total: int, *, address: str) -> None:
    """Raise if as many tokens are to be kept as there are, or more."""
    if wanted >= total:
        raise TeachonceError(
            address,
            f"{wanted}, but the tokenizer has {total} tokens, so there is nothing to cut",
            f"set it to less than {total}, or {WHOLE}",
        )
