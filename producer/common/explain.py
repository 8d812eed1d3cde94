"""Faults of a run file, as pydantic reports them, in sentences for an operator. CONTRACT. Light.

    optimizer.batch = "many": expected a whole number, such as 4096. Rows in one step.

Name, value, expectation, and what the setting means. Values and examples stand as TOML.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from producer.common.toml import show_value, toml_value

BOUNDS = {
    "greater_than": "above",
    "greater_than_equal": "of at least",
    "less_than": "below",
    "less_than_equal": "of at most",
}
SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


@dataclass(frozen=True)
class Location:
    """The location of a table, a key or an entry of a list in the settings `kind`."""

    kind: type[BaseModel]
    document: Any
    """The whole document; which keys a table may have can depend on it."""
    path: tuple[str, ...]
    """Names of tables and keys, and indices of lists."""

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def model(self) -> type[BaseModel] | None:
        """The class of the table that the path leads to, looking through lists and optional types."""
        value = self.document
        model = _model_of(self.kind, value)
        for part in self.path:
            value = _entry(value, part)
            if not part.isdigit():
                field = model.model_fields.get(part) if model else None
                model = _model_within(field.annotation) if field else None
            model = _model_of(model, value)
        return model

    @property
    def table(self) -> type[BaseModel] | None:
        """The class of the table around the location."""
        return Location(self.kind, self.document, self.path[:-1]).model

    @property
    def field(self) -> FieldInfo | None:
        return self.table.model_fields.get(self.path[-1]) if self.table else None

    @property
    def meaning(self) -> str:
        """The description of the setting, or of the list around an entry."""
        field = self.field or (Location(self.kind, self.document, self.path[:-1]).field if self.path[1:] else None)
        return " ".join((field.description or "").split()) if field else ""

    @property
    def example(self) -> str:
        """`, such as corpus.paths = ["a.txt", "b.txt"]`, from the field's example or its default; may be empty."""
        field = self.field
        if field is None:
            return ""
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        examples = field.examples or [default]
        if examples[0] in (None, [], "") or isinstance(examples[0], BaseModel):
            return ""
        indexed = any(part.isdigit() for part in self.path)  # the tables [[sae]] have no name in the file
        return f", such as {self.path[-1] if indexed else self.name} = {toml_value(examples[0])}"


def _entry(value: Any, part: str) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    return value[int(part)] if isinstance(value, list) and part.isdigit() and int(part) < len(value) else None


def _model_of(model: Any, table: Any) -> type[BaseModel] | None:
    """The class for this table, where `model` stands for several that differ by the table's contents."""
    return model.model_of(table) if hasattr(model, "model_of") and isinstance(table, dict) else model


def _model_within(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_model_within(argument) for argument in getattr(annotation, "__args__", ()))
    return next((model for model in inner if model), None)


def explain_unknown_table(kind: type[BaseModel], tables: Sequence[str], name: str, value: Any) -> str:
    """Explains a `name` at the top of the file that is none of the `tables`."""
    if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
        return f"[{name}]: no such table{nearest(name, tables)}; the tables are {', '.join(tables)}"
    owners = [
        "[[sae]]" if table == "sae" else f"[{table}]" for table in kind.model_fields if name in fields_at(kind, table)
    ]
    where = f"under {' or '.join(owners)}" if owners else "in its table"
    return f"{name} = {show_value(value)}: a key stands {where}, not before the first table"


def explain(kind: type[BaseModel], document: Any, fault: Any) -> str:
    """Explains one fault of pydantic's `errors()` for the settings `kind`, in a sentence or two."""
    location = Location(kind, document, tuple(str(part) for part in fault["loc"]))
    name, value = location.name, fault["input"]
    match fault["type"]:
        case "extra_forbidden":
            return _explain_unknown_key(location, value)
        case "value_error":
            message = str(fault["ctx"]["error"])
            # Of a table as a whole: the message names the settings that do not go together.
            if not name or isinstance(value, dict):
                return message
            return f"{name} = {show_value(value)} {message}. {location.meaning}".rstrip()
        case "model_type":
            return _explain_not_a_table(location, value)
        case "list_type" | "too_short" | "missing" if location.model:
            single = isinstance(value, dict) and fault["type"] == "list_type"
            hint = f" The file has one table [{name}]: it takes two brackets." if single else ""
            return f"{name}: expected one table or more, each beginning with [[{name}]].{hint}"
        case "missing":
            return f"{name}: missing; add it{location.example}. {location.meaning}".rstrip()
    meaning = location.meaning
    return f"{name} = {show_value(value)}: expected {_expected(location, fault)}. {meaning}".rstrip()


def _explain_unknown_key(location: Location, value: Any) -> str:
    key, keys = location.path[-1], list(location.table.model_fields) if location.table else []
    owners = [f"{table}.{key}" for table in location.kind.model_fields if key in fields_at(location.kind, table)]
    close = f" (did you mean {' or '.join(owners)}?)" if owners else nearest(key, keys)
    return f"{location.name} = {show_value(value)}: no such key{close}; there are {', '.join(keys)}"


def _explain_not_a_table(location: Location, value: Any) -> str:
    name = ".".join(part for part in location.path if not part.isdigit())
    if isinstance(value, list):
        return f"{name}: expected one table [{name}], with one bracket on each side"
    heading = f"[[{name}]]" if location.path[-1].isdigit() else f"[{name}]"
    return f"{location.name} = {show_value(value)}: expected a table, which begins with a line {heading}"


def _expected(location: Location, fault: Any) -> str:
    value, context = fault["input"], fault.get("ctx") or {}
    match fault["type"]:
        case "int_type" | "int_from_float":
            return f"a whole number{_likely_number(value, int) or location.example}"
        case "float_type":
            return f"a number{_likely_number(value, float) or location.example}"
        case "bool_type":
            is_boolean = isinstance(value, str) and value.lower() in ("true", "false")
            return f"true or false, in small letters and without quotes{f': {value.lower()}' if is_boolean else ''}"
        case "string_type":
            scalar = not isinstance(value, list | dict)
            quoted = f": {toml_value(toml_value(value))}" if scalar else location.example
            return f"text in double quotes{quoted}"
        case "list_type":
            return f"a list{location.example}"
        case "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            close = nearest(value, choices) if isinstance(value, str) else ""
            return f"{'one of ' if len(choices) > 1 else ''}{', '.join(map(toml_value, choices))}{close}"
        case "finite_number":
            return f"a finite number{location.example}"
        case "too_short" | "too_long":
            count = context.get("min_length") if fault["type"] == "too_short" else context.get("max_length")
            least = "at least" if fault["type"] == "too_short" else "at most"
            return f"a list of {least} {count} {'entry' if count == 1 else 'entries'}{location.example}"
        case "string_too_short":
            return f"text that is not empty{location.example}"
        case "string_too_long":
            return f"text of at most {context['max_length']} characters"
        case bound if bound in BOUNDS:
            (limit,) = context.values()
            return (
                f"a number {BOUNDS[bound]} {limit:g}"
                if isinstance(limit, float)
                else f"a number {BOUNDS[bound]} {limit}"
            )
    return str(fault["msg"]).replace("Input should be ", "")


def _likely_number(value: Any, number: type) -> str:
    """A hint for a number in quotes, such as "1,000,000", "1M" or "1e6"; empty where the text is no number."""
    if not isinstance(value, str) or not (
        match := re.fullmatch(r"([+-]?[\d.]+(?:e[+-]?\d+)?)([kmbg]?)", _without_separators(value))
    ):
        return ""
    try:
        result = float(match[1]) * SUFFIXES.get(match[2], 1)
    except ValueError:
        return ""
    if not math.isfinite(result) or (number is int and not result.is_integer()):
        return ""
    return f", without quotes and units: {f'{int(result):_}' if result.is_integer() else f'{result:g}'}"


def _without_separators(text: str) -> str:
    return re.sub(r"[,_\s']", "", text).lower()


def fields_at(kind: type[BaseModel], table: str) -> list[str]:
    """The keys of one table of the run file; none where there is no such table."""
    model = Location(kind, {}, (table,)).model
    return list(model.model_fields) if model else []


def nearest(word: str, names: Iterable[str]) -> str:
    """` (did you mean …?)` with the closest of `names`; empty where none is close."""
    close = difflib.get_close_matches(word, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
