"""The ledger in a checkpoint: its counters, and one bit per position of an open shard for trained and dropped.

Sessions, leases, credit and buffered activations are not kept: producers start new sessions, and what was buffered is
leased again.
"""

from __future__ import annotations

from collections import Counter

from trainer.state.format import LedgerState, OpenShardState, QuarantinedShardState, ShardBits
from trainer.stream.ledger.ledger import Ledger
from trainer.stream.ledger.shards import QuarantinedShard, ShardState, count_bits


def ledger_state(ledger: Ledger) -> tuple[LedgerState, dict[int, ShardBits]]:
    """Copies of the ledger's counters, and of the bits of open shards by serial."""
    shards, quarantined = list(ledger.shards.open.values()), ledger.shards.quarantined
    state = LedgerState(
        run=ledger.run,
        seed=ledger.shards.seed,
        stream=ledger.identity.hello,
        norm_bounds=ledger.identity.norm_bounds,
        epoch=ledger.shards.epoch,
        cursor=ledger.shards.cursor,
        next_serial=ledger.shards.next_serial,
        finished_in_epoch=ledger.shards.trained_in_epoch,
        rows_trained=ledger.tokens_trained,
        rows_discarded=ledger.tokens_dropped,
        rows_set_aside=sum(shard.rows or 0 for shard in quarantined),
        set_aside=[QuarantinedShardState(**vars(shard)) for shard in quarantined],
        sessions_lost=ledger.sessions_lost,
        rejected=dict(ledger.rejected),
        errors=dict(ledger.errors),
        auth_failures=ledger.auth_failures,
        breaches=dict(ledger.invariants.violations),
        trained_by_corpus=dict(ledger.shards.tokens_by_corpus),
        trained_by_revision=dict(ledger.shards.revisions.tokens),
        newest_revision=ledger.shards.revisions.newest,
        newest_revision_number=ledger.shards.revisions.newest_number,
        revision_bounds=dict(ledger.shards.revisions.bounds),
        open=[
            OpenShardState(
                serial=shard.serial,
                epoch=shard.epoch,
                shard=shard.shard,
                positions=len(shard.mask),
                attempt=shard.attempt,
                rows=shard.rows,
                failures=shard.failures,
                deaths=shard.deaths,
                given_up=shard.state is ShardState.QUARANTINED,
                revision=shard.revision,
            )
            for shard in shards
        ],
    )
    return state, {shard.serial: ShardBits.pack(shard.trained, shard.dropped) for shard in shards}


def restore_ledger(ledger: Ledger, state: LedgerState, bits: dict[int, ShardBits]) -> None:
    """Restores the counters and shards of a new ledger; activations that were buffered are missing again."""
    ledger.run = state.run
    ledger.identity.hello = state.stream
    ledger.identity.is_settled = state.stream is not None
    ledger.identity.norm_bounds = state.norm_bounds
    ledger.tokens_trained = ledger.tokens_received = state.rows_trained
    ledger.tokens_dropped = state.rows_discarded
    ledger.sessions_lost, ledger.auth_failures = state.sessions_lost, state.auth_failures
    ledger.rejected, ledger.errors = Counter(state.rejected), Counter(state.errors)
    ledger.invariants.violations = Counter(state.breaches)
    ledger.shards.seed = state.seed  # the cursor is one into that seed's order
    if state.stream is not None:
        ledger.shards.go_on(state.stream, state.epoch, state.cursor)
    ledger.shards.tokens_by_corpus = Counter(state.trained_by_corpus)
    revisions = ledger.shards.revisions
    revisions.tokens, revisions.bounds = Counter(state.trained_by_revision), dict(state.revision_bounds)
    revisions.newest, revisions.newest_number = state.newest_revision, state.newest_revision_number
    ledger.shards.trained_in_epoch = state.finished_in_epoch
    ledger.shards.next_serial = state.next_serial
    ledger.shards.quarantined = [QuarantinedShard(**vars(shard)) for shard in state.set_aside]
    for entry in state.open:
        shard = ledger.shards.new_shard(entry.serial, entry.epoch, entry.shard)
        shard.attempt, shard.rows = entry.attempt, entry.rows
        shard.failures, shard.deaths = entry.failures, entry.deaths
        shard.revision = entry.revision
        shard.trained, shard.dropped = bits[entry.serial].unpack(entry.positions)
        shard.mask = shard.trained | shard.dropped
        if entry.given_up:
            shard.state = ShardState.QUARANTINED
            ledger.shards.forget_buffered(shard)
        elif count_bits(shard.mask) == shard.rows:
            shard.state = ShardState.RECEIVED
        ledger.shards.open[shard.serial] = shard
        ledger.shards.close_if_trained(shard)
    if ledger.policy.quarantine_ends_run:
        ledger.retry_quarantined()  # the run had ended for them
