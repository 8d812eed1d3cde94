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

from producer.parsing import read_object
from trainer.durable import new_folder, remove_folder, sweep
from trainer.snapshot import file_sha256

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
    if not folder.is_dir():
        return None
    sweep(folder)
    found = complete(folder)
    return read(found[-1]) if found else None


def read(folder: Path) -> Saved:
    """One complete checkpoint. Raises CheckpointError when it is damaged or of a format this version does not read."""
    if damage := _damage(folder):
        raise CheckpointError(f"{damage}: remove {folder} to resume from the checkpoint before it")
    try:
        document = read_object(folder / "state.json")
        tensors = load_file(folder / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be read ({error}): remove it to resume from the one before it"
        ) from None
    if document.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {document.get('format')!r}, this version reads {FORMAT}: resume with the version "
            "that wrote it, or start a new run directory"
        )
    return document, tensors


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
