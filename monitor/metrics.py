"""Metrics of the monitor: each one's name, unit and meaning, and where its value stands in an evaluation; and `ALL`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from producer import metrics as producer_metrics
from producer.common.metrics import Metric, families, metric_names
from trainer import metrics as trainer_metrics


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
        yield from families(WATCH, [((), watch)])
        yield from families(EVALUATION, [((sae,), result) for sae, result in watch.evaluations.items()], ("sae",))

    def describe(self) -> Iterator[Family]:
        return metric_names(WATCH + EVALUATION)


ALL = (
    *(trainer_metrics.MILESTONES + trainer_metrics.STEP + trainer_metrics.SAE),
    *(producer_metrics.PRODUCER_INFO + producer_metrics.PRODUCER),
    *(WATCH + EVALUATION),
)
"""Every metric of the three processes: what dashboards and alerts may name."""
