"""The live page (`/`): the state of a run, its curves, its latents, its snapshots. Pure functions of what was read.

The page is complete as it is sent; its script (`static/live_page.js`) replaces parts of it by newer ones, draws the
curves and saves clicks a reload. What is unknown yet is announced in its place, so nothing moves when it comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from markupsafe import Markup

from monitor.evaluation.measures import MEASURES, Measure, Stage, measures
from monitor.evaluation.results import Evaluation, value_of
from monitor.http.html import moment, number, render
from monitor.http.suite_table import suite_table
from monitor.run_directory import SILENT_SECONDS, SnapshotEntry, hooks_of
from producer.common.formatting import format_count, format_duration
from producer.common.server import is_loopback_name
from producer.common.shell import shell_command
from trainer.report import STEADY_PHASES, RanksReport, StreamReport, describe_bottleneck

PALETTE = ("#bd7d0c", "#3f7fc4", "#46966a", "#b0558f", "#7a6ac9", "#c2603a", "#4f8f95", "#8f8a3c")
"""One colour per SAE in charts and tables, distinct for the colour-blind; contrast 3 and more on light and on dark."""
DENSITIES = (
    ("", "any"),
    ("0:0", "silent"),
    ("1e-9:1e-4", "up to 0.01 %"),
    ("1e-4:1e-3", "0.01 to 0.1 %"),
    ("1e-3:1e-2", "0.1 to 1 %"),
    ("1e-2:0.1", "1 to 10 %"),
    ("0.1:1", "over 10 %"),
)
"""Densities that the table can be narrowed to, as `Explorer.table` takes them, and words for them."""
MARKS = (("", "all"), ("bookmark", "bookmarked"), ("note", "with notes"))
"""Latents that the table can be narrowed to by what people have left, and words for them."""
SNAPSHOTS_SHOWN = 20
"""The newest; the page asks for its parts every two seconds."""

Run = dict[str, Any]
"""The JSON of /v1/run."""
Fact = tuple[str, str]
"""A number in bold and the words behind it."""


@dataclass(frozen=True)
class RunSnapshots:
    """The snapshots of a run, as far as the page shows them."""

    newest: list[SnapshotEntry]
    """The last SNAPSHOTS_SHOWN, oldest first."""
    count: int
    """Number of all snapshots."""
    evaluations: dict[str, Evaluation]
    """The newest evaluation of each SAE."""


@dataclass(frozen=True)
class Headline:
    """The card at the top of the page."""

    state: str
    source: str
    """The language model and its hooks."""
    progress: float
    """Share of the run's tokens that are trained; 0 where it has no end."""
    facts: list[Fact]
    note: str
    """A sentence on what training waits for, or on when the run ended; empty where that is unknown."""


@dataclass(frozen=True)
class SaeRow:
    """A row of the table of SAEs."""

    name: str
    colour: str
    architecture: str | None
    hooks: str | None
    """The hooks that it reads and writes."""
    latents: int | None
    cells: list[str]
    """Its numbers, in the order of the headings."""
    evaluation: Evaluation | None


@dataclass(frozen=True)
class MeasureRow:
    """A row of the table of all measures on held-out text."""

    title: str
    meaning: str
    cells: list[str]
    """One per SAE."""


@dataclass(frozen=True)
class SnapshotRow:
    """A row of the table of snapshots."""

    name: str
    tokens: int
    created: str
    is_pinned: bool
    bytes: int
    saes: int
    evaluated_saes: int
    paths: list[str]
    """Files to download, beside the manifest."""


@dataclass(frozen=True)
class LatentSection:
    """The section about latents as it is sent."""

    saes: list[str]
    selected: str | None
    """The SAE whose latents are shown."""
    search: str
    density: str
    """The value of DENSITIES that is selected."""
    marked: str
    """The value of MARKS that is selected."""
    text: str
    """The sentence whose firing latents are shown; empty for none."""
    table: str
    """HTML: the table, or why there is none."""
    firings: str
    """HTML: the latents that fire on `text`, or why there are none."""

    @property
    def densities(self) -> list[tuple[str, str]]:
        """Densities to choose from: values, and words for them."""
        chosen = [] if self.density in dict(DENSITIES) else [(self.density, self.density)]
        return [*DENSITIES, *chosen]


@dataclass(frozen=True)
class PageChart:
    """The place of a chart; the script draws it."""

    id: str
    title: str
    caption: str
    measure: Measure | None = None


def run_page(run: Run, snapshots: RunSnapshots, latents: LatentSection, base_url: str) -> str:
    """The whole page, as HTML."""
    address = base_url.rstrip("/")
    is_local = is_loopback_name(urlsplit(address).hostname or "")
    return render(
        "live_page.html",
        title=run["directory"],
        charts=charts(),
        marks=MARKS,
        latents=latents,
        latent_table=Markup(latents.table),
        pull=shell_command("monitor", "pull", address, anywhere=True)
        if is_local
        else f"python -m monitor pull {address}",
        is_local=is_local,
        has_grid=len({sae.get("d_sae") for sae in (run["settings"] or {}).get("sae", [])}) > 2,
        **_live(run, snapshots),
    )


def parts(run: Run, snapshots: RunSnapshots) -> dict[str, Any]:
    """The parts that the script replaces, as HTML by the id of their element; and the colours of its curves."""
    live = _live(run, snapshots)
    return {
        "state": run["state"],
        "colours": colours_of(run, snapshots),
        "parts": {
            "headline": render("headline.html", **live),
            "saes-part": render("saes.html", **live),
            "snapshots-part": render("snapshots.html", **live),
        },
    }


def _live(run: Run, snapshots: RunSnapshots) -> dict[str, Any]:
    """The variables of the parts' templates."""
    saes = sae_rows(run, snapshots)
    return {
        "run": run,
        "headline": headline(run),
        "saes": saes,
        "suite": suite_table({sae.name: sae.cells for sae in saes}, _columns()),
        "headings": [measure.page_heading for measure in _columns()],
        "dead_tokens": _dead_tokens(run["settings"] or {}),
        "measures": measure_rows([sae.evaluation for sae in saes]),
        "snapshots": [_snapshot_row(entry) for entry in snapshots.newest],
        "older": max(0, snapshots.count - len(snapshots.newest)),
    }


def _dead_tokens(settings: Mapping[str, Any]) -> str:
    """The numbers of tokens after which latents count as dead, as the run's SAEs have them."""
    counts = sorted({sae["dead_tokens"] for sae in settings.get("sae", []) if "dead_tokens" in sae})
    return " or ".join(f"{count:,}" for count in counts) or "dead_tokens"


def colours_of(run: Run, snapshots: RunSnapshots) -> dict[str, str]:
    """A colour for each SAE of the run, in the order of the trainer's reports; an averaged copy has its SAE's."""
    names = _names(run, snapshots)
    originals = {name: name.removesuffix("-ema") if name.removesuffix("-ema") in names else name for name in names}
    distinct = list(dict.fromkeys(originals.values()))
    return {name: PALETTE[distinct.index(original) % len(PALETTE)] for name, original in originals.items()}


def _names(run: Run, snapshots: RunSnapshots) -> list[str]:
    reported = [sae["name"] for sae in (run["report"] or {}).get("saes", [])]
    return list(dict.fromkeys([*reported, *(snapshots.newest[-1].saes if snapshots.newest else {})]))


# --- The headline ----------------------------------------------------------------------------------------------------


def headline(run: Run) -> Headline:
    report, model = run["report"] or {}, (run["settings"] or {}).get("model", {})
    tokens, target = _tokens(run), report.get("target_tokens")
    return Headline(
        state=_state(run),
        source=f"{model['name']} at {', '.join(model.get('hooks', []))}" if model.get("name") else "",
        progress=1.0 if run["state"] == "finished" else min(1.0, tokens / target) if tokens and target else 0.0,
        facts=[*_progress(run), *_quarantined(run)],
        note=_ended(run) if run["state"] == "finished" else _bottleneck(run),
    )


def _tokens(run: Run) -> int | None:
    source = run["summary"] if run["state"] == "finished" else run["report"]
    return (source or {}).get("tokens")


def _is_silent(run: Run) -> bool:
    return run["state"] == "running" and (run["silent_seconds"] or 0.0) > SILENT_SECONDS


def _state(run: Run) -> str:
    """The trainer's phase while the run goes on, its outcome afterwards."""
    if _is_silent(run):
        return "silent"
    detail = (run["report"] or {}).get("state") if run["state"] == "running" else (run["summary"] or {}).get("outcome")
    return detail or run["state"]


def _quarantined(run: Run) -> list[Fact]:
    """Shards that are not trained on, with their tokens where these are known, and shards that may follow them."""
    stream, summary = (run["report"] or {}).get("stream") or {}, run["summary"] or {}
    if run["state"] == "finished":
        shards, tokens = len(summary.get("shards_set_aside") or []), summary.get("rows_set_aside")
    else:
        shards, tokens = (stream.get("leases") or {}).get("set_aside", 0), stream.get("tokens_quarantined")
    facts = []
    if shards:
        count = "an unknown number of tokens" if tokens is None else f"{tokens:,} tokens"
        facts.append((f"{shards:,}", f"shards quarantined, with {count} not trained on"))
    if run["state"] != "finished" and (suspects := stream.get("suspect_shards")):
        facts.append((f"{suspects:,}", "shards on which producers are lost"))
    return facts


def _progress(run: Run) -> list[Fact]:
    report, tokens = run["report"] or {}, _tokens(run)
    if tokens is None:
        return [("", "waiting for the trainer's first report: it fills its buffer before the first step")]
    if run["state"] == "finished":
        rate = (run["summary"] or {}).get("tokens_per_second")
        facts = [(f"{tokens:,}", "tokens trained"), (number(rate, ",.0f"), "tokens/s")]
        seconds = (run["summary"] or {}).get("seconds")
        return [*facts, *([(format_duration(seconds), "of training")] if isinstance(seconds, int | float) else [])]
    target, rate = report.get("target_tokens"), report.get("tokens_per_second") or 0.0
    facts = [(f"{tokens:,}", f"of {target:,} tokens trained" if target else "tokens trained")]
    if _is_silent(run):
        silence = format_duration(run["silent_seconds"])
        return [*facts, ("", f"no report for {silence}: the trainer is stopped, or waits for producers")]
    facts.append((f"{rate:,.0f}", "tokens/s"))
    if target and rate > 0 and report.get("state") in STEADY_PHASES:
        facts.append((format_duration((target - tokens) / rate), "left"))
    producers = sum(((report.get("stream") or {}).get("producers") or {}).values())
    facts.append((f"{producers}", "producer" if producers == 1 else "producers"))
    if (capacity := report.get("buffer_capacity_rows")) and report.get("buffer_rows") is not None:
        facts.append(
            (f"{report['buffer_rows'] / capacity:.0%}", f"of the buffer's {format_count(capacity)} activations filled")
        )
    if ranks := RanksReport.from_json(report.get("ranks")).facts:
        facts.append(("", ", ".join(ranks)))
    return facts


def _ended(run: Run) -> str:
    """When a finished run made its last report."""
    ended = (run["report"] or {}).get("time")
    return f"Its last report is of {moment(ended)}." if ended else ""


def _bottleneck(run: Run) -> str:
    """A sentence on what training waits for, as in the trainer's log; empty for a run that does not train."""
    if run["state"] != "running" or _is_silent(run) or not run["report"]:
        return ""
    stream = run["report"].get("stream") or {}
    data, credit = stream.get("data_wait_ratio") or 0.0, stream.get("credit_wait_ratio") or 0.0
    reported = StreamReport(stream.get("producers") or {}, data_wait_ratio=data, credit_wait_ratio=credit)
    ranks = RanksReport.from_json(run["report"].get("ranks"))
    sentence = describe_bottleneck(run["report"].get("state") or "training", reported, ranks)
    return f"{sentence[:1].upper()}{sentence[1:]}."


# --- The SAEs --------------------------------------------------------------------------------------------------------


def sae_rows(run: Run, snapshots: RunSnapshots) -> list[SaeRow]:
    """Each SAE with its numbers from the newest report of the trainer, and from its newest evaluation."""
    reports = {sae["name"]: sae for sae in (run["report"] or {}).get("saes", [])}
    newest = snapshots.newest[-1].saes if snapshots.newest else {}
    rows = []
    for name, colour in colours_of(run, snapshots).items():
        report, metrics = reports.get(name), newest[name].metrics if name in newest else {}
        evaluation = snapshots.evaluations.get(name)
        rows.append(
            SaeRow(
                name=name,
                colour=colour,
                architecture=metrics.get("architecture"),
                hooks=hooks_of(metrics),
                latents=metrics.get("d_sae") or _latents_of(report),
                cells=_cells(report or metrics, evaluation),
                evaluation=evaluation,
            )
        )
    return rows


def _cells(report: dict[str, Any], evaluation: Evaluation | None) -> list[str]:
    """The numbers of an SAE under the headings of the table."""
    return [number(value_of(measure, report, evaluation), measure.format) for measure in _columns()]


def _columns() -> list[Measure]:
    """The measures that have a column in the table of SAEs."""
    return [measure for measure in MEASURES if measure.page_heading]


def _latents_of(report: dict[str, Any] | None) -> int | None:
    """The number of latents; a report counts each of them once in its density."""
    return sum(report["density"]) if report and report.get("density") else None


def measure_rows(evaluations: Sequence[Evaluation | None]) -> list[MeasureRow]:
    """All numbers of the SAEs' newest evaluations."""
    rows = [row for measure in measures(Stage.HELD_OUT) for row in _rows_of(measure, evaluations)]
    counts = [evaluation.rows if evaluation else None for evaluation in evaluations]
    if any(counts):
        meaning = "Number of held-out activations that all this was measured on."
        rows.append(MeasureRow("activations", meaning, [number(count, ",") for count in counts]))
    return rows


def _rows_of(measure: Measure, evaluations: Sequence[Evaluation | None]) -> list[MeasureRow]:
    """One row, or one for each value of the measure's label; none where nothing was measured."""
    values = [evaluation.value(measure) if evaluation else None for evaluation in evaluations]
    columns: dict[str, list[Any]] = {measure.title: values}
    if measure.label:
        parts = [value if isinstance(value, Mapping) else {} for value in values]
        keys = dict.fromkeys(key for part in parts for key in part)
        columns = {f"{measure.title}: {key}": [part.get(key) for part in parts] for key in keys}
    return [
        MeasureRow(title, measure.help, [number(value, measure.format) for value in column])
        for title, column in columns.items()
        if any(value is not None for value in column)
    ]


# --- Charts and snapshots --------------------------------------------------------------------------------------------


def charts() -> list[PageChart]:
    """Charts of measures, then those of the firing rates and of the speed."""
    return [
        *(
            PageChart(f"{measure.stage.value}-{measure.name}", measure.chart.title, measure.chart.caption, measure)
            for measure in MEASURES
            if measure.chart
        ),
        PageChart("density", "Firing rates", "latents per decade of their recent rate"),
        PageChart("speed", "Speed", "tokens trained per second"),
    ]


def _snapshot_row(entry: SnapshotEntry) -> SnapshotRow:
    evaluated_saes = [name for name, sae in entry.saes.items() if sae.evaluation]
    return SnapshotRow(
        name=entry.name,
        tokens=entry.tokens,
        created=entry.created,
        is_pinned=entry.pinned,
        bytes=entry.bytes,
        saes=len(entry.saes),
        evaluated_saes=len(evaluated_saes),
        paths=[*entry.files, *(f"{name}/evaluation.json" for name in evaluated_saes)],
    )
