"""A scaling report as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from trainer.scaling.report import EQUATION, SYMBOLS, PredictedLoss, ScalingReport, TokenFit


def show(report: ScalingReport) -> None:
    """Prints the tables, and the notes below them."""
    console = Console(highlight=False)
    console.print(f"[bold]{EQUATION}[/]")
    count = sum(not cell.is_held_out for cell in report.cells)
    console.print(
        f"{report.architecture}, {count} SAEs after {report.tokens:,} tokens; L is FVU, {report.measured}; "
        f"spread about the law {report.rms:.2%}\n"
    )
    console.print(_parameters(report))
    console.print()
    if report.left_out:
        names = ", ".join(SYMBOLS[name] for name in report.left_out)
        console.print(f"Not identified by these losses, and left out: {names} (AICc).\n")
    console.print(_cells(report))
    console.print(
        "By tokens: β of L(T) = exp(α + β ln T) + exp(ζ), fitted to training at a constant rate. 2 × T: what twice the "
        "tokens would change.\n",
        style="dim",
    )
    if report.predictions:
        console.print(_predictions("Predicted", report.predictions))
        console.print()
    if report.backtest:
        size = report.backtest[0].d_sae
        console.print(_predictions(f"Backtest: {size} latents, predicted from the smaller sizes", report.backtest))
        console.print()
    for note in report.notes:
        console.print(note)


def _parameters(report: ScalingReport) -> Table:
    table = _table("The law", "value", "standard error", "95 % interval", "")
    for parameter in report.parameters:
        table.add_row(
            SYMBOLS[parameter.name],
            f"{parameter.value:.4f}",
            f"{parameter.standard_error:.4f}",
            f"{parameter.low:.4f} to {parameter.high:.4f}",
            "" if parameter.is_clear else "unclear",
        )
    return table


def _cells(report: ScalingReport) -> Table:
    table = _table("The SAEs (* held out)", "latents", "k", "FVU", "error", "by tokens", "2 × T", "converged")
    for cell in report.cells:
        table.add_row(
            f"{cell.name}{'*' if cell.is_held_out else ''}",
            f"{cell.d_sae:,}",
            f"{cell.k}",
            f"{cell.loss:.4f}",
            f"{cell.error:+.1%}",
            *_tokens(cell.tokens),
        )
    return table


def _tokens(fit: TokenFit | None) -> tuple[str, str, str]:
    if fit is None:
        return "–", "–", "unknown"
    exponent = f"{fit.exponent:.3f} ± {fit.standard_error:.3f}"
    return exponent, f"{-fit.gain:+.1%}", "yes" if fit.is_converged else "no"


def _predictions(title: str, predictions: Sequence[PredictedLoss]) -> Table:
    table = _table(title, "k", "FVU", "95 % interval", "measured", "error")
    for one in predictions:
        table.add_row(
            f"{one.d_sae:,} latents",
            f"{one.k}",
            f"{one.loss:.4f}",
            f"{one.low:.4f} to {one.high:.4f}",
            "–" if one.measured is None else f"{one.measured:.4f}",
            "–" if one.error is None else f"{one.error:+.1%}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", overflow="ellipsis", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
