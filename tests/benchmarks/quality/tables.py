"""What was measured, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from tests.benchmarks.quality.bench import choice_fvu, like
from tests.benchmarks.quality.cells import FRONTIER, LONGER, SEEDS, SHORT_TOKENS, SIZES, Cell, short_cells
from tests.benchmarks.quality.rule import groups
from trainer.defaults import default_learning_rate

Results = Mapping[str, dict[str, Any]]

NAMES = {
    "ours": "**Sluice**",
    "saelens": "SAELens",
    "dictionary_learning": "dictionary_learning",
    "sparsify": "sparsify",
}
ARCHITECTURES = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}
COLUMNS: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "FVU": lambda rs: _spread(rs, "fvu", "{:.4f}"),
    "L0": lambda rs: _spread(rs, "l0", "{:.1f}"),
    "silent, 20k rows": lambda rs: _spread(rs, "silent_20k", "{:.1%}", False),
    "silent, all rows": lambda rs: _spread(rs, "silent", "{:.1%}", False),
    "ΔCE": lambda rs: _spread(rs, "ce_delta", "{:.4f}"),
    "CE recovered": lambda rs: _spread(rs, "ce_recovered", "{:.4f}", False),
    "s": lambda rs: _spread(rs, "seconds", "{:.0f}", False),
}


def tables(results: Results, best: Mapping[str, Sequence[Cell]]) -> str:
    """Of each subject: seeds at the best rate, rates, the frontier, the longer run, and the search; then the rule.

    Nothing is said of what was not run.
    """
    parts = [
        table(subject, results, cells)
        for subject, cells in best.items()
        for table in (_seeds, _rates, _short, _frontier, _longer, _search)
    ]
    return "\n\n".join(filter(None, [*parts, _rule(results)]))


def _seeds(subject: str, results: Results, best: Sequence[Cell]) -> str:
    rows = []
    for cell in best:
        by_seed = _results_of(results, (cell.but(seed=seed) for seed in SEEDS))
        if by_seed:
            rows.append([*_labels(cell), f"{cell.rate:g}", str(len(by_seed)), *_columns_of(by_seed)])
    return _table(
        f"{subject}: L0 32, best rate; mean ± deviation over seeds", ["trainer", "", "rate", "seeds", *COLUMNS], rows
    )


def _rates(subject: str, results: Results, best: Sequence[Cell]) -> str:
    by_contender = {cell.contender: like(results, cell) for cell in best}
    rates = sorted({rate for by_rate in by_contender.values() for rate in by_rate})
    rows = []
    for cell in best:
        if not by_contender[cell.contender]:
            continue
        at_rates = (by_contender[cell.contender].get(rate) for rate in rates)
        rows.append(
            [*_labels(cell), *(f"{_reported(r, 'fvu'):.4f} ({r['silent']:.1%})" if r else "" for r in at_rates)]
        )
    return _table(
        f"{subject}: FVU (silent) by learning rate; one seed", ["trainer", "", *(f"{rate:g}" for rate in rates)], rows
    )


def _short(subject: str, results: Results, best: Sequence[Cell]) -> str:
    """All contenders on few tokens: FVU, L0 and silent latents by rate."""
    cells = [cell for cell in short_cells(subject) if cell.name in results]
    rates = sorted({cell.rate for cell in cells})
    rows = []
    for labels in dict.fromkeys(tuple(_labels(cell)) for cell in cells):
        by_rate = {cell.rate: results[cell.name] for cell in cells if tuple(_labels(cell)) == labels}
        rows.append([*labels, *(_fvu_and_l0(by_rate[rate]) if rate in by_rate else "" for rate in rates)])
    head = ["trainer", "", *(f"{rate:g}" for rate in rates)]
    return _table(f"{subject}, {SHORT_TOKENS:,} tokens: FVU (silent; L0) by learning rate; one seed", head, rows)


def _fvu_and_l0(result: Mapping[str, Any]) -> str:
    return f"{_reported(result, 'fvu'):.4f} ({result['silent']:.1%}; {result['l0']:.1f})"


def _search(subject: str, results: Results, best: Sequence[Cell]) -> str:
    """Every other cell at the standard L0 and tokens: what the contenders' settings were chosen from."""
    other_names = {_name(result) for cell in best for result in like(results, cell).values()}
    standard = Cell("", "", 0.0, subject=subject, **SIZES[subject])
    rows = []
    for result in sorted(results.values(), key=_order):
        cell = Cell(**result["cell"])
        if _name(result) in other_names or cell.seed:
            continue
        if any(getattr(cell, name) != getattr(standard, name) for name in ("subject", "k", "tokens", "d_sae")):
            continue
        settings = [f"dead after {cell.dead_tokens:,}"] + ["float32"] * (not cell.autocast)
        settings += [f"{name} {value}" for name, value in cell.options.items()]
        rows.append([*_labels(cell), f"{cell.rate:g}", ", ".join(settings), *_columns_of([result])])
    return _table(f"{subject}: search; one seed", ["trainer", "", "rate", "settings", *COLUMNS], rows)


def _frontier(subject: str, results: Results, best: Sequence[Cell]) -> str:
    rows = []
    for cell in best:
        by_k = {k: _results_of(results, [cell.but(k=k)]) for k in FRONTIER}
        if sum(map(bool, by_k.values())) > 1:
            entries = (
                f"{r[0]['l0']:.1f}: {_reported(r[0], 'fvu'):.4f}, {_reported(r[0], 'ce_delta'):.4f}" if r else ""
                for r in by_k.values()
            )
            rows.append([*_labels(cell), *entries])
    return _table(f"{subject}: L0: FVU, ΔCE; one seed", ["trainer", "", *(f"k = {k}" for k in FRONTIER)], rows)


def _longer(subject: str, results: Results, best: Sequence[Cell]) -> str:
    rows = []
    for cell in best:
        if finished_cells := _results_of(results, [cell.but(tokens=LONGER * cell.tokens)]):
            rows.append([*_labels(cell), f"{cell.rate:g}", *_columns_of(finished_cells)])
    title = f"{subject}: {LONGER * SIZES[subject]['tokens']:,} tokens, one seed"
    return _table(title, ["trainer", "", "rate", *COLUMNS], rows)


def _rule(results: Results) -> str:
    """Validation FVU of our TopK by rate, for each number of tokens and latents, beside the default rate's."""
    rows = []
    for group in groups(results):
        cells = "; ".join(f"{rate:.2g}: {choice_fvu(r):.4f} ({r['silent']:.1%})" for rate, r in group.by_rate.items())
        default = default_learning_rate(group.d_sae, group.tokens)
        excess = group.excess(default)
        rows.append(
            [
                *(group.subject, f"{group.tokens:,}", f"{group.d_sae:,}", cells, f"{group.best_rate:.2g}"),
                *(f"{default:.2g}", "" if excess is None else f"{excess:+.1%}"),
            ]
        )
    head = ["model", "tokens", "latents", "rate: FVU (silent)", "best", "default", "FVU at the default"]
    return _table("TopK, L0 32, by learning rate, one seed, validation", head, rows)


def _name(result: Mapping[str, Any]) -> str:
    return Cell(**result["cell"]).name


def _order(result: Mapping[str, Any]) -> tuple[int, int, float, str]:
    cell = Cell(**result["cell"])
    return list(ARCHITECTURES).index(cell.architecture), list(NAMES).index(cell.library), cell.rate, cell.name


def _columns_of(results: Sequence[dict[str, Any]]) -> list[str]:
    return [column(results) for column in COLUMNS.values()]


def _labels(cell: Cell) -> list[str]:
    return [NAMES[cell.library], ARCHITECTURES[cell.architecture]]


def _results_of(results: Results, cells: Iterable[Cell]) -> list[dict[str, Any]]:
    return [results[cell.name] for cell in cells if cell.name in results]


def _reported(result: Mapping[str, Any], name: str) -> float:
    """The number of the test part, or of all held-out rows where there is none of the test part."""
    value: float = result.get("test", {}).get(name, result.get(name, math.nan))
    return value


def _spread(results: Sequence[dict[str, Any]], name: str, form: str, deviation: bool = True) -> str:
    values = [_reported(result, name) for result in results]
    if any(map(math.isnan, values)):
        return ""
    average = form.format(mean(values))
    return f"{average} ± {form.format(stdev(values))}" if deviation and len(values) > 1 else average


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return f"{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
