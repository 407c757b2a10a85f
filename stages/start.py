"""Write a start, a student before training: some layers of the teacher, a static model of it, or any model.

Or one with the teacher's tokenizer, and weights that are drawn at random (`stages.models.random`).

A static model is a table of its tokens' vectors (`stages.models.static`). Layers may be read several times
with the same weights (`stages.models.shared_layers`), the tokens may be those alone that the corpus uses
(`stages.models.vocabulary`), and layers may be narrower (`stages.models.narrow`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.measuring.heldout import NOT_MEASURED, StartRows, agreement_of_start
from stages.models.config import check_one_model, own_prompts
from stages.outcome import Outcome, write_json
from stages.params import TEACHER, StartParams
from storage import durable, regular
from storage.caches import Caches
from storage.corpus import Corpus
from storage.errors import MissingError, TeachonceError, shown

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

    from stages.measuring.metrics import EvaluatedModel
    from stages.models.layer_choice import LayerChoice
    from stages.models.vocabulary import CutVocabulary

VERSION = 1  # raise it when a code change makes another folder of the same settings and model


def recipe(
    params: StartParams,
    *,
    pooling: str | None,
    files: Mapping[str, str],
    corpus: Corpus | None,
    caches: Caches | None = None,
) -> dict[str, Any]:
    """What the folder of a start is made from; `pooling` as in `run`.

    The corpus and the caches are None for a start that does not read them, or choose layers by them.
    """
    chosen_by = {}
    if caches is not None:
        chosen_by = {
            "embeddings": caches.embeddings.manifest.content,
            "split": caches.split.content,
        }
    return {
        "version": VERSION,
        "start": params.model_dump(mode="json", by_alias=True, exclude_none=True),
        "pooling": pooling,
        "files": dict(files),
        "corpus": None if corpus is None else corpus.manifest.content,
        **chosen_by,
    }


def as_it_is(name: str, *, folder: Path, record: Path, made_from: str | None) -> Outcome | None:
    """The outcome for a start that cannot be made here, but exists already, made from the same model.

    `record` is the JSON file that `measure` left, `made_from` the fingerprint of the start's `recipe`, None
    if that is not known.

    Returns:
        None if it is not here, or was made from something else.
    """
    try:
        facts = json.loads(regular.content(record))
        is_same = made_from is not None and facts.pop("made_from") == made_from
    except (OSError, ValueError, LookupError, TypeError, AttributeError, TeachonceError):
        return None
    if not is_same or not (folder / "modules.json").is_file():
        return None
    summary = f"{name} stays as it was made of this model, which is not on this machine"
    facts = {key: value for key, value in facts.items() if not key.startswith("agreement")}
    return Outcome("start", folder, summary, facts)


def measure(
    outcome: Outcome,
    *,
    name: str,
    load: Callable[[], EvaluatedModel],
    caches: Callable[[], Caches],
    record: Path,
    made_from: str | None,
) -> Outcome:
    """Say of a start how far it agrees with its teacher before it is trained, and write down its facts.

    `made_from` is the fingerprint of its `recipe`, None if that is not known. Where there are no caches,
    the reason is said.
    """
    sentence, agreement = agreement_of_start(name, load, caches)
    facts = {**outcome.facts, **agreement}
    noted = {key: value for key, value in facts.items() if key != NOT_MEASURED}
    write_json(record, {**noted, "made_from": made_from})
    return replace(outcome, summary=f"{outcome.summary}; {sentence}", facts=facts)


def chosen_layers(
    name: str,
    caches: Callable[[], Caches],
    model: SentenceTransformer,
    count: int,
    *,
    max_tokens: int,
    device: torch.device,
) -> LayerChoice:
    """The `count` layers of a model by which it agrees most with the teacher on rows held out.

    Raises:
        MissingError: there are no vectors of rows held out.
        TeachonceError: the model has no such layers.
    """
    from stages.models.layer_choice import choose_layers

    address = f"starts.{name}.layers"
    try:
        rows = StartRows.of(caches())
    except TeachonceError as error:
        raise MissingError(
            address,
            f"{count} layers are chosen by the teacher's vectors of texts held out, and "
            f"{Path(error.where).name} is of no use: {error.problem}",
            f"{error.cure}; or name the layers, as in [0, 1]",
        ) from error
    return choose_layers(
        model,
        count,
        texts=rows.heldout.corpus.take(rows.heldout.rows),
        teacher=rows.teacher,
        max_tokens=max_tokens,
        device=device,
        address=address,
    )


def run(
    params: StartParams,
    *,
    name: str,
    folder: Path,
    trust_remote_code: bool,
    out: Path,
    pooling: str | None = None,
    corpus: Callable[[], Corpus] | None = None,
    choose: Callable[[SentenceTransformer, int], LayerChoice] | None = None,
) -> Outcome:
    """Write the start as a sentence-transformers folder.

    It is long because it reads in the order in which a start is made: tokens, layers, passes, saving.

    Args:
        params: The settings of the start.
        name: Name of the start.
        folder: Folder of the model that it is cut from.
        trust_remote_code: Whether code in that folder may run.
        out: The folder to write.
        pooling: Pooling of that model if it has no modules.json; the start gets one. None otherwise.
        corpus: Opens the corpus; called only if the start depends on it.
        choose: Chooses layers of a model; called only if the settings say how many, and not which.

    Raises:
        TeachonceError: its layers or tokens cannot be taken, or it has NaN or Inf in its weights.
    """
    from stages.models.factors import fold, folded_in
    from stages.models.layers import keep_layers
    from stages.models.loading import load_model, save_model
    from stages.models.narrow import check_saved
    from stages.models.shared_layers import copied, separate
    from stages.models.vocabulary import keep_tokens

    named_in = f"starts.{name}.{params.named_in}"
    check_one_model(folder, address=named_in)
    model = load_model(
        folder,
        device=torch.device("cpu"),
        trust_remote_code=trust_remote_code,
        pooling=pooling,
        setting="embed.pooling" if params.model == TEACHER else f"starts.{name}.pooling",
    )
    others = (params.passes, params.embedding)
    remade = any(others) or params.is_narrow or params.is_random
    fold(model)  # a start says itself whether its word embeddings are factors
    if params.layers is not None or remade:
        separate(model)  # layers of a model are taken one by one
    tokens = None
    # Before the layers, which are proved as they are saved: with the tokens that are kept.
    if params.vocabulary is not None:
        assert corpus is not None  # given for a start that reads it
        at = f"starts.{name}.vocabulary"
        tokens = keep_tokens(model, params.vocabulary, corpus=corpus(), address=at)
    layers, choice = _layers(params, model, choose)
    # As it is now: a narrow model is fitted to what the layers that it lacks do.
    transformer = getattr(model[0], "auto_model", None)
    proof = None
    if layers is not None:
        proof = keep_layers(model, layers, address=f"starts.{name}.layers")
    model = _remade(model, transformer, layers, params, corpus=corpus, address=f"starts.{name}")
    prompts = own_prompts(folder, str(folder))
    with durable.replace_folder(out) as scratch:
        save_model(model, scratch, address=named_in)
        if proof is not None and not remade:
            # else it is another model by now
            proof.check_saved(scratch, trust_remote_code=trust_remote_code)
        if tokens is not None:
            tokens.check_saved(scratch, model, trust_remote_code=trust_remote_code)
        if params.is_narrow:
            at = f"starts.{name}"
            check_saved(scratch, model, trust_remote_code=trust_remote_code, address=at)
    copies = copied(model) + folded_in(model)
    beyond = "with copies of shared layers" if copied(model) else "with whole word embeddings"
    parameters = sum(weight.numel() for weight in model.parameters())
    facts = {"parameters": parameters, "dim": model.get_embedding_dimension()}
    return Outcome(
        stage="start",
        made=out,
        summary=", ".join(
            [*_kept(params, tokens, choice), f"{parameters / 1e6:.1f} million parameters"]
        )
        + (f" ({(parameters + copies) / 1e6:.1f} {beyond})" if copies else "")
        + (f"; its own prompts ({', '.join(map(shown, prompts))}) are left out" if prompts else ""),
        facts=facts
        | {key: part.facts[key] for part in (tokens, choice) if part for key in part.facts},
    )


def _layers(
    params: StartParams,
    model: SentenceTransformer,
    choose: Callable[[SentenceTransformer, int], LayerChoice] | None,
) -> tuple[Sequence[int] | None, LayerChoice | None]:
    """The layers to keep, None for all; and how they were chosen, None if the settings name them."""
    if not isinstance(params.layers, int):
        return params.layers, None
    if params.is_random:
        return range(params.layers), None
    assert choose is not None  # given for a start that asks for it
    choice = choose(model, params.layers)
    return choice.layers, choice


def _remade(
    model: SentenceTransformer,
    whole: nn.Module | None,
    layers: Sequence[int] | None,
    params: StartParams,
    *,
    corpus: Callable[[], Corpus] | None,
    address: str,
) -> SentenceTransformer:
    """A model of the layers and tokens that are kept: drawn anew, narrower, of shared layers, or static.

    Args:
        model: The model; it may be changed in place.
        whole: Its transformer as it was before layers were taken out.
        layers: Those that were kept; None for all.
        params: The settings of the start.
        corpus: As for `run`.
        address: The place of the settings in params.yaml, to name in an error.
    """
    from stages.models.factors import factorise
    from stages.models.narrow import narrow_by_corpus
    from stages.models.random import drawn_at_random
    from stages.models.shared_layers import share_layers
    from stages.models.static import make_static

    if params.is_random:
        model = drawn_at_random(model, params, address=address)
    elif params.is_narrow:
        assert corpus is not None  # given for a start that reads it
        narrow_by_corpus(model, whole, params, layers, corpus=corpus(), address=address)
    if params.embedding is not None:
        assert corpus is not None  # likewise
        at = f"{address}.embedding"
        factorise(model, params.embedding, corpus=corpus(), address=at)
    if params.passes is not None:
        share_layers(model, params.passes, address=f"{address}.passes")
    if params.kind == "static" and params.hidden is not None and not params.is_random:
        assert corpus is not None  # given for a start that reads it
        return make_static(model, corpus(), width=params.hidden, address=address)
    return model


def _kept(
    params: StartParams, tokens: CutVocabulary | None, choice: LayerChoice | None
) -> list[str]:
    """What of a model a start has, for a person."""
    what = "all layers"
    if choice is not None:
        what = f"layers {list(choice.layers)}"
    elif isinstance(params.layers, tuple):
        what = f"layers {list(params.layers)}"
    elif params.layers is not None:
        what = f"{params.layers} layers"
    if params.is_narrow:
        widths = {name: getattr(params, name) for name in ("hidden", "intermediate", "heads")}
        what += f" ({', '.join(f'{name} {n}' for name, n in widths.items() if n is not None)})"
    if params.embedding is not None:
        what += f" (word embeddings of {params.embedding} columns)"
    if params.kind == "static":
        what = f"a table of {params.hidden} values for each token"
    what += f" {'like' if params.is_random else 'of'} {params.model}"
    if params.is_random:
        what += f", drawn at random (seed {params.seed or 0})"
    return [what, *(part.summary for part in (choice, tokens) if part)]
