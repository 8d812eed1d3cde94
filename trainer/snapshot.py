"""CONTRACT: published SAEs on disk, in the layout that SAELens reads. Light: numpy and safetensors, no torch.

    snapshots/000001234567/              named by tokens trained
        <sae name>/cfg.json                     architecture, sizes, provenance under `metadata`
        <sae name>/sae_weights.safetensors      W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_dec [d_out], and per latent
                                                b_enc (, threshold), or b_gate, b_mag, r_mag; transcoders: W_skip
        <sae name>/sparsity.safetensors         log10 firing rate of each latent
        <sae name>/selftest.safetensors         raw activations with the latents and reconstruction they must give
        <sae name>/evaluation.json              added later by the monitor: numbers on held-out text
        <sae name>/latents.safetensors          added later by the monitor: examples and statistics of each latent
        manifest.json                           written last: every file with its size and sha256
        pinned                                  an empty file, present while the snapshot is pinned
    snapshots/LATEST                     the newest complete snapshot's name
    snapshots/superseded/                those beyond the checkpoint that a run was resumed from; readers ignore it

Readers ignore a folder without a manifest. Published SAEs take raw activations: input scale and whitening are folded
in. Decoder rows have unit norm in float32, except in top-k SAEs whose selection of latents that would change.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from producer.common.parsing import ParseError, read_object
from trainer.state.durable import flush, make_folder, move_folder, new_folder, remove_folder, replace_text

FORMAT = 1
NAME = re.compile(r"\d{12,}")
PINNED = "pinned"
SUPERSEDED = "superseded"
SAELENS_LAYOUT = "6.54.12"
"""The SAELens release whose layout is written. SAELens drops provenance without a version in the metadata."""


class SnapshotError(ValueError):
    """A snapshot is incomplete, damaged, or from a format this version does not know."""


@dataclass(frozen=True)
class Export:
    """One SAE ready to be published: inference weights that take raw activations."""

    name: str
    cfg: dict[str, Any]
    """SAELens' cfg.json, its `metadata` included."""
    weights: dict[str, np.ndarray]
    firing_rate: np.ndarray
    """[d_sae], 0 for a latent that never fired."""
    selftest: dict[str, np.ndarray]
    """x [n, d_in], latents [n, d_sae], x_hat [n, d_out]."""
    metrics: dict[str, Any]


@dataclass(frozen=True)
class SnapshotFile:
    """One file of a snapshot."""

    path: str
    """Below the snapshot's folder."""
    bytes: int
    sha256: str
    """In hex."""


@dataclass(frozen=True)
class Manifest:
    """The contents of a snapshot; the names of the fields are the keys of manifest.json, beside `format`."""

    name: str
    tokens: int
    created: str
    """UTC, as ISO 8601."""
    saes: dict[str, dict[str, Any]]
    """Numbers of training, by the name of the SAE."""
    run: dict[str, Any]
    """Facts about the run: id, settings, stream."""
    files: tuple[SnapshotFile, ...]


def snapshot_name(tokens: int) -> str:
    """The name of a snapshot after so many tokens."""
    return f"{tokens:012d}"


def publish(
    run_directory: Path,
    tokens: int,
    exports: list[Export],
    run: dict[str, Any],
    check: Callable[[Path], None],
) -> Path:
    """Writes one snapshot, checks it, and only then makes it visible. Returns its folder.

    `run` describes the run in the manifest (id, settings, stream). `check` is called with each SAE's folder and raises
    SnapshotError when the weights on disk do not compute what those in memory do.
    """
    final = run_directory / "snapshots" / snapshot_name(tokens)
    if is_complete(final):
        replace_text(final.parent / "LATEST", final.name + "\n")
        return final
    shutil.rmtree(final, ignore_errors=True)
    with new_folder(final) as folder:
        for export in exports:
            _write_sae(folder / export.name, export)
            check(folder / export.name)
        manifest = Manifest(
            name=final.name,
            tokens=tokens,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            saes={export.name: export.metrics for export in exports},
            run=run,
            files=tuple(_describe(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()),
        )
        document = {"format": FORMAT, **asdict(manifest)}
        (folder / "manifest.json").write_text(json.dumps(document, indent=1, allow_nan=False))
    replace_text(final.parent / "LATEST", final.name + "\n")
    return final


def _write_sae(folder: Path, export: Export) -> None:
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(export.cfg, indent=1, allow_nan=False))
    save_file(
        {name: np.ascontiguousarray(array) for name, array in export.weights.items()},
        folder / "sae_weights.safetensors",
    )
    with np.errstate(divide="ignore"):
        sparsity = np.log10(export.firing_rate).astype(np.float32)
    save_file({"sparsity": np.maximum(sparsity, -10.0, dtype=np.float32)}, folder / "sparsity.safetensors")
    save_file(
        {name: np.ascontiguousarray(array) for name, array in export.selftest.items()}, folder / "selftest.safetensors"
    )


def _describe(folder: Path, path: Path) -> SnapshotFile:
    return SnapshotFile(path.relative_to(folder).as_posix(), path.stat().st_size, file_sha256(path))


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_complete(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def snapshot_names(run_directory: Path) -> list[str]:
    """Names of the complete snapshots of a run, oldest first. Symbolic links are ignored."""
    folder = run_directory / "snapshots"
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        folders = [entry for entry in entries if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
    return sorted(entry.name for entry in folders if os.path.isfile(f"{entry.path}/manifest.json"))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of one snapshot. Raises SnapshotError when it is missing, unreadable or of another format."""
    try:
        document = read_object(folder / "manifest.json", finite=True)
    except FileNotFoundError:
        raise SnapshotError(f"{folder} holds no manifest.json: it is not a complete snapshot") from None
    except (OSError, ParseError) as error:
        raise SnapshotError(f"{folder}/manifest.json cannot be read: {error}") from None
    if document.get("format") != FORMAT:
        raise SnapshotError(f"{folder} has format {document.get('format')!r}; this version reads format {FORMAT}")
    if missing := _missing_parts(document):
        raise SnapshotError(f"{folder}/manifest.json lacks {', '.join(missing)}; fetch or publish the snapshot again")
    return Manifest(
        name=document["name"],
        tokens=document["tokens"],
        created=document["created"],
        saes=document["saes"],
        run=document["run"],
        files=tuple(SnapshotFile(entry["path"], entry["bytes"], entry["sha256"]) for entry in document["files"]),
    )


def _missing_parts(document: dict[str, Any]) -> list[str]:
    """The parts of a manifest that are missing or of another type."""
    types = {"name": str, "tokens": int, "created": str, "saes": dict, "run": dict, "files": list}
    missing = [key for key, kind in types.items() if not isinstance(document.get(key), kind)]
    if not missing and not all(isinstance(metrics, dict) for metrics in document["saes"].values()):
        missing.append("an object for each of saes")
    if not missing and not all(map(_is_file_entry, document["files"])):
        missing.append("path, bytes and sha256 of each of files")
    return missing


def _is_file_entry(entry: object) -> bool:
    types = {"path": str, "bytes": int, "sha256": str}
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in types.items())


def verify(folder: Path) -> Manifest:
    """Checks every file against the manifest and returns the manifest. Raises SnapshotError at the first difference."""
    manifest = read_manifest(folder)
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file() or path.stat().st_size != file.bytes or file_sha256(path) != file.sha256:
            raise SnapshotError(f"{path} is missing or differs from the manifest; fetch the snapshot again")
    return manifest


def read_sae(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(cfg, weights) from one SAE's folder. Raises SnapshotError."""
    try:
        cfg = read_object(folder / "cfg.json")
        weights = load_file(folder / "sae_weights.safetensors")
    except Exception as error:
        raise SnapshotError(f"{folder} holds no readable SAE: {error}") from None
    return cfg, weights


def read_sae_config(folder: Path) -> dict[str, Any]:
    """cfg.json from one SAE's folder. Raises SnapshotError."""
    try:
        return read_object(folder / "cfg.json")
    except (OSError, ParseError) as error:
        raise SnapshotError(f"{folder} holds no readable SAE: {error}") from None


def read_selftest(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "selftest.safetensors")


def read_sparsity(folder: Path) -> np.ndarray:
    """log10 firing rate of each latent [d_sae]; −10 where it never fired."""
    with safe_open(folder / "sparsity.safetensors", "np") as file:
        return file.get_tensor("sparsity")


def pin(run_directory: Path, name: str) -> None:
    """Exempts a snapshot from `retire` until it is unpinned. Raises SnapshotError when it does not exist."""
    folder = _snapshot(run_directory, name)
    try:
        (folder / PINNED).touch()
        flush(folder)
    except FileNotFoundError:
        raise SnapshotError(f"snapshot {name} has just been retired") from None


def unpin(run_directory: Path, name: str) -> None:
    """Undoes `pin`. Raises SnapshotError when the snapshot does not exist."""
    folder = _snapshot(run_directory, name)
    (folder / PINNED).unlink(missing_ok=True)
    flush(folder)


def is_pinned(folder: Path) -> bool:
    return (folder / PINNED).exists()


def _snapshot(run_directory: Path, name: str) -> Path:
    names = snapshot_names(run_directory)
    if name not in names:
        raise SnapshotError(f"no snapshot {name!r} in {run_directory}; {describe_names(names)}")
    return run_directory / "snapshots" / name


def describe_names(names: list[str]) -> str:
    """Which snapshots exist, for the message that a name is none of them."""
    return f"there are {len(names)}, {names[0]} to {names[-1]}" if names else "there is none yet"


def retire(run_directory: Path, keep: int, keep_every_tokens: int | None = None) -> None:
    """Removes snapshots beyond the newest `keep`, and superseded ones beyond as many. No reader sees half of one.

    Three kinds of snapshots are never removed: the first at or after each multiple of `keep_every_tokens`; pinned ones,
    which do not count towards `keep`; and the newest that has a given SAE, which may have left the run.
    """
    names = snapshot_names(run_directory)
    milestones = _milestones(names, keep_every_tokens) if keep_every_tokens else set()
    newer_saes: set[str] = set()
    newer = 0
    for name in reversed(names):
        folder = run_directory / "snapshots" / name
        saes = {path.name for path in folder.iterdir() if path.is_dir()}
        if not is_pinned(folder):
            if newer >= keep and saes <= newer_saes and name not in milestones:
                remove_folder(folder)
            newer += 1
        newer_saes |= saes
    superseded = sorted(_superseded(run_directory), key=lambda folder: folder.stat().st_mtime_ns)
    for folder in superseded[:-keep]:
        remove_folder(folder)


def _superseded(run_directory: Path) -> list[Path]:
    return [path for path in run_directory.glob(f"snapshots/{SUPERSEDED}/*") if is_complete(path)]


def _milestones(names: list[str], every: int) -> set[str]:
    """The first of `names` at or after each multiple of `every`: the same whatever else was removed."""
    first: dict[int, str] = {}
    for name in names:
        first.setdefault(int(name) // every, name)
    return {name for multiple, name in first.items() if multiple > 0}


def supersede_after(run_directory: Path, tokens: int) -> list[Path]:
    """Moves snapshots beyond `tokens` to `snapshots/superseded`, and returns their new folders.

    A trainer that resumes from an older checkpoint does not descend from them. They are not deleted, and pinned ones
    stay where they are.
    """
    names, folder = snapshot_names(run_directory), run_directory / "snapshots"
    current = [name for name in names if int(name) <= tokens or is_pinned(folder / name)]
    latest = folder / "LATEST"  # first: it never names one that has been moved already
    if not current:
        latest.unlink(missing_ok=True)
    elif not latest.exists() or latest.read_text() != current[-1] + "\n":
        replace_text(latest, current[-1] + "\n")
    destinations: list[Path] = []
    for name in (name for name in names if name not in current):
        destinations.append(_free_name(folder / SUPERSEDED / name))
        make_folder(destinations[-1].parent)
        move_folder(folder / name, destinations[-1])
    return destinations


def _free_name(path: Path) -> Path:
    """`path`, or the first of `path`-2, `path`-3, … that does not exist: a run may be resumed more than once."""
    candidates = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
    return next(candidate for candidate in candidates if not candidate.exists())


def finite(value: float | None) -> float | None:
    """The value, or None for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
