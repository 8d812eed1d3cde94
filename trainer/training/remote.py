"""An SAE that another placement group of ranks trains: what its schedule, reports and checkpoints need here.

Tokens, phase and learning rate follow from the batches alone, so every rank knows them. What only its own ranks know,
the first of them tells: its report, and its state in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from trainer.report import SaeReport
from trainer.saes.base import Sae
from trainer.saes.formats import PublishedSae
from trainer.state.format import SaeState, SaeTensors
from trainer.training.sae_trainer import SaeTrainer


class RemoteSaeTrainer(SaeTrainer):
    """See the module's docstring. It holds no latents."""

    is_here = False
    last_report: SaeReport | None = None
    """Its last report."""
    checkpoint_state: SaeState | None = None
    """Its state in the checkpoint that is being written."""

    def initialise(
        self, sample: Mapping[str, Tensor], scales: Mapping[str, float], start: PublishedSae | None = None
    ) -> None:
        self.has_weights = True

    def count(self, tokens: int) -> None:
        """Its own ranks take a step on so many tokens."""
        self.learning_rate = self.schedule.rate(self.tokens)
        self.tokens += tokens

    @property
    def ema_sae(self) -> Sae | None:
        return None

    def report(self, scales: Mapping[str, float]) -> SaeReport:
        assert self.last_report is not None, "ranks are asked for their reports first"
        return self.last_report

    def counters(self) -> SaeState:
        assert self.checkpoint_state is not None, "ranks are asked for their states first"
        return self.checkpoint_state

    def restore(self, state: SaeState, tensors: SaeTensors) -> None:
        self.restore_counters(state)
        self.has_weights = True
