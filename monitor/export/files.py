"""The rows of a run as CSV or Parquet, a file for each table: run, training, evaluation."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from monitor.export.errors import missing_extra
from monitor.export.records import ColumnType, OnProgress, Record, Records, RunTable, Value
from trainer.state.durable import new_file

if TYPE_CHECKING:
    import pyarrow

GROUP_ROWS = 16_384
"""Rows of a group of a Parquet file, which are held in memory."""


class _Writer(Protocol):
    """A file that is being written."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def write_csv(records: Records, folder: Path, on_progress: OnProgress) -> list[Path]:
    """Writes TABLE.csv for each table that has rows; a value that is not known is empty. Returns the files."""
    return _write(records, folder, "csv", _CsvWriter, on_progress)


def write_parquet(records: Records, folder: Path, on_progress: OnProgress) -> list[Path]:
    """Writes TABLE.parquet for each table that has rows. Raises ExportError where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise missing_extra("Parquet", "pyarrow", "parquet") from None
    return _write(records, folder, "parquet", _ParquetWriter, on_progress)


def _write(records: Records, folder: Path, suffix: str, writer_type: Any, on_progress: OnProgress) -> list[Path]:
    files = {table: folder / f"{table}.{suffix}" for table in records.tables}
    with ExitStack() as stack:
        writers = {
            table: stack.enter_context(_open(writer_type, path, _columns(table, records.columns[table])))
            for table, path in files.items()
        }
        for record in records.rows(on_progress):
            writers[record.table].write(record)
    return list(files.values())


@contextmanager
def _open(writer_type: Any, path: Path, columns: Mapping[str, ColumnType]) -> Iterator[_Writer]:
    """A writer whose file is there in full once the block succeeds, or not at all."""
    with new_file(path) as temporary:
        writer = writer_type(temporary, columns)
        try:
            yield writer
        finally:
            writer.close()
        temporary.chmod(0o644)


def _columns(table: RunTable, columns: Mapping[str, ColumnType]) -> dict[str, ColumnType]:
    """All columns of a table: where a row belongs first."""
    place = {"time": ColumnType.NUMBER, "tokens": ColumnType.INTEGER}
    return place | ({} if table is RunTable.RUN else {"sae": ColumnType.TEXT}) | dict(columns)


def _cells(record: Record) -> dict[str, Value | None]:
    return {"time": record.time, "tokens": record.tokens, "sae": record.sae, **record.values}


class _CsvWriter:
    def __init__(self, path: Path, columns: Mapping[str, ColumnType]) -> None:
        self._file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._writer = csv.writer(self._file)
        self._names = list(columns)
        self._writer.writerow(self._names)

    def write(self, record: Record) -> None:
        cells = _cells(record)
        self._writer.writerow([cells.get(name) for name in self._names])

    def close(self) -> None:
        self._file.close()


class _ParquetWriter:
    def __init__(self, path: Path, columns: Mapping[str, ColumnType]) -> None:
        import pyarrow
        from pyarrow import parquet

        types = {
            ColumnType.INTEGER: pyarrow.int64(), ColumnType.NUMBER: pyarrow.float64(), ColumnType.TEXT: pyarrow.string()
        }  # fmt: skip
        self._columns = columns
        self._schema: pyarrow.Schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
        self._writer = parquet.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Value | None]] = []

    def write(self, record: Record) -> None:
        self._rows.append(_cells(record))
        if len(self._rows) == GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        import pyarrow

        arrays = [
            pyarrow.array([_cast(row.get(name), kind) for row in self._rows], self._schema.field(name).type)
            for name, kind in self._columns.items()
        ]
        self._writer.write_batch(pyarrow.record_batch(arrays, schema=self._schema))
        self._rows.clear()


def _cast(value: Value | None, kind: ColumnType) -> Value | None:
    """A value in the type of its column, which other rows may have widened."""
    if value is None:
        return None
    match kind:
        case ColumnType.TEXT:
            return str(value)
        case ColumnType.NUMBER:
            return float(value)
        case ColumnType.INTEGER:
            return int(value)
