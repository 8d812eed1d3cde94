"""The part of the run file that the monitor reads: the run, the model and text it evaluates with, and all of [monitor].

The other processes read only the addresses in [monitor] and ignore the rest; here an unknown key is refused. The
service only reads, but it hands out the SAEs and the run's settings: other machines reach it with a token, or not at
all. (The metrics ports, which show numbers, know no token.) Light: pydantic only.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from producer.common.addresses import is_loopback
from producer.common.fields import Natural, PathText, Port, Positive, Seconds
from producer.common.toml import show_value
from producer.settings import CorpusSettings, MetricsSettings, ModelSettings, RunSettings


class MonitorTable(MetricsSettings):
    """[monitor]: where every process shows its metrics, and how snapshots are served and evaluated."""

    model_config = ConfigDict(extra="forbid")

    service_port: Port = 8710
    """HTTP port that serves the run and its snapshots; 0 takes any free one, which the log names."""
    token_file: PathText | None = Field(default=None, examples=["token"])
    """A file that holds the token which the HTTP service asks for; needed off loopback."""
    poll_seconds: Seconds = 2.0
    """How often the run directory is checked for a new snapshot."""
    evaluate: bool = True
    """Measure each new snapshot with the language model (ΔCE, CE recovered, KL), on text never trained on."""
    evaluation_tokens: Positive = 16384
    """Held-out tokens of one evaluation; the same ones for every snapshot, so that numbers compare."""
    evaluation_seconds: Seconds = 240.0
    """Time in which an evaluation may compute. Where it is too short for all the tokens, the first evaluation shows how
    many it has time for, spread over the text, and later ones read the same."""
    evaluation_threads: Positive = 1
    """CPU threads of the evaluation, at low priority; few, since it runs beside the training."""
    evaluation_share: Annotated[float, Field(ge=0.01, le=1.0)] = 0.5
    """Share of the time in which the evaluation may compute while the run trains; it sleeps the rest. Low priority
    alone does not keep it from slowing the training: they share memory, caches and the GPU."""
    latents_tokens: Natural = 65_536
    """Held-out tokens on which the activations of each SAE's latents are gathered, for their pages; 0 leaves these out,
    and the measures that need them: explanation_f1, ablation_effects, probe_accuracy."""
    ablated_latents: Natural = 32
    """Latents of each SAE that are ablated, one at a time, to see how many logits change; 0 leaves it out."""
    probe_file: PathText | None = Field(default=None, examples=["probes.jsonl"])
    """JSON lines {"text": …, "label": …}: if set, how well a few latents predict the labels is measured."""

    wandb: bool = False
    """Send the run's numbers to Weights & Biases while it trains; needs the extra `wandb`, and `wandb login` or
    WANDB_MODE=offline. The environment names the project: WANDB_PROJECT, WANDB_ENTITY."""

    @model_validator(mode="after")
    def _check_access(self) -> MonitorTable:
        if self.port and self.port == self.service_port:
            raise ValueError(
                f"monitor.port and monitor.service_port are both {self.port}: metrics and service need a port each"
            )
        if not is_loopback(f"tcp://{self.host}:{self.service_port}") and self.token_file is None:
            raise ValueError(
                f"monitor.host = {show_value(self.host)} is reachable from other machines and "
                "monitor.token_file is not set: write a token with `openssl rand -hex 24 > FILE` and set token_file = "
                '"FILE", or use 127.0.0.1 and, '
                f"on the other machine, `ssh -L {self.service_port}:127.0.0.1:{self.service_port} THIS_HOST`"
            )
        return self


class MonitorSettings(BaseModel):
    """The part of the run file that the monitor reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    run: RunSettings = RunSettings()
    model: ModelSettings | None = None
    corpus: CorpusSettings = CorpusSettings()
    monitor: MonitorTable = MonitorTable()

    def why_not_evaluated(self) -> str | None:
        """Why this run's snapshots are not evaluated; None when they are."""
        if not self.monitor.evaluate:
            return "monitor.evaluate is false"
        if self.corpus.kind == "synthetic":
            return "corpus.kind is synthetic: there is no language model"
        if self.corpus.kind == "activations":
            return "corpus.kind is activations: there is no text"
        if self.model is None:
            return "table [model] is missing"
        if not any(corpus.held_out for corpus in self.corpus.texts):
            return "corpus.held_out is 0: there is no text that was not trained on"
        return None
