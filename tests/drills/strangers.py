"""Producers that must not be let in, and shards that must not be trained on."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.drills.scene import TRAINING_SHARDS, Outcome, Scene
from trainer.checkpoint import load_newest

OTHERS = (
    "corpus.synthetic.shards=33",
    "corpus.synthetic.d_in=9",
    "corpus.context=16",
    "corpus.held_out=0.5",
    "stream.dtype=bfloat16",
)
"""Settings of a producer that does not belong to the run, one at a time."""
REFUSED = 78


def other_streams(folder: Path, quick: bool) -> Outcome:
    """Producers of another corpus, width, context or number format: exit code 78 and a sentence, not a row taken."""
    others = OTHERS[:2] if quick else OTHERS
    with Scene(folder, "corpus.epochs=6") as scene:
        trainer, _ = scene.trainer(SECONDS_PER_STEP=0.03), scene.producer()
        scene.wait_for_rows(1)
        slowest = 0.0
        for other in others:
            began = time.monotonic()
            stranger = scene.producer(other)
            assert stranger.wait(60) == REFUSED, f"a producer with {other} was not refused"
            slowest = max(slowest, time.monotonic() - began)
        assert scene.log("producer").count("differs") >= len(others)
        trainer_told = scene.log().count("refused:")
        assert trainer_told >= len(others), "the trainer does not say whom it refused"
        assert trainer.wait(300) == 0
        return scene.outcome(len(others), 6, note=f"each refused and gone {slowest:.1f} s after its start at most")


def broken_shards(folder: Path, quick: bool) -> Outcome:
    """Shards that raise, give NaN or infinity: tried three times, set aside by name, and everything else is trained."""
    raising, nan, infinite = ([int(shard) for shard in TRAINING_SHARDS[at : at + 2]] for at in (3, 11, 19))
    epochs = 1 if quick else 3
    faults = {"RAISE": json.dumps(raising), "NAN": json.dumps(nan), "INFINITE": json.dumps(infinite)}
    with Scene(folder, f"corpus.epochs={epochs}") as scene:
        trainer = scene.trainer()
        scene.program("faulty_producer", **faults), scene.program("faulty_producer", **faults)
        assert trainer.wait(300) == 0
        saved = load_newest(scene.run)
        assert saved is not None
        aside = saved[0]["ledger"]["set_aside"]
        assert sorted((one["epoch"], one["shard"]) for one in aside) == sorted(
            (epoch, shard) for epoch in range(epochs) for shard in (*raising, *nan, *infinite)
        )
        for entry in aside:
            expected = "cannot be read" if entry["shard"] in raising else "NaN or infinity"
            assert expected in entry["reason"], entry
        return scene.outcome(
            len(aside), epochs, aside={*raising, *nan, *infinite}, note="shards set aside, each after three attempts"
        )
