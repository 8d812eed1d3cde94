"""Ranks under torchrun that are killed: at random, together with the agent above them, and inside a checkpoint."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil

from tests.drills.scene import Outcome, Scene
from trainer.snapshot import file_sha256, snapshot_name, snapshot_names

RANKS = 2
WIDE = ("sae.topk.d_sae=2048", "optimizer.batch=1024")
"""Each rank holds 1,024 latents at least."""
RESTART_SECONDS = 40.0
"""Ranks that were killed train again within this time of the kill, on two busy cores; on quiet ones 15 s."""


def ranks_killed(folder: Path, quick: bool) -> Outcome:
    """Rank 0, rank 1, torchrun's agent or the producer is killed, twenty times, and all are started again."""
    kills, epochs, dice = (4, 6, random.Random(3)) if quick else (20, 24, random.Random(3))
    victims = ["rank 0", "rank 1", "agent", "producer"] * (kills // 4)
    dice.shuffle(victims)
    with Scene(folder, f"corpus.epochs={epochs}", *WIDE) as scene:
        producer = scene.producer()
        agent = scene.torchrun(RANKS, SECONDS_PER_STEP=0.05)
        for victim in victims:
            before = scene.trained_rows
            scene.wait(lambda before=before: scene.trained_rows > before, 90.0, "for the restarted ranks")
            time.sleep(dice.uniform(0.0, 3.0))
            assert agent.poll() is None, "the run ended before a rank could be killed"
            if victim == "producer":
                producer.kill()
                producer = scene.producer()
                continue
            ranks = _ranks(agent)
            target = agent.pid if victim == "agent" else ranks[int(victim[-1])].pid
            os.kill(target, signal.SIGKILL)
            agent.wait(60)
            psutil.wait_procs(ranks, timeout=30)
            assert not [rank for rank in ranks if rank.is_running()], (
                f"ranks are left 30 s after the {victim} was killed"
            )
            agent = scene.torchrun(RANKS, SECONDS_PER_STEP=0.05)
        assert agent.wait(400) == 0
        told = scene.outcome(kills, epochs, note=f"{RANKS} ranks, their agent, a producer")
        assert told.recovery is not None and told.recovery < RESTART_SECONDS
        return told


def killed_in_a_shard(folder: Path, quick: bool) -> Outcome:
    """A rank dies before each of its file operations of a checkpoint in turn; others resume from what is there.

    Every other start is on one rank, which reads the shards of two.
    """
    epochs, settings = 4 if quick else 12, ("checkpoint.keep=1", "checkpoint.every_seconds=0.3")
    deaths = 0
    with Scene(folder, f"corpus.epochs={epochs}", *settings, *WIDE) as scene:
        scene.producer()
        for rank in range(RANKS):
            points = _points(scene, rank)
            for number in range(1 + rank, len(points) + 1, 9 if quick and not rank else 1):
                agent = scene.torchrun(RANKS, WATCH="checkpoint", DIE_AT=number, DIE_RANK=rank, SECONDS_PER_STEP=0.05)
                assert agent.wait(90) != 0, f"rank {rank} should have died before {points[number - 1]!r}"
                deaths += 1
                if number % 2:
                    trainer, before = scene.trainer(SECONDS_PER_STEP=0.05), scene.trained_rows
                    scene.wait(lambda before=before: scene.trained_rows > before, 60.0, "for one rank")
                    trainer.kill()
                    trainer.wait()
        assert scene.torchrun(RANKS).wait(300) == 0
        told = scene.outcome(deaths, epochs, note=f"{deaths} points of {RANKS} ranks")
        told.recovery = None  # they are killed again before they get anywhere
        return told


def ranks_in_turn(folder: Path, quick: bool) -> Outcome:
    """A deterministic run is stopped and resumed on 4, 2, 1 and 4 ranks: the weights of one rank, to the last bit."""
    turns, tokens = ((2, 1), 8192) if quick else ((4, 2, 1, 4), 20_480)
    settings = ("run.deterministic=true", f"run.tokens={tokens}", "checkpoint.every_seconds=0.3", "parallel.blocks=4")
    wide = ("sae.topk.d_sae=4096", "optimizer.batch=1024")
    weights: list[str] = []
    for name, ranks in (("alone", (1,)), ("in turn", turns)):
        with Scene(folder / name, *settings, *wide) as scene:
            scene.producer()
            for turn, count in enumerate(ranks, 1):
                trainer = scene.torchrun(count) if count > 1 else scene.trainer(SECONDS_PER_STEP=0.05)
                if turn < len(ranks):
                    scene.wait_for_rows(tokens * turn // len(ranks))
                    trainer.terminate()
                trainer.wait(120)
            newest = scene.run / "snapshots" / snapshot_names(scene.run)[-1]
            weights.append(file_sha256(newest / "topk" / "sae_weights.safetensors"))
            scene.judge_logs()
            scene.judge_files()
            assert newest.name == snapshot_name(tokens) and scene.trained_rows == tokens
    assert weights[0] == weights[1], "the weights depend on the number of ranks"
    return Outcome(len(turns), 2 * tokens, note=f"{', '.join(map(str, turns))} ranks; sha256 of the weights equal")


def _ranks(agent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of the ranks, in order."""
    children = [child for child in psutil.Process(agent.pid).children() if "LOCAL_RANK" in child.environ()]
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))


def _points(scene: Scene, rank: int) -> list[str]:
    """The labels of a rank's file operations in one whole save."""
    path = scene.rows_file.with_name("rows.points")
    path.unlink(missing_ok=True)
    agent = scene.torchrun(RANKS, WATCH="checkpoint", DIE_RANK=rank, SECONDS_PER_STEP=0.05)
    labels: list[str] = []

    def is_complete() -> bool:
        now = path.read_text().split("\n") if path.exists() else []
        if len(now) < len(labels):
            return True
        labels[:] = now
        return False

    scene.wait(is_complete, what=f"for a whole save of rank {rank}")
    agent.terminate()
    agent.wait(60)
    return labels
