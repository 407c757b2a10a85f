"""What a later stage would refuse and settings and sources tell already: `check` says it an hour before.

Small sources are read whole, since they alone can have too few rows; of others nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from stages.learning.judges import Labels
from stages.params import (
    DOCS_PAIR,
    DOCS_TEXT,
    LEAST_HELDOUT,
    EmbedParams,
    FinetuneParams,
    Problem,
    Sections,
    ShardParams,
)
from stages.reading.corpus_files import DatasetName, Rejected, read, sources_with_fields
from stages.reading.packages import missing
from storage.corpus import text_key
from storage.errors import TeachonceError
from storage.split import Split

SMALL_BYTES = 1 << 20
"""Of all files together: some 10,000 sentences, of which the smallest share held out is enough."""

TRACKERS = {
    "tensorboard": ("accelerate", "tensorboard"),
    "wandb": ("accelerate", "wandb"),
    "mlflow": ("accelerate", "mlflow"),
}
"""`tracker` -> the packages it needs."""

ONNX = ("onnx", "onnxscript", "onnxruntime")
"""What the extra `onnx` installs."""


PACKAGES_OF_FORMATS: Mapping[str, tuple[str, Sequence[str]]] = {
    "onnx": ("onnx", ONNX),
    "onnx-int8": ("onnx", ONNX),
    "openvino-int8": ("openvino", ("onnx", "onnxscript", "openvino", "nncf")),
}
"""Format of an export -> the extra that writes and runs it, and what that installs."""


def check_formats(formats: Sequence[str]) -> None:
    """Raise unless the extras are installed that formats of an export need."""
    for name in formats:
        extra, packages = PACKAGES_OF_FORMATS.get(name, ("", ()))
        if lacking := missing(packages):
            raise TeachonceError(
                "export.formats",
                f"has {name}, but {' and '.join(lacking)} cannot be imported",
                f'run `pip install "teachonce[{extra}]"`, or take {name} away',
            )


def absent_packages(sections: Sections) -> Iterator[TeachonceError]:
    """What the settings ask for and is not installed."""
    tracker = sections.get("tracker", "none")
    if lacking := missing(TRACKERS.get(tracker, ())):
        yield TeachonceError(
            "tracker",
            f"{tracker}, but {' and '.join(lacking)} cannot be imported",
            f"pip install 'teachonce[train]' {tracker}, or set it to none",
        )
    if sections.get("engine") == "ray" and missing(["ray"]):
        yield TeachonceError(
            "engine",
            "ray, which cannot be imported",
            "pip install 'teachonce[ray]', or set another",
        )
    try:
        check_formats(getattr(sections.get("export"), "formats", ()))
    except TeachonceError as error:
        yield error


def api_notes(params: EmbedParams, environment: Mapping[str, str]) -> Iterator[str]:
    """What a teacher behind an API will lack on this machine, such as a key, or do slowly."""
    if params.api_model is None:
        return
    variable = params.api.key_env
    if variable is not None and not environment.get(variable):
        yield (
            f"embed.api.key_env: ${variable} is not set here, so nothing can be embedded; what is in the "
            "store needs no key"
        )
    if params.api.tokenizer is None:
        yield (
            f"embed.api.tokenizer: null, so a text of more than {params.max_tokens:,} bytes "
            "(embed.max_tokens) is asked for alone, and refused if the server counts so many tokens; set "
            "embed.max_tokens to what the model reads at most, or name its tokenizer"
        )
    if params.api.budget is None:
        yield "embed.api.budget: null, so nothing ends a pass that costs more than you thought"


def check_heldout(params: ShardParams, heldout: float, root: Path) -> None:
    """Raise if a share so small of a small corpus is held out that no student can be judged."""
    named = [
        (role, source, field)
        for role in params.roles
        for source, field in sources_with_fields(params, role, root)
    ]
    if any(isinstance(source, DatasetName) for _, source, _ in named):
        return
    if not _are_small([source for _, source, _ in named if isinstance(source, Path)]):
        return
    keys = {
        text_key(text, role)
        for role, source, field in named
        for item in read(source, field)
        if not isinstance(item, Rejected)
        and params.min_chars <= len(text := item.strip()) <= params.max_chars
    }
    if not keys:
        return  # `shard` says by which rule each is lost
    split = Split(corpus="", heldout=heldout, evaluation=())
    heldout_count = int(split.is_heldout(np.array(sorted(keys), "V16")).sum())
    if heldout_count < LEAST_HELDOUT:
        raise TeachonceError(
            "split.heldout",
            f"{heldout:g}, which holds out {heldout_count} of the {len(keys):,} texts of shard.sources; "
            f"training is judged by {LEAST_HELDOUT} at least",
            "raise it, or give shard.sources more texts",
        )


def check_labels(params: FinetuneParams, files: Sequence[Path], root: Path) -> None:
    """Raise if so few labelled rows are in small files that nothing can be learned and judged."""
    if _are_small(files):
        Labels.read(params, root, ())


def other_fields(sections: Sections, *, texts: bool, pairs: bool) -> list[Problem]:
    """Names of fields that are not those in the files of `docs`, where its texts or pairs are read."""
    wrong = []
    field = getattr(sections.get("shard"), "field", DOCS_TEXT)
    if texts and field != DOCS_TEXT:
        wrong.append(("shard.field", f"{field}, but the texts of docs stand under {DOCS_TEXT}"))
    fields = tuple(getattr(sections.get("finetune"), "fields", DOCS_PAIR))[:2]
    if pairs and fields != DOCS_PAIR:
        named, wanted = ", ".join(fields), ", ".join(DOCS_PAIR)
        wrong.append(
            (
                "finetune.fields",
                f"{named}, but the pairs of docs stand under {wanted}, in this order",
            )
        )
    return wrong


def _are_small(files: Sequence[Path]) -> bool:
    # Compressed ones may be large inside.
    plain = not any(path.suffix.lower() in {".gz", ".zst"} for path in files)
    return bool(files) and plain and sum(path.stat().st_size for path in files) <= SMALL_BYTES
