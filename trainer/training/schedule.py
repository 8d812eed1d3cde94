"""The learning rate of one SAE, in tokens that this SAE has trained on.

rate
peak       ╭────────────╮
          ╱              ╲
   0  ───╯                ╰──▶ tokens
      warm-up  constant  cooldown
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.defaults import planned_tokens
from trainer.phases import SaePhase


def warmup_factor(tokens: int, warmup_tokens: int) -> float:
    """Linear from zero to 1 over the first `warmup_tokens` tokens; then 1."""
    return min(1.0, (tokens + 1) / warmup_tokens) if warmup_tokens else 1.0


@dataclass(frozen=True)
class Cooldown:
    """Linear to zero from `start` to `end`, both in an SAE's own tokens."""

    start: int
    end: int

    def factor(self, tokens: int) -> float:
        if tokens <= self.start:
            return 1.0
        return max(0.0, (self.end - tokens) / max(1, self.end - self.start))


@dataclass
class Schedule:
    """See the module's docstring. An SAE may join a run late: its own tokens count, not the run's."""

    peak: float
    warmup_tokens: int
    cooldown_fraction: float
    """Share of the tokens at the end over which the rate falls."""
    budget: int | None = None
    """Tokens after which the SAE is finished; None: it trains as long as the run does."""
    run_tokens: int | None = None
    """Tokens after which the run ends; None: it has no end."""
    joined_at: int = 0
    """Tokens that the run had trained on when this SAE joined."""
    requested: Cooldown | None = None
    """The cooldown that an operator asked for."""

    @property
    def end(self) -> int | None:
        """The SAE's own tokens at its end; None without an end."""
        return planned_tokens(self.budget, self.run_tokens, self.joined_at)

    @property
    def cooldown(self) -> Cooldown | None:
        """The cooldown that an operator requested, else one before the end; None without an end."""
        if self.requested is not None:
            return self.requested
        end = self.end
        if end is None or not self.cooldown_fraction:
            return None
        return Cooldown(round((1 - self.cooldown_fraction) * end), end)

    def rate(self, tokens: int) -> float:
        """The learning rate of the step after `tokens` tokens."""
        factor, cooldown = warmup_factor(tokens, self.warmup_tokens), self.cooldown
        return self.peak * (factor if cooldown is None else min(factor, cooldown.factor(tokens)))

    def cool_down(self, tokens: int, now: bool = False) -> int:
        """Requests a cooldown over `cooldown_fraction` of the `tokens` trained so far; returns its length in tokens.

        A cooldown that has begun already continues as it is: the rate never rises again. `now`: finished at once.
        """
        if now:
            self.requested = Cooldown(tokens, tokens)
        elif self.requested is None:
            planned, length = self.cooldown, max(1, round(self.cooldown_fraction * tokens))
            has_begun = planned is not None and planned.start <= tokens
            self.requested = planned if has_begun else Cooldown(tokens, tokens + length)
        assert self.requested is not None
        return max(0, self.requested.end - tokens)

    def phase(self, tokens: int) -> SaePhase:
        """The SAE's phase after `tokens` tokens."""
        if self.budget is not None and tokens >= self.budget:
            return SaePhase.FINISHED
        if self.requested is not None and tokens >= self.requested.end:
            return SaePhase.FINISHED
        if (cooldown := self.cooldown) is not None and tokens >= cooldown.start:
            return SaePhase.COOLING_DOWN
        if not tokens:
            return SaePhase.JOINING
        return SaePhase.WARMING_UP if tokens < self.warmup_tokens else SaePhase.CONSTANT

    def tokens_left(self, tokens: int) -> int | None:
        """Tokens until the phase after `tokens` tokens ends; None when its end is open."""
        cooldown = self.cooldown
        match self.phase(tokens):
            case SaePhase.FINISHED:
                return 0
            case SaePhase.COOLING_DOWN:
                assert cooldown is not None
                return max(0, cooldown.end - tokens)
            case SaePhase.WARMING_UP:
                return self.warmup_tokens - tokens
            case SaePhase.CONSTANT:
                return None if cooldown is None else cooldown.start - tokens
        return None
