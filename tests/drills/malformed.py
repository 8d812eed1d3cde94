"""Messages that are none, from a real socket while training goes on; and a fuzzer at the decoder.

python -m tests.drills.malformed send ENDPOINT COUNT PER_SECOND      # sends them and leaves
python -m tests.drills.malformed fuzz SECONDS                        # atheris at producer.wire.decode
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import zmq

from producer.wire import MAX_HEADER_BYTES, Bye, Drain, Heartbeat, ShardEnd, encode
from tests.drills.scene import HERE, ROOT, Outcome, Scene
from trainer.state.checkpoint import load_newest

COUNT = 100_000
PER_SECOND = 2_000
SHARE = 0.95
"""Of its rate without them, at which training must go on."""
TURN_SECONDS = 5.0
"""Shorter than a connection without a session may last."""
FUZZ_SECONDS = 600


def malformed(folder: Path, quick: bool) -> Outcome:
    """A hundred thousand, two thousand a second: each is counted, none has an effect, and training keeps its rate.

    The rates are those of turns, without and with the flood, within one run.
    """
    count, turn = (5_000, 1.0) if quick else (COUNT, TURN_SECONDS)
    with Scene(folder, "corpus.epochs=400", "sae.topk.d_sae=2048", "optimizer.batch=1024") as scene:
        trainer, _ = scene.trainer(), scene.producer()
        scene.wait_for_rows(50_000)
        alone, flooded, messages = list[float](), list[float](), 0
        while messages < count:
            alone.append(rate(scene, lambda: time.sleep(turn)))
            some = min(count - messages, round(PER_SECOND * turn))
            words = [f"ipc://{folder}/stream", str(some), str(PER_SECOND)]
            command = [sys.executable, "-m", "tests.drills.malformed", *words]
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as flood:
                assert flood.stdout is not None and flood.stdout.readline()  # it begins
                flooded.append(rate(scene, lambda flood=flood: flood.wait(60)))
            assert flood.returncode == 0
            messages += some
        trainer.terminate()
        assert trainer.wait(60) == 0
        saved = load_newest(scene.run)
        assert saved is not None
        ledger = saved.document.ledger
        error_count = sum(ledger.errors.values())
        assert error_count >= count, f"{error_count:,} of {count:,} malformed messages were counted: {ledger.errors}"
        assert not ledger.sessions_lost, "the producer's session did not survive"
        scene.judge_logs()
        share = sum(flooded) / sum(alone)
        note = f"malformed messages, {PER_SECOND:,} a second; training at {share:.2f} of its rate"
        assert quick or share >= SHARE, note
        return Outcome(count, recovery=scene.longest_standstill(), note=note)


def rate(scene: Scene, meanwhile: Callable[[], object]) -> float:
    """Trained tokens per second."""
    began, before = time.monotonic(), scene.trained_rows
    meanwhile()
    return (scene.trained_rows - before) / (time.monotonic() - began)


def fuzzed(folder: Path, quick: bool) -> Outcome:
    """Ten minutes of atheris at the decoder: a message or a WireError, nothing else, and memory within limits."""
    try:
        import atheris  # noqa: F401
    except ImportError:
        raise PermissionError("atheris is not installed: pip install -e .[fuzz]") from None
    log = folder / "fuzz.log"
    command = [sys.executable, str(HERE / "fuzz_decoder.py"), str(folder), "10" if quick else str(FUZZ_SECONDS)]
    with open(log, "wb") as file:
        process = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file)
    output = log.read_text(errors="replace")
    assert process.returncode == 0, output[-2000:]
    (runs,) = [line.split()[1] for line in output.splitlines() if line.startswith("Done ")]
    return Outcome(int(runs), note="inputs, each a message or a WireError")


def send(endpoint: str, count: int, per_second: int) -> None:
    """From one DEALER, which is told that it is a stranger now and then, and reads nothing."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.sndhwm = 1000
    dealer.connect(endpoint)
    print("sending", flush=True)
    began = time.monotonic()
    for number, frames in zip(range(count), frames_without_sense(), strict=False):
        dealer.send_multipart(frames)
        if number % 100 == 0:
            while dealer.poll(0):
                dealer.recv_multipart()
            time.sleep(max(0.0, began + number / per_second - time.monotonic()))
    context.destroy(linger=10_000)


def frames_without_sense() -> Iterator[list[bytes]]:
    dice = random.Random(0)
    good = [encode(one) for one in (Heartbeat(progress=1), Bye(), Drain(finished=True))]
    good.append(encode(ShardEnd(shard=1, epoch=0, attempt=1, rows=1)))
    kinds = (
        lambda: [dice.randbytes(dice.randrange(200))],
        lambda: [b""],
        lambda: [good[0], b"", b""],
        lambda: [b"\xc4" * (MAX_HEADER_BYTES + 1)],
        lambda: [b"\x82\xa1v\x01\xa4kind\xa6TROJAN"],
        lambda: [b"\x82\xa1v\x01\xa4kind\xa5CHUNK"],
        lambda: [b"\x91" * 5000],
        lambda: [b"\xdf\xff\xff\xff\xff"],
        lambda: [_spoilt(dice, dice.choice(good))],
        lambda: [dice.choice(good), dice.randbytes(3000)],
    )
    while True:
        yield dice.choice(kinds)()


def _spoilt(dice: random.Random, frame: bytes) -> bytes:
    spoilt = bytearray(frame)
    spoilt[dice.randrange(len(spoilt))] ^= 1 << dice.randrange(8)
    return bytes(spoilt)


if __name__ == "__main__":
    os.nice(19)  # it stands for a machine elsewhere
    send(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
