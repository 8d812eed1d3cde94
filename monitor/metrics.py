"""Every metric of the three processes: its name, its unit, what it means, and where its value stands in a report.

A metric is one row of a table; names are promises to dashboards and alerts, so a row is renamed only on purpose.
One collector per process holds the latest report. `update` swaps the reference, a scrape reads it: the training loop
never waits for Prometheus, and no scrape touches a tensor. A value that is None is not shown at all, NaN is shown
(an alert watches for it). Nothing is labelled by latent: the firing rates of all latents are one histogram.

    registry = new_registry()
    metrics = TrainerMetrics(registry, {"run": "demo", "model": "gpt2"})
    port, close = start_metrics_server(registry, "127.0.0.1", 9710)
    metrics.update(report)

Light: prometheus_client, the two report modules, and a web server.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from producer.common.server import listen, serve
from producer.report import ProducerReport
from trainer.report import DENSITY_EDGES, SaeReport, StepReport

Kind = Literal["gauge", "counter", "summary", "histogram", "info"]


@dataclass(frozen=True)
class Metric:
    """One metric. `read` takes the report and returns a number, or None when there is none to show.

    `unit` is what one counts, and stands behind the help text; a `ratio` is a share of 1.
    With `label`, it returns {label value: number}; `summary` is (count, sum), `histogram` is DENSITY_EDGES' counts,
    `info` is {label: text}.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    read: Callable[[Any], Any]
    label: str | None = None


# --- The trainer -----------------------------------------------------------------------------------------------------

TRAINER_STATES = ("filling", "training", "starved", "paused", "draining")


@dataclass(frozen=True)
class Milestones:
    """What the trainer tells beside its reports."""

    info: dict[str, str]
    checkpoint_interval: float | None = None
    checkpoint_time: float | None = None
    snapshot_tokens: int | None = None
    snapshot_time: float | None = None


# fmt: off
MILESTONES = (
    Metric("sluice_run_info", "info", "text", "The run that this trainer works on.", lambda m: m.info),
    Metric("sluice_checkpoint_last_success_timestamp_seconds", "gauge", "seconds",
           "When the newest complete checkpoint was written, in seconds since the Unix epoch.",
           lambda m: m.checkpoint_time),
    Metric("sluice_checkpoint_interval_seconds", "gauge", "seconds",
           "How often a checkpoint is written: [checkpoint] every_seconds of the run file.",
           lambda m: m.checkpoint_interval),
    Metric("sluice_snapshot_tokens", "gauge", "tokens",
           "Tokens trained when the newest snapshot was published.", lambda m: m.snapshot_tokens),
    Metric("sluice_snapshot_timestamp_seconds", "gauge", "seconds",
           "When this trainer published its newest snapshot, in seconds since the Unix epoch.",
           lambda m: m.snapshot_time),
)

STEP = (
    Metric("sluice_report_timestamp_seconds", "gauge", "seconds",
           "When the loop last reported, in seconds since the Unix epoch; it stands still when the loop hangs.",
           lambda r: r.time),
    Metric("sluice_state", "gauge", "0 or 1", "1 for the state the loop is in, 0 for the others.",
           lambda r: _one_of(TRAINER_STATES, r.state), "state"),
    Metric("sluice_tokens_trained_total", "counter", "tokens",
           "Rows trained on in this run; a restart goes on from the checkpoint's count.", lambda r: r.tokens),
    Metric("sluice_target_tokens", "gauge", "tokens", "Rows after which the run ends, when it was told.",
           lambda r: r.target_tokens),
    Metric("sluice_steps_total", "counter", "steps", "Training steps of this run.", lambda r: r.step),
    Metric("sluice_tokens_per_second", "gauge", "tokens per second",
           "Rows trained on per second, between the last two reports.",
           lambda r: r.tokens_per_second),
    Metric("sluice_step_seconds", "gauge", "seconds",
           "Mean duration of a step between the last two reports, in seconds, without waiting for data.",
           lambda r: r.step_seconds),
    Metric("sluice_data_wait_seconds_total", "counter", "seconds", "Seconds the loop has waited for rows.",
           lambda r: r.data_wait_seconds),
    Metric("sluice_data_wait_ratio", "gauge", "ratio",
           "Share of the last ten seconds in which training waited for rows: the producers are the bottleneck.",
           lambda r: r.stream.data_wait_ratio),
    Metric("sluice_credit_wait_ratio", "gauge", "ratio",
           "Share of the last ten seconds in which producers waited for room: the trainer is the bottleneck.",
           lambda r: r.stream.credit_wait_ratio),
    Metric("sluice_buffer_rows", "gauge", "rows", "Rows in the shuffling buffer.", lambda r: r.buffer_rows),
    Metric("sluice_buffer_capacity_rows", "gauge", "rows", "Rows that the shuffling buffer can hold.",
           lambda r: r.buffer_capacity_rows),
    Metric("sluice_buffer_same_context_mates", "gauge", "rows",
           "Expected number of other rows of the same window in a row's batch; the smaller, the better shuffled.",
           lambda r: r.same_context_mates),
    Metric("sluice_epoch", "gauge", "epochs",
           "The pass over the corpus being leased, from 0.", lambda r: r.stream.epoch),
    Metric("sluice_tokens_received_total", "counter", "tokens", "Rows taken into the buffer.",
           lambda r: r.stream.tokens_received),
    Metric("sluice_tokens_quarantined", "gauge", "tokens",
           "Rows of quarantined shards that are not trained on; absent while nobody knows how many some have.",
           lambda r: r.stream.tokens_quarantined),
    Metric("sluice_suspect_shards", "gauge", "shards",
           "Shards on which three or more producers in a row were lost before they sent a row; they are leased last.",
           lambda r: r.stream.suspect_shards),
    Metric("sluice_tokens_discarded_total", "counter", "tokens",
           "Rows that producers named as outliers and did not send.",
           lambda r: r.stream.rows_discarded),
    Metric("sluice_rows_rejected_total", "counter", "rows", "Rows that arrived and were not taken, by reason.",
           lambda r: r.stream.rows_rejected, "reason"),
    Metric("sluice_credit_rows_outstanding", "gauge", "rows",
           "Rows that producers may still send under the credit granted.",
           lambda r: r.stream.credit_rows_outstanding),
    Metric("sluice_leases", "gauge", "shards", "Shards of this epoch by state.",
           lambda r: {"free": 0, "leased": 0, "received": 0, "trained": 0, "set_aside": 0} | r.stream.leases, "state"),
    Metric("sluice_producers", "gauge", "producers", "Connected producers by state.",
           lambda r: {"working": 0, "idle": 0} | r.stream.producers, "state"),
    Metric("sluice_sessions_lost_total", "counter", "sessions",
           "Producers that fell silent or were refused in mid-session.",
           lambda r: r.stream.sessions_lost),
    Metric("sluice_protocol_errors_total", "counter", "messages", "Messages dropped, by kind of fault.",
           lambda r: r.stream.protocol_errors, "kind"),
    Metric("sluice_auth_failures_total", "counter", "connections",
           "Connections refused because their key is not known.",
           lambda r: r.stream.auth_failures),
    Metric("sluice_invariant_breaches_total", "counter", "breaches",
           "Times the books did not balance, by what was broken; each is a fault of Sluice, and the log says more.",
           lambda r: r.stream.breaches, "invariant"),
)

SAE = (
    Metric("sluice_l0", "gauge", "latents", "Mean number of latents active on a row.", lambda s: s.l0),
    Metric("sluice_mse", "gauge", "squared activation",
           "Mean squared error per element, in the units of the raw activations.",
           lambda s: s.mse),
    Metric("sluice_fvu", "gauge", "ratio",
           "Fraction of variance unexplained: 0 is perfect, 1 is no better than the mean.",
           lambda s: s.fvu),
    Metric("sluice_dead_latents", "gauge", "latents", "Latents that have not fired for the run's dead_tokens.",
           lambda s: s.dead_latents),
    Metric("sluice_dead_latents_ratio", "gauge", "ratio",
           "Share of latents that have not fired for the run's dead_tokens.",
           lambda s: s.dead_latents_ratio),
    Metric("sluice_shrinkage", "gauge", "ratio",
           "E|x_hat|² / E[x·x_hat] about the mean of x: 1 is unbiased, less is suppressed.", lambda s: s.shrinkage),
    Metric("sluice_loss", "gauge", "loss", "Loss of the last step, by part.", lambda s: s.loss, "part"),
    Metric("sluice_learning_rate", "gauge", "rate", "Learning rate of the last step.", lambda s: s.learning_rate),
    Metric("sluice_grad_norm", "gauge", "loss per weight",
           "Norm of the gradient before clipping.", lambda s: s.grad_norm),
    Metric("sluice_skipped_steps_total", "counter", "steps",
           "Steps whose gradient was not finite; they changed nothing.",
           lambda s: s.skipped_steps),
    Metric("sluice_feature_density", "histogram", "latents",
           "Latents by log10 of their recent firing rate; silent ones stand in the lowest bucket. A distribution over "
           "latents at this moment, not over time: read it without rate().", lambda s: s.density),
)
# fmt: on


class TrainerMetrics(Collector):
    """What the trainer shows."""

    def __init__(
        self, registry: CollectorRegistry, run_info: dict[str, str], checkpoint_interval: float | None = None
    ) -> None:
        """`run_info` is shown as labels; `checkpoint_interval` in seconds."""
        self._milestones = Milestones(run_info, checkpoint_interval)
        self._report: StepReport | None = None
        registry.register(self)

    def update(self, report: StepReport) -> None:
        self._report = report

    def set_checkpoint_time(self, unix_seconds: float) -> None:
        self._milestones = replace(self._milestones, checkpoint_time=unix_seconds)

    def set_snapshot(self, tokens: int, unix_seconds: float) -> None:
        self._milestones = replace(self._milestones, snapshot_tokens=tokens, snapshot_time=unix_seconds)

    def collect(self) -> Iterator[Family]:
        report = self._report
        saes: tuple[SaeReport, ...] = report.saes if report else ()
        yield from _families(MILESTONES, [((), self._milestones)])
        yield from _families(STEP, [((), report)] if report else [])
        yield from _families(SAE, [((sae.name,), sae) for sae in saes], ("sae",))

    def describe(self) -> Iterator[Family]:
        return _names(MILESTONES + STEP + SAE)


# --- A producer ------------------------------------------------------------------------------------------------------

PRODUCER_STATES = ("starting", "connecting", "working", "idle", "leaving")

# fmt: off
PRODUCER = (
    Metric("sluice_producer_state", "gauge", "0 or 1", "1 for the state the producer is in, 0 for the others.",
           lambda r: _one_of(PRODUCER_STATES, r.state), "state"),
    Metric("sluice_producer_tokens_total", "counter", "tokens", "Rows sent.", lambda r: r.tokens),
    Metric("sluice_producer_rows_dropped_total", "counter", "rows", "Positions not sent, by reason.",
           lambda r: r.rows_dropped, "reason"),
    Metric("sluice_producer_rows_dropped_ratio", "gauge", "ratio", "Share of all positions seen that were not sent.",
           lambda r: _dropped_ratio(r)),
    Metric("sluice_producer_chunks_total", "counter", "chunks", "Chunks of rows sent.", lambda r: r.chunks),
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
    """What a producer shows."""

    def __init__(self, registry: CollectorRegistry, info: dict[str, str]) -> None:
        self._info = info
        self._report = ProducerReport()
        registry.register(self)

    def update(self, report: ProducerReport) -> None:
        self._report = report

    def collect(self) -> Iterator[Family]:
        yield from _families(PRODUCER_INFO, [((), self._info)])
        yield from _families(PRODUCER, [((), self._report)])

    def describe(self) -> Iterator[Family]:
        return _names(PRODUCER_INFO + PRODUCER)


def _dropped_ratio(report: ProducerReport) -> float | None:
    dropped = sum(report.rows_dropped.values())
    return dropped / (dropped + report.tokens) if dropped + report.tokens else None


# --- The monitor -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watch:
    """What the monitor knows of the run, and of its own work."""

    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The newest evaluation.json of each SAE."""
    snapshots: int = 0
    newest_tokens: int | None = None
    failures: int = 0
    broken: bool = False
    finished: bool = False


# fmt: off
EVALUATION = (
    Metric("sluice_ce_delta", "gauge", "nats per token",
           "Cross-entropy that the language model loses by reading x_hat for x, in nats per token: the primary number.",
           lambda e: e.get("ce_delta")),
    Metric("sluice_ce_recovered", "gauge", "ratio",
           "Share of the cross-entropy lost to zero ablation that the SAE recovers: 1 is no loss at all.",
           lambda e: e.get("ce_recovered")),
    Metric("sluice_ce_recovered_mean_ablation", "gauge", "ratio",
           "Share of the cross-entropy lost to mean ablation that the SAE recovers; the stricter of the two.",
           lambda e: e.get("ce_recovered_mean_ablation")),
    Metric("sluice_kl", "gauge", "nats per token",
           "KL(P_clean ‖ P_sae) of the language model's predictions, in nats per token.",
           lambda e: e.get("kl")),
    Metric("sluice_ce_clean", "gauge", "nats per token",
           "Cross-entropy of the untouched language model, in nats per token.",
           lambda e: e.get("ce_clean")),
    Metric("sluice_ce_sae", "gauge", "nats per token",
           "Cross-entropy of the language model that reads x_hat, in nats per token.",
           lambda e: e.get("ce_sae")),
    Metric("sluice_evaluation_fvu", "gauge", "ratio",
           "Fraction of variance unexplained on held-out rows: 0 is perfect.",
           lambda e: e.get("fvu")),
    Metric("sluice_evaluation_l0", "gauge", "latents",
           "Mean number of latents active on a held-out row.", lambda e: e.get("l0")),
    Metric("sluice_evaluation_cosine", "gauge", "ratio",
           "Mean cosine of what the SAE should give and what it gives, on held-out rows: 1 is the same direction.",
           lambda e: e.get("cosine")),
    Metric("sluice_evaluation_shrinkage", "gauge", "ratio",
           "E|x_hat|² / E[x·x_hat] about the mean of x on held-out rows: 1 is unbiased, less is suppressed.",
           lambda e: e.get("shrinkage")),
    Metric("sluice_evaluation_dense_latents", "gauge", "latents",
           "Latents that fire on more than a tenth of the held-out rows.", lambda e: e.get("dense_latents")),
    Metric("sluice_evaluation_dead_latents", "gauge", "latents",
           "Latents that fire on no held-out row; rare ones are among them.", lambda e: e.get("dead_latents")),
    Metric("sluice_explanation_f1", "gauge", "ratio",
           "Mean F1 with which an n-gram tells where a latent fires, on text that it was not found on; 1 is always.",
           lambda e: e.get("explanation_f1")),
    Metric("sluice_ablation_effects_ratio", "gauge", "ratio",
           "Effective share of the next logits that ablating one latent changes, mean over latents; less is sparser.",
           lambda e: e.get("ablation_effects_ratio")),
    Metric("sluice_probe_accuracy", "gauge", "ratio",
           "Held-out accuracy of a probe on k latents, or on all activations (dense); 0.5 is chance.",
           lambda e: e.get("probe_accuracy") or {}, "probe"),
    Metric("sluice_evaluated_snapshot_tokens", "gauge", "tokens",
           "Tokens trained when the newest evaluated snapshot was published.", lambda e: e.get("snapshot_tokens")),
    Metric("sluice_evaluation_seconds", "gauge", "seconds", "How long the newest evaluation took, in seconds.",
           lambda e: e.get("seconds")),
)

WATCH = (
    Metric("sluice_monitor_snapshots", "gauge", "snapshots",
           "Complete snapshots in the run directory.", lambda w: w.snapshots),
    Metric("sluice_monitor_newest_snapshot_tokens", "gauge", "tokens",
           "Tokens trained when the newest snapshot that the monitor has seen was published.",
           lambda w: w.newest_tokens),
    Metric("sluice_run_finished", "gauge", "0 or 1",
           "1 once the run has come to its end: its trainer and producers are gone for a good reason.",
           lambda w: int(w.finished)),
    Metric("sluice_evaluation_broken", "gauge", "0 or 1",
           "1 when no snapshot can be evaluated: the language model or the text cannot be loaded; the log says why.",
           lambda w: int(w.broken)),
    Metric("sluice_evaluation_failures_total", "counter", "snapshots",
           "Snapshots that could not be evaluated; the log says why.",
           lambda w: w.failures),
)
# fmt: on


class MonitorMetrics(Collector):
    """What the monitor shows: how good each SAE's newest evaluated snapshot is, and whether evaluation keeps up."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._watch = Watch()
        registry.register(self)

    def update(self, sae: str, evaluation: dict[str, Any]) -> None:
        """`evaluation` is the contents of an evaluation.json."""
        self._watch = replace(self._watch, evaluations=self._watch.evaluations | {sae: evaluation})

    def keep(self, saes: Iterable[str]) -> None:
        """Forgets the SAEs that the newest snapshot has no more: an SAE may leave a stream that goes on."""
        kept = {sae: self._watch.evaluations[sae] for sae in saes if sae in self._watch.evaluations}
        self._watch = replace(self._watch, evaluations=kept)

    def see_run(self, snapshots: int, newest_tokens: int | None, finished: bool) -> None:
        self._watch = replace(self._watch, snapshots=snapshots, newest_tokens=newest_tokens, finished=finished)

    def give_up(self) -> None:
        """No snapshot will be evaluated."""
        self._watch = replace(self._watch, broken=True)

    def count_failure(self) -> None:
        self._watch = replace(self._watch, failures=self._watch.failures + 1)

    def collect(self) -> Iterator[Family]:
        watch = self._watch
        yield from _families(WATCH, [((), watch)])
        yield from _families(EVALUATION, [((sae,), result) for sae, result in watch.evaluations.items()], ("sae",))

    def describe(self) -> Iterator[Family]:
        return _names(WATCH + EVALUATION)


# --- From tables to families -----------------------------------------------------------------------------------------

ALL = MILESTONES + STEP + SAE + PRODUCER_INFO + PRODUCER + WATCH + EVALUATION
"""Every metric there is; what dashboards and alerts may name."""


def new_registry() -> CollectorRegistry:
    """A registry of one's own, with the process's memory, CPU seconds and open files in it already."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


Sources = Sequence[tuple[tuple[str, ...], Any]]


def _families(table: Iterable[Metric], sources: Sources, labels: tuple[str, ...] = ()) -> Iterator[Family]:
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
        family.add_metric(values, _density_buckets(read), sum_value=None)
    elif metric.label:
        for value, number in read.items():
            family.add_metric((*values, value), number)
    else:
        family.add_metric(values, read)


def _density_buckets(density: Sequence[int]) -> list[tuple[str, float]]:
    """Cumulative (upper edge, latents) of a report's density; log10 of zero is −∞, below all edges."""
    *bins, never = density
    counts = accumulate([bins[0] + never, *bins[1:], 0])
    return list(zip([*map(str, DENSITY_EDGES), "+Inf"], counts, strict=True))


def _one_of(states: tuple[str, ...], current: str) -> dict[str, int]:
    return {state: int(state == current) for state in (*states, *({current} - set(states)))}


def _names(table: Iterable[Metric]) -> Iterator[Family]:
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
) -> tuple[int, Callable[[], None]]:
    """Serves /metrics, /healthz and /readyz from a thread; returns the port and what closes it.

    Port 0 takes any free one. When `port` is taken, the `next_free` ports after it are tried, without those in `leave`:
    several producers share a machine. /healthz tells whether the process is `alive`, /readyz whether it is `ready` for
    its peers: 200 or 503, and the sentence. A process that waits for its peers is alive. On loopback it answers to
    loopback's names and `allowed_hosts` only: the numbers name the run and the model. Raises OSError, naming host and
    port, when nothing could be bound.
    """
    listener = _bind(host, port, next_free, leave)
    app = _metrics_app(registry, alive, ready)
    return listener.getsockname()[1], serve(app, listener, "metrics", {host, *allowed_hosts})


def _bind(host: str, port: int, next_free: int, leave: Collection[int]) -> socket.socket:
    last = min(port + next_free, 65535) if port else 0
    candidates = [one for one in range(port, last + 1) if one == port or one not in leave]
    try:
        for candidate in candidates:
            try:
                return listen(host, candidate)
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

    # Quick, and none waits for a lock: no thread is taken for them.

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    def verdict(ask: Verdict) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            holds, said = ask()
            return PlainTextResponse(f"{said}\n", 200 if holds else 503)

        return answer

    async def elsewhere(request: Request, error: Exception) -> Response:
        return PlainTextResponse("there are /metrics, /healthz and /readyz\n", 404)

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/healthz", verdict(alive)),
            Route("/readyz", verdict(ready)),
        ],
        exception_handlers={404: elsewhere},
    )
