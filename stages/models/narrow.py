"""Make a transformer of BERT's kind narrower: fewer values between layers, neurons and heads.

The small model is built anew from the smaller configuration, and fitted to what the large one makes of
texts of the corpus. Between layers it has the principal components of the large model's states: one
rotation for all layers, as they share the residual stream. A LayerNorm behind each sum does not turn along,
so no such cut is exact. Hence each linear map begins with its rotated rows and columns, and then gets the
least change (ridge regression) with which its output is what the large model has at that place, given what
the small one really reads there: later maps mend what earlier ones have lost. The gains and biases of norms
are fitted in the same way. Where nothing is cut there is nothing to mend, and the model stays as it is.

A layer whose followers are left out is fitted to the states in front of the next layer that is kept: it
does the work of those between as far as a linear map can. A Dense behind the pooling leads back to the
width that there was. This file is long because each part of a layer is cut and fitted in its own way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stages.models.components import principal_components
from stages.models.layers import PROOF_TEXTS, distance, token_vectors
from stages.models.loading import load_model
from stages.models.widths import WHOLE, Widths, narrower, not_of_bert, setting_of
from stages.params import StartParams
from storage.corpus import Corpus
from storage.errors import TeachonceError
from storage.split import drawn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SAMPLE = 500
"""Texts of the corpus that a small model is fitted to."""

LONGEST = 64
"""Tokens of such a text, at most: what is remembered of a layer grows with them."""

AT_ONCE = 64
"""Texts that are read at once, all of one length: so none is padded."""

RIDGE = 1e-2
"""Strength of the regression against change, as a share of the mean second moment of what a map reads."""

TOLERANCE = 1e-5
"""Largest difference between token vectors once saved and loaded, relative to their largest value."""

Model = Any
"""A model of transformers, or a part of one; their classes have no useful common type."""


@dataclass(frozen=True)
class Trace:
    """What a layer makes of all tokens of some texts, part by part; each (tokens, values)."""

    query: Tensor
    key: Tensor
    value: Tensor
    context: Tensor  # of the heads, side by side
    middle_sum: Tensor
    middle: Tensor  # after the norm of that sum
    neurons: Tensor  # before their activation
    active: Tensor
    end_sum: Tensor
    end: Tensor


def narrow_by_corpus(
    model: SentenceTransformer,
    whole: Model,
    start: StartParams,
    layers: Sequence[int] | None,
    *,
    corpus: Corpus,
    address: str,
) -> None:
    """As `make_narrow`, with texts of a corpus: none that is held out, unless nearly all are needed."""
    texts = corpus.take(drawn(corpus.text_keys, SAMPLE))
    make_narrow(model, whole, start, layers, texts, address=address)


@torch.no_grad()
def make_narrow(
    model: SentenceTransformer,
    whole: Model,
    start: StartParams,
    layers: Sequence[int] | None,
    texts: Sequence[str],
    *,
    address: str,
) -> None:
    """Make a transformer narrower, in place.

    Args:
        model: The model, on the CPU.
        whole: The transformer as it was before layers were taken out of it; else its own.
        start: The settings, with the widths.
        layers: 0-based numbers of the layers of `whole` that the model has; None for all.
        texts: Texts to fit the narrow model to.
        address: The place of the settings in params.yaml, to name in an error.

    Raises:
        TeachonceError: no such model can be made of this one.
    """
    transformer: Any = model[0]
    body: Model = getattr(transformer, "auto_model", None)
    if body is None:
        raise not_of_bert(type(transformer).__name__, setting_of(start, address))
    widths = narrower(body.config.to_dict(), start, address=address)
    # Read in another order, the whole model has no states that the layers could be fitted to.
    if layers is None or list(layers) != sorted(layers):
        whole, layers = body, range(len(body.encoder.layer))
    groups = _of_one_length(model, texts)
    basis = _basis(whole, layers, groups, widths.hidden)
    small = _built(body, widths, basis)
    states = _fit_embeddings(small, whole, groups, basis)
    for block, (own, wanted) in zip(
        small.encoder.layer, _wanted(whole, layers, groups), strict=True
    ):
        layer = whole.encoder.layer[layers[block.attention.self.layer_idx]]
        states = _fit_layer(block, layer, own, wanted, states, basis)
    setattr(transformer, "model" if hasattr(transformer, "model") else "auto_model", small)
    if widths.hidden < body.config.hidden_size:
        _lead_back(model, _flat(states), wanted.end, basis)


def check_saved(
    folder: Path, model: SentenceTransformer, *, trust_remote_code: bool, address: str
) -> None:
    """Raise if a narrow model reads otherwise once it was saved in a folder and loaded."""
    saved = load_model(folder, device=torch.device("cpu"), trust_remote_code=trust_remote_code)
    pairs = zip(token_vectors(model, PROOF_TEXTS), token_vectors(saved, PROOF_TEXTS), strict=True)
    apart = max(distance(own, other) for own, other in pairs)
    if not apart <= TOLERANCE:
        raise TeachonceError(
            address,
            f"the narrow model was saved, and its vectors of tokens are off by {100 * apart:.2g} % then",
            WHOLE,
        )


def _of_one_length(model: SentenceTransformer, texts: Sequence[str]) -> list[Tensor]:
    """(n, L) token ids of some texts of one length each, special tokens included."""
    tokenizer = deepcopy(model.tokenizer)  # it stores the truncation of its last texts
    most = min(LONGEST, model.max_seq_length or LONGEST)
    by_length = defaultdict(list)
    for ids in tokenizer(list(texts), truncation=True, max_length=most)["input_ids"]:
        by_length[len(ids)].append(ids)
    lengths = sorted(by_length)
    return [group for n in lengths for group in torch.split(torch.tensor(by_length[n]), AT_ONCE)]


def _flat(states: Sequence[Tensor]) -> Tensor:
    """(tokens, values) of all texts."""
    return torch.cat([group.flatten(0, 1) for group in states])


def _trace(layer: Model, states: Sequence[Tensor]) -> tuple[Trace, list[Tensor]]:
    """What a layer makes of states, and the states behind it, of (n, L, width) each."""
    parts: list[list[Tensor]] = []
    read, attended, ahead, behind = (
        layer.attention.self,
        layer.attention.output,
        layer.intermediate,
        layer.output,
    )
    for group in states:
        context = read(group)[0]
        middle_sum = group + attended.dense(context)
        middle = attended.LayerNorm(middle_sum)
        neurons = ahead.dense(middle)
        active = ahead.intermediate_act_fn(neurons)
        end_sum = middle + behind.dense(active)
        end = behind.LayerNorm(end_sum)
        scores = (read.query(group), read.key(group), read.value(group))
        parts.append([*scores, context, middle_sum, middle, neurons, active, end_sum, end])
    return Trace(*map(_flat, zip(*parts, strict=True))), [part[-1] for part in parts]


def _wanted(
    whole: Model, layers: Sequence[int], groups: Sequence[Tensor]
) -> Iterator[tuple[Trace, Trace]]:
    """Yield the trace of each kept layer, and that of the last one in front of the next kept layer."""
    states = [whole.embeddings(ids) for ids in groups]
    ends = {*(layer - 1 for layer in layers[1:]), len(whole.encoder.layer) - 1}
    own = None
    for number, layer in enumerate(whole.encoder.layer):
        trace, states = _trace(layer, states)
        own = trace if number in layers else own
        if number in ends and own is not None:
            yield own, trace


def _basis(whole: Model, layers: Sequence[int], groups: Sequence[Tensor], hidden: int) -> Tensor:
    """(hidden, width) orthonormal rows: the components of the states of all layers that vary most."""
    width = whole.config.hidden_size
    if hidden == width:
        return torch.eye(width)
    moments = torch.zeros(width, width, dtype=torch.double)

    def count(states: Tensor) -> None:
        centred = (states - states.mean(0)).double()
        moments.addmm_(centred.T, centred)

    count(_flat([whole.embeddings(ids) for ids in groups]))
    for own, wanted in _wanted(whole, layers, groups):
        count(own.middle)
        count(wanted.end)
    return principal_components(moments, hidden).T.contiguous()


def _built(body: Model, widths: Widths, basis: Tensor) -> Model:
    """The small model with its tables, and its pooler if it has one; the rest is fitted to texts later."""
    config = deepcopy(body.config)
    config.hidden_size, config.intermediate_size = widths.hidden, widths.intermediate
    config.num_attention_heads = widths.heads
    small = type(body)(config).eval()
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        table = getattr(body.embeddings, name).weight
        getattr(small.embeddings, name).weight.copy_(table @ basis.T)
    if getattr(body, "pooler", None) is None:
        small.pooler = None
    else:
        _put(small.pooler.dense, body.pooler.dense, basis, basis)
    return small


def _fit_embeddings(
    small: Model, whole: Model, groups: Sequence[Tensor], basis: Tensor
) -> list[Tensor]:
    """Fit the norm behind the tables; returns the states in front of the first layer."""
    norm, large = small.embeddings.LayerNorm, whole.embeddings.LayerNorm
    sums: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, args: sums.append(args[0]))
    for ids in groups:
        small.embeddings(ids)
    hook.remove()
    _fit_norm(norm, large, _flat(sums), _flat([whole.embeddings(ids) for ids in groups]), basis)
    return [small.embeddings(ids) for ids in groups]


def _fit_layer(
    block: Model, layer: Model, own: Trace, wanted: Trace, states: Sequence[Tensor], basis: Tensor
) -> list[Tensor]:
    """Fit a layer of the small model to what the large model's layer makes of the texts.

    It reads `states`, and is to have the end of the trace `wanted`; the basis is (hidden, width).

    Returns:
        The states behind it.
    """
    read, attended = block.attention.self, block.attention.output
    large = layer.attention.self
    to_query, to_key, to_value, back = _heads(layer, own, read)
    read_here = _flat(states)
    for name, turn in (("query", to_query), ("key", to_key), ("value", to_value)):
        _put(getattr(read, name), getattr(large, name), turn, basis)
        _mend(getattr(read, name), read_here, getattr(own, name) @ turn.T)
    context = [read(group)[0] for group in states]
    _put(attended.dense, layer.attention.output.dense, basis, back)
    _mend(attended.dense, _flat(context), own.middle_sum @ basis.T - read_here)
    sums = [group + attended.dense(heads) for group, heads in zip(states, context, strict=True)]
    _fit_norm(attended.LayerNorm, layer.attention.output.LayerNorm, _flat(sums), own.middle, basis)
    middle = [attended.LayerNorm(group) for group in sums]

    neurons = block.intermediate.dense
    to_neurons = _neurons(layer, own, basis, neurons.out_features)
    _put(neurons, layer.intermediate.dense, to_neurons, basis)
    _mend(neurons, _flat(middle), own.neurons @ to_neurons.T)
    active = [block.intermediate(group) for group in middle]
    _put(block.output.dense, layer.output.dense, basis, to_neurons)
    _mend(block.output.dense, _flat(active), wanted.end_sum @ basis.T - _flat(middle))
    sums = [group + block.output.dense(a) for group, a in zip(middle, active, strict=True)]
    _fit_norm(block.output.LayerNorm, layer.output.LayerNorm, _flat(sums), wanted.end, basis)
    return [block.output.LayerNorm(group) for group in sums]


def _heads(layer: Model, own: Trace, read: Model) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How queries, keys and values of the small model's heads are made of the large ones'.

    The heads that are kept are those whose outputs vary most behind the attention's last map. One that gets
    smaller keeps the directions in which its scores, and what it adds to that map, vary most.

    Returns:
        Queries, keys and values, each (values of the small heads, values of the large heads): rows that a
        large head is multiplied by. And the rows that values of small heads are multiplied by to go back.
    """
    large, size = layer.attention.self, read.attention_head_size
    before = large.attention_head_size
    heads = [slice(first, first + before) for first in range(0, large.all_head_size, before)]
    outward = layer.attention.output.dense.weight
    added = [own.context[:, head] @ outward[:, head].T for head in heads]
    weights = torch.stack([rows_of_head.var(0).sum() for rows_of_head in added])
    kept = sorted(weights.topk(read.num_attention_heads).indices.tolist())
    queries, keys, values, back = torch.zeros(4, len(kept) * size, large.all_head_size)
    for place, number in enumerate(kept):
        rows, head = slice(place * size, (place + 1) * size), heads[number]
        if size == before:
            for rows_of_head in (queries, keys, values, back):
                rows_of_head[rows, head] = torch.eye(size)
            continue
        root_q, root_k = _root(own.query[:, head]), _root(own.key[:, head])
        left, strengths, right = torch.linalg.svd(root_q.T @ root_k)
        # Scores are divided by the root of the heads' size.
        share = strengths[:size].sqrt()[:, None] * (size / before) ** 0.25
        queries[rows, head] = (torch.linalg.solve(root_q.T, left[:, :size]).T * share).float()
        keys[rows, head] = (torch.linalg.solve(root_k.T, right[:size].T).T * share).float()
        root_v = _root(own.context[:, head] - own.context[:, head].mean(0))
        left = torch.linalg.svd(root_v.T @ outward[:, head].T.double())[0]
        values[rows, head] = torch.linalg.solve(root_v.T, left[:, :size]).T.float()
        back[rows, head] = (root_v @ left[:, :size]).T.float()
    return queries, keys, values, back


def _root(values: Tensor) -> Tensor:
    """(d, d) lower triangle R with R R^T = the second moments of (tokens, d) values, in float64."""
    moments = values.double().T @ values.double() / len(values)
    floor = 1e-6 * moments.diagonal().mean().clamp(min=torch.finfo(values.dtype).tiny)
    root: Tensor = torch.linalg.cholesky(moments + floor * torch.eye(len(moments)))
    return root


def _neurons(layer: Model, own: Trace, basis: Tensor, count: int) -> Tensor:
    """(count, neurons) rows of the identity: those neurons of a layer that add most to the states."""
    outward = (basis @ layer.output.dense.weight).square().sum(0)
    kept = (own.active.var(0) * outward).topk(count).indices.sort().values
    return torch.eye(len(outward))[kept]


def _put(linear: nn.Linear, large: nn.Linear, rows: Tensor, columns: Tensor) -> None:
    """Give a linear map the weights of a larger one, turned and cut on both sides."""
    linear.weight.copy_(rows @ large.weight @ columns.T)
    linear.bias.copy_(rows @ large.bias)


def _mend(linear: nn.Linear, inputs: Tensor, wanted: Tensor) -> None:
    """Change a linear map as little as needed for (n, out) outputs of (n, in) inputs: ridge regression."""
    missing = wanted - linear(inputs)
    mean, mean_missing = inputs.mean(0), missing.mean(0)
    centred = inputs - mean
    moments = (centred.T @ centred).double()
    moments += RIDGE * moments.diagonal().mean() * torch.eye(len(moments))
    change = torch.linalg.solve(moments, (centred.T @ (missing - mean_missing)).double()).T.float()
    linear.weight.add_(change)
    linear.bias.add_(mean_missing - change @ mean)


def _fit_norm(norm: Model, large: Model, sums: Tensor, wanted: Tensor, basis: Tensor) -> None:
    """Fit gains and biases of a LayerNorm, value by value, by least squares.

    It begins as the norm in its place in the large model; of (n, hidden) sums it is to make the (n, width)
    wanted.
    """
    norm.weight.copy_(basis.square() @ large.weight)
    norm.bias.copy_(basis @ large.bias)
    missing = wanted @ basis.T - norm(sums)
    normal = nn.functional.layer_norm(sums, sums.shape[1:], eps=norm.eps)
    mean, mean_missing = normal.mean(0), missing.mean(0)
    centred = normal - mean
    moments = centred.square().sum(0).clamp(min=torch.finfo(normal.dtype).tiny)
    change = (centred * (missing - mean_missing)).sum(0) / moments
    norm.weight.add_(change)
    norm.bias.add_(mean_missing - change * mean)


def _lead_back(model: SentenceTransformer, states: Tensor, wanted: Tensor, basis: Tensor) -> None:
    """Put a Dense behind the pooling that leads back to the width that there was.

    It is fitted to (n, hidden) token vectors of the narrow transformer and the (n, width) wanted ones; the
    basis is (hidden, width).
    """
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Pooling

    hidden, width = basis.shape
    once = nn.Linear(hidden, width)
    once.weight.copy_(basis.T)
    once.bias.zero_()
    _mend(once, states, wanted)
    modules = list(model)
    place = next(n for n, module in enumerate(modules) if isinstance(module, Pooling))
    pooling: Any = modules[place]
    times = pooling.pooling_output_dimension // width
    modules[place] = Pooling(hidden, pooling.pooling_mode, pooling.include_prompt)
    back = Dense(times * hidden, times * width, activation_function=nn.Identity())
    # One pooling or several, side by side; each is a mean, a maximum or a choice of tokens.
    back.linear.weight.copy_(torch.kron(torch.eye(times), once.weight))
    back.linear.bias.copy_(once.bias.repeat(times))
    modules.insert(place + 1, back)
    # Its modules are named by their places.
    for name in list(model._modules):
        del model._modules[name]
    for number, module in enumerate(modules):
        model.add_module(str(number), module)
