"""The handle through which the service reaches the explorer that the evaluating thread makes; without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from monitor.evaluation.latents.explorer import Explorer


@dataclass
class ExplorerHandle:
    """The explorer of latents, or the reason why there is none (yet)."""

    explorer: Explorer | None = None
    reason: str = "The language model is still being loaded."
    """Why there is no explorer."""
    is_expected: bool = True
    """Whether an explorer may still come."""
    activity: str = ""
    """What the evaluating thread is doing, in words; empty while it waits."""
    incompatible_saes: dict[str, str] = field(default_factory=dict)
    """Why an SAE does not fit the language model, by the SAE's name."""

    def require(self) -> Explorer:
        """The explorer. Raises HTTPException 503 where there is none."""
        if self.explorer is None:
            raise HTTPException(503, self.reason, {"Retry-After": "5"})
        return self.explorer

    def disable(self, reason: str) -> None:
        """Announces that there will be no explorer."""
        self.reason, self.is_expected = reason, False
