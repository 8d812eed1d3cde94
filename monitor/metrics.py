"""Metrics of the monitor: those of the measures, and of its own work; and a list of the metrics of all processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from monitor.evaluation.measures import Measure, Stage, measures
from monitor.evaluation.results import Evaluation
from producer import metrics as producer_metrics
from producer.common.metrics import Metric, families, metric_names
from trainer import metrics as trainer_metrics


@dataclass(frozen=True)
class MonitorStatus:
    """The run as the monitor sees it, and how the monitor's own work goes."""

    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """The newest one of each SAE."""
    snapshots: int = 0
    newest_tokens: int | None = None
    """Tokens trained when the newest snapshot was published."""
    failures: int = 0
    """Snapshots that could not be evaluated."""
    is_broken: bool = False
    """No snapshot can be evaluated."""
    is_finished: bool = False
    """The run has come to its end."""


def evaluation_metrics() -> tuple[Metric, ...]:
    """Metrics of an evaluation: one for each measure that has a metric, and two about the evaluation itself."""
    return (*(_metric_of(measure) for measure in measures(Stage.HELD_OUT) if measure.metric), *EVALUATION)


def _metric_of(measure: Measure) -> Metric:
    return Metric(str(measure.metric), "gauge", measure.unit, measure.help, lambda e: e.value(measure), measure.label)


# fmt: off
EVALUATION = (
    Metric("sluice_evaluated_snapshot_tokens", "gauge", "tokens",
           "Tokens trained when the newest evaluated snapshot was published.", lambda e: e.snapshot_tokens),
    Metric("sluice_evaluation_seconds", "gauge", "seconds", "How long the newest evaluation took, in seconds.",
           lambda e: e.seconds),
)

STATUS = (
    Metric("sluice_monitor_snapshots", "gauge", "snapshots",
           "Complete snapshots in the run directory.", lambda s: s.snapshots),
    Metric("sluice_monitor_newest_snapshot_tokens", "gauge", "tokens",
           "Tokens trained when the newest snapshot that the monitor has seen was published.",
           lambda s: s.newest_tokens),
    Metric("sluice_run_finished", "gauge", "0 or 1",
           "1 once the run has come to its end: its trainer and producers are gone for a good reason.",
           lambda s: int(s.is_finished)),
    Metric("sluice_evaluation_broken", "gauge", "0 or 1",
           "1 when no snapshot can be evaluated: the language model or the text cannot be loaded; the log says why.",
           lambda s: int(s.is_broken)),
    Metric("sluice_evaluation_failures_total", "counter", "snapshots",
           "Snapshots that could not be evaluated; the log says why.",
           lambda s: s.failures),
)
# fmt: on


class MonitorMetrics(Collector):
    """How good each SAE's newest evaluated snapshot is, and whether the evaluation keeps up."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._status = MonitorStatus()
        registry.register(self)

    def update(self, sae: str, evaluation: Evaluation) -> None:
        self._status = replace(self._status, evaluations=self._status.evaluations | {sae: evaluation})

    def retain(self, saes: Iterable[str]) -> None:
        """Drops all SAEs but these: one may be detached from a run that goes on."""
        names = set(saes)
        evaluations = {sae: evaluation for sae, evaluation in self._status.evaluations.items() if sae in names}
        self._status = replace(self._status, evaluations=evaluations)

    def set_run(self, snapshots: int, newest_tokens: int | None, is_finished: bool) -> None:
        self._status = replace(self._status, snapshots=snapshots, newest_tokens=newest_tokens, is_finished=is_finished)

    def set_broken(self) -> None:
        """No snapshot will be evaluated."""
        self._status = replace(self._status, is_broken=True)

    def count_failure(self) -> None:
        self._status = replace(self._status, failures=self._status.failures + 1)

    def collect(self) -> Iterator[Family]:
        status = self._status
        yield from families(STATUS, [((), status)])
        evaluations = [((sae,), evaluation) for sae, evaluation in status.evaluations.items()]
        yield from families(evaluation_metrics(), evaluations, ("sae",))

    def describe(self) -> Iterator[Family]:
        return metric_names(STATUS + evaluation_metrics())


def all_metrics() -> tuple[Metric, ...]:
    """Every metric of the three processes: what dashboards and alerts may name."""
    return (
        *(trainer_metrics.MILESTONES + trainer_metrics.STEP + trainer_metrics.SAE),
        *(trainer_metrics.RANKS + trainer_metrics.RANK),
        *(producer_metrics.PRODUCER_INFO + producer_metrics.PRODUCER),
        *(STATUS + evaluation_metrics()),
    )
