"""A student's token ids of the whole corpus, computed once and shared through the store by all its runs."""

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
"""Endings of tokenizer files with `token` in their name; the tokenizer's class names its other files."""


def token_rows(
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer; its classes have no common type
    folder: Path,
    *,
    corpus: Corpus,
    store: Store,
    max_tokens: int,
) -> Tokens:
    """Returns the token ids of all texts, special tokens included; computes those that the store lacks.

    Args:
        tokenizer: The student's tokenizer.
        folder: The student's folder; the hashes of its tokenizer files are in the fingerprint.
        corpus: The texts.
        store: The store for the token ids.
        max_tokens: Truncation length; special tokens are kept.

    Raises:
        TeachonceError: the student has no transformers tokenizer.
    """
    if not callable(tokenizer):
        raise TeachonceError(
            folder,
            f"a student needs a transformers tokenizer, not {type(tokenizer).__name__}",
            "choose a transformer as the start",
        )
    # A slow tokenizer is not in tokenizer.json, but in files that its class names: vocab.txt and others.
    vocabulary_files = set(getattr(tokenizer, "vocab_files_names", {}).values())
    name = fingerprint(
        {
            "version": VERSION,
            "tokenizer": {
                path.name: sha256_of(path)
                for path in sorted(folder.iterdir())
                if path.name in vocabulary_files
                or (path.suffix in TOKENIZER_ENDINGS and "token" in path.name)
            },
            "max_tokens": max_tokens,
        }
    )
    # A copy, since a tokenizer stores its truncation length, and is saved with the student.
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
