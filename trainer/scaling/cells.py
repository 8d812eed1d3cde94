"""The SAEs of a grid, as a run directory has them: sizes, losses on held-out text, losses by tokens.

A grid is the largest set of SAEs in a snapshot whose settings differ in nothing but d_sae, k and what a cell may have
of its own. Whether one [[sae]] table stood for them does not matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from producer.common.parsing import ParseError, parse_object, read_object
from trainer.snapshot import Manifest, SnapshotError, describe_names, read_manifest, snapshot_names

OWN_KEYS = frozenset({"name", "d_sae", "k", "seed", "learning_rate"})
"""Settings in which the cells of a grid may differ."""
CONSTANT_RATE = 0.999
"""Of the largest learning rate; reports with less are of the warm-up or the cooldown."""


class GridError(ValueError):
    """The run has no grid that can be fitted. The message says why, and what to do."""


@dataclass(frozen=True)
class Cell:
    """One SAE of the grid."""

    name: str
    d_sae: int
    k: int
    loss: float
    """FVU: squared error as a fraction of that of the mean."""
    curve: tuple[tuple[int, float], ...]
    """(its tokens, FVU of a batch) at the constant learning rate."""


@dataclass(frozen=True)
class Omission:
    """An SAE of the grid that is left out."""

    name: str
    reason: str


@dataclass(frozen=True)
class Grid:
    """The cells of one snapshot."""

    snapshot: str
    tokens: int
    """Tokens that each cell has trained on."""
    architecture: str
    measured: Literal["held-out", "training"]
    """Where the losses are from."""
    cells: tuple[Cell, ...]
    omissions: tuple[Omission, ...]


def read_grid(directory: Path, snapshot: str | None = None, pattern: str = "*") -> Grid:
    """The grid of a run at its end, or at one of its snapshots. Raises GridError."""
    manifest = _read_snapshot(directory, snapshot)
    tables = _largest_grid(manifest, pattern)
    tokens = max(manifest.saes[name]["tokens"] for name in tables if name in manifest.saes)
    omissions = [*_omissions(manifest, tables, tokens), *_detached(directory, manifest, tables, pattern)]
    names = [name for name in tables if name not in {omission.name for omission in omissions}]
    losses, measured = _losses(directory, manifest, names)
    curves = _curves(directory, set(names), tokens)
    return Grid(
        snapshot=manifest.name,
        tokens=tokens,
        architecture=tables[names[0]]["architecture"],
        measured=measured,
        cells=tuple(
            Cell(name, tables[name]["d_sae"], tables[name]["k"], losses[name], tuple(curves[name])) for name in names
        ),
        omissions=tuple(omissions),
    )


def _read_snapshot(directory: Path, name: str | None) -> Manifest:
    if not (directory / "settings.toml").is_file():
        raise GridError(f"{directory} holds no settings.toml; name the run's directory, run.directory of its file")
    names = snapshot_names(directory)
    if not names:
        raise GridError(f"{directory} has published no snapshot yet; SAEs are fitted as they are in one")
    if name is None:
        _require_end(directory, names)
    elif name not in names:
        raise GridError(f"no snapshot {name!r} in {directory}; {describe_names(names)}")
    try:
        return read_manifest(directory / "snapshots" / (name or names[-1]))
    except SnapshotError as error:
        raise GridError(str(error)) from None


def _require_end(directory: Path, names: list[str]) -> None:
    """Refuses a run that goes on: its SAEs are in the midst of their schedules."""
    try:
        end = int(read_object(directory / "summary.json").get("tokens", 0))
    except FileNotFoundError:
        end = 0
    except (OSError, ParseError) as error:
        raise GridError(f"{directory}/summary.json cannot be read: {error}") from None
    if end < int(names[-1]) or not end:
        raise GridError(
            f"the run in {directory} has not ended: its SAEs have no cooldown behind them. Wait for its end, or fit "
            f"them as they are in a snapshot, such as --snapshot {names[-1]}"
        )


def _largest_grid(manifest: Manifest, pattern: str) -> dict[str, dict[str, Any]]:
    """Settings by name of the SAEs of the largest grid among those whose name matches."""
    saes = manifest.run.get("settings", {}).get("sae", [])
    tables = [table for table in saes if fnmatchcase(table["name"], pattern)]
    if not tables:
        names = ", ".join(table["name"] for table in saes)
        raise GridError(f"no SAE is named {pattern!r}; there are {names}")
    with_k = [table for table in tables if table.get("k") is not None]
    if not with_k:
        kinds = ", ".join(sorted({table["architecture"] for table in tables}))
        raise GridError(f"the law is of SAEs with a k, and {kinds} has none: train a grid of topk or batchtopk SAEs")
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for table in with_k:
        shared = {key: value for key, value in table.items() if key not in OWN_KEYS}
        groups.setdefault(json.dumps(shared, sort_keys=True), {})[table["name"]] = table
    grid = max(groups.values(), key=len)
    if not any(name in manifest.saes for name in grid):
        raise GridError(f"snapshot {manifest.name} holds none of {', '.join(grid)}")
    if len({table["d_sae"] for table in grid.values()}) < 2:
        raise GridError(
            f"there is no grid: all SAEs with the settings of {next(iter(grid))} have the same d_sae. Train several at "
            "once, such as [[sae]] grid = { d_sae = [512, 1024, 2048, 4096], k = [16, 32, 64] }"
        )
    return grid


def _omissions(manifest: Manifest, tables: Mapping[str, Any], tokens: int) -> Iterator[Omission]:
    for name in tables:
        if name not in manifest.saes:
            yield Omission(name, f"is not in snapshot {manifest.name}")
        elif (own := manifest.saes[name]["tokens"]) < tokens:
            yield Omission(name, f"has trained on {own:,} tokens, the others on {tokens:,}")


def _detached(directory: Path, manifest: Manifest, tables: Mapping[str, Any], pattern: str) -> Iterator[Omission]:
    """Cells that earlier snapshots have and this one has not."""
    omitted = set(tables)
    for name in reversed(snapshot_names(directory)):
        if name >= manifest.name:
            continue
        try:
            earlier = _largest_grid(read_manifest(directory / "snapshots" / name), pattern)
        except (SnapshotError, GridError):
            continue
        for cell in earlier.keys() - omitted - manifest.saes.keys():
            omitted.add(cell)
            yield Omission(cell, f"was detached after {int(name):,} tokens")


def _losses(
    directory: Path, manifest: Manifest, names: list[str]
) -> tuple[dict[str, float], Literal["held-out", "training"]]:
    """FVU by name: on held-out text where the monitor has measured all of them, else as training reported it."""
    held_out = {name: _held_out(directory / "snapshots" / manifest.name / name) for name in names}
    if all(value is not None for value in held_out.values()):
        return {name: value for name, value in held_out.items() if value is not None}, "held-out"
    if any(value is not None for value in held_out.values()):
        missing = ", ".join(name for name, value in held_out.items() if value is None)
        raise GridError(f"not yet evaluated: {missing}. Wait for the monitor; losses of different texts do not compare")
    losses = {name: manifest.saes[name].get("fvu") for name in names}
    reported = {name: float(loss) for name, loss in losses.items() if isinstance(loss, int | float)}
    if unknown := losses.keys() - reported.keys():
        raise GridError(f"the FVU of {', '.join(sorted(unknown))} is unknown in snapshot {manifest.name}")
    return reported, "training"


def _held_out(folder: Path) -> float | None:
    """The FVU on held-out text that the monitor has written beside an SAE."""
    try:
        value = read_object(folder / "evaluation.json", finite=True).get("fvu")
    except (OSError, ParseError):
        return None
    return float(value) if isinstance(value, int | float) else None


def _curves(directory: Path, names: set[str], end: int) -> dict[str, list[tuple[int, float]]]:
    """(tokens, FVU of the last batch) of the reports at each SAE's largest learning rate.

    The FVU that reports name is over a window, which in a short run is much of its past. What a resumed run gave up is
    left out.
    """
    points: list[tuple[int, dict[str, tuple[float, float]]]] = []
    for report in _reports(directory):
        tokens = report.get("tokens") or 0
        while points and points[-1][0] >= tokens:
            points.pop()
        numbers = {
            sae["name"]: (loss, sae["learning_rate"])
            for sae in report.get("saes") or []
            if sae["name"] in names
            and (loss := (sae.get("loss") or {}).get("reconstruction"))
            and sae.get("learning_rate") is not None
        }
        if numbers and tokens <= end:
            points.append((tokens, numbers))
    peaks = {name: max((saes[name][1] for _, saes in points if name in saes), default=0.0) for name in names}
    return {
        name: [
            (tokens, saes[name][0])
            for tokens, saes in points
            if name in saes and saes[name][1] >= CONSTANT_RATE * peaks[name] > 0
        ]
        for name in names
    }


def _reports(directory: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; one that is being written at this moment is left out."""
    try:
        with open(directory / "metrics.jsonl", "rb") as file:
            for line in file:
                try:
                    yield parse_object(line, finite=True)
                except ParseError:
                    continue
    except OSError:
        return
