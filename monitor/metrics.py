"""Metrics of the monitor: those of the measures, and of its own work; and a list of the metrics of all processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from monitor.evaluation.measures import Measure, Stage, measures
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


def evaluation_metrics() -> tuple[Metric, ...]:
    """Metrics of an evaluation: one for each measure that has a metric, and two about the evaluation itself."""
    return (*(_metric_of(measure) for measure in measures(Stage.HELD_OUT) if measure.metric), *EVALUATION)


def _metric_of(measure: Measure) -> Metric:
    def read(evaluation: Mapping[str, Any]) -> Any:
        value = evaluation.get(measure.name)
        return value or {} if measure.label else value

    return Metric(str(measure.metric), "gauge", measure.unit, measure.help, read, measure.label)


# fmt: off
EVALUATION = (
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
        evaluations = [((sae,), evaluation) for sae, evaluation in watch.evaluations.items()]
        yield from families(evaluation_metrics(), evaluations, ("sae",))

    def describe(self) -> Iterator[Family]:
        return metric_names(WATCH + evaluation_metrics())


def all_metrics() -> tuple[Metric, ...]:
    """Every metric of the three processes: what dashboards and alerts may name."""
    return (
        *(trainer_metrics.MILESTONES + trainer_metrics.STEP + trainer_metrics.SAE),
        *(producer_metrics.PRODUCER_INFO + producer_metrics.PRODUCER),
        *(WATCH + evaluation_metrics()),
    )
