"""A language model that is small, random and real; for the tests of what the monitor does with one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from producer.settings import ModelSettings

HOOK = "blocks.0.hook_resid_post"
WIDTH = 8
WORDS = 40
"""Tokens are <s>, </s>, w0, w1, …"""


def write_model(folder: Path) -> Path:
    """A random Llama of two small layers, with a tokenizer of one word per token."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS + 2,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.7,  # so large that zeroing a layer costs a nat, and ratios are not noise
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<s>": 0, "</s>": 1} | {f"w{number}": number + 2 for number in range(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return folder


def load_model(folder: Path, hooks: Sequence[str] = (HOOK,), device: Literal["cpu", "cuda"] = "cpu") -> LanguageModel:
    """All of it, in float32, with one CPU thread."""
    torch.set_num_threads(1)
    settings = ModelSettings(name=str(folder), hooks=list(hooks), device=device, dtype="float32")
    return load_language_model(settings, whole=True)
