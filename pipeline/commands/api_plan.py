"""What `teachonce plan` says of a teacher behind an API: tokens and money. The server is asked nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.workspace import Workspace
from stages.outcome import Facts
from stages.teaching.api_price import price_of
from stages.teaching.api_texts import PROBE_CHARACTERS, ReadyText
from storage.corpus import Corpus
from storage.journal import Ledger
from storage.probe import PROBE_TEXTS
from storage.roles import Role


def count_tokens(
    here: Workspace,
    corpus: Corpus,
    teachers: Mapping[Role, str],
    rows: NDArray[np.int64],
    most: int,
) -> tuple[Facts, float]:
    """Returns tokens and money to pay, and the least seconds by the limits a minute; 0 without limits.

    Args:
        here: The work tree.
        corpus: The texts.
        teachers: Role -> fingerprint of the teacher's vectors.
        rows: (n,) ids of the rows that have no vector in the store, in random order.
        most: Texts that are counted; the others are taken to be as long.
    """
    params, journal = here.params.embed, here.journal
    assert params.api_model is not None and journal is not None
    keys, counter = corpus.text_keys, here.text_counter()
    paid = {
        row
        for role, teacher in teachers.items()
        if not journal.is_empty(teacher)
        for row in corpus.of_role(rows, role).tolist()
        if journal.find(teacher, keys[row].tobytes()) is not None
    }
    unpaid = rows[[row not in paid for row in rows.tolist()]]

    def ready(texts: Sequence[str], role: Role) -> list[ReadyText]:
        return counter.ready(texts, params.prompts.of(role), role)

    sample, probes = unpaid[:most], [text[:PROBE_CHARACTERS] for text in PROBE_TEXTS]
    of_corpus = [ready(corpus.take(corpus.of_role(sample, role)), role) for role in teachers]
    of_probes = [ready(probes, role) for role in teachers if len(corpus.of_role(rows, role))]
    price = partial(price_of, is_counted=counter.tokenizer is not None, params=params.api)
    asked = price(list(chain(*of_corpus)), len(unpaid))
    probed = price(list(chain(*of_probes)), len(probes) * len(of_probes))
    facts: dict[str, Any] = {
        "tokens": asked.tokens,
        "requests": asked.requests,
        "how": asked.how,
        "probe_tokens": probed.tokens,
        "texts_kept": len(rows) - len(unpaid),
        "tokens_spent": Ledger(here.store.root, params.api_model).total(),
    }
    if asked.cost is not None and probed.cost is not None:
        facts["price"] = asked.cost + probed.cost
    return facts, asked.seconds
