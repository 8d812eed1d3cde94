"""The interface of every kind of corpus, and messages for faults that several kinds share."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from producer.settings import CorpusSettings
from producer.wire import held_out_shards

log = logging.getLogger(__name__)

FAULTS_SHOWN = 10
MOST_HELD_OUT = 2
"""Times corpus.held_out; one shard at least is held out, which of a few is more."""


class CorpusError(ValueError):
    """The text cannot be used. `str(error)` is the whole message: name, value, expectation, next step."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one document."""

    place: str
    """Where it stands, for messages of errors."""
    messages: list[dict[str, Any]]
    """JSON objects with `role`, such as `user`, and `content`, a text."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the assistant may call."""

    @property
    def size(self) -> int:
        """Bytes of its contents."""
        return sum(len(message["content"].encode()) for message in self.messages)


Document: TypeAlias = str | np.ndarray | Conversation
"""A text, int64 token ids, or a conversation."""


class Corpus(ABC):
    """Numbered shards of documents. The same settings and the same data give the same object anywhere."""

    shards: int
    """Number of shards; they are numbered from 0."""
    description: str
    """One line for logs and for the metadata of a snapshot."""
    fingerprint: str
    """sha256, hex, over everything that decides the documents of every shard."""
    held_out_shards: list[int]
    """Never trained on: the evaluation's text."""
    training_shards: list[int]
    """All the others."""
    text_bytes: list[int] | None
    """About how many bytes of text each shard holds; None where nobody knows before it is read."""

    def __init__(
        self,
        settings: CorpusSettings,
        shards: int,
        contents: str,
        identity: object,
        text_bytes: list[int] | None = None,
    ) -> None:
        """`contents` describes it; `identity` is the JSON data that, with kind and shards, decides its documents."""
        self.shards = shards
        self.text_bytes = text_bytes
        self.held_out_shards = held_out_shards(shards, settings.held_out)
        self.training_shards = sorted(set(range(shards)) - set(self.held_out_shards))
        self.description = describe_shards(contents, shards, settings.held_out)
        self.fingerprint = corpus_fingerprint(settings.kind, shards, identity)
        if settings.held_out and not self.held_out_shards:
            advice = self.more_shards_advice(settings)
            log.warning("%s: one shard leaves the evaluation without text. %s", contents, advice)
        elif len(self.held_out_shards) > MOST_HELD_OUT * settings.held_out * shards:
            log.warning(
                "%s: %d of %d shards are held out, %.0f%% of the text instead of %.0f%%. %s",
                contents, len(self.held_out_shards), shards, 100 * len(self.held_out_shards) / shards,
                100 * settings.held_out, self.more_shards_advice(settings),
            )  # fmt: skip

    @classmethod
    def more_shards_advice(cls, settings: CorpusSettings) -> str:
        """Says, as a sentence, which setting or data gives a corpus of this kind more shards."""
        return "Name more data, or write it with smaller row groups."

    def documents(self, shard: int) -> Iterator[Document]:
        """Yields the documents of one shard; some may be empty.

        Raises IndexError for a shard that does not exist and CorpusError for data that cannot be read.
        """
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} is not one of the corpus' {self.shards}")
        return self._read(shard)

    @abstractmethod
    def _read(self, shard: int) -> Iterator[Document]: ...


def describe_shards(contents: str, shards: int, held_out: float) -> str:
    """Names the contents and counts the shards: one line for logs and snapshots."""
    return f"{contents}; {shards:,} shards, {len(held_out_shards(shards, held_out)):,} held out"


def corpus_fingerprint(kind: str, shards: int, identity: object) -> str:
    """Hashes the JSON data that decides the contents of every shard: sha256, hex."""
    return sha256(json.dumps([kind, shards, identity], sort_keys=True).encode())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def import_library(module: str, settings: CorpusSettings) -> Any:
    """Imports a library that only some kinds need. Raises CorpusError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        need = f"corpus.kind = {settings.kind!r} needs {module}, which cannot be imported ({error})"
        raise CorpusError(f'{need}; pip install "sluice-sae[hf]"') from None


def raise_faults(faults: Iterable[str]) -> None:
    """Raises CorpusError with the first faults, one per line, and the number of the others; without any, does not."""
    lines = list(faults)
    if not lines:
        return
    rest = [f"and {len(lines) - FAULTS_SHOWN} more"] if len(lines) > FAULTS_SHOWN else []
    raise CorpusError("\n".join(lines[:FAULTS_SHOWN] + rest))


def column_missing(column: str, columns: Iterable[str]) -> str:
    """Says that corpus.column is not among `columns`."""
    names = list(columns)
    close = difflib.get_close_matches(column, names, n=1)
    nearest = f" (did you mean {close[0]}?)" if close else ""
    return f"corpus.column = {column!r} is not there{nearest}; there are {', '.join(names)}"


def column_not_text(column: str, type_name: object) -> str:
    """Says that corpus.column holds values of another type than text."""
    return f"corpus.column = {column!r} holds {type_name}; expected text; name another column"
