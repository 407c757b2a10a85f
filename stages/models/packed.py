"""A transformer that reads texts laid end to end, without padding.

Everything in a transformer but attention treats tokens one by one, so it does not mind whose token comes
next. Attention is computed for each run of equally long texts, as an ordinary batch without a mask. No
model is written again here: the attention function is exchanged through the interface that transformers
has for it, and what follows the transformer (pooling, Dense, Normalize) reads each run as a batch.

Which models this is right for is not looked up but tried (`Encoder`): on a few texts it must give the
model's own vectors.
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

NOT_PACKED = (ValueError, AttributeError, TypeError, NotImplementedError, RuntimeError)
"""What models and tokenizers raise that cannot read texts laid end to end."""


@dataclass(frozen=True)
class Read:
    """Texts that a model has looked at and not yet turned into vectors.

    Args:
        lengths: (n,) tokens of each before cutting, special ones and the prompt's included.
        forward: Places (m,) of some of them, equally long ones together -> their vectors (m, dim).
        equal_lengths: Whether only equally long ones may be read together.
    """

    lengths: NDArray[np.int64]
    forward: Callable[[NDArray[np.int64]], Tensor]
    equal_lengths: bool = False


@dataclass(frozen=True)
class Run:
    """Neighbouring texts of one length.

    Args:
        texts: How many they are.
        length: Tokens of each.
    """

    texts: int
    length: int

    @property
    def tokens(self) -> int:
        """Of all its texts."""
        return self.texts * self.length


def runs_of(lengths: Sequence[int]) -> list[Run]:
    """The runs in a row of texts with so many tokens each."""
    return [Run(len(list(group)), length) for length, group in groupby(lengths)]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    runs: Sequence[Run],
    sliding_window: int | None = None,
    **settings: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Attention within each text of a row.

    Args:
        module: The attention layer.
        query: (1, heads, tokens, width).
        key: (1, heads or fewer, tokens, width).
        value: Shaped as key.
        attention_mask: None, since nothing is padding.
        runs: Which tokens are of one text.
        sliding_window: Tokens this far apart, or further, do not see each other.
        settings: What else the layer says, such as `scaling` and `is_causal`.

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
            made, _ = sdpa_attention_forward(module, q, k, v, mask, **settings)
            parts.append(made.flatten(0, 1))
    return torch.cat(parts)[None], None


def _batch(states: Tensor, run: Run) -> Tensor:
    """A view of one run: (heads, tokens of the run, width) -> (texts, heads, length, width)."""
    heads, _, width = states.shape
    return states.view(heads, run.texts, run.length, width).transpose(0, 1)


def _window(length: int, width: int, causal: bool) -> Tensor:
    """(1, 1, length, length): which token sees which."""
    place = torch.arange(length)
    apart = place[:, None] - place[None, :]
    return ((apart < width) & (apart >= 0 if causal else apart > -width))[None, None]


def _is_causal(module: nn.Module, settings: dict[str, Any]) -> bool:
    """As `sdpa_attention_forward` finds it out."""
    given = settings.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


class Packed:
    """A transformer that reads texts end to end, and the modules after it.

    Args:
        modules: Of sentence-transformers. Attention is exchanged for the time of a call only.

    Raises:
        one of NOT_PACKED: it is no transformer with such an interface, or has no fast tokenizer.
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

    def read(self, texts: Sequence[str], prompt: str) -> Read:
        """Tokenise all texts, once."""
        ids, lengths = self._tokens([prompt + text for text in texts])
        in_prompt = (self.transformer._get_prompt_length(prompt) or 0) if prompt else 0
        return Read(lengths, lambda places: self(ids, places, in_prompt))

    def _tokens(self, texts: list[str]) -> tuple[list[list[int]], NDArray[np.int64]]:
        """The tokens of each text, cut, and how many they were before."""
        limit = self.transformer.max_seq_length
        core = self.tokenizer.backend_tokenizer
        core.no_truncation()
        core.no_padding()
        # Twice as fast as calling the tokenizer itself, which is left to do the few that must be cut.
        ids = [found.ids for found in core.encode_batch_fast(texts)]
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
        """The vectors of some texts.

        Args:
            ids: The tokens of each text.
            places: (m,) of these; neighbours of one length make a run.
            in_prompt: How many tokens of each are the prompt's.

        Returns:
            (m, dim), as the model's last module gives them.
        """
        device: torch.device = self.body.device
        runs = runs_of([len(ids[place]) for place in places])
        tokens = torch.from_numpy(np.concatenate([ids[place] for place in places]).astype(np.int64))
        positions = [torch.arange(run.length).repeat(run.texts) for run in runs]
        with self._attention():
            states = self.body(
                input_ids=tokens[None].to(device),
                position_ids=(torch.cat(positions) + self._first_position)[None].to(device),
                runs=runs,
            ).last_hidden_state[0]
        parts = torch.split(states, [run.tokens for run in runs])
        return torch.cat(
            [self._finished(part, run, in_prompt) for part, run in zip(parts, runs, strict=True)]
        )

    def _finished(self, states: Tensor, run: Run, in_prompt: int) -> Tensor:
        """What the modules after the transformer make of a run: (tokens, width) -> (texts, dim)."""
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


def first_position(body: nn.Module) -> int:
    """The position of a text's first token: after that of padding, where the table has one (RoBERTa)."""
    for module in body.modules():
        padding = getattr(module, "padding_idx", None)
        if padding is not None and hasattr(module, "position_embeddings"):
            return int(padding) + 1
    return 0
