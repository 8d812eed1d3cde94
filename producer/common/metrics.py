"""Metrics of a process: what a metric is, how tables of them become Prometheus families, the port that serves them.

A metric is one row of a table; names are promises to dashboards and alerts, so a row is renamed only on purpose. Each
process has its own tables: `producer.metrics`, `trainer.metrics`, `monitor.metrics`. One collector per process holds
the latest report. `update` swaps the reference, a scrape reads it: the training loop never waits for Prometheus, and
no scrape touches a tensor. A value that is None is not shown at all, NaN is shown (an alert watches for it). Nothing is
labelled by latent.

    registry = new_registry()
    metrics = TrainerMetrics(registry, {"run": "demo", "model": "gpt2"})
    port, close = start_metrics_server(registry, "127.0.0.1", 9710)
    metrics.update(report)
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from errno import EADDRINUSE
from itertools import accumulate
from typing import Any, Literal

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from producer.common.server import DEFAULT_LIMITS, ServerLimits, listen, serve

Kind = Literal["gauge", "counter", "summary", "histogram", "info"]


@dataclass(frozen=True)
class Metric:
    """One metric. `read` takes the report and returns a number, or None when there is none to show.

    `unit` is what one counts, and stands behind the help text; a `ratio` is a share of 1.
    With `label`, it returns {label value: number}; `summary` is (count, sum), `histogram` is the counts between `edges`
    and, last, the count below all of them; `info` is {label: text}.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    read: Callable[[Any], Any]
    label: str | None = None
    edges: tuple[float, ...] = ()


def new_registry() -> CollectorRegistry:
    """A registry that holds the process's memory, CPU seconds and open files already."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


Sources = Sequence[tuple[tuple[str, ...], Any]]


def families(table: Iterable[Metric], sources: Sources, labels: tuple[str, ...] = ()) -> Iterator[Family]:
    """One family per metric with a sample per source, a source being (values of `labels`, report)."""
    for metric in table:
        family = _empty(metric, labels)
        for values, source in sources:
            _fill(family, metric, values, metric.read(source))
        yield family


def _empty(metric: Metric, labels: tuple[str, ...]) -> Any:
    all_labels = labels + ((metric.label,) if metric.label else ())
    kinds: dict[Kind, Any] = {
        "gauge": GaugeMetricFamily,
        "counter": CounterMetricFamily,
        "summary": SummaryMetricFamily,
        "histogram": HistogramMetricFamily,
        "info": InfoMetricFamily,
    }
    return kinds[metric.kind](metric.name.removesuffix("_info"), _help_with_unit(metric), labels=all_labels)


def _help_with_unit(metric: Metric) -> str:
    # OpenMetrics' own place for a unit is for names that end with it, which those of ratios and losses do not.
    return metric.help if metric.kind == "info" else f"{metric.help} [{metric.unit}]"


def _fill(family: Any, metric: Metric, values: tuple[str, ...], read: Any) -> None:
    if read is None:
        return
    if metric.kind == "summary":
        family.add_metric(values, count_value=read[0], sum_value=read[1])
    elif metric.kind == "histogram":
        family.add_metric(values, _buckets(read, metric.edges), sum_value=None)
    elif metric.label:
        for value, number in read.items():
            family.add_metric((*values, value), number)
    else:
        family.add_metric(values, read)


def _buckets(counts: Sequence[int], edges: Sequence[float]) -> list[tuple[str, float]]:
    """Cumulative (upper edge, count); what is below all edges, such as log10 of zero, is counted in the first."""
    *bins, below = counts
    cumulative = accumulate([bins[0] + below, *bins[1:], 0])
    return list(zip([*map(str, edges), "+Inf"], cumulative, strict=True))


def one_of(states: tuple[str, ...], current: str) -> dict[str, int]:
    """1 for the current state, 0 for the others, by name."""
    return {state: int(state == current) for state in (*states, *({current} - set(states)))}


def metric_names(table: Iterable[Metric]) -> Iterator[Family]:
    """Families without samples: the registry refuses a name that two collectors use."""
    return (_empty(metric, ()) for metric in table)


# --- The port --------------------------------------------------------------------------------------------------------

Verdict = Callable[[], tuple[bool, str]]
"""Answers whether something holds, with a sentence for people."""


def start_metrics_server(
    registry: CollectorRegistry,
    host: str,
    port: int,
    next_free: int = 0,
    leave: Collection[int] = (),
    alive: Verdict = lambda: (True, "ok"),
    ready: Verdict = lambda: (True, "ok"),
    allowed_hosts: Collection[str] = (),
    limits: ServerLimits = DEFAULT_LIMITS,
) -> tuple[int, Callable[[], None]]:
    """Serves /metrics, /healthz and /readyz from a thread; returns the port and what closes it.

    Port 0 takes any free one. When `port` is taken, the `next_free` ports after it are tried, without those in `leave`:
    several producers share a machine. /healthz tells whether the process is `alive`, /readyz whether it is `ready` for
    its peers: 200 or 503, and the sentence. A process that waits for its peers is alive. On loopback it answers to
    loopback's names and `allowed_hosts` only: the numbers name the run and the model. Raises OSError, naming host and
    port, when nothing could be bound.
    """
    listener = _bind(host, port, next_free, leave, limits)
    app = _metrics_app(registry, alive, ready)
    return listener.getsockname()[1], serve(app, listener, "metrics", {host, *allowed_hosts}, limits=limits)


def _bind(host: str, port: int, next_free: int, leave: Collection[int], limits: ServerLimits) -> socket.socket:
    last = min(port + next_free, 65535) if port else 0
    candidates = [number for number in range(port, last + 1) if number == port or number not in leave]
    try:
        for candidate in candidates:
            try:
                return listen(host, candidate, limits)
            except OSError as error:
                if error.errno != EADDRINUSE or candidate == candidates[-1]:
                    raise
    except OSError as error:
        ports = f"port {port}" if port == last else f"ports {port} to {last}"
        raise OSError(
            f"cannot serve metrics on {host}, {ports}: {error.strerror or error}. "
            "Set another port, or 0 for any free one, in [monitor] of the run file"
        ) from None
    raise AssertionError("the loop returns or raises")


def _metrics_app(registry: CollectorRegistry, alive: Verdict, ready: Verdict) -> Starlette:
    """The three routes. Prometheus' own app answers every path with the metrics, /healthz included."""

    # All three are quick and wait for no lock: they need no thread.

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    def verdict(check: Verdict) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            holds, sentence = check()
            return PlainTextResponse(f"{sentence}\n", 200 if holds else 503)

        return answer

    async def not_found(request: Request, error: Exception) -> Response:
        return PlainTextResponse("there are /metrics, /healthz and /readyz\n", 404)

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/healthz", verdict(alive)),
            Route("/readyz", verdict(ready)),
        ],
        exception_handlers={404: not_found},
    )
