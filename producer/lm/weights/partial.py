"""A model without some of its parts, and passes through what is left out.

from_pretrained reads the tensors that the model has parameters for, each when it is needed. A subclass that takes parts
off itself, while everything is still on the meta device, is therefore loaded without reading theirs. A block that was
left out stays in its list and returns what the last loaded block did, so that a pass of the whole model goes on to its
end: its early activations, and transformers' own `hidden_states`, are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def partial_class(kind: Any, omitted: Sequence[str]) -> Any:
    """A subclass of `kind`, of the same name, whose models lack what the modules at the paths `omitted` hold."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        for path in omitted:
            _empty(self.get_submodule(path))
        names = set(self.state_dict())
        self.all_tied_weights_keys = {
            target: source
            for target, source in self.all_tied_weights_keys.items()
            if target in names and source in names
        }

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def all_but(network: nn.Module, path: str) -> list[str]:
    """Paths of the largest modules that neither hold the module at `path` nor lie in it."""
    others: list[str] = []
    for other, _ in network.named_modules():
        is_related = not other or f"{path}.".startswith(f"{other}.") or other.startswith(f"{path}.")
        if not is_related and not other.startswith(tuple(f"{one}." for one in others)):
            others.append(other)
    return others


@contextmanager
def pass_through(
    blocks: Sequence[nn.Module], omitted: Sequence[nn.Module], head: nn.Module | None, dtype: torch.dtype
) -> Iterator[None]:
    """Lets passes through `omitted` blocks, which return what the last of `blocks` did, and through a head."""
    outputs: list[Any] = []

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        outputs[:] = [output]

    with ExitStack() as stack:
        if omitted:
            stack.callback(blocks[-1].register_forward_hook(record).remove)
        for block in omitted:
            stack.enter_context(_attribute(block, "forward", lambda *args, **kwargs: outputs[0]))
        if head is not None:
            stack.enter_context(_attribute(head, "forward", lambda x: x))
            stack.enter_context(_attribute(head, "weight", torch.empty(0, dtype=dtype)))  # Mamba asks for its dtype
        try:
            yield
        finally:
            outputs.clear()


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Gives a module an attribute of its own."""
    previous = vars(module).get(name)
    vars(module)[name] = value
    try:
        yield
    finally:
        del vars(module)[name]
        if previous is not None:
            vars(module)[name] = previous


def _empty(module: nn.Module) -> None:
    """Takes all parameters, buffers and submodules from a module, and marks it as needing no initial values."""
    for table in (module._parameters, module._buffers, module._modules, module._non_persistent_buffers_set):
        table.clear()
    module._is_hf_initialized = True  # type: ignore[assignment]


def free(network: nn.Module) -> None:
    """Takes all parameters from a model: at once, and not when the garbage collector comes by."""
    for module in network.modules():
        module._parameters.clear()


def is_within(path: str, parts: Iterable[str]) -> bool:
    """Whether a parameter at `path` belongs to one of `parts`."""
    return path.startswith(tuple(f"{part}." for part in parts))
