"""The producer as a process: the source is opened, the trainer told what it streams, and leases served."""

from __future__ import annotations

import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable

import torch

from producer.common.memory import keep_freed_memory
from producer.common.metrics import new_registry, start_metrics_server
from producer.corpus import CorpusError
from producer.health import ProducerHealth
from producer.keys import KeysError
from producer.link import Link, NoTrainer, RefusedByTrainer
from producer.lm.errors import ModelError
from producer.lm.precision import use_deterministic_algorithms
from producer.metrics import ProducerMetrics
from producer.packing import chunk_windows_of
from producer.produce import Producer
from producer.settings import ProducerSettings
from producer.source import fingerprint, norm_bounds, open_source
from producer.wire import Hello, held_out_shards

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
        source = open_source(settings)
        keep_freed_memory()
        source.choose_batch()
        held_out = set(held_out_shards(source.shards, settings.corpus.held_out))
        training = (shard for shard in range(source.shards) if shard not in held_out)
        bounds = norm_bounds(source, training, settings.corpus.outlier_factor)
    except (CorpusError, ModelError) as error:
        log.error("%s", error)
        return 1
    chunk_windows = chunk_windows_of(source, settings.stream.dtype)
    hello = Hello(
        producer=uuid.uuid4().hex,
        session="-",
        name=f"{socket.gethostname()}:{os.getpid()}",
        fingerprint=fingerprint(source.facts),
        shards=source.shards,
        held_out=settings.corpus.held_out,
        context=source.context,
        hooks=source.hooks,
        dtype=settings.stream.dtype,
        chunk_rows=source.context * chunk_windows,
        norm_bounds=bounds,
        provenance=source.facts | source.measurements,
    )
    registry, table = new_registry(), settings.monitor
    metrics = ProducerMetrics(registry, {"model": settings.model.name if settings.model else "synthetic"})
    health = ProducerHealth(settings.stream.stall_seconds)
    try:
        port, close_metrics = start_metrics_server(
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
        log.error("%s", error)
        return 1
    log.info("metrics at http://%s:%d/metrics", table.host, port)
    try:
        with Link(settings.stream, hello) as link:
            health.watch(link)
            producer = Producer(source, link, settings.stream.dtype, chunk_windows, metrics.update)
            with MetricsTimer(lambda: metrics.update(producer.report())):
                producer.run()
        log.info("the run is over")
        return 0
    except RefusedByTrainer as error:
        log.error("%s", error)
        return REFUSED
    except (NoTrainer, KeysError) as error:
        log.error("%s", error)
        return 1
    finally:
        close_metrics()


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
