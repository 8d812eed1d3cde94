"""One SAE of a run as the sizes that the cost of its step depends on, and where placement groups train it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from trainer.parallel.grouping import place
from trainer.planning.cost import FLOAT32, HALF, MACHINES, StepCost, step_seconds
from trainer.saes.settings import SaeSettings
from trainer.settings import TrainerSettings
from trainer.training.optimizers.registry import OPTIMIZERS


def sae_cost(settings: TrainerSettings, sae: SaeSettings, widths: Mapping[str, int], number_bytes: int) -> StepCost:
    """The cost of an SAE's step; `widths` of hooks by name, `number_bytes` is the size of a number in products."""
    hooks, terms = settings.hooks_of(sae), sae.cost_terms()
    # AuxK counts dead latents in every step, and so does the last resort.
    terms = replace(terms, scalars=terms.scalars + (sae.revival == "auxk") + (sae.reinitialise_tokens > 0))
    return StepCost(
        name=sae.name,
        architecture=sae.architecture,
        d_in=sum(widths[hook] for hook in hooks.reads),
        d_out=sum(widths[hook] for hook in hooks.writes),
        d_sae=sae.d_sae,
        batch=settings.optimizer.batch,
        levels=len(sae.levels),
        unit_decoder=sae.unit_decoder,
        centred=sae.centred,
        skip=sae.skip,
        whitening=sae.whitening,
        ema=sae.ema_tokens is not None,
        optimizer=OPTIMIZERS[sae.optimizer],
        number_bytes=number_bytes,
        exchange_bytes=HALF if settings.parallel.exchange == "bfloat16" else FLOAT32,
        **vars(terms),
    )


def place_saes(
    settings: TrainerSettings,
    saes: Iterable[SaeSettings],
    widths: Mapping[str, int],
    placed: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The placement group of each SAE by its name; those in `placed` stay where they are.

    Steps are compared as they would be on one kind of GPU: every rank, and every start, must come to the same answer.
    """
    machine = MACHINES["h100"]
    costs = {sae.name: step_seconds(sae_cost(settings, sae, widths, HALF), machine) for sae in saes}
    return place(costs, settings.parallel.groups, placed)
