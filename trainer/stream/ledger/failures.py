"""Failures: when a shard that gives trouble is leased again, and when it is quarantined.

A leased shard is free again when its session ends, or when its producer reports it as broken (`Session.release`).
Without trouble it is then the next to be leased, for the activations that it lacks; this module delays or stops that.

A shard's faults and the deaths of producers are different things. That a producer reports its shard as broken counts
against the shard once the same producer has served another one, or when there is no other left to serve: a producer
that is broken itself, or a disk that is away for a while, quarantines nothing. A shard with FAILURES_ALLOWED such
failures is quarantined: listed, its bits kept, leased again only when a person asks for it. A shard on which producer
after producer is lost is never quarantined for that; it becomes a *suspect*, which is leased last. Shards in trouble
are leased again after a growing backoff.
"""

from __future__ import annotations

from collections.abc import Mapping

from trainer.stream.ledger.sessions import Session
from trainer.stream.ledger.shards import SUSPECT_DEATHS, FailureReport, OpenShard, ShardQueue, count_bits

FAILURES_ALLOWED = 3
"""A shard that was reported broken this often, by producers that serve others, is quarantined."""
MAX_BACKOFF = 3
"""A shard in trouble is not leased again for up to this many times `dead_seconds`."""
STUCK_SECONDS = 60.0
"""Between two notices while only shards in trouble are left."""


class Failures:
    """Keeps count of reports and deaths by shard, and quarantines shards in the queue."""

    def __init__(
        self, shards: ShardQueue, sessions: Mapping[str, Session], dead_seconds: float, counts_at_once: bool
    ) -> None:
        """`counts_at_once`: a report counts though its producer has served no other shard."""
        self.now = 0.0
        """Time of the ledger's last tick."""
        self._shards = shards
        self._sessions = sessions
        self._dead_seconds = dead_seconds
        self._counts_at_once = counts_at_once
        self._notices: list[str] = []
        self._notice_at: float | None = None
        """While only shards in trouble are left: when that was noticed, or said, last."""

    def add_notice(self, sentence: str) -> None:
        """Adds a sentence for the log."""
        self._notices.append(sentence)

    def pop_notices(self) -> list[str]:
        """Notices for the operator since the last call, in sentences."""
        notices, self._notices = self._notices, []
        return notices

    def record_report(self, shard: OpenShard, producer: str, report: FailureReport) -> None:
        """A producer reports its shard as broken; that counts when the producer is known to be sound."""
        shard.last_report = report
        shard.reporters[producer] = False
        self._back_off(shard)
        if self._counts_at_once or not self._has_comparison(shard):
            shard.reporters[producer] = True
            self._count_failure(shard)

    def confirm_reports(self, producer: str) -> None:
        """A producer has served a shard: what it reported of others since it last did is true."""
        for shard in list(self._shards.open.values()):
            if shard.reporters.pop(producer, True) is False:
                self._count_failure(shard)

    def record_death(self, shard: OpenShard) -> None:
        """A producer was lost before it sent anything of its shard: that may be the shard's doing, or not."""
        shard.deaths += 1
        if not shard.is_suspect:
            return
        self._back_off(shard)
        # At 3, 6, 12, 24 … deaths.
        if shard.deaths % SUSPECT_DEATHS == 0 and (shard.deaths // SUSPECT_DEATHS).bit_count() == 1:
            self._notices.append(
                f"{shard.deaths} producers in a row were lost on {shard} before they sent any of it; it is leased "
                "last, and not given up: do they lack memory, or end at once for another reason? Their logs tell"
            )

    def notice_if_stuck(self) -> None:
        """Adds a notice every STUCK_SECONDS while the run waits for nothing but shards in trouble."""
        pending = list(self._shards.pending())
        if not pending or self._shards.has_fresh or not all(shard.is_in_trouble for shard in pending):
            self._notice_at = None
        elif self._notice_at is None:
            self._notice_at = self.now
        elif self.now - self._notice_at >= STUCK_SECONDS:
            self._notice_at = self.now
            suspects = sum(shard.is_suspect for shard in pending)
            first = pending[0]
            self._notices.append(
                f"the run waits for its last {len(pending)} shards: producers were lost on {suspects} of them, and "
                f"{len(pending) - suspects} were reported as broken; the first is {first}, tried {first.attempt} "
                f"times; {len(self._sessions)} producers are here"
            )

    def _back_off(self, shard: OpenShard) -> None:
        """Delays the next lease of this shard, each time for longer; the first retry comes at once."""
        shard.retry_at = self.now + min(shard.setbacks, MAX_BACKOFF) * self._dead_seconds
        shard.setbacks += 1

    def _has_comparison(self, shard: OpenShard) -> bool:
        """Whether a shard not in trouble, or a producer that has not failed on this one, can show which is broken."""
        return (
            self._shards.has_fresh
            or any(other is not shard and not other.is_in_trouble for other in self._shards.pending())
            or any(session.hello.producer not in shard.reporters for session in self._sessions.values())
        )

    def _count_failure(self, shard: OpenShard) -> None:
        report = shard.last_report
        assert report is not None
        shard.failures += 1
        if shard.holder is not None or not (shard.failures >= FAILURES_ALLOWED or report.is_final):
            return
        if report.rows == 0 == count_bits(shard.mask):
            self._shards.complete(shard, 0)
        else:
            self._quarantine(shard, report)

    def _quarantine(self, shard: OpenShard, report: FailureReport) -> None:
        missing = self._shards.set_quarantined(shard, report).rows
        tokens = "an unknown number of tokens" if missing is None else f"{missing:,} tokens"
        self._notices.append(
            f"{shard} is quarantined, {tokens} of it are not trained on: {report.reason!r}; "
            f"{len(self._shards.quarantined)} of {self._shards.next_serial} shards are; "
            "`ctl RUN_DIR retry-quarantined` tries again"
        )
