"""The curves of a run: metrics.jsonl and evaluations.jsonl as columns, thinned to what a screen can show.

Only what was appended since the last look is read. A trainer that resumes from a checkpoint goes back to that moment;
what it had reported beyond it belongs to a lineage that is gone, and is dropped here. The evaluations of snapshots that
were retired live on in evaluations.jsonl, to which the monitor appends each one.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monitor.evaluation.measures import Stage, measures
from producer.common.parsing import ParseError, parse_object
from trainer.report import DENSITY_EDGES

Columns = dict[str, dict[str, list[Any]]]
"""By SAE and name."""
FILE = "evaluations.jsonl"
MOST_POINTS = 3_000
"""When there are this many, every other one goes; of each SAE's evaluations, so many that no more are left."""
OF_A_RUN = ("time", "tokens", "tokens_per_second", "buffer_rows", "step_seconds")
LONGEST_READ = 64 << 20
"""Bytes read at one look; the rest comes at the next ones."""


class History:
    """Follows one run directory, which need not exist yet. Several threads may ask."""

    def __init__(self, run_directory: Path) -> None:
        self._reports = _Lines(run_directory / "metrics.jsonl")
        self._evaluations = _Lines(run_directory / FILE)
        self._lock = threading.Lock()
        self._keys = _keys(Stage.TRAINING)
        """Measures of training that have curves."""
        self._generation = 0
        """Changes whenever points that were handed out are gone."""
        self._evaluated = 0
        """Changes whenever the evaluations do."""
        self._curves: tuple[int, Columns] = (-1, {})
        """The evaluations as columns, and the number for which they were made."""
        self._begin()

    def _begin(self) -> None:
        self._points: list[dict[str, Any]] = []
        self._measured: dict[tuple[str, int], dict[str, Any]] = {}
        """The last evaluation of each snapshot, by SAE and tokens."""
        self._returns: list[tuple[float, int]] = []
        """When a trainer has gone back, and to how many tokens."""
        self._newest: dict[str, Any] = {"tokens": 0, "saes": []}
        self._every = 1
        self._reported = 0
        self._generation += 1
        self._evaluated += 1

    def columns(self, generation: int = -1, since: int = 0, evaluated: int = -1) -> dict[str, Any]:
        """Points from number `since` on, or all of them when they are not those of `generation` any more.

        {"generation", "since", "next", run's columns, "saes": {name: columns}, "density": {name: newest counts},
        "density_edges" as `trainer.report` has them, "evaluated", "evaluations": {name: columns}}; a value that is not
        known is None. Evaluations come whole, or as None to who has those of the number `evaluated`.
        """
        with self._lock:
            self._read()
            since = since if generation == self._generation and since <= len(self._points) else 0
            points = self._points[since:]
            names = list(dict.fromkeys(name for point in points for name in point["saes"]))
            return {
                "generation": self._generation,
                "since": since,
                "next": len(self._points),
                **{key: [point[key] for point in points] for key in OF_A_RUN},
                "saes": {
                    name: {key: [point["saes"].get(name, {}).get(key) for point in points] for key in self._keys}
                    for name in names
                },
                "density_edges": DENSITY_EDGES,
                "density": {sae["name"]: sae.get("density") or [] for sae in self._newest["saes"]},
                "evaluated": self._evaluated,
                "evaluations": None if evaluated == self._evaluated else self._evaluation_columns(),
            }

    def _read(self) -> None:
        if self._reports.is_another():
            self._begin()
            self._evaluations.rewind()
        for report in self._reports.new():
            self._take(report)
        for evaluation in self._evaluations.new():
            if isinstance(evaluation.get("sae"), str) and isinstance(evaluation.get("snapshot_tokens"), int):
                self._measured[evaluation["sae"], evaluation["snapshot_tokens"]] = evaluation
                self._evaluated += 1

    def _evaluation_columns(self) -> Columns:
        if self._curves[0] != self._evaluated:
            self._curves = (self._evaluated, _evaluation_columns(self._measured, self._returns))
        return self._curves[1]

    def _take(self, report: dict[str, Any]) -> None:
        report = {"time": 0.0, "saes": [], **report, "tokens": report.get("tokens") or 0}
        if report["tokens"] < self._newest["tokens"]:
            self._returns.append((report["time"], report["tokens"]))
            self._evaluated += 1
            self._points = [known for known in self._points if known["tokens"] < report["tokens"]]
            self._reported = len(self._points) * self._every
            self._generation += 1
        self._newest = report
        if self._reported % self._every == 0:
            self._points.append(_point(report, self._keys))
        self._reported += 1
        if len(self._points) >= MOST_POINTS:
            self._points = self._points[::2]
            self._every *= 2
            self._generation += 1


def append_evaluation(run_directory: Path, sae: str, evaluation: dict[str, Any]) -> None:
    """One line for the curves: what evaluation.json says, of which SAE, and when."""
    line = json.dumps({"time": time.time(), "sae": sae, **evaluation}, allow_nan=False)
    with open(run_directory / FILE, "a", encoding="utf-8") as file:
        file.write(line + "\n")


class _Lines:
    """The JSON objects of a file that grows by lines; one that is half written waits for its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._identity: int | None = None

    def is_another(self) -> bool:
        """True when another run's file is in the place of the one that was read; it is read from the start."""
        try:
            found = self._path.stat()
        except OSError:
            return False
        another = self._identity is not None and (found.st_ino != self._identity or found.st_size < self._offset)
        if another:
            self.rewind()
        self._identity = found.st_ino
        return another

    def rewind(self) -> None:
        self._offset = 0

    def new(self) -> Iterator[dict[str, Any]]:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                text = file.read(LONGEST_READ)
        except OSError:
            return
        whole = text.rfind(b"\n") + 1
        self._offset += whole
        for line in text[:whole].splitlines():
            try:
                yield parse_object(line, finite=True)
            except ParseError:
                continue  # a line that a full disk cut short


def _keys(stage: Stage) -> list[str]:
    return [measure.name for measure in measures(stage) if measure.in_history]


def _point(report: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    point: dict[str, Any] = {key: report.get(key) for key in OF_A_RUN}
    point["saes"] = {sae["name"]: {key: sae.get(key) for key in keys} for sae in report["saes"]}
    return point


def _evaluation_columns(measured: dict[tuple[str, int], dict[str, Any]], returns: list[tuple[float, int]]) -> Columns:
    """The evaluations by SAE and tokens, without those that a trainer has gone back behind; of many, every so many."""
    surviving: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for (sae, tokens), evaluation in sorted(measured.items(), key=lambda item: item[0]):
        if not any(evaluation.get("time", 0.0) < then and tokens > to for then, to in returns):
            surviving.setdefault(sae, []).append((tokens, evaluation))
    columns: Columns = {}
    for sae, evaluations in surviving.items():
        step = -(-len(evaluations) // MOST_POINTS)
        shown = evaluations[::-1][::step][::-1]  # the newest always
        columns[sae] = {"tokens": [tokens for tokens, _ in shown]}
        columns[sae] |= {key: [evaluation.get(key) for _, evaluation in shown] for key in _keys(Stage.HELD_OUT)}
    return columns
