"""Load and save models with sentence-transformers, with checks that it lacks."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stages.models.abilities import token_limit
from stages.models.config import NO_PROMPTS, decided_pooling
from stages.models.factors import factors_again, folded
from stages.models.folder import model_files
from stages.models.packed import first_position
from stages.models.shared_layers import expanded, tie
from stages.outcome import write_json
from storage.errors import TeachonceError, first_line
from storage.roles import ROLES, Role

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_model(
    folder: Path,
    *,
    device: torch.device,
    trust_remote_code: bool = False,
    pooling: str | None = None,
    setting: str = "embed.pooling",
) -> SentenceTransformer:
    """Load a sentence-transformers model in float32.

    The dtype is always given: transformers 5 would take the checkpoint's own.

    Args:
        folder: Folder of the model.
        device: The device of the model.
        trust_remote_code: Whether code in its folder may run.
        pooling: Pooling of a transformers folder, which has no modules.json; None otherwise.
        setting: The setting that says `pooling`, to name in an error.

    Raises:
        TeachonceError: it cannot be loaded, or only by running code or unpickling weights of its maker, or
            nothing says how it pools,
            or layers that its config.json says to share weights do not.
    """
    model_files(folder, address=str(folder), trust_remote_code=trust_remote_code)
    pooling = decided_pooling(folder, pooling, address=setting)
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    # A bar for 0.1 s of loading would stand between our own lines.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = SentenceTransformer(
            str(folder),
            device=str(device),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
        )
    # Its loaders believe the files of a model, and raise whatever comes of what is wrong there.
    except Exception as error:
        raise TeachonceError(
            folder,
            f"sentence-transformers cannot load it: {first_line(error)}",
            "check that `SentenceTransformer(folder)` works; a model with code of its own needs "
            "embed.trust_remote_code: true",
        ) from error
    tie(model, folder)
    factors_again(model, folder)
    _check_vocabulary(model, folder)
    _pad_with_some_token(model)
    _read_no_more_than_there_are_positions(model)
    return model if pooling is None else _pooled(model, pooling, folder, setting)


def _pad_with_some_token(model: SentenceTransformer) -> None:
    """Set a padding token that the model knows, if the tokenizer has none; the mask hides it anyway.

    GPT-2 and Llama have none; others have one that was added after the model was trained.
    """
    for module in model.modules():
        body: Any = getattr(module, "auto_model", None)
        tokenizer: Any = getattr(module, "tokenizer", None)
        if body is None or not hasattr(tokenizer, "pad_token_id"):
            continue
        words = sys.maxsize
        with contextlib.suppress(NotImplementedError, AttributeError):  # code of its maker's own
            words = body.get_input_embeddings().num_embeddings
        own = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0]
        padding_id = next(number for number in own if number is not None and number < words)
        if padding_id != tokenizer.pad_token_id:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding_id)


def limit_of_positions(model: SentenceTransformer) -> int | None:
    """Returns the largest number of tokens that a model can read; None for no limit."""
    limits = (_positions(module) for module in model.modules())
    return min((limit for limit in limits if limit is not None), default=None)


def _positions(module: nn.Module) -> int | None:
    """Returns the limit of one module; None if it is no transformer or has none."""
    body: Any = getattr(module, "auto_model", None)
    if body is None:
        return None
    shapes = {name: weight.shape for name, weight in body.named_parameters()}
    return token_limit(body.config.to_dict(), shapes, first=first_position(body))


def _read_no_more_than_there_are_positions(model: SentenceTransformer) -> None:
    """sentence-transformers takes all rows of a table of positions for those of tokens (RoBERTa)."""
    module: Any
    for module in model.modules():
        limit, own = _positions(module), getattr(module, "max_seq_length", None)
        if limit is not None and (own is None or own > limit):
            module.max_seq_length = limit


def _check_vocabulary(model: SentenceTransformer, folder: Path) -> None:
    """Raise for a tokenizer with special tokens only: transformers makes one if the file is missing."""
    for module in model.modules():
        tokenizer: Any = getattr(module, "tokenizer", None)
        special = getattr(tokenizer, "all_special_ids", None)
        if special is not None and len(tokenizer) <= len(special):
            raise TeachonceError(
                folder,
                "its tokenizer knows no word: the file with its vocabulary is missing",
                "copy or fetch the whole folder again",
            )


def _pooled(
    model: SentenceTransformer, pooling: str, folder: Path, setting: str
) -> SentenceTransformer:
    """Returns a transformer with this pooling instead of the one that sentence-transformers guessed."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    if not (len(model) == 2 and isinstance(model[1], Pooling)):
        raise TeachonceError(
            setting,
            f"{pooling}, but the model in {folder} makes one vector of a text by itself",
            "load it with sentence-transformers, save it, and name that folder",
        )
    model[1] = Pooling(model[1].embedding_dimension, pooling)
    return model


def models_by_role(
    model: SentenceTransformer, routes: Mapping[Role, str] | None
) -> dict[Role, SentenceTransformer]:
    """Returns role -> a model without a router for texts of this role; the models share weights.

    `routes` is role -> the route of the model's router; None if it has none.
    """
    from sentence_transformers import SentenceTransformer

    if routes is None:
        return {"text": model}

    def through(route: str) -> SentenceTransformer:
        modules: list[nn.Module] = []
        for module in model:
            behind = getattr(module, "sub_modules", None)
            modules += [module] if behind is None else list(behind[route])
        return SentenceTransformer(modules=modules, device=str(model.device)).eval()

    model_of_route = {route: through(route) for route in set(routes.values())}
    return {role: model_of_route[route] for role, route in routes.items()}


def ends_in_normalize(model: SentenceTransformer) -> bool:
    """Whether a model's vectors have length 1."""
    return is_normalize(model[-1])


def leaves_out_prompts(modules: Iterable[nn.Module]) -> bool:
    """Whether the tokens of a prompt are no part of a text's vector (`include_prompt: false`)."""
    return not all(getattr(module, "include_prompt", True) for module in modules)


def is_normalize(module: nn.Module) -> bool:
    """Whether a module scales vectors to length 1."""
    return type(module).__name__ == "Normalize"


def save_model(
    model: SentenceTransformer,
    folder: Path,
    *,
    address: str,
    prompts: Mapping[Role, str] = NO_PROMPTS,
) -> None:
    """Write a start or a student; equal weights give equal files (no card with a date in it).

    The saved configuration has no prompts, other similarity or cut of the original model: `encode` would
    apply them, but a student reads what it read in training, and is compared by cosine. Each layer has a
    copy of the weights that it shares, and word embeddings are one table, so that any program reads them.

    Args:
        model: The model, with finite weights.
        folder: Destination folder.
        address: Name of the model in errors.
        prompts: Role -> what the model reads before texts of that role. Where it is the same before all,
            `encode` applies it by itself; else `encode_query` and `encode_document` do, or `encode` with a
            role as `prompt_name`.

    Raises:
        TeachonceError: a weight has NaN or Inf in it.
    """
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise TeachonceError(
                address,
                f"its weight {name} has NaN or Inf in it",
                "make the model that it comes from anew, or name another",
            )
    model.to("cpu")
    own: dict[str, str] = {role: prompt for role, prompt in prompts.items() if prompt}
    # An absent one of these two is an empty one to sentence-transformers 6, and an error to 3.4.
    model.prompts = {"query": "", "document": "", **own}
    is_one_prompt = "text" in own and len(own) == len(ROLES) and len(set(own.values())) == 1
    model.default_prompt_name = "text" if is_one_prompt else None
    model.similarity_fn_name = "cosine"
    model.truncate_dim = None
    with expanded(model), folded(model):
        model.save(str(folder), create_model_card=False, safe_serialization=True)
    # sentence-transformers writes the code of a module into its folder, and looks for it at the top.
    for code in sorted(folder.glob("*/*.py")):
        code.replace(folder / code.name)
    # Students learn without padding, or with padding on the right. On the left it moves the positions of a
    # model that counts them from the first token of a batch.
    path = folder / "tokenizer_config.json"
    tokenizer_config = json.loads(path.read_bytes()) if path.is_file() else {}
    if tokenizer_config.get("padding_side") == "left":
        write_json(path, {**tokenizer_config, "padding_side": "right"})
