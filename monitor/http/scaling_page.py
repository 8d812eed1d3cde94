"""The page of a scaling law (`/scaling`): what `python -m trainer fit` found. Pure functions of its report."""

from __future__ import annotations

from typing import Any

from monitor.http.html import render
from monitor.http.live_page import PALETTE
from producer.common.shell import shell_command
from trainer.scaling.report import EQUATION, SYMBOLS, ScalingReport


def scaling_page(directory: str, report: ScalingReport | None) -> str:
    """The whole page, as HTML; without a report, what to do for one."""
    ks = [] if report is None else [curve.k for curve in report.curves]
    return render(
        "scaling.html",
        title=f"{directory} scaling",
        directory=directory,
        report=report,
        command=shell_command("trainer", "fit", "RUN_DIR"),
        equation=EQUATION,
        symbols=SYMBOLS,
        colours={k: PALETTE[index % len(PALETTE)] for index, k in enumerate(ks)},
    )


def scaling_json(report: ScalingReport) -> dict[str, Any]:
    """The JSON of /v1/scaling: the report, with the colours in which its curves are drawn."""
    colours = {f"{curve.k}": PALETTE[index % len(PALETTE)] for index, curve in enumerate(report.curves)}
    return report.as_json() | {"colours": colours}
