"""TOML as an operator writes and reads it. CONTRACT: files are read, and values are shown in messages, only here
(`run_file.show_settings` writes whole files).

A file is UTF-8, with or without a byte order mark. A fault names the file, the line and the column. A value in a
message stands as it would in the file: `true`, `"text"`, `["a", "b"]`; never as Python would write it. Light.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from datetime import date, time
from pathlib import Path
from typing import Any

from producer.common.parsing import ParseError, parse_toml

MAX_FILE_BYTES = 1 << 20
"""A run file is a page or two; a larger file is another file named by mistake."""
SHOWN_CHARACTERS = 160
"""A longer value is cut in a message."""

OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Encodings by their byte order marks, longest first."""


class SettingsError(ValueError):
    """The run file cannot be used. `str(error)` is the whole message for the operator, one fault per line."""


def read_toml(path: str | Path, what: str = "run file") -> dict[str, Any]:
    """The document in the file `path`. Raises SettingsError, which calls the file `what` and says what to do."""
    name = f"{what} {path}"
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise SettingsError(f"{name} does not exist (relative paths start at {Path.cwd()})") from None
    except IsADirectoryError:
        raise SettingsError(f"{name} is a folder; name the file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise SettingsError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise SettingsError(f"{name} is larger than {MAX_FILE_BYTES:,} bytes; is it the right file?")
    text = _decode(data, name)
    try:
        return parse_toml(text)
    except ParseError as error:
        raise SettingsError(f"{name} is not valid TOML: {_explain_syntax_error(text, str(error))}") from None


def _decode(data: bytes, name: str) -> str:
    for mark, encoding in OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise SettingsError(f"{name} is {encoding}; save it as UTF-8")
    if b"\0" in data:
        raise SettingsError(f"{name} is not text in UTF-8 (it holds zero bytes); save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SettingsError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} in line {line}; save it as UTF-8"
        ) from None


def _explain_syntax_error(text: str, message: str) -> str:
    """Says where the parser stopped, shows the line there, and names the usual cause."""
    # Tables are tuples in the parser's messages: ('corpus', 'synthetic') is [corpus.synthetic].
    message = re.sub(r"\(('[^()]*',?)\)", _table_name, message)
    message = message.replace("Illegal character '\\n'", "The line ends before its closing quote")
    position = re.search(r"\(at line (\d+), column (\d+)\)", message)
    if position is None:
        at_end = message.removesuffix("(at end of document)").strip()
        where = "" if at_end == message else f"line {text.count(chr(10)) + 1}, at its end: "
        return f"{where}{at_end}{_likely_cause('', text)}"
    line = text.split("\n")[int(position[1]) - 1].strip()
    where = f"line {position[1]}, column {position[2]}"
    what = message[: position.start()].strip()
    return f"{where}: {what}{f': {_cut(line)}' if line else ''}{_likely_cause(line, text)}"


def _table_name(match: re.Match[str]) -> str:
    return "[" + ".".join(re.findall(r"'([^']*)'", match[1])) + "]"


def _likely_cause(line: str, text: str) -> str:
    """The usual cause of a fault in such a line; may be empty."""
    value = line.partition("=")[2].strip()
    if re.match(r"(True|False)\b", value):
        return "; true and false are written in small letters"
    if re.search(r"(?m)^\s*\[sae\]", text):
        return "; each SAE is a table [[sae]], with two brackets"
    if re.match(r"[A-Za-z~$/.]", value) and not re.match(r"(true|false|inf|nan)\b", value):
        return "; text stands in double quotes"
    if re.match(r"\d[\d_]*,\d{3}", value):
        return "; digits may be grouped with _, as in 1_000_000"
    return ""


def toml_value(value: Any) -> str:
    """`value` as TOML in one line, for a message or a line to copy; exact."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf, -inf and nan are TOML's own words
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml_value(item)}' for key, item in value.items())} }}" if value else "{}"
    if isinstance(value, date | time):
        return value.isoformat()
    return json.dumps(value)


def show_value(value: Any) -> str:
    """`value` as TOML for a message, cut where it is long."""
    return _cut(toml_value(value))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
