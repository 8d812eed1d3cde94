"""A run in the terminal: the live table, and the table of results at the end. Reads reports, draws with rich."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from monitor.evaluation.measures import Stage, measures
from monitor.evaluation.results import Evaluation, value_of
from monitor.run_directory import hooks_of
from monitor.suite import SUITE_MEASURES, Suite, suite_of
from producer.common.formatting import format_duration
from trainer.report import STEADY_PHASES, RanksReport

Report = Mapping[str, Any]
BAR = 20
LONGEST_NAME = 18
LATENTS_FROM_WIDTH = 63
"""Characters per line from which on the table of results has room for the number of latents."""


def live(
    report: Report | None, evaluations: Mapping[str, Evaluation], elapsed: float | None, note: str, width: int = 80
) -> RenderableType:
    """The picture of a run in training, with the newest evaluation of each SAE and a `note` below.

    `elapsed`: seconds since the start, where they are known.
    """
    if report is None:
        return Text(f"  {note}" + ("" if elapsed is None else f"  ({elapsed:.0f} s)"), style="dim")
    suite = suite_of([sae["name"] for sae in report["saes"]])
    return Group(
        _progress(report, elapsed, BAR if width >= 72 else BAR // 2),
        _saes(report, evaluations, width) if suite is None else _suite(suite, report, evaluations),
        Text(f"  {note}", style="dim"),
    )


def _progress(report: Report, elapsed: float | None, length: int) -> RenderableType:
    tokens, target = report["tokens"], report["target_tokens"]
    producers = sum(report["stream"]["producers"].values())
    rate = report["tokens_per_second"]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", style="dim", min_width=8, no_wrap=True)
    grid.add_column(width=length)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    progress = [f"[bold]{tokens:,}[/]" + (f" of {target:,}" if target else ""), f"{rate:,.0f}/s"]
    if target and rate > 0 and report["state"] in STEADY_PHASES:
        progress.append(f"{format_duration((target - tokens) / rate)} left")
    bar = ProgressBar(total=target or 1, completed=tokens if target else 1, width=length, pulse=not target)
    grid.add_row("tokens", bar, " · ".join(progress))
    buffered, capacity = report["buffer_rows"], report["buffer_capacity_rows"]
    state = [f"{buffered:,} tokens", escape(report["state"]), f"{producers} producer{'' if producers == 1 else 's'}"]
    if elapsed is not None:
        state.append(format_duration(elapsed))
    bar = ProgressBar(total=capacity, completed=buffered, width=length, complete_style="cyan", finished_style="cyan")
    grid.add_row("buffer", bar, " · ".join(state))
    ranks = RanksReport.from_json(report.get("ranks"))
    if ranks.facts:
        bar = ProgressBar(total=1.0, completed=ranks.exchange_ratio or 0.0, width=length, complete_style="magenta")
        grid.add_row("ranks", bar, " · ".join(ranks.facts))
    return grid


def _saes(report: Report, evaluations: Mapping[str, Evaluation], width: int) -> RenderableType:
    columns = [
        (column, measure)
        for measure in (*measures(Stage.TRAINING), *measures(Stage.HELD_OUT))
        if (column := measure.live_column) and width >= column.from_width
    ]
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("SAE", no_wrap=True, overflow="ellipsis", min_width=7, max_width=LONGEST_NAME)
    for column, _ in columns:
        table.add_column(column.heading, justify="right", no_wrap=True, min_width=7)
    for name, numbers, evaluation in _rows(report, evaluations):
        cells = [number(value_of(measure, numbers, evaluation), measure.format) for _, measure in columns]
        table.add_row(f"[bold]{escape(name)}[/]", *cells)
    return table


def _suite(suite: Suite, report: Report, evaluations: Mapping[str, Evaluation]) -> RenderableType:
    """A row for each layer or size, a column for each site or k: FVU, ΔCE, share of dead latents."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column(suite.heading, justify="right")
    headings = " ".join(f"{each.live_column.heading:>7}" for each in SUITE_MEASURES if each.live_column)
    for site in suite.sites:
        table.add_column(f"{escape(site)}\n{headings}", no_wrap=True)
    reports = {sae["name"]: sae for sae in report["saes"]}
    for layer in suite.layers:
        cells: list[str] = []
        for name in suite.row(layer):
            numbers, evaluation = reports.get(name or "", {}), evaluations.get(name or "")
            values = [value_of(each, numbers, evaluation) for each in SUITE_MEASURES]
            texts = [number(value, each.format) for value, each in zip(values, SUITE_MEASURES, strict=True)]
            cells.append(" ".join(f"{text:>7}" for text in texts))
        table.add_row(str(layer), *cells)
    return table


def _rows(report: Report, evaluations: Mapping[str, Evaluation]) -> Iterator[tuple[str, Report, Evaluation | None]]:
    """(name, numbers of training, evaluation) of each SAE; of an averaged copy, training has no numbers."""
    for sae in report["saes"]:
        yield sae["name"], sae, evaluations.get(sae["name"])
        if average := evaluations.get(copy := f"{sae['name']}-ema"):
            yield copy, {}, average


def results(summary: Report, width: int = 80) -> Table:
    """The table of a finished run, from summary.json. Below it, where trans- and crosscoders sit."""
    elsewhere = {name: sae for name, sae in summary["saes"].items() if sae.get("target") or sae.get("hooks")}
    table = Table(
        title="Results",
        title_justify="left",
        caption="\n".join(f"{name}: {hooks_of(sae)}" for name, sae in elsewhere.items()) or None,
        caption_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    columns = [
        (column, measure)
        for measure in (*measures(Stage.HELD_OUT), *measures(Stage.TRAINING))
        if (column := measure.results_column) and width >= column.from_width
    ]
    table.add_column("SAE", no_wrap=True)
    for heading in [*["latents"] * (width >= LATENTS_FROM_WIDTH), *(column.heading for column, _ in columns)]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, sae in summary["saes"].items():
        latents = [number(sae.get("d_sae"), ",")] * (width >= LATENTS_FROM_WIDTH)
        cells = [number(sae.get(measure.summary_name), measure.format) for _, measure in columns]
        table.add_row(name, *latents, *cells)
    return table


def number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"
