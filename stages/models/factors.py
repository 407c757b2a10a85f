"""Word embeddings as two factors: a table of few columns, and a map from these to the width of the model.

The factors begin with the principal components of the whole table, each token weighted by its share in the
corpus. They are apart in training, in `parameters`, and in the graphs that `export` writes. In a folder
they are folded into one whole table, so that any program loads it as a plain model with equal vectors;
config.json says how many columns there are, and `load_model` makes two factors of the table again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stages.models.abilities import check_columns, no_factors
from stages.models.components import principal_components
from stages.models.token_counts import token_counts
from storage.corpus import Corpus
from storage.errors import TeachonceError, shown

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

COLUMNS = "teachonce_embedding"
"""Key of a transformer's config.json: the number of columns of the smaller table."""

TOLERANCE = 1e-4
"""Largest value that a table lacks when it is made of its factors, relative to its largest value."""


class Factors(nn.Module):
    """Token ids -> vectors, as `nn.Embedding` gives them.

    Args:
        table: (V, dim) float32 vectors of tokens.
        components: (dim, columns) orthonormal directions; the vectors are cut to these.
        padding: The id of padding, which learns nothing; None for none.
    """

    def __init__(self, table: Tensor, components: Tensor, padding: int | None) -> None:
        super().__init__()
        dim, columns = components.shape
        self.table = _table(table @ components, padding)
        self.back = nn.Linear(columns, dim, bias=False)
        with torch.no_grad():
            self.back.weight.copy_(components)

    @property
    def num_embeddings(self) -> int:
        """V, the number of tokens."""
        return self.table.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Dim, the width of a token's vector."""
        return self.back.out_features

    def forward(self, token_ids: Tensor) -> Tensor:
        """Returns (..., dim) vectors of (...) token ids."""
        vectors: Tensor = self.back(self.table(token_ids))
        return vectors

    @torch.no_grad()
    def folded(self) -> nn.Embedding:
        """Returns the one table that gives the same vectors."""
        return _table(self.back(self.table.weight), self.table.padding_idx)


def _table(vectors: Tensor, padding: int | None) -> nn.Embedding:
    table: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
        vectors, freeze=False, padding_idx=padding
    )
    return table


@torch.no_grad()
def factorise(model: SentenceTransformer, columns: int, *, corpus: Corpus, address: str) -> None:
    """Make two factors of a transformer's word embeddings, in place, by the tokens of a corpus.

    The model is on the CPU, and has a fast tokenizer.

    Raises:
        TeachonceError: it has no such table, or one that is no wider than `columns`.
    """
    body: Any = getattr(model[0], "auto_model", None)
    table = None if body is None else body.get_input_embeddings()
    if type(table) is not nn.Embedding or not getattr(model.tokenizer, "is_fast", False):
        raise no_factors(type(model[0] if body is None else body).__name__, address=address)
    check_columns(columns, table.embedding_dim, address=address)
    counts = torch.ones(table.num_embeddings, dtype=torch.double)
    counted = torch.from_numpy(token_counts(model.tokenizer, corpus))[: len(counts)]
    counts[: len(counted)] += counted
    weighted = table.weight.double() * counts[:, None]
    components = principal_components(table.weight.double().T @ weighted, columns)
    body.set_input_embeddings(Factors(table.weight, components, table.padding_idx))
    setattr(body.config, COLUMNS, columns)


@torch.no_grad()
def factors_again(model: SentenceTransformer, folder: Path) -> None:
    """Make factors of the folded tables of a model, just loaded from `folder`.

    Raises:
        TeachonceError: a table has more columns than config.json says: another program trained it.
    """
    for module in model.modules():
        body: Any = getattr(module, "auto_model", None)
        columns = getattr(getattr(body, "config", None), COLUMNS, None)
        if columns is None:
            continue
        table = body.get_input_embeddings()
        weight = table.weight
        components = principal_components(weight.double().T @ weight.double(), columns)
        factors = Factors(weight, components.to(weight.device), table.padding_idx)
        lacking = (factors.folded().weight - weight).abs().max()
        if not lacking <= TOLERANCE * weight.abs().max():
            raise TeachonceError(
                folder,
                f"its config.json says that its word embeddings have {shown(columns)} independent "
                "columns, but they have more",
                f"if they were trained as a whole, delete {COLUMNS} there; else make the model anew",
            )
        body.set_input_embeddings(factors)


def fold(model: SentenceTransformer) -> None:
    """Give a model whole tables for good, in place."""
    for body, factors in list(_factors(model)):
        body.set_input_embeddings(factors.folded())
        delattr(body.config, COLUMNS)


@contextmanager
def folded(model: SentenceTransformer) -> Iterator[None]:
    """Give a model whole tables, as long as it is being written."""
    tables = list(_factors(model))
    for body, factors in tables:
        body.set_input_embeddings(factors.folded())
    try:
        yield
    finally:
        for body, factors in tables:
            body.set_input_embeddings(factors)


def folded_in(model: SentenceTransformer) -> int:
    """Returns how many numbers a model's file has beyond its parameters, as its tables are whole there."""
    return sum(
        factors.num_embeddings * factors.embedding_dim
        - sum(weight.numel() for weight in factors.parameters())
        for _, factors in _factors(model)
    )


def _factors(model: SentenceTransformer) -> Iterator[tuple[Any, Factors]]:
    """Yield each transformer whose word embeddings are factors, and these."""
    for module in model.modules():
        body: Any = getattr(module, "auto_model", None)
        if getattr(getattr(body, "config", None), COLUMNS, None) is not None:
            yield body, body.get_input_embeddings()
