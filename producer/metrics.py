"""Metrics of a producer: name, unit and meaning of each, and the field of the report that it shows."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from producer.common.metrics import Metric, families, metric_names, one_of
from producer.report import ProducerReport

PRODUCER_STATES = ("starting", "connecting", "working", "idle", "leaving")

# fmt: off
PRODUCER = (
    Metric("sluice_producer_state", "gauge", "0 or 1", "1 for the state the producer is in, 0 for the others.",
           lambda r: one_of(PRODUCER_STATES, r.state), "state"),
    Metric("sluice_producer_tokens_total", "counter", "tokens", "Activations sent.", lambda r: r.tokens),
    Metric("sluice_producer_rows_dropped_total", "counter", "rows",
           "Positions not sent, by reason: padding, BOS, special token, role, position, outlier.",
           lambda r: r.rows_dropped, "reason"),
    Metric("sluice_producer_rows_dropped_ratio", "gauge", "ratio", "Share of all positions seen that were not sent.",
           lambda r: _dropped_ratio(r)),
    Metric("sluice_producer_chunks_total", "counter", "chunks", "Chunks of activations sent.", lambda r: r.chunks),
    Metric("sluice_producer_shards_total", "counter", "shards", "Shards finished.", lambda r: r.shards),
    Metric("sluice_producer_forward_seconds", "summary", "seconds",
           "Forward passes of the language model, and the seconds they took.",
           lambda r: (r.forwards, r.forward_seconds)),
    Metric("sluice_producer_stall_seconds_total", "counter", "seconds", "Seconds spent waiting, by cause.",
           lambda r: r.stall_seconds, "cause"),
    Metric("sluice_producer_sessions_total", "counter", "sessions", "Times a trainer has welcomed this producer.",
           lambda r: r.sessions),
    # Not layers_total: that suffix is the counters', and promtool refuses it on a gauge.
    Metric("sluice_producer_layers", "gauge", "blocks",
           "Blocks that the language model has.", lambda r: r.layers_total or None),
    Metric("sluice_producer_layers_run", "gauge", "blocks", "Blocks of the language model that execute in one pass.",
           lambda r: r.layers_run or None),
)
# fmt: on

PRODUCER_INFO = (Metric("sluice_producer_info", "info", "text", "What this producer runs.", lambda info: info),)


class ProducerMetrics(Collector):
    """Collects the metrics of one producer from its latest report."""

    def __init__(self, registry: CollectorRegistry, info: dict[str, str]) -> None:
        self._info = info
        self._report = ProducerReport()
        registry.register(self)

    def update(self, report: ProducerReport) -> None:
        self._report = report

    def collect(self) -> Iterator[Family]:
        yield from families(PRODUCER_INFO, [((), self._info)])
        yield from families(PRODUCER, [((), self._report)])

    def describe(self) -> Iterator[Family]:
        return metric_names(PRODUCER_INFO + PRODUCER)


def _dropped_ratio(report: ProducerReport) -> float | None:
    dropped = sum(report.rows_dropped.values())
    return dropped / (dropped + report.tokens) if dropped + report.tokens else None
