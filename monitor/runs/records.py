"""The state, the numbers and the settings of each run, as the page of several runs needs them.

Field names are the keys in the JSON of /v1/runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from monitor.evaluation.measures import Measure, Stage, get
from monitor.evaluation.results import Evaluation, value_of
from monitor.http.live_page import RunSnapshots, sae_rows
from monitor.http.live_page import headline as headline_of
from monitor.run_directory import newest_evaluations, read_page, read_run
from monitor.runs.frontier import frontier
from producer.common.toml import show_value

FRONTIER_MEASURES = ("fvu", "ce_delta")
"""Measures that are drawn by L0."""


@dataclass(frozen=True)
class SaeRecord:
    """One SAE of one run."""

    run: str
    name: str
    architecture: str | None
    latents: int | None
    cells: list[str]
    """Its numbers as text, in the order of the measures that have a heading on the live page."""
    l0: float | None
    """As `fvu`: on held-out text where that is measured, else in training."""
    fvu: float | None
    ce_delta: float | None
    """Nats per token."""
    measured: Literal["held-out", "training"] | None
    """Where `l0` and `fvu` are from."""

    @property
    def title(self) -> str:
        return f"{self.run}/{self.name}"


@dataclass(frozen=True)
class RunRecord:
    """One run."""

    name: str
    state: str
    """The trainer's phase, or the run's outcome."""
    source: str
    """The language model and its hooks."""
    tokens: int | None
    target_tokens: int | None
    tokens_per_second: float | None
    snapshots: int
    reported: float | None
    """When the trainer last reported, in seconds since the Unix epoch."""
    settings: dict[str, str]
    """Settings by dotted key, as TOML writes them."""
    saes: list[SaeRecord]


@dataclass(frozen=True)
class SettingRow:
    """One setting, in all runs."""

    key: str
    values: list[str | None]
    """None where a run does not have it."""

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1

    @property
    def marks(self) -> list[bool]:
        """Whether each value is another than the most frequent one, which is the first of several."""
        usual = max(self.values, key=self.values.count)
        return [value != usual for value in self.values]


def read_record(name: str, directory: Path) -> RunRecord:
    """Reads one run."""
    run, page = read_run(directory), read_page(directory, 1)
    snapshots = RunSnapshots(page.entries, page.count, newest_evaluations(directory))
    head, report = headline_of(run), run["report"] or {}
    source = (run["summary"] if run["state"] == "finished" else report) or {}
    reports = {sae["name"]: sae for sae in report.get("saes", [])}
    published = page.entries[-1].saes if page.entries else {}
    saes = []
    for row in sae_rows(run, snapshots):
        numbers = reports.get(row.name) or (published[row.name].metrics if row.name in published else {})
        saes.append(
            SaeRecord(
                run=name,
                name=row.name,
                architecture=row.architecture,
                latents=row.latents,
                cells=row.cells,
                **_point(numbers, row.evaluation),
            )
        )
    return RunRecord(
        name=name,
        state=head.state,
        source=head.source,
        tokens=source.get("tokens"),
        target_tokens=report.get("target_tokens"),
        tokens_per_second=source.get("tokens_per_second"),
        snapshots=page.count,
        reported=report.get("time"),
        settings=dict(_flat(run["settings"] or {})),
        saes=saes,
    )


def _point(report: Mapping[str, Any], evaluation: Evaluation | None) -> dict[str, Any]:
    """L0, FVU and ΔCE; L0 and FVU are of the same text."""

    def value(measure: Measure) -> float | None:
        number = value_of(measure, report, evaluation)
        return float(number) if isinstance(number, int | float) else None

    stages: tuple[tuple[Stage, Literal["held-out", "training"]], ...] = (
        (Stage.HELD_OUT, "held-out"),
        (Stage.TRAINING, "training"),
    )
    for stage, measured in stages:
        l0, fvu = value(get("l0", stage)), value(get("fvu", stage))
        if l0 is not None and fvu is not None:
            return {"l0": l0, "fvu": fvu, "ce_delta": value(get("ce_delta", Stage.HELD_OUT)), "measured": measured}
    return {"l0": None, "fvu": None, "ce_delta": None, "measured": None}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted key; tables of an array by their names, or by number where they have none."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            for number, one in enumerate(value):
                yield from _flat(one, f"{prefix}{key}.{one.get('name', number)}.")
        else:
            yield f"{prefix}{key}", show_value(value)


def setting_rows(records: Sequence[RunRecord]) -> list[SettingRow]:
    """All settings of the runs side by side, in the order of the first run that has them."""
    keys = dict.fromkeys(key for record in records for key in record.settings)
    return [SettingRow(key, [record.settings.get(key) for record in records]) for key in keys]


def frontiers(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Titles of the SAEs on the frontier of L0 and each of FRONTIER_MEASURES.

    Of those measured on held-out text where there are any: numbers of different texts do not compare.
    """
    saes = [sae for record in records for sae in record.saes]
    held_out = [sae for sae in saes if sae.measured == "held-out"]
    lines = {}
    for measure in FRONTIER_MEASURES:
        points = [
            (sae.title, sae.l0, loss)
            for sae in held_out or saes
            if sae.l0 is not None and (loss := getattr(sae, measure)) is not None
        ]
        lines[measure] = [points[index][0] for index in frontier([(l0, loss) for _, l0, loss in points])]
    return lines
