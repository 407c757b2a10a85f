"""Export a trained student as a folder of stock modules and in other formats; load and measure each.

The folder itself is what sentence-transformers loads. Formats beside it, such as ONNX in int8, are measured
as `evaluate` measures the student, and one that loses too much is not published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.measuring.loss import Comparison, agreement, loss
from stages.models.forms import (
    PLACES,
    OpenForm,
    halve_weights,
    megabytes_of,
    misfit,
    opener,
    remove_form,
    write_forms,
)
from stages.models.likeness import LEAST_COSINE
from stages.models.lineage import LINEAGE, prompts_read
from stages.outcome import Fact, Outcome, log, write_json
from stages.params import BASE_FORMATS, ExportFormat, ExportParams
from stages.preflight import check_formats
from stages.reporting.card import Card, PublishedFormat, model_card
from stages.reporting.results import quality_of
from storage import durable
from storage.errors import DamagedError, TeachonceError
from storage.roles import Role

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

VERSION = 5  # raise it when a code change alters the export of the same model

LEAST_FP16_COSINE = 0.9999
"""Of a copy whose weights were rounded to float16."""

Metrics = Mapping[str, Fact]


@dataclass(frozen=True)
class Exported:
    """A student on its way out.

    Args:
        model: Its modules, without a projection that is left out.
        params: The settings `export`.
        prompts: Role -> what it reads before texts of that role.
        formats: What is written of it: the base, then the others.
        left_out: Format that it cannot have -> why.
        dropped: Whether its projection was left out.
        trust_remote_code: Whether code in its folder may run.
    """

    model: SentenceTransformer
    params: ExportParams
    prompts: Mapping[Role, str]
    formats: Sequence[ExportFormat]
    left_out: Mapping[ExportFormat, str]
    dropped: bool
    trust_remote_code: bool

    def opener(self, form: ExportFormat, folder: Path) -> OpenForm:
        """What loads one of the formats from the folder of the export."""
        return opener(
            form,
            self.model,
            folder,
            prompts=self.prompts,
            trust_remote_code=self.trust_remote_code,
        )


def run(
    params: ExportParams,
    *,
    folder: Path,
    lineage: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, str],
    out: Path,
    results: Path,
    comparison: Comparison,
    trust_remote_code: bool = False,
) -> Outcome:
    """Write the export of a student.

    Args:
        params: The settings `export`; `model` is the student.
        folder: Folder of the student.
        lineage: The content of the student's `teachonce.json`.
        metrics: Model -> flat metrics, for the card; as many as there are.
        facts: Label -> text, for the card.
        out: The folder to write; an old one stays until the new one has been loaded and compared.
        results: The file to write: format -> metrics, and whether and why it is published; and which
            model these are of.
        comparison: Measures the formats beside the base.
        trust_remote_code: Whether code in the folder of the student may run; it goes along.

    Raises:
        TeachonceError: a copy that does not give the model's vectors, or an extra that is missing.
        DamagedError: `folder` is not what its lineage says.
    """
    from stages.models.factors import folded_in
    from stages.models.portable import save_portable
    from stages.models.shared_layers import copied

    check_formats(params.formats)
    student = _open(params, folder, lineage, trust_remote_code)
    base, *others = student.formats
    with durable.replace_folder(out) as scratch:
        save_portable(student.model, scratch, address=str(folder), prompts=student.prompts)
        cosines = {base: _check_base(student, scratch, out)}
        write_forms(others, student.model, scratch, address=str(folder))
        if "onnx" in others:
            cosines["onnx"] = _check_onnx(student, scratch, out)
        found = _measured(student, scratch, metrics.get(params.model, {}), comparison)
        write_json(scratch / LINEAGE, {**lineage, "space": params.space})
        card = _card(student, scratch, found)
        text = model_card(card, lineage=lineage, metrics=metrics, facts=facts)
        (scratch / "README.md").write_text(text, encoding="utf-8")
    quality = quality_of(metrics.get(params.model, {}))
    write_json(results, {"model": params.model, "quality": quality, "formats": found})
    width = 2 if base == "safetensors-fp16" else 4  # bytes of a weight
    copies = width * (copied(student.model) + folded_in(student.model)) / 1e6
    megabytes = float(found[base]["megabytes"] or 0)
    whole = "the two factors of its word embeddings are one table"
    why = whole if folded_in(student.model) else "shared layers are expanded"
    shared = f" instead of {megabytes - copies:.1f}: {why}" if copies else ""
    return Outcome(
        stage="export",
        made=out,
        summary=f"{params.model} as {base}, {megabytes:.1f} MB{shared}, vectors of "
        f"{card.dim} numbers in {_space(params, lineage)}; read back: lowest "
        f"cosine to the model's own {min(cosines.values()):.6f}"
        + "".join(f"; {line}" for line in _told(student, found)),
        facts={
            "model": params.model,
            "space": params.space,
            "projection_dropped": student.dropped,
            "dim": card.dim,
            "max_tokens": card.max_tokens,
            "megabytes": round(megabytes, 3),
            **({"megabytes_of_copies": round(copies, 3)} if copies else {}),
            "cosine": {form: round(cosine, 7) for form, cosine in cosines.items()},
            "formats": found,
            "left_out": student.left_out,
        },
    )


def _open(
    params: ExportParams, folder: Path, lineage: Mapping[str, Any], trust_remote_code: bool
) -> Exported:
    from stages.models.loading import load_model

    model = load_model(folder, device=torch.device("cpu"), trust_remote_code=trust_remote_code)
    prompts = prompts_read(lineage)
    dropped = bool(lineage.get("projection")) and params.space == "student"
    if dropped:
        _drop_projection(model, folder)
    left_out = {form: reason for form in params.formats if (reason := misfit(form, model, prompts))}
    base: ExportFormat = "safetensors" if params.base in left_out else params.base
    others = [form for form in params.formats if form not in {*BASE_FORMATS, *left_out}]
    return Exported(model, params, prompts, [base, *others], left_out, dropped, trust_remote_code)


def _measured(
    student: Exported, folder: Path, own: Metrics, comparison: Comparison
) -> dict[ExportFormat, Metrics]:
    """Format -> its metrics, and whether and why it is published; what is not is removed.

    Those of the base are the student's `own`, but where no projection was left out that they were measured
    with.
    """
    base, *others = student.formats
    name = student.params.model
    published: Metrics = {"published": True, "reason": ""}
    size = {"megabytes": round(megabytes_of(base, folder), 3)}
    if not others:
        return {base: {**own, **size, **published}}
    open_base = student.opener(base, folder)
    if student.dropped:
        own = comparison.evaluate(f"{name} as {base}", open_base)
    found: dict[ExportFormat, Metrics] = {base: {**own, **size, **published}}
    heldout, reference = comparison.heldout(), open_base(None)
    for form in others:
        log.info("export: %s as %s is measured", name, form)
        open_form = student.opener(form, folder)
        measured = {
            **comparison.evaluate(f"{name} as {form}", open_form),
            **agreement(reference, open_form(None), heldout),
            "megabytes": round(megabytes_of(form, folder), 3),
        }
        what, lost = loss(own, measured)
        # Not `lost > max_loss`, which is False for NaN.
        if lost <= student.params.max_loss:
            found[form] = {**measured, "loss": round(lost, 6), **published}
            continue
        remove_form(form, folder)
        reason = (
            f"it loses {lost:.1%} of the student's {what}, and export.max_loss allows "
            f"{student.params.max_loss:.1%}"
        )
        log.warning("export: %s as %s is not published: %s", name, form, reason)
        found[form] = {**measured, "loss": round(lost, 6), "published": False, "reason": reason}
    return found


def _told(student: Exported, found: Mapping[ExportFormat, Metrics]) -> list[str]:
    """A phrase for each format beside the base, and for those that were left out."""
    own = found[student.formats[0]]
    lines = []
    for form in student.formats[1:]:
        form_metrics = found[form]
        faster = ""
        if form_metrics.get("device") == own.get("device") and own.get("texts_per_reference"):
            times = float(form_metrics["texts_per_reference"] or 0) / float(
                own["texts_per_reference"] or 1
            )
            faster = f", {times:.1f} times as fast"
        line = (
            f"{form}: {form_metrics['megabytes']:.1f} MB{faster}, loses {form_metrics['loss']:.1%}"
        )
        if not form_metrics["published"]:
            line = f"{form} is not published: {form_metrics['reason']}"
        lines.append(line)
    forms_of: dict[str, list[str]] = {}
    for form, reason in student.left_out.items():
        forms_of.setdefault(reason, []).append(form)
    return lines + [f"without {', '.join(forms)}: {reason}" for reason, forms in forms_of.items()]


def _space(params: ExportParams, lineage: Mapping[str, Any]) -> str:
    if not lineage.get("projection"):
        return "the teacher's space, which is the student's own (no projection)"
    return f"the {params.space}'s space"


def _card(student: Exported, copy: Path, found: Mapping[ExportFormat, Metrics]) -> Card:
    from stages.models.loading import ends_in_normalize
    from stages.models.portable import limit_of, old_ones_read

    model = student.model
    return Card(
        name=student.params.model,
        dim=model.get_embedding_dimension() or 0,
        unit_length=ends_in_normalize(model),
        max_tokens=limit_of(model),
        dropped=student.dropped,
        old_ones_read=old_ones_read(model),
        formats=[
            PublishedFormat(
                form,
                PLACES.get(form, ""),
                megabytes=float(one["megabytes"] or 0),
                speed=float(one["texts_per_reference"] or 0) if "device" in one else None,
                loss=float(one["loss"] or 0) if "loss" in one else None,
            )
            for form, one in found.items()
            if one["published"]
        ],
        has_code=any(copy.rglob("*.py")),
        prompts=student.prompts,
        padding=getattr(model.tokenizer, "pad_token_id", None) or 0,
        cut_at=getattr(model.tokenizer, "truncation_side", "right"),
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


def _check_base(student: Exported, copy: Path, out: Path) -> float:
    """Returns the lowest cosine between a model's vectors and those of its copy, halved if it is to be."""
    if student.formats[0] == "safetensors":
        return _check_copy(student, copy, out)
    halve_weights(copy)
    return _check_copy(student, copy, out, least=LEAST_FP16_COSINE)


def _check_copy(student: Exported, copy: Path, out: Path, least: float = LEAST_COSINE) -> float:
    """Returns the lowest cosine between a model's vectors and those of its copy in safetensors."""
    from stages.models.likeness import encode, likeness, probes
    from stages.models.loading import load_model
    from stages.models.portable import limit_of

    model = student.model
    loaded = load_model(
        copy, device=torch.device("cpu"), trust_remote_code=student.trust_remote_code
    )
    texts = probes(limit_of(model))
    # By name: the copy has to know its prompts, too.
    names = [None, *sorted(name for name, prompt in model.prompts.items() if prompt)]
    try:
        return min(
            likeness(
                encode(model, texts, prompt_name=name),
                encode(loaded, texts, prompt_name=name),
                least=least,
            )
            for name in names
        )
    except ValueError as error:
        raise _refused(out, student.formats[0], error) from error


def _check_onnx(student: Exported, folder: Path, out: Path) -> float:
    """Returns the lowest cosine of the ONNX copy's vectors with the model's, without prompts."""
    from stages.models.likeness import encode, likeness, probes
    from stages.models.onnx import run_onnx
    from stages.models.portable import limit_of

    texts, path = probes(limit_of(student.model)), folder / PLACES["onnx"]
    try:
        return likeness(
            encode(student.model, texts, prompt=""), run_onnx(path, student.model, texts)
        )
    except ValueError as error:
        raise _refused(out, "ONNX", error) from error


def _refused(out: Path, form: str, problem: ValueError) -> TeachonceError:
    return TeachonceError(
        out,
        f"not written, since the copy in {form} is not the model: {problem}",
        "distill from a start whose modules are Transformer, Pooling (one mode), Dense and Normalize",
    )
