"""What somebody can do who reaches the stream's port: a message without end, HELLOs without end, and an absurd HELLO.

python -m tests.drills.attacks unfinished ENDPOINT KEYS MEGABYTES FRAME_BYTES     # KEYS: a folder, or - for none
python -m tests.drills.attacks hellos ENDPOINT COUNT PER_CONNECTION

An attacker is a process of its own, of the lowest priority: it stands for a machine elsewhere.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import zmq

from producer.keys import connect_encrypted, write_keys
from producer.wire import Hook, Reject, decode, encode
from tests.drills.malformed import rate
from tests.drills.scene import ROOT, Outcome, Scene
from tests.small_stream import hello_of, named_source
from trainer.state.checkpoint import load_newest

MEMORY_MB = 256
"""By so much an attack may raise the trainer's largest resident memory."""
LOG_BYTES = 50_000
"""By so much it may lengthen the trainer's log."""
SHARE = 0.9
"""Of its rate without the attack, at which training must go on."""
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity"


def unfinished(folder: Path, quick: bool) -> Outcome:
    """Frames with MORE and no last one, of a byte and of a megabyte, by whoever reaches a port without keys."""
    return _flood_of_frames(folder, quick, None)


def unfinished_with_keys(folder: Path, quick: bool) -> Outcome:
    """The same by somebody whose key is known."""
    write_keys(folder / "keys")
    return _flood_of_frames(folder, quick, folder / "keys")


def _flood_of_frames(folder: Path, quick: bool, keys: Path | None) -> Outcome:
    endpoint = _free_endpoint()
    keyed = [] if keys is None else [f'stream.keys="{keys}"']
    with Scene(folder, f"stream.endpoint={endpoint}", "corpus.epochs=400", *keyed) as scene:
        trainer, _ = scene.trainer(), scene.producer()
        scene.wait_for_rows(50_000)
        before = _peak_mb(trainer.pid)
        alone = rate(scene, lambda: time.sleep(1.0 if quick else 10.0))
        details: dict[str, str] = {}
        for frame_bytes, megabytes in ((1, 30 if keys is None else 3), (1_000_000, 3_000)):
            words = ["unfinished", endpoint, str(keys or "-"), str(megabytes // (10 if quick else 1)), str(frame_bytes)]
            flooded = rate(scene, _attack(words))
            details[f"frames of {frame_bytes:,} bytes"] = (
                f"training at {flooded / alone:.2f} of its rate, peak memory +{_peak_mb(trainer.pid) - before:.0f} MB"
            )
        grown = _peak_mb(trainer.pid) - before
        closed = _errors_at_the_end(scene, trainer)["closed_bytes"]
        assert closed, "no connection was closed"
        assert grown < MEMORY_MB, f"peak memory grew by {grown:.0f} MB"
        return Outcome(
            closed, peak_mb=before + grown, note=f"connections closed; memory +{grown:.0f} MB", details=details
        )


def hellos(folder: Path, quick: bool) -> Outcome:
    """HELLOs that are refused, and HELLOs that are not, in one connection and in many, as fast as they are taken."""
    endpoint, count = _free_endpoint(), 2_000 if quick else 31_000
    with Scene(folder, f"stream.endpoint={endpoint}", "corpus.epochs=400") as scene:
        trainer, _ = scene.trainer(), scene.producer()
        scene.wait_for_rows(50_000)
        alone = rate(scene, lambda: time.sleep(1.0 if quick else 10.0))
        before, details = len(scene.log()), dict[str, str]()
        for per_connection in (count, 1):
            began = time.monotonic()
            some = count if per_connection > 1 else count // 100
            flooded = rate(scene, _attack(["hellos", endpoint, str(some), str(per_connection)]))
            details[f"{some:,} HELLOs, {per_connection:,} in a connection"] = (
                f"{some / (time.monotonic() - began):,.0f} a second, training at {flooded / alone:.2f} of its rate"
            )
        log_bytes = len(scene.log()) - before
        assert "\x1b" not in scene.log() and "\nforged" not in scene.log(), "a name forges the log"
        assert _errors_at_the_end(scene, trainer)
        assert log_bytes < LOG_BYTES, f"the log grew by {log_bytes:,} bytes"
        return Outcome(count + count // 100, note=f"HELLOs; log +{log_bytes:,} bytes", details=details)


def wide(folder: Path, quick: bool) -> Outcome:
    """The first HELLO of a run announces 2^20 numbers a row: it is refused, and the run's own producer is let in."""
    with Scene(folder, "buffer.rows=65536", "corpus.epochs=2") as scene:
        trainer = scene.trainer()
        scene.wait(lambda: (folder / "stream").exists())
        hooks = [Hook(name="synthetic", module="synthetic", width=2**20)]
        rounds = 3 if quick else 100
        for _ in range(rounds):
            answer = _answer(f"ipc://{folder}/stream", encode(hello_of(named_source(), hooks=hooks, **_facts(scene))))
            assert (answer.code, answer.retry) == ("memory", False), answer
            assert "1,048,576" in answer.reason and "GB" in answer.reason, answer
        scene.producer()
        assert trainer.wait(200) == 0
        return scene.outcome(rounds, 2, note="HELLOs of width 2^20 refused")


def _facts(scene: Scene) -> dict[str, object]:
    """What the run file says of the stream: a HELLO that differs in it is refused before its width is looked at."""
    return {"context": 32, "held_out": 0.0625, "chunk_rows": 8}


def _answer(endpoint: str, hello: bytes) -> Reject:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(endpoint)
        dealer.send(hello)
        assert dealer.poll(10_000), "no answer to a HELLO"
        answer = decode(dealer.recv_multipart()[0])
    assert isinstance(answer, Reject)
    return answer


def _attack(words: list[str]) -> Callable[[], object]:
    def attack() -> None:
        process = subprocess.run([sys.executable, "-m", "tests.drills.attacks", *words], cwd=ROOT, timeout=300)
        assert process.returncode == 0, f"the attacker failed: {words}"

    return attack


def _errors_at_the_end(scene: Scene, trainer: subprocess.Popen[bytes]) -> dict[str, int]:
    """The trainer leaves in order; what it counted, and whether its producer was disturbed."""
    assert trainer.poll() is None, f"the trainer died: {scene.log()[-2000:]}"
    trainer.terminate()
    assert trainer.wait(60) == 0
    scene.judge_logs()
    saved = load_newest(scene.run)
    assert saved is not None
    assert not saved.document.ledger.sessions_lost, "the producer's session did not survive"
    errors: dict[str, int] = saved.document.ledger.errors
    return errors


def _peak_mb(pid: int) -> float:
    """Largest resident memory of a process so far."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kilobytes) / 1000


def _free_endpoint() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


# The attackers


def send_unfinished(endpoint: str, keys: str, megabytes: int, frame_bytes: int) -> None:
    """So many megabytes of frames, each with MORE, over as many connections as it takes."""
    (_send_encrypted if keys != "-" else _send_plain)(endpoint, keys, 10**6 * megabytes, frame_bytes)


def _send_plain(endpoint: str, _: str, megabytes: int, frame_bytes: int) -> None:
    frames = unended(frame_bytes) * max(1, 10**6 // frame_bytes)
    while megabytes > 0:
        with suppress(OSError), connect(endpoint) as peer:
            while megabytes > 0:
                megabytes -= 10**6
                peer.sendall(frames)


def unended(length: int) -> bytes:
    """A frame of zeros that says that its message goes on."""
    return frame(bytes(length), more=True)


def frame(body: bytes, more: bool = False) -> bytes:
    """A frame as ZMTP writes it."""
    return bytes([more, len(body)]) + body if len(body) < 256 else struct.pack(">BQ", 2 | more, len(body)) + body


def connect(endpoint: str, identity: bytes = b"") -> socket.socket:
    """A connection through the handshake of ZMTP without keys, without a library."""
    peer = socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])))
    peer.settimeout(1.0)
    peer.sendall(GREETING)
    received_bytes = 0
    while received_bytes < len(GREETING):
        if not (some := len(peer.recv(len(GREETING) - received_bytes))):
            raise ConnectionResetError
        received_bytes += some
    ready = READY + struct.pack(">I", len(identity)) + identity
    peer.sendall(b"\x04" + bytes([len(ready)]) + ready)
    peer.recv(4096)  # what comes before the other side is ready ends the handshake
    return peer


def _send_encrypted(endpoint: str, keys: str, megabytes: int, frame_bytes: int) -> None:
    """One message of very many frames: to the other side it has no end for as long as it comes."""
    frame, context = bytes(frame_bytes), zmq.Context()
    while megabytes > 0:
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        connect_encrypted(dealer, keys)
        monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        dealer.connect(endpoint)
        some = min(megabytes, 10**6 * 1000)
        dealer.send_multipart([frame] * (some // frame_bytes), copy=frame_bytes < 256)
        monitor.poll(10_000)
        megabytes -= some
        dealer.disable_monitor()
        monitor.close(0)
        dealer.close()
    context.destroy(linger=0)


def send_hellos(endpoint: str, count: int, per_connection: int) -> None:
    """HELLOs of another corpus and of the run's own, with names that would forge lines of a log."""
    placeholder, name = "0" * 32, "eve\nforged\x1b[31m\u202e" + "x" * 900
    facts = {"producer": placeholder, "session": placeholder, "name": name}
    templates = [encode(hello_of(named_source(), **facts, **own)) for own in ({}, {"context": 32, "held_out": 0.0625})]
    remaining = count
    while remaining > 0:
        with suppress(OSError), connect(endpoint) as peer:
            for _ in range(min(remaining, per_connection)):
                remaining -= 1
                peer.sendall(
                    frame(templates[remaining % 2].replace(placeholder.encode(), os.urandom(16).hex().encode()))
                )
            peer.recv(4096)


if __name__ == "__main__":
    os.nice(19)
    if sys.argv[1] == "unfinished":
        send_unfinished(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        send_hellos(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
