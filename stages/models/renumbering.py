"""Give the tokens that are kept new ids, in the order of the old ones.

In tokenizer.json, in the table of word embeddings, and in the configuration.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stages.models.pieces import KINDS, WHOLE, Content, check_kind
from stages.models.token_counts import AnyTokenizer
from storage.errors import TeachonceError, shown


class Pieces:
    """The tokens of a tokenizer.json.

    Args:
        content: What `tokenizers.Tokenizer.to_str` writes.
        address: The setting, to name in an error.

    Raises:
        TeachonceError: a tokenizer of this kind cannot be cut.
    """

    def __init__(self, content: Content, *, address: str) -> None:
        self.content, self.address = content, address
        check_kind(str(content["model"]["type"]), address=address)
        self.kind = KINDS[content["model"]["type"]](content["model"])
        self.added = {token["content"]: int(token["id"]) for token in content["added_tokens"]}
        if problem := self.kind.problem(self.added):
            raise TeachonceError(address, f"the tokenizer cannot be cut: {problem}", WHOLE)
        self.ids = {**self.kind.ids, **self.added}
        self.names = {number: piece for piece, number in self.ids.items()}

    def needed(self) -> set[int]:
        """The ids of the tokens that any cut keeps: those that spell any text, added and special ones."""
        padding = self.content.get("padding") or {}
        return {
            *(self.ids[piece] for piece in self.kind.spelling()),
            *([self.ids[unknown]] if (unknown := self.kind.unknown) in self.ids else []),
            *self.added.values(),
            *_special_ids(self.content["post_processor"], self.address),
            *([padding["pad_id"]] if padding else []),
        } & set(self.names)

    def choose(
        self, counts: NDArray[np.int64], needed: Collection[int], *, most: int, share: float
    ) -> list[int]:
        """Returns the ids to keep, ascending: those needed, then the most frequent ones.

        A token is skipped if it does not fit together with those that it is merged from.

        Args:
            counts: (V,) how often each id is in the corpus.
            needed: Ids to keep in any case.
            most: How many to keep.
            share: Of all occurrences; no more tokens are kept once they are covered. 0 to 1.
        """
        kept = set(needed)
        wanted = share * int(counts.sum())
        covered = int(counts[sorted(kept)].sum())
        for number in np.argsort(-counts, kind="stable").tolist():
            if len(kept) >= most or covered >= wanted:
                break
            if number in kept or number not in self.names:
                continue
            together = {number, *self._way(number, is_used=bool(counts[number]))} - kept
            if len(kept) + len(together) <= most:
                kept |= together
                covered += int(counts[sorted(together)].sum())
        return sorted(kept)

    def _way(self, number: int, *, is_used: bool) -> list[int]:
        way = self.kind.way(self.names[number])
        if way is None and is_used:
            raise TeachonceError(
                self.address,
                "the tokenizer cannot be cut: its merges do not make the token "
                f"{shown(self.names[number])}, which the corpus has",
                WHOLE,
            )
        return [self.ids[piece] for piece in way or ()]

    def cut(self, kept: Sequence[int]) -> Content:
        """Returns a tokenizer.json with the ids `kept` alone, ascending and all of `needed` among them.

        They are numbered anew in the same order.
        """
        places = {number: place for place, number in enumerate(kept)}
        padding = self.content.get("padding")
        return {
            **self.content,
            "model": self.kind.cut(places),
            "added_tokens": [
                {**token, "id": places[token["id"]]} for token in self.content["added_tokens"]
            ],
            "post_processor": _renumbered(self.content["post_processor"], places),
            "padding": padding and {**padding, "pad_id": places.get(padding["pad_id"], 0)},
        }


def _special_ids(processor: Content | None, address: str) -> set[int]:
    """The ids that a post-processor puts around a text.

    Raises:
        TeachonceError: one of an unknown kind.
    """
    if processor is None or processor["type"] == "ByteLevel":
        return set()
    if processor["type"] == "Sequence":
        return set().union(*(_special_ids(part, address) for part in processor["processors"]))
    if processor["type"] == "TemplateProcessing":
        return {number for token in processor["special_tokens"].values() for number in token["ids"]}
    if processor["type"] in {"BertProcessing", "RobertaProcessing"}:
        return {processor[name][1] for name in ("sep", "cls")}
    raise TeachonceError(
        address,
        f"the tokenizer cannot be cut: it has a post-processor {shown(processor['type'])}",
        WHOLE,
    )


def _renumbered(processor: Content | None, places: Mapping[int, int]) -> Content | None:
    """A post-processor with the new ids of the special tokens that it puts around a text."""
    if processor is None or processor["type"] == "ByteLevel":
        return processor
    if processor["type"] == "Sequence":
        return {
            **processor,
            "processors": [_renumbered(part, places) for part in processor["processors"]],
        }
    if processor["type"] == "TemplateProcessing":
        tokens = {
            name: {**token, "ids": [places[number] for number in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
        return {**processor, "special_tokens": tokens}
    around = {name: [processor[name][0], places[processor[name][1]]] for name in ("sep", "cls")}
    return {**processor, **around}


def cut_tokenizer(tokenizer: AnyTokenizer, pieces: Pieces, kept: Sequence[int]) -> None:
    """Cut a fast tokenizer of transformers to some ids, in place.

    Raises:
        ValueError: its tokens have other ids afterwards than they should.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(pieces.cut(kept)))
    places = {pieces.names[number]: place for place, number in enumerate(kept)}
    if backend.get_vocab(with_added_tokens=True) != places:
        raise ValueError("its tokens have other ids than they should")
    tokenizer._tokenizer = backend


def cut_body(body: Any, kept: Sequence[int]) -> None:  # noqa: ANN401 - a model of transformers
    """Cut the word embeddings of a transformer to some ids, and move ids in its configuration."""
    table: nn.Embedding = body.get_input_embeddings()
    padding, size = table.padding_idx, table.num_embeddings
    # Added tokens may have ids behind the table, as padding that was never trained.
    rows = [number for number in kept if number < size]
    with torch.no_grad():
        table.weight[: len(rows)] = table.weight[rows].clone()
    body.resize_token_embeddings(len(rows), mean_resizing=False)
    places = {number: place for place, number in enumerate(kept)}
    body.get_input_embeddings().padding_idx = None if padding is None else places.get(padding)
    for config in {
        id(part): part for part in (body.config, body.config.get_text_config())
    }.values():
        for name, value in _id_settings(config):
            moved = [places[number] for number in _as_list(value) if number in places]
            setattr(config, name, moved if isinstance(value, list) else next(iter(moved), None))


def ids_in(config: Any) -> set[int]:  # noqa: ANN401 - a configuration of transformers
    """The ids of tokens that a configuration names, such as `pad_token_id`."""
    parts = (config, config.get_text_config())
    return {
        number for part in parts for _, value in _id_settings(part) for number in _as_list(value)
    }


def _id_settings(config: Any) -> list[tuple[str, int | list[int]]]:  # noqa: ANN401
    return [
        (name, value)
        for name, value in vars(config).items()
        if name.endswith("_token_id") and value is not None
    ]


def _as_list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]
