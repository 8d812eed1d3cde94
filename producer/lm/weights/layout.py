"""The structure of a model, from its configuration alone, and the parts of it that hooks need.

The model is built on torch's meta device: its modules have names and shapes, and no numbers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

EMBED = "hook_embed"


@dataclass(frozen=True, eq=False)
class ModelLayout:
    """Where the blocks of a model are, and what surrounds them."""

    network: Any
    """The whole model, on the meta device."""
    decoder_path: str
    blocks_path: str
    layers: int
    head_path: str | None
    """Path of a head whose weights are its own, and not those of the embedding."""
    tower_paths: tuple[str, ...]
    """Models of images or sound beside the decoder."""


@dataclass(frozen=True)
class Parts:
    """What is loaded of a model."""

    layers: int
    """The first so many blocks."""
    omitted: tuple[str, ...] = ()
    """Paths of the modules whose weights are left out."""


def read_layout(auto_class: Any, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> ModelLayout | None:
    """The layout of the model that `auto_class` builds; None where its blocks are not in one list.

    The list is known by its length here. `producer.lm.blocks` tests by experiment that it is a chain.
    """
    with torch.device("meta"):
        network = auto_class.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code)
    layers = config.get_text_config().num_hidden_layers
    for decoder in (network.get_decoder(), network.base_model):
        for module in decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == layers:
                paths = {module: path for path, module in network.named_modules()}
                return ModelLayout(
                    network, paths[decoder], paths[module], layers, _own_head(network, paths), _towers(paths, decoder)
                )
    return None


def needed_parts(layout: ModelLayout, hooks: Sequence[str]) -> Parts:
    """What runs up to the last of `hooks`, and at least one block. A name that fits no module needs nothing."""
    layers = max(1, *(_layers_before(layout, name) for name in hooks))
    omitted = [f"{layout.blocks_path}.{layer}" for layer in range(layers, layout.layers)]
    return Parts(layers, (*omitted, *([layout.head_path] if layout.head_path else []), *layout.tower_paths))


def all_parts(layout: ModelLayout) -> tuple[str, ...]:
    """Paths of the parts that can be loaded one by one."""
    blocks = [f"{layout.blocks_path}.{layer}" for layer in range(layout.layers)]
    return (*blocks, *([layout.head_path] if layout.head_path else []), *layout.tower_paths)


def _layers_before(layout: ModelLayout, name: str) -> int:
    """Blocks that run before the activation of a hook is there; all of them for a place that is not known."""
    if name == EMBED:
        return 0
    if match := re.match(r"blocks\.(\d+)\.", name):
        layer = int(match[1])
        return 0 if layer >= layout.layers else layer if name.endswith(".hook_resid_pre") else layer + 1
    path = re.sub(r"(\[\d+\]|:\w+)$", "", name)
    paths = {path for path, _ in layout.network.named_modules() if path}
    path = next((one for one in (path, f"{layout.decoder_path}.{path}") if one in paths), "")
    if match := re.match(re.escape(layout.blocks_path) + r"\.(\d+)(\.|$)", path):
        is_block_input = match.end() == len(path) and not match[2] and name.endswith(":input")
        return int(match[1]) + (0 if is_block_input else 1)
    if not path and name != "ln_final.hook_normalized":
        return 0
    is_embedding = bool(path) and layout.network.get_submodule(path) is layout.network.get_input_embeddings()
    return 0 if is_embedding else layout.layers


def _own_head(network: Any, paths: dict[nn.Module, str]) -> str | None:
    """The path of a head that shares no weight with the rest of the model."""
    head = network.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    others = {id(weight) for module in paths if module is not head for weight in module.parameters(recurse=False)}
    return None if any(id(weight) in others for weight in head.parameters()) else paths[head]


def _towers(paths: dict[nn.Module, str], decoder: nn.Module) -> tuple[str, ...]:
    """The outermost models of transformers that neither hold the decoder nor lie in it."""
    inside = set(decoder.modules())
    towers: list[str] = []
    for module, path in paths.items():
        is_tower = isinstance(module, transformers.PreTrainedModel) and module not in inside
        if is_tower and decoder not in set(module.modules()) and not path.startswith(tuple(f"{t}." for t in towers)):
            towers.append(path)
    return tuple(towers)
