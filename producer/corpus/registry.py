"""The kinds of corpus, by the name that corpus.kind gives them: a kind is its module and its line here."""

from __future__ import annotations

from typing import Protocol

from producer.corpus.base import Corpus, CorpusError
from producer.corpus.sources.files import find_files
from producer.corpus.sources.huggingface import HuggingFaceCorpus
from producer.corpus.sources.jsonl import JsonlCorpus
from producer.corpus.sources.parquet import SUFFIXES as PARQUET
from producer.corpus.sources.parquet import ParquetCorpus
from producer.corpus.sources.stdlib import StdlibCorpus
from producer.corpus.sources.text import TextCorpus
from producer.corpus.sources.token_files import TokenCorpus
from producer.settings import CorpusSettings


class CorpusKind(Protocol):
    """A class of corpora that open from [corpus] alone."""

    def __call__(self, settings: CorpusSettings) -> Corpus: ...

    def more_shards_advice(self, settings: CorpusSettings) -> str: ...


class ChatKind:
    """Kind `chat`: messages in a dataset, or in jsonl or parquet files, which the suffix tells apart."""

    def __call__(self, settings: CorpusSettings) -> Corpus:
        if settings.dataset:
            return HuggingFaceCorpus(settings)
        files = find_files(settings, JsonlCorpus.suffixes + PARQUET)
        parquet = [file for file in files if file.path.suffix in PARQUET]
        if parquet and len(parquet) < len(files):
            others = next(file for file in files if file not in parquet)
            raise CorpusError(
                f"corpus.paths names parquet files, such as {parquet[0].name}, and others, such as {others.name}; "
                "name files of one kind"
            )
        return ParquetCorpus(settings) if parquet else JsonlCorpus(settings)

    def more_shards_advice(self, settings: CorpusSettings) -> str:
        """Says what gives more shards."""
        if settings.dataset:
            return HuggingFaceCorpus.more_shards_advice(settings)
        return f"Lower corpus.shard_bytes = {settings.shard_bytes}, or write parquet with smaller row groups."


KINDS: dict[str, CorpusKind] = {
    "stdlib": StdlibCorpus,
    "text": TextCorpus,
    "jsonl": JsonlCorpus,
    "parquet": ParquetCorpus,
    "huggingface": HuggingFaceCorpus,
    "tokens": TokenCorpus,
    "chat": ChatKind(),
}


def open_corpus(settings: CorpusSettings) -> Corpus:
    """Opens the corpus of [corpus] and checks it: files exist and are not empty, encodings and columns are as expected.

    Every file is opened, none is read in full (but for the standard library's, which are small).
    Raises CorpusError with up to ten faults, one per line.
    """
    return _kind(settings)(settings)


def more_shards_advice(settings: CorpusSettings) -> str:
    """Says, as a sentence, which setting or data gives this corpus more shards."""
    return _kind(settings).more_shards_advice(settings)


def _kind(settings: CorpusSettings) -> CorpusKind:
    if settings.kind not in KINDS:  # synthetic: a source of activations, without text
        raise CorpusError(f"corpus.kind = {settings.kind!r} has no documents; choose one of {', '.join(KINDS)}")
    return KINDS[settings.kind]
