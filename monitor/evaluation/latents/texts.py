"""Token ids as the text they stand for, one piece of text per token."""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from producer.corpus.rendering.windows import Windows, separated, windows_of
from producer.settings import CorpusSettings

ANCHOR = "a"
"""Text before the decoded tokens, since some tokenizers remove the first space of a text."""
TOKENS_BEFORE = 4
"""Tokens before one that its text may depend on."""
REPLACEMENT = "\ufffd"
"""Decoded from bytes that are no whole character; a text may also contain it."""
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
"""Bytes by the characters with which byte-level tokenizers, as GPT-2's, write them."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte, as tokenizers with a byte fallback, as Llama 2's, write it."""


class Texts:
    """Decodes token ids with one tokenizer, which serves one thread at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._cache: dict[int, str] = {}
        self._anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)
        self._anchor_length = len(tokenizer.decode(self._anchor))
        roles = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
        self.separators = frozenset(role for role in roles if role is not None)
        """Tokens that stand between documents."""

    def of(self, token: int) -> str:
        """The text of a single token, with the space it begins with."""
        if token not in self._cache:
            with self._lock:
                self._cache[token] = self._decode([token])
        return self._cache[token]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One text per token; joined, they are the text.

        The text of a token may depend on those before it: it is what the token adds to the text. A character of several
        tokens is the text of the last one, and the others have empty texts.
        """
        pieces: list[str] = []
        start = 0
        """Index of the first token whose text is not in `pieces` yet."""
        with self._lock:
            for end in range(1, len(ids) + 1):
                context = max(0, start - TOKENS_BEFORE)
                before = self._decode(ids[context:start])
                text = self._decode(ids[context:end])
                if text.endswith(REPLACEMENT) and end < len(ids) and self._goes_on(ids[start:end], ids[end]):
                    pieces.append("")
                    continue
                pieces.append(text[len(before) :])
                start = end
        return pieces

    def windows(self, text: str, settings: CorpusSettings) -> Windows:
        """The windows of a text, cut as the corpus is."""
        with self._lock:
            return windows_of([text], self._tokenizer, separated(settings))

    def _goes_on(self, ids: Sequence[int], following: int) -> bool:
        """Whether the bytes of `ids` end in the middle of a character that the following token continues."""
        *parts, more = (_bytes_of(token or "") for token in self._tokenizer.convert_ids_to_tokens([*ids, following]))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(parts))
        return bool(decoder.getstate()[0]) and more[:1] >= b"\x80" and more[:1] < b"\xc0"

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode([*self._anchor, *ids], clean_up_tokenization_spaces=False)
        return text[self._anchor_length :]


def _bytes_of(token: str) -> bytes:
    """The bytes of a token, by its name in the vocabulary."""
    if match := BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    if all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode()
