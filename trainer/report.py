"""CONTRACT: the loop's reports, plain numbers.

One report becomes one line of `metrics.jsonl`, one update of Prometheus and one frame of the terminal. Light: no torch,
sockets or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from statistics import median_low
from typing import Any

from trainer.phases import RunPhase

DENSITY_EDGES = (-7.0, -6.0, -5.0, -4.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0)
"""Upper edges of the density histogram's bins, in log10 of the firing rate."""


NOTICEABLE_WAIT_RATIO = 0.05
"""Share of the time from which one side of the stream is said to wait for the other."""
SLOW_RATIO = 1.3
"""Of a rank's work to that of the median, from which it is called slow."""
COSTLY_EXCHANGE_RATIO = 0.25
"""Share of a step from which exchange is called costly."""


@dataclass(frozen=True)
class SaeReport:
    """Numbers of one SAE. Ratios are over a window of recent tokens, in float64."""

    name: str
    l0: float
    """Mean number of latents active on an activation."""
    mse: float
    """Mean squared error per element, in the units of the raw activations."""
    fvu: float
    """Fraction of variance unexplained: 0 is perfect, 1 is no better than the mean."""
    dead_latents: int | None
    """Latents silent for `dead_tokens`; None until the SAE has trained on that many tokens."""
    dead_latents_ratio: float | None
    shrinkage: float
    """E|x_hat|² / E[x·x_hat] about the mean of x; 1 is unbiased, smaller means that activations are suppressed."""
    loss: dict[str, float]
    """Parts of the loss of the last step: reconstruction, auxiliary, sparsity, …"""
    learning_rate: float
    grad_norm: float
    """Norm of the gradient before clipping."""
    density: tuple[int, ...]
    """Latents per bin of DENSITY_EDGES by log10 firing rate, then those that did not fire in the window."""
    skipped_steps: int
    """Steps whose gradient was not finite; they changed nothing."""
    group: int = 0
    """Number of the placement group of ranks that trains it."""


@dataclass(frozen=True)
class RankReport:
    """One rank of several, between two reports. Times are means over steps, on the host."""

    rank: int
    step_seconds: float
    exchange_seconds: float
    """Of a step, waiting for other ranks included. On a GPU exchanges run later: there it is the time to enqueue them.
    """
    memory_bytes: int
    """Held on its device."""
    active_latents: float
    """Mean number of its latents that are active on an activation, of all SAEs."""

    @property
    def work_seconds(self) -> float:
        """Of a step, outside exchanges: the slowest rank is the one whose work takes longest."""
        return max(0.0, self.step_seconds - self.exchange_seconds)


@dataclass(frozen=True)
class RanksReport:
    """What the ranks of a run have exchanged since they started, by purpose; a trainer alone exchanges nothing."""

    count: int = 1
    exchange_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes received, of all ranks together."""
    exchange_seconds: dict[str, float] = field(default_factory=dict)
    """Of rank 0, on the host. On a GPU collectives run later: there it is the time to enqueue them."""
    each: tuple[RankReport, ...] = ()
    """By rank; none of a trainer alone."""

    @classmethod
    def from_json(cls, document: Mapping[str, Any] | None) -> RanksReport:
        """From a line of metrics.jsonl; earlier releases wrote no ranks, or less about them."""
        if not isinstance(document, Mapping) or not isinstance(count := document.get("count"), int):
            return cls()
        names = [one.name for one in fields(RankReport)]
        ranks = [rank for rank in document.get("each") or [] if isinstance(rank, Mapping)]
        whole = [rank for rank in ranks if all(isinstance(rank.get(name), int | float) for name in names)]
        return cls(count=count, each=tuple(RankReport(**{name: rank[name] for name in names}) for rank in whole))

    @property
    def exchange_ratio(self) -> float | None:
        """Share of a step that exchange takes: of the rank that waits least for the others. None when unknown."""
        ratios = [rank.exchange_seconds / rank.step_seconds for rank in self.each if rank.step_seconds]
        return min(ratios) if ratios else None

    @property
    def slowest(self) -> tuple[RankReport, float] | None:
        """(the rank whose work takes longest, as a multiple of the median's); None when unknown."""
        if len(self.each) < 2 or not (typical := median_low(rank.work_seconds for rank in self.each)):
            return None
        slowest = max(self.each, key=lambda rank: rank.work_seconds)
        return slowest, slowest.work_seconds / typical

    @property
    def bottleneck(self) -> str | None:
        """A sentence on ranks that hold up the trainer; None where they do not."""
        slowest, ratio = self.slowest, self.exchange_ratio
        if slowest is not None and slowest[1] >= SLOW_RATIO:
            return f"rank {slowest[0].rank} is slow: its work takes {slowest[1]:.1f} times that of the median"
        if ratio is not None and ratio >= COSTLY_EXCHANGE_RATIO:
            return f"exchange between ranks takes {ratio:.0%} of a step: use fewer ranks, or a larger batch"
        return None

    @property
    def facts(self) -> list[str]:
        """Short notes on the ranks, for people; none of a trainer alone."""
        if self.count < 2:
            return []
        facts = [f"{self.count} ranks"]
        if (ratio := self.exchange_ratio) is not None:
            facts.append(f"exchange {ratio:.0%} of a step")
        if (slowest := self.slowest) is not None:
            facts.append(f"slowest rank {slowest[0].rank}, {slowest[1]:.2f} × the median")
        return facts


ONE_RANK = RanksReport()


@dataclass(frozen=True)
class StreamReport:
    """Numbers of the stream. Counts are since the run began, restarts included."""

    producers: dict[str, int] = field(default_factory=dict)
    """Sessions by state: working, idle."""
    leases: dict[str, int] = field(default_factory=dict)
    """Shards of this epoch by state: free, leased, received, trained, set_aside."""
    epoch: int = 0
    tokens_received: int = 0
    """Tokens that were put into the buffer."""
    tokens_quarantined: int | None = 0
    """Tokens of quarantined shards that are not trained on; None when it is unknown how many some of them have."""
    suspect_shards: int = 0
    """Shards on which producer after producer was lost; they are leased last."""
    rows_rejected: dict[str, int] = field(default_factory=dict)
    """Tokens of chunks that arrived and were rejected, by reason."""
    rows_discarded: int = 0
    """Tokens that producers named as outliers and did not send."""
    protocol_errors: dict[str, int] = field(default_factory=dict)
    """Messages rejected, by kind of fault."""
    auth_failures: int = 0
    breaches: dict[str, int] = field(default_factory=dict)
    """Violations of the ledger's invariants: trained_once, rows_accounted, memory_bound."""
    credit_rows_outstanding: int = 0
    """Tokens that producers may still send under the credit granted."""
    sessions_lost: int = 0
    """Producers that fell silent, or were refused during their session."""
    tokens_by_corpus: dict[str, int] = field(default_factory=dict)
    """Tokens trained of each corpus of a mixture."""
    revision: str = ""
    """Of a language model under training: the newest checkpoint that shards are leased with."""
    data_wait_ratio: float = 0.0
    """Share of the last ten seconds in which training waited for activations."""
    credit_wait_ratio: float = 0.0
    """Share of the last ten seconds in which producers had work and no credit, because the buffer was full."""

    @property
    def bottleneck(self) -> str:
        """A sentence on which side waits for the other while the run trains."""
        data, credit = self.data_wait_ratio, self.credit_wait_ratio
        if max(data, credit) < NOTICEABLE_WAIT_RATIO:
            return "neither side waits for the other"
        if data > credit:
            return f"the producers are the bottleneck: training waits {data:.0%} of the time for activations"
        return f"the trainer is the bottleneck: producers wait {credit:.0%} of the time for room in the buffer"


@dataclass(frozen=True)
class StepReport:
    """The state of the trainer between two steps."""

    time: float
    """Seconds since the Unix epoch, for people; nothing is computed from it."""
    tokens: int
    """Tokens trained on in this run, restarts included."""
    step: int
    target_tokens: int | None
    """Tokens after which the run ends; None when it has no end."""
    tokens_per_second: float
    """Rate over the last half minute; less where training began, or went on after a pause, within it."""
    step_seconds: float
    """Mean duration of a step since the previous report, waiting excluded."""
    data_wait_seconds: float
    """Total time in which the loop has waited for data."""
    state: RunPhase
    """One of `REPORTED_PHASES`."""
    buffer_rows: int
    buffer_capacity_rows: int
    same_context_mates: float
    """Expected number of others from the same window in an activation's batch; NaN before the first batch."""
    stream: StreamReport
    saes: tuple[SaeReport, ...]
    ranks: RanksReport = ONE_RANK

    @property
    def bottleneck(self) -> str:
        """A sentence on what holds up training."""
        return describe_bottleneck(self.state, self.stream, self.ranks)

    def as_json(self) -> dict:
        """The line of metrics.jsonl."""
        return asdict(self)


STEADY_PHASES = (RunPhase.TRAINING, RunPhase.STARVED)
"""Phases in which the rate tells how long the rest will take."""


def describe_bottleneck(phase: str, stream: StreamReport, ranks: RanksReport = ONE_RANK) -> str:
    """A sentence on what holds up training: neither side is the bottleneck of a run that does not train."""
    match phase:
        case RunPhase.PAUSED:
            return "the run is paused: nothing is trained until it is resumed"
        case RunPhase.DRAINING:
            return "no further activation will come: what is buffered is trained, then the run ends"
        case RunPhase.FILLING:
            return "the buffer is being filled: training begins when it is"
        case RunPhase.STARVED if not sum(stream.producers.values()):
            return "no producer is at work: training waits for activations"
    if stream.data_wait_ratio >= NOTICEABLE_WAIT_RATIO or (cause := ranks.bottleneck) is None:
        return stream.bottleneck
    return f"{stream.bottleneck}; {cause}"
