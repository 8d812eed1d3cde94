"""The producer as a process: opens the source, says HELLO to the trainer, and serves leases."""

from __future__ import annotations

import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry

from producer.common.memory import keep_freed_memory
from producer.common.metrics import new_registry, start_metrics_server
from producer.corpus import CorpusError
from producer.health import ProducerHealth
from producer.keys import KeysError
from producer.link import Link, NoTrainer, RefusedByTrainer
from producer.lm.errors import ModelError
from producer.lm.precision import use_deterministic_algorithms
from producer.lm.revisions import follows
from producer.metrics import ProducerMetrics
from producer.packing import chunk_windows_of
from producer.produce import Producer
from producer.settings import ProducerSettings
from producer.sources.base import Source, fingerprint, training_shards
from producer.sources.norms import norm_bounds
from producer.sources.opening import open_source
from producer.wire import Hello

log = logging.getLogger("sluice.producer")

REFUSED = 78
"""Exit code of a producer that the trainer refuses for good."""


def run(settings: ProducerSettings) -> int:
    """Streams until the run is over; returns the exit code."""
    if settings.run.threads is not None:
        torch.set_num_threads(settings.run.threads)
    if settings.run.deterministic:
        use_deterministic_algorithms()
    try:
        source, bounds = _open(settings)
        _serve(settings, source, bounds)
    except RefusedByTrainer as error:
        log.error("%s", error)
        return REFUSED
    except (CorpusError, ModelError, KeysError, NoTrainer, PortError) as error:
        log.error("%s", error)
        return 1
    log.info("the run is over")
    return 0


class PortError(Exception):
    """The metrics port cannot be bound. The message says which and what to do."""


def _open(settings: ProducerSettings) -> tuple[Source, list[float] | None]:
    """(source, norm bound per hook), with the size of a forward pass chosen. Raises CorpusError or ModelError."""
    source = open_source(settings)
    keep_freed_memory()
    source.choose_batch()
    if settings.model is not None and follows(settings.model):
        return source, None  # each revision has its own
    return source, norm_bounds(source, training_shards(source), settings.corpus.outlier_factor)


def _hello(settings: ProducerSettings, source: Source, bounds: list[float] | None, chunk_windows: int) -> Hello:
    """The HELLO of this producer; the link names each session."""
    return Hello(
        producer=uuid.uuid4().hex,
        session="-",
        name=f"{socket.gethostname()}:{os.getpid()}",
        fingerprint=fingerprint(source.facts),
        shards=source.shards,
        held_out=source.held_out,
        context=source.context,
        hooks=source.hooks,
        dtype=settings.stream.dtype,
        chunk_rows=source.context * chunk_windows,
        norm_bounds=bounds,
        provenance=source.facts | source.measurements,
        corpora=source.corpora,
    )


def _serve(settings: ProducerSettings, source: Source, bounds: list[float] | None) -> None:
    """Serves leases and metrics until the run is over."""
    chunk_windows = chunk_windows_of(source, settings.stream.dtype)
    link = Link(settings.stream, _hello(settings, source, bounds, chunk_windows))
    registry = new_registry()
    metrics = ProducerMetrics(registry, {"model": settings.model.name if settings.model else "synthetic"})
    close_metrics = _serve_metrics(settings, registry, ProducerHealth(link, settings.stream.stall_seconds))

    def announce_newest() -> None:
        newest = source.find_newest()
        link.announce_revision(newest.name, newest.number)

    announce_newest()  # with the first HELLO
    try:
        with link:
            producer = Producer(source, link, settings.stream.dtype, chunk_windows, metrics.update)

            def update() -> None:
                announce_newest()
                metrics.update(producer.report())

            with MetricsTimer(update):
                producer.run()
    finally:
        close_metrics()


def _serve_metrics(
    settings: ProducerSettings, registry: CollectorRegistry, health: ProducerHealth
) -> Callable[[], None]:
    """Starts the metrics port; returns what closes it. Raises PortError."""
    table = settings.monitor
    try:
        port, close = start_metrics_server(
            registry,
            table.host,
            table.producer_port,
            next_free=64,
            leave=(table.trainer_port, table.port),
            alive=health.alive,
            ready=health.ready,
            allowed_hosts=table.allowed_hosts,
        )
    except OSError as error:
        raise PortError(str(error)) from None
    log.info("metrics at http://%s:%d/metrics", table.host, port)
    return close


class MetricsTimer:
    """Updates the metrics every second, also while the loop waits for credit or leases."""

    def __init__(self, update: Callable[[], None]) -> None:
        self._stop = threading.Event()
        self._update = update
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            self._update()
