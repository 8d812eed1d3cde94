"""What a run directory tells, read while the trainer writes to it. Light: JSON, TOML and the snapshots' contract.

Every file may be missing, and a snapshot may be retired between two lines of code; what is absent is None, never an
error. What a link leads to outside of the run directory, or of a snapshot, counts as absent.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from monitor.evaluation.results import EVALUATION, Evaluation
from monitor.files import read_json, read_last_line, read_toml, written_ns
from monitor.snapshot_index import index_of, manifest_of
from trainer.saes.hooks import SaeHooks
from trainer.snapshot import SnapshotError, is_pinned

SILENT_SECONDS = 120.0
"""A report older than this tells how it was, not how it is."""
LATENTS = "latents.safetensors"
"""Activations of an SAE's latents on held-out text (`monitor.evaluation.latents`), beside it in its snapshot."""


class NotThere(LookupError):
    """What was asked for does not exist (yet); `str(error)` says what does."""


def why_not_ready(run_directory: Path) -> str | None:
    """What is missing before there is a run to show; None when nothing is."""
    if not run_directory.is_dir():
        return f"run directory {run_directory} does not exist yet; the trainer creates it"
    if not (run_directory / "settings.toml").is_file():
        return f"{run_directory} holds no settings.toml yet; the trainer writes it when it starts"
    return None


def read_run(run_directory: Path) -> dict[str, Any]:
    """The run as it stands: state (waiting, running, finished), settings, newest report, summary, newest snapshot.

    `silent_seconds` is the newest report's age: a trainer that was killed says nothing, nor does one that waits.
    """
    # The summary comes after the last snapshot: asked in this order, a finished run shows it.
    state = "finished" if is_finished(run_directory) else "waiting" if why_not_ready(run_directory) else "running"
    summary, report = read_json(run_directory / "summary.json", run_directory), last_report(run_directory)
    names = index_of(run_directory).names()
    return {
        "directory": run_directory.name,
        "state": state,
        "latest": names[-1] if names else None,
        "settings": read_toml(run_directory / "settings.toml", run_directory),
        "report": report,
        "silent_seconds": None if report is None or "time" not in report else max(0.0, time.time() - report["time"]),
        "summary": summary,
    }


def is_finished(run_directory: Path) -> bool:
    """True once the summary is there; a run that was extended keeps the old one, so later reports overrule it."""
    summary, report = read_json(run_directory / "summary.json", run_directory), last_report(run_directory)
    return summary is not None and (report is None or report.get("tokens", 0) <= summary.get("tokens", 0))


def is_training(run_directory: Path) -> bool:
    """True while a trainer reports, and for a while after it has fallen silent."""
    report = last_report(run_directory)
    recent = report is not None and time.time() - report.get("time", 0.0) < SILENT_SECONDS
    return recent and not is_finished(run_directory)


@dataclass(frozen=True)
class SnapshotPage:
    """Some of a run's snapshots: `entries`, oldest first, as the service lists them."""

    entries: list[dict[str, Any]]
    count: int
    """Of all snapshots of the run."""
    older: str | None
    """The name before which the next page ends; None when this page has the oldest."""


def read_page(run_directory: Path, limit: int, before: str | None = None) -> SnapshotPage:
    """The newest `limit` snapshots, or the newest of those that are older than `before`.

    An entry has the SAEs' metrics and evaluations but not the settings. One that has not changed is the same object as
    last time, and is not to be changed by who gets it.
    """
    names = index_of(run_directory).names()
    end = len(names) if before is None else bisect_left(names, before)
    shown = names[max(0, end - limit) : end]
    entries = [entry for name in shown if (entry := read_entry(run_directory, name)) is not None]
    return SnapshotPage(entries, len(names), shown[0] if shown and end > limit else None)


def read_entry(run_directory: Path, name: str) -> dict[str, Any] | None:
    """One snapshot of the list; None when it is gone or cannot be read."""
    folder = run_directory / "snapshots" / name
    try:
        evaluated = [written_ns(folder / sae / EVALUATION) for sae in manifest_of(folder)["saes"]]
        return _entry(folder, written_ns(folder / "manifest.json"), tuple(evaluated), is_pinned(folder))
    except SnapshotError:
        return None


def newest_evaluations(run_directory: Path) -> dict[str, Evaluation]:
    """The newest evaluation of each SAE of the newest snapshot, from whichever snapshot it is."""
    evaluations = {}
    for sae in _newest_saes(run_directory):
        name = index_of(run_directory).newest_with(sae, EVALUATION)
        entry = read_entry(run_directory, name) if name else None
        if entry is not None and (document := entry["saes"][sae]["evaluation"]):
            evaluations[sae] = replace(Evaluation.from_json(document), snapshot_tokens=entry["tokens"])
    return evaluations


def snapshots_with(run_directory: Path, sae: str, after: str = "") -> list[str]:
    """The snapshots beyond `after` that hold this SAE, oldest first.

    What no manifest names is in none, whatever its path leads to.
    """
    names = index_of(run_directory).names()
    found = []
    for name in names[bisect_right(names, after) :]:
        with suppress(SnapshotError):  # retired a moment ago
            if sae in manifest_of(run_directory / "snapshots" / name)["saes"]:
                found.append(name)
    return found


def first_to(run_directory: Path, sae: str, last: str) -> list[str]:
    """The snapshots from the first that holds this SAE to the one called `last`, which does.

    An SAE is in all snapshots from its first to its last, so that a few manifests tell which is the first.
    """
    names = index_of(run_directory).names()
    names = names[: bisect_right(names, last)]

    def holds(name: str) -> bool:
        with suppress(SnapshotError):
            return sae in manifest_of(run_directory / "snapshots" / name)["saes"]
        return False  # retired a moment ago, as the oldest are

    return names[bisect_left(names, True, key=holds) :]


def explained_in(run_directory: Path, sae: str) -> str | None:
    """The newest snapshot in which this SAE's latents have been looked at."""
    return index_of(run_directory).newest_with(sae, LATENTS)


def is_explained(run_directory: Path, name: str, sae: str) -> bool:
    """Whether they have been in the snapshot called `name`."""
    return name in index_of(run_directory).names() and index_of(run_directory).has(name, sae, LATENTS)


def explained_saes(run_directory: Path) -> list[dict[str, Any]]:
    """The SAEs of the newest snapshot, each with the `snapshot` in which its latents can be read, None without one."""
    return [{"name": sae, "snapshot": explained_in(run_directory, sae)} for sae in _newest_saes(run_directory)]


def _newest_saes(run_directory: Path) -> list[str]:
    names = index_of(run_directory).names()
    try:
        return [*manifest_of(run_directory / "snapshots" / names[-1])["saes"]] if names else []
    except SnapshotError:
        return []  # retired a moment ago


@lru_cache(maxsize=1024)
def _entry(folder: Path, written_ns: int, evaluated_ns: tuple[int, ...], pinned: bool) -> dict[str, Any]:
    """One snapshot of the list, made once for as long as none of its files changes."""
    manifest = manifest_of(folder)
    saes = {
        sae: {"metrics": metrics, "evaluation": read_json(folder / sae / EVALUATION, folder)}
        for sae, metrics in manifest["saes"].items()
    }
    return {
        "name": manifest["name"],
        "tokens": manifest["tokens"],
        "created": manifest["created"],
        "pinned": pinned,
        "bytes": sum(entry["bytes"] for entry in manifest["files"]),
        "files": [entry["path"] for entry in manifest["files"]],
        "saes": saes,
    }


def hooks_of(record: Mapping[str, Any]) -> str | None:
    """The hooks of an SAE in words, from its numbers in a manifest or summary; see `SaeHooks`."""
    return str(SaeHooks.from_record(record)) or None


def last_report(run_directory: Path) -> dict[str, Any] | None:
    """The newest report of the trainer."""
    return read_last_line(run_directory / "metrics.jsonl", run_directory)
