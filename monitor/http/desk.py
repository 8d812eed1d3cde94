"""Where the service's threads find what the following thread has made ready. Light: no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from monitor.evaluation.explore import Explorer


@dataclass
class Desk:
    """Who answers questions about latents, and why nobody does."""

    explorer: Explorer | None = None
    why_not: str = "The language model is still being loaded."
    """While there is no explorer."""
    coming: bool = True
    """There will be one."""
    unfit: dict[str, str] = field(default_factory=dict)
    """SAEs that do not fit the language model, and why."""

    def close(self, reason: str) -> None:
        """There will be nobody."""
        self.why_not, self.coming = reason, False
