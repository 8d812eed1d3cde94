"""The page of several runs: a table of runs, their SAEs, curves over each other, frontiers, settings side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monitor.evaluation.measures import MEASURES
from monitor.http.html import render
from monitor.http.live_page import PALETTE, charts
from monitor.runs.records import RunRecord, frontiers, setting_rows

FRONTIERS = (
    ("fvu", "L0 and FVU", "variance left unexplained by latents active"),
    ("ce_delta", "L0 and ΔCE", "nats per token by latents active"),
)


def runs_page(records: Sequence[RunRecord], folders: Sequence[str]) -> str:
    """The whole page, as HTML."""
    measured = [chart for chart in charts() if chart.measure]
    return render(
        "runs.html", title="Runs", charts=measured, frontier_charts=FRONTIERS, folders=folders, **_tables(records)
    )


def parts(records: Sequence[RunRecord]) -> dict[str, Any]:
    """What the script of the page replaces and draws."""
    tables = _tables(records)
    return {
        "is_running": any(record.state not in ("finished", "failed") for record in records),
        "runs": [record.name for record in records],
        "colours": tables["colours"],
        "saes": [vars(sae) | {"title": sae.title} for record in records for sae in record.saes],
        "frontiers": tables["frontiers"],
        "parts": {
            "runs-part": render("runs_table.html", **tables),
            "saes-part": render("runs_saes.html", **tables),
            "settings-part": render("runs_settings.html", **tables),
        },
    }


def _tables(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The variables of the templates."""
    titles = [sae.title for record in records for sae in record.saes]
    lines = frontiers(records)
    rows = setting_rows(records)
    return {
        "runs": records,
        "colours": {title: PALETTE[index % len(PALETTE)] for index, title in enumerate(titles)},
        "headings": [measure.page_heading for measure in MEASURES if measure.page_heading],
        "frontiers": lines,
        "on_frontier": {title for line in lines.values() for title in line},
        "different": [row for row in rows if row.differs],
        "same": [row for row in rows if not row.differs],
    }
