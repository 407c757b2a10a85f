"""Read texts with a transformer as one packed sequence, without padding.

All layers of a transformer but attention process tokens one by one, so texts can be concatenated. Attention
is computed for each run of equally long texts, as an ordinary batch without a mask. No model is rewritten:
the attention function is replaced through the interface that transformers has for it, and the modules after
the transformer (pooling, Dense, Normalize) read each run as a batch.

`Encoder` tests for which models this works: on a few texts it must give the model's own vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "packed"

FILLED_TO = 64
"""Where oneDNN multiplies with gradients, a packed sequence is filled up to a multiple of this many tokens.

It makes code for each size of a matrix, and keeps it: 1.3 GB for 40 steps in bfloat16, 0.6 GB for these
(benchmarks/filled_batches.py)."""

CANNOT_PACK = (ValueError, AttributeError, TypeError, NotImplementedError, RuntimeError)
"""Errors raised by models and tokenizers that cannot read packed texts."""


@dataclass(frozen=True)
class TokenizedTexts:
    """Texts that are tokenised but not yet encoded."""

    # (n,) int64 tokens of each text before truncation, special and prompt tokens included.
    lengths: NDArray[np.int64]
    # (m,) places of texts, equally long ones adjacent -> (m, dim) vectors.
    forward: Callable[[NDArray[np.int64]], Tensor]
    equal_lengths: bool = False  # whether only texts of equal length may be encoded together


@dataclass(frozen=True)
class LengthRun:
    """A run of consecutive texts of `length` tokens each."""

    texts: int
    length: int

    @property
    def tokens(self) -> int:
        """Number of tokens of all texts."""
        return self.texts * self.length


def length_runs(lengths: Sequence[int]) -> list[LengthRun]:
    """Returns the runs in a sequence of texts with the given lengths in tokens."""
    return [LengthRun(len(list(group)), length) for length, group in groupby(lengths)]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    runs: Sequence[LengthRun],
    sliding_window: int | None = None,
    **settings: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Attention within each text of a packed sequence.

    Args:
        module: The attention layer.
        query: (1, heads, tokens, width).
        key: (1, heads or fewer, tokens, width).
        value: Shaped as key.
        attention_mask: None, since nothing is padding.
        runs: The runs of texts in the sequence.
        sliding_window: Distance in tokens from which tokens do not attend to each other; None for none.
        settings: Further arguments of the layer, such as `scaling` and `is_causal`.

    Returns:
        (1, tokens, heads, width), and no attention weights.

    Raises:
        NotImplementedError: the model has a mask or bias of its own for the whole row.
    """
    if attention_mask is not None or settings.get("position_bias") is not None:
        raise NotImplementedError("it has a mask or bias over the whole batch")
    context: AbstractContextManager[Any] = nullcontext()
    if torch.is_grad_enabled() and query.device.type == "cpu":
        # On CPUs torch's gradient of attention takes nine times as long in bfloat16 as in float32.
        query, key, value = query.float(), key.float(), value.float()
        context = torch.autocast("cpu", enabled=False)
    # Split, not sliced: the gradient of each slice would be as large as the whole.
    counts = [run.tokens for run in runs]
    split = (torch.split(states[0], counts, dim=1) for states in (query, key, value))
    parts = []
    with context:
        for run, *states in zip(runs, *split, strict=True):
            q, k, v = (_batch(part, run) for part in states)
            mask = None
            if sliding_window is not None and run.length > sliding_window:
                mask = _window(run.length, sliding_window, _is_causal(module, settings)).to(
                    query.device
                )
            attended, _ = sdpa_attention_forward(module, q, k, v, mask, **settings)
            parts.append(attended.flatten(0, 1))
    return torch.cat(parts)[None], None


def _batch(states: Tensor, run: LengthRun) -> Tensor:
    """A view of one run: (heads, tokens of the run, width) -> (texts, heads, length, width)."""
    heads, _, width = states.shape
    return states.view(heads, run.texts, run.length, width).transpose(0, 1)


def _window(length: int, width: int, causal: bool) -> Tensor:
    """Returns a (1, 1, length, length) mask of a sliding window."""
    place = torch.arange(length)
    apart = place[:, None] - place[None, :]
    return ((apart < width) & (apart >= 0 if causal else apart > -width))[None, None]


def _is_causal(module: nn.Module, settings: dict[str, Any]) -> bool:
    """Returns whether attention is causal, by the rule of `sdpa_attention_forward`."""
    setting = settings.get("is_causal")
    return bool(getattr(module, "is_causal", True) if setting is None else setting)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


class PackedReader:
    """Reads packed texts with a transformer and the modules after it.

    Args:
        modules: The sentence-transformers modules. Attention is replaced during calls only.

    Raises:
        one of CANNOT_PACK: it is no transformer with such an interface, or has no fast tokenizer.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        transformer: Any
        transformer, *self.head = modules
        self.transformer, self.body = transformer, transformer.auto_model
        self.tokenizer = transformer.tokenizer
        if not self.body.is_backend_compatible():
            raise NotImplementedError("it takes no other attention function")
        self._first_position = first_position(self.transformer)

    @contextmanager
    def _attention(self) -> Iterator[None]:
        own = self.body.config._attn_implementation
        self.body.set_attn_implementation(ATTENTION)
        try:
            yield
        finally:
            self.body.set_attn_implementation(own)

    def read(self, texts: Sequence[str], prompt: str) -> TokenizedTexts:
        """Tokenise all texts, once."""
        ids, lengths = self._tokens([prompt + text for text in texts])
        in_prompt = (self.transformer._get_prompt_length(prompt) or 0) if prompt else 0
        return TokenizedTexts(lengths, lambda places: self(ids, places, in_prompt))

    def _tokens(self, texts: list[str]) -> tuple[list[list[int]], NDArray[np.int64]]:
        """Returns the truncated token ids of each text, and the lengths before truncation."""
        limit = self.transformer.max_seq_length
        core = self.tokenizer.backend_tokenizer
        core.no_truncation()
        core.no_padding()
        # Twice as fast as the tokenizer itself, which only truncates the few long texts.
        ids = [encoding.ids for encoding in core.encode_batch_fast(texts)]
        lengths = np.array([len(row) for row in ids], np.int64)
        for place in np.flatnonzero(lengths > limit):
            ids[place] = self.tokenizer(texts[place], truncation=True, max_length=limit)[
                "input_ids"
            ]
        return ids, lengths

    def __call__(
        self,
        ids: Sequence[Sequence[int] | NDArray[np.int32]],
        places: NDArray[np.int64],
        in_prompt: int = 0,
    ) -> Tensor:
        """Encode some of the texts.

        Args:
            ids: The token ids of each text.
            places: (m,) int64 places of texts in `ids`; adjacent ones of equal length make a run.
            in_prompt: Number of each text's tokens that belong to the prompt.

        Returns:
            (m, dim) vectors, as the model's last module returns them.
        """
        device: torch.device = self.body.device
        runs = length_runs([len(ids[place]) for place in places])
        tokens = torch.from_numpy(np.concatenate([ids[place] for place in places]).astype(np.int64))
        # Texts of one token, whose vectors nobody reads.
        filling = LengthRun(-len(tokens) % _filled_to(device), 1)
        all_runs = [*runs, filling] if filling.texts else runs
        tokens = torch.cat([tokens, tokens[:1].expand(filling.texts)])
        positions = [torch.arange(run.length).repeat(run.texts) for run in all_runs]
        with self._attention():
            states = self.body(
                input_ids=tokens[None].to(device),
                position_ids=(torch.cat(positions) + self._first_position)[None].to(device),
                runs=all_runs,
            ).last_hidden_state[0]
        parts = torch.split(states, [run.tokens for run in all_runs])
        return torch.cat(
            [self._apply_head(part, run, in_prompt) for part, run in zip(parts, runs, strict=False)]
        )

    def _apply_head(self, states: Tensor, run: LengthRun, in_prompt: int) -> Tensor:
        """Apply the modules after the transformer to a run: (tokens, width) -> (texts, dim)."""
        shape = (run.texts, run.length)
        features: dict[str, Any] = {
            "token_embeddings": states.view(*shape, -1),
            "attention_mask": torch.ones(shape, dtype=torch.int64, device=states.device),
            "prompt_length": in_prompt,
        }
        for module in self.head:
            features = module(features)
        vectors: Tensor = features["sentence_embedding"]
        return vectors


def _filled_to(device: torch.device) -> int:
    """Returns the number of tokens to a multiple of which a sequence is filled up; 1 for no filling."""
    by_onednn = device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return FILLED_TO if by_onednn and torch.is_grad_enabled() else 1


def first_position(body: nn.Module) -> int:
    """Returns the position of a text's first token: 0, or after that of padding (RoBERTa)."""
    for module in body.modules():
        padding = getattr(module, "padding_idx", None)
        if padding is not None and hasattr(module, "position_embeddings"):
            return int(padding) + 1
    return 0
