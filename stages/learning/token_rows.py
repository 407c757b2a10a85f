"""A student's token ids of the whole corpus: made once, kept in the store, shared by all its runs."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from stages.models.folder import sha256_of
from stages.outcome import Progress
from storage.column import text_keys_of
from storage.corpus import Corpus
from storage.errors import TeachonceError
from storage.manifest import fingerprint
from storage.store import Object, Store
from storage.tokens import Tokens, put_tokens

VERSION = 1

TOKENIZER_ENDINGS = {".json", ".txt", ".model", ".py", ".tiktoken"}
"""Of files with `token` in their name, of which a tokenizer is made; others are named by its class."""


def token_rows(
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer; its classes have no common type
    folder: Path,
    *,
    corpus: Corpus,
    store: Store,
    max_tokens: int,
) -> Tokens:
    """The token ids of all texts, special tokens included, cut at `max_tokens`.

    Args:
        tokenizer: Of the student.
        folder: Where it was loaded from; its files name the columns.
        corpus: The texts.
        store: Where the columns are kept.
        max_tokens: A longer text is cut, its special tokens kept.

    Raises:
        TeachonceError: the student has no tokenizer of transformers' kind.
    """
    if not callable(tokenizer):
        raise TeachonceError(
            folder,
            f"a student needs a transformers tokenizer, not {type(tokenizer).__name__}",
            "choose a transformer as the start",
        )
    # A slow tokenizer is not in tokenizer.json, but in files that its class names: vocab.txt and others.
    own = set(getattr(tokenizer, "vocab_files_names", {}).values())
    name = fingerprint(
        {
            "version": VERSION,
            "tokenizer": {
                path.name: sha256_of(path)
                for path in sorted(folder.iterdir())
                if path.name in own or (path.suffix in TOKENIZER_ENDINGS and "token" in path.name)
            },
            "max_tokens": max_tokens,
        }
    )
    # It remembers how it cut, and would be saved with the student: so only if ids are made, not if found.
    tokenizer = deepcopy(tokenizer)
    progress = Progress("tokens", total=corpus.rows, unit="texts")
    objects: list[Object] = []
    for shard in range(len(corpus.objects)):
        key = f"tokens/{name}/{corpus.shard_digest(shard)}.arrow"
        entry = store.find(key)
        if entry is None:
            texts = corpus.texts(shard)
            ids = tokenizer(
                texts,
                truncation=True,
                max_length=max_tokens,
                padding=False,
                return_attention_mask=False,
            )["input_ids"]
            entry = put_tokens(store, key, ids=ids, text_keys=text_keys_of(corpus.batch(shard)))
        objects.append(entry)
        progress.advance(entry.rows)
    return Tokens(store, objects, corpus)
