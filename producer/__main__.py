"""`python -m producer RUN.toml`: streams activations to the trainer until the run is over.

Settings are read first, so that `--help` and faults answer at once; torch and transformers are imported after.
Exit codes: 0 finished or stopped, 1 failed, 2 bad settings, 78 refused by the trainer.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import uuid

from producer.common.addresses import path_argument
from producer.common.logs import set_up
from producer.common.process import ignore_stopping, run_within_limits, stop_on_signals
from producer.common.shell import shell_command
from producer.common.toml import toml_value
from producer.settings import ProducerSettings, parse_command_line

PURPOSE = f"""Runs the language model over the corpus and streams the residual activations of the chosen hooks.

Keeps no state: start one, ten, or kill them. What to compute is leased by the trainer.
`{shell_command("producer", "keys", "DIR")}` writes CURVE keys for a stream that leaves this machine."""

REFUSED = 78


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["keys"]:
        return _keys(arguments[1:])
    settings = parse_command_line(shell_command("producer"), PURPOSE, ProducerSettings, arguments)
    set_up("producer")
    stop_on_signals(_interrupt)
    try:
        return run_within_limits(logging.getLogger("sluice.producer"), lambda: _run(settings))
    except KeyboardInterrupt:
        return 0


def _interrupt() -> None:
    # The first signal leaves cleanly; more of them must not interrupt the leaving.
    ignore_stopping()
    raise KeyboardInterrupt


def _run(settings: ProducerSettings) -> int:
    import torch

    from producer.common.memory import keep_freed_memory
    from producer.common.metrics import new_registry, start_metrics_server
    from producer.corpus import CorpusError
    from producer.health import Health
    from producer.keys import KeysError
    from producer.link import Link, NoTrainer, Refused
    from producer.lm.errors import ModelError
    from producer.lm.precision import take_deterministic_algorithms
    from producer.metrics import ProducerMetrics
    from producer.produce import Producer, chunk_windows
    from producer.source import fingerprint, norm_bounds, open_source
    from producer.wire import DTYPE_BYTES, Hello, held_out_shards

    log = logging.getLogger("sluice.producer")
    if settings.run.threads is not None:
        torch.set_num_threads(settings.run.threads)
    if settings.run.deterministic:
        take_deterministic_algorithms()
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
    row_bytes = DTYPE_BYTES[settings.stream.dtype] * sum(hook.width for hook in source.hooks)
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
        chunk_rows=source.context * chunk_windows(source.context, row_bytes, source.batch_windows),
        norm_bounds=bounds,
        provenance=source.facts | source.findings,
    )
    registry, table = new_registry(), settings.monitor
    metrics = ProducerMetrics(registry, {"model": settings.model.name if settings.model else "synthetic"})
    health = Health(settings.stream.stall_seconds)
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
            producer = Producer(source, link, settings.stream.dtype, metrics.update)
            with _told_every_second(lambda: metrics.update(producer.report())):
                producer.run()
        log.info("the run is over")
        return 0
    except Refused as error:
        log.error("%s", error)
        return REFUSED
    except (NoTrainer, KeysError) as error:
        log.error("%s", error)
        return 1
    finally:
        close_metrics()


class _told_every_second:
    """Keeps the metrics fresh while the loop waits for credit or leases."""

    def __init__(self, tell) -> None:  # type: ignore[no-untyped-def]
        self._stop = threading.Event()
        self._tell = tell
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            self._tell()


def _keys(arguments: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog=shell_command("producer", "keys"), description="Writes CURVE keys for the stream."
    )
    parser.add_argument("folder", metavar="DIR", type=path_argument, help="new folder for the keys")
    folder = parser.parse_args(arguments).folder.absolute()
    from producer.keys import KeysError, write_keys

    try:
        write_keys(folder)
    except KeysError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"keys written to {folder}: the trainer needs all of it; a producer needs server.key and client.key_secret.")
    print(f"Set keys = {toml_value(str(folder))} under [stream] on both sides.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
