"""`make drills`: every promise of the stream under fire, each drill a row of a table.

    python -m tests.drills [--only trainer,soak] [--quick]

A drill fails when its promise is broken; the others go on, and the exit code is 1. Numbers are written to results.json
beside this file, and from there into README.md; drills that were not run keep what was known of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.drills import (
    attacks,
    deterministic,
    disk,
    http_ports,
    ledger,
    malformed,
    mutants,
    network,
    processes,
    ranks,
    strangers,
)
from tests.drills.scene import Outcome

Drill = Callable[[Path, bool], Outcome]
"""Runs in an empty folder; `quick` asks for as little as shows that the drill works."""

DRILLS: dict[str, Drill] = {
    "ledger, at length": ledger.long_machine,
    "ledger, bugs planted": ledger.mutations,
    "elsewhere, bugs planted": mutants.mutations,
    "producers killed": processes.producers_killed,
    "producers crash in a loop": processes.producers_crash_in_a_loop,
    "producer frozen": processes.producer_frozen,
    "trainer killed": processes.trainer_killed,
    "killed in a checkpoint": processes.killed_in_checkpoint,
    "killed in a snapshot": processes.killed_in_snapshot,
    "ranks in turn": ranks.ranks_in_turn,
    "ranks killed": ranks.ranks_killed,
    "killed in a rank's shard": ranks.killed_in_a_shard,
    "checkpoint removed": processes.checkpoint_removed,
    "producers come and go": processes.producers_come_and_go,
    "slow trainer": processes.slow_trainer,
    "everybody told to leave": processes.everybody_told_to_leave,
    "clock jumps": processes.clock_jumps,
    "network: blackhole": network.blackhole,
    "network: reset": network.reset,
    "network: half-open": network.half_open,
    "network: latency": network.latency,
    "network: 1 MB/s": network.narrow,
    "network: flipped bits": network.flipped_bits,
    "disk full": disk.full,
    "disk read-only": disk.read_only,
    "producers of other streams": strangers.other_streams,
    "malformed messages": malformed.malformed,
    "decoder fuzzed": malformed.fuzzed,
    "message without end": attacks.unfinished,
    "message without end, by a known key": attacks.unfinished_with_keys,
    "HELLOs without end": attacks.hellos,
    "HELLO of an absurd width": attacks.wide,
    "keys rotated": strangers.keys_rotated,
    "broken shards": strangers.broken_shards,
    "half requests": http_ports.half_requests,
    "many snapshots": http_ports.many_snapshots,
    "broken shards, mended": strangers.mended_shards,
    "deterministic, known rows": deterministic.synthetic,
    "deterministic, language model": deterministic.language_model,
    "soak": processes.soak,
}

HERE = Path(__file__).parent
RESULTS, README = HERE / "results.json", HERE / "README.md"
BEGIN, END = "<!-- table: written by `make drills` -->\n", "<!-- end of table -->"


def main() -> int:
    names, quick = _command_line()
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        results[name] = _run(name, quick)
        Console(soft_wrap=True).print(_line(name, results[name]), markup=False)
        if not quick:
            all_results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            all_results |= {name: results[name]}
            RESULTS.write_text(
                json.dumps({one: all_results[one] for one in DRILLS if one in all_results}, indent=1) + "\n"
            )
            _redraw(json.loads(RESULTS.read_text()))
    Console(width=160).print(_table(results))
    return int(any("failed" in result for result in results.values()))


def _run(name: str, quick: bool) -> dict[str, Any]:
    """A drill's row: its outcome, or why it failed or was skipped."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sluice-drill-") as folder:
        try:
            result: dict[str, Any] = asdict(DRILLS[name](Path(folder), quick))
        except PermissionError as error:
            result = {"skipped": str(error)}
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {error}"}
    return result | {"seconds": round(time.monotonic() - began, 1), "date": time.strftime("%Y-%m-%d")}


def _command_line() -> tuple[list[str], bool]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", metavar="NAMES", help=f"drills, by a part of the name: {', '.join(DRILLS)}"
    )
    parser.add_argument("--quick", action="store_true", help="as little as shows that they work; nothing is written")
    arguments = parser.parse_args()
    words = [word.strip() for word in arguments.only.split(",") if word.strip()]
    if strange := [word for word in words if not any(word in name for name in DRILLS)]:
        parser.error(f"no drill is called {', '.join(strange)}; there are {', '.join(DRILLS)}")
    return [name for name in DRILLS if not words or any(word in name for word in words)], arguments.quick


COLUMNS = ("drill", "rounds", "rows checked", "lost", "repeated", "recovery, s", "peak, MB", "took, s", "")


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    took = f"{row['seconds']:.0f}"
    for verdict in ("failed", "skipped"):
        if verdict in row:
            return [name, "", "", "", "", "", "", took, f"{verdict}: {row[verdict]}"]
    recovery = "" if row["recovery"] is None else f"{row['recovery']:.1f}"
    peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
    lost, repeated = (str(row[what]) if row["rows"] else "" for what in ("lost", "repeated"))
    rows = f"{row['rows']:,}" if row["rows"] else ""
    return [name, f"{row['rounds']:,}", rows, lost, repeated, recovery, peak, took, row["note"]]


def _line(name: str, row: dict[str, Any]) -> str:
    cells = zip(COLUMNS[1:], _cells(name, row)[1:], strict=True)
    return f"{name}: " + ", ".join(f"{column} {cell}".strip() for column, cell in cells if cell)


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table()
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("drill", "") else "right")
    for name, row in results.items():
        table.add_row(*_cells(name, row))
    return table


def _redraw(results: dict[str, dict[str, Any]]) -> None:
    """The table in README.md, from results.json."""
    head, _, rest = README.read_text().partition(BEGIN)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * (len(COLUMNS) - 2) + "---|"]
    lines += ["| " + " | ".join(_cells(name, row)) + " |" for name, row in results.items()]
    for name, row in results.items():
        if details := row.get("details"):
            lines += ["", f"| {name} | |", "|---|---|", *(f"| {what} | {detail} |" for what, detail in details.items())]
    lines += ["", f"{os.cpu_count()} cores of {platform.machine()}, Python {platform.python_version()}."]
    README.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    sys.exit(main())
