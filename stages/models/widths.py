"""Widths of a transformer, and which narrower ones can be made of it.

Imports no torch: `check` asks this module, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.models.config import first_kind, read_object, transformers_of
from stages.models.folder import TRANSFORMER
from stages.params import StartParams
from storage.errors import TeachonceError, shown

KINDS = ("bert", "camembert", "roberta", "xlm-roberta")
"""Kinds of models that can be made narrower: those whose layers are BERT's."""

KEYS = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
"""Keys of their configurations, and what they are where one is not there."""

WHOLE = "take hidden, intermediate and heads out, or name a small model in `from`"


@dataclass(frozen=True)
class Widths:
    """How wide a transformer of BERT's kind is."""

    hidden: int  # values of a token between layers
    intermediate: int  # neurons of a layer's feed-forward part
    heads: int  # heads of a layer's attention, each `hidden / heads` values wide

    @property
    def head_size(self) -> int:
        """Values of a head."""
        return self.hidden // self.heads


def narrower(config: Mapping[str, Any], start: StartParams, *, address: str) -> Widths:
    """Returns the widths of a start; those that it leaves out are its model's.

    What is drawn at random may be wider than that model, too.

    Args:
        config: The content of that model's config.json.
        start: The settings of the start.
        address: Their place in params.yaml, to name in an error.

    Raises:
        TeachonceError: no such model can be made.
    """
    kind, hidden, heads = config.get("model_type"), start.hidden, start.heads
    if kind not in KINDS or config.get("is_decoder"):
        raise not_of_bert(str(kind), setting_of(start, address))
    own = Widths(*(int(config.get(key, usual)) for key, usual in KEYS.items()))
    for name, wanted, most in (
        ("hidden", hidden, own.hidden),
        ("intermediate", start.intermediate, own.intermediate),
        ("heads", heads, own.heads),
    ):
        if wanted is not None and wanted > most and not start.is_random:
            raise TeachonceError(
                f"{address}.{name}",
                f"{wanted}, but the model has {most}",
                f"set it to {most} or less",
            )
    width, count = hidden or own.hidden, heads or own.heads
    size = width if start.is_random else own.head_size
    if width % count or width // count > size:
        fitting = [n for n in range(1, own.heads + 1) if width % n == 0 and width // n <= size]
        raise TeachonceError(
            f"{address}.heads",
            f"{count} heads of {width} / {count} values, which must be a whole number"
            + ("" if start.is_random else f", and at most the model's own {size}"),
            f"set it to {' or '.join(map(str, fitting))}"
            if fitting
            else f"set hidden to a multiple of {own.heads}",
        )
    return Widths(width, start.intermediate or own.intermediate, count)


def setting_of(start: StartParams, address: str) -> str:
    """The setting that makes a start narrow, to name in an error."""
    names = ("hidden", "intermediate", "heads")
    return f"{address}.{next(name for name in names if getattr(start, name) is not None)}"


def check_narrow_of(folder: Path, start: StartParams, *, address: str) -> None:
    """As `narrower`, for the model in a folder."""
    if (kind := first_kind(folder, address)) != TRANSFORMER:
        raise not_of_bert(kind, setting_of(start, address))
    for path in transformers_of(folder, address)[:1]:
        config = read_object(path / "config.json", address)
        if "model_type" in config:
            narrower(config, start, address=address)


def not_of_bert(kind: str, address: str) -> TeachonceError:
    """Returns the error for a model that cannot be made narrower."""
    return TeachonceError(
        address,
        f"models of the kinds {', '.join(KINDS)} can be made narrower, not {shown(kind)}",
        WHOLE,
    )
