"""A run directory of a 4 × 4 grid of SAEs whose losses follow a law that is known."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

from trainer.snapshot import new_snapshot

PLANTED = {"alpha": -0.5, "beta_k": 0.26, "beta_n": -0.17, "gamma": -0.042, "zeta": -3.3, "eta": -0.28}
SIZES, KS = (256, 512, 1024, 2048), (8, 16, 32, 64)


def planted_loss(n: int, k: int) -> float:
    p = PLANTED
    power = p["alpha"] + p["beta_k"] * math.log(k) + (p["beta_n"] + p["gamma"] * math.log(k)) * math.log(n)
    return math.exp(power) + math.exp(p["zeta"] + p["eta"] * math.log(k))


def write_run(
    directory: Path, sizes: tuple[int, ...] = SIZES, ks: tuple[int, ...] = KS, *, evaluated: bool = True,
    finished: bool = True, late: str | None = None, names: tuple[str, ...] | None = None,
) -> Path:  # fmt: skip
    """A run directory whose SAEs have the planted losses: one snapshot at 1,000,000 tokens, and reports until then."""
    directory.mkdir(exist_ok=True)
    (directory / "settings.toml").write_text("")
    cells = {f"topk-{n}-{k}": (n, k) for n, k in product(sizes, ks)}
    tables = [
        {"name": name, "architecture": "topk", "d_sae": n, "k": k, "dead_tokens": 1000}
        for name, (n, k) in cells.items()
    ]
    with new_snapshot(directory, 1_000_000, {"id": "r", "settings": {"sae": tables}, "stream": {}}) as draft:
        for name, (n, k) in cells.items():
            if names is not None and name not in names:
                continue
            folder = draft.folder / name
            folder.mkdir()
            loss = planted_loss(n, k)
            draft.add(name, {"tokens": 400_000 if name == late else 1_000_000, "fvu": 1.1 * loss})
            if evaluated:
                (folder / "evaluation.json").write_text(json.dumps({"fvu": loss, "snapshot_tokens": 1_000_000}))
    with open(directory / "metrics.jsonl", "w") as file:
        for tokens in range(20_000, 1_000_001, 20_000):
            rate = 1e-3 if tokens <= 800_000 else 1e-3 * (1_000_000 - tokens) / 200_000
            saes = [
                {
                    "name": name,
                    "loss": {"reconstruction": planted_loss(*cell) * (1 + 300 * tokens**-0.5)},
                    "learning_rate": rate,
                }
                for name, cell in cells.items()
            ]
            file.write(json.dumps({"tokens": tokens, "saes": saes}) + "\n")
    if finished:
        (directory / "summary.json").write_text('{"tokens": 1000000}')
    return directory
