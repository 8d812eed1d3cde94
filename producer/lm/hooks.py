"""Hook points: where activations are read and replaced.

A hook sits at the input or the output of one module, or at some of its channels. Its function is shown the activation
there; what it returns, if anything, takes the activation's place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from producer.lm.errors import ModelError

Side = Literal["input", "output"]

HookFunction = Callable[[Tensor], Tensor | None]
"""A function of an activation in the model's own shape; its result, if not None, replaces the activation."""


class StopForward(Exception):
    """Raised inside a pass to end it: the rest of the pass is of no use."""


@dataclass(frozen=True)
class Channels:
    """Some channels of a tensor [..., groups · width]: those from `start` to `stop` of every group of `width`."""

    groups: int
    width: int
    start: int
    stop: int

    def select(self, x: Tensor) -> Tensor:
        """The channels [..., groups · (stop − start)]."""
        return x.unflatten(-1, (self.groups, self.width))[..., self.start : self.stop].flatten(-2)

    def replace(self, x: Tensor, part: Tensor) -> Tensor:
        """A copy of `x` with these channels replaced by `part`."""
        result = x.clone()
        result.unflatten(-1, (self.groups, self.width))[..., self.start : self.stop] = part.unflatten(
            -1, (self.groups, -1)
        )
        return result

    def __str__(self) -> str:
        return f"[{self.start}:{self.stop} of {self.width}]"


@dataclass(frozen=True)
class HookPoint:
    """One place where activations are read."""

    name: str
    """The name in the settings: `blocks.2.hook_resid_post`, or a module path."""
    module: str
    """Path of the module in the loaded, whole Hugging Face model: `model.layers.2`, `transformer.h.2`."""
    layer: int
    """Index of the block it belongs to (0 for what lies before the blocks, such as the embedding)."""
    width: int
    """Length of one activation."""
    side: Side = "output"
    """Whether this activation is the input (resid_pre, resid_mid) or the output of `module`."""
    element: int = 0
    """Which element of an output that is a tuple."""
    channels: Channels | None = None
    """The channels that are hooked; all where None."""

    @property
    def path(self) -> str:
        """`module` and, after it, which of its tensors and channels is meant: `model.layers.2.mlp:input`."""
        return f"{self.module}{_suffix(self.side, self.element)}{self.channels or ''}"


@dataclass(frozen=True)
class HookLocation:
    """The input or the output of one module in memory, to which a hook function is attached."""

    module: nn.Module
    path: str
    """Path of `module` in the whole model; empty where nobody reads it."""
    side: Side = "output"
    in_place: bool = False
    """The input is also the residual stream that bypasses the module (resid_mid): a replacement must reach both."""
    element: int = 0
    """Which element of an output that is a tuple."""
    channels: Channels | None = None
    """The channels that are hooked; all where None."""

    def select(self, x: Any) -> Any:
        """The hooked channels of a tensor; anything else as it is."""
        return self.channels.select(x) if self.channels is not None and isinstance(x, Tensor) else x

    def insert(self, x: Tensor, replacement: Tensor) -> Tensor:
        """`x` with `replacement` at the hooked channels."""
        return replacement if self.channels is None else self.channels.replace(x, replacement)


def register(location: HookLocation, function: HookFunction) -> RemovableHandle:
    """Attaches `function` to `location` until the handle is removed."""

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        x = module_input(args, kwargs)
        replacement = function(location.select(x))
        if replacement is None:
            return None
        replacement = location.insert(x, replacement)
        if location.in_place:
            x.copy_(replacement)
            return None
        return with_input(args, kwargs, replacement)

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        x = module_output(output, location.element)
        replacement = function(location.select(x))
        if replacement is None:
            return None
        replacement = location.insert(x, replacement)
        if not isinstance(output, tuple):
            return replacement
        return (*output[: location.element], replacement, *output[location.element + 1 :])

    if location.side == "input":
        # Before the counter of blocks: a pass that ends here has not run this block.
        return location.module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    return location.module.register_forward_hook(after)


@contextmanager
def attach(location: HookLocation, function: HookFunction) -> Iterator[RemovableHandle]:
    """Attaches `function` to `location` inside a `with` block."""
    handle = register(location, function)
    try:
        yield handle
    finally:
        handle.remove()


def replacing_function(
    name: str, function: Callable[[Tensor], Tensor], shape: Sequence[int], device: torch.device
) -> HookFunction:
    """A hook function that replaces activations `[*shape, width]` in the passes of the calling thread alone.

    `function` is given them on `device`. Another thread may read the model's activations at the same time. `name` is
    the hook's, for the error about a replacement of another shape.
    """
    thread = threading.get_ident()

    def replace(x: Tensor) -> Tensor | None:
        if threading.get_ident() != thread:
            return None
        activation = x.reshape(*shape, -1).to(device)
        replacement = function(activation)
        if replacement.shape != activation.shape:
            raise ModelError(
                f"the replacement for {name} has shape {list(replacement.shape)}, not {list(activation.shape)}"
            )
        return replacement.to(x).reshape(x.shape)

    return replace


def module_input(args: tuple, kwargs: dict) -> Any:
    """The hidden states in a module's arguments: the first tensor by position, else `hidden_states`, else any."""
    values = (*args, kwargs.get("hidden_states"), *kwargs.values())
    return next((value for value in values if isinstance(value, Tensor)), None)


def with_input(args: tuple, kwargs: dict, x: Tensor) -> tuple[tuple, dict]:
    """The same arguments with the hidden states replaced by `x`."""
    previous = module_input(args, kwargs)
    return (
        tuple(x if value is previous else value for value in args),
        {name: x if value is previous else value for name, value in kwargs.items()},
    )


def module_output(output: Any, element: int = 0) -> Any:
    """The hidden states in what a module returned: of a tuple, one element, or None where it is shorter."""
    if isinstance(output, tuple):
        return output[element] if element < len(output) else None
    return output if element == 0 else None


def _suffix(side: Side, element: int) -> str:
    return ":input" if side == "input" else f"[{element}]" if element else ""


def hook_names(hooks: Sequence[HookPoint]) -> str:
    """The names of `hooks`, for messages."""
    return ", ".join(hook.name for hook in hooks)
