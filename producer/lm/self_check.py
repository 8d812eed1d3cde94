"""The model checked against itself: the whole model's activations beside the cut model's, causality, padding.

`hidden_states[-1]` of transformers is *after* the final norm, so it is never compared with the last block. Whether a
model is causal is measured, not read from its class or configuration: the activations of the first half of a window
must not change with the tokens of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from producer.lm.blocks import BlockChain
from producer.lm.errors import ModelError, non_finite_hook_message
from producer.lm.hooks import HookLocation, HookPoint, attach, hook_names, module_input
from producer.lm.network import HookedNetwork
from producer.lm.pretrained import PretrainedModel

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference from the whole model's activation, relative to its size plus its rms over channels. Usually it is
0. The rms is that of each position: beside a massive BOS, noise as large as other activations would pass."""


@dataclass(frozen=True, eq=False)
class Observation:
    """The activations of one location in one pass of the whole model; one entry for each time the module ran."""

    depths: tuple[int, ...]
    """Blocks that had started by then."""
    activations: tuple[Any, ...]
    reference: Tensor | None
    """The entry of transformers' `hidden_states` for this location, where there is one."""


@dataclass(frozen=True)
class SelfCheck:
    """The hooked, cut model against the whole model's own activations, on the probe."""

    max_difference: float
    """Largest absolute difference over all hooks."""
    scale: float
    """Root mean square of the activations compared."""
    compared: tuple[str, ...]
    """Names of the hooks compared."""
    passed: bool


def survey(network: Any, chain: BlockChain, locations: Sequence[HookLocation], ids: Tensor) -> list[Observation]:
    """An observation of each location, from one pass of the whole model over `ids` [windows, context]."""
    block_inputs: list[Tensor] = []
    records: list[list[tuple[int, Any]]] = [[] for _ in locations]

    def record_block(module: nn.Module, args: tuple, kwargs: dict) -> None:
        block_inputs.append(module_input(args, kwargs).clone())

    def record(index: int, x: Any) -> None:
        records[index].append((len(block_inputs), x.clone() if isinstance(x, Tensor) else x))

    with ExitStack() as handles:
        for block in chain.blocks:
            handles.callback(block.register_forward_pre_hook(record_block, with_kwargs=True).remove)
        for index, location in enumerate(locations):
            handles.enter_context(attach(location, partial(record, index)))
        output = network(input_ids=ids, output_hidden_states=True)
    states = getattr(output, "hidden_states", None) or ()
    if not states or not torch.equal(states[0].to(block_inputs[0].device), block_inputs[0]):
        states = ()  # Mamba and RWKV number theirs from the first block's output
    return [
        Observation(
            tuple(depth for depth, _ in entries), tuple(x for _, x in entries), _reference(chain, location, states)
        )
        for location, entries in zip(locations, records, strict=True)
    ]


def hook_points(
    pretrained: PretrainedModel,
    chain: BlockChain,
    locations: Sequence[HookLocation],
    observations: Sequence[Observation],
    probe: Tensor,
) -> list[HookPoint]:
    """The public description of each location.

    Raises ModelError with one line for each location that does not show one activation per token of the probe, and
    then for each whose activations are not finite.
    """
    hooks, faults = [], []
    for name, location, observation in zip(pretrained.settings.hooks, locations, observations, strict=True):
        block = chain.index(location.module)
        if fault := _fault(observation, probe):
            if block is None:
                advice = f"hook a block, such as {chain.first_path}"
            else:
                example = ".".join([chain.first_path, *chain.first_children[:1]])
                advice = f"hook a module inside a block, such as {example}"
            faults.append(f"model.hooks = {name!r}: {fault}; {advice}")
            continue
        layer = observation.depths[0] - (0 if block is not None and location.side == "input" else 1)
        width = observation.activations[0].numel() // probe.numel()
        path = location.path.removeprefix(pretrained.own_prefix)
        hooks.append(HookPoint(name, path, max(0, layer), width, location.side, location.element, location.channels))
    faults = faults or [
        non_finite_hook_message(hook.name, pretrained.settings.name, pretrained.dtype)
        for hook, observation in zip(hooks, observations, strict=True)
        if not observation.activations[0].isfinite().all()
    ]
    if faults:
        raise ModelError("\n".join(faults))
    return hooks


def sees_ahead(
    pretrained: PretrainedModel,
    chain: BlockChain,
    locations: Sequence[HookLocation],
    observations: Sequence[Observation],
    probe: Tensor,
) -> bool:
    """Whether the activations of half a window depend on the tokens after it, at any of the locations.

    `observations` are those with the probe. The two windows of the probe exchange their second halves. Where experts
    share a product with other tokens its last bits may change; what attention contributes is far more than TOLERANCE.
    """
    half = probe.shape[1] // 2
    exchanged_ids = torch.cat([probe[:, :half], probe.flip(0)[:, half:]], 1)
    exchanged_observations = survey(pretrained.network, chain, locations, exchanged_ids)
    for before, after in zip(observations, exchanged_observations, strict=True):
        if _fault(before, probe) or _fault(after, probe):
            continue
        x, y = (one.activations[0].reshape(*probe.shape, -1)[:, :half] for one in (before, after))
        if _differs(x, y, pretrained.dtype):
            return True
    return False


def masks_padding(network: HookedNetwork, probe: Tensor) -> bool:
    """Whether an attention mask keeps padding from the activations of the text before it."""
    half = probe.shape[1] // 2
    padding = torch.zeros_like(probe, dtype=torch.bool)
    padding[:, half:] = True
    try:
        padded_activations = network.activations(probe, padding)
    except (TypeError, ValueError):  # it takes no mask
        return False
    return not any(
        _differs(x, y[:, :half], network.dtype)
        for x, y in zip(network.activations(probe[:, :half]), padded_activations, strict=True)
    )


def compare(
    hooks: Sequence[HookPoint], activations: list[Tensor], observations: Sequence[Observation], dtype: torch.dtype
) -> SelfCheck:
    """Compares the cut model's activations with the whole model's. Raises ModelError if they differ."""
    squares, elements, max_difference, passed = 0.0, 0, 0.0, True
    for x, observation in zip(activations, observations, strict=True):
        reference = observation.activations[0] if observation.reference is None else observation.reference
        reference = reference.reshape(x.shape).to(x.device).float()
        difference = (x.float() - reference).abs()
        squares, elements = squares + reference.square().sum().item(), elements + reference.numel()
        bound = TOLERANCE[dtype] * (reference.abs() + reference.square().mean(-1, keepdim=True).sqrt())
        max_difference = max(max_difference, difference.max().item())
        passed = passed and bool((difference <= bound).all())
    check = SelfCheck(max_difference, (squares / elements) ** 0.5, tuple(hook.name for hook in hooks), passed)
    if not passed:
        raise ModelError(
            f"self-check failed: the model cut after its last hook differs from the whole model by up to "
            f"{max_difference:.3g} where activations have an rms of {check.scale:.3g} (hooks {hook_names(hooks)}); its "
            "early layers depend on its later ones, or a hook is not where it seems: hook another place, or report "
            "this with the model's name"
        )
    return check


def _reference(chain: BlockChain, location: HookLocation, states: Sequence[Tensor]) -> Tensor | None:
    """The entry of `hidden_states` that should equal this location: none after the last block, where it is normed."""
    layer = chain.index(location.module)
    if layer is None or len(states) != chain.layers + 1:
        return None
    entry = layer if location.side == "input" else layer + 1
    return states[entry] if entry < chain.layers else None


def _fault(observation: Observation, ids: Tensor) -> str | None:
    """Why an observation is not one activation for each token of `ids`; None when it is."""
    if len(observation.activations) != 1:
        return f"this module runs {len(observation.activations)} times in one pass, and a hook needs exactly one"
    x = observation.activations[0]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return f"this module returns {type(x).__name__}, not activations"
    if x.ndim == 4 and x.shape[1:3] == ids.shape:
        return (
            f"this module gives {len(x)} versions of each activation (AltUp), shape {list(x.shape)}, and none is the "
            "residual stream"
        )
    shape = [size for size in x.shape[:-1] if size != 1]  # DeepSeek's keys and values come as [windows, 1, context, …]
    if shape not in ([size for size in ids.shape if size != 1], [ids.numel()]):
        return f"this module gives shape {list(x.shape)} for {ids.numel()} tokens, not one activation for each token"
    return None


def _differs(x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    """Whether x and y differ by more, in their rms, than products of other sizes round differently in `dtype`."""
    x, y = x.float(), y.to(x.device).float()
    return bool((x - y).square().mean().sqrt() > TOLERANCE[dtype] * x.square().mean().sqrt())
