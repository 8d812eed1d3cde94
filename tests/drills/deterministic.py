"""Deterministic mode: the same weights, bit by bit, however many producers there are and whoever is killed.

    python -m tests.drills.deterministic [--quick]

The same run several times over, each time under another fate; then every snapshot's weights are compared, and the
tokens that were trained on, in their order. On the synthetic source with SAEs of several kinds, and on the demo's
language model, whose activations must be the same bits whoever computes them.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.drills.scene import EPOCH_ROWS, ROOT, RUN, Outcome, Scene
from trainer.control.ctl import main as ctl
from trainer.snapshot import snapshot_names

SEVERAL_KINDS = """
[[sae]]
name = "batchtopk"
architecture = "batchtopk"
d_sae = 32
k = 4
dead_tokens = 2000
[[sae]]
name = "jumprelu"
architecture = "jumprelu"
d_sae = 32
target_l0 = 4
ema_tokens = 5000
[[sae]]
name = "gated"
architecture = "gated"
d_sae = 32
sparsity_weight = 1.0
revive_tokens = 4000
"""
"""Thresholds from rows that wait, averages, and latents that are moved to rows drawn by lot."""

ALWAYS = (
    "run.deterministic=true",
    "snapshots.keep=100",
    "stream.dead_seconds=1.5",
    "stream.heartbeat_seconds=0.25",
    "checkpoint.every_seconds=1.0",
)


@dataclass(frozen=True)
class Fate:
    """Who is at work, and how often somebody is killed (SIGKILL) at random."""

    producers: int
    producers_killed: int = 0
    trainer_killed: int = 0
    runs_commands: bool = False
    """`ctl` asks for snapshots, a pause and a drain, which is refused."""


def fates(quick: bool) -> dict[str, Fate]:
    return {
        "1 producer": Fate(1),
        "4 producers": Fate(4),
        "4 producers, killed and replaced": Fate(4, producers_killed=3 if quick else 12),
        "2 producers, trainer killed and resumed": Fate(2, trainer_killed=2 if quick else 6),
        "4 producers, all of them killed": Fate(
            4, producers_killed=2 if quick else 8, trainer_killed=1 if quick else 4
        ),
        "2 producers, snapshots and pauses asked for": Fate(2, runs_commands=True),
    }


def synthetic(folder: Path, quick: bool) -> Outcome:
    """Four kinds of SAEs on activations that are their own names."""
    epochs = 2 if quick else 6
    overrides = (*ALWAYS, f"corpus.epochs={epochs}", "snapshots.every_tokens=20000")
    return compare(folder, RUN + SEVERAL_KINDS, overrides, epochs * EPOCH_ROWS, fates(quick), epochs)


def language_model(folder: Path, quick: bool, dtype: str = "bfloat16") -> Outcome:
    """The demo, smaller."""
    rows = 65_536 if quick else 262_144
    overrides = (
        *ALWAYS,
        f"run.tokens={rows}",
        "run.directory=DIR/run",
        "stream.endpoint=ipc://DIR/stream",
        f"model.dtype={dtype}",
        f"optimizer.matmul={dtype}",
        "optimizer.batch=1024",
        "buffer.rows=32768",
        "snapshots.every_tokens=32768",
        "monitor.trainer_port=0",
        "monitor.producer_port=0",
        "monitor.port=0",
    )
    return compare(folder, (ROOT / "deploy" / "demo.toml").read_text(), overrides, rows, fates(quick))


def compare(
    folder: Path,
    run: str,
    overrides: tuple[str, ...],
    rows: int,
    lives: dict[str, Fate],
    epochs: int | None = None,
) -> Outcome:
    """The run of so many `rows` under each fate; AssertionError unless all trained on the same to the same weights.

    `epochs`: the run is so many whole passes over the corpus of `RUN`, whose rows must all be there.
    """
    fingerprints: dict[str, str] = {}
    killed = comparisons = 0
    common: list[str] = []
    for name, fate in lives.items():
        place = folder / str(len(fingerprints))
        with Scene(place, *(one.replace("DIR", str(place)) for one in overrides), run=run) as scene:
            _live_through(scene, fate, rows)
            if epochs is not None:
                scene.outcome(0, epochs)
            scene.judge_logs()
            common = common or snapshot_names(scene.run)  # those asked for come on top
            fingerprints[name] = _fingerprint(scene, common)
        killed += fate.producers_killed + fate.trainer_killed
        comparisons += scene.trained_rows
    assert len(set(fingerprints.values())) == 1, f"the weights differ: {fingerprints}"
    return Outcome(
        killed,
        comparisons,
        note=f"{len(fingerprints)} runs, one sha256: {next(iter(fingerprints.values()))[:16]}",
        details=fingerprints,
    )


def _live_through(scene: Scene, fate: Fate, rows: int) -> None:
    """A whole run; those who are killed are killed at random places of it."""
    dice = random.Random(7)
    trainer, producers = scene.trainer(), [scene.producer() for _ in range(fate.producers)]
    victims = ["producer"] * fate.producers_killed + ["trainer"] * fate.trainer_killed + ["nobody"] * fate.runs_commands
    dice.shuffle(victims)
    for number, victim in enumerate(victims):
        place = int(rows * (number + dice.random()) / (len(victims) + 1))
        scene.wait(lambda place=place: scene.trained_rows >= place, 200.0, "for the next victim's turn")
        time.sleep(dice.uniform(0.0, 0.3))
        if victim == "producer":
            producers.pop(dice.randrange(len(producers))).kill()
            producers.append(scene.producer())
        elif victim == "nobody":
            _ask(scene)
        else:
            assert trainer.poll() is None, "the run ended before the trainer could be killed"
            _kill(trainer)
            trainer = scene.trainer()
    assert trainer.wait(400) == 0, scene.log()[-1000:]


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _ask(scene: Scene) -> None:
    exit_codes = [ctl([str(scene.run), command]) for command in ("snapshot", "pause", "snapshot", "drain", "resume")]
    assert exit_codes == [0, 0, 0, 2, 0], exit_codes


def _fingerprint(scene: Scene, names: list[str]) -> str:
    """sha256 over the weights of every SAE of these snapshots, and over the trained tokens in their order."""
    digest = hashlib.sha256(scene.rows_file.read_bytes())
    for name in names:
        for weights in sorted((scene.run / "snapshots" / name).glob("*/sae_weights.safetensors")):
            digest.update(f"{name}/{weights.parent.name}".encode() + weights.read_bytes())
    return digest.hexdigest()


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    table = Table("source", "fate", "sha256 of all weights and rows", "killed, rows")
    with tempfile.TemporaryDirectory(prefix="sluice-drill-") as folder:
        for what, outcome in (
            ("synthetic", synthetic(Path(folder, "synthetic"), quick)),
            ("demo, float32", language_model(Path(folder, "float32"), quick, "float32")),
            ("demo, bfloat16", language_model(Path(folder, "bfloat16"), quick, "bfloat16")),
        ):
            for fate, sha in outcome.details.items():
                table.add_row(what, fate, sha[:24], "")
            table.add_row(what, "in all", "equal", f"{outcome.rounds}, {outcome.rows:,}", end_section=True)
            print(f"{what}: {outcome.note}", flush=True)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
