"""resid_mid and mlp_out inside one block, located by experiment.

A probe runs through the block, and those submodules are taken for which resid_pre + attention is resid_mid and
resid_mid + mlp_out is resid_post, the latter also when resid_mid is replaced during the call. That covers OPT's fc2,
Gemma's norm after the MLP and Bloom's MLP that adds the residual itself. A block that runs attention and MLP in
parallel (Pythia) has an mlp_out and no resid_mid; one that normalises after the addition (BERT) has neither.
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

    resid_mid: HookLocation | None
    mlp_out: HookLocation | None


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
    """The parts of a block: sequential blocks have resid_mid and mlp_out, parallel ones mlp_out alone."""
    x = call.input
    output, submodules = _trace(call, x.clone())
    if pair := _find_sequential(call, x, output, submodules):
        return BlockParts(*pair)
    return BlockParts(None, _find_parallel(call, x, output, submodules))


def missing_part_message(parts: BlockParts, block: nn.Module, path: str) -> str:
    """The sentence that says why a block lacks resid_mid or mlp_out, and what to hook instead."""
    if parts.mlp_out is not None:
        return (
            f"{type(block).__name__} runs attention and MLP in parallel on the same input, so there is no residual "
            "stream between them; use hook_resid_pre, hook_resid_post or hook_mlp_out"
        )
    children = ", ".join(f"{path}.{name}" for name, _ in block.named_children())
    return (
        f"{type(block).__name__} does not return resid_mid + mlp_out (post-norm blocks such as BERT's normalise that "
        f"sum, others scale it), so neither is defined; use hook_resid_pre, hook_resid_post or a module path: "
        f"{children}"
    )


def _find_sequential(
    call: BlockCall, x: Tensor, output: Tensor, submodules: list[_SubmoduleCall]
) -> tuple[HookLocation, HookLocation] | None:
    """(resid_mid, mlp_out): the first input and the first later output whose sum the block returns.

    resid_mid must itself be x plus one submodule's output, or the last of three additions would pass (Gemma 4 adds
    its per-layer embedding after the MLP).
    """
    for norm, mlp in itertools.product(submodules, submodules):
        if norm.start >= mlp.end or norm.input is None or mlp.output is None or torch.equal(norm.input, x):
            continue
        if _is_sum(output, norm.input, mlp.output) and any(
            _is_sum(norm.input, x, attention.output) for attention in submodules if attention.output is not None
        ):
            resid_mid = call.location(norm.path, "input", in_place=True)
            mlp_out = call.location(mlp.path, "output")
            if _holds_when_changed(call, resid_mid, mlp_out):
                return resid_mid, mlp_out
    return None


def _holds_when_changed(call: BlockCall, resid_mid: HookLocation, mlp_out: HookLocation) -> bool:
    """Whether block output = resid_mid + mlp_out still holds with resid_mid negated, so not by coincidence."""
    values: dict[str, Tensor] = {}

    def negate(x: Tensor) -> Tensor:
        values["resid_mid"] = -x
        return values["resid_mid"]

    def record(y: Tensor) -> None:
        values["mlp_out"] = y.clone()

    with attach(resid_mid, negate), attach(mlp_out, record):
        output = call.repeat(call.input)
    return _is_sum(output, *(values[part].reshape(output.shape) for part in ("resid_mid", "mlp_out")))


def _find_parallel(call: BlockCall, x: Tensor, output: Tensor, submodules: list[_SubmoduleCall]) -> HookLocation | None:
    """mlp_out where block output = x + attention + MLP: the MLP is the one whose positions do not mix."""
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
        if _is_sum(output, x, attention.output, mlp.output):
            return call.location(mlp.path, "output")
    return None


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
