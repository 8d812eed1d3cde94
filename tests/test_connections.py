"""What strangers and producers can do to the trainer's memory, log and thread: raw frames, HELLOs, faults of ours."""

from __future__ import annotations

import logging
import re
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from producer.common.memory import free_memory
from producer.keys import write_keys
from producer.wire import Bye, Heartbeat, Hook, Reject, ShardEnd, ShardFail, encode
from tests.drills.attacks import GREETING, connect, frame, unended
from tests.small_stream import (
    CAPACITY,
    CHUNK_ROWS,
    Peer,
    Producing,
    every_name,
    finish,
    hello_of,
    named_source,
    new_ledger,
    stream_settings,
    trainer,
    wait_for,
)
from trainer.stream.buffer import OrderedBuffer, ShuffleBuffer
from trainer.stream.connections import SLACK_BYTES, ConnectionLimits
from trainer.stream.ingest import NoRoomError, check_room
from trainer.stream.intake import Intake
from trainer.stream.ledger.admission import MAX_SESSIONS
from trainer.stream.ledger.ledger import Ledger

TCP = stream_settings("tcp://127.0.0.1:*")


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/s"


def at(intake: Intake, **changes: object):  # type: ignore[no-untyped-def]
    return stream_settings(intake.endpoint, **changes)


def is_closed(peer: socket.socket) -> bool:
    try:
        while peer.recv(4096):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def resident() -> int:
    (pages,) = re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1000 * int(pages)


# A message without end


@pytest.mark.parametrize("frame_bytes", [0, 1, 200_000])
def test_a_message_without_end_costs_its_connection(frame_bytes: int) -> None:
    """Frames with MORE and no last one, 40 MB of them if nobody minds: what is held stays small, and is counted."""
    frames = unended(frame_bytes) * (200_000 // max(4, frame_bytes))
    with trainer(TCP) as intake:
        producer = Producing(at(intake))
        wait_for(lambda: intake.ledger.identity.is_settled)
        before = resident()
        with connect(intake.endpoint) as peer, pytest.raises(OSError):
            for _ in range(40_000_000 // len(frames)):
                peer.sendall(frames)
        wait_for(lambda: intake.ledger.errors["closed_bytes"] == 1)

        assert resident() - before < 150_000_000
        assert finish(intake, producer) == every_name()
        assert intake.ledger.sessions_lost == 0


def test_a_session_may_hold_its_credit_and_no_more(tmp_path: Path) -> None:
    """With keys: a producer that was welcomed and then sends a message of 40 MB in small frames is cut off as well."""
    write_keys(tmp_path / "keys")
    keys = str(tmp_path / "keys")
    with trainer(stream_settings("tcp://127.0.0.1:*", keys=keys)) as intake:
        with Peer(at(intake, keys=keys)) as peer:
            peer.join()
            assert 8 * CHUNK_ROWS * 16 + SLACK_BYTES < 1_000_000
            peer.send_frames(*[b"x" * 1000] * 40_000)  # takes longer than two looks at what is held
            wait_for(lambda: intake.ledger.errors["closed_bytes"] == 1)
        assert finish(intake, Producing(at(intake, keys=keys))) == every_name()


@pytest.mark.parametrize("encrypted", [False, True])
def test_what_is_held_is_known(tmp_path: Path, encrypted: bool) -> None:
    """Of frames around every length at which their header changes: to the byte, but for one heartbeat's.

    Handshakes, which are never delivered, are forgiven once messages follow. Nothing is ever forgiven twice.
    """
    write_keys(tmp_path / "keys")
    keys = str(tmp_path / "keys") if encrypted else None
    with trainer(stream_settings("tcp://127.0.0.1:*", keys=keys, heartbeat_seconds=60.0, dead_seconds=300.0)) as intake:
        with Peer(at(intake, keys=keys)) as peer:
            peer.join()
            (connection,) = intake._server._router.connections._connections.values()

            def unknown() -> int:
                time.sleep(0.05)
                return connection.reading.total - connection.delivered_bytes

            for _ in range(20):
                peer.send(Heartbeat(progress=0))
                before = unknown()
            for length in (0, 1, 221, 222, 223, 254, 255, 256, 257, 70_000):
                peer.send_frames(bytes(length), bytes(length))
            wait_for(lambda: intake.ledger.errors.total() == 10)

            assert 0 <= unknown() <= before < 100
            assert connection.peer.startswith("127.0.0.1:")
            peer.leave()
        wait_for(lambda: not intake._server._router.connections._connections)
        assert finish(intake, Producing(at(intake, keys=keys))) == every_name()


def test_a_busy_stream_is_never_cut_off() -> None:
    """Five epochs through small credit, three producers: nothing that was due is taken for a flood."""
    with trainer(TCP, new_ledger(TCP, epochs=5)) as intake:
        producers = [Producing(at(intake)) for _ in range(3)]

        assert len(finish(intake, *producers)) == 5 * len(every_name())
        assert not intake.ledger.errors


def test_connections_of_one_identity_are_cut_off() -> None:
    """Forty, one after the other, with twenty megabytes each: what ZeroMQ lays by of one is what came until a look."""
    with trainer(TCP) as intake:
        first, before = connect(intake.endpoint, b"one"), resident()
        for _ in range(40):
            with connect(intake.endpoint, b"one") as peer, suppress(OSError):
                for _ in range(20):
                    peer.sendall(frame(bytes(1_000_000)))
        assert resident() - before < 40 * 8_000_000
        first.close()
        assert finish(intake, Producing(at(intake))) == every_name()


def test_a_connection_that_breaks_at_the_high_water_mark_ends_nothing() -> None:
    """200 messages wait for a busy trainer when their sender vanishes, and heartbeats are due: the trainer lives."""
    with trainer(stream_settings("tcp://127.0.0.1:*", heartbeat_seconds=0.1)) as intake:
        with intake.lock:  # the stream's thread stops at the first message
            peer = connect(intake.endpoint, b"one")
            with suppress(OSError):
                peer.sendall(frame(encode(Heartbeat(progress=0))) * 200)
            time.sleep(0.2)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
            peer.close()
            time.sleep(0.5)
        assert finish(intake, Producing(at(intake))) == every_name()


def test_an_identity_cannot_be_taken_over() -> None:
    """Who connects under the identity of a producer is not heard, and that producer's session goes on."""
    with trainer(TCP) as intake:
        with connect(intake.endpoint, b"one") as victim, connect(intake.endpoint, b"one") as thief:
            victim.sendall(frame(encode(hello_of(named_source()))))
            wait_for(lambda: len(intake.ledger.sessions) == 1)
            thief.sendall(frame(encode(Bye())))
            time.sleep(0.2)
            assert len(intake.ledger.sessions) == 1
            victim.sendall(frame(encode(Bye())))
            wait_for(lambda: not intake.ledger.sessions)
        assert finish(intake, Producing(at(intake))) == every_name()


def test_pings_behind_unread_messages_end_nothing() -> None:
    """2,400 messages with a PING after each sixty, then a reset: libzmq would abort at its high-water mark."""
    ping = b"\x04\x07\x04PING\x00\x00"
    with trainer(TCP) as intake:
        for _ in range(5):
            with intake.lock:
                peer = connect(intake.endpoint, b"one")
                with suppress(OSError):
                    peer.sendall((frame(b"x") * 60 + ping) * 40)
                time.sleep(0.05)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
                peer.close()
            time.sleep(0.05)
        assert finish(intake, Producing(at(intake))) == every_name()


def test_a_message_of_many_frames_costs_its_connection() -> None:
    """Ten thousand empty frames are received once; the producer beside them goes on."""
    with trainer(TCP) as intake:
        with connect(intake.endpoint) as peer:
            peer.sendall(b"\x01\x00" * 10_000 + frame(b""))
            wait_for(lambda: intake.ledger.errors["closed_frames"] == 1)
            assert intake.ledger.errors["frames"] == 1 and is_closed(peer)
        assert finish(intake, Producing(at(intake))) == every_name()


# Who says nothing


@pytest.mark.parametrize("says", [b"", b"\xff\x00", b"GET / HTTP/1.1\r\n\r\n", b"\x01\x00\x05hello", GREETING])
def test_who_never_gets_a_session_is_shown_out(says: bytes) -> None:
    """Junk, half a greeting, an old protocol: in time the connection is closed, and the others are not."""
    with trainer(TCP, limits=ConnectionLimits(pending_seconds=0.5)) as intake:
        producer = Producing(at(intake))
        wait_for(lambda: intake.ledger.identity.is_settled)
        with socket.create_connection(("127.0.0.1", int(intake.endpoint.rpartition(":")[2]))) as peer:
            peer.settimeout(60.0)
            peer.sendall(says)
            assert is_closed(peer)

        assert finish(intake, producer) == every_name()
        assert intake.ledger.sessions_lost == 0


def test_an_ipc_connection_without_a_session_is_shown_out(endpoint: str) -> None:
    with trainer(stream_settings(endpoint), limits=ConnectionLimits(pending_seconds=0.3)) as intake:
        with Peer(at(intake)) as peer:
            peer.join().send_chunk()
            time.sleep(0.6)
            assert not intake.ledger.errors
            peer.leave()
            wait_for(lambda: intake.ledger.errors["closed_no_session"] == 1)
        assert finish(intake, Producing(at(intake))) == every_name()


def test_the_oldest_of_a_crowd_makes_way() -> None:
    """More connections without a session than there may be: whoever brings a HELLO is let in nevertheless."""
    with trainer(TCP, limits=ConnectionLimits(pending=20)) as intake:
        crowd = [connect(intake.endpoint) for _ in range(30)]
        wait_for(lambda: intake.ledger.errors["closed_crowd"] >= 10)
        assert is_closed(crowd[0])
        assert finish(intake, Producing(at(intake))) == every_name()
        for peer in crowd:
            peer.close()


# HELLOs


def test_a_second_hello_on_a_connection_ends_the_first_session(endpoint: str) -> None:
    """Whoever it claims to be: one connection, one session."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as peer:
        for _ in range(5):
            peer.hello = hello_of(named_source())
            peer.join()
            assert list(intake.ledger.sessions) == [peer.hello.session]
        peer.leave()
        assert finish(intake, Producing(settings)) == every_name()


def test_a_session_moves_with_its_hello(endpoint: str) -> None:
    """The same HELLO on another connection: the first connection has lost it, and is a stranger's."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as first, Peer(settings) as second:
        first.join()
        second.hello = first.hello
        second.join()
        assert list(intake.ledger.sessions) == [first.hello.session]
        first.send_chunk()
        assert first.receive(Reject).code == "unknown_session"
        second.leave()
        assert finish(intake, Producing(settings)) == every_name()


def test_a_flood_of_hellos_costs_its_connection_and_few_lines(endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    """Two hundred on one connection, with names that would forge the log: some lines, each one line."""
    caplog.set_level(logging.INFO)
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as peer:
        for _ in range(200):
            peer.send(hello_of(named_source(), name="eve\nforged \x1b[31m", shards=7))
        wait_for(lambda: intake.ledger.errors["closed_hellos"])
        peer._context.destroy(linger=0)  # or it connects again and says the rest
        assert finish(intake, Producing(settings)) == every_name()

    lines = [record.getMessage() for record in caplog.records]
    assert 3 <= sum("eve" in line for line in lines) <= 20
    assert all(line.isprintable() for line in lines)
    assert not intake.ledger.errors["internal"]


def test_so_many_sessions_and_no_more() -> None:
    """The next one is asked to come again; a tick's work has a bound."""
    ledger = new_ledger(TCP)
    for _ in range(MAX_SESSIONS):
        ledger.hello(hello_of(named_source()), 0.0)
    (send,) = ledger.hello(hello_of(named_source()), 0.0)

    assert len(ledger.sessions) == MAX_SESSIONS
    assert isinstance(send.message, Reject) and (send.message.code, send.message.retry) == ("full", True)


def test_the_first_hello_decides_nothing_for_good(endpoint: str) -> None:
    """A stranger of another corpus is first: while it is there others wait, when it has gone they are let in."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings, hello_of(named_source(), shards=7)) as stranger:
        stranger.join()
        producer = Producing(settings)
        wait_for(lambda: intake.ledger.errors["refused_mismatch"])
        assert producer.refusal is None
        stranger.leave()

        assert finish(intake, producer) == every_name()
        assert intake.ledger.identity.hello is not None and intake.ledger.identity.hello.shards == 6


# What is too large


def no_room(hello):  # type: ignore[no-untyped-def]
    check_room(hello, CAPACITY, 10_000_000.0)
    return ShuffleBuffer(CAPACITY, [hook.width for hook in hello.hooks], torch.float32, 0)


def test_a_hello_of_an_absurd_width_is_refused_and_decides_nothing(endpoint: str) -> None:
    """128 activations of 2^20 numbers are 537 MB, where there are 10: the answer says so, and the run goes on."""
    settings = stream_settings(endpoint)
    wide = hello_of(named_source(), hooks=[Hook(name="synthetic", module="m", width=2**20)], chunk_rows=8)
    with Intake(settings, new_ledger(settings), no_room) as intake, Peer(settings, wide) as peer:
        for _ in range(3):
            peer.send(peer.hello)
            reject = peer.receive(Reject)
            assert (reject.code, reject.retry) == ("memory", False)
            assert "hook synthetic has width 1,048,576" in reject.reason and "0.5 GB" in reject.reason
        assert finish(intake, Producing(settings)) == every_name()


def test_a_buffer_must_fit_into_the_memory_that_is_free() -> None:
    hello = hello_of(named_source())
    check_room(hello, 1000, 1000 * (4 * 4 + 24))
    with pytest.raises(NoRoomError, match=r"lower buffer\.rows"):
        check_room(hello, 1000, 1000 * (4 * 4 + 24) - 1)


def test_free_memory_is_the_machines_or_the_groups(tmp_path: Path) -> None:
    """Whichever is less; pages of files that can be dropped are free."""
    machine, group = tmp_path / "meminfo", tmp_path
    assert free_memory(machine, group) == float("inf")
    machine.write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert free_memory(machine, group) == 5_120_000
    for name, text in (("memory.max", "max"), ("memory.current", "3000"), ("memory.stat", "inactive_file 500\nx 1\n")):
        (group / name).write_text(text)
    assert free_memory(machine, group) == 5_120_000
    (group / "memory.max").write_text("4000")
    assert free_memory(machine, group) == 1500


# Faults of ours


class Fault(Exception):
    pass


def raising(*_: object, **__: object) -> None:
    raise Fault("injected")


def after(method: Callable) -> Callable:
    """Does its work, and fails then."""

    def fail(*arguments: object, **options: object) -> None:
        method(*arguments, **options)
        raise Fault("injected")

    return fail


def lease(peer: Peer) -> dict[str, int]:
    return {name: getattr(peer.leases[0], name) for name in ("shard", "epoch", "attempt")}


HANDLERS = [
    pytest.param(owner, name, act, id=name)
    for owner, name, act in (
        (Ledger, "hello", lambda peer: peer.send(hello_of(named_source()))),
        (Ledger, "chunk", lambda peer: peer.send_chunk()),
        (Ledger, "shard_end", lambda peer: peer.send(ShardEnd(**lease(peer), rows=3))),
        (Ledger, "shard_fail", lambda peer: peer.send(ShardFail(**lease(peer), error="x", retry=True))),
        (Ledger, "heartbeat", lambda peer: peer.send(Heartbeat(progress=1))),
        (Ledger, "bye", lambda peer: peer.send(Bye())),
        (ShuffleBuffer, "_put", lambda peer: peer.send_chunk()),
    )
]


@pytest.mark.parametrize("when", [raising, after], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name", "act"), HANDLERS)
def test_a_fault_in_a_handler_costs_one_session(
    endpoint: str,
    owner: type,
    name: str,
    act: Callable[[Peer], object],
    when: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether it comes before its work or after: one REJECT, one traceback, and every token is trained once."""
    settings = stream_settings(endpoint)
    with trainer(settings, capacity=2 * CAPACITY) as intake, Peer(settings) as other, Peer(settings) as peer:
        other.join()
        peer.join()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raising if when is raising else after(getattr(owner, name)))
            act(peer)
            reject = peer.receive(Reject)
            wait_for(lambda: intake.ledger.errors["internal"] == 1)

        assert (reject.code, reject.retry) == ("internal", True)
        with intake.lock:
            assert intake.buffer is not None
            assert intake.buffer.used_slots == intake.ledger.tokens_buffered
        assert other.hello.session in intake.ledger.sessions
        other.leave()
        assert finish(intake, Producing(settings)) == every_name()


def test_a_fault_of_the_decoder_costs_the_message(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as peer:
        peer.join()
        with monkeypatch.context() as patch:
            patch.setattr("trainer.stream.handler.decode", raising)
            peer.send(Heartbeat(progress=1))
            assert peer.receive(Reject).code == "internal"
        assert finish(intake, Producing(settings)) == every_name()


def test_an_answer_that_cannot_be_encoded_costs_its_session(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = stream_settings(endpoint)
    with trainer(settings) as intake:
        with monkeypatch.context() as patch, Peer(settings) as peer:
            patch.setattr("trainer.stream.server.encode", raising)
            peer.send(peer.hello)
            wait_for(lambda: intake.ledger.errors["internal"])
            wait_for(lambda: not intake.ledger.sessions)
        assert finish(intake, Producing(settings)) == every_name()


def test_a_fault_of_the_clock_is_survived_and_one_that_lasts_is_not(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tick that fails is told; without ticks for dead_seconds nobody is served, and the run ends with the reason."""
    settings = stream_settings(endpoint, dead_seconds=0.5)
    with trainer(settings) as intake:
        producer = Producing(settings)
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "tick", raising)
            wait_for(lambda: intake.ledger.errors["internal"] > 1)
        assert finish(intake, producer) == every_name()
    with trainer(settings) as intake:
        monkeypatch.setattr(Ledger, "tick", raising)
        wait_for(lambda: intake.failure is not None)
        assert isinstance(intake.failure, Fault)


def test_an_ordered_buffer_that_fails_has_taken_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its free slots are as before, so that the tokens can come again."""
    buffer = OrderedBuffer(8, [2], torch.float32, 0)
    with monkeypatch.context() as patch:
        patch.setattr(OrderedBuffer, "_put", raising)
        with pytest.raises(Fault):
            buffer.insert([torch.ones(8, 2)], 0, np.arange(8))
    assert buffer.used_slots == 0
    buffer.insert([torch.ones(8, 2)], 0, np.arange(8))
    assert buffer.used_slots == 8
