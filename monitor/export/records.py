"""The numbers of a run, from metrics.jsonl and evaluations.jsonl, as rows of three tables.

    run          one row per report: tokens, speed, buffer, stream
    training     one row per report and SAE: loss, FVU, L0, dead latents, …
    evaluation   one row per evaluated snapshot and SAE: ΔCE, CE recovered, KL, …

Names of columns are the keys of the two files; a dot separates the parts of nested ones, as in `loss.reconstruction`.
Lists (the density histogram) are left out. A trainer that resumes from a checkpoint goes back to that moment: rows
beyond it belong to weights that nothing came from, and are left out.

metrics.jsonl is read twice, first for its columns and for the points where the run went back, then for its rows, so
that memory does not grow with its length but for eight bytes per line.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from monitor.evaluation.results import Evaluation
from monitor.history import FILE as EVALUATIONS
from monitor.history import Rollback
from monitor.json_lines import JsonLines

REPORTS = "metrics.jsonl"

Value = float | int | str | bool
OnProgress = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1."""


class RunTable(StrEnum):
    RUN = "run"
    TRAINING = "training"
    EVALUATION = "evaluation"


class ColumnType(StrEnum):
    INTEGER = "integer"
    NUMBER = "number"
    TEXT = "text"


@dataclass(frozen=True)
class Record:
    """One row of a table."""

    table: RunTable
    time: float
    """Seconds since the Unix epoch: when it was reported, or measured."""
    tokens: int
    """Tokens trained."""
    sae: str | None
    """None in the table `run`."""
    values: Mapping[str, Value]
    """By column; a value that is not known is missing."""


@dataclass(frozen=True)
class Records:
    """The rows of one run directory, as they were when it was scanned."""

    directory: Path
    columns: dict[RunTable, dict[str, ColumnType]]
    """Columns of each table beside time, tokens and sae."""
    saes: tuple[str, ...]
    _is_current: bytearray = field(repr=False)
    """For each report, whether the run never went back behind it."""
    _evaluations: tuple[Record, ...] = field(repr=False)

    @property
    def reports(self) -> int:
        """Number of reports whose rows are given."""
        return sum(self._is_current)

    @property
    def evaluations(self) -> int:
        return len(self._evaluations)

    @property
    def tables(self) -> list[RunTable]:
        """Tables that have rows."""
        return [table for table in RunTable if self.columns[table]]

    def rows(self, on_progress: OnProgress = lambda share: None) -> Iterator[Record]:
        """All rows: those of the reports in the order in which they were made, then the evaluations by tokens."""
        reports = _reports(self.directory, on_progress)
        for is_current, report in zip(self._is_current, reports, strict=False):  # the trainer may append meanwhile
            if is_current:
                yield from report_records(report)
        yield from self._evaluations


def scan(directory: Path, on_progress: OnProgress = lambda share: None) -> Records:
    """Reads a run directory once; its rows can then be read as often as is needed."""
    columns: dict[RunTable, dict[str, ColumnType]] = {table: {} for table in RunTable}
    tokens, rollbacks, saes = array("q"), dict[int, Rollback](), dict[str, None]()
    newest = 0
    for report in _reports(directory, on_progress):
        for record in report_records(report):
            _add_columns(columns[record.table], record.values)
            if record.sae is not None:
                saes[record.sae] = None
        if (now := _tokens(report)) < newest:
            rollbacks[len(tokens)] = Rollback(_time(report), now)
        tokens.append(now)
        newest = now
    evaluations = _evaluation_records(directory, list(rollbacks.values()))
    for record in evaluations:
        _add_columns(columns[RunTable.EVALUATION], record.values)
        saes[str(record.sae)] = None
    return Records(directory, columns, tuple(saes), _current(tokens, rollbacks), tuple(evaluations))


def report_records(report: Mapping[str, Any]) -> Iterator[Record]:
    """The rows of one report: the run's, then one for each SAE."""
    time, tokens = _time(report), _tokens(report)
    rest = {key: value for key, value in report.items() if key not in ("time", "tokens", "saes")}
    yield Record(RunTable.RUN, time, tokens, None, dict(_flatten(rest)))
    for sae in report.get("saes") or []:
        if isinstance(sae, dict) and isinstance(name := sae.get("name"), str):
            values = {key: value for key, value in sae.items() if key != "name"}
            yield Record(RunTable.TRAINING, time, tokens, name, dict(_flatten(values)))


def evaluation_record(line: Mapping[str, Any]) -> Record | None:
    """The row of one line of evaluations.jsonl; None for a line that names no SAE or no snapshot."""
    evaluation, sae = Evaluation.from_json(line), line.get("sae")
    if not isinstance(sae, str) or evaluation.snapshot_tokens is None:
        return None
    facts = {"rows": evaluation.rows, "predictions": evaluation.predictions, "seconds": evaluation.seconds}
    values = {key: value for key, value in evaluation.values.items() if key != "time"}
    return Record(RunTable.EVALUATION, _time(line), evaluation.snapshot_tokens, sae, dict(_flatten(values | facts)))


def _reports(directory: Path, on_progress: OnProgress) -> Iterator[dict[str, Any]]:
    path = directory / REPORTS
    size = path.stat().st_size if path.is_file() else 0
    lines = JsonLines(path)
    for report in _all_objects(lines):
        yield report
        on_progress(min(1.0, lines.offset / size))


def _all_objects(lines: JsonLines) -> Iterator[dict[str, Any]]:
    before = -1
    while lines.offset > before:
        before = lines.offset
        yield from lines.read_new()


def _evaluation_records(directory: Path, rollbacks: list[Rollback]) -> list[Record]:
    """The newest evaluation of each SAE of each snapshot that the run did not go back behind, by tokens."""
    newest: dict[tuple[int, str], Record] = {}
    for line in _all_objects(JsonLines(directory / EVALUATIONS)):
        if (record := evaluation_record(line)) is not None:
            newest[record.tokens, str(record.sae)] = record
    return [
        record
        for (tokens, _), record in sorted(newest.items())
        if not any(rollback.drops(tokens, record.time) for rollback in rollbacks)
    ]


def _current(tokens: array[int], rollbacks: dict[int, Rollback]) -> bytearray:
    """For each report, whether it lies before every point that the run later went back to."""
    is_current = bytearray(len(tokens))
    lowest = math.inf
    for index in reversed(range(len(tokens))):
        is_current[index] = tokens[index] < lowest
        if index in rollbacks:
            lowest = min(lowest, tokens[index])
    return is_current


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Value]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Value):
            yield prefix + key, value


def _add_columns(columns: dict[str, ColumnType], values: Mapping[str, Value]) -> None:
    """Adds columns that are new, and widens the type of those that need it."""
    for name, value in values.items():
        if isinstance(value, str):
            columns[name] = ColumnType.TEXT
        elif isinstance(value, float):
            if columns.get(name) is not ColumnType.TEXT:
                columns[name] = ColumnType.NUMBER
        else:
            columns.setdefault(name, ColumnType.INTEGER)


def _tokens(line: Mapping[str, Any]) -> int:
    tokens = line.get("tokens")
    return tokens if isinstance(tokens, int) else 0


def _time(line: Mapping[str, Any]) -> float:
    time = line.get("time")
    return float(time) if isinstance(time, int | float) else 0.0
