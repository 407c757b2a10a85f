"""Choose the layers of a start: those with which a transformer agrees most with the teacher on some texts.

Where there are few sets of so many layers, all are tried. Where there are many, layers are taken out one by
one, each time the one without which the rest agrees most. A set's layers are read one after the other, as
they will be in the start, so sets that begin alike share the states up to where they part. What a layer is
given beside the states, such as masks and positions, is what it is given in the whole model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.models.abilities import check_layers
from stages.models.devices import batch_tokens_on
from stages.models.encoder import PaddedReader, token_batches
from stages.models.layers import TOLERANCE, blocks_of, distance
from stages.models.loading import limit_of_positions
from stages.outcome import Facts, Progress
from stages.vectors import rank_agreement
from storage.errors import TeachonceError, shown

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MOST_SETS = 70
"""So many sets are all tried: four of eight layers, or two of twelve."""

TOLD = 3
"""Sets that are named beside the best one."""

Layers = tuple[int, ...]


@dataclass(frozen=True)
class LayerChoice:
    """The chosen layers, and what was tried."""

    layers: Layers  # 0-based numbers, ascending
    # Rank correlation of cosines with the teacher's, -1 to 1, with these layers alone.
    agreement: float
    # The next best sets of as many layers, and their agreement; best first.
    others: Sequence[tuple[Layers, float]]
    tried: int  # number of sets that were read, of all sizes

    @property
    def summary(self) -> str:
        """The choice, for a person."""
        others = ", ".join(f"{list(layers)} {value:.4f}" for layers, value in self.others)
        return (
            f"chosen among {self.tried} sets by agreement ({self.agreement:.4f}"
            + (f"; then {others}" if others else "")
            + ")"
        )

    @property
    def facts(self) -> Facts:
        """The same for a program."""
        return {
            "layers": list(self.layers),
            "layers_agreement": self.agreement,
            "layers_tried": self.tried,
            "layers_next": [
                {"layers": list(layers), "agreement": value} for layers, value in self.others
            ],
        }


def choose_layers(
    model: SentenceTransformer,
    count: int,
    *,
    texts: Sequence[str],
    teacher: NDArray[np.floating],
    max_tokens: int,
    device: torch.device,
    address: str,
) -> LayerChoice:
    """Choose `count` layers of a transformer. The model is the same afterwards.

    Args:
        model: The model, on the CPU; its first module must be a transformer with one list of equal layers.
        count: How many layers to keep, >= 1.
        texts: n texts, n >= 3.
        teacher: (n, D) the teacher's vectors of them.
        max_tokens: Tokens that are read of a text; fewer if the model has not so many positions.
        device: Where the model reads.
        address: The setting, to name in an error.

    Raises:
        TeachonceError: it has no such list, fewer layers, or layers that do not read alone as in the whole.
    """
    body: Any = getattr(model[0], "auto_model", None)
    listed = blocks_of(body)
    kind = type(model[0] if body is None else body).__name__
    check_layers(count, None if listed is None else len(listed[1]), kind=kind, address=address)
    assert listed is not None  # or `check_layers` raised
    with _reading(model, listed[1], texts, max_tokens, device, address=address) as reader:
        return _chosen(reader, count, teacher, first_stays=_is_only_first(listed[1]))


def _chosen(
    reader: LayerReader, count: int, teacher: NDArray[np.floating], *, first_stays: bool
) -> LayerChoice:
    total = len(reader.blocks)
    tried = 0

    def ranked(sets: Sequence[Layers]) -> list[tuple[Layers, float]]:
        nonlocal tried
        tried += len(sets)
        agreement = {
            layers: round(rank_agreement(vectors, teacher), 6)
            for layers, vectors in reader.vectors(sets).items()
        }
        return sorted(agreement.items(), key=lambda entry: (-entry[1], entry[0]))

    if count == total or comb(total, count) <= MOST_SETS:
        sets = [
            layers for layers in combinations(range(total), count) if not first_stays or 0 in layers
        ]
        best, *others = ranked(sets)
        return LayerChoice(*best, others[:TOLD], tried)
    kept: Layers = tuple(range(total))
    while len(kept) > count:
        without = [(*kept[:place], *kept[place + 1 :]) for place in range(first_stays, len(kept))]
        best, *others = ranked(without)
        kept = best[0]
    return LayerChoice(*best, others[:TOLD], tried)


def _is_only_first(blocks: nn.ModuleList) -> bool:
    """Whether the first layer lacks weights that others have, so that none of them can take its place."""
    return len(blocks) > 1 and bool(blocks[1].state_dict().keys() - blocks[0].state_dict().keys())


@dataclass(frozen=True)
class LayerCall:
    """What the whole model calls a layer with, and what it gives beside the states."""

    args: tuple[Any, ...]  # arguments by position; the states are the first, if there is any
    settings: dict[str, Any]  # arguments by name
    # What follows the states in its output; None if it gives nothing but the states.
    more: tuple[Any, ...] | None


@dataclass(frozen=True)
class ReadBatch:
    """Texts that are read together."""

    places: NDArray[np.int64]  # (b,) places of the texts
    features: dict[str, Any]  # the model's input
    calls: Sequence[LayerCall]  # the call of each layer in the whole model
    vectors: Tensor  # (b, D) what the whole model gives


class LayerReader:
    """Reads batches of texts with some layers of a model, which is on its device; `_reading` makes one."""

    def __init__(
        self, model: SentenceTransformer, blocks: nn.ModuleList, batches: Sequence[ReadBatch]
    ) -> None:
        self.model, self.blocks, self.batches = model, blocks, batches
        self.states = next(iter(inspect.signature(blocks[0].forward).parameters))

    @torch.inference_mode()
    def vectors(self, sets: Sequence[Layers]) -> dict[Layers, NDArray[np.float32]]:
        """Set of layers, in ascending order -> (n, D) vectors of all texts by these layers alone."""
        progress = Progress(
            "start: sets of layers", total=len(sets) * len(self.batches), unit="batches"
        )
        parts: dict[Layers, list[NDArray[np.float32]]] = {layers: [] for layers in sorted(sets)}
        for batch in self.batches:
            for layers, vectors in self._read(batch, list(parts)):
                parts[layers].append(vectors.float().cpu().numpy())
                progress.advance(1)
        order = np.argsort(np.concatenate([batch.places for batch in self.batches]))
        return {layers: np.concatenate(of_batches)[order] for layers, of_batches in parts.items()}

    def _read(self, batch: ReadBatch, sets: Sequence[Layers]) -> Iterator[tuple[Layers, Tensor]]:
        """Yield each set with its vectors of a batch: a walk over their common beginnings, in order."""
        call = batch.calls[0]
        states = [call.args[0] if call.args else call.settings[self.states]]
        before: Layers = ()
        for layers in sets:
            shared = _alike(before, layers)
            del states[shared + 1 :]
            for layer in layers[shared:]:
                states.append(self._through(layer, batch.calls[layer], states[-1]))
            before = layers
            yield layers, self._vectors(batch, states[-1])

    def _through(self, layer: int, call: LayerCall, states: Tensor) -> Tensor:
        """The states behind a layer, of those before it."""
        # A decoder would remember the texts that it has read with other layers.
        settings = {key: None if "past" in key else value for key, value in call.settings.items()}
        if call.args:
            output = self.blocks[layer](states, *call.args[1:], **settings)
        else:
            output = self.blocks[layer](**settings | {self.states: states})
        after: Tensor = output[0] if isinstance(output, tuple) else output
        return after

    def _vectors(self, batch: ReadBatch, states: Tensor) -> Tensor:
        """(b, D) what the model makes of the states behind its last layer."""

        def giving(call: LayerCall) -> Any:  # noqa: ANN401 - what the layer itself gives
            output = states if call.more is None else (states, *call.more)
            return lambda *_, **__: output

        for block, call in zip(self.blocks, batch.calls, strict=True):
            block.forward = giving(call)
        try:
            return _whole(self.model, batch.features)
        finally:
            for block in self.blocks:
                del block.forward


@contextmanager
def _reading(
    model: SentenceTransformer,
    blocks: nn.ModuleList,
    texts: Sequence[str],
    max_tokens: int,
    device: torch.device,
    *,
    address: str,
) -> Iterator[LayerReader]:
    """A reader of the texts, proved to read as the model does with all its layers."""
    transformer: Any = model[0]
    own = transformer.processor
    # A tokenizer stores its truncation, and is saved with the model.
    transformer.processor = deepcopy(own)
    model.max_seq_length = min(max_tokens, limit_of_positions(model) or max_tokens)
    try:
        model.to(device).eval()
        lengths = np.minimum(PaddedReader(model).read(texts, "").lengths, model.max_seq_length)
        places = token_batches(lengths, batch_tokens_on(device))
        batches = [_batch(model, blocks, texts, of_batch) for of_batch in places]
        reader = LayerReader(model, blocks, batches)
        _prove(reader, address)
        yield reader
    finally:
        transformer.processor = own
        model.to("cpu")


@torch.inference_mode()
def _batch(
    model: SentenceTransformer,
    blocks: nn.ModuleList,
    texts: Sequence[str],
    places: NDArray[np.int64],
) -> ReadBatch:
    features: dict[str, Any] = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in model.preprocess([texts[place] for place in places]).items()
    }
    calls: list[LayerCall] = []

    def note(_: nn.Module, args: Any, settings: Any, output: Any) -> None:  # noqa: ANN401 - as torch has it
        calls.append(LayerCall(args, settings, output[1:] if isinstance(output, tuple) else None))

    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        vectors = _whole(model, features)
    finally:
        for hook in hooks:
            hook.remove()
    return ReadBatch(places, features, calls, vectors)


def _prove(reader: LayerReader, address: str) -> None:
    """Raise unless all layers, one after the other, give twice what the whole model gives."""
    batch, layers = reader.batches[-1], tuple(range(len(reader.blocks)))
    try:
        with torch.inference_mode():
            apart = [
                distance(batch.vectors, vectors)
                for _ in range(2)
                for _, vectors in reader._read(batch, [layers])
            ]
        problem = f"vectors are off by {100 * max(apart):.2g} %" if max(apart) > TOLERANCE else None
    # Models are built and read by code of their makers, which raises whatever it likes.
    except Exception as error:
        problem = str(error) or type(error).__name__
    if problem is not None:
        raise TeachonceError(
            address,
            "the model does not read texts layer by layer as it does in one piece: "
            + shown(problem),
            "name the layers yourself, as in [0, 1]",
        )


def _alike(left: Layers, right: Layers) -> int:
    """How many of the first layers are the same in both."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(left), len(right)))


def _whole(model: SentenceTransformer, features: dict[str, Any]) -> Tensor:
    """(b, D) vectors of a batch by all modules of the model."""
    output = dict(features)
    for module in model:
        output = module(output)
    vectors: Tensor = output["sentence_embedding"]
    return vectors
