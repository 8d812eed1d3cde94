"""Kind `jsonl`: files with one JSON object per line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from producer.common.parsing import ParseError, parse_object
from producer.corpus.base import CorpusError, Document, raise_faults
from producer.corpus.sources.columns import Column
from producer.corpus.sources.files import DataFile, data_file
from producer.corpus.sources.pieces import FileCorpus, Piece, line_borders
from producer.corpus.sources.reading import decode, encoding_fault, open_file, too_long
from producer.settings import CorpusSettings


class JsonlCorpus(FileCorpus):
    """One JSON object per line, its text in the field `column`; null is no document, and blank lines are skipped.

    Kind `chat` reads its messages the same way.
    """

    suffixes = (".jsonl", ".ndjson")

    def __init__(self, settings: CorpusSettings) -> None:
        self._column = Column(settings)
        self._longest = settings.max_document_bytes
        super().__init__(settings, settings.column)

    def _fault(self, file: DataFile) -> str | None:
        if fault := encoding_fault(file):
            return fault
        try:
            for place, record in itertools.islice(_records(Piece(file, 0, file.size), self._longest), 1):
                list(self._column.documents(record, place))
        except CorpusError as error:
            return str(error)
        return None

    def _is_empty(self, file: DataFile) -> bool:
        return next(_records(Piece(file, 0, file.size), self._longest), None) is None

    def _read(self, shard: int) -> Iterator[Document]:
        for piece in self._shard_pieces[shard]:
            for place, record in _records(piece, self._longest):
                yield from self._column.documents(record, place)


def read_records(path: Path, settings: CorpusSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) of each line of a jsonl file that is no part of the corpus, read as the corpus is.

    Raises CorpusError, and OSError.
    """
    file = data_file(path, path.name)
    raise_faults([fault] if file.size and (fault := encoding_fault(file)) else [])
    yield from _records(Piece(file, 0, file.size), settings.max_document_bytes)


def _records(piece: Piece, longest: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) of each line that is not blank and begins in `piece`."""
    with open_file(piece.file) as stream:
        offset, end = line_borders(stream, piece, None)
        if end is not None:
            stream.seek(offset)
        while (end is None or offset < end) and (line := stream.readline(longest + len("\r\n"))):
            place = f"{piece.file.path}, line at byte {offset:,}"
            if len(line) > longest and len(line.rstrip(b"\r\n")) > longest:
                raise CorpusError(f"{place}: {too_long(None, longest, 'leave the line out')}")
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield place, _record(piece.file, offset, line, place)
            offset += len(line)


def _record(file: DataFile, offset: int, line: bytes, place: str) -> dict[str, Any]:
    try:
        return parse_object(decode(line, file, offset))
    except ParseError as error:
        is_array = offset == 0 and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"[") and not line.rstrip().endswith(b"]")
        advice = "; the file is one JSON array: unpack it (jq -c '.[]')" if is_array else ""
        raise CorpusError(f"{place}: {error}; each line must be one whole JSON object{advice}") from None
