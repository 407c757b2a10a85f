"""Read two texts as one: their input embeddings, mixed (MixKD, arXiv 2011.00593).

x' = l E(x_i) + (1 - l) E(x_j), token by token from the first, where E is the table of token embeddings.
Padding is nothing: behind the end of the shorter text stands the longer one alone, times its share, and the
mask is that of the longer. Both texts have the prompt and are truncated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.models.packed import TokenizedTexts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Ids = Sequence[int] | NDArray[np.int32]


@dataclass(frozen=True)
class MixedIds:
    """The token ids of two texts, and the share of the first one, 0 to 1. Its length is the longer's."""

    first: Ids
    second: Ids
    ratio: float

    def __len__(self) -> int:
        return max(len(self.first), len(self.second))


def mixed_features(modules: Sequence[nn.Module], mixes: Sequence[MixedIds]) -> dict[str, Any]:
    """Returns what a model's first module reads of some mixes, padded to the longest.

    Args:
        modules: The modules of a sentence-transformers model; the first is a transformer.
        mixes: B mixes; L is the length of the longest.

    Returns:
        `inputs_embeds`: (B, L, width). `attention_mask`: (B, L).

    Raises:
        AttributeError, NotImplementedError: the first module has no table of token embeddings.
    """
    transformer: Any = modules[0]
    table = transformer.auto_model.get_input_embeddings()
    device = table.weight.device
    length = max(map(len, mixes))
    ratio = torch.tensor([mix.ratio for mix in mixes], dtype=torch.float32)
    sides = [
        _weighted(table, [mix.first for mix in mixes], ratio, length, device),
        _weighted(table, [mix.second for mix in mixes], 1 - ratio, length, device),
    ]
    lengths = torch.tensor([len(mix) for mix in mixes])
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    return {"inputs_embeds": sides[0] + sides[1], "attention_mask": mask.to(device)}


def _weighted(
    table: nn.Module, texts: Sequence[Ids], weights: Tensor, length: int, device: torch.device
) -> Tensor:
    """Returns (B, L, width) embeddings of texts times (B,) weights; 0 behind the end of a text."""
    ids = torch.zeros(len(texts), length, dtype=torch.int64)
    shares = torch.zeros(len(texts), length)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.as_tensor(np.asarray(text, np.int64))
        shares[row, : len(text)] = weights[row]
    embedded: Tensor = table(ids.to(device))
    return embedded * shares.to(device)[:, :, None]


def read_mixed(
    model: SentenceTransformer,
    first: Sequence[str],
    second: Sequence[str],
    ratio: NDArray[np.float32],
    prompt: str,
) -> TokenizedTexts:
    """Tokenise pairs of texts, each with the prompt and cut as the model cuts it.

    The length of a mix is that of its longer text after truncation.
    """
    ids = [_token_ids(model, [prompt + text for text in texts]) for texts in (first, second)]
    mixes = [MixedIds(a, b, float(share)) for a, b, share in zip(*ids, ratio, strict=True)]
    transformer: Any = model[0]
    in_prompt = (transformer._get_prompt_length(prompt) or 0) if prompt else 0

    def forward(places: NDArray[np.int64]) -> Tensor:
        features = mixed_features(list(model), [mixes[place] for place in places])
        features["prompt_length"] = in_prompt
        vectors: Tensor = model(features)["sentence_embedding"]
        return vectors

    return TokenizedTexts(np.array([len(mix) for mix in mixes], np.int64), forward)


def _token_ids(model: SentenceTransformer, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = model.tokenizer(
        texts,
        truncation=True,
        max_length=model.max_seq_length,
        padding=False,
        return_attention_mask=False,
    )["input_ids"]
    return ids
