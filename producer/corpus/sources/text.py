"""Kind `text`: files of UTF-8 text.

A line that is longer than 1 MiB is cut between two characters: files without line ends, such as text8, have usable
shards too. A text.gz file is one document in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from producer.corpus.base import CorpusError
from producer.corpus.sources.files import DataFile
from producer.corpus.sources.pieces import BLOCK_BYTES, FileCorpus, line_borders
from producer.corpus.sources.reading import decode, encoding_fault, open_file, too_long, unpacks_beyond
from producer.settings import CorpusSettings

LONGEST_LINE = 16 * BLOCK_BYTES
"""Bytes after which a line may be cut."""


class TextCorpus(FileCorpus):
    """UTF-8 text. A file, or the part of it that lies in the shard, is one document, unchanged to the byte."""

    suffixes = ("",)

    def __init__(self, settings: CorpusSettings) -> None:
        self._longest = settings.max_document_bytes
        super().__init__(settings)

    def _fault(self, file: DataFile) -> str | None:
        if fault := encoding_fault(file):
            return fault
        try:
            if file.is_compressed and unpacks_beyond(file, self._longest):
                return f"{file.path}: {too_long(None, self._longest, 'split the file')}"
        except CorpusError as error:
            return str(error)
        return None

    def _read(self, shard: int) -> Iterator[str]:
        for piece in self._shard_pieces[shard]:
            with open_file(piece.file) as stream:
                start, end = line_borders(stream, piece, LONGEST_LINE)
                if end is not None:
                    stream.seek(start)
                data = stream.read(self._longest + 1 if end is None else end - start)
            if end is None and len(data) > self._longest:
                raise CorpusError(f"{piece.file.path}: {too_long(None, self._longest, 'split the file')}")
            if data:
                yield decode(data, piece.file, start)
