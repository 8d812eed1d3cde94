"""Kind `parquet`: parquet files, read by pyarrow, which is imported when a corpus of this kind is opened."""

from __future__ import annotations

from collections.abc import Iterator

from producer.corpus.base import Corpus, CorpusError, column_missing, column_not_text, import_library, raise_faults
from producer.corpus.files import DataFile, describe_files, find_files
from producer.corpus.reading import open_file, refuse_long
from producer.settings import CorpusSettings

BATCH_ROWS = 256
"""Rows of a parquet file that are in memory together, at most."""
SUFFIXES = (".parquet",)


class ParquetCorpus(Corpus):
    """Parquet files: a row group is a shard, a row's `column` a document; null is none. Needs pyarrow."""

    def __init__(self, settings: CorpusSettings) -> None:
        self._arrow = import_library("pyarrow", settings)
        self._parquet = import_library("pyarrow.parquet", settings)
        self._column = settings.column
        self._longest = settings.max_document_bytes
        files = [file for file in find_files(settings, SUFFIXES) if file.size]
        raise_faults(fault for file in files if (fault := self._fault(file)))
        self._groups = [(file, group) for file in files for group in self._groups_of(file)]
        if not self._groups:
            raise CorpusError(f"corpus.paths = {settings.paths}: the parquet files hold no rows; name files with text")
        identity = [[[file.name, file.size, file.digest] for file in files], settings.column]
        super().__init__(settings, len(self._groups), describe_files(settings, files), identity)

    def _fault(self, file: DataFile) -> str | None:
        try:
            schema = self._parquet.read_schema(file.path)
        except (self._arrow.ArrowException, OSError) as error:
            return f"{file.path}: not a readable parquet file ({error}); correct corpus.paths or replace the file"
        if self._column not in schema.names:
            return f"{file.path}: {column_missing(self._column, schema.names)}"
        column_type, types = schema.field(self._column).type, self._arrow.types
        value_type = column_type.value_type if types.is_dictionary(column_type) else column_type
        if not (types.is_string(value_type) or types.is_large_string(value_type) or types.is_string_view(value_type)):
            return f"{file.path}: {column_not_text(self._column, column_type)}"
        return None

    def _groups_of(self, file: DataFile) -> list[int]:
        metadata = self._parquet.read_metadata(file.path)
        return [group for group in range(metadata.num_row_groups) if metadata.row_group(group).num_rows]

    def _read(self, shard: int) -> Iterator[str]:
        file, group = self._groups[shard]
        with open_file(file) as stream:
            table = self._parquet.ParquetFile(stream)
            metadata, row = table.metadata.row_group(group), 0
            mean_bytes = metadata.total_byte_size // metadata.num_rows
            batch_rows = max(1, min(BATCH_ROWS, self._longest // max(1, mean_bytes)))
            try:
                for batch in table.iter_batches(batch_size=batch_rows, row_groups=[group], columns=[self._column]):
                    for row, text in enumerate(batch.column(0).to_pylist(), row):  # noqa: B020 (goes on counting)
                        if text is not None:
                            yield refuse_long(text, self._longest, f"{file.path}, row group {group}, row {row:,}")
                    row += 1
            except (self._arrow.ArrowException, UnicodeDecodeError) as error:
                raise CorpusError(f"{file.path}, row group {group}: damaged ({error}); replace the file") from None
