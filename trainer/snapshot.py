"""CONTRACT: published SAEs on disk, in the layout that SAELens reads. Light: numpy and safetensors, no torch.

    snapshots/000001234567/              named by tokens trained
        <sae name>/cfg.json                     architecture, sizes, provenance under `metadata`
        <sae name>/sae_weights.safetensors      W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_dec [d_out], and per latent
                                                b_enc (, threshold), or b_gate, b_mag, r_mag; transcoders: W_skip
        <sae name>/sparsity.safetensors         log10 firing rate of each latent
        <sae name>/selftest.safetensors         x, raw activations, with the latents and the x_hat they must give;
                                                of more than 2¹⁸ latents the active ones: latents.row, .index, .value
        <sae name>/evaluation.json              added later by the monitor: numbers on held-out text
        <sae name>/latents.safetensors          added later by the monitor: examples and statistics of each latent
        manifest.json                           written last: every file with its size and sha256, a large one with
                                                those of its parts
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from producer.common.parsing import ParseError, read_object
from trainer.state.durable import flush, make_folder, move_folder, new_folder, remove_folder, replace_text

FORMAT, PARTS_FORMAT = 1, 2
"""Of a manifest; the second where some file is so large that it is hashed in parts."""
FORMATS = (FORMAT, PARTS_FORMAT)
WEIGHTS, SPARSITY = "sae_weights.safetensors", "sparsity.safetensors"
LARGE_BYTES, PART_BYTES = 4 * 2**30, 2**30
"""Size from which a file is hashed in parts, and size of a part."""
NAME = re.compile(r"\d{12,}")
PINNED = "pinned"
SUPERSEDED = "superseded"
SAELENS_LAYOUT = "6.54.12"
"""The SAELens release whose layout is written. SAELens drops provenance without a version in the metadata."""


class SnapshotError(ValueError):
    """A snapshot is incomplete, damaged, or from a format this version does not know."""


@dataclass(frozen=True)
class FileParts:
    """Hashes of a large file, which is checked and fetched part by part."""

    bytes: int
    """Of each part but the last."""
    sha256: tuple[str, ...]
    """In hex."""

    @property
    def digest(self) -> str:
        """One hash for the whole file: that of the hashes of its parts, one after another."""
        return hashlib.sha256(b"".join(map(bytes.fromhex, self.sha256))).hexdigest()


@dataclass(frozen=True)
class SnapshotFile:
    """One file of a snapshot."""

    path: str
    """Below the snapshot's folder."""
    bytes: int
    sha256: str
    """In hex; `FileParts.digest` of a file with parts."""
    parts: FileParts | None = None

    def entry(self) -> dict[str, Any]:
        """Its entry in manifest.json."""
        hashes = {"sha256": self.sha256} if self.parts is None else {"parts": asdict(self.parts)}
        return {"path": self.path, "bytes": self.bytes, **hashes}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> SnapshotFile:
        """The reverse of `entry`. Raises ValueError, LookupError or TypeError for anything else."""
        if (document := entry.get("parts")) is None:
            bytes.fromhex(entry["sha256"])
            return cls(entry["path"], int(entry["bytes"]), entry["sha256"])
        parts = FileParts(int(document["bytes"]), tuple(document["sha256"]))
        if parts.bytes < 1 or len(parts.sha256) != -(-int(entry["bytes"]) // parts.bytes):
            raise ValueError(f"{entry['path']}: {len(parts.sha256)} parts of {parts.bytes} bytes are not all of it")
        return cls(entry["path"], int(entry["bytes"]), parts.digest, parts)


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


class Draft:
    """A snapshot being written, which nobody sees yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saes: dict[str, dict[str, Any]] = {}
        """Numbers of training, by the name of the SAE."""
        self._parts: dict[str, FileParts] = {}

    def add(self, name: str, numbers: dict[str, Any], weights: FileParts | None = None) -> None:
        """Adds an SAE, whose files are in its folder; `weights` are the parts of its weights' file if that is large."""
        self.saes[name] = numbers
        if weights is not None:
            self._parts[f"{name}/{WEIGHTS}"] = weights

    def discard(self, name: str) -> None:
        """Removes what was written of an SAE."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def files(self) -> Iterator[SnapshotFile]:
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name, size = path.relative_to(self.folder).as_posix(), path.stat().st_size
            parts = self._parts.get(name)
            yield SnapshotFile(name, size, file_sha256(path) if parts is None else parts.digest, parts)


def snapshot_folder(run_directory: Path, tokens: int) -> Path:
    return run_directory / "snapshots" / snapshot_name(tokens)


@contextmanager
def new_snapshot(run_directory: Path, tokens: int, run: dict[str, Any]) -> Iterator[Draft]:
    """Writes one snapshot: the block adds SAEs to the draft; after it the snapshot becomes visible, with a manifest.

    `run` describes the run in the manifest (id, settings, stream). Nothing appears when the block fails.
    """
    final = snapshot_folder(run_directory, tokens)
    shutil.rmtree(final, ignore_errors=True)
    with new_folder(final) as folder:
        draft = Draft(folder)
        yield draft
        manifest = Manifest(
            name=final.name,
            tokens=tokens,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            saes=draft.saes,
            run=run,
            files=tuple(draft.files()),
        )
        (folder / "manifest.json").write_text(json.dumps(_document(manifest), indent=1, allow_nan=False))
    set_latest(final)


def _document(manifest: Manifest) -> dict[str, Any]:
    """The contents of manifest.json."""
    has_parts = any(file.parts for file in manifest.files)
    fields = {key: value for key, value in vars(manifest).items() if key != "files"}
    files = [file.entry() for file in manifest.files]
    return {"format": PARTS_FORMAT if has_parts else FORMAT, **fields, "files": files}


def set_latest(folder: Path) -> None:
    """Makes a snapshot the newest."""
    replace_text(folder.parent / "LATEST", folder.name + "\n")


def part_sha256(path: Path, offset: int, size: int) -> str:
    """The sha256 of a part of a file, which may end earlier."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(offset)
        while size and (chunk := file.read(min(size, 1 << 20))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()


def is_intact(path: Path, file: SnapshotFile) -> bool:
    """Whether the bytes on disk are those of the manifest."""
    if not path.is_file() or path.stat().st_size != file.bytes:
        return False
    if (parts := file.parts) is None:
        return file_sha256(path) == file.sha256
    return all(part_sha256(path, i * parts.bytes, parts.bytes) == digest for i, digest in enumerate(parts.sha256))


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
    if document.get("format") not in FORMATS:
        raise SnapshotError(
            f"{folder} has format {document.get('format')!r}; this version reads formats {FORMAT} and {PARTS_FORMAT}"
        )
    if missing := _missing_parts(document):
        raise SnapshotError(f"{folder}/manifest.json lacks {', '.join(missing)}; fetch or publish the snapshot again")
    return Manifest(
        name=document["name"],
        tokens=document["tokens"],
        created=document["created"],
        saes=document["saes"],
        run=document["run"],
        files=tuple(map(SnapshotFile.from_entry, document["files"])),
    )


def _missing_parts(document: dict[str, Any]) -> list[str]:
    """The parts of a manifest that are missing or of another type."""
    types = {"name": str, "tokens": int, "created": str, "saes": dict, "run": dict, "files": list}
    missing = [key for key, kind in types.items() if not isinstance(document.get(key), kind)]
    if not missing and not all(isinstance(metrics, dict) for metrics in document["saes"].values()):
        missing.append("an object for each of saes")
    if not missing and not all(map(_is_file_entry, document["files"])):
        missing.append("path, bytes and hashes of each of files")
    return missing


def _is_file_entry(entry: object) -> bool:
    if not (isinstance(entry, dict) and isinstance(entry.get("path"), str) and isinstance(entry.get("bytes"), int)):
        return False
    try:
        SnapshotFile.from_entry(entry)
    except (ValueError, LookupError, TypeError):
        return False
    return True


def verify(folder: Path) -> Manifest:
    """Checks every file against the manifest and returns the manifest. Raises SnapshotError at the first difference."""
    manifest = read_manifest(folder)
    for file in manifest.files:
        path = folder / file.path
        if not is_intact(path, file):
            raise SnapshotError(f"{path} is missing or differs from the manifest; fetch the snapshot again")
    return manifest


def read_sae(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(cfg, weights) from one SAE's folder. Raises SnapshotError."""
    try:
        cfg = read_object(folder / "cfg.json")
        weights = load_file(folder / WEIGHTS)
    except Exception as error:
        raise SnapshotError(f"{folder} holds no readable SAE: {error}") from None
    return cfg, weights


def read_selftest(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "selftest.safetensors")


def read_sparsity(folder: Path) -> np.ndarray:
    """log10 firing rate of each latent [d_sae]; −10 where it never fired."""
    with safe_open(folder / SPARSITY, "np") as file:
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
