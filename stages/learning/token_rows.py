"""A student's token ids of the whole corpus, computed once and shared through the store by all its runs.

Several ranks share the work. A tokenizer from a tokenizer.json uses all cores by itself, unless
`TOKENIZERS_PARALLELISM` says false; the command line says true where nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from stages.learning import ranks
from stages.learning.ahead import ahead
from stages.models.config import NO_PROMPTS, room_for_texts
from stages.models.folder import sha256_of
from stages.models.token_counts import AnyTokenizer
from stages.outcome import Progress
from storage.column import text_keys_of
from storage.corpus import Corpus
from storage.embeddings import prompts_of
from storage.errors import TeachonceError
from storage.manifest import fingerprint
from storage.roles import ROLES, Role
from storage.store import Object, Store, digest
from storage.tokens import Tokens, put_tokens

VERSION = 1

TEXTS_AT_ONCE = 4096
"""Texts that are read together: they fill 64 cores, and their ids are some MB as lists of numbers."""

THREADS = 2
"""Threads that read texts: while one waits for the tokenizer's own threads, the other makes lists."""

TOKENIZER_ENDINGS = {".json", ".txt", ".model", ".py", ".tiktoken"}
"""Endings of tokenizer files with `token` in their name; the tokenizer's class names its other files."""


def prompts_of_teacher(recipe: Mapping[str, Any]) -> dict[Role, str]:
    """Returns role -> what a student that reads its teacher's prompts reads before texts of that role.

    A role that the corpus lacks has the prompt of its texts, if it has texts. Empty if the teacher read no
    prompt at all.

    Args:
        recipe: The recipe of the embeddings manifest: the settings may have changed since.

    Raises:
        TeachonceError: the vectors were imported.
    """
    if recipe.get("model") == "unknown":
        raise TeachonceError(
            "recipes.*.prompts",
            "teacher, but the vectors were imported, and nothing says what stood before their texts",
            "set it to none",
        )
    by_role = prompts_of(recipe)
    prompts = {role: by_role.get(role, by_role.get("text", "")) for role in ROLES}
    return prompts if any(prompts.values()) else {}


def prompt_tokens(
    tokenizer: AnyTokenizer, prompts: Mapping[Role, str], *, max_tokens: int, address: str
) -> dict[Role, int]:
    """Returns role -> how many tokens its prompt has, the special ones before it included.

    As sentence-transformers counts them for a pooling that leaves the prompt out.

    Raises:
        TeachonceError: a prompt leaves too few tokens for a text.
    """
    counts: dict[Role, int] = {}
    for role, prompt in prompts.items():
        if not prompt:
            continue
        [ids] = token_ids(tokenizer, [prompt], max_tokens=None)
        room_for_texts(max_tokens, around=len(ids), prompted=role, address=address)
        ends = getattr(tokenizer, "all_special_ids", ())  # a static model reads none
        counts[role] = len(ids) - any(number in ends for number in ids[-1:])
    return counts


def token_ids(
    tokenizer: AnyTokenizer, texts: Sequence[str], *, max_tokens: int | None
) -> list[list[int]]:
    """Returns the ids of each text as the model reads it, truncated at `max_tokens`; None for all.

    A transformer's have special tokens, which are kept; a static model's have none.
    """
    if isinstance(tokenizer, Tokenizer):
        read = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids[:max_tokens] for encoding in read]
    how = {
        "truncation": max_tokens is not None,
        "max_length": max_tokens,
        "padding": False,
        "return_attention_mask": False,
    }
    if getattr(tokenizer, "is_fast", False) and texts:
        # One text sets its core up. The core alone takes two thirds of the time, on all threads, and the
        # rest of what the tokenizer does is on one.
        tokenizer(texts[0], **how)
        return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]
    ids: list[list[int]] = tokenizer(texts, **how)["input_ids"]
    return ids


def token_rows(
    tokenizer: AnyTokenizer,
    folder: Path,
    *,
    corpus: Corpus,
    store: Store,
    max_tokens: int,
    prompts: Mapping[Role, str] = NO_PROMPTS,
    address: str = "recipes.*.max_tokens",
) -> Tokens:
    """Returns the token ids of all texts, special tokens included; computes those that the store lacks.

    Args:
        tokenizer: The student's tokenizer; a static model's own kind, too.
        folder: The student's folder; the hashes of its tokenizer files are in the fingerprint.
        corpus: The texts.
        store: The store for the token ids.
        max_tokens: Truncation length; special tokens are kept.
        prompts: Role -> what stands before texts of that role.
        address: The setting that says `max_tokens`, to name in an error.

    Raises:
        TeachonceError: the student has no transformers tokenizer, or a prompt leaves no room for a text.
    """
    is_static = isinstance(tokenizer, Tokenizer)
    if not (is_static or callable(tokenizer)):
        raise TeachonceError(
            folder,
            f"a student needs a transformers tokenizer, not {type(tokenizer).__name__}",
            "choose a transformer or a StaticEmbedding as the start",
        )
    # A slow tokenizer is not in tokenizer.json, but in files that its class names: vocab.txt and others.
    vocabulary_files = set(getattr(tokenizer, "vocab_files_names", {}).values())
    recipe = {
        "version": VERSION,
        # A static model's may lie in a folder of its own, and is read otherwise than a transformer's.
        "tokenizer": {"static": digest(tokenizer.to_str().encode())}
        if is_static
        else {
            path.name: sha256_of(path)
            for path in sorted(folder.iterdir())
            if path.name in vocabulary_files
            or (path.suffix in TOKENIZER_ENDINGS and "token" in path.name)
        },
        "max_tokens": max_tokens,
    }
    # Texts without a prompt have the ids that they had before there were any.
    names = {
        role: fingerprint(recipe | ({"prompt": prompts[role]} if prompts.get(role) else {}))
        for role in corpus.roles
    }
    # A copy, since a tokenizer stores its truncation length, and is saved with the student.
    tokenizer = deepcopy(tokenizer)
    counts = prompt_tokens(tokenizer, prompts, max_tokens=max_tokens, address=address)
    # Set up once: threads may read a tokenizer at the same time, and not change it.
    token_ids(tokenizer, [""], max_tokens=max_tokens)
    maker = _Maker(
        store, corpus, names, prompts, partial(token_ids, tokenizer, max_tokens=max_tokens)
    )
    shards = range(len(corpus.objects))
    own = shards[ranks.rank() :: ranks.count()]
    with ranks.all_arrive():
        objects = maker.objects(own)
    # Those of the other ranks are there, unless one failed or has another store.
    objects |= maker.objects([shard for shard in shards if shard not in objects])
    return Tokens(store, [objects[shard] for shard in shards], corpus, counts)


@dataclass(frozen=True)
class _Maker:
    """Makes the objects of token ids that the store lacks."""

    store: Store
    corpus: Corpus
    names: Mapping[Role, str]  # role -> fingerprint of the token ids of its texts
    prompts: Mapping[Role, str]  # role -> what stands before its texts
    # Some texts -> the ids of each. Threads call it.
    read: Callable[[Sequence[str]], list[list[int]]]

    def objects(self, shards: Sequence[int]) -> dict[int, Object]:
        """Returns shard -> its object, for some shards."""
        progress = Progress(
            "tokens", total=sum(self.corpus.objects[shard].rows for shard in shards), unit="texts"
        )
        cached = {shard: self.store.find(self._key(shard)) for shard in shards}
        objects = {shard: entry for shard, entry in cached.items() if entry is not None}
        progress.skip(sum(entry.rows for entry in objects.values()))
        parts = (
            (shard, part)
            for shard in shards
            if shard not in objects
            for part in self.corpus.texts_in_parts(shard, TEXTS_AT_ONCE)
        )
        ids_of_parts = ahead(self._read, parts, threads=THREADS)
        for shard, read in groupby(ids_of_parts, key=itemgetter(0)):
            ids = (ids for _, ids in read)
            keys = text_keys_of(self.corpus.batch(shard))
            objects[shard] = put_tokens(self.store, self._key(shard), ids=ids, text_keys=keys)
            progress.advance(objects[shard].rows)
        return objects

    def _read(self, part: tuple[int, list[str]]) -> tuple[int, list[list[int]]]:
        """Returns the shard of some texts, and the ids of each."""
        shard, texts = part
        prompt = self.prompts.get(self.corpus.role_of(shard), "")
        return shard, self.read([prompt + text for text in texts] if prompt else texts)

    def _key(self, shard: int) -> str:
        name = self.names[self.corpus.role_of(shard)]
        return f"tokens/{name}/{self.corpus.shard_digest(shard)}.arrow"
