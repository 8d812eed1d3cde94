"""A run in the terminal: the live table, and the table of results at the end. Reads reports, draws with rich."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Report = Mapping[str, Any]
BAR = 20


def last_report(run_directory: Path) -> dict[str, Any] | None:
    """The newest line of metrics.jsonl; None while there is none. Reads only the file's end."""
    try:
        with open(run_directory / "metrics.jsonl", "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 65536))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:
            continue  # a line being written, or the first one cut by the seek
    return None


def live(report: Report | None, evaluations: Mapping[str, Report], elapsed: float, note: str) -> RenderableType:
    """One frame. `evaluations` are the newest evaluation.json per SAE; `note` says what is happening now."""
    if report is None:
        return Text(f"  {note}  ({elapsed:.0f} s)", style="dim")
    return Group(_progress(report, elapsed), _saes(report, evaluations), Text(f"  {note}", style="dim"))


def _progress(report: Report, elapsed: float) -> RenderableType:
    tokens, target = report["tokens"], report["target_tokens"]
    stream = report["stream"]
    rate = report["tokens_per_second"]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", style="dim", width=8)
    grid.add_column(width=BAR)
    grid.add_column(no_wrap=True)
    left = f"{(target - tokens) / rate:.0f} s left" if target and rate > 0 else ""
    of = f" of {target:,}" if target else ""
    grid.add_row(
        "tokens",
        ProgressBar(total=target or 1, completed=tokens if target else 1, width=BAR, pulse=not target),
        f"[bold]{tokens:,}[/]{of} · {rate:,.0f}/s · {left}",
    )
    rows, capacity = report["buffer_rows"], report["buffer_capacity_rows"]
    grid.add_row(
        "buffer",
        ProgressBar(total=capacity, completed=rows, width=BAR, complete_style="cyan", finished_style="cyan"),
        f"{rows:,} rows · {report['state']} · {sum(stream['producers'].values())} producer(s) · {elapsed:.0f} s",
    )
    return grid


def _saes(report: Report, evaluations: Mapping[str, Report]) -> RenderableType:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in ("SAE", "L0", "FVU", "dead", "shrinkage", "rate", "ΔCE", "CE recov."):
        table.add_column(name, justify="left" if name == "SAE" else "right", no_wrap=True, min_width=8)
    for sae in report["saes"]:
        seen = evaluations.get(sae["name"], {})
        table.add_row(
            f"[bold]{sae['name']}[/]",
            number(sae["l0"], ".1f"),
            number(sae["fvu"], ".4f"),
            "-" if sae["dead_latents_ratio"] is None else f"{sae['dead_latents_ratio']:.1%}",
            number(sae["shrinkage"], ".3f"),
            number(sae["learning_rate"], ".1e"),
            number(seen.get("ce_delta"), ".4f"),
            number(seen.get("ce_recovered"), ".4f"),
        )
    return table


def results(summary: Report) -> Table:
    """The table of a finished run, from summary.json; fits 80 columns."""
    table = Table(title="Results", title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("SAE", "latents", "L0", "FVU", "dead", "shrink", "ΔCE", "CE recov.", "KL"):
        table.add_column(name, justify="left" if name == "SAE" else "right", no_wrap=True)
    for name, sae in summary["saes"].items():
        dead = sae.get("dead_latents_ratio")
        table.add_row(
            name,
            f"{sae['d_sae']:,}",
            number(sae.get("held_out_l0"), ".1f"),
            number(sae.get("held_out_fvu"), ".4f"),
            "-" if dead is None else f"{dead:.1%}",
            number(sae["shrinkage"], ".3f"),
            number(sae.get("ce_delta"), ".4f"),
            number(sae.get("ce_recovered"), ".4f"),
            number(sae.get("kl"), ".4f"),
        )
    return table


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
