"""Deterministic mode: what a run becomes does not depend on who brought its tokens, when, or after how many deaths."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from producer.common.run_file import settings_from
from producer.common.toml import SettingsError
from producer.settings import ProducerSettings
from producer.wire import Lease, Reject
from tests.drills.deterministic import ALWAYS, Fate, compare
from tests.drills.scene import RUN
from tests.small_run import small_checkpoint
from tests.small_stream import hello_of, named_source, new_ledger, stream_settings, trainer
from trainer.settings import TrainerSettings
from trainer.state.checkpoint import CheckpointError
from trainer.state.format import BufferState
from trainer.stream.buffer import Batch, OrderedBuffer, pool_rows
from trainer.stream.ledger.credit import OrderedCredit
from trainer.stream.ledger.ledger import Ledger
from trainer.stream.ledger.shards import QuarantinedShard
from trainer.stream.router import IntakeError
from trainer.training.resuming import buffer_of

CAPACITY = 16

Chunk = tuple[int, list[int]]
"""(serial, positions)."""
SEQUENCE: list[Chunk] = [(serial, [2 * part, 2 * part + 1]) for serial in range(4) for part in range(3)]
"""24 rows: four serials of six."""


@pytest.mark.long
def test_the_weights_depend_neither_on_producers_nor_on_deaths(tmp_path: Path) -> None:
    """Real processes: one producer; or two, of which one is killed and replaced, and a trainer that is killed too."""
    lives = {"undisturbed": Fate(1), "killed": Fate(2, producers_killed=1, trainer_killed=1)}
    rows = 16_384
    compare(tmp_path, RUN, (*ALWAYS, f"run.tokens={rows}", "checkpoint.every_seconds=0.3"), rows, lives)


# The buffer


def buffer() -> OrderedBuffer:
    return OrderedBuffer(CAPACITY, [2], torch.float32, seed=0)


def insert(into: OrderedBuffer, *chunks: Chunk) -> None:
    """Activations that are their own names."""
    for serial, positions in chunks:
        x = torch.tensor([[serial, position] for position in positions], dtype=torch.float32).reshape(-1, 2)
        into.insert([x], serial, np.array(positions, np.int64))


def names(batch: Batch) -> list[tuple[int, int]]:
    pairs = list(zip(batch.serial.tolist(), batch.position.tolist(), strict=True))
    assert torch.equal(batch.x[0], torch.tensor(pairs, dtype=torch.float32)), "a row came out under another name"
    return pairs


def test_batches_do_not_depend_on_the_order_of_arrival() -> None:
    """The first of the sequence comes last; what is drawn is as if it had come first."""
    orderly, late = buffer(), buffer()
    insert(orderly, *SEQUENCE[:4])
    insert(late, *SEQUENCE[3:6])
    assert not late.fill(oldest=0) and late.rows == 0, "rows were let in before their turn"
    insert(late, *SEQUENCE[:3])

    assert orderly.fill(oldest=1) and late.fill(oldest=2)
    assert names(orderly.draw(4)) == names(late.draw(4))
    insert(orderly, *SEQUENCE[4:6])
    assert orderly.fill(oldest=1) and late.fill(oldest=2)
    assert names(orderly.draw(4)) == names(late.draw(4))


def test_a_restored_buffer_goes_on_as_if_it_had_never_stopped() -> None:
    """The tokens that it names go back to their places, in whatever order they come, and new ones come after them."""
    one = buffer()
    insert(one, *SEQUENCE[:8])
    one.fill(oldest=2)
    drawn_names = names(one.draw(3))
    one.fill(oldest=2)  # how far the refill has come makes no difference to what is saved

    other = buffer()
    other.restore(one.state())
    np.testing.assert_equal(vars(other.state()), vars(one.state()))  # nor does a restart before anything has come
    remaining = [(s, [p for p in positions if (s, p) not in drawn_names]) for s, positions in SEQUENCE]
    insert(other, *remaining[3:8])
    assert not other.fill(oldest=0), "rows that were to go back were missing"
    insert(other, *remaining[:3])
    for each in (one, other):
        insert(each, SEQUENCE[8])

    for _ in range(2):
        assert one.fill(oldest=4) and other.fill(oldest=4)
        torch.testing.assert_close(one.peek(5), other.peek(5), rtol=0, atol=0)
        assert names(one.draw(3)) == names(other.draw(3))


def test_rows_that_come_back_take_their_own_places() -> None:
    """The pool's order is not that of positions: a checkpoint names 2, 0, 1 of one serial, and they come as 0, 1, 2."""
    restored = buffer()
    restored.restore(BufferState(None, np.array([[0, 0, 0], [2, 0, 1]])))
    insert(restored, (0, [0, 1, 2, 3]))

    names = restored.state().names
    assert names is not None and names.tolist() == [[0, 0, 0], [2, 0, 1]]


def test_what_is_looked_at_does_not_depend_on_the_refill() -> None:
    """Thresholds of snapshots are estimated from tokens that wait, and must be the same bits every time."""
    empty, refilled = buffer(), buffer()
    for each in (empty, refilled):
        insert(each, *SEQUENCE[:4])
        each.fill(oldest=2)
        each.draw(3)
    insert(refilled, *SEQUENCE[4:6])
    refilled.fill(oldest=2)

    assert refilled.rows == 8 and empty.rows == 5
    assert torch.equal(empty.peek(4)[0], refilled.peek(4)[0])


def test_what_does_not_fit_is_refused() -> None:
    """Waiting tokens take room as all others do."""
    full = buffer()
    insert(full, *SEQUENCE[4:])
    assert full.used_slots == CAPACITY
    with pytest.raises(OverflowError, match="16 of 16 slots full"):
        insert(full, SEQUENCE[0])


# The ledger


@pytest.fixture
def ledger() -> Ledger:
    """Room for eight chunks, four of which are the pool's."""
    capacity = 128
    policy = OrderedCredit(capacity - pool_rows(capacity), dead_seconds=5.0)
    return new_ledger(stream_settings("ipc://here"), capacity, policy=policy)


def join(ledger: Ledger, session: str) -> None:
    ledger.hello(hello_of(named_source(), producer=session, session=session), 0.0)


def test_who_runs_ahead_leaves_room_for_who_comes_first(ledger: Ledger) -> None:
    """Two chunks for the later shard, the rest for the oldest one."""
    join(ledger, "first")
    join(ledger, "second")
    ledger.tick(0.0)

    assert {name: session.granted for name, session in ledger.sessions.items()} == {"first": 6, "second": 2}


def test_somebody_always_has_the_oldest_shard_first(ledger: Ledger) -> None:
    """Its producer dies; the other one is at work on a later shard: it is ended, once, and returns to the oldest."""
    join(ledger, "dies")
    join(ledger, "ahead")
    ledger.tick(0.0)
    oldest = ledger.shards.open[0].shard
    ledger.disconnect("dies")
    sends = ledger.tick(1.0)

    rejected = [(send.session, send.message.code) for send in sends if isinstance(send.message, Reject)]
    assert rejected == [("ahead", "early")]
    assert not [send for send in ledger.tick(1.1) if isinstance(send.message, Reject)]
    join(ledger, "back")
    leases = [send.message.shard for send in ledger.tick(1.2) if isinstance(send.message, Lease)]
    assert leases[0] == oldest


# What is refused


SETTINGS: dict[str, Any] = {
    "run": {"deterministic": True},
    "model": {"name": "gpt2", "hooks": ["blocks.6.hook_resid_post"], "dtype": "bfloat16"},
    "optimizer": {"matmul": "bfloat16"},
    "sae": [{"name": "topk", "architecture": "topk", "d_sae": 4096, "k": 32}],
}


def settings(**tables: dict[str, Any]) -> TrainerSettings:
    return settings_from(TrainerSettings, SETTINGS | tables)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"model": SETTINGS["model"] | {"dtype": "auto"}}, 'needs model.dtype = "float32" or "bfloat16"'),
        ({"optimizer": {}}, 'needs optimizer.matmul = "float32" or "bfloat16"'),
        ({"buffer": {"rows": 16_000}}, "buffer.rows = 16000 is under four batches (optimizer.batch = 4096)"),
    ],
)
def test_nothing_that_decides_bits_is_left_to_measurements(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        settings(**tables)
    assert message in str(raised.value)


def test_a_producer_is_told_what_to_set_as_well() -> None:
    with pytest.raises(SettingsError, match="needs model"):
        settings_from(ProducerSettings, {"run": SETTINGS["run"], "model": SETTINGS["model"] | {"dtype": "auto"}})


def test_a_run_cannot_become_deterministic_on_the_way() -> None:
    """Its checkpoint does not name the tokens that were in the buffer."""
    with pytest.raises(CheckpointError, match="began without it"):
        buffer_of(small_checkpoint(4096), settings())


def test_a_producer_of_another_geometry_is_refused() -> None:
    """The fingerprint has what decides the bits of its activations; the refusal names it with both values."""
    source, ledger = named_source(), new_ledger(stream_settings("ipc://here"))
    ours = {"deterministic": True, "threads": 1}
    ledger.hello(hello_of(source, provenance=ours), 0.0)
    (send,) = ledger.hello(hello_of(source, fingerprint="another", provenance=ours | {"threads": 2}), 0.0)

    assert "threads differs: this run streams 1, the producer 2" in send.message.reason  # type: ignore[attr-defined]


def test_a_shard_that_is_given_up_ends_the_run(ledger: Ledger) -> None:
    """How much of it came would depend on who failed; the line says what to do."""
    stream = stream_settings("tcp://127.0.0.1:0")
    ledger.shards.quarantined.append(QuarantinedShard(epoch=0, shard=3, rows=None, reason="cannot be read"))
    with trainer(stream, ledger) as intake, pytest.raises(IntakeError, match="shard 3 failed"):
        intake.take(8, threading.Event())
