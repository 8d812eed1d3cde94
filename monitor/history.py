"""The curves of a run: metrics.jsonl and evaluations.jsonl as columns, thinned to what a screen can show.

Only what was appended since the last look is read. A trainer that resumes from a checkpoint goes back to that moment;
what it had reported beyond it belongs to a lineage that is gone, and is dropped here. The evaluations of snapshots that
were retired live on in evaluations.jsonl, to which the monitor appends each one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "evaluations.jsonl"
MOST_POINTS = 3_000
"""When there are this many, every other one goes."""
OF_A_RUN = ("time", "tokens", "tokens_per_second", "buffer_rows", "step_seconds")
OF_AN_SAE = ("fvu", "l0", "dead_latents_ratio", "shrinkage", "learning_rate", "grad_norm", "density")
OF_AN_EVALUATION = ("ce_delta", "ce_recovered", "kl", "fvu", "l0")
LONGEST_READ = 64 << 20
"""Bytes read at one look; the rest comes at the next ones."""


class History:
    """Follows one run directory, which need not exist yet. Several threads may ask."""

    def __init__(self, run_directory: Path) -> None:
        self._reports = _Lines(run_directory / "metrics.jsonl")
        self._evaluations = _Lines(run_directory / FILE)
        self._lock = threading.Lock()
        self._points: list[dict[str, Any]] = []
        self._measured: list[dict[str, Any]] = []
        self._every = 1
        self._reported = 0
        self._generation = 0
        """Changes whenever points that were handed out are gone."""

    def columns(self, generation: int = -1, since: int = 0) -> dict[str, Any]:
        """Points from number `since` on, or all of them when they are not those of `generation` any more.

        {"generation", "since", "next", run's columns, "saes": {name: columns}, "evaluations": {name: columns}}; a value
        that is not known is None. Evaluations always come whole.
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
                    name: {key: [point["saes"].get(name, {}).get(key) for point in points] for key in OF_AN_SAE}
                    for name in names
                },
                "evaluations": _evaluation_columns(self._measured),
            }

    def _read(self) -> None:
        for report in self._reports.new():
            self._take(_point(report))
        for evaluation in self._evaluations.new():
            sae, tokens = evaluation["sae"], evaluation["snapshot_tokens"]
            self._measured = [
                known for known in self._measured if known["sae"] != sae or known["snapshot_tokens"] < tokens
            ]
            self._measured.append(evaluation)

    def _take(self, point: dict[str, Any]) -> None:
        if self._points and point["tokens"] < self._points[-1]["tokens"]:
            self._points = [known for known in self._points if known["tokens"] < point["tokens"]]
            self._reported = len(self._points) * self._every
            self._generation += 1
        if self._reported % self._every == 0:
            self._points.append(point)
        self._reported += 1
        if len(self._points) >= MOST_POINTS:
            self._points = self._points[::2]
            self._every *= 2
            self._generation += 1


def append_evaluation(run_directory: Path, sae: str, evaluation: dict[str, Any]) -> None:
    """One line for the curves; what evaluation.json says, and of which SAE."""
    with open(run_directory / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"sae": sae, **evaluation}, allow_nan=False) + "\n")


class _Lines:
    """The JSON objects of a file that grows by lines; one that is half written waits for its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> Iterator[dict[str, Any]]:
        try:
            with open(self._path, "rb") as file:
                if self._path.stat().st_size < self._offset:
                    self._offset = 0  # another run in the same place
                file.seek(self._offset)
                text = file.read(LONGEST_READ)
        except OSError:
            return
        whole = text.rfind(b"\n") + 1
        self._offset += whole
        for line in text[:whole].splitlines():
            try:
                found = json.loads(line, parse_constant=lambda _: None)
            except ValueError:
                continue  # a line that a full disk cut short
            if isinstance(found, dict):
                yield found


def _point(report: dict[str, Any]) -> dict[str, Any]:
    point: dict[str, Any] = {key: report.get(key) for key in OF_A_RUN}
    point["tokens"] = report.get("tokens") or 0
    point["saes"] = {sae["name"]: {key: sae.get(key) for key in OF_AN_SAE} for sae in report.get("saes", [])}
    return point


def _evaluation_columns(measured: list[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    columns: dict[str, dict[str, list[Any]]] = {}
    for evaluation in sorted(measured, key=lambda known: known["snapshot_tokens"]):
        of_sae = columns.setdefault(evaluation["sae"], {"tokens": [], **{key: [] for key in OF_AN_EVALUATION}})
        of_sae["tokens"].append(evaluation["snapshot_tokens"])
        for key in OF_AN_EVALUATION:
            of_sae[key].append(evaluation.get(key))
    return columns
