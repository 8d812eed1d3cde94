"""Every architecture on every variant of the truth, several seeds: rewrites the table of tests/GROUND_TRUTH.md.

python -m tests.benchmarks.ground_truth [SEEDS]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.small_training import (
    ROWS,
    SHARKEY,
    TRUTHS,
    TruthScores,
    candidates,
    judge_newest,
    train_on_sharkey,
    train_on_truth,
    truth,
)

PAGE = Path(__file__).parent.parent / "GROUND_TRUTH.md"
HEAD = (
    "| architecture | truth | MMCS | worst feature | L0 | FVU | dead | seconds |\n|---|---|---|---|---|---|---|---|\n"
)
MARK = "<!-- python -m tests.benchmarks.ground_truth -->\n"


def line(name: str, variant: str, results: list[TruthScores], seconds: float) -> str:
    """The mean over seeds; the worst feature and the largest FVU of all seeds."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return (
        f"| {name} | {variant} | {mean([one.mmcs for one in results]):.4f} | {min(one.worst for one in results):.3f} "
        f"| {mean([one.l0 for one in results]):.2f} | {max(one.fvu for one in results):.3f} "
        f"| {mean([one.dead for one in results]):.2f} | {seconds:.0f} |\n"
    )


def main(seeds: int) -> None:
    torch.set_num_threads(1)
    table = MARK + HEAD
    for variant, settings in TRUTHS.items():
        results: dict[str, list[TruthScores]] = {name: [] for name in candidates()}
        began = time.monotonic()
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                run = train_on_truth(
                    [*candidates().values()], truth(tokens=ROWS, **settings), ROWS, Path(folder), seed=seed
                )
                for name, all_seeds in results.items():
                    all_seeds.append(judge_newest(run, name))
        seconds = (time.monotonic() - began) / seeds / len(results)
        table += "".join(line(name, variant, all_seeds, seconds) for name, all_seeds in results.items())
        print(table, flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        whole = judge_newest(train_on_sharkey(Path(folder)), SHARKEY.name)
    table += line(SHARKEY.name, "d = 256, G = 512", [whole], time.monotonic() - began)
    text = PAGE.read_text("utf-8")
    PAGE.write_text(text[: text.index(MARK)] + table, "utf-8")
    print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
