"""Files cut into byte ranges, and the corpora whose shards are such pieces.

**A line belongs to the range in which its first byte lies.** Two neighbours compute their common border with the same
function of the file, so nothing is lost or read twice, and no character is cut. Small files share a shard, so that
shards stay near `shard_bytes`. A packed file cannot be entered in the middle: it is never cut.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, ClassVar

from producer.corpus.base import Corpus, CorpusError, raise_faults
from producer.corpus.sources.files import DataFile, describe_files, find_files
from producer.corpus.sources.reading import open_file
from producer.settings import CorpusSettings

BLOCK_BYTES = 64 * 1024
GZIP_RATIO = 3
"""Text is about this many times larger than its .gz file."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes [start, end) of a file, before the borders are moved to line starts."""

    file: DataFile
    start: int
    end: int

    @property
    def weight(self) -> int:
        """About how many bytes of text the piece holds."""
        return (self.end - self.start) * (GZIP_RATIO if self.file.is_compressed else 1)


class FileCorpus(Corpus):
    """Files cut into pieces of about `shard_bytes`; small ones share a shard."""

    suffixes: ClassVar[tuple[str, ...]]
    """Endings of the files that count in a folder; `""` is every file."""

    def __init__(self, settings: CorpusSettings, *more_identity: object, align: int = 1) -> None:
        """`more_identity`: further settings that decide the documents. `align`: bytes that pieces are multiples of."""
        files = [file for file in find_files(settings, self.suffixes) if file.size]
        raise_faults(fault for file in files if (fault := self._fault(file)))
        files = [file for file in files if not self._is_empty(file)]
        if not files:
            raise CorpusError(f"corpus.paths = {settings.paths}: the files hold nothing; name files with text")
        shard_bytes = settings.shard_bytes
        pieces = (piece for file in files for piece in self._pieces(file, shard_bytes))
        self._shard_pieces = group_pieces(pieces, shard_bytes)
        identity = [[[file.name, file.size, file.digest] for file in files], shard_bytes, align, *more_identity]
        identity += self._formats(files)
        text_bytes = [sum(map(self._text_bytes, pieces)) for pieces in self._shard_pieces]
        super().__init__(settings, len(self._shard_pieces), describe_files(settings, files), identity, text_bytes)

    @classmethod
    def more_shards_advice(cls, settings: CorpusSettings) -> str:
        return f"Lower corpus.shard_bytes = {settings.shard_bytes}."

    @abstractmethod
    def _fault(self, file: DataFile) -> str | None:
        """Says what is wrong with `file`, judged by its beginning; None when nothing is."""

    def _is_empty(self, file: DataFile) -> bool:
        """Tells whether a file that has bytes has no document."""
        with open_file(file) as stream:
            return not stream.read(1)

    def _pieces(self, file: DataFile, shard_bytes: int) -> list[Piece]:
        return cut_file(file, shard_bytes)

    def _text_bytes(self, piece: Piece) -> int:
        """About how many bytes of text a piece stands for."""
        return piece.weight

    def _formats(self, files: Sequence[DataFile]) -> list[object]:
        """Returns what else of the files decides the documents, as JSON data."""
        return []


def group_pieces(pieces: Iterable[Piece], shard_bytes: int) -> list[list[Piece]]:
    """Returns the pieces of each shard: neighbours share one while they fit into `shard_bytes` together."""
    shards: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not shards or piece.weight > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(piece)
        room -= piece.weight
    return shards


def cut_file(file: DataFile, shard_bytes: int, align: int = 1, start: int = 0) -> list[Piece]:
    """Cuts what follows `start` into equal pieces of about `shard_bytes`, multiples of `align`; a .gz file is one."""
    size = file.size - start
    count = 1 if file.is_compressed else max(1, min(-(-size // shard_bytes), size // align))
    borders = [start + size * part // count // align * align for part in range(count)] + [file.size]
    return [Piece(file, begin, end) for begin, end in itertools.pairwise(borders)]


def line_borders(stream: BinaryIO, piece: Piece, longest_line: int | None) -> tuple[int, int | None]:
    """Returns first byte and end of the lines that begin in `piece`; the end of a .gz file's text is unknown: None."""
    if piece.file.is_compressed:
        return 0, None
    size = piece.file.size
    return _line_start(stream, piece.start, size, longest_line), _line_start(stream, piece.end, size, longest_line)


def _line_start(stream: BinaryIO, offset: int, size: int, longest_line: int | None) -> int:
    """Returns where the first line at or after `offset` begins; `size` if none does.

    With `longest_line`, a line that goes on for so many bytes is cut at the first character at or after `offset`.
    The result never falls as `offset` grows, so that consecutive pieces neither overlap nor leave gaps.
    """
    if offset in (0, size):
        return offset
    position = stream.seek(offset - 1)
    while longest_line is None or position < offset - 1 + longest_line:
        block = stream.read(BLOCK_BYTES)
        if (newline := block.find(b"\n")) >= 0:
            return position + newline + 1
        position += len(block)
        if not block:
            return size
    stream.seek(offset)
    following = stream.read(3)  # of a character's at most four bytes, the last three are 0b10xxxxxx
    return offset + len(list(itertools.takewhile(lambda byte: byte & 0xC0 == 0x80, following)))
