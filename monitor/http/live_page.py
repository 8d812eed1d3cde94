"""The live page (`/`): a run at a glance, its curves, its latents, its snapshots. Pure functions of what was read.

The page is whole as it is sent; its script (`static/page.js`) replaces parts of it by newer ones, draws the curves and
saves clicks a reload. What is not known yet is said in words where it will stand, so nothing jumps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from markupsafe import Markup

from monitor.evaluation.measures import MEASURES, Measure, Stage, measures
from monitor.http.html import number, render
from monitor.run_directory import SILENT_SECONDS, hooks_of
from producer.common.formatting import format_count, format_duration
from producer.common.server import is_loopback_name
from producer.common.shell import shell_command
from trainer.report import PROGRESSING, StreamReport, what_waits

PALETTE = ("#d6951b", "#3f7fc4", "#4a9c6d", "#b0558f", "#7a6ac9", "#c2603a", "#5b9aa0", "#8f8a3c")
"""One colour per SAE, told apart in the light, in the dark and by the colour-blind; of charts and tables alike."""
SNAPSHOTS_SHOWN = 20
"""The newest; the page is asked for its parts every two seconds."""
Run = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """What the page tells of a run's snapshots."""

    newest: list[dict[str, Any]]
    """The last SNAPSHOTS_SHOWN of them, oldest first, as `monitor.run_directory` reads them."""
    count: int
    """Of them all."""
    evaluated: dict[str, tuple[int, dict[str, Any]]]
    """By SAE, tokens and numbers of its newest evaluation, from whichever snapshot."""


@dataclass(frozen=True)
class PageChart:
    """The place of a chart; the script draws it."""

    id: str
    title: str
    caption: str
    measure: Measure | None = None


def run_page(run: Run, snapshots: Published, latents: dict[str, Any], base_url: str) -> str:
    """The whole page. `latents`: its `saes`, the one `chosen`, the `search`, and the `table` as HTML."""
    latents = latents | {"table": Markup(latents["table"])}
    address = base_url.rstrip("/")
    is_here = is_loopback_name(urlsplit(address).hostname or "")
    return render(
        "page.html",
        title=run["directory"],
        charts=charts(),
        latents=latents,
        pull=shell_command("monitor", "pull", address, anywhere=True)
        if is_here
        else f"python -m monitor pull {address}",
        is_here=is_here,
        **_live(run, snapshots),
    )


def parts(run: Run, snapshots: Published) -> dict[str, Any]:
    """What the script puts in place of what is there, by the id of the element; and the colours of its curves."""
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


def _live(run: Run, snapshots: Published) -> dict[str, Any]:
    """What the templates of the parts are made from."""
    shown = saes(run, snapshots)
    return {
        "run": run,
        "glance": glance(run),
        "saes": shown,
        "headings": [measure.page_heading for measure in _columns()],
        "measured": measured(shown),
        "snapshots": [entry | {"paths": _paths(entry)} for entry in snapshots.newest],
        "older": max(0, snapshots.count - len(snapshots.newest)),
    }


def colours_of(run: Run, snapshots: Published) -> dict[str, str]:
    """A colour for each SAE of the run, in the order in which the trainer names them; a mean copy has its SAE's."""
    names = _names(run, snapshots)
    own = [name for name in names if not (name.endswith("-ema") and name.removesuffix("-ema") in names)]
    found = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(own)}
    return {name: found.get(name) or found[name.removesuffix("-ema")] for name in names}


def _names(run: Run, snapshots: Published) -> list[str]:
    reported = [sae["name"] for sae in (run["report"] or {}).get("saes", [])]
    return list(dict.fromkeys([*reported, *(snapshots.newest[-1]["saes"] if snapshots.newest else {})]))


# --- The run at a glance ---------------------------------------------------------------------------------------------


def glance(run: Run) -> dict[str, Any]:
    """The headline: state, the source of the activations, progress, facts as (number, words), the bottleneck."""
    report, model = run["report"] or {}, (run["settings"] or {}).get("model", {})
    tokens, target = _tokens(run), report.get("target_tokens")
    return {
        "state": _state(run),
        "source": f"{model['name']} at {', '.join(model.get('hooks', []))}" if model.get("name") else "",
        "share": 1.0 if run["state"] == "finished" else min(1.0, tokens / target) if tokens and target else 0.0,
        "facts": _facts(run),
        "bottleneck": _bottleneck(run),
    }


def _tokens(run: Run) -> int | None:
    told = run["summary"] if run["state"] == "finished" else run["report"]
    return (told or {}).get("tokens")


def _is_silent(run: Run) -> bool:
    return run["state"] == "running" and (run["silent_seconds"] or 0.0) > SILENT_SECONDS


def _state(run: Run) -> str:
    told = (run["report"] or {}).get("state") if run["state"] == "running" else (run["summary"] or {}).get("outcome")
    return "silent" if _is_silent(run) else told or run["state"]


def _facts(run: Run) -> list[tuple[str, str]]:
    return [*_progress(run), *_quarantined(run)]


def _quarantined(run: Run) -> list[tuple[str, str]]:
    """How many shards failed and are not trained on, with their tokens where these are known."""
    stream, summary = (run["report"] or {}).get("stream") or {}, run["summary"] or {}
    if run["state"] == "finished":
        shards, tokens = len(summary.get("shards_set_aside") or []), summary.get("rows_set_aside")
    else:
        shards, tokens = (stream.get("leases") or {}).get("set_aside", 0), stream.get("tokens_quarantined")
    suspects = [] if run["state"] == "finished" else [stream.get("suspect_shards") or 0]
    of_them = "an unknown number of tokens" if tokens is None else f"{tokens:,} tokens"
    facts = [(f"{shards:,}", f"shards quarantined, with {of_them} not trained on")] if shards else []
    return facts + [(f"{count:,}", "shards on which producers are lost") for count in suspects if count]


def _progress(run: Run) -> list[tuple[str, str]]:
    report, tokens = run["report"] or {}, _tokens(run)
    if tokens is None:
        return [("", "waiting for the trainer's first report: it fills its buffer before the first step")]
    if run["state"] == "finished":
        rate = (run["summary"] or {}).get("tokens_per_second")
        return [(f"{tokens:,}", "tokens trained"), (number(rate, ",.0f"), "tokens/s")]
    target, rate = report.get("target_tokens"), report.get("tokens_per_second") or 0.0
    facts = [(f"{tokens:,}", f"of {target:,} tokens trained" if target else "tokens trained")]
    if _is_silent(run):
        silence = format_duration(run["silent_seconds"])
        return [*facts, ("", f"no report for {silence}: the trainer is stopped, or waits for producers")]
    facts.append((f"{rate:,.0f}", "tokens/s"))
    if target and rate > 0 and report.get("state") in PROGRESSING:
        facts.append((format_duration((target - tokens) / rate), "left"))
    producers = sum(((report.get("stream") or {}).get("producers") or {}).values())
    facts.append((f"{producers}", "producer" if producers == 1 else "producers"))
    if (capacity := report.get("buffer_capacity_rows")) and report.get("buffer_rows") is not None:
        facts.append(
            (f"{report['buffer_rows'] / capacity:.0%}", f"of the buffer's {format_count(capacity)} rows filled")
        )
    return facts


def _bottleneck(run: Run) -> str:
    """What holds up training, in the words of the trainer's log; nothing of a run that is not at work."""
    if run["state"] != "running" or _is_silent(run) or not run["report"]:
        return ""
    stream = run["report"].get("stream") or {}
    data, credit = stream.get("data_wait_ratio") or 0.0, stream.get("credit_wait_ratio") or 0.0
    reported = StreamReport(stream.get("producers") or {}, data_wait_ratio=data, credit_wait_ratio=credit)
    told = what_waits(run["report"].get("state") or "training", reported)
    return f"{told[:1].upper()}{told[1:]}."


# --- The SAEs and the snapshots --------------------------------------------------------------------------------------


def saes(run: Run, snapshots: Published) -> list[dict[str, Any]]:
    """Each SAE as it trains at this moment, and as the language model found its newest evaluated snapshot."""
    reported = {sae["name"]: sae for sae in (run["report"] or {}).get("saes", [])}
    published = snapshots.newest[-1]["saes"] if snapshots.newest else {}
    colours = colours_of(run, snapshots)
    found = []
    for name in _names(run, snapshots):
        report, metrics = reported.get(name), (published.get(name) or {}).get("metrics") or {}
        evaluated_at, evaluation = snapshots.evaluated.get(name, (None, {}))
        found.append(
            {
                "name": name,
                "colour": colours[name],
                "metrics": metrics,
                "hooks": hooks_of(metrics),
                "latents": metrics.get("d_sae") or _latents_of(report),
                "cells": _cells(report or metrics, evaluation),
                "evaluation": evaluation,
                "evaluated_at": evaluated_at,
            }
        )
    return found


def _cells(now: dict[str, Any], evaluation: dict[str, Any]) -> list[str]:
    """An SAE's numbers in the table of SAEs: `now` as it trains, then those of its newest evaluation."""
    sources = {Stage.TRAINING: now, Stage.HELD_OUT: evaluation}
    return [number(sources[measure.stage].get(measure.name), measure.format) for measure in _columns()]


def measured(saes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every number of the newest evaluations, a row each: `title`, `meaning`, and the `cells` of the SAEs."""
    evaluations = [sae["evaluation"] for sae in saes]
    rows = [row for measure in measures(Stage.HELD_OUT) for row in _rows(measure, evaluations)]
    counts = [evaluation.get("rows") for evaluation in evaluations]
    if any(counts):
        meaning = "How many held-out activations all this was measured on."
        rows.append({"title": "activations", "meaning": meaning, "cells": [number(count, ",") for count in counts]})
    return rows


def _rows(measure: Measure, evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row, or one for each value of the measure's label; none where nothing was measured."""
    values = [evaluation.get(measure.name) for evaluation in evaluations]
    if measure.label:
        parts = [value if isinstance(value, dict) else {} for value in values]
        columns = {f"{measure.title}: {key}": [part.get(key) for part in parts] for key in _keys(parts)}
    else:
        columns = {measure.title: values}
    return [
        {"title": title, "meaning": measure.help, "cells": [number(value, measure.format) for value in column]}
        for title, column in columns.items()
        if any(isinstance(value, int | float) for value in column)
    ]


def _keys(parts: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for part in parts for key in part))


def _columns() -> list[Measure]:
    """The measures that have a column in the table of SAEs."""
    return [measure for measure in MEASURES if measure.page_heading]


def charts() -> list[PageChart]:
    """Those of measures, then of the firing rates and of the speed."""
    return [
        *(
            PageChart(f"{measure.stage.value}-{measure.name}", measure.chart.title, measure.chart.caption, measure)
            for measure in MEASURES
            if measure.chart
        ),
        PageChart("density", "Firing rates", "latents by log10 of their recent rate"),
        PageChart("speed", "Speed", "tokens trained per second"),
    ]


def _latents_of(report: dict[str, Any] | None) -> int | None:
    """How many there are; a report counts each of them once in its density."""
    return sum(report["density"]) if report and report.get("density") else None


def _paths(entry: dict[str, Any]) -> list[str]:
    """What can be downloaded of one snapshot, beside its manifest."""
    return [*entry["files"], *(f"{sae}/evaluation.json" for sae, told in entry["saes"].items() if told["evaluation"])]
