"""CONTRACT: what a producer reports of itself, as plain numbers. Nothing here knows sockets, torch or Prometheus."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ProducerReport:
    """One producer at one moment; every count is since the process started."""

    state: str = "starting"
    """starting, connecting, working, idle or leaving."""
    tokens: int = 0
    """Activations sent."""
    rows_dropped: dict[str, int] = field(default_factory=dict)
    """Positions not sent, by reason: padding, bos, special (tokens), role, position (corpus.positions) or outlier;
    `excluded` where a source does not say which."""
    chunks: int = 0
    """Chunks sent."""
    shards: int = 0
    """Shards finished."""
    forward_seconds: float = 0.0
    """Time in the language model."""
    forwards: int = 0
    """Forward passes."""
    stall_seconds: dict[str, float] = field(default_factory=dict)
    """Time spent waiting, by cause: credit (the trainer is the bottleneck), lease, text."""
    sessions: int = 0
    """Times the producer was welcomed by a trainer."""
    layers_run: int = 0
    """Blocks of the language model that execute in one pass."""
    layers_total: int = 0
    """Blocks the language model has on disk."""
