"""Conversations in the layouts of real data sets, and chat templates of several families, shortened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{%- if tools %}<|im_start|>system\n{{ messages[0]['content'] if messages[0]['role'] == 'system' else '' }}"
    "# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}{% if not (tools and loop.first and message.role == 'system') %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message.content %}{{ message['content'] }}{% endif %}"
    '{% for call in message.tool_calls or [] %}{{ \'\n<tool_call>\n{"name": "\' + call.function.name + '
    "'\", \"arguments\": ' }}{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
"""Qwen's: tools in the system's turn, calls as JSON."""
LLAMA = (
    '{{- bos_token }}{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}'
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
    "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{% set messages = messages[1:] %}"
    "{%- endif %}{{- '<|eot_id|>' }}{%- for message in messages %}"
    "{%- set role = 'ipython' if message.role == 'tool' else message.role %}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
    "{%- if message.tool_calls %}{%- set call = message.tool_calls[0].function %}"
    "{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{- call.arguments | tojson }}{{- '}' }}"
    "{%- else %}{{- message['content'] | trim }}{% endif %}{{- '<|eot_id|>' }}{%- endfor %}"
)
"""Llama 3.1's: its own BOS, today's date, texts stripped, tools as ipython."""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
)
"""Gemma 2's: no system, strict turns."""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content + "
    "' [/INST]' }}{% elif message.role == 'assistant' %}{{ ' ' + message.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
"""Mistral's: EOS ends a turn."""
TULU = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + "
    "eos_token + '\n' }}{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
)
"""Tulu's: roles are plain text."""
THINKING = (
    "{% for message in messages %}{% set content = message.content %}{% if message.role == 'assistant' and "
    "'</think>' in content and not loop.last %}{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
)
"""Qwen 3's: only the last turn keeps its reasoning."""
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
"""SmolLM 3's: marks what is generated, the end of the turn included."""
FAMILIES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "mistral": MISTRAL, "tulu": TULU, "thinking": THINKING}
SPECIAL = (
    *("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
)
CHARACTERS = "".join(chr(code) for code in range(32, 127)) + "\näé"
TURNS = [("user", "Hi there "), ("assistant", " Hello!\n"), ("user", "2+2?"), ("assistant", "It is 4.")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TURNS]
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": json.dumps({"a": 2, "of": "x y"})}}
TOOL_MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "4"},
    {"role": "assistant", "content": "Four."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def chat_tokenizer(template: str | None = CHATML, merges: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per character, but for special tokens and the `merges` of several characters."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS, "?", *merges])}
    rules = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    rules.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    pattern = "|".join([*merges, r"[\s\S]"])
    rules.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    rules.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def write_chat_model(folder: Path, context: int = 64) -> Path:
    """A random Llama of one small layer, eight wide, with the tokenizer of Qwen's template."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=context, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
