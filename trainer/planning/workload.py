"""The workload of a run: its SAEs as costs of a step, the size of its language model, its threads."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from producer.common.addresses import model_directory
from producer.common.parsing import ParseError, read_object
from producer.common.toml import show_value
from trainer.planning.cost import StepCost
from trainer.planning.sae_cost import sae_cost
from trainer.settings import TrainerSettings


class EstimateError(ValueError):
    """The run file and the arguments do not suffice for an estimate. The message says what to add."""


@dataclass(frozen=True)
class LanguageModelSize:
    """The size of a language model, as far as an estimate depends on it."""

    width: int
    """Width of its hidden states."""
    parameters: float | None
    """Weights in the blocks up to the last hook; None when unknown."""


def step_costs(settings: TrainerSettings, width: int, number_bytes: int) -> list[StepCost]:
    """Every SAE of the run. All hooks are `width` wide; `number_bytes` is the size of a number in products."""
    widths = dict.fromkeys(settings.hooks, width)
    return [sae_cost(settings, sae, widths, number_bytes) for sae in settings.sae]


def language_model_size(settings: TrainerSettings, width: int | None, parameters: float | None) -> LanguageModelSize:
    """The two numbers as given, or read from the model's folder on this disk.

    Raises EstimateError when the width is neither given nor on this disk.
    """
    if settings.corpus.synthetic is not None and settings.model is None:
        return LanguageModelSize(width or settings.corpus.synthetic.d_in, parameters)
    assert settings.model is not None
    folder = model_folder(settings.model.name)
    if folder is not None:
        width = width or _width(_config(folder / "config.json"))
        parameters = parameters or blocks_parameters(folder, [_block(hook) for hook in settings.model.hooks])
    if width is None:
        raise EstimateError(
            f"model.name = {show_value(settings.model.name)} is not on this disk, so the width of its activations is "
            "unknown: add --width, such as --width 768"
        )
    return LanguageModelSize(width, parameters)


def model_folder(name: str) -> Path | None:
    """The folder of a model on this disk, perhaps in the hub's cache; None when it is not there."""
    if (folder := model_directory(name)).is_dir():
        return folder if (folder / "config.json").is_file() else None
    try:
        path = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name of the hub, such as a path that does not exist
        return None
    return Path(path).parent if isinstance(path, str) else None


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ParseError) as error:
        raise EstimateError(f"{path} cannot be read: {error}; add --width, such as --width 768") from None


def _width(config: dict[str, Any]) -> int | None:
    config = config.get("text_config", config)
    return next((config[key] for key in ("hidden_size", "n_embd", "d_model") if key in config), None)


def _block(hook: str) -> int | None:
    """The number of the block that a hook is in; None when its name has no number."""
    return next((int(part) for part in hook.split(".") if part.isdigit()), None)


def blocks_parameters(folder: Path, blocks: list[int | None]) -> float | None:
    """Weights of the matrices in all blocks up to the last of `blocks`, from the headers of the folder's files."""
    numbers = [block for block in blocks if block is not None]
    total = 0.0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                block, shape = _block(name), file.get_slice(name).get_shape()
                if block is not None and len(shape) == 2 and numbers and block <= max(numbers):
                    total += math.prod(shape)
    return total or None


def training_threads(settings: TrainerSettings) -> int:
    """CPU threads of a step: those of one SAE times the SAEs that are trained at the same time."""
    cores, count = os.cpu_count() or 1, len(settings.sae)
    threads = min(cores, settings.run.threads or max(1, cores // count))
    return min(cores, threads * min(count, cores // threads))
