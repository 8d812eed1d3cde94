"""Conversations: the layouts in which data sets hold messages, as one.

    {"messages": [{"role": "user", "content": "Hi"}, …], "tools": […]}              OpenAI, Tulu
    {"conversations": [{"from": "human", "value": "Hi"}, …], "system": "…"}         ShareGPT

Both become messages with the keys of chat templates: role (system, user, assistant, tool), content as text, and what
else a message has, such as tool_calls. The tokenizer's template renders them later (`chat_template`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from producer.common.parsing import ParseError, parse_json
from producer.corpus.base import Conversation, CorpusError

CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold messages in data sets, in the order in which they are looked for."""
BESIDE_COLUMNS = ("tools", "system")
"""Columns that belong to the conversation beside them."""
ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""Names of roles in data sets, and the role that templates know."""
_CALLING = ("function_call", "tool_call")


def holds_messages(value: object) -> bool:
    """Tells whether a value has the form of a conversation's messages."""
    if isinstance(value, Mapping):  # older `datasets` give a list of objects as an object of lists
        return bool({"role", "from"} & set(value)) and all(isinstance(part, list) for part in value.values())
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return False
    return all(isinstance(message, Mapping) and {"role", "from"} & set(message) for message in value)


def read_conversation(value: object, beside: Mapping[str, Any], place: str) -> Conversation | None:
    """Reads the messages in `value`; `beside` holds the record's BESIDE_COLUMNS. None for a value without messages.

    Raises CorpusError.
    """
    if isinstance(value, str):
        value = _parse(value, place, "the messages")
    if value is None or value == []:
        return None
    if not holds_messages(value):
        raise CorpusError(
            f"{place}: holds {_type_name(value)}; expected messages, a list of objects with role and content or with "
            "from and value; name another corpus.column"
        )
    entries: Any = value
    if isinstance(entries, Mapping):
        entries = [dict(zip(entries, row, strict=True)) for row in zip(*entries.values(), strict=True)]
    messages = [_message(message, f"{place}, message {index}") for index, message in enumerate(entries)]
    system = beside.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(place, messages, _tools(beside.get("tools"), place))


def _message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    name = message.get("role") or message.get("from")
    role = ROLE_NAMES.get(name) if isinstance(name, str) else None
    if role is None:
        raise CorpusError(f"{place}: the role is {name!r}; expected one of {', '.join(ROLE_NAMES)}")
    fields = ("name", "tool_call_id", "reasoning_content")
    normalized: dict[str, Any] = {"role": role}
    normalized |= {field: message[field] for field in fields if message.get(field) is not None}
    content = _content(message.get("content", message.get("value")), place)
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if name in _CALLING and not calls and (call := _call_in(content)):
        calls, content = [call], ""
    if calls:
        normalized["tool_calls"] = [_tool_call(call, place) for call in calls]
    return normalized | {"content": content}


def _content(value: object, place: str) -> str:
    """Returns the text of a message; parts of text follow each other."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [part if isinstance(part, str) else _part_text(part) for part in value]
        if None not in texts:
            return "".join(text for text in texts if text is not None)
        kinds = sorted({str(part.get("type")) for part in value if isinstance(part, Mapping)} - {"text"})
        raise CorpusError(f"{place}: its content has parts of type {', '.join(kinds)}; only text is read: leave it out")
    raise CorpusError(f"{place}: its content is {_type_name(value)}; expected text or a list of parts")


def _part_text(part: object) -> str | None:
    text = part.get("text") if isinstance(part, Mapping) else None
    return text if isinstance(text, str) else None


def _call_in(content: str) -> dict[str, Any] | None:
    """Returns the call that ShareGPT's function_call writes as text, {"name": …, "arguments": …}."""
    try:
        value = parse_json(content)
    except ParseError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("name"), str) and "arguments" in value else None


def _tool_call(call: object, place: str) -> dict[str, Any]:
    """Returns a call as templates expect it, with its arguments as an object: OpenAI's are JSON in a text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise CorpusError(f"{place}: a tool call without a name; expected {{name, arguments}}, or it under `function`")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with suppress(ParseError):  # a model's own faulty call is text like any other
            arguments = parse_json(arguments)
    if isinstance(arguments, Mapping):  # parquet gives each object the fields of all
        arguments = {key: value for key, value in arguments.items() if value is not None}
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(value: object, place: str) -> list[dict[str, Any]] | None:
    if isinstance(value, str) and value.strip():
        value = _parse(value, place, "the column tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise CorpusError(f"{place}: tools holds {_type_name(value)}; expected a list of JSON schemas, or it as a text")
    return [dict(tool) for tool in value]


def _parse(text: str, place: str, what: str) -> object:
    try:
        return parse_json(text)
    except ParseError as error:
        raise CorpusError(f"{place}: {what}: {error}; expected a list, or one written as JSON") from None


def _type_name(value: object) -> str:
    return type(value).__name__
