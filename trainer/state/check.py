"""`python -m trainer check RUN_DIR`: whether a run directory is whole, and what starting its trainer again would do.

Reads, and changes nothing. Files against their hashes, the ledger's books against each other, each snapshot against
its self-test, settings against the checkpoint. Exit codes: 0 whole, 1 something is wrong, and each fault is a line
that says what to do.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from producer.common.addresses import path_argument
from producer.common.completion import complete
from producer.common.formatting import format_bytes
from producer.common.parsing import ParseError, parse_json
from producer.common.run_file import read_run_file
from producer.common.shell import shell_command
from producer.common.toml import SettingsError
from producer.wire import Hello, held_out_shards, unpack_bits
from trainer.settings import TrainerSettings

PURPOSE = """Tells whether a run directory is whole, and what starting its trainer again would do.

Compares checkpoints and snapshots with their hashes, runs each snapshot's self-test, and balances the ledger's books.
Changes nothing, and may be run while the trainer is at work."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        shell_command("trainer", "check"), description=PURPOSE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=path_argument, metavar="RUN_DIR", help="run.directory of the run file")
    complete(parser, arguments)
    directory = parser.parse_args(arguments).directory.absolute()
    examination = Examination(directory)
    examination.run()
    print("\n".join(examination.findings))
    for fault in examination.faults:
        print(f"fault: {fault}", file=sys.stderr)
    return int(bool(examination.faults))


class Examination:
    """Looks at everything in turn; `findings` are for a person, `faults` are what is wrong."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.findings: list[str] = []
        self.faults: list[str] = []

    def run(self) -> None:
        if not any((self.directory / name).exists() for name in ("settings.toml", "checkpoint", "snapshots")):
            self.faults.append(f"{self.directory} is no run directory: nothing that a trainer writes is in it")
            return
        try:
            if _is_locked(self.directory / "lock"):
                self.findings.append("a trainer is at work here; what it is just writing is left out")
        except OSError as error:
            self.faults.append(f"{self.directory / 'lock'} cannot be opened: {error.strerror}; no trainer would start")
        settings = self._settings()
        saved, refusal = self._checkpoints()
        self._snapshots()
        self._history()
        if saved is not None:
            self.faults += breaches(saved[0]["ledger"])
            faults = ledger_faults(saved[0]["ledger"], saved[1])
            self.faults += faults
            self.faults += tensor_faults(saved[1])
            refusal = f"a resume would refuse: {faults[0]}" if faults else self._disagreement(saved[0], settings)
        self.findings.append(refusal or self._resumption(saved, settings))

    def _settings(self) -> TrainerSettings | None:
        path = self.directory / "settings.toml"
        try:
            settings = read_run_file(TrainerSettings, path, [])
        except SettingsError as error:
            self.faults.append(f"{error}; the trainer writes it again from your run file when it starts")
            return None
        self.findings.append(f"settings.toml: SAEs {', '.join(sae.name for sae in settings.sae)}")
        return settings

    def _checkpoints(self) -> tuple[tuple[dict[str, Any], dict[str, Any]] | None, str | None]:
        """(the newest checkpoint, why a resume would refuse it): one of the two at most, None twice for a new run."""
        from trainer.state.checkpoint import CheckpointError, complete, read

        newest, refusal = None, None
        for folder in complete(self.directory / "checkpoint"):
            try:
                newest, refusal = read(folder), None
                rows = newest[0]["ledger"]["rows_trained"]
                size = sum(path.stat().st_size for path in folder.iterdir())
                self.findings.append(f"checkpoint {folder.name}: {format_bytes(size)}, hashes right")
                if int(folder.name.split("-")[0]) != rows:
                    self.faults.append(f"{folder} holds {rows} trained rows, and its name says otherwise")
            except CheckpointError as error:
                newest, refusal = None, f"a resume would refuse: {error}"
                self.faults.append(str(error))
        return newest, refusal

    def _snapshots(self) -> None:
        from trainer.saes.inference import check
        from trainer.snapshot import SnapshotError, snapshot_names, verify

        names, folder = snapshot_names(self.directory), self.directory / "snapshots"
        for name in names:
            try:
                saes = verify(folder / name)["saes"]
                for sae in saes:
                    check(folder / name / sae)
                self.findings.append(f"snapshot {name}: {', '.join(saes)}; hashes and self-tests right")
            except (SnapshotError, OSError, LookupError, ValueError, RuntimeError) as error:
                self.faults.append(f"snapshot {name}: {error}; remove {folder / name}, the run does not need it")
        latest = folder / "LATEST"
        if (named := latest.read_text().strip() if latest.exists() else None) != (names[-1] if names else None):
            self.faults.append(f"{latest} names {named}, the newest snapshot is {names[-1] if names else 'none'}")

    def _history(self) -> None:
        path = self.directory / "metrics.jsonl"
        if not path.exists():
            return
        *lines, last = path.read_bytes().split(b"\n")
        broken = [number for number, line in enumerate(lines, 1) if not _is_json(line)]
        self.findings.append(f"metrics.jsonl: {len(lines):,} reports{', the last one cut off' if last else ''}")
        if broken:
            self.faults.append(f"{path}: {len(broken)} lines are no JSON, the first is line {broken[0]}")

    def _disagreement(self, document: dict[str, Any], settings: TrainerSettings | None) -> str | None:
        from trainer.state.checkpoint import CheckpointError
        from trainer.training.run import roster_of

        if settings is not None:
            try:
                roster_of(document, settings)
            except CheckpointError as error:
                self.faults.append(f"settings.toml and the checkpoint disagree: {error}")
                return f"a resume with these settings would refuse: {error}"
        return None

    def _resumption(self, saved: tuple[dict[str, Any], dict[str, Any]] | None, settings: TrainerSettings | None) -> str:
        """What starting the trainer again would do, in words."""
        from trainer.state.checkpoint import start_fault

        if fault := start_fault(self.directory, saved):
            self.faults.append(fault)
            return f"a start would refuse: {fault}"
        if saved is None:
            return "there is no checkpoint and no snapshot: the trainer would begin the run anew"
        ledger = saved[0]["ledger"]
        if (self.directory / "summary.json").is_file():
            told = [
                f"the run is complete with {ledger['rows_trained']:,} rows; started again, the trainer would say so"
            ]
            if ledger["set_aside"]:
                told = [f"the run ended with {ledger['rows_trained']:,} rows", _quarantined(ledger["set_aside"])]
                told.append("started again, the trainer tries them again if the run had failed for them")
            return "\n".join(told)
        opened = [entry for entry in ledger["open"] if not entry["given_up"]]
        state = "stay paused" if saved[0]["roster"]["paused"] else "go on"
        beyond = [
            path.name for path in self.directory.glob("snapshots/[0-9]*") if int(path.name) > ledger["rows_trained"]
        ]
        told = [
            f"a resume would {state} with run {ledger['run']} at {ledger['rows_trained']:,} rows, "
            f"epoch {ledger['epoch']}, SAEs {', '.join(saved[0]['saes'])}",
            f"shards that were begun are leased again for the rows they lack: {len(opened)}",
        ]
        if beyond:
            told.append(
                "snapshots beyond the checkpoint, which it would move to snapshots/superseded unless pinned: "
                + ", ".join(sorted(beyond))
            )
        if ledger["set_aside"]:
            told.append(_quarantined(ledger["set_aside"]))
        return "\n".join(told)


def _quarantined(entries: list[dict[str, Any]]) -> str:
    tokens = [entry["rows"] for entry in entries]
    told = "an unknown number" if None in tokens else f"{sum(tokens):,}"
    named = [f"\n  shard {one['shard']} of epoch {one['epoch']}: {one['reason']!r}" for one in entries[-20:]]
    return f"shards quarantined: {len(entries)}, {told} of their tokens are not trained on{''.join(named)}"


def breaches(document: dict[str, Any]) -> list[str]:
    """What the trainer itself has noticed and counted, in sentences; it goes on all the same."""
    return [
        f"the trainer itself has counted {count} breaches of {name}: keep the checkpoint and report it"
        for name, count in document.get("breaches", {}).items()  # older checkpoints have none
        if count
    ]


def ledger_faults(document: dict[str, Any], tensors: dict[str, Any]) -> list[str]:
    """What of the ledger's books in a checkpoint does not balance, in sentences; a trainer does not go on from it."""
    faults: list[str] = []
    stream = Hello.model_validate(document["stream"]) if document["stream"] else None
    held_out = set(held_out_shards(stream.shards, stream.held_out)) if stream else set()
    shards = document["open"]
    if twice := _twice(one["serial"] for one in shards):
        faults.append(f"ledger: two open shards have the same serial: {twice}")
    if twice := _twice((one["epoch"], one["shard"]) for one in shards):
        faults.append(f"ledger: these (epoch, shard) are open twice: {twice}")
    trained_in_open = 0
    for shard in shards:
        name = f"ledger: shard {shard['shard']} of epoch {shard['epoch']}"
        bits = [
            _bits(tensors, f"ledger/{shard['serial']}.{kind}", shard["positions"]) for kind in ("trained", "discarded")
        ]
        trained, discarded = bits
        if trained is None or discarded is None:
            faults.append(f"{name}: its bits are missing or of another length")
            continue
        trained_in_open += int(trained.sum())
        had = int(trained.sum() + discarded.sum())
        if (trained & discarded).any():
            faults.append(f"{name}: rows are trained and discarded at once")
        if shard["rows"] is not None and had > shard["rows"]:
            faults.append(f"{name}: {had} of its {shard['rows']} rows are trained or discarded")
        if stream is not None and (not 0 <= shard["shard"] < stream.shards or shard["shard"] in held_out):
            faults.append(f"{name} is none of those that are trained on")
        if shard["serial"] >= document["next_serial"] or shard["epoch"] > document["epoch"]:
            faults.append(f"{name}: serial {shard['serial']} or its epoch was never given out")
    if trained_in_open > document["rows_trained"]:
        faults.append(f"ledger: {trained_in_open} rows are marked as trained, {document['rows_trained']} are counted")
    if stream is not None:
        faults += _epoch_faults(document, stream)
    return faults


def _epoch_faults(document: dict[str, Any], stream: Hello) -> list[str]:
    """Each shard that the epoch has given out is open, finished or set aside."""
    epoch, given_out = document["epoch"], document["cursor"]
    shards = stream.shards - len(held_out_shards(stream.shards, stream.held_out))
    still_open = sum(one["epoch"] == epoch and not one["given_up"] for one in document["open"])
    aside = sum(entry["epoch"] == epoch for entry in document["set_aside"])
    known = document["finished_in_epoch"] + still_open + aside
    if known == given_out <= shards:
        return []
    return [
        f"ledger: epoch {epoch} has given out {given_out} of {shards} shards, and knows of {known}: "
        f"{document['finished_in_epoch']} finished, {still_open} open, {aside} set aside"
    ]


def tensor_faults(tensors: dict[str, Any]) -> list[str]:
    """Weights and moments that are not finite."""
    return [
        f"checkpoint: {name} holds NaN or infinity: detach that SAE, or go back to a checkpoint before"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]


def _bits(tensors: dict[str, Any], name: str, positions: int) -> np.ndarray | None:
    packed = tensors.get(name)
    if packed is None or len(packed) != -(-positions // 8):
        return None
    return unpack_bits(packed.numpy().tobytes(), positions)


def _twice(values: Iterable[Any]) -> list[Any]:
    seen = list(values)
    return sorted({value for value in seen if seen.count(value) > 1})


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ParseError:
        return False
    return True


def _is_locked(path: Path) -> bool:
    """Whether a trainer holds the run directory's lock. Raises OSError when that cannot be found out."""
    try:
        with open(path, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
