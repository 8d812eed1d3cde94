"""The run file: one TOML for all three processes, read once, with every fault reported at once. CONTRACT. Light.

Each process validates the tables it needs and ignores the others, so that each fact stands in one place.

    settings = read_run_file(ProducerSettings, "deploy/demo.toml", ["model.device=cpu"])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from producer.common.explain import explain, explain_unknown_table, nearest
from producer.common.parsing import ParseError, parse_toml
from producer.common.toml import SettingsError, read_toml, show_value

TABLES = (
    "run", "stream", "model", "corpus", "buffer", "optimizer", "parallel", "sae", "snapshots", "checkpoint", "monitor",
)  # fmt: skip

S = TypeVar("S", bound=BaseModel)


def read_run_file(kind: type[S], path: str | Path, overrides: list[str]) -> S:
    """Reads the tables of `kind` from the TOML file `path`, with `section.key=value` overrides applied.

    Raises SettingsError naming every fault: key, value, what is expected and what to do.
    """
    document = read_toml(path)
    faults = [fault for override in overrides if (fault := _apply_override(document, override))]
    faults += [
        explain_unknown_table(kind, TABLES, name, value) for name, value in document.items() if name not in TABLES
    ]
    tables = {name: table for name, table in document.items() if name in kind.model_fields}
    try:
        settings = settings_from(kind, tables)
    except SettingsError as error:
        faults += str(error).split("\n")
    if faults:
        raise SettingsError("\n".join(f"{path}: {fault}" for fault in faults))
    return settings


def settings_from(kind: type[S], document: dict[str, Any]) -> S:
    """Validates `document` as settings of this kind. Raises SettingsError naming every fault, one a line.

    A kind that has tables which stand for several has a class method `expand`, from one document to another.
    """
    if (expand := getattr(kind, "expand", None)) is not None:
        document = expand(document)
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise SettingsError("\n".join(explain(kind, document, fault) for fault in error.errors())) from None


def show_settings(settings: BaseModel) -> str:
    """Writes the resolved settings as TOML that `read_run_file` reads back equal; unset options are left out."""
    return tomli_w.dumps(settings.model_dump(exclude_none=True))


def _apply_override(document: dict[str, Any], override: str) -> str | None:
    """Sets one `section.key=value` in `document`; returns the fault, if there is one."""
    name = f"override {show_value(override)}"
    try:
        override.encode()
    except UnicodeEncodeError:
        return f"{ascii(name)[1:-1]} holds bytes that are not UTF-8"
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        return f"{name}: expected section.key=value, such as optimizer.batch=2048"
    table: Any = document
    for part in parts[:-1]:
        if isinstance(table, list):
            entries = [entry for index, entry in enumerate(table) if _is_named(entry, part, index)]
            if not entries:
                close = nearest(part, [str(entry["name"]) for entry in table if "name" in entry])
                return f'{name}: no [[{parts[0]}]] is named "{part}"{close}, nor has that number'
            table = entries[0]
        else:
            table = table.setdefault(part, {})
        if not isinstance(table, dict | list):
            return f'{name}: "{part}" is a value, not a table'
    if isinstance(table, list):
        return f"{name}: say which entry, as in {parts[0]}.0.{parts[-1]}=…"
    table[parts[-1]] = _override_value(text)
    return None


def _is_named(entry: Any, part: str, index: int) -> bool:
    return isinstance(entry, dict) and part in (str(index), entry.get("name"))


def _override_value(text: str) -> Any:
    """The value behind the `=` of an override: TOML, or text that needs no quotes, as in model.name=gpt2."""
    try:
        document = parse_toml(f"value = {text}")
    except ParseError:
        return text.strip()
    return document["value"] if len(document) == 1 else text
