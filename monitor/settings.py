"""What the monitor reads of the run file: the run, the model and text it evaluates with, and all of [monitor].

The other processes read only the addresses in [monitor] and ignore the rest; here an unknown key is refused. An
address other than loopback is the operator's to give: the service only reads, but it hands the SAEs and the run's
settings to everyone who can reach it. Light: pydantic only.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from producer.settings import CorpusSettings, MetricsSettings, ModelSettings, Port, Positive, RunSettings, Seconds


class MonitorTable(MetricsSettings):
    """[monitor]: where every process shows its metrics, and how snapshots are served and evaluated."""

    model_config = ConfigDict(extra="forbid")

    port: Port = 9712
    """Prometheus port of the monitor; 0 takes any free one, which the log names."""
    service_port: Port = 8710
    """HTTP port that serves the run and its snapshots; 0 takes any free one, which the log names."""
    poll_seconds: Seconds = 2.0
    """How often the run directory is looked at for a new snapshot."""
    evaluate: bool = True
    """Measure each new snapshot with the language model (ΔCE, CE recovered, KL), on text never trained on."""
    evaluation_tokens: Positive = 16384
    """Held-out rows of one evaluation; the same ones for every snapshot, so that numbers compare."""
    evaluation_threads: Positive = 1
    """CPU threads of the evaluation, at low priority; few, since it runs beside the training."""


class MonitorSettings(BaseModel):
    """What the monitor reads of the run file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    run: RunSettings = RunSettings()
    model: ModelSettings | None = None
    corpus: CorpusSettings = CorpusSettings()
    monitor: MonitorTable = MonitorTable()

    def why_not_evaluated(self) -> str | None:
        """What keeps this run's snapshots from being evaluated; None when nothing does."""
        if not self.monitor.evaluate:
            return "monitor.evaluate is false"
        if self.corpus.kind == "synthetic":
            return "corpus.kind is synthetic: there is no language model"
        if self.model is None:
            return "table [model] is missing"
        if self.corpus.held_out == 0.0:
            return "corpus.held_out is 0: there is no text that was not trained on"
        return None
