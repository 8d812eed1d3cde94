"""A language model under training: which of its checkpoints are there, and the settings that load one.

    model.revisions = ["step1000", "step2000"]     one for each epoch: revisions on the hub, or folders below model.name
    model.watch = "out"                            the newest complete checkpoint in a folder, whenever there is one

A lease names the revision whose activations it asks for: the trainer decides, so that every activation has one. With
model.watch, producers tell the trainer what they see; model.name is read until there is a checkpoint, and gives the
tokenizer. Checkpoints are ordered by the number at the end of their names, as in `checkpoint-500`.

A checkpoint is complete when it has a config.json and every byte of the weights that its safetensors files announce.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from producer.common.parsing import ParseError, read_object
from producer.common.safetensors_header import INDEX_FILE, SINGLE_FILE, read_header
from producer.lm.errors import ModelError
from producer.settings import ModelSettings


@dataclass(frozen=True, order=True)
class Revision:
    """A checkpoint of the language model."""

    number: int
    """Orders revisions: the newest has the largest."""
    name: str = ""
    """Empty for model.name itself."""


FIRST = Revision(0)
"""The model that model.name names."""


def newest_checkpoint(folder: Path, known: Revision = FIRST) -> Revision:
    """Finds the newest complete checkpoint in `folder` beyond `known`; returns `known` when there is none."""
    if not folder.is_dir():
        return known
    numbered = [(path, re.search(r"\d+$", path.name)) for path in folder.iterdir() if path.is_dir()]
    candidates = sorted((Revision(int(number[0]), path.name) for path, number in numbered if number), reverse=True)
    newer = (revision for revision in candidates if revision > known and revision.number < 2**48)
    return next((revision for revision in newer if is_complete(folder / revision.name)), known)


def is_complete(folder: Path) -> bool:
    """Tells whether a folder holds a whole model: a training run may be about to write it."""
    try:
        if not (folder / "config.json").is_file():
            return False
        if (folder / INDEX_FILE).is_file():
            files = set(read_object(folder / INDEX_FILE).get("weight_map", {}).values())
            return bool(files) and all(_is_whole(folder / name) for name in files)
        return _is_whole(folder / SINGLE_FILE)
    except (OSError, ParseError):
        return False


def _is_whole(path: Path) -> bool:
    """Tells whether a safetensors file is as long as its header says."""
    with path.open("rb") as file:
        entries = read_header(file.fileno())
        return bool(entries) and os.fstat(file.fileno()).st_size == max(entry.end for entry in entries.values())


def settings_of(settings: ModelSettings, revision: str) -> ModelSettings:
    """Returns settings that load a revision. Raises ModelError for a checkpoint that is no longer there."""
    if not revision:
        return settings
    if settings.watch is not None:
        folder = Path(settings.watch) / revision
        if not is_complete(folder):
            raise ModelError(
                f"model.watch = {settings.watch!r}: checkpoint {revision} is gone or incomplete, and activations of it "
                "are asked for; let the training run keep more of its last checkpoints"
            )
        return settings.model_copy(update={"name": str(folder)})
    if Path(settings.name).is_dir():
        return settings.model_copy(update={"name": str(Path(settings.name) / revision)})
    return settings.model_copy(update={"revision": revision})


def first_settings(settings: ModelSettings) -> ModelSettings:
    """Returns settings of the model that is loaded at the start: the first of model.revisions, or model.name."""
    return settings_of(settings, settings.revisions[0]) if settings.revisions else settings


def follows(settings: ModelSettings) -> bool:
    """Tells whether the weights change during the run."""
    return settings.watch is not None or settings.revisions is not None


def describe(revisions: Sequence[str] | None) -> str:
    """Returns what identifies a stream of several revisions, as JSON."""
    return "followed" if revisions is None else json.dumps(list(revisions))
