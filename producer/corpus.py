"""Text as numbered shards, each of which can be read alone and always reads the same.

    corpus = open_corpus(settings.corpus)                    # CorpusError now, not after an hour
    for shard in corpus.training_shards:
        for document in corpus.documents(shard): ...

What is notable:

- What a shard holds is arithmetic on names and sizes. There is no index file, and no shard depends on another one.
- Text and jsonl files are cut into byte ranges, and **a line belongs to the range in which its first byte lies**. Two
  neighbours compute their common border with the same function of the file, so nothing is lost or read twice, and no
  character is cut. A line of text (not of jsonl) that is longer than 1 MiB is cut between two characters: files without
  line ends, such as text8, have usable shards too.
- Small files share a shard, so that shards stay near `shard_bytes`. A .gz file cannot be entered in the middle: it is
  never cut, and a text.gz file is one document in memory.
- No line, file or row is held that is longer than `max_document_bytes`: it fails its shard, however it is packed.
- Links are followed. A folder's files are found once, whatever links lead to them.
- The fingerprint names files relative to the folder or glob that found them: two machines may mount the data in
  different places. It holds no times. A file whose size changes while the run goes on is refused when it is read.
- pyarrow and datasets are imported by the kinds that need them, and only then.

Faults of the data raise CorpusError, and reading again will not help. Anything else that travels out of `documents`,
such as an OSError of the network, may be worth another attempt.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import hashlib
import importlib
import itertools
import json
import logging
import math
import os
import re
import sysconfig
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from platform import python_version
from typing import Any, BinaryIO, cast

import numpy as np

from producer.common.parsing import ParseError, parse_object
from producer.settings import CorpusSettings, SyntheticSettings
from producer.token_files import Layout, read_layout
from producer.wire import held_out_shards

log = logging.getLogger(__name__)

EDGE_BYTES = 64 * 1024
"""How much of a file's beginning and end the fingerprint covers, and how much of it is checked at the start."""
BLOCK_BYTES = 64 * 1024
LONGEST_LINE = 16 * BLOCK_BYTES
"""Bytes after which a line of a text file may be cut."""
GZIP_RATIO = 3
"""Text is about this many times larger than its .gz file."""
RESHARD_UP_TO = 512
"""Files of a streamed dataset up to which each footer is read for its row groups; 10,000 would take an hour."""
BATCH_ROWS = 256
"""Rows of a parquet file that are in memory together, at most."""
STDLIB_SHARDS = 64
SYNTHETIC_SEED = 20221213
CORRELATION_RANK = 8
"""Of the random correlation matrix of synthetic features: correlations have a standard deviation of 0.35."""
NORMAL_STEPS, NORMAL_REACH = 512, 4
"""The normal distribution function is read from a table with this many steps per unit, up to ± this many units."""
NORMAL_DISTRIBUTION = np.array(
    [(1 + math.erf((i / NORMAL_STEPS - NORMAL_REACH) / 2**0.5)) / 2 for i in range(2 * NORMAL_REACH * NORMAL_STEPS)],
    dtype=np.float32,
)
FAULTS_SHOWN = 10
CONTAINERS = (
    (b"\x1f\x8b\x08", "gzip data", "end its name with .gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data, which is not read", "unpack it (zstd -d), or pack it with gzip"),
    (b"\xfd7zXZ\0", "xz data, which is not read", "unpack it (xz -d), or pack it with gzip"),
    (b"\x04\x22\x4d\x18", "lz4 data, which is not read", "unpack it (lz4 -d), or pack it with gzip"),
    *((b"BZh%d1AY&SY" % level, "bzip2 data, which is not read", "unpack it (bunzip2)") for level in range(1, 10)),
    (b"PK\x03\x04", "a zip archive, such as .npz files and those of torch.save", "unpack it, or save one plain array"),
    (b"PAR1", "a parquet file", 'set corpus.kind = "parquet"'),
    (b"ARROW1", "an Arrow file", 'write it as parquet and set corpus.kind = "parquet"'),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "write its text or ids as one of the kinds of corpus.kind"),
    (b"%PDF-", "a PDF file", "extract its text"),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", "a pickle of torch.save, which is never read", "save a plain array"),
    *((b"\x80%c\x95" % level, "a pickle, which is never read", "write plain text or numbers") for level in (4, 5)),
)
"""How files begin that hold their contents in another form: (bytes, name, remedy)."""
SUFFIXES = {"text": ("",), "jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",), "tokens": (".bin",)}
"""What counts in a folder, per kind; `""` is every file. A file or glob that is named counts whatever its suffix."""


class CorpusError(ValueError):
    """The text cannot be used. `str(error)` is the whole message: name, value, expectation, next step."""


class Corpus(ABC):
    """Numbered shards of documents. The same settings and the same data give the same object anywhere."""

    shards: int
    """How many there are; they are numbered from 0."""
    description: str
    """One line for logs and for the metadata of a snapshot."""
    fingerprint: str
    """sha256, hex, over everything that decides the documents of every shard."""
    held_out_shards: list[int]
    """Never trained on: the evaluation's text."""
    training_shards: list[int]
    """All the others."""

    def __init__(self, settings: CorpusSettings, shards: int, what: str, identity: object) -> None:
        """`what` describes it; `identity` is the JSON data that, with kind and shard count, decides its documents."""
        self.shards = shards
        self.held_out_shards = held_out_shards(shards, settings.held_out)
        self.training_shards = sorted(set(range(shards)) - set(self.held_out_shards))
        self.description = f"{what}; {shards:,} shards, {len(self.held_out_shards):,} held out"
        self.fingerprint = _sha256(json.dumps([settings.kind, shards, identity], sort_keys=True).encode())
        if settings.held_out and not self.held_out_shards:
            log.warning("%s: one shard leaves the evaluation without text. %s", what, finer(settings))

    def documents(self, shard: int) -> Iterator[str | np.ndarray]:
        """The documents of one shard: text, or int64 token ids for kind `tokens`. Empty documents may be among them.

        Raises IndexError for a shard that does not exist and CorpusError for data that cannot be read.
        """
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} is not one of the corpus' {self.shards}")
        return self._read(shard)

    @abstractmethod
    def _read(self, shard: int) -> Iterator[str | np.ndarray]: ...


def open_corpus(settings: CorpusSettings) -> Corpus:
    """The corpus of [corpus], checked: files exist and are not empty, encodings and columns are as expected.

    Every file is opened, none is read in full (but for the standard library's, which are small).
    Raises CorpusError with up to ten faults, one per line.
    """
    kinds: dict[str, Callable[[CorpusSettings], Corpus]] = {
        "stdlib": StdlibCorpus,
        "text": TextCorpus,
        "jsonl": JsonlCorpus,
        "parquet": ParquetCorpus,
        "huggingface": HuggingFaceCorpus,
        "tokens": TokenCorpus,
        "synthetic": SyntheticCorpus,
    }
    return kinds[settings.kind](settings)


class StdlibCorpus(Corpus):
    """The sources of the running Python's standard library: text on every machine, without a network.

    A file's shard depends on its path alone, so what is held out stays held out in every version of Python. The
    embedded language model was trained on the training shards: do not change this mapping.
    """

    def __init__(self, settings: CorpusSettings) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        self._files: list[list[Path]] = [[] for _ in range(STDLIB_SHARDS)]
        identity = []
        self.skipped = 0
        """Files left out because they are not valid UTF-8; Python's own tests hold some."""
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if {"site-packages", "dist-packages", "__pycache__"} & set(relative.parts):
                continue
            data = path.read_bytes()
            if not _is_utf8(data):
                self.skipped += 1
                continue
            name = relative.as_posix()
            self._files[int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % STDLIB_SHARDS].append(path)
            identity.append([name, len(data), _edge_digest(data[:EDGE_BYTES], data[-EDGE_BYTES:])])
        if not identity:
            raise CorpusError(f'corpus.kind = "stdlib": {root} holds no Python sources; choose another kind')
        skipped = f"{self.skipped} skipped: not UTF-8"
        what = f"standard library of Python {python_version()}, {len(identity):,} files ({skipped})"
        super().__init__(settings, STDLIB_SHARDS, what, identity)

    def _read(self, shard: int) -> Iterator[str]:
        for path in self._files[shard]:
            try:
                yield path.read_text("utf-8")
            except UnicodeDecodeError as error:
                raise CorpusError(f"{path} changed since the corpus was opened: {error}") from None


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of the corpus, as it was when the corpus was opened."""

    path: Path
    name: str
    """Its path below the folder or glob that found it."""
    size: int
    """Bytes on disk."""
    digest: str
    """sha256 of its first and last 64 KiB."""

    @property
    def compressed(self) -> bool:
        return self.path.suffix == ".gz"


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes [start, end) of a file, before the borders are moved to line starts."""

    file: DataFile
    start: int
    end: int

    @property
    def weight(self) -> int:
        """About how many bytes of text these are."""
        return (self.end - self.start) * (GZIP_RATIO if self.file.compressed else 1)


class FileCorpus(Corpus):
    """Files cut into pieces of about `shard_bytes`; small ones share a shard."""

    def __init__(self, settings: CorpusSettings, *decisive: object, align: int = 1) -> None:
        """`decisive`: further settings that decide the documents. `align`: bytes that pieces are a multiple of."""
        files = [file for file in _find_files(settings) if file.size]
        _raise_any(fault for file in files if (fault := self._fault(file)))
        files = [file for file in files if not self._is_empty(file)]
        if not files:
            raise CorpusError(f"corpus.paths = {settings.paths}: the files hold nothing; name files with text")
        shard_bytes = settings.shard_bytes
        self._plan = _group((piece for file in files for piece in self._pieces(file, shard_bytes)), shard_bytes)
        identity = [[[file.name, file.size, file.digest] for file in files], shard_bytes, align, *decisive]
        identity += self._formats(files)
        super().__init__(settings, len(self._plan), _what(settings, files), identity)

    @abstractmethod
    def _fault(self, file: DataFile) -> str | None:
        """What is wrong with `file`, judged by its beginning, in words for the operator."""

    def _is_empty(self, file: DataFile) -> bool:
        """True for a file that has bytes but no document."""
        with _opened(file) as stream:
            return not stream.read(1)

    def _pieces(self, file: DataFile, shard_bytes: int) -> list[Piece]:
        return _pieces(file, shard_bytes)

    def _formats(self, files: Sequence[DataFile]) -> list[object]:
        """What else of the files decides the documents, as JSON data."""
        return []


class TextCorpus(FileCorpus):
    """UTF-8 text. A file, or the part of it that lies in the shard, is one document, given back to the byte."""

    def __init__(self, settings: CorpusSettings) -> None:
        self._longest = settings.max_document_bytes
        super().__init__(settings)

    def _fault(self, file: DataFile) -> str | None:
        if fault := _encoding_fault(file):
            return fault
        try:
            if file.compressed and _unpacks_beyond(file, self._longest):
                return f"{file.path}: {_too_long(None, self._longest, 'split the file')}"
        except CorpusError as error:
            return str(error)
        return None

    def _read(self, shard: int) -> Iterator[str]:
        for piece in self._plan[shard]:
            with _opened(piece.file) as stream:
                start, end = _borders(stream, piece, LONGEST_LINE)
                stream.seek(start)
                data = stream.read(self._longest + 1 if end is None else end - start)
            if end is None and len(data) > self._longest:
                raise CorpusError(f"{piece.file.path}: {_too_long(None, self._longest, 'split the file')}")
            if data:
                yield _decoded(data, piece.file, start)


class JsonlCorpus(FileCorpus):
    """One JSON object per line, its text in the field `column`; null is no document, and blank lines are skipped."""

    def __init__(self, settings: CorpusSettings) -> None:
        self._column = settings.column
        self._longest = settings.max_document_bytes
        super().__init__(settings, settings.column)

    def _fault(self, file: DataFile) -> str | None:
        if fault := _encoding_fault(file):
            return fault
        try:
            for place, record in itertools.islice(_records(Piece(file, 0, file.size), self._longest), 1):
                self._document(place, record)
        except CorpusError as error:
            return str(error)
        return None

    def _is_empty(self, file: DataFile) -> bool:
        return next(_records(Piece(file, 0, file.size), self._longest), None) is None

    def _read(self, shard: int) -> Iterator[str]:
        for piece in self._plan[shard]:
            for place, record in _records(piece, self._longest):
                if (document := self._document(place, record)) is not None:
                    yield document

    def _document(self, place: str, record: dict[str, Any]) -> str | None:
        if self._column not in record:
            raise CorpusError(f"{place}: {_no_column(self._column, record)}")
        text = record[self._column]
        if text is not None and not isinstance(text, str):
            raise CorpusError(f"{place}: {_no_text(self._column, type(text).__name__)}")
        return text


def read_records(path: Path, settings: CorpusSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each line of a jsonl file that is no part of the corpus, read as the corpus is.

    Raises CorpusError, and OSError.
    """
    file = _data_file(path, path.name)
    _raise_any([fault] if file.size and (fault := _encoding_fault(file)) else [])
    yield from _records(Piece(file, 0, file.size), settings.max_document_bytes)


def _records(piece: Piece, longest: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each line that is not blank and begins in `piece`."""
    with _opened(piece.file) as stream:
        offset, end = _borders(stream, piece, None)
        stream.seek(offset)
        while (end is None or offset < end) and (line := stream.readline(longest + len("\r\n"))):
            place = f"{piece.file.path}, line at byte {offset:,}"
            if len(line) > longest and len(line.rstrip(b"\r\n")) > longest:
                raise CorpusError(f"{place}: {_too_long(None, longest, 'leave the line out')}")
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield place, _record(piece.file, offset, line, place)
            offset += len(line)


def _record(file: DataFile, offset: int, line: bytes, place: str) -> dict[str, Any]:
    try:
        return parse_object(_decoded(line, file, offset))
    except ParseError as error:
        raise CorpusError(f"{place}: {error}; each line must be one whole JSON object") from None


class TokenCorpus(FileCorpus):
    """Binary files of token ids, with the headers of `producer.token_files` or with none. A shard is a span of one.

    Spans are multiples of `context` ids, so that files of [rows, context] ids come back row for row with
    prepend_bos = false. An id the tokenizer does not know is found by `producer.tokens`, which has the tokenizer.
    """

    def __init__(self, settings: CorpusSettings) -> None:
        self._expected = np.dtype(settings.token_dtype).newbyteorder("<")
        self._context = settings.context
        self._layouts: dict[Path, Layout] = {}
        super().__init__(settings, settings.token_dtype, align=settings.context * self._expected.itemsize)

    def _fault(self, file: DataFile) -> str | None:
        if file.compressed:
            return f"{file.path}: token files are read in place and cannot be compressed; gunzip it"
        with _opened(file) as stream:
            if container := _container(stream.read(EDGE_BYTES)):
                return f"{file.path}: {container}"
        layout = read_layout(file.path, file.size, self._expected)
        if isinstance(layout, str):
            return f"{file.path}: {layout}"
        self._layouts[file.path] = layout
        return None

    def _is_empty(self, file: DataFile) -> bool:
        return file.size <= self._layouts[file.path].start

    def _pieces(self, file: DataFile, shard_bytes: int) -> list[Piece]:
        layout = self._layouts[file.path]
        return _pieces(file, shard_bytes, self._context * layout.dtype.itemsize, layout.start)

    def _formats(self, files: Sequence[DataFile]) -> list[object]:
        """What decides the ids beside corpus.token_dtype: the headers, where they say something else."""
        layouts = {file.name: self._layouts[file.path] for file in files}
        plain = (0, self._expected.itemsize)
        return [
            [name, layout.dtype.str, layout.start]
            for name, layout in layouts.items()
            if (layout.start, layout.dtype.itemsize) != plain
        ]

    def _read(self, shard: int) -> Iterator[np.ndarray]:
        for piece in self._plan[shard]:
            with _opened(piece.file) as stream:
                stream.seek(piece.start)
                data = stream.read(piece.end - piece.start)
            yield np.frombuffer(data, self._layouts[piece.file.path].dtype).astype(np.int64)


class ParquetCorpus(Corpus):
    """Parquet files: a row group is a shard, a row's `column` a document; null is none. Needs pyarrow."""

    def __init__(self, settings: CorpusSettings) -> None:
        self._arrow = _required("pyarrow", settings)
        self._parquet = _required("pyarrow.parquet", settings)
        self._column = settings.column
        self._longest = settings.max_document_bytes
        files = [file for file in _find_files(settings) if file.size]
        _raise_any(fault for file in files if (fault := self._fault(file)))
        self._groups = [(file, group) for file in files for group in self._groups_of(file)]
        if not self._groups:
            raise CorpusError(f"corpus.paths = {settings.paths}: the parquet files hold no rows; name files with text")
        identity = [[[file.name, file.size, file.digest] for file in files], settings.column]
        super().__init__(settings, len(self._groups), _what(settings, files), identity)

    def _fault(self, file: DataFile) -> str | None:
        try:
            schema = self._parquet.read_schema(file.path)
        except (self._arrow.ArrowException, OSError) as error:
            return f"{file.path}: not a readable parquet file ({error}); correct corpus.paths or replace the file"
        if self._column not in schema.names:
            return f"{file.path}: {_no_column(self._column, schema.names)}"
        found, types = schema.field(self._column).type, self._arrow.types
        plain = found.value_type if types.is_dictionary(found) else found
        if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
            return f"{file.path}: {_no_text(self._column, found)}"
        return None

    def _groups_of(self, file: DataFile) -> list[int]:
        metadata = self._parquet.read_metadata(file.path)
        return [group for group in range(metadata.num_row_groups) if metadata.row_group(group).num_rows]

    def _read(self, shard: int) -> Iterator[str]:
        file, group = self._groups[shard]
        with _opened(file) as stream:
            table = self._parquet.ParquetFile(stream)
            metadata, row = table.metadata.row_group(group), 0
            usual = metadata.total_byte_size // metadata.num_rows
            rows = max(1, min(BATCH_ROWS, self._longest // max(1, usual)))
            try:
                for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=[self._column]):
                    for row, text in enumerate(batch.column(0).to_pylist(), row):  # noqa: B020 (goes on counting)
                        if text is not None:
                            yield _refuse_long(text, self._longest, f"{file.path}, row group {group}, row {row:,}")
                    row += 1
            except (self._arrow.ArrowException, UnicodeDecodeError) as error:
                raise CorpusError(f"{file.path}, row group {group}: damaged ({error}); replace the file") from None


class HuggingFaceCorpus(Corpus):
    """A dataset of the hub, or of a local folder, through the `datasets` library (extra `hf`).

    Streamed, a shard is a row group of a parquet file, or a file of another format; downloaded, it is a run of rows of
    about `shard_bytes`. The commit is looked up once, so that a branch which moves cannot change a running stream.
    """

    def __init__(self, settings: CorpusSettings) -> None:
        datasets = _required("datasets", settings)
        commit = _commit(settings)
        try:
            dataset = _load(datasets, settings, commit)
            first = next(iter(dataset), None)
            columns = dataset.column_names or list(first or ())
        except Exception as error:  # `datasets` raises errors of a dozen libraries; each means that it cannot be opened
            raise CorpusError(
                f"{_name(settings)} cannot be opened: {type(error).__name__}: {error}; "
                "check dataset, subset, split and revision, the network, and HF_TOKEN if access is restricted"
            ) from error
        _raise_any(_dataset_faults(settings, first, columns))
        self._name = _name(settings)
        self._column = settings.column
        self._longest = settings.max_document_bytes
        self._dataset = dataset.select_columns([settings.column])
        shards = self._dataset.num_shards if settings.streaming else _runs(self._dataset, settings.shard_bytes)
        what = f"{_name(settings)}, commit {commit or 'unknown'}, {'streamed' if settings.streaming else 'downloaded'}"
        identity = [settings.subset, settings.split, settings.column, settings.streaming, *_origin(settings, commit)]
        super().__init__(settings, shards, what, identity)

    def _read(self, shard: int) -> Iterator[str]:
        records = self._dataset.shard(num_shards=self.shards, index=shard, contiguous=True)
        for row, record in enumerate(records):
            if (text := record[self._column]) is not None:
                yield _refuse_long(text, self._longest, f"{self._name}, shard {shard}, row {row:,}")


class SyntheticCorpus(Corpus):
    """Rows of known ground truth, without text or a language model: sparse sums of random unit directions.

    Feature i is active with probability p_i, proportional to decay**i and scaled to a mean of `active` features in a
    row (then clipped at 1), with a coefficient uniform on [0, 1); a row without any is zero (Sharkey et al. 2022; no
    noise). A shard is `shard_windows` windows of `context` rows, and all of them are kept.

    With `correlated`, every row has probabilities of its own, proportional to Φ(z_i) decay**i, where z is normal with
    unit variances and a random correlation matrix; they are scaled to the same mean in each row.

    With `naming`, a row is its own name instead: shard, window, position, 1, then zeros. bfloat16 holds whole numbers
    exactly up to 256, float32 up to 2**24: a drill on a bfloat16 stream keeps all three counts at 256 or less.
    """

    directions: np.ndarray
    """The truth: unit rows, float32 [features, d_in]."""

    def __init__(self, settings: CorpusSettings) -> None:
        truth = settings.synthetic
        assert truth is not None, "CorpusSettings demands [corpus.synthetic] for this kind"
        _raise_any(_synthetic_faults(settings))
        self.d_in, self.context, self.windows = truth.d_in, settings.context, truth.shard_windows
        self._naming = truth.naming
        generator = np.random.default_rng((SYNTHETIC_SEED, 1))
        directions = generator.standard_normal((truth.features, truth.d_in), dtype=np.float32)
        self.directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        frequency = truth.decay ** np.arange(truth.features)
        self.probabilities = np.minimum(frequency * (truth.active / frequency.sum()), 1.0).astype(np.float32)
        """How often each feature is active, float32 [features]; with `correlated`, what a row's own depend on."""
        self.loadings = self._random_loadings(truth) if truth.correlated else None
        """z = normal [CORRELATION_RANK] @ loadings, with unit columns: the correlation matrix is loadingsᵀ loadings."""
        features = f"{truth.features:,} {'correlated ' if truth.correlated else ''}true features"
        contents = "names of rows" if truth.naming else f"{features}, {truth.active:g} active"
        super().__init__(
            settings,
            truth.shards,
            f"synthetic rows of width {truth.d_in}, {contents}",
            # Without `correlated` where it is off: older runs, whose rows are the same, can be resumed.
            [
                SYNTHETIC_SEED,
                settings.context,
                truth.model_dump(mode="json", exclude=None if truth.correlated else {"correlated"}),
            ],
        )

    def _read(self, shard: int) -> Iterator[str]:
        raise CorpusError('corpus.kind = "synthetic" has no documents; its rows come from SyntheticCorpus.rows(shard)')

    def rows(self, shard: int) -> np.ndarray:
        """The shard's rows in order, window by window, float32 [shard_windows * context, d_in]."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} is not one of the corpus' {self.shards}")
        if self._naming:
            return self._names(shard)
        generator = np.random.default_rng((SYNTHETIC_SEED, 2, shard))
        return np.concatenate([self._window(generator) for _ in range(self.windows)])

    def _window(self, generator: np.random.Generator) -> np.ndarray:
        # One uniform number serves twice: below p the feature is active, and number / p is then uniform on [0, 1).
        probabilities = np.broadcast_to(self._probabilities(generator), (self.context, len(self.probabilities)))
        uniform = generator.random(probabilities.shape, dtype=np.float32)
        row, feature = np.nonzero(uniform < probabilities)
        coefficients = uniform[row, feature] / probabilities[row, feature]
        filled, starts = np.unique(row, return_index=True)
        rows = np.zeros((self.context, self.d_in), dtype=np.float32)
        if len(filled):  # reduceat and not a matrix product: cheaper, and the same bits whatever the BLAS
            rows[filled] = np.add.reduceat(coefficients[:, None] * self.directions[feature], starts, axis=0)
        return rows

    def _probabilities(self, generator: np.random.Generator) -> np.ndarray:
        """Of every feature in the next window's rows, [features] when all rows have the same or [context, features]."""
        if self.loadings is None:
            return self.probabilities
        factors = generator.standard_normal((self.context, len(self.loadings)), dtype=np.float32)
        z = np.zeros((self.context, len(self.probabilities)), dtype=np.float32)
        for factor, loading in zip(factors.T, self.loadings, strict=True):  # the same bits whatever the BLAS, as below
            z += factor[:, None] * loading
        place = ((z + NORMAL_REACH) * NORMAL_STEPS).astype(np.int32)
        weights = NORMAL_DISTRIBUTION[np.clip(place, 0, len(NORMAL_DISTRIBUTION) - 1)] * self.probabilities
        scale = self.probabilities.sum(dtype=np.float64) / weights.sum(1, keepdims=True, dtype=np.float64)
        return np.minimum(weights * scale.astype(np.float32), 1.0, dtype=np.float32)

    @staticmethod
    def _random_loadings(truth: SyntheticSettings) -> np.ndarray:
        generator = np.random.default_rng((SYNTHETIC_SEED, 3))
        loadings = generator.standard_normal((CORRELATION_RANK, truth.features), dtype=np.float32)
        return loadings / np.linalg.norm(loadings, axis=0)

    def _names(self, shard: int) -> np.ndarray:
        rows = np.zeros((self.windows, self.context, self.d_in), dtype=np.float32)
        rows[..., 0] = shard
        rows[..., 1] = np.arange(self.windows)[:, None]
        rows[..., 2] = np.arange(self.context)
        rows[..., 3] = 1
        return rows.reshape(-1, self.d_in)


# Finding files


def _find_files(settings: CorpusSettings) -> list[DataFile]:
    """The files of corpus.paths, in the order of its entries and by name within each; every file once."""
    found: dict[str, tuple[Path, str]] = {}
    faults = []
    for entry in settings.paths:
        matches = _matches(entry, settings.kind)
        if isinstance(matches, str):
            faults.append(f"corpus.paths holds {entry!r}, {matches} (relative paths start at {Path.cwd()})")
            continue
        for name, path in sorted(matches):
            found.setdefault(os.path.abspath(path), (path, name))
    _raise_any(faults)
    files: list[DataFile] = []
    for path, name in found.values():
        try:
            files.append(_data_file(path, name))
        except OSError as error:
            faults.append(f"{path} of corpus.paths cannot be read: {error.strerror}; correct path or permissions")
    _raise_any(faults)
    return files


def _matches(entry: str, kind: str) -> list[tuple[str, Path]] | str:
    """(name, path) of each file that `entry` stands for, or in words why there is none."""
    path = Path(entry)
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        suffixes = SUFFIXES[kind]
        return _in_folder(path, suffixes) or f"a folder without files{_ending(suffixes)}; name another folder, or files"
    if not _is_pattern(entry):
        return "which does not exist; correct the path"
    root = Path(*itertools.takewhile(lambda part: not _is_pattern(part), path.parts))
    files = [(path.relative_to(root).as_posix(), path) for path in _expand(entry) if path.is_file()]
    return files or "which matches no file; correct the pattern"


def _in_folder(folder: Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Files at any depth whose name ends as asked (.gz aside), without hidden ones."""
    return [
        (path.relative_to(folder).as_posix(), path)
        for path in _walk(folder)
        if path.name.removesuffix(".gz").endswith(suffixes)
    ]


def _walk(folder: Path) -> Iterator[Path]:
    """The files below a folder, hidden ones aside. Links are followed, and each folder is entered once.

    Folders come before links to them, whatever their names: a link that leads back, or to what is read anyway, adds
    nothing. What cannot be read is left out with a warning.
    """
    entered: set[tuple[int, int]] = set()
    starts = [folder]
    while starts:
        links = []
        for start in starts:
            for here, names, files in os.walk(start, onerror=_warn_of_folder):
                if (identity := _identity(here)) in entered:
                    names.clear()
                    continue
                entered.add(identity)
                names[:] = [name for name in names if not name.startswith(".")]
                links += [path for name in names if (path := Path(here, name)).is_symlink()]
                yield from filter(_is_readable, (Path(here, name) for name in files if not name.startswith(".")))
        starts = sorted(links)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_readable(path: Path) -> bool:
    """Whether this is a file; a link that leads nowhere is none, and is warned of."""
    if path.is_symlink() and not path.exists():
        log.warning("%s is left out of the corpus: it is a link to %s, which does not exist", path, os.readlink(path))
    return path.is_file()


def _warn_of_folder(error: OSError) -> None:
    log.warning("%s is left out of the corpus: it cannot be read (%s)", error.filename, error.strerror)


def _expand(pattern: str) -> Iterator[Path]:
    """What a glob pattern matches. `**` follows links as `glob` does, but never back to where it came from."""
    recursive = re.search(r"(?:^|(?<=/))\*\*(?:/|$)", pattern)
    if recursive is None:
        yield from map(Path, glob(pattern))
        return
    for start in glob(pattern[: recursive.start()] or "."):
        for folder in _folders(Path(start)):
            yield from _expand(f"{escape(str(folder))}/{pattern[recursive.end() :] or '*'}")


def _folders(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """`folder` and those below it at any depth, through links, without hidden ones and what lies in itself."""
    if (identity := _identity(folder)) in above:
        return
    yield folder
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        _warn_of_folder(error)
        return
    for name in names:
        yield from _folders(folder / name, above | {identity})


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def _ending(suffixes: tuple[str, ...]) -> str:
    return "" if "" in suffixes else " that end in " + " or ".join(suffixes)


def _data_file(path: Path, name: str) -> DataFile:
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(EDGE_BYTES)
        stream.seek(max(0, size - EDGE_BYTES))
        return DataFile(path, name, size, _edge_digest(head, stream.read(EDGE_BYTES)))


def _edge_digest(head: bytes, tail: bytes) -> str:
    return _sha256(hashlib.sha256(head).digest() + hashlib.sha256(tail).digest())


def _what(settings: CorpusSettings, files: Sequence[DataFile]) -> str:
    size = sum(file.size for file in files) / 1e6
    names = " … ".join(file.name for file in (files[:1] if len(files) == 1 else (files[0], files[-1])))
    return f"{len(files):,} {settings.kind} file{'s' * (len(files) > 1)}, {size:,.1f} MB: {names}"


# Cutting files into shards


def _group(pieces: Iterable[Piece], shard_bytes: int) -> list[list[Piece]]:
    """The pieces of each shard: neighbours share one while they fit into `shard_bytes` together."""
    shards: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not shards or piece.weight > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(piece)
        room -= piece.weight
    return shards


def _pieces(file: DataFile, shard_bytes: int, align: int = 1, start: int = 0) -> list[Piece]:
    """What follows `start` in equal parts of about `shard_bytes`, multiples of `align`; a .gz file stays whole."""
    size = file.size - start
    count = 1 if file.compressed else max(1, min(-(-size // shard_bytes), size // align))
    borders = [start + size * part // count // align * align for part in range(count)] + [file.size]
    return [Piece(file, begin, end) for begin, end in itertools.pairwise(borders)]


def _borders(stream: BinaryIO, piece: Piece, longest_line: int | None) -> tuple[int, int | None]:
    """First byte and end of the lines that begin in `piece`; the end of a .gz file's text is not known (None)."""
    if piece.file.compressed:
        return 0, None
    size = piece.file.size
    return _line_start(stream, piece.start, size, longest_line), _line_start(stream, piece.end, size, longest_line)


def _line_start(stream: BinaryIO, offset: int, size: int, longest_line: int | None) -> int:
    """Where the first line at or after `offset` begins; `size` if none does.

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


# Reading files


@contextmanager
def _opened(file: DataFile) -> Iterator[BinaryIO]:
    """`file` for reading, unpacked if it is .gz. Raises CorpusError if it has another size or cannot be unpacked."""
    size = file.path.stat().st_size
    if size != file.size:
        raise CorpusError(
            f"{file.path}: {size:,} bytes, but {file.size:,} when the corpus was opened; "
            "a corpus must not change during a run: restore the file, or start a new run"
        )
    try:
        with cast(BinaryIO, gzip.open(file.path) if file.compressed else open(file.path, "rb")) as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{file.path}: damaged gzip file ({error}); replace it") from None


def _encoding_fault(file: DataFile) -> str | None:
    """Says if the first 64 KiB of `file` are not UTF-8 text."""
    try:
        with _opened(file) as stream:
            head = stream.read(EDGE_BYTES)
            whole = not stream.read(1)
    except CorpusError as error:
        return str(error)
    if container := _container(head):
        return f"{file.path}: {container}"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=whole)
    except UnicodeDecodeError as error:
        return f"{file.path}: {_not_utf8(error, 0)}"
    if (zero := head.find(0)) >= 0:
        return f"{file.path}: a zero byte at byte {zero:,}, so this is UTF-16 or no text; convert it to UTF-8"
    return None


def _container(head: bytes) -> str | None:
    """Says if a file that begins with `head` holds its contents in another form, and what to do."""
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it (tar -xf)"
    return next((f"{name}; {remedy}" for magic, name, remedy in CONTAINERS if head.startswith(magic)), None)


def _unpacks_beyond(file: DataFile, size: int) -> bool:
    """Whether a .gz file that gives its size, at its end, as more than `size` bytes indeed holds so many."""
    with file.path.open("rb") as stream:
        stream.seek(max(0, file.size - 4))
        claimed = int.from_bytes(stream.read(4), "little")
    if claimed <= size:
        return False
    with _opened(file) as stream:  # a file that is cut short claims anything
        stream.seek(size)
        return bool(stream.read(1))


def _refuse_long(text: str, longest: int, place: str) -> str:
    """`text`. Raises CorpusError if it is longer than corpus.max_document_bytes."""
    if 4 * len(text) > longest and (size := len(text.encode())) > longest:
        raise CorpusError(f"{place}: {_too_long(size, longest, 'leave it out')}")
    return text


def _too_long(size: int | None, longest: int, remedy: str) -> str:
    many = f"more than {longest:,}" if size is None else f"{size:,}"
    return (
        f"{many} bytes in one document, over corpus.max_document_bytes = {longest}; {remedy}, or raise the setting "
        "(tokenizing takes about 200 bytes of memory for each byte)"
    )


def _decoded(data: bytes, file: DataFile, offset: int) -> str:
    """`data`, which stands at byte `offset` of `file`, as text; a byte order mark is no text."""
    try:
        return data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file.path}: {_not_utf8(error, offset)}") from None


def _not_utf8(error: UnicodeDecodeError, offset: int) -> str:
    place, byte = offset + error.start, error.object[error.start]
    return f"not UTF-8 at byte {place:,} (0x{byte:02x}: {error.reason}); convert it (iconv -t UTF-8) or leave it out"


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


# Hugging Face


def _load(datasets: Any, settings: CorpusSettings, commit: str | None) -> Any:
    dataset = datasets.load_dataset(
        settings.dataset,
        settings.subset,
        split=settings.split,
        revision=commit,
        streaming=settings.streaming,
    )
    if settings.streaming and hasattr(dataset, "reshard") and dataset.num_shards <= RESHARD_UP_TO:
        return dataset.reshard()
    return dataset


def _commit(settings: CorpusSettings) -> str | None:
    """The commit that corpus.revision stands for now; the setting itself for a local folder, or without network."""
    from huggingface_hub import HfApi  # a dependency of datasets

    assert settings.dataset is not None, "CorpusSettings demands a name for this kind"
    if Path(settings.dataset).exists():
        return settings.revision
    try:
        return HfApi().dataset_info(settings.dataset, revision=settings.revision, timeout=30).sha
    except Exception as error:  # load_dataset either finds a copy in its cache or says better what is wrong
        log.warning("cannot look up the commit of dataset %s: %s", settings.dataset, error)
        return settings.revision


def _origin(settings: CorpusSettings, commit: str | None) -> list[object]:
    """What names the dataset's contents: a local folder's files, or the hub's name and commit."""
    folder = Path(settings.dataset or "")
    if not folder.is_dir():
        return [settings.dataset, commit]
    files = [_data_file(path, name) for name, path in sorted(_in_folder(folder, ("",)))]
    return [[[file.name, file.size, file.digest] for file in files]]


def _dataset_faults(settings: CorpusSettings, first: dict[str, Any] | None, columns: list[str]) -> list[str]:
    if first is None:
        return [f"{_name(settings)} holds no rows; name another split or subset"]
    if settings.column not in columns:
        return [f"{_name(settings)}: {_no_column(settings.column, columns)}"]
    if (text := first[settings.column]) is not None and not isinstance(text, str):
        return [f"{_name(settings)}: {_no_text(settings.column, type(text).__name__)}"]
    return []


def _runs(dataset: Any, shard_bytes: int) -> int:
    """How many runs of rows of about `shard_bytes` a downloaded dataset has."""
    return max(1, min(len(dataset), round(dataset.data.nbytes / shard_bytes)))


def _name(settings: CorpusSettings) -> str:
    subset = f", subset {settings.subset!r}" if settings.subset else ""
    return f"corpus.dataset = {settings.dataset!r}{subset}, split {settings.split!r}"


# Messages


def _raise_any(faults: Iterable[str]) -> None:
    if not (found := list(faults)):
        return
    more = [f"and {len(found) - FAULTS_SHOWN} more"] if len(found) > FAULTS_SHOWN else []
    raise CorpusError("\n".join(found[:FAULTS_SHOWN] + more))


def _no_column(column: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(column, names, n=1)
    nearest = f" (did you mean {close[0]}?)" if close else ""
    return f"corpus.column = {column!r} is not there{nearest}; known here: {', '.join(names)}"


def _no_text(column: str, found: object) -> str:
    return f"corpus.column = {column!r} holds {found}; expected text; name another column"


def _synthetic_faults(settings: CorpusSettings) -> list[str]:
    truth = settings.synthetic
    assert truth is not None
    faults = []
    if truth.naming and truth.d_in < 4:
        faults.append(f"corpus.synthetic.naming needs room for four numbers, but d_in = {truth.d_in}; raise d_in to 4")
    if truth.active > truth.features:
        faults.append(f"corpus.synthetic.active = {truth.active:g} exceeds features = {truth.features}; lower active")
    return faults


def finer(settings: CorpusSettings) -> str:
    """What gives a corpus more shards."""
    if settings.kind in ("text", "jsonl", "tokens"):
        return f"Lower corpus.shard_bytes = {settings.shard_bytes}."
    if settings.kind == "huggingface" and settings.streaming:
        return "Set corpus.streaming = false."
    return "Name more data, or write it with smaller row groups."


def _required(module: str, settings: CorpusSettings) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = f"corpus.kind = {settings.kind!r} needs {module}, which cannot be imported ({error})"
        raise CorpusError(f'{what}; pip install "sluice[hf]"') from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
