"""Models that begin with nothing: kind, sizes and tokenizer of another, and weights drawn at random.

A transformer is drawn as its own code draws it before it is trained. A static model has a table of normal
values, whose rows have about the length 1. Neither has a matrix behind its pooling: where its vectors are
not as wide as the teacher's, its students learn a projection.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stages.models.abilities import check_static
from stages.models.loading import ends_in_normalize
from stages.models.widths import narrower
from stages.params import StartParams
from storage.errors import TeachonceError, shown

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def drawn_at_random(
    model: SentenceTransformer, start: StartParams, *, address: str
) -> SentenceTransformer:
    """Returns a model like another, with weights that `start.seed` alone decides.

    Args:
        model: The other, with the layers and tokens that are wanted, on the CPU.
        start: The settings, with `from: null`.
        address: Their place in params.yaml, to name in an error.

    Raises:
        TeachonceError: it has no transformer with a pooling, or cannot have the widths that are asked for.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    seed = start.seed or 0
    if start.kind == "static" and start.hidden is not None:
        modules = [_table(model, start.hidden, seed, address=address)]
    else:
        modules = _transformer(model, start, seed, address=address)
    if ends_in_normalize(model):
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, device="cpu")


def _table(model: SentenceTransformer, width: int, seed: int, *, address: str) -> nn.Module:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    has_tokenizer = bool(getattr(model.tokenizer, "is_fast", False))
    check_static(width, None, has_tokenizer=has_tokenizer, address=address)
    core = deepcopy(model.tokenizer.backend_tokenizer)
    core.no_truncation()
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn(max(core.get_vocab().values()) + 1, width, generator=draw)
    return StaticEmbedding(core, embedding_weights=table * width**-0.5)


def _transformer(
    model: SentenceTransformer, start: StartParams, seed: int, *, address: str
) -> list[nn.Module]:
    """The transformer, drawn anew, and its pooling."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformer: Any = model[0]
    body: Any = getattr(transformer, "auto_model", None)
    pooling: Any = next((module for module in model if isinstance(module, Pooling)), None)
    if body is None or pooling is None:
        raise TeachonceError(
            f"{address}.like",
            "a start that is drawn at random is like a transformer and its pooling, and this model is "
            f"{' and '.join(shown(type(module).__name__) for module in model)}",
            "name another model in like",
        )
    config = deepcopy(body.config)
    width = pooling.embedding_dimension
    if start.is_narrow:
        widths = narrower(config.to_dict(), start, address=address)
        config.hidden_size, config.intermediate_size = widths.hidden, widths.intermediate
        config.num_attention_heads, width = widths.heads, widths.hidden
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = type(body)(config).eval()
    if getattr(body, "pooler", None) is None and hasattr(drawn, "pooler"):
        drawn.pooler = None
    setattr(transformer, "model" if hasattr(transformer, "model") else "auto_model", drawn)
    return [transformer, Pooling(width, pooling.pooling_mode, pooling.include_prompt)]
