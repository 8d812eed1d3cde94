"""`make bench`: ours, the peers and the physical limit, side by side in one run.

    python -m tests.benchmarks [--only step,wire] [--rounds 3] [--quick] [--device cuda]

Contenders take turns within each round (A B C A B C …); medians are told, and ratios are medians of each round's own.
Prints a table per section and all goals, and writes bench.json; sections that were not run keep what it held of them.
Peers run in an environment of their own, named by SLUICE_PEERS_PYTHON. A benchmark, not a test: it never fails on a
number, and a section that breaks says so and lets the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the trainer does

import torch
from rich.table import Table

from tests.benchmarks.measure import Figure, Options, Others, Result, console

BENCH = Path("bench.json")
PEERS = Path(".venv-peers/bin/python")
DISTURBED = 0.03
"""Fraction of the machine that other processes may use before a table says so."""

Section = Callable[[Options], Iterator[Result]]


def _section(module: str, *arguments: Any) -> Section:
    """Imported when it runs, so that --help is quick and one broken section does not take the others with it."""

    def run(options: Options) -> Iterator[Result]:
        yield from partial(import_module(f"tests.benchmarks.{module}").run, *arguments)(options)

    return run


SECTIONS: dict[str, Section] = {
    "step-topk": _section("step", "topk"),
    "step-batchtopk": _section("step", "batchtopk"),
    "step-jumprelu": _section("step", "jumprelu"),
    "memory": _section("memory"),
    "kernels": _section("kernels"),
    "buffer": _section("buffer"),
    "wire": _section("wire"),
    "producer": _section("producer"),
    "corpora": _section("corpora"),
    "together": _section("together"),
    "start": _section("start"),
    "flood": _section("flood"),
    "evaluation": _section("evaluation"),
    "pages": _section("pages"),
    "estimate": _section("estimate"),
    **{f"scaling-{name}": _section("scaling", name) for name in ("d_sae", "d_in", "k", "batch", "SAEs")},
}


def main() -> None:
    sections, options = _command_line()
    goals: list[Figure] = []
    for name in sections:
        results = _measure(name, options)
        goals += [figure for result in results for figure in result.figures if figure.goal is not None]
        if not options.quick:
            document = _read()
            document["sections"][name] = _section_document(results, options)
            BENCH.write_text(json.dumps(document, indent=1) + "\n")
    if not options.quick and any(name.startswith("scaling") for name in sections):
        import_module("tests.benchmarks.scaling").redraw(_read()["sections"])
    console.print(_goals_table(goals))
    console.print("nothing is written of small sizes" if options.quick else f"written to {BENCH}")


def _measure(name: str, options: Options) -> list[Result]:
    """Runs a section and prints its tables as they come; those it had when it broke off are kept."""
    results, others = list[Result](), Others()
    try:
        for result in SECTIONS[name](options):
            results.append(result)
            if (share := others.share()) > DISTURBED:
                result.notes.append(f"disturbed: other processes used {share:.0%} of the machine meanwhile")
            console.print(_table(result))
            for note in result.notes:
                console.print(f"  {note}", style="dim")
            console.print()
    except Exception as error:
        console.print(f"{name} broke off: {type(error).__name__}: {error}\n", style="red")
    return results


def _command_line() -> tuple[list[str], Options]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", metavar="NAMES", help=f"sections, by name or its beginning, of: {', '.join(SECTIONS)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender is measured (default 3)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything works")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    arguments = parser.parse_args()
    prefixes = [word for word in arguments.only.split(",") if word]
    if strange := [word for word in prefixes if not any(name.startswith(word) for name in SECTIONS)]:
        parser.error(f"no section begins with {', '.join(strange)}; there are {', '.join(SECTIONS)}")
    sections = [name for name in SECTIONS if not prefixes or name.startswith(tuple(prefixes))]
    peers = os.environ.get("SLUICE_PEERS_PYTHON") or (str(PEERS.absolute()) if PEERS.exists() else None)
    return sections, Options(arguments.rounds, arguments.quick, arguments.device, peers)


def _table(result: Result) -> Table:
    table = Table(title=result.title, title_justify="left")
    table.add_column("")
    table.add_column(f"median, {result.unit}", justify="right")
    table.add_column("lowest … highest", justify="right")
    for name, values in result.measured.items():
        spread = f"{_number(min(values))} … {_number(max(values))}" if len(values) > 1 else ""
        table.add_row(name, _number(median(values)), spread)
    if result.figures:
        table.add_section()
    for figure in result.figures:
        table.add_row(figure.what, *_told(figure))
    return table


def _goals_table(figures: list[Figure]) -> Table:
    table = Table(title="Goals", title_justify="left")
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_column("goal", justify="right")
    for figure in figures:
        table.add_row(figure.what, *_told(figure))
    return table


def _told(figure: Figure) -> tuple[str, str]:
    """(value, goal and verdict) in words."""
    value = "–" if figure.value is None else f"{figure.value:.2f} {figure.unit}"
    if figure.goal is None:
        return value, ""
    colour = {"met": "green", "not met": "red", "skipped": "dim"}[figure.verdict]
    bound = f"{'≥' if figure.at_least else '≤'} {figure.goal:g} {figure.unit}"
    return value, f"{bound}: [{colour}]{figure.verdict}[/]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _read() -> dict[str, Any]:
    """What bench.json holds of earlier runs of this machine, device and torch; those of others are let go."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    here = {"cores": os.cpu_count(), "cpu": _cpu(), "gpu": device, "torch": torch.__version__}
    document = json.loads(BENCH.read_text()) if BENCH.exists() else {}
    return document if document.get("machine") == here and "sections" in document else {"machine": here, "sections": {}}


def _cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _section_document(results: list[Result], options: Options) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["python", "-m", "tests.benchmarks", *sys.argv[1:]]),
        "device": options.device,
        "rounds": options.rounds,
        "results": [asdict(result) for result in results],
    }


if __name__ == "__main__":
    main()
