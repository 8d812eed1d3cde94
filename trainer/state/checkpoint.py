"""Checkpoints on disk, each written whole or not at all; a run goes on from the newest complete one.

    checkpoint/000001234567-000042/      tokens trained, number of the checkpoint
        state.safetensors                       every tensor: weights, moments, statistics, trained bits
        state.json                              everything else: ledger, counters, random states, scales
        complete.json                           written last: sizes and sha256 of the two

The contents of the two files are defined in `format`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from producer.common.parsing import read_object
from trainer.snapshot import SnapshotError, file_sha256, is_pinned, read_manifest, snapshot_names
from trainer.state.durable import new_folder, remove_folder, sweep
from trainer.state.format import (
    Checkpoint,
    UnknownVersion,
    decode_document,
    decode_tensors,
    encode_document,
    encode_tensors,
)

NAME = re.compile(r"\d{12,}-\d{6,}")
DOCUMENT, TENSORS = "state.json", "state.safetensors"
FILES = (DOCUMENT, TENSORS)


class CheckpointError(ValueError):
    """A checkpoint cannot be used for this run. The message says what to do."""


def save(run_directory: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint and removes the oldest beyond `keep`. Returns its folder."""
    folder = run_directory / "checkpoint"
    number = 1 + max((int(path.name.split("-")[1]) for path in complete_folders(folder)), default=0)
    final = folder / f"{checkpoint.tokens:012d}-{number:06d}"
    tensors = {
        key: (torch.from_numpy(value) if isinstance(value, np.ndarray) else value).contiguous()
        for key, value in encode_tensors(checkpoint.tensors).items()
    }
    with new_folder(final) as temporary:
        save_file(tensors, temporary / TENSORS)
        (temporary / DOCUMENT).write_text(json.dumps(encode_document(checkpoint.document)))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(temporary.iterdir())
        }
        (temporary / "complete.json").write_text(json.dumps(files))
    for old in complete_folders(folder)[:-keep]:
        remove_folder(old)
    return final


def load_newest(run_directory: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None for a new run.

    Raises CheckpointError when it is damaged or of a format that this version does not read.
    """
    folder = run_directory / "checkpoint"
    sweep(folder)
    folders = complete_folders(folder)
    return read(folders[-1]) if folders else None


def read(folder: Path) -> Checkpoint:
    """One complete checkpoint. Raises CheckpointError when it is damaged or of a format this version does not read."""
    if damage := _damage(folder):
        raise CheckpointError(f"{damage}: {_remedy(folder)}")
    try:
        document = decode_document(read_object(folder / DOCUMENT))
        return Checkpoint(document, decode_tensors(load_file(folder / TENSORS), document))
    except UnknownVersion as error:
        raise CheckpointError(
            f"{folder} {error}: resume with the version that wrote it, or start a new run directory"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}): {_remedy(folder)}") from None


def _remedy(folder: Path) -> str:
    """Advice about a checkpoint that cannot be used."""
    earlier = complete_folders(folder.parent)
    if len(earlier) > 1 and earlier[0] != folder:
        return f"remove {folder} to resume from the checkpoint before it"
    return "there is none before it: bring it back from a backup, or use a new run.directory"


def _damage(folder: Path) -> str | None:
    """Why the files of a checkpoint are not those that were written, or None."""
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


def complete_folders(folder: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first, by their number: tokens may fall back when a run is resumed."""
    folders = [path for path in folder.glob("*-*") if NAME.fullmatch(path.name) and (path / "complete.json").is_file()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def start_fault(run_directory: Path, saved: Checkpoint | None) -> str | None:
    """Why a trainer must not start here from `saved`, its newest checkpoint, and what to do; None when it may.

    A run without a checkpoint begins anew, and must not do so among the files of another one. A snapshot is published
    only when there is a checkpoint: where there are snapshots and no checkpoint, it was lost.
    """
    names = snapshot_names(run_directory)
    if saved is not None:
        return _other_run(run_directory, names, saved.document.ledger.run)
    folder = run_directory / "checkpoint"
    contents = [f"{len(names)} snapshots, {names[0]} to {names[-1]}"] if names else []
    contents += ["summary.json"] if (run_directory / "summary.json").exists() else []
    if folder.exists() and not folder.is_dir():
        contents.append("a file where the folder checkpoint should be")
    elif torn := [path.name for path in folder.glob("*-*") if NAME.fullmatch(path.name)]:
        contents.append(f"checkpoint {max(torn)} without its complete.json")
    if not contents:
        return None
    return (
        f"{run_directory} holds {' and '.join(contents)}, and no checkpoint to go on from: training would begin anew "
        "among them. Bring the folder checkpoint back from a backup, choose another run.directory, or move what is "
        f"there away: mv {run_directory} {run_directory}.old"
    )


def _other_run(run_directory: Path, names: list[str], run: str) -> str | None:
    """Why snapshots and checkpoint do not belong together."""
    folder = run_directory / "snapshots"
    for name in reversed([name for name in names if not is_pinned(folder / name)]):
        try:
            other = read_manifest(folder / name)["run"]["id"]
        except (SnapshotError, LookupError, TypeError):
            continue  # `check` reports it
        if other == run:
            return None
        return (
            f"{run_directory} holds the checkpoint of run {run} and snapshots of run {other}, such as {name}: put the "
            "checkpoint into a run directory of its own, or bring back the one that belongs here"
        )
    return None
