"""The curves of a run: metrics.jsonl and evaluations.jsonl as columns, thinned to what a screen can show.

Each look reads only what was appended since the one before. A trainer that resumes from a checkpoint goes back to that
moment; the points beyond it belong to weights that nothing came from, and are dropped. Evaluations of snapshots that
were retired remain in evaluations.jsonl, to which the monitor appends each one.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitor.evaluation.measures import Measure, Stage, measures
from monitor.evaluation.results import Evaluation
from monitor.json_lines import JsonLines
from trainer.phases import RunPhase
from trainer.report import DENSITY_EDGES

Columns = dict[str, dict[str, list[Any]]]
"""Values by SAE and by name of a measure."""
FILE = "evaluations.jsonl"
MAX_POINTS = 3_000
"""With so many points of training, every second one is dropped; of an SAE's evaluations, no more are returned."""
RUN_KEYS = ("time", "tokens", "tokens_per_second", "buffer_rows", "step_seconds")
"""Columns of the run, as reports name them."""


@dataclass(frozen=True)
class _EvaluationPoint:
    time: float
    """When it was measured, in seconds since the Unix epoch."""
    evaluation: Evaluation


@dataclass(frozen=True)
class Rollback:
    """A trainer has resumed from a checkpoint, behind what was reported."""

    time: float
    tokens: int

    def drops(self, tokens: int, measured_at: float) -> bool:
        """Whether a snapshot after so many tokens is of the weights that were given up."""
        return measured_at < self.time and tokens > self.tokens


EvaluationPoints = dict[tuple[str, int], _EvaluationPoint]
"""The newest evaluation of each snapshot, by SAE and tokens."""


class History:
    """Follows one run directory, which need not exist yet. Safe to use from several threads."""

    def __init__(self, run_directory: Path, max_points: int = MAX_POINTS) -> None:
        self._reports = JsonLines(run_directory / "metrics.jsonl")
        self._evaluations = JsonLines(run_directory / FILE)
        self._max_points = max_points
        self._lock = threading.Lock()
        self._training_keys = [measure.name for measure in _curve_measures(Stage.TRAINING)]
        self._generation = 0
        """Changes whenever points that were handed out are gone."""
        self._evaluations_version = 0
        """Changes whenever the evaluations do."""
        self._evaluation_cache: tuple[int, Columns] = (-1, {})
        """The evaluations as columns, and their version."""
        self._reset()

    def _reset(self) -> None:
        self._points: list[dict[str, Any]] = []
        self._evaluation_points: EvaluationPoints = {}
        self._rollbacks: list[Rollback] = []
        self._newest_report: dict[str, Any] = {"tokens": 0, "saes": []}
        self._stride = 1
        """One in so many reports is a point."""
        self._report_count = 0
        self._generation += 1
        self._evaluations_version += 1

    def columns(self, generation: int = -1, since: int = 0, evaluated: int = -1) -> dict[str, Any]:
        """Points from number `since` on, or all of them when they are not those of `generation` any more.

        {"generation", "since", "next", run's columns, "saes": {name: columns}, "density": {name: newest counts},
        "density_edges" as `trainer.report` has them, "evaluated", "evaluations": {name: columns}}; an unknown value is
        None. Evaluations come whole; they are None where `evaluated`, the version that the caller has, is the newest.
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
                **{key: [point[key] for point in points] for key in RUN_KEYS},
                "saes": {name: self._training_columns(name, points) for name in names},
                "density_edges": DENSITY_EDGES,
                "density": {sae["name"]: sae.get("density") or [] for sae in self._newest_report["saes"]},
                "evaluated": self._evaluations_version,
                "evaluations": None if evaluated == self._evaluations_version else self._evaluation_columns(),
            }

    def _training_columns(self, sae: str, points: list[dict[str, Any]]) -> dict[str, list[Any]]:
        numbers = [point["saes"].get(sae, {}) for point in points]
        return {key: [one.get(key) for one in numbers] for key in self._training_keys}

    def _read(self) -> None:
        if self._reports.is_replaced():
            self._reset()
            self._evaluations.rewind()
        for report in self._reports.read_new():
            self._add_report(report)
        for line in self._evaluations.read_new():
            evaluation = Evaluation.from_json(line)
            if isinstance(line.get("sae"), str) and isinstance(evaluation.snapshot_tokens, int):
                key = (line["sae"], evaluation.snapshot_tokens)
                self._evaluation_points[key] = _EvaluationPoint(line.get("time", 0.0), evaluation)
                self._evaluations_version += 1

    def _evaluation_columns(self) -> Columns:
        if self._evaluation_cache[0] != self._evaluations_version:
            columns = _evaluation_columns(self._evaluation_points, self._rollbacks, self._max_points)
            self._evaluation_cache = (self._evaluations_version, columns)
        return self._evaluation_cache[1]

    def _add_report(self, report: dict[str, Any]) -> None:
        if report.get("state") == RunPhase.FILLING and not report.get("saes"):
            return  # the buffer is being filled before the first step: there is nothing to draw
        report = {"time": 0.0, "saes": [], **report, "tokens": report.get("tokens") or 0}
        if report["tokens"] < self._newest_report["tokens"]:
            self._rollbacks.append(Rollback(report["time"], report["tokens"]))
            self._evaluations_version += 1
            self._points = [point for point in self._points if point["tokens"] < report["tokens"]]
            self._report_count = len(self._points) * self._stride
            self._generation += 1
        self._newest_report = report
        if self._report_count % self._stride == 0:
            self._points.append(_point(report, self._training_keys))
        self._report_count += 1
        if len(self._points) >= self._max_points:
            self._points = self._points[::2]
            self._stride *= 2
            self._generation += 1


def append_evaluation(run_directory: Path, sae: str, evaluation: Evaluation, time: float) -> None:
    """Appends an evaluation to evaluations.jsonl. `time` is when it was measured, in seconds since the Unix epoch."""
    line = json.dumps({"time": time, "sae": sae, **evaluation.as_json()}, allow_nan=False)
    with open(run_directory / FILE, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def _curve_measures(stage: Stage) -> list[Measure]:
    return [measure for measure in measures(stage) if measure.in_history]


def _point(report: dict[str, Any], training_keys: list[str]) -> dict[str, Any]:
    point: dict[str, Any] = {key: report.get(key) for key in RUN_KEYS}
    point["saes"] = {sae["name"]: {key: sae.get(key) for key in training_keys} for sae in report["saes"]}
    return point


def _evaluation_columns(points: EvaluationPoints, rollbacks: list[Rollback], max_points: int) -> Columns:
    """Evaluations as columns by SAE, in the order of tokens, without those that a rollback drops; thinned if many."""
    remaining: dict[str, list[tuple[int, Evaluation]]] = {}
    for (sae, tokens), point in sorted(points.items(), key=lambda item: item[0]):
        if not any(rollback.drops(tokens, point.time) for rollback in rollbacks):
            remaining.setdefault(sae, []).append((tokens, point.evaluation))
    columns: Columns = {}
    for sae, evaluations in remaining.items():
        step = -(-len(evaluations) // max_points)
        thinned = evaluations[::-1][::step][::-1]  # the newest always
        columns[sae] = {
            "tokens": [tokens for tokens, _ in thinned],
            "time": [points[sae, tokens].time for tokens, _ in thinned],
        }
        for measure in _curve_measures(Stage.HELD_OUT):
            columns[sae][measure.name] = [evaluation.value(measure) for _, evaluation in thinned]
    return columns
