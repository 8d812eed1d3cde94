"""Producers that must not be let in, and shards that must not be trained on."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from pathlib import Path

import zmq

from producer.common.logs import BURST
from producer.keys import write_keys
from producer.wire import Reject, decode, encode
from tests.drills.scene import TRAINING_SHARDS, Outcome, Scene
from tests.small_stream import hello_of, named_source
from trainer.state.checkpoint import load_newest

OTHERS = (
    ["corpus.synthetic.shards=33"],
    ["corpus.synthetic.d_in=9"],
    ["corpus.context=16"],
    ["corpus.held_out=0.5"],
    ["stream.dtype=bfloat16"],
    ["corpus.kind=stdlib", "model.name=producer/demo_lm", 'model.hooks=["blocks.2.hook_resid_post"]'],
)
"""Settings of producers that do not belong to the run: another corpus, width, context, format, model and hook."""
REFUSED = 78
TELLING_SECONDS = 5


def other_streams(folder: Path, quick: bool) -> Outcome:
    """Producers of another corpus, width, context, format, model or release: refused in a sentence, no token taken."""
    others = OTHERS[-2:] if quick else OTHERS
    with Scene(folder, "corpus.epochs=16") as scene:
        trainer, _ = scene.trainer(SECONDS_PER_STEP=0.1), scene.producer()
        scene.wait_for_rows(1)
        slowest = 0.0
        for other in others:
            began = time.monotonic()
            stranger = scene.producer(*other)
            assert stranger.wait(120) == REFUSED, f"a producer with {other} was not refused"
            slowest = max(slowest, time.monotonic() - began)
        assert scene.log("producer").count("differs") >= len(others)
        assert "refused by the trainer: hooks differs" in scene.log("producer"), "the model's hook is not named first"
        assert _answer_to_another_release(f"ipc://{folder}/stream").code == "version"
        trainer_told = scene.log().count("refused:")
        assert trainer_told >= min(BURST, len(others)), "the trainer does not say whom it refused"
        trainer.terminate()
        assert trainer.wait(30) == 0
        assert scene.trainer().wait(200) == 0  # the rest at full speed
        return scene.outcome(len(others) + 1, 16, note=f"each refused and gone {slowest:.1f} s after its start at most")


def _answer_to_another_release(endpoint: str) -> Reject:
    """What a producer hears whose protocol is of version 99."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(endpoint)
    dealer.send(encode(hello_of(named_source())).replace(b"\xa1v\x01", b"\xa1v\x63"))
    assert dealer.poll(1000 * TELLING_SECONDS), "a producer of another release hears nothing"
    answer = decode(dealer.recv_multipart()[0])
    context.destroy(linger=0)
    assert isinstance(answer, Reject)
    return answer


def keys_rotated(folder: Path, quick: bool) -> Outcome:
    """Keys come, go and are wrong while others work: SIGHUP ends the sessions of a withdrawn key, and no others.

    Each refusal is told on both sides, within TELLING_SECONDS of the signal or of the producer's link being up.
    """
    write_keys(folder / "keys")
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    rounds, slowest = 1 if quick else 3, 0.0
    with Scene(folder, f"stream.endpoint={endpoint}", "corpus.epochs=16") as scene:
        trainer = scene.trainer(f'stream.keys="{folder / "keys"}"', SECONDS_PER_STEP=0.05)
        scene.producer(f'stream.keys="{folder / "keys"}"')
        scene.wait_for_rows(1)
        for number in range(rounds):
            extra = folder / f"extra{number}"
            write_keys(extra)
            shutil.copy(folder / "keys" / "server.key", extra / "server.key")
            stranger = scene.producer(f'stream.keys="{extra}"')
            assert stranger.wait(30) == REFUSED  # an unknown key
            allowed = folder / "keys" / "clients" / f"extra{number}.key"
            shutil.copy(extra / "clients" / "client.key", allowed)
            joined = scene.log().count("joins")
            guest = scene.producer(f'stream.keys="{extra}"')
            scene.wait(lambda joined=joined: scene.log().count("joins") > joined, 30.0, "for the new key's producer")
            allowed.unlink()
            began = time.monotonic()
            trainer.send_signal(signal.SIGHUP)
            scene.wait(lambda number=number: scene.log("producer").count("key was withdrawn") > number, 30.0)
            slowest = max(slowest, time.monotonic() - began)
            assert guest.wait(30) == REFUSED
        assert slowest < TELLING_SECONDS, f"a withdrawn key was told after {slowest:.1f} s"
        producer_log = scene.log("producer")
        assert (
            producer_log.count("does not know this producer's key")
            == rounds
            == producer_log.count("its key was withdrawn")
        )
        assert scene.log().count("no file in") >= rounds, "the trainer does not name the unknown key"
        assert scene.log().count("joins") == 1 + rounds, "the producer that stayed had to begin a new session"
        trainer.terminate()
        assert trainer.wait(30) == 0
        keyed = f'stream.keys="{folder / "keys"}"'
        assert scene.trainer(keyed).wait(200) == 0  # the rest at full speed
        note = f"keys added and withdrawn; a withdrawal told in {slowest:.1f} s"
        return scene.outcome(rounds, 16, note=note)


def broken_shards(folder: Path, quick: bool) -> Outcome:
    """Shards that raise, give NaN or infinity: tried three times, set aside by name, and everything else is trained."""
    raising, nan, infinite = ([int(shard) for shard in TRAINING_SHARDS[at : at + 2]] for at in (3, 11, 19))
    epochs = 1 if quick else 3
    faults = {"RAISE": json.dumps(raising), "NAN": json.dumps(nan), "INFINITE": json.dumps(infinite)}
    with Scene(folder, f"corpus.epochs={epochs}", "run.max_quarantined_ratio=0.5") as scene:
        trainer = scene.trainer()
        scene.program("faulty_producer", **faults), scene.program("faulty_producer", **faults)
        assert trainer.wait(300) == 0
        saved = load_newest(scene.run)
        assert saved is not None
        quarantined = saved.document.ledger.set_aside
        assert sorted((one.epoch, one.shard) for one in quarantined) == sorted(
            (epoch, shard) for epoch in range(epochs) for shard in (*raising, *nan, *infinite)
        )
        for entry in quarantined:
            expected = "cannot be read" if entry.shard in raising else "NaN or infinity"
            assert expected in entry.reason, entry
        return scene.outcome(
            len(quarantined),
            epochs,
            quarantined={*raising, *nan, *infinite},
            note="shards quarantined, each after three attempts",
        )


def mended_shards(folder: Path, quick: bool) -> Outcome:
    """A run that loses more shards than it may ends as failed; the same command, after mending, trains them all."""
    raising = [int(shard) for shard in TRAINING_SHARDS[3:7]]
    with Scene(folder, "corpus.epochs=2") as scene:
        trainer = scene.trainer()
        scene.program("faulty_producer", RAISE=json.dumps(raising), NAN="[]", INFINITE="[]")
        assert trainer.wait(300) == 1
        summary = json.loads((scene.run / "summary.json").read_text())
        assert (
            summary["outcome"] == "failed"
            and summary["rows_set_aside"] is None
            and len(summary["shards_set_aside"]) == 8
        )
        trainer, _ = scene.trainer(), scene.producer()
        assert trainer.wait(300) == 0
        summary = json.loads((scene.run / "summary.json").read_text())
        assert summary["outcome"] == "finished" and summary["rows_set_aside"] == 0
        return scene.outcome(8, 2, note="shards quarantined, mended and trained on")
