"""What corpus.column holds: the cells of records (jsonl, parquet, Hugging Face datasets) as documents.

    text                      one document
    list of texts             a document each
    list of whole numbers     one document of token ids
    messages                  one conversation, for kind `chat`

A column may lie inside others: `meta.body` is the field body of the column meta, unless a column has that very name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from producer.corpus.base import CorpusError, Document, column_missing, column_not_text
from producer.corpus.sources.chat import BESIDE_COLUMNS, CHAT_COLUMNS, holds_messages, read_conversation
from producer.corpus.sources.reading import refuse_long, too_long
from producer.settings import BYTES_PER_TOKEN, CorpusSettings

SET_CHAT = 'set corpus.kind = "chat", which renders them by the tokenizer\'s chat template'


class Column:
    """The cells of corpus.column, one for each record."""

    def __init__(self, settings: CorpusSettings) -> None:
        self.is_chat = settings.kind == "chat"
        self._name = settings.column
        self._is_default = settings.column == "text"
        self._longest = settings.max_document_bytes

    def name(self, columns: Iterable[str]) -> str | None:
        """Returns the name of the column among `columns`; None where it is not there. A chat's has usual names."""
        names = list(columns)
        if self._name in names or self._name.split(".")[0] in names:
            return self._name
        usual = CHAT_COLUMNS if self.is_chat and self._is_default else ()
        return next((name for name in usual if name in names), None)

    def roots(self, columns: Iterable[str]) -> list[str]:
        """Returns which of `columns` a reader needs, for columns among which there is the one of the settings."""
        names = list(columns)
        name = self.name(names) or self._name
        return [name if name in names else name.split(".")[0]] + [
            beside for beside in BESIDE_COLUMNS if self.is_chat and beside in names and beside != name
        ]

    def documents(self, record: Mapping[str, Any], place: str) -> Iterator[Document]:
        """Yields the documents of a record. Raises CorpusError, naming `place`, for what is none."""
        name = self.name(record)
        if name is None:
            raise CorpusError(f"{place}: {self.missing(record, record)}")
        value = record[name] if name in record else _descend(record, name.split("."), place)
        if self.is_chat:
            conversation = read_conversation(value, record, f"{place}, corpus.column = {name!r}")
            if conversation is not None:
                self._check_size(conversation.size, place)
                yield conversation
        elif isinstance(value, str):
            yield refuse_long(value, self._longest, place)
        elif value is not None:
            yield from self._list(value, place)

    def missing(self, columns: Iterable[str], record: Mapping[str, Any]) -> str:
        """Says that the column is not among `columns`, and, where a record has messages, what reads them."""
        chats = [] if self.is_chat else [name for name, value in record.items() if holds_messages(value)]
        advice = f"; {chats[0]} holds messages: {SET_CHAT}" if chats else ""
        return column_missing(self._name, columns) + advice

    def refusal(self, value: object) -> str:
        """Says that a value is no text."""
        if holds_messages(value):
            return f"corpus.column = {self._name!r} holds messages; {SET_CHAT}"
        return column_not_text(self._name, type(value).__name__)

    def _list(self, value: object, place: str) -> Iterator[Document]:
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, list) or (value and not isinstance(value[0], str | int)):
            raise CorpusError(f"{place}: {self.refusal(value)}")
        types = {type(entry) for entry in value}
        if types == {int}:
            self._check_size(BYTES_PER_TOKEN * len(value), place)
            yield np.array(value, dtype=np.int64)
        elif types <= {str, type(None)}:
            for text in value:
                if text is not None:
                    yield refuse_long(text, self._longest, place)
        else:
            types_text = ", ".join(sorted(entry.__name__ for entry in types))
            raise CorpusError(f"{place}: {column_not_text(self._name, f'a list of {types_text}')}")

    def _check_size(self, size: int, place: str) -> None:
        if size > self._longest:
            raise CorpusError(f"{place}: {too_long(size, self._longest, 'leave it out')}")


def _descend(record: Mapping[str, Any], path: list[str], place: str) -> Any:
    """Returns the value at the end of a path of fields; None below one that is null."""
    value: Any = record
    for depth, field in enumerate(path):
        if value is None:
            return None
        if not isinstance(value, Mapping) or field not in value:
            fields = f"with the fields {', '.join(value)}" if isinstance(value, Mapping) else "without fields"
            before = ".".join(path[:depth])
            raise CorpusError(
                f"{place}: corpus.column = {'.'.join(path)!r}: {before} is {type(value).__name__} {fields}; "
                "name one of its fields, or another column"
            )
        value = value[field]
    return value
