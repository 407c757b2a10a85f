"""What `teachonce plan` says of a teacher behind an API: tokens and money. The server is asked nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.workspace import Workspace
from stages.outcome import Facts
from stages.teaching.api_price import price_of
from stages.teaching.api_texts import PROBE_CHARACTERS
from storage.corpus import Corpus
from storage.journal import Ledger
from storage.probe import PROBE_TEXTS


def count_tokens(
    here: Workspace, corpus: Corpus, teacher: str, rows: NDArray[np.int64], most: int
) -> tuple[Facts, float]:
    """Returns what is to be paid, and the seconds that the limits of a minute take; 0 without limits.

    Args:
        here: The work tree.
        corpus: The texts.
        teacher: The fingerprint of the teacher.
        rows: (n,) ids of the rows that have no vector in the store, in random order.
        most: Texts that are counted; the others are taken to be as long.
    """
    params, journal = here.params.embed, here.journal
    assert params.api_model is not None and journal is not None
    unpaid = rows
    if not journal.is_empty(teacher):
        keys = corpus.text_keys
        unpaid = rows[[journal.find(teacher, keys[row].tobytes()) is None for row in rows]]
    prompt, counter = params.prompts.of("text"), here.text_counter()
    price = partial(price_of, counter=counter, prompt=prompt, params=params.api)
    asked = price(corpus.take(unpaid[:most]), len(unpaid))
    probes = price([text[:PROBE_CHARACTERS] for text in PROBE_TEXTS], len(PROBE_TEXTS))
    facts: dict[str, Any] = {
        "tokens": asked.tokens,
        "requests": asked.requests,
        "how": asked.how,
        "probe_tokens": probes.tokens,
        "texts_kept": len(rows) - len(unpaid),
        "tokens_spent": Ledger(here.store.root, params.api_model).total(),
    }
    if asked.cost is not None and probes.cost is not None:
        facts["price"] = asked.cost + probes.cost
    return facts, asked.seconds
