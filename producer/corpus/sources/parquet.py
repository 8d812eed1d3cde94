"""Kind `parquet`: parquet files, read by pyarrow, which is imported when a corpus of this kind is opened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from producer.corpus.base import Corpus, CorpusError, Document, column_not_text, import_library, raise_faults
from producer.corpus.sources.columns import SET_CHAT, Column
from producer.corpus.sources.files import DataFile, describe_files, find_files
from producer.corpus.sources.reading import open_file
from producer.settings import CorpusSettings

BATCH_ROWS = 256
"""Rows of a parquet file that are in memory together, at most."""
SUFFIXES = (".parquet",)


class ParquetCorpus(Corpus):
    """Parquet files: a row group is a shard, a row's `column` a document; null is none. Needs pyarrow.

    Kind `chat` reads its messages the same way.
    """

    def __init__(self, settings: CorpusSettings) -> None:
        self._arrow = import_library("pyarrow", settings)
        self._parquet = import_library("pyarrow.parquet", settings)
        self._column = Column(settings)
        self._longest = settings.max_document_bytes
        files = [file for file in find_files(settings, SUFFIXES) if file.size]
        raise_faults(fault for file in files if (fault := self._fault(file)))
        groups = [(file, *group) for file in files for group in self._groups_of(file)]
        self._groups = [(file, number) for file, number, _ in groups]
        if not self._groups:
            raise CorpusError(f"corpus.paths = {settings.paths}: the parquet files hold no rows; name files with text")
        identity = [[[file.name, file.size, file.digest] for file in files], settings.column]
        text_bytes = [size for _, _, size in groups]
        super().__init__(settings, len(self._groups), describe_files(settings, files), identity, text_bytes)

    def _fault(self, file: DataFile) -> str | None:
        try:
            schema = self._parquet.read_schema(file.path)
        except (self._arrow.ArrowException, OSError) as error:
            return f"{file.path}: not a readable parquet file ({error}); correct corpus.paths or replace the file"
        name = self._column.name(schema.names)
        if name is None:
            chats = {field.name: [{"role": ""}] for field in schema if self._is_messages(field.type)}
            return f"{file.path}: {self._column.missing(schema.names, chats)}"
        if fault := self._type_fault(name, schema):
            return f"{file.path}: {fault}"
        return None

    def _type_fault(self, name: str, schema: Any) -> str | None:
        """Says what is wrong with the type of the column; None when it can hold documents."""
        types = self._arrow.types
        first, *fields = [name] if name in schema.names else name.split(".")
        column_type = schema.field(first).type
        for field in fields:
            names = [entry.name for entry in column_type] if types.is_struct(column_type) else []
            if field not in names:
                return f"corpus.column = {name!r}: {first} is {column_type}, without a field {field}; name another"
            column_type = column_type.field(field).type
        is_messages = self._is_messages(column_type)
        if self._column.is_chat:
            is_text = types.is_string(column_type) or types.is_large_string(column_type)
            return (
                None if is_messages or is_text else f"corpus.column = {name!r} holds {column_type}; expected messages"
            )
        if is_messages:
            return f"corpus.column = {name!r} holds messages; {SET_CHAT}"
        entry = self._entry_type(column_type)
        is_ids = entry is not column_type and types.is_integer(entry)
        if is_ids or types.is_string(entry) or types.is_large_string(entry) or types.is_string_view(entry):
            return None
        return column_not_text(name, column_type)

    def _entry_type(self, column_type: Any) -> Any:
        """The type of a value, or of the entries of a list."""
        types = self._arrow.types
        if types.is_dictionary(column_type):
            return column_type.value_type
        is_list = (
            types.is_list(column_type) or types.is_large_list(column_type) or types.is_fixed_size_list(column_type)
        )
        return column_type.value_type if is_list else column_type

    def _is_messages(self, column_type: Any) -> bool:
        entry = self._entry_type(column_type)
        if entry is column_type or not self._arrow.types.is_struct(entry):
            return False
        return bool({"role", "from"} & {field.name for field in entry})

    def _groups_of(self, file: DataFile) -> list[tuple[int, int]]:
        """Returns (number, bytes of the columns that are read) of each row group with rows."""
        metadata = self._parquet.read_metadata(file.path)
        roots = self._column.roots(metadata.schema.to_arrow_schema().names)
        groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
        return [
            (number, sum(_column_bytes(group, index, roots) for index in range(group.num_columns)))
            for number, group in enumerate(groups)
            if group.num_rows
        ]

    def _read(self, shard: int) -> Iterator[Document]:
        file, group = self._groups[shard]
        with open_file(file) as stream:
            table = self._parquet.ParquetFile(stream)
            metadata, row = table.metadata.row_group(group), 0
            mean_bytes = metadata.total_byte_size // metadata.num_rows
            batch_rows = max(1, min(BATCH_ROWS, self._longest // max(1, mean_bytes)))
            try:
                columns = self._column.roots(table.schema_arrow.names)
                for batch in table.iter_batches(batch_size=batch_rows, row_groups=[group], columns=columns):
                    for row, record in enumerate(batch.to_pylist(), row):  # noqa: B020 (goes on counting)
                        yield from self._column.documents(record, f"{file.path}, row group {group}, row {row:,}")
                    row += 1
            except (self._arrow.ArrowException, UnicodeDecodeError) as error:
                raise CorpusError(f"{file.path}, row group {group}: damaged ({error}); replace the file") from None


def _column_bytes(group: Any, index: int, roots: list[str]) -> int:
    """Bytes of a column chunk, unpacked, where it belongs to one of the columns that are read."""
    chunk = group.column(index)
    path = chunk.path_in_schema
    return chunk.total_uncompressed_size if any(path == root or path.startswith(f"{root}.") for root in roots) else 0
