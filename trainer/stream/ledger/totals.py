"""Totals: the ledger's numbers for reports."""

from __future__ import annotations

from trainer.report import StreamReport
from trainer.stream.ledger.ledger import Ledger
from trainer.stream.ledger.shards import ShardState


def stream_report(ledger: Ledger) -> StreamReport:
    """The numbers of the stream, without those of waiting."""
    shards = ledger.shards.counts()
    working = sum(bool(session.leases) for session in ledger.sessions.values())
    return StreamReport(
        producers={"working": working, "idle": len(ledger.sessions) - working},
        leases={
            "free": shards[ShardState.FREE],
            "leased": shards[ShardState.LEASED],
            "received": shards[ShardState.RECEIVED],
            "trained": shards[ShardState.TRAINED],
            "set_aside": shards[ShardState.QUARANTINED],
        },
        epoch=ledger.shards.epoch,
        tokens_received=ledger.tokens_received,
        tokens_quarantined=ledger.quarantine.tokens,
        suspect_shards=len(ledger.shards.suspects()),
        rows_rejected=dict(ledger.rejected),
        rows_discarded=ledger.tokens_dropped,
        protocol_errors=dict(ledger.errors),
        auth_failures=ledger.auth_failures,
        breaches=ledger.invariants.counts(),
        credit_rows_outstanding=ledger.tokens_credited,
        sessions_lost=ledger.sessions_lost,
        tokens_by_corpus=dict(ledger.shards.tokens_by_corpus),
        revision=ledger.shards.revisions.of_epoch(ledger.shards.epoch),
    )
