"""A run in the terminal: the live table, and the table of results at the end. Reads reports, draws with rich."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from monitor.run_directory import wiring

Report = Mapping[str, Any]
BAR = 20


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
    for name in ("SAE", "L0", "FVU", "dead", "shrink", "rate", "ΔCE", "CE rec."):
        table.add_column(name, justify="left" if name == "SAE" else "right", no_wrap=True, min_width=7)
    for sae in report["saes"]:
        table.add_row(*_sae_row(sae["name"], sae, evaluations.get(sae["name"], {})))
        if averaged := evaluations.get(copy := f"{sae['name']}-ema"):
            table.add_row(*_sae_row(copy, {}, averaged))
    return table


def _sae_row(name: str, sae: Report, evaluation: Report) -> list[str]:
    """`sae` is what training reports: nothing, of an averaged copy."""
    return [
        f"[bold]{name}[/]",
        number(sae.get("l0"), ".1f"),
        number(sae.get("fvu"), ".4f"),
        number(sae.get("dead_latents_ratio"), ".1%"),
        number(sae.get("shrinkage"), ".3f"),
        number(sae.get("learning_rate"), ".1e"),
        number(evaluation.get("ce_delta"), ".4f"),
        number(evaluation.get("ce_recovered"), ".4f"),
    ]


def results(summary: Report) -> Table:
    """The table of a finished run, from summary.json; fits 80 columns. Below it, where trans- and crosscoders sit."""
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
    for name in ("SAE", "latents", "L0", "FVU", "dead", "shrink", "ΔCE", "CE recov.", "KL"):
        table.add_column(name, justify="left" if name == "SAE" else "right", no_wrap=True)
    for name, sae in summary["saes"].items():
        table.add_row(
            name,
            f"{sae['d_sae']:,}",
            number(sae.get("held_out_l0"), ".1f"),
            number(sae.get("held_out_fvu"), ".4f"),
            number(sae.get("dead_latents_ratio"), ".1%"),
            number(sae.get("shrinkage"), ".3f"),
            number(sae.get("ce_delta"), ".4f"),
            number(sae.get("ce_recovered"), ".4f"),
            number(sae.get("kl"), ".4f"),
        )
    return table


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
