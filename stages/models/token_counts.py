"""How often each token of a tokenizer occurs in a corpus."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stages.outcome import Progress
from stages.vectors import evenly

if TYPE_CHECKING:
    from storage.corpus import Corpus

AnyTokenizer = Any
"""A tokenizer of transformers, or that of a static model; their classes have no common type."""

MOST_TEXTS = 200_000
"""Of a larger corpus this many texts are counted, evenly spread over it."""


def token_counts(tokenizer: AnyTokenizer, corpus: Corpus) -> NDArray[np.int64]:
    """Returns (V,) counts of a fast tokenizer's ids in whole texts, without the special tokens around them.

    Args:
        tokenizer: A transformers tokenizer with a tokenizer.json.
        corpus: The texts.
    """
    core = deepcopy(tokenizer.backend_tokenizer)
    core.no_truncation()
    core.no_padding()
    counts = np.zeros(max(core.get_vocab().values()) + 1, np.int64)
    rows = evenly(np.arange(corpus.rows), min(MOST_TEXTS, corpus.rows))
    progress = Progress("tokens", total=len(rows), unit="texts")
    for shard, _, places in corpus.by_shard(rows):
        texts = corpus.texts(shard)
        read = core.encode_batch_fast([texts[place] for place in places], add_special_tokens=False)
        ids = np.concatenate([encoding.ids for encoding in read]).astype(np.int64)
        counts += np.bincount(ids, minlength=len(counts))
        progress.advance(len(places))
    return counts
