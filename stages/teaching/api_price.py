"""What a pass of a teacher behind an API will cost, known before anything is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stages.models.config import CHARACTERS
from stages.params import ApiParams
from stages.teaching.api_budget import MILLION
from stages.teaching.api_texts import TextCounter


@dataclass(frozen=True)
class Price:
    """Of some texts.

    Args:
        tokens: Of all of them, prompts included.
        requests: That ask for them.
        cost: Of the tokens; None if there is no price.
        seconds: That the limits of a minute take at least; 0 without limits.
        how: How the tokens are known.
    """

    tokens: int
    requests: int
    cost: float | None
    seconds: float
    how: str


def price_of(
    sample: Sequence[str], count: int, *, counter: TextCounter, prompt: str, params: ApiParams
) -> Price:
    """Returns the price of `count` texts, of which the sample is one or more.

    Raises:
        TeachonceError: the prompt leaves no room for a text.
    """
    tokens = sum(text.tokens for text in counter.ready(sample, prompt))
    tokens = round(tokens * count / max(len(sample), 1))
    requests = math.ceil(count / params.batch_texts)
    price = params.price_per_million_tokens
    limits = (
        (tokens, params.tokens_per_minute),
        (requests, params.requests_per_minute),
    )
    how = (
        f"estimated, {CHARACTERS} characters a token"
        if counter.tokenizer is None
        else "counted by embed.api.tokenizer"
    )
    return Price(
        tokens=tokens,
        requests=requests,
        cost=None if price is None else tokens * price / MILLION,
        seconds=max(60 * amount / most if most else 0.0 for amount, most in limits),
        how=how if len(sample) >= count else f"{how}, in {len(sample):,} of the texts",
    )
