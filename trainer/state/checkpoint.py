"""Checkpoints on disk, each written whole or not at all; a run goes on from the newest complete one.

    checkpoint/000001234567-000042/      tokens trained, number of the checkpoint
        state.safetensors                       every tensor: weights, moments, statistics, trained bits
        latents-00001-of-00004.safetensors      of many ranks: the rows of rank 1's latents; rank 0's are above;
                                                the first rank of a placement group writes the rest of its SAEs too
        state.json                              everything else: ledger, counters, random states, scales
        complete.json                           written last: sizes and sha256 of the others

The contents of the files are defined in `format`. Any number of ranks reads what any other number has written: each
rank takes the rows of its latents from the files that have them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from producer.common.parsing import read_object
from trainer.snapshot import SnapshotError, file_sha256, is_pinned, read_manifest, snapshot_names
from trainer.state.durable import flush, new_folder, remove_folder, sweep
from trainer.state.format import (
    Checkpoint,
    CheckpointDocument,
    LatentRange,
    SaeTensors,
    decode_document,
    decode_tensors,
    encode_document,
    encode_tensors,
    has_latent_rows,
    sae_of,
)
from trainer.state.migrations import CheckpointFormatError, UnknownVersion

NAME = re.compile(r"\d{12,}-\d{6,}")
DOCUMENT, TENSORS = "state.json", "state.safetensors"
FILES = (DOCUMENT, TENSORS)


class CheckpointError(ValueError):
    """A checkpoint cannot be used for this run. The message says what to do."""


@dataclass(frozen=True)
class FileRecord:
    """An entry of complete.json."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        return cls(path.stat().st_size, file_sha256(path))


WriteShards = Callable[[Path], AbstractContextManager[dict[str, FileRecord]]]
"""Lets other ranks write their rows into a folder while the block runs; the dict has their files at its end."""


@contextmanager
def _no_shards(_: Path) -> Iterator[dict[str, FileRecord]]:
    yield {}


def shard_name(rank: int, ranks: int) -> str:
    """The file with the rows of a rank's latents."""
    return TENSORS if rank == 0 else f"latents-{rank:05d}-of-{ranks:05d}.safetensors"


def save_shard(path: Path, saes: Mapping[str, SaeTensors], is_first: bool = False) -> FileRecord:
    """Writes the rows of latents that a rank other than 0 holds; the first rank of a placement group all else too."""
    rows = {
        f"sae/{name}/{key}": tensor
        for name, sae in saes.items()
        for key, tensor in (sae.by_key() if is_first else sae.rows_by_key()).items()
    }
    save_file({key: tensor.contiguous() for key, tensor in rows.items()}, path)
    path.chmod(0o644)
    flush(path)
    return FileRecord.of(path)


def save(run_directory: Path, checkpoint: Checkpoint, keep: int, write_shards: WriteShards = _no_shards) -> Path:
    """Writes a checkpoint and removes the oldest beyond `keep`. Returns its folder."""
    folder = run_directory / "checkpoint"
    number = 1 + max((int(path.name.split("-")[1]) for path in complete_folders(folder)), default=0)
    final = folder / f"{checkpoint.tokens:012d}-{number:06d}"
    tensors = {
        key: (torch.from_numpy(value) if isinstance(value, np.ndarray) else value).contiguous()
        for key, value in encode_tensors(checkpoint.tensors).items()
    }
    with new_folder(final) as temporary:
        with write_shards(temporary) as records:
            save_file(tensors, temporary / TENSORS)
            (temporary / DOCUMENT).write_text(json.dumps(encode_document(checkpoint.document)))
            own = {name: FileRecord.of(temporary / name) for name in FILES}
        files = {name: vars(record) for name, record in sorted((own | records).items())}
        (temporary / "complete.json").write_text(json.dumps(files))
    for old in complete_folders(folder)[:-keep]:
        remove_folder(old)
    return final


Share = Callable[[str, int], range]
"""The latents that a rank holds of an SAE by its name, which has so many."""
ShareOf = Callable[[CheckpointDocument], Share]


def load_newest(run_directory: Path, share: ShareOf | None = None) -> Checkpoint | None:
    """The newest complete checkpoint, with the rows of a `share` of its latents; None for a new run.

    Raises CheckpointError when it is damaged or of a format that this version does not read.
    """
    folder = run_directory / "checkpoint"
    sweep(folder)
    folders = complete_folders(folder)
    return read(folders[-1], share) if folders else None


def read(folder: Path, share: ShareOf | None = None, verified: bool = False) -> Checkpoint:
    """One complete checkpoint, with the rows of a `share` of its latents.

    Raises CheckpointError when it is damaged or of a format this version does not read. `verified`: another rank has
    compared the files with their hashes.
    """
    if not verified and (damage := _damage(folder)):
        raise CheckpointError(f"{damage}: {_remedy(folder)}")
    try:
        document = decode_document(read_object(folder / DOCUMENT))
        if share is None and not document.latents:
            tensors = load_file(folder / TENSORS)  # mapped, not copied
        else:
            own = share(document) if share is not None else lambda _, latents: range(latents)
            tensors = _tensors_of_share(folder, document, own)
        return Checkpoint(document, decode_tensors(tensors, document))
    except UnknownVersion as error:
        raise CheckpointError(
            f"{folder} {error}: resume with the version that wrote it, or start a new run directory"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}): {_remedy(folder)}") from None


def _tensors_of_share(folder: Path, document: CheckpointDocument, share: Share) -> dict[str, Tensor]:
    """Tensors by key; those with a row per latent have the rows of a share. Raises CheckpointFormatError."""
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        ranges = [one for ranges in document.latents.values() for one in ranges]
        files = {
            name: stack.enter_context(safe_open(folder / name, "pt"))
            for name in dict.fromkeys([TENSORS, *(one.file for one in ranges)])
        }
        for file, key in _keys(files, document):
            if not has_latent_rows(key):
                tensors[key] = file.get_tensor(key)
                continue
            sae = sae_of(key)
            ranges = document.latents.get(sae, [LatentRange(TENSORS, 0, file.get_slice(key).get_shape()[0])])
            _require_cover(sae, ranges)
            latents = share(sae, ranges[-1].end)
            pieces = [
                files[one.file].get_slice(key)[max(latents.start, one.first) - one.first : latents.stop - one.first]
                for one in ranges
                if one.first < latents.stop and latents.start < one.end
            ]
            tensors[key] = torch.cat(pieces) if pieces else file.get_slice(key)[:0]
    return tensors


def _keys(files: Mapping[str, Any], document: CheckpointDocument) -> Iterator[tuple[Any, str]]:
    """All keys, each with the file that has the tensor, or its first rows."""
    first_files = {sae: ranges[0].file for sae, ranges in document.latents.items() if ranges}
    for name, file in files.items():
        for key in file.keys():  # noqa: SIM118 (no mapping)
            if first_files.get(sae_of(key), TENSORS) == name:
                yield file, key


def _require_cover(sae: str, ranges: list[LatentRange]) -> None:
    """Raises CheckpointFormatError unless the ranges go from 0 to the end without a gap."""
    ends = [0, *(one.end for one in ranges)]
    if any(one.first != end or one.end <= end for one, end in zip(ranges, ends, strict=False)):
        text = ", ".join(f"{one.first} to {one.end} in {one.file}" for one in ranges)
        raise CheckpointFormatError(f"the latents of sae {sae} are not each in one file: {text}")


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
        for name in {*FILES, *files}:
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
            other = read_manifest(folder / name).run["id"]
        except (SnapshotError, LookupError, TypeError):
            continue  # `check` reports it
        if other == run:
            return None
        return (
            f"{run_directory} holds the checkpoint of run {run} and snapshots of run {other}, such as {name}: put the "
            "checkpoint into a run directory of its own, or bring back the one that belongs here"
        )
    return None
