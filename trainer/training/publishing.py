"""What a run publishes: its settings, its SAEs as snapshots with a manifest, and the summary at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from producer.common.run_file import show_settings
from trainer.report import SaeReport, StepReport
from trainer.saes.folding import side_by_side
from trainer.saes.writing import SaeFiles
from trainer.settings import TrainerSettings
from trainer.snapshot import (
    FileParts,
    SnapshotError,
    finite,
    is_complete,
    new_snapshot,
    read_manifest,
    retire,
    set_latest,
    snapshot_folder,
)
from trainer.state.durable import replace_text
from trainer.stream.intake import Intake
from trainer.training.roster import Roster
from trainer.training.run import CalibratedSae, Run, WrittenSae
from trainer.training.sae_trainer import SaeTrainer

log = logging.getLogger("sluice.trainer")

CALIBRATION_SIZE = 8_192
"""Activations that a snapshot's thresholds are estimated from."""
SELFTEST_CANDIDATES = 1024
"""Activations among which those of the self-test are chosen."""


def write_settings(settings: TrainerSettings, roster: Roster) -> None:
    """Writes the resolved settings, with the SAEs of this moment, to the run directory."""
    replace_text(settings.run.folder / "settings.toml", show_settings(roster.resolve(settings)) + "\n")


def calibration_activations(run: Run, intake: Intake, count: int = CALIBRATION_SIZE) -> list[Tensor]:
    """Raw activations of every hook that are still to be trained on; the last batch where none are left."""
    activations = intake.peek(count)
    if activations and len(activations[0]):
        return activations
    return [] if run.last_batch is None else run.last_batch.x


def publish_snapshot(run: Run, report: StepReport, activations: list[Tensor], facts: dict[str, Any]) -> list[str]:
    """Writes a snapshot of every SAE that has trained, self-tested, and retires old ones; returns the names in it.

    An SAE that fails its self-test is left out, with a line in the log, and does not keep the others from appearing.
    `activations` are raw ones of every hook, for calibration and self-test; `facts` is the manifest's part on the run.
    """
    directory = run.settings.run.folder
    folder = snapshot_folder(directory, report.tokens)
    if is_complete(folder):
        set_latest(folder)
        return list(read_manifest(folder).saes)
    numbers = {sae.name: sae for sae in report.saes}
    with new_snapshot(directory, report.tokens, facts) as draft:
        try:
            saes = list(_write_all(run, numbers, activations, draft.folder, facts))
        finally:  # other placement groups tell what they have written, whatever came of it here
            elsewhere = run.published_elsewhere()
        for sae in [*saes, *elsewhere]:
            if sae.fault is None:
                draft.add(sae.name, sae.numbers, sae.parts)
            else:
                log.error("sae %s is left out of this snapshot: %s", sae.name, sae.fault)
                draft.discard(sae.name)
        if not draft.saes:
            raise SnapshotError("there is no SAE to publish")
        names = list(draft.saes)
    retire(directory, run.settings.snapshots.keep, run.settings.snapshots.keep_every_tokens)
    return names


def write_latents(
    run: Run, numbers: Mapping[str, SaeReport], activations: list[Tensor], folder: Path, facts: dict[str, Any]
) -> str:
    """The part of a rank other than 0 in a snapshot: writes its latents, or gives up where the first rank does.

    Returns its answer to rank 0, JSON; the first rank of a placement group tells of its SAEs.
    """
    try:
        saes = list(_write_all(run, numbers, activations, folder, facts))
    except OSError as error:  # all ranks of the group were told, and rank 0 logs it
        return json.dumps({"error": f"placement group {run.ranks.group_index}: {error}"})
    tells = run.ranks.rank == 0
    return json.dumps({"saes": [sae.as_json() for sae in saes] if tells else []})


def _write_all(
    run: Run, numbers: Mapping[str, SaeReport], activations: list[Tensor], folder: Path, facts: dict[str, Any]
) -> Iterator[WrittenSae]:
    """Writes the SAEs of this rank's placement group one by one. Collective in the group."""
    for calibrated in run.calibrated(activations, folder, facts):
        report = numbers[calibrated.sae_trainer.settings.name]
        try:
            metadata = _metadata(run, calibrated.sae_trainer, report, facts) if run.ranks.rank == 0 else {}
            parts = _write(run, calibrated, folder, activations, metadata)
        except SnapshotError as error:
            yield WrittenSae(calibrated.name, str(error), {}, None)
        else:
            yield WrittenSae(calibrated.name, None, _numbers(calibrated, report), parts)


def _write(
    run: Run, calibrated: CalibratedSae, folder: Path, activations: list[Tensor], metadata: dict[str, Any]
) -> FileParts | None:
    """Writes the files of one SAE, or of its EMA copy, into its folder. Collective."""
    assert run.scales is not None
    sae_trainer = calibrated.sae_trainer
    x = side_by_side(run.by_hook(activations), sae_trainer.hooks.reads)[:SELFTEST_CANDIDATES].float()
    files = SaeFiles(
        calibrated.sae,
        sae_trainer.input_transform(run.scales),
        calibrated.firing_rate,
        metadata,
        run.host_ranks,
        run.on_progress,
    )
    return files.write(folder / calibrated.name, x)


def _numbers(calibrated: CalibratedSae, report: SaeReport) -> dict[str, Any]:
    """Numbers of an SAE for the manifest; of an EMA copy without those that were measured on the other weights."""
    sae_trainer = calibrated.sae_trainer
    numbers = numbers_of(sae_trainer, report)
    if calibrated.is_average:
        numbers |= dict.fromkeys(("l0", "mse", "fvu", "dead_latents", "dead_latents_ratio", "shrinkage"))
    return numbers


def numbers_of(sae_trainer: SaeTrainer, report: SaeReport) -> dict[str, Any]:
    """Numbers of one SAE for manifest and summary."""
    return {
        "architecture": sae_trainer.settings.architecture,
        "d_in": sae_trainer.sae.d_in,
        "d_sae": sae_trainer.settings.d_sae,
        **sae_trainer.hooks.record(),
        "tokens": sae_trainer.tokens,
        "l0": finite(report.l0),
        "mse": finite(report.mse),
        "fvu": finite(report.fvu),
        "dead_latents": report.dead_latents,
        "dead_latents_ratio": report.dead_latents_ratio,
        "shrinkage": finite(report.shrinkage),
    }


def _metadata(run: Run, sae_trainer: SaeTrainer, numbers: SaeReport, facts: dict[str, Any]) -> dict[str, Any]:
    """Metadata of one SAE that SAELens and others read, and its provenance."""
    provenance, hooks = run.stream.provenance, sae_trainer.hooks
    modules = {hook.name: hook.module for hook in run.stream.hooks}
    metadata = {
        "model_name": provenance.get("model"),
        "model_revision": facts["stream"].get("revision") or provenance.get("model_revision"),
        "model_from_pretrained_kwargs": {},
        # A crosscoder has no one hook: naming its first would make others read it as an SAE of that one.
        "hook_name": None if hooks.is_crosscoder else hooks.reads[0],
        "hf_hook_name": None if hooks.is_crosscoder else modules[hooks.reads[0]],
        "context_size": run.stream.context,
        "prepend_bos": provenance.get("prepend_bos"),
        "exclude_special_tokens": provenance.get("exclude_special"),
        "dataset_path": _dataset(run.settings),
        "corpus": provenance.get("corpus"),
        "not_trained_on": _not_trained_on(run, facts),
        "sae_lens_training_version": None,
        "trained_with": "sluice",
        "tokens_trained": sae_trainer.tokens,
        "input_scale": run.scales[hooks.reads[0]] if run.scales else None,
        "settings": sae_trainer.settings.model_dump(mode="json", exclude_none=True),
        "run": facts["id"],
        "stream": provenance,
        "l0": finite(numbers.l0),
        "fvu": finite(numbers.fvu),
        "num_dead_features": numbers.dead_latents,
    }
    if hooks.is_crosscoder:
        metadata |= {"hook_names": list(hooks.reads), "hf_hook_names": [modules[hook] for hook in hooks.reads]}
    if hooks.is_transcoder:
        metadata |= {"hook_name_out": hooks.writes[0], "hf_hook_name_out": modules[hooks.writes[0]]}
    return metadata


def _dataset(settings: TrainerSettings) -> str | None:
    """The name on the hub of the dataset that the run reads, where it is one dataset of the hub."""
    return getattr(settings.corpus, "dataset", None)


def _not_trained_on(run: Run, facts: dict[str, Any]) -> dict[str, Any]:
    """Activations that the stream leaves out: what the SAE does on them means nothing, such as thousands of latents
    that fire on a BOS."""
    return {
        "special_tokens": bool(run.stream.provenance.get("exclude_special")),
        "norms_over": facts["stream"]["norm_bounds"],
    }


def run_facts(run: Run, intake: Intake) -> dict[str, Any]:
    """The manifest's part on the run."""
    hooks, bounds, revisions = run.stream.hooks, intake.norm_bounds, intake.revisions
    trained = {} if revisions is None else {"revision": [*revisions][-1], "tokens_by_revision": revisions}
    return {
        "id": intake.run_id,
        "settings": run.roster.resolve(run.settings).model_dump(mode="json", exclude_none=True),
        "stream": {
            **run.stream.provenance,
            "fingerprint": run.stream.fingerprint,
            "shards": run.stream.shards,
            "held_out": run.stream.held_out,
            "hooks": [hook.model_dump() for hook in hooks],
            **trained,
            "norm_bounds": bounds and {hook.name: bound for hook, bound in zip(hooks, bounds, strict=True)},
        },
        "epoch": intake.epoch,
    }


def summary(run: Run, intake: Intake, report: StepReport, fault: str | None) -> dict[str, Any]:
    """Contents of summary.json; the monitor adds the evaluation. `fault` is why the run has failed, if it has.

    `rows_set_aside` is None, in JSON null, when nobody knows how many tokens some quarantined shard has.
    """
    quarantine = intake.quarantine()
    return {
        "outcome": "finished" if fault is None else "failed",
        "fault": fault,
        "tokens": report.tokens,
        "target_tokens": run.settings.run.tokens,
        "seconds": round(run.seconds, 3),
        "tokens_per_second": round(report.tokens / max(run.seconds, 1e-9), 1),
        "rows_trained": intake.tokens_trained,
        "rows_set_aside": quarantine.tokens,
        "shards_set_aside": [asdict(shard) for shard in quarantine.shards],
        "quarantined_ratio": round(quarantine.ratio, 6),
        "saes": {
            sae_trainer.settings.name: numbers_of(sae_trainer, _of(report, sae_trainer))
            for sae_trainer in run.publishable
        },
    }


def _of(report: StepReport, sae_trainer: SaeTrainer) -> SaeReport:
    return next(sae for sae in report.saes if sae.name == sae_trainer.settings.name)
