"""What is compared: one cell is one SAE trained once. Its name is its folder, so that no cell is trained twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from trainer.defaults import default_learning_rate

RATES = (3e-3, 6e-3, 1.2e-2)
SHORT_TOKENS = 200_000
SHORT_RATES = (6e-3, 1.2e-2, 3e-3)
SEEDS = (0, 1, 2)
FRONTIER = (8, 16, 32, 64, 128)
LONGER = 3
"""The longer run has this many times the tokens."""
L0 = 32
MOST_SILENT = 0.02
"""Ours must leave at most this fraction of latents silent; of a peer the lowest FVU counts, whatever it leaves."""
NEVER = 2_000_000


@dataclass(frozen=True)
class Cell:
    """One training."""

    library: str
    architecture: str
    rate: float
    seed: int = 0
    k: int = L0
    """Active latents per row; of JumpReLU the target."""
    tokens: int = 1_500_000
    dead_tokens: int = 100_000
    """A latent silent for so many tokens is worked on, where a library does."""
    autocast: bool = True
    """bfloat16 in the matrix products."""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    """Other settings than the library's defaults."""
    subject: str = "demo"
    """What it reads, a key of `subjects.SUBJECTS`."""
    d_sae: int = 4096

    @property
    def contender(self) -> tuple[str, str]:
        return self.library, self.architecture

    @property
    def name(self) -> str:
        parts = [self.subject] if self.subject != Cell.subject else []
        parts += [self.library, self.architecture]
        parts += [f"n{self.d_sae}"] if self.d_sae != Cell.d_sae else []
        parts += [f"k{self.k}", f"lr{self.rate:g}", f"{self.tokens}", f"seed{self.seed}"]
        if self.dead_tokens != Cell.dead_tokens:
            parts.append(f"dead{self.dead_tokens}")
        if not self.autocast:
            parts.append("float32")
        return "-".join(parts + [f"{name}={value}" for name, value in sorted(self.options.items())])

    def as_json(self) -> dict[str, Any]:
        return asdict(replace(self, options={})) | {"options": dict(self.options)}

    def but(self, **changes: Any) -> Cell:
        return replace(self, **changes)


OURS = tuple(
    Cell("ours", architecture, 3e-3, dead_tokens=10_000, options=MappingProxyType(options))
    for architecture, options in (("topk", {}), ("batchtopk", {}), ("jumprelu", {"revive": "auxk"}))
)
CONTENDERS = (
    *OURS,
    Cell("dictionary_learning", "topk", 3e-3),
    Cell("dictionary_learning", "batchtopk", 3e-3),
    Cell("dictionary_learning", "jumprelu", 3e-3),
    Cell("saelens", "topk", 3e-3, dead_tokens=NEVER),
    Cell("saelens", "batchtopk", 3e-3, dead_tokens=NEVER),
    Cell("saelens", "jumprelu", 3e-3),
    Cell("sparsify", "topk", 3e-3),
)
"""Each with what a small search on the demo found best for it (README.md); sparsify has TopK alone."""

SIZES: Mapping[str, Mapping[str, Any]] = {
    "demo": {"tokens": 1_500_000, "d_sae": 4096},
    "smollm2": {"tokens": 750_000, "d_sae": 4608},
}
"""Of the comparison on each subject."""

RULE: tuple[tuple[str, int, int, tuple[float, ...]], ...] = (
    ("demo", 4096, 200_000, (6e-3, 1.2e-2, 3e-3, 2.4e-2)),
    ("demo", 4096, 500_000, (6e-3, 3e-3, 1.2e-2)),
    ("demo", 4096, 1_500_000, (6e-3, 3e-3, 4.2e-3)),
    ("demo", 1024, 500_000, (6e-3, 1.2e-2, 3e-3)),
    ("demo", 16384, 500_000, (6e-3, 3e-3, 1.2e-2)),
    ("smollm2", 4608, 750_000, (4.2e-3, 6e-3, 3e-3)),
    ("smollm2", 4608, 200_000, (6e-3, 1.2e-2, 3e-3)),
    ("smollm2", 2304, 200_000, (6e-3, 1.2e-2, 3e-3)),
    ("smollm2", 9216, 200_000, (6e-3, 3e-3, 1.2e-2)),
)
"""(subject, latents, tokens, rates) of our TopK: what the rule for the default learning rate is fitted to."""


def contenders(subject: str) -> tuple[Cell, ...]:
    """All of them, at the sizes of the subject."""
    return tuple(cell.but(subject=subject, **SIZES[subject]) for cell in CONTENDERS)


def short_cells(subject: str) -> tuple[Cell, ...]:
    """All contenders on few tokens, at each of three rates; what counts as dead is shorter with the run."""
    return tuple(
        cell.but(rate=rate, tokens=SHORT_TOKENS, dead_tokens=min(cell.dead_tokens, SHORT_TOKENS // 15))
        if cell.dead_tokens != NEVER
        else cell.but(rate=rate, tokens=SHORT_TOKENS)
        for rate in SHORT_RATES
        for cell in contenders(subject)
    )


def ours_at_default(subject: str) -> tuple[Cell, ...]:
    """Our SAEs at the rate that the trainer takes when none is set."""
    sizes = SIZES[subject]
    rate = default_learning_rate(sizes["d_sae"], sizes["tokens"])
    return tuple(cell.but(subject=subject, rate=rate, **sizes) for cell in OURS)


def rule_cells(subject: str) -> tuple[Cell, ...]:
    """The cells of RULE for one subject."""
    return tuple(
        OURS[0].but(subject=name, d_sae=d_sae, tokens=tokens, rate=rate)
        for name, d_sae, tokens, rates in RULE
        for rate in rates
        if name == subject
    )
