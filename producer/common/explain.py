"""What pydantic finds wrong with a run file, in sentences for an operator. CONTRACT, light.

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
SIZES = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


@dataclass(frozen=True)
class Place:
    """Where in the settings `kind` something stands: a table, a key, or an entry of a list."""

    kind: type[BaseModel]
    document: Any
    """What is validated; which keys a table may have can depend on it."""
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
        """The class of the table that the place is in."""
        return Place(self.kind, self.document, self.path[:-1]).model

    @property
    def field(self) -> FieldInfo | None:
        return self.table.model_fields.get(self.path[-1]) if self.table else None

    @property
    def meaning(self) -> str:
        """What the setting means, or the list that an entry is part of."""
        field = self.field or (Place(self.kind, self.document, self.path[:-1]).field if self.path[1:] else None)
        return " ".join((field.description or "").split()) if field else ""

    @property
    def such_as(self) -> str:
        """`, such as corpus.paths = ["a.txt", "b.txt"]`, from the field's example or its default; may be nothing."""
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
    """The class that is meant where `model` stands for several, which it tells apart by the table's contents."""
    return model.model_of(table) if hasattr(model, "model_of") and isinstance(table, dict) else model


def _model_within(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_model_within(argument) for argument in getattr(annotation, "__args__", ()))
    return next((model for model in inner if model), None)


def explain_stray(kind: type[BaseModel], tables: Sequence[str], name: str, value: Any) -> str:
    """What is wrong with a `name` at the top of the file that none of the `tables` has."""
    if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
        return f"[{name}]: no such table{nearest(name, tables)}; the tables are {', '.join(tables)}"
    owners = [
        "[[sae]]" if table == "sae" else f"[{table}]" for table in kind.model_fields if name in fields_at(kind, table)
    ]
    where = f"under {' or '.join(owners)}" if owners else "in its table"
    return f"{name} = {show_value(value)}: a key stands {where}, not before the first table"


def explain(kind: type[BaseModel], document: Any, fault: Any) -> str:
    """One fault of pydantic's `errors()` for the settings `kind`, in a sentence or two."""
    place = Place(kind, document, tuple(str(part) for part in fault["loc"]))
    name, value = place.name, fault["input"]
    match fault["type"]:
        case "extra_forbidden":
            return _unknown_key(place, value)
        case "value_error":
            message = str(fault["ctx"]["error"])
            # Of a table as a whole: the message names the settings that do not go together.
            if not name or isinstance(value, dict):
                return message
            return f"{name} = {show_value(value)} {message}. {place.meaning}".rstrip()
        case "model_type":
            return _no_table(place, value)
        case "list_type" | "too_short" | "missing" if place.model:
            single = isinstance(value, dict) and fault["type"] == "list_type"
            given = f" The file has one table [{name}]: it takes two brackets." if single else ""
            return f"{name}: expected one table or more, each beginning with [[{name}]].{given}"
        case "missing":
            return f"{name}: missing; add it{place.such_as}. {place.meaning}".rstrip()
    meaning = place.meaning
    return f"{name} = {show_value(value)}: expected {_expected(place, fault)}. {meaning}".rstrip()


def _unknown_key(place: Place, value: Any) -> str:
    key, known = place.path[-1], list(place.table.model_fields) if place.table else []
    owners = [f"{table}.{key}" for table in place.kind.model_fields if key in fields_at(place.kind, table)]
    close = f" (did you mean {' or '.join(owners)}?)" if owners else nearest(key, known)
    return f"{place.name} = {show_value(value)}: no such key{close}; known here: {', '.join(known)}"


def _no_table(place: Place, value: Any) -> str:
    name = ".".join(part for part in place.path if not part.isdigit())
    if isinstance(value, list):
        return f"{name}: expected one table [{name}], with one bracket on each side"
    heading = f"[[{name}]]" if place.path[-1].isdigit() else f"[{name}]"
    return f"{place.name} = {show_value(value)}: expected a table, which begins with a line {heading}"


def _expected(place: Place, fault: Any) -> str:
    value, context = fault["input"], fault.get("ctx") or {}
    match fault["type"]:
        case "int_type" | "int_from_float":
            return f"a whole number{_number_meant(value, int) or place.such_as}"
        case "float_type":
            return f"a number{_number_meant(value, float) or place.such_as}"
        case "bool_type":
            small = str(value).lower() in ("true", "false") and isinstance(value, str)
            return f"true or false, in small letters and without quotes{f': {value.lower()}' if small else ''}"
        case "string_type":
            scalar = not isinstance(value, list | dict)
            meant = f": {toml_value(toml_value(value))}" if scalar else place.such_as
            return f"text in double quotes{meant}"
        case "list_type":
            return f"a list{place.such_as}"
        case "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            close = nearest(value, choices) if isinstance(value, str) else ""
            return f"{'one of ' if len(choices) > 1 else ''}{', '.join(map(toml_value, choices))}{close}"
        case "finite_number":
            return f"a finite number{place.such_as}"
        case "too_short" | "too_long":
            count = context.get("min_length") if fault["type"] == "too_short" else context.get("max_length")
            least = "at least" if fault["type"] == "too_short" else "at most"
            return f"a list of {least} {count} {'entry' if count == 1 else 'entries'}{place.such_as}"
        case "string_too_short":
            return f"text that is not empty{place.such_as}"
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


def _number_meant(value: Any, number: type) -> str:
    """`: 1000000` for "1,000,000", "1M" or "1e6" in quotes; nothing where no number is meant."""
    if not isinstance(value, str) or not (
        match := re.fullmatch(r"([+-]?[\d.]+(?:e[+-]?\d+)?)([kmbg]?)", _plain(value))
    ):
        return ""
    try:
        meant = float(match[1]) * SIZES.get(match[2], 1)
    except ValueError:
        return ""
    if not math.isfinite(meant) or (number is int and not meant.is_integer()):
        return ""
    return f", without quotes and units: {f'{int(meant):_}' if meant.is_integer() else f'{meant:g}'}"


def _plain(text: str) -> str:
    return re.sub(r"[,_\s']", "", text).lower()


def fields_at(kind: type[BaseModel], table: str) -> list[str]:
    """The keys of one table of the run file; none where there is no such table."""
    model = Place(kind, {}, (table,)).model
    return list(model.model_fields) if model else []


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean …?)`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
