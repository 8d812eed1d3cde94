"""Processes that are killed, frozen, interrupted, too many, too few or too slow."""

from __future__ import annotations

import random
import signal
import statistics
import time
from pathlib import Path

import numpy as np

from producer.wire import held_out_shards
from tests.drills.scene import CAPACITY, EPOCH_ROWS, Outcome, Scene
from trainer.control.ctl import ask
from trainer.snapshot import file_sha256, snapshot_names
from trainer.state.checkpoint import load_newest

RESTART_SECONDS = 20.0
"""A trainer that was killed trains again within this time of its new start, on two busy cores."""
PRODUCER_SECONDS = 10.0
"""Training stands still no longer than this when producers die and others are there or come."""


def producers_killed(folder: Path, quick: bool) -> Outcome:
    """Four producers; every two to five seconds one of them is killed, and another started."""
    epochs, rounds, dice = (4, 3, random.Random(1)) if quick else (16, 15, random.Random(1))
    with Scene(folder, f"corpus.epochs={epochs}") as scene:
        trainer = scene.trainer(SECONDS_PER_STEP=0.02)
        producers = [scene.producer() for _ in range(4)]
        scene.wait_for_rows(1)
        killed = 0
        while killed < rounds and trainer.poll() is None:
            time.sleep(dice.uniform(0.5, 1.0) if quick else dice.uniform(2.0, 5.0))
            producers.pop(dice.randrange(4)).kill()
            killed += 1
            producers.append(scene.producer())
        assert trainer.wait(300) == 0
        outcome = scene.outcome(killed, epochs, note=_lost_sessions(scene))
        assert outcome.recovery is not None and outcome.recovery < PRODUCER_SECONDS
        return outcome


def _lost_sessions(scene: Scene) -> str:
    """What the trainer counted; a death must tell."""
    saved = load_newest(scene.run)
    assert saved is not None
    count = saved.document.ledger.sessions_lost
    assert count, "producers died, and sluice_sessions_lost_total says nothing"
    return f"{count} sessions lost"


def producers_crash_in_a_loop(folder: Path, quick: bool) -> Outcome:
    """Producer after producer dies right after it was given a shard; then a healthy one comes: no shard is lost."""
    deaths, epochs = (8, 2) if quick else (100, 2)
    with Scene(folder, f"corpus.epochs={epochs}") as scene:
        trainer = scene.trainer()
        assert scene.program("crashing_producer", DEATHS=deaths).wait(300) == 0
        assert trainer.poll() is None and not scene.trained_rows
        scene.producer()
        assert trainer.wait(300) == 0
        saved = load_newest(scene.run)
        assert saved is not None
        ledger = saved.document.ledger
        assert not ledger.set_aside and ledger.sessions_lost >= deaths
        assert "producers in a row were lost on shard" in scene.log()
        outcome = scene.outcome(
            deaths, epochs, note=f"deaths before the first row, {len(ledger.set_aside)} shards lost"
        )
        outcome.recovery = None
        return outcome


def checkpoint_removed(folder: Path, quick: bool) -> Outcome:
    """The checkpoint of a stopped, then of a finished run vanishes: starts are refused, no snapshot is touched."""
    refusals, epochs = 0, 1 if quick else 4
    with Scene(folder, f"corpus.epochs={epochs}", "snapshots.every_tokens=8000", "snapshots.keep=100") as scene:
        scene.producer()
        trainer = scene.trainer(SECONDS_PER_STEP=0.02)
        scene.wait_for_rows(20_000)
        trainer.terminate()
        assert trainer.wait(30) == 0
        for finished in (False, True):
            if finished:
                assert scene.trainer().wait(300) == 0
            contents = _contents(scene.run)
            (scene.run / "checkpoint").rename(folder / "checkpoint")
            for _ in range(1 if quick else 3):
                assert scene.trainer().wait(60) == 1
                refusals += 1
            assert _contents(scene.run) == contents
            (folder / "checkpoint").rename(scene.run / "checkpoint")
        count = len(snapshot_names(scene.run))
        outcome = scene.outcome(refusals, epochs, note=f"starts refused; {count} snapshots, 0 deleted or changed")
        outcome.recovery = None
        return outcome


def _contents(run: Path) -> dict[str, str]:
    """Each published file with its sha256."""
    files = [run / "summary.json", *(path for path in (run / "snapshots").rglob("*") if path.is_file())]
    return {str(path.relative_to(run)): file_sha256(path) for path in files if path.exists()}


def producer_frozen(folder: Path, quick: bool) -> Outcome:
    """One of two producers stands still (SIGSTOP) beyond its time, its leases go to the other, and it comes back."""
    rounds, epochs = (1, 3) if quick else (5, 8)
    with Scene(folder, f"corpus.epochs={epochs}") as scene:
        trainer = scene.trainer(SECONDS_PER_STEP=0.03)
        zombie, _ = scene.producer(), scene.producer()
        scene.wait_for_rows(1)
        scene.wait(lambda: _producers(scene) == 2, 60.0, "for both producers")
        for _ in range(rounds):
            zombie.send_signal(signal.SIGSTOP)
            scene.wait(lambda: _producers(scene) == 1, 10.0, "for the end of the zombie's session")
            time.sleep(2.0)
            zombie.send_signal(signal.SIGCONT)
            # It says what it still had to say, is told that its session has ended, and begins a new one.
            scene.wait(lambda: _producers(scene) == 2, 10.0, "for the zombie's new session")
        assert trainer.wait(300) == 0
        outcome = scene.outcome(rounds, epochs, note=_lost_sessions(scene))
        assert outcome.recovery is not None and outcome.recovery < PRODUCER_SECONDS
        return outcome


def _producers(scene: Scene) -> int:
    """How many sessions the trainer has."""
    return sum(ask(scene.run, {"command": "status"})["producers"].values())


def trainer_killed(folder: Path, quick: bool) -> Outcome:
    """The trainer is killed at random moments, twenty times, and started again by the same command."""
    kills, epochs, dice = (2, 4, random.Random(2)) if quick else (20, 24, random.Random(2))
    with Scene(folder, f"corpus.epochs={epochs}") as scene:
        scene.producer(), scene.producer()
        for _ in range(kills):
            trainer = scene.trainer(SECONDS_PER_STEP=0.02)
            before = scene.trained_rows
            scene.wait(lambda before=before: scene.trained_rows > before, 60.0, "for the restarted trainer")
            time.sleep(dice.uniform(0.0, 4.0))
            assert trainer.poll() is None, "the run ended before it could be killed"
            trainer.kill()
            trainer.wait()
        assert scene.trainer().wait(400) == 0
        outcome = scene.outcome(kills, epochs)
        assert outcome.recovery is not None and outcome.recovery < RESTART_SECONDS
        return outcome


def killed_in_checkpoint(folder: Path, quick: bool) -> Outcome:
    """The trainer dies before each file operation of a checkpoint in turn, and goes on from what is there."""
    return _killed_at_every_point(folder, "checkpoint", ["checkpoint.every_seconds=0.3"], quick)


def killed_in_snapshot(folder: Path, quick: bool) -> Outcome:
    """The same inside a snapshot: readers see whole ones only."""
    return _killed_at_every_point(folder, "snapshots", ["snapshots.every_tokens=4000", "snapshots.keep=1"], quick)


def _killed_at_every_point(folder: Path, what: str, overrides: list[str], quick: bool) -> Outcome:
    # Slow until the last point has been died at; then what is left of the corpus is trained at full speed.
    epochs = 2 if quick else 8
    with Scene(folder, f"corpus.epochs={epochs}", "checkpoint.keep=1", *overrides) as scene:
        scene.producer()
        points = _points(scene, what)
        numbers = range(2, len(points) + 1, 9) if quick else range(1, len(points) + 1)
        for number in numbers:
            trainer = scene.trainer(WATCH=what, DIE_AT=number, SECONDS_PER_STEP=0.05)
            code = trainer.wait(60)
            assert code == -signal.SIGKILL, f"it should have died before {points[number - 1]!r}, and ended with {code}"
        assert scene.trainer().wait(200) == 0
        outcome = scene.outcome(len(numbers), epochs, note=f"{len(points)} points")
        outcome.recovery = None  # it is killed again before it gets anywhere
        return outcome


def _points(scene: Scene, what: str) -> list[str]:
    """The labels of one whole save, from a trainer that is watched and does not die by itself."""
    trainer = scene.trainer(WATCH=what, SECONDS_PER_STEP=0.05)
    points = scene.rows_file.with_name("rows.points")
    last_labels: list[str] = []

    def complete() -> bool:
        labels = points.read_text().split("\n") if points.exists() else []
        if len(labels) >= len(last_labels):
            last_labels[:] = labels
        return "shutil.rmtree" in " ".join(last_labels) and len(labels) < len(last_labels)

    scene.wait(complete, what=f"for a whole save in {what}")
    trainer.kill()
    trainer.wait()
    return last_labels


def producers_come_and_go(folder: Path, quick: bool) -> Outcome:
    """1 → 8 → 2 → 0 → 3 producers; without any the trainer says so, and goes on when they come."""
    epochs = 4 if quick else 24
    steps = (1, 3, 1, 0, 2) if quick else (1, 8, 2, 0, 3)
    with Scene(folder, f"corpus.epochs={epochs}") as scene:
        trainer = scene.trainer(SECONDS_PER_STEP=0.03)
        producers = [scene.producer()]
        scene.wait_for_rows(1)
        starved = 0.0
        for count in steps[1:]:
            while len(producers) < count:
                producers.append(scene.producer())
            while len(producers) > count:
                producers.pop().terminate()
            if count:
                before = scene.trained_rows
                scene.wait(lambda before=before: scene.trained_rows > before + 2000)
                time.sleep(0.5 if quick else 5.0)
            else:
                starved = scene.wait(lambda: "training waits; producers at work: 0" in scene.log(), 15.0)
        assert trainer.wait(300) == 0
        return scene.outcome(len(steps), epochs, note=f"told after {starved:.1f} s without producers")


def slow_trainer(folder: Path, quick: bool) -> Outcome:
    """Half a second a step and eight fast producers: nobody's memory grows."""
    seconds, producers = (8.0, 2) if quick else (120.0, 8)
    with Scene(folder, "corpus.epochs=4") as scene:
        trainer = scene.trainer(SECONDS_PER_STEP=0.5)
        for _ in range(producers):
            scene.producer()
        scene.wait_for_rows(1)
        time.sleep(seconds / 4)  # the buffer fills, kernels are compiled
        began = len(scene.samples)
        time.sleep(seconds * 3 / 4)
        grown = _growth(scene, began, "trainer_mb"), _growth(scene, began, "producer_mb")
        trainer.terminate()
        assert trainer.wait(60) == 0
        assert scene.trainer().wait(300) == 0  # the rest at full speed
        assert max(grown) < 8.0, f"trainer and producers grew by {grown[0]:.1f} and {grown[1]:.1f} MB"
        return scene.outcome(
            1, 4, note=f"trainer {grown[0]:+.1f} MB, producer {grown[1]:+.1f} MB in {seconds * 0.75:.0f} s"
        )


def _growth(scene: Scene, began: int, what: str) -> float:
    """By how much the second half of the samples since `began` exceeds the first, in the middle."""
    values = [getattr(sample, what) for sample in scene.samples[began:] if sample.trainer_mb]
    half = len(values) // 2
    return statistics.median(values[half:]) - statistics.median(values[:half])


def everybody_told_to_leave(folder: Path, quick: bool) -> Outcome:
    """SIGTERM to a trainer and three producers in random order; all leave with 0, and the same commands go on."""
    rounds, epochs, dice = (1, 3, random.Random(3)) if quick else (5, 12, random.Random(3))
    slowest = 0.0
    with Scene(folder, f"corpus.epochs={epochs}") as scene:
        for _ in range(rounds):
            everybody = [scene.trainer(SECONDS_PER_STEP=0.02), *(scene.producer() for _ in range(3))]
            before = scene.trained_rows
            scene.wait(lambda before=before: scene.trained_rows > before + 2000)
            dice.shuffle(everybody)
            began = time.monotonic()
            for process in everybody:
                process.terminate()
                time.sleep(dice.uniform(0.0, 0.3))
            assert [process.wait(30) for process in everybody] == [0, 0, 0, 0]
            slowest = max(slowest, time.monotonic() - began)
        trainer, _ = scene.trainer(), scene.producer()
        assert trainer.wait(200) == 0
        outcome = scene.outcome(rounds, epochs, note=f"all gone after {slowest:.1f} s at most")
        outcome.recovery = None  # nobody was there
        return outcome


def clock_jumps(folder: Path, quick: bool) -> Outcome:
    """The trainer's calendar jumps by an hour at every look: no lease, session or heartbeat ends for it."""
    with Scene(folder, "corpus.epochs=4") as scene:
        trainer = scene.trainer(CLOCK_JUMPS=1, SECONDS_PER_STEP=0.02)
        scene.producer(), scene.producer()
        assert trainer.wait(200) == 0
        saved = load_newest(scene.run)
        assert saved is not None and saved.document.ledger.sessions_lost == 0
        return scene.outcome(1, 4)


def soak(folder: Path, quick: bool) -> Outcome:
    """A million chunks: file descriptors, threads and memory stay as they are."""
    chunk_rows, shards, windows, context = 8, 512, 128, 8
    rows = (shards - len(held_out_shards(shards, 0.0625))) * windows * context
    epochs = -(-(100_000 if quick else 1_000_000) * chunk_rows // rows)
    small = [
        f"corpus.context={context}",
        f"corpus.synthetic.shards={shards}",
        f"corpus.synthetic.shard_windows={windows}",
        f"corpus.epochs={epochs}",
        "optimizer.batch=1024",
        "snapshots.every_tokens=1_000_000_000",
        "checkpoint.every_seconds=5.0",
    ]
    with Scene(folder, *small) as scene:
        trainer = scene.trainer()
        scene.program("chatty_producer", CHUNK_WINDOWS=1), scene.program("chatty_producer", CHUNK_WINDOWS=1)
        scene.wait_for_rows(rows * epochs // 5, 3000)
        began = len(scene.samples)
        assert trainer.wait(3000) == 0
        grown = {what: _growth(scene, began, what) for what in ("trainer_mb", "descriptors", "threads")}
        assert grown["trainer_mb"] < 8.0 and grown["threads"] <= 1 and grown["descriptors"] <= 2, grown
        shard, window, position = np.fromfile(scene.rows_file, np.int32).reshape(-1, 3).T
        counts = np.bincount((shard * windows + window) * context + position, minlength=shards * windows * context)
        training_shards = np.setdiff1d(np.arange(shards), held_out_shards(shards, 0.0625))
        assert (counts.reshape(shards, -1)[training_shards] == epochs).all() and counts.sum() == rows * epochs
        scene.judge_logs()
        peak = max(one.trainer_mb for one in scene.samples)
        chunks = rows * epochs // chunk_rows
        note = (
            f"{chunks:,} chunks; memory {grown['trainer_mb']:+.1f} MB, "
            f"descriptors {grown['descriptors']:+.0f}, threads {grown['threads']:+.0f}"
        )
        return Outcome(1, rows * epochs, 0, 0, scene.longest_standstill(), peak, note)


assert CAPACITY < EPOCH_ROWS, "the buffer must not hold an epoch, or nothing would ever wait"
