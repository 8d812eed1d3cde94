"""The ledger by example. One shard here is 3 windows of 4 positions; the first of each window is dropped: 9 tokens.

window   0        1        2
position 0123     4567     89..
kept     .###     .###     .###
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from producer.wire import (
    Bye,
    Chunk,
    Credit,
    Drain,
    Heartbeat,
    Hello,
    Hook,
    Lease,
    Message,
    Reject,
    ShardEnd,
    ShardFail,
    Welcome,
    decode,
    encode,
    held_out_shards,
    pack_bits,
    unpack_bits,
)
from tests.small_run import ledger_through_json
from trainer.state.format import QuarantinedShardState
from trainer.stream.ledger.credit import CHUNKS_IN_FLIGHT
from trainer.stream.ledger.failures import FAILURES_ALLOWED, MAX_BACKOFF, STUCK_SECONDS
from trainer.stream.ledger.ledger import AcceptedChunk, Ledger, Limits
from trainer.stream.ledger.phase import StreamPhase
from trainer.stream.ledger.resume import ledger_state, restore_ledger
from trainer.stream.ledger.sessions import Send
from trainer.stream.ledger.shards import MAX_POSITIONS, SUSPECT_DEATHS, QuarantinedShard, ShardState
from trainer.stream.ledger.totals import stream_report

CONTEXT, WINDOWS, WIDTH = 4, 3, 2
ROW_BYTES = WIDTH * 4
ROWS = 9


def make_ledger(
    capacity: int = 24, epochs: int | None = 1, incarnation: str = "first", seed: int = 0, **expected: Any
) -> Ledger:
    limits = Limits(capacity, seed, epochs, 1.0, dead_seconds=10.0, stall_seconds=30.0, expected=expected)
    return Ledger(limits, "run", incarnation, ["tcp://here"])


def hello(producer: str = "ada", session: str | None = None, **changes: Any) -> Hello:
    """Chunks of one window: 3 tokens, but 4 in the unit of credit."""
    facts: dict[str, Any] = {
        "fingerprint": "corpus", "shards": 2, "held_out": 0.0, "context": CONTEXT, "dtype": "float32",
        "hooks": [Hook(name="blocks.0.hook_resid_post", module="h.0", width=WIDTH)], "chunk_rows": CONTEXT,
        "norm_bounds": None, "provenance": {},
    }  # fmt: skip
    return Hello(producer=producer, session=session or f"{producer}-1", name=producer, **(facts | changes))


def join(ledger: Ledger, producer: str = "ada", now: float = 0.0, **changes: Any) -> list[Send]:
    """HELLO and the tick after it: WELCOME, leases and credit."""
    return ledger.hello(hello(producer, **changes), now) + ledger.tick(now)


def leases(sends: list[Send]) -> list[Lease]:
    return [send.message for send in sends if isinstance(send.message, Lease)]


def credit(sends: list[Send]) -> dict[str, int]:
    return {send.session: send.message.number for send in sends if isinstance(send.message, Credit)}


def rejects(sends: list[Send]) -> list[Reject]:
    return [send.message for send in sends if isinstance(send.message, Reject)]


def name_of(lease: Lease) -> dict[str, int]:
    return {"shard": lease.shard, "epoch": lease.epoch, "attempt": lease.attempt}


def window_chunk(lease: Lease, number: int, window: int, incarnation: str = "first", **changes: Any) -> Chunk:
    """The 3 tokens of one window."""
    fields: dict[str, Any] = name_of(lease) | {
        "number": number, "incarnation": incarnation, "first_window": window, "windows": 1, "rows": 3,
        "kept": pack_bits(np.array([0, 1, 1, 1], bool)), "outliers": b"",
    }  # fmt: skip
    return Chunk(**(fields | changes))


def receive(ledger: Ledger, session: str, chunk: Chunk, now: float = 0.0) -> tuple[AcceptedChunk | None, list[Send]]:
    return ledger.chunk(session, chunk, chunk.rows * ROW_BYTES, now)


def send_windows(ledger: Ledger, lease: Lease, first_number: int, windows: list[int], session: str = "ada-1") -> None:
    for number, window in enumerate(windows, first_number):
        accepted, _ = receive(ledger, session, window_chunk(lease, number, window, ledger.incarnation))
        assert accepted is not None


def end_of(lease: Lease, rows: int = ROWS) -> ShardEnd:
    return ShardEnd(**name_of(lease), rows=rows)


def serve(ledger: Ledger, lease: Lease, session: str = "ada-1") -> None:
    """Brings a shard whole: one window, all of it outliers, so that nothing waits in the buffer."""
    number, outliers = ledger.sessions[session].received + 1, pack_bits(np.array([0, 1, 1, 1], bool))
    nothing = {"rows": 0, "kept": pack_bits(np.zeros(4, bool)), "outliers": outliers}
    accepted, _ = receive(ledger, session, window_chunk(lease, number, 0, ledger.incarnation, **nothing))
    assert accepted is not None
    ledger.shard_end(session, end_of(lease, rows=3), now=0.0)


def fail(ledger: Ledger, lease: Lease, session: str = "ada-1", retry: bool = True) -> None:
    ledger.shard_fail(session, ShardFail(**name_of(lease), error="bad page", retry=retry), now=0.0)


def train(ledger: Ledger, *rows: tuple[int, int]) -> None:
    """A step on these (serial, position)."""
    serial, position = np.array(rows).T
    ledger.mark_trained(serial, position)


def restart(ledger: Ledger, **changes: Any) -> Ledger:
    """The trainer crashes and comes back with a checkpoint of this moment."""
    document, bits = ledger_state(ledger)
    successor = make_ledger(**({"capacity": ledger.limits.capacity, "incarnation": "second"} | changes))
    restore_ledger(successor, ledger_through_json(document), bits)
    return successor


# Joining


def test_first_producer_is_welcomed_and_decides_what_the_run_streams() -> None:
    """The first HELLO is frozen: its corpus is the run's, its norm bounds are everyone's."""
    ledger = make_ledger()
    ledger.hello(hello("ada", norm_bounds=[12.5]), now=0.0)
    (send,) = ledger.hello(hello("bob", norm_bounds=[99.0]), now=0.0)
    assert isinstance(send.message, Welcome)
    assert (send.message.run, send.message.incarnation, send.message.norm_bounds) == ("run", "first", [12.5])


@pytest.mark.parametrize(
    ("change", "ours", "theirs"),
    [
        ({"fingerprint": "other"}, "corpus", "other"),
        ({"shards": 3}, "2", "3"),
        ({"dtype": "bfloat16"}, "float32", "bfloat16"),
        ({"hooks": [Hook(name="blocks.0.hook_resid_post", module="h.0", width=5)]}, "width 2", "width 5"),
    ],
)
def test_producer_of_another_stream_is_refused_for_good(change: dict[str, Any], ours: str, theirs: str) -> None:
    """It is told both values and not to come back; the run goes on undisturbed."""
    ledger = make_ledger()
    send_windows(ledger, leases(join(ledger))[0], 1, [0])
    (reject,) = rejects(ledger.hello(hello("eve", **change), now=0.0))
    assert not reject.retry and reject.code == "mismatch"
    assert ours in reject.reason and theirs in reject.reason
    assert list(ledger.sessions) == ["ada-1"]


def test_hooked_input_is_the_same_stream_when_only_the_module_was_named() -> None:
    """A run of 0.1.0, whose producers named the module without `:input`, goes on with producers that add it."""
    ledger = make_ledger()
    hooks = [Hook(name="blocks.1.hook_resid_pre", module="h.1", width=WIDTH)]
    now = [Hook(name="blocks.1.hook_resid_pre", module="h.1:input", width=WIDTH)]
    join(ledger, hooks=hooks)
    assert not rejects(ledger.hello(hello("eve", hooks=now), now=0.0))
    elsewhere = [Hook(name="blocks.1.hook_resid_pre", module="h.2:input", width=WIDTH)]
    assert rejects(ledger.hello(hello("eva", hooks=elsewhere), now=0.0))


def test_nothing_is_settled_before_the_first_row() -> None:
    """A producer that differs may come again; when those that it differs from have left, its corpus is the run's."""
    ledger = make_ledger()
    join(ledger, norm_bounds=[12.5])
    other = {"fingerprint": "other", "shards": 3, "norm_bounds": [99.0]}
    (reject,) = rejects(ledger.hello(hello("bob", **other), now=0.0))
    assert reject.retry and reject.code == "mismatch"
    assert not ledger.identity.is_settled and ledger.identity.hello is not None and ledger.identity.hello.shards == 2

    ledger.bye("ada-1", Bye(), 0.0)
    sends = join(ledger, "bob", **other)
    assert (ledger.identity.hello.shards, ledger.identity.norm_bounds) == (3, [99.0])
    assert len(leases(sends)) == 2 and stream_report(ledger).leases["free"] == 1
    send_windows(ledger, leases(sends)[0], 1, [0], session="bob-1")
    ledger.bye("bob-1", Bye(), 0.0)
    (reject,) = rejects(ledger.hello(hello("ada"), now=0.0))
    assert ledger.identity.is_settled and not reject.retry


def test_only_rows_settle_the_stream() -> None:
    """Not the end of a shard that is said to have none; what a checkpoint holds is settled."""
    ledger = make_ledger()
    first, second = leases(join(ledger))
    ledger.shard_end("ada-1", end_of(first, 0), 0.0)
    assert not ledger.identity.is_settled and not restart(make_ledger()).identity.is_settled
    send_windows(ledger, second, 1, [0])
    assert ledger.identity.is_settled and restart(ledger).identity.is_settled


def test_a_refusal_tells_each_fact_once() -> None:
    """Though the run file and the stream that goes on both know it."""
    ledger = make_ledger(dtype="float32", context=CONTEXT, held_out=0.0)
    send_windows(ledger, leases(join(ledger, provenance={"context": CONTEXT}))[0], 1, [0])
    changes = {"fingerprint": "other", "dtype": "bfloat16", "context": 9, "provenance": {"context": 9}}
    (reject,) = rejects(ledger.hello(hello("eve", **changes), now=0.0))

    assert reject.reason.count("context differs") == reject.reason.count("dtype differs") == 1


def test_rows_that_could_not_be_inserted_are_missing() -> None:
    """An exception on their way into the buffer leaves the books as they were; they come again under another lease."""
    ledger = make_ledger()
    (lease, _) = leases(join(ledger))

    def fail(accepted: AcceptedChunk) -> None:
        raise MemoryError

    chunk = window_chunk(lease, 1, 0)
    with pytest.raises(MemoryError):
        ledger.chunk("ada-1", chunk, chunk.rows * ROW_BYTES, 0.0, fail)
    assert (ledger.tokens_received, ledger.tokens_buffered, ledger.identity.is_settled) == (0, 0, False)
    ledger.reject("ada-1", "internal", "a fault")
    (again, _) = leases(join(ledger, session="ada-2"))
    send_windows(ledger, again, 1, [0], session="ada-2")
    assert ledger.tokens_received == 3


def test_many_differences_are_told_from_the_first_one_on() -> None:
    """Another model differs in a hundred facts: the sentence fits the wire, and begins with what tells most."""
    ledger = make_ledger()
    send_windows(ledger, leases(join(ledger))[0], 1, [0])
    facts = {f"fact {number}": "x" * 40 for number in range(100)}
    (reject,) = rejects(ledger.hello(hello("eve", fingerprint="other", dtype="bfloat16", provenance=facts), now=0.0))

    assert reject.reason.startswith("dtype differs: this run streams float32, the producer bfloat16")
    assert reject.reason.endswith("start a new run directory")
    assert decode(encode(reject)) == reject


@pytest.mark.parametrize("change", [{"chunk_rows": 7}, {"chunk_rows": 2**23}])
def test_producer_with_too_large_chunks_is_refused_and_decides_nothing(change: dict[str, Any]) -> None:
    """A buffer of 24 tokens must hold four chunks, and a message has a largest size."""
    ledger = make_ledger(capacity=24)
    (reject,) = rejects(ledger.hello(hello("eve", **change), now=0.0))
    assert not reject.retry
    assert ledger.identity.hello is None
    assert [type(send.message) for send in ledger.hello(hello("ada"), now=0.0)] == [Welcome]


@pytest.mark.parametrize(
    ("context", "width", "chunk_rows", "advice"),
    [
        (4, 2, 8, "raise buffer.rows to 32"),  # two windows: with shorter ones it would be more of them
        (100, 2, 100, "raise buffer.rows to 400"),  # one window: shorter ones would come several to a chunk
        (100, 90_000, 100, "raise buffer.rows to 400, or lower corpus.context"),  # rows so large that they would not
    ],
)
def test_advice_for_a_small_buffer_is_what_mends_it(context: int, width: int, chunk_rows: int, advice: str) -> None:
    """A shorter context is named only where it makes chunks smaller."""
    hooks = [Hook(name="blocks.0.hook_resid_post", module="h.0", width=width)]
    large = hello("eve", context=context, chunk_rows=chunk_rows, hooks=hooks)
    (reject,) = rejects(make_ledger(capacity=24).hello(large, now=0.0))

    assert reject.reason.endswith(f"fewer than four chunks of {chunk_rows} activations; {advice}")


# Hooks that are forgotten


def test_a_forgotten_hook_is_asked_for_no_longer() -> None:
    """Leases name the others. Chunks may still bring it; what lacks another hook, or names one twice, is rejected."""
    hooks = [Hook(name=name, module=name, width=WIDTH) for name in ("a", "b", "c")]
    ledger = make_ledger(capacity=96)
    (lease, *_) = leases(join(ledger, hooks=hooks, shards=8))
    assert lease.hooks == []
    ledger.shards.forgotten_hooks = {"b"}
    (later, *_) = leases(join(ledger, "bob", hooks=hooks, shards=8))
    assert later.hooks == [0, 2]

    row = ROW_BYTES
    assert ledger.chunk("ada-1", window_chunk(lease, 1, 0), 3 * 3 * row, 0.0)[0] is not None
    assert ledger.chunk("bob-1", window_chunk(later, 1, 0, hooks=[0, 2]), 3 * 2 * row, 0.0)[0] is not None
    for number, numbers, fault in ((2, [0], "lacks hook c"), (1, [0, 2, 2], "chunk of hooks"), (1, [0, 2, 3], "hooks")):
        (reject,) = rejects(ledger.chunk("bob-1", window_chunk(later, number, 1, hooks=numbers), 3 * row, 0.0)[1])
        assert fault in reject.reason
        (later, *_) = leases(join(ledger, "bob", hooks=hooks, shards=8))


# Leases


def test_producer_gets_one_shard_to_work_on_and_one_to_wait() -> None:
    """Two leases each, so that nobody waits for the next; a third shard stays free."""
    ledger = make_ledger()
    assert len(leases(join(ledger, shards=3))) == 2
    assert stream_report(ledger).leases == {"free": 1, "leased": 2, "received": 0, "trained": 0, "set_aside": 0}


def test_shards_are_spread_evenly() -> None:
    """With two shards and two producers, each gets one."""
    ledger = make_ledger()
    ledger.hello(hello("ada"), now=0.0)
    sends = join(ledger, "bob")
    assert {send.session for send in sends if isinstance(send.message, Lease)} == {"ada-1", "bob-1"}


def test_each_epoch_has_an_order_of_its_own_without_the_held_out_shards() -> None:
    """The order is a function of seed and epoch; over an epoch each training shard comes once."""
    ledger = make_ledger(epochs=2)
    order: list[tuple[int, int]] = []
    sends = join(ledger, shards=40, held_out=0.1)
    while new_leases := leases(sends):
        for lease in new_leases:
            order.append((lease.epoch, lease.shard))
            serve(ledger, lease)
        sends = ledger.tick(0.0)
    first, second = ([shard for epoch, shard in order if epoch == one] for one in (0, 1))
    expected = sorted(set(range(40)) - set(held_out_shards(40, 0.1)))
    assert sorted(first) == sorted(second) == expected and len(expected) == 36
    assert first != second
    assert ledger.shards.is_exhausted


def test_endless_run_is_never_exhausted() -> None:
    """Without a number of epochs there is always a next one."""
    ledger = make_ledger(epochs=None)
    sends = join(ledger, shards=1)
    for _ in range(5):
        for lease in leases(sends):
            serve(ledger, lease)
        assert not ledger.shards.is_exhausted
        sends = ledger.tick(0.0)
    assert ledger.shards.epoch >= 5


# Credit


def test_credit_is_absolute_and_fills_the_buffer_no_further() -> None:
    """24 tokens of buffer are 6 chunks of at most 4 tokens."""
    ledger = make_ledger(capacity=24)
    sends = join(ledger)
    (lease, _) = leases(sends)
    assert credit(sends) == {"ada-1": 6}
    send_windows(ledger, lease, 1, [0, 1])
    # 6 rows are buffered and 16 promised: the 2 left over hold no chunk.
    assert credit(ledger.tick(0.0)) == {}
    assert (ledger.tokens_buffered, ledger.tokens_credited) == (6, 16)
    train(ledger, (0, 1), (0, 2), (0, 3))
    assert credit(ledger.tick(0.0)) == {"ada-1": 7}


def test_nobody_gets_more_than_a_few_chunks_ahead() -> None:
    """However large the buffer, one producer has at most CHUNKS_IN_FLIGHT under way."""
    assert credit(join(make_ledger(capacity=10_000))) == {"ada-1": CHUNKS_IN_FLIGHT}


def test_credit_is_shared_by_those_who_have_work() -> None:
    """Two producers with a shard each get three chunks each; a third without a shard gets none."""
    ledger = make_ledger(capacity=24)
    for producer in ("ada", "bob", "cyd"):
        ledger.hello(hello(producer), now=0.0)
    assert credit(ledger.tick(0.0)) == {"ada-1": 3, "bob-1": 3}


def test_scarce_credit_goes_round() -> None:
    """When room for one chunk comes at a time, producers take turns instead of the first taking all."""
    ledger = make_ledger(capacity=16)
    ledger.hello(hello("ada", shards=4), now=0.0)
    sends = join(ledger, "bob", shards=4)
    lease_of = {send.session: send.message for send in reversed(sends) if isinstance(send.message, Lease)}
    full = {"rows": 4, "kept": pack_bits(np.ones(4, bool))}
    chunk_count = {"ada-1": 0, "bob-1": 0}
    buffered: list[tuple[int, int]] = []
    for _ in range(12):
        for session, lease in lease_of.items():
            while chunk_count[session] < ledger.sessions[session].granted:
                chunk = window_chunk(lease, chunk_count[session] + 1, chunk_count[session], **full)
                accepted, _ = receive(ledger, session, chunk)
                assert accepted is not None
                buffered += [(accepted.serial, at) for at in accepted.position.tolist()]
                chunk_count[session] += 1
        train(ledger, *buffered[:4])
        del buffered[:4]
        ledger.tick(0.0)
    assert abs(chunk_count["ada-1"] - chunk_count["bob-1"]) <= 1


def test_idle_producer_does_not_sit_on_the_credit_that_another_needs() -> None:
    """Ada holds the last credit when her last shard ends; her session ends too: Bob can go on. (Was a deadlock.)"""
    ledger = make_ledger(capacity=16)
    sends = join(ledger)
    assert credit(sends) == {"ada-1": 4}
    first, second = leases(sends)
    ledger.shard_fail("ada-1", ShardFail(**name_of(second), error="no", retry=True), now=0.0)
    sends = join(ledger, "bob")
    assert [lease.shard for lease in leases(sends)] == [second.shard] and not credit(sends)
    send_windows(ledger, first, 1, [0, 1, 2])
    ledger.shard_end("ada-1", end_of(first), now=0.0)
    sends = ledger.tick(0.0)
    (reject,) = rejects(sends)
    assert reject.code == "idle" and reject.retry
    assert credit(sends) == {"bob-1": 1}  # 9 of 16 rows are buffered
    assert list(ledger.sessions) == ["bob-1"] and ledger.sessions_lost == 0


# Chunks


def test_chunk_moves_its_rows_from_promised_to_buffered() -> None:
    """The tokens of window 1 are positions 5, 6 and 7."""
    ledger = make_ledger()
    lease, _ = leases(join(ledger))
    accepted, sends = receive(ledger, "ada-1", window_chunk(lease, 1, window=1))
    assert accepted is not None and not sends
    assert accepted.position.tolist() == [5, 6, 7]
    assert (ledger.tokens_received, ledger.tokens_buffered, ledger.tokens_credited) == (3, 3, 20)


def test_outliers_are_discarded_by_name() -> None:
    """A token named as an outlier is neither buffered nor asked for again."""
    ledger = make_ledger()
    lease, _ = leases(join(ledger))
    mask, outliers = pack_bits(np.array([0, 1, 0, 1], bool)), pack_bits(np.array([0, 0, 1, 0], bool))
    accepted, _ = receive(ledger, "ada-1", window_chunk(lease, 1, 0, rows=2, kept=mask, outliers=outliers))
    assert accepted is not None and accepted.position.tolist() == [1, 3]
    assert (ledger.tokens_received, ledger.tokens_dropped) == (2, 1)
    ledger.shard_end("ada-1", end_of(lease, rows=3), now=0.0)
    assert stream_report(ledger).leases["received"] == 1


def test_chunk_of_outliers_alone_is_taken() -> None:
    """It brings no token, uses its number, and is progress."""
    ledger = make_ledger()
    lease, _ = leases(join(ledger))
    mask, outliers = pack_bits(np.zeros(4, bool)), pack_bits(np.array([0, 1, 1, 1], bool))
    accepted, _ = receive(ledger, "ada-1", window_chunk(lease, 1, 0, rows=0, kept=mask, outliers=outliers))
    assert accepted is not None and len(accepted.position) == 0
    send_windows(ledger, lease, 2, [1, 2])
    ledger.shard_end("ada-1", end_of(lease), now=0.0)
    assert (ledger.tokens_buffered, ledger.tokens_dropped) == (6, 3)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"number": 2}, "gap"),
        ({"number": 0}, "gap"),
        ({"incarnation": "zeroth"}, "incarnation"),
        ({"rows": 2}, "shape"),
        ({"rows": 5, "kept": b"\x3e", "windows": 2}, "shape"),
        ({"kept": b"\x0e\x00"}, "shape"),
        ({"kept": b""}, "shape"),
        ({"outliers": b"\x00\x00"}, "shape"),
        ({"outliers": b"\x02"}, "duplicate"),
        ({"windows": 2**20}, "shape"),
        ({"first_window": 2**47}, "shape"),
        ({"first_window": MAX_POSITIONS // CONTEXT}, "shape"),
    ],
)
def test_faulty_chunk_ends_the_session(changes: dict[str, Any], code: str) -> None:
    """Its tokens are counted under the fault and not taken, leases and credit return; the producer may come back."""
    ledger = make_ledger()
    lease, _ = leases(join(ledger))
    chunk = window_chunk(lease, **({"number": 1, "window": 0} | changes))
    accepted, sends = receive(ledger, "ada-1", chunk)
    (reject,) = rejects(sends)
    assert accepted is None and (reject.code, reject.retry) == (code, True)
    assert ledger.rejected[code] == chunk.rows and ledger.errors[code] == 1
    assert not ledger.sessions and ledger.tokens_credited == 0 and ledger.tokens_received == 0
    assert stream_report(ledger).leases["free"] == 2


def test_payload_of_another_size_ends_the_session() -> None:
    """3 tokens of 2 float32 are 24 bytes, not 23."""
    ledger = make_ledger()
    lease, _ = leases(join(ledger))
    accepted, sends = ledger.chunk("ada-1", window_chunk(lease, 1, 0), payload_bytes=23, now=0.0)
    assert accepted is None and rejects(sends)[0].code == "shape"


def test_chunk_beyond_the_credit_ends_the_session() -> None:
    """Six chunks were granted; the seventh would overrun the buffer."""
    ledger = make_ledger(capacity=24)
    lease, _ = leases(join(ledger))
    send_windows(ledger, lease, 1, [0, 1, 2, 3, 4, 5])
    accepted, sends = receive(ledger, "ada-1", window_chunk(lease, 7, 6))
    assert accepted is None and rejects(sends)[0].code == "credit"


def test_row_is_never_taken_twice() -> None:
    """A window that comes again in the same session ends it, even when only one token of it is old."""
    ledger = make_ledger()
    lease, _ = leases(join(ledger))
    receive(ledger, "ada-1", window_chunk(lease, 1, 0, rows=1, kept=b"\x02"))
    accepted, sends = receive(ledger, "ada-1", window_chunk(lease, 2, 0))
    assert accepted is None and rejects(sends)[0].code == "duplicate"
    assert ledger.tokens_received == 1


def test_chunk_of_an_old_attempt_is_fenced_and_counted() -> None:
    """Ada reports her shard as failed and gets it again as attempt 2; what she had still sent for attempt 1 is refused.

    That is no fault of hers: the session goes on.
    """
    ledger = make_ledger()
    old, _ = leases(join(ledger))
    ledger.shard_fail("ada-1", ShardFail(**name_of(old), error="disk", retry=True), now=0.0)
    (new,) = leases(ledger.tick(0.0))
    assert (new.shard, new.attempt) == (old.shard, 2)
    assert receive(ledger, "ada-1", window_chunk(old, 1, 0)) == (None, [])
    assert ledger.rejected == {"fenced": 3} and ledger.tokens_received == 0
    send_windows(ledger, new, 2, [0])
    assert ledger.tokens_received == 3


def test_chunk_for_the_lease_of_another_is_fenced() -> None:
    """Who a shard is leased to counts, not only its number and attempt."""
    ledger = make_ledger()
    ledger.hello(hello("ada"), now=0.0)
    sends = join(ledger, "bob")
    (bobs,) = (send.message for send in sends if isinstance(send.message, Lease) and send.session == "bob-1")
    assert receive(ledger, "ada-1", window_chunk(bobs, 1, 0)) == (None, [])
    assert ledger.rejected == {"fenced": 3}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_chunk_costs_little_memory() -> None:
    """The farthest window a shard may have, or a claim of 2^37 positions, makes the ledger touch no new memory."""
    ledger = make_ledger()
    lease, _ = leases(join(ledger))
    before = resident_bytes()
    accepted, _ = receive(ledger, "ada-1", window_chunk(lease, 1, MAX_POSITIONS // CONTEXT - 1))
    assert accepted is not None and accepted.position[-1] == MAX_POSITIONS - 1
    receive(ledger, "ada-1", window_chunk(lease, 2, 0, windows=2**20))
    assert resident_bytes() - before < 16 * 2**20
    assert not ledger.sessions


def test_lease_mask_never_exceeds_a_message() -> None:
    """Growing the bits ahead of need stops at what one mask may name."""
    ledger = make_ledger(capacity=64)
    lease, _ = leases(join(ledger))
    for number, window in enumerate((0, MAX_POSITIONS // CONTEXT * 4 // 5, MAX_POSITIONS // CONTEXT * 4 // 5 + 1), 1):
        receive(ledger, "ada-1", window_chunk(lease, number, window))
    assert len(ledger.shards.open[0].mask) <= MAX_POSITIONS


# The end of a shard


def test_shard_is_closed_when_its_last_row_is_trained() -> None:
    """Received is not trained: the shard stays open until the step that consumes its last token."""
    ledger = make_ledger()
    lease, _ = leases(join(ledger))
    send_windows(ledger, lease, 1, [0, 1, 2])
    ledger.shard_end("ada-1", end_of(lease), now=0.0)
    train(ledger, *((0, at) for at in (1, 2, 3, 5, 6, 7, 9, 10)))
    assert stream_report(ledger).leases["received"] == 1
    train(ledger, (0, 11))
    assert 0 not in ledger.shards.open
    assert (ledger.tokens_trained, ledger.tokens_buffered, stream_report(ledger).leases["trained"]) == (9, 0, 1)


def test_books_that_do_not_balance_are_counted_and_told() -> None:
    """A token that a step names twice, and a buffer that holds more than was received; kept over a restart."""
    ledger = make_ledger()
    first = leases(join(ledger))[0]
    send_windows(ledger, first, 1, [0, 1])
    train(ledger, (0, 1), (0, 2))
    assert ledger.audit(in_buffer=4) == []
    assert sum(stream_report(ledger).breaches.values()) == 0

    train(ledger, (0, 2))
    faults = ledger.audit(in_buffer=5)

    assert len(faults) == 2 and "trained twice" in faults[0] and "the buffer holds 5 tokens, the ledger 3" in faults[1]
    assert ledger.audit(in_buffer=3) == []
    assert stream_report(restart(ledger)).breaches == {"trained_once": 1, "rows_accounted": 1, "memory_bound": 0}


def test_shard_that_came_short_is_leased_again_without_what_is_here() -> None:
    """One window never arrived; the next lease masks the other two, and its holder need send only the third."""
    ledger = make_ledger()
    lease, _ = leases(join(ledger))
    send_windows(ledger, lease, 1, [0, 2])
    ledger.shard_end("ada-1", end_of(lease), now=0.0)
    assert ledger.errors["short_shard"] == 1
    (send,) = (send for send in ledger.tick(0.0) if isinstance(send.message, Lease))
    assert send.message.attempt == 2 and send.payload is not None
    assert np.flatnonzero(unpack_bits(send.payload, 12)).tolist() == [1, 2, 3, 9, 10, 11]
    send_windows(ledger, send.message, 3, [1])
    ledger.shard_end("ada-1", end_of(send.message), now=0.0)
    assert stream_report(ledger).leases["received"] == 1


def test_end_of_an_old_attempt_ends_nothing() -> None:
    """A zombie that says it is done does not close the shard under its successor."""
    ledger = make_ledger()
    old, _ = leases(join(ledger))
    ledger.shard_fail("ada-1", ShardFail(**name_of(old), error="disk", retry=True), now=0.0)
    ledger.tick(0.0)
    ledger.shard_end("ada-1", end_of(old, rows=0), now=0.0)
    assert stream_report(ledger).leases["leased"] == 2


def test_an_empty_shard_is_believed_when_its_producer_serves_others() -> None:
    """Zero tokens of an untouched lease: three times, by a producer that brings tokens of others in between."""
    ledger = make_ledger()
    sends, now = join(ledger, shards=6), 0.0
    empty = leases(sends)[0].shard
    for turn in range(FAILURES_ALLOWED):
        lease_of = {lease.shard: lease for lease in leases(sends)}
        assert empty in lease_of and stream_report(ledger).leases["trained"] == turn
        ledger.shard_end("ada-1", end_of(lease_of.pop(empty), rows=0), now)
        serve(ledger, *lease_of.values())
        now += MAX_BACKOFF * 10.0
        ledger.sessions["ada-1"].last_heard = now
        sends = ledger.tick(now)
    assert ledger.errors["empty_shard"] == FAILURES_ALLOWED
    assert stream_report(ledger).leases["trained"] == FAILURES_ALLOWED + 1 and not ledger.shards.quarantined


def test_a_producer_that_calls_every_shard_empty_ends_none() -> None:
    """Eve skips her work; what she says costs nothing while there is somebody who does it."""
    ledger, now = make_ledger(capacity=64), 0.0
    join(ledger, "eve", shards=6)
    for _ in range(20):
        for lease in list(ledger.sessions["eve-1"].leases):
            ledger.shard_end("eve-1", ShardEnd(shard=lease.shard, epoch=0, attempt=lease.attempt, rows=0), now=0.0)
        now += MAX_BACKOFF * 10.0
        ledger.hello(hello("eve", shards=6), now)
        ledger.hello(hello("ada", shards=6), now)
        ledger.tick(now)
        for lease in list(ledger.sessions["ada-1"].leases):
            serve(ledger, Lease(shard=lease.shard, epoch=0, attempt=lease.attempt))
    assert ledger.shards.is_exhausted and ledger.tokens_dropped == 3 * 6 and not ledger.shards.quarantined


def test_run_is_exhausted_when_every_shard_is_here() -> None:
    """Received suffices: no further token will come, though some are not yet trained."""
    ledger = make_ledger()
    lease, other = leases(join(ledger))
    serve(ledger, other)
    send_windows(ledger, lease, 2, [0, 1, 2])
    assert not ledger.shards.is_exhausted
    ledger.shard_end("ada-1", end_of(lease), now=0.0)
    assert ledger.shards.is_exhausted and ledger.tokens_buffered == 9


# Shards that fail


def quarantine_first(ledger: Ledger, sends: list[Send]) -> tuple[Lease, float]:
    """Ada reports the first shard three times and serves another after each."""
    now = 0.0
    bad = leases(sends)[0]
    for _ in range(FAILURES_ALLOWED):
        lease_of = {lease.shard: lease for lease in leases(sends)}
        fail(ledger, lease_of.pop(bad.shard))
        serve(ledger, *lease_of.values())
        now += MAX_BACKOFF * 10.0
        ledger.sessions["ada-1"].last_heard = now
        sends = ledger.tick(now)
    return bad, now


def test_shard_that_fails_while_others_are_served_is_quarantined_and_listed() -> None:
    """What came of it is still trained; how much is missing is not known, and says so. The log is told."""
    ledger = make_ledger(capacity=64)
    sends = join(ledger, shards=6)
    send_windows(ledger, leases(sends)[0], 1, [0])
    bad, _ = quarantine_first(ledger, sends)
    assert ledger.shards.quarantined == [QuarantinedShard(0, bad.shard, rows=None, reason="bad page")]
    assert ledger.quarantine.tokens is None and stream_report(ledger).tokens_quarantined is None
    assert stream_report(ledger).leases == {"free": 0, "leased": 2, "received": 0, "trained": 3, "set_aside": 1}
    assert ledger.quarantine.ratio == 1 / 6
    (notice,) = ledger.failures.pop_notices()
    assert notice.startswith(f"shard {bad.shard} of epoch 0 is quarantined, an unknown number of tokens of it")
    assert "'bad page'; 1 of 4 shards" in notice and ledger.failures.pop_notices() == []
    train(ledger, (0, 1), (0, 2), (0, 3))
    assert ledger.tokens_trained == 3


def test_a_producer_that_fails_on_everything_quarantines_nothing() -> None:
    """Its own fault, or a disk that is away: as long as it serves nothing, what it says does not count."""
    ledger = make_ledger()
    sends = join(ledger, shards=6)
    for _ in range(50):
        for lease in leases(sends):
            fail(ledger, lease)
        sends = ledger.tick(0.0)
        if not ledger.shards.has_fresh_in_epoch:
            break
    assert not ledger.shards.quarantined and all(not shard.failures for shard in list(ledger.shards.open.values())[:4])


def test_quarantine_can_be_undone_also_after_a_restart() -> None:
    """Six of nine tokens had come; the retry asks for the other three, under a new attempt, and the list is empty."""
    ledger = make_ledger(capacity=64)
    sends = join(ledger, shards=6)
    send_windows(ledger, leases(sends)[0], 1, [0, 1])
    bad, now = quarantine_first(ledger, sends)
    train(ledger, *((0, at) for at in (1, 2, 3, 5, 6, 7)))
    successor = restart(ledger, capacity=64)
    assert [entry.shard for entry in successor.shards.quarantined] == [bad.shard]

    assert successor.retry_quarantined() == 1 and successor.retry_quarantined() == 0
    assert not successor.shards.quarantined and successor.quarantine.tokens == 0
    for _ in range(2):
        successor = restart(successor, capacity=64)  # the retry lasts
    sends = join(successor, session="ada-2", shards=6, now=now)
    (lease,) = (send for send in sends if isinstance(send.message, Lease) and send.message.shard == bad.shard)
    assert lease.payload is not None and isinstance(lease.message, Lease) and lease.message.attempt > bad.attempt
    assert np.flatnonzero(unpack_bits(lease.payload, 12)).tolist() == [1, 2, 3, 5, 6, 7]


def test_what_an_older_release_set_aside_stays_listed() -> None:
    """Its checkpoints keep no bits of closed shards: another try could train tokens twice."""
    ledger = make_ledger()
    join(ledger)
    document, bits = ledger_state(ledger)
    entry = {"epoch": 0, "shard": 9, "rows": 4, "reason": "3 producers in a row ended on it without sending a row"}
    document = replace(document, set_aside=[QuarantinedShardState(**entry)], rows_set_aside=4)
    successor = make_ledger(incarnation="second")
    restore_ledger(successor, document, bits)
    assert successor.retry_quarantined() == 0 and successor.shards.quarantined == [QuarantinedShard(**entry)]
    assert successor.quarantine.tokens == 4


def test_hopeless_shard_is_quarantined_at_once_but_not_before_another_is_served() -> None:
    """A producer that says so is believed the first time, if it is sound."""
    ledger = make_ledger()
    lease, other = leases(join(ledger, shards=3))
    fail(ledger, lease, retry=False)
    assert not ledger.shards.quarantined
    serve(ledger, other)
    assert [entry.reason for entry in ledger.shards.quarantined] == ["bad page"]


def test_rows_that_never_came_of_a_short_shard_are_counted() -> None:
    """A producer counts 9 tokens and sends 6, three times: the 3 that are missing are quarantined by number."""
    ledger = make_ledger()
    lease, other = leases(join(ledger))
    send_windows(ledger, lease, 1, [0, 1])
    serve(ledger, other)
    now = 0.0
    for _ in range(FAILURES_ALLOWED):
        ledger.shard_end("ada-1", end_of(lease), now)
        now += MAX_BACKOFF * 10.0
        ledger.sessions["ada-1"].last_heard = now
        (lease,) = leases(ledger.tick(now)) or (lease,)
    assert [entry.rows for entry in ledger.shards.quarantined] == [3]
    assert ledger.quarantine.tokens == 3


def test_last_shards_of_a_run_may_all_be_quarantined() -> None:
    """No other is left by which their producer could show that it is sound; the run ends all the same."""
    ledger = make_ledger()
    for lease in leases(join(ledger)):
        fail(ledger, lease, retry=False)
    for lease in leases(ledger.tick(0.0)):
        fail(ledger, lease, retry=False)
    assert ledger.shards.is_exhausted and len(ledger.shards.quarantined) == 2


def test_epochs_do_not_fly_past_when_nothing_can_be_served() -> None:
    """Every shard of an endless run is broken: it ends, in its first epoch."""
    ledger, now = make_ledger(epochs=None), 0.0
    sends = join(ledger)
    for _ in range(20):
        for lease in leases(sends):
            fail(ledger, lease)
        now += MAX_BACKOFF * 10.0
        if "ada-1" in ledger.sessions:
            ledger.sessions["ada-1"].last_heard = now
        sends = ledger.tick(now)
    assert ledger.shards.is_exhausted and ledger.shards.epoch == 0 and len(ledger.shards.quarantined) == 2


def test_poison_counts_against_the_shard_at_work_only() -> None:
    """A chunk of NaN is a report that its shard is broken; the one waiting behind it is not to blame."""
    ledger = make_ledger()
    assert len(leases(join(ledger))) == 2
    ledger.reject("ada-1", "non_finite", "chunk holds NaN", rows=3, blames_shard=True)
    at_work, waiting = ledger.shards.open.values()
    assert at_work.reporters == {"ada": False} and not waiting.reporters
    assert (waiting.failures, waiting.deaths, at_work.deaths) == (0, 0, 0)
    assert ledger.rejected == {"non_finite": 3}


def die_on_it(
    ledger: Ledger, deaths: int, before: Callable[[str, Lease], object] = lambda session, lease: None
) -> None:
    """So many producers, one after the other, vanish while working on their first shard."""
    for turn in range(deaths):
        first, *_ = leases(join(ledger, f"p{turn}", now=1000.0 * turn))
        before(f"p{turn}-1", first)
        ledger.disconnect(f"p{turn}-1")


def test_deaths_of_producers_quarantine_nothing() -> None:
    """Fifty die right after they were welcomed: every shard is still there, and a healthy one serves them all."""
    ledger = make_ledger(capacity=64)
    die_on_it(ledger, 50)
    assert not ledger.shards.quarantined and ledger.sessions_lost == 50 and stream_report(ledger).suspect_shards == 2
    notices = [
        int(one.split()[0]) for one in ledger.failures.pop_notices() if "producers in a row were lost on shard" in one
    ]
    assert sorted(notices) == [3, 3, 6, 6, 12, 12, 24, 24]

    ledger.tick(99_000.0)
    for lease in leases(join(ledger, now=99_999.0)):
        serve(ledger, lease)
    assert ledger.shards.is_exhausted and not ledger.shards.suspects() and stream_report(ledger).suspect_shards == 0


def test_a_suspect_is_leased_last() -> None:
    """Three producers die on one shard of two: the next one gets the other before it."""
    ledger = make_ledger(capacity=64)
    die_on_it(ledger, SUSPECT_DEATHS, lambda session, lease: None)
    (suspect,) = ledger.shards.suspects()
    sends = join(ledger, now=99_999.0)
    assert [lease.shard for lease in leases(sends)] == [1 - suspect.shard, suspect.shard]


def test_a_suspect_rests_longer_and_longer() -> None:
    """After its fourth, fifth … death nobody is given it for one, two, three, three times `dead_seconds`."""
    ledger = make_ledger(capacity=64)
    now, waits = 0.0, []
    ledger.hello(hello("p0", shards=1), now)
    for turn in range(SUSPECT_DEATHS + 5):
        ledger.hello(hello(f"p{turn}", shards=1), now)
        began = now
        while not leases(ledger.tick(now)):
            now += 1.0
            ledger.sessions[f"p{turn}-1"].last_heard = now
        waits.append(now - began)
        ledger.disconnect(f"p{turn}-1")
    assert waits == [0, 0, 0, 0, 10, 20, 30, 30]


def test_a_run_that_waits_for_shards_in_trouble_says_so() -> None:
    """Every minute, with numbers, also when no producer is there."""
    ledger = make_ledger(capacity=64)
    for turn in range(SUSPECT_DEATHS):
        join(ledger, f"p{turn}", shards=1)
        ledger.disconnect(f"p{turn}-1")
    ledger.failures.pop_notices()
    for now in np.arange(0.0, 2.5 * STUCK_SECONDS):
        ledger.tick(now)
    notices = ledger.failures.pop_notices()
    assert len(notices) == 2
    assert "waits for its last 1 shards: producers were lost on 1 of them, and 0 were reported" in notices[0]
    assert "tried 3 times; 0 producers are here" in notices[0]


def test_empty_chunk_is_no_sign_of_life_of_a_shard() -> None:
    """A chunk that names no token must not hide that everyone dies on the shard."""
    ledger = make_ledger()
    nothing = {"rows": 0, "kept": pack_bits(np.zeros(4, bool))}
    die_on_it(
        ledger, SUSPECT_DEATHS, lambda session, lease: receive(ledger, session, window_chunk(lease, 1, 0, **nothing))
    )
    assert len(ledger.shards.suspects()) == 1


def test_deaths_do_not_count_while_the_shard_moves() -> None:
    """Each producer brings one window before it dies: that is slow, not broken."""
    ledger = make_ledger(capacity=64)
    windows = iter(range(99))
    die_on_it(ledger, 8, lambda session, lease: send_windows(ledger, lease, 1, [next(windows)], session))
    assert not ledger.shards.suspects() and ledger.tokens_received == 3 * 8


def test_leaving_politely_is_not_dying() -> None:
    """BYE gives leases and credit back and blames nobody."""
    ledger = make_ledger()
    join(ledger)
    ledger.bye("ada-1", Bye(), now=0.0)
    assert not ledger.sessions and ledger.tokens_credited == 0 and ledger.sessions_lost == 0
    assert stream_report(ledger).leases["free"] == 2
    assert all(shard.deaths == 0 for shard in ledger.shards.open.values())


# Time


def test_silent_producer_is_dropped_and_its_work_goes_to_another() -> None:
    """After 10 s without a word, leases and credit return at once."""
    ledger = make_ledger()
    old = leases(join(ledger))
    ledger.hello(hello("bob"), now=9.0)
    assert leases(ledger.tick(10.0)) == []
    sends = ledger.tick(10.5)
    assert [(reject.code, reject.retry) for reject in rejects(sends)] == [("silent", True)]
    assert [lease.shard for lease in leases(sends)] == [lease.shard for lease in old]
    assert [lease.attempt for lease in leases(sends)] == [2, 2]
    assert credit(sends) == {"bob-1": 6}


def beat(ledger: Ledger, until: float, progress: Callable[[float], int]) -> list[Send]:
    """A heartbeat and a tick each second."""
    sends: list[Send] = []
    for now in np.arange(1.0, until):
        if "ada-1" in ledger.sessions:
            ledger.heartbeat("ada-1", Heartbeat(progress=progress(now)), now)
        sends += ledger.tick(now)
    return sends


def test_producer_that_lives_without_progress_loses_its_leases() -> None:
    """Its socket answers and its GPU hangs: after 30 s with credit, the session ends, and reports its shard."""
    ledger = make_ledger()
    join(ledger)
    sends = beat(ledger, until=35.0, progress=lambda now: 7)
    assert [reject.code for reject in rejects(sends)] == ["stalled"]
    assert [(shard.reporters, shard.deaths) for shard in ledger.shards.open.values()] == [({"ada": False}, 0), ({}, 0)]


def test_slow_producer_is_left_alone() -> None:
    """A heartbeat that shows progress is enough."""
    ledger = make_ledger()
    join(ledger)
    assert not rejects(beat(ledger, until=100.0, progress=int))


def test_producer_without_credit_is_not_stalled() -> None:
    """It waits for the trainer, not the other way round."""
    ledger = make_ledger(capacity=16)
    lease, _ = leases(join(ledger))
    for number in (1, 2, 3, 4):
        receive(ledger, "ada-1", window_chunk(lease, number, number, rows=4, kept=b"\x0f"))
    assert ledger.tokens_credited == 0
    assert not rejects(beat(ledger, until=100.0, progress=lambda now: 7))


def test_trainer_shows_that_it_lives() -> None:
    """One heartbeat a second to each producer, with the steps done."""
    ledger = make_ledger()
    join(ledger)
    sends = [send for now in np.arange(0.25, 3.1, 0.25) for send in ledger.tick(now)]
    assert sends == [Send("ada-1", Heartbeat(progress=0))] * 3


# Sessions


def test_second_hello_of_a_producer_replaces_its_first_session() -> None:
    """The old session's leases go on under a new attempt, and its credit returns."""
    ledger = make_ledger()
    join(ledger)
    sends = join(ledger, session="ada-2")
    assert list(ledger.sessions) == ["ada-2"]
    assert [lease.attempt for lease in leases(sends)] == [2, 2]
    assert ledger.tokens_credited == 24


def test_session_name_of_another_producer_ends_that_one_cleanly() -> None:
    """Whoever takes over a name, no lease stays with a session that is no more."""
    ledger = make_ledger()
    join(ledger)
    sends = join(ledger, "eve", session="ada-1")
    assert [lease.attempt for lease in leases(sends)] == [2, 2]
    assert ledger.tokens_credited == 24 and stream_report(ledger).leases["leased"] == 2


def test_unknown_peer_may_go() -> None:
    """The socket may tell of a session that has long ended."""
    ledger = make_ledger()
    ledger.disconnect("nobody")
    assert ledger.sessions_lost == 0


def test_everyone_is_told_of_the_end_and_so_is_who_comes_late() -> None:
    """After a drain nothing is leased; a producer that joins then is welcomed and sent home."""
    ledger = make_ledger()
    join(ledger)
    assert [send.message for send in ledger.drain(finished=True)] == [Drain(finished=True)]
    late = join(ledger, "bob")
    assert [type(send.message) for send in late[:2]] == [Welcome, Drain]
    assert not leases(late) and not credit(late)


def test_winding_down_takes_in_what_was_granted_and_gives_nothing_more() -> None:
    """Tokens under credit still arrive and count; then the ledger is dry, but the data is not exhausted."""
    ledger = make_ledger(capacity=16)
    lease, _ = leases(join(ledger))
    granted = ledger.sessions["ada-1"].granted
    ledger.wind_down()
    assert ledger.phase is StreamPhase.WINDING_DOWN and granted == 4

    send_windows(ledger, lease, 1, [0, 1, 2])
    ledger.shard_end("ada-1", end_of(lease), 1.0)
    assert ledger.phase is StreamPhase.WINDING_DOWN  # one chunk of the second lease is still under way
    second = ledger.sessions["ada-1"].leases[0]
    send_windows(ledger, Lease(shard=second.shard, epoch=second.epoch, attempt=second.attempt), 4, [0])
    assert ledger.phase is StreamPhase.DRAINING and not ledger.shards.is_exhausted
    assert ledger.tokens_buffered == 12

    late = join(ledger, "bob", now=2.0)
    assert [type(send.message) for send in late if send.session == "bob-1"] == [Welcome, Heartbeat]
    assert not leases(late) and not credit(late) and ledger.phase is StreamPhase.DRAINING


def test_winding_down_does_not_wait_for_the_dead_or_the_idle() -> None:
    """Credit of a producer that has no work, or that is no more, brings no token."""
    ledger = make_ledger()
    join(ledger)
    ledger.wind_down()
    assert ledger.phase is StreamPhase.WINDING_DOWN
    ledger.tick(100.0)
    assert not ledger.sessions and ledger.phase is StreamPhase.WOUND_DOWN

    nobody = make_ledger()
    nobody.wind_down()
    assert nobody.phase is StreamPhase.WOUND_DOWN and not nobody.shards.is_exhausted


# Checkpoints


def half_done() -> tuple[Ledger, Lease]:
    """Window 0 is trained, window 1 buffered, one token of window 2 discarded, the rest of it missing."""
    ledger = make_ledger()
    lease, _ = leases(join(ledger))
    send_windows(ledger, lease, 1, [0, 1])
    receive(ledger, "ada-1", window_chunk(lease, 3, 2, rows=0, kept=b"\x00", outliers=b"\x02"))
    train(ledger, (0, 1), (0, 2), (0, 3))
    return ledger, lease


def test_after_a_crash_only_what_was_trained_or_discarded_is_had() -> None:
    """The buffered tokens are leased again; attempts go on from where they were."""
    ledger, lease = half_done()
    successor = restart(ledger)
    assert (successor.tokens_trained, successor.tokens_buffered, successor.tokens_dropped) == (3, 0, 1)
    sends = join(successor, session="ada-2")
    again = next(send for send in sends if isinstance(send.message, Lease) and send.message.shard == lease.shard)
    assert isinstance(again.message, Lease) and again.message.attempt == 2 and again.payload is not None
    assert np.flatnonzero(unpack_bits(again.payload, 12)).tolist() == [1, 2, 3, 9]


def test_crash_after_the_end_of_a_shard_reopens_it() -> None:
    """All 9 tokens had arrived and 3 were trained: the other 6 must come again."""
    ledger = make_ledger()
    lease, _ = leases(join(ledger))
    send_windows(ledger, lease, 1, [0, 1, 2])
    ledger.shard_end("ada-1", end_of(lease), now=0.0)
    train(ledger, (0, 1), (0, 2), (0, 3))
    successor = restart(ledger)
    assert not successor.shards.is_exhausted and stream_report(successor).leases["free"] == 2
    again, _ = leases(join(successor, session="ada-2"))
    send_windows(successor, again, 1, [1, 2], session="ada-2")
    successor.shard_end("ada-2", end_of(again), now=0.0)
    train(successor, *((0, at) for at in (5, 6, 7, 9, 10, 11)))
    assert (successor.tokens_trained, stream_report(successor).leases["trained"]) == (9, 1)


def test_old_start_of_the_trainer_is_fenced_off() -> None:
    """A chunk computed for the trainer that crashed says so, and is refused."""
    ledger, lease = half_done()
    successor = restart(ledger)
    join(successor, session="ada-2")
    accepted, sends = receive(successor, "ada-2", window_chunk(lease, 1, 1, incarnation="first"))
    assert accepted is None and rejects(sends)[0].code == "incarnation"


def test_order_of_shards_survives_a_restart_in_a_later_epoch() -> None:
    """Every shard of epoch 1 is leased once, though the trainer restarts in its middle under another seed."""
    ledger = make_ledger(epochs=2)
    order: list[int] = []
    sends = join(ledger, shards=10)
    session = "ada-1"
    for turn in range(10):
        for lease in leases(sends):
            order += [lease.shard] * lease.epoch
            serve(ledger, lease, session)
        if turn == 7:
            ledger, session = restart(ledger, epochs=2, seed=5), "ada-2"
            ledger.hello(hello(session=session, shards=10), now=0.0)
        sends = ledger.tick(0.0)
    assert ledger.shards.is_exhausted and sorted(order) == list(range(10))


def test_restart_loses_nothing_of_a_shard_that_is_quarantined() -> None:
    """6 of 9 tokens had come and 3 of them were trained: 3 were missing, and with the crash 6 are."""
    ledger = make_ledger()
    lease, other = leases(join(ledger))
    send_windows(ledger, lease, 1, [0, 1])
    serve(ledger, other)
    now = 0.0
    for _ in range(FAILURES_ALLOWED):
        ledger.shard_end("ada-1", end_of(lease), now)
        now += MAX_BACKOFF * 10.0
        ledger.sessions["ada-1"].last_heard = now
        (lease,) = leases(ledger.tick(now)) or (lease,)
    train(ledger, (0, 1), (0, 2), (0, 3))
    successor = restart(ledger)
    assert successor.quarantine.tokens == 6
    assert [entry.rows for entry in successor.shards.quarantined] == [6]
    assert [shard.state for shard in successor.shards.open.values()] == [
        ShardState.QUARANTINED
    ] and successor.shards.is_exhausted


def test_state_is_one_instant() -> None:
    """What happens after `state` does not reach into the document, and restoring does not use it up."""
    ledger, lease = half_done()
    document, bits = ledger_state(ledger)
    before = deepcopy(document)
    ledger.shard_fail("ada-1", ShardFail(**name_of(lease), error="late", retry=False), now=0.0)
    restore_ledger(make_ledger(), document, bits)
    successor = make_ledger()
    restore_ledger(successor, document, bits)
    assert document == before == ledger_state(successor)[0]


def test_fresh_ledger_can_be_saved() -> None:
    """A checkpoint before the first producer holds nothing, and restores to that."""
    successor = restart(make_ledger())
    assert successor.identity.hello is None and not successor.shards.is_exhausted
    assert len(leases(join(successor))) == 2


# Cost


def best_of(repeats: int, work: Callable[[], object]) -> float:
    """The fewest CPU seconds that `work` took."""

    def once() -> float:
        start = time.thread_time()
        work()
        return time.thread_time() - start

    return min(once() for _ in range(repeats))


def test_chunk_and_report_are_cheap() -> None:
    """A chunk of 4096 tokens costs the ledger well under a millisecond, a report with 400 leases too."""
    ledger = make_ledger(capacity=2**24)
    sends: list[Send] = []
    for turn in range(200):
        sends += ledger.hello(hello(f"p{turn}", shards=1000, context=256, chunk_rows=4096), now=0.0)
    sends = ledger.tick(0.0)
    (lease, *_) = (send.message for send in sends if isinstance(send.message, Lease) and send.session == "p0-1")
    mask = pack_bits(np.ones(4096, bool))
    chunks = [
        window_chunk(lease, number, 16 * (number - 1), windows=16, rows=4096, kept=mask)
        for number in range(1, CHUNKS_IN_FLIGHT + 1)
    ]
    queue = iter(chunks)
    assert best_of(len(chunks), lambda: receive(ledger, "p0-1", next(queue))) < 1e-3
    assert ledger.tokens_received == 4096 * len(chunks)
    assert best_of(5, lambda: stream_report(ledger)) < 1e-3


def test_step_of_a_large_shard_is_cheap() -> None:
    """A step that trains 4096 tokens of a shard of 8 million positions that is all here costs a few milliseconds."""
    ledger = make_ledger(capacity=2**24)
    lease, _ = leases(join(ledger, context=4096, chunk_rows=4096))
    shard = ledger.shards.open[0]
    shard.reach(2**23)
    shard.mask[:] = True
    ledger.tokens_received = 2**23
    ledger.shard_end("ada-1", end_of(lease, rows=2**23), now=0.0)
    serial, position = np.zeros(4096, np.int64), np.arange(4096)
    assert best_of(5, lambda: ledger.mark_trained(serial, position)) < 20e-3


def message_kinds(sends: list[Send]) -> list[type[Message]]:
    return [type(send.message) for send in sends]


def test_welcome_precedes_leases_and_leases_precede_credit() -> None:
    """A producer never holds credit for work it has not been told of."""
    assert message_kinds(join(make_ledger())) == [Welcome, Lease, Lease, Credit, Heartbeat]


def test_bounds_of_a_producer_that_left_without_a_row_decide_nothing() -> None:
    """Until tokens have settled the stream, the next producer's own bounds count."""
    ledger = make_ledger()
    join(ledger, "ada", norm_bounds=[5e-324])
    ledger.bye("ada-1", Bye(), 0.0)

    join(ledger, "bob", norm_bounds=[7.0])

    assert ledger.identity.norm_bounds == [7.0]
