"""What is compared: one cell is one SAE trained once. Its name is its folder, so that no cell is trained twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

TOKENS = 1_500_000
LONG_TOKENS = 4_500_000
RATES = (3e-3, 6e-3, 1.2e-2)
SEEDS = (0, 1, 2)
FRONTIER = (8, 16, 32, 64, 128)
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
    tokens: int = TOKENS
    dead_tokens: int = 100_000
    """A latent silent for so many tokens is worked on, where a library does."""
    autocast: bool = True
    """bfloat16 in the matrix products."""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    """Other settings than the library's defaults."""

    @property
    def contender(self) -> tuple[str, str]:
        return self.library, self.architecture

    @property
    def name(self) -> str:
        parts = [
            self.library,
            self.architecture,
            f"k{self.k}",
            f"lr{self.rate:g}",
            f"{self.tokens}",
            f"seed{self.seed}",
        ]
        if self.dead_tokens != Cell.dead_tokens:
            parts.append(f"dead{self.dead_tokens}")
        if not self.autocast:
            parts.append("float32")
        return "-".join(parts + [f"{name}={value}" for name, value in sorted(self.options.items())])

    def as_json(self) -> dict[str, Any]:
        return asdict(replace(self, options={})) | {"options": dict(self.options)}

    def but(self, **changes: Any) -> Cell:
        return replace(self, **changes)


CONTENDERS = (
    Cell("ours", "topk", 3e-3, dead_tokens=10_000),
    Cell("ours", "batchtopk", 3e-3, dead_tokens=10_000),
    Cell("ours", "jumprelu", 3e-3, dead_tokens=10_000, options=MappingProxyType({"revive": "auxk"})),
    Cell("dictionary_learning", "topk", 3e-3),
    Cell("dictionary_learning", "batchtopk", 3e-3),
    Cell("dictionary_learning", "jumprelu", 3e-3),
    Cell("saelens", "topk", 3e-3, dead_tokens=NEVER),
    Cell("saelens", "batchtopk", 3e-3, dead_tokens=NEVER),
    Cell("saelens", "jumprelu", 3e-3),
    Cell("sparsify", "topk", 3e-3),
)
"""Each with what a small search found best for it (README.md); sparsify has TopK alone."""
