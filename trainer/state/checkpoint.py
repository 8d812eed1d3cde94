"""PRIVATE: what resuming needs, written whole or not at all; the newest complete one wins.

    checkpoint/000001234567-000042/      tokens trained, number of the checkpoint
        state.safetensors                       every tensor: weights, moments, statistics, trained bits
        state.json                              everything else: ledger, counters, random states, scales
        complete.json                           written last: sizes and sha256 of the two

One checkpoint is one instant: weights and the ledger's trained bits are taken between two steps.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from producer.common.parsing import read_object
from trainer.snapshot import SnapshotError, file_sha256, is_pinned, read_manifest, snapshot_names
from trainer.state.durable import new_folder, remove_folder, sweep

FORMAT = 3
NAME = re.compile(r"\d{12,}-\d{6,}")
FILES = ("state.json", "state.safetensors")

Saved = tuple[dict[str, Any], dict[str, Tensor]]
"""A checkpoint: (plain JSON, tensors)."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used for this run. The message says what to do."""


def save(run_directory: Path, tokens: int, document: dict[str, Any], tensors: dict[str, Tensor], keep: int) -> Path:
    """Writes a checkpoint and removes the oldest beyond `keep`."""
    folder = run_directory / "checkpoint"
    number = 1 + max((int(path.name.split("-")[1]) for path in complete(folder)), default=0)
    final = folder / f"{tokens:012d}-{number:06d}"
    with new_folder(final) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps({"format": FORMAT, **document}))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(temporary.iterdir())
        }
        (temporary / "complete.json").write_text(json.dumps(files))
    for old in complete(folder)[:-keep]:
        remove_folder(old)
    return final


def load_newest(run_directory: Path) -> Saved | None:
    """The newest complete checkpoint, or None for a new run.

    Raises CheckpointError when the newest complete one is damaged or of a format this version does not read.
    """
    folder = run_directory / "checkpoint"
    sweep(folder)
    found = complete(folder)
    return read(found[-1]) if found else None


def read(folder: Path) -> Saved:
    """One complete checkpoint. Raises CheckpointError when it is damaged or of a format this version does not read."""
    if damage := _damage(folder):
        raise CheckpointError(f"{damage}: {_way_out(folder)}")
    try:
        document = read_object(folder / "state.json")
        tensors = load_file(folder / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}): {_way_out(folder)}") from None
    if document.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {document.get('format')!r}, this version reads {FORMAT}: resume with the version "
            "that wrote it, or start a new run directory"
        )
    return document, tensors


def _way_out(folder: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    earlier = complete(folder.parent)
    if len(earlier) > 1 and earlier[0] != folder:
        return f"remove {folder} to resume from the checkpoint before it"
    return "there is none before it: bring it back from a backup, or use a new run.directory"


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        files = read_object(folder / "complete.json")
        for name in FILES:
            path, expected = folder / name, files[name]
            if path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
                return f"{path} is damaged (its sha256 differs)"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (ValueError, LookupError, TypeError):
        return f"{folder / 'complete.json'} is damaged"
    return None


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first, by their number: tokens may fall back when a run is resumed."""
    found = [path for path in folder.glob("*-*") if NAME.fullmatch(path.name) and (path / "complete.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def start_fault(run_directory: Path, saved: Saved | None) -> str | None:
    """Why a trainer must not start here with its newest checkpoint `saved`, and what to do; None when it may.

    A run without a checkpoint begins anew, and must not do so among the work of another one: a snapshot is only
    published when there is a checkpoint, so that whoever finds snapshots and no checkpoint has lost it.
    """
    names = snapshot_names(run_directory)
    if saved is not None:
        return _other_run(run_directory, names, saved[0]["ledger"]["run"])
    folder = run_directory / "checkpoint"
    what = [f"{len(names)} snapshots, {names[0]} to {names[-1]}"] if names else []
    what += ["summary.json"] if (run_directory / "summary.json").exists() else []
    if folder.exists() and not folder.is_dir():
        what.append("a file where the folder checkpoint should be")
    elif torn := [path.name for path in folder.glob("*-*") if NAME.fullmatch(path.name)]:
        what.append(f"checkpoint {max(torn)} without its complete.json")
    if not what:
        return None
    return (
        f"{run_directory} holds {' and '.join(what)}, and no checkpoint to go on from: training would begin anew among "
        "them. Bring the folder checkpoint back from a backup, choose another run.directory, or move what is there "
        f"away: mv {run_directory} {run_directory}.old"
    )


def _other_run(run_directory: Path, names: list[str], run: str) -> str | None:
    """Why snapshots and checkpoint do not belong together."""
    folder = run_directory / "snapshots"
    for name in reversed([name for name in names if not is_pinned(folder / name)]):
        try:
            other = read_manifest(folder / name)["run"]["id"]
        except (SnapshotError, LookupError, TypeError):
            continue  # `check` tells of it
        if other == run:
            return None
        return (
            f"{run_directory} holds the checkpoint of run {run} and snapshots of run {other}, such as {name}: put the "
            "checkpoint into a run directory of its own, or bring back the one that belongs here"
        )
    return None
