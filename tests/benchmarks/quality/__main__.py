"""Our SAEs against the peers' own trainers, on the same activations in the same order: `make quality`.

    python -m tests.benchmarks.quality [--stages rates seeds frontier long] [--only TEXT] [--record]

rates     every contender at a small grid of learning rates, which grows while the best one lies at its edge
seeds     the best rate with two more seeds
frontier  the best rate at other L0: 8, 16, 64, 128
long      the best rate for more tokens

A finished cell is kept in runs/quality/cells and never trained again: an interrupted benchmark goes on where it was.
One cell at a time, on one core. --record puts results and picture beside the README.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from tests.benchmarks.quality.activations import collect
from tests.benchmarks.quality.cells import CONTENDERS, FRONTIER, L0, LONG_TOKENS, MOST_SILENT, RATES, SEEDS, Cell
from tests.benchmarks.quality.evaluate import Examiner
from tests.benchmarks.quality.picture import draw
from tests.benchmarks.quality.tables import tables

HERE = Path(__file__).parent
STAGES = ("rates", "seeds", "frontier", "long")
PEERS_PYTHON = os.environ.get("SLUICE_PEERS_PYTHON", ".venv-peers/bin/python")
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000", "MALLOC_TOP_PAD_": "200000000"}
"""Dense trainers make 32 MB tensors by the dozen in each step; returning them to the system every time takes longer
than computing them."""

Result = dict[str, Any]


class Bench:
    """Trains and measures cells, and remembers them on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.activations = root / "activations.safetensors"
        self._examiner = Examiner(self.activations)
        self.results: dict[str, Result] = {}
        """By the cell's name; each holds the cell, what was measured and how long training took."""
        for path in sorted((root / "cells").glob("*/result.json")):
            self.results[path.parent.name] = json.loads(path.read_text())

    def result(self, cell: Cell) -> Result:
        """Trains and measures the cell unless that is done."""
        if cell.name not in self.results:
            folder = self.root / "cells" / cell.name
            if not (folder / "training.json").exists():
                self._train(cell, folder)
            measures = self._examiner.examine(folder)
            training = json.loads((folder / "training.json").read_text())
            self.results[cell.name] = {"cell": cell.as_json(), "seconds": training["seconds"], **measures}
            (folder / "result.json").write_text(json.dumps(self.results[cell.name], indent=1) + "\n")
        return self.results[cell.name]

    def _train(self, cell: Cell, folder: Path) -> None:
        if cell.library == "ours":
            program = [sys.executable, "-m", "tests.benchmarks.quality.ours"]
        else:
            program = [PEERS_PYTHON, str(HERE / "peers.py")]
        arguments = [json.dumps(cell.as_json()), str(self.activations), str(folder)]
        environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        log = self.root / "training.log"
        with log.open("w") as output:
            process = subprocess.run(
                ["nice", "-n", "10", *program, *arguments], env=environment, stdout=output, stderr=output
            )
        if process.returncode:
            raise SystemExit(f"{cell.name} ended with {process.returncode}:\n{log.read_text()[-2000:]}")

    def best(self, contender: Cell) -> Cell:
        """The contender at the learning rate with the lowest FVU of those that were tried."""
        cells = [cell for cell in rate_cells(contender, self.results) if cell.name in self.results]
        if contender.library == "ours":
            cells = [cell for cell in cells if self.results[cell.name]["silent"] <= MOST_SILENT] or cells
        return min(cells, key=lambda cell: self.results[cell.name]["fvu"]) if cells else contender

    def expected_seconds(self, cell: Cell) -> float:
        """From finished cells like it."""
        alike = [
            r for r in self.results.values() if (r["cell"]["library"], r["cell"]["architecture"]) == cell.contender
        ]
        per_token = mean(r["seconds"] / r["cell"]["tokens"] for r in alike) if alike else 1e-4
        return per_token * cell.tokens + 5


def rate_cells(contender: Cell, results: dict[str, Result]) -> list[Cell]:
    """The contender at every rate of the grid, and beyond it while the best one lies at the edge."""
    rates = list(RATES)
    while True:
        cells = [contender.but(rate=rate) for rate in rates]
        if any(cell.name not in results for cell in cells):
            return cells
        best = min(cells, key=lambda cell: results[cell.name]["fvu"]).rate
        if best == max(rates):
            rates.append(round(2 * best, 6))
        elif best == min(rates):
            rates.append(round(best / 3, 6))
        else:
            return cells


def plan(bench: Bench, stage: str, contenders: Sequence[Cell]) -> list[Cell]:
    """The cells of a stage as far as they are known."""
    if stage == "rates":
        grids = [rate_cells(contender, bench.results) for contender in contenders]
        return [grid[i] for i in range(max(map(len, grids))) for grid in grids if i < len(grid)]
    best = [bench.best(contender) for contender in contenders]
    if stage == "seeds":
        return [cell.but(seed=seed) for seed in SEEDS[1:] for cell in best]
    if stage == "frontier":
        return [cell.but(k=k) for k in FRONTIER if k != L0 for cell in best]
    return [cell.but(tokens=LONG_TOKENS) for cell in best]


def open_cells(bench: Bench, stages: Sequence[str], contenders: Sequence[Cell]) -> Iterator[tuple[Cell, float]]:
    """(the next cell, seconds that it and all known others will take), until none is left."""
    while True:
        cells = [cell for stage in stages for cell in plan(bench, stage, contenders) if cell.name not in bench.results]
        if not cells:
            return
        yield cells[0], sum(map(bench.expected_seconds, cells))


def in_words(result: Result) -> str:
    return (
        f"FVU {result['fvu']:.4f}  L0 {result['l0']:.1f}  silent {result['silent']:.1%}  "
        f"ΔCE {result['ce_delta']:.4f}  {result['seconds']:.0f} s"
    )


def clock(seconds: float) -> str:
    return f"{seconds // 3600:.0f}:{seconds // 60 % 60:02.0f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--only", default="", help="contenders whose name contains this, such as ours-topk")
    parser.add_argument("--record", action="store_true", help="write results.json and frontier.svg beside the README")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = Path("runs/quality")
    collect(root / "activations.safetensors")
    bench = Bench(root)
    contenders = [cell for cell in CONTENDERS if arguments.only in "-".join(cell.contender)]
    for cell, seconds in open_cells(bench, arguments.stages, contenders):
        print(f"{time.strftime('%H:%M:%S')}  {clock(seconds)} left  {cell.name}", end="  ", flush=True)
        print(in_words(bench.result(cell)), flush=True)
    print(tables(bench.results, [bench.best(contender) for contender in CONTENDERS]))
    folder = HERE if arguments.record else root
    if arguments.record:
        (HERE / "results.json").write_text(json.dumps(bench.results, indent=1) + "\n")
    (folder / "frontier.svg").write_text(draw(bench.results, [bench.best(contender) for contender in CONTENDERS]))
    print(f"picture: {folder / 'frontier.svg'}")


if __name__ == "__main__":
    main()
