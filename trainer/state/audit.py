"""Whether the contents of a checkpoint agree with each other. Each problem is one sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import TypeVar

from producer.wire import Hello, held_out_shards
from trainer.state.format import CheckpointTensors, LedgerState, ShardBits

Value = TypeVar("Value", bound=Hashable)


def ledger_faults(ledger: LedgerState, bits: dict[int, ShardBits]) -> list[str]:
    """Where the ledger's books do not balance. A trainer does not resume from such a checkpoint."""
    faults: list[str] = []
    stream, shards = ledger.stream, ledger.open
    held_out = set(held_out_shards(stream.shards, stream.held_out)) if stream else set()
    if serials := _repeated(shard.serial for shard in shards):
        faults.append(f"ledger: two open shards have the same serial: {serials}")
    if names := _repeated((shard.epoch, shard.shard) for shard in shards):
        faults.append(f"ledger: these (epoch, shard) are open twice: {names}")
    trained_in_open = 0
    for shard in shards:
        name = f"ledger: shard {shard.shard} of epoch {shard.epoch}"
        if shard.serial not in bits or not bits[shard.serial].covers(shard.positions):
            faults.append(f"{name}: its bits are missing or of another length")
            continue
        trained, discarded = bits[shard.serial].unpack(shard.positions)
        trained_in_open += int(trained.sum())
        rows = int(trained.sum() + discarded.sum())
        if (trained & discarded).any():
            faults.append(f"{name}: rows are trained and discarded at once")
        if shard.rows is not None and rows > shard.rows:
            faults.append(f"{name}: {rows} of its {shard.rows} rows are trained or discarded")
        if stream is not None and (not 0 <= shard.shard < stream.shards or shard.shard in held_out):
            faults.append(f"{name} is none of those that are trained on")
        if shard.serial >= ledger.next_serial or shard.epoch > ledger.epoch:
            faults.append(f"{name}: serial {shard.serial} or its epoch was never given out")
    if trained_in_open > ledger.rows_trained:
        faults.append(f"ledger: {trained_in_open} rows are marked as trained, {ledger.rows_trained} are counted")
    if stream is not None:
        faults += _epoch_faults(ledger, stream)
    return faults


def _epoch_faults(ledger: LedgerState, stream: Hello) -> list[str]:
    """Each shard that was leased in this epoch is open, finished or quarantined."""
    epoch, leased = ledger.epoch, ledger.cursor
    shards = stream.shards - len(held_out_shards(stream.shards, stream.held_out))
    still_open = sum(shard.epoch == epoch and not shard.given_up for shard in ledger.open)
    quarantined = sum(shard.epoch == epoch for shard in ledger.set_aside)
    accounted = ledger.finished_in_epoch + still_open + quarantined
    if accounted == leased <= shards:
        return []
    return [
        f"ledger: epoch {epoch} has given out {leased} of {shards} shards, and knows of {accounted}: "
        f"{ledger.finished_in_epoch} finished, {still_open} open, {quarantined} quarantined"
    ]


def violations(ledger: LedgerState) -> list[str]:
    """Broken invariants that the trainer itself has counted. It resumes all the same."""
    return [
        f"the trainer itself has counted {count} breaches of {name}: keep the checkpoint and report it"
        for name, count in ledger.breaches.items()
        if count
    ]


def tensor_faults(tensors: CheckpointTensors) -> list[str]:
    """Weights, moments and statistics that are not finite."""
    return [
        f"checkpoint: sae/{name}/{key} holds NaN or infinity: detach that SAE, or go back to a checkpoint before"
        for name, sae in tensors.saes.items()
        for key, tensor in sae.by_key().items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]


def _repeated(values: Iterable[Value]) -> list[Value]:
    return [value for value, count in Counter(values).items() if count > 1]
