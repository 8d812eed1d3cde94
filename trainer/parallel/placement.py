"""Whether the SAEs of a run can be shared by the ranks that were started. Light: no torch."""

from __future__ import annotations

from producer.common.toml import show_value
from trainer.parallel.environment import LATENTS_PER_UNIT
from trainer.saes.settings import SaeSettings
from trainer.settings import ParallelSettings, TrainerSettings


def world_fault(settings: TrainerSettings, world_size: int) -> str | None:
    """Why so many ranks cannot train this run, and what to change; None when they can."""
    parallel = settings.parallel
    if world_size % parallel.groups:
        return (
            f"parallel.groups = {parallel.groups} takes as many ranks for each group, and {world_size} "
            f"{'was' if world_size == 1 else 'were'} started: start torchrun with --nproc-per-node "
            f"{parallel.groups * max(1, round(world_size / parallel.groups))}, or lower parallel.groups"
        )
    if parallel.groups > len(settings.sae):
        return (
            f"parallel.groups = {parallel.groups} is more than the {len(settings.sae)} SAEs of the run, and a group "
            f"without one would be idle: lower it to {len(settings.sae)}, or raise parallel.latents"
        )
    latents = world_size // parallel.groups if parallel.latents == "auto" else int(parallel.latents)
    if world_size != latents * parallel.groups:
        return (
            f"parallel.latents = {show_value(parallel.latents)} and parallel.groups = {parallel.groups} make "
            f"{latents * parallel.groups} ranks, and {world_size} were started: start torchrun with "
            f'--nproc-per-node {latents * parallel.groups}, or set parallel.latents = "auto"'
        )
    if parallel.blocks % latents and parallel.blocks > 1:
        return (
            f"parallel.blocks = {parallel.blocks} is no multiple of the {latents} ranks that share an SAE: start 1, 2, "
            f"4 or 8 ranks with parallel.blocks = 8, or set it to a multiple of {latents} in a new run"
        )
    if settings.run.deterministic and latents > 1 and parallel.blocks == 1:
        return (
            f"run.deterministic on {latents} ranks needs parallel.blocks, such as 8: without it the last digits "
            "depend on the order in which ranks add"
        )
    if world_size > 1 and settings.optimizer.device.startswith("cuda:"):
        return (
            f"optimizer.device = {show_value(settings.optimizer.device)} names one GPU, and {world_size} ranks were "
            'started: set it to "cuda", which gives each rank its own'
        )
    faults = (sae_fault(sae, parallel, latents) for sae in settings.sae)
    return next((fault for fault in faults if fault), None)


def sae_fault(sae: SaeSettings, parallel: ParallelSettings, ranks: int) -> str | None:
    """Why `ranks` ranks cannot share this SAE, and what to change; None when they can."""
    parts = max(ranks, parallel.blocks)
    if parts > 1 and not sae.IS_SHARDED:
        return (
            f"sae {show_value(sae.name)}: architecture {sae.architecture} compares all latents again for each that it "
            "chooses: train it on one rank, with parallel.blocks = 1"
        )
    if parts == 1 or sae.d_sae >= LATENTS_PER_UNIT * parts:
        return None
    why = f"{ranks} ranks" if ranks >= parallel.blocks else f"parallel.blocks = {parallel.blocks}"
    return (
        f"sae {show_value(sae.name)}: d_sae = {sae.d_sae} is too small for {why}, which take {LATENTS_PER_UNIT} "
        f"latents each at least; raise it to {LATENTS_PER_UNIT * parts}, or lower the number"
    )
