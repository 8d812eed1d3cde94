"""A run as a checkpoint holds it: putting one together, and checking it before a run goes on from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from trainer.parallel.ranks import Ranks
from trainer.planning.sae_cost import place_saes
from trainer.settings import TrainerSettings
from trainer.state.checkpoint import CheckpointError, Share
from trainer.state.format import (
    BufferState,
    Checkpoint,
    CheckpointDocument,
    CheckpointTensors,
    LatentRange,
    RunState,
    SaeTensors,
)
from trainer.stream.buffer import pool_rows
from trainer.stream.intake import Intake
from trainer.training.roster import Roster, RosterError, restore_roster

log = logging.getLogger("sluice.trainer")


def checkpoint_of(
    run: tuple[RunState, dict[str, SaeTensors]],
    latents: Mapping[str, list[LatentRange]],
    roster: Roster,
    intake: Intake,
    blocks: int,
) -> Checkpoint:
    """The checkpoint of this moment; `run` is its state and the tensors of its SAEs.

    `latents` lists which file has which of them, and `blocks` is parallel.blocks.
    """
    (state, saes), (ledger, shards, buffer) = run, intake.state()
    document = CheckpointDocument(state, roster.state(), ledger, buffer.random, blocks, dict(latents))
    return Checkpoint(document, CheckpointTensors(saes, shards, buffer.names))


def roster_of(document: CheckpointDocument, settings: TrainerSettings) -> Roster:
    """The roster of a checkpoint, checked against the run file. Raises CheckpointError, saying what to do."""
    try:
        roster = restore_roster(document.roster, settings.sae, settings.run.folder)
    except RosterError as error:
        raise CheckpointError(str(error)) from None
    for sae in settings.sae:
        if sae.name in roster.gone:
            log.info("sae %s was detached from this run; the run file still names it", sae.name)
    for member in roster.members:
        if fault := settings.hook_fault(member.settings):
            raise CheckpointError(f"sae {member.name!r} of the checkpoint of {settings.run.folder}: {fault}")
    return roster


def share_of(settings: TrainerSettings, ranks: Ranks, document: CheckpointDocument) -> Share:
    """The latents that a rank of this placement group holds, of each SAE of a checkpoint."""
    roster, stream = roster_of(document, settings), document.ledger.stream
    if stream is None:
        return lambda _, d_sae: ranks.latents(d_sae)
    group_of = place_saes(settings, roster.settings, {hook.name: hook.width for hook in stream.hooks})
    return lambda name, d_sae: ranks.latents(d_sae) if group_of.get(name) == ranks.group_index else range(0)


def buffer_of(checkpoint: Checkpoint, settings: TrainerSettings) -> BufferState:
    """The buffer of a checkpoint. Raises CheckpointError when a deterministic run cannot go on from it."""
    buffer = checkpoint.buffer
    if settings.run.deterministic and checkpoint.tokens:
        if buffer.names is None:
            raise CheckpointError(
                f"run.deterministic is set, and the run in {settings.run.folder} began without it: unset it, or use "
                "a new run.directory"
            )
        if (rows := buffer.names.shape[1]) > (pool := pool_rows(settings.buffer.rows)):
            raise CheckpointError(
                f"buffer.rows = {settings.buffer.rows} holds {pool} rows to draw from, the checkpoint of "
                f"{settings.run.folder} has {rows}: set it to what it was"
            )
    return buffer
