"""The parts of one block that read and write the residual stream, located by experiment.

    attn_out   what attention adds to the residual stream
    resid_mid  the residual stream between attention and MLP
    mlp_in     what the MLP reads: resid_mid after the norm
    mlp_post   the MLP's hidden layer after its nonlinearity: the input of its last projection
    mlp_out    what the MLP adds to the residual stream

A probe runs through the block, and those submodules are taken for which resid_pre + attn_out is resid_mid and
resid_mid + mlp_out is resid_post, also when attn_out or resid_mid is replaced during the call. That covers OPT's fc2,
Gemma's norm after the MLP and Bloom's MLP that adds the residual itself. mlp_in and mlp_post are what all of mlp_out
goes through: with zeros there, mlp_out is the same for every token. A block that runs attention and MLP in parallel
(Pythia) has no resid_mid; one that normalises after the addition (BERT) or scales the sum has mlp_post alone.
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from producer.lm.hooks import HookLocation, Side, StopForward, attach, module_input, module_output, with_input


@dataclass(frozen=True)
class BlockParts:
    """The locations inside one block that hooks have names for; None for what the block does not have."""

    attn_out: HookLocation | None = None
    resid_mid: HookLocation | None = None
    mlp_in: HookLocation | None = None
    mlp_post: HookLocation | None = None
    mlp_out: HookLocation | None = None
    has_versions: bool = False
    """The residual stream is several tensors in one, as in Gemma 3n."""


@dataclass(frozen=True, eq=False)
class BlockCall:
    """One call of one block, which can be repeated with other hidden states."""

    block: nn.Module
    path: str
    args: tuple
    kwargs: dict

    @property
    def input(self) -> Tensor:
        """A copy of the hidden states [windows, context, width] of the call."""
        return module_input(self.args, self.kwargs).clone()

    def repeat(self, x: Tensor) -> Tensor:
        """The block's output for hidden states `x`, all other arguments being those of the call."""
        args, kwargs = with_input(self.args, self.kwargs, x)
        return module_output(self.block(*args, **kwargs)).clone()

    def location(self, path: str, side: Side, in_place: bool = False) -> HookLocation:
        """The location at the submodule that has `path` inside the block."""
        return HookLocation(self.block.get_submodule(path), f"{self.path}.{path}", side, in_place)


@dataclass
class _SubmoduleCall:
    """The input and output of one submodule during a call of its block.

    `start` and `end` number the events of that call. Values that do not have the block's shape are None.
    """

    path: str
    start: int
    end: int = -1
    count: int = 0
    input: Tensor | None = None
    output: Tensor | None = None


def record_call(network: Any, block: nn.Module, path: str, ids: Tensor) -> BlockCall:
    """The call of `block` in a pass of the whole model over `ids` [windows, context]; the pass ends there."""
    calls: list[BlockCall] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append(BlockCall(block, path, args, kwargs))
        raise StopForward

    handle = block.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with suppress(StopForward):
            network(input_ids=ids)
    finally:
        handle.remove()
    return calls[0]


def find_parts(call: BlockCall) -> BlockParts:
    """The parts of a block: sequential blocks have all, parallel ones no resid_mid, others none."""
    x = call.input
    if x.ndim > 3:
        return BlockParts(has_versions=True)
    output, submodules = _trace(call, x.clone())
    parts = _find_sequential(call, x, output, submodules) or _find_parallel(call, x, output, submodules)
    return parts or BlockParts(mlp_post=_find_nonlinearity(call, submodules))


def missing_part_message(kind: str, parts: BlockParts, block: nn.Module, path: str) -> str:
    """The sentence that says why a block lacks one of the parts, and what to hook instead."""
    name, children = type(block).__name__, ", ".join(f"{path}.{name}" for name, _ in block.named_children())
    if parts.has_versions:
        return (
            f"{name} carries several versions of the residual stream side by side (AltUp), so {kind} is not defined; "
            f"use a module path inside the block: {children}"
        )
    if parts.mlp_out is None:
        return (
            f"{name} does not return resid_mid + mlp_out (post-norm blocks such as BERT's normalise that "
            f"sum, others scale it), so {kind} is not defined; use hook_resid_pre, hook_resid_post or a module path: "
            f"{children}"
        )
    if kind == "resid_mid":
        return (
            f"{name} runs attention and MLP in parallel on the same input, so there is no residual "
            "stream between them; use hook_resid_pre, hook_resid_post or hook_mlp_out"
        )
    if kind == "attn_out":
        return f"no module of {name} gives what attention adds to the residual stream; use a module path: {children}"
    what = "the input" if kind == "mlp_in" else "one hidden layer"
    return (
        f"not all that the MLP of {name} adds goes through {what} of one module (mixtures of experts have a hidden "
        f"layer for each expert); use hook_mlp_out or a module path: {children}"
    )


def projections(block: nn.Module) -> dict[str, nn.Module]:
    """The modules of a block that multiply by one matrix, by path; embeddings are none."""
    return {
        path: module
        for path, module in block.named_modules()
        if not list(module.children())
        and not isinstance(module, nn.Embedding)
        and isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.ndim == 2
    }


def _find_sequential(call: BlockCall, x: Tensor, output: Tensor, submodules: list[_SubmoduleCall]) -> BlockParts | None:
    """The first input and the first later output whose sum the block returns are resid_mid and mlp_out.

    resid_mid must itself be x plus one submodule's output, or the last of three additions would pass (Gemma 4 adds
    its per-layer embedding after the MLP).
    """
    for norm, mlp in itertools.product(submodules, submodules):
        if norm.start >= mlp.end or norm.input is None or mlp.output is None or torch.equal(norm.input, x):
            continue
        if not _is_sum(output, norm.input, mlp.output):
            continue
        resid_mid = call.location(norm.path, "input", in_place=True)
        mlp_out = call.location(mlp.path, "output")
        attentions = [
            call.location(attention.path, "output")
            for attention in submodules
            if attention.output is not None and _is_sum(norm.input, x, attention.output)
        ]
        if not attentions or not _holds_when_changed(call, resid_mid, mlp_out):
            continue
        mlp_in = call.location(norm.path, "output") if norm.output is not None and norm.end < mlp.end else None
        return BlockParts(
            attn_out=next((one for one in attentions if _adds_to_middle(call, one, resid_mid)), None),
            resid_mid=resid_mid,
            mlp_in=mlp_in if mlp_in is not None and _determines(call, mlp_in, mlp_out) else None,
            mlp_post=_find_hidden_layer(call, mlp_out, submodules, norm.start, mlp.end),
            mlp_out=mlp_out,
        )
    return None


def _adds_to_middle(call: BlockCall, attn_out: HookLocation, resid_mid: HookLocation) -> bool:
    """Whether resid_mid = resid_pre + attn_out still holds with attn_out negated."""
    values: dict[str, Tensor] = {}
    with attach(attn_out, partial(_negate, values, "attn_out")), attach(resid_mid, partial(_record, values, "mid")):
        call.repeat(call.input)
    x = call.input
    return _is_sum(values["mid"].reshape(x.shape), x, values["attn_out"].reshape(x.shape))


def _find_hidden_layer(
    call: BlockCall, mlp_out: HookLocation, submodules: list[_SubmoduleCall], start: int, end: int
) -> HookLocation | None:
    """The input of the last projection between two events that all of mlp_out goes through."""
    matrices = projections(call.block)
    within = [one for one in submodules if one.path in matrices and start <= one.start and one.end <= end]
    for submodule in sorted(within, key=lambda one: -one.start):
        location = call.location(submodule.path, "input")
        if _determines(call, location, mlp_out):
            return location
    return None


def _find_nonlinearity(call: BlockCall, submodules: list[_SubmoduleCall]) -> HookLocation | None:
    """The input of the last projection that a nonlinearity alone separates from an earlier one.

    That is: half of the channels of the earlier output, changed at one position, change the same half there and nothing
    else. Attention mixes positions, a norm mixes channels.
    """
    matrices = projections(call.block)
    calls = sorted((one for one in submodules if one.path in matrices), key=lambda one: one.start)
    for end in range(len(calls) - 1, 0, -1):
        down = call.location(calls[end].path, "input")
        if any(_acts_on_channels(call, call.location(up.path, "output"), down) for up in calls[:end]):
            return down
    return None


def _acts_on_channels(call: BlockCall, source: HookLocation, target: HookLocation) -> bool:
    """Whether each number at `target` depends on one at `source`: the same channel of the same token."""
    tokens = call.input.shape[:2]
    values: dict[str, Tensor] = {}

    def change(x: Tensor) -> Tensor:
        values["source"] = x
        y = x.reshape(*tokens, -1).clone()
        y[:, 0, : y.shape[-1] // 2] *= -2
        return y.reshape(x.shape)

    with attach(target, partial(_record, values, "before")):
        call.repeat(call.input)
    with attach(source, change), attach(target, partial(_record, values, "after")):
        call.repeat(call.input)
    if values["source"].shape != values["before"].shape:
        return False
    before, after = (values[name].reshape(*tokens, -1) for name in ("before", "after"))
    half = before.shape[-1] // 2
    is_same = torch.equal(after[:, 1:], before[:, 1:]) and torch.equal(after[:, 0, half:], before[:, 0, half:])
    return is_same and not torch.equal(after, before)


def _determines(call: BlockCall, source: HookLocation, target: HookLocation) -> bool:
    """Whether all that differs between tokens at `target` comes through `source`: with zeros there, nothing does."""
    values: dict[str, Tensor] = {}
    with attach(source, torch.zeros_like), attach(target, partial(_record, values, "target")):
        call.repeat(call.input)
    rows = values["target"].flatten(0, -2)
    return _is_sum(rows, rows[:1].expand_as(rows))


def _negate(values: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A hook function that negates an activation and records the result."""
    values[name] = -x
    return values[name]


def _record(values: dict[str, Tensor], name: str, x: Tensor) -> None:
    """A hook function that records an activation."""
    values[name] = x.clone()


def _holds_when_changed(call: BlockCall, resid_mid: HookLocation, mlp_out: HookLocation) -> bool:
    """Whether block output = resid_mid + mlp_out still holds with resid_mid negated, so not by coincidence."""
    values: dict[str, Tensor] = {}
    with attach(resid_mid, partial(_negate, values, "mid")), attach(mlp_out, partial(_record, values, "mlp_out")):
        output = call.repeat(call.input)
    return _is_sum(output, *(values[part].reshape(output.shape) for part in ("mid", "mlp_out")))


def _find_parallel(call: BlockCall, x: Tensor, output: Tensor, submodules: list[_SubmoduleCall]) -> BlockParts | None:
    """The parts where block output = x + attention + MLP: the MLP is the one whose positions do not mix."""
    other = x.clone()
    other[:, 0] = -other[:, 0]
    outputs = {submodule.path: submodule.output for submodule in submodules}
    mixing = {
        submodule.path
        for submodule in _trace(call, other)[1]
        if not _is_same_after_first(submodule.output, outputs.get(submodule.path))
    }
    for attention, mlp in itertools.product(submodules, submodules):
        if attention.path not in mixing or mlp.path in mixing or attention.output is None or mlp.output is None:
            continue
        if not _is_sum(output, x, attention.output, mlp.output):
            continue
        attn_out, mlp_out = call.location(attention.path, "output"), call.location(mlp.path, "output")
        mlp_in = call.location(mlp.path, "input")
        return BlockParts(
            attn_out=attn_out if _adds_to_block(call, attn_out, mlp_out) else None,
            mlp_in=mlp_in if mlp.input is not None and _determines(call, mlp_in, mlp_out) else None,
            mlp_post=_find_hidden_layer(call, mlp_out, submodules, mlp.start, mlp.end),
            mlp_out=mlp_out,
        )
    return None


def _adds_to_block(call: BlockCall, attn_out: HookLocation, mlp_out: HookLocation) -> bool:
    """Whether block output = x + attention + MLP still holds with attention negated."""
    values: dict[str, Tensor] = {}
    with attach(attn_out, partial(_negate, values, "attn_out")), attach(mlp_out, partial(_record, values, "mlp_out")):
        output = call.repeat(call.input)
    return _is_sum(output, call.input, *(values[part].reshape(output.shape) for part in ("attn_out", "mlp_out")))


def _is_same_after_first(y: Tensor | None, previous: Tensor | None) -> bool:
    """Whether `y` equals `previous` at all positions but the first."""
    return y is not None and previous is not None and _is_sum(y[:, 1:], previous[:, 1:])


def _trace(call: BlockCall, x: Tensor) -> tuple[Tensor, list[_SubmoduleCall]]:
    """The block's output, and the call of each submodule called exactly once; outer modules first, then by time."""
    clock = itertools.count()
    submodules: dict[str, _SubmoduleCall] = {}

    def reshape(value: Any) -> Tensor | None:
        fits = isinstance(value, Tensor) and value.numel() == x.numel() and value.shape[-1:] == x.shape[-1:]
        return value.reshape(x.shape).clone() if fits else None

    def before(path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        submodule = submodules.setdefault(path, _SubmoduleCall(path, next(clock)))
        submodule.count, submodule.input = submodule.count + 1, reshape(module_input(args, kwargs))

    def after(path: str, module: nn.Module, args: tuple, output: Any) -> None:
        submodules[path].output, submodules[path].end = reshape(module_output(output)), next(clock)

    handles = []
    for path, module in call.block.named_modules():
        if path:
            handles += [
                module.register_forward_pre_hook(partial(before, path), with_kwargs=True),
                module.register_forward_hook(partial(after, path)),
            ]
    try:
        output = call.repeat(x)
    finally:
        for handle in handles:
            handle.remove()
    single = [submodule for submodule in submodules.values() if submodule.count == 1]
    return output, sorted(single, key=lambda submodule: (submodule.path.count("."), submodule.start))


def _is_sum(total: Tensor, *parts: Tensor) -> bool:
    """Whether `total` is the sum of `parts`, element by element, up to the rounding of its own number format."""
    parts = tuple(part.float() for part in parts)
    bound = 4 * torch.finfo(total.dtype).eps * sum(part.abs() for part in parts)
    return bool(((total.float() - sum(parts)).abs() <= bound).all())
