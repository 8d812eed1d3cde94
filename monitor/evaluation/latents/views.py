"""Latents as a reader sees them: records that pages render and `to_json` writes for programs.

Field names are the names in the JSON of `/v1/latents/…`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

Order = Literal["index", "density", "strongest", "norm", "age"]
"""Keys by which a table of latents can be sorted."""


@dataclass(frozen=True, kw_only=True)
class LatentExample:
    """The text around one firing of a latent."""

    value: float
    """The latent's activation at the firing."""
    times: int
    """Number of the strongest firings that stand in nearly this text."""
    at: int
    """Index in `tokens` of the firing."""
    cut_before: bool
    """Whether the text goes on before `tokens`."""
    cut_after: bool
    """Whether the text goes on after `tokens`."""
    tokens: list[str]
    values: list[float]
    """The latent's activation on each of `tokens`."""
    is_outlier: bool = False
    """Whether most latents that fire on the token are far stronger there than they usually are."""


@dataclass(frozen=True, kw_only=True)
class LatentSummary:
    """The numbers of one latent that need no other latent."""

    index: int
    density: float
    """Share of held-out tokens on which the latent fires."""
    firings: int
    """Number of held-out tokens on which the latent fires."""
    strongest: float
    """The activation farthest from zero, in the units of the raw activations; 0 for a silent latent. Outliers count for
    a latent that fires on nothing else."""
    norm: float
    """Length of the decoder row."""
    age: int
    """Tokens trained since the decoder row was first seen with its direction (cosine ≥ 0.9 from each snapshot to the
    next). The latent may be older than the first snapshot."""
    top_tokens: list[str]
    """The tokens of the strongest firings, each once."""


@dataclass(frozen=True, kw_only=True)
class LatentRow(LatentSummary):
    """A latent in the table."""

    example: LatentExample | None
    """The strongest firing; None for a silent latent."""


@dataclass(frozen=True, kw_only=True)
class LatentTable:
    """A page of the table of an SAE's latents."""

    sae: str
    snapshot: str
    d_sae: int
    rows: int
    """Held-out tokens."""
    matching: int
    """Number of latents that match `search` and `density`."""
    silent: int
    """Number of the SAE's latents that never fire on the held-out tokens."""
    order: Order
    descending: bool
    search: str
    density: str
    """LOW:HIGH, both included; empty for any."""
    offset: int
    limit: int
    latents: list[LatentRow]


@dataclass(frozen=True, kw_only=True)
class NGram:
    """The n-gram with wildcards that best predicts where a latent fires, with scores on text it was not fitted to."""

    pattern: list[str | None]
    """Tokens up to the firing, None for any token."""
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True, kw_only=True)
class QuantileExamples:
    """Firings around one quantile of a latent's activations."""

    quantile: float
    contexts: list[LatentExample]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Number of firings by activation, in bins of equal width; both lists are empty for a silent latent."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class TokenLogit:
    """A token, and what a latent's direction adds to its logit."""

    token: str
    logit: float


@dataclass(frozen=True, kw_only=True)
class NearLatent(LatentSummary):
    """A latent of the same SAE with a similar decoder row."""

    cosine: float


@dataclass(frozen=True, kw_only=True)
class CoactiveLatent(LatentSummary):
    """A latent of the same SAE that fires on the same tokens."""

    together: int
    """Held-out tokens on which both fire."""
    phi: float
    """Correlation of firing: 1 for latents that always fire together, 0 for independent ones."""


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """A latent among others of its SAE that fire, by density and by `by`."""

    by: Literal["norm", "strongest"]
    density: list[float]
    value: list[float]
    own_density: float
    own_value: float


@dataclass(frozen=True, kw_only=True)
class LatentInSnapshot:
    """A latent as it was in one snapshot."""

    snapshot: str
    tokens: int
    cosine: float
    """Cosine of the decoder row in this snapshot with the one in the snapshot of the page."""
    training_density: float
    """Firing rate over the recent tokens of training."""
    density: float | None = None
    """On held-out text; None, as `strongest`, where the monitor has not gathered this snapshot's latents."""
    strongest: float | None = None
    top_tokens: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Latent(LatentSummary):
    """The page of one latent."""

    sae: str
    snapshot: str
    d_sae: int
    rows: int
    """Held-out tokens."""
    hook: str
    """The hook that the SAE reads; those of a crosscoder, joined by ` + `."""
    target: str | None
    """The hook that a transcoder writes; None for other SAEs."""
    architecture: str | None
    explanation: NGram | None
    contexts: list[LatentExample]
    """The strongest firings, from as many documents as there are, and the strongest one on an outlier."""
    lower: list[QuantileExamples]
    histogram: Histogram
    """Without the firings on outliers."""
    outliers: int
    """Number of firings on outliers: tokens on which most latents are far stronger than they usually are."""
    written_at: str
    """The hook from which `promoted` and `suppressed` are computed."""
    promoted: list[TokenLogit] | None
    """None where the latent writes to no residual stream."""
    suppressed: list[TokenLogit] | None
    """None where the latent writes to no residual stream."""
    nearest: list[NearLatent]
    past: list[LatentInSnapshot]
    """Oldest first."""
    coactive: list[CoactiveLatent]
    scatter: Scatter
    newest: str
    """The newest snapshot that has this SAE's latents."""


@dataclass(frozen=True, kw_only=True)
class FiringLatent(LatentSummary):
    """A latent that fires on a text."""

    values: list[float]
    """Its activation on each token of the text."""


@dataclass(frozen=True, kw_only=True)
class TextFirings:
    """The latents that fire on a text, or on one token of it."""

    sae: str
    snapshot: str
    text: str
    at: int | None
    """Index of the token; None for the whole text."""
    tokens: list[str]
    active: list[int]
    """Number of latents that fire on each of `tokens`."""
    firing: int
    """Number of latents that fire, of which `latents` has some."""
    latents: list[FiringLatent]


@dataclass(frozen=True, kw_only=True)
class TokenProbability:
    """The probability that a token comes next, before and after an intervention."""

    token: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class NextTokenEffect:
    """What the language model predicts next when a latent is ablated or steered with."""

    mode: Literal["ablate", "steer"]
    strength: float | None
    """Of steering: a multiple of the latent's strongest activation."""
    at: int
    """The token after which is predicted."""
    kl: list[float]
    """KL(before ‖ after) of the next token after each token, in nats."""
    next_tokens: list[TokenProbability]
    """The likeliest before, and those that gain and lose most; the likeliest after first."""


@dataclass(frozen=True, kw_only=True)
class TriedText:
    """A text that somebody tried on one latent."""

    sae: str
    snapshot: str
    index: int
    text: str
    is_cut: bool
    """Whether the text goes on after `tokens`."""
    tokens: list[str]
    values: list[float]
    """The latent's activation on each token."""
    strongest: float
    """Its strongest on held-out text."""
    effect: NextTokenEffect | None


@dataclass(frozen=True, kw_only=True)
class LatentExamples:
    """Texts in which a latent fires, strongest first, and texts in which it does not."""

    sae: str
    snapshot: str
    index: int
    firing: list[LatentExample]
    silent: list[LatentExample]


def to_json(view: LatentTable | Latent | TextFirings | TriedText | LatentExamples) -> bytes:
    """The record as a JSON object. Raises ValueError for NaN and infinities."""
    return json.dumps(view, default=vars, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
