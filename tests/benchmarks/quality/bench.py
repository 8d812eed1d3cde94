"""Trains and measures cells, and remembers them: on disk, and in the results that are recorded beside the README."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from tests.benchmarks.quality.activations import collect
from tests.benchmarks.quality.cells import MOST_SILENT, RATES, SIZES, Cell
from tests.benchmarks.quality.evaluate import Examiner
from tests.benchmarks.quality.subjects import SUBJECTS

HERE = Path(__file__).parent
RECORDED = HERE / "results.json"
PEERS_PYTHON = os.environ.get("SLUICE_PEERS_PYTHON", ".venv-peers/bin/python")
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000", "MALLOC_TOP_PAD_": "200000000"}
"""Dense trainers make 32 MB tensors by the dozen in each step; returning them to the system every time takes longer
than computing them."""

Result = dict[str, Any]


class Bench:
    """See the module's docstring."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._examiners: dict[str, Examiner] = {}
        self.results: dict[str, Result] = json.loads(RECORDED.read_text())
        """By the cell's name; each holds the cell, what was measured and how long training took."""
        for path in sorted((root / "cells").glob("*/result.json")):
            self.results[path.parent.name] = json.loads(path.read_text())

    def result(self, cell: Cell) -> Result:
        """Trains and measures the cell unless that is done."""
        if cell.name not in self.results:
            examiner, folder = self._examiner(cell.subject), self.root / "cells" / cell.name
            if not (folder / "training.json").exists():
                self._train(cell, folder)
            sizes = SIZES[cell.subject]
            measures = examiner.examine(folder, (cell.tokens, cell.d_sae) == (sizes["tokens"], sizes["d_sae"]))
            training = json.loads((folder / "training.json").read_text())
            self.results[cell.name] = {"cell": cell.as_json(), "seconds": training["seconds"], **measures}
            (folder / "result.json").write_text(json.dumps(self.results[cell.name], indent=1) + "\n")
        return self.results[cell.name]

    def record(self) -> None:
        """Writes all results beside the README."""
        RECORDED.write_text(json.dumps(dict(sorted(self.results.items())), indent=1) + "\n")

    def _activations(self, subject: str) -> Path:
        return self.root / subject / "activations.safetensors"

    def _examiner(self, subject: str) -> Examiner:
        """The examiner of the subject, with its activations collected."""
        if subject not in self._examiners:
            collect(SUBJECTS[subject], self._activations(subject))
            self._examiners[subject] = Examiner(SUBJECTS[subject], self._activations(subject))
        return self._examiners[subject]

    def _train(self, cell: Cell, folder: Path) -> None:
        if cell.library == "ours":
            program = [sys.executable, "-m", "tests.benchmarks.quality.ours"]
        else:
            program = [PEERS_PYTHON, str(HERE / "peers.py")]
        arguments = [json.dumps(cell.as_json()), str(self._activations(cell.subject)), str(folder)]
        environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        log = self.root / "training.log"
        with log.open("w") as output:
            process = subprocess.run([*program, *arguments], env=environment, stdout=output, stderr=output)
        if process.returncode:
            raise SystemExit(f"{cell.name} ended with {process.returncode}:\n{log.read_text()[-2000:]}")

    def best(self, contender: Cell) -> Cell:
        """The contender at the learning rate with the lowest FVU of those that were tried."""
        cells = [Cell(**result["cell"]) for result in like(self.results, contender).values()]
        if contender.library == "ours":
            cells = [cell for cell in cells if self.results[cell.name]["silent"] <= MOST_SILENT] or cells
        return min(cells, key=lambda cell: choice_fvu(self.results[cell.name])) if cells else contender

    def expected_seconds(self, cell: Cell) -> float:
        """From finished cells like it."""
        alike = [
            r
            for r in self.results.values()
            if (r["cell"]["library"], r["cell"]["architecture"]) == cell.contender
            and r["cell"].get("subject", Cell.subject) == cell.subject
        ]
        per_value = mean(r["seconds"] / _latents_seen(Cell(**r["cell"])) for r in alike) if alike else 1e-7
        return per_value * _latents_seen(cell) + 5


def choice_fvu(result: Result) -> float:
    """The FVU that choices look at. Cells of the first benchmark knew no parts: theirs is of all held-out rows."""
    return result.get("validation", result)["fvu"]


def like(results: dict[str, Result], cell: Cell) -> dict[float, Result]:
    """Results of this cell at any rate, by the rate."""
    alike = [result for name, result in results.items() if cell.but(rate=result["cell"]["rate"]).name == name]
    return {result["cell"]["rate"]: result for result in alike}


def rate_cells(contender: Cell, results: dict[str, Result]) -> list[Cell]:
    """The contender at every rate of the grid, and beyond it while the best one lies at the edge."""
    rates = list(RATES)
    while True:
        cells = [contender.but(rate=rate) for rate in rates]
        if any(cell.name not in results for cell in cells):
            return cells
        best = min(cells, key=lambda cell: choice_fvu(results[cell.name])).rate
        if best == max(rates):
            rates.append(round(2 * best, 6))
        elif best == min(rates):
            rates.append(round(best / 2, 6))
        else:
            return cells


def _latents_seen(cell: Cell) -> float:
    return cell.tokens * cell.d_sae
