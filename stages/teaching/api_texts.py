"""Texts as a server will read them: behind their prompt, counted, cut by the tokenizer that is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.models.config import CHARACTERS, room_for_texts
from stages.models.folder import find_tokenizer
from storage.errors import TeachonceError, shown
from storage.roles import Role

if TYPE_CHECKING:
    from tokenizers import Tokenizer


PROBE_CHARACTERS = 400
"""What is asked of a probe text: the longest has 740 words, more than some servers take."""


@dataclass(frozen=True)
class ReadyText:
    """A text as it is sent."""

    sent: str  # prompt and text
    tokens: int  # by the tokenizer; about this many if none is named
    most_tokens: int  # it has no more than that; a token has at least one byte
    is_cut: bool  # whether a part of it is left out


class TextCounter:
    """Counts texts and cuts them.

    Args:
        tokenizer: Of the model; None if none is named: then nothing is cut.
        max_tokens: What is sent of a text at most, prompt and special tokens included.
    """

    def __init__(self, tokenizer: Tokenizer | None, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        if tokenizer is not None:
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self.special = tokenizer.num_special_tokens_to_add(False)
        else:
            self.special = 2

    def ready(self, texts: Sequence[str], prompt: str, role: Role = "text") -> list[ReadyText]:
        """Returns the texts behind their prompt, as they are to be sent.

        Raises:
            TeachonceError: the prompt leaves no room for a text.
        """
        sent = [prompt + text for text in texts]
        if self.tokenizer is None:
            sizes = [len(text.encode()) for text in sent]
            return [
                ReadyText(text, math.ceil(len(text) / CHARACTERS), size + self.special, False)
                for text, size in zip(sent, sizes, strict=True)
            ]
        if prompt:
            room_for_texts(self.max_tokens, around=self._length(prompt), prompted=role)
        lengths = [len(encoding.ids) for encoding in self.tokenizer.encode_batch_fast(sent)]
        return [
            ReadyText(text, length, length, False) if length <= self.max_tokens else self._cut(text)
            for text, length in zip(sent, lengths, strict=True)
        ]

    def _length(self, text: str) -> int:
        assert self.tokenizer is not None
        return len(self.tokenizer.encode(text).ids)

    def _cut(self, text: str) -> ReadyText:
        """Cut a text behind the last token that fits; alone, its beginning may have other tokens."""
        assert self.tokenizer is not None
        ends = [end for _, end in self.tokenizer.encode(text, add_special_tokens=False).offsets]
        for keep in range(self.max_tokens - self.special, 0, -1):
            cut = text[: ends[keep - 1]]
            length = self._length(cut)
            if length <= self.max_tokens:
                return ReadyText(cut, length, length, True)
        raise TeachonceError(
            "embed.max_tokens",
            f"{self.max_tokens}, but the tokenizer makes more of the first letter of {shown(text[:40])}",
            "set it higher",
        )


def load_tokenizer(setting: str | None, root: Path) -> Tokenizer | None:
    """Returns the tokenizer that `embed.api.tokenizer` names; None for null.

    Raises:
        MissingError: it is not on this machine and cannot be fetched.
        TeachonceError: its file cannot be read.
    """
    if setting is None:
        return None
    from tokenizers import Tokenizer

    file = find_tokenizer(setting, root=root, address="embed.api.tokenizer")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # its own class is none but Exception
        raise TeachonceError(
            "embed.api.tokenizer", f"{file} cannot be read ({shown(error)})", "fetch the file again"
        ) from None
