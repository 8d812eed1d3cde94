"""Inspects a run directory, without changing anything: hashes, books, self-tests, settings.

It compares files with their hashes, the ledger's books with each other, each snapshot with its self-test, and the
settings with the checkpoint.
"""

from __future__ import annotations

import fcntl
from pathlib import Path

from producer.common.formatting import format_bytes
from producer.common.parsing import ParseError, parse_json
from producer.common.run_file import read_run_file
from producer.common.toml import SettingsError
from trainer.saes.selftest import check
from trainer.settings import TrainerSettings
from trainer.snapshot import SnapshotError, snapshot_names, verify
from trainer.state.audit import ledger_faults, tensor_faults, violations
from trainer.state.checkpoint import CheckpointError, complete_folders, read, start_fault
from trainer.state.format import Checkpoint, CheckpointDocument, LedgerState, QuarantinedShardState
from trainer.training.resuming import roster_of

MOST_NAMED = 20
"""Quarantined shards that are named one by one, the newest."""


class Inspection:
    """One inspection of a run directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.findings: list[str] = []
        """Lines about what is there."""
        self.faults: list[str] = []
        """Lines about what is wrong, and what to do."""

    def run(self) -> None:
        if not any((self.directory / name).exists() for name in ("settings.toml", "checkpoint", "snapshots")):
            self.faults.append(f"{self.directory} is no run directory: nothing that a trainer writes is in it")
            return
        try:
            if _is_locked(self.directory / "lock"):
                self.findings.append("a trainer is at work here; what it is just writing is left out")
        except OSError as error:
            self.faults.append(f"{self.directory / 'lock'} cannot be opened: {error.strerror}; no trainer would start")
        settings = self._inspect_settings()
        newest, refusal = self._inspect_checkpoints()
        self._inspect_snapshots()
        self._inspect_history()
        if newest is not None:
            ledger = newest.document.ledger
            faults = ledger_faults(ledger, newest.tensors.shards)
            self.faults += [*violations(ledger), *faults, *tensor_faults(newest.tensors)]
            if faults:
                refusal = f"a resume would refuse: {faults[0]}"
            elif settings is not None:
                refusal = self._compare_settings(settings, newest.document)
        self.findings.append(refusal or self._next_start(newest))

    def _inspect_settings(self) -> TrainerSettings | None:
        try:
            settings = read_run_file(TrainerSettings, self.directory / "settings.toml", [])
        except SettingsError as error:
            self.faults.append(f"{error}; the trainer writes it again from your run file when it starts")
            return None
        self.findings.append(f"settings.toml: SAEs {', '.join(sae.name for sae in settings.sae)}")
        return settings

    def _inspect_checkpoints(self) -> tuple[Checkpoint | None, str | None]:
        """(the newest checkpoint, why a resume would refuse it): one of the two at most, None twice for a new run."""
        newest: Checkpoint | None = None
        refusal: str | None = None
        for folder in complete_folders(self.directory / "checkpoint"):
            try:
                newest, refusal = read(folder), None
            except CheckpointError as error:
                newest, refusal = None, f"a resume would refuse: {error}"
                self.faults.append(str(error))
                continue
            size = sum(path.stat().st_size for path in folder.iterdir())
            ranks = newest.document.ranks
            shards = f", the latents in shards of {ranks} ranks" if ranks > 1 else ""
            self.findings.append(f"checkpoint {folder.name}: {format_bytes(size)}{shards}, hashes right")
            if int(folder.name.split("-")[0]) != newest.tokens:
                self.faults.append(f"{folder} holds {newest.tokens} trained rows, and its name says otherwise")
        return newest, refusal

    def _inspect_snapshots(self) -> None:
        names, folder = snapshot_names(self.directory), self.directory / "snapshots"
        for name in names:
            try:
                saes = verify(folder / name).saes
                for sae in saes:
                    check(folder / name / sae)
                self.findings.append(f"snapshot {name}: {', '.join(saes)}; hashes and self-tests right")
            except (SnapshotError, OSError, LookupError, ValueError, RuntimeError) as error:
                self.faults.append(f"snapshot {name}: {error}; remove {folder / name}, the run does not need it")
        path, newest = folder / "LATEST", names[-1] if names else None
        latest = path.read_text().strip() if path.exists() else None
        if latest != newest:
            self.faults.append(f"{path} names {latest}, the newest snapshot is {newest or 'none'}")

    def _inspect_history(self) -> None:
        path = self.directory / "metrics.jsonl"
        if not path.exists():
            return
        *lines, last = path.read_bytes().split(b"\n")
        broken = [number for number, line in enumerate(lines, 1) if not _is_json(line)]
        self.findings.append(f"metrics.jsonl: {len(lines):,} reports{', the last one cut off' if last else ''}")
        if broken:
            self.faults.append(f"{path}: {len(broken)} lines are no JSON, the first is line {broken[0]}")

    def _compare_settings(self, settings: TrainerSettings, document: CheckpointDocument) -> str | None:
        """Why a resume with these settings would be refused, or None."""
        try:
            roster_of(document, settings)
        except CheckpointError as error:
            self.faults.append(f"settings.toml and the checkpoint disagree: {error}")
            return f"a resume with these settings would refuse: {error}"
        return None

    def _next_start(self, newest: Checkpoint | None) -> str:
        """What starting the trainer again would do."""
        if fault := start_fault(self.directory, newest):
            self.faults.append(fault)
            return f"a start would refuse: {fault}"
        if newest is None:
            return "there is no checkpoint and no snapshot: the trainer would begin the run anew"
        if (self.directory / "summary.json").is_file():
            return "\n".join(_end(newest.document.ledger))
        return "\n".join(self._resumption(newest.document))

    def _resumption(self, document: CheckpointDocument) -> list[str]:
        """What resuming from this checkpoint would do."""
        ledger = document.ledger
        still_open = sum(not shard.given_up for shard in ledger.open)
        sentences = [
            f"a resume would {'stay paused' if document.roster.paused else 'go on'} with run {ledger.run} at "
            f"{ledger.rows_trained:,} rows, epoch {ledger.epoch}, SAEs {', '.join(document.run.saes)}",
            f"shards that were begun are leased again for the rows they lack: {still_open}",
        ]
        names = sorted(path.name for path in self.directory.glob("snapshots/[0-9]*"))
        if beyond := [name for name in names if int(name) > ledger.rows_trained]:
            sentences.append(
                "snapshots beyond the checkpoint, which it would move to snapshots/superseded unless pinned: "
                + ", ".join(beyond)
            )
        return sentences + ([_quarantine(ledger.set_aside)] if ledger.set_aside else [])


def _end(ledger: LedgerState) -> list[str]:
    """How a run ended that has a summary."""
    if not ledger.set_aside:
        return [f"the run is complete with {ledger.rows_trained:,} rows; started again, the trainer would say so"]
    return [
        f"the run ended with {ledger.rows_trained:,} rows",
        _quarantine(ledger.set_aside),
        "started again, the trainer tries them again if the run had failed for them",
    ]


def _quarantine(shards: list[QuarantinedShardState]) -> str:
    tokens = [shard.rows for shard in shards if shard.rows is not None]
    total = f"{sum(tokens):,}" if len(tokens) == len(shards) else "an unknown number"
    lines = [f"\n  shard {shard.shard} of epoch {shard.epoch}: {shard.reason!r}" for shard in shards[-MOST_NAMED:]]
    return f"shards quarantined: {len(shards)}, {total} of their tokens are not trained on{''.join(lines)}"


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ParseError:
        return False
    return True


def _is_locked(path: Path) -> bool:
    """Whether a trainer holds the run directory's lock. Raises OSError when the lock cannot be opened."""
    try:
        with open(path, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
