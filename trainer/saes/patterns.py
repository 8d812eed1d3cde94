"""One [[sae]] table for a suite: `*` in its hooks stands for each layer that is streamed. Light: no torch.

    model.hooks = ["blocks.{0..3}.hook_mlp_in", "blocks.{0..3}.hook_mlp_out"]

    [[sae]]                                 # four transcoders: mlp.0, mlp.1, mlp.2, mlp.3
    name = "mlp"
    hook = "blocks.*.hook_mlp_in"
    target = "blocks.*.hook_mlp_out"

All hooks of a table have the same layer in one SAE. Its name gets the layer at its `*`, or at its end. A table with a
grid is expanded after that: `topk.3-1024-16` is of layer 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from producer.common.toml import SettingsError, show_value
from trainer.saes.grid import expand_grid

LAYER = "*"
FOLLOWING = ("hook", "hooks", "target", "start_from")
"""Keys in which the layer is filled in."""


def expand_saes(tables: Sequence[Any], hooks: Sequence[str] | None) -> list[Any]:
    """The tables, those that stand for several SAEs replaced by a table for each.

    With unknown `hooks` (None) a table that stands for an SAE of each layer remains. Raises SettingsError, a fault a
    line.
    """
    expanded: list[Any] = []
    faults: list[str] = []
    for table in tables:
        try:
            expanded += expand_sae(table, hooks)
        except SettingsError as error:
            faults.append(str(error))
    if faults:
        raise SettingsError("\n".join(faults))
    return expanded


def expand_sae(table: Any, hooks: Sequence[str] | None) -> list[Any]:
    """A table for each SAE that this one stands for: at each layer of a pattern, for each cell of a grid.

    The table itself when it stands for one. Raises SettingsError.
    """
    if not isinstance(table, Mapping):
        return [table]
    layers = [table] if hooks is None else _expand_layers(table, hooks)
    return [cell for layer in layers for cell in expand_grid(layer)]


def _expand_layers(table: Mapping[str, Any], hooks: Sequence[str]) -> list[Mapping[str, Any]]:
    """A table for each layer at which its first hook is streamed. Raises SettingsError when no hook matches."""
    pattern = _pattern(table)
    if pattern is None:
        return [table]
    name = table.get("name", "?")
    if pattern.count(LAYER) > 1:
        raise SettingsError(f"sae {show_value(name)}: {show_value(pattern)} has more than one {LAYER}; expected one")
    before, _, after = pattern.partition(LAYER)
    layer_of = re.compile(f"{re.escape(before)}(\\d+){re.escape(after)}")
    layers = [match[1] for hook in hooks if (match := layer_of.fullmatch(hook))]
    if not layers:
        raise SettingsError(
            f"sae {show_value(name)}: {show_value(pattern)} matches no hook that is streamed; model.hooks has "
            f"{', '.join(hooks)}"
        )
    return [_at_layer(table, layer) for layer in layers]


def names_matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a pattern of a command means, such as `mlp.*`; the pattern itself when it is a plain name."""
    if not any(character in pattern for character in "*?["):
        return [pattern]
    return [name for name in names if fnmatchcase(name, pattern)]


def _pattern(table: Mapping[str, Any]) -> str | None:
    """The first hook of a table that is a pattern."""
    hooks = table.get("hooks")
    names = [table.get("hook"), *(hooks if isinstance(hooks, list) else []), table.get("target")]
    return next((name for name in names if isinstance(name, str) and LAYER in name), None)


def _at_layer(table: Mapping[str, Any], layer: str) -> dict[str, Any]:
    filled = {key: _fill(value, layer) if key in FOLLOWING else value for key, value in table.items()}
    if isinstance(name := table.get("name"), str):
        filled["name"] = name.replace(LAYER, layer) if LAYER in name else f"{name}.{layer}"
    return filled


def _fill(value: Any, layer: str) -> Any:
    if isinstance(value, list):
        return [_fill(each, layer) for each in value]
    return value.replace(LAYER, layer) if isinstance(value, str) else value
