"""The module that each hook of the settings refers to.

    hook_embed                                      output of the embedding of tokens
    blocks.N.hook_resid_pre, blocks.N.hook_resid_post   input and output of block N
    blocks.N.hook_attn_out, hook_resid_mid, hook_mlp_in, hook_mlp_out, blocks.N.mlp.hook_post
                                                    located by experiment (producer.lm.anatomy)
    blocks.N.attn.hook_q, hook_k, hook_v, hook_z    located by experiment (producer.lm.attention); hook_z[3] is one head
    ln_final.hook_normalized                        output of the norm after the last block, with its gain and bias
    PATH, PATH[1], PATH:input                       output of a module, one element of it, or its input

The names are TransformerLens'. Its own hook_mlp_in stands before the norm, where hook_resid_mid is.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import get_args

import torch
from torch import Tensor, nn

from producer.lm.anatomy import BlockCall, BlockParts, find_parts, missing_part_message, record_call
from producer.lm.attention import AttentionParts, find_attention, missing_attention_message
from producer.lm.blocks import BlockChain
from producer.lm.errors import ModelError, non_finite_hook_message
from producer.lm.hooks import HookLocation, Side, module_input, module_output
from producer.lm.pretrained import PretrainedModel

STREAM_KINDS = ("hook_resid_pre", "hook_resid_post")
PART_KINDS = {
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_in": "mlp_in",
    "mlp.hook_post": "mlp_post",
    "hook_mlp_out": "mlp_out",
}
"""Kinds of hooks that are fields of BlockParts."""
HEAD_KINDS = {f"attn.hook_{part}": part for part in ("q", "k", "v", "z")}
"""Kinds of hooks that are fields of AttentionParts."""
BLOCK_KINDS = (*STREAM_KINDS, *PART_KINDS, *HEAD_KINDS)
EMBED, FINAL_NORM = "hook_embed", "ln_final.hook_normalized"
SIMILAR = 0.9
"""How like a name must be to one that exists to be taken for it, of 1."""


def locate_hooks(pretrained: PretrainedModel, chain: BlockChain, probe: Tensor) -> list[HookLocation]:
    """The location of each hook of the settings. Raises ModelError with one line per hook that has none."""
    locator = _Locator(pretrained, chain, probe)
    locations, faults = [], []
    for name in pretrained.settings.hooks:
        try:
            locations.append(locator.locate(name))
        except ModelError as error:
            faults.append(str(error))
    if faults:
        raise ModelError("\n".join(faults))
    return locations


class _Locator:
    """Finds locations in one model; what it learns about a block serves all hooks there."""

    def __init__(self, pretrained: PretrainedModel, chain: BlockChain, probe: Tensor) -> None:
        self._pretrained = pretrained
        self._chain = chain
        self._probe = probe
        self._call = cache(self._record_call)
        self._parts = cache(lambda layer: find_parts(self._call(layer)))
        self._attention = cache(self._find_attention)

    def locate(self, name: str) -> HookLocation:
        """The location of one hook. Raises ModelError."""
        if name == EMBED:
            return self._module(name, self._pretrained.network.get_input_embeddings())
        if name == FINAL_NORM:
            return self._final_norm(name)
        kinds = "|".join(map(re.escape, BLOCK_KINDS))
        match = re.fullmatch(rf"blocks\.(\d+)\.({kinds})(?:\[(\d+)\])?", name)
        if match is None or (match[3] and match[2] not in HEAD_KINDS):
            return self._at_path(name)
        layer, kind, head = int(match[1]), match[2], match[3]
        chain = self._chain
        if layer >= chain.layers:
            raise self._error(
                name,
                f"{self._pretrained.settings.name} has {chain.layers} blocks; "
                f"expected blocks.0 to blocks.{chain.layers - 1}",
            )
        block, path = chain.blocks[layer], f"{chain.blocks_path}.{layer}"
        if kind in STREAM_KINDS:
            return HookLocation(block, path, "input" if kind == "hook_resid_pre" else "output")
        if not self._is_finite(layer):
            raise ModelError(non_finite_hook_message(name, self._pretrained.settings.name, self._pretrained.dtype))
        if kind in HEAD_KINDS:
            return self._of_attention(name, layer, HEAD_KINDS[kind], None if head is None else int(head))
        parts: BlockParts = self._parts(layer)
        location = getattr(parts, PART_KINDS[kind])
        if location is None:
            raise self._error(name, missing_part_message(PART_KINDS[kind], parts, block, path))
        return location

    def _of_attention(self, name: str, layer: int, part: str, head: int | None) -> HookLocation:
        parts: AttentionParts = self._attention(layer)
        heads = getattr(parts, part)
        if heads is None:
            block, path = self._chain.blocks[layer], f"{self._chain.blocks_path}.{layer}"
            raise self._error(name, missing_attention_message(f"hook_{part}", parts, block, path))
        if head is None:
            return heads.location
        if heads.count == 0:
            raise self._error(name, "its heads do not lie one after the other; leave out the number of the head")
        if head >= heads.count:
            raise self._error(name, f"there are {heads.count} heads; expected [0] to [{heads.count - 1}]")
        return heads.head(head)

    def _record_call(self, layer: int) -> BlockCall:
        chain = self._chain
        return record_call(self._pretrained.network, chain.blocks[layer], f"{chain.blocks_path}.{layer}", self._probe)

    def _is_finite(self, layer: int) -> bool:
        """Whether sums can be compared in this block."""
        call = self._call(layer)
        return bool(call.repeat(call.input).isfinite().all())

    def _find_attention(self, layer: int) -> AttentionParts:
        return find_attention(self._call(layer), self._chain.decoder.config.get_text_config())

    def _final_norm(self, name: str) -> HookLocation:
        """The output of the module that the last block's goes to, if that has one gain per channel.

        OLMo's has none: it is known by its output, which is the decoder's.
        """
        network, last, decoder = self._pretrained.network, self._chain.blocks[-1], self._chain.decoder
        outputs: dict[nn.Module, Tensor] = {}
        inputs: dict[nn.Module, Tensor] = {}

        def record(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            x, y = module_input(args, kwargs), getattr(output, "last_hidden_state", module_output(output))
            if isinstance(x, Tensor) and isinstance(y, Tensor):
                inputs[module], outputs[module] = x.clone(), y.clone()

        norms = [module for module in decoder.modules() if not list(module.children())]
        handles = [module.register_forward_hook(record, with_kwargs=True) for module in (*norms, last, decoder)]
        try:
            network(input_ids=self._probe)
        finally:
            for handle in handles:
                handle.remove()
        stream = outputs[last]
        for module in norms:
            gain, x = getattr(module, "weight", None), inputs.get(module)
            if x is None or x.shape != stream.shape or not torch.equal(x, stream):
                continue
            y, result = outputs[module], outputs.get(decoder, stream)
            is_result = y.shape == result.shape and torch.equal(y, result) and not torch.equal(y, x)
            if is_result or (isinstance(gain, Tensor) and gain.shape == stream.shape[-1:]):
                return self._module(name, module)
        raise self._error(
            name,
            f"{type(network).__name__} has no norm after its last block; use blocks.{self._chain.layers - 1}."
            "hook_resid_post",
        )

    def _module(self, name: str, module: nn.Module) -> HookLocation:
        """The output of a module of the decoder."""
        path = next((path for path, one in self._pretrained.network.named_modules() if one is module), None)
        if path is None or not any(one is module for one in self._chain.decoder.modules()):
            raise self._error(name, f"it is not part of {self._chain.decoder_path}, which holds the blocks")
        return HookLocation(module, path)

    def _at_path(self, name: str) -> HookLocation:
        """A tensor of the module at a path that is counted from the whole model or from its decoder."""
        chain = self._chain
        modules = dict(self._pretrained.network.named_modules())
        module_name, side, element = _parse_path(name)
        decoder_name = f"{chain.decoder_path}.{module_name}" if chain.decoder_path else module_name
        path = next((path for path in (module_name, decoder_name) if path and path in modules), None)
        if path is None:
            raise ModelError(_unknown_hook_message(self._pretrained, chain, name, [path for path in modules if path]))
        if not any(module is modules[path] for module in chain.decoder.modules()):
            raise self._error(
                name,
                f"this module is not part of {chain.decoder_path}, which holds the blocks; "
                f"hook a block, such as {chain.first_path}, or a module inside one",
            )
        return HookLocation(modules[path], path, side, element=element)

    @staticmethod
    def _error(name: str, reason: str) -> ModelError:
        return ModelError(f"model.hooks = {name!r}: {reason}")


def _parse_path(name: str) -> tuple[str, Side, int]:
    """(module, side, element) of `PATH`, `PATH:input`, `PATH:output` or `PATH[1]`."""
    match = re.fullmatch(rf"(.*?)(?:\[(\d+)\]|:({'|'.join(get_args(Side))}))?", name)
    assert match is not None
    return match[1], "input" if match[3] == "input" else "output", int(match[2] or 0)


def _unknown_hook_message(pretrained: PretrainedModel, chain: BlockChain, name: str, paths: list[str]) -> str:
    names = [f"blocks.{layer}.{kind}" for layer in range(chain.layers) for kind in BLOCK_KINDS]
    matches = difflib.get_close_matches(name, [*names, EMBED, FINAL_NORM, *paths], n=1, cutoff=SIMILAR)
    hint = f" (did you mean {matches[0]}?)" if matches else ""
    hooks = [kind.removeprefix("hook_") for kind in BLOCK_KINDS if kind.startswith("hook_")]
    return (
        f"model.hooks = {name!r}: {pretrained.settings.name} has no such hook{hint}; expected "
        f"blocks.N.hook_{{{','.join(hooks)}}}, blocks.N.mlp.hook_post, "
        f"blocks.N.attn.hook_{{{','.join(HEAD_KINDS.values())}}} (one head: hook_z[0]) with N from 0 to "
        f"{chain.layers - 1}, {EMBED}, {FINAL_NORM}, or a module path such as {chain.first_path}, inside which there "
        f"are {', '.join(chain.first_children)}; PATH:input is its input, PATH[1] an element of its output"
    )
