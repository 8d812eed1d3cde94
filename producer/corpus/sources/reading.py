"""Opens the files of a corpus: unpacks .gz and .zst files, and refuses in words what is no UTF-8 text or is too long.

A file whose size changes while the run goes on is refused when it is read. No document is held that is longer than
corpus.max_document_bytes, however it is packed.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from producer.corpus.base import CorpusError
from producer.corpus.sources.files import DataFile

HEAD_BYTES = 64 * 1024
"""Bytes at the beginning of a file that are checked when the corpus is opened."""
CONTAINERS = (
    (b"\x1f\x8b\x08", "gzip data", "end its name with .gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "end its name with .zst"),
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
"""First bytes of files that hold their contents in another form: (bytes, name, remedy)."""


@contextmanager
def open_file(file: DataFile) -> Iterator[BinaryIO]:
    """Opens `file`, unpacked if it is packed. Raises CorpusError if its size has changed or it cannot be unpacked."""
    size = file.path.stat().st_size
    if size != file.size:
        raise CorpusError(
            f"{file.path}: {size:,} bytes, but {file.size:,} when the corpus was opened; "
            "a corpus must not change during a run: restore the file, or start a new run"
        )
    try:
        if file.path.suffix == ".zst":
            with _open_zstd(file) as stream:
                yield stream
            return
        with cast(BinaryIO, gzip.open(file.path) if file.is_compressed else open(file.path, "rb")) as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{file.path}: damaged gzip file ({error}); replace it") from None


@contextmanager
def _open_zstd(file: DataFile) -> Iterator[BinaryIO]:
    """Opens a .zst file, unpacked, by pyarrow; it can only be read from front to back."""
    try:
        import pyarrow  # of the extra `hf`
    except ImportError as error:
        need = f"{file.path}: .zst files need pyarrow, which cannot be imported ({error})"
        raise CorpusError(f'{need}; pip install "sluice-sae[hf]", or unpack it (zstd -d)') from None
    try:
        with pyarrow.input_stream(str(file.path), compression="zstd") as packed:
            yield cast(BinaryIO, io.BufferedReader(packed))
    except OSError as error:
        raise CorpusError(f"{file.path}: damaged zstd file ({error}); replace it") from None


def encoding_fault(file: DataFile) -> str | None:
    """Says why the first 64 KiB of `file` are no UTF-8 text; None when they are."""
    try:
        with open_file(file) as stream:
            head = stream.read(HEAD_BYTES)
            is_whole = not stream.read(1)
    except CorpusError as error:
        return str(error)
    if fault := container_fault(head):
        return f"{file.path}: {fault}"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=is_whole)
    except UnicodeDecodeError as error:
        return f"{file.path}: {_not_utf8(error, 0)}"
    if (zero := head.find(0)) >= 0:
        return f"{file.path}: a zero byte at byte {zero:,}, so this is UTF-16 or no text; convert it to UTF-8"
    return None


def container_fault(head: bytes) -> str | None:
    """Names the format of a file that begins with `head`, and what to do; None for one that may be text or ids."""
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it (tar -xf)"
    return next((f"{name}; {remedy}" for magic, name, remedy in CONTAINERS if head.startswith(magic)), None)


def unpacks_beyond(file: DataFile, size: int) -> bool:
    """Tells whether a packed file holds more than `size` bytes: a .gz file's end says so, and unpacking confirms it."""
    if file.path.suffix == ".zst":
        with open_file(file) as stream:
            return sum(map(len, iter(lambda: stream.read(min(HEAD_BYTES, size + 1)), b""))) > size
    with file.path.open("rb") as stream:
        stream.seek(max(0, file.size - 4))
        stated = int.from_bytes(stream.read(4), "little")
    if stated <= size:
        return False
    with open_file(file) as stream:  # a file that is cut short states anything
        stream.seek(size)
        return bool(stream.read(1))


def refuse_long(text: str, longest: int, place: str) -> str:
    """Returns `text`. Raises CorpusError if it is longer than `longest`, which is corpus.max_document_bytes."""
    if 4 * len(text) > longest and (size := len(text.encode())) > longest:
        raise CorpusError(f"{place}: {too_long(size, longest, 'leave it out')}")
    return text


def too_long(size: int | None, longest: int, remedy: str) -> str:
    """Says that a document of `size` bytes, None where they were not counted, is longer than `longest`."""
    amount = f"more than {longest:,}" if size is None else f"{size:,}"
    return (
        f"{amount} bytes in one document, over corpus.max_document_bytes = {longest}; {remedy}, or raise the setting "
        "(tokenizing takes about 200 bytes of memory for each byte)"
    )


def decode(data: bytes, file: DataFile, offset: int) -> str:
    """Decodes `data`, which stands at byte `offset` of `file`; a byte order mark is no text. Raises CorpusError."""
    try:
        return data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file.path}: {_not_utf8(error, offset)}") from None


def _not_utf8(error: UnicodeDecodeError, offset: int) -> str:
    place, byte = offset + error.start, error.object[error.start]
    return f"not UTF-8 at byte {place:,} (0x{byte:02x}: {error.reason}); convert it (iconv -t UTF-8) or leave it out"
