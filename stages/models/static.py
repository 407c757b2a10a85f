"""Make a static model of a transformer: a table with a vector for each token, of which a text has the mean.

It reads thousands of texts a second on one core. The table begins with what the transformer says of each
token alone, as model2vec's does: the vector of the text that is this one token, in the principal components
of all of them, weighted by a / (a + p), where p is the token's share in the corpus (SIF, Arora et al. 2017,
a = 1e-3). Frequent words so count less in a mean. A Dense leads back into the transformer's space, where a
student of it can search the teacher's index before it has learned anything.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.models.abilities import check_static
from stages.models.components import principal_components
from stages.models.loading import ends_in_normalize
from stages.models.token_counts import AnyTokenizer, token_counts
from storage.errors import TeachonceError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from storage.corpus import Corpus

FREQUENCY = 1e-3
"""The share in the corpus at which a token counts half."""

TOKENS_AT_ONCE = 2048

WORDS = ("a", "the", "of", "1", "yes", "house")
"""Texts of one token, of which at least one is so to any tokenizer."""


def make_static(
    model: SentenceTransformer, corpus: Corpus, *, width: int, address: str
) -> SentenceTransformer:
    """As `static_model`, with the counts of a corpus.

    Raises:
        TeachonceError: the model has no fast tokenizer, or its vectors have fewer values than `width`.
    """
    has_tokenizer = bool(getattr(model.tokenizer, "is_fast", False))
    dim = model.get_embedding_dimension()
    check_static(width, dim, has_tokenizer=has_tokenizer, address=address)
    counts = token_counts(model.tokenizer, corpus)
    return static_model(model, counts, width=width, address=address)


def static_model(
    model: SentenceTransformer, counts: NDArray[np.int64], *, width: int, address: str
) -> SentenceTransformer:
    """Returns a static model with the transformer's tokenizer, and vectors as wide as the transformer's.

    Args:
        model: The transformer, on the CPU, with a fast tokenizer.
        counts: (V,) how often each token id occurs in the corpus.
        width: Values of a token's vector in the table; at most as many as the transformer's have.
        address: The setting of the start, to name in an error.

    Raises:
        TeachonceError: no common word is one token of the model.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    of_tokens = _vectors_of_tokens(model, len(counts), address=address)
    centred = of_tokens - of_tokens.mean(0)
    moments = centred.double().T @ centred.double()
    components = principal_components(moments, width)
    shares = (counts + 1) / (counts + 1).sum()
    weights = torch.from_numpy(FREQUENCY / (FREQUENCY + shares)).float()
    core = deepcopy(model.tokenizer.backend_tokenizer)
    core.no_truncation()
    table = centred @ components * weights[:, None]
    back = Dense(width, of_tokens.shape[1], bias=False, activation_function=nn.Identity())
    with torch.no_grad():
        back.linear.weight.copy_(components)
    modules: list[nn.Module] = [StaticEmbedding(core, embedding_weights=table), back]
    if ends_in_normalize(model):
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, device="cpu")


@torch.inference_mode()
def _vectors_of_tokens(model: SentenceTransformer, size: int, *, address: str) -> Tensor:
    """(V, dim) float32 vectors of texts of one token: as their ids, since not every token can be typed."""
    around, place = _around_one_token(model.tokenizer, address=address)
    vectors = []
    for first in range(0, size, TOKENS_AT_ONCE):
        tokens = torch.arange(first, min(first + TOKENS_AT_ONCE, size))
        ids = around.repeat(len(tokens), 1)
        ids[:, place] = tokens
        features: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for module in model.eval():
            features = module(features)
        vectors.append(features["sentence_embedding"].float())
    return torch.cat(vectors)


def _around_one_token(tokenizer: AnyTokenizer, *, address: str) -> tuple[Tensor, int]:
    """Returns the ids of a text of one token, special ones included, and the place of that token."""
    for word in WORDS:
        alone = tokenizer(word, add_special_tokens=False)["input_ids"]
        ids = tokenizer(word)["input_ids"]
        if len(alone) == 1 and alone[0] in ids:
            return torch.tensor(ids), ids.index(alone[0])
    raise TeachonceError(
        f"{address}.kind", "static, but no common word is one token of this model", "set kind: null"
    )
