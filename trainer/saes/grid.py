"""One [[sae]] table for a grid: an SAE for each number of latents with each k, all on one stream. Light: no torch.

    [[sae]]                                 # four SAEs: topk-1024-16, topk-1024-32, topk-4096-16, topk-4096-32
    name = "topk"
    architecture = "topk"
    grid = { d_sae = [1024, 4096], k = [16, 32] }

A cell is called NAME-D_SAE-K, NAME-D_SAE or NAME-K, by the lists that the grid has.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from producer.common.explain import explain
from producer.common.fields import Positive, Table
from producer.common.toml import SettingsError, show_value
from trainer.saes import registry


class GridSettings(Table):
    """`grid` of an [[sae]] table: the lists whose every combination is an SAE."""

    d_sae: list[Positive] | None = Field(default=None, min_length=1, examples=[[1024, 4096]])
    """Numbers of latents; without them, d_sae stands in the table itself."""
    k: list[Positive] | None = Field(default=None, min_length=1, examples=[[16, 32]])
    """Numbers of latents per activation; without them, k stands in the table itself."""

    @property
    def lists(self) -> dict[str, list[int]]:
        """The lists of the grid by their key, in the order of a cell's name."""
        return {key: values for key, values in (("d_sae", self.d_sae), ("k", self.k)) if values is not None}


class _GridTable(BaseModel):
    """The part of an [[sae]] table that is checked here."""

    model_config = ConfigDict(extra="ignore", strict=True)

    grid: GridSettings


def expand_grid(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table for each cell of the grid; the table itself when it has none. Raises SettingsError, a fault a line."""
    if "grid" not in table:
        return [dict(table)]
    prefix = f"sae {show_value(table.get('name', '?'))}"
    if not isinstance(table["grid"], Mapping):
        value = show_value(table["grid"])
        raise SettingsError(f"{prefix}: grid = {value}: expected a table, such as grid = {{ d_sae = [1024, 4096] }}")
    try:
        lists = _GridTable.model_validate(table).grid.lists
    except ValidationError as error:
        faults = [explain(_GridTable, dict(table), fault) for fault in error.errors()]
    else:
        faults = _faults(table, lists)
    if faults:
        raise SettingsError("\n".join(f"{prefix}: {fault}" for fault in faults))
    shared = {key: value for key, value in table.items() if key != "grid"}
    return [_cell(shared, dict(zip(lists, values, strict=True))) for values in product(*lists.values())]


def _faults(table: Mapping[str, Any], lists: Mapping[str, list[int]]) -> list[str]:
    """Why these lists are no grid of this table, with what to change."""
    faults = []
    if not lists:
        faults.append("grid has no list; add one, such as grid.d_sae = [1024, 4096], or remove grid")
    for key, values in lists.items():
        if repeated := sorted({value for value in values if values.count(value) > 1}):
            text = ", ".join(map(str, repeated))
            faults.append(f"grid.{key} = {show_value(values)} has {text} more than once; each value makes an SAE")
        if key in table:
            faults.append(f"{key} = {show_value(table[key])} and grid.{key} are both set; remove one")
    architecture = registry.find(table.get("architecture")) if "k" in lists else None
    if architecture is not None and "k" not in architecture.Settings.model_fields:
        names = [name for name in registry.names() if "k" in registry.get(name).Settings.model_fields]
        faults.append(
            f"grid.k is not for {table['architecture']}, which has no k: remove grid.k, or use {' or '.join(names)}"
        )
    return faults


def _cell(shared: Mapping[str, Any], values: Mapping[str, int]) -> dict[str, Any]:
    """The table of one cell."""
    cell = {**shared, **values}
    if isinstance(name := shared.get("name"), str):
        cell["name"] = "-".join([name, *map(str, values.values())])
    return cell
