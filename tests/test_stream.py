"""Both ends of the stream on real sockets: what is sent arrives once, whatever the other side does."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq

from producer.corpus.rendering.windows import Windows
from producer.link import NoTrainer, RefusedByTrainer
from producer.wire import (
    MAX_CHUNK_BYTES,
    MAX_HEADER_BYTES,
    Drain,
    Heartbeat,
    Hook,
    Reject,
    ShardFail,
    encode,
    pack_bits,
)
from tests.drills.named_producer import NamedSource
from tests.small_stream import (
    CAPACITY,
    CHUNK_ROWS,
    D_IN,
    Peer,
    Producing,
    Tunnel,
    every_name,
    finish,
    hello_of,
    named_source,
    new_ledger,
    stream_settings,
    train,
    trainer,
    wait_for,
)
from trainer.report import StreamReport
from trainer.stream.intake import Intake
from trainer.stream.ledger.resume import ledger_state, restore_ledger
from trainer.stream.payload import bits_of, is_finite
from trainer.stream.router import IntakeError


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/s"


def has_ipv6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6) as door:
        door.bind(("::1", 0))
        return True
    return False


# What is sent arrives


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("address", ["ipc", "tcp"])
def test_every_row_arrives_exactly_once(endpoint: str, address: str, dtype: str) -> None:
    """Three producers at once, each token under its own name, and nobody counted as lost at the end."""
    settings = stream_settings(endpoint if address == "ipc" else "tcp://127.0.0.1:*", dtype=dtype)
    with trainer(settings) as intake:
        settings = settings.model_copy(update={"endpoint": intake.endpoint})
        producers = [Producing(settings) for _ in range(3)]

        assert finish(intake, *producers) == every_name()
        assert intake.ledger.sessions_lost == 0


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_rows_arrive_over_ipv6() -> None:
    """An address in brackets, at a free port; ZeroMQ speaks IPv6 only where it is told to."""
    with trainer(stream_settings("tcp://[::1]:*")) as intake:
        assert intake.endpoint.startswith("tcp://[::1]:")
        assert finish(intake, Producing(stream_settings(intake.endpoint))) == every_name()


def test_a_slow_trainer_makes_producers_wait(endpoint: str) -> None:
    """Tokens buffered and tokens that may still come never exceed the buffer, and producers know what they wait for."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake:
        producers = [Producing(settings) for _ in range(3)]
        names = []
        for _ in range(12):
            names += train(intake, CHUNK_ROWS)
            time.sleep(0.02)
            with intake.lock:
                assert intake.buffer is not None
                assert intake.buffer.rows == intake.ledger.tokens_buffered
                assert intake.ledger.tokens_buffered + intake.ledger.tokens_credited <= CAPACITY
        waited = [producer.link.stall_seconds["credit"] for producer in producers]

        assert sum(waited) > 0.1
        assert sorted(names + finish(intake, *producers)) == every_name()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_payload_reaches_the_buffer_bit_for_bit(endpoint: str, dtype: str) -> None:
    """Activations of two hooks of different width, any bits that are finite: the same bits, the hooks side by side."""
    settings = stream_settings(endpoint, dtype=dtype)
    hooks = [Hook(name="narrow", module="a", width=3), Hook(name="wide", module="b", width=5)]
    number = torch.float32 if dtype == "float32" else torch.bfloat16
    activations = [torch.randn(CHUNK_ROWS, hook.width).mul(1e3).to(number) for hook in hooks]
    payload = b"".join(x.reshape(-1).view(torch.uint8).numpy().tobytes() for x in activations)
    with trainer(settings) as intake, Peer(settings, hello_of(named_source(), dtype, hooks=hooks)) as peer:
        peer.join().send_chunk(payload)
        wait_for(lambda: intake.ledger.tokens_received)
        assert intake.buffer is not None
        batch = intake.buffer.draw(CHUNK_ROWS)

        for x, y in zip(activations, batch.x, strict=True):
            assert torch.equal(x[torch.from_numpy(batch.position)].view(torch.uint8), y.view(torch.uint8))


class TwoHooks(NamedSource):
    """Names, and the same at a wider hook."""

    def activations(self, shard: int, windows: Windows, indices: np.ndarray) -> list[torch.Tensor]:
        (x,) = super().activations(shard, windows, indices)
        return [x, torch.cat([x, x], -1)]


def test_a_hook_that_is_forgotten_is_sent_no_longer(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In mid-run: its memory is given back, later leases leave it out, and every token still arrives once."""
    source, settings = two_hooks(), stream_settings(endpoint)
    with trainer(settings) as intake:
        producer = Producing(settings, source)
        names = train(intake, 2 * CHUNK_ROWS)
        assert intake.buffer is not None
        before = intake.buffer.nbytes
        intake.forget_hooks(["wide"])
        assert intake.buffer.nbytes == before - CAPACITY * 2 * D_IN * 4

        assert sorted(names + finish(intake, producer)) == every_name()


def test_a_restarted_trainer_does_not_ask_for_a_forgotten_hook(endpoint: str) -> None:
    """It makes no room for it either."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings, hello_of(two_hooks())) as peer:
        intake.forget_hooks(["wide"])

        assert peer.join().leases[0].hooks == [0]
        assert intake.buffer is not None and intake.buffer.nbytes == CAPACITY * (D_IN * 4 + 24)


def two_hooks() -> TwoHooks:
    source = named_source()
    source.__class__ = TwoHooks
    source.hooks = [Hook(name="narrow", module="a", width=D_IN), Hook(name="wide", module="b", width=2 * D_IN)]
    assert isinstance(source, TwoHooks)
    return source


# What cannot be used


def send_garbage(peer: Peer) -> None:
    peer.send_frames(os.urandom(64))


def send_nothing(peer: Peer) -> None:
    peer.send_frames(b"")


def send_three_frames(peer: Peer) -> None:
    peer.send_frames(encode(Heartbeat(progress=1)), b"", b"")


def send_a_long_header(peer: Peer) -> None:
    peer.send_frames(b"\xc4" * (MAX_HEADER_BYTES + 1))


def send_an_unknown_kind(peer: Peer) -> None:
    peer.send_frames(b"\x82\xa1v\x01\xa4kind\xa6TROJAN")


def send_half_a_chunk(peer: Peer) -> None:
    peer.send_frames(b"\x82\xa1v\x01\xa4kind\xa5CHUNK")


def send_what_a_trainer_says(peer: Peer) -> None:
    peer.send(Drain(finished=True))


@pytest.mark.parametrize(
    ("misbehave", "kind"),
    [
        (send_garbage, "garbage"),
        (send_nothing, "garbage"),
        (send_three_frames, "frames"),
        (send_a_long_header, "size"),
        (send_an_unknown_kind, "kind"),
        (send_half_a_chunk, "field"),
        (send_what_a_trainer_says, "direction"),
    ],
)
def test_a_message_that_cannot_be_used_is_dropped_and_counted(
    endpoint: str, misbehave: Callable[[Peer], None], kind: str
) -> None:
    """Nothing but a counter changes: the peer's session goes on, and so does the run."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as peer:
        peer.join()
        misbehave(peer)
        peer.send_chunk()
        wait_for(lambda: intake.ledger.tokens_received == CHUNK_ROWS)
        peer.leave()

        assert intake.ledger.errors == {kind: 1}
        assert finish(intake, Producing(settings)) == every_name()


def test_a_frame_that_is_too_large_costs_its_connection(endpoint: str) -> None:
    """It is not even read: the peer has to begin again, the run does not notice."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as peer:
        peer.join()
        peer.send_frames(encode(Heartbeat(progress=1)), bytes(MAX_CHUNK_BYTES + 2048))
        peer.send(Heartbeat(progress=2))

        assert peer.receive(Reject).code == "unknown_session"
        peer.join().leave()
        assert finish(intake, Producing(settings)) == every_name()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_number_that_is_not_finite_is_seen_and_no_other(dtype: torch.dtype) -> None:
    """Judged by bits: the largest and smallest numbers of either sign are finite, all of their successors are not."""
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 4
    finite = torch.tensor([[0.0, -0.0, 1.0, -1.0], [largest, -largest, tiny, -tiny]], dtype=dtype)
    assert is_finite([bits_of(finite)])
    nan = float("nan")
    for value in (float("inf"), -float("inf"), nan, torch.copysign(torch.tensor(nan), torch.tensor(-1.0)).item()):
        for place in range(8):
            spoiled = finite.clone()
            spoiled.view(-1)[place] = value
            assert not is_finite([bits_of(finite), bits_of(spoiled)])
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    if dtype == torch.bfloat16:
        assert [is_finite([one[None]]) for one in everything.numpy()] == everything.view(dtype).isfinite().tolist()


def test_the_trainer_can_tell_which_side_waits(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes tokens: producers wait for room. Nobody brings any: training waits for tokens."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake:
        intake._waits._samples[0] = (time.monotonic(), 0.0, 0.0)
        producer = Producing(settings)
        wait_for(lambda: intake.buffer_report().rows == CAPACITY)
        wait_for(lambda: intake.stream_report().credit_wait_ratio > 0.4)
        full = intake.stream_report()
        train(intake)
        wait_for(lambda: not intake.wait_until_ready(1, threading.Event(), 0.2))
        intake.drain(finished=True)
        assert producer.wait_for_end() is None
    assert full.data_wait_ratio == 0 and "the trainer is the bottleneck" in full.bottleneck

    with trainer(stream_settings(f"{endpoint}2")) as alone:
        never = threading.Event()
        wait_for(lambda: not alone.wait_until_ready(1, never, 0.1) and alone.stream_report().data_wait_ratio > 0.4)
        assert "the producers are the bottleneck" in alone.stream_report().bottleneck
    assert "neither" in StreamReport().bottleneck


def test_batches_are_drawn_from_a_buffer_that_is_half_full(endpoint: str) -> None:
    """With fewer tokens, those of a batch would be of few contexts: three chunks of eight are too few, four enough."""
    with trainer(stream_settings(endpoint)) as intake, Peer(stream_settings(endpoint)) as peer:
        peer.join()
        for chunks in (1, 2, 3):
            peer.send_chunk()
            wait_for(lambda chunks=chunks: intake.buffer_report().rows == chunks * CHUNK_ROWS)
            assert not intake.is_ready(CHUNK_ROWS)
        peer.send_chunk()
        wait_for(lambda: intake.is_ready(CHUNK_ROWS))


def test_rows_that_the_ledger_knows_nothing_of_are_seen(endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    """The audit looks into the real buffer, every second: tokens in it that nobody has accounted for are a breach."""
    with trainer(stream_settings(endpoint)) as intake, Peer(stream_settings(endpoint)) as peer:
        peer.join()
        wait_for(lambda: intake.buffer is not None)
        with intake.lock:
            assert intake.buffer is not None
            intake.buffer.insert([torch.zeros(2, D_IN)], serial=0, position=np.arange(2))
        wait_for(lambda: "an invariant is broken" in caplog.text)
        assert intake.stream_report().breaches["rows_accounted"] >= 1
    assert "the buffer holds 2 tokens, the ledger 0" in caplog.text


def nan_in_the_middle(value: float) -> bytes:
    rows = np.ones((CHUNK_ROWS, D_IN), np.float32)
    rows[7, 2] = value
    return rows.tobytes()


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("gap", {"number": 3}),
        ("gap", {"number": 1}),
        ("incarnation", {"incarnation": "an earlier one"}),
        ("shape", {"payload": b"\0" * 12}),
        ("shape", {"payload": b""}),
        ("shape", {"rows": CHUNK_ROWS - 1}),
        ("shape", {"kept": pack_bits(np.ones(CHUNK_ROWS + 8, bool))}),
        ("duplicate", {"first_window": 0}),
        ("non_finite", {"payload": nan_in_the_middle(float("nan"))}),
        ("non_finite", {"payload": nan_in_the_middle(float("inf"))}),
        ("non_finite", {"payload": nan_in_the_middle(float("-inf"))}),
    ],
)
def test_a_faulty_chunk_ends_its_session(endpoint: str, code: str, changes: dict) -> None:
    """The peer is told why and may come again; its tokens are counted and not taken, its leases return."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as peer:
        peer.join().send_chunk()
        wait_for(lambda: intake.ledger.tokens_received == CHUNK_ROWS)
        bad = peer.send_chunk(**changes)
        reject = peer.receive(Reject)

        assert (reject.code, reject.retry) == (code, True)
        assert intake.ledger.errors == {code: 1}
        assert intake.ledger.rejected == {code: bad.rows}
        assert intake.buffer is not None
        assert intake.buffer.rows == CHUNK_ROWS
        assert not intake.ledger.sessions
        assert finish(intake, Producing(settings)) == every_name()


def test_overflow_of_a_float16_model_is_told_as_that(endpoint: str) -> None:
    """The refusal, which the shard is set aside for in the end, names the setting."""
    settings = stream_settings(endpoint)
    hello = hello_of(named_source(), provenance={"model_dtype": "float16"})
    with trainer(settings), Peer(settings, hello) as peer:
        peer.join().send_chunk(nan_in_the_middle(float("inf")))
        assert "as float16 gives beyond 65504; set model.dtype to bfloat16 or float32" in peer.receive(Reject).reason


def test_what_follows_a_faulty_chunk_is_not_taken(endpoint: str) -> None:
    """A peer that has sent more before it hears of its end: every further chunk is counted as a stranger's."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as peer:
        peer.join().send_chunk(nan_in_the_middle(float("nan")))
        for _ in range(3):
            peer.send_chunk()
        assert peer.receive(Reject).code == "non_finite"
        wait_for(lambda: intake.ledger.errors["unknown_session"] == 3)

        assert intake.ledger.rejected == {"non_finite": CHUNK_ROWS, "unknown_session": 3 * CHUNK_ROWS}
        assert intake.ledger.tokens_received == 0
        assert finish(intake, Producing(settings)) == every_name()


def test_a_chunk_beyond_credit_is_not_taken(endpoint: str) -> None:
    """Eight chunks are the whole buffer; a ninth has no place, and ends the session."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as peer:
        peer.join()
        for number in range(8):
            peer.send_chunk(lease=peer.leases[number // 4])
        wait_for(lambda: intake.ledger.tokens_received == CAPACITY)
        peer.send_chunk(b"", lease=peer.leases[1])

        assert peer.receive(Reject).code == "credit"
        assert intake.ledger.tokens_received == CAPACITY
        assert finish(intake, Producing(settings)) == every_name()


def test_a_producer_that_sends_nothing_but_nan_costs_no_shard(endpoint: str) -> None:
    """It serves no shard, so that what it sends says nothing of its shard: another producer brings every token."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as peer:
        for _ in range(3):
            peer.join().send_chunk(nan_in_the_middle(float("nan")))
            peer.receive(Reject)
        producer = Producing(settings)

        assert finish(intake, producer) == every_name()
        assert not intake.ledger.shards.quarantined and intake.ledger.rejected["non_finite"] > 0


# The network


def test_a_goodbye_is_read_although_its_producer_cannot_be_reached_any_more(endpoint: str) -> None:
    """The trainer has a message for a producer that has left before its last one was read: nobody was lost."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, ExitStack() as stack:
        peer = stack.enter_context(Peer(settings)).join()
        with intake.lock:
            time.sleep(0.1)  # the stream's thread now waits for the lock, in a tick
            peer.leave()
            time.sleep(0.1)
            stack.close()
            time.sleep(settings.heartbeat_seconds)  # the tick has a heartbeat to send
        wait_for(lambda: not intake.ledger.sessions)
        assert intake.ledger.sessions_lost == 0


def test_connections_that_break_cost_no_row(endpoint: str) -> None:
    """Five times in mid-run every connection is cut: the producers come back under new sessions, each token once."""
    settings = stream_settings("tcp://127.0.0.1:*")
    with trainer(settings) as intake, Tunnel(intake.endpoint) as tunnel:
        there = settings.model_copy(update={"endpoint": tunnel.endpoint})
        producers = [Producing(there) for _ in range(2)]
        names = []
        for _ in range(5):
            names += train(intake, 2 * CHUNK_ROWS)
            tunnel.break_connections()
        names += finish(intake, *producers)

        assert sorted(names) == every_name()
        assert sum(producer.link.sessions for producer in producers) > 2


def test_a_network_that_swallows_everything_costs_no_row(endpoint: str) -> None:
    """Nothing passes for longer than dead_seconds, nothing breaks either: both sides give up, and meet again."""
    settings = stream_settings("tcp://127.0.0.1:*", dead_seconds=0.4)
    with trainer(settings) as intake, Tunnel(intake.endpoint) as tunnel:
        producer = Producing(settings.model_copy(update={"endpoint": tunnel.endpoint}))
        names = train(intake, 3 * CHUNK_ROWS)
        tunnel.is_open.clear()
        wait_for(lambda: not intake.ledger.sessions)
        wait_for(lambda: producer.link.state == "connecting")
        tunnel.is_open.set()
        names += finish(intake, producer)

        assert sorted(names) == every_name()


# Who is late, silent or new


def test_a_stranger_is_told_to_begin_anew(endpoint: str) -> None:
    """A chunk of a session that this trainer does not know is counted and answered, never taken."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as peer, Peer(settings) as stranger:
        peer.join()
        stranger.welcome, stranger.leases = peer.welcome, peer.leases
        stranger.send_chunk()
        reject = stranger.receive(Reject)

        assert (reject.code, reject.retry) == ("unknown_session", True)
        assert intake.ledger.rejected == {"unknown_session": CHUNK_ROWS}
        peer.leave()
        assert finish(intake, Producing(settings)) == every_name()


def test_an_old_attempt_is_fenced_off(endpoint: str) -> None:
    """Once a shard was given back, what still comes under its old lease is not taken."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as peer:
        old = peer.join().leases[0]
        peer.send(ShardFail(shard=old.shard, epoch=old.epoch, attempt=old.attempt, error="a hiccup", retry=True))
        wait_for(lambda: intake.ledger.shards.open[0].holder is None)
        peer.send_chunk(lease=old)
        wait_for(lambda: intake.ledger.rejected)

        assert intake.ledger.rejected == {"fenced": CHUNK_ROWS}
        assert len(intake.ledger.sessions) == 1
        peer.leave()
        assert finish(intake, Producing(settings)) == every_name()


def test_a_silent_peer_loses_its_leases(endpoint: str) -> None:
    """Its leases return after dead_seconds; when it wakes up it is turned away and may begin anew."""
    settings = stream_settings(endpoint, dead_seconds=0.5)
    with trainer(settings) as intake, Peer(settings) as peer:
        peer.join().send_chunk()
        names = finish(intake, Producing(settings))

        assert names == every_name()
        assert peer.receive(Reject).code == "silent"
        assert intake.ledger.sessions_lost == 1


def test_a_producer_that_comes_again_replaces_its_old_session(endpoint: str) -> None:
    """The same process under a new session: the old one's leases go to the new one at once."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as old:
        old.join()
        again = hello_of(named_source(), producer=old.hello.producer)
        with Peer(settings, again) as new:
            new.join()
            assert list(intake.ledger.sessions) == [again.session]
            assert {lease.shard for lease in new.leases} == {lease.shard for lease in old.leases}
            old.send_chunk()
            assert old.receive(Reject).code == "unknown_session"
            new.leave()
        assert finish(intake, Producing(settings)) == every_name()


def test_sessions_that_ended_leave_nothing_behind(endpoint: str) -> None:
    """Producers may come and go for months: whether they say goodbye, are replaced, refused or unknown."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake:
        with Peer(settings) as first:
            first.join().send_chunk()
            wait_for(lambda: intake.ledger.identity.is_settled)
            first.leave()
        for _ in range(5):
            with Peer(settings) as polite, Peer(settings) as stranger:
                polite.join()
                polite.hello = hello_of(named_source(), producer=polite.hello.producer)
                polite.join().leave()
                stranger.send(Heartbeat(progress=1))
                stranger.receive(Reject)
                stranger.send(hello_of(named_source(), shards=7))
                assert stranger.receive(Reject).code == "mismatch"
        wait_for(lambda: not intake.ledger.sessions)

        wait_for(lambda: not intake._server._routes._peers and not intake._server._routes._sessions)
        assert finish(intake, Producing(settings)) == every_name()


# Who is refused


@pytest.mark.parametrize(
    ("changes", "fact", "theirs"),
    [
        ({"fingerprint": "another corpus"}, "fingerprint", "another corpus"),
        ({"shards": 7}, "shards", "7"),
        ({"held_out": 0.25}, "held_out", "0.25"),
        ({"context": 16}, "context", "16"),
        ({"hooks": [Hook(name="synthetic", module="synthetic", width=9)]}, "hooks", "width 9"),
        ({"dtype": "bfloat16"}, "dtype", "bfloat16"),
    ],
)
def test_a_producer_of_another_stream_is_refused(endpoint: str, changes: dict, fact: str, theirs: str) -> None:
    """For good, and with both values in the sentence."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as first:
        first.join().send_chunk()
        wait_for(lambda: intake.ledger.identity.is_settled)
        error = Producing(settings, hello=hello_of(named_source(), **changes)).wait_for_end()
        ours = {"hooks": "width 4", "dtype": "float32"}.get(fact, str(getattr(first.hello, fact)))

        assert isinstance(error, RefusedByTrainer)
        assert f"{fact} differs" in str(error)
        assert ours in str(error)
        assert theirs in str(error)
        first.leave()
        assert finish(intake, Producing(settings)) == every_name()


def test_a_buffer_too_small_for_the_chunks_is_refused(endpoint: str) -> None:
    """With the number to change; a producer with smaller chunks is still welcome."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake:
        error = Producing(settings, hello=hello_of(named_source(), chunk_rows=CAPACITY)).wait_for_end()

        assert isinstance(error, RefusedByTrainer)
        assert f"buffer.rows = {CAPACITY}" in str(error)
        assert finish(intake, Producing(settings)) == every_name()


def test_another_release_is_refused_with_both_versions(endpoint: str) -> None:
    """Neither side waits in silence for what it cannot read."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake, Peer(settings) as peer:
        peer.send_frames(encode(peer.hello).replace(b"\xa1v\x01", b"\xa1v\x63"))
        reject = peer.receive(Reject)

        assert (reject.code, reject.retry) == ("version", False)
        assert "99" in reject.reason
        assert finish(intake, Producing(settings)) == every_name()


def test_a_trainer_of_another_release_is_told_apart(endpoint: str) -> None:
    """The producer leaves with the two versions instead of looking for another trainer."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(endpoint)
    producer = Producing(stream_settings(endpoint))
    route, _ = socket.recv_multipart()
    socket.send_multipart([route, b"\x82\xa1v\x63\xa4kind\xa7WELCOME"])
    error = producer.wait_for_end()
    context.destroy(linger=0)

    assert isinstance(error, RefusedByTrainer)
    assert "protocol version 99; this side speaks 1" in str(error)


def test_a_second_trainer_cannot_have_the_same_endpoint(endpoint: str) -> None:
    """It is told the address and what to do, and the first one goes on."""
    settings = stream_settings("tcp://127.0.0.1:*")
    with trainer(settings) as intake:
        same_endpoint = settings.model_copy(update={"endpoint": intake.endpoint})
        with pytest.raises(IntakeError, match="another trainer"), trainer(same_endpoint):
            pass
        assert finish(intake, Producing(same_endpoint)) == every_name()


def test_an_endpoint_that_is_no_address_is_said() -> None:
    """No traceback for a slip of the pen."""
    error = Producing(stream_settings("tcp://127.0.0.1:*")).wait_for_end()

    assert isinstance(error, NoTrainer)
    assert "is no address" in str(error)


# The trainer goes and comes


def test_a_trainer_that_crashes_is_found_again(endpoint: str) -> None:
    """A new start from the ledger's last state: the producers notice, and each token is trained once in both lives."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake:
        producers = [Producing(settings) for _ in range(2)]
        first = train(intake, 5 * CHUNK_ROWS)
        with intake.lock:
            document, bits = ledger_state(intake.ledger)
    ledger = new_ledger(settings)
    restore_ledger(ledger, document, bits)
    with trainer(settings, ledger) as intake:
        second = finish(intake, *producers)

    assert len(first) == 5 * CHUNK_ROWS
    assert sorted(first + second) == every_name()


def test_a_trainer_that_leaves_is_waited_for(endpoint: str) -> None:
    """DRAIN: the producers say goodbye, keep quiet, and go on with the next start."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake:
        producer = Producing(settings)
        first = train(intake, 3 * CHUNK_ROWS)
        intake.drain(finished=False)
        assert not intake.ledger.sessions
        document, bits = ledger_state(intake.ledger)
        assert producer.link.state == "connecting"
    ledger = new_ledger(settings)
    restore_ledger(ledger, document, bits)
    with trainer(settings, ledger) as intake:
        second = finish(intake, producer)

        assert ledger.sessions_lost == 0
    assert sorted(first + second) == every_name()


def test_a_finished_run_is_told_to_everybody(endpoint: str) -> None:
    """To those at work, and to one that comes back while the trainer says goodbye."""
    settings = stream_settings(endpoint)
    with trainer(settings) as intake:
        assert sorted(train_with(intake, Producing(settings))) == every_name()
        goodbye = threading.Thread(target=intake.drain, args=(True,))
        goodbye.start()
        late = Producing(settings)

        assert late.wait_for_end() is None
        goodbye.join()


def train_with(intake: Intake, producer: Producing) -> list:
    names = train(intake)
    wait_for(lambda: producer.link.state == "idle")
    return names


def test_a_hello_that_was_lost_is_said_again(endpoint: str) -> None:
    """The trainer that took it died before it answered; the next one knows nothing of this producer."""
    context = zmq.Context()
    doomed = context.socket(zmq.ROUTER)
    doomed.bind(endpoint)
    settings = stream_settings(endpoint, dead_seconds=0.5)
    producer = Producing(settings)
    doomed.recv_multipart()
    context.destroy(linger=0)
    with trainer(settings) as intake:
        assert finish(intake, producer) == every_name()


def test_a_producer_that_finds_nobody_gives_up(endpoint: str) -> None:
    """After stream.patience_seconds, with the address and what to start."""
    error = Producing(stream_settings(endpoint, patience_seconds=0.3)).wait_for_end()

    assert isinstance(error, NoTrainer)
    assert endpoint in str(error)
    assert "python -m trainer" in str(error)
