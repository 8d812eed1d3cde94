"""Kind `tokens`: binary files of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from producer.corpus.sources.files import DataFile
from producer.corpus.sources.pieces import FileCorpus, Piece, cut_file
from producer.corpus.sources.reading import HEAD_BYTES, container_fault, open_file
from producer.corpus.sources.token_layouts import Layout, read_layout
from producer.settings import BYTES_PER_TOKEN, CorpusSettings


class TokenCorpus(FileCorpus):
    """Binary files of token ids, with one of the headers of `token_layouts` or none. A shard is a span of a file.

    Spans are multiples of `context` ids, so that files of [rows, context] ids come back row for row with
    prepend_bos = false. Ids that the tokenizer lacks are refused by `windows`, which has the tokenizer.
    """

    suffixes = (".bin",)

    def __init__(self, settings: CorpusSettings) -> None:
        self._expected = np.dtype(settings.token_dtype).newbyteorder("<")
        self._context = settings.context
        self._layouts: dict[Path, Layout] = {}
        super().__init__(settings, settings.token_dtype, align=settings.context * self._expected.itemsize)

    def _fault(self, file: DataFile) -> str | None:
        if file.is_compressed:
            return f"{file.path}: token files are read in place and cannot be compressed; unpack it"
        with open_file(file) as stream:
            if fault := container_fault(stream.read(HEAD_BYTES)):
                return f"{file.path}: {fault}"
        layout = read_layout(file.path, file.size, self._expected)
        if isinstance(layout, str):
            return f"{file.path}: {layout}"
        self._layouts[file.path] = layout
        return None

    def _is_empty(self, file: DataFile) -> bool:
        return file.size <= self._layouts[file.path].start

    def _pieces(self, file: DataFile, shard_bytes: int) -> list[Piece]:
        layout = self._layouts[file.path]
        return cut_file(file, shard_bytes, self._context * layout.dtype.itemsize, layout.start)

    def _text_bytes(self, piece: Piece) -> int:
        ids = (piece.end - piece.start) // self._layouts[piece.file.path].dtype.itemsize
        return BYTES_PER_TOKEN * ids

    def _formats(self, files: Sequence[DataFile]) -> list[object]:
        """Returns what decides the ids beside corpus.token_dtype: the headers, where they say something else."""
        layouts = {file.name: self._layouts[file.path] for file in files}
        plain = (0, self._expected.itemsize)
        return [
            [name, layout.dtype.str, layout.start]
            for name, layout in layouts.items()
            if (layout.start, layout.dtype.itemsize) != plain
        ]

    def _read(self, shard: int) -> Iterator[np.ndarray]:
        for piece in self._shard_pieces[shard]:
            with open_file(piece.file) as stream:
                stream.seek(piece.start)
                data = stream.read(piece.end - piece.start)
            yield np.frombuffer(data, self._layouts[piece.file.path].dtype).astype(np.int64)
