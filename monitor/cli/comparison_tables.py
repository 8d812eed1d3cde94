"""A comparison of two snapshots in the terminal, as tables and sentences or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from monitor.comparison import (
    EDGES,
    HELD_OUT,
    CompareError,
    Comparison,
    CosineDistribution,
    DifferentWidths,
    Incomparable,
    OnProgress,
    SameWidth,
    compare,
)
from monitor.evaluation.measures import MEASURES, Better, Measure, Stage

EXAMPLES = 6
"""Latents of each kind that are named; --json has all."""
BAR_WIDTH = 16
WAYS = {"same_index": "same index", "matched": "best match", "a_in_b": "of A in B", "b_in_a": "of B in A"}
"""Names of the ways in which latents of A and B are matched."""


def run(a: Path, b: Path, as_json: bool) -> int:
    """Compares two folders, and prints the result. Returns the exit code."""
    try:
        with _progress() as on_progress:
            comparison = compare(a, b, on_progress)
    except CompareError as error:
        print(error, file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(comparison.as_json(), indent=1, allow_nan=False))
    else:
        show(comparison)
    return 0


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """A bar for each SAE whose latents are being matched, on a terminal alone."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bars: dict[str, TaskID] = {}

        def on_progress(sae: str, done: int, total: int) -> None:
            if sae not in bars:
                bars[sae] = progress.add_task(f"matching latents of {sae}", total=None)
            progress.update(bars[sae], completed=done, total=total)

        yield on_progress


def show(comparison: Comparison) -> None:
    """Prints tables for people."""
    console = Console(highlight=False)
    for name, sae in comparison.saes.items():
        indent = " " * len(name)
        a, b = (
            f"{side}, trained on {revision} of the language model" if revision else side
            for side, revision in zip((comparison.a, comparison.b), comparison.revisions, strict=True)
        )
        console.print(f"\n[bold]{name}[/]   A {a}\n{indent}   B {b}", soft_wrap=True)
        if sae.numbers:
            console.print(_numbers_table(sae.numbers))
        if isinstance(sae.latents, Incomparable):
            console.print(f"No latent is compared: {sae.latents.reason}.")
            continue
        for line in _sentences(sae.latents):
            console.print(line)
        console.print(_histogram(sae.latents.cosines))
    for side, names in (("A", comparison.only_a), ("B", comparison.only_b)):
        if names:
            console.print(f"In {side} alone: {', '.join(names)}.")


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)


def _numbers_table(numbers: dict[str, tuple[float | None, float | None]]) -> Table:
    """Numbers that differ. Four digits, and not the measure's own format, so that a small change can be seen.

    A change that its own format would not show is neither better nor worse.
    """
    table = _table()
    table.add_column("")
    for heading in ("A", "B", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, (a, b) in numbers.items():
        if a != b:
            measure = _measure(name)
            change = "" if a is None or b is None else _number(b - a, "+")
            table.add_row(_title(name, measure), _number(a), _number(b), change, _verdict(a, b, measure))
    return table


def _measure(name: str) -> Measure | None:
    """The measure behind a number of a comparison, which has `held-out ` before a name that training uses too."""
    stage = Stage.HELD_OUT if name.startswith(HELD_OUT) else None
    name = name.removeprefix(HELD_OUT)
    return next((measure for measure in MEASURES if measure.name == name and stage in (None, measure.stage)), None)


def _title(name: str, measure: Measure | None) -> str:
    if measure is None:
        return name
    return f"{measure.title}, held out" if name.startswith(HELD_OUT) else measure.title


def _verdict(a: float | None, b: float | None, measure: Measure | None) -> str:
    """`better` in green or `worse` in red; empty where neither direction is good, or no change would be shown."""
    if measure is None or measure.better is None or a is None or b is None:
        return ""
    if format(a, measure.format) == format(b, measure.format):
        return ""
    return "[green]better[/]" if (b > a) == (measure.better is Better.HIGHER) else "[red]worse[/]"


def _number(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return format(value, f"{sign},") if isinstance(value, int) else format(value, f"{sign}.4g")


def _sentences(latents: SameWidth | DifferentWidths) -> list[str]:
    a, b = latents.live
    if isinstance(latents, DifferentWidths):
        width_a, width_b = latents.latents
        return [
            f"{width_a:,} latents in A, {width_b:,} in B, of which {a:,} and {b:,} fire. Indices name nothing in "
            "common: each latent is compared with its best match on the other side."
        ]
    both = sum(latents.same_index.counts)
    turned = [f"{one.latent} ({one.cosine:.2f})" for one in latents.turned[:EXAMPLES]]
    return [
        f"{latents.latents:,} latents; {a:,} fire in A, {b:,} in B, {both:,} in both.",
        f"born    {_count_and_examples(latents.born, len(latents.born))}",
        f"died    {_count_and_examples(latents.died, len(latents.died))}",
        f"turned  {_count_and_examples(turned, len(latents.turned), ' by more than 45°')}",
        f"        {latents.elsewhere:,} of these are at another index of B",
        f"rate    {latents.rate_changed_twofold:,} fire at least twice or at most half as often",
    ]


def _count_and_examples(examples: Sequence[int | str], count: int, words: str = "") -> str:
    """`3 by more than 45°: 5 (0.10), 8 (0.20), 9 (0.30)`"""
    text = f"{count:,}{words}"
    if not count:
        return text
    return f"{text}: {', '.join(map(str, examples[:EXAMPLES]))}{', …' if count > EXAMPLES else ''}"


def _histogram(cosines: dict[str, CosineDistribution]) -> Table:
    """Latents per cosine of decoder rows, one column for each way to match."""
    table = _table()
    table.add_column("cosine", no_wrap=True)
    for way in cosines:
        table.add_column(WAYS[way], justify="right", no_wrap=True)
        table.add_column("", width=BAR_WIDTH, no_wrap=True)
    for index in reversed(range(len(EDGES) - 1)):
        row = [f"{EDGES[index]:.2f} to {EDGES[index + 1]:.2f}"]
        for cosine in cosines.values():
            count, largest = cosine.counts[index], max(cosine.counts) or 1
            row += [f"{count:,}", f"[cyan]{'█' * round(BAR_WIDTH * count / largest)}[/]"]
        table.add_row(*row)
    table.add_section()
    for name in ("mean", "median"):
        row = [name]
        for cosine in cosines.values():
            value = cosine.mean if name == "mean" else cosine.median
            row += ["-" if value is None else f"{value:.3f}", ""]
        table.add_row(*row)
    return table
