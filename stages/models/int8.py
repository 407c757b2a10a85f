"""Models in a quarter of the bytes: int8 in place of float32, with a scale for each row or column.

For ONNX Runtime a graph is quantised by its own tool: weights of products by column, the word embeddings'
table as a whole; what is multiplied is rounded to int8 as it comes. For OpenVINO NNCF rounds weights alone,
which is closer to the model and slower. A table of a static model has a scale for
each row, and lies in a folder as model2vec writes it, which sentence-transformers 6 reads, too.
"""

from __future__ import annotations

import io
import json
import logging
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stages.models.loading import is_normalize
from stages.models.portable import STATIC
from storage.embeddings import rounded_to_int8

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def quantize_graph(source: Path, target: Path) -> None:
    """Write an ONNX graph in float32 as one in int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)  # it advises a preprocessing that changes nothing here
    try:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            # Signed: with unsigned weights ONNX Runtime was half as fast (AVX512 with VNNI).
            weight_type=QuantType.QInt8,
            # A product of two activations, in attention, loses more than it gains.
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        log.setLevel(level)


def compress_weights(source: Path, target: Path) -> None:
    """Write an ONNX graph as a model of OpenVINO with weights in int8.

    Args:
        source: The graph in float32.
        target: The .xml file to write, in a folder that is made; the weights go to a .bin file beside it.
    """
    # NNCF reports its use over the network unless this is set.
    os.environ["NNCF_CI"] = "1"
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)  # a table of what it does
    with redirect_stdout(io.StringIO()):  # and a progress bar
        graph = openvino.Core().read_model(source)
        small = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
    target.parent.mkdir()
    openvino.save_model(small, target)


def folded_table(model: SentenceTransformer) -> Tensor | None:
    """Returns (V, dim) float32 vectors of tokens whose mean is a text's vector; None for another model.

    Dense modules are linear, so they commute with the mean: each token's vector goes through them instead.
    """
    table, *others = model
    if type(table).__name__ != STATIC:
        return None
    vectors: Tensor = table.get_submodule("embedding").weight.detach()  # type: ignore[operator]
    for module in others:
        if type(module).__name__ == "Dense" and isinstance(module.activation_function, nn.Identity):
            vectors = module.get_submodule("linear")(vectors).detach()
        elif not is_normalize(module):
            return None
    return vectors


def write_table(table: Tensor, folder: Path, *, tokenizer: str, unit_length: bool) -> None:
    """Write a static model as model2vec does, in a folder that is made.

    int8 vectors and a weight for each token, of the (V, dim) float32 table, and the given tokenizer.json.
    """
    from safetensors.torch import save_file

    rows, scales = map(torch.from_numpy, rounded_to_int8(table.numpy()))
    kinds = [STATIC, "Normalize"] if unit_length else [STATIC]
    modules = [
        {
            "idx": place,
            "name": str(place),
            "path": f"{place}_{kind}" if place else ".",
            "type": f"sentence_transformers.models.{kind}",
        }
        for place, kind in enumerate(kinds)
    ]
    # It reads 512 tokens of a text if nothing is said.
    config = {"model_type": "model2vec", "normalize": unit_length, "max_length": None}
    folder.mkdir()
    save_file({"embeddings": rows, "weights": scales}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    for name, content in (("modules.json", modules), ("config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
