"""The contents of a run directory, read while the trainer writes to it. Light: JSON, TOML and the snapshots' contract.

Every file may be missing, and a snapshot may be retired at any moment; what is absent is None, never an error. The
target of a link that leads out of the run directory, or of a snapshot, counts as absent.
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
"""A report older than this says nothing about the present."""
LATENTS = "latents.safetensors"
"""Activations of an SAE's latents on held-out text (`monitor.evaluation.latents`), beside it in its snapshot."""


class NotFoundError(LookupError):
    """The snapshot, SAE or latent does not exist (yet); `str(error)` says what does."""


def why_not_ready(run_directory: Path) -> str | None:
    """The part that is missing before there is a run to show; None when nothing is."""
    if not run_directory.is_dir():
        return f"run directory {run_directory} does not exist yet; the trainer creates it"
    if not (run_directory / "settings.toml").is_file():
        return f"{run_directory} holds no settings.toml yet; the trainer writes it when it starts"
    return None


def read_run(run_directory: Path) -> dict[str, Any]:
    """The JSON of /v1/run: state (waiting, running, finished), settings, newest report, summary, newest snapshot.

    `silent_seconds` is the newest report's age: a trainer that was killed, or waits, reports nothing.
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
    """Whether the summary is there; a run that was extended keeps the old one, so later reports overrule it."""
    summary, report = read_json(run_directory / "summary.json", run_directory), last_report(run_directory)
    return summary is not None and (report is None or report.get("tokens", 0) <= summary.get("tokens", 0))


def is_training(run_directory: Path) -> bool:
    """Whether a trainer reports, or has done so in the last SILENT_SECONDS."""
    report = last_report(run_directory)
    is_recent = report is not None and time.time() - report.get("time", 0.0) < SILENT_SECONDS
    return is_recent and not is_finished(run_directory)


@dataclass(frozen=True)
class SaeNumbers:
    """One SAE of a snapshot."""

    metrics: dict[str, Any]
    """Its numbers in the manifest."""
    evaluation: dict[str, Any] | None
    """The object in its evaluation.json; None until it is evaluated."""


@dataclass(frozen=True)
class SnapshotEntry:
    """One snapshot, without its settings; the names of the fields are the keys in the JSON of /v1/snapshots."""

    name: str
    tokens: int
    created: str
    pinned: bool
    bytes: int
    files: list[str]
    saes: dict[str, SaeNumbers]


@dataclass(frozen=True)
class SnapshotPage:
    """Some of a run's snapshots."""

    entries: list[SnapshotEntry]
    """Oldest first."""
    count: int
    """Number of all snapshots of the run."""
    older: str | None
    """The name before which the next page ends; None when this page has the oldest snapshot."""


def read_page(run_directory: Path, limit: int, before: str | None = None) -> SnapshotPage:
    """The newest `limit` snapshots, or the newest of those that are older than `before`.

    An entry that has not changed is the same object as last time: the caller must not modify it.
    """
    names = index_of(run_directory).names()
    end = len(names) if before is None else bisect_left(names, before)
    page = names[max(0, end - limit) : end]
    entries = [entry for name in page if (entry := read_entry(run_directory, name)) is not None]
    return SnapshotPage(entries, len(names), page[0] if page and end > limit else None)


def read_entry(run_directory: Path, name: str) -> SnapshotEntry | None:
    """One snapshot; None when it is gone or cannot be read."""
    folder = run_directory / "snapshots" / name
    try:
        evaluation_times = [written_ns(folder / sae / EVALUATION) for sae in manifest_of(folder).saes]
        return _entry(folder, written_ns(folder / "manifest.json"), tuple(evaluation_times), is_pinned(folder))
    except SnapshotError:
        return None


def newest_evaluations(run_directory: Path) -> dict[str, Evaluation]:
    """The newest evaluation of each SAE of the newest snapshot, from whichever snapshot it is."""
    evaluations = {}
    for sae in _newest_saes(run_directory):
        name = index_of(run_directory).newest_with(sae, EVALUATION)
        entry = read_entry(run_directory, name) if name else None
        if entry is not None and (document := entry.saes[sae].evaluation):
            evaluations[sae] = replace(Evaluation.from_json(document), snapshot_tokens=entry.tokens)
    return evaluations


def snapshots_with(run_directory: Path, sae: str, after: str = "") -> list[str]:
    """The snapshots beyond `after` whose manifest names this SAE, oldest first."""
    names = index_of(run_directory).names()
    return [name for name in names[bisect_right(names, after) :] if _holds(run_directory, name, sae)]


def snapshots_until(run_directory: Path, sae: str, last: str) -> list[str]:
    """The snapshots from the first that holds this SAE to the one called `last`, which does.

    An SAE is in all snapshots from its first to its last, so a binary search over the manifests finds the first.
    """
    names = index_of(run_directory).names()
    names = names[: bisect_right(names, last)]
    return names[bisect_left(names, True, key=lambda name: _holds(run_directory, name, sae)) :]


def _holds(run_directory: Path, name: str, sae: str) -> bool:
    with suppress(SnapshotError):
        return sae in manifest_of(run_directory / "snapshots" / name).saes
    return False  # retired a moment ago


def newest_with_latents(run_directory: Path, sae: str) -> str | None:
    """The newest snapshot that has the activations of this SAE's latents."""
    return index_of(run_directory).newest_with(sae, LATENTS)


def has_latents(run_directory: Path, name: str, sae: str) -> bool:
    """Whether the snapshot called `name` has the activations of this SAE's latents."""
    return name in index_of(run_directory).names() and index_of(run_directory).has(name, sae, LATENTS)


def saes_with_latents(run_directory: Path) -> list[dict[str, Any]]:
    """The JSON of /v1/latents: each SAE of the newest snapshot, and the newest `snapshot` with its latents."""
    return [{"name": sae, "snapshot": newest_with_latents(run_directory, sae)} for sae in _newest_saes(run_directory)]


def _newest_saes(run_directory: Path) -> list[str]:
    names = index_of(run_directory).names()
    try:
        return [*manifest_of(run_directory / "snapshots" / names[-1]).saes] if names else []
    except SnapshotError:
        return []  # retired a moment ago


@lru_cache(maxsize=1024)
def _entry(folder: Path, written_ns: int, evaluations_ns: tuple[int, ...], pinned: bool) -> SnapshotEntry:
    """One snapshot, cached for as long as none of its files changes."""
    manifest = manifest_of(folder)
    return SnapshotEntry(
        name=manifest.name,
        tokens=manifest.tokens,
        created=manifest.created,
        pinned=pinned,
        bytes=sum(file.bytes for file in manifest.files),
        files=[file.path for file in manifest.files],
        saes={
            sae: SaeNumbers(metrics, read_json(folder / sae / EVALUATION, folder))
            for sae, metrics in manifest.saes.items()
        },
    )


def hooks_of(record: Mapping[str, Any]) -> str | None:
    """The hooks of an SAE in words, from its numbers in a manifest or summary; see `SaeHooks`."""
    return str(SaeHooks.from_record(record)) or None


def last_report(run_directory: Path) -> dict[str, Any] | None:
    """The newest report of the trainer."""
    return read_last_line(run_directory / "metrics.jsonl", run_directory)
