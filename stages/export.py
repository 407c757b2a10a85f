"""Export a trained student as a folder of stock modules, and check that copy by loading it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.models.folder import weights_bytes
from stages.models.lineage import LINEAGE, prompts_read
from stages.outcome import Outcome, write_json
from stages.params import ExportParams
from stages.preflight import check_onnx
from stages.reporting.card import Card, model_card
from storage import durable
from storage.errors import DamagedError, TeachonceError
from storage.roles import Role

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

VERSION = 3  # raise it when a code change alters the export of the same model


def run(
    params: ExportParams,
    *,
    folder: Path,
    lineage: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, str],
    out: Path,
    trust_remote_code: bool = False,
) -> Outcome:
    """Write the export of a student.

    Args:
        params: The settings `export`.
        folder: Folder of the student.
        lineage: The content of the student's `teachonce.json`.
        metrics: Model -> flat metrics, for the card; as many as there are.
        facts: Label -> text, for the card.
        trust_remote_code: Whether code in the folder of the student may run; it goes along.
        out: The folder to write; an old one stays until the new one has been loaded and compared.

    Raises:
        TeachonceError: a copy that does not give the model's vectors, or an extra that is missing.
        DamagedError: `folder` is not what its lineage says.
    """
    from stages.models.loading import load_model
    from stages.models.onnx import write_onnx
    from stages.models.portable import save_portable
    from stages.models.shared_layers import copied

    if params.onnx:
        check_onnx()
    cpu = torch.device("cpu")
    model = load_model(folder, device=cpu, trust_remote_code=trust_remote_code)
    prompts = prompts_read(lineage)
    if params.onnx and prompts:
        _check_graph_knows_prompts(model)
    dropped = bool(lineage.get("projection")) and params.space == "student"
    if dropped:
        _drop_projection(model, folder)
    with durable.replace_folder(out) as scratch:
        save_portable(model, scratch, address=str(folder), prompts=prompts)
        cosines = {"safetensors": _check_copy(model, scratch, out, trust_remote_code)}
        if params.onnx:
            path = scratch / "onnx" / "model.onnx"
            write_onnx(model, path, address=str(folder))
            cosines["ONNX"] = _check_onnx(model, path, out)
        write_json(scratch / LINEAGE, {**lineage, "space": params.space})
        card = _card(params, model, scratch, prompts, dropped=dropped)
        text = model_card(card, lineage=lineage, metrics=metrics, facts=facts)
        (scratch / "README.md").write_text(text, encoding="utf-8")
        megabytes = weights_bytes(scratch) / 1e6
        copies = 4 * copied(model) / 1e6  # float32
        shared = (
            f" instead of {megabytes - copies:.1f}: shared layers are expanded" if copies else ""
        )
    return Outcome(
        stage="export",
        made=out,
        summary=f"{params.model} as {' and '.join(cosines)}, {megabytes:.1f} MB{shared}, vectors of "
        f"{card.dim} numbers in {_space(params, lineage)}; read back: lowest "
        f"cosine to the model's own {min(cosines.values()):.6f}",
        facts={
            "model": params.model,
            "space": params.space,
            "projection_dropped": dropped,
            "dim": card.dim,
            "max_tokens": card.max_tokens,
            "megabytes": round(megabytes, 3),
            **({"megabytes_of_copies": round(copies, 3)} if copies else {}),
            "cosine": {form: round(cosine, 7) for form, cosine in cosines.items()},
        },
    )


def _space(params: ExportParams, lineage: Mapping[str, Any]) -> str:
    if not lineage.get("projection"):
        return "the teacher's space, which is the student's own (no projection)"
    return f"the {params.space}'s space"


def _card(
    params: ExportParams,
    model: SentenceTransformer,
    copy: Path,
    prompts: Mapping[Role, str],
    *,
    dropped: bool,
) -> Card:
    from stages.models.loading import ends_in_normalize
    from stages.models.portable import limit_of, old_ones_read

    return Card(
        name=params.model,
        dim=model.get_embedding_dimension() or 0,
        unit_length=ends_in_normalize(model),
        max_tokens=limit_of(model),
        dropped=dropped,
        old_ones_read=old_ones_read(model),
        onnx=params.onnx,
        has_code=any(copy.rglob("*.py")),
        prompts=prompts,
    )


def _drop_projection(model: SentenceTransformer, folder: Path) -> None:
    """Remove the last Dense module of a model, which is the projection by its lineage."""
    dense = [place for place, module in enumerate(model) if type(module).__name__ == "Dense"]
    if not dense:
        raise DamagedError(
            folder,
            "teachonce.json says that it has a projection, but it has no Dense module",
            f"run `teachonce distill {folder.name}`",
        )
    del model[dense[-1]]


def _check_graph_knows_prompts(model: SentenceTransformer) -> None:
    from stages.models.loading import leaves_out_prompts

    if leaves_out_prompts(model):
        raise TeachonceError(
            "export.onnx",
            "true, but the student's vectors leave out the tokens of its prompts, and the graph has no "
            "input that says how many these are",
            "set it to false, or train a student with prompts: none",
        )


def _check_copy(
    model: SentenceTransformer, copy: Path, out: Path, trust_remote_code: bool
) -> float:
    """Returns the lowest cosine between a model's vectors and those of its copy in safetensors."""
    from stages.models.likeness import encode, likeness, probes
    from stages.models.loading import load_model
    from stages.models.portable import limit_of

    cpu = torch.device("cpu")
    loaded = load_model(copy, device=cpu, trust_remote_code=trust_remote_code)
    texts = probes(limit_of(model))
    # By name: the copy has to know its prompts, too.
    names = [None, *sorted(name for name, prompt in model.prompts.items() if prompt)]
    try:
        return min(
            likeness(
                encode(model, texts, prompt_name=name), encode(loaded, texts, prompt_name=name)
            )
            for name in names
        )
    except ValueError as error:
        raise _refused(out, "safetensors", error) from error


def _check_onnx(model: SentenceTransformer, path: Path, out: Path) -> float:
    """Returns the lowest cosine of the ONNX copy's vectors with the model's, without prompts."""
    from stages.models.likeness import encode, likeness, probes
    from stages.models.onnx import run_onnx
    from stages.models.portable import limit_of

    texts = probes(limit_of(model))
    try:
        return likeness(encode(model, texts, prompt=""), run_onnx(path, model, texts))
    except ValueError as error:
        raise _refused(out, "ONNX", error) from error


def _refused(out: Path, form: str, problem: ValueError) -> TeachonceError:
    return TeachonceError(
        out,
        f"not written, since the copy in {form} is not the model: {problem}",
        "distill from a start whose modules are Transformer, Pooling (one mode), Dense and Normalize",
    )
