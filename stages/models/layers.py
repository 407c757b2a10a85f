"""Cut a transformer down to some of its layers, and prove that they still read texts as they did.

No kind of model is named here. A transformer's layers are the one list of equal blocks that is as long as
its configuration says. The cut one is built anew from the cut configuration, as any program will build it
from the saved folder, and takes the weights of the layers that are kept.

Some kinds build their first layer otherwise, share a bias among layers, or read globally in every third
layer only. So the cut model must give the token vectors of the whole one that skips its other layers: in
memory, and again after it was saved and loaded.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from stages.models.abilities import WHOLE_OR_SMALL, check_layers
from stages.models.likeness import LONG_PROBE, MIXED_PROBES, PROBES
from stages.models.loading import load_model
from storage.errors import TeachonceError, shown

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TOLERANCE = 1e-4
"""Largest difference between token vectors, relative to their largest value; rounding gives about 1e-6."""

PROOF_TEXTS = (*PROBES[:3], *MIXED_PROBES, " ".join([LONG_PROBE] * 12))
"""Texts of about 4 to 200 tokens: the longest has more than a local layer of ModernBERT sees at once."""

SEEN_IN_LONGER_TEXTS = re.compile(r"window|sliding|local|global|chunk|(attention|layer)_type")
"""Attributes of a layer that `PROOF_TEXTS` may be too short for, so they are compared themselves."""

NOT_OF_LAYERS = {"architectures", "pos_att_type"}
"""Lists in configurations that may be as long as there are layers, and have no entry for each."""


@dataclass(frozen=True)
class LayersProof:
    """What a model must give after all layers but some were taken out."""

    kind: str  # the class of the transformer
    layers: Sequence[int]  # 0-based numbers of the layers that are kept
    # Token vectors of each of `PROOF_TEXTS`, (tokens, width), from the whole model, which skips the
    # other layers.
    states: Sequence[Tensor]
    lists: Sequence[str]  # names of settings with an entry for each layer
    traits: Sequence[Mapping[str, object]]  # what `_traits` says of each layer that is kept
    address: str  # the setting, to name in an error

    def check(self, model: SentenceTransformer, *, when: str = "") -> None:
        """Raise if a model with these layers alone gives other token vectors than the whole one.

        `when` is more about it, for an error.
        """
        body: Any = model[0].auto_model
        _, blocks = blocks_of(body) or ("", nn.ModuleList())
        if len(blocks) != len(self.layers):
            self._refuse(f"{when}it has {len(blocks)} layers")
        for place, (layer, own) in enumerate(zip(self.layers, self.traits, strict=True)):
            now = _traits(body, blocks[place], place, self.lists)
            for name, value in own.items():
                if now.get(name) != value:
                    self._refuse(f"{when}{name} of layer {layer} is {now.get(name)}, not {value}")
        apart = max(map(distance, self.states, token_vectors(model, PROOF_TEXTS)))
        if not apart <= TOLERANCE:
            self._refuse(f"{when}its vectors of tokens are off by {100 * apart:.2g} %")

    def check_saved(self, folder: Path, *, trust_remote_code: bool) -> None:
        """As `check`, for the model in a folder."""
        try:
            model = load_model(
                folder, device=torch.device("cpu"), trust_remote_code=trust_remote_code
            )
        except TeachonceError as error:
            self._refuse(f"it was saved, and then {error.problem}")
        self.check(model, when="saved and loaded again, ")

    def _refuse(self, problem: str) -> NoReturn:
        raise _refusal(self.kind, self.layers, problem, self.address)


def keep_layers(model: SentenceTransformer, layers: Sequence[int], *, address: str) -> LayersProof:
    """Cut a transformer down to some of its layers, in place.

    Args:
        model: The model, on the CPU; its first module must be a transformer with one list of equal layers.
        layers: 0-based numbers of the layers to keep, in this order.
        address: The setting to name in an error.

    Returns:
        What the model must still give when it was saved and loaded.

    Raises:
        TeachonceError: it has no such list or no such layer, or does not read as before without the others.
    """
    transformer: Any = model[0]
    body: Any = getattr(transformer, "auto_model", None)
    listed = blocks_of(body)
    kind = type(transformer if body is None else body).__name__
    check_layers(layers, None if listed is None else len(listed[1]), kind=kind, address=address)
    assert listed is not None  # or `check_layers` raised
    name, blocks = listed
    lists = [*_per_layer(body, len(blocks))]
    traits = [_traits(body, blocks[layer], layer, lists) for layer in layers]
    try:
        states = _states_of_layers(model, blocks, layers)
        proof = LayersProof(kind, layers, states, lists, traits, address)
        cut = _cut(body, name, layers, count=len(blocks))
        setattr(transformer, "model" if hasattr(transformer, "model") else "auto_model", cut)
        proof.check(model)
    except TeachonceError:
        raise
    # Models are built and read by code of their makers, which raises whatever it likes.
    except Exception as error:
        problem = shown(str(error) or type(error).__name__)
        raise _refusal(kind, layers, problem, address) from error
    return proof


def _refusal(kind: str, layers: Sequence[int], problem: str, address: str) -> TeachonceError:
    first = list(range(len(layers)))
    other = "" if list(layers) == first else f"keep the first layers {first}, "
    return TeachonceError(
        address,
        f"a {shown(kind)} of layers {list(layers)} alone does not read texts as these layers do in the "
        f"whole model: {problem}",
        other + WHOLE_OR_SMALL,
    )


def blocks_of(body: nn.Module | None) -> tuple[str, nn.ModuleList] | None:
    """Returns the name and the list of a transformer's layers; None unless it has exactly one such list."""
    config: Any = getattr(body, "config", None)
    if body is None or not hasattr(config, "get_text_config"):
        return None
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in body.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and len({type(block) for block in module}) == 1
    }
    # The experts of a layer may be as many as there are layers.
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return (outer[0], lists[outer[0]]) if len(outer) == 1 else None


def _per_layer(body: nn.Module, count: int) -> dict[str, Sequence[object]]:
    """Returns the settings that have an entry for each layer, such as `layer_types`."""
    config: Any = body.config
    return {
        name: value
        for name, value in vars(config.get_text_config()).items()
        if isinstance(value, list | tuple) and len(value) == count and name not in NOT_OF_LAYERS
    }


def _traits(
    body: nn.Module, block: nn.Module, place: int, lists: Sequence[str]
) -> dict[str, object]:
    """Returns what the layer at a place does with texts that are longer than `PROOF_TEXTS`.

    Also its entry in each setting of `lists`, which has one for each layer.
    """
    config: Any = body.config
    values = {name: getattr(config.get_text_config(), name, None) for name in lists}
    traits = {
        name: value[place]
        for name, value in values.items()
        if isinstance(value, list | tuple) and place < len(value)
    }
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            if SEEN_IN_LONGER_TEXTS.search(name) and isinstance(value, int | str | tuple | None):
                traits[f"{path}.{name}".lstrip(".")] = value
    return traits


def _cut(
    body: Any,  # noqa: ANN401 - a model of transformers; its classes have no useful common type
    name: str,
    layers: Sequence[int],
    *,
    count: int,
) -> nn.Module:
    """Returns a model of the kept layers, built anew, with the weights of `body`."""
    config = deepcopy(body.config)
    text_config = config.get_text_config()
    for setting, values in _per_layer(body, count).items():
        setattr(text_config, setting, [values[layer] for layer in layers])
    text_config.num_hidden_layers = len(layers)
    cut: nn.Module = type(body)(config).to(body.device).eval()
    weights = body.state_dict()
    kept = {key: value for key, value in weights.items() if not key.startswith(f"{name}.")}
    for place, layer in enumerate(layers):
        own = f"{name}.{layer}."
        kept |= {
            f"{name}.{place}.{key.removeprefix(own)}": value
            for key, value in weights.items()
            if key.startswith(own)
        }
    taken = cut.state_dict().keys()
    # What only the first layer has is shared by all of them, such as T5's bias of relative positions.
    kept |= {
        key: weights[key]
        for key in taken
        if key not in kept and key.startswith(f"{name}.0.") and key in weights
    }
    different = [key for key in [*kept, *taken] if (key in kept) != (key in taken)]
    if different:
        raise ValueError(f"the weight {different[0]} is in one of the two only")
    cut.load_state_dict(kept)
    return cut


def _states_of_layers(
    model: SentenceTransformer, blocks: nn.ModuleList, layers: Sequence[int]
) -> list[Tensor]:
    """Returns the token vectors of `PROOF_TEXTS` from the whole model, which skips its other layers.

    A model reads in its own order. So where a layer is kept behind one that follows it in the model, a text
    is read again, and what the layers before have made of it goes into the first block.
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer > runs[-1][-1]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    before: list[Tensor] | None = None
    for run in runs:
        with _skipping(blocks, run, before) as after:
            states = token_vectors(model, PROOF_TEXTS)
        before = after
    return states


@contextmanager
def _skipping(
    blocks: nn.ModuleList, kept: Sequence[int], before: Sequence[Tensor] | None
) -> Iterator[list[Tensor]]:
    """Let a model skip all of its blocks but some.

    Args:
        blocks: The layers.
        kept: Numbers of the layers that are not skipped.
        before: For each text, what goes into the first block; None for the model's own.

    Yields:
        A list that gets, for each text, what comes out of the last block.
    """
    after: list[Tensor] = []
    first = next(iter(inspect.signature(blocks[0].forward).parameters))

    def skip(_: nn.Module, args: Any, settings: Any, output: Any) -> Any:  # noqa: ANN401 - as torch has it
        states = args[0] if args else settings[first]
        # What else a block gives, such as T5's bias of positions, is for those that follow it.
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def put_in(_: nn.Module, args: Any, settings: Any) -> Any:  # noqa: ANN401
        states = (before or ())[len(after)]
        return ((states, *args[1:]), settings) if args else (args, settings | {first: states})

    def take_out(_: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
        after.append(output[0] if isinstance(output, tuple) else output)

    hooks = [
        block.register_forward_hook(skip, with_kwargs=True)
        for number, block in enumerate(blocks)
        if number not in kept
    ]
    if before is not None:
        hooks.append(blocks[0].register_forward_pre_hook(put_in, with_kwargs=True))
    hooks.append(blocks[-1].register_forward_hook(take_out))
    try:
        yield after
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def token_vectors(model: SentenceTransformer, texts: Sequence[str]) -> list[Tensor]:
    """Returns the token vectors of each text, read alone: (tokens, width)."""
    reader: Any = model[0].eval()
    own = reader.processor
    # A tokenizer stores the truncation of its last texts, and is saved with the model.
    reader.processor = deepcopy(own)
    try:
        return [reader(model.preprocess([text]))["token_embeddings"][0] for text in texts]
    finally:
        reader.processor = own


def distance(own: Tensor, other: Tensor) -> float:
    """The largest difference between two tensors, relative to the largest value; inf for other shapes.

    NaN where both have NaN is no difference: `save_model` names the weight.
    """
    if own.shape != other.shape:
        return torch.inf
    both = own.isnan() & other.isnan()
    scale = own.nan_to_num().abs().max().clamp(min=torch.finfo(own.dtype).tiny)
    return float((own - other).masked_fill(both, 0).abs().max() / scale)
