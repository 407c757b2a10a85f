"""The forms of an exported model beside the one that sentence-transformers loads: write, open, remove."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING

import torch

from stages.models.encoder import Encoder
from stages.models.factors import COLUMNS
from stages.models.folder import TOKENIZER, weights_bytes
from stages.models.graph_encoder import GraphEncoder, onnx_runner, openvino_runner
from stages.models.int8 import compress_weights, folded_table, quantize_graph, write_table
from stages.models.loading import ends_in_normalize, leaves_out_prompts
from stages.models.onnx import write_onnx
from stages.models.portable import STATIC, limit_of
from stages.params import BASE_FORMATS, ExportFormat
from storage.roles import Role

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PLACES: Mapping[ExportFormat, str] = {
    "onnx": "onnx/model.onnx",
    "onnx-int8": "onnx/model_int8.onnx",
    "openvino-int8": "openvino/openvino_model.xml",
    "static-int8": "static-int8",
}
"""Format beside the base -> its file or folder in an export."""

OpenForm = Callable[[int | None], Encoder | GraphEncoder]
"""Loads a form that reads this many tokens of a text; None for as many as it can."""


def misfit(
    form: ExportFormat, model: SentenceTransformer, prompts: Mapping[Role, str]
) -> str | None:
    """Returns why a model has no such form; None if it has one."""
    static = type(model[0]).__name__ == STATIC
    if form == "static-int8":
        return (
            None if folded_table(model) is not None else "it is no table of tokens and their mean"
        )
    if static and form in PLACES:
        return "a static model is a table and a mean, which needs no graph"
    if static and form == "safetensors-fp16":
        return (
            "sentence-transformers would add the table's vectors up in float16, so it is in float32"
        )
    if form in PLACES and prompts and leaves_out_prompts(model):
        return (
            "its vectors leave out the tokens of its prompts, and a graph has no input that says how "
            "many these are"
        )
    return None


def halve_weights(folder: Path) -> None:
    """Store the weights of a folder as float16; its config.json goes on saying float32.

    So it is loaded and computed in float32: half of the bytes, and no slower.
    """
    from safetensors.torch import load_file, save_file

    for path in sorted(folder.rglob("*.safetensors")):
        weights = {
            name: value.half() if value.is_floating_point() else value
            for name, value in load_file(path).items()
        }
        save_file(weights, path, metadata={"format": "pt"})
    # A table of two factors is none any more, since each value is rounded by itself.
    for path in sorted(folder.rglob("config.json")):
        config = json.loads(path.read_bytes())
        if config.pop(COLUMNS, None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_forms(
    forms: Sequence[ExportFormat], model: SentenceTransformer, folder: Path, *, address: str
) -> None:
    """Write forms of a model into the folder of its base.

    Raises:
        TeachonceError: PyTorch cannot turn it into a graph.
    """
    if "static-int8" in forms:
        table = folded_table(model)
        assert table is not None  # by `misfit`
        write_table(
            table,
            folder / PLACES["static-int8"],
            tokenizer=next(folder.rglob(TOKENIZER)).read_text(encoding="utf-8"),
            unit_length=ends_in_normalize(model),
        )
    graph = folder / PLACES["onnx"]
    if {"onnx", "onnx-int8", "openvino-int8"} & set(forms):
        write_onnx(model, graph, address=address)
        if "onnx-int8" in forms:
            quantize_graph(graph, folder / PLACES["onnx-int8"])
        if "openvino-int8" in forms:
            compress_weights(graph, folder / PLACES["openvino-int8"])
        if "onnx" not in forms:
            remove_form("onnx", folder)


def files_of(form: ExportFormat, folder: Path) -> list[Path]:
    """Returns the files of a graph; more than 2 GB of its weights lie in a second one."""
    path = folder / PLACES[form]
    return sorted(path.parent.glob(f"{path.stem}.*"))


def remove_form(form: ExportFormat, folder: Path) -> None:
    """Remove a form that is not to be published."""
    path = folder / PLACES[form]
    if path.is_dir():
        rmtree(path)
        return
    for file in files_of(form, folder):
        file.unlink()
    if not any(path.parent.iterdir()):
        path.parent.rmdir()


def megabytes_of(form: ExportFormat, folder: Path) -> float:
    """Returns the size of a form's weights in 10^6 bytes."""
    if form in BASE_FORMATS or (folder / PLACES[form]).is_dir():
        return weights_bytes(folder / PLACES.get(form, "")) / 1e6
    return sum(path.stat().st_size for path in files_of(form, folder)) / 1e6


def opener(
    form: ExportFormat,
    model: SentenceTransformer,
    folder: Path,
    *,
    prompts: Mapping[Role, str],
    trust_remote_code: bool,
) -> OpenForm:
    """Returns what loads a form, the base included, to run on the CPU."""
    path = folder / PLACES.get(form, "")
    if path.is_dir():
        return lambda max_tokens: Encoder(
            path,
            device=torch.device("cpu"),
            max_tokens=max_tokens,
            or_fewer=True,
            prompts=prompts,
            trust_remote_code=trust_remote_code,
        )
    limit, run = limit_of(model), openvino_runner if form == "openvino-int8" else onnx_runner
    return lambda max_tokens: GraphEncoder(
        run(path),
        folder,
        max_tokens=min((each for each in (max_tokens, limit) if each is not None), default=None),
        truncation=model.tokenizer.truncation_side,
        padding=model.tokenizer.pad_token_id or 0,
        megabytes=megabytes_of(form, folder),
        parameters=sum(weight.numel() for weight in model.parameters()),
        prompts=prompts,
    )
