"""`python -m trainer export SNAPSHOT --format FORMAT --to DIR`: SAEs as other libraries load them.

Torch is imported after the arguments are parsed, so that `--help` and errors in them answer at once. DIR appears whole
or not at all. Exit codes: 0 written, 1 the snapshot or the disk failed, 2 the arguments do not go together.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from producer.common.addresses import path_argument
from producer.common.command_parser import command_parser
from producer.common.completion import complete
from producer.common.shell import shell_command
from trainer.snapshot import SnapshotError, snapshot_names, verify
from trainer.state.durable import new_folder

LOADED_BY = {
    "saelens": 'from sae_lens import SAE; sae = SAE.load_from_disk("{}")',
    "jumprelu": 'from sae_lens import SAE; sae = SAE.load_from_disk("{}")',
    "sparsify": 'from sparsify import SparseCoder; sae = SparseCoder.load_from_disk("{}")',
    "dictionary_learning": (
        'from dictionary_learning.utils import load_dictionary; sae, config = load_dictionary("{}", device="cpu")'
    ),
}
"""Python that loads an SAE of each format; {} is its folder."""
COPIED = ("sparsity.safetensors", "selftest.safetensors", "evaluation.json")
"""Files of a snapshot that a folder in SAELens' layout has too."""

PURPOSE = """Writes published SAEs in a format that other libraries load with their own loaders.

saelens: what a snapshot already is. jumprelu: the same layout, with gated, batchtopk and relu SAEs as the JumpReLU
they are at inference. sparsify: top-k SAEs and transcoders. dictionary_learning: SAEs, and transcoders without skip."""


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "trainer",
        "export",
        PURPOSE,
        (
            "runs/gpt2 --format sparsify --to gpt2-sparsify",
            "runs/gpt2/snapshots/000040000512/topk --format saelens --to topk",
        ),
    )
    parser.add_argument(
        "snapshot", type=path_argument, metavar="SNAPSHOT", help="a snapshot, a run directory, or one SAE in it"
    )
    parser.add_argument("--format", required=True, choices=LOADED_BY)
    parser.add_argument(
        "--to", required=True, type=path_argument, metavar="DIR", help="a new folder; one more in it per SAE"
    )
    parser.add_argument("--sae", metavar="NAME", help="this SAE only, into DIR itself; without it, all of the snapshot")
    complete(parser, arguments)
    options = parser.parse_args(arguments)
    try:
        folders = sae_folders(options.snapshot, options.sae)
        target = options.to.resolve()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            return _fail(2, f"{options.to} exists and is not empty: choose another --to")
        fault = write(folders, options.format, target)
    except (OSError, SnapshotError) as error:
        return _fail(1, str(error))
    if fault is not None:
        return _fail(2, fault)
    for name, source in folders.items():
        folder = options.to / name
        print(f"{source} → {folder}\n    {LOADED_BY[options.format].format(folder)}")
    return 0


def sae_folders(snapshot: Path, name: str | None) -> dict[str, Path]:
    """Folders of published SAEs by the name of their target in DIR, `.` for a single one. Raises SnapshotError."""
    if (snapshot / "cfg.json").is_file():
        if name is not None:
            raise SnapshotError(f"{snapshot} is one SAE already: remove --sae")
        return {".": snapshot}
    if not (snapshot / "manifest.json").is_file() and (snapshot / "snapshots").is_dir():
        if not (names := snapshot_names(snapshot)):
            raise SnapshotError(f"{snapshot} has no complete snapshot yet")
        snapshot = snapshot / "snapshots" / names[-1]
    if not (snapshot / "manifest.json").is_file():
        raise SnapshotError(
            f"{snapshot} is no snapshot (manifest.json), no run directory (snapshots/) and no SAE (cfg.json)"
        )
    verify(snapshot)
    names = sorted(path.parent.name for path in snapshot.glob("*/cfg.json"))
    if name is None:
        return {each: snapshot / each for each in names}
    if name not in names:
        raise SnapshotError(f"{snapshot} has no sae {name!r}; it has {', '.join(names)}")
    return {".": snapshot / name}


def write(folders: dict[str, Path], format_name: str, target: Path) -> str | None:
    """Writes each SAE into its folder in `target`; returns the reason if the format cannot express one of them.

    Raises SnapshotError when one cannot be read, or fails its self-test.
    """
    from trainer.saes import formats
    from trainer.saes.selftest import check

    try:
        with new_folder(target) as temporary:
            for name, source in folders.items():
                folder = temporary / name
                folder.mkdir(exist_ok=True)
                try:
                    formats.write(folder, formats.convert(formats.read_published(source), format_name))
                except SnapshotError as error:
                    raise SnapshotError(f"{source}: {error}") from None
                except formats.FormatError as error:
                    others = "; or export the others one by one with --sae" if len(folders) > 1 else ""
                    raise formats.FormatError(f"{source}: {error}{others}") from None
                if format_name in ("saelens", "jumprelu"):
                    for path in (source / file for file in COPIED):
                        if path.is_file():
                            shutil.copyfile(path, folder / path.name)
                    if (folder / "selftest.safetensors").is_file():
                        check(folder)
    except formats.FormatError as error:
        return str(error)
    return None


def _fail(code: int, message: str) -> int:
    print(f"{shell_command('trainer', 'export')}: {message}", file=sys.stderr)
    return code
