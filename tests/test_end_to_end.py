"""Real processes, real sockets: what a user starts, interrupts and kills."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from producer.wire import held_out_shards
from tests.small_processes import Start, small_processes, tokens_in_checkpoint, wait_until
from trainer.saes.selftest import check
from trainer.snapshot import snapshot_names, verify
from trainer.state.checkpoint import load_newest

SHARDS, WINDOWS, CONTEXT = 24, 32, 32

RUN = f"""
[run]
directory = "DIR/run"
threads = 1
[stream]
endpoint = "ipc://DIR/stream"
dtype = "float32"
heartbeat_seconds = 0.2
dead_seconds = 1.5
[corpus]
kind = "synthetic"
context = {CONTEXT}
outlier_factor = 1e6
[corpus.synthetic]
d_in = 8
features = 16
shards = {SHARDS}
shard_windows = {WINDOWS}
[buffer]
rows = 20000
[optimizer]
batch = 128
matmul = "float32"
[[sae]]
name = "topk"
architecture = "topk"
d_sae = 32
k = 4
[snapshots]
every_tokens = 8000
[checkpoint]
every_seconds = 0.3
[monitor]
trainer_port = 0
producer_port = 0
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN.replace("DIR", str(tmp_path)))
    return path


@pytest.fixture
def start(tmp_path: Path, run_file: Path) -> Iterator[Start]:
    with small_processes(tmp_path) as start:
        yield start


def trained_rows(tmp_path: Path) -> np.ndarray:
    """Every token trained on in the surviving lineage, as one number each, sorted."""
    shard, window, position = np.fromfile(tmp_path / "rows", np.int32).reshape(-1, 3).T
    return np.sort((shard * WINDOWS + window) * CONTEXT + position)


def all_rows(epochs: int = 1) -> np.ndarray:
    """Every token that should be: all shards but the held-out ones, once per epoch."""
    shards = np.setdiff1d(np.arange(SHARDS), held_out_shards(SHARDS, 0.0625))
    rows = (shards[:, None] * WINDOWS * CONTEXT + np.arange(WINDOWS * CONTEXT)).ravel()
    return np.sort(np.tile(rows, epochs))


def test_a_finite_corpus_is_trained_once_and_everybody_leaves(start: Start, tmp_path: Path) -> None:
    """Two producers, one epoch: each token once, exit codes 0, valid snapshots, a summary."""
    trainer, producers = start("trainer"), [start("producer"), start("producer")]

    assert trainer.wait(120) == 0
    assert [producer.wait(120) for producer in producers] == [0, 0]
    np.testing.assert_array_equal(trained_rows(tmp_path), all_rows())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(all_rows()) == summary["tokens"] == summary["rows_trained"]
    names = snapshot_names(tmp_path / "run")
    assert len(names) >= 2
    for name in names:
        verify(tmp_path / "run" / "snapshots" / name)
        check(tmp_path / "run" / "snapshots" / name / "topk")


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_trains_every_row_exactly_once(start: Start, tmp_path: Path, how: signal.Signals) -> None:
    """The trainer is stopped or killed three times in mid-run and started again: nothing lost, nothing repeated.

    Over several epochs, so that later ones are counted too and a cut may fall across two.
    """
    epochs, passes = 12, "corpus.epochs=12"
    trainer, producer = start("trainer", passes), start("producer", passes)
    for interruption in range(1, 4):
        target = interruption * len(all_rows(epochs)) // 6
        running = trainer
        wait_until(lambda: tokens_in_checkpoint(tmp_path) >= target or running.poll() is not None)  # noqa: B023
        assert trainer.poll() is None, "the run ended before it could be interrupted"
        trainer.send_signal(how)
        assert trainer.wait(120) in (0, -how)
        trainer = start("trainer", passes)

    assert trainer.wait(120) == 0
    assert producer.wait(120) == 0
    np.testing.assert_array_equal(trained_rows(tmp_path), all_rows(epochs))


@pytest.mark.long
def test_producers_may_be_killed_and_replaced(start: Start, tmp_path: Path) -> None:
    """A producer killed in mid-shard loses nothing: its tokens are computed again by another, once."""
    trainer = start("trainer")
    for _ in range(3):
        victim = start("producer")
        before = tokens_in_checkpoint(tmp_path)
        wait_until(lambda before=before: tokens_in_checkpoint(tmp_path) > before or trainer.poll() is not None)
        victim.kill()
    start("producer")

    assert trainer.wait(120) == 0
    np.testing.assert_array_equal(trained_rows(tmp_path), all_rows())


def test_sigterm_writes_a_checkpoint(start: Start, tmp_path: Path) -> None:
    """A stop in the first second, before any periodic checkpoint, keeps what was learned."""
    trainer, _ = start("trainer", "checkpoint.every_seconds=1000.0"), start("producer")
    wait_until(lambda: (tmp_path / "rows").exists() and (tmp_path / "rows").stat().st_size > 0)
    trainer.terminate()

    assert trainer.wait(120) == 0
    saved = load_newest(tmp_path / "run")
    assert saved is not None
    assert saved.document.ledger.rows_trained > 0


def test_a_producer_with_another_corpus_is_refused(start: Start, tmp_path: Path) -> None:
    """Exit code 78, and the line names what differs with both values."""
    endless = "corpus.epochs=1000"
    start("trainer", endless), start("producer", endless)
    wait_until(lambda: tokens_in_checkpoint(tmp_path) > 0)
    stranger = start("producer", "corpus.synthetic.shards=25")

    assert stranger.wait(120) == 78
    assert "differs" in (tmp_path / "producer.log").read_text()


def test_activations_that_do_not_vary_end_the_run_with_a_sentence(start: Start, tmp_path: Path) -> None:
    """All are zero: with a norm bound the producer notices at its start, without one the trainer; nobody is left."""
    zeros = "corpus.synthetic={d_in = 8, features = 16, shards = 24, shard_windows = 32, active = 1e-12}"
    trainer, careless = start("trainer", zeros), start("unnamed_producer", zeros, "corpus.outlier_factor=0.0")
    careful = start("unnamed_producer", zeros)

    assert careful.wait(120) == 1
    assert trainer.wait(120) == 1
    assert careless.wait(120) == 0
    log = (tmp_path / "trainer.log").read_text()
    assert "model.hooks = 'synthetic': the first " in log and "do not vary (their rms is 0)" in log
    assert (
        "median norm, which corpus.outlier_factor counts from, is 0" in (tmp_path / "unnamed_producer.log").read_text()
    )
    assert "Traceback" not in log + (tmp_path / "unnamed_producer.log").read_text()


def test_a_producer_without_a_trainer_says_so_and_gives_up(start: Start, tmp_path: Path) -> None:
    """One line within seconds, with what to do; exit code 1 when patience is over."""
    lonely = start("producer", "stream.patience_seconds=1.0")

    assert lonely.wait(120) == 1
    log = (tmp_path / "producer.log").read_text()
    assert "no trainer answers at ipc://" in log
    assert "python -m trainer" in log
    assert "Traceback" not in log


def test_two_trainers_do_not_share_a_run_directory(start: Start, tmp_path: Path) -> None:
    """The second one is refused in a line."""
    start("trainer")
    wait_until(lambda: (tmp_path / "run" / "settings.toml").exists())

    assert start("trainer").wait(120) == 1
    assert "belongs to a trainer that is running" in (tmp_path / "trainer.log").read_text()


@pytest.mark.long
def test_a_complete_run_stays_complete(start: Start, tmp_path: Path) -> None:
    """Started again after its end, the trainer says so, leaves with 0 and leaves summary and snapshots as they are."""
    trainer = start("trainer")
    start("producer")
    assert trainer.wait(120) == 0
    summary = (tmp_path / "run" / "summary.json").read_text()
    names = snapshot_names(tmp_path / "run")

    assert start("trainer").wait(120) == 0
    assert (tmp_path / "run" / "summary.json").read_text() == summary
    assert snapshot_names(tmp_path / "run") == names
    assert "the run is complete" in (tmp_path / "trainer.log").read_text()
