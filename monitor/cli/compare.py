"""What changed between two snapshots of a run, or between any two SAEs on the same activations.

    python -m monitor compare runs/gpt2/snapshots/000020000256 runs/gpt2/snapshots/000040000512
    python -m monitor compare A/topk B/topk --json

Numbers that differ, side by side, then the latents. A latent lives when it fires once in 1 / DEAD_RATE rows, by the
firing rates in sparsity.safetensors: one that lives in B alone was *born*, one that lives in A alone *died*. Of
those that live in both, the cosine of the two decoder rows tells how far one *turned*: by more than 45° counts. Where
it is below KEPT, every row of B is looked through for a better match, since latents may change places (and do, in SAEs
of different runs). Of two SAEs of different width only the best match is told, in both directions; its mean is the
mean max cosine similarity of Sharkey et al. 2022.

Needs numpy alone, and besides the two decoders a block of BLOCK_BYTES.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monitor.evaluation.measures import MEASURES, Better
from monitor.evaluation.results import Evaluation, read_evaluation
from producer.common.addresses import path_argument
from producer.common.completion import complete
from producer.common.shell import shell_command

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

DEAD_RATE = 1e-6
"""The field's usual bound: a latent that fires more rarely counts as dead."""
KEPT = 0.9
"""From this cosine on, a latent is taken for the same one without a look at the others."""
TURNED = math.cos(math.radians(45))
EDGES = (-1.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Of the histogram of cosines; the last bin includes 1."""
BLOCK_BYTES = 64 << 20
"""Of cosines held at a time."""
EXAMPLES = 6
"""Latents that the table names of each kind; --json has all."""
BAR = 16
NICE = 10
"""It may run beside the training."""


class CompareError(ValueError):
    """The two cannot be compared; `str(error)` says why."""


@dataclass(frozen=True)
class ComparedSae:
    """One SAE on disk, and what its snapshot tells of it."""

    folder: Path
    metrics: dict[str, Any]
    evaluation: Evaluation

    def numbers(self) -> dict[str, float]:
        """Training's metrics and the evaluation's, which say `held-out` where both have the name."""
        held_out = {
            f"held-out {name}" if name in self.metrics else name: value
            for name, value in self.evaluation.values.items()
        }
        return {
            name: value
            for name, value in {**self.metrics, **held_out}.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }


def compare(a: Path, b: Path) -> dict[str, Any]:
    """The comparison of two snapshots' or two SAEs' folders, as --json prints it. Raises CompareError."""
    ours, theirs = find_saes(a), find_saes(b)
    if len(ours) == len(theirs) == 1:  # names may differ
        pairs = {name if name in theirs else f"{name} → {next(iter(theirs))}": (sae, next(iter(theirs.values())))
                 for name, sae in ours.items()}  # fmt: skip
        return {"a": str(a), "b": str(b), "only_a": [], "only_b": [], "saes": _each(pairs)}
    pairs = {name: (ours[name], theirs[name]) for name in ours if name in theirs}
    if not pairs:
        raise CompareError(
            f"{a} has {', '.join(ours)} and {b} has {', '.join(theirs)}: none by the same name; "
            "name one SAE's folder of each, such as SNAPSHOT/topk"
        )
    return {
        "a": str(a),
        "b": str(b),
        "only_a": [name for name in ours if name not in theirs],
        "only_b": [name for name in theirs if name not in ours],
        "saes": _each(pairs),
    }


def _each(pairs: dict[str, tuple[ComparedSae, ComparedSae]]) -> dict[str, Any]:
    return {name: {"numbers": _side_by_side(a, b), "latents": compare_latents(a, b)} for name, (a, b) in pairs.items()}


def find_saes(folder: Path) -> dict[str, ComparedSae]:
    """The SAEs of a snapshot, or the one whose folder it is, by name. Raises CompareError."""
    from monitor.files import read_json
    from trainer.snapshot import SnapshotError, read_manifest

    if (folder / "manifest.json").is_file():
        try:
            metrics = read_manifest(folder)["saes"]
        except SnapshotError as error:
            raise CompareError(str(error)) from None
        return {
            name: ComparedSae(folder / name, told, read_evaluation(folder, name) or Evaluation())
            for name, told in metrics.items()
        }
    if (folder / "sae_weights.safetensors").is_file():
        manifest = read_json(folder.parent / "manifest.json", folder.parent) or {}
        metrics = manifest.get("saes", {}).get(folder.name, {})
        return {folder.name: ComparedSae(folder, metrics, read_evaluation(folder.parent, folder.name) or Evaluation())}
    missing = "does not exist" if not folder.exists() else "holds neither a manifest.json nor sae_weights.safetensors"
    raise CompareError(f"{folder} {missing}; name a snapshot, such as RUN_DIR/snapshots/000001234567, or an SAE in one")


def _side_by_side(a: ComparedSae, b: ComparedSae) -> dict[str, list[float | None]]:
    before, after = a.numbers(), b.numbers()
    return {name: [before.get(name), after.get(name)] for name in {**before, **after}}


# --- Latents ---------------------------------------------------------------------------------------------------------


def compare_latents(a: ComparedSae, b: ComparedSae) -> dict[str, Any]:
    """How the latents of B lie to those of A; `incomparable` alone, with the reason, when no cosine means anything."""
    import numpy as np

    before, after = _decoder(a), _decoder(b)
    if before.shape[1] != after.shape[1]:
        return {
            "incomparable": f"decoder rows have {before.shape[1]} entries in A and {after.shape[1]} in B: "
            "they live in different spaces, and no cosine between them means anything"
        }
    rate_a, rate_b = _rates(a, len(before)), _rates(b, len(after))
    if len(before) != len(after):
        return _different_widths(before, after, rate_a >= DEAD_RATE, rate_b >= DEAD_RATE)
    lives_a, lives_b = rate_a >= DEAD_RATE, rate_b >= DEAD_RATE
    both = np.flatnonzero(lives_a & lives_b)
    same = np.einsum("ij,ij->i", before, after)
    matched, match = same.copy(), np.arange(len(same))
    doubtful = both[same[both] < KEPT]
    best, where = best_matches(before, after, doubtful)
    better = best > same[doubtful]
    matched[doubtful[better]], match[doubtful[better]] = best[better], where[better]
    turned = both[same[both] < TURNED]
    turned = turned[np.argsort(same[turned], kind="stable")]
    change = np.abs(np.log2(np.maximum(rate_b[both], DEAD_RATE) / np.maximum(rate_a[both], DEAD_RATE)))
    return {
        "latents": len(same),
        "live": [int(lives_a.sum()), int(lives_b.sum())],
        "born": _by_rate(np.flatnonzero(~lives_a & lives_b), rate_b),
        "died": _by_rate(np.flatnonzero(lives_a & ~lives_b), rate_a),
        "turned": [
            {"latent": int(i), "cosine": _round(same[i]), "match": int(match[i]), "match_cosine": _round(matched[i])}
            for i in turned
        ],
        "elsewhere": int((matched[turned] >= TURNED).sum()),
        "rate_changed_twofold": int((change >= 1).sum()),
        "cosine": {"same_index": _distribution(same[both]), "matched": _distribution(matched[both])},
    }


def _different_widths(
    before: np.ndarray, after: np.ndarray, lives_a: np.ndarray, lives_b: np.ndarray
) -> dict[str, Any]:
    """Indices name nothing in common: each side's latents and the best match on the other side."""
    import numpy as np

    there, _ = best_matches(before, after, np.flatnonzero(lives_a))
    back, _ = best_matches(after, before, np.flatnonzero(lives_b))
    return {
        "latents": [len(before), len(after)],
        "live": [int(lives_a.sum()), int(lives_b.sum())],
        "cosine": {"a_in_b": _distribution(there), "b_in_a": _distribution(back)},
    }


def best_matches(
    before: np.ndarray, after: np.ndarray, rows: np.ndarray, block_bytes: int = BLOCK_BYTES
) -> tuple[np.ndarray, np.ndarray]:
    """(cosine, index) of the row of `after` nearest to each of `rows` of `before`; both have rows of unit norm."""
    import numpy as np

    cosine, index = np.empty(len(rows), np.float32), np.empty(len(rows), np.int64)
    block = max(1, block_bytes // (4 * len(after)))
    for start in range(0, len(rows), block):
        chosen = slice(start, start + block)
        cosines = before[rows[chosen]] @ after.T
        index[chosen] = cosines.argmax(axis=1)
        cosine[chosen] = np.take_along_axis(cosines, index[chosen][:, None], axis=1)[:, 0]
    return cosine, index


def _decoder(sae: ComparedSae) -> np.ndarray:
    """W_dec with rows of unit norm [d_sae, d_out]; a row of zeros stays one."""
    import numpy as np
    from safetensors import safe_open

    try:
        with safe_open(sae.folder / "sae_weights.safetensors", "np") as file:
            rows = np.asarray(file.get_tensor("W_dec"), np.float32)
    except Exception as error:
        raise CompareError(f"{sae.folder} holds no readable SAE: {error}") from None
    return rows / np.maximum(np.sqrt(np.einsum("ij,ij->i", rows, rows)), 1e-12)[:, None]


def _rates(sae: ComparedSae, d_sae: int) -> np.ndarray:
    """Firing rate of each latent; 1 where there is no sparsity.safetensors, so that all count as living."""
    import numpy as np

    from trainer.snapshot import read_sparsity

    if not (sae.folder / "sparsity.safetensors").is_file():
        return np.ones(d_sae)
    return 10.0 ** read_sparsity(sae.folder).astype(np.float64)


def _by_rate(latents: np.ndarray, rate: np.ndarray) -> list[int]:
    """The most frequent first."""
    return [int(latent) for latent in latents[(-rate[latents]).argsort(kind="stable")]]


def _distribution(cosines: np.ndarray) -> dict[str, Any]:
    import numpy as np

    counts, _ = np.histogram(np.clip(cosines, -1, 1), EDGES)
    middle = np.percentile(cosines, [10, 50, 90]) if len(cosines) else [math.nan] * 3
    return {
        "mean": _round(cosines.mean()) if len(cosines) else None,
        **{name: _round(value) for name, value in zip(("p10", "median", "p90"), middle, strict=True)},
        "edges": list(EDGES),
        "counts": counts.tolist(),
    }


def _round(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None


# --- The command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """`python -m monitor compare`: 0 compared, 2 wrong usage, such as a folder that holds no SAE."""
    parser = argparse.ArgumentParser(
        prog=shell_command("monitor", "compare"),
        description="Show what changed between two snapshots: numbers, and latents that were born, died or turned.",
    )
    for name, which in (("A", "before"), ("B", "after")):
        parser.add_argument(name, type=path_argument, help=f"folder of a snapshot, or of an SAE in one: {which}")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for scripts")
    complete(parser, arguments)
    given = parser.parse_args(arguments)
    os.nice(NICE)
    try:
        told = compare(given.A, given.B)
    except CompareError as error:
        print(error, file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(told, indent=1, allow_nan=False))
    else:
        show(told)
    return 0


def show(told: dict[str, Any]) -> None:
    """Tables for people."""
    from rich.console import Console

    console = Console(highlight=False)
    for name, sae in told["saes"].items():
        console.print(f"\n[bold]{name}[/]   A {told['a']}\n{' ' * len(name)}   B {told['b']}", soft_wrap=True)
        if sae["numbers"]:
            console.print(_numbers_table(sae["numbers"]))
        latents = sae["latents"]
        if "incomparable" in latents:
            console.print(f"No latent is compared: {latents['incomparable']}.")
            continue
        for line in _sentences(latents):
            console.print(line)
        console.print(_histogram(latents["cosine"]))
    for side, names in (("A", told["only_a"]), ("B", told["only_b"])):
        if names:
            console.print(f"In {side} alone: {', '.join(names)}.")


def _numbers_table(numbers: dict[str, list[float | None]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("")
    for name in ("A", "B", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, (a, b) in numbers.items():
        if a != b:
            change = "" if a is None or b is None else _colored(_number(b - a, "+"), b - a, _better(name))
            table.add_row(name, _number(a), _number(b), change)
    return table


def _better(name: str) -> Better | None:
    """Which direction of a number of the table is good; None where neither is, or nobody says."""
    names = [measure for measure in MEASURES if name in (measure.name, f"held-out {measure.name}")]
    return names[0].better if names else None


def _colored(text: str, change: float, better: Better | None) -> str:
    if better is None:
        return text
    return f"[{'green' if (change > 0) == (better is Better.HIGHER) else 'red'}]{text}[/]"


def _number(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return format(value, f"{sign},") if isinstance(value, int) else format(value, f"{sign}.4g")


def _sentences(latents: dict[str, Any]) -> list[str]:
    a, b = latents["live"]
    if "turned" not in latents:
        width_a, width_b = latents["latents"]
        return [
            f"{width_a:,} latents in A, {width_b:,} in B, of which {a:,} and {b:,} fire. Indices name nothing in "
            "common: each latent is compared with its best match on the other side."
        ]
    turned, born, died = latents["turned"], latents["born"], latents["died"]
    both = sum(latents["cosine"]["same_index"]["counts"])
    examples = [f"{row['latent']} ({row['cosine']:.2f})" for row in turned[:EXAMPLES]]
    return [
        f"{latents['latents']:,} latents; {a:,} fire in A, {b:,} in B, {both:,} in both.",
        f"born    {len(born):,}{_some(born)}",
        f"died    {len(died):,}{_some(died)}",
        f"turned  {len(turned):,} by more than 45°{_some(examples, len(turned))}",
        f"        {latents['elsewhere']:,} of these are at another index of B",
        f"rate    {latents['rate_changed_twofold']:,} fire at least twice or at most half as often",
    ]


def _some(latents: list[Any], count: int | None = None) -> str:
    more = "" if (count or len(latents)) <= EXAMPLES else ", …"
    return f": {', '.join(map(str, latents[:EXAMPLES]))}{more}" if latents else ""


def _histogram(cosine: dict[str, dict[str, Any]]) -> Table:
    """Latents per cosine of decoder rows, one column for each way to match."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("cosine", no_wrap=True)
    for way in cosine:
        table.add_column(_WAYS[way], justify="right", no_wrap=True)
        table.add_column("", width=BAR, no_wrap=True)
    for index in reversed(range(len(EDGES) - 1)):
        row = [f"{EDGES[index]:.2f} to {EDGES[index + 1]:.2f}"]
        for told in cosine.values():
            count, most = told["counts"][index], max(told["counts"]) or 1
            row += [f"{count:,}", f"[cyan]{'█' * round(BAR * count / most)}[/]"]
        table.add_row(*row)
    table.add_section()
    for name in ("mean", "median"):
        row = [name]
        for told in cosine.values():
            row += ["-" if told[name] is None else f"{told[name]:.3f}", ""]
        table.add_row(*row)
    return table


_WAYS = {"same_index": "same index", "matched": "best match", "a_in_b": "of A in B", "b_in_a": "of B in A"}
