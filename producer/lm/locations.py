"""The module that each hook of the settings refers to.

`blocks.N.hook_resid_pre` and `hook_resid_post` are the input and output of block N. `hook_resid_mid` and
`hook_mlp_out` are located by experiment (producer.lm.anatomy). Any other name is the path of a module, whose output is
hooked.
"""

from __future__ import annotations

import difflib
import re
from functools import cache

from torch import Tensor

from producer.lm.anatomy import BlockParts, find_parts, missing_part_message, record_call
from producer.lm.blocks import BlockChain
from producer.lm.errors import ModelError, non_finite_hook_message
from producer.lm.hooks import HookLocation
from producer.lm.pretrained import PretrainedModel

KINDS = ("resid_pre", "resid_mid", "resid_post", "mlp_out")


def locate_hooks(pretrained: PretrainedModel, chain: BlockChain, probe: Tensor) -> list[HookLocation]:
    """The location of each hook of the settings. Raises ModelError with one line per hook that has none."""

    @cache
    def parts(layer: int) -> BlockParts | None:
        return _block_parts(pretrained, chain, layer, probe)

    def locate(name: str) -> HookLocation:
        kind, layer = _parse(name)
        if kind is None:
            return _locate_module(pretrained, chain, name)
        if layer >= chain.layers:
            raise ModelError(
                f"model.hooks = {name!r}: {pretrained.settings.name} has {chain.layers} blocks; "
                f"expected blocks.0 to blocks.{chain.layers - 1}"
            )
        block, path = chain.blocks[layer], f"{chain.blocks_path}.{layer}"
        if kind in ("resid_pre", "resid_post"):
            return HookLocation(block, path, "input" if kind == "resid_pre" else "output")
        block_parts = parts(layer)
        if block_parts is None:
            raise ModelError(non_finite_hook_message(name, pretrained.settings.name, pretrained.dtype))
        location = getattr(block_parts, kind)
        if location is None:
            raise ModelError(f"model.hooks = {name!r}: {missing_part_message(block_parts, block, path)}")
        return location

    locations, faults = [], []
    for name in pretrained.settings.hooks:
        try:
            locations.append(locate(name))
        except ModelError as error:
            faults.append(str(error))
    if faults:
        raise ModelError("\n".join(faults))
    return locations


def _block_parts(pretrained: PretrainedModel, chain: BlockChain, layer: int, probe: Tensor) -> BlockParts | None:
    """The parts of one block; None when its output is not finite, so that no sum can be compared."""
    call = record_call(pretrained.network, chain.blocks[layer], f"{chain.blocks_path}.{layer}", probe)
    return find_parts(call) if call.repeat(call.input).isfinite().all() else None


def _parse(name: str) -> tuple[str | None, int]:
    """(kind, layer) of a TransformerLens name; the kind is None for a module path."""
    match = re.fullmatch(rf"blocks\.(\d+)\.hook_({'|'.join(KINDS)})", name)
    return (match[2], int(match[1])) if match else (None, 0)


def _locate_module(pretrained: PretrainedModel, chain: BlockChain, name: str) -> HookLocation:
    """The output of the module at path `name`, counted from the whole model or from its decoder."""
    modules = dict(pretrained.network.named_modules())
    decoder_name = f"{chain.decoder_path}.{name}" if chain.decoder_path else name
    path = next((path for path in (name, decoder_name) if path and path in modules), None)
    if path is None:
        raise ModelError(_unknown_hook_message(pretrained, chain, name, [path for path in modules if path]))
    if not any(module is modules[path] for module in chain.decoder.modules()):
        raise ModelError(
            f"model.hooks = {name!r}: this module is not part of {chain.decoder_path}, which holds the blocks; "
            f"hook a block, such as {chain.first_path}, or a module inside one"
        )
    return HookLocation(modules[path], path)


def _unknown_hook_message(pretrained: PretrainedModel, chain: BlockChain, name: str, paths: list[str]) -> str:
    names = [f"blocks.{layer}.hook_{kind}" for layer in range(chain.layers) for kind in KINDS]
    matches = difflib.get_close_matches(name, names + paths, n=1)
    hint = f" (did you mean {matches[0]}?)" if matches else ""
    return (
        f"model.hooks = {name!r}: {pretrained.settings.name} has no such hook{hint}; expected "
        f"blocks.N.hook_{{{','.join(KINDS)}}} with N from 0 to {chain.layers - 1}, or a module path such as "
        f"{chain.first_path}, inside which there are {', '.join(chain.first_children)}"
    )
