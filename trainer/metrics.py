"""Metrics of the trainer: name, unit and meaning of each, and where a report has its value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from producer.common.metrics import Metric, families, metric_names, one_of
from trainer.phases import REPORTED_PHASES
from trainer.report import DENSITY_EDGES, SaeReport, StepReport


@dataclass(frozen=True)
class Milestones:
    """Facts beside the reports: the run, its newest checkpoint and snapshot."""

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
           lambda r: one_of(REPORTED_PHASES, r.state), "state"),
    Metric("sluice_tokens_trained_total", "counter", "tokens",
           "Tokens trained on in this run; a restart continues from the checkpoint's count.", lambda r: r.tokens),
    Metric("sluice_corpus_tokens_trained_total", "counter", "tokens",
           "Tokens trained on of each corpus of a mixture.", lambda r: r.stream.tokens_by_corpus, "corpus"),
    Metric("sluice_target_tokens", "gauge", "tokens", "Tokens after which the run ends, if it has an end.",
           lambda r: r.target_tokens),
    Metric("sluice_steps_total", "counter", "steps", "Training steps of this run.", lambda r: r.step),
    Metric("sluice_tokens_per_second", "gauge", "tokens per second",
           "Tokens trained on per second, between the last two reports.",
           lambda r: r.tokens_per_second),
    Metric("sluice_step_seconds", "gauge", "seconds",
           "Mean duration of a step between the last two reports, in seconds, without waiting for data.",
           lambda r: r.step_seconds),
    Metric("sluice_data_wait_seconds_total", "counter", "seconds", "Seconds the loop has waited for activations.",
           lambda r: r.data_wait_seconds),
    Metric("sluice_data_wait_ratio", "gauge", "ratio",
           "Share of the last ten seconds in which training waited for activations: the producers are the bottleneck.",
           lambda r: r.stream.data_wait_ratio),
    Metric("sluice_credit_wait_ratio", "gauge", "ratio",
           "Share of the last ten seconds in which producers waited for room: the trainer is the bottleneck.",
           lambda r: r.stream.credit_wait_ratio),
    Metric("sluice_buffer_rows", "gauge", "rows", "Activations in the shuffling buffer.", lambda r: r.buffer_rows),
    Metric("sluice_buffer_capacity_rows", "gauge", "rows", "Activations that the shuffling buffer can hold.",
           lambda r: r.buffer_capacity_rows),
    Metric("sluice_buffer_same_context_mates", "gauge", "rows",
           "Expected number of others from the same window in an activation's batch; the smaller, the better shuffled.",
           lambda r: r.same_context_mates),
    Metric("sluice_epoch", "gauge", "epochs",
           "The pass over the corpus being leased, from 0.", lambda r: r.stream.epoch),
    Metric("sluice_tokens_received_total", "counter", "tokens", "Tokens put into the buffer.",
           lambda r: r.stream.tokens_received),
    Metric("sluice_tokens_quarantined", "gauge", "tokens",
           "Tokens of quarantined shards that are not trained on; absent while nobody knows how many some have.",
           lambda r: r.stream.tokens_quarantined),
    Metric("sluice_suspect_shards", "gauge", "shards",
           "Shards on which three or more producers in a row were lost before they sent a chunk; they are leased last.",
           lambda r: r.stream.suspect_shards),
    Metric("sluice_tokens_discarded_total", "counter", "tokens",
           "Tokens that producers named as outliers and did not send.",
           lambda r: r.stream.rows_discarded),
    Metric("sluice_rows_rejected_total", "counter", "rows", "Tokens that arrived and were rejected, by reason.",
           lambda r: r.stream.rows_rejected, "reason"),
    Metric("sluice_credit_rows_outstanding", "gauge", "rows",
           "Tokens that producers may still send under the credit granted.",
           lambda r: r.stream.credit_rows_outstanding),
    Metric("sluice_leases", "gauge", "shards", "Shards of this epoch by state.",
           lambda r: {"free": 0, "leased": 0, "received": 0, "trained": 0, "set_aside": 0} | r.stream.leases, "state"),
    Metric("sluice_producers", "gauge", "producers", "Connected producers by state.",
           lambda r: {"working": 0, "idle": 0} | r.stream.producers, "state"),
    Metric("sluice_sessions_lost_total", "counter", "sessions",
           "Producers that fell silent, or were refused during their session.",
           lambda r: r.stream.sessions_lost),
    Metric("sluice_protocol_errors_total", "counter", "messages", "Messages rejected, by kind of fault.",
           lambda r: r.stream.protocol_errors, "kind"),
    Metric("sluice_auth_failures_total", "counter", "connections",
           "Connections refused because their key is not known.",
           lambda r: r.stream.auth_failures),
    Metric("sluice_invariant_breaches_total", "counter", "breaches",
           "Violations of the ledger's invariants, by invariant; each is a fault of Sluice, and the log says more.",
           lambda r: r.stream.breaches, "invariant"),
)

RANKS = (
    Metric("sluice_ranks", "gauge", "ranks", "Ranks that share the latents of each SAE; 1 without torchrun.",
           lambda r: r.count),
    Metric("sluice_exchange_bytes_total", "counter", "bytes",
           "Bytes that the ranks have received from each other since they started, all ranks together, by purpose.",
           lambda r: r.exchange_bytes, "purpose"),
    Metric("sluice_exchange_seconds_total", "counter", "seconds",
           "Seconds that rank 0 has spent in exchanges on the host since it started, by purpose.",
           lambda r: r.exchange_seconds, "purpose"),
)

RANK = (
    Metric("sluice_rank_step_seconds", "gauge", "seconds",
           "Mean duration of a step on a rank between the last two reports, in seconds, exchanges included.",
           lambda r: r.step_seconds),
    Metric("sluice_rank_work_seconds", "gauge", "seconds",
           "The same without exchanges, in which a rank waits for the others: the slowest rank has the largest.",
           lambda r: r.work_seconds),
    Metric("sluice_rank_exchange_seconds", "gauge", "seconds",
           "Mean time of a step that a rank spends in exchanges; the least of all ranks is what exchange costs.",
           lambda r: r.exchange_seconds),
    Metric("sluice_rank_memory_bytes", "gauge", "bytes", "Memory that a rank holds on its device.",
           lambda r: r.memory_bytes),
    Metric("sluice_rank_active_latents", "gauge", "latents",
           "Mean number of a rank's latents that are active on an activation, of all SAEs: its share of sparse work.",
           lambda r: r.active_latents),
)

SAE = (
    Metric("sluice_l0", "gauge", "latents", "Mean number of latents active on an activation.", lambda s: s.l0),
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
    Metric("sluice_sae_group", "gauge", "group", "Number of the placement group of ranks that trains the SAE.",
           lambda s: s.group),
    Metric("sluice_feature_density", "histogram", "latents",
           "Latents by log10 of their recent firing rate; silent ones stand in the lowest bucket. A distribution over "
           "latents at this moment, not over time: read it without rate().", lambda s: s.density, edges=DENSITY_EDGES),
)
# fmt: on


class TrainerMetrics(Collector):
    """The trainer's collector: the newest report and the milestones."""

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
        yield from families(MILESTONES, [((), self._milestones)])
        yield from families(STEP, [((), report)] if report else [])
        yield from families(RANKS, [((), report.ranks)] if report else [])
        each = report.ranks.each if report else ()
        yield from families(RANK, [((str(rank.rank),), rank) for rank in each], ("rank",))
        yield from families(SAE, [((sae.name,), sae) for sae in saes], ("sae",))

    def describe(self) -> Iterator[Family]:
        return metric_names(MILESTONES + STEP + RANKS + RANK + SAE)
