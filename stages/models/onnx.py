"""Write a model as an ONNX graph: token ids and mask in, token vectors and the text's vector out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.models.portable import STATIC
from storage.errors import TeachonceError, first_line

if TYPE_CHECKING:
    import onnx_ir
    from sentence_transformers import SentenceTransformer

INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "sentence_embedding")
AXES = {0: "batch_size", 1: "sequence_length"}


class Graph(nn.Module):
    """All modules of a model as one function of tensors."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.body = nn.ModuleList(list(model))

    def forward(self, token_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) token ids and mask -> (B, L, H) token vectors, (B, D) vectors."""
        features = dict(zip(INPUTS, (token_ids, mask), strict=True))
        for module in self.body:
            features = module(features)
        return features["token_embeddings"], features["sentence_embedding"]


def write_onnx(model: SentenceTransformer, path: Path, *, address: str) -> None:
    """Write the graph of a model in float32, with dynamic batch size and length.

    Args:
        model: The model in float32, on the CPU.
        path: The file to write; more than 2 GB of weights go into a second file beside it.
        address: Name of the model in errors.

    Raises:
        TeachonceError: the exporter does not support the architecture.
    """
    if type(model[0]).__name__ == STATIC:
        raise TeachonceError(
            address,
            "a static model has no ONNX form: it is a table and a mean",
            "take onnx out of export.formats",
        )
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # Neither axis is 0 or 1 long here: the exporter would take these for constants.
    token_ids = torch.ones(2, 3, dtype=torch.long)
    graph = Graph(model).eval()
    with _quiet(), _eager_attention(model):
        try:
            program = torch.onnx.export(
                graph,
                (token_ids, torch.ones_like(token_ids)),
                dynamo=True,
                dynamic_shapes=(AXES, AXES),
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise TeachonceError(
                address,
                f"PyTorch cannot turn it into ONNX: {first_line(error)}",
                "take onnx out of export.formats",
            ) from error
        assert program is not None  # as it would be with dynamo=False
        # Each node comes with the lines of code that made it, paths of this machine included.
        ClearMetadataAndDocStringPass()(program.model)
        _keep_layer_norms(program.model.graph)
        path.parent.mkdir()
        program.save(path)


def run_onnx(path: Path, model: SentenceTransformer, texts: Sequence[str]) -> NDArray[np.float32]:
    """Returns (n, D) vectors of `texts` from a graph, with `model`'s tokenizer and without a prompt."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    features: dict[str, Any] = model.preprocess(list(texts))
    inputs = {name: features[name].numpy() for name in INPUTS}
    [vectors] = session.run(["sentence_embedding"], inputs)
    outputs: NDArray[np.float32] = vectors
    return outputs


@contextmanager
def _eager_attention(model: SentenceTransformer) -> Iterator[None]:
    """Let attention be a product, a softmax and a product: torch's own becomes nodes that look for NaN."""
    body = getattr(model[0], "auto_model", None)
    if body is None:
        yield
        return
    implementation = body.config._attn_implementation
    body.set_attn_implementation("eager")
    try:
        yield
    finally:
        body.set_attn_implementation(implementation)


def _keep_layer_norms(graph: onnx_ir.Graph) -> None:
    """Write each addition before a layer norm as `Sum`, which is the same.

    ONNX Runtime joins `Add` and the norm into one node, SkipLayerNormalization, which on a CPU takes about
    three times as long as the two, by its own profiler (`benchmarks/graphs.py` times whole graphs).
    """
    for node in graph:
        if node.op_type == "LayerNormalization" and (states := node.inputs[0]) is not None:
            added = states.producer()
            if added is not None and added.op_type == "Add":
                added.op_type = "Sum"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's messages, which concern its own parts and torchvision."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
