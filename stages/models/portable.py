"""Write models as folders that sentence-transformers >= 3.4 with transformers >= 4.57 read alike.

The installed sentence-transformers writes names of modules and keys that older versions do not know, but it
still reads the old names. So a saved folder is rewritten with the old names. The weights are unchanged.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.models.config import NO_PROMPTS, POOLING_FLAGS
from storage.errors import TeachonceError, shown
from storage.roles import Role

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Json = Mapping[str, Any]

DENSE_KEYS = ("in_features", "out_features", "bias", "activation_function")
DENSE_LATER = {"module_input_name", "module_output_name"}

TOKENIZER_KEYS = (
    *(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
    "clean_up_tokenization_spaces",
    "model_max_length",
    "padding_side",
    "truncation_side",
)
"""Keys of tokenizer_config.json that both versions read; the rest is in tokenizer.json."""

NO_LIMIT = 1_000_000
"""A tokenizer without a limit says 10**30, which older versions try to cut at."""

CURE = "distill from a start whose modules are Transformer or StaticEmbedding, Pooling, Dense and Normalize"


def save_portable(
    model: SentenceTransformer,
    folder: Path,
    *,
    address: str,
    prompts: Mapping[Role, str] = NO_PROMPTS,
) -> None:
    """Write a model into an empty folder: safetensors, stock modules, names that all versions know.

    Args:
        model: The model in float32, before its first `encode`, which would change its tokenizer's state.
        folder: An empty folder.
        address: Name of the model in errors.
        prompts: Role -> what the model reads before texts of that role.

    Raises:
        TeachonceError: a module or a tokenizer that older versions lack, or a weight that is NaN or Inf.
    """
    # Not above: `check` asks this module, and needs no torch.
    from stages.models.loading import save_model

    for module in model:
        if not _is_stock(module):
            raise TeachonceError(
                address,
                f"the module {shown(type(module).__name__)} has no form that all versions read",
                CURE,
            )
    is_static = type(model[0]).__name__ == STATIC
    if not (is_static or getattr(model.tokenizer, "is_fast", False)):
        kind = type(model.tokenizer).__name__
        raise TeachonceError(
            address,
            f"the tokenizer {shown(kind)} has no tokenizer.json",
            "distill from a start that has one",
        )
    save_model(model, folder, address=address, prompts=prompts)
    modules: list[dict[str, str]] = json.loads(
        (folder / "modules.json").read_text(encoding="utf-8")
    )
    if is_static:
        modules[0]["path"] = _give_own_folder(folder)
    for entry, module in zip(modules, model, strict=True):
        kind = type(module).__name__
        entry["type"] = f"sentence_transformers.models.{kind}"
        if kind in REWRITES:
            _rewrite(folder / entry["path"] / "config.json", REWRITES[kind], address)
    _write(folder / "modules.json", modules)
    _rewrite(folder / "config_sentence_transformers.json", model_config, address)
    if is_static:  # it has a tokenizer.json alone, and no limit
        return
    # Lowercasing is part of the tokenizer that lies beside it.
    limits = {"max_seq_length": limit_of(model), "do_lower_case": False}
    _write(folder / "sentence_bert_config.json", limits)
    core = _read(folder / "tokenizer.json")
    _write(
        folder / "tokenizer_config.json",
        tokenizer_config(_read(folder / "tokenizer_config.json"), core, inputs=_inputs(model)),
    )


def _give_own_folder(folder: Path) -> str:
    """Move a static model's files; older versions take a first module that lies above for a transformer."""
    own = folder / f"0_{STATIC}"
    own.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).rename(own / name)
    return own.name


def limit_of(model: SentenceTransformer) -> int | None:
    """Returns the number of tokens that a model reads; None for no limit."""
    limit: float | None = model.max_seq_length
    return None if limit is None or limit > NO_LIMIT else int(limit)


def old_ones_read(model: SentenceTransformer) -> bool:
    """Whether transformers 4 gives the same vectors: it ignores rotary settings as version 5 saves them."""
    body: Any = getattr(model[0], "auto_model", None)
    return body is None or getattr(body.config, "rope_parameters", None) is None


def pooling_config(config: Json) -> Json:
    """Returns the old form of a pooling configuration: a flag for each mode."""
    modes = config["pooling_mode"]
    active = {modes} if isinstance(modes, str) else set(modes)
    return {
        "word_embedding_dimension": config["embedding_dimension"],
        **{flag: mode in active for flag, mode in POOLING_FLAGS.items()},
        "include_prompt": config["include_prompt"],
    }


def dense_config(config: Json) -> Json:
    """Returns the configuration of a dense layer without newer keys.

    Raises:
        ValueError: a newer key is set.
    """
    used = {
        key for key in DENSE_LATER if config.get(key, "sentence_embedding") != "sentence_embedding"
    }
    used |= set(config) - set(DENSE_KEYS) - DENSE_LATER
    if used:
        raise ValueError(f"Dense with {', '.join(sorted(used))}")
    return {key: config[key] for key in DENSE_KEYS}


def model_config(config: Json) -> Json:
    """Returns the model's configuration without versions, which would make older libraries warn."""
    return {key: config[key] for key in ("prompts", "default_prompt_name", "similarity_fn_name")}


def tokenizer_config(config: Json, core: Json, *, inputs: list[str]) -> Json:
    """Returns tokenizer_config.json with the old name of a class that reads tokenizer.json unchanged.

    Args:
        config: The saved tokenizer_config.json.
        core: The content of tokenizer.json.
        inputs: Names of the tokenizer's outputs that the model takes.
    """
    kept = {key: config[key] for key in TOKENIZER_KEYS if config.get(key) is not None}
    before = core.get("pre_tokenizer") or {}
    if "add_prefix_space" in before:
        # Older versions overrule tokenizer.json with False if it is not said here too.
        kept["add_prefix_space"] = before["add_prefix_space"]
    return {**kept, "model_input_names": inputs, "tokenizer_class": "PreTrainedTokenizerFast"}


REWRITES: dict[str, Callable[[Json], Json]] = {"Pooling": pooling_config, "Dense": dense_config}
"""Module -> its config.json as older versions want it."""

STATIC = "StaticEmbedding"

STOCK = {"Transformer", STATIC, "Normalize", *REWRITES}


def _is_stock(module: object) -> bool:
    kind = type(module)
    return kind.__name__ in STOCK and kind.__module__.startswith("sentence_transformers.")


def _inputs(model: SentenceTransformer) -> list[str]:
    """Returns the model's inputs: older versions pass all outputs of the tokenizer to the model."""
    body: Any = model[0].auto_model
    taken = inspect.signature(body.forward).parameters
    return [name for name in model.tokenizer.model_input_names if name in taken]


def _rewrite(path: Path, change: Callable[[Json], Json], address: str) -> None:
    try:
        _write(path, change(_read(path)))
    except ValueError as error:
        raise TeachonceError(
            address, f"{shown(error)} has no form that all versions read", CURE
        ) from None


def _read(path: Path) -> Json:
    content: Json = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
