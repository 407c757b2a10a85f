"""Limits of a model: tokens that it reads, layers that can be taken, whether it can be trained.

Read from its configuration and the headers of its weights, without torch, so that `check` finds before
anything is computed what the stages would find an hour later. The stages call the same functions.

This file is long because every such question is asked in one place, by `check` and by the stages.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.models.config import POOLING_FLAGS, first_kind, read_object, transformers_of
from stages.models.folder import MODULES, TOKENIZER, TRANSFORMER, modules_of, read_header
from stages.models.pieces import check_kind, check_number, no_transformer
from stages.models.portable import STATIC, STOCK
from stages.models.shared_layers import check_swappable
from storage import regular
from storage.errors import TeachonceError, shown

LISTED = re.compile(r"((?:[^.]+\.)*?)(\d+)\.")
"""A weight of an entry of a list, such as a layer's: the list's name, and its place in the list."""

LAYER_COUNTS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
"""Keys of configurations for the number of layers."""

WHOLE_OR_SMALL = "set layers: null to start from the whole model, or name a small model in `from`"

NOT_TRAINED = {"WordEmbeddings", "BoW", "CLIPModel"}
"""Modules that read texts and are neither transformers nor static models with a tokenizer.json."""

NO_MIXES = "set embed.mixes to 0, or name a teacher whose transformer reads `inputs_embeds`"
"""The cure for a teacher that cannot read mixes of texts."""

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
    """Returns the largest number of tokens that a transformer reads; None for no limit.

    Args:
        config: The content of its config.json.
        shapes: The shapes of its weights.
        first: The position of a text's first token; None to take it from `config`.
    """
    rows = min((shape[0] for name, shape in shapes.items() if POSITIONS.search(name)), default=None)
    if rows is None:
        return None
    # Some tables begin with rows that no token takes; then the configuration has the number of the others.
    declared = int(config.get("max_position_embeddings") or rows)
    return min(declared, rows - (first_position(config) if first is None else first))


def token_limit_of(folder: Path, address: str) -> int | None:
    """Returns the lowest limit of the transformers of the model in a folder; None for a static model."""
    limits = (token_limit(config, shapes) for config, shapes in _transformers(folder, address))
    return min((limit for limit in limits if limit is not None), default=None)


def check_length(wanted: int | None, limit: int | None, *, address: str, who: str) -> None:
    """Raise if more tokens of a text are wanted than a model reads; `who` is the model, for an error.

    None is the model's own number, or no limit.
    """
    if wanted is not None and limit is not None and wanted > limit:
        raise TeachonceError(
            address,
            f"{wanted}, but {who} reads {limit} tokens at most",
            f"set it to {limit} or less",
        )


def check_length_of(folder: Path, wanted: int, *, address: str, who: str) -> None:
    """As `check_length`, for the model in a folder."""
    check_length(wanted, token_limit_of(folder, address), address=address, who=f"{who} ({folder})")


def check_layers(
    layers: Sequence[int] | int, count: int | None, *, kind: str, address: str
) -> None:
    """Raise if layers cannot be taken out of a transformer.

    Args:
        layers: 0-based numbers of the wanted layers, or how many are to be chosen.
        count: Number of layers in its one list of equal layers; None if it has no such list.
        kind: The kind of model, to name in an error.
        address: The setting, to name in an error.
    """
    if count is None:
        raise TeachonceError(
            address,
            f"layers can be taken from a transformer with one list of equal layers, not from {shown(kind)}",
            WHOLE_OR_SMALL,
        )
    if isinstance(layers, int):
        if layers > count:
            raise TeachonceError(
                address, f"{layers} layers of {count}", f"set it to {count} or less"
            )
        return
    if max(layers) >= count:
        raise TeachonceError(address, f"layer {max(layers)} of {count}", f"use 0 to {count - 1}")


def check_layers_of(folder: Path, layers: Sequence[int] | int, *, address: str) -> None:
    """As `check_layers`, for the model in a folder, if its config.json names a `model_type`."""
    if (kind := first_kind(folder, address)) != TRANSFORMER:
        check_layers(layers, None, kind=kind, address=address)
    for config, shapes in _transformers(folder, address)[:1]:
        if "model_type" in config:
            count = _layer_count(config, shapes)
            check_layers(layers, count, kind=str(config["model_type"]), address=address)


def _layer_count(config: Mapping[str, Any], shapes: Shapes) -> int | None:
    """Returns the number of layers of a transformer; None if its weights have no list that is so long."""
    lists = {(match[1], match[2]) for name in shapes if (match := LISTED.match(name))}
    lengths = Counter(name for name, _ in lists).values()
    stored = max(lengths, default=0)
    counts = {**config, **(config.get("text_config") or {})}
    declared = next((int(counts[key]) for key in LAYER_COUNTS if counts.get(key)), stored)
    # A configuration may use fewer layers than there are weights for.
    return declared if 0 < declared <= stored else None


def check_passes_of(folder: Path, *, address: str) -> None:
    """Raise if the layers of the model in a folder cannot share weights."""
    check_layers_of(folder, [0], address=address)
    for config, shapes in _transformers(folder, address)[:1]:
        first = re.compile(r"(^|.*\.)encoder\.layer\.0\.")
        layer = {name: shape for name, shape in shapes.items() if first.match(name)}
        kind = str(config.get("model_type"))
        check_swappable(layer, kind=kind, address=address)


def check_vocabulary_of(folder: Path, wanted: int | None, *, address: str) -> None:
    """Raise if a model's tokens cannot be cut to `wanted` (None: a share of the corpus).

    As far as its tokenizer.json says it.
    """
    if (kind := first_kind(folder, address)) != TRANSFORMER:
        raise no_transformer(kind, address=address)
    for path in transformers_of(folder, address)[:1]:
        if not (path / TOKENIZER).is_file():
            continue
        try:
            content = json.loads(regular.content(path / TOKENIZER))
            kind, vocab = content["model"].get("type"), content["model"]["vocab"]
            own = [entry if isinstance(entry, str) else entry[0] for entry in vocab]
            tokens = {*own, *(token["content"] for token in content["added_tokens"])}
        except (AttributeError, LookupError, TypeError, ValueError):
            continue  # loading the model says what is wrong with the file
        if kind is not None:  # older files have none
            check_kind(str(kind), address=address)
        if wanted is not None:
            check_number(wanted, len(tokens), address=address)


def check_embedding_of(folder: Path, columns: int, hidden: int | None, *, address: str) -> None:
    """Raise if the word embeddings of a start cannot have so few columns.

    `hidden` is the width of the start; None for that of the model in the folder.
    """
    if (kind := first_kind(folder, address)) != TRANSFORMER:
        raise no_factors(kind, address=address)
    for config, _ in _transformers(folder, address)[:1]:
        dim = hidden or config.get("embedding_size") or config.get("hidden_size")
        if isinstance(dim, int):
            check_columns(columns, dim, address=address)


def check_columns(columns: int, dim: int, *, address: str) -> None:
    """Raise for a table that would have no fewer columns than the word embeddings have values."""
    if columns >= dim:
        raise TeachonceError(
            address,
            f"{columns}, but the word embeddings have {dim} values",
            f"set it to less than {dim}, or take embedding out",
        )


def no_factors(kind: str, *, address: str) -> TeachonceError:
    """Returns the error for a model whose word embeddings cannot be made two factors."""
    return TeachonceError(
        address,
        "the word embeddings of a transformer with a plain table of them and a tokenizer.json can have "
        f"fewer columns, not those of {shown(kind)}",
        "take embedding out",
    )


def check_trainable(folder: Path, *, address: str) -> None:
    """Raise for a model of a kind that cannot be trained as a student."""
    kind = first_kind(folder, address)
    if kind in NOT_TRAINED:
        raise TeachonceError(
            address,
            f"the model in {folder} is a {kind}; students are transformers, or of the kind {STATIC}",
            "name one of these to start from; this one can be the teacher",
        )


def is_static(folder: Path, address: str) -> bool:
    """Whether the model in a folder is a table of tokens, of which a text has the mean."""
    return first_kind(folder, address) == STATIC


def check_drawable(folder: Path, *, address: str) -> None:
    """Raise if no model like the one in a folder can be drawn at random: a transformer and its pooling.

    Raises:
        TeachonceError: it has no transformer, or no pooling behind it.
    """
    kinds = [kind for kind, _ in modules_of(folder, address)] or [TRANSFORMER]
    # A transformer alone makes no vector of a text: loading the model says so.
    if kinds[0] != TRANSFORMER or (kinds[1:] and "Pooling" not in kinds):
        raise TeachonceError(
            address,
            f"a start that is drawn at random is like a transformer and its pooling, and the model in "
            f"{folder} is {' and '.join(map(shown, kinds))}",
            "name another model in like",
        )


def check_static_of(folder: Path, hidden: int, *, address: str, is_random: bool = False) -> None:
    """Raise if no static model with a table of `hidden` columns can be made of the model in a folder.

    A table that is drawn at random may be wider than the model's vectors.
    """
    if (kind := first_kind(folder, address)) != TRANSFORMER:
        raise TeachonceError(
            f"{address}.kind",
            f"static is made of a transformer, and the model in {folder} is a {shown(kind)}",
            "name a transformer, or take kind and hidden away to start from the model as it is",
        )
    places = (folder, *transformers_of(folder, address))
    has_tokenizer = any((path / TOKENIZER).is_file() for path in places)
    width = None if is_random else width_of(folder, address)
    check_static(hidden, width, has_tokenizer=has_tokenizer, address=address)


def check_static(hidden: int, width: int | None, *, has_tokenizer: bool, address: str) -> None:
    """Raise if no static model with a table of `hidden` columns can be made of a transformer.

    `width` is that of its vectors; None if any is right, or it is not known.
    """
    if not has_tokenizer:
        raise TeachonceError(
            f"{address}.kind",
            f"static, but the tokenizer of this model has no {TOKENIZER}",
            "name a model with one",
        )
    if width is not None and hidden > width:
        raise TeachonceError(
            f"{address}.hidden",
            f"{hidden}, but the model's vectors have {width} values",
            f"set it to {width} or less",
        )


def check_mixable(folder: Path, *, address: str) -> None:
    """Raise for a model whose first module is no transformer, which has no input embeddings to mix.

    Whether a transformer reads `inputs_embeds` is seen when it is loaded.
    """
    if (kind := first_kind(folder, address)) != TRANSFORMER:
        raise TeachonceError(
            address,
            f"the model in {folder} is a {shown(kind)}, which has no input embeddings to mix",
            "name a transformer, or set embed.mixes to 0 and take recipes without `mixes`",
        )


def check_exportable(folder: Path, *, address: str) -> None:
    """Raise for a model with a module that not all versions of sentence-transformers can read."""
    own = {name.rpartition(".")[2] for name in _custom_modules(folder)}
    for kind, _ in modules_of(folder, address):
        if kind not in STOCK or kind in own:
            raise TeachonceError(
                address,
                f"its start in {folder} has the module {shown(kind)}, which cannot be exported",
                f"export a student of a start whose modules are {', '.join(sorted(STOCK))}",
            )


def check_code(folder: Path, *, trusted: bool, address: str) -> None:
    """Raise for a model that needs its maker's code to load, if such code may not run."""
    if trusted:
        return
    for path in transformers_of(folder, address):
        config = path / "config.json"
        kind = read_object(config, address).get("model_type") if config.is_file() else None
        if kind is not None and not _is_known(str(kind)):
            has_code = any(folder.glob("*.py")) or "auto_map" in read_object(config, address)
            raise TeachonceError(
                address,
                f"{folder} is a model of the kind {shown(kind)}, which transformers does not know"
                + (" without the code in that folder" if has_code else ""),
                "look at the code, then set embed.trust_remote_code: true, or name another model"
                if has_code
                else "install a newer transformers, or name another model",
            )
    for name in _custom_modules(folder):
        raise TeachonceError(
            address,
            f"{folder} has a module of its maker's own code, {shown(name)}",
            "look at the code, then set embed.trust_remote_code: true, or name another model",
        )


def width_of(folder: Path, address: str) -> int | None:
    """Returns the width of a model's vectors; None if its configuration does not say it."""
    width = None
    for kind, path in modules_of(folder, address):
        file = folder / path / "config.json"
        config = read_object(file, address) if file.is_file() else {}
        if kind == "Dense":
            width = config.get("out_features")
        elif kind == "Pooling":
            width = config.get("embedding_dimension", config.get("word_embedding_dimension"))
            modes = config.get("pooling_mode")
            flags = [config.get(flag) for flag in POOLING_FLAGS]
            times = len(modes) if isinstance(modes, list) else max(flags.count(True), 1)
            width = None if width is None else int(width) * times
        elif kind == STATIC:
            shapes = read_header(folder / path / "model.safetensors", address)
            width = next((shape[1] for shape in shapes.values() if len(shape) == 2), None)
    return None if width is None else int(width)


def _is_known(kind: str) -> bool:
    """Whether the installed transformers has this kind of model."""
    # Its lists are read as texts: importing them takes torch along.
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return True
    lists = Path(spec.origin).parent.glob("models/auto/*_auto.py")
    mappings = [*lists, *Path(spec.origin).parent.glob("models/auto/auto_mappings.py")]
    quoted = f'"{kind}"'.encode()
    return not mappings or any(quoted in path.read_bytes() for path in mappings)


def _custom_modules(folder: Path) -> list[str]:
    """Returns the names in modules.json of modules whose code lies in the folder."""
    if not (folder / MODULES).is_file():
        return []
    types = [
        str(module.get("type", "")) for module in json.loads(regular.content(folder / MODULES))
    ]
    return [name for name in types if (folder / f"{name.split('.')[0]}.py").is_file()]


def _transformers(folder: Path, address: str) -> list[tuple[Mapping[str, Any], Shapes]]:
    """The configuration and the shapes of the weights of each transformer of a model."""
    configs_and_shapes: list[tuple[Mapping[str, Any], Shapes]] = []
    for path in transformers_of(folder, address):
        if (path / "config.json").is_file():
            shapes: dict[str, tuple[int, ...]] = {}
            for weights in sorted(path.glob("*.safetensors")):
                shapes |= read_header(weights, address)
            configs_and_shapes.append((read_object(path / "config.json", address), shapes))
    return configs_and_shapes
