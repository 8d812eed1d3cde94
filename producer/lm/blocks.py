"""The chain of blocks inside a model, and the cut after the last block that a hook needs.

The blocks are the first `nn.ModuleList` of the decoder that is as long as the model has layers and in which the input
of each block is the output of the one before.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from producer.lm.errors import NoBlocksError
from producer.lm.hooks import HookLocation, module_input, module_output
from producer.lm.limits import probe_ids
from producer.lm.pretrained import PretrainedModel


@dataclass(frozen=True, eq=False)
class BlockChain:
    """The blocks of a model, and the part of the model that runs them."""

    decoder: Any
    """The smallest transformers model around the blocks: no head."""
    decoder_path: str
    """Path of `decoder` in the whole model; empty when it is the whole model."""
    blocks: nn.ModuleList
    blocks_path: str
    layers: int
    """Blocks of the model on disk; the cut leaves fewer in `blocks`."""

    @property
    def first_path(self) -> str:
        """Path of the first block."""
        return f"{self.blocks_path}.0"

    @property
    def first_children(self) -> list[str]:
        """Names of the modules directly inside the first block."""
        return [name for name, _ in self.blocks[0].named_children()]

    def index(self, module: nn.Module) -> int | None:
        """The layer whose block `module` is; None when it is no block."""
        return next((layer for layer, block in enumerate(self.blocks) if block is module), None)


def find_blocks(pretrained: PretrainedModel) -> BlockChain:
    """The chain of blocks, in the decoder or the base model. Raises NoBlocksError for a model without one."""
    network = pretrained.network
    layers = network.config.get_text_config().num_hidden_layers
    for decoder in (network.get_decoder(), network.base_model):
        for module in decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == layers and _is_chain(pretrained, module):
                paths = {module: path for path, module in network.named_modules()}
                return BlockChain(decoder, paths[decoder], module, paths[module], layers)
    raise NoBlocksError(
        f"model.name = {pretrained.settings.name!r}: {type(network).__name__} holds no chain of {layers} blocks to "
        "hook (models that share one block between layers, such as ALBERT, have none); use another model"
    )


def cut_after(network: nn.Module, chain: BlockChain, layers_needed: int, locations: Sequence[HookLocation]) -> None:
    """Frees the blocks after the first `layers_needed` and everything around the decoder, in place.

    A block after those whose input is hooked stays, without parts and parameters, to be called with that input.
    """
    modules = list(network.modules())
    next_block = chain.blocks[layers_needed] if layers_needed < chain.layers else None
    if next_block is not None and any(location.module is next_block for location in locations):
        next_block._modules.clear()
        next_block._parameters.clear()
        layers_needed += 1
    del chain.blocks[layers_needed:]
    remaining_modules = set(chain.decoder.modules())
    for module in modules:
        if module not in remaining_modules:
            module._parameters.clear()  # freed at once, and not when the garbage collector comes by


def _is_chain(pretrained: PretrainedModel, blocks: nn.ModuleList) -> bool:
    """Whether the input of each block is the output of the one before; XLM's list of attentions is not such a chain."""
    calls: list[tuple[Any, Any]] = []

    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calls.append((module_input(args, kwargs), module_output(output)))

    with ExitStack() as handles:
        for block in blocks:
            handles.callback(block.register_forward_hook(record, with_kwargs=True).remove)
        pretrained.network(input_ids=probe_ids(pretrained.network, pretrained.device))
    pairs = itertools.pairwise(calls)
    return len(calls) == len(blocks) and all(y is x or _is_equal(y, x) for (_, y), (x, _) in pairs)


def _is_equal(y: Any, x: Any) -> bool:
    """Equality in which NaN equals NaN: a model that overflows is refused for that, not for having no blocks."""
    if not isinstance(y, Tensor) or not isinstance(x, Tensor) or y.shape != x.shape:
        return False
    return torch.allclose(y.to(x.device), x, rtol=0, atol=0, equal_nan=True)
