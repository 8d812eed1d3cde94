"""CONTRACT: the plain numbers of a training step, as the loop yields them.

One report becomes one line of `metrics.jsonl`, one update of Prometheus and one frame of the terminal. Nothing
here knows torch, sockets or files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

DENSITY_EDGES = (-7.0, -6.0, -5.0, -4.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0)
"""Upper edges of the density histogram's bins, in log10 of the firing rate."""


@dataclass(frozen=True)
class SaeReport:
    """One sparse autoencoder. Ratios are taken over a window of recent tokens, in float64."""

    name: str
    l0: float
    """Mean number of latents active on a row."""
    mse: float
    """Mean squared error per element, in the units of the raw activations."""
    fvu: float
    """Fraction of variance unexplained: 0 is perfect, 1 is no better than the mean."""
    dead_latents: int | None
    """Latents silent for `dead_tokens`; None until that many tokens have been seen."""
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


@dataclass(frozen=True)
class StreamReport:
    """The stream as the trainer sees it. Counts are since the run began, restarts included."""

    producers: dict[str, int] = field(default_factory=dict)
    """Sessions by state: working, idle."""
    leases: dict[str, int] = field(default_factory=dict)
    """Shards of this epoch by state: free, leased, received, trained, set_aside."""
    epoch: int = 0
    tokens_received: int = 0
    """Rows taken into the buffer."""
    tokens_quarantined: int | None = 0
    """Rows of quarantined shards that are not trained on; None when it is not known how many some of them have."""
    suspect_shards: int = 0
    """Shards on which producer after producer was lost; they are leased last."""
    rows_rejected: dict[str, int] = field(default_factory=dict)
    """Rows that arrived and were not taken, by reason."""
    rows_discarded: int = 0
    """Rows a producer named as outliers and did not send."""
    protocol_errors: dict[str, int] = field(default_factory=dict)
    """Messages dropped, by kind of fault."""
    auth_failures: int = 0
    breaches: dict[str, int] = field(default_factory=dict)
    """Times the books did not balance, by the invariant that was broken: trained_once, rows_accounted, memory_bound."""
    credit_rows_outstanding: int = 0
    """Rows that producers may still send under the credit granted."""
    sessions_lost: int = 0
    """Producers that fell silent or were refused in mid-session."""
    data_wait_ratio: float = 0.0
    """Share of the last ten seconds in which training waited for rows."""
    credit_wait_ratio: float = 0.0
    """Share of the last ten seconds in which producers had text and no leave to send, because the buffer was full."""

    @property
    def bottleneck(self) -> str:
        """Which side the other one waits for while the run trains, in words."""
        data, credit = self.data_wait_ratio, self.credit_wait_ratio
        if max(data, credit) < 0.05:
            return "neither side waits for the other"
        if data > credit:
            return f"the producers are the bottleneck: training waits {data:.0%} of the time for rows"
        return f"the trainer is the bottleneck: producers wait {credit:.0%} of the time for room in the buffer"


@dataclass(frozen=True)
class StepReport:
    """The trainer after one step."""

    time: float
    """Seconds since the Unix epoch, for people; nothing is computed from it."""
    tokens: int
    """Rows trained on in this run, restarts included."""
    step: int
    target_tokens: int | None
    """Where the run ends, when it was told."""
    tokens_per_second: float
    """Since the previous report."""
    step_seconds: float
    """Mean duration of a step since the previous report, waiting excluded."""
    data_wait_seconds: float
    """Time the loop has waited for data in all."""
    state: str
    """filling, training, starved, paused (no step until an operator says so) or draining (no further row will come)."""
    buffer_rows: int
    buffer_capacity_rows: int
    same_context_mates: float
    """Expected number of other rows of the same window in a row's batch; NaN before the first batch."""
    stream: StreamReport
    saes: tuple[SaeReport, ...]

    @property
    def bottleneck(self) -> str:
        """What holds up training, in words."""
        return what_waits(self.state, self.stream)

    def as_json(self) -> dict:
        """The line of metrics.jsonl."""
        return asdict(self)


PROGRESSING = ("training", "starved")
"""States in which the rate tells how long the rest will take."""


def what_waits(state: str, stream: StreamReport) -> str:
    """What holds up training in this state, in words: neither side is the bottleneck of a run that does not train."""
    match state:
        case "paused":
            return "the run is paused: nothing is trained until it is resumed"
        case "draining":
            return "no further row will come: what is buffered is trained, then the run ends"
        case "filling":
            return "the buffer is being filled: training begins when it is"
        case "starved" if not sum(stream.producers.values()):
            return "no producer is at work: training waits for rows"
    return stream.bottleneck
