"""Token ids as the text they stand for, one piece of text per token."""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from producer.corpus.windows import Windows, windows_of
from producer.settings import CorpusSettings

ANCHOR = "a"
"""Stands before what is decoded: some tokenizers take the first space off a text."""
BEHIND = 4
"""Tokens before one that its text may depend on."""
BROKEN = "\ufffd"
"""What bytes that are no whole character decode to; a text may also contain it."""
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
"""How byte-level tokenizers, GPT-2's kind, write bytes."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How those that fall back on bytes, Llama 2's kind, write one."""


class Texts:
    """Of one tokenizer, which serves one thread at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._known: dict[int, str] = {}
        self._anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)
        self._anchored = len(tokenizer.decode(self._anchor))

    def of(self, token: int) -> str:
        """One token alone, with the space it begins with."""
        if token not in self._known:
            with self._lock:
                self._known[token] = self._decode([token])
        return self._known[token]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One text per token, which put together are the text: the last token of a character that has several shows it.

        The text of a token may depend on those before it, so each is what the text grows by.
        """
        pieces: list[str] = []
        told = 0
        """Tokens whose text is out."""
        with self._lock:
            for end in range(1, len(ids) + 1):
                start = max(0, told - BEHIND)
                before = self._decode(ids[start:told])
                text = self._decode(ids[start:end])
                if text.endswith(BROKEN) and end < len(ids) and self._goes_on(ids[told:end], ids[end]):
                    pieces.append("")
                    continue
                pieces.append(text[len(before) :])
                told = end
        return pieces

    def windows(self, text: str, settings: CorpusSettings) -> Windows:
        """A text cut as the corpus is."""
        with self._lock:
            return windows_of([text], self._tokenizer, settings)

    def _goes_on(self, ids: Sequence[int], following: int) -> bool:
        """Whether these tokens end in the middle of a character that the following one goes on with, by their bytes."""
        *parts, more = (_bytes_of(token or "") for token in self._tokenizer.convert_ids_to_tokens([*ids, following]))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(parts))
        return bool(decoder.getstate()[0]) and more[:1] >= b"\x80" and more[:1] < b"\xc0"

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode([*self._anchor, *ids], clean_up_tokenization_spaces=False)
        return text[self._anchored :]


def _bytes_of(token: str) -> bytes:
    """The bytes a token stands for; of one that is written as text, that text."""
    if match := BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    if all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode()
