"""Documents → token ids: texts and conversations by the tokenizer, ids of token files as they are.

Each document comes without the BOS and EOS that tokenizers add unasked, and without the BOS that it begins with itself
where windows get their own. Special tokens inside a text stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from producer.corpus.base import Conversation, CorpusError, Document
from producer.corpus.rendering.chat_template import ChatTemplate, RenderedChat
from producer.settings import CorpusSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1_000_000
"""Documents are tokenized together up to these limits: fast tokenizers use all cores only for several at a time."""


@dataclass(frozen=True)
class TokenizedDocument:
    """The tokens of one document."""

    ids: np.ndarray
    """int64 [tokens]"""
    in_roles: np.ndarray
    """bool [tokens]: those that corpus.roles names; without corpus.roles, all."""
    is_closed: bool
    """The document ends with the token that separates documents, perhaps with spaces behind it."""


class DocumentTokenizer:
    """A tokenizer with the rules by which it reads the documents of a corpus."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: CorpusSettings) -> None:
        """Raises CorpusError for a tokenizer that cannot read such a corpus."""
        self._tokenizer = tokenizer
        self._roles = frozenset(settings.roles)
        self._template = ChatTemplate(tokenizer, self._roles) if settings.kind == "chat" else None
        self._own_bos = tokenizer.bos_token_id if settings.prepend_bos else None
        self._separator = first_id(tokenizer.eos_token_id, tokenizer.bos_token_id)
        probe = self._encode(["a"])["input_ids"][0]
        self._adds_bos = len(probe) > 1 and probe[0] == tokenizer.bos_token_id
        self._adds_eos = len(probe) > 1 and probe[-1] == tokenizer.eos_token_id

    @property
    def decisive(self) -> list[object]:
        """What decides the tokens beside the tokenizer's rules, as JSON data; nothing for what is no chat."""
        return [self._template.source, sorted(self._roles)] if self._template else []

    def tokenize(self, documents: Iterable[Document]) -> Iterator[TokenizedDocument]:
        """Yields the tokens of each document, in order; texts are tokenized in batches. Raises CorpusError."""
        batch: list[RenderedChat] = []
        characters = 0
        for document in documents:
            if isinstance(document, np.ndarray):
                yield from self._texts(batch)
                batch, characters = [], 0
                yield self._ids(document)
                continue
            batch.append(self._rendered(document))
            characters += len(batch[-1].text)
            if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield from self._texts(batch)
                batch, characters = [], 0
        yield from self._texts(batch)

    def _rendered(self, document: str | Conversation) -> RenderedChat:
        if isinstance(document, str):
            return RenderedChat(document, None)
        if self._template is None:
            raise CorpusError(f'{document.place}: messages are rendered for corpus.kind = "chat" only')
        return self._template.render(document)

    def _ids(self, ids: np.ndarray) -> TokenizedDocument:
        """Raises CorpusError for an id that the tokenizer lacks: an embedding without it would end a GPU process."""
        vocabulary = len(self._tokenizer)
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
            wrong_id = int(ids.max() if ids.max() >= vocabulary else ids.min())
            raise CorpusError(
                f"the corpus holds id {wrong_id}, but the tokenizer has {vocabulary} ids, from 0; "
                "name the model whose tokenizer wrote it, or correct corpus.token_dtype where a file has no header"
            )
        ids = ids.astype(np.int64, copy=False)
        return TokenizedDocument(ids, np.ones(len(ids), dtype=bool), bool(len(ids)) and ids[-1] == self._separator)

    def _texts(self, batch: list[RenderedChat]) -> Iterator[TokenizedDocument]:
        """Yields the tokens of each text, without the BOS and EOS that are not part of it."""
        encoded = self._encode([chat.text for chat in batch], offsets=bool(self._roles)) if batch else {}
        for index, (chat, tokens) in enumerate(zip(batch, encoded.get("input_ids", []), strict=True)):
            # Some tokenizers add their BOS or EOS although add_special_tokens is False.
            front = int(self._adds_bos and len(tokens) > 0)
            back = len(tokens) - int(self._adds_eos and len(tokens) > front)
            front += self._count_own_bos(chat.text, tokens[front:])
            in_roles = np.ones(len(tokens), dtype=bool)
            if chat.spans is not None:
                in_roles = overlapping(np.array(encoded["offset_mapping"][index]).reshape(-1, 2), chat.spans)
            ids = np.array(tokens[front:back], dtype=np.int64)
            yield TokenizedDocument(ids, in_roles[front:back], self._is_closed(ids, chat.text))

    def _is_closed(self, ids: np.ndarray, text: str) -> bool:
        """Tells whether a text ends with the separator. Templates put a line end behind it, which counts as nothing."""
        if not len(ids) or self._separator is None:
            return False
        if ids[-1] == self._separator:
            return True
        return self._template is not None and text.rstrip().endswith(
            str(self._tokenizer.convert_ids_to_tokens(self._separator))
        )

    def _count_own_bos(self, text: str, ids: list[int]) -> int:
        """Counts the BOS tokens that a text begins with where windows get their own; text with the same id stays."""
        if self._own_bos is None or not ids or ids[0] != self._own_bos:
            return 0
        bos_text = str(self._tokenizer.bos_token)
        count = 0
        while text.startswith(bos_text, count * len(bos_text)) and ids[count : count + 1] == [self._own_bos]:
            count += 1
        return count

    def _encode(self, texts: list[str], offsets: bool = False) -> Any:
        return self._tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )


def overlapping(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """Tells for each token, [tokens, 2] offsets, whether it holds a character of one of the `spans`: bool [tokens]."""
    overlaps = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        overlaps |= (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 0] < offsets[:, 1])
    return overlaps


def first_id(*ids: int | None) -> int | None:
    """Returns the first id that is not None; `or` would pass over 0."""
    return next((number for number in ids if number is not None), None)
