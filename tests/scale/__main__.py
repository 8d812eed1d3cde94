"""`make scale`: what many ranks promise, on this machine, over gloo: worlds of 1, 2 and 4.

    python -m tests.scale [--quick]

    parity     gradients and weights of every kind of SAE against one process, in float64
    bits       sha256 of all tensors with `blocks = 8`, equal for 1, 2 and 4 ranks
    exchange   bytes received in a step against the formulas of trainer.planning.exchange
    memory     host memory of publishing, in slabs above resting

Kills are drills: `python -m tests.drills --only rank`, which `make scale` runs after this. Exit code 1 when a bound
does not hold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tests import test_sharded_saes as sharded
from tests.small_ranks import SIZES, SmallRanks
from trainer.parallel.ranks import ALONE, Ranks

MOST_SLABS = 2.0
BLOCKS = 8
METERED = ("topk", "topk multi", "batchtopk matryoshka", "jumprelu", "relu crosscoder", "tied", "gated")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one SAE for each mechanism, and a small one published")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    begin, console = time.monotonic(), Console(width=120, highlight=False)
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder, SmallRanks(Path(folder)) as ranks:
        cases = sharded.QUICK if quick else sharded.all_cases()
        failures += _show(console, "Largest relative difference from one process, float64", _parity(ranks, cases))
        failures += _show(console, "sha256 with blocks = 8, 30 steps, float32", _bits(ranks, cases))
        failures += _show(console, "Bytes received in a step", _exchange(ranks))
    failures += _show(console, "Publishing", _memory(65_536 if quick else 262_144, 256 if quick else 1024))
    console.print(f"{time.monotonic() - begin:.0f} s; {len(failures)} bounds do not hold: {', '.join(failures) or '-'}")
    return 1 if failures else 0


Row = tuple[str, list[str], bool]
"""(name, cells, whether the bound holds)"""


def _show(console: Console, title: str, rows: Iterator[Row]) -> list[str]:
    """Prints rows as they come; returns the names of those whose bound does not hold."""
    console.rule(title, align="left")
    failures = []
    for name, cells, holds in rows:
        table = Table.grid(padding=(0, 2))
        table.add_column(width=40)
        table.add_row(name, *cells, "[green]ok[/]" if holds else "[bold red]does not hold[/]")
        console.print(table)
        if not holds:
            failures.append(name)
    return failures


def _parity(small_ranks: SmallRanks, cases: dict[str, dict]) -> Iterator[Row]:
    for name, table in cases.items():
        gradients, tensors, _ = sharded.train(ALONE, table)
        cells, holds = [], True
        for size in SIZES:
            parts = small_ranks.run(sharded.train, size, table)
            in_gradients = sharded.difference(sharded.joined([part[0] for part in parts]), gradients)
            in_weights = sharded.difference(sharded.joined([part[1] for part in parts]), tensors)
            holds &= in_gradients <= sharded.GRADIENTS and in_weights <= sharded.WEIGHTS
            cells.append(f"{size} ranks: gradients {in_gradients:.0e}, weights {in_weights:.0e}")
        yield name, cells, holds


def _bits(small_ranks: SmallRanks, cases: dict[str, dict]) -> Iterator[Row]:
    for name, table in cases.items():
        alone = Ranks(0, 1, None, blocks=BLOCKS, latents_per_unit=1)
        hashes = [sharded.sha256(sharded.train_in_float32(alone, table))]
        for size in SIZES:
            parts = small_ranks.run(sharded.train_in_float32, size, table, blocks=BLOCKS)
            hashes.append(sharded.sha256(sharded.joined(parts)))
        cells = [f"{size}: {each[:12]}" for size, each in zip((1, *SIZES), hashes, strict=True)]
        yield name, cells, len(set(hashes)) == 1


def _exchange(small_ranks: SmallRanks) -> Iterator[Row]:
    for blocks in (1, BLOCKS):
        for size in SIZES:
            for kind in METERED:
                table = sharded.case(kind, revive_tokens=10_000)
                (planned,) = sharded.planned_bytes(table, size, blocks)
                received = small_ranks.run(sharded.received_in_a_step, size, table, blocks=blocks)
                holds = all(steps == [planned] * 2 for steps in received)
                total, expected = sum(received[0][0].values()), sum(planned.values())
                yield kind, [f"{size} ranks, {blocks} blocks", f"{total:,} B", f"planned {expected:,} B"], holds


def _memory(latents: int, width: int) -> Iterator[Row]:
    """In a process of its own, whose memory is that of publishing."""
    command = [sys.executable, "-m", "tests.scale.memory", "--latents", str(latents), "--width", str(width), "--json"]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    text = f"{measured['slabs']:.2f} slabs of {measured['slab'] / 1e6:.0f} MB above {measured['resting'] / 1e9:.2f} GB"
    yield f"{latents:,} latents, d {width}", [text, f"{measured['seconds']:.0f} s"], measured["slabs"] <= MOST_SLABS


if __name__ == "__main__":
    sys.exit(main())
