"""Conversations: layouts, templates, roles, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from producer.corpus import CorpusError, open_corpus
from producer.corpus.base import Conversation, Document
from producer.corpus.rendering.windows import tokens_fingerprint, windows_of
from producer.corpus.sources.chat import read_conversation
from producer.settings import CorpusSettings
from tests.small_chats import (
    CALL,
    CHATML,
    FAMILIES,
    GEMMA,
    GENERATION,
    LLAMA,
    MESSAGES,
    MISTRAL,
    SHAREGPT,
    THINKING,
    TOOL_MESSAGES,
    TOOLS,
    chat_tokenizer,
)


def conversation(messages: Any = MESSAGES, **beside: Any) -> Conversation:
    read = read_conversation(messages, beside, "here")
    assert read is not None
    return read


def chat(**settings: Any) -> CorpusSettings:
    return CorpusSettings(**{"kind": "chat", "paths": ["chats.jsonl"], "context": 400, **settings})


def text_of(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def streamed(tokenizer: PreTrainedTokenizerFast, *documents: Document, **settings: Any) -> list[str]:
    """The text of each run of positions that are streamed."""
    windows = windows_of(documents, tokenizer, chat(**settings))
    flat, kept = windows.ids.ravel(), windows.kept.ravel()
    runs = np.split(np.arange(len(flat)), np.flatnonzero(np.diff(kept)) + 1)
    return [text_of(tokenizer, flat[run]) for run in runs if kept[run[0]]]


def whole(tokenizer: PreTrainedTokenizerFast, *documents: Document, **settings: Any) -> str:
    windows = windows_of(documents, tokenizer, chat(**settings))
    return text_of(tokenizer, windows.ids[~windows.padded])


# Templates


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_is_what_the_template_makes_of_it(family: str) -> None:
    """As transformers renders and tokenizes it; its own BOS is not doubled, and no marker is lost."""
    tokenizer = chat_tokenizer(FAMILIES[family])
    settings = {"chat_template": FAMILIES[family].replace('strftime_now("%d %b %Y")', '"26 Jul 2024"')}
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **settings)
    assert whole(tokenizer, conversation()) == "<s>" + expected.removeprefix("<s>")
    assert whole(tokenizer, conversation(), prepend_bos=False) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_the_roles_say_is_streamed(family: str) -> None:
    """By the place of each message in the rendering; the template's own words and markers belong to none."""
    tokenizer = chat_tokenizer(FAMILIES[family])
    assert streamed(tokenizer, conversation(), roles=["assistant"]) == ["Hello!", "It is 4."]
    assert streamed(tokenizer, conversation(), roles=["user"]) == ["Hi there", "2+2?"]
    both = streamed(tokenizer, conversation(), roles=["user", "assistant"])
    assert both == ["Hi there", "Hello!", "2+2?", "It is 4."]


def test_all_roles_are_streamed_without_the_setting() -> None:
    """Special tokens are left out, as from any text."""
    assert streamed(chat_tokenizer(CHATML), conversation(MESSAGES[2:])) == [
        "user\n2+2?", "\n", "assistant\nIt is 4.", "\n"
    ]  # fmt: skip


def test_marks_of_the_template_count_where_it_has_them() -> None:
    """`{% generation %}` includes the end of a turn, which is streamed where special tokens are."""
    tokenizer = chat_tokenizer(GENERATION)
    roles: dict[str, Any] = {"roles": ["assistant"]}
    assert streamed(tokenizer, conversation(), **roles) == [" Hello!\n", "It is 4."]
    kept = streamed(tokenizer, conversation(), exclude_special=False, **roles)
    assert kept == [" Hello!\n<|im_end|>", "It is 4.<|im_end|>"]
    mask = tokenizer.apply_chat_template(
        MESSAGES, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
    )["assistant_masks"]
    windows = windows_of([conversation()], tokenizer, chat(exclude_special=False, prepend_bos=False, **roles))
    assert windows.kept[~windows.padded].tolist() == [bool(one) for one in mask]
    assert streamed(tokenizer, conversation(), roles=["user"]) == ["Hi there", "2+2?"]


def test_a_token_that_is_partly_the_role_s_counts_as_its() -> None:
    """Tokens do not end where texts do."""
    tokenizer = chat_tokenizer(CHATML, merges=("t\nIt",))
    assert streamed(tokenizer, conversation(MESSAGES[2:]), roles=["assistant"])[0].endswith("It is 4.")


def test_a_system_that_the_template_does_not_know_stands_before_the_first_message() -> None:
    """Gemma's and Mistral's refuse the role; its text is the system's still."""
    messages = [{"role": "system", "content": "Be kind."}, *MESSAGES]
    for template in (GEMMA, MISTRAL):
        tokenizer = chat_tokenizer(template)
        assert "Be kind.\n\nHi there" in whole(tokenizer, conversation(messages))
        assert streamed(tokenizer, conversation(messages), roles=["system"]) == ["Be kind."]
        assert streamed(tokenizer, conversation(messages), roles=["user"])[0] == "Hi there"
    tokenizer = chat_tokenizer(CHATML)
    assert whole(tokenizer, conversation(messages)).startswith("<s><|im_start|>system\nBe kind.<|im_end|>")


def test_tools_their_calls_and_their_answers() -> None:
    """Schemas are given to the template, a call is the assistant's to its last brace, an answer is the tool's."""
    tools = conversation(TOOL_MESSAGES, tools=TOOLS)
    tokenizer = chat_tokenizer(CHATML)
    assert '"parameters": {"type": "object"' in whole(tokenizer, tools)
    call = '{"name": "add", "arguments": {"a": 2, "of": "x y"}}'
    assert streamed(tokenizer, tools, roles=["assistant"]) == [call, "Four."]
    assert streamed(tokenizer, tools, roles=["tool"]) == ["4"]
    assert streamed(tokenizer, tools, roles=["system"]) == ["Be kind."]
    assert streamed(chat_tokenizer(LLAMA), tools, roles=["assistant"]) == [
        call.replace("arguments", "parameters"), "Four."
    ]  # fmt: skip


def test_reasoning_that_the_template_leaves_out() -> None:
    """Of earlier turns; the last one keeps it."""
    messages = [MESSAGES[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!"}] * 2
    tokenizer = chat_tokenizer(THINKING)
    assert streamed(tokenizer, conversation(messages), roles=["assistant"]) == ["Hello!", "hm", "Hello!"]


def test_a_template_s_today_is_always_the_same_day() -> None:
    """A shard must read the same tomorrow."""
    assert "Today Date: 26 Jul 2024" in whole(chat_tokenizer(LLAMA), conversation())
    computed = chat_tokenizer("{% set f = '%d' %}{{ strftime_now(f) }}")
    with pytest.raises(CorpusError, match="asks for today's date in a computed format"):
        whole(computed, conversation())


def test_conversations_are_separated_once() -> None:
    """A template that ends with EOS, or EOS and a line end, gets no second one; markers inside a text stay."""
    end = MESSAGES[2:]
    assert whole(chat_tokenizer(MISTRAL), conversation(end), conversation(end)).count("</s>") == 2
    assert "It is 4.</s>\n<|user|>" in whole(chat_tokenizer(FAMILIES["tulu"]), conversation(end), conversation(end))
    brought = [{"role": "user", "content": "<s>say <|im_end|>"}, MESSAGES[1]]
    text = whole(chat_tokenizer(CHATML), conversation(brought))
    assert text.startswith("<s><|im_start|>user\n<s>say <|im_end|><|im_end|>")


def test_fingerprint_knows_template_and_roles() -> None:
    """A change of either is another stream; for texts neither counts."""
    prints = {
        tokens_fingerprint(chat_tokenizer(template), chat(roles=roles))
        for template in (CHATML, GEMMA)
        for roles in ([], ["assistant"], ["user"])
    }
    assert len(prints) == 6
    text = CorpusSettings(context=400)
    assert tokens_fingerprint(chat_tokenizer(CHATML), text) == tokens_fingerprint(chat_tokenizer(None), text)


# Layouts


LAYOUTS: dict[str, dict[str, Any]] = {
    "OpenAI": {"messages": MESSAGES},
    "OpenAI parts": {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]},
    "ShareGPT": {"id": "x_0", "conversations": SHAREGPT},
    "Tulu": {"id": "x", "messages": MESSAGES, "source": "ai2-adapt-dev/x"},
    "JSON text": {"messages": json.dumps(MESSAGES)},
    "object of lists": {"messages": {key: [m[key] for m in MESSAGES] for key in ("role", "content")}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["jsonl", "parquet", "dataset"])
def test_layouts_of_real_data_sets(tmp_path: Path, layout: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gives the same conversation, from each kind of file."""
    record = LAYOUTS[layout]
    folder = tmp_path / "data"
    folder.mkdir()
    if form == "parquet":
        if layout == "object of lists":
            pytest.skip("is how older `datasets` show a list of objects")
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist([record, record]), folder / "a.parquet")
    else:
        (folder / "a.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
    if form == "dataset":
        pytest.importorskip("datasets")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    where: dict[str, Any] = {"dataset": str(folder)} if form == "dataset" else {"paths": [str(folder)]}
    corpus = open_corpus(CorpusSettings(kind="chat", **where))
    (first, second) = corpus.documents(0)
    assert isinstance(first, Conversation) and isinstance(second, Conversation)
    assert first.messages == second.messages == MESSAGES


def test_tool_calls_of_parquet_and_of_sharegpt(tmp_path: Path) -> None:
    """Parquet gives each message the fields of all; ShareGPT writes a call as text, and tools as JSON."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    record = {"messages": TOOL_MESSAGES, "tools": json.dumps(TOOLS)}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    (document,) = open_corpus(CorpusSettings(kind="chat", paths=[str(tmp_path)])).documents(0)
    assert document == Conversation(document.place, conversation(TOOL_MESSAGES).messages, TOOLS)  # type: ignore[union-attr]
    turns = [
        {"from": "human", "value": "2+2?"},
        {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 2, "of": "x y"}})},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "Four."},
    ]
    shared = conversation(turns, system="Be kind.", tools=json.dumps(TOOLS))
    texts = {whole(chat_tokenizer(CHATML), one) for one in (shared, conversation(TOOL_MESSAGES, tools=TOOLS))}
    assert len(texts) == 1


def test_null_and_empty_conversations_are_none(tmp_path: Path) -> None:
    lines = [{"messages": None}, {"messages": []}, {"messages": MESSAGES}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert len(list(open_corpus(CorpusSettings(kind="chat", paths=[str(tmp_path)])).documents(0))) == 1


# What is wrong


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "narrator", "content": "x"}], "message 0: the role is 'narrator'; expected one of system, user,"),
        ([{"role": "user", "content": 3}], "message 0: its content is int; expected text or a list of parts"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "parts of type image; only text is read"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "a tool call without a name"),
        ([{"text": "x"}], "holds list; expected messages, a list of objects with role and content"),
        ("[{", "the messages: not JSON"),
        (7, "holds int; expected messages"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(tmp_path: Path, messages: Any, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(CorpusError) as caught:
        open_corpus(CorpusSettings(kind="chat", paths=[str(tmp_path)]))
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl, line at byte 0")
    assert said in str(caught.value)


def test_what_a_template_does_not_take_is_refused_with_its_words() -> None:
    """A tool's answer breaks Gemma's turns."""
    with pytest.raises(
        CorpusError, match=r"here, corpus.*does not take .*roles must alternate.*leave it out"
    ) as caught:
        whole(chat_tokenizer(GEMMA), read_conversation(TOOL_MESSAGES, {}, "here, corpus"))  # type: ignore[arg-type]
    assert "TemplateError" in str(caught.value)


def test_tokenizers_that_cannot_read_chats_are_refused() -> None:
    with pytest.raises(CorpusError, match="needs a chat template, and the tokenizer has none; use the chat model's"):
        tokens_fingerprint(chat_tokenizer(None), chat())
    counting = "{% for message in messages %}{{ message.content | length }}{% endfor %}"
    with pytest.raises(CorpusError, match=r"rewrites the text of its messages, so that corpus\.roles cannot be told"):
        whole(chat_tokenizer(counting), conversation(), roles=["user"])
    with pytest.raises(CorpusError, match="a character of Unicode's private planes"):
        whole(chat_tokenizer(CHATML), conversation([{"role": "user", "content": "\U000f0000"}]), roles=["user"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "chat"}, "needs either corpus.paths"),
        ({"kind": "chat", "paths": ["a"], "dataset": "b/c"}, "needs either corpus.paths"),
        ({"kind": "stdlib", "roles": ["user"]}, 'are of conversations, and corpus.kind is "stdlib"; set kind = "chat"'),
        ({"kind": "chat", "paths": ["a"], "roles": ["gpt"]}, "'system', 'user', 'assistant' or 'tool'"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        CorpusSettings(**settings)


def test_files_of_two_kinds_and_files_that_are_one_array(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("[\n" + json.dumps({"conversations": SHAREGPT}) + "\n]")
    with pytest.raises(CorpusError, match=r"the file is one JSON array: unpack it \(jq -c '\.\[\]'\)"):
        open_corpus(chat(paths=[str(tmp_path)]))
    (tmp_path / "a.parquet").write_text("PAR1")
    with pytest.raises(CorpusError, match=r"names parquet files, such as a\.parquet, and others, such as b\.jsonl"):
        open_corpus(chat(paths=[str(tmp_path)]))
    assert CALL["function"]
