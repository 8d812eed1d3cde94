"""Our SAEs against the peers' own trainers, on the same activations in the same order: `make quality`.

    python -m tests.benchmarks.quality [--subjects demo smollm2]
                                       [--stages short default rule rates seeds frontier longer]
                                       [--only TEXT] [--most N] [--record]

short     every contender on 200,000 tokens, at three rates
default   ours at the learning rate that the trainer takes when none is set
rule      our TopK at several rates for other numbers of tokens and latents: what the default rate is fitted to
rates     every contender at a small grid of learning rates, which grows while the best one lies at its edge
seeds     the best rate with two more seeds
frontier  the best rate at other L0: 8, 16, 64, 128
longer    the best rate for three times the tokens

A finished cell is kept in runs/quality/cells and never trained again, nor are those of results.json: an interrupted
benchmark goes on where it was. One cell at a time, on one core. `--most 0` only prints the tables.
--record puts results and picture beside the README.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tests.benchmarks.quality.bench import HERE, Bench, Result, rate_cells
from tests.benchmarks.quality.cells import (
    FRONTIER,
    L0,
    LONGER,
    SEEDS,
    Cell,
    contenders,
    ours_at_default,
    rule_cells,
    short_cells,
)
from tests.benchmarks.quality.picture import draw
from tests.benchmarks.quality.subjects import SUBJECTS
from tests.benchmarks.quality.tables import tables

STAGES = ("short", "default", "rule", "rates", "seeds", "frontier", "longer")


def plan(bench: Bench, subject: str, stage: str) -> list[Cell]:
    """The cells of a stage as far as they are known."""
    if stage == "short":
        return list(short_cells(subject))
    if stage == "default":
        return list(ours_at_default(subject))
    if stage == "rule":
        return list(rule_cells(subject))
    if stage == "rates":
        grids = [rate_cells(contender, bench.results) for contender in contenders(subject)]
        return [grid[i] for i in range(max(map(len, grids))) for grid in grids if i < len(grid)]
    best = [bench.best(contender) for contender in contenders(subject)]
    if stage == "seeds":
        return [cell.but(seed=seed) for seed in SEEDS[1:] for cell in best]
    if stage == "frontier":
        return [cell.but(k=k) for k in FRONTIER if k != L0 for cell in best]
    return [cell.but(tokens=LONGER * cell.tokens) for cell in best]


def open_cells(bench: Bench, subjects: Sequence[str], stages: Sequence[str], only: str) -> Iterator[tuple[Cell, float]]:
    """(the next cell, seconds that it and all known others will take), until none is left."""
    while True:
        planned = [cell for subject in subjects for stage in stages for cell in plan(bench, subject, stage)]
        cells = [cell for cell in dict.fromkeys(planned) if cell.name not in bench.results and only in cell.name]
        if not cells:
            return
        yield cells[0], sum(map(bench.expected_seconds, cells))


def describe(result: Result) -> str:
    fvu, test = result["validation"]["fvu"], result["test"]
    ce_delta = f"  ΔCE {test['ce_delta']:.4f}" if "ce_delta" in test else ""
    return (
        f"FVU {fvu:.4f} (test {test['fvu']:.4f})  L0 {result['l0']:.1f}  silent {result['silent']:.1%}{ce_delta}  "
        f"{result['seconds']:.0f} s"
    )


def clock(seconds: float) -> str:
    return f"{seconds // 3600:.0f}:{seconds // 60 % 60:02.0f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="*", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--only", default="", help="cells whose name contains this, such as ours-topk")
    parser.add_argument("--most", type=int, default=sys.maxsize, help="end after so many cells")
    parser.add_argument("--record", action="store_true", help="write results.json and frontier.svg beside the README")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = Path("runs/quality")
    bench = Bench(root)
    cells = open_cells(bench, arguments.subjects, arguments.stages, arguments.only)
    for _ in range(arguments.most):
        if (found := next(cells, None)) is None:
            break
        cell, seconds = found
        print(f"{time.strftime('%H:%M:%S')}  {clock(seconds)} left  {cell.name}", end="  ", flush=True)
        print(describe(bench.result(cell)), flush=True)
    best = {subject: [bench.best(contender) for contender in contenders(subject)] for subject in SUBJECTS}
    print(tables(bench.results, best))
    folder = HERE if arguments.record else root
    if arguments.record:
        bench.record()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "frontier.svg").write_text(draw(bench.results, best["demo"]))
    print(f"picture: {folder / 'frontier.svg'}")


if __name__ == "__main__":
    main()
