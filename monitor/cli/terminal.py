"""A run in the terminal: the live table, and the table of results at the end. Reads reports, draws with rich."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from monitor.run_directory import wiring
from producer.common.formatting import format_duration
from trainer.report import PROGRESSING

Report = Mapping[str, Any]
BAR = 20
COLUMNS = {"SAE": 0, "L0": 0, "FVU": 0, "dead": 49, "shrink": 67, "rate": 76, "ΔCE": 40, "CE rec.": 58}
"""Of the live table, and the width of terminal from which on each is shown."""
RESULTS = {"SAE": 0, "latents": 63, "L0": 0, "FVU": 0, "dead": 54, "shrink": 71, "ΔCE": 0, "CE recov.": 48, "KL": 79}
"""Of the table of results, likewise."""
LONGEST_NAME = 18


def live(
    report: Report | None, evaluations: Mapping[str, Report], elapsed: float | None, note: str, width: int = 80
) -> RenderableType:
    """One frame. `evaluations` are the newest evaluation.json per SAE; `note` says what is happening now.

    `elapsed` seconds are those since the start, where they are known.
    """
    if report is None:
        return Text(f"  {note}" + ("" if elapsed is None else f"  ({elapsed:.0f} s)"), style="dim")
    return Group(
        _progress(report, elapsed, BAR if width >= 72 else BAR // 2),
        _saes(report, evaluations, width),
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
    told = [f"[bold]{tokens:,}[/]" + (f" of {target:,}" if target else ""), f"{rate:,.0f}/s"]
    if target and rate > 0 and report["state"] in PROGRESSING:
        told.append(f"{format_duration((target - tokens) / rate)} left")
    bar = ProgressBar(total=target or 1, completed=tokens if target else 1, width=length, pulse=not target)
    grid.add_row("tokens", bar, " · ".join(told))
    rows, capacity = report["buffer_rows"], report["buffer_capacity_rows"]
    told = [f"{rows:,} rows", escape(report["state"]), f"{producers} producer{'' if producers == 1 else 's'}"]
    if elapsed is not None:
        told.append(format_duration(elapsed))
    bar = ProgressBar(total=capacity, completed=rows, width=length, complete_style="cyan", finished_style="cyan")
    grid.add_row("buffer", bar, " · ".join(told))
    return grid


def _saes(report: Report, evaluations: Mapping[str, Report], width: int) -> RenderableType:
    shown = [name for name, least in COLUMNS.items() if width >= least]
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in shown:
        if name == "SAE":
            table.add_column(name, no_wrap=True, overflow="ellipsis", min_width=7, max_width=LONGEST_NAME)
        else:
            table.add_column(name, justify="right", no_wrap=True, min_width=7)
    rows = []
    for sae in report["saes"]:
        rows.append(_sae_row(sae["name"], sae, evaluations.get(sae["name"], {})))
        if averaged := evaluations.get(copy := f"{sae['name']}-ema"):
            rows.append(_sae_row(copy, {}, averaged))
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    return table


def _sae_row(name: str, sae: Report, evaluation: Report) -> dict[str, str]:
    """`sae` is what training reports: nothing, of an averaged copy."""
    return {
        "SAE": f"[bold]{escape(name)}[/]",
        "L0": number(sae.get("l0"), ".1f"),
        "FVU": number(sae.get("fvu"), ".4f"),
        "dead": number(sae.get("dead_latents_ratio"), ".1%"),
        "shrink": number(sae.get("shrinkage"), ".3f"),
        "rate": number(sae.get("learning_rate"), ".1e"),
        "ΔCE": number(evaluation.get("ce_delta"), ".4f"),
        "CE rec.": number(evaluation.get("ce_recovered"), ".4f"),
    }


def results(summary: Report, width: int = 80) -> Table:
    """The table of a finished run, from summary.json. Below it, where trans- and crosscoders sit."""
    elsewhere = {name: sae for name, sae in summary["saes"].items() if sae.get("target") or sae.get("hooks")}
    table = Table(
        title="Results",
        title_justify="left",
        caption="\n".join(f"{name}: {wiring(sae)}" for name, sae in elsewhere.items()) or None,
        caption_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown = [name for name, least in RESULTS.items() if width >= least]
    for name in shown:
        table.add_column(name, justify="left" if name == "SAE" else "right", no_wrap=True)
    for name, sae in summary["saes"].items():
        row = {
            "SAE": name,
            "latents": number(sae.get("d_sae"), ","),
            "L0": number(sae.get("held_out_l0"), ".1f"),
            "FVU": number(sae.get("held_out_fvu"), ".4f"),
            "dead": number(sae.get("dead_latents_ratio"), ".1%"),
            "shrink": number(sae.get("shrinkage"), ".3f"),
            "ΔCE": number(sae.get("ce_delta"), ".4f"),
            "CE recov.": number(sae.get("ce_recovered"), ".4f"),
            "KL": number(sae.get("kl"), ".4f"),
        }
        table.add_row(*(row[one] for one in shown))
    return table


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
