"""The probe texts: a fixed set whose vectors show whether a teacher is still the one of its cache.

Their vectors are kept beside the others of a teacher, as an ordinary object, since these texts are a shard
like any other: `vectors/<teacher fingerprint>/<digest of the probe texts>.arrow`. No manifest names it. It
is kept as long as any vectors of that teacher are.

Never change a text: the digest would change, and every cache would lose its record.
(`stages/models/likeness.py` has texts for another question, whether a copy of a student is the student;
these depend on the model's limit and include texts that no corpus has, such as an empty one.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from storage.column import text_keys_from
from storage.corpus import text_digest, text_key

_LONG = (
    "The harbour keeps a lantern for every boat, and the keeper of the harbour writes down which boat "
    "came in, at what hour of the night, with how many hands, and what the wind was like. "
)

PROBE_TEXTS = (
    "Yes.",
    "A short sentence.",
    "The committee met on Thursday and postponed its decision until the spring.",
    "How do I read a table from a text file, skipping the first line and all comments?",
    "don't  SHOUT; (no, really!) -- 'quoted', \"twice\"... and/or [so on]: what?!",
    "On 2024-02-29 at 07:05:09 we paid $1,234.50, or 3.14e-7 of it; version 10.0.19, item #42.",
    "Zürich, naïve café, Ångström, œuvre; “curly” quotes \u2014 № 5, 20 °C, 🚀 👩\u200d🔬 and e\u0301",
    "Женщина читает книгу у окна, пока за окном идёт дождь.",  # noqa: RUF001 - Russian
    "机器学习模型把句子变成向量,相近的句子有相近的向量。",
    "القارب الصغير عبر النهر قبل شروق الشمس.",
    "किताब मेज़ पर रखी है और दरवाज़ा खुला है।",
    "def area(radius: float) -> float:\n    return math.pi * radius**2  # of a circle\n",
    '{"name": "kettle", "price": 12.5, "tags": ["kitchen", "steel"], "stock": null}',
    "https://example.org/a/b?c=1&d=%20#e and ~/.config/tool/settings.yaml, see RFC 2119 section 4.",
    "tabs\tand\n\nempty lines,   several spaces, and the very same word word word word",
    _LONG * 20,
)
"""The last has some 740 words, more than most teachers read of a text."""

PROBE_DIGEST = text_digest(PROBE_TEXTS)


def probe_key(teacher: str) -> str:
    """Returns the key of the probe texts' vectors by the teacher with this fingerprint."""
    return f"vectors/{teacher}/{PROBE_DIGEST}.arrow"


def probe_text_keys() -> NDArray[np.bytes_]:
    """Returns the (16,) V16 text keys of the probe texts."""
    return text_keys_from(map(text_key, PROBE_TEXTS))
