"""What a model can be asked for: how many tokens it reads, and which layers can be taken out of it.

Told from its configuration and the heads of its weights, without torch, so that `check` says before
anything is computed what the stages would find out an hour later. They ask the same functions again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.model_config import read_object, transformers_of
from stages.models import read_header
from storage.errors import TeachonceError

Shapes = Mapping[str, Sequence[int]]
"""Weight -> its shape."""

POSITIONS = re.compile(
    r"(^|\.)((char_)?position_embeddings?|positions_embed|embed_positions|pos_emb|wpe)\.weight$"
)
"""The table of learned positions, as models of transformers name it. Rotary and relative ones have none."""

AFTER_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm"),
    *("mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Models whose first token has the position after that of padding, so it has fewer than there are rows."""

PADDING = 1
"""The id of padding in `AFTER_PADDING`, where a configuration does not say it."""


def first_position(config: Mapping[str, Any]) -> int:
    """The position of a text's first token: its row in the table of positions."""
    kind = config.get("model_type")
    if kind not in AFTER_PADDING:
        return 0
    padding = PADDING if kind == "mpnet" else config.get("pad_token_id")
    return int(PADDING if padding is None else padding) + 1


def token_limit(
    config: Mapping[str, Any], shapes: Shapes, *, first: int | None = None
) -> int | None:
    """How many tokens of a text a transformer reads at most; None for any number.

    Args:
        config: Its config.json.
        shapes: Of its weights.
        first: The position of a text's first token, if it is known better than from `config`.
    """
    rows = min((shape[0] for name, shape in shapes.items() if POSITIONS.search(name)), default=None)
    if rows is None:
        return None
    # Some tables begin with rows that no token takes; then the configuration has the number of the others.
    declared = int(config.get("max_position_embeddings") or rows)
    return min(declared, rows - (first_position(config) if first is None else first))


def token_limit_of(folder: Path, address: str) -> int | None:
    """The same of the model in a folder, of any of its transformers; None also for a static one."""
    limits = (token_limit(config, shapes) for config, shapes in _transformers(folder, address))
    return min((limit for limit in limits if limit is not None), default=None)


def check_length(wanted: int | None, limit: int | None, *, address: str, who: str) -> None:
    """Raise if more tokens of a text are wanted than a model reads.

    Args:
        wanted: The setting; None: what the model reads.
        limit: Of the model; None: it has none.
        address: The setting, to name in an error.
        who: The model, to name in an error.
    """
    if wanted is not None and limit is not None and wanted > limit:
        raise TeachonceError(
            address,
            f"{wanted}, but {who} reads {limit} tokens at most",
            f"set it to {limit} or less",
        )


def _transformers(folder: Path, address: str) -> list[tuple[Mapping[str, Any], Shapes]]:
    """The configuration and the shapes of the weights of each transformer of a model."""
    found: list[tuple[Mapping[str, Any], Shapes]] = []
    for path in transformers_of(folder, address):
        if (path / "config.json").is_file():
            shapes: dict[str, tuple[int, ...]] = {}
            for weights in sorted(path.glob("*.safetensors")):
                shapes |= read_header(weights, address)
            found.append((read_object(path / "config.json", address), shapes))
    return found
