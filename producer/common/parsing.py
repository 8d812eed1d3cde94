"""JSON and TOML from outside: each way in which they can be wrong is a ParseError that says what and where.

The parsers of the standard library raise more than their own errors: ValueError for an integer of 5,000 digits,
RecursionError for deep nesting (how deep depends on the caller), UnicodeDecodeError. They also return what cannot be
written again: half a character, as in "\\ud83d", fails in the first encoder, NaN in the first JSON parser elsewhere.
Every file, line and answer that another process may have written is therefore parsed here.

    parse_object(b'{"a": [1, 2]}')                  # ParseError when it is a list, or no JSON
    read_object(folder / "cfg.json")                # OSError travels

Light: the standard library only.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

MAX_DEPTH = 500
"""Nested lists and objects, at most. The parser's own limit depends on how deep its caller stands on the stack."""

_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_PARTS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]|\d[\d_]*+', re.DOTALL)
"""A whole string, a bracket, or the digits of a number (TOML groups them by underscores)."""


class ParseError(ValueError):
    """A text is not the JSON or TOML it should be. `str(error)` says what is wrong and where, but not in which file."""


def parse_json(data: bytes | str, *, finite: bool = False) -> Any:
    """The value of a JSON document in UTF-8; half a character in a string becomes U+FFFD.

    NaN and infinities, which JSON lacks but Python writes, are kept, or become None where `finite` is set.
    Raises ParseError.
    """
    text = _decoded(data)
    try:
        value = (_FINITE if finite else _PLAIN).decode(text)
    except json.JSONDecodeError as error:
        raise ParseError(f"not JSON: {error}") from None
    except RecursionError:
        raise ParseError(_depth_fault(text) or f"nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise ParseError(_number_fault(text) or str(error)) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and (fault := _depth_fault(text)):
        raise ParseError(fault)
    return _with_whole_characters(value) if _HALF_CHARACTER.search(text) else value


def parse_object(data: bytes | str, *, finite: bool = False) -> dict[str, Any]:
    """The same of a document that must be an object. Raises ParseError."""
    value = parse_json(data, finite=finite)
    if not isinstance(value, dict):
        raise ParseError(f"a JSON {type(value).__name__}, expected an object")
    return value


def read_object(path: Path, *, finite: bool = False) -> dict[str, Any]:
    """The JSON object in a file. Raises ParseError, and OSError where the file cannot be read."""
    return parse_object(path.read_bytes(), finite=finite)


def parse_toml(data: bytes | str) -> dict[str, Any]:
    """The tables of a TOML document. Raises ParseError."""
    text = _decoded(data)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ParseError(str(error)) from None
    except RecursionError:
        raise ParseError("nested too deeply") from None
    except ValueError as error:
        raise ParseError(_number_fault(text) or str(error)) from None


def _without_half_characters(text: str) -> str:
    r"""JSON may escape half a character, as in "\ud83d"; no encoder and no tokenizer takes that: it becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _finite_float(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


_PLAIN = json.JSONDecoder()
_FINITE = json.JSONDecoder(parse_constant=lambda _: None, parse_float=_finite_float)


def _decoded(data: bytes | str) -> str:
    if isinstance(data, str):
        return data.removeprefix("\ufeff")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ParseError(f"not UTF-8 at byte {error.start:,} (0x{byte:02x}: {error.reason})") from None


def _with_whole_characters(value: Any) -> Any:
    if isinstance(value, str):
        return _without_half_characters(value)
    if isinstance(value, list):
        return [_with_whole_characters(one) for one in value]
    if isinstance(value, dict):
        return {_without_half_characters(key): _with_whole_characters(one) for key, one in value.items()}
    return value


def _depth_fault(text: str) -> str | None:
    """Says where a document nests deeper than MAX_DEPTH."""
    depth = 0
    for part in _PARTS.finditer(text):
        depth += (part[0] in "[{") - (part[0] in "]}")
        if depth > MAX_DEPTH:
            return f"nested more than {MAX_DEPTH} deep at {_place(text, part.start())}"
    return None


def _number_fault(text: str) -> str | None:
    """Says where an integer stands that has more digits than Python converts."""
    limit = sys.get_int_max_str_digits()
    for part in _PARTS.finditer(text):
        digits = len(part[0].replace("_", ""))
        if part[0][0].isdigit() and digits > limit:
            place = _place(text, part.start())
            return f"an integer of {digits:,} digits at {place}; expected at most {limit:,}: write it as a string"
    return None


def _place(text: str, index: int) -> str:
    """Line and column of an index, in the words of JSONDecodeError."""
    return f"line {text.count(chr(10), 0, index) + 1} column {index - text.rfind(chr(10), 0, index)} (char {index})"
