"""The state of a tuning on disk, from which it goes on: whole or absent, and the newest alone.

tuning/000000040960/            activations trained on
    state.json                  options, the quality before, counters, the place in the text
    state.safetensors           weights, Adam's moments, statistics
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from producer.common.parsing import ParseError, read_object
from trainer.state.durable import new_folder, remove_folder, sweep
from trainer.state.format import SaeTensors
from trainer.tuning.options import TuningError, TuningOptions
from trainer.tuning.quality import Quality
from trainer.tuning.tuner import TunerState

FOLDER, DOCUMENT, TENSORS = "tuning", "state.json", "state.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class TuningState:
    """The document of a saved tuning."""

    format: int
    source: str
    """Folder of the SAE that it began with."""
    options: TuningOptions
    before: Quality
    seconds: float
    tuner: TunerState


@dataclass(frozen=True)
class SavedTuning:
    """A tuning between two steps."""

    state: TuningState
    tensors: SaeTensors


def save(directory: Path, tuning: SavedTuning) -> None:
    """Writes a tuning into a run directory and removes the earlier ones."""
    final = directory / FOLDER / f"{tuning.state.tuner.sae.tokens:012d}"
    earlier = [path for path in _folders(directory) if path != final]
    if final.is_dir():
        remove_folder(final)
    with new_folder(final) as folder:
        save_file({key: value.contiguous() for key, value in tuning.tensors.by_key().items()}, folder / TENSORS)
        (folder / DOCUMENT).write_text(json.dumps(_STATE.dump_python(tuning.state, mode="json")))
    for path in earlier:
        remove_folder(path)


def load(directory: Path) -> SavedTuning | None:
    """The newest tuning in a run directory; None where there is none. Raises TuningError."""
    sweep(directory / FOLDER)
    folders = _folders(directory)
    if not folders:
        return None
    folder = folders[-1]
    try:
        state = _STATE.validate_python(read_object(folder / DOCUMENT))
        return SavedTuning(state, SaeTensors.from_keys(load_file(folder / TENSORS)))
    except (OSError, ParseError, ValidationError, SafetensorError, KeyError) as error:
        raise TuningError(f"{folder} cannot be read ({error}): remove {directory} to begin anew") from None


def _folders(directory: Path) -> list[Path]:
    """Folders of saved tunings, oldest first."""
    return sorted(path for path in (directory / FOLDER).glob("[0-9]*") if path.is_dir())


_STATE = TypeAdapter(TuningState)
