"""Health and readiness: who waits is alive and says for what; who hangs is not. Real loops, sockets and ports."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import monitor.app
from monitor.evaluation.follow import Evaluator
from monitor.metrics import MonitorMetrics
from monitor.settings import MonitorSettings
from producer.common.metrics import Verdict, new_registry, start_metrics_server
from producer.health import ProducerHealth
from tests.small_run import start_run
from tests.small_stream import CHUNK_ROWS, Peer, Producing, named_source, new_ledger, stream_settings, wait_for
from tests.small_stream import trainer as small_trainer
from tests.test_ctl import Trainer
from trainer.health import SENTENCES, TrainerHealth
from trainer.phases import RunPhase

Ask = Callable[[str], tuple[int, str]]


@contextmanager
def asking(alive: Verdict, ready: Verdict) -> Iterator[Ask]:
    """Asks /healthz or /readyz of a real port: (status, sentence)."""
    port, close = start_metrics_server(new_registry(), "127.0.0.1", 0, alive=alive, ready=ready)

    def ask(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as response:
                return response.status, response.read().decode().strip()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode().strip()

    try:
        yield ask
    finally:
        close()


@pytest.fixture
def health(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Trainer, Ask]]:
    """A trainer's loop at work, and its port; a parameter has settings of its stream."""
    stream = stream_settings(f"ipc://{tmp_path}/stream", **getattr(request, "param", {}))
    verdicts = TrainerHealth(hang_seconds=1.0)  # a machine that stands still is hung for a moment: see `wait_for`
    with (
        Trainer(tmp_path / "run", 0.1, stream=stream).at_work() as trainer,
        asking(verdicts.alive, verdicts.ready) as ask,
    ):
        assert ask("/readyz") == (503, "starting: the stream is not open yet")
        verdicts.watch(trainer.loop)
        yield trainer, ask


# The trainer


def test_a_trainer_without_producers_is_alive_and_ready(health: tuple[Trainer, Ask]) -> None:
    """It waits for the first activations: producers may connect, and find work."""
    _, ask = health

    wait_for(lambda: ask("/healthz") == ask("/readyz") == (200, "waiting for the first activations"))


def test_a_trainer_that_fills_its_buffer_says_so(health: tuple[Trainer, Ask]) -> None:
    """Its producer is here, and dashboards see it, long before the first step."""
    at_work, ask = health
    with Peer(at_work.settings.stream).join() as producer:
        producer.send_chunk()
        wait_for(lambda: ask("/healthz") == (200, "filling the buffer"))
        assert at_work.reports == []
        assert at_work.loop.last_report is not None
        assert at_work.loop.last_report.stream.producers == {"working": 1, "idle": 0}


def test_a_starved_trainer_is_alive_and_says_so(health: tuple[Trainer, Ask]) -> None:
    """Its only producer leaves in the middle of the corpus; the loop waits, comes round, and is not restarted."""
    at_work, ask = health
    with Peer(at_work.settings.stream).join() as producer:
        for _ in range(4):
            producer.send_chunk()
        at_work.reach(CHUNK_ROWS)
        producer.leave()
    wait_for(lambda: ask("/healthz")[1].startswith("starved"))
    time.sleep(1.5)

    wait_for(lambda: ask("/healthz") == ask("/readyz") == (200, SENTENCES[RunPhase.STARVED]))


def test_a_paused_trainer_is_alive_and_says_how_to_go_on(health: tuple[Trainer, Ask]) -> None:
    at_work, ask = health
    at_work.produce().ask("pause")

    wait_for(lambda: ask("/healthz") == (200, SENTENCES[RunPhase.PAUSED]))


def test_a_wedged_trainer_is_dead_until_it_moves(health: tuple[Trainer, Ask], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that never ends, as a hung device makes it: there are tokens, the loop stands still, and it is told."""
    at_work, ask = health
    at_work.produce()
    assert at_work.loop.run is not None
    hung, released = threading.Event(), threading.Event()
    train_step = at_work.loop.run.train_step

    def hang(batch: object) -> None:
        hung.set()
        released.wait(120)
        train_step(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(at_work.loop.run, "train_step", hang)
    assert hung.wait(60)
    try:
        wait_for(lambda: ask("/healthz")[0] == 503)
        assert "the loop has stood still for" in ask("/healthz")[1]
        assert ask("/readyz")[0] == 503
    finally:
        released.set()
    wait_for(lambda: ask("/healthz") == (200, "training"))


@pytest.mark.parametrize("health", [{"dead_seconds": 1.0}], indirect=True)
def test_a_trainer_whose_stream_has_died_is_dead(health: tuple[Trainer, Ask], monkeypatch: pytest.MonkeyPatch) -> None:
    """Paused, it would not notice by itself: no step asks the stream for tokens."""
    at_work, ask = health
    at_work.produce().ask("pause")
    monkeypatch.setattr(at_work.intake.ledger, "tick", lambda now: 1 / 0)
    wait_for(lambda: ask("/healthz")[0] == 503)

    assert "the stream's thread has died: ZeroDivisionError" in ask("/healthz")[1]
    assert at_work.producer is not None
    at_work.producer.link.__exit__()  # nobody will tell it that the run is over
    at_work.producer = None


def test_a_draining_trainer_is_alive_and_not_ready(health: tuple[Trainer, Ask]) -> None:
    """What is under way is trained, but no producer is given more."""
    at_work, ask = health
    at_work.produce().ask("pause")
    at_work.intake.ledger.wind_down()

    wait_for(lambda: ask("/healthz")[0] == 200)
    assert ask("/readyz") == (503, "draining: producers are given no more work")


# A producer


def test_a_producer_is_ready_once_a_trainer_has_welcomed_it(tmp_path: Path) -> None:
    """Alive while it looks for one; ready and working when it has a lease."""
    settings = stream_settings(f"ipc://{tmp_path}/stream")
    producer = Producing(settings)
    health = ProducerHealth(producer.link, stall_seconds=60.0)
    with asking(health.alive, health.ready) as ask:
        assert ask("/healthz") == (200, "connecting")
        assert ask("/readyz") == (503, "connecting: no trainer has welcomed this producer yet")
        with small_trainer(settings, new_ledger(settings)) as intake:
            wait_for(lambda: ask("/readyz") == (200, "working"))
            intake.drain(finished=True)
            assert producer.wait_for_end() is None
        assert ask("/healthz") == (200, "connecting")


def test_a_producer_that_hangs_in_a_forward_pass_is_dead() -> None:
    """By the time the trainer gives its lease to others, it should be started again."""
    source, hung, released = named_source(), threading.Event(), threading.Event()
    activations = source.activations

    def hang(*arguments):  # type: ignore[no-untyped-def]
        hung.set()
        released.wait(120)
        return activations(*arguments)

    source.activations = hang  # type: ignore[method-assign]
    settings = stream_settings("tcp://127.0.0.1:*")
    with small_trainer(settings, new_ledger(settings)) as intake:
        producer = Producing(stream_settings(intake.endpoint), source)
        health = ProducerHealth(producer.link, stall_seconds=0.3)
        with asking(health.alive, health.ready) as ask:
            assert hung.wait(60)
            wait_for(lambda: ask("/healthz")[0] == 503)
            assert "the loop has not moved for" in ask("/readyz")[1]
            released.set()
            wait_for(lambda: ask("/healthz")[0] == 200)
            intake.drain(finished=True)
            producer.wait_for_end()


# The monitor


def test_a_monitor_is_ready_when_there_is_a_run_to_show(tmp_path: Path) -> None:
    """It may be started before the trainer."""
    settings = MonitorSettings.model_validate({"run": {"directory": str(tmp_path / "run")}})
    follower = monitor.app.RunFollower(settings, MonitorMetrics(new_registry()), threading.Event())
    with asking(follower.alive, follower.ready) as ask:
        assert ask("/healthz")[0] == 200
        assert ask("/readyz")[0] == 503 and "does not exist yet" in ask("/readyz")[1]
        start_run(tmp_path / "run")
        assert ask("/readyz") == (200, "ok")


def test_a_monitor_whose_evaluation_hangs_is_dead(tmp_path: Path) -> None:
    """Its service may still answer; the evaluation has not moved."""
    settings = MonitorSettings.model_validate({"run": {"directory": str(tmp_path / "run")}})
    metrics, stop = MonitorMetrics(new_registry()), threading.Event()
    follower = monitor.app.RunFollower(settings, metrics, stop, hang_seconds=0.0)
    follower._evaluator = Evaluator(settings, metrics, stop)
    follower._evaluator.moved_at = time.monotonic() - 1.0
    with asking(follower.alive, follower.ready) as ask:
        assert ask("/healthz")[0] == 503 and "the evaluation has not moved" in ask("/healthz")[1]
