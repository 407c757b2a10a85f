"""Layers that share weights: a transformer that is deeper than its parameters (Pea-KD).

Shuffled parameter sharing (Pea-KD, arXiv 2009.14822; its two steps, not its code, of which there is none):
the layers of a student are read several times with the same weights, and in every second pass the weights
of queries and keys change places. Layer i of N distinct ones has the weights of layer i mod N; where i // N
is odd, its attention scores are (K x)(Q x)^T instead of (Q x)(K x)^T. That these two change places is not
confirmed: the paper's text was not at hand. Nothing is lost on a cache: only the student is another.

In memory such layers are one parameter, with one gradient. On disk each has its own copy, so that any
program loads the folder as a plain deeper model with equal vectors; config.json says how many are distinct,
and `tie` makes the copies one parameter again.

Imports no torch: `check` asks this module, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import TeachonceError, shown

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

DISTINCT = "teachonce_distinct_layers"
"""Key of a transformer's config.json: the number of its first layers whose weights all others share."""

QUERY_OR_KEY = re.compile(r"(^|\.)(query|key|q|k)(?=[._])")
OTHER = {"query": "key", "key": "query", "q": "k", "k": "q"}


def swapped(name: str) -> str:
    """Returns the name of the weight of a layer that takes the place of `name` in every second pass."""
    return QUERY_OR_KEY.sub(lambda match: match[1] + OTHER[match[2]], name)


def check_swappable(shapes: Mapping[str, Sequence[int]], *, kind: str, address: str) -> None:
    """Raise if queries and keys of a layer, whose weights have these shapes, cannot change places."""
    pairs = {name: swapped(name) for name in shapes if swapped(name) != name}
    if not pairs or any(shapes.get(b) != shapes[a] for a, b in pairs.items()):
        raise TeachonceError(
            address,
            f"the layers of {shown(kind)} have no weights of queries and keys that could change places",
            "set passes: null, or start from a model like BERT",
        )


def share_layers(model: SentenceTransformer, passes: int, *, address: str) -> None:
    """Let a transformer read its layers `passes` times with the same weights, in place.

    Args:
        model: Its first module must be a transformer with a list `encoder.layer` of distinct layers.
        passes: 2 or more.
        address: The setting to name in an error.

    Raises:
        TeachonceError: queries and keys cannot change places in this architecture.
    """
    body: Any = model[0].auto_model
    stack = getattr(getattr(body, "encoder", None), "layer", None)
    first = [] if stack is None else stack[0].named_parameters()
    shapes = {name: tuple(weight.shape) for name, weight in first}
    check_swappable(shapes, kind=body.config.model_type, address=address)
    assert stack is not None  # or `check_swappable` raised
    distinct = len(stack)
    stack.extend(deepcopy(stack[place % distinct]) for place in range(distinct, passes * distinct))
    body.config.num_hidden_layers = len(stack)
    setattr(body.config, DISTINCT, distinct)
    for module, name, _, weight in _copies(body):
        setattr(module, name, weight)


def tie(model: SentenceTransformer, folder: Path) -> None:
    """Make the copies of shared weights in a model, just loaded from `folder`, one parameter again.

    Raises:
        TeachonceError: a copy differs: the layers were trained apart by another program.
    """
    for body in _sharing(model):
        try:
            copies = list(_copies(body))
            equal = bool(copies) and all(
                copy.shape == weight.shape and bool((copy == weight).all())
                for *_, copy, weight in copies
            )
        except (AttributeError, LookupError, TypeError, ZeroDivisionError):
            equal = False  # config.json is not as it was written
        if not equal:
            raise TeachonceError(
                folder,
                f"its config.json says that all layers have the weights of the first "
                f"{shown(distinct_of(body))}, but they differ",
                f"if they were trained apart, delete {DISTINCT} there; else make the model anew",
            )
        for module, name, _, weight in copies:
            setattr(module, name, weight)


@contextmanager
def expanded(model: SentenceTransformer) -> Iterator[None]:
    """Give each layer a copy of the weights that it shares, as long as the model is being written."""
    copies = [copy for body in _sharing(model) for copy in _copies(body)]
    for module, name, _, weight in copies:
        setattr(module, name, type(weight)(weight.detach().clone()))
    try:
        yield
    finally:
        for module, name, _, weight in copies:
            setattr(module, name, weight)


def separate(model: SentenceTransformer) -> None:
    """Give each layer its own weights for good, in place."""
    for body in list(_sharing(model)):
        for module, name, _, weight in _copies(body):
            setattr(module, name, type(weight)(weight.detach().clone()))
        delattr(body.config, DISTINCT)


def copied(model: SentenceTransformer) -> int:
    """Returns how many numbers a model's file has beyond its parameters: copies of shared weights."""
    bodies = _sharing(model)
    return sum(weight.numel() for body in bodies for *_, weight in _copies(body))


def distinct_of(body: nn.Module) -> int | None:
    """Returns how many layers of a transformer are distinct; None if all are."""
    return getattr(getattr(body, "config", None), DISTINCT, None)


def _sharing(model: SentenceTransformer) -> Iterator[Any]:
    """Yield the transformers of a model whose layers share weights."""
    for module in model.modules():
        body = getattr(module, "auto_model", None)
        if body is not None and distinct_of(body) is not None:
            yield body


def _copies(body: Any) -> Iterator[tuple[nn.Module, str, nn.Parameter, nn.Parameter]]:  # noqa: ANN401 - a model
    """Yield each weight of a later pass: its module, its name there, itself, and the first layers' own."""
    stack, distinct = body.encoder.layer, getattr(body.config, DISTINCT)
    for place in range(distinct, len(stack)):
        own = dict(stack[place % distinct].named_parameters())
        # A list: the caller puts other parameters there.
        for path, copy in list(stack[place].named_parameters()):
            module, _, name = path.rpartition(".")
            weight = own[swapped(path) if place // distinct % 2 else path]
            yield stack[place].get_submodule(module), name, copy, weight
