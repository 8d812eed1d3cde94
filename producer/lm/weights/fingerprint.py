"""The fingerprint of a model: a hash of its configuration and of some numbers of every weight, loaded or not.

Numbers of what is not loaded are read from the files. Where a tensor there is not what the model has (transformers
merges experts), or the files are of another kind, the part that it belongs to is loaded for a moment, one after the
other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from producer.lm.weights.layout import ModelLayout, all_parts
from producer.lm.weights.partial import free, is_within
from producer.lm.weights.stored import StoredWeights, sample_of

LoadPart = Callable[[str], Any]
"""Loads the model with nothing but the module at a path."""


def fingerprint(config: Any, samples: dict[str, Tensor], random_parameters: Collection[str]) -> str:
    """The hash, so that each fine-tuned copy has its own; `samples` are of every parameter, in the model's order.

    Parameters that the checkpoint does not hold are others each time, and do not count.
    """
    volatile = ("_name_or_path", "transformers_version", "dtype", "use_cache")
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in volatile}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, sample in samples.items():
        if name not in random_parameters:
            digest.update(name.encode() + sample.float().numpy().tobytes())
    return digest.hexdigest()


def loaded_samples(network: Any) -> dict[str, Tensor]:
    """Numbers of every parameter in memory, by name; weights that stay on disk are not."""
    return {name: sample_of(weight) for name, weight in network.named_parameters() if not weight.is_meta}


def all_samples(
    loaded: dict[str, Tensor], layout: ModelLayout, stored: StoredWeights | None, load_part: LoadPart
) -> dict[str, Tensor]:
    """Numbers of every parameter that the checkpoint holds or is in memory, in the order of the whole model, by name.

    `loaded` are those in memory.
    """
    samples: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, weight in layout.network.named_parameters():
        if name in loaded:
            samples[name] = loaded[name]
        elif stored is not None and name in stored.tensors:
            samples[name] = stored.tensors[name].sample().to(weight.dtype)
        elif stored is None or name in stored.names:
            part = next(path for path in all_parts(layout) if is_within(name, [path]))
            if part not in parts:
                network = load_part(part)
                parts = {part: loaded_samples(network)}
                free(network)
            samples[name] = parts[part][name]
    return samples
