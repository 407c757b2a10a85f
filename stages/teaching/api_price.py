"""What a pass of a teacher behind an API will cost, known before anything is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stages.models.config import CHARACTERS
from stages.params import ApiParams
from stages.teaching.api_budget import MILLION
from stages.teaching.api_texts import ReadyText


@dataclass(frozen=True)
class Price:
    """What some texts will cost."""

    tokens: int  # of all texts, prompts included
    requests: int  # that they take
    cost: float | None  # of the tokens; None if no price is known
    seconds: float  # at least, by the limits of a minute; 0 without limits
    how: str  # how the tokens are known


def price_of(
    sample: Sequence[ReadyText], count: int, *, is_counted: bool, params: ApiParams
) -> Price:
    """Returns the price of `count` texts.

    Args:
        sample: One or more of them, as they will be sent.
        count: Number of the texts.
        is_counted: Whether a tokenizer counted the sample.
        params: The settings `embed.api`.
    """
    tokens = round(sum(text.tokens for text in sample) * count / max(len(sample), 1))
    requests = math.ceil(count / params.batch_texts)
    price = params.price_per_million_tokens
    limits = ((tokens, params.tokens_per_minute), (requests, params.requests_per_minute))
    how = (
        "counted by embed.api.tokenizer"
        if is_counted
        else f"estimated, {CHARACTERS} characters a token"
    )
    return Price(
        tokens=tokens,
        requests=requests,
        cost=None if price is None else tokens * price / MILLION,
        seconds=max(60 * amount / most if most else 0.0 for amount, most in limits),
        how=how if len(sample) >= count else f"{how}, in {len(sample):,} of the texts",
    )
