"""A conversation as text by the tokenizer's chat template, and which characters of it each role wrote.

Where the template marks what the assistant generates (`{% generation %}`), and only that is asked for, its marks count.
Elsewhere the texts of the messages are rendered a second time, each between two characters of Unicode's private planes
that name its message: what stands between them is the message's own. Both renderings must agree, so that a template
that rewrites its messages is refused rather than guessed at. What a template puts around a message, such as the name
of the role and the end of the turn, belongs to none.

A template that asks for the date is given one and the same day: a shard must read the same tomorrow.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from producer.common.parsing import ParseError, parse_object
from producer.corpus.base import Conversation, CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = datetime(2024, 7, 26)
"""Today, for templates that ask: the day that Llama 3.1's falls back to."""
_NOW = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BEGIN, _END = 0xF0000, 0x100000
"""Characters that begin and end a text: one plane each, in which the message is a number."""
MAX_BRACES = 50
"""Braces behind the last argument of a call, of which one ends it."""
_MARK = re.compile("[\U000f0000-\U0010ffff]")
_TAGS = re.compile("(</?(?:think|tool_response)>)")
"""What templates look for in a message, as to leave out earlier reasoning: it stays outside the marks."""
_CALL_BEGIN = re.compile(r'\{(?:"type": ?"function", ?"function": ?\{)?"name": ?"$')
"""What templates that write calls as JSON put before the name of a function."""


@dataclass(frozen=True)
class RenderedChat:
    """The text of a conversation."""

    text: str
    spans: list[tuple[int, int]] | None
    """Ranges of characters that the roles of corpus.roles wrote, in order; None without corpus.roles."""


class ChatTemplate:
    """The template of a tokenizer. Raises CorpusError for a tokenizer without one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, roles: Collection[str]) -> None:
        """`roles` are those whose texts are streamed; without any, everything is."""
        if not getattr(tokenizer, "chat_template", None):
            raise CorpusError(
                'corpus.kind = "chat" needs a chat template, and the tokenizer has none; use the chat model\'s own '
                "tokenizer, or put a chat_template.jinja into the model's folder"
            )
        if roles and not tokenizer.is_fast:
            raise CorpusError(
                f"corpus.roles = {sorted(roles)} needs a fast tokenizer, which says where in the text a token stands; "
                "leave corpus.roles out, or use a model with a tokenizer.json"
            )
        self.source = _NOW.sub(lambda call: repr(DATE.strftime(call["format"])), tokenizer.get_chat_template())
        if "strftime_now(" in self.source:
            raise CorpusError(
                "the chat template asks for today's date in a computed format, so that a text would change from day "
                "to day; write the date into the chat_template.jinja of the model's folder"
            )
        self._roles = frozenset(roles)
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._has_generation = bool(_GENERATION.search(self.source))

    def render(self, conversation: Conversation) -> RenderedChat:
        """Renders a conversation. Raises CorpusError for one that the template does not take."""
        messages = conversation.messages
        try:
            text, generated = self._render(messages, conversation)
        except CorpusError:
            if messages[0]["role"] != "system" or len(messages) < 2:
                raise
            messages = _with_system_inside(messages)
            text, generated = self._render(messages, conversation)
        if not self._roles:
            return RenderedChat(text, None)
        if self._has_generation and self._roles == {"assistant"}:
            return RenderedChat(text, generated)
        return RenderedChat(text, self._marked_spans(messages, conversation, text))

    def _render(self, messages: list[dict[str, Any]], conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text, and the ranges that the template marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template  # heavy

        try:
            rendering: Any = render_jinja_template(
                [[{key: value for key, value in message.items() if key != "parts"} for message in messages]],
                tools=conversation.tools,  # type: ignore[arg-type]
                chat_template=self.source,
                return_assistant_tokens_mask=self._has_generation,
                **self._variables,
            )
        except Exception as error:  # a template is a program: whatever it raises is its opinion of this conversation
            raise CorpusError(
                f"{conversation.place}: the chat template does not take this conversation "
                f"({type(error).__name__}: {error}); leave it out, or use another chat_template.jinja"
            ) from None
        texts, generated = rendering
        return texts[0], [(start, end) for start, end in generated[0]] if self._has_generation else []

    def _marked_spans(
        self, messages: list[dict[str, Any]], conversation: Conversation, text: str
    ) -> list[tuple[int, int]]:
        """Returns the ranges of `text` that these roles wrote."""
        if _MARK.search(text):
            raise CorpusError(
                f"{conversation.place}: holds a character of Unicode's private planes, by which the texts of roles are "
                "told apart; leave it out, or leave corpus.roles out"
            )
        marks = _Marks()
        marked_text, _ = self._render([marks.mark(message) for message in messages], conversation)
        if _MARK.sub("", marked_text) != text:
            raise CorpusError(
                f"{conversation.place}: the chat template rewrites the text of its messages, so that corpus.roles "
                "cannot be told; leave corpus.roles out, or use a template that marks {% generation %}"
            )
        return marks.spans(marked_text, self._roles)


class _Marks:
    """Numbers the texts of a conversation, and finds them again in its rendering."""

    def __init__(self) -> None:
        self._roles: list[str] = []
        self._calls: set[int] = set()

    def mark(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns the message with marks around each text in it."""
        role, content = message["role"], message["content"]
        parts = message.get("parts") or [(role, content)]
        marked = message | {"content": "\n\n".join(self._mark_content(part, text) for part, text in parts)}
        if "reasoning_content" in message:
            marked["reasoning_content"] = self._mark_content(role, message["reasoning_content"])
        if "tool_calls" in message:
            marked["tool_calls"] = [self._mark_call(role, call) for call in message["tool_calls"]]
        return marked

    def spans(self, marked_text: str, roles: Collection[str]) -> list[tuple[int, int]]:
        """Returns the ranges of the text without its marks that `roles` wrote, in order."""
        text = _MARK.sub("", marked_text)
        begins: dict[int, int] = {}
        ends: dict[int, int] = {}
        for count, mark in enumerate(_MARK.finditer(marked_text)):
            position, code = mark.start() - count, ord(mark[0])
            if code >= _END:
                ends[code - _END] = position
            else:
                begins.setdefault(code - _BEGIN, position)
        return sorted(
            _whole_call(text, begin, ends[number]) if number in self._calls else (begin, ends[number])
            for number, begin in begins.items()
            if self._roles[number] in roles
        )

    def _mark_content(self, role: str, text: str) -> str:
        return "".join(
            part if _TAGS.fullmatch(part) else self._around(part, self._number(role)) for part in _TAGS.split(text)
        )

    def _mark_call(self, role: str, call: dict[str, Any]) -> dict[str, Any]:
        number = self._number(role)
        self._calls.add(number)

        def mark(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: mark(entry) for key, entry in value.items()}
            if isinstance(value, list):
                return [mark(entry) for entry in value]
            return self._around(value, number) if isinstance(value, str) else value

        return call | {"function": mark(call["function"])}

    def _number(self, role: str) -> int:
        self._roles.append(role)
        return len(self._roles) - 1

    def _around(self, text: str, number: int) -> str:
        """Puts marks around a text, inside its spaces: a template that strips it must find the same spaces."""
        core = text.strip()
        if not core:
            return text
        front = text.index(core)
        return f"{text[:front]}{chr(_BEGIN + number)}{core}{chr(_END + number)}{text[front + len(core) :]}"


def _whole_call(text: str, begin: int, end: int) -> tuple[int, int]:
    """Widens a range from the name of a function to its last argument to the whole call, where it is JSON."""
    front = _CALL_BEGIN.search(text[max(0, begin - 60) : begin])
    if front is None:
        return begin, end
    begin -= len(front[0])
    for brace in itertools.islice(re.compile("}").finditer(text, end), MAX_BRACES):
        with suppress(ParseError):
            parse_object(text[begin : brace.end()])
            return begin, brace.end()
    return begin, end


def _with_system_inside(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Puts the system's text before the first message behind it, for templates that know no system."""
    system, first, *others = messages
    parts = [("system", system["content"]), (first["role"], first["content"])]
    return [first | {"content": "\n\n".join(text for _, text in parts), "parts": parts}, *others]
